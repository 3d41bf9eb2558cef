package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// What the actors of the stress run speak. What a message holds follows from who
// sends it and how many went before, so that whoever gets one can make it again
// and compare.

// stressMessage is what the receiver needs to make a message again.
type stressMessage struct {
	From string `json:"from"`
	N    int    `json:"n"`
	Do   string `json:"do"` // what a phone asks of its daemon
	Size int    `json:"size"`
	Body string `json:"body"`
}

var stressPieces = [...]string{"a", "Z", " ", "é", "☃", "𝄞", `\"`, `\\`, `\u2028`, `{`, `}]`, `,`, "0123456789abcdef"}

// stressText makes a message.
func stressText(from string, n int, do string, size int) []byte {
	h := fnv.New64a()
	fmt.Fprint(h, from, n)
	rng := rand.New(rand.NewPCG(h.Sum64(), uint64(size)))
	b := fmt.Appendf(nil, `{"from":%q,"n":%d,"do":%q,"size":%d,"body":"`, from, n, do, size)
	for end := len(b) + size; len(b) < end; {
		b = append(b, stressPieces[rng.IntN(len(stressPieces))]...)
		if rng.IntN(4) == 0 && end-len(b) > 64 { // long strings take another way through the scanner
			b = append(b, strings.Repeat("x", rng.IntN(end-len(b)-16))...)
		}
	}
	return append(b, `" , "end" : [ 1.50 , null ] }`...)
}

// stressSize is mostly small, sometimes past each of the relay's thresholds.
func stressSize(rng *rand.Rand, most int) int {
	sizes := [...]int{0, 30, 120, 200, 200, 1000, 4000, 9000, 20000, 70000}
	return min(rng.IntN(sizes[rng.IntN(len(sizes))]+1), most)
}

// sameMessage parses a message and compares it with the one that it should be.
func sameMessage(b []byte, from string, n int) (m stressMessage, err error) {
	if err = json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("message %.200q: %w", b, err)
	}
	if m.From != from || m.N != n {
		return m, fmt.Errorf("message %d of %q, want %d of %q", m.N, m.From, n, from)
	}
	if !bytes.Equal(b, stressText(from, n, m.Do, m.Size)) {
		return m, fmt.Errorf("message %d of %q is not what was sent", n, from)
	}
	return m, nil
}

// stressConn is a client that many goroutines may write.
type stressConn struct {
	*wsClient
	wmu  sync.Mutex
	done chan struct{} // the read loop is over; what follows is set
	code int           // 1006: no close frame
	text string        // reason of the close frame
}

// unhurriedConn waits longer: behind a peer that was deaf, the kernel may retry
// late, and a busy machine may be slow.
type unhurriedConn struct{ *net.TCPConn }

func (c unhurriedConn) SetReadDeadline(time.Time) error {
	return c.TCPConn.SetReadDeadline(time.Now().Add(4 * patience))
}

func (c unhurriedConn) SetWriteDeadline(time.Time) error {
	return c.TCPConn.SetWriteDeadline(time.Now().Add(4 * patience))
}

// connect makes a connection; refused is the status of an upgrade that was not granted.
func (w *stressWorld) connect(path string, h http.Header) (c *stressConn, refused int, err error) {
	nc, err := net.Dial("tcp", w.r.addr)
	if err != nil {
		return nil, 0, err
	}
	nc = unhurriedConn{nc.(*net.TCPConn)}
	ws, resp, err := handshake(w.t, nc, path, h)
	switch {
	case err != nil:
	case ws == nil:
		refused = resp.StatusCode
		resp.Body.Close()
	default:
		return &stressConn{wsClient: ws, done: make(chan struct{})}, 0, nil
	}
	nc.Close()
	return nil, refused, err
}

// write sends bytes as they are; who can't has been left by the relay, which the
// reader learns better.
func (c *stressConn) write(b []byte) bool {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	c.nc.SetWriteDeadline(time.Now().Add(patience))
	_, err := c.nc.Write(b)
	return err == nil
}

func (c *stressConn) send(op byte, p []byte) bool { return c.write(clientFrame(0x80, op, p)) }

// bye begins the close handshake; code 0 is none.
func (c *stressConn) bye(code int) bool {
	if code == 0 {
		return c.send(opClose, nil)
	}
	return c.send(opClose, closePayload(uint16(code), ""))
}

// reset makes the kernel say RST instead of FIN.
func (c *stressConn) reset() {
	c.nc.(unhurriedConn).SetLinger(0)
	c.nc.Close()
}

// read hands every message to got until the end, and plays the close handshake.
func (c *stressConn) read(got func(op byte, p []byte)) {
	defer close(c.done)
	defer c.nc.Close()
	c.code = 1006
	for {
		op, p, err := c.next()
		switch {
		case err != nil:
			return
		case op == opPing:
			c.send(opPong, p)
		case op != opClose:
			got(op, p)
		default:
			c.code = noCloseCode
			if len(p) >= 2 {
				c.code, c.text = int(binary.BigEndian.Uint16(p)), string(p[2:])
			}
			c.send(opClose, p[:min(2, len(p))])
			c.nc.SetReadDeadline(time.Now().Add(patience))
			io.Copy(io.Discard, c.br)
			return
		}
	}
}
