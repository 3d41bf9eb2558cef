package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// What the relay tells its service manager, and what it gets from it.

// fakeManager is a service manager that hears what it is told.
type fakeManager struct {
	addr string // for NOTIFY_SOCKET
	told logBuffer
}

// startManager listens until the test's end. A name that begins with @ is in no file system.
func startManager(t *testing.T, addr string) *fakeManager {
	t.Helper()
	nc, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: addr, Net: "unixgram"})
	if err != nil {
		t.Skip("this system has no such sockets:", err)
	}
	m, done := &fakeManager{addr: addr}, make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 4096)
		for {
			n, err := nc.Read(b)
			if err != nil {
				return
			}
			fmt.Fprintf(&m.told, "%s\n\n", b[:n]) // a blank line behind each datagram
		}
	}()
	t.Cleanup(func() { nc.Close(); <-done })
	return m
}

// heard waits for a datagram, or lines of one.
func (m *fakeManager) heard(t *testing.T, lines string) {
	t.Helper()
	eventually(t, "the manager is told "+lines, func() bool { return strings.Contains(m.told.String(), lines) })
}

func (m *fakeManager) fed() int { return strings.Count(m.told.String(), "WATCHDOG=1\n") }

func TestManagerIsTold(t *testing.T) {
	t.Parallel()
	for _, addr := range []string{filepath.Join(t.TempDir(), "notify"), fmt.Sprintf("@pyrycode-test-%d", os.Getpid())} {
		t.Run(addr[:1], func(t *testing.T) {
			t.Parallel()
			m := startManager(t, addr)
			p := startProgram(t, []string{"NOTIFY_SOCKET=" + addr, "WATCHDOG_USEC=50000"}).listening()
			m.heard(t, "READY=1\nSTATUS=binaries: 0, phones: 0; all is well: "+onlyRelayText+"\n")
			b, ph := p.connect("/v2/server", binaryHeaders("s")), p.connect("/v2/client", phoneHeaders("s"))
			ph.greet(b)
			m.heard(t, "STATUS=binaries: 1, phones: 1; all is well: "+onlyRelayText+"\n")
			eventually(t, "the watchdog is fed again and again", func() bool { return m.fed() > 3 })
			p.signal(syscall.SIGTERM)
			m.heard(t, "STOPPING=1\n")
			ph.wantEnd(1001, "")
			b.wantEnd(1001, "")
			if code := p.exit(); code != exitStopped || strings.Count(m.told.String(), "READY=1\n") != 1 {
				t.Errorf("exit code %d, and the manager was told:\n%s", code, m.told.String())
			}
		})
	}
}

// A manager that is gone, or that speaks to another process, changes nothing.
func TestManagerThatIsNone(t *testing.T) {
	t.Parallel()
	m := startManager(t, filepath.Join(t.TempDir(), "notify"))
	for _, c := range []struct {
		env     []string
		warning bool
	}{
		{[]string{"NOTIFY_SOCKET=" + m.addr, "WATCHDOG_USEC=20000", "WATCHDOG_PID=1"}, false},
		{[]string{"NOTIFY_SOCKET=" + m.addr, "WATCHDOG_USEC=soon"}, false},
		{[]string{"WATCHDOG_USEC=20000", "LISTEN_PID=1", "LISTEN_FDS=1"}, false},
		{[]string{"NOTIFY_SOCKET=" + m.addr + ".gone", "WATCHDOG_USEC=20000"}, true},
		{[]string{"NOTIFY_SOCKET=vsock:2:1"}, true},
	} {
		p := startProgram(t, c.env).listening()
		p.sayGoodbye(syscall.SIGTERM)
		if n := strings.Count(p.stderr.String(), "does not take what it is told"); n > 1 || (n == 1) != c.warning {
			t.Errorf("%v: %d warnings in:\n%s", c.env, n, p.stderr.String())
		}
	}
	if m.fed() > 0 {
		t.Errorf("a watchdog that is none was fed:\n%s", m.told.String())
	}
}

