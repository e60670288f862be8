package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/restoring"
)

// observer makes events, metrics and log lines of restores, and remembers which
// Pods have been restored.
type observer struct {
	store   *store
	metrics *Metrics
	log     *slog.Logger
	now     func() time.Time

	// giveUpAfter is how long a restore may keep failing; 0: for ever.
	giveUpAfter time.Duration

	mu       sync.Mutex
	marker   *marker              // nil until connected
	recorder events.EventRecorder // nil until connected
	hooks    *restoreHooks        // nil until connected
	copies   *copies              // nil until connected
	begun    map[string]time.Time // by sandbox
	failing  map[types.UID]failures
}

// connect gives the observer an API server to tell.
func (o *observer) connect(recorder events.EventRecorder, marker *marker, hooks *restoreHooks, copies *copies) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.recorder, o.marker, o.hooks, o.copies = recorder, marker, hooks, copies
}

// settled tells whoever keeps copies of checkpoints that a sandbox has been answered.
func (o *observer) settled(sandbox nodeapi.Sandbox) {
	o.mu.Lock()
	copies := o.copies
	o.mu.Unlock()
	if copies != nil {
		copies.settled(types.UID(sandbox.Annotations[v1alpha1.AnnotationRestoreFromUID]))
	}
}

func (o *observer) connected() (events.EventRecorder, *marker) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.recorder, o.marker
}

var _ restoring.Observer = (*observer)(nil)

// Refused implements restoring.Observer.
func (o *observer) Refused(ctx context.Context, sandbox nodeapi.Sandbox, reason *nodeapi.Error) {
	o.settled(sandbox)
	if reason.Reason == v1alpha1.EventCheckpointFetching {
		o.waits(ctx, sandbox, reason)
		return
	}
	o.metrics.restores.WithLabelValues(resultFailure).Inc()
	o.log.Warn("restore refused", append(about(sandbox), "reason", reason.Reason, "message", reason.Message)...)
	message := "Not restored from PodCheckpoint " + from(sandbox) + ": " + reason.Message
	o.event(sandbox, corev1.EventTypeWarning, reason.Reason, message)
	o.mark(ctx, sandbox, corev1.ConditionFalse, reason.Reason, message)
	if slices.Contains(lasting, reason.Reason) {
		o.failed(ctx, sandbox, message)
	}
}

// waits tells a Pod how far its checkpoint has come to this node: nothing has failed.
// The condition says it each time, events at the beginning and a few times more: one
// that is recorded again keeps its first text.
func (o *observer) waits(ctx context.Context, sandbox nodeapi.Sandbox, reason *nodeapi.Error) {
	o.log.Info("restore waits for its data", append(about(sandbox), "message", reason.Message)...)
	message := "Waits for PodCheckpoint " + from(sandbox) + ": " + reason.Message
	o.mark(ctx, sandbox, corev1.ConditionFalse, reason.Reason, message)
	_, marker := o.connected()
	if !hasPod(sandbox) || marker == nil {
		return
	}
	stage := "begun"
	if m := percent.FindStringSubmatch(reason.Message); m != nil {
		done, _ := strconv.Atoi(m[1])
		stage = strconv.Itoa(done / 10) // each tenth once
	}
	if err := marker.note(ctx, refOf(sandbox), "fetch/"+stage, reason.Reason, message); err != nil {
		o.log.Warn("an event of a Pod could not be written", append(about(sandbox), "error", err)...)
	}
}

// percent finds in a message how far something is.
var percent = regexp.MustCompile(`: (\d+) %`)

// Began implements restoring.Observer.
func (o *observer) Began(ctx context.Context, sandbox nodeapi.Sandbox) {
	o.settled(sandbox)
	o.mu.Lock()
	if o.begun == nil {
		o.begun = map[string]time.Time{}
	}
	o.begun[sandbox.ID] = o.now()
	o.mu.Unlock()
	o.log.Info("restore began", about(sandbox)...)
	message := "Restoring from PodCheckpoint " + from(sandbox)
	o.event(sandbox, corev1.EventTypeNormal, v1alpha1.EventRestoreInProgress, message)
	o.mark(ctx, sandbox, corev1.ConditionTrue, v1alpha1.EventRestoreInProgress, message)
}

