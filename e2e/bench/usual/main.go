// Command usual is the relay most people would write in an afternoon: net/http
// and gorilla/websocket with its default buffers, encoding/json, a map under a
// mutex, and for every peer a reading goroutine, a writing one and a buffered
// channel between them. It is what ../run measures the relay against, and
// nothing to operate: it has no rate limits, no grace period and no metrics.
package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"log"
	"net/http"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

const (
	maxMessage   = 256 << 10
	queueLength  = 256 // what the library's chat example takes
	pingEvery    = 30 * time.Second
	pongTimeout  = 60 * time.Second
	writeTimeout = 10 * time.Second
	closeTimeout = 5 * time.Second
	// fullTimeout is how long a phone's full queue may hold up its siblings: long
	// enough for a burst, short enough to cut off a phone that reads nothing.
	fullTimeout = 300 * time.Millisecond
)

// envelope is what the binary's leg carries, in both directions.
type envelope struct {
	ConnID    string          `json:"conn_id"`
	Frame     json.RawMessage `json:"frame,omitempty"`
	CloseCode int             `json:"close_code,omitempty"`
}

// peer is one WebSocket. Its reader is the goroutine of its HTTP handler.
type peer struct {
	ws   *websocket.Conn
	send chan []byte
	// code is set before send is closed: the writer closes with it.
	code int
	done chan struct{} // closed when the reader has ended
}

// server is a claimed server-id: its binary and its phones by conn_id.
type server struct {
	binary *peer
	phones map[string]*peer // guarded by relay.mu
}

type relay struct {
	upgrader websocket.Upgrader
	mu       sync.Mutex
	servers  map[string]*server
}

func main() {
	listen := flag.String("listen", "127.0.0.1:8080", "address to listen on")
	for _, name := range []string{"admin", "instance-lock", "rate-per-minute", "max-connections", "max-phones"} {
		flag.String(name, "", "taken so that any relay's command line fits; this relay has no such thing")
	}
	flag.Parse()
	r := &relay{servers: map[string]*server{}}
	r.upgrader.CheckOrigin = func(*http.Request) bool { return true }
	mux := http.NewServeMux()
	for _, version := range []string{"/v1", "/v2"} {
		mux.HandleFunc(version+"/server", r.serveBinary)
		mux.HandleFunc(version+"/client", r.servePhone)
	}
	log.Fatal((&http.Server{Addr: *listen, Handler: mux, ReadHeaderTimeout: 10 * time.Second}).ListenAndServe())
}

// accept upgrades a request and starts the peer's writer.
func (r *relay) accept(w http.ResponseWriter, req *http.Request) (*peer, string) {
	id := req.Header.Get("X-Pyrycode-Server")
	if id == "" {
		http.Error(w, "the header x-pyrycode-server is missing", http.StatusBadRequest)
		return nil, ""
	}
	ws, err := r.upgrader.Upgrade(w, req, nil)
	if err != nil {
		return nil, ""
	}
	ws.SetReadLimit(maxMessage)
	ws.SetReadDeadline(time.Now().Add(pongTimeout))
	ws.SetPongHandler(func(string) error { return ws.SetReadDeadline(time.Now().Add(pongTimeout)) })
	p := &peer{ws: ws, send: make(chan []byte, queueLength), done: make(chan struct{})}
	go p.write()
	return p, id
}

func (r *relay) serveBinary(w http.ResponseWriter, req *http.Request) {
	p, id := r.accept(w, req)
	if p == nil {
		return
	}
	defer p.end()
	s := &server{binary: p, phones: map[string]*peer{}}
	r.mu.Lock()
	_, taken := r.servers[id]
	if !taken {
		r.servers[id] = s
	}
	r.mu.Unlock()
	if taken {
		p.refuse(4409, "server-id is taken")
		return
	}
	defer r.release(id, s)
	for {
		_, message, err := p.ws.ReadMessage()
		if err != nil {
			return
		}
		var e envelope
		if json.Unmarshal(message, &e) == nil {
			r.deliver(s, e)
		}
	}
}

