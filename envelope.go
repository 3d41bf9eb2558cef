package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"math/bits"
	"strconv"
	"unicode/utf8"
)

// The only JSON that the relay knows. A phone's message is checked and spliced
// into an envelope; a binary's envelope is checked and taken apart. Nothing is
// decoded, copied or encoded again.
//
// Accepted is exactly what encoding/json accepts, in valid UTF-8, which
// encoding/json does not ask for: the fuzz tests hold the two against each other.

const (
	// maxEnvelopeDepth is how deep encoding/json follows.
	maxEnvelopeDepth = 10_000
	// maxPhoneDepth leaves the level that the envelope adds: a daemon in Go
	// could not read what is deeper, and would lose the whole envelope.
	maxPhoneDepth = maxEnvelopeDepth - 1
)

// validJSON reports whether b is exactly one JSON value in valid UTF-8, at most
// maxDepth levels deep.
func validJSON(b []byte, maxDepth int) bool {
	if !utf8.Valid(b) {
		return false
	}
	s := scanner{b: b, depth: maxDepth}
	end := s.value(0)
	return end >= 0 && s.space(end) == len(b)
}

// appendEnvelopeHead appends what stands before a phone's message in its
// envelope. A conn_id is the relay's own and needs no escapes.
func appendEnvelopeHead(dst []byte, connID string) []byte {
	dst = append(dst, `{"conn_id":"`...)
	dst = append(dst, connID...)
	return append(dst, `","frame":`...)
}

// envelopeTail is what stands behind it.
var envelopeTail = []byte("}")

// appendCloseNotice appends the envelope that tells of a phone's end.
func appendCloseNotice(dst []byte, connID string, code uint16) []byte {
	dst = append(dst, `{"conn_id":"`...)
	dst = append(dst, connID...)
	dst = append(dst, `","close_code":`...)
	return append(strconv.AppendUint(dst, uint64(code), 10), '}')
}

// envelope is what a binary asks for. Its slices are parts of the message.
type envelope struct {
	connID    []byte
	frame     []byte // nil: absent or null
	closeCode uint16 // 0: absent
}

// parseEnvelope checks a message of a binary and finds its members, in one
// pass. Of duplicate members the last counts; names are compared exactly, after
// their escapes; null counts as absent, and so does the close_code 0 of a binary
// that writes every member always. drop is dropNone, or the first of these that
// holds: not an envelope, push wake, conn_id missing, close_code invalid, frame
// missing.
func parseEnvelope(b []byte) (e envelope, drop dropReason) {
	if !utf8.Valid(b) {
		return e, dropNotEnvelope
	}
	var m members
	s := scanner{b: b, depth: maxEnvelopeDepth - 1}
	if end := s.members(&m); end < 0 || s.space(end) != len(b) {
		return e, dropNotEnvelope
	}
	id, ok := m.connID.text()
	switch {
	case !ok && m.pushWake.present():
		return e, dropPushWake
	case !ok:
		return e, dropNoConnID
	}
	e.connID = id
	if m.closeCode.present() {
		code, err := strconv.Atoi(string(m.closeCode.raw))
		if err != nil || code != 0 && !closeCodeAllowed(code) {
			return e, dropBadCloseCode
		}
		e.closeCode = uint16(code)
	}
	if m.frame.present() {
		e.frame = m.frame.raw
	} else if e.closeCode == 0 {
		return e, dropNoFrame
	}
	return e, dropNone
}

// members are the values that count of an envelope.
type members struct {
	connID, frame, closeCode, pushWake member
}

// member is a checked value as it stands in the message, empty if it is absent.
type member struct {
	raw     []byte
	escapes bool
}

func (m member) present() bool { return len(m.raw) > 0 && m.raw[0] != 'n' } // of literals only null begins so

// text is the content of a string.
func (m member) text() ([]byte, bool) {
	if len(m.raw) == 0 || m.raw[0] != '"' {
		return nil, false
	}
	s := m.raw[1 : len(m.raw)-1]
	if m.escapes {
		s = unescape(make([]byte, 0, maxCompared), s)
	}
	return s, true
}

// maxCompared is the longest string that means something here: a conn_id.
const maxCompared = 64

