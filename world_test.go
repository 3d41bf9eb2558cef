package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A simulated world on the clock of synctest: boxes on which relays start, crash and
// are frozen, the addresses of their one name, proxies and balancers before them,
// daemons and phones. Relays, their registries and their checks are the real ones, from
// the request to the close frame; what is simulated lies between the sockets. All is
// drawn from one seed, so that a world can be played again.

// ---- the world ----

type world struct {
	t     testing.TB
	seed  uint64
	rand  *rand.Rand
	began time.Time
	plan  plan
	salt  uint64 // of the hashes of balancers
	boxes []*box
	name  []*front // what is at each address of the name
	users []*user

	// turn guards all that follows, and everything of boxes, processes, fronts and
	// users: who acts holds it, and never sleeps meanwhile.
	turn  sync.Mutex
	ended bool
	ever  []*process
	wrong []turnedAway
	links int // ever opened

	probes map[string]string // a hash for each server-id of a check
	minted map[string]mint   // by conn_id
	sides  int               // how often a daemon with sessions has come to another relay than it was at, since the split

	stopping sync.WaitGroup // processes that drain

	mu      sync.Mutex // a leaf: guards what follows
	trace   []string
	noticed []notice
	fault   string // the first invariant that did not hold
}

// turnedAway is a phone that was told 4404 while its daemon was online elsewhere.
type turnedAway struct {
	at time.Duration
	by *process
}

// mint is where and when a conn_id began.
type mint struct {
	at time.Duration
	by *process
}

func (w *world) at() time.Duration { return time.Since(w.began) }

// after has f act later.
func (w *world) after(d time.Duration, f func()) {
	time.AfterFunc(d, func() {
		w.turn.Lock()
		defer w.turn.Unlock()
		if !w.ended {
			f()
		}
	})
}

// say adds a line to the trace.
func (w *world) say(who, format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trace = append(w.trace, fmt.Sprintf("%14v  %-9s  %s", w.at().Round(time.Millisecond), who, fmt.Sprintf(format, args...)))
}

// broken notes that an invariant does not hold.
func (w *world) broken(format string, args ...any) {
	w.say("BROKEN", format, args...)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fault == "" {
		w.fault = fmt.Sprintf(format, args...)
	}
}

// upTo and between draw a time.
func upTo(r *rand.Rand, d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d) + 1)) }

func between(r *rand.Rand, low, high time.Duration) time.Duration { return low + upTo(r, high-low) }

// ---- boxes, and the relays on them ----

// box is where a relay runs.
type box struct {
	w       *world
	n       int
	addr    netip.Addr
	skew    time.Duration // how wrong its date is, beside presentDay
	rate    float64       // of its clock: 1 is right
	again   time.Duration // a supervisor starts what ended by itself again after that, 0: nobody does
	starts  int
	listens *process // nil: connections are refused
	links   map[*link]struct{}
	asked   time.Duration // by a health check, last
	ready   bool          // what it answered
}

// process is one relay, from its start to its end.
type process struct {
	w       *world
	b       *box
	label   string
	r       *relay
	check   *publicCheck
	began   time.Duration
	ends    chan struct{}
	gone    bool
	frozen  chan struct{}              // closed when it goes on; nil while it runs
	waiting []func()                   // what the kernel keeps for it meanwhile
	left    error                      // why it gave way
	knew    map[*process]time.Duration // since when a daemon has named ids of another one
	open    bool                       // it lets users in
	held    time.Duration              // since when it has users, -1 while it has none
	empty   time.Duration              // since when it has none
	chance  float64                    // of a balancer at random to hide the others that let users in, for as long as it has
}

// worldOptions are those of every relay. Heartbeats are rare, which makes the dead stay
// for longer, and the living cost less.
func worldOptions() options {
	o := defaultOptions()
	o.ping = 2 * time.Minute
	o.publicURL = &url.URL{Scheme: "ws", Host: "relay.test"}
	o.trustedProxies = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	return o
}

// presentDay is how far today is from where synctest's clock begins.
const presentDay = 27 * 365 * 24 * time.Hour

// set sets the clock of the box, which tells no process.
func (b *box) set(skew time.Duration) {
	b.skew = skew
	b.w.say("box", "%c has a clock that is wrong by %v", 'a'+b.n, skew)
	if b.listens != nil {
		b.listens.r.o.checkPace.skew = presentDay + skew
	}
}

// start starts a relay, which listens at once.
func (b *box) start() {
	w := b.w
	if b.listens != nil {
		return
	}
	b.starts++
	p := &process{w: w, b: b, label: fmt.Sprintf("%c%d", 'a'+b.n, b.starts), began: w.at(), ends: make(chan struct{}),
		held: -1, empty: w.at(), chance: 1, knew: map[*process]time.Duration{}}
	o := worldOptions()
	o.checkPace.skew = presentDay + b.skew
	id := newIdentity(time.Now().Add(o.checkPace.skew))
	id.id = fmt.Sprintf("%016x", w.rand.Uint64())
	var err error
	p.r, err = newRelay(o, id, buildVersion{"test", "unknown", "go"}, new(instanceState), new(probeKeys), slog.New(worldLog{p}))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, l := range p.r.loops { // an epoll loop waits outside of the fake clock
		l.stop()
	}
	p.r.loops = []poller{worldPoller{}}
	p.r.stopSweep() // the world sweeps
	p.r.stopSweep = func() {}
	c := newPublicCheck(p.r.o, p.r)
	c.dialer.net = p
	c.random = rand.New(rand.NewPCG(w.seed, uint64(len(w.ever))+1))
	for _, d := range []*time.Duration{&c.pace.every, &c.pace.again, &c.pace.over} {
		*d = time.Duration(float64(*d) / b.rate)
	}
	tell, round := c.standing, c.round
	c.standing = func() standing {
		w.turn.Lock()
		defer w.turn.Unlock()
		p.touch()
		return tell()
	}
	c.round = func(ctx context.Context, joins int) roundResult {
		p.runs()
		f := round(ctx, joins)
		p.runs()
		return f
	}
	p.check = c
	w.ever = append(w.ever, p)
	b.listens = p
	w.say(p.label, "starts: %s", id)
	c.start()
	go func() {
		select {
		case err := <-c.leave:
			p.leaves(err)
		case <-p.ends:
		}
	}()
	p.sweep()
}

// runs waits while the process is frozen.
func (p *process) runs() {
	p.w.turn.Lock()
	frozen := p.frozen
	p.w.turn.Unlock()
	if frozen != nil {
		<-frozen
	}
}

// deliver has the process do something, once it runs.
func (p *process) deliver(f func()) {
	switch {
	case p.gone:
	case p.frozen != nil:
		p.waiting = append(p.waiting, f)
	default:
		p.touch()
		f()
		p.note()
	}
}

// touch tells the relay's clocks that it has run all the time, at the pace of its box.
func (p *process) touch() {
	p.r.clock.mu.Lock()
	p.r.clock.last = 0
	p.r.clock.mu.Unlock()
	if p.b.rate != 1 {
		p.r.started = time.Now().Add(-time.Duration(float64(p.w.at()-p.began) * p.b.rate))
	}
}

// note keeps account of whether it has users, and lets them in.
func (p *process) note() {
	switch users := p.r.standing().users; {
	case users && p.held < 0:
		p.held, p.empty = p.w.at(), -1
	case !users && p.empty < 0:
		p.held, p.empty = -1, p.w.at()
	}
	if p.open || p.r.instance.waits.Load() {
		return
	}
	p.open = true
	for _, b := range p.w.boxes {
		switch q := b.listens; {
		case !p.w.plan.alone || q == nil || q == p || !q.open:
		case p.chance < unlucky:
			p.w.say(p.label, "lets users in beside %s, of which a balancer at random told it nothing (%.1g)", q.label, p.chance)
			p.w.plan.alone, p.w.plan.noLoss = false, false
		default:
			p.w.broken("%s lets users in beside %s", p.label, q.label)
		}
	}
}

