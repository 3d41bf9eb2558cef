package main

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The documents and the program say the same: names, defaults, codes and words
// in docs/ and README.md are held against what the program is made of.

func readDoc(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// wantLines checks that each line stands in a document as it is.
func wantLines(t *testing.T, path string, lines []string) {
	t.Helper()
	have := strings.Split(readDoc(t, path), "\n")
	for _, l := range lines {
		if !slices.Contains(have, l) {
			t.Errorf("%s lacks the line\n%s", path, l)
		}
	}
}

func TestDocsFlags(t *testing.T) {
	t.Parallel()
	var rows []string
	o := defaultOptions()
	o.flags().VisitAll(func(f *flag.Flag) {
		_, usage := flag.UnquoteUsage(f)
		def := "`" + f.DefValue + "`"
		if f.DefValue == "" {
			def = "none"
		}
		rows = append(rows, fmt.Sprintf("| `-%s` | %s | %s |", f.Name, def, usage))
	})
	wantLines(t, "README.md", rows)
	got := regexp.MustCompile("(?m)^\\| `-[a-z-]+` \\|.*$").FindAllString(readDoc(t, "README.md"), -1)
	if len(got) != len(rows) {
		t.Errorf("README.md has %d rows of flags, the program has %d flags", len(got), len(rows))
	}
	known := map[string]bool{}
	o.flags().VisitAll(func(f *flag.Flag) { known["-"+f.Name] = true; known[envName(f.Name)] = true })
	known[bypassName] = true
	// Of other commands, of probe and of status.
	for _, other := range []string{"-h", "-watch", "-n", "-idle", "-json", "-run", "-bench", "-benchmem", "-ni"} {
		known[other] = true
	}
	mention := regexp.MustCompile("`(-[a-z][a-z-]*)|(PYRYCODE_RELAY_[A-Z_]+)")
	for _, path := range docPaths(t) {
		for _, m := range mention.FindAllStringSubmatch(readDoc(t, path), -1) {
			if name := m[1] + m[2]; !known[name] && name != "PYRYCODE_RELAY_" {
				t.Errorf("%s mentions %s, which the program does not have", path, name)
			}
		}
	}
}

func TestDocsCloseReasons(t *testing.T) {
	t.Parallel()
	doc := readDoc(t, "docs/protocol.md")
	_, table, ok := strings.Cut(doc, "\n## Close codes\n")
	if !ok {
		t.Fatal("docs/protocol.md has no section Close codes")
	}
	row := regexp.MustCompile(`(?m)^\| ([^|]+) \| ([^|]+) \|`)
	word := regexp.MustCompile("`([^`]+)`")
	documented := map[string]string{} // word → code as in the table
	for _, m := range row.FindAllStringSubmatch(table, -1) {
		for _, w := range word.FindAllStringSubmatch(m[2], -1) {
			documented[w[1]] = m[1]
		}
	}
	for r := range closeReasonCount {
		code, ok := documented[r.String()]
		delete(documented, r.String())
		switch {
		case !ok:
			t.Errorf("reason %q is not in the table of close codes", r)
		case r.code() != 0 && code != strconv.Itoa(int(r.code())):
			t.Errorf("reason %q stands beside %s, the program has %d", r, code, r.code())
		case r.code() == 0 && !strings.HasPrefix(code, "the "):
			t.Errorf("reason %q stands beside %s, but the code is a peer's", r, code)
		}
	}
	for w := range documented {
		t.Errorf("the table of close codes has %q, which the program never says", w)
	}
	for r := range dropReasonCount {
		if !strings.Contains(doc, "| `"+r.String()+"` |") {
			t.Errorf("docs/protocol.md has no row for the drop reason %q", r)
		}
	}
	for o := range upgradeOutcomeCount {
		if !strings.Contains(doc, "`"+o.String()+"` |\n") {
			t.Errorf("docs/protocol.md has no row for the upgrade outcome %q", o)
		}
	}
}

func TestDocsSingleInstance(t *testing.T) {
	t.Parallel()
	doc := readDoc(t, "docs/architecture.md")
	want := []string{
		"## What this binary does",
		"## What this binary does NOT do",
		"## Single-instance constraint (v1)",
		"### Why",
		"### What multi-instance would require",
		"### The `" + bypassName + "` bypass",
		"### What the self-check sees and what it can't",
		"## Threat model",
	}
	at := -1
	for _, heading := range want {
		i := strings.Index(doc, "\n"+heading+"\n")
		if i <= at {
			t.Errorf("docs/architecture.md: %q is missing or out of order", heading)
		}
		at = max(at, i)
	}
	for v := range publicVerdictCount {
		if !strings.Contains(doc, "`"+v.String()+"`") {
			t.Errorf("docs/architecture.md does not explain the verdict %q", v)
		}
	}
	for path, words := range map[string][]string{
		"docs/architecture.md": {"MUST NOT", "4404", bypassName + "=1", "-public-url", "-instance-lock",
			"for **emergency** and **migration** use only, and not recommended for production"},
		"docs/decisions/0001-single-instance.md": {bypassName, "-public-url", "-instance-lock",
			"## Alternatives", "## Canaries"},
		"README.md": {"**Run exactly one.**", bypassName + "=1", "docs/architecture.md#single-instance-constraint-v1"},
	} {
		for _, w := range words {
			if !strings.Contains(readDoc(t, path), w) {
				t.Errorf("%s does not mention %s", path, w)
			}
		}
	}
}

func TestDocsMetrics(t *testing.T) {
	t.Parallel()
	m := newMetrics(identity{}, buildVersion{}, new(instanceState), &budget{})
	family := regexp.MustCompile(`(?m)^# HELP (\S+) (.*)\n# TYPE \S+ (\S+)$`)
	var rows []string
	for _, f := range family.FindAllStringSubmatch(string(m.text()), -1) {
		rows = append(rows, fmt.Sprintf("| `%s` | %s | %s |", f[1], f[3], f[2]))
	}
	wantLines(t, "docs/metrics.md", rows)
	if _, ok := residentMemory(); !ok {
		return // the documents have metrics that this system cannot tell
	}
	documented := regexp.MustCompile("(?m)^\\| `pyrycode_relay_[a-z_]+` \\|").FindAllString(readDoc(t, "docs/metrics.md"), -1)
	if len(documented) != len(rows) {
		t.Errorf("docs/metrics.md has %d rows of metrics, the program has %d", len(documented), len(rows))
	}
}

// docPaths lists the documents.
func docPaths(t *testing.T) []string {
	t.Helper()
	paths := []string{"README.md"}
	err := filepath.WalkDir("docs", func(path string, d fs.DirEntry, err error) error {
		if filepath.Ext(path) == ".md" {
			paths = append(paths, filepath.ToSlash(path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// TestDocsLinks checks that every link within the repository leads somewhere,
// headings included, that the index has every document, and that every source
// file has its line in the architecture.
func TestDocsLinks(t *testing.T) {
	t.Parallel()
	link := regexp.MustCompile(`\]\(([^)#]*)(#[^)]*)?\)`)
	heading := regexp.MustCompile(`(?m)^#+ (.*)$`)
	drop := regexp.MustCompile("[^a-z0-9 _-]")
	for _, path := range docPaths(t) {
		for _, m := range link.FindAllStringSubmatch(readDoc(t, path), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			target := path
			if m[1] != "" {
				target = filepath.Join(filepath.Dir(path), m[1])
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s: %v", path, m[0], err)
				continue
			}
			found := m[2] == ""
			for _, h := range heading.FindAllStringSubmatch(readDoc(t, target), -1) {
				anchor := strings.ReplaceAll(drop.ReplaceAllString(strings.ToLower(h[1]), ""), " ", "-")
				found = found || "#"+anchor == m[2]
			}
			if !found {
				t.Errorf("%s links to %s, which has no such heading", path, m[0])
			}
		}
		if name, ok := strings.CutPrefix(path, "docs/"); ok && name != "README.md" &&
			!strings.Contains(readDoc(t, "docs/README.md"), "]("+name+")") {
			t.Errorf("docs/README.md does not list %s", name)
		}
	}
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range sources {
		if !strings.HasSuffix(f, "_test.go") && !strings.Contains(readDoc(t, "docs/architecture.md"), "| `"+f+"` |") {
			t.Errorf("docs/architecture.md has no line for %s", f)
		}
	}
}

// TestDocsFrameWay checks that the functions that a frame passes, as the architecture
// lists them, are in the files that it names.
func TestDocsFrameWay(t *testing.T) {
	t.Parallel()
	_, way, _ := strings.Cut(readDoc(t, "docs/architecture.md"), "| phone to binary |")
	way, _, _ = strings.Cut(way, "\n\n")
	name := regexp.MustCompile("`([a-zA-Z]+)`")
	found := 0
	for _, row := range strings.Split(way, "\n") {
		cells := strings.Split(row, "|")
		if len(cells) < 5 || !strings.Contains(cells[2], ".go`") {
			continue
		}
		source := readDoc(t, strings.Trim(cells[2], " `"))
		for _, f := range name.FindAllStringSubmatch(cells[3]+cells[4], -1) {
			if found++; !regexp.MustCompile(`(?m)^func (\([^)]*\) )?` + f[1] + `\(`).MatchString(source) {
				t.Errorf("docs/architecture.md: %s has no function %s", cells[2], f[1])
			}
		}
	}
	if found < 20 {
		t.Errorf("docs/architecture.md lists %d functions of a frame's way", found)
	}
}

// TestDocsTables checks that every table has the line under its head without
// which it is shown as text, and the head's number of cells in each row.
func TestDocsTables(t *testing.T) {
	t.Parallel()
	rule := regexp.MustCompile(`^\|(:?-+:?\|)+$`)
	code := regexp.MustCompile("`[^`]*`|\\\\\\|") // a bar in there parts no cells
	cells := func(line string) int { return strings.Count(code.ReplaceAllString(line, ""), "|") }
	for _, path := range docPaths(t) {
		row, head := 0, 0
		for i, line := range strings.Split(readDoc(t, path), "\n") {
			if !strings.HasPrefix(line, "|") {
				row = 0
				continue
			}
			switch row++; {
			case row == 1:
				head = cells(line)
			case row == 2 && !rule.MatchString(line):
				t.Errorf("%s:%d: a table without |---| under its head", path, i+1)
			case cells(line) != head:
				t.Errorf("%s:%d: %d bars, the head has %d", path, i+1, cells(line), head)
			}
		}
	}
}
