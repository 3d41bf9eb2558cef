package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// ---- frames ----

// naiveHeader reads a frame header as RFC 6455 §5.2 draws it, bit by bit, with
// no eye to speed. It is what parseFrameHeader is held against.
func naiveHeader(b []byte) (h frameHeader, violation closeReason, complete bool) {
	if len(b) < 2 {
		return h, endNone, false
	}
	bit := func(octet, n int) int { return int(b[octet]>>(7-n)) & 1 }
	h.fin = bit(0, 0) == 1
	for n := 4; n < 8; n++ {
		h.op = h.op<<1 | byte(bit(0, n))
	}
	known := map[byte]bool{opContinuation: true, opText: true, opBinary: true, opClose: true, opPing: true, opPong: true}
	length, more := int64(b[1]&127), 0
	switch {
	case bit(0, 1)+bit(0, 2)+bit(0, 3) > 0:
		return h, endReservedBit, true
	case !known[h.op]:
		return h, endUnknownOpcode, true
	case bit(1, 0) == 0:
		return h, endUnmasked, true
	case h.op&8 != 0 && (length > 125 || !h.fin):
		return h, endBadControl, true
	case length == 126:
		more = 2
	case length == 127:
		more = 8
	}
	if len(b) < 2+more {
		return h, endNone, false
	}
	if more > 0 {
		var n uint64
		for _, x := range b[2 : 2+more] {
			n = n<<8 | uint64(x)
		}
		shortest := uint64(126)
		if more == 8 {
			shortest = 1 << 16
		}
		if n < shortest || n>>63 == 1 {
			return h, endBadLength, true
		}
		length = int64(n)
	}
	if len(b) < 2+more+4 {
		return h, endNone, false
	}
	h.length, h.size = length, 2+more+4
	for i := range 4 {
		h.key |= uint32(b[2+more+i]) << (8 * i)
	}
	return h, endNone, true
}

func FuzzFrameHeader(f *testing.F) {
	for _, n := range []int{0, 1, 125, 126, 127, 65535, 65536} {
		b := clientFrame(0x80, opText, make([]byte, n))
		f.Add(b[:min(len(b), maxFrameHeader)])
	}
	for _, s := range []string{
		"", "\x81", "\x01\x81", "\xc1\x80", "\x83\x80", "\x89\xfe\x00\x7e", "\x09\x80", "\x81\x05hello",
		"\x81\x7f", "\x8b\x80", "\x0a\x80", "\x88\xfe", "\x82\xfe\x00\x001234",
		"\x81\xfe\x00\x7d1234",                         // 125 in the long form
		"\x81\xff\x00\x00\x00\x00\x00\x00\xff\xff1234", // 65,535 in the longest
		"\x81\xff\x80\x00\x00\x00\x00\x00\x00\x001234", // the top bit
		"\x81\xff\x00\x00\x01\x00\x00\x00\x00\x001234", // 2^40
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, all []byte) {
		for n := range len(all) + 1 { // what breaks a rule is told as soon as it is there
			checkFrameHeader(t, all[:n])
		}
	})
}

func checkFrameHeader(t *testing.T, b []byte) {
	got, violation := parseFrameHeader(b)
	want, wantViolation, complete := naiveHeader(b)
	switch {
	case violation != wantViolation:
		t.Fatalf("% x: violation %q, want %q", b, violation, wantViolation)
	case violation != endNone:
	case (got.size > 0) != complete:
		t.Fatalf("% x: size %d, complete %v", b, got.size, complete)
	case complete && got != want:
		t.Fatalf("% x: %+v, want %+v", b, got, want)
	}
}

// unmaskNaive is §5.3 as it is written.
func unmaskNaive(p []byte, key [4]byte) {
	for i := range p {
		p[i] ^= key[i%4]
	}
}

func TestFrameUnmask(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	for n := range 200 {
		for shift := range 9 { // no alignment is special
			backing := make([]byte, shift+n+8)
			for i := range backing {
				backing[i] = byte(random.Uint32())
			}
			var key [4]byte
			binary.LittleEndian.PutUint32(key[:], random.Uint32())
			want := bytes.Clone(backing)
			unmaskNaive(want[shift:shift+n], key)
			unmask(backing[shift:shift+n], binary.LittleEndian.Uint32(key[:]))
			if !bytes.Equal(backing, want) {
				t.Fatalf("%d bytes at %d: % x, want % x", n, shift, backing, want)
			}
		}
	}
}

func TestFrameHeaderOfOurs(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]string{
		0: "8100", 125: "817d", 126: "817e007e", 65535: "817effff", 65536: "817f0000000000010000",
	} {
		if got := fmt.Sprintf("%x", appendFrameHeader(nil, opText, n)); got != want {
			t.Errorf("%d bytes: %s, want %s", n, got, want)
		}
	}
}

// FuzzClose holds parseClose against the tables of §7.4, and what it accepts
// against what appendCloseFrame makes of it.
func FuzzClose(f *testing.F) {
	for _, code := range []uint16{0, 999, 1000, 1003, 1004, 1005, 1006, 1007, 1011, 1014, 1015, 2999, 3000, 4409, 4999, 5000, 65535} {
		f.Add(closePayload(code, ""))
		f.Add(closePayload(code, "the reason"))
	}
	f.Add([]byte{})
	f.Add([]byte{3})
	f.Add(closePayload(1000, "\xff"))
	f.Add(closePayload(1000, strings.Repeat("é", 62)))
	f.Add(closePayload(1000, strings.Repeat("r", maxCloseReason)))
	f.Fuzz(func(t *testing.T, p []byte) {
		code, violation := parseClose(p)
		switch {
		case len(p) == 0:
			if code != noCloseCode || violation != endNone {
				t.Fatalf("empty payload: %d %q", code, violation)
			}
			return
		case len(p) == 1:
			if violation != endBadClose {
				t.Fatalf("one byte: fault %q", violation)
			}
			return
		}
		n := int(p[0])<<8 | int(p[1])
		sendable := n >= 3000 && n < 5000 ||
			slices.Contains([]int{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014}, n)
		want := endNone
		if !sendable {
			want = endBadClose
		} else if strings.ToValidUTF8(string(p[2:]), "") != string(p[2:]) {
			want = endInvalidUTF8
		}
		if violation != want {
			t.Fatalf("% x: fault %q, want %q", p, violation, want)
		}
		if violation != endNone {
			return
		}
		b := appendCloseFrame(nil, code, string(p[2:]))
		if b[0] != 0x80|opClose || int(b[1]) != len(b)-2 || len(b)-2 > maxControl {
			t.Fatalf("close frame with code %d begins % x, %d bytes", code, b[:2], len(b))
		}
		again, violation := parseClose(b[2:])
		if again != code || violation != endNone || !bytes.HasPrefix(p[2:], b[4:]) {
			t.Fatalf("%d %q came back as %d %q, fault %q", code, p[2:], again, b[4:], violation)
		}
		// Cut at a character, and not earlier than need be.
		if lost := len(p) - len(b[2:]); lost > 0 && len(b[2:])+utf8.UTFMax <= maxControl {
			t.Fatalf("a reason of %d bytes was cut to %d", len(p)-2, len(b)-4)
		}
	})
}

// ---- reading ----

// The rules of RFC 6455, as both legs keep them.

// cat joins frames that go out in one write.
func cat(parts ...[]byte) []byte { return slices.Concat(parts...) }

// header64 is a masked header with a length of eight bytes.
func header64(b0 byte, n uint64) []byte {
	return append(binary.BigEndian.AppendUint64([]byte{b0, 0x80 | 127}, n), 1, 2, 3, 4)
}

func TestConnEnforcesFrameRules(t *testing.T) {
	t.Parallel()
	type violation struct {
		name   string
		raw    []byte
		code   int
		reason string
	}
	text := func(fin byte, s string) []byte { return clientFrame(fin, opText, []byte(s)) }
	next := func(fin byte, s string) []byte { return clientFrame(fin, opContinuation, []byte(s)) }
	tests := []violation{
		{"unmasked", []byte{0x81, 1, '1'}, 1002, "unmasked frame"},
		{"unmasked control", []byte{0x89, 0}, 1002, "unmasked frame"},
		{"ping of 126 bytes", clientFrame(last, opPing, make([]byte, 126)), 1002, "bad control frame"},
		{"pong of 126 bytes", clientFrame(last, opPong, make([]byte, 126)), 1002, "bad control frame"},
		{"close of 126 bytes", clientFrame(last, opClose, closePayload(1000, strings.Repeat("a", 124))), 1002, "bad control frame"},
		{"fragmented ping", clientFrame(more, opPing, nil), 1002, "bad control frame"},
		{"fragmented close", clientFrame(more, opClose, nil), 1002, "bad control frame"},
		{"continuation of nothing", next(last, "1"), 1002, "stray continuation"},
		{"continuation of nothing, more to come", next(more, "1"), 1002, "stray continuation"},
		{"text inside a message", cat(text(more, "1"), text(last, "2")), 1002, "data frame inside fragmented message"},
		{"binary inside a message", cat(text(more, "1"), clientFrame(more, opBinary, []byte("2"))), 1002, "data frame inside fragmented message"},
		{"125 bytes in a 16 bit length", append([]byte{0x81, 0x80 | 126, 0, 125}, make([]byte, 129)...), 1002, "bad frame length"},
		{"65,535 bytes in a 64 bit length", header64(0x81, 65535), 1002, "bad frame length"},
		{"length with the top bit", header64(0x81, 1<<63), 1002, "bad frame length"},
		{"close payload of one byte", clientFrame(last, opClose, []byte{3}), 1002, "bad close frame"},
		{"close reason that is not utf-8", clientFrame(last, opClose, closePayload(1000, "\xff")), 1007, "invalid utf-8"},
		{"text that is not utf-8", text(last, "\"\xff\""), 1007, "invalid utf-8"},
		{"text that ends inside a character", text(last, "\"\xc3"), 1007, "invalid utf-8"},
		{"bad character split over fragments", cat(text(more, "\"\xe2\x82"), next(more, ""), next(last, "\x28\"")), 1007, "invalid utf-8"},
		{"2^40 bytes announced", header64(0x81, 1<<40), 1009, "message too big"},
		{"2^40 bytes announced in a later fragment", cat(text(more, "1"), header64(0x80, 1<<40)), 1009, "message too big"},
	}
	for bit := range 3 {
		b0 := byte(0x81 | 0x10<<bit)
		tests = append(tests, violation{fmt.Sprintf("first byte %x", b0), []byte{b0, 0x81, 0, 0, 0, 0, '1'}, 1002, "reserved bit set"})
	}
	for _, op := range []byte{3, 4, 5, 6, 7, 0xb, 0xc, 0xd, 0xe, 0xf} {
		tests = append(tests, violation{fmt.Sprintf("opcode %x", op), clientFrame(last, op, []byte("1")), 1002, "unknown opcode"})
	}
	for _, code := range []uint16{0, 1, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 65535} {
		name, raw := fmt.Sprintf("close code %d", code), clientFrame(last, opClose, closePayload(code, ""))
		tests = append(tests, violation{name, raw, 1002, "bad close frame"})
	}
	onLegs(t, testOptions(), func(t *testing.T, r *testRelay, role role) {
		for _, tt := range tests {
			ln := r.lane(role)
			// Nothing behind a violation means anything any more.
			ln.from.raw(cat(tt.raw, clientFrame(last, opText, ln.message(`"behind"`))))
			if code, reason := ln.from.ended(); code != tt.code || reason != tt.reason {
				t.Errorf("%s: closed %d %q, want %d %q", tt.name, code, reason, tt.code, tt.reason)
			}
			if role == rolePhone {
				ln.to.wantNotice(ln.connID, tt.code)
				continue
			}
			ln.to.text("1") // its binary is in grace: the answer is the first that it hears
			if op, p, err := ln.to.next(); op != opClose || err != nil {
				t.Errorf("%s: the phone got opcode %d %q (%v), want a close frame", tt.name, op, p, err)
			}
		}
	})
}

