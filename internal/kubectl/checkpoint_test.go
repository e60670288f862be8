package kubectl

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

func only(t *testing.T, c client.Client) *checkpointv1alpha1.PodCheckpoint {
	t.Helper()
	var list checkpointv1alpha1.PodCheckpointList
	if err := c.List(t.Context(), &list); err != nil {
		t.Fatal(err)
	}
	if len(list.Items) != 1 {
		t.Fatalf("%d PodCheckpoints exist, want 1", len(list.Items))
	}
	return &list.Items[0]
}

func wantAll(t *testing.T, what, text string, wanted ...string) {
	t.Helper()
	for _, want := range wanted {
		if !strings.Contains(text, want) {
			t.Errorf("%s lacks %q:\n%s", what, want, text)
		}
	}
}

func wantCode(t *testing.T, got result, want int) {
	t.Helper()
	if got.code != want {
		t.Fatalf("exit code %d, want %d\nout: %s\nerr: %s", got.code, want, got.out, got.err)
	}
}

func TestCheckpointWaitsAndSaysNodeLocationSizeAndFreezeTime(t *testing.T) {
	for _, way := range []struct {
		name        string
		forbidWatch bool
	}{{"watching", false}, {"polling, where the user may not watch", true}} {
		t.Run(way.name, func(t *testing.T) {
			c := newCluster(t, agent(t, completed), way.forbidWatch, sourcePod())
			got := runCheckpoint(t, c, "web", "--name", "web-00001", "--timeout", "30s", "--option", "a=b=c")
			wantCode(t, got, ExitOK)
			wantAll(t, "standard output", got.out, "podcheckpoint/web-00001 ready", "node-1", "NodeLocal team-a_web-1_uid",
				"12.0 MiB (12582912 bytes)", "143ms", "kubectl restore web-00001")
			wantAll(t, "standard error", got.err, "podcheckpoint web-00001 created", "completed")

			spec := only(t, c).Spec
			if spec.SourcePodName != "web" || spec.SourcePodUID == nil || *spec.SourcePodUID != "source-uid" {
				t.Errorf("the source Pod is not pinned: %+v", spec)
			}
			if spec.TimeoutSeconds == nil || *spec.TimeoutSeconds != 30 || spec.Options["a"] != "b=c" {
				t.Errorf("spec %+v, want timeout 30 and option a", spec)
			}
		})
	}
}

func TestCheckpointThatFailedExits1WithItsReason(t *testing.T) {
	failed := func(checkpoint *checkpointv1alpha1.PodCheckpoint) {
		setReady(checkpoint, metav1.ConditionFalse, checkpointv1alpha1.ReasonCheckpointFailed, "io_uring is in use by pid 7")
	}
	got := runCheckpoint(t, newCluster(t, agent(t, failed), false, sourcePod()), "pod/web")
	wantCode(t, got, ExitFailed)
	wantAll(t, "standard error", got.err, "error: ", "CheckpointFailed: io_uring is in use by pid 7")
	if got.out != "" {
		t.Errorf("standard output of a failure: %q", got.out)
	}
}

// following is a checkpoint command that waits.
func following(c client.WithWatch) *checkpointOptions {
	env, _, _ := testEnvironment(c)
	none := dryRunNone
	return &checkpointOptions{environment: env, output: newOutput(&cobra.Command{}, "created"), pod: "web", wait: true, dryRun: &none}
}

func TestCheckpointStillInProgressAtTheEndOfTheWaitExits3(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, agent(t, nil), false, sourcePod())
		o := following(c)
		o.timeout, o.grace = time.Second, -500*time.Millisecond
		err := o.run(t.Context())
		if ExitCode(err) != ExitInProgress || !strings.Contains(err.Error(), "goes on") {
			t.Errorf("error %v has exit code %d, want %d", err, ExitCode(err), ExitInProgress)
		}
	})
}

func TestCheckpointInterruptedExits130AndSaysThatItGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, agent(t, nil), false, sourcePod())
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		o := following(c)
		err := o.run(ctx)
		if ExitCode(err) != ExitInterrupted || !strings.Contains(err.Error(), "goes on") {
			t.Errorf("error %v has exit code %d, want %d", err, ExitCode(err), ExitInterrupted)
		}
	})
}

func TestCheckpointOfNoSuchPodExits1AndCreatesNothing(t *testing.T) {
	c := newCluster(t, nil, false)
	got := runCheckpoint(t, c, "web")
	wantCode(t, got, ExitFailed)
	wantAll(t, "standard error", got.err, `pods "web" not found`)
	var list checkpointv1alpha1.PodCheckpointList
	if err := c.List(t.Context(), &list); err != nil || len(list.Items) != 0 {
		t.Errorf("%d PodCheckpoints were created (%v)", len(list.Items), err)
	}
}

