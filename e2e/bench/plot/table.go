package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// row is one line of the table. The target is factor × HAProxy's figure of the
// same run, or the plain number.
type row struct {
	scenario, metric string
	label            string
	factor           float64
	ofHAProxy        bool
	run              string // full if empty
}

var rows = []row{
	{scenario: "up/256", metric: "cpu_us", label: "CPU µs/frame", factor: 1.0},
	{scenario: "up/4096", metric: "cpu_us", label: "CPU µs/frame", factor: 1.5, ofHAProxy: true},
	{scenario: "up/65536", metric: "cpu_us", label: "CPU µs/frame", factor: 1.3, ofHAProxy: true},
	{scenario: "down/256", metric: "cpu_us", label: "CPU µs/frame", factor: 1.0},
	{scenario: "down/4096", metric: "cpu_us", label: "CPU µs/frame", factor: 1.5, ofHAProxy: true},
	{scenario: "down/65536", metric: "cpu_us", label: "CPU µs/frame", factor: 1.3, ofHAProxy: true},
	{scenario: "up1/256", metric: "cpu_us", label: "CPU µs/frame", factor: 1.0, ofHAProxy: true},
	{scenario: "down1/256", metric: "cpu_us", label: "CPU µs/frame", factor: 1.0, ofHAProxy: true},
	{scenario: "pingpong/256x1", metric: "cpu_us", label: "CPU µs/round trip", factor: 1.2, ofHAProxy: true},
	{scenario: "pingpong/256x1", metric: "p50_us", label: "p50 µs", factor: 1.2, ofHAProxy: true},
	{scenario: "pingpong/256x64", metric: "cpu_us", label: "CPU µs/round trip", factor: 1.0, ofHAProxy: true},
	{scenario: "pingpong/256x64", metric: "p99_us", label: "p99 µs", factor: 1.0, ofHAProxy: true},
	{scenario: "idle", metric: "kib_phone", label: "KiB/phone, never used", factor: 4.5},
	{scenario: "idle", metric: "kib_phone_used", label: "KiB/phone, used", factor: 5.0},
	{scenario: "idle", metric: "left_pct", label: "% of the growth left after closing", factor: 15, run: "closed"},
	{scenario: "connect", metric: "cpu_us", label: "CPU µs/upgrade and close", factor: 0.9, ofHAProxy: true},
}

// writeTable prints the table of docs/performance.md.
func writeTable(w io.Writer, rs results) {
	full := rs["full"]
	fmt.Fprintf(w, "Commit %s, %s, %v cores of %v, Linux %v, %v, %d rounds.\n\n",
		full.Commit, strings.Split(full.Started, "T")[0], full.Host["cpus"], full.Host["cpu"], full.Host["kernel"], full.Host["go"], full.Rounds)
	fmt.Fprintln(w, "| scenario | metric | usual | HAProxy | nginx | ours [min..max] | target | met |")
	fmt.Fprintln(w, "|---|---|---:|---:|---:|---:|---|---|")
	for _, r := range rows {
		m := full
		if r.run != "" {
			m = rs[r.run]
		}
		med := func(target string) float64 {
			if v := m.median(r.scenario, target, r.metric); !math.IsNaN(v) {
				return v
			}
			return full.median(r.scenario, target, r.metric) // proxies are not in every run
		}
		limit, text := r.factor, number(r.factor)
		if r.ofHAProxy {
			limit *= med("haproxy")
			text = fmt.Sprintf("%.1f × HAProxy = %s", r.factor, number(limit))
		}
		ours := med("ours")
		cells(w, r.scenario, r.label, med, number(ours)+spread(m.values(r.scenario, "ours", r.metric)), text, verdict(ours, limit))
	}
	flat := func(target string) float64 {
		return full.median("scale/8000", target, "cpu_us") / full.median("scale/100", target, "cpu_us")
	}
	cells(w, "scale", "CPU µs/frame, 8000 against 100 phones", flat, number(flat("ours")), number(1.2), verdict(flat("ours"), 1.2))
	others := func(target string) float64 { return full.median("slow", target, "kept") }
	met := "yes"
	if !(others("ours") >= 0.9) { // the ratio strays by a tenth from run to run
		met = "no"
	}
	cells(w, "slow", "the others' throughput", others, number(others("ours"))+spread(full.values("slow", "ours", "kept")), "1.0 ± 0.1", met)
}

func cells(w io.Writer, scenario, label string, of func(target string) float64, ours, target, met string) {
	fmt.Fprintf(w, "| %s | %s | %s | %s | %s | **%s** | %s | %s |\n", scenario, label,
		number(of("upstream")), number(of("haproxy")), number(of("nginx")), ours, target, met)
}

func verdict(ours, limit float64) string {
	switch {
	case math.IsNaN(ours / limit):
		return "–"
	case ours <= limit:
		return "yes"
	}
	return fmt.Sprintf("no, %.2f times the target", ours/limit)
}

// spread is empty for a single round.
func spread(v []float64) string {
	if len(v) < 2 {
		return ""
	}
	return fmt.Sprintf(" [%s..%s]", number(slices.Min(v)), number(slices.Max(v)))
}

// number prints three significant digits, with commas from a thousand on.
func number(v float64) string {
	switch {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "–"
	case v < 9.995:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case v < 99.95:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case v < 999.5:
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	n := int(math.Round(v))
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}
