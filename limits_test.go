package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// What strangers may cost: whose an address is and how often it may ask, what a
// request may be and how many wait, and the memory of the whole process.

// ---- addresses and rates ----

func prefixList(s string) (all []netip.Prefix) {
	for p := range strings.FieldsSeq(s) {
		all = append(all, netip.MustParsePrefix(p))
	}
	return all
}

func TestLimitsClientAddr(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name      string
		remote    string
		forwarded []string
		want      string
	}{
		{"no proxy", "203.0.113.7:1234", nil, "203.0.113.7"},
		{"a stranger's header is not believed", "203.0.113.7:1234", []string{"198.51.100.1"}, "203.0.113.7"},
		{"one proxy", "127.0.0.1:1", []string{"203.0.113.7"}, "203.0.113.7"},
		{"proxy over IPv6", "[::1]:1", []string{"203.0.113.7"}, "203.0.113.7"},
		{"proxy on a dual-stack socket", "[::ffff:127.0.0.1]:1", []string{"::ffff:203.0.113.7"}, "203.0.113.7"},
		{"what the client made up is left of it", "127.0.0.1:1", []string{"10.9.9.9, 8.8.8.8, 203.0.113.7"}, "203.0.113.7"},
		{"two trusted proxies", "127.0.0.1:1", []string{"8.8.8.8, 203.0.113.7, 10.0.0.5"}, "203.0.113.7"},
		{"lines count as one list", "127.0.0.1:1", []string{"203.0.113.7", "10.0.0.5, 10.0.0.6"}, "203.0.113.7"},
		{"only proxies", "127.0.0.1:1", []string{"10.0.0.5,10.0.0.6"}, "10.0.0.5"},
		{"with ports", "127.0.0.1:1", []string{"203.0.113.7:5000, 10.0.0.5:80"}, "203.0.113.7"},
		{"IPv6 as proxies write it", "127.0.0.1:1", []string{"2001:db8::7"}, "2001:db8::7"},
		{"IPv6 in brackets", "127.0.0.1:1", []string{"[2001:db8::7]"}, "2001:db8::7"},
		{"IPv6 with port", "127.0.0.1:1", []string{"[2001:db8::7]:443"}, "2001:db8::7"},
		{"a trusted network of IPv6", "127.0.0.1:1", []string{"2001:db8::7, fd00::1"}, "2001:db8::7"},
		{"not an address", "127.0.0.1:1", []string{"203.0.113.7, unknown"}, "127.0.0.1"},
		{"not an address behind a trusted hop", "127.0.0.1:1", []string{"203.0.113.7, unknown, 10.0.0.5"}, "10.0.0.5"},
		{"a host name", "127.0.0.1:1", []string{"example.com"}, "127.0.0.1"},
		{"empty", "127.0.0.1:1", []string{""}, "127.0.0.1"},
		{"an empty line behind another", "127.0.0.1:1", []string{"203.0.113.7", ""}, "203.0.113.7"},
		{"a letter behind another line", "127.0.0.1:1", []string{"203.0.113.7", "x"}, "127.0.0.1"},
		{"an empty entry", "127.0.0.1:1", []string{"203.0.113.7,"}, "127.0.0.1"},
		{"a proxy on the link", "[fe80::1%eth0]:1", []string{"203.0.113.7"}, "203.0.113.7"},
		{"a zone, which is somebody else's", "127.0.0.1:1", []string{"[fe90::1%eth0]:80"}, "fe90::1"},
		{"spaces", "127.0.0.1:1", []string{"  8.8.8.8 ,\t203.0.113.7  "}, "203.0.113.7"},
	} {
		q := &http.Request{RemoteAddr: c.remote, Header: http.Header{"X-Forwarded-For": c.forwarded}}
		if got := clientAddr(q, prefixList("127.0.0.0/8 ::1/128 10.0.0.0/8 fd00::/8 fe80::/16")); got.String() != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// FuzzForwardedFor: the right-most address that is not trusted decides, and
// nothing left of it can change that.
func FuzzForwardedFor(f *testing.F) {
	for _, s := range []string{
		"", ",", ", ", "203.0.113.7", "10.0.0.5, 203.0.113.7", "203.0.113.7, 10.0.0.5", "[2001:db8::7]:443, fd00::1", "unknown", "fe80::1%eth0",
		"[fe80::1%25x]:1", "1.2.3.4:99999", "::ffff:10.0.0.1", "0x7f.1", "127.1", "[[1.2.3.4]]", "1.2.3.4]", ":80", "10.0.0.1,,10.0.0.2",
	} {
		f.Add("127.0.0.1:1", s, s)
		f.Add("[2001:db8::1]:1", s, "10.0.0.5")
		f.Add("not an address", s, "")
	}
	trusted := prefixList("127.0.0.0/8 ::1/128 10.0.0.0/8 fd00::/8")
	f.Fuzz(func(t *testing.T, remote, line1, line2 string) {
		ask := func(lines ...string) netip.Addr {
			return clientAddr(&http.Request{RemoteAddr: remote, Header: http.Header{"X-Forwarded-For": lines}}, trusted)
		}
		believed := func(a netip.Addr) bool {
			return slices.ContainsFunc(trusted, func(n netip.Prefix) bool { return n.Contains(a) })
		}
		var entries []string
		for _, line := range []string{line1, line2} {
			if line != "" {
				entries = append(entries, strings.Split(line, ",")...)
			}
		}
		peer, _ := netip.ParseAddrPort(remote)
		want := peer.Addr().Unmap().WithZone("")
		for _, entry := range slices.Backward(entries) { // each vouched for by the one before
			hop, ok := parseHop(strings.TrimSpace(entry))
			if !ok || !believed(want) {
				break
			}
			want = hop
		}
		if got := ask(line1, line2); got != want || got.Is4In6() {
			t.Fatalf("%q, %q from %q: %s, want %s", line1, line2, remote, got, want)
		}
		if believed(peer.Addr().Unmap().WithZone("")) {
			for _, lines := range [][]string{{line1 + ", 203.0.113.7"}, {line1, line2, "203.0.113.7, 10.0.0.5"}} {
				if got := ask(lines...); got != netip.MustParseAddr("203.0.113.7") {
					t.Fatalf("%q from %q: %s, want what the proxy has seen", lines, remote, got)
				}
			}
		}
		// An address that is read is the same one in every way of writing it.
		if a, ok := parseHop(line1); ok {
			for _, form := range []string{a.String(), "[" + a.String() + "]", netip.AddrPortFrom(a, 80).String()} {
				if again, ok := parseHop(form); !ok || again != a {
					t.Fatalf("%q is %s, and that written as %q is %s", line1, a, form, again)
				}
			}
		}
	})
}

func TestLimitsRateKey(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"203.0.113.7":           "203.0.113.7",
		"::ffff:203.0.113.7":    "203.0.113.7",
		"2001:db8:1:2:3:4:5:6":  "2001:db8:1:2::",
		"2001:db8:1:2:ffff::1":  "2001:db8:1:2::",
		"2001:db8:1:3::1":       "2001:db8:1:3::",
		"fe80::1234:5678:9%any": "fe80::",
		"::1":                   "::",
	} {
		if got := rateKey(netip.MustParseAddr(in)); got.String() != want {
			t.Errorf("%s shares the bucket of %s, want %s", in, got, want)
		}
	}
}

