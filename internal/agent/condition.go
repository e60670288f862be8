package agent

import (
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podstasis.dev/stasis/api/v1alpha1"
)

// maxMessageBytes bounds the message of a condition (the API server's limit is
// 32768) and of an event (1024, cut separately).
const maxMessageBytes = 8 << 10

func readyCondition(pcp *v1alpha1.PodCheckpoint) *metav1.Condition {
	return meta.FindStatusCondition(pcp.Status.Conditions, v1alpha1.PodCheckpointReady)
}

// terminal says that the object's outcome stands: nothing is executed for it
// again, whatever happens (P3).
func terminal(pcp *v1alpha1.PodCheckpoint) bool {
	c := readyCondition(pcp)
	if c == nil {
		return false
	}
	return c.Status == metav1.ConditionTrue ||
		c.Reason == v1alpha1.ReasonCheckpointFailed || c.Reason == v1alpha1.ReasonSourcePodReplaced
}

func ready(pcp *v1alpha1.PodCheckpoint) bool {
	c := readyCondition(pcp)
	return c != nil && c.Status == metav1.ConditionTrue
}

func inProgress(pcp *v1alpha1.PodCheckpoint) bool {
	c := readyCondition(pcp)
	return c != nil && c.Status == metav1.ConditionFalse && c.Reason == v1alpha1.ReasonCheckpointInProgress
}

func setReady(s *v1alpha1.PodCheckpointStatus, generation int64, now metav1.Time, reason, message string) {
	value := metav1.ConditionFalse
	if reason == v1alpha1.ReasonCheckpointCompleted {
		value = metav1.ConditionTrue
	}
	meta.SetStatusCondition(&s.Conditions, metav1.Condition{
		Type:               v1alpha1.PodCheckpointReady,
		Status:             value,
		Reason:             reason,
		Message:            cut(message, maxMessageBytes),
		ObservedGeneration: generation,
		LastTransitionTime: now,
	})
}

// cut shortens s to at most n bytes, at a character's boundary, keeping its end:
// the last lines of an engine's log say most.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const mark = "… "
	return mark + strings.ToValidUTF8(s[len(s)-n+len(mark):], "")
}
