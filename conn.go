package main

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
)

// A WebSocket connection after the opening handshake: RFC 6455 from there on.
//
// One reader feeds it what the socket has (feed); it takes frames apart, puts
// messages together and hands them to its owner. Anybody may queue bytes for
// the peer; they go out without blocking, coalesced, and what the socket does
// not take waits in a bounded queue. Timeouts are looked at by a sweeper
// (tick), so that an idle connection has no timer, no goroutine and no buffer.

const (
	// directWrite is the payload size from which a message goes to an idle
	// socket straight from where it was read. Below it the copy into the queue
	// costs less than the system call that coalescing saves.
	directWrite = 8 << 10
	// growth is how many times the bytes that have arrived of a frame may be
	// allocated for it.
	growth = 4
	// flushAt bounds what a batch gathers for one peer before it is written.
	flushAt = 64 << 10
	// pauseAt and resumeAt: a binary that has this much to take is back-pressure on
	// those of its phones that have more in it than one small frame; from resumeAt
	// down they come back one by one. That keeps a fast binary busy, and a frame of
	// a phone that sends little waits for no more than this.
	pauseAt  = 96 << 10
	resumeAt = 32 << 10
)

// errAgain: the socket takes or has no more for now.
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
	// abort ends both directions at once; the reader then finds the end.
	abort()
	// resume asks the reader to go on after a pause.
	resume()
}

// peer is the owner of a connection: a phone or a binary.
type handler interface {
	// message takes a complete message. p is valid during the call only, and
	// may be changed. Called by the reader.
	message(w *writeBatch, op byte, p []byte)
	// ended is called once, when the end is decided and before the connection
	// has taken leave of its peer.
	ended(w *writeBatch, reason closeReason, code uint16)
	// answered and overdue are called while conn.challenged is set: the one by the
	// reader when the peer was heard, the other by each sweep.
	answered(w *writeBatch)
	overdue(w *writeBatch)
	// closed is called once, when the socket is gone. Called by the reader.
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
	owner   handler
	sock    socket
	addr    netip.Addr // of the client, behind proxies too
	opened  int64      // relay clock
	proxied bool       // the TCP connection is one of -trusted-proxies
	passing priority   // what its bytes count as while they do not wait: usePassing, useBinary

	state        atomic.Uint32 // connState; written under mu
	reads        atomic.Uint32 // times bytes were heard; written by the reader
	messageStart atomic.Int64  // relay clock at the first byte of an unfinished message, 0 if none; written by the reader
	challenged   atomic.Bool   // the owner waits for a sign of life; written by the owner

	// Owned by the reader.
	unparsed    *buffer // read, and not handled: half a frame, or all that came behind a pause
	fragments   *buffer // of the message under way
	messageOp   byte    // of their first
	paused      bool    // the owner wants no more messages before resume
	behind      *conn   // the binary that it is paused for, if any
	ignoreInput bool    // the stream broke a rule: nothing in it means anything any more
	rxFrames    uint32
	rxBytes     uint64

	// Guarded by mu.
	mu            sync.Mutex
	out           queue
	pong          []byte // the answer to the latest ping while the socket takes nothing, nil for none
	txFrames      uint32
	txBytes       uint64 // payload
	queued        uint64 // bytes ever queued
	blockedSince  int64  // relay clock since the socket takes nothing, 0 while it does
	closeDeadline int64  // relay clock at which the state's patience ends, 0 for none
	pingAt        int64  // relay clock of the next ping
	pingMark      uint32 // reads at the last ping
	pinged        bool   // a ping is out
	dirty         bool   // in a batch that will flush
	suspended     bool   // its reader is paused: silence means nothing
	sentClose     bool   // our close frame is out
	answered      bool   // no answer to it is to come
	failed        bool   // the socket failed or was given up
	endReason     closeReason
	endCode       uint16
	waiters       []*conn // phones paused until out has drained
}

// batch is what one reader gathers between two system calls: the peers it has
// queued bytes for, and its counts. Owned by one goroutine.
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

