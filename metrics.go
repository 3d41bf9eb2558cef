package main

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"sync/atomic"
)

// Counters of the hot path are atomics that batches add to; nothing here takes a
// lock that a frame has to wait for. The text is Prometheus's exposition format.

type metrics struct {
	// Set at the start.
	id       identity
	build    buildVersion
	instance *instanceState
	budget   *budget
	logLost  *atomic.Int64 // lines; of the log's writer
	cert     *certificate  // nil: plain HTTP

	connectedBinaries, binariesInGrace, connectedPhones atomic.Int64 // gauges

	framesUp, bytesUp, framesDown, bytesDown atomic.Int64 // of payload, as forwarded
	socketReads, socketWrites                atomic.Int64 // system calls of the pollers
	tlsFailures, proxyRefused                atomic.Int64 // connections that came to no request

	upgrades [roleCount][upgradeOutcomeCount]atomic.Int64
	closes   [roleCount][closeReasonCount]atomic.Int64
	drops    [dropReasonCount]atomic.Int64
	wakes    [wakeOutcomeCount]atomic.Int64

	splitSeen [evidenceCount]atomic.Int64
}

func newMetrics(id identity, build buildVersion, instance *instanceState, b *budget) *metrics {
	return &metrics{id: id, build: build, instance: instance, budget: b, logLost: new(atomic.Int64)}
}

// ServeHTTP answers /metrics.
func (m *metrics) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Write(m.text())
}

