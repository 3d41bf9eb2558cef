package main

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

func testMemory(limit int64) *bufferPool { return &bufferPool{budget: &budget{limit: limit}} }

// TestQueue holds a queue against a slice through any order of additions and
// removals.
func TestQueue(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(7, 8))
	source := make([]byte, 100<<10)
	for i := range source {
		source[i] = byte(random.Uint32())
	}
	part := func() []byte {
		n := random.IntN(1 + len(source)>>random.IntN(17))
		at := random.IntN(1 + len(source) - n)
		return source[at : at+n]
	}
	for range 40 {
		m := testMemory(1 << 30)
		var q queue
		var want []byte
		for range 100 {
			if random.IntN(2) == 0 {
				a, b, c := part(), part(), part()
				if !q.add(m, priorityPassing, a, b, c) {
					t.Fatal("nothing was added within the budget")
				}
				want = append(append(append(want, a...), b...), c...)
			} else {
				n := random.IntN(1 + q.n)
				q.discard(m, n)
				want = want[n:]
			}
			checkQueue(t, m, &q, want)
		}
		q.free(m)
		if q.n != 0 || q.head != nil || q.tail != nil || m.budget.used() != 0 {
			t.Fatalf("after drop %d bytes are queued and %d charged", q.n, m.budget.used())
		}
	}
}

func checkQueue(t *testing.T, m *bufferPool, q *queue, want []byte) {
	t.Helper()
	if q.n != len(want) {
		t.Fatalf("%d bytes queued, want %d", q.n, len(want))
	}
	var charged int64
	var got []byte
	for k := q.head; k != nil; k = k.next {
		charged += int64(len(k.b))
		got = append(got, k.bytes()...)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the queue does not hold what was added")
	}
	if m.budget.used() != charged {
		t.Fatalf("%d bytes are charged for blocks of %d", m.budget.used(), charged)
	}
	// As many views as there are, and never an empty one, which a write would
	// take for an end.
	var v [3][]byte
	var seen []byte
	for _, b := range v[:q.views(v[:])] {
		if len(b) == 0 {
			t.Fatal("an empty view")
		}
		seen = append(seen, b...)
	}
	if !bytes.HasPrefix(want, seen) || len(want) > 0 && len(seen) == 0 {
		t.Fatal("the views are not the front of the queue")
	}
}

// What does not fit leaves no trace; what is forced is charged all the same.
func TestQueueBudget(t *testing.T) {
	t.Parallel()
	m := testMemory(int64(bufferSizes[0]))
	var q queue
	if !q.add(m, priorityBinary, []byte("head"), nil, nil) {
		t.Fatal("the first block was refused")
	}
	if q.add(m, priorityBinary, make([]byte, bufferSizes[0]/2), make([]byte, bufferSizes[0]/2), nil) {
		t.Fatal("more than the budget was added")
	}
	checkQueue(t, m, &q, []byte("head"))
	if !q.add(m, priorityAlways, make([]byte, bufferSizes[0]), nil, nil) {
		t.Fatal("a forced addition was refused")
	}
	if m.budget.used() != 2*int64(bufferSizes[0]) {
		t.Errorf("%d bytes charged, want two of the smallest blocks", m.budget.used())
	}
	q.free(m)
	if m.budget.used() != 0 {
		t.Errorf("%d bytes charged after drop", m.budget.used())
	}
}

func TestQueueMoveTo(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ from, to string }{{"", ""}, {"a", ""}, {"", "b"}, {"a", "b"}} {
		m := testMemory(1 << 30)
		var from, to queue
		from.add(m, priorityPassing, []byte(c.from), nil, nil)
		to.add(m, priorityPassing, []byte(c.to), nil, nil)
		from.moveTo(&to)
		checkQueue(t, m, &to, []byte(c.to+c.from))
		if from != (queue{}) {
			t.Errorf("%q to %q: something is left behind", c.from, c.to)
		}
		to.add(m, priorityPassing, []byte("more"), nil, nil)
		checkQueue(t, m, &to, []byte(c.to+c.from+"more"))
		to.free(m)
	}
}

func TestBufferSizes(t *testing.T) {
	t.Parallel()
	m := testMemory(1 << 30)
	for _, c := range []struct{ need, capacity int }{
		{0, 1152}, {1, 1152}, {1152, 1152}, {1153, 4224}, {16 << 10, 16512}, {64<<10 + 128, 65664},
		{256 << 10, 262272}, {262273, 262273}, {1 << 20, 1 << 20},
	} {
		k := m.get(c.need, priorityPassing)
		if len(k.b) != c.capacity || m.budget.used() != int64(c.capacity) {
			t.Errorf("for %d bytes: a block of %d, %d charged, want %d", c.need, len(k.b), m.budget.used(), c.capacity)
		}
		m.put(k)
		if m.budget.used() != 0 {
			t.Errorf("for %d bytes: %d charged in the end", c.need, m.budget.used())
		}
	}
}

func TestBufferGrow(t *testing.T) {
	t.Parallel()
	m := testMemory(8 << 10)
	k := m.get(1, priorityPassing)
	k.w = copy(k.b, "discarded|kept")
	k.r = len("discarded|")
	if same := m.grow(k, len(k.b), priorityPassing); same != k {
		t.Error("a block with enough room was replaced")
	}
	if m.grow(k, 64<<10, priorityPassing) != nil || string(k.bytes()) != "kept" || m.budget.used() != int64(len(k.b)) {
		t.Error("a block that may not grow did not stay as it was")
	}
	k = m.grow(k, 4<<10, priorityPassing)
	if string(k.bytes()) != "kept" || len(k.b) < 4<<10 || m.budget.used() != int64(len(k.b)) {
		t.Errorf("grown to %d bytes with %q, %d charged", len(k.b), k.bytes(), m.budget.used())
	}
}

func TestBudget(t *testing.T) {
	t.Parallel()
	const limit, step = 1600, 307
	b := &budget{limit: limit}
	var held, most atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5000 {
				if !b.take(step, priorityPassing) {
					continue
				}
				now := held.Add(step)
				for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
				}
				held.Add(-step)
				b.give(step)
			}
		})
	}
	wg.Wait()
	if most.Load() > limit || b.used() != 0 {
		t.Fatalf("%d of %d bytes held at once, %d left in the end", most.Load(), limit, b.used())
	}
	if !b.take(limit, priorityBinary) || b.take(1, priorityBinary) {
		t.Fatal("the budget is not exactly its limit")
	}
	if !b.take(5, priorityAlways) || b.used() != limit+5 || b.take(1, priorityBinary) {
		t.Fatalf("%d bytes used after 5 that always fit", b.used())
	}
	b.give(limit + 5)
	if !b.take(limit*7/8, priorityBacklog) || b.take(1, priorityBacklog) {
		t.Fatal("a backlog does not have exactly seven eighths")
	}
	if !b.take(limit/16, priorityPassing) || b.take(1, priorityPassing) {
		t.Fatal("what passes to phones does not have exactly fifteen sixteenths")
	}
	if !b.take(limit/16, priorityBinary) || b.take(1, priorityBinary) {
		t.Fatal("the last sixteenth is not that of binaries")
	}
}
