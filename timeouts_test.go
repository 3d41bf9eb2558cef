package main

import (
	"fmt"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// How long the relay waits for whom, on a fake clock. A peer that is not read
// from here takes nothing at all: a pipe holds no bytes.

func TestHeartbeat(t *testing.T) {
	t.Parallel()
	for _, role := range []role{rolePhone, roleBinary} {
		t.Run(role.String(), func(t *testing.T) {
			t.Parallel()
			o := testOptions()
			o.messageTimeout = time.Hour
			onFakeClock(t, o, func(t *testing.T, r *testRelay) {
				ln := r.lane(role)
				// Every sign of life counts, a whole message or not.
				m := clientFrame(last, opText, ln.message("1"))
				for i, sign := range [][]byte{
					clientFrame(last, opPong, nil), clientFrame(last, opPong, []byte("other")), clientFrame(last, opPing, nil),
					m[:3], m[3:], clientFrame(more, opText, nil), clientFrame(last, opContinuation, ln.message("1")),
				} {
					ln.wantPing(i)
					ln.from.raw(sign)
					switch i {
					case 2:
						ln.from.wantPong(nil)
					case 4, 6:
						ln.wants("1")
					}
				}
				ln.wantPing(7)
				silent := time.Now()
				ln.from.wantClose(1011, "heartbeat timeout")
				wantAfter(t, "the end of a silent peer", silent, 30*time.Second)
				if role == rolePhone {
					ln.to.wantNotice(ln.connID, 1011)
				}
			})
		})
	}
}

// wantClose reads until the close frame, and does not answer it.
func (c *wsClient) wantClose(code int, reason string) {
	c.t.Helper()
	for {
		op, p, err := c.next()
		if err != nil {
			c.t.Fatalf("waiting for a close frame: %v", err)
		}
		if op == opClose {
			if got, _ := parseClose(p); int(got) != code || string(p[2:]) != reason {
				c.t.Errorf("closed %d %q, want %d %q", got, p[2:], code, reason)
			}
			return
		}
	}
}

// wantPing waits for the relay's next ping to the sender, and answers those to
// the other side, which come at the same pace.
func (l lane) wantPing(i int) {
	l.from.t.Helper()
	if op, p, err := l.from.next(); op != opPing || err != nil {
		l.from.t.Fatalf("%d: got opcode %d %q (%v), want a ping", i, op, p, err)
	}
	l.to.frame(opPong, nil)
}

func TestSilenceBetweenMessagesIsFine(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, ph, id := r.pair("idle")
		start := time.Now()
		for i := 0; time.Since(start) < time.Hour; i++ {
			for _, c := range []*wsClient{b, ph} {
				op, p, err := c.next()
				if op != opPing || err != nil {
					t.Fatalf("after %v: opcode %d %q (%v), want a ping", time.Since(start), op, p, err)
				}
				c.frame(opPong, p)
			}
		}
		if again := ph.greet(b); again != id {
			t.Errorf("the phone is %s, was %s", again, id)
		}
	})
}

func TestMessageDeadline(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.ping = time.Hour
	for _, role := range []role{rolePhone, roleBinary} {
		for _, tt := range []struct {
			name string
			cut  func(m []byte) [][]byte // one every five seconds
		}{
			{"one frame", func(m []byte) [][]byte {
				f := clientFrame(last, opText, m)
				return [][]byte{f[:1], f[1:2], f[2:4], f[4:5], f[5:6], f[6:7]}
			}},
			{"whole fragments", func(m []byte) [][]byte {
				next := clientFrame(more, opContinuation, m[1:2])
				return [][]byte{clientFrame(more, opText, m[:1]), next, next, next, next, next}
			}},
			{"whole pings between", func(m []byte) [][]byte {
				ping := clientFrame(last, opPing, nil)
				return [][]byte{clientFrame(more, opText, nil), ping, ping, ping, ping, ping}
			}},
		} {
			t.Run(role.String()+"/"+tt.name, func(t *testing.T) {
				t.Parallel()
				onFakeClock(t, o, func(t *testing.T, r *testRelay) {
					ln := r.lane(role)
					start := time.Now()
					for _, piece := range tt.cut(ln.message(`"unfinished"`)) {
						ln.from.raw(piece)
						time.Sleep(5 * time.Second)
					}
					ln.from.wantClose(1011, "message timeout")
					wantAfter(t, "the end of an unfinished message", start, 30*time.Second)
					if role == rolePhone {
						ln.to.wantNotice(ln.connID, 1011)
					}
				})
			})
		}
	}
}

