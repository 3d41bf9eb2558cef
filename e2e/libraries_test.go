package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"time"

	coder "github.com/coder/websocket"
	gorilla "github.com/gorilla/websocket"
)

// The WebSocket clients that we did not write, behind one small interface.

// library is one of them.
type library struct {
	name string
	// dial connects. What arrives goes to sink, from one goroutine, until an
	// event that ends.
	dial func(url string, header http.Header, sink func(event)) (wire, error)
}

// wire is what a test does with a connection.
type wire interface {
	// send sends one TEXT message, a fragment for each part.
	send(parts ...[]byte) error
	// close starts the close handshake; the answer is an event.
	close(code int, reason string) error
	// drop ends TCP without a word.
	drop()
}

// event is a message or the end of the connection.
type event struct {
	text   string
	ended  bool
	code   int // 1006 for an end without a close frame
	reason string
}

var (
	coderLibrary   = library{"coder", dialCoder}
	gorillaLibrary = library{"gorilla", dialGorilla}
	wsLibrary      = library{"ws", dialNode}
)

// readLimit is what the daemon takes.
const readLimit = 1 << 20

// ---- github.com/coder/websocket ----

type coderWire struct{ c *coder.Conn }

func dialCoder(url string, header http.Header, sink func(event)) (wire, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, _, err := coder.Dial(ctx, url, &coder.DialOptions{HTTPHeader: header})
	if err != nil {
		return nil, err
	}
	c.SetReadLimit(readLimit)
	go func() {
		for {
			kind, p, err := c.Read(context.Background())
			var end coder.CloseError
			switch {
			case errors.As(err, &end):
				sink(event{ended: true, code: int(end.Code), reason: end.Reason})
				return
			case err != nil || kind != coder.MessageText:
				sink(event{ended: true, code: 1006, reason: fmt.Sprint(kind, err)})
				return
			}
			sink(event{text: string(p)})
		}
	}()
	return coderWire{c}, nil
}

func (w coderWire) send(parts ...[]byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if len(parts) == 1 {
		return w.c.Write(ctx, coder.MessageText, parts[0])
	}
	m, err := w.c.Writer(ctx, coder.MessageText)
	for _, p := range parts {
		if err == nil {
			_, err = m.Write(p)
		}
	}
	if err != nil {
		return err
	}
	return m.Close()
}

func (w coderWire) close(code int, reason string) error {
	return w.c.Close(coder.StatusCode(code), reason)
}
func (w coderWire) drop() { w.c.CloseNow() }

// ---- github.com/gorilla/websocket ----

type gorillaWire struct{ c *gorilla.Conn }

// gorillaFrom connects from an address of this host.
func gorillaFrom(ip net.IP) library {
	from := net.Dialer{LocalAddr: &net.TCPAddr{IP: ip}}
	return library{"gorilla from " + ip.String(), func(url string, header http.Header, sink func(event)) (wire, error) {
		return dialGorillaBy(gorilla.Dialer{HandshakeTimeout: patience, NetDialContext: from.DialContext}, url, header, sink)
	}}
}

func dialGorilla(url string, header http.Header, sink func(event)) (wire, error) {
	return dialGorillaBy(gorilla.Dialer{HandshakeTimeout: patience}, url, header, sink) // buffers of 4 KiB
}

func dialGorillaBy(d gorilla.Dialer, url string, header http.Header, sink func(event)) (wire, error) {
	c, _, err := d.Dial(url, header)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			kind, p, err := c.ReadMessage()
			var end *gorilla.CloseError
			switch {
			case errors.As(err, &end):
				c.Close()
				sink(event{ended: true, code: end.Code, reason: end.Text})
				return
			case err != nil || kind != gorilla.TextMessage:
				c.Close()
				sink(event{ended: true, code: 1006, reason: fmt.Sprint(kind, err)})
				return
			}
			sink(event{text: string(p)})
		}
	}()
	return gorillaWire{c}, nil
}

