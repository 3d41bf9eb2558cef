package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What happens with two relays behind one name, and what the relays' own check of
// that name (-public-url) says of it.

// pace shortens the check: between rounds while all is well, between rounds when
// it is not, and how long a split lasts before the younger relay leaves.
func pace(every, again, over string) []string {
	return []string{"PYRYCODE_RELAY_TEST_PUBLIC_CHECK=" + every + "," + again + "," + over}
}

// publicRelay starts a relay at an address, behind a public one.
func publicRelay(t testing.TB, env []string, addr, public string) *relayProcess {
	t.Helper()
	return startRelayEnv(t, env, "-listen", addr, "-public-url", "ws://"+public, "-log-level", "debug")
}

// wantAge waits until the relay has run for so many seconds: ages of the same
// second are the same to relays.
func (r *relayProcess) wantAge(seconds int) {
	r.t.Helper()
	eventually(r.t, "an age of "+strconv.Itoa(seconds)+"s", func() bool { return getHealth(r.t, r.addr).Uptime >= seconds })
}

// alarm is in the log of a relay that has found another.
const alarm = "multi-instance deploy detected"

// confirmed is how often, and for how long, the relay that leaves has seen the other.
var confirmed = regexp.MustCompile(`seen (\d+) times within (\d+)s`)

// claims is how many times the relay has claimed a server-id on itself through
// its public name: once a round.
func (r *relayProcess) claims() int {
	n := 0
	for line := range strings.Lines(r.output()) {
		if strings.Contains(line, `"DEBUG","msg":"connected","leg":"binary"`) {
			n++
		}
	}
	return n
}

// wantCheck waits for a verdict.
func (r *relayProcess) wantCheck(verdict string) {
	r.t.Helper()
	eventually(r.t, "the check of "+r.instance+" says "+verdict, func() bool { return getHealth(r.t, r.addr).Check == verdict })
}

// quiet reports whether some more rounds, once the name is verified, see no other
// relay.
func (r *relayProcess) quiet(rounds int) bool {
	r.t.Helper()
	r.wantCheck("verified")
	claims, alarms := r.claims(), strings.Count(r.output(), alarm)
	eventually(r.t, "rounds of the check", func() bool { return r.claims() >= claims+rounds })
	return getHealth(r.t, r.addr).Check == "verified" && strings.Count(r.output(), alarm) == alarms
}

// wantNoAlarm wants no round of the relay's to have ended in an alarm.
func (r *relayProcess) wantNoAlarm(rounds int) {
	r.t.Helper()
	if !r.quiet(rounds) || strings.Contains(r.output(), alarm) {
		r.t.Errorf("a false alarm of %s", r.instance)
	}
}

// bothServe starts the balancer of a public name once both relays behind it, which
// did not reach it, let users in.
func bothServe(t testing.TB, b balancer, public string, first, second *relayProcess) {
	t.Helper()
	first.wantCheck("unreachable")
	second.wantCheck("unreachable")
	b.startAt(t, public, roundRobin, first.addr, second.addr)
}

