//go:build !386

package main

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// The poller of Linux: an epoll loop reads and writes its connections itself.
// Against a goroutine for each, an idle connection holds no stack, no netFD and
// no runtime timer, and a frame crosses from socket to socket without a switch.

const (
	// readSize is what a loop reads in one go: enough to make the system call
	// cheap beside the bytes, small enough to stay in the second-level cache.
	readSize = 64 << 10
	// roundReads is how many bufferfuls all that have more to read get between two
	// looks at the others: however many flood the relay, nobody waits for all of them.
	roundReads = 32
	// mostReads is how many of these one gets at once if few want any. What it
	// sends to the same peer then shares a write: with one bufferful at a time
	// frames of 4 KiB to eight phones cost twice as much.
	mostReads = 8
	// epollEvents is how many connections one wake-up may serve before the
	// batch is flushed.
	epollEvents = 128
	// mostUnsent is what the kernel may hold for a binary beyond what is under way
	// to it. Left alone it takes megabytes, which phones that flood a binary fill,
	// and in which every frame of another phone stands in line.
	mostUnsent = 32 << 10
	// tcpNotSentLowAt is TCP_NOTSENT_LOWAT (tcp(7)), which package syscall lacks.
	tcpNotSentLowAt = 25
	// crowdFor is how long after an upgrade net/http is taken to have work.
	crowdFor = 100 * time.Millisecond
	// edgeTriggered is EPOLLET, which package syscall has as a negative number
	// on some architectures.
	edgeTriggered = 1 << 31
)

// kernel is what a loop asks of the system. Nothing but wait blocks.
type kernel interface {
	// limitUnsent bounds by mostUnsent what is held of what is sent to fd.
	limitUnsent(fd int)
	// watch makes wait tell of fd: of both directions, edge-triggered, so that nothing
	// has to be changed later on.
	watch(fd int) error
	// wait fills told, and waits for something to tell if it may. crowd says that
	// other goroutines have as much to do.
	wait(told []syscall.EpollEvent, may, crowd bool) (int, error)
	// wake ends the wait, or the next one.
	wake()
	recv(fd int, p []byte) (int, error)
	send(fd int, bufs [][]byte) (int, error)
	shutdown(fd, how int)
	close(fd int)
	// stop closes what wait needs.
	stop()
}

// epollLoop owns its connections' file descriptors: it alone reads and closes
// them. Others write to and shut down a descriptor under the connection's mu,
// which the loop takes to close it.
type epollLoop struct {
	relay  *relay
	kernel kernel
	done   chan struct{}

	sleeping   atomic.Bool  // the loop is about to wait, or waits
	attachedAt atomic.Int64 // relay clock of the latest attach

	mu       sync.Mutex // guards what follows
	conns    []*conn    // by file descriptor
	live     int        // of conns
	inbox    []*conn    // resumed by others
	turns    bool       // since turned was last called
	stopping bool

	// Owned by the loop.
	buf   []byte
	told  []syscall.EpollEvent
	ready []*conn // may have more to read; edge-triggered epoll will not say so again
	share int     // bufferfuls for each in this round
	batch writeBatch
}

// epollSocket is a connection's place in its loop.
type epollSocket struct {
	loop *epollLoop
	c    *conn
	fd   int     // -1 once closed; written by the loop under c.mu
	tls  *sealed // nil without TLS

	attached bool // guarded by loop.mu

	// Owned by the loop.
	hup  bool // epoll told of an end behind the bytes
	busy bool // in loop.ready
}

func init() { newPoller = newEpollLoop }

// newEpollLoop starts a loop, which serves until stop.
func newEpollLoop(r *relay) (poller, error) {
	set, err := newEpollSet()
	if err != nil {
		return nil, err
	}
	l := makeEpollLoop(r, set)
	go l.run()
	return l, nil
}

func makeEpollLoop(r *relay, k kernel) *epollLoop {
	l := &epollLoop{relay: r, kernel: k, done: make(chan struct{}), buf: make([]byte, readSize), told: make([]syscall.EpollEvent, epollEvents)}
	l.batch.relay = r
	return l
}

