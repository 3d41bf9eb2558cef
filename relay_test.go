package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"
)

// The protocol in order, as relay.go has it: pages, gates and headers, what passes
// between a binary and its phones, what time brings about, and the drain.

// ---- pages and gates ----

// ask sends one request, written line by line, and reads the answer.
func (r *testRelay) ask(lines ...string) (resp *http.Response, body string) {
	r.t.Helper()
	nc, err := r.connect()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(nc, strings.Join(lines, "\r\n")+"\r\n\r\n"); err != nil {
		r.t.Fatal(err)
	}
	resp, err = http.ReadResponse(bufio.NewReader(nc), nil)
	if err != nil {
		r.t.Fatal(err)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return resp, ""
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	// A proxy that keeps a relay's answer, which net/http's own is none of, could show the
	// identity of a relay that is gone.
	if kept := resp.Header.Get("Cache-Control"); kept != "no-store" && !bytes.HasPrefix(b, []byte("400 Bad Request")) {
		r.t.Errorf("%q: Cache-Control is %q", lines[0], kept)
	}
	return resp, string(b)
}

func get(path string) []string {
	return []string{"GET " + path + " HTTP/1.1", "Host: relay", "Connection: close"}
}

func TestRelayPages(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		r.pair("pages")
		second, _, _ := r.pair("second")
		second.close(1000, "")
		second.wantEnd(1000, "")
		health := func(status string) {
			t.Helper()
			resp, body := r.ask(get("/healthz")...)
			if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/json" {
				t.Errorf("/healthz: %s %v", resp.Status, resp.Header)
			}
			var got map[string]any
			if err := json.Unmarshal([]byte(body), &got); err != nil {
				t.Fatalf("/healthz: %v: %s", err, body)
			}
			// A binary in grace is not connected; its phone is.
			for name, want := range map[string]any{
				"status": status, "version": "test", "instance": r.id.id,
				"connected_binaries": 1.0, "connected_phones": 2.0,
			} {
				if got[name] != want {
					t.Errorf("/healthz: %s is %v, want %v", name, got[name], want)
				}
			}
			if up, ok := got["uptime_seconds"].(float64); !ok || up < 0 || up > 60 {
				t.Errorf("/healthz: uptime_seconds is %v", got["uptime_seconds"])
			}
		}
		health("ok")
		if resp, body := r.ask(get("/readyz")...); resp.StatusCode != 200 || body != "ready\n" {
			t.Errorf("/readyz: %s %q", resp.Status, body)
		}
		if resp, body := r.ask(get("/")...); resp.StatusCode != 200 || !strings.Contains(body, "pyrycode-relay") {
			t.Errorf("/: %s %q", resp.Status, body)
		}
		for _, path := range []string{"/v3/client", "/v2/client/", "/v2", "/metrics", "/favicon.ico"} {
			if resp, body := r.ask(get(path)...); resp.StatusCode != 404 || strings.Count(body, "\n") != 1 {
				t.Errorf("%s: %s %q, want 404 and one line", path, resp.Status, body)
			}
		}
		r.instance.waits.Store(true)
		if resp, body := r.ask(get("/readyz")...); resp.StatusCode != 503 || body != "checking\n" ||
			resp.Header.Get(instanceHeader) != r.id.String() || !strings.HasSuffix(resp.Header.Get(standingHeader), ", waits") {
			t.Errorf("/readyz before users are let in: %s %q, %v", resp.Status, body, resp.Header)
		}
		r.draining.Store(true)
		health("draining")
		if resp, body := r.ask(get("/readyz")...); resp.StatusCode != 503 || body != "draining\n" {
			t.Errorf("/readyz while draining: %s %q", resp.Status, body)
		}
	})
}

var endpoints = map[role][]string{roleBinary: {"/v1/server", "/v2/server"}, rolePhone: {"/v1/client", "/v2/client"}}

