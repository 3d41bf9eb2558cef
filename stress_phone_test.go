package main

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// The phones of the stress run. Each comes with a plan, and afterwards compares
// its end, and what its daemon knows of it, with what the contract says.

// stressPlan is what a phone does, and what has to come of it.
type stressPlan struct {
	name   string
	do     func(*stressPhone)
	code   int    // of the end that the phone sees; 0: the one it chose; 1006: no close frame
	text   string // reason in it
	notice int    // close code that the daemon is told, 0: the phone's own, -1: none
	prefix bool   // the daemon may have missed the last messages
}

// violates is the plan of a phone that sends these bytes.
func violates(r closeReason, bad ...byte) stressPlan {
	return stressPlan{name: r.String(), code: int(r.code()), text: r.String(), notice: int(r.code()), do: func(ph *stressPhone) {
		ph.chatter()
		ph.write(bad)
	}}
}

// stressFrame is a client's frame whose mask is zero.
func stressFrame(first byte, payload string) []byte {
	return append([]byte{first, 0x80 | byte(len(payload)), 0, 0, 0, 0}, payload...)
}

var stressChat = stressPlan{name: "chat", do: func(ph *stressPhone) {
	for range 1 + ph.rng.IntN(20) {
		ph.ask(1, stressSize(ph.rng, ph.s.w.payload()))
		if !ph.heard() {
			return
		}
	}
	ph.leave(1000)
}}

var stressPlans = []stressPlan{
	stressChat,
	{name: "burst", do: func(ph *stressPhone) {
		ph.burst(200+ph.rng.IntN(400), 40)
		ph.leave(3000 + ph.rng.IntN(2000))
	}},
	{name: "big burst", do: func(ph *stressPhone) {
		ph.burst(20, min(70000, ph.s.w.payload()))
		ph.leave(1001)
	}},
	{name: "close without code", code: noCloseCode, notice: noCloseCode, do: func(ph *stressPhone) {
		ph.chatter()
		ph.leave(0)
	}},
	{name: "silent", do: func(ph *stressPhone) { // known by its code alone
		code := 3000 + int(ph.s.w.serial.Add(1)%2000)
		ph.s.locked(func() { ph.before = ph.s.silent[code] })
		ph.leave(code)
	}},
	{name: "dribble", do: func(ph *stressPhone) {
		for range 3 {
			ph.sendIn(1, clientFrame(0x80, opText, ph.next("", 20)))
		}
		ph.leave(4000)
	}},
	{name: "fragments", do: func(ph *stressPhone) {
		for range 5 {
			ph.sendIn(7000, ph.fragments(ph.next("", stressSize(ph.rng, ph.s.w.payload()))))
		}
		ph.leave(4001)
	}},
	{name: "ping flood", do: func(ph *stressPhone) {
		for i := range 300 {
			ph.send(opPing, fmt.Append(nil, "ping ", i))
		}
		ph.chatter()
		ph.send(opPing, []byte("last"))
		if ph.waitFor(func() bool { return ph.pong == "last" }) {
			ph.leave(1000)
		}
	}},
	{name: "deaf", do: func(ph *stressPhone) { // but not for long enough to overflow
		hear := ph.deafen()
		ph.ask(10, min(20000, ph.s.w.payload()))
		ph.daemon(func(p stressPeer) bool { return p.sent == ph.asked })
		ph.chatter()
		hear()
		if ph.heard() {
			ph.leave(1000)
		}
	}},
	{name: "overflow", code: 1011, text: endBacklogFull.String(), notice: 1011, do: func(ph *stressPhone) {
		hear := ph.deafen()
		ph.ask(ph.s.w.plenty(), min(200000, ph.s.w.payload()))
		_, steady := ph.daemon(func(p stressPeer) bool { return p.notice != 0 })
		hear()
		if !steady && ph.heard() { // so early that nothing overflowed
			ph.plan = stressChat
			ph.leave(1000)
		}
	}},
	{name: "closed by its daemon", text: endBinaryDirective.String(), notice: -1, do: func(ph *stressPhone) {
		ph.chatter()
		n, codes := ph.rng.IntN(100), [...]int{4401, 4408, 4412, 4413, 4421, 4426, 1000}
		ph.code = codes[ph.rng.IntN(len(codes))]
		ph.say(fmt.Sprintf("echo %d %d close %d", n, 100, ph.code))
		ph.asked += n
	}},
	{name: "half-close", code: 1006, notice: 1006, do: func(ph *stressPhone) {
		ph.chatter()
		ph.nc.(unhurriedConn).CloseWrite()
	}},
	{name: "half a message", code: 1006, notice: 1006, do: func(ph *stressPhone) {
		ph.chatter()
		ph.write(clientFrame(0, opText, []byte(`"half`)))
		ph.write(clientFrame(0x80, opContinuation, []byte(` of it"`))[:9])
		ph.nc.(unhurriedConn).CloseWrite()
	}},
	{name: "reset", code: 1006, notice: 1006, prefix: true, do: func(ph *stressPhone) {
		ph.chatter()
		ph.reset()
	}},
	{name: "reset in front of a queue", code: 1006, notice: 1006, prefix: true, do: func(ph *stressPhone) {
		ph.ask(20, 9000)
		ph.reset()
	}},
	violates(endUnmasked, opText|0x80, 1, '1'),
	violates(endReservedBit, stressFrame(0xc1, "1")...),
	violates(endUnknownOpcode, stressFrame(0x83, "1")...),
	violates(endBadControl, stressFrame(opPing, "")...),
	violates(endStrayFragment, stressFrame(0x80, "1")...),
	violates(endInterleaved, append(stressFrame(opText, "1"), stressFrame(0x81, "1")...)...),
	violates(endBadLength, 0x81, 0xfe, 0, 125, 0, 0, 0, 0),
	violates(endBadClose, stressFrame(0x88, "\x03\xed")...),
	violates(endInvalidUTF8, stressFrame(0x81, "\"\xc3\"")...),
	violates(endNotJSON, stressFrame(0x81, `1,"conn_id":"victim"`)...),
	violates(endMessageTooBig, 0x81, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0),
}

