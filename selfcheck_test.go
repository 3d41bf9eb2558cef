package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
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
)

// What keeps a second relay from running unnoticed: the instance lock with whole
// programs; the check of the public name over time with rounds made up and the clock
// of synctest, and round by round with real relays behind a balancer.

// ---- the instance lock ----

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
	held, gone := askHolder(lockOf(p), lockInfo{})
	if gone {
		return nil
	}
	return held.holder
}

// withLock is the environment of a relay that shares a lock.
func withLock(lock string, more ...string) []string {
	return append([]string{"PYRYCODE_RELAY_INSTANCE_LOCK=" + lock}, more...)
}

func TestLockRefusesASecondRelay(t *testing.T) {
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

func TestLockHolderSaysWhoItIs(t *testing.T) {
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
	line, err := io.ReadAll(nc)
	var got map[string]any
	if err != nil || strings.Count(string(line), "\n") != 1 || json.Unmarshal(line, &got) != nil {
		t.Fatalf("%q and %v, want a line of JSON and the end", line, err)
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

func TestLockHolderSaysThatItIsShuttingDown(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-drain", "1h").listening()
	p.connect("/v2/server", binaryHeaders("s")) // never answers, so that the drain lasts
	p.signal(syscall.SIGTERM)
	eventually(t, "the holder drains", func() bool { h := holderOf(p); return h != nil && h.Draining })
	startProgram(t, withLock(lockOf(p))).wantRefusal(2, "multi-instance deploy detected", "shutting down just now")
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
	second.wantRefusal(2, lock+", the -instance-lock, is held by something that may be a relay that is stopped",
		"(it says nothing within 2s)", "kill -CONT", port)
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

// TestLockHolderLineThatMakesNoSense: a line is taken for a relay's only if one can
// have said it, and nothing of it reaches a terminal as it is.
func TestLockHolderLineThatMakesNoSense(t *testing.T) {
	t.Parallel()
	good := lockInfo{
		Program: programName, PID: 4242, Version: "v1", Instance: "0123456789abcdef",
		Listen: "127.0.0.1:8080", Admin: "off", Started: time.Now().Add(-time.Hour),
	}
	me := lockInfo{Host: "here", PIDSpace: "boot pid:[1]"}
	ahead, beside, moved, boxed, far := good, good, good, good, good
	ahead.Started, ahead.Uptime = time.Now().Add(72*time.Hour), 60 // its clock was wrong when it started
	beside.Host, beside.PIDSpace = me.Host, me.PIDSpace
	moved.Host, moved.PIDSpace = "renamed since", me.PIDSpace
	boxed.Host, boxed.PIDSpace, boxed.PID = me.Host, "boot pid:[2]", 1
	far.Host, far.PIDSpace = "5f2b7c", "another pid:[1]"
	for _, h := range []lockInfo{good, ahead, beside, moved, boxed, far} {
		for kind, hold := range holders {
			here := h.PIDSpace == "" || h.Host == me.Host && h.PIDSpace == me.PIDSpace
			line, _ := json.Marshal(h)
			_, err := lockInstance([]string{hold(t, string(line))}, me, false)
			if !isHeldBy(err, h.PID) || strings.Contains(err.Error(), "kill ") != here ||
				strings.Contains(err.Error(), fmt.Sprintf("on another host or in another container, %q (pid", h.Host)) == here ||
				strings.Contains(err.Error(), "binaries connected: 0") != (kind == "port") {
				t.Errorf("a good line of a %s: %v", kind, err)
			}
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
		"a host's escapes":    func(h *lockInfo) { h.Host = "\x1b]0;owned\a" },
		"a namespace's break": func(h *lockInfo) { h.PIDSpace = "x\ny" },
		"a host too long":     func(h *lockInfo) { h.Host = strings.Repeat("1", 500) },
		"escape sequences":    func(h *lockInfo) { h.Version = "\x1b]0;owned\a" },
		"line breaks":         func(h *lockInfo) { h.Listen = "x\nlevel=ERROR msg=y" },
		"C1 control":          func(h *lockInfo) { h.Admin = "\u009b2J" },
		"text to the left":    func(h *lockInfo) { h.Instance = "\u202eabc" },
		"a version too long":  func(h *lockInfo) { h.Version = strings.Repeat("1", 500) },
		"an address too long": func(h *lockInfo) { h.Listen = strings.Repeat("1", 500) },
	} {
		for kind, hold := range holders {
			t.Run(name+" "+kind, func(t *testing.T) {
				t.Parallel()
				h := good
				change(&h)
				line, _ := json.Marshal(h)
				_, err := lockInstance([]string{hold(t, string(line)+"\n")}, lockInfo{}, false)
				if err == nil {
					t.Fatal("the lock is free")
				}
				text := err.Error()
				if strings.Contains(text, "multi-instance deploy detected") || strings.Contains(text, fmt.Sprintf("kill %d", h.PID)) ||
					!strings.Contains(text, "it says \"{") {
					t.Errorf("it is believed: %s", text)
				}
				if i := strings.IndexFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }); i >= 0 || len(text) > 1000 {
					t.Errorf("raw, or without end: %q", text)
				}
				if (h.Program == programName || kind == "file") && strings.Contains(text, "choose another") {
					t.Errorf("it advises a second relay beside what may be one: %s", text)
				}
			})
		}
	}
}

// holders hold a lock of either kind, and say something there.
var holders = map[string]func(t testing.TB, text string) (lock string){
	"port": func(t testing.TB, text string) string { return serveRaw(t, nil, saying(text)) },
	"file": func(t testing.TB, text string) string {
		needLockFiles(t)
		path := filepath.Join(t.TempDir(), "lock")
		f, err := os.Create(path)
		if err == nil {
			_, err = f.WriteString(text)
		}
		if err != nil || flock(f) != nil {
			t.Fatalf("%s: %v", path, err)
		}
		t.Cleanup(func() { f.Close() })
		return path
	},
}

// TestLockHeldByStranger: what holds the lock and is no relay is told by what it does.
func TestLockHeldByStranger(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		speak func(net.Conn)
		heard string
	}{
		{"answers", saying("SSH-2.0-x\r\nmore\x1b[2J"), `(it says "SSH-2.0-x\r\nmore\x1b[2J")`},
		{"answers with JSON", saying(`{"program":"other"}`), `(it says "{\"program\":\"other\"}")`},
		{"talks without end", func(nc net.Conn) {
			for err := error(nil); err == nil; {
				_, err = nc.Write(make([]byte, 4096))
			}
		}, `(it says "\x00`},
		{"closes", func(nc net.Conn) { nc.Close() }, "(it closes the connection)"},
		{"resets", func(nc net.Conn) { nc.(*net.TCPConn).SetLinger(0); nc.Close() }, "(it resets the connection)"},
		{"takes no connections", nil, "(it takes no connections)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			lock := ""
			if tt.speak == nil {
				lock = boundOnly(t)
			} else {
				lock = serveRaw(t, nil, tt.speak)
			}
			startProgram(t, withLock(lock)).wantRefusal(2, lock+", the -instance-lock, "+
				"is held by something that does not answer as a relay does "+tt.heard, "choose another loopback port with -instance-lock")
			if _, err := lockInstance([]string{lock}, lockInfo{}, false); err == nil || strings.Contains(err.Error(), "multi-instance") {
				t.Errorf("a stranger is taken for a relay: %v", err)
			}
			beside := startProgram(t, withLock(lock, bypassName+"=1")).listening()
			beside.said("SINGLE-INSTANCE CHECK BYPASSED")
			beside.said("is held by something that does not answer as a relay does")
		})
	}
}

// saying says something at once and hangs up.
func saying(text string) func(net.Conn) {
	return func(nc net.Conn) { io.WriteString(nc, text); nc.Close() }
}

// boundOnly is an address that is taken, and where nothing listens.
func boundOnly(t *testing.T) (addr string) {
	t.Helper()
	addr = freeLock(t)
	at, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Port: at.Port, Addr: [4]byte(at.IP.To4())}); err != nil {
		t.Fatal(err)
	}
	return addr
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
func TestLockOfHolderThatGoesIsFree(t *testing.T) {
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
	lock, err := lockInstance([]string{addr}, lockInfo{}, false)
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
	lock := serveRaw(t, nil, func(net.Conn) { asked <- struct{}{} }) // is silent for 2 s
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

	startProgram(t, withLock(lock), "-listen", serveRaw(t, nil, func(net.Conn) {})).wantRefusal(2, lock)
}

// Two starts at the same moment: exactly one wins, and the other names it.
func TestLockOfTwoStartsAtOnce(t *testing.T) {
	t.Parallel()
	for round := range 100 {
		lock := freeLock(t)
		env := withLock(lock)
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
		both[loser].wantRefusal(2, "multi-instance deploy detected", fmt.Sprintf("pid %d,", winner.cmd.Process.Pid), lock)
		winner.signal(syscall.SIGTERM)
		if code := winner.exit(); code != 0 {
			t.Errorf("round %d: the winner ends with %d, want 0", round, code)
		}
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
}

// TestLockHolderUnderIdleConnections: those who connect and say or read nothing keep
// nobody from asking, and do not hold up the end.
func TestLockHolderUnderIdleConnections(t *testing.T) {
	t.Parallel()
	addr := freeLock(t)
	for range 3 {
		lock, err := lockInstance([]string{addr}, lockInfo{Program: programName, PID: 42, Started: time.Now()}, false)
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			nc, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
		}
		if _, err := lockInstance([]string{addr}, lockInfo{}, false); !isHeldBy(err, 42) {
			t.Errorf("behind 100 idle connections the holder says %v", err)
		}
		lock.Close()
	}
}

func isHeldBy(err error, pid int) bool {
	held, ok := errors.AsType[*heldError](err)
	return ok && held.holder != nil && held.holder.PID == pid
}

