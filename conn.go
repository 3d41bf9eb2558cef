package main

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A WebSocket connection after the opening handshake: RFC 6455 from there on. One
// reader hands it what the socket has; it takes frames apart, puts messages together
// and gives them to its handler. Any goroutine may queue bytes for the peer. They go
// out without blocking, coalesced, and what the socket does not take waits in a
// bounded queue. The relay's sweep looks at timeouts, so that an idle connection has
// no timer, no goroutine and no buffer.
//
// A connection ends in steps:
//
//	       startClose: a close frame          advanceClose: both
//	       goes out behind what is queued     close frames are out
//	open ------------------------------> closing ---------------> lingering
//	  |                                     |                         |
//	  |         the peer's FIN, or a reset, which fail brings about   |
//	  +-------------------------------------+-------------------------+--- free ---> closed
//
// fail gives up on the peer, because the socket broke or a deadline passed: nothing
// more is sent, and the reader finds the end of the socket. As open is left, by
// whichever way, handler.unregister is called, and handler.closed at the end, each once.

const (
	// directWrite is the payload size from which a message goes to an idle socket
	// straight from where it was read. Below it the copy into the queue costs less
	// than the system call that coalescing saves.
	directWrite = 8 << 10
	// flushAt bounds what a batch gathers for one peer before it is written.
	flushAt = 64 << 10
	// growth is how many times the bytes that have arrived of a frame may be allocated
	// for it: few steps to the largest frame, and no memory for what is only announced.
	growth = 4
)

// errAgain says that the socket takes or has no more for now.
var errAgain = errors.New("socket would block")

// socket is what a connection needs of its transport. No method blocks.
type socket interface {
	// attach starts the reading; first is what arrived behind the handshake.
	attach(first []byte)
	// write takes what it can of bufs; errAgain when that was not all, and
	// conn.writable is called once more can be taken.
	write(bufs [][]byte) (int, error)
	// unsent reports whether bytes that write took are not with the kernel yet;
	// conn.writable is called once they are.
	unsent() bool
	// closeWrite ends our direction once what was written is out.
	closeWrite()
	// shutdown ends both directions at once; the reader then finds the end.
	shutdown()
	// resume asks the reader to go on after a pause.
	resume()
}

// handler is what a connection is for.
type handler interface {
	// message takes a complete message. p is valid during the call only, and may be
	// changed. Called by the reader.
	message(w *writeBatch, op byte, p []byte)
	// answered and overdue are called while conn.challenged is set: the one by the
	// reader when the peer was heard, the other by each sweep.
	answered(w *writeBatch)
	overdue(w *writeBatch)
	// unregister is called once, as the end begins: from now on nothing more is to
	// come from here, or to go there.
	unregister(w *writeBatch, reason closeReason, code uint16)
	// closed is called once, when the socket is about to go. Called by the reader.
	closed(w *writeBatch)
}

// connState only ever grows.
type connState uint32

const (
	connOpen    connState = iota
	connClosing           // a close frame is queued or sent, or the peer is lost
	connLinger            // the close handshake is over: reading only until the peer's FIN
	connClosed            // the socket is gone
)