// Each request of the table breaks its own gate and all that come after it.
func TestRelayGates(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.ratePerMinute, o.rateBurst, o.maxConnections = 1, 1, 1
	onEach(t, o, func(t *testing.T, r *testRelay) {
		from := func(addr string, h http.Header) http.Header {
			h.Set("X-Forwarded-For", addr)
			return h
		}
		fresh := 0
		newcomer := func() string { fresh++; return fmt.Sprintf("198.51.100.%d", fresh) }
		const known = "192.0.2.1" // has had its one upgrade
		holder := r.mustDial("/v2/server", from(known, binaryHeaders("holder")))

		good := []string{"x-pyrycode-server: holder", "user-agent: test", "x-pyrycode-version: 1"}
		halfUpgrade := append(slices.Clip(good), "Connection: keep-alive, Upgrade")
		upgrade := append(slices.Clip(halfUpgrade), "Upgrade: WebSocket")
		const version, badVersion = "Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 12"
		const key, badKey = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Key: short"
		with := func(lines []string, more ...string) []string { return slices.Concat(lines, more) }
		type gate struct {
			name, method, addr string
			lines              []string
			status             int
			outcome            upgradeOutcome
			header             map[string]string
		}
		try := func(g gate) {
			t.Helper()
			for role, paths := range endpoints {
				for _, path := range paths {
					addr := g.addr
					if addr == "" {
						addr = newcomer()
					}
					before := r.metrics.upgrades[role][g.outcome].Load()
					resp, body := r.ask(append([]string{g.method + " " + path + " HTTP/1.1", "Host: relay", "X-Forwarded-For: " + addr}, g.lines...)...)
					if resp.StatusCode != g.status {
						t.Errorf("%s: %s %s: %d %q, want %d", g.name, g.method, path, resp.StatusCode, body, g.status)
					}
					if g.status == 101 {
						r.settle("it is gone", func() bool { r.abortAll(); return r.count(role) == 0 })
					} else if strings.Count(body, "\n") != 1 || len(body) < 10 || !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain") {
						t.Errorf("%s: body is %q of type %s, want one line for a person", g.name, body, resp.Header.Get("Content-Type"))
					}
					if got := resp.Header.Get("x-pyrycode-relay-instance"); got != r.id.String() {
						t.Errorf("%s: instance is %q, want %q", g.name, got, r.id)
					}
					for name, want := range g.header {
						if got := resp.Header.Get(name); got != want {
							t.Errorf("%s: %s is %q, want %q", g.name, name, got, want)
						}
					}
					if wait, err := strconv.Atoi(resp.Header.Get("Retry-After")); (g.status == 429 || g.status == 503) != (err == nil && wait > 0) {
						t.Errorf("%s: Retry-After is %q", g.name, resp.Header.Get("Retry-After"))
					}
					if got := r.metrics.upgrades[role][g.outcome].Load() - before; got != 1 {
						t.Errorf("%s: %q counted %d times", g.name, g.outcome, got)
					}
				}
			}
		}
		r.instance.waits.Store(true)
		try(gate{"waits", "POST", known, nil, 503, upgradeChecking, nil})
		r.instance.waits.Store(false)
		try(gate{"rate", "POST", known, nil, 429, upgradeRateLimited, nil})
		try(gate{"cap", "POST", "", nil, 503, upgradeFull, nil})
		holder.close(1000, "")
		holder.wantEnd(1000, "")
		r.settle("the holder is gone", func() bool { return r.count(roleBinary) == 0 })
		for _, g := range []gate{
			{"headers", "POST", "", nil, 400, upgradeBadHeader, nil},
			{"method", "POST", "", with(good, badVersion, badKey), 405, upgradeBadRequest, map[string]string{"Allow": "GET"}},
			{"no upgrade", "GET", "", with(good, badVersion, badKey), 426, upgradeBadRequest,
				map[string]string{"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}},
			{"half of an upgrade", "GET", "", with(halfUpgrade, version, key), 426, upgradeBadRequest, nil},
			{"version", "GET", "", with(upgrade, badVersion, badKey), 426, upgradeBadRequest,
				map[string]string{"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}},
			{"no version", "GET", "", with(upgrade, key), 426, upgradeBadRequest, map[string]string{"Sec-WebSocket-Version": "13"}},
			{"key", "GET", "", with(upgrade, version, badKey), 400, upgradeBadRequest, nil},
			{"no key", "GET", "", with(upgrade, version), 400, upgradeBadRequest, nil},
			{"two keys", "GET", "", with(upgrade, version, key, key), 400, upgradeBadRequest, nil},
			{"none", "GET", "", with(upgrade, version, key), 101, upgradeAccepted,
				map[string]string{"Sec-WebSocket-Accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="}},
		} {
			try(g)
		}
		r.mustDial("/v2/server", from(newcomer(), binaryHeaders("holder")))
		r.draining.Store(true)
		try(gate{"draining", "POST", known, nil, 503, upgradeDraining, nil})
	})
}

func TestRelayConnectionCap(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.maxConnections = 100
	r := startRelay(t, o)
	var got [roleCount]atomic.Int64
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 50 {
				if role := role(i) % roleCount; r.enter(role) == nil {
					got[role].Add(1)
				}
			}
		})
	}
	wg.Wait()
	for role := range roleCount {
		if n := got[role].Load(); r.count(role) != int(n) {
			t.Errorf("%d connections of the %s leg, counted %d", n, role, r.count(role))
		}
	}
	if n := r.connections(); n != 100 {
		t.Errorf("%d connections, want 100", n)
	}
	r.leave(rolePhone)
	if r.enter(roleBinary) != nil || r.enter(rolePhone) != &refusedFull {
		t.Error("a place that was given back is not exactly one place")
	}
	for role := range roleCount {
		for r.count(role) > 0 {
			r.leave(role)
		}
	}
}

