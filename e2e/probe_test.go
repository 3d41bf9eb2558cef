package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	gorilla "github.com/gorilla/websocket"
)

// What `pyrycode-relay probe` says to an operator, right and wrong.

// probeStep is one step of probe -json.
type probeStep struct {
	Step    string `json:"step"`
	Verdict string `json:"verdict"`
	Detail  string `json:"detail"`
	Remedy  string `json:"remedy"`
}

// probe runs the command, as text and for scripts, which have to agree.
func probe(t *testing.T, env []string, args ...string) (code int, steps map[string]probeStep, text string) {
	t.Helper()
	run := func(args ...string) (int, []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		cmd := exec.CommandContext(ctx, relayPath, append([]string{"probe"}, args...)...)
		cmd.Env = append(os.Environ(), env...)
		out, err := cmd.Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), out
	}
	code, out := run(append(args, "-json")...)
	asJSON := out
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("probe -json says %s", asJSON)
		}
	})
	var report struct {
		OK    bool        `json:"ok"`
		Steps []probeStep `json:"steps"`
	}
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("probe -json says %q: %v", out, err)
	}
	if report.OK != (code == 0) {
		t.Errorf("ok is %v, the exit code %d", report.OK, code)
	}
	steps = map[string]probeStep{}
	for _, s := range report.Steps {
		steps[s.Step] = s
	}
	textCode, out := run(args...)
	if textCode != code {
		t.Errorf("as text it exits with %d, with -json %d", textCode, code)
	}
	return code, steps, string(out)
}

// TestProbe: each fault has a verdict and a remedy of its own.
func TestProbe(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		// start returns the URL, what else the command is given, and its environment.
		start func(t *testing.T) (args, env []string)
		fails string   // the step that is not ok, "" for none
		says  []string // its detail and remedy
	}{
		{"good relay", func(t *testing.T) (args, env []string) {
			return []string{"ws://" + startRelay(t).addr}, nil
		}, "", nil},
		{"good relay that limits the rate", func(t *testing.T) (args, env []string) {
			// Two runs in a row are within the burst.
			return []string{"ws://" + startRelay(t, "-rate-per-minute", "1", "-rate-burst", "20").addr}, nil
		}, "", nil},
		{"good relay behind the nginx of docs/deploy, with TLS", func(t *testing.T) (args, env []string) {
			addr, env := tlsNginx(t, startRelay(t).addr, ownIP, 90*day)
			return []string{"wss://" + addr, "-idle", "1s"}, env
		}, "", nil},
		{"wrong port", func(t *testing.T) (args, env []string) {
			return []string{"ws://" + freeAddr(t)}, nil
		}, "tcp", []string{"nothing listens there", "connection refused", "correct the port"}},
		{"web server", func(t *testing.T) (args, env []string) {
			dir := t.TempDir()
			writeFile(t, filepath.Join(dir, "index.html"), "a home page")
			return []string{"ws://" + startNginx(t, "", "", "root "+dir+";")}, nil
		}, "upgrade", []string{"not a relay", "404 Not Found", "nginx", "pass /v1/ and /v2/ on to the relay"}},
		{"nginx without the upgrade", func(t *testing.T) (args, env []string) {
			r := startRelay(t)
			return []string{"ws://" + startNginx(t, "", "", "location / { proxy_pass http://"+r.addr+"; proxy_http_version 1.1; }")}, nil
		}, "upgrade", []string{"no upgrade was asked for", "proxy_set_header Upgrade $http_upgrade"}},
		{"nginx as it forwards by itself", func(t *testing.T) (args, env []string) {
			r := startRelay(t)
			return []string{"ws://" + startNginx(t, "", "", "location / { proxy_pass http://"+r.addr+"; }")}, nil
		}, "upgrade", []string{"need HTTP/1.1", "proxy_http_version 1.1"}},
		{"nginx without a relay", func(t *testing.T) (args, env []string) {
			return []string{"ws://" + startNginx(t, "", "", nginxLocation(t, freeAddr(t)))}, nil
		}, "upgrade", []string{"502 Bad Gateway", "does not reach a relay", "start the relay"}},
		{"nginx that cuts silence", func(t *testing.T) (args, env []string) {
			location := strings.Replace(nginxLocation(t, startRelay(t).addr), "proxy_read_timeout 1h", "proxy_read_timeout 5s", 1)
			return []string{"ws://" + startNginx(t, "", "", location), "-idle", "10s"}, nil
		}, "idle", []string{"was cut after", "of silence", "proxy_read_timeout"}},
		{"expired certificate", func(t *testing.T) (args, env []string) {
			addr, env := tlsNginx(t, startRelay(t).addr, ownIP, -2*day)
			return []string{"wss://" + addr}, env
		}, "tls", []string{"the certificate expired on", "2 days ago", "renew the certificate"}},
		{"certificate for another name", func(t *testing.T) (args, env []string) {
			addr, env := tlsNginx(t, startRelay(t).addr, net.IPv4(127, 0, 0, 1), 90*day)
			return []string{"wss://" + addr}, env
		}, "tls", []string{"the certificate is for", "give the proxy a certificate for " + ownIP.String()}},
		{"certificate that ends soon", func(t *testing.T) (args, env []string) {
			addr, env := tlsNginx(t, startRelay(t).addr, ownIP, 3*day)
			return []string{"wss://" + addr}, env
		}, "tls: warn", []string{"renew the certificate now"}},
		{"certificate of nobody", func(t *testing.T) (args, env []string) {
			addr, _ := tlsNginx(t, startRelay(t).addr, ownIP, 90*day)
			return []string{"wss://" + addr}, nil
		}, "tls", []string{"issuer is not trusted"}},
		{"no TLS there", func(t *testing.T) (args, env []string) {
			return []string{"wss://" + startRelay(t).addr}, nil
		}, "tls", []string{"does not speak TLS", "ws://"}},
		{"two relays", func(t *testing.T) (args, env []string) {
			return []string{"ws://" + balancers[0].start(t, roundRobin, startRelay(t).addr, startRelay(t).addr)}, nil
		}, "join", []string{"did not, although it is there", "server-id never seen", "run exactly one relay"}},
		{"two relays, seen by who answers", func(t *testing.T) (args, env []string) {
			return []string{"ws://" + balancers[1].start(t, roundRobin, startRelay(t).addr, startRelay(t).addr)}, nil
		}, "instances", []string{"5 of 10 connections reached", "stop all but one"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			args, env := test.start(t)
			code, steps, text := probe(t, env, args...)
			step, verdict, _ := strings.Cut(test.fails, ": ")
			verdict = cmp.Or(verdict, "fail")
			want, summary := 1, "This relay does not work from here"
			if test.fails == "" || verdict == "warn" {
				want, summary = 0, "This relay works from here."
			}
			if code != want || !strings.Contains(text, summary) {
				t.Errorf("exit code %d, want %d", code, want)
			}
			for name, s := range steps {
				if good := s.Verdict == "ok" || s.Verdict == "skipped"; name != step && want == 0 && !good {
					t.Errorf("step %+v", s)
				}
			}
			if s := steps[step]; step != "" {
				if s.Verdict != verdict {
					t.Errorf("the verdict is %q, want %q", s.Verdict, verdict)
				}
				for _, word := range test.says {
					if !strings.Contains(s.Detail+" → "+s.Remedy, word) {
						t.Errorf("%q is not in %q → %q", word, s.Detail, s.Remedy)
					}
				}
				if !strings.Contains(text, s.Remedy) {
					t.Errorf("the remedy %q is not in the text", s.Remedy)
				}
			}
			if t.Failed() {
				t.Log(text)
			}
		})
	}
}