type conn struct {
	// Set before the reader starts.
	relay   *relay
	handler handler
	sock    socket
	addr    netip.Addr // of the client, behind proxies too
	opened  int64      // relay clock
	proxied bool       // the TCP connection is one of -trusted-proxies
	passing priority   // of its bytes while they do not wait: priorityPassing or priorityBinary

	state        atomic.Uint32 // connState; written under mu
	reads        atomic.Uint32 // times bytes were heard; written by the reader
	messageStart atomic.Int64  // relay clock at the first byte of an unfinished message, 0 if none; written by the reader
	paused       atomic.Bool   // the handler wants no message before resume, so silence means nothing; written by the reader under mu
	challenged   atomic.Bool   // the handler waits for a sign of life; written by the handler

	// Owned by the reader.
	unparsed    *buffer // read, and not handled: half a frame, or all that came behind a pause
	fragments   *buffer // of the message under way
	messageOp   byte    // of their first
	ignoreInput bool    // a rule is broken or the peer has closed: nothing in the stream counts any more
	rxFrames    uint32
	rxBytes     uint64
	behind      *conn // the binary for which it is paused, if any

	// Guarded by mu.
	mu            sync.Mutex
	out           queue
	pong          []byte // the answer to the latest ping while the socket takes nothing, nil for none
	txBytes       uint64 // payload
	queued        uint64 // bytes ever queued
	blockedSince  int64  // relay clock since the socket takes nothing, 0 while it does
	closeDeadline int64  // relay clock at which the state's patience ends, 0 for none
	pingAt        int64  // relay clock of the next ping
	txFrames      uint32
	pingMark      uint32 // reads at the last ping
	pinged        bool   // a ping is out
	dirty         bool   // in a batch that will flush
	sentClose     bool   // our close frame is out
	closeHeard    bool   // the peer's close frame is here, or none can be told from the rest
	failed        bool   // the socket failed or was given up
	endReason     closeReason
	endCode       uint16
	waiters       []*conn // phones paused until out has drained, those that wait longest first

	pushed uint64 // the binary's queued behind this phone's last message; guarded by that one's mu
}

func (c *conn) init(r *relay, h handler, role role, addr netip.Addr) {
	c.relay, c.handler, c.addr = r, h, addr
	c.opened = r.now()
	c.endReason = endNone
	c.passing = priorityPassing
	if role == roleBinary {
		c.passing = priorityBinary
	}
	// Connections that come in a wave, as after a restart, are not pinged in one.
	c.pingAt = c.opened + int64(r.o.ping)/2 + rand.Int64N(max(int64(r.o.ping)/2, 1))
}

func (c *conn) is(s connState) bool { return connState(c.state.Load()) == s }

// ---- states and timeouts: any goroutine ----

// startClose begins the connection's end, with the reason's own code and words.
func (c *conn) startClose(w *writeBatch, reason closeReason) {
	c.startCloseWith(w, reason, reason.code(), reason.String())
}

// startCloseWith begins the connection's end, unless it has begun: a close frame with
// code and text goes out behind everything queued.
func (c *conn) startCloseWith(w *writeBatch, reason closeReason, code uint16, text string) {
	c.mu.Lock()
	if !c.is(connOpen) {
		c.mu.Unlock()
		return
	}
	c.setEnd(reason, code)
	if reason == endMemoryLimit && !c.fits(0) {
		// It goes as it is: half a message is out, perhaps, which no close frame may
		// follow, and the rest of that is what there is no room for.
		c.failLocked()
	}
	var b [2 + maxControl]byte
	wire := code
	if wire == noCloseCode {
		wire = 0
	}
	c.enqueue(priorityAlways, appendCloseFrame(b[:0], wire, text), nil, nil)
	c.pong = nil
	// A peer that takes nothing has until then to take the close frame.
	wait := c.relay.o.writeTimeout
	if reason == endWriteTimeout || reason == endHeartbeat {
		wait = c.relay.o.closeTimeout
	}
	c.closeAfter(w.now, wait)
	w.addLocked(c)
	paused := c.paused.Load()
	c.mu.Unlock()
	if paused {
		c.sock.resume() // to hear the answer
	}
	c.unregister(w, reason, code)
}

// unregister is for the moment at which the end has begun. The phones that wait go on:
// what becomes of what they send is decided.
func (c *conn) unregister(w *writeBatch, reason closeReason, code uint16) {
	c.handler.unregister(w, reason, code)
	c.mu.Lock()
	woken := c.waiters
	c.waiters = nil
	c.mu.Unlock()
	wake(woken...)
}

