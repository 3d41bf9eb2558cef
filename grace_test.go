package main

import (
	"container/list"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// Each grace ends when its own time is over, to the nanosecond, and those that
// were cancelled do not. They end one after the other: ended has no lock.
func TestGraces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var ended []string
		s := graces{length: time.Minute, most: 1000, now: func() int64 { return int64(time.Since(start)) }}
		s.expire = func(el *list.Element) {
			ended = append(ended, fmt.Sprint(el.Value.(*grace).e.id, " at ", time.Since(start)))
		}
		begin := func(id string) *list.Element { return s.begin(&server{id: id}) }
		first := begin("first")
		begin("second")
		time.Sleep(20 * time.Second)
		third := begin("third")
		time.Sleep(10 * time.Second)
		begin("fourth")
		s.cancel(first) // the timer is set for it
		s.cancel(third)
		s.cancel(third)
		time.Sleep(10 * time.Minute)
		begin("fifth")
		time.Sleep(time.Minute)
		synctest.Wait()
		want := []string{"second at 1m0s", "fourth at 1m30s", "fifth at 11m30s"}
		if !slices.Equal(ended, want) {
			t.Errorf("got %q, want %q", ended, want)
		}
		ended = nil
		for range 1000 {
			begin("many")
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(ended) != 1000 {
			t.Errorf("%d of 1000 ended", len(ended))
		}
		ended = nil
		at := time.Since(start)
		for range 1003 { // three are too many, and end early
			begin("many")
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		want = slices.Concat(slices.Repeat([]string{fmt.Sprint("many at ", at)}, 3),
			slices.Repeat([]string{fmt.Sprint("many at ", at+time.Minute)}, 1000))
		if !slices.Equal(ended, want) {
			t.Errorf("of %d graces %d ended, want 3 at once: %q …", len(want), len(ended), ended[:min(5, len(ended))])
		}
		s.cancel(begin("last"))
		s.stop()
	})
}

// However many server-ids come and go, few graces run: the oldest ends early, for
// its phones too.
func TestGracesAreBounded(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.maxConnections = 3
	most := gracesPerConnection * o.maxConnections
	onFakeClock(t, o, func(t *testing.T, r *testRelay) {
		b, ph, _ := r.pair("oldest")
		start := time.Now()
		r.leaves(b)
		for i := range most {
			if _, held := r.registry.servers.Load("oldest"); !held {
				t.Fatalf("the oldest grace ended when there were %d, limit %d", i+1, most)
			}
			r.leaves(r.binary(fmt.Sprint("id-", i)))
			eventually(t, "the grace that is too many is over", func() bool {
				return r.metrics.binariesInGrace.Load() <= int64(most) && r.count(roleBinary) == 0
			})
		}
		ph.wantEnd(4404, "grace expired")
		wantAfter(t, "the end of the oldest grace", start, 0)
		if n := r.metrics.binariesInGrace.Load(); n != int64(most) {
			t.Errorf("%d graces run, want %d", n, most)
		}
	})
}
