package admission

import (
	"context"
	"fmt"
	"net/http"

	"gomodules.xyz/jsonpatch/v2"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// router writes the node of the source Pod into a PodCheckpoint at its creation,
// whatever the user wrote there (P5). Agents watch only their own node's, and the
// field decides who may write the status. It stays empty where there is no such
// Pod or it is not scheduled: the controller says so in the status.
type router struct {
	reader  client.Reader
	decoder admission.Decoder
}

func (r *router) Handle(ctx context.Context, req admission.Request) admission.Response {
	var checkpoint checkpointv1alpha1.PodCheckpoint
	if err := r.decoder.Decode(req, &checkpoint); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	node, err := r.nodeOf(ctx, req.Namespace, checkpoint.Spec.SourcePodName)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	switch {
	case node == checkpoint.Spec.NodeName:
		return admission.Allowed("")
	case node == "":
		return admission.Patched("", jsonpatch.NewOperation("remove", "/spec/nodeName", nil))
	default:
		return admission.Patched("", jsonpatch.NewOperation("add", "/spec/nodeName", node))
	}
}

// nodeOf returns the node of a Pod; empty if it has none, or if there is no such
// Pod. What cannot be a Pod's name is left for the schema to refuse, which looks
// at the object after the webhooks.
func (r *router) nodeOf(ctx context.Context, namespace, name string) (string, error) {
	if len(validation.IsDNS1123Subdomain(name)) > 0 {
		return "", nil
	}
	var pod corev1.Pod
	err := r.reader.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &pod)
	if err != nil && !apierrors.IsNotFound(err) {
		return "", fmt.Errorf("read source Pod %s/%s: %w", namespace, name, err)
	}
	return pod.Spec.NodeName, nil
}
