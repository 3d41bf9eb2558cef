package main

import (
	"context"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"strings"
	"sync"
	"time"
)

// The second guard against a second relay, across hosts: this one asks its own
// public name who answers there (-public-url). What is found is a verdict for
// the log, /healthz and /metrics; only an older relay behind the same name, seen
// again and again, ends this process. How a round looks: publicround.go.

const (
	firstJoins = 8 // phones in the first round
	laterJoins = 4
	// splitRounds is how often, and checkPace.over for how long, a relay that is to
	// stay must be seen before this one gives way: a rolling update overlaps for
	// seconds.
	splitRounds = 3
	// splitDoubts is for how many times checkPace.over it counts who holds binaries
	// of users: one that comes and goes must not keep two relays for ever.
	splitDoubts = 4
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

// finding is what one round found.
type roundResult struct {
	verdict   publicVerdict // verified, split, not-a-relay or unreachable
	others    []rival       // of a split: who else answers, the oldest first, without those that do not say who they are
	diagnosis diagnosis     // of the rest
	joins     int           // phones that tried
	failed    int           // of them
}

// publicCheck checks the public name until its context ends.
type publicCheck struct {
	// Set at the start.
	me     identity
	began  time.Time // when it started, by the monotonic clock
	url    string
	bypass bool
	pace   checkPace
	state  *instanceState
	log    *slog.Logger
	round  func(ctx context.Context, joins int) roundResult
	leave  chan error // says that this process must give way

	cancel context.CancelFunc
	wg     sync.WaitGroup

	// Owned by run.
	suspected bool // the last round saw a split, the one before did not
	changed   time.Time
	seen      map[string]*observation // by id: other relays, since the split began
}

// sighting is another relay that answers to our name.
type observation struct {
	since  time.Time // when it was seen first
	rounds int       // in a row in which it was the one to stay
	first  time.Time // when the first of them was judged
}

// startPublicCheck starts the check, if there is a -public-url.
func startPublicCheck(o options, r *relay) *publicCheck {
	c := &publicCheck{
		me: r.id, began: r.started, bypass: o.bypass, pace: o.checkPace, state: r.instance, log: r.log, leave: make(chan error, 1),
	}
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	if o.publicURL == nil {
		return c
	}
	c.url = o.publicURL.String()
	path := &publicPath{me: r.id, standing: r.standing, base: o.publicURL, keys: r.probes, pause: min(o.checkPace.again/10, longestPause)}
	c.round = path.round
	c.state.public.Store(uint32(publicPending))
	c.wg.Go(func() { c.run(ctx) })
	return c
}

// stop ends the check and whatever it has open.
func (c *publicCheck) stop() {
	c.cancel()
	c.wg.Wait()
}

func (c *publicCheck) run(ctx context.Context) {
	joins := firstJoins
	wait := min(time.Second, c.pace.again) // the listener has just opened
	for {
		next := time.NewTimer(wait)
		select {
		case <-next.C:
		case <-ctx.Done():
			next.Stop()
			return
		}
		f := c.round(ctx, joins)
		if ctx.Err() != nil {
			return
		}
		joins = laterJoins
		if err := c.judge(f, time.Now()); err != nil {
			c.leave <- err
			return
		}
		wait = c.pace.every
		// What has just gone wrong may be over soon.
		if c.suspected || c.state.verdict() != publicVerified && time.Since(c.changed) < 2*c.pace.every {
			wait = c.pace.again
		}
		wait = wait*9/10 + mrand.N(wait/5+1)
	}
}

// judge makes a verdict of a finding. An error names the relay for which this one
// gives way. One round alone is no split: while a relay is replaced
// both answer for a moment.
func (c *publicCheck) judge(f roundResult, now time.Time) error {
	was := c.state.verdict()
	if f.verdict == publicSplit && was != publicSplit && !c.suspected {
		c.suspected = true
		c.log.Info("another relay answered to the public name; checking again", "url", c.url, "other", names(f.others), "in", c.pace.again)
		c.sight(f.others, now)
		return nil
	}
	c.suspected = false
	if f.verdict != was {
		c.changed = now
		c.state.public.Store(uint32(f.verdict))
		c.report(f, now)
	}
	if f.verdict != publicSplit {
		c.seen = nil
		c.state.yields.Store(false)
		return nil
	}
	return c.sight(f.others, now)
}

// sight remembers others, and which of them this relay gives way to. The error, if
// it is time for one, names the oldest for which it was so often and long enough.
//
// Never do two leave for each other. A relay says in its answers that it yields
// for c.pace.over at least before it leaves, and what it leaves upon is an answer
// not older than half of that. So of two that are about to, one knows it of the
// other, and there only the greater id leaves. Nor do both stay: each takes its own
// age at the least, so in doubt both yield; and what changes meanwhile, which is
// who holds users' binaries, counts for splitDoubts times c.pace.over only.
func (c *publicCheck) sight(others []rival, now time.Time) error {
	if c.seen == nil {
		c.seen = map[string]*observation{}
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
		confirmed := s.rounds >= splitRounds && o.asked.Sub(s.first) >= c.pace.over && now.Sub(o.asked) <= c.pace.over/2
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
	return fmt.Errorf("refusing to go on: multi-instance deploy detected: relay %s, up %s (since %s by its clock), answers to %s as well, seen %d times within %v; "+
		"each has a registry of its own, and a phone that lands on the wrong one gets a silent 4404 although its binary is online: "+
		"this one (%s, up %s) stops, so that one goes on: %s; run exactly one behind that name, or, for an emergency or a migration only, set %s=1",
		stays.id, age(stays.age(now)), stays.started.Format(time.RFC3339), c.url, s.rounds, now.Sub(s.first).Round(time.Second),
		c.me.id, age(now.Sub(c.began)), why, bypassName)
}

// report logs a verdict that is new.
func (c *publicCheck) report(f roundResult, now time.Time) {
	switch f.verdict {
	case publicVerified:
		c.log.Info("public name verified: it leads to this relay and to no other", "url", c.url, "phones", f.joins)
	case publicSplit:
		next := "the other one stops if it has -public-url, too"
		for _, other := range f.others {
			if stays, why := other.prevails(c.me, false); stays {
				next = fmt.Sprintf("this relay stops if that lasts for %v: %s", c.pace.over, why)
			}
		}
		if c.bypass {
			next = bypassName + "=1: this relay goes on"
		}
		args := []any{"url", c.url, "other", names(f.others), "instance", c.me.id, "age", now.Sub(c.began), "next", next}
		if len(f.others) > 0 {
			args = append(args, "other_age", f.others[0].age(now))
		}
		c.log.Error("multi-instance deploy detected: another relay answers to the public name, and a phone that lands on the wrong one gets 4404 although its binary is online: run exactly one",
			args...)
	case publicNotARelay:
		c.log.Warn("public name not verified: something that is not this relay answers", "url", c.url, "found", f.diagnosis.what, "remedy", f.diagnosis.remedy, "phones", f.joins, "failed", f.failed)
	case publicUnreachable:
		if f.failed < f.joins {
			c.log.Warn("public name not verified: some of the connections through it fail", "url", c.url, "found", f.diagnosis.what, "remedy", f.diagnosis.remedy, "phones", f.joins, "failed", f.failed)
			return
		}
		c.log.Warn("public name not verified: this relay does not reach itself through it, and serves on; behind a home router (hairpin NAT, split DNS) that is common, and no harm if peers do",
			"url", c.url, "found", f.diagnosis.what, "remedy", f.diagnosis.remedy, "phones", f.joins, "failed", f.failed)
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
