package e2e

import (
	"errors"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// P15: the checkpoint waits for an exec session to end, and lasts as long as the
// test wants it to.
func TestAPodTakesNoEphemeralContainerAndIsNotResizedWhileItIsCheckpointed(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	build := MakePod("source").Shell("main", idle)
	build.last().Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m")}
	s.running(build.Obj())
	end := s.session("source")

	debug := func() error {
		return s.change("source", "ephemeralcontainers", func(pod *corev1.Pod) {
			pod.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
				Name: "debug", Image: imageBusybox, Command: []string{"true"}, ImagePullPolicy: corev1.PullIfNotPresent,
			}}}
		})
	}
	resize := func() error {
		return s.change("source", "resize", func(pod *corev1.Pod) {
			pod.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("11m")}
		})
	}
	refused := func(what string, err error) {
		t.Helper()
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s while the Pod is checkpointed: %v, want Forbidden", what, err)
			return
		}
		s.wantText("the refusal of "+what, err.Error(), "being checkpointed", checkpointv1alpha1.PodConditionCheckpointing+" is gone", "one")
	}

	s.ask4Checkpoint("one", "source")
	s.eventually("the Pod says that it is checkpointed", func() error {
		if !s.isCheckpointing("source") {
			return errors.New("it does not")
		}
		return nil
	})
	refused("an ephemeral container", debug())
	refused("a resize", resize())
	if !s.isCheckpointing("source") {
		t.Error("the checkpoint was over before all had been tried")
	}
	end()
	if _, ready := s.terminal("one"); ready.Status != metav1.ConditionTrue {
		t.Fatalf("it ended with %s: %s", ready.Reason, ready.Message)
	}
	if s.isCheckpointing("source") {
		t.Error("the Pod says that it is checkpointed, and is not")
	}
	s.unharmed("source")
	if err := errors.Join(resize(), debug()); err != nil {
		t.Errorf("after the checkpoint: %v", err)
	}
}

// session begins an exec session in a Pod's container main and returns what ends it.
func (s *scene) session(pod string) (end func()) {
	s.Helper()
	_, wait, err := s.Follow(s.Context(), "-n", s.namespace, "exec", pod, "-c", "main", "--", "sh", "-c", "echo $$ > /tmp/session; exec sleep 600")
	if err != nil {
		s.Fatal(err)
	}
	s.eventually("the session is there", func() error {
		out, err := s.exec(pod, "main", "sh", "-ec", "tr '\\0' ' ' < /proc/$(cat /tmp/session)/cmdline")
		if err == nil && out != "sleep 600 " {
			err = fmt.Errorf("it is %q", out)
		}
		return err
	})
	return func() {
		s.Helper()
		// It alone: the container's own sleeps come and go, and killall fails for one that has just gone.
		if _, err := s.exec(pod, "main", "sh", "-c", "kill $(cat /tmp/session)"); err != nil {
			s.Fatal(err)
		}
		_ = wait() // with the exit code of a killed command
	}
}

func (s *scene) isCheckpointing(name string) bool {
	s.Helper()
	for _, condition := range s.pod(name).Status.Conditions {
		if condition.Type == checkpointv1alpha1.PodConditionCheckpointing {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}