// TestConnClosedByProxy: an unmasked close frame is a proxy's own, where one is trusted;
// nothing else that is unmasked is.
func TestConnClosedByProxy(t *testing.T) {
	t.Parallel()
	closing := append([]byte{0x88, 2}, closePayload(1001, "")...)
	strange := testOptions()
	strange.trustedProxies = prefixList("10.0.0.0/8")
	for _, tt := range []struct {
		name   string
		o      options
		raw    []byte
		reason string
	}{
		{"close", testOptions(), closing, "proxy closed"},
		{"empty close", testOptions(), []byte{0x88, 0}, "proxy closed"},
		{"in the middle of a message", testOptions(), cat(clientFrame(more, opText, []byte("1")), closing), "proxy closed"},
		{"ping", testOptions(), []byte{0x89, 0}, "unmasked frame"},
		{"text", testOptions(), []byte{0x81, 1, '1'}, "unmasked frame"},
		{"reserved bit", testOptions(), []byte{0xc8, 0}, "reserved bit set"},
		{"close of nobody that is trusted", strange, closing, "unmasked frame"},
	} {
		onLegs(t, tt.o, func(t *testing.T, r *testRelay, role role) {
			for _, piece := range []int{len(tt.raw), 1} {
				ln := r.lane(role)
				for raw := range slices.Chunk(tt.raw, piece) {
					ln.from.raw(raw)
				}
				if code, reason := ln.from.ended(); code != 1002 || reason != tt.reason {
					t.Errorf("%s in pieces of %d: closed %d %q, want 1002 %q", tt.name, piece, code, reason, tt.reason)
				}
			}
			r.settle("the end of them", func() bool { return r.count(role) == 0 })
			if want := `reason="` + tt.reason + `"`; !strings.Contains(r.logs.String(), want) {
				t.Errorf("%s: the log lacks %s", tt.name, want)
			}
		})
	}
}

func TestConnAssemblesMessages(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name      string
		fragments []string
	}{
		{"one frame", []string{`"one"`}},
		{"two fragments", []string{`"t`, `wo"`}},
		{"empty fragments", []string{"", "", `"emp`, "", `ty"`, ""}},
		{"a character split over fragments", []string{"\"\xe2", "\x82", "\xac\""}},
		{"a byte each", strings.Split(`{"a":[1,2,3]}`, "")},
		{"16 bit lengths", []string{`"` + strings.Repeat("a", 200), strings.Repeat("b", 65535), `"`}},
		{"64 bit lengths", []string{`"` + strings.Repeat("a", 65536), strings.Repeat("b", 65536) + `"`}},
	}
	onLegs(t, testOptions(), func(t *testing.T, r *testRelay, role role) {
		ln := r.lane(role)
		for _, first := range []byte{opText, opBinary} {
			for _, tt := range tests {
				parts := slices.Clone(tt.fragments)
				parts[0] = ln.head + parts[0]
				parts[len(parts)-1] += ln.tail
				op := first
				for i, p := range parts {
					fin := byte(more)
					if i == len(parts)-1 {
						fin = last
					}
					ln.from.raw(clientFrame(fin, op, []byte(p)))
					op = opContinuation
					if fin == more {
						ping := []byte(fmt.Sprint(tt.name, i))
						ln.from.frame(opPing, ping)
						ln.from.wantPong(ping)
						ln.from.frame(opPong, []byte("nobody asked"))
					}
				}
				ln.wants(strings.Join(tt.fragments, ""))
			}
		}
	})
}

// wantPong reads the next frame.
func (c *wsClient) wantPong(payload []byte) {
	c.t.Helper()
	if op, p, err := c.next(); op != opPong || !bytes.Equal(p, payload) || err != nil {
		c.t.Fatalf("got opcode %d %q (%v), want a pong with %q", op, p, err, payload)
	}
}

func TestConnLargestMessage(t *testing.T) {
	t.Parallel()
	const limit = 262144
	onLegs(t, testOptions(), func(t *testing.T, r *testRelay, role role) {
		ln := r.lane(role)
		payload := `"` + strings.Repeat("a", limit-len(ln.head)-len(ln.tail)-2) + `"`
		m := ln.message(payload)
		if len(m) != limit {
			t.Fatalf("the message has %d bytes, want %d", len(m), limit)
		}
		split := func(m []byte) []byte {
			return cat(clientFrame(more, opText, m[:1]), clientFrame(more, opContinuation, m[1:limit/2]),
				clientFrame(last, opContinuation, m[limit/2:]))
		}
		ln.from.frame(opText, m)
		ln.wants(payload)
		ln.from.raw(split(m))
		ln.wants(payload)

		over := append(m, ' ')
		for name, raw := range map[string][]byte{
			"one frame": clientFrame(last, opText, over),
			"fragments": split(over),
			// The header tells: nobody has to send, or keep, what it announces.
			"a header alone":   header64(0x81, limit+1),
			"a last byte more": cat(clientFrame(more, opText, m), []byte{0x80, 0x81, 0, 0, 0, 0}),
		} {
			ln := r.lane(role)
			ln.from.raw(raw)
			if code, reason := ln.from.ended(); code != 1009 || reason != "message too big" {
				t.Errorf("%s: closed %d %q, want 1009", name, code, reason)
			}
			if role == rolePhone {
				ln.to.wantNotice(ln.connID, 1009)
			}
		}
	})
}

func TestConnAllocatesNothingAnnounced(t *testing.T) {
	t.Parallel()
	onLegs(t, testOptions(), func(t *testing.T, r *testRelay, role role) {
		ln := r.lane(role)
		ln.from.raw(append(header64(0x81, 262144), make([]byte, 100)...))
		r.settle("the beginning of the message is kept", func() bool { return r.buffers.budget.used() > 0 })
		if n := r.buffers.budget.used(); n > 8<<10 {
			t.Errorf("100 bytes of 262,144 announced take %d", n)
		}
	})
}

func TestConnAnswersClose(t *testing.T) {
	t.Parallel()
	onLegs(t, testOptions(), func(t *testing.T, r *testRelay, role role) {
		for _, payload := range [][]byte{
			nil,
			closePayload(1000, ""),
			closePayload(1001, "going away"),
			closePayload(1003, ""), closePayload(1007, ""), closePayload(1011, ""),
			closePayload(1014, ""), closePayload(3000, ""), closePayload(4999, ""),
			closePayload(4000, strings.Repeat("r", maxCloseReason)),
		} {
			ln := r.lane(role)
			ln.from.frame(opClose, payload)
			op, p, err := ln.from.next()
			if want := payload[:min(2, len(payload))]; op != opClose || !bytes.Equal(p, want) || err != nil {
				t.Errorf("close %q is answered by opcode %d %q (%v), want a close frame with %q", payload, op, p, err, want)
			}
			if _, p, err := ln.from.next(); err == nil {
				t.Errorf("%q after the close handshake", p)
			}
			if role == rolePhone {
				code := noCloseCode
				if len(payload) > 0 {
					code = int(binary.BigEndian.Uint16(payload))
				}
				ln.to.wantNotice(ln.connID, code)
			}
		}
	})
}

// Whatever was sent before a peer ended its direction counts, whether it said
// goodbye or not.
func TestConnFramesBeforeHalfClose(t *testing.T) {
	t.Parallel()
	const n = 1000
	onLegs(t, testOptions(), func(t *testing.T, r *testRelay, role role) {
		for _, bye := range [][]byte{nil, clientFrame(last, opClose, closePayload(1000, ""))} {
			ln := r.lane(role)
			var raw []byte
			for i := range n {
				raw = append(raw, clientFrame(last, opText, ln.message(fmt.Sprint(i)))...)
			}
			ln.from.raw(append(raw, bye...))
			ln.from.tcp().CloseWrite()
			for i := range n {
				ln.wants(fmt.Sprint(i))
			}
			want := 1006
			if bye != nil {
				want = 1000
			}
			if role == rolePhone {
				ln.to.wantNotice(ln.connID, want)
			}
			ln.from.wantEnd(want, "")
		}
	})
}

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
			return // TestConnStreamInPieces has long ones
		}
		checkStream(t, r.relay, stream, rand.New(rand.NewPCG(seed, 0)))
	})
}

