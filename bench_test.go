package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Where it tells something, the same work done the usual way stands beside it
// in the same run: naive code, or encoding/json.

// ---- frames ----

var frameSink frameHeader

// BenchmarkFrameRead is a header and the unmasking of its payload.
func BenchmarkFrameRead(b *testing.B) {
	for _, n := range costSizes {
		f := clientFrame(0x80, opText, make([]byte, n))
		b.Run(fmt.Sprintf("%d/relay", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				h, _ := parseFrameHeader(f)
				unmask(f[h.size:], h.key)
				frameSink = h
			}
		})
		b.Run(fmt.Sprintf("%d/bytewise", n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				h, _ := parseFrameHeader(f)
				unmaskNaive(f[h.size:], [4]byte(f[h.size-4:]))
				frameSink = h
			}
		})
	}
}

// BenchmarkFrameWrite is a message to one peer, queued and flushed to a socket
// that costs nothing.
func BenchmarkFrameWrite(b *testing.B) {
	r := startRelay(b, testOptions())
	_, _, ph, ps, w := memPair(b, r.relay)
	ps.discard = true
	for _, n := range costSizes {
		p := make([]byte, n)
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				ph.mu.Lock()
				ph.push(w, 0, nil, p, nil)
				ph.mu.Unlock()
				w.flush()
			}
		})
	}
}

// BenchmarkFrameForward is all of a frame's way but the system calls: from the
// bytes of one socket to those of another, with what is checked in between.
func BenchmarkFrameForward(b *testing.B) {
	r := startRelay(b, testOptions())
	bin, bs, ph, ps, w := memPair(b, r.relay)
	bs.discard, ps.discard = true, true
	for _, n := range costSizes {
		up, down := costMessages(n, ph.id)
		for _, c := range []struct {
			name  string
			from  *conn
			frame []byte
		}{{"up", &ph.conn, up}, {"down", &bin.conn, down}} {
			b.Run(fmt.Sprintf("%s/%d", c.name, n), func(b *testing.B) {
				read := make([]byte, len(c.frame))
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					copy(read, c.frame)
					c.from.receive(w, read)
					w.flush()
				}
			})
		}
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

// ---- envelopes ----

// benchPayloads are a phone's messages by content. The first is the typical one.
func benchPayloads() []struct{ name, json string } {
	return []struct{ name, json string }{
		{"base64-256", `"` + strings.Repeat("q83vEjRW", 32)[:254] + `"`},
		{"base64-4K", `"` + strings.Repeat("q83vEjRW", 512)[:4094] + `"`},
		{"base64-87K", `{"noise":"` + strings.Repeat("q83vEjRW", 87<<10>>3) + `"}`},
		{"escaped-16K", `"` + strings.Repeat(`the \"quick\" brown\nfox \u0041 jumps over `, 16<<10/40) + `"`},
		{"cyrillic-16K", `"` + strings.Repeat("съешь же ещё этих мягких французских булок ", 16<<10/80) + `"`},
		{"numbers-16K", `[` + strings.Repeat(`-12.5e3,1024,0,`, 16<<10/15) + `1]`},
		{"nested-16K", `[` + strings.Repeat(`{"id":17,"tags":["a","b",{"x":null}],"ok":true},`, 16<<10/48) + `0]`},
	}
}

// BenchmarkEnvelopeSplice is a phone's message on its way into the envelope.
func BenchmarkEnvelopeSplice(b *testing.B) {
	for _, p := range benchPayloads() {
		payload := []byte(p.json)
		var out []byte
		b.Run(p.name+"/relay", func(b *testing.B) {
			b.SetBytes(int64(len(payload)))
			b.ReportAllocs()
			for b.Loop() {
				if checkJSON(payload, maxPhoneDepth) != jsonOK {
					b.Fatal("refused")
				}
				out = append(append(appendEnvelopeHead(out[:0], "AAAAAAAAAAAAAAAAAAAAAA"), payload...), envelopeTail...)
			}
		})
		b.Run(p.name+"/encoding-json", func(b *testing.B) {
			b.SetBytes(int64(len(payload)))
			b.ReportAllocs()
			for b.Loop() {
				var err error
				if out, err = json.Marshal(wireEnvelope{ConnID: "AAAAAAAAAAAAAAAAAAAAAA", Frame: payload}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkEnvelopeScan is an envelope of a binary on its way to a phone.
func BenchmarkEnvelopeScan(b *testing.B) {
	for _, p := range benchPayloads() {
		message := []byte(`{"conn_id":"AAAAAAAAAAAAAAAAAAAAAA","frame":` + p.json + `}`)
		b.Run(p.name+"/relay", func(b *testing.B) {
			b.SetBytes(int64(len(message)))
			b.ReportAllocs()
			for b.Loop() {
				if _, _, drop := parseEnvelope(message); drop != dropNone {
					b.Fatal(drop)
				}
			}
		})
		b.Run(p.name+"/encoding-json", func(b *testing.B) {
			b.SetBytes(int64(len(message)))
			b.ReportAllocs()
			for b.Loop() {
				var e wireEnvelope
				if err := json.Unmarshal(message, &e); err != nil {
					b.Fatal(err)
				}
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
		message := []byte(`{` + c.members + `"conn_id":"AAAAAAAAAAAAAAAAAAAAAA","frame":0}`)
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(int64(len(message)))
			b.ReportAllocs()
			for b.Loop() {
				if _, _, drop := parseEnvelope(message); drop != dropNone {
					b.Fatal(drop)
				}
			}
		})
	}
}

// ---- registry ----

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
	r := startRelay(b, o)
	r.log = slog.New(slog.DiscardHandler) // the line of a claim costs more than the claim
	w := r.newBatch()
	ids := make([]string, n)
	phones := make([]*session, n)
	var all []*conn
	for i := range ids {
		ids[i] = "standing-" + strconv.Itoa(i)
		leg, m := memBinary(b, r.relay, ids[i])
		m.discard = true
		ph, m := memPhone(b, r.relay, ids[i], "standing")
		m.discard = true
		phones[i] = ph
		all = append(all, &ph.conn, &leg.conn)
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
				leg := newSession(r.relay, caller{role: roleBinary, addr: memAddr}, "worker")
				leg.sock = &memSocket{discard: true}
				if r.registry.claim(w, leg, id); leg.contends() {
					b.Error("somebody else holds the id")
					return
				}
				r.registry.unregisterBinary(w, leg)
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

// ---- end to end ----

// BenchmarkRoundTrip is a phone's message to its binary over loopback and the
// answer back to the phone, clients included.
func BenchmarkRoundTrip(b *testing.B) {
	for _, n := range costSizes {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			up, down := pipes(startRelay(b, testOptions()), n, 1)
			b.SetBytes(2 * int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if err := up.pass(); err != nil {
					b.Fatal(err)
				}
				if err := down.pass(); err != nil {
					b.Fatal(err)
				}
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
			if bytes.Contains(m[:min(60, len(m))], []byte(`"frame":"ask"`)) {
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
