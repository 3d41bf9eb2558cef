package main

import (
	"container/list"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"log/slog"
	"maps"
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
// Every decision is made under one server's lock and compares identity, never
// only the id: a late end of an old connection changes nothing for its
// successor. Under that lock bytes are queued, never written.

type registry struct {
	relay   *relay
	servers sync.Map // server-id → *server
	recent  recentClaims
	checks  atomic.Int64 // claims by the checks of other relays and by probes, among those in the gauges

	// Grace is how long a server-id stays its binary's after the connection ended. All
	// are equally long, so they end in the order in which they began.
	graceMu sync.Mutex // guards what follows
	graces  list.List  // of *server, the next to end in front
}

// gracesPerConnection bounds how many graces run at once, as a multiple of
// -max-connections, beyond which the oldest ends early: binaries that come and go
// under ever new server-ids would fill memory. All binaries may leave and come
// back under other ids several times within one grace before the oldest of them
// notices; a grace is half a KiB, so that all of them are half of what README
// counts for the connections.
const gracesPerConnection = 4

// server is a server-id that is held, or was until a moment ago.
type server struct {
	id    string
	probe bool // the relay's own check of its public name: counted nowhere

	mu         sync.Mutex          // guards what follows
	gone       bool                // no longer in the registry
	binary     *session            // nil during grace
	contenders []*session          // they wait for binary to fall silent or end, in order of arrival
	freed      int64               // relay clock of the last binary's end
	grace      *list.Element       // in registry.graces, nil while held
	graceEnd   int64               // relay clock; guarded by registry.graceMu
	phones     map[string]*session // by conn_id
	waiters    []*conn             // phones that joined in grace and whose held frames reached the limit
}

// ---- a binary's claim ----

// askAhead is how many contenders are challenged before it is their turn. A
// daemon whose path is lost so often within one challenge still waits for one,
// and not for one after the other; and a newcomer costs that many pings at most.
const askAhead = 8

// claim makes b the binary of id. While another one is registered b contends
// for the id: the holder is challenged, and so are the contenders before b, side
// by side. It is refused once the holder answers (answered), and takes its place
// when the holder stays silent for challengeTimeout (overdue) or ends (unregisterBinary).
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
		srv.challenge(w)
		srv.mu.Unlock()
		return
	}
}

// challenge asks the holder and the first contenders for a sign of life on
// behalf of those behind them, mu held. One that has not answered an earlier
// challenge is in the middle of one.
func (srv *server) challenge(w *writeBatch) {
	asked := srv.binary
	for _, behind := range srv.contenders[:min(len(srv.contenders), 1+askAhead)] {
		if asked.challengedAt == 0 {
			asked.challenge(w)
		}
		asked = behind
	}
}

// challenge asks b, which owes no answer to an earlier one, for a sign of life, server.mu
// held.
func (b *session) challenge(w *writeBatch) {
	// Not the batch's clock: what was read before this moment is no answer.
	b.challengedAt = b.relay.now()
	b.challenged.Store(true)
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

// answered is handler's: it ends b's challenge, because b was heard. If it holds the server-id,
// those that have challenged it are refused.
func (b *session) answered(w *writeBatch) {
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
		w.relay.refuseSession(w, c, srv.id, endAlreadyClaimed, endAlreadyClaimed.String())
	}
}

// overdue is handler's: it gives b's claim to the first contender once b has been silent for too
// long. That one may owe an answer just as long.
func (b *session) overdue(w *writeBatch) {
	g := &w.relay.registry
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

// serverFor finds or makes the server of an id.
func (g *registry) serverFor(id string, probe bool) *server {
	v, ok := g.servers.Load(id)
	if !ok {
		id = strings.Clone(id) // it is a part of its request's header, which would stay as long
		v, _ = g.servers.LoadOrStore(id, &server{id: id, probe: probe, phones: map[string]*session{}})
	}
	return v.(*server)
}

// install makes b the holder of srv, whose mu the caller holds, and has no longer
// afterwards. Phones that the previous binary knew are closed: the new
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
		g.moved(srv.id)
		g.count(srv, &r.metrics.connectedBinaries, 1)
	}
	srv.binary = b
	b.contendsSince = 0
	// Before anybody can end b: the line of its end comes behind this one.
	b.log("connected", "addr", b.addr)
	var closing []*session
	b.mu.Lock()
	for _, ph := range srv.inOrder() {
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
		g.remove(srv, ph)
		closing = append(closing, ph)
	}
	w.addLocked(&b.conn)
	b.mu.Unlock()
	srv.challenge(w)
	woken := srv.waiters
	srv.waiters = nil
	srv.mu.Unlock()

	if old != nil {
		old.startClose(w, endTakenOver)
	}
	for _, ph := range closing {
		ph.startClose(w, reason)
	}
	wake(woken...)
}