// One header is changed at a time. Of several lines the first one counts.
func TestRelayRequestHeaders(t *testing.T) {
	t.Parallel()
	const id, agent, version = "X-Pyrycode-Server", "User-Agent", "X-Pyrycode-Version"
	type change struct {
		only   role // roleCount: both
		header string
		values []string // nil: the header is not there
		ok     bool
	}
	changes := []change{
		{roleCount, id, nil, false},
		{roleCount, agent, nil, false},
		{roleBinary, version, nil, false},
		{rolePhone, version, nil, true},
		{roleCount, id, []string{""}, false},
		{roleCount, agent, []string{" \t"}, false},
		{roleBinary, version, []string{" "}, false},
		{roleCount, id, []string{" ", "good"}, false},
		{roleCount, agent, []string{"", "good"}, false},
		{roleCount, id, []string{"good", "", "no good"}, true},
		{roleCount, agent, []string{"good", ""}, true},
		{roleBinary, version, []string{"good", ""}, true},
		{roleCount, "X-Pyrycode-Token", []string{"a-secret-token"}, true},
		{roleCount, "X-Pyrycode-Device-Name", []string{"Pixel 9"}, true},
		{roleCount, "Origin", []string{"https://elsewhere.example"}, true},
		{roleCount, "Origin", []string{"null"}, true},
		{roleCount, "Sec-WebSocket-Protocol", []string{"chat, superchat"}, true},
		{roleCount, "Sec-WebSocket-Extensions", []string{"permessage-deflate; client_max_window_bits"}, true},
	}
	for _, good := range []string{"a", strings.Repeat("x", 128), "ABCXYZabcxyz0189._~-", "3b8c6a0e-4a9c-4c55-9a3c-8c1a3a0b5f6d"} {
		changes = append(changes, change{roleCount, id, []string{good}, true})
	}
	for _, bad := range []string{strings.Repeat("x", 129), "two words", "a/b", "a,b", "a:b", "a%20b", "ä", "a\x7f", "\"a\"", "a+b"} {
		changes = append(changes, change{roleCount, id, []string{bad}, false})
	}
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		for role, paths := range endpoints {
			for i, c := range changes {
				h := phoneHeaders("good")
				if role == roleBinary {
					h = binaryHeaders("good")
				}
				if h[c.header] = c.values; c.only != roleCount && c.only != role {
					continue
				}
				lines := []string{"GET " + paths[i%2] + " HTTP/1.1", "Host: relay", "Connection: Upgrade", "Upgrade: websocket",
					"Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="}
				for name, values := range h {
					for _, v := range values {
						lines = append(lines, strings.ToLower(name)+": "+v)
					}
				}
				resp, body := r.ask(lines...)
				if want := map[bool]int{true: 101, false: 400}[c.ok]; resp.StatusCode != want {
					t.Errorf("%s, %s %q: %s %q, want %d", role, c.header, c.values, resp.Status, body, want)
				}
				if negotiated := append(resp.Header["Sec-Websocket-Protocol"], resp.Header["Sec-Websocket-Extensions"]...); negotiated != nil {
					t.Errorf("%s: the relay negotiated %q", role, negotiated)
				}
			}
		}
		if logs := r.logs.String(); strings.Contains(logs, "a-secret-token") || strings.Contains(logs, "Pixel") {
			t.Error("the log holds a token or a device name")
		}
	})
}

func TestRelayServerIDs(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		// The first value names the claim; both versions of a path are one endpoint.
		h := binaryHeaders("first")
		h["X-Pyrycode-Server"] = []string{"first", "second"}
		b := r.mustDial("/v1/server", h)
		r.settle("the claim", func() bool { return r.metrics.connectedBinaries.Load() == 1 })
		for _, path := range endpoints[rolePhone] {
			h := phoneHeaders("first")
			h["X-Pyrycode-Server"] = []string{"first", "third"}
			r.mustDial(path, h).greet(b)
		}
		for _, id := range []string{"second", "FIRST", "first-", "firs"} {
			r.phone(id).wantEnd(4404, "server-id never seen")
		}
		other := r.binary("FIRST") // compared byte for byte
		r.phone("FIRST").greet(other)
	})
}

// ---- upgrade ----

// watchedConn calls seen at each write.
type watchedConn struct {
	net.Conn
	seen func(p []byte)
}

func (c watchedConn) Write(p []byte) (int, error) {
	c.seen(p)
	return c.Conn.Write(p)
}