// send leaves it to the library where a fragment ends: wherever its buffer is
// full, which for 200 KiB is about fifty times.
func (w gorillaWire) send(parts ...[]byte) error {
	w.c.SetWriteDeadline(time.Now().Add(patience))
	m, err := w.c.NextWriter(gorilla.TextMessage)
	for _, p := range parts {
		if err == nil {
			_, err = m.Write(p)
		}
	}
	if err != nil {
		return err
	}
	return m.Close()
}

func (w gorillaWire) close(code int, reason string) error {
	return w.c.WriteControl(gorilla.CloseMessage, gorilla.FormatCloseMessage(code, reason), time.Now().Add(patience))
}
func (w gorillaWire) drop() { w.c.Close() }

// ---- npm ws ----

// node is a process that runs ws.js.
type node struct {
	cmd  *exec.Cmd
	gone chan struct{} // closed when it has ended

	mu    sync.Mutex // guards what follows
	in    io.Writer
	last  int
	sinks map[int]func(nodeEvent)
}

type nodeEvent struct {
	ID         int    `json:"id"`
	Event      string `json:"event"`
	Data       []byte `json:"data"`
	Binary     bool   `json:"binary"`
	Code       int    `json:"code"`
	Reason     string `json:"reason"`
	Extensions string `json:"extensions"`
}

// sharedNode is the one that serves every test.
var sharedNode = sync.OnceValues(startNode)

func startNode() (*node, error) {
	cmd := exec.Command("node", "ws.js") // ends with our end of its stdin
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting ws.js: %w", err)
	}
	n := &node{cmd: cmd, gone: make(chan struct{}), in: in, sinks: map[int]func(nodeEvent){}}
	go n.read(out)
	return n, nil
}

func (n *node) read(out io.Reader) {
	defer close(n.gone)
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 2*readLimit)
	for lines.Scan() {
		var e nodeEvent
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			e = nodeEvent{Event: "error", Reason: lines.Text()}
		}
		n.mu.Lock()
		sink := n.sinks[e.ID]
		n.mu.Unlock()
		if sink != nil {
			sink(e)
		}
	}
}

func (n *node) command(c map[string]any) error {
	line, err := json.Marshal(c)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	_, err = n.in.Write(append(line, '\n'))
	return err
}

type nodeWire struct {
	node *node
	id   int
}

func dialNode(url string, header http.Header, sink func(event)) (wire, error) {
	n, err := sharedNode()
	if err != nil {
		return nil, err
	}
	return n.dial(url, header, sink)
}

func (n *node) dial(url string, header http.Header, sink func(event)) (wire, error) {
	opened := make(chan error, 1)
	n.mu.Lock()
	n.last++
	w := nodeWire{n, n.last}
	n.sinks[w.id] = func(e nodeEvent) {
		switch {
		case e.Event == "open" && e.Extensions == "":
			opened <- nil
		case e.Event == "message" && !e.Binary:
			sink(event{text: string(e.Data)})
		case e.Event == "message":
			sink(event{ended: true, code: 1006, reason: "got a binary message"})
		case e.Event == "close":
			sink(event{ended: true, code: e.Code, reason: e.Reason})
		default:
			// An error comes before its close event, and is news while dialing.
			select {
			case opened <- fmt.Errorf("ws: %+v", e):
			default:
			}
		}
	}
	n.mu.Unlock()
	headers := map[string]string{}
	for name, values := range header {
		headers[name] = values[0]
	}
	if err := n.command(map[string]any{"op": "dial", "id": w.id, "url": url, "headers": headers}); err != nil {
		return nil, err
	}
	select {
	case err := <-opened:
		return w, err
	case <-n.gone:
		return nil, errors.New("ws.js has ended: is npm ci done?")
	case <-time.After(patience):
		return nil, fmt.Errorf("ws did not open within %v", patience)
	}
}

func (w nodeWire) send(parts ...[]byte) error {
	return w.node.command(map[string]any{"op": "send", "id": w.id, "parts": parts})
}

func (w nodeWire) close(code int, reason string) error {
	return w.node.command(map[string]any{"op": "close", "id": w.id, "code": code, "reason": reason})
}

func (w nodeWire) drop() {
	if err := w.node.command(map[string]any{"op": "drop", "id": w.id}); err != nil {
		panic(err) // node is gone: every test of it fails
	}
}
