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
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], environment(os.Environ()), os.Stdout, os.Stderr))
}

// Exit codes.
const (
	exitStopped = 0 // asked to stop
	exitFailed  = 1 // failure while running
	exitRefused = 2 // refused to start, or to go on as the second instance
)

// run is the program, with env for its environment. It ends when ctx does, or by a signal.
func run(ctx context.Context, args []string, env map[string]string, stdout, stderr io.Writer) int {
	if len(args) > 0 {
		switch args[0] {
		case "version", "-version", "--version":
			fmt.Fprintln(stdout, readBuildVersion())
			return exitStopped
		case "help":
			writeUsage(stdout)
			return exitStopped
		case "probe":
			return runProbe(ctx, args[1:], stdout, stderr)
		}
	}
	o, err := parseOptions(args, env)
	if errors.Is(err, flag.ErrHelp) {
		writeUsage(stdout)
		return exitStopped
	}
	if err == nil {
		err = checkPlatform(o, env)
	}
	if err == nil {
		o.checkPace, err = paceFrom(env)
	}
	code := exitRefused
	if err == nil {
		signal.Ignore(syscall.SIGPIPE) // a log that nobody reads any more ends nothing
		w := newLogWriter(stderr, o.lostLine)
		code, err = serve(ctx, o, w)
		w.Close()
	}
	if err != nil {
		// One plain line and the last one, whatever the format of the log: who
		// reads it starts a relay by hand or looks for why a service won't start.
		fmt.Fprintf(stderr, "%s: refusing to start: %v\n", programName, err)
	}
	return code
}

// newLogger makes the logger of a relay.
func newLogger(w io.Writer, o options) *slog.Logger {
	h := &slog.HandlerOptions{Level: o.logLevel, ReplaceAttr: durationInMillis}
	if o.logFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, h))
	}
	return slog.New(slog.NewTextHandler(w, h))
}

// durationInMillis makes every duration in the log a number that has its unit in
// its name: slog's text has 7ms, which no program adds up, and its JSON 7000000.
func durationInMillis(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		return slog.Int64(a.Key+"_ms", a.Value.Duration().Round(time.Millisecond).Milliseconds())
	}
	return a
}

// lostLine makes the log's line about lines that are not in it.
func (o options) lostLine(lines int64) []byte {
	var b bytes.Buffer
	newLogger(&b, o).Warn("log lines lost: the log's reader was gone or too slow", "lines", lines)
	return b.Bytes()
}

// serve runs a relay from the instance lock to the end of the drain. An error is
// why it did not start; what goes wrong later is logged.
func serve(ctx context.Context, o options, w *logWriter) (code int, err error) {
	log := newLogger(w, o)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as nohup does, so that a closed terminal stops nothing
		signal.Notify(signals, syscall.SIGHUP)
	}
	defer signal.Stop(signals)

	id, build, state := newIdentity(time.Now().Add(o.checkPace.skew)), readBuildVersion(), new(instanceState)
	lock, err := holdInstance(o, log, state, lockInfo{
		Program: programName, PID: os.Getpid(), Version: build.version, Instance: id.id,
		Listen: o.listen, Admin: cmp.Or(o.admin, "off"), Started: id.started,
	})
	if err != nil {
		return exitRefused, err
	}
	if lock != nil {
		defer lock.Close()
	}
	warnFileLimit(o, log)
	warnMemory(o, log)
	defer limitMemory(o)()

	public, err := listen("-listen", o.listen)
	if err != nil {
		return exitFailed, err
	}
	defer public.Close()
	adminAddr := "off"
	var admin net.Listener
	if o.admin != "" {
		if admin, err = listen("-admin", o.admin); err != nil {
			return exitFailed, err
		}
		defer admin.Close()
		adminAddr = admin.Addr().String()
	}

	r, err := newRelay(o, id, build, state, new(probeKeys), log)
	if err != nil {
		return exitFailed, err
	}
	r.metrics.logLost = &w.lost
	failed := make(chan error, 2)
	addr := public.Addr().String()
	if lock != nil {
		lock.serving(r, addr, adminAddr)
	}
	doors := []door{serveHTTP(public, r, r, failed)}
	if admin != nil {
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", r.metrics)
		doors = append(doors, serveHTTP(admin, mux, r, failed))
	}
	log.Info("listening", "addr", addr, "admin", adminAddr, "version", build.version, "instance", id.id)
	if lock != nil && !o.bypass {
		log.Info("this is the only relay on this host; next: put a TLS proxy in front, and try it with: "+programName+" probe ws://"+addr, "lock", o.instanceLock)
	}

	check := startPublicCheck(o, r)
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
	check.stop()
	if stopped := stop(r, doors, signals, o.drain); !stopped {
		log.Error("stopped at once by a second signal")
		return exitFailed, nil
	}
	log.Info("stopped", "uptime", time.Duration(r.now()))
	return code, nil
}

