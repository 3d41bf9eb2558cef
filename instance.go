package main

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Who this process is, and what is known of its being the only one.

// instanceHeader is in every answer of the WebSocket endpoints: who gave it.
const instanceHeader = "X-Pyrycode-Relay-Instance"

// standingHeader is beside it: what decides which of two relays stays. It is a
// header of its own, because older relays read the other to its end.
const standingHeader = "X-Pyrycode-Relay-Standing"

// identity tells one relay process from another. Neither part is a secret.
type identity struct {
	id      string // 16 hexadecimal digits
	started time.Time
}

func newIdentity(now time.Time) identity {
	var b [8]byte
	rand.Read(b[:])
	return identity{hex.EncodeToString(b[:]), now.UTC().Truncate(time.Millisecond)}
}

// String is the identity as it stands in instanceHeader: id, start time.
func (i identity) String() string { return i.id + ", " + i.started.Format(time.RFC3339Nano) }

// parseIdentity reads an instanceHeader.
func parseIdentity(s string) (identity, error) {
	id, at, ok := strings.Cut(s, ", ")
	if b, err := hex.DecodeString(id); !ok || err != nil || len(b) != 8 {
		return identity{}, fmt.Errorf("%q is not an instance: want 16 hexadecimal digits, a comma and a start time", s)
	}
	started, err := time.Parse(time.RFC3339Nano, at)
	if err != nil {
		return identity{}, fmt.Errorf("start time of instance %s: %w", id, err)
	}
	// Any other year cannot be written again, not even as JSON.
	if started = started.UTC(); started.Year() < 1 || started.Year() > 9999 {
		return identity{}, fmt.Errorf("start time of instance %s: %q is no such time", id, at)
	}
	return identity{id, started}, nil
}

// olderThan is how older relays decide which of two instances stays, by clocks
// that may be wrong: the one that started first; at equal times the smaller id.
func (i identity) olderThan(other identity) bool {
	if !i.started.Equal(other.started) {
		return i.started.Before(other.started)
	}
	return i.id < other.id
}

// standing is what decides which of two relays stays.
type standing struct {
	age    time.Duration // since the start, by a monotonic clock: nobody sets that
	users  bool          // it holds claims of users' binaries, graces included
	yields bool          // it is about to give way to another
}

// String is the standing as it is in standingHeader: seconds, then words.
func (s standing) String() string {
	text := strconv.FormatFloat(s.age.Seconds(), 'f', 3, 64)
	if s.users {
		text += ", users"
	}
	if s.yields {
		text += ", yields"
	}
	return text
}

// parseStanding reads a standingHeader. Words that this relay does not know are
// for later ones.
func parseStanding(text string) (s standing, err error) {
	const longest = 100 * 365 * 24 * 60 * 60
	age, words, _ := strings.Cut(text, ",")
	seconds, err := strconv.ParseFloat(age, 64)
	if err != nil || !(seconds >= 0 && seconds <= longest) {
		return standing{}, fmt.Errorf("%s is not a standing: want seconds, and words behind commas", quote(text))
	}
	s.age = time.Duration(seconds * float64(time.Second))
	for word := range strings.SplitSeq(words, ",") {
		switch strings.TrimSpace(word) {
		case "users":
			s.users = true
		case "yields":
			s.yields = true
		}
	}
	return s, nil
}

// publicVerdict is what the check through the public URL found.
type publicVerdict uint8

const (
	publicOff         publicVerdict = iota // no -public-url
	publicPending                          // the first round is not over
	publicVerified                         // all connections reached this process
	publicSplit                            // another relay answers, too
	publicNotARelay                        // something else answers
	publicUnreachable                      // nothing does
	publicVerdictCount
)

var publicWords = [publicVerdictCount]string{"off", "pending", "verified", "split", "not-a-relay", "unreachable"}

func (v publicVerdict) String() string { return publicWords[v] }

// instanceState is what the checks have found so far, for /healthz, /metrics and
// standingHeader.
type instanceState struct {
	bypassed atomic.Bool   // PYRYCODE_RELAY_SINGLE_INSTANCE=1: the instance lock decides nothing
	public   atomic.Uint32 // a publicVerdict
	yields   atomic.Bool   // this relay is about to give way to another
}

func (s *instanceState) verdict() publicVerdict { return publicVerdict(s.public.Load()) }

// probeHeader carries the nonce by which the relay knows its own check when it
// comes back through the public URL.
const probeHeader = "X-Pyrycode-Relay-Probe"

// probePrefix begins the server-ids of checks and probes, which are no users'.
const probePrefix = "probe-"

// probeKeys are the nonces under way. Each is random, known to this process only,
// good for one upgrade to one server-id, and forgotten once that upgrade has been
// answered, so that another relay or a proxy that sees one pass by has no use for it.
type probeKeys struct{ serverIDs sync.Map } // by nonce

// issue makes a nonce for one upgrade to a server-id.
func (p *probeKeys) issue(serverID string) string {
	nonce := rand.Text()
	p.serverIDs.Store(nonce, serverID)
	return nonce
}

// valid reports whether a nonce is for serverID, and uses it up.
func (p *probeKeys) valid(serverID, nonce string) bool {
	return p.serverIDs.CompareAndDelete(nonce, serverID)
}

// withdraw forgets a nonce, and reports whether it has come back, and so has reached
// this relay.
func (p *probeKeys) withdraw(nonce string) (used bool) {
	_, unused := p.serverIDs.LoadAndDelete(nonce)
	return !unused
}
