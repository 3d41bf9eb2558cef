package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The way to net/http: the address that the relay listens on, the PROXY header of a
// trusted proxy, TLS and its certificate.

const (
	// addressEvery is how often an address that is not there yet is tried.
	addressEvery = 500 * time.Millisecond
	// certificateEvery is how often the files of the certificate are read. A pair that
	// has changed is taken when it is the same twice, since it may be half written.
	certificateEvery = 10 * time.Second
	// proxyTime is how long a trusted proxy may take for its header, which it sends first.
	proxyTime = 5 * time.Second
	// maxProxyLine is the longest header of version 1, its line end included.
	maxProxyLine = 107
	// maxProxyBlock bounds what follows the 16 bytes of version 2: with them it fits the
	// smallest segment of TCP, as the specification has it.
	maxProxyBlock = 536 - 16
	// maxHelloBytes is what a client may send before its handshake is over: 2 KiB are
	// usual, with a post-quantum key. crypto/tls allows 64 KiB in one message.
	maxHelloBytes = 16 << 10
	// tlsCost is what TLS may cost a connection: 40 KiB for records of 16 KiB that come
	// without a pause, the rest for keys and state. An idle phone has a fifth of it.
	tlsCost = 48 << 10
)

// listen opens a flag's address, and waits for it at boot, when a tunnel's or a bridge's
// may not be there yet: until patience is over, or until stop, which waits for a while,
// reports that the relay is to end. Then there is no listener, and no error.
func listen(flag, addr string, open func(addr string) (net.Listener, error), patience time.Duration,
	stop func(time.Duration) bool, log *slog.Logger) (net.Listener, error) {
	log = log.With("flag", flag, "addr", addr)
	for waited := time.Duration(0); ; waited += addressEvery {
		ln, err := open(addr)
		switch {
		case err == nil:
			if waited > 0 {
				log.Warn("the address exists now", "after", waited)
			}
			return newAcceptor(ln)
		case errors.Is(err, syscall.EADDRINUSE):
			return nil, fmt.Errorf("%s %s is in use by another program: stop that, or choose another address", flag, addr)
		case !errors.Is(err, syscall.EADDRNOTAVAIL):
			return nil, fmt.Errorf("opening %s %s: %w", flag, addr, err)
		case waited >= patience:
			return nil, fmt.Errorf("opening %s %s: no such address on this host for %v: correct it, or start what brings it up first: %w",
				flag, addr, patience, err)
		case waited == 0:
			log.Warn("no such address on this host yet: trying again", "for", patience)
		}
		if stop(addressEvery) {
			return nil, nil
		}
	}
}

// openTCP opens a listener.
func openTCP(addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // it would put a socket of its own before each connection's
	return lc.Listen(context.Background(), "tcp", addr)
}

// newAcceptor is what stands between a listener and net/http; accept_linux.go has one.
var newAcceptor = func(ln net.Listener) (net.Listener, error) { return ln, nil }

// publicListener adds to the listener for peers what comes before a request. Nothing of
// that is done where connections are accepted, so that none waits for another.
func (r *relay) publicListener(ln net.Listener, cert *certificate) net.Listener {
	if cert == nil && !r.o.proxyProtocol {
		return ln
	}
	r.metrics.cert = cert
	l := &publicListener{Listener: ln, relay: r}
	if cert != nil {
		l.tls = &tls.Config{
			GetCertificate:              func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert.current.Load(), nil },
			MinVersion:                  tls.VersionTLS12,
			NextProtos:                  []string{"http/1.1"}, // there is no WebSocket over HTTP/2 here
			DynamicRecordSizingDisabled: true,                 // small records save a phone no round trip, and cost CPU
		}
	}
	return l
}

type publicListener struct {
	net.Listener
	relay *relay
	tls   *tls.Config // nil: plain HTTP
}

