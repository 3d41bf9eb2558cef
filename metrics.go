package main

import (
	"bytes"
	"fmt"
	"net/http"
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

	connectedBinaries, binariesInGrace, connectedPhones atomic.Int64 // gauges

	framesUp, bytesUp, framesDown, bytesDown atomic.Int64 // of payload, as forwarded
	socketReads, socketWrites                atomic.Int64 // system calls of the pollers

	upgrades [roleCount][upgradeOutcomeCount]atomic.Int64
	closes   [roleCount][closeReasonCount]atomic.Int64
	drops    [dropReasonCount]atomic.Int64
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
	e.sample("frames_forwarded_total", m.framesUp.Load(), "direction", "up")
	e.sample("frames_forwarded_total", m.framesDown.Load(), "direction", "down")
	e.family("forwarded_bytes_total", "counter", "Payload bytes forwarded, without envelope, by direction.")
	e.sample("forwarded_bytes_total", m.bytesUp.Load(), "direction", "up")
	e.sample("forwarded_bytes_total", m.bytesDown.Load(), "direction", "down")

	e.family("upgrades_total", "counter", "Requests on the WebSocket endpoints, by endpoint and outcome.")
	for role := range roleCount {
		for o := range upgradeOutcomeCount {
			e.sample("upgrades_total", m.upgrades[role][o].Load(), "endpoint", endpointWords[role], "outcome", o.String())
		}
	}
	e.family("closes_total", "counter", "Connections that have ended, by leg and reason.")
	for role := range roleCount {
		for r := range closeReasonCount {
			e.sample("closes_total", m.closes[role][r].Load(), "leg", role.String(), "reason", r.String())
		}
	}
	e.family("dropped_envelopes_total", "counter", "Envelopes of binaries that went nowhere, by reason.")
	for r := range dropReasonCount {
		e.sample("dropped_envelopes_total", m.drops[r].Load(), "reason", r.String())
	}

	e.gauge("queued_bytes", "Bytes of buffers that hold queued or half-received messages.", m.budget.used())
	e.gauge("queued_bytes_limit", "The -queue-total that bounds them.", m.budget.limit)
	e.counter("socket_reads_total", "Read system calls on sessions.", m.socketReads.Load())
	e.counter("socket_writes_total", "Write system calls on sessions.", m.socketWrites.Load())

	e.counter("log_lines_lost_total", "Lines of the log that its reader, gone or too slow, did not take.", m.logLost.Load())

	e.family("instance_check", "gauge", "Whether this is the only instance: 1 for what each check found.")
	bypassed, public := m.instance.bypassed.Load(), m.instance.verdict()
	e.sample("instance_check", truth(!bypassed), "check", "host", "verdict", "held")
	e.sample("instance_check", truth(bypassed), "check", "host", "verdict", "bypassed")
	for v := range publicVerdictCount {
		e.sample("instance_check", truth(v == public), "check", "public", "verdict", v.String())
	}

	e.family("build_info", "gauge", "Always 1: the version in the labels.")
	e.sample("build_info", 1, "version", m.build.version, "revision", m.build.revision, "goversion", m.build.goVersion, "instance", m.id.id)
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

// endpointWords name the endpoints as a label.
var endpointWords = [roleCount]string{roleBinary: "server", rolePhone: "client"}

func truth(b bool) int64 {
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

// sample writes one value; labels are names and values in turn.
func (e *exposition) sample(name string, v int64, labels ...string) {
	e.b.WriteString("pyrycode_relay_" + name)
	for i := 0; i < len(labels); i += 2 {
		sep := ","
		if i == 0 {
			sep = "{"
		}
		// Go's quoting and Prometheus's agree for text without control characters.
		fmt.Fprintf(&e.b, "%s%s=%q", sep, labels[i], labels[i+1])
	}
	if len(labels) > 0 {
		e.b.WriteByte('}')
	}
	fmt.Fprintf(&e.b, " %d\n", v)
}

func (e *exposition) gauge(name, help string, v int64) {
	e.family(name, "gauge", help)
	e.sample(name, v)
}

func (e *exposition) counter(name, help string, v int64) {
	e.family(name, "counter", help)
	e.sample(name, v)
}