// unlucky is the chance by which a second relay is let in beside one that serves, and
// nothing is wrong: if a balancer at random leads all 16 pages and 9 upgrades of its round
// back to it, which happens once in 2^25 = 3e7 rounds of two relays, that looks from outside
// as if it were alone. The check reports the split later on.
const unlucky = 1e-7

// drew keeps account of what a balancer at random has chosen for its check.
func (p *process) drew(b *box, up []*box) {
	beside := func(b *box) bool { q := b.listens; return q != nil && q != p && q.open }
	p.chance *= float64(len(slices.DeleteFunc(slices.Clone(up), beside))) / float64(len(up))
	if beside(b) {
		p.chance = 1
	}
}

func (p *process) sweep() {
	p.deliver(func() {
		w := p.r.newBatch()
		for _, s := range p.r.everySession(nil) {
			s.checkTimeouts(w)
		}
		p.r.registry.expire(w, w.now)
		w.flush()
	})
	if !p.gone && p.b.listens == p {
		p.w.after(between(p.w.rand, 14*time.Second, 16*time.Second), p.sweep)
	}
}

func (p *process) freeze() {
	if p.gone || p.frozen != nil || p.b.listens != p {
		return
	}
	p.w.say(p.label, "is frozen")
	p.frozen = make(chan struct{})
	p.r.clock.mu.Lock()
	p.r.clock.last = int64(time.Since(p.r.clock.start))
	p.r.clock.mu.Unlock()
}

func (p *process) resume() {
	if p.frozen == nil {
		return
	}
	p.w.say(p.label, "goes on")
	close(p.frozen)
	p.frozen = nil
	p.r.now() // sees how long that was
	for _, f := range p.waiting {
		p.deliver(f)
	}
	p.waiting = nil
}

// stop is SIGTERM.
func (p *process) stop(then func()) {
	if p.gone || p.b.listens != p {
		return
	}
	p.resume()
	p.w.say(p.label, "stops")
	p.b.listens = nil
	p.w.stopping.Go(func() {
		p.check.stop()
		time.Sleep(time.Nanosecond) // until its connections have ended, of which the drain would count some or none
		p.r.drain(p.r.o.drain)
		p.w.turn.Lock()
		defer p.w.turn.Unlock()
		p.exit()
		if !p.w.ended {
			then()
		}
	})
}

// kill is SIGKILL.
func (p *process) kill() {
	if p.gone {
		return
	}
	p.w.say(p.label, "is killed")
	p.resume()
	p.check.cancel()
	p.exit()
}

func (p *process) exit() {
	if p.gone {
		return
	}
	p.gone = true
	close(p.ends)
	if p.b.listens == p {
		p.b.listens = nil
	}
	for _, l := range sorted(p.b.links) {
		if l.to == p {
			l.end()
			l.free()
		}
	}
}

var instanceID = regexp.MustCompile(`\b[0-9a-f]{16}\b`)

// leaves is what the program does when its check says that another one is to stay.
func (p *process) leaves(err error) {
	w := p.w
	w.turn.Lock()
	defer w.turn.Unlock()
	if w.ended || p.gone || p.b.listens != p {
		return
	}
	p.left = err
	w.say(p.label, "leaves: %v", err)
	stayer := instanceID.FindString(err.Error())
	i := slices.IndexFunc(w.ever, func(q *process) bool { return q.r.id.id == stayer })
	switch {
	case i < 0:
		w.broken("%s leaves for %q, which was never there", p.label, stayer)
	case w.plan.calm:
		w.broken("%s leaves, and there was no split", p.label)
	default:
		q, over := w.ever[i], p.check.pace.over
		if q.left != nil && !slices.ContainsFunc(w.boxes, func(b *box) bool { return b.listens != nil && b.listens != p }) {
			w.broken("%s and %s leave, and none stays", q.label, p.label)
		}
		lately := w.at() - over
		if !q.gone && p.held >= 0 && p.held < lately && q.empty >= 0 && q.empty < lately && w.at()-max(p.began, q.began) < splitDoubts*over {
			w.broken("%s, which has users, leaves for %s, which has none", p.label, q.label)
		}
	}
	p.stop(func() {
		if p.b.again > 0 {
			w.after(p.b.again, p.b.start)
		}
	})
}

// noticer is what has noticed a split.
type noticer uint8

const (
	byWaiting noticer = iota // a relay that lets nobody in because of another
	byCheck
	byIDs
	noticerCount
)

func (n noticer) String() string { return [...]string{"the second waits", "the check", "the ids"}[n] }

type notice struct {
	at time.Duration
	by noticer
}

// worldLog takes a relay's log.
type worldLog struct{ p *process }

func (h worldLog) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }
func (h worldLog) WithAttrs([]slog.Attr) slog.Handler               { return h }
func (h worldLog) WithGroup(string) slog.Handler                    { return h }

func (h worldLog) Handle(_ context.Context, r slog.Record) error {
	w, p := h.p.w, h.p
	if r.Level == slog.LevelInfo && !strings.Contains(r.Message, "public name") || strings.HasSuffix(r.Message, " refused") {
		return nil
	}
	var attrs strings.Builder
	r.Attrs(func(a slog.Attr) bool {
		if a.Key != "conn" { // the only one that no seed decides
			fmt.Fprintf(&attrs, " %v", a)
		}
		return true
	})
	w.say(p.label, "%v %.90s%s", r.Level, r.Message, attrs.String())
	var by noticer
	switch {
	case strings.HasPrefix(r.Message, "another relay serves the public name"):
		by = byWaiting
	case !strings.HasPrefix(r.Message, "multi-instance deploy"):
		return nil
	case strings.Contains(attrs.String(), "evidence="):
		by = byIDs
	default:
		by = byCheck
	}
	w.mu.Lock()
	w.noticed = append(w.noticed, notice{w.at(), by})
	w.mu.Unlock()
	if w.plan.calm && by != byWaiting {
		w.broken("%s reports a split, and there was none", p.label)
	}
	return nil
}

// ---- what is at an address of the name ----

type policy uint8

const (
	roundRobin policy = iota
	randomly
	rarely // one connection in 50 goes elsewhere
	leastConnections
	byClient
	byID
	byIDStrictly  // without fail-over
	firstThatIsUp // active/standby
	policyCount
)

func (p policy) String() string {
	return [...]string{"round robin", "random", "one in 50", "least connections", "by client",
		"by server-id", "by server-id, no fail-over", "active/standby"}[p]
}

type mood uint8

const (
	works   mood = iota
	refuses      // nothing listens
	silent       // packets get lost
	breaks       // the proxy answers 502
)

func (m mood) String() string { return [...]string{"works", "refuses", "is silent", "answers 502"}[m] }

// front is a proxy, or a balancer of one of the policies.
type front struct {
	w      *world
	addr   netip.Addr
	policy policy
	boxes  []*box
	ready  bool // it asks /readyz
	strips bool // it takes the relay's headers out of answers
	v1     *box // gets what goes to /v1/
	mood   mood
	next   int
	hides  int // at random: so many connections of checks come back by chance
	links  map[*link]struct{}
}

func (f *front) say(what string) { f.w.say("proxy", "%v %s", f.addr, what) }

