package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// What a frame and an idle connection may cost. Guards hold what can be counted:
// allocations, system calls, bytes, goroutines. Benchmarks measure time, beside
// the same work done the usual way where that tells something: naive code, or
// encoding/json. Guards that count what the whole process has are not parallel.

var costSizes = []int{256, 4096, 65536}

// ---- a frame's way without system calls ----

// costMessages are a phone's message of n bytes, and the same as its binary
// sends it to a phone.
func costMessages(n int, connID string) (up, down []byte) {
	text := `{"noise":"` + strings.Repeat("A", n-len(`{"noise":""}`)) + `"}`
	return clientFrame(last, opText, []byte(text)),
		clientFrame(last, opText, []byte(`{"conn_id":"`+connID+`","frame":`+text+`}`))
}

// memForward is a message on its way through a pair in memory.
type memForward struct {
	name     string
	size     int
	from, to *session
	sock     *memSocket // of to
	frame    []byte
}

// memForwards are messages of these sizes, in both directions.
func memForwards(tb testing.TB, r *relay, sizes ...int) (all []memForward, w *writeBatch) {
	tb.Helper()
	b, bs, ph, ps, w := memPair(tb, r)
	for _, n := range sizes {
		up, down := costMessages(n, ph.id)
		all = append(all, memForward{fmt.Sprint("up/", n), n, ph, b, bs, up}, memForward{fmt.Sprint("down/", n), n, b, ph, ps, down})
	}
	return all, w
}

// receiveInParts brings a frame in two reads, the second as the epoll loop gets
// it: into the message under assembly where it can.
func (f memForward) receiveInParts(w *writeBatch, frame, shared []byte) {
	half := len(frame) / 2
	f.from.receive(w, frame[:half])
	for rest := frame[half:]; len(rest) > 0; {
		into := f.from.readInto(shared)
		k := copy(into, rest)
		f.from.receive(w, into[:k])
		rest = rest[k:]
	}
}

func TestCostAllocationsPerFrame(t *testing.T) {
	needNoRace(t)
	all, w := memForwards(t, startRelay(t, testOptions()).relay, costSizes...)
	for _, f := range all {
		f.sock.discard = true
		read, shared := make([]byte, len(f.frame)), make([]byte, 8<<10)
		for _, whole := range []bool{true, false} {
			before := f.sock.bytes
			const runs = 200
			got := testing.AllocsPerRun(runs, func() {
				copy(read, f.frame) // which the relay unmasks in place
				f.from.markAlive(w)
				if whole {
					f.from.receive(w, read)
				} else {
					f.receiveInParts(w, read, shared)
				}
				w.flush()
			})
			if got != 0 {
				t.Errorf("%s, in one read %v: %v allocations per frame, want none", f.name, whole, got)
			}
			if moved := f.sock.bytes - before; moved < (runs+1)*f.size {
				t.Errorf("%s: %d bytes came out of %d frames", f.name, moved, runs+1)
			}
		}
	}
}

// All frames of one read leave in as few writes as the batch's bound allows.
func TestCostWritesOfOneRead(t *testing.T) {
	t.Parallel()
	all, w := memForwards(t, startRelay(t, testOptions()).relay, 256)
	for _, f := range all {
		for _, count := range []int{1, 2, 100, 400} {
			before := *f.sock
			f.from.receive(w, bytes.Repeat(f.frame, count))
			w.flush()
			most := 1 + (f.sock.bytes-before.bytes)/flushAt
			if n := f.sock.writes - before.writes; n > most {
				t.Errorf("%s: %d frames left in %d writes, want at most %d", f.name, count, n, most)
			}
			if got := len(f.sock.frames(t)); got != count {
				t.Errorf("%s: %d frames came out of %d", f.name, got, count)
			}
		}
	}
}

