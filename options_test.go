package main

import (
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Every flag: on the command line, as a variable, and what is no value for it.

// flagCases has one entry for each flag; TestEveryFlagHasACase counts them.
var flagCases = []struct {
	flag  string
	good  string
	other string // another good value
	get   func(options) any
	want  any // what get returns for good
	bad   []string
	right string // in the refusal of each bad one
}{
	{flag: "listen", good: "0.0.0.0:80", other: "[::1]:8080", get: func(o options) any { return o.listen }, want: "0.0.0.0:80",
		bad: []string{"", "8080", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:+1", "off"}, right: "127.0.0.1:8080"},
	{flag: "admin", good: "off", other: "localhost:1", get: func(o options) any { return o.admin }, want: "",
		bad: []string{"8081", "no", "127.0.0.1:x"}, right: "or off"},
	{flag: "admin-any", good: "true", other: "false", get: func(o options) any { return o.adminAny }, want: true,
		bad: []string{"", "yes", "2"}, right: "true or false"},
	{flag: "instance-lock", good: "[::1]:24404", other: "127.0.0.2:1", get: func(o options) any { return o.instanceLock }, want: "[::1]:24404",
		bad: []string{"", "127.0.0.1:0", "localhost:24404", "0.0.0.0:24404", "192.0.2.1:24404", "[::]:24404", ":24404", "127.0.0.1", "off"}, right: "a loopback address and a fixed port, such as 127.0.0.1:24404"},
	{flag: "public-url", good: "wss://relay.example.com", other: "ws://127.0.0.1:8080/", get: func(o options) any { return o.publicURL.String() }, want: "wss://relay.example.com",
		bad: []string{"relay.example.com", "https://relay.example.com", "wss://", "wss://u@relay.example.com", "wss://relay.example.com/v2/server", "wss://relay.example.com/?a=b"}, right: "wss://host"},
	{flag: "grace", good: "0s", other: "1m", get: func(o options) any { return o.grace }, want: time.Duration(0),
		bad: []string{"", "30", "-1s", "2h", "soon"}, right: "a duration from 0s to 1h0m0s, such as 30s"},
	{flag: "ping", good: "1s", other: "1m", get: func(o options) any { return o.ping }, want: time.Second,
		bad: []string{"", "30", "0s", "999ms", "2h"}, right: "a duration from 1s to 1h0m0s"},
	{flag: "drain", good: "1m", other: "2s", get: func(o options) any { return o.drain }, want: time.Minute,
		bad: []string{"", "10", "0s", "61m"}, right: "a duration from 1s to 1h0m0s"},
	{flag: "max-frame", good: "1024", other: "2048", get: func(o options) any { return o.maxFrame }, want: 1024,
		bad: []string{"", "256KiB", "1023", "16777217", "1e6"}, right: "a whole number from 1024 to 16777216"},
	{flag: "max-phones", good: "1", other: "2", get: func(o options) any { return o.maxPhones }, want: 1,
		bad: []string{"", "0", "many"}, right: "a whole number from 1 to "},
	{flag: "max-connections", good: "1", other: "2", get: func(o options) any { return o.maxConnections }, want: 1,
		bad: []string{"", "0", "-1", "99999999999999999999"}, right: "a whole number from 1 to "},
	{flag: "queue", good: "1048576", other: "2097152", get: func(o options) any { return o.queue }, want: 1 << 20,
		bad: []string{"", "0", "4MiB"}, right: "a whole number from 1024 to "},
	{flag: "queue-total", good: "4194304", other: "8388608", get: func(o options) any { return o.queueTotal }, want: int64(4 << 20),
		bad: []string{"", "0", "1.5"}, right: "a whole number from 1024 to "},
	{flag: "rate-per-minute", good: "0", other: "5", get: func(o options) any { return o.ratePerMinute }, want: 0,
		bad: []string{"", "-1", "off"}, right: "a whole number from 0 to "},
	{flag: "rate-burst", good: "1", other: "5", get: func(o options) any { return o.rateBurst }, want: 1,
		bad: []string{"", "0"}, right: "a whole number from 1 to "},
	{flag: "trusted-proxies", good: "10.1.2.3/8, fd00::1", other: "", get: func(o options) any { return fmt.Sprint(o.trustedProxies) },
		want: fmt.Sprint([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::1/128")}),
		bad:  []string{"proxy", "10.0.0.0/33", "10.0.0.1;10.0.0.2"}, right: "addresses or networks with commas between"},
	{flag: "log-format", good: "json", other: "text", get: func(o options) any { return o.logFormat }, want: "json",
		bad: []string{"", "JSON", "logfmt"}, right: "text or json"},
	{flag: "log-level", good: "debug", other: "error", get: func(o options) any { return o.logLevel }, want: slog.LevelDebug,
		bad: []string{"", "INFO", "trace", "0"}, right: "debug, info, warn or error"},
}

func parse(env map[string]string, args ...string) (options, error) {
	return parseOptions(args, env)
}

func TestFlags(t *testing.T) {
	t.Parallel()
	for _, c := range flagCases {
		t.Run(c.flag, func(t *testing.T) {
			t.Parallel()
			name := envName(c.flag)
			for _, way := range []struct {
				what string
				env  map[string]string
				args []string
			}{
				{"flag", nil, []string{"-" + c.flag + "=" + c.good}},
				{"variable", map[string]string{name: c.good}, nil},
				{"flag over variable", map[string]string{name: c.other}, []string{"-" + c.flag + "=" + c.good}},
				{"flag over unusable variable", map[string]string{name: "\x00"}, []string{"-" + c.flag + "=" + c.good}},
			} {
				o, err := parse(way.env, way.args...)
				if err != nil {
					t.Errorf("%s: %v", way.what, err)
				} else if got := c.get(o); got != c.want {
					t.Errorf("%s: got %v, want %v", way.what, got, c.want)
				}
			}
			for _, v := range c.bad {
				code, _, stderr := runOnce(nil, "-"+c.flag+"="+v)
				if code != 2 {
					t.Errorf("-%s=%s: exit code %d, want 2", c.flag, v, code)
				}
				wantRefusal(t, stderr, "-"+c.flag, fmt.Sprintf("%q", v), c.right)
				code, _, stderr = runOnce(map[string]string{name: v})
				if code != 2 {
					t.Errorf("%s=%s: exit code %d, want 2", name, v, code)
				}
				wantRefusal(t, stderr, "variable "+name, fmt.Sprintf("%q", v), c.right)
			}
		})
	}
}

func TestEveryFlagHasACase(t *testing.T) {
	t.Parallel()
	o := defaultOptions()
	want := flagNames(&o)
	got := map[string]bool{}
	for _, c := range flagCases {
		got[c.flag] = true
	}
	for _, name := range want {
		if !got[name] {
			t.Errorf("no case for -%s", name)
		}
	}
	if len(flagCases) != len(want) {
		t.Errorf("%d cases for %d flags", len(flagCases), len(want))
	}
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	want := map[string]string{
		"listen": "127.0.0.1:8080", "admin": "127.0.0.1:8081", "admin-any": "false", "instance-lock": "127.0.0.1:24404", "public-url": "",
		"grace": "30s", "ping": "30s", "drain": "10s", "max-frame": "262144", "max-phones": "16", "max-connections": "4096",
		"queue": "4194304", "queue-total": "268435456", "rate-per-minute": "10", "rate-burst": "20",
		"trusted-proxies": "127.0.0.0/8,::1/128", "log-format": "text", "log-level": "info",
	}
	o, err := parse(nil)
	if err != nil {
		t.Fatal(err)
	}
	fs := o.flags()
	for name, value := range want {
		if got := fs.Lookup(name).DefValue; got != value {
			t.Errorf("-%s is %q by default, want %q", name, got, value)
		}
	}
	if n := len(flagNames(&o)); n != len(want) {
		t.Errorf("%d flags, want %d", n, len(want))
	}
}

// Values that are unusable only beside others, by the name by which they were set.
func TestFlagsThatDoNotFit(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		env   map[string]string
		args  []string
		words []string
	}{
		{nil, []string{"-admin", "0.0.0.0:8081"}, []string{"flag -admin", `"0.0.0.0:8081"`, "a loopback address", "-admin-any"}},
		{nil, []string{"-admin", ":8081"}, []string{"flag -admin", `":8081"`, "a loopback address"}},
		{nil, []string{"-admin", "relay.example.com:8081"}, []string{"flag -admin", "a loopback address"}},
		{map[string]string{"PYRYCODE_RELAY_ADMIN": "192.0.2.1:8081"}, nil, []string{"variable PYRYCODE_RELAY_ADMIN", "a loopback address"}},
		{nil, []string{"-queue", "262144"}, []string{"flag -queue", "262144", "want at least 262154", "-max-frame"}},
		{nil, []string{"-max-frame", "8388608"}, []string{"-queue", "4194304", "want at least 8388618", "-max-frame"}},
		{map[string]string{"PYRYCODE_RELAY_QUEUE_TOTAL": "4194303"}, nil, []string{"variable PYRYCODE_RELAY_QUEUE_TOTAL", "4194303", "want at least 4194304", "-queue"}},
	} {
		code, _, stderr := runOnce(c.env, c.args...)
		if code != 2 {
			t.Errorf("%v %q: exit code %d, want 2", c.env, c.args, code)
		}
		wantRefusal(t, stderr, c.words...)
	}
	for _, args := range [][]string{
		{"-admin", "0.0.0.0:8081", "-admin-any"}, {"-admin", "[::1]:1"}, {"-admin", "127.9.9.9:1"}, {"-admin", "localhost:1"}, {"-queue", "262154"},
	} {
		if _, err := parse(nil, args...); err != nil {
			t.Errorf("%q: %v", args, err)
		}
	}
}

func TestFlagsThatDoNotExist(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"-port", "80"}, []string{"-port", "-h lists the flags"}},
		{[]string{"-grace"}, []string{"-grace", "needs an argument"}},
	} {
		code, _, stderr := runOnce(nil, c.args...)
		if code != 2 {
			t.Errorf("%q: exit code %d, want 2", c.args, code)
		}
		wantRefusal(t, stderr, c.words...)
	}
}

func TestBypassVariable(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		value string
		set   bool
		want  bool
		ok    bool
	}{
		{"", false, false, true},
		{"1", true, true, true},
		{"", true, false, false},
		{"0", true, false, false},
		{"true", true, false, false},
		{"yes", true, false, false},
		{" 1", true, false, false},
		{"1\n", true, false, false},
		{"01", true, false, false},
	} {
		env := map[string]string{}
		if c.set {
			env[bypassName] = c.value
		}
		if c.ok {
			if o, err := parse(env); err != nil || o.bypass != c.want {
				t.Errorf("%v: bypass is %v, error %v", env, o.bypass, err)
			}
			continue
		}
		code, _, stderr := runOnce(env)
		if code != 2 {
			t.Errorf("%v: exit code %d, want 2", env, code)
		}
		wantRefusal(t, stderr, "PYRYCODE_RELAY_SINGLE_INSTANCE", fmt.Sprintf("%q", c.value), "exactly 1")
	}
}

