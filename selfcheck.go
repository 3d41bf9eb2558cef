package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/bits"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// What keeps a second relay from running unnoticed: the identity of each process, the
// instance lock on this host, and the check of the public name across hosts. What
// a second relay does: docs/architecture.md, Single-instance constraint.

const (
	// instanceHeader is in every answer of the WebSocket endpoints: the relay that gave it.
	instanceHeader = "X-Pyrycode-Relay-Instance"
	// standingHeader is beside it: what decides which of two relays stays. It is a
	// header of its own, because older relays read the other to its end.
	standingHeader = "X-Pyrycode-Relay-Standing"
	// probeHeader carries the nonce by which the relay knows its own check when it
	// comes back through the public URL.
	probeHeader = "X-Pyrycode-Relay-Probe"
	// probePrefix begins the server-ids of checks and probes, which are no users'.
	probePrefix = "probe-"
)

// lostPhone is what a second relay does.
const lostPhone = "a phone that lands on the wrong one gets a silent 4404 although its binary is online"

// identity tells one relay process from another. Neither part is a secret.
type identity struct {
	id      string // 16 hexadecimal digits
	started time.Time
}

func newIdentity(now time.Time) identity {
	var b [8]byte
	rand.Read(b[:])
	return identity{hex.EncodeToString(b[:]), now.UTC().Truncate(time.Millisecond)}
}

// String is the identity as it stands in instanceHeader: id, start time.
func (i identity) String() string { return i.id + ", " + i.started.Format(time.RFC3339Nano) }

// parseIdentity reads an instanceHeader.
func parseIdentity(s string) (identity, error) {
	id, at, ok := strings.Cut(s, ", ")
	if b, err := hex.DecodeString(id); !ok || err != nil || len(b) != 8 {
		return identity{}, fmt.Errorf("%q is not an instance: want 16 hexadecimal digits, a comma and a start time", s)
	}
	started, err := time.Parse(time.RFC3339Nano, at)
	if err != nil {
		return identity{}, fmt.Errorf("start time of instance %s: %w", id, err)
	}
	// Any other year cannot be written again, not even as JSON.
	if started = started.UTC(); started.Year() < 1 || started.Year() > 9999 {
		return identity{}, fmt.Errorf("start time of instance %s: %q is no such time", id, at)
	}
	return identity{id, started}, nil
}

// standing is what decides which of two relays stays.
type standing struct {
	age    time.Duration // since the start, by a monotonic clock: nobody sets that
	users  bool          // it holds claims of users' binaries, graces included
	yields bool          // it is about to give way to another
	waits  bool          // it does not let users in yet
	drains bool          // it does not let anybody in any more
}

var standingWords = [...]string{"users", "yields", "waits", "drains"}

// facts are what standingWords say.
func (s *standing) facts() [len(standingWords)]*bool {
	return [...]*bool{&s.users, &s.yields, &s.waits, &s.drains}
}

// String is the standing as it is in standingHeader: seconds, then words.
func (s standing) String() string {
	text := strconv.FormatFloat(s.age.Seconds(), 'f', 3, 64)
	for i, fact := range s.facts() {
		if *fact {
			text += ", " + standingWords[i]
		}
	}
	return text
}

// parseStanding reads a standingHeader. Words that this relay does not know are
// for later ones.
func parseStanding(text string) (s standing, err error) {
	const longest = 100 * 365 * 24 * 60 * 60
	age, words, _ := strings.Cut(text, ",")
	seconds, err := strconv.ParseFloat(age, 64)
	if err != nil || !(seconds >= 0 && seconds <= longest) {
		return standing{}, fmt.Errorf("%s is not a standing: want seconds, and words behind commas", quote(text))
	}
	s.age = time.Duration(seconds * float64(time.Second))
	for word := range strings.SplitSeq(words, ",") {
		if i := slices.Index(standingWords[:], strings.TrimSpace(word)); i >= 0 {
			*s.facts()[i] = true
		}
	}
	return s, nil
}

// publicVerdict is what the check through the public URL found.
type publicVerdict uint8

const (
	publicOff         publicVerdict = iota // no -public-url
	publicPending                          // the first round is not over
	publicVerified                         // all connections reached this process
	publicSplit                            // another relay answers, too
	publicNotARelay                        // something else answers
	publicUnreachable                      // nothing does
	publicVerdictCount
)

func (v publicVerdict) String() string {
	return [...]string{"off", "pending", "verified", "split", "not-a-relay", "unreachable"}[v]
}

// instanceState is what the checks have found so far, for /healthz, /metrics and
// standingHeader.
type instanceState struct {
	bypassed atomic.Bool   // PYRYCODE_RELAY_SINGLE_INSTANCE=1: the instance lock decides nothing
	public   atomic.Uint32 // a publicVerdict
	yields   atomic.Bool   // this relay is about to give way to another
	unseen   atomic.Int64  // addresses of the public name that the last round could not reach
	waits    atomic.Bool   // users are not let in before the first round is over; once they are, this is over for good

	hostWarning, filesWarning, memoryWarning, publicWarning, idsWarning, tlsWarning atomic.Pointer[warning] // the log's latest, nil for none
}

func (s *instanceState) verdict() publicVerdict { return publicVerdict(s.public.Load()) }

// probeKeys are the nonces under way. Each is random, known to this process only,
// good for one upgrade to one server-id, and forgotten once that upgrade has been
// answered, so that another relay or a proxy that sees one pass by has no use for it.
type probeKeys struct{ serverIDs sync.Map } // by nonce

// issue makes a nonce for one upgrade to a server-id.
func (p *probeKeys) issue(serverID string) string {
	nonce := rand.Text()
	p.serverIDs.Store(nonce, serverID)
	return nonce
}

// valid reports whether a nonce is for serverID, and uses it up.
func (p *probeKeys) valid(serverID, nonce string) bool {
	return p.serverIDs.CompareAndDelete(nonce, serverID)
}

