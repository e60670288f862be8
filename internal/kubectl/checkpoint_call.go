package kubectl

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// request is what is posted to pods/checkpoint.
func (o *checkpointOptions) request(waitSeconds int32) *subresourcesv1alpha1.PodCheckpointRequest {
	r := &subresourcesv1alpha1.PodCheckpointRequest{Spec: subresourcesv1alpha1.PodCheckpointRequestSpec{
		CheckpointName: o.name, Containers: distinct(o.containers), TimeoutSeconds: o.timeoutSeconds(), Options: o.options, StoreName: o.store, WaitSeconds: &waitSeconds,
	}}
	r.SetGroupVersionKind(subresourcesv1alpha1.SchemeGroupVersion.WithKind("PodCheckpointRequest"))
	return r
}

// call asks for the checkpoint through the aggregated API, without waiting: whoever
// may watch the PodCheckpoint sees more than the call's answer tells.
func (o *checkpointOptions) call(ctx context.Context) (*checkpointv1alpha1.PodCheckpoint, error) {
	if o.calls == nil {
		return nil, errNotServed
	}
	named := o.name != ""
	if !named {
		// Chosen here, so that asking again means the same checkpoint.
		o.name = newName(o.pod)
	}
	answer, err := o.calls.checkpoint(ctx, o.namespace, o.pod, o.request(0), *o.dryRun == dryRunServer)
	if err != nil {
		return nil, err
	}
	checkpoint := o.fromAnswer(answer)
	o.preflight = answer.Status.Preflight
	// Asked for again, a name means the PodCheckpoint that is there: good for an answer
	// that was lost, but what has ended before it was asked for is not what is wanted.
	if done, _ := ended(checkpoint); done && named {
		return nil, fmt.Errorf("podcheckpoint %s of pod %s is there already: choose another --name, or remove it: kubectl checkpoint delete %s -n %s",
			o.name, o.pod, o.name, o.namespace)
	}
	return checkpoint, nil
}

// fromAnswer is the PodCheckpoint as far as the answer tells it. What is printed is
// then the same for those who may read PodCheckpoints and those who may not.
func (o *checkpointOptions) fromAnswer(answer *subresourcesv1alpha1.PodCheckpointRequest) *checkpointv1alpha1.PodCheckpoint {
	checkpoint := o.object(answer.Spec.SourcePodUID)
	status := &answer.Status
	checkpoint.Name, checkpoint.UID = or(status.CheckpointName, o.name), status.CheckpointUID
	checkpoint.Spec.NodeName, checkpoint.Status.NodeName = status.NodeName, status.NodeName
	checkpoint.Status.CheckpointLocation = status.CheckpointLocation
	checkpoint.Status.FreezeDuration = status.FreezeDuration
	checkpoint.Status.Size = status.Size
	checkpoint.Status.Store = status.Store
	checkpoint.Status.Warnings = status.Warnings
	if status.Ready != nil {
		checkpoint.Status.Conditions = []metav1.Condition{*status.Ready}
	}
	return checkpoint
}

// object is the PodCheckpoint to create.
func (o *checkpointOptions) object(pod *types.UID) *checkpointv1alpha1.PodCheckpoint {
	checkpoint := &checkpointv1alpha1.PodCheckpoint{}
	checkpoint.SetGroupVersionKind(checkpointv1alpha1.GroupVersion.WithKind("PodCheckpoint"))
	checkpoint.Namespace, checkpoint.Name = o.namespace, o.name
	checkpoint.Spec = checkpointv1alpha1.PodCheckpointSpec{
		SourcePodName: o.pod, SourcePodUID: pod, TimeoutSeconds: o.timeoutSeconds(),
		Containers: distinct(o.containers), Options: o.options, StoreName: o.store,
	}
	return checkpoint
}

// mayCreateInstead says whether a PodCheckpoint can be created directly where the
// call did not work: the cluster has no aggregated API (what it does not serve it
// forbids to most), or the user has the older right only.
func mayCreateInstead(err error) bool {
	return errors.Is(err, errNotServed) || apierrors.IsForbidden(err)
}

// create makes the PodCheckpoint without the aggregated API. called is why.
func (o *checkpointOptions) create(ctx context.Context, called error) (*checkpointv1alpha1.PodCheckpoint, error) {
	checkpoint, err := o.direct(ctx)
	if err == nil {
		err = o.client.Create(ctx, checkpoint, o.dryRun.createOptions()...)
	}
	switch {
	case apierrors.IsForbidden(err) && apierrors.IsForbidden(called):
		return nil, called // neither: the newer right is the one to ask for
	case err != nil:
		return nil, explain(err)
	}
	return checkpoint, nil
}

// direct is the PodCheckpoint to create for the Pod as it is now.
func (o *checkpointOptions) direct(ctx context.Context) (*checkpointv1alpha1.PodCheckpoint, error) {
	var pod corev1.Pod
	if err := o.client.Get(ctx, client.ObjectKey{Namespace: o.namespace, Name: o.pod}, &pod); err != nil {
		return nil, err
	}
	if known := checkpointable(&pod); len(o.containers) > 0 {
		for _, name := range o.containers {
			if !slices.Contains(known, name) {
				return nil, fmt.Errorf("pod %s has no container %q that can be checkpointed: it has %s", pod.Name, name, strings.Join(known, ", "))
			}
		}
	}
	if o.name == "" {
		o.name = newName(o.pod)
	}
	// The Pod that the user means is the one that exists now.
	uid := pod.UID
	return o.object(&uid), nil
}

// checkpointable are the containers of a Pod that can be checkpointed: sidecars and
// regular ones.
func checkpointable(pod *corev1.Pod) (names []string) {
	for _, container := range pod.Spec.InitContainers {
		if container.RestartPolicy != nil && *container.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			names = append(names, container.Name)
		}
	}
	for _, container := range pod.Spec.Containers {
		names = append(names, container.Name)
	}
	return names
}

func distinct(names []string) []string {
	var once []string
	for _, name := range names {
		if !slices.Contains(once, name) {
			once = append(once, name)
		}
	}
	return once
}
