package admission

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/placement"
	"podstasis.dev/stasis/internal/podtemplate"
)

// authorizer lets a restoring Pod be created only by who may restore its
// checkpoint (P20), only where it equals the checkpointed Pod (P21), and only
// placed as the restore needs it (P22). It sees the object as it will be stored.
type authorizer struct {
	reader  client.Reader
	reviews creator
	decoder admission.Decoder
	log     *slog.Logger
	whereabouts
}

func (a *authorizer) Handle(ctx context.Context, req admission.Request) admission.Response {
	var pod corev1.Pod
	if err := a.decoder.Decode(req, &pod); err != nil {
		return admission.Errored(http.StatusBadRequest, err)
	}
	name, asked := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFrom]
	if !asked {
		return admission.Allowed("")
	}
	if err := checkName(&pod, name); err != nil {
		return deny(err)
	}
	if err := checkMemory(&pod); err != nil {
		return deny(err)
	}
	// First the right: whoever lacks it learns nothing about the checkpoint.
	allowed, why, err := a.mayRestore(ctx, req, name)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	if !allowed {
		a.log.InfoContext(ctx, "restore refused: the user lacks the right", "user", req.UserInfo.Username,
			"namespace", req.Namespace, "podCheckpoint", name, "why", why)
		return forbid(&pod, "user %q may not restore PodCheckpoint %q in namespace %q: verb %q on podcheckpoints.%s is needed, as ClusterRole stasis-restorer grants it",
			req.UserInfo.Username, name, req.Namespace, checkpointv1alpha1.VerbRestore, checkpointv1alpha1.GroupName)
	}
	if refused := checkShape(&pod); refused != nil {
		return *refused
	}
	checkpoint, err := find(ctx, a.reader, req.Namespace, name)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	if obstacle := placement.Obstacle(checkpoint, name); obstacle != "" {
		// The controller goes on from here once the checkpoint is Ready, and
		// compares then; the agent compares again.
		if !placement.Held(&pod) {
			return forbid(&pod, "scheduling gate %q is missing: %s", checkpointv1alpha1.SchedulingGate, obstacle)
		}
		return admission.Allowed("").WithWarnings(obstacle + "; the Pod is held back until it is")
	}
	return a.checkReady(ctx, &pod, checkpoint)
}

// checkReady checks a Pod against a checkpoint that it can be restored from.
func (a *authorizer) checkReady(ctx context.Context, pod *corev1.Pod, checkpoint *checkpointv1alpha1.PodCheckpoint) admission.Response {
	where, err := a.of(ctx, checkpoint)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	conflict, err := placement.Conflict(ctx, pod, checkpoint, where, a)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	if conflict != "" {
		return forbid(pod, "%s", conflict)
	}
	if errs := Mismatch(checkpoint, pod); len(errs) > 0 {
		return deny(apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("Pod").GroupKind(), displayName(pod), errs))
	}
	// What the placer did must still be there: another webhook may have run since,
	// and the checkpoint may have become Ready or been replaced in between.
	pinned := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID] == string(checkpoint.UID) &&
		placement.Tied(pod, where)
	if !pinned && !placement.Held(pod) {
		return forbid(pod, "the Pod is not pinned to PodCheckpoint %q and the nodes that can restore it; create it again, and if that fails look for another webhook that changes annotations or affinity", checkpoint.Name)
	}
	return admission.Allowed("")
}

// Node reads a node; nil if there is none of that name.
func (a *authorizer) Node(ctx context.Context, name string) (*corev1.Node, error) {
	var node corev1.Node
	err := a.reader.Get(ctx, client.ObjectKey{Name: name}, &node)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read node %s: %w", name, err)
	}
	return &node, nil
}

// Nodes reads all nodes: for a Pod that asks for others than the one that holds its
// checkpoint.
func (a *authorizer) Nodes(ctx context.Context) ([]corev1.Node, error) {
	var list corev1.NodeList
	if err := a.reader.List(ctx, &list); err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	return list.Items, nil
}

// whereabouts finds out where checkpoints can be restored.
type whereabouts struct {
	leases    client.Reader
	namespace string // of the agents' Leases
	clock     clock.PassiveClock
}

func (w whereabouts) of(ctx context.Context, checkpoint *checkpointv1alpha1.PodCheckpoint) (placement.Where, error) {
	agents, err := placement.Agents(ctx, w.leases, w.namespace)
	if err != nil {
		return placement.Where{}, err
	}
	return placement.Find(checkpoint, agents, w.clock.Now()), nil
}

