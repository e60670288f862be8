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
// Pod or it is not scheduled: the controller says so in the status. A Pod that
// forbids checkpoints of it has none.
type router struct {
	reader  client.Reader
	decoder admission.Decoder
}

func (r *router) Handle(ctx context.Context, req admission.Request) admission.Response {
	var checkpoint checkpointv1alpha1.PodCheckpoint
	if err := r.decoder.Decode(req, &checkpoint); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
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
	node := pod.Spec.NodeName
	switch {
	case node == checkpoint.Spec.NodeName:
		return admission.Allowed("")
	case node == "":
		return admission.Patched("", jsonpatch.NewOperation("remove", "/spec/nodeName", nil))
	default:
		return admission.Patched("", jsonpatch.NewOperation("add", "/spec/nodeName", node))
	}
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
