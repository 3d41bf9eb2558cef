package main

import (
	"bufio"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// The probe command against relays, and against what is taken for one or stands in
// front of one.

// ---- what answers in a relay's place ----

// serveRaw listens until the test ends and speaks with each connection.
func serveRaw(t testing.TB, config *tls.Config, speak func(net.Conn)) (addr string) {
	t.Helper()
	ln := onLoopback(t)
	addr = ln.Addr().String()
	if config != nil {
		ln = tls.NewListener(ln, config)
	}
	var conns []net.Conn // owned by the goroutine that accepts until that ends
	var accepting, speaking sync.WaitGroup
	accepting.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			conns = append(conns, nc)
			speaking.Go(func() { speak(nc) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		accepting.Wait()
		for _, nc := range conns {
			nc.Close()
		}
		speaking.Wait()
	})
	return addr
}

// answering answers every request with these bytes and hangs up.
func answering(t testing.TB, text string) (addr string) {
	return serveRaw(t, nil, func(nc net.Conn) {
		readHead(bufio.NewReader(nc))
		io.WriteString(nc, text)
		nc.Close()
	})
}

func webServer(t testing.TB, h http.Handler) (addr string) {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// status is a web server that has one answer.
func status(t testing.TB, code int, header ...string) (addr string) {
	return webServer(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for pair := range slices.Chunk(header, 2) {
			w.Header().Set(pair[0], pair[1])
		}
		w.WriteHeader(code)
		io.WriteString(w, "a page")
	}))
}

// deadAddr is an address where nothing listens: a client has it, so that nobody else is
// given it while the test runs.
func deadAddr(t testing.TB) string {
	t.Helper()
	ln := onLoopback(t)
	defer ln.Close()
	nc, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return nc.LocalAddr().String()
}

func onLocalhost(addr string) string { return "localhost:" + addr[strings.LastIndexByte(addr, ':')+1:] }

// balancer is a TCP proxy that looks at heads.
type balancer struct {
	addr string
	pick picker
	mu   sync.Mutex // held by pick
	n    int

	// Set before the first connection.
	request  func(head string) string // what the backend gets, nil: as it is
	reply    func(head string) string // what the client gets
	cut      chan struct{}            // closed, it cuts all connections
	farewell string                   // what the client gets at the end
}

// picker chooses the backend of connection n; "" drops it.
type picker func(n int, head string) (backend string)

func startBalancer(t testing.TB, config *tls.Config, pick picker) *balancer {
	t.Helper()
	b := &balancer{pick: pick}
	b.addr = serveRaw(t, config, b.serve)
	return b
}

func (b *balancer) serve(client net.Conn) {
	defer client.Close()
	cr := bufio.NewReader(client)
	head, err := readHead(cr)
	if err != nil {
		return
	}
	b.mu.Lock()
	backend := b.pick(b.n, head)
	b.n++
	b.mu.Unlock()
	server, err := net.Dial("tcp", backend)
	if err != nil {
		return
	}
	defer server.Close()
	if b.request != nil {
		head = b.request(head)
	}
	io.WriteString(server, head)
	var there sync.WaitGroup
	over := make(chan struct{})
	there.Go(func() {
		select {
		case <-b.cut:
			client.SetReadDeadline(time.Now())
			server.SetReadDeadline(time.Now())
		case <-over:
		}
	})
	there.Go(func() { pump(server, cr, "") })
	sr := bufio.NewReader(server)
	if head, err = readHead(sr); err == nil {
		if b.reply != nil {
			head = b.reply(head)
		}
		io.WriteString(client, head)
		pump(client, sr, b.farewell)
	}
	client.Close()
	server.Close()
	close(over)
	there.Wait()
}

// pump copies until either end is over.
func pump(to net.Conn, from io.Reader, farewell string) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		to.Write(buf[:n])
		if err != nil {
			io.WriteString(to, farewell)
			to.Close()
			return
		}
	}
}

