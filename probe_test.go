package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"
)

// The probe command against relays, and against what is taken for one.

// probeRun is what a probe has shown.
type probeRun struct {
	ok       bool
	report   probeReport
	text     string
	progress string
}

func (r probeRun) step(name string) probeStep {
	for _, s := range r.report.Steps {
		if s.Name == name {
			return s
		}
	}
	return probeStep{}
}

// runSteps probes with text output.
func runSteps(t *testing.T, target string, n int, idle time.Duration, config *tls.Config) probeRun {
	t.Helper()
	base, err := parseProbeURL(target)
	if err != nil {
		t.Fatal(err)
	}
	var out, progress bytes.Buffer
	p := probe{dialer: dialer{base: base, tls: config}, n: n, idle: idle, out: &out, progress: &progress}
	ok := p.run(t.Context())
	return probeRun{ok, p.report, out.String(), progress.String()}
}

func onLocalhost(addr string) string { return "localhost:" + addr[strings.LastIndexByte(addr, ':')+1:] }

// TestProbeGood: every step of a good relay is told, with its figures.
func TestProbeGood(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	r := startRelay(t, testOptions())
	for _, tt := range []struct {
		name, target string
		config       *tls.Config
		steps        map[string]string // what each says
	}{
		{"ws", "ws://" + r.addr, nil, map[string]string{
			"dns": "127.0.0.1 is an address", "tcp": "connected to " + r.addr, "tls": "ws:// has none",
		}},
		{"wss", "wss://" + onLocalhost(startBalancer(t, ca.server(1000*time.Hour, "localhost"), always(r.addr)).addr), ca.client(), map[string]string{
			"dns": "localhost is ", "tcp": "connected to 127.0.0.1:", "tls": "TLS 1.3, certificate good until " + day(time.Now().Add(1000*time.Hour)) + ", for 41 days",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := runSteps(t, tt.target, 5, 50*time.Millisecond, tt.config)
			if !p.ok || !p.report.OK {
				t.Fatalf("a good relay fails:\n%s", p.text)
			}
			for name, want := range map[string]string{
				"upgrade":     "HTTP/1.1 101 Switching Protocols",
				"headers":     "x-pyrycode-relay-instance comes back",
				"claim":       "is taken",
				"join":        "4 of 4 phones reached the binary",
				"round trip":  "of 20",
				"large frame": "200 KiB there and back in ",
				"instances":   "5 of 5 connections reached " + r.id.id,
				"idle":        "survived",
			} {
				tt.steps[name] = want
			}
			var order []string
			for _, s := range p.report.Steps {
				order = append(order, s.Name)
				if want := tt.steps[s.Name]; want == "" || !strings.Contains(s.Detail, want) {
					t.Errorf("step %s says %q, want %q in it", s.Name, s.Detail, want)
				}
				if s.Verdict != stepOK && s.Name != "tls" || s.Remedy != "" {
					t.Errorf("step %s: %+v", s.Name, s)
				}
				if !strings.Contains(p.text, s.Name) || !strings.Contains(p.text, s.Detail) {
					t.Errorf("the text lacks step %s:\n%s", s.Name, p.text)
				}
			}
			if got, want := strings.Join(order, ","), "dns,tcp,tls,upgrade,headers,claim,join,round trip,large frame,instances,idle"; got != want {
				t.Errorf("steps %s, want %s", got, want)
			}
			if rt := p.report.RoundTrip; rt == nil || rt.Min <= 0 || rt.Min > rt.Median || rt.Median > rt.Max {
				t.Errorf("round trip %+v", rt)
			}
			if i := p.report.Instances; len(i) != 1 || i[0].ID != r.id.id || i[0].Started != r.id.started || i[0].Connections != 5 {
				t.Errorf("instances %+v, want 5 connections to %v", i, r.id)
			}
			if !strings.HasSuffix(p.text, "\nThis relay works from here.\n") {
				t.Errorf("the last line is not the verdict:\n%s", p.text)
			}
		})
	}
}

