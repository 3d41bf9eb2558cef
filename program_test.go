package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"
)

// What the tests of the program as a process are made of.

// program is a process of the relay that dies with its test.
type program struct {
	t              testing.TB
	cmd            *exec.Cmd
	stdout, stderr logBuffer
	done           chan struct{}

	addr, admin string // set by listening
}

// startProgram starts the relay on ports of the kernel's choice. env is of the
// form NAME=value and like args overrides that; nothing is inherited.
func startProgram(t testing.TB, env []string, args ...string) *program {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return startCommand(t, exec.Command(self, args...), env)
}

func startCommand(t testing.TB, cmd *exec.Cmd, env []string) *program {
	t.Helper()
	p := &program{t: t, cmd: cmd, done: make(chan struct{})}
	cmd.Env = append([]string{
		runVariable + "=1",
		"GORACE=atexit_sleep_ms=10", // a second by default, of which some tests would see hundreds
		"PYRYCODE_RELAY_LISTEN=127.0.0.1:0", "PYRYCODE_RELAY_ADMIN=127.0.0.1:0", "PYRYCODE_RELAY_INSTANCE_LOCK=" + freeLock(t),
	}, env...)
	if testing.CoverMode() != "" { // else it says on stderr that there is none
		cmd.Env = append(cmd.Env, "GOCOVERDIR="+t.TempDir())
	}
	cmd.Stdout = &p.stdout
	if cmd.Stderr == nil {
		cmd.Stderr = &p.stderr
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			t.Logf("%s said:\n%s", cmd, p.stderr.String())
		}
	})
	return p
}

// freeLock is an -instance-lock that nobody has. Where all of 127.0.0.0/8 is
// loopback each gets a host of its own, since the kernel may give the same port
// to another test in the moment between the two.
func freeLock(t testing.TB) string {
	t.Helper()
	host := "127.0.0.1"
	if runtime.GOOS == "linux" {
		host = fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
	}
	ln, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// listeningLine is that of both formats.
var listeningLine = regexp.MustCompile(`msg"?[=:]"?listening"?[ ,]"?addr"?[=:]"?([^ "]+)"?[ ,]"?admin"?[=:]"?([^ "]+)`)

// listening waits until the relay serves, and returns it.
func (p *program) listening() *program {
	p.t.Helper()
	eventually(p.t, "the program listens", func() bool {
		select {
		case <-p.done:
			p.t.Fatalf("the program ended with %d:\n%s", p.cmd.ProcessState.ExitCode(), p.stderr.String())
		default:
		}
		m := listeningLine.FindStringSubmatch(p.stderr.String())
		if m != nil {
			p.addr, p.admin = m[1], m[2]
		}
		return m != nil
	})
	return p
}

func (p *program) signal(s os.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// said waits for a line in the log.
func (p *program) said(what string) {
	p.t.Helper()
	eventually(p.t, "the program says "+what, func() bool { return strings.Contains(p.stderr.String(), what) })
}

// exit waits for the end and returns the exit code.
func (p *program) exit() int {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("the program has not ended within %v", patience)
	}
	return p.cmd.ProcessState.ExitCode()
}

// wantRefusal waits for the end, which has to be a start that failed with this
// code and one line with all of these words.
func (p *program) wantRefusal(code int, words ...string) {
	p.t.Helper()
	if got := p.exit(); got != code {
		p.t.Errorf("exit code %d, want %d", got, code)
	}
	wantRefusal(p.t, p.stderr.String(), words...)
}

func wantRefusal(t testing.TB, stderr string, words ...string) {
	t.Helper()
	line, rest, _ := strings.Cut(stderr, "\n")
	if rest != "" || !strings.HasPrefix(line, "pyrycode-relay: refusing to start: ") {
		t.Errorf("stderr is not one line that says why:\n%s", stderr)
	}
	for _, w := range words {
		if !strings.Contains(line, w) {
			t.Errorf("%q is not in: %s", w, line)
		}
	}
}

// connect upgrades a connection to the program.
func (p *program) connect(path string, h http.Header) *wsClient {
	p.t.Helper()
	c, resp := p.upgrade(path, h)
	if c == nil {
		p.t.Fatalf("upgrade of %s: %s", path, resp.Status)
	}
	return c
}

// upgrade asks for one. Where it is refused the client is nil.
func (p *program) upgrade(path string, h http.Header) (*wsClient, *http.Response) {
	p.t.Helper()
	c, resp, err := handshake(p.t, p.dial(), path, h)
	if err != nil {
		p.t.Fatal(err)
	}
	return c, resp
}

func (p *program) dial() net.Conn {
	p.t.Helper()
	nc, err := net.Dial("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { nc.Close() })
	return nc
}

// fetch gets a page and returns its body.
func fetch(t testing.TB, url string) (status int, body string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// runOnce calls run in this process, for what ends before anything is opened.
func runOnce(env map[string]string, args ...string) (code int, stdout, stderr string) {
	var out, errOut bytes.Buffer
	code = run(context.Background(), args, env, &out, &errOut)
	return code, out.String(), errOut.String()
}
