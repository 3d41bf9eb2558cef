package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// peer is a connection of a library, as a phone or a binary, in a test.
type peer struct {
	t      testing.TB
	what   string
	wire   wire
	events chan event
}

func phoneHeaders(serverID string) http.Header {
	return http.Header{"X-Pyrycode-Server": {serverID}, "User-Agent": {"e2e-phone"}}
}

func binaryHeaders(serverID string) http.Header {
	return http.Header{"X-Pyrycode-Server": {serverID}, "User-Agent": {"e2e-binary"}, "X-Pyrycode-Version": {"1"}}
}

// urlOf is a path at a host and port, or behind TLS at a "tls:" host and port.
func urlOf(scheme, addr, path string) string {
	if host, ok := strings.CutPrefix(addr, "tls:"); ok {
		return scheme + "s://" + host + path
	}
	return scheme + "://" + addr + path
}

// phone joins serverID at an address of urlOf.
func (l library) phone(t testing.TB, addr, serverID string) *peer {
	t.Helper()
	return l.connect(t, "phone", urlOf("ws", addr, "/v2/client"), phoneHeaders(serverID))
}

// binary claims serverID at an address of urlOf.
func (l library) binary(t testing.TB, addr, serverID string) *peer {
	t.Helper()
	return l.connect(t, "binary", urlOf("ws", addr, "/v2/server"), binaryHeaders(serverID))
}

func (l library) connect(t testing.TB, role, url string, header http.Header) *peer {
	t.Helper()
	p := &peer{t: t, what: l.name + " as " + role, events: make(chan event, 256)}
	var err error
	if p.wire, err = l.dial(url, header, func(e event) { p.events <- e }); err != nil {
		t.Fatalf("%s: dialing %s: %v", p.what, url, err)
	}
	t.Cleanup(p.wire.drop)
	return p
}

func (p *peer) send(parts ...string) {
	p.t.Helper()
	b := make([][]byte, len(parts))
	for i, s := range parts {
		b[i] = []byte(s)
	}
	if err := p.wire.send(b...); err != nil {
		p.t.Fatalf("%s: sending: %v", p.what, err)
	}
}

// sendTooMuch sends what is refused by its header: the end may come before all of
// it is sent.
func (p *peer) sendTooMuch(text string) { p.wire.send([]byte(text)) }

func (p *peer) next() event {
	p.t.Helper()
	select {
	case e := <-p.events:
		return e
	case <-time.After(patience):
		p.t.Fatalf("%s: nothing within %v", p.what, patience)
		return event{}
	}
}

func (p *peer) want(text string) {
	p.t.Helper()
	if e := p.next(); e.ended || e.text != text {
		p.t.Fatalf("%s: got %s, want the message %.80q of %d bytes", p.what, e, text, len(text))
	}
}

// wantEnd wants no message before the end.
func (p *peer) wantEnd(code int, reason string) {
	p.t.Helper()
	if e := p.next(); !e.ended || e.code != code || !strings.HasPrefix(e.reason, reason) {
		p.t.Fatalf("%s: got %s, want the end with %d %q", p.what, e, code, reason)
	}
}

// close takes leave, and wants its code back.
func (p *peer) close(code int, reason string) {
	p.t.Helper()
	if err := p.wire.close(code, reason); err != nil {
		p.t.Fatalf("%s: closing: %v", p.what, err)
	}
	p.wantEnd(code, "")
}

// wantFrame takes an envelope with this frame, byte for byte, and returns whose
// it is.
func (p *peer) wantFrame(frame string) (connID string) {
	p.t.Helper()
	e := p.next()
	rest, ok := strings.CutPrefix(e.text, `{"conn_id":"`)
	connID, rest, _ = strings.Cut(rest, `"`)
	if want := `,"frame":` + frame + "}"; !ok || e.ended || rest != want {
		p.t.Fatalf("%s: got %s, want an envelope with the frame %.80q of %d bytes", p.what, e, frame, len(frame))
	}
	return connID
}

// wantNotice takes a close notice.
func (p *peer) wantNotice(connID string, code int) {
	p.t.Helper()
	if e := p.next(); e.ended || e.text != fmt.Sprintf(`{"conn_id":%q,"close_code":%d}`, connID, code) {
		p.t.Fatalf("%s: got %s, want the notice of %s with %d", p.what, e, connID, code)
	}
}

// reply is an envelope to a phone.
func reply(connID, frame string) string {
	return `{"conn_id":"` + connID + `","frame":` + frame + `}`
}

