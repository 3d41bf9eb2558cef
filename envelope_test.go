package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// hostile are messages that try to be more or less than one JSON value, or to
// be read differently by two readers. They seed every target of this file.
var hostile = []string{
	``, ` `, `null`, `true`, `false`, `fals`, `nul`, `nulL`, `trux`, `falsy`, `[true,false,null]`, `nullnull`,
	`0`, `-0`, `-`, `01`, `1.`, `.5`, `+1`, `1e`, `1e+`, `1e+5`, `1E-07`, `-0.0e-0`, `NaN`,
	`0x10`,
	`12345678901234567890.12345678901234567890`, `1e666`, `-1E-999999`,
	`""`, `"`, `"\"`, `"\\"`, `"\u12"`, `"\u123g"`, `"\ug123"`, `"\u00e9"`, `"\U0041"`, `"\x41"`, `'a'`, `"\b\f\r\t\/"`,
	`"\c"`, `"\g"`, `"\s"`, `"\u9aAf"`, `"\u0FFf"`, `"\u0a:0"`, `"\u0/a0"`, `"\u@000"`, "\"\\u`000\"", `"\uG000"`,
	`"\ud800"`, `"\udc00\ud800"`, `"\ud83d\ude00"`,
	"\"\xed\xa0\x80\"", "\"\xff\"", "\"\xc0\xaf\"", "\"\xf4\x90\x80\x80\"", "\"\xe2\x80", "\"\u2028\u2029\"", "\u2028\"a\"", "\u00a0\"a\"",
	"\uFEFF{}", "{}\uFEFF",
	"\"\x00\"", "\x00", "{}\x00", "\"\x1f\"", "\"\x7f\"", "\"a\nb\"", "\v{}", "\t\r\n {} \n", "[1,\f2]",
	`{}`, `[]`, `{`, `}`, `[`, `]`, `{]`, `[}`, `[[]`, `[]]`, `{"a":1]`, `[1}`, `[[1}]`, `[{"a":1]}`, `{}}`, `{}{}`, `{},{}`, `[1,]`,
	`[,1]`, `[1 2]`, `{"a"}`, `{"a":}`, `{"a":1,}`, `{a:1}`, `{1:1}`, `{"a":1 "b":2}`, `{"a"::1}`, `//x`, `{}/**/`,
	`1,"conn_id":"victim"`, `1}{"conn_id":"victim","frame":1`, `1},{"conn_id":"victim"`, `{"x":1},"close_code":4401`,
	`"x","close_code":4401`, `]`, `"},"conn_id":"victim"`, `"\"},\"conn_id\":\"victim"`,
	`{"conn_id":"victim","frame":1}`, `{"conn_id":"a","conn_id":"b","frame":1,"frame":2}`,
	`{"conn_id":"a","frame":null,"close_code":4401}`,
	`{"conn_id":"a","frame":1,"close_code":4401,"close_code":null}`, `{"conn_id":"a","conn_id":1,"frame":1}`,
	`{"conn_id":"a","conn_id":null,"frame":1}`, `{"CONN_ID":"x","conn_id":"a","Frame":0,"frame":{"frame":[1]}}`,
	`{"c\u006fnn_id":"a","frame":1}`, `{"conn_id":"\u0061","frame":1}`, `{"conn_id":"\ud800","frame":1}`,
	`{"conn_id":"a\u0000","frame":1}`, `{"conn_id\u0000":"a","frame":1}`, `{"":"a","frame":1}`,
	`{"conn_id":"a","close_code":4401.0}`, `{"conn_id":"a","close_code":4.401e3}`, `{"conn_id":"a","close_code":"4401"}`,
	`{"conn_id":"a","close_code":-1}`, `{"conn_id":"a","close_code":1005}`,
	`{"conn_id":"a","close_code":99999999999999999999}`, `{"conn_id":"a","close_code":true}`, `{"conn_id":"a","close_code":[4401]}`,
	`{"conn_id":"a","close_code":-0}`,
	`{"conn_id":"a","frame":1,"close_code":0}`, `{"conn_id":"a","close_code":0}`,
	`{"conn_id":"a","frame":1,"close_code":4401,"close_code":0}`, `{"conn_id":"a","frame":1,"close_code":0.0}`,
	`{"conn_id":"\u0061\n","frame":1}`, `{"conn_id":"\u00e9","frame":1}`, `{"\ufrme":1,"\u0063onn_id":"a","fram\u0065":1}`,
	`{"\\u0063onn_id":"a","frame":1}`,
	`{"push_wake":{"token":"t"}}`, `{"push_wake":null}`, `{"push_wake":{},"conn_id":"a","frame":1}`, `{"push_wake":{},"conn_id":7}`,
	`[{"conn_id":"a","frame":1}]`, `{"conn_id":"a"}`, `{"frame":1}`,
}