// withdraw forgets a nonce, and reports whether it has come back, and so has reached
// this relay.
func (p *probeKeys) withdraw(nonce string) (used bool) {
	_, unused := p.serverIDs.LoadAndDelete(nonce)
	return !unused
}

// ---- the instance lock ----

// The first guard against a second relay: ports of this host that only one process can
// bind, and files, for those who share neither this host's network nor this host, that
// only one can lock. The kernel makes either atomic, whatever the user, the working
// directory or a stale file says, and gives it back when its holder dies, however it dies.

const (
	// lockAnswerTime bounds one conversation with the holder. A holder under
	// load answers within milliseconds.
	lockAnswerTime = 2 * time.Second
	// lockAttempts: a holder that vanishes between our bind and our question has
	// just died, and the port is free by now. A file's holder has a moment, too,
	// to write who it is in place of the last one.
	lockAttempts = 5
	lockPause    = 50 * time.Millisecond
	// maxLockAnswer is far more than a holder says.
	maxLockAnswer = 4 << 10
	// maxPID is the largest that any system gives: Linux stops at 1<<22.
	maxPID = 1<<31 - 1
)

// lockInfo is what the holder of the lock says of itself, as one JSON line. In a file
// it is of the start.
type lockInfo struct {
	Program  string    `json:"program"`
	Host     string    `json:"host"`          // in a container usually its id; "" of older versions
	PIDSpace string    `json:"pid_namespace"` // "" where a host has but one
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

// newLockInfo is this process.
func newLockInfo(id identity, version, listen, admin string) lockInfo {
	h := lockInfo{Program: programName, PID: os.Getpid(), Version: version, Instance: id.id, Listen: listen, Admin: admin, Started: id.started}
	h.Host, _ = os.Hostname()
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // random(4); hosts can share a name
	pids, _ := os.Readlink("/proc/self/ns/pid")               // namespaces(7)
	h.PIDSpace = strings.TrimSpace(strings.TrimSpace(string(boot)) + " " + pids)
	return h
}

// beside reports whether the pid means the same process to other.
func (h *lockInfo) beside(other lockInfo) bool {
	return h.Host == "" || h.Host == other.Host && h.PIDSpace == other.PIDSpace
}

// up is how long the relay has run.
func (h *lockInfo) up(now time.Time) time.Duration {
	if h.Uptime > 0 {
		return time.Duration(h.Uptime) * time.Second
	}
	return now.Sub(h.Started)
}

// credible reports whether a relay can have said that of itself. The refusal tells
// a person to kill its pid, so what does not make sense is not repeated as fact. Where
// me has no such pid, it may be 1, as in most containers.
func (h *lockInfo) credible(now time.Time, me lockInfo) bool {
	const longest = 100 * 365 * 24 * time.Hour
	for _, s := range [...]string{h.Host, h.PIDSpace, h.Version, h.Instance, h.Listen, h.Admin} {
		if len(s) > maxQuoted || printable(s) != s {
			return false
		}
	}
	up := h.up(now)
	return h.Program == programName && (h.PID > 1 || h.PID == 1 && !h.beside(me)) && h.PID <= maxPID && h.Servers >= 0 &&
		h.Uptime <= int64(longest/time.Second) && up >= 0 && up < longest
}

// instanceLock is what is ours of the -instance-lock.
type instanceLock struct {
	ports []net.Listener
	files []*os.File
	wg    sync.WaitGroup // the accept loops
	info  atomic.Pointer[func() lockInfo]
}

// heldError tells what holds a lock in this relay's place.
type heldError struct {
	at      string // the address or path
	me      lockInfo
	holder  *lockInfo // nil: not a relay, or not one that says so
	heard   string    // what it did instead, for a person
	perhaps string    // not empty: how it may be a relay all the same
}

func (e *heldError) Error() string {
	switch {
	case e.perhaps != "":
		return fmt.Sprintf("%s, the -instance-lock, is held by something that may be %s (%s): find its pid, as root, with: %s; "+
			"then let it go on (kill -CONT, or unpause the container) or end it: a second relay has a registry of its own, and "+lostPhone,
			e.at, e.perhaps, e.heard, holderCommand(e.at))
	case e.holder == nil:
		return fmt.Sprintf("%s, the -instance-lock, is held by something that does not answer as a relay does (%s): "+
			"stop it, or choose another loopback port with -instance-lock, the same for every relay on this host", e.at, e.heard)
	}
	h := e.holder
	state, stop := fmt.Sprintf(", binaries connected: %d", h.Servers), fmt.Sprintf("stop the first (kill %d)", h.PID)
	if isFile(e.at) {
		state = "" // it is not known
	}
	if h.Draining {
		state += ", shutting down just now"
	}
	if !h.beside(e.me) {
		stop = "stop the first where it runs (that pid is nobody's here; if the name is a container's id, docker or podman stop has it)"
	}
	return fmt.Sprintf("multi-instance deploy detected: %s %q already runs %s (pid %d, listening on %q, up %v%s) and holds %s; "+
		"a second relay has a registry of its own, and "+lostPhone+": %s, or, for an emergency or a migration only, set %s=1",
		programName, h.Version, e.where(), h.PID, h.Listen, h.up(time.Now()).Round(time.Second), state, e.at, stop, bypassName)
}

// where the holder runs.
func (e *heldError) where() string {
	if e.holder.beside(e.me) {
		return "on this host"
	}
	return fmt.Sprintf("on another host or in another container, %q", e.holder.Host)
}

// isFile tells the two kinds of locks apart.
func isFile(at string) bool { return strings.HasPrefix(at, "/") }

// holderCommand is a command that shows what has a lock of this host.
func holderCommand(at string) string {
	_, port, _ := net.SplitHostPort(at)
	switch {
	case isFile(at):
		return "fuser " + at
	case runtime.GOOS == "linux":
		return "ss -ltnp 'sport = :" + port + "'"
	}
	return "lsof -nP -iTCP:" + port + " -sTCP:LISTEN"
}

// hear takes what was said for a relay's, if one can have said it.
func (e *heldError) hear(said []byte) {
	var h lockInfo
	relay := json.NewDecoder(bytes.NewReader(said)).Decode(&h) == nil && h.Program == programName
	if relay && h.credible(time.Now(), e.me) {
		e.holder = &h
		return
	}
	e.heard = "it says " + quote(strings.TrimSpace(string(said)))
	if relay || isFile(e.at) { // such as pid 1, in a container that shares this host's network
		e.perhaps = "a relay in a container, or one of another version"
	}
}

// lockInstance takes all locks, and answers there with info until Close, or none of
// them, unless whatIsFree. A *heldError tells what was first.
func lockInstance(locks []string, info lockInfo, whatIsFree bool) (*instanceLock, error) {
	l := new(instanceLock)
	l.describe(func() lockInfo { return info })
	var first error
	for _, at := range locks {
		take := l.bind
		if isFile(at) {
			take = l.lockFile
		}
		if err := take(at, info); err != nil && !whatIsFree {
			l.Close()
			return nil, err
		} else if first == nil {
			first = err
		}
	}
	return l, first
}

// bind takes a port.
func (l *instanceLock) bind(addr string, me lockInfo) error {
	for tries := 1; ; tries++ {
		ln, err := net.Listen("tcp", addr)
		if err == nil {
			l.ports = append(l.ports, ln)
			l.wg.Go(func() { l.serve(ln) })
			return nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("binding %s, the -instance-lock, which proves that this is the only relay on this host: %w", addr, err)
		}
		held, gone := askHolder(addr, me)
		if !gone || tries == lockAttempts {
			return held
		}
		time.Sleep(lockPause)
	}
}

// askHolder asks the holder of addr what it is. gone: it has let go, as it seems.
func askHolder(addr string, me lockInfo) (held *heldError, gone bool) {
	held = &heldError{at: addr, me: me}
	var b []byte
	nc, err := net.DialTimeout("tcp", addr, lockAnswerTime)
	if err == nil {
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(lockAnswerTime))
		b, err = io.ReadAll(io.LimitReader(nc, maxLockAnswer))
	}
	switch {
	case len(b) > 0:
		held.hear(b)
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

// flock is nil where a system has no such locks. syscall.EWOULDBLOCK: somebody has it.
var (
	flock     func(*os.File) error
	lockFlags int // of the open: follow no link, wait for nothing
)

// lockFile takes a file. Nobody removes it: another may have it open by then.
func (l *instanceLock) lockFile(path string, me lockInfo) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|lockFlags, 0o600)
	refuse := func(why error, remedy string) error {
		f.Close()
		if e, ok := errors.AsType[*os.PathError](why); ok {
			why = e.Err
		}
		return fmt.Errorf("locking %s, the -instance-lock, which proves that no other relay sees that file: %w: %s", path, why, remedy)
	}
	at, _ := os.Lstat(path) // may be why that failed
	if err == nil {
		at, err = f.Stat()
	}
	switch {
	case at != nil && (!at.Mode().IsRegular() || at.Mode().Perm()&0o022 != 0):
		return refuse(fmt.Errorf("it is %v", at.Mode()), "want a file that only its owner can write, and no link to one: "+
			"name one that isn't there yet, or chmod 600 it")
	case err != nil:
		return refuse(err, "its directory has to be there, and this user to be allowed to write to the file: "+
			"create, chown or mount it so (under systemd: ReadWritePaths=), unless another user's relay has it")
	}
	err = flock(f)
	for tries := 1; err != nil && tries < lockAttempts; tries++ {
		time.Sleep(lockPause)
		err = flock(f)
	}
	said, readErr := io.ReadAll(io.LimitReader(f, maxLockAnswer))
	held := &heldError{at: path, me: me}
	held.hear(said)
	switch {
	case errors.Is(err, syscall.EWOULDBLOCK) && held.holder != nil && held.holder.Instance == me.Instance:
		return refuse(errors.New("this relay has it already, by another path"), "name it once")
	case errors.Is(err, syscall.EWOULDBLOCK):
		f.Close()
		return held
	case err != nil:
		return refuse(err, "this file system has no locks: choose a file on one that has, such as /run/lock")
	case len(bytes.Trim(said, "\x00")) > 0 && !bytes.HasPrefix(said, []byte(`{"program":"`+programName+`"`)): // NULs: a power cut
		return refuse(errors.New(held.heard), "no relay wrote that, and this one would overwrite it: choose another file")
	}
	if err = cmp.Or(readErr, l.write(f)); err != nil {
		return refuse(err, "make room, or choose another file")
	}
	l.files = append(l.files, f)
	return nil
}

