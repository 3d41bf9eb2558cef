package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The probe command: what the relay asks of its own public name, asked by a
// person from any machine. It goes the way of a binary and of phones and says
// of each step whether it works and, if not, what to do.

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
)

// probe is one run of the command.
type probe struct {
	// Set at the start.
	base  *url.URL
	n     int           // connections
	idle  time.Duration // 0: not tried
	tls   *tls.Config   // nil: the system's authorities
	shows *probeOutput

	dialer dialer
	id     string
	met    []instanceCount
	silent int // answers without an instanceHeader
	report probeReport
}

// instanceCount is how many connections reached an instance.
type instanceCount struct {
	identity
	n     int
	since time.Time // its start by this machine's clock
}

// runProbe is the probe command.
func runProbe(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var p probe
	asJSON := false
	fs := flag.NewFlagSet("probe", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	add(fs, "n", &p.n, probeConnections, number(2, 1000),
		"`connections`, one claim and the rest phones; everybody behind one address shares the relay's rate limit, 20 at once by default")
	add(fs, "idle", &p.idle, time.Duration(0), duration(0, time.Hour), "`duration` of silence that the path has to survive; 0s leaves that out")
	add(fs, "json", &asJSON, false, parseTruth, "one JSON object instead of text")
	target, err := parseProbe(fs, args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(stdout, "%s probe [flags] URL\n\nChecks a relay from outside, as wss://relay.example.com. Exit code 0: it works.\n1: it does not, and the step that failed says what to do. 2: wrong use.\n\n", programName)
		fs.SetOutput(stdout)
		fs.PrintDefaults()
		return exitStopped
	}
	if err == nil {
		p.base, err = parseProbeURL(target)
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v; probe -h tells more\n", programName, err)
		return exitRefused
	}
	p.shows = &probeOutput{out: stdout, progress: stderr, json: asJSON, live: isTerminal(stderr)}
	if !p.run(ctx) {
		return exitFailed
	}
	return exitStopped
}

// parseProbe takes flags before and behind the URL.
func parseProbe(fs *flag.FlagSet, args []string) (target string, err error) {
	if err = fs.Parse(args); err != nil {
		return "", err
	}
	target = fs.Arg(0)
	if fs.NArg() > 1 {
		if err = fs.Parse(fs.Args()[1:]); err != nil {
			return "", err
		}
		if fs.NArg() > 0 {
			return "", fmt.Errorf("probe takes one URL, and %q is one more", fs.Arg(0))
		}
	}
	if target == "" {
		return "", errors.New("probe wants the URL of a relay, such as wss://relay.example.com")
	}
	return target, nil
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

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// run probes, and reports whether all is well.
func (p *probe) run(ctx context.Context) bool {
	p.dialer = dialer{base: p.base, tls: p.tls}
	p.id = probeID()
	p.report.URL = p.base.String()
	p.shows.begin(p.report.URL, p.n)
	p.steps(ctx)
	p.report.OK = !slices.ContainsFunc(p.report.Steps, func(s probeStep) bool { return s.Verdict == stepFail })
	p.shows.finish(&p.report)
	return p.report.OK
}

func (p *probe) steps(ctx context.Context) {
	p.shows.tick("opening a connection")
	claim, err := p.open(ctx, roleBinary)
	p.path(claim, err)
	if claim == nil {
		return
	}
	var echo sync.WaitGroup
	defer echo.Wait()
	defer claim.close()
	if err := claim.settled(); err != nil {
		p.fail("claim", diagnose(p.base, err))
		return
	}
	p.pass("claim", "a binary's claim of the server-id "+p.id+" is taken")
	echo.Go(claim.echo) // until claim is closed

	ph := p.joins(ctx, claim)
	if ph != nil {
		defer ph.close()
		p.measure(ph)
		p.large(ph)
	}
	p.instances()
	if ph != nil {
		p.quiet(ctx, claim, ph)
	}
}

func (p *probe) pass(name, detail string) { p.add(probeStep{name, stepOK, detail, ""}) }
func (p *probe) fail(name string, f diagnosis) {
	p.add(probeStep{name, stepFail, f.what, f.remedy})
}

// add shows a step. What is in it of others has been quoted; whatever slipped in
// otherwise does nothing to a terminal.
func (p *probe) add(s probeStep) {
	s.Detail, s.Remedy = plain(s.Detail), plain(s.Remedy)
	p.report.Steps = append(p.report.Steps, s)
	p.shows.step(s)
}

// open dials, and waits where the relay's rate limit says so.
func (p *probe) open(ctx context.Context, role role) (*wsPeer, error) {
	for {
		peer, err := p.dialer.dial(ctx, role, p.id, "")
		var failed *dialError
		if errors.As(err, &failed) && failed.trace.answer != nil && failed.trace.answer.code == http.StatusTooManyRequests {
			s, convErr := strconv.Atoi(failed.trace.answer.header.Get("Retry-After"))
			if wait := time.Duration(s) * time.Second; convErr == nil && wait > 0 && wait <= maxRateWait {
				p.shows.note(fmt.Sprintf("the relay lets only so many connections in from one address: waiting %v for the next", wait))
				again := time.NewTimer(wait)
				select {
				case <-again.C:
					continue
				case <-ctx.Done():
					again.Stop()
				}
			}
		}
		return peer, err
	}
}