// deep is n levels of arrays and objects in turn, innermost a 0.
func deep(n int) string {
	var open, shut strings.Builder
	for i := range n {
		if i%3 == 0 {
			open.WriteString(`{"a":`)
		} else {
			open.WriteByte('[')
		}
	}
	for i := n - 1; i >= 0; i-- {
		if i%3 == 0 {
			shut.WriteByte('}')
		} else {
			shut.WriteByte(']')
		}
	}
	return open.String() + "0" + shut.String()
}

func seed(f *testing.F) {
	for _, s := range hostile {
		f.Add([]byte(s))
		f.Add([]byte(`{"conn_id":"a","frame":` + s + `}`))
	}
	for _, n := range []int{1, 63, 64, 65, 128, 129, 9_998, 9_999, 10_000, 10_001} {
		f.Add([]byte(deep(n)))
	}
	f.Add([]byte(strings.Repeat("[", 10_000)))
	for _, n := range []int{7, 8, 127, 128, 129, 300} { // where the scan of a string changes gear
		pad := strings.Repeat("x", n)
		f.Add([]byte(`"` + pad))
		for _, s := range []string{"", `\n`, `\`, "\n", `"`, "é"} {
			f.Add([]byte(`"` + pad + s + pad + `"`))
		}
	}
}

// levels is how deep a valid JSON text goes.
func levels(b []byte) (most int) {
	dec := json.NewDecoder(bytes.NewReader(b))
	for depth := 0; ; {
		token, err := dec.Token()
		if err != nil {
			return most
		}
		switch token {
		case json.Delim('{'), json.Delim('['):
			depth++
			most = max(most, depth)
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
	}
}

// FuzzValidJSON: what is accepted is what encoding/json accepts, in valid UTF-8,
// down to the depth asked for.
func FuzzValidJSON(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		b = slices.Clip(b) // what looks behind the end panics
		want := utf8.Valid(b) && json.Valid(b)
		if got := validJSON(b, maxEnvelopeDepth); got != want {
			t.Fatalf("%.300q: accepted %v, encoding/json says %v", b, got, want)
		}
		if !want {
			return
		}
		depth := levels(b)
		if !validJSON(b, depth) || depth > 0 && validJSON(b, depth-1) {
			t.Fatalf("%.300q has %d levels: accepted so %v, with one less %v", b, depth, validJSON(b, depth), validJSON(b, depth-1))
		}
		if got := validJSON(b, maxPhoneDepth); got != json.Valid(slices.Concat([]byte(`{"frame":`), b, []byte("}"))) {
			t.Fatalf("%d levels: accepted %v, and the envelope is not readable alike", depth, got)
		}
	})
}

// oracleEnvelope is parseEnvelope by means of encoding/json: its decoder gives
// the members one by one, so that the last of a name counts and case matters.
func oracleEnvelope(b []byte) (e envelope, drop dropReason) {
	if !utf8.Valid(b) || !json.Valid(b) || bytes.TrimLeft(b, " \t\r\n")[0] != '{' {
		return e, dropNotEnvelope
	}
	members := map[string]json.RawMessage{}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.Token()
	for dec.More() {
		name, _ := dec.Token()
		var v json.RawMessage
		dec.Decode(&v)
		members[name.(string)] = v
	}
	for name, v := range members {
		if string(v) == "null" {
			delete(members, name)
		}
	}
	var id *string
	if json.Unmarshal(members["conn_id"], &id) != nil {
		if members["push_wake"] != nil {
			return e, dropPushWake
		}
		return e, dropNoConnID
	}
	e.connID = []byte(*id)
	if v := members["close_code"]; v != nil {
		var code int
		if json.Unmarshal(v, &code) != nil || code != 0 && !closeCodeAllowed(code) {
			return e, dropBadCloseCode
		}
		e.closeCode = uint16(code)
	}
	e.frame = members["frame"]
	if e.frame == nil && e.closeCode == 0 {
		return e, dropNoFrame
	}
	return e, dropNone
}

// notInConnID reports whether a conn_id has no such character.
func notInConnID(c rune) bool {
	return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
}