// TestRoundRobin: both relays find each other, one leaves, and phones that were told
// 4404 reach their binary.
func TestRoundRobin(t *testing.T) {
	t.Parallel()
	for _, b := range balancers {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			one, two, public := freeAddr(t), freeAddr(t), freeAddr(t)
			env := pace("1s", "1s", "1500ms")
			first, second := publicRelay(t, env, one, public), publicRelay(t, env, two, public)
			bothServe(t, b, public, first, second)

			// A binary on each: one of them will have to move.
			var homes []string
			for getHealth(t, one).Binaries == 0 || getHealth(t, two).Binaries == 0 {
				id := fmt.Sprintf("home-%d", len(homes))
				keepBinary(t, public, id)
				homes = append(homes, id)
			}
			for _, id := range homes {
				eventually(t, "a phone of "+id+" is told 4404", func() bool {
					e := ask(t, public, id)
					return e.code == 4404 && strings.HasPrefix(e.reason, "server-id never seen")
				})
			}

			first.wantCheck("split")
			second.wantCheck("split")
			stays, leaves := first, second
			select {
			case <-first.done: // both are of the same second
				if stays, leaves = second, first; leaves.instance < stays.instance {
					t.Error("the first to start leaves, and has the smaller id")
				}
			case <-second.done:
			case <-time.After(patience):
			}
			leaves.wantOut()
			if out := leaves.output(); !strings.Contains(out, "this one ("+leaves.instance) || !strings.Contains(out, "relay "+stays.instance) {
				t.Error("the one that leaves does not say for which one")
			}
			var rounds, seconds int
			if m := confirmed.FindStringSubmatch(leaves.output()); m != nil {
				rounds, _ = strconv.Atoi(m[1])
				seconds, _ = strconv.Atoi(m[2])
			}
			if rounds < 3 || seconds < 2 { // 1500ms, rounded
				t.Errorf("the one left after %d rounds and %d seconds", rounds, seconds)
			}
			// One round raises a suspicion, the next one the alarm. That chance brings
			// each phone of a round to its own relay may happen once.
			for _, r := range []*relayProcess{first, second} {
				if n := strings.Count(r.output(), "checking again"); n < 1 || n > 2 {
					t.Errorf("%s was suspicious %d times", r.instance, n)
				}
			}
			stays.wantCheck("verified")
			eventually(t, "all binaries are back", func() bool { return getHealth(t, stays.addr).Binaries == len(homes) })
			for _, id := range homes {
				for range 3 {
					if e := ask(t, public, id); e.ended {
						t.Errorf("a phone of %s got %s", id, e)
					}
				}
			}
		})
	}
}

// TestWrongClocks: a relay that was started with a clock wrong by days is as old as
// it is, and no older. Of two the one that came later leaves, whatever the dates
// say, and of two of which one has users that one stays.
func TestWrongClocks(t *testing.T) {
	t.Parallel()
	const past, future, right = ",-72h", ",72h", ""
	for _, test := range []struct {
		name                   string
		elder, newcomer        string // how wrong their clocks are
		newcomerUsers, inverse bool   // the elder leaves
	}{
		{"the newcomer's in the past", right, past, false, false},
		{"the newcomer's in the future", right, future, false, false},
		{"the elder's in the future", future, right, false, false},
		{"the elder's in the past", past, right, false, false},
		{"both, away from the truth", future, past, false, false},
		{"users of the newcomer, the elder's in the past", past, right, true, true},
		{"users of the newcomer, its own in the future", right, future, true, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			one, two := freeAddr(t), freeAddr(t)
			public := freeAddr(t)
			stays := publicRelay(t, pace("1s", "1s", "1500ms"+test.elder), one, public)
			stays.wantAge(2)
			leaves := publicRelay(t, pace("1s", "1s", "1500ms"+test.newcomer), two, public)
			leaves.wantCheck("unreachable")
			if test.newcomerUsers {
				keepBinary(t, two, "home")
			}
			bothServe(t, balancers[0], public, stays, leaves)
			if test.inverse {
				stays, leaves = leaves, stays
			}
			leaves.wantOut()
			if out := leaves.output(); !strings.Contains(out, "this one ("+leaves.instance) ||
				!strings.Contains(out, "relay "+stays.instance+", up ") {
				t.Error("the one that leaves does not say for which one")
			}
			var uptime float64
			for line := range strings.Lines(leaves.output()) {
				var l struct {
					Msg    string
					Uptime float64 `json:"uptime_ms"`
				}
				if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "stopped" {
					uptime = l.Uptime
				}
			}
			if uptime <= 0 || uptime > float64(2*patience.Milliseconds()) {
				t.Errorf("it stopped with an uptime of %v ms", uptime)
			}
			stays.wantCheck("verified")
		})
	}
}