// TestUpgradeMeansRegistered: whoever has seen its 101 may count on its place,
// a phone that comes right behind its binary above all.
func TestUpgradeMeansRegistered(t *testing.T) {
	t.Parallel()
	var r *testRelay
	var binaries, phones, answers atomic.Int64
	seen := func(p []byte) {
		if bytes.HasPrefix(p, []byte("HTTP/1.1 101")) {
			answers.Add(1)
			binaries.Store(r.metrics.connectedBinaries.Load())
			phones.Store(r.metrics.connectedPhones.Load())
		}
	}
	watched := func(nc net.Conn) net.Conn { return watchedConn{nc, seen} }
	r = startRelayOn(t, testOptions(), wrappingListener{onLoopback(t), watched})
	b := r.binary("home")
	if n := binaries.Load(); n != 1 {
		t.Errorf("%d binaries are registered at the 101 of the first", n)
	}
	p := r.phone("home")
	if n := phones.Load(); n != 1 {
		t.Errorf("%d phones are registered at the 101 of the first", n)
	}
	if n := answers.Load(); n != 2 {
		t.Errorf("%d writes begin with a 101, want 2", n)
	}
	p.text("1")
	if e := b.envelope(); string(e.Frame) != "1" {
		t.Errorf("got frame %s", e.Frame)
	}
}

// ---- sessions ----

func TestSessionPassesFramesUnchanged(t *testing.T) {
	t.Parallel()
	frames := []string{
		`{"type":"noise","data":"AAECAwQ="}`, `{ "b" : 1 ,"a":2, "a":3 }`, `[]`, `{}`, `""`, `0`, `true`, `[null]`,
		`1.0`, `1E+2`, `123456789012345678901234567890`, `1e999`, `-0`, `0.10`,
		`"\u003c\u2028\/\ud800"`, "\"\u2028<>&'é😀\"", `"\\\""`,
		`{"conn_id":"victim","frame":1,"close_code":4401,"token":"x"}`, `{"":{"":[[[]]]}}`,
		`"` + strings.Repeat("A", 87<<10) + `"`,
	}
	onLegs(t, testOptions(), func(t *testing.T, r *testRelay, role role) {
		ln := r.lane(role)
		for _, op := range []byte{opText, opBinary} {
			for _, f := range frames {
				ln.from.frame(op, ln.message(f))
				got := ln.to.message()
				want := f
				if role == rolePhone {
					want = `{"conn_id":"` + ln.connID + `","frame":` + f + `}`
				}
				if got != want {
					t.Errorf("got %.200q, want %.200q", got, want)
				}
			}
		}
		// White space around a phone's value is part of its bytes.
		if role == rolePhone {
			ln.from.text(" \r\n\t[1]\n")
			if got, want := ln.to.message(), `{"conn_id":"`+ln.connID+"\",\"frame\": \r\n\t[1]\n}"; got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}
	})
}

// What is no JSON, and what would be read as more of the envelope (FuzzInjection has the
// rest), ends a phone and nobody else.
func TestSessionPhoneSendsJSON(t *testing.T) {
	t.Parallel()
	tests := []struct {
		message string
		reason  string
	}{
		{``, "not one json value"},
		{`1}{"conn_id":"victim","frame":2`, "not one json value"},
		{strings.Repeat("[", 10000) + strings.Repeat("]", 10000), "not one json value"},
		{"\"\xff\"", "invalid utf-8"},
	}
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, sibling, _ := r.pair("json")
		for _, tt := range tests {
			for _, op := range []byte{opText, opBinary} {
				ph := r.phone("json")
				id := ph.greet(b)
				ph.raw(cat(clientFrame(last, op, []byte(tt.message)), clientFrame(last, opText, []byte(`"behind"`))))
				b.wantNotice(id, 1007)
				if code, reason := ph.ended(); code != 1007 || reason != tt.reason {
					t.Errorf("%.50q: closed %d %q, want 1007 %q", tt.message, code, reason, tt.reason)
				}
				sibling.greet(b)
			}
		}
	})
}