func (r *relay) servePhone(w http.ResponseWriter, req *http.Request) {
	p, id := r.accept(w, req)
	if p == nil {
		return
	}
	defer p.end()
	connID := newConnID()
	r.mu.Lock()
	s := r.servers[id]
	if s != nil {
		s.phones[connID] = p
	}
	r.mu.Unlock()
	if s == nil {
		p.refuse(4404, "no such server")
		return
	}
	for {
		_, message, err := p.ws.ReadMessage()
		if err != nil {
			r.leave(s, connID, closeCode(err))
			return
		}
		// Marshalling checks that the phone's message is one JSON value.
		wrapped, err := json.Marshal(envelope{ConnID: connID, Frame: message})
		if err != nil {
			p.refuse(websocket.CloseInvalidFramePayloadData, "not JSON")
			r.leave(s, connID, websocket.CloseInvalidFramePayloadData)
			return
		}
		s.binary.queue(wrapped)
	}
}

// deliver hands a binary's frame to its phone. Only the binary's reader calls
// it and release, so only that goroutine closes a phone's channel.
func (r *relay) deliver(s *server, e envelope) {
	r.mu.Lock()
	p := s.phones[e.ConnID]
	if p != nil && e.CloseCode != 0 {
		delete(s.phones, e.ConnID)
	}
	r.mu.Unlock()
	if p == nil {
		return
	}
	if len(e.Frame) > 0 && string(e.Frame) != "null" && !p.tryQueue(e.Frame) {
		p.ws.Close() // its reader tells the binary
		return
	}
	if e.CloseCode != 0 {
		p.code = e.CloseCode
		close(p.send)
	}
}

// leave takes a phone out and tells its binary, unless that asked for the end.
func (r *relay) leave(s *server, connID string, code int) {
	r.mu.Lock()
	_, there := s.phones[connID]
	delete(s.phones, connID)
	r.mu.Unlock()
	if !there {
		return
	}
	if notice, err := json.Marshal(envelope{ConnID: connID, CloseCode: code}); err == nil {
		s.binary.queue(notice)
	}
}

// release gives a server-id up and closes its phones.
func (r *relay) release(id string, s *server) {
	r.mu.Lock()
	delete(r.servers, id)
	phones := s.phones
	s.phones = nil
	r.mu.Unlock()
	for _, p := range phones {
		p.code = 4404
		close(p.send)
	}
}

// queue waits for room, which is back-pressure on the caller's own connection.
func (p *peer) queue(message []byte) {
	select {
	case p.send <- message:
	case <-p.done:
	}
}

// tryQueue waits no longer than fullTimeout; false means that the peer is stuck.
func (p *peer) tryQueue(message []byte) bool {
	select {
	case p.send <- message:
		return true
	default: // only a full queue is worth a timer
	}
	select {
	case p.send <- message:
	case <-p.done:
	case <-time.After(fullTimeout):
		return false
	}
	return true
}

// write is the only goroutine that writes messages. It ends with the reader,
// on a failed write, or when send is closed.
func (p *peer) write() {
	defer p.ws.Close()
	ping := time.NewTicker(pingEvery)
	defer ping.Stop()
	for {
		select {
		case message, open := <-p.send:
			if !open {
				p.refuse(p.code, "")
				select {
				case <-p.done:
				case <-time.After(closeTimeout):
				}
				return
			}
			p.ws.SetWriteDeadline(time.Now().Add(writeTimeout))
			if p.ws.WriteMessage(websocket.TextMessage, message) != nil {
				return
			}
		case <-ping.C:
			if p.ws.WriteControl(websocket.PingMessage, nil, time.Now().Add(writeTimeout)) != nil {
				return
			}
		case <-p.done:
			return
		}
	}
}

// refuse sends a close frame; a peer that cannot take it just loses its connection.
func (p *peer) refuse(code int, reason string) {
	p.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, reason), time.Now().Add(writeTimeout))
}

func (p *peer) end() {
	close(p.done)
	p.ws.Close()
}

// closeCode is what a phone's binary is told of a failed read.
func closeCode(err error) int {
	var closed *websocket.CloseError
	switch {
	case errors.As(err, &closed):
		return closed.Code
	case errors.Is(err, websocket.ErrReadLimit):
		return websocket.CloseMessageTooBig
	}
	return websocket.CloseAbnormalClosure
}

func newConnID() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}