func TestLockThatCannotBeBound(t *testing.T) {
	t.Parallel()
	_, err := lockInstance([]string{"192.0.2.1:24404"}, lockInfo{}, false)
	if err == nil || !strings.Contains(err.Error(), "binding 192.0.2.1:24404, the -instance-lock, which proves") {
		t.Errorf("an address of another host: %v", err)
	}
}

// TestLockFile: whoever sees the file sees its holder, as a user of the program does.
func TestLockFile(t *testing.T) {
	t.Parallel()
	needLockFiles(t)
	path := filepath.Join(t.TempDir(), "relay.lock")
	both := func() []string { return withLock(freeLock(t) + "," + path) }
	first := startProgram(t, both()).listening()
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	line := func() (h lockInfo) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil || json.Unmarshal(b, &h) != nil || !bytes.HasSuffix(b, []byte("}\n")) {
			t.Fatalf("%v, the file has %q", err, b)
		}
		return h
	}
	if h := line(); h.PID != first.cmd.Process.Pid || h.Host != host || h.Listen != first.addr || h.Admin != first.admin || h.Uptime != 0 {
		t.Errorf("the file has %+v", h)
	}
	if at, err := os.Lstat(path); err != nil || at.Mode() != 0o600 {
		t.Errorf("the file is %v, %v", at.Mode(), err)
	}
	kill := exec.Command("kill", "-STOP", strconv.Itoa(first.cmd.Process.Pid)) // the file answers for a frozen relay
	if out, err := kill.CombinedOutput(); err != nil {
		t.Fatal(string(out))
	}
	startProgram(t, both()).wantRefusal(2, "multi-instance deploy detected: ", "already runs on this host",
		fmt.Sprintf("(pid %d, listening on %q, up ", first.cmd.Process.Pid, first.addr), "holds "+path, "a silent 4404",
		fmt.Sprintf("kill %d", first.cmd.Process.Pid))
	first.signal(os.Kill)
	first.exit()
	second := startProgram(t, both()).listening()
	beside := startProgram(t, append(both(), bypassName+"=1")).listening()
	beside.said(fmt.Sprintf("another relay on this host: pid %d, listening on %s", second.cmd.Process.Pid, second.addr))
	beside.signal(syscall.SIGTERM)
	beside.exit()
	second.signal(syscall.SIGTERM)
	second.exit()
	if h := line(); h.PID != second.cmd.Process.Pid {
		t.Errorf("behind two that are gone the file has %+v", h)
	}
}

func needLockFiles(t testing.TB) {
	if flock == nil {
		t.Skip("no lock files on this system")
	}
}

// TestLockFileThatCannotBeTaken: what is wrong, and the remedy; and what was there stays.
// It is not parallel: it has a file system without locks.
func TestLockFileThatCannotBeTaken(t *testing.T) {
	needLockFiles(t)
	write := func(t *testing.T, path, text string, mode os.FileMode) {
		if err := cmp.Or(os.WriteFile(path, []byte(text), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	const ours = `{"program":"pyrycode-relay"`
	nowhere := func(t *testing.T, path string) { os.Remove(filepath.Dir(path)) }
	for _, tt := range []struct {
		name  string
		make  func(t *testing.T, path string)
		words []string // none: it can be taken
	}{
		{"no directory", nowhere, []string{"no such file or directory: its directory has to be there"}},
		{"no right to", func(t *testing.T, path string) {
			if os.Getuid() == 0 {
				t.Skip("root may do everything")
			}
			os.Chmod(filepath.Dir(path), 0o500)
		}, []string{"permission denied: its directory", "chown"}},
		{"a directory", func(t *testing.T, path string) { os.Mkdir(path, 0o700) }, []string{"it is drwx------: want a file"}},
		{"a link", func(t *testing.T, path string) {
			write(t, path+".to", ours, 0o600)
			os.Symlink(path+".to", path)
		}, []string{"it is Lrwxrwxrwx: want a file", "no link"}},
		{"a link to nothing", func(t *testing.T, path string) { os.Symlink(path+".to", path) }, []string{"it is Lrwxrwxrwx: want a file"}},
		{"a pipe", func(t *testing.T, path string) {
			if out, err := exec.Command("mkfifo", "-m", "600", path).CombinedOutput(); err != nil {
				t.Skipf("%v: %s", err, out)
			}
		}, []string{"it is prw-------: want a file"}},
		{"anybody's", func(t *testing.T, path string) { write(t, path, ours, 0o666) }, []string{"it is -rw-rw-rw-: want a file", "chmod 600"}},
		{"something of value", func(t *testing.T, path string) { write(t, path, "root:x:0:0\x1b\n", 0o600) },
			[]string{`it says "root:x:0:0\x1b": no relay wrote that, and this one would overwrite it: choose another file`}},
		{"no locks", func(t *testing.T, path string) {
			was := flock
			flock = func(f *os.File) error {
				if f.Name() == path {
					return syscall.ENOLCK
				}
				return was(f)
			}
			t.Cleanup(func() { flock = was })
		}, []string{syscall.ENOLCK.Error() + ": this file system has no locks: choose a file on one that has, such as /run/lock"}},
		{"what a power cut leaves", func(t *testing.T, path string) { write(t, path, "\x00\x00\x00", 0o600) }, nil},
		{"an older line", func(t *testing.T, path string) {
			write(t, path, ours+`,"admin":"`+strings.Repeat("1", 2000)+"\"}\n", 0o644)
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "relay.lock")
			tt.make(t, path)
			read := func() []byte {
				if at, err := os.Stat(path); err != nil || !at.Mode().IsRegular() {
					return nil
				}
				b, _ := os.ReadFile(path)
				return b
			}
			before, locks := read(), []string{freeLock(t), filepath.Join(t.TempDir(), "free"), path}
			if len(tt.words) > 0 {
				wantNoStart(t, withLock(path), nil, append(tt.words, "locking "+path+", the -instance-lock, which proves that")...)
			}
			l, err := lockInstance(locks, newLockInfo(newIdentity(time.Now()), "v1", "", ""), false)
			after := read()
			if len(tt.words) == 0 {
				if err != nil || bytes.Count(after, []byte("\n")) != 1 || !json.Valid(after) {
					t.Fatalf("%v, with %q in it", err, after)
				}
				l.Close()
				return
			}
			for _, w := range tt.words {
				if err == nil || !strings.Contains(err.Error(), w) {
					t.Errorf("%v, want %s in it", err, w)
				}
			}
			if !bytes.Equal(before, after) {
				t.Errorf("%q became %q", before, after)
			}
			rest, err := lockInstance(locks, lockInfo{}, true) // the others are free again
			if err == nil || len(rest.ports) != 1 || len(rest.files) != 1 {
				t.Errorf("%v, and %+v is held", err, rest)
			}
			rest.Close()
		})
	}
	path := filepath.Join(t.TempDir(), "relay.lock")
	if _, err := lockInstance([]string{path, path}, newLockInfo(newIdentity(time.Now()), "", "", ""), false); err == nil ||
		!strings.Contains(err.Error(), "this relay has it already, by another path: name it once") {
		t.Errorf("one file, twice: %v", err)
	}
}

// TestLocksOfTwoStartsAtOnce: over two locks, whatever their order, never both win and
// never both lose.
func TestLocksOfTwoStartsAtOnce(t *testing.T) {
	t.Parallel()
	needLockFiles(t)
	var rounds sync.WaitGroup
	for round := range 100 {
		dir := t.TempDir()
		a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
		if round%2 == 0 {
			a = freeLock(t)
		}
		rounds.Go(func() {
			var both sync.WaitGroup
			var locks [2]*instanceLock
			var errs [2]error
			for i, list := range [2]string{a + "," + b, b + " , " + a} {
				order, err := parseLocks(list)
				if err != nil {
					t.Error(err)
				}
				both.Go(func() {
					locks[i], errs[i] = lockInstance(order, lockInfo{Program: programName, Instance: list, PID: 40 + i, Started: time.Now()}, false)
				})
			}
			both.Wait()
			winner := 0
			if errs[0] != nil {
				winner = 1
			}
			if errs[winner] != nil || !isHeldBy(errs[1-winner], 40+winner) {
				t.Errorf("round %d: %v and %v", round, errs[0], errs[1])
				return
			}
			locks[winner].Close()
		})
	}
	rounds.Wait()
}

const verdictBypassed = `pyrycode_relay_instance_check{check="host",verdict="bypassed"} `

func TestLockBypassRunsBesideAnother(t *testing.T) {
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
func TestLockBypassTakesAFreeLock(t *testing.T) {
	t.Parallel()
	first := startProgram(t, []string{bypassName + "=1"}).listening()
	first.said("SINGLE-INSTANCE CHECK BYPASSED")
	first.said("no other relay on this host")
	startProgram(t, withLock(lockOf(first))).wantRefusal(2, "multi-instance deploy detected", fmt.Sprintf("pid %d,", first.cmd.Process.Pid))
}

// TestPublicNameIsSuggested: a relay that checks no name says once which one it could check,
// and dials nobody for it.
func TestPublicNameIsSuggested(t *testing.T) {
	t.Parallel()
	const said = "has the relay check that no second one answers there"
	upgrade := []string{"x-pyrycode-server: s", "user-agent: test", "x-pyrycode-version: 1", "Connection: Upgrade", "Upgrade: websocket",
		"Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="}
	for _, tt := range []struct {
		name, path, host, more string
		public                 bool // there is a -public-url
		want                   string
	}{
		{"by the proxy's header", "/v2/server", "127.0.0.1:8080", "X-Forwarded-Host: Relay.example.com", false, "relay.example.com"},
		{"by the host", "/v1/server", "relay.example.com:8443", "X-Other: 1", false, "relay.example.com:8443"},
		{"a phone", "/v2/client", "relay.example.com", "X-Other: 1", false, ""},
		{"with a -public-url", "/v2/server", "relay.example.com", "X-Other: 1", true, ""},
		{"an address", "/v2/server", "192.0.2.1:8080", "X-Other: 1", false, ""},
		{"a name for this host only", "/v2/server", "localhost:8080", "X-Other: 1", false, ""},
		{"two names", "/v2/server", "127.0.0.1", "X-Forwarded-Host: a.example.com, b.example.com", false, ""},
		{"no name", "/v2/server", "127.0.0.1", "X-Forwarded-Host: \"\u202e.example.com", false, ""},
		{"a name without end", "/v2/server", "127.0.0.1", "X-Forwarded-Host: " + strings.Repeat("a.", 200) + "com", false, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := testOptions()
			if tt.public {
				o.publicURL, o.bypass = &url.URL{Scheme: "wss", Host: "relay.example.com"}, true // else users would wait for the check
			}
			r := startRelay(t, o)
			for range 2 {
				lines := append([]string{"GET " + tt.path + " HTTP/1.1", "Host: " + tt.host, tt.more}, upgrade...)
				if resp, body := r.ask(lines...); resp.StatusCode != 101 {
					t.Fatalf("%s %q", resp.Status, body)
				}
			}
			want, n := 0, strings.Count(r.logs.String(), said)
			if tt.want != "" {
				want = 1
			}
			if n != want || want > 0 && !strings.Contains(r.logs.String(), "-public-url wss://"+tt.want+" ") {
				t.Errorf("said %d times, want %d:\n%s", n, want, r.logs.String())
			}
		})
	}
}

func TestPlatformWithoutCheckIsRefused(t *testing.T) {
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

// ---- the check over time ----

// checkRun is what became of a check over scripted rounds.
type checkRun struct {
	at       []time.Duration // when each round was
	joins    []int
	verdicts []publicVerdict // after each
	left     error
	admitted time.Duration // when users were let in, if they were refused at first; -1 if never
	logs     string
}

var (
	theStart = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	myself   = identity{"bbbbbbbbbbbbbbbb", theStart}
	// Clocks are wrong by days: nothing may depend on them.
	older   = anotherRelay("aaaaaaaaaaaaaaaa", 72*time.Hour, time.Hour)
	oldest  = anotherRelay("dddddddddddddddd", 48*time.Hour, 2*time.Hour)
	younger = anotherRelay("cccccccccccccccc", -72*time.Hour, -time.Hour)
)

// anotherRelay has started so much later than myself by its clock, and has run so
// much longer.
func anotherRelay(id string, later, ahead time.Duration) rival {
	return rival{identity: identity{id, theStart.Add(later)}, told: true, theirs: standing{age: ahead}}
}

func withUsers(o rival) rival    { o.theirs.users = true; return o }
func besideUsers(o rival) rival  { o.mine.users = true; return o }
func waiting(o rival) rival      { o.theirs.waits = true; return o }
func yielding(o rival) rival     { o.theirs.yields = true; return o }
func ofOldVersion(o rival) rival { o.told, o.theirs = false, standing{}; return o }

// the rounds of a script
func allMine() roundResult { return roundResult{verdict: publicVerified, joins: 4} }
func splitWith(others ...rival) roundResult {
	return roundResult{verdict: publicSplit, others: others, joins: 4}
}
func elsewhere() roundResult {
	return roundResult{verdict: publicNotARelay, diagnosis: diagnosis{"a web server", "move it"}}
}
func noWay() roundResult {
	return roundResult{verdict: publicUnreachable, diagnosis: diagnosis{"nobody answers", "open the port"}}
}

// runCheck lets a check go through a script of rounds; the last goes on for ever,
// until there were as many rounds as asked for.
func runCheck(t *testing.T, rounds int, bypass bool, script ...roundResult) checkRun {
	t.Helper()
	return checkScript{rounds: rounds, bypass: bypass, script: script}.run(t)
}

// checkScript is what a check goes through.
type checkScript struct {
	rounds        int
	bypass, waits bool
	slow          time.Duration // what a round takes
	script        []roundResult
}

func (s checkScript) run(t *testing.T) (got checkRun) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		var logs logBuffer
		c := &publicCheck{
			me: myself, began: time.Now(), url: "wss://relay.test", bypass: s.bypass, pace: defaultPace(), state: new(instanceState),
			log: keeping(slog.New(slog.NewTextHandler(&logs, nil))), leave: make(chan error, 1),
		}
		c.state.public.Store(uint32(publicPending))
		c.state.waits.Store(s.waits)
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		got.admitted = -1
		var watch sync.WaitGroup
		watch.Go(func() {
			for ; ctx.Err() == nil && got.admitted < 0; time.Sleep(50 * time.Millisecond) {
				if !c.state.waits.Load() {
					got.admitted = time.Since(began)
				}
			}
		})
		note := func() {
			got.verdicts = append(got.verdicts, c.state.verdict())
		}
		c.round = func(_ context.Context, joins int) roundResult {
			n := len(got.at)
			if n > 0 {
				note()
			}
			if n == s.rounds {
				cancel()
				return roundResult{}
			}
			f := s.script[min(n, len(s.script)-1)]
			if len(f.others) > 0 {
				c.refusal.Stop() // see reached
			}
			time.Sleep(s.slow)
			got.at = append(got.at, time.Since(began))
			got.joins = append(got.joins, joins)
			f.others = slices.Clone(f.others)
			for i := range f.others {
				o := &f.others[i]
				o.asked, o.mine.age, o.mine.waits = time.Now(), 100*time.Hour+time.Since(began), c.state.waits.Load()
				o.theirs.age += o.mine.age
			}
			return f
		}
		c.run(ctx)
		select {
		case got.left = <-c.leave:
			note()
		default:
		}
		cancel()
		watch.Wait()
		got.logs = logs.String()
	})
	return got
}

