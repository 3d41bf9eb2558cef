// Pyrycode-relay lets a phone reach a coding agent at home. Both dial out; the
// relay pairs them by server-id and moves their end-to-end encrypted frames.
//
// Run exactly one: the registry is in memory. See README.md and docs/.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const programName = "pyrycode-relay"

func main() {
	env := environment(os.Environ())
	for _, name := range managerNames {
		os.Unsetenv(name)
	}
	os.Exit(run(context.Background(), os.Args[1:], env, os.Stdout, os.Stderr))
}

// Exit codes.
const (
	exitStopped = 0 // asked to stop
	exitFailed  = 1 // failure while running
	exitRefused = 2 // refused to start, or to go on as the second instance
)

func exitCode(err error) int {
	if err != nil {
		return exitFailed
	}
	return exitStopped
}

// run is the program, with env for its environment. It ends when ctx does, or by a signal.
func run(ctx context.Context, args []string, env map[string]string, stdout, stderr io.Writer) int {
	if len(args) > 0 {
		switch args[0] {
		case "version", "-version", "--version":
			fmt.Fprintln(stdout, readBuildVersion())
			return exitStopped
		case "help":
			args = []string{"-h"}
		case "probe":
			return runProbe(ctx, args[1:], stdout, stderr)
		case "status", "health":
			return runAsk(ctx, args[0], args[1:], env, stdout, stderr)
		}
	}
	o, err := parseOptions(args, env)
	if errors.Is(err, flag.ErrHelp) {
		writeUsage(stdout)
		return exitStopped
	}
	code := exitRefused
	if err == nil {
		signal.Ignore(syscall.SIGPIPE) // a log whose reader is gone ends nothing
		w := &logWriter{out: stderr, lostLine: o.lostLine}
		code, err = serve(ctx, o, env, w)
		w.Close()
	}
	if err != nil {
		// The last line is plain, whatever the format of the log: it is for a person that
		// starts a relay by hand, or looks for why a service won't start.
		fmt.Fprintf(stderr, "%s: refusing to start: %v\n", programName, err)
	}
	return code
}

// serve runs a relay from the instance lock to the end of the drain. An error is
// why it did not start; what goes wrong later is logged.
func serve(ctx context.Context, o options, env map[string]string, w *logWriter) (code int, err error) {
	log := newLogger(w, o)
	manager, err := newManager(env, log)
	if err == nil {
		err = manager.replaceFlags(&o)
	}
	if err != nil {
		return exitRefused, err
	}
	state := new(instanceState)
	cert, err := openCertificate(o, keptLog{log, &state.tlsWarning})
	if err != nil {
		return exitRefused, err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	hangups := signals
	if cert != nil {
		hangups = make(chan os.Signal, 1)
		defer cert.watch(hangups, manager.reload)()
	}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup does, so that a closed terminal stops nothing
		signal.Notify(hangups, syscall.SIGHUP)
		defer signal.Stop(hangups)
	}
	defer signal.Stop(signals)
	open := func(flag, addr string) (net.Listener, error) {
		if ln := manager.sockets[flag]; ln != nil {
			return ln, nil
		}
		return listen("-"+flag, addr, openTCP, o.addressTimeout, func(after time.Duration) (ended bool) {
			select {
			case s := <-signals:
				log.Info("stopped before it could start", "signal", s.String())
			case <-ctx.Done():
			case <-time.After(after):
				return false
			}
			return true
		}, log)
	}

	id, build := newIdentity(time.Now().Add(o.checkPace.skew)), readBuildVersion()
	lock, err := holdInstance(o, log, state, newLockInfo(id, build.version, o.listen, cmp.Or(o.admin, "off")))
	if err != nil {
		return exitRefused, err
	}
	defer lock.Close()
	allowed, from := memoryAllowed("")
	warnFiles(o, fileLimit(), keptLog{log, &state.filesWarning})
	warnMemory(o, allowed, from, keptLog{log, &state.memoryWarning})
	defer debug.SetMemoryLimit(limitMemory(o, allowed))
	if cert != nil && env["GOGC"] == "" {
		// A handshake leaves as much garbage as a session keeps: with Go's 100 an idle
		// phone costs 16 KiB, with this 13.
		defer debug.SetGCPercent(debug.SetGCPercent(50))
	}

	public, err := open("listen", o.listen)
	if public == nil {
		return exitCode(err), err
	}
	defer public.Close()
	addr, adminAddr := public.Addr().String(), "off"
	var admin net.Listener
	if o.admin != "" {
		if admin, err = open("admin", o.admin); admin == nil {
			return exitCode(err), err
		}
		defer admin.Close()
		adminAddr = admin.Addr().String()
	}

	r, err := newRelay(o, id, build, state, new(probeKeys), log)
	if err != nil {
		return exitFailed, err
	}
	r.metrics.logLost = &w.lost
	lock.serving(r, addr, adminAddr)
	failed := make(chan error, 2)
	servers := []*httpServer{startHTTP(r.publicListener(public, cert), r, r, failed)}
	if admin != nil {
		servers = append(servers, startHTTP(admin, r.admin(), r, failed))
	}
	log.Info("listening", "addr", addr, "admin", adminAddr, "version", build.version, "instance", id.id)
	next := "put a TLS proxy in front, and try it with: " + programName + " probe ws://" + addr
	if host, port, _ := net.SplitHostPort(addr); cert != nil {
		next = "try it with: " + programName + " probe wss://" + net.JoinHostPort(cert.name(), port)
	} else if !loopback(host) {
		log.Warn("plain HTTP on an address that others reach: they could read who talks to whom; use -tls-cert and -tls-key, "+
			"or let nothing but a TLS proxy reach it", "addr", addr)
	}
	if !o.bypass {
		log.Info(onlyRelayText+"; next: "+next, "lock", strings.Join(o.instanceLock, ","))
	}

	check := newPublicCheck(o, r)
	check.start()
	leave := manager.keepInformed(r)
	select {
	case <-ctx.Done():
		log.Info("shutting down", "deadline", o.drain)
	case s := <-signals:
		log.Info("shutting down; a second signal stops at once", "signal", s.String(), "deadline", o.drain)
	case err := <-failed:
		log.Error("shutting down: " + err.Error())
		code = exitFailed
	case err := <-check.leave:
		log.Error(err.Error())
		code = exitRefused
	}
	manager.tell("STOPPING=1")
	check.stop()
	if stopped := stop(r, servers, signals, o.drain); !stopped {
		log.Error("stopped at once by a second signal")
		return exitFailed, nil
	}
	leave()
	log.Info("stopped", "uptime", time.Duration(r.now()))
	return code, nil
}

