package main

import (
	"fmt"
	"maps"
	"net/http/httptest"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
)

// What /metrics says, and that it counts right.

var sampleLine = regexp.MustCompile(`^pyrycode_relay_([a-z_]+(?:\{(?:[a-z]+="[^"]*",?)+\})?) ([0-9.]+)$`)

// samples reads an exposition: series, without the prefix, to value.
func samples(t testing.TB, text string) map[string]float64 {
	t.Helper()
	all := map[string]float64{}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil {
			t.Fatalf("not a sample: %s", line)
		}
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if _, twice := all[m[1]]; twice {
			t.Errorf("%s is there twice", m[1])
		}
		all[m[1]] = v
	}
	return all
}

// events are the samples that count what has happened, and are not 0.
func events(t testing.TB, m *metrics) map[string]float64 {
	t.Helper()
	some := samples(t, string(m.text()))
	maps.DeleteFunc(some, func(series string, v float64) bool {
		name, _, _ := strings.Cut(series, "{")
		switch name {
		case "frames_forwarded_total", "forwarded_bytes_total", "upgrades_total", "closes_total", "dropped_envelopes_total",
			"connected_binaries", "binaries_in_grace", "connected_phones":
			return v == 0
		}
		return true
	})
	return some
}

func wantEvents(t testing.TB, r *testRelay, want map[string]float64) {
	t.Helper()
	var got map[string]float64
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if got = events(t, r.metrics); maps.Equal(got, want) {
			return
		}
	}
	for series := range want {
		if got[series] != want[series] {
			t.Errorf("%s is %v, want %v", series, got[series], want[series])
		}
		delete(got, series)
	}
	if len(got) > 0 {
		t.Errorf("not expected: %v", got)
	}
}

// Every series is there before anything has happened.
func TestMetricsBeginAtZero(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	got := samples(t, string(r.metrics.text()))
	var zero []string
	add := func(format string, args ...any) { zero = append(zero, fmt.Sprintf(format, args...)) }
	for _, name := range []string{"connected_binaries", "binaries_in_grace", "connected_phones", "queued_bytes", "socket_reads_total", "socket_writes_total", "log_lines_lost_total"} {
		add("%s", name)
	}
	for _, direction := range []string{"up", "down"} {
		add("frames_forwarded_total{direction=%q}", direction)
		add("forwarded_bytes_total{direction=%q}", direction)
	}
	for _, endpoint := range []string{"server", "client"} {
		for o := range upgradeOutcomeCount {
			add("upgrades_total{endpoint=%q,outcome=%q}", endpoint, o.String())
		}
	}
	for role := range roleCount {
		for why := range closeReasonCount {
			add("closes_total{leg=%q,reason=%q}", role.String(), why.String())
		}
	}
	for why := range dropReasonCount {
		add("dropped_envelopes_total{reason=%q}", why.String())
	}
	for _, check := range []string{`{check="host",verdict="bypassed"}`, `{check="public",verdict="pending"}`, `{check="public",verdict="verified"}`,
		`{check="public",verdict="split"}`, `{check="public",verdict="not-a-relay"}`, `{check="public",verdict="unreachable"}`} {
		add("instance_check%s", check)
	}
	for _, series := range zero {
		if v, ok := got[series]; !ok || v != 0 {
			t.Errorf("%s is %v (there: %v), want 0", series, v, ok)
		}
		delete(got, series)
	}

	build := r.build
	for series, want := range map[string]float64{
		`instance_check{check="host",verdict="held"}`:  1,
		`instance_check{check="public",verdict="off"}`: 1,
		"queued_bytes_limit":                           float64(r.o.queueTotal),
		"start_time_seconds":                           float64(r.id.started.UnixMilli()) / 1000,
		fmt.Sprintf("build_info{version=%q,revision=%q,goversion=%q,instance=%q}", build.version, build.revision, runtime.Version(), r.id.id): 1,
	} {
		if v, ok := got[series]; !ok || v != want {
			t.Errorf("%s is %v (there: %v), want %v", series, v, ok, want)
		}
		delete(got, series)
	}

	alive := []string{"goroutines", "memory_limit_bytes"}
	if runtime.GOOS == "linux" {
		alive = append(alive, "resident_memory_bytes", "open_files")
	}
	for _, series := range alive {
		if got[series] < 1 {
			t.Errorf("%s is %v, want more", series, got[series])
		}
		delete(got, series)
	}
	if len(got) > 0 {
		t.Errorf("without a test: %v", got)
	}
}

