package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/websocket"
)

// A session with a relay, from a peer's side: x/net/websocket's handshake and
// frames. Its answer to the handshake x/net keeps to itself, so that is recorded
// on its way.

// endError is how a session ended: with a close frame, or 1006 and err.
type endError struct {
	code   int
	reason string
	err    error
}

func (e *endError) Error() string {
	if e.err != nil {
		return fmt.Sprintf("connection lost: %v", e.err)
	}
	if e.reason == "" {
		return fmt.Sprintf("closed %d", e.code)
	}
	return fmt.Sprintf("closed %d %s", e.code, quote(e.reason))
}

func (e *endError) Unwrap() error { return e.err }

// wsPeer is a session from the peer's side.
type wsPeer struct {
	*dialTrace
	nc      net.Conn
	ws      *websocket.Conn
	unwatch func() bool // of ctx

	messages chan []byte   // closed at the end
	pongs    chan struct{} // one is remembered
	hungUp   chan struct{} // closed by close
	once     sync.Once
	over     chan struct{} // closed at the end
	end      *endError     // set before

	mu sync.Mutex // writing: x/net has no lock for frames
}

// recorder keeps what is read through it, which is bounded: x/net reads a head
// without end to its end.
type recorder struct {
	net.Conn
	b *bytes.Buffer // nil once enough was read
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	if r.b != nil {
		if r.b.Write(p[:n]); r.b.Len() > maxHead && err == nil {
			err = fmt.Errorf("the answer's head has more than %d bytes", maxHead)
		}
	}
	return n, err
}

// upgrade makes the opening handshake.
func (c *wsPeer) upgrade(base *url.URL, role role, serverID, nonce string) error {
	origin := map[string]string{"ws": "http://", "wss": "https://"}[base.Scheme] + base.Host
	config, err := websocket.NewConfig(base.JoinPath("/v2", endpointWords[role]).String(), origin)
	if err != nil {
		return err
	}
	config.Header = http.Header{
		"X-Pyrycode-Server": {serverID},
		"User-Agent":        {programName + "/" + readBuildVersion().version},
	}
	if role == roleBinary {
		config.Header.Set("X-Pyrycode-Version", readBuildVersion().version)
	}
	if nonce != "" {
		config.Header.Set(probeHeader, nonce)
	}
	rec := &recorder{c.nc, new(bytes.Buffer)}
	c.nc.SetDeadline(time.Now().Add(stepTime))
	began := time.Now()
	c.ws, err = websocket.NewClient(config, rec)
	c.took[stepUpgrade] = time.Since(began)
	heard := rec.b
	rec.b = nil
	if err == nil {
		c.answer, err = readAnswer(heard, began)
		c.nc.SetDeadline(time.Time{})
		return err
	}
	// x/net has stopped reading at the head; the text of a refusal may be to come.
	c.nc.SetReadDeadline(time.Now().Add(byeTime))
	if a, readErr := readAnswer(io.MultiReader(heard, c.nc), began); readErr == nil {
		c.answer = a
	}
	return err
}

func readAnswer(r io.Reader, asked time.Time) (*answer, error) {
	resp, err := http.ReadResponse(bufio.NewReader(r), nil)
	if err != nil {
		return nil, err
	}
	a := &answer{asked: asked, status: resp.Proto + " " + resp.Status, code: resp.StatusCode, header: resp.Header}
	if a.code != http.StatusSwitchingProtocols {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxRefusal)) // whatever came
		a.text, _, _ = strings.Cut(strings.TrimSpace(string(b)), "\n")
	}
	return a, nil
}

// read takes frames until the session ends. Pings and a close are answered.
func (c *wsPeer) read() {
	defer close(c.over)
	defer close(c.messages)
	for {
		op, p, err := c.frame()
		if err == nil && op == opPing {
			err = c.write(opPong, p)
		}
		switch {
		case err != nil:
			c.end = &endError{code: 1006, err: err}
			return
		case op == opClose:
			c.end = &endError{code: noCloseCode}
			if len(p) >= 2 {
				c.end.code, c.end.reason = int(binary.BigEndian.Uint16(p)), string(p[2:])
			}
			c.write(opClose, p) // the answer; the relay may be gone
			return
		case op == opPong:
			select {
			case c.pongs <- struct{}{}:
			default:
			}
		case op == opText:
			select {
			case c.messages <- p:
			case <-c.hungUp:
			}
		}
	}
}