// holdInstance takes the instance lock. With the bypass it takes what is free of it,
// so that others still see this relay, and warns instead of refusing.
func holdInstance(o options, log *slog.Logger, state *instanceState, info lockInfo) (*instanceLock, error) {
	lock, err := lockInstance(o.instanceLock, info, o.bypass)
	if !o.bypass {
		return lock, err
	}
	state.bypassed.Store(true)
	found := "no other relay on this host"
	if held := (*heldError)(nil); errors.As(err, &held) && held.holder != nil {
		found = fmt.Sprintf("another relay %s: pid %d, listening on %s", held.where(), held.holder.PID, held.holder.Listen)
	} else if err != nil {
		found = err.Error()
	}
	keptLog{log, &state.hostWarning}.Warn("SINGLE-INSTANCE CHECK BYPASSED by "+bypassName+"=1: with a second relay behind the same name, "+
		"phones get 4404 although their binary is online, and no log says why; for an emergency or a migration only: "+
		"unset it as soon as that is over", "found", found)
	return lock, nil
}

// ---- the listeners, and the stop ----

// httpServer is a listener and what serves it.
type httpServer struct {
	httpListener
	server *http.Server
	shut   chan struct{} // nothing is accepted any more
}

// startHTTP serves h on ln for r, and reports an end other than by closing either.
func startHTTP(ln net.Listener, h http.Handler, r *relay, failed chan<- error) *httpServer {
	s := &httpServer{httpListener: httpListener{Listener: ln, log: r.log}, shut: make(chan struct{})}
	s.server = newServer(h, r, &s.httpListener)
	go func() {
		defer close(s.shut)
		if err := s.server.Serve(&s.httpListener); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			failed <- fmt.Errorf("serving %s: %w", ln.Addr(), err)
		}
	}()
	return s
}

// newServer bounds what strangers can make net/http hold. It is to serve what ln accepts.
func newServer(h http.Handler, r *relay, ln *httpListener) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: greetTime,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    maxHeadBytes - 4<<10,
		ConnState:         ln.track,
		ErrorLog:          slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
	}
}