// bind gives c a socket out of nc, which it takes over.
func (l *epollLoop) bind(c *conn, nc net.Conn) error {
	fd, err := -1, error(nil)
	switch nc := nc.(type) {
	case *accepted:
		fd, err = nc.take()
	case *net.TCPConn:
		fd, err = takeSocket(nc)
	case *proxied: // its header is read
		return l.bind(c, nc.Conn)
	case *tlsConn:
		err := l.bind(c, nc.wire.Conn)
		s, ok := c.sock.(*epollSocket)
		if err == nil && !ok {
			return l.relay.fallback.bind(c, nc)
		}
		if err == nil {
			s.tls = &sealed{tls: nc.Conn, sock: s}
			nc.wire.Conn = s.tls
		}
		return err
	default:
		return l.relay.fallback.bind(c, nc)
	}
	if err != nil {
		return fmt.Errorf("taking over a socket: %w", err)
	}
	if c.passing == priorityBinary {
		l.kernel.limitUnsent(fd)
	}
	c.sock = &epollSocket{loop: l, c: c, fd: fd}
	return nil
}

// attach starts the reading of a bound connection. first is what arrived
// behind its handshake.
func (s *epollSocket) attach(first []byte) {
	l, c := s.loop, s.c
	// What was read ahead comes first, be it in TLS.
	c.paused.Store(len(first) > 0 || s.tls != nil)
	if len(first) > 0 {
		c.unparsed = &buffer{b: first, w: len(first), size: -1}
		l.relay.buffers.budget.take(len(first), priorityAlways)
	}
	l.mu.Lock()
	s.attached = true
	for s.fd >= len(l.conns) {
		l.conns = append(l.conns, make([]*conn, 256)...)
	}
	l.conns[s.fd] = c
	l.live++
	err := l.kernel.watch(s.fd)
	if err != nil {
		s.hup = true
		c.paused.Store(true)
	}
	l.attachedAt.Store(c.opened)
	post := c.paused.Load()
	l.mu.Unlock() // from here on the loop owns them
	if err != nil {
		l.relay.log.Error("watching a socket failed", "error", err)
		c.fail()
	}
	if post {
		l.post(s)
	}
}

// post makes the loop go on reading a paused connection.
func (l *epollLoop) post(s *epollSocket) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.attached { // else the loop may have ended
		l.inbox = append(l.inbox, s.c)
		if l.sleeping.Swap(false) {
			l.kernel.wake()
		}
	}
}

// turned is poller's.
func (l *epollLoop) turned() (turned bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	turned, l.turns = l.turns || l.stopping, false
	if !l.stopping { // else it may have ended
		l.kernel.wake()
	}
	return turned
}

// stop ends the loop once its connections are gone, and waits for that.
func (l *epollLoop) stop() {
	l.mu.Lock()
	l.stopping = true
	l.mu.Unlock()
	l.kernel.wake()
	<-l.done
	l.kernel.stop()
}

func (l *epollLoop) run() {
	defer close(l.done)
	for {
		idle, stop := l.idle()
		if stop {
			return
		}
		l.turn(idle)
	}
}

// turn serves what the kernel has to tell, and waits for that if it may.
func (l *epollLoop) turn(idle bool) {
	w := &l.batch
	n, err := l.kernel.wait(l.told, idle, w.now-l.attachedAt.Load() < int64(crowdFor))
	if err != nil && err != syscall.EINTR {
		// Cannot happen with an epoll set of our own.
		l.relay.log.Error("waiting for sockets failed", "error", err)
	}
	l.sleeping.Store(false)
	l.share = min(max(1, roundReads/max(1, n+len(l.ready))), mostReads)
	w.now = l.relay.now()
	for i := range n {
		l.serve(&l.told[i])
	}
	l.mu.Lock()
	posted := l.inbox
	l.inbox = nil
	l.turns = true
	l.mu.Unlock()
	for _, c := range posted {
		c.unpause(w)
		l.read(c)
	}
	l.readOn()
	w.flush()
}

// idle reports whether the loop has nothing left to do, and whether it is to end.
func (l *epollLoop) idle() (idle, stop bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.inbox) > 0 || len(l.ready) > 0 {
		return false, false
	}
	l.sleeping.Store(true)
	return true, l.live == 0 && l.stopping
}