// testClock is a clock that a test moves.
type testClock struct{ at time.Time }

func newTestClock() *testClock               { return &testClock{time.Unix(1e9, 0)} }
func (c *testClock) now() time.Time          { return c.at }
func (c *testClock) advance(d time.Duration) { c.at = c.at.Add(d) }

// testRates are buckets of 10 a minute with a burst of 20, the defaults.
func testRates(clock *testClock) *rates { return newRates(defaultOptions(), clock.now) }

func addrNumber(i int) netip.Addr {
	return netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)})
}

// exhaust asks until it is refused, and returns how often it was not.
func exhaust(r *rates, addr netip.Addr) (n int) {
	for ok, _ := r.allow(addr); ok; ok, _ = r.allow(addr) {
		n++
	}
	return n
}

func TestLimitsRates(t *testing.T) {
	t.Parallel()
	clock := newTestClock()
	r := testRates(clock)
	one, other := addrNumber(1), addrNumber(2)
	for i, step := range []struct {
		after time.Duration
		addr  netip.Addr
		want  int
	}{
		{0, one, 20},
		{0, other, 20},
		{6 * time.Second, one, 1},
		{time.Minute, one, 10},
		{time.Second, one, 0},
		{time.Second, other, 11},
		{time.Hour, one, 20},
	} {
		clock.advance(step.after)
		if n := exhaust(r, step.addr); n != step.want {
			t.Errorf("step %d: %d allowed, want %d", i, n, step.want)
		}
	}
	off := newRates(testOptions(), clock.now)
	for range 1000 {
		if ok, _ := off.allow(one); !ok {
			t.Fatal("refused with -rate-per-minute 0")
		}
	}
}

// Who waits for as long as Retry-After says is let in, and not a moment earlier.
func TestLimitsRatesWait(t *testing.T) {
	t.Parallel()
	clock := newTestClock()
	r := testRates(clock)
	addr := addrNumber(1)
	exhaust(r, addr)
	for range 50 {
		_, wait := r.allow(addr)
		if wait <= 0 || wait > 6*time.Second {
			t.Fatalf("wait is %v, one token takes 6s", wait)
		}
		clock.advance(wait - 1)
		if ok, left := r.allow(addr); ok || left != 1 {
			t.Fatalf("a nanosecond early: allowed %v, %v to wait", ok, left)
		}
		clock.advance(1)
		if ok, _ := r.allow(addr); !ok {
			t.Fatalf("refused after a wait of %v", wait)
		}
	}
}

// Buckets that are full again are forgotten.
func TestLimitsRatesSweep(t *testing.T) {
	t.Parallel()
	clock := newTestClock()
	r := testRates(clock)
	for i := range 1000 {
		r.allow(addrNumber(i))
	}
	clock.advance(time.Minute)
	exhaust(r, addrNumber(2000))
	if len(r.seen) != 1001 {
		t.Fatalf("%d buckets, want 1,001", len(r.seen))
	}
	clock.advance(time.Minute + 1)
	r.allow(addrNumber(3000))
	if len(r.seen) != 2 {
		t.Errorf("%d buckets after a sweep, want the newest and the one that is not full", len(r.seen))
	}
	if n := exhaust(r, addrNumber(2000)); n != 10 {
		t.Errorf("%d allowed after a minute and a sweep, want 10", n)
	}
}

