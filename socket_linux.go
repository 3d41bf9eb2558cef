//go:build !386

package main

import (
	"encoding/binary"
	"net"
	"net/netip"
	"syscall"
	"unsafe"
)

// The system calls on a session's socket. They are those of sockets (recvfrom,
// sendto, sendmsg), not those of files (readv, writev), which touch the
// socket's inode as well: with 8,000 phones, whose inodes are in no cache, a
// frame cost a fifth more. None of them blocks, so Go's scheduler is not told.

// epollAdd adds a descriptor to an epoll set.
func epollAdd(epfd, fd int, ev *syscall.EpollEvent) error {
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_EPOLL_CTL, uintptr(epfd), syscall.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(ev)), 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// epollWait takes the events that are there.
func epollWait(epfd int, events []syscall.EpollEvent) (int, error) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_EPOLL_PWAIT, uintptr(epfd), uintptr(unsafe.Pointer(unsafe.SliceData(events))), uintptr(len(events)), 0, 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}

// acceptSocket takes the next connection of a listening socket.
func acceptSocket(ln int) (fd int, from netip.AddrPort, err error) {
	var sa syscall.RawSockaddrInet6 // an IPv4 address fits
	size := uint32(unsafe.Sizeof(sa))
	n, _, errno := syscall.RawSyscall6(syscall.SYS_ACCEPT4, uintptr(ln), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)),
		syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, from, errno
	}
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&sa.Port))[:])
	if sa.Family == syscall.AF_INET {
		return int(n), netip.AddrPortFrom(netip.AddrFrom4((*syscall.RawSockaddrInet4)(unsafe.Pointer(&sa)).Addr), port), nil
	}
	return int(n), netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), port), nil
}

func closeSocket(fd int) { syscall.RawSyscall(syscall.SYS_CLOSE, uintptr(fd), 0, 0) }

// takeSocket takes a descriptor from Go, whose own poller would be woken for every
// event too as long as it has one.
func takeSocket(nc *net.TCPConn) (int, error) {
	defer nc.Close()
	raw, err := nc.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd, errno := -1, syscall.Errno(0)
	err = raw.Control(func(old uintptr) {
		var n uintptr
		n, _, errno = syscall.Syscall(syscall.SYS_FCNTL, old, syscall.F_DUPFD_CLOEXEC, 0)
		fd = int(n)
	})
	if err == nil && errno != 0 {
		err = errno
	}
	return fd, err
}

// recv reads into p.
func recv(fd int, p []byte) (int, error) {
	n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), syscall.MSG_DONTWAIT, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// send writes bufs, of which there are at most as many as a batch has views.
func send(fd int, bufs [][]byte) (int, error) {
	const flags = syscall.MSG_DONTWAIT | syscall.MSG_NOSIGNAL
	var n uintptr
	var errno syscall.Errno
	if len(bufs) == 1 {
		b := bufs[0]
		n, _, errno = syscall.RawSyscall6(syscall.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), flags, 0, 0)
	} else {
		var iov [len(writeBatch{}.views)]syscall.Iovec
		for i, b := range bufs {
			iov[i].Base = unsafe.SliceData(b)
			iov[i].SetLen(len(b))
		}
		m := syscall.Msghdr{Iov: &iov[0]}
		setCount(&m.Iovlen, len(bufs))
		n, _, errno = syscall.RawSyscall(syscall.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&m)), flags)
	}
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// setCount sets a field whose width is the architecture's.
func setCount[T uint32 | uint64](field *T, n int) { *field = T(n) }

// write is socket's. The caller holds c.mu.
func (s *epollSocket) write(bufs [][]byte) (int, error) {
	if s.fd < 0 {
		return 0, net.ErrClosed
	}
	total := 0
	for _, b := range bufs {
		total += len(b)
	}
	for {
		s.loop.relay.metrics.socketWrites.Add(1)
		n, err := send(s.fd, bufs)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN, err == nil && n < total:
			return n, errAgain
		}
		return n, err
	}
}

// unsent is socket's, as the following are.
func (s *epollSocket) unsent() bool { return false }

func (s *epollSocket) closeWrite() {
	if s.fd >= 0 {
		syscall.RawSyscall(syscall.SYS_SHUTDOWN, uintptr(s.fd), syscall.SHUT_WR, 0)
	}
}

func (s *epollSocket) abort() {
	if s.fd >= 0 {
		syscall.Shutdown(s.fd, syscall.SHUT_RDWR)
	}
}