func TestManagerHearsOfReload(t *testing.T) {
	t.Parallel()
	m := startManager(t, filepath.Join(t.TempDir(), "notify"))
	during := ""
	begun := monotonic() / 1000
	told := &manager{notify: m.addr}
	told.reload(func() {}) // at the start, of which it hears nothing
	told.ready.Store(true)
	told.reload(func() {
		m.heard(t, "\n") // what it is told of the beginning
		during = m.told.String()
	})
	m.heard(t, during+"READY=1\n")
	var at int64
	if n, err := fmt.Sscanf(during, "RELOADING=1\nMONOTONIC_USEC=%d\n", &at); n != 1 || at < begun || at > monotonic()/1000 {
		t.Errorf("a reload after %d began with %q, %v", begun, during, err)
	}
}

// The watchdog is fed for as long as all turns that must not hang, and again after
// that: an epoll loop, and the sweep, which every poller has.
func TestManagerWatchdog(t *testing.T) {
	t.Parallel()
	onEach(t, testOptions(), func(t *testing.T, r *testRelay) {
		m := startManager(t, filepath.Join(t.TempDir(), "notify"))
		leave := (&manager{notify: m.addr, watchdog: 20 * time.Millisecond, log: r.log}).keepInformed(r.relay)
		defer leave()
		_, ph, _ := r.pair("s")
		b := r.holder("s")
		looks := func() int { return m.fed() + strings.Count(r.logs.String(), "watchdog is not fed") }
		for what, hang := range map[string]*sync.Mutex{"the sweep": &b.mu, "a loop": &b.server.mu} {
			if _, ok := r.loop("s").(*goPoller); what == "a loop" && (ok || strings.Contains(t.Name(), "goroutines")) {
				continue // it has none
			}
			fed := m.fed()
			eventually(t, "the watchdog is fed", func() bool { return m.fed() > fed })
			func() {
				hang.Lock()
				defer hang.Unlock()
				if what == "a loop" {
					ph.text(`"for the loop to wait with"`)
				}
				eventually(t, "the watchdog of a relay in which "+what+" hangs is not fed", func() bool {
					fed, before := m.fed(), looks()
					eventually(t, "ten looks", func() bool { return looks() >= before+10 })
					return m.fed() == fed
				})
			}()
		}
		fed := m.fed()
		eventually(t, "the watchdog is fed again", func() bool { return m.fed() > fed })
	})
}

// startPassed starts the program with descriptors from 3 on.
func startPassed(t *testing.T, env []string, files []*os.File, args ...string) *program {
	t.Helper()
	cmd := shell("export LISTEN_PID=$$", args...)
	cmd.ExtraFiles = files
	return startCommand(t, cmd, append(env, fmt.Sprint("LISTEN_FDS=", len(files))))
}