func FuzzParseEnvelope(f *testing.F) {
	seed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		b = slices.Clip(b)
		before := bytes.Clone(b)
		got, drop := parseEnvelope(b)
		want, wantDrop := oracleEnvelope(b)
		if drop != wantDrop {
			t.Fatalf("%.300q: drop %d, encoding/json says %d", b, drop, wantDrop)
		}
		if got.connID == nil && (len(want.connID) > maxCompared || bytes.ContainsFunc(want.connID, notInConnID)) {
			want.connID = nil // it names no phone, so it need not be decoded
		}
		if !bytes.Equal(got.connID, want.connID) || !bytes.Equal(got.frame, want.frame) || (got.frame == nil) != (want.frame == nil) ||
			got.closeCode != want.closeCode {
			t.Fatalf("%.300q: %q %.300q %d, encoding/json says %q %.300q %d", b,
				got.connID, got.frame, got.closeCode, want.connID, want.frame, want.closeCode)
		}
		if !bytes.Equal(b, before) {
			t.Fatalf("%.300q became %.300q", before, b)
		}
	})
}

// FuzzInjection is the security boundary: whatever a phone sends, its binary
// reads one envelope with this phone's conn_id and exactly these bytes, or the
// notice that the phone was closed.
func FuzzInjection(f *testing.F) {
	for _, s := range hostile {
		f.Add([]byte(s), []byte("conn"))
	}
	for _, n := range []int{9_999, 10_000} {
		f.Add([]byte(deep(n)), []byte("_-"))
	}
	o := testOptions()
	o.maxFrame = 1 << 20
	r := startRelay(f, o)
	b, out := memBinary(f, r.relay, "server")
	f.Cleanup(func() { b.free(r.newBatch()) })
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_" // newConnID's
	f.Fuzz(func(t *testing.T, payload, id []byte) {
		if len(payload) > o.maxFrame {
			return
		}
		for i := range id {
			id[i] = alphabet[id[i]%64]
		}
		connID := string(id[:min(len(id), 64)])
		ph, _ := memPhone(t, r.relay, "server", connID)
		bt := r.newBatch()
		ph.receive(bt, clientFrame(0x80, opText, payload))
		bt.flush()
		frames := out.frames(t)
		ph.free(bt)
		bt.flush()
		frames = append(frames, out.frames(t)...)

		code := int(endPeerLost.code())
		if utf8.Valid(payload) && json.Valid(payload) && levels(payload) <= maxPhoneDepth {
			e := onlyEnvelope(t, frames[0])
			raw := `{"conn_id":"` + connID + `","frame":` + string(payload) + `}`
			if e["conn_id"] != `"`+connID+`"` || e["frame"] != strings.Trim(string(payload), " \t\r\n") || len(e) != 2 || frames[0].payload != raw {
				t.Fatalf("%.300q arrived as %.300q", payload, frames[0].payload)
			}
			frames = frames[1:]
		} else {
			code = 1007
		}
		if len(frames) != 1 {
			t.Fatalf("%.300q: the binary got %.300q, want one close notice", payload, frames)
		}
		e := onlyEnvelope(t, frames[0])
		if e["conn_id"] != `"`+connID+`"` || e["close_code"] != strconv.Itoa(code) || len(e) != 2 {
			t.Fatalf("%.300q: the binary got %.300q, want the notice of %s with %d", payload, frames, connID, code)
		}
	})
}

// onlyEnvelope reads an envelope's members, their values as they stand there.
// None may be there twice.
func onlyEnvelope(t *testing.T, f memFrame) map[string]string {
	t.Helper()
	if f.op != opText || !json.Valid([]byte(f.payload)) {
		t.Fatalf("opcode %d, %.300q is not an envelope", f.op, f.payload)
	}
	members := map[string]string{}
	dec := json.NewDecoder(strings.NewReader(f.payload))
	dec.Token()
	for dec.More() {
		name, _ := dec.Token()
		var v json.RawMessage
		dec.Decode(&v)
		if _, twice := members[name.(string)]; twice {
			t.Fatalf("%.300q has %s twice", f.payload, name)
		}
		members[name.(string)] = string(v)
	}
	return members
}

