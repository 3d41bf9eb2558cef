package main

// ---- reading: everything here runs on the connection's reader ----

// heard notes that the peer lives. It comes after what was heard has been
// looked at: a binary that closes must not keep its own successor out.
func (c *conn) heard(t *batch) {
	c.reads.Store(c.reads.Load() + 1)
	if c.asked.Load() != 0 {
		c.owner.challenged(t, true)
	}
}

// feed takes bytes as they came from the socket. data is not kept.
func (c *conn) feed(t *batch, data []byte) {
	if k := c.rest; k != nil { // what a pause left comes first
		c.rest = nil
		c.parse(t, k.bytes())
		c.relay.memory.put(k)
	}
	c.parse(t, data)
	if c.in == nil && c.msg == nil {
		c.since.Store(0)
	} else if c.since.Load() == 0 {
		c.since.Store(t.now)
	}
}

func (c *conn) parse(t *batch, data []byte) {
	for len(data) > 0 && !c.deaf {
		if c.paused {
			c.keepRest(t, data)
			return
		}
		if c.state.Load() >= uint32(connLinger) {
			return
		}
		if c.in != nil {
			data = c.complete(t, data)
			continue
		}
		h, fault := parseFrameHeader(data)
		if fault = c.admit(h, fault); fault != endNone {
			c.violation(t, fault)
			return
		}
		if h.size == 0 || int64(len(data)) < int64(h.size)+h.length {
			c.keep(t, data, h)
			return
		}
		total := h.size + int(h.length)
		c.frame(t, h, data[h.size:total])
		data = data[total:]
	}
}

