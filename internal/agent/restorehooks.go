package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/hooks"
	"podstasis.dev/stasis/internal/nodeapi"
)

const (
	// maxRestoreHooks is how many Pods' hooks are run at one time.
	maxRestoreHooks = 8
	// defaultGrace is how long a container that is stopped is given to end where the
	// Pod says nothing: Kubernetes' default.
	defaultGrace = 30
)

// restoreHooks runs the post-restore hooks of restored Pods (X7), once all their
// containers have been let go.
type restoreHooks struct {
	store    *store
	runner   *hookRunner
	live     client.Reader
	recorder events.EventRecorder
	log      *slog.Logger
	queue    chan *dueHooks
}

// restored is told that a Pod's restore is complete; it may be told again. What is
// to be run is on record when it returns.
func (r *restoreHooks) restored(sandbox nodeapi.Sandbox, containers map[string]string) error {
	// Those of the sandbox: what the Pod was created with.
	list, err := hooks.Of(sandbox.Annotations, v1alpha1.AnnotationPostRestore)
	if err != nil || len(list) == 0 {
		if err != nil { // the restore was not admitted with it
			r.log.Error("the post-restore hooks of a Pod cannot be read", append(about(sandbox), "error", err)...)
		}
		return nil
	}
	known, err := r.store.readDueHooks(v1alpha1.AnnotationPostRestore, types.UID(sandbox.UID))
	if err != nil || known != nil {
		return err
	}
	due := &dueHooks{
		Annotation: v1alpha1.AnnotationPostRestore, Of: from(sandbox), Namespace: sandbox.Namespace, PodName: sandbox.Name, PodUID: types.UID(sandbox.UID),
		SandboxID: sandbox.ID, Containers: containers, Hooks: list,
	}
	if err := r.store.writeDueHooks(due); err != nil {
		return err
	}
	select {
	case r.queue <- due:
	default:
		// Start finds it on record.
	}
	return nil
}

// restoreHooksInterval is how often hooks on record are looked for that nobody runs.
const restoreHooksInterval = 10 * time.Second

// Start runs hooks until ctx ends. It implements manager.Runnable. Hooks that are
// under way then are run again by the agent's next start.
func (r *restoreHooks) Start(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	room := make(chan struct{}, maxRestoreHooks)
	var mu sync.Mutex
	underWay := map[types.UID]bool{}
	begin := func(due *dueHooks) {
		mu.Lock()
		defer mu.Unlock()
		if underWay[due.PodUID] {
			return
		}
		underWay[due.PodUID] = true
		running.Go(func() {
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				delete(underWay, due.PodUID)
			}()
			select {
			case room <- struct{}{}:
				defer func() { <-room }()
			case <-ctx.Done():
				return
			}
			// It may have been run since it was read.
			if now, err := r.store.readDueHooks(due.Annotation, due.PodUID); err == nil && now != nil && !now.Done {
				r.run(ctx, now)
			}
		})
	}
	for {
		left, err := r.store.dueHooks(v1alpha1.AnnotationPostRestore)
		if err != nil {
			r.log.Error("post-restore hooks on record cannot be read", "error", err)
		}
		for _, due := range left {
			begin(due)
		}
		select {
		case <-ctx.Done():
			return nil
		case due := <-r.queue:
			begin(due)
		case <-time.After(restoreHooksInterval):
		}
	}
}

// run runs a Pod's hooks, one after the other. One that has to succeed and does not
// ends the row, and its container is stopped, as the kubelet stops one whose postStart
// hook fails: what could not take up its new identity does not go on with its old one.
func (r *restoreHooks) run(ctx context.Context, due *dueHooks) {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: due.Namespace, Name: due.PodName, UID: due.PodUID}}
	log := r.log.With("pod", due.Namespace+"/"+due.PodName, "podUID", due.PodUID, "podcheckpoint", due.Of)
	failed := false
	for _, h := range due.Hooks {
		err := r.runOne(ctx, due, h)
		if ctx.Err() != nil {
			return // and again
		}
		if err == nil {
			continue
		}
		failed = true
		log.Warn("a post-restore hook failed", "hook", h.String(), "error", err)
		message := fmt.Sprintf("The post-restore hook %s failed: %v", h, err)
		if h.FailurePolicy != hooks.Fail {
			r.event(pod, corev1.EventTypeWarning, v1alpha1.EventPostRestoreHookFailed, message)
			continue
		}
		stopErr := r.stop(ctx, due, due.Containers[h.Container])
		if ctx.Err() != nil {
			return
		}
		if stopErr != nil {
			log.Error("a container whose post-restore hook failed could not be stopped", "container", h.Container, "error", stopErr)
			message += "; its container could not be stopped: " + stopErr.Error()
		} else {
			message += "; its container was stopped"
		}
		r.event(pod, corev1.EventTypeWarning, v1alpha1.EventPostRestoreHookFailed, message)
		break
	}
	if !failed {
		log.Info("post-restore hooks were run", "hooks", len(due.Hooks))
		r.event(pod, corev1.EventTypeNormal, v1alpha1.EventPostRestoreHookSucceeded, fmt.Sprintf("Ran %d post-restore hooks", len(due.Hooks)))
	}
	due.Done = true
	if err := r.store.writeDueHooks(due); err != nil {
		log.Error("post-restore hooks that were run cannot be noted, they are run again", "error", err)
	}
}

func (r *restoreHooks) runOne(ctx context.Context, due *dueHooks, h hooks.Hook) error {
	id := due.Containers[h.Container]
	if id == "" {
		return fmt.Errorf("container %s was not restored", h.Container)
	}
	return r.runner.run(ctx, due.SandboxID, id, h)
}

func (r *restoreHooks) event(pod *corev1.Pod, kind, reason, message string) {
	r.recorder.Eventf(pod, nil, kind, reason, actionRestore, "%s", cut(message, maxEventBytes))
}

// stop ends a container within the Pod's grace period. The kubelet does with it what
// the Pod's restart policy says.
func (r *restoreHooks) stop(ctx context.Context, due *dueHooks, containerID string) error {
	grace := int64(defaultGrace)
	var pod corev1.Pod
	if err := r.live.Get(ctx, types.NamespacedName{Namespace: due.Namespace, Name: due.PodName}, &pod); err == nil && pod.Spec.TerminationGracePeriodSeconds != nil {
		grace = *pod.Spec.TerminationGracePeriodSeconds
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(grace)*time.Second+2*hookGrace)
	defer cancel()
	if containerID == "" {
		return errors.New("it is not known")
	}
	_, err := r.runner.runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: containerID, Timeout: grace})
	return err
}