// describe has the lock answer with what info returns.
func (l *instanceLock) describe(info func() lockInfo) { l.info.Store(&info) }

// serving tells the lock what it could not know when it was taken: the relay
// itself, and which ports the kernel chose.
func (l *instanceLock) serving(r *relay, listen, admin string) {
	info := (*l.info.Load())()
	l.describe(func() lockInfo {
		now := info
		now.Listen, now.Admin, now.Uptime = listen, admin, int64(time.Since(r.started)/time.Second)
		now.Servers, now.Draining = r.metrics.connectedBinaries.Load(), r.draining.Load()
		return now
	})
	for _, f := range l.files {
		l.write(f)
	}
}

// write says in a file what the ports answer. The new line is there before the end of a
// longer old one is cut off, and readers take the first.
func (l *instanceLock) write(f *os.File) error {
	info := (*l.info.Load())()
	info.Uptime = 0 // who reads it later has the start
	line, err := json.Marshal(info)
	if err == nil {
		_, err = f.WriteAt(append(line, '\n'), 0)
	}
	if err != nil {
		return err
	}
	return f.Truncate(int64(len(line)) + 1)
}

// serve answers until Close. The line fits in a new socket's buffer, so that an asker
// that doesn't read holds up nobody.
func (l *instanceLock) serve(ln net.Listener) {
	for {
		nc, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors: askers wait meanwhile
			time.Sleep(lockPause)
			continue
		}
		nc.SetDeadline(time.Now().Add(lockAnswerTime))
		json.NewEncoder(nc).Encode((*l.info.Load())())
		nc.Close()
	}
}