func (m *metrics) text() []byte {
	var e exposition
	e.gauge("connected_binaries", "Binaries that hold a server-id and are connected.", m.connectedBinaries.Load())
	e.gauge("binaries_in_grace", "Server-ids whose binary is gone and may still come back.", m.binariesInGrace.Load())
	e.gauge("connected_phones", "Phones that are connected to a server-id.", m.connectedPhones.Load())

	e.family("frames_forwarded_total", "counter", "Messages forwarded, by direction: up is phone to binary.")
	e.sample(m.framesUp.Load(), "frames_forwarded_total{direction=%q}", "up")
	e.sample(m.framesDown.Load(), "frames_forwarded_total{direction=%q}", "down")
	e.family("forwarded_bytes_total", "counter", "Payload bytes forwarded, without envelope, by direction.")
	e.sample(m.bytesUp.Load(), "forwarded_bytes_total{direction=%q}", "up")
	e.sample(m.bytesDown.Load(), "forwarded_bytes_total{direction=%q}", "down")

	e.family("upgrades_total", "counter", "Requests on the WebSocket endpoints, by endpoint and outcome.")
	for role := range roleCount {
		for o := range upgradeOutcomeCount {
			e.sample(m.upgrades[role][o].Load(), "upgrades_total{endpoint=%q,outcome=%q}", endpointWords[role], o)
		}
	}
	e.family("closes_total", "counter", "Connections that have ended, by leg and reason.")
	for role := range roleCount {
		for r := range closeReasonCount {
			e.sample(m.closes[role][r].Load(), "closes_total{leg=%q,reason=%q}", role, r)
		}
	}
	e.family("dropped_envelopes_total", "counter", "Envelopes of binaries that went nowhere, by reason.")
	for r := range dropReasonCount {
		e.sample(m.drops[r].Load(), "dropped_envelopes_total{reason=%q}", r)
	}

	e.family("wakes_total", "counter", "Wake requests of binaries with -wake-url, by what became of them.")
	for o := range wakeOutcomeCount {
		e.sample(m.wakes[o].Load(), "wakes_total{outcome=%q}", o)
	}

	e.gauge("queued_bytes", "Bytes of buffers that hold queued or half-received messages.", m.budget.used())
	e.gauge("queued_bytes_limit", "The -queue-total that bounds them.", m.budget.limit)
	e.counter("socket_reads_total", "Read system calls on sessions.", m.socketReads.Load())
	e.counter("socket_writes_total", "Write system calls on sessions.", m.socketWrites.Load())

	notAfter, failures := m.cert.state()
	e.gauge("tls_not_after_seconds", "When the certificate of -tls-cert ends, in seconds since 1970; 0 without one.", notAfter)
	e.counter("tls_reload_failures_total", "Certificates that were new and not taken; the log says why.", failures)
	e.counter("tls_handshake_failures_total", "Connections whose TLS handshake failed.", m.tlsFailures.Load())
	e.counter("proxy_headers_refused_total", "Connections refused for want of a trusted PROXY header.", m.proxyRefused.Load())

	e.counter("log_lines_lost_total", "Lines of the log that its reader, gone or too slow, did not take.", m.logLost.Load())

	e.family("instance_check", "gauge", "Whether this is the only instance: 1 for what each check found.")
	bypassed, public := m.instance.bypassed.Load(), m.instance.verdict()
	e.sample(boolToInt(!bypassed), "instance_check{check=%q,verdict=%q}", "host", "held")
	e.sample(boolToInt(bypassed), "instance_check{check=%q,verdict=%q}", "host", "bypassed")
	for v := range publicVerdictCount {
		e.sample(boolToInt(v == public), "instance_check{check=%q,verdict=%q}", "public", v)
	}
	e.family("split_seen_total", "counter", "Signs in conn_ids that another relay serves binaries of this one, by how sure they are.")
	for v := range evidenceCount {
		e.sample(m.splitSeen[v].Load(), "split_seen_total{evidence=%q}", v)
	}

	e.gauge("instance_check_unseen", "Addresses of the public name that the last check could not reach.", m.instance.unseen.Load())

	e.family("build_info", "gauge", "Always 1: the version in the labels.")
	e.sample(1, "build_info{version=%q,revision=%q,goversion=%q,instance=%q}", m.build.version, m.build.revision, m.build.goVersion, m.id.id)
	e.family("start_time_seconds", "gauge", "When this process started, in seconds since 1970.")
	fmt.Fprintf(&e.b, "pyrycode_relay_start_time_seconds %.3f\n", float64(m.id.started.UnixMilli())/1000)
	e.gauge("goroutines", "Goroutines.", int64(runtime.NumGoroutine()))
	if n, ok := residentMemory(); ok {
		e.gauge("resident_memory_bytes", "Memory of this process that is in RAM.", n)
	}
	e.gauge("memory_limit_bytes", "What Go's own memory is kept under, if anything else can go.", debug.SetMemoryLimit(-1))
	if n, ok := openFiles(); ok {
		e.gauge("open_files", "Open file descriptors.", n)
	}
	return e.b.Bytes()
}

