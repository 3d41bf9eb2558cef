package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// What stands between a client and a relay, and whether it is named.

// authority makes certificates that only its own clients trust.
type authority struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	a.key, a.cert = a.make(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-1000 * time.Hour), NotAfter: time.Now().Add(10000 * time.Hour),
	})
	return a
}

func (a *authority) make(c *x509.Certificate) (*ecdsa.PrivateKey, *x509.Certificate) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c.SerialNumber = big.NewInt(1)
	parent, signer := c, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return key, cert
}

// server is a server's configuration for localhost, or another name, whose certificate
// ends in so long.
func (a *authority) server(left time.Duration, name string) *tls.Config {
	return a.serve(&x509.Certificate{DNSNames: []string{name}, NotBefore: time.Now().Add(-900 * time.Hour), NotAfter: time.Now().Add(left)})
}

// serverFor is a server's configuration for localhost, whose certificate has a
// whole life of which so much is left.
func (a *authority) serverFor(life, left time.Duration) *tls.Config {
	return a.serve(&x509.Certificate{DNSNames: []string{"localhost"}, NotBefore: time.Now().Add(left - life), NotAfter: time.Now().Add(left)})
}

func (a *authority) serve(c *x509.Certificate) *tls.Config {
	key, cert := a.make(c)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}}
}

func (a *authority) client() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return &tls.Config{RootCAs: pool}
}

// rawServer answers every request with these bytes and closes.
func rawServer(t *testing.T, answer string) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			readHead(bufio.NewReader(nc))
			io.WriteString(nc, answer)
			nc.Close()
		}
	}()
	return ln.Addr().String()
}

