package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// What the relay tells the service manager that started it (sd_notify(3)) and what it
// gets from it (sd_listen_fds(3)).

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

	deaf atomic.Bool // it did not take something, which is in the log
}

const (
	// statusEvery is how old the counts in systemctl status may be.
	statusEvery = 5 * time.Second
	// tellTime is how long a manager may take to make room for a line.
	tellTime = time.Second
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

// attend tells the manager that r serves, and goes on with counts and the watchdog
// until stop is called.
func (m *manager) attend(r *relay) (stop func()) {
	if m.notify == "" {
		return func() {}
	}
	status := statusLine(r)
	m.tell("READY=1", status)
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		refresh := time.NewTicker(statusEvery)
		defer refresh.Stop()
		var feed <-chan time.Time
		if m.watchdog > 1 {
			r.turning()
			t := time.NewTicker(m.watchdog / 2) // sd_watchdog_enabled(3)
			defer t.Stop()
			feed = t.C
		}
		for {
			select {
			case <-quit:
				return
			case <-refresh.C:
				if now := statusLine(r); now != status {
					status = now
					m.tell(status)
				}
			case <-feed:
				if r.turning() {
					m.tell("WATCHDOG=1")
				} else {
					m.log.Error("a loop of this relay hangs: the service manager's watchdog is not fed")
				}
			}
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// statusLine is what the status page says at its top.
func statusLine(r *relay) string {
	s := r.status()
	return fmt.Sprintf("STATUS=binaries: %d, phones: %d; %s", s.Binaries, s.Phones, s.Summary)
}

// reload tells the manager of a reload, which do does.
func (m *manager) reload(do func()) {
	m.tell("RELOADING=1", fmt.Sprint("MONOTONIC_USEC=", monotonic()/1000))
	do()
	m.tell("READY=1")
}

// monotonic is CLOCK_MONOTONIC in nanoseconds, where a service manager asks for it.
var monotonic = func() int64 { return 0 }

// ---- sockets ----

// firstPassed is the descriptor of the first socket that a manager passes.
const firstPassed = 3

// passedSockets takes over the descriptors that the manager has passed. An error ends
// this process, and with it those that have been taken.
func passedSockets(count, names string) (map[string]net.Listener, error) {
	n, err := strconv.ParseUint(count, 10, 8)
	if err != nil {
		return nil, fmt.Errorf("invalid value %q for variable LISTEN_FDS: want the number of sockets", count)
	}
	sockets, named := map[string]net.Listener{}, strings.Split(names, ":")
	for i := range int(n) {
		name := "unknown" // as sd_listen_fds_with_names(3) has it
		if i < len(named) {
			name = cmp.Or(named[i], name)
		}
		flag := name
		if name == "unknown" || strings.HasSuffix(name, ".socket") { // a unit's own name, where it gives none
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

// standIn puts the sockets' addresses in the place of the flags'.
func (m *manager) standIn(o *options) error {
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
