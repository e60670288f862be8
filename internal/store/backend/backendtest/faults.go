package backendtest

import (
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

// Kind is what goes wrong with a call.
type Kind int

const (
	// Fail does nothing and returns an error.
	Fail Kind = iota
	// Lost does what was asked, and returns an error: the answer was lost on its way.
	Lost
	// Cut breaks off in the middle: a List ends with an error after half of its objects,
	// any other call is a Fail after its Delay.
	Cut
	// Truncate is a store that lies: a Read returns the first half of its bytes and no
	// error, a Put keeps the first half of its bytes and says that all went well.
	Truncate
	// Flip is a store that rots: a Read returns its bytes with one bit turned.
	Flip
	// Hang waits until the context ends.
	Hang
	// Slow does what was asked, after its Delay.
	Slow
)

// ErrFault is what a fault returns that names no other error. It is worth another try.
var ErrFault = errors.New("a fault that a test ordered")

// Fault says which calls go wrong, and how.
type Fault struct {
	Call   string // put, read, list, delete; "" is any
	Prefix string // of the name; "" is any
	Kind   Kind
	Err    error         // ErrFault if nil
	Delay  time.Duration // before anything else
	Skip   int           // so many such calls go well first
	Times  int           // and so many go wrong then; 0 is all
	Chance float64       // of each of these to go wrong; 0 is certainty
}

// Faulty is a backend that does to its calls what it was told. Of the faults that fit a
// call the first is taken that is not used up.
type Faulty struct {
	backend.Backend

	mu     sync.Mutex
	dice   *rand.Rand
	faults []Fault
	calls  []Call
}

// Call is one that was made: what and on which name, before any fault.
type Call struct {
	Call, Name string
	Fault      bool
}

// NewFaulty wraps a backend. The seed rules what is left to chance.
func NewFaulty(b backend.Backend, seed uint64, faults ...Fault) *Faulty {
	return &Faulty{Backend: b, dice: rand.New(rand.NewPCG(seed, 1)), faults: slices.Clone(faults)}
}

// Order replaces the faults to come.
func (f *Faulty) Order(faults ...Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = slices.Clone(faults)
}

// Calls returns what was called since the last time it was asked.
func (f *Faulty) Calls() []Call {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func (f *Faulty) Put(ctx context.Context, name string, data []byte, refs []string) error {
	fault := f.next("put", name)
	if done, err := fault.before(ctx); done {
		return err
	}
	if fault.is(Truncate) {
		data = data[:len(data)/2]
	}
	return fault.after(f.Backend.Put(ctx, name, data, refs))
}

func (f *Faulty) Read(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	fault := f.next("read", name)
	if done, err := fault.before(ctx); done {
		return nil, err
	}
	data, err := f.Backend.Read(ctx, name, offset, length)
	if err := fault.after(err); err != nil {
		return nil, err
	}
	if fault.is(Truncate) {
		data = data[:len(data)/2]
	}
	if fault.is(Flip) && len(data) > 0 {
		f.mu.Lock()
		bit := f.dice.IntN(8 * len(data))
		f.mu.Unlock()
		data[bit/8] ^= 1 << (bit % 8)
	}
	return data, nil
}

func (f *Faulty) List(ctx context.Context, prefix string) iter.Seq2[backend.Object, error] {
	return func(yield func(backend.Object, error) bool) {
		fault := f.next("list", prefix)
		if !fault.is(Cut) {
			if done, err := fault.before(ctx); done {
				yield(backend.Object{}, err)
				return
			}
		}
		var all []backend.Object
		for o, err := range f.Backend.List(ctx, prefix) {
			if err != nil {
				yield(backend.Object{}, err)
				return
			}
			all = append(all, o)
		}
		if fault.is(Cut) || fault.is(Truncate) {
			all = all[:len(all)/2]
		}
		for _, o := range all {
			if !yield(o, nil) {
				return
			}
		}
		if fault.is(Cut) || fault.is(Lost) {
			yield(backend.Object{}, fault.error())
		}
	}
}

func (f *Faulty) Delete(ctx context.Context, name string) error {
	fault := f.next("delete", name)
	if done, err := fault.before(ctx); done {
		return err
	}
	return fault.after(f.Backend.Delete(ctx, name))
}

func (f *Faulty) next(call, name string) *Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.faults {
		fault := &f.faults[i]
		if fault.Call != "" && fault.Call != call || !strings.HasPrefix(name, fault.Prefix) || fault.Times < 0 {
			continue
		}
		if fault.Skip > 0 {
			fault.Skip--
			continue
		}
		if fault.Chance > 0 && f.dice.Float64() >= fault.Chance {
			continue
		}
		taken := *fault
		if fault.Times > 0 {
			if fault.Times--; fault.Times == 0 {
				fault.Times = -1 // used up
			}
		}
		f.calls = append(f.calls, Call{call, name, true})
		return &taken
	}
	f.calls = append(f.calls, Call{call, name, false})
	return nil
}

func (fault *Fault) is(kind Kind) bool { return fault != nil && fault.Kind == kind }

func (fault *Fault) error() error {
	if fault.Err != nil {
		return fault.Err
	}
	return ErrFault
}

// before says whether the call ends here.
func (fault *Fault) before(ctx context.Context) (bool, error) {
	if fault == nil {
		return false, nil
	}
	if fault.Delay > 0 {
		timer := time.NewTimer(fault.Delay)
		defer timer.Stop()
		select {
		case <-ctx.Done():
			return true, ctx.Err()
		case <-timer.C:
		}
	}
	switch fault.Kind {
	case Fail, Cut:
		return true, fault.error()
	case Hang:
		<-ctx.Done()
		return true, ctx.Err()
	}
	return false, nil
}

// after turns the outcome of the call into what its caller sees.
func (fault *Fault) after(err error) error {
	if err == nil && fault.is(Lost) {
		return fault.error()
	}
	return err
}
