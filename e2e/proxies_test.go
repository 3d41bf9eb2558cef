package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// HAProxy and nginx as Debian packs them, each as one process of its own.

// tool finds a program that Debian puts where only root looks.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path, err = exec.LookPath("/usr/sbin/" + name)
	}
	if err != nil {
		t.Fatalf("%v: apt-get install haproxy nginx-light", err)
	}
	return path
}

func writeFile(t testing.TB, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// awaitListener waits until a program takes connections.
func awaitListener(t testing.TB, p *program, addr string) {
	t.Helper()
	eventually(t, addr+" takes connections", func() bool {
		select {
		case <-p.done:
			t.Fatalf("%s has ended:\n%s", filepath.Base(p.cmd.Path), p.output())
		default:
		}
		nc, err := net.Dial("tcp", addr)
		if err != nil {
			return false
		}
		nc.Close()
		return true
	})
}

// nginxTemps keeps what nginx puts aside in the folder that is the first argument.
const nginxTemps = `	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
`

// startNginx serves the content of a server block and returns its address.
// context is what stands beside the server block.
func startNginx(t testing.TB, listen, context, server string) (addr string) {
	t.Helper()
	addr = freeAddr(t)
	startNginxAt(t, addr, listen, context, server)
	return addr
}

func startNginxAt(t testing.TB, addr, listen, context, server string) {
	t.Helper()
	dir := t.TempDir()
	config := writeFile(t, filepath.Join(dir, "nginx.conf"), fmt.Sprintf(`
daemon off;
master_process off;
pid %[1]s/pid;
error_log stderr warn;
events {}
http {
	access_log off;
`+nginxTemps+`	%[2]s
	server {
		listen %[3]s %[4]s;
		%[5]s
	}
}
`, dir, context, addr, listen, server))
	p := start(t, exec.Command(tool(t, "nginx"), "-e", "stderr", "-c", config), func(string) {})
	awaitListener(t, p, addr)
}

// nginxLocation is a location that forwards as docs/deploy/nginx.conf does, to a host
// and port or an upstream.
func nginxLocation(t testing.TB, backend string) string {
	t.Helper()
	config, err := os.ReadFile("../docs/deploy/nginx.conf")
	if err != nil {
		t.Fatal(err)
	}
	_, block, ok := strings.Cut(string(config), "\n\tlocation / {\n")
	block, _, closed := strings.Cut(block, "\n\t}\n")
	const backendThere = "proxy_pass http://127.0.0.1:8080;"
	if !ok || !closed || strings.Count(block, backendThere) != 1 {
		t.Fatalf("docs/deploy/nginx.conf has no location with %q", backendThere)
	}
	return "location / {\n" + strings.Replace(block, "127.0.0.1:8080", backend, 1) + "\n}"
}

// startHAProxyAt serves a backend section's lines.
func startHAProxyAt(t testing.TB, addr, backend string) {
	t.Helper()
	config := writeFile(t, filepath.Join(t.TempDir(), "haproxy.cfg"), fmt.Sprintf(`
defaults
	mode http
	timeout connect 2s
	timeout client 30s
	timeout server 30s
	timeout tunnel 1h
	option forwardfor
	option redispatch
frontend public
	bind %s
	default_backend relays
backend relays
%s
`, addr, backend))
	p := start(t, exec.Command(tool(t, "haproxy"), "-db", "-f", config), func(string) {})
	awaitListener(t, p, addr)
}

// balancer is a load balancer in front of relays.
type balancer struct {
	name    string
	startAt func(t testing.TB, addr string, by policy, relays ...string)
}

func (b balancer) start(t testing.TB, by policy, relays ...string) (addr string) {
	t.Helper()
	addr = freeAddr(t)
	b.startAt(t, addr, by, relays...)
	return addr
}

// policy is how a balancer chooses a relay: the lines of each one's backend, and what it
// has behind a server's address.
type policy struct{ haproxy, haproxyServer, nginx, nginxServer string }

const haproxyChecks = " check inter 50ms fall 1 rise 1"

var (
	roundRobin = policy{"balance roundrobin", haproxyChecks, "", " fail_timeout=1s"}
	byServerID = policy{"balance hdr(x-pyrycode-server)\nhash-type consistent", haproxyChecks,
		"hash $http_x_pyrycode_server consistent;", " fail_timeout=1s"}
	byClient         = policy{"balance source\nhash-type consistent", "", "ip_hash;", ""}
	leastConnections = policy{"balance leastconn\nretries 1\noption redispatch 1", "", "least_conn;", " max_fails=0"}
)

var balancers = []balancer{
	{"haproxy", func(t testing.TB, addr string, by policy, relays ...string) {
		t.Helper()
		lines := []string{by.haproxy}
		for i, r := range relays {
			lines = append(lines, fmt.Sprintf("server relay%d %s%s", i, r, by.haproxyServer))
		}
		startHAProxyAt(t, addr, strings.Join(lines, "\n"))
	}},
	{"nginx", func(t testing.TB, addr string, by policy, relays ...string) {
		t.Helper()
		lines := []string{by.nginx}
		for _, r := range relays {
			lines = append(lines, fmt.Sprintf("server %s%s;", r, by.nginxServer))
		}
		startNginxAt(t, addr, "", "upstream relays {\n"+strings.Join(lines, "\n")+"\n}", nginxLocation(t, "relays"))
	}},
}
