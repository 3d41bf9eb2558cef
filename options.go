package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What an operator can set, once: the flag, its variable, its default, what is
// right for it. -h, README.md and every refusal are made of this.

// options is what a relay runs with.
type options struct {
	listen       string
	admin        string // "" is off
	adminAny     bool
	instanceLock []string // in the order in which they are taken
	publicURL    *url.URL // nil: the public name is not checked
	tlsCert      string   // a file; "": plain HTTP
	tlsKey       string
	wakeURL      *url.URL // of a push service, with secrets in it; nil: phones are not woken

	grace time.Duration
	ping  time.Duration
	drain time.Duration

	maxFrame       int
	maxPhones      int
	maxConnections int
	queue          int
	queueTotal     int64
	ratePerMinute  int
	rateBurst      int
	trustedProxies []netip.Prefix
	proxyProtocol  bool

	logFormat string
	logLevel  slog.Level

	// bypass is PYRYCODE_RELAY_SINGLE_INSTANCE=1, which is no flag on purpose.
	bypass bool

	// Fixed by the contract; tests shorten them.
	challengeTimeout time.Duration // an incumbent binary has this long to answer
	messageTimeout   time.Duration // from a message's first byte to its last
	writeTimeout     time.Duration // a peer that takes nothing for this long is gone
	closeTimeout     time.Duration // for the answer to a close frame, and for the FIN behind it
	addressTimeout   time.Duration // an address to listen on has this long to appear
	checkPace        checkPace     // of the check of -public-url
}

// defaultOptions are those of a relay that is told nothing.
func defaultOptions() options {
	o := options{
		challengeTimeout: 5 * time.Second,
		messageTimeout:   30 * time.Second,
		writeTimeout:     10 * time.Second,
		closeTimeout:     5 * time.Second,
		addressTimeout:   time.Minute,
		checkPace:        defaultPace(),
	}
	o.flags()
	return o
}