func readHead(r *bufio.Reader) (string, error) {
	var b strings.Builder
	for {
		line, err := r.ReadString('\n')
		b.WriteString(line)
		if err != nil || line == "\r\n" {
			return b.String(), err
		}
	}
}

// without takes a header out of a head.
func without(name string) func(head string) string {
	return func(head string) string {
		lines := slices.DeleteFunc(strings.SplitAfter(head, "\n"), func(l string) bool {
			key, _, _ := strings.Cut(l, ":")
			return strings.EqualFold(key, name)
		})
		return strings.Join(lines, "")
	}
}

func always(addr string) picker { return inTurn(addr) }

func inTurn(addrs ...string) picker {
	return func(n int, _ string) string { return addrs[n%len(addrs)] }
}

// byServer sticks to a backend for each server-id.
func byServer(addrs ...string) picker {
	return func(_ int, head string) string {
		_, head, _ = strings.Cut(head, "\n")
		header, err := textproto.NewReader(bufio.NewReader(strings.NewReader(head))).ReadMIMEHeader()
		if err != nil {
			return ""
		}
		h := fnv.New32a()
		io.WriteString(h, header.Get("X-Pyrycode-Server"))
		return addrs[h.Sum32()%uint32(len(addrs))]
	}
}

// selfSigned is a server's configuration with a certificate for a name, of which so
// much of its whole life is left. Clients with pool trust it.
func selfSigned(t testing.TB, pool *x509.CertPool, name string, life, left time.Duration) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name},
		NotBefore: time.Now().Add(left - life), NotAfter: time.Now().Add(left),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	if pool != nil {
		pool.AddCert(c)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
}

// ---- the command ----

// probeRun is a probe, and what it has shown.
type probeRun struct {
	probe
	ok           bool
	shown, notes bytes.Buffer
}

// runSteps probes a URL as p says.
func runSteps(t *testing.T, target string, p probe) *probeRun {
	t.Helper()
	r := &probeRun{probe: p}
	var err error
	if r.dialer.base, err = parseProbeURL(target); err != nil {
		t.Fatal(err)
	}
	r.out = &r.shown
	if r.progress == nil {
		r.progress = &r.notes
	}
	r.ok = r.run(t.Context())
	if r.ok != r.report.OK {
		t.Errorf("the report says %v, run %v", r.report.OK, r.ok)
	}
	return r
}

func (r *probeRun) step(name string) probeStep {
	i := slices.IndexFunc(r.report.Steps, func(s probeStep) bool { return s.Name == name })
	if i < 0 {
		return probeStep{}
	}
	return r.report.Steps[i]
}

