package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/websocket"
)

// A client of relays, for the check of the public name and for probe. It opens
// a fresh connection every time, verifies TLS, follows no redirect, and tells
// which step failed and what was answered. x/net/websocket makes the handshake
// and the frames; it keeps the answer to itself, so that is recorded on its way.

const (
	// stepTime bounds each step of a dial, a write, and the wait for an answer.
	stepTime = 10 * time.Second
	// addrTime bounds one of several addresses: the next may be reachable.
	addrTime = 4 * time.Second
	// byeTime is how long the close handshake may take.
	byeTime = 2 * time.Second
	// maxHeard is the largest message taken, the daemon's own limit.
	maxHeard = 1 << 20
	// maxRefusal is how much of a refusal's body is looked at.
	maxRefusal = 512
)

// dialStep is a step on the way to a session.
type dialStep uint8

const (
	stepDNS dialStep = iota
	stepTCP
	stepTLS
	stepUpgrade
	dialStepCount
)

var dialStepWords = [dialStepCount]string{"dns", "tcp", "tls", "upgrade"}

func (s dialStep) String() string { return dialStepWords[s] }

// trip is what was met on the way, as far as it went.
type trip struct {
	addrs  []netip.Addr
	remote netip.AddrPort
	took   [dialStepCount]time.Duration
	tls    *tls.ConnectionState // nil without TLS
	answer *answer              // nil where no HTTP answer came
}

// answer is the HTTP answer to the request for an upgrade.
type answer struct {
	status string // the status line
	code   int
	header http.Header
	text   string // the first line of a refusal
}

// identity is the relay that gave the answer, if one did that says so.
func (a *answer) identity() (identity, bool) {
	if a == nil {
		return identity{}, false
	}
	id, err := parseIdentity(a.header.Get(instanceHeader))
	return id, err == nil
}

// dialError says which step failed.
type dialError struct {
	step dialStep
	trip *trip
	err  error
}

func (e *dialError) Error() string { return fmt.Sprintf("%s: %v", e.step, e.err) }
func (e *dialError) Unwrap() error { return e.err }

// endError is how a session ended: with a close frame, or 1006 and err.
type endError struct {
	code   int
	reason string
	err    error
}

func (e *endError) Error() string {
	if e.err != nil {
		return fmt.Sprintf("connection lost: %v", e.err)
	}
	return strings.TrimSpace(fmt.Sprintf("closed %d %s", e.code, e.reason))
}

func (e *endError) Unwrap() error { return e.err }

// dialer opens sessions with the relay at base. It is used by one goroutine.
type dialer struct {
	base *url.URL
	tls  *tls.Config // nil: the system's authorities
	n    int         // dials so far
}

// dial opens a session of one leg, which lasts until close or the end of ctx.
// A nonce, if any, is one of the relay's own. An error is a *dialError.
func (d *dialer) dial(ctx context.Context, l leg, serverID, nonce string) (*wsPeer, error) {
	t := new(trip)
	fail := func(step dialStep, err error) (*wsPeer, error) {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, &dialError{step, t, err}
	}
	if err := d.resolve(ctx, t); err != nil {
		return fail(stepDNS, err)
	}
	nc, err := d.connect(ctx, t)
	if err != nil {
		return fail(stepTCP, err)
	}
	if d.base.Scheme == "wss" {
		if nc, err = d.secure(ctx, nc, t); err != nil {
			return fail(stepTLS, err)
		}
	}
	c := &wsPeer{
		trip: t, nc: nc,
		unwatch:  context.AfterFunc(ctx, func() { nc.Close() }),
		messages: make(chan []byte, 16),
		pongs:    make(chan struct{}, 1),
		hungUp:   make(chan struct{}),
		over:     make(chan struct{}),
	}
	if err := c.upgrade(d.base, l, serverID, nonce); err != nil {
		c.unwatch()
		nc.Close()
		return fail(stepUpgrade, err)
	}
	go c.read()
	return c, nil
}

