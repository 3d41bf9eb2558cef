package main

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
)

// A server-id's life: its claims and who contends for them, its grace in all its
// orders, and what a phone is told when there is none. check, which every scenario
// calls, recounts it all.

// ---- claims ----

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

func TestClaimLiveIncumbent(t *testing.T) {
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

func TestClaimTwoNewcomersLiveIncumbent(t *testing.T) {
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
func TestClaimFrozenIncumbent(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
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
func TestClaimDeadIncumbent(t *testing.T) {
	t.Parallel()
	ends := map[string]func(b *wsClient){
		"close":      func(b *wsClient) { b.nc.Close() },
		"half-close": func(b *wsClient) { b.tcp().CloseWrite() },
		"reset":      func(b *wsClient) { b.reset() },
	}
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
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
func TestClaimTwoNewcomersTakeOver(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
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
				onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
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
func TestClaimSuccessor(t *testing.T) {
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

// What the poller had come for before a newcomer was there is no answer to that one: the
// holder is asked once more, and time counts from then.
func TestClaimAnswerFromBefore(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	rival := func() *session {
		s, _ := memSession(t, r.relay, roleBinary, r.newConnID())
		w := r.newBatch()
		r.registry.claim(w, s, "id")
		w.flush()
		t.Cleanup(func() { s.free(w) })
		time.Sleep(time.Microsecond) // the clock moves
		return s
	}
	b, first := rival(), rival()
	w := r.newBatch()
	time.Sleep(time.Microsecond)
	second := rival()
	asked := b.challengedAt
	b.markAlive(w)
	if first.endReason != endAlreadyClaimed || second.endReason != endNone || b.challengedAt <= asked || !b.challenged.Load() {
		t.Errorf("first %q, second %q; asked at %d, and at %d", first.endReason, second.endReason, asked, b.challengedAt)
	}
	before := &writeBatch{relay: r.relay, now: b.challengedAt - 1}
	if b.markAlive(before); second.endReason != endNone || b.challengedAt == 0 {
		t.Errorf("second %q, by what was heard before the challenge", second.endReason)
	}
	asked = b.challengedAt
	w.now = asked + int64(r.o.challengeTimeout)
	second.challengedAt = first.opened // it is silent, too: that is nothing to the holder
	if second.overdue(w); r.holder("id") != b {
		t.Error("the claim of a holder that has time left was taken")
	}
	if b.overdue(w); r.holder("id") != second || b.endReason != endTakenOver {
		t.Errorf("the holder was silent for as long as it may be, and ended for %q", b.endReason)
	}
	w.flush()
}

// A newcomer is read while it waits: its end takes it out of the race, and what
// it says is heard.
func TestClaimNewcomerIsHeard(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
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
func TestClaimLateEndOfOldConnection(t *testing.T) {
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

// While the relay stands still nobody can answer: that is no silence.
func TestClaimIncumbentSurvivesStall(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the signals' numbers are Linux's")
	}
	const stop, goOn = syscall.Signal(19), syscall.Signal(18) // SIGSTOP and SIGCONT, which not every system's package has
	most := defaultOptions().challengeTimeout
	for again := range 5 {
		p := startProgram(t, nil, "-rate-per-minute=0").listening()
		b := p.connect("/v2/server", binaryHeaders("id"))
		start := time.Now()
		newcomer := p.connect("/v2/server", binaryHeaders("id"))
		b.wantPing()
		p.signal(stop)
		stopped := time.Now()
		time.Sleep(most + time.Second) // for once it is real time that has to pass
		stood := time.Since(stopped)
		p.signal(goOn)
		p.said("the relay stood still") // it has looked at its deadlines since, or is about to
		b.frame(opPong, nil)
		if took := time.Since(start) - stood; took > most/2 && again < 4 {
			t.Logf("beside the stall it took %v to answer, which the relay may have found too long: once more", took)
			continue
		}
		newcomer.wantEnd(4409, "server-id already claimed")
		return
	}
}

// ---- grace ----

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

func TestRegistryKindsOf4404(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
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
		if n := len(r.hints); n != 0 {
			t.Errorf("%d hints that the binary is elsewhere while nobody asks for it", n)
		}
		refused("id", "server-id last held 42s ago")
		if n := len(r.hints); n != 1 {
			t.Errorf("%d hints that the binary is elsewhere, want 1", n)
		}
		r.binary("id").close(1000, "") // it comes back after more than a grace
		r.binary("new").close(1000, "")
		r.settle("the hint", func() bool { return r.metrics.binariesInGrace.Load() == 2 })
		if n := len(r.hints); n != 2 {
			t.Errorf("%d hints that the binary was elsewhere, want 2", n)
		}
		time.Sleep(time.Hour)
		refused("id", "server-id last held 1h0m0s ago")
		refused("other", "server-id never seen since this relay started 1h2m12s ago")
		if n := len(r.hints); n != 2 {
			t.Errorf("%d hints of what is long ago, want none more", n-2)
		}
	})
}

// Of too many claims an old one is forgotten, and that shows in the wording.
func TestRegistryForgetsClaims(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
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
		if n := len(recent.at); n != maxRecentClaims {
			t.Errorf("%d claims are remembered, want %d", n, maxRecentClaims)
		}
		time.Sleep(time.Minute - r.age()%time.Second)
		r.phone(fmt.Sprint(victim)).wantEnd(4404, "server-id never seen in the last ")
		r.phone(fmt.Sprint(maxRecentClaims)).wantEnd(4404, "server-id last held ")
	})
}

// A server-id that was held is remembered, and its request is not: net/http's
// header values are parts of one string with all of them.
func TestRegistryKeepsNoHeader(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	header := strings.Repeat("x", 4<<10) + "server"
	id := header[4<<10:]
	b, _ := memBinary(t, r.relay, id)
	bt := r.newBatch()
	defer bt.flush()
	defer b.free(bt)
	var recent recentClaims
	recent.note(id, 1)
	for known := range recent.at {
		if unsafe.StringData(known) == unsafe.StringData(id) {
			t.Errorf("what is remembered of %s keeps the %d bytes that its id came in", id, len(header))
		}
	}
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

// Whatever ends a binary's connection begins its grace.
func TestRegistryGraceAfterEveryEnd(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		end  func(b *wsClient)
	}{
		{"close frame", func(b *wsClient) { b.close(1001, "") }},
		{"end of tcp", func(b *wsClient) { b.nc.Close() }},
		{"half-close", func(b *wsClient) { b.tcp().CloseWrite() }},
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

func TestRegistryReclaim(t *testing.T) {
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
func TestRegistryPhoneLeavesInGrace(t *testing.T) {
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

func TestRegistryPhonesInGraceCount(t *testing.T) {
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
func TestRegistryGraceExpires(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
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

// A phone that sends more in grace than may be held waits; nothing is lost.
func TestRegistryGraceQueueLimit(t *testing.T) {
	t.Parallel()
	const limit, n, size = 256 << 10, 200, 8 << 10
	o := timedOptions()
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

// Each grace ends when its own time is over, and one whose claim is taken does not.
func TestRegistryGracesEndInOrder(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
		w := r.newBatch()
		start := r.age()
		held := map[string]*session{}
		come := func(id string) { held[id], _ = memBinary(t, r.relay, id) }
		leave := func(id string) {
			w.now = r.now()
			held[id].free(w)
			w.flush()
		}
		for _, id := range []string{"1st", "2nd", "3rd", "4th"} {
			come(id)
		}
		for _, step := range []struct {
			at   time.Duration
			do   func()
			want string // the server-ids that are known a sweep later
		}{
			{0, func() { leave("1st"); leave("2nd") }, "1st 2nd 3rd 4th"},
			{10 * time.Second, func() { leave("3rd"); come("1st") }, "1st 2nd 3rd 4th"},
			{15 * time.Second, func() { leave("4th"); come("3rd"); leave("3rd") }, "1st 2nd 3rd 4th"},
			{29 * time.Second, func() {}, "1st 2nd 3rd 4th"},
			{30 * time.Second, func() { leave("1st") }, "1st 3rd 4th"},
			{44 * time.Second, func() {}, "1st 3rd 4th"},
			{45 * time.Second, func() {}, "1st"},
			{59 * time.Second, func() {}, "1st"},
			{60 * time.Second, func() {}, ""},
		} {
			time.Sleep(start + step.at - r.age())
			step.do()
			time.Sleep(mostLate + time.Millisecond)
			var ids []string
			r.registry.each(func(srv *server) { ids = append(ids, srv.id) })
			slices.Sort(ids)
			if got := strings.Join(ids, " "); got != step.want {
				t.Errorf("after %v: %q are known, want %q", step.at, got, step.want)
			}
		}
	})
}

// However many server-ids come and go, few graces run: the oldest ends early, for
// its phones too.
func TestRegistryGracesBounded(t *testing.T) {
	t.Parallel()
	o := timedOptions()
	o.maxConnections = 3
	most := gracesPerConnection * o.maxConnections
	onFakeClock(t, o, func(t *testing.T, r *testRelay) {
		b, ph, _ := r.pair("oldest")
		start := time.Now()
		r.leaves(b)
		for i := range most {
			if _, held := r.registry.servers.Load("oldest"); !held {
				t.Fatalf("the oldest grace ended when there were %d, limit %d", i+1, most)
			}
			b := r.binary(fmt.Sprint("id-", i))
			b.close(1000, "")
			b.wantEnd(1000, "")
			eventually(t, "its connection is gone", func() bool { return r.count(roleBinary) == 0 })
		}
		ph.wantEnd(4404, "grace expired")
		wantAfter(t, "the end of the oldest grace", start, 0)
		if n := r.metrics.binariesInGrace.Load(); n != int64(most) {
			t.Errorf("%d graces run, want %d", n, most)
		}
	})
}

// ---- the recount ----

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
	var binaries, grace, phones, checks int64
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
		if strings.HasPrefix(srv.id, probePrefix) {
			checks++
		}
		if srv.binary != nil {
			binaries++
		} else {
			grace++
		}
	})
	if err != nil {
		return err
	}
	g.graceMu.Lock()
	graces := g.graces.Len()
	g.graceMu.Unlock()
	for _, c := range [...]struct {
		name         string
		count, gauge int64
	}{
		{"graces that will end", grace, int64(graces)},
		{"claims of checks", checks, g.checks.Load()},
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

// ---- what the ids tell ----

// history is what happens to relays, to the daemons of one name and to their clocks, in
// fake time and without sockets: what the ids tell depends on nothing else.
type history struct {
	t       testing.TB
	over    time.Duration
	relays  map[string]*relay // all that have been
	daemons map[string]*historyDaemon
	logs    logBuffer
}

// historyDaemon is a daemon with the ids that it keeps.
type historyDaemon struct {
	at  *session
	ids []string
}

func newHistory(t testing.TB) *history {
	return &history{t: t, over: defaultPace().over, relays: map[string]*relay{}, daemons: map[string]*historyDaemon{}}
}

// clock is how wrong a clock is that is wrong by that much in 2026: fake time begins in 2000.
func (h *history) clock(wrong time.Duration) time.Duration {
	return time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).Sub(historyStart) + wrong
}

var historyStart = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// starts a relay with a clock that is wrong.
func (h *history) starts(name string, wrong time.Duration) *relay {
	o := timedOptions()
	o.checkPace.over, o.checkPace.skew = h.over, h.clock(wrong)
	id := newIdentity(time.Now().Add(o.checkPace.skew))
	r := makeRelay(o, id, buildVersion{}, new(instanceState), new(probeKeys), newLogger(&h.logs, o))
	h.relays[name] = r
	return r
}

func (h *history) daemon(name string) *historyDaemon {
	if h.daemons[name] == nil {
		h.daemons[name] = &historyDaemon{}
	}
	return h.daemons[name]
}

// connects takes a daemon to a relay.
func (d *historyDaemon) connects(name string, r *relay) {
	d.at = newSession(r, caller{role: roleBinary}, r.newConnID())
	d.at.server = &server{id: name}
}

// phone joins, wherever the daemon is.
func (d *historyDaemon) phone() { d.ids = append(d.ids, d.at.relay.newConnID()) }

// sends names the ids of sessions, all but those of phones that are there being strange.
func (d *historyDaemon) sends(ids ...string) {
	for _, id := range ids {
		d.at.strange([]byte(id))
		time.Sleep(time.Millisecond)
	}
}

// found is what each relay has found, such as "A certain, B suspected".
func (h *history) found() string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(h.relays)) {
		for e := range evidenceCount {
			if h.relays[name].metrics.splitSeen[e].Load() > 0 {
				all = append(all, name+" "+e.String())
			}
		}
	}
	return strings.Join(all, ", ")
}

// play does what a script says, step by step: "A", a relay starts, perhaps with "A(-72h)" wrong on its clock, which is
// set by "A=1h"; "d>A", d connects to A; "d+", a phone joins d; "d!", d sends to all that it has had; "d0!", to the first
// of them only; "d-", d starts anew; "90s", so much time passes.
func (h *history) play(script string) {
	h.t.Helper()
	for _, step := range strings.Fields(script) {
		name, rest := step[:1], step[1:]
		pass, err := time.ParseDuration(step)
		if err == nil {
			time.Sleep(pass)
			continue
		}
		relay := name >= "A" && name <= "Z"
		d := h.daemons[name]
		switch wrong, _ := time.ParseDuration(strings.Trim(rest, "()=")); {
		case relay && strings.HasPrefix(rest, "="):
			h.relays[name].o.checkPace.skew = h.clock(wrong)
		case relay:
			h.starts(name, wrong)
		case rest[0] == '>':
			h.daemon(name).connects(name, h.relays[rest[1:]])
		case rest == "+":
			d.phone()
		case rest == "-":
			d.ids = nil
		case rest == "!":
			d.sends(d.ids...)
		default:
			d.sends(d.ids[int(rest[0]-'0')])
		}
	}
}

func TestIDsTell(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, script, want string }{
		// One relay at a time.
		{"a restart", "A d>A d+ 1h B d>B d! d+ d! 1h d>B d! d+ 1h d>B d!", ""},
		{"a loss of network after a migration", "A d>A d+ 24h B d>B d+ 1m d>B d0! 48h d>B d0! d+ d! 48h d>B d!", ""},
		{"late to a session of two relays ago", "A d>A d+ 24h B d>B d+ d1! 24h C d>C d+ d2! 24h d>C d0! d1! 24h d>C d! d+ 24h d>C d!", ""},
		{"several daemons, one of them late", "A d>A d+ e>A e+ 24h B d>B d! d+ 24h d>B d! 24h e>B e! e+ 24h e>B e!", ""},
		{"a daemon that starts anew", "A d>A d+ 24h B d>B d! d+ d- 24h d>B d+ d! 24h d>B d!", ""},
		{"a relay that starts again and again", "A d>A d+ 1m B d>B d! d+ 1m C d>C d! d+ 1m D d>D d! d+ 100s d+ 100s d! E d>E d!", ""},
		{"a rolling update", "A d>A d+ 24h B 1m d>B d! d+ 1h d>B d!", ""},
		{"a rolling update with daemons to and fro",
			"A d>A d+ 24h B d>B d! d+ 30s d>A d! d+ 30s d>B d! d+ 25s d>A d! d+ 2s d>B d! d+ 3h d>B d!", ""},
		{"and the other one was up before", "A d>A e>A 24h B 10m d>B d! d+ 85s e>B e+ e>A e! d>A d! 3h e>A e! d>A d! 3h d>A d!", ""},
		{"a rolling update that is taken back", "A d>A d+ 24h B d>B d! d+ 85s d+ d>A d! d+ 3h d>A d!", ""},

		// One at a time, and clocks.
		{"the second one's an hour behind", "A d>A 24h d+ 5m B(-1h) d>B 10m d! 3h d>B d! 3h d>B d! 3h d>B d!", ""},
		{"the first one's days ahead, and it is heard", "A(72h) d>A d+ 24h d+ B d>B d! 72h d>B d! 72h d>B d! 72h d>B d!", ""},
		{"the second one's days behind", "A d>A d+ 24h d+ B(-72h) d>B d! 72h d>B d! 72h d>B d! 72h d>B d!", ""},
		{"the second one boots in 1970", "A d>A d+ 24h d+ B(-490896h) d>B d! 1h d>B d! 1h d>B d! 1h d>B d!", ""},
		{"and learns the date later", "A d>A d+ 24h d+ B(-490896h) 1m B=0s d>B d! 1h d>B d! 1h d>B d! 1h d>B d!", ""},
		{"an old date, which is set later", "A d>A d+ 240h d+ B(-240h) 1m B=0s d>B d! 24h d>B d! 24h d>B d! 24h d>B d!", ""},
		{"both in 1970", "A(-490896h) d>A d+ 24h d+ B(-490896h) d>B d! 24h d>B d! 24h d>B d!", ""},
		{"the second one's three hours behind, and a daemon late", "A d>A e>A 24h d+ 2m d+ e+ B(-3h) 4h d>B d! e>B e!", ""},
		{"the second one's is set wrong later", "A d>A e>A 3h d+ 2m d+ e+ B B=-5h 6h d>B d! e>B e!", ""},
		{"the first one's jumps", "A d>A d+ A=48h d+ 1h A=-48h d+ 1h A=0s d+ B d>B d! 72h d>B d! 24h d>B d! 24h d>B d!", ""},

		// Two at once.
		{"to and fro", "A B d>A d+ 1m d>B d! 100s d+ d>A d!", "A certain"},
		{"to and fro, as soon as it is certain", "A B d>A d+ 1m d>B d! 89999ms d+ d>A d!", "A certain"}, // and d! takes 1 ms
		{"to and fro, a moment sooner", "A B d>A d+ 1m d>B d! 89998ms d+ d>A d!", ""},
		{"to and fro, without a clock", "A(-490896h) B(-490896h) d>A d+ 1m d>B d! 100s d+ d>A d!", "A certain"},
		{"to and fro, with one that is wrong", "A(999h) B(-999h) d>A d+ 1m d>B d! 100s d+ d>A d!", "A certain"},
		{"another daemon brings the word", "A B d>A d+ d>B d! 100s e>B e+ 1s e>A e!", "A certain"},
		{"both sides see it", "A B d>A d+ d>B d! 100s d+ d>A d! 100s d+ d>B d!", "A certain, B certain"},
		{"behind the ids of a relay before both", "A e>A e+ d>A d+ 1h B C e>B e! d>B d! d+ 1m d>C d! e>C e! 100s d+ d>B d!", "B certain"},
		{"and an id of that one comes once more", "A 1m e>A e+ d>A d+ 1h B C e>B e! d>B d! d+ 1m d>C d! e>C e! 100s d+ d>B d!", "B certain"},
		{"but one that is younger by a second", "A 1m d>A d+ 1s e>A e+ 1h B C e>B e! d>B d! d+ 1m d>C d! e>C e! 100s d+ d>B d!", ""},
		{"three of them", "A B C d>A d+ d>B d! 100s d+ d>C d! 100s d+ d>A d!", "A certain"},
		{"one changes sides", "A B d>A 25h30m d+ 2m d+ d>B d! 1m d>B d! 1m d>B d!", "B suspected"},
		{"two change sides", "A B d>A e>A 25h30m d+ 2m e+ d>B d! e>B e!", "B suspected"},
		{"one changes sides once", "A B d>A 25h30m d+ 2m d+ d>B d! d! d! 1m d>B d!", ""},
		{"two change sides, after one relay has learned the date",
			"A d>A e>A d+ B(-490896h) d>B d! B=0s 26h d>A d+ 2m d+ e+ d>B d! e>B e!", "B suspected"},
		{"one that came later", "A 62m B d>B d+ 2m e>B e+ 1m d>A d! e>A e!", "A suspected"},
		{"one that came soon after", "A 59m B d>B d+ 2m e>B e+ 1m d>A d! e>A e!", ""},
		{"a backend that failed and came back", "A B d>A d+ 1m C d>B d! d+ 1h d>C d! 100s d+ d>B d!", "B certain"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				h := newHistory(t)
				if h.play(test.script); h.found() != test.want {
					t.Errorf("found %q, want %q\n%s", h.found(), test.want, h.logs.String())
				}
				for word, level := range map[string]string{"certain": "ERROR", "suspected": "WARN"} {
					if strings.Contains(test.want, word) && !strings.Contains(h.logs.String(), "level="+level+" ") {
						t.Errorf("found %q, and the log has no line of level %s\n%s", h.found(), level, h.logs.String())
					}
				}
			})
		})
	}
}