// Failed implements restoring.Observer.
func (o *observer) Failed(ctx context.Context, sandbox nodeapi.Sandbox, container string, reason *nodeapi.Error) {
	o.mu.Lock()
	delete(o.begun, sandbox.ID)
	o.mu.Unlock()
	o.metrics.restores.WithLabelValues(resultFailure).Inc()
	if reason.Reason == v1alpha1.EventRestoreFailed {
		o.metrics.runtimeErrors.WithLabelValues(operationRestore).Inc()
	}
	o.log.Error("restore failed", append(about(sandbox), "container", container, "reason", reason.Reason, "message", reason.Message)...)
	what := "Container " + container + " could not be restored"
	if container == "" {
		what = "The sandbox could not be restored"
	}
	message := what + " from PodCheckpoint " + from(sandbox) + ": " + reason.Message
	o.event(sandbox, corev1.EventTypeWarning, reason.Reason, message)
	o.mark(ctx, sandbox, corev1.ConditionFalse, reason.Reason, message)
	o.containerFailed(ctx, sandbox, container, message)
}

// Remember implements restoring.Observer.
func (o *observer) Remember(sandbox nodeapi.Sandbox) error {
	if !hasPod(sandbox) {
		return nil
	}
	if err := o.store.markRestored(types.NamespacedName{Namespace: sandbox.Namespace, Name: sandbox.Name}, types.UID(sandbox.UID)); err != nil {
		return fmt.Errorf("remember that the Pod has been restored: %w", err)
	}
	return nil
}

// errUnconnected says that there is nobody to tell yet.
var errUnconnected = errors.New("the API server has not been reached since this agent started")

// Succeeded implements restoring.Observer.
func (o *observer) Succeeded(ctx context.Context, sandbox nodeapi.Sandbox, containers map[string]string) error {
	if hasPod(sandbox) {
		_, marker := o.connected()
		if marker == nil {
			return errUnconnected
		}
		if err := marker.note(ctx, refOf(sandbox), sandbox.ID, v1alpha1.EventRestoreSucceeded, "Restored from PodCheckpoint "+from(sandbox)); err != nil {
			return err
		}
		if err := marker.clear(ctx, refOf(sandbox), v1alpha1.PodConditionRestoring); err != nil {
			return fmt.Errorf("take the condition %s off the Pod: %w", v1alpha1.PodConditionRestoring, err)
		}
		o.mu.Lock()
		hooks := o.hooks
		o.mu.Unlock()
		if err := hooks.restored(sandbox, containers); err != nil {
			return err
		}
	}
	o.mu.Lock()
	begun, known := o.begun[sandbox.ID]
	delete(o.begun, sandbox.ID)
	delete(o.failing, types.UID(sandbox.UID))
	o.mu.Unlock()
	o.metrics.restores.WithLabelValues(resultSuccess).Inc()
	var took time.Duration
	if known {
		took = o.now().Sub(begun)
		o.metrics.restoreDuration.Observe(took.Seconds())
	}
	o.log.Info("restored", append(about(sandbox), "took", took)...)
	return nil
}

// mark puts the condition Restoring on the Pod of a sandbox.
func (o *observer) mark(ctx context.Context, sandbox nodeapi.Sandbox, status corev1.ConditionStatus, reason, message string) {
	if hasPod(sandbox) {
		_, marker := o.connected()
		marker.set(ctx, refOf(sandbox), v1alpha1.PodConditionRestoring, status, reason, message)
	}
}

// hasPod says whether a Pod stands behind the sandbox; none does where RestorePod
// of the CRI made it.
func hasPod(sandbox nodeapi.Sandbox) bool { return sandbox.UID != "" && from(sandbox) != "" }

func refOf(sandbox nodeapi.Sandbox) podRef {
	return podRef{sandbox.Namespace, sandbox.Name, types.UID(sandbox.UID)}
}

// event is about the Pod of a sandbox, where there is one.
func (o *observer) event(sandbox nodeapi.Sandbox, kind, reason, message string) {
	recorder, _ := o.connected()
	if recorder == nil || !hasPod(sandbox) {
		return
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: sandbox.Namespace, Name: sandbox.Name, UID: types.UID(sandbox.UID)}}
	recorder.Eventf(pod, nil, kind, reason, actionRestore, "%s", cut(message, maxEventBytes))
}

func from(sandbox nodeapi.Sandbox) string {
	return sandbox.Annotations[v1alpha1.AnnotationRestoreFrom]
}

func about(sandbox nodeapi.Sandbox) []any {
	return []any{"sandbox", sandbox.ID, "namespace", sandbox.Namespace, "pod", sandbox.Name, "podUID", sandbox.UID, "podcheckpoint", from(sandbox)}
}
