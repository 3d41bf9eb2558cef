package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The program as a process: what it says when it starts, how it is stopped, the
// exit codes.

// runVariable makes the test binary the program itself, so that a test of a
// process runs the code under test, race detector and all.
const runVariable = "PYRYCODE_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(runVariable) == "1" {
		main() // exits
	}
	m.Run()
}

func TestStartSaysWhatANewcomerNeeds(t *testing.T) {
	t.Parallel()
	lock := freeLock(t)
	p := startProgram(t, nil, "-instance-lock", lock).listening()
	p.said("this is the only relay on this host")
	p.said("try it with: pyrycode-relay probe ws://" + p.addr)
	p.said("lock=" + lock)
	if n := strings.Count(p.stderr.String(), "\n"); n != 2 {
		t.Errorf("%d lines, want 2:\n%s", n, p.stderr.String())
	}
	if s := p.stdout.String(); s != "" {
		t.Errorf("on stdout: %s", s)
	}
	if status, body := fetch(t, "http://"+p.addr+"/healthz"); status != 200 || !strings.Contains(body, `"status":"ok"`) {
		t.Errorf("/healthz: %d %s", status, body)
	}
	if status, body := fetch(t, "http://"+p.admin+"/metrics"); status != 200 || !strings.Contains(body, "pyrycode_relay_connected_binaries 0\n") {
		t.Errorf("/metrics: %d %s", status, body)
	}
}

func TestSignalsStopWithExitZero(t *testing.T) {
	t.Parallel()
	for _, s := range []os.Signal{syscall.SIGTERM, os.Interrupt, syscall.SIGHUP} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			p := startProgram(t, nil).listening()
			b := p.connect("/v2/server", binaryHeaders("s"))
			ph := p.connect("/v2/client", phoneHeaders("s"))
			connID := ph.greet(b)
			p.signal(s)
			ph.wantEnd(1001, "shutting down")
			b.wantNotice(connID, 1001)
			b.wantEnd(1001, "shutting down")
			if code := p.exit(); code != 0 {
				t.Errorf("exit code %d, want 0", code)
			}
			p.said("msg=stopped")
		})
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
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
	if code := p.exit(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	p.said("stopped at once by a second signal")
}

