package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// upgradeHead is the head of a request that is upgraded, but for what swap says:
// pairs of a text in it and its replacement.
func upgradeHead(swap ...string) string {
	head := "GET /v2/client HTTP/1.1\r\nHost: relay.example.com\r\nUser-Agent: app/1\r\nX-Pyrycode-Server: server\r\n" +
		"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
	for i := 0; i < len(swap); i += 2 {
		if !strings.Contains(head, swap[i]) {
			panic("no such part: " + swap[i])
		}
		head = strings.Replace(head, swap[i], swap[i+1], 1)
	}
	return head
}

// oddRequests are what parsers of HTTP have disagreed about.
func oddRequests() (all []string) {
	const host, agent, end = "Host: relay.example.com\r\n", "User-Agent: app/1\r\n", "\r\n\r\n"
	lines := func(n int, line string) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, line, i)
		}
		return b.String()
	}
	for _, h := range []string{"", "Host:\r\n", "Host: a b\r\n", "Host: a\r\nHost: b\r\n", "Host: a/b\r\n", "Host: a\x00b\r\n",
		"host : a\r\n", "Host: [::1]:80\r\n", "Host: ü\r\n"} {
		all = append(all, upgradeHead(host, h))
	}
	for _, extra := range []string{
		"Bad Name: x\r\n", "Bad\tName: x\r\n", ": x\r\n", "NoColon\r\n", "X(Y): z\r\n", "X-Nul: a\x00b\r\n", "X-Ctl: a\x01b\r\n",
		"X-Del: \x7f\r\n", "X-High: \xff\r\n",
		"X-Fold: a\r\n b\r\n", " X-First: fold\r\n", "X-Cr: a\rb\r\n", "X-Empty:\r\n", "X-Lf: a\n", "X-Space : a\r\n",
		"Expect: 100-continue\r\n", "Expect: 200-ok\r\n", "Expect: 100-continue, x\r\n", "Expect:\r\n",
		"Content-Length: 0\r\n", "Content-Length: 5\r\n", "Content-Length: -1\r\n", "Content-Length: +5\r\n",
		"Content-Length: 5\r\nContent-Length: 6\r\n",
		"Content-Length: 5\r\nContent-Length: 5\r\n", "Content-Length: 5, 5\r\n", "Content-Length: 0x5\r\n",
		"Content-Length: 99999999999999999999\r\n",
		"Transfer-Encoding: chunked\r\n", "Transfer-Encoding: gzip\r\n", "Transfer-Encoding: chunked, identity\r\n",
		"Transfer-Encoding:\vchunked\r\n",
		"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
		"Trailer: X\r\n",
		"Upgrade: h2c\r\n", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\nUpgrade: h2c\r\n", "Connection: close\r\n",
		"Connection: keep-alive\r\n", "Sec-WebSocket-Protocol: chat\r\n",
		"Sec-WebSocket-Extensions: permessage-deflate\r\n", "Origin: null\r\n", "Origin: ::\r\n", "X-Pyrycode-Token: secret\r\n",
		"Cookie: a=b\r\n",
		"X-Long: " + strings.Repeat("a", 3000) + "\r\n", "X-Long: " + strings.Repeat("a", 5000) + "\r\n",
		"X-Long: " + strings.Repeat("a", 7600) + "\r\n",
		"X-Long: " + strings.Repeat("a", 9000) + "\r\n", "X-Long: " + strings.Repeat("a", 30000) + "\r\n", strings.Repeat("b",
			4000) + ": x\r\n", strings.Repeat("c", 9000),
		lines(50, "X-%d: a\r\n"), lines(91, "X-%d: a\r\n"), lines(92, "X-%d: a\r\n"), lines(93, "X-%d: a\r\n"), lines(92, "X-%d: a\n"),
		lines(93, "X-%d: a\n"), lines(400, "X-%d: a\r\n"), lines(2000, "%d:\n"), lines(92, "X: %d\r\n a\r\n"),
		lines(95, "X-%d: a\r\n") + "Bad Name: x\r\n", lines(80, "X-%d: a\r\n") + "Bad Name: x\r\n",
	} {
		all = append(all, upgradeHead(agent, agent+extra), upgradeHead(agent, agent+extra, "Key: dG", "Key: "))
	}
	for _, first := range []string{
		"GET /v2/client HTTP/1.0", "GET /v2/client HTTP/1.2", "GET /v2/client HTTP/2.0", "GET /v2/client HTTP/0.9",
		"GET /v2/client HTTP/3.0", "GET /v2/client http/1.1", "GET /v2/client HTTP/1.1 ",
		"GET /v2/client", "GET  /v2/client HTTP/1.1", " GET /v2/client HTTP/1.1", "\r\nGET /v2/client HTTP/1.1",
		"\n\nGET /v2/client HTTP/1.1", "GET /v2/client\tHTTP/1.1", "GET /v2/client HTTP/1.1\r", "PRI * HTTP/2.0", "",
		"get /v2/client HTTP/1.1", "G@T /v2/client HTTP/1.1", "POST /v2/client HTTP/1.1", "OPTIONS * HTTP/1.1",
		"CONNECT relay:1 HTTP/1.1", "HEAD /v2/client HTTP/1.1", "DELETE /readyz HTTP/1.1",
		"GET http://relay/v2/client HTTP/1.1", "GET //v2/client HTTP/1.1", "GET /v2/client/ HTTP/1.1", "GET /v2/../v2/client HTTP/1.1",
		"GET /v2/%63lient HTTP/1.1", "GET /v2/client?a=%zz HTTP/1.1",
		"GET /v2/client#x HTTP/1.1", "GET /v2%2fclient HTTP/1.1", "GET /v2/cli\x00ent HTTP/1.1", "GET /\xff HTTP/1.1", "GET / HTTP/1.1",
		"GET /readyz HTTP/1.1", "GET /nowhere HTTP/1.1", "GET /" + strings.Repeat("a", 9000) + " HTTP/1.1",
		"GET /v2/server HTTP/1.1", "GET /v1/server HTTP/1.0", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "SSH-2.0-OpenSSH_9",
		"*1\r\n$4\r\nPING",
	} {
		all = append(all, upgradeHead("GET /v2/client HTTP/1.1", first))
	}
	open := strings.TrimSuffix(upgradeHead(), end)
	return append(all, open+"\n\n", open+"\r\n\n", open+"\n\r\n", strings.ReplaceAll(upgradeHead(), "\r\n", "\n"),
		strings.ReplaceAll(upgradeHead(), "\r\n", "\r"), strings.ReplaceAll(upgradeHead(), "\r\n", "\r\r\n"))
}

