package main

import (
	"slices"
	"time"
)

// ---- writing: any goroutine ----

// addLocked puts c among the peers that the batch flushes, c.mu held.
func (w *writeBatch) addLocked(c *conn) {
	if !c.dirty {
		c.dirty = true
		w.dirty = append(w.dirty, c)
	}
}

// greet queues the answer to an upgrade, before anybody else knows c: whatever
// is queued for it from then on comes behind.
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
	var b [maxSendHeader + 128]byte
	n := appendCloseNotice(b[maxSendHeader:maxSendHeader], connID, code)
	var h [maxSendHeader]byte
	front := appendFrameHeader(h[:0], opText, len(n))
	c.enqueue(priorityAlways, front, n, nil)
	c.txFrames++
	c.txBytes += uint64(len(n))
	w.addLocked(c)
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
		c.flushed(w.now)
	}
}

// wrote notes what a write came to, mu held.
func (c *conn) wrote(w *writeBatch, err error) {
	switch {
	case err == nil:
	case err == errAgain:
		c.blockedSince = w.now
	default:
		c.cut()
	}
}

// cut gives up on the peer, mu held. The reader finds the end of the socket.
func (c *conn) cut() {
	c.failed = true
	c.out.drop(&c.relay.buffers)
	c.sock.abort()
}

// stuck reports whether the peer really takes nothing, mu held. A kernel tells of
// room only when a good part of the send buffer is free, for which a slow peer
// may need longer than it has: the socket itself is asked before it is given up.
func (c *conn) stuck(w *writeBatch) bool {
	c.unblock()
	queued := c.out.n
	c.flush(w)
	w.addLocked(c) // to wake who waits for it
	return c.out.n == queued
}

// flushed moves a connection that is ending on once its last bytes are out, mu held.
func (c *conn) flushed(now int64) {
	if !c.is(connClosing) || c.failed || c.endReason == endPeerLost {
		return
	}
	if c.sock.unsent() { // its time begins when they are gone
		c.blockedSince = now
		return
	}
	if !c.answered {
		if !c.sentClose {
			c.sentClose = true
			c.closeAfter(now, c.relay.o.closeTimeout)
		}
		return
	}
	c.state.Store(uint32(connLinger))
	c.sock.closeWrite()
	// The peer's FIN ends it. Until then what it still sends is read, so that
	// no reset overtakes the close frame, which a slow peer may not have yet.
	c.closeAfter(now, c.relay.o.closeTimeout)
}

func (c *conn) closeAfter(now int64, d time.Duration) { c.closeDeadline = now + int64(d) }

// drained hands out the phone that has waited longest for this binary once that
// has taken enough, mu held; the next comes when this one has had its turn
// (unpause) or has ended, of which the binary is told. Else all would send at
// once, and a frame of a phone that sends little would stand behind one of each.
// The caller wakes it without the lock.
func (c *conn) drained() (woken *conn) {
	for len(c.waiters) > 0 && c.out.n <= resumeAt {
		woken = c.waiters[0]
		c.waiters = slices.Delete(c.waiters, 0, 1)
		if woken.is(connOpen) {
			return woken
		}
	}
	return nil
}

// writable: the socket takes bytes again. Called by the reader.
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
	woken := c.drained()
	c.mu.Unlock()
	if woken != nil {
		woken.sock.resume()
	}
}

// isOut reports whether everything queued up to end has been written, mu held.
func (c *conn) isOut(end uint64) bool { return c.queued-uint64(c.out.n) >= end }

// unblock notes that the socket takes bytes again, mu held. Of the pings that came
// meanwhile the latest is answered (RFC 6455 §5.5.3).
func (c *conn) unblock() {
	c.blockedSince = 0
	if c.pong != nil {
		c.queueControl(opPong, c.pong)
		c.pong = nil
	}
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
