package admission

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"

	"gomodules.xyz/jsonpatch/v2"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/hooks"
)

// router writes the node of the source Pod into a PodCheckpoint at its creation,
// whatever the user wrote there (P5). Agents watch only their own node's, and the
// field decides who may write the status. It stays empty where there is no such
// Pod or it is not scheduled: the controller says so in the status. A Pod that
// forbids checkpoints of it has none, nor has one on a node without a living agent
// (P35): nothing would ever come of it. One that is imported goes to the node that
// its user names, or to any with an agent.
//
// One that is to be kept in a CheckpointStore is refused where that has no place for it,
// and gets the finalizer by which it stays until it was removed from there (quota.go).
type router struct {
	reader    client.Reader
	decoder   admission.Decoder
	agents    locator
	namespace string // of the agents' Leases
	clock     clock.PassiveClock
}

// locator says whether the agent of a node can be asked.
type locator interface {
	Locate(ctx context.Context, node string, needs int) (agentapi.Announcement, error)
}

func (r *router) Handle(ctx context.Context, req admission.Request) admission.Response {
	var checkpoint checkpointv1alpha1.PodCheckpoint
	if err := r.decoder.Decode(req, &checkpoint); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	response := r.route(ctx, req, &checkpoint)
	if !response.Allowed || checkpoint.Spec.StoreName == "" {
		return response
	}
	return r.admitToStore(ctx, req.Namespace, &checkpoint, response)
}

func (r *router) route(ctx context.Context, req admission.Request, checkpoint *checkpointv1alpha1.PodCheckpoint) admission.Response {
	if checkpoint.Spec.Import != nil {
		return r.routeImport(ctx, checkpoint)
	}
	pod, err := r.source(ctx, req.Namespace, checkpoint.Spec.SourcePodName)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	if pod.Labels[checkpointv1alpha1.LabelAllowed] == "false" {
		// The agent says the same of a Pod that got the label since.
		return deny(apierrors.NewForbidden(checkpointv1alpha1.GroupVersion.WithResource("podcheckpoints").GroupResource(), checkpoint.Name,
			fmt.Errorf("the Pod %q forbids it: it has the label %s=false", pod.Name, checkpointv1alpha1.LabelAllowed)))
	}
	if err := checkHooks(pod); err != nil {
		return deny(apierrors.NewForbidden(checkpointv1alpha1.GroupVersion.WithResource("podcheckpoints").GroupResource(), checkpoint.Name,
			fmt.Errorf("the Pod %q asks for hooks that cannot be run: %w", pod.Name, err)))
	}
	node := pod.Spec.NodeName
	if node != "" {
		if _, err := r.agents.Locate(ctx, node, 0); err != nil {
			return unreachable(err)
		}
	}
	return routed(checkpoint.Spec.NodeName, node)
}

// routed writes the node into the object, where it is not.
func routed(before, node string) admission.Response {
	switch {
	case node == before:
		return admission.Allowed("")
	case node == "":
		return admission.Patched("", jsonpatch.NewOperation("remove", "/spec/nodeName", nil))
	default:
		return admission.Patched("", jsonpatch.NewOperation("add", "/spec/nodeName", node))
	}
}

// routeImport sends a checkpoint that is brought in to a node that can take it.
// Whether its user may, the policy stasis-import decides.
func (r *router) routeImport(ctx context.Context, checkpoint *checkpointv1alpha1.PodCheckpoint) admission.Response {
	if node := checkpoint.Spec.NodeName; node != "" {
		if _, err := r.agents.Locate(ctx, node, agentapi.VersionCalls); err != nil {
			return unreachable(err)
		}
		return admission.Allowed("")
	}
	var leases coordinationv1.LeaseList
	if err := r.reader.List(ctx, &leases, client.InNamespace(r.namespace)); err != nil {
		return admission.Errored(http.StatusInternalServerError, fmt.Errorf("list the agents' Leases in namespace %q: %w", r.namespace, err))
	}
	var nodes []string
	for i := range leases.Items {
		if a, err := agentapi.Read(&leases.Items[i]); err == nil && a.Alive(r.clock.Now()) && a.Protocol >= agentapi.VersionCalls {
			nodes = append(nodes, a.Node)
		}
	}
	if len(nodes) == 0 {
		return deny(apierrors.NewServiceUnavailable("no node has a stasis-agent that takes imports: see whether the stasis-agent DaemonSet runs"))
	}
	return routed("", nodes[rand.N(len(nodes))])
}

// unreachable refuses what no agent would act on.
func unreachable(err error) admission.Response {
	var u *agentapi.Unreachable
	if errors.As(err, &u) {
		return deny(apierrors.NewServiceUnavailable(u.Error()))
	}
	return admission.Errored(http.StatusInternalServerError, err)
}

// checkHooks says what is wrong with a Pod's hooks. Commands that would not be run
// are told of before anybody relies on them.
func checkHooks(pod *corev1.Pod) error {
	var runnable []string
	for _, c := range pod.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			runnable = append(runnable, c.Name)
		}
	}
	for _, c := range pod.Spec.Containers {
		runnable = append(runnable, c.Name)
	}
	return hooks.Check(pod.Annotations, runnable)
}

// source returns the Pod of a name; the zero Pod, which is on no node, if there is
// none. What cannot be a Pod's name is left for the schema to refuse, which looks
// at the object after the webhooks.
func (r *router) source(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	var pod corev1.Pod
	if len(validation.IsDNS1123Subdomain(name)) > 0 {
		return &pod, nil
	}
	err := r.reader.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &pod)
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("read source Pod %s/%s: %w", namespace, name, err)
	}
	return &pod, nil
}
