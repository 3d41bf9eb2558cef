package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"maps"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The relay: what the public listener serves. Read from ServeHTTP down it is
// the protocol in order: the gates before an upgrade, then the two sessions.

// poller moves the bytes of the connections bound to it.
type poller interface {
	// bind gives c a socket and takes nc over; c.sock.attach starts it.
	bind(c *conn, nc net.Conn) error
	// stop ends the poller's goroutines, once its connections are gone.
	stop()
}

// mostLate is how late a timeout may be noticed: ten sweeps in the shortest of
// the contract's.
const mostLate = 500 * time.Millisecond

type relay struct {
	// Set at the start.
	o        options
	id       identity
	build    buildVersion
	log      *slog.Logger
	metrics  *metrics
	limits   *limits
	buffers  bufferPool
	instance *instanceState
	probes   *probeKeys
	loops    []poller
	fallback *goPoller
	seed     maphash.Seed
	started  time.Time
	clock    clock
	tick     int64 // nanoseconds between two looks at a connection's timeouts
	refusals logGate
	ignored  untrusted
	drops    logGate
	requests atomic.Int64 // connections that net/http serves

	registry registry
	trimmer  trimmer
	quit     chan struct{} // ends the sweep
	swept    chan struct{} // it has ended

	mu       sync.Mutex // guards what follows
	draining bool
	live     [roleCount]int        // upgrades under way and connections not yet gone
	sessions map[*session]struct{} // being read
	left     chan struct{}         // one of them is gone
}

// newRelay starts a relay, which serves until drain.
func newRelay(o options, id identity, build buildVersion, instance *instanceState, probes *probeKeys, log *slog.Logger) (*relay, error) {
	r := &relay{
		o: o, id: id, build: build, log: log, instance: instance, probes: probes,
		limits:   newLimits(o, time.Now),
		seed:     maphash.MakeSeed(),
		started:  time.Now(),
		clock:    clock{start: time.Now()},
		tick:     int64(min(mostLate, o.ping/2, o.messageTimeout/2, o.writeTimeout/2, o.closeTimeout/2, o.challengeTimeout/2)),
		left:     make(chan struct{}, 1),
		quit:     make(chan struct{}),
		swept:    make(chan struct{}),
		sessions: map[*session]struct{}{},
	}
	r.buffers.budget = r.limits.budget
	r.registry.relay = r
	r.metrics = newMetrics(id, build, instance, r.buffers.budget)
	r.fallback = newGoPoller(r)
	// One loop moves a million small frames a second; the other half of the
	// processors is for the kernel's side of the network and the handshakes.
	for range max(1, runtime.GOMAXPROCS(0)/2) {
		l, err := newPoller(r)
		if err != nil {
			for _, l := range r.loops {
				l.stop()
			}
			return nil, fmt.Errorf("starting the relay: %w", err)
		}
		r.loops = append(r.loops, l)
	}
	go r.sweep()
	return r, nil
}

// now is the relay clock: nanoseconds since the start without those in which the
// relay stood still, never 0.
func (r *relay) now() int64 {
	now, _ := r.clock.read()
	return now
}

// clock measures the time in which the process runs. Where a container's pause, a
// debugger or a machine without a free processor stops it, what peers sent
// meanwhile waits in the kernel, so no peer may be held to that time: every
// deadline is on this clock, and moves by the stall. The sweep reads it regularly,
// so that only a stall lets it go unread.
type clock struct {
	start time.Time

	mu      sync.Mutex // guards what follows
	last    int64      // nanoseconds from start to the last reading
	stalled int64      // of which the process stood still
}

// stallFrom is the time between two readings that counts as a stall. Four sweeps
// are more than a busy machine misses.
const stallFrom = 4 * mostLate

func (c *clock) read() (now, stalled int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := int64(time.Since(c.start)) + 1
	if gap := at - c.last; gap >= int64(stallFrom) && c.last > 0 {
		c.stalled += gap
	}
	c.last = at
	return at - c.stalled, c.stalled
}

