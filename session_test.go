package main

import (
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// What passes between a binary and its phones, and what is said of a phone's end.

func TestFramesPassUnchanged(t *testing.T) {
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

func TestPhoneHasToSendJSON(t *testing.T) {
	t.Parallel()
	tests := []struct {
		message string
		reason  string
	}{
		{``, "not one json value"},
		{` `, "not one json value"},
		{`1,"conn_id":"victim"`, "not one json value"},
		{`1}{"conn_id":"victim","frame":2`, "not one json value"},
		{`1 2`, "not one json value"},
		{`{"a":1`, "not one json value"},
		{`[1]]`, "not one json value"},
		{`"a`, "not one json value"},
		{"\"a\nb\"", "not one json value"},
		{"1\x00", "not one json value"},
		{`01`, "not one json value"},
		{`nul`, "not one json value"},
		{`'a'`, "not one json value"},
		{"\xef\xbb\xbf1", "not one json value"},
		{strings.Repeat("[", 10000) + strings.Repeat("]", 10000), "not one json value"},
		{"\"\xff\"", "invalid utf-8"},
		{"\"\xed\xa0\x80\"", "invalid utf-8"},
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

func TestUselessEnvelopes(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		op     byte
		text   string // ID stands for a phone's conn_id
		reason dropReason
	}{
		{"nothing", opText, ``, dropNotEnvelope},
		{"no object", opText, `[{"conn_id":"ID","frame":1}]`, dropNotEnvelope},
		{"no json", opText, `{"conn_id":"ID","frame":1`, dropNotEnvelope},
		{"two objects", opText, `{"conn_id":"ID","frame":1}{}`, dropNotEnvelope},
		{"binary that is not utf-8", opBinary, "{\"conn_id\":\"ID\",\"frame\":\"\xff\"}", dropNotEnvelope},
		{"no conn_id", opText, `{"frame":1}`, dropNoConnID},
		{"null conn_id", opText, `{"conn_id":null,"frame":1}`, dropNoConnID},
		{"number as conn_id", opText, `{"conn_id":7,"frame":1}`, dropNoConnID},
		{"object as conn_id", opText, `{"conn_id":{"a":"ID"},"frame":1}`, dropNoConnID},
		{"other case", opText, `{"Conn_ID":"ID","frame":1}`, dropNoConnID},
		{"empty conn_id", opText, `{"conn_id":"","frame":1}`, dropUnknownConn},
		{"unknown conn_id", opText, `{"conn_id":"ID2","frame":1}`, dropUnknownConn},
		{"last conn_id is unknown", opText, `{"conn_id":"ID","conn_id":"nobody","frame":1}`, dropUnknownConn},
		{"phone of another server", opText, `{"conn_id":"FOREIGN","frame":1}`, dropUnknownConn},
		{"close for a phone of another server", opText, `{"conn_id":"FOREIGN","close_code":4401}`, dropUnknownConn},
		{"no frame", opText, `{"conn_id":"ID"}`, dropNoFrame},
		{"null frame", opText, `{"conn_id":"ID","frame":null}`, dropNoFrame},
		{"last frame is null", opText, `{"conn_id":"ID","frame":1,"frame":null}`, dropNoFrame},
		{"close_code as text", opText, `{"conn_id":"ID","frame":1,"close_code":"4401"}`, dropBadCloseCode},
		{"close_code with a fraction", opText, `{"conn_id":"ID","frame":1,"close_code":4401.5}`, dropBadCloseCode},
		{"close_code too large", opText, `{"conn_id":"ID","frame":1,"close_code":99999999999999999999}`, dropBadCloseCode},
		{"close_code as object", opText, `{"conn_id":"ID","frame":1,"close_code":{}}`, dropBadCloseCode},
		{"close_code 0 is no close", opText, `{"conn_id":"ID","close_code":0}`, dropNoFrame},
		{"push wake", opText, `{"push_wake":{"token":"credential"}}`, dropPushWake},
		{"push wake and frame", opText, `{"frame":1,"push_wake":{"token":"credential"}}`, dropPushWake},
	}
	for _, code := range []string{"-1", "1", "999", "1004", "1005", "1006", "1015", "1016", "2999", "5000", "65536"} {
		tests = append(tests, struct {
			name   string
			op     byte
			text   string
			reason dropReason
		}{"close_code " + code, opText, `{"conn_id":"ID","frame":1,"close_code":` + code + `}`, dropBadCloseCode})
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

func TestEnvelopesOfOddShape(t *testing.T) {
	t.Parallel()
	tests := []string{
		`{"conn_id":"nobody","conn_id":"ID","frame":1,"frame":"FRAME"}`,
		`{"conn_id":7,"conn_id":"ID","frame":"FRAME"}`,
		` { "frame" : "FRAME" , "conn_id" : "ID" } `,
		`{"v":[1,{"conn_id":"nobody"}],"conn_id":"ID","frame":"FRAME","token":"t","close_code":null}`,
		`{"conn_id":"ID","frame":"FRAME","close_code":4401,"close_code":null}`,
		`{"conn_id":"ID","frame":"FRAME","push_wake":{}}`,
		`{"\u0063onn_id":"ID","fr\u0061me":"FRAME"}`,
	}
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, id := r.pair("odd")
		for _, text := range tests {
			b.text(strings.ReplaceAll(text, "ID", id))
			if got := ph.message(); got != `"FRAME"` {
				t.Errorf("%s: the phone got %s", text, got)
			}
		}
	})
}

func TestCloseDirective(t *testing.T) {
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

// Every end of a phone has one notice, behind its last frame.
func TestCloseNotices(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		end  func(ph *wsClient)
		code int
	}{
		{"close frame", func(ph *wsClient) { ph.close(1000, "done") }, 1000},
		{"going away", func(ph *wsClient) { ph.close(1001, "") }, 1001},
		{"a code of its own", func(ph *wsClient) { ph.close(4999, "") }, 4999},
		{"close frame without code", func(ph *wsClient) { ph.frame(opClose, nil) }, 1005},
		{"close frame, then reset", func(ph *wsClient) { ph.close(3000, ""); ph.nc.(*net.TCPConn).CloseWrite() }, 3000},
		{"end of tcp", func(ph *wsClient) { ph.nc.Close() }, 1006},
		{"half a frame, end of tcp", func(ph *wsClient) { ph.raw(clientFrame(last, opText, []byte("123"))[:7]); ph.nc.Close() }, 1006},
		{"reset", func(ph *wsClient) { ph.reset() }, 1006},
		{"unmasked", func(ph *wsClient) { ph.raw([]byte{0x81, 1, '1'}) }, 1002},
		{"not json", func(ph *wsClient) { ph.text("{") }, 1007},
		{"too big", func(ph *wsClient) { ph.raw(header64(0x81, 1<<20)) }, 1009},
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
	nc := c.nc.(*net.TCPConn)
	if err := nc.SetLinger(0); err != nil {
		c.t.Fatal(err)
	}
	nc.Close()
}

func TestSeventeenthPhone(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b := r.binary("full")
		var phones []*wsClient
		for range 16 {
			ph := r.phone("full")
			ph.greet(b)
			phones = append(phones, ph)
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

func TestBurstRightAfterConnect(t *testing.T) {
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
func TestCloseOfAnUnknownPhoneIsNoWarning(t *testing.T) {
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
