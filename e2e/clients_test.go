package e2e

import (
	"strings"
	"testing"
)

// scenario is one thing that every client has to live through, as a phone and as
// a binary. It gets a server-id of its own.
type scenario struct {
	name string
	run  func(t *testing.T, phones, binaries library, addr, serverID string)
}

var scenarios = []scenario{
	{"frames both ways", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phone, binary, connID := pair(t, phones, binaries, addr, serverID)
		// What a decoder and an encoder between would change.
		for _, frame := range []string{"{ \"n\" : 1.0e+2,\"n\":0 }", `"\u2028\ud800é<>"`, "[ ]", "null"} {
			phone.send(frame)
			if got := binary.wantFrame(frame); got != connID {
				t.Errorf("conn_id %q became %q", connID, got)
			}
			if frame != "null" { // no frame, in that direction
				binary.send(reply(connID, frame))
				phone.want(frame)
			}
		}
		long := quoted(strings.Repeat("a", 200<<10))
		phone.send(long)
		binary.wantFrame(long)
		binary.send(reply(connID, long))
		phone.want(long)
	}},
	{"fragments", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phone, binary, connID := pair(t, phones, binaries, addr, serverID)
		long := quoted(strings.Repeat("é", 30<<10))
		// Each cut but the last falls inside of a character.
		cut := func(s string) []string {
			i := strings.Index(s, "é")
			return []string{s[:i+5001], s[i+5001 : i+10001], s[i+10001 : i+20001], s[i+20001:], ""}
		}
		phone.send(cut(long)...)
		binary.wantFrame(long)
		binary.send(cut(reply(connID, long))...)
		phone.want(long)
	}},
	{"phone closes", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phone, binary, connID := pair(t, phones, binaries, addr, serverID)
		phone.send(`"last"`)
		phone.close(3001, "done")
		binary.wantFrame(`"last"`)
		binary.wantNotice(connID, 3001)
	}},
	{"phone is lost", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phone, binary, connID := pair(t, phones, binaries, addr, serverID)
		phone.wire.drop()
		binary.wantNotice(connID, 1006)
	}},
	{"binary closes a phone 4401", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phone, binary, connID := pair(t, phones, binaries, addr, serverID)
		sibling := phones.phone(t, addr, serverID)
		binary.send(`{"conn_id":"` + connID + `","frame":{"type":"error"},"close_code":4401}`)
		phone.want(`{"type":"error"}`)
		phone.wantEnd(4401, "closed by binary")
		// No notice of it comes before this.
		sibling.send("1")
		binary.wantFrame("1")
	}},
	{"phone sends no json: 1007", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phone, binary, connID := pair(t, phones, binaries, addr, serverID)
		phone.send(`1,"conn_id":"victim"`)
		phone.wantEnd(1007, "not one json value")
		binary.wantNotice(connID, 1007)
	}},
	{"phone sends no utf-8: 1007", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phone, binary, connID := pair(t, phones, binaries, addr, serverID)
		phone.send("\"\xff\"")
		phone.wantEnd(1007, "invalid utf-8")
		binary.wantNotice(connID, 1007)
	}},
	{"binary sends no utf-8: 1007", func(t *testing.T, phones, binaries library, addr, serverID string) {
		_, binary, connID := pair(t, phones, binaries, addr, serverID)
		binary.send(reply(connID, "\"\xff\""))
		binary.wantEnd(1007, "invalid utf-8")
	}},
	{"phone sends too much: 1009", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phone, binary, connID := pair(t, phones, binaries, addr, serverID)
		phone.send(`"` + strings.Repeat("a", 262144-2) + `"`) // just fits
		binary.wantFrame(`"` + strings.Repeat("a", 262144-2) + `"`)
		phone.sendTooMuch(`"` + strings.Repeat("a", 262145-2) + `"`)
		phone.wantEnd(1009, "message too big")
		binary.wantNotice(connID, 1009)
	}},
	{"binary sends too much: 1009", func(t *testing.T, phones, binaries library, addr, serverID string) {
		_, binary, connID := pair(t, phones, binaries, addr, serverID)
		binary.sendTooMuch(reply(connID, quoted(strings.Repeat("a", 262144))))
		binary.wantEnd(1009, "message too big")
	}},
	{"no binary: 4404", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phones.phone(t, addr, serverID).wantEnd(4404, "server-id never seen")
	}},
	{"second binary: 4409", func(t *testing.T, phones, binaries library, addr, serverID string) {
		phone, binary, connID := pair(t, phones, binaries, addr, serverID)
		binaries.binary(t, addr, serverID).wantEnd(4409, "server-id already claimed")
		binary.send(reply(connID, "1"))
		phone.want("1")
	}},
	{"phone too many: 4429", func(t *testing.T, phones, binaries library, addr, serverID string) {
		first, binary, connID := pair(t, phones, binaries, addr, serverID)
		for range 15 {
			phones.phone(t, addr, serverID)
		}
		phones.phone(t, addr, serverID).wantEnd(4429, "too many phones")
		binary.send(reply(connID, "1"))
		first.want("1")
	}},
	{"daemon restarts", func(t *testing.T, phones, binaries library, addr, serverID string) {
		before, binary, _ := pair(t, phones, binaries, addr, serverID)
		talker := phones.phone(t, addr, serverID)
		binary.close(1001, "restart")
		// In grace: who was idle stays, who talks is told, who comes is held.
		talker.send("1")
		talker.wantEnd(4404, "binary gone")
		joiner := phones.phone(t, addr, serverID)
		joiner.send(`"held"`)

		binary = binaries.binary(t, addr, serverID)
		connID := binary.wantFrame(`"held"`)
		before.wantEnd(4404, "binary reclaimed server-id")
		binary.send(reply(connID, `"back"`))
		joiner.want(`"back"`)
		joiner.close(1000, "")
		binary.wantNotice(connID, 1000) // and none of the others
	}},
	{"daemon crashes", func(t *testing.T, phones, binaries library, addr, serverID string) {
		before, binary, _ := pair(t, phones, binaries, addr, serverID)
		binary.wire.drop()
		// It comes back before the relay has noticed, or after.
		binary = binaries.binary(t, addr, serverID)
		before.wantEnd(4404, "binary re") // claimed, or placed
		phone := phones.phone(t, addr, serverID)
		phone.send("1")
		binary.send(reply(binary.wantFrame("1"), "2"))
		phone.want("2")
	}},
}

