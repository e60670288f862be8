package apiserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// objects is the part of a client that is used here. It reads past any cache.
type objects interface {
	client.Reader
	Create(ctx context.Context, obj client.Object, opts ...client.CreateOption) error
	Watch(ctx context.Context, list client.ObjectList, opts ...client.ListOption) (watch.Interface, error)
}

// locator says whether the agent of a node can be asked.
type locator interface {
	Locate(ctx context.Context, node string, needs int) (agentapi.Announcement, error)
}

// locateWithin bounds the look for an agent (A3).
const locateWithin = 4 * time.Second

// taker takes checkpoints for whoever asks (A1).
type taker struct {
	objects objects
	agents  locator
	clock   clock.Clock
}

// wanted is a checkpoint that somebody asks for.
type wanted struct {
	namespace, pod string
	user           string
	spec           subresources.PodCheckpointRequestSpec
	dryRun         bool
}

// take creates the PodCheckpoint, or finds the one that an earlier call created,
// and waits for its end. When the time is over it returns what there is.
func (t *taker) take(ctx context.Context, w wanted) (*checkpointv1alpha1.PodCheckpoint, error) {
	deadline := t.clock.Now().Add(waits(w.spec))
	c, err := t.begin(ctx, w)
	if err != nil || w.dryRun {
		return c, err
	}
	return t.await(ctx, c, deadline)
}

func waits(spec subresources.PodCheckpointRequestSpec) time.Duration {
	if spec.WaitSeconds == nil {
		return subresources.MaxWaitSeconds * time.Second
	}
	return time.Duration(*spec.WaitSeconds) * time.Second
}

func (t *taker) begin(ctx context.Context, w wanted) (*checkpointv1alpha1.PodCheckpoint, error) {
	if w.spec.CheckpointName != "" {
		if c, err := t.attach(ctx, w); c != nil || err != nil {
			return c, err
		}
	}
	if err := t.possible(ctx, w); err != nil {
		return nil, err
	}
	c := &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: w.spec.CheckpointName,
			Annotations: map[string]string{checkpointv1alpha1.AnnotationRequestedBy: clip(w.user)}},
		Spec: checkpointv1alpha1.PodCheckpointSpec{SourcePodName: w.pod, SourcePodUID: w.spec.SourcePodUID, Containers: w.spec.Containers,
			TimeoutSeconds: w.spec.TimeoutSeconds, Options: w.spec.Options, StoreName: w.spec.StoreName},
	}
	if c.Name == "" {
		c.GenerateName = w.pod + "-"
	}
	var options []client.CreateOption
	if w.dryRun {
		options = append(options, client.DryRunAll)
	}
	err := t.objects.Create(ctx, c, options...)
	if apierrors.IsAlreadyExists(err) && w.spec.CheckpointName != "" {
		// Two calls at one time.
		if c, err := t.attach(ctx, w); c != nil || err != nil {
			return c, err
		}
	}
	if err != nil {
		return nil, passed(err, "create PodCheckpoint %s/%s of Pod %q", w.namespace, c.Name, w.pod)
	}
	return c, nil
}

// attach returns the PodCheckpoint of the name that was asked for, nil if there is
// none. One that is of something else is a conflict.
func (t *taker) attach(ctx context.Context, w wanted) (*checkpointv1alpha1.PodCheckpoint, error) {
	var c checkpointv1alpha1.PodCheckpoint
	err := t.objects.Get(ctx, client.ObjectKey{Namespace: w.namespace, Name: w.spec.CheckpointName}, &c)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, passed(err, "read PodCheckpoint %s/%s", w.namespace, w.spec.CheckpointName)
	}
	if difference := differs(&c, w); difference != "" {
		return nil, apierrors.NewConflict(podCheckpoints, c.Name, fmt.Errorf("there is a PodCheckpoint of that name, and it is another one: %s; choose another checkpointName", difference))
	}
	return &c, nil
}

// differs says in what a PodCheckpoint is not the one that is wanted.
func differs(c *checkpointv1alpha1.PodCheckpoint, w wanted) string {
	seconds := func(s *int32) int32 {
		if s == nil {
			return 0
		}
		return *s
	}
	sorted := func(names []string) []string { return slices.Sorted(slices.Values(names)) }
	switch {
	case c.DeletionTimestamp != nil:
		return "it is being deleted"
	case c.Spec.SourcePodName != w.pod:
		return fmt.Sprintf("it is of Pod %q", c.Spec.SourcePodName)
	case !slices.Equal(sorted(c.Spec.Containers), sorted(w.spec.Containers)):
		return fmt.Sprintf("its containers are %q", c.Spec.Containers)
	case seconds(c.Spec.TimeoutSeconds) != seconds(w.spec.TimeoutSeconds):
		return fmt.Sprintf("its timeoutSeconds is %d", seconds(c.Spec.TimeoutSeconds))
	case !maps.Equal(c.Spec.Options, w.spec.Options):
		return "it has other options"
	case c.Spec.StoreName != w.spec.StoreName:
		return fmt.Sprintf("its storeName is %q", c.Spec.StoreName)
	case w.spec.SourcePodUID != nil && !of(c, *w.spec.SourcePodUID):
		return fmt.Sprintf("it is not of the Pod with UID %s", *w.spec.SourcePodUID)
	}
	return ""
}