// setEnd records how the connection ends, mu held.
func (c *conn) setEnd(reason closeReason, code uint16) {
	c.state.Store(uint32(connClosing))
	c.endReason, c.endCode = reason, code
}

func (c *conn) closeAfter(now int64, d time.Duration) { c.closeDeadline = now + int64(d) }

// advanceClose moves a connection that is closing on once its last bytes are out, mu
// held.
func (c *conn) advanceClose(now int64) {
	switch {
	case !c.is(connClosing) || c.failed:
	case c.sock.unsent(): // its time begins when they are gone
		c.blockedSince = now
	case c.closeHeard:
		// The peer's FIN ends it. Until then what it still sends is read, so that no
		// reset overtakes the close frame, which a slow peer may not have yet.
		c.state.Store(uint32(connLinger))
		c.sock.closeWrite()
		c.closeAfter(now, c.relay.o.closeTimeout)
	case !c.sentClose:
		c.sentClose = true
		c.closeAfter(now, c.relay.o.closeTimeout)
	}
}

// fail gives up on the peer.
func (c *conn) fail() {
	c.mu.Lock()
	if !c.is(connClosed) {
		c.failLocked()
	}
	c.mu.Unlock()
	c.sock.resume() // a paused reader would not find the end
}

func (c *conn) failLocked() {
	c.failed = true
	c.out.free(&c.relay.buffers)
	c.sock.shutdown()
}

// owes is for a peer that has ended its own direction: it still gets what is queued, as
// far as its socket takes that. It reports whether more waits with our close frame at
// the end: until that is out, or its time is up, the reader does not free the connection.
func (c *conn) owes(w *writeBatch) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flush(w)
	return c.closeHeard && !c.failed && (c.out.n > 0 || c.sock.unsent())
}

// free is the reader's last call: the peer's direction has ended.
func (c *conn) free(w *writeBatch) {
	c.mu.Lock()
	lost := c.is(connOpen)
	if lost {
		c.setEnd(endPeerLost, endPeerLost.code())
	}
	c.mu.Unlock()
	if lost {
		c.unregister(w, endPeerLost, endPeerLost.code())
	}
	pool := &c.relay.buffers
	for _, k := range [...]**buffer{&c.unparsed, &c.fragments} {
		if *k != nil {
			pool.put(*k)
			*k = nil
		}
	}
	c.mu.Lock()
	c.state.Store(uint32(connClosed))
	c.out.free(pool)
	c.pong = nil
	c.mu.Unlock()
	c.handler.closed(w)
}

// checkTimeouts is called by the sweep, a few times within the shortest of them.
func (c *conn) checkTimeouts(w *writeBatch) {
	o := &c.relay.o
	reason := endNone
	c.mu.Lock()
	start := c.messageStart.Load()
	switch {
	case c.is(connClosed) || c.failed:
	case !c.is(connOpen):
		if c.closeDeadline != 0 && w.now >= c.closeDeadline { // a peer that was lost has none
			c.failLocked()
		}
	case c.blockedSince != 0 && w.now-c.blockedSince >= int64(o.writeTimeout):
		if c.stuck(w) {
			reason = endWriteTimeout
		}
	case start != 0 && w.now-start >= int64(o.messageTimeout) && !c.paused.Load():
		reason = endMessageTimeout
	case w.now < c.pingAt:
	case c.out.n > 0:
		// A ping behind all that would ask nothing: the next has a whole interval.
		c.pinged = false
	case c.silent():
		reason = endHeartbeat
	default:
		c.ping(w)
	}
	c.mu.Unlock()
	if reason != endNone {
		c.startClose(w, reason)
	} else if c.challenged.Load() {
		c.handler.overdue(w)
	}
}

// stuck reports whether the peer really takes nothing, mu held. A kernel tells of
// room only when a good part of the send buffer is free, for which a slow peer may
// need longer than it has: the socket itself is asked before it is given up.
func (c *conn) stuck(w *writeBatch) bool {
	c.unblock()
	n := c.out.n
	c.flush(w)
	w.addLocked(c) // to wake the phones that wait for it
	return c.out.n == n && (n > 0 || c.sock.unsent())
}

