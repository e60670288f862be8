package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/demo/counters"
	"podstasis.dev/stasis/test/e2e/cluster"
)

// patience is how long anything may take that ought to happen.
var patience = cluster.Patience * time.Minute

// scene is one test's own namespace.
type scene struct {
	testing.TB
	*cluster.Cluster
	namespace string
}

// newScene makes a namespace on the shared cluster that goes with the test.
func newScene(t testing.TB) *scene {
	t.Helper()
	return sceneOn(t, shared)
}

func sceneOn(t testing.TB, c *cluster.Cluster) *scene {
	t.Helper()
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-"}}
	if err := c.Create(t.Context(), namespace); err != nil {
		t.Fatalf("making a namespace: %v", err)
	}
	s := &scene{TB: t, Cluster: c, namespace: namespace.Name}
	t.Cleanup(func() {
		if t.Failed() {
			s.describe()
		}
		if err := c.Delete(context.Background(), namespace); err != nil {
			t.Errorf("deleting namespace %s: %v", namespace.Name, err)
		}
	})
	s.eventually("the default ServiceAccount", func() error {
		return c.Get(t.Context(), s.key("default"), &corev1.ServiceAccount{})
	})
	return s
}

// describe shows what is in the namespace, for a test that failed.
func (s *scene) describe() {
	for _, args := range [][]string{
		{"get", "pods,podcheckpoints", "-o", "wide"},
		{"get", "events", "--sort-by=.lastTimestamp", "-o", "custom-columns=AT:.lastTimestamp,ON:.involvedObject.name,REASON:.reason,MESSAGE:.message"},
	} {
		out, err := s.Kubectl(context.Background(), append(args, "-n", s.namespace)...)
		s.Logf("$ kubectl %s\n%s%v", strings.Join(args, " "), out, err)
	}
}

func (s *scene) key(name string) client.ObjectKey {
	return client.ObjectKey{Namespace: s.namespace, Name: name}
}

// eventually repeats check until it finds nothing to say.
func (s *scene) eventually(what string, check func() error) {
	s.Helper()
	s.within(patience, what, check)
}

func (s *scene) within(limit time.Duration, what string, check func() error) {
	s.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.Fatalf("%s: not within %s: %v", what, limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// never checks that nothing is wrong for a while.
func (s *scene) never(d time.Duration, what string, check func() error) {
	s.Helper()
	for deadline := time.Now().Add(d); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		if err := check(); err != nil {
			s.Fatalf("%s: %v", what, err)
		}
	}
}

// Pods.

func (s *scene) create(pod *corev1.Pod) *corev1.Pod {
	s.Helper()
	pod.Namespace = s.namespace
	if err := s.Create(s.Context(), pod); err != nil {
		s.Fatalf("creating pod %s: %v", pod.Name, err)
	}
	return pod
}

// refused creates a Pod that must not be admitted.
func (s *scene) refused(as client.Client, pod *corev1.Pod, wanted ...string) error {
	s.Helper()
	pod.Namespace = s.namespace
	err := as.Create(s.Context(), pod)
	if err == nil {
		s.Fatalf("pod %s was admitted", pod.Name)
	}
	s.wantText("the refusal", err.Error(), wanted...)
	return err
}

func (s *scene) pod(name string) *corev1.Pod {
	s.Helper()
	var pod corev1.Pod
	if err := s.Get(s.Context(), s.key(name), &pod); err != nil {
		s.Fatalf("reading pod %s: %v", name, err)
	}
	return &pod
}

func (s *scene) waitReady(name string) *corev1.Pod {
	s.Helper()
	var pod corev1.Pod
	s.eventually("pod "+name+" is ready", func() error {
		if err := s.Get(s.Context(), s.key(name), &pod); err != nil {
			return err
		}
		for _, condition := range pod.Status.Conditions {
			if condition.Type == corev1.PodReady && condition.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("phase %s, %v", pod.Status.Phase, containerStates(&pod))
	})
	return &pod
}

// change changes a Pod through one of its subresources. The kubelet and the agent write
// its status meanwhile: it is read anew where one of them was first.
func (s *scene) change(name, subresource string, change func(*corev1.Pod)) (err error) {
	s.Helper()
	s.eventually("pod "+name+" is changed as it was read", func() error {
		pod := s.pod(name)
		change(pod)
		if err = s.SubResource(subresource).Update(s.Context(), pod); apierrors.IsConflict(err) {
			return err
		}
		return nil
	})
	return err
}

// running creates a Pod and waits until it is ready.
func (s *scene) running(pod *corev1.Pod) *corev1.Pod {
	s.Helper()
	return s.waitReady(s.create(pod).Name)
}

func containerStates(pod *corev1.Pod) []string {
	var states []string
	for _, status := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		switch {
		case status.State.Running != nil:
			states = append(states, status.Name+" running")
		case status.State.Terminated != nil:
			states = append(states, fmt.Sprintf("%s ended with %d", status.Name, status.State.Terminated.ExitCode))
		case status.State.Waiting != nil:
			states = append(states, status.Name+" waiting: "+status.State.Waiting.Reason)
		}
	}
	return states
}

// unharmed checks that no container of a running Pod was ever started anew. What runs
// answers before the kubelet has told of it: a container that is not said to run yet,
// and not to have run before, is waited for.
func (s *scene) unharmed(name string) {
	s.Helper()
	s.eventually("all containers of pod "+name+" run", func() error {
		pod := s.pod(name)
		told := 0
		for _, status := range pod.Status.ContainerStatuses {
			if status.RestartCount != 0 || status.State.Terminated != nil || status.LastTerminationState.Terminated != nil {
				s.Errorf("pod %s: container %s: restarted %d times, %v", name, status.Name, status.RestartCount, containerStates(pod))
				return nil
			}
			if status.State.Running != nil {
				told++
			}
		}
		if told < len(pod.Spec.Containers) {
			return fmt.Errorf("phase %s, %v", pod.Status.Phase, containerStates(pod))
		}
		return nil
	})
}

// remove deletes a Pod and waits until it is gone.
func (s *scene) remove(name string) {
	s.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name}}
	if err := s.Delete(s.Context(), pod); err != nil {
		s.Fatalf("deleting pod %s: %v", name, err)
	}
	s.gone(name)
}

