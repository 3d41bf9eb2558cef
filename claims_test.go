package main

import (
	"fmt"
	"net"
	"strings"
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
		eventually(t, "the incumbent is gone", func() bool { return r.count(roleBinary) == 1 })
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

// heeds answers pings until its connection ends or says something, which it
// reports as "code reason" or as the message.
func (c *wsClient) heeds() <-chan string {
	said := make(chan string, 1)
	go func() {
		for {
			op, p, err := c.next()
			switch {
			case err != nil:
				said <- err.Error()
			case op == opPing:
				c.nc.Write(clientFrame(last, opPong, p))
				continue
			case op == opClose:
				code, _ := parseClose(p)
				c.nc.Write(clientFrame(last, opClose, p))
				c.nc.Close()
				said <- fmt.Sprintf("%d %s", code, p[2:])
			default:
				said <- string(p)
			}
			return
		}
	}()
	return said
}

// Of two newcomers that find a frozen incumbent the first takes over; to the
// other it is a live one.
func TestTwoNewcomersTakeOver(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, _ := r.pair("id")
		incumbent := r.holder("id")
		winner := r.rival("id").heeds()
		loser := r.rival("id").heeds()
		start := time.Now()
		eventually(t, "the takeover", func() bool { return r.holder("id") != incumbent })
		b.wantClose(1011, "claim taken over")
		ph.wantEnd(4404, "binary replaced")
		if got := <-loser; got != "4409 server-id already claimed" {
			t.Errorf("the second newcomer got %q", got)
		}
		wantAfter(t, "both answers", start, 5*time.Second)
		r.phone("id").text(`"who are you"`)
		if got := <-winner; !strings.HasSuffix(got, `"frame":"who are you"}`) {
			t.Errorf("the first newcomer got %q", got)
		}
	})
}

// contender is the binary that claimed id last and does not hold it.
func (r *testRelay) contender(id string) *session {
	r.t.Helper()
	v, _ := r.registry.servers.Load(id)
	srv := v.(*server)
	srv.mu.Lock()
	defer srv.mu.Unlock()
	if len(srv.contenders) == 0 {
		r.t.Fatalf("nobody contends for %s", id)
	}
	return srv.contenders[len(srv.contenders)-1]
}

// A daemon whose path is lost again and again, with a word or without, gets its
// id as soon as if it had been lost once: who is dead by then is no incumbent.
func TestClaimOutlivesLostAttempts(t *testing.T) {
	t.Parallel()
	ends := map[string]func(c *wsClient){
		"silence": func(*wsClient) {},
		"FIN":     func(c *wsClient) { c.nc.Close() },
	}
	for first, endFirst := range ends {
		for second, endSecond := range ends {
			t.Run(first+", "+second, func(t *testing.T) {
				t.Parallel()
				onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
					r.pair("id")
					one := r.rival("id")
					time.Sleep(time.Second)
					endFirst(one)
					time.Sleep(time.Second)
					two := r.rival("id")
					time.Sleep(time.Second)
					endSecond(two)
					time.Sleep(time.Second)
					start := time.Now()
					three := r.rival("id").heeds()
					me := r.contender("id")
					eventually(t, "the takeover", func() bool { return r.holder("id") == me || len(three) > 0 })
					wantAfter(t, "the takeover", start, 5*time.Second)
					r.sound()
					time.Sleep(time.Minute)
					if len(three) == 0 {
						r.phone("id").text(`"you"`)
					}
					if got := <-three; !strings.HasSuffix(got, `"frame":"you"}`) {
						t.Errorf("the only live daemon got %q", got)
					}
				})
			})
		}
	}
}

// When an incumbent ends while several wait for it, the first of them holds the
// id for as long as it answers: the challenge was not its own.
func TestSuccessorKeepsItsClaim(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		for i := range 100 {
			id := fmt.Sprint("id-", i)
			a := r.binary(id)
			asks := r.rival(id)
			next := r.rival(id).heeds()
			successor := r.contender(id)
			last := r.rival(id).heeds()
			asks.nc.Close()
			eventually(t, "the first is out of the race", func() bool { return r.count(roleBinary) == i+3 })
			a.nc.Close()
			if got := <-last; got != "4409 server-id already claimed" {
				t.Fatalf("the last in the line got %q", got)
			}
			if r.holder(id) != successor || len(next) > 0 {
				t.Fatal("the successor does not hold the id")
			}
			eventually(t, "the others are gone", func() bool { return r.count(roleBinary) == i+1 })
		}
	})
}

// A newcomer is read while it waits: its end takes it out of the race, and what
// it says is heard.
func TestNewcomerIsHeardWhileItWaits(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.challengeTimeout = time.Hour
	onEach(t, o, func(t *testing.T, r *testRelay) {
		r.binary("id")
		gone := func(what string) {
			t.Helper()
			r.settle(what, func() bool { return r.count(roleBinary) == 1 })
		}
		for name, end := range map[string]func(c *wsClient){
			"FIN":   func(c *wsClient) { c.nc.Close() },
			"reset": func(c *wsClient) { c.reset() },
			"close": func(c *wsClient) { c.close(1001, ""); c.wantEnd(1001, "") },
			"violation": func(c *wsClient) {
				c.raw([]byte{0xff, 0xff})
				c.wantEnd(1002, "reserved bit set")
			},
			"text that is none": func(c *wsClient) { c.text("\xff"); c.wantEnd(1007, "invalid utf-8") },
		} {
			newcomer := r.rival("id")
			before := r.metrics.drops[dropUnknownConn].Load()
			newcomer.text(`{"conn_id":"nobody","frame":"` + strings.Repeat("x", 200<<10) + `"}`)
			newcomer.frame(opPing, []byte("?"))
			newcomer.wantPong([]byte("?"))
			if n := r.metrics.drops[dropUnknownConn].Load() - before; n != 1 {
				t.Errorf("%d envelopes for nobody were dropped, want 1", n)
			}
			end(newcomer)
			gone(name)
			if n := r.buffers.budget.used(); n != 0 {
				t.Errorf("%s: %d bytes are held", name, n)
			}
		}
		if n := strings.Count(r.logs.String(), `msg="claim withdrawn"`); n != 5 {
			t.Errorf("%d withdrawn claims in the log, want 5", n)
		}
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
		r.settle("the old connection is gone", func() bool { return r.count(roleBinary) == 1 })
		if again := ph.greet(b); again != id || r.metrics.binariesInGrace.Load() != 0 {
			t.Errorf("the phone is %s, was %s; %d binaries in grace", again, id, r.metrics.binariesInGrace.Load())
		}
	})
}
