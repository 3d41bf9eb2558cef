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

// The proxies of docs/deploy/, each started with the file that an operator
// copies. Nothing in it changes but its ports, names and paths.

// deployFile is a file of docs/deploy/, with the right of each old, new pair in
// place of the left, which has to be there as often as the file's reader expects.
func deployFile(t testing.TB, name string, oldnew ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "docs", "deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for i := 0; i < len(oldnew); i += 2 {
		if strings.Count(text, oldnew[i]) != 1 {
			t.Fatalf("docs/deploy/%s has %q %d times, want it once", name, oldnew[i], strings.Count(text, oldnew[i]))
		}
		text = strings.Replace(text, oldnew[i], oldnew[i+1], 1)
	}
	return text
}

// tlsProxy is a proxy in front of one relay.
type tlsProxy struct {
	name string
	// start serves a backend, and returns its address and what reloads it with
	// another backend.
	start func(t testing.TB, backend string) (addr string, reload func(backend string))
	cuts  bool // a reload ends the connections that stand
}

var tlsProxies = []tlsProxy{
	{"nginx", startDeployedNginx, false},
	{"haproxy", startDeployedHAProxy, false},
	{"caddy", func(t testing.TB, backend string) (string, func(string)) {
		t.Helper()
		return startDeployedCaddy(t, currentCaddy(t), "../docs/deploy/Caddyfile", backend)
	}, false},
	{"debian's caddy", func(t testing.TB, backend string) (string, func(string)) {
		t.Helper()
		without := deployFile(t, "Caddyfile", "\t\tstream_close_delay 24h\n", "")
		return startDeployedCaddy(t, "/usr/bin/caddy", writeFile(t, filepath.Join(t.TempDir(), "Caddyfile"), without), backend)
	}, true},
}

// startMaster runs a program that has children of its own, which end with it.
func startMaster(t testing.TB, cmd *exec.Cmd, addr string) *program {
	t.Helper()
	p := start(t, cmd, func(string) {})
	t.Cleanup(func() {
		p.signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(patience):
			t.Errorf("%s still runs %v after SIGTERM", filepath.Base(cmd.Path), patience)
		}
	})
	awaitListener(t, p, addr)
	eventually(t, addr+" has a certificate", func() bool {
		resp, err := noKeepAlive.Get(urlOf("http", "tls:"+addr, "/healthz"))
		if err == nil {
			resp.Body.Close()
		}
		return err == nil
	})
	return p
}

func startDeployedNginx(t testing.TB, backend string) (string, func(backend string)) {
	t.Helper()
	addr, dir := freeAddr(t), t.TempDir()
	cert, key := trusted.issue(t, ownIP, 90*day)
	site, other := filepath.Join(dir, "relay.conf"), freeAddr(t)
	write := func(backend string) {
		writeFile(t, site, deployFile(t, "nginx.conf",
			"listen 443 ssl;", "listen "+addr+" ssl;",
			"listen [::]:443 ssl;", "listen "+other+" ssl;",
			"/etc/letsencrypt/live/relay.example.com/fullchain.pem", cert,
			"/etc/letsencrypt/live/relay.example.com/privkey.pem", key,
			"http://127.0.0.1:8080", "http://"+backend))
	}
	write(backend)
	config := writeFile(t, filepath.Join(dir, "nginx.conf"), fmt.Sprintf(`
daemon off;
user root;
pid %[1]s/pid;
events {}
http {
	access_log off;
`+nginxTemps+`	include %[2]s;
}
`, dir, site))
	p := startMaster(t, exec.Command(tool(t, "nginx"), "-e", "stderr", "-c", config), addr)
	return "tls:" + addr, func(backend string) {
		t.Helper()
		write(backend)
		p.signal(syscall.SIGHUP)
	}
}

func startDeployedHAProxy(t testing.TB, backend string) (string, func(backend string)) {
	t.Helper()
	addr, dir := freeAddr(t), t.TempDir()
	cert, key := trusted.issue(t, ownIP, 90*day)
	var chain strings.Builder
	for _, path := range []string{cert, key} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		chain.Write(b)
	}
	pem := writeFile(t, filepath.Join(dir, "relay.pem"), chain.String())
	config, other := filepath.Join(dir, "haproxy.cfg"), freeAddr(t)
	write := func(backend string) {
		writeFile(t, config, deployFile(t, "haproxy.cfg",
			"bind :443 ssl crt /etc/haproxy/relay.pem", "bind "+addr+" ssl crt "+pem,
			"bind :::443 v6only ssl crt /etc/haproxy/relay.pem", "bind "+other+" ssl crt "+pem,
			"server relay 127.0.0.1:8080", "server relay "+backend))
	}
	write(backend)
	p := startMaster(t, exec.Command(tool(t, "haproxy"), "-W", "-f", config), addr)
	return "tls:" + addr, func(backend string) {
		t.Helper()
		write(backend)
		eventually(t, "haproxy reloads", func() bool {
			p.signal(syscall.SIGUSR2) // which the master loses if it has only just started
			for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
				if strings.Contains(p.output(), "Reloading HAProxy") {
					return true
				}
			}
			return false
		})
	}
}