// unregisterBinary ends b's claim, if it is still b's: the first contender takes it, or
// grace begins. The relay's own probe has none. A contender leaves the line.
func (g *registry) unregisterBinary(w *writeBatch, b *session) {
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
	if srv.probe {
		g.forget(w, srv) // unlocks
		return
	}
	g.graceMu.Lock()
	srv.graceEnd = w.now + int64(g.relay.o.grace)
	srv.grace = g.graces.PushBack(srv)
	g.graceMu.Unlock()
	g.count(srv, &g.relay.metrics.binariesInGrace, 1)
	srv.mu.Unlock()
	g.expire(w, w.now)
}

// ---- grace ----

// stopGrace ends srv's grace, srv.mu held.
func (g *registry) stopGrace(srv *server) {
	g.graceMu.Lock()
	g.graces.Remove(srv.grace)
	g.graceMu.Unlock()
	srv.grace = nil
	g.count(srv, &g.relay.metrics.binariesInGrace, -1)
}

// expire ends the graces that are over at now, and the oldest where there are too
// many.
func (g *registry) expire(w *writeBatch, now int64) {
	most := gracesPerConnection * g.relay.o.maxConnections
	for {
		g.graceMu.Lock()
		oldest := g.graces.Front()
		if oldest == nil || oldest.Value.(*server).graceEnd > now && g.graces.Len() <= most {
			g.graceMu.Unlock()
			return
		}
		srv := g.graces.Remove(oldest).(*server)
		g.graceMu.Unlock()
		srv.mu.Lock()
		if srv.grace != oldest { // the claim was taken just now
			srv.mu.Unlock()
			continue
		}
		g.stopGrace(srv)
		g.forget(w, srv) // unlocks
	}
}

// inOrder is the phones in one order, so that a run can be done again, mu held.
func (srv *server) inOrder() []*session {
	return slices.SortedFunc(maps.Values(srv.phones), func(a, b *session) int { return strings.Compare(a.id, b.id) })
}

// forget takes a server-id that nobody holds out of the registry, and closes its
// phones. The caller holds srv.mu, and has it no longer afterwards.
func (g *registry) forget(w *writeBatch, srv *server) {
	srv.gone = true
	g.servers.CompareAndDelete(srv.id, srv)
	if !srv.probe {
		g.recent.note(srv.id, srv.freed)
	}
	closing := srv.inOrder()
	for _, ph := range closing {
		g.remove(srv, ph)
	}
	srv.mu.Unlock()
	for _, ph := range closing {
		ph.startClose(w, endGraceExpired)
	}
}

// ---- phones ----

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
	at, known, since := g.recent.last(id)
	g.moved(id)
	switch {
	case known:
		return endLastHeld, fmt.Sprintf("%s %v ago", endLastHeld, ago(at))
	case since > 0:
		return endNeverSeen, fmt.Sprintf("%s in the last %v", endNeverSeen, ago(since))
	}
	return endNeverSeen, fmt.Sprintf("%s since this relay started %v ago", endNeverSeen, ago(0))
}

// moved hints to the check of the public name that the binary of id may be at another
// relay, if it was here, and left for longer than a grace, since the last round.
func (g *registry) moved(id string) {
	at, known, _ := g.recent.last(id)
	if known && g.relay.now()-at < int64(g.relay.o.checkPace.every) {
		select {
		case g.relay.hints <- struct{}{}:
		default: // there are enough of them
		}
	}
}