// The daemon's own test starts a relay by these names.
func TestOtherNames(t *testing.T) {
	t.Parallel()
	env := map[string]string{"PYRYCODE_RELAY_LISTEN": "127.0.0.1:1", "PYRYCODE_RELAY_ADMIN": "127.0.0.1:2"}
	for _, args := range [][]string{
		{"--insecure-listen", "127.0.0.1:3", "--metrics-listen="}, {"-insecure-listen=127.0.0.1:3", "-metrics-listen", "off"},
		{"--insecure-listen", "127.0.0.1:3", "-admin="},
	} {
		if o, err := parse(env, args...); err != nil || o.listen != "127.0.0.1:3" || o.admin != "" {
			t.Errorf("%q: listen %q, admin %q, error %v", args, o.listen, o.admin, err)
		}
	}
	if o, err := parse(map[string]string{"PYRYCODE_RELAY_ADMIN": ""}); err != nil || o.admin != "" {
		t.Errorf("an empty variable: admin %q, error %v", o.admin, err)
	}
	for _, c := range []struct {
		env   map[string]string
		args  []string
		words []string
	}{
		{nil, []string{"--insecure-listen="}, []string{"flag -insecure-listen", "127.0.0.1:8080"}},
		{nil, []string{"--metrics-listen", "0.0.0.0:1"}, []string{"flag -metrics-listen", "a loopback address"}},
		{map[string]string{"PYRYCODE_RELAY_INSECURE_LISTEN": "127.0.0.1:1"}, nil, []string{"do you mean PYRYCODE_RELAY_LISTEN?"}},
		{map[string]string{"PYRYCODE_RELAY_METRICS_LISTEN": ""}, nil, []string{"do you mean PYRYCODE_RELAY_ADMIN?"}},
	} {
		code, _, stderr := runOnce(c.env, c.args...)
		if code != 2 {
			t.Errorf("%v %q: exit code %d, want 2", c.env, c.args, code)
		}
		wantRefusal(t, stderr, c.words...)
	}
}