// TestProbeWarns: what works and should be better.
func TestProbeWarns(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	r := startRelay(t, testOptions())
	nameless := startBalancer(t, nil, always(r.addr))
	nameless.reply = without(instanceHeader)
	for _, tt := range []struct {
		name, target         string
		step, detail, remedy string
	}{
		{"a certificate that ends soon", "wss://" + onLocalhost(startBalancer(t, ca.server(13*24*time.Hour, "localhost"), always(r.addr)).addr),
			"tls", "for 12 days", "renew the certificate now"},
		{"a certificate of ninety days with less than a third of them left", "wss://" + onLocalhost(startBalancer(t, ca.serverFor(90*24*time.Hour, 29*24*time.Hour), always(r.addr)).addr),
			"tls", "for 28 days", "renew the certificate now"},
		{"a certificate of six days with less than a third of them left", "wss://" + onLocalhost(startBalancer(t, ca.serverFor(6*24*time.Hour, 47*time.Hour), always(r.addr)).addr),
			"tls", "for 46h", "renew the certificate now"},
		{"no instance header", "ws://" + nameless.addr, "headers", "x-pyrycode-relay-instance", "pass the relay's answer headers on"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := runSteps(t, tt.target, 3, 0, ca.client())
			s := p.step(tt.step)
			if !p.ok || s.Verdict != stepWarn || !strings.Contains(s.Detail, tt.detail) || !strings.Contains(s.Remedy, tt.remedy) {
				t.Errorf("step %s is %+v, want a warning with %q and %q:\n%s", tt.step, s, tt.detail, tt.remedy, p.text)
			}
		})
	}
}

// TestProbeTakesShortCertificates: authorities give some for six days, which are
// renewed when a third of that is left.
func TestProbeTakesShortCertificates(t *testing.T) {
	t.Parallel()
	const day = 24 * time.Hour
	ca := newAuthority(t)
	r := startRelay(t, testOptions())
	for _, tt := range []struct{ life, left time.Duration }{{6 * day, 5 * day}, {6 * day, 49 * time.Hour}, {45 * day, 16 * day}, {90 * day, 31 * day}} {
		p := runSteps(t, "wss://"+onLocalhost(startBalancer(t, ca.serverFor(tt.life, tt.left), always(r.addr)).addr), 2, 0, ca.client())
		if s := p.step("tls"); !p.ok || s.Verdict != stepOK || s.Remedy != "" {
			t.Errorf("a certificate of %v with %v left: %+v", tt.life, tt.left, s)
		}
	}
}

// TestProbeWaitsForItsTurn: the relay's rate limit is waited for, and said so.
func TestProbeWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	o := defaultOptions()
	o.ratePerMinute, o.rateBurst = 60, 2
	r := startRelay(t, o)
	p := runSteps(t, "ws://"+r.addr, 3, 0, nil)
	if !p.ok || !strings.Contains(p.step("join").Detail, "2 of 2") {
		t.Errorf("rate limited, and:\n%s", p.text)
	}
	refused := r.metrics.upgrades[rolePhone][upgradeRateLimited].Load()
	if refused > 1 {
		t.Errorf("refused %d times: it does not wait", refused)
	}
	if (refused > 0) != strings.Contains(p.progress, "waiting 1s for the next") {
		t.Errorf("progress: %q", p.progress)
	}
}

// TestProbeLeavesHalfTheBurst: everybody behind one address shares its burst. A
// probe leaves half of it, so that two in a row do not wait.
func TestProbeLeavesHalfTheBurst(t *testing.T) {
	t.Parallel()
	o := defaultOptions()
	o.ratePerMinute = 1 // nothing comes back meanwhile
	r := startRelay(t, o)
	for i := range 2 {
		var out, progress bytes.Buffer
		if code := run(t.Context(), []string{"probe", "ws://" + r.addr}, nil, &out, &progress); code != exitStopped || progress.Len() > 0 {
			t.Errorf("probe %d: exit code %d, progress %q:\n%s", i+1, code, progress.String(), out.String())
		}
		used := r.metrics.upgrades[roleBinary][upgradeAccepted].Load() + r.metrics.upgrades[rolePhone][upgradeAccepted].Load()
		if most := int64((i + 1) * o.rateBurst / 2); used > most {
			t.Errorf("after probe %d: %d upgrades were asked for, want %d at most", i+1, used, most)
		}
	}
}

