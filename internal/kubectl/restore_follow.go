package kubectl

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/fields"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// outcome is what has come of one Pod.
type outcome struct {
	pod  *corev1.Pod
	took time.Duration
	err  error // why it is not ready
}

func failures(outcomes []outcome) []error {
	errs := make([]error, 0, len(outcomes))
	for _, o := range outcomes {
		errs = append(errs, o.err)
	}
	return errs
}

// followAll waits for each Pod until it is ready or that is given up.
func (o *restoreOptions) followAll(ctx, waiting context.Context, progress *progress, pods []*corev1.Pod) []outcome {
	outcomes := make([]outcome, len(pods))
	states := &crowd{progress: progress, state: make([]string, len(pods))}
	created := o.now()
	var all sync.WaitGroup
	for i, pod := range pods {
		all.Go(func() {
			err := o.follow(ctx, waiting, pod, func(state string) { states.set(i, state) })
			outcomes[i] = outcome{pod: pod, took: o.now().Sub(created), err: err}
			if err != nil {
				states.set(i, "failed")
			} else {
				states.set(i, "ready")
			}
		})
	}
	all.Wait()
	return outcomes
}

// crowd tells how several Pods are, in one step; one alone tells its own.
type crowd struct {
	mu       sync.Mutex
	progress *progress
	state    []string
}

func (c *crowd) set(i int, state string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state[i] = state
	if len(c.state) == 1 {
		if state != "ready" && state != "failed" {
			c.progress.step("%s", state)
		}
		return
	}
	var parts []string
	for _, state := range slices.Compact(slices.Sorted(slices.Values(c.state))) {
		n := 0
		for _, s := range c.state {
			if s == state {
				n++
			}
		}
		if state != "" {
			parts = append(parts, fmt.Sprintf("%d %s", n, state))
		}
	}
	c.progress.step("%d pods: %s", len(c.state), strings.Join(parts, ", "))
}

// refused says of the reason of an event whether by it the node says that this restore
// will not succeed unless something is changed. Reasons that pass by themselves
// are not among them.
func refused(reason string) bool {
	switch reason {
	case checkpointv1alpha1.EventCheckpointWrongNode,
		checkpointv1alpha1.EventPodSpecMismatch,
		checkpointv1alpha1.EventCheckpointDataMissing,
		checkpointv1alpha1.EventCheckpointDataCorrupt,
		checkpointv1alpha1.EventRestoreFailed:
		return true
	}
	return false
}

// follow waits until pod is ready and fills it in. The error is the refusal, the
// Pod's end, or why neither is known.
func (o *restoreOptions) follow(ctx, waiting context.Context, pod *corev1.Pod, say func(string)) error {
	uid := pod.UID
	events := &podEvents{client: o.client, seen: map[string]bool{}}
	var failure error
	err := follow(waiting, o.client, client.ObjectKeyFromObject(pod), pod, &corev1.PodList{}, func(now *corev1.Pod) (bool, error) {
		if now.UID != uid {
			return true, fmt.Errorf("pod %s was deleted and created anew by someone else", now.Name)
		}
		done, err := podEnded(now)
		if done || err != nil {
			failure = err
			return true, nil
		}
		reason, message := events.news(waiting, now, say)
		if refused(reason) {
			failure = fmt.Errorf("pod %s is not restored: %s: %s\nIt stays Pending and the node tries again; to give up: kubectl delete pod %s -n %s",
				now.Name, reason, clean(message), now.Name, now.Namespace)
			return true, nil
		}
		say(podState(now))
		return false, nil
	})
	switch {
	case failure != nil:
		return failure
	case apierrors.IsNotFound(err):
		return fmt.Errorf("pod %s was deleted before it was ready", pod.Name)
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
		events.seen = map[string]bool{}
		if _, message := events.news(ctx, pod, nil); message != "" {
			err = fmt.Errorf("%s: %w", clean(message), err)
		}
	}
	return waitEnded(ctx, err, fmt.Sprintf("pod %s is not ready yet: kubectl describe pod %s -n %s", pod.Name, pod.Name, pod.Namespace))
}

// podEnded says whether there is nothing more to wait for.
func podEnded(pod *corev1.Pod) (bool, error) {
	switch pod.Status.Phase {
	case corev1.PodSucceeded:
		return true, nil
	case corev1.PodFailed:
		return true, fmt.Errorf("pod %s has failed: %s %s", pod.Name, pod.Status.Reason, clean(pod.Status.Message))
	}
	for _, status := range pod.Status.ContainerStatuses {
		if status.RestartCount > 0 {
			return true, fmt.Errorf("pod %s did not continue from its checkpoint: container %s has been started anew %d times%s",
				pod.Name, status.Name, status.RestartCount, lastEnd(status))
		}
	}
	return podReady(pod), nil
}

func podReady(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

func lastEnd(status corev1.ContainerStatus) string {
	if end := status.LastTerminationState.Terminated; end != nil {
		return fmt.Sprintf(", last exit code %d (%s)", end.ExitCode, end.Reason)
	}
	return ""
}

// podState says how far the Pod has come.
func podState(pod *corev1.Pod) string {
	switch {
	case len(pod.Spec.SchedulingGates) > 0:
		return "held back: " + pod.Spec.SchedulingGates[0].Name
	case pod.Spec.NodeName == "":
		return "waiting for the scheduler"
	case pod.Status.Phase == corev1.PodPending:
		return "restoring on " + pod.Spec.NodeName
	}
	return "running on " + pod.Spec.NodeName + ", not ready yet"
}

// podEvents reads the events of a Pod.
type podEvents struct {
	client client.Client
	seen   map[string]bool
}

// news says the warnings that were not seen before and returns the reason and
// message of a refusal among them, else those of the last. Users who may not read
// events do without.
func (e *podEvents) news(ctx context.Context, pod *corev1.Pod, say func(string)) (reason, message string) {
	var events corev1.EventList
	err := e.client.List(ctx, &events, client.InNamespace(pod.Namespace), client.Limit(completionMost),
		client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector("involvedObject.uid", string(pod.UID))})
	if err != nil {
		return "", ""
	}
	for _, event := range events.Items {
		key := event.Reason + "\n" + event.Message
		if e.seen[key] || event.InvolvedObject.UID != pod.UID {
			continue
		}
		e.seen[key] = true
		if event.Type != corev1.EventTypeWarning {
			continue
		}
		if !refused(reason) {
			reason, message = event.Reason, event.Message
		}
		if say != nil {
			say(event.Reason + ": " + strings.TrimSpace(event.Message))
		}
	}
	return reason, message
}