// fileOf duplicates the descriptor of a socket until the test's end.
func fileOf(t *testing.T, socket any, err error) *os.File {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	f, err := socket.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		t.Skip("this system passes no sockets:", err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestManagerPassesSockets(t *testing.T) {
	t.Parallel()
	public, admin := onLoopback(t), onLoopback(t)
	files := []*os.File{fileOf(t, public, nil), fileOf(t, admin, nil)}
	for _, c := range []struct {
		names string
		files []*os.File
		args  string
		admin string // "" for another one
	}{
		{"listen:admin", files, "-listen 127.0.0.1:1 -admin off", admin.Addr().String()},
		{"pyrycode-relay.socket", files[:1], "", ""}, // what systemd calls it by itself
		{"", files[:1], "-admin off", "off"},
	} {
		p := startPassed(t, []string{"LISTEN_FDNAMES=" + c.names}, c.files, strings.Fields(c.args)...).listening()
		if p.addr != public.Addr().String() || c.admin != "" && p.admin != c.admin {
			t.Errorf("%s: it listens on %s and %s, want the sockets at %s and %s", c.names, p.addr, p.admin, public.Addr(), c.admin)
		}
		p.said(`msg="sockets of the service manager stand in for flags"`)
		p.sayGoodbye(syscall.SIGTERM)
	}
}

func TestManagerPassesWhatIsNoSocket(t *testing.T) {
	t.Parallel()
	ln := onLoopback(t)
	nc, err := net.Dial("tcp", ln.Addr().String())
	connection := fileOf(t, nc, err)
	packets, err := net.ListenPacket("udp", "127.0.0.1:0")
	datagram := fileOf(t, packets, err)
	local, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	unix := fileOf(t, local, err)
	plain, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	anywhere, err := net.Listen("tcp", ":0")
	everybody := fileOf(t, anywhere, err)
	good := fileOf(t, ln, nil)
	type refused struct {
		names string
		files []*os.File
		words string
	}
	cases := []refused{
		{"listen", []*os.File{datagram}, "want a TCP socket that listens"},
		{"listen", []*os.File{unix}, "want a TCP socket that listens"},
		{"listen", []*os.File{plain}, "want a TCP socket that listens"},
		{"listen:admin", []*os.File{good, plain}, `socket "admin" of the service manager: want a TCP socket that listens`},
		{"metrics", []*os.File{good}, `socket "metrics" of the service manager: want one with FileDescriptorName=listen`},
		{"listen:listen", []*os.File{good, everybody}, "want one with FileDescriptorName=listen"},
		{"admin", []*os.File{everybody}, "the service manager's socket for -admin: want a loopback address"},
	}
	own, err := newAcceptor(onLoopback(t))
	if err != nil {
		t.Fatal(err)
	}
	own.Close()
	if _, ok := own.(*net.TCPListener); !ok { // else the first Accept fails
		cases = append(cases, refused{"listen", []*os.File{connection}, `socket "listen" of the service manager: `})
	}
	for _, c := range cases {
		startPassed(t, []string{"LISTEN_FDNAMES=" + c.names}, c.files).wantRefusal(exitRefused, c.words)
	}
	startShell(t, []string{"LISTEN_FDS=many"}, "export LISTEN_PID=$$").wantRefusal(exitRefused, `"many"`, "LISTEN_FDS")
}

// While one process ends and the next one starts, what phones ask for waits in the
// socket that the service manager holds: none is refused.
func TestManagerKeepsSocketOverRestart(t *testing.T) {
	t.Parallel()
	ln := onLoopback(t)
	socket, lock := []*os.File{fileOf(t, ln, nil)}, freeLock(t)
	start := func() *program {
		return startPassed(t, nil, socket, "-instance-lock", lock, "-rate-per-minute", "0", "-max-phones", "256")
	}
	first := start().listening()
	b := first.connect("/v2/server", binaryHeaders("s"))
	const phones = 200
	var asked atomic.Int64 // phones, for the second process
	var wg sync.WaitGroup
	for range phones {
		ph := first.connect("/v2/client", phoneHeaders("s"))
		wg.Go(func() {
			before := ph.header.Get(instanceHeader)
			ph.wantEnd(1001, "shutting down")
			nc, err := net.Dial("tcp", first.addr)
			if asked.Add(1); err != nil {
				t.Error("refused:", err)
				return
			}
			defer nc.Close()
			again, resp, err := handshake(t, nc, "/v2/client", phoneHeaders("s"))
			if err != nil || again == nil || again.header.Get(instanceHeader) == before {
				t.Errorf("asking again: %v, %v", resp, err)
			}
		})
	}
	wg.Go(func() { b.wantEnd(1001, "") })
	first.stopCleanly()
	eventually(t, "every phone has asked again, where nobody answers", func() bool { return asked.Load() == phones })
	second := start().listening()
	wg.Wait()
	second.sayGoodbye(syscall.SIGTERM)
}

// ---- wake ----

// wakeTarget is a push service that remembers what it was sent, or is none.
func wakeTarget(t *testing.T, answer http.HandlerFunc) (base string, got func() []string) {
	t.Helper()
	var mu sync.Mutex
	var all []string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		dump, err := httputil.DumpRequest(q, true)
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		all = append(all, string(dump))
		mu.Unlock()
		answer(w, q)
	}))
	t.Cleanup(s.Close)
	return s.URL, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(all)
	}
}

