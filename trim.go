package main

import (
	"runtime"
	"runtime/debug"
	"sync"
	"time"
)

// trimmer gives memory back to the system after a wave of connections has left,
// and once more when the graces that it left behind have run out. Left alone,
// Go does so minutes later, at the pace of collections that an idle relay does
// not have.
type trimmer struct {
	grace   time.Duration
	running sync.WaitGroup // planned trims

	mu    sync.Mutex  // guards what follows
	peak  int         // connections at the most since the last trim
	live  int         // and now
	soon  bool        // the planned trim is the first after a wave
	timer *time.Timer // of the planned trim, if any
	plans int         // counts them
}

const (
	// trimFrom is the smallest wave worth a collection: about a megabyte.
	trimFrom = 256
	// trimDelay lets the rest of a wave leave first, and bounds what a wave
	// that comes and goes can make us spend: a collection a second.
	trimDelay = time.Second
)

// note takes the number of live connections as it changes.
func (m *trimmer) note(live int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.live = live
	m.peak = max(m.peak, live)
	if m.peak >= trimFrom && live <= m.peak/2 && !m.soon {
		m.soon = true
		m.plan(trimDelay)
	}
}

// plan sets the next trim in place of the one planned before, mu held.
func (m *trimmer) plan(d time.Duration) {
	m.cancel()
	this := m.plans
	m.running.Add(1)
	m.timer = time.AfterFunc(d, func() {
		defer m.running.Done()
		m.mu.Lock()
		if this != m.plans {
			m.mu.Unlock()
			return
		}
		m.peak = m.live
		if m.soon {
			m.soon = false
			m.plan(m.grace + trimDelay)
		}
		m.mu.Unlock()
		runtime.GC() // pools of buffers let go at the second collection only
		debug.FreeOSMemory()
	})
}

func (m *trimmer) cancel() {
	m.plans++
	if m.timer != nil && m.timer.Stop() {
		m.running.Done()
	}
	m.timer = nil
}

// stop waits until nothing is planned or runs any more.
func (m *trimmer) stop() {
	m.mu.Lock()
	m.cancel()
	m.mu.Unlock()
	m.running.Wait()
}
