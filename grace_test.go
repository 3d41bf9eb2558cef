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
		s := graces{length: time.Minute, now: func() int64 { return int64(time.Since(start)) }}
		s.expire = func(el *list.Element) {
			ended = append(ended, fmt.Sprint(el.Value.(*grace).e.id, " at ", time.Since(start)))
		}
		begin := func(id string) *list.Element { return s.begin(&entry{id: id}) }
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
		s.cancel(begin("last"))
		s.stop()
	})
}