// flags declares every flag and sets what it is for to its default.
func (o *options) flags() *flag.FlagSet {
	fs := flag.NewFlagSet(programName, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	add(fs, "listen", &o.listen, "127.0.0.1:8080", parseAddress,
		"`address` of the public listener: plain HTTP, for a TLS proxy in front, or TLS with -tls-cert")
	add(fs, "admin", &o.admin, "127.0.0.1:8081", parseAdmin,
		"`address` of the status page and /metrics, loopback only unless -admin-any; \"off\" or an empty value turns it off")
	add(fs, "admin-any", &o.adminAny, false, parseBool,
		"let -admin be any address: whoever reaches it sees how many are connected, how much they send and when, and no content")
	add(fs, "instance-lock", &o.instanceLock, "127.0.0.1:24404", parseLocks,
		"loopback `addresses` to bind and files to lock, which no other relay on this host, or that sees the file, can have as well")
	add(fs, "public-url", &o.publicURL, "", parsePublicURL,
		"the relay's own public `URL`, as wss://relay.example.com: it then checks from outside who answers there")
	add(fs, "tls-cert", &o.tlsCert, "", parseFile,
		"`file` of a certificate and its chain, PEM: with -tls-key the relay speaks TLS itself; both are read again when they change")
	add(fs, "tls-key", &o.tlsKey, "", parseFile, "`file` of the certificate's key, PEM, not open to every user of the host")
	add(fs, "wake-url", &o.wakeURL, "", parseWakeURL,
		"`URL` of an ntfy topic, or of Gotify's /message?token=…: a binary's push_wake makes the relay post a fixed text there")
	add(fs, "grace", &o.grace, 30*time.Second, duration(0, time.Hour), "`duration` for which a claim outlives its binary's connection")
	add(fs, "ping", &o.ping, 30*time.Second, duration(time.Second, time.Hour),
		"`duration` between heartbeats; a peer silent for one more is dead")
	add(fs, "drain", &o.drain, 10*time.Second, duration(time.Second, time.Hour), "`duration` that a shutdown may take")
	add(fs, "max-frame", &o.maxFrame, 256<<10, number(1<<10, 16<<20), "`bytes` of one message, both legs")
	add(fs, "max-phones", &o.maxPhones, 16, number(1, 1<<20), "`phones` per server-id")
	add(fs, "max-connections", &o.maxConnections, 4096, number(1, 1<<20), "live WebSocket `connections`; the next upgrade gets 503")
	add(fs, "queue", &o.queue, 4<<20, number(1<<10, 1<<30), "`bytes` queued per phone")
	add(fs, "queue-total", &o.queueTotal, 256<<20, number[int64](1<<10, 1<<40),
		"`bytes` queued, and of half-received messages, in the whole process")
	add(fs, "rate-per-minute", &o.ratePerMinute, 10, number(0, 1<<20),
		"`upgrades` per client address (IPv4 /32, IPv6 /64) and minute; 0 turns the limit off")
	add(fs, "rate-burst", &o.rateBurst, 20, number(1, 1<<20), "`upgrades` that an address may ask for at once")
	add(fs, "trusted-proxies", &o.trustedProxies, "127.0.0.0/8,::1/128", parsePrefixes,
		"`networks` whose X-Forwarded-For is believed; empty for none")
	add(fs, "proxy-protocol", &o.proxyProtocol, false, parseBool,
		"-trusted-proxies begin every connection with a PROXY header, version 1 or 2; nobody else may connect")
	add(fs, "log-format", &o.logFormat, "text", parseLogFormat, "`format` of the log: text or json")
	add(fs, "log-level", &o.logLevel, "info", parseLevel, "lowest `level` that is logged: debug, info, warn or error")
	return fs
}

// add declares a flag for *p. parse refuses a value by saying what would be right.
func add[T any](fs *flag.FlagSet, name string, p *T, byDefault any, parse func(string) (T, error), usage string) {
	v := &value[T]{p: p, parse: parse}
	if err := v.Set(fmt.Sprint(byDefault)); err != nil {
		panic(fmt.Sprintf("default of -%s: %v", name, err))
	}
	fs.Var(v, name, usage)
}

// value is a flag.Value.
type value[T any] struct {
	p     *T
	parse func(string) (T, error)
	text  string // what *p was parsed from
}

func (v *value[T]) Set(s string) error {
	parsed, err := v.parse(s)
	if err == nil {
		*v.p, v.text = parsed, s
	}
	return err
}

func (v *value[T]) String() string { return v.text }

func (v *value[T]) IsBoolFlag() bool {
	_, ok := any(v.p).(*bool)
	return ok
}

const (
	envPrefix  = "PYRYCODE_RELAY_"
	bypassName = envPrefix + "SINGLE_INSTANCE"
)

// envName is the variable of a flag.
func envName(flag string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// environment is os.Environ by name.
func environment(lines []string) map[string]string {
	env := map[string]string{}
	for _, line := range lines {
		name, value, _ := strings.Cut(line, "=")
		env[name] = value
	}
	return env
}

// otherNames are those of two flags in scripts that start any relay of this
// protocol, the daemon's own test among them.
var otherNames = map[string]string{"insecure-listen": "listen", "metrics-listen": "admin"}

// parseOptions reads the command line, then the environment for what that left
// open. An error names the flag or variable, the value and what would be right.
func parseOptions(args []string, env map[string]string) (options, error) {
	o := defaultOptions()
	fs := o.flags()
	for other, name := range otherNames {
		fs.Var(fs.Lookup(name).Value, other, "")
	}
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return o, err
	} else if err != nil {
		return o, fmt.Errorf("%w (-h lists the flags)", err)
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unknown command %q: the commands are help, version, probe, status and health, each before its own flags; "+
			"-h lists the flags of the relay", fs.Arg(0))
	}
	err := checkVariables(env)
	source := map[string]string{} // of what is not left at its default
	fs.Visit(func(f *flag.Flag) { source[cmp.Or(otherNames[f.Name], f.Name)] = "flag -" + f.Name })
	fs.VisitAll(func(f *flag.Flag) {
		v, set := env[envName(f.Name)]
		if err != nil || !set || source[f.Name] != "" || otherNames[f.Name] != "" {
			return
		}
		source[f.Name] = "variable " + envName(f.Name)
		if bad := f.Value.Set(v); bad != nil {
			err = fmt.Errorf("invalid value %q for %s: %w", v, source[f.Name], bad)
		}
	})
	if v, set := env[bypassName]; err == nil && set {
		if o.bypass = v == "1"; !o.bypass {
			err = fmt.Errorf("invalid value %q for variable %s: want exactly 1 to skip the single-instance checks, "+
				"or the variable unset", v, bypassName)
		}
	}
	if err == nil {
		o.checkPace, err = paceFrom(env)
	}
	if err == nil {
		err = o.validate(func(flag string) string { return cmp.Or(source[flag], "flag -"+flag) })
	}
	if err == nil {
		err = checkPlatform(o, env)
	}
	return o, err
}

