package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// What the tests share: a relay under test, what its scenarios run on, a client
// that can send any bytes, connections without a network, and the program as a
// process.

// patience bounds every wait of a test: a wait that long is a failure.
const patience = time.Minute

// eventually polls cond until it holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
		time.Sleep(time.Millisecond)
	}
}

// logBuffer gathers log lines of many goroutines.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// keeping is log, which keeps its latest warning as well.
func keeping(log *slog.Logger) keptLog { return keptLog{log, new(atomic.Pointer[warning])} }

// ---- a relay under test ----

// testRelay is a relay that serves until its test ends, and is then drained and
// checked.
type testRelay struct {
	*relay
	t    testing.TB
	addr string
	srv  *http.Server
	logs *logBuffer
	once sync.Once

	connect func() (net.Conn, error) // a client's end of a new connection
}

// timedOptions are the defaults without the rate limit, which one test's many
// connections from one address would run into. They are for the fake clock.
func timedOptions() options {
	o := defaultOptions()
	o.ratePerMinute = 0
	return o
}

// testOptions are those of a test in real time, in which no time is up: how soon a
// peer does its part is for the machine to say, and that may be busy.
func testOptions() options {
	o := timedOptions()
	for _, d := range peerTimes(&o) {
		*d = time.Hour
	}
	return o
}

// peerTimes are those that a peer has for its part.
func peerTimes(o *options) [6]*time.Duration {
	return [...]*time.Duration{&o.ping, &o.messageTimeout, &o.writeTimeout, &o.closeTimeout, &o.grace, &o.challengeTimeout}
}

// logOff is the level of a relay whose lines would cost more than what is measured.
const logOff = slog.LevelError + 1

func startRelay(t testing.TB, o options) *testRelay {
	t.Helper()
	return startRelayOn(t, o, onLoopback(t))
}

func startRelayOn(t testing.TB, o options, ln net.Listener) *testRelay {
	t.Helper()
	r := &testRelay{t: t, addr: ln.Addr().String(), logs: &logBuffer{}}
	logged := o
	if o.logLevel != logOff {
		logged.logLevel = slog.LevelDebug
	}
	log := newLogger(r.logs, logged)
	var err error
	build := buildVersion{"test", "unknown", runtime.Version()}
	r.relay, err = newRelay(o, newIdentity(time.Now()), build, new(instanceState), new(probeKeys), log)
	if err != nil {
		t.Fatal(err)
	}
	r.connect = func() (net.Conn, error) { return net.Dial("tcp", r.addr) }
	var cert *certificate
	if s, ok := ln.(securedListener); ok {
		ln = s.Listener
		cert = openPair(t, o, log, selfSigned(t, nil, "localhost", time.Hour, time.Hour))
		// Hundreds of peers that come at once have greetTime for their handshakes. Under the race
		// detector this one is a sixteenth of the usual, and a few after the other are all in time.
		turn := make(chan struct{}, 4)
		config := &tls.Config{InsecureSkipVerify: true, CurvePreferences: []tls.CurveID{tls.CurveP256},
			ClientSessionCache: tls.NewLRUClientSessionCache(0)}
		r.connect = func() (net.Conn, error) {
			turn <- struct{}{}
			defer func() { <-turn }()
			return tls.Dial("tcp", r.addr, config)
		}
	}
	if ln, err = newAcceptor(ln); err != nil {
		t.Fatal(err)
	}
	g := &httpListener{Listener: r.publicListener(ln, cert), log: log}
	r.srv = newServer(r.relay, r.relay, g)
	go r.srv.Serve(g)
	t.Cleanup(r.stop)
	return r
}

// stop drains the relay and checks that nothing is left of it.
func (r *testRelay) stop() {
	r.once.Do(func() {
		r.srv.Close()
		r.drain(time.Second)
		if err := r.check(); err != nil {
			r.t.Error("after the drain:", err)
		}
		if r.t.Failed() {
			r.t.Log("the relay's log:\n" + r.logs.String())
		}
	})
}