// gatedRequest draws a request and says how the contract's gates answer it: the
// first that does not let it through.
func gatedRequest(rng *rand.Rand) (head string, status int) {
	status = http.StatusSwitchingProtocols
	var swap []string
	gate := func(refused int, part string, good, bad []string) {
		if rng.IntN(3) > 0 {
			swap = append(swap, part, good[rng.IntN(len(good))])
			return
		}
		swap = append(swap, part, bad[rng.IntN(len(bad))])
		if status == http.StatusSwitchingProtocols {
			status = refused
		}
	}
	gate(400, "User-Agent: app/1\r\n", []string{"user-agent: x\r\n"}, []string{"", "User-Agent:\r\n", "User-Agent:  \r\n"})
	gate(400, "X-Pyrycode-Server: server\r\n", []string{"x-pyrycode-server:server\r\n",
		"X-Pyrycode-Server: server\r\nX-Pyrycode-Server: ?\r\n"},
		[]string{"", "X-Pyrycode-Server: \r\n", "X-Pyrycode-Server: a b\r\n", "X-Pyrycode-Server: " + strings.Repeat("a", 129) + "\r\n"})
	gate(405, "GET ", []string{"GET "}, []string{"POST ", "PUT ", "get "})
	gate(426, "HTTP/1.1", []string{"HTTP/1.1"}, []string{"HTTP/1.0"})
	gate(426, "Connection: Upgrade\r\n", []string{"Connection: keep-alive, upgrade\r\n", "Connection: x\r\nConnection: UPGRADE\r\n"},
		[]string{"", "Connection: keep-alive\r\n", "Connection: upgraded\r\n"})
	gate(426, "Upgrade: websocket\r\n", []string{"Upgrade: WebSocket\r\n"}, []string{"", "Upgrade: websockets\r\n"})
	gate(426, "Version: 13\r\n", []string{"Version: 13\r\n"}, []string{"Version: 12\r\n", "Versions: 13\r\n",
		"Version: 13\r\nSec-WebSocket-Version: 13\r\n", "Version: 13, 8\r\n"})
	gate(400, "Key: dGhlIHNhbXBsZSBub25jZQ==", []string{"Key: AAAAAAAAAAAAAAAAAAAAAA=="}, []string{"Key: ",
		"Key: dGhlIHNhbXBsZSBub25jZQ=", "Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Keys: x"})
	return upgradeHead(swap...), status
}

