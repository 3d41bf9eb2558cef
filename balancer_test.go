package main

import (
	"bufio"
	"crypto/tls"
	"hash/fnv"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// What stands in front of relays.

// balancer is a TCP proxy that looks at heads.
type balancer struct {
	addr string
	pick func(n int, head string) (backend string) // of connection n; "" drops it

	// Set before the first connection.
	request func(head string) string // what the backend gets
	reply   func(head string) string // what the client gets
	idle    time.Duration            // cuts a direction that is silent for so long
	// farewell is what the client gets at the end.
	farewell string

	mu    sync.Mutex
	n     int
	conns []net.Conn
	wg    sync.WaitGroup
}

func startBalancer(t testing.TB, config *tls.Config, pick func(n int, head string) string) *balancer {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{addr: ln.Addr().String(), pick: pick}
	if config != nil {
		ln = tls.NewListener(ln, config)
	}
	b.wg.Go(func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			b.wg.Go(func() { b.serve(b.keep(nc)) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		b.mu.Lock()
		for _, nc := range b.conns {
			nc.Close()
		}
		b.mu.Unlock()
		b.wg.Wait()
	})
	return b
}

func (b *balancer) keep(nc net.Conn) net.Conn {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns = append(b.conns, nc)
	return nc
}

func (b *balancer) serve(client net.Conn) {
	defer client.Close()
	cr := bufio.NewReader(client)
	head, err := readHead(cr)
	if err != nil {
		return
	}
	b.mu.Lock()
	n := b.n
	b.n++
	backend := b.pick(n, head)
	b.mu.Unlock()
	if backend == "" {
		return
	}
	server, err := net.Dial("tcp", backend)
	if err != nil {
		return
	}
	defer b.keep(server).Close()
	if b.request != nil {
		head = b.request(head)
	}
	io.WriteString(server, head)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.pump(server, client, cr, "")
	}()
	sr := bufio.NewReader(server)
	if head, err = readHead(sr); err == nil {
		if b.reply != nil {
			head = b.reply(head)
		}
		io.WriteString(client, head)
		b.pump(client, server, sr, b.farewell)
	}
	client.Close()
	server.Close()
	<-done
}

// pump copies until either end is over, or silent for b.idle.
func (b *balancer) pump(to, from net.Conn, r io.Reader, farewell string) {
	buf := make([]byte, 32<<10)
	for {
		if b.idle > 0 {
			from.SetReadDeadline(time.Now().Add(b.idle))
		}
		n, err := r.Read(buf)
		if n > 0 {
			to.Write(buf[:n])
		}
		if err != nil {
			io.WriteString(to, farewell)
			to.Close()
			return
		}
	}
}

func readHead(r *bufio.Reader) (string, error) {
	var b strings.Builder
	for {
		line, err := r.ReadString('\n')
		b.WriteString(line)
		if err != nil || line == "\r\n" {
			return b.String(), err
		}
	}
}

// without takes a header out of a head.
func without(name string) func(head string) string {
	return func(head string) string {
		lines := strings.SplitAfter(head, "\n")
		lines = slices.DeleteFunc(lines, func(l string) bool {
			return len(l) > len(name) && strings.EqualFold(l[:len(name)], name) && l[len(name)] == ':'
		})
		return strings.Join(lines, "")
	}
}

func always(addr string) func(int, string) string { return func(int, string) string { return addr } }

func inTurn(addrs ...string) func(int, string) string {
	return func(n int, _ string) string { return addrs[n%len(addrs)] }
}

// byServer sticks to a backend for each server-id.
func byServer(addrs ...string) func(int, string) string {
	return func(_ int, head string) string {
		q, err := http.ReadRequest(bufio.NewReader(strings.NewReader(head)))
		if err != nil {
			return ""
		}
		h := fnv.New32a()
		io.WriteString(h, q.Header.Get("X-Pyrycode-Server"))
		return addrs[h.Sum32()%uint32(len(addrs))]
	}
}
