package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// The probe command: what the relay asks of its own public name, asked by a
// person from any machine. It goes the way of a binary and of phones and says
// of each step whether it works and, if not, what to do. Its client, and what a
// failure means, serve the check of the public name as well (selfcheck.go).

const (
	// probeConnections are half of the -rate-burst of one address: the rest is for
	// the other phones of a household, or for a second probe.
	probeConnections = 10
	roundTrips       = 20
	// largeFrame is what apps send at the most, rounded up.
	largeFrame = 200 << 10
	// renewalShare of its life before its end a certificate should have been
	// renewed: what renews them does it there, of six days as of ninety.
	renewalShare = 3
	// maxRateWait is the longest Retry-After that is waited for.
	maxRateWait = 2 * time.Minute

	// stepTime bounds each step of a dial, a write, and the wait for an answer.
	stepTime = 10 * time.Second
	// addrTime bounds one of several addresses: the next may be reachable.
	addrTime = 4 * time.Second
	// byeTime is how long the close handshake may take.
	byeTime = 2 * time.Second
	// maxHeard is the largest message taken, the daemon's own limit.
	maxHeard = 1 << 20
	// maxHead is far more than the head of an answer has.
	maxHead = 64 << 10
	// maxRefusal is how much of a refusal's body is looked at.
	maxRefusal = 512
)

// probe is one run of the command.
type probe struct {
	// Set at the start.
	dialer   dialer
	n        int           // connections
	idle     time.Duration // 0: not tried
	out      io.Writer
	progress io.Writer
	live     bool // progress is a terminal: its last line is overwritten
	json     bool

	report probeReport
	silent int // answers without an instanceHeader
}

// probeReport is the output of probe -json.
type probeReport struct {
	URL                string          `json:"url"`
	OK                 bool            `json:"ok"`
	Steps              []probeStep     `json:"steps"`
	CertificateExpires *time.Time      `json:"certificate_expires,omitempty"`
	RoundTrip          *roundTripTimes `json:"round_trip_ms,omitempty"`
	Instances          []probeInstance `json:"instances"`
}

// probeStep is the verdict on one step.
type probeStep struct {
	Name    string      `json:"step"`
	Verdict stepVerdict `json:"verdict"`
	Detail  string      `json:"detail"`
	Remedy  string      `json:"remedy,omitempty"`
}

type stepVerdict string

const (
	stepOK      stepVerdict = "ok"
	stepWarn    stepVerdict = "warn" // works, and should be better
	stepFail    stepVerdict = "fail"
	stepSkipped stepVerdict = "skipped"
)

type roundTripTimes struct {
	Min    float64 `json:"min"`
	Median float64 `json:"median"`
	Max    float64 `json:"max"`
}

// probeInstance is a relay that answered.
type probeInstance struct {
	ID          string    `json:"instance"`
	Started     time.Time `json:"started"`
	Connections int       `json:"connections"`
	since       time.Time // its start by this machine's clock
}

// runProbe is the probe command.
func runProbe(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	p := probe{out: stdout, progress: stderr, live: isTerminal(stderr)}
	fs := flag.NewFlagSet("probe", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	add(fs, "n", &p.n, probeConnections, number(2, 1000),
		"`connections`, one claim and the rest phones; everybody behind one address shares the relay's rate limit, 20 at once by default")
	add(fs, "idle", &p.idle, time.Duration(0), duration(0, time.Hour),
		"`duration` of silence that the path has to survive; 0s leaves that out")
	add(fs, "json", &p.json, false, parseBool, "one JSON object instead of text")
	target, err := parseProbe(fs, args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, "%s probe [flags] URL\n\nChecks a relay from outside, as wss://relay.example.com. Exit code 0: it works.\n"+
			"1: it does not, and the step that failed says what to do. 2: wrong use.\n\n", programName)
		fs.SetOutput(stdout)
		fs.PrintDefaults()
		return exitStopped
	}
	if err == nil {
		p.dialer.base, err = parseProbeURL(target)
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v; probe -h tells more\n", programName, err)
		return exitRefused
	}
	if !p.run(ctx) {
		return exitFailed
	}
	return exitStopped
}

// parseProbe takes flags before and behind the URL.
func parseProbe(fs *flag.FlagSet, args []string) (target string, err error) {
	for err = fs.Parse(args); err == nil && fs.NArg() > 0; err = fs.Parse(fs.Args()[1:]) {
		if target != "" {
			return "", fmt.Errorf("probe takes one URL, and %q is one more", fs.Arg(0))
		}
		target = fs.Arg(0)
	}
	if err == nil && target == "" {
		err = errors.New("probe wants the URL of a relay, such as wss://relay.example.com")
	}
	return target, err
}

// parseProbeURL forgives what people paste.
func parseProbeURL(s string) (*url.URL, error) {
	switch scheme, rest, ok := strings.Cut(s, "://"); {
	case !ok:
		s = "wss://" + s
	case scheme == "https":
		s = "wss://" + rest
	case scheme == "http":
		s = "ws://" + rest
	}
	u, err := parseRelayURL(s)
	if err != nil {
		return nil, fmt.Errorf("invalid URL %q: %w", s, err)
	}
	return u, nil
}

