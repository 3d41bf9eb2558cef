package main

import (
	"net"
	"sync"
	"time"
)

// poller moves the bytes of the connections bound to it.
type poller interface {
	// bind gives c a socket and takes nc over; c.sock.attach starts it.
	bind(c *conn, nc net.Conn) error
	// turned reports whether the poller has turned since it was last asked, and makes it turn.
	turned() bool
	// stop ends the poller's goroutines, once its connections are gone.
	stop()
}

// newPoller makes the poller for TCP connections. Linux sets its own.
var newPoller = func(r *relay) (poller, error) { return newGoPoller(r), nil }

const (
	goReadSize = 8 << 10
	// goWriteSize is what a writer holds, as a kernel's send buffer would: two of the
	// largest messages that the app takes (131,072 characters). With less, a part of
	// each stays behind, and its phone counts as one that does not read.
	goWriteSize = 256<<10 + 2*maxSendHeader
	// goWritePiece goes out in one go: a slow peer that takes as much within the
	// write timeout is seen to take something.
	goWritePiece = 64 << 10
)

// goPoller serves every transport that Linux's epoll loop does not: other systems, and
// connections that are not a bare TCP socket. One goroutine reads a connection, and
// another writes it while there is something to write. It keeps the same contract as
// the loop, and because it waits in nothing but the runtime, tests run it on a fake
// clock.
type goPoller struct {
	relay *relay
	wg    sync.WaitGroup // readers and writers
}

func newGoPoller(r *relay) *goPoller { return &goPoller{relay: r} }

func (p *goPoller) bind(c *conn, nc net.Conn) error {
	s := &goSocket{poller: p, c: c, nc: nc}
	s.changed.L = &s.mu
	c.sock = s
	return nil
}

// turned is poller's: what turns here are the connections' own goroutines.
func (p *goPoller) turned() bool { return true }

// stop waits for the goroutines of connections that have all been ended.
func (p *goPoller) stop() { p.wg.Wait() }

// goSocket moves the bytes of one connection with blocking calls.
type goSocket struct {
	poller *goPoller
	c      *conn
	nc     net.Conn

	mu       sync.Mutex // guards what follows
	changed  sync.Cond
	resumed  bool   // resume was called, and the reader has not seen it
	down     bool   // shutdown was called
	halfDown bool   // closeWrite was called, and staged is not out yet
	writing  bool   // the writer runs
	staged   []byte // taken over, not yet written
	inFlight int    // bytes staged before, which the writer is writing
}

func (s *goSocket) attach(first []byte) {
	s.poller.wg.Add(1)
	go s.read(first)
}

func (s *goSocket) read(first []byte) {
	defer s.poller.wg.Done()
	c, r := s.c, s.poller.relay
	w := r.newBatch()
	c.receive(w, first)
	w.flush()
	buf := make([]byte, goReadSize)
	for {
		if c.paused.Load() {
			s.awaitResume()
			w.now = r.now()
			c.unpause(w)
			w.flush()
			continue
		}
		into := c.readInto(buf)
		n, err := s.nc.Read(into)
		r.metrics.socketReads.Add(1)
		w.now = r.now()
		if n > 0 {
			c.receive(w, into[:n])
			c.markAlive(w)
		}
		if err != nil && !c.paused.Load() {
			break
		}
		w.flush()
	}
	if c.owes(w) {
		s.settle() // or until the sweep gives up, whose clock knows of stalls
	}
	c.free(w)
	w.flush()
	s.nc.SetWriteDeadline(time.Now().Add(r.o.closeTimeout)) // no sweep looks at it any more
	s.settle()
	s.shutdown()
}

func (s *goSocket) awaitResume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.resumed && !s.down {
		s.changed.Wait()
	}
	s.resumed = false
}

// settle waits until the writer has written what is staged, as a kernel would, or is told
// to end.
func (s *goSocket) settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.writing && !s.down {
		s.changed.Wait()
	}
}

// write is socket's: it hands bytes to the writer.
func (s *goSocket) write(bufs [][]byte) (n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return 0, net.ErrClosed
	}
	for _, b := range bufs {
		k := min(len(b), goWriteSize-len(s.staged)-s.inFlight)
		s.staged = append(s.staged, b[:k]...)
		n += k
		if k < len(b) {
			err = errAgain
			break
		}
	}
	s.startWriter()
	return n, err
}

func (s *goSocket) unsent() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inFlight > 0 || len(s.staged) > 0
}

// startWriter runs the writer if it has something to do, mu held.
func (s *goSocket) startWriter() {
	if !s.writing && (len(s.staged) > 0 || s.halfDown) {
		s.writing = true
		s.poller.wg.Add(1)
		go s.writeStaged()
	}
}

// writeStaged writes until nothing is staged.
func (s *goSocket) writeStaged() {
	defer s.poller.wg.Done()
	r := s.poller.relay
	for {
		s.mu.Lock()
		n := min(len(s.staged), goWritePiece)
		out := s.staged[:n]
		if s.staged = s.staged[n:]; len(s.staged) == 0 {
			s.staged = nil
		}
		if n == 0 || s.down {
			half := s.halfDown && !s.down
			s.halfDown, s.writing = false, false
			s.changed.Signal()
			s.mu.Unlock()
			// A transport that can't end only one direction is closed whole: the close
			// handshake is over by then.
			if half && closeWrite(s.nc) != nil {
				s.nc.Close()
			}
			return
		}
		s.inFlight = n
		s.mu.Unlock()
		r.metrics.socketWrites.Add(1)
		if _, err := s.nc.Write(out); err != nil {
			s.shutdown()
		}
		s.mu.Lock()
		s.inFlight = 0
		s.mu.Unlock()
		w := r.newBatch()
		s.c.writable(w)
		w.flush()
	}
}

func (s *goSocket) closeWrite() {
	s.mu.Lock()
	s.halfDown = true
	s.startWriter()
	s.mu.Unlock()
}

func (s *goSocket) shutdown() {
	s.mu.Lock()
	s.down = true
	s.changed.Broadcast()
	s.mu.Unlock()
	s.nc.Close()
}

func (s *goSocket) resume() {
	s.mu.Lock()
	s.resumed = true
	s.changed.Signal()
	s.mu.Unlock()
}