// An envelope that goes nowhere (FuzzParseEnvelope has which ones) is counted, and its
// binary stays.
func TestSessionDropsEnvelopes(t *testing.T) {
	t.Parallel()
	type useless struct {
		name   string
		op     byte
		text   string // ID stands for a phone's conn_id
		reason dropReason
	}
	tests := []useless{
		{"no object", opText, `[{"conn_id":"ID","frame":1}]`, dropNotEnvelope},
		{"binary that is not utf-8", opBinary, "{\"conn_id\":\"ID\",\"frame\":\"\xff\"}", dropNotEnvelope},
		{"no conn_id", opText, `{"frame":1}`, dropNoConnID},
		{"empty conn_id", opText, `{"conn_id":"","frame":1}`, dropUnknownConn},
		{"unknown conn_id", opText, `{"conn_id":"ID2","frame":1}`, dropUnknownConn},
		{"phone of another server", opText, `{"conn_id":"FOREIGN","frame":1}`, dropUnknownConn},
		{"close for a phone of another server", opText, `{"conn_id":"FOREIGN","close_code":4401}`, dropUnknownConn},
		{"last frame is null", opText, `{"conn_id":"ID","frame":1,"frame":null}`, dropNoFrame},
		{"push wake", opText, `{"push_wake":{"token":"credential"}}`, dropPushWake},
		{"push wake and frame", opText, `{"frame":1,"push_wake":{"token":"credential"}}`, dropPushWake},
	}
	for _, code := range []string{"-1", "1", "999", "1004", "1005", "1006", "1015", "1016", "2999", "5000", "65536"} {
		tests = append(tests, useless{"close_code " + code, opText, `{"conn_id":"ID","frame":1,"close_code":` + code + `}`, dropBadCloseCode})
	}
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, id := r.pair("drops")
		_, foreign, foreignID := r.pair("foreign")
		for i, tt := range tests {
			before := r.metrics.drops[tt.reason].Load()
			text := strings.ReplaceAll(strings.ReplaceAll(tt.text, "FOREIGN", foreignID), "ID", id)
			b.frame(tt.op, []byte(text))
			// The leg lives on, and nothing of it reached the phone.
			marker := fmt.Sprintf("[%d]", i)
			b.send(id, marker)
			if got := ph.message(); got != marker {
				t.Errorf("%s: the phone got %s, want %s", tt.name, got, marker)
			}
			if n := r.metrics.drops[tt.reason].Load() - before; n != 1 {
				t.Errorf("%s: counted %d times as %q", tt.name, n, tt.reason)
			}
		}
		if n := r.metrics.drops[dropPushWake].Load(); n != 2 {
			t.Errorf("%d push wakes, want 2", n)
		}
		logs := r.logs.String()
		if n := strings.Count(logs, "envelope dropped"); n == 0 || n >= len(tests)-2 {
			t.Errorf("%d lines for %d drops, want some and not one each", n, len(tests)-2)
		}
		if strings.Contains(logs, "credential") || strings.Contains(logs, dropPushWake.String()) {
			t.Error("a push wake is in the log")
		}
		foreign.text("1") // it lives
	})
}

func TestSessionCloseDirective(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b := r.binary("directive")
		sibling := r.phone("directive")
		sibling.greet(b)
		for i, code := range []int{4401, 4408, 4412, 4413, 4421, 4426, 1000, 1003, 1007, 1011, 1014, 3000, 4999} {
			ph := r.phone("directive")
			id := ph.greet(b)
			shape := [...]string{`"frame":"bye",`, `"frame":null,`, ``}[i%3]
			b.text(fmt.Sprintf(`{"conn_id":%q,%s"close_code":%d}`, id, shape, code))
			if i%3 == 0 {
				if got := ph.message(); got != `"bye"` {
					t.Errorf("the phone got %s before its end", got)
				}
			}
			op, p, err := ph.next()
			if op != opClose || err != nil {
				t.Fatalf("%d: opcode %d %q (%v), want a close frame", code, op, p, err)
			}
			ph.raw(clientFrame(last, opText, []byte(`"too late"`)))
			if got, _ := parseClose(p); int(got) != code || string(p[2:]) != "closed by binary" {
				t.Errorf("the phone got %d %q, want %d", got, p[2:], code)
			}
			ph.frame(opClose, p[:2])
			if op, _, err := ph.next(); err == nil {
				t.Errorf("opcode %d after the close handshake", op)
			}
			// What the binary asked for it is not told, and the phone is none of its own now.
			before := r.metrics.drops[dropUnknownConn].Load()
			b.send(id, "1")
			sibling.greet(b)
			r.settle("its conn_id is unknown", func() bool { return r.metrics.drops[dropUnknownConn].Load() == before+1 })
		}
	})
}

