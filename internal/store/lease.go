package store

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"
)

// leaseTime is how long a writer that shows no sign of life is taken for alive. Clocks
// of nodes may differ by a quarter of it.
const leaseTime = time.Hour

// ErrLease says that a writer was taken for dead, because it stood still or could not
// reach the store for half of leaseTime. What it wrote may be collected; writing again
// finds most of it.
var ErrLease = errors.New("the store takes this writer for dead")

// lease shows that somebody writes: packs that were in use, or made, while it is there
// are not collected.
type lease struct {
	s      *Store
	name   string
	cancel context.CancelFunc
	done   chan struct{}

	mu   sync.Mutex
	last time.Time // that it was shown
}

type leaseObject struct {
	Shown time.Time `json:"shown"`
}

func (s *Store) begin(ctx context.Context) (*lease, error) {
	random := make([]byte, 16)
	rand.Read(random) // never fails
	l := &lease{s: s, name: prefixLeases + hex.EncodeToString(random), done: make(chan struct{})}
	if err := l.show(ctx); err != nil {
		return nil, fmt.Errorf("begin to write: %w", err)
	}
	ctx, l.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go l.keep(ctx)
	return l, nil
}

func (l *lease) show(ctx context.Context) error {
	now := l.s.now()
	data, err := json.Marshal(leaseObject{now})
	if err != nil {
		return err
	}
	if err := l.s.backend.Put(ctx, l.name, l.s.keys.sealObject(prefixLeases, data), nil); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = now
	return nil
}

func (l *lease) keep(ctx context.Context) {
	defer close(l.done)
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(leaseTime / 12):
			// If it fails there are others, until check finds that none came through.
			_ = l.show(ctx)
		}
	}
}

// check says whether it was shown of late.
func (l *lease) check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if age := l.s.now().Sub(l.last); age > leaseTime/2 {
		return fmt.Errorf("%w: it was last seen %v ago", ErrLease, age.Round(time.Second))
	}
	return nil
}

// end takes it back. Where that fails the collector waits for it to run out.
func (l *lease) end(ctx context.Context) {
	l.cancel()
	<-l.done
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	_ = l.s.backend.Delete(ctx, l.name)
}

// writing lists the leases of living writers, and deletes those that have run out.
func (s *Store) writing(ctx context.Context) (map[string]bool, error) {
	alive := map[string]bool{}
	for object, err := range s.backend.List(ctx, prefixLeases) {
		if err != nil {
			return nil, fmt.Errorf("list writers: %w", err)
		}
		var l leaseObject
		err := s.readJSON(ctx, prefixLeases, object.Name, &l)
		switch {
		case errors.Is(err, ErrMissing): // it has ended
		case err != nil:
			return nil, err
		case s.now().Sub(l.Shown) > leaseTime+leaseTime/4:
			if err := s.backend.Delete(ctx, object.Name); err != nil {
				return nil, fmt.Errorf("delete %s: %w", object.Name, err)
			}
		default:
			alive[object.Name] = true
		}
	}
	return alive, nil
}

// readJSON reads a small object.
func (s *Store) readJSON(ctx context.Context, prefix, name string, into any) error {
	object, err := s.backend.Read(ctx, name, 0, -1)
	if err != nil {
		return missing(name, err)
	}
	data, err := s.keys.openObject(prefix, name, object)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return corrupt(name, "%v", err)
	}
	return nil
}