// settle waits until cond holds, and checks the relay's books.
func (r *testRelay) settle(what string, cond func() bool) {
	r.t.Helper()
	eventually(r.t, what, cond)
	if err := r.check(); err != nil {
		r.t.Error(err)
	}
}

// sound waits for books that agree: a connection may be about to leave.
func (r *testRelay) sound() {
	r.t.Helper()
	var err error
	defer func() {
		if err != nil {
			r.t.Error(err)
		}
	}()
	eventually(r.t, "books that agree", func() bool { err = r.check(); return err == nil })
}

// holder is the binary that holds id, nil for none.
func (r *testRelay) holder(id string) *session {
	v, ok := r.registry.servers.Load(id)
	if !ok {
		return nil
	}
	srv := v.(*server)
	srv.mu.Lock()
	defer srv.mu.Unlock()
	return srv.binary
}

// ---- what a scenario runs on ----

// onLoopback listens until the end of the test.
func onLoopback(t testing.TB) net.Listener {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// listeners lead to each poller: the system's own, and that of goroutines, without TLS
// and with it.
var listeners = map[string]func(testing.TB) net.Listener{
	"epoll":          onLoopback,
	"goroutines":     func(t testing.TB) net.Listener { return plainListener(onLoopback(t)) },
	"epoll TLS":      func(t testing.TB) net.Listener { return securedListener{onLoopback(t)} },
	"goroutines TLS": func(t testing.TB) net.Listener { return securedListener{plainListener(onLoopback(t))} },
}

// securedListener is one of a relay that speaks TLS.
type securedListener struct{ net.Listener }

// openPair is a relay's certificate out of a server's configuration.
func openPair(t testing.TB, o options, log *slog.Logger, config *tls.Config) *certificate {
	t.Helper()
	o.tlsCert, o.tlsKey = writePair(t, t.TempDir(), config)
	c, err := openCertificate(o, keeping(log))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// writePair writes the files of a certificate.
func writePair(t testing.TB, dir string, config *tls.Config) (certFile, keyFile string) {
	t.Helper()
	pair := config.Certificates[0]
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{
		certFile: {Type: "CERTIFICATE", Bytes: pair.Certificate[0]}, keyFile: {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err == nil {
			err = os.WriteFile(file, pem.EncodeToMemory(block), 0o600)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return certFile, keyFile
}

// plainListener hides that its connections are TCP's, which leaves them to the
// goroutine poller.
func plainListener(ln net.Listener) net.Listener {
	return wrappingListener{ln, func(nc net.Conn) net.Conn { return plainConn{nc} }}
}

type plainConn struct{ net.Conn }

// wrappingListener puts something around each connection that it accepts.
type wrappingListener struct {
	net.Listener
	wrap func(net.Conn) net.Conn
}

func (ln wrappingListener) Accept() (net.Conn, error) {
	nc, err := ln.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return ln.wrap(nc), nil
}

func (c plainConn) CloseWrite() error { return c.Conn.(*net.TCPConn).CloseWrite() }

// needEpoll skips a test of what only the epoll loop has: the goroutine poller
// copies what it writes, and has a reader for each connection.
func needEpoll(t *testing.T) {
	t.Helper()
	if _, ok := startRelay(t, testOptions()).loops[0].(*goPoller); ok {
		t.Skip("this system has the goroutine poller")
	}
}

// needNoRace skips a test of memory: the race detector has its own, and under it
// a sync.Pool forgets at random.
func needNoRace(t *testing.T) {
	t.Helper()
	if raceDetector() {
		t.Skip("the race detector is on")
	}
}

func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// onEach runs a scenario over both pollers, each with a relay of its own, whose
// books have to agree at the end.
func onEach(t *testing.T, o options, scenario func(t *testing.T, r *testRelay)) {
	t.Helper()
	for poller, listen := range listeners {
		t.Run(poller, func(t *testing.T) {
			t.Parallel()
			r := startRelayOn(t, o, listen(t))
			scenario(t, r)
			r.sound()
		})
	}
}

// onLegs runs a scenario for the sender of each role.
func onLegs(t *testing.T, o options, scenario func(t *testing.T, r *testRelay, role role)) {
	for _, role := range []role{rolePhone, roleBinary} {
		t.Run(role.String(), func(t *testing.T) {
			t.Parallel()
			onEach(t, o, func(t *testing.T, r *testRelay) { scenario(t, r, role) })
		})
	}
}

// onFakeClock runs a scenario in which time passes only while all goroutines
// wait. Its connections are pipes: they hold no byte that was not read.
func onFakeClock(t *testing.T, o options, scenario func(t *testing.T, r *testRelay)) {
	t.Helper()
	onFakeClockWith(t, o, func(ln net.Listener) net.Listener { return ln }, scenario)
}

// onFakeClockWith has something in front of the relay that a client's pipe leads to.
func onFakeClockWith(t *testing.T, o options, wrap func(net.Listener) net.Listener, scenario func(t *testing.T, r *testRelay)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ln := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
		r := startRelayOn(t, o, wrap(ln))
		for _, l := range r.loops { // an epoll loop waits outside of the fake clock
			l.stop()
		}
		r.loops = []poller{newGoPoller(r.relay)}
		r.connect = ln.dial
		scenario(t, r)
		r.sound()
	})
}

// wantAfter compares the time since start with the contract's; a timeout is
// noticed by a sweeper, so it may come a little late.
func wantAfter(t *testing.T, what string, start time.Time, want time.Duration) {
	t.Helper()
	if got := time.Since(start); got < want || got > want+time.Second {
		t.Errorf("%s after %v, want %v", what, got, want)
	}
}

type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func (ln *pipeListener) Accept() (net.Conn, error) {
	select {
	case nc := <-ln.conns:
		return nc, nil
	case <-ln.done:
		return nil, net.ErrClosed
	}
}

func (ln *pipeListener) Close() error {
	ln.once.Do(func() { close(ln.done) })
	return nil
}

func (ln *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

func (ln *pipeListener) dial() (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case ln.conns <- theirs:
		return patientConn{ours, time.Now().Add(6 * time.Hour)}, nil
	case <-ln.done:
		return nil, errors.New("the relay does not listen any more")
	}
}

// patientConn stretches the patience of a test on a fake clock, where minutes
// pass between two events of a scenario. It ends, or a scenario that waits for
// what never comes would answer pings for ever.
type patientConn struct {
	net.Conn
	until time.Time
}

func (c patientConn) SetReadDeadline(time.Time) error  { return c.Conn.SetReadDeadline(c.until) }
func (c patientConn) SetWriteDeadline(time.Time) error { return c.Conn.SetWriteDeadline(c.until) }

// ---- a client ----

// wsClient is the client's end of a WebSocket connection, frame by frame.
type wsClient struct {
	t      testing.TB
	nc     net.Conn
	br     *bufio.Reader
	header http.Header // of the 101

	patience time.Duration // with a write, and with a frame that has to come
}

func binaryHeaders(id string) http.Header {
	return http.Header{"X-Pyrycode-Server": {id}, "X-Pyrycode-Version": {"1.0"}, "User-Agent": {"test-daemon"}}
}

func phoneHeaders(id string) http.Header {
	return http.Header{"X-Pyrycode-Server": {id}, "User-Agent": {"test-app"}}
}

// binary connects as the binary of id, and waits until one holds it: a claim is
// taken behind the 101.
func (r *testRelay) binary(id string) *wsClient {
	r.t.Helper()
	c := r.mustDial("/v2/server", binaryHeaders(id))
	eventually(r.t, "a binary holds "+id, func() bool { return r.holder(id) != nil })
	return c
}

// phone connects as a phone of id.
func (r *testRelay) phone(id string) *wsClient {
	r.t.Helper()
	return r.mustDial("/v2/client", phoneHeaders(id))
}

// pair connects a binary and a phone and returns the phone's conn_id as well.
func (r *testRelay) pair(id string) (b, ph *wsClient, connID string) {
	r.t.Helper()
	b, ph = r.binary(id), r.phone(id)
	return b, ph, ph.greet(b)
}

// greet sends one message from a phone to its binary, which learns the conn_id.
func (c *wsClient) greet(b *wsClient) (connID string) {
	c.t.Helper()
	c.text(`"hello"`)
	e := b.envelope()
	if string(e.Frame) != `"hello"` {
		c.t.Fatalf("binary got %s, want the phone's greeting", e.Frame)
	}
	return e.ConnID
}

func (r *testRelay) mustDial(path string, h http.Header) *wsClient {
	r.t.Helper()
	c, resp, err := r.dial(path, h)
	if err != nil {
		r.t.Fatal(err)
	}
	if c == nil {
		body, _ := io.ReadAll(resp.Body)
		r.t.Fatalf("upgrade of %s: %s: %s", path, resp.Status, body)
	}
	return c
}

// dial asks for an upgrade. Where it is refused the client is nil.
func (r *testRelay) dial(path string, h http.Header) (*wsClient, *http.Response, error) {
	nc, err := r.connect()
	if err != nil {
		return nil, nil, err
	}
	r.t.Cleanup(func() { nc.Close() })
	return handshake(r.t, nc, path, h)
}

func upgradeRequest(path string, h http.Header) *http.Request {
	q, _ := http.NewRequest("GET", "http://relay"+path, nil)
	q.Header = h.Clone()
	q.Header.Set("Connection", "Upgrade")
	q.Header.Set("Upgrade", "websocket")
	q.Header.Set("Sec-WebSocket-Version", "13")
	q.Header.Set("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
	return q
}

func handshake(t testing.TB, nc net.Conn, path string, h http.Header) (*wsClient, *http.Response, error) {
	q := upgradeRequest(path, h)
	nc.SetDeadline(time.Now().Add(patience))
	if err := q.Write(nc); err != nil {
		return nil, nil, err
	}
	br := bufio.NewReaderSize(nc, 64<<10)
	resp, err := http.ReadResponse(br, q)
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, resp, nil
	}
	if got := resp.Header.Get("Sec-Websocket-Accept"); got != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
		return nil, resp, fmt.Errorf("Sec-WebSocket-Accept is %q", got)
	}
	nc.SetDeadline(time.Time{})
	return &wsClient{t: t, nc: nc, br: br, header: resp.Header, patience: patience}, resp, nil
}

// The first byte of a frame has one of these.
const (
	more = 0
	last = 0x80
)

// clientKey is the key of a client's frames, over and over.
var clientKey = bytes.Repeat([]byte{0x37, 0xfa, 0x21, 0x3d}, 256)

// clientFrame is a masked frame as a client sends it.
func clientFrame(fin, op byte, payload []byte) []byte {
	b := append(clientHeader(fin, op, len(payload)), payload...)
	maskFrom(0, b[len(b)-len(payload):])
	return b
}

// clientHeader is the frame's up to its payload of n bytes.
func clientHeader(fin, op byte, n int) []byte {
	b := []byte{fin | op}
	switch {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = append(b, 0x80|126, byte(n>>8), byte(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	return append(b, clientKey[:4]...)
}

// maskFrom masks a part of a payload, whose first byte has byte at of the key.
func maskFrom(at int, b []byte) {
	for len(b) > 0 {
		n := subtle.XORBytes(b, b, clientKey[at:])
		b, at = b[n:], (at+n)%4
	}
}

func closePayload(code uint16, reason string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, code), reason...)
}

// readServerFrame reads one frame of the relay and checks what the contract says
// of all of them: unmasked, no RSV bit, unfragmented. The error is io.EOF where
// there is none.
func readServerFrame(r io.Reader) (op byte, payload []byte, err error) {
	var h [8]byte
	if _, err = io.ReadFull(r, h[:2]); err != nil {
		return 0, nil, err
	}
	if h[0]&0xf0 != 0x80 || h[1]&0x80 != 0 {
		return 0, nil, fmt.Errorf("relay sent a frame that begins %02x %02x", h[0], h[1])
	}
	op = h[0] & 15
	n := uint64(h[1])
	switch n {
	case 126:
		_, err = io.ReadFull(r, h[:2])
		n = uint64(binary.BigEndian.Uint16(h[:]))
	case 127:
		_, err = io.ReadFull(r, h[:8])
		n = binary.BigEndian.Uint64(h[:])
	}
	if err != nil {
		return 0, nil, err
	}
	payload = make([]byte, n)
	if _, err = io.ReadFull(r, payload); err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return op, payload, err
}

// tcp is the connection under TLS, if there is any.
func (c *wsClient) tcp() *net.TCPConn {
	if secured, ok := c.nc.(*tls.Conn); ok {
		return secured.NetConn().(*net.TCPConn)
	}
	return c.nc.(*net.TCPConn)
}

// raw sends bytes as they are.
func (c *wsClient) raw(b []byte) {
	c.t.Helper()
	c.nc.SetWriteDeadline(time.Now().Add(c.patience))
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatalf("sending %d bytes: %v", len(b), err)
	}
}

func (c *wsClient) frame(op byte, payload []byte) {
	c.t.Helper()
	c.raw(clientFrame(last, op, payload))
}

func (c *wsClient) text(s string) { c.t.Helper(); c.frame(opText, []byte(s)) }

// send is an envelope to a phone.
func (c *wsClient) send(connID, frame string) {
	c.t.Helper()
	c.text(`{"conn_id":"` + connID + `","frame":` + frame + `}`)
}

// close sends a close frame.
func (c *wsClient) close(code uint16, reason string) {
	c.t.Helper()
	c.frame(opClose, closePayload(code, reason))
}

// next reads one frame of the relay.
func (c *wsClient) next() (op byte, payload []byte, err error) {
	c.nc.SetReadDeadline(time.Now().Add(c.patience))
	return readServerFrame(c.br)
}

// message returns the next TEXT message; pings of the relay are answered.
func (c *wsClient) message() string {
	c.t.Helper()
	for {
		op, p, err := c.next()
		switch {
		case err != nil:
			c.t.Fatalf("waiting for a message: %v", err)
		case op == opPing:
			c.frame(opPong, p)
		case op == opPong:
		case op == opText:
			return string(p)
		default:
			c.t.Fatalf("got opcode %d (%q) while waiting for a message", op, p)
		}
	}
}

// wireEnvelope is an envelope as encoding/json reads it.
type wireEnvelope struct {
	ConnID    string          `json:"conn_id"`
	Frame     json.RawMessage `json:"frame"`
	CloseCode *int            `json:"close_code"`
}

// envelope returns the next envelope that the relay sends a binary.
func (c *wsClient) envelope() (e wireEnvelope) {
	c.t.Helper()
	m := c.message()
	if err := json.Unmarshal([]byte(m), &e); err != nil {
		c.t.Fatalf("envelope %.200q: %v", m, err)
	}
	return e
}

// wantNotice reads the next envelope, which has to be a close notice.
func (c *wsClient) wantNotice(connID string, code int) {
	c.t.Helper()
	e := c.envelope()
	if e.ConnID != connID || e.Frame != nil || e.CloseCode == nil || *e.CloseCode != code {
		c.t.Fatalf("got envelope %+v, want the notice of %s with %d", e, connID, code)
	}
}

// ended reads until the close frame and the end of TCP, answers the close frame,
// and returns its code, 1005 for none in it, and its reason. A connection that
// ends without a close frame counts as 1006.
func (c *wsClient) ended() (code int, reason string) {
	c.t.Helper()
	for {
		op, p, err := c.next()
		switch {
		case errors.Is(err, io.EOF), isReset(err):
			return 1006, ""
		case err != nil:
			c.t.Fatalf("waiting for the end: %v", err)
		case op == opClose:
			c.nc.SetWriteDeadline(time.Now().Add(c.patience))
			c.nc.Write(clientFrame(last, opClose, p)) // the relay may be gone
			if n, err := io.Copy(io.Discard, c.br); n > 0 || err != nil && !isReset(err) {
				c.t.Fatalf("%d bytes behind the close frame, and then %v", n, err)
			}
			c.nc.Close()
			if len(p) < 2 {
				return noCloseCode, ""
			}
			return int(binary.BigEndian.Uint16(p)), string(p[2:])
		}
	}
}

func isReset(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "connection reset") || strings.Contains(err.Error(), "broken pipe"))
}

