//go:build !race

package main

import (
	"strings"
	"testing"
)

// Under the race detector a sync.Pool forgets at random, and blocks are
// allocated anew. What others allocate would be counted: no test here is parallel.

// Nothing is allocated for a frame, in neither direction.
func TestAllocationsPerFrame(t *testing.T) {
	r := startRelay(t, testOptions())
	b, bs, ph, ps, bt := memPair(t, r.relay)
	bs.discard, ps.discard = true, true
	for _, n := range costSizes {
		up, down := costMessages(n, ph.id)
		for _, c := range []struct {
			name  string
			from  *conn
			to    *memSocket
			frame []byte
		}{{"up", &ph.conn, bs, up}, {"down", &b.conn, ps, down}} {
			read, shared := make([]byte, len(c.frame)), make([]byte, 8<<10)
			for _, whole := range []bool{true, false} {
				before := c.to.bytes
				const runs = 200
				got := testing.AllocsPerRun(runs, func() {
					copy(read, c.frame) // which the relay unmasks in place
					c.from.markAlive(bt)
					if whole {
						c.from.receive(bt, read)
					} else { // the rest of it comes with a later read, as the epoll loop gets it
						half := len(read) / 2
						c.from.receive(bt, read[:half])
						for at := half; at < len(read); {
							into := c.from.readInto(shared)
							k := copy(into, read[at:])
							c.from.receive(bt, into[:k])
							at += k
						}
					}
					bt.flush()
				})
				if got != 0 {
					t.Errorf("%s/%d, in one read %v: %v allocations per frame, want none", c.name, n, whole, got)
				}
				if moved := c.to.bytes - before; moved < (runs+1)*n {
					t.Errorf("%s/%d: %d bytes came out of %d frames", c.name, n, moved, runs+1)
				}
			}
		}
	}
}

// Names that are written with escapes cost the loop about what plain ones do:
// nothing is allocated to read them.
func TestAllocationsPerEscapedName(t *testing.T) {
	for _, c := range []struct{ name, members string }{
		{"many short ones", strings.Repeat(`"\u0061":0,`, 1000)},
		{"a long one", `"` + strings.Repeat(`\u0061`, 10_000) + `":0,`},
	} {
		message := []byte(`{` + c.members + `"conn_id":"a","\u0066rame":0}`)
		got := testing.AllocsPerRun(100, func() {
			if e, _, drop := parseEnvelope(message); drop != dropNone || string(e.frame) != "0" {
				t.Fatalf("frame %q, drop %d", e.frame, drop)
			}
		})
		if got != 0 {
			t.Errorf("%s: %v allocations, want none", c.name, got)
		}
	}
}

// The same through sockets and the epoll loop.
func TestAllocationsPerFrameOverLoopback(t *testing.T) {
	needEpoll(t)
	for _, n := range costSizes[:2] {
		const count = 8
		up, down := pipes(startRelay(t, testOptions()), n, count)
		for i, p := range []*pipe{up, down} {
			got := testing.AllocsPerRun(100, func() {
				if err := p.pass(); err != nil {
					t.Fatal(err)
				}
			})
			if got != 0 {
				t.Errorf("direction %d, %d bytes: %v allocations for %d frames, want none", i, n, got, count)
			}
		}
	}
}
