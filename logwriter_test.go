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

// slowOut is a terminal that takes nothing until it is let go.
type slowOut struct {
	logBuffer
	begun chan struct{} // gets one for each write that begins
	gate  chan struct{} // a write needs one
}

func (s *slowOut) Write(p []byte) (int, error) {
	s.begun <- struct{}{}
	<-s.gate
	return s.logBuffer.Write(p)
}

func TestLogWriterGathers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out countingOut
		w := newLogWriter(&out, nil)
		defer w.Close()
		for i := range 100 {
			fmt.Fprintf(w, "line %d\n", i)
		}
		synctest.Wait()
		if out.String() != "" {
			t.Errorf("%q was written before lines could gather", out.String())
		}
		time.Sleep(logDelay)
		synctest.Wait()
		if n := strings.Count(out.String(), "\n"); n != 100 || out.writes != 1 {
			t.Errorf("%d lines in %d writes, want 100 in one", n, out.writes)
		}
		time.Sleep(time.Hour)
		if out.writes != 1 {
			t.Errorf("%d writes after an idle hour, want one", out.writes)
		}
	})
}

type countingOut struct {
	logBuffer
	writes int
}

func (o *countingOut) Write(p []byte) (int, error) {
	o.writes++
	return o.logBuffer.Write(p)
}

func lostWords(lines int64) []byte { return fmt.Appendf(nil, "lost %d\n", lines) }

// A reader of the log that stands still costs memory up to a bound, holds
// nobody up, and is told how much it missed.
func TestLogWriterBound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		out := &slowOut{begun: make(chan struct{}, 10), gate: make(chan struct{}, 10)}
		w := newLogWriter(out, lostWords)
		line := []byte(strings.Repeat("x", 1023) + "\n")
		io.WriteString(w, "first\n")
		<-out.begun // it hangs in the write of this line
		const more = 7
		for range maxLogBacklog/len(line) + more {
			if n, err := w.Write(line); n != len(line) || err != nil {
				t.Fatalf("write: %d, %v", n, err)
			}
		}
		for range cap(out.gate) {
			out.gate <- struct{}{}
		}
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
		w := newLogWriter(&out, nil)
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

// brokenOut is a pipe whose reader is gone while broken is set.
type brokenOut struct {
	logBuffer
	broken bool
	room   int // bytes that it takes before it breaks
}

func (o *brokenOut) Write(p []byte) (int, error) {
	if !o.broken {
		return o.logBuffer.Write(p)
	}
	n, _ := o.logBuffer.Write(p[:min(o.room, len(p))])
	return n, syscall.EPIPE
}

// Lines that nobody takes are counted by what was not taken of them, and said
// once there is a reader again: once.
func TestLogWriterReaderGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		out := &brokenOut{broken: true, room: len("line 0\nli")}
		w := newLogWriter(out, lostWords)
		for i := range 3 {
			fmt.Fprintf(w, "line %d\n", i)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if got := w.lost.Load(); got != 2 {
			t.Errorf("%d lines lost, want 2 of 3", got)
		}
		out.room = 0
		io.WriteString(w, "line 3\n")
		time.Sleep(time.Second)
		synctest.Wait()
		out.broken = false
		io.WriteString(w, "line 4\n")
		time.Sleep(time.Second)
		io.WriteString(w, "line 5\n")
		w.Close()
		if want := "line 0\nliline 4\nlost 3\nline 5\n"; out.String() != want {
			t.Errorf("the log is %q, want %q", out.String(), want)
		}
	})
}
