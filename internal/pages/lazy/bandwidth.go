package lazy

import (
	"context"
	"sync"
	"time"
)

// Bandwidth bounds how much memory is streamed, or brought for that, in a second. What
// processes wait for is not held back by it, and counts. Nil bounds nothing.
type Bandwidth struct {
	rate int64 // bytes a second; 0: unbounded

	mu   sync.Mutex
	next time.Time // when something may be streamed again
}

// NewBandwidth bounds to so many bytes a second; 0: to nothing.
func NewBandwidth(rate int64) *Bandwidth { return &Bandwidth{rate: rate} }

// Spend takes note of bytes that were given, to whoever.
func (b *Bandwidth) Spend(bytes int) {
	if b == nil || b.rate <= 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if now := time.Now(); b.next.Before(now) {
		b.next = now
	}
	b.next = b.next.Add(time.Duration(bytes) * time.Second / time.Duration(b.rate))
}

// Wait waits until something may be streamed.
func (b *Bandwidth) Wait(ctx context.Context) error {
	if b == nil || b.rate <= 0 {
		return context.Cause(ctx)
	}
	for {
		b.mu.Lock()
		left := time.Until(b.next)
		b.mu.Unlock()
		if left <= 0 {
			return context.Cause(ctx)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(left):
		}
	}
}
