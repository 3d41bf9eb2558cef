package main

import (
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// trimmer gives memory back to the system after a wave has left: of
// connections, or of bytes that waited for slow ones. It does so at once, and
// again when the graces that the wave left behind have run out. Left alone, Go
// does it minutes later, at the pace of collections that an idle relay does not
// have.
type trimmer struct {
	grace time.Duration
	held  func() int64 // bytes, roughly, that whoever is here occupies
	quit  chan struct{}
	done  chan struct{}

	peak atomic.Int64 // of held since the last trim; written by run

	// Owned by run.
	next  time.Time // of the planned trim, zero for none
	first bool      // the planned one is the first after a wave
}

const (
	// trimLook is how often a wave is looked for. The rest of it leaves
	// meanwhile, and waves that come and go cost a collection each time at most.
	trimLook = time.Second
	// trimFrom is the smallest wave worth a collection, as held counts: 256
	// sessions.
	trimFrom = 1 << 20

	// What held counts for a session, with what it took to come and go, and for
	// a connection that net/http serves.
	sessionCost = 4 << 10
	requestCost = 16 << 10
	// dailyBuffers is what buffers may come to and fall from without being a
	// wave: a few fast streams.
	dailyBuffers = 16 << 20
)

// held is trimmer.held of the relay.
func (r *relay) held() int64 {
	r.mu.Lock()
	sessions := r.live[roleBinary] + r.live[rolePhone]
	r.mu.Unlock()
	return int64(sessions)*sessionCost + r.requests.Load()*requestCost + max(0, r.buffers.budget.used()-dailyBuffers)
}

// start begins to look, until stop.
func (m *trimmer) start(grace time.Duration, held func() int64) {
	m.grace, m.held = grace, held
	m.quit, m.done = make(chan struct{}), make(chan struct{})
	go m.run()
}

func (m *trimmer) run() {
	defer close(m.done)
	look := time.NewTicker(trimLook)
	defer look.Stop()
	for {
		select {
		case <-m.quit:
			return
		case now := <-look.C:
			if m.due(now, m.held()) {
				runtime.GC() // pools of buffers let go at the second collection only
				debug.FreeOSMemory()
			}
		}
	}
}

// due takes what is held now, and reports whether it is time to trim.
func (m *trimmer) due(now time.Time, held int64) bool {
	peak := max(m.peak.Load(), held)
	m.peak.Store(peak)
	if peak >= trimFrom && held <= peak/2 && !m.first {
		m.next, m.first = now.Add(trimLook), true
	}
	if m.next.IsZero() || now.Before(m.next) {
		return false
	}
	m.peak.Store(held)
	m.next = time.Time{}
	if m.first {
		m.next, m.first = now.Add(m.grace+trimLook), false
	}
	return true
}

// stop returns when nothing looks any more.
func (m *trimmer) stop() {
	close(m.quit)
	<-m.done
}