// run probes, and reports whether all is well.
func (p *probe) run(ctx context.Context) bool {
	p.report = probeReport{URL: p.dialer.base.String(), Instances: []probeInstance{}} // a list, for scripts
	if !p.json {
		fmt.Fprintf(p.out, "%s, %d connections\n\n", p.report.URL, p.n)
	}
	p.steps(ctx)
	p.report.OK = !slices.ContainsFunc(p.report.Steps, func(s probeStep) bool { return s.Verdict == stepFail })
	p.clearProgress()
	switch {
	case p.json:
		e := json.NewEncoder(p.out)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		e.Encode(p.report)
	case p.report.OK:
		fmt.Fprintln(p.out, "\nThis relay works from here.")
	default:
		fmt.Fprintln(p.out, "\nThis relay does not work from here: see FAIL above, and the arrow under it.")
	}
	return p.report.OK
}

// ---- the steps, in their order on the way ----

func (p *probe) steps(ctx context.Context) {
	h := &household{id: probePrefix + rand.Text(), open: p.open}
	p.showProgress("opening a connection")
	t, err := h.hold(ctx)
	defer h.close()
	if p.path(t, err); t.step < stepSession {
		return
	}
	if err != nil {
		p.fail("claim", diagnoseEnd(err))
		return
	}
	p.pass("claim", "a binary's claim of the server-id "+h.id+" is taken")
	p.countInstance(t)
	phone := p.joinPhones(ctx, h, t)
	if phone != nil {
		defer phone.close()
		p.measure(phone)
		p.sendLarge(phone)
	}
	p.instances()
	if phone != nil {
		p.stayIdle(ctx, h.claim, phone)
	}
}

// open dials, and waits where the relay's rate limit says so.
func (p *probe) open(ctx context.Context, role role, serverID string) (*wsPeer, *dialTrace, error) {
	for {
		peer, t, err := p.dialer.dial(ctx, role, serverID, "")
		if t.answer.code != http.StatusTooManyRequests {
			return peer, t, err
		}
		s, _ := strconv.Atoi(t.answer.header.Get("Retry-After"))
		wait := time.Duration(s) * time.Second
		if wait <= 0 || wait > maxRateWait {
			return peer, t, err
		}
		p.note(fmt.Sprintf("the relay lets only so many connections in from one address: waiting %v for the next", wait))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return peer, t, err
		}
	}
}

// path shows how far the first connection came, step by step.
func (p *probe) path(t *dialTrace, err error) {
	host := p.dialer.base.Hostname()
	addr, _ := netip.ParseAddr(host)
	for step := stepDNS; step < stepSession; step++ {
		took := formatAge(t.took[step])
		switch {
		case step == stepTLS && p.dialer.base.Scheme == "ws":
			p.add(probeStep{step.String(), stepSkipped, "ws:// has none: put a TLS proxy in front before others use it", ""})
		case step == t.step:
			p.fail(step.String(), diagnose(p.dialer.base, t, err))
			return
		case step == stepDNS && addr.IsValid():
			p.pass("dns", host+" is an address")
		case step == stepDNS:
			all := strings.Trim(fmt.Sprint(t.addrs), "[]")
			p.pass("dns", fmt.Sprintf("%s is %s (%s)", host, strings.ReplaceAll(all, " ", ", "), took))
		case step == stepTCP:
			p.pass("tcp", fmt.Sprintf("connected to %s in %s", t.remote, took))
		case step == stepTLS:
			p.certificate(t.tls, took)
		case step == stepUpgrade:
			p.pass("upgrade", fmt.Sprintf("%s (%s)", quote(t.answer.status), took))
		}
	}
	// The 101 proves that the headers of the request have arrived.
	header := strings.ToLower(instanceHeader)
	if t.answer.named {
		p.pass("headers", "x-pyrycode-server, x-pyrycode-version and user-agent arrive, "+header+" comes back")
		return
	}
	p.add(probeStep{"headers", stepWarn, "the answer lacks " + header + ": who answers can't be told",
		"let the proxy pass the relay's answer headers on; a relay of an older version does not send this one: update it"})
}

// certificate tells when the chain's first certificate ends.
func (p *probe) certificate(state *tls.ConnectionState, took string) {
	c := slices.MinFunc(state.VerifiedChains[0], func(a, b *x509.Certificate) int { return a.NotAfter.Compare(b.NotAfter) })
	end, left := c.NotAfter, time.Until(c.NotAfter)
	p.report.CertificateExpires = &end
	detail := fmt.Sprintf("%s, certificate good until %s, for %s (%s)", tls.VersionName(state.Version), formatDay(end), formatAge(left), took)
	s := probeStep{"tls", stepOK, detail, ""}
	if left < end.Sub(c.NotBefore)/renewalShare {
		s.Verdict, s.Remedy = stepWarn, "renew the certificate now, and find out why that did not happen by itself"
	}
	p.add(s)
}

// countInstance counts the relay that answered, if one did.
func (p *probe) countInstance(t *dialTrace) {
	if !t.answer.named {
		if t.answer.code != 0 {
			p.silent++
		}
		return
	}
	met := t.answer.instance
	i := slices.IndexFunc(p.report.Instances, func(m probeInstance) bool { return m.ID == met.id })
	if i < 0 {
		i = len(p.report.Instances)
		p.report.Instances = append(p.report.Instances, probeInstance{ID: met.id, Started: met.started})
	}
	m := &p.report.Instances[i]
	m.Connections++
	m.since = met.started
	if t.answer.told {
		m.since = t.answer.asked.Add(-t.answer.standing.age) // whatever the clocks of both say
	}
}

