package main

import (
	"net"
	"testing"
	"time"
)

// A second binary for a server-id that one holds.

// rival connects as a binary and does not wait for the claim.
func (r *testRelay) rival(id string) *wsClient {
	r.t.Helper()
	return r.mustDial("/v2/server", binaryHeaders(id))
}

func (c *wsClient) wantPing() {
	c.t.Helper()
	if op, p, err := c.next(); op != opPing || err != nil {
		c.t.Fatalf("got opcode %d %q (%v), want a ping", op, p, err)
	}
}

func TestLiveIncumbentStays(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, id := r.pair("id")
		for range 3 {
			newcomer := r.rival("id")
			b.wantPing() // the incumbent is asked first
			b.frame(opPong, nil)
			newcomer.wantEnd(4409, "server-id already claimed")
		}
		newcomer := r.rival("id")
		b.wantPing()
		b.send(id, `"alive"`) // any byte is an answer
		newcomer.wantEnd(4409, "server-id already claimed")
		if got := ph.message(); got != `"alive"` {
			t.Errorf("the phone got %s", got)
		}
		if again := ph.greet(b); again != id {
			t.Errorf("the phone is %s, was %s", again, id)
		}
	})
}

func TestTwoNewcomersMeetALiveIncumbent(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, _ := r.pair("id")
		one, two := r.rival("id"), r.rival("id")
		stop := make(chan struct{})
		go func() { // whether they share a ping or not
			defer close(stop)
			for {
				op, p, err := b.next()
				if err != nil || op == opText && string(p) != "" {
					return
				}
				b.nc.Write(clientFrame(last, opPong, p))
			}
		}()
		one.wantEnd(4409, "server-id already claimed")
		two.wantEnd(4409, "server-id already claimed")
		ph.text(`"still yours"`)
		<-stop
	})
}

// A frozen incumbent has five seconds; then it is out, and its phones with it.
func TestFrozenIncumbent(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, _ := r.pair("id")
		incumbent := r.holder("id")
		start := time.Now()
		newcomer := r.rival("id")
		eventually(t, "the takeover", func() bool { return r.holder("id") != incumbent })
		wantAfter(t, "the takeover", start, 5*time.Second)
		r.sound()
		b.wantClose(1011, "claim taken over")
		ph.wantEnd(4404, "binary replaced")
		next := r.phone("id")
		id := next.greet(newcomer)

		// Its late end is nothing to its successor, nor is what it still says.
		b.send(id, `"from the past"`)
		b.nc.Close()
		eventually(t, "the incumbent is gone", func() bool { return r.count(legBinary) == 1 })
		r.sound()
		if again := next.greet(newcomer); again != id {
			t.Errorf("the phone is %s, was %s", again, id)
		}
		newcomer.send(id, `"from the present"`)
		if got := next.message(); got != `"from the present"` {
			t.Errorf("the phone got %s", got)
		}
		if n := r.metrics.binariesInGrace.Load(); n != 0 {
			t.Errorf("%d binaries in grace", n)
		}
	})
}

// An incumbent whose socket breaks while it is asked need not be waited for.
func TestDeadIncumbent(t *testing.T) {
	t.Parallel()
	ends := map[string]func(b *wsClient){
		"close":      func(b *wsClient) { b.nc.Close() },
		"half-close": func(b *wsClient) { b.nc.(*net.TCPConn).CloseWrite() },
		"reset":      func(b *wsClient) { b.reset() },
	}
	o := testOptions()
	o.challengeTimeout = time.Hour
	onEach(t, o, func(t *testing.T, r *testRelay) {
		for id, end := range ends {
			b, ph, _ := r.pair(id)
			newcomer := r.rival(id)
			b.wantPing()
			end(b)
			ph.wantEnd(4404, "binary reclaimed server-id")
			r.phone(id).greet(newcomer)
		}
	})
}

// Of two newcomers that find a frozen incumbent one takes over; the other finds
// a claim.
func TestTwoNewcomersTakeOver(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, _ := r.pair("id")
		incumbent := r.holder("id")
		rivals := [2]*wsClient{r.rival("id"), r.rival("id")}
		start := time.Now()
		eventually(t, "the takeover", func() bool { return r.holder("id") != incumbent })
		b.wantClose(1011, "claim taken over")
		ph.wantEnd(4404, "binary replaced")
		next := r.phone("id")
		next.text(`"who are you"`)
		winners, losers := 0, 0
		for _, c := range rivals {
			for op := byte(opPing); op == opPing; {
				var p []byte
				var err error
				switch op, p, err = c.next(); {
				case err != nil:
					t.Fatal(err)
				case op == opText:
					winners++
				case op == opClose:
					losers++
					if code, _ := parseClose(p); code != 4409 || string(p[2:]) != "server-id already claimed" {
						t.Errorf("closed %d %q, want 4409", code, p[2:])
					}
				}
			}
		}
		if winners != 1 || losers != 1 {
			t.Errorf("%d newcomers hold the claim and %d were refused", winners, losers)
		}
		wantAfter(t, "both answers", start, 5*time.Second)
	})
}

// A connection whose claim was taken while it was saying goodbye ends late.
func TestLateEndOfAnOldConnection(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		old, _, _ := r.pair("id")
		old.raw([]byte{0x81, 0}) // the relay ends it, and waits for its FIN
		old.wantClose(1002, "unmasked frame")
		r.settle("grace", func() bool { return r.metrics.binariesInGrace.Load() == 1 })
		b := r.binary("id")
		ph := r.phone("id")
		id := ph.greet(b)
		old.nc.Close()
		r.settle("the old connection is gone", func() bool { return r.count(legBinary) == 1 })
		if again := ph.greet(b); again != id || r.metrics.binariesInGrace.Load() != 0 {
			t.Errorf("the phone is %s, was %s; %d binaries in grace", again, id, r.metrics.binariesInGrace.Load())
		}
	})
}