func boolToInt(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// exposition is text in Prometheus's format.
type exposition struct{ b bytes.Buffer }

func (e *exposition) family(name, kind, help string) {
	fmt.Fprintf(&e.b, "# HELP pyrycode_relay_%s %s\n# TYPE pyrycode_relay_%[1]s %[3]s\n", name, help, kind)
}

// sample writes one value. Go's quoting of labels and Prometheus's agree for text
// without control characters.
func (e *exposition) sample(v int64, series string, labels ...any) {
	fmt.Fprintf(&e.b, "pyrycode_relay_"+series+" %d\n", append(labels, v)...)
}

func (e *exposition) gauge(name, help string, v int64) {
	e.family(name, "gauge", help)
	e.sample(v, name)
}

func (e *exposition) counter(name, help string, v int64) {
	e.family(name, "counter", help)
	e.sample(v, name)
}

// residentMemory is the size in RAM, in bytes (proc(5), statm).
func residentMemory() (n int64, ok bool) {
	b, _ := os.ReadFile("/proc/self/statm")
	var total, resident int64
	_, err := fmt.Sscan(string(b), &total, &resident)
	return resident * int64(os.Getpagesize()), err == nil
}

// openFiles counts file descriptors (proc(5), fd).
func openFiles() (n int64, ok bool) {
	names, err := os.ReadDir("/proc/self/fd")
	return int64(len(names)) - 1, err == nil // the directory itself is one
}

// ---- the words for reasons ----

// Every word that tells why something ended or was left out, once. The same
// words stand in logs, metrics, close frames and docs/protocol.md.

// role is what a connection's peer is: a binary or a phone. Logs and metrics call it leg.
type role uint8

const (
	roleBinary role = iota
	rolePhone
	roleCount
)

var roleWords = [roleCount]string{"binary", "phone"}

func (role role) String() string { return roleWords[role] }

// closeReason says why a connection ended. Its word is the reason in logs and
// metrics and, where the relay closes, the text of the close frame.
type closeReason int8

// endNone: nothing has ended.
const endNone closeReason = -1

const (
	// The peer's own end.
	endPeerClosed closeReason = iota // it sent a close frame; the code is the peer's, 1005 if it gave none
	endPeerLost                      // TCP ended or broke without a close frame: 1006

	// Frame rules (RFC 6455 §5).
	endUnmasked        // §5.1: a client must mask
	endProxyClosed     // §5.1: a trusted proxy ended it with a close frame of its own, unmasked, as Caddy 2.6 does
	endReservedBit     // §5.2: no extension was negotiated
	endUnknownOpcode   // §5.2
	endBadControl      // §5.5: over 125 bytes or fragmented
	endStrayFragment   // §5.4: a continuation of nothing
	endInterleaved     // §5.4: a data frame inside a fragmented message
	endBadLength       // §5.2: not the shortest form, or the top bit set
	endBadClose        // §5.5.1, §7.4: payload of one byte, or a code that must not be sent
	endInvalidUTF8     // §8.1
	endNotJSON         // a phone's message is not exactly one JSON value
	endMessageTooBig   // more than -max-frame bytes
	endMessageTimeout  // not complete 30 s after its first byte
	endHeartbeat       // nothing heard for -ping after a ping
	endWriteTimeout    // took nothing for 10 s
	endBacklogFull     // a phone's queue reached -queue
	endMemoryLimit     // the whole process reached -queue-total
	endNeverSeen       // no binary has held this server-id since the relay started
	endLastHeld        // no binary holds it now, one did
	endBinaryGone      // a phone sent while its binary's claim was in grace
	endGraceExpired    // the binary did not come back
	endReclaimed       // a new connection of the binary took the claim
	endReplaced        // a phone of an incumbent that lost its claim
	endTakenOver       // an incumbent that did not answer lost its claim to a newcomer
	endAlreadyClaimed  // a live binary holds the server-id
	endTooManyPhones   // -max-phones
	endBinaryDirective // the binary asked for it; the code is the binary's
	endShutdown        // drain
	closeReasonCount
)

var closeReasons = [closeReasonCount]struct {
	code uint16 // 0: the code comes from the peer
	word string
}{
	endPeerClosed:      {0, "closed by peer"},
	endPeerLost:        {1006, "connection lost"},
	endUnmasked:        {1002, "unmasked frame"},
	endProxyClosed:     {1002, "proxy closed"},
	endReservedBit:     {1002, "reserved bit set"},
	endUnknownOpcode:   {1002, "unknown opcode"},
	endBadControl:      {1002, "bad control frame"},
	endStrayFragment:   {1002, "stray continuation"},
	endInterleaved:     {1002, "data frame inside fragmented message"},
	endBadLength:       {1002, "bad frame length"},
	endBadClose:        {1002, "bad close frame"},
	endInvalidUTF8:     {1007, "invalid utf-8"},
	endNotJSON:         {1007, "not one json value"},
	endMessageTooBig:   {1009, "message too big"},
	endMessageTimeout:  {1011, "message timeout"},
	endHeartbeat:       {1011, "heartbeat timeout"},
	endWriteTimeout:    {1011, "write timeout"},
	endBacklogFull:     {1011, "phone backlog full"},
	endMemoryLimit:     {1011, "relay memory limit"},
	endNeverSeen:       {4404, "server-id never seen"},
	endLastHeld:        {4404, "server-id last held"},
	endBinaryGone:      {4404, "binary gone"},
	endGraceExpired:    {4404, "grace expired"},
	endReclaimed:       {4404, "binary reclaimed server-id"},
	endReplaced:        {4404, "binary replaced"},
	endTakenOver:       {1011, "claim taken over"},
	endAlreadyClaimed:  {4409, "server-id already claimed"},
	endTooManyPhones:   {4429, "too many phones"},
	endBinaryDirective: {0, "closed by binary"},
	endShutdown:        {1001, "shutting down"},
}

func (r closeReason) String() string {
	if r == endNone {
		return ""
	}
	return closeReasons[r].word
}

// code is the close code that goes with r, on the wire and in the close notice;
// 0 where the code is the peer's own.
func (r closeReason) code() uint16 { return closeReasons[r].code }

// dropReason says why an envelope of a binary went nowhere. The connection lives on.
type dropReason int8

// dropNone: the envelope is good.
const dropNone dropReason = -1

const (
	dropNotEnvelope  dropReason = iota // not one JSON object in valid UTF-8
	dropNoConnID                       // missing, null or not a string
	dropUnknownConn                    // none of this binary's phones
	dropNoFrame                        // neither frame nor close_code
	dropBadCloseCode                   // not an integer, or one that must not be on the wire
	dropPushWake                       // a wake request, which -wake-url may serve
	dropReasonCount
)

var dropWords = [dropReasonCount]string{
	dropNotEnvelope:  "not an envelope",
	dropNoConnID:     "conn_id missing",
	dropUnknownConn:  "conn_id unknown",
	dropNoFrame:      "frame missing",
	dropBadCloseCode: "close_code invalid",
	dropPushWake:     "push wake",
}

func (r dropReason) String() string { return dropWords[r] }

// upgradeOutcome says how a request on a WebSocket endpoint ended.
type upgradeOutcome uint8

const (
	upgradeAccepted    upgradeOutcome = iota // 101
	upgradeDraining                          // 503
	upgradeChecking                          // 503: users are not let in yet
	upgradeRateLimited                       // 429
	upgradeFull                              // 503: -max-connections
	upgradeBadHeader                         // 400: x-pyrycode-* or user-agent
	upgradeBadRequest                        // 400, 405, 426: the WebSocket handshake
	upgradeFailed                            // the socket was gone before the 101
	upgradeOutcomeCount
)

var upgradeWords = [upgradeOutcomeCount]string{
	upgradeAccepted:    "accepted",
	upgradeDraining:    "draining",
	upgradeChecking:    "checking",
	upgradeRateLimited: "rate limited",
	upgradeFull:        "connection limit",
	upgradeBadHeader:   "bad header",
	upgradeBadRequest:  "bad handshake",
	upgradeFailed:      "failed",
}

func (o upgradeOutcome) String() string { return upgradeWords[o] }

// wakeOutcome says what became of a push wake where there is a -wake-url.
type wakeOutcome uint8

const (
	wakeSent    wakeOutcome = iota // the push service took it: 2xx
	wakeLimited                    // the server-id has had one in the last minute, or too many others have
	wakeDropped                    // the queue was full, or the relay stops
	wakeRefused                    // the push service answered with another status
	wakeFailed                     // it did not answer
	wakeOutcomeCount
)

var wakeWords = [wakeOutcomeCount]string{
	wakeSent:    "sent",
	wakeLimited: "limited",
	wakeDropped: "dropped",
	wakeRefused: "refused",
	wakeFailed:  "failed",
}

func (o wakeOutcome) String() string { return wakeWords[o] }