func TestPublicCheckPace(t *testing.T) {
	t.Parallel()
	within := func(d, want time.Duration) bool { return d >= want*9/10 && d <= want*11/10 }
	t.Run("verified", func(t *testing.T) {
		t.Parallel()
		r := runCheck(t, 20, false, allMine())
		for i, at := range r.at {
			switch {
			case i == 0 && (at > time.Second || r.joins[0] != firstJoins):
				t.Errorf("first round after %v with %d phones, want %d within a second", at, r.joins[0], firstJoins)
			case i > 0 && (!within(at-r.at[i-1], 5*time.Minute) || r.joins[i] != 4):
				t.Errorf("round %d after %v with %d phones, want 4 after 5m", i, at-r.at[i-1], r.joins[i])
			}
		}
		if r.at[2]-r.at[1] == r.at[1]-r.at[0] {
			t.Error("two intervals are equal: there is no jitter")
		}
	})
	t.Run("unreachable", func(t *testing.T) {
		t.Parallel()
		r := runCheck(t, 60, false, noWay())
		for i, at := range r.at[1:] {
			want := 30 * time.Second
			if r.at[i] >= r.at[0]+10*time.Minute {
				want = 5 * time.Minute
			}
			if !within(at-r.at[i], want) {
				t.Errorf("after %v the next round came %v later, want about %v", r.at[i], at-r.at[i], want)
			}
		}
	})
}

