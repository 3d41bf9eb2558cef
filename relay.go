package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"maps"
	"math"
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
	"sync/atomic"
	"time"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// The relay: what the public listener serves. Read from ServeHTTP down it is the
// protocol in order: the pages, the gates before an upgrade, the upgrade, the
// sessions of binaries and phones and how a message passes between them, then
// what time brings about, and the end.

type relay struct {
	// Set at the start.
	o        options
	id       identity
	me       uint64 // id.id as a number
	build    buildVersion
	log      *slog.Logger
	metrics  *metrics
	rates    *rates
	buffers  bufferPool
	instance *instanceState
	probes   *probeKeys
	history  recent[traffic]
	ended    recent[closedConnection]
	loops    []poller
	fallback *goPoller
	waker    *waker // nil without -wake-url
	seed     maphash.Seed
	started  time.Time
	registry registry
	others   others

	clock         clock
	refusals      logGate
	drops         logGate
	untrusted     untrusted
	nameSuggested atomic.Bool   // the log has said which name -public-url could be
	hints         chan struct{} // that binaries may be at another relay; the check takes them
	draining      atomic.Bool   // nothing new is let in
	peak          atomic.Int64  // what peers held at most since memory was given back; written by the sweep
	sweptAt       atomic.Int64  // nanoseconds from started to the end of the latest sweep

	stopSweep func() // waits for its end

	mu       sync.Mutex            // guards what follows
	live     [roleCount]int        // upgrades under way and connections that are not closed
	sessions map[*session]struct{} // of these, the ones that are being read
}

// newRelay starts a relay, which serves until drain.
func newRelay(o options, id identity, build buildVersion, instance *instanceState, probes *probeKeys, log *slog.Logger) (*relay, error) {
	r := makeRelay(o, id, build, instance, probes, log)
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
	r.waker = newWaker(o.wakeURL, r.metrics, log)
	r.stopSweep = r.startSweep()
	return r, nil
}

// makeRelay makes a relay in which nothing runs yet.
func makeRelay(o options, id identity, build buildVersion, instance *instanceState, probes *probeKeys, log *slog.Logger) *relay {
	r := &relay{
		o: o, id: id, build: build, log: log, instance: instance, probes: probes,
		rates:    newRates(o, time.Now),
		history:  recent[traffic]{most: samplesKept},
		ended:    recent[closedConnection]{most: closedKept},
		seed:     maphash.MakeSeed(),
		started:  time.Now(),
		clock:    clock{start: time.Now()},
		sessions: map[*session]struct{}{},
		hints:    make(chan struct{}, hintBurst),
	}
	r.instance.waits.Store(o.publicURL != nil && !o.bypass)
	r.buffers.budget = &budget{limit: o.queueTotal}
	r.registry.relay = r
	r.others.seen = map[uint64]*otherRelay{}
	r.me, _ = strconv.ParseUint(id.id, 16, 64) // it is one
	r.metrics = newMetrics(id, build, instance, r.buffers.budget)
	r.fallback = newGoPoller(r)
	return r
}

func (r *relay) newBatch() *writeBatch { return &writeBatch{relay: r, now: r.now()} }

// loop chooses the poller of a server-id: a binary and its phones share one, so
// that frames between them never change processors.
func (r *relay) loop(serverID string) poller {
	return r.loops[maphash.String(r.seed, serverID)%uint64(len(r.loops))]
}

// standing is this relay's, at this moment.
func (r *relay) standing() standing {
	m := r.metrics
	users := m.connectedBinaries.Load()+m.binariesInGrace.Load() > r.registry.checks.Load()
	return standing{r.age(), users, r.instance.yields.Load(), r.instance.waits.Load(), r.draining.Load()}
}

// greeting is in every answer of the WebSocket endpoints and of /readyz.
func (r *relay) greeting() http.Header {
	return http.Header{instanceHeader: {r.id.String()}, standingHeader: {r.standing().String()}}
}

// ---- pages ----

