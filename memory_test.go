package main

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
)

// Connections without a network: the test is the reader, and the socket is a
// slice. What happens between two calls is then exact, and can be counted.

// memSocket is a socket that keeps, or only counts, what is written to it.
type memSocket struct {
	out      []byte
	discard  bool // count only
	full     bool // it takes nothing
	room     int  // or, while it is full, these few bytes
	writes   int
	bytes    int
	resumes  int
	finished bool // our direction has ended
	aborted  bool
}

func (m *memSocket) attach([]byte) {}
func (m *memSocket) unsent() bool  { return false }
func (m *memSocket) closeWrite()   { m.finished = true }
func (m *memSocket) abort()        { m.aborted = true }
func (m *memSocket) resume()       { m.resumes++ }

func (m *memSocket) write(bufs [][]byte) (n int, err error) {
	m.writes++
	switch {
	case m.aborted:
		return 0, net.ErrClosed
	}
	for _, b := range bufs {
		if m.full {
			b = b[:min(len(b), m.room)]
			m.room -= len(b)
		}
		if !m.discard {
			m.out = append(m.out, b...)
		}
		n += len(b)
	}
	m.bytes += n
	if m.full {
		err = errAgain
	}
	return n, err
}

// memFrame is a frame that the relay wrote.
type memFrame struct {
	op      byte
	payload string
}

// frames takes apart what was written, and forgets it.
func (m *memSocket) frames(t testing.TB) (all []memFrame) {
	t.Helper()
	for b := m.out; len(b) > 0; {
		if len(b) < 2 || b[0]&0xf0 != 0x80 || b[1]&0x80 != 0 {
			t.Fatalf("not a frame of a server: % .32x", b)
		}
		op, n, at := b[0]&15, int(b[1]), 2
		switch n {
		case 126:
			n, at = int(binary.BigEndian.Uint16(b[2:])), 4
		case 127:
			n, at = int(binary.BigEndian.Uint64(b[2:])), 10
		}
		all = append(all, memFrame{op, string(b[at : at+n])})
		b = b[at+n:]
	}
	m.out = nil
	return all
}

var memAddr = netip.MustParseAddr("192.0.2.1")

// memBinary registers a binary of id. It stays until its release.
func memBinary(t testing.TB, r *relay, id string) (*binaryLeg, *memSocket) {
	t.Helper()
	b, m := &binaryLeg{id: newConnID()}, &memSocket{}
	b.init(r, b, memAddr)
	b.sock = m
	if !r.enter(roleBinary) || !r.limits.acquireConn() {
		t.Fatal("the relay is draining or full")
	}
	if r.registry.claim(b, id, false); b.contendsSince.Load() != 0 {
		t.Fatalf("%s is claimed already", id)
	}
	return b, m
}

// memPhone registers a phone of id. It stays until its release.
func memPhone(t testing.TB, r *relay, id, connID string) (*phoneLeg, *memSocket) {
	t.Helper()
	ph, m := &phoneLeg{id: connID}, &memSocket{}
	ph.init(r, ph, memAddr)
	ph.sock = m
	if !r.enter(rolePhone) || !r.limits.acquireConn() {
		t.Fatal("the relay is draining or full")
	}
	if refused, text := r.registry.join(ph, id); refused != endNone {
		t.Fatalf("join of %s: %s", id, text)
	}
	return ph, m
}

// memPair registers a binary with one phone until the test's end. Frames pass
// between them in t, as in a poller's batch.
func memPair(tb testing.TB, r *relay) (b *binaryLeg, bs *memSocket, ph *phoneLeg, ps *memSocket, w *writeBatch) {
	tb.Helper()
	w = r.newBatch()
	b, bs = memBinary(tb, r, "server")
	ph, ps = memPhone(tb, r, "server", "phone-1")
	tb.Cleanup(func() {
		ph.release(w)
		b.release(w)
		w.flush()
	})
	return b, bs, ph, ps, w
}
