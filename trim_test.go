package main

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"
)

func TestTrimmerPlans(t *testing.T) {
	t.Parallel()
	const grace, few, many = 30 * time.Second, trimFrom - 1, 4 * trimFrom
	type step struct {
		after time.Duration // since the step before
		held  int64
		trim  bool
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"a small wave is not worth it", []step{{0, few, false}, {0, 0, false}, {time.Hour, 0, false}}},
		{"a wave that stays", []step{{0, many, false}, {0, many/2 + 1, false}, {time.Hour, many/2 + 1, false}}},
		{"after a wave, and after its grace", []step{
			{0, many, false}, {0, many / 2, false},
			{trimLook - 1, 0, false}, {1, 0, true},
			{grace + trimLook - 1, 0, false}, {1, 0, true},
			{time.Hour, 0, false},
		}},
		{"the rest of a wave does not put it off", []step{
			{0, many, false}, {0, many / 2, false}, {trimLook / 2, many / 3, false}, {trimLook / 2, many / 4, true},
		}},
		{"a second wave in the first one's grace", []step{
			{0, many, false}, {0, few, false}, {trimLook, few, true},
			{trimLook, many, false}, {0, 0, false}, {trimLook, 0, true}, // in place of the one planned
			{grace + trimLook - 1, 0, false}, {1, 0, true}, {time.Hour, 0, false},
		}},
		{"waves that come and go", []step{
			{0, many, false}, {0, 0, false}, {trimLook / 3, many, false}, {0, 0, false}, {trimLook / 3, many, false}, {0, 0, false},
			{trimLook/3 + 1, 0, true},
		}},
		{"what is left counts from anew", []step{
			{0, many, false}, {0, many / 2, false}, {trimLook, many / 2, true}, {grace + trimLook, many / 2, true},
			{0, many/4 + 1, false}, {trimLook, many/4 + 1, false}, {0, many / 4, false}, {trimLook, many / 4, true},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := trimmer{grace: grace}
			now := time.Unix(1, 0)
			for i, s := range c.steps {
				now = now.Add(s.after)
				if got := m.due(now, s.held); got != s.trim {
					t.Fatalf("step %d: trim is %v, want %v", i, got, s.trim)
				}
			}
		})
	}
}

// What a wave is measured by: sessions, what net/http serves, and buffers.
func TestHeld(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	for _, c := range []struct {
		name string
		come func() (leave func())
		want int64
	}{
		{"a session", func() func() {
			b := r.binary("held")
			return func() { b.nc.Close() }
		}, sessionCost},
		{"a request", func() func() {
			r.requests.Add(1)
			return func() { r.requests.Add(-1) }
		}, requestCost},
		{"a stream's buffers", func() func() {
			r.buffers.budget.take(dailyBuffers, priorityPassing)
			return func() { r.buffers.budget.give(dailyBuffers) }
		}, 0},
		{"a wave of buffers", func() func() {
			r.buffers.budget.take(2*dailyBuffers, priorityPassing)
			return func() { r.buffers.budget.give(2 * dailyBuffers) }
		}, dailyBuffers},
	} {
		leave := c.come()
		eventually(t, c.name, func() bool { return r.held() == c.want })
		leave()
		eventually(t, c.name+" is gone", func() bool { return r.held() == 0 })
	}
}

var trimBallast [][]byte // on the heap, whatever the compiler finds out

// trimAfter lets a wave of connections go, together with what it holds, and
// returns after the first trim. The tests that use it are not parallel: others
// collect garbage, too.
func trimAfter(leave func()) {
	var m trimmer
	var held atomic.Int64
	held.Store(trimFrom)
	m.start(time.Hour, held.Load)
	defer m.stop()
	time.Sleep(trimLook)
	synctest.Wait()
	held.Store(0)
	leave()
	time.Sleep(2 * trimLook)
	synctest.Wait()
}

// stop leaves nothing behind, though a trim is planned.
func TestTrimmerStops(t *testing.T) {
	forced := func() uint32 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.NumForcedGC
	}
	synctest.Test(t, func(t *testing.T) {
		trimAfter(func() {}) // the next one is an hour away
		before := forced()
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if n := forced() - before; n != 0 {
			t.Errorf("%d trims after stop", n)
		}
	})
}

// A trim gives what the wave has left back to the system.
func TestTrimmerGivesBack(t *testing.T) {
	const size = 64 << 20
	synctest.Test(t, func(t *testing.T) {
		for range size >> 16 {
			trimBallast = append(trimBallast, make([]byte, 1<<16))
		}
		var full, trimmed runtime.MemStats
		runtime.ReadMemStats(&full)
		trimAfter(func() { trimBallast = nil })
		runtime.ReadMemStats(&trimmed)
		ours := func(s *runtime.MemStats) uint64 { return s.HeapSys - s.HeapReleased }
		if ours(&full) < size || ours(&trimmed) > ours(&full)-size*9/10 {
			t.Errorf("held %d KiB of the system's memory, and %d KiB of it after a trim of %d KiB", ours(&full)>>10, ours(&trimmed)>>10, size>>10)
		}
	})
}

// Buffers that the wave has left in pools are given back with the first trim.
func TestTrimmerEmptiesPools(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var pool sync.Pool
		kept := new([1 << 20]byte)
		pooled := weak.Make(kept)
		trimAfter(func() { pool.Put(kept) })
		if pooled.Value() != nil {
			t.Error("a pooled buffer outlived the trim")
		}
		runtime.KeepAlive(&pool)
	})
}
