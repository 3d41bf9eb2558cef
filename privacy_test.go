package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What must never be in a log, at any level: payloads, tokens, push credentials,
// user-agents, headers. Everything of these that the test sends holds secret.

const secret = "m4rk3d"

// stranger's address, a fresh one each time, so that the rate limit is met on
// purpose only.
var strangerCount atomic.Int64

func freshAddr() string {
	n := strangerCount.Add(1)
	return fmt.Sprintf("198.18.%d.%d", n>>8&255, n&255)
}

// marked adds all that peers and proxies send beside what the relay needs.
func marked(h http.Header) http.Header {
	h = h.Clone()
	h.Set("User-Agent", "agent-"+secret)
	h.Set("X-Pyrycode-Token", secret)
	h.Set("X-Pyrycode-Device-Name", secret+"'s phone")
	h.Set("X-Pyrycode-Relay-Probe", secret)
	h.Set("Authorization", "Bearer "+secret)
	h.Set("Cookie", "session="+secret)
	h.Set("Origin", "https://"+secret+".example")
	h.Set("Referer", "https://example/"+secret)
	h.Set("Sec-Websocket-Protocol", secret)
	h.Set("X-Forwarded-For", secret+", "+freshAddr())
	if h.Get("X-Pyrycode-Version") != "" {
		h.Set("X-Pyrycode-Version", "1.0-"+secret)
	}
	return h
}

func TestNothingForbiddenInLogs(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			p := startProgram(t, nil, "-log-format", format, "-log-level", "debug",
				"-max-phones", "3", "-rate-per-minute", "1", "-rate-burst", "2", "-drain", "1h").listening()

			sessionsWithSecrets(p)
			refusalsWithSecrets(p)
			_, page := fetch(t, "http://"+p.admin+"/metrics")
			drainWithSecrets(p)

			for _, line := range strings.Split(p.stderr.String()+page, "\n") {
				if strings.Contains(strings.ToLower(line), secret) {
					t.Errorf("forbidden: %s", line)
				}
			}
		})
	}
}

func (p *program) binary(id string) *wsClient {
	p.t.Helper()
	return p.connect("/v2/server?token="+secret, marked(binaryHeaders(id)))
}

func (p *program) phone(id string) *wsClient {
	p.t.Helper()
	return p.connect("/v2/client?token="+secret, marked(phoneHeaders(id)))
}

// sessionsWithSecrets ends a connection of each leg in every way that a peer can
// bring about without waiting, each time around a payload.
func sessionsWithSecrets(p *program) {
	t := p.t
	t.Helper()
	const payload = `"` + secret + `"`
	keeper := p.binary("keeper")
	talk := func() (ph *wsClient, id string) {
		t.Helper()
		ph = p.phone("keeper")
		ph.text(payload)
		e := keeper.envelope()
		keeper.send(e.ConnID, payload)
		if got := ph.message(); got != payload {
			t.Fatalf("phone got %s, want %s", got, payload)
		}
		return ph, e.ConnID
	}
	ends := []struct {
		reason string
		code   int
		do     func(c *wsClient)
	}{
		{"closed by peer", 4000, func(c *wsClient) { c.close(4000, secret) }},
		{"connection lost", 1006, func(c *wsClient) { c.nc.Close() }},
		{"unmasked frame", 1002, func(c *wsClient) { c.raw(append([]byte{0x80 | opText, byte(len(payload))}, payload...)) }},
		{"reserved bit set", 1002, func(c *wsClient) { c.raw(clientFrame(0xc0, opText, []byte(payload))) }},
		{"unknown opcode", 1002, func(c *wsClient) { c.frame(3, []byte(payload)) }},
		{"bad control frame", 1002, func(c *wsClient) { c.frame(opPing, []byte(strings.Repeat(secret, 40))) }},
		{"stray continuation", 1002, func(c *wsClient) { c.frame(opContinuation, []byte(payload)) }},
		{"data frame inside fragmented message", 1002, func(c *wsClient) {
			c.raw(clientFrame(0, opText, []byte(payload)))
			c.text(payload)
		}},
		{"bad close frame", 1002, func(c *wsClient) { c.close(1005, secret) }},
		{"invalid utf-8", 1007, func(c *wsClient) { c.frame(opText, []byte(payload+"\xff")) }},
		{"message too big", 1009, func(c *wsClient) { c.raw(clientFrame(0x80, opText, []byte(strings.Repeat(secret, 50000)))[:4096]) }},
	}
	finish := func(c *wsClient, code int) {
		t.Helper()
		if code != 1006 {
			c.wantEnd(code, "")
		}
	}
	for i, e := range ends {
		ph, id := talk()
		ph.frame(opPing, []byte(secret))
		e.do(ph)
		finish(ph, e.code)
		keeper.wantNotice(id, e.code)

		b := p.binary(fmt.Sprint("server", i))
		b.text(`{"conn_id":"` + secret + `","frame":` + payload + `}`)
		e.do(b)
		finish(b, e.code)
	}
	ph, id := talk()
	ph.text(payload + payload)
	ph.wantEnd(1007, "not one json value")
	keeper.wantNotice(id, 1007)
	ph, id = talk()
	keeper.text(`{"conn_id":"` + id + `","frame":` + payload + `,"close_code":4401}`)
	ph.wantEnd(4401, "")

	// One kind at a time until it is in the log, which takes five a second.
	ph, id = talk()
	for reason, envelope := range map[string]string{
		"not an envelope":    `{` + payload,
		"conn_id missing":    `{"frame":` + payload + `}`,
		"conn_id unknown":    `{"conn_id":` + payload + `,"frame":` + payload + `}`,
		"frame missing":      `{"conn_id":"` + id + `","` + secret + `":1}`,
		"close_code invalid": `{"conn_id":"` + id + `","frame":` + payload + `,"close_code":` + payload + `}`,
	} {
		p.until("envelope dropped", reason, func() { keeper.text(envelope) })
	}
	keeper.text(`{"push_wake":{"token":` + payload + `,"auth":{"bearer":` + payload + `}}}`)
	keeper.close(1000, secret)
	keeper.wantEnd(1000, "")

	late := p.phone("keeper") // in grace: what it says is held
	late.text(payload)
	again := p.binary("keeper")
	if e := again.envelope(); string(e.Frame) != payload {
		t.Fatalf("held frame is %s, want %s", e.Frame, payload)
	}
	ph.wantEnd(4404, "binary reclaimed server-id")
	for _, e := range ends {
		for _, leg := range []string{"binary", "phone"} {
			p.line("disconnected", leg, e.reason)
		}
	}
	p.line("disconnected", "phone", "not one json value")
	p.line("disconnected", "phone", "closed by binary")
	p.line("disconnected", "phone", "binary reclaimed server-id")
	for range 2 { // and the late one: all places are taken
		p.phone("keeper")
	}
}