// Close gives all back.
func (l *instanceLock) Close() {
	for _, ln := range l.ports {
		ln.Close()
	}
	for _, f := range l.files {
		f.Close()
	}
	l.wg.Wait()
}

// checkPlatform refuses to start where scaling out is one command and nothing
// would notice it.
func checkPlatform(o options, env map[string]string) error {
	if o.publicURL != nil || o.bypass {
		return nil
	}
	for _, p := range [...][2]string{{"FLY_APP_NAME", "Fly.io"}, {"KUBERNETES_SERVICE_HOST", "Kubernetes"}} {
		if variable, platform := p[0], p[1]; env[variable] != "" {
			return fmt.Errorf("multi-instance deploy detected: %s is set, and on %s one command runs a second relay, "+
				"whose registry is another: "+lostPhone+": "+
				"give -public-url wss://your.relay (or %s), with which the relay verifies instead of assuming that it is alone, "+
				"or, for an emergency or a migration only, set %s=1", variable, platform, envName("public-url"), bypassName)
		}
	}
	return nil
}

// ---- the check of the public name ----

// The second guard against a second relay, across hosts: this one asks its own
// public name (-public-url) which relay answers there. What it finds is a verdict for
// the log, /healthz and /metrics; only another relay that is to stay, seen again and
// again, ends this process.

const (
	firstJoins = 8 // phones in the first round
	laterJoins = 4
	// splitRounds is how often, and checkPace.over for how long, a relay that is to
	// stay must be seen before this one gives way: a rolling update overlaps for
	// seconds.
	splitRounds = 3
	// waitRounds is splitRounds of a relay that lets nobody in, and hurts nobody as long as it
	// waits: with slow answers 90 s are three rounds, in which server-ids that move while some
	// third relay starts again look like a split.
	waitRounds = 6
	// splitDoubts is for how many times checkPace.over claims of users' binaries count:
	// a binary that comes and goes must not keep two relays for ever.
	splitDoubts = 4

	// maxClaims is how many server-ids are claimed until a claim lands here, and
	// idsPerClaim from how many the one for a next claim is chosen. A balancer that sticks
	// by server-id brings every other one to the other of two relays, which is no fault as
	// long as phones follow. Of 61 one comes here in all but 2 of 1,000 rounds, even if the
	// other relay gets nine of ten.
	maxClaims   = 16
	idsPerClaim = 4
	// maxMisses claims that reach no relay at all end a round that has met none. If it has
	// met another one they say nothing: a balancer that sticks by server-id may bring them to
	// a third, which is down or waits, and the next one here.
	maxMisses = 3
	// elsewhereJoins are the phones that look whether they follow a claim on
	// another relay, for the first elsewhereLooks of such claims.
	elsewhereJoins = 2
	elsewhereLooks = 4
	// longestPause is what two connections are apart at the most.
	longestPause = 75 * time.Millisecond
	// mostAddrs is to how many addresses of the name a round goes at the most, one after
	// the other; the next round goes on where it ended.
	mostAddrs = 16
	// So many sightings of another relay in so many rounds are a split, as two in a row
	// are: a balancer may give it few connections.
	splitSightings = 3
	splitWindow    = 20
	// hintBurst hints within hintTime are worth a round, one in each hintPause.
	hintBurst = 3
	hintTime  = 10 * time.Second
	hintPause = time.Minute

	// longestRefusal is how long users are refused because of a first round that
	// takes long and has met no other relay.
	longestRefusal = 5 * time.Second
	// handOver is between rounds while another relay serves in this one's place.
	handOver = 1500 * time.Millisecond
	// For so many server-ids pages are asked for before users are let in, two for each: a
	// balancer that takes turns at random hides one of two relays from all of these once
	// in 65,536 times.
	handOverIDs = 8
	// stickyShare of checkPace.over is longer than most rolling updates, in which
	// server-ids move where a balancer sticks by them.
	stickyShare = 6
	// partedShare of checkPace.over is as long as some rounds of pages. A balancer at random
	// passes for one that sticks in one of 256: in all of these it does not.
	partedShare = 18
)

// checkPace is when the public name is checked.
type checkPace struct {
	every time.Duration // between rounds, while all is well
	again time.Duration // between rounds after one that was not
	over  time.Duration // how long a split lasts before one relay gives way
	skew  time.Duration // how wrong the clock is at the start: for tests alone
}

func defaultPace() checkPace {
	return checkPace{every: 5 * time.Minute, again: 30 * time.Second, over: 90 * time.Second}
}

// paceName is for tests of a whole process, which cannot wait for minutes. It is
// no option: an operator has no reason to know of it.
const paceName = "PYRYCODE_RELAY_TEST_PUBLIC_CHECK"

// paceFrom reads the variable paceName: every,again,over as in 2s,500ms,1500ms, and
// perhaps skew.
func paceFrom(env map[string]string) (checkPace, error) {
	p := defaultPace()
	v, set := env[paceName]
	if !set {
		return p, nil
	}
	parts := strings.Split(v, ",")
	into := []*time.Duration{&p.every, &p.again, &p.over, &p.skew}
	for i, s := range parts {
		d, err := time.ParseDuration(s)
		if len(parts) != 3 && len(parts) != 4 || err != nil || d <= 0 && i < 3 {
			return p, fmt.Errorf("invalid value %q for variable %s: want three durations, such as 2s,500ms,1500ms", v, paceName)
		}
		*into[i] = d
	}
	return p, nil
}

