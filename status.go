package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"
)

// What the admin listener serves, and the commands that ask it: a page that shows
// at a glance whether the relay is well, and the same as JSON. It shows less than
// the log does: no address, and of a server-id its beginning.

//go:embed status.html
var statusPage []byte

// statusPolicy lets the page run the style and the script that are in it, by their
// hashes, and ask this relay. All else is refused (CSP Level 3, §2.3.1).
var statusPolicy = sync.OnceValue(func() string {
	hash := func(element string) string {
		_, text, _ := bytes.Cut(statusPage, []byte("<"+element+">"))
		text, _, _ = bytes.Cut(text, []byte("</"+element+">"))
		sum := sha256.Sum256(text)
		return element + "-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; "
	}
	return "default-src 'none'; " + hash("style") + hash("script") + "connect-src 'self'; img-src data:; " +
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
})

// admin is what the admin listener serves. It has /healthz and /readyz, too, for
// checks that must not depend on the TLS of the public listener.
func (r *relay) admin() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", r.metrics)
	mux.Handle("GET /healthz", r)
	mux.Handle("GET /readyz", r)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", statusPolicy())
		w.Write(statusPage)
	})
	mux.HandleFunc("GET /status.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(r.status())
	})
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Header().Set("Referrer-Policy", "no-referrer")
		mux.ServeHTTP(w, q)
	})
}

// statusReport is /status.json. What tiles of dashboards want is flat on top.
type statusReport struct {
	OK bool `json:"ok"` // none of Warnings is an error
	healthReport
	Summary        string             `json:"summary"` // in one sentence: all is well, or the worst of Warnings
	Warnings       []warning          `json:"warnings"`
	Expires        *time.Time         `json:"certificate_expires"` // nil without TLS
	HostCheck      string             `json:"host_check"`
	InGrace        int64              `json:"binaries_in_grace"`
	Connections    int                `json:"connections"`
	MaxConnections int                `json:"connections_limit"`
	Queued         int64              `json:"queued_bytes"`
	MaxQueued      int64              `json:"queued_bytes_limit"`
	Traffic        []traffic          `json:"traffic"`  // the oldest first, one for each sampleEvery
	Refusals       map[string]int64   `json:"refusals"` // by cause, since the start
	Closed         []closedConnection `json:"closed"`   // the latest first
}

// The log's texts where all is well.
const (
	onlyRelayText    = "this is the only relay on this host"
	nameVerifiedText = "public name verified: it leads to this relay and to no other"
)

func (r *relay) status() statusReport {
	m := r.metrics
	s := statusReport{
		healthReport: r.health(), HostCheck: "held", Warnings: r.warnings(), InGrace: m.binariesInGrace.Load(),
		Connections: r.connections(), MaxConnections: r.o.maxConnections,
		Queued: m.budget.used(), MaxQueued: m.budget.limit, Traffic: r.history.all(), Closed: r.ended.all(),
		Refusals: map[string]int64{},
	}
	slices.Reverse(s.Closed)
	if m.cert != nil {
		s.Expires = &m.cert.current.Load().Leaf.NotAfter
	}
	if r.instance.bypassed.Load() {
		s.HostCheck = "bypassed"
	}
	for leg := range roleCount {
		for u := upgradeAccepted + 1; u < upgradeOutcomeCount; u++ {
			s.Refusals[u.String()] += m.upgrades[leg][u].Load()
		}
		for _, c := range [...]closeReason{endNeverSeen, endLastHeld, endAlreadyClaimed, endTooManyPhones} {
			s.Refusals[c.String()] += m.closes[leg][c].Load()
		}
	}
	if refused := r.refusesAll(); refused != nil {
		s.Warnings = append(s.Warnings, warning{Level: slog.LevelError, Text: refused.text})
	} else if s.Connections >= s.MaxConnections {
		s.Warnings = append(s.Warnings, warning{Level: slog.LevelError, Text: refusedFull.text,
			Remedy: "raise -max-connections if they are yours, or limit connections in the proxy"})
	}
	slices.SortFunc(s.Warnings, func(a, b warning) int { return cmp.Or(cmp.Compare(b.Level, a.Level), cmp.Compare(a.Text, b.Text)) })
	s.OK = len(s.Warnings) == 0 || s.Warnings[0].Level < slog.LevelError
	s.Summary = "all is well: " + onlyRelayText
	if len(s.Warnings) > 0 {
		s.Summary = s.Warnings[0].Text
	} else if r.instance.verdict() == publicVerified {
		s.Summary += "; " + nameVerifiedText
	}
	return s
}

// ---- warnings that hold on ----

