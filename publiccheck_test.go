package main

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The verdicts over time, with rounds made up and the clock of synctest.

// checkRun is what became of a check over scripted rounds.
type checkRun struct {
	at       []time.Duration // when each round was
	joins    []int
	verdicts []publicVerdict // after each
	left     error
	logs     string
}

var (
	theStart = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	myself   = identity{"bbbbbbbbbbbbbbbb", theStart}
	// Clocks are wrong by days: nothing may depend on them.
	older   = anotherRelay("aaaaaaaaaaaaaaaa", 72*time.Hour, time.Hour)
	oldest  = anotherRelay("dddddddddddddddd", 48*time.Hour, 2*time.Hour)
	younger = anotherRelay("cccccccccccccccc", -72*time.Hour, -time.Hour)
)

// anotherRelay has started so much later than myself by its clock, and has run so
// much longer.
func anotherRelay(id string, later, ahead time.Duration) rival {
	return rival{identity: identity{id, theStart.Add(later)}, told: true, theirs: standing{age: ahead}}
}

func withUsers(o rival) rival    { o.theirs.users = true; return o }
func besideUsers(o rival) rival  { o.mine.users = true; return o }
func yielding(o rival) rival     { o.theirs.yields = true; return o }
func ofOldVersion(o rival) rival { o.told, o.theirs = false, standing{}; return o }

// the rounds of a script
func allMine() roundResult { return roundResult{verdict: publicVerified, joins: 4} }
func splitWith(others ...rival) roundResult {
	return roundResult{verdict: publicSplit, others: others, joins: 4}
}
func astray() roundResult {
	return roundResult{verdict: publicNotARelay, diagnosis: diagnosis{"a web server", "move it"}}
}
func noWay() roundResult {
	return roundResult{verdict: publicUnreachable, diagnosis: diagnosis{"nobody answers", "open the port"}}
}

// runCheck lets a check go through a script of rounds; the last goes on for ever,
// until there were as many rounds as asked for.
func runCheck(t *testing.T, rounds int, bypass bool, script ...roundResult) (got checkRun) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var logs logBuffer
		c := &publicCheck{
			me: myself, began: time.Now(), url: "wss://relay.test", bypass: bypass, pace: defaultPace(), state: new(instanceState),
			log: slog.New(slog.NewTextHandler(&logs, nil)), leave: make(chan error, 1),
		}
		c.state.public.Store(uint32(publicPending))
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		note := func() {
			got.verdicts = append(got.verdicts, c.state.verdict())
		}
		c.round = func(_ context.Context, joins int) roundResult {
			n := len(got.at)
			if n > 0 {
				note()
			}
			if n == rounds {
				cancel()
				return roundResult{}
			}
			got.at = append(got.at, time.Since(began))
			got.joins = append(got.joins, joins)
			f := script[min(n, len(script)-1)]
			f.others = slices.Clone(f.others)
			for i := range f.others {
				o := &f.others[i]
				o.asked, o.mine.age = time.Now(), 100*time.Hour+time.Since(began)
				o.theirs.age += o.mine.age
			}
			return f
		}
		c.run(ctx)
		select {
		case got.left = <-c.leave:
			note()
		default:
		}
		got.logs = logs.String()
	})
	return got
}

func (r checkRun) words() string {
	var b []string
	for _, v := range r.verdicts {
		b = append(b, v.String())
	}
	return strings.Join(b, " ")
}

func TestPublicCheckPace(t *testing.T) {
	t.Parallel()
	within := func(d, want time.Duration) bool { return d >= want*9/10 && d <= want*11/10 }
	t.Run("verified", func(t *testing.T) {
		t.Parallel()
		r := runCheck(t, 20, false, allMine())
		for i, at := range r.at {
			switch {
			case i == 0 && (at > time.Second || r.joins[0] != 8):
				t.Errorf("first round after %v with %d phones, want 8 within a second", at, r.joins[0])
			case i > 0 && (!within(at-r.at[i-1], 5*time.Minute) || r.joins[i] != 4):
				t.Errorf("round %d after %v with %d phones, want 4 after 5m", i, at-r.at[i-1], r.joins[i])
			}
		}
		if r.at[2]-r.at[1] == r.at[1]-r.at[0] {
			t.Error("two intervals are equal: there is no jitter")
		}
	})
	t.Run("unreachable", func(t *testing.T) {
		t.Parallel()
		r := runCheck(t, 60, false, noWay())
		for i, at := range r.at[1:] {
			want := 30 * time.Second
			if r.at[i] >= r.at[0]+10*time.Minute {
				want = 5 * time.Minute
			}
			if !within(at-r.at[i], want) {
				t.Errorf("after %v the next round came %v later, want about %v", r.at[i], at-r.at[i], want)
			}
		}
	})
}

