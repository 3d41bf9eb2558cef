package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// What the relay tells the service manager that started it (sd_notify(3)), what it gets
// from it (sd_listen_fds(3)), and what it tells a push service.

// managerNames are the variables by which a service manager speaks to this process, and
// to none that this one starts.
var managerNames = []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}

// manager is the service manager. Without one every field is empty.
type manager struct {
	// Set at the start.
	notify   string                  // datagram socket; "" for one that wants to be told nothing
	watchdog time.Duration           // silence after which it ends this process; 0 for ever
	sockets  map[string]net.Listener // that it holds as well, by the flag that they stand in for
	log      *slog.Logger

	deaf  atomic.Bool // it did not take something, which is in the log
	ready atomic.Bool // it was told that the relay serves
}

const (
	// statusEvery is how old the counts in systemctl status may be.
	statusEvery = 5 * time.Second
	// tellTime is how long a manager may take to make room for a datagram.
	tellTime = time.Second
	// firstPassed is the descriptor of the first socket that a manager passes.
	firstPassed = 3
)

// newManager reads what a manager has told this process by its environment.
func newManager(env map[string]string, log *slog.Logger) (m *manager, err error) {
	m = &manager{notify: env["NOTIFY_SOCKET"], log: log}
	pid := strconv.Itoa(os.Getpid()) // a variable with another's was inherited
	if usec, err := strconv.ParseUint(env["WATCHDOG_USEC"], 10, 53); err == nil && cmp.Or(env["WATCHDOG_PID"], pid) == pid {
		m.watchdog = time.Duration(usec) * time.Microsecond
	}
	if env["LISTEN_PID"] == pid {
		m.sockets, err = passedSockets(env["LISTEN_FDS"], env["LISTEN_FDNAMES"])
	}
	return m, err
}

// passedSockets takes over the descriptors that the manager has passed. An error ends
// this process, and with it those that have been taken.
func passedSockets(count, names string) (map[string]net.Listener, error) {
	n, err := strconv.ParseUint(count, 10, 8)
	if err != nil {
		return nil, fmt.Errorf("invalid value %q for variable LISTEN_FDS: want the number of sockets", count)
	}
	sockets := map[string]net.Listener{}
	for i, name := range append(strings.Split(names, ":"), make([]string, n)...)[:n] {
		flag := name
		if name == "" || name == "unknown" || strings.HasSuffix(name, ".socket") { // systemd's, where the unit gives none
			flag = "listen"
		}
		f := os.NewFile(uintptr(firstPassed+i), name)
		ln, err := net.FileListener(f) // a duplicate, closed on exec
		f.Close()
		if _, ok := ln.(*net.TCPListener); err != nil || !ok {
			err = errNotListening
		} else if flag != "listen" && flag != "admin" || sockets[flag] != nil {
			err = errors.New("want one with FileDescriptorName=listen, and at most one with FileDescriptorName=admin")
		} else {
			sockets[flag], err = newAcceptor(ln)
		}
		if err != nil {
			return nil, fmt.Errorf("socket %q of the service manager: %w", name, err)
		}
	}
	return sockets, nil
}

var errNotListening = errors.New("want a TCP socket that listens: ListenStream= with a port, and not Accept=yes")

// replaceFlags puts the sockets' addresses in the place of the flags'.
func (m *manager) replaceFlags(o *options) error {
	var said []any
	for flag, addr := range map[string]*string{"listen": &o.listen, "admin": &o.admin} {
		if ln := m.sockets[flag]; ln != nil {
			said = append(said, "-"+flag, cmp.Or(*addr, "off"))
			*addr = ln.Addr().String()
		}
	}
	err := o.validate(func(flag string) string { return "the service manager's socket for -" + flag })
	if err == nil && said != nil {
		m.log.Info("sockets of the service manager stand in for flags", said...)
	}
	return err
}

// tell sends lines of the form NAME=value. One that nobody takes ends nothing.
func (m *manager) tell(lines ...string) {
	if m.notify == "" {
		return
	}
	nc, err := net.Dial("unixgram", m.notify) // each time, as sd_notify does: the manager may have been started again
	if err == nil {
		nc.SetWriteDeadline(time.Now().Add(tellTime))
		_, err = io.WriteString(nc, strings.Join(lines, "\n"))
		nc.Close()
	}
	if err != nil && !m.deaf.Swap(true) {
		m.log.Warn("the service manager does not take what it is told", "error", err)
	}
}

// keepInformed tells the manager that r serves, and goes on with counts and the watchdog
// until stop is called.
func (m *manager) keepInformed(r *relay) (stop func()) {
	if m.notify == "" {
		return func() {}
	}
	every := statusEvery
	if m.watchdog > 1 {
		every = min(every, m.watchdog/2) // sd_watchdog_enabled(3)
	}
	m.tell("READY=1", statusLine(r))
	m.ready.Store(true)
	r.turning()
	return repeat(every, nil, func(bool) {
		m.tell(statusLine(r))
		switch {
		case m.watchdog == 0:
		case r.turning():
			m.tell("WATCHDOG=1")
		default:
			m.log.Error("a loop of this relay hangs: the service manager's watchdog is not fed")
		}
	})
}

