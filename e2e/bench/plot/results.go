package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A run is one report of relaybench. Only what the table and the plots need is
// read, so writing one back is what makes the kept files small.
type run struct {
	Commit    string         `json:"commit"`
	Started   string         `json:"started"`
	Seconds   float64        `json:"seconds"`
	Host      map[string]any `json:"host"`
	Rounds    int            `json:"rounds"`
	Scenarios []scenario     `json:"scenarios"`
}

type scenario struct {
	Name    string                     `json:"name"`
	About   string                     `json:"about"`
	Targets map[string]map[string]cell `json:"targets"` // by target and metric
	Errors  map[string][]string        `json:"errors,omitempty"`
}

// cell holds one value of each round that did not fail.
type cell struct {
	Values []float64 `json:"values"`
}

// kept are the metrics that are worth committing; foreign and steal tell a
// reader how quiet the machine was.
var kept = []string{"cpu_us", "p50_us", "p99_us", "kib_phone", "kib_phone_used", "rss_start", "rss_used", "left_pct", "kept", "foreign", "steal"}

// results are the runs by the name of their file: full, closed, idle-500 ...
type results map[string]run

func readResults(dir string) (results, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	rs := results{}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var r run
		if err := json.Unmarshal(b, &r); err != nil {
			return nil, fmt.Errorf("reading %s: %w", file, err)
		}
		rs[strings.TrimSuffix(filepath.Base(file), ".json")] = r
	}
	for _, name := range []string{"full", "closed"} {
		if _, there := rs[name]; !there {
			return nil, fmt.Errorf("no %s.json in %s", name, dir)
		}
	}
	return rs, nil
}

// keep writes the runs to dir without what nobody reads. Idle runs of an earlier
// measurement go, as it may have counted other numbers of phones.
func (rs results) keep(dir, commit string) error {
	old, err := filepath.Glob(filepath.Join(dir, "idle-*.json"))
	if err != nil {
		return err
	}
	for _, file := range old {
		if err := os.Remove(file); err != nil {
			return err
		}
	}
	for name, r := range rs {
		r.Commit = commit
		for _, s := range r.Scenarios {
			for _, metrics := range s.Targets {
				for key, c := range metrics {
					if !slices.Contains(kept, key) {
						delete(metrics, key)
						continue
					}
					for i, v := range c.Values {
						c.Values[i] = significant(v)
					}
				}
			}
		}
		b, err := json.Marshal(r)
		if err != nil {
			return err
		}
		// One scenario a line: small, and still readable in a diff.
		lines := strings.ReplaceAll(string(b), `{"name":`, "\n"+`{"name":`)
		if err := os.WriteFile(filepath.Join(dir, name+".json"), []byte(lines+"\n"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// significant rounds to four digits, more than any of these figures is good for.
func significant(v float64) float64 {
	r, err := strconv.ParseFloat(strconv.FormatFloat(v, 'g', 4, 64), 64)
	if err != nil {
		return v
	}
	return r
}

func (r run) values(scenario, target, metric string) []float64 {
	for _, s := range r.Scenarios {
		if s.Name == scenario {
			return s.Targets[target][metric].Values
		}
	}
	return nil
}

// median is NaN without values, and then so is all that is derived from it.
func (r run) median(scenario, target, metric string) float64 {
	v := slices.Sorted(slices.Values(r.values(scenario, target, metric)))
	n := len(v)
	switch {
	case n == 0:
		return math.NaN()
	case n%2 == 0:
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[n/2]
}

type point struct{ x, y float64 }

// memory is the growth in MiB against the number of used, idle phones.
func (rs results) memory(target string) []point {
	ps := []point{{0, 0}}
	for name, r := range rs {
		for _, s := range r.Scenarios {
			var phones float64
			// closed repeats the largest number of full.
			if _, err := fmt.Sscanf(s.About, "%f phones on", &phones); err != nil || s.Name != "idle" || name == "closed" {
				continue
			}
			if growth := r.median("idle", target, "kib_phone_used") * phones / 1024; !math.IsNaN(growth) {
				ps = append(ps, point{phones, growth})
			}
		}
	}
	slices.SortFunc(ps, func(a, b point) int { return cmp.Compare(a.x, b.x) })
	return ps
}

// failures lists what relaybench could not measure.
func (rs results) failures() (list []string) {
	for name, r := range rs {
		for _, s := range r.Scenarios {
			for target, errs := range s.Errors {
				for _, e := range errs {
					list = append(list, fmt.Sprintf("%s: %s: %s: %s", name, s.Name, target, e))
				}
			}
		}
	}
	slices.Sort(list)
	return list
}
