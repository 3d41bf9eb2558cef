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