func TestPublicCheckVerdicts(t *testing.T) {
	t.Parallel()
	type script = []roundResult
	split := splitWith
	const smaller, greater = "aa00000000000000", "cc00000000000000" // than the id of myself
	samePast := anotherRelay(smaller, 72*time.Hour, -900*time.Millisecond)
	sameFuture := anotherRelay(greater, 72*time.Hour, 900*time.Millisecond)
	latecomer, elder := anotherRelay(smaller, -72*time.Hour, -time.Minute), anotherRelay(greater, 72*time.Hour, time.Minute)
	for _, tt := range []struct {
		name   string
		rounds int
		script script
		want   string // verdicts; "split": one round pending, then split for ever; "": it leaves
		levels string // of the log, in order
		left   *rival
	}{
		{"verified is said once", 4, script{allMine()}, "verified verified verified verified", "INFO", nil},
		{"every change is said", 6, script{noWay(), noWay(), elsewhere(), allMine(), noWay(), allMine()},
			"unreachable unreachable not-a-relay verified unreachable verified", "WARN WARN INFO WARN INFO", nil},
		{"one split round is an overlap", 4, script{allMine(), split(older), allMine()}, "verified verified verified verified", "INFO INFO", nil},
		{"at the start, too", 2, script{split(older), allMine()}, "pending verified", "INFO INFO", nil},
		{"the older stays", 100, script{split(younger)}, "split", "INFO ERROR", nil},
		{"the younger leaves", 100, script{split(older)}, "", "INFO ERROR", &older},
		{"of several the oldest is named", 100, script{split(oldest, older, younger)}, "", "INFO ERROR", &oldest},
		{"bypass goes on", 100, script{split(older)}, "split", "INFO ERROR", nil},
		{"equal times, smaller id stays", 50, script{split(sameFuture)}, "split", "INFO ERROR", nil},
		{"equal times, greater id leaves", 50, script{split(samePast)}, "", "INFO ERROR", &samePast},
		{"a newcomer with a clock in the past", 50, script{split(latecomer)}, "split", "INFO ERROR", nil},
		{"an elder with a clock in the future", 50, script{split(elder)}, "", "INFO ERROR", &elder},
		{"users beat age", 50, script{split(withUsers(younger))}, "", "INFO ERROR", &younger},
		{"users here beat age", 12, script{split(besideUsers(older))}, "split", "INFO ERROR", nil},
		{"users do not keep two for ever", 50, script{split(besideUsers(older))}, "", "INFO ERROR", &older},
		{"users on both sides", 50, script{split(withUsers(besideUsers(older)))}, "", "INFO ERROR", &older},
		{"one that yields is not followed", 50, script{split(yielding(older))}, "split", "INFO ERROR", nil},
		{"both yield, greater id leaves", 50, script{split(older), split(yielding(older))}, "", "INFO ERROR", &older},
		{"both yield, smaller id stays", 50, script{split(oldest), split(yielding(oldest))}, "split", "INFO ERROR", nil},
		{"older version, earlier by its clock", 50, script{split(ofOldVersion(younger))}, "", "INFO ERROR", &younger},
		{"older version, later by its clock", 50, script{split(ofOldVersion(older))}, "split", "INFO ERROR", nil},
		{"a split that heals starts anew", 6, script{split(older), split(older), split(older), allMine(), split(older), allMine()},
			"pending split split verified verified verified", "INFO ERROR INFO INFO", nil},
		{"an older one that is gone", 50, script{split(older), split(older), split(younger)}, "split", "INFO ERROR", nil},
		{"one after the other, as in a rolling update", 7,
			script{split(older), split(older), split(oldest), split(oldest), split(younger), split(younger), allMine()},
			"pending split split split split split verified", "INFO ERROR INFO", nil},
		{"an older one seen twice only", 50,
			script{split(older), split(younger), split(younger), split(younger), split(younger), split(older), split(younger)},
			"split", "INFO ERROR", nil},
		{"one that does not say who it is", 50, script{split()}, "split", "INFO ERROR", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := runCheck(t, tt.rounds, tt.name == "bypass goes on", tt.script...)
			want := tt.want
			if want == "split" {
				want = "pending" + strings.Repeat(" split", tt.rounds-1)
			}
			if got := strings.Trim(fmt.Sprint(r.verdicts), "[]"); want != "" && got != want {
				t.Errorf("verdicts:\n%s, want\n%s", got, want)
			}
			var levels []string
			for _, m := range regexp.MustCompile(`level=(\w+)`).FindAllStringSubmatch(r.logs, -1) {
				levels = append(levels, m[1])
			}
			if got := strings.Join(levels, " "); got != tt.levels {
				t.Errorf("log levels %s, want %s:\n%s", got, tt.levels, r.logs)
			}
			if (r.left != nil) != (tt.left != nil) {
				t.Fatalf("it left because of %v", r.left)
			}
			if tt.left == nil {
				return
			}
			started := tt.left.started.Format(time.RFC3339)
			for _, want := range []string{tt.left.id, started, myself.id, "multi-instance deploy detected", "4404", bypassName} {
				if !strings.Contains(r.left.Error(), want) {
					t.Errorf("the reason lacks %q: %v", want, r.left)
				}
			}
			most := 150 * time.Second
			if tt.name == "users do not keep two for ever" {
				most += splitDoubts*90*time.Second + 33*time.Second // the first round behind that begins to count
			}
			if took := r.at[len(r.at)-1] - r.at[0]; took < 90*time.Second || took > most || len(r.at) < 3 {
				t.Errorf("left after %d rounds in %v, want three or more in 90s or more, and at most %v", len(r.at), took, most)
			}
		})
	}
	// A split that comes back after it healed is counted from its new beginning.
	r := runCheck(t, 100, false, split(older), split(older), split(older), allMine(), split(older))
	if n := len(r.at); r.left == nil || n < 7 || r.at[n-1]-r.at[4] < 90*time.Second {
		t.Errorf("left because of %v in round %d, %v after the second split began", r.left, n, r.at[n-1]-r.at[4])
	}
}

// TestPublicCheckLetsUsersIn: not before the first round is over, not while another
// relay serves, and at once in every other case.
func TestPublicCheckLetsUsersIn(t *testing.T) {
	t.Parallel()
	type script = []roundResult
	const never = -1
	for _, tt := range []struct {
		name     string
		slow     time.Duration // what a round takes
		script   script
		from, to time.Duration // users are let in between these
		leaves   bool
		verdict  publicVerdict // at the end
	}{
		{"alone", time.Second, script{allMine()}, time.Second, time.Second, false, publicVerified},
		{"hairpin NAT", time.Second, script{noWay()}, time.Second, time.Second, false, publicUnreachable},
		{"a web server", time.Second, script{elsewhere()}, time.Second, time.Second, false, publicNotARelay},
		{"no answer for long", 20 * time.Second, script{noWay()}, longestRefusal, longestRefusal, false, publicUnreachable},
		{"another relay that does not say who it is", 0, script{splitWith()}, 0, 0, false, publicSplit},
		{"another serves", 0, script{splitWith(older)}, never, never, true, publicPending},
		{"another serves, and is younger", 0, script{splitWith(younger)}, never, never, true, publicPending},
		{"another serves, and is gone then", 0, script{splitWith(older), splitWith(older), splitWith(older), allMine()},
			3 * handOver * 9 / 10, 3 * handOver * 11 / 10, false, publicVerified},
		{"another serves, and then nothing does", 0, script{splitWith(older), noWay()},
			handOver * 9 / 10, handOver * 11 / 10, false, publicUnreachable},
		{"another serves, and answers slowly", 30 * time.Second, script{splitWith(older)}, never, never, true, publicPending},
		{"it sticks by server-id, slowly, and these move for a while", 30 * time.Second,
			append(slices.Repeat(script{splitWith(older)}, waitRounds-1), allMine()),
			waitRounds*30*time.Second + (waitRounds-1)*handOver*9/10, waitRounds*30*time.Second + (waitRounds-1)*handOver*11/10,
			false, publicVerified},
		{"both wait, smaller id stays", 0, script{splitWith(waiting(younger)), allMine()}, 0, 0, false, publicVerified},
		{"both wait, greater id waits on", 0, script{splitWith(waiting(older))}, never, never, true, publicPending},
		{"the elder waits for the one that serves", 0, script{splitWith(withUsers(younger), waiting(older))}, never, never, true, publicPending},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := checkScript{rounds: 200, waits: true, slow: tt.slow, script: tt.script}.run(t)
			const coarse = 50 * time.Millisecond
			if r.admitted < tt.from || r.admitted > tt.to+coarse || tt.to == never && r.admitted != never {
				t.Errorf("users are let in after %v, want between %v and %v", r.admitted, tt.from, tt.to)
			}
			if (r.left != nil) != tt.leaves || r.verdicts[len(r.verdicts)-1] != tt.verdict {
				t.Errorf("at the end: verdict %v, left because of %v\n%s", r.verdicts[len(r.verdicts)-1], r.left, r.logs)
			}
			least := max(90*time.Second, waitRounds*tt.slow)
			if last := r.at[len(r.at)-1]; tt.leaves && (last < least || last > least+waitRounds*handOver || strings.Contains(r.logs, "ERROR") ||
				strings.Count(r.logs, "users are refused (503)") != 1) {
				t.Errorf("it left after %v, and the log is\n%s", last, r.logs)
			}
		})
	}
}

// TestPublicCheckCountsSightings: a relay that gets few of the connections is seen in few
// of the rounds. That is a split after three in twenty, said once, until it is not seen
// for longer than it was not seen before.
func TestPublicCheckCountsSightings(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		every, want int  // seen in each so many rounds, split in that round
		none        bool // for want of a claim here
	}{{1, 2, false}, {2, 5, false}, {5, 11, false}, {9, 19, false}, {10, 0, false}, {1, 2, true}, {2, 0, true}} {
		every, want := tt.every, tt.want
		t.Run(fmt.Sprintf("one in %d, no claim here %v", every, tt.none), func(t *testing.T) {
			t.Parallel()
			sighting := splitWith(younger)
			sighting.none = tt.none
			turn := append([]roundResult{sighting}, slices.Repeat([]roundResult{allMine()}, every-1)...)
			seen := slices.Repeat(turn, 60/every)
			r := checkScript{rounds: len(seen) + 20, script: append(seen, allMine())}.run(t)
			first, last := 1+slices.Index(r.verdicts, publicSplit), len(r.verdicts)-1
			for r.verdicts[last] != publicSplit && last > 0 {
				last--
			}
			if first != want || want == 0 && last > 0 {
				t.Errorf("split from round %d to %d, want from %d", first, last+1, want)
			}
			if want > 0 && (last < len(seen)-every || r.verdicts[len(r.verdicts)-1] != publicVerified || strings.Count(r.logs, "ERROR") != 1) {
				t.Errorf("it was seen for %d rounds, and was a split in round %d at last:\n%s", len(seen), last+1, r.logs)
			}
			if gap := r.at[2] - r.at[1]; gap > 33*time.Second && !tt.none {
				t.Errorf("after a sighting the next rounds are %v apart", gap)
			}
		})
	}
}

// TestPublicCheckTakesHints: a burst of signs that phones are at the wrong relay brings
// about a round at once, one a minute, and a sign now and then does not.
func TestPublicCheckTakesHints(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		every time.Duration
		want  int // rounds in four minutes
	}{
		{"none", time.Hour, 1}, {"now and then", 6 * time.Second, 1}, {"a burst without end", 100 * time.Millisecond, 1 + 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				rounds := 0
				c := &publicCheck{
					state: new(instanceState), pace: defaultPace(), log: keeping(slog.New(slog.DiscardHandler)),
					hints: make(chan struct{}, hintBurst),
					round: func(context.Context, int) roundResult { rounds++; return allMine() },
				}
				c.start()
				for range 4 * time.Minute / min(tt.every, time.Minute) {
					time.Sleep(min(tt.every, time.Minute))
					if tt.every <= time.Minute {
						select {
						case c.hints <- struct{}{}:
						default:
						}
					}
				}
				c.stop()
				if rounds != tt.want {
					t.Errorf("%d rounds, want %d", rounds, tt.want)
				}
			})
		})
	}
}

// relayPair is two relays that check one name, by the clock of synctest.
type relayPair struct {
	ids    [2]string
	ahead  time.Duration // how much longer the first has run
	users  func(at time.Duration) [2]bool
	wire   time.Duration  // an answer takes up to that, half of it each way
	linger time.Duration  // and a round goes on for up to that after the answer
	view   func(o *rival) // changes what each sees, if not nil
}

