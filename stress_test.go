package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The stress run: dozens of daemons and hundreds of phones do to the relay what
// peers do, all at once, and each knows what the contract says must come of it.
// A second run does the same to claims alone.

const (
	stressServers = 24
	stressPhones  = 10 // for each server
)

// stressNumber reads a variable that sets the run's size or seed.
func stressNumber(t *testing.T, name string, otherwise uint64) uint64 {
	v := os.Getenv(name)
	if v == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// stressSeed is logged, so that a failure can be run again. The order of things
// follows from it, as far as the scheduler lets it.
func stressSeed(t *testing.T) uint64 {
	seed := stressNumber(t, "PYRYCODE_STRESS_SEED", uint64(time.Now().UnixNano()))
	t.Logf("PYRYCODE_STRESS_SEED=%d", seed)
	return seed
}

// TestStress takes PYRYCODE_STRESS_SECONDS for its four runs together. They have
// a process of their own, in which no other test opens files or goroutines.
func TestStress(t *testing.T) {
	if os.Getenv("PYRYCODE_STRESS_CHILD") == "" {
		t.Parallel()
		// A run that hangs ends with its stacks, before this process does.
		limit := time.Hour
		if end, ok := t.Deadline(); ok {
			limit = time.Until(end) * 9 / 10
		}
		c := exec.Command(os.Args[0], "-test.run=^TestStress$", "-test.v", "-test.timeout="+limit.String())
		c.Env = append(os.Environ(), "PYRYCODE_STRESS_CHILD=1", "GOMAXPROCS=4") // for two loops
		out, err := c.CombinedOutput()
		if t.Logf("%s", out); err != nil {
			t.Error(err)
		}
		return
	}
	seed := stressSeed(t)
	seconds := stressNumber(t, "PYRYCODE_STRESS_SECONDS", 2)
	for _, limits := range []string{"generous", "tiny"} {
		for _, poller := range slices.Sorted(maps.Keys(listeners)) {
			t.Run(limits+"/"+poller, func(t *testing.T) {
				runStress(t, limits == "tiny", poller, seed, time.Duration(seconds)*time.Second/time.Duration(2*len(listeners)))
			})
		}
	}
}

// stressListener listens with send buffers that a peer's silence fills soon.
func stressListener(t *testing.T, poller string) net.Listener {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = setSendBuffer(syscall.SetsockoptInt, fd) }), err)
	}}
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(poller, "goroutines") {
		ln = plainListener(ln)
	}
	if strings.Contains(poller, "TLS") {
		ln = securedListener{ln}
	}
	return ln
}

// setSendBuffer takes the system's call, in which a socket's type differs.
func setSendBuffer[socket ~int | ~uintptr](set func(s socket, level, opt, value int) error, fd uintptr) error {
	return set(socket(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, 64<<10)
}

// stressOptions are generous: a peer that behaves runs into no limit, however
// busy the machine is. Or they are tiny, and limits are reached all the time.
func stressOptions(tiny bool) options {
	o := testOptions()
	o.queue = 256 << 10
	if tiny {
		o.maxFrame, o.queue, o.queueTotal = 32<<10, 8<<10, 384<<10
		o.maxPhones, o.maxConnections = 3, stressServers*stressPhones/2
		o.ping, o.messageTimeout, o.writeTimeout = time.Second, 500*time.Millisecond, 500*time.Millisecond
		o.closeTimeout = 300 * time.Millisecond
		o.grace, o.challengeTimeout = 200*time.Millisecond, 100*time.Millisecond
	}
	return o
}

// stressRun is one relay with all that happens to it.
type stressRun struct {
	t       *testing.T
	r       *testRelay
	o       options
	tiny    bool // limits are reached, so no end is certain
	servers []*stressServer

	quit    chan struct{} // no new phones connect
	ending  atomic.Bool   // the relay drains
	fails   atomic.Int64
	serial  atomic.Int64
	full    atomic.Int64 // upgrades refused by -max-connections
	crowded atomic.Int64 // phones refused by -max-phones
	planned sync.Map     // plan → *atomic.Int64: phones that ended exactly as planned

	// Of the envelopes that were sent to be dropped, those that must have arrived, and all.
	dropsLeast, dropsMost [dropReasonCount]atomic.Int64
}

func runStress(t *testing.T, tiny bool, poller string, seed uint64, d time.Duration) {
	ln := stressListener(t, poller)
	filesBefore, _ := openFiles()
	goroutinesBefore := runtime.NumGoroutine()
	run := &stressRun{t: t, o: stressOptions(tiny), tiny: tiny, quit: make(chan struct{})}
	run.r = startRelayOn(t, run.o, ln)
	var daemons, phones sync.WaitGroup
	phonesGone := make(chan struct{})
	for i := range stressServers {
		s := &stressServer{run: run, id: fmt.Sprintf("home-%d", i), epoch: 1,
			byConn: map[string]*phoneRecord{}, byName: map[string]*phoneRecord{}, silent: map[int]int{}}
		run.servers = append(run.servers, s)
		daemons.Go(func() { s.runDaemons(rand.New(rand.NewPCG(seed, uint64(i))), phonesGone) })
		for k := range stressPhones {
			phones.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(1000*(i+1)+k)))
				plan := (i*stressPhones + k) % len(stressPlans)
				for !isClosed(run.quit) {
					if ph := newStressPhone(s, rng); ph.connect() {
						ph.follow(stressPlans[plan])
					} else {
						time.Sleep(time.Millisecond) // full: the next one, a little later
					}
					plan = rng.IntN(len(stressPlans))
				}
			})
		}
	}
	time.AfterFunc(d, func() { close(run.quit) })
	<-run.quit
	if tiny { // the relay ends with all of them there
		run.ending.Store(true)
		run.r.stop()
	}
	phones.Wait()
	close(phonesGone)
	daemons.Wait()
	run.r.stop()
	run.checkBooks()
	eventually(t, "every file is closed", func() bool {
		n, _ := openFiles()
		return n <= filesBefore
	})
	for end := time.Now().Add(patience); runtime.NumGoroutine() > goroutinesBefore; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			b := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), goroutinesBefore, b[:runtime.Stack(b, true)])
		}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

func (run *stressRun) fail(format string, args ...any) {
	if run.fails.Add(1) <= 20 {
		run.t.Errorf(format, args...)
	}
}

