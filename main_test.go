package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
)

// The program: how it starts and stops, its pages for operators, its options, its
// log and what must never be in it, its metrics.

// runVariable makes the test binary the program itself, so that a test of a
// process runs the code under test, race detector and all.
const runVariable = "PYRYCODE_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(runVariable) == "1" {
		main() // exits
	}
	// The tests wait more than they work: as many at a time as there are processors would
	// take three times as long. Under the race detector they work.
	flag.Parse()
	if atOnce := flag.Lookup("test.parallel"); !raceDetector() && atOnce.Value.String() == atOnce.DefValue {
		atOnce.Value.Set("8")
	}
	m.Run()
}

// ---- start and stop ----

func TestProgramStartSaysWhatANewcomerNeeds(t *testing.T) {
	t.Parallel()
	lock := freeLock(t)
	p := startProgram(t, nil, "-instance-lock", lock).listening()
	for _, words := range []string{"this is the only relay on this host", "try it with: pyrycode-relay probe ws://" + p.addr, "lock=" + lock} {
		p.said(words)
	}
	if n := strings.Count(p.stderr.String(), "\n"); n != 2 || p.stdout.String() != "" {
		t.Errorf("%d lines, want 2:\n%s\nand on stdout: %s", n, p.stderr.String(), p.stdout.String())
	}
}

// sayGoodbye stops the program beside a binary and a phone, which are told.
func (p *program) sayGoodbye(s os.Signal) {
	p.t.Helper()
	b, ph := p.connect("/v2/server", binaryHeaders("s")), p.connect("/v2/client", phoneHeaders("s"))
	connID := ph.greet(b)
	p.signal(s)
	ph.wantEnd(1001, "shutting down")
	b.wantNotice(connID, 1001)
	b.wantEnd(1001, "shutting down")
	if code := p.exit(); code != exitStopped {
		p.t.Errorf("exit code %d, want %d", code, exitStopped)
	}
}

func TestProgramStopsBySignal(t *testing.T) {
	t.Parallel()
	for _, s := range []os.Signal{syscall.SIGTERM, os.Interrupt, syscall.SIGHUP} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			p := startProgram(t, nil).listening()
			p.sayGoodbye(s)
			p.said("msg=stopped")
		})
	}
	t.Run("nohup", func(t *testing.T) { // under which the end of a terminal stops nothing
		t.Parallel()
		p := startShell(t, nil, `trap "" HUP`).listening()
		p.signal(syscall.SIGHUP)
		p.sayGoodbye(syscall.SIGTERM)
		p.said("signal=terminated")
	})
}

// shell does something before it becomes the program.
func shell(before string, args ...string) *exec.Cmd {
	return exec.Command("sh", append([]string{"-c", before + `; exec "$0" "$@"`, os.Args[0]}, args...)...)
}

// startShell starts the program behind a command of the shell.
func startShell(t testing.TB, env []string, before string, args ...string) *program {
	t.Helper()
	return startCommand(t, shell(before, args...), env)
}

func TestProgramStopsAtOnceBySecondSignal(t *testing.T) {
	t.Parallel()
	lock := freeLock(t)
	p := startProgram(t, nil, "-drain", "1h", "-instance-lock", lock).listening()
	p.connect("/v2/server", binaryHeaders("s")) // never answers the close frame
	asker, err := net.Dial("tcp", lock)         // never hangs up
	if err != nil {
		t.Fatal(err)
	}
	defer asker.Close()
	p.signal(syscall.SIGTERM)
	p.said("a second signal stops at once")
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
	p.said("stopped at once by a second signal")
}

// A load balancer asks over a connection that it keeps alive; a new one is not
// accepted any more.
func TestProgramIsNotReadyWhileDraining(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-drain", "1h").listening()
	p.connect("/v2/server", binaryHeaders("s")) // never answers, so that the drain lasts
	var kept http.Transport                     // its own: a test server's end closes what the default one keeps
	t.Cleanup(kept.CloseIdleConnections)
	want := func(path string, status int) {
		t.Helper()
		q, err := http.NewRequest("GET", "http://"+p.addr+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := kept.RoundTrip(q)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != status {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, status)
		}
	}
	want("/readyz", 200)
	p.signal(syscall.SIGTERM)
	eventually(t, "the listener is closed", func() bool {
		nc, err := net.Dial("tcp", p.addr)
		if err == nil {
			nc.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	want("/readyz", 503)
	want("/v2/server", 503)
}

// A connection that was accepted is no longer in the socket, so a request on it is
// answered when the relay stops, if that does not take for ever.
func TestProgramAnswersWhatItHasAccepted(t *testing.T) {
	t.Parallel()
	const soon = lingerTime / 2
	for _, c := range []struct {
		asks, lasts time.Duration // from the beginning of the end, and from the request
		want        string
	}{{0, soon, "HTTP/1.1 200 OK"}, {soon, 0, "HTTP/1.1 200 OK"}, {0, time.Hour, ""}, {time.Hour, 0, ""}} {
		onFakeClock(t, timedOptions(), func(t *testing.T, r *testRelay) {
			ln := &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
			over := make(chan struct{})
			defer close(over)
			d := startHTTP(ln, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				select {
				case <-time.After(c.lasts):
				case <-over:
				}
			}), r.relay, make(chan error, 1))
			nc, err := ln.dial()
			if err != nil {
				t.Fatal(err)
			}
			answer := make(chan string)
			go func() {
				time.Sleep(c.asks)
				io.WriteString(nc, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				b, _ := io.ReadAll(nc)
				line, _, _ := strings.Cut(string(b), "\r\n")
				answer <- line
			}()
			synctest.Wait() // it is being answered, or not asked yet
			r.srv.Close()
			start := time.Now()
			r.once.Do(func() { stop(r.relay, []*httpServer{d}, nil, time.Minute) })
			if took := time.Since(start); took > lingerTime {
				t.Errorf("%+v: the end took %v", c, took)
			}
			if got := <-answer; got != c.want {
				t.Errorf("%+v: answered %q", c, got)
			}
		})
	}
}

func TestProgramPortInUse(t *testing.T) {
	t.Parallel()
	ln := onLoopback(t)
	addr := ln.Addr().String()
	for args, words := range map[string]string{
		"-listen " + addr:                       "-listen " + addr + " is in use",
		"-admin " + addr:                        "-admin " + addr + " is in use",
		"-listen " + addr + " -log-format json": "-listen " + addr,
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			startProgram(t, nil, strings.Fields(args)...).wantRefusal(exitFailed, words)
		})
	}
}