// play lets both check until a while after one has left, or for so long, and
// returns which have left, and when the first did.
func (p relayPair) play(t *testing.T, random *rand.Rand, most time.Duration) (left [2]bool, first time.Duration) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	began := time.Now()
	var checks [2]*publicCheck
	var gone [2]atomic.Bool
	standingOf := func(i int) standing {
		at := time.Since(began)
		s := standing{age: 100*time.Hour + at, users: p.users(at)[i], yields: checks[i].state.yields.Load()}
		if i == 0 {
			s.age += p.ahead
		}
		return s
	}
	// Each clock is wrong by days, the elder's in the direction that makes it look
	// younger.
	skew := [2]time.Duration{72 * time.Hour, -72 * time.Hour}
	if p.ahead < 0 {
		skew[0], skew[1] = skew[1], skew[0]
	}
	who := func(i int) identity { return identity{p.ids[i], theStart.Add(skew[i])} }
	var mu sync.Mutex // of random
	upTo := func(d time.Duration) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(random.Int64N(int64(d) + 1))
	}
	var wg sync.WaitGroup
	for i := range checks {
		checks[i] = &publicCheck{
			me: who(i), began: began, url: "wss://relay.test", pace: defaultPace(), state: new(instanceState),
			log: keeping(slog.New(slog.DiscardHandler)), leave: make(chan error, 1),
		}
		checks[i].round = func(ctx context.Context, _ int) roundResult {
			o := rival{identity: who(1 - i), asked: time.Now(), told: true, mine: standingOf(i)}
			time.Sleep(upTo(p.wire / 2))
			if gone[1-i].Load() {
				return allMine()
			}
			o.theirs = standingOf(1 - i)
			if p.view != nil {
				p.view(&o)
			}
			time.Sleep(upTo(p.wire/2) + upTo(p.linger))
			return splitWith(o)
		}
	}
	for i, c := range checks {
		wg.Go(func() {
			time.Sleep(upTo(time.Minute)) // they start their rounds at any time
			c.run(ctx)
			if ctx.Err() == nil {
				gone[i].Store(true)
			}
		})
	}
	for time.Since(began) < most {
		time.Sleep(10 * time.Second)
		if gone[0].Load() || gone[1].Load() {
			first = time.Since(began)
			break
		}
	}
	time.Sleep(20 * time.Minute) // long enough for the other to leave as well
	cancel()
	wg.Wait()
	return [2]bool{gone[0].Load(), gone[1].Load()}, first
}

// TestPublicCheckOneOfTwoStays: from views of different moments, with clocks that
// are wrong by days, ages at the edge of being the same, users who come and go, and
// answers that are slow, never both relays leave, and never do both stay.
func TestPublicCheckOneOfTwoStays(t *testing.T) {
	t.Parallel()
	over := defaultPace().over
	always := func(first, second bool) func(time.Duration) [2]bool {
		return func(time.Duration) [2]bool { return [2]bool{first, second} }
	}
	// One user whose binary dials again and again, and lands here or there.
	wandering := func(every time.Duration) func(time.Duration) [2]bool {
		return func(at time.Duration) [2]bool { here := at/every%2 == 0; return [2]bool{here, !here} }
	}
	for _, users := range []struct {
		name   string
		at     func(time.Duration) [2]bool
		stays  int // of the two, where users decide; -1 where age does
		settle bool
		view   func(o *rival)
	}{
		{"no users", always(false, false), -1, true, nil},
		{"users of both", always(true, true), -1, true, nil},
		{"users of the first", always(true, false), 0, true, nil},
		{"users of the second", always(false, true), 1, true, nil},
		{"wandering each second", wandering(time.Second), -1, false, nil},
		{"wandering as rounds go", wandering(30 * time.Second), -1, false, nil},
		{"wandering in 100s", wandering(100 * time.Second), -1, false, nil},
		{"users for a while", func(at time.Duration) [2]bool { return [2]bool{at < 70*time.Second, at > 150*time.Second} }, -1, false, nil},
		// The worst moments to be asked at, each time.
		{"users wherever one looks from", always(false, false), -1, false, func(o *rival) { o.mine.users, o.theirs.users = true, false }},
		{"users wherever one looks at", always(false, false), -1, false, func(o *rival) { o.mine.users, o.theirs.users = false, true }},
	} {
		t.Run(users.name, func(t *testing.T) {
			t.Parallel()
			for _, ahead := range []time.Duration{
				-100 * time.Hour, -time.Minute, -1002 * time.Millisecond, -time.Second, -998 * time.Millisecond, 0,
				998 * time.Millisecond, time.Second, 1002 * time.Millisecond, time.Minute, 100 * time.Hour,
			} {
				for _, slow := range [][2]time.Duration{
					{0, 0}, {10 * time.Millisecond, time.Second}, {4 * time.Second, 20 * time.Second}, {10 * time.Second, 4 * over},
				} {
					seeds := uint64(6)
					if slow[1] >= over/2 {
						seeds = 20
					}
					for seed := range seeds {
						ids := [2]string{"aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb"}
						if seed%2 == 1 {
							ids[0], ids[1] = ids[1], ids[0]
						}
						p := relayPair{ids, ahead, users.at, slow[0], slow[1], users.view}
						var left [2]bool
						var first time.Duration
						most := time.Hour
						if slow[1] < over/2 {
							most = 9 * over // nearly half of it for doubts
						}
						synctest.Test(t, func(t *testing.T) {
							left, first = p.play(t, rand.New(rand.NewPCG(seed, uint64(ahead))), most)
						})
						what := fmt.Sprintf("%v ahead, ids %v, answers take %v, rounds %v more", ahead, ids, slow[0], slow[1])
						if left[0] && left[1] {
							t.Fatalf("%s: both leave, the first after %v", what, first)
						}
						if slow[1] >= over/2 {
							continue // stale answers decide nothing: here nobody has to leave
						}
						if !left[0] && !left[1] {
							t.Fatalf("%s: both stay for %v", what, most)
						}
						stayer := 0
						if left[0] {
							stayer = 1
						}
						want := users.stays
						if want < 0 && users.settle && (ahead > 2*time.Second+slow[0] || ahead < -2*time.Second-slow[0]) {
							if want = 0; ahead < 0 {
								want = 1
							}
						}
						if want >= 0 && stayer != want {
							t.Errorf("%s: relay %d stays, want %d", what, stayer, want)
						}
					}
				}
			}
		})
	}
}

func TestPublicCheckSaysWhatComesNext(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		other  rival
		bypass bool
		want   []string
	}{
		{older, false, []string{older.id, "this relay stops if that lasts for 1m30s: it has run for longer", "other_age=101h"}},
		{withUsers(younger), false, []string{younger.id, "this relay stops if that lasts for 1m30s: it holds binaries of users"}},
		{younger, false, []string{younger.id, "the other one stops"}},
		{older, true, []string{older.id, bypassName + "=1: this relay goes on"}},
	} {
		r := runCheck(t, 2, tt.bypass, splitWith(tt.other))
		for _, want := range tt.want {
			if !strings.Contains(r.logs, want) {
				t.Errorf("log lacks %q:\n%s", want, r.logs)
			}
		}
	}
	partly := roundResult{verdict: publicUnreachable, joins: 8, failed: 4, diagnosis: diagnosis{"refused", "start it"}}
	if r := runCheck(t, 1, false, partly); !strings.Contains(r.logs, "some of the connections") || strings.Contains(r.logs, "harmless") {
		t.Errorf("half of the phones fail, and the log says:\n%s", r.logs)
	}
}

