package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The first guard against a second relay: one port on this host that only one
// process can bind. The kernel makes that atomic, whatever the user, the working
// directory or a stale file says, and gives the port back when its holder dies,
// however it dies. What a second relay does unnoticed: docs/architecture.md,
// Single-instance constraint.

const (
	// lockAnswerTime bounds one conversation with the holder. A holder under
	// load answers within milliseconds.
	lockAnswerTime = 2 * time.Second
	// lockAttempts: a holder that vanishes between our bind and our question has
	// just died, and the port is free by now.
	lockAttempts = 5
	// maxLockAnswer is far more than a holder says.
	maxLockAnswer = 4 << 10
	// maxLockTalks bounds the connections to the holder that linger.
	maxLockTalks = 4
	// maxPID is the largest that any system gives: Linux stops at 1<<22.
	maxPID = 1<<31 - 1
)

// lockInfo is what the holder of the lock says of itself, as one JSON line.
type lockInfo struct {
	Program  string    `json:"program"`
	PID      int       `json:"pid"`
	Version  string    `json:"version"`
	Instance string    `json:"instance"`
	Listen   string    `json:"listen"`
	Admin    string    `json:"admin"`
	Started  time.Time `json:"started"`
	Uptime   int64     `json:"uptime_seconds"` // monotonic: holds where the clock was set meanwhile; 0 of older versions
	Servers  int64     `json:"servers"`        // binaries connected
	Draining bool      `json:"draining"`
}

// up is how long the relay has run.
func (h *lockInfo) up(now time.Time) time.Duration {
	if h.Uptime > 0 {
		return time.Duration(h.Uptime) * time.Second
	}
	return now.Sub(h.Started)
}

// credible reports whether a relay can have said that of itself. The refusal tells
// a person to kill its pid, so what does not make sense is not repeated as fact.
func (h *lockInfo) credible(now time.Time) bool {
	const longest = 100 * 365 * 24 * time.Hour
	for _, s := range [...]string{h.Version, h.Instance, h.Listen, h.Admin} {
		if len(s) > maxQuoted || plain(s) != s {
			return false
		}
	}
	up := h.up(now)
	return h.Program == programName && h.PID > 1 && h.PID <= maxPID && h.Servers >= 0 &&
		h.Uptime <= int64(longest/time.Second) && up >= 0 && up < longest
}

// instanceLock is the lock while it is ours.
type instanceLock struct {
	ln    net.Listener
	talks chan struct{}  // a place for each connection that lingers
	wg    sync.WaitGroup // the accept loop

	mu    sync.Mutex // guards what follows
	info  lockInfo
	relay *relay // nil until there is one to be counted
}

// heldError says who holds the lock in our place.
type heldError struct {
	addr    string
	holder  *lockInfo // nil: not a relay, or not one that says so
	heard   string    // what it did instead, for a person
	perhaps string    // not empty: how it may be a relay all the same
}

func (e *heldError) Error() string {
	switch {
	case e.perhaps != "":
		_, port, _ := net.SplitHostPort(e.addr)
		return fmt.Sprintf("%s, the -instance-lock, is held by something that may be %s (%s): find its pid, as root, with: %s; "+
			"then let it go on (kill -CONT, or unpause the container) or end it: a second relay has a registry of its own, "+
			"and a phone that lands on the wrong one gets a silent 4404 although its binary is online", e.addr, e.perhaps, e.heard, listenerCommand(port))
	case e.holder == nil:
		return fmt.Sprintf("%s, the -instance-lock, is held by something that does not answer as a relay does (%s): "+
			"stop it, or choose another loopback port with -instance-lock, the same for every relay on this host", e.addr, e.heard)
	}
	h := e.holder
	state := ""
	if h.Draining {
		state = ", shutting down just now"
	}
	return fmt.Sprintf("multi-instance deploy detected: %s %q already runs on this host (pid %d, listening on %q, up %v, binaries connected: %d%s) and holds %s; "+
		"a second relay has a registry of its own, and a phone that lands on the wrong one gets a silent 4404 although its binary is online: "+
		"stop the first (kill %[3]d), or, for an emergency or a migration only, set %[9]s=1",
		programName, h.Version, h.PID, h.Listen, h.up(time.Now()).Round(time.Second), h.Servers, state, e.addr, bypassName)
}

// listenerCommand shows who listens on a port of this host.
func listenerCommand(port string) string {
	if runtime.GOOS == "linux" {
		return "ss -ltnp 'sport = :" + port + "'"
	}
	return "lsof -nP -iTCP:" + port + " -sTCP:LISTEN"
}

