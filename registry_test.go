package main

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
	"unsafe"
)

// A claim's life after its binary: grace in all its orders, and what a phone is
// told when there is none.

// leaves ends a binary's connection and waits for its grace.
func (r *testRelay) leaves(b *wsClient) {
	r.t.Helper()
	before := r.metrics.binariesInGrace.Load()
	b.close(1000, "")
	b.wantEnd(1000, "")
	r.settle("grace", func() bool { return r.metrics.binariesInGrace.Load() == before+1 })
}

// joins connects a phone and waits until it is one of id's.
func (r *testRelay) joins(id string) *wsClient {
	r.t.Helper()
	before := r.metrics.connectedPhones.Load()
	ph := r.phone(id)
	r.settle("the phone has joined", func() bool { return r.metrics.connectedPhones.Load() == before+1 })
	return ph
}

// wantFrame reads the next envelope, which has to be a frame.
func (c *wsClient) wantFrame(frame string) (connID string) {
	c.t.Helper()
	e := c.envelope()
	if string(e.Frame) != frame || e.CloseCode != nil {
		c.t.Fatalf("got %+v, want the frame %s", e, frame)
	}
	return e.ConnID
}

func TestWhichKindOf4404(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		refused := func(id, reason string) {
			t.Helper()
			code, got := r.phone(id).ended()
			if code != 4404 || got != reason {
				t.Errorf("closed %d %q, want 4404 %q", code, got, reason)
			}
		}
		refused("id", "server-id never seen since this relay started 0s ago")
		time.Sleep(90 * time.Second)
		refused("id", "server-id never seen since this relay started 1m30s ago")
		b := r.binary("id")
		r.phone("id").greet(b)
		b.close(1000, "")
		b.wantEnd(1000, "")
		time.Sleep(42 * time.Second)
		refused("id", "server-id last held 42s ago")
		time.Sleep(time.Hour)
		refused("id", "server-id last held 1h0m42s ago")
		refused("other", "server-id never seen since this relay started 1h2m12s ago")
	})
}

// Of too many claims an old one is forgotten, and that shows in the wording.
func TestRegistryForgetsClaims(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		recent := &r.registry.recent
		for i := range maxRecentClaims + 1 {
			recent.note(fmt.Sprint(i), r.now())
			time.Sleep(time.Millisecond)
		}
		victim := -1
		for i := range maxRecentClaims + 1 {
			if _, known, _ := recent.last(fmt.Sprint(i)); !known {
				victim = i
			}
		}
		time.Sleep(time.Minute - r.age()%time.Second)
		r.phone(fmt.Sprint(victim)).wantEnd(4404, "server-id never seen in the last ")
		r.phone(fmt.Sprint(maxRecentClaims)).wantEnd(4404, "server-id last held ")
	})
}

func (r *testRelay) age() time.Duration { return time.Duration(r.now()) }

// Whatever ends a binary's connection begins its grace.
// A server-id that was held is remembered, and its request is not: net/http's
// header values are parts of one string with all of them.
func TestEntryKeepsNoHeader(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	header := strings.Repeat("x", 4<<10) + "server"
	id := header[4<<10:]
	b, _ := memBinary(t, r.relay, id)
	bt := r.newBatch()
	defer bt.flush()
	defer b.release(bt)
	if b.server.id != id || unsafe.StringData(b.server.id) == unsafe.StringData(id) {
		t.Errorf("the entry of %s keeps the %d bytes that its id came in", b.server.id, len(header))
	}
	r.registry.servers.Range(func(key, _ any) bool {
		if unsafe.StringData(key.(string)) == unsafe.StringData(id) {
			t.Errorf("the registry keeps the %d bytes that the id came in", len(header))
		}
		return true
	})
}

func TestEveryEndOfABinaryHasGrace(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		end  func(b *wsClient)
	}{
		{"close frame", func(b *wsClient) { b.close(1001, "") }},
		{"end of tcp", func(b *wsClient) { b.nc.Close() }},
		{"half-close", func(b *wsClient) { b.nc.(*net.TCPConn).CloseWrite() }},
		{"reset", func(b *wsClient) { b.reset() }},
		{"violation", func(b *wsClient) { b.raw([]byte{0x81, 0}) }},
		{"too big", func(b *wsClient) { b.raw(header64(0x82, 1<<30)) }},
	}
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		for i, tt := range tests {
			id := fmt.Sprint("ends-", i)
			b, idle, _ := r.pair(id)
			tt.end(b)
			r.settle(tt.name+": grace", func() bool { return r.metrics.binariesInGrace.Load() == int64(i+1) })
			if n := r.metrics.connectedBinaries.Load(); n != 0 {
				t.Errorf("%s: %d binaries are connected", tt.name, n)
			}
			if n := r.metrics.connectedPhones.Load(); n != 1 {
				t.Errorf("%s: %d phones are connected, want the idle one", tt.name, n)
			}
			idle.frame(opPing, []byte("still there"))
			idle.wantPong([]byte("still there"))
			idle.text("1")
			idle.wantEnd(4404, "binary gone")
			r.settle("the phone is gone", func() bool { return r.metrics.connectedPhones.Load() == 0 })
		}
	})
}

