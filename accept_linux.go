//go:build !386

package main

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
)

// The acceptor of Linux. What it accepts is a bare descriptor, of which Go's
// poller and its timers learn only if net/http has to wait for it: nearly every
// request is there with its connection, and the next to wait for the socket is
// the relay's own loop. It is here for what a connect costs: 1.3 to 1.6 times as
// much as through HAProxy on a net.TCPConn, 1.05 to 1.31 times with it.

func init() { newAcceptor = acceptBare }

// acceptor is a net.Listener.
type acceptor struct {
	file *os.File
	raw  syscall.RawConn // of file
	addr net.Addr
}

// acceptBare takes ln over.
func acceptBare(ln net.Listener) (net.Listener, error) {
	tl, ok := ln.(*net.TCPListener)
	if !ok {
		return ln, nil
	}
	defer tl.Close()
	f, err := tl.File()
	if err != nil {
		return nil, fmt.Errorf("taking over the listener: %w", err)
	}
	raw, err := f.SyscallConn()
	if err == nil {
		listens := 0 // a socket that was passed to this process may be a connection
		err = raw.Control(func(fd uintptr) {
			listens, _ = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
			// What is accepted inherits it.
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1)
			// The kernel keeps a connection until its first byte is there (tcp(7)).
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_DEFER_ACCEPT, int(greetTime/time.Second))
		})
		if err == nil && listens == 0 {
			err = errNotListening
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("taking over the listener: %w", err)
	}
	return &acceptor{f, raw, ln.Addr()}, nil
}

func (a *acceptor) Addr() net.Addr { return a.addr }
func (a *acceptor) Close() error   { return a.file.Close() }

func (a *acceptor) Accept() (net.Conn, error) {
	c := &accepted{local: a.addr}
	var err error
	closed := a.raw.Read(func(ln uintptr) bool {
		for {
			c.fd, c.from, err = acceptSocket(int(ln))
			if err != syscall.EINTR && err != syscall.ECONNABORTED {
				return err != syscall.EAGAIN
			}
		}
	})
	switch {
	case closed != nil:
		return nil, net.ErrClosed
	case err != nil:
		return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: a.addr, Err: os.NewSyscallError("accept4", err)}
	}
	return c, nil
}

// accepted is a connection that Go's poller does not know until it has to wait.
type accepted struct {
	local net.Addr
	from  netip.AddrPort

	mu              sync.Mutex // guards what follows
	fd              int        // -1 once closed, taken or polled
	polled          net.Conn   // nil until there was something to wait for
	readBy, writeBy time.Time  // deadlines, for polled
}

func (c *accepted) LocalAddr() net.Addr  { return c.local }
func (c *accepted) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.from) }

func (c *accepted) Read(p []byte) (n int, err error) {
	nc, err := c.try(func(fd int) (err error) {
		if n, err = recv(fd, p); n == 0 && err == nil {
			err = io.EOF
		}
		return err
	})
	if nc != nil {
		return nc.Read(p)
	}
	return n, err
}

func (c *accepted) Write(p []byte) (n int, err error) {
	nc, err := c.try(func(fd int) (err error) {
		if n, err = send(fd, [][]byte{p}); err == nil && n < len(p) {
			err = syscall.EAGAIN
		}
		return err
	})
	if nc != nil {
		m, err := nc.Write(p[n:])
		return n + m, err
	}
	return n, err
}

// try makes a system call that does not block. If there is something to wait for,
// it returns the connection to wait with.
func (c *accepted) try(call func(fd int) error) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.polled != nil {
		return c.polled, nil
	}
	if c.fd < 0 {
		return nil, net.ErrClosed
	}
	if err := call(c.fd); err != syscall.EAGAIN && err != syscall.EINTR {
		return nil, err
	}
	f := os.NewFile(uintptr(c.fd), "")
	defer f.Close() // FileConn duplicates
	c.fd = -1
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	nc.SetReadDeadline(c.readBy)
	nc.SetWriteDeadline(c.writeBy)
	c.polled = nc
	return nc, nil
}

func (c *accepted) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.polled != nil {
		return c.polled.Close()
	}
	if c.fd < 0 {
		return net.ErrClosed
	}
	closeSocket(c.fd)
	c.fd = -1
	return nil
}

// CloseWrite ends our direction, as net/http does behind a refusal.
func (c *accepted) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if nc, ok := c.polled.(*net.TCPConn); ok {
		return nc.CloseWrite()
	}
	return syscall.Shutdown(c.fd, syscall.SHUT_WR)
}

func (c *accepted) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *accepted) SetReadDeadline(t time.Time) error {
	return c.setDeadline(&c.readBy, net.Conn.SetReadDeadline, t)
}

func (c *accepted) SetWriteDeadline(t time.Time) error {
	return c.setDeadline(&c.writeBy, net.Conn.SetWriteDeadline, t)
}

func (c *accepted) setDeadline(by *time.Time, set func(net.Conn, time.Time) error, t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	*by = t
	if c.polled == nil {
		return nil
	}
	return set(c.polled, t)
}

// take gives the descriptor away.
func (c *accepted) take() (fd int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if nc, ok := c.polled.(*net.TCPConn); ok {
		return takeSocket(nc)
	}
	if c.fd < 0 {
		return -1, net.ErrClosed
	}
	fd, c.fd = c.fd, -1
	return fd, nil
}