// A stranger with more addresses than the table holds locks nobody out, and
// does not buy an address that is over its rate a new bucket.
func TestLimitsRatesEviction(t *testing.T) {
	t.Parallel()
	clock := newTestClock()
	r := testRates(clock)
	greedy := netip.MustParseAddr("192.0.2.1")
	exhaust(r, greedy)
	for i := range maxAddresses + 5000 {
		if ok, _ := r.allow(addrNumber(i)); !ok {
			t.Fatalf("address %d was refused", i)
		}
		if len(r.seen) > maxAddresses {
			t.Fatalf("%d buckets, limit %d", len(r.seen), maxAddresses)
		}
	}
	if len(r.seen) != maxAddresses {
		t.Errorf("%d buckets, want a full table of %d", len(r.seen), maxAddresses)
	}
	if r.allow(addrNumber(maxAddresses + 4999)); len(r.seen) != maxAddresses {
		t.Errorf("%d buckets: one had to go for an address that has one", len(r.seen))
	}
	// Of eight buckets the fullest goes, which the emptiest of all never is.
	if ok, _ := r.allow(greedy); ok {
		t.Error("the emptiest bucket was forgotten")
	}
}

// TestLimitsStalest: of up to evictLooks entries the earliest goes, of more another one at times.
func TestLimitsStalest(t *testing.T) {
	t.Parallel()
	when := func(v int64) int64 { return v }
	if k, ok := stalest(map[int]int64{}, when); ok {
		t.Errorf("of none %d goes", k)
	}
	table := map[int]int64{}
	for k := range evictLooks {
		table[k] = int64(k)
	}
	for range 200 {
		if k, ok := stalest(table, when); k != 0 || !ok {
			t.Fatalf("%d goes, %v", k, ok)
		}
	}
	for k := range 100 * evictLooks {
		table[k] = int64(k)
	}
	spared := 0
	for range 200 {
		if k, _ := stalest(table, when); k != 0 {
			spared++
		}
	}
	if spared < 100 {
		t.Errorf("all are looked at for one to go: the earliest stayed %d of 200 times", spared)
	}
}

func TestLimitsLogGate(t *testing.T) {
	t.Parallel()
	var g logGate
	var got []string
	for i := range 30 { // ten a second
		at := time.Hour + time.Duration(i)*100*time.Millisecond
		if skipped, ok := g.allow(int64(at)); ok {
			got = append(got, fmt.Sprint(i, "/", skipped))
		}
	}
	// Five a second, and the first of a second tells of those left out before.
	want := []string{"0/0", "1/0", "2/0", "3/0", "4/0", "10/5", "11/0", "12/0", "13/0", "14/0", "20/5", "21/0", "22/0", "23/0", "24/0"}
	if !slices.Equal(got, want) {
		t.Errorf("lines %q, want %q", got, want)
	}
}

// A proxy that is not trusted is named once, and of many strangers only so many.
func TestLimitsUntrustedProxyIsNamed(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	ask := func(peer string, forwarded ...string) {
		q := httptest.NewRequest("GET", "/v2/client", nil)
		q.RemoteAddr = netip.AddrPortFrom(netip.MustParseAddr(peer), 1234).String()
		q.Header["X-Forwarded-For"] = forwarded
		r.ServeHTTP(httptest.NewRecorder(), q)
	}
	said := func() (n int) { return strings.Count(r.logs.String(), "X-Forwarded-For from ") }
	ask("172.18.0.1")
	ask("127.0.0.1", "172.18.0.3")
	ask("127.0.0.1", "no address")
	if n := said(); n != 0 {
		t.Fatalf("%d lines about nothing", n)
	}
	ask("172.18.0.2", "192.0.2.1")
	ask("172.18.0.2", "192.0.2.2")
	ask("::ffff:172.18.0.2", "192.0.2.3")
	want := "level=WARN msg=\"X-Forwarded-For from 172.18.0.2 ignored: it is not in -trusted-proxies; " +
		"all who come through it share one rate limit\"\n"
	if n := said(); n != 1 || !strings.Contains(r.logs.String(), want) {
		t.Errorf("%d lines, want one: %s", n, want)
	}
	ask("2001:db8::1", "192.0.2.1")
	ask("2001:db8::2", "192.0.2.1") // the same household
	if n := said(); n != 2 {
		t.Errorf("%d lines for two addresses and one /64, want 2", n)
	}
	for range 2 * maxUntrusted {
		ask(freshAddr(), "192.0.2.1")
	}
	if n := said(); n != maxUntrusted {
		t.Errorf("%d lines, want %d at most", n, maxUntrusted)
	}
}

// ---- what the system allows ----

