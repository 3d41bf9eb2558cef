package main

import (
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"

	"golang.org/x/net/websocket"
)

// The opening handshake (RFC 6455 §4.2). Everything that x/net/websocket would
// refuse with raw bytes, or wrongly accept, is refused here first as a proper
// HTTP answer; then x/net writes the 101, for a connection that is taken from
// net/http for good, so that an upgraded connection holds none of its memory.

// refusal is an HTTP answer in place of a 101. Its text is for a person.
type refusal struct {
	status  int
	outcome upgradeOutcome
	text    string
	header  [2]string // one header of the answer, if any
}

func (f *refusal) Error() string { return f.text }

func badHandshake(status int, header, value, text string) *refusal {
	return &refusal{status, upgradeBadRequest, text, [2]string{header, value}}
}

// checkHandshake is the last gate before the 101.
func checkHandshake(q *http.Request) *refusal {
	h := q.Header
	switch {
	case q.Method != http.MethodGet:
		return badHandshake(http.StatusMethodNotAllowed, "Allow", "GET", "this is a websocket endpoint: use GET")
	case !q.ProtoAtLeast(1, 1) || q.ProtoMajor != 1:
		return badHandshake(http.StatusUpgradeRequired, "Upgrade", "websocket", "websocket upgrades need HTTP/1.1")
	case !hasToken(h["Connection"], "upgrade") || !hasToken(h["Upgrade"], "websocket"):
		return badHandshake(http.StatusUpgradeRequired, "Upgrade", "websocket",
			"this is a websocket endpoint: no upgrade was asked for (does the proxy in front forward Upgrade and Connection?)")
	case len(h["Sec-Websocket-Version"]) != 1 || h["Sec-Websocket-Version"][0] != "13":
		return badHandshake(http.StatusUpgradeRequired, "Sec-WebSocket-Version", "13", "only websocket version 13 is spoken here")
	case q.ContentLength != 0:
		return badHandshake(http.StatusBadRequest, "", "", "an upgrade request has no body")
	}
	if key := h["Sec-Websocket-Key"]; len(key) != 1 || !validKey(key[0]) {
		return badHandshake(http.StatusBadRequest, "", "", "sec-websocket-key must be one base64 value of 16 bytes")
	}
	return nil
}

// hasToken looks for a token in a list header (RFC 9110 §5.6.1).
func hasToken(lines []string, token string) bool {
	for _, line := range lines {
		for t := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.TrimSpace(t), token) {
				return true
			}
		}
	}
	return false
}

func validKey(key string) bool {
	var b [18]byte
	if len(key) != base64.StdEncoding.EncodedLen(16) {
		return false
	}
	n, err := base64.StdEncoding.Strict().Decode(b[:], []byte(key))
	return err == nil && n == 16
}

// upgrade makes the answer to a checked request: 101 and extra headers. It is for
// the caller to send, once the peer is registered: who has seen a 101 counts on
// that. upgrade returns the bare connection as well, and what the peer had
// already sent on it.
func upgrade(w http.ResponseWriter, q *http.Request, extra http.Header) (nc net.Conn, first, answer []byte, err error) {
	nc, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, nil, fmt.Errorf("taking the connection over: %w", err)
	}
	if g, ok := nc.(*guest); ok {
		nc = g.Conn
	}
	if n := rw.Reader.Buffered(); n > 0 {
		first = make([]byte, n)
		if _, err = rw.Reader.Read(first); err != nil {
			nc.Close()
			return nil, nil, nil, fmt.Errorf("reading what followed the request: %w", err)
		}
	}
	// x/net keeps the request for as long as its connection: it gets one with
	// nothing in it but the handshake.
	slim := &http.Request{
		Method: http.MethodGet,
		Host:   "relay",
		URL:    rootURL,
		Header: http.Header{
			"Connection":            upgradeToken,
			"Upgrade":               websocketToken,
			"Sec-Websocket-Version": version13,
			"Sec-Websocket-Key":     q.Header["Sec-Websocket-Key"],
		},
	}
	hw := handshakeWriter{conn: handshakeConn{nc, &answer}}
	opened := false
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error { c.Header = extra; return nil },
		Handler:   func(*websocket.Conn) { opened = true },
	}.ServeHTTP(&hw, slim)
	if !opened {
		nc.Close()
		return nil, nil, nil, errors.New("x/net/websocket refused a handshake that was checked")
	}
	return nc, first, answer, nil
}

// What every slim request shares. x/net only reads it.
var (
	rootURL        = &url.URL{Path: "/"}
	upgradeToken   = []string{"Upgrade"}
	websocketToken = []string{"websocket"}
	version13      = []string{"13"}
)

// handshakeWriter lets x/net hijack a connection that is hijacked already.
type handshakeWriter struct {
	http.ResponseWriter // none: x/net calls Hijack only
	conn                handshakeConn
}

func (w *handshakeWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	// The 101 is about 250 bytes.
	return w.conn, bufio.NewReadWriter(bufio.NewReaderSize(strings.NewReader(""), 16), bufio.NewWriterSize(w.conn, 512)), nil
}

// handshakeConn outlives x/net's interest in it, and keeps what x/net writes.
type handshakeConn struct {
	net.Conn
	answer *[]byte
}

func (c handshakeConn) Write(p []byte) (int, error) {
	*c.answer = append(*c.answer, p...)
	return len(p), nil
}

func (c handshakeConn) Close() error { return nil }
