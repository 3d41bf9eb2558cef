package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The lock: who may start, and what a second relay is told.

// lockOf is the -instance-lock of a program.
func lockOf(p *program) string {
	lock := ""
	for _, v := range p.cmd.Env {
		if s, ok := strings.CutPrefix(v, "PYRYCODE_RELAY_INSTANCE_LOCK="); ok {
			lock = s // the last one counts
		}
	}
	return lock
}

// holderOf is what the holder of a program's lock says of itself, nil for nothing.
func holderOf(p *program) *lockInfo {
	held, gone := askHolder(lockOf(p))
	if gone {
		return nil
	}
	return held.holder
}

// withLock is the environment of a relay that shares a lock.
func withLock(lock string, more ...string) []string {
	return append([]string{"PYRYCODE_RELAY_INSTANCE_LOCK=" + lock}, more...)
}

func TestSecondRelayIsRefused(t *testing.T) {
	t.Parallel()
	first := startProgram(t, nil).listening()
	lock := lockOf(first)
	words := []string{
		"refusing to start: multi-instance deploy detected: ", fmt.Sprintf("(pid %d, listening on %q, up ", first.cmd.Process.Pid, first.addr),
		"holds " + lock, "a silent 4404", fmt.Sprintf("kill %d", first.cmd.Process.Pid), "PYRYCODE_RELAY_SINGLE_INSTANCE=1",
	}
	for _, args := range [][]string{{"-listen", first.addr}, {"-listen", "127.0.0.1:0", "-admin", "off"}, {"-log-format", "json"}} {
		startProgram(t, withLock(lock), args...).wantRefusal(2, words...)
	}
	if status, _ := fetch(t, "http://"+first.addr+"/healthz"); status != 200 {
		t.Errorf("the first relay answers %d afterwards, want 200", status)
	}
}

func TestHolderSaysWhoItIs(t *testing.T) {
	t.Parallel()
	before := time.Now().Add(-time.Second)
	p := startProgram(t, nil).listening()
	p.connect("/v2/server", binaryHeaders("s"))
	eventually(t, "the holder counts the binary", func() bool { h := holderOf(p); return h != nil && h.Servers == 1 })
	nc, err := net.Dial("tcp", lockOf(p))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(patience))
	br := bufio.NewReader(nc)
	line, err := br.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if rest, err := br.ReadString('\n'); rest != "" || err == nil {
		t.Errorf("behind the line come %q and %v, want the end", rest, err)
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(line), &got); err != nil {
		t.Fatal(err)
	}
	_, health := fetch(t, "http://"+p.addr+"/healthz")
	var public struct{ Version, Instance string }
	if err := json.Unmarshal([]byte(health), &public); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]any{
		"program": "pyrycode-relay", "pid": float64(p.cmd.Process.Pid), "version": public.Version, "instance": public.Instance,
		"listen": p.addr, "admin": p.admin, "servers": 1.0, "draining": false,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
	started, err := time.Parse(time.RFC3339Nano, fmt.Sprint(got["started"]))
	if err != nil || started.Before(before) || started.After(time.Now()) {
		t.Errorf("started is %v (%v), want between %v and now", got["started"], err, before)
	}
}

func TestHolderSaysThatItIsShuttingDown(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-drain", "1h").listening()
	p.connect("/v2/server", binaryHeaders("s")) // never answers, so that the drain lasts
	p.signal(syscall.SIGTERM)
	eventually(t, "the holder drains", func() bool { h := holderOf(p); return h != nil && h.Draining })
	startProgram(t, withLock(lockOf(p))).wantRefusal(2, "multi-instance deploy detected", "shutting down just now")
}

// strangers hold the lock and are no relay.
var strangers = []struct {
	name  string
	talk  func(net.Conn)
	words string
}{
	{"answers", func(nc net.Conn) { fmt.Fprint(nc, "SSH-2.0-x\r\nmore\x1b[2J"); nc.Close() }, `(it says "SSH-2.0-x\r\nmore\x1b[2J")`},
	{"answers with JSON", func(nc net.Conn) { fmt.Fprintln(nc, `{"program":"other"}`); nc.Close() }, `(it says "{\"program\":\"other\"}")`},
	{"talks without end", func(nc net.Conn) {
		for {
			if _, err := nc.Write(make([]byte, 4096)); err != nil {
				return
			}
		}
	}, `(it says "\x00`},
	{"closes", func(nc net.Conn) { nc.Close() }, "(it closes the connection)"},
	{"resets", func(nc net.Conn) { nc.(*net.TCPConn).SetLinger(0); nc.Close() }, "(it resets the connection)"},
}

