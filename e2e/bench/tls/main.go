// Tls measures what TLS costs: a relay that speaks it, beside HAProxy that terminates
// it in front of a relay. Binary and phones connect by TLS in both; CPU and memory are
// those of the relay and HAProxy together. Every frame is counted on arrival. Linux only.
package main

import (
	"bufio"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

const pairs = 8

// scenario is a stream of frames of one size, in one direction, in each pair.
type scenario struct {
	name   string
	up     bool // from phone to binary
	size   int  // of a message
	batch  int  // frames in one write
	window int  // frames under way in a pair
	frames int  // of each pair
}

var scenarios = []scenario{
	{"up, one write each", true, 256, 1, 8, 6000},
	{"down, one write each", false, 256, 1, 8, 6000},
	{"up, together", true, 256, 100, 400, 30000},
	{"down, together", false, 256, 100, 400, 30000},
	{"up, one write each", true, 64 << 10, 1, 4, 1000},
	{"down, one write each", false, 64 << 10, 1, 4, 1000},
}

func main() {
	relay := flag.String("relay", "", "`program` to measure")
	rounds := flag.Int("rounds", 5, "")
	amount := flag.Float64("amount", 1, "factor on the number of frames")
	idle := flag.Int("idle", 2000, "`phones` that stay silent, 10 to a binary")
	flag.Parse()
	dir, err := os.MkdirTemp("", "relay-tls-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = measure(dir, *relay, *rounds, *amount, *idle)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tls:", err)
		os.RemoveAll(dir)
		os.Exit(1)
	}
}

func measure(dir, relay string, rounds int, amount float64, idle int) error {
	if err := writeCertificate(dir); err != nil {
		return err
	}
	kinds := []string{"relay", "haproxy"}
	fmt.Printf("| frames | | relay with TLS, CPU µs/frame | HAProxy and relay | ratio |\n|---|---|---:|---:|---:|\n")
	for _, s := range scenarios {
		s.frames = max(s.window, int(float64(s.frames)*amount))
		cost := map[string][]float64{}
		for range rounds {
			for _, kind := range kinds {
				v, err := onTarget(dir, relay, kind, s.run)
				if err != nil {
					return fmt.Errorf("%s, %d bytes, %s: %w", s.name, s.size, kind, err)
				}
				cost[kind] = append(cost[kind], v)
			}
			slices.Reverse(kinds)
		}
		print(fmt.Sprintf("| %d B | %s", s.size, s.name), cost)
	}
	cost := map[string][]float64{}
	for range rounds {
		for _, kind := range kinds {
			v, err := onTarget(dir, relay, kind, func(t *target) (float64, error) { return t.idle(idle) })
			if err != nil {
				return fmt.Errorf("idle, %s: %w", kind, err)
			}
			cost[kind] = append(cost[kind], v)
		}
	}
	print(fmt.Sprintf("| %d idle phones | KiB/phone", idle), cost)
	return nil
}

func print(head string, cost map[string][]float64) {
	cell := func(v []float64) (median float64, text string) {
		slices.Sort(v)
		median = v[len(v)/2]
		return median, fmt.Sprintf("%.2f [%.2f..%.2f]", median, v[0], v[len(v)-1])
	}
	ours, a := cell(cost["relay"])
	theirs, b := cell(cost["haproxy"])
	fmt.Printf("%s | %s | %s | %.2f |\n", head, a, b, ours/theirs)
}

// ---- targets ----

// target is a relay that is reached by TLS, and the processes that it takes.
type target struct {
	addr string
	pids []int
	kill func()
}

func onTarget(dir, relay, kind string, f func(*target) (float64, error)) (float64, error) {
	t, err := start(dir, relay, kind)
	if err != nil {
		return 0, err
	}
	defer t.kill()
	return f(t)
}

