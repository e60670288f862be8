// Package admission holds the webhooks: what needs a look-up before an object is
// stored. What the CRD's schema or a ValidatingAdmissionPolicy can state is
// stated there (config/crd, config/admission).
//
// Only Pods that carry the annotation restore-from ever reach the webhooks; the
// match conditions in config/admission see to that.
package admission

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// The paths that config/admission names.
const (
	PathPlacePod           = "/place-pod"
	PathAuthorizePod       = "/authorize-pod"
	PathRoutePodCheckpoint = "/route-podcheckpoint"
)

// Config is what the webhooks need.
type Config struct {
	// Reader reads from the API server, not from a cache: a decision is taken on
	// what is, and once for each restoring Pod.
	Reader client.Reader
	// Reviews creates SubjectAccessReviews.
	Reviews creator
	// Agents finds the agents, whose Leases are in Namespace.
	Agents    locator
	Namespace string
	Clock     clock.PassiveClock
	Scheme    *runtime.Scheme
	Log       *slog.Logger
}

// creator is the part of a client that a review needs.
type creator interface {
	Create(ctx context.Context, obj client.Object, opts ...client.CreateOption) error
}

// Register serves the webhooks. None of them has side effects: a
// SubjectAccessReview is never stored.
func Register(server webhook.Server, c Config) {
	decoder := admission.NewDecoder(c.Scheme)
	where := whereabouts{leases: c.Reader, namespace: c.Namespace, clock: c.Clock}
	server.Register(PathPlacePod, &webhook.Admission{Handler: &placer{reader: c.Reader, decoder: decoder, whereabouts: where}})
	server.Register(PathAuthorizePod, &webhook.Admission{Handler: &authorizer{reader: c.Reader, reviews: c.Reviews, decoder: decoder, log: c.Log, whereabouts: where}})
	server.Register(PathRoutePodCheckpoint, &webhook.Admission{Handler: &router{reader: c.Reader, decoder: decoder, agents: c.Agents, namespace: c.Namespace, clock: c.Clock}})
}

// find reads the PodCheckpoint of a name; nil if there is none.
func find(ctx context.Context, reader client.Reader, namespace, name string) (*checkpointv1alpha1.PodCheckpoint, error) {
	var checkpoint checkpointv1alpha1.PodCheckpoint
	err := reader.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &checkpoint)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read PodCheckpoint %s/%s: %w", namespace, name, err)
	}
	return &checkpoint, nil
}

// patch answers with the difference between two states of a Pod as this program
// knows Pods, so that fields of a newer API server stay as they are.
func patch(before, after *corev1.Pod) admission.Response {
	b, err := json.Marshal(before)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	a, err := json.Marshal(after)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	return admission.PatchResponseFromRaw(b, a)
}

// deny refuses with an API error: its code and reason reach the client.
func deny(err *apierrors.StatusError) admission.Response {
	response := admission.Denied("")
	response.Result = &err.ErrStatus
	return response
}

// forbid refuses a Pod as the API server would where a right is missing.
func forbid(pod *corev1.Pod, format string, args ...any) admission.Response {
	return deny(apierrors.NewForbidden(corev1.Resource("pods"), displayName(pod), fmt.Errorf(format, args...)))
}

// displayName names a Pod in a message, also where the API server has yet to
// make up the name.
func displayName(pod *corev1.Pod) string {
	if pod.Name == "" && pod.GenerateName != "" {
		return pod.GenerateName + "*"
	}
	return pod.Name
}
