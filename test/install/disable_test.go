package install

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
)

const crd = "podcheckpoints.checkpoint.podstasis.dev"

// dataOfAll lists every file of every checkpoint with its digest.
const dataOfAll = "cd /var/lib/stasis/checkpoints && find . -type f -exec sha256sum {} + | sort -k2"

// disabled takes everything but the API away and brings it back (P33).
func disabled(t *testing.T, s *story) {
	ready(t)
	kubectl(t, "create", "namespace", "leaving")
	kubectl(t, "-n", "leaving", "apply", "-f", "config/samples/pod.yaml")
	kubectl(t, "apply", "-f", "config/samples/pod.yaml")
	for _, of := range []string{namespace, "leaving"} {
		kubectl(t, "-n", of, "wait", "--for=condition=Ready", "pod/counter", "--timeout=90s")
		kubectl(t, "-n", of, "apply", "-f", "config/samples/podcheckpoint.yaml")
		kubectl(t, "-n", of, "wait", "--for=condition=Ready", "podcheckpoint/counter-1", "--timeout=90s")
	}
	create(t, "unwanted", "counter")
	kubectl(t, "wait", "--for=condition=Ready", "podcheckpoint/unwanted", "--timeout=90s")
	kubectl(t, "apply", "-f", "config/samples/restored-pod.yaml")
	kubectl(t, "wait", "--for=condition=Ready", "-f", "config/samples/restored-pod.yaml", "--timeout=90s")
	kubectl(t, "create", "rolebinding", "sees", "--clusterrole=stasis-viewer", "--user=vera")
	seen(t)
	kept, data, pid := get(t, "counter-1"), onNode(t, dataOfAll), containerdPID(t)

	tr := ordinaryPods(t, "disabled")
	inTheFreeze(t, "under-way", "true")
	kubectl(t, "delete", "-k", "config/default", "--timeout=180s")
	if diff := cmp.Diff(kept, get(t, "counter-1")); diff != "" {
		t.Errorf("a PodCheckpoint changed (-before +after):\n%s", diff)
	}
	if gone := missing(data, onNode(t, dataOfAll)); gone != "" {
		t.Errorf("data are gone:\n%s", gone)
	}
	for _, goes := range []string{"counter", "counter-restored"} {
		goesOn(t, goes, "a")
	}
	goesOn(t, "big", "tick")
	if _, err := it.Kubectl(t.Context(), "delete", "crd", crd); err == nil || !strings.Contains(err.Error(), "deletes every PodCheckpoint") {
		t.Errorf("the CRD was deleted by mistake: %v", err)
	}
	if out, err := it.Kubectl(t.Context(), "apply", "-f", "config/samples/restored-pod.yaml", "--dry-run=server"); err != nil {
		t.Errorf("a restored Pod cannot be applied again: %s%v", out, err)
	}
	eventually(t, "a Pod that asks to be restored is refused", func() error { // the API server forgets the webhooks in a moment
		_, err := it.Kubectl(t.Context(), "create", "-f", again(t))
		if err == nil {
			t.Fatal("a Pod that asks to be restored was made")
		}
		if !strings.Contains(err.Error(), "Stasis does not run in this cluster") {
			return err
		}
		return nil
	})
	// What is deleted meanwhile waits, for the node still has the data.
	kubectl(t, "delete", "podcheckpoint", "unwanted", "--wait=false")
	kubectl(t, "delete", "namespace", "leaving", "--wait=false")
	eventually(t, "the namespace waits for its PodCheckpoint alone", func() error {
		out := kubectl(t, "get", "namespace", "leaving", "-o", `jsonpath={.status.conditions[?(@.type=="NamespaceFinalizersRemaining")].message}`)
		if !strings.Contains(out, v1alpha1.FinalizerData+" in 1 resource instances") || strings.Contains(kubectl(t, "-n", "leaving", "get", "pods", "-o", "name"), "pod/") {
			return fmt.Errorf("it says %q", out)
		}
		return nil
	})
	if get(t, "unwanted").DeletionTimestamp == nil {
		t.Error("PodCheckpoint unwanted is not being deleted")
	}

	kubectl(t, "apply", "-k", "config/install")
	kubectl(t, "-n", "stasis-system", "rollout", "status", "deployment", "stasis-controller", "--timeout=180s")
	ready(t)
	undisturbed(t, s.ordinary, tr.end(t, len(s.ordinary)))
	if now := containerdPID(t); now != pid {
		t.Errorf("containerd was restarted: process %s, was %s", now, pid)
	}
	eventually(t, "what was deleted meanwhile is gone", func() error {
		object := &corev1.Namespace{}
		if err := it.Get(t.Context(), client.ObjectKey{Name: "leaving"}, object); !apierrors.IsNotFound(err) {
			return fmt.Errorf("namespace leaving: %v", err)
		}
		if err := it.Get(t.Context(), client.ObjectKey{Namespace: namespace, Name: "unwanted"}, &v1alpha1.PodCheckpoint{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("PodCheckpoint unwanted: %v", err)
		}
		return nil
	})
	if c := outcome(t, "under-way"); c.Status != metav1.ConditionTrue {
		t.Errorf("the checkpoint that was under way ended with %s: %s", c.Reason, c.Message)
	}
	asBefore(t, kept, data)
}

// asBefore checks that a checkpoint is what it was, and that it and only it and
// the one that was under way have data.
func asBefore(t *testing.T, kept *v1alpha1.PodCheckpoint, data string) {
	t.Helper()
	if diff := cmp.Diff(kept, get(t, kept.Name)); diff != "" {
		t.Errorf("PodCheckpoint %s changed (-before +after):\n%s", kept.Name, diff)
	}
	now := onNode(t, dataOfAll)
	for line := range strings.Lines(data) {
		whose := kept.Status.CheckpointLocation.NodeLocal.Path
		if is := strings.Contains(now, line); is != strings.Contains(line, whose) {
			t.Errorf("there: %t: %s", is, line)
		}
	}
	goesOn(t, "counter-restored", "a")
	seen(t)
	kubectl(t, "apply", "-f", again(t))
	kubectl(t, "wait", "--for=condition=Ready", "pod/counter-again", "--timeout=90s")
	if first, _, _ := strings.Cut(kubectl(t, "logs", "counter-again", "-c", "a"), "\n"); first == "a=1" || !strings.HasPrefix(first, "a=") {
		t.Errorf("the restored Pod begins with %q", first)
	}
	kubectl(t, "delete", "pods", "counter", "counter-again", "counter-restored", "--timeout=60s")
	kubectl(t, "delete", "podcheckpoints", "--all", "--timeout=60s")
}

// again is a file with the manifest of another restored Pod.
func again(t *testing.T) string {
	t.Helper()
	manifest, err := os.ReadFile("config/samples/restored-pod.yaml")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "again.yaml")
	if err := os.WriteFile(path, bytes.ReplaceAll(manifest, []byte("counter-restored"), []byte("counter-again")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// seen checks that a user sees PodCheckpoints by the role that was bound.
func seen(t *testing.T) {
	t.Helper()
	vera, err := it.As("vera")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "a user sees PodCheckpoints", func() error {
		return vera.List(t.Context(), &v1alpha1.PodCheckpointList{}, client.InNamespace(namespace))
	})
}

// missing lists the lines that a text has no more.
func missing(before, now string) string {
	lost := slices.Collect(strings.Lines(before))
	return strings.Join(slices.DeleteFunc(lost, func(line string) bool { return strings.Contains(now, line) }), "")
}