func of(c *checkpointv1alpha1.PodCheckpoint, uid types.UID) bool {
	return c.Spec.SourcePodUID != nil && *c.Spec.SourcePodUID == uid || c.Status.SourcePodUID != nil && *c.Status.SourcePodUID == uid
}

// possible says why no checkpoint can be taken, where that is known at once.
func (t *taker) possible(ctx context.Context, w wanted) error {
	var pod corev1.Pod
	if err := t.objects.Get(ctx, client.ObjectKey{Namespace: w.namespace, Name: w.pod}, &pod); err != nil {
		return passed(err, "read Pod %s/%s", w.namespace, w.pod)
	}
	conflict := func(format string, args ...any) error {
		return apierrors.NewConflict(corev1.Resource("pods"), w.pod, fmt.Errorf(format, args...))
	}
	if uid := w.spec.SourcePodUID; uid != nil && *uid != pod.UID {
		return conflict("the Pod of that name has UID %s, and not %s as asked for", pod.UID, *uid)
	}
	if pod.Spec.NodeName == "" {
		return conflict("it is not scheduled to a node yet")
	}
	within, cancel := context.WithTimeout(ctx, locateWithin)
	defer cancel()
	// Any agent can take a checkpoint: only archives take one that speaks of them.
	if _, err := t.agents.Locate(within, pod.Spec.NodeName, 0); err != nil {
		return answerOf(err, podCheckpoints, w.spec.CheckpointName)
	}
	return nil
}

// pause keeps a watch that ends again and again from being a load.
const pause = 500 * time.Millisecond

// await waits until a PodCheckpoint has ended or the time is over.
func (t *taker) await(ctx context.Context, c *checkpointv1alpha1.PodCheckpoint, deadline time.Time) (*checkpointv1alpha1.PodCheckpoint, error) {
	timer := t.clock.NewTimer(deadline.Sub(t.clock.Now()))
	defer timer.Stop()
	for !c.IsTerminal() {
		changes, err := t.objects.Watch(ctx, &checkpointv1alpha1.PodCheckpointList{}, &client.ListOptions{Namespace: c.Namespace,
			Raw: &metav1.ListOptions{FieldSelector: "metadata.name=" + c.Name, ResourceVersion: c.ResourceVersion}})
		if err != nil && ctx.Err() != nil {
			return nil, ctx.Err()
		}
		over := false
		if err == nil {
			over, err = t.follow(ctx, changes, timer, c)
			changes.Stop()
		}
		if over {
			return c, nil
		}
		if errors.Is(err, errGone) || ctx.Err() != nil {
			return nil, err
		}
		// The watch ended or could not be had: look again.
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-timer.C():
			return c, nil
		case <-t.clock.After(pause):
		}
		var now checkpointv1alpha1.PodCheckpoint
		if err := t.objects.Get(ctx, client.ObjectKeyFromObject(c), &now); err != nil {
			return nil, passed(err, "read PodCheckpoint %s/%s", c.Namespace, c.Name)
		}
		if now.UID != c.UID {
			return nil, deleted(c)
		}
		*c = now
	}
	return c, nil
}

// errGone says that a PodCheckpoint was deleted while somebody waited for it.
var errGone = errors.New("deleted")

// follow reads changes into a PodCheckpoint until it has ended or the time is over.
func (t *taker) follow(ctx context.Context, changes watch.Interface, timer clock.Timer, c *checkpointv1alpha1.PodCheckpoint) (over bool, err error) {
	for {
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-timer.C():
			return true, nil
		case change, open := <-changes.ResultChan():
			if !open {
				return false, nil
			}
			now, ok := change.Object.(*checkpointv1alpha1.PodCheckpoint)
			if !ok {
				return false, nil // an error of the watch
			}
			if now.UID != c.UID || change.Type == watch.Deleted {
				return false, deleted(c)
			}
			*c = *now
			if c.IsTerminal() {
				return true, nil
			}
		}
	}
}

func deleted(c *checkpointv1alpha1.PodCheckpoint) error {
	return &goneError{StatusError: gone(fmt.Sprintf("PodCheckpoint %q was deleted before it was complete", c.Name))}
}

// goneError is errGone with an answer.
type goneError struct{ *apierrors.StatusError }

func (*goneError) Is(target error) bool { return target == errGone }

// clip keeps a user's name within reason.
func clip(s string) string {
	const most = 1 << 10
	if len(s) > most {
		return s[:most]
	}
	return s
}

// report makes the answer of a PodCheckpoint.
func report(request *subresources.PodCheckpointRequest, c *checkpointv1alpha1.PodCheckpoint) *subresources.PodCheckpointRequest {
	answer := request.DeepCopy()
	node := c.Status.NodeName
	if node == "" {
		node = c.Spec.NodeName
	}
	answer.Status = subresources.PodCheckpointRequestStatus{
		CheckpointName: c.Name, CheckpointUID: c.UID, NodeName: node,
		CheckpointLocation: c.Status.CheckpointLocation, FreezeDuration: c.Status.FreezeDuration, Size: c.Status.Size, Store: c.Status.Store, Warnings: c.Status.Warnings, Ready: c.ReadyCondition(),
	}
	return answer
}
