package stores

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/types"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
)

// gate lets nobody read a Secret until it is opened: whoever opens a store waits there.
type gate struct {
	client.Reader
	open chan struct{}
}

func (g gate) Get(ctx context.Context, key client.ObjectKey, o client.Object, options ...client.GetOption) error {
	select {
	case <-g.open:
		return g.Reader.Get(ctx, key, o, options...)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func runner(t *testing.T) (*Runner, *checkpointv1alpha1.CheckpointStore, store.Checkpoint) {
	t.Helper()
	object := inDirectory(filepath.Join(t.TempDir(), "store"), "keys")
	object.UID = "uid"
	o := opener(t, map[string]map[string][]byte{"keys": {"1": key("a")}})
	s, done, err := o.Create(t.Context(), object)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	c, err := s.Put(t.Context(), fstest.MapFS{"f": {Data: []byte("content")}}, store.PutOptions{Labels: map[string]string{"namespace": "n", "name": "c"}})
	if err != nil {
		t.Fatal(err)
	}
	r := &Runner{Open: o, Clock: clocktesting.NewFakePassiveClock(time.Now()), Log: slog.New(slog.DiscardHandler)}
	// What nobody waits for uses the store until it is done, and the store is about to be removed.
	t.Cleanup(func() {
		for _, n := range r.runs {
			<-n.done
		}
	})
	return r, object, c
}

func impatient(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Millisecond, ErrWaited)
	t.Cleanup(cancel)
	return ctx
}

func TestAVerificationGoesOnWhileNobodyWaitsAndIsFoundAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, object, _ := runner(t)
		held := gate{r.Open.Reader, make(chan struct{})}
		r.Open.Reader = held
		first, err := r.Verify(impatient(t), object, nil)
		if err != nil || first.CompletionTime != nil || first.StartTime == nil || first.StoreName != "s" {
			t.Fatalf("%+v, %v", first, err)
		}
		r.Clock.(*clocktesting.FakePassiveClock).SetTime(r.Clock.Now().Add(time.Minute))
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := r.Verify(gone, object, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("whoever is gone is answered: %v", err)
		}
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() {
				again, err := r.Verify(t.Context(), object, nil)
				if err != nil || again.CompletionTime == nil || !again.StartTime.Equal(first.StartTime) || again.Checkpoints != 1 || again.VerifiedBytes == 0 || again.StoreID == "" {
					t.Errorf("%+v, %v", again, err)
				}
			})
		}
		synctest.Wait() // all of them wait for the same
		close(held.open)
		all.Wait()
		// What was told is over.
		next, err := r.Verify(t.Context(), object, nil)
		if err != nil || next.StartTime.Equal(first.StartTime) {
			t.Errorf("an old answer: %+v, %v", next, err)
		}
	})
}

func TestAnOutcomeThatNobodyAsksForIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, object, _ := runner(t)
		held := gate{r.Open.Reader, make(chan struct{})}
		r.Open.Reader = held
		first, err := r.Collect(impatient(t), object, true)
		if err != nil || first.CompletionTime != nil || !first.DryRun {
			t.Fatalf("%+v, %v", first, err)
		}
		close(held.open)
		r.mu.Lock()
		n := r.runs["collect uid true"]
		r.mu.Unlock()
		<-n.done
		r.Clock.(*clocktesting.FakePassiveClock).SetTime(r.Clock.Now().Add(keepRun + time.Second))
		if next, err := r.Collect(t.Context(), object, true); err != nil || next.StartTime.Equal(first.StartTime) {
			t.Errorf("an old answer: %+v, %v", next, err)
		}
	})
}

func TestNoMoreGoOnThanMay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, object, _ := runner(t)
		held := gate{r.Open.Reader, make(chan struct{})}
		r.Open.Reader = held
		defer close(held.open)
		other := object.DeepCopy()
		for i := range maxRuns {
			other.UID = types.UID(strings.Repeat("x", i+1))
			if _, err := r.Verify(impatient(t), other, nil); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := r.Verify(impatient(t), object, nil); !errors.Is(err, ErrBusy) {
			t.Errorf("one more: %v", err)
		}
		if _, err := r.Verify(impatient(t), other, nil); err != nil {
			t.Errorf("one of those: %v", err)
		}
	})
}

func TestWhatIsNotAsItWasWrittenIsNamedWithWhoseItWas(t *testing.T) {
	r, object, c := runner(t)
	packs, err := filepath.Glob(filepath.Join(object.Spec.Directory.Path, "packs", "*"))
	if err != nil || len(packs) == 0 {
		t.Fatal(packs, err)
	}
	data, err := os.ReadFile(packs[0])
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(packs[0], data, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, id := range map[string]*store.ID{"all": nil, "one": &c.ID} {
		v, err := r.Verify(t.Context(), object, id)
		if err != nil || v.ProblemCount != 1 || v.Problems[0].PodCheckpoint != "n/c" || v.Problems[0].CheckpointID != c.ID.String() || !strings.Contains(v.Problems[0].Message, "packs/") {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
}

func TestACollectionSaysWhatItFoundAndADryRunChangesNothing(t *testing.T) {
	r, object, c := runner(t)
	s, done, err := r.Open.Open(t.Context(), object)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if err := s.Delete(t.Context(), c.ID); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if dry, err := r.Collect(t.Context(), object, true); err != nil || dry.UnusedBytes == 0 || dry.RemovedBytes != 0 || dry.CompletionTime == nil {
			t.Fatalf("%+v, %v", dry, err)
		}
	}
	if first, err := r.Collect(t.Context(), object, false); err != nil || first.UnusedBytes == 0 || first.RemovedBytes != 0 {
		t.Fatalf("%+v, %v", first, err)
	}
	for _, dryRun := range []bool{true, false} {
		if c, err := r.Collect(t.Context(), object, dryRun); err != nil || c.RemovedBytes == 0 || c.Bytes == 0 || c.DryRun != dryRun {
			t.Errorf("%+v, %v", c, err)
		}
	}
}