// A connection that has nothing half done holds no buffer, whatever it did
// before, and nothing is charged to the budget.
func TestCostOfIdleIsNoBuffer(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	all, w := memForwards(t, r.relay, append(slices.Clone(costSizes), r.o.maxFrame-60)...)
	phone := all[0].from
	idle := func(f memForward, what string) {
		t.Helper()
		for _, c := range []*session{f.from, f.to} {
			if c.unparsed != nil || c.fragments != nil || c.out != (queue{}) || c.pong != nil || c.messageStart.Load() != 0 {
				t.Errorf("%s: after %s a connection holds unparsed %v, fragments %v, out %v, pong %d bytes",
					f.name, what, c.unparsed, c.fragments, c.out, len(c.pong))
			}
		}
		if n := r.buffers.budget.used(); n != 0 {
			t.Errorf("%s: after %s %d bytes are charged", f.name, what, n)
		}
		if cap(w.dirty) > 16 {
			t.Errorf("%s: after %s a batch of two connections has room for %d", f.name, what, cap(w.dirty))
		}
	}
	for _, f := range all {
		f.from.receive(w, slices.Clone(f.frame))
		w.flush()
		idle(f, "one piece")
		for _, piece := range [][]byte{f.frame[:1], f.frame[1:5], f.frame[5:100], f.frame[100:]} {
			f.from.receive(w, slices.Clone(piece))
		}
		w.flush()
		idle(f, "pieces")
		f.sock.full = true
		f.from.receive(w, slices.Clone(f.frame))
		w.flush()
		if f.to.out.n == 0 {
			t.Errorf("%s: nothing waits for a socket that takes nothing", f.name)
		}
		f.sock.full = false
		f.to.writable(w)
		if f.from.paused.Load() { // by a frame that is as much as its binary may have to take
			f.from.unpause(w)
		}
		w.flush()
		idle(f, "waiting")
		f.sock.frames(t)
	}
	phone.receive(w, clientFrame(more, opText, []byte(`"a`)))
	phone.receive(w, clientFrame(last, opPing, []byte("!")))
	phone.receive(w, clientFrame(last, opContinuation, []byte(`b"`)))
	w.flush()
	idle(all[0], "fragments and a ping")
}

// Names that are written with escapes are read without an allocation, like plain ones.
func TestCostAllocationsPerEscapedName(t *testing.T) {
	needNoRace(t)
	for _, c := range []struct{ name, members string }{
		{"many short ones", strings.Repeat(`"\u0061":0,`, 1000)},
		{"a long one", `"` + strings.Repeat(`\u0061`, 10_000) + `":0,`},
	} {
		message := []byte(`{` + c.members + `"conn_id":"a","\u0066rame":0}`)
		got := testing.AllocsPerRun(100, func() {
			if e, drop := parseEnvelope(message); drop != dropNone || string(e.frame) != "0" {
				t.Fatalf("frame %q, drop %d", e.frame, drop)
			}
		})
		if got != 0 {
			t.Errorf("%s: %v allocations, want none", c.name, got)
		}
	}
}

// A daemon sends to phones whose relay has gone, for hours.
func TestCostAllocationsPerStrangeID(t *testing.T) {
	needNoRace(t)
	o := testOptions()
	o.logLevel = logOff
	r := startRelay(t, o)
	b, _, _, _, w := memPair(t, r.relay)
	read := make([]byte, 256)
	for name, tag := range map[string]connTag{"another relay's": {relay: 1}, "ours": {relay: r.me}, "evidence": {relay: 2, after: r.me}} {
		frame := clientFrame(last, opText, []byte(`{"conn_id":"`+newConnID(tag)+`","frame":1}`))
		if got := testing.AllocsPerRun(100, func() { b.receive(w, read[:copy(read, frame)]) }); got != 0 {
			t.Errorf("%s: %v allocations per frame, want none", name, got)
		}
	}
}

// bench measures work that moves n bytes.
func bench(b *testing.B, name string, n int, work func(b *testing.B)) {
	b.Run(name, func(b *testing.B) {
		b.SetBytes(int64(n))
		b.ReportAllocs()
		for b.Loop() {
			work(b)
		}
	})
}

// BenchmarkFrameRead is a header and the unmasking of its payload.
func BenchmarkFrameRead(b *testing.B) {
	var h frameHeader
	for _, n := range costSizes {
		f := clientFrame(last, opText, make([]byte, n))
		bench(b, fmt.Sprintf("%d/relay", n), n, func(b *testing.B) {
			h, _ = parseFrameHeader(f)
			unmask(f[h.size:], h.key)
		})
		bench(b, fmt.Sprintf("%d/bytewise", n), n, func(b *testing.B) {
			h, _ = parseFrameHeader(f)
			unmaskNaive(f[h.size:], [4]byte(f[h.size-4:]))
		})
	}
}

