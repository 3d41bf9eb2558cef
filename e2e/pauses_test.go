package e2e

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// A process that stands still for a while, as by SIGSTOP, a laptop's lid or a paused
// container, while the others go on sending.

// TestPauses stops each of the three under traffic. The relay does not take its own
// absence for its peers' silence: afterwards nobody is cut off and nothing is lost. A
// peer is asked within one -ping, and has another to answer.
func TestPauses(t *testing.T) {
	t.Parallel()
	tests := []struct {
		stopped string
		pause   time.Duration
		ping    string
		cut     bool
	}{
		{"relay", 5 * time.Second, "30s", false},
		{"relay", 35 * time.Second, "30s", false},
		{"relay", 70 * time.Second, "30s", false},
		{"binary", 5 * time.Second, "30s", false},
		{"binary", 35 * time.Second, "40s", false}, // the ping may be due at once
		{"binary", 70 * time.Second, "30s", true},
		{"phone", 5 * time.Second, "30s", false},
		{"phone", 35 * time.Second, "40s", false},
		{"phone", 70 * time.Second, "30s", true},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s for %v", tt.stopped, tt.pause), func(t *testing.T) {
			t.Parallel()
			r := startRelay(t, "-ping", tt.ping)
			phones, binaries, signal := gorillaLibrary, coderLibrary, r.signal
			switch tt.stopped {
			case "phone":
				phones, signal = ownProcess(t)
			case "binary":
				binaries, signal = ownProcess(t)
			}
			phone, binary, connID := pair(t, phones, binaries, r.addr, "paused")

			signal(syscall.SIGSTOP)
			sent := 0
			for end := time.Now().Add(tt.pause); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				frame := strconv.Itoa(sent)
				if tt.stopped != "phone" {
					phone.wire.send([]byte(frame)) // fails once it has been cut off, which is looked at below
				}
				if tt.stopped != "binary" {
					binary.wire.send([]byte(reply(connID, frame)))
				}
				sent++
			}
			signal(syscall.SIGCONT)

			switch {
			case !tt.cut:
				for i := range sent {
					if tt.stopped != "phone" {
						binary.wantFrame(strconv.Itoa(i))
					}
					if tt.stopped != "binary" {
						phone.want(strconv.Itoa(i))
					}
				}
				phone.send(`"still"`)
				binary.wantFrame(`"still"`)
				binary.send(reply(connID, `"here"`))
				phone.want(`"here"`)
			case tt.stopped == "phone":
				binary.wantNotice(connID, 1011)
				phone.wantEndBehind(sent, func(i int) string { return strconv.Itoa(i) }, "heartbeat timeout")
			default:
				phone.wantEnd(4404, "binary gone")
				envelope := func(i int) string { return `{"conn_id":"` + connID + `","frame":` + strconv.Itoa(i) + "}" }
				binary.wantEndBehind(sent, envelope, "heartbeat timeout")
			}
		})
	}
}

// wantEndBehind takes messages, each as want has it and fewer than limit, and behind them the end
// with 1011.
func (p *peer) wantEndBehind(limit int, want func(i int) string, reason string) {
	p.t.Helper()
	for i := 0; ; i++ {
		e := p.next()
		switch {
		case e.ended && e.code == 1011 && e.reason == reason && i > 0 && i < limit:
			return
		case e.ended || e.text != want(i):
			p.t.Fatalf("%s: got %s behind %d messages, want the next or the end with 1011 %q", p.what, e, i, reason)
		}
	}
}

// ownProcess is a library whose connections are in a process of their own, and what
// signals that.
func ownProcess(t *testing.T) (library, func(os.Signal)) {
	t.Helper()
	n, err := startNode()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.cmd.Process.Kill()
		<-n.gone
		n.cmd.Wait()
	})
	return library{"ws", n.dial}, func(s os.Signal) { n.cmd.Process.Signal(s) }
}
