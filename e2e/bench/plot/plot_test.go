package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// reports are what relaybench writes, with members that nobody needs.
var reports = map[string]string{
	"full": `{"args": ["-bin", "x"], "started": "2026-01-02T03:04:05Z", "rounds": 3, "host": {"cpus": 2}, "scenarios": [
		{"name": "up/256", "labels": {"cpu_us": "x"}, "targets": {
			"ours": {"cpu_us": {"values": [0.8123456, 0.7, 0.9], "median": 0.8123456}, "ops": {"values": [1]}},
			"upstream": {"cpu_us": {"values": [12.1]}}}},
		{"name": "up1/256", "targets": {"ours": {"cpu_us": {"values": [3]}}, "haproxy": {"cpu_us": {"values": [4]}}}},
		{"name": "connect", "targets": {"ours": {"cpu_us": {"values": [99]}}, "haproxy": {"cpu_us": {"values": [100]}}}},
		{"name": "idle", "about": "2048 phones on 205 binaries, ...", "targets": {
			"ours": {"kib_phone_used": {"values": [2]}}, "nginx": {"left_pct": {"values": [0]}}}}]}`,
	"closed": `{"scenarios": [{"name": "idle", "about": "2048 phones on 205 binaries", "targets": {
		"ours": {"left_pct": {"values": [10]}, "kib_phone_used": {"values": [7]}}}}]}`,
	"idle-1024": `{"scenarios": [{"name": "idle", "about": "1024 phones on 103 binaries", "targets": {
		"ours": {"kib_phone_used": {"values": [3]}}}}]}`,
}

func keptReports(t *testing.T) results {
	t.Helper()
	raw, data := t.TempDir(), t.TempDir()
	for name, report := range reports {
		if err := os.WriteFile(filepath.Join(raw, name+".json"), []byte(report), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	rs, err := readResults(raw)
	if err != nil {
		t.Fatal(err)
	}
	if err := rs.keep(data, "abc1234"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(data, "full.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dropped := range []string{"args", "ops", "labels", "0.8123456"} {
		if strings.Contains(string(b), dropped) {
			t.Errorf("the kept report still has %q", dropped)
		}
	}
	rs, err = readResults(data)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func TestTableFromKeptReports(t *testing.T) {
	t.Parallel()
	var table strings.Builder
	writeTable(&table, keptReports(t))
	for _, want := range []string{
		"Commit abc1234, 2026-01-02, 2 cores",
		"| up/256 | CPU µs/frame | 12.1 | – | – | **0.81 [0.70..0.90]** | 1.00 | yes |",
		"| up1/256 | CPU µs/frame | – | 4.00 | – | **3.00** | 1.0 × HAProxy = 4.00 | yes |",
		"| connect | CPU µs/upgrade and close | – | 100 | – | **99.0** | 0.9 × HAProxy = 90.0 | no, 1.10 times the target |",
		"| idle | % of the growth left after closing | – | – | 0.00 | **10.0** | 15.0 | yes |",
	} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("no line %q in\n%s", want, table.String())
		}
	}
}

func TestMemoryAgainstPhones(t *testing.T) {
	t.Parallel()
	got := keptReports(t).memory("ours")
	want := []point{{0, 0}, {1024, 3}, {2048, 4}}
	if len(got) != len(want) {
		t.Fatalf("points %v, want %v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("point %d is %v, want %v", i, got[i], want[i])
		}
	}
}

func TestPlotsAreXML(t *testing.T) {
	t.Parallel()
	rs := keptReports(t)
	for name, svg := range map[string]string{"cpu": cpuPlot(rs["full"]), "memory": memoryPlot(rs)} {
		if strings.Contains(svg, "NaN") {
			t.Errorf("%s: a missing figure was drawn", name)
		}
		d := xml.NewDecoder(strings.NewReader(svg))
		for {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
}

func TestLabelsKeepApart(t *testing.T) {
	t.Parallel()
	d := &drawing{}
	d.labels([]label{{"a", "a", 0, 100}, {"b", "b", 0, 101}, {"c", "c", 0, 101}, {"d", "d", 0, 300}}, 1)
	var last float64
	for i, m := range regexp.MustCompile(`<text.* y="([0-9.]+)"`).FindAllStringSubmatch(d.String(), -1) {
		y, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 && y-last < labelHeight-0.5 {
			t.Errorf("label %d is %.1f below the one before, want %d", i, y-last, labelHeight)
		}
		last = y
	}
	if last != 304.5 {
		t.Errorf("the label with room around it is at %.1f, want 304.5", last)
	}
}
