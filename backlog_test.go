package main

import (
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// What a slow peer costs: itself, and nobody else.

// numbered is a frame of n bytes with a number that can be read back.
func numbered(i, n int) string {
	s := fmt.Sprintf(`"%08d`, i)
	return s + strings.Repeat("x", n-len(s)-1) + `"`
}

func numberOf(frame string) (i int) {
	if _, err := fmt.Sscanf(frame, `"%08d`, &i); err != nil {
		return -1
	}
	return i
}

// A phone stops reading. Its siblings get every frame and its binary every pong,
// one round trip after the other, until its queue is full; then it is closed
// behind what it was sent, without a gap.
func TestStalledPhone(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.queue = 1 << 20
	onEach(t, o, func(t *testing.T, r *testRelay) {
		b, stalled, stalledID := r.pair("stall")
		var siblings []*wsClient
		var ids []string
		for range 2 {
			ph := r.phone("stall")
			ids = append(ids, ph.greet(b))
			siblings = append(siblings, ph)
		}
		sent, ended := 0, false
		for ; !ended; sent++ {
			if sent == 2000 {
				t.Fatalf("%d frames of 32 KiB, and the queue of 1 MiB is not full", sent)
			}
			b.send(stalledID, numbered(sent, 32<<10))
			for k, ph := range siblings {
				b.send(ids[k], numbered(sent, 100))
				if got := numberOf(ph.message()); got != sent {
					t.Fatalf("sibling got frame %d, want %d", got, sent)
				}
			}
			ping := []byte(fmt.Sprint(sent))
			b.frame(opPing, ping)
			for pong := false; !pong; {
				switch op, p, err := b.next(); {
				case err != nil:
					t.Fatal(err)
				case op == opPong && string(p) == string(ping):
					pong = true
				case op == opText && string(p) == fmt.Sprintf(`{"conn_id":%q,"close_code":1011}`, stalledID):
					ended = true
				default:
					t.Fatalf("the binary got opcode %d %q", op, p)
				}
			}
		}
		got := 0
		for ; ; got++ {
			op, p, err := stalled.next()
			if err != nil {
				t.Fatal(err)
			}
			if op == opClose {
				if code, _ := parseClose(p); code != 1011 || string(p[2:]) != "phone backlog full" {
					t.Errorf("closed %d %q, want 1011 phone backlog full", code, p[2:])
				}
				break
			}
			if op != opText || numberOf(string(p)) != got {
				t.Fatalf("got opcode %d, %.20q after %d frames", op, p, got)
			}
		}
		// The one that did not fit, and whatever came until the binary was told.
		if got >= sent {
			t.Errorf("the phone got %d frames of %d, and its queue was full", got, sent)
		}
	})
}

// Over a pipe nothing but the relay itself holds bytes: the limits are exact.
func TestQueueLimits(t *testing.T) {
	t.Parallel()
	const limit, size = 1 << 20, 4 << 10
	for _, tt := range []struct {
		name   string
		set    func(o *options)
		reason string
	}{
		{"of one phone", func(o *options) { o.queue = limit }, "phone backlog full"},
		{"of the process", func(o *options) { o.queueTotal = limit }, "relay memory limit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := testOptions()
			tt.set(&o)
			onFakeClock(t, o, func(t *testing.T, r *testRelay) {
				b, stalled, stalledID := r.pair("limit")
				sibling := r.phone("limit")
				id := sibling.greet(b)
				sent, most := 0, int64(0)
				for ended := false; !ended; sent++ {
					if sent*size > 2*limit {
						t.Fatalf("%d bytes are queued", sent*size)
					}
					b.send(stalledID, numbered(sent, size))
					b.frame(opPing, nil)
					op, p, err := b.next()
					if op == opText && string(p) == fmt.Sprintf(`{"conn_id":%q,"close_code":1011}`, stalledID) {
						ended = true
						op, p, err = b.next()
					}
					if op != opPong || err != nil {
						t.Fatalf("the binary got opcode %d %.200q, %v; want a pong", op, p, err)
					}
					most = max(most, r.buffers.budget.used())
				}
				// Close frames and notices are let through beyond it.
				if most > limit+64<<10 {
					t.Errorf("%d bytes were kept, the limit is %d", most, limit)
				}
				if (sent+1)*size < limit/2 {
					t.Errorf("closed after %d frames of %d bytes, the limit is %d", sent, size, limit)
				}
				// What passes through has room beside it, half received for a while.
				passing := numbered(1, limit/16)
				raw := clientFrame(last, opText, fmt.Appendf(nil, `{"conn_id":%q,"frame":%s}`, id, passing))
				b.raw(raw[:len(raw)/2])
				synctest.Wait()
				b.raw(raw[len(raw)/2:])
				if got := sibling.message(); got != passing {
					t.Errorf("the sibling got %.50s", got)
				}
				for i := range sent - 1 {
					if got := numberOf(stalled.message()); got != i {
						t.Fatalf("frame %d arrived, want %d", got, i)
					}
				}
				stalled.wantEnd(1011, tt.reason)
				b.send(id, "1")
				if got := sibling.message(); got != "1" {
					t.Errorf("the sibling got %s", got)
				}
			})
		})
	}
}