func TestPublicCheckVerdicts(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		rounds int
		bypass bool
		script []roundResult
		want   string // verdicts
		levels string // of the log, in order
		left   *rival
	}{
		{name: "verified is said once", rounds: 4, script: []roundResult{allMine()},
			want: "verified verified verified verified", levels: "INFO"},
		{name: "every change is said", rounds: 6, script: []roundResult{noWay(), noWay(), astray(), allMine(), noWay(), allMine()},
			want: "unreachable unreachable not-a-relay verified unreachable verified", levels: "WARN WARN INFO WARN INFO"},
		{name: "one split round is an overlap", rounds: 4, script: []roundResult{allMine(), splitWith(older), allMine()},
			want: "verified verified verified verified", levels: "INFO INFO"},
		{name: "at the start, too", rounds: 2, script: []roundResult{splitWith(older), allMine()},
			want: "pending verified", levels: "INFO INFO"},
		{name: "the older stays", rounds: 100, script: []roundResult{splitWith(younger)},
			want: "pending" + strings.Repeat(" split", 99), levels: "INFO ERROR"},
		{name: "the younger leaves", rounds: 100, script: []roundResult{splitWith(older)},
			left: &older, levels: "INFO ERROR"},
		{name: "of several the oldest is named", rounds: 100, script: []roundResult{splitWith(oldest, older, younger)},
			left: &oldest, levels: "INFO ERROR"},
		{name: "bypass goes on", rounds: 100, bypass: true, script: []roundResult{splitWith(older)},
			want: "pending" + strings.Repeat(" split", 99), levels: "INFO ERROR"},
		{name: "equal times, smaller id stays", rounds: 50, script: []roundResult{splitWith(anotherRelay("cc00000000000000", 72*time.Hour, 900*time.Millisecond))},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "equal times, greater id leaves", rounds: 50, script: []roundResult{splitWith(anotherRelay("aa00000000000000", 72*time.Hour, -900*time.Millisecond))},
			left: &rival{identity: identity{"aa00000000000000", myself.started.Add(72 * time.Hour)}}, levels: "INFO ERROR"},
		{name: "a newcomer with a clock in the past", rounds: 50, script: []roundResult{splitWith(anotherRelay("aa00000000000000", -72*time.Hour, -time.Minute))},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "an elder with a clock in the future", rounds: 50, script: []roundResult{splitWith(anotherRelay("cc00000000000000", 72*time.Hour, time.Minute))},
			left: &rival{identity: identity{"cc00000000000000", myself.started.Add(72 * time.Hour)}}, levels: "INFO ERROR"},
		{name: "users beat age", rounds: 50, script: []roundResult{splitWith(withUsers(younger))},
			left: &younger, levels: "INFO ERROR"},
		{name: "users here beat age", rounds: 12, script: []roundResult{splitWith(besideUsers(older))},
			want: "pending" + strings.Repeat(" split", 11), levels: "INFO ERROR"},
		{name: "users do not keep two for ever", rounds: 50, script: []roundResult{splitWith(besideUsers(older))},
			left: &older, levels: "INFO ERROR"},
		{name: "users on both sides", rounds: 50, script: []roundResult{splitWith(withUsers(besideUsers(older)))},
			left: &older, levels: "INFO ERROR"},
		{name: "one that yields is not followed", rounds: 50, script: []roundResult{splitWith(yielding(older))},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "both yield, greater id leaves", rounds: 50, script: []roundResult{splitWith(older), splitWith(yielding(older))},
			left: &older, levels: "INFO ERROR"},
		{name: "both yield, smaller id stays", rounds: 50, script: []roundResult{splitWith(oldest), splitWith(yielding(oldest))},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "older version, earlier by its clock", rounds: 50, script: []roundResult{splitWith(ofOldVersion(younger))},
			left: &younger, levels: "INFO ERROR"},
		{name: "older version, later by its clock", rounds: 50, script: []roundResult{splitWith(ofOldVersion(older))},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "a split that heals starts anew", rounds: 6, script: []roundResult{splitWith(older), splitWith(older), splitWith(older), allMine(), splitWith(older), allMine()},
			want: "pending split split verified verified verified", levels: "INFO ERROR INFO INFO"},
		{name: "an older one that is gone", rounds: 50, script: []roundResult{splitWith(older), splitWith(older), splitWith(younger)},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "one after the other, as in a rolling update", rounds: 7, script: []roundResult{
			splitWith(older), splitWith(older), splitWith(oldest), splitWith(oldest), splitWith(younger), splitWith(younger), allMine()},
			want: "pending split split split split split verified", levels: "INFO ERROR INFO"},
		{name: "an older one seen twice only", rounds: 50, script: []roundResult{splitWith(older), splitWith(younger), splitWith(younger), splitWith(younger), splitWith(younger), splitWith(older), splitWith(younger)},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "one that does not say who it is", rounds: 50, script: []roundResult{splitWith()},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := runCheck(t, tt.rounds, tt.bypass, tt.script...)
			if tt.want != "" && r.words() != tt.want {
				t.Errorf("verdicts:\n%s, want\n%s", r.words(), tt.want)
			}
			var levels []string
			for line := range strings.Lines(r.logs) {
				_, rest, _ := strings.Cut(line, "level=")
				level, _, _ := strings.Cut(rest, " ")
				levels = append(levels, level)
			}
			if got := strings.Join(levels, " "); got != tt.levels {
				t.Errorf("log levels %s, want %s:\n%s", got, tt.levels, r.logs)
			}
			switch {
			case tt.left == nil && r.left != nil:
				t.Errorf("left: %v", r.left)
			case tt.left != nil && r.left == nil:
				t.Error("stayed")
			case tt.left != nil:
				for _, want := range []string{tt.left.id, tt.left.started.Format(time.RFC3339), myself.id, "multi-instance deploy detected", "4404", bypassName} {
					if !strings.Contains(r.left.Error(), want) {
						t.Errorf("the reason lacks %q: %v", want, r.left)
					}
				}
				first, last := r.at[0], r.at[len(r.at)-1]
				if last-first < 90*time.Second || len(r.at) < 3 {
					t.Errorf("left after %d rounds in %v, want three or more in 90s or more", len(r.at), last-first)
				}
				patience := 150 * time.Second
				if tt.name == "users do not keep two for ever" {
					patience += splitDoubts * 90 * time.Second
				}
				if last-first > patience {
					t.Errorf("left only after %v", last-first)
				}
			}
		})
	}
}