// warning is such a line.
type warning struct {
	Level  slog.Level `json:"level"`
	Text   string     `json:"text"`
	Found  string     `json:"found,omitempty"`
	Remedy string     `json:"remedy,omitempty"`
}

// keptLog is a log whose latest warning is kept, an error being one too, whatever
// -log-level is.
type keptLog struct {
	*slog.Logger
	kept *atomic.Pointer[warning]
}

func (l keptLog) Warn(text string, attrs ...any)  { l.warn(slog.LevelWarn, text, attrs...) }
func (l keptLog) Error(text string, attrs ...any) { l.warn(slog.LevelError, text, attrs...) }

// warn takes attrs in pairs.
func (l keptLog) warn(level slog.Level, text string, attrs ...any) {
	w := warning{Level: level, Text: text}
	for pair := range slices.Chunk(attrs, 2) {
		switch pair[0] {
		case "found":
			w.Found = fmt.Sprint(pair[1])
		case "remedy", "next":
			w.Remedy = fmt.Sprint(pair[1])
		}
	}
	l.kept.Store(&w)
	l.Log(context.Background(), level, text, attrs...)
}

// warnings are those that hold. What checks have found can be over, the rest needs another start.
func (r *relay) warnings() []warning {
	s := r.instance
	public, ids := s.verdict() >= publicSplit || s.unseen.Load() > 0, r.others.verdict(r.age()) != evidenceCount
	all := []warning{}
	for kept, holds := range map[*atomic.Pointer[warning]]bool{
		&s.hostWarning: true, &s.filesWarning: true, &s.memoryWarning: true, &s.publicWarning: public, &s.idsWarning: ids,
		&s.tlsWarning: true,
	} {
		if w := kept.Load(); w != nil && holds {
			all = append(all, *w)
		}
	}
	return all
}

// ---- what the page remembers ----

// recent keeps the latest of what is added.
type recent[T any] struct {
	most int // that are kept

	mu   sync.Mutex // guards what follows
	kept []T        // the oldest first
}

func (r *recent[T]) add(v T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.kept) == r.most {
		r.kept = r.kept[1:] // append moves the rest once in as many additions, not at each
	}
	r.kept = append(r.kept, v)
}

// all is what is kept, the oldest first, and never nil, which JSON has another word for.
func (r *recent[T]) all() []T {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]T{}, r.kept...)
}

const (
	// sampleEvery and samplesKept make the 15 minutes that the page draws.
	sampleEvery = 5 * time.Second
	samplesKept = 180
	// closedKept is how many ends of connections the page shows.
	closedKept = 200
)

// traffic is a number for frames up and down, and bytes up and down. Up is from phone to binary.
type traffic [4]float64

// traffic is what has been forwarded so far.
func (m *metrics) traffic() (all traffic) {
	for i, counter := range [...]*atomic.Int64{&m.framesUp, &m.framesDown, &m.bytesUp, &m.bytesDown} {
		all[i] = float64(counter.Load())
	}
	return all
}

// perSecond is the traffic since before.
func (t traffic) perSecond(before traffic, passed time.Duration) traffic {
	for i := range t {
		t[i] = math.Round((t[i]-before[i])/passed.Seconds()*10) / 10
	}
	return t
}

// closedConnection is the log's line about an end.
type closedConnection struct {
	Ended     time.Time `json:"ended"`
	Leg       string    `json:"leg"`
	Server    string    `json:"server"` // its beginning; empty where the relay refused the connection
	Duration  int64     `json:"duration_ms"`
	FramesIn  uint32    `json:"frames_in"`
	BytesIn   uint64    `json:"bytes_in"`
	FramesOut uint32    `json:"frames_out"`
	BytesOut  uint64    `json:"bytes_out"`
	Code      uint16    `json:"code"`
	Reason    string    `json:"reason"`
}

// shortID is enough of a server-id to tell a household's few apart, and not enough to claim it.
func shortID(id string) string { return id[:min(8, len(id)/2)] + "…" }

// ---- the commands that ask a running relay ----

