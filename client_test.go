package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// What the tests of this package speak with: a relay on a port of the kernel's
// choice, and a client that can send any bytes at all.

// patience bounds every wait of a test: a wait that long is a failure.
const patience = 20 * time.Second

// testRelay is a relay that serves on loopback until its test ends, and is then
// drained and checked.
type testRelay struct {
	*relay
	t    testing.TB
	addr string
	srv  *http.Server
	logs *logBuffer
	once sync.Once

	connect func() (net.Conn, error) // a client's end of a new connection
}

// testOptions are the defaults without the rate limit, which one test's many
// connections from one address would run into.
func testOptions() options {
	o := defaultOptions()
	o.ratePerMinute = 0
	return o
}

func startRelay(t testing.TB, o options) *testRelay {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return startRelayOn(t, o, ln)
}

func startRelayOn(t testing.TB, o options, ln net.Listener) *testRelay {
	t.Helper()
	r := &testRelay{t: t, addr: ln.Addr().String(), logs: &logBuffer{}}
	debug := o
	debug.logLevel = slog.LevelDebug
	log := newLogger(r.logs, debug)
	var err error
	r.relay, err = newRelay(o, newIdentity(time.Now()), buildVersion{"test", "unknown", runtime.Version()}, newInstanceState(), newProbeKeys(), log)
	if err != nil {
		t.Fatal(err)
	}
	if ln, err = newAcceptor(ln); err != nil {
		t.Fatal(err)
	}
	r.srv = newServer(r.relay, r.relay)
	go r.srv.Serve(guests{ln})
	r.connect = func() (net.Conn, error) { return net.Dial("tcp", r.addr) }
	t.Cleanup(r.stop)
	return r
}

// stop drains the relay and checks that nothing is left of it.
func (r *testRelay) stop() {
	r.once.Do(func() {
		r.srv.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		r.drain(ctx)
		if err := r.check(); err != nil {
			r.t.Error("after the drain:", err)
		}
		if r.t.Failed() {
			r.t.Log("the relay's log:\n" + r.logs.String())
		}
	})
}

// settle waits until the relay's books agree with cond.
func (r *testRelay) settle(what string, cond func() bool) {
	r.t.Helper()
	eventually(r.t, what, cond)
	if err := r.check(); err != nil {
		r.t.Error(err)
	}
}

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

// wsClient is the client's end of a WebSocket connection, frame by frame.
type wsClient struct {
	t      testing.TB
	nc     net.Conn
	br     *bufio.Reader
	header http.Header // of the 101
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

// holder is the binary that holds id, if any.
func (r *testRelay) holder(id string) *binaryLeg {
	v, ok := r.registry.servers.Load(id)
	if !ok {
		return nil
	}
	srv := v.(*server)
	srv.mu.Lock()
	defer srv.mu.Unlock()
	return srv.binary
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
func (ph *wsClient) greet(b *wsClient) (connID string) {
	ph.t.Helper()
	ph.text(`"hello"`)
	e := b.envelope()
	if string(e.Frame) != `"hello"` {
		ph.t.Fatalf("binary got %s, want the phone's greeting", e.Frame)
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

func handshake(t testing.TB, nc net.Conn, path string, h http.Header) (*wsClient, *http.Response, error) {
	q, _ := http.NewRequest("GET", "http://relay"+path, nil)
	q.Header = h.Clone()
	q.Header.Set("Connection", "Upgrade")
	q.Header.Set("Upgrade", "websocket")
	q.Header.Set("Sec-WebSocket-Version", "13")
	q.Header.Set("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
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
	return &wsClient{t: t, nc: nc, br: br, header: resp.Header}, resp, nil
}

// clientFrame is a masked frame as a client sends it; fin is 0x80 or 0.
func clientFrame(fin, op byte, payload []byte) []byte {
	key := [4]byte{0x37, 0xfa, 0x21, 0x3d}
	b := []byte{fin | op}
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = append(b, 0x80|126, byte(n>>8), byte(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	b = append(b, key[:]...)
	for i, x := range payload {
		b = append(b, x^key[i&3])
	}
	return b
}

func closePayload(code uint16, reason string) []byte {
	return append(binary.BigEndian.AppendUint16(nil, code), reason...)
}

// raw sends bytes as they are.
func (c *wsClient) raw(b []byte) {
	c.t.Helper()
	c.nc.SetWriteDeadline(time.Now().Add(patience))
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatalf("sending %d bytes: %v", len(b), err)
	}
}

func (c *wsClient) frame(op byte, payload []byte) {
	c.t.Helper()
	c.raw(clientFrame(0x80, op, payload))
}
func (c *wsClient) text(s string) { c.t.Helper(); c.frame(opText, []byte(s)) }

// close sends a close frame.
func (c *wsClient) close(code uint16, reason string) {
	c.t.Helper()
	c.frame(opClose, closePayload(code, reason))
}

// next reads one frame of the relay and holds it against what the contract says
// of all of them: unmasked, no RSV bit, unfragmented.
func (c *wsClient) next() (op byte, payload []byte, err error) {
	c.nc.SetReadDeadline(time.Now().Add(patience))
	var h [8]byte
	if _, err = io.ReadFull(c.br, h[:2]); err != nil {
		return 0, nil, err
	}
	if h[0]&0xf0 != 0x80 || h[1]&0x80 != 0 {
		return 0, nil, fmt.Errorf("relay sent a frame that begins %02x %02x", h[0], h[1])
	}
	op = h[0] & 15
	n := uint64(h[1])
	switch n {
	case 126:
		_, err = io.ReadFull(c.br, h[:2])
		n = uint64(binary.BigEndian.Uint16(h[:]))
	case 127:
		_, err = io.ReadFull(c.br, h[:8])
		n = binary.BigEndian.Uint64(h[:])
	}
	if err != nil {
		return 0, nil, err
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(c.br, payload)
	return op, payload, err
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

// send is an envelope to a phone.
func (c *wsClient) send(connID, frame string) {
	c.t.Helper()
	c.text(`{"conn_id":"` + connID + `","frame":` + frame + `}`)
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
			c.nc.SetWriteDeadline(time.Now().Add(patience))
			c.nc.Write(clientFrame(0x80, opClose, p)) // the relay may be gone
			if _, err := io.Copy(io.Discard, c.br); err != nil && !isReset(err) {
				c.t.Fatalf("waiting for the end of tcp: %v", err)
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
