package freeze

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store/backend/open"
	"podstasis.dev/stasis/test/bench/app"
	"podstasis.dev/stasis/test/e2e/cluster"
)

// Namespace is where the Pods are.
const Namespace = "bench"

const node = "node-1"

// pods runs Pods of a cluster with Stasis in it.
type pods struct {
	*cluster.Cluster
	runtime runtimeapi.RuntimeServiceClient
	root    string   // of the node, as this process sees it
	args    []string // of the program, after the amount of memory
	cpu     string   // that a container asks for; empty: nothing
	cgroup  string   // the directory in which Pods have theirs, once it is known
	count   int
}

func newPods(ctx context.Context, c *cluster.Cluster) (*pods, error) {
	root, err := nodeRoot(ctx, c)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix://"+root+containerdSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &pods{Cluster: c, runtime: runtimeapi.NewRuntimeServiceClient(conn), root: root}, nil
}

const containerdSocket = "/run/containerd/containerd.sock"

// nodeRoot is the node's root directory as this process sees it.
func nodeRoot(ctx context.Context, c *cluster.Cluster) (string, error) {
	out, err := c.Devcluster(ctx, "status", "-o", "json")
	if err != nil {
		return "", err
	}
	var places []struct{ Place, RuntimeSocket string }
	if err := json.Unmarshal([]byte(out), &places); err != nil {
		return "", fmt.Errorf("devcluster status: %w", err)
	}
	for _, p := range places {
		if root, found := strings.CutSuffix(p.RuntimeSocket, containerdSocket); p.Place == node && found {
			return root, nil
		}
	}
	return "", fmt.Errorf("devcluster status: no container runtime on %s", node)
}

type podSubject struct {
	pods  *pods
	pod   *corev1.Pod
	shape Shape
	found []app.Process
}

func (p *pods) start(ctx context.Context, s Shape) (subject, error) { return p.pod(ctx, s, nil) }

// pod makes a Pod and returns when its processes exist.
func (p *pods) pod(ctx context.Context, s Shape, annotations map[string]string) (*podSubject, error) {
	p.count++
	from := &podSubject{pods: p, shape: s, pod: &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: "bench-" + strconv.Itoa(p.count), Annotations: annotations},
		Spec:       corev1.PodSpec{TerminationGracePeriodSeconds: new(int64(0))},
	}}
	for i := range s.Containers {
		var asks corev1.ResourceRequirements
		if p.cpu != "" {
			asks.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(p.cpu)}
		}
		from.pod.Spec.Containers = append(from.pod.Spec.Containers, corev1.Container{
			Name: "c" + strconv.Itoa(i+1), Image: podmanImage, ImagePullPolicy: corev1.PullNever, Args: append([]string{strconv.Itoa(s.MiB)}, p.args...),
			Resources: asks,
			// Containers of a Pod share its network: each listens on a port of its own.
			Env: []corev1.EnvVar{{Name: "PORT", Value: strconv.Itoa(app.Port + i)}},
		})
	}
	if err := p.Create(ctx, from.pod); err != nil {
		return nil, err
	}
	if err := p.find(ctx, from); err != nil {
		return nil, errors.Join(err, from.describe(ctx), from.end(context.WithoutCancel(ctx)))
	}
	return from, nil
}

// find waits until a Pod's processes exist. It looks often, and so that it costs next to
// nothing: what is measured goes on meanwhile.
func (p *pods) find(ctx context.Context, of *podSubject) error {
	var asked time.Time
	return eventually(ctx, "the processes of Pod "+of.pod.Name+" exist", func() (_ bool, err error) {
		if p.cgroup != "" {
			of.found, err = app.In(filepath.Join(p.cgroup, "pod"+string(of.pod.UID)))
			if err != nil || len(of.found) == of.shape.Containers {
				return err == nil, err
			}
		}
		if time.Since(asked) < time.Second {
			return false, nil
		}
		asked = time.Now()
		if p.cgroup == "" {
			if of.found, err = app.Find(string(of.pod.UID)); err != nil {
				return false, err
			}
			if len(of.found) > 0 {
				own, err := of.found[0].Cgroup()
				p.cgroup = filepath.Dir(filepath.Dir(own))
				return false, err
			}
		}
		if err := p.Get(ctx, client.ObjectKeyFromObject(of.pod), of.pod); err != nil {
			return false, err
		}
		if of.pod.Status.Phase == corev1.PodFailed {
			return false, fmt.Errorf("it failed: %s", of.pod.Status.Message)
		}
		return false, nil
	})
}