// refusalsWithSecrets is refused in every way that a stranger can bring about,
// while "keeper" is held and has all its phones.
func refusalsWithSecrets(p *program) {
	p.t.Helper()
	without := func(name string) http.Header {
		h := marked(phoneHeaders("s"))
		h.Del(name)
		return h
	}
	badID := marked(phoneHeaders("not an id " + secret))
	sameAddr := marked(phoneHeaders("s"))
	raw := func(lines ...string) func() {
		return func() {
			nc := p.dial()
			nc.SetDeadline(time.Now().Add(patience))
			io.WriteString(nc, strings.Join(lines, "\r\n")+"\r\n\r\n")
			if _, err := io.ReadAll(nc); err != nil && !isReset(err) {
				p.t.Errorf("waiting for the answer to %.50q: %v", lines, err)
			}
			nc.Close()
		}
	}
	needed := []string{"Host: " + secret, "Connection: close", "X-Pyrycode-Server: s", "User-Agent: " + secret, "X-Pyrycode-Token: " + secret}
	request := func(line string, more ...string) func() {
		return func() {
			raw(append(append([]string{line, "X-Forwarded-For: " + freshAddr()}, needed...), more...)...)()
		}
	}
	for _, c := range []struct {
		msg, reason string
		do          func()
	}{
		{"upgrade refused", "bad header", func() { p.upgrade("/v2/client", badID) }},
		{"upgrade refused", "bad header", func() { p.upgrade("/v2/client?"+secret, without("User-Agent")) }},
		{"upgrade refused", "bad handshake", request("POST /v2/client?"+secret+" HTTP/1.1", "Content-Length: 0")},
		{"upgrade refused", "bad handshake", request("GET /v2/client?"+secret+" HTTP/1.1", "Sec-WebSocket-Key: "+secret)},
		{"upgrade refused", "rate limited", func() { p.upgrade("/v2/client", sameAddr) }},
		{"session refused", "server-id never seen", func() { p.phone("nobody").wantEnd(4404, "") }},
		{"session refused", "too many phones", func() { p.phone("keeper").wantEnd(4429, "") }},
	} {
		p.until(c.msg, c.reason, c.do)
	}
	// What net/http refuses by itself, or never gets to see as a request.
	for _, lines := range [][]string{
		{"GET /" + secret + " HTTP/1.1", "Host: x", "Connection: close", "User-Agent: " + secret},
		{secret + " " + secret},
		{"GET / HTTP/9.9", "X-" + secret + ": " + secret},
		{"GET /v2/client HTTP/1.1", "Host: " + secret, "X bad name: " + secret},
		{"GET / HTTP/1.1", "Host: x", "X-Long: " + strings.Repeat(secret, 5000)},
		{"\x16\x03\x01" + secret},
	} {
		raw(lines...)()
	}
}

// drainWithSecrets stops the relay under a binary that does not let go, and asks
// for an upgrade over a connection that was there before.
func drainWithSecrets(p *program) {
	t := p.t
	t.Helper()
	nc := p.dial()
	nc.SetDeadline(time.Now().Add(patience))
	// Half a request: net/http has the connection.
	io.WriteString(nc, "GET /v2/server HTTP/1.1\r\nHost: x\r\n")
	b := p.binary("stubborn")
	b.text(`{"push_wake":"` + secret + `"}`)
	p.line("connected", "binary", "stubborn")
	p.signal(syscall.SIGTERM)
	p.said("shutting down")
	eventually(t, "the relay drains", func() bool { h := holderOf(p); return h != nil && h.Draining })
	io.WriteString(nc, "Connection: close\r\nUser-Agent: "+secret+"\r\nX-Pyrycode-Token: "+secret+"\r\n\r\n")
	if answer, err := io.ReadAll(nc); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 503 ") {
		t.Errorf("an upgrade while draining: %.50q, %v; want 503", answer, err)
	}
	p.line("upgrade refused", "binary", "draining")
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
}

// has reports whether a line of the log has all of these words.
func (p *program) has(words []string) bool {
lines:
	for line := range strings.Lines(p.stderr.String()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue lines
			}
		}
		return true
	}
	return false
}

// line waits for a line of the log: what is not logged cannot betray anything.
func (p *program) line(words ...string) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("a line with %q", words), func() bool { return p.has(words) })
}

// until does something again and again until its line is there, which the limit
// on lines may delay.
func (p *program) until(msg, reason string, do func()) {
	p.t.Helper()
	polls := 0
	eventually(p.t, fmt.Sprintf("a line of %s, %s", msg, reason), func() bool {
		if polls%100 == 0 {
			do()
		}
		polls++
		return p.has([]string{msg, reason})
	})
}