// publicCheck checks the public name until its context ends.
type publicCheck struct {
	// Set at the start.
	me       identity
	began    time.Time       // when it started, by the monotonic clock
	standing func() standing // of this relay, at any moment
	keys     *probeKeys
	url      string
	dialer   dialer
	bypass   bool
	pace     checkPace
	pause    time.Duration // at most, between two connections
	held     int           // phones that are open side by side, at most
	state    *instanceState
	log      keptLog
	round    func(ctx context.Context, joins int) roundResult // look
	random   *mrand.Rand                                      // of pauses; nil: the runtime's
	leave    chan error                                       // says that this process must give way
	hints    chan struct{}                                    // that binaries may be at another relay

	cancel context.CancelFunc
	wg     sync.WaitGroup

	// Owned by run.
	refusal   *time.Timer  // lets users in where the first round takes long
	blind     bool         // no relay gives the pages that the check asks for while users are refused
	parted    time.Time    // when the two pages of a server-id came from two relays
	suspected bool         // the last round saw a split, and that was not enough
	sightings uint32       // a bit for each of splitWindow rounds in which another relay was seen, the last one lowest
	unseen    []netip.Addr // of the verdict in the log
	changed   time.Time
	hinted    time.Time               // of the last round that hints have brought about
	seen      map[string]*observation // by id: other relays, since the split began
}

// observation is another relay that answers to our name.
type observation struct {
	since  time.Time // when it was seen first
	met    time.Time // when it was seen last
	rounds int       // in a row in which it was the one to stay
	first  time.Time // when the first of them was judged
}

// newPublicCheck makes the check of a -public-url. Without one it has nothing to do.
func newPublicCheck(o options, r *relay) *publicCheck {
	c := &publicCheck{
		me: r.id, began: r.started, standing: r.standing, keys: r.probes, bypass: o.bypass, pace: o.checkPace,
		pause: min(o.checkPace.again/10, longestPause), held: min(o.maxPhones, firstJoins), state: r.instance, leave: make(chan error, 1),
		log: keptLog{r.log, &r.instance.publicWarning}, hints: r.hints,
	}
	if o.publicURL != nil {
		c.url, c.dialer.base, c.round = o.publicURL.String(), o.publicURL, c.look
		c.state.public.Store(uint32(publicPending))
	}
	return c
}

// start runs the check until stop.
func (c *publicCheck) start() {
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	if c.round != nil {
		c.wg.Go(func() { c.run(ctx) })
	}
}

// stop ends the check and whatever it has open.
func (c *publicCheck) stop() {
	c.cancel()
	c.wg.Wait()
}

func (c *publicCheck) run(ctx context.Context) {
	c.refusal = time.AfterFunc(longestRefusal, c.admit)
	defer c.refusal.Stop()
	joins, wait := firstJoins, time.Duration(0)
	for c.await(ctx, wait) {
		f := c.round(ctx, joins)
		c.refusal.Stop()
		if ctx.Err() != nil {
			return
		}
		if err := c.judge(f, time.Now()); err != nil {
			c.leave <- err
			return
		}
		joins, wait = laterJoins, c.pace.every
		verdict := c.state.verdict()
		switch {
		case c.state.waits.Load() && !c.blind:
			joins, wait = firstJoins, min(handOver, c.pace.again)
		case c.suspected, c.blind && c.state.waits.Load(), c.sightings != 0 && verdict != publicSplit:
			joins, wait = firstJoins, c.pace.again
		case verdict != publicVerified && time.Since(c.changed) < 2*c.pace.every:
			wait = c.pace.again // what has just gone wrong may be over soon
		}
		wait = wait*9/10 + c.upTo(wait/5)
	}
}

// await waits for the next round, if there is to be one. A burst of hints that phones
// are at the wrong relay makes that due at once, one a minute.
func (c *publicCheck) await(ctx context.Context, wait time.Duration) bool {
	var burst []time.Time
	for due := time.After(wait); ; {
		select {
		case <-due:
			return true
		case <-ctx.Done():
			return false
		case <-c.hints:
			now := time.Now()
			burst = append(burst, now)
			first := burst[max(0, len(burst)-hintBurst)]
			if len(burst) >= hintBurst && now.Sub(first) < hintTime && now.Sub(c.hinted) >= hintPause {
				c.hinted = now
				return true
			}
		}
	}
}

// ---- one round of the check ----

// A round is a claim, and phones that join it, all from outside. A phone that gets
// 4404 while the claim is held is the failure that is looked for; instanceHeader
// tells which relay gave an answer.

// outcome is what one connection reached, as the verdict that it alone would give.
type outcome struct {
	verdict   publicVerdict
	other     rival     // of publicSplit; zero if it does not give its name
	diagnosis diagnosis // of publicNotARelay and publicUnreachable
}

// roundResult is what one round found.
type roundResult struct {
	verdict   publicVerdict // verified, split, not-a-relay or unreachable
	others    []rival       // of a split: the other relays that give their names, the oldest first
	none      bool          // of a split: no claim came here, and phones followed theirs
	diagnosis diagnosis     // of the rest
	joins     int           // phones that tried
	failed    int           // of them
	addrs     int           // of the name
	unseen    []netip.Addr  // of them: those that could not be reached
}

// add adds a connection. The verdict that is worst to miss stands, and of each other
// relay its latest answer.
func (f *roundResult) add(r outcome) {
	if r.verdict != publicVerified && (f.verdict == publicVerified || r.verdict < f.verdict) {
		f.verdict, f.diagnosis = r.verdict, r.diagnosis
	}
	if r.other.id != "" {
		now := time.Now()
		f.others = slices.DeleteFunc(f.others, func(o rival) bool { return o.id == r.other.id })
		f.others = append(f.others, r.other)
		slices.SortFunc(f.others, func(a, b rival) int { return cmp.Compare(b.age(now), a.age(now)) })
	}
}

// stayer is another relay that is to stay, if one was met, and why.
func (f *roundResult) stayer(me identity) (o *rival, why string) {
	for i := range f.others {
		if stays, why := f.others[i].prevails(me, false); stays {
			return &f.others[i], why
		}
	}
	return nil, ""
}