// wantEnd reads until the end, which has to come with this code and a reason
// that begins so.
func (c *wsClient) wantEnd(code int, reason string) {
	c.t.Helper()
	gotCode, gotReason := c.ended()
	if gotCode != code || !strings.HasPrefix(gotReason, reason) {
		c.t.Fatalf("closed %d %q, want %d %q", gotCode, gotReason, code, reason)
	}
}

// lane is one direction between a binary and a phone, seen from its sender, so
// that a rule for both roles is tested on both.
type lane struct {
	from, to   *wsClient
	connID     string
	head, tail string        // around a payload, as the sender has to write it
	got        func() string // the next payload that arrives
}

// lane connects a pair of its own, in which role sends.
func (r *testRelay) lane(role role) lane {
	r.t.Helper()
	b, ph, connID := r.pair(r.newConnID())
	if role == roleBinary {
		return lane{b, ph, connID, `{"conn_id":"` + connID + `","frame":`, `}`, ph.message}
	}
	return lane{ph, b, connID, "", "", func() string { return string(b.envelope().Frame) }}
}

func (l lane) message(payload string) []byte { return []byte(l.head + payload + l.tail) }

// wants reads the next payload.
func (l lane) wants(payload string) {
	l.to.t.Helper()
	if got := l.got(); got != payload {
		l.to.t.Fatalf("%d bytes arrived (%.60q), want %d (%.60q)", len(got), got, len(payload), payload)
	}
}

