package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
)

// However the network cuts a stream, a connection makes the same of it. The
// stream is read by a naive model in one piece, and by a connection in pieces.

// streamPeer is an owner that notes what it is told, and pauses now and then.
type streamPeer struct {
	conn
	messages []string
	pauses   *rand.Rand
	ends     []string
	closes   int
}

func (p *streamPeer) message(_ *writeBatch, op byte, b []byte) {
	p.messages = append(p.messages, fmt.Sprintf("%d %x", op, b))
	clear(b) // an owner may change what it gets
	if p.pauses.IntN(4) == 0 {
		p.pause(nil)
	}
}

func (p *streamPeer) unregister(_ *writeBatch, reason closeReason, code uint16) {
	p.ends = append(p.ends, fmt.Sprint(reason, " ", code))
}

func (p *streamPeer) closed(*writeBatch) { p.closes++ }

func (p *streamPeer) answered(*writeBatch) {}
func (p *streamPeer) overdue(*writeBatch)  {}

// streamModel is what has to come of a stream.
type streamModel struct {
	messages []string
	sent     []memFrame
	end      string // "" if the connection is still open
}

func modelStream(b []byte, maxFrame int64) (m streamModel) {
	var message []byte
	open, messageOp := false, byte(0)
	broke := func(violation closeReason) streamModel {
		m.end = fmt.Sprint(violation, " ", violation.code())
		m.sent = append(m.sent, memFrame{opClose, string(closePayload(violation.code(), violation.String()))})
		return m
	}
	for {
		h, violation, complete := naiveHeader(b)
		if violation != endNone {
			return broke(violation)
		}
		if !complete {
			return m
		}
		if h.op < opClose {
			switch {
			case h.op == opContinuation && !open:
				return broke(endStrayFragment)
			case h.op != opContinuation && open:
				return broke(endInterleaved)
			case h.length > maxFrame-int64(len(message)):
				return broke(endMessageTooBig)
			}
		}
		if int64(len(b)-h.size) < h.length {
			return m
		}
		p := slices.Clone(b[h.size : h.size+int(h.length)])
		unmaskNaive(p, [4]byte(b[h.size-4:h.size]))
		b = b[h.size+int(h.length):]
		switch h.op {
		case opPing:
			m.sent = append(m.sent, memFrame{opPong, string(p)})
		case opPong:
		case opClose:
			code, violation := parseClose(p)
			if violation != endNone {
				return broke(violation)
			}
			m.end = fmt.Sprint(endPeerClosed, " ", code)
			m.sent = append(m.sent, memFrame{opClose, string(p[:min(2, len(p))])})
			return m
		default:
			if !open {
				open, messageOp = true, h.op
			}
			message = append(message, p...)
			if h.fin {
				m.messages = append(m.messages, fmt.Sprintf("%d %x", messageOp, message))
				open, message = false, nil
			}
		}
	}
}

func FuzzStream(f *testing.F) {
	o := testOptions()
	o.maxFrame = 3000 // small enough for the fuzzer to reach, more than the smallest block
	r := startRelay(f, o)

	text := func(n int) []byte { return clientFrame(0x80, opText, []byte(strings.Repeat("x", n))) }
	fragment := func(fin, op byte, s string) []byte { return clientFrame(fin, op, []byte(s)) }
	for i, stream := range [][][]byte{
		{text(0), text(1), text(125), text(126), text(3000)},
		{text(3001)},
		{text(10), {0x81, 0xff, 0, 0, 1, 0, 0, 0, 0, 0, 1, 2, 3, 4}},
		{fragment(0, opText, "he"), fragment(0x80, opPing, "!"), fragment(0, opContinuation, ""), fragment(0x80, opContinuation, "llo"), text(3)},
		{fragment(0, opBinary, ""), fragment(0x80, opContinuation, ""), text(1)},
		{fragment(0, opText, strings.Repeat("a", 2000)), fragment(0x80, opContinuation, strings.Repeat("b", 1000))},
		{fragment(0, opText, strings.Repeat("a", 2000)), fragment(0x80, opContinuation, strings.Repeat("b", 1001))},
		{fragment(0, opText, "a"), text(1)},
		{fragment(0x80, opContinuation, "a")},
		{fragment(0x80, opPing, strings.Repeat("p", 125)), fragment(0x80, opPong, "q"), fragment(0x80, opClose, "\x0f\xa0bye"), text(1)},
		{fragment(0x80, opClose, ""), text(1)},
		{text(1), fragment(0x80, opClose, "\x03"), text(1)},
		{text(5), {0x81, 0x05, 'h', 'e', 'l', 'l', 'o'}},
		{slices.Repeat(text(2), 50)},
	} {
		f.Add(slices.Concat(stream...), uint64(i))
	}
	f.Fuzz(func(t *testing.T, stream []byte, seed uint64) {
		if len(stream) > 4<<10 {
			return // TestStreamInPieces has long ones
		}
		checkStream(t, r.relay, stream, rand.New(rand.NewPCG(seed, 0)))
	})
}