// Every end of a phone has one notice, behind its last frame. (TestConnEnforcesFrameRules
// and TestConnAnswersClose have every code.)
func TestSessionCloseNotices(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		end  func(ph *wsClient)
		code int
	}{
		{"close frame", func(ph *wsClient) { ph.close(1000, "done") }, 1000},
		{"close frame without code", func(ph *wsClient) { ph.frame(opClose, nil) }, 1005},
		{"close frame, then reset", func(ph *wsClient) { ph.close(3000, ""); ph.tcp().CloseWrite() }, 3000},
		{"end of tcp", func(ph *wsClient) { ph.nc.Close() }, 1006},
		{"half a frame, end of tcp", func(ph *wsClient) { ph.raw(clientFrame(last, opText, []byte("123"))[:7]); ph.nc.Close() }, 1006},
		{"reset", func(ph *wsClient) { ph.reset() }, 1006},
	}
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, sibling, _ := r.pair("notices")
		for _, tt := range tests {
			ph := r.phone("notices")
			id := ph.greet(b)
			ph.text(`"last"`)
			if tt.code == 1006 {
				// A reset may overtake what it follows: let the frame arrive.
				if e := b.envelope(); string(e.Frame) != `"last"` {
					t.Errorf("%s: got %s, want the last frame", tt.name, e.Frame)
				}
				tt.end(ph)
			} else {
				tt.end(ph)
				if e := b.envelope(); e.ConnID != id || string(e.Frame) != `"last"` {
					t.Errorf("%s: got %+v before the notice, want the last frame", tt.name, e)
				}
			}
			b.wantNotice(id, tt.code)
			sibling.greet(b) // the next thing that the binary hears: there was one notice
		}
	})
}

// reset ends TCP with a reset.
func (c *wsClient) reset() {
	c.t.Helper()
	nc := c.tcp()
	if err := nc.SetLinger(0); err != nil {
		c.t.Fatal(err)
	}
	nc.Close()
}

func TestSessionSeventeenthPhone(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b := r.binary("full")
		var phones []*wsClient
		ids := map[string]bool{}
		for range 16 {
			ph := r.phone("full")
			ids[ph.greet(b)] = true
			phones = append(phones, ph)
		}
		if len(ids) != 16 {
			t.Errorf("16 phones have %d conn_ids", len(ids))
		}
		for range 3 {
			r.phone("full").wantEnd(4429, "too many phones")
		}
		phones[3].close(1000, "")
		phones[3].wantEnd(1000, "")
		if e := b.envelope(); e.CloseCode == nil || *e.CloseCode != 1000 {
			t.Errorf("got %+v, want the notice of the phone that left and of no other", e)
		}
		r.phone("full").greet(b)
		r.phone("full").wantEnd(4429, "too many phones")
		phones[0].greet(b)
	})
}

func TestSessionBurstAfterConnect(t *testing.T) {
	t.Parallel()
	const n = 1000
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b := r.binary("burst")
		wants := func(prefix string) (id string) {
			t.Helper()
			for i := range n {
				e := b.envelope()
				if want := fmt.Sprintf("[%s%d]", prefix, i); string(e.Frame) != want || id != "" && id != e.ConnID {
					t.Fatalf("got %+v, want %s of one phone", e, want)
				}
				id = e.ConnID
			}
			return id
		}
		burst := func(frame func(i int) string) (raw []byte) {
			for i := range n {
				raw = append(raw, clientFrame(last, opText, []byte(frame(i)))...)
			}
			return raw
		}
		ph := r.phone("burst")
		ph.raw(burst(func(i int) string { return fmt.Sprintf("[1%d]", i) }))
		id := wants("1")
		b.raw(burst(func(i int) string { return fmt.Sprintf(`{"conn_id":%q,"frame":[%d]}`, id, i) }))
		for i := range n {
			if got, want := ph.message(), fmt.Sprintf("[%d]", i); got != want {
				t.Fatalf("the phone got %s, want %s", got, want)
			}
		}

		// Behind the upgrade request, before there was an answer to it.
		r.pipelined("/v2/client", phoneHeaders("burst"), burst(func(i int) string { return fmt.Sprintf("[2%d]", i) }))
		wants("2")
		b.close(1000, "")
		b.wantEnd(1000, "")
		r.settle("grace", func() bool { return r.metrics.binariesInGrace.Load() == 1 })
		r.pipelined("/v2/client", phoneHeaders("burst"), burst(func(i int) string { return fmt.Sprintf("[3%d]", i) }))
		r.settle("the phone has joined", func() bool { return r.metrics.connectedPhones.Load() == 3 })
		before := r.metrics.drops[dropUnknownConn].Load()
		b = r.pipelined("/v2/server", binaryHeaders("burst"), burst(func(int) string { return `{"conn_id":"nobody","frame":1}` }))
		id = wants("3")
		r.settle("the binary's burst is read", func() bool { return r.metrics.drops[dropUnknownConn].Load() == before+n })
		b.send(id, "1")
	})
}

// pipelined connects with raw sent right behind the request.
func (r *testRelay) pipelined(path string, h http.Header, raw []byte) *wsClient {
	r.t.Helper()
	nc, err := r.connect()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { nc.Close() })
	c, resp, err := handshake(r.t, &eagerConn{Conn: nc, more: raw}, path, h)
	if err != nil || c == nil {
		r.t.Fatalf("upgrade of %s: %v, %v", path, resp, err)
	}
	return c
}