func (l *epollLoop) serve(ev *syscall.EpollEvent) {
	var c *conn
	l.mu.Lock()
	if int(ev.Fd) < len(l.conns) {
		c = l.conns[ev.Fd]
	}
	l.mu.Unlock()
	if c == nil {
		return // closed earlier in this round
	}
	s := c.sock.(*epollSocket)
	const gone = syscall.EPOLLRDHUP | syscall.EPOLLHUP | syscall.EPOLLERR
	if ev.Events&gone != 0 {
		s.hup = true
	}
	if ev.Events&(syscall.EPOLLOUT|syscall.EPOLLERR|syscall.EPOLLHUP) != 0 {
		s.unsent()
		c.writable(&l.batch)
	}
	if ev.Events&(syscall.EPOLLIN|gone) != 0 && !s.busy { // else its turn comes
		l.read(c)
	}
}

// read feeds c what its socket has, up to its share: for more it waits its turn.
func (l *epollLoop) read(c *conn) {
	s := c.sock.(*epollSocket)
	if s.fd < 0 {
		return
	}
	w := &l.batch
	if s.tls != nil {
		s.tls.empty = false
	}
	for range l.share {
		if c.paused.Load() {
			return
		}
		into := c.readInto(l.buf)
		n, err := s.recv(into)
		switch {
		case err == syscall.EAGAIN:
			return
		case err == syscall.EINTR:
			continue
		case err != nil || n == 0:
			if err != nil || !c.owes(w) {
				l.free(c, s)
			}
			return
		}
		c.receive(w, into[:n])
		c.markAlive(w)
		// Less than there was room for: the socket is empty (epoll(7)), unless
		// the end of the stream is behind it, or this was one record of TLS.
		if n < len(into) && !s.hup && s.tls == nil {
			return
		}
	}
	if !s.busy {
		s.busy = true
		l.ready = append(l.ready, c)
	}
}

// readOn gives those of l.ready that have waited longest their turn.
func (l *epollLoop) readOn() {
	var turn [roundReads]*conn
	n := copy(turn[:roundReads/l.share], l.ready)
	l.ready = slices.Delete(l.ready, 0, n)
	for _, c := range turn[:n] {
		c.sock.(*epollSocket).busy = false
		l.read(c)
	}
}

// free closes c's socket and forgets it.
func (l *epollLoop) free(c *conn, s *epollSocket) {
	l.mu.Lock()
	l.conns[s.fd] = nil
	if l.live--; l.live == 0 {
		l.conns = nil // as long as the highest descriptor there was
	}
	s.attached = false
	l.mu.Unlock()
	c.free(&l.batch)
	c.mu.Lock()
	fd := s.fd
	if s.unsent() {
		s.tls.freeLocked() // nobody else writes any more
	}
	s.fd = -1
	c.mu.Unlock()
	l.kernel.close(fd)
}

// recv takes what is there.
func (s *epollSocket) recv(p []byte) (int, error) {
	if s.tls != nil {
		return s.tls.recv(p)
	}
	s.loop.relay.metrics.socketReads.Add(1)
	return s.loop.kernel.recv(s.fd, p)
}

// write is socket's. The caller holds c.mu.
func (s *epollSocket) write(bufs [][]byte) (int, error) {
	switch {
	case s.fd < 0:
		return 0, net.ErrClosed
	case s.tls != nil:
		return s.tls.write(bufs)
	}
	return s.send(bufs)
}

func (s *epollSocket) send(bufs [][]byte) (int, error) {
	total := 0
	for _, b := range bufs {
		total += len(b)
	}
	for {
		s.loop.relay.metrics.socketWrites.Add(1)
		n, err := s.loop.kernel.send(s.fd, bufs)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN, err == nil && n < total:
			return n, errAgain
		}
		return n, err
	}
}

// unsent is socket's, as the following are.
func (s *epollSocket) unsent() bool { return s.tls != nil && s.tls.unsent() }

func (s *epollSocket) closeWrite() {
	if s.fd >= 0 && (s.tls == nil || s.tls.closeWrite()) {
		s.loop.kernel.shutdown(s.fd, syscall.SHUT_WR)
	}
}