// look makes one round, with a number of phones.
func (c *publicCheck) look(ctx context.Context, joins int) (f roundResult) {
	f.verdict = publicVerified
	d := &c.dialer
	clear(d.lost)
	defer func() {
		if o, _ := f.stayer(c.me); c.state.waits.Load() && o == nil && len(f.others) > 0 { // they wait, too: is there one for which?
			if g, yes := c.replaced(ctx, handOverIDs*(1+len(f.others))); yes {
				f = g
			}
		}
		f.addrs = len(d.addrs)
		f.unseen = slices.DeleteFunc(slices.Clone(d.addrs), func(a netip.Addr) bool { return !d.lost[a] })
	}()
	if c.state.waits.Load() {
		n := 0 // the more take turns, the better one of them hides
		for _, s := range c.seen {
			if time.Since(s.met) < c.pace.again { // one that starts again and again is another each time
				n++
			}
		}
		n = max(1, n)
		if g, yes := c.replaced(ctx, n*handOverIDs); yes {
			return g
		}
		if joins = n * firstJoins; c.blind {
			joins *= 2
		}
	}
	var elsewhere []outcome
	for misses := 0; len(elsewhere)+misses < maxClaims && (misses < maxMisses || len(elsewhere) > 0) && ctx.Err() == nil; {
		follow := elsewhereJoins
		if len(elsewhere) >= elsewhereLooks {
			follow = 0
		}
		switch r := c.tryID(ctx, c.newID(ctx, len(elsewhere) > 0), joins, follow, &f); {
		case r.verdict == publicVerified:
			return f
		case r.verdict != publicSplit:
			misses++
			f.add(r)
		case f.verdict == publicSplit: // its phones came here, or to a third relay
			f.add(r)
			return f
		default:
			elsewhere = append(elsewhere, r)
		}
		c.rest(ctx)
	}
	f.none = true
	for _, r := range elsewhere {
		f.add(r)
	}
	return f
}

// replaced reports whether another relay serves in this one's place, which is what f is
// then. It asks for pages, since upgrades would use up the rate of all who share this
// relay's address there; for each server-id twice, since a balancer that sticks by it
// leads some to each relay for good: after a while there, and if none was led to two of
// late, a whole round decides. Once users are let in it decides in any case.
func (c *publicCheck) replaced(ctx context.Context, ids int) (f roundResult, yes bool) {
	f.verdict = publicVerified
	here, there := 0, 0
	for range ids {
		id, met, waiting := probePrefix+rand.Text(), 0, 0
		for range 2 {
			_, t, err := c.dialer.dial(ctx, rolePage, id, "")
			if c.blind = !t.answer.named; c.blind || !c.state.waits.Load() {
				return f, false
			}
			r := c.reached(t, err)
			if r.other.stays(c.me) {
				f.add(r)
				met++
			}
			if r.other.theirs.waits {
				waiting++
			}
		}
		switch {
		case met == 0:
			here++
		case met == 2:
			there++
		case waiting < 2: // else neither was here: one that waits has started again meanwhile
			c.parted = time.Now()
			return f, true
		}
		if here == 0 && there == ids/2 {
			return f, true
		}
		c.rest(ctx)
	}
	early := time.Since(c.began) < c.pace.over/stickyShare
	return f, there > 0 && (early || time.Since(c.parted) < c.pace.over/partedShare)
}

// newID makes a server-id; sought, one of idsPerClaim for which a page comes here, if there
// is such a one. Where a balancer sticks by server-id its claim comes here, too, and a page
// uses up nobody's rate.
func (c *publicCheck) newID(ctx context.Context, sought bool) (id string) {
	for range idsPerClaim {
		id = probePrefix + rand.Text()
		if !sought {
			break
		}
		_, t, err := c.dialer.dial(ctx, rolePage, id, "")
		if t.answer.code == 0 || t.answer.named && c.reached(t, err).verdict == publicVerified {
			break
		}
		c.rest(ctx)
	}
	return id
}

// tryID claims a server-id and joins it, with so many phones if the claim is
// held here, and so many if it is elsewhere. It returns what the claim reached; what
// the phones do goes into f. They stay open as long as they may: a balancer by least
// connections brings them here until they are as many as what the other relay has.
func (c *publicCheck) tryID(ctx context.Context, id string, joins, follow int, f *roundResult) outcome {
	h := &household{id: id, open: c.open}
	defer h.close()
	t, err := h.hold(ctx)
	at := c.reached(t, err)
	switch {
	case at.verdict == publicVerified && t.step == stepSession && err != nil: // it leads here, and frames are lost on the way
		return outcome{verdict: publicUnreachable, diagnosis: c.diagnose(t, err)}
	case at.verdict == publicVerified:
		for range max(joins, min(len(t.addrs), mostAddrs)) {
			c.rest(ctx)
			h.endPhones(c.held - 1)
			r := c.join(ctx, h, true)
			f.add(r)
			f.joins++
			if r.verdict != publicVerified {
				f.failed++
			}
			if r.other.stays(c.me) && c.state.waits.Load() {
				break // that is all that has to be known
			}
		}
	case at.verdict == publicSplit:
		for range follow {
			c.rest(ctx)
			h.endPhones(c.held - 1)
			switch r := c.join(ctx, h, false); {
			case r.verdict == publicVerified:
				f.add(outcome{verdict: publicSplit}) // the claim is over there, and this phone is here
			case r.verdict == publicSplit && r.other.id != at.other.id:
				f.add(r)
			}
		}
	}
	return at
}

// join is one phone more. Where the claim is here, its frame must come there and back.
func (c *publicCheck) join(ctx context.Context, h *household, here bool) outcome {
	phone, t, err := h.join(ctx)
	if phone != nil {
		h.phones = append(h.phones, phone)
	}
	switch r := c.reached(t, err); {
	case phone == nil, !here, h.claim == nil, r.verdict == publicSplit:
		return r
	case err == nil: // whatever became of the header: the frame was here
		return outcome{verdict: publicVerified}
	case r.verdict == publicVerified:
		return outcome{verdict: publicUnreachable, diagnosis: c.diagnose(t, err)}
	case h.misrouted(err):
		return outcome{verdict: publicSplit}
	default:
		return r
	}
}