// The least of what the machine has and what a control group allows counts.
func TestLimitsMemoryAllowed(t *testing.T) {
	t.Parallel()
	const machine = "proc/meminfo=MemTotal:        1024 kB\nMemFree:          512 kB\n"
	for _, c := range []struct {
		name  string
		files string // name=text, parted by |
		want  int64
		from  string
	}{
		{"nothing is known", "", math.MaxInt64, ""},
		{"the machine", machine, 1 << 20, "/proc/meminfo"},
		{"version 2", machine + "|proc/self/cgroup=0::/a/b\n|sys/fs/cgroup/a/b/memory.max=65536\n|sys/fs/cgroup/a/memory.max=max\n",
			65536, "/sys/fs/cgroup/a/b/memory.max"},
		{"version 2, a group above", "proc/self/cgroup=0::/a/b/c\n|sys/fs/cgroup/a/b/c/memory.max=max\n|sys/fs/cgroup/a/memory.max=4096\n",
			4096, "/sys/fs/cgroup/a/memory.max"},
		{"version 2, in a container", machine + "|proc/self/cgroup=0::/\n|sys/fs/cgroup/memory.max=8192\n", 8192, "/sys/fs/cgroup/memory.max"},
		{"version 2, a path outside of the container", "proc/self/cgroup=0::/../../host/x\n|sys/fs/cgroup/memory.max=8192\n",
			8192, "/sys/fs/cgroup/memory.max"},
		{"version 2, no limit", machine + "|proc/self/cgroup=0::/a\n|sys/fs/cgroup/a/memory.max=max\n", 1 << 20, "/proc/meminfo"},
		{"version 1", machine + "|proc/self/cgroup=9:name=systemd:/\n4:hugetlb,memory:/docker/1\n1:cpu:/x\n|" +
			"sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes=12288\n", 12288, "/sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes"},
		{"version 1, in a container", "proc/self/cgroup=4:memory:/docker/1\n|sys/fs/cgroup/memory/memory.limit_in_bytes=12288\n",
			12288, "/sys/fs/cgroup/memory/memory.limit_in_bytes"},
		{"version 1, no limit", machine + "|proc/self/cgroup=4:memory:/\n|sys/fs/cgroup/memory/memory.limit_in_bytes=9223372036854771712\n",
			1 << 20, "/proc/meminfo"},
		{"both", "proc/self/cgroup=4:memory:/a\n0::/b\n|sys/fs/cgroup/memory/a/memory.limit_in_bytes=16384\n|" +
			"sys/fs/cgroup/b/memory.max=20480\n", 16384, "/sys/fs/cgroup/memory/a/memory.limit_in_bytes"},
		{"unreadable", "proc/meminfo=what\n|proc/self/cgroup=0:\n\nx\n0::/\n|sys/fs/cgroup/memory.max=-1\n", math.MaxInt64, ""},
	} {
		root := t.TempDir()
		for f := range strings.SplitSeq(c.files, "|") {
			name, text, _ := strings.Cut(f, "=")
			file := filepath.Join(root, name)
			err := os.MkdirAll(filepath.Dir(file), 0o700)
			if err == nil && name != "" {
				err = os.WriteFile(file, []byte(text), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if n, from := memoryAllowed(root); n != c.want || from != c.from {
			t.Errorf("%s: %d by %q, want %d by %q", c.name, n, from, c.want, c.from)
		}
	}
}

// Where the options need more than the process may have, the warning says what
// would fit, and that does.
func TestLimitsMemoryWarning(t *testing.T) {
	t.Parallel()
	o := defaultOptions()
	need, total := memoryNeeded(o), o.queueTotal
	for _, c := range []struct {
		total, allowed int64
		want           string // the end of the warning
	}{
		{total, need, ""},
		{total, need - 1, fmt.Sprintf(" or lower -queue-total\" allowed=%d by=file needed=%d queue_total=%d queue_total_that_fits=%d\n",
			need-1, need, total, total-1)},
		{total - 1, need - 1, ""},
		{total, 64 << 20, fmt.Sprintf("-queue and -max-connections\" allowed=%d by=file needed=%d\n", 64<<20, need)},
	} {
		var log logBuffer
		o.queueTotal = c.total
		warnMemory(o, c.allowed, "file", keeping(newLogger(&log, o)))
		if got := log.String(); !strings.HasSuffix(got, c.want) || c.want == "" && got != "" {
			t.Errorf("%d allowed with -queue-total %d: %q, want %q", c.allowed, c.total, got, c.want)
		}
	}
}

// ---- requests ----

// upgradeHead is the head of a request that is upgraded, but for what swap says:
// pairs of a text in it and its replacement.
func upgradeHead(swap ...string) string {
	head := "GET /v2/client HTTP/1.1\r\nHost: relay.example.com\r\nUser-Agent: app/1\r\nX-Pyrycode-Server: server\r\n" +
		"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	for i := 0; i < len(swap); i += 2 {
		if !strings.Contains(head, swap[i]) {
			panic("no such part: " + swap[i])
		}
		head = strings.Replace(head, swap[i], swap[i+1], 1)
	}
	return head
}

// headLines are n lines of a head, with a number in each.
func headLines(n int, format string) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

// oddRequests are what parsers of HTTP have disagreed about.
func oddRequests() (all []string) {
	const host, agent, end = "Host: relay.example.com\r\n", "User-Agent: app/1\r\n", "\r\n\r\n"
	for _, h := range []string{"", "Host:\r\n", "Host: a b\r\n", "Host: a\r\nHost: b\r\n", "Host: a/b\r\n", "Host: a\x00b\r\n",
		"host : a\r\n", "Host: [::1]:80\r\n", "Host: ü\r\n"} {
		all = append(all, upgradeHead(host, h))
	}
	for _, extra := range []string{
		"Bad Name: x\r\n", "Bad\tName: x\r\n", ": x\r\n", "NoColon\r\n", "X(Y): z\r\n", "X-Nul: a\x00b\r\n", "X-Ctl: a\x01b\r\n",
		"X-Del: \x7f\r\n", "X-High: \xff\r\n",
		"X-Fold: a\r\n b\r\n", " X-First: fold\r\n", "X-Cr: a\rb\r\n", "X-Empty:\r\n", "X-Lf: a\n", "X-Space : a\r\n",
		"Expect: 100-continue\r\n", "Expect: 200-ok\r\n", "Expect: 100-continue, x\r\n", "Expect:\r\n",
		"Content-Length: 0\r\n", "Content-Length: 5\r\n", "Content-Length: -1\r\n", "Content-Length: +5\r\n",
		"Content-Length: 5\r\nContent-Length: 6\r\n",
		"Content-Length: 5\r\nContent-Length: 5\r\n", "Content-Length: 5, 5\r\n", "Content-Length: 0x5\r\n",
		"Content-Length: 99999999999999999999\r\n",
		"Transfer-Encoding: chunked\r\n", "Transfer-Encoding: gzip\r\n", "Transfer-Encoding: chunked, identity\r\n",
		"Transfer-Encoding:\vchunked\r\n",
		"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
		"Trailer: X\r\n",
		"Upgrade: h2c\r\n", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nUpgrade: h2c\r\n", "Connection: close\r\n",
		"Connection: keep-alive\r\n", "Sec-WebSocket-Protocol: chat\r\n",
		"Sec-WebSocket-Extensions: permessage-deflate\r\n", "Origin: null\r\n", "Origin: ::\r\n", "X-Pyrycode-Token: secret\r\n",
		"Cookie: a=b\r\n",
		"X-Long: " + strings.Repeat("a", 3000) + "\r\n", "X-Long: " + strings.Repeat("a", 5000) + "\r\n",
		"X-Long: " + strings.Repeat("a", 7600) + "\r\n",
		"X-Long: " + strings.Repeat("a", 9000) + "\r\n", "X-Long: " + strings.Repeat("a", 30000) + "\r\n",
		strings.Repeat("b", 4000) + ": x\r\n", strings.Repeat("c", 9000),
		headLines(50, "X-%d: a\r\n"), headLines(91, "X-%d: a\r\n"), headLines(92, "X-%d: a\r\n"), headLines(93, "X-%d: a\r\n"),
		headLines(92, "X-%d: a\n"), headLines(93, "X-%d: a\n"), headLines(400, "X-%d: a\r\n"), headLines(2000, "%d:\n"),
		headLines(92, "X: %d\r\n a\r\n"), headLines(95, "X-%d: a\r\n") + "Bad Name: x\r\n", headLines(80, "X-%d: a\r\n") + "Bad Name: x\r\n",
	} {
		all = append(all, upgradeHead(agent, agent+extra), upgradeHead(agent, agent+extra, "Key: dG", "Key: "))
	}
	for _, first := range []string{
		"GET /v2/client HTTP/1.0", "GET /v2/client HTTP/1.2", "GET /v2/client HTTP/2.0", "GET /v2/client HTTP/0.9",
		"GET /v2/client HTTP/3.0", "GET /v2/client http/1.1", "GET /v2/client HTTP/1.1 ",
		"GET /v2/client", "GET  /v2/client HTTP/1.1", " GET /v2/client HTTP/1.1", "\r\nGET /v2/client HTTP/1.1",
		"\n\nGET /v2/client HTTP/1.1", "GET /v2/client\tHTTP/1.1", "GET /v2/client HTTP/1.1\r", "PRI * HTTP/2.0", "",
		"get /v2/client HTTP/1.1", "G@T /v2/client HTTP/1.1", "POST /v2/client HTTP/1.1", "OPTIONS * HTTP/1.1",
		"CONNECT relay:1 HTTP/1.1", "HEAD /v2/client HTTP/1.1", "DELETE /readyz HTTP/1.1",
		"GET http://relay/v2/client HTTP/1.1", "GET //v2/client HTTP/1.1", "GET /v2/client/ HTTP/1.1", "GET /v2/../v2/client HTTP/1.1",
		"GET /v2/%63lient HTTP/1.1", "GET /v2/client?a=%zz HTTP/1.1",
		"GET /v2/client#x HTTP/1.1", "GET /v2%2fclient HTTP/1.1", "GET /v2/cli\x00ent HTTP/1.1", "GET /\xff HTTP/1.1", "GET / HTTP/1.1",
		"GET /readyz HTTP/1.1", "GET /nowhere HTTP/1.1", "GET /" + strings.Repeat("a", 9000) + " HTTP/1.1",
		"GET /v2/server HTTP/1.1", "GET /v1/server HTTP/1.0", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "SSH-2.0-OpenSSH_9",
		"*1\r\n$4\r\nPING",
	} {
		all = append(all, upgradeHead("GET /v2/client HTTP/1.1", first))
	}
	open := strings.TrimSuffix(upgradeHead(), end)
	return append(all, open+"\n\n", open+"\r\n\n", open+"\n\r\n", strings.ReplaceAll(upgradeHead(), "\r\n", "\n"),
		strings.ReplaceAll(upgradeHead(), "\r\n", "\r"), strings.ReplaceAll(upgradeHead(), "\r\n", "\r\r\n"))
}

// gatedRequest draws a request and says how the contract's gates answer it: the
// first that does not let it through.
func gatedRequest(rng *rand.Rand) (head string, status int) {
	status = http.StatusSwitchingProtocols
	var swap []string
	gate := func(refused int, part string, good, bad []string) {
		if rng.IntN(3) > 0 {
			swap = append(swap, part, good[rng.IntN(len(good))])
			return
		}
		swap = append(swap, part, bad[rng.IntN(len(bad))])
		if status == http.StatusSwitchingProtocols {
			status = refused
		}
	}
	gate(400, "User-Agent: app/1\r\n", []string{"user-agent: x\r\n"}, []string{"", "User-Agent:\r\n", "User-Agent:  \r\n"})
	gate(400, "X-Pyrycode-Server: server\r\n", []string{"x-pyrycode-server:server\r\n",
		"X-Pyrycode-Server: server\r\nX-Pyrycode-Server: ?\r\n"},
		[]string{"", "X-Pyrycode-Server: \r\n", "X-Pyrycode-Server: a b\r\n", "X-Pyrycode-Server: " + strings.Repeat("a", 129) + "\r\n"})
	gate(405, "GET ", []string{"GET "}, []string{"POST ", "PUT ", "get "})
	gate(426, "HTTP/1.1", []string{"HTTP/1.1"}, []string{"HTTP/1.0"})
	gate(426, "Connection: Upgrade\r\n", []string{"Connection: keep-alive, upgrade\r\n", "Connection: x\r\nConnection: UPGRADE\r\n"},
		[]string{"", "Connection: keep-alive\r\n", "Connection: upgraded\r\n"})
	gate(426, "Upgrade: websocket\r\n", []string{"Upgrade: WebSocket\r\n"}, []string{"", "Upgrade: websockets\r\n"})
	gate(426, "Version: 13\r\n", []string{"Version: 13\r\n"}, []string{"Version: 12\r\n", "Versions: 13\r\n",
		"Version: 13\r\nSec-WebSocket-Version: 13\r\n", "Version: 13, 8\r\n"})
	gate(400, "Key: dGhlIHNhbXBsZSBub25jZQ==", []string{"Key: AAAAAAAAAAAAAAAAAAAAAA=="}, []string{"Key: ",
		"Key: dGhlIHNhbXBsZSBub25jZQ=", "Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Keys: x"})
	return upgradeHead(swap...), status
}

// An answer is that to the request, not to how it arrives; and what is sent right
// behind a request that is upgraded reaches the session.
func TestLimitsOneAnswerForOneRequest(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	r.binary("server")
	ask := func(head string, pieces func(left int) int) (answer string) {
		nc, err := r.connect()
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(patience))
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			all := append([]byte(head), clientFrame(0x80, opPing, []byte("behind"))...)
			all = append(all, clientFrame(0x80, opClose, closePayload(4000, ""))...)
			for len(all) > 0 {
				n := pieces(len(all))
				if _, err := nc.Write(all[:n]); err != nil {
					return // answered already
				}
				all = all[n:]
			}
			nc.(*net.TCPConn).CloseWrite() // else a head without an end is waited for
		}()
		defer func() { <-sent }()
		br := bufio.NewReader(nc)
		a, err := http.ReadResponse(br, &http.Request{Method: strings.SplitN(head, " ", 2)[0]})
		if err != nil {
			return "no answer"
		}
		if a.StatusCode != http.StatusSwitchingProtocols {
			body, _ := io.ReadAll(a.Body)
			nc.Close()
			return fmt.Sprint(a.StatusCode, " ", string(body))
		}
		rest, _ := io.ReadAll(br)
		want := append([]byte{0x80 | opPong, 6}, "behind"...)
		if want = append(want, 0x80|opClose, 2, 4000>>8, 4000&0xff); !bytes.Equal(rest, want) {
			return fmt.Sprintf("101, and what was sent behind it is answered % x", rest)
		}
		return "101"
	}
	rng := rand.New(rand.NewPCG(24, 9))
	whole := func(left int) int { return left }
	check := func(head string, status int) {
		want := ask(head, whole)
		if status != 0 && !strings.HasPrefix(want, fmt.Sprint(status)) {
			t.Errorf("answer %q, want %d, to\n%q", want, status, head)
		}
		pieces := func(left int) int { return 1 + rng.IntN(min(left, 64)) }
		ways := map[string]func(int) int{"in pieces": pieces, "in another way": pieces}
		if len(head) < 2000 {
			ways["byte by byte"] = func(int) int { return 1 }
		}
		for how, next := range ways {
			if got := ask(head, next); got != want {
				t.Errorf("answer %q in one piece and %q %s, to\n%.300q", want, got, how, head)
			}
		}
	}
	for _, head := range oddRequests() {
		check(head, 0)
	}
	for range 250 {
		head, status := gatedRequest(rng)
		check(head, status)
	}
}

