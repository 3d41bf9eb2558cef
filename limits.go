package main

import (
	"container/list"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// What bounds strangers: a client's address (behind proxies too), how often an
// address may ask, how many connections there are, and what a request may be.

const (
	// maxAddresses bounds the table of token buckets: 65,536 addresses are 4 MiB.
	maxAddresses = 1 << 16
	// maxWaiting bounds connections that have not been taken to a session:
	// those that have said nothing yet, and those that net/http serves.
	maxWaiting = 1024
	// maxUntrusted bounds the peers whose X-Forwarded-For is said to be ignored. A
	// proxy is among the first to come.
	maxUntrusted = 64
	// evictLooks is how many of a full table are looked at for one to go.
	evictLooks = 8
	// maxHeadLines is the most lines of a request's head: a phone's has about 10, and
	// proxies add 10. With maxHeadBytes it bounds what a request that is sent in drops
	// costs: 24 KiB, of them 8 KiB the buffers of net/http.
	maxHeadLines = 100
	// maxHeadBytes is what http.Server.MaxHeaderBytes stands for: it adds 4 KiB.
	maxHeadBytes = 8 << 10
	// lingerTime is how long a refused peer may take to read why.
	lingerTime = 500 * time.Millisecond
	// greetTime is how long a connection may take to make its request.
	greetTime = 10 * time.Second
	// linesPerSecond is what a logGate lets through: enough to see the cause.
	linesPerSecond = 5
)

// rates are token buckets, one for each address, kept as the moment at which the
// bucket is full again (the generic cell rate algorithm): one number each, and
// a bucket that is full need not be remembered. The zero value lets all through.
type rates struct {
	now      func() time.Time
	start    time.Time
	interval int64 // nanoseconds for one token
	slack    int64 // nanoseconds by which a bucket may be behind: burst-1 tokens

	mu    sync.Mutex           // guards what follows
	seen  map[netip.Addr]int64 // nanoseconds after start at which the bucket is full
	swept int64                // nanoseconds after start
}

func newRates(o options, now func() time.Time) *rates {
	if o.ratePerMinute == 0 {
		return new(rates)
	}
	interval := int64(time.Minute) / int64(o.ratePerMinute)
	return &rates{now: now, start: now(), interval: interval, slack: interval * int64(o.rateBurst-1), seen: map[netip.Addr]int64{}}
}

func (r *rates) allow(addr netip.Addr) (ok bool, wait time.Duration) {
	if r.interval == 0 {
		return true, 0
	}
	key := rateKey(addr)
	r.mu.Lock()
	defer r.mu.Unlock()
	now := int64(r.now().Sub(r.start))
	// A bucket needs this long to fill, so a pass in each such time finds all
	// that can be forgotten.
	if now-r.swept > r.slack+r.interval {
		r.swept = now
		for k, full := range r.seen {
			if full <= now {
				delete(r.seen, k)
			}
		}
	}
	full, known := r.seen[key]
	full = max(full, now)
	if late := full - now - r.slack; late > 0 {
		return false, time.Duration(late)
	}
	if !known && len(r.seen) >= maxAddresses {
		r.evict()
	}
	r.seen[key] = full + r.interval
	return true, 0
}

// evict makes room in a full table, mu held: of a few buckets the fullest goes,
// which forgives least. Buckets don't slow down a stranger that commands so many
// addresses; but it must not lock out all others.
func (r *rates) evict() {
	victim, _ := stalest(r.seen, func(full int64) int64 { return full })
	delete(r.seen, victim)
}

// stalest picks the entry of a full table that has to go: of a few, in random
// order, the one whose time is the earliest. ok is false if the table is empty.
func stalest[K comparable, V any](table map[K]V, when func(V) int64) (victim K, ok bool) {
	var earliest int64
	looked := 0
	for k, v := range table {
		if at := when(v); !ok || at < earliest {
			victim, earliest, ok = k, at, true
		}
		if looked++; looked == evictLooks {
			break
		}
	}
	return victim, ok
}

// rateKey is what shares a bucket: an IPv4 address, or an IPv6 /64, which is
// what one household has.
func rateKey(a netip.Addr) netip.Addr {
	a = a.Unmap().WithZone("")
	if a.Is6() {
		p, _ := a.Prefix(64) // 64 fits
		return p.Addr()
	}
	return a
}

// clientAddr is the address that a request comes from. A trusted peer is
// believed in its X-Forwarded-For: of the addresses there the right-most that is
// not itself trusted, since the client may have made up everything left of it.
// Where an entry is no address, the proxy that passed it on is the client.
func clientAddr(q *http.Request, trusted []netip.Prefix) netip.Addr {
	addr := peerAddr(q.RemoteAddr)
	for _, line := range slices.Backward(q.Header["X-Forwarded-For"]) {
		for end := len(line); end > 0 && within(addr, trusted); {
			comma := strings.LastIndexByte(line[:end], ',')
			hop, ok := parseHop(strings.TrimSpace(line[comma+1 : end]))
			if !ok {
				return addr
			}
			addr, end = hop, comma
		}
	}
	return addr
}

// peerAddr is the other end of a connection: a client, or a proxy.
func peerAddr(remote string) netip.Addr {
	ap, _ := netip.ParseAddrPort(remote)
	return ap.Addr().Unmap().WithZone("") // Contains matches no address with a zone
}

// untrusted are peers that send X-Forwarded-For and are not believed. Where one is
// a proxy, all that come through it share its bucket, and nothing else says why.
// The zero value works.
type untrusted struct {
	mu   sync.Mutex // guards what follows
	said []netip.Addr
}

// first reports whether peer has not been reported yet, and notes it.
func (u *untrusted) first(peer netip.Addr) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	key := rateKey(peer)
	if len(u.said) >= maxUntrusted || slices.Contains(u.said, key) {
		return false
	}
	u.said = append(u.said, key)
	return true
}

