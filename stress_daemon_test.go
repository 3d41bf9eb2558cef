package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"
)

// The daemons of the stress run. They do what phones ask of them, keep book of
// what they hear, and meanwhile live, nap, die and come back.

// stressServer is a server-id and all that its daemons have heard.
type stressServer struct {
	w  *stressWorld
	id string

	mu     sync.Mutex             // guards what follows
	shaken int                    // odd while no daemon is sure to be there; counts what changes that
	byConn map[string]*stressPeer // by conn_id
	byName map[string]*stressPeer
	silent map[int]int // notices of phones that never spoke, by close code
}

// stressPeer is what the daemons know of a phone.
type stressPeer struct {
	name   string
	life   *stressLife
	got    int // messages
	sent   int // messages
	notice int // close code, 0 for none yet
	let    int // close code that the daemon asked for, 0 for none
}

// stressLife is one connection of a daemon.
type stressLife struct {
	*stressConn
	s      *stressServer
	alive  int           // phones that spoke and have not ended
	left   int           // messages until enough
	enough chan struct{} // closed then
	nap    *stressNap
	bad    [dropReasonCount]int64 // envelopes to be dropped
}

func (s *stressServer) locked(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *stressServer) shake() { s.locked(func() { s.shaken++ }) }

func (s *stressServer) peer(name string) (p stressPeer, shaken int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.byName[name]; known != nil {
		p = *known
	}
	return p, s.shaken
}

// listen is a life's read loop.
func (l *stressLife) listen() {
	l.read(func(op byte, p []byte) {
		var e wireEnvelope
		if err := json.Unmarshal(p, &e); op != opText || err != nil {
			l.s.w.fail("daemon got opcode %d %.100q: %v", op, p, err)
			return
		}
		l.s.mu.Lock()
		var do, id string
		if e.CloseCode == nil {
			do = l.hear(e)
			id = e.ConnID
		} else {
			l.note(e.ConnID, *e.CloseCode, e.Frame)
		}
		nap := l.nap
		if l.left--; l.left == 0 {
			close(l.enough)
		}
		l.s.mu.Unlock()
		l.obey(id, do)
		if nap != nil {
			close(nap.begun)
			<-nap.over
		}
	})
}

// hear checks a phone's message and returns what it asks for, s.mu held.
func (l *stressLife) hear(e wireEnvelope) (do string) {
	s := l.s
	p := s.byConn[e.ConnID]
	if p == nil {
		var m stressMessage
		json.Unmarshal(e.Frame, &m)
		if home, _, _ := strings.Cut(m.From, "/"); home != s.id || s.byName[m.From] != nil {
			s.w.fail("%s got message %d of %q under a new conn_id", s.id, m.N, m.From)
			return ""
		}
		p = &stressPeer{name: m.From, life: l}
		s.byConn[e.ConnID], s.byName[m.From] = p, p
		if l.alive++; l.alive > s.w.o.maxPhones {
			s.w.fail("%s has %d phones, limit %d", s.id, l.alive, s.w.o.maxPhones)
		}
	}
	switch {
	case p.life != l:
		s.w.fail("a new daemon got a message of %s, which an old one knew", p.name)
	case p.notice != 0:
		s.w.fail("message of %s behind its close notice", p.name)
	}
	m, err := sameMessage(e.Frame, p.name, p.got)
	if err != nil {
		s.w.fail("%s: %v", s.id, err)
	}
	p.got++
	if p.let != 0 {
		return "" // on its way before the daemon closed it
	}
	return m.Do
}

// note checks a close notice, s.mu held.
func (l *stressLife) note(connID string, code int, frame []byte) {
	s := l.s
	p := s.byConn[connID]
	switch {
	case frame != nil:
		s.w.fail("notice with frame %.100q", frame)
	case p == nil:
		s.silent[code]++
	case p.life == l && p.notice == 0 && p.let != 0 && s.w.tiny:
		p.notice = code // a limit closed it before its daemon's word was there
	case p.life != l || p.notice != 0 || p.let != 0:
		s.w.fail("notice %d of %s: same life %v, notice before %d, closed by the daemon with %d", code, p.name, p.life == l, p.notice, p.let)
	default:
		p.notice = code
		l.alive--
	}
}

