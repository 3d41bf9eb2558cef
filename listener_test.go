package main

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// What comes before a request: an address that is not there yet, PROXY headers, TLS
// and its certificate. The scenarios of conn_test.go and others run over TLS too.

// ---- accepting ----

// failingListener fails as accept(2) may, before each connection.
type failingListener struct {
	net.Listener
	errs []error
}

func (l *failingListener) Accept() (net.Conn, error) {
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, err
	}
	return l.Listener.Accept()
}

// A connection that can't be accepted ends nothing, and a listening socket that is no
// good ends the relay.
func TestListenerAcceptFails(t *testing.T) {
	t.Parallel()
	for errno, ends := range map[syscall.Errno]bool{
		syscall.EMFILE: false, syscall.ENFILE: false, syscall.ENOBUFS: false, syscall.ENOMEM: false,
		syscall.EPERM: false, syscall.ENETDOWN: false, syscall.EHOSTUNREACH: false,
		syscall.EBADF: true, syscall.EINVAL: true, syscall.ENOTSOCK: true,
	} {
		t.Run(errno.Error(), func(t *testing.T) {
			t.Parallel()
			r := startRelay(t, testOptions())
			ln := onLoopback(t)
			err := &net.OpError{Op: "accept", Net: "tcp", Addr: ln.Addr(), Err: os.NewSyscallError("accept4", errno)}
			failed := make(chan error, 1)
			d := startHTTP(&failingListener{ln, []error{err, err, err}}, r.relay, r.relay, failed)
			defer d.server.Close()
			if ends {
				select {
				case got := <-failed:
					if !errors.Is(got, errno) {
						t.Errorf("ended with %v", got)
					}
				case <-time.After(patience):
					t.Errorf("%v has ended nothing", err)
				}
				return
			}
			r.connect = func() (net.Conn, error) { return net.Dial("tcp", ln.Addr().String()) }
			r.mustDial("/v2/server", binaryHeaders("home"))
			if n := strings.Count(r.logs.String(), "accepting connections fails"); n != 1 {
				t.Errorf("%d lines in the log, want 1", n)
			}
		})
	}
}

// ---- the address ----

func TestListenerAwaitsItsAddress(t *testing.T) {
	t.Parallel()
	gone := &net.OpError{Op: "listen", Err: os.NewSyscallError("bind", syscall.EADDRNOTAVAIL)}
	const never = time.Hour
	for _, c := range []struct {
		name        string
		there, stop time.Duration // when the address is there, and when the relay is told to stop
		then        error         // what opening it comes to
		took        time.Duration
		listens     bool
		words       string // of the error
		said        int    // lines
	}{
		{"at once", 0, never, nil, 0, true, "", 0},
		{"at boot", 20 * time.Second, never, nil, 20 * time.Second, true, "", 2},
		{"just in time", time.Minute, never, nil, time.Minute, true, "", 2},
		{"never", never, never, nil, time.Minute, false, "no such address on this host for 1m0s: correct it", 1},
		{"a signal", never, 5 * time.Second, nil, 5 * time.Second, false, "", 1},
		{"in use", 0, never, syscall.EADDRINUSE, 0, false, "in use", 0},
		{"in use by then", 2 * time.Second, never, syscall.EADDRINUSE, 2 * time.Second, false, "in use", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var log logBuffer
				o, start := defaultOptions(), time.Now()
				stop := func(d time.Duration) bool { time.Sleep(d); return time.Since(start) >= c.stop }
				open := func(string) (net.Listener, error) {
					if time.Since(start) < c.there {
						return nil, gone
					}
					if c.then != nil {
						return nil, c.then
					}
					return &pipeListener{}, nil
				}
				ln, err := listen("-listen", "192.0.2.1:1", open, o.addressTimeout, stop, newLogger(&log, o))
				if took := time.Since(start); took != c.took || (ln != nil) != c.listens || (err != nil) != (c.words != "") ||
					err != nil && !strings.Contains(err.Error(), c.words) {
					t.Errorf("listener %v, error %v after %v", ln, err, took)
				}
				if n := strings.Count(log.String(), "level=WARN"); n != c.said {
					t.Errorf("%d lines, want %d:\n%s", n, c.said, log.String())
				}
			})
		})
	}
}