// An answer is that to the request, not to how it arrives; and what is sent right
// behind a request that is upgraded reaches the session.
func TestOneAnswerForOneRequest(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	r.binary("server")
	ask := func(head string, pieces func(left int) int) (answer string) {
		nc, err := r.connect()
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(patience))
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			all := append([]byte(head), clientFrame(0x80, opPing, []byte("behind"))...)
			all = append(all, clientFrame(0x80, opClose, closePayload(4000, ""))...)
			for len(all) > 0 {
				n := pieces(len(all))
				if _, err := nc.Write(all[:n]); err != nil {
					return // answered already
				}
				all = all[n:]
			}
			nc.(*net.TCPConn).CloseWrite() // else a head without an end is waited for
		}()
		defer func() { <-sent }()
		br := bufio.NewReader(nc)
		a, err := http.ReadResponse(br, &http.Request{Method: strings.SplitN(head, " ", 2)[0]})
		if err != nil {
			return "no answer"
		}
		if a.StatusCode != http.StatusSwitchingProtocols {
			body, _ := io.ReadAll(a.Body)
			nc.Close()
			return fmt.Sprint(a.StatusCode, " ", string(body))
		}
		rest, _ := io.ReadAll(br)
		want := append([]byte{0x80 | opPong, 6}, "behind"...)
		if want = append(want, 0x80|opClose, 2, 4000>>8, 4000&0xff); !bytes.Equal(rest, want) {
			return fmt.Sprintf("101, and what was sent behind it is answered % x", rest)
		}
		return "101"
	}
	rng := rand.New(rand.NewPCG(24, 9))
	whole := func(left int) int { return left }
	check := func(head string, status int) {
		want := ask(head, whole)
		if status != 0 && !strings.HasPrefix(want, fmt.Sprint(status)) {
			t.Errorf("answer %q, want %d, to\n%q", want, status, head)
		}
		pieces := func(left int) int { return 1 + rng.IntN(min(left, 64)) }
		ways := map[string]func(int) int{"in pieces": pieces, "in another way": pieces}
		if len(head) < 2000 {
			ways["byte by byte"] = func(int) int { return 1 }
		}
		for how, next := range ways {
			if got := ask(head, next); got != want {
				t.Errorf("answer %q in one piece and %q %s, to\n%.300q", want, got, how, head)
			}
		}
	}
	for _, head := range oddRequests() {
		check(head, 0)
	}
	for range 250 {
		head, status := gatedRequest(rng)
		check(head, status)
	}
}

// A proxy that keeps a refusal could show the identity of a relay that is gone.
func TestAnswersAreNotKept(t *testing.T) {
	t.Parallel()
	r := startRelay(t, testOptions())
	for _, head := range []string{
		upgradeHead(), upgradeHead("Key: dG", "Key: "), upgradeHead("User-Agent: app/1\r\n", ""), upgradeHead("GET ", "POST "),
		upgradeHead("Version: 13", "Version: 8"),
		upgradeHead("User-Agent", strings.Repeat("A:b\r\n", maxHeadLines)+"User-Agent"),
		upgradeHead("/v2/client", "/"), upgradeHead("/v2/client", "/healthz"), upgradeHead("/v2/client", "/readyz"),
		upgradeHead("/v2/client", "/nowhere"),
	} {
		nc, err := r.connect()
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(nc, head)
		a, err := http.ReadResponse(bufio.NewReader(nc), nil)
		if err != nil {
			t.Fatal(err)
		}
		nc.Close()
		if got := a.Header.Get("Cache-Control"); (got == "no-store") != (a.StatusCode != http.StatusSwitchingProtocols) {
			t.Errorf("%s, Cache-Control %q", a.Status, got)
		}
	}
}

// dawdlers keep half as many connections again as there is room for, which send
// what head says and then a byte of it now and then, and come back when they have
// to go.
func dawdlers(t testing.TB, addr string, head func(i int) string) (stop func()) {
	const n = maxWaiting + maxWaiting/2
	quit := make(chan struct{})
	var here, done sync.WaitGroup
	here.Add(n)
	for i := range n {
		done.Go(func() {
			for first := true; ; first = false {
				nc, err := net.Dial("tcp", addr)
				if err == nil {
					nc.Write([]byte(head(i)))
				}
				if first {
					here.Done()
				}
				for again := time.NewTicker(200 * time.Millisecond); err == nil; {
					select {
					case <-quit:
						nc.Close()
						return
					case <-again.C:
						_, err = nc.Write([]byte("x"))
					}
				}
				if nc == nil {
					t.Error(err)
					return
				}
				nc.Close()
			}
		})
	}
	here.Wait()
	return func() {
		close(quit)
		done.Wait()
	}
}

// Honest newcomers are served beside any number of strangers who dawdle, while
// these arrive as well as later.
func TestNewcomersBesideDawdlers(t *testing.T) {
	t.Parallel()
	p := startProgram(t, nil, "-rate-per-minute", "0").listening()
	head := "GET /v2/client HTTP/1.1\r\n" + strings.Repeat("A:\n", 3000)
	var stranger sync.WaitGroup
	stop := func() {}
	stranger.Go(func() { stop = dawdlers(t, p.addr, func(i int) string { return head[:30+i*3%len(head[30:])] }) })
	var took []time.Duration
	for i := range 300 {
		began := time.Now()
		nc, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		path, h := "/v2/client", phoneHeaders("server")
		if i%2 == 0 {
			path, h = "/v2/server", binaryHeaders(fmt.Sprint("server-", i))
		}
		if _, _, err := handshake(t, nc, path, h); err != nil {
			t.Errorf("newcomer %d of 300: %v", i+1, err)
		}
		took = append(took, time.Since(began))
		nc.Close()
	}
	stranger.Wait()
	stop()
	slices.Sort(took)
	t.Logf("half of them connected within %v, 99 of 100 within %v", took[150], took[297])
}
