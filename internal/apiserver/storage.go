package apiserver

import (
	"context"
	"errors"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/rest"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// resourceRequests is pods/checkpoint under a name of its own, which is what
// "kubectl create -f" and "kubectl explain" find a kind by.
const resourceRequests = "podcheckpointrequests"

// parentless is what every resource of this group has: nothing to let go of.
type parentless struct{}

func (parentless) Destroy() {}

// parent is a resource that is served elsewhere and has subresources here. It has
// no verbs.
type parent struct {
	parentless
	object   runtime.Object
	gvk      schema.GroupVersionKind
	singular string
	cluster  bool // its objects are in no namespace
}

func (p *parent) New() runtime.Object                                          { return p.object.DeepCopyObject() }
func (p *parent) NamespaceScoped() bool                                        { return !p.cluster }
func (p *parent) GetSingularName() string                                      { return p.singular }
func (p *parent) GroupVersionKind(schema.GroupVersion) schema.GroupVersionKind { return p.gvk }

var (
	_ rest.Scoper                   = &parent{}
	_ rest.GroupVersionKindProvider = &parent{}
)

func pods() *parent {
	return &parent{object: &corev1.Pod{}, gvk: corev1.SchemeGroupVersion.WithKind("Pod"), singular: "pod"}
}

func podCheckpointsParent() *parent {
	return &parent{object: &checkpointv1alpha1.PodCheckpoint{}, gvk: checkpointv1alpha1.GroupVersion.WithKind("PodCheckpoint"), singular: "podcheckpoint"}
}

// checkpoints tells discovery and OpenAPI of pods/checkpoint; creation answers it.
type checkpoints struct{ parentless }

var _ rest.NamedCreater = checkpoints{}

func (checkpoints) New() runtime.Object { return &subresources.PodCheckpointRequest{} }

func (checkpoints) Create(context.Context, string, runtime.Object, rest.ValidateObjectFunc, *metav1.CreateOptions) (runtime.Object, error) {
	return nil, apierrors.NewInternalError(errors.New("a request for a checkpoint went past what answers it"))
}

// requests does the same for podcheckpointrequests.
type requests struct{ parentless }

var (
	_ rest.Creater              = requests{}
	_ rest.Scoper               = requests{}
	_ rest.SingularNameProvider = requests{}
)

func (requests) New() runtime.Object     { return &subresources.PodCheckpointRequest{} }
func (requests) NamespaceScoped() bool   { return true }
func (requests) GetSingularName() string { return "podcheckpointrequest" }

func (requests) Create(ctx context.Context, object runtime.Object, check rest.ValidateObjectFunc, options *metav1.CreateOptions) (runtime.Object, error) {
	return checkpoints{}.Create(ctx, "", object, check, options)
}

// statusOf makes an answer that apimachinery has no function for.
func statusOf(code int32, message string) metav1.Status {
	return metav1.Status{Status: metav1.StatusFailure, Code: code, Message: message}
}

// keepOffset tells a client that sent the wrong part which one is due.
func keepOffset(w http.ResponseWriter, err error) {
	var refusal *agentapi.Refusal
	if errors.As(err, &refusal) {
		if offset := refusal.Header.Get(agentapi.HeaderUploadOffset); offset != "" {
			w.Header().Set(agentapi.HeaderUploadOffset, offset)
		}
	}
}