// The fuzzer's streams are short. These are long, of large messages in many
// fragments, and mostly in order.
func TestStreamInPieces(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	random := rand.New(rand.NewPCG(3, 4))
	payload := make([]byte, 300<<10)
	for i := range payload {
		payload[i] = byte(random.Uint32())
	}
	size := func(most int) int { return random.IntN(1 + most>>random.IntN(19)) }
	for range 60 {
		var stream []byte
		add := func(fin, op byte, n int) { stream = append(stream, clientFrame(fin, op, payload[:n])...) }
		for range 1 + random.IntN(8) {
			op, parts := byte(opText+random.IntN(2)), random.IntN(4)
			for range parts {
				add(0, op, size(r.o.maxFrame/4))
				op = opContinuation
				if random.IntN(2) == 0 {
					add(0x80, opPing, size(maxControl))
				}
			}
			add(0x80, op, size(r.o.maxFrame/4))
		}
		switch random.IntN(4) {
		case 0:
			stream = append(stream, clientFrame(0x80, opClose, closePayload(4000, "bye"))...)
		case 1:
			add(0x80, opText, r.o.maxFrame+1)
		case 2:
			stream = stream[:len(stream)-random.IntN(len(stream))]
		}
		checkStream(t, r.relay, stream, random)
	}
}

func checkStream(t *testing.T, r *relay, stream []byte, random *rand.Rand) {
	t.Helper()
	p, sock, b := &streamPeer{pauses: random}, &memSocket{}, r.newBatch()
	p.init(r, p, rolePhone, memAddr)
	p.sock = sock

	for rest := stream; len(rest) > 0; {
		piece := slices.Clone(rest[:1+random.IntN(min(len(rest), 1+random.IntN(len(rest))))])
		rest = rest[len(piece):]
		for shared := make([]byte, 1+random.IntN(8<<10)); len(piece) > 0; {
			into := p.readInto(shared)
			n := copy(into, piece)
			piece = piece[n:]
			p.receive(b, into[:n])
			p.markAlive(b)
			b.flush()
			for i := range shared { // none of it may be kept
				shared[i] = 0xaa
			}
			for p.paused.Load() {
				p.unpause(b)
				b.flush()
			}
		}
	}

	want := modelStream(stream, int64(r.o.maxFrame))
	if !slices.Equal(p.messages, want.messages) {
		t.Errorf("messages %.500q, want %.500q", p.messages, want.messages)
	}
	if sent := sock.frames(t); !slices.Equal(sent, want.sent) {
		t.Errorf("sent %q, want %q", sent, want.sent)
	}
	if p.is(connOpen) != (want.end == "") || p.is(connLinger) != sock.finished {
		t.Errorf("state %d, half-closed %v, want the end %q", p.state.Load(), sock.finished, want.end)
	}
	if want.end == "" {
		want.end = fmt.Sprint(endPeerLost, " ", endPeerLost.code())
	}
	p.free(b)
	if len(p.ends) != 1 || p.ends[0] != want.end || p.closes != 1 {
		t.Errorf("ended %q, closed %d times, want once: %q", p.ends, p.closes, want.end)
	}
	if n := r.buffers.budget.used(); n != 0 {
		t.Errorf("%d bytes are charged after the end", n)
	}
}

// FuzzInstanceAndURL: what is read of a stranger's instance header or an
// operator's URL is the same when it is written and read again, and holds
// nothing that a log or a request line could be broken with.
func FuzzInstanceAndURL(f *testing.F) {
	for _, s := range []string{
		newIdentity(time.Now()).String(), "0123456789abcdef, 2026-01-02T03:04:05Z", "0123456789ABCDEF, 2026-01-02T03:04:05.678+23:59",
		"0123456789abcdef, 9999-12-31T23:59:59-01:00", "0123456789abcd, 2026-01-02T03:04:05Z", "0123456789abcdef01, 2026-01-02T03:04:05Z", "0123456789abcdef,2026-01-02T03:04:05Z", "0123456789abcdeg, x",
		"259200.000, users, yields", "0.0004,x", "1e9", "0x1p4, users",
		"wss://relay.example.com", "ws://127.0.0.1:8080/", "ws://[::1]:8080", "ws://[fe80::1%25eth0]:1", "ws://[fe80::1%25e\x80th0]", "wss://h?", "wss://h#", "wss://h/?#", "wss://h/p", "wss://u@h", "wss://h:",
		"wss://h:0", "wss://h:65536", "wss://:1", "wss:h", "wss:///", "WSS://H", "https://h", "wss://h\r\nx: y", "wss://%0a", "wss://é.example", "//h", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := parseIdentity(s); err == nil {
			if again, err := parseIdentity(id.String()); err != nil || again.id != id.id || !again.started.Equal(id.started) {
				t.Errorf("%q: %s was read back as %s, %v", s, id, again, err)
			}
			if strings.Trim(id.id, "0123456789abcdefABCDEF") != "" || len(id.id) != 16 {
				t.Errorf("%q: id %q", s, id.id)
			}
		}
		if st, err := parseStanding(s); err == nil {
			again, err := parseStanding(st.String())
			if off := again.age - st.age; err != nil || again.users != st.users || again.yields != st.yields || off < -time.Millisecond || off > time.Millisecond {
				t.Errorf("%q: %s was read back as %s, %v", s, st, again, err)
			}
		}
		if u, err := parseRelayURL(s); err == nil {
			text := u.String()
			rest, ok := strings.CutPrefix(text, u.Scheme+"://")
			if !ok || strings.ContainsAny(rest, "/?#@ ") || strings.ContainsFunc(text, unicode.IsControl) {
				t.Errorf("%q was read as %q", s, text)
			}
			if again, err := parseRelayURL(text); err != nil || again.String() != text || again.Hostname() != u.Hostname() {
				t.Errorf("%q: %s was read back as %s, %v", s, text, again, err)
			}
			if port := u.Port(); port != "" {
				if _, err := net.LookupPort("tcp", port); err != nil {
					t.Errorf("%q: port %q: %v", s, port, err)
				}
			}
		}
	})
}