func TestPaceFrom(t *testing.T) {
	t.Parallel()
	if got, err := paceFrom(nil); err != nil || got != defaultPace() {
		t.Errorf("by default: %v, %v", got, err)
	}
	const ms = time.Millisecond
	for value, want := range map[string]checkPace{ // zero: refused
		"2s,500ms,1500ms": {2000 * ms, 500 * ms, 1500 * ms, 0}, "2s,500ms,1500ms,-72h": {2000 * ms, 500 * ms, 1500 * ms, -72 * time.Hour},
		"": {}, "2s": {}, "2s,1s,1s,1s,1s": {}, "2s,1s,-1s": {}, "2s,0s,1s": {}, "2s,x,1s": {},
	} {
		got, err := paceFrom(map[string]string{paceName: value})
		if bad := want == (checkPace{}); bad != (err != nil) || !bad && got != want {
			t.Errorf("%q: %v, %v", value, got, err)
		}
		if err != nil && !strings.Contains(err.Error(), fmt.Sprintf("%q for variable %s", value, paceName)) {
			t.Errorf("the error does not say what is wrong: %v", err)
		}
	}
	code, _, stderr := runOnce(map[string]string{paceName: "soon"}, "-listen", "127.0.0.1:0")
	if code != exitRefused || !strings.Contains(stderr, paceName) {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}

// ---- one round ----

// checkOf is a check of r through addr, without pauses.
func checkOf(r *testRelay, addr string) *publicCheck {
	d := dialer{base: &url.URL{Scheme: "ws", Host: addr}}
	return &publicCheck{
		me: r.id, standing: r.standing, state: r.instance, keys: r.probes, dialer: d, log: keeping(r.log), held: min(r.o.maxPhones, firstJoins),
	}
}

// twoRelays are one that checks its name, and waits with its users, and another one.
func twoRelays(t *testing.T) (me, other *testRelay) {
	t.Helper()
	return waitingRelay(t), startRelay(t, testOptions())
}

func waitingRelay(t *testing.T) *testRelay {
	t.Helper()
	o := testOptions()
	o.publicURL = &url.URL{Scheme: "ws", Host: "relay.test"}
	return startRelay(t, o)
}

// lookFrom makes one round as r does, through addr.
func lookFrom(t *testing.T, r *testRelay, addr string, joins int) roundResult {
	t.Helper()
	f := checkOf(r, addr).look(t.Context(), joins)
	r.probes.serverIDs.Range(func(nonce, id any) bool {
		t.Errorf("the nonce %v for %v outlives its round", nonce, id)
		return true
	})
	return f
}

// TestPublicRoundThatWaits: a relay that lets no users in yet looks at who answers for the
// other one, until that is gone, and lets its own check in.
func TestPublicRoundThatWaits(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		front func(t *testing.T, me, other string) (public string)
		other func(other *testRelay)
		met   bool // the other one, as the one to stay
		pages bool // have told, and no upgrade was asked for at the other
	}{
		{"the other serves", through(func(me, other string) picker { return inTurn(other, me) }), func(*testRelay) {}, true, true},
		{"only the other is reached", through(func(_, other string) picker { return always(other) }), func(*testRelay) {}, true, true},
		{"first round, the other serves", through(func(me, other string) picker { return inTurn(me, other) }), func(*testRelay) {}, true, true},
		{"first round, only the other is reached", through(func(_, other string) picker { return always(other) }),
			func(*testRelay) {}, true, true},
		{"first round, one phone in nine", through(func(me, other string) picker { return onceOf(2*handOverIDs+8, other, me) }),
			func(*testRelay) {}, true, false},
		{"one page in ten", through(func(me, other string) picker { return onceOf(9, other, me) }), func(*testRelay) {}, true, true},
		{"one phone in nine", through(func(me, other string) picker { return onceOf(2*handOverIDs+8, other, me) }),
			func(*testRelay) {}, true, false},
		{"pages are another's", func(t *testing.T, me, other string) string {
			page := status(t, 404)
			return startBalancer(t, nil, func(n int, head string) string {
				if strings.Contains(head, "/readyz") {
					return page
				}
				return []string{me, other}[n%2]
			}).addr
		}, func(*testRelay) {}, true, false},
		{"sticky by server-id", through(func(me, other string) picker { return byServer(me, other) }), func(*testRelay) {}, false, false},
		{"the other drains", through(func(me, other string) picker { return inTurn(other, me) }),
			func(other *testRelay) { other.draining.Store(true) }, false, false},
		{"the other is gone", through(func(me, _ string) picker { return always(me) }), func(*testRelay) {}, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			me, other := twoRelays(t)
			tt.other(other)
			if _, resp, err := me.dial("/v2/client", phoneHeaders("nobody")); err != nil || resp.StatusCode != http.StatusServiceUnavailable {
				t.Fatalf("a user at a relay that waits: %v, %v", resp, err)
			}
			c := checkOf(me, tt.front(t, me.addr, other.addr))
			if !strings.HasPrefix(tt.name, "first round") {
				c.seen = map[string]*observation{other.id.id: {}}
			}
			f := c.look(t.Context(), firstJoins)
			for range 20 { // a balancer that sticks may lead the first few ids to the other one
				if len(f.others) == 0 || tt.met {
					break
				}
				f = c.look(t.Context(), firstJoins)
			}
			if f.verdict != publicSplit && tt.met {
				t.Errorf("the verdict is %v", f.verdict)
			}
			if met := len(f.others) == 1 && f.others[0].identity == other.id; met != tt.met {
				t.Errorf("the other one was met: %v, want %v: %+v", met, tt.met, f)
			}
			asked := int64(0)
			for role := range roleCount {
				for o := range upgradeOutcomeCount {
					asked += other.metrics.upgrades[role][o].Load()
				}
			}
			if tt.met && (asked == 0) != tt.pages {
				t.Errorf("%d upgrades were asked for at the other one", asked)
			}
			if len(f.others) == 0 && me.metrics.upgrades[rolePhone][upgradeChecking].Load() != 1 {
				t.Error("the check's own phones are refused")
			}
		})
	}
}

// TestPublicRoundLetsUsersInMeanwhile: pages that another relay has answered until then are
// no split, only claims and phones are.
func TestPublicRoundLetsUsersInMeanwhile(t *testing.T) {
	t.Parallel()
	me, other := twoRelays(t)
	other.binary("home") // so it is the one to stay
	front := startBalancer(t, nil, func(_ int, head string) string {
		if strings.Contains(head, "/readyz") {
			me.instance.waits.Store(false)
			return other.addr
		}
		return me.addr
	})
	if f := checkOf(me, front.addr).look(t.Context(), firstJoins); f.verdict != publicVerified || f.joins != firstJoins || len(f.others) > 0 {
		t.Errorf("%+v, want %d phones of which all came here", f, firstJoins)
	}
}

// A balancer that has just led one server-id to two relays does not stick by it, even if
// it leads both pages of each of the next eight to the same one.
func TestPublicRoundKnowsChance(t *testing.T) {
	t.Parallel()
	me, other := twoRelays(t)
	other.binary("home") // so it is the one to stay
	var pages atomic.Int64
	front := startBalancer(t, nil, func(_ int, head string) string {
		if !strings.Contains(head, "/readyz") {
			return me.addr
		}
		n := pages.Add(1)
		return map[bool]string{true: other.addr, false: me.addr}[n == 2 || n > 2 && (n-3)/2%2 == 1]
	})
	c := checkOf(me, front.addr)
	c.pace.over = time.Hour
	c.began = time.Now().Add(-c.pace.over)
	for _, round := range []string{"of two pages", "behind it"} {
		if f := c.look(t.Context(), firstJoins); f.verdict != publicSplit || len(f.others) == 0 {
			t.Errorf("the round %s: %+v, want the other relay", round, f)
		}
	}
	c.parted = time.Now().Add(-c.pace.over)
	if f := c.look(t.Context(), firstJoins); f.verdict != publicVerified {
		t.Errorf("long after it: %+v, want it taken for one that sticks", f)
	}
}

// One that starts again and again, and waits each time, is another one each time: two of
// them at one server-id don't mean that a balancer has led it to two relays, and those
// that were met long ago don't make the round longer.
func TestPublicRoundKnowsRestarts(t *testing.T) {
	t.Parallel()
	waiting := []*testRelay{waitingRelay(t), waitingRelay(t), waitingRelay(t)}
	slices.SortFunc(waiting, func(a, b *testRelay) int { return cmp.Compare(a.id.id, b.id.id) })
	before, me, after := waiting[0], waiting[1], waiting[2] // of the two others only the first is one to stay
	var pages atomic.Int64
	front := startBalancer(t, nil, func(_ int, head string) string {
		if strings.Contains(head, "/readyz") {
			switch pages.Add(1) {
			case 1:
				return before.addr
			case 2:
				return after.addr
			}
		}
		return me.addr
	})
	c := checkOf(me, front.addr)
	c.pace, c.began, c.seen = defaultPace(), time.Now().Add(-time.Hour), map[string]*observation{before.id.id: {met: time.Now()}}
	for i := range 100 {
		c.seen[fmt.Sprint(i)] = &observation{met: time.Now().Add(-time.Minute)}
	}
	if f := c.look(t.Context(), firstJoins); f.verdict != publicVerified || f.joins != firstJoins {
		t.Errorf("%+v, want %d phones of which all came here", f, firstJoins)
	}
	if n := pages.Load(); n != 2*handOverIDs {
		t.Errorf("%d pages were asked for, want two for each of %d server-ids", n, handOverIDs)
	}
}

// TestPublicCheckForgets: of relays that start again and again not all are kept.
func TestPublicCheckForgets(t *testing.T) {
	t.Parallel()
	c := &publicCheck{me: myself, began: theStart, pace: defaultPace(), state: new(instanceState), log: keeping(slog.New(slog.DiscardHandler))}
	const each = time.Minute
	for i := range 1000 {
		now := theStart.Add(time.Duration(i) * each)
		o := older
		o.id, o.asked = fmt.Sprintf("%016x", i), now
		if err := c.sight([]rival{o}, now); err != nil {
			t.Fatal(err)
		}
	}
	if n, want := len(c.seen), 1+int(splitWindow*c.pace.every/each); n != want {
		t.Errorf("%d relays are remembered of which one comes each minute, want those of the last %d rounds, %d", n, splitWindow, want)
	}
}