// lockInstance binds addr and answers there with info until Close. A *heldError
// tells who was first.
func lockInstance(addr string, info lockInfo) (*instanceLock, error) {
	var err error
	for range lockAttempts {
		var ln net.Listener
		if ln, err = net.Listen("tcp", addr); err == nil {
			l := &instanceLock{ln: ln, info: info, talks: make(chan struct{}, maxLockTalks)}
			l.wg.Go(l.serve)
			return l, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("binding %s, the -instance-lock, which proves that this is the only relay on this host: %w", addr, err)
		}
		held, gone := askHolder(addr)
		if err = held; !gone {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, err
}

// askHolder asks whoever holds addr who it is. gone: it has let go, as it seems.
func askHolder(addr string) (held *heldError, gone bool) {
	held = &heldError{addr: addr}
	var b []byte
	nc, err := net.DialTimeout("tcp", addr, lockAnswerTime)
	if err == nil {
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(lockAnswerTime))
		b, err = io.ReadAll(io.LimitReader(nc, maxLockAnswer))
	}
	var info lockInfo
	said := json.Unmarshal(b, &info) == nil && info.Program == programName
	switch {
	case said && info.credible(time.Now()):
		held.holder = &info
	case len(b) > 0:
		held.heard = "it says " + quote(strings.TrimSpace(string(b)))
		if said { // such as pid 1, in a container that shares this host's network
			held.perhaps = "a relay in a container, or one of another version"
		}
	case err == nil:
		held.heard = "it closes the connection"
	case errors.Is(err, syscall.ECONNREFUSED):
		held.heard = "it takes no connections"
		return held, true
	case errors.Is(err, syscall.ECONNRESET): // even while dialing
		held.heard = "it resets the connection"
		return held, true
	default:
		held.heard = fmt.Sprintf("it says nothing within %v", lockAnswerTime)
		held.perhaps = "a relay that is stopped (SIGSTOP, a paused container)"
	}
	return held, false
}

// serving tells the lock what it could not know when it was taken: the relay
// itself, and which ports the kernel chose.
func (l *instanceLock) serving(r *relay, listen, admin string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.relay, l.info.Listen, l.info.Admin = r, listen, admin
}

// serve answers until Close.
func (l *instanceLock) serve() {
	for {
		nc, err := l.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors: those who ask wait meanwhile
			time.Sleep(50 * time.Millisecond)
			continue
		}
		l.answer(nc.(*net.TCPConn))
	}
}

// answer says who holds the lock. The line fits in a new socket's buffer, so that
// nobody waits for whoever asks; only until he has read it a place is taken.
func (l *instanceLock) answer(nc *net.TCPConn) {
	l.mu.Lock()
	info, r := l.info, l.relay
	l.mu.Unlock()
	if r != nil {
		info.Uptime = int64(time.Since(r.started) / time.Second)
		info.Servers, info.Draining = r.metrics.connectedBinaries.Load(), r.draining.Load()
	}
	line, _ := json.Marshal(info) // of strings, numbers and a time: does not fail
	nc.SetDeadline(time.Now().Add(lockAnswerTime))
	nc.Write(append(line, '\n'))
	nc.CloseWrite()
	select {
	case l.talks <- struct{}{}:
		go l.linger(nc)
	default:
		nc.Close()
	}
}

// linger reads what the other end has said, so that closing does not reset the
// connection under the answer. Close does not wait for it: who asks and does not
// hang up must not hold up the end of the process.
func (l *instanceLock) linger(nc *net.TCPConn) {
	io.Copy(io.Discard, io.LimitReader(nc, maxLockAnswer))
	nc.Close()
	<-l.talks
}

// Close gives the lock back.
func (l *instanceLock) Close() error {
	err := l.ln.Close()
	l.wg.Wait()
	return err
}

// platformSign is what betrays a platform on which one command runs a second
// relay on another host, where no port of this one can notice it.
func platformSign(env map[string]string) (variable, platform string) {
	for _, p := range [...][2]string{{"FLY_APP_NAME", "Fly.io"}, {"KUBERNETES_SERVICE_HOST", "Kubernetes"}} {
		if env[p[0]] != "" {
			return p[0], p[1]
		}
	}
	return "", ""
}

// checkPlatform refuses to start where scaling out is one command and nothing
// would notice it.
func checkPlatform(o options, env map[string]string) error {
	variable, platform := platformSign(env)
	if variable == "" || o.publicURL != nil || o.bypass {
		return nil
	}
	return fmt.Errorf("multi-instance deploy detected: %s is set, and on %s one command runs a second relay, whose registry is another: "+
		"a phone that lands on the wrong one gets a silent 4404 although its binary is online: "+
		"give -public-url wss://your.relay (or %s), with which the relay verifies instead of assuming that it is alone, "+
		"or, for an emergency or a migration only, set %s=1", variable, platform, envName("public-url"), bypassName)
}