// silent reports whether the peer has given no sign of life since its ping, mu held.
func (c *conn) silent() bool {
	return c.pinged && c.reads.Load() == c.pingMark && !c.paused.Load()
}

// ping asks the peer for a sign of life, mu held. It has a whole interval to give
// one; asking once more does not make it longer.
func (c *conn) ping(w *writeBatch) {
	if !c.is(connOpen) {
		return
	}
	c.queueControl(opPing, nil)
	if !c.silent() {
		c.pinged, c.pingMark = true, c.reads.Load()
		c.pingAt = w.now + int64(c.relay.o.ping)
	}
	w.addLocked(c)
}

// ---- reading: the connection's reader ----

// readInto is where the poller reads next: shared, or the free room of unparsed
// where more than half of shared is missing of the frame under way, so that large
// frames are not copied. That room is never more than the frame still lacks.
func (c *conn) readInto(shared []byte) []byte {
	if c.unparsed == nil {
		return shared
	}
	front := c.unparsed.bytes()
	h, _ := parseFrameHeader(front)
	lack := h.total() - len(front)
	if h.size == 0 || min(lack, (growth-1)*len(front)) <= len(shared)/2 || !c.makeRoom(front, 0) {
		return shared // where there is no memory, receive finds out and says so
	}
	k := c.unparsed
	return k.b[k.w:min(k.w+lack, len(k.b))]
}

// markAlive notes that the peer lives. It comes after what was heard has been
// handled: a binary that closes must not keep its own successor out.
func (c *conn) markAlive(w *writeBatch) {
	c.reads.Store(c.reads.Load() + 1)
	if c.challenged.Load() {
		c.handler.answered(w)
	}
}

// receive takes what the poller has read: into readInto's bytes, or anywhere else.
// Outside of unparsed p is not kept.
func (c *conn) receive(w *writeBatch, p []byte) {
	if k := c.unparsed; k != nil && k.room() > 0 && len(p) > 0 && &k.b[k.w] == &p[0] {
		k.w += len(p)
		p = nil
	}
	for c.unparsed != nil { // what came earlier comes first
		k := c.unparsed
		k.r += c.readFrames(w, k.bytes())
		if k.r == k.w || c.ignoreInput {
			c.relay.buffers.put(k)
			c.unparsed = nil
			break
		}
		if c.paused.Load() || len(p) == 0 {
			break
		}
		lack := 1 // byte by byte until the header is whole
		if h, _ := parseFrameHeader(k.bytes()); h.size > 0 {
			lack = min(h.total()-len(k.bytes()), len(p))
		}
		c.keep(w, p[:lack])
		p = p[lack:]
	}
	if c.unparsed == nil {
		p = p[c.readFrames(w, p):]
	}
	if len(p) > 0 && !c.ignoreInput {
		c.keep(w, p)
	}
	if (c.unparsed != nil || c.fragments != nil) && c.messageStart.Load() == 0 {
		c.messageStart.Store(w.now)
	}
}

// readFrames handles the whole frames at the front of p and returns how many bytes
// they are. It stops at a pause, and for good at what breaks a rule.
func (c *conn) readFrames(w *writeBatch, p []byte) (n int) {
	for n < len(p) && !c.paused.Load() && !c.ignoreInput {
		h, violation := parseFrameHeader(p[n:])
		if violation = c.admit(h, violation); violation != endNone {
			c.violation(w, violation)
			break
		}
		if h.size == 0 || len(p)-n < h.total() {
			break
		}
		c.handleFrame(w, h, p[n+h.size:n+h.total()])
		n += h.total()
	}
	return n
}