func TestPublicRound(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		front func(t *testing.T, me, other string) (public string)
		want  publicVerdict
		other bool   // is named
		what  string // is in the diagnosis
		some  bool   // of the phones fail
	}{
		{"alone", func(t *testing.T, me, _ string) string { return me }, publicVerified, false, "", false},
		{"one backend", through(func(me, _ string) picker { return always(me) }), publicVerified, false, "", false},
		{"round robin", through(func(me, other string) picker { return inTurn(me, other) }), publicSplit, true, "", false},
		{"round robin, the claim elsewhere", through(func(me, other string) picker { return inTurn(other, me) }), publicSplit, true, "", false},
		{"one phone in nine", through(func(me, other string) picker { return onceOf(8, other, me) }), publicSplit, true, "", false},
		{"one claim elsewhere, its phones here", through(func(me, other string) picker { return onceOf(0, other, me) }),
			publicSplit, true, "", false},
		{"/v1/ to another", through(func(me, other string) picker {
			return func(_ int, head string) string {
				return map[bool]string{true: other, false: me}[strings.HasPrefix(head, "GET /v1/")]
			}
		}), publicSplit, true, "", false},
		{"sticky by server-id", through(func(me, other string) picker { return byServer(me, other) }), publicVerified, false, "", false},
		{"sticky by server-id, which favors the other", through(func(me, other string) picker { return sticky(other, 29, me) }),
			publicVerified, false, "", false},
		{"another relay only", func(t *testing.T, _, other string) string { return other }, publicSplit, true, "", false},
		{"another relay, and otherwise nothing", through(func(_, other string) picker { return inTurn("", other) }),
			publicSplit, true, "", false},
		{"a web server", func(t *testing.T, _, _ string) string { return status(t, 404, "Server", "nginx") },
			publicNotARelay, false, `"HTTP/1.1 404 Not Found" (server: "nginx")`, false},
		{"a proxy without a relay", func(t *testing.T, _, _ string) string { return status(t, 502) },
			publicNotARelay, false, "does not reach a relay", false},
		{"one backend of two is no relay", func(t *testing.T, me, _ string) string {
			return startBalancer(t, nil, inTurn(me, status(t, 502))).addr
		}, publicNotARelay, false, "502", true},
		{"another relay beats a web server", func(t *testing.T, me, other string) string {
			return startBalancer(t, nil, inTurn(me, status(t, 502), other)).addr
		}, publicSplit, true, "", false},
		{"nothing", func(t *testing.T, _, _ string) string { return deadAddr(t) }, publicUnreachable, false, "connection refused", false},
		{"one backend of two is gone", through(func(me, _ string) picker { return inTurn(me, "") }),
			publicUnreachable, false, "no HTTP answer", true},
		{"a proxy that drops the upgrade", dropping("Upgrade", ""), publicUnreachable, false, "no upgrade was asked for", false},
		{"a proxy that drops headers", dropping("X-Pyrycode-Version", ""), publicUnreachable, false, "x-pyrycode-version is missing", false},
		{"round robin, the other waits", through(func(me, other string) picker { return inTurn(me, other) }),
			publicUnreachable, false, "answers as well and lets nobody in", true},
		{"the header is taken away", dropping("", instanceHeader), publicVerified, false, "", false},
		{"the header is taken away, round robin", func(t *testing.T, me, other string) string {
			b := startBalancer(t, nil, inTurn(me, other))
			b.reply = without(instanceHeader)
			return b.addr
		}, publicSplit, false, "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			me, other := startRelay(t, testOptions()), startRelay(t, testOptions())
			other.instance.waits.Store(strings.HasSuffix(tt.name, "the other waits"))
			f := lookFrom(t, me, tt.front(t, me.addr, other.addr), firstJoins)
			if f.verdict != tt.want {
				t.Errorf("verdict %v (%+v), want %v", f.verdict, f, tt.want)
			}
			if named := len(f.others) > 0; named != tt.other || len(f.others) > 1 {
				t.Errorf("others are %v, want one named: %v", f.others, tt.other)
			} else if named {
				o := f.others[0]
				older := o.theirs.age - o.mine.age
				if o.identity != other.id || !o.told || o.theirs.age < 0 || older.Abs() > time.Second || o.theirs.users || o.mine.users {
					t.Errorf("the other is seen as %+v, want %v", o, other.id)
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
			me.settle("the round's end", func() bool { return me.count(roleBinary)+me.count(rolePhone) == 0 })
		})
	}
}

// addresses is a network in which a name has some, and what answers at each. Nothing
// answers at those that stand for themselves.
type addresses map[string]string

func (n addresses) LookupNetIP(context.Context, string, string) (all []netip.Addr, err error) {
	for a := range n { // in any order
		all = append(all, netip.MustParseAddr(a))
	}
	return all, nil
}

func (n addresses) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	host, _, _ := net.SplitHostPort(addr)
	return new(net.Dialer).DialContext(ctx, network, n[host])
}

// TestPublicRoundAddresses: each address of the name that can be reached is looked at, and
// those that can't be are told.
func TestPublicRoundAddresses(t *testing.T) {
	t.Parallel()
	me, other := startRelay(t, testOptions()), startRelay(t, testOptions())
	dead, web := deadAddr(t), status(t, 404)
	for _, tt := range []struct {
		name   string
		net    addresses
		want   publicVerdict
		unseen string
		log    string
	}{
		{"one", addresses{"192.0.2.1": me.addr}, publicVerified, "[]", "public name verified: it leads"},
		{"two", addresses{"192.0.2.1": me.addr, "2001:db8::1": me.addr}, publicVerified, "[]", "public name verified: it leads"},
		{"one is dead", addresses{"192.0.2.1": me.addr, "2001:db8::1": dead}, publicVerified, "[2001:db8::1]",
			"verified at 1 of 2 addresses; [2001:db8::1] can't be reached from here"},
		{"all are dead", addresses{"192.0.2.1": dead, "2001:db8::1": dead}, publicUnreachable, "[192.0.2.1 2001:db8::1]", "not reach itself"},
		{"another relay at one", addresses{"192.0.2.1": me.addr, "2001:db8::1": other.addr}, publicSplit, "[]", "answered to the public name"},
		{"another at the last of nine", addresses{"192.0.2.1": me.addr, "192.0.2.2": me.addr, "192.0.2.3": me.addr, "192.0.2.4": me.addr,
			"192.0.2.5": me.addr, "192.0.2.6": me.addr, "192.0.2.7": dead, "192.0.2.8": me.addr, "2001:db8::1": other.addr},
			publicSplit, "[192.0.2.7]", "answered to the public name"},
		{"a web server at one", addresses{"192.0.2.1": me.addr, "2001:db8::1": web}, publicNotARelay, "[]", web + ": something that"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var logs logBuffer
			c := checkOf(me, "relay.test")
			c.dialer.net, c.state, c.log = tt.net, new(instanceState), keeping(slog.New(slog.NewTextHandler(&logs, nil)))
			for round := range 3 {
				f := c.look(t.Context(), laterJoins)
				if got := fmt.Sprint(f.unseen); f.verdict != tt.want || got != tt.unseen || f.addrs != len(tt.net) {
					t.Fatalf("round %d: verdict %v, %s of %d unseen, want %v and %s", round, f.verdict, got, f.addrs, tt.want, tt.unseen)
				}
				if round == 0 {
					c.judge(f, time.Now())
				}
				if n := int64(len(f.unseen)); tt.want != publicSplit && c.state.unseen.Load() != n {
					t.Errorf("%d unseen in metrics, want %d", c.state.unseen.Load(), n)
				}
			}
			if !strings.Contains(logs.String(), tt.log) {
				t.Errorf("the log lacks %q:\n%s", tt.log, logs.String())
			}
		})
	}
}

// through is a balancer in front of two relays.
func through(pick func(me, other string) picker) func(t *testing.T, me, other string) string {
	return func(t *testing.T, me, other string) string { return startBalancer(t, nil, pick(me, other)).addr }
}

// dropping is a proxy that takes a header out of requests, and one out of answers.
func dropping(request, reply string) func(t *testing.T, me, other string) string {
	return func(t *testing.T, me, _ string) string {
		b := startBalancer(t, nil, always(me))
		b.request, b.reply = without(request), without(reply)
		return b.addr
	}
}

// sticky brings so many server-ids there, and the others here, each of them always.
func sticky(there string, n int, here string) picker {
	ids := map[string]string{}
	return func(_ int, head string) string {
		id := probePrefix + strings.Fields(strings.SplitN(head, probePrefix, 2)[1])[0]
		if ids[id] == "" {
			ids[id] = there
			if len(ids) > n {
				ids[id] = here
			}
		}
		return ids[id]
	}
}