func (e event) String() string {
	if e.ended {
		return fmt.Sprintf("the end with %d %q", e.code, e.reason)
	}
	return fmt.Sprintf("the message %.80q of %d bytes", e.text, len(e.text))
}

// quoted is a JSON string.
func quoted(s string) string {
	b, _ := json.Marshal(s) // of a string: does not fail
	return string(b)
}

// pair joins a phone to a binary, and returns the phone's conn_id as well.
func pair(t testing.TB, phones, binaries library, addr, serverID string) (phone, binary *peer, connID string) {
	t.Helper()
	binary = binaries.binary(t, addr, serverID)
	phone = phones.phone(t, addr, serverID)
	phone.send(`"hello"`)
	connID = binary.wantFrame(`"hello"`)
	binary.send(reply(connID, `"welcome"`))
	phone.want(`"welcome"`)
	return phone, binary, connID
}

// daemon is a binary that answers each frame with itself. As daemons do it dials again
// as soon as its connection ends, and goes on sending to the phones that it had.
type daemon struct {
	addr, serverID string
	from           net.IP // of its connections, nil for any
	ids            []string
	stop           chan struct{}
	again          chan net.IP
}

// keepBinary keeps a binary at serverID until the test ends. It has its claim
// when keepBinary returns.
func keepBinary(t testing.TB, addr, serverID string) *daemon {
	t.Helper()
	return keepBinaryFrom(t, addr, serverID, nil)
}

func keepBinaryFrom(t testing.TB, addr, serverID string, from net.IP) *daemon {
	t.Helper()
	d := &daemon{addr: addr, serverID: serverID, from: from, stop: make(chan struct{}), again: make(chan net.IP)}
	up, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		d.run(up)
	}()
	t.Cleanup(func() {
		close(d.stop)
		<-done
	})
	select {
	case <-up:
	case <-time.After(patience):
		t.Fatalf("the binary of %s is not connected after %v", serverID, patience)
	}
	return d
}

// redial ends the connection that the daemon has.
func (d *daemon) redial() { d.again <- d.from }

// moves ends it, too, and the daemon has another address from then on.
func (d *daemon) moves(to net.IP) { d.again <- to }

func (d *daemon) run(up chan struct{}) {
	for {
		events := make(chan event, 256)
		library := coderLibrary
		if d.from != nil {
			library = gorillaFrom(d.from)
		}
		w, err := library.dial(urlOf("ws", d.addr, "/v2/server"), binaryHeaders(d.serverID), func(e event) { events <- e })
		if err != nil {
			select {
			case <-d.stop:
				return
			case <-time.After(10 * time.Millisecond): // the back-off after an HTTP error
				continue
			}
		}
		if up != nil {
			close(up)
			up = nil
		}
		if !d.serve(w, events) {
			return
		}
	}
}

// serve reports whether the daemon goes on.
func (d *daemon) serve(w wire, events chan event) bool {
	defer w.drop()
	for _, id := range d.ids {
		w.send([]byte(reply(id, `"late"`)))
	}
	for {
		select {
		case e := <-events:
			if e.ended {
				return true
			}
			var in struct {
				ConnID string          `json:"conn_id"`
				Frame  json.RawMessage `json:"frame"`
			}
			if json.Unmarshal([]byte(e.text), &in) == nil && in.Frame != nil {
				w.send([]byte(reply(in.ConnID, string(in.Frame)))) // its failure is an end, too
				if !slices.Contains(d.ids, in.ConnID) {
					d.ids = append(d.ids, in.ConnID)
				}
			}
		case d.from = <-d.again:
			return true
		case <-d.stop:
			return false
		}
	}
}

// ask sends a frame as a new phone of serverID and returns what comes back: the
// frame, or the end. A relay that cannot be reached counts as an end.
func ask(t testing.TB, addr, serverID string) event {
	t.Helper()
	return askBy(t, gorillaLibrary, addr, serverID)
}

func askBy(t testing.TB, l library, addr, serverID string) event {
	t.Helper()
	events := make(chan event, 16)
	w, err := l.dial(urlOf("ws", addr, "/v2/client"), phoneHeaders(serverID), func(e event) { events <- e })
	if err != nil {
		return event{ended: true, reason: err.Error()}
	}
	defer w.drop()
	w.send([]byte(`"asked"`)) // where that fails, the end is there to be read
	select {
	case e := <-events:
		return e
	case <-time.After(patience):
		t.Fatalf("a phone of %s heard nothing within %v", serverID, patience)
		return event{}
	}
}