// eagerConn sends more with its first write.
type eagerConn struct {
	net.Conn
	more []byte
}

func (c *eagerConn) Write(p []byte) (int, error) {
	raw := slices.Concat(p, c.more)
	c.more = nil
	if _, err := c.Conn.Write(raw); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Daemons answer a close notice with a close for the phone that is gone: that is
// counted, and no warning.
func TestSessionCloseOfUnknownPhone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ envelope, level string }{
		{`{"conn_id":"gone","close_code":4401}`, "DEBUG"},
		{`{"conn_id":"gone","frame":null,"close_code":4401}`, "DEBUG"},
		{`{"conn_id":"gone","frame":1}`, "WARN"},
		{`{"conn_id":"gone","frame":1,"close_code":4401}`, "WARN"},
	} {
		r := startRelay(t, testOptions())
		b := r.binary("id")
		b.text(c.envelope)
		r.settle("it is dropped", func() bool { return r.metrics.drops[dropUnknownConn].Load() == 1 })
		b.frame(opPing, nil)
		b.wantPong(nil)
		if want := "level=" + c.level + ` msg="envelope dropped"`; !strings.Contains(r.logs.String(), want) {
			t.Errorf("%s: no line with %s in the log:\n%s", c.envelope, want, r.logs)
		}
	}
}

// ---- time ----

func TestSweepHalved(t *testing.T) {
	t.Parallel()
	const few, many = trimFrom - 1, 4 * trimFrom
	type look struct {
		held int64
		trim bool
	}
	for _, c := range []struct {
		name  string
		looks []look
	}{
		{"a small wave is not worth it", []look{{few, false}, {0, false}, {0, false}}},
		{"a wave that stays", []look{{many, false}, {many/2 + 1, false}, {many, false}}},
		{"once for each half of a wave", []look{{many, false}, {many / 2, true}, {many / 2, false}, {many / 4, true}, {0, true}, {0, false}}},
		{"all at once", []look{{many, false}, {0, true}, {0, false}}},
		{"what is left counts from anew", []look{
			{many, false}, {many / 2, true}, {many/4 + 1, false}, {many, false}, {many/2 + 1, false}, {many / 2, true},
		}},
	} {
		var r relay
		for i, l := range c.looks {
			if got := r.halved(l.held); got != l.trim {
				t.Errorf("%s: look %d: trim is %v, want %v", c.name, i, got, l.trim)
			}
		}
	}
}

// What a wave is measured by: sessions, graces and buffers.
func TestSweepHeld(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.grace = 0
	r := startRelay(t, o)
	for _, c := range []struct {
		name string
		come func() (leave func())
		want int64
	}{
		{"a session", func() func() {
			b := r.binary("held")
			return func() { b.nc.Close() }
		}, sessionCost},
		{"a grace", func() func() {
			r.metrics.binariesInGrace.Add(1)
			return func() { r.metrics.binariesInGrace.Add(-1) }
		}, graceCost},
		{"a stream's buffers", func() func() {
			r.buffers.budget.take(dailyBuffers, priorityPassing)
			return func() { r.buffers.budget.give(dailyBuffers) }
		}, 0},
		{"a wave of buffers", func() func() {
			r.buffers.budget.take(2*dailyBuffers, priorityPassing)
			return func() { r.buffers.budget.give(2 * dailyBuffers) }
		}, dailyBuffers},
	} {
		leave := c.come()
		eventually(t, c.name, func() bool { return r.heldBytes() == c.want })
		leave()
		eventually(t, c.name+" is gone", func() bool { return r.heldBytes() == 0 })
	}
}

var trimBallast [][]byte // on the heap, whatever the compiler finds out

// The sweep gives what a wave has left back to the system, what it has left in pools
// too. The test is not parallel: others collect garbage, too.
func TestSweepGivesMemoryBack(t *testing.T) {
	const size = 64 << 20
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
		var pool sync.Pool
		kept := new([1 << 20]byte)
		pooled := weak.Make(kept)
		for range size >> 16 {
			trimBallast = append(trimBallast, make([]byte, 1<<16))
		}
		r.buffers.budget.take(dailyBuffers+trimFrom, priorityPassing)
		time.Sleep(2 * mostLate)
		synctest.Wait()
		var full, trimmed runtime.MemStats
		runtime.ReadMemStats(&full)
		trimBallast = nil
		pool.Put(kept)
		kept = nil
		r.buffers.budget.give(dailyBuffers + trimFrom)
		time.Sleep(2 * mostLate)
		synctest.Wait()
		runtime.ReadMemStats(&trimmed)
		ours := func(s *runtime.MemStats) uint64 { return s.HeapSys - s.HeapReleased }
		if ours(&full) < size || ours(&trimmed) > ours(&full)-size*9/10 {
			t.Errorf("held %d KiB of the system's memory, and %d KiB of it after a trim of %d KiB", ours(&full)>>10, ours(&trimmed)>>10, size>>10)
		}
		if pooled.Value() != nil {
			t.Error("a pooled buffer outlived the trim")
		}
		if n := trimmed.NumForcedGC - full.NumForcedGC; n < 1 || n > 2 {
			t.Errorf("%d collections for one wave", n)
		}
		runtime.KeepAlive(&pool)
	})
}

