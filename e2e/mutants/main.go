// Mutants changes one condition, constant or statement of the relay at a time and
// reports which changes no test notices. README.md beside it says how to read that.
//
// All changes are compiled into one test binary, each behind a switch, because a build
// for each would take hours. A file beside the binary says which one is on, so that it
// is on in the programs that tests start, too.
package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/build"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

var (
	root  = flag.String("root", "../..", "`directory` of the relay")
	work  = flag.String("work", filepath.Join(os.TempDir(), "relay-mutants"), "`directory` for the binary and for what is known so far")
	files = flag.String("files", "frame.go,envelope.go,buffer.go,limits.go,registry.go", "`files` to change")
	slice = flag.Duration("for", time.Hour, "how long to go on; the next run continues")
	share = flag.Float64("share", 1, "part of the changes to try, drawn by -seed")
	seed  = flag.Uint64("seed", 1, "`seed` of -share")
	tests = flag.String("tests", "^(Test|Fuzz)", "`tests` to run")
	skip  = flag.String("skip", "^Test(Docs|Log|Options|Probe|Lock|World|IDsTellOf|Stress|LimitsMemoryStays|LimitsNewcomers|"+
		"RelayDrainDropsSilent|ClockStall|ClaimIncumbentSurvivesStall)", "which of them to leave out")
	first   = flag.String("first", "^$", "of these `tests` the ones to run by themselves before the others")
	slack   = flag.Duration("slack", 20*time.Second, "how much longer than three times as long as usual a test may take")
	workers = flag.Int("workers", 3, "how many to try at once")
	again   = flag.Bool("again", false, "try what was not caught again, as with more tests (-skip)")
)

// mutant is one change.
type mutant struct {
	ID   int
	Key  string // file, function, what is changed and how, without the line
	Line int
}

// outcome is what became of a mutant.
type outcome struct {
	Key    string
	Caught string // by this test; "" by none
	Tests  int    // that reach it
}

