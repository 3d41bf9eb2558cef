package main

// ---- reading: everything here runs on the connection's reader ----

// heard notes that the peer lives. It comes after what was heard has been
// looked at: a binary that closes must not keep its own successor out.
func (c *conn) markAlive(w *writeBatch) {
	c.reads.Store(c.reads.Load() + 1)
	if c.challenged.Load() {
		c.owner.checkChallenge(w, true)
	}
}

// feed takes bytes as they came from the socket. data is not kept.
func (c *conn) receive(w *writeBatch, data []byte) {
	if k := c.unparsed; k != nil { // what a pause left comes first
		c.unparsed = nil
		c.readFrames(w, k.bytes())
		c.relay.buffers.put(k)
	}
	c.readFrames(w, data)
	if c.partial == nil && c.msg == nil {
		c.messageStart.Store(0)
	} else if c.messageStart.Load() == 0 {
		c.messageStart.Store(w.now)
	}
}

func (c *conn) readFrames(w *writeBatch, data []byte) {
	for len(data) > 0 && !c.ignoreInput {
		if c.paused {
			c.keepRest(w, data)
			return
		}
		if c.state.Load() >= uint32(connLinger) {
			return
		}
		if c.partial != nil {
			data = c.complete(w, data)
			continue
		}
		h, violation := parseFrameHeader(data)
		if violation = c.admit(h, violation); violation != endNone {
			c.violation(w, violation)
			return
		}
		if h.size == 0 || int64(len(data)) < int64(h.size)+h.length {
			c.keep(w, data, h)
			return
		}
		total := h.size + int(h.length)
		c.frame(w, h, data[h.size:total])
		data = data[total:]
	}
}

// admit checks what the header alone tells: order and size. fault is what is wrong
// with the header itself.
func (c *conn) admit(h frameHeader, violation closeReason) closeReason {
	switch {
	case violation == endUnmasked && h.op == opClose && c.proxied:
		return endProxyClosed
	case violation != endNone || h.size == 0 || h.control():
		return violation
	}
	have := int64(0)
	if c.msg != nil {
		have = int64(c.msg.w)
	}
	switch {
	case h.op == opContinuation && c.msg == nil:
		return endStrayFragment
	case h.op != opContinuation && c.msg != nil:
		return endInterleaved
	case h.length > int64(c.relay.o.maxFrame)-have:
		return endMessageTooBig
	}
	return endNone
}

// keep stores the beginning of a frame until the rest is there.
func (c *conn) keep(w *writeBatch, data []byte, h frameHeader) {
	k := c.relay.buffers.get(c.capacity(len(data), h), c.passing)
	if k == nil {
		c.violation(w, endMemoryLimit)
		return
	}
	k.w = copy(k.b, data)
	c.partial = k
}

// capacity is how large a block a frame gets of which have bytes are there: it
// grows with what has arrived, not with what the header announces.
func (c *conn) capacity(have int, h frameHeader) int {
	if h.size == 0 {
		return maxFrameHeader
	}
	return int(min(int64(h.size)+h.length, 4*int64(max(have, 256))))
}

// want returns the free part of the buffer of an unfinished frame, for the
// reader to read into: never more than the frame still lacks.
func (c *conn) want() []byte {
	if c.partial == nil || c.paused || c.ignoreInput {
		return nil
	}
	h, _ := parseFrameHeader(c.partial.bytes())
	if h.size == 0 {
		return nil
	}
	total := h.size + int(h.length)
	if c.partial.room() == 0 {
		k := c.relay.buffers.grow(c.partial, c.capacity(c.partial.w, h), c.passing)
		if k == nil {
			return nil // feed will say so
		}
		c.partial = k
	}
	return c.partial.b[c.partial.w:min(total, len(c.partial.b))]
}

// filled takes note of n bytes read into want's buffer.
func (c *conn) filled(w *writeBatch, n int) {
	c.partial.w += n
	h, _ := parseFrameHeader(c.partial.bytes())
	if c.partial.w == h.size+int(h.length) {
		c.finishFrame(w, h)
	}
	c.receive(w, nil)
}

// complete adds to an unfinished frame and returns what is left of data.
func (c *conn) complete(w *writeBatch, data []byte) []byte {
	for {
		h, violation := parseFrameHeader(c.partial.bytes())
		if violation = c.admit(h, violation); violation != endNone {
			c.violation(w, violation)
			return nil
		}
		lack := 1 // byte by byte until the header is whole
		if h.size > 0 {
			if lack = h.size + int(h.length) - c.partial.w; lack == 0 {
				c.finishFrame(w, h)
				return data
			}
		}
		if len(data) == 0 {
			return nil
		}
		lack = min(lack, len(data))
		if c.partial.room() < lack {
			k := c.relay.buffers.grow(c.partial, max(c.partial.w+lack, c.capacity(c.partial.w, h)), c.passing)
			if k == nil {
				c.violation(w, endMemoryLimit)
				return nil
			}
			c.partial = k
		}
		c.partial.w += copy(c.partial.b[c.partial.w:], data[:lack])
		data = data[lack:]
	}
}

