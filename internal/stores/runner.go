package stores

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
)

const (
	// maxRuns is how many verifications and collections go on at one time.
	maxRuns = 2
	// maxRun bounds one of them.
	maxRun = 6 * time.Hour
	// keepRun is how long the outcome of one waits for whoever asked.
	keepRun = 2 * time.Minute
	// maxProblems is how many problems an answer names.
	maxProblems = 100
)

// ErrBusy says that as many verifications and collections go on as may.
var ErrBusy = fmt.Errorf("%d verifications and collections of stores go on here already", maxRuns)

// Runner verifies and collects stores for those who ask. What takes longer than they wait
// goes on, and who asks the same again waits for the same.
type Runner struct {
	Open Opener
	// Grace and Pause are those of collections.
	Grace, Pause time.Duration
	Clock        clock.PassiveClock
	Log          *slog.Logger

	mu   sync.Mutex
	runs map[string]*run
}

// run is a verification or a collection that goes on, or whose outcome nobody has seen.
type run struct {
	begun time.Time
	done  chan struct{}

	mu           sync.Mutex
	read         int64 // bytes, so far
	ended        time.Time
	verification subresources.StoreVerificationStatus
	collection   subresources.StoreCollectionStatus
	err          error
}

// Verify reads all that a store holds, or one checkpoint of it, and compares it with its
// digests. When the context ends it returns what there is.
func (r *Runner) Verify(ctx context.Context, object *checkpointv1alpha1.CheckpointStore, id *store.ID) (subresources.StoreVerificationStatus, error) {
	key := "verify " + string(object.UID)
	var ids []store.ID
	if id != nil {
		key += " " + id.String()
		ids = append(ids, *id)
	}
	n, err := r.join(ctx, key, func(ctx context.Context, n *run) error {
		s, done, err := r.Open.Open(ctx, object)
		if err != nil {
			return err
		}
		defer done()
		n.mu.Lock()
		n.verification.StoreID = s.ID()
		n.mu.Unlock()
		v, err := s.Verify(ctx, ids, func(read int64) {
			n.mu.Lock()
			n.read = read
			n.mu.Unlock()
		})
		if err != nil {
			return fmt.Errorf("CheckpointStore %q: verify: %w", object.Name, err)
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		n.verification.Checkpoints, n.verification.ProblemCount, n.read = int32(v.Checkpoints), int32(len(v.Problems)), v.Bytes
		for _, p := range v.Problems[:min(len(v.Problems), maxProblems)] {
			n.verification.Problems = append(n.verification.Problems, subresources.StoreProblem{
				CheckpointID: p.Checkpoint.String(), PodCheckpoint: ownerOf(ctx, s, p.Checkpoint), Message: p.Err.Error()})
		}
		return nil
	})
	if err != nil {
		return subresources.StoreVerificationStatus{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	status := n.verification
	status.StoreName, status.VerifiedBytes = object.Name, n.read
	status.StartTime, status.CompletionTime = n.times()
	return status, n.err
}

// ownerOf names what a checkpoint in a store was of; nothing if that cannot be read.
func ownerOf(ctx context.Context, s *store.Store, id store.ID) string {
	c, err := s.Describe(ctx, id)
	if err != nil || c.Labels[checkpointv1alpha1.StoreLabelName] == "" {
		return ""
	}
	return c.Labels[checkpointv1alpha1.StoreLabelNamespace] + "/" + c.Labels[checkpointv1alpha1.StoreLabelName]
}

// Collect removes from a store what no checkpoint uses, or only says what that is.
func (r *Runner) Collect(ctx context.Context, object *checkpointv1alpha1.CheckpointStore, dryRun bool) (subresources.StoreCollectionStatus, error) {
	n, err := r.join(ctx, fmt.Sprint("collect ", object.UID, " ", dryRun), func(ctx context.Context, n *run) error {
		s, done, err := r.Open.Open(ctx, object)
		if err != nil {
			return err
		}
		defer done()
		c, err := s.Collect(ctx, store.CollectOptions{DryRun: dryRun, Grace: r.Grace, Pause: r.Pause})
		n.mu.Lock()
		defer n.mu.Unlock()
		n.collection = subresources.StoreCollectionStatus{StoreID: s.ID(), Checkpoints: int32(c.Checkpoints), Writers: int32(c.Writers),
			Bytes: c.Bytes, UnusedBytes: c.CondemnedBytes, RemovedBytes: c.RemovedBytes}
		if err != nil {
			return fmt.Errorf("CheckpointStore %q: collect: %w", object.Name, err)
		}
		return nil
	})
	if err != nil {
		return subresources.StoreCollectionStatus{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	status := n.collection
	status.StoreName, status.DryRun = object.Name, dryRun
	status.StartTime, status.CompletionTime = n.times()
	return status, n.err
}

// times are begin and end, as answers tell them; no end while it goes on.
func (n *run) times() (start, end *metav1.Time) {
	start = &metav1.Time{Time: n.begun}
	if !n.ended.IsZero() {
		end = &metav1.Time{Time: n.ended}
	}
	return start, end
}

// join finds the run of a name, or begins it, and waits for its end or the context's.
func (r *Runner) join(ctx context.Context, key string, do func(ctx context.Context, n *run) error) (*run, error) {
	n, err := r.find(context.WithoutCancel(ctx), key, do)
	if err != nil {
		return nil, err
	}
	select {
	case <-ctx.Done():
		if !errors.Is(context.Cause(ctx), ErrWaited) {
			return nil, ctx.Err()
		}
	case <-n.done:
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.runs[key] == n {
			delete(r.runs, key) // who asks next wants another
		}
	}
	return n, nil
}

// ErrWaited is the cause of the end of a context whose time to wait is over: what there is
// by then is the answer.
var ErrWaited = errors.New("waited long enough")

func (r *Runner) find(ctx context.Context, key string, do func(ctx context.Context, n *run) error) (*run, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now, going := r.Clock.Now(), 0
	for key, n := range r.runs {
		n.mu.Lock()
		switch {
		case n.ended.IsZero():
			going++
		case now.Sub(n.ended) > keepRun:
			delete(r.runs, key)
		}
		n.mu.Unlock()
	}
	if n := r.runs[key]; n != nil {
		return n, nil
	}
	if going >= maxRuns {
		return nil, ErrBusy
	}
	n := &run{begun: now, done: make(chan struct{})}
	if r.runs == nil {
		r.runs = map[string]*run{}
	}
	r.runs[key] = n
	go func() {
		defer close(n.done)
		ctx, cancel := context.WithTimeout(ctx, maxRun)
		defer cancel()
		err := do(ctx, n)
		if err != nil {
			r.Log.WarnContext(ctx, "store not verified or collected to the end", "asked", key, "error", err)
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		n.err, n.ended = err, r.Clock.Now()
	}()
	return n, nil
}
