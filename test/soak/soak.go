package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/test/e2e/cluster"
)

const (
	// patience is long enough for what was killed to come back, a kubelet's
	// backoff of 20 s included.
	patience = 150 * time.Second
	system   = "stasis-system"
)

// soak is one run.
type soak struct {
	rounds, first int
	seed          uint64
	out           io.Writer

	cluster *cluster.Cluster
	nodes   *nodes
	watcher *watcher

	total
	amid atomic.Int64 // kills of an agent while it kept a source frozen
}

// total is what is reported at the end.
type total struct {
	kills                 map[string]int
	ready, failed         int
	restored, lazily      int
	givenUp               int
	hurt                  int // Pods that lost a container to a kill of CRIU
	reasons               map[string]int
	slowest               time.Duration
	survivedCRIU, retried int
	cut                   int // restored containers that containerd ended in their start
	deserted              int // network namespaces that a killed containerd left
	trapped               int // Pods that lost a process to a kill of CRIU, and no container
	lost                  int // shims that containerd lost
}

func (s *soak) hit(amid bool) {
	if amid {
		s.amid.Add(1)
	}
}

func (s *soak) run(ctx context.Context, kubeconfig string) (err error) {
	root, err := cluster.Root()
	if err != nil {
		return err
	}
	fmt.Fprintf(s.out, "soak: seed=%d rounds=%d first=%d\n", s.seed, s.rounds, s.first)
	state := filepath.Join(root, ".devcluster-soak")
	if kubeconfig != "" {
		state = filepath.Dir(kubeconfig)
		s.cluster, err = cluster.Attach(root, state)
	} else {
		s.cluster, err = cluster.Up(ctx, root, state, 2)
		defer func() { err = errors.Join(err, s.cluster.Down(context.WithoutCancel(ctx))) }()
		if err == nil {
			err = s.cluster.Install(ctx)
		}
	}
	if err != nil {
		return err
	}
	if s.nodes, err = s.findNodes(ctx, state); err != nil {
		return err
	}
	s.watcher = &watcher{nodes: s.nodes, since: map[cgroup]time.Time{}}
	watching, stop := context.WithCancel(ctx)
	defer stop()
	go s.watcher.run(watching)
	s.kills, s.reasons = map[string]int{}, map[string]int{}
	for number := s.first; number < s.first+s.rounds; number++ {
		if err := s.round(ctx, number); err != nil {
			s.report("failed")
			if ctx.Err() == nil {
				s.cluster.Diagnose(ctx, s.out)
			}
			return fmt.Errorf("round %d: %w\nagain: make soak SEED=%d FIRST=%d ROUNDS=1", number, err, s.seed, number)
		}
	}
	s.report("ok")
	return nil
}

func (s *soak) report(outcome string) {
	kills := 0
	for _, component := range slices.Sorted(maps.Keys(s.kills)) {
		fmt.Fprintf(s.out, "killed %-15s %4d\n", component, s.kills[component])
		kills += s.kills[component]
	}
	fmt.Fprintf(s.out, "kills of an agent while a source was frozen: %d, thawed after %s at most\n", s.amid.Load(), s.slowest.Round(time.Millisecond))
	fmt.Fprintf(s.out, "Pods whose CRIU was killed: %d ran on, %d of these without a process that was lost; %d were restarted by the kubelet\n", s.survivedCRIU, s.trapped, s.hurt)
	fmt.Fprintf(s.out, "checkpoints: %d Ready; %d failed, %d of these were taken when asked for again\n", s.ready, s.failed, s.retried)
	for _, reason := range slices.SortedFunc(maps.Keys(s.reasons), func(a, b string) int {
		return cmp.Or(s.reasons[b]-s.reasons[a], strings.Compare(a, b))
	}) {
		fmt.Fprintf(s.out, "  %4d  %s\n", s.reasons[reason], reason)
	}
	fmt.Fprintf(s.out, "restores: %d, %d of them lazy, %d at the second attempt\n", s.restored, s.lazily, s.givenUp)
	fmt.Fprintf(s.out, "restored containers of several that a kill ended in their start: %d\n", s.cut)
	fmt.Fprintf(s.out, "network namespaces that a killed containerd left: %d; shims that it lost: %d\n", s.deserted, s.lost)
	fmt.Fprintf(s.out, "soak: %s rounds=%d kills=%d checkpoints=%d restores=%d\n", outcome, s.rounds, kills, s.ready, s.restored)
}

// subject is one Pod of a round and what is known of it.
type subject struct {
	shape
	source     *corev1.Pod
	before     map[string]reading // by container, before the checkpoint was asked for
	checkpoint string             // that is Ready
	memory     string             // when its copies have it: lazy or eager
}

// restored is a copy of it to make.
func (s *subject) restored(name string) *corev1.Pod {
	pod := s.pod(s.source.Namespace, name, s.checkpoint)
	metav1.SetMetaDataAnnotation(&pod.ObjectMeta, checkpointv1alpha1.AnnotationRestoreMemory, s.memory)
	return pod
}

// round is done in a namespace of its own.
func (s *soak) round(ctx context.Context, number int) error {
	random := rand.New(rand.NewPCG(s.seed, uint64(number)))
	begin := time.Now()
	var subjects []*subject
	for _, i := range random.Perm(len(shapes))[:3] {
		subjects = append(subjects, &subject{shape: shapes[i], before: map[string]reading{}})
	}
	var early, late []strike
	for range 1 + random.IntN(2) {
		early = append(early, draw(random, targets, len(s.nodes.anchor)))
	}
	for range random.IntN(3) {
		late = append(late, draw(random, slices.DeleteFunc(slices.Clone(targets), func(t string) bool { return t == criu }), len(s.nodes.anchor)))
	}
	var text []string
	for _, subject := range subjects {
		subject.memory = []string{"lazy", "eager"}[random.IntN(2)]
		text = append(text, subject.name+"/"+subject.memory)
	}
	d := &damage{kills: map[string]int{}, hurt: map[string]bool{}, trapped: map[string]bool{}, killed: map[string]bool{}}
	defer func() {
		for component, n := range d.kills {
			s.kills[component] += n
		}
		s.slowest = max(s.slowest, d.slowest)
		s.trapped += len(d.trapped)
		fmt.Fprintf(s.out, "round %d: %s; killed %v; %s\n", number, strings.Join(text, " "), d.kills, time.Since(begin).Round(time.Second))
	}()

	namespace := fmt.Sprintf("soak-%d", number)
	if err := s.create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"begin", func() error { return s.beginSources(ctx, namespace, subjects) }},
		{"checkpoint", func() error { return s.checkpointAll(ctx, subjects, early, d) }},
		{"recover", func() error { return s.healthy(ctx) }},
		{"again", func() error { return s.again(ctx, subjects, d) }},
		{"sources", func() error { return s.judgeSources(ctx, subjects, d) }},
		{"restore", func() error { return s.restoreAll(ctx, subjects, late, d) }},
		{"sources", func() error { return s.judgeSources(ctx, subjects, d) }},
		{"clear", func() error { return s.clear(ctx, namespace, d, number == s.first+s.rounds-1) }},
	} {
		begin := time.Now()
		err := step.do()
		if took := time.Since(begin); took >= time.Second {
			text = append(text, fmt.Sprintf("%s=%s", step.name, took.Round(time.Second)))
		}
		if err := errors.Join(append(d.wrong, err)...); err != nil {
			return err
		}
	}
	return errors.Join(d.wrong...)
}
