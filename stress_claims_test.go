package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// The stress run of claims: daemons lose their path, with a word or without,
// again and again within one challenge. A live one that has no live rival is
// never refused, and of two live ones exactly one holds the id.

// lostTimeout is the challenge's in this run. A daemon that lives answers within
// it, however busy the machine is.
const lostTimeout = 3 * time.Second

// TestStressClaims takes PYRYCODE_STRESS_ROUNDS for all pollers together.
func TestStressClaims(t *testing.T) {
	t.Parallel()
	rounds := 200
	if v := os.Getenv("PYRYCODE_STRESS_ROUNDS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatalf("PYRYCODE_STRESS_ROUNDS: %v", err)
		}
		rounds = n
	}
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("PYRYCODE_STRESS_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("PYRYCODE_STRESS_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("PYRYCODE_STRESS_SEED=%d", seed)
	for poller, on := range listeners {
		t.Run(poller, func(t *testing.T) {
			o := testOptions()
			o.challengeTimeout, o.ping, o.grace = lostTimeout, time.Hour, lostTimeout/2
			r := startRelayOn(t, o, on(t))
			var all sync.WaitGroup
			var fails atomic.Int64
			turns := make(chan struct{}, 600)
			for i := range rounds / len(listeners) {
				turns <- struct{}{}
				all.Go(func() {
					defer func() { <-turns }()
					round := lostRound{r: r, id: fmt.Sprint("home-", i), rng: rand.New(rand.NewPCG(seed, uint64(i)))}
					if err := round.run(); err != nil && fails.Add(1) <= 20 {
						t.Errorf("round %d: %v: %s", i, err, strings.Join(round.story, ", "))
					}
				})
			}
			all.Wait()
			r.sound()
			t.Logf("%d rounds, %d failed", rounds/len(listeners), fails.Load())
		})
	}
}

// lostRound is one server-id and what its daemons go through.
type lostRound struct {
	r     *testRelay
	id    string
	rng   *rand.Rand
	story []string
	conns []net.Conn
}

// lostDaemon answers pings until its path is lost.
type lostDaemon struct {
	*wsClient
	leg  *session
	lost atomic.Bool
	said chan string // what came for it
	end  chan string // how it was closed
}

// note adds to what a failure is told with.
func (l *lostRound) note(format string, args ...any) {
	l.story = append(l.story, fmt.Sprintf(format, args...))
}

// wait passes up to a share of the challenge.
func (l *lostRound) wait(least time.Duration, share float64) {
	d := least + time.Duration(l.rng.Float64()*share*float64(lostTimeout))
	l.note("%v", d.Round(time.Millisecond))
	time.Sleep(d)
}

func (l *lostRound) join(name string) (*lostDaemon, error) {
	c, resp, err := l.r.dial("/v2/server", binaryHeaders(l.id))
	if err != nil || c == nil {
		return nil, fmt.Errorf("joining as %s: %v, %v", name, resp, err)
	}
	l.conns = append(l.conns, c.nc)
	l.note("%s comes", name)
	d := &lostDaemon{wsClient: c, said: make(chan string, 1), end: make(chan string, 1)}
	// It has its 101, so it stands in the entry, unless it was refused.
	v, ok := l.r.registry.servers.Load(l.id)
	if !ok {
		return nil, fmt.Errorf("%s has no entry", name)
	}
	srv := v.(*server)
	srv.mu.Lock()
	if d.leg = srv.binary; len(srv.contenders) > 0 {
		d.leg = srv.contenders[len(srv.contenders)-1]
	}
	srv.mu.Unlock()
	go d.listen()
	return d, nil
}

func (d *lostDaemon) listen() {
	for {
		op, p, err := d.next()
		switch {
		case d.lost.Load():
			return
		case err != nil:
			d.end <- err.Error()
			return
		case op == opPing:
			d.nc.Write(clientFrame(last, opPong, p))
		case op == opClose:
			code, _ := parseClose(p)
			d.nc.Write(clientFrame(last, opClose, p))
			d.nc.Close()
			d.end <- fmt.Sprintf("%d %s", code, p[2:])
			return
		default:
			d.said <- string(p)
		}
	}
}

