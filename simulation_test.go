//go:build linux && !386

package main

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/big"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The simulation: a relay with its epoll loops on a kernel that is a model, peers that
// know exactly what they must get, and a fake clock. One goroutine does everything,
// and one seed decides everything, so each world can be run again.
//
// It draws what a kernel, a network and peers may do between two calls of the program,
// and, where a loop has just come for bytes, what another goroutine does meanwhile.
// It has no requests: a connection begins behind its gates, and behind the handshake of
// TLS. What runs side by side in earnest is the stress run's.
//
// The goroutine poller serves the same peers on the same sockets, whose calls wait
// there: its goroutines go as far as they can, and then the world goes on. A calm world
// lets each step come to its end, and has both pollers come to the same.

// ---- kernel ----

// simKernel is a kernel, with the descriptors of one process.
type simKernel struct {
	w       *simulation
	mu      sync.Mutex   // guards sockets where goroutines close them
	sockets []*simSocket // by descriptor, nil where it is free
}

// simSet is an epoll set of it, with its loop.
type simSet struct {
	*simKernel
	loop   *epollLoop
	woken  bool
	asleep bool         // the loop waits
	tell   []*simSocket // of pending
}

// simSocket is a TCP connection, seen from both ends.
type simSocket struct {
	peer    *simPeer
	set     *simSet    // that watches it
	reads   *rand.Rand // of how short the relay's reads are
	writes  *rand.Rand
	mu      sync.Mutex // guards what follows, where goroutines serve
	changed sync.Cond

	fd         int          // -1 once the relay has closed it
	in         bytes.Buffer // the relay may receive it
	out        bytes.Buffer // sent, and not taken by the peer
	inCap      int
	outCap     int
	inThrough  int // bytes, since inCap has grown
	outThrough int
	inEnd      bool // the peer's FIN is behind in
	outEnd     bool // the relay's FIN is behind out
	shutRead   bool
	reset      bool // by the peer
	broken     bool // by the relay's end: out is what had arrived
	watched    bool
	ready      bool // something has happened since wait told of it
	full       bool // the relay was told to wait for room
	limitation bool
}

// simStream is what a peer is about to send, in pieces. They become bytes as they go.
type simStream struct {
	pieces []simPiece
	n      int // bytes
}

type simPiece struct {
	b    []byte
	mask int // which byte of the key is for the first one, -1 for no key
}

func (s *simStream) add(b []byte, mask int) {
	if len(b) > 0 {
		s.pieces = append(s.pieces, simPiece{b, mask})
		s.n += len(b)
	}
}

// frame adds a frame.
func (s *simStream) frame(fin, op byte, payload ...[]byte) {
	n := 0
	for _, b := range payload {
		n += len(b)
	}
	s.add(clientHeader(fin, op, n), -1)
	n = 0
	for _, b := range payload {
		s.add(b, n%4)
		n += len(b)
	}
}

// take takes the first n bytes away, or all, and appends them to b.
func (s *simStream) take(b []byte, n int) []byte {
	for n > 0 && s.n > 0 {
		p := &s.pieces[0]
		k := min(n, len(p.b))
		b = append(b, p.b[:k]...)
		if p.mask >= 0 {
			maskFrom(p.mask, b[len(b)-k:])
			p.mask = (p.mask + k) % 4
		}
		p.b = p.b[k:]
		n, s.n = n-k, s.n-k
		if len(p.b) == 0 {
			s.pieces = s.pieces[1:]
		}
	}
	return b
}

// open makes a socket with the lowest free descriptor, as POSIX wants it.
func (k *simKernel) open(p *simPeer) *simSocket {
	fd := slices.Index(k.sockets, nil)
	if fd < 0 {
		fd = len(k.sockets)
		k.sockets = append(k.sockets, nil)
	}
	w := k.w
	s := &simSocket{peer: p, fd: fd, inCap: 1 << (4 + w.noise.IntN(14)), outCap: 1 << (4 + w.noise.IntN(14)), reads: w.noise, writes: w.noise}
	if w.calm { // the poller has as much as this kernel; while nothing is taken, both hold the same
		s.inCap, s.outCap = 64<<10, goWriteSize
	}
	if w.goroutines != nil {
		s.reads, s.writes = rand.New(rand.NewPCG(w.seed, uint64(len(w.peers)))), rand.New(rand.NewPCG(w.seed, ^uint64(len(w.peers))))
		s.watched, s.limitation = true, p.role == roleBinary // which only a loop has to see to
	}
	s.changed.L = &s.mu
	k.sockets[fd] = s
	return s
}

func (k *simKernel) at(call string, fd int) *simSocket {
	if fd < 0 || fd >= len(k.sockets) || k.sockets[fd] == nil {
		k.w.fail("%s on descriptor %d, which is closed", call, fd)
	}
	return k.sockets[fd]
}

func (k *simKernel) limitUnsent(fd int) { k.at("setsockopt", fd).limitation = true }
func (k *simSet) wake()                 { k.woken = true }
func (k *simKernel) stop()              {}

func (k *simSet) watch(fd int) error {
	s := k.at("epoll_ctl", fd)
	if !k.w.calm && k.w.odd(400) {
		return syscall.ENOSPC
	}
	s.set, s.watched, s.ready = k, true, true
	return nil
}

// events is what epoll would tell of s now.
func (s *simSocket) events() (e uint32) {
	tell := func(is bool, flag uint32) {
		if is {
			e |= flag
		}
	}
	tell(s.in.Len() > 0 || s.ended(), syscall.EPOLLIN)
	tell(s.writable(), syscall.EPOLLOUT)
	tell(s.ended(), syscall.EPOLLRDHUP)
	tell(s.reset || s.ended() && s.outEnd, syscall.EPOLLHUP)
	tell(s.reset, syscall.EPOLLERR)
	return e
}

func (s *simSocket) ended() bool    { return s.inEnd || s.reset || s.shutRead }
func (s *simSocket) writable() bool { return s.outEnd || s.reset || 3*s.out.Len() <= 2*s.outCap }

// grown is the size of a buffer that n bytes more have come through: as TCP has it, one
// grows that has been filled over and over. Else most of a world were the same few bytes
// again.
func (s *simSocket) grown(size int, through *int, n int) int {
	if *through += n; *through < 256*size || size >= 64<<10 || s.peer.w.calm {
		return size
	}
	*through = 0
	return 2 * size
}

// tellRoom is what a kernel does when a good part of a full send buffer is free.
func (s *simSocket) tellRoom() bool {
	if !s.full || !s.writable() {
		return false
	}
	s.full, s.ready = false, true
	return true
}

// pending is what wait has to tell of, until it is called again.
func (k *simSet) pending() []*simSocket {
	k.tell = k.tell[:0]
	for _, s := range k.sockets {
		if s != nil && s.set == k && s.ready {
			k.tell = append(k.tell, s)
		}
	}
	return k.tell
}

func (k *simSet) wait(told []syscall.EpollEvent, may, crowd bool) (n int, err error) {
	w := k.w
	if w.odd(50) {
		return 0, syscall.EINTR
	}
	tell := k.pending()
	w.noise.Shuffle(len(tell), func(i, j int) { tell[i], tell[j] = tell[j], tell[i] })
	if len(tell) > 0 && w.odd(2) {
		tell = tell[:1+w.noise.IntN(len(tell))]
	}
	if s := k.sockets[w.noise.IntN(len(k.sockets))]; w.odd(20) && s != nil && s.set == k && !slices.Contains(tell, s) {
		tell = append(tell, s) // for nothing
	}
	if k.woken {
		k.woken = false
		told[0], n = syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: math.MaxInt32}, 1
	}
	for _, s := range tell[:min(len(tell), len(told)-n)] {
		s.ready = false
		if e := s.events(); e != 0 {
			told[n] = syscall.EpollEvent{Events: e, Fd: int32(s.fd)}
			n++
		}
	}
	return n, nil
}

func (k *simKernel) recv(fd int, p []byte) (int, error) {
	w := k.w
	s := k.at("recv", fd)
	switch {
	case len(p) == 0:
		w.fail("recv into no room")
	case w.odd(60):
		return 0, syscall.EINTR
	}
	n, err := s.recv(p)
	if !w.calm && !w.settling && w.chance(30) { // what another goroutine does meanwhile
		time.Sleep(time.Microsecond)
		if len(w.live) < 40 && w.chance(8) {
			w.arrive()
		} else {
			w.sweep()
		}
	}
	if err == io.EOF {
		err = nil
	}
	return n, err
}

func (s *simSocket) recv(p []byte) (int, error) {
	switch {
	case s.fd < 0:
		return 0, net.ErrClosed
	case s.in.Len() > 0:
		n := min(len(p), s.in.Len())
		// The rest arrives just now. In a calm world the last that a peer says comes whole:
		// half a close frame of a holder that is challenged is a sign of life.
		if short := s.reads.IntN(8) == 0; short && !(s.peer.w.calm && s.peer.done) {
			n = 1 + s.reads.IntN(n)
			s.ready = true
		}
		copy(p, s.in.Next(n))
		s.inCap = s.grown(s.inCap, &s.inThrough, n)
		s.peer.heard = s.peer.w.now()
		return n, nil
	case s.reset:
		return 0, syscall.ECONNRESET
	case s.ended():
		return 0, io.EOF
	}
	return 0, syscall.EAGAIN
}

func (k *simKernel) send(fd int, bufs [][]byte) (int, error) {
	s := k.at("send", fd)
	if k.w.odd(60) {
		return 0, syscall.EINTR
	}
	return s.send(bufs)
}

