//go:build !386

package main

import (
	"net"
	"syscall"
	"testing"
)

// A full door drops who has been silent for longest, not who comes.
func TestDoorGivesWay(t *testing.T) {
	t.Parallel()
	f := &front{greeting: map[int]*greeter{}}
	if f.giveWay() {
		t.Fatal("nobody was there and somebody was dropped")
	}
	var ends []int
	for until := range int64(evictLooks) {
		var p [2]int
		if err := syscall.Pipe2(p[:], syscall.O_NONBLOCK|syscall.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer syscall.Close(p[0])
		ends = append(ends, p[0])
		f.greeting[p[1]] = &greeter{until: until}
	}
	for dropped := range ends {
		if !f.giveWay() || len(f.greeting) != len(ends)-dropped-1 {
			t.Fatalf("%d of %d are left after %d had to go", len(f.greeting), len(ends), dropped+1)
		}
		for i, fd := range ends {
			n, err := syscall.Read(fd, make([]byte, 1))
			if gone := n == 0 && err == nil; gone != (i <= dropped) {
				t.Fatalf("after %d had to go, number %d is gone: %v", dropped+1, i, gone)
			}
		}
	}
}

// A connection whose end comes between its request and its session was no
// upgrade: what was accepted is what is closed, or the books do not agree.
func TestGoneBeforeItsSession(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	for l, serve := range map[leg]func(caller, net.Conn, []byte, []byte){legBinary: r.serveBinary, legPhone: r.servePhone} {
		nc, err := r.connect()
		if err != nil {
			t.Fatal(err)
		}
		nc.Close()
		if !r.enter(l) || !r.limits.acquireConn() {
			t.Fatal("no room")
		}
		serve(caller{serverID: "gone"}, nc, nil, nil)
		if failed, accepted := r.metrics.upgrades[l][upgradeFailed].Load(), r.metrics.upgrades[l][upgradeAccepted].Load(); failed != 1 || accepted != 0 {
			t.Errorf("%v: %d failed and %d accepted, want 1 and 0", l, failed, accepted)
		}
		if n := r.count(l); n != 0 || r.limits.current.Load() != 0 {
			t.Errorf("%v: %d are counted, %d connections", l, n, r.limits.current.Load())
		}
	}
}
