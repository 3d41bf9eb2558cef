package main

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The stress run: dozens of daemons and hundreds of phones do to the relay what
// peers do, all at once, and every one of them knows what has to come of it. It
// has a process of its own, in which nobody else opens files or goroutines.

const (
	stressServers = 24
	stressPhones  = 10 // for each server
)

// TestStress takes PYRYCODE_STRESS_SECONDS for all its worlds together; the
// order of things follows from PYRYCODE_STRESS_SEED, as far as the scheduler lets it.
func TestStress(t *testing.T) {
	if os.Getenv("PYRYCODE_STRESS_CHILD") == "" {
		t.Parallel()
		c := exec.Command(os.Args[0], "-test.run=^TestStress$", "-test.v")
		c.Env = append(os.Environ(), "PYRYCODE_STRESS_CHILD=1")
		out, err := c.CombinedOutput()
		if t.Logf("%s", out); err != nil {
			t.Error(err)
		}
		return
	}
	number := func(name string, otherwise uint64) uint64 {
		if v := os.Getenv(name); v != "" {
			n, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			return n
		}
		return otherwise
	}
	seed := number("PYRYCODE_STRESS_SEED", uint64(time.Now().UnixNano()))
	seconds := number("PYRYCODE_STRESS_SECONDS", 2)
	t.Logf("PYRYCODE_STRESS_SEED=%d", seed)
	for _, limits := range []string{"generous", "tiny"} {
		for _, poller := range slices.Sorted(maps.Keys(listeners)) {
			t.Run(limits+"/"+poller, func(t *testing.T) {
				stress(t, limits == "tiny", stressListener(poller), seed, time.Duration(seconds)*time.Second/4)
			})
		}
	}
}

// stressListener listens with send buffers that a peer's silence fills soon,
// where the system lets it.
func stressListener(poller string) func(testing.TB) net.Listener {
	return func(t testing.TB) net.Listener {
		ln, err := (&net.ListenConfig{Control: smallBuffers}).Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if poller == "goroutines" {
			return plainListener{ln}
		}
		return ln
	}
}

// smallBuffers is set where it is known how.
var smallBuffers func(network, address string, c syscall.RawConn) error

// stressOptions: what is tiny is reached all the time.
func stressOptions(tiny bool) options {
	o := testOptions()
	o.queue = 256 << 10
	// Nobody who is well runs into a timeout, however busy the machine is.
	o.ping, o.grace, o.challengeTimeout = 3*patience, 3*patience, 3*patience
	o.writeTimeout, o.closeTimeout = 3*patience, 3*patience
	if tiny {
		o.maxFrame, o.queue, o.queueTotal = 32<<10, 8<<10, 384<<10
		o.maxPhones, o.maxConnections = 3, stressServers*stressPhones/2
		o.ping, o.messageTimeout, o.writeTimeout = time.Second, 500*time.Millisecond, 500*time.Millisecond
		o.closeTimeout = 300 * time.Millisecond
		o.grace, o.challengeTimeout = 200*time.Millisecond, 100*time.Millisecond
	}
	return o
}

// stressWorld is one relay with all that happens to it.
type stressWorld struct {
	t       *testing.T
	r       *testRelay
	o       options
	tiny    bool // limits are reached, so that nobody's end is certain
	servers []*stressServer

	enough  chan struct{} // phones come no more
	ending  atomic.Bool   // the relay drains
	fails   atomic.Int64
	serial  atomic.Int64
	full    atomic.Int64 // upgrades refused by -max-connections
	crowded atomic.Int64 // phones refused by -max-phones
	proven  sync.Map     // plan → *atomic.Int64: phones that came to exactly the end planned

	// Of what was sent to be dropped, what is sure to have arrived and all.
	badSure, badAll [dropReasonCount]atomic.Int64
}

func (w *stressWorld) fail(format string, args ...any) {
	if w.fails.Add(1) <= 20 {
		w.t.Errorf(format, args...)
	}
}

// until is eventually for actors: it reports, and they go on.
func (w *stressWorld) until(what string, cond func() bool) bool {
	for end := time.Now().Add(3 * patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			w.fail("%s: not within %v", what, 3*patience)
			return false
		}
	}
	return true
}