// The fuzzer's streams are short. These are long, of large messages in many
// fragments, and mostly in order.
func TestConnStreamInPieces(t *testing.T) {
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

// A length that is known before the header is whole asks for no room. What came behind
// the handshake is in a buffer that has none.
func TestConnReadsBehindPartOfAHeader(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	header, w := clientHeader(last, opText, 100_000), r.newBatch()
	for n := range len(header) {
		p := &streamPeer{}
		p.init(r.relay, p, rolePhone, memAddr)
		p.unparsed = &buffer{b: header[:n], w: n, size: -1}
		r.buffers.budget.take(n, priorityAlways)
		if into := p.readInto(make([]byte, 8)); len(into) == 0 {
			t.Errorf("behind %d bytes of it nothing can be read", n)
		}
		p.free(w)
	}
}

// ---- timeouts ----

// How long the relay waits for whom, on a fake clock. A peer that is not read
// from here takes nothing at all: a pipe holds no bytes.

func TestConnHeartbeat(t *testing.T) {
	t.Parallel()
	for _, role := range []role{rolePhone, roleBinary} {
		t.Run(role.String(), func(t *testing.T) {
			t.Parallel()
			o := timedOptions()
			o.messageTimeout = time.Hour
			onFakeClock(t, o, func(t *testing.T, r *testRelay) {
				ln := r.lane(role)
				// Every sign of life counts, a whole message or not.
				m := clientFrame(last, opText, ln.message("1"))
				for i, sign := range [][]byte{
					clientFrame(last, opPong, nil), clientFrame(last, opPong, []byte("other")), clientFrame(last, opPing, nil),
					m[:3], m[3:], clientFrame(more, opText, nil), clientFrame(last, opContinuation, ln.message("1")),
				} {
					ln.wantPing(i)
					ln.from.raw(sign)
					switch i {
					case 2:
						ln.from.wantPong(nil)
					case 4, 6:
						ln.wants("1")
					}
				}
				ln.wantPing(7)
				silent := time.Now()
				ln.from.wantClose(1011, "heartbeat timeout")
				wantAfter(t, "the end of a silent peer", silent, 30*time.Second)
				if role == rolePhone {
					ln.to.wantNotice(ln.connID, 1011)
				}
			})
		})
	}
}

// wantClose reads until the close frame, and does not answer it.
func (c *wsClient) wantClose(code int, reason string) {
	c.t.Helper()
	for {
		op, p, err := c.next()
		if err != nil {
			c.t.Fatalf("waiting for a close frame: %v", err)
		}
		if op == opClose {
			if got, _ := parseClose(p); int(got) != code || string(p[2:]) != reason {
				c.t.Errorf("closed %d %q, want %d %q", got, p[2:], code, reason)
			}
			return
		}
	}
}

// wantPing waits for the relay's next ping to the sender, and answers those to
// the other side, which come at the same pace.
func (l lane) wantPing(i int) {
	l.from.t.Helper()
	if op, p, err := l.from.next(); op != opPing || err != nil {
		l.from.t.Fatalf("%d: got opcode %d %q (%v), want a ping", i, op, p, err)
	}
	l.to.frame(opPong, nil)
}

func TestConnSilenceIsFine(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
		b, ph, id := r.pair("idle")
		start := time.Now()
		for i := 0; time.Since(start) < time.Hour; i++ {
			for _, c := range []*wsClient{b, ph} {
				op, p, err := c.next()
				if op != opPing || err != nil {
					t.Fatalf("after %v: opcode %d %q (%v), want a ping", time.Since(start), op, p, err)
				}
				c.frame(opPong, p)
			}
		}
		if again := ph.greet(b); again != id {
			t.Errorf("the phone is %s, was %s", again, id)
		}
	})
}

func TestConnMessageTimeout(t *testing.T) {
	t.Parallel()
	o := timedOptions()
	o.ping = time.Hour
	for _, role := range []role{rolePhone, roleBinary} {
		for _, tt := range []struct {
			name string
			cut  func(m []byte) [][]byte // one every five seconds
		}{
			{"one frame", func(m []byte) [][]byte {
				f := clientFrame(last, opText, m)
				return [][]byte{f[:1], f[1:2], f[2:4], f[4:5], f[5:6], f[6:7]}
			}},
			{"whole fragments", func(m []byte) [][]byte {
				next := clientFrame(more, opContinuation, m[1:2])
				return [][]byte{clientFrame(more, opText, m[:1]), next, next, next, next, next}
			}},
			{"whole pings between", func(m []byte) [][]byte {
				ping := clientFrame(last, opPing, nil)
				return [][]byte{clientFrame(more, opText, nil), ping, ping, ping, ping, ping}
			}},
		} {
			t.Run(role.String()+"/"+tt.name, func(t *testing.T) {
				t.Parallel()
				onFakeClock(t, o, func(t *testing.T, r *testRelay) {
					ln := r.lane(role)
					start := time.Now()
					for _, piece := range tt.cut(ln.message(`"unfinished"`)) {
						ln.from.raw(piece)
						time.Sleep(5 * time.Second)
					}
					ln.from.wantClose(1011, "message timeout")
					wantAfter(t, "the end of an unfinished message", start, 30*time.Second)
					if role == rolePhone {
						ln.to.wantNotice(ln.connID, 1011)
					}
				})
			})
		}
	}
}

// The deadline is that of each message: a stream in which one begins before the
// read that ends the other is never too late.
func TestConnMessageTimeoutStartsAnew(t *testing.T) {
	t.Parallel()
	o := timedOptions()
	o.ping = time.Hour
	for _, role := range []role{rolePhone, roleBinary} {
		for _, op := range []byte{opText, opPing} {
			t.Run(fmt.Sprintf("%s/opcode %d", role, op), func(t *testing.T) {
				t.Parallel()
				onFakeClock(t, o, func(t *testing.T, r *testRelay) {
					ln := r.lane(role)
					payload := []byte("1")
					if op == opText {
						payload = ln.message("1")
					}
					f := clientFrame(last, op, payload)
					ln.from.raw(f[:3])
					for range 5 {
						time.Sleep(20 * time.Second)
						ln.from.raw(cat(f[3:], f[:3]))
						if op == opText {
							ln.wants("1")
						} else {
							ln.from.wantPong(payload)
						}
					}
				})
			})
		}
	}
}

// A peer that takes some bytes now and then, too few for its kernel to say so, is
// slow and not gone.
func TestConnWriteTimeoutOfSlowPeer(t *testing.T) {
	t.Parallel()
	r := startRelay(t, timedOptions())
	b, _, ph, s, bt := memPair(t, r.relay)
	tick := func(after time.Duration) {
		bt.now += int64(after)
		ph.checkTimeouts(bt)
		bt.flush()
	}
	s.full = true
	b.message(bt, opText, []byte(`{"conn_id":"phone-1","frame":`+numbered(0, 1000)+`}`))
	bt.flush()
	for i := range 5 {
		s.room = 10
		if tick(r.o.writeTimeout); !ph.is(connOpen) {
			t.Fatalf("closed after it had taken bytes %d times", i+1)
		}
	}
	if len(s.out) != 50 {
		t.Fatalf("the socket got %d bytes, want the 50 that it took", len(s.out))
	}
	if tick(r.o.writeTimeout); ph.is(connOpen) || ph.endReason != endWriteTimeout {
		t.Fatalf("a peer that takes nothing ended with %q, want %q", ph.endReason, endWriteTimeout)
	}
}

// A ping behind a backlog asks nothing: a peer on a slow line has its interval from
// when the ping is out.
func TestConnHeartbeatBehindBacklog(t *testing.T) {
	t.Parallel()
	r := startRelay(t, timedOptions())
	b, _, ph, s, bt := memPair(t, r.relay)
	const chunk = 10
	s.full = true
	b.message(bt, opText, []byte(`{"conn_id":"phone-1","frame":`+numbered(0, 1000)+`}`))
	bt.flush()
	pass := func(d time.Duration) {
		for ; d > 0 && ph.is(connOpen); d -= time.Second {
			s.room = chunk
			bt.now += int64(time.Second)
			ph.writable(bt)
			ph.checkTimeouts(bt)
			bt.flush()
		}
	}
	pass(3 * r.o.ping)
	if !ph.is(connOpen) || ph.out.n == 0 {
		t.Fatalf("ended with %q behind a backlog of %d bytes", ph.endReason, ph.out.n)
	}
	s.full = false
	pass(r.o.ping)
	if !ph.pinged || !ph.is(connOpen) {
		t.Fatalf("pinged: %v, ended with %q less than an interval after the ping was out", ph.pinged, ph.endReason)
	}
	pass(2 * time.Second)
	if ph.is(connOpen) || ph.endReason != endHeartbeat {
		t.Fatalf("a peer that was pinged and stayed silent ended with %q, want %q", ph.endReason, endHeartbeat)
	}
}

// While a peer takes nothing only its latest ping is answered (RFC 6455 §5.5.3).
func TestConnLatestPing(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	_, _, ph, s, bt := memPair(t, r.relay)
	pings := func(payloads ...string) {
		for _, p := range payloads {
			ph.receive(bt, clientFrame(last, opPing, []byte(p)))
		}
		bt.flush()
	}
	s.full, s.room = true, 1
	pings("first")
	held := ph.out.n
	for range 1000 {
		pings("second", "")
	}
	if ph.out.n != held {
		t.Errorf("%d bytes are queued for a peer that takes nothing, want %d", ph.out.n, held)
	}
	s.full = false
	ph.writable(bt)
	pings("last", "of all")
	want := []memFrame{{opPong, "first"}, {opPong, ""}, {opPong, "last"}, {opPong, "of all"}}
	if got := s.frames(t); !slices.Equal(got, want) {
		t.Errorf("the peer got %q, want %q", got, want)
	}
}

func TestConnWriteTimeout(t *testing.T) {
	t.Parallel()
	o := timedOptions()
	o.ping = time.Hour
	t.Run("phone", func(t *testing.T) {
		t.Parallel()
		onFakeClock(t, o, func(t *testing.T, r *testRelay) {
			b, ph, id := r.pair("frozen")
			start := time.Now()
			for i := range 100 {
				b.send(id, numbered(i, 32<<10))
			}
			b.wantNotice(id, 1011)
			wantAfter(t, "the end of a phone that takes nothing", start, 10*time.Second)
			ph.wantEnd(1011, "write timeout")
		})
	})
	t.Run("binary", func(t *testing.T) {
		t.Parallel()
		onFakeClock(t, o, func(t *testing.T, r *testRelay) {
			b, ph, id := r.pair("frozen")
			sent := make(chan error, 1)
			start := time.Now()
			go func() {
				var err error
				for i := 0; i < 100 && err == nil; i++ {
					_, err = ph.nc.Write(clientFrame(last, opText, []byte(numbered(i, 32<<10))))
				}
				sent <- err
			}()
			eventually(t, "the claim is in grace", func() bool { return !(r.holder("frozen") != nil) })
			wantAfter(t, "the end of a binary that takes nothing", start, 10*time.Second)
			for i := 0; ; i++ {
				op, p, err := b.next()
				if op == opClose {
					if code, _ := parseClose(p); code != 1011 || string(p[2:]) != "write timeout" {
						t.Errorf("closed %d %q, want 1011 write timeout", code, p[2:])
					}
					break
				}
				if want := fmt.Sprintf(`{"conn_id":%q,"frame":%s}`, id, numbered(i, 32<<10)); string(p) != want || err != nil {
					t.Fatalf("got %.80q (%v), want frame %d", p, err, i)
				}
			}
			ph.wantEnd(4404, "binary gone") // it sent, and its frame could not be kept
			<-sent
		})
	})
	t.Run("a phone that takes a little now and then", func(t *testing.T) {
		t.Parallel()
		onFakeClock(t, o, func(t *testing.T, r *testRelay) {
			b, ph, id := r.pair("slow")
			for i := range 40 {
				b.send(id, numbered(i, 64<<10))
			}
			for i := range 40 {
				time.Sleep(4 * time.Second)
				if got := numberOf(ph.message()); got != i {
					t.Fatalf("frame %d arrived, want %d", got, i)
				}
			}
		})
	})
}