func TestCloseDirectiveBehindAQueue(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		for _, shape := range []string{`"frame":"bye",`, `"frame":null,`, ``} {
			b, ph, id := r.pair(newConnID())
			var raw []byte
			for i := range 1000 {
				raw = append(raw, clientFrame(last, opText, []byte(fmt.Sprintf(`{"conn_id":%q,"frame":%s}`, id, numbered(i, 1000))))...)
			}
			b.raw(append(raw, clientFrame(last, opText, []byte(fmt.Sprintf(`{"conn_id":%q,%s"close_code":4412}`, id, shape)))...))
			r.settle("the directive is read", func() bool { return r.metrics.connectedPhones.Load() == 0 })
			for i := range 1000 {
				if got := numberOf(ph.message()); got != i {
					t.Fatalf("frame %d arrived, want %d", got, i)
				}
			}
			if shape == `"frame":"bye",` {
				if got := ph.message(); got != `"bye"` {
					t.Errorf("got %.50q before the end, want the directive's frame", got)
				}
			}
			ph.wantEnd(4412, "closed by binary")
			b.close(1000, "")
			b.wantEnd(1000, "")
		}
	})
}

// A phone on a slow line gets what stands before its close frame, however long
// it takes.
func TestCloseDirectiveOnASlowLine(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, id := r.pair("slow")
		const n, size = 100, 32 << 10
		for i := range n {
			b.send(id, numbered(i, size))
		}
		b.text(fmt.Sprintf(`{"conn_id":%q,"close_code":4412}`, id))
		for i := range n {
			time.Sleep(500 * time.Millisecond)
			if got := numberOf(ph.message()); got != i {
				t.Fatalf("frame %d arrived, want %d", got, i)
			}
		}
		ph.wantEnd(4412, "closed by binary")
	})
}

// Whoever says goodbye with a backlog in front of him gets all of it and the
// answer, though he takes longer than a peer has to end a connection that is over.
func TestAnswerBehindABacklog(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, id := r.pair("slow")
		const n, size = 3, 16 << 10 // less than the poller takes from the queue
		for i := range n {
			b.send(id, numbered(i, size))
		}
		synctest.Wait()
		ph.close(1001, "")
		for i := range n {
			time.Sleep(3 * time.Second)
			if got := numberOf(ph.message()); got != i {
				t.Fatalf("frame %d arrived, want %d", got, i)
			}
		}
		ph.wantEnd(1001, "")
	})
}

