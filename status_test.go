package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// adminServer serves r's admin pages on loopback.
func adminServer(t *testing.T, r *testRelay) string {
	t.Helper()
	return webServer(t, r.admin())
}

// getStatus reads /status.json into the type of the program, which has to have every member of it.
func getStatus(t *testing.T, addr string) (s statusReport) {
	t.Helper()
	_, body := fetch(t, "http://"+addr+"/status.json")
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		t.Fatalf("%v in %s", err, body)
	}
	return s
}

// TestStatusHeaders: the page runs what is in it, loads nothing, and no answer is kept.
func TestStatusHeaders(t *testing.T) {
	t.Parallel()
	addr := adminServer(t, startRelay(t, testOptions()))
	var page, policy string
	for path, kind := range map[string]string{
		"/": "text/html; charset=utf-8", "/status.json": "application/json", "/healthz": "application/json",
		"/readyz": "text/plain; charset=utf-8", "/metrics": "text/plain; version=0.0.4; charset=utf-8",
	} {
		resp, err := http.Get("http://" + addr + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		want := map[string]string{"Content-Type": kind, "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
			"Referrer-Policy": "no-referrer"}
		for name, value := range want {
			if got := resp.Header.Get(name); got != value {
				t.Errorf("%s: %s is %q, want %q", path, name, got, value)
			}
		}
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("%s: %s, %v", path, resp.Status, err)
		}
		if path == "/" {
			page, policy = string(body), resp.Header.Get("Content-Security-Policy")
		}
	}

	directives := map[string]string{}
	for d := range strings.SplitSeq(policy, "; ") {
		name, value, _ := strings.Cut(d, " ")
		directives[name] = value
	}
	want := map[string]string{
		"default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'", "form-action": "'none'",
		"frame-ancestors": "'none'", "require-trusted-types-for": "'script'",
	}
	for _, element := range []string{"style", "script"} {
		found := regexp.MustCompile(`(?s)<`+element+`\b([^>]*)>(.*?)</`+element+`>`).FindAllStringSubmatch(page, -1)
		if len(found) != 1 || found[0][1] != "" || len(found[0][2]) < 1000 {
			t.Fatalf("the page has %d elements %s, want one without attributes", len(found), element)
		}
		sum := sha256.Sum256([]byte(found[0][2]))
		want[element+"-src"] = "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	if !maps.Equal(directives, want) {
		t.Errorf("the policy is %q, want %q", directives, want)
	}
	outside := regexp.MustCompile(`(?i)(\bstyle=|\bon\w+=|\bsrc=|url\(|@import|innerHTML|//[a-z])`)
	for _, line := range strings.Split(page, "\n") {
		line = strings.ReplaceAll(line, "http://www.w3.org/2000/svg", "") // a name, which nobody asks
		if found := outside.FindString(line); found != "" {
			t.Errorf("the page has %q in %s", found, line)
		}
	}
	if n := len(page); n > 16<<10 {
		t.Errorf("the page has %d bytes", n)
	}
}