func (d *dialer) resolve(ctx context.Context, t *trip) error {
	host := d.base.Hostname()
	if a, err := netip.ParseAddr(host); err == nil {
		t.addrs = []netip.Addr{a}
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	began := time.Now()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	t.took[stepDNS] = time.Since(began)
	for _, a := range addrs {
		t.addrs = append(t.addrs, a.Unmap())
	}
	return err
}

// connect tries the name's addresses, each time from another one on: two relays
// behind two addresses of one name are two relays, too.
func (d *dialer) connect(ctx context.Context, t *trip) (net.Conn, error) {
	port := d.base.Port()
	if port == "" {
		port = map[string]string{"ws": "80", "wss": "443"}[d.base.Scheme]
	}
	first := d.n
	d.n++
	patience := stepTime
	if len(t.addrs) > 1 {
		patience = addrTime
	}
	var failed error
	for i := range t.addrs {
		at := net.JoinHostPort(t.addrs[(first+i)%len(t.addrs)].String(), port)
		began := time.Now()
		nd := net.Dialer{Timeout: patience, KeepAlive: -1}
		nc, err := nd.DialContext(ctx, "tcp", at)
		if t.took[stepTCP] = time.Since(began); err == nil {
			t.remote = nc.RemoteAddr().(*net.TCPAddr).AddrPort()
			return nc, nil
		}
		failed = errors.Join(failed, err)
	}
	return nil, failed
}

func (d *dialer) secure(ctx context.Context, nc net.Conn, t *trip) (net.Conn, error) {
	config := &tls.Config{}
	if d.tls != nil {
		config = d.tls.Clone()
	}
	config.ServerName = d.base.Hostname()
	config.NextProtos = []string{"http/1.1"} // no other carries this upgrade
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	began := time.Now()
	tc := tls.Client(nc, config)
	err := tc.HandshakeContext(ctx)
	t.took[stepTLS] = time.Since(began)
	if err != nil {
		nc.Close()
		return nil, err
	}
	state := tc.ConnectionState()
	t.tls = &state
	return tc, nil
}

// wsPeer is a session from the peer's side.
type wsPeer struct {
	*trip
	nc      net.Conn
	ws      *websocket.Conn
	unwatch func() bool // of ctx

	messages chan []byte   // closed at the end
	pongs    chan struct{} // one is remembered
	hungUp   chan struct{} // closed by close
	once     sync.Once
	over     chan struct{} // closed at the end
	end      *endError     // set before

	mu sync.Mutex // writing: x/net has no lock for frames
}

// recorder keeps what is read through it.
type recorder struct {
	net.Conn
	b *bytes.Buffer // nil once enough was read
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	if r.b != nil {
		r.b.Write(p[:n])
	}
	return n, err
}

// upgrade makes the opening handshake.
func (c *wsPeer) upgrade(base *url.URL, l leg, serverID, nonce string) error {
	origin := map[string]string{"ws": "http://", "wss": "https://"}[base.Scheme] + base.Host
	config, err := websocket.NewConfig(base.JoinPath("/v2", endpointWords[l]).String(), origin)
	if err != nil {
		return err
	}
	config.Header = http.Header{
		"X-Pyrycode-Server": {serverID},
		"User-Agent":        {programName + "/" + readBuildVersion().version},
	}
	if l == legBinary {
		config.Header.Set("X-Pyrycode-Version", readBuildVersion().version)
	}
	if nonce != "" {
		config.Header.Set(probeHeader, nonce)
	}
	rec := &recorder{c.nc, new(bytes.Buffer)}
	c.nc.SetDeadline(time.Now().Add(stepTime))
	began := time.Now()
	c.ws, err = websocket.NewClient(config, rec)
	c.took[stepUpgrade] = time.Since(began)
	heard := rec.b
	rec.b = nil
	if err == nil {
		c.answer, err = readAnswer(heard)
		c.nc.SetDeadline(time.Time{})
		return err
	}
	// x/net has stopped reading at the head; the text of a refusal may be to come.
	c.nc.SetReadDeadline(time.Now().Add(byeTime))
	if a, readErr := readAnswer(io.MultiReader(heard, c.nc)); readErr == nil {
		c.answer = a
	}
	return err
}

func readAnswer(r io.Reader) (*answer, error) {
	resp, err := http.ReadResponse(bufio.NewReader(r), nil)
	if err != nil {
		return nil, err
	}
	a := &answer{status: resp.Proto + " " + resp.Status, code: resp.StatusCode, header: resp.Header}
	if a.code != http.StatusSwitchingProtocols {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxRefusal)) // whatever came
		a.text, _, _ = strings.Cut(strings.TrimSpace(string(b)), "\n")
	}
	return a, nil
}