func (s *simSocket) send(bufs [][]byte) (int, error) {
	switch {
	case s.fd < 0:
		return 0, net.ErrClosed
	case s.reset:
		return 0, syscall.ECONNRESET
	case s.outEnd:
		return 0, syscall.EPIPE
	}
	total := 0
	for _, b := range bufs {
		total += len(b)
	}
	n := max(0, min(total, s.outCap-s.out.Len()))
	if n > 0 && !s.peer.w.calm && s.writes.IntN(12) == 0 { // for want of memory
		n = 1 + s.writes.IntN(n)
	}
	s.full = s.full || n < total
	for left := n; left > 0; bufs = bufs[1:] {
		k := min(left, len(bufs[0]))
		s.out.Write(bufs[0][:k])
		left -= k
	}
	if n == 0 {
		return 0, syscall.EAGAIN
	}
	return n, nil
}

func (k *simKernel) shutdown(fd, how int) {
	s := k.at("shutdown", fd)
	s.outEnd, s.ready = true, true
	s.shutRead = s.shutRead || how == syscall.SHUT_RDWR
}

func (k *simKernel) close(fd int) {
	s := k.at("close", fd)
	s.close()
}

func (s *simSocket) close() {
	s.peer.w.kernel.sockets[s.fd] = nil
	s.fd, s.outEnd = -1, true
	if s.in.Len() > 0 {
		s.breakOff()
	}
}

// breakOff is the relay's reset, which may overtake what is on its way.
func (s *simSocket) breakOff() {
	if !s.broken {
		s.broken = true
		s.out.Truncate(s.reads.IntN(s.out.Len() + 1))
	}
}

// simConn is a socket as the goroutine poller has it: its calls wait.
type simConn struct {
	net.Conn // none: what is called is here
	*simSocket
	writeBy time.Time // guarded by mu
}

func (c *simConn) Read(p []byte) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n, err = c.recv(p); err == syscall.EAGAIN; n, err = c.recv(p) {
		c.changed.Wait()
	}
	return n, err
}

func (c *simConn) Write(p []byte) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n < len(p) {
		k, err := c.send([][]byte{p[n:]})
		n += k
		switch {
		case err == nil:
		case err != syscall.EAGAIN:
			return n, err
		case !c.writeBy.IsZero() && !time.Now().Before(c.writeBy):
			return n, os.ErrDeadlineExceeded
		default:
			c.changed.Wait()
		}
	}
	return n, nil
}

func (c *simConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writeBy = t
	time.AfterFunc(time.Until(t), func() {
		c.peer.w.slept.Load()
		c.mu.Lock()
		defer c.mu.Unlock()
		c.changed.Broadcast()
	})
	return nil
}

func (c *simConn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.outEnd = true
	return nil
}

func (c *simConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd >= 0 {
		c.peer.w.kernel.mu.Lock()
		c.close()
		c.peer.w.kernel.mu.Unlock()
	}
	c.changed.Broadcast()
	return nil
}

// ---- world ----

// simulation is a world: one relay and its surroundings.
type simulation struct {
	simPlan
	rng        *rand.Rand // of what peers do
	noise      *rand.Rand // of what the kernel does: the same, but in a calm world
	o          options
	r          *relay
	kernel     *simKernel
	sets       []*simSet   // of its loops
	goroutines *goPoller   // nil for loops
	batch      *writeBatch // the sweep's
	arriving   *simPeer
	calmBytes  int // that the step under way may still send in a calm world, without filling a buffer on the way

	homes      []*simHome
	peers      []*simPeer // in order of arrival
	live       []*simPeer // of these, the ones that are not over on either side
	byID       map[string]*simPeer
	settling   bool // nobody comes any more
	ending     bool // the relay drains
	step       int
	slept      atomic.Int64 // times
	stoodAt    int64        // relay clock at which the process last stood still
	frames     int
	frameBytes int64
	reasons    [closeReasonCount]int
	named      [evidenceCount + 1]bool // ids that daemons have named: what they may be evidence of
	trace      *logBuffer              // nil for none

	// Room that is used again and again.
	record [maxRecord]byte
	plain  []byte
	pumped []*simPeer
	after  []*simPeer
}

// simHome is a server-id.
type simHome struct {
	id     string
	probe  bool    // the relay's own check has it, for which there is no grace
	set    *simSet // of the loop that serves it
	holder *simPeer
	freed  int64 // relay clock of the last holder's end
	since  int64 // relay clock since which holder is that
	held   bool  // by anybody, ever
}

// simFailure is what a world panics with.
type simFailure string

func (w *simulation) fail(format string, args ...any) {
	panic(simFailure(fmt.Sprintf(format, args...)))
}

func (w *simulation) log(format string, args ...any) {
	now := w.now() // a reading tells the relay of stalls, which a trace must not change
	if w.trace != nil {
		fmt.Fprintf(w.trace, "%4d %9.3fs  %s\n", w.step, float64(now)/1e9, fmt.Sprintf(format, args...))
	}
}

func (w *simulation) chance(n int) bool { return w.rng.IntN(n) == 0 }
func (w *simulation) odd(n int) bool    { return w.noise.IntN(n) == 0 }
func (w *simulation) now() int64        { return w.r.now() }

// size is mostly small, and sometimes the largest that there may be.
func (w *simulation) size() int {
	n := w.rng.IntN(1 + min(w.o.maxFrame-1000, 1<<(2+w.rng.IntN(17))))
	if w.calm {
		n = min(n, w.calmBytes)
		w.calmBytes -= n
	}
	return n
}

// quiet waits until the relay's goroutines have done all that they can. Each call of the
// world's own goroutine that gives them something to do is followed by it: else that
// would look at the model while they change it.
func (w *simulation) quiet() {
	if w.goroutines != nil {
		synctest.Wait()
	}
}

// sleep lets the clock go on. What that wakes comes behind what the world did before,
// which only slept tells the race detector.
func (w *simulation) sleep(d time.Duration) {
	w.slept.Add(1)
	time.Sleep(d)
}

// served is for the moment at which goroutines may have done something.
func (w *simulation) served() {
	if w.goroutines != nil {
		w.judge()
	}
}

// simPlan says which world it is, and how much of it.
type simPlan struct {
	seed         uint64
	steps, homes int    // less than its seed alone would make
	poller       string // or "goroutines", in place of loops
	calm         bool
}

func wholeWorld(seed uint64) simPlan {
	return simPlan{seed: seed, steps: math.MaxInt, homes: math.MaxInt, poller: "epoll"}
}

// String is the plan as parseWorld reads it.
func (p simPlan) String() string {
	s := fmt.Sprint(p.seed)
	if p.steps < math.MaxInt {
		s += fmt.Sprintf(",%d,%d", p.steps, p.homes)
	}
	if s += "," + p.poller; p.calm {
		s += ",calm"
	}
	return s
}

func newSimulation(plan simPlan, trace *logBuffer) (w *simulation, steps int) {
	w = &simulation{simPlan: plan, rng: rand.New(rand.NewPCG(plan.seed, 0)), o: timedOptions(), byID: map[string]*simPeer{}, trace: trace}
	if w.noise = w.rng; plan.calm {
		w.noise = rand.New(rand.NewPCG(plan.seed, 1))
	}
	if w.chance(3) { // tiny limits
		w.o.maxFrame, w.o.queue, w.o.queueTotal = 4<<10<<w.rng.IntN(4), 8<<10<<w.rng.IntN(5), 256<<10<<w.rng.IntN(3)
		w.o.maxPhones, w.o.maxConnections = 1+w.rng.IntN(4), 4+w.rng.IntN(40)
	}
	if w.chance(4) { // and short times
		for _, d := range peerTimes(&w.o) {
			*d = time.Second + time.Duration(w.rng.Int64N(int64(*d)))
		}
	}
	if plan.calm { // what is held at one moment, or is about to leave, is not the same for both
		w.o.queueTotal, w.o.maxConnections = timedOptions().queueTotal, timedOptions().maxConnections
	}
	w.o.checkPace.over = 10 * time.Second
	w.o.checkPace.skew = time.Until(historyStart.AddDate(26, 0, 0)) // no clock of relays says that it is 2000
	w.o.logLevel = logOff
	log := slog.New(slog.DiscardHandler)
	if trace != nil {
		w.o.logLevel = slog.LevelDebug
		log = newLogger(trace, w.o)
	}
	id := identity{"00000000000000aa", time.Now().Add(w.o.checkPace.skew)}
	w.r = makeRelay(w.o, id, buildVersion{"sim", "unknown", runtime.Version()}, new(instanceState), new(probeKeys), log)
	time.Sleep(time.Nanosecond) // no relay has a peer before it is any age
	w.kernel = &simKernel{w: w}
	room := 64 << w.rng.IntN(11) // a small one makes every frame a large one
	if loops := 1 + w.rng.IntN(2); plan.poller == "epoll" {
		for range loops {
			k := &simSet{simKernel: w.kernel}
			k.loop = makeEpollLoop(w.r, k)
			k.loop.buf = k.loop.buf[:room]
			w.sets = append(w.sets, k)
		}
	} else {
		w.goroutines = newGoPoller(w.r)
	}
	w.r.loops = []poller{w}
	w.batch = w.r.newBatch()
	if w.chance(50) { // so many have been here that the oldest are forgotten
		for i := range maxRecentClaims {
			w.r.registry.recent.note(fmt.Sprint("old-", i), int64(i+1))
		}
	}
	for i := range min(1+w.rng.IntN(3), plan.homes) {
		h := &simHome{id: fmt.Sprint("home-", i), probe: w.chance(20)}
		if w.chance(20) {
			h.id = fmt.Sprint(probePrefix, i)
		}
		if n := w.rng.IntN(2); w.goroutines == nil {
			h.set = w.sets[n%len(w.sets)]
		}
		w.homes = append(w.homes, h)
	}
	w.after = make([]*simPeer, len(w.homes))
	return w, min(50+w.rng.IntN(400), plan.steps)
}

// bind is poller's: it chooses the loop of a server-id by the seed, and not by a hash
// that is another one in each process.
func (w *simulation) bind(c *conn, nc net.Conn) error {
	if w.goroutines != nil {
		return w.goroutines.bind(c, nc)
	}
	return w.arriving.home.set.loop.bind(c, nc)
}