// A signal ends the wait, and that is no failure.
func TestListenerStopsWhileItWaits(t *testing.T) {
	t.Parallel()
	for _, flag := range []string{"-listen", "-admin"} {
		p := startProgram(t, nil, flag, "192.0.2.1:0", "-admin-any") // another host's
		p.said("no such address on this host yet: trying again\" flag=" + flag)
		p.stopCleanly()
	}
}

// ---- PROXY protocol ----

// proxyBlock is a header of version 2.
func proxyBlock(command, family byte, rest ...byte) string {
	return "\r\n\r\n\x00\r\nQUIT\n" + string(binary.BigEndian.AppendUint16([]byte{command, family}, uint16(len(rest)))) + string(rest)
}

func ends(src, dst string, more ...byte) (rest []byte) {
	from, to := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	rest = append(from.Addr().AsSlice(), to.Addr().AsSlice()...)
	rest = binary.BigEndian.AppendUint16(rest, from.Port())
	return append(binary.BigEndian.AppendUint16(rest, to.Port()), more...)
}

var proxyHeaders = []struct {
	header string
	want   string // "": refused; "-": the connection's own
}{
	{"PROXY TCP4 203.0.113.7 192.0.2.1 5000 443\r\n", "203.0.113.7:5000"},
	{"PROXY TCP6 2001:db8::7 2001:db8::1 5000 443\r\n", "[2001:db8::7]:5000"},
	{"PROXY TCP6 ::ffff:203.0.113.7 ::1 65535 0\r\n", "203.0.113.7:65535"},
	{"PROXY UNKNOWN\r\n", "-"},
	{"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", "-"},
	{"PROXY TCP4 203.0.113.7 192.0.2.1 5000\r\n", ""},
	{"PROXY TCP4 203.0.113.7 192.0.2.1 5000 443 1\r\n", ""},
	{"PROXY TCP4  203.0.113.7 192.0.2.1 5000 443\r\n", ""},
	{"PROXY TCP4 203.0.113.7 192.0.2.1 5000 65536\r\n", ""},
	{"PROXY TCP4 203.0.113.7 192.0.2.1 +5000 443\r\n", ""},
	{"PROXY TCP4 2001:db8::7 2001:db8::1 5000 443\r\n", ""},
	{"PROXY TCP6 203.0.113.7 192.0.2.1 5000 443\r\n", ""},
	{"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", ""},
	{"PROXY TCP4 203.0.113.7 192.0.2.1 5000 443\n", ""},
	{"PROXY UDP4 203.0.113.7 192.0.2.1 5000 443\r\n", ""},
	{"PROXY UNKNOWNS\r\n", ""},
	{"PROXY UNKNOWN" + strings.Repeat("x", 200) + "\r\n", ""},
	{"PROXY UNKNOWN " + strings.Repeat("x", maxProxyLine-16) + "\r\n", "-"},
	{"PROXY UNKNOWN " + strings.Repeat("x", maxProxyLine-15) + "\r\n", ""},
	{"proxy UNKNOWN\r\n", ""},
	{"GET /healthz HTTP/1.1\r\n", ""},
	{"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03ab", ""},
	{proxyBlock(0x21, 0x11, ends("203.0.113.7:5000", "192.0.2.1:443")...), "203.0.113.7:5000"},
	{proxyBlock(0x21, 0x21, ends("[2001:db8::7]:5000", "[::1]:443")...), "[2001:db8::7]:5000"},
	{proxyBlock(0x21, 0x21, ends("[::ffff:203.0.113.7]:1", "[::1]:2")...), "203.0.113.7:1"},
	{proxyBlock(0x21, 0x11, ends("203.0.113.7:5000", "192.0.2.1:443", 4, 0, 1, 0)...), "203.0.113.7:5000"},
	{proxyBlock(0x21, 0x11, ends("203.0.113.7:5000", "192.0.2.1:443", make([]byte, maxProxyBlock-12)...)...), "203.0.113.7:5000"},
	{proxyBlock(0x21, 0x11, ends("203.0.113.7:5000", "192.0.2.1:443", make([]byte, maxProxyBlock-11)...)...), ""},
	{proxyBlock(0x21, 0x11, ends("203.0.113.7:5000", "192.0.2.1:443")[:11]...), ""},
	{proxyBlock(0x21, 0x21, ends("203.0.113.7:5000", "192.0.2.1:443")...), ""},
	{proxyBlock(0x21, 0x12, ends("203.0.113.7:5000", "192.0.2.1:443")...), ""}, // UDP
	{proxyBlock(0x21, 0x31, make([]byte, 216)...), ""},                         // a path
	{proxyBlock(0x21, 0x00), "-"},
	{proxyBlock(0x20, 0x00), "-"}, // a health check
	{proxyBlock(0x20, 0x11, ends("203.0.113.7:5000", "192.0.2.1:443")...), "-"},
	{proxyBlock(0x22, 0x11, ends("203.0.113.7:5000", "192.0.2.1:443")...), ""},
	{proxyBlock(0x11, 0x11, ends("203.0.113.7:5000", "192.0.2.1:443")...), ""},
	{"\r\n\r\n\x00\r\nQUIT\r\x21\x11\x00\x00", ""},
}