func TestCheckpointOfSomeContainersTakesOnlyThoseThatThePodHas(t *testing.T) {
	c := newCluster(t, agent(t, completed), false, sourcePod())
	got := runCheckpoint(t, c, "web", "-c", "setup")
	wantCode(t, got, ExitFailed)
	wantAll(t, "standard error", got.err, `no container "setup"`, "proxy, app, log")

	got = runCheckpoint(t, c, "web", "-c", "app", "-c", "proxy", "-c", "app")
	wantCode(t, got, ExitOK)
	if names := strings.Join(only(t, c).Spec.Containers, ","); names != "app,proxy" {
		t.Errorf("containers %s, want app,proxy", names)
	}
	if strings.Contains(got.out, "kubectl restore") {
		t.Errorf("a checkpoint of some containers is offered for restoring:\n%s", got.out)
	}
}

func TestCheckpointPrintsOneObjectInTheFormAskedFor(t *testing.T) {
	got := runCheckpoint(t, newCluster(t, agent(t, completed), false, sourcePod()), "web", "-o", "json")
	wantCode(t, got, ExitOK)
	var checkpoint checkpointv1alpha1.PodCheckpoint
	if err := json.Unmarshal([]byte(got.out), &checkpoint); err != nil {
		t.Fatalf("standard output is not one JSON object: %v\n%s", err, got.out)
	}
	if checkpoint.Kind != "PodCheckpoint" || checkpoint.Status.NodeName != "node-1" {
		t.Errorf("kind %q, node %q", checkpoint.Kind, checkpoint.Status.NodeName)
	}
	got = runCheckpoint(t, newCluster(t, agent(t, completed), false, sourcePod()), "web", "--name", "web-00001", "-o", "name")
	if want := "podcheckpoint.checkpoint.podstasis.dev/web-00001\n"; got.out != want {
		t.Errorf("-o name printed %q, want %q", got.out, want)
	}
}

func TestCheckpointWithoutWaitingReturnsAtOnce(t *testing.T) {
	got := runCheckpoint(t, newCluster(t, nil, false, sourcePod()), "web", "--wait=false", "--name", "mine")
	wantCode(t, got, ExitOK)
	if want := "podcheckpoint.checkpoint.podstasis.dev/mine created\n"; got.out != want {
		t.Errorf("printed %q, want %q", got.out, want)
	}
}

func TestCheckpointDryRunStoresNothing(t *testing.T) {
	for mode, want := range map[string]int{"server": 1, "client": 0} {
		c := newCluster(t, nil, false, sourcePod())
		got := runCheckpoint(t, c, "web", "--dry-run="+mode)
		wantCode(t, got, ExitOK)
		wantAll(t, "standard output", got.out, "dry run)")
		if c.dryRuns != want {
			t.Errorf("--dry-run=%s sent %d dry-run requests, want %d", mode, c.dryRuns, want)
		}
		var list checkpointv1alpha1.PodCheckpointList
		if err := c.List(t.Context(), &list); err != nil || len(list.Items) != 0 {
			t.Errorf("--dry-run=%s stored %d PodCheckpoints (%v)", mode, len(list.Items), err)
		}
	}
}

func TestWrongCommandLinesExit2AndSendNothing(t *testing.T) {
	for _, args := range [][]string{
		{}, {"a", "b"}, {"deployment/web"}, {"pod/"}, {"web", "--dry-run=maybe"}, {"web", "--option", "x"},
		{"web", "--option", "x=1", "--option", "x=2"}, {"web", "--timeout", "1500ms"}, {"web", "--timeout", "2h"},
		{"web", "--no-such-flag"}, {"web", "-o", "xml"},
	} {
		if got := runCheckpoint(t, nil, args...); got.code != ExitUsage || !strings.Contains(got.err, "--help") {
			t.Errorf("checkpoint %q: exit code %d, want %d\n%s", args, got.code, ExitUsage, got.err)
		}
	}
	for _, args := range [][]string{{}, {"a", "b"}, {"pod/web"}, {"web-1", "--timeout", "0s"}, {"web-1", "-o", "xml"}, {"web-1", "--dry-run=maybe"}} {
		if got := runRestore(t, nil, args...); got.code != ExitUsage || !strings.Contains(got.err, "--help") {
			t.Errorf("restore %q: exit code %d, want %d\n%s", args, got.code, ExitUsage, got.err)
		}
	}
}

func TestEveryStateOfACheckpointIsAStepOfItsOwn(t *testing.T) {
	var out strings.Builder
	p := newProgress(&out, time.Now)
	checkpoint := &checkpointv1alpha1.PodCheckpoint{}
	checkpoint.Spec.NodeName = "node-1"
	showCheckpoint(p, checkpoint)
	setReady(checkpoint, metav1.ConditionFalse, checkpointv1alpha1.ReasonCheckpointInProgress, "")
	showCheckpoint(p, checkpoint)
	completed(checkpoint)
	showCheckpoint(p, checkpoint)
	wantAll(t, "progress", out.String(), "waiting for the agent of node-1", "in progress on node-1", "completed")
}