// runAsk is the health command, and the status command. Both read flags and variables
// as the relay does, so that what is right for it is right for them.
func runAsk(ctx context.Context, name string, args []string, env map[string]string, stdout, stderr io.Writer) int {
	const every = 2 * time.Second // with -watch
	path, watch := "/healthz", false
	if name == "status" {
		path, watch = "/status.json", slices.Contains(args, "-watch")
		args = slices.DeleteFunc(slices.Clone(args), func(arg string) bool { return arg == "-watch" })
	}
	o, err := parseOptions(append([]string{"-admin-any"}, args...), env) // the relay may be on another machine
	if errors.Is(err, flag.ErrHelp) {
		writeUsage(stdout)
		return exitStopped
	} else if err == nil && o.admin == "" {
		err = errors.New("-admin is off, and nothing else tells how the relay is: start it with an address, such as 127.0.0.1:8081")
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s %s: %v\n", programName, name, err)
		return exitFailed // not 2, which Docker reserves
	}
	for {
		var s statusReport
		err := ask(ctx, o.admin, path, &s)
		if watch {
			fmt.Fprint(stdout, "\x1b[H\x1b[J") // home, and clear from there (ECMA-48)
		}
		switch {
		case err != nil:
			fmt.Fprintf(stderr, "%s %s: %v\n", programName, name, err)
		case name == "health":
			s.OK = s.Status == "ok"
			fmt.Fprintln(stdout, s.line())
		default:
			s.write(stdout)
		}
		if !watch && s.OK {
			return exitStopped
		} else if !watch {
			return exitFailed
		}
		select {
		case <-ctx.Done():
			return exitStopped
		case <-time.After(every):
		}
	}
}

// ask gets a JSON page of the relay's. It uses no proxy of the environment.
func ask(ctx context.Context, addr, path string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	q := http.Request{URL: &url.URL{Scheme: "http", Host: addr, Path: path}, Header: http.Header{}}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(q.WithContext(ctx))
	if err == nil {
		defer resp.Body.Close()
		err = json.NewDecoder(io.LimitReader(resp.Body, maxHeard)).Decode(into)
		if resp.StatusCode != http.StatusOK {
			err = errors.New("it says " + quote(resp.Status))
		}
	}
	if err != nil {
		return fmt.Errorf("no relay answers on %s (%s): see whether it runs (systemctl status pyrycode-relay, docker ps), "+
			"and give the -admin that it is started with", addr, printable(err.Error()))
	}
	return nil
}

// line is the relay in one line.
func (h *healthReport) line() string {
	return printable(fmt.Sprintf("%s: %s %s, up %s, binaries %d, phones %d, public name %s",
		h.Status, programName, h.Version, formatAge(time.Duration(h.Uptime)*time.Second), h.Binaries, h.Phones, h.Check))
}

// write shows what the page does, as far as the height of a terminal goes.
func (s *statusReport) write(out io.Writer) {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(cells ...string) {
		for i, cell := range cells {
			cells[i] = printable(cell)
		}
		fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	fmt.Fprintf(t, "%s\n\n", printable(s.Summary))
	for _, w := range s.Warnings {
		for _, cells := range [...][]string{{strings.ToLower(w.Level.String()), w.Text}, {"found", w.Found}, {"remedy", w.Remedy}} {
			if cells[1] != "" {
				row(cells...)
			}
		}
	}
	row("relay", s.line())
	row("instance", s.Instance+", host lock "+s.HostCheck)
	row("connections", fmt.Sprintf("%d of %d, binaries in grace %d", s.Connections, s.MaxConnections, s.InGrace))
	row("queues", formatSize(float64(s.Queued))+" of "+formatSize(float64(s.MaxQueued)))
	now := append([]traffic{{}}, s.Traffic...)[len(s.Traffic)]
	row("up", fmt.Sprintf("%.4g frames/s, %s/s", now[0], formatSize(now[2])))
	row("down", fmt.Sprintf("%.4g frames/s, %s/s", now[1], formatSize(now[3])))
	for _, cause := range slices.Sorted(maps.Keys(s.Refusals)) {
		if n := s.Refusals[cause]; n > 0 {
			row("refused", fmt.Sprintf("%d: %s", n, cause))
		}
	}
	t.Flush()
	fmt.Fprintln(t)
	row("ended", "leg", "server", "lasted", "frames", "bytes", "code", "reason")
	for _, c := range s.Closed[:min(12, len(s.Closed))] {
		row(c.Ended.Local().Format(time.TimeOnly), c.Leg, c.Server, formatAge(time.Duration(c.Duration)*time.Millisecond),
			fmt.Sprintf("%d/%d", c.FramesIn, c.FramesOut), formatSize(float64(c.BytesIn))+"/"+formatSize(float64(c.BytesOut)),
			fmt.Sprint(c.Code), c.Reason)
	}
	t.Flush()
}

// formatSize is a number of bytes as a person reads it.
func formatSize(n float64) string {
	unit := 0
	for ; n >= 1000 && unit < 4; unit++ {
		n /= 1024
	}
	return fmt.Sprintf("%.3g %s", n, [...]string{"B", "KiB", "MiB", "GiB", "TiB"}[unit])
}