// TestNoFalseAlarm: what looks like two relays, or is for a moment, and harms nobody.
func TestNoFalseAlarm(t *testing.T) {
	t.Parallel()
	env := pace("200ms", "1s", "3s")
	for _, b := range balancers {
		t.Run(b.name+"/sticky by server-id", func(t *testing.T) {
			t.Parallel()
			one, two := freeAddr(t), freeAddr(t)
			public := b.start(t, byServerID, one, two)
			first, second := publicRelay(t, env, one, public), publicRelay(t, env, two, public)
			first.wantNoAlarm(8)
			second.wantNoAlarm(8)
		})
		t.Run(b.name+"/one backend", func(t *testing.T) {
			t.Parallel()
			one := freeAddr(t)
			publicRelay(t, env, one, b.start(t, roundRobin, one)).wantNoAlarm(3)
		})
		t.Run(b.name+"/restart", func(t *testing.T) {
			t.Parallel()
			one := freeAddr(t)
			public := b.start(t, roundRobin, one)
			first := publicRelay(t, env, one, public)
			first.wantNoAlarm(1)
			first.stop()
			publicRelay(t, env, one, public).wantNoAlarm(3)
			if strings.Contains(first.output(), alarm) {
				t.Error("a false alarm of the first")
			}
		})
		t.Run(b.name+"/rolling update", func(t *testing.T) {
			t.Parallel()
			// Both serve for less time than a suspicion takes to be looked into.
			env := pace("200ms", "3s", "90s")
			one, two := freeAddr(t), freeAddr(t)
			public := b.start(t, roundRobin, one, two)
			first := publicRelay(t, env, one, public)
			first.wantCheck("verified")
			second := publicRelay(t, env, two, public)
			first.stop()
			second.wantNoAlarm(3)
			if strings.Contains(first.output(), alarm) {
				t.Error("a false alarm of the first")
			}
		})
	}
}

// TestStickyFailover pins what docs/architecture.md says of sticky backends: when
// one is gone its server-ids move to the other, and when it is back they move
// home without the binaries that have claimed them meanwhile.
func TestStickyFailover(t *testing.T) {
	t.Parallel()
	for _, b := range balancers {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			one, two := freeAddr(t), freeAddr(t)
			public := b.start(t, byServerID, one, two)
			// The ids know another relay for 2s before they tell of it. No relay leaves.
			env := append(pace("200ms", "1s", "2s"), "PYRYCODE_RELAY_SINGLE_INSTANCE=1")
			first, second := publicRelay(t, env, one, public), publicRelay(t, env, two, public)
			first.wantCheck("verified")
			second.wantCheck("verified")
			// A server-id of the first relay's, and one of the second's.
			var moves, stays string
			for i := 0; moves == "" || stays == ""; i++ {
				id := fmt.Sprintf("home-%d", i)
				before := getHealth(t, one).Binaries
				probe := coderLibrary.binary(t, public, id)
				if getHealth(t, one).Binaries > before {
					moves = id
				} else {
					stays = id
				}
				probe.close(1000, "")
				eventually(t, "the binary has left", func() bool { return getHealth(t, one).Binaries+getHealth(t, two).Binaries == 0 })
			}
			keepBinary(t, public, stays)
			gone := keepBinary(t, public, moves)
			near, far := wsLibrary.phone(t, public, stays), wsLibrary.phone(t, public, moves)
			for _, ph := range []*peer{near, far} {
				ph.send("1")
				ph.want("1")
			}

			// Down: its sessions are lost, and what redials meets on the other.
			first.stopping = true
			first.signal(syscall.SIGKILL)
			<-first.done
			far.wantEnd(1006, "")
			eventually(t, "a phone of the moved server-id reaches its binary", func() bool { return !ask(t, public, moves).ended })
			near.send("2")
			near.want("2")
			held := wsLibrary.phone(t, public, moves)

			// Back: who is connected stays where it is, who comes is sent home,
			// where the binary is not.
			back := publicRelay(t, env, one, public)
			eventually(t, "a phone of the moved server-id is told 4404", func() bool {
				e := ask(t, public, moves)
				return e.code == 4404 && strings.HasPrefix(e.reason, "server-id never seen")
			})
			held.send("3")
			held.want("3")
			// The check does not see it for long: its own server-ids are new, and
			// stick once the balancer has made up its mind (nginx gives a backend
			// that has failed one connection at a time until one has ended well).
			eventually(t, "the check finds no fault", func() bool { return back.quiet(3) && second.quiet(3) })
			if e := ask(t, public, moves); e.code != 4404 {
				t.Errorf("a phone of the moved server-id got %s, want 4404 still", e)
			}

			// It lasts until the binary dials again.
			gone.redial()
			eventually(t, "a phone reaches the binary again", func() bool { return !ask(t, public, moves).ended })
			wantSplit(t, back, "none")
			wantSplit(t, second, "none")

			// Down again: the ids from there tell the other one.
			home := time.Now()
			eventually(t, "a phone joins 2s later", func() bool { return !ask(t, public, moves).ended && time.Since(home) > 2500*time.Millisecond })
			back.stopping = true
			back.signal(syscall.SIGKILL)
			<-back.done
			second.wantSeen(back, time.Now())
		})
	}
}