// TestProbeGood: every step of a good relay is told, with its figures.
func TestProbeGood(t *testing.T) {
	t.Parallel()
	pool := x509.NewCertPool()
	r := startRelay(t, testOptions())
	secured := startBalancer(t, selfSigned(t, pool, "localhost", 1900*time.Hour, 1000*time.Hour), always(r.addr))
	for _, tt := range []struct{ target, dns, tcp, tls string }{
		{"ws://" + r.addr, "127.0.0.1 is an address", "connected to " + r.addr, "ws:// has none"},
		{"wss://" + onLocalhost(secured.addr), "localhost is ", "connected to 127.0.0.1:",
			"TLS 1.3, certificate good until " + formatDay(time.Now().Add(1000*time.Hour)) + ", for 41 days"},
	} {
		t.Run(tt.target[:3], func(t *testing.T) {
			t.Parallel()
			p := runSteps(t, tt.target, probe{dialer: dialer{tls: &tls.Config{RootCAs: pool}}, n: 5, idle: 50 * time.Millisecond})
			want := [][2]string{
				{"dns", tt.dns}, {"tcp", tt.tcp}, {"tls", tt.tls},
				{"upgrade", "HTTP/1.1 101 Switching Protocols"}, {"headers", "x-pyrycode-relay-instance comes back"},
				{"claim", "is taken"}, {"join", "4 of 4 phones reached the binary"}, {"round trip", "of 20"},
				{"large frame", "200 KiB there and back in "}, {"instances", "5 of 5 connections reached " + r.id.id}, {"idle", "survived"},
			}
			if !p.ok || len(p.report.Steps) != len(want) {
				t.Fatalf("a good relay fails:\n%s", p.shown.String())
			}
			for i, s := range p.report.Steps {
				if s.Name != want[i][0] || !strings.Contains(s.Detail, want[i][1]) || s.Verdict != stepOK && s.Name != "tls" || s.Remedy != "" {
					t.Errorf("step %d is %+v, want %q", i, s, want[i])
				}
				if !strings.Contains(p.shown.String(), s.Name) || !strings.Contains(p.shown.String(), s.Detail) {
					t.Errorf("the text lacks step %s:\n%s", s.Name, p.shown.String())
				}
			}
			if rt := p.report.RoundTrip; rt == nil || rt.Min <= 0 || rt.Min > rt.Median || rt.Median > rt.Max {
				t.Errorf("round trip %+v", rt)
			}
			if i := p.report.Instances; len(i) != 1 || i[0].ID != r.id.id || i[0].Started != r.id.started || i[0].Connections != 5 {
				t.Errorf("instances %+v, want 5 connections to %v", i, r.id)
			}
			if !strings.HasSuffix(p.shown.String(), "\nThis relay works from here.\n") {
				t.Errorf("the last line is not the verdict:\n%s", p.shown.String())
			}
		})
	}
}

// TestProbeWarns: what works and should be better, and what need not be better.
// Authorities give certificates for six days as for ninety: each is renewed when a
// third of its life is left.
func TestProbeWarns(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	pool := x509.NewCertPool()
	r := startRelay(t, testOptions())
	nameless := startBalancer(t, nil, always(r.addr))
	nameless.reply = without(instanceHeader)
	p := runSteps(t, "ws://"+nameless.addr, probe{n: 3})
	if s := p.step("headers"); !p.ok || s.Verdict != stepWarn ||
		!strings.Contains(s.Detail, "x-pyrycode-relay-instance") || !strings.Contains(s.Remedy, "pass the relay's answer headers on") {
		t.Errorf("without an instance header: %+v", s)
	}
	for _, tt := range []struct {
		life, left time.Duration
		warning    string // "": none
	}{
		{900*time.Hour + 13*day, 13 * day, "for 12 days"}, {90 * day, 29 * day, "for 28 days"}, {6 * day, 47 * time.Hour, "for 46h"},
		{6 * day, 5 * day, ""}, {6 * day, 49 * time.Hour, ""}, {45 * day, 16 * day, ""}, {90 * day, 31 * day, ""},
	} {
		b := startBalancer(t, selfSigned(t, pool, "localhost", tt.life, tt.left), always(r.addr))
		p := runSteps(t, "wss://"+onLocalhost(b.addr), probe{dialer: dialer{tls: &tls.Config{RootCAs: pool}}, n: 2})
		want, remedy := stepOK, ""
		if tt.warning != "" {
			want, remedy = stepWarn, "renew the certificate now, and find out why that did not happen by itself"
		}
		if s := p.step("tls"); !p.ok || s.Verdict != want || s.Remedy != remedy || !strings.Contains(s.Detail, tt.warning) {
			t.Errorf("a certificate of %v with %v left: %+v", tt.life, tt.left, s)
		}
	}
}