// sweep looks, until the end of the drain, at what only time brings about:
// timeouts, the ends of graces, and memory that a wave has left behind.
func (r *relay) sweep() {
	defer close(r.swept)
	tick := time.NewTicker(time.Duration(r.tick))
	defer tick.Stop()
	w := r.newBatch()
	var all []*session
	told := int64(0)
	for {
		select {
		case <-r.quit:
			return
		case <-tick.C:
		}
		var stalled int64
		if w.now, stalled = r.clock.read(); stalled > told {
			r.log.Warn("the relay stood still: every deadline is moved by that", "duration", time.Duration(stalled-told))
			told = stalled
		}
		all = r.everySession(all[:0])
		for _, s := range all {
			s.checkTimeouts(w)
		}
		clear(all)
		r.registry.expire(w, w.now)
		w.flush()
		if r.trimmer.due(r.held()) {
			runtime.GC() // pools of buffers let go at the second collection only
			debug.FreeOSMemory()
		}
	}
}

// everySession appends the sessions that are being read to all.
func (r *relay) everySession(all []*session) []*session {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.AppendSeq(all, maps.Keys(r.sessions))
}

// abortAll gives every session up.
func (r *relay) abortAll() {
	for _, s := range r.everySession(nil) {
		s.abort()
	}
}

// trimmer tells when to give memory back to the system: when a wave has left, of
// connections, or of bytes that waited for slow ones. Left alone, Go does it
// minutes later, at the pace of collections that an idle relay does not have.
type trimmer struct {
	peak atomic.Int64 // of what was held since the last trim; written by the sweep
}

const (
	// trimFrom is the smallest wave worth a collection: 256 sessions.
	trimFrom = 1 << 20

	// What held counts for a session, with what it took to come and go, for a
	// connection that net/http serves, and for a server-id in grace.
	sessionCost = 4 << 10
	requestCost = 16 << 10
	graceCost   = 512
	// dailyBuffers is what buffers may come to and fall from without being a
	// wave: a few fast streams.
	dailyBuffers = 16 << 20
)

// held is how many bytes peers occupy, roughly.
func (r *relay) held() int64 {
	return int64(r.count(roleBinary)+r.count(rolePhone))*sessionCost + r.requests.Load()*requestCost +
		r.metrics.binariesInGrace.Load()*graceCost + max(0, r.buffers.budget.used()-dailyBuffers)
}

// due reports whether what is held has halved since it was most.
func (m *trimmer) due(held int64) bool {
	peak := max(m.peak.Load(), held)
	trim := peak >= trimFrom && held <= peak/2
	if trim {
		peak = held
	}
	m.peak.Store(peak)
	return trim
}

// standing is this relay's, at this moment.
func (r *relay) standing() standing {
	m := r.metrics
	users := m.connectedBinaries.Load()+m.binariesInGrace.Load() > r.registry.checks.Load()
	return standing{time.Since(r.started), users, r.instance.yields.Load()}
}

// greeting is in every answer of the WebSocket endpoints.
func (r *relay) greeting() http.Header {
	return http.Header{instanceHeader: {r.id.String()}, standingHeader: {r.standing().String()}}
}

// jitter is a random share of n.
func (r *relay) jitter(n int64) int64 { return mrand.Int64N(max(n, 1)) }

func (r *relay) newBatch() *writeBatch { return &writeBatch{relay: r, now: r.now()} }

// loop chooses the poller of a server-id: a binary and its phones share one, so
// that frames between them never change processors.
func (r *relay) loop(serverID string) poller {
	return r.loops[maphash.String(r.seed, serverID)%uint64(len(r.loops))]
}

// ---- HTTP ----