func (w *simulation) turned() bool { return true }
func (w *simulation) stop()        {}

// run is a whole world, up to the relay's end.
func (w *simulation) run(steps int) {
	for w.step = range steps {
		w.calmBytes = goWriteSize / 2
		w.act()
		if w.calm {
			w.pump()
		}
		w.judge()
		w.check()
	}
	w.settle()
	w.drain()
}

func (w *simulation) act() {
	p := w.anyPeer()
	switch x := w.rng.IntN(100); {
	case p == nil || x < 6:
		w.arrive()
	case x < 50 && w.calm: // the step's end moves all
	case x < 30:
		p.push(1 + w.rng.IntN(1<<w.rng.IntN(18)))
	case x < 50:
		p.take(1 + w.rng.IntN(1<<w.rng.IntN(18)))
	case x < 65 && w.goroutines != nil:
		w.quiet()
	case x < 65:
		w.turn(w.sets[w.noise.IntN(len(w.sets))])
	case x < 85:
		p.act()
	case x < 90:
		w.sleep(time.Duration(1+w.rng.IntN(1000)) * time.Microsecond)
		w.sweep()
	case x < 95:
		w.pump()
	case x < 99:
		w.advance(time.Duration(w.rng.IntN([]int{500, 2000, 6000, 15_000, 40_000}[w.rng.IntN(5)])) * time.Millisecond)
	default:
		d := 2*time.Second + time.Duration(w.rng.IntN(90_000))*time.Millisecond
		if w.calm { // goroutines that wait for a deadline would not stand still
			return
		}
		w.log("the process stands still for %v", d)
		w.stoodAt = w.now() // the clock was read until then
		w.sleep(d)
		w.quiet()
	}
}

func (w *simulation) anyPeer() *simPeer {
	among := w.live
	if w.calm { // when an end is over is the poller's affair
		among = slices.DeleteFunc(slices.Clone(among), func(p *simPeer) bool { return p.reason != endNone })
	}
	if len(among) == 0 {
		return nil
	}
	return among[w.rng.IntN(len(among))]
}

// sweep is the relay's, in an order that the seed decides.
func (w *simulation) sweep() {
	w.batch.now = w.now()
	for _, p := range slices.Clone(w.live) {
		if !p.s.is(connClosed) {
			p.noteBusy()
			p.s.checkTimeouts(w.batch)
			w.batch.flush()
			w.judge()
		}
	}
	w.r.registry.expire(w.batch, w.batch.now)
	w.batch.flush()
	w.judge()
}

// turn is a loop's, unless it sleeps and nothing has happened.
func (w *simulation) turn(k *simSet) bool {
	idle := k.asleep
	if !k.asleep {
		idle, _ = k.loop.idle()
		k.asleep = idle
	}
	if idle && !k.woken && len(k.pending()) == 0 {
		if n := len(k.loop.inbox); n > 0 {
			w.fail("the loop sleeps, and was not woken for %d connections", n)
		}
		w.checkSleep(k)
		return false
	}
	k.loop.turn(idle)
	k.asleep = false
	w.judge()
	return true
}

// pump lets the network and the relay go on until nothing moves.
func (w *simulation) pump() {
	for moved := true; moved; {
		moved = false
		w.pumped = append(w.pumped[:0], w.live...) // whom judge takes out of the other
		for _, p := range w.pumped {
			moved = p.hasMore() && p.push(math.MaxInt) || moved
			if !p.deaf && p.slow == 0 {
				moved = p.take(math.MaxInt) || moved
			}
			moved = p.sock.tellRoom() || moved
		}
		for _, k := range w.sets {
			moved = w.turn(k) || moved
		}
	}
	if w.goroutines != nil {
		w.checkSleep(nil)
	}
	for _, p := range w.live {
		answered := p.flaw == endNone || p.flaw == p.reason // else its answer could not be told from the rest
		if p.closed && answered && !p.over && !p.stuck && !p.mute {
			w.fail("%s: the close handshake is over, and the relay sends no FIN", p)
		}
	}
	w.check()
}

// advance lets time pass as it does for a relay that runs.
func (w *simulation) advance(d time.Duration) {
	w.log("%v pass", d)
	for w.pump(); d > 0; d -= mostLate {
		w.sleep(min(d, mostLate))
		w.quiet()
		for _, p := range slices.Clone(w.live) {
			p.tick()
		}
		w.sweep()
		w.pump()
		w.checkBounds()
	}
}

// arrive brings a new connection.
func (w *simulation) arrive() {
	w.judge() // it may be the middle of a turn
	h := w.homes[w.rng.IntN(len(w.homes))]
	role := rolePhone
	if h.holder == nil && w.chance(2) || w.chance(8) {
		role = roleBinary
	}
	var srv *server
	if v, ok := w.r.registry.servers.Load(h.id); ok {
		srv = v.(*server)
	}
	now := w.now()
	p := &simPeer{w: w, role: role, home: h, id: fmt.Sprintf("%s-%d", role, len(w.peers)), flaw: endNone, reason: endNone,
		arrived: now, heard: now, took: now}
	p.rng = rand.New(rand.NewPCG(w.rng.Uint64(), 0))
	full := w.r.count(roleBinary)+w.r.count(rolePhone) >= w.o.maxConnections
	if refused := w.r.enter(role) != nil; refused != full {
		w.fail("no room for a connection: %v; the relay is full: %v", refused, full)
	}
	if full {
		return
	}
	p.sock = w.kernel.open(p)
	from := caller{role: role, serverID: h.id, addr: netip.MustParseAddr("192.0.2.1"), probe: h.probe, proxied: w.chance(4)}
	p.s = newSession(w.r, from, p.id)
	p.s.pingAt = p.arrived + int64(w.o.ping)/2 + w.rng.Int64N(int64(w.o.ping)/2)
	if role == rolePhone && w.chance(3) {
		p.say()
	}
	first := p.send.take(nil, w.rng.IntN(p.send.n+1))
	var nc net.Conn = &accepted{fd: p.sock.fd}
	if w.goroutines != nil {
		nc = &simConn{simSocket: p.sock}
	}
	if secure := w.chance(12); secure && !w.calm {
		nc, first = p.secure(nc, first)
	}
	w.peers, w.live, w.byID[p.id] = append(w.peers, p), append(w.live, p), p
	want := endNone
	switch {
	case role == roleBinary:
	case srv == nil && h.held && !h.probe:
		want = endLastHeld
	case srv == nil:
		want = endNeverSeen
	case len(srv.phones) >= w.o.maxPhones:
		want = endTooManyPhones
	default:
		p.joined, p.daemon = true, h.holder
	}
	w.log("%s comes to %s, with %d bytes; TLS: %v", p.id, h.id, len(first), p.tls != nil)
	w.arriving = p
	w.r.begin(p.s, from, nc, first, []byte(simAnswer))
	w.quiet()
	// What is left of an answer has to fit, where the socket does not take it whole.
	if got := p.s.endReason; got != want && got != endMemoryLimit && !p.unwatched() {
		w.fail("%s was refused for %q, want %q", p.id, got, want)
	}
	if holds := p.s.server != nil && p.s.server.binary == p.s; role == roleBinary && holds != (h.holder == nil) {
		w.fail("%s holds %s: %v; a holder was there: %v", p.id, h.id, holds, h.holder != nil)
	}
	w.judge()
}

// judge holds what has changed in the relay against what was done to it.
func (w *simulation) judge() {
	w.quiet()
	after := w.after[:len(w.homes)]
	clear(after)
	for i, h := range w.homes {
		v, ok := w.r.registry.servers.Load(h.id)
		if !ok || v.(*server).binary == nil {
			continue
		}
		if after[i] = h.holder; h.holder == nil || h.holder.s != v.(*server).binary {
			after[i] = w.byID[v.(*server).binary.id]
			for id := range v.(*server).phones {
				w.byID[id].daemon = after[i]
			}
			for _, p := range w.live { // and those that ended just behind its claim
				if p.home == h && p.joined && p.daemon == nil && p.reason == endNone {
					p.daemon = after[i]
				}
			}
		}
	}
	ended := false
	for _, p := range w.live {
		ended = ended || p.over && p.s.is(connClosed)
		if p.reason == endNone && p.s.endReason != endNone {
			p.judge(after[slices.Index(w.homes, p.home)])
		}
		if p.s.failed && !p.givenUp {
			p.givenUp = true
			least := min(w.o.closeTimeout, w.o.writeTimeout)
			if early := w.now()-p.ended < int64(least); early && !p.sock.reset && !p.unwatched() && !w.ending && p.reason != endMemoryLimit {
				p.fail("given up before its time: %s", p.facts())
			}
		}
	}
	for i, h := range w.homes {
		if h.holder != nil && after[i] == nil {
			h.freed = w.now()
		}
		if h.holder != after[i] {
			h.since = w.now()
			w.log("%s is held by %v", h.id, after[i])
		}
		h.holder, h.held = after[i], h.held || after[i] != nil
	}
	if ended {
		w.live = slices.DeleteFunc(w.live, func(p *simPeer) bool { return p.over && p.s.is(connClosed) })
	}
}