func ok(http.ResponseWriter, *http.Request) {}

// startWaker starts one, with a log, that wakes through a URL.
func startWaker(t *testing.T, target string) (*waker, *logBuffer) {
	t.Helper()
	u, err := parseWakeURL(target)
	if err != nil || u.Host == "" {
		t.Fatalf("%s: %v, %v", target, u, err)
	}
	logs := new(logBuffer)
	m := newMetrics(identity{}, buildVersion{}, new(instanceState), new(budget))
	return newWaker(u, m, newLogger(logs, defaultOptions())), logs
}

// wakes are how many wakes had each outcome that there was.
func wakes(m *metrics) string {
	var all []string
	for o := range wakeOutcomeCount {
		if n := m.wakes[o].Load(); n > 0 {
			all = append(all, fmt.Sprint(o, " ", n))
		}
	}
	return strings.Join(all, ", ")
}

// Both services that the documents name read the same request: the message is ntfy's
// in the body and Gotify's in the query. Nothing in it tells who wants to wake whom,
// and the binary gets no answer.
func TestWakeSendsFixedText(t *testing.T) {
	t.Parallel()
	target, got := wakeTarget(t, ok)
	o := testOptions()
	o.wakeURL, _ = parseWakeURL("http://tom:pass@" + strings.TrimPrefix(target, "http://") + "/message?token=t1&title=Agent")
	onEach(t, o, func(t *testing.T, r *testRelay) {
		before := len(got())
		for _, id := range []string{"server-" + secret, "other-" + secret} {
			b, ph, connID := r.pair(id)
			for range 2 {
				b.text(`{"push_wake":{"token":"` + secret + `","auth":{"bearer":"` + secret + `"}}}`)
			}
			ph.text(`"next"`)
			if e := b.envelope(); e.ConnID != connID || string(e.Frame) != `"next"` {
				t.Errorf("behind a wake the binary got %+v", e)
			}
		}
		eventually(t, "two wakes", func() bool { return wakes(r.metrics) == "sent 2, limited 2" })
		for _, request := range got()[before:] {
			for _, want := range []string{
				"POST /message?message=Your+coding+agent+has+something+for+you.&title=Agent&token=t1 HTTP/1.1\r\n",
				"\r\nAuthorization: Basic dG9tOnBhc3M=\r\n", "\r\nContent-Type: text/plain; charset=utf-8\r\n",
				"\r\n\r\nYour coding agent has something for you.",
			} {
				if !strings.Contains(request, want) || strings.Contains(request, secret) {
					t.Errorf("a wake without %q, or with a secret:\n%s", want, request)
				}
			}
		}
		if n := r.metrics.drops[dropPushWake].Load(); n != 4 {
			t.Errorf("%d envelopes counted, want 4", n)
		}
	})
	if n := len(got()); n > 4 {
		t.Errorf("%d wakes were sent, want 4", n)
	}
}

// What bounds a wake, with a service that does not answer.
func TestWakeBounds(t *testing.T) {
	t.Parallel()
	silent := onLoopback(t) // nobody accepts
	k, logs := startWaker(t, "http://"+silent.Addr().String()+"/topic")
	k.client.Timeout = time.Hour
	minute := int64(time.Minute)
	k.wake("first", minute)
	for i := range 3 {
		k.wake("first", minute+int64(i)*minute/3)
	}
	for i := range wakeWorkers - 1 {
		k.wake(fmt.Sprint(i), minute)
	}
	eventually(t, "all workers wait", func() bool { return len(k.queue) == 0 })
	for i := range wakeQueue + 7 {
		k.wake(fmt.Sprint("more", i), minute)
	}
	if got := wakes(k.metrics); got != "limited 3, dropped 7" {
		t.Errorf("with a full queue: %s", got)
	}
	k.stop()
	if got, want := wakes(k.metrics), fmt.Sprintf("limited 3, dropped %d", 7+wakeWorkers+wakeQueue); got != want || logs.String() != "" {
		t.Errorf("after the end: %s, want %s; and said:\n%s", got, want, logs.String())
	}

	target, got := wakeTarget(t, ok)
	k, _ = startWaker(t, target)
	k.wake("first", minute)
	for i := range mostWoken + 3 { // slowly enough for the queue
		k.wake(fmt.Sprint(i), minute)
		eventually(t, "the queue is short", func() bool { return len(k.queue) < wakeQueue/2 })
	}
	eventually(t, "all are sent", func() bool { return len(got()) == mostWoken })
	k.wake("first", 2*minute)
	want := fmt.Sprintf("sent %d, limited 4", mostWoken+1)
	eventually(t, want, func() bool { return wakes(k.metrics) == want })
	k.stop()
}