func (s *scene) gone(name string) {
	s.Helper()
	s.eventually("pod "+name+" is gone", func() error {
		err := s.Get(s.Context(), s.key(name), &corev1.Pod{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("it is still there"))
	})
}

func (s *scene) logs(pod, container string) string {
	s.Helper()
	out, err := s.Kubectl(s.Context(), "-n", s.namespace, "logs", pod, "-c", container)
	if err != nil {
		s.Fatal(err)
	}
	return out
}

func (s *scene) exec(pod, container string, command ...string) (string, error) {
	return s.Kubectl(s.Context(), append([]string{"-n", s.namespace, "exec", pod, "-c", container, "--"}, command...)...)
}

// ask asks the subject in a Pod, through exec.
func (s *scene) ask(pod, path string, into any) {
	s.Helper()
	out, err := s.exec(pod, "subject", "subject", "get", path)
	if err != nil && strings.Contains(err.Error(), "connection refused") && !s.isRestored(pod) { // its program may not be so far yet
		s.eventually("the subject in "+pod+" listens", func() error {
			out, err = s.exec(pod, "subject", "subject", "get", path)
			return err
		})
	}
	if err != nil {
		s.Fatalf("asking the subject in %s for %s: %v", pod, path, err)
	}
	if into == nil {
		return
	}
	if err := json.Unmarshal([]byte(out), into); err != nil {
		s.Fatalf("the subject in %s answers %q to %s: %v", pod, out, path, err)
	}
}

// isRestored says whether a Pod is a restored one.
func (s *scene) isRestored(pod string) bool {
	s.Helper()
	var p corev1.Pod
	if err := s.Get(s.Context(), s.key(pod), &p); err != nil {
		s.Fatal(err)
	}
	return p.Annotations[checkpointv1alpha1.AnnotationRestoreFrom] != ""
}

// counted reads the log of a demo program, which checks itself and its order.
func (s *scene) counted(pod, program string) []counters.Line {
	s.Helper()
	lines, err := counters.Parse(s.logs(pod, program))
	if err != nil {
		s.Fatalf("pod %s: %v", pod, err)
	}
	return lines
}

// countsOn waits until both demo programs have counted n further.
func (s *scene) countsOn(pod string, n uint64) {
	s.Helper()
	for _, program := range []string{"a", "b"} {
		var start uint64
		if lines := s.counted(pod, program); len(lines) > 0 {
			start = lines[len(lines)-1].Count
		}
		s.eventually(fmt.Sprintf("program %s of pod %s counts on from %d", program, pod, start), func() error {
			lines := s.counted(pod, program)
			if len(lines) == 0 || lines[len(lines)-1].Count < start+n {
				return fmt.Errorf("%d lines", len(lines))
			}
			return nil
		})
	}
}

// counting waits until a container that logs what it counts is at n: what a Pod restored
// from it logs then does not begin as that of a new one.
func (s *scene) counting(pod, container string, n int) {
	s.Helper()
	s.eventually(fmt.Sprintf("container %s of pod %s has counted to %d", container, pod, n), func() error {
		if log := s.logs(pod, container); !strings.Contains("\n"+log, fmt.Sprintf("\n%d\n", n)) {
			return fmt.Errorf("log %q", log)
		}
		return nil
	})
}

// Checkpoints.

func (s *scene) ask4Checkpoint(name, pod string, change ...func(*checkpointv1alpha1.PodCheckpoint)) *checkpointv1alpha1.PodCheckpoint {
	s.Helper()
	checkpoint := &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name},
		Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod},
	}
	for _, change := range change {
		change(checkpoint)
	}
	if err := s.Create(s.Context(), checkpoint); err != nil {
		s.Fatalf("creating podcheckpoint %s: %v", name, err)
	}
	return checkpoint
}