// Mismatch says where a Pod differs from what was checkpointed (P21). A
// checkpoint of some containers cannot be restored as a Pod.
func Mismatch(checkpoint *checkpointv1alpha1.PodCheckpoint, pod *corev1.Pod) field.ErrorList {
	if some := checkpoint.Spec.Containers; len(some) > 0 {
		return field.ErrorList{field.Forbidden(
			field.NewPath("metadata", "annotations").Key(checkpointv1alpha1.AnnotationRestoreFrom),
			fmt.Sprintf("PodCheckpoint %q holds only the containers %s, and a Pod is restored whole", checkpoint.Name, strings.Join(some, ", ")))}
	}
	return podtemplate.Compare(checkpoint.Status.CheckpointedPodTemplate, pod)
}

// checkShape refuses what no checkpoint could be restored into.
func checkShape(pod *corev1.Pod) *admission.Response {
	refuse := func(format string, args ...any) *admission.Response {
		r := forbid(pod, format, args...)
		return &r
	}
	if _, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		return refuse("a static Pod cannot be restored")
	}
	if _, ticket := pod.Annotations[checkpointv1alpha1.AnnotationRestoreTicket]; ticket {
		return refuse("annotation %s is not for Pods", checkpointv1alpha1.AnnotationRestoreTicket)
	}
	if err := checkHooks(pod); err != nil {
		return refuse("it asks for hooks that cannot be run: %v", err)
	}
	if class := pod.Spec.RuntimeClassName; class == nil || !placement.IsClass(*class) {
		has := "none"
		if class != nil {
			has = fmt.Sprintf("%q", *class)
		}
		return refuse("spec.runtimeClassName is %s, but a checkpoint is restored by %q, or %q if gVisor has captured it; leave it out or name the source's",
			has, checkpointv1alpha1.RuntimeClassStasis, checkpointv1alpha1.RuntimeClassGVisor)
	}
	return nil
}

// mayRestore asks the API server whether the user who creates the Pod may
// restore the checkpoint: for a Pod of a workload, that is its controller.
func (a *authorizer) mayRestore(ctx context.Context, req admission.Request, name string) (bool, string, error) {
	review := authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User:   req.UserInfo.Username,
		Groups: slices.Clone(req.UserInfo.Groups),
		UID:    req.UserInfo.UID,
		Extra:  extra(req.UserInfo.Extra),
		ResourceAttributes: &authorizationv1.ResourceAttributes{
			Namespace: req.Namespace,
			Verb:      checkpointv1alpha1.VerbRestore,
			Group:     checkpointv1alpha1.GroupVersion.Group,
			Version:   checkpointv1alpha1.GroupVersion.Version,
			Resource:  "podcheckpoints",
			Name:      name,
		},
	}}
	if err := a.reviews.Create(ctx, &review); err != nil {
		return false, "", fmt.Errorf("review whether %q may restore PodCheckpoint %s/%s: %w", req.UserInfo.Username, req.Namespace, name, err)
	}
	return review.Status.Allowed && !review.Status.Denied, review.Status.Reason + review.Status.EvaluationError, nil
}

func extra(from map[string]authenticationv1.ExtraValue) map[string]authorizationv1.ExtraValue {
	if from == nil {
		return nil
	}
	to := make(map[string]authorizationv1.ExtraValue, len(from))
	for k, v := range from {
		to[k] = authorizationv1.ExtraValue(v)
	}
	return to
}

// memoryModes are the values of the annotation that says when processes run.
var memoryModes = []string{"auto", "eager", "lazy"}

func checkMemory(pod *corev1.Pod) *apierrors.StatusError {
	mode, asked := pod.Annotations[checkpointv1alpha1.AnnotationRestoreMemory]
	if !asked || slices.Contains(memoryModes, mode) {
		return nil
	}
	path := field.NewPath("metadata", "annotations").Key(checkpointv1alpha1.AnnotationRestoreMemory)
	return apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("Pod").GroupKind(), displayName(pod), field.ErrorList{field.NotSupported(path, mode, memoryModes)})
}

// checkName refuses what cannot be an object's name, such as one with a
// namespace in it: only checkpoints of the Pod's own namespace can be named.
func checkName(pod *corev1.Pod, name string) *apierrors.StatusError {
	problems := validation.IsDNS1123Subdomain(name)
	if len(problems) == 0 {
		return nil
	}
	path := field.NewPath("metadata", "annotations").Key(checkpointv1alpha1.AnnotationRestoreFrom)
	return apierrors.NewInvalid(corev1.SchemeGroupVersion.WithKind("Pod").GroupKind(), displayName(pod),
		field.ErrorList{field.Invalid(path, name, "is the name of a PodCheckpoint in the Pod's namespace: "+strings.Join(problems, "; "))})
}