// randomHistory is one out of a seed. What it does is kept, for whom a failure puzzles.
type randomHistory struct {
	*history
	*rand.Rand
	script []string
	up     []string // names of the relays that serve
	next   byte     // the name of the next one
	wild   bool     // clocks may be wrong by anything for ever
}

func (h *randomHistory) do(step string) {
	h.script = append(h.script, step)
	h.play(step)
}

// passes lets a random time pass, of any order of magnitude up to most.
func (h *randomHistory) passes(most time.Duration) {
	h.do(time.Duration(math.Pow(most.Seconds(), h.Float64()) * float64(time.Second)).Round(time.Second).String())
}

// starts a relay. Its clock is right within half an hour, or has no battery and is set a minute later,
// or never; or it is wild.
func (h *randomHistory) starts() string {
	name := string(h.next)
	h.next++
	wrong := time.Duration(h.IntN(3600)-1800) * time.Second
	far := time.Duration(math.Pow(24*365*24, h.Float64()) * float64(time.Hour)).Round(time.Second)
	const unset = -30 * 365 * 24 * time.Hour
	k := h.IntN(12)
	switch {
	case h.wild && k < 3:
		h.do(fmt.Sprintf("%s(%v)", name, far))
	case k < 3:
		h.do(fmt.Sprintf("%s(%v)", name, -far))
	case k == 4:
		h.do(fmt.Sprintf("%s(%v)", name, unset-far))
	default:
		h.do(fmt.Sprintf("%s(%v)", name, wrong))
	}
	if k < 4 && !h.wild {
		h.do("1m")
		h.do(fmt.Sprintf("%s=%v", name, wrong))
	}
	h.up = append(h.up, name)
	return name
}