// BenchmarkFrameWrite is a message to one peer, queued and flushed to a socket
// that costs nothing.
func BenchmarkFrameWrite(b *testing.B) {
	_, _, ph, ps, w := memPair(b, startRelay(b, testOptions()).relay)
	ps.discard = true
	for _, n := range costSizes {
		p := make([]byte, n)
		bench(b, strconv.Itoa(n), n, func(b *testing.B) {
			ph.mu.Lock()
			ph.push(w, 0, nil, p, nil)
			ph.mu.Unlock()
			w.flush()
		})
	}
}

// BenchmarkFrameForward is all of a frame's way but the system calls: from the
// bytes of one socket to those of another, with what is checked in between.
func BenchmarkFrameForward(b *testing.B) {
	all, w := memForwards(b, startRelay(b, testOptions()).relay, costSizes...)
	for _, f := range all {
		f.sock.discard = true
		read := make([]byte, len(f.frame))
		bench(b, f.name, f.size, func(b *testing.B) {
			copy(read, f.frame)
			f.from.receive(w, read)
			w.flush()
		})
	}
}

// BenchmarkFrameStalled is what a frame costs whose phone takes nothing, beside one
// that goes out with its batch, and one whose phone is gone.
func BenchmarkFrameStalled(b *testing.B) {
	const n = 4 << 10
	r := startRelay(b, testOptions())
	bin, _, ph, ps, w := memPair(b, r.relay)
	_, down := costMessages(n, ph.id)
	_, gone := costMessages(n, "phone-0")
	for _, c := range []struct {
		name  string
		frame []byte
		full  bool
	}{{"takes", down, false}, {"stalled", down, true}, {"gone", gone, false}} {
		b.Run(c.name, func(b *testing.B) {
			ps.discard, ps.full = true, c.full
			read := make([]byte, len(c.frame))
			for b.Loop() {
				copy(read, c.frame)
				bin.receive(w, read)
				w.flush()
				if ph.out.n > r.o.queue-2*n {
					ph.out.free(&r.buffers)
				}
			}
			ps.full = false
			ph.writable(w)
		})
	}
}

// benchPayloads are a phone's messages by content. The first is the typical one.
func benchPayloads() []struct{ name, json string } {
	return []struct{ name, json string }{
		{"base64-256", `"` + strings.Repeat("q83vEjRW", 32)[:254] + `"`},
		{"base64-4K", `"` + strings.Repeat("q83vEjRW", 512)[:4094] + `"`},
		{"base64-87K", `{"noise":"` + strings.Repeat("q83vEjRW", 87<<10>>3) + `"}`},
		{"escaped-16K", `"` + strings.Repeat(`the \"quick\" brown\nfox \u0041 jumps over `, 16<<10/40) + `"`},
		{"cyrillic-16K", `"` + strings.Repeat("съешь же ещё этих мягких французских булок ", 16<<10/80) +
			`"`},
		{"numbers-16K", `[` + strings.Repeat(`-12.5e3,1024,0,`, 16<<10/15) + `1]`},
		{"nested-16K", `[` + strings.Repeat(`{"id":17,"tags":["a","b",{"x":null}],"ok":true},`, 16<<10/48) + `0]`},
	}
}

const benchConnID = "AAAAAAAAAAAAAAAAAAAAAA"