// What the system and the operator allow: a warning where that is less than the
// options need, and Go's own limit.
func TestProgramHeedsLimits(t *testing.T) {
	t.Parallel()
	if fileLimit() == math.MaxInt64 {
		t.Skip("this system tells no file limit")
	}
	for _, c := range []struct {
		shell     string
		env, args []string
		warning   string
		memory    int
	}{
		{"ulimit -n 100", nil, nil, "file_limit=100 max_connections=4096", (336 - 16) << 20}, // as in the README, without the program itself
		{"ulimit -n 100", nil, []string{"-max-connections", "36"}, "", 0},                    // and 64 others
		{":", nil, []string{"-queue-total", "8388608", "-max-connections", "256"}, "", (73 - 16) << 20},
		{":", []string{"GOMEMLIMIT=100MiB"}, nil, "", 100 << 20},
	} {
		p := startShell(t, c.env, c.shell, c.args...).listening()
		if log := p.stderr.String(); strings.Contains(log, "level=WARN") != (c.warning != "") || !strings.Contains(log, c.warning) {
			t.Errorf("%v: want the warning %q, got:\n%s", c, c.warning, log)
		}
		_, metrics := fetch(t, "http://"+p.admin+"/metrics")
		if want := fmt.Sprintf("\npyrycode_relay_memory_limit_bytes %d\n", c.memory); c.memory > 0 && !strings.Contains(metrics, want) {
			t.Errorf("%v: metrics without %q:\n%s", c, want, metrics)
		}
	}
}

// More connections than descriptors: the relay says so once, tries again without haste,
// and takes newcomers as soon as it can.
func TestProgramOutOfDescriptors(t *testing.T) {
	t.Parallel()
	if fileLimit() == math.MaxInt64 {
		t.Skip("this system tells no file limit")
	}
	p := startShell(t, nil, "ulimit -n 40", "-rate-per-minute", "0", "-log-level", "debug").listening()
	var all []net.Conn
	for i := range 60 {
		nc := p.dialTCP()
		upgradeRequest("/v2/server", binaryHeaders(fmt.Sprint("home-", i))).Write(nc)
		all = append(all, nc)
	}
	const slowest = "; retrying in 1s" // as net/http says
	p.said(slowest)
	log, _, _ := strings.Cut(p.stderr.String(), slowest) // by now there may be more of them
	if n := strings.Count(log, "accepting connections fails"); n != 1 || !strings.Contains(log, "too many open files") {
		t.Errorf("%d warnings, want 1", n)
	}
	if n := strings.Count(log, "; retrying in "); n > 20 {
		t.Errorf("%d times tried again before a pause of a second, want 8", n)
	}
	for _, nc := range all[:40] {
		nc.Close()
	}
	for _, nc := range all[40:] {
		nc.SetDeadline(time.Now().Add(patience))
		readUpgrade(t, nc)
	}
}

