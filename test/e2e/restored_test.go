package e2e

import (
	"errors"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// P25: the KEP's way to other limits is to change them after the restore.
func TestARestoredPodIsResizedInPlaceAndDebuggedAsAnyOther(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	build := func(name string) *podBuilder {
		b := MakePod(name).Shell("main", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done")
		b.last().Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m")}
		return b
	}
	s.running(build("source").Obj())
	s.checkpoint("one", "source")
	s.running(build("restored").RestoreFrom("one").Obj())

	more := resource.MustParse("20m")
	if err := s.change("restored", "resize", func(pod *corev1.Pod) {
		pod.Spec.Containers[0].Resources.Requests[corev1.ResourceCPU] = more
	}); err != nil {
		t.Fatal(err)
	}
	s.eventually("it has been resized", func() error {
		status := s.pod("restored").Status.ContainerStatuses[0]
		if status.Resources == nil || !status.Resources.Requests.Cpu().Equal(more) {
			return fmt.Errorf("its resources are %+v", status.Resources)
		}
		return nil
	})

	if err := s.change("restored", "ephemeralcontainers", func(pod *corev1.Pod) {
		pod.Spec.EphemeralContainers = []corev1.EphemeralContainer{{
			EphemeralContainerCommon: corev1.EphemeralContainerCommon{
				Name: "debug", Image: imageBusybox, Command: []string{"sh", "-c", "cat /proc/[0-9]*/cmdline || true"}, ImagePullPolicy: corev1.PullIfNotPresent,
			},
			TargetContainerName: "main",
		}}
	}); err != nil {
		t.Fatal(err)
	}
	s.eventually("the ephemeral container has run", func() error {
		statuses := s.pod("restored").Status.EphemeralContainerStatuses
		if len(statuses) != 1 || statuses[0].State.Terminated == nil {
			return fmt.Errorf("it is %+v", statuses)
		}
		if code := statuses[0].State.Terminated.ExitCode; code != 0 {
			t.Errorf("it ended with %d", code)
		}
		return nil
	})
	s.wantText("what it sees of the restored container", s.logs("restored", "debug"), "sleep")
	s.unharmed("restored")
}

// The scheduler places a restoring Pod as any other: without room for it on any node
// that can run it, it is Pending.
func TestARestoringPodWaitsUntilItsNodeHasRoomForIt(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	build := func(name string) *podBuilder {
		b := MakePod(name).Shell("main", idle)
		b.last().Ports = []corev1.ContainerPort{{ContainerPort: 31999, HostPort: 31999}}
		return b
	}
	s.running(build("source").Obj())
	s.running(build("neighbour").Obj()) // on the other node: this one's port is taken
	s.checkpoint("one", "source")
	pod := s.create(build("restored").RestoreFrom("one").Obj())
	s.eventually("the scheduler says why", func() error {
		for _, condition := range s.pod("restored").Status.Conditions {
			if condition.Type == corev1.PodScheduled && condition.Reason == corev1.PodReasonUnschedulable {
				s.wantText("the condition", condition.Message, "free ports")
				return nil
			}
		}
		return errors.New("it does not")
	})
	s.waitEvent(pod, "FailedScheduling", "free ports")
	s.remove("source")
	s.waitReady("restored")
	s.unharmed("restored")
}
