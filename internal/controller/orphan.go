package controller

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

const (
	// settle is how long a node or an agent may be missing before that counts:
	// a node registers again and a DaemonSet replaces its Pod within seconds.
	settle = 30 * time.Second
	// overtime is what an agent gets beyond a checkpoint's timeout to write the
	// outcome.
	overtime = 60 * time.Second
	// lookAgain is how often a checkpoint that an agent is at work on is looked at.
	lookAgain = time.Minute
)

// facts is what is known about who could act on a PodCheckpoint.
type facts struct {
	source *corev1.Pod  // nil: no Pod of that name; only looked up where no node is named
	node   *corev1.Node // nil: no node of that name
	agent  *corev1.Pod  // nil: no agent on the node
}

// verdict is what becomes of a PodCheckpoint that has not ended. The zero value
// leaves it alone.
type verdict struct {
	reason  string        // of the Ready condition to write; empty: write nothing
	message string        // of the condition
	again   time.Duration // when to look again; 0: when something changes
}

func failed(format string, args ...any) verdict {
	return verdict{reason: checkpointv1alpha1.ReasonCheckpointFailed, message: fmt.Sprintf(format, args...)}
}

// judge decides on a PodCheckpoint that has not ended: one that no agent owns
// ends here (P1), the others are their agent's.
func judge(c *checkpointv1alpha1.PodCheckpoint, f facts, now time.Time) verdict {
	if c.Spec.NodeName == "" {
		return judgeUnrouted(c, f.source)
	}
	node, pod := c.Spec.NodeName, c.Spec.SourcePodName
	age := now.Sub(c.CreationTimestamp.Time)
	if f.node == nil {
		if age < settle {
			return verdict{again: settle - age}
		}
		return failed("node %q, which ran Pod %q, no longer exists", node, pod)
	}
	started := c.Status.StartTime != nil
	if f.agent == nil && !started {
		if age < settle {
			return pending(settle-age, "no stasis-agent runs on node %q yet", node)
		}
		return failed("no stasis-agent runs on node %q, which runs Pod %q: see whether the stasis-agent DaemonSet covers that node", node, pod)
	}

	begin := c.CreationTimestamp.Time
	if started {
		begin = c.Status.StartTime.Time
	}
	deadline := begin.Add(allowed(c) + overtime)
	hindrance := hindrance(f, node)
	if hindrance == "" {
		return verdict{again: max(deadline.Sub(now), lookAgain)}
	}
	if now.Before(deadline) {
		if started {
			return verdict{again: deadline.Sub(now)}
		}
		return pending(deadline.Sub(now), "%s", hindrance)
	}
	return failed("%s, and nothing was heard of this checkpoint for its timeout of %s and %s more", hindrance, allowed(c), overtime)
}

// transferPatience is for how long an archive may be on its way here, or a checkpoint to
// its store: a store that is away delays it, and its agent may be replaced meanwhile.
const transferPatience = 24 * time.Hour

// allowed is how long a checkpoint may take.
func allowed(c *checkpointv1alpha1.PodCheckpoint) time.Duration {
	if c.Spec.Import != nil || c.Spec.StoreName != "" {
		return transferPatience
	}
	return c.Timeout()
}

// judgeUnrouted ends a PodCheckpoint that admission found no node for: the node
// cannot be filled in later, so nothing will ever act on it.
func judgeUnrouted(c *checkpointv1alpha1.PodCheckpoint, source *corev1.Pod) verdict {
	name := c.Spec.SourcePodName
	switch {
	case source == nil:
		return failed("Pod %q does not exist in this namespace", name)
	case c.Spec.SourcePodUID != nil && *c.Spec.SourcePodUID != source.UID:
		return verdict{
			reason:  checkpointv1alpha1.ReasonSourcePodReplaced,
			message: fmt.Sprintf("Pod %q has UID %s, and not %s as asked for", name, source.UID, *c.Spec.SourcePodUID),
		}
	case source.Spec.NodeName == "":
		return failed("Pod %q is not scheduled to a node (phase %s)", name, source.Status.Phase)
	default:
		return failed("Pod %q was not there or not scheduled when this PodCheckpoint was created; it runs on node %q now: create another PodCheckpoint", name, source.Spec.NodeName)
	}
}

func pending(again time.Duration, format string, args ...any) verdict {
	return verdict{reason: checkpointv1alpha1.ReasonPending, message: fmt.Sprintf(format, args...), again: again}
}

// hindrance says why the agent of a node cannot act; empty if it can.
func hindrance(f facts, node string) string {
	if !nodeReady(f.node) {
		return fmt.Sprintf("node %q is not Ready", node)
	}
	if f.agent == nil {
		return fmt.Sprintf("no stasis-agent runs on node %q", node)
	}
	if !podReady(f.agent) {
		return fmt.Sprintf("stasis-agent %q on node %q is not Ready", f.agent.Name, node)
	}
	return ""
}

func nodeReady(node *corev1.Node) bool {
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func podReady(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
