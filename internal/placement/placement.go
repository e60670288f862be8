// Package placement says where a Pod that is to be restored may run, and writes
// that into the Pod: admission does so where the checkpoint is Ready, the
// controller later where it was not.
package placement

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// Obstacle says why nothing can be restored from a checkpoint now; empty if
// something can. The checkpoint is nil if there is none of that name.
func Obstacle(checkpoint *checkpointv1alpha1.PodCheckpoint, name string) string {
	if checkpoint == nil {
		return fmt.Sprintf("PodCheckpoint %q does not exist in this namespace", name)
	}
	if checkpoint.DeletionTimestamp != nil {
		return fmt.Sprintf("PodCheckpoint %q is being deleted", name)
	}
	ready := checkpoint.ReadyCondition()
	switch {
	case ready == nil:
		return fmt.Sprintf("PodCheckpoint %q is not Ready: nothing has acted on it yet", name)
	case ready.Status != metav1.ConditionTrue && checkpoint.IsTerminal():
		return fmt.Sprintf("PodCheckpoint %q is not Ready and will not be: it ended with %s: %s", name, ready.Reason, ready.Message)
	case ready.Status != metav1.ConditionTrue:
		return fmt.Sprintf("PodCheckpoint %q is not Ready: %s: %s", name, ready.Reason, ready.Message)
	case checkpoint.Status.NodeName == "" || checkpoint.UID == "":
		return fmt.Sprintf("PodCheckpoint %q is Ready but does not say where its data are", name)
	}
	return ""
}

// Pin ties a Pod to one checkpoint, by UID, and to the nodes that can restore it, of
// which it prefers the one that holds the data, and takes Stasis' scheduling gate
// off. It only tightens what the Pod asks for, which is all that the API server lets
// be done to a gated Pod.
//
// The nodes are named by a label, so that one that joins later counts. The kubelet
// looks at required affinity again whenever it starts, so the label stays on a node
// as long as a Pod there requires it (package controller).
func Pin(pod *corev1.Pod, checkpoint *checkpointv1alpha1.PodCheckpoint, where Where) {
	if pod.Annotations == nil {
		pod.Annotations = make(map[string]string)
	}
	pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] = string(checkpoint.UID)
	switch {
	case pod.Spec.NodeName != "" && where.Obstacle(pod.Spec.NodeName) == "":
		require(pod, nil, only(pod.Spec.NodeName))
	case where.Alone != "":
		require(pod, nil, only(where.Holder))
	default:
		require(pod, &corev1.NodeSelectorRequirement{Key: where.label, Operator: corev1.NodeSelectorOpExists}, corev1.NodeSelectorRequirement{})
		prefer(pod, where.Holder)
	}
	pod.Spec.SchedulingGates = slices.DeleteFunc(pod.Spec.SchedulingGates, isOurs)
	if len(pod.Spec.SchedulingGates) == 0 {
		pod.Spec.SchedulingGates = nil
	}
}

// Hold keeps a Pod from being scheduled until its checkpoint is Ready.
func Hold(pod *corev1.Pod) {
	if !Held(pod) {
		pod.Spec.SchedulingGates = append(pod.Spec.SchedulingGates, corev1.PodSchedulingGate{Name: checkpointv1alpha1.SchedulingGate})
	}
}

// Held says that the Pod carries Stasis' scheduling gate.
func Held(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.SchedulingGates, isOurs)
}

func isOurs(g corev1.PodSchedulingGate) bool { return g.Name == checkpointv1alpha1.SchedulingGate }

// require adds a requirement of the node, of its labels or of its fields, to each
// alternative of the required node affinity, or makes one. An alternative without
// requirements matches no node and may not be changed in a gated Pod.
func require(pod *corev1.Pod, label *corev1.NodeSelectorRequirement, field corev1.NodeSelectorRequirement) {
	affinity := nodeAffinity(pod)
	if affinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		affinity.RequiredDuringSchedulingIgnoredDuringExecution = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{}}}
		add(&affinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0], label, field)
		return
	}
	terms := affinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	for i := range terms {
		if !matchesNothing(terms[i]) {
			add(&terms[i], label, field)
		}
	}
}

func add(term *corev1.NodeSelectorTerm, label *corev1.NodeSelectorRequirement, field corev1.NodeSelectorRequirement) {
	if label == nil && !slices.ContainsFunc(term.MatchFields, isOnly(field.Values[0])) {
		term.MatchFields = append(term.MatchFields, field)
	}
	if label != nil && !slices.ContainsFunc(term.MatchExpressions, exists(label.Key)) {
		term.MatchExpressions = append(term.MatchExpressions, *label)
	}
}

// most is the weight of a preference that counts most.
const most = 100

// prefer makes the scheduler choose the node that holds the data, where it has the
// choice: nothing has to be fetched there.
func prefer(pod *corev1.Pod, node string) {
	affinity := nodeAffinity(pod)
	preferred := corev1.NodeSelectorTerm{MatchFields: []corev1.NodeSelectorRequirement{only(node)}}
	for _, p := range affinity.PreferredDuringSchedulingIgnoredDuringExecution {
		if equality.Semantic.DeepEqual(p.Preference, preferred) {
			return
		}
	}
	affinity.PreferredDuringSchedulingIgnoredDuringExecution = append(affinity.PreferredDuringSchedulingIgnoredDuringExecution,
		corev1.PreferredSchedulingTerm{Weight: most, Preference: preferred})
}

func nodeAffinity(pod *corev1.Pod) *corev1.NodeAffinity {
	if pod.Spec.Affinity == nil {
		pod.Spec.Affinity = &corev1.Affinity{}
	}
	if pod.Spec.Affinity.NodeAffinity == nil {
		pod.Spec.Affinity.NodeAffinity = &corev1.NodeAffinity{}
	}
	return pod.Spec.Affinity.NodeAffinity
}