// chunkConn is a net.Conn that gives chunks and takes what is written.
type chunkConn struct {
	net.Conn
	chunks []string
	wrote  strings.Builder
}

func (c *chunkConn) Read(p []byte) (int, error) {
	if len(c.chunks) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.chunks[0])
	if c.chunks[0] = c.chunks[0][n:]; c.chunks[0] == "" {
		c.chunks = c.chunks[1:]
	}
	return n, nil
}

func (c *chunkConn) Write(p []byte) (int, error)     { return c.wrote.Write(p) }
func (c *chunkConn) SetReadDeadline(time.Time) error { return nil }

// TestLimitsHeadLines: a head passes with up to maxHeadLines, however it comes; what goes
// beyond does not, and is answered 431.
func TestLimitsHeadLines(t *testing.T) {
	t.Parallel()
	lines := func(n int) string { return strings.Repeat("A:b\r\n", n) }
	head := lines(maxHeadLines) + "\r\n"
	for _, tt := range []struct {
		name, in string
		passes   int // bytes; all of it if it is 0
	}{
		{"a usual head", lines(10) + "\r\n", 0},
		{"as many as may be", head, 0},
		{"one more", lines(maxHeadLines+1) + "\r\n", len(head) - 2},
		{"letters without end", strings.Repeat("a", 1000) + "\r\n\r\n", 0},
		{"many more, of a letter", strings.Repeat("a\n", 1000), 2 * maxHeadLines},
		{"two heads", head + head, 0},
		{"two heads, the second too long", head + lines(maxHeadLines+1) + "A", 2*len(head) - 2},
		{"150 heads of a line", strings.Repeat("A:b\r\n\r\n", 150), 0},
		{"empty lines before one too long", "\n\n" + strings.Repeat("a\n", maxHeadLines+1), 2 + 2*maxHeadLines},
		{"empty lines before", strings.Repeat("\r\n", 200) + head, 0},
	} {
		for _, size := range []int{1, 2, 7, len(head)} {
			c := &chunkConn{}
			for rest := tt.in; rest != ""; {
				n := min(size, len(rest))
				c.chunks, rest = append(c.chunks, rest[:n]), rest[n:]
			}
			g := &httpConn{Conn: c}
			p, passed := make([]byte, 1<<20), 0
			for err := error(nil); err == nil; {
				var n int
				n, err = g.Read(p)
				passed += n
			}
			want, refused := tt.passes, tt.passes > 0
			if !refused {
				want = len(tt.in)
			}
			said := strings.HasPrefix(c.wrote.String(), "HTTP/1.1 431 ") && strings.Contains(c.wrote.String(), "\r\nCache-Control: no-store\r\n")
			if said != refused || passed != want {
				t.Errorf("%s, %d bytes at a time: %d bytes passed, want %d; said %q", tt.name, size, passed, want, c.wrote.String())
			}
		}
	}
	// What stands behind a head in one read may be a session's bytes.
	c := &chunkConn{chunks: []string{head + lines(maxHeadLines+1), "A"}}
	g, p := &httpConn{Conn: c}, make([]byte, 1<<20)
	if n, err := g.Read(p); n != len(head)+len(lines(maxHeadLines+1)) || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if n, err := g.Read(p); n != 0 || err != io.EOF || !strings.HasPrefix(c.wrote.String(), "HTTP/1.1 431 ") {
		t.Errorf("%d bytes, %v, said %q", n, err, c.wrote.String())
	}
	// For one byte nobody waits, except within a head.
	g = &httpConn{Conn: &chunkConn{chunks: strings.Split("aB\rC\nD\rE\nF\r\nG\r\n\r\n", "")}}
	waits := ""
	for {
		n, err := g.Read(p[:1])
		if n == 0 && err == os.ErrDeadlineExceeded {
			waits += "-"
			n, err = g.Read(p[:2])
		}
		if err != nil {
			break
		}
		waits += string(p[:n])
	}
	if want := "-aB\rC\nD\rE\nF\r\nG\r\n\r\n-"; waits != want {
		t.Errorf("one byte at a time: %q, want %q", waits, want)
	}
}

