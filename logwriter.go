package main

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// logWriter stands between the logger and where the lines go, so that no
// connection waits for a terminal or a full pipe, and a wave of connections
// costs a few writes. Lines beyond its bound are lost, and so are those that
// nobody takes because the reader is gone; how many is counted and said.

const (
	// maxLogBacklog is some 5,000 lines.
	maxLogBacklog = 1 << 20
	// logDelay is how long lines gather before they are written.
	logDelay = 5 * time.Millisecond
	// lastWords is how long the end of the program waits for the log's reader: a
	// stopped terminal must not keep a process that was told to stop.
	lastWords = time.Second
)

type logWriter struct {
	// Set at the start.
	out      io.Writer
	lostLine func(lines int64) []byte // makes the line that says how many are lost
	wake     chan struct{}            // there are lines; closed by Close
	done     chan struct{}            // run is over

	lost atomic.Int64 // lines
	said int64        // of lost; of run, then of Write

	mu     sync.Mutex // guards what follows
	lines  []byte
	closed bool
}

// newLogWriter returns a writer to out that lives until Close.
func newLogWriter(out io.Writer, lostLine func(lines int64) []byte) *logWriter {
	w := &logWriter{out: out, lostLine: lostLine, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go w.run()
	return w
}

// Write takes one line. It never blocks before Close, and never fails.
func (w *logWriter) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closed:
		w.mu.Unlock()
		<-w.done // this line must not overtake those before it
		w.mu.Lock()
		w.put(line, w.lost.Load())
	case len(w.lines)+len(line) > maxLogBacklog:
		w.lost.Add(1)
	default:
		w.lines = append(w.lines, line...)
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
	return len(line), nil
}

// Close writes what has gathered. Later lines are written through. It fails where
// nobody takes them within lastWords.
func (w *logWriter) Close() error {
	w.mu.Lock()
	w.closed = true
	close(w.wake)
	w.mu.Unlock()
	select {
	case <-w.done:
		return nil
	case <-time.After(lastWords):
		return fmt.Errorf("writing the log: nobody has read it for %v", lastWords)
	}
}

func (w *logWriter) run() {
	defer close(w.done)
	for range w.wake {
		time.Sleep(logDelay)
		w.mu.Lock()
		lines, lost := w.lines, w.lost.Load()
		w.lines = nil
		w.mu.Unlock()
		if len(lines) > 0 { // else the wake-up is of a line that went with those before it
			w.put(lines, lost)
		}
	}
}

// put writes lines, and behind them what of lost it has not said yet.
func (w *logWriter) put(lines []byte, lost int64) {
	if n, err := w.out.Write(lines); err != nil {
		w.lost.Add(int64(bytes.Count(lines[n:], []byte("\n"))))
		return
	}
	if lost > w.said {
		if _, err := w.out.Write(w.lostLine(lost - w.said)); err == nil {
			w.said = lost
		}
	}
}