// TestPublicCheckForgets: a split that comes back after it healed is counted
// from its new beginning.
func TestPublicCheckForgets(t *testing.T) {
	t.Parallel()
	r := runCheck(t, 100, false, splitWith(older), splitWith(older), splitWith(older), allMine(), splitWith(older))
	if r.left == nil {
		t.Fatal("stayed")
	}
	if n := len(r.at); n < 7 || r.at[n-1]-r.at[4] < 90*time.Second {
		t.Errorf("left in round %d, %v after the second split began", n, r.at[n-1]-r.at[4])
	}
}

// relayPair is two relays that check one name, by the clock of synctest.
type relayPair struct {
	ids    [2]string
	ahead  time.Duration // how much longer the first has run
	users  func(at time.Duration) [2]bool
	wire   time.Duration  // an answer takes up to that, half of it each way
	linger time.Duration  // and a round goes on for up to that after the answer
	view   func(o *rival) // changes what each sees, if not nil
}

// play lets both check until a while after one has left, or for so long, and
// returns which have left, and when the first did.
func (p relayPair) play(t *testing.T, random *rand.Rand, most time.Duration) (left [2]bool, first time.Duration) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	began := time.Now()
	var checks [2]*publicCheck
	var gone [2]atomic.Bool
	standingOf := func(i int) standing {
		at := time.Since(began)
		s := standing{age: 100*time.Hour + at, users: p.users(at)[i], yields: checks[i].state.yields.Load()}
		if i == 0 {
			s.age += p.ahead
		}
		return s
	}
	// Each clock is wrong by days, the elder's in the direction that makes it look
	// younger.
	skew := [2]time.Duration{72 * time.Hour, -72 * time.Hour}
	if p.ahead < 0 {
		skew[0], skew[1] = skew[1], skew[0]
	}
	who := func(i int) identity { return identity{p.ids[i], theStart.Add(skew[i])} }
	var mu sync.Mutex // of random
	upTo := func(d time.Duration) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(random.Int64N(int64(d) + 1))
	}
	var wg sync.WaitGroup
	for i := range checks {
		checks[i] = &publicCheck{
			me: who(i), began: began, url: "wss://relay.test", pace: defaultPace(), state: new(instanceState),
			log: slog.New(slog.DiscardHandler), leave: make(chan error, 1),
		}
		checks[i].round = func(ctx context.Context, _ int) roundResult {
			o := rival{identity: who(1 - i), asked: time.Now(), told: true, mine: standingOf(i)}
			time.Sleep(upTo(p.wire / 2))
			if gone[1-i].Load() {
				return allMine()
			}
			o.theirs = standingOf(1 - i)
			if p.view != nil {
				p.view(&o)
			}
			time.Sleep(upTo(p.wire/2) + upTo(p.linger))
			return splitWith(o)
		}
	}
	for i, c := range checks {
		wg.Go(func() {
			time.Sleep(upTo(time.Minute)) // they start their rounds at any time
			c.run(ctx)
			if ctx.Err() == nil {
				gone[i].Store(true)
			}
		})
	}
	for time.Since(began) < most {
		time.Sleep(10 * time.Second)
		if gone[0].Load() || gone[1].Load() {
			first = time.Since(began)
			break
		}
	}
	time.Sleep(20 * time.Minute) // long enough for the other to leave as well
	cancel()
	wg.Wait()
	return [2]bool{gone[0].Load(), gone[1].Load()}, first
}