// TestProbeFails: what operators get wrong, each with a verdict and a remedy of
// its own.
func TestProbeFails(t *testing.T) {
	t.Parallel()
	pool := x509.NewCertPool()
	relay := startRelay(t, testOptions())
	small := testOptions()
	small.maxFrame = 64 << 10
	// through is a proxy in front of the relay.
	through := func(change func(*balancer)) string {
		b := startBalancer(t, nil, always(relay.addr))
		change(b)
		return "ws://" + b.addr
	}
	cuts := map[string]chan struct{}{} // of the proxies that cut what is idle, by target
	quiet := func(farewell string) string {
		cut := make(chan struct{})
		target := through(func(b *balancer) { b.cut, b.farewell = cut, farewell })
		cuts[target] = cut
		return target
	}
	secured := func(left time.Duration, name string) string {
		return "wss://" + onLocalhost(startBalancer(t, selfSigned(t, pool, name, 900*time.Hour+left, left), always(relay.addr)).addr)
	}
	twoRelays := func() string {
		return "ws://" + startBalancer(t, nil, inTurn(relay.addr, startRelay(t, testOptions()).addr)).addr
	}
	encrypted := httptest.NewTLSServer(http.NotFoundHandler())
	encrypted.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	t.Cleanup(encrypted.Close)
	page := status(t, 404)
	echoing := websocket.Server{Handler: func(c *websocket.Conn) { io.Copy(c, c) }}
	for _, tt := range []struct {
		name, target         string
		step, detail, remedy string // that fails
	}{
		{"wrong port", "ws://" + deadAddr(t), "tcp", "nothing listens there", "correct the port"},
		{"expired certificate", secured(-72*time.Hour, "localhost"),
			"tls", "the certificate expired on " + formatDay(time.Now().Add(-72*time.Hour)) + ", 3 days ago", "renew the certificate"},
		{"certificate for another name", secured(1000*time.Hour, "other.test"),
			"tls", `the certificate is for "other.test", not for localhost`, "a certificate for localhost"},
		{"certificate that nobody trusts", secured(1000*time.Hour, "localhost"), "tls", "issuer is not trusted", "fullchain.pem"},
		{"tls to a port without", "wss://" + relay.addr, "tls", "does not speak TLS", "ws://"},
		{"tls to a proxy without a certificate", "wss://" + onLocalhost(startBalancer(t, new(tls.Config), always(relay.addr)).addr),
			"tls", "the server refused the TLS handshake: tls: ", "a certificate for localhost"},
		{"no tls to a port with", "ws://" + encrypted.Listener.Addr().String(), "upgrade", "400 Bad Request", "use wss://"},
		{"web server", "ws://" + status(t, 404, "Server", "nginx"),
			"upgrade", `something that is not a relay answers "HTTP/1.1 404 Not Found" (server: "nginx")`, "pass /v1/ and /v2/ on"},
		{"page", "ws://" + status(t, 200), "upgrade", "200 OK", "correct the address"},
		{"redirect", "ws://" + status(t, 301, "Location", "https://www.test/"),
			"upgrade", `a redirect to "https://www.test/"`, "follow no redirect"},
		{"login", "ws://" + status(t, 401), "upgrade", "401", "without a login"},
		{"proxy whose relay is down", "ws://" + status(t, 502), "upgrade", "does not reach a relay", "start the relay"},
		{"proxy that limits", "ws://" + status(t, 429, "Retry-After", "7200"), "upgrade", "429", "wait a minute"},
		{"proxy without the upgrade headers", through(func(b *balancer) { b.request = without("Upgrade") }),
			"upgrade", "426 Upgrade Required", "proxy_set_header Upgrade $http_upgrade"},
		{"proxy that drops other headers", through(func(b *balancer) { b.request = without("X-Pyrycode-Version") }),
			"upgrade", "header x-pyrycode-version is missing", "pass user-agent and the x-pyrycode-* headers on"},
		{"proxy that breaks the answer", through(func(b *balancer) { b.reply = without("Upgrade") }),
			"upgrade", `"HTTP/1.1 101 Switching Protocols" is no good upgrade`, "as the relay sent them"},
		{"server that hangs up", "ws://" + answering(t, ""), "upgrade", "no HTTP answer", "backend is the relay"},
		{"server of something else", "ws://" + answering(t, "SSH-2.0-OpenSSH_9\r\n"),
			"upgrade", "no HTTP answer", "the port is the one of the proxy"},
		{"another websocket server", "ws://" + webServer(t, echoing), "join", "0 of 3 phones reached the binary", ""},
		{"two relays in turn", twoRelays(), "instances", "2 of 4 connections reached " + relay.id.id, "stop all but one"},
		{"phones of two relays in turn", twoRelays(),
			"join", "1 of 3 phones reached the binary; 2 did not, although it is there (closed 4404", "run exactly one relay"},
		{"a web server for /v1/", "ws://" + startBalancer(t, nil, func(_ int, head string) string {
			return map[bool]string{true: page, false: relay.addr}[strings.HasPrefix(head, "GET /v1/")]
		}).addr, "join", "1 of 3 phones reached the binary; the first that did not: something that is not a relay", "pass /v1/ and /v2/ on"},
		{"relay and web server in turn", "ws://" + startBalancer(t, nil, inTurn(relay.addr, status(t, 502))).addr,
			"instances", "2 of 4 something that does not say who it is", "what else answers"},
		{"proxy that cuts what is idle", quiet(""), "idle", "connection was cut after ", "proxy_read_timeout"},
		{"proxy that is reloaded", through(func(b *balancer) {
			b.reply = func(head string) string { return head + "\x88\x02\x03\xe9" }
		}), "claim", "closed 1001", "stream_close_delay 5m"},
		{"proxy that is reloaded while all is quiet", quiet("\x88\x02\x03\xe9"), "idle", "closed 1001", "stream_close_delay 5m"},
		{"relay that is stopped while all is quiet", quiet("\x88\x0f\x03\xe9shutting down"),
			"idle", `closed 1001 "shutting down"`, "the relay was stopped"},
		{"limit on messages", "ws://" + startRelay(t, small).addr,
			"large frame", `closed 1009 "message too big"`, "raise what limits messages in the proxy, and -max-frame"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			how := probe{dialer: dialer{tls: &tls.Config{RootCAs: pool}}, n: 4}
			if strings.Contains(tt.name, "nobody trusts") {
				x509.SystemCertPool() // on a busy machine reading it takes longer than a handshake may
				how.dialer.tls = nil
			}
			if tt.step == "idle" {
				how.idle = patience
				how.progress = writerFunc(func(note []byte) (int, error) {
					if strings.HasPrefix(string(note), "silent for") { // else it would cut what is only slow
						close(cuts[tt.target])
					}
					return len(note), nil
				})
			}
			p := runSteps(t, tt.target, how)
			if p.ok {
				t.Errorf("it passes:\n%s", p.shown.String())
			}
			s, text := p.step(tt.step), p.shown.String()
			if s.Verdict != stepFail || !strings.Contains(s.Detail, tt.detail) || !strings.Contains(s.Remedy, tt.remedy) || s.Remedy == "" {
				t.Errorf("step %s is %+v, want a failure with %q and the remedy %q; the text:\n%s", tt.step, s, tt.detail, tt.remedy, text)
			}
			if !strings.Contains(text, "FAIL     "+tt.step) || !strings.Contains(text, "→ "+s.Remedy) ||
				!strings.Contains(text, "does not work from here") {
				t.Errorf("the text does not say so:\n%s", text)
			}
		})
	}
}