// ---- connections without a network ----

// memSocket is a socket in memory, which keeps what is written to it. The test
// is the reader and the poller, so what happens between two calls is exact.
type memSocket struct {
	out      []byte
	discard  bool // count only
	full     bool // it takes nothing
	room     int  // or, while it is full, these few bytes
	writes   int
	bytes    int
	resumes  int
	aborts   int
	finished bool // our direction has ended
	sealed   bool // TLS holds bytes that are not with the kernel
}

func (m *memSocket) attach([]byte) {}
func (m *memSocket) unsent() bool  { return m.sealed }
func (m *memSocket) closeWrite()   { m.finished = true }
func (m *memSocket) shutdown()     { m.aborts++ }
func (m *memSocket) resume()       { m.resumes++ }

func (m *memSocket) write(bufs [][]byte) (n int, err error) {
	m.writes++
	if m.aborts > 0 {
		return 0, net.ErrClosed
	}
	for _, b := range bufs {
		if m.full {
			b = b[:min(len(b), m.room)]
			m.room -= len(b)
		}
		if !m.discard {
			m.out = append(m.out, b...)
		}
		n += len(b)
	}
	m.bytes += n
	if m.full {
		err = errAgain
	}
	return n, err
}

// memFrame is a frame that the relay wrote.
type memFrame struct {
	op      byte
	payload string
}