// endConn is a net.Conn of which only the end matters.
type endConn struct {
	net.Conn
	closed bool
}

func (c *endConn) Close() error { c.closed = true; return nil }

func TestLimitsIdle(t *testing.T) {
	t.Parallel()
	hook := new(httpListener).track
	var all []*httpConn
	arrive := func() *httpConn {
		g := &httpConn{Conn: new(endConn)}
		all = append(all, g)
		hook(g, http.StateNew)
		return g
	}
	closed := func(g *httpConn) bool { return g.Conn.(*endConn).closed }
	gone := map[*httpConn]bool{}
	end := func(g *httpConn, s http.ConnState) { // which net/http says once
		if !gone[g] {
			gone[g] = true
			hook(g, s)
		}
	}
	// net/http says so when it finds out.
	sweep := func() (n int) {
		for _, g := range all {
			if closed(g) {
				n++
				hook(g, http.StateActive) // it may have been about to
				hook(g, http.StateIdle)
				end(g, http.StateClosed)
			}
		}
		return n
	}
	for range maxWaiting {
		arrive()
	}
	if n := sweep(); n != 0 {
		t.Fatalf("%d were turned away while there was room", n)
	}
	for _, c := range all {
		hook(c, http.StateActive) // a byte of a request is no request
	}
	end(all[0], http.StateHijacked) // a session now
	end(all[1], http.StateClosed)
	for i, want := range []int{0, 0, 1, 2} {
		arrive()
		if got := sweep(); got != want {
			t.Fatalf("two places were given back: after arrival %d %d had to go, want %d", i+1, got, want)
		}
	}
	if closed(all[0]) || !closed(all[2]) || !closed(all[3]) {
		t.Fatal("a session had to go, or not the two that had waited for the longest")
	}
	// One whose requests are answered is not the one to go, however many come.
	busy := all[4:8]
	for _, c := range busy {
		hook(c, http.StateIdle)
	}
	for range 2 * maxWaiting {
		for _, c := range busy {
			hook(c, http.StateIdle)
		}
		last := arrive()
		for _, c := range append(busy, last) {
			if closed(c) {
				t.Fatal("one that had just moved had to go")
			}
		}
	}
	for _, c := range all {
		end(c, http.StateClosed)
	}
	all = nil
	for range maxWaiting {
		arrive()
	}
	if n := sweep(); n != 0 {
		t.Errorf("%d were turned away after all had gone", n)
	}
}

