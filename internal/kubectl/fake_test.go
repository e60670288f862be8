package kubectl

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

const namespace = "team-a"

// cluster stands in for an API server. created is called after an object was
// made, with a client to act on it as the agent or the kubelet would.
type cluster struct {
	client.WithWatch
	mu      sync.Mutex
	dryRuns int
}

func newCluster(t *testing.T, created func(client.Client, client.Object), forbidWatch bool, objects ...client.Object) *cluster {
	t.Helper()
	c := &cluster{}
	var behind sync.WaitGroup
	t.Cleanup(behind.Wait)
	names := 0
	c.WithWatch = interceptor.NewClient(fake.NewClientBuilder().
		WithScheme(newScheme()).
		WithStatusSubresource(&checkpointv1alpha1.PodCheckpoint{}, &corev1.Pod{}).
		WithIndex(&corev1.Event{}, "involvedObject.uid", func(o client.Object) []string {
			return []string{string(o.(*corev1.Event).InvolvedObject.UID)}
		}).
		WithObjects(objects...).Build(), interceptor.Funcs{
		Create: func(ctx context.Context, next client.WithWatch, object client.Object, options ...client.CreateOption) error {
			var given client.CreateOptions
			given.ApplyOptions(options)
			names++
			if object.GetName() == "" {
				object.SetName(fmt.Sprintf("%s%05d", object.GetGenerateName(), names))
			}
			object.SetUID(types.UID(fmt.Sprintf("uid-%d", names)))
			if len(given.DryRun) > 0 {
				c.mu.Lock()
				c.dryRuns++
				c.mu.Unlock()
				return nil
			}
			if err := next.Create(ctx, object, options...); err != nil {
				return err
			}
			if created != nil {
				object := object.DeepCopyObject().(client.Object)
				behind.Go(func() { created(next, object) })
			}
			return nil
		},
		Watch: func(ctx context.Context, next client.WithWatch, list client.ObjectList, options ...client.ListOption) (watch.Interface, error) {
			if forbidWatch {
				return nil, apierrors.NewForbidden(checkpointv1alpha1.GroupVersion.WithResource("podcheckpoints").GroupResource(), "", fmt.Errorf("no"))
			}
			return next.Watch(ctx, list, options...)
		},
	})
	return c
}

// result is what a command left behind.
type result struct {
	code     int
	out, err string
}

// testEnvironment speaks with c, which has no aggregated API.
func testEnvironment(c client.WithWatch) (env *environment, out, errOut *bytes.Buffer) {
	streams, _, out, errOut := genericiooptions.NewTestIOStreams()
	env = newEnvironment(streams)
	env.client, env.namespace = c, namespace
	return env, out, errOut
}

func runCheckpoint(t *testing.T, c client.WithWatch, args ...string) result {
	t.Helper()
	env, out, errOut := testEnvironment(c)
	cmd := newCheckpointCommand(env)
	cmd.SetArgs(args)
	return finish(run(t.Context(), cmd, errOut), out, errOut)
}

func runRestore(t *testing.T, c client.WithWatch, args ...string) result {
	t.Helper()
	env, out, errOut := testEnvironment(c)
	cmd := newRestoreCommand(env)
	cmd.SetArgs(args)
	return finish(run(t.Context(), cmd, errOut), out, errOut)
}

func finish(code int, out, err *bytes.Buffer) result { return result{code, out.String(), err.String()} }

func sourcePod() *corev1.Pod {
	always := corev1.ContainerRestartPolicyAlways
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "web", UID: "source-uid", Labels: map[string]string{"app": "web"}},
		Spec: corev1.PodSpec{
			NodeName:       "node-1",
			InitContainers: []corev1.Container{{Name: "setup", Image: "i"}, {Name: "proxy", Image: "i", RestartPolicy: &always}},
			Containers:     []corev1.Container{{Name: "app", Image: "i"}, {Name: "log", Image: "i"}},
		},
	}
}