// BenchmarkEnvelopeSplice is a phone's message on its way into the envelope.
func BenchmarkEnvelopeSplice(b *testing.B) {
	for _, p := range benchPayloads() {
		payload := []byte(p.json)
		var out []byte
		bench(b, p.name+"/relay", len(payload), func(b *testing.B) {
			if !validJSON(payload, maxPhoneDepth) {
				b.Fatal("refused")
			}
			out = append(append(appendEnvelopeHead(out[:0], benchConnID), payload...), envelopeTail...)
		})
		bench(b, p.name+"/encoding-json", len(payload), func(b *testing.B) {
			var err error
			if out, err = json.Marshal(wireEnvelope{ConnID: benchConnID, Frame: payload}); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkEnvelopeScan is an envelope of a binary on its way to a phone.
func BenchmarkEnvelopeScan(b *testing.B) {
	for _, p := range benchPayloads() {
		message := []byte(`{"conn_id":"` + benchConnID + `","frame":` + p.json + `}`)
		bench(b, p.name+"/relay", len(message), func(b *testing.B) {
			if _, drop := parseEnvelope(message); drop != dropNone {
				b.Fatal(drop)
			}
		})
		bench(b, p.name+"/encoding-json", len(message), func(b *testing.B) {
			var e wireEnvelope
			if err := json.Unmarshal(message, &e); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkEnvelopeNames is an envelope full of members that mean nothing, their
// names written plainly and with escapes.
func BenchmarkEnvelopeNames(b *testing.B) {
	for _, c := range []struct{ name, members string }{
		{"short/plain", strings.Repeat(`"naming":0,`, 6000)},
		{"short/escaped", strings.Repeat(`"\u0061":0,`, 6000)},
		{"long/plain", `"` + strings.Repeat("naming", 10_000) + `":0,`},
		{"long/escaped", `"` + strings.Repeat(`\u0061`, 10_000) + `":0,`},
	} {
		message := []byte(`{` + c.members + `"conn_id":"` + benchConnID + `","frame":0}`)
		bench(b, c.name, len(message), func(b *testing.B) {
			if _, drop := parseEnvelope(message); drop != dropNone {
				b.Fatal(drop)
			}
		})
	}
}

// ---- the registry ----

// BenchmarkRegistry is one operation while so many server-ids are held, each
// with a phone. It should not depend on how many. The first thousand are busy:
// with those that are spread over all of memory it is the processor's caches and
// page tables that are measured, and not the registry.
func BenchmarkRegistry(b *testing.B) {
	for _, n := range []int{1, 1000, 100_000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) { benchRegistry(b, n) })
	}
}

func benchRegistry(b *testing.B, n int) {
	o := testOptions()
	o.maxConnections = 4*n + 1000
	o.maxPhones = 1000
	o.logLevel = logOff // the line of a claim costs more than the claim
	r := startRelay(b, o)
	w := r.newBatch()
	ids := make([]string, n)
	phones := make([]*session, n)
	var all []*conn
	for i := range ids {
		ids[i] = "standing-" + strconv.Itoa(i)
		bin, m := memBinary(b, r.relay, ids[i])
		m.discard = true
		ph, m := memPhone(b, r.relay, ids[i], "standing")
		m.discard = true
		phones[i] = ph
		all = append(all, &ph.conn, &bin.conn)
	}
	b.Cleanup(func() {
		for _, c := range all {
			c.free(w)
		}
		w.flush()
	})
	var worker atomic.Int64
	busy := min(n, 1000)

	// A claim that is taken and given up, by a binary that comes and goes.
	b.Run("claim+release", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			id := "worker-" + strconv.FormatInt(worker.Add(1), 10)
			w := r.newBatch()
			for pb.Next() {
				bin := newSession(r.relay, caller{role: roleBinary, addr: memAddr}, "worker")
				bin.sock = &memSocket{discard: true}
				if r.registry.claim(w, bin, id); bin.contends() {
					b.Error("another binary holds the id")
					return
				}
				r.registry.unregisterBinary(w, bin)
			}
		})
	})
	// A phone that joins one of the standing server-ids and leaves again.
	b.Run("join+leave", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			me := int(worker.Add(1))
			ph := newSession(r.relay, caller{role: rolePhone, addr: memAddr}, "worker-"+strconv.Itoa(me))
			ph.sock = &memSocket{discard: true}
			w := r.newBatch()
			for i := me * 7919; pb.Next(); i += 7919 {
				if refused, text := r.registry.join(ph, ids[i%busy]); refused != endNone {
					b.Errorf("join: %s", text)
					return
				}
				r.registry.unregisterPhone(w, ph, 1000)
				w.flush()
			}
		})
	})
	// What each envelope of a binary asks for: its phone by conn_id.
	b.Run("lookup", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			connID := []byte("standing")
			for i := int(worker.Add(1)) * 7919; pb.Next(); i += 7919 {
				ph := phones[i%busy]
				srv := ph.server
				srv.mu.Lock()
				if srv.phones[string(connID)] != ph {
					b.Error("another phone was found")
				}
				srv.mu.Unlock()
			}
		})
	})
}

// ---- a frame's way through sockets ----

// pipe sends bytes into one end of the relay and reads what has to come out of
// another. It allocates nothing while it does.
type pipe struct {
	from, to *wsClient
	in       []byte
	out      []byte // as long as what comes out
	sent     chan error
}