// TestLockHeldByFrozenRelay: what says nothing may be a relay that is stopped. A
// second one on another port is the last thing to advise.
func TestLockHeldByFrozenRelay(t *testing.T) {
	t.Parallel()
	first := startProgram(t, nil).listening()
	kill := func(signal string) { // not by package syscall, which has these signals on some systems only
		if out, err := exec.Command("kill", signal, strconv.Itoa(first.cmd.Process.Pid)).CombinedOutput(); err != nil {
			t.Fatalf("kill %s: %v: %s", signal, err, out)
		}
	}
	kill("-STOP")
	defer kill("-CONT")
	lock := lockOf(first)
	port := lock[strings.LastIndexByte(lock, ':')+1:]
	second := startProgram(t, withLock(lock))
	second.wantRefusal(2, lock+", the -instance-lock, is held by something that may be a relay that is stopped", "(it says nothing within 2s)", "kill -CONT", port)
	if strings.Contains(second.stderr.String(), "choose another") {
		t.Errorf("it advises a second relay:\n%s", second.stderr.String())
	}
	if runtime.GOOS != "linux" {
		return
	}
	_, rest, _ := strings.Cut(second.stderr.String(), "find its pid, as root, with: ")
	command, _, _ := strings.Cut(rest, ";")
	if _, err := exec.LookPath("ss"); err != nil {
		t.Skip(err)
	}
	out, err := exec.Command("sh", "-c", command).CombinedOutput()
	if want := fmt.Sprintf("pid=%d,", first.cmd.Process.Pid); err != nil || !strings.Contains(string(out), want) {
		t.Errorf("%s: %v, want %s in\n%s", command, err, want, out)
	}
}

// TestHolderLineThatMakesNoSense: a line is taken for a relay's only if one can
// have said it, and nothing of it reaches a terminal as it is.
func TestHolderLineThatMakesNoSense(t *testing.T) {
	t.Parallel()
	good := lockInfo{
		Program: programName, PID: 4242, Version: "v1", Instance: "0123456789abcdef", Listen: "127.0.0.1:8080", Admin: "off", Started: time.Now().Add(-time.Hour),
	}
	ahead := good // its clock was wrong when it started
	ahead.Started, ahead.Uptime = time.Now().Add(72*time.Hour), 60
	for _, h := range []lockInfo{good, ahead} {
		line, _ := json.Marshal(h)
		lock := stranger(t, func(nc net.Conn) { nc.Write(line); nc.Close() })
		_, err := lockInstance(lock, lockInfo{})
		if err == nil || !strings.Contains(err.Error(), "multi-instance deploy detected") || !strings.Contains(err.Error(), "kill 4242") {
			t.Fatalf("a good line: %v", err)
		}
	}
	for name, change := range map[string]func(*lockInfo){
		"another program":     func(h *lockInfo) { h.Program = "x" },
		"no pid":              func(h *lockInfo) { h.PID = 0 },
		"everybody's pid":     func(h *lockInfo) { h.PID = -1 },
		"the pid of init":     func(h *lockInfo) { h.PID = 1 },
		"no such pid":         func(h *lockInfo) { h.PID = maxPID; h.PID++ },
		"a start to come":     func(h *lockInfo) { h.Started = time.Now().Add(time.Hour) },
		"no start":            func(h *lockInfo) { h.Started = time.Time{} },
		"a negative uptime":   func(h *lockInfo) { h.Uptime, h.Started = -5, time.Now().Add(time.Hour) },
		"an endless uptime":   func(h *lockInfo) { h.Uptime = 1 << 62 },
		"fewer than none":     func(h *lockInfo) { h.Servers = -1 },
		"escape sequences":    func(h *lockInfo) { h.Version = "\x1b]0;owned\a" },
		"line breaks":         func(h *lockInfo) { h.Listen = "x\nlevel=ERROR msg=y" },
		"C1 control":          func(h *lockInfo) { h.Admin = "\u009b2J" },
		"text to the left":    func(h *lockInfo) { h.Instance = "\u202eabc" },
		"a version too long":  func(h *lockInfo) { h.Version = strings.Repeat("1", 500) },
		"an address too long": func(h *lockInfo) { h.Listen = strings.Repeat("1", 500) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := good
			change(&h)
			line, _ := json.Marshal(h)
			lock := stranger(t, func(nc net.Conn) { nc.Write(append(line, '\n')); nc.Close() })
			_, err := lockInstance(lock, lockInfo{})
			if err == nil {
				t.Fatal("the lock is free")
			}
			text := err.Error()
			if strings.Contains(text, "multi-instance deploy detected") || strings.Contains(text, fmt.Sprintf("kill %d", h.PID)) || !strings.Contains(text, "it says \"{") {
				t.Errorf("it is believed: %s", text)
			}
			if i := strings.IndexFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }); i >= 0 || len(text) > 1000 {
				t.Errorf("raw, or without end: %q", text)
			}
			if h.Program == programName && strings.Contains(text, "choose another") {
				t.Errorf("it advises a second relay beside what may be one: %s", text)
			}
		})
	}
}

