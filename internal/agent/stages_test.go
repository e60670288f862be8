package agent

import (
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/engine"
)

func TestAStageOfACheckpointThatLastsIsToldAndNothingAfterItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		scheme := runtime.NewScheme()
		if err := v1alpha1.AddToScheme(scheme); err != nil {
			t.Fatal(err)
		}
		object := &v1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "c"}}
		c := fake.NewClientBuilder().WithScheme(scheme).WithStatusSubresource(object).WithObjects(object).Build()
		if err := c.Get(t.Context(), client.ObjectKeyFromObject(object), object); err != nil {
			t.Fatal(err)
		}
		message := func() string {
			var now v1alpha1.PodCheckpoint
			if err := c.Get(t.Context(), client.ObjectKeyFromObject(object), &now); err != nil {
				t.Fatal(err)
			}
			if ready := readyCondition(&now); ready != nil {
				return ready.Reason + ": " + ready.Message
			}
			return ""
		}
		var s stages
		teller := &stageTeller{client: c, log: slog.New(slog.NewTextHandler(io.Discard, nil)), now: time.Now}
		end := teller.follow(t.Context(), &s, "sandbox", object, []string{"a", "b"})
		s.report("another", engine.Stage{Name: engine.StageFreezing})
		s.report("sandbox", engine.Stage{Name: engine.StageFreezing}) // passes at once
		s.report("sandbox", engine.Stage{Name: engine.StageCapturing})
		want := v1alpha1.ReasonCheckpointInProgress + ": Capturing a, b, which stand still"
		for deadline := time.Now().Add(20 * time.Second); message() != want; time.Sleep(20 * time.Millisecond) {
			if got := message(); strings.Contains(got, "Freezing") || time.Now().After(deadline) {
				t.Fatalf("the object says %q, want %q", got, want)
			}
		}
		s.report("sandbox", engine.Stage{Name: engine.StageStoring, Frozen: 226 * time.Millisecond})
		want = v1alpha1.ReasonCheckpointInProgress + ": Storing a, b, thawed after 226ms"
		for deadline := time.Now().Add(20 * time.Second); message() != want; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the object says %q, want %q", message(), want)
			}
		}
		s.report("sandbox", engine.Stage{Name: engine.StageFreezing})
		end()
		s.report("sandbox", engine.Stage{Name: engine.StageCapturing})
		time.Sleep(2 * stageDelay)
		if got := message(); got != want {
			t.Errorf("after the end the object says %q", got)
		}
	})
}