// joinPhones opens the phones, one after the other. The first that gets in stays.
func (p *probe) joinPhones(ctx context.Context, h *household, claim *dialTrace) (kept *wsPeer) {
	var lost error
	var broken diagnosis
	joined, misrouted, failed := 0, 0, 0
	for i := 0; i < p.n-1 && ctx.Err() == nil; i++ {
		p.showProgress(fmt.Sprintf("connection %d of %d", i+2, p.n))
		phone, t, err := h.join(ctx)
		p.countInstance(t)
		switch {
		case err == nil:
			joined++
		case h.misrouted(err), t.answer.named && t.answer.instance.id != claim.answer.instance.id:
			misrouted++
			lost = err
		default:
			failed++
			broken = cmp.Or(broken, diagnose(p.dialer.base, t, err))
		}
		switch {
		case err == nil && kept == nil:
			kept = phone
		case phone != nil:
			phone.close()
		}
	}
	phones := fmt.Sprintf("%d of %d phones reached the binary", joined, p.n-1)
	switch {
	case misrouted > 0:
		p.fail("join", diagnosis{fmt.Sprintf("%s; %d did not, although it is there (%v)", phones, misrouted, lost),
			"run exactly one relay behind this name: those phones came to another one"})
	case failed > 0:
		p.fail("join", diagnosis{phones + "; the first that did not: " + broken.what, broken.remedy})
	default:
		p.pass("join", phones)
	}
	return kept
}

// measure times small frames from phone to binary and back.
func (p *probe) measure(phone *wsPeer) {
	p.showProgress("measuring the round trip")
	var took []time.Duration
	for i := range roundTrips {
		began := time.Now()
		if err := phone.roundTrip(fmt.Appendf(nil, `{"probe":%d}`, i)); err != nil {
			p.fail("round trip", diagnoseEnd(err))
			return
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	low, middle, high := took[0], took[len(took)/2], took[len(took)-1]
	p.report.RoundTrip = &roundTripTimes{millis(low), millis(middle), millis(high)}
	p.pass("round trip", fmt.Sprintf("phone to binary and back: min %s, median %s, max %s of %d",
		formatAge(low), formatAge(middle), formatAge(high), roundTrips))
}

// sendLarge sends what is more than any buffer of a proxy, both ways.
func (p *probe) sendLarge(phone *wsPeer) {
	noise := make([]byte, largeFrame/2-1)
	rand.Read(noise)
	p.showProgress("sending 200 KiB")
	began := time.Now()
	if err := phone.roundTrip(fmt.Appendf(nil, `"%x"`, noise)); err != nil {
		d := diagnoseEnd(err)
		p.fail("large frame", diagnosis{"200 KiB: " + d.what,
			"raise what limits messages in the proxy, and -max-frame if it is under 262144; " + d.remedy})
		return
	}
	p.pass("large frame", "200 KiB there and back in "+formatAge(time.Since(began)))
}

// instances tells which relays answered, the oldest first.
func (p *probe) instances() {
	met := p.report.Instances
	slices.SortFunc(met, func(a, b probeInstance) int { return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.ID, b.ID)) })
	total := p.silent
	for _, m := range met {
		total += m.Connections
	}
	var each []string
	for _, m := range met {
		each = append(each, fmt.Sprintf("%d of %d connections reached %s, up %s", m.Connections, total, m.ID, formatAge(time.Since(m.since))))
	}
	if p.silent > 0 {
		each = append(each, fmt.Sprintf("%d of %d something that does not say who it is", p.silent, total))
	}
	detail := strings.Join(each, "; ")
	switch {
	case len(met) > 1:
		p.fail("instances", diagnosis{detail,
			"stop all but one of these relays (/healthz shows each one's id): they do not know of each other's binaries, so phones get 4404"})
	case len(met) == 1 && p.silent > 0:
		p.fail("instances", diagnosis{detail, "find what else answers to this name, and take it away"})
	case len(met) == 0:
		p.add(probeStep{"instances", stepWarn, detail, "see the step headers"})
	default:
		p.pass("instances", detail)
	}
}