// Each listener has nothing but what it is for.
func TestProgramPages(t *testing.T) {
	t.Parallel()
	p, off, anywhere := startProgram(t, nil).listening(), startProgram(t, nil, "-admin", "off").listening(),
		startProgram(t, nil, "-admin", ":0", "-admin-any").listening()
	_, port, err := net.SplitHostPort(anywhere.admin)
	if err != nil || off.admin != "off" {
		t.Fatalf("admin is %q and %q in the logs, want off and an address", off.admin, anywhere.admin)
	}
	for _, c := range []struct {
		url    string
		status int
		body   string
	}{
		{p.addr + "/healthz", 200, `"status":"ok"`},
		{p.addr + "/metrics", 404, ""},
		{p.admin + "/metrics", 200, "pyrycode_relay_connected_binaries 0\n"},
		{p.admin + "/", 200, "<!doctype html>"},
		{p.admin + "/status.json", 200, `"ok":true`},
		{p.admin + "/healthz", 200, `"status":"ok"`},
		{p.admin + "/readyz", 200, "ready\n"},
		{p.admin + "/index.html", 404, ""},
		{p.admin + "/v2/server", 404, ""},
		{p.admin + "/debug/pprof/", 404, ""},
		{off.addr + "/metrics", 404, ""},
		{off.addr + "/status.json", 404, ""},
		{"127.0.0.1:" + port + "/metrics", 200, ""},
	} {
		if status, body := fetch(t, "http://"+c.url); status != c.status || !strings.Contains(body, c.body) {
			t.Errorf("%s: %d %q, want %d and %q", c.url, status, body, c.status, c.body)
		}
	}
	resp, err := http.Post("http://"+p.admin+"/metrics", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 405 {
		t.Errorf("POST /metrics: %d, want 405", resp.StatusCode)
	}
}

func TestProgramVersion(t *testing.T) {
	t.Parallel()
	want := regexp.MustCompile(`^pyrycode-relay \S+, revision \S+, ` + regexp.QuoteMeta(runtime.Version()) + `\n$`)
	for _, arg := range []string{"version", "-version", "--version"} {
		if code, stdout, stderr := runOnce(nil, arg); code != exitStopped || stderr != "" || !want.MatchString(stdout) {
			t.Errorf("%s: exit code %d, stderr %q, stdout %q, want it to match %s", arg, code, stderr, stdout, want)
		}
	}
}

// ---- options ----

// flagCases has one entry for each flag.
var flagCases = []struct {
	flag, byDefault string
	good, other     string
	get             func(options) any
	want            any    // what get returns for good
	bad             string // each behind a |
	right           string // in the refusal of each bad one
}{
	{"listen", "127.0.0.1:8080", "0.0.0.0:80", "[::1]:8080", func(o options) any { return o.listen }, "0.0.0.0:80",
		"||8080|127.0.0.1|127.0.0.1:http|127.0.0.1:65536|127.0.0.1:-1|127.0.0.1:+1|off", "127.0.0.1:8080"},
	{"admin", "127.0.0.1:8081", "off", "localhost:1", func(o options) any { return o.admin }, "", "|8081|no|127.0.0.1:x", "or off"},
	{"admin-any", "false", "true", "false", func(o options) any { return o.adminAny }, true, "||yes|2", "true or false"},
	{"instance-lock", "127.0.0.1:24404", "/run/b//lock, /a,127.0.0.1:1,[::ffff:127.0.0.1]:1,/run/b/lock,[0::1]:24404", "127.0.0.2:1",
		func(o options) any { return strings.Join(o.instanceLock, " ") }, "[::1]:24404 127.0.0.1:1 /run/b/lock /a",
		"||,|127.0.0.1:1,|/|run/lock|./lock|/a,b/c|127.0.0.1:0|localhost:24404|0.0.0.0:24404|192.0.2.1:24404|[::]:24404|:24404|127.0.0.1|off",
		"a loopback address and a fixed port, such as 127.0.0.1:24404"},
	{"public-url", "", "wss://relay.example.com", "ws://127.0.0.1:8080/", func(o options) any { return o.publicURL.String() },
		"wss://relay.example.com", "|relay.example.com|https://relay.example.com|wss://|wss://u@relay.example.com|" +
			"wss://relay.example.com/v2/server|wss://relay.example.com/?a=b", "wss://host"},
	{"wake-url", "", "https://u:p@ntfy.example/topic?a=b", "http://127.0.0.1:1/", func(o options) any { return o.wakeURL.String() },
		"https://u:p@ntfy.example/topic?a=b",
		"|ntfy.example/topic|wss://ntfy.example/topic|https:///topic|https://:1/topic|:", "https://host/path"},
	{"grace", "30s", "0s", "1m", func(o options) any { return o.grace }, time.Duration(0),
		"||30|-1s|2h|soon", "a duration from 0s to 1h0m0s, such as 30s"},
	{"ping", "30s", "1s", "1m", func(o options) any { return o.ping }, time.Second, "||30|0s|999ms|2h", "a duration from 1s to 1h0m0s"},
	{"drain", "10s", "1m", "2s", func(o options) any { return o.drain }, time.Minute, "||10|0s|61m", "a duration from 1s to 1h0m0s"},
	{"max-frame", "262144", "1024", "2048", func(o options) any { return o.maxFrame }, 1024,
		"||256KiB|1023|16777217|1e6", "a whole number from 1024 to 16777216"},
	{"max-phones", "16", "1", "2", func(o options) any { return o.maxPhones }, 1, "||0|many", "a whole number from 1 to "},
	{"max-connections", "4096", "1", "2", func(o options) any { return o.maxConnections }, 1,
		"||0|-1|99999999999999999999", "a whole number from 1 to "},
	{"queue", "4194304", "1048576", "2097152", func(o options) any { return o.queue }, 1 << 20, "||0|4MiB", "a whole number from 1024 to "},
	{"queue-total", "268435456", "4194304", "8388608", func(o options) any { return o.queueTotal }, int64(4 << 20),
		"||0|1.5", "a whole number from 1024 to "},
	{"rate-per-minute", "10", "0", "5", func(o options) any { return o.ratePerMinute }, 0, "||-1|off", "a whole number from 0 to "},
	{"rate-burst", "20", "1", "5", func(o options) any { return o.rateBurst }, 1, "||0", "a whole number from 1 to "},
	{"trusted-proxies", "127.0.0.0/8,::1/128", "10.1.2.3/8, fd00::1", "", func(o options) any { return fmt.Sprint(o.trustedProxies) },
		"[10.0.0.0/8 fd00::1/128]", "|proxy|10.0.0.0/33|10.0.0.1;10.0.0.2", "addresses or networks with commas between"},
	{"proxy-protocol", "false", "true", "false", func(o options) any { return o.proxyProtocol }, true, "||yes|2", "true or false"},
	{"tls-cert", "", "cert.pem", "other.pem", func(o options) any { return o.tlsCert }, "cert.pem", "", ""},
	{"tls-key", "", "key.pem", "other.pem", func(o options) any { return o.tlsKey }, "key.pem", "", ""},
	{"log-format", "text", "json", "text", func(o options) any { return o.logFormat }, "json", "||JSON|logfmt", "text or json"},
	{"log-level", "info", "debug", "error", func(o options) any { return o.logLevel }, slog.LevelDebug,
		"||INFO|trace|0", "debug, info, warn or error"},
}

// Every flag: by default, on the command line, as a variable, and no value for it.
func TestOptionsFlags(t *testing.T) {
	t.Parallel()
	names := flagNames()
	if len(names) != len(flagCases) {
		t.Errorf("%d cases for %d flags", len(flagCases), len(names))
	}
	for _, c := range flagCases {
		t.Run(c.flag, func(t *testing.T) {
			t.Parallel()
			if !slices.Contains(names, c.flag) || new(options).flags().Lookup(c.flag).DefValue != c.byDefault {
				t.Fatalf("it is not there, or not %q by default", c.byDefault)
			}
			name := envName(c.flag)
			for _, way := range []struct {
				what string
				env  map[string]string
				args []string
			}{
				{"flag", nil, []string{"-" + c.flag + "=" + c.good}},
				{"variable", map[string]string{name: c.good}, nil},
				{"flag over variable", map[string]string{name: c.other}, []string{"-" + c.flag + "=" + c.good}},
				{"flag over unusable variable", map[string]string{name: "\x00"}, []string{"-" + c.flag + "=" + c.good}},
			} {
				if o, err := parseOptions(way.args, way.env); err != nil || c.get(o) != c.want {
					t.Errorf("%s: got %v, want %v; error %v", way.what, c.get(o), c.want, err)
				}
			}
			for _, v := range strings.Split(c.bad, "|")[1:] {
				shown := fmt.Sprintf("%q", v)
				if c.flag == "wake-url" { // which has a secret in it
					shown = "not shown"
				}
				wantNoStart(t, nil, []string{"-" + c.flag + "=" + v}, " -"+c.flag+":", shown, c.right)
				wantNoStart(t, []string{name + "=" + v}, nil, "variable "+name, shown, c.right)
			}
		})
	}
}

func flagNames() (names []string) {
	new(options).flags().VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
	return names
}

// wantNoStart runs the program, which has to refuse to start in these words.
func wantNoStart(t testing.TB, env, args []string, words ...string) {
	t.Helper()
	code, _, stderr := runOnce(environment(env), args...)
	if code != exitRefused {
		t.Errorf("%q %q: exit code %d, want %d", env, args, code, exitRefused)
	}
	wantRefusal(t, stderr, words...)
}

// What is refused beyond the values of one flag, by the name by which it was set.
func TestOptionsRefused(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		env   string // NAME=value, without the prefix
		args  string
		words []string
	}{
		// Values that are unusable beside others.
		{"", "-admin 0.0.0.0:8081", []string{"flag -admin", `"0.0.0.0:8081"`, "a loopback address", "-admin-any"}},
		{"", "-admin :8081", []string{"flag -admin", `":8081"`, "a loopback address"}},
		{"", "-admin relay.example.com:8081", []string{"flag -admin", "a loopback address"}},
		{"ADMIN=192.0.2.1:8081", "", []string{"variable PYRYCODE_RELAY_ADMIN", "a loopback address"}},
		{"", "-queue 262144", []string{"flag -queue", "262144", "want at least 262154", "-max-frame"}},
		{"", "-max-frame 8388608", []string{"-queue", "4194304", "want at least 8388618", "-max-frame"}},
		{"QUEUE_TOTAL=4194303", "", []string{"variable PYRYCODE_RELAY_QUEUE_TOTAL", "4194303", "want at least 4194304", "-queue"}},
		// The other names, which are no variables.
		{"", "--insecure-listen=", []string{"flag -insecure-listen", "127.0.0.1:8080"}},
		{"", "--metrics-listen 0.0.0.0:1", []string{"flag -metrics-listen", "a loopback address"}},
		{"INSECURE_LISTEN=127.0.0.1:1", "", []string{"do you mean PYRYCODE_RELAY_LISTEN?"}},
		{"METRICS_LISTEN=", "", []string{"do you mean PYRYCODE_RELAY_ADMIN?"}},
		// What is not there.
		{"", "-proxy-protocol -trusted-proxies=", []string{"flag -trusted-proxies", "-proxy-protocol"}},
		{"", "-tls-cert x", []string{"-tls-cert and -tls-key go together: set both, or neither"}},
		{"TLS_KEY=x", "", []string{"-tls-cert and -tls-key go together: set both, or neither"}},
		{"", "-port 80", []string{"-port", "-h lists the flags"}},
		{"", "-grace", []string{"-grace", "needs an argument"}},
		{"", "serve", []string{`unknown command "serve"`, "help, version, probe, status and health", "-h"}},
		{"", "-grace 1s serve", []string{`unknown command "serve"`, "help, version, probe, status and health", "-h"}},
		{"PORT=8080", "", []string{"unknown variable PYRYCODE_RELAY_PORT"}}, // none of Kubernetes' values
	} {
		var env []string
		if c.env != "" {
			env = []string{envPrefix + c.env}
		}
		wantNoStart(t, env, strings.Fields(c.args), c.words...)
	}
	for _, v := range []string{"", "0", "true", "yes", " 1", "1\n", "01"} {
		wantNoStart(t, []string{bypassName + "=" + v}, nil, bypassName, fmt.Sprintf("%q", v), "exactly 1")
	}
	// A variable that is misspelled must not leave a default in force.
	for name, nearest := range map[string]string{
		"LISTN": "LISTEN", "LISTENS": "LISTEN", "listen": "LISTEN", "PUBLC_URL": "PUBLIC_URL", "PUBLIC_ULR": "PUBLIC_URL",
		"PUBLICURL": "PUBLIC_URL", "TRUSTED_PROXY": "TRUSTED_PROXIES", "SINGLE_INSTANC": "SINGLE_INSTANCE",
		"MAX_CONNECTION": "MAX_CONNECTIONS", "": "PING", "RATE": "RATE_BURST", "TEST_PUBLIC_CHEC": "PING",
	} {
		wantNoStart(t, []string{envPrefix + name + "=1", "PYRYCODE_RELAY_GRACE=1s"}, nil,
			"unknown variable "+envPrefix+name+": do you mean "+envPrefix+nearest+"?")
	}
}