// TestProbeFails: what operators get wrong, each with a verdict and a remedy of
// its own.
func TestProbeFails(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	relay := startRelay(t, testOptions())
	// through is a proxy in front of the relay.
	through := func(t *testing.T, change func(*balancer)) string {
		b := startBalancer(t, nil, always(relay.addr))
		change(b)
		return "ws://" + b.addr
	}
	status := func(t *testing.T, code int, header ...string) string {
		return "ws://" + webServer(t, func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(code)
			io.WriteString(w, "a page")
		})
	}
	secured := func(t *testing.T, left time.Duration, name string) string {
		return "wss://" + onLocalhost(startBalancer(t, ca.server(left, name), always(relay.addr)).addr)
	}
	tests := []struct {
		name   string
		target func(t *testing.T) string
		config *tls.Config
		idle   time.Duration
		step   string // that fails
		detail string
		remedy string
	}{
		{name: "wrong port", target: func(t *testing.T) string { return "ws://" + deadAddr(t) },
			step: "tcp", detail: "nothing listens there", remedy: "correct the port"},
		{name: "expired certificate", target: func(t *testing.T) string { return secured(t, -72*time.Hour, "localhost") }, config: ca.client(),
			step: "tls", detail: "the certificate expired on " + day(time.Now().Add(-72*time.Hour)) + ", 3 days ago", remedy: "renew the certificate"},
		{name: "certificate for another name", target: func(t *testing.T) string { return secured(t, 1000*time.Hour, "other.test") }, config: ca.client(),
			step: "tls", detail: `the certificate is for "other.test", not for localhost`, remedy: "a certificate for localhost"},
		{name: "certificate that nobody trusts", target: func(t *testing.T) string { return secured(t, 1000*time.Hour, "localhost") },
			step: "tls", detail: "issuer is not trusted", remedy: "fullchain.pem"},
		{name: "tls to a port without", target: func(t *testing.T) string { return "wss://" + relay.addr },
			step: "tls", detail: "does not speak TLS", remedy: "ws://"},
		{name: "no tls to a port with", target: func(t *testing.T) string {
			s := httptest.NewTLSServer(http.NotFoundHandler())
			s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
			t.Cleanup(s.Close)
			return "ws://" + s.Listener.Addr().String()
		},
			step: "upgrade", detail: "400 Bad Request", remedy: "use wss://"},
		{name: "a web server", target: func(t *testing.T) string { return status(t, 404, "Server", "nginx") },
			step: "upgrade", detail: `something that is not a relay answers "HTTP/1.1 404 Not Found" (server: "nginx")`, remedy: "pass /v1/ and /v2/ on"},
		{name: "a page", target: func(t *testing.T) string { return status(t, 200) },
			step: "upgrade", detail: "200 OK", remedy: "correct the address"},
		{name: "a redirect", target: func(t *testing.T) string { return status(t, 301, "Location", "https://www.test/") },
			step: "upgrade", detail: `a redirect to "https://www.test/"`, remedy: "follow no redirect"},
		{name: "a login", target: func(t *testing.T) string { return status(t, 401) },
			step: "upgrade", detail: "401", remedy: "without a login"},
		{name: "a proxy whose relay is down", target: func(t *testing.T) string { return status(t, 502) },
			step: "upgrade", detail: "does not reach a relay", remedy: "start the relay"},
		{name: "a proxy that limits", target: func(t *testing.T) string { return status(t, 429, "Retry-After", "7200") },
			step: "upgrade", detail: "429", remedy: "wait a minute"},
		{name: "a proxy without the upgrade headers", target: func(t *testing.T) string {
			return through(t, func(b *balancer) { b.request = without("Upgrade") })
		},
			step: "upgrade", detail: "426 Upgrade Required", remedy: "proxy_set_header Upgrade $http_upgrade"},
		{name: "a proxy that drops other headers", target: func(t *testing.T) string {
			return through(t, func(b *balancer) { b.request = without("X-Pyrycode-Version") })
		},
			step: "upgrade", detail: "header x-pyrycode-version is missing", remedy: "pass user-agent and the x-pyrycode-* headers on"},
		{name: "a proxy that breaks the answer", target: func(t *testing.T) string {
			return through(t, func(b *balancer) { b.reply = without("Upgrade") })
		},
			step: "upgrade", detail: `"HTTP/1.1 101 Switching Protocols" is no good upgrade`, remedy: "as the relay sent them"},
		{name: "a server that hangs up", target: func(t *testing.T) string { return "ws://" + rawServer(t, "") },
			step: "upgrade", detail: "no HTTP answer", remedy: "backend is the relay"},
		{name: "a server of something else", target: func(t *testing.T) string { return "ws://" + rawServer(t, "SSH-2.0-OpenSSH_9\r\n") },
			step: "upgrade", detail: "no HTTP answer", remedy: "the port is the one of the proxy"},
		{name: "another websocket server", target: func(t *testing.T) string {
			s := httptest.NewServer(websocket.Server{Handler: func(c *websocket.Conn) { io.Copy(c, c) }})
			t.Cleanup(s.Close)
			return "ws://" + s.Listener.Addr().String()
		},
			step: "join", detail: "0 of 3 phones reached the binary", remedy: ""},
		{name: "two relays in turn", target: func(t *testing.T) string {
			return "ws://" + startBalancer(t, nil, inTurn(relay.addr, startRelay(t, testOptions()).addr)).addr
		},
			step: "instances", detail: "2 of 4 connections reached " + relay.id.id, remedy: "stop all but one"},
		{name: "phones of two relays in turn", target: func(t *testing.T) string {
			return "ws://" + startBalancer(t, nil, inTurn(relay.addr, startRelay(t, testOptions()).addr)).addr
		},
			step: "join", detail: "1 of 3 phones reached the binary; 2 did not, although it is there (closed 4404", remedy: "run exactly one relay"},
		{name: "a relay and a web server in turn", target: func(t *testing.T) string {
			return "ws://" + startBalancer(t, nil, inTurn(relay.addr, strings.TrimPrefix(status(t, 502), "ws://"))).addr
		},
			step: "instances", detail: "2 of 4 something that does not say who it is", remedy: "what else answers"},
		{name: "a proxy that cuts what is idle", target: func(t *testing.T) string {
			return through(t, func(b *balancer) { b.idle = 300 * time.Millisecond })
		},
			idle: patience, step: "idle", detail: "connection was cut after ", remedy: "proxy_read_timeout"},
		{name: "a proxy that is reloaded", target: func(t *testing.T) string {
			return through(t, func(b *balancer) {
				b.reply = func(head string) string { return head + "\x88\x02\x03\xe9" }
			})
		},
			step: "claim", detail: "closed 1001", remedy: "stream_close_delay 5m"},
		{name: "a proxy that is reloaded while all is quiet", target: func(t *testing.T) string {
			return through(t, func(b *balancer) { b.idle, b.farewell = 300*time.Millisecond, "\x88\x02\x03\xe9" })
		},
			idle: patience, step: "idle", detail: "closed 1001", remedy: "stream_close_delay 5m"},
		{name: "a relay that is stopped while all is quiet", target: func(t *testing.T) string {
			return through(t, func(b *balancer) { b.idle, b.farewell = 300*time.Millisecond, "\x88\x0f\x03\xe9shutting down" })
		},
			idle: patience, step: "idle", detail: `closed 1001 "shutting down"`, remedy: "the relay was stopped"},
		{name: "a limit on messages", target: func(t *testing.T) string {
			o := testOptions()
			o.maxFrame = 64 << 10
			return "ws://" + startRelay(t, o).addr
		},
			step: "large frame", detail: `closed 1009 "message too big"`, remedy: "raise what limits messages in the proxy, and -max-frame"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := runSteps(t, tt.target(t), 4, tt.idle, tt.config)
			if p.ok || p.report.OK {
				t.Errorf("it passes:\n%s", p.text)
			}
			s := p.step(tt.step)
			if s.Verdict != stepFail || !strings.Contains(s.Detail, tt.detail) || !strings.Contains(s.Remedy, tt.remedy) || s.Remedy == "" {
				t.Errorf("step %s is %+v, want a failure with %q and the remedy %q; the text:\n%s", tt.step, s, tt.detail, tt.remedy, p.text)
			}
			if !strings.Contains(p.text, "FAIL     "+tt.step) || !strings.Contains(p.text, "→ "+s.Remedy) || !strings.Contains(p.text, "does not work from here") {
				t.Errorf("the text does not say so:\n%s", p.text)
			}
		})
	}
}