// TestClients: each library as a phone of the daemon's own, and as a binary whose
// phone, like the app, offers permessage-deflate.
func TestClients(t *testing.T) {
	t.Parallel()
	r := startRelay(t)
	for _, l := range []library{coderLibrary, gorillaLibrary, wsLibrary} {
		for role, libraries := range map[string][2]library{"phone": {l, coderLibrary}, "binary": {wsLibrary, l}} {
			for _, s := range scenarios {
				name := l.name + "/" + role + "/" + s.name
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					serverID := strings.NewReplacer("/", ".", " ", "-", ":", "").Replace(name)
					s.run(t, libraries[0], libraries[1], r.addr, serverID)
				})
			}
		}
	}
}

// TestClientsGraceExpires: the daemon does not come back.
func TestClientsGraceExpires(t *testing.T) {
	t.Parallel()
	r := startRelay(t, "-grace", "100ms")
	for _, l := range []library{coderLibrary, gorillaLibrary, wsLibrary} {
		phone, binary, _ := pair(t, l, l, r.addr, l.name)
		binary.close(1000, "")
		phone.wantEnd(4404, "grace expired")
		l.phone(t, r.addr, l.name).wantEnd(4404, "server-id last held")
	}
}

// TestClientsShutdown: everybody is told, and the relay ends well.
func TestClientsShutdown(t *testing.T) {
	t.Parallel()
	r := startRelay(t)
	var all []*peer
	for _, l := range []library{coderLibrary, gorillaLibrary, wsLibrary} {
		phone, binary, _ := pair(t, l, l, r.addr, l.name)
		all = append(all, phone, binary)
	}
	r.stop()
	for _, p := range all {
		// The end of a phone's connection is told to its binary first, or is not.
		e := p.next()
		for !e.ended {
			e = p.next()
		}
		if e.code != 1001 || e.reason != "shutting down" {
			t.Errorf("%s: got %s, want the end with 1001", p.what, e)
		}
	}
}
