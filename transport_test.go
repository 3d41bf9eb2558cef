package main

import (
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// What scenarios run on: the system's own poller for TCP, the goroutine poller
// that serves every other transport, and that one again on a fake clock.

// onEach runs a scenario over both pollers, each with a relay of its own, whose
// books have to agree at the end. On a busy machine no heartbeat comes between,
// and nobody is given up: that is for the fake clock.
func onEach(t *testing.T, o options, scenario func(t *testing.T, r *testRelay)) {
	t.Helper()
	o.ping, o.writeTimeout = time.Hour, time.Minute
	for _, tr := range []struct {
		name string
		wrap func(net.Listener) net.Listener
	}{
		{"tcp", func(ln net.Listener) net.Listener { return ln }},
		{"goroutines", func(ln net.Listener) net.Listener { return veiledListener{ln} }},
	} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			r := startRelayOn(t, o, tr.wrap(ln))
			scenario(t, r)
			r.sound()
		})
	}
}

// sound waits for books that agree: somebody may be about to leave.
func (r *testRelay) sound() {
	r.t.Helper()
	var err error
	defer func() {
		if err != nil {
			r.t.Error(err)
		}
	}()
	eventually(r.t, "books that agree", func() bool { err = r.check(); return err == nil })
}

// veiledListener hides that its connections are TCP, from the door and from the
// epoll loops.
type veiledListener struct{ net.Listener }

func (ln veiledListener) Accept() (net.Conn, error) {
	nc, err := ln.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return veiledConn{nc.(*net.TCPConn)}, nil
}

type veiledConn struct{ *net.TCPConn }

// onFakeClock runs a scenario in which time passes only while everybody waits.
// Its connections are pipes: they hold no byte that was not read.
func onFakeClock(t *testing.T, o options, scenario func(t *testing.T, r *testRelay)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ln := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
		r := startRelayOn(t, o, ln)
		// An epoll loop waits outside of the fake clock.
		for _, l := range r.loops {
			l.stop()
		}
		r.loops = []poller{newGoPoller(r.relay)}
		r.connect = ln.dial
		scenario(t, r)
		r.sound()
	})
}

type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (ln *pipeListener) Accept() (net.Conn, error) {
	select {
	case nc := <-ln.conns:
		return nc, nil
	case <-ln.done:
		return nil, net.ErrClosed
	}
}

func (ln *pipeListener) Close() error {
	ln.once.Do(func() { close(ln.done) })
	return nil
}

func (ln *pipeListener) Addr() net.Addr { return pipeAddr{} }

func (ln *pipeListener) dial() (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case ln.conns <- theirs:
		return patientConn{ours, time.Now().Add(6 * time.Hour)}, nil
	case <-ln.done:
		return nil, errors.New("the relay does not listen any more")
	}
}

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }

// patientConn stretches the patience of a test on a fake clock, where minutes
// pass between two events of a scenario. It ends, or a scenario that waits for
// what never comes would answer pings for ever.
type patientConn struct {
	net.Conn
	until time.Time
}

func (c patientConn) SetReadDeadline(time.Time) error  { return c.Conn.SetReadDeadline(c.until) }
func (c patientConn) SetWriteDeadline(time.Time) error { return c.Conn.SetWriteDeadline(c.until) }

// wantAfter holds the time since start against what the contract says; a timeout
// is noticed by a sweeper, so it may come a little late.
func wantAfter(t *testing.T, what string, start time.Time, want time.Duration) {
	t.Helper()
	if got := time.Since(start); got < want || got > want+time.Second {
		t.Errorf("%s after %v, want %v", what, got, want)
	}
}

// lane is one direction between a binary and a phone, seen from its sender, so
// that a rule for both legs is tested on both.
type lane struct {
	from, to   *wsClient
	connID     string
	head, tail string        // around a payload, as the sender has to write it
	got        func() string // the next payload that arrives
}

// lane connects a pair of its own; l sends.
func (r *testRelay) lane(role role) lane {
	r.t.Helper()
	b, ph, connID := r.pair(newConnID())
	if role == roleBinary {
		return lane{b, ph, connID, `{"conn_id":"` + connID + `","frame":`, `}`, ph.message}
	}
	return lane{ph, b, connID, "", "", func() string { return string(b.envelope().Frame) }}
}

func (l lane) message(payload string) []byte { return []byte(l.head + payload + l.tail) }

// wants reads the next payload.
func (l lane) wants(payload string) {
	l.to.t.Helper()
	if got := l.got(); got != payload {
		l.to.t.Fatalf("%d bytes arrived (%.60q), want %d (%.60q)", len(got), got, len(payload), payload)
	}
}

// onLegs runs a scenario for the sender of each leg.
func onLegs(t *testing.T, o options, scenario func(t *testing.T, r *testRelay, role role)) {
	for _, role := range []role{rolePhone, roleBinary} {
		t.Run(role.String(), func(t *testing.T) {
			t.Parallel()
			onEach(t, o, func(t *testing.T, r *testRelay) { scenario(t, r, role) })
		})
	}
}
