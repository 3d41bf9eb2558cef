package main

import (
	"encoding/binary"
	"unicode/utf8"
)

// The frame codec: RFC 6455 §5.2, strict, for the server's side. A frame of a
// peer is parsed and unmasked where it was read; one of ours is its header,
// then the payload as it is, since a server does not mask (§5.1).

const (
	opContinuation = 0x0
	opText         = 0x1
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xA

	maxControl     = 125 // bytes of a control frame's payload (§5.5)
	maxCloseReason = maxControl - 2
	maxFrameHeader = 14 // of a peer: 2, 8 of length, 4 of mask
	maxSendHeader  = 10 // of ours: no mask
)

// frameHeader is what stands before a peer's payload.
type frameHeader struct {
	op     byte
	fin    bool
	size   int   // bytes of the header itself
	length int64 // bytes of payload announced
	key    uint32
}

func (h frameHeader) control() bool { return h.op >= opClose }

// total is the size of the whole frame. It means nothing before the length has been
// held against a limit.
func (h frameHeader) total() int { return h.size + int(h.length) }

// parseFrameHeader reads a header from the front of b. size is 0 while b is
// too short. A header that breaks a rule is told as soon as the bytes that
// break it are there, so that nobody waits for the rest of it.
func parseFrameHeader(b []byte) (h frameHeader, violation closeReason) {
	if len(b) < 2 {
		return h, endNone
	}
	h.op, h.fin = b[0]&0x0f, b[0]&0x80 != 0
	short := int64(b[1] & 0x7f)
	switch {
	case b[0]&0x70 != 0:
		return h, endReservedBit
	case h.op > opBinary && h.op < opClose || h.op > opPong:
		return h, endUnknownOpcode
	case b[1]&0x80 == 0:
		return h, endUnmasked
	case h.control() && (!h.fin || short > maxControl):
		return h, endBadControl
	}
	size := 2
	h.length = short
	switch short {
	case 126:
		if len(b) < 4 {
			return h, endNone
		}
		size, h.length = 4, int64(binary.BigEndian.Uint16(b[2:]))
		if h.length < 126 {
			return h, endBadLength
		}
	case 127:
		if len(b) < 10 {
			return h, endNone
		}
		size, h.length = 10, int64(binary.BigEndian.Uint64(b[2:]))
		if h.length < 1<<16 { // negative: the top bit was set
			return h, endBadLength
		}
	}
	if len(b) < size+4 {
		return h, endNone
	}
	h.key = binary.LittleEndian.Uint32(b[size:])
	h.size = size + 4
	return h, endNone
}

// unmask undoes the mask of a whole payload in place (§5.3), by words: bytes
// one by one were 28 times as slow at 16 KiB.
func unmask(p []byte, key uint32) {
	k := uint64(key)<<32 | uint64(key)
	for len(p) >= 32 {
		q := p[:32:32]
		binary.LittleEndian.PutUint64(q, binary.LittleEndian.Uint64(q)^k)
		binary.LittleEndian.PutUint64(q[8:], binary.LittleEndian.Uint64(q[8:])^k)
		binary.LittleEndian.PutUint64(q[16:], binary.LittleEndian.Uint64(q[16:])^k)
		binary.LittleEndian.PutUint64(q[24:], binary.LittleEndian.Uint64(q[24:])^k)
		p = p[32:]
	}
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, binary.LittleEndian.Uint64(p)^k)
		p = p[8:]
	}
	for i := range p {
		p[i] ^= byte(key >> (8 * (i & 3)))
	}
}

// appendFrameHeader appends the header of an unfragmented frame of ours with n
// bytes of payload.
func appendFrameHeader(dst []byte, op byte, n int) []byte {
	dst = append(dst, 0x80|op)
	switch {
	case n < 126:
		return append(dst, byte(n))
	case n < 1<<16:
		return append(dst, 126, byte(n>>8), byte(n))
	}
	return binary.BigEndian.AppendUint64(append(dst, 127), uint64(n))
}

// appendCloseFrame appends a close frame of ours. Code 0 stands for a close
// without code; a reason over 123 bytes is cut at a character (§5.5.1).
func appendCloseFrame(dst []byte, code uint16, reason string) []byte {
	if code == 0 {
		return appendFrameHeader(dst, opClose, 0)
	}
	if len(reason) > maxCloseReason {
		n := maxCloseReason
		for !utf8.RuneStart(reason[n]) {
			n--
		}
		reason = reason[:n]
	}
	dst = appendFrameHeader(dst, opClose, 2+len(reason))
	return append(binary.BigEndian.AppendUint16(dst, code), reason...)
}

// noCloseCode is what a close frame without a code counts as (§7.1.5).
const noCloseCode = 1005

// closeCodeAllowed reports whether a close code may be on the wire (§7.4).
func closeCodeAllowed(code int) bool {
	return code >= 1000 && code <= 1003 || code >= 1007 && code <= 1014 || code >= 3000 && code <= 4999
}

// parseClose reads the payload of a peer's close frame (§5.5.1).
func parseClose(p []byte) (code uint16, violation closeReason) {
	if len(p) == 0 {
		return noCloseCode, endNone
	}
	if len(p) < 2 {
		return 0, endBadClose
	}
	code = binary.BigEndian.Uint16(p)
	if !closeCodeAllowed(int(code)) {
		return 0, endBadClose
	}
	if !utf8.Valid(p[2:]) {
		return 0, endInvalidUTF8
	}
	return code, endNone
}