func TestConnCloseTimeout(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		answer func(ph *wsClient)
		want   time.Duration
	}{
		{"no answer", func(*wsClient) {}, 5 * time.Second},
		{"talk instead of an answer", func(ph *wsClient) { ph.text("1"); ph.frame(opPing, nil) }, 5 * time.Second},
		{"answer", func(ph *wsClient) { ph.close(4401, "") }, 0},
		{"another code as answer", func(ph *wsClient) { ph.close(1000, "") }, 0},
		{"violation as answer", func(ph *wsClient) { ph.raw([]byte{0xff, 0}) }, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
				b, ph, id := r.pair("bye")
				b.text(fmt.Sprintf(`{"conn_id":%q,"close_code":4401}`, id))
				if op, _, err := ph.next(); op != opClose || err != nil {
					t.Fatalf("opcode %d (%v), want a close frame", op, err)
				}
				start := time.Now()
				tt.answer(ph)
				if op, p, err := ph.next(); err == nil {
					t.Errorf("opcode %d %q behind the close frame", op, p)
				}
				wantAfter(t, "the end of tcp", start, tt.want)
				r.sound()
			})
		})
	}
}

// The relay clock goes on while it is looked at, and does not count the time
// in which nobody could.
func TestClockLeavesStallsOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := clock{start: time.Now()}
		start, _ := c.read()
		for _, step := range []struct {
			name       string
			pass, want time.Duration // since the start
		}{
			{"a look", mostLate, mostLate},
			{"a late look", stallFrom - 1, mostLate + stallFrom - 1},
			{"a stall", 70 * time.Second, mostLate + stallFrom - 1},
			{"and on", mostLate, 2*mostLate + stallFrom - 1},
			{"another stall", time.Hour, 2*mostLate + stallFrom - 1},
			{"and on", 1, 2*mostLate + stallFrom},
		} {
			time.Sleep(step.pass)
			now, _ := c.read()
			if got := time.Duration(now - start); got != step.want {
				t.Errorf("%s: %v since the start, want %v", step.name, got, step.want)
			}
		}
	})
}

// A relay that stood still for longer than a deadline ends nobody: what its peers
// sent meanwhile is there. Beside other tests its phones answer some pings too late.
func TestClockStallEndsNobody(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("signals have other numbers")
	}
	const stop, goOn = syscall.Signal(19), syscall.Signal(18) // SIGSTOP and SIGCONT, which not every system's package has
	for ping := 4 * time.Second; ; ping *= 2 {
		p := startProgram(t, nil, "-ping", ping.String(), "-rate-per-minute", "0", "-max-phones", "200").listening()
		start := time.Now()
		clients := []*wsClient{p.connect("/v2/server", binaryHeaders("stall"))}
		for len(clients) < 200 { // more than a loop reads before it looks at deadlines
			clients = append(clients, p.connect("/v2/client", phoneHeaders("stall")))
		}
		pings := func() error {
			for i, c := range clients {
				if op, b, err := c.next(); op != opPing || err != nil {
					return fmt.Errorf("client %d: opcode %d %q, %v, want a ping", i, op, b, err)
				}
			}
			return nil
		}
		err := pings()
		p.signal(stop)
		// The first client was asked after half an interval at the earliest, and had a whole one.
		if took := time.Since(start); took > ping*3/2 && ping < patience/2 {
			t.Logf("it took %v to connect and be asked, which is too long for -ping %v: once more", took, ping)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range clients {
			c.frame(opPong, nil)
		}
		time.Sleep(ping + time.Second) // for once it is real time that has to pass
		p.signal(goOn)
		if err := pings(); err != nil {
			t.Fatal(err)
		}
		p.said("the relay stood still")
		return
	}
}

// ---- slow peers ----

// What a slow peer costs: itself, and nobody else.

// numbered is a frame of n bytes with a number that can be read back.
func numbered(i, n int) string {
	s := fmt.Sprintf(`"%08d`, i)
	return s + strings.Repeat("x", n-len(s)-1) + `"`
}

func numberOf(frame string) (i int) {
	if _, err := fmt.Sscanf(frame, `"%08d`, &i); err != nil {
		return -1
	}
	return i
}

// A phone stops reading. Its siblings get every frame and its binary every pong,
// one round trip after the other, until its queue is full; then it is closed
// behind what it was sent, without a gap.
func TestConnStalledPhone(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.queue = 1 << 20
	onEach(t, o, func(t *testing.T, r *testRelay) {
		b, stalled, stalledID := r.pair("stall")
		var siblings []*wsClient
		var ids []string
		for range 2 {
			ph := r.phone("stall")
			ids = append(ids, ph.greet(b))
			siblings = append(siblings, ph)
		}
		sent, ended := 0, false
		for ; !ended; sent++ {
			if sent == 2000 {
				t.Fatalf("%d frames of 32 KiB, and the queue of 1 MiB is not full", sent)
			}
			b.send(stalledID, numbered(sent, 32<<10))
			for k, ph := range siblings {
				b.send(ids[k], numbered(sent, 100))
				if got := numberOf(ph.message()); got != sent {
					t.Fatalf("sibling got frame %d, want %d", got, sent)
				}
			}
			ping := []byte(fmt.Sprint(sent))
			b.frame(opPing, ping)
			for pong := false; !pong; {
				switch op, p, err := b.next(); {
				case err != nil:
					t.Fatal(err)
				case op == opPong && string(p) == string(ping):
					pong = true
				case op == opText && string(p) == fmt.Sprintf(`{"conn_id":%q,"close_code":1011}`, stalledID):
					ended = true
				default:
					t.Fatalf("the binary got opcode %d %q", op, p)
				}
			}
		}
		got := 0
		for ; ; got++ {
			op, p, err := stalled.next()
			if err != nil {
				t.Fatal(err)
			}
			if op == opClose {
				if code, _ := parseClose(p); code != 1011 || string(p[2:]) != "phone backlog full" {
					t.Errorf("closed %d %q, want 1011 phone backlog full", code, p[2:])
				}
				break
			}
			if op != opText || numberOf(string(p)) != got {
				t.Fatalf("got opcode %d, %.20q after %d frames", op, p, got)
			}
		}
		// The one that did not fit, and whatever came until the binary was told.
		if got >= sent {
			t.Errorf("the phone got %d frames of %d, and its queue was full", got, sent)
		}
	})
}

// Over a pipe nothing but the relay itself holds bytes: the limits are exact.
func TestQueueLimits(t *testing.T) {
	t.Parallel()
	const limit, size = 1 << 20, 4 << 10
	for _, tt := range []struct {
		name   string
		set    func(o *options)
		reason string
	}{
		{"of one phone", func(o *options) { o.queue = limit }, "phone backlog full"},
		{"of the process", func(o *options) { o.queueTotal = limit }, "relay memory limit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := timedOptions()
			tt.set(&o)
			onFakeClock(t, o, func(t *testing.T, r *testRelay) {
				b, stalled, stalledID := r.pair("limit")
				sibling := r.phone("limit")
				id := sibling.greet(b)
				sent, most := 0, int64(0)
				for ended := false; !ended; sent++ {
					if sent*size > 2*limit {
						t.Fatalf("%d bytes are queued", sent*size)
					}
					b.send(stalledID, numbered(sent, size))
					b.frame(opPing, nil)
					op, p, err := b.next()
					if op == opText && string(p) == fmt.Sprintf(`{"conn_id":%q,"close_code":1011}`, stalledID) {
						ended = true
						op, p, err = b.next()
					}
					if op != opPong || err != nil {
						t.Fatalf("the binary got opcode %d %.200q, %v; want a pong", op, p, err)
					}
					most = max(most, r.buffers.budget.used())
				}
				// Close frames and notices are let through beyond it.
				if most > limit+64<<10 {
					t.Errorf("%d bytes were kept, the limit is %d", most, limit)
				}
				if (sent+1)*size < limit/2 {
					t.Errorf("closed after %d frames of %d bytes, the limit is %d", sent, size, limit)
				}
				// What passes through has room beside it, half received for a while.
				passing := numbered(1, limit/16)
				raw := clientFrame(last, opText, fmt.Appendf(nil, `{"conn_id":%q,"frame":%s}`, id, passing))
				b.raw(raw[:len(raw)/2])
				synctest.Wait()
				b.raw(raw[len(raw)/2:])
				if got := sibling.message(); got != passing {
					t.Errorf("the sibling got %.50s", got)
				}
				for i := range sent - 1 {
					if got := numberOf(stalled.message()); got != i {
						t.Fatalf("frame %d arrived, want %d", got, i)
					}
				}
				stalled.wantEnd(1011, tt.reason)
				b.send(id, "1")
				if got := sibling.message(); got != "1" {
					t.Errorf("the sibling got %s", got)
				}
			})
		})
	}
}

func TestConnCloseBehindQueue(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		for _, shape := range []string{`"frame":"bye",`, `"frame":null,`, ``} {
			b, ph, id := r.pair(r.newConnID())
			var raw []byte
			for i := range 1000 {
				raw = append(raw, clientFrame(last, opText, []byte(fmt.Sprintf(`{"conn_id":%q,"frame":%s}`, id, numbered(i, 1000))))...)
			}
			b.raw(append(raw, clientFrame(last, opText, []byte(fmt.Sprintf(`{"conn_id":%q,%s"close_code":4412}`, id, shape)))...))
			r.settle("the directive is read", func() bool { return r.metrics.connectedPhones.Load() == 0 })
			for i := range 1000 {
				if got := numberOf(ph.message()); got != i {
					t.Fatalf("frame %d arrived, want %d", got, i)
				}
			}
			if shape == `"frame":"bye",` {
				if got := ph.message(); got != `"bye"` {
					t.Errorf("got %.50q before the end, want the directive's frame", got)
				}
			}
			ph.wantEnd(4412, "closed by binary")
			b.close(1000, "")
			b.wantEnd(1000, "")
		}
	})
}