func (s *epollSocket) shutdown() {
	if s.fd >= 0 {
		s.loop.kernel.shutdown(s.fd, syscall.SHUT_RDWR)
	}
}

func (s *epollSocket) resume() { s.loop.post(s) }

// ---- TLS ----

// maxRecord is what a record of TLS holds (RFC 8446 §5.1).
const maxRecord = 16 << 10

// records are where small pieces are put together.
var records = sync.Pool{New: func() any { return new([maxRecord]byte) }}

// sealed is TLS on a loop's socket. crypto/tls has it in place of a connection: it reads
// what is there, and keeps what the socket does not take. That is one record, since the
// next is not encrypted before, and now and then an answer to a key update.
type sealed struct {
	net.Conn // none: crypto/tls calls what is here
	tls      *tls.Conn
	sock     *epollSocket
	empty    bool // the socket had less than was asked for; owned by the loop

	mu     sync.Mutex // guards what follows; taken after the connection's, and those of crypto/tls
	staged *buffer    // encrypted, and not sent yet; nil for nothing
	ending bool       // our direction of TCP ends behind staged
}

// recv decrypts what is there. What ends the stream comes again behind its last bytes.
func (t *sealed) recv(p []byte) (int, error) {
	n, err := t.tls.Read(p)
	switch {
	case n > 0:
		err = nil
	case err == os.ErrDeadlineExceeded:
		err = syscall.EAGAIN
	case err == io.EOF:
		err = nil
	}
	return n, err
}

// Read is crypto/tls's, which goes on after this error as it does after a deadline.
func (t *sealed) Read(p []byte) (int, error) {
	if t.empty {
		return 0, os.ErrDeadlineExceeded
	}
	t.sock.loop.relay.metrics.socketReads.Add(1)
	n, err := t.sock.loop.kernel.recv(t.sock.fd, p)
	switch {
	case err == syscall.EAGAIN:
		return 0, os.ErrDeadlineExceeded
	case err == syscall.EINTR:
		return 0, nil
	case err == nil && n == 0:
		return 0, io.EOF
	}
	t.empty = n < len(p) && !t.sock.hup
	return n, err
}

// write encrypts as much of bufs as the socket takes.
func (t *sealed) write(bufs [][]byte) (n int, err error) {
	record := records.Get().(*[maxRecord]byte)
	defer records.Put(record)
	for i, at := 0, 0; i < len(bufs) && !t.unsent(); {
		piece := bufs[i][at:]
		if len(piece) < maxRecord {
			piece = record[:0]
			for i < len(bufs) && len(piece) < maxRecord {
				k := copy(record[len(piece):], bufs[i][at:])
				piece = record[:len(piece)+k]
				if at += k; at == len(bufs[i]) {
					i, at = i+1, 0
				}
			}
		} else {
			piece = piece[:maxRecord]
			at += maxRecord
		}
		if _, err := t.tls.Write(piece); err != nil {
			return n, err
		}
		n += len(piece)
	}
	if t.unsent() {
		err = errAgain
	}
	return n, err
}

// Write is crypto/tls's.
func (t *sealed) Write(p []byte) (n int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	have := 0
	if t.staged != nil {
		have, err = len(t.staged.bytes()), errAgain
	} else {
		n, err = t.sock.send([][]byte{p})
	}
	switch rest := p[n:]; {
	case err != errAgain:
		return n, err
	case have+len(rest) > 2*maxRecord:
		return n, errors.New("the peer asks for answers and takes none")
	default:
		t.staged = t.sock.loop.relay.buffers.grow(t.staged, have+len(rest), priorityAlways)
		t.staged.w += copy(t.staged.b[t.staged.w:], rest)
	}
	return len(p), nil
}

// closeWrite ends our direction of TLS, and reports whether that is out: else TCP's ends
// once it is.
func (t *sealed) closeWrite() bool {
	t.tls.CloseWrite()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ending = t.staged != nil
	return !t.ending
}

func (t *sealed) SetWriteDeadline(time.Time) error { return nil } // a Write does not wait