// check holds the relay's gauges and its budget against a recount.
func (w *simulation) check() {
	if err := w.r.check(); err != nil {
		w.fail("%v", err)
	}
	held, live := 0, 0
	chain := func(k *buffer) {
		for ; k != nil; k = k.next {
			held += len(k.b)
		}
	}
	for _, p := range w.live {
		s := p.s
		if !s.is(connClosed) {
			live++
		}
		for _, k := range [...]*buffer{s.unparsed, s.fragments} {
			if k != nil {
				held += len(k.b)
			}
		}
		if e, ok := s.sock.(*epollSocket); ok && e.tls != nil && e.tls.staged != nil {
			held += len(e.tls.staged.b)
		}
		chain(s.out.head)
		bound := max(w.o.queue, flushAt) + 1<<12 // pongs of one batch, and other control frames
		if p.role == roleBinary {
			bound += pauseAt + 50*(w.o.maxFrame+w.o.queue)
		}
		if s.out.n > bound {
			w.fail("%d bytes are queued for %s", s.out.n, p)
		}
		if s.queued < uint64(s.out.n) {
			w.fail("%d bytes were ever queued for %s, and %d are", s.queued, p, s.out.n)
		}
		if s.ignoreInput && s.unparsed != nil {
			w.fail("%d bytes of %s are kept, which are not looked at", s.unparsed.w, p)
		}
		if s.graceQueue != nil {
			chain(s.graceQueue.head)
			if n := s.graceQueue.n; n > w.o.queue+w.o.maxFrame+1<<10 {
				w.fail("%d bytes of %s are held in grace", n, p)
			}
		}
	}
	if used := w.r.buffers.budget.used(); used != int64(held) {
		w.fail("the budget says %d bytes, and %d are held", used, held)
	}
	if n := w.r.count(roleBinary) + w.r.count(rolePhone); n != live {
		w.fail("%d connections are counted, and %d are there", n, live)
	}
}

// checkSleep is for the moment in which a loop sleeps, or all goroutines, and nothing
// will wake it that has happened: whatever waits has to wait for something.
func (w *simulation) checkSleep(set *simSet) {
	for _, p := range w.live {
		s, k := p.s, p.sock
		if k.set != set || s.is(connClosed) {
			continue
		}
		staged, writes := false, k.full || k.ready
		switch at := s.sock.(type) {
		case *epollSocket:
			staged = at.tls != nil && at.tls.staged != nil
		case *goSocket:
			staged = at.inFlight+len(at.staged) > 0
			writes = at.writing
		}
		switch {
		case !s.paused.Load():
			owes := s.closeHeard && (s.out.n > 0 || staged)
			if k.watched && k.fd >= 0 && (k.in.Len() > 0 || k.ended() && !owes) {
				w.fail("%s has %d bytes to read, ended %v, and nothing reads them", p, k.in.Len(), k.ended())
			}
		case !s.is(connOpen):
			w.fail("%s is paused past its end", p)
		case s.behind != nil:
			if b := s.behind; !slices.Contains(b.waiters, &s.conn) || b.out.n <= resumeAt {
				w.fail("%s is forgotten: it waits behind %d bytes", p, b.out.n)
			}
		case s.server.binary != nil || !slices.Contains(s.server.waiters, &s.conn):
			w.fail("%s is forgotten: it waits for a binary to come", p)
		}
		if k.reset && s.paused.Load() { // with TLS it is found as the pause ends, or by the write timeout
			continue
		}
		if s.out.n > 0 && s.blockedSince == 0 && !s.failed || (s.out.n > 0 || staged) && !s.failed && !writes {
			w.fail("%d bytes wait for %s, and nothing will send them", s.out.n, p)
		}
	}
}

// checkBounds is for the moment after a sweep: no timeout is missed.
func (w *simulation) checkBounds() {
	const slack = 2*mostLate + time.Second
	o, now := &w.o, w.now()
	for _, p := range w.live {
		s := p.s
		late := func(since int64, bound time.Duration, what string) {
			if since != 0 && now-since > int64(bound+slack) {
				w.fail("%s: %s for %v", p, what, time.Duration(now-since))
			}
		}
		p.noteBusy()
		if s.contendsSince != 0 && slices.Index(s.server.contenders, s) == 0 {
			late(max(s.contendsSince, p.home.since, p.home.holder.heard), o.challengeTimeout, "contends with one that is silent")
		}
		switch {
		case s.is(connClosed):
		case !s.is(connOpen):
			late(max(p.ended, p.took), o.writeTimeout+2*o.closeTimeout, "closing") // slow is not silent
			if s.is(connLinger) {
				p.lingers = cmp.Or(p.lingers, now)
				late(p.lingers, o.closeTimeout, "without its FIN")
			}
			late(p.closeAt, 2*o.closeTimeout, "without its answer")
		case s.paused.Load():
		default:
			late(s.blockedSince, o.writeTimeout, "takes nothing")
			late(s.messageStart.Load(), o.messageTimeout, "half a message")
			late(max(p.heard, p.busy), 2*o.ping, "silent")
		}
	}
}

// noteBusy is for the moments at which the relay may look for a ping to be answered.
func (p *simPeer) noteBusy() {
	if p.s.paused.Load() || p.s.out.n > 0 {
		p.busy = p.w.now()
	}
}

// settle lets everything come to rest: who behaves has got all, and who does not is gone.
func (w *simulation) settle() {
	w.log("settling")
	w.settling = true
	for _, p := range w.live {
		p.slow = 0
	}
	w.advance(2*w.o.ping + max(30*time.Second, 2*w.o.writeTimeout+4*w.o.closeTimeout))
	for _, p := range w.peers {
		p.checkSettled()
	}
	if m := w.r.metrics; m.framesUp.Load() < int64(w.frames) || m.bytesUp.Load() < w.frameBytes {
		w.fail("%d frames of %d bytes went up, and %d of %d have arrived", m.framesUp.Load(), m.bytesUp.Load(), w.frames, w.frameBytes)
	}
	w.checkEvidence()
}

// checkEvidence holds what the relay says of others against what daemons have told it.
func (w *simulation) checkEvidence() {
	found := w.r.others.verdict(w.r.age())
	for e := range evidenceCount {
		n := w.r.metrics.splitSeen[e].Load()
		if n > 0 && !w.named[e] || n > 0 && found > e || n == 0 && found == e {
			w.fail("%d times a second relay was %v, and %v is said; a daemon has told of one: %v", n, e, found, w.named)
		}
	}
	for id := range w.r.others.seen {
		if id > simOthers {
			w.fail("relay %x is remembered, of which nobody has told", id)
		}
	}
	t, ok := parseConnTag([]byte(w.r.newConnID()))
	if _, seen := w.r.others.seen[t.after]; !ok || t.relay != w.r.me || seen != (t.after != 0) || len(w.r.others.seen) > maxOthers {
		w.fail("a new id says %+v, and %d relays are known", t, len(w.r.others.seen))
	}
}

// drain is the relay's, with its steps in an order that the seed decides.
func (w *simulation) drain() {
	w.log("draining")
	w.ending = true
	w.r.draining.Store(true)
	for _, role := range []role{rolePhone, roleBinary} {
		for _, p := range slices.Clone(w.live) {
			if p.role == role && !p.s.is(connClosed) {
				p.s.startClose(w.batch, endShutdown)
				w.quiet()
			}
		}
		w.batch.flush()
		w.judge()
		w.advance(time.Duration(w.rng.IntN(3000)) * time.Millisecond)
	}
	for _, p := range slices.Clone(w.live) {
		if !p.s.is(connClosed) {
			p.s.fail()
			w.quiet()
		}
	}
	w.pump()
	w.r.registry.expire(w.batch, math.MaxInt64)
	w.batch.flush()
	w.quiet()
	w.check()
	w.r.registry.servers.Range(func(id, _ any) bool { w.fail("server-id %v is left", id); return false })
	for _, k := range w.sets {
		k.loop.mu.Lock()
		k.loop.stopping = true
		k.loop.mu.Unlock()
		if _, stop := k.loop.idle(); !stop {
			w.fail("the loop does not end: %d connections", k.loop.live)
		}
	}
	for _, s := range w.kernel.sockets {
		if s != nil {
			w.fail("the descriptor of %s is open", s.peer)
		}
	}
	if w.goroutines != nil {
		w.goroutines.stop()
	}
	if n := w.r.buffers.budget.used(); n != 0 || len(w.r.sessions) != 0 {
		w.fail("%d bytes and %d sessions are left", n, len(w.r.sessions))
	}
}

// ---- peers ----

// simAnswer stands for the 101.
const simAnswer = "HTTP/1.1 101 Switching Protocols\r\n\r\n"

// simPeer is a daemon or a phone, and all that it knows.
type simPeer struct {
	w       *simulation
	role    role
	home    *simHome
	id      string // conn_id
	s       *session
	sock    *simSocket
	rng     *rand.Rand // of how it answers
	arrived int64      // relay clock, as the following
	heard   int64      // the relay received something
	took    int64      // it took something
	busy    int64      // bytes waited for it, or it for its binary
	halfAt  int64      // it left a message unfinished, 0 if it did not
	ended   int64      // the relay ended it, 0 if it did not
	closeAt int64      // it has got a close frame, 0 if it has not
	lingers int64      // the relay waits for its FIN, 0 if it does not
	givenUp bool       // by the relay, which sends nothing more

	// Its end of the wire.
	tls       *tls.Conn // nil for none
	sealed    *simSealed
	send      simStream    // the network has not taken it
	sendEnd   bool         // FIN is behind send
	got       bytes.Buffer // not parsed
	upgraded  bool
	closed    bool // it has got a close frame
	over      bool // the network has told of the end
	taken     int  // frames
	texts     uint32
	textBytes uint64
	pings     []string // without an answer

	// How it behaves.
	deaf    bool // it takes nothing
	wasDeaf bool
	stuck   bool   // it took nothing, or little, for a time
	mute    bool   // it says nothing, and answers no ping
	slow    int    // bytes that it takes in one tick, 0 for all
	done    bool   // it has said its last
	rest    []byte // of a frame that it leaves unfinished, byte by byte
	closes  int    // code of its close frame, 0 for none
	lost    bool   // it ended TCP, or broke it
	flaw    closeReason

	reason closeReason // with which the relay ended it
	code   uint16

	// Of a phone.
	joined    bool
	daemon    *simPeer // nil before there is one
	said      int      // messages
	saidBytes uint64
	up        []simMessage // messages that no daemon has got
	down      []simMessage // of these, the ones that it has not got
	directive int          // close code that its daemon has sent, 0 for none
	tell      simNotice
	toldTo    *simPeer
}