// A phone on a slow line gets all that stands before its close frame, and the frame,
// whichever side began: even where that takes longer than the relay waits for an
// answer, and even where there is less of it than the poller takes from the queue.
func TestConnCloseOnSlowLine(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		n, size int
		pause   time.Duration
		close   func(b, ph *wsClient, id string)
		code    int
		reason  string
	}{
		{"by the binary", 100, 32 << 10, 500 * time.Millisecond, func(b, _ *wsClient, id string) {
			b.text(fmt.Sprintf(`{"conn_id":%q,"close_code":4412}`, id))
		}, 4412, "closed by binary"},
		{"by the phone", 3, 16 << 10, 3 * time.Second, func(_, ph *wsClient, _ string) {
			synctest.Wait()
			ph.close(1001, "")
		}, 1001, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
				b, ph, id := r.pair("slow")
				for i := range tt.n {
					b.send(id, numbered(i, tt.size))
				}
				tt.close(b, ph, id)
				for i := range tt.n {
					time.Sleep(tt.pause)
					if got := numberOf(ph.message()); got != i {
						t.Fatalf("frame %d arrived, want %d", got, i)
					}
				}
				ph.wantEnd(tt.code, tt.reason)
			})
		})
	}
}

// A binary that does not read for a while is back-pressure on its phones: no
// frame is lost, none overtakes another, and the relay keeps little.
func TestBackPressure(t *testing.T) {
	t.Parallel()
	const phones, frames, size = 4, 1000, 8 << 10
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b := r.binary("slow")
		ids := map[string]int{}
		var all []*wsClient
		for range phones {
			ph := r.phone("slow")
			ids[ph.greet(b)] = 0
			all = append(all, ph)
		}
		var senders sync.WaitGroup
		for _, ph := range all {
			senders.Go(func() {
				for i := range frames {
					ph.nc.SetWriteDeadline(time.Now().Add(patience))
					if _, err := ph.nc.Write(clientFrame(last, opText, []byte(numbered(i, size)))); err != nil {
						t.Errorf("frame %d: %v", i, err)
						return
					}
				}
			})
		}
		server := &r.holder("slow").conn
		r.settle("every phone waits for the binary", func() bool {
			server.mu.Lock()
			defer server.mu.Unlock()
			return len(server.waiters) == phones
		})
		if n := r.buffers.budget.used(); n > 512<<10 { // pauseAt, and what was read of each phone
			t.Errorf("%d bytes are kept for a slow binary", n)
		}
		for range phones * frames {
			// By hand: this many bytes are too many for encoding/json under -race.
			head, frame, _ := strings.Cut(strings.TrimSuffix(b.message(), "}"), `","frame":`)
			id := strings.TrimPrefix(head, `{"conn_id":"`)
			if got, want := numberOf(frame), ids[id]; got != want || len(frame) != size {
				t.Fatalf("frame %d of %d bytes arrived, want %d of %d", got, len(frame), want, size)
			}
			ids[id]++
		}
		senders.Wait()
		r.settle("nothing is kept", func() bool { return r.buffers.budget.used() == 0 })
	})
}

// What phones that flood their binary have in front of a phone that sends little
// is bounded, however many they are: they wait, and come back one by one.
func TestBackPressureIsFair(t *testing.T) {
	t.Parallel()
	for size, most := range map[int]int{4 << 10: pauseAt, directWrite: resumeAt, 64 << 10: resumeAt} {
		t.Run(fmt.Sprint("frames of ", size), func(t *testing.T) { testBackPressureIsFair(t, size, most+size+1000) })
	}
}

func testBackPressureIsFair(t *testing.T, size, most int) {
	const flooders = 15
	r := startRelay(t, testOptions())
	b, bs, light, _, bt := memPair(t, r.relay)
	phones, socks := make([]*session, flooders), make([]*memSocket, flooders)
	for i := range phones {
		phones[i], socks[i] = memPhone(t, r.relay, "server", fmt.Sprint("flooder-", i))
		defer phones[i].free(bt)
	}
	bs.full = true
	flood := func(ph *session) {
		for n := 0; n < 2*pauseAt && !ph.paused.Load(); n += size {
			ph.message(bt, opText, []byte(numbered(0, size)))
		}
		bt.flush()
	}
	for _, ph := range phones {
		flood(ph)
		if !ph.paused.Load() {
			t.Error("a phone that floods is not held back")
		}
	}
	for round := range flooders {
		bs.full, bs.discard = false, true
		b.writable(bt) // it takes all
		bt.flush()
		bs.full = true
		turns := 0
		for i, ph := range phones {
			if socks[i].resumes > 0 {
				socks[i].resumes = 0
				turns++
				ph.unpause(bt)
				flood(ph)
			}
		}
		b.mu.Lock()
		front := b.out.n
		b.mu.Unlock()
		if turns != 1 || front > most {
			t.Fatalf("round %d: %d phones had a turn, and %d bytes wait", round, turns, front)
		}
		light.message(bt, opText, []byte(`"small"`))
		bt.flush()
		if light.paused.Load() {
			t.Fatalf("round %d: a phone that has sent one small frame is held back", round)
		}
	}
	if n := len(b.waiters); n != flooders {
		t.Errorf("%d phones wait, want %d", n, flooders)
	}
}

// A phone whose turn it is, and that sends nothing or ends, keeps nobody waiting.
func TestBackPressurePassesTheTurn(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, bs, first, _, bt := memPair(t, r.relay)
	bs.full = true
	phones, socks := []*session{first}, []*memSocket{nil}
	for i := range 4 {
		ph, s := memPhone(t, r.relay, "server", fmt.Sprint("waits-", i))
		phones, socks = append(phones, ph), append(socks, s)
		defer ph.free(bt)
	}
	for _, ph := range phones {
		for !ph.paused.Load() {
			ph.message(bt, opText, []byte(numbered(0, 64<<10)))
		}
	}
	bt.flush()
	bs.full, bs.discard = false, true
	phones[2].startClose(bt, endShutdown) // while it waits
	b.writable(bt)
	first.unpause(bt) // and has nothing to say
	bt.flush()
	if socks[1].resumes != 1 {
		t.Fatal("the turn was not passed on")
	}
	phones[1].unpause(bt)
	bt.flush()
	if socks[3].resumes != 1 || socks[4].resumes != 0 {
		t.Errorf("behind one that has ended the next was called %d times, the one behind that %d", socks[3].resumes, socks[4].resumes)
	}
}

// A phone that waits for a binary goes on as soon as the end of that has begun, and not
// before: a socket fails before its reader finds out, and in between nobody gets what
// is sent.
func TestBackPressureEndsWithTheBinary(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(b *session, w *writeBatch){
		"lost":    func(b *session, w *writeBatch) { b.free(w) },
		"closing": func(b *session, w *writeBatch) { b.startClose(w, endWriteTimeout) },
	} {
		b, bs, ph, ps, w := memPair(t, startRelay(t, testOptions()).relay)
		bs.full = true
		message := []byte(numbered(0, 64<<10))
		for !ph.paused.Load() {
			ph.message(w, opText, message)
		}
		w.flush()
		bs.aborts = 1 // reset by the peer
		b.writable(w)
		if ps.resumes != 0 {
			t.Errorf("%s: it was released onto a connection that is lost", name)
		}
		if end(b, w); ps.resumes != 1 {
			t.Errorf("%s: it was called %d times, want once", name, ps.resumes)
		}
		ph.unpause(w)
		if ph.message(w, opText, message); ph.endReason != endBinaryGone {
			t.Errorf("%s: ended with %q, want %q", name, ph.endReason, endBinaryGone)
		}
		w.flush()
	}
}

// The kernel holds little for a binary that does not read, so that what one phone
// sends does not stand behind megabytes of another.
func TestBackPressureFillsNoKernelBuffer(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" || runtime.GOARCH == "386" {
		t.Skip("the goroutine poller leaves the socket as it is")
	}
	r := startRelay(t, testOptions())
	_, ph, _ := r.pair("slow")
	go func() {
		for err := error(nil); err == nil; {
			_, err = ph.nc.Write(clientFrame(last, opText, []byte(numbered(0, 16<<10))))
		}
	}()
	server := r.holder("slow")
	r.settle("the phone waits for its binary", func() bool {
		server.mu.Lock()
		defer server.mu.Unlock()
		return len(server.waiters) == 1
	})
	if n := r.metrics.bytesUp.Load(); n > 512<<10 {
		t.Errorf("%d bytes were taken for a binary that reads none", n)
	}
}

// Bytes that turn out to wait take nothing of what is kept for those that pass:
// a phone for which they do not fit ends, as it is.
func TestBudgetOfWhatTurnsOutToWait(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1000, 100 << 10} { // with the batch, and at once
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			r := startRelay(t, testOptions())
			b, bs, ph, ps, bt := memPair(t, r.relay)
			budget := r.buffers.budget
			held := int(budget.limit - budget.limit/8)
			budget.take(held, priorityBacklog)
			defer budget.give(held)
			ps.full, ps.room = true, 10
			b.message(bt, opText, []byte(`{"conn_id":"phone-1","frame":`+numbered(0, size)+`}`))
			bt.flush()
			if ph.is(connOpen) || ph.endReason != endMemoryLimit || ps.aborts == 0 {
				t.Errorf("the phone ended with %q, cut off: %d", ph.endReason, ps.aborts)
			}
			if got := bs.frames(t); len(got) != 1 || got[0].payload != `{"conn_id":"phone-1","close_code":1011}` {
				t.Errorf("the binary got %q", got)
			}
			if n := budget.used() - int64(held); n > int64(bufferSizes[0]) { // a close frame that leads nowhere
				t.Errorf("%d bytes wait", n)
			}
		})
	}
}