// payload is the largest body of a message that fits -max-frame in every envelope.
func (w *stressWorld) payload() int { return w.o.maxFrame - 1000 }

// plenty is how many of the largest messages no queue and no socket takes unread.
func (w *stressWorld) plenty() int {
	if smallBuffers == nil {
		return 60
	}
	return 12
}

type stressPhone struct {
	*stressConn
	s      *stressServer
	rng    *rand.Rand
	name   string
	shaken int // of s, when it came
	sent   int // messages
	asked  int // messages that the daemon was asked for
	code   int // close code chosen
	before int // notices with it that others caused
	plan   stressPlan

	mu   sync.Mutex // guards what follows
	got  int        // messages
	pong string     // the last
	deaf chan struct{}
}

func newStressPhone(s *stressServer, rng *rand.Rand) *stressPhone {
	return &stressPhone{s: s, rng: rng, name: fmt.Sprintf("%s/%d", s.id, s.w.serial.Add(1))}
}

// live is a phone's whole life.
func (ph *stressPhone) live(plan stressPlan) {
	_, ph.shaken = ph.s.peer(ph.name)
	if !ph.join() {
		time.Sleep(time.Millisecond) // full: the next one, a little later
		return
	}
	ph.follow(plan)
}

// finish lets a phone that joined in grace act as one that came just now.
func (ph *stressPhone) finish(plan stressPlan) {
	_, ph.shaken = ph.s.peer(ph.name)
	ph.follow(plan)
}

// follow is a life from when it is connected.
func (ph *stressPhone) follow(plan stressPlan) {
	ph.plan = plan
	plan.do(ph)
	ph.judge()
}

// join connects.
func (ph *stressPhone) join() bool {
	w := ph.s.w
	c, refused, err := w.connect("/v2/client", phoneHeaders(ph.s.id))
	if err != nil && !w.ending.Load() || refused != 0 && !w.mayRefuse(refused) {
		w.fail("phone %s: upgrade: %d, %v", ph.name, refused, err)
	}
	if ph.stressConn = c; c == nil {
		return false
	}
	go c.read(func(op byte, p []byte) {
		ph.mu.Lock()
		deaf := ph.deaf
		ph.mu.Unlock()
		if deaf != nil {
			<-deaf
		}
		ph.mu.Lock()
		defer ph.mu.Unlock()
		if op == opPong {
			ph.pong = string(p)
			return
		}
		if _, err := sameMessage(p, "to "+ph.name, ph.got); op != opText || err != nil {
			w.fail("phone %s: opcode %d: %v", ph.name, op, err)
		}
		ph.got++
	})
	return true
}

// ---- what plans are made of ----

// next makes the next message. It counts as sent from here on: what arrives is
// at most that.
func (ph *stressPhone) next(do string, size int) []byte {
	ph.sent++
	return stressText(ph.name, ph.sent-1, do, size)
}

// say sends a message, in one piece or several.
func (ph *stressPhone) say(do string) {
	p := ph.next(do, stressSize(ph.rng, ph.s.w.payload()))
	if ph.rng.IntN(4) == 0 {
		ph.write(ph.fragments(p))
	} else {
		ph.send(byte(opText+ph.rng.IntN(2)), p)
	}
}

func (ph *stressPhone) chatter() {
	for range ph.rng.IntN(8) {
		ph.say("")
	}
}

// ask makes the daemon send n messages.
func (ph *stressPhone) ask(n, size int) {
	ph.asked += n
	ph.say(fmt.Sprintf("echo %d %d", n, size))
}