func TestOptionsTaken(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		env, args string
		right     func(o options) bool // nil: taken is enough
	}{
		{"", "", func(o options) bool { return !o.bypass }},
		{bypassName + "=1", "", func(o options) bool { return o.bypass }},
		{"", "-admin 0.0.0.0:8081 -admin-any", nil},
		{"", "-admin [::1]:1", nil},
		{"", "-admin 127.9.9.9:1", nil},
		{"", "-admin localhost:1", nil},
		{"", "-queue 262154", nil},
		// The daemon's own test starts a relay by these names.
		{"PYRYCODE_RELAY_LISTEN=127.0.0.1:1 PYRYCODE_RELAY_ADMIN=127.0.0.1:2", "--insecure-listen 127.0.0.1:3 --metrics-listen=",
			func(o options) bool { return o.listen == "127.0.0.1:3" && o.admin == "" }},
		{"PYRYCODE_RELAY_LISTEN=127.0.0.1:1 PYRYCODE_RELAY_ADMIN=127.0.0.1:2", "-insecure-listen=127.0.0.1:3 -metrics-listen off",
			func(o options) bool { return o.listen == "127.0.0.1:3" && o.admin == "" }},
		{"PYRYCODE_RELAY_ADMIN=127.0.0.1:2", "-admin=", func(o options) bool { return o.admin == "" }},
		{"PYRYCODE_RELAY_ADMIN=", "", func(o options) bool { return o.admin == "" }},
		// What somebody else sets, and what Kubernetes makes of services that are
		// called pyrycode-relay and pyrycode-relay-admin.
		{"PYRYCODE_RELAYS=1 PYRYCODE_LISTEN=1 XPYRYCODE_RELAY_LISTN=1 " + paceName + "=1s,1s,1s", "", nil},
		{"PYRYCODE_RELAY_SERVICE_HOST=10.0.0.1 PYRYCODE_RELAY_SERVICE_PORT=8080 PYRYCODE_RELAY_SERVICE_PORT_HTTP=8080", "", nil},
		{"PYRYCODE_RELAY_PORT=tcp://10.0.0.1:8080 PYRYCODE_RELAY_PORT_8080_TCP=tcp://10.0.0.1:8080", "", nil},
		{"PYRYCODE_RELAY_PORT_8080_TCP_PROTO=tcp PYRYCODE_RELAY_PORT_8080_TCP_PORT=8080 PYRYCODE_RELAY_PORT_8080_TCP_ADDR=10.0.0.1", "", nil},
		{"PYRYCODE_RELAY_ADMIN_PORT=tcp://10.0.0.1:8081", "", nil},
	} {
		o, err := parseOptions(strings.Fields(c.args), environment(strings.Fields(c.env)))
		if err != nil || c.right != nil && !c.right(o) {
			t.Errorf("%s %s: %+v, %v", c.env, c.args, o, err)
		}
	}
}