// unsent sends what is staged, and reports whether there is more.
func (t *sealed) unsent() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.staged != nil {
		n, _ := t.sock.send([][]byte{t.staged.bytes()}) // what fails is found by the loop that reads
		if t.staged.r += n; t.staged.r == t.staged.w {
			if t.freeLocked(); t.ending {
				t.sock.loop.kernel.shutdown(t.sock.fd, syscall.SHUT_WR)
			}
		}
	}
	return t.staged != nil
}

func (t *sealed) freeLocked() {
	t.sock.loop.relay.buffers.put(t.staged)
	t.staged = nil
}

// ---- waiting ----

// epollSet is Linux as a kernel.
//
// In epoll_wait a loop keeps a thread and a processor of Go's, which the runtime takes
// away again and again as long as net/http has work: an upgrade costs a fifth more.
// In a crowd the loop therefore waits in Go's own poller, for its whole epoll set.
// With nobody else there that wait costs twice as much.
type epollSet struct {
	epfd int
	bell int // an eventfd in the set: a write to it is an event

	// Owned by the loop.
	told   []syscall.EpollEvent // of the wait under way
	n      int                  // of told, by the last take
	err    error                // of the last take
	take   func(uintptr) bool   // takes what epoll has to tell; for raw
	nested *os.File             // of epfd, in Go's poller; nil while it is not there
	raw    syscall.RawConn      // of nested
}

func newEpollSet() (*epollSet, error) {
	s := new(epollSet)
	s.take = func(uintptr) bool {
		s.n, s.err = call(syscall.SYS_EPOLL_PWAIT, s.epfd, unsafe.Pointer(unsafe.SliceData(s.told)), len(s.told), 0)
		return s.n > 0 || s.err != nil
	}
	var err error
	if s.epfd, err = syscall.EpollCreate1(syscall.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("creating an epoll set: %w", err)
	}
	bell, _, errno := syscall.RawSyscall(syscall.SYS_EVENTFD2, 0, syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if errno != 0 {
		closeSocket(s.epfd)
		return nil, fmt.Errorf("creating what wakes an epoll set: %w", errno)
	}
	s.bell = int(bell)
	if err = s.watch(s.bell); err != nil {
		s.stop()
		return nil, fmt.Errorf("watching what wakes an epoll set: %w", err)
	}
	return s, nil
}

func (s *epollSet) watch(fd int) error {
	ev := syscall.EpollEvent{Events: syscall.EPOLLIN | syscall.EPOLLOUT | syscall.EPOLLRDHUP | edgeTriggered, Fd: int32(fd)}
	return syscall.EpollCtl(s.epfd, syscall.EPOLL_CTL_ADD, fd, &ev)
}

// wake's every write is an event of its own to an edge-triggered set, so that nothing
// has to be read.
func (s *epollSet) wake() {
	one := uint64(1)
	syscall.RawSyscall(syscall.SYS_WRITE, uintptr(s.bell), uintptr(unsafe.Pointer(&one)), 8)
}

func (s *epollSet) wait(told []syscall.EpollEvent, may, crowd bool) (int, error) {
	s.told, s.n, s.err = told, 0, nil
	switch {
	case !may:
		s.take(0)
	case crowd && s.nest():
		s.raw.Read(s.take)
	default:
		s.unnest()
		s.n, s.err = syscall.EpollWait(s.epfd, told, -1)
	}
	return max(s.n, 0), s.err
}

// nest puts the set into Go's own poller, and reports whether it is there.
func (s *epollSet) nest() bool {
	if s.nested != nil {
		return true
	}
	fd, err := duplicate(s.epfd)
	if err != nil {
		return false
	}
	syscall.SetNonblock(fd, true) // what os.NewFile takes for a file to poll
	s.nested = os.NewFile(uintptr(fd), "epoll set")
	if s.raw, err = s.nested.SyscallConn(); err == nil {
		err = s.nested.SetReadDeadline(time.Time{}) // fails if Go's poller does not take it
	}
	if err != nil {
		s.unnest()
	}
	return err == nil
}

func (s *epollSet) unnest() {
	if s.nested != nil {
		s.nested.Close()
		s.nested = nil
	}
}

func (s *epollSet) stop() {
	s.unnest()
	closeSocket(s.bell)
	closeSocket(s.epfd)
}

// limitUnsent fails on an old kernel, whose binaries are the slower ones.
func (s *epollSet) limitUnsent(fd int) {
	syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, tcpNotSentLowAt, mostUnsent)
}