// The deadline is that of each message: a stream in which one begins before the
// read that ends the other is never too late.
func TestMessageDeadlineStartsAnew(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.ping = time.Hour
	for _, role := range []role{rolePhone, roleBinary} {
		for _, op := range []byte{opText, opPing} {
			t.Run(fmt.Sprintf("%s/opcode %d", role, op), func(t *testing.T) {
				t.Parallel()
				onFakeClock(t, o, func(t *testing.T, r *testRelay) {
					ln := r.lane(role)
					payload := []byte("1")
					if op == opText {
						payload = ln.message("1")
					}
					f := clientFrame(last, op, payload)
					ln.from.raw(f[:3])
					for range 5 {
						time.Sleep(20 * time.Second)
						ln.from.raw(cat(f[3:], f[:3]))
						if op == opText {
							ln.wants("1")
						} else {
							ln.from.wantPong(payload)
						}
					}
				})
			})
		}
	}
}

// A peer that takes some bytes now and then, too few for its kernel to say so, is
// slow and not gone.
func TestWriteDeadlineOfASlowPeer(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, _, ph, s, bt := memPair(t, r.relay)
	tick := func(after time.Duration) {
		bt.now += int64(after)
		ph.checkTimeouts(bt)
		bt.flush()
	}
	s.full = true
	b.message(bt, opText, []byte(`{"conn_id":"phone-1","frame":`+numbered(0, 1000)+`}`))
	bt.flush()
	for i := range 5 {
		s.room = 10
		if tick(r.o.writeTimeout); !ph.is(connOpen) {
			t.Fatalf("closed after it had taken bytes %d times", i+1)
		}
	}
	if len(s.out) != 50 {
		t.Fatalf("the socket got %d bytes, want the 50 that it took", len(s.out))
	}
	if tick(r.o.writeTimeout); ph.is(connOpen) || ph.endReason != endWriteTimeout {
		t.Fatalf("a peer that takes nothing ended with %q, want %q", ph.endReason, endWriteTimeout)
	}
}

// A ping behind a backlog asks nothing: a peer on a slow line has its interval from
// when the ping is out.
func TestHeartbeatBehindABacklog(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, _, ph, s, bt := memPair(t, r.relay)
	const chunk = 10
	s.full = true
	b.message(bt, opText, []byte(`{"conn_id":"phone-1","frame":`+numbered(0, 1000)+`}`))
	bt.flush()
	pass := func(d time.Duration) {
		for ; d > 0 && ph.is(connOpen); d -= time.Second {
			s.room = chunk
			bt.now += int64(time.Second)
			ph.writable(bt)
			ph.checkTimeouts(bt)
			bt.flush()
		}
	}
	pass(3 * r.o.ping)
	if !ph.is(connOpen) || ph.out.n == 0 {
		t.Fatalf("ended with %q behind a backlog of %d bytes", ph.endReason, ph.out.n)
	}
	s.full = false
	pass(r.o.ping)
	if !ph.pinged || !ph.is(connOpen) {
		t.Fatalf("pinged: %v, ended with %q less than an interval after the ping was out", ph.pinged, ph.endReason)
	}
	pass(2 * time.Second)
	if ph.is(connOpen) || ph.endReason != endHeartbeat {
		t.Fatalf("a peer that was pinged and stayed silent ended with %q, want %q", ph.endReason, endHeartbeat)
	}
}

// While a peer takes nothing only its latest ping is answered (RFC 6455 §5.5.3).
func TestLatestPingIsAnswered(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	_, _, ph, s, bt := memPair(t, r.relay)
	pings := func(payloads ...string) {
		for _, p := range payloads {
			ph.receive(bt, clientFrame(last, opPing, []byte(p)))
		}
		bt.flush()
	}
	s.full, s.room = true, 1
	pings("first")
	held := ph.out.n
	for range 1000 {
		pings("second", "")
	}
	if ph.out.n != held {
		t.Errorf("%d bytes are queued for a peer that takes nothing, want %d", ph.out.n, held)
	}
	s.full = false
	ph.writable(bt)
	pings("last", "of all")
	want := []memFrame{{opPong, "first"}, {opPong, ""}, {opPong, "last"}, {opPong, "of all"}}
	if got := s.frames(t); !slices.Equal(got, want) {
		t.Errorf("the peer got %q, want %q", got, want)
	}
}

