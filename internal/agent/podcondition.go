package agent

import (
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
)

// markPatience is how long the API server may take to note a condition.
const markPatience = 2 * time.Second

// podRef names one instance of a Pod.
type podRef struct {
	namespace, name string
	uid             types.UID
}

// marker puts conditions on Pods for others to see what is done to them (P15,
// P24). They are for observation and nothing waits for them, but for MemoryRestored:
// where the API server is away the work goes on. A nil marker, where there is no
// Kubernetes, does nothing.
type marker struct {
	client client.Client
	log    *slog.Logger
	now    func() time.Time
}

// set puts a condition on a Pod.
func (m *marker) set(ctx context.Context, pod podRef, kind string, status corev1.ConditionStatus, reason, message string) {
	_ = m.put(ctx, pod, kind, status, reason, message) // logged; nothing waits for it
}

// put does so too, for those who rely on it: it is on the Pod, or there is an error.
func (m *marker) put(ctx context.Context, pod podRef, kind string, status corev1.ConditionStatus, reason, message string) error {
	if m == nil {
		return nil
	}
	return m.patch(ctx, pod, map[string]any{
		"type": kind, "status": status, "reason": reason, "message": cut(message, maxEventBytes),
		"lastTransitionTime": metav1.NewTime(m.now()),
	})
}

// clear takes a condition off a Pod. An error, which is logged too, says that it
// may be on it still and that trying again can help: others are denied things as
// long as a Pod is marked.
func (m *marker) clear(ctx context.Context, pod podRef, kind string) error {
	if m == nil {
		return nil
	}
	err := m.patch(ctx, pod, map[string]any{"$patch": "delete", "type": kind})
	if apierrors.IsForbidden(err) {
		return nil // then it could not be set either
	}
	return err
}

func (m *marker) patch(ctx context.Context, pod podRef, condition map[string]any) error {
	err := m.write(ctx, pod, map[string]any{"uid": pod.uid}, map[string]any{"conditions": []any{condition}})
	if err != nil {
		m.log.Warn("a condition of a Pod could not be written", "namespace", pod.namespace, "pod", pod.name, "condition", condition["type"], "error", err)
	}
	return err
}

// fail ends a Pod that cannot be restored: its kubelet takes down what there is of
// it and starts nothing more.
func (m *marker) fail(ctx context.Context, pod podRef, message string) error {
	if m == nil {
		return nil
	}
	// The annotation goes with it because a kubelet takes the status that others
	// write for a mistake and puts its own back, unless something else of the Pod
	// has changed too: then it looks at the Pod anew and finds that it has ended.
	metadata := map[string]any{"uid": pod.uid, "annotations": map[string]string{v1alpha1.AnnotationGivenUp: m.now().UTC().Format(time.RFC3339Nano)}}
	return m.write(ctx, pod, metadata, map[string]any{
		"phase": corev1.PodFailed, "reason": v1alpha1.EventRestoreFailed, "message": cut(message, maxEventBytes),
	})
}

// startsAgain says whether the kubelet tries a container again that could not be
// started. Where it cannot be found out, it does.
func (m *marker) startsAgain(ctx context.Context, pod podRef, container string) bool {
	if m == nil {
		return true
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), markPatience)
	defer cancel()
	var object corev1.Pod
	if err := m.client.Get(ctx, client.ObjectKey{Namespace: pod.namespace, Name: pod.name}, &object); err != nil {
		m.log.Warn("cannot find out whether the kubelet tries a container again", "namespace", pod.namespace, "pod", pod.name, "error", err)
		return true
	}
	return object.UID != pod.uid || object.Spec.RestartPolicy != corev1.RestartPolicyNever ||
		!slices.ContainsFunc(object.Spec.Containers, func(c corev1.Container) bool { return c.Name == container && c.RestartPolicy == nil })
}

// write patches the status of one instance of a Pod; metadata names its UID, for
// another instance's is refused. That the Pod is gone is no error.
func (m *marker) write(ctx context.Context, pod podRef, metadata, status map[string]any) error {
	patch, err := json.Marshal(map[string]any{"metadata": metadata, "status": status})
	if err != nil {
		return err
	}
	// Also when the work was cancelled: the condition has to come off then.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), markPatience)
	defer cancel()
	object := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pod.namespace, Name: pod.name}}
	err = m.client.Status().Patch(ctx, object, client.RawPatch(types.StrategicMergePatchType, patch))
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsInvalid(err) {
		return nil
	}
	return err
}