// FuzzOptionsRelayURL: what is read of an operator's URL is the same when it is
// written and read again, and holds nothing that a request line could be broken with.
func FuzzOptionsRelayURL(f *testing.F) {
	for _, s := range []string{
		"wss://relay.example.com", "ws://127.0.0.1:8080/", "ws://[::1]:8080", "ws://[fe80::1%25eth0]:1", "ws://[fe80::1%25e\x80th0]",
		"wss://h?", "wss://h#", "wss://h/?#", "wss://h/p", "wss://u@h", "wss://h:", "wss://h:0", "wss://h:65536", "wss://:1", "wss:h",
		"wss:///", "WSS://H", "https://h", "wss://h\r\nx: y", "wss://%0a", "wss://é.example", "//h", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := parseRelayURL(s)
		if err != nil {
			return
		}
		text := u.String()
		rest, ok := strings.CutPrefix(text, u.Scheme+"://")
		if !ok || strings.ContainsAny(rest, "/?#@ ") || strings.ContainsFunc(text, unicode.IsControl) {
			t.Errorf("%q was read as %q", s, text)
		}
		if again, err := parseRelayURL(text); err != nil || again.String() != text || again.Hostname() != u.Hostname() {
			t.Errorf("%q: %s was read back as %s, %v", s, text, again, err)
		}
		if port := u.Port(); port != "" {
			if _, err := net.LookupPort("tcp", port); err != nil {
				t.Errorf("%q: port %q: %v", s, port, err)
			}
		}
	})
}

func TestOptionsHelp(t *testing.T) {
	t.Parallel()
	var help string
	for _, arg := range []string{"-h", "-help", "--help", "help"} {
		code, text, stderr := runOnce(map[string]string{"PYRYCODE_RELAY_GRACE": "1s"}, arg)
		if code != exitStopped || stderr != "" || help != "" && text != help {
			t.Errorf("%s: exit code %d, stderr %q, or another text than for -h", arg, code, stderr)
		}
		help = text
	}
	for _, c := range flagCases {
		entry := fmt.Sprintf("default %q, variable %s\n", c.byDefault, envName(c.flag))
		_, after, ok := strings.Cut(help, "\n  -"+c.flag)
		if at := strings.Index(after, entry); !ok || at < 0 || strings.Contains(after[:at], "\n  -") {
			t.Errorf("-%s is not followed by %s", c.flag, entry)
		}
	}
	for _, word := range []string{
		"pyrycode-relay version", "pyrycode-relay probe", "pyrycode-relay help", "pyrycode-relay status", "pyrycode-relay health",
		"\n  --insecure-listen and --metrics-listen are other names of -listen and -admin.\n", "-drain duration\n", "-admin-any\n",
		bypassName + "=1", "SIGTERM, SIGINT and SIGHUP drain and stop", "With -tls-cert SIGHUP reads the certificate again",
		"0 asked to stop, 1 failure while running, 2 refused to start",
	} {
		if !strings.Contains(help, word) {
			t.Errorf("%q is not in:\n%s", word, help)
		}
	}
	for line := range strings.Lines(help) {
		if strings.HasSuffix(line, " \n") || strings.Contains(line, " value\n") {
			t.Errorf("untidy line %q", line)
		}
	}
}

// ---- the log ----

// Both formats say the same: a reason is a word, a duration a number of one unit,
// which its name tells.
func TestLogHasWords(t *testing.T) {
	t.Parallel()
	for format, want := range map[string]string{
		"text": ` msg=test leg=phone close="heartbeat timeout" drop="push wake" upgrade="rate limited" duration_ms=90000` + "\n",
		"json": `,"msg":"test","leg":"phone","close":"heartbeat timeout","drop":"push wake","upgrade":"rate limited","duration_ms":90000}` + "\n",
	} {
		var b logBuffer
		o := defaultOptions()
		o.logFormat = format
		newLogger(&b, o).Info("test", "leg", rolePhone, "close", endHeartbeat, "drop", dropPushWake, "upgrade", upgradeRateLimited,
			"duration", 90*time.Second-time.Microsecond)
		if !strings.HasSuffix(b.String(), want) {
			t.Errorf("%s: the line does not end in %q: %s", format, want, b.String())
		}
	}
}

// stopCleanly ends a relay that is well.
func (p *program) stopCleanly() {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != exitStopped {
		p.t.Errorf("exit code %d, want %d", code, exitStopped)
	}
}

// find learns the addresses of a relay whose log says nothing from its lock.
func (p *program) find() *program {
	p.t.Helper()
	eventually(p.t, "it serves", func() bool {
		h := holderOf(p)
		if h == nil {
			return false
		}
		p.addr, p.admin = h.Listen, h.Admin
		nc, err := net.Dial("tcp", p.addr)
		if err == nil {
			nc.Close()
		}
		return err == nil
	})
	return p
}

func TestLogLevel(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-log-level", "error").find()
	p.stopCleanly()
	if s := p.stderr.String(); s != "" {
		t.Errorf("at level error a relay that is well says:\n%s", s)
	}
}

// A terminal that is stopped, a pipe whose reader hangs, or ends as tee does on
// Ctrl-C: none keeps the relay from serving, nor from ending. What it can't write
// it counts.
func TestLogWithoutReader(t *testing.T) {
	t.Parallel()
	for level, spoil := range map[string]func(r, w *os.File){
		"debug": func(_, w *os.File) {
			w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
			if _, err := w.Write(make([]byte, 8<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("filling a pipe: %v", err)
			}
		},
		"info": func(r, _ *os.File) { r.Close() },
	} {
		t.Run(level, func(t *testing.T) {
			t.Parallel()
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			defer r.Close()
			spoil(r, w)
			cmd := exec.Command(os.Args[0], "-log-level", level)
			cmd.Stderr = w
			p := startCommand(t, cmd, nil).find()
			if level == "info" { // whose reader is gone
				lost := func() float64 { return p.metric("log_lines_lost_total") }
				eventually(t, "the lines of the start are counted", func() bool { return lost() >= 2 })
				before := lost()
				p.connect("/v2/server", binaryHeaders("other"))
				eventually(t, "the line of a connection is counted", func() bool { return lost() == before+1 })
			}
			p.sayGoodbye(syscall.SIGTERM)
		})
	}
}

// writerFunc is a reader that a test plays.
type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func lostWords(lines int64) []byte { return fmt.Appendf(nil, "lost %d\n", lines) }

func TestLogWriterGathers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out logBuffer
		var writes atomic.Int64
		w := &logWriter{out: writerFunc(func(p []byte) (int, error) { writes.Add(1); return out.Write(p) })}
		for i := range 100 {
			fmt.Fprintf(w, "line %d\n", i)
		}
		synctest.Wait()
		if writes.Load() > 0 {
			t.Errorf("%q was written before lines could gather", out.String())
		}
		for _, idle := range []time.Duration{logDelay, time.Hour} {
			time.Sleep(idle)
			synctest.Wait()
			if writes.Load() != 1 || strings.Count(out.String(), "\n") != 100 {
				t.Errorf("after %v: %d writes, want one of 100 lines: %q", idle, writes.Load(), out.String())
			}
		}
		if w.Close(); writes.Load() != 1 {
			t.Errorf("%d writes, one of them of nothing", writes.Load())
		}
	})
}