func TestProbeCommand(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	dead := deadAddr(t)
	for _, tt := range []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string
	}{
		{"good", []string{"-n", "2", "ws://" + r.addr}, 0, "This relay works from here.", ""},
		{"bad", []string{"ws://" + dead}, 1, "FAIL     tcp", ""},
		{"flags behind the url", []string{"http://" + r.addr + "/", "-n", "3"}, 0, "3 of 3 connections", ""},
		{"no url", nil, 2, "", "wants the URL of a relay"},
		{"two urls", []string{"ws://a", "ws://b"}, 2, "", `"ws://b" is one more`},
		{"a path", []string{"wss://relay.test/v2/client"}, 2, "", "and no path"},
		{"another scheme", []string{"ftp://relay.test"}, 2, "", "want wss://host"},
		{"one connection", []string{"-n", "1", "ws://a"}, 2, "", "want a whole number from 2 to 1000"},
		{"no such flag", []string{"-q", "ws://a"}, 2, "", "-q"},
		{"bad idle", []string{"ws://a", "-idle", "long"}, 2, "", "want a duration"},
		{"help", []string{"-h"}, 0, "-idle", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out, errs bytes.Buffer
			code := run(t.Context(), append([]string{"probe"}, tt.args...), nil, &out, &errs)
			if code != tt.code || !strings.Contains(out.String(), tt.stdout) || !strings.Contains(errs.String(), tt.stderr) {
				t.Errorf("exit code %d, want %d; stdout:\n%s\nstderr:\n%s", code, tt.code, out.String(), errs.String())
			}
			if tt.code == 2 && (out.Len() > 0 || strings.Count(errs.String(), "\n") != 1) {
				t.Errorf("wrong use is not one line on stderr: %q, %q", out.String(), errs.String())
			}
		})
	}
}

func TestParseProbeURL(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"wss://relay.test":       "wss://relay.test",
		"relay.test":             "wss://relay.test",
		"relay.test:8443":        "wss://relay.test:8443",
		"https://relay.test/":    "wss://relay.test",
		"http://127.0.0.1:8080":  "ws://127.0.0.1:8080",
		"ws://[::1]:8080":        "ws://[::1]:8080",
		"wss://user@relay.test":  "",
		"wss://relay.test/?a=b":  "",
		"":                       "",
		"://":                    "",
		"wss://relay.test/v2":    "",
		"wss://relay.test#piece": "",
	} {
		got := ""
		if u, err := parseProbeURL(in); err == nil {
			got = u.String()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// TestProbeJSON: one object on stdout, whatever happens.
func TestProbeJSON(t *testing.T) {
	t.Parallel()
	a, b := startRelay(t, testOptions()), startRelay(t, testOptions())
	for _, tt := range []struct {
		name, addr string
		code       int
		counts     []int
		steps      int
		failed     []string
	}{
		{"good", a.addr, 0, []int{4}, 11, nil},
		{"two relays", startBalancer(t, nil, inTurn(a.addr, b.addr)).addr, 1, []int{2, 2}, 11, []string{"join", "instances"}},
		{"nothing", deadAddr(t), 1, nil, 2, []string{"tcp"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out, errs bytes.Buffer
			if code := run(t.Context(), []string{"probe", "-json", "-n", "4", "ws://" + tt.addr}, nil, &out, &errs); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			var got struct {
				URL   string `json:"url"`
				OK    *bool  `json:"ok"`
				Steps []struct{ Step, Verdict, Detail, Remedy string }
				Inst  []struct {
					Instance    string
					Started     time.Time
					Connections int
				} `json:"instances"`
			}
			d := json.NewDecoder(&out)
			if err := d.Decode(&got); err != nil || d.More() {
				t.Fatalf("not one object: %v", err)
			}
			if got.URL != "ws://"+tt.addr || got.OK == nil || *got.OK != (tt.code == 0) || len(got.Steps) != tt.steps || got.Inst == nil {
				t.Errorf("%+v", got)
			}
			var counts []int
			for _, i := range got.Inst {
				counts = append(counts, i.Connections)
				if i.Instance != a.id.id && i.Instance != b.id.id || i.Started.IsZero() {
					t.Errorf("instance %+v", i)
				}
			}
			var failed []string
			for _, s := range got.Steps {
				if s.Verdict == "fail" {
					failed = append(failed, s.Step)
				}
			}
			if !slices.Equal(counts, tt.counts) || !slices.Equal(failed, tt.failed) {
				t.Errorf("connections %v, want %v; failed %v, want %v", counts, tt.counts, failed, tt.failed)
			}
		})
	}
}

// TestProbeProgress: on a terminal the line that says what is done is
// overwritten, and gone before a verdict is shown.
func TestProbeProgress(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	base, err := parseProbeURL("ws://" + r.addr)
	if err != nil {
		t.Fatal(err)
	}
	var screen bytes.Buffer
	p := probe{dialer: dialer{base: base}, n: 3, out: &screen, progress: &screen, live: true}
	if !p.run(t.Context()) {
		t.Error("a good relay fails")
	}
	if !strings.Contains(screen.String(), "… connection 3 of 3") {
		t.Errorf("no progress: %q", screen.String())
	}
	for line := range strings.Lines(screen.String()) {
		if i := strings.LastIndex(line, "\x1b[K"); i >= 0 {
			line = line[i+len("\x1b[K"):]
		}
		if strings.Contains(line, "…") {
			t.Errorf("progress stays on the screen: %q", line)
		}
	}
}
