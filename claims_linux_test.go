package main

import (
	"syscall"
	"testing"
	"time"
)

// While the relay stands still nobody can answer: that is no silence.
func TestIncumbentSurvivesAStall(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-rate-per-minute=0").listening()
	b := p.connect("/v2/server", binaryHeaders("id"))
	newcomer := p.connect("/v2/server", binaryHeaders("id"))
	b.wantPing()
	p.signal(syscall.SIGSTOP)
	time.Sleep(defaultOptions().challengeTimeout + time.Second) // for once it is real time that has to pass
	p.signal(syscall.SIGCONT)
	p.said("the relay stood still") // it has looked at its deadlines since, or is about to
	b.frame(opPong, nil)
	newcomer.wantEnd(4409, "server-id already claimed")
}