func main() {
	log.SetFlags(0)
	flag.Parse()
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	if err := os.MkdirAll(*work, 0o755); err != nil {
		return err
	}
	mutants, err := compile()
	if err != nil {
		return err
	}
	known, err := readOutcomes()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), *slice)
	defer cancel()
	reach, err := reached(ctx)
	if err != nil {
		return err
	}
	draw := rand.New(rand.NewPCG(*seed, 0))
	var tried []mutant
	for _, m := range mutants {
		if draw.Float64() < *share {
			tried = append(tried, m)
		}
	}
	out, err := os.OpenFile(filepath.Join(*work, "outcomes"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	var todo []mutant
	for _, m := range tried {
		if o, done := known[m.Key]; !done || o.Caught == "" && *again {
			todo = append(todo, m)
		}
	}
	var mu sync.Mutex // guards todo, known, out, err
	var wg sync.WaitGroup
	for i := range *workers {
		own := fmt.Sprint(binary(), i)
		if out, err := exec.Command("cp", binary(), own).CombinedOutput(); err != nil {
			return fmt.Errorf("copying the binary: %w: %s", err, out)
		}
		wg.Go(func() {
			for {
				mu.Lock()
				if len(todo) == 0 || err != nil {
					mu.Unlock()
					return
				}
				m := todo[0]
				todo = todo[1:]
				mu.Unlock()
				o, failed := try(ctx, own, m, reach)
				if ctx.Err() != nil {
					return
				}
				mu.Lock()
				known[m.Key] = o
				err = cmp.Or(err, failed, json.NewEncoder(out).Encode(o))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err != nil {
		return err
	}
	return report(tried, known)
}

// ---- the binary ----

// edit is text to insert.
type edit struct {
	at   int
	text string
	size int // of what the edit wraps: the larger one begins first and ends last
	ends bool
}

// source is one file to change.
type source struct {
	path, name string
	text       []byte
	fset       *token.FileSet
	pkg        *types.Package
	info       *types.Info
	imports    map[string]bool // by path
	edits      []edit
	mutants    *[]mutant
	function   string
}

func (s *source) offset(p token.Pos) int { return s.fset.Position(p).Offset }

func (s *source) raw(n ast.Node) string { return string(s.text[s.offset(n.Pos()):s.offset(n.End())]) }

// change makes a mutant of n, with text before and behind it; %d is its number.
func (s *source) change(n ast.Node, how, before, behind string) {
	id := len(*s.mutants) + 1
	short := strings.Join(strings.Fields(s.raw(n)), " ")
	if len(short) > 80 {
		short = short[:80] + "…"
	}
	key := fmt.Sprintf("%s %s: %s | %s", s.name, s.function, short, how)
	for same := 2; slices.ContainsFunc(*s.mutants, func(m mutant) bool { return m.Key == key }); same++ {
		key = fmt.Sprintf("%s %s: %s | %s, number %d", s.name, s.function, short, how, same)
	}
	*s.mutants = append(*s.mutants, mutant{id, key, s.fset.Position(n.Pos()).Line})
	size := int(n.End() - n.Pos())
	number := strconv.Itoa(id)
	s.edits = append(s.edits,
		edit{s.offset(n.Pos()), strings.ReplaceAll(before, "%d", number), size, false},
		edit{s.offset(n.End()), strings.ReplaceAll(behind, "%d", number), size, true})
}

// condition changes what decides.
func (s *source) condition(e ast.Expr, chained token.Token) {
	switch e := e.(type) {
	case *ast.ParenExpr:
		s.condition(e.X, chained)
		return
	case *ast.BinaryExpr:
		if e.Op == token.LAND || e.Op == token.LOR {
			s.condition(e.X, e.Op)
			s.condition(e.Y, e.Op)
			return
		}
		equal := s.raw(e.X) + " == " + s.raw(e.Y)
		switch e.Op {
		case token.LSS, token.GTR:
			s.change(e, "or equal", "(", " || mutated(%d) && "+equal+")")
		case token.LEQ, token.GEQ:
			s.change(e, "not equal", "(", " && !(mutated(%d) && "+equal+"))")
		}
	}
	switch chained {
	case token.LAND:
		s.change(e, "true", "(mutated(%d) || ", ")")
	case token.LOR:
		s.change(e, "false", "(!mutated(%d) && ", ")")
	}
	s.change(e, "negated", "(mutated(%d) != (", "))")
}

// typeName is how a file can call t, "" if it can't.
func (s *source) typeName(t types.Type, at token.Pos) string {
	ok := true
	name := types.TypeString(t, func(p *types.Package) string {
		if p.Name() == "main" {
			return ""
		}
		ok = ok && s.imports[p.Path()]
		return p.Name()
	})
	if b, basic := t.(*types.Basic); basic && b.Info()&types.IsUntyped != 0 || !ok {
		return ""
	}
	if named, ok := t.(*types.Named); ok && named.Obj().Pkg() == s.pkg {
		if _, found := s.pkg.Scope().Innermost(at).LookupParent(name, at); found != named.Obj() {
			return "" // a variable is called as it is
		}
	}
	return name
}

// value changes a number.
func (s *source) value(e ast.Expr) {
	tv := s.info.Types[e]
	b, basic := tv.Type.Underlying().(*types.Basic)
	name := s.typeName(tv.Type, e.Pos())
	if !basic || b.Info()&types.IsNumeric == 0 || name == "" {
		return
	}
	if tv.Value != nil {
		s.change(e, "and one", "either["+name+"](%d, ", ", "+s.raw(e)+"+1)")
		return
	}
	if op, ok := e.(*ast.BinaryExpr); ok {
		other := map[token.Token]string{token.ADD: "-", token.SUB: "+", token.MUL: "+", token.QUO: "*", token.AND: "|", token.OR: "&",
			token.SHL: ">>", token.SHR: "<<", token.XOR: "|", token.REM: "+"}[op.Op]
		if other != "" && s.pure(op) {
			s.change(e, "with "+other, "either["+name+"](%d, ", ", "+s.raw(op.X)+other+s.raw(op.Y)+")")
		}
	}
}

// pure reports whether e can be computed twice. What is called may do something.
func (s *source) pure(e ast.Expr) bool {
	pure := true
	ast.Inspect(e, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok && !s.info.Types[call.Fun].IsType() && !s.info.Types[call.Fun].IsBuiltin() {
			pure = false
		}
		return pure
	})
	return pure
}

// walk looks for what can be changed below n.
func (s *source) walk(n ast.Node) {
	ast.Inspect(n, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GenDecl:
			if n.Tok == token.CONST || n.Tok == token.TYPE {
				return false
			}
		case *ast.ArrayType: // its length is a constant
			return false
		case *ast.IfStmt:
			s.condition(n.Cond, 0)
		case *ast.ForStmt:
			if n.Cond != nil {
				s.condition(n.Cond, 0)
			}
		case *ast.ReturnStmt:
			for _, r := range n.Results {
				s.truth(r)
			}
		case *ast.AssignStmt:
			for _, r := range n.Rhs {
				s.truth(r)
			}
		case *ast.SwitchStmt:
			if n.Tag == nil {
				for _, c := range n.Body.List {
					for _, e := range c.(*ast.CaseClause).List {
						s.condition(e, 0)
					}
				}
			}
		case *ast.BlockStmt:
			s.statements(n.List)
		case *ast.CaseClause:
			s.statements(n.Body)
		case *ast.CommClause:
			s.statements(n.Body)
		case ast.Expr:
			if tv, ok := s.info.Types[n]; ok && tv.IsValue() {
				s.value(n)
				return tv.Value == nil // a constant is changed as a whole
			}
		}
		return true
	})
}

// truth changes a value that is true or false.
func (s *source) truth(e ast.Expr) {
	t := s.info.TypeOf(e)
	if b, ok := t.(*types.Basic); ok && b.Info()&types.IsBoolean != 0 {
		s.condition(e, 0)
	}
}

// statements leaves statements out.
func (s *source) statements(list []ast.Stmt) {
	for _, n := range list {
		switch n := n.(type) {
		case *ast.AssignStmt:
			if n.Tok == token.DEFINE {
				continue
			}
		case *ast.ExprStmt:
			if strings.HasPrefix(s.raw(n), "panic(") {
				continue
			}
		case *ast.BranchStmt:
			if n.Tok == token.FALLTHROUGH || n.Tok == token.GOTO {
				continue
			}
		case *ast.IncDecStmt, *ast.DeferStmt, *ast.GoStmt, *ast.SendStmt:
		default:
			continue
		}
		s.change(n, "left out", "if !mutated(%d) { ", " }")
	}
}

// switches is what the changed files call.
const switches = `package main

import (
	"os"
	"strconv"
	"strings"
	"sync/atomic"
)

var mutantSwitch, mutantLog = func() (int, *os.File) {
	self, _ := os.Executable()
	text, _ := os.ReadFile(self + ".on")
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err == nil {
		return n, nil
	}
	f, _ := os.OpenFile(self+".reached", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	return 0, f
}()

var mutantReached [1 << 13]atomic.Bool

func mutated(id int) bool {
	if mutantLog != nil && !mutantReached[id].Load() && !mutantReached[id].Swap(true) {
		mutantLog.WriteString(strconv.Itoa(id) + "\n")
	}
	return id == mutantSwitch
}

func either[T any](id int, usual, other T) T {
	if mutated(id) {
		return other
	}
	return usual
}
`

func binary() string { return filepath.Join(*work, "relay.test") }

// compile builds the binary.
func compile() ([]mutant, error) {
	dir, err := filepath.Abs(*root)
	if err != nil {
		return nil, err
	}
	fset := token.NewFileSet()
	pkg, err := build.ImportDir(dir, 0)
	if err != nil {
		return nil, err
	}
	var parsed []*ast.File
	for _, name := range pkg.GoFiles {
		f, err := parser.ParseFile(fset, filepath.Join(dir, name), nil, parser.ParseComments)
		if err != nil {
			return nil, err
		}
		parsed = append(parsed, f)
	}
	imp, err := exports(fset, dir)
	if err != nil {
		return nil, err
	}
	info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}, Uses: map[*ast.Ident]types.Object{}, Defs: map[*ast.Ident]types.Object{}}
	checked, err := (&types.Config{Importer: imp}).Check("main", fset, parsed, info)
	if err != nil {
		return nil, err
	}
	var mutants []mutant
	overlay := map[string]string{}
	put := func(path, text string) error {
		copy := filepath.Join(*work, filepath.Base(path))
		overlay[path] = copy
		return os.WriteFile(copy, []byte(text), 0o644)
	}
	wanted := strings.Split(*files, ",")
	for i, f := range parsed {
		if !slices.Contains(wanted, pkg.GoFiles[i]) {
			continue
		}
		s := &source{path: filepath.Join(dir, pkg.GoFiles[i]), name: pkg.GoFiles[i], fset: fset, pkg: checked, info: info,
			mutants: &mutants, imports: map[string]bool{}}
		if s.text, err = os.ReadFile(s.path); err != nil {
			return nil, err
		}
		for _, d := range f.Imports {
			path, _ := strconv.Unquote(d.Path.Value)
			s.imports[path] = true
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
				s.function = fn.Name.Name
				s.walk(fn.Body)
			}
		}
		if err := put(s.path, s.apply()); err != nil {
			return nil, err
		}
	}
	if err := put(filepath.Join(dir, "mutants_switch.go"), switches); err != nil {
		return nil, err
	}
	// What hangs is to fail soon, and a test may wait for the write timeout (10 s) on a fake clock.
	helpers := filepath.Join(dir, "helpers_test.go")
	text, err := os.ReadFile(helpers)
	if err != nil {
		return nil, err
	}
	const patience = "const patience = time.Minute"
	if !strings.Contains(string(text), patience) {
		return nil, errors.New("helpers_test.go has no " + patience)
	}
	if err := put(helpers, strings.Replace(string(text), patience, "const patience = 12 * time.Second", 1)); err != nil {
		return nil, err
	}
	spec, _ := json.Marshal(map[string]any{"Replace": overlay})
	overlayFile := filepath.Join(*work, "overlay.json")
	if err := os.WriteFile(overlayFile, spec, 0o644); err != nil {
		return nil, err
	}
	cmd := exec.Command("go", "test", "-c", "-vet=off", "-overlay", overlayFile, "-o", binary(), ".")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building: %w\n%s", err, out)
	}
	return mutants, nil
}