func (c *conn) finishFrame(w *writeBatch, h frameHeader) {
	k := c.partial
	c.partial = nil
	c.frame(w, h, k.b[h.size:k.w])
	c.relay.buffers.put(k)
}

// keepRest stores bytes that a pause keeps from being looked at.
func (c *conn) keepRest(w *writeBatch, data []byte) {
	if len(data) == 0 {
		return
	}
	have := 0
	if c.unparsed != nil {
		have = c.unparsed.w
	}
	var k *buffer
	if c.unparsed != nil {
		k = c.relay.buffers.grow(c.unparsed, have+len(data), c.passing)
	} else {
		k = c.relay.buffers.get(len(data), c.passing)
	}
	if k == nil {
		c.violation(w, endMemoryLimit)
		return
	}
	k.w += copy(k.b[k.w:], data)
	c.unparsed = k
}

// frame takes a whole frame whose header was admitted.
func (c *conn) frame(w *writeBatch, h frameHeader, p []byte) {
	unmask(p, h.key)
	if h.control() {
		c.control(w, h.op, p)
		if c.msg == nil {
			c.messageStart.Store(0) // what may follow begins now
		}
		return
	}
	switch {
	case !c.is(connOpen):
		// After a close frame of ours nothing of the peer counts but its answer.
		c.dropMessage()
	case h.fin && c.msg == nil:
		c.handleMessage(w, h.op, p)
	default:
		if c.msg == nil {
			c.msgOp = h.op
		}
		if !c.assemble(p) {
			c.violation(w, endMemoryLimit)
		} else if h.fin {
			k := c.msg
			c.msg = nil
			c.handleMessage(w, c.msgOp, k.bytes())
			c.relay.buffers.put(k)
		}
	}
}

// assemble appends a fragment to the message under way.
func (c *conn) assemble(p []byte) bool {
	m := &c.relay.buffers
	if c.msg == nil {
		// One byte at least: an empty first fragment opens a message too.
		if c.msg = m.get(max(len(p), 1), c.passing); c.msg == nil {
			return false
		}
	}
	if need := c.msg.w + len(p); need > len(c.msg.b) {
		k := m.grow(c.msg, min(max(need, 2*len(c.msg.b)), c.relay.o.maxFrame), c.passing)
		if k == nil {
			return false
		}
		c.msg = k
	}
	c.msg.w += copy(c.msg.b[c.msg.w:], p)
	return true
}

func (c *conn) dropMessage() {
	if c.msg != nil {
		c.relay.buffers.put(c.msg)
		c.msg = nil
	}
}

func (c *conn) handleMessage(w *writeBatch, op byte, p []byte) {
	c.messageStart.Store(0)
	c.rxFrames++
	c.rxBytes += uint64(len(p))
	c.owner.message(w, op, p)
}

func (c *conn) control(w *writeBatch, op byte, p []byte) {
	switch op {
	case opPing:
		c.sendPong(w, p)
	case opClose:
		code, violation := parseClose(p)
		if violation != endNone {
			c.violation(w, violation)
			return
		}
		c.peerClosed(w, code)
	}
}

// violation ends a connection whose stream cannot be read on.
func (c *conn) violation(w *writeBatch, violation closeReason) {
	c.ignoreInput = true
	c.finish(w, violation, violation.code(), violation.String())
	c.mu.Lock()
	c.answered = true // it could not be told from the rest
	w.addLocked(c)
	c.mu.Unlock()
}

// peerClosed handles a close frame: the peer's own, answered with its code, or
// the answer to ours.
func (c *conn) peerClosed(w *writeBatch, code uint16) {
	c.ignoreInput = true // §5.5.1: nothing may follow
	c.finish(w, endPeerClosed, code, "")
	c.mu.Lock()
	c.answered = true
	w.addLocked(c)
	c.mu.Unlock()
}

// lost: the peer's direction ended, with or without a word.
func (c *conn) lost(w *writeBatch) {
	c.mu.Lock()
	open := c.state.Load() == uint32(connOpen)
	if open {
		c.setEnd(connClosing, endPeerLost, endPeerLost.code())
	}
	c.mu.Unlock()
	if open {
		c.owner.ended(w, endPeerLost, endPeerLost.code())
	}
}

// release is the reader's last call: the socket is gone.
func (c *conn) release(w *writeBatch) {
	c.lost(w)
	m := &c.relay.buffers
	for _, k := range [...]**buffer{&c.partial, &c.msg, &c.unparsed} {
		if *k != nil {
			m.put(*k)
			*k = nil
		}
	}
	c.mu.Lock()
	// A peer that ended only its own direction, right behind its close frame or
	// its last ping, still gets the answer.
	c.flush(w)
	c.state.Store(uint32(connClosed))
	c.out.drop(m)
	c.pong = nil
	woken := c.waiters
	c.waiters = nil
	c.mu.Unlock()
	wake(woken)
	c.owner.closed(w)
}