// TestPublicCheckOneOfTwoStays: from views of different moments, with clocks that
// are wrong by days, ages at the edge of being the same, users who come and go, and
// answers that are slow, never both relays leave, and never do both stay.
func TestPublicCheckOneOfTwoStays(t *testing.T) {
	t.Parallel()
	over := defaultPace().over
	always := func(first, second bool) func(time.Duration) [2]bool {
		return func(time.Duration) [2]bool { return [2]bool{first, second} }
	}
	// One user whose binary dials again and again, and lands here or there.
	wandering := func(every time.Duration) func(time.Duration) [2]bool {
		return func(at time.Duration) [2]bool { here := at/every%2 == 0; return [2]bool{here, !here} }
	}
	for _, users := range []struct {
		name   string
		at     func(time.Duration) [2]bool
		stays  int // of the two, where users decide; -1 where age does
		settle bool
		view   func(o *rival)
	}{
		{"no users", always(false, false), -1, true, nil},
		{"users of both", always(true, true), -1, true, nil},
		{"users of the first", always(true, false), 0, true, nil},
		{"users of the second", always(false, true), 1, true, nil},
		{"wandering each second", wandering(time.Second), -1, false, nil},
		{"wandering as rounds go", wandering(30 * time.Second), -1, false, nil},
		{"wandering in 100s", wandering(100 * time.Second), -1, false, nil},
		{"users for a while", func(at time.Duration) [2]bool { return [2]bool{at < 70*time.Second, at > 150*time.Second} }, -1, false, nil},
		// The worst moments to be asked at, each time.
		{"users wherever one looks from", always(false, false), -1, false, func(o *rival) { o.mine.users, o.theirs.users = true, false }},
		{"users wherever one looks at", always(false, false), -1, false, func(o *rival) { o.mine.users, o.theirs.users = false, true }},
	} {
		t.Run(users.name, func(t *testing.T) {
			t.Parallel()
			for _, ahead := range []time.Duration{
				-100 * time.Hour, -time.Minute, -1002 * time.Millisecond, -time.Second, -998 * time.Millisecond, 0,
				998 * time.Millisecond, time.Second, 1002 * time.Millisecond, time.Minute, 100 * time.Hour,
			} {
				for _, slow := range [][2]time.Duration{{0, 0}, {10 * time.Millisecond, time.Second}, {4 * time.Second, 20 * time.Second}, {10 * time.Second, 4 * over}} {
					seeds := uint64(6)
					if slow[1] >= over/2 {
						seeds = 20
					}
					for seed := range seeds {
						ids := [2]string{"aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"}
						if seed%2 == 1 {
							ids[0], ids[1] = ids[1], ids[0]
						}
						p := relayPair{ids, ahead, users.at, slow[0], slow[1], users.view}
						var left [2]bool
						var first time.Duration
						most := time.Hour
						if slow[1] < over/2 {
							most = 9 * over // nearly half of it for doubts
						}
						synctest.Test(t, func(t *testing.T) {
							left, first = p.play(t, rand.New(rand.NewPCG(seed, uint64(ahead))), most)
						})
						what := fmt.Sprintf("%v ahead, ids %v, answers take %v, rounds %v more", ahead, ids, slow[0], slow[1])
						if left[0] && left[1] {
							t.Fatalf("%s: both leave, the first after %v", what, first)
						}
						if slow[1] >= over/2 {
							continue // stale answers decide nothing: here nobody has to leave
						}
						if !left[0] && !left[1] {
							t.Fatalf("%s: both stay for %v", what, most)
						}
						stayer := 0
						if left[0] {
							stayer = 1
						}
						want := users.stays
						if want < 0 && users.settle && (ahead > 2*time.Second+slow[0] || ahead < -2*time.Second-slow[0]) {
							if want = 0; ahead < 0 {
								want = 1
							}
						}
						if want >= 0 && stayer != want {
							t.Errorf("%s: relay %d stays, want %d", what, stayer, want)
						}
					}
				}
			}
		})
	}
}

