package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
)

// The rules of RFC 6455, as both legs keep them.

// cat joins frames that go out in one write.
func cat(parts ...[]byte) []byte { return slices.Concat(parts...) }

// header64 is a masked header with a length of eight bytes.
func header64(b0 byte, n uint64) []byte {
	return append(binary.BigEndian.AppendUint64([]byte{b0, 0x80 | 127}, n), 1, 2, 3, 4)
}

func TestFrameRulesAreEnforced(t *testing.T) {
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
		tests = append(tests, violation{fmt.Sprintf("close code %d", code), clientFrame(last, opClose, closePayload(code, "")), 1002, "bad close frame"})
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

// TestProxyClosed: an unmasked close frame is a proxy's own, where one is trusted;
// nothing else that is unmasked is.
func TestProxyClosed(t *testing.T) {
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

func TestMessagesAreAssembled(t *testing.T) {
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

func TestPingsAreAnswered(t *testing.T) {
	t.Parallel()
	onLegs(t, testOptions(), func(t *testing.T, r *testRelay, role role) {
		ln := r.lane(role)
		for n := range maxControl + 1 {
			payload := bytes.Repeat([]byte{byte(n)}, n)
			ln.from.frame(opPing, payload)
			ln.from.wantPong(payload)
		}
		// Pongs that nobody asked for change nothing.
		ln.from.frame(opPong, nil)
		ln.from.frame(opPong, bytes.Repeat([]byte{1}, maxControl))
		ln.from.frame(opText, ln.message("1"))
		ln.wants("1")
	})
}

func TestLargestMessage(t *testing.T) {
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

func TestAnnouncedBytesAreNotAllocated(t *testing.T) {
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

func TestDribbledBytes(t *testing.T) {
	t.Parallel()
	o := testOptions()
	stream := func(ln lane) []byte {
		m := ln.message(`"` + strings.Repeat("ä", 200) + `"`)
		return cat(clientFrame(last, opText, m), clientFrame(last, opPing, []byte("p")),
			clientFrame(more, opText, m[:150]), clientFrame(last, opPing, []byte("q")), clientFrame(more, opContinuation, nil),
			clientFrame(last, opContinuation, m[150:]))
	}
	scenario := func(t *testing.T, r *testRelay, role role) {
		ln := r.lane(role)
		for _, x := range stream(ln) {
			ln.from.raw([]byte{x})
		}
		for range 2 {
			ln.wants(`"` + strings.Repeat("ä", 200) + `"`)
		}
		ln.from.wantPong([]byte("p"))
		ln.from.wantPong([]byte("q"))
	}
	onLegs(t, o, scenario)
	for _, role := range []role{rolePhone, roleBinary} {
		// Over a pipe no two bytes arrive in one read.
		t.Run(role.String()+"/pipe", func(t *testing.T) {
			t.Parallel()
			onFakeClock(t, o, func(t *testing.T, r *testRelay) {
				scenario(t, r, role)
				ln := r.lane(role)
				payload := `"` + strings.Repeat("b", 70000) + `"`
				raw := clientFrame(last, opText, ln.message(payload))
				for _, x := range raw[:400] {
					ln.from.raw([]byte{x})
				}
				ln.from.raw(raw[400 : len(raw)-400])
				for _, x := range raw[len(raw)-400:] {
					ln.from.raw([]byte{x})
				}
				ln.wants(payload)
			})
		})
	}
}

func TestPeersCloseIsAnswered(t *testing.T) {
	t.Parallel()
	onLegs(t, testOptions(), func(t *testing.T, r *testRelay, role role) {
		for _, payload := range [][]byte{
			nil,
			closePayload(1000, ""),
			closePayload(1001, "going away"),
			closePayload(1003, ""), closePayload(1007, ""), closePayload(1011, ""), closePayload(1014, ""), closePayload(3000, ""), closePayload(4999, ""),
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
func TestFramesBeforeAHalfClose(t *testing.T) {
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
			ln.from.nc.(*net.TCPConn).CloseWrite()
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