// waitUntil is eventually for daemons and phones: it reports, and they go on.
func (run *stressRun) waitUntil(what string, cond func() bool) {
	for end := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			run.fail("%s: not within %v", what, patience)
			return
		}
	}
}

// checkBooks compares the relay's books at its end with what its peers did.
func (run *stressRun) checkBooks() {
	t, m := run.t, run.r.metrics
	for name, n := range map[string]int64{
		"connected binaries": m.connectedBinaries.Load(), "binaries in grace": m.binariesInGrace.Load(),
		"connected phones": m.connectedPhones.Load(), "queued bytes": m.budget.used(),
		"connections": int64(run.r.count(roleBinary) + run.r.count(rolePhone)),
	} {
		if n != 0 {
			t.Errorf("%s: %d are left", name, n)
		}
	}
	run.r.registry.servers.Range(func(id, _ any) bool {
		t.Errorf("server-id %v is left", id)
		return true
	})
	for role := range roleCount {
		ends := int64(0)
		for reason := range closeReasonCount {
			ends += m.closes[role][reason].Load()
		}
		if begun := m.upgrades[role][upgradeAccepted].Load(); ends != begun {
			t.Errorf("%s: %d connections began and %d ended", role, begun, ends)
		}
	}
	for reason := range dropReasonCount {
		n, least, most := m.drops[reason].Load(), run.dropsLeast[reason].Load(), run.dropsMost[reason].Load()
		if n < least || n > most && reason != dropUnknownConn { // phones leave while frames for them are on their way
			t.Errorf("%d envelopes dropped for %q, want %d to %d", n, reason, least, most)
		}
	}
	many := m.upgrades[rolePhone][upgradeAccepted].Load() > 40*int64(len(stressPlans))
	var counts []string
	for _, p := range stressPlans {
		n := run.plannedEnds(p.name).Load()
		counts = append(counts, fmt.Sprintf("%s %d", p.name, n))
		// With tiny limits, or where few phones came, a plan may never come to its end.
		if n == 0 && !run.tiny && many {
			t.Errorf("no phone came to the end of plan %q", p.name)
		}
	}
	if run.tiny && many && (run.full.Load() == 0 || run.crowded.Load() == 0) {
		t.Errorf("-max-connections refused %d, -max-phones %d; want some of both", run.full.Load(), run.crowded.Load())
	}
	t.Logf("%d phones, %d daemons, %d frames up, %d down, %d+%d refused; to the end as planned: %s",
		m.upgrades[rolePhone][upgradeAccepted].Load(), m.upgrades[roleBinary][upgradeAccepted].Load(),
		m.framesUp.Load(), m.framesDown.Load(), run.full.Load(), run.crowded.Load(), strings.Join(counts, ", "))
}

func (run *stressRun) plannedEnds(plan string) *atomic.Int64 {
	n, _ := run.planned.LoadOrStore(plan, new(atomic.Int64))
	return n.(*atomic.Int64)
}

// mayEnd reports whether a connection may have ended so, although its own plan
// was another end. unsteady: its daemon was not there all the time.
func (run *stressRun) mayEnd(code int, text string, unsteady bool) bool {
	is := func(reasons ...closeReason) bool {
		return slices.ContainsFunc(reasons, func(r closeReason) bool {
			return code == int(r.code()) && strings.HasPrefix(text, r.String())
		})
	}
	switch {
	case run.ending.Load() && (code == 1006 || is(endShutdown)):
		return true
	case run.tiny:
		return code == 1006 || is(endMemoryLimit, endBacklogFull, endWriteTimeout, endHeartbeat, endMessageTimeout, endTooManyPhones,
			endNeverSeen, endLastHeld, endBinaryGone, endGraceExpired, endReclaimed, endReplaced, endTakenOver, endAlreadyClaimed)
	}
	return unsteady && is(endNeverSeen, endLastHeld, endBinaryGone, endGraceExpired, endReclaimed, endReplaced)
}

// ---- messages ----

// stressMessage is what the receiver needs to make a message again. What it
// holds follows from its sender and from how many that sent before.
type stressMessage struct {
	From string `json:"from"`
	N    int    `json:"n"`
	Do   string `json:"do"` // what a phone asks of its daemon
	Size int    `json:"size"`
	Body string `json:"body"`
}

var stressPieces = [...]string{"a", "Z", " ", "é", "☃", "𝄞", `\"`, `\\`, `\u2028`, `{`, `}]`, `,`, "0123456789abcdef"}

func makeMessage(from string, n int, do string, size int) []byte {
	h := fnv.New64a()
	fmt.Fprint(h, from, n)
	rng := rand.New(rand.NewPCG(h.Sum64(), uint64(size)))
	b := fmt.Appendf(nil, `{"from":%q,"n":%d,"do":%q,"size":%d,"body":"`, from, n, do, size)
	for end := len(b) + size; len(b) < end; {
		b = append(b, stressPieces[rng.IntN(len(stressPieces))]...)
		if rng.IntN(4) == 0 && end-len(b) > 64 { // long strings take another way through the scanner
			b = append(b, strings.Repeat("x", rng.IntN(end-len(b)-16))...)
		}
	}
	return append(b, `" , "end" : [ 1.50 , null ] }`...)
}

// checkMessage compares a message with the one that it has to be.
func checkMessage(b []byte, from string, n int) (m stressMessage, err error) {
	if err = json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("message %.200q: %w", b, err)
	}
	if m.From != from || m.N != n {
		return m, fmt.Errorf("message %d of %q, want %d of %q", m.N, m.From, n, from)
	}
	if !bytes.Equal(b, makeMessage(from, n, m.Do, m.Size)) {
		return m, fmt.Errorf("message %d of %q is not what was sent", n, from)
	}
	return m, nil
}

// randomSize is mostly small, sometimes past each of the relay's thresholds.
func (run *stressRun) randomSize(rng *rand.Rand) int {
	sizes := [...]int{0, 30, 120, 200, 200, 1000, 4000, 9000, 20000, 70000}
	return min(rng.IntN(sizes[rng.IntN(len(sizes))]+1), run.largest())
}

// largest is the largest body of a message that fits -max-frame in every envelope.
func (run *stressRun) largest() int { return run.o.maxFrame - 1000 }

// ---- connections ----

// stressConn is a client with a reader of its own, which several goroutines may
// write to.
type stressConn struct {
	*wsClient
	wmu  sync.Mutex
	done chan struct{} // the reader has ended, and what follows is set
	code int           // 1006: no close frame
	text string        // reason of the close frame

	pmu   sync.Mutex
	pause *readPause // guarded by pmu

	pong func(p []byte) // answers a ping
}

