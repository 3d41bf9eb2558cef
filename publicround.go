package main

import (
	"cmp"
	"context"
	"fmt"
	mrand "math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"
)

// One round of the check of the public name: a claim, and phones that join it,
// all from outside. A phone that gets 4404 while the claim is held is the failure
// that is looked for; who gave an answer stands in its instanceHeader.

const (
	// maxClaims is how many server-ids are tried until a claim lands here. A
	// balancer that sticks by server-id brings every other one to the other of
	// two relays, which is no fault as long as phones follow; with four relays
	// one round in a hundred has no claim here.
	maxClaims = 16
	// maxMisses is how many claims may reach no relay at all.
	maxMisses = 3
	// elsewhereJoins are the phones that look whether they follow a claim on
	// another relay, for the first elsewhereLooks of such claims.
	elsewhereJoins = 2
	elsewhereLooks = 4
	// longestPause is what two connections are apart at the most.
	longestPause = 150 * time.Millisecond
)

// publicPath is the way through the public name.
type publicPath struct {
	me       identity
	standing func() standing // of this relay
	base     *url.URL
	keys     *probeKeys
	pause    time.Duration // at most, between two connections

	dialer dialer
}

// reach is whom one connection reached.
type outcome struct {
	kind outcomeKind
	who  rival // of reachOther; zero if it does not say
	err  error // of reachStranger and reachNobody
}

// rival is another relay as one of its answers shows it, beside this one at that
// moment.
type rival struct {
	identity
	asked  time.Time // the answer is from then or a little later
	told   bool      // it tells its standing, which older relays do not
	theirs standing
	mine   standing // when it was asked, so that its age is the least it can be
}

// sameAge is the difference between ages that two relays do not argue about.
const sameAge = time.Second

// prevails reports whether the other relay is the one to stay, and why. Both come
// to the same result, whatever their clocks say of the date: who holds binaries of
// users, unless the ages alone are to count, then who has run for longer, then the
// smaller id.
func (o *rival) prevails(me identity, agesAlone bool) (stays bool, why string) {
	switch ahead := o.mine.age - o.theirs.age; {
	case !o.told:
		return o.olderThan(me), "it is of an older version, and started first by its clock"
	case o.theirs.users != o.mine.users && !agesAlone:
		return o.theirs.users, "it holds binaries of users, and this one holds none"
	case ahead > sameAge || ahead < -sameAge:
		return ahead < 0, "it has run for longer"
	}
	return o.id < me.id, "both have run for the same time, and its id is the smaller one"
}

// age is how long the other has run.
func (o *rival) age(now time.Time) time.Duration {
	if o.told {
		return o.theirs.age + now.Sub(o.asked)
	}
	return now.Sub(o.started)
}

type outcomeKind uint8

const (
	outcomeMe outcomeKind = iota
	outcomeOther
	outcomeStranger // an answer, and not of a relay that says so
	outcomeNobody
)

// tally adds up what a round's connections reached.
type roundTally struct {
	base      *url.URL
	joins     int
	failed    int
	split     bool
	others    []rival // the latest answer of each
	stranger  error
	unreached error
}

func (t *roundTally) add(r outcome) {
	switch r.kind {
	case outcomeOther:
		t.split = true
		if r.who.id != "" {
			t.others = slices.DeleteFunc(t.others, func(o rival) bool { return o.id == r.who.id })
			t.others = append(t.others, r.who)
		}
	case outcomeStranger:
		t.stranger = cmp.Or(t.stranger, r.err)
	case outcomeNobody:
		t.unreached = cmp.Or(t.unreached, r.err)
	}
}

// finding is the verdict: what is worst to miss comes first.
func (t *roundTally) result() roundResult {
	f := roundResult{verdict: publicVerified, joins: t.joins, failed: t.failed}
	switch {
	case t.split:
		now := time.Now()
		slices.SortFunc(t.others, func(a, b rival) int { return cmp.Compare(b.age(now), a.age(now)) })
		f.verdict, f.others = publicSplit, t.others
	case t.stranger != nil:
		f.verdict, f.diagnosis = publicNotARelay, diagnose(t.base, t.stranger)
	case t.unreached != nil:
		f.verdict, f.diagnosis = publicUnreachable, diagnose(t.base, t.unreached)
	}
	return f
}

