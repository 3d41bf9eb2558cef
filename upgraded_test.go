package main

import (
	"bytes"
	"net"
	"sync/atomic"
	"testing"
)

// watchedListener calls seen at each write of a connection that it accepts.
type watchedListener struct {
	net.Listener
	seen func(p []byte)
}

type watchedConn struct {
	net.Conn
	seen func(p []byte)
}

func (l watchedListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	return watchedConn{nc, l.seen}, err
}

func (c watchedConn) Write(p []byte) (int, error) {
	c.seen(p)
	return c.Conn.Write(p)
}

// TestUpgradedMeansRegistered: whoever has seen its 101 may count on its place,
// a phone that comes right behind its binary above all.
func TestUpgradedMeansRegistered(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var r *testRelay
	var binaries, phones, answers atomic.Int64
	r = startRelayOn(t, testOptions(), watchedListener{ln, func(p []byte) {
		if bytes.HasPrefix(p, []byte("HTTP/1.1 101")) {
			answers.Add(1)
			binaries.Store(r.metrics.connectedBinaries.Load())
			phones.Store(r.metrics.connectedPhones.Load())
		}
	}})
	b := r.binary("home")
	if n := binaries.Load(); n != 1 {
		t.Errorf("%d binaries are registered at the 101 of the first", n)
	}
	p := r.phone("home")
	if n := phones.Load(); n != 1 {
		t.Errorf("%d phones are registered at the 101 of the first", n)
	}
	if n := answers.Load(); n != 2 {
		t.Errorf("%d writes begin with a 101, want 2", n)
	}
	p.text("1")
	if e := b.envelope(); string(e.Frame) != "1" {
		t.Errorf("got frame %s", e.Frame)
	}
}