// obey does what a phone asked for: "echo N SIZE", then maybe "close CODE".
func (l *stressLife) obey(connID, do string) {
	var n, size, code int
	fmt.Sscanf(do, "echo %d %d close %d", &n, &size, &code)
	var to string
	first := 0
	l.s.locked(func() {
		if p := l.s.byConn[connID]; p != nil && do != "" {
			to, first = "to "+p.name, p.sent
			p.sent += n
			if p.let = code; code != 0 {
				l.alive--
			}
		}
	})
	var out []byte
	for i := range n {
		end := ""
		if i == n-1 && code != 0 && code%2 == 0 { // with the last frame, or behind it
			end = fmt.Sprintf(`"close_code":%d,`, code)
		}
		frame := stressText(to, first+i, "", size)
		out = append(out, clientFrame(0x80, opText, fmt.Appendf(nil, `{%s"frame":%s,"conn_id":%q}`, end, frame, connID))...)
	}
	if code != 0 && (n == 0 || code%2 != 0) {
		out = append(out, clientFrame(0x80, opText, fmt.Appendf(nil, `{"conn_id":%q,"frame":null,"close_code":%d}`, connID, code))...)
	}
	if len(out) > 0 {
		l.write(out)
	}
}

// babble sends envelopes that go nowhere.
func (l *stressLife) babble(rng *rand.Rand, stranger string) {
	for range 20 {
		bad := [...]struct {
			text   string
			reason dropReason
		}{
			{`[]`, dropNotEnvelope}, {`{"conn_id":"x"`, dropNotEnvelope}, {`{} {}`, dropNotEnvelope},
			{`{"frame":1}`, dropNoConnID}, {`{"conn_id":7,"frame":1}`, dropNoConnID},
			{`{"conn_id":"x"}`, dropNoFrame}, {`{"conn_id":"x","frame":null}`, dropNoFrame},
			{`{"conn_id":"x","close_code":1005}`, dropBadCloseCode}, {`{"conn_id":"x","close_code":"4401"}`, dropBadCloseCode},
			{`{"push_wake":{"token":"t"}}`, dropPushWake},
			{`{"conn_id":"` + stranger + `","frame":"not yours"}`, dropUnknownConn},
			{`{"conn_id":"` + stranger + `","frame":"not yours","close_code":4401}`, dropUnknownConn},
		}
		b := bad[rng.IntN(len(bad))]
		if !l.send(opText, []byte(b.text)) {
			return
		}
		l.bad[b.reason]++
	}
}

// ---- lives ----

// rise connects a daemon that takes the place of another, and returns it once it
// holds the claim; nil when the relay ends.
func (s *stressServer) rise(rng *rand.Rand, before *session) *stressLife {
	w := s.w
	for !w.ending.Load() {
		c, refused, err := w.connect("/v2/server", binaryHeaders(s.id))
		switch {
		case err != nil && !w.ending.Load():
			w.fail("daemon of %s: %v", s.id, err)
			return nil
		case refused != 0 && !w.mayRefuse(refused):
			w.fail("daemon of %s: upgrade refused with %d", s.id, refused)
			return nil
		case c == nil:
			time.Sleep(time.Millisecond) // full: again
			continue
		}
		l := &stressLife{stressConn: c, s: s}
		go l.listen()
		holds := false
		w.until("claim of "+s.id, func() bool {
			b := w.r.holder(s.id)
			holds = b != nil && b != before
			return holds || l.over() || w.ending.Load()
		})
		if holds {
			return l
		}
		l.bye(1000)
		<-l.done
		beaten := before != nil && l.code == 4409 // it was not frozen yet
		if !beaten && l.code != 1000 && !w.excused(l.code, l.text, false) {
			w.fail("daemon of %s: claim ended with %d %q", s.id, l.code, l.text)
		}
	}
	return nil
}