// A variable that is misspelled must not leave a default in force.
func TestUnknownVariables(t *testing.T) {
	t.Parallel()
	for name, nearest := range map[string]string{
		"LISTN": "LISTEN", "LISTENS": "LISTEN", "listen": "LISTEN", "PUBLC_URL": "PUBLIC_URL", "PUBLIC_ULR": "PUBLIC_URL", "PUBLICURL": "PUBLIC_URL",
		"TRUSTED_PROXY": "TRUSTED_PROXIES", "SINGLE_INSTANC": "SINGLE_INSTANCE", "MAX_CONNECTION": "MAX_CONNECTIONS", "": "PING", "RATE": "GRACE",
		"TEST_PUBLIC_CHEC": "PUBLIC_URL",
	} {
		name, nearest = envPrefix+name, envPrefix+nearest
		code, _, stderr := runOnce(map[string]string{name: "1", "PYRYCODE_RELAY_GRACE": "1s"})
		if code != 2 {
			t.Errorf("%s: exit code %d, want 2", name, code)
		}
		wantRefusal(t, stderr, "unknown variable "+name+": do you mean "+nearest+"?")
	}
	// What somebody else sets, and what Kubernetes makes of services that are
	// called pyrycode-relay and pyrycode-relay-admin.
	for _, line := range []string{
		"PYRYCODE_RELAYS=1", "PYRYCODE_LISTEN=1", "XPYRYCODE_RELAY_LISTN=1", paceName + "=1s,1s,1s",
		"PYRYCODE_RELAY_SERVICE_HOST=10.0.0.1", "PYRYCODE_RELAY_SERVICE_PORT=8080", "PYRYCODE_RELAY_SERVICE_PORT_HTTP=8080",
		"PYRYCODE_RELAY_PORT=tcp://10.0.0.1:8080", "PYRYCODE_RELAY_PORT_8080_TCP=tcp://10.0.0.1:8080", "PYRYCODE_RELAY_PORT_8080_TCP_PROTO=tcp",
		"PYRYCODE_RELAY_PORT_8080_TCP_PORT=8080", "PYRYCODE_RELAY_PORT_8080_TCP_ADDR=10.0.0.1", "PYRYCODE_RELAY_ADMIN_PORT=tcp://10.0.0.1:8081",
	} {
		if _, err := parse(environment([]string{line})); err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}
	if _, err := parse(map[string]string{"PYRYCODE_RELAY_PORT": "8080"}); err == nil {
		t.Error("PYRYCODE_RELAY_PORT=8080, which is none of Kubernetes' values, was taken for one")
	}
}