func newPipe(from, to *wsClient, in []byte, outSize int) *pipe {
	return &pipe{from, to, in, make([]byte, outSize), make(chan error, 1)}
}

// pass sends what is to be sent and waits for all of it at the other end.
func (p *pipe) pass() error {
	p.to.nc.SetReadDeadline(time.Now().Add(patience))
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

// Nothing is allocated for a frame, sockets and the epoll loop included.
func TestCostAllocationsOverLoopback(t *testing.T) {
	needNoRace(t)
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

// A frame that comes alone costs one read and one write; those that come
// together share them.
func TestCostSystemCallsPerFrame(t *testing.T) {
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

// BenchmarkRoundTrip is a phone's message to its binary over loopback and the
// answer back to the phone, clients included.
func BenchmarkRoundTrip(b *testing.B) {
	for _, n := range costSizes {
		up, down := pipes(startRelay(b, testOptions()), n, 1)
		bench(b, strconv.Itoa(n), 2*n, func(b *testing.B) {
			if err := errors.Join(up.pass(), down.pass()); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkPipelined is 64 KiB of small messages at a time, one direction.
func BenchmarkPipelined(b *testing.B) {
	for i, direction := range []string{"up", "down"} {
		b.Run(direction, func(b *testing.B) {
			const count = 200
			up, down := pipes(startRelay(b, testOptions()), 256, count)
			p := []*pipe{up, down}[i]
			b.ReportAllocs()
			for b.Loop() {
				if err := p.pass(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*count), "ns/frame")
		})
	}
}

// BenchmarkNeighbor is the round trip of a phone whose binary reads 8 MB/s, as a
// daemon does, while so many of its other phones send as fast as they can.
func BenchmarkNeighbor(b *testing.B) {
	for _, flooders := range []int{0, 2, 15} {
		for _, size := range []int{4 << 10, 64 << 10} {
			b.Run(fmt.Sprintf("%d-flooders-of-%d", flooders, size), func(b *testing.B) { benchNeighbor(b, flooders, size) })
		}
	}
}

func benchNeighbor(b *testing.B, flooders, size int) {
	r := startRelay(b, testOptions())
	binary, neighbor, connID := r.pair("server")
	flood, _ := costMessages(size, connID)
	flood = bytes.Repeat(flood, max(1, 64<<10/size))
	phones := make([]*wsClient, flooders)
	for i := range phones {
		phones[i] = r.phone("server")
		phones[i].greet(binary)
	}
	var others sync.WaitGroup
	defer others.Wait()
	for _, ph := range phones {
		defer ph.nc.Close()
		ph.nc.SetDeadline(time.Time{})
		others.Go(func() {
			for err := error(nil); err == nil; {
				_, err = ph.nc.Write(flood)
			}
		})
	}
	binary.br = bufio.NewReaderSize(&pacedReader{from: binary.nc, rate: 8e6, next: time.Now()}, 16<<10)
	defer binary.nc.Close()
	others.Go(func() {
		for {
			_, m, err := binary.next()
			if err != nil {
				return
			}
			if bytes.Contains(m[:min(2*len(connID), len(m))], []byte(`"frame":"ask"`)) {
				binary.nc.Write(clientFrame(last, opText, []byte(`{"conn_id":"`+connID+`","frame":"answer"}`)))
			}
		}
	})
	time.Sleep(300 * time.Millisecond) // until every buffer is full
	var took []time.Duration
	for b.Loop() {
		start := time.Now()
		neighbor.text(`"ask"`)
		if m := neighbor.message(); m != `"answer"` {
			b.Fatalf("got %q", m)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}

// pacedReader reads so many bytes a second.
type pacedReader struct {
	from io.Reader
	rate float64
	next time.Time
}

func (p *pacedReader) Read(b []byte) (int, error) {
	time.Sleep(time.Until(p.next))
	n, err := p.from.Read(b)
	if most := time.Now().Add(-10 * time.Millisecond); p.next.Before(most) { // what it may catch up on
		p.next = most
	}
	p.next = p.next.Add(time.Duration(float64(n) / p.rate * 1e9))
	return n, err
}

// BenchmarkFanOut is a stream of 4 KiB messages to eight phones in turn. What
// there is for the same phone shares a write.
func BenchmarkFanOut(b *testing.B) {
	const phones, each, size = 8, 100, 4 << 10
	r := startRelay(b, testOptions())
	binary := r.binary("server")
	var frames [phones][]byte
	var ends [phones]*pipe
	for i := range ends {
		ph := r.phone("server")
		_, frames[i] = costMessages(size, ph.greet(binary))
		ends[i] = newPipe(binary, ph, nil, each*framed(size))
	}
	in := bytes.Repeat(bytes.Join(frames[:], nil), each)
	before := r.metrics.socketWrites.Load()
	for b.Loop() {
		var readers sync.WaitGroup
		for _, p := range ends {
			readers.Go(func() {
				if _, err := io.ReadFull(p.to.br, p.out); err != nil {
					b.Error(err)
				}
			})
		}
		binary.raw(in)
		readers.Wait()
	}
	count := float64(b.N * phones * each)
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/count, "ns/frame")
	b.ReportMetric(float64(r.metrics.socketWrites.Load()-before)/count, "writes/frame")
}

// ---- an idle connection ----

// No goroutine waits with a connection: neither a reader, nor a writer, nor a
// timer. With a stack of 2 KiB each they would cost more than all the rest.
func TestCostGoroutinesPerConnection(t *testing.T) {
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

// readUntil reads until what came ends so.
func readUntil(t *testing.T, nc net.Conn, end string) (all []byte) {
	t.Helper()
	var b [1024]byte
	for !bytes.HasSuffix(all, []byte(end)) {
		n, err := nc.Read(b[:])
		if err != nil {
			t.Fatalf("%v, after %q", err, all)
		}
		all = append(all, b[:n]...)
	}
	return all
}

func readUpgrade(t *testing.T, nc net.Conn) {
	t.Helper()
	if answer := readUntil(t, nc, "\r\n\r\n"); !bytes.HasPrefix(answer, []byte("HTTP/1.1 101 ")) {
		t.Fatalf("the upgrade was answered with %q", answer)
	}
}

// queuedPhones are phones of "server" that only the kernel has accepted. What the
// process holds more of once they are admitted is the relay's.
func queuedPhones(t *testing.T, r *testRelay, n int) (phones []net.Conn, admit func()) {
	t.Helper()
	ln, request := onLoopback(t), upgradeRequest("/v2/client", phoneHeaders("server"))
	for range n {
		nc, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nc.Close() })
		nc.SetDeadline(time.Now().Add(patience))
		if err := request.Write(nc); err != nil {
			t.Fatal(err)
		}
		phones = append(phones, nc)
	}
	ln, err := newAcceptor(ln)
	if err != nil {
		t.Fatal(err)
	}
	debug.FreeOSMemory() // what connecting them has left
	next := make(chan struct{})
	return phones, func() {
		t.Helper()
		go r.srv.Serve(&httpListener{Listener: listenerInSteps{ln, next}, log: r.log})
		for _, nc := range phones { // one at a time, or the stacks of all requests would be counted
			next <- struct{}{}
			readUpgrade(t, nc)
		}
		close(next)
	}
}

// listenerInSteps accepts one connection for each item.
type listenerInSteps struct {
	net.Listener
	next chan struct{}
}

func (l listenerInSteps) Accept() (net.Conn, error) {
	<-l.next
	return l.Listener.Accept()
}

// heldMemory is what the process holds of heap and stacks, garbage and what
// pools keep aside not counted.
func heldMemory() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // a pool gives its items up at the second
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

// An idle phone costs about 600 bytes of heap and stack, its line in this test's
// log included, and no more once it has talked.
func TestCostBytesPerConnection(t *testing.T) {
	needEpoll(t)
	const phones, most = 400, 1100
	o := testOptions()
	o.maxPhones = phones + 1
	r := startRelay(t, o)
	b := r.binary("server")
	r.phone("server").greet(b)
	clients, admit := queuedPhones(t, r, phones)
	before := heldMemory()
	admit()
	r.settle("all phones are registered", func() bool { return r.metrics.connectedPhones.Load() == phones+1 })
	unused := (heldMemory() - before) / phones

	hello := clientFrame(last, opText, []byte(`"hello"`))
	for _, nc := range clients {
		if _, err := nc.Write(hello); err != nil {
			t.Fatal(err)
		}
		b.send(b.envelope().ConnID, `"welcome"`)
		readUntil(t, nc, `"welcome"`)
	}
	used := (heldMemory() - before) / phones
	t.Logf("bytes of heap and stack per phone: %d unused, %d used", unused, used)
	if unused > most || used > most {
		t.Errorf("a phone holds %d bytes, and %d once it has talked; want at most %d", unused, used, most)
	}
	runtime.KeepAlive(clients)
}

// ownedMemory is what the process has of the system's, for whatever purpose.
func ownedMemory() int {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.Sys - m.HeapReleased)
}

// What stays of the first wave of phones is the runtime's, for a heap that was
// larger once. The next wave finds it there, and leaves next to nothing.
func TestCostOfWavesIsGivenBack(t *testing.T) {
	needEpoll(t)
	const phones = 1000
	o := testOptions()
	o.maxPhones, o.maxConnections, o.grace = phones, phones+1, 0
	o.logLevel = logOff // the test's own log keeps all
	r := startRelay(t, o)
	r.binary("server")
	for _, share := range []int{2, 5} { // of the growth, may stay
		clients, admit := queuedPhones(t, r, phones)
		before := ownedMemory()
		admit()
		eventually(t, "the wave is noticed", func() bool { return r.peak.Load() > phones*sessionCost })
		top := ownedMemory()
		for _, nc := range clients {
			nc.Close()
		}
		r.settle("all phones are gone", func() bool { return r.metrics.connectedPhones.Load() == 0 })
		left := 0
		eventually(t, "memory is given back", func() bool {
			left = ownedMemory()
			return left-before <= (top-before)/share
		})
		t.Logf("KiB before, at the top, and left: %d, %d, %d", before>>10, top>>10, left>>10)
		runtime.KeepAlive(clients)
	}
}

// ---- the process ----

// peakMemory is the most of the program that was in RAM at once, in bytes
// (proc_pid_status(5)).
func (p *program) peakMemory() (n int64) {
	p.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Skip("this system tells no peak:", err)
	}
	_, line, _ := strings.Cut(string(b), "VmHWM:")
	if _, err := fmt.Sscanf(line, "%d kB", &n); err != nil {
		p.t.Fatalf("no peak: %v in\n%s", err, b)
	}
	return n << 10
}

// What README promises holds for newcomers that wait for an incumbent, each with
// about the largest head that is taken, and for messages that are half sent.
func TestCostOfNewcomers(t *testing.T) {
	needNoRace(t)
	needEpoll(t)
	t.Parallel()
	h := binaryHeaders("SERVER-ID")
	for i := range maxHeadLines - 10 {
		h[fmt.Sprintf("%x", i)] = []string{fmt.Sprintf("%060d", i)}
	}
	var head bytes.Buffer
	upgradeRequest("/v2/server", h).Write(&head)
	half := append([]byte{0x82, 0xff, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0}, make([]byte, 200<<10)...)
	for _, c := range []struct {
		newcomers, halves int
		queueTotal        int64
	}{
		{500, 0, 16 << 20},
		{2900, 1100, defaultOptions().queueTotal},
	} {
		t.Run(fmt.Sprintf("%d and %d halves", c.newcomers, c.halves), func(t *testing.T) {
			o := defaultOptions()
			p := startProgram(t, nil, "-rate-per-minute=0", fmt.Sprintf("-queue-total=%d", c.queueTotal)).listening()
			connect := func(id string, then []byte) {
				nc := p.dial()
				nc.SetDeadline(time.Now().Add(patience))
				nc.Write(bytes.Replace(head.Bytes(), []byte("SERVER-ID"), []byte(id), 1))
				readUpgrade(t, nc)
				if _, err := nc.Write(then); err != nil {
					t.Fatal(err)
				}
			}
			for i := range c.halves {
				connect(fmt.Sprint("half-", i), half)
			}
			for range 1 + c.newcomers { // the first is the incumbent
				connect("home", nil)
			}
			got, most := p.peakMemory(), c.queueTotal+4<<10*int64(o.maxConnections)+64<<20
			t.Logf("%d MiB at the most, %d promised", got>>20, most>>20)
			if got > most {
				t.Errorf("%d MiB were in RAM, README promises %d", got>>20, most>>20)
			}
			if n := strings.Count(p.stderr.String(), "session refused"); n > 0 {
				t.Errorf("%d newcomers were refused: they did not wait", n)
			}
		})
	}
}