// admit checks what the header alone tells: order and size. violation is what is
// wrong with the header itself.
func (c *conn) admit(h frameHeader, violation closeReason) closeReason {
	switch {
	case violation == endUnmasked && h.op == opClose && c.proxied:
		return endProxyClosed
	case violation != endNone || h.size == 0 || h.control():
		return violation
	}
	have := int64(0)
	if c.fragments != nil {
		have = int64(c.fragments.w)
	}
	switch {
	case h.op == opContinuation && c.fragments == nil:
		return endStrayFragment
	case h.op != opContinuation && c.fragments != nil:
		return endInterleaved
	case h.length > int64(c.relay.o.maxFrame)-have:
		return endMessageTooBig
	}
	return endNone
}

// keep appends p to the bytes that are not parsed yet.
func (c *conn) keep(w *writeBatch, p []byte) {
	front := p
	if c.unparsed != nil {
		front = c.unparsed.bytes()
	}
	if !c.makeRoom(front, len(p)) {
		c.violation(w, endMemoryLimit)
		return
	}
	k := c.unparsed
	k.w += copy(k.b[k.w:], p)
}

// makeRoom makes room in unparsed for n bytes more, and for the rest of the frame
// that begins with front, as far as that is within growth times what has arrived:
// what a header announces alone takes no memory.
func (c *conn) makeRoom(front []byte, n int) bool {
	if c.unparsed != nil {
		n += len(front)
	}
	if h, _ := parseFrameHeader(front); h.size > 0 {
		n = max(n, min(h.total(), growth*max(n, 256)))
	}
	k := c.relay.buffers.grow(c.unparsed, n, c.passing)
	if k != nil {
		c.unparsed = k
	}
	return k != nil
}

// handleFrame takes a whole frame whose header was admitted.
func (c *conn) handleFrame(w *writeBatch, h frameHeader, p []byte) {
	unmask(p, h.key)
	if h.control() && c.fragments == nil {
		c.messageStart.Store(0) // what may follow begins now
	}
	switch {
	case h.op == opPing:
		c.sendPong(w, p)
	case h.op == opClose:
		c.handleClose(w, p)
	case h.op == opPong: // markAlive counts it as any bytes
	case !c.is(connOpen):
		// After a close frame of ours nothing of the peer counts but its answer.
		c.freeFragments()
	case h.fin && c.fragments == nil:
		c.handleMessage(w, h.op, p)
	default:
		if c.fragments == nil {
			c.messageOp = h.op
		}
		if !c.assemble(p) {
			c.violation(w, endMemoryLimit)
		} else if h.fin {
			c.handleMessage(w, c.messageOp, c.fragments.bytes())
			c.freeFragments()
		}
	}
}

// handleClose answers a close frame with its own code, unless it is an answer itself.
func (c *conn) handleClose(w *writeBatch, p []byte) {
	if code, violation := parseClose(p); violation != endNone {
		c.violation(w, violation)
	} else {
		c.ignoreRest(w, endPeerClosed, code, "")
	}
}

// assemble appends a fragment to the message under way.
func (c *conn) assemble(p []byte) bool {
	need := max(len(p), 1) // an empty first fragment opens a message too
	if k := c.fragments; k != nil {
		if need = k.w + len(p); need > len(k.b) {
			need = min(max(need, 2*len(k.b)), c.relay.o.maxFrame)
		}
	}
	k := c.relay.buffers.grow(c.fragments, need, c.passing)
	if k == nil {
		return false
	}
	c.fragments = k
	k.w += copy(k.b[k.w:], p)
	return true
}

func (c *conn) freeFragments() {
	if c.fragments != nil {
		c.relay.buffers.put(c.fragments)
		c.fragments = nil
	}
}

func (c *conn) handleMessage(w *writeBatch, op byte, p []byte) {
	c.messageStart.Store(0)
	c.rxFrames++
	c.rxBytes += uint64(len(p))
	c.handler.message(w, op, p)
}