// describe is an error that says what happened to a Pod.
func (s *podSubject) describe(ctx context.Context) error {
	out, err := s.pods.Kubectl(context.WithoutCancel(ctx), "-n", Namespace, "get", "events", "--field-selector", "involvedObject.name="+s.pod.Name, "-o", "custom-columns=REASON:.reason,MESSAGE:.message")
	if err != nil {
		return err
	}
	return errors.New(strings.TrimSpace(out))
}

func (s *podSubject) processes() []app.Process { return s.found }

func (s *podSubject) end(ctx context.Context) error {
	if err := s.pods.Delete(ctx, s.pod); client.IgnoreNotFound(err) != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return every(ctx, asking, "Pod "+s.pod.Name+" is gone", func() (bool, error) {
		err := s.pods.Get(ctx, client.ObjectKeyFromObject(s.pod), &corev1.Pod{})
		return apierrors.IsNotFound(err), client.IgnoreNotFound(err)
	})
}

// created is when the container runtime made the first of a Pod's containers.
func (s *podSubject) created(ctx context.Context) (time.Time, error) {
	answer, err := s.pods.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		LabelSelector: map[string]string{"io.kubernetes.pod.uid": string(s.pod.UID)}}})
	if err != nil {
		return time.Time{}, err
	}
	var first time.Time
	for _, c := range answer.Containers {
		if at := time.Unix(0, c.CreatedAt); first.IsZero() || at.Before(first) {
			first = at
		}
	}
	if first.IsZero() {
		return first, fmt.Errorf("the container runtime knows no container of Pod %s", s.pod.Name)
	}
	return first, nil
}

// podTaken is a PodCheckpoint.
type podTaken struct {
	pods       *pods
	checkpoint *checkpointv1alpha1.PodCheckpoint
	shape      Shape
}

func (t *podTaken) bytes() int64            { return t.checkpoint.Status.Size.LogicalBytes }
func (t *podTaken) reported() time.Duration { return t.checkpoint.Status.FreezeDuration.Duration }

// reading is how long memory was read while the program ran.
func (t *podTaken) reading() time.Duration {
	for _, p := range t.checkpoint.Status.Phases {
		if p.Name == "memory" {
			return p.Duration.Duration
		}
	}
	return 0
}

// dir is where the node has it; empty for a checkpoint that is kept elsewhere.
func (t *podTaken) dir() string {
	location := t.checkpoint.Status.CheckpointLocation
	if location == nil || location.NodeLocal == nil {
		return ""
	}
	return filepath.Join(t.pods.root, "var/lib/stasis/checkpoints", location.NodeLocal.Path)
}

// read reads all of it once, so that the page cache has it.
func (t *podTaken) read() error {
	dir := t.dir()
	if dir == "" {
		return nil
	}
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(io.Discard, f)
		return err
	})
}

// window reads what the node keeps of the freeze window; nothing of a checkpoint that is
// kept elsewhere.
func (t *podTaken) window() (profile, Stats, error) {
	dir := t.dir()
	if dir == "" {
		return nil, Stats{}, nil
	}
	p, err := readProfile(dir, "c1")
	if err != nil {
		return nil, Stats{}, err
	}
	stats, err := readStats(filepath.Join(dir, "containers/c1/stats-dump"))
	return p, stats, err
}

func (t *podTaken) remove(ctx context.Context) error {
	if err := t.pods.Delete(ctx, t.checkpoint); client.IgnoreNotFound(err) != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return every(ctx, asking, "checkpoint "+t.checkpoint.Name+" is gone", func() (bool, error) {
		err := t.pods.Get(ctx, client.ObjectKeyFromObject(t.checkpoint), &checkpointv1alpha1.PodCheckpoint{})
		return apierrors.IsNotFound(err), client.IgnoreNotFound(err)
	})
}

// checkpoint asks for a PodCheckpoint with options, in a store if one is named.
func (p *pods) checkpoint(options map[string]string, store string) func(context.Context, subject) (taken, error) {
	return func(ctx context.Context, of subject) (taken, error) {
		from := of.(*podSubject)
		p.count++
		c := &checkpointv1alpha1.PodCheckpoint{
			ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: "bench-" + strconv.Itoa(p.count)},
			Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: from.pod.Name, Options: options, StoreName: store},
		}
		if err := p.Create(ctx, c); err != nil {
			return nil, err
		}
		t := &podTaken{pods: p, checkpoint: c, shape: from.shape}
		err := p.ready(ctx, c)
		if err == nil && (c.Status.FreezeDuration == nil || c.Status.Size == nil) {
			err = errors.New("the checkpoint is Ready without freezeDuration or size")
		}
		if err != nil {
			return nil, errors.Join(err, t.remove(context.WithoutCancel(ctx)))
		}
		return t, nil
	}
}