func TestListenerProxyHeader(t *testing.T) {
	t.Parallel()
	for _, c := range proxyHeaders {
		r := strings.NewReader(c.header + "behind")
		from, err := readProxyHeader(r)
		got := from.String()
		switch {
		case err != nil:
			got = ""
		case !from.IsValid():
			got = "-"
		}
		if got != c.want {
			t.Errorf("%q: %s, %v, want %q", c.header, from, err, c.want)
		}
		if rest, _ := io.ReadAll(r); err == nil && string(rest) != "behind" {
			t.Errorf("%q: %q is left, want what stands behind it", c.header, rest)
		}
		for n := range len(c.header) {
			if from, err := readProxyHeader(strings.NewReader(c.header[:n])); err == nil {
				t.Errorf("%q is taken for a header of %v", c.header[:n], from)
			}
		}
	}
}

// FuzzProxyHeader: what is taken is a header as the specification writes it, and not a
// byte behind it is read.
func FuzzProxyHeader(f *testing.F) {
	for _, c := range proxyHeaders {
		f.Add([]byte(c.header + "behind"))
	}
	line := regexp.MustCompile(`^PROXY (UNKNOWN(?: [^\n]*)?|TCP4 [0-9.]+ [0-9.]+ \d+ \d+|TCP6 [0-9a-fA-F:.]+ [0-9a-fA-F:.]+ \d+ \d+)\r\n`)
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		from, err := readProxyHeader(r)
		read := len(b) - r.Len()
		if read > 16+maxProxyBlock {
			t.Fatalf("%d bytes were read of % x", read, b)
		}
		if err != nil {
			return
		}
		text, want := line.FindString(string(b)), ""
		switch v2, isV2 := strings.CutPrefix(string(b), "\r\n\r\n\x00\r\nQUIT\n"); {
		case isV2:
			n := 16 + int(v2[2])<<8 + int(v2[3])
			text = string(b[:n])
			rest := text[16:]
			switch {
			case v2[0] == 0x21 && v2[1] == 0x11:
				want = fmt.Sprintf("%d.%d.%d.%d:%d", rest[0], rest[1], rest[2], rest[3], int(rest[8])<<8|int(rest[9]))
			case v2[0] == 0x21 && v2[1] == 0x21:
				ip := net.IP(rest[:16]) // which writes those of version 4 as they are
				want = net.JoinHostPort(ip.String(), fmt.Sprint(int(rest[32])<<8|int(rest[33])))
			case v2[0] != 0x20 && v2[1] != 0:
				t.Fatalf("taken: % x", b[:16])
			}
		case strings.HasPrefix(text, "PROXY TCP"):
			f := strings.Fields(text)
			want = net.JoinHostPort(net.ParseIP(f[2]).String(), strings.TrimLeft(f[4][:len(f[4])-1], "0")+f[4][len(f[4])-1:])
		}
		if got := from.String(); read != len(text) || want != "" && got != want || want == "" && from.IsValid() {
			t.Fatalf("%q: %s of %d bytes, want %q of %d", b, from, read, want, len(text))
		}
	})
}