func (s *epollSet) recv(fd int, p []byte) (int, error)      { return recv(fd, p) }
func (s *epollSet) send(fd int, bufs [][]byte) (int, error) { return send(fd, bufs) }
func (s *epollSet) close(fd int)                            { closeSocket(fd) }

func (s *epollSet) shutdown(fd, how int) {
	syscall.RawSyscall(syscall.SYS_SHUTDOWN, uintptr(fd), uintptr(how), 0)
}

// ---- system calls ----

// The calls on a session's socket are those of sockets (recvfrom, sendto, sendmsg), not
// those of files (readv, writev), which touch the socket's inode as well: with 8,000
// phones, whose inodes are in no cache, a frame cost a fifth more. None of them blocks,
// so Go's scheduler is not told.

// call makes a system call on a descriptor.
func call(trap uintptr, fd int, p unsafe.Pointer, n, flags int) (int, error) {
	r, _, errno := syscall.RawSyscall6(trap, uintptr(fd), uintptr(p), uintptr(n), uintptr(flags), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// acceptSocket takes the next connection of a listening socket.
func acceptSocket(ln int) (fd int, from netip.AddrPort, err error) {
	var sa syscall.RawSockaddrInet6 // an IPv4 address fits
	size := uint32(unsafe.Sizeof(sa))
	n, _, errno := syscall.RawSyscall6(syscall.SYS_ACCEPT4, uintptr(ln), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)),
		syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, from, errno
	}
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	if sa.Family == syscall.AF_INET {
		return int(n), netip.AddrPortFrom(netip.AddrFrom4((*syscall.RawSockaddrInet4)(unsafe.Pointer(&sa)).Addr), port), nil
	}
	return int(n), netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), port), nil
}

func init() {
	monotonic = func() int64 {
		const clockMonotonic = 1 // clock_gettime(2), which package syscall lacks
		var ts syscall.Timespec
		syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&ts)), 0)
		return ts.Nano()
	}
}

func closeSocket(fd int) { syscall.RawSyscall(syscall.SYS_CLOSE, uintptr(fd), 0, 0) }

// takeSocket takes a descriptor from Go, whose own poller would be woken for every
// event too as long as it has one.
func takeSocket(nc *net.TCPConn) (int, error) {
	defer nc.Close()
	raw, err := nc.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, failed := -1, error(nil)
	err = raw.Control(func(old uintptr) { fd, failed = duplicate(int(old)) })
	return fd, errors.Join(err, failed)
}

func duplicate(fd int) (int, error) {
	n, _, errno := syscall.RawSyscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_DUPFD_CLOEXEC, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}

func recv(fd int, p []byte) (int, error) {
	return call(syscall.SYS_RECVFROM, fd, unsafe.Pointer(unsafe.SliceData(p)), len(p), syscall.MSG_DONTWAIT)
}

// send writes bufs, of which there are at most as many as a batch has views.
func send(fd int, bufs [][]byte) (int, error) {
	const flags = syscall.MSG_DONTWAIT | syscall.MSG_NOSIGNAL
	if len(bufs) == 1 {
		return call(syscall.SYS_SENDTO, fd, unsafe.Pointer(unsafe.SliceData(bufs[0])), len(bufs[0]), flags)
	}
	var iov [len(writeBatch{}.views)]syscall.Iovec
	for i, b := range bufs {
		iov[i].Base = unsafe.SliceData(b)
		iov[i].SetLen(len(b))
	}
	m := syscall.Msghdr{Iov: &iov[0]}
	setCount(&m.Iovlen, len(bufs))
	return call(syscall.SYS_SENDMSG, fd, unsafe.Pointer(&m), flags, 0)
}

// setCount sets a field whose width is the architecture's.
func setCount[T uint32 | uint64](field *T, n int) { *field = T(n) }
