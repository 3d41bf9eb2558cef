package main

import (
	"context"
	"math"
	"time"
)

// ---- coming and going ----

// enter counts an upgrade in, unless the relay is draining.
func (r *relay) enter(role role) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.draining {
		return false
	}
	r.live[role]++
	return true
}

// leave undoes gates.
func (r *relay) leave(role role) {
	r.limits.releaseConn()
	r.gone(role)
}

func (r *relay) gone(role role) {
	r.mu.Lock()
	r.live[role]--
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

func (r *relay) count(role role) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.live[role]
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
	goodbye := func(role role) {
		w := r.newBatch()
		for _, s := range r.everySession(nil) {
			if s.role == role {
				s.end(w, endShutdown)
			}
		}
		w.flush()
	}
	r.await(half, rolePhone, func() { goodbye(rolePhone) })
	r.await(ctx, roleBinary, func() { goodbye(rolePhone); goodbye(roleBinary) })
	for _, role := range [...]role{rolePhone, roleBinary} {
		r.await(context.Background(), role, func() {
			if ctx.Err() != nil { // else a phone's answer may be on its way
				r.abortAll()
			}
		})
	}
	close(r.quit)
	<-r.swept
	r.registry.expire(r.newBatch(), math.MaxInt64)
	for _, p := range r.loops {
		p.stop()
	}
	r.fallback.stop()
}

// await calls nudge, and again a few times a second for those who were between
// two rooms, until no connection of a leg is left or ctx ends.
func (r *relay) await(ctx context.Context, role role, nudge func()) {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for r.count(role) > 0 && ctx.Err() == nil {
		nudge()
		for waiting := true; waiting && r.count(role) > 0; {
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
