package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

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
		"\x81\xfe\x00\x7d1234",                         // 125 in the long form
		"\x81\xff\x00\x00\x00\x00\x00\x00\xff\xff1234", // 65,535 in the longest
		"\x81\xff\x80\x00\x00\x00\x00\x00\x00\x001234", // the top bit
		"\x81\xff\x00\x00\x01\x00\x00\x00\x00\x001234", // 2^40
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, violation := parseFrameHeader(b)
		want, wantFault, complete := naiveHeader(b)
		if violation != wantFault {
			t.Fatalf("% x: fault %q, want %q", b, violation, wantFault)
		}
		if violation != endNone {
			return
		}
		if (got.size > 0) != complete {
			t.Fatalf("% x: size %d, complete %v", b, got.size, complete)
		}
		if complete && got != want {
			t.Fatalf("% x: %+v, want %+v", b, got, want)
		}
	})
}

// A header is refused as soon as the byte that breaks a rule is there.
func TestFrameHeaderFaultsEarly(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		bytes string
		fault closeReason
	}{
		{"\x81\x00", endUnmasked},
		{"\x81\x7f", endUnmasked},
		{"\xa1\x80", endReservedBit},
		{"\x87\x80", endUnknownOpcode},
		{"\x8b\x80", endUnknownOpcode},
		{"\x0a\x80", endBadControl},
		{"\x88\xfe", endBadControl},
		{"\x89\xff", endBadControl},
		{"\x82\xfe\x00\x00", endBadLength},
		{"\x82\xff\x00\x00\x00\x00\x00\x00\x00\x01", endBadLength},
		{"\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff", endBadLength},
	} {
		for n := range c.bytes {
			if _, violation := parseFrameHeader([]byte(c.bytes[:n])); violation != endNone {
				t.Errorf("% x: fault %q after %d bytes", c.bytes, violation, n)
			}
		}
		if _, violation := parseFrameHeader([]byte(c.bytes)); violation != c.fault {
			t.Errorf("% x: fault %q, want %q", c.bytes, violation, c.fault)
		}
	}
}

// unmaskNaive is §5.3 as it is written.
func unmaskNaive(p []byte, key [4]byte) {
	for i := range p {
		p[i] ^= key[i%4]
	}
}

func TestUnmask(t *testing.T) {
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

func TestAppendFrameHeader(t *testing.T) {
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
	for _, code := range []uint16{0, 999, 1000, 1004, 1005, 1006, 1011, 1015, 2999, 3000, 4409, 4999, 5000, 65535} {
		f.Add(closePayload(code, ""))
		f.Add(closePayload(code, "the reason"))
	}
	f.Add([]byte{})
	f.Add([]byte{3})
	f.Add(closePayload(1000, "\xff"))
	f.Add(closePayload(1000, strings.Repeat("é", 62)))
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

func TestAppendCloseFrameWithoutCode(t *testing.T) {
	t.Parallel()
	if got := appendCloseFrame(nil, 0, "not sent"); string(got) != "\x88\x00" {
		t.Errorf("% x, want 88 00", got)
	}
}
