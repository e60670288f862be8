package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
)

// A Pod that runs before all its memory is on its node needs its PodCheckpoint until then,
// and says so itself, by the condition MemoryRestored: whoever is asked to delete the
// PodCheckpoint waits for that (P29). stasis-controller lists Pods. An agent does not; it
// takes note of those that it gives data to, and looks at them one by one.
//
// Nothing is lost between the two: the node that restores is known to the one that gives,
// then puts the condition on the Pod, and then looks whether the PodCheckpoint is being
// deleted. Who deletes it marks it first, and looks at the Pods then. One of them sees the
// other.

// neededDir names, one file for each, the Pods that may need a checkpoint of this node
// after they run: UID of the PodCheckpoint, a dot, UID of the Pod.
const neededDir = "needed"

// tellPatience is how long the node with the data may take to know who needs them.
const tellPatience = 5 * time.Second

// markNeeded takes note of a Pod before it is given anything.
func (s *store) markNeeded(pcp types.UID, pod types.NamespacedName, podUID types.UID) error {
	if err := errors.Join(validUID(pcp), validUID(podUID)); err != nil {
		return err
	}
	file := s.neededPath(pcp, podUID)
	if _, err := os.Lstat(file); err == nil {
		return nil
	}
	if err := checkpoint.WriteFile(file, []byte(pod.String()+"\n"), 0o600); err != nil {
		return fmt.Errorf("take note of a Pod that needs a checkpoint: %w", err)
	}
	return nil
}

func (s *store) neededPath(pcp, pod types.UID) string {
	return filepath.Join(s.dir, neededDir, string(pcp)+"."+string(pod))
}

// needs is a Pod that may need a checkpoint.
type needs struct {
	checkpoint, uid types.UID
	pod             types.NamespacedName
}

// needed lists them, of all checkpoints.
func (s *store) needed() (all []needs, err error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, neededDir))
	if err != nil {
		return nil, fmt.Errorf("list Pods that need checkpoints: %w", err)
	}
	for _, e := range entries {
		pcp, pod, ok := strings.Cut(e.Name(), ".")
		if !ok || validUID(types.UID(pcp)) != nil || validUID(types.UID(pod)) != nil {
			continue
		}
		data, err := os.ReadFile(filepath.Join(s.dir, neededDir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // forgotten meanwhile
		} else if err != nil {
			return nil, fmt.Errorf("list Pods that need checkpoints: %w", err)
		}
		if namespace, name, ok := strings.Cut(strings.TrimSpace(string(data)), "/"); ok {
			all = append(all, needs{types.UID(pcp), types.UID(pod), types.NamespacedName{Namespace: namespace, Name: name}})
		}
	}
	return all, nil
}