func stress(t *testing.T, tiny bool, listen func(testing.TB) net.Listener, seed uint64, d time.Duration) {
	ln := listen(t)
	filesBefore, _ := openFiles()
	goroutinesBefore := runtime.NumGoroutine()
	w := &stressWorld{t: t, o: stressOptions(tiny), tiny: tiny, enough: make(chan struct{})}
	w.r = startRelayOn(t, w.o, ln)
	var daemons, phones sync.WaitGroup
	quit := make(chan struct{})
	for i := range stressServers {
		s := &stressServer{w: w, id: fmt.Sprintf("home-%d", i), shaken: 1,
			byConn: map[string]*stressPeer{}, byName: map[string]*stressPeer{}, silent: map[int]int{}}
		w.servers = append(w.servers, s)
		daemons.Go(func() { s.run(rand.New(rand.NewPCG(seed, uint64(i))), quit) })
		for k := range stressPhones {
			phones.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(1000*(i+1)+k)))
				plan := (i*stressPhones + k) % len(stressPlans)
				for w.running() {
					newStressPhone(s, rng).live(stressPlans[plan])
					plan = rng.IntN(len(stressPlans))
				}
			})
		}
	}
	time.AfterFunc(d, func() { close(w.enough) })
	<-w.enough
	if tiny { // the relay ends with all of them there
		w.ending.Store(true)
		w.r.stop()
	}
	phones.Wait()
	close(quit)
	daemons.Wait()
	w.r.stop()
	w.reckon()
	eventually(t, "every file is closed", func() bool {
		n, _ := openFiles()
		return n <= filesBefore
	})
	for end := time.Now().Add(patience); runtime.NumGoroutine() > goroutinesBefore; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			b := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), goroutinesBefore, b[:runtime.Stack(b, true)])
		}
	}
}

func (w *stressWorld) running() bool {
	select {
	case <-w.enough:
		return false
	default:
		return true
	}
}

// reckon holds the relay's books, which are closed, against the actors'.
func (w *stressWorld) reckon() {
	m := w.r.metrics
	for name, n := range map[string]int64{
		"connected binaries": m.connectedBinaries.Load(), "binaries in grace": m.binariesInGrace.Load(),
		"connected phones": m.connectedPhones.Load(), "queued bytes": m.budget.used(), "connections": w.r.limits.current.Load(),
	} {
		if n != 0 {
			w.t.Errorf("%s: %d are left", name, n)
		}
	}
	w.r.registry.servers.Range(func(id, _ any) bool {
		w.t.Errorf("entry %v is left", id)
		return true
	})
	for role := range roleCount {
		ends := int64(0)
		for reason := range closeReasonCount {
			ends += m.closes[role][reason].Load()
		}
		if begun := m.upgrades[role][upgradeAccepted].Load(); ends != begun {
			w.t.Errorf("%s: %d connections began and %d ended", role, begun, ends)
		}
		if n := m.closes[role][endInternal].Load(); n != 0 {
			w.t.Errorf("%s: %d ended with %q", role, n, endInternal)
		}
	}
	for reason := range dropReasonCount {
		n, sure, all := m.drops[reason].Load(), w.badSure[reason].Load(), w.badAll[reason].Load()
		if n < sure || n > all && reason != dropUnknownConn { // phones leave while frames for them are on their way
			w.t.Errorf("%d envelopes dropped for %q, want %d to %d", n, reason, sure, all)
		}
	}
	many := m.upgrades[rolePhone][upgradeAccepted].Load() > 40*int64(len(stressPlans))
	var counts []string
	for _, p := range stressPlans {
		n := w.proofs(p.name).Load()
		counts = append(counts, fmt.Sprintf("%s %d", p.name, n))
		// In a tiny world, or where few phones came, some may never come to it.
		if n == 0 && !w.tiny && many {
			w.t.Errorf("no phone came to the end of plan %q", p.name)
		}
	}
	if w.tiny && many && (w.full.Load() == 0 || w.crowded.Load() == 0) {
		w.t.Errorf("-max-connections refused %d, -max-phones %d; want some of both", w.full.Load(), w.crowded.Load())
	}
	w.t.Logf("%d phones, %d daemons, %d frames up, %d down, %d+%d refused; to the end as planned: %s",
		m.upgrades[rolePhone][upgradeAccepted].Load(), m.upgrades[roleBinary][upgradeAccepted].Load(),
		m.framesUp.Load(), m.framesDown.Load(), w.full.Load(), w.crowded.Load(), strings.Join(counts, ", "))
}

func (w *stressWorld) proofs(plan string) *atomic.Int64 {
	n, _ := w.proven.LoadOrStore(plan, new(atomic.Int64))
	return n.(*atomic.Int64)
}

// mayRefuse: an upgrade is refused at -max-connections, and during the drain.
func (w *stressWorld) mayRefuse(status int) bool {
	if status == http.StatusServiceUnavailable && w.tiny {
		w.full.Add(1)
		return true
	}
	return false
}

// excused reports whether a connection may have ended so, although it was to
// end otherwise. shaken: its daemon was not there all the time.
func (w *stressWorld) excused(code int, text string, shaken bool) bool {
	is := func(reasons ...closeReason) bool {
		return slices.ContainsFunc(reasons, func(r closeReason) bool {
			return code == int(r.code()) && strings.HasPrefix(text, r.String())
		})
	}
	switch {
	case w.ending.Load() && (code == 1006 || is(endShutdown)):
		return true
	case w.tiny:
		return code == 1006 || is(endMemoryLimit, endBacklogFull, endWriteTimeout, endHeartbeat, endMessageTimeout, endTooManyPhones,
			endNeverSeen, endLastHeld, endBinaryGone, endGraceExpired, endReclaimed, endReplaced, endTakenOver, endAlreadyClaimed)
	}
	return shaken && is(endNeverSeen, endLastHeld, endBinaryGone, endGraceExpired, endReclaimed, endReplaced)
}