func (l *publicListener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if l.relay.o.proxyProtocol {
		nc = &proxied{Conn: nc, relay: l.relay}
	}
	if l.tls != nil {
		w := &wire{Conn: nc, left: maxHelloBytes}
		nc = &tlsConn{Conn: tls.Server(w, l.tls), wire: w, relay: l.relay}
	}
	return nc, nil
}

// closeWrite ends one direction of a connection, where that can be done.
func closeWrite(nc net.Conn) error {
	if h, ok := nc.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return errors.ErrUnsupported
}

// ---- PROXY protocol ----

// proxied is a connection that begins with a PROXY header. It is read when the address
// is first asked for, which is net/http's first step on a connection's own goroutine.
type proxied struct {
	net.Conn
	relay *relay

	once sync.Once // guards what follows
	from net.Addr
	err  error
}

func (c *proxied) RemoteAddr() net.Addr {
	c.once.Do(c.readHeader)
	return c.from
}

func (c *proxied) Read(p []byte) (int, error) {
	if c.once.Do(c.readHeader); c.err != nil {
		return 0, io.EOF // else net/http would answer
	}
	return c.Conn.Read(p)
}

func (c *proxied) CloseWrite() error { return closeWrite(c.Conn) }

func (c *proxied) readHeader() {
	c.from = c.Conn.RemoteAddr()
	c.SetReadDeadline(time.Now().Add(proxyTime))
	var from netip.AddrPort
	if c.err = errors.New("it is not in -trusted-proxies"); within(peerAddr(c.from.String()), c.relay.o.trustedProxies) {
		from, c.err = readProxyHeader(c.Conn)
	}
	if c.err != nil {
		c.relay.metrics.proxyRefused.Add(1)
		c.relay.log.Debug("PROXY header refused", "addr", c.from, "error", c.err)
	} else if from.IsValid() {
		c.from = net.TCPAddrFromAddrPort(from)
	}
}

var errProxyHeader = errors.New("no valid PROXY header (does the proxy send one, of version 1 or 2?)")

// readProxyHeader reads a header of either version, and nothing behind it. The address is
// not valid where the connection is the proxy's own, or it does not know the client
// (haproxy.org/download/3.0/doc/proxy-protocol.txt).
func readProxyHeader(r io.Reader) (from netip.AddrPort, err error) {
	const signature = "\r\n\r\n\x00\r\nQUIT\n"
	var b [16 + maxProxyBlock]byte
	line := b[:len(signature)] // less than the shortest of version 1
	if _, err := io.ReadFull(r, line); err != nil {
		return from, err
	}
	if string(line) == signature {
		if _, err := io.ReadFull(r, b[12:16]); err != nil {
			return from, err
		}
		n := int(b[14])<<8 | int(b[15])
		if n > maxProxyBlock {
			return from, fmt.Errorf("a PROXY header of %d bytes, more than %d", 16+n, len(b))
		}
		block := b[16 : 16+n]
		if _, err := io.ReadFull(r, block); err != nil {
			return from, err
		}
		return parseProxyBlock(b[12], b[13], block)
	}
	for bytes.HasPrefix(line, []byte("PROXY ")) && len(line) < maxProxyLine && line[len(line)-1] != '\n' {
		line = line[:len(line)+1]
		if _, err := io.ReadFull(r, line[len(line)-1:]); err != nil {
			return from, err
		}
	}
	return parseProxyLine(string(line))
}

// parseProxyBlock reads version 2: the addresses, behind which may be more.
func parseProxyBlock(command, family byte, block []byte) (from netip.AddrPort, err error) {
	size := map[byte]int{0x11: 4, 0x21: 16}[family] // of an address: TCP over IPv4, over IPv6
	switch {
	case command == 0x20, command == 0x21 && family == 0: // LOCAL, UNSPEC
		return from, nil
	case command != 0x21 || size == 0 || len(block) < 2*size+4:
		return from, errProxyHeader
	}
	ip, _ := netip.AddrFromSlice(block[:size])
	return netip.AddrPortFrom(ip.Unmap(), uint16(block[2*size])<<8|uint16(block[2*size+1])), nil
}