// A reader of the log that stands still costs memory up to a bound, delays no
// line, and is told how much it missed.
func TestLogWriterBound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out logBuffer
		begun, gate := make(chan struct{}, 10), make(chan struct{}) // a write that begins; a write needs it closed
		w := &logWriter{lostLine: lostWords, out: writerFunc(func(p []byte) (int, error) { begun <- struct{}{}; <-gate; return out.Write(p) })}
		line := []byte(strings.Repeat("x", 1023) + "\n")
		io.WriteString(w, "first\n")
		<-begun // it hangs in the write of this line
		const more = 7
		for range maxLogBacklog/len(line) + more {
			if n, err := w.Write(line); n != len(line) || err != nil {
				t.Fatalf("write: %d, %v", n, err)
			}
		}
		close(gate)
		w.Close()
		got := out.String()
		if n := strings.Count(got, string(line)); n != maxLogBacklog/len(line) {
			t.Errorf("%d lines were kept, want %d", n, maxLogBacklog/len(line))
		}
		if want := fmt.Sprintf("lost %d\n", more); !strings.HasPrefix(got, "first\n") || !strings.HasSuffix(got, want) {
			t.Errorf("the log begins %.10q and ends %q, want first and %q", got, got[len(got)-20:], want)
		}
	})
}

// Close loses no line, and those that come later, as the last words of the
// program do, stand behind the others.
func TestLogWriterClose(t *testing.T) {
	t.Parallel()
	for range 50 {
		var out strings.Builder // which takes one writer at a time
		w := &logWriter{out: &out}
		var wg sync.WaitGroup
		const writers, lines = 4, 100
		for k := range writers {
			wg.Go(func() {
				for i := range lines {
					fmt.Fprintf(w, "%d %d\n", k, i)
				}
			})
		}
		w.Close()
		wg.Wait()
		io.WriteString(w, "last\n")
		w.Close()
		next := [writers]int{}
		for line := range strings.Lines(out.String()) {
			var k, i int
			if n, _ := fmt.Sscanf(line, "%d %d", &k, &i); n == 2 {
				if i != next[k] {
					t.Fatalf("writer %d: line %d where %d should be", k, i, next[k])
				}
				next[k]++
			}
		}
		if next != [writers]int{lines, lines, lines, lines} || !strings.HasSuffix(out.String(), "\nlast\n") {
			t.Fatalf("lines of each writer: %v, want %d", next, lines)
		}
	}
}

// Lines that no reader takes are counted by what was not taken of them, and told
// once there is a reader again: once.
func TestLogWriterReaderGone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out logBuffer
		var room atomic.Int64 // bytes that a pipe takes before it breaks, -1 for all
		room.Store(int64(len("line 0\nli")))
		w := &logWriter{lostLine: lostWords, out: writerFunc(func(p []byte) (int, error) {
			n := int(room.Load())
			if n < 0 {
				return out.Write(p)
			}
			room.Store(0)
			n, _ = out.Write(p[:min(n, len(p))])
			return n, syscall.EPIPE
		})}
		say := func(lines string) {
			for line := range strings.Lines(lines) {
				io.WriteString(w, line)
			}
			time.Sleep(time.Second)
			synctest.Wait()
		}
		say("line 0\nline 1\nline 2\n")
		if got := w.lost.Load(); got != 2 {
			t.Errorf("%d lines lost, want 2 of 3", got)
		}
		say("line 3\n")
		room.Store(-1)
		say("line 4\n")
		say("line 5\n")
		w.Close()
		if want := "line 0\nliline 4\nlost 3\nline 5\n"; out.String() != want {
			t.Errorf("the log is %q, want %q", out.String(), want)
		}
	})
}

// ---- privacy ----

// What must never be in a log, at any level: payloads, tokens, push credentials,
// user-agents, headers. Everything of these that the test sends holds secret.

const secret = "m4rk3d"

// stranger's address, a fresh one each time, so that the rate limit is met on
// purpose only.
var strangerCount atomic.Int64

func freshAddr() string {
	n := strangerCount.Add(1)
	return fmt.Sprintf("198.18.%d.%d", n>>8&255, n&255)
}

// marked adds all that peers and proxies send beside what the relay needs.
func marked(h http.Header) http.Header {
	h = h.Clone()
	h.Set("User-Agent", "agent-"+secret)
	h.Set("X-Pyrycode-Token", secret)
	h.Set("X-Pyrycode-Device-Name", secret+"'s phone")
	h.Set("X-Pyrycode-Relay-Probe", secret)
	h.Set("Authorization", "Bearer "+secret)
	h.Set("Cookie", "session="+secret)
	h.Set("Origin", "https://"+secret+".example")
	h.Set("Referer", "https://example/"+secret)
	h.Set("Sec-Websocket-Protocol", secret)
	h.Set("X-Forwarded-For", secret+", "+freshAddr())
	if h.Get("X-Pyrycode-Version") != "" {
		h.Set("X-Pyrycode-Version", "1.0-"+secret)
	}
	return h
}

func TestLogHasNothingForbidden(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			p := startProgram(t, nil, "-log-format", format, "-log-level", "debug",
				"-max-phones", "3", "-rate-per-minute", "1", "-rate-burst", "2", "-drain", "1h",
				"-wake-url", "http://"+secret+":"+secret+"@127.0.0.1:1/"+secret+"?token="+secret).listening()

			sessionsWithSecrets(p)
			refusalsWithSecrets(p)
			_, page := fetch(t, "http://"+p.admin+"/metrics")
			_, status := fetch(t, "http://"+p.admin+"/status.json")
			drainWithSecrets(p)

			for line := range strings.Lines(p.stderr.String() + page + status) {
				if strings.Contains(strings.ToLower(line), secret) {
					t.Errorf("forbidden: %s", line)
				}
			}
			for line := range strings.Lines(p.stderr.String()) {
				var entry struct{ Time, Level, Msg string }
				if err := json.Unmarshal([]byte(line), &entry); (err == nil && entry.Msg != "") != (format == "json") {
					t.Errorf("no line in %s: %s", format, line)
				}
			}
		})
	}
}