// lose ends a daemon's path.
func (l *lostRound) lose(name string, d *lostDaemon) {
	d.lost.Store(true)
	how := [...]string{"silence", "FIN", "half-close"}[l.rng.IntN(3)]
	l.note("%s is lost by %s", name, how)
	switch how {
	case "FIN":
		d.nc.Close()
	case "half-close":
		d.nc.(*net.TCPConn).CloseWrite()
	}
}

const lostRefused = "4409 server-id already claimed"

// run plays a round and returns what went wrong.
func (l *lostRound) run() error {
	defer func() {
		for _, nc := range l.conns {
			nc.Close()
		}
	}()
	scene := [...]string{"it lives", "one survives", "one survives", "two survive"}[l.rng.IntN(4)]
	l.note("%s", scene)
	incumbent, err := l.join("incumbent")
	if err != nil {
		return err
	}
	if scene != "it lives" {
		l.lose("incumbent", incumbent)
	}
	for i := range l.rng.IntN(5) {
		l.wait(20*time.Millisecond, 0.3)
		name := fmt.Sprint("attempt ", i)
		attempt, err := l.join(name)
		if err != nil {
			return err
		}
		l.wait(0, 0.3)
		l.lose(name, attempt)
	}
	l.wait(20*time.Millisecond, 0.3)
	one, err := l.join("survivor")
	if err != nil {
		return err
	}
	switch scene {
	case "it lives":
		if err := wantSoon(one.end, lostRefused); err != nil {
			return fmt.Errorf("the newcomer: %w", err)
		}
		return l.holds(incumbent)
	case "one survives":
		return l.holds(one)
	}
	l.wait(0, 1.5)
	two, err := l.join("rival")
	if err != nil {
		return err
	}
	select {
	case got := <-one.end:
		one.end <- got
		one, two = two, one
	case got := <-two.end:
		two.end <- got
	case <-time.After(patience):
		return errors.New("neither of two rivals is refused")
	}
	if err := wantSoon(two.end, lostRefused); err != nil {
		return fmt.Errorf("the loser: %w", err)
	}
	return l.holds(one)
}

func wantSoon(c <-chan string, want string) error {
	select {
	case got := <-c:
		if !strings.Contains(got, want) {
			return fmt.Errorf("got %q, want %q", got, want)
		}
		return nil
	case <-time.After(patience):
		return fmt.Errorf("waited in vain for %q", want)
	}
}

// holds checks that d comes to hold the id, stays, and is whom a phone reaches.
func (l *lostRound) holds(d *lostDaemon) error {
	for start := time.Now(); l.r.holder(l.id) != d.leg; time.Sleep(20 * time.Millisecond) {
		select {
		case got := <-d.end:
			return fmt.Errorf("the live daemon got %q", got)
		default:
		}
		// Its turn comes one challenge after it came, and a sweep or two.
		if since := time.Since(start); since > 3*lostTimeout {
			return fmt.Errorf("the live daemon does not hold the id after %v", since)
		}
	}
	ph, resp, err := l.r.dial("/v2/client", phoneHeaders(l.id))
	if err != nil || ph == nil {
		return fmt.Errorf("a phone: %v, %v", resp, err)
	}
	l.conns = append(l.conns, ph.nc)
	if _, err := ph.nc.Write(clientFrame(last, opText, []byte(`"who"`))); err != nil {
		return fmt.Errorf("a phone: %w", err)
	}
	if err := wantSoon(d.said, `"frame":"who"`); err != nil {
		return fmt.Errorf("the live daemon: %w", err)
	}
	select {
	case got := <-d.end:
		return fmt.Errorf("the live daemon got %q", got)
	default:
		return nil
	}
}