// frame reads one frame as relays send them: whole and unmasked.
func (c *wsPeer) frame() (op byte, p []byte, err error) {
	f, err := c.ws.NewFrameReader()
	if err != nil {
		return 0, nil, err
	}
	head, err := io.ReadAll(f.HeaderReader())
	if err != nil {
		return 0, nil, err
	}
	n := f.Len() - len(head) // overflows below 0 for what no one sends
	if head[0]&0xf0 != 0x80 || head[1]&0x80 != 0 || n < 0 || n > maxHeard {
		return 0, nil, fmt.Errorf("a frame that no relay sends: % x", head)
	}
	p = make([]byte, n)
	_, err = io.ReadFull(f, p)
	return f.PayloadType(), p, err
}

// write sends one frame. It may be called from several goroutines.
func (c *wsPeer) write(op byte, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	w, err := c.ws.NewFrameWriter(op)
	if err != nil {
		return err
	}
	c.nc.SetWriteDeadline(time.Now().Add(stepTime))
	_, err = w.Write(p)
	return err
}

// settled waits for the relay's answer to a ping: where it refuses a session, a
// close frame is behind the 101, and comes in its place.
func (c *wsPeer) settled() error {
	if err := c.write(opPing, nil); err != nil {
		return c.lost(err)
	}
	patience := time.NewTimer(stepTime)
	defer patience.Stop()
	select {
	case <-c.pongs:
		return nil
	case <-c.over:
		return c.end
	case <-patience.C:
		return fmt.Errorf("no answer to a ping within %v", stepTime)
	}
}

// roundTrip sends a frame, which the claim sends back in brackets.
func (c *wsPeer) roundTrip(frame []byte) error {
	if err := c.write(opText, frame); err != nil {
		return c.lost(err)
	}
	patience := time.NewTimer(stepTime)
	defer patience.Stop()
	select {
	case p, ok := <-c.messages:
		if !ok {
			return c.end
		}
		if len(p) != len(frame)+2 || !bytes.Equal(p[1:len(p)-1], frame) {
			return fmt.Errorf("%d bytes went out, %d others came back", len(frame), len(p))
		}
		return nil
	case <-patience.C:
		return fmt.Errorf("a frame of %d bytes did not come back within %v", len(frame), stepTime)
	}
}

// lost prefers the close frame, which tells why, to the write error after it.
func (c *wsPeer) lost(err error) error {
	patience := time.NewTimer(byeTime)
	defer patience.Stop()
	select {
	case <-c.over:
		return c.end
	case <-patience.C:
		return err
	}
}

func (c *wsPeer) alive() bool {
	select {
	case <-c.over:
		return false
	default:
		return true
	}
}

// wentAstray reports whether a phone was told 4404 while its claim is held: the failure
// that a second relay behind one name causes.
func wentAstray(err error, claim *wsPeer) bool {
	var end *endError
	return errors.As(err, &end) && end.code == int(endNeverSeen.code()) && claim.alive()
}

// echo makes a binary's session send every frame back to the phone it is from,
// until the session ends. The brackets tell it from a server that echoes itself.
func (c *wsPeer) echo() {
	for m := range c.messages {
		var e struct {
			ConnID string          `json:"conn_id"`
			Frame  json.RawMessage `json:"frame,omitempty"`
		}
		if json.Unmarshal(m, &e) != nil || e.Frame == nil {
			continue // a close notice
		}
		e.Frame = slices.Concat([]byte("["), e.Frame, []byte("]"))
		if m, err := json.Marshal(e); err != nil || c.write(opText, m) != nil {
			return
		}
	}
}

// close ends the session with a close handshake.
func (c *wsPeer) close() {
	c.once.Do(func() {
		close(c.hungUp)
		if c.alive() {
			c.write(opClose, binary.BigEndian.AppendUint16(nil, 1000)) // nothing is left to do if that fails
			patience := time.NewTimer(byeTime)
			defer patience.Stop()
			select {
			case <-c.over:
			case <-patience.C:
			}
		}
		c.unwatch()
		c.nc.Close()
		<-c.over
	})
}

// probeID is a server-id that nobody else has.
func probeID() string { return probePrefix + rand.Text() }