// violation starts the close of a connection whose stream cannot be read on.
func (c *conn) violation(w *writeBatch, reason closeReason) {
	c.ignoreRest(w, reason, reason.code(), reason.String())
}

// ignoreRest starts the close, and waits for no answer: the peer has closed, behind
// which nothing may follow (§5.5.1), or its answer could not be told from the rest.
func (c *conn) ignoreRest(w *writeBatch, reason closeReason, code uint16, text string) {
	c.ignoreInput = true
	c.startCloseWith(w, reason, code, text)
	c.mu.Lock()
	c.closeHeard = true
	w.addLocked(c)
	c.mu.Unlock()
}

// ---- writing: any goroutine ----

// writeBatch is what one goroutine gathers between two system calls: the peers that
// it has queued bytes for, and its counts.
type writeBatch struct {
	relay *relay
	now   int64 // relay clock
	dirty []*conn
	views [8][]byte
	// front is a frame's header and the envelope's head, which fit: a conn_id has
	// at most 64 bytes. It is here because views would move it to the heap.
	front [maxSendHeader + 128]byte

	upFrames, downFrames, upBytes, downBytes int64
}

// addLocked puts c among the peers that the batch flushes, c.mu held.
func (w *writeBatch) addLocked(c *conn) {
	if !c.dirty {
		c.dirty = true
		w.dirty = append(w.dirty, c)
	}
}

// flush writes what the batch has queued.
func (w *writeBatch) flush() {
	for i := 0; i < len(w.dirty); i++ { // grows: what a flush ends may queue notices
		c := w.dirty[i]
		w.dirty[i] = nil
		c.mu.Lock()
		c.dirty = false
		fits := c.flushNew(w)
		next := c.nextWaiter()
		c.mu.Unlock()
		wake(next)
		if !fits {
			c.startClose(w, endMemoryLimit)
		}
	}
	w.dirty = w.dirty[:0]
	if w.upFrames+w.downFrames > 0 {
		m := w.relay.metrics
		m.framesUp.Add(w.upFrames)
		m.bytesUp.Add(w.upBytes)
		m.framesDown.Add(w.downFrames)
		m.bytesDown.Add(w.downBytes)
		w.upFrames, w.upBytes, w.downFrames, w.downBytes = 0, 0, 0, 0
	}
}

// greet queues the answer to an upgrade, before any other goroutine knows c: what is
// queued from then on comes behind.
func (c *conn) greet(w *writeBatch, answer []byte) {
	c.enqueue(priorityAlways, answer, nil, nil)
	w.addLocked(c)
}

// push queues one TEXT message made of three parts, mu held. Where a limit is
// reached nothing is queued and the reason is told: limit bytes in the queue (0
// for none) or the process's budget. On a connection that is ending it does
// nothing.
func (c *conn) push(w *writeBatch, limit int, head, payload, tail []byte) closeReason {
	if !c.is(connOpen) {
		return endNone
	}
	n := len(head) + len(payload) + len(tail)
	front := append(appendFrameHeader(w.front[:0], opText, n), head...)
	if size := len(front) + len(payload) + len(tail); limit > 0 && c.out.n+size > limit {
		c.flush(w)
		if c.out.n+size > limit {
			return endBacklogFull
		}
	}
	if !c.put(w, front, payload, tail) {
		return endMemoryLimit
	}
	c.txFrames++
	c.txBytes += uint64(n)
	w.addLocked(c)
	return endNone
}

// notice queues the close notice of a phone, mu held. It is never refused: there
// is one for each phone.
func (c *conn) notice(w *writeBatch, connID string, code uint16) {
	if !c.is(connOpen) {
		return
	}
	var b [128]byte
	n := appendCloseNotice(b[:0], connID, code)
	c.enqueue(priorityAlways, appendFrameHeader(w.front[:0], opText, len(n)), n, nil)
	c.txFrames++
	c.txBytes += uint64(len(n))
	w.addLocked(c)
}