func (s *store) forgetNeeded(n needs) error {
	if err := os.Remove(s.neededPath(n.checkpoint, n.uid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// notLonger drops those of a checkpoint whose data are removed.
func (s *store) notLonger(pcp types.UID) error {
	all, err := s.needed()
	for _, n := range all {
		if n.checkpoint == pcp {
			err = errors.Join(err, s.forgetNeeded(n))
		}
	}
	return err
}

// runsEarly says whether a Pod may run before its memory is on its node: one that does not
// ask for it has all of it there first.
func runsEarly(pod *corev1.Pod) bool {
	mode, err := pages.ParseMode(pod.Annotations[v1alpha1.AnnotationRestoreMemory])
	return err == nil && mode == pages.ModeLazy
}

// awaiting is the Pod of a note; nil if it is gone.
func (r *reconciler) awaiting(ctx context.Context, n needs) (*corev1.Pod, error) {
	var pod corev1.Pod
	err := r.live.Get(ctx, n.pod, &pod)
	if apierrors.IsNotFound(err) || err == nil && pod.UID != n.uid {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("look at Pod %s, which was given data of a checkpoint: %w", n.pod, err)
	}
	return &pod, nil
}

// heldUp says for which Pod the data of a checkpoint stay; empty if for none.
func (r *reconciler) heldUp(ctx context.Context, pcp *v1alpha1.PodCheckpoint, dir string) (string, error) {
	here, err := r.users(dir)
	if err != nil {
		return "", fmt.Errorf("find out which checkpoints restores use: %w", err)
	}
	if len(here) > 0 && here[0].Restored {
		return fmt.Sprintf("Pod %q is still being given memory of it", here[0].Sandbox.Name), nil
	} else if len(here) > 0 {
		return fmt.Sprintf("Pod %q is being restored from it", here[0].Sandbox.Name), nil
	}
	all, err := r.store.needed()
	if err != nil {
		return "", err
	}
	for _, n := range all {
		if n.checkpoint != pcp.UID {
			continue
		}
		pod, err := r.awaiting(ctx, n)
		if err != nil {
			return "", err
		}
		if pod != nil && v1alpha1.AwaitsMemory(pod) {
			return fmt.Sprintf("Pod %q on node %q is still being given memory of it", pod.Name, pod.Spec.NodeName), nil
		}
	}
	return "", nil
}

// forgetNeeds drops the notes of Pods that need nothing any more, so that there are never
// many of a checkpoint that many Pods are restored from.
func (r *reconciler) forgetNeeds(ctx context.Context) error {
	all, err := r.store.needed()
	if err != nil {
		return err
	}
	for _, n := range all {
		pod, err := r.awaiting(ctx, n)
		if err != nil {
			return err
		}
		if pod != nil && (pod.Status.Phase == corev1.PodPending || pod.Status.Phase == "" || v1alpha1.AwaitsMemory(pod)) {
			continue
		}
		if err := r.store.forgetNeeded(n); err != nil {
			return fmt.Errorf("forget that Pod %s needed a checkpoint: %w", n.pod, err)
		}
	}
	return nil
}

// keepNeeded sees to it that a checkpoint stays until a Pod has all its memory, which is
// about to run without. An error says that it may not.
func (r *resolver) keepNeeded(ctx context.Context, pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod) error {
	if err := r.copies.tellOrigin(ctx, pcp, pod); err != nil {
		return err
	}
	err := r.marker.put(ctx, podRef{pod.Namespace, pod.Name, pod.UID}, v1alpha1.PodConditionMemoryRestored, corev1.ConditionFalse, v1alpha1.ReasonMemoryComing,
		fmt.Sprintf("Memory comes to node %s while the Pod runs; PodCheckpoint %s is needed until all has", r.nodeName, pcp.Name))
	if err != nil {
		return fmt.Errorf("the Pod would run before all its memory is here, and it could not be noted that PodCheckpoint %s is needed until then: %w", pcp.Name, err)
	}
	if _, err := r.checkpoint(ctx, pod); err != nil { // it is being deleted by now
		return errors.Join(err, r.letGo(ctx, pod))
	}
	return nil
}

// letGo takes the note off a Pod that was to run before all its memory was here, and does
// not: what was to become of it in an earlier sandbox is over.
func (r *resolver) letGo(ctx context.Context, pod *corev1.Pod) error {
	return r.marker.clear(ctx, podRef{pod.Namespace, pod.Name, pod.UID}, v1alpha1.PodConditionMemoryRestored)
}

// tellOrigin makes the node with the data of a checkpoint know that a Pod needs them, by
// asking it for a byte, unless it has given this Pod something already. Where they are in a
// store too that is enough, whoever is away.
func (c *copies) tellOrigin(ctx context.Context, pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod) error {
	if pcp.Status.Store != nil {
		return nil
	}
	c.mu.Lock()
	f := c.under[pcp.UID]
	c.mu.Unlock()
	if f != nil {
		if o, ok := f.origin.(knowingOrigin); ok && o.knows(pod.UID) {
			return nil
		}
	}
	from, err := c.origins.of(pcp, pod)
	if err != nil {
		return err
	}
	defer from.Close()
	ctx, cancel := context.WithTimeout(ctx, tellPatience)
	defer cancel()
	body, err := from.Open(ctx, checkpoint.ManifestName, 0, 1)
	if no := (*nodeapi.Error)(nil); errors.As(err, &no) {
		return no
	} else if err != nil {
		return deny(v1alpha1.EventCheckpointFetchFailed, "the Pod would run before all its memory is here, and %s, which is to keep PodCheckpoint %s until it is, does not answer: %v; it is tried again", from.Name(), pcp.Name, err)
	}
	return body.Close()
}

// MemoryEnded implements restoring.Observer.
func (o *observer) MemoryEnded(ctx context.Context, sandbox nodeapi.Sandbox, lost []string) error {
	if !hasPod(sandbox) {
		return nil
	}
	_, marker := o.connected()
	if marker == nil {
		return errUnconnected
	}
	status, reason, message := corev1.ConditionTrue, v1alpha1.ReasonMemoryRestored, "All memory is there; PodCheckpoint "+from(sandbox)+" is not needed any more"
	if len(lost) > 0 {
		status, reason = corev1.ConditionFalse, v1alpha1.ReasonMemoryLost
		message = "No more memory of PodCheckpoint " + from(sandbox) + " is to come; lost was that of the containers: " + strings.Join(lost, ", ")
	}
	return marker.put(ctx, refOf(sandbox), v1alpha1.PodConditionMemoryRestored, status, reason, message)
}