// frames takes apart what was written, and forgets it.
func (m *memSocket) frames(t testing.TB) (all []memFrame) {
	t.Helper()
	for out := bytes.NewReader(m.out); ; {
		op, payload, err := readServerFrame(out)
		switch err {
		case nil:
			all = append(all, memFrame{op, string(payload)})
		case io.EOF:
			m.out = nil
			return all
		default:
			t.Fatalf("%v in % .64x", err, m.out)
		}
	}
}

var memAddr = netip.MustParseAddr("192.0.2.1")

// memSession enters a session, which stays until its release.
func memSession(t testing.TB, r *relay, role role, connID string) (*session, *memSocket) {
	t.Helper()
	if r.enter(role) != nil {
		t.Fatal("the relay is draining or full")
	}
	s, m := newSession(r, caller{role: role, addr: memAddr}, connID), &memSocket{}
	s.sock = m
	return s, m
}

// memBinary registers a binary of id.
func memBinary(t testing.TB, r *relay, id string) (*session, *memSocket) {
	t.Helper()
	b, m := memSession(t, r, roleBinary, r.newConnID())
	w := r.newBatch()
	if r.registry.claim(w, b, id); b.contends() {
		t.Fatalf("%s is claimed already", id)
	}
	w.flush()
	return b, m
}