// onceOf brings connection n elsewhere.
func onceOf(n int, there, here string) picker {
	return func(i int, _ string) string {
		if i == n {
			return there
		}
		return here
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
		id, notNamed := parseIdentity(resp.Header.Get(instanceHeader)) // as older relays read it
		s, notTold := parseStanding(resp.Header.Get(standingHeader))
		if notNamed != nil || notTold != nil {
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
	foreign, mine := other.probes.issue("mine"), r.probes.issue("mine")
	elsewhere, revoked := r.probes.issue("elsewhere"), r.probes.issue("revoked")
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

// TestPublicCheckStops is not parallel: it looks for goroutines by name.
func TestPublicCheckStops(t *testing.T) {
	const noUpgrade, noPhone, betweenRounds = "no answer to the upgrade", "claim held, no answer to a phone", "between rounds"
	silent := onLoopback(t) // the kernel accepts, nobody reads
	defer silent.Close()
	for _, stage := range []string{noUpgrade, noPhone, betweenRounds} {
		t.Run(stage, func(t *testing.T) {
			r := startRelay(t, testOptions())
			reached := make(chan struct{}, 100)
			b := startBalancer(t, nil, func(n int, _ string) string {
				reached <- struct{}{}
				if stage == betweenRounds || stage == noPhone && n == 0 {
					return r.addr
				}
				return silent.Addr().String()
			})
			o := r.o
			o.publicURL = &url.URL{Scheme: "ws", Host: b.addr}
			o.checkPace = checkPace{every: time.Hour, again: time.Millisecond, over: time.Hour}
			c := newPublicCheck(o, r.relay)
			c.start()
			<-reached
			switch stage {
			case noPhone:
				<-reached
			case betweenRounds:
				eventually(t, "the first verdict", func() bool { return r.instance.verdict() == publicVerified })
			}
			began := time.Now()
			c.stop()
			if took := time.Since(began); took > patience {
				t.Errorf("the check stops only after %v", took)
			}
			wantNoCheck(t)
			r.stop()
		})
	}
	t.Run("a whole program", func(t *testing.T) {
		asked, lock := onLoopback(t), freeLock(t)
		defer asked.Close()
		ctx, cancel := context.WithCancel(t.Context())
		code := make(chan int, 1)
		go func() {
			args := []string{"-listen", "127.0.0.1:0", "-admin", "off", "-instance-lock", lock, "-public-url", "ws://" + asked.Addr().String()}
			code <- run(ctx, args, map[string]string{paceName: "1h,1ms,1h"}, io.Discard, io.Discard)
		}()
		nc, err := asked.Accept() // a round is under way
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		cancel()
		if got := <-code; got != exitStopped {
			t.Errorf("exit code %d", got)
		}
		wantNoCheck(t)
	})
}

func wantNoCheck(t *testing.T) {
	t.Helper()
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for _, method := range []string{"(*wsPeer)", "(*household)", "(*publicCheck)"} {
		if bytes.Contains(stacks, []byte(method)) {
			t.Errorf("a goroutine in a method of %s is left", method)
		}
	}
}

// TestPublicCheckYoungerRelayLeaves runs a whole program behind a round robin with a
// relay that was there before. The program says that it has run for days, which is a
// matter of its clock; only the first has users.
func TestPublicCheckYoungerRelayLeaves(t *testing.T) {
	t.Parallel()
	for _, bypass := range []bool{false, true} {
		t.Run(fmt.Sprintf("bypass %v", bypass), func(t *testing.T) {
			t.Parallel()
			first := startRelay(t, testOptions())
			var second string // guarded by the balancer's lock
			b := startBalancer(t, nil, func(n int, _ string) string {
				if second == "" || n%2 == 0 {
					return first.addr
				}
				return second
			})
			setSecond := func(addr string) {
				b.mu.Lock()
				defer b.mu.Unlock()
				second = addr
			}
			o := first.o
			o.publicURL = &url.URL{Scheme: "ws", Host: b.addr}
			o.checkPace = checkPace{every: 40 * time.Millisecond, again: 20 * time.Millisecond, over: 600 * time.Millisecond}
			c := newPublicCheck(o, first.relay)
			c.start()
			defer c.stop()
			first.binary("somebody")
			env := []string{paceName + "=40ms,20ms,600ms,-72h"}
			if bypass {
				env = append(env, bypassName+"=1")
			}
			p := startProgram(t, env, "-public-url", "ws://"+b.addr).listening()
			setSecond(p.addr)
			if !bypass {
				if got := p.exit(); got != exitRefused {
					t.Errorf("exit code %d, want %d", got, exitRefused)
				}
				for _, want := range []string{"level=ERROR", "refusing to go on: multi-instance deploy detected: relay " + first.id.id, "silent 4404"} {
					if !strings.Contains(p.stderr.String(), want) {
						t.Errorf("its log lacks %q:\n%s", want, p.stderr.String())
					}
				}
				setSecond("")
				eventually(t, "the older relay is alone again", func() bool { return first.instance.verdict() == publicVerified })
				return
			}
			eventually(t, "both report the split", func() bool {
				_, health := fetch(t, "http://"+p.addr+"/healthz")
				return first.instance.verdict() == publicSplit && strings.Contains(health, `"instance_check":"split"`)
			})
			// Long enough that it would have left without the bypass.
			seen := first.metrics.upgrades[roleBinary][upgradeAccepted].Load()
			eventually(t, "ten more claims of the program's check", func() bool {
				return first.metrics.upgrades[roleBinary][upgradeAccepted].Load() >= seen+10
			})
			p.signal(syscall.SIGTERM)
			if got := p.exit(); got != exitStopped {
				t.Errorf("exit code %d, want %d", got, exitStopped)
			}
		})
	}
}

// ---- what users notice ----

// crowd are binaries and phones that dial a public name again and again, as daemons
// and apps do, and count how that ends.
type crowd struct {
	t     *testing.T
	addr  string
	homes [4]atomic.Pointer[string] // the instance that each binary is connected to

	paired, refused, early, wrong atomic.Int64
}

// open dials as one leg. The connection is nil where it is refused.
func (h *crowd) open(path string, header http.Header) (*wsClient, string) {
	nc, err := net.Dial("tcp", h.addr)
	if err != nil {
		return nil, ""
	}
	c, resp, err := handshake(h.t, nc, path, header)
	if err != nil || c == nil {
		nc.Close()
		if resp != nil && resp.StatusCode == http.StatusServiceUnavailable {
			h.refused.Add(1)
		}
		return nil, ""
	}
	return c, resp.Header.Get(instanceHeader)
}

// end reads until the close frame or the end, which a close frame is answered with.
func (h *crowd) end(c *wsClient, patience time.Duration) (code int) {
	defer c.nc.Close()
	c.patience = patience
	for {
		switch op, p, err := c.next(); {
		case err != nil:
			return 0
		case op == opClose:
			c.nc.Write(clientFrame(last, opClose, p))
			return int(p[0])<<8 | int(p[1])
		}
	}
}

func (h *crowd) binary(ctx context.Context, i int) {
	for ; ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
		if c, at := h.open("/v2/server", binaryHeaders(fmt.Sprintf("home-%d", i))); c != nil {
			stop := context.AfterFunc(ctx, func() { c.nc.Close() })
			h.homes[i].Store(&at)
			h.end(c, patience)
			h.homes[i].Store(nil)
			stop()
		}
	}
}

// phone asks for a home until ctx ends. A 4404 is wrong if the binary was connected to
// another relay before and afterwards.
func (h *crowd) phone(ctx context.Context, i int) {
	for ; ctx.Err() == nil; time.Sleep(5 * time.Millisecond) {
		before := h.homes[i].Load()
		c, at := h.open("/v1/client", phoneHeaders(fmt.Sprintf("home-%d", i)))
		if c == nil {
			continue
		}
		switch code, after := h.end(c, 20*time.Millisecond), h.homes[i].Load(); {
		case code == 0:
			h.paired.Add(1)
		case code == 4404 && before != nil && before == after && *after != at:
			h.wrong.Add(1)
		case code == 4404:
			h.early.Add(1) // before its binary was back
		}
	}
}

// at reports whether all binaries are connected, and not to an instance.
func (h *crowd) settled(not string) bool {
	for i := range h.homes {
		if at := h.homes[i].Load(); at == nil || *at == not {
			return false
		}
	}
	return true
}

// TestPublicCheckCostsNoPhone: while a relay is replaced, and beside one that is started again
// and again, no phone is told 4404 although its binary is online.
func TestPublicCheckCostsNoPhone(t *testing.T) {
	t.Parallel()
	for _, rolling := range []bool{true, false} {
		t.Run(map[bool]string{true: "rolling update", false: "crash loop"}[rolling], func(t *testing.T) {
			t.Parallel()
			for range 5 {
				if costsNoPhone(t, rolling) {
					return
				}
				t.Logf("the second relay's first round took more than %v: once more", longestRefusal)
			}
			t.Error("so it was each time")
		})
	}
}

// costsNoPhone reports whether a second relay met the first one in time. If the machine
// keeps it from that for longestRefusal it lets users in, as it has to.
func costsNoPhone(t *testing.T, rolling bool) (inTime bool) {
	one, two := freeLock(t), freeLock(t)
	b := startBalancer(t, nil, func(n int, _ string) string { // takes turns, and passes over what is down
		for _, addr := range [][2]string{{one, two}, {two, one}}[n%2] {
			if nc, err := net.Dial("tcp", addr); err == nil {
				nc.Close()
				return addr
			}
		}
		return ""
	})
	start := func(addr string) *program {
		return startProgram(t, []string{paceName + "=200ms,100ms,600ms"},
			"-listen", addr, "-public-url", "ws://"+b.addr, "-rate-per-minute", "0")
	}
	letsIn := func(p *program) bool { return strings.Contains(p.stderr.String(), "users are let in") }
	first := start(one).listening()
	h := &crowd{t: t, addr: b.addr}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for i := range h.homes {
		wg.Go(func() { h.binary(ctx, i) })
		wg.Go(func() { h.phone(ctx, i) })
	}
	eventually(t, "all binaries are there", func() bool { return h.settled("") && h.paired.Load() > 20 })
	old := *h.homes[0].Load()
	if rolling {
		second := start(two).listening()
		eventually(t, "phones are refused", func() bool { return h.refused.Load() > 20 || letsIn(second) })
		if letsIn(second) {
			return false
		}
		second.said("users are refused (503)")
		first.signal(syscall.SIGTERM)
		if got := first.exit(); got != exitStopped {
			t.Errorf("exit code %d", got)
		}
		eventually(t, "all binaries are at the new relay", func() bool { return h.settled(old) })
		if status, _ := fetch(t, "http://"+two+"/readyz"); status != http.StatusOK {
			t.Errorf("/readyz of the new relay: %d", status)
		}
	} else {
		for range 5 {
			second := start(two)
			if got := second.exit(); got != exitRefused {
				t.Errorf("exit code %d", got)
			}
			if letsIn(second) {
				return false
			}
		}
	}
	paired := h.paired.Load()
	eventually(t, "phones meet their binaries", func() bool { return h.paired.Load() > paired+20 })
	t.Logf("%d phones met their binary, %d were refused, %d came before it, %d were told 4404 although it was online",
		h.paired.Load(), h.refused.Load(), h.early.Load(), h.wrong.Load())
	if h.wrong.Load() > 0 || h.refused.Load() == 0 {
		t.Errorf("%d phones were told 4404 although their binary was online; %d refusals", h.wrong.Load(), h.refused.Load())
	}
	return true
}

// FuzzSelfcheckHeaders: what is read of a stranger's instance header or standing is
// the same when it is written and read again, and holds nothing that a log could
// be broken with.
func FuzzSelfcheckHeaders(f *testing.F) {
	for _, s := range []string{
		newIdentity(time.Now()).String(), "0123456789abcdef, 2026-01-02T03:04:05Z", "0123456789ABCDEF, 2026-01-02T03:04:05.678+23:59",
		"0123456789abcdef, 9999-12-31T23:59:59-01:00", "0123456789abcd, 2026-01-02T03:04:05Z", "0123456789abcdef01, 2026-01-02T03:04:05Z",
		"0123456789abcdef,2026-01-02T03:04:05Z", "0123456789abcdeg, x", "259200.000, users, yields", "0.0004,x", "1e9", "0x1p4, users", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := parseIdentity(s); err == nil {
			if again, err := parseIdentity(id.String()); err != nil || again.id != id.id || !again.started.Equal(id.started) {
				t.Errorf("%q: %s was read back as %s, %v", s, id, again, err)
			}
			if strings.Trim(id.id, "0123456789abcdefABCDEF") != "" || len(id.id) != 16 {
				t.Errorf("%q: id %q", s, id.id)
			}
		}
		if st, err := parseStanding(s); err == nil {
			again, err := parseStanding(st.String())
			off := (again.age - st.age).Abs()
			if err != nil || again.users != st.users || again.yields != st.yields || off > time.Millisecond {
				t.Errorf("%q: %s was read back as %s, %v", s, st, again, err)
			}
		}
	})
}