// TestStatusReport: what has happened is in /status.json, under these names.
func TestStatusReport(t *testing.T) {
	t.Parallel()
	o := testOptions()
	o.maxPhones = 1
	onEach(t, o, func(t *testing.T, r *testRelay) {
		start := time.Now()
		addr := adminServer(t, r)
		const id = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
		b, ph, connID := r.pair(id)
		b.send(connID, `"four"`)
		ph.message()
		r.phone(id).wantEnd(4429, "")
		r.phone("nobody").wantEnd(4404, "")
		other := r.binary("x")
		other.close(4001, "")
		other.wantEnd(4001, "")
		ph.close(3001, "secret")
		ph.wantEnd(3001, "")
		eventually(t, "four ends", func() bool { return len(getStatus(t, addr).Closed) == 4 })

		s := getStatus(t, addr)
		if !s.OK || s.Status != "ok" || s.Binaries != 1 || s.Phones != 0 || s.InGrace != 1 || s.Connections != 1 || s.Check != "off" ||
			s.HostCheck != "held" || s.Summary != "all is well: this is the only relay on this host" || s.Instance != r.id.id ||
			s.MaxConnections != o.maxConnections || s.MaxQueued != o.queueTotal || len(s.Warnings) != 0 {
			t.Errorf("got %+v", s)
		}
		if n := s.Refusals; n["too many phones"] != 1 || n["server-id never seen"] != 1 || n["rate limited"] != 0 || len(n) != 11 {
			t.Errorf("refusals are %v", s.Refusals)
		}
		got := map[string]string{}
		for _, c := range s.Closed {
			if age, most := time.Since(c.Ended), time.Since(start); age < 0 || age > most || c.Duration < 0 || c.Duration > most.Milliseconds() {
				t.Errorf("ended %v ago, after %d ms, in a test of %v", age, c.Duration, most)
			}
			got[fmt.Sprint(c.Code, " ", c.Reason)] = fmt.Sprint(c.Leg, c.Server, c.FramesIn, c.BytesIn, c.FramesOut, c.BytesOut)
		}
		// The bytes of frames that carry the close codes are no payload.
		want := map[string]string{
			"4429 too many phones":      "phone 0 0 0 0",
			"4404 server-id never seen": "phone 0 0 0 0",
			"4001 closed by peer":       "binary… 0 0 0 0",
			"3001 closed by peer":       "phone7c9e6679… 1 7 1 6",
		}
		for end, line := range want {
			if strings.ReplaceAll(got[end], " ", "") != strings.ReplaceAll(line, " ", "") {
				t.Errorf("%s: %q, want %q", end, got[end], line)
			}
		}
		_, body := fetch(t, "http://"+addr+"/status.json")
		for _, more := range []string{id, "secret", "127.0.0.1"} {
			if strings.Contains(body, more) {
				t.Errorf("%q is in %s", more, body)
			}
		}
	})
}

// TestStatusSchema: the names on top are those of docs/operations.md, the flat ones first.
func TestStatusSchema(t *testing.T) {
	t.Parallel()
	_, body := fetch(t, "http://"+adminServer(t, startRelay(t, testOptions()))+"/status.json")
	d := json.NewDecoder(strings.NewReader(body))
	d.Token()
	var names []string
	for d.More() {
		name, _ := d.Token()
		var value any
		if err := d.Decode(&value); err != nil {
			t.Fatal(err)
		}
		names = append(names, fmt.Sprintf("%s %T", name, value))
		if !strings.Contains(readDoc(t, "docs/operations.md"), fmt.Sprintf("| `%s` |", name)) {
			t.Errorf("docs/operations.md has no row for %s", name)
		}
	}
	want := []string{"ok bool", "status string", "version string", "instance string", "instance_check string",
		"instance_check_unseen float64", "split_seen string", "connected_binaries float64", "connected_phones float64", "uptime_seconds float64",
		"summary string", "warnings []interface {}", "certificate_expires <nil>", "host_check string",
		"binaries_in_grace float64", "connections float64", "connections_limit float64", "queued_bytes float64", "queued_bytes_limit float64",
		"traffic []interface {}", "refusals map[string]interface {}", "closed []interface {}"}
	if !slices.Equal(names, want) {
		t.Errorf("got %q\nwant %q", names, want)
	}
}

