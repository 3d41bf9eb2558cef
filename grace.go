package main

import (
	"container/list"
	"sync"
	"time"
)

// gracesPerConnection bounds how many graces run at once, as a multiple of
// -max-connections. All binaries may leave and come back under other ids several
// times within one grace before the oldest of them notices; a grace is half a
// KiB, so that all of them are half of what README counts for the connections.
const gracesPerConnection = 4

// Grace is how long a server-id stays its binary's after the connection ended.
// All graces are equally long, so they end in the order in which they began:
// one timer serves the whole line. A timer for each would cost hundreds of
// goroutines at once, whose memory Go never gives back, when all that a proxy
// in front cut off runs out.
//
// The line is bounded: binaries that come and go under ever new server-ids would
// fill memory with graces. Beyond most of them the oldest ends early.
type graces struct {
	length  time.Duration
	most    int
	now     func() int64        // relay clock
	expire  func(*list.Element) // takes what has come to the front and out of the line, without mu
	running sync.WaitGroup      // the timer, and what it does

	mu    sync.Mutex  // guards what follows
	line  list.List   // of *grace, the next to end in front; one for each entry at the most
	timer *time.Timer // nil while nobody waits for one
}

type grace struct {
	e   *server
	end int64 // relay clock
}

// begin puts e's grace at the end of the line.
func (s *graces) begin(srv *server) *list.Element {
	s.mu.Lock()
	defer s.mu.Unlock()
	el := s.line.PushBack(&grace{e: srv, end: s.now() + int64(s.length)})
	switch {
	case s.timer == nil:
		s.arm(s.length)
	case s.line.Len() > s.most && s.timer.Stop(): // else it runs already, and looks again
		s.timer.Reset(0)
	}
	return el
}

// cancel takes a grace out of the line; one that has left it is let be. The timer
// finds out by itself.
func (s *graces) cancel(el *list.Element) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.line.Remove(el)
}

// arm sets the timer, mu held.
func (s *graces) arm(d time.Duration) {
	s.running.Add(1)
	s.timer = time.AfterFunc(d, func() {
		defer s.running.Done()
		s.run()
	})
}

// run ends the graces whose time is over, and those that are too many. It is the
// timer's to do since begin is called with an entry's lock held.
func (s *graces) run() {
	for {
		s.mu.Lock()
		el := s.line.Front()
		if el == nil {
			s.timer = nil
			s.mu.Unlock()
			return
		}
		if wait := el.Value.(*grace).end - s.now(); wait > 0 && s.line.Len() <= s.most {
			s.arm(time.Duration(wait))
			s.mu.Unlock()
			return
		}
		s.line.Remove(el)
		s.mu.Unlock()
		s.expire(el)
	}
}

// stop returns once the timer is gone. No grace is in the line any more.
func (s *graces) stop() {
	s.mu.Lock()
	if s.timer != nil && s.timer.Stop() {
		s.running.Done()
	}
	s.mu.Unlock()
	s.running.Wait()
}