// A binary that does not read for a while is back-pressure on its phones: no
// frame is lost, none overtakes another, and the relay keeps little.
func TestSlowBinary(t *testing.T) {
	t.Parallel()
	const phones, frames, size = 4, 1000, 8 << 10
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b := r.binary("slow")
		ids := map[string]int{}
		var all []*wsClient
		for range phones {
			ph := r.phone("slow")
			ids[ph.greet(b)] = 0
			all = append(all, ph)
		}
		var senders sync.WaitGroup
		for _, ph := range all {
			senders.Go(func() {
				for i := range frames {
					ph.nc.SetWriteDeadline(time.Now().Add(patience))
					if _, err := ph.nc.Write(clientFrame(last, opText, []byte(numbered(i, size)))); err != nil {
						t.Errorf("frame %d: %v", i, err)
						return
					}
				}
			})
		}
		server := &r.holder("slow").conn
		r.settle("every phone waits for the binary", func() bool {
			server.mu.Lock()
			defer server.mu.Unlock()
			return len(server.waiters) == phones
		})
		if n := r.buffers.budget.used(); n > 512<<10 { // pauseAt, and what was read of each phone
			t.Errorf("%d bytes are kept for a slow binary", n)
		}
		for range phones * frames {
			// By hand: this many bytes are too many for encoding/json under -race.
			head, frame, _ := strings.Cut(strings.TrimSuffix(b.message(), "}"), `","frame":`)
			id := strings.TrimPrefix(head, `{"conn_id":"`)
			if got, want := numberOf(frame), ids[id]; got != want || len(frame) != size {
				t.Fatalf("frame %d of %d bytes arrived, want %d of %d", got, len(frame), want, size)
			}
			ids[id]++
		}
		senders.Wait()
		r.settle("nothing is kept", func() bool { return r.buffers.budget.used() == 0 })
	})
}

// What phones that flood their binary have in front of a phone that sends little
// is bounded, however many they are: they wait, and come back one by one.
func TestSlowBinaryIsFair(t *testing.T) {
	t.Parallel()
	const flooders, size = 15, 64 << 10
	r := startRelay(t, testOptions())
	b, bs, light, _, bt := memPair(t, r.relay)
	phones, socks := make([]*session, flooders), make([]*memSocket, flooders)
	for i := range phones {
		phones[i], socks[i] = memPhone(t, r.relay, "server", fmt.Sprint("flooder-", i))
		defer phones[i].free(bt)
	}
	bs.full = true
	flood := func(ph *session, n int) {
		for range n {
			if !ph.paused.Load() {
				ph.message(bt, opText, []byte(numbered(0, size)))
			}
		}
		bt.flush()
	}
	for _, ph := range phones {
		flood(ph, 5)
		if !ph.paused.Load() {
			t.Error("a phone that floods is not held back")
		}
	}
	for round := range flooders {
		bs.full, bs.discard = false, true
		b.writable(bt) // it takes all
		bt.flush()
		bs.full = true
		turns := 0
		for i, ph := range phones {
			if socks[i].resumes > 0 {
				socks[i].resumes = 0
				turns++
				ph.unpause(bt)
				flood(ph, 5)
			}
		}
		b.mu.Lock()
		front := b.out.n
		b.mu.Unlock()
		if turns != 1 || front > pauseAt+size+1000 {
			t.Fatalf("round %d: %d phones had a turn, and %d bytes wait", round, turns, front)
		}
		light.message(bt, opText, []byte(`"small"`))
		bt.flush()
		if light.paused.Load() {
			t.Fatalf("round %d: a phone that has sent one small frame is held back", round)
		}
	}
	if n := len(b.waiters); n != flooders {
		t.Errorf("%d phones wait, want %d", n, flooders)
	}
	for _, ph := range phones {
		if n := ph.rxFrames; n != 0 { // message was called by hand
			t.Errorf("%d frames were read", n)
		}
	}
}