// holdInstance takes the instance lock. With the bypass it takes it where it is
// free, so that others still see this relay, and warns instead of refusing.
func holdInstance(o options, log *slog.Logger, state *instanceState, info lockInfo) (*instanceLock, error) {
	lock, err := lockInstance(o.instanceLock, info)
	if !o.bypass {
		return lock, err
	}
	state.bypassed.Store(true)
	found := "no other relay on this host"
	var held *heldError
	switch {
	case errors.As(err, &held) && held.holder != nil:
		found = fmt.Sprintf("another relay on this host: pid %d, listening on %s", held.holder.PID, held.holder.Listen)
	case err != nil:
		found = err.Error()
	}
	log.Warn("SINGLE-INSTANCE CHECK BYPASSED by "+bypassName+"=1: with a second relay behind the same name, phones get 4404 although their binary is online, and no log says why; "+
		"for an emergency or a migration only: unset it as soon as that is over", "found", found)
	return lock, nil
}

// warnFileLimit says what happens where the system allows fewer files than
// connections.
func warnFileLimit(o options, log *slog.Logger) {
	const others = 64 // listeners, requests that are no session, the log
	if n, ok := fileLimit(); ok && n < uint64(o.maxConnections)+others {
		log.Warn("the file limit is below -max-connections: connections beyond it are not accepted until others leave; "+
			"raise it (ulimit -n, LimitNOFILE=) or lower -max-connections", "file_limit", n, "max_connections", o.maxConnections)
	}
}

func warnMemory(o options, log *slog.Logger) {
	if allowed, from, ok := memoryAllowed(""); ok {
		if text, attrs := memoryWarning(o, allowed, from); text != "" {
			log.Warn(text, attrs...)
		}
	}
}

// listen opens a flag's address.
func listen(flag, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // it would put a socket of its own before each connection's
	ln, err := lc.Listen(context.Background(), "tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%s %s is in use by another program: stop that, or choose another address", flag, addr)
	case err != nil:
		return nil, fmt.Errorf("opening %s %s: %w", flag, addr, err)
	}
	return newAcceptor(ln)
}

// door is a listener and who serves it: the drain shuts the one at its beginning
// and the other at its end.
type door struct {
	ln  net.Listener
	srv *http.Server
}

// serveHTTP serves h on ln for r, and reports an end that nobody asked for.
func serveHTTP(ln net.Listener, h http.Handler, r *relay, failed chan<- error) door {
	s := newServer(h, r)
	go func() {
		if err := s.Serve(guests{ln}); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			failed <- fmt.Errorf("serving %s: %w", ln.Addr(), err)
		}
	}()
	return door{ln, s}
}

// newServer bounds what strangers can make net/http hold; guests are its listener.
func newServer(h http.Handler, r *relay) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: greetTime,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    maxHeadBytes - 4<<10,
		ConnState:         limitIdle(&r.requests),
		ErrorLog:          slog.NewLogLogger(r.log.Handler(), slog.LevelDebug),
	}
}

// stop drains r: the listeners close first, then everybody is told. Until that is
// over, a load balancer that keeps a connection alive for its questions is
// answered 503. It reports false if a second signal came meanwhile.
func stop(r *relay, doors []door, signals <-chan os.Signal, deadline time.Duration) bool {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	r.beginDrain()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, d := range doors {
			d.ln.Close()
		}
		r.drain(ctx)
		for _, d := range doors {
			d.srv.Close()
		}
	}()
	select {
	case <-done:
		return true
	case <-signals:
		return false
	}
}