// endpointWords name the WebSocket endpoints, in paths and in metrics.
var endpointWords = [roleCount]string{roleBinary: "server", rolePhone: "client"}

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
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(r.health())
	case "/readyz":
		maps.Copy(w.Header(), r.greeting())
		if refused := r.refusesAll(); refused != nil {
			http.Error(w, refused.outcome.String(), refused.status)
		} else {
			io.WriteString(w, "ready\n")
		}
	case "/":
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, "pyrycode-relay: connects phones to coding agents at home.\n"+
			"Frames are end-to-end encrypted; nothing to see here. Health: /healthz\n")
	default:
		http.Error(w, "no such page: endpoints are /v2/server, /v2/client, /healthz and /readyz", http.StatusNotFound)
	}
}

// healthReport is /healthz.
type healthReport struct {
	Status   string `json:"status"` // ok or draining
	Version  string `json:"version"`
	Instance string `json:"instance"`
	Check    string `json:"instance_check"`        // a publicVerdict
	Unseen   int64  `json:"instance_check_unseen"` // addresses
	Split    string `json:"split_seen"`            // an evidence
	Binaries int64  `json:"connected_binaries"`
	Phones   int64  `json:"connected_phones"`
	Uptime   int64  `json:"uptime_seconds"`
}

func (r *relay) health() healthReport {
	status := "ok"
	if r.draining.Load() {
		status = "draining"
	}
	return healthReport{
		status, r.build.version, r.id.id, r.instance.verdict().String(), r.instance.unseen.Load(), r.others.verdict(r.age()).String(),
		r.metrics.connectedBinaries.Load(), r.metrics.connectedPhones.Load(), int64(r.age() / time.Second),
	}
}

// ---- gates ----

// caller is what an upgrade request tells of its sender.
type caller struct {
	role     role
	serverID string
	addr     netip.Addr
	proxied  bool // the TCP connection is one of -trusted-proxies
	probe    bool // the relay itself, through its public name
}

// refusal is an HTTP answer in place of a 101. Its text is for a person.
type refusal struct {
	status  int
	outcome upgradeOutcome
	text    string
	wait    time.Duration // of a 429 or 503: when to ask again
}

// serve takes a request on a WebSocket endpoint through the gates and into its
// session.
func (r *relay) serve(w http.ResponseWriter, q *http.Request, role role) {
	peer := peerAddr(q.RemoteAddr)
	from := caller{
		role: role, serverID: q.Header.Get("X-Pyrycode-Server"),
		addr: clientAddr(q, r.o.trustedProxies), proxied: within(peer, r.o.trustedProxies),
	}
	if token := q.Header.Get(probeHeader); token != "" {
		from.probe = r.probes.valid(from.serverID, token)
	}
	if !from.proxied && len(q.Header["X-Forwarded-For"]) > 0 && r.untrusted.first(peer) {
		r.log.Warn(fmt.Sprintf("X-Forwarded-For from %s ignored: it is not in -trusted-proxies; "+
			"all who come through it share one rate limit", from.addr))
	}
	if refused := r.gates(q, from); refused != nil {
		r.refuse(w, from, refused)
		return
	}
	nc, first, answer, err := upgrade(w, q, r.greeting())
	if err != nil {
		r.countUpgrade(from, upgradeFailed)
		r.log.Debug("upgrade failed", "leg", role, "addr", from.addr, "error", err)
		r.leave(role)
		return
	}
	if role == roleBinary && from.proxied && r.o.publicURL == nil {
		r.suggestName(q)
	}
	r.begin(newSession(r, from, r.newConnID()), from, nc, first, answer)
}

