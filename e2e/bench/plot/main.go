// Command plot reads what relaybench measured, prints the table of
// docs/performance.md and draws its plots. ../run calls it; by itself it
// redraws from the figures that are kept in docs/bench:
//
//	go run ./plot -data ../../docs/bench -images ../../docs/img
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	raw := flag.String("raw", "", "take new reports of relaybench from this directory, and keep what matters of them in -data")
	commit := flag.String("commit", "unknown", "the commit that -raw was measured at")
	data := flag.String("data", "docs/bench", "directory of the kept figures")
	images := flag.String("images", "docs/img", "directory of the plots")
	flag.Parse()
	if err := draw(*raw, *commit, *data, *images); err != nil {
		fmt.Fprintln(os.Stderr, "plot:", err)
		os.Exit(1)
	}
}

func draw(raw, commit, data, images string) error {
	if raw != "" {
		rs, err := readResults(raw)
		if err != nil {
			return err
		}
		if err := rs.keep(data, commit); err != nil {
			return fmt.Errorf("keeping the figures: %w", err)
		}
	}
	rs, err := readResults(data)
	if err != nil {
		return err
	}
	for name, svg := range map[string]string{
		"cpu-per-frame.svg": cpuPlot(rs["full"]),
		"memory.svg":        memoryPlot(rs),
	} {
		if err := os.WriteFile(filepath.Join(images, name), []byte(svg), 0o644); err != nil {
			return fmt.Errorf("drawing: %w", err)
		}
	}
	writeTable(os.Stdout, rs)
	if failed := rs.failures(); len(failed) > 0 {
		return fmt.Errorf("%d measurements failed, the first: %s", len(failed), failed[0])
	}
	return nil
}