// stop drains r: the listeners close first, then every peer is told. Until that is
// over, a load balancer that keeps a connection alive for its questions is
// answered 503. It reports false if a second signal came meanwhile.
func stop(r *relay, servers []*httpServer, signals <-chan os.Signal, deadline time.Duration) bool {
	end := time.Now().Add(deadline)
	r.draining.Store(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, s := range servers {
			s.Close()
			<-s.shut
		}
		r.drain(time.Until(end))
		// What was accepted last is answered, which Shutdown does not do; what waits in a
		// socket of the service manager is for the next process.
		for _, s := range servers {
			s.server.SetKeepAlivesEnabled(false)
		}
		finish(lingerTime, func() {
			for _, s := range servers {
				s.here.Wait()
			}
		})
		for _, s := range servers {
			s.server.Close()
		}
	}()
	select {
	case <-done:
		return true
	case <-signals:
		return false
	}
}

// finish waits for do to return, but not for longer than patience.
func finish(patience time.Duration, do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
	case <-time.After(patience):
	}
}

// ---- the version ----

// version is set by the linker for releases: -ldflags "-X main.version=v1.2.3".
var version string

// buildVersion is what this program was built from.
type buildVersion struct {
	version, revision, goVersion string
}

// readBuildVersion prefers the linker's value, then what the go command left.
var readBuildVersion = sync.OnceValue(func() buildVersion {
	v := buildVersion{version, "unknown", runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	v.version = cmp.Or(version, info.Main.Version, "(devel)")
	dirty := ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			v.revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+dirty"
		}
	}
	v.revision += dirty
	return v
})

func (v buildVersion) String() string {
	return fmt.Sprintf("%s %s, revision %s, %s", programName, v.version, v.revision, v.goVersion)
}

// ---- the log ----

// newLogger makes the logger of a relay.
func newLogger(w io.Writer, o options) *slog.Logger {
	h := &slog.HandlerOptions{Level: o.logLevel, ReplaceAttr: plainValue}
	if o.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, h))
	}
	return slog.New(slog.NewTextHandler(w, h))
}

// plainValue makes both formats of the log say the same. A duration is a number
// that has its unit in its name: slog's text has 7ms, which no program adds up,
// and its JSON 7000000. What has a word is that word.
func plainValue(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		return slog.Int64(a.Key+"_ms", a.Value.Duration().Round(time.Millisecond).Milliseconds())
	}
	if a.Value.Kind() == slog.KindAny {
		if word, ok := a.Value.Any().(fmt.Stringer); ok {
			a.Value = slog.StringValue(word.String())
		}
	}
	return a
}

// lostLine makes the log's line about lines that are not in it.
func (o options) lostLine(lines int64) []byte {
	var b bytes.Buffer
	newLogger(&b, o).Warn("log lines lost: the log's reader was gone or too slow", "lines", lines)
	return b.Bytes()
}

const (
	// maxLogBacklog is some 5,000 lines.
	maxLogBacklog = 1 << 20
	// logDelay is how long lines gather before they are written, so that a wave of
	// connections costs a few writes.
	logDelay = 5 * time.Millisecond
	// lastWords is how long the end of the program waits for the log's reader: a
	// stopped terminal must not keep a process that was told to stop.
	lastWords = time.Second
)

// logWriter stands between the logger and out, so that no connection waits for a
// terminal or a full pipe. Lines beyond its bound are lost, and so are those that
// out does not take because its reader is gone; it counts them, and tells how many.
type logWriter struct {
	out      io.Writer
	lostLine func(lines int64) []byte // makes the line that says how many are lost
	lost     atomic.Int64             // lines

	writing sync.Mutex // guards said and the order of writes; a flush holds it, Write never waits for it
	said    int64      // of lost

	mu    sync.Mutex // guards what follows; taken after writing
	lines []byte     // where there are any, a flush of them is due
}

// Write takes one line. It never blocks and never fails.
func (w *logWriter) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.lines)+len(line) > maxLogBacklog {
		w.lost.Add(1)
		return len(line), nil
	}
	if len(w.lines) == 0 {
		time.AfterFunc(logDelay, w.flush)
	}
	w.lines = append(w.lines, line...)
	return len(line), nil
}

// flush writes what has gathered, and behind it what of lost has not been said.
func (w *logWriter) flush() {
	w.writing.Lock()
	defer w.writing.Unlock()
	w.mu.Lock()
	lines, lost := w.lines, w.lost.Load()
	w.lines = nil
	w.mu.Unlock()
	if len(lines) == 0 { // Close was faster
		return
	}
	if n, err := w.out.Write(lines); err != nil {
		w.lost.Add(int64(bytes.Count(lines[n:], []byte("\n"))))
	} else if lost > w.said {
		if _, err := w.out.Write(w.lostLine(lost - w.said)); err == nil {
			w.said = lost
		}
	}
}