// open dials with a nonce of its own.
func (c *publicCheck) open(ctx context.Context, role role, serverID string) (*wsPeer, *dialTrace, error) {
	nonce := c.keys.issue(serverID)
	peer, t, err := c.dialer.dial(ctx, role, serverID, nonce)
	t.nonce = c.keys.withdraw(nonce)
	return peer, t, err
}

// reached tells which relay got a request.
func (c *publicCheck) reached(t *dialTrace, err error) outcome {
	a := t.answer
	here := a.named && a.instance.id == c.me.id || !a.named && t.nonce // a proxy may take the header away
	switch {
	case a.code == 0, here && (a.code == http.StatusBadRequest || a.code == http.StatusUpgradeRequired):
		// Peers get no further: something on the way takes their headers away.
		return outcome{verdict: publicUnreachable, diagnosis: c.diagnose(t, err)}
	case here:
		return outcome{verdict: publicVerified}
	case a.named && (a.standing.drains || a.standing.waits && !c.state.waits.Load()):
		// No phone is lost there, only delayed.
		return outcome{verdict: publicUnreachable, diagnosis: diagnosis{
			"another relay, " + a.instance.id + ", answers as well and lets nobody in",
			"if this is no update, which ends by itself, stop that relay: it waits for this one to go, or is about to stop"}}
	case a.named:
		o := rival{identity: a.instance, asked: a.asked, told: a.told, theirs: a.standing, mine: c.standing()}
		o.mine.age -= time.Since(a.asked)
		if c.refusal != nil && o.stays(c.me) {
			c.refusal.Stop() // judge decides
		}
		return outcome{verdict: publicSplit, other: o}
	}
	if t.step == stepSession {
		err = fmt.Errorf("%s comes without %s: a relay of an older version, or a proxy that takes that header away",
			quote(a.status), instanceHeader)
	}
	return outcome{verdict: publicNotARelay, diagnosis: c.diagnose(t, err)}
}

// diagnose tells what is wrong and, where the name has several addresses, at which.
func (c *publicCheck) diagnose(t *dialTrace, err error) diagnosis {
	d := diagnose(c.dialer.base, t, err)
	if len(t.addrs) > 1 && t.remote != nil {
		d.what = t.remote.String() + ": " + d.what
	}
	return d
}

// rest is a pause of random length, so that of two relays that check at the same
// time behind a round robin each does not get just its own.
func (c *publicCheck) rest(ctx context.Context) {
	select {
	case <-time.After(c.upTo(c.pause)):
	case <-ctx.Done():
	}
}

// upTo is a random time of d at the most.
func (c *publicCheck) upTo(d time.Duration) time.Duration {
	if c.random != nil {
		return time.Duration(c.random.Int64N(int64(d) + 1))
	}
	return mrand.N(d + 1)
}

// ---- the verdict ----

// judge makes a verdict of a round. An error names the relay for which this one gives
// way. One round alone is no split: while a relay is replaced both answer for a moment.
// Nor is a split over with one round that does not see it, if it was not seen in others
// meanwhile. A round without a claim here is no sighting to be counted: a balancer that
// sticks by server-id may give this relay few of them.
func (c *publicCheck) judge(f roundResult, now time.Time) error {
	if c.state.waits.Load() {
		if o, why := f.stayer(c.me); o != nil {
			if c.seen == nil {
				c.log.Info("another relay serves the public name: users are refused (503) until that one is gone",
					"url", c.url, "other", o.id, "other_age", o.age(now), "why", why, "stops_after", c.pace.over)
			}
			return c.sight(f.others, now)
		}
		c.seen = nil
		c.admit()
	}
	was, saw, before := c.state.verdict(), f.verdict == publicSplit, c.suspected
	c.sightings = (c.sightings<<1 | uint32(boolToInt(saw && !f.none))) & (1<<splitWindow - 1)
	c.suspected = saw && was != publicSplit && !before
	switch {
	case c.suspected && bits.OnesCount32(c.sightings) < splitSightings:
		c.log.Info("another relay answered to the public name; checking again", "url", c.url, "other", names(f.others), "in", c.pace.again)
		c.sight(f.others, now)
		return nil
	case !saw && was == publicSplit && bits.TrailingZeros32(c.sightings) <= 2*longestGap(c.sightings):
		return nil
	case !saw && was == publicSplit:
		c.sightings = 0
	}
	c.state.unseen.Store(int64(len(f.unseen)))
	if f.verdict != was || f.verdict == publicVerified && !slices.Equal(f.unseen, c.unseen) {
		c.changed, c.unseen = now, f.unseen
		c.state.public.Store(uint32(f.verdict))
		c.report(f, now)
	}
	if !saw {
		c.seen = nil
		c.state.yields.Store(false)
		return nil
	}
	return c.sight(f.others, now)
}

// longestGap is the longest run of rounds without a sighting between two with one.
func longestGap(sightings uint32) (longest int) {
	for sightings >>= bits.TrailingZeros32(sightings); sightings > 1; {
		sightings >>= 1
		n := bits.TrailingZeros32(sightings)
		longest, sightings = max(longest, n), sightings>>n
	}
	return longest
}

// admit lets users in.
func (c *publicCheck) admit() {
	if c.state.waits.Swap(false) {
		c.log.Info("users are let in", "after", time.Since(c.began))
	}
}

