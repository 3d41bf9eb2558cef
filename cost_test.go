package main

import (
	"bytes"
	"io"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What a frame and an idle connection may cost, in things that can be counted:
// system calls, bytes, goroutines, and in allocs_test.go allocations. Time is
// for the benchmarks. Tests that count what the whole process has are not
// parallel.

var costSizes = []int{256, 4096, 65536}

// costMessages are a phone's message of n bytes, and the same as its binary
// sends it to a phone.
func costMessages(n int, connID string) (up, down []byte) {
	text := `{"noise":"` + strings.Repeat("A", n-len(`{"noise":""}`)) + `"}`
	return clientFrame(0x80, opText, []byte(text)),
		clientFrame(0x80, opText, []byte(`{"conn_id":"`+connID+`","frame":`+text+`}`))
}

// pipe sends bytes into one end of the relay and reads what has to come out of
// another. It allocates nothing while it does.
type pipe struct {
	from, to *wsClient
	in       []byte
	out      []byte // as long as what comes out
	sent     chan error
}

func newPipe(from, to *wsClient, in []byte, outSize int) *pipe {
	deadline := time.Now().Add(patience)
	from.nc.SetDeadline(deadline)
	to.nc.SetDeadline(deadline)
	return &pipe{from, to, in, make([]byte, outSize), make(chan error, 1)}
}

// pass sends what is to be sent and waits for all of it at the other end.
func (p *pipe) pass() error {
	if len(p.in) <= 64<<10 { // fits in the socket's buffer
		p.send()
	} else {
		go p.send()
	}
	if _, err := io.ReadFull(p.to.br, p.out); err != nil {
		return err
	}
	return <-p.sent
}

func (p *pipe) send() {
	_, err := p.from.nc.Write(p.in)
	p.sent <- err
}

// framed is how long a frame of the relay with n bytes of payload is.
func framed(n int) int { return len(appendFrameHeader(nil, opText, n)) + n }

// pipes are both directions between a phone and its binary, count frames at a
// time.
func pipes(r *testRelay, n, count int) (up, down *pipe) {
	b, ph, connID := r.pair("server")
	upFrame, downFrame := costMessages(n, connID)
	envelope := len(appendEnvelopeHead(nil, connID)) + n + len(envelopeTail)
	return newPipe(ph, b, bytes.Repeat(upFrame, count), count*framed(envelope)),
		newPipe(b, ph, bytes.Repeat(downFrame, count), count*framed(n))
}

// A frame that comes alone costs one read and one write; those that come
// together share them.
func TestSystemCallsPerFrame(t *testing.T) {
	t.Parallel()
	needEpoll(t)
	for _, c := range []struct {
		name          string
		size, count   int
		reads, writes float64 // per frame, at the most
	}{
		{"one at a time", 256, 1, 1, 1},
		{"one at a time", 4096, 1, 1, 1},
		{"pipelined", 256, 1000, 0.05, 0.05},
		{"pipelined", 4096, 200, 0.25, 0.25},
	} {
		r := startRelay(t, testOptions())
		up, down := pipes(r, c.size, c.count)
		for i, p := range []*pipe{up, down} {
			reads, writes := r.metrics.socketReads.Load(), r.metrics.socketWrites.Load()
			const rounds = 20
			for range rounds {
				if err := p.pass(); err != nil {
					t.Fatal(err)
				}
			}
			frames := float64(rounds * c.count)
			reads, writes = r.metrics.socketReads.Load()-reads, r.metrics.socketWrites.Load()-writes
			t.Logf("%s/%d direction %d: %.4f reads and %.4f writes per frame", c.name, c.size, i, float64(reads)/frames, float64(writes)/frames)
			if float64(reads) > c.reads*frames || float64(writes) > c.writes*frames {
				t.Errorf("%s/%d direction %d: %d reads and %d writes for %v frames", c.name, c.size, i, reads, writes, frames)
			}
		}
	}
}

// All frames of one read leave in as few writes as the batch's bound allows.
func TestFramesOfOneReadShareWrites(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, bs, ph, ps, bt := memPair(t, r.relay)
	up, down := costMessages(256, ph.id)
	for _, c := range []struct {
		from  *conn
		to    *memSocket
		frame []byte
	}{{&ph.conn, bs, up}, {&b.conn, ps, down}} {
		for _, count := range []int{1, 2, 100, 400} {
			before := *c.to
			c.from.receive(bt, bytes.Repeat(c.frame, count))
			bt.flush()
			most := 1 + (c.to.bytes-before.bytes)/flushAt
			if n := c.to.writes - before.writes; n > most {
				t.Errorf("%d frames left in %d writes, want at most %d", count, n, most)
			}
			if got := len(c.to.frames(t)); got != count {
				t.Errorf("%d frames came out of %d", got, count)
			}
		}
	}
}

// A connection that has nothing half done holds no buffer, whatever it did
// before, and nothing is charged to the budget.
func TestIdleConnectionsHoldNoBuffers(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, bs, ph, ps, bt := memPair(t, r.relay)
	idle := func(what string) {
		t.Helper()
		for _, c := range []*conn{&b.conn, &ph.conn} {
			if c.unparsed != nil || c.fragments != nil || c.out != (queue{}) || c.pong != nil || c.messageStart.Load() != 0 {
				t.Errorf("after %s a connection holds unparsed %v, fragments %v, out %v, pong %d bytes", what, c.unparsed, c.fragments, c.out, len(c.pong))
			}
		}
		if n := r.buffers.budget.used(); n != 0 {
			t.Errorf("after %s %d bytes are charged", what, n)
		}
		if cap(bt.dirty) > 16 {
			t.Errorf("after %s a batch of two connections has room for %d", what, cap(bt.dirty))
		}
	}
	for _, n := range slices.Concat(costSizes, []int{r.o.maxFrame - 60}) {
		up, down := costMessages(n, ph.id)
		for _, c := range []struct {
			from  *conn
			frame []byte
		}{{&ph.conn, up}, {&b.conn, down}} {
			c.from.receive(bt, slices.Clone(c.frame))
			bt.flush()
			idle(strconv.Itoa(n) + " bytes in one piece")
			for _, piece := range [][]byte{c.frame[:1], c.frame[1:5], c.frame[5:100], c.frame[100:]} {
				c.from.receive(bt, slices.Clone(piece))
			}
			bt.flush()
			idle(strconv.Itoa(n) + " bytes in pieces")
		}
		bs.full, ps.full = true, true
		ph.receive(bt, slices.Clone(up))
		b.receive(bt, slices.Clone(down))
		bt.flush()
		if b.out.n == 0 || ph.out.n == 0 {
			t.Error("nothing waits for a socket that takes nothing")
		}
		bs.full, ps.full = false, false
		b.writable(bt)
		ph.writable(bt)
		if ph.paused.Load() { // by a frame that is as much as its binary may have to take
			ph.unpause(bt)
		}
		bt.flush()
		idle(strconv.Itoa(n) + " bytes that had to wait")
	}
	for _, part := range [][]byte{clientFrame(0, opText, []byte(`"a`)), clientFrame(0x80, opPing, []byte("!")), clientFrame(0x80, opContinuation, []byte(`b"`))} {
		ph.receive(bt, part)
	}
	bt.flush()
	idle("fragments and a ping")
	bs.frames(t)
	ps.frames(t)
}

// No goroutine waits with a connection: neither a reader, nor a writer, nor a
// timer. With a stack of 2 KiB each they would cost more than all the rest.
func TestGoroutinesPerConnection(t *testing.T) {
	needEpoll(t)
	o := testOptions()
	const phones = 100
	o.maxPhones = phones
	r := startRelay(t, o)
	b := r.binary("server")
	r.phone("server").greet(b)
	before := runtime.NumGoroutine()
	for range phones - 1 {
		ph := r.phone("server")
		b.send(ph.greet(b), `"welcome"`)
		if m := ph.message(); m != `"welcome"` {
			t.Fatalf("phone got %q", m)
		}
	}
	eventually(t, "as many goroutines as before", func() bool { return runtime.NumGoroutine() <= before })
}
