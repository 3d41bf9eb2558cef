//go:build !linux

package main

// Elsewhere these are not known without more than the standard library.

func residentMemory() (n int64, ok bool) { return 0, false }
func openFiles() (n int64, ok bool)      { return 0, false }
func fileLimit() (n uint64, ok bool)     { return 0, false }

func memoryAllowed(string) (n int64, from string, ok bool) { return 0, "", false }