// readPause is a time in which a reader handles no frames.
type readPause struct{ begun, over chan struct{} }

// dialStress makes a connection; refused is the status of an upgrade that was not granted.
func dialStress(r *testRelay, path string, h http.Header) (c *stressConn, refused int, err error) {
	nc, err := r.connect()
	if err != nil {
		return nil, 0, err
	}
	ws, resp, err := handshake(r.t, nc, path, h)
	if ws != nil && err == nil {
		ws.patience = 2 * patience // a busy machine may be slow, and the kernel retry late for a peer that did not read
		c = &stressConn{wsClient: ws, done: make(chan struct{})}
		c.pong = func(p []byte) { c.send(opPong, p) }
		return c, 0, nil
	}
	if err == nil {
		refused = resp.StatusCode
		resp.Body.Close()
	}
	nc.Close()
	return nil, refused, err
}

// dial is dialStress where only a limit that is reached, or the drain, may refuse:
// then c is nil.
func (run *stressRun) dial(name, path string, h http.Header) *stressConn {
	c, refused, err := dialStress(run.r, path, h)
	switch {
	case refused == http.StatusServiceUnavailable && run.tiny:
		run.full.Add(1)
	case refused != 0, err != nil && !run.ending.Load():
		run.fail("%s: upgrade: %d, %v", name, refused, err)
	}
	return c
}

// write sends bytes as they are. An error is the reader's to tell: it knows how
// the relay ended the connection.
func (c *stressConn) write(b []byte) bool { return c.writeIn(len(b), b) }

// writeIn sends bytes in pieces of n.
func (c *stressConn) writeIn(n int, b []byte) bool {
	c.wmu.Lock() // no pong of the reader comes between
	defer c.wmu.Unlock()
	c.nc.SetWriteDeadline(time.Now().Add(c.patience))
	for piece := range slices.Chunk(b, max(n, 1)) {
		if _, err := c.nc.Write(piece); err != nil {
			return false
		}
	}
	return true
}

func (c *stressConn) send(op byte, p []byte) bool { return c.write(clientFrame(last, op, p)) }

// sendClose begins the close handshake; code 0 is none.
func (c *stressConn) sendClose(code int) {
	if code == 0 {
		c.send(opClose, nil)
	} else {
		c.send(opClose, closePayload(uint16(code), ""))
	}
}

func (c *stressConn) closeWrite() { c.tcp().CloseWrite() }

// sendReset makes the kernel send RST instead of FIN.
func (c *stressConn) sendReset() {
	c.tcp().SetLinger(0)
	c.nc.Close()
}

// pauseReading stops the reader at the next frame, until resume.
func (c *stressConn) pauseReading() (begun chan struct{}, resume func()) {
	p := &readPause{make(chan struct{}), make(chan struct{})}
	set := func(p *readPause) {
		c.pmu.Lock()
		defer c.pmu.Unlock()
		c.pause = p
	}
	set(p)
	return p.begun, func() {
		set(nil)
		close(p.over)
	}
}

// read hands every message to got until the end, and plays the close handshake.
func (c *stressConn) read(got func(op byte, p []byte)) {
	defer close(c.done)
	defer c.nc.Close()
	c.code = 1006
	for {
		op, p, err := c.next()
		if err != nil {
			return
		}
		if op == opClose {
			c.code = noCloseCode
			if len(p) >= 2 {
				c.code, c.text = int(binary.BigEndian.Uint16(p)), string(p[2:])
			}
			c.send(opClose, p[:min(2, len(p))])
			c.nc.SetReadDeadline(time.Now().Add(c.patience))
			io.Copy(io.Discard, c.br)
			return
		}
		c.pmu.Lock()
		pause := c.pause
		c.pmu.Unlock()
		if pause != nil {
			close(pause.begun)
			<-pause.over
		}
		if op == opPing {
			c.pong(p)
		} else {
			got(op, p)
		}
	}
}

// ---- daemons ----

// stressServer is a server-id and all that its daemons, one after the other,
// have heard.
type stressServer struct {
	run *stressRun
	id  string

	mu     sync.Mutex              // guards what follows
	epoch  int                     // odd while no daemon is sure to be there
	byConn map[string]*phoneRecord // by conn_id
	byName map[string]*phoneRecord
	silent map[int]int // close notices of phones that never spoke, by code
}

// phoneRecord is what the daemons know of a phone.
type phoneRecord struct {
	name   string
	daemon *stressDaemon
	got    int // messages
	sent   int // messages
	notice int // code of its close notice, 0 for none yet
	closed int // code with which the daemon closed it, 0 for not
}

// stressDaemon is one connection of a server-id's binary.
type stressDaemon struct {
	*stressConn
	s      *stressServer
	phones int           // that spoke and have not ended
	left   int           // messages until enough
	enough chan struct{} // closed then
	bad    [dropReasonCount]int64
}

func (s *stressServer) locked(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *stressServer) nextEpoch() { s.locked(func() { s.epoch++ }) }

func (s *stressServer) record(name string) (p phoneRecord, epoch int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if known := s.byName[name]; known != nil {
		p = *known
	}
	return p, s.epoch
}

// readMessages checks all that comes, and does what phones ask for.
func (d *stressDaemon) readMessages() {
	d.read(func(op byte, p []byte) {
		var e wireEnvelope
		if err := json.Unmarshal(p, &e); op != opText || err != nil {
			d.s.run.fail("daemon got opcode %d %.100q: %v", op, p, err)
			return
		}
		var do string
		d.s.locked(func() {
			if e.CloseCode == nil {
				do = d.takeMessage(e)
			} else {
				d.takeNotice(e.ConnID, *e.CloseCode, e.Frame)
			}
			if d.left--; d.left == 0 {
				close(d.enough)
			}
		})
		d.reply(e.ConnID, do)
	})
}