// Whatever a push service does, a wake has an outcome, and the log its cause without
// what may be secret of the URL, which the service can repeat.
func TestWakeFailures(t *testing.T) {
	t.Parallel()
	elsewhere, strayed := wakeTarget(t, ok)
	endless := func(w http.ResponseWriter, _ *http.Request) {
		for {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}
	raw := func(answer string) string {
		return "http://" + serveRaw(t, nil, func(nc net.Conn) {
			b := make([]byte, 4096)
			n, _ := nc.Read(b)
			io.WriteString(nc, strings.ReplaceAll(answer, "REQUEST", string(b[:n])))
			nc.Close()
		})
	}
	served := func(h http.HandlerFunc) string { base, _ := wakeTarget(t, h); return base }
	silent := onLoopback(t)
	secure := httptest.NewUnstartedServer(http.HandlerFunc(ok))
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	t.Cleanup(secure.Close)
	for _, c := range []struct{ what, base, outcome, cause string }{
		{"endless", served(endless), "sent", ""},
		{"no content", served(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }), "sent", ""},
		{"wrong token", served(func(w http.ResponseWriter, q *http.Request) {
			http.Error(w, q.URL.String(), http.StatusUnauthorized)
		}), "refused", "answer 401"},
		{"moved", served(func(w http.ResponseWriter, q *http.Request) {
			http.Redirect(w, q, elsewhere, http.StatusTemporaryRedirect)
		}), "refused", "answer 307"},
		{"echo", raw("REQUEST"), "failed", "no answer in HTTP"},
		{"echo in a header", raw("HTTP/1.1 200 OK\r\nREQUEST: REQUEST\r\n\r\n"), "failed", "no answer in HTTP"},
		{"long head", raw("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 64<<10) + "\r\n\r\n"), "failed", ""},
		{"hangs up", raw(""), "failed", ""},
		{"nobody", "http://" + deadAddr(t), "failed", "connection refused"},
		{"silent", "http://" + silent.Addr().String(), "failed", "no answer within 5s"},
		{"no such name", "http://push.invalid", "failed", "push.invalid"},
		{"self-signed", secure.URL, "failed", "certificate"},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			k, logs := startWaker(t, c.base+"/"+secret+"?token="+secret)
			if k.client.Timeout = patience; c.what == "silent" {
				k.client.Timeout = wakeTime / 50
			}
			for i, want := range []int{1, 1, 2} { // warnings: the third is an hour later
				if i == 2 {
					k.mu.Lock()
					k.warned = k.warned.Add(-wakeWarnEvery)
					k.mu.Unlock()
				}
				k.wake(fmt.Sprint(i), int64(i))
				eventually(t, "an outcome", func() bool { return wakes(k.metrics) == fmt.Sprint(c.outcome, " ", i+1) })
				if c.outcome == "sent" {
					want = 0
				}
				said := logs.String()
				if strings.Count(said, "\n") != want || strings.Count(said, c.cause) < want || strings.Count(said, " host="+k.url.Host+" ") != want {
					t.Errorf("want %d lines with %q, and the host in:\n%s", want, c.cause, said)
				}
				if strings.Contains(said, secret) {
					t.Errorf("a secret is in the log:\n%s", said)
				}
			}
			k.stop()
		})
	}
	t.Cleanup(func() {
		if len(strayed()) > 0 {
			t.Error("a wake went to another host")
		}
	})
}