// stops a relay. Its daemons lose it, and will come back.
func (h *randomHistory) stops(i int) {
	for _, d := range h.daemons {
		if d.at != nil && d.at.relay == h.relays[h.up[i]] {
			d.at = nil
		}
	}
	h.up = slices.Delete(h.up, i, i+1)
}

// acts lets a daemon do something.
func (h *randomHistory) acts() {
	d := string(rune('a' + h.IntN(4)))
	k := h.IntN(12)
	if h.daemon(d).at == nil || k < 3 {
		h.do(d + ">" + h.up[h.IntN(len(h.up))])
		if h.IntN(4) > 0 {
			h.do(d + "!") // the habit: what it has to say it says to all
		}
		return
	}
	switch n := len(h.daemon(d).ids); {
	case k < 7:
		h.do(d + "+")
	case k < 9:
		h.do(d + "!")
	case k < 11 && n > 0:
		h.do(fmt.Sprintf("%s%d!", d, h.IntN(min(n, 10))))
	case k == 11 && h.IntN(5) == 0:
		h.do(d + "-")
	}
}

// honest is a history of one relay at a time, but for handovers.
func (h *randomHistory) honest() {
	h.starts()
	for range 20 + h.IntN(100) {
		if h.next > 'X' { // letters are names
			return
		}
		h.acts()
		h.passes(12 * time.Hour)
		switch h.IntN(15) {
		case 0: // a restart, or a migration
			h.stops(0)
			h.passes(12 * time.Hour)
			h.starts()
		case 1: // a rolling update, of which one in four is taken back
			h.starts()
			for range h.IntN(8) {
				h.acts()
				h.passes(10 * time.Second)
			}
			h.stops(h.IntN(4) / 3)
		}
	}
}