// admit checks what the header alone tells: order and size. fault is what is wrong
// with the header itself.
func (c *conn) admit(h frameHeader, fault closeReason) closeReason {
	switch {
	case fault == endUnmasked && h.op == opClose && c.proxied:
		return endProxyClosed
	case fault != endNone || h.size == 0 || h.control():
		return fault
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
func (c *conn) keep(t *batch, data []byte, h frameHeader) {
	k := c.relay.memory.get(c.capacity(len(data), h), c.passing)
	if k == nil {
		c.violation(t, endMemoryLimit)
		return
	}
	k.w = copy(k.b, data)
	c.in = k
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
	if c.in == nil || c.paused || c.deaf {
		return nil
	}
	h, _ := parseFrameHeader(c.in.bytes())
	if h.size == 0 {
		return nil
	}
	total := h.size + int(h.length)
	if c.in.room() == 0 {
		k := c.relay.memory.grow(c.in, c.capacity(c.in.w, h), c.passing)
		if k == nil {
			return nil // feed will say so
		}
		c.in = k
	}
	return c.in.b[c.in.w:min(total, len(c.in.b))]
}

// filled takes note of n bytes read into want's buffer.
func (c *conn) filled(t *batch, n int) {
	c.in.w += n
	h, _ := parseFrameHeader(c.in.bytes())
	if c.in.w == h.size+int(h.length) {
		c.finishFrame(t, h)
	}
	c.feed(t, nil)
}

// complete adds to an unfinished frame and returns what is left of data.
func (c *conn) complete(t *batch, data []byte) []byte {
	for {
		h, fault := parseFrameHeader(c.in.bytes())
		if fault = c.admit(h, fault); fault != endNone {
			c.violation(t, fault)
			return nil
		}
		lack := 1 // byte by byte until the header is whole
		if h.size > 0 {
			if lack = h.size + int(h.length) - c.in.w; lack == 0 {
				c.finishFrame(t, h)
				return data
			}
		}
		if len(data) == 0 {
			return nil
		}
		lack = min(lack, len(data))
		if c.in.room() < lack {
			k := c.relay.memory.grow(c.in, max(c.in.w+lack, c.capacity(c.in.w, h)), c.passing)
			if k == nil {
				c.violation(t, endMemoryLimit)
				return nil
			}
			c.in = k
		}
		c.in.w += copy(c.in.b[c.in.w:], data[:lack])
		data = data[lack:]
	}
}

func (c *conn) finishFrame(t *batch, h frameHeader) {
	k := c.in
	c.in = nil
	c.frame(t, h, k.b[h.size:k.w])
	c.relay.memory.put(k)
}

// keepRest stores bytes that a pause keeps from being looked at.
func (c *conn) keepRest(t *batch, data []byte) {
	if len(data) == 0 {
		return
	}
	have := 0
	if c.rest != nil {
		have = c.rest.w
	}
	var k *block
	if c.rest != nil {
		k = c.relay.memory.grow(c.rest, have+len(data), c.passing)
	} else {
		k = c.relay.memory.get(len(data), c.passing)
	}
	if k == nil {
		c.violation(t, endMemoryLimit)
		return
	}
	k.w += copy(k.b[k.w:], data)
	c.rest = k
}

// frame takes a whole frame whose header was admitted.
func (c *conn) frame(t *batch, h frameHeader, p []byte) {
	unmask(p, h.key)
	if h.control() {
		c.control(t, h.op, p)
		if c.msg == nil {
			c.since.Store(0) // what may follow begins now
		}
		return
	}
	switch {
	case !c.is(connOpen):
		// After a close frame of ours nothing of the peer counts but its answer.
		c.dropMessage()
	case h.fin && c.msg == nil:
		c.deliver(t, h.op, p)
	default:
		if c.msg == nil {
			c.msgOp = h.op
		}
		if !c.assemble(p) {
			c.violation(t, endMemoryLimit)
		} else if h.fin {
			k := c.msg
			c.msg = nil
			c.deliver(t, c.msgOp, k.bytes())
			c.relay.memory.put(k)
		}
	}
}

// assemble appends a fragment to the message under way.
func (c *conn) assemble(p []byte) bool {
	m := &c.relay.memory
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
		c.relay.memory.put(c.msg)
		c.msg = nil
	}
}

func (c *conn) deliver(t *batch, op byte, p []byte) {
	c.since.Store(0)
	c.rxFrames++
	c.rxBytes += uint64(len(p))
	c.owner.message(t, op, p)
}

func (c *conn) control(t *batch, op byte, p []byte) {
	switch op {
	case opPing:
		c.sendPong(t, p)
	case opClose:
		code, fault := parseClose(p)
		if fault != endNone {
			c.violation(t, fault)
			return
		}
		c.peerClosed(t, code)
	}
}

// violation ends a connection whose stream cannot be read on.
func (c *conn) violation(t *batch, fault closeReason) {
	c.deaf = true
	c.finish(t, fault, fault.code(), fault.String())
	c.mu.Lock()
	c.answered = true // it could not be told from the rest
	t.addLocked(c)
	c.mu.Unlock()
}

// peerClosed handles a close frame: the peer's own, answered with its code, or
// the answer to ours.
func (c *conn) peerClosed(t *batch, code uint16) {
	c.deaf = true // §5.5.1: nothing may follow
	c.finish(t, endPeerClosed, code, "")
	c.mu.Lock()
	c.answered = true
	t.addLocked(c)
	c.mu.Unlock()
}

// lost: the peer's direction ended, with or without a word.
func (c *conn) lost(t *batch) {
	c.mu.Lock()
	open := c.state.Load() == uint32(connOpen)
	if open {
		c.setEnd(connClosing, endPeerLost, endPeerLost.code())
	}
	c.mu.Unlock()
	if open {
		c.owner.ended(t, endPeerLost, endPeerLost.code())
	}
}

// release is the reader's last call: the socket is gone.
func (c *conn) release(t *batch) {
	c.lost(t)
	m := &c.relay.memory
	for _, k := range [...]**block{&c.in, &c.msg, &c.rest} {
		if *k != nil {
			m.put(*k)
			*k = nil
		}
	}
	c.mu.Lock()
	// A peer that ended only its own direction, right behind its close frame or
	// its last ping, still gets the answer.
	c.flush(t)
	c.state.Store(uint32(connClosed))
	c.out.drop(m)
	c.pong = nil
	woken := c.waiters
	c.waiters = nil
	c.mu.Unlock()
	wake(woken)
	c.owner.closed(t)
}