// takeMessage checks a phone's message, s.mu held, and returns what it asks for.
func (d *stressDaemon) takeMessage(e wireEnvelope) (do string) {
	s, fail := d.s, d.s.run.fail
	p := s.byConn[e.ConnID]
	if p == nil {
		var m stressMessage
		json.Unmarshal(e.Frame, &m)
		if home, _, _ := strings.Cut(m.From, "/"); home != s.id || s.byName[m.From] != nil {
			fail("%s got message %d of %q under a new conn_id", s.id, m.N, m.From)
			return ""
		}
		p = &phoneRecord{name: m.From, daemon: d}
		s.byConn[e.ConnID], s.byName[m.From] = p, p
		if d.phones++; d.phones > s.run.o.maxPhones {
			fail("%s has %d phones, limit %d", s.id, d.phones, s.run.o.maxPhones)
		}
	}
	switch {
	case p.daemon != d:
		fail("a new daemon got a message of %s, which an old one knew", p.name)
	case p.notice != 0:
		fail("message of %s behind its close notice", p.name)
	}
	m, err := checkMessage(e.Frame, p.name, p.got)
	if err != nil {
		fail("%s: %v", s.id, err)
	}
	p.got++
	if p.closed != 0 {
		return "" // on its way before the daemon closed it
	}
	return m.Do
}

// takeNotice checks a close notice, s.mu held.
func (d *stressDaemon) takeNotice(connID string, code int, frame []byte) {
	s := d.s
	p := s.byConn[connID]
	switch {
	case frame != nil:
		s.run.fail("notice with frame %.100q", frame)
	case p == nil:
		s.silent[code]++
	case p.daemon == d && p.notice == 0 && p.closed != 0 && s.run.tiny:
		p.notice = code // a limit closed it before its daemon's envelope was there
	case p.daemon != d || p.notice != 0 || p.closed != 0:
		s.run.fail("notice %d of %s: same daemon %v, notice before %d, closed by the daemon with %d",
			code, p.name, p.daemon == d, p.notice, p.closed)
	default:
		p.notice = code
		d.phones--
	}
}

// reply does what a phone asked for: "echo N SIZE", then maybe "close CODE".
func (d *stressDaemon) reply(connID, do string) {
	var n, size, code int
	fmt.Sscanf(do, "echo %d %d close %d", &n, &size, &code)
	var to string
	first := 0
	d.s.locked(func() {
		if p := d.s.byConn[connID]; p != nil && do != "" {
			to, first = "to "+p.name, p.sent
			p.sent += n
			if p.closed = code; code != 0 {
				d.phones--
			}
		}
	})
	var out []byte
	for i := range n {
		end := ""
		if i == n-1 && code != 0 && code%2 == 0 { // with the last frame, or behind it
			end = fmt.Sprintf(`"close_code":%d,`, code)
		}
		frame := makeMessage(to, first+i, "", size)
		out = append(out, clientFrame(last, opText, fmt.Appendf(nil, `{%s"frame":%s,"conn_id":%q}`, end, frame, connID))...)
	}
	if code != 0 && (n == 0 || code%2 != 0) {
		out = append(out, clientFrame(last, opText, fmt.Appendf(nil, `{"conn_id":%q,"frame":null,"close_code":%d}`, connID, code))...)
	}
	if len(out) > 0 {
		d.write(out)
	}
}

// sendBadEnvelopes sends what the relay has to drop.
func (d *stressDaemon) sendBadEnvelopes(rng *rand.Rand) {
	foreign := d.s.foreignConnID(rng)
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
			{`{"conn_id":"` + foreign + `","frame":"not yours"}`, dropUnknownConn},
			{`{"conn_id":"` + foreign + `","frame":"not yours","close_code":4401}`, dropUnknownConn},
		}
		b := bad[rng.IntN(len(bad))]
		if !d.send(opText, []byte(b.text)) {
			return
		}
		d.bad[b.reason]++
	}
}

// foreignConnID is the conn_id of a phone of another server, if one is known.
func (s *stressServer) foreignConnID(rng *rand.Rand) (id string) {
	id = "nobody"
	if other := s.run.servers[rng.IntN(len(s.run.servers))]; other != s {
		other.locked(func() {
			for id = range other.byConn {
				break
			}
		})
	}
	return id
}

// connectDaemon connects a daemon that takes the place of another, and returns
// it once it holds the claim; nil when the relay ends.
func (s *stressServer) connectDaemon(before *session) *stressDaemon {
	run := s.run
	for !run.ending.Load() {
		c := run.dial("daemon of "+s.id, "/v2/server", binaryHeaders(s.id))
		if c == nil {
			time.Sleep(time.Millisecond) // full: again
			continue
		}
		d := &stressDaemon{stressConn: c, s: s}
		go d.readMessages()
		holds := false
		run.waitUntil("claim of "+s.id, func() bool {
			b := run.r.holder(s.id)
			holds = b != nil && b != before
			return holds || isClosed(d.done) || run.ending.Load()
		})
		if holds {
			return d
		}
		d.sendClose(1000)
		<-d.done
		refused := before != nil && d.code == 4409 // the incumbent had not stopped reading yet
		if !refused && d.code != 1000 && !run.mayEnd(d.code, d.text, false) {
			run.fail("daemon of %s: claim ended with %d %q", s.id, d.code, d.text)
		}
	}
	return nil
}

// runDaemons is one server's chain of daemons, until quit.
func (s *stressServer) runDaemons(rng *rand.Rand, quit chan struct{}) {
	run := s.run
	d := s.connectDaemon(nil)
	s.nextEpoch()
	for d != nil {
		held := run.r.holder(s.id)
		select {
		case <-quit:
			d.sendClose(1000)
			d.wantEnd(1000, "", true)
			return
		case <-d.done: // of a limit
			s.nextEpoch()
			d.wantEnd(0, "", false)
			d = s.connectDaemon(nil)
			s.nextEpoch()
			continue
		case <-d.afterMessages(20 + rng.IntN(200)):
		}
		switch what := rng.IntN(9); {
		case what == 0:
			d.sendBadEnvelopes(rng)
		case what == 1 && !run.tiny:
			s.claimHeld()
		case what == 2: // it does not read for a moment: its phones feel it, and lose nothing
			resume := d.stopReading(quit)
			time.Sleep(time.Duration(50+rng.IntN(200)) * time.Millisecond)
			resume()
		case what == 3 && run.tiny: // it reads no more, and the next one takes over
			s.nextEpoch()
			resume := d.stopReading(quit)
			next := s.connectDaemon(held)
			resume()
			d.wantEnd(int(endTakenOver.code()), endTakenOver.String(), false)
			d = next
			s.nextEpoch()
		default:
			s.nextEpoch()
			end := daemonEnds[rng.IntN(len(daemonEnds))]
			end.do(d)
			d.wantEnd(end.code, end.text, end.allRead)
			run.waitUntil("end of "+s.id, func() bool { return run.r.holder(s.id) != held || run.ending.Load() })
			var early *stressPhone
			switch again := rng.IntN(6); {
			case again == 0 && run.tiny: // no daemon comes back in time
				run.waitUntil("end of the grace of "+s.id, func() bool { _, ok := run.r.registry.servers.Load(s.id); return !ok })
			case again < 4 && !run.tiny:
				early = s.joinInGrace(rng)
			}
			d = s.connectDaemon(nil)
			s.nextEpoch()
			if early != nil { // it goes on as one that came just now
				_, early.epoch = s.record(early.name)
				early.follow(stressChat)
			}
		}
	}
}