func readyCheckpoint() *checkpointv1alpha1.PodCheckpoint {
	runtimeClass := "stasis"
	checkpoint := &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "web-1"},
		Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: "web"},
	}
	completed(checkpoint)
	checkpoint.Status.CheckpointedPodTemplate = &corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{
			Labels:          map[string]string{"app": "web", "pod-template-hash": "abc"},
			Annotations:     map[string]string{"note": "kept", checkpointv1alpha1.AnnotationRestoreFromUID: "old"},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web"}},
		},
		Spec: corev1.PodSpec{
			RuntimeClassName: &runtimeClass,
			Containers:       []corev1.Container{{Name: "app", Image: "i"}, {Name: "log", Image: "i"}},
		},
	}
	return checkpoint
}

func completed(checkpoint *checkpointv1alpha1.PodCheckpoint) {
	start, end := metav1.Now(), metav1.Now()
	checkpoint.Status.NodeName = "node-1"
	checkpoint.Status.StartTime, checkpoint.Status.CompletionTime = &start, &end
	checkpoint.Status.FreezeDuration = &metav1.Duration{Duration: 143 * time.Millisecond}
	checkpoint.Status.Capture = &checkpointv1alpha1.MemoryCapture{Mode: "cow"}
	checkpoint.Status.Size = &checkpointv1alpha1.CheckpointSize{Logical: "12Mi", LogicalBytes: 12 << 20}
	checkpoint.Status.CheckpointLocation = &checkpointv1alpha1.CheckpointSource{
		Type:      checkpointv1alpha1.CheckpointSourceTypeNodeLocal,
		NodeLocal: &checkpointv1alpha1.NodeLocalCheckpointSource{Path: "team-a_web-1_uid"},
	}
	setReady(checkpoint, metav1.ConditionTrue, checkpointv1alpha1.ReasonCheckpointCompleted, "done")
}

func setReady(checkpoint *checkpointv1alpha1.PodCheckpoint, status metav1.ConditionStatus, reason, message string) {
	meta.SetStatusCondition(&checkpoint.Status.Conditions, metav1.Condition{
		Type: checkpointv1alpha1.PodCheckpointReady, Status: status, Reason: reason, Message: message,
	})
}

// agent acts on each new PodCheckpoint: it takes it up and then ends it.
func agent(t *testing.T, end func(*checkpointv1alpha1.PodCheckpoint)) func(client.Client, client.Object) {
	return func(c client.Client, object client.Object) {
		checkpoint, ok := object.(*checkpointv1alpha1.PodCheckpoint)
		if !ok {
			return
		}
		checkpoint.Status.NodeName = "node-1"
		setReady(checkpoint, metav1.ConditionFalse, checkpointv1alpha1.ReasonCheckpointInProgress, "")
		if err := c.Status().Update(context.Background(), checkpoint); err != nil {
			t.Errorf("taking the checkpoint up: %v", err)
		}
		if end == nil {
			return
		}
		time.Sleep(50 * time.Millisecond)
		end(checkpoint)
		if err := c.Status().Update(context.Background(), checkpoint); err != nil {
			t.Errorf("ending the checkpoint: %v", err)
		}
	}
}

// kubelet acts on each new Pod.
func kubelet(t *testing.T, act func(c client.Client, pod *corev1.Pod)) func(client.Client, client.Object) {
	return func(c client.Client, object client.Object) {
		pod, ok := object.(*corev1.Pod)
		if !ok {
			return
		}
		pod.Spec.NodeName = "node-1"
		if err := c.Update(context.Background(), pod); err != nil {
			t.Errorf("binding the pod: %v", err)
		}
		act(c, pod)
		if err := c.Status().Update(context.Background(), pod); err != nil && !apierrors.IsNotFound(err) {
			t.Errorf("writing the pod's status: %v", err)
		}
	}
}

func makeReady(_ client.Client, pod *corev1.Pod) {
	pod.Status.Phase = corev1.PodRunning
	pod.Status.PodIP = "10.0.0.7"
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
}

func warn(t *testing.T, reason, message string) func(client.Client, *corev1.Pod) {
	return func(c client.Client, pod *corev1.Pod) {
		event := &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name + "." + reason},
			InvolvedObject: corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
			Type:           corev1.EventTypeWarning, Reason: reason, Message: message,
		}
		if err := c.Create(context.Background(), event); err != nil {
			t.Errorf("making an event: %v", err)
		}
		pod.Status.Phase = corev1.PodPending
	}
}