// TestProbeQuotesStrangers: nothing that a server says reaches a terminal as it
// is, and nothing of it can be taken for the probe's own words.
func TestProbeQuotesStrangers(t *testing.T) {
	t.Parallel()
	pool := x509.NewCertPool()
	relay := startRelay(t, testOptions())
	// Escape sequences, C1 controls, text that turns its direction, no UTF-8.
	const evil = "\x1b]0;x\a\x1b[2J\u009b2J\u202eok\u2066\x7f\xff"
	const same = "HTTP/1.1 403 No\r\n" + instanceHeader + ": 0123456789abcdef, 9999-12-31T23:59:59%s\r\nContent-Length: %d\r\n\r\n%s"
	raw := func(answer string) string { return "ws://" + answering(t, answer) }
	replying := func(reply func(head string) string) string {
		b := startBalancer(t, nil, always(relay.addr))
		b.reply = reply
		return "ws://" + b.addr
	}
	misnamed := startBalancer(t, selfSigned(t, pool, "a\x1b[2J.test", 900*time.Hour, time.Hour), always(relay.addr))
	for _, tt := range []struct{ name, target, shown string }{
		{"status", raw("HTTP/1.1 404 " + evil + "\r\n\r\n"), `"HTTP/1.1 404 \x1b]0;x\a\x1b[2J\u009b2J\u202eok\u2066\x7f\xff"`},
		{"status without end", raw("HTTP/1.1 404 " + strings.Repeat(evil, 50) + "\r\n\r\n"), `…"`},
		{"head without end", raw("HTTP/1.1 404 No\r\nX: " + strings.Repeat("x", 1<<20)),
			"no HTTP answer: the answer's head has more than 65536 bytes"},
		{"body", raw(fmt.Sprintf(same, "Z", len(evil), evil)), `No": "\x1b]0;x`},
		{"start time", raw(fmt.Sprintf(same, "-23:00", 0, "")), "not a relay"},
		{"location", raw("HTTP/1.1 302 Found\r\nLocation: /\u009b2J\u202eok\r\n\r\n"), `a redirect to "/\u009b2J\u202eok"`},
		{"server", raw("HTTP/1.1 404 No\r\nServer: " + "\u009b2J\u202eok" + "\r\n\r\n"), `(server: "\u009b2J\u202eok")`},
		{"no http", raw(evil + "\r\n\r\n"), "no HTTP answer"},
		{"close reason", replying(func(head string) string {
			return head + "\x88" + string(rune(2+len(evil))) + "\x03\xe9" + evil
		}), `closed 1001 "\x1b]0;x`},
		{"101", replying(func(head string) string { return strings.Replace(head, "Switching Protocols", evil, 1) }), `101 \x1b]0;x`},
		{"certificate", "wss://" + onLocalhost(misnamed.addr), `for "a\x1b[2J.test", not`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, asJSON := range []bool{false, true} {
				p := runSteps(t, tt.target, probe{dialer: dialer{tls: &tls.Config{RootCAs: pool}}, n: 2, json: asJSON})
				all := p.shown.String() + p.notes.String()
				shown := all
				if asJSON {
					var report probeReport
					if err := json.Unmarshal(p.shown.Bytes(), &report); err != nil || report.Instances == nil { // a list, even of none
						t.Fatalf("%q: %v", shown, err)
					}
					shown = fmt.Sprint(report.Steps)
				}
				if !strings.Contains(shown, tt.shown) {
					t.Errorf("json %v: %q lacks %q", asJSON, shown, tt.shown)
				}
				for line := range strings.SplitSeq(all, "\n") {
					if i := strings.IndexFunc(line, func(r rune) bool { return !strconv.IsPrint(r) }); i >= 0 || len(line) > 3000 {
						t.Errorf("json %v: raw, or %d bytes: %q", asJSON, len(line), line)
					}
				}
			}
		})
	}
}