func TestWriteDeadline(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.ping = time.Hour
	t.Run("phone", func(t *testing.T) {
		t.Parallel()
		onFakeClock(t, o, func(t *testing.T, r *testRelay) {
			b, ph, id := r.pair("frozen")
			start := time.Now()
			for i := range 100 {
				b.send(id, numbered(i, 32<<10))
			}
			b.wantNotice(id, 1011)
			wantAfter(t, "the end of a phone that takes nothing", start, 10*time.Second)
			ph.wantEnd(1011, "write timeout")
		})
	})
	t.Run("binary", func(t *testing.T) {
		t.Parallel()
		onFakeClock(t, o, func(t *testing.T, r *testRelay) {
			b, ph, id := r.pair("frozen")
			sent := make(chan error, 1)
			start := time.Now()
			go func() {
				var err error
				for i := 0; i < 100 && err == nil; i++ {
					_, err = ph.nc.Write(clientFrame(last, opText, []byte(numbered(i, 32<<10))))
				}
				sent <- err
			}()
			eventually(t, "the claim is in grace", func() bool { return !(r.holder("frozen") != nil) })
			wantAfter(t, "the end of a binary that takes nothing", start, 10*time.Second)
			for i := 0; ; i++ {
				op, p, err := b.next()
				if op == opClose {
					if code, _ := parseClose(p); code != 1011 || string(p[2:]) != "write timeout" {
						t.Errorf("closed %d %q, want 1011 write timeout", code, p[2:])
					}
					break
				}
				if want := fmt.Sprintf(`{"conn_id":%q,"frame":%s}`, id, numbered(i, 32<<10)); string(p) != want || err != nil {
					t.Fatalf("got %.80q (%v), want frame %d", p, err, i)
				}
			}
			ph.wantEnd(4404, "binary gone") // it sent, and its frame could not be kept
			<-sent
		})
	})
	t.Run("a phone that takes a little now and then", func(t *testing.T) {
		t.Parallel()
		onFakeClock(t, o, func(t *testing.T, r *testRelay) {
			b, ph, id := r.pair("slow")
			for i := range 40 {
				b.send(id, numbered(i, 64<<10))
			}
			for i := range 40 {
				time.Sleep(4 * time.Second)
				if got := numberOf(ph.message()); got != i {
					t.Fatalf("frame %d arrived, want %d", got, i)
				}
			}
		})
	})
}

func TestCloseHandshakeDeadline(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		answer func(ph *wsClient)
		want   time.Duration
	}{
		{"no answer", func(*wsClient) {}, 5 * time.Second},
		{"talk instead of an answer", func(ph *wsClient) { ph.text("1"); ph.frame(opPing, nil) }, 5 * time.Second},
		{"answer", func(ph *wsClient) { ph.close(4401, "") }, 0},
		{"another code as answer", func(ph *wsClient) { ph.close(1000, "") }, 0},
		{"violation as answer", func(ph *wsClient) { ph.raw([]byte{0xff, 0}) }, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
				b, ph, id := r.pair("bye")
				b.text(fmt.Sprintf(`{"conn_id":%q,"close_code":4401}`, id))
				if op, _, err := ph.next(); op != opClose || err != nil {
					t.Fatalf("opcode %d (%v), want a close frame", op, err)
				}
				start := time.Now()
				tt.answer(ph)
				if op, p, err := ph.next(); err == nil {
					t.Errorf("opcode %d %q behind the close frame", op, p)
				}
				wantAfter(t, "the end of tcp", start, tt.want)
				r.sound()
			})
		})
	}
}

// The relay clock goes on while somebody looks at it, and does not count the time
// in which nobody could.
func TestClockLeavesStallsOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := clock{start: time.Now()}
		start, _ := c.read()
		for _, step := range []struct {
			name       string
			pass, want time.Duration // since the start
		}{
			{"a look", mostLate, mostLate},
			{"a late look", stallFrom - 1, mostLate + stallFrom - 1},
			{"a stall", 70 * time.Second, mostLate + stallFrom - 1},
			{"and on", mostLate, 2*mostLate + stallFrom - 1},
			{"another stall", time.Hour, 2*mostLate + stallFrom - 1},
			{"and on", 1, 2*mostLate + stallFrom},
		} {
			time.Sleep(step.pass)
			now, _ := c.read()
			if got := time.Duration(now - start); got != step.want {
				t.Errorf("%s: %v since the start, want %v", step.name, got, step.want)
			}
		}
	})
}

// A relay that stood still for longer than a deadline ends nobody: what its peers
// sent meanwhile is there.
func TestStallEndsNobody(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("signals have other numbers")
	}
	const stop, goOn = syscall.Signal(19), syscall.Signal(18) // SIGSTOP and SIGCONT, which not every system's package has
	const ping = 4 * time.Second
	p := startProgram(t, nil, "-ping", ping.String(), "-rate-per-minute", "0", "-max-phones", "200").listening()
	clients := []*wsClient{p.connect("/v2/server", binaryHeaders("stall"))}
	for len(clients) < 200 { // more than a loop reads before it looks at deadlines
		clients = append(clients, p.connect("/v2/client", phoneHeaders("stall")))
	}
	wantPings := func() {
		for i, c := range clients {
			if op, b, err := c.next(); op != opPing || err != nil {
				t.Fatalf("client %d: opcode %d %q, %v, want a ping", i, op, b, err)
			}
		}
	}
	wantPings()
	p.signal(stop)
	for _, c := range clients {
		c.frame(opPong, nil)
	}
	time.Sleep(ping + time.Second) // for once it is real time that has to pass
	p.signal(goOn)
	wantPings()
	p.said("the relay stood still")
}