// split is a history of two relays at a time, each of which may be replaced. In the end a daemon
// goes to and fro.
func (h *randomHistory) split() (sees string) {
	h.starts()
	h.starts()
	for range 20 + h.IntN(100) {
		h.acts()
		h.passes(12 * time.Hour)
		if h.IntN(15) == 0 && h.next < 'Z' {
			h.stops(h.IntN(2))
			h.starts()
		}
	}
	for range 3 {
		h.do("2h")
		h.do("a>" + h.up[0])
		h.do("a+")
		h.do("10m")
		h.do("a>" + h.up[1])
		h.do("a!")
		h.do(h.over.String())
		h.do("a+")
		h.do("a>" + h.up[0])
		h.do("a!")
	}
	return h.up[0] + " certain"
}

// No history of one relay at a time gives an alarm, and no split stays silent. Only clocks that
// are wrong by much, for ever, can raise a suspicion: how often is logged. PYRYCODE_STRESS_HISTORIES is how many
// histories of each kind there are, PYRYCODE_STRESS_SEED the first of their seeds.
func TestIDsTellOfRandomHistories(t *testing.T) {
	t.Parallel()
	histories := stressNumber(t, "PYRYCODE_STRESS_HISTORIES", 400)
	first := stressNumber(t, "PYRYCODE_STRESS_SEED", rand.Uint64N(1<<40))
	t.Logf("PYRYCODE_STRESS_SEED=%d", first)
	suspicions := 0
	type kind struct{ split, wild bool }
	for seed := first; seed < first+histories; seed++ {
		for i, k := range []kind{{false, false}, {false, true}, {true, false}, {true, true}} {
			var h *randomHistory
			sees := ""
			synctest.Test(t, func(t *testing.T) {
				h = &randomHistory{history: newHistory(t), Rand: rand.New(rand.NewPCG(seed, uint64(i))), next: 'A', wild: k.wild}
				if k.split {
					sees = h.split()
				} else {
					h.honest()
				}
			})
			found := h.found()
			switch certain := strings.Contains(found, evidenceCertain.String()); {
			case !k.split && (certain || found != "" && !k.wild), !strings.Contains(found, sees):
				t.Errorf("seed %d, %+v: found %q, must find %q: %s", seed, k, found, sees, h.script)
			case !k.split && found != "":
				suspicions++
			}
		}
	}
	t.Logf("%d suspicions in %d histories of one relay at a time whose clocks are wrong by up to decades", suspicions, histories)
}