func TestLockHeldByStranger(t *testing.T) {
	t.Parallel()
	for _, s := range strangers {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			lock := stranger(t, s.talk)
			startProgram(t, withLock(lock)).wantRefusal(2, lock+", the -instance-lock, is held by something that does not answer as a relay does "+s.words, "choose another loopback port with -instance-lock")
			if _, err := lockInstance(lock, lockInfo{}); err == nil || strings.Contains(err.Error(), "multi-instance") {
				t.Errorf("a stranger is taken for a relay: %v", err)
			}
		})
	}
	t.Run("takes no connections", func(t *testing.T) {
		t.Parallel()
		lock := freeLock(t)
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer syscall.Close(fd)
		ap := net.TCPAddr{}
		if a, err := net.ResolveTCPAddr("tcp", lock); err == nil {
			ap = *a
		}
		if err := syscall.Bind(fd, &syscall.SockaddrInet4{Port: ap.Port, Addr: [4]byte(ap.IP.To4())}); err != nil {
			t.Fatal(err)
		}
		startProgram(t, withLock(lock)).wantRefusal(2, lock, "(it takes no connections)")
	})
}

// stranger listens until the test ends and does one thing with each connection.
func stranger(t testing.TB, talk func(net.Conn)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", freeLock(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { nc.Close() })
			go talk(nc)
		}
	}()
	return ln.Addr().String()
}

// What the kernel does with the lock of a process that was given no chance.
func TestLockIsFreeAfterKill(t *testing.T) {
	t.Parallel()
	first := startProgram(t, nil).listening()
	asker, err := net.Dial("tcp", lockOf(first)) // holds the port in TIME_WAIT and worse
	if err != nil {
		t.Fatal(err)
	}
	defer asker.Close()
	first.signal(os.Kill)
	first.exit()
	second := startProgram(t, withLock(lockOf(first)), "-listen", first.addr).listening()
	if h := holderOf(second); h == nil || h.PID != second.cmd.Process.Pid {
		t.Errorf("the holder is %+v, want pid %d", h, second.cmd.Process.Pid)
	}
}

// A holder that goes while it is asked is a port that is free.
func TestHolderThatGoesMakesRoom(t *testing.T) {
	t.Parallel()
	addr := freeLock(t)
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		nc, err := ln.Accept()
		if err == nil {
			ln.Close()
			nc.(*net.TCPConn).SetLinger(0)
			nc.Close()
		}
	}()
	lock, err := lockInstance(addr, lockInfo{})
	if err != nil {
		t.Fatal(err)
	}
	lock.Close()
}

// No listener opens before the lock: where both are taken, the lock is what is
// complained about, and while the lock is being asked for nobody answers yet.
func TestLockComesFirst(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 1)
	lock := stranger(t, func(net.Conn) { asked <- struct{}{} }) // is silent for 2 s
	listen, admin := freeLock(t), freeLock(t)
	p := startProgram(t, withLock(lock), "-listen", listen, "-admin", admin)
	select {
	case <-asked:
	case <-time.After(patience):
		t.Fatal("the holder is not asked")
	}
	for _, addr := range []string{listen, admin} {
		if nc, err := net.Dial("tcp", addr); !errors.Is(err, syscall.ECONNREFUSED) {
			if err == nil {
				nc.Close()
			}
			t.Errorf("dialing %s while the lock is not held: %v, want refused", addr, err)
		}
	}
	p.wantRefusal(2, lock)

	startProgram(t, withLock(lock), "-listen", stranger(t, func(net.Conn) {})).wantRefusal(2, lock)
}

