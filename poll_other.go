//go:build !linux || 386

package main

// newPoller returns the poller for TCP connections.
func newPoller(r *relay) (poller, error) { return newGoPoller(r), nil }