// apply is the file with its edits.
func (s *source) apply() string {
	slices.SortStableFunc(s.edits, func(a, b edit) int {
		switch {
		case a.at != b.at:
			return a.at - b.at
		case a.ends != b.ends && a.ends:
			return -1
		case a.ends != b.ends:
			return 1
		case a.ends:
			return a.size - b.size
		}
		return b.size - a.size
	})
	// Two that wrap the same text begin in the order in which they are found, and so
	// have to end in the other.
	for i := 0; i < len(s.edits); {
		j := i
		for j < len(s.edits) && s.edits[j].at == s.edits[i].at && s.edits[j].ends == s.edits[i].ends && s.edits[j].size == s.edits[i].size {
			j++
		}
		if s.edits[i].ends {
			slices.Reverse(s.edits[i:j])
		}
		i = j
	}
	var b strings.Builder
	at := 0
	for _, e := range s.edits {
		b.Write(s.text[at:e.at])
		b.WriteString(e.text)
		at = e.at
	}
	b.Write(s.text[at:])
	return b.String()
}

// exports imports what the relay does, as the go command has compiled it.
func exports(fset *token.FileSet, dir string) (types.Importer, error) {
	cmd := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}", ".")
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	at := map[string]string{}
	for line := range strings.Lines(string(out)) {
		path, file, _ := strings.Cut(strings.TrimSpace(line), " ")
		at[path] = file
	}
	return importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(at[path]) }), nil
}