func TestMetricsCount(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		b, one, id := r.pair("s")
		other := r.phone("s")
		otherID := other.greet(b)
		one.text(`[1, 2, 3]`)
		b.envelope()
		b.send(id, `{"x":1}`)
		b.send(id, `{"x":2}`)
		b.text(`{"conn_id":"` + otherID + `","frame":"bye","close_code":4401}`)
		other.wantEnd(4401, "")
		want := map[string]float64{
			"connected_binaries": 1, "connected_phones": 1,
			`upgrades_total{endpoint="server",outcome="accepted"}`: 1,
			`upgrades_total{endpoint="client",outcome="accepted"}`: 2,
			`frames_forwarded_total{direction="up"}`:               3,
			`forwarded_bytes_total{direction="up"}`:                7 + 7 + 9,
			`frames_forwarded_total{direction="down"}`:             3,
			`forwarded_bytes_total{direction="down"}`:              7 + 7 + 5,
			`closes_total{leg="phone",reason="closed by binary"}`:  1,
		}
		wantEvents(t, r, want)

		for i, envelope := range []string{
			`nope`, `{"frame":1}`, `{"conn_id":"nobody","frame":1}`, `{"conn_id":"` + id + `"}`, `{"conn_id":"` + id + `","frame":1,"close_code":1006}`, `{"push_wake":{}}`,
		} {
			for range i + 1 {
				b.text(envelope)
			}
			want[fmt.Sprintf("dropped_envelopes_total{reason=%q}", dropReason(i))] = float64(i + 1)
		}
		wantEvents(t, r, want)

		r.phone("nobody").wantEnd(4404, "server-id never seen")
		want[`upgrades_total{endpoint="client",outcome="accepted"}`]++
		want[`closes_total{leg="phone",reason="server-id never seen"}`]++
		blank := binaryHeaders("s")
		blank.Set("User-Agent", " ")
		if _, resp, err := r.dial("/v2/server", blank); err != nil || resp.StatusCode != 400 {
			t.Fatalf("without a user-agent: %v, %v", resp, err)
		}
		want[`upgrades_total{endpoint="server",outcome="bad header"}`]++
		if resp, _ := r.ask(append(get("/v2/client"), "X-Pyrycode-Server: s", "User-Agent: x")...); resp.StatusCode != 426 {
			t.Fatalf("without an upgrade: %s", resp.Status)
		}
		want[`upgrades_total{endpoint="client",outcome="bad handshake"}`]++
		one.text(`1 2`)
		one.wantEnd(1007, "not one json value")
		b.wantNotice(id, 1007)
		want[`closes_total{leg="phone",reason="not one json value"}`]++
		delete(want, "connected_phones")
		wantEvents(t, r, want)

		b.close(1000, "")
		b.wantEnd(1000, "")
		delete(want, "connected_binaries")
		want["binaries_in_grace"]++
		want[`closes_total{leg="binary",reason="closed by peer"}`]++
		wantEvents(t, r, want)

		r.draining.Store(true)
		if _, resp, err := r.dial("/v1/client", phoneHeaders("s")); err != nil || resp.StatusCode != 503 {
			t.Fatalf("while draining: %v, %v", resp, err)
		}
		want[`upgrades_total{endpoint="client",outcome="draining"}`]++
		wantEvents(t, r, want)
	})
}

// A phone that does not read leaves bytes in its queue, and takes them along.
func TestMetricsQueuedBytes(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	b, _, id := r.pair("s")
	queued := func() float64 { return samples(t, string(r.metrics.text()))["queued_bytes"] }
	frame := `"` + strings.Repeat("x", 200<<10) + `"`
	for sent := 0; queued() == 0; sent++ {
		if sent == 1000 {
			t.Fatal("after 200 MiB to a phone that does not read nothing is queued")
		}
		b.send(id, frame)
	}
	b.text(`{"conn_id":"` + id + `","frame":null,"close_code":4401}`)
	r.abortAll()
	eventually(t, "the queue is given back", func() bool { return queued() == 0 })
}

func TestMetricsPage(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	w := httptest.NewRecorder()
	r.metrics.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if ct := w.Header().Get("Content-Type"); w.Code != 200 || ct != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("/metrics: %d, %s", w.Code, ct)
	}
	if len(samples(t, w.Body.String())) == 0 {
		t.Error("/metrics has no samples")
	}
}

func TestPromtoolHasNothingToSay(t *testing.T) {
	t.Parallel()
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed; it comes with Debian's prometheus package")
	}
	r := startRelay(t, testOptions())
	r.pair("s")
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(string(r.metrics.text()))
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}
