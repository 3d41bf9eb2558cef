//go:build !race

package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
)

var peakLine = regexp.MustCompile(`VmHWM:\s+(\d+) kB`)

// peak is the most memory that the process has occupied, in bytes, as the system
// counts it (proc_pid_status(5)).
func (p *program) peak() int64 {
	p.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	m := peakLine.FindSubmatch(b)
	if m == nil {
		p.t.Fatalf("no peak in\n%s", b)
	}
	kib, _ := strconv.ParseInt(string(m[1]), 10, 64)
	return kib << 10
}

// The promise of the README is kept by the process, whatever peers do.
func TestMemoryStaysAsPromised(t *testing.T) {
	t.Parallel()
	tiny := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "%x:\n", i)
		}
		return b.String()
	}
	const first = "GET /v2/client HTTP/1.1\r\nHost: a\r\n"
	heads := []string{
		first + tiny(2600),
		first + tiny(maxHeadLines-2),
		first + tiny(maxHeadLines-3) + "X-Long: " + strings.Repeat("a", 6<<10),
		first + "X-Long: " + strings.Repeat("a", 7<<10),
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("a\n", 30<<10),
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n",
		strings.Repeat("GET / HTTP/1.1\r\nHost: a\r\n\r\n", 300),
	}
	half := appendFrameHeader(nil, opText, 256<<10)
	half[1] |= 0x80
	half = append(append(half, 0, 0, 0, 0), make([]byte, 200<<10)...)
	halfSent := func(t *testing.T, addr string) (stop func()) {
		var wg sync.WaitGroup
		var mu sync.Mutex
		var all []net.Conn
		for i := range 1000 {
			wg.Go(func() {
				nc, err := net.Dial("tcp", addr)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				all = append(all, nc)
				mu.Unlock()
				b, _, err := handshake(t, nc, "/v2/server", binaryHeaders(fmt.Sprint("server-", i)))
				if err == nil {
					b.nc.Write(half) // cut off where it does not fit
				}
			})
		}
		wg.Wait()
		return func() {
			for _, nc := range all {
				nc.Close()
			}
		}
	}
	dawdle := func(t *testing.T, addr string) (stop func()) {
		return dawdlers(t, addr, func(i int) string { return heads[i%len(heads)] })
	}
	for name, load := range map[string]func(t *testing.T, addr string) (stop func()){
		"requests in drops":  dawdle,
		"tiny header lines":  func(t *testing.T, addr string) func() { return dawdlers(t, addr, func(int) string { return heads[0] }) },
		"half-sent messages": halfSent,
		"both": func(t *testing.T, addr string) func() {
			a, b := halfSent(t, addr), dawdle(t, addr)
			return func() { a(); b() }
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := startProgram(t, nil, "-queue-total", "16777216", "-rate-per-minute", "0").listening()
			defer load(t, p.addr)()
			highest, same := int64(0), 0
			eventually(t, "the peak is over", func() bool { // it looks every millisecond
				if same++; p.peak() > highest {
					highest, same = p.peak(), 0
				}
				return same == 300
			})
			const promised = 16<<20 + 4<<10*4096 + 64<<20
			if got := p.peak(); got > promised {
				t.Errorf("%.1f MiB were occupied, want %d at the most", float64(got)/(1<<20), promised>>20)
			}
			if a, err := http.Get("http://" + p.addr + "/readyz"); err != nil || a.StatusCode != http.StatusOK {
				t.Errorf("afterwards it is not ready: %v", err)
			}
		})
	}
}