// simNotice says whether a phone's daemon gets a close notice.
type simNotice uint8

const (
	noticeNone simNotice = iota
	noticeMaybe
	noticeDue
	noticeGot
)

func (p *simPeer) String() string {
	if p == nil {
		return "nobody"
	}
	return p.id
}

func (p *simPeer) fail(format string, args ...any) { p.w.fail(p.id+": "+format, args...) }

// hasMore reports whether push may do something.
func (p *simPeer) hasMore() bool {
	return p.send.n > 0 || p.sendEnd && !p.sock.inEnd || p.tls != nil
}

// push hands bytes to the network.
func (p *simPeer) push(most int) bool {
	k := p.sock
	left := p.sealUp(most)
	n := min(most, left, k.inCap-k.in.Len())
	if left == 0 && (!p.sendEnd || k.inEnd) {
		return false
	}
	k.mu.Lock()
	defer p.w.served()
	defer k.mu.Unlock()
	switch {
	case k.reset:
		return false
	case k.fd < 0: // what comes behind the relay's end is answered with a reset
		if left > 0 {
			k.breakOff()
			p.send = simStream{}
			if p.tls != nil {
				p.sealed.out = bytes.Buffer{}
			}
		}
		return false
	case n > 0:
		if p.tls != nil {
			k.in.Write(p.sealed.out.Next(n))
		} else {
			k.in.Grow(n)
			k.in.Write(p.send.take(k.in.AvailableBuffer(), n))
		}
		if all := n == left && p.send.n == 0 && (p.tls == nil || p.sealed.said); all && p.sendEnd && !p.w.calm && p.w.odd(2) {
			k.inEnd = true
			p.w.log("%s: FIN behind its last bytes", p)
		}
	case left == 0 && p.send.n == 0 && p.sendEnd && !k.inEnd:
		k.inEnd = true
		p.w.log("%s: FIN", p)
	default:
		return false
	}
	k.ready = true
	k.changed.Broadcast()
	return true
}

// take takes bytes from the network.
func (p *simPeer) take(most int) bool {
	k := p.sock
	if p.over || k.out.Len() == 0 && !k.outEnd && !k.broken {
		return false
	}
	k.mu.Lock()
	taken := k.out.Next(most)
	if p.tls == nil {
		p.got.Write(taken)
	} else {
		p.sealed.in.Write(taken)
	}
	k.outCap = k.grown(k.outCap, &k.outThrough, len(taken))
	k.changed.Broadcast()
	k.mu.Unlock()
	p.w.quiet()
	if len(taken) > 0 {
		p.took = p.w.now()
		k.tellRoom()
		if p.tls != nil {
			p.open()
		}
		p.parse()
		p.w.served()
		return true
	}
	if !k.outEnd && !k.broken {
		return false
	}
	// crypto/tls gives its goodbye five seconds by the wall's clock.
	late := p.stuck || p.w.goroutines != nil && p.w.stoodAt >= p.ended
	if p.tls != nil && p.closed && p.reason == endPeerClosed && !p.sealed.said && !p.sealed.ended && !late {
		p.fail("the relay has ended TCP, and not TLS")
	}
	p.over, p.done, p.sendEnd = true, true, true
	p.w.log("%s: the end", p)
	ticks := int(min(p.w.o.writeTimeout/2, p.w.o.closeTimeout) / mostLate * 4 / 5)
	slow := p.slow > 0 && !p.wasDeaf && !p.mute && p.room() <= ticks*p.slow // it has all before the relay has waited long enough
	if !p.closed && !p.lost && (!p.stuck || slow) && !p.unwatched() && !p.w.ending && p.reason != endMemoryLimit {
		p.fail("ended for %q without a close frame", p.reason)
	}
	p.w.judge()
	return true
}

// parse takes frames of the relay apart.
func (p *simPeer) parse() {
	if !p.upgraded {
		if p.got.Len() < len(simAnswer) {
			return
		}
		if got := p.got.Next(len(simAnswer)); string(got) != simAnswer {
			p.fail("got %.50q in place of the 101", got)
		}
		p.upgraded = true
	}
	for p.got.Len() >= 2 {
		got := p.got.Bytes()
		size, n := 2, int(got[1])
		switch {
		case n == 126 && len(got) >= 4:
			size, n = 4, int(binary.BigEndian.Uint16(got[2:]))
		case n == 127 && len(got) >= 10:
			size, n = 10, int(binary.BigEndian.Uint64(got[2:]))
		case n >= 126:
			return
		}
		if len(got) < size+n {
			return
		}
		first, payload := got[0], p.got.Next(size + n)[size:]
		if first == last|opText {
			p.texts++
			p.textBytes += uint64(n)
		}
		switch {
		case p.closed:
			p.fail("got opcode %#x behind the close frame", first)
		case first == last|opText && p.role == roleBinary:
			p.takeEnvelope(payload)
		case first == last|opText:
			if len(p.down) == 0 || !p.down[0].is(payload) {
				p.fail("got %.60q, and %d other frames were sent", payload, len(p.down))
			}
			p.down = p.down[1:]
			p.taken++
		case first == last|opPing:
			if !p.mute && !p.done {
				p.send.frame(last, opPong, payload)
			}
		case first == last|opPong:
			i := slices.Index(p.pings, string(payload)) // of several, the latest may be answered alone
			if i < 0 {
				p.fail("pong %q answers no ping", payload)
			}
			p.pings = p.pings[i+1:]
		case first == last|opClose:
			p.takeClose(payload)
		default:
			p.fail("got a frame that begins with %#x", first)
		}
	}
}

// takeEnvelope is a daemon's: a phone's message or its close notice.
func (p *simPeer) takeEnvelope(text []byte) {
	rest, ok := bytes.CutPrefix(text, []byte(`{"conn_id":"`))
	id, rest, ok2 := bytes.Cut(rest, []byte(`",`))
	ph := p.w.byID[string(id)]
	if !ok || !ok2 || ph == nil || ph.home != p.home || ph.role != rolePhone {
		p.fail("got %.60q", text)
	}
	frame, isFrame := bytes.CutPrefix(rest, []byte(`"frame":`))
	switch {
	case ph.tell == noticeGot:
		p.fail("got %.60q behind the close notice", text)
	case ph.daemon != p:
		p.fail("got %.60q of a phone that is %v's", text, ph.daemon)
	case isFrame:
		said, whole := bytes.CutSuffix(frame, []byte{'}'})
		if len(ph.up) == 0 || !whole || !ph.up[0].is(said) {
			p.fail("got %.60q, and %d other messages were sent", text, len(ph.up))
		}
		ph.up = ph.up[1:]
		p.taken++
		p.w.frames++
		p.w.frameBytes += int64(len(frame) - 1)
	default:
		if want := fmt.Sprintf(`"close_code":%d}`, ph.code); string(rest) != want {
			p.fail("got notice %q of %s, want %q", rest, ph, want)
		}
		if ph.tell == noticeNone || ph.tell == noticeDue && ph.toldTo != p {
			p.fail("got a notice of %s, which ended for %q: %d", ph, ph.reason, ph.tell)
		}
		whole := ph.reason == endPeerClosed || ph.reason == ph.flaw || ph.reason == endPeerLost && !ph.sock.reset && ph.sock.watched
		if len(ph.up) > 0 && whole {
			p.fail("%d messages of %s, which ended for %q, are lost", len(ph.up), ph, ph.reason)
		}
		ph.tell = noticeGot
	}
}

// takeClose holds a close frame against the reason for which the relay has ended it.
func (p *simPeer) takeClose(payload []byte) {
	p.closed, p.closeAt = true, p.w.now()
	code, text := uint16(noCloseCode), ""
	if len(payload) >= 2 {
		code, text = binary.BigEndian.Uint16(payload), string(payload[2:])
	}
	want := ""
	if p.reason != endPeerClosed && p.reason != endNone {
		want = p.reason.String()
	}
	if p.reason == endNone || code != p.code || !strings.HasPrefix(text, want) || want == "" && text != "" {
		p.fail("closed with %d %q, want %d %q", code, text, p.code, p.reason)
	}
	if p.reason == endBinaryDirective && len(p.down) > 0 {
		p.fail("%d frames in front of the close are lost", len(p.down))
	}
	p.w.log("%s: closed with %d %q", p, code, text)
	if p.mute {
		return
	}
	if !p.done || p.flaw == endNotJSON || p.flaw == endInvalidUTF8 { // its frames are as they should be
		p.send.frame(last, opClose, payload[:min(len(payload), 2)])
	}
	// A client should leave it to the server to end TCP (RFC 6455 §7.1.1).
	p.done, p.sendEnd = true, p.sendEnd || p.halfAt != 0 || p.rng.IntN(2) == 0
}

func (p *simPeer) unwatched() bool { return !p.sock.watched }