func TestEditDistance(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "abc", 0}, {"", "abc", 3}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"LISTN", "LISTEN", 1}, {"ab", "ba", 2}} {
		if got := editDistance(c.a, c.b); got != c.want {
			t.Errorf("%q to %q: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, arg := range []string{"-h", "-help", "--help", "help"} {
		code, help, stderr := runOnce(map[string]string{"PYRYCODE_RELAY_GRACE": "1s"}, arg)
		if code != 0 || stderr != "" {
			t.Errorf("%s: exit code %d, stderr %q", arg, code, stderr)
		}
		o := defaultOptions()
		fs := o.flags()
		for _, name := range flagNames(&o) {
			entry := fmt.Sprintf("default %q, variable %s\n", fs.Lookup(name).DefValue, envName(name))
			_, after, ok := strings.Cut(help, "\n  -"+name)
			if at := strings.Index(after, entry); !ok || at < 0 || strings.Contains(after[:at], "\n  -") {
				t.Errorf("%s: -%s is not followed by %s", arg, name, entry)
			}
		}
		for _, word := range []string{
			"pyrycode-relay version", "pyrycode-relay probe", "pyrycode-relay help",
			"\n  --insecure-listen and --metrics-listen are other names of -listen and -admin.\n", "-drain duration\n", "-admin-any\n", bypassName + "=1",
			"SIGTERM, SIGINT and SIGHUP drain and stop", "will reload certificates on SIGHUP", "0 asked to stop, 1 failure while running, 2 refused to start",
		} {
			if !strings.Contains(help, word) {
				t.Errorf("%s: %q is not in:\n%s", arg, word, help)
			}
		}
		for line := range strings.Lines(help) {
			if strings.HasSuffix(line, " \n") || strings.Contains(line, " value\n") {
				t.Errorf("%s: untidy line %q", arg, line)
			}
		}
	}
}

func flagNames(o *options) (names []string) {
	o.flags().VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
	return names
}