// parseProxyLine reads version 1.
func parseProxyLine(line string) (from netip.AddrPort, err error) {
	text, ended := strings.CutSuffix(line, "\r\n")
	f := strings.Split(text, " ")
	switch {
	case ended && len(f) > 1 && f[0] == "PROXY" && f[1] == "UNKNOWN":
		return from, nil
	case !ended || len(f) != 6 || f[0] != "PROXY" || f[1] != "TCP4" && f[1] != "TCP6":
		return from, errProxyHeader
	}
	var ends [2]netip.AddrPort
	for i := range ends {
		ip, err := netip.ParseAddr(f[2+i])
		port, portErr := strconv.ParseUint(f[4+i], 10, 16)
		if err != nil || portErr != nil || ip.Zone() != "" || ip.Is4() != (f[1] == "TCP4") {
			return from, errProxyHeader
		}
		ends[i] = netip.AddrPortFrom(ip.Unmap(), uint16(port))
	}
	return ends[0], nil
}

// ---- TLS ----

// tlsConn is a connection that net/http and the pollers use like a TCP one. The handshake
// is in the first Read, so that net/http's deadline for a request covers both.
type tlsConn struct {
	*tls.Conn
	wire  *wire
	relay *relay
	open  bool // the handshake is over; owned by the reader
}

func (c *tlsConn) Read(p []byte) (int, error) {
	if !c.open {
		if err := c.handshake(); err != nil {
			return 0, io.EOF // else net/http would answer
		}
	}
	return c.Conn.Read(p)
}

func (c *tlsConn) handshake() error {
	c.SetWriteDeadline(time.Now().Add(greetTime)) // net/http sets its own behind a request
	err := c.Handshake()
	if err != nil {
		c.relay.metrics.tlsFailures.Add(1)
		c.relay.log.Debug("TLS handshake failed", "addr", c.RemoteAddr(), "error", err)
		if e, ok := errors.AsType[tls.RecordHeaderError](err); ok && e.Conn != nil && string(e.RecordHeader[:]) == "GET /" {
			io.WriteString(e.Conn, "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"+
				"Cache-Control: no-store\r\nConnection: close\r\n\r\nthis port speaks TLS: use wss:// or https://\n")
		}
		return err
	}
	c.open, c.wire.left = true, -1
	return nil
}

// Close does not say goodbye: it would wait for a peer that takes nothing.
func (c *tlsConn) Close() error { return c.wire.Close() }

// CloseWrite ends our direction of TLS, then of TCP. A peer too slow for the goodbye, to
// which crypto/tls gives 5 s, still gets what is on its way.
func (c *tlsConn) CloseWrite() error {
	c.Conn.CloseWrite()
	return closeWrite(c.wire.Conn)
}

// wire is what lies under TLS.
type wire struct {
	net.Conn     // a poller that does not wait puts its own here
	left     int // bytes that the client may still send before the handshake is over, or -1; owned by the reader
}

func (w *wire) Read(p []byte) (int, error) {
	if w.left < 0 {
		return w.Conn.Read(p)
	}
	if w.left == 0 {
		return 0, fmt.Errorf("a handshake of more than %d bytes", maxHelloBytes)
	}
	n, err := w.Conn.Read(p[:min(len(p), w.left)])
	w.left -= n
	return n, err
}

// certificate is the pair of -tls-cert and -tls-key.
type certificate struct {
	certFile, keyFile string
	log               keptLog // what it keeps holds until a pair is taken

	current  atomic.Pointer[tls.Certificate]
	failures atomic.Int64 // to take a pair that has changed

	// Owned by watch.
	taken, seen string // what the files had when they were last tried, and at the last look
}