// judge is for the moment at which the relay has ended p: is there a cause? holder is
// who holds p's home now.
func (p *simPeer) judge(holder *simPeer) {
	w, o, s, now := p.w, &p.w.o, p.s, p.w.now()
	p.reason, p.code, p.ended = s.endReason, s.endCode, now
	w.reasons[p.reason]++
	w.log("%s has ended for %q, code %d", p, p.reason, p.code)
	before := p.home.holder
	since := func(t int64, least time.Duration) bool { return now-t >= int64(least) }
	ok := false
	switch p.reason {
	case endPeerClosed:
		ok = p.closes == int(p.code)
	case endPeerLost:
		ok = p.lost || p.unwatched() || w.ending && s.failed
	case endHeartbeat:
		ok = since(p.heard, o.ping) && (p.mute || p.done || p.stuck) && s.out.n <= 2+maxControl // no ping behind a queue
	case endMessageTimeout:
		ok = p.halfAt != 0 && since(p.halfAt, o.messageTimeout)
	case endWriteTimeout:
		// Of a record of TLS the relay sees only that it is out.
		ok = (p.tls != nil || p.w.goroutines != nil || since(p.took, o.writeTimeout)) && p.stuck
	case endBacklogFull:
		n := p.sock.out.Len()
		for _, frame := range p.down {
			n += maxSendHeader + frame.size()
		}
		for _, ping := range p.pings {
			n += 2 + len(ping)
		}
		ok = p.role == rolePhone && n > o.queue
	case endMemoryLimit:
		ok = 2*(w.r.buffers.budget.used()+int64(2*o.maxFrame)+int64(bufferSizes[len(bufferSizes)-1])) > o.queueTotal
	case endNeverSeen, endLastHeld, endTooManyPhones:
		ok = p.role == rolePhone && !p.joined
	case endBinaryGone:
		ok = p.joined && holder == nil || before != holder
	case endGraceExpired:
		ok = p.joined && (p.home.probe || before == nil && since(p.home.freed, o.grace))
	case endReclaimed, endReplaced:
		ok = p.joined && before != holder
	case endTakenOver:
		ok = p.role == roleBinary && since(p.heard, o.challengeTimeout)
	case endAlreadyClaimed:
		for _, h := range w.live { // who was there, has followed just now, or did so and has ended
			ended := h.role == roleBinary && h.home == p.home && h.s.contendsSince == 0 && h.ended == now
			held := h != p && (h == before || h == holder || ended)
			// What crypto/tls has read ahead counts when it is opened.
			ok = ok || held && (h.heard >= p.arrived || h.tls != nil && h.heard >= p.arrived-int64(mostLate))
		}
	case endBinaryDirective:
		ok = p.directive == int(p.code)
	case endShutdown:
		ok = w.ending
	default:
		ok = p.reason == p.flaw
	}
	if !ok {
		p.fail("ended for %q, code %d, without a cause: %+v", p.reason, p.code, p.facts())
	}
	if !p.joined {
		return
	}
	switch p.reason {
	case endBinaryDirective, endReclaimed, endReplaced, endGraceExpired, endBinaryGone:
		return
	}
	switch {
	case before != holder, p.directive != 0 && (p.reason == endBacklogFull || p.reason == endMemoryLimit):
		p.tell = noticeMaybe
	case holder != nil:
		p.tell, p.toldTo = noticeDue, holder
	}
}

// facts are what a failure shows.
func (p *simPeer) facts() string {
	s, now := p.s, p.w.now()
	return fmt.Sprintf("deaf %v, stuck %v, mute %v, slow %d, done %v, closes %d, lost %v, flaw %d, heard %v ago, took %v ago, "+
		"queued %d, used %d, paused %v",
		p.deaf, p.stuck, p.mute, p.slow, p.done, p.closes, p.lost, p.flaw, time.Duration(now-p.heard), time.Duration(now-p.took),
		s.out.n, p.w.r.buffers.budget.used(), s.paused.Load())
}

// checkSettled is for the end: what could arrive has arrived.
func (p *simPeer) checkSettled() {
	healthy := func(p *simPeer) bool { return p != nil && p.reason == endNone && !p.deaf && !p.done }
	switch {
	case p.tell == noticeDue && healthy(p.toldTo):
		p.fail("its daemon has got no notice")
	case p.reason != endNone && !p.s.is(connClosed):
		p.fail("still closing for %q", p.reason)
	case !healthy(p):
	case p.mute:
		p.fail("silent, and still there")
	case p.sock.fd >= 0 && p.sock.limitation != (p.role == roleBinary):
		p.fail("its kernel buffer is bounded: %v", p.sock.limitation)
	case len(p.pings) > 0:
		p.fail("%d pings without an answer", len(p.pings))
	case p.s.contendsSince != 0:
		p.fail("still contends")
	case p.role == rolePhone && (p.s.rxFrames != uint32(p.said) || p.s.rxBytes != p.saidBytes):
		p.fail("has sent %d messages of %d bytes, and %d of %d are counted", p.said, p.saidBytes, p.s.rxFrames, p.s.rxBytes)
	case p.s.txFrames != p.texts || p.s.txBytes != p.textBytes:
		p.fail("has got %d messages of %d bytes, and %d of %d are counted", p.texts, p.textBytes, p.s.txFrames, p.s.txBytes)
	case len(p.down) > 0 && healthy(p.daemon) && p.directive == 0:
		p.fail("%d frames have not arrived", len(p.down))
	case p.directive != 0 && healthy(p.daemon):
		p.fail("its daemon closed it, and it is there")
	case len(p.up) > 0 && healthy(p.daemon):
		p.fail("%d messages have not arrived", len(p.up))
	}
}

// simText is what messages are made of: the inside of a JSON string, and before which
// of its bytes that may begin or end.
var simText = sync.OnceValues(func() (text []byte, cut []bool) {
	rng := rand.New(rand.NewPCG(0, 0))
	add := func(piece string) {
		text = append(text, piece...)
		cut = append(append(cut, true), make([]bool, len(piece)-1)...)
	}
	for len(text) < 1<<20 {
		for range rng.IntN(1 << rng.IntN(12)) {
			add(stressPieces[rng.IntN(len(stressPieces))])
		}
		for range rng.IntN(1 << rng.IntN(15)) { // long strings take another way through the scanner
			add("x")
		}
	}
	return text, append(cut, true)
})

// simMessage is a message in pieces.
type simMessage [][]byte

// makeMessage makes message n of a peer, with size bytes of text, or a few less.
func (w *simulation) makeMessage(from string, n, size int) simMessage {
	text, cut := simText()
	begin := w.rng.IntN(len(text) - size)
	end := begin + size
	for begin < end && !cut[begin] {
		begin++
	}
	for begin < end && !cut[end] {
		end--
	}
	return simMessage{fmt.Appendf(nil, `{"from":%q,"n":%d,"body":"`, from, n), text[begin:end], []byte(`" , "end" : [ 1.50 , null ] }`)}
}

func (m simMessage) size() (n int) {
	for _, b := range m {
		n += len(b)
	}
	return n
}

// is reports whether b is m.
func (m simMessage) is(b []byte) bool {
	for _, piece := range m {
		if !bytes.HasPrefix(b, piece) {
			return false
		}
		b = b[len(piece):]
	}
	return len(b) == 0
}

// cut parts m behind its first n bytes.
func (m simMessage) cut(n int) (front, rest simMessage) {
	for i, b := range m {
		if n < len(b) {
			return append(front, b[:n]), append(simMessage{b[n:]}, m[i+1:]...)
		}
		front = append(front, b)
		n -= len(b)
	}
	return front, nil
}

// in puts m into an envelope.
func (m simMessage) in(before, behind string) simMessage {
	return append(append(simMessage{[]byte(before)}, m...), []byte(behind))
}

// write sends a message, as one frame or in fragments with pings between them.
func (p *simPeer) write(message ...[]byte) {
	m, rng, op := simMessage(message), p.w.rng, byte(opText)
	if rng.IntN(8) == 0 {
		op = opBinary
	}
	for rng.IntN(4) == 0 {
		front, rest := m.cut(rng.IntN(m.size() + 1))
		p.send.frame(more, op, front...)
		m, op = rest, opContinuation
		if rng.IntN(3) == 0 {
			p.ping()
		}
	}
	p.send.frame(last, op, m...)
}

func (p *simPeer) ping() {
	ping := fmt.Sprintf("ping %0*d", p.w.rng.IntN(maxControl-5), p.w.rng.Uint32())
	p.pings = append(p.pings, ping)
	p.send.frame(last, opPing, []byte(ping))
}

// say sends a message to the other side.
func (p *simPeer) say() {
	w := p.w
	message := w.makeMessage(p.id, p.said, w.size())
	p.said++
	if p.role == rolePhone {
		p.up = append(p.up, message)
		p.saidBytes += uint64(message.size())
		p.write(message...)
		return
	}
	var mine []*simPeer
	for _, ph := range w.live {
		if ph.daemon == p && ph.directive == 0 && ph.reason == endNone {
			mine = append(mine, ph)
		}
	}
	other := w.anyPeer()
	foreign := other.home != p.home || other.role == roleBinary || other.daemon != nil && p.s.contendsSince != 0
	if foreign && w.chance(5) {
		p.write(fmt.Appendf(nil, `{"conn_id":%q,"frame":"not yours","close_code":4401}`, other.id))
		return
	}
	if w.chance(30) {
		many := 1
		if w.chance(20) { // more than are remembered
			many = 2 * maxOthers
		}
		for range many {
			p.write(fmt.Appendf(nil, `{"conn_id":%q,"frame":null,"close_code":4401}`, p.foreignID()))
		}
		return
	}
	if len(mine) == 0 || w.chance(20) {
		bad := []string{`[]`, `{"frame":1}`, `{"conn_id":"nobody","frame":1}`, `{"conn_id":"x","close_code":1005}`, `{"push_wake":{}}`}
		p.write([]byte(bad[w.rng.IntN(len(bad))]))
		return
	}
	ph := mine[w.rng.IntN(len(mine))]
	if w.chance(25) {
		ph.directive = 4401 + w.rng.IntN(30)
		w.log("%s closes %s with %d", p, ph, ph.directive)
		if w.chance(2) {
			p.write(fmt.Appendf(nil, `{"close_code":%d,"conn_id":%q,"frame":null}`, ph.directive, ph.id))
			return
		}
		ph.down = append(ph.down, message)
		p.write(message.in(fmt.Sprintf(`{"conn_id":%q,"frame":`, ph.id), fmt.Sprintf(`,"close_code":%d}`, ph.directive))...)
		return
	}
	ph.down = append(ph.down, message)
	p.write(message.in(`{"frame":`, fmt.Sprintf(`,"conn_id":%q}`, ph.id))...)
}

// simOthers is how many other relays daemons may tell of.
const simOthers = 2 * maxOthers

