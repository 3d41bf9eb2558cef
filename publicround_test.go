package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"testing"
	"time"
)

// The check of the public name against real relays, through a balancer.

// lookFrom makes one round as r does, through addr.
func lookFrom(t *testing.T, r *testRelay, addr string, joins int) roundResult {
	t.Helper()
	p := &publicPath{me: r.id, standing: r.standing, keys: r.probes, dialer: dialer{base: &url.URL{Scheme: "ws", Host: addr}}}
	f := p.round(t.Context(), joins)
	r.probes.serverIDs.Range(func(nonce, id any) bool {
		t.Errorf("the nonce %v for %v outlives its round", nonce, id)
		return true
	})
	return f
}

// deadAddr is an address where nothing listens.
func deadAddr(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func webServer(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func TestPublicRound(t *testing.T) {
	t.Parallel()
	nginx := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Server", "nginx")
			w.WriteHeader(status)
		}
	}
	type pair struct {
		me, other *testRelay
	}
	tests := []struct {
		name  string
		start func(t *testing.T, p pair) string // the public address
		want  publicVerdict
		other bool   // is named
		what  string // is in the fault
		some  bool   // of the phones fail
	}{
		{name: "alone", want: publicVerified, start: func(t *testing.T, p pair) string { return p.me.addr }},
		{name: "one backend", want: publicVerified, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, always(p.me.addr)).addr
		}},
		{name: "round robin", want: publicSplit, other: true, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, inTurn(p.me.addr, p.other.addr)).addr
		}},
		{name: "round robin, the claim elsewhere", want: publicSplit, other: true, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, inTurn(p.other.addr, p.me.addr)).addr
		}},
		{name: "one phone in nine", want: publicSplit, other: true, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, func(n int, _ string) string {
				if n == 8 {
					return p.other.addr
				}
				return p.me.addr
			}).addr
		}},
		{name: "one claim elsewhere, its phones here", want: publicSplit, other: true, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, func(n int, _ string) string {
				if n == 0 {
					return p.other.addr
				}
				return p.me.addr
			}).addr
		}},
		{name: "sticky by server-id", want: publicVerified, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, byServer(p.me.addr, p.other.addr)).addr
		}},
		{name: "another relay only", want: publicSplit, other: true, start: func(t *testing.T, p pair) string { return p.other.addr }},
		{name: "another relay, and otherwise nothing", want: publicSplit, other: true, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, inTurn("", p.other.addr)).addr
		}},
		{name: "a web server", want: publicNotARelay, what: `"HTTP/1.1 404 Not Found" (server: "nginx")`, start: func(t *testing.T, p pair) string {
			return webServer(t, nginx(404))
		}},
		{name: "a proxy without a relay", want: publicNotARelay, what: "does not reach a relay", start: func(t *testing.T, p pair) string {
			return webServer(t, nginx(502))
		}},
		{name: "one backend of two is no relay", want: publicNotARelay, what: "502", some: true, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, inTurn(p.me.addr, webServer(t, nginx(502)))).addr
		}},
		{name: "another relay beats a web server", want: publicSplit, other: true, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, inTurn(p.me.addr, webServer(t, nginx(502)), p.other.addr)).addr
		}},
		{name: "nothing", want: publicUnreachable, what: "connection refused", start: func(t *testing.T, p pair) string { return deadAddr(t) }},
		{name: "one backend of two is gone", want: publicUnreachable, what: "no HTTP answer", some: true, start: func(t *testing.T, p pair) string {
			return startBalancer(t, nil, inTurn(p.me.addr, "")).addr
		}},
		{name: "a proxy that drops the upgrade", want: publicUnreachable, what: "no upgrade was asked for", start: func(t *testing.T, p pair) string {
			b := startBalancer(t, nil, always(p.me.addr))
			b.request = without("Upgrade")
			return b.addr
		}},
		{name: "a proxy that drops headers", want: publicUnreachable, what: "x-pyrycode-version is missing", start: func(t *testing.T, p pair) string {
			b := startBalancer(t, nil, always(p.me.addr))
			b.request = without("X-Pyrycode-Version")
			return b.addr
		}},
		{name: "the header is taken away", want: publicVerified, start: func(t *testing.T, p pair) string {
			b := startBalancer(t, nil, always(p.me.addr))
			b.reply = without(instanceHeader)
			return b.addr
		}},
		{name: "the header is taken away, round robin", want: publicSplit, start: func(t *testing.T, p pair) string {
			b := startBalancer(t, nil, inTurn(p.me.addr, p.other.addr))
			b.reply = without(instanceHeader)
			return b.addr
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := pair{startRelay(t, testOptions()), startRelay(t, testOptions())}
			f := lookFrom(t, p.me, tt.start(t, p), firstJoins)
			if f.verdict != tt.want {
				t.Errorf("verdict %v (%+v), want %v", f.verdict, f, tt.want)
			}
			switch {
			case !tt.other && len(f.others) > 0:
				t.Errorf("others are %v, want none named", f.others)
			case tt.other && (len(f.others) != 1 || f.others[0].identity != p.other.id):
				t.Errorf("others are %v, want %v", f.others, p.other.id)
			case tt.other:
				o := f.others[0]
				if older := o.theirs.age - o.mine.age; !o.told || o.theirs.age < 0 || older < -time.Second || older > time.Second || o.theirs.users || o.mine.users {
					t.Errorf("the other is seen as %+v", o)
				}
			}
			if !strings.Contains(f.diagnosis.what, tt.what) || (tt.what == "") != (f.diagnosis.what == "") {
				t.Errorf("found %q, want %q in it", f.diagnosis.what, tt.what)
			}
			if some := f.failed > 0 && f.failed < f.joins; tt.want != publicSplit && some != tt.some {
				t.Errorf("%d of %d phones failed", f.failed, f.joins)
			}
			if tt.want == publicVerified && f.joins != firstJoins {
				t.Errorf("%d phones joined, want %d", f.joins, firstJoins)
			}
			p.me.settle("the round's end", func() bool { return p.me.count(roleBinary)+p.me.count(rolePhone) == 0 })
		})
	}
}

