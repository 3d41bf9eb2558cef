package main

import (
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
		{"nothing is known", nil, 0, ""},
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
		}, 0, ""},
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
			if n, from, ok := memoryAllowed(root); n != tt.want || from != tt.from || ok != (tt.want > 0) {
				t.Errorf("%d by %q (%v), want %d by %q", n, from, ok, tt.want, tt.from)
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
	if text, _ := memoryWarning(o, need, "file"); text != "" {
		t.Errorf("enough memory, and the warning %q", text)
	}
	text, attrs := memoryWarning(o, need-1, "file")
	if !strings.Contains(text, "-queue-total") || attrs[len(attrs)-1] != o.queueTotal-1 {
		t.Errorf("%q %v", text, attrs)
	}
	o.queueTotal = attrs[len(attrs)-1].(int64)
	if text, _ := memoryWarning(o, need-1, "file"); text != "" {
		t.Errorf("what fits does not: %q", text)
	}
	if text, attrs := memoryWarning(o, 64<<20, "file"); !strings.Contains(text, "-max-connections") || len(attrs) != 6 {
		t.Errorf("%q %v", text, attrs)
	}
}
