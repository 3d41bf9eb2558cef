package main

// ---- reading: everything here runs on the connection's reader ----

// markAlive notes that the peer lives. It comes after what was heard has been
// looked at: a binary that closes must not keep its own successor out.
func (c *conn) markAlive(w *writeBatch) {
	c.reads.Store(c.reads.Load() + 1)
	if c.challenged.Load() {
		c.owner.answered(w)
	}
}

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
	if min(lack, (growth-1)*len(front)) <= len(shared)/2 || !c.makeRoom(front, 0) {
		return shared // where there is no memory, receive finds out and says so
	}
	k := c.unparsed
	return k.b[k.w:min(k.w+lack, len(k.b))]
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
		if c.paused || len(p) == 0 {
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
	if c.unparsed == nil && c.fragments == nil {
		c.messageStart.Store(0)
	} else if c.messageStart.Load() == 0 {
		c.messageStart.Store(w.now)
	}
}

// readFrames handles the whole frames at the front of p and returns how many bytes
// they are. It stops at a pause, and for good at what breaks a rule.
func (c *conn) readFrames(w *writeBatch, p []byte) (n int) {
	for n < len(p) && !c.paused && !c.ignoreInput {
		h, violation := parseFrameHeader(p[n:])
		if violation = c.admit(h, violation); violation != endNone {
			c.violation(w, violation)
			break
		}
		if h.size == 0 || len(p)-n < h.total() {
			break
		}
		c.frame(w, h, p[n+h.size:n+h.total()])
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

// frame takes a whole frame whose header was admitted.
func (c *conn) frame(w *writeBatch, h frameHeader, p []byte) {
	unmask(p, h.key)
	if h.control() {
		c.control(w, h.op, p)
		if c.fragments == nil {
			c.messageStart.Store(0) // what may follow begins now
		}
		return
	}
	switch {
	case !c.is(connOpen):
		// After a close frame of ours nothing of the peer counts but its answer.
		c.dropMessage()
	case h.fin && c.fragments == nil:
		c.handleMessage(w, h.op, p)
	default:
		if c.fragments == nil {
			c.messageOp = h.op
		}
		if !c.assemble(p) {
			c.violation(w, endMemoryLimit)
		} else if h.fin {
			k := c.fragments
			c.fragments = nil
			c.handleMessage(w, c.messageOp, k.bytes())
			c.relay.buffers.put(k)
		}
	}
}

// assemble appends a fragment to the message under way.
func (c *conn) assemble(p []byte) bool {
	m := &c.relay.buffers
	if c.fragments == nil {
		// One byte at least: an empty first fragment opens a message too.
		if c.fragments = m.get(max(len(p), 1), c.passing); c.fragments == nil {
			return false
		}
	}
	if need := c.fragments.w + len(p); need > len(c.fragments.b) {
		k := m.grow(c.fragments, min(max(need, 2*len(c.fragments.b)), c.relay.o.maxFrame), c.passing)
		if k == nil {
			return false
		}
		c.fragments = k
	}
	c.fragments.w += copy(c.fragments.b[c.fragments.w:], p)
	return true
}

func (c *conn) dropMessage() {
	if c.fragments != nil {
		c.relay.buffers.put(c.fragments)
		c.fragments = nil
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
	for _, k := range [...]**buffer{&c.unparsed, &c.fragments} {
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