// foreignID is the conn_id of a phone that the daemon had at another relay, or none.
func (p *simPeer) foreignID() string {
	w, r := p.w, p.w.r
	if w.chance(5) {
		return []string{"", "a", strings.Repeat("*", 54), strings.Repeat("x", 64)}[w.rng.IntN(4)]
	}
	age, now := uint32(w.rng.IntN(1+int(r.age()/time.Second))), uint32(r.date())
	t := connTag{relay: 1 + w.rng.Uint64N(simOthers), minted: now, age: age}
	e := evidenceCount
	switch w.rng.IntN(8) {
	case 0:
		t.relay = r.me
	case 1:
		e, t.after = evidenceCertain, r.me
	case 2: // while this relay was there, by a clock that is as wrong as it may be
		e, t.relay, t.minted = evidenceSuspected, 1, now+clockTolerance
	case 3:
		if w.chance(50) { // by a clock that is wrong for sure
			t.minted = now + 2*clockTolerance
		}
	case 4:
		t.minted, t.age = now-100_000, 1<<20
	}
	if !p.home.probe {
		w.named[e] = true
	}
	return newConnID(t)
}

// act is what a peer does of its own.
func (p *simPeer) act() {
	w := p.w
	if p.deaf && w.chance(3) {
		if p.listen(true); w.calm {
			w.pump()
		}
	}
	if p.done || p.mute {
		return
	}
	switch x := w.rng.IntN(100); {
	case x < 72:
		for range 1 + w.rng.IntN(1<<w.rng.IntN(6)) {
			p.say()
		}
		return
	case x < 80:
		n := 1
		if w.chance(20) { // more than one batch answers at once
			n = w.rng.IntN(1000)
		}
		for range n {
			p.ping()
		}
		return
	case x < 84:
		p.wasDeaf, p.stuck = true, true
		p.listen(false)
		w.log("%s takes nothing", p)
		return
	case x < 87 && w.calm: // how much it has taken is the poller's affair
		return
	case x < 87:
		slow := 1 << (5 + w.rng.IntN(8))
		if p.stuck = true; p.slow == 0 || slow < p.slow { // only ever slower, so that what it has taken is known
			p.slow = slow
		}
		w.log("%s takes %d bytes in a tick", p, p.slow)
		return
	case x < 89:
		p.mute = true
		w.log("%s is silent from now on", p)
		return
	}
	p.done = true
	switch x := w.rng.IntN(10); {
	case x < 3:
		p.closes = []int{noCloseCode, 1000, 1001, 3000 + w.rng.IntN(2000)}[w.rng.IntN(4)]
		payload := closePayload(uint16(p.closes), "")
		if p.closes == noCloseCode {
			payload = nil
		}
		p.send.frame(last, opClose, payload)
		p.sendEnd = w.chance(4)
		w.log("%s closes with %d", p, p.closes)
	case x < 5:
		p.lost, p.sendEnd = true, true
		if w.chance(2) {
			p.send.add(clientFrame(last, opText, []byte(`"half of it"`))[:9], -1)
		}
		w.log("%s ends TCP", p)
	case x < 7 && w.calm && p.s.paused.Load(): // how much of what is lost was read is the poller's affair
		p.done = false
	case x < 7:
		p.send, p.lost, p.over = simStream{}, true, true
		p.sock.mu.Lock()
		p.sock.reset, p.sock.ready, p.sock.out = true, true, bytes.Buffer{}
		p.sock.changed.Broadcast()
		p.sock.mu.Unlock()
		w.log("%s breaks TCP", p)
		w.judge()
	case x < 8:
		frame := clientFrame(last, opText, bytes.Join(w.makeMessage(p.id, 0, 200), nil))
		n := 1 + w.rng.IntN(len(frame)-1)
		p.send.add(frame[:n], -1)
		p.rest, p.halfAt = frame[n:], w.now()
		w.log("%s leaves a message unfinished", p)
	default:
		v := violations[w.rng.IntN(len(violations))]
		for v.reason == endNotJSON && p.role == roleBinary {
			v = violations[w.rng.IntN(len(violations))]
		}
		if w.chance(10) { // as a proxy does that speaks to the wrong side
			if v.reason, v.bytes = endUnmasked, []byte{last | opClose, 0}; p.s.proxied {
				v.reason = endProxyClosed
			}
		}
		p.flaw = v.reason
		p.send.add(v.bytes, -1)
		w.log("%s breaks a rule: %v", p, v.reason)
	}
}

// listen has p take what comes, or nothing.
func (p *simPeer) listen(on bool) {
	p.deaf = !on
	if p.w.calm && p.w.goroutines != nil { // what a loop's socket holds is with the poller
		p.sock.mu.Lock()
		p.sock.outCap = 0
		if on {
			p.sock.outCap = goWriteSize
		}
		p.sock.changed.Broadcast()
		p.sock.mu.Unlock()
		p.w.served()
	}
}

// room is what the relay's end may hold of what is sent to p without seeing how much it takes.
func (p *simPeer) room() int {
	n := p.sock.outCap
	if p.tls != nil {
		n += 2 * maxRecord
	}
	if p.w.goroutines != nil {
		n += goWriteSize
	}
	return n
}

// tick is what half a second brings.
func (p *simPeer) tick() {
	if p.slow > 0 {
		p.take(p.slow)
	}
	if len(p.rest) > 1 && p.rng.IntN(3) == 0 {
		p.send.add(p.rest[:1], -1)
		p.rest = p.rest[1:]
	}
}

// ---- a peer's TLS ----

// simTLS is the relay's side, as its entrance has it. Keys of 32 bytes and no tickets
// make a handshake cheap, and each as long as the next.
var simTLS = sync.OnceValue(func() *tls.Config {
	public, key, err := ed25519.GenerateKey(crand.Reader)
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: historyStart.AddDate(100, 0, 0)}
	der, err2 := x509.CreateCertificate(crand.Reader, c, c, public, key)
	if err := errors.Join(err, err2); err != nil {
		panic(err)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, CurvePreferences: []tls.CurveID{tls.X25519},
		SessionTicketsDisabled: true, DynamicRecordSizingDisabled: true,
	}
})

// simSealed is what a peer's crypto/tls has in place of a connection.
type simSealed struct {
	net.Conn              // of the handshake, and nil behind it
	in       bytes.Buffer // not decrypted
	out      bytes.Buffer // the network has not taken it
	ended    bool         // the relay's TLS is over
	said     bool         // the peer's is
}

func (s *simSealed) Read(p []byte) (int, error) {
	switch {
	case s.Conn != nil:
		return s.Conn.Read(p)
	case s.in.Len() == 0:
		return 0, os.ErrDeadlineExceeded
	}
	return s.in.Read(p)
}

func (s *simSealed) Write(p []byte) (int, error) {
	if s.Conn != nil {
		return s.Conn.Write(p)
	}
	return s.out.Write(p)
}

func (s *simSealed) SetWriteDeadline(time.Time) error { return nil }

// secure puts TLS on a connection, whose handshake is done at once. Of first, which the
// peer has sent behind its request, net/http gets a part, and the relay's crypto/tls has
// read more.
func (p *simPeer) secure(nc net.Conn, first []byte) (net.Conn, []byte) {
	w := p.w
	near, far := net.Pipe()
	p.sealed = &simSealed{Conn: near}
	config := &tls.Config{InsecureSkipVerify: true, CurvePreferences: []tls.CurveID{tls.X25519}, DynamicRecordSizingDisabled: true}
	if config.MaxVersion = tls.VersionTLS13; w.chance(3) {
		config.MaxVersion = tls.VersionTLS12
	}
	p.tls = tls.Client(p.sealed, config)
	under := &wire{Conn: far, left: maxHelloBytes}
	server := &tlsConn{Conn: tls.Server(under, simTLS()), wire: under, relay: w.r}
	done := make(chan error)
	go func() { done <- server.handshake() }()
	if err := errors.Join(p.tls.Handshake(), <-done); err != nil {
		p.fail("TLS: %v", err)
	}
	p.sealed.Conn = nil
	for len(first) > 0 {
		n := 1 + w.rng.IntN(len(first))
		p.tls.Write(first[:n])
		first = first[n:]
	}
	ahead := new(simSealed)
	ahead.in.Write(p.sealed.out.Next(w.rng.IntN(p.sealed.out.Len() + 1)))
	under.Conn = ahead
	got := make([]byte, 1+w.rng.IntN(5000))
	n, _ := server.Read(got)
	ahead.in.Write(p.sealed.out.Bytes()) // crypto/tls had no room for it
	p.sealed.out = ahead.in
	under.Conn = nc
	return server, got[:n]
}

// sealUp returns how much p has for the network, which with TLS is what is sealed by now.
func (p *simPeer) sealUp(most int) int {
	if p.tls == nil {
		return p.send.n
	}
	s := p.sealed
	switch {
	case s.out.Len() > 0 || s.said:
	case p.send.n > 0:
		p.w.plain = p.send.take(p.w.plain[:0], min(most, 64<<10))
		p.tls.Write(p.w.plain)
	case p.sendEnd && !p.sock.inEnd && (!p.lost || p.rng.IntN(2) == 0): // else it ends TCP alone
		s.said = true
		p.tls.CloseWrite()
	}
	return s.out.Len()
}

// open takes what has arrived out of its seal.
func (p *simPeer) open() {
	for err := error(nil); err == nil; {
		var n int
		n, err = p.tls.Read(p.w.record[:])
		p.got.Write(p.w.record[:n])
		if p.sealed.ended = err == io.EOF; err != nil && err != io.EOF && err != os.ErrDeadlineExceeded {
			p.fail("TLS: %v", err)
		}
	}
}

// ---- runs ----

