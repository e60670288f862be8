package agent

import (
	"context"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
)

func TestEveryPreconditionHasItsOwnMessage(t *testing.T) {
	waiting := corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}}
	for _, tc := range []struct {
		name   string
		pod    func(*corev1.Pod)
		pcp    func(*v1alpha1.PodCheckpoint)
		reason string
		want   string
	}{
		{name: "another instance of the Pod", pcp: func(p *v1alpha1.PodCheckpoint) {
			uid := types.UID("of-the-old-one")
			p.Spec.SourcePodUID = &uid
		}, reason: v1alpha1.ReasonSourcePodReplaced, want: "the checkpoint was asked of UID of-the-old-one"},
		{name: "being deleted", pod: func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{} }, want: "is being deleted"},
		{name: "on another node", pod: func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }, want: `is on node "node-2"`},
		{name: "mirror Pod", pod: func(p *corev1.Pod) {
			p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
		}, want: "static Pod (this object is its mirror)"},
		{name: "static Pod", pod: func(p *corev1.Pod) {
			p.Annotations = map[string]string{"kubernetes.io/config.source": "file"}
		}, want: "static Pod (config source file)"},
		{name: "pending", pod: func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }, want: "is not Running, it is Pending"},
		{name: "ended", pod: func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, want: "is not Running, it is Succeeded"},
		{name: "init container at work", pod: func(p *corev1.Pod) {
			p.Status.InitContainerStatuses[0].State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
		}, want: "Init container setup of Pod ns/app has not completed, it is running"},
		{name: "init container not begun", pod: func(p *corev1.Pod) { p.Status.InitContainerStatuses = nil }, want: "Init container setup of Pod ns/app has not completed, it is not started yet"},
		{name: "sidecar waits", pod: func(p *corev1.Pod) { p.Status.InitContainerStatuses[1].State = waiting }, want: "Container proxy of Pod ns/app is not running, it is waiting (CrashLoopBackOff)"},
		{name: "container ended", pod: func(p *corev1.Pod) {
			p.Status.ContainerStatuses[1].State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{Reason: "Error", ExitCode: 3}}
		}, want: "Container b of Pod ns/app is not running, it is terminated (Error, exit code 3)"},
		{name: "resize under way", pod: func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodResizeInProgress, Status: corev1.ConditionTrue}}
		}, want: "resize in flight (PodResizeInProgress)"},
		{name: "resize put off", pod: func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodResizePending, Status: corev1.ConditionTrue, Reason: "Deferred"}}
		}, want: "resize in flight (PodResizePending, Deferred)"},
		{name: "resize not seen yet by the kubelet", pod: func(p *corev1.Pod) {
			p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2")}
			p.Status.ContainerStatuses[0].AllocatedResources = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1")}
		}, want: "container a asks for 2 of cpu and has 1"},
		{name: "ephemeral container", pod: func(p *corev1.Pod) {
			p.Spec.EphemeralContainers = ephemeral("done", "debug")
			p.Status.EphemeralContainerStatuses = []corev1.ContainerStatus{{Name: "done", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{}}}, running("debug")}
		}, want: "Ephemeral container debug runs in Pod ns/app"},
		{name: "ephemeral container that begins", pod: func(p *corev1.Pod) { p.Spec.EphemeralContainers = ephemeral("debug") },
			want: "Ephemeral container debug runs in Pod ns/app"},
		{name: "forbidden by its label", pod: func(p *corev1.Pod) { p.Labels = map[string]string{v1alpha1.LabelAllowed: "false"} },
			want: "Pod ns/app forbids checkpoints of it, by the label checkpoint.podstasis.dev/allowed=false"},
		{name: "unknown container", pcp: func(p *v1alpha1.PodCheckpoint) { p.Spec.Containers = []string{"a", "zz"} }, want: "has no container zz that runs with it; it has proxy, a, b"},
		{name: "an init container that had completed", pcp: func(p *v1alpha1.PodCheckpoint) { p.Spec.Containers = []string{"setup"} }, want: "has no container setup that runs with it"},
		{name: "a container twice", pcp: func(p *v1alpha1.PodCheckpoint) { p.Spec.Containers = []string{"a", "a"} }, want: "names a twice"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod, pcp := makePod(), makePCP()
			if tc.pod != nil {
				tc.pod(pod)
			}
			if tc.pcp != nil {
				tc.pcp(pcp)
			}
			src, no := checkPod(pcp, pod, testNode)
			if no == nil {
				t.Fatalf("accepted: %v", src.containers)
			}
			reason := tc.reason
			if reason == "" {
				reason = v1alpha1.ReasonCheckpointFailed
			}
			if no.reason != reason || !strings.Contains(no.message, tc.want) {
				t.Errorf("reason %s, message %q; want %s and %q", no.reason, no.message, reason, tc.want)
			}
		})
	}
	if _, no := checkPod(makePCP(), nil, testNode); no == nil || no.message != "Pod ns/app not found" {
		t.Errorf("a Pod that does not exist: %v", no)
	}
}

func TestARefusalEndsTheObjectBeforeTheRuntimeIsTouched(t *testing.T) {
	h := newHarness(t, makePod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }), makePCP())
	h.run("cp")
	pcp := h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "Pod ns/app is not Running, it is Pending")
	if h.cri.calls() != 0 || len(pcp.Finalizers) != 0 {
		t.Errorf("%d calls of the CRI, finalizers %v", h.cri.calls(), pcp.Finalizers)
	}
	h.expectFiles()

	h = newHarness(t, makePCP())
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "Pod ns/app not found")
}

func TestOfSomeContainersOnlyThoseHaveToRun(t *testing.T) {
	pod := makePod(func(p *corev1.Pod) { p.Status.ContainerStatuses[1].State = corev1.ContainerState{} })
	src, no := checkPod(makePCP(func(p *v1alpha1.PodCheckpoint) { p.Spec.Containers = []string{"a"} }), pod, testNode)
	if no != nil || len(src.containers) != 1 || src.containers[0] != "a" {
		t.Errorf("%v, %v", src, no)
	}
}

func ephemeral(names ...string) (all []corev1.EphemeralContainer) {
	for _, name := range names {
		all = append(all, corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: name}})
	}
	return all
}

func TestWhatCameBeforeThePodWasMarkedIsSeen(t *testing.T) {
	h := newHarness(t, makePod(), makePCP())
	h.intercept.SubResourcePatch = func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
		h.intercept.SubResourcePatch = nil
		// The preconditions hold, the condition is not there yet: somebody begins to debug.
		pod := makePod()
		if err := c.Get(ctx, client.ObjectKeyFromObject(pod), pod); err != nil {
			return err
		}
		pod.Spec.EphemeralContainers = ephemeral("debug")
		if err := c.Update(ctx, pod); err != nil {
			return err
		}
		return c.SubResource(sub).Patch(ctx, obj, patch, opts...)
	}
	h.run("cp")
	h.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "Ephemeral container debug runs in Pod ns/app")
	if h.cri.calls() != 0 {
		t.Error("the Pod was checkpointed")
	}
	if after := h.condition(v1alpha1.PodConditionCheckpointing); after != "" {
		t.Errorf("condition %q after it", after)
	}
}
