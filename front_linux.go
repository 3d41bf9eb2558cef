//go:build !386

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The front door of Linux: the loop itself accepts, and where the whole upgrade
// request of a phone is there in one piece, as it nearly always is, takes it
// through the same gates and handshake as net/http would have, on the spot.
// Everything else (binaries, pages, slow, large or broken requests) goes to
// net/http untouched. An upgrade costs half of what it does there: no goroutine,
// no switch, no second registration of the socket, no buffers.

const (
	// maxGreeting is the longest request that is looked at here.
	maxGreeting = 4 << 10
	// acceptTurns bounds how long a storm of newcomers keeps others waiting.
	acceptTurns = 32
)

// front is the listener that net/http sees: of the connections it is left.
type front struct {
	relay *relay
	loop  *epollLoop
	addr  net.Addr

	mu     sync.Mutex // guards what follows
	wanted sync.Cond  // aside or closed changed
	fd     int        // the listening socket, -1 once closed
	aside  []net.Conn // for net/http
	closed bool

	// Owned by the loop.
	greeting map[int]*greeter // by file descriptor
	starved  bool             // accept failed for want of something; tried again at the next tick
}

// greeter is a connection that has not made its request yet.
type greeter struct {
	addr  netip.AddrPort
	until int64 // relay clock
}

// door makes ln the relay's front door and returns the listener for net/http.
func (r *relay) door(ln net.Listener) (net.Listener, error) {
	tl, ok := ln.(*net.TCPListener)
	l, epoll := r.loops[0].(*epollLoop)
	if !ok || !epoll {
		return ln, nil
	}
	fd, err := dupSocket(tl)
	if err != nil {
		return nil, fmt.Errorf("taking over the listener: %w", err)
	}
	f := &front{relay: r, loop: l, addr: ln.Addr(), fd: fd, greeting: map[int]*greeter{}}
	f.wanted.L = &f.mu
	tl.Close()
	l.mu.Lock()
	l.front = f
	l.mu.Unlock()
	if err := f.watch(); err != nil {
		f.Close()
		return nil, fmt.Errorf("watching the listener: %w", err)
	}
	return f, nil
}

func (f *front) watch() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fd < 0 {
		return nil
	}
	ev := syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(f.fd)}
	return syscall.EpollCtl(f.loop.epfd, syscall.EPOLL_CTL_ADD, f.fd, &ev)
}

// ---- net.Listener ----

func (f *front) Addr() net.Addr { return f.addr }

func (f *front) Accept() (net.Conn, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.aside) == 0 && !f.closed {
		f.wanted.Wait()
	}
	if f.closed {
		return nil, net.ErrClosed
	}
	nc := f.aside[0]
	f.aside = f.aside[1:]
	return nc, nil
}

// Close stops accepting at once; who has not made a request yet is dropped.
func (f *front) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return net.ErrClosed
	}
	f.closed = true
	syscall.Close(f.fd) // the only descriptor of it: epoll forgets it too
	f.fd = -1
	for _, nc := range f.aside {
		nc.Close()
	}
	f.aside = nil
	f.wanted.Broadcast()
	f.loop.wake()
	return nil
}

// ---- the loop's side ----

// serve takes an event that is for no session.
func (f *front) serve(fd int) {
	f.mu.Lock()
	listening := fd == f.fd
	f.mu.Unlock()
	if listening {
		f.accept()
	} else if g := f.greeting[fd]; g != nil {
		f.hear(fd, g)
	}
}

func (f *front) accept() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for range acceptTurns {
		if f.fd < 0 {
			return
		}
		fd, sa, err := syscall.Accept4(f.fd, syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC)
		switch err {
		case nil:
		case syscall.EAGAIN:
			return
		case syscall.EINTR, syscall.ECONNABORTED:
			continue
		default:
			// Out of descriptors or memory. The socket stays readable: without
			// a break the loop would spin on it.
			f.relay.log.Error("accepting a connection failed", "error", err)
			syscall.EpollCtl(f.loop.epfd, syscall.EPOLL_CTL_DEL, f.fd, nil)
			f.starved = true
			return
		}
		addr := addrPort(sa)
		if len(f.greeting)+len(f.aside) >= maxWaiting && !f.giveWay() {
			syscall.Close(fd)
			continue
		}
		syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
		f.greeting[fd] = &greeter{addr, f.loop.batch.now + int64(greetTime)}
		// The events are those of a session: one that is taken on stays as it is.
		if err := f.loop.watch(fd); err != nil {
			f.relay.log.Error("watching a socket failed", "error", err)
			delete(f.greeting, fd)
			syscall.Close(fd)
		}
	}
}

// giveWay drops a newcomer that has said nothing for long, in favor of the next
// one: of a few the oldest, since a peer that means it makes its request at once.
// It reports false if there is none.
func (f *front) giveWay() bool {
	victim, ok := stalest(f.greeting, func(g *greeter) int64 { return g.until })
	if !ok {
		return false
	}
	f.dismiss(victim)
	return true
}