// currentCaddy is the Caddy that people install, which .ci/run builds: Debian's
// is years older.
func currentCaddy(t testing.TB) string {
	t.Helper()
	gopath, err := exec.Command("go", "env", "GOPATH").Output()
	if err != nil {
		t.Fatal(err)
	}
	path, err := exec.LookPath(filepath.Join(strings.TrimSpace(string(gopath)), "bin", "caddy"))
	if err != nil {
		t.Fatalf("%v: .ci/run has the go install that makes it", err)
	}
	return path
}

// startDeployedCaddy imports a Caddyfile into one with what keeps it off this
// machine's own ports, names and trust store.
func startDeployedCaddy(t testing.TB, caddy, caddyfile, backend string) (string, func(backend string)) {
	t.Helper()
	addr, dir := freeAddr(t), t.TempDir()
	admin := "unix/" + filepath.Join(dir, "admin")
	path, err := filepath.Abs(caddyfile)
	if err != nil {
		t.Fatal(err)
	}
	config := writeFile(t, filepath.Join(dir, "Caddyfile"), fmt.Sprintf(`
{
	admin %s
	default_bind %s
	auto_https disable_redirects
	skip_install_trust
	storage file_system %s
	pki {
		ca local {
			root {
				cert %s
				key %s
			}
		}
	}
}
import %s
`, admin, ownIP, dir, trusted.certFile, trusted.keyFile, path))
	command := func(backend string, args ...string) *exec.Cmd {
		cmd := exec.Command(caddy, append(args, "--config", config, "--adapter", "caddyfile")...)
		cmd.Env = append(os.Environ(), "RELAY_SITE=https://"+addr, "RELAY_ADDR="+backend, "HOME="+dir)
		return cmd
	}
	startMaster(t, command(backend, "run"), addr)
	return "tls:" + addr, func(backend string) {
		t.Helper()
		if out, err := command(backend, "reload", "--address", admin).CombinedOutput(); err != nil {
			t.Fatalf("caddy reload: %v\n%s", err, out)
		}
	}
}

// TestDeployProxies: behind each proxy everything is as without one.
func TestDeployProxies(t *testing.T) {
	t.Parallel()
	for _, p := range tlsProxies {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			addr, _ := p.start(t, startRelay(t).addr)
			for _, s := range scenarios {
				t.Run(s.name, func(t *testing.T) {
					t.Parallel()
					s.run(t, wsLibrary, coderLibrary, addr, strings.NewReplacer(" ", "-", ":", "").Replace(s.name))
				})
			}
			t.Run("probe", func(t *testing.T) {
				t.Parallel()
				if code, _, text := probe(t, nil, urlOf("ws", addr, ""), "-idle", "1s"); code != 0 {
					t.Errorf("exit code %d:\n%s", code, text)
				}
			})
			t.Run("client address", func(t *testing.T) {
				t.Parallel()
				addr, _ := p.start(t, startRelay(t, "-rate-per-minute", "1", "-rate-burst", "2", "-trusted-proxies", "127.0.0.1").addr)
				wantOwnRates(t, addr)
			})
		})
	}
}

// TestDeployProxiesSilence: no proxy cuts a connection on which nobody says
// anything for longer than what proxies take for dead.
func TestDeployProxiesSilence(t *testing.T) {
	t.Parallel()
	const silence = 75 * time.Second // the usual limit is 60 s
	r := startRelay(t, "-ping", "1h")
	type session struct {
		phone, binary *peer
		connID        string
	}
	var sessions []session
	for i, p := range tlsProxies {
		addr, _ := p.start(t, r.addr)
		phone, binary, connID := pair(t, wsLibrary, coderLibrary, addr, fmt.Sprintf("silent-%d", i))
		sessions = append(sessions, session{phone, binary, connID})
	}
	time.Sleep(silence) // of all at once: it is what the test is about
	for _, s := range sessions {
		s.phone.send(`"up"`)
		s.binary.wantFrame(`"up"`)
		s.binary.send(reply(s.connID, `"down"`))
		s.phone.want(`"down"`)
	}
}

// TestDeployProxiesReload: a reload takes effect, and ends no connection where
// the proxy's file says so.
func TestDeployProxiesReload(t *testing.T) {
	t.Parallel()
	for _, p := range tlsProxies {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			before, after := startRelay(t), startRelay(t)
			addr, reload := p.start(t, before.addr)
			phone, binary, connID := pair(t, wsLibrary, coderLibrary, addr, "home")
			reload(after.addr)
			eventually(t, "the new configuration is served", func() bool { return getHealth(t, addr).Instance == after.instance })
			if p.cuts {
				phone.wantEnd(1001, "")
				return
			}
			long := quoted(strings.Repeat("a", 200<<10))
			phone.send(long)
			binary.wantFrame(long)
			binary.send(reply(connID, long))
			phone.want(long)
		})
	}
}