func TestReclaim(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, old, oldID := r.pair("id")
		r.leaves(b)
		first, second := r.joins("id"), r.joins("id")
		first.raw(cat(clientFrame(last, opText, []byte("[1]")), clientFrame(last, opText, []byte("[2]"))))
		first.frame(opPing, nil)
		first.wantPong(nil) // they are held
		b = r.binary("id")
		old.wantEnd(4404, "binary reclaimed server-id")

		first.text("[3]")
		id := b.wantFrame("[1]") // and no notice of the old phone
		for _, f := range []string{"[2]", "[3]"} {
			if got := b.wantFrame(f); got != id {
				t.Errorf("%s came from %s, want %s", f, got, id)
			}
		}
		secondID := second.greet(b)
		b.send(id, `"to the first"`)
		b.send(secondID, `"to the second"`)
		if got := first.message(); got != `"to the first"` {
			t.Errorf("the first phone got %s", got)
		}
		if got := second.message(); got != `"to the second"` {
			t.Errorf("the second phone got %s", got)
		}
		b.send(oldID, "1")
		r.settle("the old phone is unknown", func() bool { return r.metrics.drops[dropUnknownConn].Load() == 1 })

		// In the next grace those phones are old ones themselves.
		r.leaves(b)
		first.text("1")
		first.wantEnd(4404, "binary gone")
		b = r.binary("id")
		second.wantEnd(4404, "binary reclaimed server-id")
		r.phone("id").greet(b)
	})
}

// What a phone sent in grace goes with it when it leaves before the binary comes.
func TestPhoneLeavesInGrace(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, old, _ := r.pair("id")
		r.leaves(b)
		ph := r.joins("id")
		ph.text("1")
		ph.close(1000, "")
		ph.wantEnd(1000, "")
		old.close(1000, "")
		old.wantEnd(1000, "")
		r.settle("no phone, and nothing of theirs", func() bool {
			return r.count(rolePhone) == 0 && r.buffers.budget.used() == 0
		})
		b = r.binary("id")
		r.phone("id").greet(b) // no frame and no notice before that
	})
}

func TestPhonesInGraceAreCounted(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, _, _ := r.pair("id")
		r.leaves(b)
		for range 15 {
			r.joins("id")
		}
		r.phone("id").wantEnd(4429, "too many phones")
		r.binary("id")
		r.settle("the old phone is out", func() bool { return r.metrics.connectedPhones.Load() == 15 })
		r.joins("id")
	})
}

// All phones of a claim that nobody took again end at once, whether they read or
// not, and whatever was held for the binary is given back.
func TestGraceExpires(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		b := r.binary("id")
		var phones []*wsClient
		for range 8 {
			ph := r.phone("id")
			ph.greet(b)
			phones = append(phones, ph)
		}
		b.close(1000, "")
		start := time.Now()
		b.wantEnd(1000, "")
		for range 8 {
			ph := r.phone("id")
			ph.text(`"held"`)
			ph.frame(opPing, nil)
			phones = append(phones, ph)
		}
		time.Sleep(29 * time.Second)
		if n := r.metrics.connectedPhones.Load(); n != 16 {
			t.Errorf("%d phones after 29 s of grace, want 16", n)
		}
		r.sound()
		eventually(t, "the end of grace", func() bool { return r.metrics.connectedPhones.Load() == 0 })
		wantAfter(t, "the end of grace", start, 30*time.Second)
		for _, ph := range phones {
			ph.wantClose(4404, "grace expired")
			wantAfter(t, "a phone's end", start, 30*time.Second)
		}
		r.phone("id").wantEnd(4404, "server-id last held 30s ago")
		eventually(t, "nothing is held", func() bool { return r.buffers.budget.used() == 0 })
		b = r.binary("id")
		r.phone("id").greet(b)
	})
}

// A claim just before grace would end stops it for good.
func TestReclaimStopsGrace(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		for range 3 {
			b := r.binary("id")
			b.close(1000, "")
			b.wantEnd(1000, "")
			time.Sleep(29 * time.Second)
		}
		b := r.binary("id")
		ph := r.phone("id")
		ph.greet(b)
		time.Sleep(14 * time.Second)
		ph.greet(b)
		if n := r.metrics.binariesInGrace.Load(); n != 0 {
			t.Errorf("%d binaries in grace", n)
		}
	})
}