// ---- the tests ----

// test is one that reaches mutants.
type test struct {
	Name    string
	Took    time.Duration
	Reaches []int
}

// reached runs each test by itself to see what it reaches, once.
func reached(ctx context.Context) ([]test, error) {
	sum, err := exec.Command("sha256sum", binary()).Output()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(*work, "reach")
	var cache struct {
		Binary string
		Tests  []test
	}
	if b, err := os.ReadFile(file); err == nil && json.Unmarshal(b, &cache) == nil && cache.Binary != string(sum) {
		cache.Tests = nil
	}
	cache.Binary = string(sum)
	os.Remove(binary() + ".on")
	list, err := exec.Command(binary(), "-test.list", *tests).Output()
	if err != nil {
		return nil, err
	}
	without := regexp.MustCompile(*skip)
	for _, name := range strings.Fields(string(list)) {
		if without.MatchString(name) || slices.ContainsFunc(cache.Tests, func(t test) bool { return t.Name == name }) {
			continue
		}
		os.Remove(binary() + ".reached")
		began := time.Now()
		if failed, out := runTests(ctx, binary(), []string{name}, 2*time.Minute); failed != "" {
			if ctx.Err() != nil {
				return nil, errors.New("time is up while looking for what tests reach; the next run continues")
			}
			log.Printf("%s fails with nothing changed, and is left out:\n%s", name, out)
			cache.Tests = append(cache.Tests, test{Name: name})
			continue
		}
		t := test{Name: name, Took: time.Since(began)}
		b, _ := os.ReadFile(binary() + ".reached")
		for _, id := range strings.Fields(string(b)) {
			n, err := strconv.Atoi(id)
			if err == nil && !slices.Contains(t.Reaches, n) {
				t.Reaches = append(t.Reaches, n)
			}
		}
		cache.Tests = append(cache.Tests, t)
		b, _ = json.Marshal(cache)
		if err := os.WriteFile(file, b, 0o644); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(cache.Tests, func(a, b test) int { return cmp.Compare(a.Took, b.Took) })
	early := regexp.MustCompile(*first)
	slices.SortStableFunc(cache.Tests, func(a, b test) int {
		return strings.Compare(fmt.Sprint(!early.MatchString(a.Name)), fmt.Sprint(!early.MatchString(b.Name)))
	})
	return cache.Tests, nil
}

var failedLine = regexp.MustCompile(`^\s*--- FAIL: (\S+)|^panic: `)

// runTests runs tests in one process until one fails, and returns that.
func runTests(ctx context.Context, binary string, names []string, limit time.Duration) (failed, output string) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	temp := binary + ".tmp"
	defer os.RemoveAll(temp)
	if err := os.MkdirAll(temp, 0o755); err != nil {
		return err.Error(), ""
	}
	cmd := exec.CommandContext(ctx, binary, "-test.v", "-test.failfast", "-test.parallel", "8",
		"-test.run", "^("+strings.Join(names, "|")+")$")
	cmd.Dir = *root
	cmd.Env = append(os.Environ(), "TMPDIR="+temp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		return err.Error(), ""
	}
	var ended error
	go func() {
		ended = cmd.Wait()
		w.Close()
	}()
	var all strings.Builder
	for lines := bufio.NewReader(r); ; {
		line, err := lines.ReadString('\n')
		all.WriteString(line)
		if m := failedLine.FindStringSubmatch(line); m != nil && failed == "" {
			failed = cmp.Or(m[1], strings.TrimSpace(line))
			cancel()
		}
		if err != nil {
			break
		}
	}
	if failed == "" && ended != nil {
		failed = names[0] + ", or another that ran with it: " + ended.Error()
	}
	return failed, all.String()
}