// A phone whose turn it is, and that sends nothing or ends, keeps nobody waiting.
func TestSlowBinaryPassesTheTurn(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, bs, first, _, bt := memPair(t, r.relay)
	bs.full = true
	phones, socks := []*session{first}, []*memSocket{nil}
	for i := range 4 {
		ph, s := memPhone(t, r.relay, "server", fmt.Sprint("waits-", i))
		phones, socks = append(phones, ph), append(socks, s)
		defer ph.free(bt)
	}
	for _, ph := range phones {
		for !ph.paused.Load() {
			ph.message(bt, opText, []byte(numbered(0, 64<<10)))
		}
	}
	bt.flush()
	bs.full, bs.discard = false, true
	phones[2].startClose(bt, endShutdown) // while it waits
	b.writable(bt)
	first.unpause(bt) // and has nothing to say
	bt.flush()
	if socks[1].resumes != 1 {
		t.Fatal("the turn was not passed on")
	}
	phones[1].unpause(bt)
	bt.flush()
	if socks[3].resumes != 1 || socks[4].resumes != 0 {
		t.Errorf("behind one that has ended the next was called %d times, the one behind that %d", socks[3].resumes, socks[4].resumes)
	}
}

// The kernel holds little for a binary that does not read, so that what one phone
// sends does not stand behind megabytes of another.
func TestSlowBinaryFillsNoKernelBuffer(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" || runtime.GOARCH == "386" {
		t.Skip("the goroutine poller leaves the socket as it is")
	}
	o := testOptions()
	o.ping, o.writeTimeout = time.Hour, time.Minute
	r := startRelay(t, o)
	_, ph, _ := r.pair("slow")
	go func() {
		for err := error(nil); err == nil; {
			_, err = ph.nc.Write(clientFrame(last, opText, []byte(numbered(0, 16<<10))))
		}
	}()
	server := r.holder("slow")
	r.settle("the phone waits for its binary", func() bool {
		server.mu.Lock()
		defer server.mu.Unlock()
		return len(server.waiters) == 1
	})
	if n := r.metrics.bytesUp.Load(); n > 512<<10 {
		t.Errorf("%d bytes were taken for a binary that reads none", n)
	}
}

// Bytes that turn out to wait take nothing of what is kept for those that pass:
// a phone for which they do not fit ends, as it is.
func TestBacklogThatTurnsOutToWait(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1000, 100 << 10} { // with the batch, and at once
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			t.Parallel()
			r := startRelay(t, testOptions())
			b, bs, ph, ps, bt := memPair(t, r.relay)
			budget := r.buffers.budget
			held := int(budget.limit - budget.limit/8)
			budget.take(held, priorityBacklog)
			defer budget.give(held)
			ps.full, ps.room = true, 10
			b.message(bt, opText, []byte(`{"conn_id":"phone-1","frame":`+numbered(0, size)+`}`))
			bt.flush()
			if ph.is(connOpen) || ph.endReason != endMemoryLimit || ps.aborts == 0 {
				t.Errorf("the phone ended with %q, cut off: %d", ph.endReason, ps.aborts)
			}
			if got := bs.frames(t); len(got) != 1 || got[0].payload != `{"conn_id":"phone-1","close_code":1011}` {
				t.Errorf("the binary got %q", got)
			}
			if n := budget.used() - int64(held); n > int64(bufferSizes[0]) { // a close frame that leads nowhere
				t.Errorf("%d bytes wait", n)
			}
		})
	}
}

// What waits for a binary does not end it, nor its phones, while phones elsewhere
// have filled all that they may.
func TestBacklogOfPhonesSparesBinaries(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	_, bs, ph, _, bt := memPair(t, r.relay)
	budget := r.buffers.budget
	held := 0
	for budget.take(1<<10, priorityPassing) {
		held += 1 << 10
	}
	defer budget.give(held)
	bs.full = true
	for i := range 20 {
		ph.handler.message(bt, opText, []byte(numbered(i, 4<<10)))
		bt.flush()
	}
	if !ph.is(connOpen) {
		t.Errorf("a phone that sends to its binary ended with %q", ph.endReason)
	}
}

