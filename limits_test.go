package main

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func prefixList(s string) (all []netip.Prefix) {
	for p := range strings.FieldsSeq(s) {
		all = append(all, netip.MustParsePrefix(p))
	}
	return all
}

func TestClientAddr(t *testing.T) {
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

func TestRateKey(t *testing.T) {
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

func TestRates(t *testing.T) {
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
}

// Who waits for as long as Retry-After says is let in, and not a moment earlier.
func TestRatesWait(t *testing.T) {
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

func TestRatesOff(t *testing.T) {
	t.Parallel()
	l := newRates(testOptions(), newTestClock().now)
	for range 1000 {
		if ok, _ := l.allow(addrNumber(1)); !ok {
			t.Fatal("refused with -rate-per-minute 0")
		}
	}
}

// Buckets that are full again are forgotten.
func TestRatesSweep(t *testing.T) {
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
func TestRatesEviction(t *testing.T) {
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
	// Of eight buckets the fullest goes, which the emptiest of all never is.
	if ok, _ := r.allow(greedy); ok {
		t.Error("the emptiest bucket was forgotten")
	}
}

func TestBudget(t *testing.T) {
	t.Parallel()
	const limit, step = 1600, 307
	b := &budget{limit: limit}
	var held, most atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5000 {
				if !b.take(step, priorityPassing) {
					continue
				}
				now := held.Add(step)
				for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
				}
				held.Add(-step)
				b.give(step)
			}
		})
	}
	wg.Wait()
	if most.Load() > limit || b.used() != 0 {
		t.Fatalf("%d of %d bytes held at once, %d left in the end", most.Load(), limit, b.used())
	}
	if !b.take(limit, priorityBinary) || b.take(1, priorityBinary) {
		t.Fatal("the budget is not exactly its limit")
	}
	if !b.take(5, priorityAlways) || b.used() != limit+5 || b.take(1, priorityBinary) {
		t.Fatalf("%d bytes used after 5 that always fit", b.used())
	}
	b.give(limit + 5)
	if !b.take(limit*7/8, priorityBacklog) || b.take(1, priorityBacklog) {
		t.Fatal("a backlog does not have exactly seven eighths")
	}
	if !b.take(limit/16, priorityPassing) || b.take(1, priorityPassing) {
		t.Fatal("what passes to phones does not have exactly fifteen sixteenths")
	}
	if !b.take(limit/16, priorityBinary) || b.take(1, priorityBinary) {
		t.Fatal("the last sixteenth is not that of binaries")
	}
}

// endConn is a net.Conn of which only the end matters.
type endConn struct {
	net.Conn
	closed bool
}

func (c *endConn) Close() error { c.closed = true; return nil }

func TestLimitIdle(t *testing.T) {
	t.Parallel()
	hook := limitIdle()
	var all []*endConn
	arrive := func() *endConn {
		c := new(endConn)
		all = append(all, c)
		hook(c, http.StateNew)
		return c
	}
	// net/http says so when it finds out.
	sweep := func() (closed int) {
		for _, c := range all {
			if c.closed {
				closed++
				hook(c, http.StateActive) // it may have been about to
				hook(c, http.StateClosed)
			}
		}
		return closed
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
	hook(all[0], http.StateHijacked) // a session now
	hook(all[1], http.StateClosed)
	for i, want := range []int{0, 0, 1, 2} {
		arrive()
		if got := sweep(); got != want {
			t.Fatalf("two places were given back: after arrival %d %d had to go, want %d", i+1, got, want)
		}
	}
	if all[0].closed || !all[2].closed || !all[3].closed {
		t.Fatal("a session had to go, or not the two that had waited for the longest")
	}
	// Whoever moves is not the one to go, however many come.
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
			if c.closed {
				t.Fatal("one that had just moved had to go")
			}
		}
	}
	for _, c := range all {
		hook(c, http.StateClosed)
	}
	all = nil
	for range maxWaiting {
		arrive()
	}
	if n := sweep(); n != 0 {
		t.Errorf("%d were turned away after all had gone", n)
	}
}

func TestLogGate(t *testing.T) {
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
func TestUntrustedProxyIsNamed(t *testing.T) {
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
	want := "level=WARN msg=\"X-Forwarded-For from 172.18.0.2 ignored: it is not in -trusted-proxies; all who come through it share one rate limit\"\n"
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