// TestProbeWaitsForItsTurn: the relay's rate limit is waited for, and said so.
func TestProbeWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	o := defaultOptions()
	o.ratePerMinute, o.rateBurst = 60, 2
	r := startRelay(t, o)
	p := runSteps(t, "ws://"+r.addr, probe{n: 3})
	if !p.ok || !strings.Contains(p.step("join").Detail, "2 of 2") {
		t.Errorf("rate limited, and:\n%s", p.shown.String())
	}
	refused := r.metrics.upgrades[rolePhone][upgradeRateLimited].Load()
	if refused > 1 {
		t.Errorf("refused %d times: it does not wait", refused)
	}
	if (refused > 0) != strings.Contains(p.notes.String(), "waiting 1s for the next") {
		t.Errorf("progress: %q", p.notes.String())
	}
}

// TestProbeLeavesHalfTheBurst: everybody behind one address shares its burst. A
// probe leaves half of it, so that two in a row do not wait.
func TestProbeLeavesHalfTheBurst(t *testing.T) {
	t.Parallel()
	o := defaultOptions()
	o.ratePerMinute = 1 // nothing comes back meanwhile
	r := startRelay(t, o)
	for i := range 2 {
		if code, out, progress := runOnce(nil, "probe", "ws://"+r.addr); code != exitStopped || progress != "" {
			t.Errorf("probe %d: exit code %d, progress %q:\n%s", i+1, code, progress, out)
		}
		used := r.metrics.upgrades[roleBinary][upgradeAccepted].Load() + r.metrics.upgrades[rolePhone][upgradeAccepted].Load()
		if most := int64((i + 1) * o.rateBurst / 2); used > most {
			t.Errorf("after probe %d: %d upgrades were asked for, want %d at most", i+1, used, most)
		}
	}
}