// openCertificate reads the pair for the first time. Without one it is nil.
func openCertificate(o options, log keptLog) (*certificate, error) {
	switch {
	case (o.tlsCert == "") != (o.tlsKey == ""):
		return nil, errors.New("-tls-cert and -tls-key go together: set both, or neither")
	case o.tlsCert == "":
		return nil, nil
	}
	c := &certificate{certFile: o.tlsCert, keyFile: o.tlsKey, log: log}
	pair, content, err := c.read()
	if err == nil {
		c.take(pair)
	}
	c.taken = content
	return c, err
}

// watch takes the pair when its files change, and on each hangup, within reload, until
// stop is called.
func (c *certificate) watch(hangups <-chan os.Signal, reload func(do func())) (stop func()) {
	return repeat(certificateEvery, hangups, func(hangup bool) {
		if hangup {
			reload(func() { c.look(true) })
		} else {
			c.look(false)
		}
	})
}

// look takes the pair if it has changed and is whole, or, where it is asked to, as it is.
// One that is no good does not replace the one that there is.
func (c *certificate) look(asked bool) {
	c.checkDates()
	pair, content, err := c.read()
	whole := content == c.seen
	if c.seen = content; !asked && (!whole || content == c.taken) {
		return
	}
	if c.taken = content; err != nil {
		c.failures.Add(1)
		c.log.Warn("the certificate was not replaced: "+err.Error(), "not_after", c.current.Load().Leaf.NotAfter)
		return
	}
	c.take(pair)
	c.log.Info("certificate read again", "not_after", pair.Leaf.NotAfter)
}

// read reads and checks both files, wherever links lead by now. Where two readings find
// the same they have the same content.
func (c *certificate) read() (pair tls.Certificate, content string, err error) {
	cert, certErr := os.ReadFile(c.certFile)
	key, err := os.ReadFile(c.keyFile)
	info, _ := os.Stat(c.keyFile)
	if err = cmp.Or(certErr, err); err != nil {
		err = fmt.Errorf("reading -tls-cert and -tls-key as uid %d, gid %d: %w", os.Getuid(), os.Getgid(), err)
	} else if info != nil && info.Mode()&0o007 != 0 && runtime.GOOS != "windows" { // where these bits say nothing
		err = fmt.Errorf("-tls-key %s is open to every user of this host (mode %04o): chmod o= %[1]s", c.keyFile, info.Mode().Perm())
	} else if pair, err = tls.X509KeyPair(cert, key); err != nil {
		err = fmt.Errorf("-tls-cert %s and -tls-key %s are no pair: %w (want the certificate with its chain, and its key, both PEM)",
			c.certFile, c.keyFile, err)
	}
	return pair, fmt.Sprint(sha256.Sum256(cert), sha256.Sum256(key), err), err
}

// take makes the pair the one that clients see from now on.
func (c *certificate) take(pair tls.Certificate) {
	c.log.kept.Store(nil)
	c.current.Store(&pair)
	c.checkDates()
}

// checkDates warns, once, that the certificate is over, or has not begun.
func (c *certificate) checkDates() {
	now, leaf := time.Now(), c.current.Load().Leaf
	if (now.Before(leaf.NotBefore) || now.After(leaf.NotAfter)) && c.log.kept.Load() == nil {
		c.log.Warn("the certificate is not valid at this time, so that no peer connects: renew it, or correct the clock",
			"not_before", leaf.NotBefore, "not_after", leaf.NotAfter)
	}
}

// name is one that the certificate is for.
func (c *certificate) name() string {
	return append(slices.Clip(c.current.Load().Leaf.DNSNames), "NAME")[0]
}

// state is for metrics; without a certificate it is 0.
func (c *certificate) state() (notAfter, failures int64) {
	if c == nil {
		return 0, 0
	}
	return c.current.Load().Leaf.NotAfter.Unix(), c.failures.Load()
}