// The limit of a phone's queue is exact, counts what waits alone, and is nothing to one that ends.
func TestQueueLimitIsExact(t *testing.T) {
	t.Parallel()
	_, _, ph, ps, w := memPair(t, startRelay(t, testOptions()).relay)
	const size, n = 1000, 20 // a frame's, and how many fit
	part := bytes.Repeat([]byte{'1'}, (size-4)/3)
	push := func(limit int) closeReason {
		ph.mu.Lock()
		defer ph.mu.Unlock()
		return ph.push(w, limit, part, part, part)
	}
	for range 2 * n {
		if reason := push(n * size); reason != endNone {
			t.Fatalf("%q, and the socket takes all", reason)
		}
	}
	w.flush()
	ps.full = true
	for i := range n {
		if reason := push(n * size); reason != endNone {
			t.Fatalf("%q behind %d frames, want none before %d", reason, i, n)
		}
	}
	for _, limit := range []int{n * size, (n+1)*size - 1} {
		if reason := push(limit); reason != endBacklogFull || ph.out.n != n*size {
			t.Errorf("%q, with %d bytes queued, limit %d", reason, ph.out.n, limit)
		}
	}
	ph.startClose(w, endShutdown)
	if reason, sent := push(n*size), ph.txFrames; reason != endNone || sent != 3*n {
		t.Errorf("%q behind the close frame; %d messages, want %d", reason, sent, 3*n)
	}
	w.flush()
}

// What is written straight from where it was read comes behind all that waits, were it a byte.
func TestQueueKeepsOrder(t *testing.T) {
	t.Parallel()
	_, _, ph, ps, w := memPair(t, startRelay(t, testOptions()).relay)
	ps.full, ps.room = true, 1
	ph.sendPong(w, nil)
	w.flush()
	ps.full = false // and the poller has not told of it yet
	large := string(bytes.Repeat([]byte{'1'}, 2*directWrite))
	ph.mu.Lock()
	ph.push(w, 0, nil, []byte(large), nil)
	ph.mu.Unlock()
	ph.writable(w)
	w.flush()
	if got := ps.frames(t); !slices.Equal(got, []memFrame{{opPong, ""}, {opText, large}}) {
		t.Errorf("got %.100q", got)
	}
}

// A flood of pings in one batch is answered in few writes, and without a queue of its size.
func TestQueueOfPongs(t *testing.T) {
	t.Parallel()
	_, _, ph, ps, w := memPair(t, startRelay(t, testOptions()).relay)
	const n = 5000
	ping, most := make([]byte, maxControl), 0
	for range n {
		ph.sendPong(w, ping)
		most = max(most, ph.out.n)
	}
	w.flush()
	if writes := 1 + ps.bytes/flushAt; most > flushAt+2+maxControl || ps.writes > writes {
		t.Errorf("%d bytes were queued, want %d at most; %d writes, want %d at most", most, flushAt+2+maxControl, ps.writes, writes)
	}
	if got := len(ps.frames(t)); got != n {
		t.Errorf("%d pongs, want %d", got, n)
	}
}

// The share of a phone that takes nothing is exact, and leaves an eighth of the budget free.
func TestBudgetShareIsExact(t *testing.T) {
	t.Parallel()
	const size = 500
	for _, tt := range []struct {
		name  string
		first int // message, that waits for it
		spare int // of the budget, without the eighth
		want  closeReason
	}{
		{"what is there and it fits", 8, (10 + size) / 2, endNone},
		{"but for a byte or two", 8, (10+size)/2 - 1, endMemoryLimit},
		{"it fits, and its buffer would take of the eighth", bufferSizes[0] - 4, bufferSizes[0] - 1, endMemoryLimit},
		{"its buffer just fits, too", bufferSizes[0] - 4, bufferSizes[0], endNone},
	} {
		r := startRelay(t, testOptions())
		_, _, ph, ps, w := memPair(t, r.relay)
		ps.full = true
		push := func(n int) closeReason {
			ph.mu.Lock()
			defer ph.mu.Unlock()
			part := bytes.Repeat([]byte{'1'}, n/2)
			return ph.push(w, 0, part, part[:len(part)/2], part[len(part)/2:])
		}
		push(tt.first)
		w.flush()
		budget := r.buffers.budget
		held := int(budget.limit-budget.limit/8-budget.used()) - tt.spare
		budget.take(held, priorityAlways)
		if got := push(size - 4); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
		budget.give(held)
	}
}

// Without memory a connection ends that would need some, whatever for.
func TestBudgetIsSpent(t *testing.T) {
	t.Parallel()
	full := func(r *testRelay) (free func()) {
		budget := r.buffers.budget
		held := int(budget.limit-budget.used()) + 64<<10 // what is given back meanwhile makes no room
		budget.take(held, priorityAlways)
		return func() { budget.give(held) }
	}
	for name, need := range map[string]func(ph *session, w *writeBatch) closeReason{
		"half a frame": func(ph *session, w *writeBatch) closeReason {
			ph.receive(w, clientFrame(last, opText, make([]byte, 100))[:50])
			return ph.endReason
		},
		"a fragment": func(ph *session, w *writeBatch) closeReason {
			ph.receive(w, clientFrame(more, opText, make([]byte, 100)))
			return ph.endReason
		},
		"a message": func(ph *session, w *writeBatch) closeReason {
			ph.mu.Lock()
			defer ph.mu.Unlock()
			return ph.push(w, 0, nil, []byte("1"), nil)
		},
		"a large message": func(ph *session, w *writeBatch) closeReason {
			ph.mu.Lock()
			defer ph.mu.Unlock()
			return ph.push(w, 0, nil, make([]byte, 2*directWrite), nil)
		},
	} {
		r := startRelay(t, testOptions())
		_, _, ph, _, w := memPair(t, r.relay)
		free := full(r)
		if got := need(ph, w); got != endMemoryLimit || ph.txFrames != 0 {
			t.Errorf("%s: %q, want %q; %d messages are counted", name, got, endMemoryLimit, ph.txFrames)
		}
		w.flush()
		free()
	}

	// A connection that needs nothing for it ends like any other.
	r := startRelay(t, testOptions())
	_, bs, ph, ps, w := memPair(t, r.relay)
	ps.full = true
	ph.sendPong(w, nil)
	w.flush()
	free := full(r)
	if ph.startClose(w, endShutdown); ps.aborts != 0 {
		t.Error("the connection is cut off")
	}
	ps.full = false
	ph.writable(w)
	w.flush()

	// What ends or keeps a connection in order is never refused.
	b := r.holder("server")
	b.mu.Lock()
	b.ping(w)
	b.mu.Unlock()
	b.sendPong(w, []byte("?"))
	w.flush()
	got := fmt.Sprint(ps.frames(t), bs.frames(t))
	if want := fmt.Sprint(
		[]memFrame{{opPong, ""}, {opClose, string(closePayload(endShutdown.code(), endShutdown.String()))}},
		[]memFrame{{opText, `{"conn_id":"phone-1","close_code":1001}`}, {opPing, ""}, {opPong, "?"}}); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	newcomer, ns := memSession(t, r.relay, rolePhone, "phone-2")
	newcomer.greet(w, []byte("101"))
	if w.flush(); string(ns.out) != "101" {
		t.Errorf("the answer to an upgrade is %q", ns.out)
	}
	ns.out = nil
	newcomer.startClose(w, endShutdown)
	w.flush()
	if all := ns.frames(t); len(all) != 1 || all[0].op != opClose {
		t.Errorf("got %q, want a close frame", all)
	}
	newcomer.free(w)

	// Nor is the rest of a message that is half out, though its buffer is larger than it.
	const size = 10 + 100<<10
	room := int(r.buffers.budget.used()-r.buffers.budget.limit) + size
	r.buffers.budget.give(room)
	bs.full, bs.room = true, 20
	b.mu.Lock()
	reason := b.push(w, 0, nil, bytes.Repeat([]byte{'1'}, size-10), nil)
	b.mu.Unlock()
	bs.full = false
	b.writable(w)
	r.buffers.budget.take(room, priorityAlways)
	if all := bs.frames(t); reason != endNone || len(all) != 1 || len(all[0].payload) != size-10 {
		t.Errorf("%q, and %d messages arrived", reason, len(all))
	}
	w.flush()
	free()
}

// What waits for a binary does not end it, nor its phones, while phones elsewhere
// have filled all that they may.
func TestBudgetSparesBinaries(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	_, bs, ph, _, bt := memPair(t, r.relay)
	budget := r.buffers.budget
	held := 0
	for budget.take(1<<10, priorityPassing) {
		held += 1 << 10
	}
	defer budget.give(held)
	bs.full = true
	for i := range 20 {
		ph.handler.message(bt, opText, []byte(numbered(i, 4<<10)))
		bt.flush()
	}
	if !ph.is(connOpen) {
		t.Errorf("a phone that sends to its binary ended with %q", ph.endReason)
	}
}

// Slow phones of many binaries, and new ones for those that were closed, end
// nobody who is not slow.
func TestBudgetOfManySlowPhones(t *testing.T) {
	t.Parallel()
	const binaries, enough = 24, 50
	o := testOptions()
	o.queueTotal, o.maxPhones = 16<<20, 4
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var tight atomic.Bool
	r := startRelayOn(t, o, tightListener{ln, &tight})
	healthy, reader, id := r.pair("healthy")
	tight.Store(true)
	over := func() int64 { return r.metrics.closes[rolePhone][endMemoryLimit].Load() }
	stop := make(chan struct{})
	var slow sync.WaitGroup
	for i := range binaries {
		server := fmt.Sprint("slow-", i)
		b := r.binary(server)
		slow.Go(func() { feedSlowPhones(t, r, b, server, stop) })
	}
	frame := numbered(0, 100<<10)
	latest, at := int64(0), time.Now() // of them
	for over() < enough {
		if n := over(); n > latest {
			latest, at = n, time.Now()
		}
		if time.Since(at) > patience {
			t.Fatalf("%d slow phones were closed, and %d bytes are kept of %d", over(), r.buffers.budget.used(), o.queueTotal)
		}
		healthy.raw(plainFrame(id, frame))
		if got := reader.message(); got != frame {
			t.Fatalf("%d bytes arrived", len(got))
		}
	}
	close(stop)
	slow.Wait()
	for reason := range closeReasonCount {
		if n := r.metrics.closes[roleBinary][reason].Load(); n > 0 {
			t.Errorf("%d binaries ended with %q", n, reason)
		}
	}
}

// tightListener keeps the kernel from taking megabytes for each peer that does
// not read, once it is told to.
type tightListener struct {
	net.Listener
	tight *atomic.Bool
}