func start(dir, relay, kind string) (*target, error) {
	front, back, lock := freeAddr(), freeAddr(), freeAddr()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	commands := [][]string{{relay, "-admin", "off", "-instance-lock", lock, "-rate-per-minute", "0", "-max-connections", "9000",
		"-log-level", "warn"}}
	if kind == "relay" {
		commands[0] = append(commands[0], "-listen", front, "-tls-cert", cert, "-tls-key", key)
	} else {
		commands[0] = append(commands[0], "-listen", back)
		config := filepath.Join(dir, "haproxy.cfg")
		err := os.WriteFile(config, fmt.Appendf(nil, `global
    nbthread 1
    maxconn 9000
defaults
    mode http
    maxconn 9000
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
listen relay
    bind %s ssl crt %s alpn http/1.1
    server relay %s
`, front, filepath.Join(dir, "both.pem"), back), 0o600)
		if err != nil {
			return nil, err
		}
		commands = append(commands, []string{"haproxy", "-db", "-q", "-f", config})
	}
	t := &target{addr: front}
	var running []*exec.Cmd
	t.kill = func() {
		for _, c := range running {
			c.Process.Kill()
			c.Wait()
		}
	}
	for _, argv := range commands {
		c := exec.Command(argv[0], argv[1:]...)
		c.Env = []string{"PATH=" + os.Getenv("PATH") + ":/usr/sbin"}
		c.Stderr = os.Stderr
		if err := c.Start(); err != nil {
			t.kill()
			return nil, err
		}
		running = append(running, c)
		t.pids = append(t.pids, c.Process.Pid)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if c, err := t.connect("server", "ready"); err == nil {
			c.Close()
			return t, nil
		} else if time.Now().After(end) {
			t.kill()
			return nil, err
		}
	}
}

func freeAddr() string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func writeCertificate(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	secret := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
	return errors.Join(err, os.WriteFile(filepath.Join(dir, "cert.pem"), cert, 0o600),
		os.WriteFile(filepath.Join(dir, "key.pem"), secret, 0o600),
		os.WriteFile(filepath.Join(dir, "both.pem"), append(cert, secret...), 0o600))
}

// cpu is the time that the processes have had, by the kernel's clock of each.
func (t *target) cpu() (total time.Duration) {
	for _, pid := range t.pids {
		var ts syscall.Timespec
		syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, uintptr(uint32(^int32(pid)<<3|2)), uintptr(unsafe.Pointer(&ts)), 0)
		total += time.Duration(ts.Nano())
	}
	return total
}

// resident is what of the processes is in RAM, in KiB.
func (t *target) resident() (total float64) {
	for _, pid := range t.pids {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		_, rest, _ := strings.Cut(string(b), "Rss:")
		n, _ := strconv.ParseFloat(strings.Fields(rest + " 0")[0], 64)
		total += n
	}
	return total
}

// ---- peers ----

type peer struct {
	*tls.Conn
	r *bufio.Reader
}

var sessions = tls.NewLRUClientSessionCache(1) // a phone that comes back has one

func (t *target) connect(endpoint, id string) (*peer, error) {
	nc, err := tls.Dial("tcp", t.addr, &tls.Config{InsecureSkipVerify: true, ServerName: "localhost", ClientSessionCache: sessions})
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(nc, "GET /v2/%s HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-Pyrycode-Server: %s\r\nX-Pyrycode-Version: 1\r\nUser-Agent: bench\r\n\r\n", endpoint, id)
	p := &peer{nc, bufio.NewReaderSize(nc, 128<<10)}
	status := ""
	for {
		line, err := p.r.ReadString('\n')
		if err != nil {
			return nil, err
		}
		if status == "" {
			status = line
		}
		if line == "\r\n" {
			break
		}
	}
	if !strings.Contains(status, " 101 ") {
		return nil, fmt.Errorf("%s: %s", endpoint, status)
	}
	return p, nil
}

// frame is a TEXT frame under the mask 0, as a client sends it.
func frame(payload string) []byte {
	b := []byte{0x81}
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	return append(append(b, 0, 0, 0, 0), payload...)
}

