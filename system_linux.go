package main

import (
	"bytes"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// What only the operating system knows of this process.

// residentMemory is the size in RAM, in bytes (proc(5), statm).
func residentMemory() (n int64, ok bool) {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, false
	}
	fields := bytes.Fields(b)
	if len(fields) < 2 {
		return 0, false
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	return pages * int64(os.Getpagesize()), err == nil
}

// openFiles counts file descriptors.
func openFiles() (n int64, ok bool) {
	d, err := os.Open("/proc/self/fd")
	if err != nil {
		return 0, false
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	return int64(len(names)) - 1, err == nil // d itself is one
}

// fileLimit is how many descriptors this process may have. Go's runtime has
// raised it as far as it may by now.
func fileLimit() (n uint64, ok bool) {
	var l syscall.Rlimit
	err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l)
	return l.Cur, err == nil
}

// memoryAllowed is how much memory this process may have: the machine's, or what
// its control group or one above allows. from is the file that says so. root is
// where the file system begins.
func memoryAllowed(root string) (n int64, from string, ok bool) {
	least := func(file string, parse func(string) (int64, error)) {
		b, err := os.ReadFile(root + file)
		if err != nil {
			return
		}
		// "max", and numbers beyond int64, are no limits.
		if v, err := parse(strings.TrimSpace(string(b))); err == nil && v > 0 && (!ok || v < n) {
			n, from, ok = v, file, true
		}
	}
	least("/proc/meminfo", func(s string) (int64, error) { // proc_meminfo(5)
		kib, _, _ := strings.Cut(strings.TrimLeft(strings.TrimPrefix(s, "MemTotal:"), " "), " ")
		v, err := strconv.ParseInt(kib, 10, 64)
		return v << 10, err
	})
	groups, _ := os.ReadFile(root + "/proc/self/cgroup") // cgroups(7): number, controllers, path
	for line := range strings.Lines(string(groups)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) < 3 {
			continue
		}
		mount, file := "/sys/fs/cgroup", "memory.max"
		if f[1] != "" {
			mount, file = mount+"/memory", "memory.limit_in_bytes"
			if !slices.Contains(strings.Split(f[1], ","), "memory") {
				continue
			}
		}
		// In a container the path can be the host's, of which nothing but the
		// root is there.
		for dir := path.Clean("/" + f[2]); ; dir = path.Dir(dir) {
			least(path.Join(mount, dir, file), func(s string) (int64, error) { return strconv.ParseInt(s, 10, 64) })
			if dir == "/" {
				break
			}
		}
	}
	return n, from, ok
}