// unregisterPhone takes a phone whose end is decided out of its server. Its binary gets
// the close notice, behind the phone's last frame, unless the phone was removed
// before: by the binary itself, by one that reclaimed, or at the end of grace.
func (g *registry) unregisterPhone(w *writeBatch, ph *session, code uint16) {
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

// remove takes ph out of srv, and gives back what its frames for a binary to come
// occupy, srv.mu held. The caller closes it without the lock.
func (g *registry) remove(srv *server, ph *session) {
	delete(srv.phones, ph.id)
	g.count(srv, &g.relay.metrics.connectedPhones, -1)
	ph.removed = true
	if ph.graceQueue != nil {
		ph.graceQueue.free(&ph.relay.buffers)
		ph.graceQueue = nil
	}
}

// count moves a gauge, unless srv is the relay's own probe. Claims of others' are
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

// ---- recent claims ----

// recentClaims remembers when server-ids were last held.
type recentClaims struct {
	mu        sync.Mutex // guards what follows
	at        map[string]int64
	forgotten int64 // the latest claim that had to go, 0 while all are there
}

// maxRecentClaims is far more than one relay serves, and 2 MiB at the most.
const maxRecentClaims = 8192

func (c *recentClaims) note(id string, at int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at == nil {
		c.at = map[string]int64{}
	}
	if _, known := c.at[id]; !known {
		// One as old as its claim would keep a page of memory whose rest has gone.
		id = strings.Clone(id)
		if len(c.at) >= maxRecentClaims {
			old, _ := stalest(c.at, func(at int64) int64 { return at })
			c.forgotten = max(c.forgotten, c.at[old])
			delete(c.at, old)
		}
	}
	c.at[id] = at
}

// last tells when id was last held, and since when none has been forgotten.
func (c *recentClaims) last(id string) (at int64, known bool, since int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at, known = c.at[id]
	return at, known, c.forgotten
}

// ---- what the ids tell ----

// A daemon keeps the conn_ids of its phones for as long as it lives, and what it sends
// to those whose relay has gone comes through the relay that it has. So the ids carry
// word from relay to relay, in any topology (docs/decisions/0002-what-the-ids-tell.md).

// connTag is what a conn_id says behind 128 random bits. Those are there because the
// daemon keeps sessions by conn_id: none may repeat, not even after a restart.
type connTag struct {
	relay  uint64 // identity.id of the relay that minted it
	minted uint32 // in seconds since 1970 by its clock
	age    uint32 // of that relay by then, in seconds
	after  uint64 // a relay whose ids it had known for checkPace.over by then, 0 if none
}

// connIDBytes are 54 characters, of the 64 that a daemon takes.
const connIDBytes = 16 + 24

var connIDEncoding = base64.RawURLEncoding.Strict()

func newConnID(t connTag) string {
	var b [connIDBytes]byte
	rand.Read(b[:16])
	binary.BigEndian.PutUint64(b[16:], t.relay)
	binary.BigEndian.PutUint32(b[24:], t.minted)
	binary.BigEndian.PutUint32(b[28:], t.age)
	binary.BigEndian.PutUint64(b[32:], t.after)
	return connIDEncoding.EncodeToString(b[:])
}

// parseConnTag reads a conn_id. Those of older relays have no tag.
func parseConnTag(id []byte) (t connTag, ok bool) {
	var b [connIDBytes]byte
	if len(id) != connIDEncoding.EncodedLen(len(b)) {
		return t, false
	}
	n, err := connIDEncoding.Decode(b[:], id) // which skips line breaks
	big := binary.BigEndian
	return connTag{big.Uint64(b[16:]), big.Uint32(b[24:]), big.Uint32(b[28:]), big.Uint64(b[32:])}, n == len(b) && err == nil
}

// evidence is how sure it is that another relay serves binaries of this one.
type evidence uint8

const (
	evidenceCertain   evidence = iota // by the order of what happened
	evidenceSuspected                 // by two clocks
	evidenceCount                     // there is none
)

func (e evidence) String() string { return [...]string{"certain", "suspected", "none"}[e] }

// others are the relays whose ids binaries have named here. Times are this relay's age.
type others struct {
	mu    sync.Mutex // guards what follows
	seen  map[uint64]*otherRelay
	found [evidenceCount]time.Duration // of the latest evidence, 0 if there is none
	told  time.Duration                // of the last line in the log, 0 if there is none
	doubt bool                         // an id has come out of the future, so this relay's clock or another is wrong
}

type otherRelay struct {
	since  time.Duration         // of the first id
	news   time.Duration         // of the first id that was younger than all before
	newest uint32                // from which age of it on an id is younger than all before
	next   [evidenceCount]uint32 // from which age of it on an id is new evidence
	first  uint32                // its age in the first suspicion
	server string                // whose binary raised that
	conn   string                // the connection that raised the last one
	times  int                   // connections that raised one
}

const (
	maxOthers      = 64         // relays in the life of a daemon
	clockTolerance = 3600       // seconds by which right clocks differ
	oldestDate     = 1704067200 // 2024: a clock that says less is wrong
	suspectedTimes = 3          // for one server-id
)

func (r *relay) age() time.Duration { return time.Since(r.started) }
func (r *relay) date() int64        { return time.Now().Add(r.o.checkPace.skew).Unix() }

func (r *relay) newConnID() string {
	t := connTag{relay: r.me, minted: uint32(r.date()), age: uint32(r.age() / time.Second)}
	r.others.mu.Lock()
	news := time.Duration(-1)
	for id, other := range r.others.seen {
		// A rolling update, in which daemons may go to and fro, is over sooner. Of
		// several relays the one that still mints ids is the one to tell of this one.
		if r.age()-other.since >= r.o.checkPace.over && other.news > news {
			t.after, news = id, other.news
		}
	}
	r.others.mu.Unlock()
	return newConnID(t)
}

// strange reads a conn_id that b has named and that is none of its phones'.
func (b *session) strange(id []byte) {
	r, o := b.relay, &b.relay.others
	t, ok := parseConnTag(id)
	if !ok || t.relay == r.me || b.probe {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	now := r.age()
	other := o.seen[t.relay]
	if other == nil {
		if len(o.seen) >= maxOthers {
			old, _ := stalest(o.seen, func(other *otherRelay) int64 { return int64(other.since) })
			delete(o.seen, old)
		}
		other = &otherRelay{since: now}
		o.seen[t.relay] = other
	}
	if t.age >= other.newest {
		other.newest, other.news = t.age+1, now
	}
	e := other.weigh(b, t)
	if e == evidenceCount || t.age < other.next[e] { // daemons name ids again and again, even of a relay that was stopped meanwhile
		return
	}
	other.next[e] = t.age + 1
	o.found[e] = now
	r.metrics.splitSeen[e].Add(1)
	if o.told > 0 && now-o.told < time.Hour { // a binary can make up what it likes
		return
	}
	o.told = now
	keptLog{r.log, &r.instance.idsWarning}.warn([...]slog.Level{slog.LevelError, slog.LevelWarn}[e], [...]string{
		"multi-instance deploy detected: this relay and another one serve binaries in turn",
		"multi-instance deploy suspected: by its clock another relay has served binaries while this one was up",
	}[e]+"; "+lostPhone+": run exactly one", "evidence", e, "other", fmt.Sprintf("%016x", t.relay), "instance", r.id.id,
		"server", b.server.id, "remedy", "stop the other one, or take it out of the proxy; if you know of none, run "+
			programName+" probe with the public URL from several networks and compare instances")
}

// weigh tells what an id is evidence of, others.mu held.
func (other *otherRelay) weigh(b *session, t connTag) evidence {
	r, minted, date := b.relay, int64(t.minted), b.relay.date()
	r.others.doubt = r.others.doubt || date >= oldestDate && minted > date+clockTolerance
	// The later of two dates, in case that the clock has been set since.
	started := max(r.id.started.Unix(), date-int64(r.age()/time.Second))
	switch {
	case t.after == r.me:
		return evidenceCertain
	case r.others.doubt, min(minted, started, date) < oldestDate, minted-started <= clockTolerance+min(int64(t.age), 24*3600):
		return evidenceCount
	}
	if other.times == 0 {
		other.first, other.server = t.age, b.server.id
	}
	if other.conn != b.id {
		other.conn = b.id
		other.times++
	}
	apart := max(t.age, other.first) - min(t.age, other.first)
	if other.server == b.server.id && other.times < suspectedTimes || apart < uint32(r.o.checkPace.over/time.Second) {
		return evidenceCount
	}
	return evidenceSuspected
}

// verdict is the surest evidence of the last day.
func (o *others) verdict(age time.Duration) evidence {
	o.mu.Lock()
	defer o.mu.Unlock()
	e := evidenceCertain
	for e < evidenceCount && (o.found[e] == 0 || age-o.found[e] > 24*time.Hour) {
		e++
	}
	return e
}
