package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/placement"
	"podstasis.dev/stasis/internal/platform"
)

const (
	// labelEvery and labelSlowly are how often nodes are looked at: a few, or many.
	labelEvery  = 3 * time.Second
	labelSlowly = 30 * time.Second
	fewNodes    = 50
	// forsaken is how long an agent is not heard of before its node loses the labels
	// that nothing there needs. An upgrade takes less.
	forsaken = 5 * time.Minute
	// keepFor is how long after a look for Pods that need a label there is none again.
	keepFor = 30 * time.Second
)

// nodeLabels labels each node with the classes of platforms whose checkpoints it can
// restore, by what its agent says in its Lease: those of which there are checkpoints,
// and those of other nodes, of which there may be soon. The agents themselves have no
// right to write Nodes.
//
// A label is taken off when it is not true any more or its agent is gone, but never
// while a Pod on that node requires it: the kubelet would end the Pod at its next
// start (P33).
type nodeLabels struct {
	client    client.Client // reads PodCheckpoints and the metadata of Nodes from a cache
	live      client.Reader
	namespace string // of the agents' Leases
	clock     clock.PassiveClock
	log       *slog.Logger

	known  map[types.UID]string               // labels of PodCheckpoints that were looked at
	looked map[types.NamespacedName]time.Time // node and label that Pods were found to need
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (n *nodeLabels) NeedLeaderElection() bool { return true }

// Start labels nodes until ctx ends. It implements manager.Runnable.
func (n *nodeLabels) Start(ctx context.Context) error {
	for {
		wait := labelSlowly
		agents, err := placement.Agents(ctx, n.live, n.namespace)
		if err == nil {
			if len(agents) <= fewNodes {
				wait = labelEvery
			}
			err = n.label(ctx, agents)
		}
		if err != nil && ctx.Err() == nil {
			n.log.ErrorContext(ctx, "nodes could not be labelled with what they can restore, trying again", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

func (n *nodeLabels) label(ctx context.Context, agents map[string]agentapi.Announcement) error {
	classes, err := n.classes(ctx, agents)
	if err != nil {
		return err
	}
	nodes := &metav1.PartialObjectMetadataList{}
	nodes.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("NodeList"))
	if err := n.client.List(ctx, nodes); err != nil {
		return fmt.Errorf("list nodes: %w", err)
	}
	var failures []error
	for i := range nodes.Items {
		agent, there := agents[nodes.Items[i].Name]
		if !there || n.clock.Since(agent.Renewed) > forsaken {
			agent = agentapi.Announcement{}
		}
		if err := n.labelOne(ctx, &nodes.Items[i], agent, classes); err != nil {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}

// classes are the platforms that there are checkpoints of, or will be, by label.
func (n *nodeLabels) classes(ctx context.Context, agents map[string]agentapi.Announcement) (map[string]platform.Description, error) {
	classes := map[string]platform.Description{}
	for _, a := range agents {
		if a.Platform != nil && a.Alive(n.clock.Now()) {
			classes[placement.Label(*a.Platform)] = *a.Platform
		}
	}
	var checkpoints checkpointv1alpha1.PodCheckpointList
	if err := n.client.List(ctx, &checkpoints); err != nil {
		return nil, fmt.Errorf("list PodCheckpoints: %w", err)
	}
	known := make(map[types.UID]string, len(n.known))
	for i := range checkpoints.Items {
		c := &checkpoints.Items[i]
		label, looked := n.known[c.UID]
		if _, have := classes[label]; !looked || !have {
			requires, told := placement.Requirements(c)
			if !told {
				continue
			}
			label = placement.Label(requires)
			classes[label] = requires
		}
		known[c.UID] = label
	}
	n.known = known
	return classes, nil
}

// labelOne makes one node's labels what they should be. The agent is the zero value
// where there is none.
func (n *nodeLabels) labelOne(ctx context.Context, node *metav1.PartialObjectMetadata, agent agentapi.Announcement, classes map[string]platform.Description) error {
	change := map[string]any{}
	for label, requires := range classes {
		if agent.Platform != nil && agent.Protocol >= agentapi.VersionPeers && len(platform.Obstacles(requires, *agent.Platform)) == 0 {
			if node.Labels[label] != checkpointv1alpha1.LabelRunsValue {
				change[label] = checkpointv1alpha1.LabelRunsValue
			}
		} else if _, has := node.Labels[label]; has {
			change[label] = nil
		}
	}
	for label := range node.Labels {
		if _, known := classes[label]; !known && strings.HasPrefix(label, checkpointv1alpha1.LabelRunsPrefix) {
			change[label] = nil
		}
	}
	if err := n.spare(ctx, node.Name, change); err != nil {
		return err
	}
	if len(change) == 0 {
		return nil
	}
	data, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": change}})
	if err != nil {
		return fmt.Errorf("label node %s: %w", node.Name, err)
	}
	err = n.client.Patch(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node.Name}}, client.RawPatch(types.MergePatchType, data))
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("label node %s: %w", node.Name, err)
	}
	n.log.InfoContext(ctx, "node labelled with what it can restore", "node", node.Name, "change", change)
	return nil
}

// spare leaves labels on that a Pod on the node requires.
func (n *nodeLabels) spare(ctx context.Context, node string, change map[string]any) error {
	var goes []string
	for label, value := range change {
		if value != nil {
			continue
		}
		if since, looked := n.looked[types.NamespacedName{Namespace: node, Name: label}]; looked && n.clock.Since(since) < keepFor {
			delete(change, label)
			continue
		}
		goes = append(goes, label)
	}
	if len(goes) == 0 {
		return nil
	}
	var pods corev1.PodList
	if err := n.live.List(ctx, &pods, client.MatchingFields{"spec.nodeName": node}); err != nil {
		return fmt.Errorf("list the Pods of node %s: %w", node, err)
	}
	if n.looked == nil {
		n.looked = map[types.NamespacedName]time.Time{}
	}
	for _, label := range goes {
		key := types.NamespacedName{Namespace: node, Name: label}
		delete(n.looked, key)
		for i := range pods.Items {
			if requiresLabel(&pods.Items[i], label) {
				n.looked[key] = n.clock.Now()
				delete(change, label)
				break
			}
		}
	}
	return nil
}

// requiresLabel says whether a Pod that is not over requires a label of its node.
func requiresLabel(pod *corev1.Pod, label string) bool {
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed || pod.Spec.Affinity == nil || pod.Spec.Affinity.NodeAffinity == nil ||
		pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return false
	}
	for _, term := range pod.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
		for _, r := range term.MatchExpressions {
			if r.Key == label {
				return true
			}
		}
	}
	return false
}
