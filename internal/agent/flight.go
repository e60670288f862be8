package agent

import (
	"context"
	"errors"
	"sync"

	"k8s.io/apimachinery/pkg/types"
)

// errDeleted ends an operation whose object is being deleted: nobody waits for
// its outcome any more.
var errDeleted = errors.New("the PodCheckpoint is being deleted")

// flights guards Pods: one operation for each at a time, and not more than a
// number of them on the node (P10).
type flights struct {
	limit int

	mu       sync.Mutex
	taking   int // checkpoints, which the limit is for
	byObject map[types.UID]*flight
	byPod    map[types.UID]*flight
}

// flight is one operation under way.
type flight struct {
	object, pod types.UID
	imports     bool

	mu     sync.Mutex
	cancel context.CancelCauseFunc
	ended  error // why it was cancelled, possibly before it had started
}

func newFlights(limit int) *flights {
	return &flights{limit: limit, byObject: map[types.UID]*flight{}, byPod: map[types.UID]*flight{}}
}

// begin reserves the Pod for the object's operation; nil if it has to wait.
func (f *flights) begin(object, pod types.UID) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byObject[object] != nil || f.byPod[pod] != nil || f.taking >= f.limit {
		return nil
	}
	fl := &flight{object: object, pod: pod}
	f.byObject[object], f.byPod[pod] = fl, fl
	f.taking++
	return fl
}

// beginImport does so for an import, which is of no Pod here and keeps no checkpoint
// waiting.
func (f *flights) beginImport(object types.UID) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byObject[object] != nil {
		return nil
	}
	fl := &flight{object: object, imports: true}
	f.byObject[object] = fl
	return fl
}

func (f *flights) end(fl *flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.byObject, fl.object)
	if fl.imports {
		return
	}
	delete(f.byPod, fl.pod)
	f.taking--
}

func (f *flights) of(object types.UID) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.byObject[object]
}

// stop cancels the operation for a reason.
func (fl *flight) stop(why error) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.ended = why
	if fl.cancel != nil {
		fl.cancel(why)
	}
}

// context returns the context for the operation, which stop cancels.
func (fl *flight) context(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	fl.mu.Lock()
	defer fl.mu.Unlock()
	fl.cancel = cancel
	if fl.ended != nil {
		cancel(fl.ended)
	}
	return ctx, cancel
}