func (p *program) binary(id string) *wsClient {
	p.t.Helper()
	return p.connect("/v2/server?token="+secret, marked(binaryHeaders(id)))
}

func (p *program) phone(id string) *wsClient {
	p.t.Helper()
	return p.connect("/v2/client?token="+secret, marked(phoneHeaders(id)))
}

// sessionsWithSecrets ends a connection of each leg in every way that a peer can
// bring about without waiting, each time around a payload.
func sessionsWithSecrets(p *program) {
	t := p.t
	t.Helper()
	const payload = `"` + secret + `"`
	keeper := p.binary("keeper")
	talk := func() (ph *wsClient, id string) {
		t.Helper()
		ph = p.phone("keeper")
		ph.text(payload)
		e := keeper.envelope()
		keeper.send(e.ConnID, payload)
		if got := ph.message(); got != payload {
			t.Fatalf("phone got %s, want %s", got, payload)
		}
		return ph, e.ConnID
	}
	ends := []struct {
		reason string
		code   int
		do     func(c *wsClient)
	}{
		{"closed by peer", 4000, func(c *wsClient) { c.close(4000, secret) }},
		{"connection lost", 1006, func(c *wsClient) { c.nc.Close() }},
		{"unmasked frame", 1002, func(c *wsClient) { c.raw(append([]byte{0x80 | opText, byte(len(payload))}, payload...)) }},
		{"reserved bit set", 1002, func(c *wsClient) { c.raw(clientFrame(0xc0, opText, []byte(payload))) }},
		{"unknown opcode", 1002, func(c *wsClient) { c.frame(3, []byte(payload)) }},
		{"bad control frame", 1002, func(c *wsClient) { c.frame(opPing, []byte(strings.Repeat(secret, 40))) }},
		{"stray continuation", 1002, func(c *wsClient) { c.frame(opContinuation, []byte(payload)) }},
		{"data frame inside fragmented message", 1002, func(c *wsClient) {
			c.raw(clientFrame(0, opText, []byte(payload)))
			c.text(payload)
		}},
		{"bad close frame", 1002, func(c *wsClient) { c.close(1005, secret) }},
		{"invalid utf-8", 1007, func(c *wsClient) { c.frame(opText, []byte(payload+"\xff")) }},
		{"message too big", 1009, func(c *wsClient) { c.raw(clientFrame(0x80, opText, []byte(strings.Repeat(secret, 50000)))[:4096]) }},
	}
	finish := func(c *wsClient, code int) {
		t.Helper()
		if code != 1006 {
			c.wantEnd(code, "")
		}
	}
	for i, e := range ends {
		ph, id := talk()
		ph.frame(opPing, []byte(secret))
		e.do(ph)
		finish(ph, e.code)
		keeper.wantNotice(id, e.code)

		b := p.binary(fmt.Sprint("server", i))
		b.text(`{"conn_id":"` + secret + `","frame":` + payload + `}`)
		e.do(b)
		finish(b, e.code)
	}
	ph, id := talk()
	ph.text(payload + payload)
	ph.wantEnd(1007, "not one json value")
	keeper.wantNotice(id, 1007)
	ph, id = talk()
	keeper.text(`{"conn_id":"` + id + `","frame":` + payload + `,"close_code":4401}`)
	ph.wantEnd(4401, "")

	// One kind at a time until it is in the log, which takes five a second.
	ph, id = talk()
	for reason, envelope := range map[string]string{
		"not an envelope":    `{` + payload,
		"conn_id missing":    `{"frame":` + payload + `}`,
		"conn_id unknown":    `{"conn_id":` + payload + `,"frame":` + payload + `}`,
		"frame missing":      `{"conn_id":"` + id + `","` + secret + `":1}`,
		"close_code invalid": `{"conn_id":"` + id + `","frame":` + payload + `,"close_code":` + payload + `}`,
	} {
		p.until("envelope dropped", reason, func() { keeper.text(envelope) })
	}
	keeper.text(`{"push_wake":{"token":` + payload + `,"auth":{"bearer":` + payload + `}}}`)
	p.line("waking phones through -wake-url fails", "127.0.0.1:1")
	keeper.close(1000, secret)
	keeper.wantEnd(1000, "")

	late := p.phone("keeper") // in grace: what it says is held
	late.text(payload)
	again := p.binary("keeper")
	if e := again.envelope(); string(e.Frame) != payload {
		t.Fatalf("held frame is %s, want %s", e.Frame, payload)
	}
	ph.wantEnd(4404, "binary reclaimed server-id")
	for _, e := range ends {
		for _, leg := range []string{"binary", "phone"} {
			p.line("disconnected", leg, e.reason)
		}
	}
	p.line("disconnected", "phone", "not one json value")
	p.line("disconnected", "phone", "closed by binary")
	p.line("disconnected", "phone", "binary reclaimed server-id")
	for range 2 { // and the late one: all places are taken
		p.phone("keeper")
	}
}

// refusalsWithSecrets is refused in every way that a stranger can bring about,
// while "keeper" is held and has all its phones.
func refusalsWithSecrets(p *program) {
	p.t.Helper()
	without := func(name string) http.Header {
		h := marked(phoneHeaders("s"))
		h.Del(name)
		return h
	}
	badID := marked(phoneHeaders("not an id " + secret))
	sameAddr := marked(phoneHeaders("s"))
	raw := func(lines ...string) func() {
		return func() {
			nc := p.dial()
			nc.SetDeadline(time.Now().Add(patience))
			io.WriteString(nc, strings.Join(lines, "\r\n")+"\r\n\r\n")
			if _, err := io.ReadAll(nc); err != nil && !isReset(err) {
				p.t.Errorf("waiting for the answer to %.50q: %v", lines, err)
			}
			nc.Close()
		}
	}
	needed := []string{"Host: " + secret, "Connection: close", "X-Pyrycode-Server: s", "User-Agent: " + secret, "X-Pyrycode-Token: " + secret}
	request := func(line string, more ...string) func() {
		return func() {
			raw(append(append([]string{line, "X-Forwarded-For: " + freshAddr()}, needed...), more...)...)()
		}
	}
	for _, c := range []struct {
		msg, reason string
		do          func()
	}{
		{"upgrade refused", "bad header", func() { p.upgrade("/v2/client", badID) }},
		{"upgrade refused", "bad header", func() { p.upgrade("/v2/client?"+secret, without("User-Agent")) }},
		{"upgrade refused", "bad handshake", request("POST /v2/client?"+secret+" HTTP/1.1", "Content-Length: 0")},
		{"upgrade refused", "bad handshake", request("GET /v2/client?"+secret+" HTTP/1.1", "Sec-WebSocket-Key: "+secret)},
		{"upgrade refused", "rate limited", func() { p.upgrade("/v2/client", sameAddr) }},
		{"session refused", "server-id never seen", func() { p.phone("nobody").wantEnd(4404, "") }},
		{"session refused", "too many phones", func() { p.phone("keeper").wantEnd(4429, "") }},
	} {
		p.until(c.msg, c.reason, c.do)
	}
	// What net/http refuses by itself, or never gets to see as a request.
	for _, lines := range [][]string{
		{"GET /" + secret + " HTTP/1.1", "Host: x", "Connection: close", "User-Agent: " + secret},
		{secret + " " + secret},
		{"GET / HTTP/9.9", "X-" + secret + ": " + secret},
		{"GET /v2/client HTTP/1.1", "Host: " + secret, "X bad name: " + secret},
		{"GET / HTTP/1.1", "Host: x", "X-Long: " + strings.Repeat(secret, 5000)},
		{"\x16\x03\x01" + secret},
	} {
		raw(lines...)()
	}
}