// dialAs connects to the program with something in front of the request.
func (p *program) dialAs(header string) net.Conn {
	p.t.Helper()
	nc := p.dialTCP()
	io.WriteString(nc, header)
	if p.secured != nil {
		nc = tls.Client(nc, p.secured)
	}
	return nc
}

// The address of a PROXY header is the client's, for rates and logs, and from there on
// X-Forwarded-For counts as it would from that address.
func TestListenerProxyAddress(t *testing.T) {
	t.Parallel()
	for _, secured := range []bool{false, true} {
		t.Run(fmt.Sprint("TLS ", secured), func(t *testing.T) {
			t.Parallel()
			args := []string{"-proxy-protocol", "-rate-burst=1", "-rate-per-minute=1", "-trusted-proxies=127.0.0.0/8,10.0.0.0/8", "-log-level=debug"}
			p := startSecured(t, secured, args...)
			silent := p.dialTCP() // holds up nobody
			ask := func(header, forwarded string) int {
				h := binaryHeaders(rand.Text())
				if forwarded != "" {
					h.Set("X-Forwarded-For", forwarded)
				}
				_, resp, err := handshake(t, p.dialAs(header), "/v2/server", h)
				if err != nil {
					return 0
				}
				return resp.StatusCode
			}
			v1 := func(ip string) string { return "PROXY TCP4 " + ip + " 192.0.2.1 5000 443\r\n" }
			for i, c := range []struct {
				header, forwarded string
				status            int
			}{
				{v1("203.0.113.1"), "", 101},
				{v1("203.0.113.1"), "", 429},
				{proxyBlock(0x21, 0x11, ends("203.0.113.1:1", "192.0.2.1:1")...), "", 429},
				{proxyBlock(0x21, 0x11, ends("203.0.113.2:1", "192.0.2.1:1")...), "", 101},
				{v1("203.0.113.2"), "203.0.113.3", 429}, // a client's own word
				{v1("10.0.0.1"), "203.0.113.4", 101},    // a proxy behind the proxy
				{v1("10.0.0.1"), "203.0.113.4", 429},
				{"PROXY UNKNOWN\r\n", "", 101}, // the connection's own address
				{proxyBlock(0x20, 0), "", 429},
				{"", "", 0},
				{"PROXY TCP4\r\n", "", 0},
			} {
				if got := ask(c.header, c.forwarded); got != c.status {
					t.Errorf("%d, %q: %d, want %d", i, c.header, got, c.status)
				}
			}
			p.said("addr=203.0.113.4")
			p.said("PROXY header refused")
			silent.Close()
			eventually(t, "the three without a header are counted", func() bool { return p.metric("proxy_headers_refused_total") == 3 })
		})
	}
	p := startProgram(t, nil, "-proxy-protocol", "-trusted-proxies=10.0.0.0/8", "-log-level=debug").listening()
	if _, _, err := handshake(t, p.dialAs("PROXY UNKNOWN\r\n"), "/v2/server", binaryHeaders("id")); err == nil {
		t.Error("a stranger's header was believed")
	}
	p.said("PROXY header refused\" addr=127.0.0.1")
	p.said("error=\"it is not in -trusted-proxies\"")
}

// ---- TLS ----

// startSecured starts the program, with TLS or without.
func startSecured(t testing.TB, secured bool, args ...string) *program {
	t.Helper()
	if !secured {
		return startProgram(t, nil, args...).listening()
	}
	pool := x509.NewCertPool()
	cert, key := writePair(t, t.TempDir(), selfSigned(t, pool, "localhost", 1000*time.Hour, 999*time.Hour))
	p := startProgram(t, nil, append([]string{"-tls-cert", cert, "-tls-key", key}, args...)...).listening()
	p.secured = &tls.Config{RootCAs: pool, ServerName: "localhost"}
	return p
}