// report logs a verdict that is new.
func (c *publicCheck) report(f roundResult, now time.Time) {
	found := []any{"url", c.url, "found", f.diagnosis.what, "remedy", f.diagnosis.remedy, "phones", f.joins, "failed", f.failed}
	switch {
	case f.verdict == publicVerified && len(f.unseen) > 0:
		c.log.Warn(fmt.Sprintf("public name verified at %d of %d addresses; %v can't be reached from here",
			f.addrs-len(f.unseen), f.addrs, f.unseen), "url", c.url, "phones", f.joins, "remedy", "run "+programName+" probe from where they can")
	case f.verdict == publicVerified:
		c.log.Info(nameVerifiedText, "url", c.url, "phones", f.joins)
	case f.verdict == publicSplit:
		next := "the other one stops if it has -public-url, too"
		if o, why := f.stayer(c.me); o != nil {
			next = fmt.Sprintf("this relay stops if that lasts for %v: %s", c.pace.over, why)
		}
		if c.bypass {
			next = bypassName + "=1: this relay goes on"
		}
		found = []any{"url", c.url, "other", names(f.others), "instance", c.me.id, "age", now.Sub(c.began), "next", next}
		if len(f.others) > 0 {
			found = append(found, "other_age", f.others[0].age(now))
		}
		c.log.Error("multi-instance deploy detected: another relay answers to the public name, "+
			"and a phone that lands on the wrong one gets 4404 although its binary is online: run exactly one", found...)
	case f.verdict == publicNotARelay:
		c.log.Warn("public name not verified: something that is not this relay answers", found...)
	case f.failed < f.joins:
		c.log.Warn("public name not verified: some of the connections through it fail", found...)
	default:
		c.log.Warn("public name not verified: this relay does not reach itself through it, and serves on; "+
			"behind a home router (hairpin NAT, split DNS) that is common, and no harm if peers do", found...)
	}
}

// names lists instances for the log.
func names(others []rival) string {
	if len(others) == 0 {
		return "a relay that does not say who it is, of an older version"
	}
	var all []string
	for _, o := range others {
		all = append(all, o.id)
	}
	return strings.Join(all, " ")
}

// ---- which of two relays stays ----

// rival is another relay as one of its answers shows it, beside this one at that
// moment.
type rival struct {
	identity
	asked  time.Time // the answer is from then or a little later
	told   bool      // it tells its standing, which older relays do not
	theirs standing
	mine   standing // when it was asked, so that its age is the least it can be
}

// sameAge is the difference between ages that two relays do not argue about.
const sameAge = time.Second

// prevails reports whether the other relay is the one to stay, and why. Both come to
// the same result, whatever their clocks say of the date: the one that lets users in
// stays, then the one with binaries of users, unless the ages alone are to count, then
// the one that has run for longer, then the smaller id. Of two that still refuse
// users it is the smaller id, since that leaves no doubt, and neither has any to lose.
func (o *rival) prevails(me identity, agesAlone bool) (stays bool, why string) {
	switch ahead := o.mine.age - o.theirs.age; {
	case !o.told: // it goes by the dates, so this one has to
		earlier := cmp.Or(o.started.Compare(me.started), cmp.Compare(o.id, me.id)) < 0
		return earlier, "it is of an older version, and started first by its clock"
	case o.theirs.waits != o.mine.waits:
		return o.mine.waits, "it lets users in, and this one does not yet"
	case o.theirs.waits:
		return o.id < me.id, "neither lets users in yet, and its id is the smaller one"
	case o.theirs.users != o.mine.users && !agesAlone:
		return o.theirs.users, "it holds binaries of users, and this one holds none"
	case ahead > sameAge || ahead < -sameAge:
		return ahead < 0, "it has run for longer"
	}
	return o.id < me.id, "both have run for the same time, and its id is the smaller one"
}

// stays reports whether there is another relay, and that is the one to stay.
func (o *rival) stays(me identity) bool {
	stays, _ := o.prevails(me, false)
	return o.id != "" && stays
}

// age is how long the other has run.
func (o *rival) age(now time.Time) time.Duration {
	if o.told {
		return o.theirs.age + now.Sub(o.asked)
	}
	return now.Sub(o.started)
}

// sight remembers others, and which of them this relay gives way to. The error, if
// it is time for one, names the oldest for which it was so often and long enough.
//
// Never do two leave for each other. A relay says in its answers that it yields
// for c.pace.over at least before it leaves, and what it leaves upon is an answer
// not older than half of that. So of two that are about to, one knows it of the
// other, and there only the greater id leaves. Nor do both stay: each takes its own
// age at the least, so in doubt both yield; and what changes meanwhile, which is
// where users' binaries are, counts for splitDoubts times c.pace.over only.
func (c *publicCheck) sight(others []rival, now time.Time) error {
	if c.seen == nil {
		c.seen = map[string]*observation{}
	}
	maps.DeleteFunc(c.seen, func(_ string, s *observation) bool { return now.Sub(s.met) > splitWindow*c.pace.every })
	enough := splitRounds
	if c.state.waits.Load() {
		enough = waitRounds
	}
	var stays *rival
	var why string
	for i := range others {
		o := &others[i]
		s := c.seen[o.id]
		if s == nil {
			s = &observation{since: now}
			c.seen[o.id] = s
		}
		s.met = now
		gives, reason := o.prevails(c.me, now.Sub(s.since) >= splitDoubts*c.pace.over)
		if o.theirs.yields {
			gives, reason = s.rounds > 0 && o.id < c.me.id, "each would give way to the other, and its id is the smaller one"
		}
		if !gives {
			s.rounds = 0
			continue
		}
		if s.rounds++; s.rounds == 1 {
			s.first = now
		}
		confirmed := s.rounds >= enough && o.asked.Sub(s.first) >= c.pace.over && now.Sub(o.asked) <= c.pace.over/2
		if confirmed && (stays == nil || o.age(now) > stays.age(now)) {
			stays, why = o, reason
		}
	}
	yields := false
	for _, s := range c.seen {
		yields = yields || s.rounds > 0 && !c.bypass
	}
	c.state.yields.Store(yields)
	if stays == nil || c.bypass {
		return nil
	}
	s := c.seen[stays.id]
	return fmt.Errorf("refusing to go on: multi-instance deploy detected: relay %s, up %s (since %s by its clock), "+
		"answers to %s as well, seen %d times within %v; each has a registry of its own, and "+lostPhone+": "+
		"this one (%s, up %s) stops, so that one goes on: %s; run exactly one behind that name, "+
		"or, for an emergency or a migration only, set %s=1",
		stays.id, formatAge(stays.age(now)), stays.started.Format(time.RFC3339), c.url, s.rounds, now.Sub(s.first).Round(time.Second),
		c.me.id, formatAge(now.Sub(c.began)), why, bypassName)
}
