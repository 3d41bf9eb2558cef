package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What stands before a session: the pages, the gates and the headers.

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
	return resp, string(b)
}

func get(path string) []string {
	return []string{"GET " + path + " HTTP/1.1", "Host: relay", "Connection: close"}
}

func TestPages(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		r.pair("pages")
		second, _, _ := r.pair("second")
		second.close(1000, "")
		second.wantEnd(1000, "")
		health := func(status string) {
			t.Helper()
			resp, body := r.ask(get("/healthz")...)
			if resp.StatusCode != 200 || resp.Header.Get("Cache-Control") != "no-store" || resp.Header.Get("Content-Type") != "application/json" {
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
		r.beginDrain()
		health("draining")
		if resp, body := r.ask(get("/readyz")...); resp.StatusCode != 503 || body != "draining\n" {
			t.Errorf("/readyz while draining: %s %q", resp.Status, body)
		}
	})
}

var endpoints = map[role][]string{roleBinary: {"/v1/server", "/v2/server"}, rolePhone: {"/v1/client", "/v2/client"}}

// Each request of the table breaks its own gate and all that come after it.
func TestGates(t *testing.T) {
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
		upgrade := []string{"Connection: keep-alive, Upgrade", "Upgrade: WebSocket"}
		const version, badVersion = "Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 12"
		const key, badKey = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Key: short"
		join := func(parts ...any) (lines []string) {
			for _, p := range parts {
				switch p := p.(type) {
				case string:
					lines = append(lines, p)
				case []string:
					lines = append(lines, p...)
				}
			}
			return lines
		}
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
					if strings.Count(body, "\n") != 1 || len(body) < 10 || !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/plain") {
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
		try(gate{"rate", "POST", known, nil, 429, upgradeRateLimited, nil})
		try(gate{"cap", "POST", "", nil, 503, upgradeFull, nil})
		holder.close(1000, "")
		holder.wantEnd(1000, "")
		r.settle("the holder is gone", func() bool { return r.count(roleBinary) == 0 })
		for _, g := range []gate{
			{"headers", "POST", "", nil, 400, upgradeBadHeader, nil},
			{"method", "POST", "", join(good, badVersion, badKey), 405, upgradeBadRequest, map[string]string{"Allow": "GET"}},
			{"no upgrade", "GET", "", join(good, badVersion, badKey), 426, upgradeBadRequest,
				map[string]string{"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}},
			{"half of an upgrade", "GET", "", join(good, "Connection: Upgrade", version, key), 426, upgradeBadRequest, nil},
			{"version", "GET", "", join(good, upgrade, badVersion, badKey), 426, upgradeBadRequest,
				map[string]string{"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}},
			{"no version", "GET", "", join(good, upgrade, key), 426, upgradeBadRequest, map[string]string{"Sec-WebSocket-Version": "13"}},
			{"key", "GET", "", join(good, upgrade, version, badKey), 400, upgradeBadRequest, nil},
			{"no key", "GET", "", join(good, upgrade, version), 400, upgradeBadRequest, nil},
			{"two keys", "GET", "", join(good, upgrade, version, key, key), 400, upgradeBadRequest, nil},
		} {
			try(g)
		}
		for role, paths := range endpoints {
			for _, path := range paths {
				before := r.metrics.upgrades[role][upgradeAccepted].Load()
				resp, _ := r.ask(join("GET "+path+" HTTP/1.1", "Host: relay", "X-Forwarded-For: "+newcomer(), good, upgrade, version, key)...)
				if resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
					t.Errorf("%s: %s %v", path, resp.Status, resp.Header)
				}
				if got := resp.Header.Get("x-pyrycode-relay-instance"); got != r.id.String() {
					t.Errorf("%s: instance is %q, want %q", path, got, r.id)
				}
				if got := r.metrics.upgrades[role][upgradeAccepted].Load() - before; got != 1 {
					t.Errorf("%s: counted %d times", path, got)
				}
				r.settle("it is gone", func() bool { r.abortAll(); return r.count(role) == 0 })
			}
		}
		r.mustDial("/v2/server", from(newcomer(), binaryHeaders("holder")))
		r.beginDrain()
		try(gate{"draining", "POST", known, nil, 503, upgradeDraining, nil})
	})
}

func TestRequestHeaders(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		only   role // legCount: both
		change func(h http.Header)
		ok     bool
	}{
		{"as they are", roleCount, func(http.Header) {}, true},
		{"no server-id", roleCount, func(h http.Header) { h.Del("X-Pyrycode-Server") }, false},
		{"no user-agent", roleCount, func(h http.Header) { h.Del("User-Agent") }, false},
		{"no version", roleBinary, func(h http.Header) { h.Del("X-Pyrycode-Version") }, false},
		{"no version", rolePhone, func(h http.Header) { h.Del("X-Pyrycode-Version") }, true},
		{"empty server-id", roleCount, func(h http.Header) { h.Set("X-Pyrycode-Server", "") }, false},
		{"blank user-agent", roleCount, func(h http.Header) { h.Set("User-Agent", " \t") }, false},
		{"blank version", roleBinary, func(h http.Header) { h.Set("X-Pyrycode-Version", " ") }, false},
		{"blank server-id before a good one", roleCount, func(h http.Header) { h["X-Pyrycode-Server"] = []string{" ", "good"} }, false},
		{"blank user-agent before a good one", roleCount, func(h http.Header) { h["User-Agent"] = []string{"", "good"} }, false},
		{"good values before bad ones", roleCount, func(h http.Header) {
			for _, name := range []string{"X-Pyrycode-Server", "User-Agent", "X-Pyrycode-Version"} {
				if h[name] != nil {
					h[name] = append(h[name], "", "no good")
				}
			}
		}, true},
		{"token and device name", roleCount, func(h http.Header) {
			h.Set("X-Pyrycode-Token", "a-secret-token")
			h.Set("X-Pyrycode-Device-Name", "Pixel 9")
		}, true},
		{"any origin", roleCount, func(h http.Header) { h.Set("Origin", "https://elsewhere.example") }, true},
		{"null origin", roleCount, func(h http.Header) { h.Set("Origin", "null") }, true},
		{"subprotocols and extensions", roleCount, func(h http.Header) {
			h.Set("Sec-WebSocket-Protocol", "chat, superchat")
			h.Set("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits")
		}, true},
	}
	for _, id := range []string{"a", strings.Repeat("x", 128), "ABCXYZabcxyz0189._~-", "3b8c6a0e-4a9c-4c55-9a3c-8c1a3a0b5f6d"} {
		tests = append(tests, struct {
			name   string
			only   role
			change func(h http.Header)
			ok     bool
		}{"server-id " + id, roleCount, func(h http.Header) { h.Set("X-Pyrycode-Server", id) }, true})
	}
	for _, id := range []string{strings.Repeat("x", 129), "two words", "a/b", "a,b", "a:b", "a%20b", "ä", "a\x7f", "\"a\"", "a+b"} {
		tests = append(tests, struct {
			name   string
			only   role
			change func(h http.Header)
			ok     bool
		}{"server-id " + id, roleCount, func(h http.Header) { h.Set("X-Pyrycode-Server", id) }, false})
	}
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		for role, paths := range endpoints {
			for i, tt := range tests {
				if tt.only != roleCount && tt.only != role {
					continue
				}
				h := phoneHeaders("good")
				if role == roleBinary {
					h = binaryHeaders(fmt.Sprintf("good-%d", i))
				}
				tt.change(h)
				lines := []string{"GET " + paths[i%2] + " HTTP/1.1", "Host: relay", "Connection: Upgrade", "Upgrade: websocket",
					"Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="}
				for name, values := range h {
					for _, v := range values {
						lines = append(lines, strings.ToLower(name)+": "+v)
					}
				}
				resp, body := r.ask(lines...)
				if want := map[bool]int{true: 101, false: 400}[tt.ok]; resp.StatusCode != want {
					t.Errorf("%s, %s: %s %q, want %d", role, tt.name, resp.Status, body, want)
				}
				if !tt.ok {
					continue
				}
				for _, name := range []string{"Sec-Websocket-Protocol", "Sec-Websocket-Extensions"} {
					if v, ok := resp.Header[name]; ok {
						t.Errorf("%s, %s: the relay negotiated %s %q", role, tt.name, name, v)
					}
				}
			}
		}
		if logs := r.logs.String(); strings.Contains(logs, "a-secret-token") || strings.Contains(logs, "Pixel") {
			t.Error("the log holds a token or a device name")
		}
	})
}

func TestServerIDs(t *testing.T) {
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

func TestConnIDs(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.maxPhones = 200
	onEach(t, o, func(t *testing.T, r *testRelay) {
		b := r.binary("ids")
		var ids []string
		for range 100 {
			ph := r.phone("ids")
			id := ph.greet(b)
			if again := ph.greet(b); again != id {
				t.Errorf("a phone is %s, then %s", id, again)
			}
			if len(id) < 16 || len(id) > 64 {
				t.Errorf("conn_id %q has %d bytes", id, len(id))
			}
			ids = append(ids, id)
		}
		slices.Sort(ids)
		if n := len(slices.Compact(ids)); n != 100 {
			t.Errorf("100 phones have %d conn_ids", n)
		}
	})
}