// stayIdle lets both connections be silent but for the relay's own pings.
func (p *probe) stayIdle(ctx context.Context, claim, phone *wsPeer) {
	if p.idle == 0 {
		p.add(probeStep{"idle", stepSkipped, "not tried: -idle 120s shows whether the path survives silence", ""})
		return
	}
	p.note(fmt.Sprintf("silent for %v", p.idle))
	began := time.Now()
	cut := func(leg string, err error) {
		remedy := "raise the proxy's timeout for idle WebSockets well over the relay's -ping of 30s " +
			"(nginx: proxy_read_timeout and proxy_send_timeout 1h; HAProxy: timeout tunnel 1h)"
		if end, ok := errors.AsType[*endError](err); ok && end.code == int(endShutdown.code()) { // said so: no timeout
			remedy = diagnoseEnd(err).remedy
		}
		silence := formatAge(time.Since(began))
		p.fail("idle", diagnosis{fmt.Sprintf("the %s connection was cut after %s of silence: %v", leg, silence, err), remedy})
	}
	var late <-chan time.Time
	over := time.After(p.idle)
	for every := time.Tick(time.Second); ; {
		select {
		case <-claim.over:
			cut("binary's", claim.end)
			return
		case <-phone.over:
			cut("phone's", phone.end)
			return
		case <-late:
			cut("phone's", fmt.Errorf("a frame did not come back within %v", stepTime))
			return
		case <-phone.answers:
			p.pass("idle", fmt.Sprintf("the path survived %s of silence", formatAge(time.Since(began))))
			return
		case <-ctx.Done():
			p.add(probeStep{"idle", stepSkipped, "interrupted", ""})
			return
		case <-every:
			p.showProgress(fmt.Sprintf("silent for %v of %v", time.Since(began).Round(time.Second), p.idle))
		case <-over:
			late = time.After(stepTime)
			phone.write(opText, []byte("1")) // if that fails, the session is over
		}
	}
}

// ---- what the command shows ----

func (p *probe) pass(name, detail string)      { p.add(probeStep{name, stepOK, detail, ""}) }
func (p *probe) fail(name string, d diagnosis) { p.add(probeStep{name, stepFail, d.what, d.remedy}) }

// add shows a step as soon as it is over; with -json all come at the end. What is
// in it of others has been quoted; whatever slipped in otherwise does nothing to a
// terminal.
func (p *probe) add(s probeStep) {
	s.Detail, s.Remedy = printable(s.Detail), printable(s.Remedy)
	p.report.Steps = append(p.report.Steps, s)
	if p.clearProgress(); p.json {
		return
	}
	word := string(s.Verdict)
	if s.Verdict == stepFail {
		word = "FAIL"
	}
	fmt.Fprintf(p.out, "%-7s  %-11s  %s\n", word, s.Name, s.Detail)
	if s.Remedy != "" {
		fmt.Fprintf(p.out, "%-7s  %-11s  → %s\n", "", "", s.Remedy)
	}
}

// showProgress shows what is done just now, where that can be overwritten.
func (p *probe) showProgress(text string) {
	if p.live {
		fmt.Fprintf(p.progress, "\r\x1b[K… %s", text)
	}
}

// clearProgress takes that away again.
func (p *probe) clearProgress() {
	if p.live {
		fmt.Fprint(p.progress, "\r\x1b[K")
	}
}

// note shows why it takes long.
func (p *probe) note(text string) {
	if p.showProgress(text); !p.live {
		fmt.Fprintln(p.progress, text)
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// ---- a claim and the phones that join it ----

// household plays a binary and its phones, at a server-id that nobody else has,
// each over a connection of its own.
type household struct {
	id     string
	open   opener
	claim  *wsPeer   // the binary; nil: it does not hold the server-id
	phones []*wsPeer // that stay open until they are ended here, the oldest first
}

// opener opens a session of one leg. The peer is nil where there is none.
type opener func(ctx context.Context, role role, serverID string) (*wsPeer, *dialTrace, error)

// hold claims the server-id. Where the relay refuses a claim, its close frame comes behind the 101, in place of the
// answer to a ping.
func (h *household) hold(ctx context.Context) (*dialTrace, error) {
	peer, t, err := h.open(ctx, roleBinary, h.id)
	if err != nil {
		return t, err
	}
	if _, err = peer.ask(opPing, nil); err != nil {
		peer.close()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = fmt.Errorf("no answer to a ping within %v", stepTime)
		}
		return t, err
	}
	h.claim = peer
	return t, nil
}

// join opens a phone, which sends a frame to the binary and back if that holds the
// server-id.
func (h *household) join(ctx context.Context) (phone *wsPeer, t *dialTrace, err error) {
	phone, t, err = h.open(ctx, rolePhone, h.id)
	if err == nil && h.claim != nil {
		err = phone.roundTrip([]byte(`"` + h.id + `"`))
	}
	return phone, t, err
}

// misrouted reports whether a phone was told 4404 while the claim is held: the failure
// that a second relay behind one name causes.
func (h *household) misrouted(err error) bool {
	end, ok := errors.AsType[*endError](err)
	if !ok || end.code != int(endNeverSeen.code()) || h.claim == nil {
		return false
	}
	select {
	case <-h.claim.over:
		return false
	default:
		return true
	}
}

// endPhones ends the oldest phones, but for so many.
func (h *household) endPhones(most int) {
	for ; len(h.phones) > most; h.phones = h.phones[1:] {
		h.phones[0].close()
	}
}

func (h *household) close() {
	h.endPhones(0)
	if h.claim != nil {
		h.claim.close()
	}
}

// ---- the client: one connection ----

// dialStep is a step on the way to a session.
type dialStep uint8

const (
	stepDNS dialStep = iota
	stepTCP
	stepTLS
	stepUpgrade
	stepSession // the way is behind it
)

func (s dialStep) String() string { return [...]string{"dns", "tcp", "tls", "upgrade", "session"}[s] }

// dialTrace is what was met on the way, as far as it went.
type dialTrace struct {
	step   dialStep // that failed, or stepSession
	took   [stepSession]time.Duration
	addrs  []netip.Addr
	remote net.Addr
	tls    *tls.ConnectionState // nil without TLS
	answer answer
	nonce  bool // the relay that got the request is the one that issued its nonce
}

// answer is the HTTP answer to the request for an upgrade.
type answer struct {
	asked  time.Time // when the request went out: the answer is from then or later
	status string    // the status line
	code   int       // 0: none came
	header http.Header
	text   string // the first line of a refusal

	instance identity // the relay that gave the answer
	named    bool     // it gives its name
	standing standing // of that relay
	told     bool     // it says that, which older ones do not
}

func readAnswer(r io.Reader, asked time.Time) (a answer, err error) {
	resp, err := http.ReadResponse(bufio.NewReader(r), nil)
	if err != nil {
		return a, err
	}
	a = answer{asked: asked, status: resp.Proto + " " + resp.Status, code: resp.StatusCode, header: resp.Header}
	if a.code != http.StatusSwitchingProtocols {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxRefusal)) // whatever came
		a.text, _, _ = strings.Cut(strings.TrimSpace(string(b)), "\n")
	}
	id, notNamed := parseIdentity(a.header.Get(instanceHeader))
	s, notTold := parseStanding(a.header.Get(standingHeader))
	a.instance, a.named, a.standing, a.told = id, notNamed == nil, s, notTold == nil
	return a, nil
}