func within(a netip.Addr, nets []netip.Prefix) bool {
	return slices.ContainsFunc(nets, func(n netip.Prefix) bool { return n.Contains(a) })
}

// parseHop reads an address as proxies write it, with a port or without. A zone
// means nothing away from the host that named it.
func parseHop(s string) (netip.Addr, bool) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.Addr().Unmap().WithZone(""), true
	}
	if inner, ok := strings.CutPrefix(s, "["); ok {
		s = strings.TrimSuffix(inner, "]")
	}
	a, err := netip.ParseAddr(s)
	return a.Unmap().WithZone(""), err == nil
}

// httpListener is the listener of net/http. It bounds what a request may be, keeps
// net/http at maxWaiting connections that are no session, and has it go on where a
// connection can't be accepted.
type httpListener struct {
	net.Listener
	log  *slog.Logger
	said time.Time      // owned by the goroutine that accepts
	here sync.WaitGroup // connections that net/http has

	mu   sync.Mutex // guards what follows
	line list.List  // of *httpConn, the longest waiting in front
}

// Accept fails for good only where the listening socket is no good. All else that
// accept(2) has passes: descriptors, memory, a network or firewall that is in the way.
func (l *httpListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	is := func(errno syscall.Errno) bool { return errors.Is(err, errno) }
	switch {
	case err == nil:
		return &httpConn{Conn: nc}, nil
	case errors.Is(err, net.ErrClosed), is(syscall.EBADF), is(syscall.EINVAL), is(syscall.ENOTSOCK):
		return nil, err
	case time.Since(l.said) >= time.Minute:
		l.said = time.Now()
		remedy := "see what is short on this host"
		if is(syscall.EMFILE) || is(syscall.ENFILE) {
			remedy = "raise the limit of open files (ulimit -n, LimitNOFILE=) or lower -max-connections"
		}
		l.log.Warn("accepting connections fails: newcomers wait until it is tried again", "addr", l.Addr(), "error", err, "remedy", remedy)
	}
	return nil, passingError{err}
}

