package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// Each grace ends when its own time is over, and one whose claim is taken does not.
func TestRegistryGracesEndInOrder(t *testing.T) {
	t.Parallel()
	onFakeClock(t, testOptions(), func(t *testing.T, r *testRelay) {
		w := r.newBatch()
		start := r.age()
		held := map[string]*session{}
		come := func(id string) { held[id], _ = memBinary(t, r.relay, id) }
		leave := func(id string) {
			w.now = r.now()
			held[id].release(w)
			w.flush()
		}
		for _, id := range []string{"1st", "2nd", "3rd", "4th"} {
			come(id)
		}
		for _, step := range []struct {
			at   time.Duration
			do   func()
			want string // the server-ids that are known a sweep later
		}{
			{0, func() { leave("1st"); leave("2nd") }, "1st 2nd 3rd 4th"},
			{10 * time.Second, func() { leave("3rd"); come("1st") }, "1st 2nd 3rd 4th"},
			{15 * time.Second, func() { leave("4th"); come("3rd"); leave("3rd") }, "1st 2nd 3rd 4th"},
			{29 * time.Second, func() {}, "1st 2nd 3rd 4th"},
			{30 * time.Second, func() { leave("1st") }, "1st 3rd 4th"},
			{44 * time.Second, func() {}, "1st 3rd 4th"},
			{45 * time.Second, func() {}, "1st"},
			{59 * time.Second, func() {}, "1st"},
			{60 * time.Second, func() {}, ""},
		} {
			time.Sleep(start + step.at - r.age())
			step.do()
			time.Sleep(mostLate + time.Millisecond)
			var ids []string
			r.registry.each(func(srv *server) { ids = append(ids, srv.id) })
			slices.Sort(ids)
			if got := strings.Join(ids, " "); got != step.want {
				t.Errorf("after %v: %q are known, want %q", step.at, got, step.want)
			}
		}
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
			b := r.binary(fmt.Sprint("id-", i))
			b.close(1000, "")
			b.wantEnd(1000, "")
			eventually(t, "its connection is gone", func() bool { return r.count(roleBinary) == 0 })
		}
		ph.wantEnd(4404, "grace expired")
		wantAfter(t, "the end of the oldest grace", start, 0)
		if n := r.metrics.binariesInGrace.Load(); n != int64(most) {
			t.Errorf("%d graces run, want %d", n, most)
		}
	})
}