// hostName is a name with a dot, and perhaps a port.
var hostName = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9](:[0-9]{1,5})?$`)

// suggestName says once by which name a binary came through a proxy. It is what a
// stranger has sent, so a person has to decide: the relay doesn't dial it.
func (r *relay) suggestName(q *http.Request) {
	name := strings.ToLower(cmp.Or(q.Header.Get("X-Forwarded-Host"), q.Host))
	if len(name) <= 253 && hostName.MatchString(name) && !r.nameSuggested.Swap(true) {
		r.log.Info(fmt.Sprintf("a binary came through a proxy by the name %q: if that is this relay's, -public-url wss://%[1]s "+
			"has the relay check that no second one answers there", name))
	}
}

// gates are what stands before an upgrade, in the contract's order. A request that
// passes them is counted until leave.
func (r *relay) gates(q *http.Request, from caller) *refusal {
	if refused := r.refusesAll(); refused != nil && (refused != &refusedChecking || !from.probe) {
		return refused
	}
	if !from.probe {
		if ok, wait := r.rates.allow(from.addr); !ok {
			return &refusal{http.StatusTooManyRequests, upgradeRateLimited, "too many upgrades from this address: wait", wait}
		}
	}
	if refused := r.enter(from.role); refused != nil {
		return refused
	}
	refused := checkHeaders(q.Header, from.role)
	if refused == nil {
		refused = checkHandshake(q)
	}
	if refused != nil {
		r.leave(from.role)
	}
	return refused
}

var (
	refusedDraining = refusal{http.StatusServiceUnavailable, upgradeDraining, "this relay is shutting down: try again", time.Second}
	refusedChecking = refusal{http.StatusServiceUnavailable, upgradeChecking,
		"this relay makes sure that it is the only one first: try again", time.Second}
	refusedFull = refusal{http.StatusServiceUnavailable, upgradeFull,
		"this relay has all the connections it may have: try again", 30 * time.Second}
)

// refusesAll is why nobody is let in, if that is so.
func (r *relay) refusesAll() *refusal {
	switch {
	case r.draining.Load():
		return &refusedDraining
	case r.instance.waits.Load():
		return &refusedChecking
	}
	return nil
}

// enter counts an upgrade in.
func (r *relay) enter(role role) *refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.draining.Load():
		return &refusedDraining
	case r.live[roleBinary]+r.live[rolePhone] >= r.o.maxConnections:
		return &refusedFull
	}
	r.live[role]++
	return nil
}

// leave undoes enter.
func (r *relay) leave(role role) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.live[role]--
}

func (r *relay) count(role role) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.live[role]
}

func (r *relay) connections() int { return r.count(roleBinary) + r.count(rolePhone) }

var serverIDPattern = regexp.MustCompile(`^[A-Za-z0-9._~-]{1,128}$`)

// checkHeaders holds a request against the endpoint's own headers.
func checkHeaders(h http.Header, role role) *refusal {
	need := []string{"X-Pyrycode-Server", "User-Agent", "X-Pyrycode-Version"}
	if role == rolePhone {
		need = need[:2]
	}
	for _, name := range need {
		if strings.TrimSpace(h.Get(name)) == "" {
			return &refusal{http.StatusBadRequest, upgradeBadHeader, "header " + strings.ToLower(name) + " is missing", 0}
		}
	}
	if !serverIDPattern.MatchString(h.Get("X-Pyrycode-Server")) {
		return &refusal{http.StatusBadRequest, upgradeBadHeader, "header x-pyrycode-server must be 1 to 128 characters of A-Z a-z 0-9 . _ ~ -", 0}
	}
	return nil
}

// checkHandshake is the last gate before the 101 (RFC 6455 §4.2). Everything that
// x/net/websocket would refuse with raw bytes, or wrongly accept, is refused here
// as a proper HTTP answer.
func checkHandshake(q *http.Request) *refusal {
	h := q.Header
	bad := func(status int, text string) *refusal { return &refusal{status, upgradeBadRequest, text, 0} }
	switch version, key := h["Sec-Websocket-Version"], h["Sec-Websocket-Key"]; {
	case q.Method != http.MethodGet:
		return bad(http.StatusMethodNotAllowed, "this is a websocket endpoint: use GET")
	case q.ProtoMajor != 1 || q.ProtoMinor < 1:
		return bad(http.StatusUpgradeRequired, "websocket upgrades need HTTP/1.1")
	case !hasToken(h["Connection"], "upgrade") || !hasToken(h["Upgrade"], "websocket"):
		return bad(http.StatusUpgradeRequired,
			"this is a websocket endpoint: no upgrade was asked for (does the proxy in front forward Upgrade and Connection?)")
	case len(version) != 1 || version[0] != "13":
		return bad(http.StatusUpgradeRequired, "only websocket version 13 is spoken here")
	case q.ContentLength != 0:
		return bad(http.StatusBadRequest, "an upgrade request has no body")
	case len(key) != 1 || !validKey(key[0]):
		return bad(http.StatusBadRequest, "sec-websocket-key must be one base64 value of 16 bytes")
	}
	return nil
}

// hasToken looks for a token in a list header (RFC 9110 §5.6.1).
func hasToken(lines []string, token string) bool {
	return slices.ContainsFunc(strings.Split(strings.Join(lines, ","), ","), func(t string) bool {
		return strings.EqualFold(strings.TrimSpace(t), token)
	})
}

func validKey(key string) bool {
	b, err := base64.StdEncoding.Strict().DecodeString(key)
	return err == nil && len(b) == 16 && len(key) == base64.StdEncoding.EncodedLen(16)
}

func (r *relay) refuse(w http.ResponseWriter, from caller, f *refusal) {
	r.countUpgrade(from, f.outcome)
	if more, ok := r.refusals.allow(r.now()); ok {
		r.log.Warn("upgrade refused", "leg", from.role, "addr", from.addr, "reason", f.outcome, "status", f.status, "unlogged", more)
	}
	h := w.Header()
	switch f.status {
	case http.StatusMethodNotAllowed:
		h.Set("Allow", "GET")
	case http.StatusUpgradeRequired: // it names all that is wanted (RFC 9110 §15.5.22)
		h.Set("Upgrade", "websocket")
		h.Set("Sec-WebSocket-Version", "13")
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		h.Set("Retry-After", strconv.Itoa(max(1, int((f.wait+time.Second-1)/time.Second))))
	}
	maps.Copy(h, r.greeting()) // through the public name this tells which relay refused
	http.Error(w, f.text, f.status)
}

// countUpgrade counts how a request ended. The relay's own check is no user.
func (r *relay) countUpgrade(from caller, o upgradeOutcome) {
	if !from.probe {
		r.metrics.upgrades[from.role][o].Add(1)
	}
}

// ---- upgrade ----

// upgrade takes the connection of a checked request from net/http for good, so
// that it holds none of net/http's memory, and lets x/net write the answer: 101
// and extra headers. The answer is for the caller to send, once the peer is
// registered, since a peer that has seen a 101 counts on that. first is what the
// peer had already sent behind its request.
func upgrade(w http.ResponseWriter, q *http.Request, extra http.Header) (nc net.Conn, first, answer []byte, err error) {
	nc, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, nil, fmt.Errorf("taking the connection over: %w", err)
	}
	if g, ok := nc.(*httpConn); ok {
		nc = g.Conn
	}
	read, _ := rw.Reader.Peek(rw.Reader.Buffered())
	first = append(first, read...) // none of the large buffer that it stands in
	// The request that x/net sees has nothing in it but the handshake: it would act
	// on the rest, and answer to a subprotocol.
	slim := &http.Request{Method: http.MethodGet, Host: "relay", URL: &url.URL{Path: "/"}, Header: http.Header{
		"Connection":            {"Upgrade"},
		"Upgrade":               {"websocket"},
		"Sec-Websocket-Version": {"13"},
		"Sec-Websocket-Key":     q.Header["Sec-Websocket-Key"],
	}}
	var h answerWriter
	opened := false
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error { c.Header = extra; return nil },
		Handler:   func(*websocket.Conn) { opened = true },
	}.ServeHTTP(&h, slim)
	if !opened {
		nc.Close()
		return nil, nil, nil, errors.New("x/net/websocket refused a handshake that was checked")
	}
	return nc, first, h.answer.Bytes(), nil
}

// answerWriter is what x/net takes for a response and its connection. It keeps what
// x/net writes.
type answerWriter struct {
	http.ResponseWriter // none: x/net calls Hijack only
	net.Conn            // none: x/net calls Write and Close only
	answer              bytes.Buffer
}

func (h *answerWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	// The 101 is about 250 bytes.
	return h, bufio.NewReadWriter(bufio.NewReaderSize(strings.NewReader(""), 16), bufio.NewWriterSize(h, 512)), nil
}

func (h *answerWriter) Write(p []byte) (int, error) { return h.answer.Write(p) }
func (h *answerWriter) Close() error                { return nil }

// ---- sessions ----

// session is the connection of a binary or of a phone.
type session struct {
	conn
	id     string  // a phone's conn_id; a binary's is for the log only
	server *server // set by claim or join; nil where the join was refused
	role   role
	probe  bool // of the relay's own check: no user

	// Guarded by server.mu.
	removed       bool        // a phone is out of server, and about to be closed
	graceQueue    *graceQueue // what a phone that joined in grace has sent since, nil for others
	contendsSince int64       // relay clock since which a binary waits for the server-id, 0 if it does not
	challengedAt  int64       // relay clock of the first challenge that a binary has not answered, 0 if none
}

// newSession makes a session that has no socket yet.
func newSession(r *relay, from caller, id string) *session {
	s := &session{role: from.role, probe: from.probe, id: id}
	s.proxied = from.proxied
	s.init(r, s, from.role, from.addr)
	return s
}

// begin takes an upgraded connection into its session: a poller takes it over, the
// registry takes it in, and then the 101 goes out, with what is queued behind it
// by now, and reading starts. first is what came behind the request.
func (r *relay) begin(s *session, from caller, nc net.Conn, first, answer []byte) {
	if err := r.loop(from.serverID).bind(&s.conn, nc); err != nil { // the peer left just now
		r.countUpgrade(from, upgradeFailed)
		r.log.Error("taking over a connection failed", "leg", from.role, "error", err)
		nc.Close()
		r.leave(from.role)
		return
	}
	r.countUpgrade(from, upgradeAccepted)
	w := r.newBatch()
	s.greet(w, answer)
	if s.role == roleBinary {
		r.registry.claim(w, s, from.serverID)
	} else if refused, text := r.registry.join(s, from.serverID); refused != endNone {
		r.refuseSession(w, s, from.serverID, refused, text)
	} else {
		s.log("connected", "addr", s.addr)
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
	s.startCloseWith(w, reason, reason.code(), text)
}

// log writes a line about a session that the registry has taken in.
func (s *session) log(msg string, attrs ...any) {
	level := slog.LevelInfo
	if s.probe {
		level = slog.LevelDebug
	}
	s.relay.log.Log(context.Background(), level, msg, append([]any{"leg", s.role, "conn", s.id, "server", s.server.id}, attrs...)...)
}

// ---- messages between a binary and its phones ----

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
	if !validJSON(p, maxPhoneDepth) {
		reason := endNotJSON
		if !utf8.Valid(p) {
			reason = endInvalidUTF8
		}
		s.startClose(w, reason)
		return
	}
	var room [128]byte
	head := appendEnvelopeHead(room[:0], s.id)
	srv := s.server
	reason, wait := endNone, false
	var behind *conn
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
		behind = &b.conn
		reason, wait = b.pushFrom(w, &s.conn, head, p, envelopeTail)
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
		s.pause(behind)
	}
	if reason != endNone {
		s.startClose(w, reason)
	}
}

// graceQueue keeps what a phone sends in grace, as frames for the binary to come.
type graceQueue struct {
	queue
	frames  uint32
	bytes   uint64 // of messages, envelope included
	payload uint64 // without it
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
	env, drop := parseEnvelope(p)
	if drop == dropNotEnvelope && op == opText && !utf8.Valid(p) {
		s.startClose(w, endInvalidUTF8)
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
		s.strange(env.connID)
		level := slog.LevelWarn
		if env.frame == nil {
			level = slog.LevelDebug // a daemon closes a phone of whose end it has just been told
		}
		s.drop(w, level, dropUnknownConn)
		return
	}
	if env.closeCode != 0 {
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
		ph.startClose(w, reason)
	case env.closeCode != 0:
		ph.startCloseWith(w, endBinaryDirective, env.closeCode, endBinaryDirective.String())
	}
}

// drop counts an envelope that goes nowhere. A push wake is not logged: it
// holds a credential, and newer daemons send it as a matter of course.
func (s *session) drop(w *writeBatch, level slog.Level, reason dropReason) {
	r := w.relay
	r.metrics.drops[reason].Add(1)
	if reason == dropPushWake {
		r.waker.wake(s.server.id, w.now)
		return
	}
	if !r.log.Enabled(context.Background(), level) {
		return
	}
	if more, ok := r.drops.allow(w.now); ok {
		r.log.Log(context.Background(), level, "envelope dropped", "conn", s.id, "server", s.server.id, "reason", reason, "unlogged", more)
	}
}

// ---- the end of a session ----

// unregister is handler's: the registry lets go of a session whose end is decided.
func (s *session) unregister(w *writeBatch, _ closeReason, code uint16) {
	switch {
	case s.server == nil: // it was refused, or ended before its claim
	case s.role == roleBinary:
		w.relay.registry.unregisterBinary(w, s)
	default:
		w.relay.registry.unregisterPhone(w, s, code)
	}
}

// closed is handler's: the end of a connection has its count and its line in the log.
func (s *session) closed(w *writeBatch) {
	r := w.relay
	s.mu.Lock()
	reason, code, txFrames, txBytes := s.endReason, s.endCode, s.txFrames, s.txBytes
	s.mu.Unlock()
	lasted, server := time.Duration(w.now-s.opened), ""
	if s.server != nil {
		server = shortID(s.server.id)
	}
	if !s.probe {
		r.metrics.closes[s.role][reason].Add(1)
		r.ended.add(closedConnection{time.Now().UTC(), s.role.String(), server, lasted.Milliseconds(),
			s.rxFrames, s.rxBytes, txFrames, txBytes, code, reason.String()})
	}
	switch {
	case s.server == nil || reason == endAlreadyClaimed: // refused, which has had its line
	case s.contends():
		s.log("claim withdrawn", "addr", s.addr, "code", code, "reason", reason)
	default:
		s.log("disconnected", "duration", lasted,
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

// everySession appends the sessions that are being read to all.
func (r *relay) everySession(all []*session) []*session {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.AppendSeq(slices.Grow(all, len(r.sessions)), maps.Keys(r.sessions))
}

// ---- the clock and the sweep ----

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

const (
	// mostLate is how late the sweep may notice a timeout: a tenth of the shortest
	// of the contract's.
	mostLate = 500 * time.Millisecond
	// stallFrom is the time between two readings that counts as a stall. Four sweeps
	// are more than a busy machine misses.
	stallFrom = 4 * mostLate
	// drainPause is how late a drain may notice that the last phone, or the last binary,
	// is gone.
	drainPause = 10 * time.Millisecond
	// trimFrom is the smallest wave of peers whose memory is worth a collection: 256
	// sessions.
	trimFrom = 1 << 20

	// What held counts for a session, with what it took to come and go, and for a
	// server-id in grace.
	sessionCost = 4 << 10
	graceCost   = 512
	// dailyBuffers is what buffers may come to and fall from without being a
	// wave: a few fast streams.
	dailyBuffers = 16 << 20
)

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

// now is the relay clock: nanoseconds since the start without those in which the
// relay stood still, never 0.
func (r *relay) now() int64 {
	now, _ := r.clock.read()
	return now
}

// startSweep has the relay look, until stop, at what only time brings about: timeouts,
// the ends of graces, and memory that a wave has left behind.
func (r *relay) startSweep() (stop func()) {
	o := &r.o
	every := min(mostLate, o.ping/2, o.messageTimeout/2, o.writeTimeout/2, o.closeTimeout/2, o.challengeTimeout/2)
	w := r.newBatch()
	var all []*session
	var told int64     // of the stall that the log has told of
	var before traffic // at the last sample
	sampled := w.now
	return repeat(every, nil, func(bool) {
		var stalled int64
		if w.now, stalled = r.clock.read(); stalled > told {
			r.log.Warn("the relay stood still: every deadline is moved by that", "duration", time.Duration(stalled-told))
			told = stalled
		}
		all = r.everySession(all[:0])
		for _, s := range all {
			s.checkTimeouts(w)
			w.flush() // else what a loop queues behind a ping would wait for the end of the sweep
		}
		clear(all)
		r.registry.expire(w, w.now)
		w.flush()
		if passed := time.Duration(w.now - sampled); passed > sampleEvery-every/2 {
			now := r.metrics.traffic()
			r.history.add(now.perSecond(before, passed))
			before, sampled = now, w.now
		}
		r.trim()
		r.sweptAt.Store(int64(time.Since(r.started)))
	})
}

// repeat calls do every so often, and at each signal of asked, in a goroutine of its own,
// until stop, which waits for the last call to return.
func repeat(every time.Duration, asked <-chan os.Signal, do func(asked bool)) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				do(false)
			case <-asked:
				do(true)
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// turning reports whether all that must not hang turns: the sweep, which takes the
// locks of every session, and each loop since this was last asked.
func (r *relay) turning() bool {
	turning := time.Since(r.started)-time.Duration(r.sweptAt.Load()) < stallFrom
	for _, l := range r.loops {
		turning = l.turned() && turning
	}
	return turning
}

// trim gives memory back to the system once what peers hold has halved. Left
// alone, Go does it minutes later, at the pace of collections that an idle relay
// does not have.
func (r *relay) trim() {
	if r.halved(r.heldBytes()) {
		runtime.GC() // pools of buffers let go at the second collection only
		debug.FreeOSMemory()
	}
}

// halved reports whether held is half of the peak, which begins anew then.
func (r *relay) halved(held int64) bool {
	peak := max(r.peak.Load(), held)
	halved := peak >= trimFrom && held <= peak/2
	if halved {
		peak = held
	}
	r.peak.Store(peak)
	return halved
}

// heldBytes is how many bytes peers hold, roughly.
func (r *relay) heldBytes() int64 {
	return int64(r.connections())*sessionCost + r.metrics.binariesInGrace.Load()*graceCost +
		max(0, r.buffers.budget.used()-dailyBuffers)
}

// ---- drain ----

// drain says goodbye to every phone, then to every binary, and ends the relay.
// Connections that are left after patience are cut off. Afterwards no goroutine of
// the relay is left. It is called once.
func (r *relay) drain(patience time.Duration) {
	r.draining.Store(true)
	// Again and again, for connections that were between request and session as well.
	for end := time.Now().Add(patience); r.connections() > 0 && time.Now().Before(end); time.Sleep(drainPause) {
		// A phone that does not answer must not cost the binaries their word.
		binaries := r.count(rolePhone) == 0 || time.Until(end) < patience/2
		w := r.newBatch()
		for _, s := range r.everySession(nil) {
			if s.role == rolePhone || binaries {
				s.startClose(w, endShutdown)
			}
		}
		w.flush()
	}
	for ; r.connections() > 0; time.Sleep(drainPause) {
		r.abortAll()
	}
	r.stopSweep()
	r.registry.expire(r.newBatch(), math.MaxInt64)
	for _, p := range r.loops {
		p.stop()
	}
	r.fallback.stop()
	r.waker.stop()
}

// abortAll gives every session up.
func (r *relay) abortAll() {
	for _, s := range r.everySession(nil) {
		s.fail()
	}
}