// sendPong answers a ping.
func (c *conn) sendPong(w *writeBatch, p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.is(connOpen):
		return
	case c.blockedSince != 0:
		c.pong = append([]byte{}, p...) // an empty one is not nil
		return
	case c.out.n >= flushAt: // a flood of pings in one batch
		c.flush(w)
	}
	c.queueControl(opPong, p)
	w.addLocked(c)
}

// queueControl appends a control frame, mu held. It is never refused: pings are
// ours, and of pongs none is added while the socket takes nothing.
func (c *conn) queueControl(op byte, p []byte) {
	var b [2 + maxControl]byte
	f := append(appendFrameHeader(b[:0], op, len(p)), p...)
	c.enqueue(priorityAlways, f, nil, nil)
}

// enqueue appends the parts as one to what waits for the socket, or nothing at
// all when the budget is spent, mu held.
func (c *conn) enqueue(priority priority, front, payload, tail []byte) bool {
	if !c.out.add(&c.relay.buffers, priority, front, payload, tail) {
		return false
	}
	c.queued += uint64(len(front) + len(payload) + len(tail))
	return true
}

// put writes or queues one message, mu held.
func (c *conn) put(w *writeBatch, front, payload, tail []byte) bool {
	if len(payload) >= directWrite && c.blockedSince == 0 {
		c.flush(w)
	}
	size := len(front) + len(payload) + len(tail)
	if len(payload) < directWrite || c.out.n > 0 || c.failed {
		priority := c.passing
		if c.blockedSince != 0 && priority == priorityPassing {
			priority = priorityBacklog
		}
		if !c.fits(size) || !c.enqueue(priority, front, payload, tail) {
			return false
		}
		return c.out.n < flushAt || c.flushNew(w)
	}
	// The budget is asked before the first byte is out: half a message could
	// neither be completed nor followed by a close frame.
	budget := c.relay.buffers.budget
	if !budget.take(size, c.passing) {
		return false
	}
	w.views[0], w.views[1], w.views[2] = front, payload, tail
	n, err := c.sock.write(w.views[:3])
	budget.give(size)
	for _, p := range w.views[:3] {
		done := min(n, len(p))
		n -= done
		if p = p[done:]; len(p) > 0 {
			c.enqueue(priorityAlways, p, nil, nil)
		}
	}
	clear(w.views[:3])
	c.wrote(w, err)
	return c.fits(0)
}

// fits reports whether what waits for the peer, and n bytes more, is within its
// share of the budget, mu held. What waits for a binary has no share: that is
// bounded by pauseAt, and phones that do not read must not end it.
func (c *conn) fits(n int) bool {
	return c.blockedSince == 0 || c.passing == priorityBinary || int64(c.out.n+n) <= c.relay.buffers.budget.share()
}

// flushNew is flush for bytes that were queued because they were about to go out,
// mu held. It reports false if they turn out to wait, and do not fit.
func (c *conn) flushNew(w *writeBatch) bool {
	if c.blockedSince != 0 {
		return true // they were queued as what waits
	}
	c.flush(w)
	return c.fits(0)
}

// flush writes what is queued until the socket takes no more, mu held.
func (c *conn) flush(w *writeBatch) {
	for c.out.n > 0 && c.blockedSince == 0 && !c.failed {
		nv := c.out.views(w.views[:])
		n, err := c.sock.write(w.views[:nv])
		clear(w.views[:nv])
		c.out.discard(&c.relay.buffers, n)
		c.wrote(w, err)
	}
	if c.out.n == 0 {
		c.advanceClose(w.now)
	}
}

// wrote notes what a write came to, mu held.
func (c *conn) wrote(w *writeBatch, err error) {
	switch {
	case err == nil:
	case err == errAgain:
		c.blockedSince = w.now
	default:
		c.failLocked()
	}
}

