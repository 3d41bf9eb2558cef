package main

import (
	"fmt"
	"math"
	"strings"
)

var sizes = []struct {
	bytes float64
	name  string
}{{256, "256 B"}, {4096, "4 KiB"}, {65536, "64 KiB"}}

// cpuPlot draws the CPU per frame against the frame's size, both ways.
func cpuPlot(full run) string {
	const title = "CPU per frame"
	const top, bottom, width = 106.0, 400.0, 200.0
	d := newDrawing(940, 452, title, "Microseconds of CPU per frame by frame size, phone to binary and binary to phone: "+inWords(full))
	d.text(24, 56, "", "microseconds of the whole process, 8 connections, pipelined; logarithmic scales, less is better")

	lo, hi := decades(full)
	for i, dir := range []struct{ name, title string }{{"up", "phone → binary"}, {"down", "binary → phone"}} {
		left := 138 + 430*float64(i)
		x := axis{lo: 256, hi: 65536, from: left, to: left + width, log: true}
		y := axis{lo: lo, hi: hi, from: bottom, to: top, log: true}
		d.text(left+width/2, 88, "b m", dir.title)
		for v := lo; v < hi*1.01; v *= 10 {
			d.line(left-70, y.at(v), left+width+12, y.at(v), "grid")
			if i == 0 { // both panels share the scale
				d.text(left-78, y.at(v)+4.5, "e", tick(v))
			}
		}
		for _, size := range sizes {
			d.line(x.at(size.bytes), top, x.at(size.bytes), bottom, "grid")
			d.text(x.at(size.bytes), bottom+24, "m", size.name)
		}
		var small, large []label
		for _, t := range targets {
			s := series{class: t.class, name: t.name}
			for _, size := range sizes {
				if v := full.median(fmt.Sprintf("%s/%.0f", dir.name, size.bytes), t.target, "cpu_us"); !math.IsNaN(v) {
					s.points = append(s.points, point{size.bytes, v})
				}
			}
			if len(s.points) < len(sizes) {
				continue
			}
			d.series(s, x, y)
			first, last := s.points[0], s.points[len(s.points)-1]
			small = append(small, label{t.class, number(first.y), x.at(first.x), y.at(first.y)})
			large = append(large, label{t.class, t.name + " " + number(last.y), x.at(last.x), y.at(last.y)})
		}
		d.labels(small, -1)
		d.labels(large, 1)
	}
	return d.end()
}

// decades are the powers of ten around all values of the plot.
func decades(full run) (lo, hi float64) {
	lo, hi = math.Inf(1), 0
	for _, dir := range []string{"up", "down"} {
		for _, size := range sizes {
			for _, t := range targets {
				if v := full.median(fmt.Sprintf("%s/%.0f", dir, size.bytes), t.target, "cpu_us"); v > 0 {
					lo, hi = min(lo, v), max(hi, v)
				}
			}
		}
	}
	return math.Pow(10, math.Floor(math.Log10(lo))), math.Pow(10, math.Ceil(math.Log10(hi)))
}

// inWords says what the plot shows to those who do not see it.
func inWords(full run) string {
	var all []string
	for _, t := range targets {
		for _, dir := range []string{"up", "down"} {
			var vs []string
			for _, size := range sizes {
				vs = append(vs, number(full.median(fmt.Sprintf("%s/%.0f", dir, size.bytes), t.target, "cpu_us"))+" at "+size.name)
			}
			all = append(all, fmt.Sprintf("%s %s %s", t.name, dir, strings.Join(vs, ", ")))
		}
	}
	return strings.Join(all, "; ")
}

// memoryPlot draws the growth of resident memory against idle phones.
func memoryPlot(rs results) string {
	const title = "Memory of idle phones"
	const top, bottom, left, right = 80.0, 350.0, 70.0, 480.0
	var all []series
	var words []string
	most := point{}
	for _, t := range targets {
		s := series{class: t.class, name: t.name, points: rs.memory(t.target)}
		if len(s.points) < 2 {
			continue
		}
		all = append(all, s)
		for _, p := range s.points {
			most = point{max(most.x, p.x), max(most.y, p.y)}
		}
		last := s.points[len(s.points)-1]
		words = append(words, fmt.Sprintf("%s %s MiB at %s phones", t.name, number(last.y), number(last.x)))
	}
	d := newDrawing(720, 420, title, "Growth of resident memory: "+strings.Join(words, "; "))
	d.text(24, 56, "", "growth of the resident size in MiB, after one frame each way per phone; less is better")
	xStep, yStep := step(most.x), step(most.y)
	x := axis{lo: 0, hi: most.x, from: left, to: right}
	y := axis{lo: 0, hi: math.Ceil(most.y/yStep) * yStep, from: bottom, to: top}
	for v := 0.0; v <= y.hi*1.001; v += yStep {
		d.line(left, y.at(v), right+12, y.at(v), "grid")
		d.text(left-10, y.at(v)+4.5, "e", tick(v))
	}
	for v := 0.0; v <= x.hi*1.001; v += xStep {
		d.text(x.at(v), bottom+24, "m", tick(v))
	}
	d.text((left+right)/2, bottom+48, "m", "idle phones, ten to a server-id")
	var ends []label
	for _, s := range all {
		d.series(s, x, y)
		last := s.points[len(s.points)-1]
		ends = append(ends, label{s.class, fmt.Sprintf("%s %s KiB each", s.name, number(last.y*1024/last.x)), x.at(last.x), y.at(last.y)})
	}
	d.labels(ends, 1)
	return d.end()
}

// step is a round distance that divides an axis into four to nine parts.
func step(most float64) float64 {
	if most <= 0 {
		return 1
	}
	p := math.Pow(10, math.Floor(math.Log10(most)))
	for _, f := range []float64{0.1, 0.2, 0.5, 1} {
		if most/(p*f) <= 9 {
			return p * f
		}
	}
	return 2 * p
}

// tick writes a round number.
func tick(v float64) string {
	if v >= 1000 {
		return number(v)
	}
	return fmt.Sprintf("%g", v)
}