// How soon the ids tell of two relays that were started together, where each connection of a daemon lasts for a day
// on average and leads to either of them by chance, and a phone of its joins once an hour.
func TestIDsTellSoon(t *testing.T) {
	t.Parallel()
	const runs = 40
	for _, daemons := range []string{"a", "abcde"} {
		var took [evidenceCount][]float64 // days
		for seed := range uint64(runs) {
			synctest.Test(t, func(t *testing.T) {
				h := &randomHistory{history: newHistory(t), Rand: rand.New(rand.NewPCG(seed, 2))}
				began, found := time.Now(), ""
				for h.play("A B"); !strings.Contains(found, "certain") && time.Since(began) < 365*24*time.Hour; found = h.found() {
					for _, d := range strings.Split(daemons, "") {
						if h.daemon(d).at == nil || h.IntN(24*60) == 0 {
							h.play(d + ">" + string("AB"[h.IntN(2)]) + " " + d + "!")
						}
						if h.IntN(60) == 0 {
							h.play(d + "+ " + d + "!")
						}
					}
					h.play("1m")
					if suspected := evidenceSuspected; strings.Contains(h.found(), "suspected") && !strings.Contains(found, "suspected") {
						took[suspected] = append(took[suspected], time.Since(began).Hours()/24)
					}
				}
				took[evidenceCertain] = append(took[evidenceCertain], time.Since(began).Hours()/24)
			})
		}
		for e, days := range took {
			slices.Sort(days)
			if len(days) > 0 {
				t.Logf("%d daemons: %v in %d of %d, after %.1f days in the median, %.1f at the most",
					len(daemons), evidence(e), len(days), runs, days[len(days)/2], days[len(days)-1])
			}
		}
		if days := took[evidenceCertain]; days[len(days)-1] > 60 {
			t.Errorf("%d daemons: certain after %.1f days only", len(daemons), days[len(days)-1])
		}
	}
}