// TestProbeQuotesStrangers: nothing that a server says reaches a terminal as it
// is, and nothing of it can be taken for the probe's own words.
func TestProbeQuotesStrangers(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	relay := startRelay(t, testOptions())
	// Escape sequences, C1 controls, text that turns its direction, no UTF-8.
	const evil = "\x1b]0;x\a\x1b[2J\u009b2J\u202eok\u2066\x7f\xff"
	const same = "HTTP/1.1 403 No\r\n" + instanceHeader + ": 0123456789abcdef, 9999-12-31T23:59:59-23:00\r\nContent-Length: %d\r\n\r\n%s"
	raw := func(answer string) string { return "ws://" + rawServer(t, answer) }
	closing := startBalancer(t, nil, always(relay.addr))
	closing.reply = func(head string) string {
		return head + "\x88" + string(rune(2+len(evil))) + "\x03\xe9" + evil
	}
	greeting := startBalancer(t, nil, always(relay.addr))
	greeting.reply = func(head string) string { return strings.Replace(head, "Switching Protocols", evil, 1) }
	for _, tt := range []struct {
		name, target string
		shown        string // of what is quoted
	}{
		{"status", raw("HTTP/1.1 404 " + evil + "\r\n\r\n"), `"HTTP/1.1 404 \x1b]0;x\a\x1b[2J\u009b2J\u202eok\u2066\x7f\xff"`},
		{"status without end", raw("HTTP/1.1 404 " + strings.Repeat(evil, 50) + "\r\n\r\n"), `…"`},
		{"head without end", raw("HTTP/1.1 404 No\r\nX: " + strings.Repeat("x", 1<<20)), "no HTTP answer: the answer's head has more than 65536 bytes"},
		{"body", raw(fmt.Sprintf(strings.Replace(same, "-23:00", "Z", 1), len(evil), evil)), `No": "\x1b]0;x`},
		{"start time", raw(fmt.Sprintf(same, 0, "")), "not a relay"},
		{"location", raw("HTTP/1.1 302 Found\r\nLocation: /\u009b2J\u202eok\r\n\r\n"), `a redirect to "/\u009b2J\u202eok"`},
		{"server", raw("HTTP/1.1 404 No\r\nServer: " + "\u009b2J\u202eok" + "\r\n\r\n"), `(server: "\u009b2J\u202eok")`},
		{"no http", raw(evil + "\r\n\r\n"), "no HTTP answer"},
		{"close reason", "ws://" + closing.addr, `closed 1001 "\x1b]0;x`},
		{"101", "ws://" + greeting.addr, `101 \x1b]0;x`},
		{"certificate", "wss://" + onLocalhost(startBalancer(t, ca.server(time.Hour, "a\x1b[2J.test"), always(relay.addr)).addr), `for "a\x1b[2J.test", not`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			base, err := parseProbeURL(tt.target)
			if err != nil {
				t.Fatal(err)
			}
			for _, asJSON := range []bool{false, true} {
				var out, progress bytes.Buffer
				p := probe{dialer: dialer{base: base, tls: ca.client()}, n: 2, out: &out, progress: &progress, json: asJSON}
				p.run(t.Context())
				shown := out.String()
				if asJSON {
					var report probeReport
					if err := json.Unmarshal(out.Bytes(), &report); err != nil {
						t.Fatalf("%q: %v", shown, err)
					}
					shown = fmt.Sprint(report.Steps)
				}
				if !strings.Contains(shown, tt.shown) {
					t.Errorf("json %v: %q lacks %q", asJSON, shown, tt.shown)
				}
				for line := range strings.Lines(out.String() + progress.String()) {
					line = strings.TrimSuffix(line, "\n")
					if i := strings.IndexFunc(line, func(r rune) bool { return !strconv.IsPrint(r) }); i >= 0 {
						t.Errorf("json %v: raw %q in %q", asJSON, line[i:], line)
					}
					if len(line) > 3000 {
						t.Errorf("json %v: a line of %d bytes", asJSON, len(line))
					}
				}
			}
		})
	}
}

