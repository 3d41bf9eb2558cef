package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The least of what the machine has and what a control group allows counts.
func TestMemoryAllowed(t *testing.T) {
	t.Parallel()
	const meminfo = "MemTotal:        1024 kB\nMemFree:          512 kB\n"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  int64
		from  string
	}{
		{"nothing is known", nil, math.MaxInt64, ""},
		{"the machine", map[string]string{"proc/meminfo": meminfo}, 1 << 20, "/proc/meminfo"},
		{"version 2", map[string]string{
			"proc/meminfo":                 meminfo,
			"proc/self/cgroup":             "0::/a/b\n",
			"sys/fs/cgroup/a/b/memory.max": "65536\n",
			"sys/fs/cgroup/a/memory.max":   "max\n",
		}, 65536, "/sys/fs/cgroup/a/b/memory.max"},
		{"version 2, a group above", map[string]string{
			"proc/self/cgroup":               "0::/a/b/c\n",
			"sys/fs/cgroup/a/b/c/memory.max": "max\n",
			"sys/fs/cgroup/a/memory.max":     "4096\n",
		}, 4096, "/sys/fs/cgroup/a/memory.max"},
		{"version 2, in a container", map[string]string{
			"proc/meminfo":             meminfo,
			"proc/self/cgroup":         "0::/\n",
			"sys/fs/cgroup/memory.max": "8192\n",
		}, 8192, "/sys/fs/cgroup/memory.max"},
		{"version 2, a path outside of the container", map[string]string{
			"proc/self/cgroup":         "0::/../../host/x\n",
			"sys/fs/cgroup/memory.max": "8192\n",
		}, 8192, "/sys/fs/cgroup/memory.max"},
		{"version 2, no limit", map[string]string{
			"proc/meminfo":               meminfo,
			"proc/self/cgroup":           "0::/a\n",
			"sys/fs/cgroup/a/memory.max": "max\n",
		}, 1 << 20, "/proc/meminfo"},
		{"version 1", map[string]string{
			"proc/meminfo":     meminfo,
			"proc/self/cgroup": "9:name=systemd:/\n4:hugetlb,memory:/docker/1\n1:cpu:/x\n",
			"sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": "12288\n",
		}, 12288, "/sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes"},
		{"version 1, in a container", map[string]string{
			"proc/self/cgroup":                           "4:memory:/docker/1\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "12288\n",
		}, 12288, "/sys/fs/cgroup/memory/memory.limit_in_bytes"},
		{"version 1, no limit", map[string]string{
			"proc/meminfo":     meminfo,
			"proc/self/cgroup": "4:memory:/\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
		}, 1 << 20, "/proc/meminfo"},
		{"both", map[string]string{
			"proc/self/cgroup": "4:memory:/a\n0::/b\n",
			"sys/fs/cgroup/memory/a/memory.limit_in_bytes": "16384\n",
			"sys/fs/cgroup/b/memory.max":                   "20480\n",
		}, 16384, "/sys/fs/cgroup/memory/a/memory.limit_in_bytes"},
		{"unreadable", map[string]string{
			"proc/meminfo":             "what\n",
			"proc/self/cgroup":         "0:\n\nx\n0::/\n",
			"sys/fs/cgroup/memory.max": "-1\n",
		}, math.MaxInt64, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			for name, text := range tt.files {
				file := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if n, from := memoryAllowed(root); n != tt.want || from != tt.from {
				t.Errorf("%d by %q, want %d by %q", n, from, tt.want, tt.from)
			}
		})
	}
}

// Where the options need more than the process may have, the warning says what
// would fit, and that does.
func TestMemoryWarning(t *testing.T) {
	t.Parallel()
	o := defaultOptions()
	need := memoryNeeded(o)
	for _, c := range []struct{ total, allowed, fits int64 }{
		{o.queueTotal, need, 0},
		{o.queueTotal, need - 1, o.queueTotal - 1},
		{o.queueTotal - 1, need - 1, 0}, // what fits does
		{o.queueTotal, 64 << 20, -1},
	} {
		var log logBuffer
		o.queueTotal = c.total
		warnMemory(o, c.allowed, "file", newLogger(&log, o))
		switch got := log.String(); {
		case c.fits == 0 && got == "":
		case c.fits > 0 && strings.HasSuffix(got, fmt.Sprintf("lower -queue-total\" allowed=%d by=file needed=%d queue_total=%d queue_total_that_fits=%d\n", c.allowed, need, c.total, c.fits)):
		case c.fits < 0 && strings.HasSuffix(got, fmt.Sprintf("-max-connections\" allowed=%d by=file needed=%d\n", c.allowed, need)):
		default:
			t.Errorf("%d of %d: %s", c.allowed, need, got)
		}
	}
}