// daemonEnds are the ways in which a daemon ends its connection. allRead: such an
// end comes behind all that was sent.
var daemonEnds = []struct {
	do      func(*stressDaemon)
	code    int
	text    string
	allRead bool
}{
	{func(d *stressDaemon) { d.sendClose(1001) }, 1001, "", true},
	{func(d *stressDaemon) { d.sendReset() }, 1006, "", false},
	{func(d *stressDaemon) { d.closeWrite() }, 1006, "", true},
	{func(d *stressDaemon) { d.write([]byte{0xf1, 0x80}) }, 1002, endReservedBit.String(), true},
	{func(d *stressDaemon) { d.send(opText, []byte("{\"conn_id\":\"\xff\"}")) }, 1007, endInvalidUTF8.String(), true},
}

// wantEnd waits for a daemon's end, which has to be this one, and counts what it
// sent to be dropped.
func (d *stressDaemon) wantEnd(code int, text string, allRead bool) {
	run := d.s.run
	<-d.done
	ended := d.code == code && d.text == text
	if !ended && !run.mayEnd(d.code, d.text, false) {
		run.fail("daemon of %s: closed with %d %q, want %d %q", d.s.id, d.code, d.text, code, text)
	}
	for reason, n := range d.bad {
		run.dropsMost[reason].Add(n)
		if allRead && ended {
			run.dropsLeast[reason].Add(n)
		}
	}
}

// afterMessages returns what is closed once the daemon has got n more messages.
func (d *stressDaemon) afterMessages(n int) (enough chan struct{}) {
	enough = make(chan struct{})
	d.s.locked(func() { d.left, d.enough = n, enough })
	return enough
}

// stopReading makes the daemon stop at its next message, until resume.
func (d *stressDaemon) stopReading(quit chan struct{}) (resume func()) {
	begun, resume := d.pauseReading()
	select {
	case <-begun:
	case <-d.done:
	case <-quit:
	}
	return resume
}

// claimHeld claims what a live daemon holds.
func (s *stressServer) claimHeld() {
	run := s.run
	c := run.dial("rival of "+s.id, "/v1/server", binaryHeaders(s.id))
	if c == nil {
		return
	}
	c.read(func(op byte, p []byte) { run.fail("rival of %s got opcode %d %.100q", s.id, op, p) })
	if (c.code != 4409 || c.text != endAlreadyClaimed.String()) && !run.mayEnd(c.code, c.text, false) {
		run.fail("rival of %s: closed with %d %q", s.id, c.code, c.text)
	}
}

// joinInGrace connects a phone while no daemon is there, and sends for the next.
func (s *stressServer) joinInGrace(rng *rand.Rand) *stressPhone {
	ph := newStressPhone(s, rng)
	if !ph.connect() {
		return nil
	}
	for range 5 {
		ph.say("")
	}
	return ph
}

// ---- phones ----

// stressPlan is what a phone does, and what has to come of it.
type stressPlan struct {
	name   string
	do     func(*stressPhone)
	code   int    // of the end that the phone sees; 0: the one it chose; 1006: no close frame
	text   string // reason in it
	notice int    // close code that the daemon is told, 0: the phone's own, -1: none
	prefix bool   // the daemon may have missed the last messages
}

// violations are what a peer may send but once, and why that ends it.
var violations = []struct {
	reason closeReason
	bytes  []byte
}{
	{endUnmasked, []byte{opText | 0x80, 1, '1'}},
	{endReservedBit, zeroMaskFrame(0xc1, "1")},
	{endUnknownOpcode, zeroMaskFrame(0x83, "1")},
	{endBadControl, zeroMaskFrame(opPing, "")},
	{endStrayFragment, zeroMaskFrame(0x80, "1")},
	{endInterleaved, append(zeroMaskFrame(opText, "1"), zeroMaskFrame(0x81, "1")...)},
	{endBadLength, []byte{0x81, 0xfe, 0, 125, 0, 0, 0, 0}},
	{endBadClose, zeroMaskFrame(0x88, "\x03\xed")},
	{endInvalidUTF8, zeroMaskFrame(0x81, "\"\xc3\"")},
	{endNotJSON, zeroMaskFrame(0x81, `1,"conn_id":"victim"`)},
	{endMessageTooBig, []byte{0x81, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}},
}

func init() {
	for _, v := range violations {
		stressPlans = append(stressPlans, stressPlan{name: v.reason.String(), code: int(v.reason.code()), text: v.reason.String(),
			notice: int(v.reason.code()), do: func(ph *stressPhone) {
				ph.chat()
				ph.write(v.bytes)
			}})
	}
}

// zeroMaskFrame is a client's frame whose mask is zero.
func zeroMaskFrame(first byte, payload string) []byte {
	return append([]byte{first, 0x80 | byte(len(payload)), 0, 0, 0, 0}, payload...)
}