// Tied says that no node can run the Pod but those that can restore the checkpoint.
// Whether their agents live now does not count here: it changes by itself.
func Tied(pod *corev1.Pod, where Where) bool {
	if pod.Spec.NodeName != "" {
		return where.Obstacle(pod.Spec.NodeName) == ""
	}
	if pod.Spec.Affinity == nil || pod.Spec.Affinity.NodeAffinity == nil ||
		pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return false
	}
	terms := pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	return !slices.ContainsFunc(terms, func(t corev1.NodeSelectorTerm) bool {
		return !matchesNothing(t) && !slices.ContainsFunc(t.MatchFields, isOnly(where.Holder)) &&
			(where.label == "" || !slices.ContainsFunc(t.MatchExpressions, exists(where.label)))
	})
}

// nodes reads Nodes: one by its name, nil if there is none, or all.
type nodes interface {
	Node(ctx context.Context, name string) (*corev1.Node, error)
	Nodes(ctx context.Context) ([]corev1.Node, error)
}

// Conflict says why the Pod, as it asks, cannot run on any node that can restore the
// checkpoint; empty if it can. A node that does not exist is judged by its name only:
// the Pod waits for it, as any Pod does.
func Conflict(ctx context.Context, pod *corev1.Pod, checkpoint *checkpointv1alpha1.PodCheckpoint, where Where, reader nodes) (string, error) {
	if why := wrongClass(pod, checkpoint); why != "" {
		return why, nil
	}
	wanted := cmp.Or(pod.Spec.NodeName, where.Holder)
	if why := where.Obstacle(wanted); why != "" {
		return fmt.Sprintf("spec.nodeName is %q, and PodCheckpoint %q cannot be restored there: %s", wanted, checkpoint.Name, why), nil
	}
	asks := nodeaffinity.GetRequiredNodeAffinity(asked(pod))
	node, err := reader.Node(ctx, wanted)
	if err != nil {
		return "", err
	}
	switch matches, err := match(asks, node); {
	case err != nil:
		return fmt.Sprintf("spec.nodeSelector or spec.affinity.nodeAffinity cannot be evaluated: %v", err), nil
	case matches:
		return "", nil
	case pod.Spec.NodeName != "":
		return fmt.Sprintf("spec.nodeSelector or spec.affinity.nodeAffinity excludes node %q, which spec.nodeName names", wanted), nil
	case where.Alone != "":
		return fmt.Sprintf("spec.nodeSelector or spec.affinity.nodeAffinity excludes node %q, which holds the checkpoint, and it can be restored nowhere else: %s", wanted, where.Alone), nil
	}
	all, err := reader.Nodes(ctx)
	if err != nil {
		return "", err
	}
	var cannot []string
	for i := range all {
		if matches, err := match(asks, &all[i]); err != nil || !matches || all[i].Name == where.Holder {
			continue
		}
		why := where.Obstacle(all[i].Name)
		if why == "" {
			return "", nil
		}
		cannot = append(cannot, why)
	}
	message := fmt.Sprintf("spec.nodeSelector or spec.affinity.nodeAffinity excludes node %q, which holds the checkpoint, and all others that can restore it", where.Holder)
	return message + told(cannot), nil
}

// told adds why nodes cannot, of many the first few.
func told(cannot []string) string {
	const most = 3
	if len(cannot) == 0 {
		return ""
	}
	slices.Sort(cannot)
	text := ": " + strings.Join(cannot[:min(len(cannot), most)], "; ")
	if more := len(cannot) - most; more > 0 {
		text += fmt.Sprintf("; and %d more nodes cannot", more)
	}
	return text
}

// match evaluates what a Pod asks for of a node that may not exist.
func match(asks nodeaffinity.RequiredNodeAffinity, node *corev1.Node) (bool, error) {
	if node == nil {
		return true, nil
	}
	return asks.Match(node)
}

// asked is the Pod without the labels that Pin requires: a node that can restore the
// checkpoint gets its label in a moment.
func asked(pod *corev1.Pod) *corev1.Pod {
	if pod.Spec.Affinity == nil || pod.Spec.Affinity.NodeAffinity == nil ||
		pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return pod
	}
	pod = pod.DeepCopy()
	required := pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	for i := range required.NodeSelectorTerms {
		term := &required.NodeSelectorTerms[i]
		if matchesNothing(*term) {
			continue
		}
		term.MatchExpressions = slices.DeleteFunc(term.MatchExpressions, func(r corev1.NodeSelectorRequirement) bool {
			return strings.HasPrefix(r.Key, checkpointv1alpha1.LabelRunsPrefix)
		})
		if matchesNothing(*term) { // it was of these alone: any node will do
			pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution = nil
			break
		}
	}
	return pod
}

func exists(label string) func(corev1.NodeSelectorRequirement) bool {
	return func(r corev1.NodeSelectorRequirement) bool {
		return r.Key == label && r.Operator == corev1.NodeSelectorOpExists
	}
}

func only(node string) corev1.NodeSelectorRequirement {
	return corev1.NodeSelectorRequirement{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{node}}
}

func isOnly(node string) func(corev1.NodeSelectorRequirement) bool {
	return func(r corev1.NodeSelectorRequirement) bool {
		return r.Key == metav1.ObjectNameField && r.Operator == corev1.NodeSelectorOpIn && len(r.Values) == 1 && r.Values[0] == node
	}
}

func matchesNothing(t corev1.NodeSelectorTerm) bool {
	return len(t.MatchExpressions)+len(t.MatchFields) == 0
}