// drainWithSecrets stops the relay under a binary that does not let go, and asks
// for an upgrade over a connection that was there before.
func drainWithSecrets(p *program) {
	t := p.t
	t.Helper()
	nc := p.dial()
	nc.SetDeadline(time.Now().Add(patience))
	// Half a request: net/http has the connection.
	io.WriteString(nc, "GET /v2/server HTTP/1.1\r\nHost: x\r\n")
	b := p.binary("stubborn")
	b.text(`{"push_wake":"` + secret + `"}`)
	p.line("connected", "binary", "stubborn")
	p.signal(syscall.SIGTERM)
	p.said("shutting down")
	eventually(t, "the relay drains", func() bool { h := holderOf(p); return h != nil && h.Draining })
	io.WriteString(nc, "Connection: close\r\nUser-Agent: "+secret+"\r\nX-Pyrycode-Token: "+secret+"\r\n\r\n")
	if answer, err := io.ReadAll(nc); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 503 ") {
		t.Errorf("an upgrade while draining: %.50q, %v; want 503", answer, err)
	}
	p.line("upgrade refused", "binary", "draining")
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
}

// has reports whether a line of the log has all of these words.
func (p *program) has(words []string) bool {
lines:
	for line := range strings.Lines(p.stderr.String()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue lines
			}
		}
		return true
	}
	return false
}

// line waits for a line of the log: what is not logged cannot betray anything.
func (p *program) line(words ...string) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("a line with %q", words), func() bool { return p.has(words) })
}

// until does something again and again until its line is there, which the limit
// on lines may delay.
func (p *program) until(msg, reason string, do func()) {
	p.t.Helper()
	polls := 0
	eventually(p.t, fmt.Sprintf("a line of %s, %s", msg, reason), func() bool {
		if polls%100 == 0 {
			do()
		}
		polls++
		return p.has([]string{msg, reason})
	})
}

// ---- metrics ----

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
	wantSamples(t, got, want)
}

func wantSamples(t testing.TB, got, want map[string]float64) {
	t.Helper()
	for series, v := range want {
		if have, ok := got[series]; !ok || have != v {
			t.Errorf("%s is %v (there: %v), want %v", series, have, ok, v)
		}
		delete(got, series)
	}
	if len(got) > 0 {
		t.Errorf("not expected: %v", got)
	}
}

// The page has every series before anything has happened.
func TestMetricsBeginAtZero(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	w := httptest.NewRecorder()
	r.metrics.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if kind := w.Header().Get("Content-Type"); w.Code != 200 || kind != "text/plain; version=0.0.4; charset=utf-8" {
		t.Errorf("/metrics: %d, %s", w.Code, kind)
	}
	build := r.build
	want := map[string]float64{
		"connected_binaries": 0, "binaries_in_grace": 0, "connected_phones": 0, "queued_bytes": 0, "queued_bytes_limit": float64(r.o.queueTotal),
		"socket_reads_total": 0, "socket_writes_total": 0, "log_lines_lost_total": 0, "instance_check_unseen": 0,
		"tls_not_after_seconds": 0, "tls_reload_failures_total": 0, "tls_handshake_failures_total": 0, "proxy_headers_refused_total": 0,
		`instance_check{check="host",verdict="held"}`: 1, `instance_check{check="host",verdict="bypassed"}`: 0,
		"start_time_seconds": float64(r.id.started.UnixMilli()) / 1000,
		fmt.Sprintf("build_info{version=%q,revision=%q,goversion=%q,instance=%q}", build.version, build.revision, runtime.Version(), r.id.id): 1,
	}
	for _, direction := range []string{"up", "down"} {
		want[fmt.Sprintf("frames_forwarded_total{direction=%q}", direction)] = 0
		want[fmt.Sprintf("forwarded_bytes_total{direction=%q}", direction)] = 0
	}
	for role, endpoint := range []string{"server", "client"} {
		for o := range upgradeOutcomeCount {
			want[fmt.Sprintf("upgrades_total{endpoint=%q,outcome=%q}", endpoint, o.String())] = 0
		}
		for why := range closeReasonCount {
			want[fmt.Sprintf("closes_total{leg=%q,reason=%q}", []string{"binary", "phone"}[role], why.String())] = 0
		}
	}
	for why := range dropReasonCount {
		want[fmt.Sprintf("dropped_envelopes_total{reason=%q}", why.String())] = 0
	}
	for o := range wakeOutcomeCount {
		want[fmt.Sprintf("wakes_total{outcome=%q}", o.String())] = 0
	}
	for i, verdict := range []string{"off", "pending", "verified", "split", "not-a-relay", "unreachable"} {
		want[fmt.Sprintf("instance_check{check=\"public\",verdict=%q}", verdict)] = float64(max(0, 1-i))
	}
	for _, sure := range []string{"certain", "suspected"} {
		want[fmt.Sprintf("split_seen_total{evidence=%q}", sure)] = 0
	}
	got := samples(t, w.Body.String())
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
	wantSamples(t, got, want)
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
			`nope`, `{"frame":1}`, `{"conn_id":"nobody","frame":1}`, `{"conn_id":"` + id + `"}`,
			`{"conn_id":"` + id + `","frame":1,"close_code":1006}`, `{"push_wake":{}}`,
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

func TestMetricsPleasePromtool(t *testing.T) {
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