// ---- drain ----

// drained drains r within d, and leaves nothing for the end of the test to do.
func (r *testRelay) drained(d time.Duration) {
	r.once.Do(func() {
		r.draining.Store(true)
		r.srv.Close()
		r.drain(d)
	})
}

const drainPairs = 100

func TestDrain(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		var peers sync.WaitGroup
		for i := range drainPairs {
			b, ph, id := r.pair(fmt.Sprint("id-", i))
			peers.Go(func() { ph.wantEnd(1001, "shutting down") })
			peers.Go(func() {
				b.wantNotice(id, 1001) // its phone is gone first
				b.wantEnd(1001, "shutting down")
			})
		}
		r.drained(patience)
		peers.Wait()
		if _, _, err := r.dial("/v2/client", phoneHeaders("id-0")); err == nil {
			t.Error("somebody still listens")
		}
		for role := range roleCount {
			if n := r.count(role); n != 0 {
				t.Errorf("%d connections of the %s leg are left", n, role)
			}
			if n := r.metrics.closes[role][endShutdown].Load(); n != drainPairs {
				t.Errorf("%d ends of the %s leg, want %d", n, role, drainPairs)
			}
		}
	})
}

// Peers that never answer cost the deadline, and neither leg its word.
func TestDrainMeetsItsDeadline(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
		var mu sync.Mutex
		var told [roleCount][]time.Time // guarded by mu
		var peers sync.WaitGroup
		watch := func(role role, c *wsClient) {
			peers.Go(func() {
				for op, p, err := c.next(); err == nil; op, p, err = c.next() {
					if code, _ := parseClose(p); op == opClose && code == 1001 {
						mu.Lock()
						told[role] = append(told[role], time.Now())
						mu.Unlock()
					}
				}
			})
		}
		for i := range drainPairs {
			b, ph, _ := r.pair(fmt.Sprint("id-", i))
			watch(roleBinary, b)
			watch(rolePhone, ph)
		}
		start := time.Now()
		r.drained(10 * time.Second)
		if took := time.Since(start); took > 10*time.Second+time.Second/2 {
			t.Errorf("the drain took %v", took)
		}
		peers.Wait()
		if len(told[rolePhone]) != drainPairs || len(told[roleBinary]) != drainPairs {
			t.Fatalf("%d phones and %d binaries were told, want all %d", len(told[rolePhone]), len(told[roleBinary]), drainPairs)
		}
		last, first := slices.MaxFunc(told[rolePhone], time.Time.Compare), slices.MinFunc(told[roleBinary], time.Time.Compare)
		if first.Before(last) {
			t.Errorf("a binary was told %v before a phone", last.Sub(first))
		}
	})
}

// Peers that take nothing at all are cut off.
func TestDrainOfFrozenPeers(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
		for i := range 10 {
			b, _, id := r.pair(fmt.Sprint("id-", i))
			for k := range 10 {
				b.send(id, numbered(k, 32<<10))
			}
		}
		start := time.Now()
		r.drained(10 * time.Second)
		if took := time.Since(start); took > 10*time.Second+time.Second/2 {
			t.Errorf("the drain took %v", took)
		}
		if n := r.connections(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
	})
}

// drainTells drains r, and all of cs have to be told.
func (r *testRelay) drainTells(cs ...*wsClient) {
	r.t.Helper()
	var peers sync.WaitGroup
	for _, c := range cs {
		peers.Go(func() { c.wantEnd(1001, "shutting down") })
	}
	r.drained(patience)
	peers.Wait()
}

// Grace does not hold a drain up.
func TestDrainInGrace(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, idle, _ := r.pair("id")
		r.leaves(b)
		joiner := r.joins("id")
		joiner.text(`"held"`)
		r.drainTells(idle, joiner)
		if n := r.metrics.binariesInGrace.Load(); n != 0 {
			t.Errorf("%d binaries in grace", n)
		}
	})
}

// A newcomer that waits for an incumbent's answer is told at once.
func TestDrainDuringAChallenge(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b := r.binary("id")
		newcomer := r.rival("id")
		b.wantPing()
		r.drainTells(b, newcomer)
	})
}
