package main

import (
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// What the probe command shows: each step as soon as it is over, for a person,
// or everything at the end, for a script.

// probeReport is the output of probe -json.
type probeReport struct {
	URL                string          `json:"url"`
	OK                 bool            `json:"ok"`
	Steps              []probeStep     `json:"steps"`
	CertificateExpires *time.Time      `json:"certificate_expires,omitempty"`
	RoundTrip          *roundTripTimes `json:"round_trip_ms,omitempty"`
	Instances          []probeInstance `json:"instances"`
}

// probeStep is the verdict on one step.
type probeStep struct {
	Name    string      `json:"step"`
	Verdict stepVerdict `json:"verdict"`
	Detail  string      `json:"detail"`
	Remedy  string      `json:"remedy,omitempty"`
}

type stepVerdict string

const (
	stepOK      stepVerdict = "ok"
	stepWarn    stepVerdict = "warn" // works, and should be better
	stepFail    stepVerdict = "fail"
	stepSkipped stepVerdict = "skipped"
)

type roundTripTimes struct {
	Min    float64 `json:"min"`
	Median float64 `json:"median"`
	Max    float64 `json:"max"`
}

// probeInstance is a relay that answered.
type probeInstance struct {
	ID          string    `json:"instance"`
	Started     time.Time `json:"started"`
	Connections int       `json:"connections"`
}

// probeOutput is where it goes.
type probeOutput struct {
	out      io.Writer
	progress io.Writer
	json     bool
	live     bool // progress is a terminal: its last line is overwritten
}

func (o *probeOutput) begin(url string, n int) {
	if !o.json {
		fmt.Fprintf(o.out, "%s, %d connections\n\n", url, n)
	}
}

// tick shows what is done just now, where that can be overwritten.
func (o *probeOutput) tick(text string) {
	if o.live {
		fmt.Fprintf(o.progress, "\r\x1b[K… %s", text)
	}
}

// note shows why it takes long.
func (o *probeOutput) note(text string) {
	if o.live {
		o.tick(text)
		return
	}
	fmt.Fprintln(o.progress, text)
}

func (o *probeOutput) clear() {
	if o.live {
		fmt.Fprint(o.progress, "\r\x1b[K")
	}
}

func (o *probeOutput) step(s probeStep) {
	o.clear()
	if o.json {
		return
	}
	word := string(s.Verdict)
	if s.Verdict == stepFail {
		word = "FAIL"
	}
	fmt.Fprintf(o.out, "%-7s  %-11s  %s\n", word, s.Name, s.Detail)
	if s.Remedy != "" {
		fmt.Fprintf(o.out, "%-7s  %-11s  → %s\n", "", "", s.Remedy)
	}
}

func (o *probeOutput) finish(r *probeReport) {
	o.clear()
	if o.json {
		if r.Instances == nil {
			r.Instances = []probeInstance{} // a list, for scripts
		}
		e := json.NewEncoder(o.out)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		e.Encode(r)
		return
	}
	if r.OK {
		fmt.Fprintln(o.out, "\nThis relay works from here.")
		return
	}
	fmt.Fprintln(o.out, "\nThis relay does not work from here: see FAIL above, and the arrow under it.")
}

// brief is a duration with as many digits as a person reads.
func brief(d time.Duration) string {
	switch {
	case d >= time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(100 * time.Microsecond).String()
	}
	return d.Round(time.Microsecond).String()
}

func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