// unescape decodes a checked string into room. What the relay compares is short
// and consists of letters, digits, "-" and "_": where a string turns out to be
// something else it is not read on, and nil, which equals none of them.
func unescape(room, s []byte) []byte {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '\\' {
			var u [2]byte
			if s[i+1] != 'u' {
				return nil
			}
			hex.Decode(u[:], s[i+2:i+6]) // checked
			if u[0] != 0 || u[1] >= utf8.RuneSelf {
				return nil
			}
			c = u[1]
			i += 5
		}
		if len(room) == cap(room) {
			return nil
		}
		room = append(room, c)
	}
	return room
}

// scanner walks JSON text (RFC 8259). Its methods take the index at which to
// begin and return the one behind what they read, -1 where that is not JSON.
type scanner struct {
	b       []byte
	depth   int  // levels that a value may have
	escapes bool // the last string had some
	quote   int  // where the last name ended
}

func (s *scanner) space(i int) int {
	for i < len(s.b) && (s.b[i] == ' ' || s.b[i] == '\n' || s.b[i] == '\r' || s.b[i] == '\t') {
		i++
	}
	return i
}

// at is the byte at i, 0 behind the end: no token is or begins with a NUL.
func (s *scanner) at(i int) byte {
	if i < len(s.b) {
		return s.b[i]
	}
	return 0
}

// members reads an object and notes those of its members that count.
func (s *scanner) members(m *members) int {
	var room [maxCompared]byte
	i := s.space(0)
	if s.at(i) != '{' {
		return -1
	}
	if i = s.space(i + 1); s.at(i) == '}' {
		return i + 1
	}
	for {
		start := i + 1
		if i = s.name(i); i < 0 {
			return -1
		}
		name := s.b[start:s.quote]
		if s.escapes {
			name = unescape(room[:0], name)
		}
		i = s.space(i)
		end := s.value(i)
		if end < 0 {
			return -1
		}
		switch v := (member{s.b[i:end], s.escapes}); string(name) {
		case "conn_id":
			m.connID = v
		case "frame":
			m.frame = v
		case "close_code":
			m.closeCode = v
		case "push_wake":
			m.pushWake = v
		}
		switch i = s.space(end); s.at(i) {
		case ',':
			i = s.space(i + 1)
		case '}':
			return i + 1
		default:
			return -1
		}
	}
}

// value reads one value with all that is in it. It does not recurse: what is
// open is one bit a level, the first 64 of them at hand.
func (s *scanner) value(i int) int {
	var kinds uint64   // of the 64 innermost levels, 1 for an object
	var outer []uint64 // of those around them
	depth := 0
	for {
		i = s.space(i)
		switch c := s.at(i); c {
		case '{', '[':
			if depth == s.depth {
				return -1
			}
			if depth > 0 && depth%64 == 0 {
				outer = append(outer, kinds)
			}
			depth++
			kinds <<= 1
			i = s.space(i + 1)
			if c == '{' {
				kinds |= 1
				if s.at(i) != '}' {
					if i = s.name(i); i < 0 {
						return -1
					}
					continue
				}
			} else if s.at(i) != ']' {
				continue
			}
			// It is empty; the loop below closes it.
		case '"':
			if i = s.str(i); i < 0 {
				return -1
			}
		case 't':
			i = s.literal(i, "true")
		case 'f':
			i = s.literal(i, "false")
		case 'n':
			i = s.literal(i, "null")
		default:
			i = s.number(i)
		}
		if i < 0 {
			return -1
		}
		more := false
		for depth > 0 && !more {
			i = s.space(i)
			object := kinds&1 == 1
			switch c := s.at(i); {
			case c == ',':
				i++
				if object {
					if i = s.name(s.space(i)); i < 0 {
						return -1
					}
				}
				more = true
			case c == '}' && object, c == ']' && !object:
				i++
				depth--
				kinds >>= 1
				if depth > 0 && depth%64 == 0 {
					kinds, outer = outer[len(outer)-1], outer[:len(outer)-1]
				}
			default:
				return -1
			}
		}
		if !more {
			return i
		}
	}
}

// name reads a member's name and the colon.
func (s *scanner) name(i int) int {
	if i = s.str(i); i < 0 {
		return -1
	}
	s.quote = i - 1
	if i = s.space(i); s.at(i) != ':' {
		return -1
	}
	return i + 1
}