// pick chooses the box for a request, nil for none.
func (f *front) pick(l *link, q *http.Request) *box {
	if f.v1 != nil && strings.HasPrefix(q.URL.Path, "/v1/") {
		return f.v1
	}
	up := f.boxes
	if f.policy != byIDStrictly {
		up = slices.DeleteFunc(slices.Clone(up), func(b *box) bool { return !f.up(b) })
	}
	if len(up) == 0 {
		return nil
	}
	f.next++
	turn := func(i int) *box { return up[i%len(up)] }
	switch f.policy {
	case randomly:
		b := turn(f.w.rand.IntN(len(up)))
		if l.owner == nil {
			return b
		}
		if f.hides > 0 {
			f.hides--
			b = l.owner.b
		}
		l.owner.drew(b, up)
		return b
	case rarely:
		if f.w.rand.IntN(50) > 0 {
			return up[0]
		}
		return turn(1)
	case leastConnections:
		up = slices.Concat(up[f.next%len(up):], up[:f.next%len(up)])
		return slices.MinFunc(up, func(a, b *box) int { return len(a.links) - len(b.links) })
	case byClient:
		return f.hashed(up, l.from.String())
	case byID, byIDStrictly:
		return f.hashed(up, f.w.named(l, q.Header.Get("X-Pyrycode-Server")))
	case firstThatIsUp:
		return up[0]
	}
	return turn(f.next)
}

// named is a server-id as balancers hash it: those of checks are no draw of the seed's.
func (w *world) named(l *link, serverID string) string {
	if !strings.HasPrefix(serverID, probePrefix) {
		return serverID
	}
	if w.probes[serverID] == "" {
		w.probes[serverID] = fmt.Sprint(l.owner.check.random.Uint64())
	}
	return w.probes[serverID]
}

// hashed chooses the box with the highest hash, so that few move when one is gone.
func (f *front) hashed(up []*box, key string) *box {
	weight := func(b *box) uint64 {
		h := fnv.New64a()
		fmt.Fprint(h, key, b.n, f.w.seed+f.w.salt)
		return h.Sum64() * 0x9e3779b97f4a7c15
	}
	return slices.MaxFunc(up, func(a, b *box) int { return cmp.Compare(weight(a), weight(b)) })
}

// up is what the balancer thinks of a box.
func (f *front) up(b *box) bool {
	const healthCheck = 2 * time.Second
	p, now := b.listens, f.w.at()
	switch {
	case p == nil:
		return false
	case !f.ready:
		return true
	case now-b.asked >= healthCheck:
		b.asked, b.ready = now, false
		if p.frozen == nil {
			a := worldAnswer{header: http.Header{}}
			p.r.ServeHTTP(&a, &http.Request{Method: http.MethodGet, URL: &url.URL{Path: "/readyz"}})
			b.ready = a.code == http.StatusOK
		}
	}
	return b.ready
}

// serve takes a request to a relay.
func (f *front) serve(l *link, q *http.Request) {
	var b *box
	if f.mood == works {
		b = f.pick(l, q)
	}
	switch {
	case f.mood == silent:
		return
	case f.mood == refuses:
		l.end()
		return
	case b == nil || b.listens == nil:
		l.hear([]byte("HTTP/1.1 502 Bad Gateway\r\nServer: proxy\r\nContent-Length: 0\r\n\r\n"))
		l.end()
		return
	}
	w, p := f.w, b.listens
	l.to, l.b = p, b
	b.links[l] = struct{}{}
	p.deliver(func() {
		q.RemoteAddr = "10.0.0.1:1"
		q.Header["X-Forwarded-For"] = []string{l.from.String()}
		a := worldAnswer{l: l, header: http.Header{}}
		p.r.ServeHTTP(&a, q)
		if l.c == nil {
			l.hear(a.bytes())
			l.end()
		}
		if l.c != nil && l.user != nil {
			w.minted[l.c.handler.(*session).id] = mint{w.at(), p}
		}
		if l.freed { // while the relay was frozen
			l.freed = false
			l.free()
		}
	})
}

// reload ends all that goes through.
func (f *front) reload() {
	f.say("is reloaded")
	for _, l := range sorted(f.links) {
		l.end()
		l.free()
	}
}

func (f *front) change(m mood, d time.Duration) {
	f.say(m.String())
	f.mood = m
	f.w.after(d, func() { f.mood = works; f.say("works") })
}

// worldAnswer is the http.ResponseWriter of a relay.
type worldAnswer struct {
	l      *link // nil for a health check
	header http.Header
	code   int
	body   bytes.Buffer
}

func (a *worldAnswer) Header() http.Header { return a.header }
func (a *worldAnswer) WriteHeader(code int) {
	if a.code == 0 {
		a.code = code
	}
}

func (a *worldAnswer) Write(b []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	return a.body.Write(b)
}

func (a *worldAnswer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return farEnd{l: a.l}, bufio.NewReadWriter(bufio.NewReaderSize(strings.NewReader(""), 16), nil), nil
}

func (a *worldAnswer) bytes() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\nContent-Length: %d\r\n", a.code, http.StatusText(a.code), a.body.Len())
	a.header.Write(&b)
	b.WriteString("\r\n")
	b.Write(a.body.Bytes())
	return b.Bytes()
}

// ---- connections ----

// link is one connection through the name, from its client's side.
type link struct {
	w     *world
	n     int
	owner *process // whose check it is, nil for users
	user  *user    // nil for checks
	from  netip.Addr
	front *front
	b     *box
	to    *process // nil: it is with no relay
	c     *conn    // there, behind the upgrade
	freed bool
	ask   []byte // of the request, until it is whole; owned by the client

	mu       sync.Mutex // a leaf: guards what follows
	in       []byte     // for the client
	headed   bool       // the head of the answer is complete
	eof      bool       // nothing more comes
	closed   bool       // by the client
	lost     bool       // no byte arrives any more, either way
	deadline time.Time
	changed  chan struct{}
}

// connect opens a link to an address of the name, as far as TCP goes.
func (w *world) connect(f *front, from netip.Addr, owner *process, u *user) *link {
	l := &link{w: w, owner: owner, user: u, from: from, front: f, changed: make(chan struct{}, 1)}
	w.links++
	l.n = w.links
	f.links[l] = struct{}{}
	return l
}

func sorted(links map[*link]struct{}) []*link {
	var all []*link
	for l := range links {
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b *link) int { return a.n - b.n })
	return all
}

// hear brings bytes to the client.
func (l *link) hear(b []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lost || l.eof || l.closed {
		return
	}
	l.in = append(l.in, b...)
	if i := bytes.Index(l.in, []byte("\r\n\r\n")); !l.headed && i > 0 {
		l.headed = true
		if l.front.strips {
			var kept []string
			for line := range strings.SplitSeq(string(l.in[:i]), "\r\n") {
				if !strings.HasPrefix(line, "X-Pyrycode-Relay-") {
					kept = append(kept, line)
				}
			}
			l.in = slices.Concat([]byte(strings.Join(kept, "\r\n")), l.in[i:])
		}
	}
	l.poke()
}

// late gives each link a moment of its own, so that the order in which a relay finds its
// sessions, which is that of a map, decides nothing.
func (l *link) late() time.Duration { return time.Duration(l.n) }

// poke tells the client that there is something, l.mu held.
func (l *link) poke() {
	if l.user != nil {
		l.w.after(20*time.Millisecond+l.late(), func() { l.user.reads(l) })
		return
	}
	select {
	case l.changed <- struct{}{}:
	default:
	}
}

// end is the end of what comes to the client.
func (l *link) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.eof && !l.lost {
		l.eof = true
		l.poke()
	}
}

// lose has the network lose all that is under way from now on.
func (l *link) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost = true
}