// TestPeerRefusesStrangeFrames: what answers may be anything.
func TestPeerRefusesStrangeFrames(t *testing.T) {
	t.Parallel()
	for name, frame := range map[string]string{
		"masked":     "\x81\x80\x01\x02\x03\x04",
		"fragmented": "\x01\x01x",
		"reserved":   "\xc1\x01x",
		"endless":    "\x81\x7f\x7f\xff\xff\xff\xff\xff\xff\xff",
		"too big":    "\x81\x7f\x00\x00\x00\x00\x00\x10\x00\x01",
		"cut off":    "\x81\x05abc",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startRelay(t, testOptions())
			b := startBalancer(t, nil, always(r.addr))
			b.reply = func(head string) string { return head + frame }
			if name == "cut off" {
				b.idle = 50 * time.Millisecond
			}
			d := dialer{base: &url.URL{Scheme: "ws", Host: b.addr}}
			c, _, err := d.dial(t.Context(), rolePhone, "server", "")
			if err != nil {
				t.Fatal(err)
			}
			defer c.close()
			select {
			case <-c.over:
				if c.end.code != 1006 || c.end.err == nil {
					t.Errorf("the session ended with %v", c.end)
				}
			case <-time.After(patience):
				t.Error("the session goes on")
			}
		})
	}
}

func TestExplainNames(t *testing.T) {
	t.Parallel()
	base := &url.URL{Scheme: "wss", Host: "relay.test"}
	for _, tt := range []struct {
		step         dialStep
		err          error
		what, remedy string
	}{
		{stepDNS, &net.DNSError{Err: "no such host", Name: "relay.test", IsNotFound: true}, "the name relay.test is not known here", "split DNS"},
		{stepDNS, &net.DNSError{Err: "server misbehaving", Name: "relay.test"}, "server misbehaving", "resolv.conf"},
		{stepTCP, fmt.Errorf("dial: %w", os.ErrDeadlineExceeded), "nobody answers there", "hairpin NAT"},
		{stepTCP, syscall.EHOSTUNREACH, "no route to host", "route"},
		{stepTLS, tls.AlertError(40), "refused the TLS handshake", "a certificate for relay.test"},
		{stepTLS, io.EOF, "the TLS handshake failed: EOF", "speaks TLS"},
		{stepSession, &endError{code: 1001, reason: "shutting down"}, `closed 1001 "shutting down"`, "the relay was stopped just then"},
		{stepSession, &endError{code: 1001}, `closed 1001`, "stream_close_delay 5m"},
		{stepSession, &endError{code: 1011, reason: "heartbeat timeout"}, `closed 1011 "heartbeat timeout"`, "relay's log"},
		{stepSession, &endError{code: 1006, err: io.EOF}, "connection lost: EOF", "proxy's log"},
	} {
		if f := diagnose(base, &dialTrace{step: tt.step}, tt.err); !strings.Contains(f.what, tt.what) || !strings.Contains(f.remedy, tt.remedy) {
			t.Errorf("%v: %+v, want %q and %q", tt.err, f, tt.what, tt.remedy)
		}
	}
}
