package main

import (
	"context"
	"fmt"
	"time"
)

// ---- coming and going ----

// enter counts an upgrade in, unless the relay is draining.
func (r *relay) enter(l leg) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.draining {
		return false
	}
	r.live[l]++
	return true
}

// leave undoes gates.
func (r *relay) leave(l leg) {
	r.limits.releaseConn()
	r.gone(l)
}

func (r *relay) gone(l leg) {
	r.mu.Lock()
	r.live[l]--
	wake := r.draining
	r.mu.Unlock()
	if wake {
		select {
		case r.left <- struct{}{}:
		default:
		}
	}
}

func (r *relay) isDraining() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.draining
}

func (r *relay) count(l leg) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.live[l]
}

// beginDrain refuses whatever is new from now on.
func (r *relay) beginDrain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = true
}

// drain says goodbye to every phone, then to every binary, and ends the relay.
// Whoever is not gone when ctx ends is cut off. Afterwards no goroutine of the
// relay is left. It is called once.
func (r *relay) drain(ctx context.Context) {
	r.beginDrain()
	half := ctx
	if end, ok := ctx.Deadline(); ok {
		// A phone that does not answer must not cost the binaries their word.
		var cancel context.CancelFunc
		half, cancel = context.WithTimeout(ctx, time.Until(end)/2)
		defer cancel()
	}
	goodbye := func(l leg) {
		t := r.batch()
		for _, c := range r.registry.members(l) {
			c.end(t, endShutdown)
		}
		t.flush()
	}
	r.await(half, legPhone, func() { goodbye(legPhone) })
	r.await(ctx, legBinary, func() { goodbye(legPhone); goodbye(legBinary) })
	for _, l := range [...]leg{legPhone, legBinary} {
		r.await(context.Background(), l, func() {
			if ctx.Err() == nil {
				return // still in time: a phone's answer may be on its way
			}
			r.fallback.abortAll()
			for _, p := range r.loops {
				p.abortAll()
			}
		})
	}
	r.registry.clear()
	for _, p := range r.loops {
		p.stop()
	}
	r.fallback.stop()
	r.trimmer.stop()
	r.clock.stop()
}

// await calls nudge, and again a few times a second for those who were between
// two rooms, until no connection of a leg is left or ctx ends.
func (r *relay) await(ctx context.Context, l leg, nudge func()) {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for r.count(l) > 0 && ctx.Err() == nil {
		nudge()
		for waiting := true; waiting && r.count(l) > 0; {
			select {
			case <-r.left:
			case <-again.C:
				waiting = false
			case <-ctx.Done():
				return
			}
		}
	}
}

// check recounts the relay's state and names the first invariant that does not
// hold. It is exact only while no connection comes or goes.
func (r *relay) check() error {
	if err := r.registry.check(); err != nil {
		return err
	}
	r.mu.Lock()
	live := r.live[legBinary] + r.live[legPhone]
	r.mu.Unlock()
	if live == 0 {
		if n := r.memory.budget.used(); n != 0 {
			return fmt.Errorf("no connection is left and %d bytes are queued", n)
		}
	}
	return nil
}