// memPhone registers a phone of id.
func memPhone(t testing.TB, r *relay, id, connID string) (*session, *memSocket) {
	t.Helper()
	ph, m := memSession(t, r, rolePhone, connID)
	if refused, text := r.registry.join(ph, id); refused != endNone {
		t.Fatalf("join of %s: %s", id, text)
	}
	return ph, m
}

// memPair registers a binary with one phone until the test's end. Frames pass
// between them in w, as in a poller's batch.
func memPair(tb testing.TB, r *relay) (b *session, bs *memSocket, ph *session, ps *memSocket, w *writeBatch) {
	tb.Helper()
	w = r.newBatch()
	b, bs = memBinary(tb, r, "server")
	ph, ps = memPhone(tb, r, "server", "phone-1")
	tb.Cleanup(func() {
		ph.free(w)
		b.free(w)
		w.flush()
	})
	return b, bs, ph, ps, w
}

// ---- the program ----

// program is a process of the relay that dies with its test.
type program struct {
	t              testing.TB
	cmd            *exec.Cmd
	stdout, stderr logBuffer
	done           chan struct{}

	addr, admin string      // set by listening
	secured     *tls.Config // of its clients, nil without TLS
}

// startProgram starts the relay on ports of the kernel's choice. env is of the
// form NAME=value and like args overrides that; nothing is inherited.
func startProgram(t testing.TB, env []string, args ...string) *program {
	t.Helper()
	return startCommand(t, exec.Command(os.Args[0], args...), env)
}

