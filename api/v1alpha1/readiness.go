package v1alpha1

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// DefaultTimeout bounds a checkpoint whose spec.timeoutSeconds is unset or 0.
const DefaultTimeout = 120 * time.Second

// Timeout is how long the checkpoint may take (P2).
func (p *PodCheckpoint) Timeout() time.Duration {
	if p.Spec.TimeoutSeconds == nil || *p.Spec.TimeoutSeconds <= 0 {
		return DefaultTimeout
	}
	return time.Duration(*p.Spec.TimeoutSeconds) * time.Second
}

// ReadyCondition is the condition that tells the progress, nil before anyone has
// acted.
func (p *PodCheckpoint) ReadyCondition() *metav1.Condition {
	return meta.FindStatusCondition(p.Status.Conditions, PodCheckpointReady)
}

// IsReady says that the checkpoint is complete.
func (p *PodCheckpoint) IsReady() bool {
	c := p.ReadyCondition()
	return c != nil && c.Status == metav1.ConditionTrue
}

// IsTerminal says that the checkpoint has ended, well or not: nothing acts on it
// any more (P3).
func (p *PodCheckpoint) IsTerminal() bool {
	c := p.ReadyCondition()
	return c != nil && (c.Status == metav1.ConditionTrue ||
		c.Reason == ReasonCheckpointFailed || c.Reason == ReasonSourcePodReplaced)
}

// AwaitsMemory says that a restored Pod runs, or is about to, and that memory of its
// checkpoint is still being brought to its node: the checkpoint's data have to stay (P29).
func AwaitsMemory(pod *corev1.Pod) bool {
	if pod.Status.Phase == corev1.PodFailed || pod.Status.Phase == corev1.PodSucceeded {
		return false
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == PodConditionMemoryRestored {
			return c.Status != corev1.ConditionTrue && c.Reason != ReasonMemoryLost
		}
	}
	return false
}