// dialer opens sessions with the relay at base: it verifies TLS and follows no
// redirect. It takes turns with the addresses of the name and with both paths, since
// two relays behind two of them are two relays, too. It is used by one goroutine.
type dialer struct {
	base *url.URL
	tls  *tls.Config // nil: the system's authorities
	net  network     // nil: system

	n     int                 // dials so far
	addrs []netip.Addr        // of the name, at the last of them
	lost  map[netip.Addr]bool // those that could not be reached, and are tried last
}

// network is what the dialer needs below TLS.
type network interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
	DialContext(ctx context.Context, network, address string) (net.Conn, error)
}

var system network = struct {
	*net.Resolver
	*net.Dialer
}{net.DefaultResolver, &net.Dialer{KeepAlive: -1}}

// dial opens a session of one leg, which lasts until close or the end of ctx. A
// nonce, if any, is one of the relay's own. The trace is there in any case.
func (d *dialer) dial(ctx context.Context, role role, serverID, nonce string) (*wsPeer, *dialTrace, error) {
	t, c := new(dialTrace), &wsPeer{role: role, answers: make(chan []byte, 1), over: make(chan struct{})}
	for t.step < stepSession {
		var err error
		began := time.Now()
		bounded, cancel := context.WithTimeout(ctx, stepTime)
		switch t.step {
		case stepDNS:
			d.addrs, err = d.resolve(bounded)
			t.addrs = d.addrs
		case stepTCP:
			c.nc, err = d.connect(ctx) // each address has a time of its own
		case stepTLS:
			c.nc, t.tls, err = d.secure(bounded, c.nc)
		case stepUpgrade:
			c.unwatch = context.AfterFunc(ctx, func() { c.nc.Close() })
			if t.answer, err = c.upgrade(d.request(role, serverID, nonce)); err != nil {
				c.unwatch()
			}
		}
		cancel()
		t.took[t.step] = time.Since(began)
		if c.nc != nil {
			t.remote = c.nc.RemoteAddr()
		}
		if err != nil {
			if c.nc != nil {
				c.nc.Close()
			}
			return nil, t, cmp.Or(ctx.Err(), err)
		}
		t.step++
	}
	go c.read()
	return c, t, nil
}

func (d *dialer) resolve(ctx context.Context) (addrs []netip.Addr, err error) {
	host := d.base.Hostname()
	if a, err := netip.ParseAddr(host); err == nil { // a resolver would lose its zone
		return []netip.Addr{a}, nil
	}
	addrs, err = cmp.Or(d.net, system).LookupNetIP(ctx, "ip", host)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	slices.SortFunc(addrs, netip.Addr.Compare) // resolvers give them in any order
	return slices.Compact(addrs), err
}

func (d *dialer) connect(ctx context.Context) (net.Conn, error) {
	port := cmp.Or(d.base.Port(), map[string]string{"ws": "80", "wss": "443"}[d.base.Scheme])
	patience := stepTime
	if len(d.addrs) > 1 {
		patience = addrTime
	}
	if d.lost == nil {
		d.lost = map[netip.Addr]bool{}
	}
	first := d.n % len(d.addrs)
	d.n++
	turn := slices.Concat(d.addrs[first:], d.addrs[:first])
	slices.SortStableFunc(turn, func(a, b netip.Addr) int { return int(boolToInt(d.lost[a]) - boolToInt(d.lost[b])) })
	var failed error
	for _, addr := range turn {
		bounded, cancel := context.WithTimeout(ctx, patience)
		nc, err := cmp.Or(d.net, system).DialContext(bounded, "tcp", net.JoinHostPort(addr.String(), port))
		cancel()
		if d.lost[addr] = err != nil; err == nil {
			return nc, nil
		}
		failed = errors.Join(failed, err)
	}
	return nil, failed
}