// writable is called by the poller when the socket takes bytes again.
func (c *conn) writable(w *writeBatch) {
	c.mu.Lock()
	if c.blockedSince == 0 {
		c.mu.Unlock()
		return
	}
	c.unblock()
	if c.is(connClosing) && !c.sentClose {
		c.closeAfter(w.now, c.relay.o.writeTimeout) // slow is not silent
	}
	c.flush(w)
	next := c.nextWaiter()
	c.mu.Unlock()
	wake(next)
}

// unblock notes that the socket takes bytes again, mu held. Of the pings that came
// meanwhile the latest is answered (RFC 6455 §5.5.3).
func (c *conn) unblock() {
	c.blockedSince = 0
	if c.pong != nil {
		c.queueControl(opPong, c.pong)
		c.pong = nil
	}
}

// ---- back-pressure ----

// Nothing that a phone sends is dropped for want of room: a phone whose binary takes
// less than it sends is not read, and TCP holds it back.
//
// The limit is pauseAt bytes in front of the binary, and resumeAt for a phone that sends
// large messages. With each message pushFrom decides whether its phone has to wait: it
// lines up, and its reader pauses. The phones are released one by one once the binary
// has taken all but resumeAt bytes: else all would send at once, and a message of a
// phone that sends little would stand behind one of each. Each that is released puts
// the binary in its reader's batch, whose flush releases the next. In grace the limit
// is -queue, and all are released by its end.
const (
	// pauseAt keeps a fast binary busy, and a message of a phone that sends little
	// waits behind no more than this.
	pauseAt  = 96 << 10
	resumeAt = 32 << 10
)

// pushFrom is push for a message of a phone, mu held. It reports whether the phone
// now has to wait for c, and has lined up for it: it does not as long as it has no
// more than one small message in front of c.
func (c *conn) pushFrom(w *writeBatch, phone *conn, head, payload, tail []byte) (reason closeReason, wait bool) {
	light := c.queued-uint64(c.out.n) >= phone.pushed && len(payload) < directWrite
	reason = c.push(w, 0, head, payload, tail)
	phone.pushed = c.queued
	limit := pauseAt
	if len(payload) >= directWrite {
		limit = resumeAt // one is in front of the others for as long as many small ones
	}
	wait = c.out.n >= limit && !light
	if wait {
		c.waiters = append(c.waiters, phone)
	}
	return reason, wait
}

// pause keeps the reader from this connection until resume is called on its socket.
// Called by the handler, on the reader, from within message. behind is the binary that
// it has lined up for, nil for none.
func (c *conn) pause(behind *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// What ends a connection resumes it, once: after that it is too late to pause.
	if c.is(connOpen) {
		c.paused.Store(true)
		c.behind = behind
	}
}

// unpause undoes pause, and handles what came behind it. Called by the reader, which
// then reads on and flushes w.
func (c *conn) unpause(w *writeBatch) {
	if c.messageStart.Load() != 0 {
		c.messageStart.Store(w.now)
	}
	if b := c.behind; b != nil {
		c.behind = nil
		b.mu.Lock()
		w.addLocked(b)
		b.mu.Unlock()
	}
	c.mu.Lock()
	c.paused.Store(false)
	c.pinged = false
	c.mu.Unlock()
	c.receive(w, nil)
}

func wake(phones ...*conn) {
	for _, c := range phones {
		if c != nil {
			c.sock.resume()
		}
	}
}

// nextWaiter takes the phone out of the line that has waited longest, if c has taken
// enough for that, mu held. One that is ending sends nothing, so the next is asked.
// For a binary that is lost they wait until that is known: what they send would be lost.
// The caller wakes it without the lock.
func (c *conn) nextWaiter() *conn {
	for len(c.waiters) > 0 && c.out.n <= resumeAt && !c.failed {
		next := c.waiters[0]
		c.waiters = slices.Delete(c.waiters, 0, 1)
		if next.is(connOpen) {
			return next
		}
	}
	return nil
}
