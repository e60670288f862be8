package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// scale names the environment variable "NODESxCHECKPOINTS" that turns the
// measurement below on; docs/benchmarks.md holds its figures.
const scale = "STASIS_SCALE"

// TestAnAgentSeesOnlyItsOwnHoweverManyThereAre measures the API side with many
// nodes and PodCheckpoints (P5). Small, it is an ordinary test.
func TestAnAgentSeesOnlyItsOwnHoweverManyThereAre(t *testing.T) {
	nodes, each := 3, 2
	if s := os.Getenv(scale); s != "" {
		if _, err := fmt.Sscanf(s, "%dx%d", &nodes, &each); err != nil {
			t.Fatalf("%s=%s: give nodes x checkpoints of each, as 1000x10", scale, s)
		}
	}
	ns := namespace(t)
	first, agent := node(t)
	pod := source(t, ns, first)
	heap := heapInUse()

	parallel := func(n int, do func(i int) error) time.Duration {
		t.Helper()
		began := time.Now()
		var group sync.WaitGroup
		turns := make(chan int)
		for range 16 {
			group.Go(func() {
				for i := range turns {
					if err := do(i); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for i := range n {
			turns <- i
		}
		close(turns)
		group.Wait()
		return time.Since(began)
	}
	// The other nodes, each with an agent and a Pod.
	other := func(i int) string { return fmt.Sprintf("scale-%d", i) }
	parallel(nodes-1, func(i int) error {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: other(i)}}
		a := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: "stasis-agent-" + n.Name,
			Labels: map[string]string{"app.kubernetes.io/name": "stasis", "app.kubernetes.io/component": "agent"}},
			Spec: corev1.PodSpec{ServiceAccountName: "stasis-agent", NodeName: n.Name, Containers: []corev1.Container{{Name: "agent", Image: "i"}}}}
		p := sample[corev1.Pod](t, "pod.yaml")
		p.Namespace, p.Name, p.Spec.NodeName = ns, n.Name, n.Name
		lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: systemNamespace, Name: agentapi.LeaseName(n.Name)}}
		agentapi.Announcement{Node: n.Name, Address: "127.0.0.1:1", Certificate: agentapi.Fingerprint(nil), Protocol: agentapi.Version,
			Renewed: time.Now().Add(time.Hour), Duration: agentapi.LeaseDuration}.Fill(lease) // nobody renews it
		if err := agentOf(t, n.Name).Create(t.Context(), lease); err != nil {
			return err
		}
		for _, object := range []client.Object{n, a, p} {
			if err := shared.client.Create(t.Context(), object); err != nil {
				return err
			}
		}
		n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
		a.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		return errors.Join(shared.client.Status().Update(t.Context(), n), shared.client.Status().Update(t.Context(), a))
	})

	own, all := count(t, "spec.nodeName="+first), count(t, "")
	latencies := make([]time.Duration, nodes*each)
	took := parallel(nodes*each, func(i int) error {
		of := pod.Name
		if i%nodes > 0 {
			of = other(i%nodes - 1)
		}
		began := time.Now()
		defer func() { latencies[i] = time.Since(began) }()
		return shared.client.Create(t.Context(), &checkpointv1alpha1.PodCheckpoint{
			ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: fmt.Sprintf("scale-%d", i)},
			Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: of}})
	})
	// One node's are completed; the others' agents have nothing to do with it.
	for i := 0; i < nodes*each; i += nodes {
		c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: fmt.Sprintf("scale-%d", i)}}
		complete(t, agent, c, pod)
	}
	must(t, eventually(t.Context(), func() error {
		if got := own.Load(); got != int64(2*each) {
			return fmt.Errorf("the agent of one node was told %d events, want %d: each of its %d objects' creation and completion", got, 2*each, each)
		}
		if got := all.Load(); got < int64((nodes+1)*each) {
			return fmt.Errorf("a watch of all was told %d events of at least %d", got, (nodes+1)*each)
		}
		return nil
	}))

	var c checkpointv1alpha1.PodCheckpoint
	must(t, shared.client.Get(t.Context(), client.ObjectKey{Namespace: ns, Name: "scale-0"}, &c))
	stored, err := json.Marshal(&c)
	must(t, err)
	reconciles, seconds := reconciled(t)
	slices.Sort(latencies)
	t.Logf("%d nodes, %d PodCheckpoints created in %s (%.0f a second), median %s, 99th percentile %s each",
		nodes, nodes*each, took.Round(time.Millisecond), float64(nodes*each)/took.Seconds(), latencies[len(latencies)/2], latencies[len(latencies)*99/100])
	t.Logf("events: %d to the agent of one node, %d to a watch of all", own.Load(), all.Load())
	t.Logf("a Ready object: %d bytes as JSON", len(stored))
	t.Logf("controller: %d reconciles, %.2f ms each; heap %.1f MiB more than before", reconciles, 1000*seconds/float64(max(reconciles, 1)), float64(heapInUse()-heap)/(1<<20))
}

// count counts the events that a watch of PodCheckpoints is told.
func count(t *testing.T, selector string) *atomic.Int64 {
	t.Helper()
	set, err := dynamic.NewForConfig(shared.admin)
	must(t, err)
	ctx, stop := context.WithCancel(t.Context())
	t.Cleanup(stop)
	resource := set.Resource(checkpointv1alpha1.GroupVersion.WithResource("podcheckpoints"))
	list, err := resource.List(ctx, metav1.ListOptions{FieldSelector: selector, Limit: 1})
	must(t, err)
	version := list.GetResourceVersion()
	var told atomic.Int64
	go func() {
		// The API server ends a watch that cannot keep up; it goes on from where it was.
		for ctx.Err() == nil {
			w, err := resource.Watch(ctx, metav1.ListOptions{FieldSelector: selector, ResourceVersion: version})
			if err != nil {
				time.Sleep(100 * time.Millisecond)
				continue
			}
			for e := range w.ResultChan() {
				if object, ok := e.Object.(client.Object); ok && (e.Type == watch.Added || e.Type == watch.Modified || e.Type == watch.Deleted) {
					version = object.GetResourceVersion()
					told.Add(1)
				}
			}
		}
	}()
	return &told
}

// reconciled returns how many reconciles the controller has done, and their time.
func reconciled(t *testing.T) (n uint64, seconds float64) {
	t.Helper()
	families, err := shared.registry.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() == "stasis_podcheckpoint_reconcile_duration_seconds" {
			for _, m := range f.GetMetric() {
				n, seconds = n+m.GetHistogram().GetSampleCount(), seconds+m.GetHistogram().GetSampleSum()
			}
		}
	}
	return n, seconds
}

func heapInUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