// TestStatusWarnings: the page says what the log says, for as long as that holds, whatever -log-level is.
func TestStatusWarnings(t *testing.T) {
	t.Parallel()
	split := roundResult{verdict: publicSplit}
	lost := roundResult{verdict: publicUnreachable, diagnosis: diagnosis{"no such name", "correct the name"}, joins: 1, failed: 1}
	judge := func(rounds ...roundResult) func(*testRelay) {
		return func(r *testRelay) {
			c := newPublicCheck(r.o, r.relay)
			for _, f := range rounds {
				c.judge(f, time.Now())
			}
		}
	}
	const wellHere = "all is well: this is the only relay on this host"
	for name, c := range map[string]struct {
		do      func(r *testRelay)
		ok      bool
		summary string
		more    string // found and remedy
	}{
		"nothing": {func(*testRelay) {}, true, wellHere, ""},
		"verified": {judge(lost, roundResult{verdict: publicVerified}), true,
			wellHere + "; public name verified: it leads to this relay and to no other", ""},
		"lost": {judge(lost), true, "public name not verified: this relay does not reach itself through it, and serves on; " +
			"behind a home router (hairpin NAT, split DNS) that is common, and no harm if peers do", "no such name, correct the name"},
		"suspicion": {judge(lost, split, lost), true, "public name not verified: this relay does not reach itself",
			"no such name, correct the name"},
		"split": {judge(split, split), false, "multi-instance deploy detected: another relay answers to the public name",
			", the other one stops"},
		"ids": {func(r *testRelay) {
			b, _ := memBinary(r.t, r.relay, "home")
			b.strange([]byte(newConnID(connTag{relay: r.me + 1, after: r.me})))
			b.free(r.newBatch())
		}, false, "multi-instance deploy detected: this relay and another one serve binaries in turn", ", stop the other one"},
		"bypass": {func(r *testRelay) {
			o := r.o
			o.bypass, o.instanceLock = true, []string{freeLock(r.t)}
			l, err := holdInstance(o, r.log, r.instance, lockInfo{})
			if err != nil {
				r.t.Fatal(err)
			}
			l.Close()
		}, true, "SINGLE-INSTANCE CHECK BYPASSED by PYRYCODE_RELAY_SINGLE_INSTANCE=1", "no other relay on this host, "},
		"certificate": {func(r *testRelay) {
			o := r.o
			o.tlsCert, o.tlsKey = writePair(r.t, r.t.TempDir(), selfSigned(r.t, nil, "localhost", time.Hour, -time.Hour))
			c, err := openCertificate(o, keptLog{r.log, &r.instance.tlsWarning})
			if err != nil || r.instance.tlsWarning.Swap(nil) == nil {
				r.t.Fatalf("no warning at the start, %v", err)
			}
			c.look(false) // as if it had only just ended
		}, true, "the certificate is not valid at this time", ", "},
		"memory": {func(r *testRelay) { warnMemory(r.o, 1<<20, "test", keptLog{r.log, &r.instance.memoryWarning}) }, true,
			"the memory limit is below what the options need", ""},
		"files": {func(r *testRelay) { warnFiles(r.o, 1, keptLog{r.log, &r.instance.filesWarning}) }, true,
			"the file limit is below -max-connections", ""},
		"full": {func(r *testRelay) {
			r.enter(rolePhone)
			r.t.Cleanup(func() { r.leave(rolePhone) })
		}, false, "this relay has all the connections it may have", ", raise -max-connections"},
		"checking": {func(r *testRelay) { r.instance.waits.Store(true) }, false, "this relay makes sure that it is the only one first", ""},
		"draining": {func(r *testRelay) { r.draining.Store(true) }, false, "this relay is shutting down", ""},
		"the worse first": {func(r *testRelay) {
			warnFiles(r.o, 1, keptLog{r.log, &r.instance.filesWarning})
			judge(split, split)(r)
		}, false, "multi-instance deploy detected", ", the other one stops"},
	} {
		for _, level := range []slog.Level{slog.LevelInfo, logOff} {
			t.Run(name+" "+level.String(), func(t *testing.T) {
				t.Parallel()
				o := testOptions()
				o.maxConnections, o.logLevel = 1, level
				r := startRelay(t, o)
				c.do(r)
				s := getStatus(t, adminServer(t, r))
				more := ""
				if len(s.Warnings) > 0 {
					more = s.Warnings[0].Found + ", " + s.Warnings[0].Remedy
				}
				if s.OK != c.ok || !strings.HasPrefix(s.Summary, c.summary) || !strings.HasPrefix(more, c.more) ||
					len(s.Warnings) == 0 != strings.HasPrefix(c.summary, "all is well") {
					t.Errorf("ok %v, %q, %q, want %v, %q, %q", s.OK, s.Summary, more, c.ok, c.summary, c.more)
				}
				if said := strings.Contains(r.logs.String(), "level=WARN"); said && level == logOff {
					t.Errorf("the log has what it is to leave out:\n%s", r.logs.String())
				}
			})
		}
	}
}

