package main

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"
)

// What stands between a client and a relay, in the words of whoever has to
// repair it.

// fault is something that is wrong, and what to do about it.
type diagnosis struct{ what, remedy string }

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

// plain escapes what a terminal would act on: control characters, and those that
// change the direction of text. Errors of other packages hold what a server said.
func plain(s string) string {
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

// explain tells what a failed dial, or a session's early end, means.
func diagnose(base *url.URL, err error) diagnosis {
	f := diagnoseStep(base, err)
	f.what = plain(f.what)
	return f
}

func diagnoseStep(base *url.URL, err error) diagnosis {
	var e *dialError
	if !errors.As(err, &e) {
		return diagnoseEnd(err)
	}
	switch e.step {
	case stepDNS:
		return diagnoseDNS(base, e.err)
	case stepTCP:
		return diagnoseTCP(e.err)
	case stepTLS:
		return diagnoseTLS(base, e.err)
	}
	if e.trace.answer == nil {
		f := diagnosis{"no HTTP answer: " + e.err.Error(), "check that the port is the one of the proxy, and that the proxy's backend is the relay"}
		if base.Scheme == "ws" {
			f.remedy += "; if the port speaks TLS, use wss://"
		}
		return f
	}
	return diagnoseAnswer(base, e.trace.answer, e.err)
}

func diagnoseDNS(base *url.URL, err error) diagnosis {
	var d *net.DNSError
	if errors.As(err, &d) && d.IsNotFound {
		return diagnosis{fmt.Sprintf("the name %s is not known here", base.Hostname()),
			"correct the name, or give it an A or AAAA record; a home network may answer for other names than the world does (split DNS)"}
	}
	return diagnosis{fmt.Sprintf("looking up %s failed: %v", base.Hostname(), err), "check this machine's resolver (/etc/resolv.conf)"}
}

func diagnoseTCP(err error) diagnosis {
	what := strings.ReplaceAll(err.Error(), "\n", "; ")
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return diagnosis{"nothing listens there: " + what, "start the proxy (or the relay) there, or correct the port; from inside the relay's own network the router may lack hairpin NAT: try from outside"}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return diagnosis{"nobody answers there: " + what,
			"open the port in the firewall and forward it in the router; from inside the relay's own network the router may lack hairpin NAT: try from outside"}
	}
	return diagnosis{what, "check the address and this machine's route to it"}
}

func diagnoseTLS(base *url.URL, err error) diagnosis {
	var (
		invalid x509.CertificateInvalidError
		name    x509.HostnameError
		unknown x509.UnknownAuthorityError
		record  tls.RecordHeaderError
		alert   tls.AlertError
	)
	switch {
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		c, now := invalid.Cert, time.Now()
		if now.Before(c.NotBefore) {
			return diagnosis{"the certificate is valid from " + day(c.NotBefore) + " only", "check the clock of this machine and of the one that made the certificate"}
		}
		return diagnosis{fmt.Sprintf("the certificate expired on %s, %s ago", day(c.NotAfter), age(now.Sub(c.NotAfter))),
			"renew the certificate, have the proxy load it, and find out why that did not happen by itself; check this machine's clock"}
	case errors.As(err, &name):
		return diagnosis{fmt.Sprintf("the certificate is for %s, not for %s", certificateNames(name.Certificate), base.Hostname()),
			"give the proxy a certificate for " + base.Hostname() + ", or use a name that the certificate has"}
	case errors.As(err, &unknown):
		return diagnosis{"the certificate's issuer is not trusted here",
			"use a certificate of a public authority, with its chain (fullchain.pem): phones do not trust this one either"}
	case errors.As(err, &record):
		return diagnosis{"what answers does not speak TLS", "use the proxy's TLS port; for a relay without a proxy in front use ws://"}
	case errors.As(err, &alert):
		return diagnosis{"the server refused the TLS handshake: " + alert.Error(), "give the proxy a certificate for " + base.Hostname()}
	}
	return diagnosis{"the TLS handshake failed: " + err.Error(), "check that the port speaks TLS, and what the proxy logs"}
}

