// Package e2e drives the built relay from outside, with clients, proxies and
// load balancers that its authors did not write. See README.md.
package e2e

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait of a test: a wait that long is a failure.
const patience = 30 * time.Second

// relayPath is the built binary.
var relayPath string

func TestMain(m *testing.M) { os.Exit(build(m)) }

// build builds the relay as an operator does, and runs the tests against it.
func build(m *testing.M) int {
	dir, err := os.MkdirTemp("", "relay-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	relayPath = filepath.Join(dir, "pyrycode-relay")
	cmd := exec.Command("go", "build", "-o", relayPath, ".")
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the relay: %v\n%s", err, out)
		return 1
	}
	if trusted, err = newAuthority(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// Go and Node.js read these once, when they first need them.
	os.Setenv("SSL_CERT_FILE", trusted.certFile)
	os.Setenv("NODE_EXTRA_CA_CERTS", trusted.certFile)
	// The tests wait more than they work: as many at a time as there are processors
	// would take minutes.
	flag.Parse()
	flag.Set("test.parallel", "8")
	return m.Run()
}

// eventually polls cond until it holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// ownIP is a loopback address that only this process uses.
var ownIP = func() net.IP {
	pid := os.Getpid()
	return net.IPv4(127, byte(64+pid>>16&63), byte(pid>>8), byte(pid))
}()

var ports struct {
	mu    sync.Mutex
	given map[string]bool
}

// freeAddr is an address for a program that cannot be given port 0. The port is
// the kernel's choice, at ownIP, so that nobody else's connection gets it before
// the program has it.
func freeAddr(t testing.TB) string {
	t.Helper()
	ports.mu.Lock()
	defer ports.mu.Unlock()
	for {
		// Of UDP: a listener of TCP, on a port that is given and not bound yet, would be
		// taken for the program that a test waits for.
		ln, err := net.ListenUDP("udp", &net.UDPAddr{IP: ownIP})
		if err != nil {
			t.Fatal(err)
		}
		addr := ln.LocalAddr().String()
		ln.Close()
		if !ports.given[addr] {
			if ports.given == nil {
				ports.given = map[string]bool{}
			}
			ports.given[addr] = true
			return addr
		}
	}
}

// program is a child process whose output is kept.
type program struct {
	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	mu   sync.Mutex    // guards what follows
	out  strings.Builder
}

// start runs cmd until its test ends at the latest. Its output goes to line by
// line, too.
func start(t testing.TB, cmd *exec.Cmd, line func(string)) *program {
	t.Helper()
	p := &program{t: t, cmd: cmd, done: make(chan struct{})}
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		lines := bufio.NewScanner(r)
		for lines.Scan() {
			p.mu.Lock()
			p.out.WriteString(lines.Text() + "\n")
			p.mu.Unlock()
			line(lines.Text())
		}
	}()
	go func() {
		cmd.Wait()
		w.Close()
		<-read
		close(p.done)
	}()
	t.Cleanup(func() {
		p.signal(syscall.SIGKILL)
		<-p.done
		if t.Failed() {
			t.Logf("%s said:\n%s", filepath.Base(cmd.Path), p.output())
		}
	})
	return p
}

func (p *program) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// signal does nothing to a program that has ended.
func (p *program) signal(s os.Signal) { p.cmd.Process.Signal(s) }

// wantExit waits for the end.
func (p *program) wantExit(code int) {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatalf("%s still runs after %v", filepath.Base(p.cmd.Path), patience)
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Errorf("%s ended with %d (%v), want %d", filepath.Base(p.cmd.Path), got, p.cmd.ProcessState, code)
	}
}

// relayProcess is a relay of the built binary.
type relayProcess struct {
	*program
	addr     string
	instance string
	stopping bool // its end is somebody's business already
}

// startRelay starts a relay with an instance lock of its own and no rate limit,
// unless flags say otherwise, and waits until it listens. It has to stop with
// exit 0 when its test ends.
func startRelay(t testing.TB, flags ...string) *relayProcess {
	t.Helper()
	return startRelayEnv(t, nil, flags...)
}

func startRelayEnv(t testing.TB, env []string, flags ...string) *relayProcess {
	t.Helper()
	args := append([]string{"-listen", "127.0.0.1:0", "-admin", "off", "-instance-lock", freeAddr(t),
		"-rate-per-minute", "0", "-log-format", "json"}, flags...)
	r := &relayProcess{}
	type listening struct{ Msg, Addr, Instance string }
	ready := make(chan listening, 1)
	cmd := exec.Command(relayPath, args...)
	cmd.Env = append(os.Environ(), env...)
	r.program = start(t, cmd, func(line string) {
		var l listening
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "listening" {
			ready <- l
		}
	})
	select {
	case l := <-ready:
		r.addr, r.instance = l.Addr, l.Instance
	case <-r.done:
		t.Fatalf("the relay did not start:\n%s", r.output())
	case <-time.After(patience):
		t.Fatalf("the relay does not listen after %v", patience)
	}
	t.Cleanup(func() {
		if !r.stopping {
			r.stop()
		}
	})
	return r
}

// stop asks the relay to stop, which it does with exit 0.
func (r *relayProcess) stop() {
	r.t.Helper()
	r.stopping = true
	r.signal(syscall.SIGTERM)
	r.wantExit(0)
}

// wantOut waits until the relay ends by itself, because it is the second.
func (r *relayProcess) wantOut() {
	r.t.Helper()
	r.stopping = true
	r.wantExit(2)
}

// health is /healthz at an address of urlOf.
type health struct {
	Instance string `json:"instance"`
	Check    string `json:"instance_check"`
	Split    string `json:"split_seen"`
	Binaries int    `json:"connected_binaries"`
	Phones   int    `json:"connected_phones"`
	Uptime   int    `json:"uptime_seconds"`
}

// noKeepAlive asks who answers now: a connection that it kept would lead to a
// proxy's process from before a reload.
var noKeepAlive = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}

func getHealth(t testing.TB, addr string) (h health) {
	t.Helper()
	resp, err := noKeepAlive.Get(urlOf("http", addr, "/healthz"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&h); err != nil {
		t.Fatal(err)
	}
	return h
}
