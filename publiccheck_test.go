package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
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
	older    = identity{"aaaaaaaaaaaaaaaa", theStart.Add(-time.Hour)}
	oldest   = identity{"dddddddddddddddd", theStart.Add(-2 * time.Hour)}
	myself   = identity{"bbbbbbbbbbbbbbbb", theStart}
	younger  = identity{"cccccccccccccccc", theStart.Add(time.Hour)}
)

// the rounds of a script
func allMine() finding { return finding{verdict: publicVerified, joins: 4} }
func splitWith(others ...identity) finding {
	return finding{verdict: publicSplit, others: others, joins: 4}
}
func astray() finding {
	return finding{verdict: publicNotARelay, fault: fault{"a web server", "move it"}}
}
func noWay() finding {
	return finding{verdict: publicUnreachable, fault: fault{"nobody answers", "open the port"}}
}

// runCheck lets a check go through a script of rounds; the last goes on for ever,
// until there were as many rounds as asked for.
func runCheck(t *testing.T, rounds int, bypass bool, script ...finding) (got checkRun) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var logs logBuffer
		c := &publicCheck{
			me: myself, url: "wss://relay.test", bypass: bypass, pace: defaultPace(), state: newInstanceState(),
			log: slog.New(slog.NewTextHandler(&logs, nil)), leave: make(chan error, 1),
		}
		c.state.setPublic(publicPending)
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		note := func() {
			_, v := c.state.verdicts()
			got.verdicts = append(got.verdicts, v)
		}
		c.round = func(_ context.Context, joins int) finding {
			n := len(got.at)
			if n > 0 {
				note()
			}
			if n == rounds {
				cancel()
				return finding{}
			}
			got.at = append(got.at, time.Since(began))
			got.joins = append(got.joins, joins)
			return script[min(n, len(script)-1)]
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
		script []finding
		want   string // verdicts
		levels string // of the log, in order
		left   *identity
	}{
		{name: "verified is said once", rounds: 4, script: []finding{allMine()},
			want: "verified verified verified verified", levels: "INFO"},
		{name: "every change is said", rounds: 6, script: []finding{noWay(), noWay(), astray(), allMine(), noWay(), allMine()},
			want: "unreachable unreachable not-a-relay verified unreachable verified", levels: "WARN WARN INFO WARN INFO"},
		{name: "one split round is an overlap", rounds: 4, script: []finding{allMine(), splitWith(older), allMine()},
			want: "verified verified verified verified", levels: "INFO INFO"},
		{name: "at the start, too", rounds: 2, script: []finding{splitWith(older), allMine()},
			want: "pending verified", levels: "INFO INFO"},
		{name: "the older stays", rounds: 100, script: []finding{splitWith(younger)},
			want: "pending" + strings.Repeat(" split", 99), levels: "INFO ERROR"},
		{name: "the younger leaves", rounds: 100, script: []finding{splitWith(older)},
			left: &older, levels: "INFO ERROR"},
		{name: "of several the oldest is named", rounds: 100, script: []finding{splitWith(oldest, older, younger)},
			left: &oldest, levels: "INFO ERROR"},
		{name: "bypass goes on", rounds: 100, bypass: true, script: []finding{splitWith(older)},
			want: "pending" + strings.Repeat(" split", 99), levels: "INFO ERROR"},
		{name: "equal times, smaller id stays", rounds: 50, script: []finding{splitWith(identity{"cc00000000000000", myself.started})},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "equal times, greater id leaves", rounds: 50, script: []finding{splitWith(identity{"aa00000000000000", myself.started})},
			left: &identity{"aa00000000000000", myself.started}, levels: "INFO ERROR"},
		{name: "a split that heals starts anew", rounds: 6, script: []finding{splitWith(older), splitWith(older), splitWith(older), allMine(), splitWith(older), allMine()},
			want: "pending split split verified verified verified", levels: "INFO ERROR INFO INFO"},
		{name: "an older one that is gone", rounds: 50, script: []finding{splitWith(older), splitWith(older), splitWith(younger)},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "one after the other, as in a rolling update", rounds: 7, script: []finding{
			splitWith(older), splitWith(older), splitWith(oldest), splitWith(oldest), splitWith(younger), splitWith(younger), allMine()},
			want: "pending split split split split split verified", levels: "INFO ERROR INFO"},
		{name: "an older one seen twice only", rounds: 50, script: []finding{splitWith(older), splitWith(younger), splitWith(younger), splitWith(younger), splitWith(younger), splitWith(older), splitWith(younger)},
			want: "pending" + strings.Repeat(" split", 49), levels: "INFO ERROR"},
		{name: "one that does not say who it is", rounds: 50, script: []finding{splitWith()},
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
				if last-first > 150*time.Second {
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

func TestPublicCheckSaysWhatComesNext(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		other  identity
		bypass bool
		want   []string
	}{
		{older, false, []string{older.id, "this relay, the younger, stops", "1m30s"}},
		{younger, false, []string{younger.id, "the younger of the two stops"}},
		{older, true, []string{older.id, bypassName + "=1: this relay goes on"}},
	} {
		r := runCheck(t, 2, tt.bypass, splitWith(tt.other))
		for _, want := range tt.want {
			if !strings.Contains(r.logs, want) {
				t.Errorf("log lacks %q:\n%s", want, r.logs)
			}
		}
	}
	partly := finding{verdict: publicUnreachable, joins: 8, failed: 4, fault: fault{"refused", "start it"}}
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
		{"2s,500ms,1500ms", true, checkPace{2 * time.Second, 500 * time.Millisecond, 1500 * time.Millisecond}, false},
		{"", true, checkPace{}, true},
		{"2s", true, checkPace{}, true},
		{"2s,1s,1s,1s", true, checkPace{}, true},
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