func addrPort(sa syscall.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *syscall.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *syscall.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// hear looks at what a newcomer has sent, without taking it from the socket.
func (f *front) hear(fd int, g *greeter) {
	l := f.loop
	b := l.buf[:maxGreeting]
	n, err := recv(fd, nil, b, syscall.MSG_PEEK)
	switch {
	case err == syscall.EAGAIN || err == syscall.EINTR:
		return // the event was that it can be written to
	case err != nil || n == 0:
		f.dismiss(fd)
		return
	}
	q, size := phoneRequest(b[:n])
	if q == nil {
		f.setAside(fd)
		return
	}
	delete(f.greeting, fd)
	if _, err := syscall.Read(fd, b[:size]); err != nil { // it is there
		syscall.Close(fd)
		return
	}
	q.RemoteAddr = g.addr.String()
	w := &frontWriter{c: fdConn{fd: fd, loop: l}, header: http.Header{}}
	f.relay.serve(w, q, legPhone)
	w.finish(q)
}

var headEnd = []byte("\r\n\r\n")

// phoneRequest parses b if it begins with the whole upgrade request of a phone,
// and tells how long that is. Any other request is net/http's.
func phoneRequest(b []byte) (q *http.Request, size int) {
	if !bytes.HasPrefix(b, []byte("GET /v1/client ")) && !bytes.HasPrefix(b, []byte("GET /v2/client ")) {
		return nil, 0
	}
	end := bytes.Index(b, headEnd)
	if end < 0 {
		return nil, 0
	}
	size = end + len(headEnd)
	q, err := http.ReadRequest(bufio.NewReaderSize(bytes.NewReader(b[:size]), size))
	if err != nil || q.ContentLength != 0 || q.Host == "" {
		return nil, 0
	}
	return q, size
}

// setAside gives a connection to net/http.
func (f *front) setAside(fd int) {
	delete(f.greeting, fd)
	file := os.NewFile(uintptr(fd), "")
	defer file.Close() // takes it out of the loop's epoll set: FileConn duplicates
	syscall.EpollCtl(f.loop.epfd, syscall.EPOLL_CTL_DEL, fd, nil)
	nc, err := net.FileConn(file)
	if err != nil {
		f.relay.log.Error("passing a connection on failed", "error", err)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		nc.Close()
		return
	}
	f.aside = append(f.aside, nc)
	f.wanted.Signal()
}

func (f *front) dismiss(fd int) {
	delete(f.greeting, fd)
	syscall.Close(fd)
}

// dismissAll drops who has not made a request yet, when the loop ends.
func (f *front) dismissAll() {
	for fd := range f.greeting {
		f.dismiss(fd)
	}
}

// quiet reports that no timeout runs here.
func (f *front) quiet() bool { return len(f.greeting) == 0 && !f.starved }

// tick drops who said nothing for too long, or all of them once the door is
// closed, and goes on accepting after a want.
func (f *front) tick(now int64) {
	f.mu.Lock()
	closed := f.closed
	f.mu.Unlock()
	for fd, g := range f.greeting {
		if closed || now >= g.until {
			f.dismiss(fd)
		}
	}
	if f.starved {
		f.starved = false
		if err := f.watch(); err != nil {
			f.relay.log.Error("watching the listener failed", "error", err)
			f.starved = true
		}
	}
}

// frontWriter is the http.ResponseWriter of the door.
type frontWriter struct {
	c        fdConn
	header   http.Header
	status   int
	body     bytes.Buffer
	hijacked bool
}

func (w *frontWriter) Header() http.Header { return w.header }

func (w *frontWriter) WriteHeader(status int) { w.status = status }

func (w *frontWriter) Write(p []byte) (int, error) { return w.body.Write(p) }

func (w *frontWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	w.hijacked = true
	return w.c, bufio.NewReadWriter(nothing, nil), nil
}

// nothing is the reader of a connection of which no byte too many was read.
var nothing = bufio.NewReaderSize(strings.NewReader(""), 16)

// finish sends a refusal, unless there was an upgrade.
func (w *frontWriter) finish(q *http.Request) {
	if w.hijacked {
		return
	}
	a := http.Response{
		StatusCode: w.status, ProtoMajor: 1, ProtoMinor: 1, Request: q, Header: w.header, Close: true,
		ContentLength: int64(w.body.Len()), Body: io.NopCloser(&w.body),
	}
	w.header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	var b bytes.Buffer
	a.Write(&b) // to memory: it does not fail
	w.c.Write(b.Bytes())
	syscall.Shutdown(w.c.fd, syscall.SHUT_WR)
	w.c.Close()
}

// fdConn is a connection that never was Go's: what upgrade and bind need of one.
type fdConn struct {
	net.Conn // none
	fd       int
	loop     *epollLoop // whose epoll set it is in
}

var errShortWrite = errors.New("the send buffer of a new socket is full")

func (c fdConn) Write(p []byte) (int, error) {
	n, err := syscall.Write(c.fd, p)
	if err == nil && n < len(p) {
		err = errShortWrite
	}
	return n, err
}

func (c fdConn) Close() error { return syscall.Close(c.fd) }