func (s *scanner) literal(i int, word string) int {
	if len(s.b)-i < len(word) || string(s.b[i:i+len(word)]) != word {
		return -1
	}
	return i + len(word)
}

func (s *scanner) number(i int) int {
	if s.at(i) == '-' {
		i++
	}
	if s.at(i) == '0' {
		i++
	} else if i = s.digits(i); i < 0 {
		return -1
	}
	if s.at(i) == '.' {
		if i = s.digits(i + 1); i < 0 {
			return -1
		}
	}
	if c := s.at(i); c == 'e' || c == 'E' {
		i++
		if c := s.at(i); c == '+' || c == '-' {
			i++
		}
		i = s.digits(i)
	}
	return i
}

// digits reads one digit or more.
func (s *scanner) digits(i int) int {
	start := i
	for c := s.at(i); c >= '0' && c <= '9'; c = s.at(i) {
		i++
	}
	if i == start {
		return -1
	}
	return i
}

// longString is how much of a string is looked at word by word before the
// vectorised searches of package bytes, which cost a call each, take over.
const longString = 128

// str reads a string, quotes included. Text is most of what passes here (base64
// of up to 87 KB in one string), so its speed is the relay's.
func (s *scanner) str(i int) int {
	if s.at(i) != '"' {
		return -1
	}
	s.escapes = false
	i++
	quote := 0 // index of the first quote not before i, once it was searched for
	for {
		words := min(len(s.b), i+longString)
		i = special(s.b, i, words)
		if i >= words && i < len(s.b) {
			if quote < i {
				n := bytes.IndexByte(s.b[i:], '"')
				if n < 0 {
					return -1
				}
				quote = i + n
			}
			end := quote
			if n := bytes.IndexByte(s.b[i:quote], '\\'); n >= 0 {
				end = i + n
			}
			if hasControl(s.b[i:end]) {
				return -1
			}
			i = end
		}
		switch s.at(i) {
		case '"':
			return i + 1
		case '\\':
			s.escapes = true
			if i = s.escape(i + 1); i < 0 {
				return -1
			}
		default: // a control character, or the end of the message
			return -1
		}
	}
}

// escape reads what follows a backslash.
func (s *scanner) escape(i int) int {
	switch s.at(i) {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		return i + 1
	case 'u':
		for k := 1; k <= 4; k++ {
			c := s.at(i + k)
			if !(c >= '0' && c <= '9' || c|0x20 >= 'a' && c|0x20 <= 'f') {
				return -1
			}
		}
		return i + 5
	}
	return -1
}

// Eight bytes at a time: below sets the high bit of each byte that is under
// 0x20, zero that of each byte that is 0. Above the first such byte of a word
// either may err; the first is exact.
const (
	ones  = 0x0101010101010101
	highs = 0x8080808080808080
)

func below(x uint64) uint64 { return (x - 0x20*ones) &^ x }
func zero(x uint64) uint64  { return (x - ones) &^ x }

// special finds the first quote, backslash or control character in b[i:end],
// end if there is none.
func special(b []byte, i, end int) int {
	for ; i+8 <= end; i += 8 {
		x := binary.LittleEndian.Uint64(b[i:])
		if m := (below(x) | zero(x^'"'*ones) | zero(x^'\\'*ones)) & highs; m != 0 {
			return i + bits.TrailingZeros64(m)/8
		}
	}
	for ; i < end; i++ {
		if c := b[i]; c < 0x20 || c == '"' || c == '\\' {
			break
		}
	}
	return i
}

// hasControl reports whether a byte of b is under 0x20.
func hasControl(b []byte) bool {
	for len(b) >= 32 {
		q := b[:32:32]
		x0, x1 := binary.LittleEndian.Uint64(q), binary.LittleEndian.Uint64(q[8:])
		x2, x3 := binary.LittleEndian.Uint64(q[16:]), binary.LittleEndian.Uint64(q[24:])
		if (below(x0)|below(x1)|below(x2)|below(x3))&highs != 0 {
			return true
		}
		b = b[32:]
	}
	for _, c := range b {
		if c < 0x20 {
			return true
		}
	}
	return false
}