// free ends the link at the relay, as a FIN or a reset does.
func (l *link) free() {
	if l.freed {
		return
	}
	l.mu.Lock()
	lost := l.lost
	l.mu.Unlock()
	if lost && !l.w.ended { // until the relay gives it up
		return
	}
	l.freed = true
	delete(l.front.links, l)
	if l.b != nil {
		delete(l.b.links, l)
	}
	if l.c != nil {
		l.to.deliver(func() {
			w := l.to.r.newBatch()
			l.c.free(w)
			w.flush()
		})
	}
}

// send takes bytes of the client to the relay.
func (l *link) send(b []byte) {
	l.mu.Lock()
	late := l.lost || l.closed
	l.mu.Unlock()
	if late || l.c == nil {
		return
	}
	l.to.deliver(func() {
		if l.freed {
			return
		}
		w := l.to.r.newBatch()
		l.c.receive(w, b)
		l.c.markAlive(w)
		w.flush()
	})
}

// What the relay has of it.

type farEnd struct {
	net.Conn
	l *link
}

func (e farEnd) Close() error { e.l.end(); return nil }

// worldPoller binds connections to links.
type worldPoller struct{}

func (worldPoller) stop()        {}
func (worldPoller) turned() bool { return true }
func (worldPoller) bind(c *conn, nc net.Conn) error {
	l := nc.(farEnd).l
	l.c, c.sock = c, worldSocket{l}
	c.pingAt = c.opened + int64(c.relay.o.ping)/2 + int64(l.n%60)*int64(time.Second) // no draw that no seed decides
	return nil
}

type worldSocket struct{ l *link }

func (s worldSocket) attach([]byte) {}
func (s worldSocket) unsent() bool  { return false }
func (s worldSocket) resume()       {}
func (s worldSocket) closeWrite()   { s.l.end() }
func (s worldSocket) shutdown() {
	s.l.end()
	s.l.w.after(s.l.late(), func() {
		s.l.mu.Lock()
		s.l.lost = false
		s.l.mu.Unlock()
		s.l.free()
	})
}

func (s worldSocket) write(bufs [][]byte) (n int, err error) {
	b := slices.Concat(bufs...)
	s.l.hear(b)
	return len(b), nil
}

// ---- the network of a relay's check ----

func (p *process) LookupNetIP(context.Context, string, string) (addrs []netip.Addr, err error) {
	p.runs()
	for _, f := range p.w.name {
		addrs = append(addrs, f.addr)
	}
	return addrs, nil
}

func (p *process) DialContext(ctx context.Context, _, address string) (net.Conn, error) {
	p.runs()
	w := p.w
	w.turn.Lock()
	i := slices.IndexFunc(w.name, func(f *front) bool { return f.addr.String()+":80" == address })
	f := w.name[i]
	m := f.mood
	if w.plan.unseen[[2]int{p.b.n, i}] {
		m = silent
	}
	w.turn.Unlock()
	time.Sleep(between(p.check.random, time.Millisecond, 30*time.Millisecond))
	switch m {
	case refuses:
		return nil, fmt.Errorf("dial %s: %w", address, syscall.ECONNREFUSED)
	case silent:
		<-ctx.Done()
		p.runs()
		return nil, fmt.Errorf("dial %s: %w", address, os.ErrDeadlineExceeded)
	}
	w.turn.Lock()
	defer w.turn.Unlock()
	if p.gone || ctx.Err() != nil {
		return nil, context.Canceled
	}
	return w.connect(f, p.b.addr, p, nil), nil
}

func (l *link) LocalAddr() net.Addr  { return &net.TCPAddr{IP: l.from.AsSlice()} }
func (l *link) RemoteAddr() net.Addr { return &net.TCPAddr{IP: l.front.addr.AsSlice(), Port: 80} }

func (l *link) SetReadDeadline(t time.Time) error  { return l.SetDeadline(t) }
func (l *link) SetWriteDeadline(t time.Time) error { return nil }
func (l *link) SetDeadline(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.deadline = t
	l.poke()
	return nil
}

func (l *link) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.closed = true
		l.poke()
		l.w.after(0, l.free)
	}
	return nil
}

func (l *link) hasClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

