//go:build !386

package main

import (
	"slices"
	"testing"
)

// Connections that flood the relay take turns, a few between two looks at who
// else has something, and in the order in which they came.
func TestEpollReadyTakeTurns(t *testing.T) {
	t.Parallel()
	l := &epollLoop{share: 1}
	var all []*conn
	for range 2*roundReads + 1 {
		s := &epollSocket{loop: l, fd: -1, busy: true}
		s.c = &conn{sock: s}
		all = append(all, s.c)
	}
	l.ready = slices.Clone(all)
	for _, want := range []int{roundReads, 2 * roundReads, len(all), len(all)} {
		l.readOn()
		if !slices.Equal(l.ready, all[want:]) {
			t.Fatalf("%d still wait, want the last %d", len(l.ready), len(all)-want)
		}
		for i, c := range all {
			if waits := c.sock.(*epollSocket).busy; waits != (i >= want) {
				t.Fatalf("number %d waits: %v, when %d had their turn", i, waits, want)
			}
		}
	}
}

// A connection whose end comes between its request and its session was no
// upgrade: what was accepted is what is closed, or the books do not agree.
func TestEpollGoneBeforeItsSession(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	for role := range roleCount {
		nc := &accepted{fd: -1}
		if r.enter(role) != nil {
			t.Fatal("no room")
		}
		r.begin(caller{role: role, serverID: "gone"}, nc, nil, nil)
		counts := &r.metrics.upgrades[role]
		if failed, ok := counts[upgradeFailed].Load(), counts[upgradeAccepted].Load(); failed != 1 || ok != 0 {
			t.Errorf("%v: %d failed and %d accepted, want 1 and 0", role, failed, ok)
		}
		if n := r.count(role); n != 0 {
			t.Errorf("%v: %d are counted", role, n)
		}
	}
}