// statusLine is what the status page says at its top.
func statusLine(r *relay) string {
	s := r.status()
	return fmt.Sprintf("STATUS=binaries: %d, phones: %d; %s", s.Binaries, s.Phones, s.Summary)
}

// reload tells the manager of a reload, which do does, unless the relay only starts.
func (m *manager) reload(do func()) {
	if m.ready.Load() {
		m.tell("RELOADING=1", fmt.Sprint("MONOTONIC_USEC=", monotonic()/1000))
		defer m.tell("READY=1")
	}
	do()
}

// monotonic is CLOCK_MONOTONIC in nanoseconds, where a service manager asks for it.
var monotonic = func() int64 { return 0 }

// ---- wake ----

const (
	// What every wake says: a push service learns neither for whom nor why.
	wakeTitle = "pyrycode"
	wakeText  = "Your coding agent has something for you."

	// mostWoken is how many server-ids wake in a minute: a stranger may claim as many as
	// the rate of upgrades lets it.
	mostWoken = 256
	// wakeWorkers is how many wakes are under way, for wakeTime each at the most, and
	// wakeQueue how many more may wait: the last is sent or given up after 85 s.
	wakeWorkers = 4
	wakeTime    = 5 * time.Second
	wakeQueue   = 64
	// wakeWarnEvery is how often the log says that wakes fail.
	wakeWarnEvery = time.Hour
)

// waker asks a push service to wake phones. nil wakes nobody.
type waker struct {
	// Set at the start.
	url     *url.URL // with secrets: for requests only
	client  http.Client
	metrics *metrics
	log     *slog.Logger
	queue   chan struct{} // one wake is like another
	workers sync.WaitGroup
	quit    context.CancelFunc

	mu     sync.Mutex // guards what follows
	minute int64      // relay clock of the beginning of the minute of woken
	woken  map[string]bool
	warned time.Time
}

// newWaker starts the workers, which end with stop. Without a URL it returns nil.
func newWaker(u *url.URL, m *metrics, log *slog.Logger) *waker {
	if u == nil {
		return nil
	}
	k := &waker{metrics: m, log: log, queue: make(chan struct{}, wakeQueue), woken: map[string]bool{}}
	ctx, quit := context.WithCancel(context.Background())
	k.quit = quit
	k.client.Timeout = wakeTime
	k.client.Transport = &http.Transport{MaxResponseHeaderBytes: 16 << 10, DisableKeepAlives: true, Proxy: http.ProxyFromEnvironment}
	k.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	// ntfy reads the message in the body, Gotify in the query, and both the title there.
	full, q := *u, u.Query()
	q.Set("title", cmp.Or(q.Get("title"), wakeTitle))
	q.Set("message", wakeText)
	full.RawQuery = q.Encode()
	k.url = &full
	for range wakeWorkers {
		k.workers.Go(func() {
			for range k.queue {
				m.wakes[k.send(ctx)].Add(1)
			}
		})
	}
	return k
}

// wake has a server-id's phones woken, if they have not been in this minute. It never
// waits.
func (k *waker) wake(serverID string, now int64) {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if now-k.minute >= int64(time.Minute) {
		k.minute = now
		clear(k.woken)
	}
	if k.woken[serverID] || len(k.woken) == mostWoken {
		k.metrics.wakes[wakeLimited].Add(1)
		return
	}
	select {
	case k.queue <- struct{}{}:
		k.woken[serverID] = true
	default:
		k.metrics.wakes[wakeDropped].Add(1)
	}
}

// send makes one request. What the log gets of a failure is the URL's host, and the
// answer's status: an answer can repeat the rest of the URL.
func (k *waker) send(ctx context.Context) wakeOutcome {
	q := (&http.Request{
		Method: http.MethodPost, URL: k.url, Body: io.NopCloser(strings.NewReader(wakeText)), ContentLength: int64(len(wakeText)),
		Header: http.Header{"Content-Type": {"text/plain; charset=utf-8"}, "User-Agent": {programName}},
	}).WithContext(ctx)
	outcome, cause := wakeFailed, "no answer in HTTP"
	resp, err := k.client.Do(q)
	if err == nil {
		resp.Body.Close() // unread
		if outcome = wakeRefused; resp.StatusCode/100 == 2 {
			return wakeSent
		}
		cause = "answer " + strconv.Itoa(resp.StatusCode)
	} else if ctx.Err() != nil { // the relay stops
		return wakeDropped
	} else if late, ok := errors.AsType[net.Error](err); ok && late.Timeout() {
		cause = "no answer within " + wakeTime.String()
	} else if op, ok := errors.AsType[*net.OpError](err); ok {
		cause = op.Error()
	} else if bad, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		cause = bad.Error()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.warned.IsZero() || time.Since(k.warned) >= wakeWarnEvery {
		k.warned = time.Now()
		k.log.Warn("waking phones through -wake-url fails; the metric wakes_total counts the next ones", "host", k.url.Host, "cause", cause)
	}
	return outcome
}

// stop ends the workers. What waits is dropped, and so is what is under way.
func (k *waker) stop() {
	if k != nil {
		k.quit()
		close(k.queue)
		k.workers.Wait()
	}
}
