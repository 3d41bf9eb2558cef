package main

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// Ends that cross each other: two things that happen to a connection, or to a
// server-id, at once.

// idlePeer notes how its connection ended.
type idlePeer struct{ reason closeReason }

func (p *idlePeer) message(*writeBatch, byte, []byte)                 {}
func (p *idlePeer) unregister(_ *writeBatch, r closeReason, _ uint16) { p.reason = r }
func (p *idlePeer) answered(*writeBatch)                              {}
func (p *idlePeer) overdue(*writeBatch)                               {}
func (p *idlePeer) closed(*writeBatch)                                {}

// bareConn is a connection of which a test is the reader and the poller.
func bareConn(t *testing.T, o options) (*conn, *memSocket, *idlePeer) {
	c, s, p := &conn{}, &memSocket{}, &idlePeer{reason: endNone}
	c.init(startRelay(t, o).relay, p, rolePhone, netip.Addr{})
	c.sock = s
	return c, s, p
}

func TestPauseAfterEnd(t *testing.T) {
	t.Parallel()
	c, _, p := bareConn(t, testOptions())
	b := c.relay.newBatch()
	// Grace runs out, say, while the reader is about to pause.
	c.startClose(b, endGraceExpired)
	c.pause(nil)
	b.flush()
	if p.reason != endGraceExpired {
		t.Errorf("ended with %q, want %q", p.reason, endGraceExpired)
	}
	if c.paused.Load() {
		t.Error("the reader pauses on a connection that has ended, and nobody will resume it")
	}
}

func TestAbortFindsPausedReader(t *testing.T) {
	t.Parallel()
	c, s, _ := bareConn(t, testOptions())
	c.pause(nil)
	c.fail()
	if s.aborts != 1 || s.resumes != 1 {
		t.Errorf("aborted %d times and resumed %d times, want once each", s.aborts, s.resumes)
	}
}

// A challenge just before a heartbeat is due leaves the incumbent as long to
// answer as any ping does.
func TestChallengeBeforeHeartbeat(t *testing.T) {
	t.Parallel()
	c, _, p := bareConn(t, testOptions())
	b := c.relay.newBatch()
	b.now = c.pingAt - 1
	c.mu.Lock()
	c.ping(b)
	c.mu.Unlock()
	b.flush()
	b.now++
	c.checkTimeouts(b)
	if p.reason != endNone {
		t.Errorf("ended with %q one nanosecond after a ping", p.reason)
	}
	b.now += int64(c.relay.o.ping)
	c.checkTimeouts(b)
	b.flush()
	if p.reason != endHeartbeat {
		t.Errorf("a whole interval after the ping: ended with %q, want %q", p.reason, endHeartbeat)
	}
}

// Nothing may follow a close frame (RFC 6455 §5.5.1), not even a challenge.
func TestChallengeAfterEnd(t *testing.T) {
	t.Parallel()
	c, _, _ := bareConn(t, testOptions())
	b := c.relay.newBatch()
	c.startClose(b, endHeartbeat)
	b.flush()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ping(b); c.out.n != 0 {
		t.Errorf("%d bytes are queued behind the close frame", c.out.n)
	}
}

// The usual newcomer is the next process of the same daemon: that the one
// before says goodbye while it is being asked must not count as its being alive.
func TestIncumbentClosesWhenAsked(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	for _, end := range []struct {
		name string
		do   func(*wsClient)
	}{
		{"close frame", func(b *wsClient) { b.close(1001, "") }},
		{"half-close", func(b *wsClient) { b.nc.(*net.TCPConn).CloseWrite() }},
		{"violation", func(b *wsClient) { b.raw([]byte{0xff, 0xff}) }},
	} {
		t.Run(end.name, func(t *testing.T) {
			id := "id" + end.name[:1]
			old := r.binary(id)
			incumbent := r.holder(id)
			next := make(chan *wsClient)
			go func() {
				c, _, err := r.dial("/v2/server", binaryHeaders(id))
				if err != nil {
					t.Error(err)
				}
				next <- c
			}()
			if op, _, err := old.next(); op != opPing || err != nil {
				t.Fatalf("incumbent got opcode %d, %v; want a ping", op, err)
			}
			end.do(old)
			b := <-next
			eventually(t, "the newcomer holds the claim", func() bool {
				now := r.holder(id)
				return now != nil && now != incumbent
			})
			r.phone(id).greet(b)
		})
	}
}

// Between losing its place and being closed a phone reaches nobody: by then
// another binary may hold the server-id.
func TestMessageOfRemovedPhone(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, ph, connID := r.pair("id")
	sibling := r.phone("id")
	srv := r.holder("id").server
	srv.mu.Lock()
	leg := srv.phones[connID]
	r.registry.remove(srv, leg)
	srv.mu.Unlock()
	ph.text(`"stray"`)
	ph.frame(opPing, nil)
	if op, _, err := ph.next(); op != opPong || err != nil {
		t.Fatalf("got opcode %d, %v; want a pong", op, err)
	}
	sibling.greet(b) // and nothing before that
	batch := r.newBatch()
	leg.startClose(batch, endReplaced)
	batch.flush()
	ph.wantEnd(4404, "binary replaced")
}

// What phones that joined in grace have sent is given back when nobody comes.
func TestGraceExpiresOverHeldFrames(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.grace = 300 * time.Millisecond
	r := startRelay(t, o)
	b := r.binary("id")
	b.close(1000, "")
	b.wantEnd(1000, "")
	ph := r.phone("id")
	ph.text(`"held"`)
	ph.wantEnd(4404, "grace expired")
	r.settle("nobody is left", func() bool { return r.count(rolePhone)+r.count(roleBinary) == 0 })
}

// A peer that ends its direction right behind its close frame still reads.
func TestCloseFrameThenFIN(t *testing.T) {
	t.Parallel()
	for name, on := range listeners {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startRelayOn(t, testOptions(), on(t))
			b := r.binary("id")
			for range 50 {
				ph := r.phone("id")
				connID := ph.greet(b)
				ph.raw(append(clientFrame(0x80, opPing, []byte("?")), clientFrame(0x80, opClose, closePayload(4000, ""))...))
				ph.nc.(*net.TCPConn).CloseWrite()
				b.wantNotice(connID, 4000)
				if op, p, err := ph.next(); op != opPong || string(p) != "?" || err != nil {
					t.Fatalf("got opcode %d %q, %v; want the pong", op, p, err)
				}
				ph.wantEnd(4000, "")
			}
		})
	}
}

// Whoever has said nothing yet when the relay ends is not left hanging.
func TestStopDropsGreeters(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	nc, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	r.phoneRefused("id") // accepted after it, so it has been accepted, too
	r.stop()
	nc.SetReadDeadline(time.Now().Add(patience))
	if _, err := nc.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !isReset(err) {
		t.Errorf("read: %v, want the end", err)
	}
}

// phoneRefused connects a phone to a server-id that nobody holds.
func (r *testRelay) phoneRefused(id string) {
	r.t.Helper()
	r.phone(id).wantEnd(4404, "server-id never seen")
}
