package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The relay's own TLS, and the PROXY protocol in front of it.

// startSecured starts a relay that speaks TLS under a name that clients trust.
func startSecured(t testing.TB, flags ...string) (r *relayProcess, addr string) {
	t.Helper()
	cert, key := trusted.issue(t, ownIP, 90*day)
	r = startRelay(t, append([]string{"-listen", freeAddr(t), "-tls-cert", cert, "-tls-key", key}, flags...)...)
	return r, "tls:" + r.addr
}

// TestOwnTLS: everything is as behind a proxy.
func TestOwnTLS(t *testing.T) {
	t.Parallel()
	_, addr := startSecured(t)
	for _, s := range scenarios {
		for _, way := range []struct{ phones, binaries library }{{wsLibrary, coderLibrary}, {gorillaLibrary, wsLibrary}} {
			name := s.name + ", " + way.binaries.name
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				s.run(t, way.phones, way.binaries, addr, strings.NewReplacer(" ", "-", ":", "", ",", "", "/", "").Replace(name))
			})
		}
	}
	t.Run("probe", func(t *testing.T) {
		t.Parallel()
		if code, _, text := probe(t, nil, urlOf("ws", addr, ""), "-idle", "1s"); code != 0 {
			t.Errorf("exit code %d:\n%s", code, text)
		}
	})
	t.Run("a new certificate", func(t *testing.T) {
		t.Parallel()
		cert, key := trusted.issue(t, ownIP, 90*day)
		public := freeAddr(t)
		r := startRelay(t, "-listen", public, "-tls-cert", cert, "-tls-key", key, "-public-url", urlOf("ws", "tls:"+public, ""))
		eventually(t, "the public name is checked", func() bool { return getHealth(t, "tls:"+public).Check == "verified" })
		phone, binary, connID := pair(t, wsLibrary, coderLibrary, "tls:"+public, "home")
		newCert, newKey := trusted.issue(t, ownIP, 30*day)
		for from, to := range map[string]string{newCert: cert, newKey: key} {
			if err := os.Rename(from, to); err != nil {
				t.Fatal(err)
			}
		}
		r.signal(syscall.SIGHUP)
		eventually(t, "it is shown", func() bool {
			resp, err := noKeepAlive.Get(urlOf("http", "tls:"+public, "/healthz"))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			return time.Until(resp.TLS.PeerCertificates[0].NotAfter) < 31*day
		})
		phone.send(`"still here"`)
		binary.wantFrame(`"still here"`)
		binary.send(reply(connID, "1"))
		phone.want("1")
	})
}

// TestProxyProtocol: behind a proxy that forwards TCP each phone has a rate of its own,
// by its address, with the relay's own TLS and without.
func TestProxyProtocol(t *testing.T) {
	t.Parallel()
	for _, send := range []string{"send-proxy", "send-proxy-v2"} {
		for _, secured := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, TLS %v", send, secured), func(t *testing.T) {
				t.Parallel()
				front, scheme := freeAddr(t), ""
				flags := []string{"-proxy-protocol", "-trusted-proxies", "127.0.0.1", "-rate-per-minute", "1", "-rate-burst", "2"}
				if secured {
					cert, key := trusted.issue(t, ownIP, 90*day)
					flags, scheme = append(flags, "-tls-cert", cert, "-tls-key", key), "tls:"
				}
				r := startRelay(t, flags...)
				config := writeFile(t, filepath.Join(t.TempDir(), "haproxy.cfg"), fmt.Sprintf(`
defaults
	mode tcp
	timeout connect 2s
	timeout client 1h
	timeout server 1h
listen relay
	bind %s
	server relay %s source 127.0.0.1 %s check inter 50ms
`, front, r.addr, send))
				p := start(t, exec.Command(tool(t, "haproxy"), "-db", "-f", config), func(string) {})
				awaitListener(t, p, front)
				wantOwnRates(t, scheme+front)
				phone, binary, connID := pair(t, wsLibrary, coderLibrary, scheme+front, "home")
				phone.send(`"up"`)
				binary.wantFrame(`"up"`)
				binary.send(reply(connID, `"down"`))
				phone.want(`"down"`)
			})
		}
	}
}
