package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// writerFunc is a reader of the log that a test plays.
type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func lostWords(lines int64) []byte { return fmt.Appendf(nil, "lost %d\n", lines) }

func TestLogWriterGathers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var writes []string
		w := &logWriter{out: writerFunc(func(p []byte) (int, error) { writes = append(writes, string(p)); return len(p), nil })}
		for i := range 100 {
			fmt.Fprintf(w, "line %d\n", i)
		}
		synctest.Wait()
		if len(writes) > 0 {
			t.Errorf("%q was written before lines could gather", writes)
		}
		for _, idle := range []time.Duration{logDelay, time.Hour} {
			time.Sleep(idle)
			synctest.Wait()
			if len(writes) != 1 || strings.Count(writes[0], "\n") != 100 {
				t.Errorf("after %v: %d writes, want one of 100 lines: %q", idle, len(writes), writes)
			}
		}
		if w.Close(); len(writes) != 1 {
			t.Errorf("%d writes, one of them of nothing", len(writes))
		}
	})
}

// A reader of the log that stands still costs memory up to a bound, delays no
// line, and is told how much it missed.
func TestLogWriterBound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		begun, gate := make(chan struct{}, 10), make(chan struct{}) // a write that begins; a write needs it closed
		w := &logWriter{lostLine: lostWords, out: writerFunc(func(p []byte) (int, error) { begun <- struct{}{}; <-gate; return out.Write(p) })}
		line := []byte(strings.Repeat("x", 1023) + "\n")
		io.WriteString(w, "first\n")
		<-begun // it hangs in the write of this line
		const more = 7
		for range maxLogBacklog/len(line) + more {
			if n, err := w.Write(line); n != len(line) || err != nil {
				t.Fatalf("write: %d, %v", n, err)
			}
		}
		close(gate)
		w.Close()
		got := out.String()
		if n := strings.Count(got, string(line)); n != maxLogBacklog/len(line) {
			t.Errorf("%d lines were kept, want %d", n, maxLogBacklog/len(line))
		}
		if want := fmt.Sprintf("lost %d\n", more); !strings.HasPrefix(got, "first\n") || !strings.HasSuffix(got, want) {
			t.Errorf("the log begins %.10q and ends %q, want first and %q", got, got[len(got)-20:], want)
		}
	})
}

// Close loses no line, and those that come later, as the last words of the
// program do, stand behind the others.
func TestLogWriterClose(t *testing.T) {
	t.Parallel()
	for range 50 {
		var out strings.Builder // which takes one writer at a time
		w := &logWriter{out: &out}
		var wg sync.WaitGroup
		const writers, lines = 4, 100
		for k := range writers {
			wg.Go(func() {
				for i := range lines {
					fmt.Fprintf(w, "%d %d\n", k, i)
				}
			})
		}
		w.Close()
		wg.Wait()
		io.WriteString(w, "last\n")
		w.Close()
		next := [writers]int{}
		for line := range strings.Lines(out.String()) {
			var k, i int
			if n, _ := fmt.Sscanf(line, "%d %d", &k, &i); n == 2 {
				if i != next[k] {
					t.Fatalf("writer %d: line %d where %d should be", k, i, next[k])
				}
				next[k]++
			}
		}
		if next != [writers]int{lines, lines, lines, lines} || !strings.HasSuffix(out.String(), "\nlast\n") {
			t.Fatalf("lines of each writer: %v, want %d", next, lines)
		}
	}
}

// Lines that no reader takes are counted by what was not taken of them, and told
// once there is a reader again: once.
func TestLogWriterReaderGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		room := len("line 0\nli") // bytes that a pipe takes before it breaks, -1 for all
		w := &logWriter{lostLine: lostWords, out: writerFunc(func(p []byte) (int, error) {
			if room < 0 {
				return out.Write(p)
			}
			n, _ := out.Write(p[:min(room, len(p))])
			room = 0
			return n, syscall.EPIPE
		})}
		say := func(lines string) {
			for line := range strings.Lines(lines) {
				io.WriteString(w, line)
			}
			time.Sleep(time.Second)
			synctest.Wait()
		}
		say("line 0\nline 1\nline 2\n")
		if got := w.lost.Load(); got != 2 {
			t.Errorf("%d lines lost, want 2 of 3", got)
		}
		say("line 3\n")
		room = -1
		say("line 4\n")
		say("line 5\n")
		w.Close()
		if want := "line 0\nliline 4\nlost 3\nline 5\n"; out.String() != want {
			t.Errorf("the log is %q, want %q", out.String(), want)
		}
	})
}
