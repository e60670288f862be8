package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxPodInName is how much of a Pod's name fits into an event's.
const maxPodInName = 200

// note makes an event of a Pod that is there once, though it be made again by an
// agent whose predecessor ended before it could note that it had been: its name says
// what it is about. An event recorder names each anew, and drops what the API server
// does not take.
func (m *marker) note(ctx context.Context, pod podRef, occasion, reason, message string) error {
	about := sha256.Sum256([]byte(string(pod.uid) + "/" + occasion + "/" + reason))
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), markPatience)
	defer cancel()
	err := m.client.Create(ctx, &eventsv1.Event{
		ObjectMeta:          metav1.ObjectMeta{Namespace: pod.namespace, Name: strings.TrimRight(pod.name[:min(len(pod.name), maxPodInName)], "-.") + "." + hex.EncodeToString(about[:8])},
		EventTime:           metav1.NewMicroTime(m.now()),
		ReportingController: componentName,
		ReportingInstance:   componentName,
		Type:                corev1.EventTypeNormal,
		Action:              actionRestore,
		Reason:              reason,
		Regarding:           corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.namespace, Name: pod.name, UID: pod.uid},
		Note:                cut(message, maxEventBytes),
	})
	switch {
	case err == nil, apierrors.IsAlreadyExists(err):
		return nil
	case apierrors.IsNotFound(err), apierrors.IsForbidden(err), apierrors.IsInvalid(err):
		// The namespace is going, or something that trying again does not change.
		m.log.Warn("an event of a Pod could not be written", "namespace", pod.namespace, "pod", pod.name, "reason", reason, "error", err)
		return nil
	}
	return fmt.Errorf("write the event %s: %w", reason, err)
}
