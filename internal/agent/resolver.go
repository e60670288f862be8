package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/hooks"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/placement"
	"podstasis.dev/stasis/internal/platform"
	"podstasis.dev/stasis/internal/podtemplate"
	"podstasis.dev/stasis/internal/restoring"
)

// maxDifferences is how many fields a mismatch names.
const maxDifferences = 5

// resolver answers which checkpoint a Pod's sandbox is made from. It repeats
// what admission checked (P23), on objects that it reads from the API server for
// each question: what the sandbox's annotations say is only where to look.
type resolver struct {
	nodeName string
	live     client.Reader
	store    *store
	copies   *copies
	marker   *marker
	platform platform.Description // of this node
}

var _ restoring.Resolver = (*resolver)(nil)

func deny(reason, format string, args ...any) *nodeapi.Error {
	return &nodeapi.Error{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// Resolve implements restoring.Resolver.
func (r *resolver) Resolve(ctx context.Context, sandbox nodeapi.Sandbox) (restoring.Source, error) {
	pod, err := r.pod(ctx, sandbox)
	if err != nil {
		return restoring.Source{}, err
	}
	source, err := r.resolve(ctx, sandbox, pod)
	if v1alpha1.AwaitsMemory(pod) && (err != nil || !source.Partial) {
		err = errors.Join(err, r.letGo(ctx, pod))
	}
	return source, err
}

func (r *resolver) resolve(ctx context.Context, sandbox nodeapi.Sandbox, pod *corev1.Pod) (restoring.Source, error) {
	again, err := r.store.wasRestored(pod.UID)
	if err != nil {
		return restoring.Source{}, fmt.Errorf("find out whether the Pod has been restored before: %w", err)
	}
	if again {
		return restoring.Source{Ordinary: true}, nil
	}
	pcp, err := r.checkpoint(ctx, pod)
	if err != nil {
		return restoring.Source{}, err
	}
	if err := complete(pcp); err != nil {
		return restoring.Source{}, err
	}
	if differences := podtemplate.Compare(pcp.Status.CheckpointedPodTemplate, pod); len(differences) > 0 {
		var told []string
		for _, d := range differences[:min(len(differences), maxDifferences)] {
			told = append(told, d.Error())
		}
		if more := len(differences) - len(told); more > 0 {
			told = append(told, fmt.Sprintf("and %d more", more))
		}
		return restoring.Source{}, deny(v1alpha1.EventPodSpecMismatch, "the Pod is not as it was checkpointed by PodCheckpoint %s: %s", pcp.Name, strings.Join(told, "; "))
	}
	if err := r.besideItsSource(ctx, pod, pcp); err != nil {
		return restoring.Source{}, err
	}
	// The sandbox's are what is run; one that was changed since its admission is seen here.
	if err := hooks.Check(sandbox.Annotations, runnable(pod)); err != nil {
		return restoring.Source{}, deny(v1alpha1.EventRestoreFailed, "the Pod asks for hooks that cannot be run: %v", err)
	}
	dir, partial, err := r.data(ctx, pcp, pod)
	if err == nil && partial {
		err = r.keepNeeded(ctx, pcp, pod)
	}
	if err != nil {
		return restoring.Source{}, err
	}
	return restoring.Source{Dir: dir, Partial: partial, ManifestDigest: pcp.Status.ManifestDigest, CompletedInit: completedInit(pcp), Together: together(pod), HoldUp: holdsUpWhole(pod)}, nil
}

// pod re-reads the Pod that the sandbox is for, and makes sure that admission
// saw it: only admission and the controller write the pin.
func (r *resolver) pod(ctx context.Context, sandbox nodeapi.Sandbox) (*corev1.Pod, error) {
	name := sandbox.Namespace + "/" + sandbox.Name
	var pod corev1.Pod
	err := r.live.Get(ctx, types.NamespacedName{Namespace: sandbox.Namespace, Name: sandbox.Name}, &pod)
	if apierrors.IsNotFound(err) {
		return nil, deny(v1alpha1.EventRestoreFailed, "the API server has no Pod %s; static Pods cannot be restored", name)
	} else if err != nil {
		return nil, deny(v1alpha1.EventRestoreFailed, "Pod %s could not be read from the API server: %v", name, err)
	}
	switch why := notFromAPI(&pod); {
	case why != "":
		return nil, deny(v1alpha1.EventRestoreFailed, "Pod %s is a %s; those cannot be restored", name, why)
	case string(pod.UID) != sandbox.UID || sandbox.UID == "":
		return nil, deny(v1alpha1.EventRestoreFailed, "the sandbox is of Pod %s with UID %q, the API server has UID %q", name, sandbox.UID, pod.UID)
	case pod.DeletionTimestamp != nil:
		return nil, deny(v1alpha1.EventRestoreFailed, "Pod %s is being deleted", name)
	case pod.Spec.NodeName != r.nodeName:
		return nil, deny(v1alpha1.EventCheckpointWrongNode, "Pod %s is bound to node %q, this is node %q", name, pod.Spec.NodeName, r.nodeName)
	}
	for _, annotation := range []string{v1alpha1.AnnotationRestoreFrom, v1alpha1.AnnotationRestoreFromUID} {
		if pod.Annotations[annotation] == "" {
			return nil, deny(v1alpha1.EventRestoreFailed, "Pod %s has no annotation %s, which admission sets: it was not admitted as a restore; delete it and create it again with Stasis' webhooks running", name, annotation)
		}
		if pod.Annotations[annotation] != sandbox.Annotations[annotation] {
			return nil, deny(v1alpha1.EventRestoreFailed, "annotation %s of Pod %s is %q in the API and %q in the sandbox", annotation, name, pod.Annotations[annotation], sandbox.Annotations[annotation])
		}
	}
	if pod.Annotations[v1alpha1.AnnotationRestoreTicket] != "" {
		return nil, deny(v1alpha1.EventRestoreFailed, "Pod %s has the annotation %s, which is not for Pods", name, v1alpha1.AnnotationRestoreTicket)
	}
	return &pod, nil
}

// checkpoint reads the PodCheckpoint that the Pod is pinned to, and makes sure
// that it can be restored here.
func (r *resolver) checkpoint(ctx context.Context, pod *corev1.Pod) (*v1alpha1.PodCheckpoint, error) {
	name := pod.Annotations[v1alpha1.AnnotationRestoreFrom]
	pin := pod.Annotations[v1alpha1.AnnotationRestoreFromUID]
	var pcp v1alpha1.PodCheckpoint
	err := r.live.Get(ctx, types.NamespacedName{Namespace: pod.Namespace, Name: name}, &pcp)
	if apierrors.IsNotFound(err) {
		return nil, deny(v1alpha1.EventCheckpointNotReady, "PodCheckpoint %s/%s does not exist", pod.Namespace, name)
	} else if err != nil {
		return nil, deny(v1alpha1.EventRestoreFailed, "PodCheckpoint %s/%s could not be read from the API server: %v", pod.Namespace, name, err)
	}
	switch {
	case string(pcp.UID) != pin:
		return nil, deny(v1alpha1.EventCheckpointNotReady, "PodCheckpoint %s has UID %s, the Pod was admitted for UID %s: that one is gone and the one of its name is another; create the Pod again to restore it", name, pcp.UID, pin)
	case pcp.DeletionTimestamp != nil:
		return nil, deny(v1alpha1.EventCheckpointNotReady, "PodCheckpoint %s is being deleted", name)
	case !ready(&pcp):
		why := "nothing has been done for it yet"
		if c := readyCondition(&pcp); c != nil {
			why = c.Reason + ": " + c.Message
		}
		return nil, deny(v1alpha1.EventCheckpointNotReady, "PodCheckpoint %s is not Ready (%s)", name, why)
	case pcp.Status.ManifestDigest == "":
		return nil, deny(v1alpha1.EventCheckpointDataCorrupt, "PodCheckpoint %s does not tell its manifest's digest, its data cannot be checked", name)
	}
	return &pcp, nil
}

// data finds the checkpoint's directory: the one that was written here, or a copy of
// another node's, which is fetched if it is not here. partial says that memory of it is
// still to come.
func (r *resolver) data(ctx context.Context, pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod) (dir string, partial bool, err error) {
	if pcp.Status.NodeName == r.nodeName {
		dir, err = r.locate(pcp)
		return dir, false, err
	}
	requires, told := placement.Requirements(pcp)
	if !told {
		return "", false, deny(v1alpha1.EventCheckpointWrongNode, "the data of PodCheckpoint %s are on node %q, this is node %q, and the checkpoint does not say what CPU and kernel it needs", pcp.Name, pcp.Status.NodeName, r.nodeName)
	}
	if why := platform.Obstacles(requires, r.platform); len(why) > 0 {
		return "", false, deny(v1alpha1.EventCheckpointWrongNode, "PodCheckpoint %s cannot be restored on node %q, which %s", pcp.Name, r.nodeName, strings.Join(why, " and "))
	}
	mode := pages.ModeEager
	if runsEarly(pod) {
		mode = pages.ModeLazy
	}
	return r.copies.need(ctx, pcp, pod, mode)
}

// complete says whether the checkpoint holds every container that a Pod made
// from it would run; one of some containers is for forensics.
func complete(pcp *v1alpha1.PodCheckpoint) error {
	template := pcp.Status.CheckpointedPodTemplate
	if template == nil {
		return deny(v1alpha1.EventPodSpecMismatch, "PodCheckpoint %s holds no Pod template to compare with", pcp.Name)
	}
	held := map[string]bool{}
	for _, list := range [][]v1alpha1.PodCheckpointContainerStatus{pcp.Status.CheckpointedContainers, pcp.Status.CheckpointedInitContainers} {
		for _, c := range list {
			held[c.Name] = true
		}
	}
	var missing []string
	for _, c := range slices.Concat(template.Spec.InitContainers, template.Spec.Containers) {
		if !held[c.Name] {
			missing = append(missing, c.Name)
		}
	}
	if len(missing) > 0 {
		return deny(v1alpha1.EventPodSpecMismatch, "PodCheckpoint %s is of some of the Pod's containers only (not of %s) and cannot be restored as a Pod", pcp.Name, strings.Join(missing, ", "))
	}
	return nil
}

// completedInit names the init containers that had completed: those of the
// checkpoint that are not sidecars.
func completedInit(pcp *v1alpha1.PodCheckpoint) []string {
	var names []string
	for _, c := range pcp.Status.CheckpointedInitContainers {
		sidecar := slices.ContainsFunc(pcp.Status.CheckpointedPodTemplate.Spec.InitContainers, func(t corev1.Container) bool {
			return t.Name == c.Name && restartable(&t)
		})
		if !sidecar {
			names = append(names, c.Name)
		}
	}
	return names
}

// together names the containers that can be let go at the start of the last one:
// all but those whose start the kubelet waits for before it starts the next.
func together(pod *corev1.Pod) []string {
	var names []string
	for _, c := range pod.Spec.InitContainers {
		if restartable(&c) && c.StartupProbe == nil && !hasPostStart(&c) {
			names = append(names, c.Name)
		}
	}
	for _, c := range pod.Spec.Containers {
		if !hasPostStart(&c) {
			names = append(names, c.Name)
		}
	}
	return names
}

func hasPostStart(c *corev1.Container) bool {
	return c.Lifecycle != nil && c.Lifecycle.PostStart != nil
}

// locate finds the checkpoint's directory beneath the root. The path in the
// status is not trusted: it has to be the one that this object's data have.
func (r *resolver) locate(pcp *v1alpha1.PodCheckpoint) (string, error) {
	where := pcp.Status.CheckpointLocation
	if where == nil || where.Type != v1alpha1.CheckpointSourceTypeNodeLocal || where.NodeLocal == nil {
		return "", deny(v1alpha1.EventCheckpointDataMissing, "PodCheckpoint %s tells no location of its data on a node", pcp.Name)
	}
	dir, err := r.store.locate(where.NodeLocal.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", deny(v1alpha1.EventCheckpointDataMissing, "the data of PodCheckpoint %s are not on node %s any more (%s)", pcp.Name, r.nodeName, where.NodeLocal.Path)
	} else if err != nil {
		return "", deny(v1alpha1.EventCheckpointDataMissing, "the data of PodCheckpoint %s: %v", pcp.Name, err)
	}
	if own := dataName(pcp.Namespace, pcp.Name, pcp.UID); where.NodeLocal.Path != own {
		return "", deny(v1alpha1.EventCheckpointDataMissing, "PodCheckpoint %s says that its data are in %q; its own would be in %q", pcp.Name, where.NodeLocal.Path, own)
	}
	return dir, nil
}