// burst sends n messages at once.
func (ph *stressPhone) burst(n, size int) {
	var b []byte
	for range n {
		b = append(b, clientFrame(0x80, opText, ph.next("", size))...)
	}
	ph.write(b)
}

// fragments cuts a message anywhere, characters too, with pings in between.
func (ph *stressPhone) fragments(p []byte) (b []byte) {
	op := byte(opText)
	for len(p) > 0 {
		n := 1 + ph.rng.IntN(len(p))
		b = append(b, clientFrame(0, op, p[:n])...)
		b = append(b, clientFrame(0x80, opPing, nil)...)
		p, op = p[n:], opContinuation
	}
	return append(b, clientFrame(0x80, op, nil)...)
}

// sendIn sends bytes in pieces of n.
func (ph *stressPhone) sendIn(n int, b []byte) {
	ph.wmu.Lock() // nothing of the reader's comes between
	defer ph.wmu.Unlock()
	ph.nc.SetWriteDeadline(time.Now().Add(patience))
	for len(b) > 0 {
		k := min(n, len(b))
		if _, err := ph.nc.Write(b[:k]); err != nil {
			return
		}
		b = b[k:]
	}
}

func (ph *stressPhone) leave(code int) {
	ph.code = code
	ph.bye(code)
}

// deafen stops the reader, until hear.
func (ph *stressPhone) deafen() (hear func()) {
	deaf := make(chan struct{})
	ph.mu.Lock()
	defer ph.mu.Unlock()
	ph.deaf = deaf
	return func() {
		ph.mu.Lock()
		defer ph.mu.Unlock()
		ph.deaf = nil
		close(deaf)
	}
}

// waitFor waits for what the reader finds, and reports whether it did.
func (ph *stressPhone) waitFor(cond func() bool) (ok bool) {
	ph.s.w.until("phone "+ph.name, func() bool {
		select {
		case <-ph.done:
			return true
		default:
		}
		ph.mu.Lock()
		defer ph.mu.Unlock()
		ok = cond()
		return ok
	})
	return ok
}

// heard waits for all that was asked for.
func (ph *stressPhone) heard() bool {
	return ph.waitFor(func() bool { return ph.got == ph.asked })
}

// daemon waits for what the daemon knows of the phone, and while it can be expected.
func (ph *stressPhone) daemon(cond func(stressPeer) bool) (p stressPeer, steady bool) {
	w := ph.s.w
	w.until("the daemon of "+ph.name, func() bool {
		var shaken int
		p, shaken = ph.s.peer(ph.name)
		steady = shaken == ph.shaken && shaken%2 == 0 && !w.tiny
		return cond(p) || !steady
	})
	return p, steady
}

// ---- the judgement ----

// judge compares a phone's end with its plan's.
func (ph *stressPhone) judge() {
	w, s, plan := ph.s.w, ph.s, ph.plan
	<-ph.done
	code, notice := plan.code, plan.notice
	if code == 0 {
		code = ph.code
	}
	if notice == 0 {
		notice = ph.code
	}
	ended := ph.stressConn.code == code && ph.text == plan.text
	if ph.stressConn.code == int(endTooManyPhones.code()) {
		w.crowded.Add(1)
	}
	_, shaken := s.peer(ph.name)
	if !ended && !w.excused(ph.stressConn.code, ph.text, shaken != ph.shaken || shaken%2 == 1) {
		w.fail("phone %s (%s): closed with %d %q, want %d %q", ph.name, plan.name, ph.stressConn.code, ph.text, code, plan.text)
		return
	}
	if ended && plan.name == "silent" {
		ph.daemon(func(stressPeer) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.silent[notice] == ph.before+1
		})
	}
	spoke := ph.sent > 0
	p, steady := ph.daemon(func(p stressPeer) bool {
		return notice < 0 && p.let != 0 || p.notice != 0 || !spoke || plan.prefix && p.got == 0
	})
	if p.got > ph.sent {
		w.fail("phone %s (%s): sent %d messages, its daemon got %d", ph.name, plan.name, ph.sent, p.got)
	}
	if ph.got > p.sent {
		w.fail("phone %s (%s): got %d messages, its daemon sent %d", ph.name, plan.name, ph.got, p.sent)
	}
	if !steady {
		return
	}
	if spoke && !plan.prefix && p.got != ph.sent {
		w.fail("phone %s (%s): sent %d messages, its daemon got %d", ph.name, plan.name, ph.sent, p.got)
	}
	if spoke && p.got > 0 && p.notice != max(notice, 0) {
		w.fail("phone %s (%s): notice %d, want %d", ph.name, plan.name, p.notice, max(notice, 0))
	}
	if notice < 0 && ph.got != ph.asked {
		w.fail("phone %s (%s): got %d messages in front of its close, want %d", ph.name, plan.name, ph.got, ph.asked)
	}
	w.proofs(plan.name).Add(1)
}
