package backend

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"time"
)

// Policy says how long to go on trying. A zero value stands for the default.
type Policy struct {
	First time.Duration // before the second try, doubled each time: 200 ms
	Most  time.Duration // between two tries: 15 s
	Total time.Duration // for a call with all its tries: 5 min

	// Waiting, if set, is told of each error that is not the last.
	Waiting func(call, name string, err error, wait time.Duration)

	Now   func() time.Time                                 // time.Now
	Sleep func(ctx context.Context, d time.Duration) error // ends early with the context's error
}

// Retrying tries again what may work at another time. What the store has said for good
// (this package's errors) and what the context ends is not tried again.
//
// A Put whose answer was lost is done twice, which is harmless: the same bytes replace
// the same bytes.
func Retrying(b Backend, p Policy) Backend {
	if p.First <= 0 {
		p.First = 200 * time.Millisecond
	}
	if p.Most <= 0 {
		p.Most = 15 * time.Second
	}
	if p.Total <= 0 {
		p.Total = 5 * time.Minute
	}
	if p.Now == nil {
		p.Now = time.Now
	}
	if p.Sleep == nil {
		p.Sleep = sleep
	}
	return &retrying{Backend: b, policy: p}
}

type retrying struct {
	Backend
	policy Policy
}

// Final says that an error of a Backend stays the same however often the call is
// repeated. It knows nothing of contexts.
func Final(err error) bool {
	for _, final := range []error{ErrNotFound, ErrDenied, ErrFull, ErrNoStore, ErrInvalid} {
		if errors.Is(err, final) {
			return true
		}
	}
	return false
}

// After marks an error of a store that asks to be left alone for a while.
func After(err error, wait time.Duration) error { return &busyError{err, wait} }

type busyError struct {
	error
	wait time.Duration
}

func (e *busyError) Unwrap() error { return e.error }

func (r *retrying) Put(ctx context.Context, name string, data []byte, refs []string) error {
	return r.do(ctx, "put", name, func() error { return r.Backend.Put(ctx, name, data, refs) })
}

func (r *retrying) Read(ctx context.Context, name string, offset, length int64) (data []byte, err error) {
	err = r.do(ctx, "read", name, func() error {
		data, err = r.Backend.Read(ctx, name, offset, length)
		return err
	})
	if err != nil {
		return nil, err
	}
	return data, nil
}

func (r *retrying) Delete(ctx context.Context, name string) error {
	return r.do(ctx, "delete", name, func() error { return r.Backend.Delete(ctx, name) })
}

// List begins anew after an error, and leaves out what it has said before: of each name
// it keeps a digest of 16 bytes.
func (r *retrying) List(ctx context.Context, prefix string) iter.Seq2[Object, error] {
	return func(yield func(Object, error) bool) {
		said := map[[16]byte]struct{}{}
		stopped := false
		err := r.do(ctx, "list", prefix, func() error {
			for o, err := range r.Backend.List(ctx, prefix) {
				if err != nil {
					return err
				}
				sum := sha256.Sum256([]byte(o.Name))
				key := [16]byte(sum[:16])
				if _, before := said[key]; before {
					continue
				}
				said[key] = struct{}{}
				if !yield(o, nil) {
					stopped = true
					return nil
				}
			}
			return nil
		})
		if err != nil && !stopped {
			yield(Object{}, err)
		}
	}
}

func (r *retrying) do(ctx context.Context, call, name string, once func() error) error {
	begun := r.policy.Now()
	wait := r.policy.First
	for try := 1; ; try++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		err := once()
		if err == nil || Final(err) {
			return err
		}
		// The context is asked, not the error: a connection that timed out, too, calls
		// itself context.DeadlineExceeded.
		if ended := ctx.Err(); ended != nil {
			if !errors.Is(err, ended) {
				err = fmt.Errorf("%w: %w", ended, err)
			}
			return err
		}
		// Not all at once again, where many nodes saw the store fail together.
		pause := wait/2 + rand.N(wait/2+1)
		if busy := (*busyError)(nil); errors.As(err, &busy) && busy.wait > pause {
			pause = busy.wait
		}
		if spent := r.policy.Now().Sub(begun); spent+pause > r.policy.Total {
			return fmt.Errorf("%d times in %s: %w", try, spent.Round(time.Millisecond), err)
		}
		if r.policy.Waiting != nil {
			r.policy.Waiting(call, name, err, pause)
		}
		if stopped := r.policy.Sleep(ctx, pause); stopped != nil {
			return fmt.Errorf("%w while waiting to try again after: %w", stopped, err)
		}
		wait = min(2*wait, r.policy.Most)
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
