package backend_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
)

// clock stands still but for those who sleep.
type clock struct {
	now    time.Time
	sleeps []time.Duration
}

func (c *clock) policy() backend.Policy {
	return backend.Policy{First: time.Second, Most: 8 * time.Second, Total: time.Minute,
		Now: func() time.Time { return c.now },
		Sleep: func(ctx context.Context, d time.Duration) error {
			c.now = c.now.Add(d)
			c.sleeps = append(c.sleeps, d)
			return ctx.Err()
		}}
}

func TestARetryingBackendIsABackend(t *testing.T) {
	backendtest.Run(t, func(*testing.T) backend.Backend {
		faulty := backendtest.NewFaulty(backendtest.Memory(), 3,
			backendtest.Fault{Kind: backendtest.Lost, Chance: 0.2}, backendtest.Fault{Kind: backendtest.Cut, Chance: 0.2})
		policy := backend.Policy{Total: time.Hour, Sleep: func(ctx context.Context, _ time.Duration) error { return ctx.Err() }}
		return backend.Retrying(faulty, policy)
	})
}

func TestWaitsGrowAndEndWithTheTimeForTheCall(t *testing.T) {
	c := &clock{}
	faulty := backendtest.NewFaulty(backendtest.Memory(), 1, backendtest.Fault{})
	err := backend.Retrying(faulty, c.policy()).Put(t.Context(), "packs/a", []byte("x"), nil)
	if !errors.Is(err, backendtest.ErrFault) || !strings.Contains(err.Error(), fmt.Sprintf("%d times in ", len(c.sleeps)+1)) {
		t.Errorf("the error: %v, after %d waits", err, len(c.sleeps))
	}
	most := time.Second
	for i, d := range c.sleeps {
		if d < most/2 || d > most {
			t.Errorf("wait number %d is %s, want between %s and %s", i+1, d, most/2, most)
		}
		most = min(2*most, 8*time.Second)
	}
	if spent := c.now.Sub(time.Time{}); spent > time.Minute || spent < 50*time.Second {
		t.Errorf("gave up after %s", spent)
	}
}

func TestWhatStaysWrongIsNotTriedAgain(t *testing.T) {
	for _, final := range []error{backend.ErrNotFound, backend.ErrDenied, backend.ErrFull, backend.ErrNoStore, backend.ErrInvalid} {
		c := &clock{}
		faulty := backendtest.NewFaulty(backendtest.Memory(), 1, backendtest.Fault{Err: fmt.Errorf("here: %w", final)})
		b := backend.Retrying(faulty, c.policy())
		_, readErr := b.Read(t.Context(), "packs/a", 0, -1)
		var listErr error
		for _, listErr = range b.List(t.Context(), "") {
		}
		for _, err := range []error{b.Put(t.Context(), "packs/a", nil, nil), readErr, b.Delete(t.Context(), "packs/a"), listErr} {
			if !errors.Is(err, final) {
				t.Errorf("the error: %v, want %v", err, final)
			}
		}
		if calls := len(faulty.Calls()); calls != 4 || len(c.sleeps) != 0 {
			t.Errorf("%v: %d calls of 4, %d waits", final, calls, len(c.sleeps))
		}
	}
}

func TestAnAnswerThatWasLostIsAskedForAgain(t *testing.T) {
	c := &clock{}
	faulty := backendtest.NewFaulty(backendtest.Memory(), 1, backendtest.Fault{Kind: backendtest.Lost, Times: 3})
	b := backend.Retrying(faulty, c.policy())
	if err := b.Put(t.Context(), "packs/a", []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	if data, err := b.Read(t.Context(), "packs/a", 0, -1); err != nil || string(data) != "x" {
		t.Errorf("read %q, %v", data, err)
	}
	if len(c.sleeps) != 3 {
		t.Errorf("%d waits", len(c.sleeps))
	}
}

func TestAStoreThatAsksToBeLeftAloneIs(t *testing.T) {
	c := &clock{}
	faulty := backendtest.NewFaulty(backendtest.Memory(), 1, backendtest.Fault{Err: backend.After(errors.New("busy"), 20*time.Second), Times: 1})
	if err := backend.Retrying(faulty, c.policy()).Put(t.Context(), "packs/a", nil, nil); err != nil {
		t.Fatal(err)
	}
	if len(c.sleeps) != 1 || c.sleeps[0] != 20*time.Second {
		t.Errorf("waits: %v", c.sleeps)
	}
	c = &clock{}
	faulty.Order(backendtest.Fault{Err: backend.After(errors.New("busy"), time.Hour)})
	if err := backend.Retrying(faulty, c.policy()).Put(t.Context(), "packs/a", nil, nil); err == nil || len(c.sleeps) != 0 {
		t.Errorf("a store that is busy for longer than the call may take: %v, waits: %v", err, c.sleeps)
	}
}

func TestAContextEndsTheWaiting(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	policy := backend.Policy{First: time.Hour, Total: 10 * time.Hour, Waiting: func(call, name string, err error, wait time.Duration) {
		if call != "put" || name != "packs/a" || !errors.Is(err, backendtest.ErrFault) || wait < time.Minute {
			t.Errorf("told of %s %s: %v, %s", call, name, err, wait)
		}
		cancel()
	}}
	b := backend.Retrying(backendtest.NewFaulty(backendtest.Memory(), 1, backendtest.Fault{}), policy)
	if err := b.Put(ctx, "packs/a", nil, nil); !errors.Is(err, context.Canceled) || !errors.Is(err, backendtest.ErrFault) {
		t.Errorf("the error: %v, want the context's, and what went wrong", err)
	}
}

// A dial that times out says that it is context.DeadlineExceeded, of a context that is
// not the caller's.
func TestATimeoutThatIsNotTheCallersIsTriedAgain(t *testing.T) {
	c := &clock{}
	b := backend.Retrying(backendtest.NewFaulty(backendtest.Memory(), 1, backendtest.Fault{Err: context.DeadlineExceeded, Times: 2}), c.policy())
	if err := b.Put(t.Context(), "packs/a", nil, nil); err != nil || len(c.sleeps) != 2 {
		t.Errorf("%v, after %d waits", err, len(c.sleeps))
	}
}

func TestAListingThatBreaksOffSaysNothingTwice(t *testing.T) {
	c := &clock{}
	memory := backendtest.Memory()
	for i := range 100 {
		if err := memory.Put(t.Context(), fmt.Sprintf("packs/%d", i), nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	b := backend.Retrying(backendtest.NewFaulty(memory, 1, backendtest.Fault{Kind: backendtest.Cut, Times: 3}), c.policy())
	seen := map[string]int{}
	for o, err := range b.List(t.Context(), "packs/") {
		if err != nil {
			t.Fatal(err)
		}
		seen[o.Name]++
	}
	if len(seen) != 100 || len(c.sleeps) != 3 {
		t.Errorf("%d objects of 100, after %d waits", len(seen), len(c.sleeps))
	}
	for name, times := range seen {
		if times != 1 {
			t.Errorf("%s: %d times", name, times)
		}
	}
}