// halfClosed is a connection whose own direction may be ended.
type halfClosed struct {
	net.Conn
	ended bool
}

func (c *halfClosed) CloseWrite() error {
	c.ended = true
	return nil
}

// A goodbye of TLS that can't be said is no reason to close a connection whole: what is on
// its way to the peer would be lost.
func TestListenerTLSWithoutGoodbye(t *testing.T) {
	t.Parallel()
	tcp := new(halfClosed)
	c := &tlsConn{Conn: tls.Server(tcp, nil), wire: &wire{Conn: tcp}} // crypto/tls says none before the handshake
	if err := closeWrite(c); err != nil || !tcp.ended {
		t.Errorf("it says %v; TCP's direction is ended: %v", err, tcp.ended)
	}
}

func TestListenerTLS(t *testing.T) {
	t.Parallel()
	p := startSecured(t, true, "-log-level", "debug")
	p.said("next: try it with: pyrycode-relay probe wss://localhost:")
	shake := func(change func(c *tls.Config)) (tls.ConnectionState, error) {
		config := p.secured.Clone()
		change(config)
		tc := tls.Client(p.dialTCP(), config)
		defer tc.Close()
		err := tc.Handshake()
		return tc.ConnectionState(), err
	}
	for _, c := range []struct {
		name    string
		change  func(c *tls.Config)
		version uint16 // 0: refused
	}{
		{"default", func(c *tls.Config) {}, tls.VersionTLS13},
		{"1.2", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, tls.VersionTLS12},
		{"1.1", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, 0},
		{"http/1.1", func(c *tls.Config) { c.NextProtos = []string{"h2", "http/1.1"} }, tls.VersionTLS13},
		{"h2 only", func(c *tls.Config) { c.NextProtos = []string{"h2"} }, 0},
	} {
		state, err := shake(c.change)
		if (err == nil) != (c.version != 0) || err == nil && (state.Version != c.version || state.NegotiatedProtocol == "h2") {
			t.Errorf("%s: version %x, %q, %v", c.name, state.Version, state.NegotiatedProtocol, err)
		}
	}
	plain := p.dialTCP()
	io.WriteString(plain, "GET /v2/client HTTP/1.1\r\n\r\n")
	if answer, _ := io.ReadAll(plain); !strings.HasPrefix(string(answer), "HTTP/1.1 400") || !strings.Contains(string(answer), "speaks TLS") {
		t.Errorf("plain HTTP is answered %q", answer)
	}
	endless := p.dialTCP() // a ClientHello that goes on
	endless.Write(append([]byte{22, 3, 1, 0x3f, 0xff, 1, 0, 0xff, 0xff}, make([]byte, 64<<10)...))
	if _, err := io.ReadAll(endless); err != nil && !isReset(err) {
		t.Error(err)
	}
	p.said("a handshake of more than 16384 bytes")
	p.said("TLS handshake failed\" addr=127.0.0.1:")
	_, page := fetch(t, "http://"+p.admin+"/metrics")
	got := samples(t, page)
	if left := time.Until(time.Unix(int64(got["tls_not_after_seconds"]), 0)); got["tls_handshake_failures_total"] != 4 ||
		left < 998*time.Hour || left > 999*time.Hour {
		t.Errorf("%v failures, want 4; the certificate ends in %v", got["tls_handshake_failures_total"], left)
	}
	run := runSteps(t, "wss://"+onLocalhost(p.addr), probe{dialer: dialer{tls: p.secured}, n: 5, idle: 50 * time.Millisecond})
	if !run.ok {
		t.Errorf("probe over TLS:\n%s", run.shown.String())
	}
	x509.SystemCertPool() // on a busy machine reading it takes longer than a handshake may
	if code, out, _ := runOnce(nil, "probe", "wss://"+onLocalhost(p.addr)); code == 0 || !strings.Contains(out, "certificate") {
		t.Errorf("a certificate that no authority signed: exit code %d\n%s", code, out)
	}
	p.stopCleanly()
}

