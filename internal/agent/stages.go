package agent

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/engine"
)

const (
	// stageDelay keeps stages that pass at once from being written.
	stageDelay = 300 * time.Millisecond
	// stagePatience bounds the writing of one: it is for watchers only.
	stagePatience = 2 * time.Second
)

// stages passes on what the engine says about how far a checkpoint is.
type stages struct {
	mu        sync.Mutex
	listeners map[string]chan engine.Stage // by sandbox
}

// report is the engine's: it is called inside the freeze window and never waits.
func (s *stages) report(sandboxID string, stage engine.Stage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case s.listeners[sandboxID] <- stage:
	default: // nobody listens, or not fast enough
	}
}

func (s *stages) listen(sandboxID string) (heard <-chan engine.Stage, stop func()) {
	listener := make(chan engine.Stage, 4)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listeners == nil {
		s.listeners = map[string]chan engine.Stage{}
	}
	s.listeners[sandboxID] = listener
	return listener, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.listeners, sandboxID)
	}
}

// stageTeller writes how far one checkpoint is into its object's condition.
type stageTeller struct {
	client client.Client
	log    *slog.Logger
	now    func() time.Time
}

// follow tells stages until the returned function is called; nothing is written
// after that has returned, so that no outcome is written over.
func (t *stageTeller) follow(ctx context.Context, s *stages, sandboxID string, object *v1alpha1.PodCheckpoint, containers []string) (end func()) {
	heard, stop := s.listen(sandboxID)
	ctx, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() {
		object, names := object.DeepCopy(), strings.Join(containers, ", ")
		for {
			var stage engine.Stage
			select {
			case <-ctx.Done():
				return
			case stage = <-heard:
			}
			for last := false; !last; { // the latest that lasts
				select {
				case <-ctx.Done():
					return
				case stage = <-heard:
				case <-time.After(stageDelay):
					last = true
				}
			}
			t.tell(ctx, object, stageMessage(stage, names))
		}
	})
	return func() { stop(); cancel(); done.Wait() }
}

func stageMessage(stage engine.Stage, containers string) string {
	switch stage.Name {
	case engine.StageFreezing:
		return "Freezing " + containers
	case engine.StageCapturing:
		return "Capturing " + containers + ", which stand still"
	}
	return "Storing " + containers + ", thawed after " + stage.Frozen.Round(time.Millisecond).String()
}

func (t *stageTeller) tell(ctx context.Context, object *v1alpha1.PodCheckpoint, message string) {
	ctx, cancel := context.WithTimeout(ctx, stagePatience)
	defer cancel()
	before := object.DeepCopy()
	setReady(&object.Status, object.Generation, metav1.NewTime(t.now()), v1alpha1.ReasonCheckpointInProgress, message)
	// The object's version makes a write fail that would come too late.
	patch := changed(before)
	if err := t.client.Status().Patch(ctx, object, patch); err != nil && ctx.Err() == nil {
		*object = *before
		t.log.Debug("a stage of a checkpoint was not told", "podcheckpoint", object.Namespace+"/"+object.Name, "error", err)
	}
}