// FuzzConnTag: what has a tag is what a relay has minted, to the bit, and an envelope brings it as it is.
func FuzzConnTag(f *testing.F) {
	for _, id := range []string{
		newConnID(connTag{}), newConnID(connTag{1, 2, 3, 4}), newConnID(connTag{math.MaxUint64, math.MaxUint32, math.MaxUint32, math.MaxUint64}),
		"NUSfFUm0TKyZrWnWXx8SDg", "", strings.Repeat("A", 53), strings.Repeat("A", 54), strings.Repeat("A", 53) + "B",
		strings.Repeat("A", 53) + "=", strings.Repeat("+", 54), strings.Repeat("A", 55),
		strings.Repeat("A", 53) + "\n", strings.Repeat("\r\n", 27),
	} {
		f.Add([]byte(id))
	}
	f.Fuzz(func(t *testing.T, id []byte) {
		tag, ok := parseConnTag(id)
		want := len(id) == 54 && !bytes.ContainsFunc(id, notInConnID) && strings.IndexByte("AQgw", id[53]) >= 0
		if ok != want {
			t.Fatalf("%q: a tag %v, want %v", id, ok, want)
		}
		if !ok {
			return
		}
		if again := newConnID(tag); again[22:] != string(id[22:]) || again[:21] == string(id[:21]) {
			t.Fatalf("%q has the tag %+v, which is minted as %q", id, tag, again)
		}
		if e, drop := parseEnvelope([]byte(`{"conn_id":"` + string(id) + `","frame":1}`)); drop != dropNone || !bytes.Equal(e.connID, id) {
			t.Fatalf("%q arrives as %q, drop %d", id, e.connID, drop)
		}
	})
}

