//go:build !386

package main

import (
	"syscall"
	"testing"
)

// A full door drops who has been silent for longest, not who comes.
func TestDoorGivesWay(t *testing.T) {
	t.Parallel()
	f := &front{greeting: map[int]*greeter{}}
	if f.giveWay() {
		t.Fatal("nobody was there and somebody was dropped")
	}
	var ends []int
	for until := range int64(evictLooks) {
		var p [2]int
		if err := syscall.Pipe2(p[:], syscall.O_NONBLOCK|syscall.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		defer syscall.Close(p[0])
		ends = append(ends, p[0])
		f.greeting[p[1]] = &greeter{until: until}
	}
	for dropped := range ends {
		if !f.giveWay() || len(f.greeting) != len(ends)-dropped-1 {
			t.Fatalf("%d of %d are left after %d had to go", len(f.greeting), len(ends), dropped+1)
		}
		for i, fd := range ends {
			n, err := syscall.Read(fd, make([]byte, 1))
			if gone := n == 0 && err == nil; gone != (i <= dropped) {
				t.Fatalf("after %d had to go, number %d is gone: %v", dropped+1, i, gone)
			}
		}
	}
}