// TestStatusClosed: the last 200 ends are kept, the latest first; the relay's own checks are none.
func TestStatusClosed(t *testing.T) {
	r := startRelay(t, testOptions())
	b, _ := memBinary(t, r.relay, "home-home-home")
	w := r.newBatch()
	for i := range 250 {
		ph, _ := memPhone(t, r.relay, "home-home-home", r.newConnID())
		ph.probe = i%10 == 9
		ph.startCloseWith(w, endBinaryDirective, uint16(3000+i), "")
		ph.free(w)
	}
	b.free(w)
	w.flush()
	got := r.status().Closed
	if len(got) != 200 || got[0].Leg != "binary" || got[0].Server != "home-ho…" {
		t.Fatalf("%d ends, the first of a %s of %s", len(got), got[0].Leg, got[0].Server)
	}
	want := 3249
	for _, c := range got[1:] {
		if want%10 == 9 {
			want--
		}
		if int(c.Code) != want || c.Reason != "closed by binary" {
			t.Fatalf("code %d, %s, want %d", c.Code, c.Reason, want)
		}
		want--
	}
	if n := testing.AllocsPerRun(100, func() { r.ended.add(got[0]) }); n != 0 {
		t.Errorf("an end is kept with %v allocations", n)
	}
}

// TestStatusTraffic: the last 15 minutes are kept, and no more.
func TestStatusTraffic(t *testing.T) {
	t.Parallel()
	onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
		step := func(frames int64) {
			r.metrics.framesUp.Add(frames)
			r.metrics.bytesDown.Add(100 * frames)
			time.Sleep(sampleEvery)
		}
		time.Sleep(time.Second) // the first sample is of the first sweep
		for range 20 {
			step(50)
		}
		if got := r.status().Traffic; len(got) != 20 || got[1] != (traffic{10, 0, 0, 1000}) {
			t.Errorf("%d samples: %v", len(got), got)
		}
		for range 300 {
			step(5)
		}
		if got := r.status().Traffic; len(got) != samplesKept || got[0] != (traffic{1, 0, 0, 100}) || got[179] != got[0] {
			t.Errorf("%d samples: %v", len(got), got)
		}
	})
}

// statusJSON is what a relay that is not quite to be trusted says.
const statusJSON = `{"ok":false,"status":"ok","version":"v1\u001b[2J","instance":"0123456789abcdef","instance_check":"split",
"connected_binaries":2,"connected_phones":3,"uptime_seconds":4000,"summary":"multi-instance deploy detected","host_check":"bypassed",
"warnings":[{"level":"ERROR","text":"multi-instance deploy detected","remedy":"stop\none"},
	{"level":"WARN","text":"checks are bypassed","found":"nobody else"}],
"binaries_in_grace":1,"connections":5,"connections_limit":4096,"queued_bytes":1500000,"queued_bytes_limit":268435456,
"traffic":[[9,9,9,9],[0.2,12.5,17,2048]],"refusals":{"rate limited":7,"connection limit":0,"bad header":1},
"closed":[{"ended":"2026-01-02T03:04:05Z","leg":"phone","server":"7c9e6679…","duration_ms":61500,"frames_in":3,"bytes_in":900,
	"frames_out":4,"bytes_out":2000000,"code":1006,"reason":"connection lost"}]}`