func TestProbeCommand(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	for _, tt := range []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string
	}{
		{"good", []string{"-n", "2", "ws://" + r.addr}, 0, "This relay works from here.", ""},
		{"bad", []string{"ws://" + deadAddr(t)}, 1, "FAIL     tcp", ""},
		{"flags behind the url", []string{"http://" + r.addr + "/", "-n", "3"}, 0, "3 of 3 connections", ""},
		{"no url", nil, 2, "", "wants the URL of a relay"},
		{"two urls", []string{"ws://a", "ws://b"}, 2, "", `"ws://b" is one more`},
		{"a path", []string{"wss://relay.test/v2/client"}, 2, "", "and no path"},
		{"another scheme", []string{"ftp://relay.test"}, 2, "", "want wss://host"},
		{"one connection", []string{"-n", "1", "ws://a"}, 2, "", "want a whole number from 2 to 1000"},
		{"no such flag", []string{"-q", "ws://a"}, 2, "", "-q"},
		{"bad idle", []string{"ws://a", "-idle", "long"}, 2, "", "want a duration"},
		{"help", []string{"-h"}, 0, "-idle", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			code, out, errs := runOnce(nil, append([]string{"probe"}, tt.args...)...)
			if code != tt.code || !strings.Contains(out, tt.stdout) || !strings.Contains(errs, tt.stderr) {
				t.Errorf("exit code %d, want %d; stdout:\n%s\nstderr:\n%s", code, tt.code, out, errs)
			}
			if tt.code == 2 && (out != "" || strings.Count(errs, "\n") != 1) {
				t.Errorf("wrong use is not one line on stderr: %q, %q", out, errs)
			}
		})
	}
	for in, want := range map[string]string{
		"wss://relay.test": "wss://relay.test", "relay.test": "wss://relay.test", "relay.test:8443": "wss://relay.test:8443",
		"https://relay.test/": "wss://relay.test", "http://127.0.0.1:8080": "ws://127.0.0.1:8080", "ws://[::1]:8080": "ws://[::1]:8080",
		"wss://user@relay.test": "", "wss://relay.test/?a=b": "", "": "", "://": "", "wss://relay.test/v2": "", "wss://relay.test#piece": "",
	} {
		got := ""
		if u, err := parseProbeURL(in); err == nil {
			got = u.String()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// TestProbeJSON: one object on stdout, by the names of docs/probe.md.
func TestProbeJSON(t *testing.T) {
	t.Parallel()
	a, b := startRelay(t, testOptions()), startRelay(t, testOptions())
	addr := startBalancer(t, nil, inTurn(a.addr, b.addr)).addr
	code, out, _ := runOnce(nil, "probe", "-json", "-n", "4", "ws://"+addr)
	var got struct {
		URL       string
		OK        *bool
		Steps     []struct{ Step, Verdict, Detail, Remedy string }
		Instances []struct {
			Instance    string
			Started     time.Time
			Connections int
		}
	}
	d := json.NewDecoder(strings.NewReader(out))
	if err := d.Decode(&got); err != nil || d.More() {
		t.Fatalf("not one object: %v", err)
	}
	if code != exitFailed || got.URL != "ws://"+addr || got.OK == nil || *got.OK || len(got.Steps) != 11 || len(got.Instances) != 2 {
		t.Errorf("exit code %d, %+v", code, got)
	}
	for _, i := range got.Instances {
		if i.Connections != 2 || i.Instance != a.id.id && i.Instance != b.id.id || i.Started.IsZero() {
			t.Errorf("instance %+v", i)
		}
	}
	var failed []string
	for _, s := range got.Steps {
		if s.Verdict == "fail" && s.Detail != "" && s.Remedy != "" {
			failed = append(failed, s.Step)
		}
	}
	if want := []string{"join", "instances"}; !slices.Equal(failed, want) {
		t.Errorf("failed %q, want %q", failed, want)
	}
}

// TestProbeProgress: on a terminal the line that says what is done is
// overwritten, and gone before a verdict is shown.
func TestProbeProgress(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	var screen bytes.Buffer
	p := probe{dialer: dialer{base: &url.URL{Scheme: "ws", Host: r.addr}}, n: 3, out: &screen, progress: &screen, live: true}
	if !p.run(t.Context()) || !strings.Contains(screen.String(), "… connection 3 of 3") {
		t.Errorf("a good relay fails, or no progress is shown: %q", screen.String())
	}
	for line := range strings.Lines(screen.String()) {
		if strings.Contains(line[strings.LastIndex(line, "\x1b[K")+1:], "…") {
			t.Errorf("progress stays on the screen: %q", line)
		}
	}
}

// TestProbePeerRefusesStrangeFrames: what answers may be anything.
func TestProbePeerRefusesStrangeFrames(t *testing.T) {
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
			b := startBalancer(t, nil, always(startRelay(t, testOptions()).addr))
			b.reply = func(head string) string { return head + frame }
			b.cut = make(chan struct{})
			d := dialer{base: &url.URL{Scheme: "ws", Host: b.addr}}
			c, _, err := d.dial(t.Context(), rolePhone, "server", "")
			if err != nil {
				t.Fatal(err)
			}
			defer c.close()
			if name == "cut off" {
				close(b.cut)
			}
			eventually(t, "the session ends", func() bool { return isClosed(c.over) })
			if c.end.code != 1006 {
				t.Errorf("the session ended with %v", c.end)
			}
		})
	}
}

// TestProbeDiagnoses: what can't be made to happen on loopback.
func TestProbeDiagnoses(t *testing.T) {
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
		{stepTLS, io.EOF, "the TLS handshake failed: EOF", "speaks TLS"},
		{stepSession, &endError{code: 1001, reason: "shutting down"}, `closed 1001 "shutting down"`, "the relay was stopped just then"},
		{stepSession, &endError{code: 1001}, `closed 1001`, "stream_close_delay 5m"},
		{stepSession, &endError{code: 1011, reason: "heartbeat timeout"}, `closed 1011 "heartbeat timeout"`, "relay's log"},
		{stepSession, &endError{code: 1006, err: io.EOF}, "connection lost: EOF", "proxy's log"},
	} {
		if d := diagnose(base, &dialTrace{step: tt.step}, tt.err); !strings.Contains(d.what, tt.what) || !strings.Contains(d.remedy, tt.remedy) {
			t.Errorf("%v: %+v, want %q and %q", tt.err, d, tt.what, tt.remedy)
		}
	}
}