// secure speaks TLS, where the scheme says so. It returns nc where that fails.
func (d *dialer) secure(ctx context.Context, nc net.Conn) (net.Conn, *tls.ConnectionState, error) {
	if d.base.Scheme == "ws" {
		return nc, nil, nil
	}
	config := d.tls.Clone()
	if config == nil {
		config = new(tls.Config)
	}
	config.ServerName = d.base.Hostname()
	config.NextProtos = []string{"http/1.1"} // no other carries this upgrade
	tc := tls.Client(nc, config)
	if err := tc.HandshakeContext(ctx); err != nil {
		return nc, nil, err
	}
	state := tc.ConnectionState()
	return tc, &state, nil
}

// rolePage asks for a page in place of an upgrade: dial fails, with the answer.
const rolePage = roleCount

// request is an upgrade as peers ask for it.
func (d *dialer) request(role role, serverID, nonce string) *websocket.Config {
	version := readBuildVersion().version
	header := http.Header{"X-Pyrycode-Server": {serverID}, "User-Agent": {programName + "/" + version}}
	if role == roleBinary {
		header.Set("X-Pyrycode-Version", version)
	}
	if nonce != "" {
		header.Set(probeHeader, nonce)
	}
	location, origin := *d.base, *d.base
	location.Path = "/readyz"
	if role != rolePage {
		version := 2 - (d.n-1)/len(d.addrs)%2
		location.Path = fmt.Sprintf("/v%d/%s", version, endpointWords[role])
	}
	origin.Scheme = map[string]string{"ws": "http", "wss": "https"}[d.base.Scheme]
	return &websocket.Config{Location: &location, Origin: &origin, Version: websocket.ProtocolVersionHybi13, Header: header}
}

// wsPeer is a session from a peer's side. x/net/websocket makes the handshake and
// reads and writes the frames. A binary sends what it is sent back.
type wsPeer struct {
	role    role
	nc      net.Conn
	ws      *websocket.Conn
	unwatch func() bool   // of the context of the dial
	mu      sync.Mutex    // writing: x/net has no lock for frames
	answers chan []byte   // messages to a phone, pongs to a binary; one waits
	over    chan struct{} // closed behind the end
	end     *endError     // set by then
}

// endError is how a session ended: with a close frame, or 1006 and err.
type endError struct {
	code   int
	reason string
	err    error
}

func (e *endError) Error() string {
	switch {
	case e.err != nil:
		return fmt.Sprintf("connection lost: %v", e.err)
	case e.reason == "":
		return fmt.Sprintf("closed %d", e.code)
	}
	return fmt.Sprintf("closed %d %s", e.code, quote(e.reason))
}

// upgrade makes the opening handshake. x/net keeps the answer to itself and reads
// a head without end to its end, so that the head is recorded on its way, and bounded.
func (c *wsPeer) upgrade(config *websocket.Config) (answer, error) {
	var head bytes.Buffer
	through := &struct {
		io.Reader
		io.WriteCloser
	}{io.TeeReader(io.LimitReader(c.nc, maxHead), &head), c.nc}
	c.nc.SetDeadline(time.Now().Add(stepTime))
	asked := time.Now()
	ws, err := websocket.NewClient(config, through)
	through.Reader, c.ws = c.nc, ws
	if err == nil {
		c.nc.SetDeadline(time.Time{})
		return readAnswer(&head, asked)
	}
	if head.Len() >= maxHead {
		return answer{}, fmt.Errorf("the answer's head has more than %d bytes", maxHead)
	}
	// x/net has stopped reading at the head; the text of a refusal may be to come.
	c.nc.SetReadDeadline(time.Now().Add(byeTime))
	a, _ := readAnswer(io.MultiReader(&head, io.LimitReader(c.nc, maxHead)), asked)
	return a, err
}

// read takes what the relay sends until the end, for which close waits. It answers
// pings, and the close frame that is the end.
func (c *wsPeer) read() {
	defer close(c.over)
	for c.end == nil {
		op, p, err := c.frame()
		switch {
		case err != nil:
			c.end = &endError{code: 1006, err: err}
		case op == opPing:
			c.write(opPong, p) // if that fails, so does the next frame
		case op == opClose:
			c.end = &endError{code: noCloseCode}
			if len(p) >= 2 {
				c.end.code, c.end.reason = int(binary.BigEndian.Uint16(p)), string(p[2:])
			}
			c.write(opClose, p) // the answer; the relay may be gone
		case op == opText && c.role == roleBinary:
			c.echo(p)
		case op == opText, op == opPong && c.role == roleBinary:
			select {
			case c.answers <- p:
			default: // nothing asks any more
			}
		}
	}
}

// frame reads one frame as relays send them: whole and unmasked.
func (c *wsPeer) frame() (op byte, p []byte, err error) {
	f, err := c.ws.NewFrameReader()
	if err != nil {
		return 0, nil, err
	}
	head, err := io.ReadAll(f.HeaderReader())
	if err != nil {
		return 0, nil, err
	}
	n := f.Len() - len(head) // overflows below 0 for what no one sends
	if head[0]&0xf0 != 0x80 || head[1]&0x80 != 0 || n < 0 || n > maxHeard {
		return 0, nil, fmt.Errorf("a frame that no relay sends: % x", head)
	}
	p = make([]byte, n)
	_, err = io.ReadFull(f, p)
	return f.PayloadType(), p, err
}