// TestStanding: what a relay says of its own is read as it was meant, by older
// relays as before, and by later ones with more words.
func TestStanding(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	heard := func() (identity, standing) {
		t.Helper()
		_, resp, err := r.dial("/v2/client", phoneHeaders("nobody"))
		if err != nil {
			t.Fatal(err)
		}
		a := &answer{header: resp.Header}
		id, known := a.identity() // as older relays read it
		s, told := a.standing()
		if !known || !told {
			t.Fatalf("%v", resp.Header)
		}
		return id, s
	}
	id, s := heard()
	if id != r.id || s.age < 0 || s.age > time.Since(r.started)+time.Millisecond || s.users || s.yields {
		t.Errorf("%v, %+v", id, s)
	}
	eventually(t, "the age grows", func() bool { _, now := heard(); return now.age > s.age })
	r.binary(probePrefix + "of-another-relay")
	if _, s := heard(); s.users {
		t.Error("a probe counts as a user")
	}
	b := r.binary("somebody")
	r.instance.yields.Store(true)
	if _, s := heard(); !s.users || !s.yields {
		t.Errorf("with a user, about to leave: %+v", s)
	}
	b.close(1000, "")
	r.settle("grace", func() bool { return r.metrics.binariesInGrace.Load() == 1 })
	if _, s := heard(); !s.users {
		t.Error("a user's claim in grace does not count")
	}
	for text, want := range map[string]standing{
		"0.5":                      {age: 500 * time.Millisecond},
		"259200.000, users":        {age: 72 * time.Hour, users: true},
		"1, later, yields,users,x": {age: time.Second, users: true, yields: true},
	} {
		if got, err := parseStanding(text); err != nil || got != want {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "users", "-1", "NaN", "Inf", "1e300", "1s", ", users"} {
		if got, err := parseStanding(text); err == nil {
			t.Errorf("%q is read as %+v", text, got)
		}
	}
}

// TestPublicRoundFull: a relay that has no place left refuses its own check as
// well, and says by whom that is.
func TestPublicRoundFull(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.maxConnections = 1
	r := startRelay(t, o)
	r.binary("somebody")
	if f := lookFrom(t, r, r.addr, firstJoins); f.verdict != publicVerified || f.joins != firstJoins {
		t.Errorf("%+v", f)
	}
}

// TestPublicRoundIsNoUser: the relay's own check is in no count and under no
// rate limit.
func TestPublicRoundIsNoUser(t *testing.T) {
	t.Parallel()
	o := defaultOptions()
	o.ratePerMinute, o.rateBurst = 1, 1
	r := startRelay(t, o)
	var most int64
	b := startBalancer(t, nil, func(int, string) string {
		most = max(most, r.metrics.connectedBinaries.Load(), r.metrics.connectedPhones.Load(), r.metrics.binariesInGrace.Load())
		return r.addr
	})
	f := lookFrom(t, r, b.addr, firstJoins)
	if f.verdict != publicVerified {
		t.Fatalf("%+v", f)
	}
	r.settle("the round's end", func() bool { return r.count(roleBinary)+r.count(rolePhone) == 0 })
	if most != 0 {
		t.Errorf("a gauge stood at %d meanwhile", most)
	}
	for role := range roleCount {
		for o := range upgradeOutcomeCount {
			if n := r.metrics.upgrades[role][o].Load(); n != 0 {
				t.Errorf("%d upgrades of a %v are counted as %v", n, role, o)
			}
		}
		for reason := range closeReasonCount {
			if n := r.metrics.closes[role][reason].Load(); n != 0 {
				t.Errorf("%d ends of a %v are counted as %v", n, role, reason)
			}
		}
	}
	for line := range strings.Lines(r.logs.String()) {
		if strings.Contains(line, "probe-") && !strings.Contains(line, "level=DEBUG") {
			t.Errorf("a round that went well is in the log: %s", line)
		}
	}
	// The one token of this address is still there.
	r.binary("somebody")
}

// TestProbeNonce: only this process's own nonces, each once and for its
// server-id, exempt anybody from anything.
func TestProbeNonce(t *testing.T) {
	t.Parallel()
	o := defaultOptions()
	o.ratePerMinute, o.rateBurst = 1, 1
	r := startRelay(t, o)
	other := startRelay(t, testOptions())
	ask := func(id, nonce string) int {
		t.Helper()
		h := binaryHeaders(id)
		h.Set(probeHeader, nonce)
		_, resp, err := r.dial("/v2/server", h)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
	if got := ask("spends-the-token", ""); got != 101 {
		t.Fatalf("the first of an address: %d", got)
	}
	foreign, mine, elsewhere, revoked := other.probes.issue("mine"), r.probes.issue("mine"), r.probes.issue("elsewhere"), r.probes.issue("revoked")
	r.probes.withdraw(revoked)
	for _, tt := range []struct {
		name, id, nonce string
		want            int
	}{
		{"made up", "mine", "AAAAAAAAAAAAAAAAAAAAAAAAAA", 429},
		{"of another process", "mine", foreign, 429},
		{"for another server-id", "mine", elsewhere, 429},
		{"of an upgrade that was answered", "revoked", revoked, 429},
		{"good", "mine", mine, 101},
		{"used up", "mine", mine, 429},
	} {
		if got := ask(tt.id, tt.nonce); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
	if got := r.metrics.upgrades[roleBinary][upgradeAccepted].Load(); got != 1 {
		t.Errorf("%d upgrades are counted as accepted, want the one that is a user's", got)
	}
	if got := r.metrics.connectedBinaries.Load(); got != 1 {
		t.Errorf("%d binaries are counted, want the one that is a user's", got)
	}
}

// TestStopDuringCheck is not parallel: it looks for goroutines by name.
func TestStopDuringCheck(t *testing.T) {
	for _, stage := range []string{"no answer to the upgrade", "claim held, no answer to a phone", "between rounds"} {
		t.Run(stage, func(t *testing.T) {
			r := startRelay(t, testOptions())
			silent, err := net.Listen("tcp", "127.0.0.1:0") // the kernel accepts, nobody reads
			if err != nil {
				t.Fatal(err)
			}
			defer silent.Close()
			reached := make(chan struct{}, 100)
			b := startBalancer(t, nil, func(n int, _ string) string {
				reached <- struct{}{}
				switch {
				case stage == "between rounds", stage == "claim held, no answer to a phone" && n == 0:
					return r.addr
				}
				return silent.Addr().String()
			})
			o := r.o
			o.publicURL = &url.URL{Scheme: "ws", Host: b.addr}
			o.checkPace = checkPace{every: time.Hour, again: time.Millisecond, over: time.Hour}
			c := startPublicCheck(o, r.relay)
			<-reached
			switch stage {
			case "claim held, no answer to a phone":
				<-reached
			case "between rounds":
				eventually(t, "the first verdict", func() bool { return r.instance.verdict().String() == "verified" })
			}
			stopped := make(chan struct{})
			go func() {
				defer close(stopped)
				c.stop()
			}()
			select {
			case <-stopped:
			case <-time.After(patience):
				t.Fatal("the check does not stop")
			}
			wantNoCheck(t)
			r.stop()
		})
	}
}

func wantNoCheck(t *testing.T) {
	t.Helper()
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for _, method := range []string{"(*wsPeer)", "(*publicPath)", "(*publicCheck)"} {
		if bytes.Contains(stacks, []byte(method)) {
			t.Errorf("a goroutine in a method of %s is left", method)
		}
	}
}

// TestProgramStopsItsCheck is not parallel: it looks for goroutines by name.
func TestProgramStopsItsCheck(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ctx, cancel := context.WithCancel(t.Context())
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, []string{"-listen", "127.0.0.1:0", "-admin", "off", "-instance-lock", deadAddr(t), "-public-url", "ws://" + silent.Addr().String()},
			map[string]string{paceName: "1h,1ms,1h"}, io.Discard, io.Discard)
	}()
	nc, err := silent.Accept() // a round is under way
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	cancel()
	if got := <-code; got != exitStopped {
		t.Errorf("exit code %d", got)
	}
	wantNoCheck(t)
}

// TestYoungerRelayLeaves runs a whole program behind a round robin with a relay
// that was there before.
func TestYoungerRelayLeaves(t *testing.T) {
	t.Parallel()
	for _, bypass := range []bool{false, true} {
		t.Run(fmt.Sprintf("bypass %v", bypass), func(t *testing.T) {
			t.Parallel()
			first := startRelay(t, testOptions())
			var program string // guarded by the balancer's lock
			b := startBalancer(t, nil, func(n int, _ string) string {
				if program == "" || n%2 == 0 {
					return first.addr
				}
				return program
			})
			o := first.o
			o.publicURL = &url.URL{Scheme: "ws", Host: b.addr}
			o.checkPace = checkPace{every: 40 * time.Millisecond, again: 20 * time.Millisecond, over: 600 * time.Millisecond}
			c := startPublicCheck(o, first.relay)
			defer c.stop()

			// The program says that it has run for days, which is a matter of its clock;
			// only the first has users.
			env := map[string]string{paceName: "40ms,20ms,600ms,-72h"}
			first.binary("somebody")
			if bypass {
				env[bypassName] = "1"
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var logs logBuffer
			code := make(chan int, 1)
			go func() {
				code <- run(ctx, []string{"-listen", "127.0.0.1:0", "-admin", "off", "-instance-lock", deadAddr(t), "-public-url", "ws://" + b.addr},
					env, io.Discard, &logs)
			}()
			var addr string
			eventually(t, "the program listens", func() bool {
				_, rest, ok := strings.Cut(logs.String(), "msg=listening addr=")
				addr, _, _ = strings.Cut(rest, " ")
				return ok
			})
			health := func() string {
				resp, err := http.Get("http://" + addr + "/healthz")
				if err != nil {
					return err.Error()
				}
				defer resp.Body.Close()
				body, _ := io.ReadAll(resp.Body)
				return string(body)
			}
			b.mu.Lock()
			program = addr
			b.mu.Unlock()
			if !bypass {
				select {
				case got := <-code:
					if got != exitRefused {
						t.Errorf("exit code %d, want %d", got, exitRefused)
					}
				case <-time.After(patience):
					t.Fatalf("the younger relay goes on:\n%s", logs.String())
				}
				for _, want := range []string{"level=ERROR", "refusing to go on: multi-instance deploy detected: relay " + first.id.id, "silent 4404"} {
					if !strings.Contains(logs.String(), want) {
						t.Errorf("its log lacks %q:\n%s", want, logs.String())
					}
				}
				b.mu.Lock()
				program = ""
				b.mu.Unlock()
				eventually(t, "the older relay is alone again", func() bool { return first.instance.verdict().String() == "verified" })
				return
			}
			eventually(t, "both report the split", func() bool {
				return first.instance.verdict().String() == "split" && strings.Contains(health(), `"instance_check":"split"`)
			})
			// Long enough that it would have left without the bypass.
			seen := first.metrics.upgrades[roleBinary][upgradeAccepted].Load()
			eventually(t, "ten more claims of the program's check", func() bool {
				return first.metrics.upgrades[roleBinary][upgradeAccepted].Load() >= seen+10
			})
			cancel()
			if got := <-code; got != exitStopped {
				t.Errorf("exit code %d, want %d", got, exitStopped)
			}
		})
	}
}

func TestBadPaceIsRefused(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	code := run(t.Context(), []string{"-listen", "127.0.0.1:0"}, map[string]string{paceName: "soon"}, io.Discard, &stderr)
	if code != exitRefused || !strings.Contains(stderr.String(), paceName) {
		t.Errorf("exit code %d, %q", code, stderr.String())
	}
}
