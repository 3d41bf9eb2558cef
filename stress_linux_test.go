package main

import "syscall"

func init() {
	smallBuffers = func(_, _ string, c syscall.RawConn) (err error) {
		control := c.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUF, 64<<10)
		})
		if control != nil {
			return control
		}
		return err
	}
}