// next skips to the next TEXT frame and returns up to 128 bytes of its payload.
func (p *peer) next() ([]byte, error) {
	for {
		var h [10]byte
		if _, err := io.ReadFull(p.r, h[:2]); err != nil {
			return nil, err
		}
		n := int(h[1])
		switch n {
		case 126:
			io.ReadFull(p.r, h[2:4])
			n = int(binary.BigEndian.Uint16(h[2:]))
		case 127:
			io.ReadFull(p.r, h[2:10])
			n = int(binary.BigEndian.Uint64(h[2:]))
		}
		head := make([]byte, min(n, 128))
		if _, err := io.ReadFull(p.r, head); err != nil {
			return nil, err
		}
		if _, err := p.r.Discard(n - len(head)); err != nil {
			return nil, err
		}
		switch h[0] {
		case 0x81:
			return head, nil
		case 0x88:
			return nil, fmt.Errorf("closed: %q", head)
		}
	}
}

// pair connects a binary and a phone, and returns the phone's conn_id.
func (t *target) pair(id string) (b, ph *peer, connID string, err error) {
	if b, err = t.connect("server", id); err == nil {
		ph, connID, err = t.phone(b, id)
	}
	return b, ph, connID, err
}

func (t *target) phone(b *peer, id string) (ph *peer, connID string, err error) {
	if ph, err = t.connect("client", id); err != nil {
		return nil, "", err
	}
	ph.Write(frame(`"hello"`))
	head, err := b.next()
	_, rest, _ := strings.Cut(string(head), `"conn_id":"`)
	connID, _, _ = strings.Cut(rest, `"`)
	return ph, connID, err
}

// run moves the frames of s and returns what one costs in µs.
func (s scenario) run(t *target) (float64, error) {
	var all sync.WaitGroup
	failed := make(chan error, 2*pairs)
	var warm, done sync.WaitGroup
	begin := make(chan struct{})
	var cpu time.Duration
	for i := range pairs {
		b, ph, connID, err := t.pair(fmt.Sprint("pair-", i))
		if err != nil {
			return 0, err
		}
		defer b.Close()
		defer ph.Close()
		from, to, payload := ph, b, `"`+strings.Repeat("x", s.size-2)+`"`
		if !s.up {
			from, to, payload = b, ph, `{"conn_id":"`+connID+`","frame":`+payload+`}`
		}
		room := make(chan struct{}, s.window)
		move := func(frames int) {
			all.Go(func() {
				one := frame(payload)
				many := slices.Repeat(one, s.batch)
				for left := frames; left > 0; {
					n := min(s.batch, left)
					for range n {
						room <- struct{}{}
					}
					if _, err := from.Write(many[:n*len(one)]); err != nil {
						failed <- err
						return
					}
					left -= n
				}
			})
			for range frames {
				if _, err := to.next(); err != nil {
					failed <- err
					return
				}
				<-room
			}
		}
		warm.Add(1)
		done.Add(1)
		go func() {
			move(max(s.frames/8, s.window))
			warm.Done()
			<-begin
			move(s.frames)
			done.Done()
		}()
	}
	finished := make(chan struct{})
	go func() {
		warm.Wait()
		cpu = -t.cpu()
		close(begin)
		done.Wait()
		cpu += t.cpu()
		close(finished)
	}()
	select {
	case <-finished:
	case err := <-failed:
		return 0, err
	case <-time.After(2 * time.Minute):
		return 0, errors.New("no end within 2 minutes")
	}
	return float64(cpu) / float64(time.Microsecond) / float64(pairs*s.frames), nil
}

// idle connects phones, 10 to a binary, each of which sends one small frame, and returns
// what each has added to the memory of the processes, in KiB.
func (t *target) idle(phones int) (float64, error) {
	before := t.resident()
	var b *peer
	for i := range phones {
		id := fmt.Sprint("home-", i/10)
		var err error
		if i%10 == 0 {
			if b, err = t.connect("server", id); err != nil {
				return 0, err
			}
			defer b.Close()
		}
		ph, _, err := t.phone(b, id)
		if err != nil {
			return 0, err
		}
		defer ph.Close()
	}
	time.Sleep(3 * time.Second)
	return (t.resident() - before) / float64(phones), nil
}
