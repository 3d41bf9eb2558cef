//go:build !race && !386

package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

// What README promises of memory, held against the process as the system sees
// it. The race detector has memory of its own, so these tests run without it.

// peakMemory is the most of the program that was in RAM at once, in bytes
// (proc(5), status).
func (p *program) peakMemory() (n int64) {
	p.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(b), "VmHWM:")
	if _, err := fmt.Sscanf(line, "%d kB", &n); err != nil {
		p.t.Fatalf("the system tells no peak: %v in\n%s", err, b)
	}
	return n << 10
}

// promisedMemory is README's.
func promisedMemory(o options) int64 {
	return o.queueTotal + 4<<10*int64(o.maxConnections) + 64<<20
}

// Newcomers that wait for an incumbent, each with about the largest head that is
// taken; and messages that are half sent.
func TestProgramMemoryOfNewcomers(t *testing.T) {
	t.Parallel()
	var lines strings.Builder
	for i := range maxHeadLines - 10 {
		fmt.Fprintf(&lines, "%x: %060d\r\n", i, i)
	}
	for _, c := range []struct {
		newcomers, halves int
		queueTotal        int64
	}{
		{500, 0, 16 << 20},
		{2900, 1100, defaultOptions().queueTotal},
	} {
		t.Run(fmt.Sprintf("%d and %d halves", c.newcomers, c.halves), func(t *testing.T) {
			o := defaultOptions()
			o.queueTotal = c.queueTotal
			p := startProgram(t, nil, "-rate-per-minute=0", fmt.Sprintf("-queue-total=%d", o.queueTotal)).listening()
			half := append([]byte{0x82, 0xff, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0}, make([]byte, 200<<10)...)
			for i := range c.halves {
				b := dialBare(t, p.addr, "/v2/server", fmt.Sprint("half-", i), lines.String())
				defer syscall.Close(int(b))
				b.write(t, half)
			}
			for range 1 + c.newcomers { // the first is the incumbent
				b := dialBare(t, p.addr, "/v2/server", "home", lines.String())
				defer syscall.Close(int(b))
			}
			got, most := p.peakMemory(), promisedMemory(o)
			t.Logf("%d MiB at the most, %d promised", got>>20, most>>20)
			if got > most {
				t.Errorf("%d MiB were in RAM, README promises %d", got>>20, most>>20)
			}
			if n := strings.Count(p.stderr.String(), "session refused"); n > 0 {
				t.Errorf("%d newcomers were refused: they did not wait", n)
			}
		})
	}
}
