package controller

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// made is a checkpoint of a Pod of a workload, so many minutes old.
func aged(namespace, pod, owner string, minutes int, bytes int64) *checkpointv1alpha1.PodCheckpoint {
	c := inStore(fmt.Sprintf("%s-%d", pod, minutes), "", "", "")
	c.Namespace, c.Spec.SourcePodName, c.Status.Store.NewBytes = namespace, pod, bytes
	done := metav1.NewTime(born.Add(-time.Duration(minutes) * time.Minute))
	c.Status.CompletionTime = &done
	if owner != "" {
		yes := true
		c.Status.CheckpointedPodTemplate = &corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{
			OwnerReferences: []metav1.OwnerReference{{Kind: "StatefulSet", Name: owner, Controller: &yes}}}}
	}
	return c
}

func TestRetentionKeepsTheLatest(t *testing.T) {
	count := func(n int32) *int32 { return &n }
	bytes := resource.MustParse("250")
	in := []*checkpointv1alpha1.PodCheckpoint{
		aged("n", "a-0", "a", 10, 100), aged("n", "a-0", "a", 30, 100), aged("n", "a-1", "a", 20, 100), aged("n", "b", "", 40, 100), aged("m", "a-0", "a", 50, 100),
	}
	for name, tc := range map[string]struct {
		by   checkpointv1alpha1.CheckpointRetention
		want string // names, the oldest first
	}{
		"nothing":                 {checkpointv1alpha1.CheckpointRetention{}, ""},
		"per Pod":                 {checkpointv1alpha1.CheckpointRetention{MaxPerPod: count(1)}, "a-0-30"},
		"per workload":            {checkpointv1alpha1.CheckpointRetention{MaxPerWorkload: count(1)}, "a-0-30 a-1-20"},
		"two per workload":        {checkpointv1alpha1.CheckpointRetention{MaxPerWorkload: count(2)}, "a-0-30"},
		"age":                     {checkpointv1alpha1.CheckpointRetention{MaxAge: &metav1.Duration{Duration: 35 * time.Minute}}, "a-0-50 b-40"},
		"bytes":                   {checkpointv1alpha1.CheckpointRetention{MaxBytesPerNamespace: &bytes}, "b-40 a-0-30"},
		"bytes that none fits in": {checkpointv1alpha1.CheckpointRetention{MaxBytesPerNamespace: resource.NewQuantity(1, resource.BinarySI)}, "b-40 a-0-30 a-1-20"},
		"one is enough":           {checkpointv1alpha1.CheckpointRetention{MaxPerPod: count(1), MaxAge: &metav1.Duration{Duration: 45 * time.Minute}}, "a-0-50 a-0-30"},
	} {
		var names []string
		for _, due := range retired(&tc.by, in, born) {
			names = append(names, due.checkpoint.Name)
			if due.why == "" {
				t.Errorf("%s: no reason for %s", name, due.checkpoint.Name)
			}
		}
		if got := strings.Join(names, " "); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

// Whatever is deleted, what is left is left by a second look too: retention comes to rest.
func TestWhatRetentionHasLeftItLeavesAgain(t *testing.T) {
	for seed := range uint64(3000) {
		r := rand.New(rand.NewPCG(seed, 0))
		var in []*checkpointv1alpha1.PodCheckpoint // the latest first
		for i := range r.IntN(20) {
			in = append(in, aged([]string{"n", "m"}[r.IntN(2)], []string{"p", "q", "r"}[r.IntN(3)], []string{"", "a"}[r.IntN(2)], i, r.Int64N(100)))
		}
		by := &checkpointv1alpha1.CheckpointRetention{}
		most := 1 + r.Int32N(3)
		if r.IntN(2) == 0 {
			by.MaxPerPod = &most
		}
		if r.IntN(2) == 0 {
			by.MaxPerWorkload = &most
		}
		if r.IntN(2) == 0 {
			by.MaxBytesPerNamespace = resource.NewQuantity(1+r.Int64N(200), resource.BinarySI)
		}
		gone := map[*checkpointv1alpha1.PodCheckpoint]bool{}
		for _, due := range retired(by, in, born) {
			gone[due.checkpoint] = true
		}
		var left []*checkpointv1alpha1.PodCheckpoint
		latest := map[string]bool{}
		for _, c := range in {
			if !latest[c.Namespace] && gone[c] {
				t.Fatalf("seed %d: the latest of namespace %s went", seed, c.Namespace)
			}
			latest[c.Namespace] = true
			if !gone[c] {
				left = append(left, c)
			}
		}
		if again := retired(by, left, born); len(again) > 0 {
			t.Fatalf("seed %d: %s goes later: %s", seed, again[0].checkpoint.Name, again[0].why)
		}
	}
}