func TestPublicCheckSaysWhatComesNext(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		other  rival
		bypass bool
		want   []string
	}{
		{older, false, []string{older.id, "this relay stops if that lasts for 1m30s: it has run for longer", "other_age=101h"}},
		{withUsers(younger), false, []string{younger.id, "this relay stops if that lasts for 1m30s: it holds binaries of users"}},
		{younger, false, []string{younger.id, "the other one stops"}},
		{older, true, []string{older.id, bypassName + "=1: this relay goes on"}},
	} {
		r := runCheck(t, 2, tt.bypass, splitWith(tt.other))
		for _, want := range tt.want {
			if !strings.Contains(r.logs, want) {
				t.Errorf("log lacks %q:\n%s", want, r.logs)
			}
		}
	}
	partly := roundResult{verdict: publicUnreachable, joins: 8, failed: 4, diagnosis: diagnosis{"refused", "start it"}}
	if r := runCheck(t, 1, false, partly); !strings.Contains(r.logs, "some of the connections") || strings.Contains(r.logs, "harmless") {
		t.Errorf("half of the phones fail, and the log says:\n%s", r.logs)
	}
}

func TestPaceFrom(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		value string
		set   bool
		want  checkPace
		bad   bool
	}{
		{"", false, defaultPace(), false},
		{"2s,500ms,1500ms", true, checkPace{2 * time.Second, 500 * time.Millisecond, 1500 * time.Millisecond, 0}, false},
		{"2s,500ms,1500ms,-72h", true, checkPace{2 * time.Second, 500 * time.Millisecond, 1500 * time.Millisecond, -72 * time.Hour}, false},
		{"", true, checkPace{}, true},
		{"2s", true, checkPace{}, true},
		{"2s,1s,1s,1s,1s", true, checkPace{}, true},
		{"2s,1s,-1s", true, checkPace{}, true},
		{"2s,0s,1s", true, checkPace{}, true},
		{"2s,x,1s", true, checkPace{}, true},
	} {
		env := map[string]string{}
		if tt.set {
			env[paceName] = tt.value
		}
		got, err := paceFrom(env)
		if tt.bad != (err != nil) || err == nil && got != tt.want {
			t.Errorf("%q: %v, %v", tt.value, got, err)
		}
		if err != nil && !strings.Contains(err.Error(), fmt.Sprintf("%q for variable %s", tt.value, paceName)) {
			t.Errorf("the error does not say what is wrong: %v", err)
		}
	}
}