// A phone that sends more in grace than may be held waits; nothing is lost.
func TestHeldFramesHaveALimit(t *testing.T) {
	t.Parallel()
	const limit, n, size = 256 << 10, 200, 8 << 10
	o := testOptions()
	o.queue = limit
	onFakeClock(t, o, func(t *testing.T, r *testRelay) {
		b, _, _ := r.pair("id")
		b.close(1000, "")
		b.wantEnd(1000, "")
		ph := r.phone("id")
		sent := make(chan error, 1)
		go func() {
			var err error
			for i := 0; i < n && err == nil; i++ {
				_, err = ph.nc.Write(clientFrame(last, opText, []byte(numbered(i, size))))
			}
			sent <- err
		}()
		time.Sleep(20 * time.Second)
		if got := r.buffers.budget.used(); got < limit/2 || got > 2*limit {
			t.Errorf("%d bytes are held, the limit is %d", got, limit)
		}
		b = r.binary("id")
		for i := range n {
			if e := b.envelope(); numberOf(string(e.Frame)) != i {
				t.Fatalf("got %.20q, want frame %d", e.Frame, i)
			}
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
	})
}

// each calls do for every entry, its lock held.
func (g *registry) each(do func(*server)) {
	g.servers.Range(func(_, v any) bool {
		srv := v.(*server)
		srv.mu.Lock()
		defer srv.mu.Unlock()
		if !srv.gone {
			do(srv)
		}
		return true
	})
}

// check recounts the registry against the gauges and names the first invariant
// that does not hold. It is exact only while no connection comes or goes.
func (g *registry) check() error {
	m := g.relay.metrics
	var err error
	var binaries, grace, phones int64
	fail := func(srv *server, format string, args ...any) {
		if err == nil {
			err = fmt.Errorf("entry %s: %s", srv.id, fmt.Sprintf(format, args...))
		}
	}
	g.each(func(srv *server) {
		if srv.binary != nil && srv.grace != nil {
			fail(srv, "held and in grace at once")
		}
		if srv.binary == nil && srv.grace == nil {
			fail(srv, "neither held nor in grace")
		}
		if srv.binary != nil && srv.binary.server != srv {
			fail(srv, "its binary belongs to another entry")
		}
		if srv.binary == nil && len(srv.contenders) > 0 {
			fail(srv, "%d contend for what nobody holds", len(srv.contenders))
		}
		for _, c := range srv.contenders {
			if c.server != srv || c.contendsSince == 0 || c == srv.binary {
				fail(srv, "contender %s belongs to another entry or holds this one", c.id)
			}
			if c.is(connClosed) {
				fail(srv, "contender %s is closed and still in the line", c.id)
			}
		}
		if len(srv.phones) > g.relay.o.maxPhones {
			fail(srv, "%d phones, limit %d", len(srv.phones), g.relay.o.maxPhones)
		}
		for id, ph := range srv.phones {
			if ph.id != id || ph.server != srv {
				fail(srv, "phone %s stands under %s or belongs to another entry", ph.id, id)
			}
			if srv.binary != nil && ph.graceQueue != nil {
				fail(srv, "phone %s holds frames back from a binary that is there", id)
			}
			if ph.is(connClosed) {
				fail(srv, "phone %s is closed and still a member", id)
			}
		}
		if srv.probe {
			return
		}
		phones += int64(len(srv.phones))
		if srv.binary != nil {
			binaries++
		} else {
			grace++
		}
	})
	if err != nil {
		return err
	}
	for _, c := range [...]struct {
		name         string
		count, gauge int64
	}{
		{"connected binaries", binaries, m.connectedBinaries.Load()},
		{"binaries in grace", grace, m.binariesInGrace.Load()},
		{"connected phones", phones, m.connectedPhones.Load()},
	} {
		if c.count != c.gauge {
			return fmt.Errorf("%s: %d in the registry, gauge says %d", c.name, c.count, c.gauge)
		}
	}
	return nil
}

// check recounts the relay's state and names the first invariant that does not
// hold. It is exact only while no connection comes or goes.
func (r *relay) check() error {
	if err := r.registry.check(); err != nil {
		return err
	}
	r.mu.Lock()
	live := r.live[roleBinary] + r.live[rolePhone]
	r.mu.Unlock()
	if live == 0 {
		if n := r.buffers.budget.used(); n != 0 {
			return fmt.Errorf("no connection is left and %d bytes are queued", n)
		}
	}
	return nil
}