// Two starts at the same moment: exactly one wins, and the other names it.
func TestTwoStartsAtOnce(t *testing.T) {
	t.Parallel()
	for round := range 100 {
		env := withLock(freeLock(t))
		both := [2]*program{startProgram(t, env, "-admin", "off"), startProgram(t, env, "-admin", "off")}
		var loser int
		select {
		case <-both[0].done:
		case <-both[1].done:
			loser = 1
		case <-time.After(patience):
			t.Fatalf("round %d: neither has ended within %v", round, patience)
		}
		winner := both[1-loser].listening()
		both[loser].wantRefusal(2, "multi-instance deploy detected", fmt.Sprintf("pid %d,", winner.cmd.Process.Pid), env[0][len("PYRYCODE_RELAY_INSTANCE_LOCK="):])
		winner.signal(syscall.SIGTERM)
		if code := winner.exit(); code != 0 {
			t.Errorf("round %d: the winner ends with %d, want 0", round, code)
		}
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
}

// Whoever connects and says or reads nothing does not keep others from asking.
func TestHolderUnderIdleConnections(t *testing.T) {
	t.Parallel()
	addr := freeLock(t)
	lock, err := lockInstance(addr, lockInfo{Program: programName, PID: 42, Started: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	for range 200 {
		nc, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
	}
	var held *heldError
	if _, err := lockInstance(addr, lockInfo{}); !errors.As(err, &held) || held.holder == nil || held.holder.PID != 42 {
		t.Errorf("behind 200 idle connections the holder says %v", err)
	}
	if n := len(lock.talks); n > maxLockTalks {
		t.Errorf("%d connections linger, want %d at most", n, maxLockTalks)
	}
}

func TestLockIsGivenBack(t *testing.T) {
	t.Parallel()
	addr := freeLock(t)
	for range 3 {
		lock, err := lockInstance(addr, lockInfo{})
		if err != nil {
			t.Fatal(err)
		}
		nc, err := net.Dial("tcp", addr) // lingers and is not waited for
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		if err := lock.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLockThatCannotBeBound(t *testing.T) {
	t.Parallel()
	_, err := lockInstance("192.0.2.1:24404", lockInfo{})
	if err == nil || !strings.Contains(err.Error(), "binding 192.0.2.1:24404, the -instance-lock, which proves") {
		t.Errorf("an address of another host: %v", err)
	}
}

const verdictBypassed = `pyrycode_relay_instance_check{check="host",verdict="bypassed"} `

func TestBypassRunsBesideAnother(t *testing.T) {
	t.Parallel()
	first := startProgram(t, nil).listening()
	if _, text := fetch(t, "http://"+first.admin+"/metrics"); !strings.Contains(text, verdictBypassed+"0\n") {
		t.Error("the first relay's metrics do not say that nothing was bypassed")
	}
	second := startProgram(t, withLock(lockOf(first), bypassName+"=1")).listening()
	second.said("level=WARN")
	second.said("SINGLE-INSTANCE CHECK BYPASSED by PYRYCODE_RELAY_SINGLE_INSTANCE=1")
	second.said(fmt.Sprintf("another relay on this host: pid %d, listening on %s", first.cmd.Process.Pid, first.addr))
	if strings.Contains(second.stderr.String(), "the only relay") {
		t.Errorf("it claims to be alone:\n%s", second.stderr.String())
	}
	if _, text := fetch(t, "http://"+second.admin+"/metrics"); !strings.Contains(text, verdictBypassed+"1\n") {
		t.Error("the second relay's metrics do not say bypassed")
	}
	for _, p := range []*program{first, second} {
		if status, _ := fetch(t, "http://"+p.addr+"/readyz"); status != 200 {
			t.Errorf("pid %d answers %d, want 200", p.cmd.Process.Pid, status)
		}
	}
}

// A bypass must not blind the relays that come after it.
func TestBypassTakesAFreeLock(t *testing.T) {
	t.Parallel()
	first := startProgram(t, []string{bypassName + "=1"}).listening()
	first.said("SINGLE-INSTANCE CHECK BYPASSED")
	first.said("no other relay on this host")
	startProgram(t, withLock(lockOf(first))).wantRefusal(2, "multi-instance deploy detected", fmt.Sprintf("pid %d,", first.cmd.Process.Pid))
}

func TestBypassBesideStranger(t *testing.T) {
	t.Parallel()
	p := startProgram(t, withLock(stranger(t, func(nc net.Conn) { nc.Close() }), bypassName+"=1")).listening()
	p.said("SINGLE-INSTANCE CHECK BYPASSED")
	p.said("is held by something that does not answer as a relay does (it closes the connection)")
}

func TestPlatformWhereScalingOutIsOneCommand(t *testing.T) {
	t.Parallel()
	for name, platform := range map[string]string{"FLY_APP_NAME": "Fly.io", "KUBERNETES_SERVICE_HOST": "Kubernetes"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sign := name + "=x"
			startProgram(t, []string{sign}).wantRefusal(2, "multi-instance deploy detected", name+" is set", platform,
				"silent 4404", "-public-url", "PYRYCODE_RELAY_PUBLIC_URL", "verifies instead of assuming", "PYRYCODE_RELAY_SINGLE_INSTANCE=1")
			startProgram(t, []string{sign, bypassName + "=1"}).listening()
			startProgram(t, []string{sign}, "-public-url", "ws://"+freeLock(t)).listening()
			startProgram(t, []string{name + "="}).listening()
		})
	}
}