var statusText = `multi-instance deploy detected

error        multi-instance deploy detected
remedy       stop\none
warn         checks are bypassed
found        nobody else
relay        ok: pyrycode-relay v1\x1b[2J, up 1h6m, binaries 2, phones 3, public name split
instance     0123456789abcdef, host lock bypassed
connections  5 of 4096, binaries in grace 1
queues       1.43 MiB of 256 MiB
up           0.2 frames/s, 17 B/s
down         12.5 frames/s, 2 KiB/s
refused      1: bad header
refused      7: rate limited

ended     leg    server     lasted  frames  bytes           code  reason
` + time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Local().Format(time.TimeOnly) +
	`  phone  7c9e6679…  1m2s    3/4     900 B/1.91 MiB  1006  connection lost
`

func TestStatusCommand(t *testing.T) {
	t.Parallel()
	serve := func(page string) string {
		return webServer(t, http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if page == "" {
				http.NotFound(w, q)
			}
			io.WriteString(w, page)
		}))
	}
	real, bad, nothing := adminServer(t, startRelay(t, testOptions())), serve(statusJSON), freeLock(t)
	well, draining := serve(strings.Replace(statusJSON, "false", "true", 1)), serve(`{"status":"draining"}`)
	const health = "ok: pyrycode-relay v1\\x1b[2J, up 1h6m, binaries 2, phones 3, public name split\n"
	for _, c := range []struct {
		args, env string
		code      int
		out, err  string // err: what the one line of it has
	}{
		{"status -admin " + bad, "", 1, statusText, ""},
		{"status -admin " + well, "", 0, statusText, ""},
		{"status", well, 0, statusText, ""},
		{"status --metrics-listen " + well, nothing, 0, statusText, ""}, // the command line wins
		{"status -admin " + nothing, "", 1, "", "no relay answers on " + nothing + " (dial tcp " + nothing +
			": connect: connection refused): see whether it runs"},
		{"status -admin " + serve(""), "", 1, "", `(it says "404 Not Found")`},
		{"status -admin " + serve("<html>"), "", 1, "", "invalid character '<'"},
		{"status", "off", 1, "", "-admin is off"},
		{"status -admin x", "", 1, "", "want host:port"},
		{"status -watch=2", "", 1, "", "flag provided but not defined"},
		{"health", bad, 0, health, ""}, // it serves, and a restart would help nobody
		{"health -admin " + draining, "", 1, "draining: pyrycode-relay , up 0s, binaries 0, phones 0, public name \n", ""},
		{"health", nothing, 1, "", "no relay answers"},
		{"health", real, 0, "ok: pyrycode-relay test, up 0s, binaries 0, phones 0, public name off\n", ""},
		{"health -watch", real, 1, "", "-watch"},
	} {
		env := map[string]string{}
		if c.env != "" {
			env[envName("admin")] = c.env
		}
		code, out, errOut := runOnce(env, strings.Fields(c.args)...)
		line := regexp.MustCompile(`up (\d+m)?\d+s`).ReplaceAllString(out, "up 0s")
		if code != c.code || line != c.out || !strings.Contains(errOut, c.err) || strings.Count(errOut, "\n") != min(1, len(c.err)) {
			t.Errorf("%s %s: %d, %q\n%s\nwant %d, %q\n%s", c.args, c.env, code, errOut, out, c.code, c.err, c.out)
		}
	}
	if code, help, _ := runOnce(nil, "status", "-h"); code != 0 || !strings.Contains(help, "pyrycode-relay status [-watch]") {
		t.Errorf("status -h: %d\n%s", code, help)
	}
}

// TestStatusCommandWatch: it goes on while the relay is away, until it is interrupted.
func TestStatusCommandWatch(t *testing.T) {
	t.Parallel()
	addr := adminServer(t, startRelay(t, testOptions()))
	ctx, cancel := context.WithCancel(t.Context())
	var out, errOut logBuffer
	done := make(chan int)
	go func() { done <- run(ctx, []string{"status", "-watch", "-admin", addr}, nil, &out, &errOut) }()
	eventually(t, "two of them", func() bool { return strings.Count(out.String(), "\x1b[H\x1b[Jall is well") == 2 })
	cancel()
	if code := <-done; code != 0 || errOut.String() != "" {
		t.Errorf("exit code %d, %s", code, errOut.String())
	}
}
