package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// The steps of a probe, in their order on the way.

// path says how the first connection came through, step by step.
func (p *probe) path(peer *wsPeer, err error) {
	t := (*dialTrace)(nil)
	failedAt := dialStepCount
	var failed *dialError
	if errors.As(err, &failed) {
		t, failedAt = failed.trace, failed.step
	} else {
		t = peer.dialTrace
	}
	for step := range dialStepCount {
		switch {
		case step == stepTLS && p.base.Scheme == "ws":
			p.add(probeStep{step.String(), stepSkipped, "ws:// has none: put a TLS proxy in front before others use it", ""})
		case step == failedAt:
			p.fail(step.String(), diagnose(p.base, err))
			return
		default:
			p.way(step, t)
		}
	}
	p.headers(peer.answer)
}

// way is a step that worked.
func (p *probe) way(step dialStep, t *dialTrace) {
	took := brief(t.took[step])
	switch step {
	case stepDNS:
		if _, err := netip.ParseAddr(p.base.Hostname()); err == nil {
			p.pass("dns", p.base.Hostname()+" is an address")
			return
		}
		var all []string
		for _, a := range t.addrs {
			all = append(all, a.String())
		}
		p.pass("dns", fmt.Sprintf("%s is %s (%s)", p.base.Hostname(), strings.Join(all, ", "), took))
	case stepTCP:
		p.pass("tcp", fmt.Sprintf("connected to %s in %s", t.remote, took))
	case stepTLS:
		p.certificate(t, took)
	case stepUpgrade:
		p.pass("upgrade", fmt.Sprintf("%s (%s)", quote(t.answer.status), took))
	}
}

// certificate tells when the chain's first certificate ends.
func (p *probe) certificate(t *dialTrace, took string) {
	c := t.tls.PeerCertificates[0]
	left := time.Until(c.NotAfter)
	for _, up := range t.tls.VerifiedChains[0][1:] {
		if l := time.Until(up.NotAfter); l < left {
			c, left = up, l
		}
	}
	end := c.NotAfter
	p.report.CertificateExpires = &end
	s := probeStep{"tls", stepOK, fmt.Sprintf("%s, certificate good until %s, for %s (%s)", tls.VersionName(t.tls.Version), day(end), age(left), took), ""}
	if left < end.Sub(c.NotBefore)/renewalShare {
		s.Verdict, s.Remedy = stepWarn, "renew the certificate now, and find out why that did not happen by itself"
	}
	p.add(s)
}

// headers says what the 101 proves of headers on their way.
func (p *probe) headers(a *answer) {
	const arrive = "x-pyrycode-server, x-pyrycode-version and user-agent arrive, "
	if _, ok := a.identity(); ok {
		p.pass("headers", arrive+strings.ToLower(instanceHeader)+" comes back")
		return
	}
	p.add(probeStep{"headers", stepWarn, "the answer lacks " + strings.ToLower(instanceHeader) + ": who answers can't be told",
		"let the proxy pass the relay's answer headers on; a relay of an older version does not send this one: update it"})
}

// meet counts who answered, if anybody did.
func (p *probe) meet(peer *wsPeer, err error) (who identity, ok bool) {
	a := answerOf(peer, err)
	if a == nil {
		return identity{}, false
	}
	if who, ok = a.identity(); !ok {
		p.silent++
		return identity{}, false
	}
	i := slices.IndexFunc(p.met, func(m instanceCount) bool { return m.id == who.id })
	if i < 0 {
		i = len(p.met)
		p.met = append(p.met, instanceCount{identity: who})
	}
	p.met[i].n++
	p.met[i].since = who.started
	if s, ok := a.standing(); ok {
		p.met[i].since = a.asked.Add(-s.age) // whatever the clocks of both say
	}
	return who, true
}

// joins opens the phones, one after the other. The first that gets in stays.
func (p *probe) joins(ctx context.Context, claim *wsPeer) (kept *wsPeer) {
	home, _ := p.meet(claim, nil)
	var lost, broken error
	joined, astray, failed := 0, 0, 0
	for i := range p.n - 1 {
		p.shows.tick(fmt.Sprintf("connection %d of %d", i+2, p.n))
		ph, err := p.open(ctx, rolePhone)
		who, known := p.meet(ph, err)
		if err == nil {
			err = ph.roundTrip([]byte(`"hello"`))
		}
		switch {
		case err == nil:
			joined++
		case wentAstray(err, claim), known && who.id != home.id:
			astray++
			lost = err
		default:
			failed++
			broken = cmp.Or(broken, err)
		}
		switch {
		case err == nil && kept == nil:
			kept = ph
		case ph != nil:
			ph.close()
		}
		if ctx.Err() != nil {
			break
		}
	}
	phones := fmt.Sprintf("%d of %d phones reached the binary", joined, p.n-1)
	switch {
	case astray > 0:
		p.fail("join", diagnosis{fmt.Sprintf("%s; %d did not, although it is there (%v)", phones, astray, lost),
			"run exactly one relay behind this name: those phones came to another one"})
	case failed > 0:
		f := diagnose(p.base, broken)
		p.fail("join", diagnosis{phones + "; the first that did not: " + f.what, f.remedy})
	default:
		p.pass("join", phones)
	}
	return kept
}

