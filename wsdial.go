package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"
)

// A client of relays, for the check of the public name and for probe. It opens
// a fresh connection every time, verifies TLS, follows no redirect, and tells
// which step failed and what was answered. The session itself: wspeer.go.

const (
	// stepTime bounds each step of a dial, a write, and the wait for an answer.
	stepTime = 10 * time.Second
	// addrTime bounds one of several addresses: the next may be reachable.
	addrTime = 4 * time.Second
	// byeTime is how long the close handshake may take.
	byeTime = 2 * time.Second
	// maxHeard is the largest message taken, the daemon's own limit.
	maxHeard = 1 << 20
	// maxHead is far more than the head of an answer has.
	maxHead = 64 << 10
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
type dialTrace struct {
	addrs  []netip.Addr
	remote netip.AddrPort
	took   [dialStepCount]time.Duration
	tls    *tls.ConnectionState // nil without TLS
	answer *answer              // nil where no HTTP answer came
}

// answer is the HTTP answer to the request for an upgrade.
type answer struct {
	asked  time.Time // when the request went out: the answer is from then or later
	status string    // the status line
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

// standing is what that relay says of its standing, which older ones do not.
func (a *answer) standing() (standing, bool) {
	s, err := parseStanding(a.header.Get(standingHeader))
	return s, err == nil
}

// dialError says which step failed.
type dialError struct {
	step  dialStep
	trace *dialTrace
	err   error
}

func (e *dialError) Error() string { return fmt.Sprintf("%s: %v", e.step, e.err) }
func (e *dialError) Unwrap() error { return e.err }

// answerOf is the answer to a dial, nil where none came.
func answerOf(peer *wsPeer, err error) *answer {
	var failed *dialError
	switch {
	case peer != nil:
		return peer.answer
	case errors.As(err, &failed):
		return failed.trace.answer
	}
	return nil
}

// dialer opens sessions with the relay at base. It is used by one goroutine.
type dialer struct {
	base *url.URL
	tls  *tls.Config // nil: the system's authorities
	n    int         // dials so far
}

// dial opens a session of one leg, which lasts until close or the end of ctx.
// A nonce, if any, is one of the relay's own. An error is a *dialError.
func (d *dialer) dial(ctx context.Context, role role, serverID, nonce string) (*wsPeer, error) {
	t := new(dialTrace)
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
		dialTrace: t, nc: nc,
		unwatch:  context.AfterFunc(ctx, func() { nc.Close() }),
		messages: make(chan []byte, 16),
		pongs:    make(chan struct{}, 1),
		hungUp:   make(chan struct{}),
		over:     make(chan struct{}),
	}
	if err := c.upgrade(d.base, role, serverID, nonce); err != nil {
		c.unwatch()
		nc.Close()
		return fail(stepUpgrade, err)
	}
	go c.read()
	return c, nil
}

func (d *dialer) resolve(ctx context.Context, t *dialTrace) error {
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
func (d *dialer) connect(ctx context.Context, t *dialTrace) (net.Conn, error) {
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

func (d *dialer) secure(ctx context.Context, nc net.Conn, t *dialTrace) (net.Conn, error) {
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
