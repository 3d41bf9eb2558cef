package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

// Shutdown: phones, then binaries, all told, and nothing left behind.

// drained drains r within d, and leaves nothing for the end of the test to do.
func (r *testRelay) drained(d time.Duration) {
	r.once.Do(func() {
		r.beginDrain()
		r.srv.Close()
		ctx, cancel := context.WithTimeout(context.Background(), d)
		defer cancel()
		r.drain(ctx)
	})
}

const drainPairs = 100

func TestDrain(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		var peers sync.WaitGroup
		for i := range drainPairs {
			b, ph, id := r.pair(fmt.Sprint("id-", i))
			peers.Go(func() {
				code, reason, err := endOf(ph)
				if code != 1001 || reason != "shutting down" || err != nil {
					t.Errorf("a phone ended with %d %q (%v)", code, reason, err)
				}
			})
			peers.Go(func() {
				// Its phone is gone first.
				op, p, err := b.next()
				if want := fmt.Sprintf(`{"conn_id":%q,"close_code":1001}`, id); op != opText || string(p) != want || err != nil {
					t.Errorf("a binary got opcode %d %q (%v), want %s", op, p, err, want)
				}
				code, reason, err := endOf(b)
				if code != 1001 || reason != "shutting down" || err != nil {
					t.Errorf("a binary ended with %d %q (%v)", code, reason, err)
				}
			})
		}
		r.drained(patience)
		peers.Wait()
		if _, _, err := r.dial("/v2/client", phoneHeaders("id-0")); err == nil {
			t.Error("somebody still listens")
		}
		for role := range roleCount {
			if n := r.count(role); n != 0 {
				t.Errorf("%d connections of the %s leg are left", n, role)
			}
			if n := r.metrics.closes[role][endShutdown].Load(); n != drainPairs {
				t.Errorf("%d ends of the %s leg, want %d", n, role, drainPairs)
			}
		}
	})
}

// endOf reads until the close frame, answers it and reads until the end of TCP.
func endOf(c *wsClient) (code uint16, reason string, err error) {
	for {
		op, p, err := c.next()
		if err != nil {
			return 0, "", err
		}
		if op != opClose {
			continue
		}
		code, _ = parseClose(p)
		if _, err := c.nc.Write(clientFrame(last, opClose, p)); err != nil {
			return code, string(p[2:]), err
		}
		if op, p, err := c.next(); err == nil {
			return code, reason, fmt.Errorf("opcode %d %q behind the close handshake", op, p)
		}
		return code, string(p[2:]), nil
	}
}

// Peers that never answer cost the deadline, and neither leg its word.
func TestDrainMeetsItsDeadline(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		type ending struct {
			l    role
			code uint16
			at   time.Time
		}
		var mu sync.Mutex
		var order []ending
		var peers sync.WaitGroup
		watch := func(role role, c *wsClient) {
			peers.Go(func() {
				for {
					op, p, err := c.next()
					if err != nil {
						return
					}
					if op == opClose {
						code, _ := parseClose(p)
						mu.Lock()
						order = append(order, ending{role, code, time.Now()})
						mu.Unlock()
					}
				}
			})
		}
		for i := range drainPairs {
			b, ph, _ := r.pair(fmt.Sprint("id-", i))
			watch(roleBinary, b)
			watch(rolePhone, ph)
		}
		start := time.Now()
		r.drained(10 * time.Second)
		if took := time.Since(start); took > 10*time.Second+time.Second/2 {
			t.Errorf("the drain took %v", took)
		}
		peers.Wait()
		if len(order) != 2*drainPairs {
			t.Fatalf("%d peers got a close frame, want all %d", len(order), 2*drainPairs)
		}
		slices.SortStableFunc(order, func(a, b ending) int { return a.at.Compare(b.at) })
		for i, e := range order {
			if want := []role{rolePhone, roleBinary}[i/drainPairs]; e.l != want || e.code != 1001 {
				t.Fatalf("end %d is that of a %s with %d", i, e.l, e.code)
			}
		}
	})
}

// Peers that take nothing at all are cut off.
func TestDrainOfFrozenPeers(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		for i := range 10 {
			b, _, id := r.pair(fmt.Sprint("id-", i))
			for k := range 10 {
				b.send(id, numbered(k, 32<<10))
			}
		}
		start := time.Now()
		r.drained(10 * time.Second)
		if took := time.Since(start); took > 10*time.Second+time.Second/2 {
			t.Errorf("the drain took %v", took)
		}
		if n := r.count(rolePhone) + r.count(roleBinary); n != 0 {
			t.Errorf("%d connections are left", n)
		}
	})
}

// Grace does not hold a drain up.
func TestDrainInGrace(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, idle, _ := r.pair("id")
		r.leaves(b)
		joiner := r.joins("id")
		joiner.text(`"held"`)
		var peers sync.WaitGroup
		for _, ph := range []*wsClient{idle, joiner} {
			peers.Go(func() {
				if code, reason, err := endOf(ph); code != 1001 || reason != "shutting down" || err != nil {
					t.Errorf("a phone ended with %d %q (%v)", code, reason, err)
				}
			})
		}
		r.drained(patience)
		peers.Wait()
		if n := r.metrics.binariesInGrace.Load(); n != 0 {
			t.Errorf("%d binaries in grace", n)
		}
	})
}

// A newcomer that waits for an incumbent's answer is told at once.
func TestDrainDuringAChallenge(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.challengeTimeout = time.Hour
	onEach(t, o, func(t *testing.T, r *testRelay) {
		b := r.binary("id")
		newcomer := r.rival("id")
		b.wantPing()
		var peers sync.WaitGroup
		for _, c := range []*wsClient{b, newcomer} {
			peers.Go(func() {
				if code, reason, err := endOf(c); code != 1001 || reason != "shutting down" || err != nil {
					t.Errorf("a binary ended with %d %q (%v)", code, reason, err)
				}
			})
		}
		r.drained(patience)
		peers.Wait()
	})
}
