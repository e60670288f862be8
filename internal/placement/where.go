package placement

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/platform"
)

// Agents reads what the agents of all nodes say, by node. What is no agent's Lease
// is left out.
func Agents(ctx context.Context, reader client.Reader, namespace string) (map[string]agentapi.Announcement, error) {
	var leases coordinationv1.LeaseList
	if err := reader.List(ctx, &leases, client.InNamespace(namespace)); err != nil {
		return nil, fmt.Errorf("list the agents' Leases in namespace %q: %w", namespace, err)
	}
	agents := make(map[string]agentapi.Announcement, len(leases.Items))
	for i := range leases.Items {
		if a, err := agentapi.Read(&leases.Items[i]); err == nil {
			agents[a.Node] = a
		}
	}
	return agents, nil
}

// Requirements is what a checkpoint needs of a node; false where it does not say.
func Requirements(c *checkpointv1alpha1.PodCheckpoint) (platform.Description, bool) {
	r := c.Status.Requires
	if r == nil {
		return platform.Description{}, false
	}
	d := platform.Description{
		OS: r.OS, Architecture: r.Architecture, Kernel: r.Kernel,
		CPU:    &checkpoint.CPU{Features: r.CPUFeatures, XSaveFeatures: r.XSaveFeatures, XSaveBytes: int(r.XSaveBytes)},
		Engine: checkpoint.Program{Name: r.Engine.Name, Version: r.Engine.Version}, FormatVersion: int(r.FormatVersion),
	}
	return d, d.Check() == nil
}

// Label is the label of the nodes that can restore what ran on a platform.
func Label(of platform.Description) string { return checkpointv1alpha1.LabelRunsPrefix + of.Class() }

// Where is where a checkpoint can be restored.
type Where struct {
	// Holder is the node that holds the data.
	Holder string
	// Alone says why nobody but the holder can; empty if others can.
	Alone string

	label    string // that nodes have which can; empty if the checkpoint does not say what it needs
	requires platform.Description
	agents   map[string]agentapi.Announcement
	now      time.Time
}

// Find says where a checkpoint can be restored: on the node that holds its data, and
// on those that can run it, as long as the first can send it or it is in a store. A checkpoint that does
// not say what it needs stays where it is.
func Find(c *checkpointv1alpha1.PodCheckpoint, agents map[string]agentapi.Announcement, now time.Time) Where {
	w := Where{Holder: c.Status.NodeName, agents: agents, now: now}
	requires, told := Requirements(c)
	if !told {
		w.Alone = "the checkpoint does not say what CPU and kernel it needs: it was taken by an older stasis-agent, or imported from one"
		return w
	}
	w.requires, w.label = requires, Label(requires)
	if volume := hostPath(c); volume != "" {
		w.Alone = fmt.Sprintf("its volume %s is a directory of that node (hostPath)", volume)
		return w
	}
	if c.Status.Store != nil {
		return w // the holder is not needed
	}
	if why := w.cannotServe(); why != "" {
		w.Alone = "the node that holds the data cannot send them: " + why
	}
	return w
}

// hostPath names a volume of the source that is a part of its node, which no
// checkpoint holds; empty if it had none.
func hostPath(c *checkpointv1alpha1.PodCheckpoint) string {
	if c.Status.CheckpointedPodTemplate == nil {
		return ""
	}
	for _, v := range c.Status.CheckpointedPodTemplate.Spec.Volumes {
		if v.HostPath != nil {
			return v.Name
		}
	}
	return ""
}

// cannotServe says why the holder cannot send the checkpoint to others.
func (w *Where) cannotServe() string {
	a, there := w.agents[w.Holder]
	switch {
	case !there || !a.Alive(w.now):
		return "its stasis-agent is not heard of"
	case a.Protocol < agentapi.VersionPeers || a.Platform == nil:
		return "its stasis-agent is too old"
	case len(platform.Obstacles(w.requires, *a.Platform)) > 0:
		// It is not what it was when it took the checkpoint. The data can be had all the
		// same, but the label that others are found by would keep the Pod off this one.
		return "it " + strings.Join(platform.Obstacles(w.requires, *a.Platform), ", it ")
	}
	return ""
}

// Obstacle says why a node cannot restore the checkpoint; empty if it can.
func (w *Where) Obstacle(node string) string {
	if node == w.Holder {
		return ""
	}
	if w.Alone != "" {
		return fmt.Sprintf("only node %q can, which holds the data (%s)", w.Holder, w.Alone)
	}
	a, there := w.agents[node]
	if !there || !a.Alive(w.now) {
		return fmt.Sprintf("no stasis-agent is heard of on node %q", node)
	}
	if a.Protocol < agentapi.VersionPeers || a.Platform == nil {
		return fmt.Sprintf("the stasis-agent of node %q is too old to fetch checkpoints", node)
	}
	if why := platform.Obstacles(w.requires, *a.Platform); len(why) > 0 {
		return fmt.Sprintf("node %q %s", node, strings.Join(why, "; it "))
	}
	return ""
}

// Others lists the nodes beside the holder that can restore the checkpoint.
func (w *Where) Others() []string {
	var nodes []string
	for node := range w.agents {
		if node != w.Holder && w.Obstacle(node) == "" {
			nodes = append(nodes, node)
		}
	}
	slices.Sort(nodes)
	return nodes
}