// ---- strangers who dawdle ----

// dawdlers keep half as many connections again as there is room for, which send
// what head says and then a byte of it now and then, and come back when they have
// to go: each arrival takes a word of arrive.
func dawdlers(t testing.TB, addr string, arrive <-chan struct{}, head func(i int) string) (stop func()) {
	const n = maxWaiting + maxWaiting/2
	quit := make(chan struct{})
	var here, done sync.WaitGroup
	here.Add(n)
	for i := range n {
		done.Go(func() {
			for first := true; ; first = false {
				select {
				case <-arrive:
				case <-quit:
					return
				}
				nc, err := net.Dial("tcp", addr)
				if err == nil {
					nc.Write([]byte(head(i)))
				}
				if first {
					here.Done()
				}
				for again := time.NewTicker(200 * time.Millisecond); err == nil; {
					select {
					case <-quit:
						nc.Close()
						return
					case <-again.C:
						_, err = nc.Write([]byte("x"))
					}
				}
				if nc == nil {
					t.Error(err)
					return
				}
				nc.Close()
			}
		})
	}
	stop = sync.OnceFunc(func() {
		close(quit)
		done.Wait()
	})
	t.Cleanup(stop)
	here.Wait()
	return stop
}

// Honest newcomers are served beside any number of strangers who dawdle, while
// these arrive as well as later. A newcomer has to go after maxWaiting later
// arrivals at the earliest. At most half as many are on their way beside one here,
// so that none has to go however the machine schedules the relay.
func TestLimitsNewcomersBesideDawdlers(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-rate-per-minute", "0").listening()
	head := "GET /v2/client HTTP/1.1\r\n" + strings.Repeat("A:\n", 3000)
	arrive := make(chan struct{}, maxWaiting/2)
	var sent int64
	var arrived atomic.Int64
	var strangers sync.WaitGroup
	stop := func() {}
	strangers.Go(func() {
		stop = dawdlers(t, p.addr, arrive, func(i int) string {
			arrived.Add(1)
			return head[:30+i*3%len(head[30:])]
		})
	})
	var took []time.Duration
	for i := range 300 {
		for sent-arrived.Load() < maxWaiting/2 {
			arrive <- struct{}{}
			sent++
		}
		began := time.Now()
		path, h := "/v2/client", phoneHeaders("server")
		if i%2 == 0 {
			path, h = "/v2/server", binaryHeaders(fmt.Sprint("server-", i))
		}
		nc := p.dial()
		if _, _, err := handshake(t, nc, path, h); err != nil {
			t.Errorf("newcomer %d of 300: %v", i+1, err)
		}
		took = append(took, time.Since(began))
		nc.Close()
	}
	close(arrive) // those who are left come too
	strangers.Wait()
	stop()
	slices.Sort(took)
	t.Logf("half of them connected within %v, 99 of 100 within %v", took[150], took[297])
}