var stressChat = stressPlan{name: "chat", do: func(ph *stressPhone) {
	for range 1 + ph.rng.IntN(20) {
		ph.ask(1, ph.s.run.randomSize(ph.rng))
		if !ph.waitForAll() {
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
		ph.burst(20, min(70000, ph.s.run.largest()))
		ph.leave(1001)
	}},
	{name: "close without code", code: noCloseCode, notice: noCloseCode, do: func(ph *stressPhone) {
		ph.chat()
		ph.leave(0)
	}},
	{name: "silent", do: func(ph *stressPhone) { // known by its code alone
		code := 3000 + int(ph.s.run.serial.Add(1)%2000)
		ph.s.locked(func() { ph.before = ph.s.silent[code] })
		ph.leave(code)
	}},
	{name: "byte by byte", do: func(ph *stressPhone) {
		for range 3 {
			ph.writeIn(1, clientFrame(last, opText, ph.next("", 20)))
		}
		ph.leave(4000)
	}},
	{name: "fragments", do: func(ph *stressPhone) {
		for range 5 {
			ph.writeIn(7000, ph.fragments(ph.next("", ph.s.run.randomSize(ph.rng))))
		}
		ph.leave(4001)
	}},
	{name: "ping flood", do: func(ph *stressPhone) {
		for i := range 300 {
			ph.send(opPing, fmt.Append(nil, "ping ", i))
		}
		ph.chat()
		ph.send(opPing, []byte("last"))
		if ph.waitFor(func() bool { return ph.pong == "last" }) {
			ph.leave(1000)
		}
	}},
	{name: "reads late", do: func(ph *stressPhone) { // but not so late that its queue overflows
		_, resume := ph.pauseReading()
		ph.ask(10, min(20000, ph.s.run.largest()))
		ph.waitForDaemon(func(p phoneRecord) bool { return p.sent == ph.asked })
		ph.chat()
		resume()
		if ph.waitForAll() {
			ph.leave(1000)
		}
	}},
	{name: "overflow", code: 1011, text: endBacklogFull.String(), notice: 1011, do: func(ph *stressPhone) {
		ph.tcp().SetReadBuffer(64 << 10) // left alone it grows to what tcp_rmem allows
		_, resume := ph.pauseReading()
		ph.ask(12, min(200000, ph.s.run.largest())) // no queue and no socket takes as many
		p, _ := ph.waitForDaemon(func(p phoneRecord) bool { return p.notice != 0 })
		resume()
		if p.notice == 0 && ph.waitForAll() { // so early that nothing overflowed
			ph.plan = stressChat
			ph.leave(1000)
		}
	}},
	{name: "closed by its daemon", text: endBinaryDirective.String(), notice: -1, do: func(ph *stressPhone) {
		ph.chat()
		n, codes := ph.rng.IntN(100), [...]int{4401, 4408, 4412, 4413, 4421, 4426, 1000}
		ph.code = codes[ph.rng.IntN(len(codes))]
		ph.say(fmt.Sprintf("echo %d %d close %d", n, 100, ph.code))
		ph.asked += n
	}},
	{name: "half-close", code: 1006, notice: 1006, do: func(ph *stressPhone) {
		ph.chat()
		ph.closeWrite()
	}},
	{name: "half a message", code: 1006, notice: 1006, do: func(ph *stressPhone) {
		ph.chat()
		ph.write(clientFrame(more, opText, []byte(`"half`)))
		ph.write(clientFrame(last, opContinuation, []byte(` of it"`))[:9])
		ph.closeWrite()
	}},
	{name: "reset", code: 1006, notice: 1006, prefix: true, do: func(ph *stressPhone) {
		ph.chat()
		ph.sendReset()
	}},
	{name: "reset in front of a queue", code: 1006, notice: 1006, prefix: true, do: func(ph *stressPhone) {
		ph.ask(20, 9000)
		ph.sendReset()
	}},
}

// stressPhone compares its end, and what its daemon knows of it, with its plan.
type stressPhone struct {
	*stressConn
	s      *stressServer
	rng    *rand.Rand
	name   string
	plan   stressPlan
	epoch  int // of s, when it came
	sent   int // messages
	asked  int // messages that the daemon was asked for
	code   int // close code chosen
	before int // notices with it that others caused

	mu   sync.Mutex // guards what follows
	got  int        // messages
	pong string     // the last
}

func newStressPhone(s *stressServer, rng *rand.Rand) *stressPhone {
	ph := &stressPhone{s: s, rng: rng, name: fmt.Sprintf("%s/%d", s.id, s.run.serial.Add(1))}
	_, ph.epoch = s.record(ph.name)
	return ph
}

func (ph *stressPhone) connect() bool {
	run := ph.s.run
	if ph.stressConn = run.dial("phone "+ph.name, "/v2/client", phoneHeaders(ph.s.id)); ph.stressConn == nil {
		return false
	}
	go ph.read(func(op byte, p []byte) {
		ph.mu.Lock()
		defer ph.mu.Unlock()
		if op == opPong {
			ph.pong = string(p)
			return
		}
		if _, err := checkMessage(p, "to "+ph.name, ph.got); op != opText || err != nil {
			run.fail("phone %s: opcode %d: %v", ph.name, op, err)
		}
		ph.got++
	})
	return true
}

func (ph *stressPhone) follow(plan stressPlan) {
	ph.plan = plan
	plan.do(ph)
	ph.checkEnd()
}

// next makes the next message. It counts as sent from here on: what arrives is
// at most that.
func (ph *stressPhone) next(do string, size int) []byte {
	ph.sent++
	return makeMessage(ph.name, ph.sent-1, do, size)
}

// say sends a message, in one piece or several.
func (ph *stressPhone) say(do string) {
	p := ph.next(do, ph.s.run.randomSize(ph.rng))
	if ph.rng.IntN(4) == 0 {
		ph.write(ph.fragments(p))
	} else {
		ph.send(byte(opText+ph.rng.IntN(2)), p)
	}
}

// chat sends a few messages.
func (ph *stressPhone) chat() {
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
		b = append(b, clientFrame(last, opText, ph.next("", size))...)
	}
	ph.write(b)
}

// fragments cuts a message anywhere, characters too, with pings in between.
func (ph *stressPhone) fragments(p []byte) (b []byte) {
	op := byte(opText)
	for len(p) > 0 {
		n := 1 + ph.rng.IntN(len(p))
		b = append(b, clientFrame(more, op, p[:n])...)
		b = append(b, clientFrame(last, opPing, nil)...)
		p, op = p[n:], opContinuation
	}
	return append(b, clientFrame(last, op, nil)...)
}

func (ph *stressPhone) leave(code int) {
	ph.code = code
	ph.sendClose(code)
}

// waitFor waits for what the reader finds, and reports whether it did.
func (ph *stressPhone) waitFor(cond func() bool) (ok bool) {
	ph.s.run.waitUntil("phone "+ph.name, func() bool {
		if isClosed(ph.done) {
			return true
		}
		ph.mu.Lock()
		defer ph.mu.Unlock()
		ok = cond()
		return ok
	})
	return ok
}

// waitForAll waits for all that was asked for.
func (ph *stressPhone) waitForAll() bool {
	return ph.waitFor(func() bool { return ph.got == ph.asked })
}