// The fuzzer rarely builds a long string with one wrong byte in it.
func TestEnvelopeLongStrings(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(5, 6))
	odd := []string{`"`, `\`, `\"`, `\\`, `\n`, `\u12fF`, `\u12g0`, "\x00",
		"\x1f", "\x20", "!", "#", "[", "]", "\x7f", "é", "\U0001F600", "\xff", "\xc3", "\xe2\x82"}
	for range 30_000 {
		var b []byte
		b = append(b, '"')
		for range random.IntN(4) {
			b = append(b, strings.Repeat("A", random.IntN(1+400>>random.IntN(8)))...)
			b = append(b, odd[random.IntN(len(odd))]...)
		}
		b = append(b, '"')
		want := utf8.Valid(b) && json.Valid(b)
		if got := validJSON(b, 1); got != want {
			t.Fatalf("%q: accepted %v, encoding/json says %v", b, got, want)
		}
	}
}

// escaped writes each byte of s as an escape.
func escaped(s string) string {
	var b strings.Builder
	for i := range len(s) {
		fmt.Fprintf(&b, `\u%04x`, s[i])
	}
	return b.String()
}

func TestEnvelopeParse(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ name, message, want string }{
		{"frame", `{"conn_id":"a","frame":{"x":[1, 2]}}`, `a {"x":[1, 2]}`},
		{"space around", " {\n\"frame\" : 1.0 ,\t\"conn_id\" : \"a\" }\r\n", `a 1.0`},
		{"unknown members", `{"token":"t","conn_id":"a","frame":0,"more":{"conn_id":"b"}}`, `a 0`},
		{"other case", `{"Conn_ID":"b","conn_id":"a","FRAME":1,"frame":0}`, `a 0`},
		{"duplicates", `{"conn_id":"b","frame":1,"conn_id":"a","frame":0}`, `a 0`},
		{"conn_id of the wrong type, then a good one", `{"conn_id":7,"conn_id":"a","frame":0,"v":[1,{"conn_id":"b"}]}`, `a 0`},
		{"frame taken back", `{"conn_id":"a","frame":1,"frame":null}`, dropNoFrame.String()},
		{"close_code 0, which is none", `{"conn_id":"a","frame":0,"close_code":0}`, `a 0`},
		{"close_code 0 and nothing else", `{"conn_id":"a","close_code":0}`, dropNoFrame.String()},
		{"close_code taken back", `{"conn_id":"a","frame":0,"close_code":4401,"close_code":0}`, `a 0`},
		{"close only", `{"conn_id":"a","frame":null,"close_code":4401}`, `a 4401`},
		{"close without frame", `{"conn_id":"a","close_code":4426}`, `a 4426`},
		{"frame, then close", `{"conn_id":"a","frame":"x","close_code":4408}`, `a "x" 4408`},
		{"escaped name and id", `{"conn\u005fid":"\u0061","frame":0}`, `a 0`},
		{"names and an id in nothing but escapes", `{"` + escaped("conn_id") + `":"` + escaped(strings.Repeat("a", maxCompared)) + `","` +
			escaped("close_code") + `":4401,"` + escaped("frame") + `":0}`, strings.Repeat("a", maxCompared) + ` 0 4401`},
		{"names with more behind", `{"conn_id\u0020":"b","frame\n":1,"conn_id":"a","frame":0}`, `a 0`},
		{"fraction", `{"conn_id":"a","frame":0,"close_code":4401.0}`, dropBadCloseCode.String()},
		{"code that must not be sent", `{"conn_id":"a","frame":0,"close_code":1006}`, dropBadCloseCode.String()},
		{"code as text", `{"conn_id":"a","close_code":"4401"}`, dropBadCloseCode.String()},
		{"conn_id of the wrong type", `{"conn_id":["a"],"frame":0}`, dropNoConnID.String()},
		{"no conn_id", `{"frame":0}`, dropNoConnID.String()},
		{"nothing to do", `{"conn_id":"a"}`, dropNoFrame.String()},
		{"push wake", `{"push_wake":{"credential":"secret"}}`, dropPushWake.String()},
		{"push wake with conn_id", `{"push_wake":{},"conn_id":"a","frame":0}`, `a 0`},
		{"array", `[{"conn_id":"a","frame":0}]`, dropNotEnvelope.String()},
		{"two values", `{"conn_id":"a","frame":0}{}`, dropNotEnvelope.String()},
	} {
		e, drop := parseEnvelope([]byte(c.message))
		got := string(e.connID)
		if e.frame != nil {
			got += " " + string(e.frame)
		}
		if e.closeCode != 0 {
			got += fmt.Sprint(" ", e.closeCode)
		}
		if drop != dropNone {
			got = drop.String()
		}
		if got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
}
