//go:build unix && !aix && !solaris

package main

import (
	"os"
	"syscall"
)

func init() {
	lockFlags = syscall.O_NOFOLLOW | syscall.O_NONBLOCK // a pipe's open would wait for its other end
	flock = func(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) }
}