// read takes frames until the session ends. Pings and a close are answered.
func (c *wsPeer) read() {
	defer close(c.over)
	defer close(c.messages)
	for {
		op, p, err := c.frame()
		if err == nil && op == opPing {
			err = c.write(opPong, p)
		}
		switch {
		case err != nil:
			c.end = &endError{code: 1006, err: err}
			return
		case op == opClose:
			c.end = &endError{code: noCloseCode}
			if len(p) >= 2 {
				c.end.code, c.end.reason = int(binary.BigEndian.Uint16(p)), string(p[2:])
			}
			c.write(opClose, p) // the answer; the relay may be gone
			return
		case op == opPong:
			select {
			case c.pongs <- struct{}{}:
			default:
			}
		case op == opText:
			select {
			case c.messages <- p:
			case <-c.hungUp:
			}
		}
	}
}

// frame reads one frame as relays send them: whole and unmasked.
func (c *wsPeer) frame() (op byte, p []byte, err error) {
	f, err := c.ws.NewFrameReader()
	if err != nil {
		return 0, nil, err
	}
	head, err := io.ReadAll(f.HeaderReader())
	if err != nil {
		return 0, nil, err
	}
	n := f.Len() - len(head) // overflows below 0 for what no one sends
	if head[0]&0xf0 != 0x80 || head[1]&0x80 != 0 || n < 0 || n > maxHeard {
		return 0, nil, fmt.Errorf("a frame that no relay sends: % x", head)
	}
	p = make([]byte, n)
	_, err = io.ReadFull(f, p)
	return f.PayloadType(), p, err
}

// write sends one frame. It may be called from several goroutines.
func (c *wsPeer) write(op byte, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	w, err := c.ws.NewFrameWriter(op)
	if err != nil {
		return err
	}
	c.nc.SetWriteDeadline(time.Now().Add(stepTime))
	_, err = w.Write(p)
	return err
}

// settled waits until the relay has taken the session on: only then it answers
// a ping. The 101 alone comes before the claim or the join is made.
func (c *wsPeer) settled() error {
	if err := c.write(opPing, nil); err != nil {
		return c.lost(err)
	}
	patience := time.NewTimer(stepTime)
	defer patience.Stop()
	select {
	case <-c.pongs:
		return nil
	case <-c.over:
		return c.end
	case <-patience.C:
		return fmt.Errorf("no answer to a ping within %v", stepTime)
	}
}

// roundTrip sends a frame, which the claim sends back.
func (c *wsPeer) roundTrip(frame []byte) error {
	if err := c.write(opText, frame); err != nil {
		return c.lost(err)
	}
	patience := time.NewTimer(stepTime)
	defer patience.Stop()
	select {
	case p, ok := <-c.messages:
		if !ok {
			return c.end
		}
		if !bytes.Equal(p, frame) {
			return fmt.Errorf("%d bytes went out, %d others came back", len(frame), len(p))
		}
		return nil
	case <-patience.C:
		return fmt.Errorf("a frame of %d bytes did not come back within %v", len(frame), stepTime)
	}
}

// lost prefers the close frame, which tells why, to the write error after it.
func (c *wsPeer) lost(err error) error {
	patience := time.NewTimer(byeTime)
	defer patience.Stop()
	select {
	case <-c.over:
		return c.end
	case <-patience.C:
		return err
	}
}

func (c *wsPeer) alive() bool {
	select {
	case <-c.over:
		return false
	default:
		return true
	}
}

// echo makes a binary's session send every frame back to the phone it is from,
// until the session ends.
func (c *wsPeer) echo() {
	for m := range c.messages {
		var e struct {
			ConnID string          `json:"conn_id"`
			Frame  json.RawMessage `json:"frame,omitempty"`
		}
		if json.Unmarshal(m, &e) != nil || e.Frame == nil {
			continue // a close notice
		}
		if m, err := json.Marshal(e); err != nil || c.write(opText, m) != nil {
			return
		}
	}
}

// close ends the session with a close handshake.
func (c *wsPeer) close() {
	c.once.Do(func() {
		close(c.hungUp)
		if c.alive() {
			c.write(opClose, binary.BigEndian.AppendUint16(nil, 1000)) // nothing is left to do if that fails
			patience := time.NewTimer(byeTime)
			defer patience.Stop()
			select {
			case <-c.over:
			case <-patience.C:
			}
		}
		c.unwatch()
		c.nc.Close()
		<-c.over
	})
}

// probeID is a server-id that nobody else has.
func probeID() string { return "probe-" + rand.Text() }