// validate looks at what one flag alone cannot tell. source says where the value
// of a flag was set.
func (o *options) validate(source func(flag string) string) error {
	if host, _, _ := net.SplitHostPort(o.admin); o.admin != "" && !o.adminAny && !loopback(host) {
		return fmt.Errorf("invalid value %q for %s: want a loopback address, such as 127.0.0.1:8081, or -admin-any as well",
			o.admin, source("admin"))
	}
	if o.wakeURL != nil && o.wakeURL.Host == "" {
		return fmt.Errorf("invalid value for %s: want https://host/path (it is not shown: there may be a secret in it)", source("wake-url"))
	}
	if need := o.maxFrame + maxSendHeader; o.queue < need {
		return fmt.Errorf("invalid value %d for %s: want at least %d, so that one message of -max-frame bytes fits",
			o.queue, source("queue"), need)
	}
	if o.proxyProtocol && len(o.trustedProxies) == 0 {
		return fmt.Errorf("invalid value \"\" for %s: want the networks that send the header of -proxy-protocol", source("trusted-proxies"))
	}
	if o.queueTotal < int64(o.queue) {
		return fmt.Errorf("invalid value %d for %s: want at least %d, the -queue of one phone", o.queueTotal, source("queue-total"), o.queue)
	}
	return nil
}

func loopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && a.IsLoopback()
}

// serviceVariable is what Kubernetes and Docker put into a container beside a
// service of the relay's own name, as NAME=value. Nobody has misspelled these.
var serviceVariable = regexp.MustCompile(`^PYRYCODE_RELAY_(\w+_)?(SERVICE_HOST=|SERVICE_PORT(_\w+)?=|` +
	`PORT(_\d+_[A-Z]+)?=\w+://|PORT_\d+_[A-Z]+_(PROTO|PORT|ADDR)=)`)

// checkVariables refuses a variable that would be ignored, and names the one that
// is spelled most like it.
func checkVariables(env map[string]string) error {
	known := []string{bypassName}
	new(options).flags().VisitAll(func(f *flag.Flag) { known = append(known, envName(f.Name)) })
	for _, name := range slices.Sorted(maps.Keys(env)) {
		ours := strings.HasPrefix(name, envPrefix) && !serviceVariable.MatchString(name+"="+env[name])
		if !ours || slices.Contains(known, name) || name == paceName {
			continue
		}
		upper := strings.ToUpper(name)
		for other, flag := range otherNames {
			if upper == envName(other) {
				upper = envName(flag)
			}
		}
		nearest := slices.MaxFunc(known, func(a, b string) int { return likeness(upper, a) - likeness(upper, b) })
		return fmt.Errorf("unknown variable %s: do you mean %s? (-h lists them; unset what is not for this relay)", name, nearest)
	}
	return nil
}

// likeness counts what a and b have in common at their beginnings and ends against what
// b has beside that.
func likeness(a, b string) int {
	n := min(len(a), len(b))
	head, tail := 0, 0
	for head < n && a[head] == b[head] {
		head++
	}
	for head+tail < n && a[len(a)-1-tail] == b[len(b)-1-tail] {
		tail++
	}
	return 2*(head+tail) - len(b)
}

// writeUsage prints the manual.
func writeUsage(w io.Writer) {
	fmt.Fprint(w, `pyrycode-relay lets a phone reach a coding agent at home. Run exactly one.

  pyrycode-relay [flags]        run the relay
  pyrycode-relay probe URL      check a relay from outside (probe -h)
  pyrycode-relay status [-watch]
                                ask the running relay, on its -admin, how it is
  pyrycode-relay health         the same in one line, for containers: exit code 0 or 1
  pyrycode-relay version        version, VCS revision, Go version (or --version)
  pyrycode-relay help           this text (or -h)

Each flag is also an environment variable; the command line wins. A variable
that begins with PYRYCODE_RELAY_ and is none of these is refused.

`)
	new(options).flags().VisitAll(func(f *flag.Flag) {
		name, usage := flag.UnquoteUsage(f)
		head := strings.TrimSpace("-" + f.Name + " " + name) // a flag that is true or false has no name for its value
		fmt.Fprintf(w, "  %s\n        %s\n        default %q, variable %s\n", head, usage, f.DefValue, envName(f.Name))
	})
	fmt.Fprintf(w, `
  --insecure-listen and --metrics-listen are other names of -listen and -admin.

  %s=1 skips the single-instance checks: for
        emergencies and migrations, not for production. No other value is taken.

Signals: SIGTERM, SIGINT and SIGHUP drain and stop; a second one stops at once.
        With -tls-cert SIGHUP reads the certificate again. Under nohup it does nothing.
Exit codes: 0 asked to stop, 1 failure while running, 2 refused to start.
A start that fails says why in one plain line, whatever -log-format is; an
address in use is exit code 1.
`, bypassName)
}