// Slow phones of many binaries, and new ones for those that were closed, end
// nobody who is not slow.
func TestBacklogOfManySlowPhones(t *testing.T) {
	t.Parallel()
	const binaries, enough = 24, 50
	o := testOptions()
	o.queueTotal, o.maxPhones = 16<<20, 4
	o.ping, o.writeTimeout = time.Hour, time.Minute
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var tight atomic.Bool
	r := startRelayOn(t, o, tightListener{ln, &tight})
	healthy, reader, id := r.pair("healthy")
	tight.Store(true)
	over := func() int64 { return r.metrics.closes[rolePhone][endMemoryLimit].Load() }
	stop := make(chan struct{})
	var slow sync.WaitGroup
	for i := range binaries {
		server := fmt.Sprint("slow-", i)
		b := r.binary(server)
		slow.Go(func() { feedSlowPhones(t, r, b, server, stop) })
	}
	frame := numbered(0, 100<<10)
	for end := time.Now().Add(patience); over() < enough; {
		if time.Now().After(end) {
			t.Fatalf("%d slow phones were closed, and %d bytes are kept of %d", over(), r.buffers.budget.used(), o.queueTotal)
		}
		healthy.raw(plainFrame(id, frame))
		if got := reader.message(); got != frame {
			t.Fatalf("%d bytes arrived", len(got))
		}
	}
	close(stop)
	slow.Wait()
	for reason := range closeReasonCount {
		if n := r.metrics.closes[roleBinary][reason].Load(); n > 0 {
			t.Errorf("%d binaries ended with %q", n, reason)
		}
	}
}

// tightListener keeps the kernel from taking megabytes for each peer that does
// not read, once it is told to.
type tightListener struct {
	net.Listener
	tight *atomic.Bool
}

func (ln tightListener) Accept() (net.Conn, error) {
	nc, err := ln.Listener.Accept()
	if err == nil && ln.tight.Load() {
		err = nc.(*net.TCPConn).SetWriteBuffer(16 << 10)
	}
	return nc, err
}

// plainFrame is an envelope under the mask 0, which costs a test nothing.
func plainFrame(connID, frame string) []byte {
	p := `{"conn_id":"` + connID + `","frame":` + frame + `}`
	b := appendFrameHeader(nil, opText, len(p))
	b[1] |= 0x80
	return append(append(b, 0, 0, 0, 0), p...)
}

// feedSlowPhones sends frame after frame to as many phones as b may have. They
// read none, and each that is closed is replaced.
func feedSlowPhones(t *testing.T, r *testRelay, b *wsClient, server string, stop chan struct{}) {
	var ids []string
	frame := numbered(0, 15<<10)
	// hear reads what b gets until a frame of this kind.
	hear := func(until byte) string {
		for {
			op, p, err := b.next()
			if err != nil || op == opClose {
				t.Errorf("%s: opcode %d %q, %v", server, op, p, err)
				return ""
			}
			connID := ""
			if op == opText {
				connID = strings.Split(string(p), `"`)[3]
			}
			if strings.Contains(string(p), "close_code") {
				ids = slices.DeleteFunc(ids, func(id string) bool { return id == connID })
			} else if op == until {
				return connID
			}
		}
	}
	for !t.Failed() {
		select {
		case <-stop:
			return
		default:
		}
		for len(ids) < r.o.maxPhones {
			ph, _, err := r.dial("/v2/client", phoneHeaders(server))
			if err != nil {
				t.Error(err)
				return
			}
			ph.text(`"hello"`)
			ids = append(ids, hear(opText))
		}
		for _, id := range ids {
			b.raw(plainFrame(id, frame))
		}
		b.frame(opPing, nil) // notices come before its answer
		hear(opPong)
	}
}