func (r *relay) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	// No answer is for later: a proxy that keeps one would show the identity of a
	// relay that is gone. And no body is read, not even past the answer.
	w.Header().Set("Cache-Control", "no-store")
	if q.ContentLength != 0 {
		w.Header().Set("Connection", "close")
	}
	switch q.URL.Path {
	case "/v1/server", "/v2/server":
		r.serve(w, q, roleBinary)
	case "/v1/client", "/v2/client":
		r.serve(w, q, rolePhone)
	case "/healthz":
		r.health(w)
	case "/readyz":
		r.ready(w)
	case "/":
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, "pyrycode-relay: connects phones to coding agents at home.\n"+
			"Frames are end-to-end encrypted; nothing to see here. Health: /healthz\n")
	default:
		http.Error(w, "no such page: endpoints are /v2/server, /v2/client, /healthz and /readyz", http.StatusNotFound)
	}
}

func (r *relay) health(w http.ResponseWriter) {
	status := "ok"
	if r.isDraining() {
		status = "draining"
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(struct {
		Status   string `json:"status"`
		Version  string `json:"version"`
		Instance string `json:"instance"`
		Check    string `json:"instance_check"`
		Binaries int64  `json:"connected_binaries"`
		Phones   int64  `json:"connected_phones"`
		Uptime   int64  `json:"uptime_seconds"`
	}{
		status, r.build.version, r.id.id, r.instance.verdict().String(),
		r.metrics.connectedBinaries.Load(), r.metrics.connectedPhones.Load(), int64(time.Since(r.started) / time.Second),
	})
}

func (r *relay) ready(w http.ResponseWriter) {
	if r.isDraining() {
		http.Error(w, "draining", http.StatusServiceUnavailable)
		return
	}
	io.WriteString(w, "ready\n")
}

// caller is what an upgrade request tells of its sender.
type caller struct {
	role     role
	serverID string
	addr     netip.Addr
	proxied  bool // the TCP connection is one of -trusted-proxies
	probe    bool // the relay itself, through its public name
}

// serve takes a request on a WebSocket endpoint through the gates and into its
// session.
func (r *relay) serve(w http.ResponseWriter, q *http.Request, role role) {
	who, refused := r.gates(q, role)
	if refused != nil {
		r.refuse(w, who, refused)
		return
	}
	nc, first, answer, err := upgrade(w, q, r.greeting())
	if err != nil {
		r.countUpgrade(who, upgradeFailed)
		r.log.Debug("upgrade failed", "leg", role, "addr", who.addr, "error", err)
		r.leave(role)
		return
	}
	r.begin(who, nc, first, answer)
}

// gates are what stands before an upgrade, in the contract's order. Whoever
// passes has to leave.
func (r *relay) gates(q *http.Request, role role) (who caller, refused *refusal) {
	who.role = role
	who.serverID = q.Header.Get("X-Pyrycode-Server")
	who.addr = clientAddr(q, r.o.trustedProxies)
	who.proxied = within(peerAddr(q), r.o.trustedProxies)
	if r.ignored.first(q, r.o.trustedProxies) {
		r.log.Warn(fmt.Sprintf("X-Forwarded-For from %s ignored: it is not in -trusted-proxies; all who come through it share one rate limit", who.addr))
	}
	if token := q.Header.Get(probeHeader); token != "" {
		who.probe = r.probes.valid(who.serverID, token)
	}
	if !r.enter(role) {
		return who, &refusal{http.StatusServiceUnavailable, upgradeDraining, "this relay is shutting down: try again", retryAfter(time.Second)}
	}
	defer func() {
		if refused != nil {
			r.gone(role)
		}
	}()
	if !who.probe {
		if ok, wait := r.limits.allow(who.addr); !ok {
			return who, &refusal{http.StatusTooManyRequests, upgradeRateLimited, "too many upgrades from this address: wait", retryAfter(wait)}
		}
	}
	if !r.limits.acquireConn() {
		return who, &refusal{http.StatusServiceUnavailable, upgradeFull, "this relay has all the connections it may have: try again", retryAfter(30 * time.Second)}
	}
	if refused = checkHeaders(q.Header, role); refused == nil {
		refused = checkHandshake(q)
	}
	if refused != nil {
		r.limits.releaseConn()
	}
	return who, refused
}

func retryAfter(d time.Duration) [2]string {
	return [2]string{"Retry-After", strconv.Itoa(max(1, int((d+time.Second-1)/time.Second)))}
}

// checkHeaders holds a request against the endpoint's own headers.
func checkHeaders(h http.Header, role role) *refusal {
	need := [...]string{"X-Pyrycode-Server", "User-Agent", "X-Pyrycode-Version"}
	for i, name := range need {
		if i == 2 && role != roleBinary {
			break
		}
		if strings.TrimSpace(h.Get(name)) == "" {
			return &refusal{http.StatusBadRequest, upgradeBadHeader, "header " + strings.ToLower(name) + " is missing", [2]string{}}
		}
	}
	if !validServerID(h.Get("X-Pyrycode-Server")) {
		return &refusal{http.StatusBadRequest, upgradeBadHeader,
			"header x-pyrycode-server must be 1 to 128 characters of A-Z a-z 0-9 . _ ~ -", [2]string{}}
	}
	return nil
}

func validServerID(id string) bool {
	if len(id) < 1 || len(id) > 128 {
		return false
	}
	for i := range len(id) {
		switch c := id[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '.', c == '_', c == '~', c == '-':
		default:
			return false
		}
	}
	return true
}

func (r *relay) refuse(w http.ResponseWriter, who caller, f *refusal) {
	r.countUpgrade(who, f.outcome)
	if more, ok := r.refusals.allow(r.now()); ok {
		r.log.Warn("upgrade refused", "leg", who.role, "addr", who.addr, "reason", f.outcome, "status", f.status, "unlogged", more)
	}
	if f.header[0] != "" {
		w.Header().Set(f.header[0], f.header[1])
	}
	if f.status == http.StatusUpgradeRequired { // it names all that is wanted (RFC 9110 §15.5.22)
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Sec-WebSocket-Version", "13")
	}
	// Whoever asks through the public name learns who refused.
	maps.Copy(w.Header(), r.greeting())
	http.Error(w, f.text, f.status)
}

// countUpgrade counts how a request ended. The relay's own check is no user.
func (r *relay) countUpgrade(who caller, o upgradeOutcome) {
	if !who.probe {
		r.metrics.upgrades[who.role][o].Add(1)
	}
}

// ---- sessions ----

// session is the connection of a binary or of a phone.
type session struct {
	conn
	role   role
	probe  bool    // of the relay's own check: no user
	id     string  // a phone's conn_id; a binary's is for the log only
	server *server // set by claim or join; nil where the join was refused

	// Guarded by server.mu.
	removed       bool        // a phone is out of server, and about to be closed
	graceQueue    *graceQueue // what a phone that joined in grace has sent since, nil for others
	contendsSince int64       // relay clock since which a binary waits for the server-id, 0 if it does not
	challengedAt  int64       // relay clock of the first challenge that a binary has not answered, 0 if none
}

// graceQueue keeps what a phone sends in grace, as frames for the binary to come.
type graceQueue struct {
	queue
	frames  uint32
	bytes   uint64 // of messages, envelope included
	payload uint64 // without it
}

// newSession makes a session that has no socket yet.
func newSession(r *relay, who caller, id string) *session {
	s := &session{role: who.role, probe: who.probe, id: id}
	s.proxied = who.proxied
	s.init(r, s, who.role, who.addr)
	return s
}

// newConnID is 128 random bits: the daemon keeps sessions by conn_id for as
// long as it lives, so none may repeat, not even after a restart of the relay.
func newConnID() string {
	var b [16]byte
	rand.Read(b[:])
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// begin makes a session of an upgraded connection: a poller takes it over, the
// registry takes it in, and then the 101 goes out, with what is queued behind it
// by now, and reading starts. first is what came behind the request.
func (r *relay) begin(who caller, nc net.Conn, first, answer []byte) {
	s := newSession(r, who, newConnID())
	if err := r.loop(who.serverID).bind(&s.conn, nc); err != nil { // the peer left just now
		r.countUpgrade(who, upgradeFailed)
		r.log.Error("taking over a connection failed", "leg", who.role, "error", err)
		nc.Close()
		r.leave(who.role)
		return
	}
	r.countUpgrade(who, upgradeAccepted)
	w := r.newBatch()
	s.greet(w, answer)
	if s.role == roleBinary {
		r.registry.claim(w, s, who.serverID)
	} else if refused, text := r.registry.join(s, who.serverID); refused != endNone {
		r.refuseSession(w, s, who.serverID, refused, text)
	} else {
		s.logConnected()
	}
	w.flush()
	r.mu.Lock()
	r.sessions[s] = struct{}{}
	r.mu.Unlock()
	s.sock.attach(first)
}

// refuseSession ends a session that the registry refused. That is a close code,
// because peers understand these as nothing else.
func (r *relay) refuseSession(w *writeBatch, s *session, serverID string, reason closeReason, text string) {
	if more, ok := r.refusals.allow(r.now()); ok {
		r.log.Warn("session refused", "leg", s.role, "conn", s.id, "server", serverID, "addr", s.addr,
			"code", reason.code(), "reason", reason, "detail", text, "unlogged", more)
	}
	s.finish(w, reason, reason.code(), text)
}

// log writes a line about a session that the registry has taken in.
func (s *session) log(msg string, attrs ...any) {
	level := slog.LevelInfo
	if s.probe {
		level = slog.LevelDebug
	}
	s.relay.log.Log(context.Background(), level, msg, append([]any{"leg", s.role, "conn", s.id, "server", s.server.id}, attrs...)...)
}

func (s *session) logConnected() { s.log("connected", "addr", s.addr) }

// message takes a message to the other side.
func (s *session) message(w *writeBatch, op byte, p []byte) {
	if s.role == rolePhone {
		s.toBinary(w, p)
	} else {
		s.toPhone(w, op, p)
	}
}

// toBinary takes a phone's message to its binary, in the envelope. The check is a
// security boundary: only exactly one JSON value can stand in it without
// changing what the binary reads.
func (s *session) toBinary(w *writeBatch, p []byte) {
	switch checkJSON(p, maxPhoneDepth) {
	case jsonBadUTF8:
		s.end(w, endInvalidUTF8)
		return
	case jsonInvalid:
		s.end(w, endNotJSON)
		return
	}
	var room [128]byte
	head := appendEnvelopeHead(room[:0], s.id)
	srv := s.server
	reason, wait := endNone, false
	srv.mu.Lock()
	b := srv.binary
	switch {
	case s.removed || !s.is(connOpen):
		// Closed from elsewhere: too late. Its notice may be queued, or the binary
		// is another one, which does not know it.
		srv.mu.Unlock()
		return
	case b != nil:
		b.mu.Lock()
		srv.mu.Unlock()
		reason = b.push(w, 0, head, p, envelopeTail)
		if wait = b.out.n >= pauseAt; wait {
			b.waiters = append(b.waiters, &s.conn)
		}
		b.mu.Unlock()
		if reason == endNone {
			w.upFrames++
			w.upBytes += int64(len(p))
		}
	case s.graceQueue != nil:
		reason = s.graceQueue.push(w, head, p)
		if wait = s.graceQueue.n >= w.relay.o.queue; wait {
			srv.waiters = append(srv.waiters, &s.conn)
		}
		srv.mu.Unlock()
	default:
		srv.mu.Unlock()
		reason = endBinaryGone
	}
	if wait {
		s.pause()
	}
	if reason != endNone {
		s.end(w, reason)
	}
}

// push queues a message for the binary that comes back, server.mu held.
func (q *graceQueue) push(w *writeBatch, head, p []byte) closeReason {
	n := len(head) + len(p) + len(envelopeTail)
	front := append(appendFrameHeader(w.front[:0], opText, n), head...)
	if !q.add(&w.relay.buffers, priorityBacklog, front, p, envelopeTail) {
		return endMemoryLimit
	}
	q.frames++
	q.bytes += uint64(n)
	q.payload += uint64(len(p))
	return endNone
}

// toPhone takes an envelope of a binary to the phone that it names.
func (s *session) toPhone(w *writeBatch, op byte, p []byte) {
	env, verdict, drop := parseEnvelope(p)
	if verdict == jsonBadUTF8 && op == opText {
		s.end(w, endInvalidUTF8)
		return
	}
	if drop != dropNone {
		s.drop(w, slog.LevelWarn, drop)
		return
	}
	srv := s.server
	srv.mu.Lock()
	ph := srv.phones[string(env.connID)]
	if ph == nil || srv.binary != s {
		srv.mu.Unlock()
		level := slog.LevelWarn
		if env.frame == nil {
			level = slog.LevelDebug // a daemon closes a phone of whose end it has just been told
		}
		s.drop(w, level, dropUnknownConn)
		return
	}
	if env.hasClose {
		// Out of the server first: what the binary itself asks for has no notice.
		w.relay.registry.remove(srv, ph)
	}
	ph.mu.Lock()
	srv.mu.Unlock()
	reason := endNone
	if env.frame != nil {
		reason = ph.push(w, w.relay.o.queue, nil, env.frame, nil)
		if reason == endNone {
			w.downFrames++
			w.downBytes += int64(len(env.frame))
		}
	}
	ph.mu.Unlock()
	switch {
	case reason != endNone:
		ph.end(w, reason)
	case env.hasClose:
		ph.finish(w, endBinaryDirective, env.closeCode, endBinaryDirective.String())
	}
}

// drop counts an envelope that goes nowhere. A push wake is not logged: it
// holds a credential, and newer daemons send it as a matter of course.
func (s *session) drop(w *writeBatch, level slog.Level, reason dropReason) {
	r := w.relay
	r.metrics.drops[reason].Add(1)
	if reason == dropPushWake || !r.log.Enabled(context.Background(), level) {
		return
	}
	if more, ok := r.drops.allow(w.now); ok {
		r.log.Log(context.Background(), level, "envelope dropped", "conn", s.id, "server", s.server.id, "reason", reason, "unlogged", more)
	}
}

// checkChallenge is handler's: the registry decides what an answer, or none, means.
func (s *session) checkChallenge(w *writeBatch, heard bool) {
	if heard {
		w.relay.registry.answered(w, s)
	} else {
		w.relay.registry.overdue(w, s)
	}
}

// ended is handler's: the registry lets go of a session whose end is decided.
func (s *session) ended(w *writeBatch, _ closeReason, code uint16) {
	switch {
	case s.server == nil: // it was refused, or ended before its claim
	case s.role == roleBinary:
		w.relay.registry.release(w, s)
	default:
		w.relay.registry.leave(w, s, code)
	}
}

// closed is handler's: the end of a connection has its count and its line in the log.
func (s *session) closed(w *writeBatch) {
	r := w.relay
	s.mu.Lock()
	reason, code, txFrames, txBytes := s.endReason, s.endCode, s.txFrames, s.txBytes
	s.mu.Unlock()
	if !s.probe {
		r.metrics.closes[s.role][reason].Add(1)
	}
	switch {
	case s.server == nil || reason == endAlreadyClaimed: // refused, which has had its line
	case s.contends():
		s.log("claim withdrawn", "addr", s.addr, "code", code, "reason", reason)
	default:
		s.log("disconnected", "duration", time.Duration(w.now-s.opened),
			"frames_in", s.rxFrames, "bytes_in", s.rxBytes, "frames_out", txFrames, "bytes_out", txBytes,
			"code", code, "reason", reason)
	}
	r.mu.Lock()
	if delete(r.sessions, s); len(r.sessions) == 0 {
		r.sessions = map[*session]struct{}{} // a map never shrinks
	}
	r.mu.Unlock()
	r.leave(s.role)
}