// flush writes what the batch has queued.
func (w *writeBatch) flush() {
	for i := 0; i < len(w.dirty); i++ { // grows: what a flush ends may queue notices
		c := w.dirty[i]
		w.dirty[i] = nil
		c.mu.Lock()
		c.dirty = false
		fits := c.flushNew(w)
		woken := c.drained()
		c.mu.Unlock()
		if woken != nil {
			woken.sock.resume()
		}
		if !fits {
			c.end(w, endMemoryLimit)
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

func wake(cs []*conn) {
	for _, c := range cs {
		c.sock.resume()
	}
}

func (c *conn) init(r *relay, owner handler, role role, addr netip.Addr) {
	c.relay, c.owner, c.addr = r, owner, addr
	c.opened = r.now()
	c.endReason = endNone
	c.passing = priorityPassing
	if role == roleBinary {
		c.passing = priorityBinary
	}
	// Connections that come in a wave, as after a restart, are not pinged in one.
	c.pingAt = c.opened + int64(r.o.ping)/2 + rand.Int64N(max(int64(r.o.ping)/2, 1))
}

// pause keeps the reader from this connection until somebody calls resume on
// its socket. Called by the owner, on the reader, from within message. It may be
// one of several that wait behind the same peer.
func (c *conn) pause(behind *conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Whoever ends a connection resumes it, once: after that it is too late to pause.
	if c.is(connOpen) {
		c.paused, c.suspended, c.behind = true, true, behind
	}
}

// unpause undoes pause. Called by the reader, which then reads and flushes w: by
// that the next one behind the same peer gets its turn.
func (c *conn) unpause(w *writeBatch) {
	c.paused = false
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
	c.suspended = false
	c.pinged = false
	c.mu.Unlock()
}

func (c *conn) is(s connState) bool { return connState(c.state.Load()) == s }

// ---- ending: any goroutine ----

// setEnd records how the connection ends, mu held.
func (c *conn) setEnd(s connState, reason closeReason, code uint16) {
	c.state.Store(uint32(s))
	c.endReason, c.endCode = reason, code
}

// finish decides the connection's end, unless it is decided already: a close
// frame goes out behind everything queued. The text is the frame's reason.
func (c *conn) finish(w *writeBatch, reason closeReason, code uint16, text string) {
	c.mu.Lock()
	if !c.is(connOpen) {
		c.mu.Unlock()
		return
	}
	c.setEnd(connClosing, reason, code)
	if reason == endMemoryLimit && !c.fits(0) {
		// It goes as it is: half a message is out, perhaps, which no close frame may
		// follow, and the rest of that is what there is no room for.
		c.cut()
	}
	var b [2 + maxControl]byte
	wire := code
	if wire == noCloseCode {
		wire = 0
	}
	f := appendCloseFrame(b[:0], wire, text)
	c.enqueue(priorityAlways, f, nil, nil)
	c.pong = nil
	// A peer that takes nothing has until then to take the close frame.
	wait := c.relay.o.writeTimeout
	if reason == endWriteTimeout || reason == endHeartbeat {
		wait = c.relay.o.closeTimeout
	}
	c.closeAfter(w.now, wait)
	w.addLocked(c)
	paused := c.suspended
	c.mu.Unlock()
	if paused {
		c.sock.resume() // to hear the answer
	}
	c.owner.ended(w, reason, code)
}

// end is finish with the reason's own code and words.
func (c *conn) end(w *writeBatch, reason closeReason) {
	c.finish(w, reason, reason.code(), reason.String())
}

// abort gives up on the peer: nothing more is sent.
func (c *conn) abort() {
	c.mu.Lock()
	if !c.is(connClosed) {
		c.cut()
	}
	c.mu.Unlock()
	c.sock.resume() // a paused reader would not find the end
}

// tick looks at the connection's timeouts. Called by the sweeper, a few times
// within the shortest of them.
func (c *conn) checkTimeouts(w *writeBatch) {
	o := &c.relay.o
	reason := endNone
	c.mu.Lock()
	switch {
	case c.is(connClosed) || c.failed:
	case !c.is(connOpen):
		if c.closeDeadline != 0 && w.now >= c.closeDeadline {
			c.cut()
		}
	case c.blockedSince != 0 && w.now-c.blockedSince >= int64(o.writeTimeout):
		if c.stuck(w) {
			reason = endWriteTimeout
		}
	case w.now-c.messageStart.Load() >= int64(o.messageTimeout) && c.messageStart.Load() != 0 && !c.suspended:
		reason = endMessageTimeout
	case w.now >= c.pingAt:
		switch silent := c.pinged && c.reads.Load() == c.pingMark && !c.suspended; {
		case c.out.n > 0:
			c.pinged = false // what would a ping behind all that ask? The next one has a whole interval
		case silent:
			reason = endHeartbeat
		default:
			c.ping(w)
		}
	}
	c.mu.Unlock()
	if reason != endNone {
		c.end(w, reason)
	} else if c.challenged.Load() {
		c.owner.overdue(w)
	}
}

// ping asks the peer for a sign of life, mu held. Whoever asks, the peer has a
// whole interval to give one; asking once more does not make it longer.
func (c *conn) ping(w *writeBatch) {
	if !c.is(connOpen) {
		return
	}
	c.queueControl(opPing, nil)
	if !c.pinged || c.reads.Load() != c.pingMark || c.suspended {
		c.pinged, c.pingMark = true, c.reads.Load()
		c.pingAt = w.now + int64(c.relay.o.ping)
	}
	w.addLocked(c)
}