// Close writes what has gathered, unless nothing takes it within lastWords.
func (w *logWriter) Close() { finish(lastWords, w.flush) }

// ---- what the system allows ----

// fileLimit is how many descriptors this process may have (proc(5), limits), as
// far as the system tells. Go's runtime has raised it as far as it may by now.
func fileLimit() (n int64) {
	b, _ := os.ReadFile("/proc/self/limits")
	_, soft, _ := strings.Cut(string(b), "Max open files")
	if _, err := fmt.Sscan(soft, &n); err != nil {
		return math.MaxInt64
	}
	return n
}

// warnFiles says what happens where the system allows fewer files than connections.
func warnFiles(o options, allowed int64, log keptLog) {
	const others = 64 // listeners, requests that are no session, the log
	if allowed < int64(o.maxConnections)+others {
		log.Warn("the file limit is below -max-connections: connections beyond it are not accepted until others leave; "+
			"raise it (ulimit -n, LimitNOFILE=) or lower -max-connections", "file_limit", allowed, "max_connections", o.maxConnections)
	}
}

// memoryAllowed is how much memory this process may have, as far as the system
// tells: the machine's, or what its control group or one above allows. from is the
// file that says so. root is where the file system begins.
func memoryAllowed(root string) (n int64, from string) {
	n = math.MaxInt64
	least := func(file, format string, unit int64) {
		b, _ := os.ReadFile(root + file)
		var v int64
		// "max", and numbers beyond int64, are no limits.
		if _, err := fmt.Sscanf(string(b), format, &v); err == nil && v > 0 && v < n/unit {
			n, from = v*unit, file
		}
	}
	least("/proc/meminfo", "MemTotal: %d kB", 1<<10)     // proc_meminfo(5)
	groups, _ := os.ReadFile(root + "/proc/self/cgroup") // cgroups(7): number, controllers, path
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		mount, file := "/sys/fs/cgroup", "memory.max"
		switch {
		case len(f) == 3 && f[1] == "": // version 2
		case len(f) == 3 && slices.Contains(strings.Split(f[1], ","), "memory"):
			mount, file = mount+"/memory", "memory.limit_in_bytes"
		default:
			continue
		}
		// In a container the path can be the host's, of which only the root is there.
		for dir := path.Clean("/" + f[2]); ; dir = path.Dir(dir) {
			least(path.Join(mount, dir, file), "%d", 1)
			if dir == "/" {
				break
			}
		}
	}
	return n, from
}

// memoryNeeded is what the process stays under with o, whatever peers do.
func memoryNeeded(o options) int64 {
	const others = 64 << 20 // what net/http serves, the program, the log, garbage
	need := o.queueTotal + int64(o.maxConnections)*sessionCost + others
	if o.tlsCert != "" {
		need += int64(o.maxConnections+maxWaiting) * tlsCost
	}
	return need
}

// warnMemory says what happens where the process may have less memory than the
// options need, and which -queue-total would fit.
func warnMemory(o options, allowed int64, from string, log keptLog) {
	const risk = "the memory limit is below what the options need: the system may kill this relay; raise it"
	need := memoryNeeded(o)
	fits := o.queueTotal - (need - allowed)
	log.Logger = log.With("allowed", allowed, "by", from, "needed", need)
	switch {
	case allowed >= need:
	case fits < int64(o.queue):
		log.Warn(risk + ", or lower -queue-total, -queue and -max-connections")
	default:
		log.Warn(risk+" or lower -queue-total", "queue_total", o.queueTotal, "queue_total_that_fits", fits)
	}
}

// limitMemory makes Go collect in time to stay under what the options need and the
// system allows, and returns the limit before: left alone Go may come to twice the
// bytes that are buffered at the most, where they were freed in buffers of one size
// and are wanted in another. A limit that GOMEMLIMIT sets stays.
func limitMemory(o options, allowed int64) (old int64) {
	const program = 16 << 20 // its own pages, which Go's limit does not count
	if old = debug.SetMemoryLimit(-1); old == math.MaxInt64 {
		debug.SetMemoryLimit(min(memoryNeeded(o), max(allowed, 2*program)) - program)
	}
	return old
}
