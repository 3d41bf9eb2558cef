package main

import (
	"net"
	"strings"
	"testing"
	"time"
	"unicode"
)

// FuzzInstanceAndURL: what is read of a stranger's instance header or an
// operator's URL is the same when it is written and read again, and holds
// nothing that a log or a request line could be broken with.
func FuzzInstanceAndURL(f *testing.F) {
	for _, s := range []string{
		newIdentity(time.Now()).String(), "0123456789abcdef, 2026-01-02T03:04:05Z", "0123456789ABCDEF, 2026-01-02T03:04:05.678+23:59",
		"0123456789abcdef, 9999-12-31T23:59:59-01:00", "0123456789abcd, 2026-01-02T03:04:05Z", "0123456789abcdef01, 2026-01-02T03:04:05Z", "0123456789abcdef,2026-01-02T03:04:05Z", "0123456789abcdeg, x",
		"259200.000, users, yields", "0.0004,x", "1e9", "0x1p4, users",
		"wss://relay.example.com", "ws://127.0.0.1:8080/", "ws://[::1]:8080", "ws://[fe80::1%25eth0]:1", "ws://[fe80::1%25e\x80th0]", "wss://h?", "wss://h#", "wss://h/?#", "wss://h/p", "wss://u@h", "wss://h:",
		"wss://h:0", "wss://h:65536", "wss://:1", "wss:h", "wss:///", "WSS://H", "https://h", "wss://h\r\nx: y", "wss://%0a", "wss://é.example", "//h", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := parseIdentity(s); err == nil {
			if again, err := parseIdentity(id.String()); err != nil || again.id != id.id || !again.started.Equal(id.started) {
				t.Errorf("%q: %s was read back as %s, %v", s, id, again, err)
			}
			if strings.Trim(id.id, "0123456789abcdefABCDEF") != "" || len(id.id) != 16 {
				t.Errorf("%q: id %q", s, id.id)
			}
		}
		if st, err := parseStanding(s); err == nil {
			again, err := parseStanding(st.String())
			if off := again.age - st.age; err != nil || again.users != st.users || again.yields != st.yields || off < -time.Millisecond || off > time.Millisecond {
				t.Errorf("%q: %s was read back as %s, %v", s, st, again, err)
			}
		}
		if u, err := parseRelayURL(s); err == nil {
			text := u.String()
			rest, ok := strings.CutPrefix(text, u.Scheme+"://")
			if !ok || strings.ContainsAny(rest, "/?#@ ") || strings.ContainsFunc(text, unicode.IsControl) {
				t.Errorf("%q was read as %q", s, text)
			}
			if again, err := parseRelayURL(text); err != nil || again.String() != text || again.Hostname() != u.Hostname() {
				t.Errorf("%q: %s was read back as %s, %v", s, text, again, err)
			}
			if port := u.Port(); port != "" {
				if _, err := net.LookupPort("tcp", port); err != nil {
					t.Errorf("%q: port %q: %v", s, port, err)
				}
			}
		}
	})
}
