//go:build !linux || 386

package main

import "net"

// newPoller returns the poller for TCP connections.
func newPoller(r *relay) (poller, error) { return newGoPoller(r), nil }

// newAcceptor returns the listener for net/http.
func newAcceptor(ln net.Listener) (net.Listener, error) { return ln, nil }