// waitForDaemon waits for what the daemon knows of the phone, as long as it can
// be expected to.
func (ph *stressPhone) waitForDaemon(cond func(phoneRecord) bool) (p phoneRecord, steady bool) {
	run := ph.s.run
	run.waitUntil("the daemon of "+ph.name, func() bool {
		var epoch int
		p, epoch = ph.s.record(ph.name)
		steady = epoch == ph.epoch && epoch%2 == 0 && !run.tiny
		return cond(p) || !steady
	})
	return p, steady
}

// checkEnd compares a phone's end with its plan's.
func (ph *stressPhone) checkEnd() {
	run, s, plan := ph.s.run, ph.s, ph.plan
	fail := func(format string, args ...any) {
		run.fail("phone %s (%s): %s", ph.name, plan.name, fmt.Sprintf(format, args...))
	}
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
		run.crowded.Add(1)
	}
	_, epoch := s.record(ph.name)
	if !ended && !run.mayEnd(ph.stressConn.code, ph.text, epoch != ph.epoch || epoch%2 == 1) {
		fail("closed with %d %q, want %d %q", ph.stressConn.code, ph.text, code, plan.text)
		return
	}
	if ended && plan.name == "silent" {
		ph.waitForDaemon(func(phoneRecord) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.silent[notice] == ph.before+1
		})
	}
	spoke := ph.sent > 0
	p, steady := ph.waitForDaemon(func(p phoneRecord) bool {
		return notice < 0 && p.closed != 0 || p.notice != 0 || !spoke || plan.prefix && p.got == 0
	})
	if p.got > ph.sent {
		fail("sent %d messages, its daemon got %d", ph.sent, p.got)
	}
	if ph.got > p.sent {
		fail("got %d messages, its daemon sent %d", ph.got, p.sent)
	}
	if !steady {
		return
	}
	if spoke && !plan.prefix && p.got != ph.sent {
		fail("sent %d messages, its daemon got %d", ph.sent, p.got)
	}
	if spoke && p.got > 0 && p.notice != max(notice, 0) {
		fail("notice %d, want %d", p.notice, max(notice, 0))
	}
	if notice < 0 && ph.got != ph.asked {
		fail("got %d messages in front of its close, want %d", ph.got, ph.asked)
	}
	run.plannedEnds(plan.name).Add(1)
}

// ---- claims ----

// claimTimeout is the challenge's in the run of claims. A daemon that lives
// answers within it, or its round is played again.
const claimTimeout = 3 * time.Second

// TestStressClaims: daemons lose their path, with a close or without, again and
// again within one challenge. A live one that has no live rival is never refused,
// and of two live ones exactly one holds the id. PYRYCODE_STRESS_ROUNDS is for all
// pollers together.
func TestStressClaims(t *testing.T) {
	t.Parallel()
	rounds := int(stressNumber(t, "PYRYCODE_STRESS_ROUNDS", 200)) / len(listeners)
	seed := stressSeed(t)
	for poller, listen := range listeners {
		t.Run(poller, func(t *testing.T) {
			o := testOptions()
			o.challengeTimeout, o.ping, o.grace = claimTimeout, time.Hour, claimTimeout/2
			r := startRelayOn(t, o, listen(t))
			pulse := startPulse(t, r)
			var todo []int
			for i := range rounds {
				todo = append(todo, i)
			}
			// Those in which the machine was too slow come again, ever fewer at once.
			for n := 128; len(todo) > 0 && !t.Failed(); n /= 4 {
				if n == 0 {
					t.Fatalf("in rounds %v live daemons have been late each time", todo)
				}
				var mu sync.Mutex
				var late []int // guarded by mu
				var all sync.WaitGroup
				atOnce := make(chan struct{}, n)
				for _, i := range todo {
					atOnce <- struct{}{}
					all.Go(func() {
						defer func() { <-atOnce }()
						round := claimRound{t: t, r: r, pulse: pulse, id: fmt.Sprintf("home-%d-%d", i, n), rng: rand.New(rand.NewPCG(seed, uint64(i)))}
						if !round.inTime() {
							mu.Lock()
							defer mu.Unlock()
							late = append(late, i)
						}
					})
				}
				all.Wait()
				todo = late
			}
			r.sound()
		})
	}
}

// pulse is a byte that goes over loopback every now and then. Where the machine keeps it
// from its reader for long, it may have kept the relay from a daemon's answer as well.
type pulse struct {
	r    *testRelay
	read atomic.Int64 // relay clock, of the last one
	late atomic.Int64 // relay clock, of the last one that was late
}

func startPulse(t *testing.T, r *testRelay) *pulse {
	p := &pulse{r: r}
	ln := onLoopback(t)
	near, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	p.read.Store(r.now())
	var both sync.WaitGroup
	both.Go(func() {
		for err := error(nil); err == nil; _, err = near.Write([]byte{0}) {
			time.Sleep(50 * time.Millisecond)
		}
	})
	both.Go(func() {
		buf := make([]byte, 1<<10)
		for _, err := far.Read(buf); err == nil; _, err = far.Read(buf) {
			p.feel()
			p.read.Store(r.now())
		}
	})
	t.Cleanup(func() {
		near.Close()
		far.Close()
		both.Wait()
	})
	return p
}

// feel notes whether it is late.
func (p *pulse) feel() {
	if now := p.r.now(); now-p.read.Load() > int64(claimTimeout/3) {
		p.late.Store(now)
	}
}

// lateSince reports whether it is late, or was behind a time.
func (p *pulse) lateSince(at int64) bool {
	p.feel()
	return p.late.Load() > at
}

// claimRound is one server-id and what its daemons go through.
type claimRound struct {
	t       *testing.T
	r       *testRelay
	pulse   *pulse
	id      string
	rng     *rand.Rand
	story   []string // what happened, for the report of a failure
	daemons []*claimDaemon
	ends    []func()
	late    bool // a live daemon was
}

// claimDaemon answers pings until its path is lost.
type claimDaemon struct {
	*stressConn
	session *session
	got     chan string
	lost    bool

	answering sync.Mutex // held for as long as an answer takes; guards what follows
	answered  int64      // the challenge, by its time, whose answer is out
	slow      bool       // that took it more than a third of the time that it had
}

// asked is when the challenge began that the relay has no answer to, 0 for none.
func (d *claimDaemon) asked() int64 {
	srv := d.session.server
	srv.mu.Lock()
	defer srv.mu.Unlock()
	return d.session.challengedAt
}