// What is refused at the start, and what is not.
func TestListenerCertificateAtStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	pair := func(name string, left time.Duration, mode os.FileMode) (cert, key string) {
		d := filepath.Join(dir, name)
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
		cert, key = writePair(t, d, selfSigned(t, nil, "localhost", time.Hour, left))
		if err := os.Chmod(key, mode); err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	good, goodKey := pair("good", time.Hour/2, 0o640)
	_, other := pair("other", time.Hour/2, 0o600)
	open, openKey := pair("open", time.Hour/2, 0o644)
	old, oldKey := pair("old", -time.Hour/2, 0o400)
	for _, c := range []struct {
		cert, key string
		words     []string // of the refusal; nil: it starts
		warning   string
	}{
		{good, goodKey, nil, ""},
		{old, oldKey, nil, "the certificate is not valid at this time"},
		{open, openKey, []string{openKey, "is open to every user of this host (mode 0644): chmod o= " + openKey}, ""},
		{good, other, []string{good, other, "are no pair", "private key does not match"}, ""},
		{goodKey, good, []string{"are no pair"}, ""},
		{filepath.Join(dir, "none"), goodKey, []string{"reading -tls-cert", filepath.Join(dir, "none"), "no such file"}, ""},
		{good, filepath.Join(dir, "none"), []string{"-tls-key", "no such file"}, ""},
		{good, dir, []string{"reading", "is a directory"}, ""},
	} {
		if runtime.GOOS == "windows" && c.cert == open {
			continue
		}
		args := []string{"-tls-cert", c.cert, "-tls-key", c.key}
		if c.words != nil {
			wantNoStart(t, nil, args, c.words...)
			continue
		}
		p := startProgram(t, nil, args...).listening()
		if said := p.stderr.String(); strings.Contains(said, "WARN") != (c.warning != "") || !strings.Contains(said, c.warning) {
			t.Errorf("%s: want the warning %q:\n%s", c.cert, c.warning, said)
		}
	}
}

// SIGHUP reads the files again, and ends no session. A pair that is no good changes
// nothing, and shows.
func TestListenerCertificateReload(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	next := func() (config *tls.Config) {
		config = selfSigned(t, nil, "localhost", time.Hour, time.Hour/2)
		writePair(t, dir, config)
		return config
	}
	first := next()
	p := startProgram(t, nil, "-tls-cert", filepath.Join(dir, "cert.pem"), "-tls-key", filepath.Join(dir, "key.pem")).listening()
	p.secured = &tls.Config{InsecureSkipVerify: true}
	shows := func(config *tls.Config) bool {
		tc := p.dial().(*tls.Conn)
		defer tc.Close()
		return tc.Handshake() == nil && bytes.Equal(tc.ConnectionState().PeerCertificates[0].Raw, config.Certificates[0].Certificate[0])
	}
	b, ph := p.connect("/v2/server", binaryHeaders("s")), p.connect("/v2/client", phoneHeaders("s"))
	connID := ph.greet(b)
	if !shows(first) {
		t.Fatal("another certificate than that of the files")
	}
	second := next()
	p.signal(syscall.SIGHUP)
	eventually(t, "the new certificate is shown", func() bool { return shows(second) })
	writePair(t, dir, first)
	os.WriteFile(filepath.Join(dir, "key.pem"), []byte("no key"), 0o600)
	p.signal(syscall.SIGHUP)
	p.said("the certificate was not replaced: -tls-cert")
	if n := p.metric("tls_reload_failures_total"); n != 1 || !shows(second) {
		t.Errorf("%v failures, want 1, or not the certificate of before", n)
	}
	if s := getStatus(t, p.admin); !strings.HasPrefix(s.Summary, "the certificate was not replaced: -tls-cert") || !s.OK ||
		s.Expires == nil || time.Until(*s.Expires) < 0 || time.Until(*s.Expires) > time.Hour {
		t.Errorf("the status is %q, until %v", s.Summary, s.Expires)
	}
	if code, line, _ := runOnce(map[string]string{envName("admin"): p.admin, envName("tls-cert"): "cert.pem"}, "health"); code != 0 {
		t.Errorf("health: exit code %d: %s", code, line)
	}
	ph.text(`"still here"`)
	if e := b.envelope(); e.ConnID != connID || string(e.Frame) != `"still here"` {
		t.Errorf("got %+v over a session of before", e)
	}
	p.stopCleanly()
}

