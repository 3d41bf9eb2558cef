package main

import (
	"bytes"
	"os"
	"strconv"
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