// certificateNames lists the first names that a certificate is for.
func certificateNames(c *x509.Certificate) string {
	const shown = 5
	var names []string
	for i, n := range c.DNSNames {
		if i == shown {
			names = append(names, "…")
			break
		}
		names = append(names, quote(n))
	}
	return cmp.Or(strings.Join(names, ", "), "no name")
}

// passUpgrade is what proxies forget.
const passUpgrade = `have the proxy pass the upgrade on (nginx: proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";)`

// explainAnswer tells what an answer other than a good 101 means.
func diagnoseAnswer(base *url.URL, a *answer, err error) diagnosis {
	if a.code == http.StatusSwitchingProtocols {
		return diagnosis{fmt.Sprintf("%s is no good upgrade: %v", quote(a.status), err), "have the proxy leave the answer's Upgrade, Connection and Sec-WebSocket-Accept as the relay sent them"}
	}
	if _, relay := a.identity(); relay {
		what := fmt.Sprintf("the relay refuses with %s: %s", quote(a.status), quote(a.text))
		switch a.code {
		case http.StatusUpgradeRequired:
			return diagnosis{what, passUpgrade}
		case http.StatusBadRequest:
			return diagnosis{what, "have the proxy pass user-agent and the x-pyrycode-* headers on unchanged"}
		case http.StatusTooManyRequests:
			return diagnosis{what, "wait a minute, or raise -rate-per-minute; if everybody gets this, the proxy's address is not in -trusted-proxies"}
		}
		return diagnosis{what, "wait, and try again"}
	}
	what := "something that is not a relay answers " + quote(a.status)
	if s := a.header.Get("Server"); s != "" {
		what += " (server: " + quote(s) + ")"
	}
	switch c := a.code; {
	case c >= 300 && c < 400:
		where := "nowhere"
		if s := a.header.Get("Location"); s != "" {
			where = quote(s)
		}
		return diagnosis{what + ", a redirect to " + where, "use the address it leads to: peers follow no redirect"}
	case c == http.StatusUnauthorized || c == http.StatusForbidden || c == http.StatusProxyAuthRequired:
		return diagnosis{what, "let /v1/ and /v2/ through to the relay without a login"}
	case c == http.StatusTooManyRequests:
		return diagnosis{what, "wait a minute: the proxy in front limits upgrades"}
	case c >= 502 && c <= 504:
		return diagnosis{what + ": the proxy does not reach a relay behind it", "start the relay, and give the proxy its -listen address as backend"}
	case c == http.StatusBadRequest && base.Scheme == "ws":
		return diagnosis{what, "if the port speaks TLS, use wss://; otherwise " + passUpgrade}
	case c == http.StatusUpgradeRequired:
		return diagnosis{what, passUpgrade}
	}
	return diagnosis{what, "correct the address, or have the proxy pass /v1/ and /v2/ on to the relay"}
}

// explainEnd tells what it means that a session with a relay did not last.
func diagnoseEnd(err error) diagnosis {
	var end *endError
	switch {
	case !errors.As(err, &end):
		return diagnosis{err.Error(), "have the proxy pass WebSocket frames on at once, without buffering"}
	case end.err != nil:
		return diagnosis{end.Error(), "look at the proxy's log: it cut a connection that was open"}
	case end.code == int(endShutdown.code()) && end.reason == endShutdown.String():
		return diagnosis{end.Error(), "the relay was stopped just then: look at its log, and try again"}
	case end.code == int(endShutdown.code()):
		return diagnosis{end.Error(), "the proxy was reloaded or stopped, and says goodbye to every session when it is: " +
			"have it leave them alone (Caddy: stream_close_delay 5m in reverse_proxy), and reload it less often"}
	}
	return diagnosis{end.Error(), "look at the relay's log"}
}

func day(t time.Time) string { return t.UTC().Format(time.DateOnly) }

// age is a duration as a person says it.
func age(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return d.Round(time.Second).String()
}