func (ln tightListener) Accept() (net.Conn, error) {
	nc, err := ln.Listener.Accept()
	if err == nil && ln.tight.Load() {
		err = nc.(*net.TCPConn).SetWriteBuffer(16 << 10)
	}
	return nc, err
}

// plainFrame is an envelope under the mask 0, which costs a test nothing.
func plainFrame(connID, frame string) []byte {
	p := `{"conn_id":"` + connID + `","frame":` + frame + `}`
	b := appendFrameHeader(nil, opText, len(p))
	b[1] |= 0x80
	return append(append(b, 0, 0, 0, 0), p...)
}

// feedSlowPhones sends frame after frame to as many phones as b may have. They
// read none, and each that is closed is replaced.
func feedSlowPhones(t *testing.T, r *testRelay, b *wsClient, server string, stop chan struct{}) {
	var ids []string
	frame := numbered(0, 15<<10)
	// hear reads what b gets until a frame of this kind.
	hear := func(until byte) string {
		for {
			op, p, err := b.next()
			if err != nil || op == opClose {
				t.Errorf("%s: opcode %d %q, %v", server, op, p, err)
				return ""
			}
			connID := ""
			if op == opText {
				connID = strings.Split(string(p), `"`)[3]
			}
			if strings.Contains(string(p), "close_code") {
				ids = slices.DeleteFunc(ids, func(id string) bool { return id == connID })
			} else if op == until {
				return connID
			}
		}
	}
	for !t.Failed() {
		select {
		case <-stop:
			return
		default:
		}
		for len(ids) < r.o.maxPhones {
			ph, _, err := r.dial("/v2/client", phoneHeaders(server))
			if err != nil {
				t.Error(err)
				return
			}
			ph.text(`"hello"`)
			ids = append(ids, hear(opText))
		}
		for _, id := range ids {
			b.raw(plainFrame(id, frame))
		}
		b.frame(opPing, nil) // notices come before its answer
		hear(opPong)
	}
}

// ---- ends that cross ----

// Ends that cross each other: two things that happen to a connection, or to a
// server-id, at once.

func TestConnPauseAfterEnd(t *testing.T) {
	t.Parallel()
	_, _, ph, _, w := memPair(t, startRelay(t, testOptions()).relay)
	// Grace runs out, say, while the reader is about to pause.
	ph.startClose(w, endGraceExpired)
	ph.pause(nil)
	w.flush()
	if ph.endReason != endGraceExpired {
		t.Errorf("ended with %q, want %q", ph.endReason, endGraceExpired)
	}
	if ph.paused.Load() {
		t.Error("the reader pauses on a connection that has ended, and nothing will resume it")
	}
}

func TestConnFailFindsPausedReader(t *testing.T) {
	t.Parallel()
	_, _, ph, s, _ := memPair(t, startRelay(t, testOptions()).relay)
	ph.pause(nil)
	ph.fail()
	if s.aborts != 1 || s.resumes != 1 {
		t.Errorf("aborted %d times and resumed %d times, want once each", s.aborts, s.resumes)
	}
}

// A challenge just before a heartbeat is due leaves the incumbent as long to
// answer as any ping does, and none follows a close frame (RFC 6455 §5.5.1).
func TestConnChallengeBeforeHeartbeat(t *testing.T) {
	t.Parallel()
	b, _, _, _, w := memPair(t, startRelay(t, testOptions()).relay)
	ping := func() {
		b.mu.Lock()
		b.ping(w)
		b.mu.Unlock()
	}
	w.now = b.pingAt - 1
	ping()
	w.flush()
	w.now++
	b.checkTimeouts(w)
	if !b.is(connOpen) {
		t.Errorf("ended with %q one nanosecond after a ping", b.endReason)
	}
	w.now += int64(b.relay.o.ping)
	b.checkTimeouts(w)
	w.flush()
	if b.endReason != endHeartbeat {
		t.Errorf("a whole interval after the ping: ended with %q, want %q", b.endReason, endHeartbeat)
	}
	if ping(); b.out.n != 0 {
		t.Errorf("%d bytes are queued behind the close frame", b.out.n)
	}
}

// Connections that come in a wave are asked for their first sign of life one by one,
// each within an interval.
func TestConnFirstPing(t *testing.T) {
	t.Parallel()
	r := makeRelay(testOptions(), identity{}, buildVersion{}, new(instanceState), new(probeKeys), slog.New(slog.DiscardHandler))
	ping, quarters := int64(r.o.ping), [4]int{}
	for range 1000 {
		before := r.now()
		s := newSession(r, caller{}, "id")
		in := s.pingAt - s.opened
		if s.opened < before || s.opened > r.now() || in < ping/2 || in >= ping {
			t.Fatalf("opened at %d, want from %d to %d; first ping after %v", s.opened, before, r.now(), time.Duration(in))
		}
		quarters[4*in/ping]++
	}
	if quarters[2] < 400 || quarters[3] < 400 {
		t.Errorf("%d in the third quarter of an interval, and %d in the fourth", quarters[2], quarters[3])
	}
}

// With a backlog no ping is asked for an answer, and the next has a whole interval.
func TestConnHeartbeatAfterBacklog(t *testing.T) {
	t.Parallel()
	o := timedOptions()
	o.writeTimeout = time.Hour
	_, _, ph, ps, w := memPair(t, startRelay(t, o).relay)
	due := func() {
		w.now = ph.pingAt
		ph.checkTimeouts(w)
		w.flush()
	}
	due()
	ps.full = true
	ph.sendPong(w, nil)
	w.flush()
	due()
	ps.full = false
	ph.writable(w)
	due()
	if pings := strings.Count(fmt.Sprint(ps.frames(t)), fmt.Sprint(memFrame{opPing, ""})); !ph.is(connOpen) || pings != 2 {
		t.Errorf("ended with %q, after %d pings; want none, after 2", ph.endReason, pings)
	}
	due()
	if ph.endReason != endHeartbeat {
		t.Errorf("ended with %q, want %q", ph.endReason, endHeartbeat)
	}
}

// A reader that pauses hears nothing: neither the ping before it nor half a message counts
// for the time.
func TestConnTimeoutsBeginAfterPause(t *testing.T) {
	t.Parallel()
	b, _, ph, _, w := memPair(t, startRelay(t, timedOptions()).relay)
	began := w.now
	frame := clientFrame(more, opText, []byte(`"fragment"`))
	ph.receive(w, slices.Clone(frame[:3]))
	w.now++
	ph.receive(w, slices.Clone(frame[3:]))
	if got := ph.messageStart.Load(); got != began {
		t.Errorf("a message counts from %v on, want from its first byte on", time.Duration(got-began))
	}
	if b.receive(w, frame); b.messageStart.Load() != w.now {
		t.Error("a fragment that comes whole does not count as a message that has begun")
	}
	w.now = ph.pingAt
	ph.messageStart.Store(w.now)
	ph.checkTimeouts(w)
	w.flush()
	ph.pause(nil)
	w.now += 2 * int64(max(ph.relay.o.ping, ph.relay.o.messageTimeout))
	ph.checkTimeouts(w)
	w.flush()
	w.now = ph.pingAt
	ph.unpause(w)
	ph.checkTimeouts(w)
	if !ph.is(connOpen) || ph.messageStart.Load() != w.now {
		t.Errorf("ended with %q, message since %v", ph.endReason, time.Duration(w.now-ph.messageStart.Load()))
	}
}

// A sweep may come between what a reader does with a peer that is lost: its queue is
// out, as far as that goes, and the goroutine poller's writer has the rest.
func TestConnPeerLostIsNotGivenUp(t *testing.T) {
	t.Parallel()
	_, _, ph, _, w := memPair(t, startRelay(t, timedOptions()).relay)
	ph.setEnd(endPeerLost, endPeerLost.code())
	if ph.checkTimeouts(w); ph.failed {
		t.Error("its socket was shut down")
	}
}

// A peer takes nothing only if bytes wait for it: in the queue, were it one, or in TLS.
func TestConnStuckHasBytesThatWait(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		room   int // for a pong of two bytes
		sealed bool
		want   closeReason
	}{{2, false, endNone}, {1, false, endWriteTimeout}, {2, true, endWriteTimeout}} {
		_, _, ph, ps, w := memPair(t, startRelay(t, timedOptions()).relay)
		ps.full, ps.room, ps.sealed = true, tt.room, tt.sealed
		ph.sendPong(w, nil)
		w.flush()
		w.now = ph.blockedSince + int64(ph.relay.o.writeTimeout)
		if ph.checkTimeouts(w); ph.endReason != tt.want {
			t.Errorf("it takes %d bytes of 2, in TLS: %v; ended with %q, want %q", tt.room, tt.sealed, ph.endReason, tt.want)
		}
	}
}

// flushAgain flushes a connection that has got nothing since.
func flushAgain(w *writeBatch, s *session) {
	s.mu.Lock()
	w.addLocked(&s.conn)
	s.mu.Unlock()
	w.flush()
}

// How long a connection that is closing may take for each step, and what its peer gets
// that has ended TCP.
func TestConnCloseSteps(t *testing.T) {
	t.Parallel()
	r := startRelay(t, timedOptions())
	o := &r.o
	for reason, wait := range map[closeReason]time.Duration{
		endShutdown: o.writeTimeout, endBinaryGone: o.writeTimeout, endHeartbeat: o.closeTimeout, endWriteTimeout: o.closeTimeout,
	} {
		b, bs, ph, ps, w := memPair(t, r.relay)
		patience := func(c *session, step string, want time.Duration) {
			t.Helper()
			if got := time.Duration(c.closeDeadline - w.now); got != want {
				t.Errorf("%v, %s: its time ends in %v, want %v", reason, step, got, want)
			}
		}
		ph.sendPong(w, nil)
		if ph.owes(w) || len(ps.frames(t)) != 1 {
			t.Errorf("a pong has not gone out before the end")
		}
		ps.full, ps.room = true, 1
		ph.startClose(w, reason)
		w.flush()
		patience(ph, "the close frame waits", wait)
		if ph.owes(w) {
			t.Error("a peer that has ended TCP without a close frame is waited for")
		}
		ps.room, w.now = 1, w.now+1
		ph.writable(w)
		patience(ph, "a byte of it is taken", o.writeTimeout)
		ps.full, w.now = false, w.now+1
		ph.writable(w)
		patience(ph, "it is out", o.closeTimeout)
		w.now++
		flushAgain(w, ph)
		patience(ph, "and nothing has happened", o.closeTimeout-1)
		if ps.finished {
			t.Error("our direction has ended before the answer")
		}
		ph.receive(w, clientFrame(last, opClose, nil))
		w.flush()
		patience(ph, "the answer is here", o.closeTimeout)
		if !ps.finished || ph.owes(w) {
			t.Errorf("our direction has ended: %v; more is owed: %v", ps.finished, ph.owes(w))
		}

		bs.full, bs.room = true, 0
		b.receive(w, clientFrame(last, opClose, nil))
		w.flush()
		if !b.owes(w) {
			t.Error("a close frame waits, and the reader need not")
		}
		if b.fail(); b.owes(w) {
			t.Error("more is owed to a peer that is given up")
		}
		b.free(w)
		ph.free(w)
	}
}

