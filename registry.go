package main

import (
	"container/list"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The registry: which binary holds which server-id, and which phones it has.
// It lives in this process's memory and nowhere else, which is why there must
// be one instance only (docs/architecture.md, Single-instance constraint).
//
// Every decision is made under one entry's lock and compares identity, never
// only the id: a late end of an old connection changes nothing for its
// successor. Under that lock bytes are queued, never written.

type registry struct {
	relay   *relay
	entries sync.Map // server-id → *entry
	graces  graces
	past    history
	checks  atomic.Int64 // claims by the checks of other relays and by probes, among those in the gauges
}

// entry is a server-id that is held, or was until a moment ago.
type entry struct {
	id    string
	probe bool // the relay's own check of its public name: counted nowhere

	mu         sync.Mutex           // guards what follows
	gone       bool                 // no longer in the registry
	binary     *binaryLeg           // nil during grace
	contenders []*binaryLeg         // they wait for binary to fall silent or end, in order of arrival
	freed      int64                // relay clock of the last binary's end
	grace      *list.Element        // in registry.graces, nil while held
	phones     map[string]*phoneLeg // by conn_id
	waiters    []*conn              // phones that joined in grace and whose held frames reached the limit
}

// askAhead is how many contenders are challenged before it is their turn. A
// daemon whose path is lost so often within one challenge still waits for one,
// and not for one after the other; and a newcomer costs that many pings at most.
const askAhead = 8

// claim makes b the binary of id. While another one is registered b contends
// for the id: the holder is challenged, and so are the contenders before b, side
// by side. It is refused once the holder answers (answered), and takes its place
// when the holder stays silent for challengeTimeout (overdue) or ends (release).
//
// A contender is a connection like any other: its own end takes it out of the
// line. Nothing that it sends has to be kept, since all phones that it could
// name are the holder's, and go with that.
func (g *registry) claim(b *binaryLeg, id string, probe bool) {
	for {
		e := g.entry(id, probe)
		e.mu.Lock()
		if e.gone {
			e.mu.Unlock()
			continue
		}
		t := g.relay.batch()
		b.server = e
		if e.binary == nil {
			g.install(t, e, b) // unlocks
		} else {
			b.waits.Store(t.now)
			e.contenders = append(e.contenders, b)
			e.binary.ask(t)
			e.challenge(t)
			e.mu.Unlock()
		}
		t.flush()
		return
	}
}

// challenge asks the holder and the first contenders for a sign of life on
// behalf of those behind them, e.mu held. Who has not answered an earlier
// challenge is in the middle of one.
func (e *entry) challenge(t *batch) {
	n := len(e.contenders)
	if n == 0 {
		return
	}
	if e.binary.asked.Load() == 0 {
		e.binary.ask(t)
	}
	for _, c := range e.contenders[:min(n-1, askAhead)] {
		if c.asked.Load() == 0 {
			c.ask(t)
		}
	}
}

// ask challenges b, server.mu held.
func (b *binaryLeg) ask(t *batch) {
	// Not the batch's clock: what was read before this moment is no answer.
	b.asked.CompareAndSwap(0, b.relay.now())
	b.mu.Lock()
	b.ping(t)
	b.mu.Unlock()
}

// answered ends b's challenge, because b was heard: if it holds the server-id,
// whoever has challenged it is refused.
func (g *registry) answered(t *batch, b *binaryLeg) {
	e := b.server
	e.mu.Lock()
	at := b.asked.Swap(0)
	if e.binary != b {
		e.mu.Unlock()
		return
	}
	n := 0
	// What the poller had come for before a challenge is no answer to it: there
	// b is asked once more.
	for at <= t.now && n < len(e.contenders) && e.contenders[n].waits.Load() <= t.now {
		n++
	}
	refused := e.contenders[:n]
	e.contenders = slices.Clone(e.contenders[n:])
	e.challenge(t)
	e.mu.Unlock()
	for _, c := range refused {
		g.relay.refuseSession(t, &c.conn, legBinary, c.id, e.id, endAlreadyClaimed, endAlreadyClaimed.String())
	}
}

// overdue gives b's claim to the first contender once b has been silent for too
// long. That one may owe an answer just as long.
func (g *registry) overdue(t *batch, b *binaryLeg) {
	e := b.server
	e.mu.Lock()
	for e.binary == b && len(e.contenders) > 0 {
		next := e.contenders[0]
		at := b.asked.Load()
		if at == 0 || t.now-max(at, next.waits.Load()) < int64(g.relay.o.challengeTimeout) {
			break
		}
		e.contenders = slices.Delete(e.contenders, 0, 1)
		g.install(t, e, next) // unlocks
		b = next
		e.mu.Lock()
	}
	e.mu.Unlock()
}

// entry finds or makes the entry of a server-id.
func (g *registry) entry(id string, probe bool) *entry {
	if e, ok := g.entries.Load(id); ok {
		return e.(*entry)
	}
	id = strings.Clone(id) // it is a part of its request's header, which would stay as long
	e, _ := g.entries.LoadOrStore(id, &entry{id: id, probe: probe, phones: map[string]*phoneLeg{}})
	return e.(*entry)
}

// install makes b the holder of e, whose lock the caller holds; it returns
// without the lock. Phones that the previous binary knew are closed: the new
// one has no session for them. Those that joined in grace stay, and what they
// sent meanwhile goes out first.
func (g *registry) install(t *batch, e *entry, b *binaryLeg) {
	r := g.relay
	old := e.binary
	reason := endReclaimed
	switch {
	case old != nil:
		reason = endReplaced
	case e.grace != nil:
		g.stopGrace(e)
		fallthrough
	default:
		g.count(e, &r.metrics.connectedBinaries, 1)
	}
	e.binary = b
	b.waits.Store(0)
	// Before anybody can end b: the line of its end comes behind this one.
	r.logConnected(&b.conn, legBinary, b.id, e.id, b.probe)
	var closing []*phoneLeg
	b.mu.Lock()
	for id, ph := range e.phones {
		if old == nil && ph.held != nil {
			b.queued += uint64(ph.held.n)
			b.txFrames += ph.held.frames
			b.txBytes += ph.held.bytes
			r.metrics.framesUp.Add(int64(ph.held.frames))
			r.metrics.bytesUp.Add(int64(ph.held.payload))
			ph.held.moveTo(&b.out)
			ph.held = nil
			continue
		}
		delete(e.phones, id)
		ph.letGo()
		closing = append(closing, ph)
	}
	t.addLocked(&b.conn)
	b.mu.Unlock()
	g.count(e, &r.metrics.connectedPhones, -int64(len(closing)))
	e.challenge(t)
	woken := e.waiters
	e.waiters = nil
	e.mu.Unlock()

	if old != nil {
		old.end(t, endTakenOver)
	}
	for _, ph := range closing {
		ph.end(t, reason)
	}
	wake(woken)
}

// release ends b's claim, if it is still b's: the first contender takes it, or
// grace begins. The relay's own probe has none. A contender leaves the line.
func (g *registry) release(t *batch, b *binaryLeg) {
	e := b.server
	if e == nil { // it ended before its claim
		return
	}
	e.mu.Lock()
	if e.binary != b {
		if i := slices.Index(e.contenders, b); i >= 0 {
			e.contenders = slices.Delete(e.contenders, i, i+1)
		}
		e.mu.Unlock()
		return
	}
	e.binary = nil
	g.count(e, &g.relay.metrics.connectedBinaries, -1)
	if len(e.contenders) > 0 {
		next := e.contenders[0]
		e.contenders = slices.Delete(e.contenders, 0, 1)
		g.install(t, e, next) // unlocks
		return
	}
	e.freed = t.now
	g.count(e, &g.relay.metrics.binariesInGrace, 1)
	begun := g.graces.begin(e)
	e.grace = begun
	e.mu.Unlock()
	if e.probe {
		g.expire(begun)
	}
}

// stopGrace ends e's grace before its time, e.mu held.
func (g *registry) stopGrace(e *entry) {
	g.graces.cancel(e.grace)
	e.grace = nil
	g.count(e, &g.relay.metrics.binariesInGrace, -1)
}

// expire ends a grace whose time is over, unless the claim was taken again.
func (g *registry) expire(over *list.Element) {
	e := over.Value.(*grace).e
	e.mu.Lock()
	if e.grace != over {
		e.mu.Unlock()
		return
	}
	g.stopGrace(e)
	e.gone = true
	g.entries.CompareAndDelete(e.id, e)
	if !e.probe {
		g.past.note(e.id, e.freed)
	}
	g.count(e, &g.relay.metrics.connectedPhones, -int64(len(e.phones)))
	closing := e.phones
	e.phones = nil
	for _, ph := range closing {
		ph.letGo()
	}
	e.mu.Unlock()
	t := g.relay.batch()
	for _, ph := range closing {
		ph.end(t, endGraceExpired)
	}
	t.flush()
}

// join makes ph one of the phones of id. Where it is refused, text says more
// than the reason does.
func (g *registry) join(ph *phoneLeg, id string) (refused closeReason, text string) {
	for {
		v, ok := g.entries.Load(id)
		if !ok {
			return g.absent(id)
		}
		e := v.(*entry)
		e.mu.Lock()
		switch {
		case e.gone:
			e.mu.Unlock()
			continue
		case len(e.phones) >= g.relay.o.maxPhones:
			e.mu.Unlock()
			return endTooManyPhones, endTooManyPhones.String()
		}
		ph.server = e
		if e.binary == nil {
			ph.held = new(hold)
		}
		e.phones[ph.id] = ph
		g.count(e, &g.relay.metrics.connectedPhones, 1)
		e.mu.Unlock()
		return endNone, ""
	}
}

// absent tells which kind of 4404 this is: on it hangs whether an operator looks
// for a wrong server-id, a relay that has just restarted or a second relay.
func (g *registry) absent(id string) (closeReason, string) {
	now := g.relay.now()
	ago := func(since int64) time.Duration { return time.Duration(now - since).Round(time.Second) }
	at, known, horizon := g.past.last(id)
	switch {
	case known:
		return endLastHeld, fmt.Sprintf("%s %v ago", endLastHeld, ago(at))
	case horizon > 0:
		return endNeverSeen, fmt.Sprintf("%s in the last %v", endNeverSeen, ago(horizon))
	}
	return endNeverSeen, fmt.Sprintf("%s since this relay started %v ago", endNeverSeen, ago(0))
}

// leave takes a phone whose end is decided out of its entry. Its binary gets
// the close notice, behind the phone's last frame, unless the phone was removed
// before: by the binary itself, by one that reclaimed, or at the end of grace.
func (g *registry) leave(t *batch, ph *phoneLeg, code uint16) {
	e := ph.server
	if e == nil { // refused
		return
	}
	e.mu.Lock()
	if e.phones[ph.id] != ph {
		e.mu.Unlock()
		return
	}
	g.remove(e, ph)
	b := e.binary
	if b == nil {
		e.mu.Unlock()
		return
	}
	b.mu.Lock()
	e.mu.Unlock()
	b.notice(t, ph.id, code)
	b.mu.Unlock()
}

// remove takes ph out of e, e.mu held.
func (g *registry) remove(e *entry, ph *phoneLeg) {
	delete(e.phones, ph.id)
	g.count(e, &g.relay.metrics.connectedPhones, -1)
	ph.letGo()
}

// letGo ends ph's membership and gives back what its frames for a binary to come
// occupy, server.mu held.
func (ph *phoneLeg) letGo() {
	ph.removed = true
	if ph.held != nil {
		ph.held.drop(&ph.relay.memory)
		ph.held = nil
	}
}

// count moves a gauge, unless e is the relay's own probe. Claims of others' are
// told apart by their names, which are no secret: they get nothing by it.
func (g *registry) count(e *entry, gauge *atomic.Int64, by int64) {
	if e.probe {
		return
	}
	gauge.Add(by)
	if gauge != &g.relay.metrics.connectedPhones && strings.HasPrefix(e.id, probePrefix) {
		g.checks.Add(by)
	}
}

// each calls do for every entry, its lock held.
func (g *registry) each(do func(*entry)) {
	g.entries.Range(func(_, v any) bool {
		e := v.(*entry)
		e.mu.Lock()
		defer e.mu.Unlock()
		if !e.gone {
			do(e)
		}
		return true
	})
}

// members lists the live connections of one leg.
func (g *registry) members(l leg) (all []*conn) {
	g.each(func(e *entry) {
		if l == legBinary && e.binary != nil {
			for _, b := range e.contenders { // first, or one of them would take the claim
				all = append(all, &b.conn)
			}
			all = append(all, &e.binary.conn)
		}
		if l == legPhone {
			for _, ph := range e.phones {
				all = append(all, &ph.conn)
			}
		}
	})
	return all
}

// clear forgets every claim. For the end of a drain, when no connection is left.
func (g *registry) clear() {
	g.each(func(e *entry) {
		if e.grace != nil {
			g.stopGrace(e)
		}
		e.gone = true
		g.entries.CompareAndDelete(e.id, e)
	})
	g.graces.stop()
}

// check recounts the registry against the gauges and names the first invariant
// that does not hold. It is exact only while no connection comes or goes.
func (g *registry) check() error {
	m := g.relay.metrics
	var err error
	var binaries, grace, phones int64
	fail := func(e *entry, format string, args ...any) {
		if err == nil {
			err = fmt.Errorf("entry %s: %s", e.id, fmt.Sprintf(format, args...))
		}
	}
	g.each(func(e *entry) {
		if e.binary != nil && e.grace != nil {
			fail(e, "held and in grace at once")
		}
		if e.binary == nil && e.grace == nil {
			fail(e, "neither held nor in grace")
		}
		if e.binary != nil && e.binary.server != e {
			fail(e, "its binary belongs to another entry")
		}
		if e.binary == nil && len(e.contenders) > 0 {
			fail(e, "%d contend for what nobody holds", len(e.contenders))
		}
		for _, c := range e.contenders {
			if c.server != e || c.waits.Load() == 0 || c == e.binary {
				fail(e, "contender %s belongs to another entry or holds this one", c.id)
			}
			if c.is(connClosed) {
				fail(e, "contender %s is closed and still in the line", c.id)
			}
		}
		if len(e.phones) > g.relay.o.maxPhones {
			fail(e, "%d phones, limit %d", len(e.phones), g.relay.o.maxPhones)
		}
		for id, ph := range e.phones {
			if ph.id != id || ph.server != e {
				fail(e, "phone %s stands under %s or belongs to another entry", ph.id, id)
			}
			if e.binary != nil && ph.held != nil {
				fail(e, "phone %s holds frames back from a binary that is there", id)
			}
			if ph.is(connClosed) {
				fail(e, "phone %s is closed and still a member", id)
			}
		}
		if e.probe {
			return
		}
		phones += int64(len(e.phones))
		if e.binary != nil {
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

// history remembers when server-ids were last held, the newest ones.
type history struct {
	mu      sync.Mutex // guards what follows
	at      map[string]int64
	order   []string // a ring, oldest at next once it is full
	next    int
	horizon int64 // what ended after this is remembered; 0: everything
}

// historySize is how many ended claims are remembered: far more than one relay
// serves, and 2 MiB at the most.
const historySize = 8192

func (h *history) note(id string, at int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.at == nil {
		h.at = map[string]int64{}
	}
	if _, ok := h.at[id]; !ok {
		// One as old as its claim would keep a page of memory whose rest has gone.
		id = strings.Clone(id)
		if len(h.order) < historySize {
			h.order = append(h.order, id)
		} else {
			old := h.order[h.next]
			h.horizon = max(h.horizon, h.at[old])
			delete(h.at, old)
			h.order[h.next] = id
			h.next = (h.next + 1) % historySize
		}
	}
	h.at[id] = at
}

// last tells when id was last held, and from when on claims are remembered.
func (h *history) last(id string) (at int64, known bool, horizon int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	at, known = h.at[id]
	return at, known, h.horizon
}
