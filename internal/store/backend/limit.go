package backend

import (
	"context"
	"sync"
	"time"
)

// Limited keeps what is put and read through it, together, below so many bytes a second
// in the long run. A single object goes at full speed, and the next ones wait for it:
// a Put before it begins, a Read before it returns.
func Limited(b Backend, bytesPerSecond int64) Backend {
	return &limited{Backend: b, rate: bytesPerSecond, now: time.Now, sleep: sleep}
}

type limited struct {
	Backend
	rate  int64
	now   func() time.Time
	sleep func(context.Context, time.Duration) error

	mu   sync.Mutex
	free time.Time // when all that was let through is paid for
}

func (l *limited) Put(ctx context.Context, name string, data []byte, refs []string) error {
	if err := l.pay(ctx, len(data)); err != nil {
		return err
	}
	return l.Backend.Put(ctx, name, data, refs)
}

func (l *limited) Read(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	data, err := l.Backend.Read(ctx, name, offset, length)
	if err != nil {
		return nil, err
	}
	if err := l.pay(ctx, len(data)); err != nil {
		return nil, err
	}
	return data, nil
}

// pay waits for those before, and lets those after wait for these bytes.
func (l *limited) pay(ctx context.Context, bytes int) error {
	l.mu.Lock()
	now := l.now()
	if l.free.Before(now) {
		l.free = now
	}
	wait := l.free.Sub(now)
	l.free = l.free.Add(time.Duration(float64(bytes) / float64(l.rate) * float64(time.Second)))
	l.mu.Unlock()
	if wait <= 0 {
		return ctx.Err()
	}
	return l.sleep(ctx, wait)
}