// write sends one frame. It may be called from several goroutines.
func (c *wsPeer) write(op byte, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	w, err := c.ws.NewFrameWriter(op)
	if err != nil {
		return err
	}
	c.nc.SetWriteDeadline(time.Now().Add(stepTime))
	_, err = w.Write(p)
	return err
}

// ask sends a frame and waits for an answer. It prefers the close frame, which tells
// why, to the error of a write after it.
func (c *wsPeer) ask(op byte, p []byte) (answer []byte, err error) {
	patience := stepTime
	if err = c.write(op, p); err != nil {
		patience = byeTime
	}
	select {
	case answer = <-c.answers:
		return answer, nil
	case <-c.over:
		return nil, c.end
	case <-time.After(patience):
		return nil, cmp.Or(err, os.ErrDeadlineExceeded)
	}
}

// roundTrip sends a frame, which the claim sends back in brackets.
func (c *wsPeer) roundTrip(frame []byte) error {
	p, err := c.ask(opText, frame)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("a frame of %d bytes did not come back within %v", len(frame), stepTime)
	case err == nil && (len(p) != len(frame)+2 || !bytes.Equal(p[1:len(p)-1], frame)):
		return fmt.Errorf("%d bytes went out, %d others came back", len(frame), len(p))
	}
	return err
}

// echo sends what a phone has sent back to it. The brackets tell it from a server
// that echoes itself.
func (c *wsPeer) echo(message []byte) {
	var e struct {
		ConnID string          `json:"conn_id"`
		Frame  json.RawMessage `json:"frame,omitempty"`
	}
	if json.Unmarshal(message, &e) != nil || e.Frame == nil {
		return // a close notice
	}
	e.Frame = slices.Concat([]byte("["), e.Frame, []byte("]"))
	back, _ := json.Marshal(e) // of what has just been parsed
	c.write(opText, back)      // if that fails, the session is over
}

// close ends the session with a close handshake.
func (c *wsPeer) close() {
	c.write(opClose, binary.BigEndian.AppendUint16(nil, 1000)) // nothing is left to do if that fails
	c.nc.SetDeadline(time.Now().Add(byeTime))
	<-c.over
	c.unwatch()
	c.nc.Close()
}

// ---- what a failure means, in the words of an operator ----

// diagnosis is something that is wrong, and what to do about it.
type diagnosis struct{ what, remedy string }

// diagnose tells what a failed dial, or a session's early end, means.
func diagnose(base *url.URL, t *dialTrace, err error) (d diagnosis) {
	lookup, _ := errors.AsType[*net.DNSError](err)
	switch {
	case t.step == stepDNS && lookup != nil && lookup.IsNotFound:
		d = diagnosis{fmt.Sprintf("the name %s is not known here", base.Hostname()), "correct the name, or give it an A or AAAA record; " +
			"a home network may answer for other names than the world does (split DNS)"}
	case t.step == stepDNS:
		d = diagnosis{fmt.Sprintf("looking up %s failed: %v", base.Hostname(), err), "check this machine's resolver (/etc/resolv.conf)"}
	case t.step == stepTCP:
		d = diagnoseTCP(err)
	case t.step == stepTLS:
		d = diagnoseTLS(base, err)
	case t.step == stepSession:
		d = diagnoseEnd(err)
	case t.answer.code != 0:
		d = diagnoseAnswer(base, t.answer, err)
	default:
		d = diagnosis{"no HTTP answer: " + err.Error(), "check that the port is the one of the proxy, and that the proxy's backend is the relay"}
		if base.Scheme == "ws" {
			d.remedy += "; if the port speaks TLS, use wss://"
		}
	}
	d.what = printable(d.what)
	return d
}

func diagnoseTCP(err error) diagnosis {
	const inside = "; from inside the relay's own network the router may lack hairpin NAT: try from outside"
	what := strings.ReplaceAll(err.Error(), "\n", "; ")
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return diagnosis{"nothing listens there: " + what, "start the proxy (or the relay) there, or correct the port" + inside}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return diagnosis{"nobody answers there: " + what, "open the port in the firewall and forward it in the router" + inside}
	}
	return diagnosis{what, "check the address and this machine's route to it"}
}

func diagnoseTLS(base *url.URL, err error) diagnosis {
	host, now := base.Hostname(), time.Now()
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "remote error" { // an alert, whose type is crypto/tls's own
		return diagnosis{"the server refused the TLS handshake: " + e.Err.Error(), "give the proxy a certificate for " + host}
	}
	cause := err
	for e := err; e != nil; e = errors.Unwrap(e) {
		cause = e
	}
	switch e := cause.(type) {
	case x509.CertificateInvalidError:
		switch c := e.Cert; {
		case e.Reason != x509.Expired: // told by its own words
		case now.Before(c.NotBefore):
			return diagnosis{"the certificate is valid from " + formatDay(c.NotBefore) + " only",
				"check the clock of this machine and of the one that made the certificate"}
		default:
			return diagnosis{fmt.Sprintf("the certificate expired on %s, %s ago", formatDay(c.NotAfter), formatAge(now.Sub(c.NotAfter))),
				"renew the certificate, have the proxy load it, and find out why that did not happen by itself; check this machine's clock"}
		}
	case x509.HostnameError:
		names := cmp.Or(strings.Join(e.Certificate.DNSNames, ", "), "no name")
		return diagnosis{fmt.Sprintf("the certificate is for %s, not for %s", quote(names), host),
			"give the proxy a certificate for " + host + ", or use a name that the certificate has"}
	case x509.UnknownAuthorityError:
		return diagnosis{"the certificate's issuer is not trusted here",
			"use a certificate of a public authority, with its chain (fullchain.pem): phones do not trust this one either"}
	case tls.RecordHeaderError:
		return diagnosis{"what answers does not speak TLS", "use the proxy's TLS port; for a relay without a proxy in front use ws://"}
	}
	return diagnosis{"the TLS handshake failed: " + err.Error(), "check that the port speaks TLS, and what the proxy logs"}
}