func startCommand(t testing.TB, cmd *exec.Cmd, env []string) *program {
	t.Helper()
	p := &program{t: t, cmd: cmd, done: make(chan struct{})}
	cmd.Env = append([]string{
		runVariable + "=1",
		"GORACE=atexit_sleep_ms=10", // a second by default, of which some tests would see hundreds
		"PYRYCODE_RELAY_LISTEN=127.0.0.1:0", "PYRYCODE_RELAY_ADMIN=127.0.0.1:0", "PYRYCODE_RELAY_INSTANCE_LOCK=" + freeLock(t),
		"PYRYCODE_RELAY_PING=1h", // see testOptions
	}, env...)
	if testing.CoverMode() != "" { // else it says on stderr that there is none
		cmd.Env = append(cmd.Env, "GOCOVERDIR="+t.TempDir())
	}
	cmd.Stdout = &p.stdout
	if cmd.Stderr == nil {
		cmd.Stderr = &p.stderr
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("%s said:\n%s", cmd, p.stderr.String())
		}
	})
	return p
}

// freeLock is an -instance-lock that nobody has. Where all of 127.0.0.0/8 is
// loopback each gets a host of its own, since the kernel may give the same port
// to another test in the moment between the two.
func freeLock(t testing.TB) string {
	t.Helper()
	host := "127.0.0.1"
	if runtime.GOOS == "linux" {
		host = fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
	}
	ln, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// listeningLine is that of both formats.
var listeningLine = regexp.MustCompile(`msg"?[=:]"?listening"?[ ,]"?addr"?[=:]"?([^ "]+)"?[ ,]"?admin"?[=:]"?([^ "]+)`)

// metric reads a sample of the program's.
func (p *program) metric(series string) float64 {
	p.t.Helper()
	_, page := fetch(p.t, "http://"+p.admin+"/metrics")
	return samples(p.t, page)[series]
}

// listening waits until the relay serves, and returns it.
func (p *program) listening() *program {
	p.t.Helper()
	eventually(p.t, "the program listens", func() bool {
		select {
		case <-p.done:
			p.t.Fatalf("the program ended with %d:\n%s", p.cmd.ProcessState.ExitCode(), p.stderr.String())
		default:
		}
		m := listeningLine.FindStringSubmatch(p.stderr.String())
		if m != nil {
			p.addr, p.admin = m[1], m[2]
		}
		return m != nil
	})
	return p
}

func (p *program) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// said waits for a line in the log.
func (p *program) said(what string) {
	p.t.Helper()
	eventually(p.t, "the program says "+what, func() bool { return strings.Contains(p.stderr.String(), what) })
}

// exit waits for the end and returns the exit code.
func (p *program) exit() int {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("the program has not ended within %v", patience)
	}
	return p.cmd.ProcessState.ExitCode()
}