// ---- kinds of values ----

func number[T int | int64](low, high T) func(string) (T, error) {
	return func(s string) (T, error) {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < int64(low) || n > int64(high) {
			return 0, fmt.Errorf("want a whole number from %d to %d", low, high)
		}
		return T(n), nil
	}
}

func duration(low, high time.Duration) func(string) (time.Duration, error) {
	return func(s string) (time.Duration, error) {
		d, err := time.ParseDuration(s)
		if err != nil || d < low || d > high {
			return 0, fmt.Errorf("want a duration from %v to %v, such as 30s", low, high)
		}
		return d, nil
	}
}

func parseBool(s string) (bool, error) {
	b, err := strconv.ParseBool(s)
	if err != nil {
		return false, errors.New("want true or false")
	}
	return b, nil
}

func parseFile(s string) (string, error) { return s, nil }

func parseLogFormat(s string) (string, error) {
	if s != "text" && s != "json" {
		return "", errors.New("want text or json")
	}
	return s, nil
}

func parseLevel(s string) (slog.Level, error) {
	for _, l := range [...]slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
		if s == strings.ToLower(l.String()) {
			return l, nil
		}
	}
	return 0, errors.New("want debug, info, warn or error")
}

func parseAddress(s string) (string, error) {
	_, port, err := net.SplitHostPort(s)
	if _, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil {
		return "", errors.New("want host:port, such as 127.0.0.1:8080")
	}
	return s, nil
}

func parseAdmin(s string) (string, error) {
	if s == "off" || s == "" {
		return "", nil
	}
	if _, err := parseAddress(s); err != nil {
		return "", errors.New("want host:port, such as 127.0.0.1:8081, or off")
	}
	return s, nil
}

// parseLocks takes no host name, since one name can stand for two addresses, and no
// port 0, since that would be another port for every relay. All relays take their
// locks in one order, so that of some that start at once one gets all: ports first,
// because their holders say more than files do.
func parseLocks(s string) (all []string, err error) {
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		a, err := netip.ParseAddrPort(part)
		switch {
		case err == nil && a.Addr().IsLoopback() && a.Port() != 0:
			part = netip.AddrPortFrom(a.Addr().Unmap(), a.Port()).String()
		case path.IsAbs(part) && path.Clean(part) != "/" && flock != nil:
			part = path.Clean(part)
		default:
			return nil, fmt.Errorf("want a loopback address and a fixed port, such as 127.0.0.1:24404, "+
				"or (not on Windows) a whole path, such as /run/lock/pyrycode-relay.lock, or several with commas between, "+
				"the same for every relay: %q is neither", part)
		}
		all = append(all, part)
	}
	slices.SortFunc(all, func(a, b string) int { return cmp.Compare(b, a) })
	return slices.Compact(all), nil
}

func parsePublicURL(s string) (*url.URL, error) {
	if s == "" {
		return nil, nil
	}
	return parseRelayURL(s)
}

// parseWakeURL leaves it to validate to refuse a URL, since a flag's own refusal shows
// its value.
func parseWakeURL(s string) (*url.URL, error) {
	if s == "" {
		return nil, nil
	}
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" {
		u = new(url.URL)
	}
	return u, nil
}

// parseRelayURL reads a relay's base address as peers are given it.
func parseRelayURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "ws" && u.Scheme != "wss" || u.Hostname() == "" || u.User != nil ||
		u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("want wss://host or wss://host:port (ws:// without TLS), and no path")
	}
	if _, err := strconv.ParseUint(u.Port(), 10, 16); u.Port() != "" && err != nil {
		return nil, errors.New("want a port up to 65535")
	}
	base := &url.URL{Scheme: u.Scheme, Host: u.Host}
	// net/url reads some bytes in the zone of an address that it does not write so.
	if again, err := url.Parse(base.String()); err != nil || again.Host != base.Host {
		return nil, fmt.Errorf("want a host name or an address: %q is neither", u.Host)
	}
	return base, nil
}

func parsePrefixes(s string) (all []netip.Prefix, err error) {
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		n, err := netip.ParsePrefix(part)
		if a, addrErr := netip.ParseAddr(part); err != nil && addrErr == nil {
			n, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil {
			return nil, fmt.Errorf("want addresses or networks with commas between, such as 10.0.0.5,fd00::/8: %q is neither", part)
		}
		all = append(all, n.Masked())
	}
	return all, nil
}