// passUpgrade is what proxies forget.
const passUpgrade = "have the proxy pass the upgrade on " +
	`(nginx: proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";)`

const letThrough = "let /v1/ and /v2/ through to the relay without a login"

// What to do about answers, by their status: a relay's own refusals, and what
// something else says.
var (
	refusalRemedies = map[int]string{
		http.StatusUpgradeRequired: passUpgrade,
		http.StatusBadRequest:      "have the proxy pass user-agent and the x-pyrycode-* headers on unchanged",
		http.StatusTooManyRequests: "wait a minute, or raise -rate-per-minute; " +
			"if everybody gets this, the proxy's address is not in -trusted-proxies",
	}
	strangerRemedies = map[int]string{
		http.StatusUnauthorized:      letThrough,
		http.StatusForbidden:         letThrough,
		http.StatusProxyAuthRequired: letThrough,
		http.StatusTooManyRequests:   "wait a minute: the proxy in front limits upgrades",
		http.StatusUpgradeRequired:   passUpgrade,
	}
)

// diagnoseAnswer tells what an answer other than a good 101 means.
func diagnoseAnswer(base *url.URL, a answer, err error) diagnosis {
	if a.code == http.StatusSwitchingProtocols {
		return diagnosis{fmt.Sprintf("%s is no good upgrade: %v", quote(a.status), err),
			"have the proxy leave the answer's Upgrade, Connection and Sec-WebSocket-Accept as the relay sent them"}
	}
	if a.named {
		return diagnosis{fmt.Sprintf("the relay refuses with %s: %s", quote(a.status), quote(a.text)),
			cmp.Or(refusalRemedies[a.code], "wait, and try again")}
	}
	what := "something that is not a relay answers " + quote(a.status)
	if s := a.header.Get("Server"); s != "" {
		what += " (server: " + quote(s) + ")"
	}
	remedy := cmp.Or(strangerRemedies[a.code], "correct the address, or have the proxy pass /v1/ and /v2/ on to the relay")
	switch c, location := a.code, a.header.Get("Location"); {
	case c >= 300 && c < 400 && location == "":
		return diagnosis{what + ", a redirect to nowhere", remedy}
	case c >= 300 && c < 400:
		return diagnosis{what + ", a redirect to " + quote(location), "use the address it leads to: peers follow no redirect"}
	case c >= 502 && c <= 504:
		return diagnosis{what + ": the proxy does not reach a relay behind it",
			"start the relay, and give the proxy its -listen address as backend"}
	case c == http.StatusBadRequest && base.Scheme == "ws":
		remedy = "if the port speaks TLS, use wss://; otherwise " + passUpgrade
	}
	return diagnosis{what, remedy}
}

// diagnoseEnd tells what it means that a session with a relay did not last.
func diagnoseEnd(err error) diagnosis {
	end, ok := errors.AsType[*endError](err)
	remedy := "look at the relay's log"
	switch {
	case !ok:
		remedy = "have the proxy pass WebSocket frames on at once, without buffering"
	case end.err != nil:
		remedy = "look at the proxy's log: it cut a connection that was open"
	case end.code == int(endShutdown.code()) && end.reason == endShutdown.String():
		remedy = "the relay was stopped just then: look at its log, and try again"
	case end.code == int(endShutdown.code()):
		remedy = "the proxy was reloaded or stopped, and says goodbye to every session when it is: " +
			"have it leave them alone (Caddy: stream_close_delay 5m in reverse_proxy), and reload it less often"
	}
	return diagnosis{err.Error(), remedy}
}

// ---- words for a person ----

const (
	// maxQuoted is how much is shown of one thing that came from outside.
	maxQuoted = 120
	// maxPlain is how much of one line is shown.
	maxPlain = 500
)

// quote shows what came from outside so that nobody takes it for our own words:
// a string of Go with at most maxQuoted bytes of it.
func quote(s string) string {
	if len(s) > maxQuoted {
		s = s[:maxQuoted] + "…"
	}
	return strconv.Quote(s)
}

// printable escapes what a terminal would act on: control characters, and those that
// change the direction of text. Errors of other packages hold what a server said.
func printable(s string) string {
	var b strings.Builder
	for i, r := range s {
		switch {
		case i >= maxPlain:
			return b.String() + "…"
		case r == utf8.RuneError || strconv.IsPrint(r):
			b.WriteRune(r)
		default:
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

func formatDay(t time.Time) string { return t.UTC().Format(time.DateOnly) }

// formatAge is a duration as a person says it.
func formatAge(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	case d >= time.Minute:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(100 * time.Microsecond).String()
	}
	return d.Round(time.Microsecond).String()
}