// late reports whether a live daemon lost its claim because the machine kept it from its
// answer, or the relay. Where that one had two thirds of the time to read it, and the pulse
// was felt meanwhile, it does not count.
func (d *claimDaemon) late(p *pulse) bool {
	d.session.mu.Lock()
	takenOver := d.session.endReason == endTakenOver
	d.session.mu.Unlock()
	d.answering.Lock()
	defer d.answering.Unlock()
	asked := d.asked()
	return !d.lost && takenOver && (d.slow || asked != 0 && (asked != d.answered || p.lateSince(asked)))
}

func (l *claimRound) note(format string, args ...any) {
	l.story = append(l.story, fmt.Sprintf(format, args...))
}

// endIfLate ends the round's goroutine if a daemon was late.
func (l *claimRound) endIfLate() {
	if l.late = slices.ContainsFunc(l.daemons, func(d *claimDaemon) bool { return d.late(l.pulse) }); l.late {
		runtime.Goexit()
	}
}

// fail reports with what happened before, unless a daemon was late, and ends the round's
// goroutine.
func (l *claimRound) fail(format string, args ...any) {
	l.endIfLate()
	l.t.Errorf("%s: %s: %s", l.id, fmt.Sprintf(format, args...), strings.Join(l.story, ", "))
	runtime.Goexit()
}

// wait passes up to a share of the challenge.
func (l *claimRound) wait(least time.Duration, share float64) {
	d := least + time.Duration(l.rng.Float64()*share*float64(claimTimeout))
	l.note("%v", d.Round(time.Millisecond))
	time.Sleep(d)
}

func (l *claimRound) dial(path string, h http.Header) *stressConn {
	c, refused, err := dialStress(l.r, path, h)
	if c == nil {
		l.fail("connecting to %s: %d, %v", path, refused, err)
	}
	l.ends = append(l.ends, func() { c.nc.Close() })
	return c
}

func (l *claimRound) connect(name string) *claimDaemon {
	d := &claimDaemon{stressConn: l.dial("/v2/server", binaryHeaders(l.id)), got: make(chan string, 1)}
	l.note("%s connects", name)
	// It has its 101, so it is registered, unless it was refused.
	v, ok := l.r.registry.servers.Load(l.id)
	if !ok {
		l.fail("%s is not registered", name)
	}
	srv := v.(*server)
	srv.mu.Lock()
	if d.session = srv.binary; len(srv.contenders) > 0 {
		d.session = srv.contenders[len(srv.contenders)-1]
	}
	srv.mu.Unlock()
	l.daemons = append(l.daemons, d)
	d.pong = func(p []byte) {
		d.answering.Lock()
		defer d.answering.Unlock()
		d.answered = d.asked()
		d.send(opPong, p)
		d.slow = d.slow || d.answered != 0 && l.r.now()-d.answered > int64(claimTimeout/3)
	}
	go d.read(func(_ byte, p []byte) { d.got <- string(p) })
	return d
}

// lose ends a daemon's path: it answers no more.
func (l *claimRound) lose(name string, d *claimDaemon) {
	_, resume := d.pauseReading()
	d.lost = true
	l.ends = append(l.ends, resume)
	how := [...]string{"silence", "FIN", "half-close"}[l.rng.IntN(3)]
	l.note("%s is lost by %s", name, how)
	switch how {
	case "FIN":
		d.nc.Close()
	case "half-close":
		d.closeWrite()
	}
}

// inTime plays, and reports whether no daemon was late.
func (l *claimRound) inTime() bool {
	var played sync.WaitGroup
	played.Go(l.play)
	played.Wait()
	return !l.late
}

func (l *claimRound) play() {
	defer func() {
		for _, end := range l.ends {
			end()
		}
	}()
	scene := [...]string{"it lives", "one survives", "one survives", "two survive"}[l.rng.IntN(4)]
	l.note("%s", scene)
	incumbent := l.connect("incumbent")
	if scene != "it lives" {
		l.lose("incumbent", incumbent)
	}
	for i := range l.rng.IntN(5) {
		l.wait(20*time.Millisecond, 0.3)
		name := fmt.Sprint("attempt ", i)
		attempt := l.connect(name)
		l.wait(0, 0.3)
		l.lose(name, attempt)
	}
	l.wait(20*time.Millisecond, 0.3)
	one := l.connect("survivor")
	switch scene {
	case "it lives":
		l.wantRefused("newcomer", one)
		l.wantHolder(incumbent)
	case "one survives":
		l.wantHolder(one)
	case "two survive":
		l.wait(0, 1.5)
		two := l.connect("rival")
		l.await(patience, "neither of two is refused", func() bool { return isClosed(one.done) || isClosed(two.done) })
		if isClosed(one.done) {
			one, two = two, one
		}
		l.wantRefused("loser", two)
		l.wantHolder(one)
	}
}

// await looks until cond holds, again and again within a time that is counted in pauses:
// where all takes the machine longer they do, too.
func (l *claimRound) await(within time.Duration, otherwise string, cond func() bool) {
	const pause = 20 * time.Millisecond
	for looks := time.Duration(0); !cond(); looks++ {
		if l.endIfLate(); looks*pause > within {
			l.fail("%s within %v", otherwise, within)
		}
		time.Sleep(pause)
	}
}

// wantRefused checks that a daemon is told that another holds the id.
func (l *claimRound) wantRefused(name string, d *claimDaemon) {
	l.await(patience, "the "+name+" is not refused", func() bool { return isClosed(d.done) })
	if d.code != 4409 || d.text != endAlreadyClaimed.String() {
		l.fail("the %s got %d %q", name, d.code, d.text)
	}
}

// wantHolder checks that d comes to hold the id, stays, and is what a phone reaches.
func (l *claimRound) wantHolder(d *claimDaemon) {
	// Its turn comes one challenge after it came, and a sweep or two.
	l.await(3*claimTimeout, "the live daemon does not hold the id", func() bool {
		return l.r.holder(l.id) == d.session || isClosed(d.done)
	})
	l.dial("/v2/client", phoneHeaders(l.id)).send(opText, []byte(`"hello"`))
	select {
	case got := <-d.got:
		if !strings.Contains(got, `"frame":"hello"`) {
			l.fail("the live daemon got %q, not the phone's message", got)
		}
	case <-d.done:
	case <-time.After(patience):
		l.fail("the phone's message did not reach the live daemon")
	}
	if isClosed(d.done) {
		l.fail("the live daemon got %d %q", d.code, d.text)
	}
}