// ---- memory ----

// The process keeps what README promises of its memory, whatever peers do.
func TestLimitsMemoryStaysAsPromised(t *testing.T) {
	t.Parallel()
	needNoRace(t)
	const first = "GET /v2/client HTTP/1.1\r\nHost: a\r\n"
	heads := []string{
		first + headLines(2600, "%x:\n"),
		first + headLines(maxHeadLines-2, "%x:\n"),
		first + headLines(maxHeadLines-3, "%x:\n") + "X-Long: " + strings.Repeat("a", 6<<10),
		first + "X-Long: " + strings.Repeat("a", 7<<10),
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("a\n", 30<<10),
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n",
		strings.Repeat("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 300),
	}
	half := append([]byte{0x82, 0xff, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0}, make([]byte, 200<<10)...)
	hellos := []string{"\x16\x03\x01\x3f\xff\x01\x00\xff\xff" + strings.Repeat("a", 16000), "\x16\x03\x01\x3f\xff",
		"\x16\x03\x01\x1f\xfb\x01\x00\xff\xff" + strings.Repeat("a", 8183) + "\x16\x03\x01\x1f\xf0" + strings.Repeat("a", 8000)}
	for _, c := range []struct {
		name   string
		drops  []string // heads of requests that are sent in drops
		halves int      // binaries that send half a message
		tls    bool
	}{
		{"requests in drops", heads, 0, false},
		{"tiny header lines", heads[:1], 0, false},
		{"half-sent messages", nil, 1000, false},
		{"both", heads, 1000, false},
		{"handshakes in drops, half-sent messages", hellos, 1000, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			connections, promised := 4096, int64(16<<20+4<<10*4096+64<<20)
			if c.tls {
				connections, promised = 1000, 16<<20+4<<10*1000+64<<20+48<<10*(1000+1024)
			}
			p := startSecured(t, c.tls, "-rate-per-minute=0", "-queue-total=16777216", fmt.Sprint("-max-connections=", connections))
			var all sync.WaitGroup
			for i := range c.halves {
				nc := p.dial()
				all.Go(func() {
					b, _, err := handshake(t, nc, "/v2/server", binaryHeaders(fmt.Sprint("server-", i)))
					if err != nil || b == nil {
						t.Errorf("binary %d of %d: %v", i+1, c.halves, err)
						return
					}
					nc.Write(half) // cut off where it does not fit
				})
			}
			all.Wait()
			stop, arrive := func() {}, make(chan struct{}, 8*maxWaiting) // every place is taken some eight times
			if c.drops != nil {
				for range cap(arrive) {
					arrive <- struct{}{}
				}
				stop = dawdlers(t, p.addr, arrive, func(i int) string { return c.drops[i%len(c.drops)] })
			}
			// As long as dawdlers still come, the peak may be ahead.
			eventually(t, "all have come", func() bool { return len(arrive) == 0 })
			highest, same := int64(0), 0
			eventually(t, "the peak is over", func() bool { // it looks every millisecond
				if same++; p.peakMemory() > highest {
					highest, same = p.peakMemory(), 0
				}
				return same == 300
			})
			if highest > promised {
				t.Errorf("%.1f MiB were in RAM, README promises %d", float64(highest)/(1<<20), promised>>20)
			}
			t.Logf("%.1f MiB at the most", float64(highest)/(1<<20))
			stop()
			nc := p.dial()
			io.WriteString(nc, "GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
			if a, err := http.ReadResponse(bufio.NewReader(nc), nil); err != nil || a.StatusCode != 200 {
				t.Errorf("/readyz afterwards: %v, %v, want 200", a, err)
			}
		})
	}
}