// try turns a mutant on and runs what reaches it, the quickest tests first.
func try(ctx context.Context, binary string, m mutant, tests []test) (outcome, error) {
	o := outcome{Key: m.Key}
	if err := os.WriteFile(binary+".on", []byte(strconv.Itoa(m.ID)), 0o644); err != nil {
		return o, err
	}
	defer os.Remove(binary + ".on")
	early := regexp.MustCompile(*first)
	var batch []string
	var takes time.Duration
	budget := 500 * time.Millisecond
	flush := func() {
		if len(batch) > 0 && o.Caught == "" && ctx.Err() == nil {
			o.Caught = caught(ctx, binary, batch, 3*takes+*slack)
		}
		batch, takes, budget = nil, 0, budget*6
	}
	for _, t := range tests {
		if slices.Contains(t.Reaches, m.ID) {
			o.Tests++
			batch = append(batch, t.Name)
			if takes += t.Took; takes > budget || early.MatchString(t.Name) {
				flush()
			}
		}
	}
	flush()
	return o, nil
}

// caught returns which test fails twice: a busy machine alone makes one fail, too.
func caught(ctx context.Context, binary string, names []string, limit time.Duration) string {
	first, _ := runTests(ctx, binary, names, limit)
	if first == "" {
		return ""
	}
	if name, _, _ := strings.Cut(first, "/"); slices.Contains(names, name) {
		if again, _ := runTests(ctx, binary, []string{name}, limit); again != "" {
			return again
		}
	}
	again, _ := runTests(ctx, binary, names, limit)
	return again
}