// terminal waits until a checkpoint has ended, one way or the other.
func (s *scene) terminal(name string) (*checkpointv1alpha1.PodCheckpoint, metav1.Condition) {
	s.Helper()
	var checkpoint checkpointv1alpha1.PodCheckpoint
	var ready metav1.Condition
	s.eventually("podcheckpoint "+name+" has ended", func() error {
		if err := s.Get(s.Context(), s.key(name), &checkpoint); err != nil {
			return err
		}
		condition := meta.FindStatusCondition(checkpoint.Status.Conditions, checkpointv1alpha1.PodCheckpointReady)
		if condition == nil {
			return errors.New("it has no condition Ready")
		}
		ready = *condition
		if ready.Status == metav1.ConditionTrue || ready.Reason == checkpointv1alpha1.ReasonCheckpointFailed || ready.Reason == checkpointv1alpha1.ReasonSourcePodReplaced {
			return nil
		}
		return fmt.Errorf("reason %s: %s", ready.Reason, ready.Message)
	})
	return &checkpoint, ready
}

// checkpoint takes a checkpoint that must succeed.
func (s *scene) checkpoint(name, pod string) *checkpointv1alpha1.PodCheckpoint {
	s.Helper()
	s.ask4Checkpoint(name, pod)
	checkpoint, ready := s.terminal(name)
	if ready.Status != metav1.ConditionTrue {
		s.Fatalf("podcheckpoint %s: %s: %s", name, ready.Reason, ready.Message)
	}
	return checkpoint
}

func (s *scene) window(checkpoint *checkpointv1alpha1.PodCheckpoint) counters.Window {
	s.Helper()
	w, err := counters.WindowOf(checkpoint.Status)
	if err != nil {
		s.Fatalf("podcheckpoint %s: %v", checkpoint.Name, err)
	}
	return w
}

// data is the directory of a checkpoint on its node.
func data(checkpoint *checkpointv1alpha1.PodCheckpoint) string {
	return "/var/lib/stasis/checkpoints/" + checkpoint.Status.CheckpointLocation.NodeLocal.Path
}

func (s *scene) onNode(node, script string) string {
	s.Helper()
	out, err := s.OnNode(s.Context(), node, script)
	if err != nil {
		s.Fatal(err)
	}
	return out
}

// Events.

func (s *scene) events(uid types.UID) []corev1.Event {
	s.Helper()
	var list corev1.EventList
	if err := s.List(s.Context(), &list, client.InNamespace(s.namespace),
		client.MatchingFieldsSelector{Selector: fields.OneTermEqualSelector("involvedObject.uid", string(uid))}); err != nil {
		s.Fatalf("listing events: %v", err)
	}
	return list.Items
}

// waitEvent waits for an event with this reason on an object.
func (s *scene) waitEvent(object client.Object, reason string, wanted ...string) {
	s.Helper()
	s.eventually(fmt.Sprintf("event %s on %s", reason, object.GetName()), func() error {
		var seen []string
		for _, event := range s.events(object.GetUID()) {
			if event.Reason == reason && !slices.ContainsFunc(wanted, func(want string) bool { return !strings.Contains(event.Message, want) }) {
				return nil
			}
			seen = append(seen, event.Reason+": "+event.Message)
		}
		return fmt.Errorf("events are %q", seen)
	})
}

// staysPending checks that nothing of a Pod is started.
func (s *scene) staysPending(name string) {
	s.Helper()
	s.never(2*time.Second, "pod "+name+" stays Pending", func() error {
		pod := s.pod(name)
		for _, status := range pod.Status.ContainerStatuses {
			if status.State.Waiting == nil || status.LastTerminationState != (corev1.ContainerState{}) {
				return fmt.Errorf("containers: %v", containerStates(pod))
			}
		}
		if pod.Status.Phase != corev1.PodPending {
			return fmt.Errorf("phase %s", pod.Status.Phase)
		}
		return nil
	})
}

func (s *scene) wantText(what, text string, wanted ...string) {
	s.Helper()
	for _, want := range wanted {
		if !strings.Contains(text, want) {
			s.Errorf("%s does not say %q: %s", what, want, text)
		}
	}
}
