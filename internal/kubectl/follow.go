package kubectl

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// pollInterval is how often an object is looked at in any case: what a watch
// misses, and users who may get but not watch, cost at most this delay.
const pollInterval = 500 * time.Millisecond

// follow shows visit the object named key, now and whenever it changed, until
// visit says done or fails, or ctx ends. What is not found is an error: the
// caller made the object or has seen it.
//
// list is an empty list of the object's type, to watch it with.
func follow[T client.Object](ctx context.Context, c client.WithWatch, key client.ObjectKey, object T, list client.ObjectList, visit func(T) (done bool, err error)) error {
	var events <-chan watch.Event
	mayWatch := true
	stop := func() {}
	defer func() { stop() }()
	for {
		if events == nil && mayWatch {
			w, err := c.Watch(ctx, list, client.InNamespace(key.Namespace), client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector("metadata.name", key.Name)})
			if err == nil {
				events, stop = w.ResultChan(), w.Stop
			} else {
				// Not an error of the operation: polling goes on, and says what is
				// wrong with the connection if something is.
				mayWatch = !apierrors.IsForbidden(err)
			}
		}
		if err := c.Get(ctx, key, object); err != nil {
			if ctx.Err() == nil && transient(err) {
				if err := sleep(ctx, pollInterval); err == nil {
					continue
				}
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return explain(err)
		}
		done, err := visit(object)
		if done || err != nil {
			return err
		}
		timer := time.NewTimer(pollInterval)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		case _, open := <-events:
			timer.Stop()
			if !open {
				stop()
				events, stop = nil, func() {}
				// A watch that ends at once must not make this a busy loop.
				if err := sleep(ctx, pollInterval/5); err != nil {
					return err
				}
			}
		}
	}
}

// transient says whether asking again may help: the API server or the way to it
// was away for a moment.
func transient(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return true // no answer at all
	}
	return apierrors.IsServerTimeout(err) || apierrors.IsTooManyRequests(err) || apierrors.IsServiceUnavailable(err) ||
		apierrors.IsTimeout(err) || apierrors.IsInternalError(err)
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

// waitEnded tells apart why a wait was cut short: by its own time limit, which is
// ExitInProgress, or by a signal.
func waitEnded(outer context.Context, err error, what string) error {
	if outer.Err() != nil {
		return fmt.Errorf("interrupted; %s: %w", what, context.Canceled)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return inProgressf("timed out waiting; %s", what)
	}
	return err
}