// passingError has net/http try again after a pause, of a second at the most.
type passingError struct{ error }

func (passingError) Timeout() bool   { return false }
func (passingError) Temporary() bool { return true }

// track is an http.Server's ConnState hook. A newcomer displaces the one that has
// waited for the longest for its request to be complete, however often that has sent
// a byte of it: strangers that dawdle must not lock others out.
func (l *httpListener) track(nc net.Conn, s http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch c := nc.(*httpConn); s {
	case http.StateNew:
		if l.line.Len() >= maxWaiting {
			l.line.Remove(l.line.Front()).(*httpConn).Close()
		}
		c.place = l.line.PushBack(c)
		l.here.Add(1)
	case http.StateIdle: // its request was answered
		l.line.MoveToBack(c.place) // if it is still there
	case http.StateHijacked, http.StateClosed:
		l.line.Remove(c.place)
		l.here.Done()
	}
}

// httpConn is a connection that net/http serves. It counts the lines of a head,
// since net/http bounds its bytes only, and a line of four costs a hundred.
type httpConn struct {
	net.Conn
	place *list.Element // in the line of httpListener, whose mu guards it

	// Owned by the goroutine that reads.
	lines int  // of the head that is being read
	text  bool // the line that is being read is not empty
	full  bool // the head goes on behind maxHeadLines
}

func (c *httpConn) Read(p []byte) (int, error) {
	switch {
	case c.full || c.lines > maxHeadLines:
		c.refuse()
		return 0, io.EOF
	case len(p) == 1 && c.lines == 0 && !c.text:
		// Behind a request net/http waits for one byte, so that a handler learns early
		// that the peer has left. No handler here takes long enough to want to know.
		return 0, os.ErrDeadlineExceeded
	}
	n, err := c.Conn.Read(p)
	ended := false
	for i, b := range p[:n] {
		switch {
		case b == '\r':
		case b != '\n':
			// What follows a head may be a session's bytes, which have no lines: if
			// it is a head, the next Read refuses the rest of it.
			if c.lines == maxHeadLines && !c.text && !ended {
				if c.full = true; i == 0 {
					c.refuse()
					return 0, io.EOF
				}
				return i, nil
			}
			c.text = true
		case c.text:
			c.text = false
			c.lines++
		case c.lines > 0:
			c.lines, ended = 0, true
		}
	}
	return n, err
}

// refuse answers a head of too many lines as net/http would one of too many bytes.
func (c *httpConn) refuse() {
	io.WriteString(c.Conn, "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: text/plain; charset=utf-8\r\n"+
		"Cache-Control: no-store\r\nConnection: close\r\n\r\nthe request has too many header lines\n")
	c.CloseWrite()
	// Closed with bytes unread, the connection would be reset and the answer lost.
	c.SetReadDeadline(time.Now().Add(lingerTime))
	io.CopyN(io.Discard, c.Conn, maxHeadBytes)
}

// CloseWrite is for net/http, which waits behind it as refuse does.
func (c *httpConn) CloseWrite() error { return closeWrite(c.Conn) }

// logGate lets linesPerSecond through: what a stranger can cause at will must not
// fill a disk. The zero value works.
type logGate struct {
	mu      sync.Mutex // guards what follows
	since   int64      // relay clock of the second that is counted
	lines   int
	skipped int
}

// allow reports whether a line may be written, and how many were not since the
// last one that was.
func (g *logGate) allow(now int64) (skipped int, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.since == 0 || now-g.since >= int64(time.Second) {
		g.since, g.lines = now, 0
	}
	if g.lines >= linesPerSecond {
		g.skipped++
		return 0, false
	}
	g.lines++
	skipped, g.skipped = g.skipped, 0
	return skipped, true
}
