package kubectl

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func onlyPod(t *testing.T, c client.Client) *corev1.Pod {
	t.Helper()
	var list corev1.PodList
	if err := c.List(t.Context(), &list); err != nil {
		t.Fatal(err)
	}
	if len(list.Items) != 1 {
		t.Fatalf("%d Pods exist, want 1", len(list.Items))
	}
	return &list.Items[0]
}

func TestRestoreCreatesThePodOfTheTemplateAndWaitsUntilItIsReady(t *testing.T) {
	c := newCluster(t, kubelet(t, makeReady), false, readyCheckpoint())
	got := runRestore(t, c, "web-1", "--as", "web-2")
	wantCode(t, got, ExitOK)
	wantAll(t, "standard output", got.out, "pod/web-2 ready", "node-1", "web-1 of pod web", "Restored in", "ms")

	pod := onlyPod(t, c)
	if pod.Annotations[checkpointv1alpha1.AnnotationRestoreFrom] != "web-1" || pod.Annotations["note"] != "kept" {
		t.Errorf("annotations %v", pod.Annotations)
	}
	if _, pinned := pod.Annotations[checkpointv1alpha1.AnnotationRestoreFromUID]; pinned {
		t.Error("the Pod carries the pin of another restore, which only admission may write")
	}
	if pod.Labels["app"] != "web" || pod.Labels["pod-template-hash"] != "" || len(pod.OwnerReferences) != 0 {
		t.Errorf("labels %v, owners %v: want the Pod's own labels and nobody's Pod", pod.Labels, pod.OwnerReferences)
	}
	if pod.Spec.RuntimeClassName != nil || len(pod.Spec.Containers) != 2 {
		t.Errorf("spec %+v", pod.Spec)
	}
}

func TestRestoreNamesThePodAfterTheCheckpoint(t *testing.T) {
	c := newCluster(t, kubelet(t, makeReady), false, readyCheckpoint())
	got := runRestore(t, c, "podcheckpoint/web-1", "-o", "name")
	wantCode(t, got, ExitOK)
	if got.out != "pod/web-1-00001\n" {
		t.Errorf("printed %q", got.out)
	}
}

func TestRestoreWaitsForACheckpointThatIsStillBeingTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		checkpoint := readyCheckpoint()
		setReady(checkpoint, metav1.ConditionFalse, checkpointv1alpha1.ReasonCheckpointInProgress, "")
		c := newCluster(t, kubelet(t, makeReady), false, checkpoint)
		go func() {
			time.Sleep(200 * time.Millisecond)
			var now checkpointv1alpha1.PodCheckpoint
			if err := c.Get(context.Background(), client.ObjectKeyFromObject(checkpoint), &now); err != nil {
				t.Error(err)
			}
			completed(&now)
			if err := c.Status().Update(context.Background(), &now); err != nil {
				t.Error(err)
			}
		}()
		got := runRestore(t, c, "web-1")
		wantCode(t, got, ExitOK)
		wantAll(t, "standard error", got.err, "waiting for podcheckpoint web-1: CheckpointInProgress", "created from podcheckpoint web-1")
	})
}

func TestRestoreOfWhatCannotBeRestoredExits1AndCreatesNothing(t *testing.T) {
	failed, partial, busy := readyCheckpoint(), readyCheckpoint(), readyCheckpoint()
	setReady(failed, metav1.ConditionFalse, checkpointv1alpha1.ReasonCheckpointFailed, "no space left")
	partial.Spec.Containers = []string{"app"}
	setReady(busy, metav1.ConditionFalse, checkpointv1alpha1.ReasonCheckpointInProgress, "")
	for _, way := range []struct {
		name    string
		objects []client.Object
		args    []string
		want    string
	}{
		{"no such checkpoint", nil, nil, `"web-1" not found`},
		{"failed checkpoint", []client.Object{failed}, nil, "CheckpointFailed: no space left"},
		{"checkpoint of some containers", []client.Object{partial}, nil, "some containers"},
		{"not ready and not waiting", []client.Object{busy}, []string{"--wait=false"}, "not ready: CheckpointInProgress"},
		{"not ready and only trying", []client.Object{busy}, []string{"--dry-run=server"}, "not ready: CheckpointInProgress"},
	} {
		t.Run(way.name, func(t *testing.T) {
			c := newCluster(t, nil, false, way.objects...)
			got := runRestore(t, c, append([]string{"web-1"}, way.args...)...)
			wantCode(t, got, ExitFailed)
			wantAll(t, "standard error", got.err, way.want)
			var list corev1.PodList
			if err := c.List(t.Context(), &list); err != nil || len(list.Items) != 0 {
				t.Errorf("%d Pods were created (%v)", len(list.Items), err)
			}
		})
	}
}

func TestRestoreThatTheNodeRefusesExits1WithTheReason(t *testing.T) {
	c := newCluster(t, kubelet(t, warn(t, checkpointv1alpha1.EventCheckpointDataCorrupt, "containers/app/pages-1.img differs")), false, readyCheckpoint())
	got := runRestore(t, c, "web-1", "--as", "web-2", "--timeout", "10s")
	wantCode(t, got, ExitFailed)
	wantAll(t, "standard error", got.err, "CheckpointDataCorrupt: containers/app/pages-1.img differs", "kubectl delete pod web-2 -n team-a")
}

func TestRestoreWaitsThroughRefusalsThatPassByThemselvesAndExits3(t *testing.T) {
	c := newCluster(t, kubelet(t, warn(t, checkpointv1alpha1.EventRestoreInProgress, "another restore of team-a/web-2 is not over")), false, readyCheckpoint())
	got := runRestore(t, c, "web-1", "--as", "web-2", "--timeout", "800ms")
	wantCode(t, got, ExitInProgress)
	wantAll(t, "standard error", got.err, "RestoreInProgress: another restore", "timed out")
}

func TestRestoreThatStartedAnewInsteadOfContinuingExits1(t *testing.T) {
	c := newCluster(t, kubelet(t, func(c client.Client, pod *corev1.Pod) {
		makeReady(c, pod)
		pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", RestartCount: 1}}
	}), false, readyCheckpoint())
	got := runRestore(t, c, "web-1")
	wantCode(t, got, ExitFailed)
	wantAll(t, "standard error", got.err, "did not continue", "app")
}

func TestRestoreOfAPodDeletedMeanwhileExits1(t *testing.T) {
	c := newCluster(t, kubelet(t, func(c client.Client, pod *corev1.Pod) {
		if err := c.Delete(context.Background(), pod); err != nil {
			t.Error(err)
		}
	}), false, readyCheckpoint())
	got := runRestore(t, c, "web-1")
	wantCode(t, got, ExitFailed)
	wantAll(t, "standard error", got.err, "was deleted")
}

func TestRestoreDryRunPrintsThePodAndStoresNothing(t *testing.T) {
	c := newCluster(t, nil, false, readyCheckpoint())
	got := runRestore(t, c, "web-1", "--as", "web-2", "--dry-run=server", "-o", "json")
	wantCode(t, got, ExitOK)
	var pod corev1.Pod
	if err := json.Unmarshal([]byte(got.out), &pod); err != nil || pod.Name != "web-2" || pod.Kind != "Pod" {
		t.Errorf("printed %q: %v", got.out, err)
	}
	var list corev1.PodList
	if err := c.List(t.Context(), &list); err != nil || len(list.Items) != 0 || c.dryRuns != 1 {
		t.Errorf("%d Pods stored, %d dry runs (%v)", len(list.Items), c.dryRuns, err)
	}
	if strings.Contains(got.err, "error") {
		t.Errorf("standard error: %s", got.err)
	}
}
