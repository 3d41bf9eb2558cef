package main

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"weak"
)

// forcedCollections counts those that a trim causes.
func forcedCollections() uint32 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.NumForcedGC
}

// The tests of this file are not parallel: others collect garbage, too.

func TestTrimmerPlans(t *testing.T) {
	const grace = 30 * time.Second
	type step struct {
		after time.Duration // since the step before
		live  int           // noted, unless negative
		trims uint32        // so far
	}
	for _, c := range []struct {
		name  string
		steps []step
	}{
		{"a small wave is not worth it", []step{{0, trimFrom - 1, 0}, {0, 0, 0}, {time.Hour, -1, 0}}},
		{"a wave that stays", []step{{0, 1000, 0}, {0, 501, 0}, {time.Hour, -1, 0}}},
		{"after a wave, and after its grace", []step{
			{0, 1000, 0}, {0, 500, 0},
			{trimDelay - 1, -1, 0}, {1, -1, 1},
			{grace + trimDelay - 1, -1, 1}, {1, -1, 2},
			{time.Hour, -1, 2},
		}},
		{"the rest of a wave does not put it off", []step{
			{0, 1000, 0}, {0, 500, 0}, {trimDelay / 2, 400, 0}, {trimDelay / 2, 300, 1},
		}},
		{"a second wave in the first one's grace", []step{
			{0, 1000, 0}, {0, 400, 0}, {trimDelay, -1, 1},
			{time.Second, 1000, 1}, {0, 0, 1}, {trimDelay, -1, 2}, // in place of the one planned
			{grace + trimDelay - 1, -1, 2}, {1, -1, 3}, {time.Hour, -1, 3},
		}},
		{"waves that come and go cost one trim a second", []step{
			{0, 1000, 0}, {0, 0, 0}, {300 * time.Millisecond, 1000, 0}, {0, 0, 0}, {300 * time.Millisecond, 1000, 0}, {0, 0, 0},
			{400 * time.Millisecond, -1, 1},
		}},
		{"what is left counts from anew", []step{
			{0, 1000, 0}, {0, 500, 0}, {trimDelay, -1, 1}, {grace + trimDelay, -1, 2},
			{0, 251, 2}, {trimDelay, -1, 2}, {0, 250, 2}, {trimDelay, -1, 3},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := trimmer{grace: grace}
				defer m.stop()
				before := forcedCollections()
				for i, s := range c.steps {
					time.Sleep(s.after) // of the bubble's clock
					if s.live >= 0 {
						m.note(s.live)
					}
					synctest.Wait()
					if n := forcedCollections() - before; n != 2*s.trims { // two in each
						t.Fatalf("step %d: %d collections so far, want %d trims", i, n, s.trims)
					}
				}
			})
		})
	}
}

// stop leaves nothing behind, whatever was planned.
func TestTrimmerStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := trimmer{grace: time.Second}
		m.stop()
		m.note(1000)
		m.note(0)
		before := forcedCollections()
		m.stop()
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := forcedCollections() - before; n != 0 {
			t.Errorf("%d trims after stop", n)
		}
	})
}

var trimBallast [][]byte

// A trim gives what the wave has left back to the system.
func TestTrimmerGivesBack(t *testing.T) {
	const size = 64 << 20
	synctest.Test(t, func(t *testing.T) {
		m := trimmer{grace: time.Second}
		defer m.stop()
		m.note(1000)
		for range size >> 16 {
			trimBallast = append(trimBallast, make([]byte, 1<<16))
		}
		var full, trimmed runtime.MemStats
		runtime.ReadMemStats(&full)
		trimBallast = nil
		m.note(0)
		time.Sleep(trimDelay)
		synctest.Wait()
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
		m := trimmer{grace: time.Hour}
		defer m.stop()
		var pool sync.Pool
		kept := new([1 << 20]byte)
		pooled := weak.Make(kept)
		pool.Put(kept)
		m.note(1000)
		m.note(0)
		time.Sleep(trimDelay)
		synctest.Wait()
		if pooled.Value() != nil {
			t.Error("a pooled buffer outlived the trim")
		}
		runtime.KeepAlive(&pool)
	})
}