// round looks once, with a number of phones.
func (p *publicPath) round(ctx context.Context, joins int) roundResult {
	p.dialer.base = p.base
	t := &roundTally{base: p.base}
	var elsewhere []outcome
	for misses := 0; len(elsewhere)+misses < maxClaims && misses < maxMisses && ctx.Err() == nil; {
		follow := elsewhereJoins
		if len(elsewhere) >= elsewhereLooks {
			follow = 0
		}
		switch r := p.tryID(ctx, joins, follow, t); r.kind {
		case outcomeMe:
			return t.result()
		case outcomeOther:
			elsewhere = append(elsewhere, r)
			if t.split {
				t.add(r)
				return t.result()
			}
		default:
			misses++
			t.add(r)
		}
		p.rest(ctx)
	}
	for _, r := range elsewhere {
		t.add(r)
	}
	return t.result()
}

// tryID claims a new server-id and joins it, with so many phones if the claim is
// held here, and so many if it is elsewhere. It returns whom the claim reached;
// the phones go into t.
func (p *publicPath) tryID(ctx context.Context, joins, follow int, t *roundTally) outcome {
	id := probeID()
	claim, at := p.open(ctx, roleBinary, id)
	var echo sync.WaitGroup
	defer echo.Wait()
	if claim != nil {
		defer claim.close()
		if at.kind == outcomeStranger {
			return at
		}
		if err := claim.settled(); err != nil {
			claim.close()
			claim = nil
			if at.kind == outcomeMe {
				// The name leads here, and on the way frames are lost.
				return outcome{kind: outcomeNobody, err: err}
			}
		} else {
			echo.Go(claim.echo) // until claim is closed
		}
	}
	switch at.kind {
	case outcomeMe:
		for range joins {
			p.rest(ctx)
			r := p.join(ctx, id, claim)
			t.joins++
			if r.kind != outcomeMe {
				t.failed++
			}
			t.add(r)
		}
	case outcomeOther:
		for range follow {
			p.rest(ctx)
			switch r := p.join(ctx, id, nil); {
			case r.kind == outcomeMe:
				t.split = true // the claim is over there, and this phone is here
			case r.kind == outcomeOther && r.who.id != at.who.id:
				t.add(r)
			}
		}
	}
	return at
}

// open dials one leg and tells who answered. The session is nil where there is none.
func (p *publicPath) open(ctx context.Context, role role, id string) (*wsPeer, outcome) {
	nonce := p.keys.issue(id)
	peer, err := p.dialer.dial(ctx, role, id, nonce)
	came := p.keys.withdraw(nonce)
	a := answerOf(peer, err)
	who, ok := a.identity()
	switch {
	case ok && who.id == p.me.id && err != nil && (a.code == http.StatusBadRequest || a.code == http.StatusUpgradeRequired):
		return nil, outcome{kind: outcomeNobody, err: err} // peers get no further: something on the way takes headers away
	case ok && who.id == p.me.id, !ok && a != nil && came: // a proxy may take the header away
		return peer, outcome{kind: outcomeMe}
	case ok:
		return peer, outcome{kind: outcomeOther, who: p.beside(who, a)}
	case a != nil:
		if err == nil {
			err = fmt.Errorf("%s comes without %s: a relay of an older version, or a proxy that takes that header away", quote(a.status), instanceHeader)
		}
		return peer, outcome{kind: outcomeStranger, err: err}
	}
	return nil, outcome{kind: outcomeNobody, err: err}
}

// beside holds what another relay says of itself against this one at that moment.
func (p *publicPath) beside(who identity, a *answer) rival {
	o := rival{identity: who, asked: a.asked, mine: p.standing()}
	o.mine.age -= time.Since(a.asked)
	o.theirs, o.told = a.standing()
	return o
}

// join is one phone. With a claim that is held here, it must get a frame there
// and back.
func (p *publicPath) join(ctx context.Context, id string, claim *wsPeer) outcome {
	ph, r := p.open(ctx, rolePhone, id)
	if ph == nil {
		return r
	}
	defer ph.close()
	if claim == nil || r.kind == outcomeOther {
		return r
	}
	err := ph.roundTrip([]byte(`"` + id + `"`))
	switch {
	case err == nil:
		return outcome{kind: outcomeMe} // whatever became of the header: the frame was here
	case r.kind == outcomeStranger && wentAstray(err, claim):
		return outcome{kind: outcomeOther}
	case r.kind == outcomeStranger:
		return r
	}
	return outcome{kind: outcomeNobody, err: err}
}

// rest is a pause of random length, so that of two relays that check at the same
// time behind a round robin each does not get just its own.
func (p *publicPath) rest(ctx context.Context) {
	if p.pause <= 0 {
		return
	}
	t := time.NewTimer(mrand.N(p.pause))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