// run is one server's chain of daemons, until quit.
func (s *stressServer) run(rng *rand.Rand, quit chan struct{}) {
	w := s.w
	l := s.rise(rng, nil)
	s.shake()
	for l != nil {
		held := w.r.holder(s.id)
		select {
		case <-quit:
			l.bye(1000)
			l.buried(1000, "", true)
			return
		case <-l.done: // of a limit
			s.shake()
			l.buried(0, "", false)
			l = s.rise(rng, nil)
			s.shake()
			continue
		case <-l.after(20 + rng.IntN(200)):
		}
		switch what := rng.IntN(9); {
		case what == 0:
			l.babble(rng, s.stranger(rng))
		case what == 1 && !w.tiny:
			s.intrude()
		case what == 2: // deaf for a moment: its phones feel it, and lose nothing
			wake := l.sleep(quit)
			time.Sleep(time.Duration(50+rng.IntN(200)) * time.Millisecond)
			wake()
		case what == 3 && w.tiny: // frozen: the next one takes over
			s.shake()
			wake := l.sleep(quit)
			next := s.rise(rng, held)
			wake()
			l.buried(int(endTakenOver.code()), endTakenOver.String(), false)
			l = next
			s.shake()
		default:
			s.shake()
			l.die(rng.IntN(5))
			w.until("end of "+s.id, func() bool { return w.r.holder(s.id) != held || w.ending.Load() })
			var early *stressPhone
			switch again := rng.IntN(6); {
			case again == 0 && w.tiny: // nobody comes back in time
				w.until("end of the grace of "+s.id, func() bool { _, ok := w.r.registry.servers.Load(s.id); return !ok })
			case again < 4 && !w.tiny:
				early = s.joinInGrace(rng)
			}
			l = s.rise(rng, nil)
			s.shake()
			if early != nil {
				early.finish(stressChat)
			}
		}
	}
}

// die ends a life, one way or the other.
func (l *stressLife) die(how int) {
	switch how {
	case 0:
		l.bye(1001)
		l.buried(1001, "", true)
	case 1:
		l.reset()
		l.buried(1006, "", false)
	case 2:
		l.nc.(unhurriedConn).CloseWrite()
		l.buried(1006, "", true)
	case 3:
		l.write([]byte{0xf1, 0x80})
		l.buried(1002, endReservedBit.String(), true)
	case 4:
		l.send(opText, []byte("{\"conn_id\":\"\xff\"}"))
		l.buried(1007, endInvalidUTF8.String(), true)
	}
}

// buried waits for a life's end, which has to be this one, and does its accounts.
func (l *stressLife) buried(code int, text string, sure bool) {
	w := l.s.w
	<-l.done
	ended := l.code == code && l.text == text
	if !ended && !w.excused(l.code, l.text, false) {
		w.fail("daemon of %s: closed with %d %q, want %d %q", l.s.id, l.code, l.text, code, text)
	}
	for reason, n := range l.bad {
		w.badAll[reason].Add(n)
		if sure && ended {
			w.badSure[reason].Add(n)
		}
	}
}

func (l *stressLife) over() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// after returns what is closed once the daemon has heard n more messages.
func (l *stressLife) after(n int) (enough chan struct{}) {
	enough = make(chan struct{})
	l.s.locked(func() { l.left, l.enough = n, enough })
	return enough
}

// stressNap is a time in which a daemon does not read.
type stressNap struct{ begun, over chan struct{} }

// sleep makes the daemon stop reading after its next message, until wake.
func (l *stressLife) sleep(quit chan struct{}) (wake func()) {
	nap := &stressNap{make(chan struct{}), make(chan struct{})}
	l.s.locked(func() { l.nap = nap })
	select {
	case <-nap.begun:
	case <-l.done:
	case <-quit:
	}
	return func() {
		l.s.locked(func() { l.nap = nil })
		close(nap.over)
	}
}

// intrude claims what a live daemon holds.
func (s *stressServer) intrude() {
	w := s.w
	c, refused, err := w.connect("/v1/server", binaryHeaders(s.id))
	switch {
	case c != nil:
		c.read(func(op byte, p []byte) { w.fail("intruder of %s got opcode %d %.100q", s.id, op, p) })
		if (c.code != 4409 || c.text != endAlreadyClaimed.String()) && !w.excused(c.code, c.text, false) {
			w.fail("intruder of %s: closed with %d %q", s.id, c.code, c.text)
		}
	case err != nil && !w.ending.Load(), refused != 0 && !w.mayRefuse(refused):
		w.fail("intruder of %s: %d, %v", s.id, refused, err)
	}
}

// stranger is the conn_id of a phone of another server, if one is known.
func (s *stressServer) stranger(rng *rand.Rand) string {
	other := s.w.servers[rng.IntN(len(s.w.servers))]
	if other == s {
		return "nobody"
	}
	id := "nobody"
	other.locked(func() {
		for known := range other.byConn {
			id = known
			break
		}
	})
	return id
}

// joinInGrace connects a phone while no daemon is there, and sends for the next.
func (s *stressServer) joinInGrace(rng *rand.Rand) *stressPhone {
	ph := newStressPhone(s, rng)
	if !ph.join() {
		return nil
	}
	for range 5 {
		ph.say("")
	}
	return ph
}
