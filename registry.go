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
	servers sync.Map // server-id → *entry
	graces  graces
	recent  recentClaims
	checks  atomic.Int64 // claims by the checks of other relays and by probes, among those in the gauges
}

// entry is a server-id that is held, or was until a moment ago.
type server struct {
	id    string
	probe bool // the relay's own check of its public name: counted nowhere

	mu         sync.Mutex          // guards what follows
	gone       bool                // no longer in the registry
	binary     *session            // nil during grace
	contenders []*session          // they wait for binary to fall silent or end, in order of arrival
	freed      int64               // relay clock of the last binary's end
	grace      *list.Element       // in registry.graces, nil while held
	phones     map[string]*session // by conn_id
	waiters    []*conn             // phones that joined in grace and whose held frames reached the limit
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
func (g *registry) claim(w *writeBatch, b *session, id string) {
	for {
		srv := g.serverFor(id, b.probe)
		srv.mu.Lock()
		if srv.gone {
			srv.mu.Unlock()
			continue
		}
		b.server = srv
		if srv.binary == nil {
			g.install(w, srv, b) // unlocks
			return
		}
		b.contendsSince = w.now
		srv.contenders = append(srv.contenders, b)
		srv.binary.challenge(w)
		srv.challenge(w)
		srv.mu.Unlock()
		return
	}
}

// challenge asks the holder and the first contenders for a sign of life on
// behalf of those behind them, mu held. One that has not answered an earlier
// challenge is in the middle of one.
func (srv *server) challenge(w *writeBatch) {
	n := len(srv.contenders)
	if n == 0 {
		return
	}
	if srv.binary.challengedAt == 0 {
		srv.binary.challenge(w)
	}
	for _, c := range srv.contenders[:min(n-1, askAhead)] {
		if c.challengedAt == 0 {
			c.challenge(w)
		}
	}
}

// challenge asks b for a sign of life, server.mu held.
func (b *session) challenge(w *writeBatch) {
	if b.challengedAt == 0 {
		// Not the batch's clock: what was read before this moment is no answer.
		b.challengedAt = b.relay.now()
		b.challenged.Store(true)
	}
	b.mu.Lock()
	b.ping(w)
	b.mu.Unlock()
}

// contends reports whether b waits for its server-id.
func (b *session) contends() bool {
	b.server.mu.Lock()
	defer b.server.mu.Unlock()
	return b.contendsSince != 0
}

// answered ends b's challenge, because b was heard: if it holds the server-id,
// whoever has challenged it is refused.
func (g *registry) answered(w *writeBatch, b *session) {
	srv := b.server
	srv.mu.Lock()
	at := b.challengedAt
	b.challengedAt = 0
	b.challenged.Store(false)
	if srv.binary != b {
		srv.mu.Unlock()
		return
	}
	n := 0
	// What the poller had come for before a challenge is no answer to it: there
	// b is asked once more.
	for at <= w.now && n < len(srv.contenders) && srv.contenders[n].contendsSince <= w.now {
		n++
	}
	refused := srv.contenders[:n]
	srv.contenders = slices.Clone(srv.contenders[n:])
	srv.challenge(w)
	srv.mu.Unlock()
	for _, c := range refused {
		g.relay.refuseSession(w, c, srv.id, endAlreadyClaimed, endAlreadyClaimed.String())
	}
}

// overdue gives b's claim to the first contender once b has been silent for too
// long. That one may owe an answer just as long.
func (g *registry) overdue(w *writeBatch, b *session) {
	srv := b.server
	srv.mu.Lock()
	for srv.binary == b && len(srv.contenders) > 0 {
		next := srv.contenders[0]
		at := b.challengedAt
		if at == 0 || w.now-max(at, next.contendsSince) < int64(g.relay.o.challengeTimeout) {
			break
		}
		srv.contenders = slices.Delete(srv.contenders, 0, 1)
		g.install(w, srv, next) // unlocks
		b = next
		srv.mu.Lock()
	}
	srv.mu.Unlock()
}

// entry finds or makes the entry of a server-id.
func (g *registry) serverFor(id string, probe bool) *server {
	if e, ok := g.servers.Load(id); ok {
		return e.(*server)
	}
	id = strings.Clone(id) // it is a part of its request's header, which would stay as long
	e, _ := g.servers.LoadOrStore(id, &server{id: id, probe: probe, phones: map[string]*session{}})
	return e.(*server)
}

// install makes b the holder of e, whose lock the caller holds; it returns
// without the lock. Phones that the previous binary knew are closed: the new
// one has no session for them. Those that joined in grace stay, and what they
// sent meanwhile goes out first.
func (g *registry) install(w *writeBatch, srv *server, b *session) {
	r := g.relay
	old := srv.binary
	reason := endReclaimed
	switch {
	case old != nil:
		reason = endReplaced
	case srv.grace != nil:
		g.stopGrace(srv)
		fallthrough
	default:
		g.count(srv, &r.metrics.connectedBinaries, 1)
	}
	srv.binary = b
	b.contendsSince = 0
	// Before anybody can end b: the line of its end comes behind this one.
	b.logConnected()
	var closing []*session
	b.mu.Lock()
	for id, ph := range srv.phones {
		if old == nil && ph.graceQueue != nil {
			b.queued += uint64(ph.graceQueue.n)
			b.txFrames += ph.graceQueue.frames
			b.txBytes += ph.graceQueue.bytes
			r.metrics.framesUp.Add(int64(ph.graceQueue.frames))
			r.metrics.bytesUp.Add(int64(ph.graceQueue.payload))
			ph.graceQueue.moveTo(&b.out)
			ph.graceQueue = nil
			continue
		}
		delete(srv.phones, id)
		ph.letGo()
		closing = append(closing, ph)
	}
	w.addLocked(&b.conn)
	b.mu.Unlock()
	g.count(srv, &r.metrics.connectedPhones, -int64(len(closing)))
	srv.challenge(w)
	woken := srv.waiters
	srv.waiters = nil
	srv.mu.Unlock()

	if old != nil {
		old.end(w, endTakenOver)
	}
	for _, ph := range closing {
		ph.end(w, reason)
	}
	wake(woken)
}

// release ends b's claim, if it is still b's: the first contender takes it, or
// grace begins. The relay's own probe has none. A contender leaves the line.
func (g *registry) release(w *writeBatch, b *session) {
	srv := b.server
	srv.mu.Lock()
	if srv.binary != b {
		if i := slices.Index(srv.contenders, b); i >= 0 {
			srv.contenders = slices.Delete(srv.contenders, i, i+1)
		}
		srv.mu.Unlock()
		return
	}
	srv.binary = nil
	g.count(srv, &g.relay.metrics.connectedBinaries, -1)
	if len(srv.contenders) > 0 {
		next := srv.contenders[0]
		srv.contenders = slices.Delete(srv.contenders, 0, 1)
		g.install(w, srv, next) // unlocks
		return
	}
	srv.freed = w.now
	g.count(srv, &g.relay.metrics.binariesInGrace, 1)
	begun := g.graces.begin(srv)
	srv.grace = begun
	srv.mu.Unlock()
	if srv.probe {
		g.expire(begun)
	}
}

// stopGrace ends e's grace before its time, e.mu held.
func (g *registry) stopGrace(srv *server) {
	g.graces.cancel(srv.grace)
	srv.grace = nil
	g.count(srv, &g.relay.metrics.binariesInGrace, -1)
}

// expire ends a grace whose time is over, unless the claim was taken again.
func (g *registry) expire(over *list.Element) {
	srv := over.Value.(*grace).e
	srv.mu.Lock()
	if srv.grace != over {
		srv.mu.Unlock()
		return
	}
	g.stopGrace(srv)
	srv.gone = true
	g.servers.CompareAndDelete(srv.id, srv)
	if !srv.probe {
		g.recent.note(srv.id, srv.freed)
	}
	g.count(srv, &g.relay.metrics.connectedPhones, -int64(len(srv.phones)))
	closing := srv.phones
	srv.phones = nil
	for _, ph := range closing {
		ph.letGo()
	}
	srv.mu.Unlock()
	w := g.relay.newBatch()
	for _, ph := range closing {
		ph.end(w, endGraceExpired)
	}
	w.flush()
}

// join makes ph one of the phones of id. Where it is refused, text says more
// than the reason does.
func (g *registry) join(ph *session, id string) (refused closeReason, text string) {
	for {
		v, ok := g.servers.Load(id)
		if !ok {
			return g.absent(id)
		}
		srv := v.(*server)
		srv.mu.Lock()
		switch {
		case srv.gone:
			srv.mu.Unlock()
			continue
		case len(srv.phones) >= g.relay.o.maxPhones:
			srv.mu.Unlock()
			return endTooManyPhones, endTooManyPhones.String()
		}
		ph.server = srv
		if srv.binary == nil {
			ph.graceQueue = new(graceQueue)
		}
		srv.phones[ph.id] = ph
		g.count(srv, &g.relay.metrics.connectedPhones, 1)
		srv.mu.Unlock()
		return endNone, ""
	}
}

// absent tells which kind of 4404 this is: on it hangs whether an operator looks
// for a wrong server-id, a relay that has just restarted or a second relay.
func (g *registry) absent(id string) (closeReason, string) {
	now := g.relay.now()
	ago := func(since int64) time.Duration { return time.Duration(now - since).Round(time.Second) }
	at, known, horizon := g.recent.last(id)
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
func (g *registry) leave(w *writeBatch, ph *session, code uint16) {
	srv := ph.server
	srv.mu.Lock()
	if srv.phones[ph.id] != ph {
		srv.mu.Unlock()
		return
	}
	g.remove(srv, ph)
	b := srv.binary
	if b == nil {
		srv.mu.Unlock()
		return
	}
	b.mu.Lock()
	srv.mu.Unlock()
	b.notice(w, ph.id, code)
	b.mu.Unlock()
}

// remove takes ph out of e, e.mu held.
func (g *registry) remove(srv *server, ph *session) {
	delete(srv.phones, ph.id)
	g.count(srv, &g.relay.metrics.connectedPhones, -1)
	ph.letGo()
}

// letGo ends ph's membership and gives back what its frames for a binary to come
// occupy, server.mu held.
func (ph *session) letGo() {
	ph.removed = true
	if ph.graceQueue != nil {
		ph.graceQueue.drop(&ph.relay.buffers)
		ph.graceQueue = nil
	}
}

// count moves a gauge, unless e is the relay's own probe. Claims of others' are
// told apart by their names, which are no secret: they get nothing by it.
func (g *registry) count(srv *server, gauge *atomic.Int64, by int64) {
	if srv.probe {
		return
	}
	gauge.Add(by)
	if gauge != &g.relay.metrics.connectedPhones && strings.HasPrefix(srv.id, probePrefix) {
		g.checks.Add(by)
	}
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

// members lists the live connections of one leg.
func (g *registry) members(role role) (all []*conn) {
	g.each(func(srv *server) {
		if role == roleBinary && srv.binary != nil {
			for _, b := range srv.contenders { // first, or one of them would take the claim
				all = append(all, &b.conn)
			}
			all = append(all, &srv.binary.conn)
		}
		if role == rolePhone {
			for _, ph := range srv.phones {
				all = append(all, &ph.conn)
			}
		}
	})
	return all
}

// clear forgets every claim. For the end of a drain, when no connection is left.
func (g *registry) clear() {
	g.each(func(srv *server) {
		if srv.grace != nil {
			g.stopGrace(srv)
		}
		srv.gone = true
		g.servers.CompareAndDelete(srv.id, srv)
	})
	g.graces.stop()
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

// history remembers when server-ids were last held, the newest ones.
type recentClaims struct {
	mu      sync.Mutex // guards what follows
	at      map[string]int64
	order   []string // a ring, oldest at next once it is full
	next    int
	horizon int64 // what ended after this is remembered; 0: everything
}

// historySize is how many ended claims are remembered: far more than one relay
// serves, and 2 MiB at the most.
const historySize = 8192

func (h *recentClaims) note(id string, at int64) {
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
func (h *recentClaims) last(id string) (at int64, known bool, horizon int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	at, known = h.at[id]
	return at, known, h.horizon
}