// What TLS itself has to send behind our close frame makes a peer's time to answer no longer.
func TestConnRoomBehindCloseFrame(t *testing.T) {
	t.Parallel()
	o := timedOptions()
	_, _, ph, ps, w := memPair(t, startRelay(t, o).relay)
	ph.startClose(w, endHeartbeat)
	w.flush()
	ps.sealed = true
	flushAgain(w, ph)
	ps.sealed = false
	w.now++
	ph.writable(w)
	if left := time.Duration(ph.closeDeadline - w.now); left != o.closeTimeout-1 {
		t.Errorf("its time ends in %v, want %v", left, o.closeTimeout-1)
	}
}

// Behind a close frame of ours the rest of a message counts no more than what breaks a rule does,
// and nothing of either is kept.
func TestConnKeepsNothingAfterEnd(t *testing.T) {
	t.Parallel()
	b, _, ph, _, w := memPair(t, startRelay(t, testOptions()).relay)
	ph.receive(w, clientFrame(more, opText, []byte(`"`)))
	ph.startClose(w, endShutdown)
	ph.receive(w, cat(clientFrame(last, opContinuation, []byte(`"`)), clientFrame(last, opText, []byte("1"))))
	if ph.closeHeard || ph.fragments != nil {
		t.Errorf("its answer is not waited for: %v; fragments: %v", ph.closeHeard, ph.fragments)
	}
	b.receive(w, cat([]byte{0xff}, make([]byte, 100)))
	if b.endReason != endReservedBit || b.unparsed != nil {
		t.Errorf("ended with %q, with bytes kept: %v", b.endReason, b.unparsed != nil)
	}
	w.flush()
}

// What is counted is counted once.
func TestConnCountsOnce(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, _, ph, _, w := memPair(t, r.relay)
	ph.receive(w, clientFrame(last, opText, []byte("12")))
	for range 3 {
		b.receive(w, clientFrame(last, opText, []byte(`{"conn_id":"phone-1","frame":345}`)))
		w.flush()
	}
	if ph.rxFrames != 1 || ph.rxBytes != 2 {
		t.Errorf("%d messages of %d bytes of the phone are counted, want 1 of 2", ph.rxFrames, ph.rxBytes)
	}
	m := r.metrics
	if got := [...]int64{m.framesUp.Load(), m.bytesUp.Load(), m.framesDown.Load(), m.bytesDown.Load()}; got != [...]int64{1, 2, 3, 9} {
		t.Errorf("frames and bytes up, and down: %v; want 1 of 2 in all, and 3 of 9", got)
	}
}

// The usual newcomer is the next process of the same daemon: that the one
// before says goodbye while it is being asked must not count as its being alive.
func TestRegistryIncumbentClosesWhenAsked(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	for _, end := range []struct {
		name string
		do   func(*wsClient)
	}{
		{"close frame", func(b *wsClient) { b.close(1001, "") }},
		{"half-close", func(b *wsClient) { b.tcp().CloseWrite() }},
		{"violation", func(b *wsClient) { b.raw([]byte{0xff, 0xff}) }},
	} {
		t.Run(end.name, func(t *testing.T) {
			id := "id" + end.name[:1]
			old := r.binary(id)
			incumbent := r.holder(id)
			next := make(chan *wsClient)
			go func() {
				c, _, err := r.dial("/v2/server", binaryHeaders(id))
				if err != nil {
					t.Error(err)
				}
				next <- c
			}()
			if op, _, err := old.next(); op != opPing || err != nil {
				t.Fatalf("incumbent got opcode %d, %v; want a ping", op, err)
			}
			end.do(old)
			b := <-next
			eventually(t, "the newcomer holds the claim", func() bool {
				now := r.holder(id)
				return now != nil && now != incumbent
			})
			r.phone(id).greet(b)
		})
	}
}

// Between losing its place and being closed a phone reaches nobody: by then
// another binary may hold the server-id.
func TestRelayMessageOfRemovedPhone(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, ph, connID := r.pair("id")
	sibling := r.phone("id")
	srv := r.holder("id").server
	srv.mu.Lock()
	leg := srv.phones[connID]
	r.registry.remove(srv, leg)
	srv.mu.Unlock()
	ph.text(`"stray"`)
	ph.frame(opPing, nil)
	if op, _, err := ph.next(); op != opPong || err != nil {
		t.Fatalf("got opcode %d, %v; want a pong", op, err)
	}
	sibling.greet(b) // and nothing before that
	batch := r.newBatch()
	leg.startClose(batch, endReplaced)
	batch.flush()
	ph.wantEnd(4404, "binary replaced")
}

// What phones that joined in grace have sent is given back when nobody comes.
func TestRegistryGraceExpiresOverHeldFrames(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	r.leaves(r.binary("id"))
	ph := r.phone("id")
	ph.text(`"held"`)
	ph.frame(opPing, nil)
	ph.wantPong(nil) // behind what is held by then
	batch := r.newBatch()
	r.registry.expire(batch, math.MaxInt64)
	batch.flush()
	ph.wantEnd(4404, "grace expired")
	r.settle("nobody is left", func() bool { return r.count(rolePhone)+r.count(roleBinary) == 0 })
}

// endsBehindClose is a connection that has its FIN right behind its close frame.
type endsBehindClose struct {
	net.Conn
	closed bool
}

func (c *endsBehindClose) Read(p []byte) (n int, err error) {
	if c.closed {
		return 0, io.EOF
	}
	n, err = c.Conn.Read(p)
	c.closed = n > 0 && p[0] == last|opClose
	return n, err
}

// While the process stands still a peer that has sent its FIN can't take what is behind:
// that is no time of its own.
func TestConnStallBehindFIN(t *testing.T) {
	t.Parallel()
	wrap := func(ln net.Listener) net.Listener {
		return wrappingListener{ln, func(nc net.Conn) net.Conn { return &endsBehindClose{Conn: nc} }}
	}
	o := testOptions()
	o.closeTimeout = time.Second
	onFakeClockWith(t, o, wrap, func(t *testing.T, r *testRelay) {
		b, ph, connID := r.pair("id")
		const frames = 20
		for i := range frames {
			b.send(connID, numbered(i, 32<<10))
		}
		b.frame(opPing, []byte("?")) // all are in front of the pong
		b.wantPong([]byte("?"))
		ph.frame(opClose, closePayload(4000, ""))
		b.wantNotice(connID, 4000)
		r.stopSweep() // it reads the clock
		r.stopSweep = func() {}
		time.Sleep(10 * o.closeTimeout)
		for i := range frames {
			if got := numberOf(ph.message()); got != i {
				t.Fatalf("frame %d, want %d", got, i)
			}
		}
		ph.wantEnd(4000, "")
	})
}

// A peer that ends its direction right behind its close frame still reads.
func TestConnCloseFrameThenFIN(t *testing.T) {
	t.Parallel()
	for name := range listeners {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := startRelayOn(t, testOptions(), stressListener(t, name))
			b := r.binary("id")
			for range 50 {
				ph := r.phone("id")
				connID := ph.greet(b)
				ph.raw(append(clientFrame(0x80, opPing, []byte("?")), clientFrame(0x80, opClose, closePayload(4000, ""))...))
				closeWrite(ph.nc)
				b.wantNotice(connID, 4000)
				if op, p, err := ph.next(); op != opPong || string(p) != "?" || err != nil {
					t.Fatalf("got opcode %d %q, %v; want the pong", op, p, err)
				}
				ph.wantEnd(4000, "")
			}
			// The answer is behind what no socket takes at once.
			ph := r.phone("id")
			connID := ph.greet(b)
			const n, size = 30, 100_000
			for i := range n {
				b.text(fmt.Sprintf(`{"conn_id":%q,"frame":%s}`, connID, numbered(i, size)))
			}
			r.settle("all is queued", func() bool { return r.metrics.bytesDown.Load() >= n*size })
			ph.raw(clientFrame(last, opClose, closePayload(4001, "")))
			closeWrite(ph.nc)
			b.wantNotice(connID, 4001)
			for i := range n {
				if got := numberOf(ph.message()); got != i {
					t.Fatalf("frame %d arrived, want %d", got, i)
				}
			}
			ph.wantEnd(4001, "")
		})
	}
}

// A connection on which nothing was said yet is not left hanging when the relay ends.
func TestRelayDrainDropsSilent(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	nc, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	r.phoneRefused("id") // accepted after it, so it has been accepted, too
	r.stop()
	nc.SetReadDeadline(time.Now().Add(patience))
	if _, err := nc.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !isReset(err) {
		t.Errorf("read: %v, want the end", err)
	}
}

// phoneRefused connects a phone to a server-id that nobody holds.
func (r *testRelay) phoneRefused(id string) {
	r.t.Helper()
	r.phone(id).wantEnd(4404, "server-id never seen")
}

// A connection whose end comes between its request and its session was no
// upgrade: what was accepted is what is closed, or the books do not agree.
func TestConnGoneBeforeItsSession(t *testing.T) {
	t.Parallel()
	needEpoll(t)
	r := startRelay(t, testOptions())
	for role := range roleCount {
		nc := new(net.TCPConn) // like one that is closed, it has no descriptor to take
		if r.enter(role) != nil {
			t.Fatal("no room")
		}
		from := caller{role: role, serverID: "gone"}
		r.begin(newSession(r.relay, from, "gone"), from, nc, nil, nil)
		counts := &r.metrics.upgrades[role]
		if failed, ok := counts[upgradeFailed].Load(), counts[upgradeAccepted].Load(); failed != 1 || ok != 0 {
			t.Errorf("%v: %d failed and %d accepted, want 1 and 0", role, failed, ok)
		}
		if n := r.count(role); n != 0 {
			t.Errorf("%v: %d are counted", role, n)
		}
	}
}