// ---- what is known ----

func readOutcomes() (map[string]outcome, error) {
	known := map[string]outcome{}
	b, err := os.ReadFile(filepath.Join(*work, "outcomes"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		var o outcome
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			return nil, err
		}
		known[o.Key] = o
	}
	return known, nil
}

// report prints what no test notices, and counts. equivalent.txt explains what none can.
func report(tried []mutant, known map[string]outcome) error {
	f, err := os.Open("equivalent.txt")
	if err != nil {
		return err
	}
	defer f.Close()
	why := map[string]string{}
	reason := ""
	for lines := bufio.NewScanner(f); lines.Scan(); {
		switch line := lines.Text(); {
		case strings.HasPrefix(line, "#"):
			reason = strings.TrimSpace(line[1:])
		case line != "":
			why[line] = reason
		}
	}
	type count struct{ tried, caught, explained, survived int }
	counts := map[string]*count{}
	for _, m := range tried {
		o, done := known[m.Key]
		if !done {
			continue
		}
		file, _, _ := strings.Cut(m.Key, " ")
		c := counts[file]
		if c == nil {
			c = new(count)
			counts[file] = c
		}
		c.tried++
		switch {
		case o.Caught != "" && why[m.Key] != "":
			fmt.Printf("%s:%d: caught by %s, but explained: %s\n", file, m.Line, o.Caught, m.Key)
			c.caught++
		case o.Caught != "":
			c.caught++
		case why[m.Key] != "":
			c.explained++
		default:
			c.survived++
			fmt.Printf("%s:%d: not caught, %d tests reach it: %s\n", file, m.Line, o.Tests, m.Key)
		}
	}
	fmt.Println("\n| file | changes tried | caught | equivalent | not caught |\n|---|---|---|---|---|")
	left := len(tried)
	for _, file := range strings.Split(*files, ",") {
		if c := counts[file]; c != nil {
			fmt.Printf("| `%s` | %d | %d | %d | %d |\n", file, c.tried, c.caught, c.explained, c.survived)
			left -= c.tried
		}
	}
	fmt.Printf("\n%d changes are still to be tried.\n", left)
	return nil
}
