//go:build !386

package main

import (
	"bytes"
	"slices"
	"syscall"
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

// tightKernel takes what there is room for.
type tightKernel struct {
	kernel
	room int
	sent []byte
}

func (k *tightKernel) send(_ int, bufs [][]byte) (int, error) {
	n := min(k.room, len(bufs[0]))
	if n == 0 {
		return 0, syscall.EAGAIN
	}
	k.sent = append(k.sent, bufs[0][:n]...)
	k.room -= n
	return n, nil
}

// What is encrypted and not sent is charged, bounded and in order, for a peer that
// makes TLS answer and takes nothing as well.
func TestEpollSealedStages(t *testing.T) {
	t.Parallel()
	r, k := startRelay(t, testOptions()).relay, &tightKernel{room: 1000}
	s := &sealed{sock: &epollSocket{loop: &epollLoop{relay: r, kernel: k}, fd: 1}}
	var want []byte
	for i := 0; ; i++ {
		p := bytes.Repeat([]byte{byte(i)}, 999)
		n, err := s.Write(p)
		if err != nil {
			break
		}
		want = append(want, p...)
		held := len(want) - 1000
		if n != len(p) || held > 2*maxRecord || held > 0 && r.buffers.budget.used() < int64(held) || s.unsent() != (held > 0) {
			t.Fatalf("%d of %d bytes taken, %d held, %d charged", n, len(p), held, r.buffers.budget.used())
		}
	}
	if len(want) < 2*maxRecord {
		t.Errorf("%d bytes were taken, want %d and more", len(want), 2*maxRecord)
	}
	for s.unsent() {
		k.room = 700
	}
	if !bytes.Equal(k.sent, want) || r.buffers.budget.used() != 0 {
		t.Errorf("%d bytes arrived, want %d in order; %d are still charged", len(k.sent), len(want), r.buffers.budget.used())
	}
}