// The files are taken when they have changed and are the same at two looks, however
// they were replaced.
func TestListenerCertificateLook(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	live := filepath.Join(dir, "live")
	turn := func(n int) *tls.Config { // as certbot does
		config := selfSigned(t, nil, "localhost", time.Hour, time.Hour/2)
		to := filepath.Join(dir, fmt.Sprint(n))
		err := errors.Join(os.Mkdir(to, 0o700), os.Symlink(to, live+".new"), os.Rename(live+".new", live))
		if err != nil {
			t.Fatal(err)
		}
		writePair(t, to, config)
		return config
	}
	first := turn(1)
	var log logBuffer
	o := defaultOptions()
	o.tlsCert, o.tlsKey = filepath.Join(live, "cert.pem"), filepath.Join(live, "key.pem")
	var warned atomic.Pointer[warning]
	c, err := openCertificate(o, keptLog{newLogger(&log, o), &warned})
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, looks int, want *tls.Config, failures int64, lines int, bad bool) {
		t.Helper()
		for range looks {
			c.look(false)
		}
		_, n := c.state()
		if !bytes.Equal(c.current.Load().Certificate[0], want.Certificates[0].Certificate[0]) || n != failures ||
			strings.Count(log.String(), "\n") != lines || (warned.Load() != nil) != bad {
			t.Fatalf("%s: the wrong certificate, or %d failures, want %d, or not %d lines:\n%s", what, n, failures, lines, log.String())
		}
	}
	check("nothing new", 3, first, 0, 0, false)
	second := turn(2)
	check("one look", 1, first, 0, 0, false)
	check("two looks", 1, second, 0, 1, false)
	check("more looks", 3, second, 0, 1, false)
	turn(3)
	os.Remove(o.tlsKey)
	check("half of a pair", 4, second, 1, 2, true)
	third := selfSigned(t, nil, "localhost", time.Hour, time.Hour/2)
	writePair(t, live, third)
	check("the other half", 2, third, 1, 3, false)
	os.Chmod(o.tlsKey, 0o604)
	if runtime.GOOS != "windows" {
		check("open to everybody", 1, third, 1, 3, false) // whose content is the same, and error is not
		check("open to everybody", 3, third, 2, 4, true)
	}
}

// fromLoopback is a pipe that says where it comes from.
type fromLoopback struct{ net.Conn }

func (fromLoopback) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

// A peer that sends its handshake, or a proxy its header, in drops has the time that a
// request has, or less.
func TestListenerTime(t *testing.T) {
	t.Parallel()
	loopback := func(ln net.Listener) net.Listener {
		return wrappingListener{ln, func(nc net.Conn) net.Conn { return fromLoopback{nc} }}
	}
	hello := append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}, make([]byte, 500)...) // of 512 bytes in all
	for _, c := range []struct {
		name   string
		drops  []byte
		proxy  bool
		wrap   func(net.Listener) net.Listener
		time   time.Duration
		counts func(m *metrics) int64
	}{
		{"TLS", hello, false, func(ln net.Listener) net.Listener { return securedListener{ln} }, greetTime,
			func(m *metrics) int64 { return m.tlsFailures.Load() }},
		{"PROXY", []byte("PROXY UNKNOWN " + strings.Repeat("x", 80)), true, loopback,
			proxyTime, func(m *metrics) int64 { return m.proxyRefused.Load() }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o := timedOptions()
			o.proxyProtocol = c.proxy
			onFakeClockWith(t, o, c.wrap, func(t *testing.T, r *testRelay) {
				nc, err := r.connect()
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				for drops := c.drops; err == nil; drops = drops[1:] {
					time.Sleep(100 * time.Millisecond)
					_, err = nc.Write(drops[:1])
				}
				wantAfter(t, "cut off", start, c.time)
				if n := c.counts(r.metrics); n != 1 {
					t.Errorf("%d failures, want 1", n)
				}
			})
		})
	}
}
