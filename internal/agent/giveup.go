package agent

import (
	"context"
	"fmt"
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/nodeapi"
)

// When a restore is given up (P23). A Pod whose checkpoint is not there yet waits
// for it, as one waits for a ConfigMap. But a restore that was tried and failed, or
// whose Pod or data are not those of the checkpoint, hardly ever gets better: one
// that has failed so for giveUpAfter and at least giveUpTimes makes its Pod Failed.
// A Job then counts it against its backoffLimit, and a bare Pod says that it is
// over. The tally is in memory: a restarted agent begins to count anew.
//
// A container that the kubelet does not start again (restartPolicy Never) gives its
// Pod up at its first failure: the others, held until all are there, would stand
// still for ever.
const (
	defaultGiveUpAfter = 10 * time.Minute
	giveUpTimes        = 5
	// forgetFailures is longer than the kubelet's longest pause between two tries.
	forgetFailures = 30 * time.Minute
)

// lasting are the reasons of refusals that are not of the kind that passes.
var lasting = []string{v1alpha1.EventPodSpecMismatch, v1alpha1.EventCheckpointDataCorrupt}

// failures is the tally of one Pod.
type failures struct {
	first, last time.Time
	times       int
}

// failed counts a failure of a Pod's restore, and gives the Pod up if that was
// enough of them.
func (o *observer) failed(ctx context.Context, sandbox nodeapi.Sandbox, message string) {
	if !hasPod(sandbox) || o.giveUpAfter <= 0 {
		return
	}
	f := o.count(types.UID(sandbox.UID))
	if f.times < giveUpTimes || f.last.Sub(f.first) < o.giveUpAfter {
		return
	}
	o.giveUp(ctx, sandbox, f.times, fmt.Sprintf("Given up after %d tries in %s; the last: %s", f.times, f.last.Sub(f.first).Round(time.Second), message))
}

// containerFailed is failed for a container that the engine could not restore.
func (o *observer) containerFailed(ctx context.Context, sandbox nodeapi.Sandbox, container, message string) {
	_, marker := o.connected()
	if hasPod(sandbox) && container != "" && !marker.startsAgain(ctx, refOf(sandbox), container) {
		o.giveUp(ctx, sandbox, 1, "Given up, as the Pod's containers are not started again (restartPolicy Never): "+message)
		return
	}
	o.failed(ctx, sandbox, message)
}

func (o *observer) giveUp(ctx context.Context, sandbox nodeapi.Sandbox, tries int, message string) {
	_, marker := o.connected()
	if err := marker.fail(ctx, refOf(sandbox), message); err != nil {
		o.log.Warn("a Pod whose restore keeps failing could not be ended, the next failure tries again", append(about(sandbox), "error", err)...)
		return
	}
	o.log.Error("restore given up", append(about(sandbox), "tries", tries)...)
	o.event(sandbox, corev1.EventTypeWarning, v1alpha1.EventRestoreGivenUp, message)
}

func (o *observer) count(pod types.UID) failures {
	now := o.now()
	o.mu.Lock()
	defer o.mu.Unlock()
	maps.DeleteFunc(o.failing, func(_ types.UID, f failures) bool { return now.Sub(f.last) > forgetFailures })
	f, known := o.failing[pod]
	if !known {
		f.first = now
	}
	f.last = now
	f.times++
	if o.failing == nil {
		o.failing = map[types.UID]failures{}
	}
	o.failing[pod] = f
	return f
}