// wantSplit compares what the ids have told a relay.
func wantSplit(t testing.TB, r *relayProcess, want string) {
	t.Helper()
	if got := getHealth(t, r.addr).Split; got != want {
		t.Errorf("split_seen of %s is %s, want %s", r.instance, got, want)
	}
}

// wantSeen waits until the ids have told the relay of another one for certain.
func (r *relayProcess) wantSeen(other *relayProcess, since time.Time) {
	r.t.Helper()
	eventually(r.t, "the ids tell of "+other.instance, func() bool {
		return strings.Contains(r.output(), `"evidence":"certain","other":"`+other.instance+`"`)
	})
	r.t.Logf("the ids told of the other relay %v later", time.Since(since).Round(time.Millisecond))
	wantSplit(r.t, r, "certain")
}

// TestClientAddress pins what docs/architecture.md says of a balancer that goes by the client's
// address: nothing notices it until a daemon that had changed its address has it again.
func TestClientAddress(t *testing.T) {
	t.Parallel()
	for _, b := range balancers {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			one, two, public := freeAddr(t), freeAddr(t), freeAddr(t)
			b.startAt(t, public, byClient, one, two)
			env := pace("200ms", "1s", "2s")
			first, second := startRelayEnv(t, env, "-listen", one), startRelayEnv(t, env, "-listen", two)
			// An address that leads to each of them. nginx takes three numbers of it.
			var here, there net.IP
			for i := byte(1); here == nil || there == nil; i++ {
				ip := net.IPv4(127, ownIP[13], i, ownIP[15])
				look := gorillaFrom(ip).binary(t, public, "look")
				if getHealth(t, one).Binaries > 0 {
					here = ip
				} else {
					there = ip
				}
				look.close(1000, "")
				eventually(t, "the binary has left", func() bool { return getHealth(t, one).Binaries+getHealth(t, two).Binaries == 0 })
			}
			near, far := gorillaFrom(here), gorillaFrom(there)
			reaches := func(l library) func() bool { return func() bool { return !askBy(t, l, public, "home").ended } }

			home := keepBinaryFrom(t, public, "home", here)
			eventually(t, "a phone of its address reaches the daemon", reaches(near))
			if e := askBy(t, far, public, "home"); e.code != 4404 {
				t.Errorf("a phone elsewhere got %s, want 4404", e)
			}
			home.moves(there)
			eventually(t, "a phone elsewhere reaches the daemon", reaches(far))
			moved := time.Now()
			eventually(t, "a phone joins 2s later", func() bool { return reaches(far)() && time.Since(moved) > 2500*time.Millisecond })
			wantSplit(t, first, "none")
			wantSplit(t, second, "none")
			home.moves(here)
			first.wantSeen(second, time.Now())
			wantSplit(t, second, "none")
		})
	}
}

// TestLeastConnections: a relay that comes second gets every connection until it has as many
// as the first one, and lets nobody in all the same.
func TestLeastConnections(t *testing.T) {
	t.Parallel()
	for _, b := range balancers {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			one, two, public := freeAddr(t), freeAddr(t), freeAddr(t)
			env := pace("1s", "1s", "1m")
			first := publicRelay(t, env, one, public)
			b.startAt(t, public, leastConnections, one, two)
			first.wantCheck("verified")
			keepBinary(t, public, "home")
			for range 5 {
				ph := gorillaLibrary.phone(t, public, "home")
				ph.send("1")
				ph.want("1")
			}

			second := publicRelay(t, env, two, public)
			eventually(t, "the second one has looked", func() bool {
				out := second.output()
				return strings.Contains(out, "another relay serves the public name") || strings.Contains(out, "users are let in")
			})
			if strings.Contains(second.output(), "users are let in") {
				t.Error("the second one lets users in")
			}
			first.stopping = true
			first.signal(syscall.SIGTERM)
			<-first.done
			second.wantCheck("verified")
			eventually(t, "a phone reaches the binary", func() bool { return !ask(t, public, "home").ended })
		})
	}
}
