package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/hooks"
)

// Hooks around a checkpoint (X7). What a pre-checkpoint hook made stand still, such
// as a queue or a writer, has to go on whatever comes of the checkpoint and of this
// agent. So the post-checkpoint hooks are put on record before the first pre-checkpoint
// hook is run, and the record goes when they have been.

const (
	// resumeTries is how often a post-checkpoint hook that fails is run.
	resumeTries = 3
	resumePause = time.Second
)

// quiesce runs the hooks before a checkpoint. resume runs those after it; it is to
// be called in any case.
func (o *operations) quiesce(ctx context.Context, op operation) (resume func(), err error) {
	pod := op.source.pod
	pre, err := hooks.Of(pod.Annotations, v1alpha1.AnnotationPreCheckpoint)
	if err != nil {
		return func() {}, err
	}
	post, err := hooks.Of(pod.Annotations, v1alpha1.AnnotationPostCheckpoint)
	if err != nil {
		return func() {}, err
	}
	due := &dueHooks{
		Annotation: v1alpha1.AnnotationPostCheckpoint, Of: op.object.Name, Namespace: pod.Namespace, PodName: pod.Name, PodUID: pod.UID,
		SandboxID: op.sandboxID, Containers: map[string]string{},
	}
	for i, name := range op.source.containers {
		due.Containers[name] = op.containerIDs[i]
	}
	due.Hooks = captured(post, due.Containers)
	pre = captured(pre, due.Containers)
	if len(due.Hooks) > 0 {
		if err := o.store.writeDueHooks(due); err != nil {
			return func() {}, err
		}
		resume = func() { o.resume(context.WithoutCancel(ctx), due) }
	} else {
		resume = func() {}
	}
	for _, h := range pre {
		err := o.hooks.run(ctx, due.SandboxID, due.Containers[h.Container], h)
		if cause := context.Cause(ctx); cause != nil {
			return resume, fmt.Errorf("while the pre-checkpoint hook %s was run: %w", h, cause)
		}
		if err == nil {
			continue
		}
		message := fmt.Sprintf("the pre-checkpoint hook %s failed: %v", h, err)
		if h.FailurePolicy == hooks.Fail {
			return resume, errors.New(message + "; nothing was frozen")
		}
		o.log.Warn("a pre-checkpoint hook failed and is ignored", "pod", pod.Namespace+"/"+pod.Name, "hook", h.String(), "error", err)
		o.event(pod, op.object, corev1.EventTypeWarning, v1alpha1.EventPreCheckpointHookFailed, "PodCheckpoint %s goes on, though %s", op.object.Name, message)
	}
	if len(pre) > 0 {
		o.event(pod, op.object, corev1.EventTypeNormal, v1alpha1.EventPreCheckpointHookSucceeded, "Ran %d pre-checkpoint hooks for PodCheckpoint %s", len(pre), op.object.Name)
	}
	return resume, nil
}

// captured are the hooks of containers that are captured: the others are let alone.
func captured(all []hooks.Hook, containers map[string]string) (theirs []hooks.Hook) {
	for _, h := range all {
		if containers[h.Container] != "" {
			theirs = append(theirs, h)
		}
	}
	return theirs
}

// resume runs the hooks after a checkpoint, all of them, and takes them off the
// record.
func (o *operations) resume(ctx context.Context, due *dueHooks) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: due.Namespace, Name: due.PodName, UID: due.PodUID}}
	failed := false
	for _, h := range due.Hooks {
		err := o.insist(ctx, due, h)
		if errors.Is(err, errNotRunning) {
			o.log.Info("a post-checkpoint hook is not run, its container has ended", "pod", due.Namespace+"/"+due.PodName, "hook", h.String())
			continue
		}
		if err != nil {
			failed = true
			o.log.Warn("a post-checkpoint hook failed", "pod", due.Namespace+"/"+due.PodName, "hook", h.String(), "error", err)
			o.event(pod, nil, corev1.EventTypeWarning, v1alpha1.EventPostCheckpointHookFailed,
				"After PodCheckpoint %s the post-checkpoint hook %s failed %d times, and the application may not have gone on: %v", due.Of, h, resumeTries, err)
		}
	}
	if len(due.Hooks) > 0 && !failed {
		o.event(pod, nil, corev1.EventTypeNormal, v1alpha1.EventPostCheckpointHookSucceeded, "Ran %d post-checkpoint hooks after PodCheckpoint %s", len(due.Hooks), due.Of)
	}
	if err := o.store.removeDueHooks(due.Annotation, due.PodUID); err != nil {
		o.log.Error("post-checkpoint hooks that were run are still on record, the agent's next start runs them again", "error", err)
	}
}

func (o *operations) insist(ctx context.Context, due *dueHooks, h hooks.Hook) (err error) {
	for range resumeTries {
		if err != nil {
			time.Sleep(resumePause)
		}
		err = o.hooks.run(ctx, due.SandboxID, due.Containers[h.Container], h)
		if err == nil || errors.Is(err, errNotRunning) {
			return err
		}
	}
	return err
}

// resumeLeft runs what an agent before this one did not come to: no operation is
// under way.
func (o *operations) resumeLeft(ctx context.Context) {
	left, err := o.store.dueHooks(v1alpha1.AnnotationPostCheckpoint)
	if err != nil {
		o.log.Error("post-checkpoint hooks on record cannot be read", "error", err)
	}
	var running sync.WaitGroup
	for _, due := range left {
		o.log.Info("running the post-checkpoint hooks that an earlier agent left", "pod", due.Namespace+"/"+due.PodName, "podcheckpoint", due.Of)
		running.Go(func() { o.resume(ctx, due) })
	}
	running.Wait()
}
