package main

import (
	"sync"
	"sync/atomic"
)

// Where bytes wait: the process's byte budget, buffers out of size-classed pools,
// and the queue before each socket. A buffer is charged with its whole capacity for
// as long as it is in use, so that the budget bounds memory, and not only content.

// priority is what bytes are buffered for. It says how much of the budget they may
// fill.
type priority uint8

const (
	// priorityBacklog bytes wait for a phone that takes nothing, or for a binary that
	// is not there. They leave an eighth free, so that phones that do not read cost
	// the others nothing of what passes through.
	priorityBacklog priority = iota
	// priorityPassing bytes are half received from a phone, or go out to one with the
	// batch. They leave a sixteenth free.
	priorityPassing
	// priorityBinary bytes are half received from a binary, or wait for one. Each
	// binary has few of them, since one that takes nothing holds its phones back.
	priorityBinary
	// priorityAlways bytes are control frames and close notices, without which nothing
	// could be ended in order. These few are charged whether they fit or not.
	priorityAlways
)

// budget is the process-wide bound on buffered bytes.
type budget struct {
	limit int64 // -queue-total
	n     atomic.Int64
}

// take charges n bytes if they fit.
func (b *budget) take(n int, priority priority) bool {
	limit := b.limit
	switch priority {
	case priorityBacklog:
		limit -= limit / 8
	case priorityPassing:
		limit -= limit / 16
	case priorityAlways:
		b.n.Add(int64(n))
		return true
	}
	for {
		used := b.n.Load()
		if used+int64(n) > limit {
			return false
		}
		if b.n.CompareAndSwap(used, used+int64(n)) {
			return true
		}
	}
}

// share is how many bytes may wait for one phone: twice as many as are still free
// of what all that wait may take. However many phones take nothing, they leave
// each other, and one that only stops for a moment, about the same.
func (b *budget) share() int64 { return 2 * (b.limit - b.limit/8 - b.used()) }

func (b *budget) give(n int)  { b.n.Add(-int64(n)) }
func (b *budget) used() int64 { return b.n.Load() }

// bufferSizes are the pooled capacities. Each has head room for the frame header and
// the envelope around a payload of a round size, so that a payload of 64 KiB does not
// take a buffer of 256 KiB.
var bufferSizes = [...]int{1<<10 + 128, 4<<10 + 128, 16<<10 + 128, 64<<10 + 128, 256<<10 + 128}

// buffer is a piece of buffered bytes: b[r:w] is content.
type buffer struct {
	next *buffer // in a queue
	b    []byte
	r, w int
	size int8 // index in bufferSizes, -1 for a capacity of its own
}

func (k *buffer) bytes() []byte { return k.b[k.r:k.w] }
func (k *buffer) room() int     { return len(k.b) - k.w }

// bufferPool hands out buffers within the budget.
type bufferPool struct {
	budget *budget
	pools  [len(bufferSizes)]sync.Pool
}

// get returns an empty buffer for at least n bytes, nil when the budget is spent.
func (m *bufferPool) get(n int, priority priority) *buffer {
	size := int8(-1)
	for i, c := range bufferSizes {
		if n <= c {
			size, n = int8(i), c
			break
		}
	}
	if !m.budget.take(n, priority) {
		return nil
	}
	if size >= 0 {
		if k, _ := m.pools[size].Get().(*buffer); k != nil {
			return k
		}
	}
	return &buffer{b: make([]byte, n), size: size}
}

// put takes a buffer back.
func (m *bufferPool) put(k *buffer) {
	m.budget.give(len(k.b))
	if k.size >= 0 {
		k.next, k.r, k.w = nil, 0, 0
		m.pools[k.size].Put(k)
	}
}

// grow returns a buffer with k's content, or empty for none, in room for at least n
// bytes in all; k is given back. It returns nil, and k stays, when the budget is
// spent.
func (m *bufferPool) grow(k *buffer, n int, priority priority) *buffer {
	switch {
	case k == nil:
		return m.get(n, priority)
	case k.r+n <= len(k.b):
		return k
	case n <= len(k.b):
		k.r, k.w = 0, copy(k.b, k.bytes())
		return k
	}
	big := m.get(n, priority)
	if big == nil {
		return nil
	}
	big.w = copy(big.b, k.bytes())
	m.put(k)
	return big
}

// queue is a FIFO of bytes. The zero value is empty.
type queue struct {
	head, tail *buffer
	n          int // bytes queued
}

// add appends the parts as one, or nothing at all when the budget is spent.
func (q *queue) add(m *bufferPool, priority priority, a, b, c []byte) bool {
	n := len(a) + len(b) + len(c)
	room := 0
	if q.tail != nil {
		room = q.tail.room()
	}
	if n > room {
		// A queue that grows takes larger buffers, so that a write needs few of them.
		k := m.get(max(n-room, min(q.n, 64<<10)), priority)
		if k == nil {
			return false
		}
		if q.tail == nil {
			q.head, q.tail = k, k
		} else {
			q.tail.next = k
		}
	}
	k := q.tail
	for _, p := range [...][]byte{a, b, c} {
		for len(p) > 0 {
			if k.room() == 0 {
				k = k.next
			}
			w := copy(k.b[k.w:], p)
			k.w += w
			p = p[w:]
		}
	}
	q.tail = k
	q.n += n
	return true
}

// views fills v with what is at the front of the queue and returns how many it
// filled.
func (q *queue) views(v [][]byte) int {
	i := 0
	for k := q.head; k != nil && i < len(v); k = k.next {
		v[i] = k.bytes() // never empty
		i++
	}
	return i
}

// discard removes n bytes from the front.
func (q *queue) discard(m *bufferPool, n int) {
	q.n -= n
	for q.head != nil {
		k := q.head
		have := k.w - k.r
		if n < have {
			k.r += n
			return
		}
		n -= have
		if q.head = k.next; q.head == nil {
			q.tail = nil
		}
		m.put(k)
	}
}

// moveTo appends all of q to dst and leaves q empty. No byte is copied.
func (q *queue) moveTo(dst *queue) {
	if q.head == nil {
		return
	}
	if dst.tail == nil {
		dst.head = q.head
	} else {
		dst.tail.next = q.head
	}
	dst.tail = q.tail
	dst.n += q.n
	*q = queue{}
}

// free gives everything back.
func (q *queue) free(m *bufferPool) { q.discard(m, q.n) }
