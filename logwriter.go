package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// logWriter stands between the logger and where the lines go, so that no
// connection waits for a terminal or a full pipe, and a wave of connections
// costs a few writes. Lines beyond its bound are dropped, and how many is said.

const (
	// maxLogBacklog is some 5,000 lines.
	maxLogBacklog = 1 << 20
	// logDelay is how long lines gather before they are written.
	logDelay = 5 * time.Millisecond
	// lastWords is how long the end of the program waits for whoever reads the
	// log: a stopped terminal must not keep a process that was told to stop.
	lastWords = time.Second
)

type logWriter struct {
	out     io.Writer
	wake    chan struct{}
	done    chan struct{}
	dropLog func(lines int) // says how many lines were dropped; may log

	mu      sync.Mutex // guards what follows
	lines   []byte
	dropped int
	closed  bool // Close was called
	through bool // the backlog is written: lines go straight to out
}

// newLogWriter returns a writer to out that lives until Close. Before the first
// line dropLog has to be set.
func newLogWriter(out io.Writer) *logWriter {
	w := &logWriter{out: out, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go w.run()
	return w
}

// Write takes one line. It never blocks and never fails.
func (w *logWriter) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.through:
		w.out.Write(line)
	case len(w.lines)+len(line) > maxLogBacklog:
		w.dropped++
	default:
		w.lines = append(w.lines, line...)
		w.signal()
	}
	return len(line), nil
}

func (w *logWriter) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Close writes what has gathered. Later lines are written through. It fails where
// nobody takes them within lastWords.
func (w *logWriter) Close() error {
	w.mu.Lock()
	w.closed = true
	w.signal()
	w.mu.Unlock()
	late := time.NewTimer(lastWords)
	defer late.Stop()
	select {
	case <-w.done:
		return nil
	case <-late.C:
		return fmt.Errorf("writing the log: nobody has read it for %v", lastWords)
	}
}

func (w *logWriter) run() {
	defer close(w.done)
	var spare []byte
	for range w.wake {
		w.mu.Lock()
		closed := w.closed
		w.mu.Unlock()
		if !closed {
			time.Sleep(logDelay)
		}
		w.mu.Lock()
		lines, dropped := w.lines, w.dropped
		w.lines, w.dropped = spare[:0], 0
		if closed {
			// With the lock, so that no later line overtakes these.
			w.write(lines)
			w.through = true
		}
		w.mu.Unlock()
		if !closed {
			w.write(lines)
		}
		if dropped > 0 {
			w.dropLog(dropped)
		}
		if spare = lines; cap(spare) > maxLogBacklog/16 {
			spare = nil // a burst's buffer is not kept
		}
		if closed {
			return
		}
	}
}

// write spares out what is nothing: a line that was gathered with the ones before
// it has left its wake-up behind.
func (w *logWriter) write(lines []byte) {
	if len(lines) > 0 {
		w.out.Write(lines)
	}
}
