package kubectl

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// storePatience is how long a checkpoint may be on its way to its store, which no timeout
// of the checkpoint bounds.
const storePatience = time.Hour

// follow waits until checkpoint has ended and fills it in. failure is what it
// ended with; err is why that is not known.
func (o *checkpointOptions) follow(ctx context.Context, progress *progress, checkpoint *checkpointv1alpha1.PodCheckpoint) (failure, err error) {
	limit := o.timeout
	if limit == 0 {
		limit = checkpointv1alpha1.DefaultTimeout
	}
	if o.store != "" {
		limit += storePatience
	}
	waiting, cancel := context.WithTimeout(ctx, limit+o.grace)
	defer cancel()
	name, uid := checkpoint.Name, checkpoint.UID
	progress.step("podcheckpoint %s created for pod %s", name, o.pod)
	known := checkpoint.DeepCopy()
	err = follow(waiting, o.client, client.ObjectKeyFromObject(checkpoint), checkpoint, &checkpointv1alpha1.PodCheckpointList{},
		func(now *checkpointv1alpha1.PodCheckpoint) (bool, error) {
			if uid != "" && now.UID != uid {
				return true, fmt.Errorf("podcheckpoint %s was deleted and created anew by someone else", name)
			}
			showCheckpoint(progress, now)
			var done bool
			done, failure = ended(now)
			return done, nil
		})
	if apierrors.IsForbidden(err) && o.calls != nil {
		*checkpoint = *known
		failure, err = o.callAgain(waiting, progress, checkpoint)
	}
	return failure, waitEnded(ctx, err, fmt.Sprintf("podcheckpoint %s goes on: kubectl checkpoint describe %s -n %s", name, name, o.namespace))
}

// callAgain waits for the checkpoint by the aggregated API alone, for users who may
// ask for checkpoints and not read PodCheckpoints: posted again, the request waits
// for the PodCheckpoint that is there.
func (o *checkpointOptions) callAgain(ctx context.Context, progress *progress, checkpoint *checkpointv1alpha1.PodCheckpoint) (failure, err error) {
	for {
		showCheckpoint(progress, checkpoint)
		if done, failure := ended(checkpoint); done {
			return failure, nil
		}
		begun := o.now()
		answer, err := o.calls.checkpoint(ctx, o.namespace, o.pod, o.request(subresourcesv1alpha1.MaxWaitSeconds), false)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil && !transient(err):
			return nil, err
		case err == nil:
			again := o.fromAnswer(answer)
			if checkpoint.UID != "" && again.UID != checkpoint.UID {
				return nil, fmt.Errorf("podcheckpoint %s was deleted by someone else", checkpoint.Name)
			}
			*checkpoint = *again
		}
		// A server that answers at once, or not at all, must not make this a busy loop.
		if o.now().Sub(begun) < pollInterval {
			if err := sleep(ctx, pollInterval); err != nil {
				return nil, err
			}
		}
	}
}

// showCheckpoint turns the Ready condition into a step.
func showCheckpoint(progress *progress, checkpoint *checkpointv1alpha1.PodCheckpoint) {
	condition := readyCondition(checkpoint)
	node := or(checkpoint.Status.NodeName, checkpoint.Spec.NodeName)
	switch condition.Reason {
	case checkpointv1alpha1.ReasonPending:
		if node != "" {
			progress.step("waiting for the agent of %s", node)
		}
	case checkpointv1alpha1.ReasonCheckpointInProgress:
		progress.step("%s", inProgress(node, condition.Message))
	case checkpointv1alpha1.ReasonCheckpointCompleted:
		if frozen := checkpoint.Status.FreezeDuration; frozen != nil {
			progress.step("thawed after %s", short(frozen.Duration))
		}
		progress.step("checkpoint completed")
	default:
		progress.step("%s", condition.Reason)
	}
}

// inProgress says what the agent is at: its message, where it gives one.
func inProgress(node, message string) string {
	if message == "" {
		return "checkpoint in progress on " + node
	}
	return node + ": " + strings.TrimSuffix(message, ".")
}

// tellCheckpoint prints what a person wants to know of a ready checkpoint.
func tellCheckpoint(out io.Writer, checkpoint *checkpointv1alpha1.PodCheckpoint) {
	status := &checkpoint.Status
	fmt.Fprintf(out, "podcheckpoint/%s ready\n", checkpoint.Name)
	facts(out,
		"Pod", checkpoint.Spec.SourcePodName,
		"Containers", strings.Join(capturedContainers(checkpoint), ", "),
		"Node", status.NodeName,
		"Location", location(status.CheckpointLocation),
		"Size", sizeOf(status.Size),
		"Frozen", frozenFor(checkpoint),
		"Retried", frozenEarlier(checkpoint),
		"Phases", phases(status.Phases),
		"Engine", engineOf(status.Engine),
	)
	if len(checkpoint.Spec.Containers) == 0 {
		fmt.Fprintf(out, "Restore it with: kubectl restore %s -n %s\n", checkpoint.Name, checkpoint.Namespace)
	}
}

// capturedContainers are the names of what was captured, init containers first.
func capturedContainers(checkpoint *checkpointv1alpha1.PodCheckpoint) []string {
	var names []string
	for _, container := range slices.Concat(checkpoint.Status.CheckpointedInitContainers, checkpoint.Status.CheckpointedContainers) {
		names = append(names, container.Name)
	}
	return names
}

func sizeOf(s *checkpointv1alpha1.CheckpointSize) string {
	if s == nil {
		return ""
	}
	return fmt.Sprintf("%s (%d bytes)", size(s.LogicalBytes), s.LogicalBytes)
}

func frozenFor(checkpoint *checkpointv1alpha1.PodCheckpoint) string {
	if checkpoint.Status.FreezeDuration == nil {
		return ""
	}
	return short(checkpoint.Status.FreezeDuration.Duration)
}

// frozenEarlier says what attempts that came to nothing cost the Pod, and why the last one did.
func frozenEarlier(checkpoint *checkpointv1alpha1.PodCheckpoint) string {
	earlier := checkpoint.Status.EarlierFreezes
	if len(earlier) == 0 {
		return ""
	}
	var each []string
	for _, f := range earlier {
		each = append(each, short(f.Duration.Duration))
	}
	return fmt.Sprintf("after freezes of %s that came to nothing: %s", strings.Join(each, ", "), clean(earlier[len(earlier)-1].Reason))
}

// captureOf is how memory is captured, and why not in the way that the engine prefers.
func captureOf(c *checkpointv1alpha1.MemoryCapture) string {
	switch {
	case c == nil:
		return ""
	case c.Reason == "":
		return clean(c.Mode)
	}
	return clean(c.Mode + ": " + c.Reason)
}

func engineOf(engine *checkpointv1alpha1.EngineStatus) string {
	if engine == nil {
		return ""
	}
	return clean(engine.Name + " " + engine.Version)
}

func location(source *checkpointv1alpha1.CheckpointSource) string {
	switch {
	case source == nil:
		return ""
	case source.NodeLocal != nil:
		return string(source.Type) + " " + clean(source.NodeLocal.Path)
	}
	return string(source.Type)
}

func phases(timings []checkpointv1alpha1.PhaseTiming) string {
	parts := make([]string, 0, len(timings))
	for _, timing := range timings {
		parts = append(parts, clean(timing.Name)+" "+short(timing.Duration.Round(time.Millisecond)))
	}
	return strings.Join(parts, ", ")
}