func (l *link) Read(b []byte) (int, error) {
	for {
		l.owner.runs()
		l.mu.Lock()
		deadline := l.deadline
		late := !deadline.IsZero() && !time.Now().Before(deadline)
		switch {
		case l.closed:
			l.mu.Unlock()
			return 0, net.ErrClosed
		case len(l.in) > 0:
			n := copy(b, l.in)
			l.in = l.in[n:]
			l.mu.Unlock()
			return n, nil
		case l.eof:
			l.mu.Unlock()
			return 0, io.EOF
		case late:
			l.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		}
		l.mu.Unlock()
		if deadline.IsZero() {
			<-l.changed
			continue
		}
		timer := time.NewTimer(time.Until(deadline))
		select {
		case <-l.changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

func (l *link) Write(b []byte) (int, error) {
	l.owner.runs()
	if l.hasClosed() {
		return 0, net.ErrClosed
	}
	if l.to != nil {
		l.w.turn.Lock()
		defer l.w.turn.Unlock()
		l.send(slices.Clone(b))
		return len(b), nil
	}
	l.ask = append(l.ask, b...)
	if !bytes.HasSuffix(l.ask, []byte("\r\n\r\n")) {
		return len(b), nil
	}
	q, err := http.ReadRequest(bufio.NewReaderSize(bytes.NewReader(l.ask), len(l.ask)))
	if err != nil {
		return 0, err
	}
	time.Sleep(between(l.owner.check.random, time.Millisecond, l.w.plan.slow))
	l.w.turn.Lock()
	if !l.owner.gone && !l.hasClosed() {
		l.front.serve(l, q)
	}
	l.w.turn.Unlock()
	time.Sleep(between(l.owner.check.random, time.Millisecond, l.w.plan.slow))
	return len(b), nil
}

// ---- daemons and phones ----

// user is a daemon or one of its phones, as the real ones behave: after a session that
// was up they dial again at once, otherwise after 1 s, and then twice as long each
// time, up to 30 s.
type user struct {
	w      *world
	label  string
	rand   *rand.Rand
	role   role
	id     string
	from   netip.Addr
	moves  time.Duration // of a daemon: its network changes about so often
	daemon *user         // of a phone
	away   bool          // a phone whose app is closed
	link   *link
	up     bool
	wait   time.Duration
	calls  int
	last   *process // where it was up
	known  []string // the sessions of a daemon, which it keeps for as long as it lives
}

func (u *user) dial() {
	if u.away || u.link != nil {
		return
	}
	w := u.w
	f := w.name[u.rand.IntN(len(w.name))]
	l := w.connect(f, u.from, nil, u)
	u.link = l
	u.calls++
	call := u.calls
	w.after(15*time.Second, func() { // the daemon's own patience
		if u.calls == call && u.link == l && !u.up {
			l.Close()
			u.failed(l)
		}
	})
	w.after(between(u.rand, time.Millisecond, 50*time.Millisecond), func() {
		h := phoneHeaders(u.id)
		if u.role == roleBinary {
			h = binaryHeaders(u.id)
		}
		q := upgradeRequest("/v2/"+endpointWords[u.role], h)
		f.serve(l, q)
		if u.role == roleBinary && l.to != nil {
			w.after(5600*time.Millisecond, func() { // where it contends, that is decided by then
				if p := l.to; p.b.listens == p {
					p.deliver(func() {
						w := p.r.newBatch()
						for _, s := range p.r.everySession(nil) {
							s.checkTimeouts(w)
						}
						w.flush()
					})
				}
			})
		}
	})
}

// reads takes what has come.
func (u *user) reads(l *link) {
	l.mu.Lock()
	in, eof, headed := l.in, l.eof, l.headed
	if headed {
		l.in = nil
	}
	l.mu.Unlock()
	if u.link != l {
		return
	}
	if headed && bytes.HasPrefix(in, []byte("HTTP/1.1 ")) {
		i := bytes.Index(in, []byte("\r\n\r\n"))
		if !bytes.HasPrefix(in, []byte("HTTP/1.1 101")) {
			l.Close()
			u.failed(l)
			return
		}
		in = in[i+4:]
		u.up = true
		if u.last != l.to && u.last != nil && len(u.known) > 0 && u.w.at() > u.w.plan.split && u.w.reported().at < 0 {
			u.w.sides++
		}
		u.last = l.to
		if u.role == rolePhone {
			u.w.after(between(u.rand, 100*time.Millisecond, 2*time.Second), func() { u.talk(l) })
		}
	}
	for r := bytes.NewReader(in); u.link == l; {
		op, payload, err := readServerFrame(r)
		if err != nil {
			break
		}
		switch op {
		case opPing:
			l.send(clientFrame(last, opPong, payload))
		case opText:
			u.message(payload)
		case opClose:
			l.send(clientFrame(last, opClose, payload))
			l.Close()
			u.closed(l, int(payload[0])<<8+int(payload[1]), string(payload[2:]))
		}
	}
	if eof && u.link == l {
		l.Close()
		u.closed(l, 1006, "")
	}
}

// message is an envelope to a daemon.
func (u *user) message(p []byte) {
	if u.role == rolePhone {
		return
	}
	var e struct {
		ConnID string          `json:"conn_id"`
		Frame  json.RawMessage `json:"frame"`
		Code   int             `json:"close_code"`
	}
	if json.Unmarshal(p, &e) != nil {
		u.w.broken("%s got %s", u.label, p)
		return
	}
	u.known = slices.DeleteFunc(u.known, func(id string) bool { return id == e.ConnID })
	if e.Code == 0 {
		if len(u.known) == 16 {
			u.known = u.known[1:]
		}
		u.known = append(u.known, e.ConnID)
	}
}

// talk sends: a phone to its daemon, a daemon to all of its sessions, those too whose
// relay has gone.
func (u *user) talk(l *link) {
	if u.link != l || !u.up {
		return
	}
	if u.role == rolePhone {
		l.send(clientFrame(last, opText, []byte("1")))
		return
	}
	for _, id := range u.known {
		l.send(clientFrame(last, opText, []byte(`{"conn_id":"`+id+`","frame":2}`)))
		u.w.told(l, id)
	}
}

// told holds what the ids have to tell against what a relay has found: that another one
// has minted an id after it had known one of this relay's for the confirmation time.
func (w *world) told(l *link, id string) {
	m, p := w.minted[id], l.to
	if m.by == p || m.by == nil || p.frozen != nil || p.gone || l.lost || l.freed {
		return
	}
	if _, known := p.knew[m.by]; !known {
		p.knew[m.by] = w.at()
	}
	since, known := m.by.knew[p]
	over := time.Duration(float64(p.r.o.checkPace.over) / min(p.b.rate, m.by.b.rate))
	if known && len(w.ever) == 2 && m.at-since > over+time.Second && p.r.metrics.splitSeen[evidenceCertain].Load() == 0 {
		w.broken("%s is told an id of %s, which had known it for %v by then, and is certain of nothing", p.label, m.by.label, m.at-since)
	}
}

// closed is the end of a session.
func (u *user) closed(l *link, code int, reason string) {
	absent := strings.HasPrefix(reason, endNeverSeen.String()) || strings.HasPrefix(reason, endLastHeld.String())
	if code == int(endNeverSeen.code()) && absent {
		if d := u.daemon.link; d != nil && u.daemon.up && d.to != l.to && !d.to.gone && d.to.frozen == nil && !d.lost {
			u.w.say(u.label, "is told by %s: %s, and its daemon is with %s", l.to.label, reason, d.to.label)
			u.w.wrong = append(u.w.wrong, turnedAway{u.w.at(), l.to})
		}
	}
	if code == 4404 || code == 4409 {
		u.failed(l)
		return
	}
	u.link, u.up, u.wait = nil, false, 0
	u.w.after(between(u.rand, 10*time.Millisecond, 500*time.Millisecond), u.dial)
}

// failed is a session that did not come about.
func (u *user) failed(*link) {
	u.link, u.up = nil, false
	u.wait = min(max(2*u.wait, time.Second), 30*time.Second)
	u.w.after(between(u.rand, u.wait/2, u.wait), u.dial)
}

// lives lets phones come and go, and daemons work.
func (u *user) lives() {
	switch {
	case u.role == roleBinary:
		u.w.after(between(u.rand, 20*time.Second, 10*time.Minute), u.lives)
		if u.link != nil {
			u.talk(u.link)
		}
		return
	case u.away:
		u.away, u.wait = false, 0
		if u.rand.IntN(2) == 0 {
			u.roams()
		}
		u.dial()
		u.w.after(between(u.rand, time.Minute, 30*time.Minute), u.lives)
	default:
		u.away = true
		if l := u.link; l != nil {
			l.send(clientFrame(last, opClose, closePayload(1000, "")))
			l.Close()
			u.link, u.up = nil, false
		}
		u.w.after(between(u.rand, 10*time.Second, 20*time.Minute), u.lives)
	}
}

// roams has the user's network change, to another address of two: its session is lost
// without a word, and it dials again at once.
func (u *user) roams() {
	if u.role == roleBinary {
		u.w.after(between(u.rand, u.moves/4, u.moves), u.roams)
	}
	b := u.from.As4()
	b[3] ^= 0x80
	u.from = netip.AddrFrom4(b)
	if l := u.link; l != nil {
		u.w.say(u.label, "changes its network, and is at %v", u.from)
		l.lose()
		u.link, u.up = nil, false
		u.dial()
	}
}

// ---- what happens ----

// plan is what a world is about, and what has to hold in it.
type plan struct {
	kind    string
	length  time.Duration
	daemons int             // 0: one to four
	slow    time.Duration   // an answer takes up to twice that
	unseen  map[[2]int]bool // box, address: from that box it can't be reached
	calm    bool            // there is no split: nobody reports one, nobody leaves
	noLoss  bool            // no phone is told 4404 while its daemon is online elsewhere
	alone   bool            // no relay lets anybody in while another one lets them in
	split   time.Duration   // when a split begins, 0 for none
	bound   time.Duration   // it is reported in that time, 0: nobody promises that
}

// kind of worlds: what its name does not say is drawn.
type kind struct {
	name  string
	build func(w *world)
}

// cases are worlds in which an invariant did not hold once.
var cases = []kind{
	// The second round of one that waits has let it in by chance, or because it met the
	// third, which waits as well.
	{"two in a crash loop beside a relay with users, behind a balancer at random", func(w *world) {
		w.settle(3, 1, randomly)
		f := w.name[0]
		f.ready, f.strips, w.plan.slow = false, false, 2*time.Millisecond
		w.plan.length, w.plan.noLoss, w.plan.alone = 40*time.Minute, true, true
		w.after(0, w.boxes[0].start)
		for i, b := range w.boxes[1:] {
			b.again = 3 * time.Second
			for at := time.Minute + time.Duration(i)*5*time.Second; at < w.plan.length; at += 30 * time.Second {
				w.after(at, b.start)
				w.after(at+27*time.Second, b.crash)
			}
		}
	}},
	// Claims that met the third, which was waiting, ended rounds that had met the second: for
	// want of a claim here they were sightings.
	{"two, sticky by server-id, and a third that starts again and again", func(w *world) {
		w.settle(3, 1, byID)
		w.name[0].ready, w.name[0].strips, w.plan.slow = false, false, 50*time.Millisecond
		w.calm(20*time.Minute, 20*time.Minute)
		w.plan.noLoss = false // its server-ids move while it is down
		for _, b := range w.boxes {
			w.after(upTo(w.rand, 2*time.Second), b.start)
		}
		b := w.boxes[2]
		b.again = time.Millisecond
		for at := 12 * time.Second; at < w.plan.length; at += 12 * time.Second {
			w.after(at, b.crash)
		}
	}},
	{"two of three, sticky by server-id without fail-over", func(w *world) {
		w.settle(3, 1, byIDStrictly)
		w.name[0].ready, w.name[0].strips = false, false
		w.calm(time.Hour, time.Hour)
		for _, b := range w.boxes[1:] {
			w.after(upTo(w.rand, 2*time.Second), b.start)
		}
	}},
	// See unlucky: the check has to report it.
	{"a second one is let in by chance", func(w *world) {
		w.settle(2, 1, randomly)
		f := w.name[0]
		f.ready, f.strips, w.plan.slow = false, false, 2*time.Millisecond
		w.plan.length, w.plan.split, w.plan.bound = 20*time.Minute, time.Minute, 15*time.Minute
		w.plan.noLoss, w.plan.alone = true, true
		w.after(0, w.boxes[0].start)
		w.after(w.plan.split, func() {
			f.hides = 2*handOverIDs + 1 + firstJoins
			w.boxes[1].start()
			w.after(10*time.Second, func() {
				if p := w.boxes[1].listens; p == nil || !p.open {
					w.broken("chance alone does not let the second one in")
				}
			})
		})
	}},
	// It saw itself only, as long as it held two connections at a time.
	{"a second one by least connections, and few users", func(w *world) {
		w.plan.daemons = 2
		w.settle(2, 1, leastConnections)
		w.name[0].ready, w.name[0].strips, w.plan.slow = false, false, 50*time.Millisecond
		w.plan.length, w.plan.noLoss, w.plan.alone = 10*time.Minute, true, true
		w.after(0, w.boxes[0].start)
		w.after(2*time.Minute, w.boxes[1].start)
	}},
	// A clock that is unset while a relay runs knows no future, and so no id from there.
	{"ids from a clock that was ahead, and a clock that loses its date", func(w *world) {
		w.settle(1, 1, roundRobin)
		w.calm(2*time.Hour, 2*time.Hour)
		b := w.boxes[0]
		b.skew, b.rate, b.again = 72*time.Hour, 1, time.Second
		w.after(0, b.start)
		w.after(59*time.Minute, func() { b.set(0) })
		w.after(time.Hour, b.crash)
		w.after(time.Hour+3*time.Second, func() { b.set(-56 * 365 * 24 * time.Hour) })
		w.after(time.Hour+30*time.Minute, func() { w.name[0].reload() })
	}},
}

var kinds = []kind{
	// No split.
	{"one relay", func(w *world) {
		w.settle(1, 1+w.rand.IntN(3), policy(w.rand.IntN(int(policyCount))))
		w.calm(20*time.Minute, 24*time.Hour)
		w.boxes[0].again = between(w.rand, time.Second, 10*time.Second)
		w.after(0, w.boxes[0].start)
		w.troubles(w.drawn(5*time.Minute, 3*time.Hour))
	}},
	{"crash loop", func(w *world) {
		w.settle(1, 1, roundRobin)
		w.calm(time.Hour, time.Hour)
		b := w.boxes[0]
		b.again = between(w.rand, time.Second, 5*time.Second)
		w.after(0, b.start)
		for at := upTo(w.rand, 10*time.Minute); at < 40*time.Minute; at += between(w.rand, time.Second, time.Minute) {
			w.after(at, b.crash)
		}
	}},
	{"rolling updates", func(w *world) {
		w.settle(2, 1+w.rand.IntN(2), policy(w.rand.IntN(int(policyCount))))
		w.calm(time.Hour, 12*time.Hour)
		w.plan.noLoss, w.plan.alone = w.gated(), w.gated()
		w.after(0, w.boxes[0].start)
		every := w.drawn(10*time.Minute, 3*time.Hour)
		for i, at := 0, between(w.rand, time.Minute, every); at < w.plan.length; i, at = i+1, at+between(w.rand, every/2, every) {
			old, young := w.boxes[i%2], w.boxes[(i+1)%2]
			w.after(at, young.start)
			w.after(at+between(w.rand, -5*time.Second, 15*time.Second), func() {
				if p := old.listens; p != nil {
					p.stop(func() {})
				}
			})
		}
	}},
	{"two relays, sticky by server-id", func(w *world) {
		w.settle(2+w.rand.IntN(2), 1, byID)
		w.name[0].ready = false // else only the first gets anything, and the others never see themselves
		w.calm(20*time.Minute, 12*time.Hour)
		for _, b := range w.boxes { // before one lets anybody in, whose server-id would move to the next
			w.after(upTo(w.rand, max(2*w.plan.slow, 500*time.Millisecond)), b.start)
		}
	}},

	// A split from some time on.
	{"round robin", func(w *world) { w.splits(roundRobin, 1) }},
	{"random", func(w *world) { w.splits(randomly, 1) }},
	{"one connection in 50", func(w *world) {
		w.splits(rarely, 1)
		w.plan.bound = 0
	}},
	{"least connections", func(w *world) {
		w.splits(leastConnections, 1)
		if w.name[0].strips { // then each sees the other as something that does not say who it is
			w.plan.bound = 0
		}
	}},
	{"active/standby, both up", func(w *world) {
		w.splits(firstThatIsUp, 1)
		w.name[0].strips = false // else the second sees something that does not say who it is
	}},
	{"an address each", func(w *world) {
		w.splits(roundRobin, 2)
		w.addressEach()
	}},
	{"an address each, the other's out of reach", func(w *world) {
		w.splits(roundRobin, 2)
		w.addressEach()
		w.plan.unseen = map[[2]int]bool{{0, 1}: true, {1, 0}: true}
		w.onlyIDs()
	}},
	{"by client, seen from one box at least", func(w *world) {
		for w.splits(byClient, 1); w.homely(); {
			w.salt++
		}
		w.name[0].strips = false
	}},
	{"by client, each box sees itself", func(w *world) {
		for w.splits(byClient, 1); !w.homely(); {
			w.salt++
		}
		w.name[0].ready = false
		w.onlyIDs()
	}},
	{"later, round robin", func(w *world) { w.comesLater(roundRobin, false) }},
	{"later, random", func(w *world) { w.comesLater(randomly, false) }},
	{"later, least connections", func(w *world) { w.comesLater(leastConnections, false) }},
	{"later, an address each", func(w *world) { w.comesLater(roundRobin, true) }},
	{"fail-over and return, by server-id", func(w *world) { w.returns(byID) }},
	{"frozen, replaced by another, goes on", func(w *world) {
		w.settle(2, 1, firstThatIsUp)
		w.name[0].ready, w.name[0].strips = true, false
		w.after(0, w.boxes[0].start)
		at := between(w.rand, time.Minute, time.Hour)
		d := between(w.rand, 30*time.Second, 20*time.Minute)
		w.after(at, func() { w.boxes[0].freezes(d) })
		w.after(at+between(w.rand, 0, d), w.boxes[1].start)
		w.plan.split, w.plan.bound = at+d, 15*time.Minute
		w.plan.length = w.plan.split + 30*time.Minute
	}},
	{"a crash loop beside a relay with users", func(w *world) {
		w.splits(policy(w.rand.IntN(2)), 1)
		w.plan.bound = 0
		for _, b := range w.boxes[1:] {
			b.again = between(w.rand, time.Second, 10*time.Second)
			for at := w.plan.split; at < w.plan.split+5*time.Minute; {
				at += between(w.rand, time.Second, 20*time.Second)
				w.after(at, b.crash)
			}
		}
	}},
}

// drawn is a time of any order of magnitude in a range.
func (w *world) drawn(low, high time.Duration) time.Duration {
	return time.Duration(float64(low) * math.Pow(float64(high)/float64(low), w.rand.Float64()))
}

// calm is a plan without a split.
func (w *world) calm(low, high time.Duration) {
	w.plan.calm, w.plan.noLoss, w.plan.length = true, true, w.drawn(low, high)
}

// gated reports whether a relay that comes second sees the first within the 5 s that it
// has for that, and so lets nobody in.
func (w *world) gated() bool {
	if w.plan.slow > slowAnswer/2 {
		return false
	}
	for _, f := range w.name {
		if f.strips || f.policy == byIDStrictly || !f.ready && f.policy != roundRobin && f.policy != randomly {
			return false
		}
	}
	return true
}

// splits has two or three relays serve one name from some time on.
func (w *world) splits(p policy, addrs int) {
	w.boxes, w.name, w.users = nil, nil, nil
	n := 2
	if addrs == 1 && w.rand.IntN(3) == 0 {
		n++
	}
	w.settle(n, addrs, p)
	w.plan.split, w.plan.bound = w.drawn(time.Second, time.Hour), 30*time.Minute
	w.plan.length = w.plan.split + w.plan.bound + 15*time.Minute
	w.plan.alone = w.gated() && w.plan.split > 10*time.Second // two that start at once may see neither
	w.plan.noLoss = w.plan.alone
	w.after(0, w.boxes[0].start)
	for i, b := range w.boxes[1:] {
		at := w.plan.split
		if i > 0 {
			at += upTo(w.rand, 5*time.Minute)
		}
		w.after(at, b.start)
		if w.rand.IntN(3) == 0 {
			b.again = between(w.rand, time.Second, time.Minute)
		}
	}
	if w.rand.IntN(3) == 0 {
		b := w.boxes[w.rand.IntN(n)]
		for range 3 {
			d := between(w.rand, time.Second, 3*time.Minute)
			w.after(w.plan.split+upTo(w.rand, 20*time.Minute), func() { b.freezes(d) })
			w.plan.bound += d
			w.plan.noLoss, w.plan.alone = false, false
		}
	}
}

// comesLater has two relays, each of which is sure to be the only one, come behind one
// balancer or be within each other's reach.
func (w *world) comesLater(p policy, each bool) {
	w.settle(2, 2, p)
	w.addressEach()
	w.plan.unseen = map[[2]int]bool{{0, 1}: true, {1, 0}: true}
	w.plan.split, w.plan.bound = w.drawn(time.Minute, time.Hour), 30*time.Minute
	w.plan.length = w.plan.split + 45*time.Minute
	for i, b := range w.boxes {
		w.name[i].strips, w.name[i].ready = false, false
		w.after(upTo(w.rand, 30*time.Second), b.start)
	}
	w.after(w.plan.split, func() {
		w.plan.unseen = nil
		for _, f := range w.name {
			if !each {
				f.boxes = w.boxes
			}
		}
	})
}

// onlyIDs is for a split that no check sees.
func (w *world) onlyIDs() {
	w.plan.bound, w.plan.noLoss, w.plan.alone = 0, false, false
	w.plan.length = w.plan.split + w.drawn(2*time.Hour, 24*time.Hour)
}

// addressEach gives each box an address of the name.
func (w *world) addressEach() {
	for i, f := range w.name {
		f.boxes = w.boxes[i : i+1]
	}
}

// homely reports whether a balancer by client brings each box to itself.
func (w *world) homely() bool {
	f := w.name[0]
	for _, b := range w.boxes {
		if f.hashed(f.boxes, b.addr.String()) != b {
			return false
		}
	}
	return true
}

// returns has a box fail and come back.
func (w *world) returns(p policy) {
	w.settle(2, 1, p)
	for _, b := range w.boxes {
		w.after(upTo(w.rand, time.Minute), b.start)
	}
	at := w.drawn(2*time.Minute, time.Hour)
	back := w.drawn(10*time.Second, time.Hour)
	w.after(at, w.boxes[0].crash)
	w.after(at+back, w.boxes[0].start)
	w.plan.split = at + back
	w.plan.length = w.plan.split + w.drawn(2*time.Hour, 24*time.Hour)
}

// slowAnswer is half of how long an answer takes at the most, in the slowest worlds.
const slowAnswer = time.Second

// wrongClocks are how wrong dates are: half of them by nothing.
var wrongClocks = []time.Duration{0, 0, 0, 0, 0, 0, -72 * time.Hour, 72 * time.Hour, -50 * time.Minute, time.Minute, 5 * time.Hour,
	-56 * 365 * 24 * time.Hour}

// settle makes boxes, addresses and users.
func (w *world) settle(boxes, addrs int, p policy) {
	r := w.rand
	for i := range boxes {
		b := &box{w: w, n: i, addr: netip.AddrFrom4([4]byte{198, 51, 100, byte(i + 1)}), rate: 1, links: map[*link]struct{}{}}
		b.skew = wrongClocks[r.IntN(len(wrongClocks))]
		if r.IntN(4) == 0 {
			b.rate = []float64{0.9, 0.999, 1.001, 1.1}[r.IntN(4)]
		}
		w.boxes = append(w.boxes, b)
	}
	for i := range addrs {
		w.name = append(w.name, &front{
			w: w, addr: netip.AddrFrom4([4]byte{203, 0, 113, byte(i + 1)}), policy: p, boxes: w.boxes,
			ready: r.IntN(2) == 0, strips: r.IntN(8) == 0, links: map[*link]struct{}{},
		})
	}
	w.plan.slow = []time.Duration{2 * time.Millisecond, 50 * time.Millisecond, slowAnswer}[r.IntN(3)]
	for i := range cmp.Or(w.plan.daemons, 1+r.IntN(4)) {
		var daemon *user
		for j := range 1 + r.IntN(3) {
			u := &user{
				w: w, rand: rand.New(rand.NewPCG(w.seed, uint64(1000+10*i+j))), role: roleBinary, id: fmt.Sprintf("home-%d", i),
				label: fmt.Sprintf("daemon%d", i), from: netip.AddrFrom4([4]byte{192, 0, 2, byte(10*i + j + 1)}),
			}
			if j == 0 {
				daemon = u
				u.moves = w.drawn(20*time.Minute, 12*time.Hour)
				w.after(between(u.rand, u.moves/4, u.moves), u.roams)
			} else {
				u.role, u.daemon, u.away, u.label = rolePhone, daemon, true, fmt.Sprintf("phone%d.%d", i, j)
			}
			w.users = append(w.users, u)
			w.after(upTo(u.rand, 30*time.Second), func() { u.dial(); u.lives() })
		}
	}
}

func (b *box) crash() {
	if p := b.listens; p != nil {
		p.kill()
		if b.again > 0 {
			b.w.after(b.again, b.start)
		}
	}
}

func (b *box) freezes(d time.Duration) {
	if p := b.listens; p != nil {
		p.freeze()
		b.w.after(d, p.resume)
	}
}

// troubles lets something go wrong every now and then, which is no split.
func (w *world) troubles(every time.Duration) {
	var next func()
	next = func() {
		w.after(between(w.rand, every/10, every), next)
		b, f := w.boxes[w.rand.IntN(len(w.boxes))], w.name[w.rand.IntN(len(w.name))]
		d := between(w.rand, time.Second, 10*time.Minute)
		switch w.rand.IntN(7) {
		case 0:
			b.crash()
		case 1:
			b.freezes(d)
		case 2:
			if p := b.listens; p != nil {
				p.stop(func() { w.after(b.again, b.start) })
			}
		case 3:
			f.reload()
		case 4:
			f.change(mood(1+w.rand.IntN(3)), d)
		case 5:
			f.strips = !f.strips
		case 6:
			b.set(wrongClocks[w.rand.IntN(len(wrongClocks))])
		}
	}
	w.after(upTo(w.rand, every), next)
}

// ---- the tests ----

func kindOf(seed uint64) kind { return kinds[seed%uint64(len(kinds))] }

// play lets a world of a seed run.
func play(t *testing.T, kind kind, seed uint64) *world {
	t.Helper()
	w := &world{seed: seed, rand: rand.New(rand.NewPCG(seed, 0)), probes: map[string]string{}, minted: map[string]mint{}}
	synctest.Test(t, func(t *testing.T) {
		w.t, w.began = t, time.Now()
		w.turn.Lock()
		w.plan.kind = kind.name
		kind.build(w)
		w.say("world", "%s, %d boxes, %d addresses, %v", kind.name, len(w.boxes), len(w.name), w.name[0].policy)
		w.turn.Unlock()
		time.Sleep(w.plan.length)
		w.turn.Lock()
		w.judge()
		w.ended = true
		for _, p := range w.ever {
			p.resume()
			if !p.gone {
				p.check.cancel()
			}
		}
		w.turn.Unlock()
		w.stopping.Wait()
		w.turn.Lock()
		for _, p := range w.ever {
			p.exit()
		}
		w.turn.Unlock()
		for _, p := range w.ever {
			p.check.wg.Wait()
		}
	})
	return w
}

// judge holds the world against its plan.
func (w *world) judge() {
	p := &w.plan
	if p.bound > 0 {
		if n := w.reported(); n.at < 0 || n.at-p.split > p.bound {
			w.broken("a split that begins at %v is not reported within %v", p.split, p.bound)
		}
	}
	if p.noLoss && len(w.wrong) > 0 {
		w.broken("%d phones are told 4404 while their daemon is online", len(w.wrong))
	}
}

// reported is the first notice of the split, at -1 for none.
func (w *world) reported() notice {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range w.noticed {
		if n.at >= w.plan.split {
			return n
		}
	}
	return notice{at: -1}
}

// TestWorldIsTheSameAgain: a seed tells everything.
func TestWorldIsTheSameAgain(t *testing.T) {
	t.Parallel()
	for seed := range fewWorlds(uint64(len(kinds)), 1) {
		first, again := play(t, kindOf(seed), seed).trace, play(t, kindOf(seed), seed).trace
		for i := range first {
			if i >= len(again) || first[i] != again[i] {
				t.Fatalf("world %d is another when it is played again, from line %d on: %q", seed, i, first[i:min(i+3, len(first))])
			}
		}
	}
}

// fewWorlds is how many worlds a run has by default. The race detector makes each ten
// times as slow.
func fewWorlds(n, underRace uint64) uint64 {
	if raceDetector() {
		return underRace
	}
	return n
}

func TestWorldCases(t *testing.T) {
	t.Parallel()
	for _, kind := range cases {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			for seed := range fewWorlds(3, 1) {
				if w := play(t, kind, seed); w.fault != "" {
					t.Errorf("seed %d: %s; its trace:\n%s", seed, w.fault, strings.Join(w.trace, "\n"))
				}
			}
		})
	}
}

func setting(name string, otherwise uint64) uint64 {
	if n, err := strconv.ParseUint(os.Getenv(name), 10, 64); err == nil {
		return n
	}
	return otherwise
}

func TestWorlds(t *testing.T) {
	n, first, only := setting("PYRYCODE_WORLDS", fewWorlds(64, 16)), setting("PYRYCODE_WORLD_SEED", 0), os.Getenv("PYRYCODE_WORLD_KIND")
	defer debug.SetGCPercent(debug.SetGCPercent(1600)) // a fifth of the time, for 70 MiB
	began := time.Now()
	var mu sync.Mutex // guards what follows
	sums := map[string]*summary{}
	var simulated time.Duration
	bad, played := 0, 0
	one := func(t *testing.T, seed uint64) {
		if !strings.Contains(kindOf(seed).name, only) {
			return
		}
		w := play(t, kindOf(seed), seed)
		mu.Lock()
		defer mu.Unlock()
		simulated += w.plan.length
		played++
		s := sums[w.plan.kind]
		if s == nil {
			s = &summary{took: map[noticer][]time.Duration{}}
			sums[w.plan.kind] = s
		}
		s.add(w)
		if w.fault != "" {
			bad++
			t.Errorf("world %d (%s): %s\nplay it again: PYRYCODE_WORLDS=1 PYRYCODE_WORLD_SEED=%[1]d go test -run '^TestWorlds$' -v .",
				seed, w.plan.kind, w.fault)
		}
		if w.fault != "" && bad <= 2 || n == 1 {
			t.Log("its trace:\n" + strings.Join(w.trace, "\n"))
		}
	}
	t.Run("all", func(t *testing.T) {
		workers := uint64(runtime.GOMAXPROCS(0))
		for i := range workers {
			t.Run(fmt.Sprint(i), func(t *testing.T) {
				t.Parallel()
				for seed := first + i; seed < first+n; seed += workers {
					one(t, seed)
				}
			})
		}
	})
	t.Logf("%d worlds, %.1f days, in %v; %d are not as they have to be",
		played, simulated.Hours()/24, time.Since(began).Round(time.Millisecond), bad)
	for _, k := range kinds {
		if s := sums[k.name]; s != nil {
			t.Logf("%-46s %v", k.name, s)
		}
	}
}

// summary is of all worlds of a kind.
type summary struct {
	worlds, wrong, lossy, left int
	split, never               int
	took                       map[noticer][]time.Duration
	sides                      []int // for what ids told
}

func (s *summary) add(w *world) {
	s.worlds++
	if s.wrong += len(w.wrong); len(w.wrong) > 0 {
		s.lossy++
	}
	if slices.ContainsFunc(w.ever, func(p *process) bool { return p.left != nil }) {
		s.left++
	}
	if w.plan.split == 0 {
		return
	}
	s.split++
	if n := w.reported(); n.at >= 0 {
		s.took[n.by] = append(s.took[n.by], n.at-w.plan.split)
		if n.by == byIDs {
			s.sides = append(s.sides, w.sides)
		}
	} else {
		s.never++
	}
}

func (s *summary) String() string {
	text := fmt.Sprintf("%5d worlds, wrong 4404: %d in %d, left in %d", s.worlds, s.wrong, s.lossy, s.left)
	for by := range noticerCount {
		if d := s.took[by]; len(d) > 0 {
			slices.Sort(d)
			text += fmt.Sprintf("; %v %d times, median %v, p99 %v, at the most %v", by, len(d),
				d[len(d)/2].Round(time.Second/10), d[len(d)*99/100].Round(time.Second), d[len(d)-1].Round(time.Second))
		}
	}
	if len(s.sides) > 0 {
		slices.Sort(s.sides)
		text += fmt.Sprintf(" (the ids after %d changes of sides, at the most %d)", s.sides[len(s.sides)/2], s.sides[len(s.sides)-1])
	}
	if s.never > 0 {
		text += fmt.Sprintf("; never noticed %d times", s.never)
	}
	return text
}