// ready waits until a checkpoint is. It is told: to ask often would take time from what
// is measured.
func (p *pods) ready(ctx context.Context, c *checkpointv1alpha1.PodCheckpoint) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	w, err := p.Watch(ctx, &checkpointv1alpha1.PodCheckpointList{}, client.InNamespace(c.Namespace), client.MatchingFields{"metadata.name": c.Name})
	if err != nil {
		return err
	}
	defer w.Stop()
	for event := range w.ResultChan() {
		now, is := event.Object.(*checkpointv1alpha1.PodCheckpoint)
		if !is {
			return fmt.Errorf("checkpoint %s: watching it came to %v", c.Name, event)
		}
		*c = *now
		switch ready := meta.FindStatusCondition(c.Status.Conditions, checkpointv1alpha1.PodCheckpointReady); {
		case ready == nil:
		case ready.Status == metav1.ConditionTrue:
			return nil
		case ready.Reason == checkpointv1alpha1.ReasonCheckpointFailed:
			return errors.New(ready.Message)
		}
	}
	return fmt.Errorf("checkpoint %s is not Ready in time: %w", c.Name, context.Cause(ctx))
}

// restore makes a Pod of a PodCheckpoint, with further annotations.
func (p *pods) restore(annotations map[string]string) func(context.Context, taken) (restored, error) {
	return func(ctx context.Context, from taken) (restored, error) {
		t := from.(*podTaken)
		with := map[string]string{checkpointv1alpha1.AnnotationRestoreFrom: t.checkpoint.Name}
		for name, value := range annotations {
			with[name] = value
		}
		got := restored{asked: time.Now()}
		to, err := p.pod(ctx, t.shape, with)
		if err != nil {
			return got, err
		}
		got.subject = to
		got.created, err = to.created(ctx)
		return got, err
	}
}

// store makes a CheckpointStore, a directory on the node, and returns its name.
func (p *pods) store(ctx context.Context) (string, error) {
	s := &checkpointv1alpha1.CheckpointStore{
		ObjectMeta: metav1.ObjectMeta{Name: "bench"},
		Spec: checkpointv1alpha1.CheckpointStoreSpec{
			Type: checkpointv1alpha1.CheckpointStoreType(open.Directory), Directory: &checkpointv1alpha1.DirectoryStore{Path: storeMount + "/store"}},
	}
	if err := p.Create(ctx, s); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return s.Name, every(ctx, asking, "CheckpointStore bench is Ready", func() (bool, error) {
		err := p.Get(ctx, client.ObjectKeyFromObject(s), s)
		return meta.IsStatusConditionTrue(s.Status.Conditions, "Ready"), err
	})
}

// storeMount is where the component store-directory has agents and controller find it.
const storeMount = "/mnt/stasis"

// kubeletTaken are archives on the node.
type kubeletTaken struct {
	pods  *pods
	names []string
	size  int64
}

func (t *kubeletTaken) bytes() int64            { return t.size }
func (t *kubeletTaken) reported() time.Duration { return 0 }

func (t *kubeletTaken) remove(ctx context.Context) error {
	_, err := t.pods.OnNode(ctx, node, "rm -f "+strings.Join(t.names, " "))
	return err
}

// checkpointByKubelet asks the kubelet to have the container runtime checkpoint one
// container after the other, which is all that it can.
func (p *pods) checkpointByKubelet(ctx context.Context, of subject) (taken, error) {
	from := of.(*podSubject)
	t := &kubeletTaken{pods: p}
	for _, c := range from.pod.Spec.Containers {
		out, err := p.Kubectl(ctx, "create", "--raw", fmt.Sprintf("/api/v1/nodes/%s/proxy/checkpoint/%s/%s/%s", node, Namespace, from.pod.Name, c.Name), "-f", "/dev/null")
		if err != nil {
			return nil, err
		}
		var answer struct{ Items []string }
		if err := json.Unmarshal([]byte(out), &answer); err != nil || len(answer.Items) != 1 {
			return nil, fmt.Errorf("the kubelet's checkpoint endpoint answers %q: %w", out, err)
		}
		t.names = append(t.names, answer.Items...)
	}
	sizes, err := p.OnNode(ctx, node, "stat -c %s "+strings.Join(t.names, " "))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(sizes) {
		size, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
		if err != nil {
			return nil, err
		}
		t.size += size
	}
	return t, nil
}

// criuForContainerd is where containerd finds a CRIU when it is asked to checkpoint: the
// same as Stasis' own.
const criuForContainerd = `printf '#!/bin/sh\nexec /opt/stasis/criu/bin/criu "$@"\n' >/usr/local/bin/criu; chmod 755 /usr/local/bin/criu`
