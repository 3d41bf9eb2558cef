package main

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"
)

func TestTrimmerDue(t *testing.T) {
	t.Parallel()
	const few, many = trimFrom - 1, 4 * trimFrom
	type look struct {
		held int64
		trim bool
	}
	for _, c := range []struct {
		name  string
		looks []look
	}{
		{"a small wave is not worth it", []look{{few, false}, {0, false}, {0, false}}},
		{"a wave that stays", []look{{many, false}, {many/2 + 1, false}, {many, false}}},
		{"once for each half of a wave", []look{{many, false}, {many / 2, true}, {many / 2, false}, {many / 4, true}, {0, true}, {0, false}}},
		{"all at once", []look{{many, false}, {0, true}, {0, false}}},
		{"what is left counts from anew", []look{{many, false}, {many / 2, true}, {many/4 + 1, false}, {many, false}, {many/2 + 1, false}, {many / 2, true}}},
	} {
		var r relay
		for i, l := range c.looks {
			if got := r.halved(l.held); got != l.trim {
				t.Errorf("%s: look %d: trim is %v, want %v", c.name, i, got, l.trim)
			}
		}
	}
}

// What a wave is measured by: sessions, what net/http serves, and buffers.
func TestHeld(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.grace = 0
	r := startRelay(t, o)
	for _, c := range []struct {
		name string
		come func() (leave func())
		want int64
	}{
		{"a session", func() func() {
			b := r.binary("held")
			return func() { b.nc.Close() }
		}, sessionCost},
		{"a grace", func() func() {
			r.metrics.binariesInGrace.Add(1)
			return func() { r.metrics.binariesInGrace.Add(-1) }
		}, graceCost},
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

// The sweep gives what a wave has left back to the system, what it has left in pools
// too. The test is not parallel: others collect garbage, too.
func TestSweepGivesMemoryBack(t *testing.T) {
	const size = 64 << 20
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		var pool sync.Pool
		kept := new([1 << 20]byte)
		pooled := weak.Make(kept)
		for range size >> 16 {
			trimBallast = append(trimBallast, make([]byte, 1<<16))
		}
		r.requests.Add(trimFrom / requestCost)
		time.Sleep(2 * mostLate)
		synctest.Wait()
		var full, trimmed runtime.MemStats
		runtime.ReadMemStats(&full)
		trimBallast = nil
		pool.Put(kept)
		kept = nil
		r.requests.Store(0)
		time.Sleep(2 * mostLate)
		synctest.Wait()
		runtime.ReadMemStats(&trimmed)
		ours := func(s *runtime.MemStats) uint64 { return s.HeapSys - s.HeapReleased }
		if ours(&full) < size || ours(&trimmed) > ours(&full)-size*9/10 {
			t.Errorf("held %d KiB of the system's memory, and %d KiB of it after a trim of %d KiB", ours(&full)>>10, ours(&trimmed)>>10, size>>10)
		}
		if pooled.Value() != nil {
			t.Error("a pooled buffer outlived the trim")
		}
		if n := trimmed.NumForcedGC - full.NumForcedGC; n < 1 || n > 2 {
			t.Errorf("%d collections for one wave", n)
		}
		runtime.KeepAlive(&pool)
	})
}