// wantRefusal waits for the end, which has to be a start that failed with this
// code and one line with all of these words.
func (p *program) wantRefusal(code int, words ...string) {
	p.t.Helper()
	if got := p.exit(); got != code {
		p.t.Errorf("exit code %d, want %d", got, code)
	}
	wantRefusal(p.t, p.stderr.String(), words...)
}

func wantRefusal(t testing.TB, stderr string, words ...string) {
	t.Helper()
	line, rest, _ := strings.Cut(stderr, "\n")
	if rest != "" || !strings.HasPrefix(line, "pyrycode-relay: refusing to start: ") {
		t.Errorf("stderr is not one line that says why:\n%s", stderr)
	}
	for _, w := range words {
		if !strings.Contains(line, w) {
			t.Errorf("%q is not in: %s", w, line)
		}
	}
}

// connect upgrades a connection to the program.
func (p *program) connect(path string, h http.Header) *wsClient {
	p.t.Helper()
	c, resp := p.upgrade(path, h)
	if c == nil {
		p.t.Fatalf("upgrade of %s: %s", path, resp.Status)
	}
	return c
}

// upgrade asks for one. Where it is refused the client is nil.
func (p *program) upgrade(path string, h http.Header) (*wsClient, *http.Response) {
	p.t.Helper()
	c, resp, err := handshake(p.t, p.dial(), path, h)
	if err != nil {
		p.t.Fatal(err)
	}
	return c, resp
}

func (p *program) dial() net.Conn { p.t.Helper(); return p.dialAs("") }

func (p *program) dialTCP() net.Conn {
	p.t.Helper()
	nc, err := net.Dial("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { nc.Close() })
	return nc
}

// fetch gets a page and returns its body.
func fetch(t testing.TB, url string) (status int, body string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// runOnce calls run in this process, for what ends before anything is opened.
func runOnce(env map[string]string, args ...string) (code int, stdout, stderr string) {
	var out, errOut bytes.Buffer
	code = run(context.Background(), args, env, &out, &errOut)
	return code, out.String(), errOut.String()
}