// What a binary's envelope tells of another relay is in the log, once an hour, in /healthz for a day, and
// counted once for each new id. It ends nothing.
func TestIDsReport(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
		time.Sleep(13 * time.Hour)
		b, _, id := r.pair("id")
		shows := func(split string, certain, lines int) {
			t.Helper()
			b.frame(opPing, nil)
			b.wantPong(nil) // what was sent before has been read
			if _, body := r.ask(get("/healthz")...); !strings.Contains(body, `"split_seen":"`+split+`"`) {
				t.Errorf("/healthz does not say %s: %s", split, body)
			}
			if got := r.metrics.splitSeen[evidenceCertain].Load(); got != int64(certain) {
				t.Errorf("%d ids counted, want %d", got, certain)
			}
			if got := strings.Count(r.logs.String(), "multi-instance deploy detected"); got != lines {
				t.Errorf("%d lines in the log, want %d", got, lines)
			}
		}
		other := connTag{relay: 0xabc, age: 100, after: r.me}
		mine, _ := parseConnTag([]byte(id))
		if mine.relay != r.me || mine.after != 0 {
			t.Errorf("%s has the tag %+v", id, mine)
		}
		for _, id := range []string{id + "x", newConnID(mine), newConnID(connTag{}), newConnID(connTag{relay: 0xabc, age: 99, after: 7})} {
			b.send(id, "1")
		}
		shows("none", 0, 0)
		for range 3 {
			b.send(newConnID(other), "1")
		}
		shows("certain", 1, 1)
		for _, words := range []string{"level=ERROR", "evidence=certain", "other=0000000000000abc", "server=id", "remedy="} {
			if !strings.Contains(r.logs.String(), words) {
				t.Errorf("the log lacks %s", words)
			}
		}
		other.age = 101
		b.send(newConnID(other), "1")
		shows("certain", 2, 1)
		time.Sleep(time.Hour)
		b, _, _ = r.pair("another")
		other.age = 102
		b.send(newConnID(other), "1")
		shows("certain", 3, 2)
		time.Sleep(24*time.Hour + time.Second)
		b, _, _ = r.pair("id")
		b.send(newConnID(other), "1")
		shows("none", 3, 2)
	})
}

// However many relays a binary makes up, few are kept.
func TestIDsBound(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, _ := memBinary(t, r.relay, "server")
	defer b.free(r.newBatch())
	for i := range uint64(10 * maxOthers) {
		b.strange([]byte(newConnID(connTag{relay: i + 1})))
	}
	if n := len(r.others.seen); n != maxOthers {
		t.Errorf("%d relays are kept, want %d", n, maxOthers)
	}
}
