package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// style draws on a card of its own, so that the page behind does not matter;
// the card follows the reader's colour scheme. Series differ by more than colour.
const style = `<style>
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#57606a}
.h{font-size:16px;font-weight:600;fill:#1f2328}.b{font-weight:600}.e{text-anchor:end}.m{text-anchor:middle}
.card{fill:#fff;stroke:#d0d7de}.grid{stroke:#e6e9ed}.lead{stroke-width:1;opacity:.5}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
path.ours{stroke:#0969da}path.usual{stroke:#bc4c00}path.haproxy{stroke:#4d7c3a}path.nginx{stroke:#7d6bb0}
.line.ours{stroke-width:3}.line.haproxy{stroke-dasharray:7 4}.line.nginx{stroke-dasharray:2 4}
.dot.ours,.t.ours{fill:#0969da}.dot.usual,.t.usual{fill:#bc4c00}
.dot.haproxy,.t.haproxy{fill:#4d7c3a}.dot.nginx,.t.nginx{fill:#7d6bb0}.t.ours{font-weight:600}
.t{stroke:#fff;stroke-width:4;paint-order:stroke}
@media (prefers-color-scheme:dark){
text{fill:#9198a1}.h{fill:#f0f6fc}.card{fill:#0d1117;stroke:#3d444d}.t{stroke:#0d1117}.grid{stroke:#242b33}
path.ours{stroke:#4493f8}path.usual{stroke:#f0883e}path.haproxy{stroke:#7ab55c}path.nginx{stroke:#a798dc}
.dot.ours,.t.ours{fill:#4493f8}.dot.usual,.t.usual{fill:#f0883e}
.dot.haproxy,.t.haproxy{fill:#7ab55c}.dot.nginx,.t.nginx{fill:#a798dc}}
</style>`

// drawing collects the elements of one SVG.
type drawing struct{ strings.Builder }

func newDrawing(width, height int, title, desc string) *drawing {
	d := &drawing{}
	d.add(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-labelledby="title desc">`, width, height, width, height)
	d.add(`<title id="title">%s</title>`, html.EscapeString(title))
	d.add(`<desc id="desc">%s</desc>`, html.EscapeString(desc))
	d.add("%s", style)
	d.add(`<rect class="card" x=".5" y=".5" width="%d" height="%d" rx="8"/>`, width-1, height-1)
	d.text(24, 34, "h", title)
	return d
}

func (d *drawing) add(format string, args ...any) { fmt.Fprintf(d, format+"\n", args...) }

func (d *drawing) text(x, y float64, class, s string) {
	d.add(`<text class="%s" x="%.1f" y="%.1f">%s</text>`, class, x, y, html.EscapeString(s))
}

func (d *drawing) line(x1, y1, x2, y2 float64, class string) {
	d.add(`<path class="%s" d="M%.1f %.1fL%.1f %.1f"/>`, class, x1, y1, x2, y2)
}

func (d *drawing) end() string { return d.String() + "</svg>\n" }

// axis maps values to pixels.
type axis struct {
	lo, hi   float64 // values
	from, to float64 // pixels
	log      bool
}

func (a axis) at(v float64) float64 {
	lo, hi := a.lo, a.hi
	if a.log {
		lo, hi, v = math.Log(lo), math.Log(hi), math.Log(v)
	}
	return a.from + (a.to-a.from)*(v-lo)/(hi-lo)
}

// series is one relay or proxy in a plot.
type series struct {
	class, name string
	points      []point
}

// targets are relaybench's, ours last so that its line is on top.
var targets = []struct{ target, class, name string }{
	{"upstream", "usual", "usual relay"},
	{"nginx", "nginx", "nginx"},
	{"haproxy", "haproxy", "HAProxy"},
	{"ours", "ours", "this relay"},
}

func (d *drawing) series(s series, x, y axis) {
	var path strings.Builder
	for i, p := range s.points {
		fmt.Fprintf(&path, "%c%.1f %.1f", "ML"[min(i, 1)], x.at(p.x), y.at(p.y))
	}
	d.add(`<path class="line %s" d="%s"/>`, s.class, path.String())
	for _, p := range s.points {
		d.add(`<circle class="dot %s" cx="%.1f" cy="%.1f" r="%s"/>`, s.class, x.at(p.x), y.at(p.y), map[bool]string{true: "4.5", false: "3.5"}[s.class == "ours"])
	}
}

// label is a text beside a point of its series.
type label struct {
	class, text string
	x, y        float64
}

const labelHeight = 17

// labels writes texts beside points, moved apart until none covers another,
// with a thin line to the point where one had to move. side is 1 for texts to
// the right of their points, -1 to the left.
func (d *drawing) labels(ls []label, side float64) {
	slices.SortStableFunc(ls, func(a, b label) int { return int(a.y*10) - int(b.y*10) })
	at := make([]float64, len(ls))
	for i, l := range ls {
		at[i] = l.y
	}
	for range 200 {
		for i := 1; i < len(at); i++ {
			if overlap := labelHeight - (at[i] - at[i-1]); overlap > 0 {
				at[i-1] -= overlap / 2
				at[i] += overlap / 2
			}
		}
	}
	class := "t "
	if side < 0 {
		class = "t e "
	}
	for i, l := range ls {
		d.line(l.x+side*7, l.y, l.x+side*20, at[i], "lead "+l.class)
		d.text(l.x+side*24, at[i]+4.5, class+l.class, l.text)
	}
}