// measure times small frames from phone to binary and back.
func (p *probe) measure(ph *wsPeer) {
	p.shows.tick("measuring the round trip")
	var took []time.Duration
	for i := range roundTrips {
		began := time.Now()
		if err := ph.roundTrip(fmt.Appendf(nil, `{"probe":%d}`, i)); err != nil {
			p.fail("round trip", diagnose(p.base, err))
			return
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	low, middle, high := took[0], took[len(took)/2], took[len(took)-1]
	p.report.RoundTrip = &roundTripTimes{millis(low), millis(middle), millis(high)}
	p.pass("round trip", fmt.Sprintf("phone to binary and back: min %s, median %s, max %s of %d", brief(low), brief(middle), brief(high), roundTrips))
}

// large sends what is more than any buffer of a proxy, both ways.
func (p *probe) large(ph *wsPeer) {
	noise := make([]byte, largeFrame/2-1)
	rand.Read(noise)
	frame := fmt.Appendf(nil, `"%x"`, noise)
	p.shows.tick("sending 200 KiB")
	began := time.Now()
	if err := ph.roundTrip(frame); err != nil {
		f := diagnose(p.base, err)
		p.fail("large frame", diagnosis{"200 KiB: " + f.what, "raise what limits messages in the proxy, and -max-frame if it is under 262144; " + f.remedy})
		return
	}
	p.pass("large frame", "200 KiB there and back in "+brief(time.Since(began)))
}

// instances says who answered.
func (p *probe) instances() {
	slices.SortFunc(p.met, func(a, b instanceCount) int {
		if a.olderThan(b.identity) {
			return -1
		}
		return 1
	})
	total := p.silent
	for _, m := range p.met {
		total += m.n
	}
	var each []string
	for _, m := range p.met {
		p.report.Instances = append(p.report.Instances, probeInstance{m.id, m.started, m.n})
		each = append(each, fmt.Sprintf("%d of %d connections reached %s, up %s", m.n, total, m.id, age(time.Since(m.since))))
	}
	if p.silent > 0 {
		each = append(each, fmt.Sprintf("%d of %d something that does not say who it is", p.silent, total))
	}
	detail := strings.Join(each, "; ")
	switch {
	case len(p.met) > 1:
		p.fail("instances", diagnosis{detail, "stop all but one of these relays (/healthz shows each one's id): they do not know of each other's binaries, so phones get 4404"})
	case len(p.met) == 1 && p.silent > 0:
		p.fail("instances", diagnosis{detail, "find what else answers to this name, and take it away"})
	case len(p.met) == 0:
		p.add(probeStep{"instances", stepWarn, detail, "see the step headers"})
	default:
		p.pass("instances", detail)
	}
}

// quiet lets both connections be silent but for the relay's own pings.
func (p *probe) quiet(ctx context.Context, claim, ph *wsPeer) {
	if p.idle == 0 {
		p.add(probeStep{"idle", stepSkipped, "not tried: -idle 120s shows whether the path survives silence", ""})
		return
	}
	began := time.Now()
	over := time.NewTimer(p.idle)
	defer over.Stop()
	every := time.NewTicker(time.Second)
	defer every.Stop()
	p.shows.note(fmt.Sprintf("silent for %v", p.idle))
	cut := func(who string, err error) {
		remedy := "raise the proxy's timeout for idle WebSockets well over the relay's -ping of 30s (nginx: proxy_read_timeout and proxy_send_timeout 1h; HAProxy: timeout tunnel 1h)"
		var end *endError
		if errors.As(err, &end) && end.code == int(endShutdown.code()) { // said so: no timeout
			remedy = diagnoseEnd(err).remedy
		}
		p.fail("idle", diagnosis{fmt.Sprintf("the %s connection was cut after %s of silence: %v", who, brief(time.Since(began)), err), remedy})
	}
	for {
		select {
		case <-claim.over:
			cut("binary's", claim.end)
			return
		case <-ph.over:
			cut("phone's", ph.end)
			return
		case <-every.C:
			p.shows.tick(fmt.Sprintf("silent for %v of %v", time.Since(began).Round(time.Second), p.idle))
			continue
		case <-over.C:
		case <-ctx.Done():
			p.add(probeStep{"idle", stepSkipped, "interrupted", ""})
			return
		}
		if err := ph.roundTrip(bytes.Repeat([]byte("1"), 8)); err != nil {
			cut("phone's", err)
			return
		}
		p.pass("idle", fmt.Sprintf("the path survived %s of silence", brief(time.Since(began))))
		return
	}
}