// simulate runs a world, and returns what fails in it, and at which step.
func simulate(plan simPlan, trace *logBuffer) (w *simulation, failure string) {
	w, steps := newSimulation(plan, trace)
	defer func() {
		switch v := recover().(type) {
		case nil:
			return
		case simFailure:
			failure = string(v)
		default:
			failure = fmt.Sprintf("panic: %v\n%s", v, debug.Stack())
		}
		for _, p := range w.peers { // no goroutine may stay
			if w.goroutines != nil {
				p.s.fail()
			}
		}
		w.quiet()
	}()
	w.run(steps)
	// A sync.Pool outlives the next collection, with all that its relay refers to.
	w.r.loops = nil
	for i := range w.r.buffers.pools {
		for w.r.buffers.pools[i].Get() != nil {
		}
	}
	return w, ""
}

// TestSimulation runs PYRYCODE_SIMULATION_WORLDS worlds on the loops, a fortieth as many
// on the goroutine poller, and as many calm ones on both, from PYRYCODE_SIMULATION_SEED on.
// PYRYCODE_SIMULATION is one world, with its trace.
func TestSimulation(t *testing.T) {
	t.Parallel()
	if v := os.Getenv("PYRYCODE_SIMULATION"); v != "" {
		plan := parseWorld(t, v)
		synctest.Test(t, func(t *testing.T) {
			trace := new(logBuffer)
			if _, failure := simulate(plan, trace); failure != "" {
				t.Errorf("%s\n%s", trace, failure)
			} else {
				t.Logf("%s", trace)
			}
		})
		return
	}
	first, n := stressNumber(t, "PYRYCODE_SIMULATION_SEED", 1), stressNumber(t, "PYRYCODE_SIMULATION_WORLDS", fewWorlds(100, 20))
	workers := uint64(runtime.GOMAXPROCS(0))
	for i := range workers {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				frames, reasons := 0, [closeReasonCount]int{}
				play := func(plan simPlan) *simulation {
					w, failure := simulate(plan, nil)
					if failure != "" {
						reportWorld(t, plan, w.step, failure)
					}
					frames += w.frames
					for r, k := range w.reasons {
						reasons[r] += k
					}
					return w
				}
				for seed := first + i; seed < first+n && !t.Failed(); seed += workers {
					plan := wholeWorld(seed)
					play(plan)
					if plan.poller = "goroutines"; seed/workers%40 == 0 && !t.Failed() {
						play(plan)
						plan.calm = true
						both := []*simulation{play(plan)}
						plan.poller = "epoll"
						if both = append(both, play(plan)); !t.Failed() {
							compareWorlds(t, plan, both[0].outcome(), both[1].outcome())
						}
					}
				}
				text := ""
				for r, k := range reasons {
					text += fmt.Sprintf(", %s %d", closeReason(r), k)
				}
				t.Logf("%d frames up; ends: %s", frames, text[2:])
			})
		})
	}
}

// outcome is what became of each peer.
func (w *simulation) outcome() (all []string) {
	for _, p := range w.peers {
		all = append(all, fmt.Sprintf("%s ended for %q, code %d; close frame %v; %d frames taken, %d and %d of its own or for it left; its daemon was told: %v",
			p, p.reason, p.code, p.closed, p.taken, len(p.up), len(p.down), p.tell == noticeGot))
	}
	// How often is by chance: of many that are told of at one moment any may be forgotten.
	return append(all, fmt.Sprint("another relay is ", w.r.others.verdict(w.r.age())))
}

// compareWorlds holds what both pollers made of one world against each other.
func compareWorlds(t *testing.T, plan simPlan, goroutines, loops []string) {
	for i := range max(len(goroutines), len(loops)) {
		a, b := "nothing", "nothing"
		if i < len(goroutines) {
			a = goroutines[i]
		}
		if i < len(loops) {
			b = loops[i]
		}
		if a != b {
			other := plan
			other.poller = "goroutines"
			t.Fatalf("PYRYCODE_SIMULATION=%v\nPYRYCODE_SIMULATION=%v\nthe pollers come to different ends:\n%s\n%s", other, plan, a, b)
		}
	}
}

// TestSimulationIsDecidedBySeed runs worlds twice.
func TestSimulationIsDecidedBySeed(t *testing.T) {
	t.Parallel()
	for seed := range fewWorlds(5, 1) {
		var traces [2]logBuffer
		for i := range traces {
			synctest.Test(t, func(t *testing.T) { simulate(wholeWorld(seed), &traces[i]) })
		}
		a, b := strings.Split(traces[0].String(), "\n"), strings.Split(traces[1].String(), "\n")
		for i, line := range a {
			if i >= len(b) || b[i] != line {
				t.Fatalf("seed %d, line %d of %d: %q, and then %q", seed, i, len(a), line, b[min(i, len(b)-1)])
			}
		}
	}
}

// parseWorld reads a plan.
func parseWorld(t *testing.T, v string) simPlan {
	plan := wholeWorld(0)
	parts := strings.Split(v, ",")
	if n := len(parts) - 1; parts[n] == "calm" {
		plan.calm, parts = true, parts[:n]
	}
	if n := len(parts) - 1; parts[n] == "goroutines" || parts[n] == "epoll" {
		plan.poller, parts = parts[n], parts[:n]
	}
	seed, err := strconv.ParseUint(parts[0], 10, 64)
	plan.seed = seed
	for i, p := range [...]*int{&plan.steps, &plan.homes} {
		if err == nil && i+1 < len(parts) {
			*p, err = strconv.Atoi(parts[i+1])
		}
	}
	if err != nil {
		t.Fatalf("PYRYCODE_SIMULATION: %v", err)
	}
	return plan
}

// reportWorld makes a world that fails as small as it goes, and says how to run it.
func reportWorld(t *testing.T, plan simPlan, steps int, failure string) {
	plan.steps, plan.homes = steps+1, 3
	try := func(smaller simPlan) {
		if w, f := simulate(smaller, nil); f != "" && w.step < plan.steps {
			failure, plan = f, smaller
		}
	}
	for cut := plan.steps / 2; cut > 0; cut /= 2 {
		smaller := plan
		smaller.steps -= cut
		try(smaller)
	}
	for smaller := plan; smaller.homes > 1; {
		smaller.homes--
		try(smaller)
	}
	trace := new(logBuffer)
	simulate(plan, trace)
	lines := strings.Split(strings.TrimSpace(trace.String()), "\n")
	t.Errorf("%s\nto run it again: PYRYCODE_SIMULATION=%v go test -run '^TestSimulation$' -v .\nits last lines:\n%s",
		failure, plan, strings.Join(lines[max(0, len(lines)-40):], "\n"))
}

// ---- parts of the loop ----

// Connections that flood the relay take turns, a few between two looks at who
// else has something, and in the order in which they came.
func TestEpollReadyTakeTurns(t *testing.T) {
	t.Parallel()
	l := &epollLoop{share: 1}
	var all []*conn
	for range 2*roundReads + 1 {
		s := &epollSocket{loop: l, fd: -1, busy: true}
		s.c = &conn{sock: s}
		all = append(all, s.c)
	}
	l.ready = slices.Clone(all)
	for _, want := range []int{roundReads, 2 * roundReads, len(all), len(all)} {
		l.readOn()
		if !slices.Equal(l.ready, all[want:]) {
			t.Fatalf("%d still wait, want the last %d", len(l.ready), len(all)-want)
		}
		for i, c := range all {
			if waits := c.sock.(*epollSocket).busy; waits != (i >= want) {
				t.Fatalf("number %d waits: %v, when %d had their turn", i, waits, want)
			}
		}
	}
}

// tightKernel takes what there is room for.
type tightKernel struct {
	kernel
	room int
	sent []byte
}

func (k *tightKernel) send(_ int, bufs [][]byte) (int, error) {
	n := min(k.room, len(bufs[0]))
	if n == 0 {
		return 0, syscall.EAGAIN
	}
	k.sent = append(k.sent, bufs[0][:n]...)
	k.room -= n
	return n, nil
}

func (k *tightKernel) watch(int) error { return nil }
func (k *tightKernel) wake()           {}

// What TLS has read ahead is handled first, and then what the socket tells: else a phone
// that pauses by that is released again, by its own beginning.
func TestEpollSealedBeginsWithWhatWasRead(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions()).relay
	_, _, ph, _, _ := memPair(t, r)
	l := makeEpollLoop(r, new(tightKernel))
	(&epollSocket{loop: l, c: &ph.conn, fd: 1, tls: new(sealed)}).attach(nil)
	if !ph.paused.Load() || len(l.inbox) != 1 {
		t.Errorf("it pauses: %v; it has its turn: %d times", ph.paused.Load(), len(l.inbox))
	}
}

// What is encrypted and not sent is charged, bounded and in order, for a peer that
// makes TLS answer and takes nothing as well.
func TestEpollSealedStages(t *testing.T) {
	t.Parallel()
	r, k := startRelay(t, testOptions()).relay, &tightKernel{room: 1000}
	s := &sealed{sock: &epollSocket{loop: &epollLoop{relay: r, kernel: k}, fd: 1}}
	var want []byte
	for i := 0; ; i++ {
		p := bytes.Repeat([]byte{byte(i)}, 999)
		n, err := s.Write(p)
		if err != nil {
			break
		}
		want = append(want, p...)
		held := len(want) - 1000
		if n != len(p) || held > 2*maxRecord || held > 0 && r.buffers.budget.used() < int64(held) || s.unsent() != (held > 0) {
			t.Fatalf("%d of %d bytes taken, %d held, %d charged", n, len(p), held, r.buffers.budget.used())
		}
	}
	if len(want) < 2*maxRecord {
		t.Errorf("%d bytes were taken, want %d and more", len(want), 2*maxRecord)
	}
	for s.unsent() {
		k.room = 700
	}
	if !bytes.Equal(k.sent, want) || r.buffers.budget.used() != 0 {
		t.Errorf("%d bytes arrived, want %d in order; %d are still charged", len(k.sent), len(want), r.buffers.budget.used())
	}
}
