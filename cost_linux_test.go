//go:build !386

package main

import (
	"bytes"
	"log/slog"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
)

// bareClient is a peer of which only the kernel knows: no memory of Go's is
// its own, so that what the process holds more of is the relay's.
type bareClient int

func dialBare(t *testing.T, addr, path, id, more string) bareClient {
	t.Helper()
	to := netip.MustParseAddrPort(addr)
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal("socket:", err)
	}
	if err = syscall.Connect(fd, &syscall.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}); err != nil {
		t.Fatal("connect:", err)
	}
	c := bareClient(fd)
	c.write(t, []byte("GET "+path+" HTTP/1.1\r\nHost: relay\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-Pyrycode-Version: 1\r\nX-Pyrycode-Server: "+id+"\r\nUser-Agent: bare\r\n"+more+"\r\n"))
	if answer := c.read(t, []byte("\r\n\r\n")); !bytes.HasPrefix(answer, []byte("HTTP/1.1 101 ")) {
		t.Fatalf("the upgrade was answered with %q", answer)
	}
	return c
}

func (c bareClient) write(t *testing.T, b []byte) {
	t.Helper()
	if n, err := syscall.Write(int(c), b); n != len(b) {
		t.Fatalf("write: %d bytes, %v", n, err)
	}
}

// read reads until what came ends so.
func (c bareClient) read(t *testing.T, end []byte) (all []byte) {
	t.Helper()
	var b [1024]byte
	for !bytes.HasSuffix(all, end) {
		n, err := syscall.Read(int(c), b[:])
		if err != nil || n <= 0 {
			t.Fatalf("read: %d bytes, %v, after %q", n, err, all)
		}
		all = append(all, b[:n]...)
	}
	return all
}

// heldMemory is what the process holds of heap and stacks, garbage and what
// pools keep aside not counted.
func heldMemory() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC() // a pool lets go at the second
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

// An idle phone costs about 600 bytes of heap and stack, its line in this test's
// log included, and no more once it has talked. The test is not parallel: what
// others hold would be counted.
func TestBytesPerConnection(t *testing.T) {
	const phones, most = 400, 1100
	o := testOptions()
	o.maxPhones = phones + 1
	r := startRelay(t, o)
	b := r.binary("server")
	r.phone("server").greet(b)
	before := heldMemory()
	clients := make([]bareClient, phones)
	for i := range clients {
		clients[i] = dialBare(t, r.addr, "/v2/client", "server", "")
	}
	defer func() {
		for _, c := range clients {
			syscall.Close(int(c))
		}
	}()
	r.settle("all phones are registered", func() bool { return r.metrics.connectedPhones.Load() == phones+1 })
	unused := (heldMemory() - before) / phones

	hello := clientFrame(0x80, opText, []byte(`"hello"`))
	welcome := []byte(`"welcome"`)
	for _, c := range clients {
		c.write(t, hello)
		b.send(b.envelope().ConnID, string(welcome))
		c.read(t, welcome)
	}
	used := (heldMemory() - before) / phones
	t.Logf("bytes of heap and stack per phone: %d unused, %d used", unused, used)
	if unused > most || used > most {
		t.Errorf("a phone holds %d bytes, and %d once it has talked; want at most %d", unused, used, most)
	}
	runtime.KeepAlive(clients)
}

// ownedMemory is what the process has of the system's, for whatever purpose.
func ownedMemory() int {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.Sys - m.HeapReleased)
}

// What stays of the first wave of phones is the runtime's, for a heap that was
// larger once. The next wave finds it there, and leaves next to nothing.
func TestWavesAreGivenBack(t *testing.T) {
	const phones = 1000
	o := testOptions()
	o.maxPhones, o.maxConnections, o.grace = phones, phones+1, 0
	r := startRelay(t, o)
	r.log = slog.New(slog.DiscardHandler) // the test's own keeps all
	r.binary("server")
	for _, share := range []int{2, 5} { // of the growth, may stay
		before := ownedMemory()
		var clients [phones]bareClient
		for i := range clients {
			clients[i] = dialBare(t, r.addr, "/v2/client", "server", "")
		}
		eventually(t, "the wave is noticed", func() bool { return r.peak.Load() > phones*sessionCost })
		top := ownedMemory()
		for _, c := range clients {
			syscall.Close(int(c))
		}
		r.settle("all phones are gone", func() bool { return r.metrics.connectedPhones.Load() == 0 })
		left := 0
		eventually(t, "memory is given back", func() bool {
			left = ownedMemory()
			return left-before <= (top-before)/share
		})
		t.Logf("KiB before, at the top, and left: %d, %d, %d", before>>10, top>>10, left>>10)
	}
}