// A load balancer asks over a connection that it keeps alive; a new one is not
// accepted any more.
func TestNotReadyWhileDraining(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-drain", "1h").listening()
	p.connect("/v2/server", binaryHeaders("s")) // never answers, so that the drain lasts
	var client http.Client
	ready := func(path string) int {
		resp, err := client.Get("http://" + p.addr + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	if status := ready("/readyz"); status != 200 {
		t.Fatalf("/readyz before: %d, want 200", status)
	}
	p.signal(syscall.SIGTERM)
	eventually(t, "the listener is closed", func() bool {
		nc, err := net.Dial("tcp", p.addr)
		if err == nil {
			nc.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	for _, path := range []string{"/readyz", "/v2/server"} {
		if status := ready(path); status != 503 {
			t.Errorf("%s while draining: %d, want 503", path, status)
		}
	}
}

func TestPortInUse(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	addr := ln.Addr().String()
	for _, name := range []string{"-listen", "-admin"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			startProgram(t, nil, name, addr).wantRefusal(1, name+" "+addr+" is in use")
		})
	}
	t.Run("json log", func(t *testing.T) {
		t.Parallel()
		startProgram(t, nil, "-listen", addr, "-log-format", "json").wantRefusal(1, "-listen "+addr)
	})
	t.Run("address of another host", func(t *testing.T) {
		t.Parallel()
		startProgram(t, nil, "-listen", "192.0.2.1:0").wantRefusal(1, "-listen 192.0.2.1:0")
	})
}

func TestFileLimitBelowConnections(t *testing.T) {
	t.Parallel()
	if fileLimit() == math.MaxInt64 {
		t.Skip("this system tells no file limit")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	limited := func(args ...string) *program {
		return startCommand(t, exec.Command("sh", append([]string{"-c", `ulimit -n 100; exec "$0" "$@"`, self}, args...)...), nil).listening()
	}
	p := limited()
	p.said("level=WARN")
	p.said("file_limit=100 max_connections=4096")
	p = limited("-max-connections", "36") // and 64 others
	if strings.Contains(p.stderr.String(), "WARN") {
		t.Errorf("a warning without a reason:\n%s", p.stderr.String())
	}
}

// The options say what memory the process needs, unless the operator does.
func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		env, args []string
		want      int
	}{
		{nil, nil, (336 - 16) << 20}, // as in the README, without the program itself
		{nil, []string{"-queue-total", "8388608", "-max-connections", "256"}, (73 - 16) << 20},
		{[]string{"GOMEMLIMIT=100MiB"}, nil, 100 << 20},
	} {
		p := startProgram(t, tt.env, tt.args...).listening()
		_, metrics := fetch(t, "http://"+p.admin+"/metrics")
		if want := fmt.Sprintf("\npyrycode_relay_memory_limit_bytes %d\n", tt.want); !strings.Contains(metrics, want) {
			t.Errorf("%v %v: metrics without %q:\n%s", tt.env, tt.args, want, metrics)
		}
	}
}

func TestJSONLog(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-log-format", "json")
	p.said(`"msg":"listening"`)
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	for line := range strings.Lines(p.stderr.String()) {
		var entry struct{ Time, Level, Msg string }
		if strings.Contains(line, `"msg":"shutting down`) && !strings.Contains(line, `"deadline_ms":10000`) {
			t.Errorf("no deadline_ms in %s", line)
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Level != "INFO" || entry.Msg == "" {
			t.Errorf("%v: %s", err, line)
		}
	}
}

func TestLogLevel(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-log-level", "error", "-listen", freeLock(t))
	eventually(t, "it serves", func() bool {
		return holderOf(p) != nil
	})
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	if s := p.stderr.String(); s != "" {
		t.Errorf("at level error a relay that is well says:\n%s", s)
	}
}

// A terminal that is stopped, a pipe whose reader hangs: neither keeps the relay
// from serving, nor from ending.
func TestLogThatNobodyReads(t *testing.T) {
	t.Parallel()
	_, pipe := fullPipe(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-log-level", "debug")
	cmd.Stderr = pipe
	p := startCommand(t, cmd, nil)
	eventually(t, "it serves", func() bool {
		if h := holderOf(p); h != nil {
			p.addr = h.Listen
		}
		nc, err := net.Dial("tcp", p.addr)
		if err == nil {
			nc.Close()
		}
		return err == nil
	})
	b, ph := p.connect("/v2/server", binaryHeaders("s")), p.connect("/v2/client", phoneHeaders("s"))
	ph.greet(b)
	p.signal(syscall.SIGTERM)
	ph.wantEnd(1001, "shutting down")
	b.wantEnd(1001, "shutting down")
	if code := p.exit(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

// A reader of the log that ends, as tee does on Ctrl-C, ends nothing: the relay
// serves on, counts what it cannot write, and says so to the next reader.
func TestLogReaderGone(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Stderr = w
	p := startCommand(t, cmd, nil)
	var log []byte
	for buf := make([]byte, 4096); p.addr == ""; {
		n, err := r.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		log = append(log, buf[:n]...)
		if m := listeningLine.FindSubmatch(log); m != nil {
			p.addr, p.admin = string(m[1]), string(m[2])
		}
	}
	w.Close()
	r.Close()
	b, ph := p.connect("/v2/server", binaryHeaders("s")), p.connect("/v2/client", phoneHeaders("s"))
	ph.greet(b)
	eventually(t, "both lines are counted", func() bool {
		_, metrics := fetch(t, "http://"+p.admin+"/metrics")
		return strings.Contains(metrics, "\npyrycode_relay_log_lines_lost_total 2\n")
	})
	p.signal(syscall.SIGTERM)
	ph.wantEnd(1001, "shutting down")
	b.wantEnd(1001, "shutting down")
	if code := p.exit(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

// nohup means that the end of a terminal stops nothing.
func TestHangUpUnderNohup(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := startCommand(t, exec.Command("sh", "-c", `trap "" HUP; exec "$0"`, self), nil).listening()
	p.signal(syscall.SIGHUP)
	b := p.connect("/v2/server", binaryHeaders("s"))
	p.signal(syscall.SIGTERM)
	b.wantEnd(1001, "shutting down")
	p.said("signal=terminated")
}

// fullPipe is a pipe that takes no byte more.
func fullPipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err = w.Write(make([]byte, 8<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("filling a pipe: %v", err)
	}
	return r, w
}

func TestAdminOff(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-admin", "off").listening()
	if p.admin != "off" {
		t.Errorf("admin is %q in the log, want off", p.admin)
	}
	// The public listener does not stand in for it.
	if status, _ := fetch(t, "http://"+p.addr+"/metrics"); status != 404 {
		t.Errorf("/metrics on the public listener: %d, want 404", status)
	}
}

func TestAdminAny(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-admin", ":0", "-admin-any").listening()
	_, port, err := net.SplitHostPort(p.admin)
	if err != nil {
		t.Fatal(err)
	}
	if status, _ := fetch(t, "http://127.0.0.1:"+port+"/metrics"); status != 200 {
		t.Errorf("/metrics: %d, want 200", status)
	}
}

// The admin listener has nothing but what it is for.
func TestAdminPaths(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil).listening()
	for path, want := range map[string]int{"/metrics": 200, "/": 404, "/v2/server": 404, "/debug/pprof/": 404} {
		if status, _ := fetch(t, "http://"+p.admin+path); status != want {
			t.Errorf("%s: %d, want %d", path, status, want)
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

func TestVersionCommand(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"version", "-version", "--version"} {
		code, stdout, stderr := runOnce(nil, arg)
		if code != 0 || stderr != "" {
			t.Errorf("%s: exit code %d, stderr %q", arg, code, stderr)
		}
		if want := regexp.MustCompile(`^pyrycode-relay \S+, revision \S+, ` + regexp.QuoteMeta(runtime.Version()) + `\n$`); !want.MatchString(stdout) {
			t.Errorf("%s: got %q, want it to match %s", arg, stdout, want)
		}
	}
}

func TestUnknownCommand(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"serve"}, {"-grace", "1s", "serve"}} {
		code, _, stderr := runOnce(nil, args...)
		if code != 2 {
			t.Errorf("%q: exit code %d, want 2", args, code)
		}
		wantRefusal(t, stderr, `unknown command "serve"`, "help, version and probe", "-h")
	}
}