// tlsNginx is nginx with the location of docs/deploy, with a certificate for an address, good
// for so long, of an authority that env makes known.
func tlsNginx(t *testing.T, relay string, ip net.IP, good time.Duration) (addr string, env []string) {
	t.Helper()
	a, err := newAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cert, key := a.issue(t, ip, good)
	addr = startNginx(t, "ssl", fmt.Sprintf("ssl_certificate %s;\nssl_certificate_key %s;", cert, key), nginxLocation(t, relay))
	return addr, []string{"SSL_CERT_FILE=" + a.certFile, "SSL_CERT_DIR=" + filepath.Dir(a.certFile)}
}

// TestNginxOwnRates: behind the location of docs/deploy each phone has a rate of its
// own, by its address, and cannot make another one up.
func TestNginxOwnRates(t *testing.T) {
	t.Parallel()
	// nginx comes from 127.0.0.1; phones from other loopback addresses, which are
	// not trusted here.
	r := startRelay(t, "-rate-per-minute", "1", "-rate-burst", "2", "-trusted-proxies", "127.0.0.1")
	wantOwnRates(t, startNginx(t, "", "", nginxLocation(t, r.addr)))
}

// wantOwnRates wants two upgrades for each client of a proxy, and no more for one
// that makes an address up.
func wantOwnRates(t *testing.T, public string) {
	t.Helper()
	upgrade := func(from, forged string) int {
		t.Helper()
		d := gorilla.Dialer{HandshakeTimeout: patience, NetDialContext: (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}).DialContext}
		h := phoneHeaders("nobody")
		if forged != "" {
			h.Set("X-Forwarded-For", forged)
		}
		c, resp, err := d.Dial(urlOf("ws", public, "/v2/client"), h)
		if err == nil {
			c.Close()
		} else if resp == nil {
			t.Fatal(err)
		}
		return resp.StatusCode
	}
	for _, phone := range []string{"127.1.1.1", "127.1.1.2"} {
		for range 2 {
			if got := upgrade(phone, ""); got != http.StatusSwitchingProtocols {
				t.Errorf("%s within its burst: status %d", phone, got)
			}
		}
		for _, forged := range []string{"", "198.51.100.7"} {
			if got := upgrade(phone, forged); got != http.StatusTooManyRequests {
				t.Errorf("%s behind its burst, X-Forwarded-For %q: status %d", phone, forged, got)
			}
		}
	}
}
