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
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

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
	restored, givenUp     int
	hurt                  int // Pods that lost a container to a kill of CRIU
	reasons               map[string]int
	slowest               time.Duration
	survivedCRIU, retried int
	cut                   int // restored containers that containerd ended in their start
	deserted              int // network namespaces that a killed containerd left
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
	fmt.Fprintf(s.out, "Pods whose CRIU was killed: %d ran on, %d were restarted by the kubelet\n", s.survivedCRIU, s.hurt)
	fmt.Fprintf(s.out, "checkpoints: %d Ready; %d failed, %d of these were taken when asked for again\n", s.ready, s.failed, s.retried)
	for _, reason := range slices.SortedFunc(maps.Keys(s.reasons), func(a, b string) int {
		return cmp.Or(s.reasons[b]-s.reasons[a], strings.Compare(a, b))
	}) {
		fmt.Fprintf(s.out, "  %4d  %s\n", s.reasons[reason], reason)
	}
	fmt.Fprintf(s.out, "restores: %d, %d of them at the second attempt\n", s.restored, s.givenUp)
	fmt.Fprintf(s.out, "restored containers of several that a kill ended in their start: %d\n", s.cut)
	fmt.Fprintf(s.out, "network namespaces that a killed containerd left: %d\n", s.deserted)
	fmt.Fprintf(s.out, "soak: %s rounds=%d kills=%d checkpoints=%d restores=%d\n", outcome, s.rounds, kills, s.ready, s.restored)
}

// subject is one Pod of a round and what is known of it.
type subject struct {
	shape
	source     *corev1.Pod
	before     map[string]reading // by container, before the checkpoint was asked for
	checkpoint string             // that is Ready
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
		text = append(text, subject.name)
	}
	d := &damage{kills: map[string]int{}, hurt: map[string]bool{}, killed: map[string]bool{}}
	defer func() {
		for component, n := range d.kills {
			s.kills[component] += n
		}
		s.slowest = max(s.slowest, d.slowest)
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

// eventually repeats check, which may well fail while something is down.
func eventually(ctx context.Context, limit time.Duration, what string, check func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return nil
		}
		var final *finalError
		if errors.As(err, &final) || time.Now().After(deadline) || !pause(ctx, 200*time.Millisecond) {
			return fmt.Errorf("%s, not within %s: %w", what, limit, err)
		}
	}
}

// finalError is one that waiting does not help.
type finalError struct{ error }

func (s *soak) create(ctx context.Context, object client.Object) error {
	return eventually(ctx, patience, "creating "+object.GetName(), func() error {
		object.SetResourceVersion("")
		err := s.cluster.Create(ctx, object)
		if apierrors.IsAlreadyExists(err) { // the answer to an earlier attempt was lost
			return s.cluster.Get(ctx, client.ObjectKeyFromObject(object), object)
		}
		return err
	})
}

func (s *soak) beginSources(ctx context.Context, namespace string, subjects []*subject) error {
	for _, subject := range subjects {
		subject.source = subject.pod(namespace, subject.name, "")
		if err := s.create(ctx, subject.source); err != nil {
			return err
		}
	}
	for _, subject := range subjects {
		if err := s.waitReady(ctx, subject.source); err != nil {
			return err
		}
		for _, container := range subject.counts {
			if err := eventually(ctx, patience, subject.name+" counts", func() error {
				r, err := s.read(ctx, subject.source, container, false)
				if subject.before[container] = r; err == nil && r.last < 10 {
					err = fmt.Errorf("it is at %d", r.last)
				}
				return err
			}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *soak) waitReady(ctx context.Context, pod *corev1.Pod) error {
	return eventually(ctx, patience, "Pod "+pod.Name+" is ready", func() error {
		if err := s.cluster.Get(ctx, client.ObjectKeyFromObject(pod), pod); err != nil {
			return err
		}
		if pod.Status.Phase == corev1.PodFailed {
			return &finalError{fmt.Errorf("it failed: %s: %s", pod.Status.Reason, pod.Status.Message)}
		}
		if !ready(pod) {
			return fmt.Errorf("phase %s, %+v", pod.Status.Phase, pod.Status.ContainerStatuses)
		}
		return nil
	})
}

func ready(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

func (s *soak) read(ctx context.Context, pod *corev1.Pod, container string, gaps bool) (reading, error) {
	log, err := s.cluster.Log(ctx, pod, container)
	if err != nil {
		return reading{}, err
	}
	return read(log, gaps)
}

// checkpoint asks for a checkpoint and waits for its end.
func (s *soak) checkpoint(ctx context.Context, name string, pod *corev1.Pod) (metav1.Condition, error) {
	object := &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: name},
		Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: pod.Name, SourcePodUID: &pod.UID, TimeoutSeconds: new(int32(30))},
	}
	if err := s.create(ctx, object); err != nil {
		return metav1.Condition{}, err
	}
	var condition metav1.Condition
	err := eventually(ctx, patience, "PodCheckpoint "+name+" ends", func() error {
		if err := s.cluster.Get(ctx, client.ObjectKeyFromObject(object), object); err != nil {
			return err
		}
		found := meta.FindStatusCondition(object.Status.Conditions, checkpointv1alpha1.PodCheckpointReady)
		if found == nil {
			return errors.New("no condition Ready")
		}
		condition = *found
		if found.Status != metav1.ConditionTrue && found.Reason != checkpointv1alpha1.ReasonCheckpointFailed {
			return fmt.Errorf("it is %s: %s", found.Reason, found.Message)
		}
		return nil
	})
	return condition, err
}

// each does something for all subjects at the same time.
func each(subjects []*subject, do func(*subject) error) error {
	errs := make(chan error, len(subjects))
	for _, subject := range subjects {
		go func() {
			err := do(subject)
			if err != nil {
				err = fmt.Errorf("%s: %w", subject.name, err)
			}
			errs <- err
		}()
	}
	var all []error
	for range subjects {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

func (s *soak) checkpointAll(ctx context.Context, subjects []*subject, strikes []strike, d *damage) error {
	sources := map[string]bool{}
	for _, subject := range subjects {
		sources[string(subject.source.UID)] = true
	}
	err := s.attack(ctx, strikes, d, sources, func(ctx context.Context) error {
		return each(subjects, func(subject *subject) error {
			condition, err := s.checkpoint(ctx, subject.name, subject.source)
			if err != nil {
				return err
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			if condition.Status == metav1.ConditionTrue {
				subject.checkpoint = subject.name
				s.ready++
			} else {
				s.failed++
				s.reasons[class(condition.Message)]++
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	return s.noneFrozen(ctx, 2*time.Second)
}

// noneFrozen is asked when no operation is under way.
func (s *soak) noneFrozen(ctx context.Context, within time.Duration) error {
	return eventually(ctx, within, "nothing stands still", func() error {
		if still := s.watcher.frozen(); len(still) > 0 {
			return fmt.Errorf("these do: %v", slices.Collect(maps.Keys(still)))
		}
		return nil
	})
}

var particulars = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{12,}|[0-9]+(\.[0-9]+)?`)

// class is a message without what differs from case to case.
func class(message string) string {
	text := []rune(particulars.ReplaceAllString(strings.ReplaceAll(message, "\n", " "), "#"))
	return string(text[:min(len(text), 160)])
}

// healthy waits until everything that was killed is back.
func (s *soak) healthy(ctx context.Context) error {
	pause(ctx, time.Second) // so that nothing is taken for well that nobody has missed yet
	return eventually(ctx, patience, "the cluster is well", func() error {
		var nodes corev1.NodeList
		if err := s.cluster.List(ctx, &nodes); err != nil {
			return err
		}
		for _, node := range nodes.Items {
			if !slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
				return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
			}) {
				return fmt.Errorf("node %s is not Ready", node.Name)
			}
		}
		var pods corev1.PodList
		if err := s.cluster.List(ctx, &pods, client.InNamespace(system)); err != nil {
			return err
		}
		if len(pods.Items) != len(nodes.Items)+2 {
			return fmt.Errorf("%d Pods in %s", len(pods.Items), system)
		}
		for _, pod := range pods.Items {
			if !ready(&pod) || pod.DeletionTimestamp != nil {
				return fmt.Errorf("pod %s is not ready", pod.Name)
			}
		}
		return nil
	})
}

// again takes the checkpoints that failed, undisturbed: nothing that the
// adversary did may keep them from being taken.
func (s *soak) again(ctx context.Context, subjects []*subject, d *damage) error {
	for _, subject := range subjects {
		if subject.checkpoint != "" || d.hurt[string(subject.source.UID)] {
			continue
		}
		name := subject.name + "-again"
		condition, err := s.checkpoint(ctx, name, subject.source)
		if err != nil {
			return err
		}
		if condition.Status != metav1.ConditionTrue {
			return fmt.Errorf("PodCheckpoint %s failed though nothing was killed any more: %s", name, condition.Message)
		}
		subject.checkpoint = name
		s.ready++
		s.retried++
	}
	return nil
}

// judgeSources looks whether any source was harmed.
func (s *soak) judgeSources(ctx context.Context, subjects []*subject, d *damage) error {
	return each(subjects, func(subject *subject) error {
		pod := subject.source
		if err := s.waitReady(ctx, pod); err != nil {
			return fmt.Errorf("the source: %w", err)
		}
		restarts := int32(0)
		for _, status := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
			restarts += status.RestartCount
		}
		d.mu.Lock()
		hurt, known := d.hurt[string(pod.UID)]
		if known && hurt { // counted once
			d.hurt[string(pod.UID)] = false
			if restarts > 0 {
				s.hurt++
			} else {
				s.survivedCRIU++
			}
		}
		gaps := d.gaps
		d.mu.Unlock()
		if known && restarts > 0 {
			return nil
		}
		if restarts > 0 {
			return fmt.Errorf("the source was restarted: %+v", pod.Status.ContainerStatuses)
		}
		for _, container := range subject.counts {
			was := subject.before[container]
			if err := eventually(ctx, 20*time.Second, "container "+container+" of the source counts on", func() error {
				now, err := s.read(ctx, pod, container, gaps)
				switch {
				case err != nil:
					return err
				case now.nonce != was.nonce:
					return &finalError{fmt.Errorf("nonce %s, was %s", now.nonce, was.nonce)}
				case now.last < was.last+10:
					return fmt.Errorf("it is at %d, was at %d", now.last, was.last)
				}
				subject.before[container] = reading{first: was.first, last: was.last, nonce: now.nonce}
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	})
}

func (s *soak) restoreAll(ctx context.Context, subjects []*subject, strikes []strike, d *damage) error {
	subjects = slices.DeleteFunc(slices.Clone(subjects), func(subject *subject) bool { return subject.checkpoint == "" })
	restored := map[*subject]*corev1.Pod{}
	for _, subject := range subjects {
		restored[subject] = subject.pod(subject.source.Namespace, "restored-"+subject.name, subject.checkpoint)
	}
	givenUp := map[*subject]error{}
	err := s.attack(ctx, strikes, d, nil, func(ctx context.Context) error {
		return each(subjects, func(subject *subject) error {
			if err := s.create(ctx, restored[subject]); err != nil {
				return err
			}
			err := s.waitReady(ctx, restored[subject])
			var final *finalError
			if errors.As(err, &final) {
				d.mu.Lock()
				givenUp[subject] = err
				d.mu.Unlock()
				return nil
			}
			return err
		})
	})
	if err == nil && len(strikes) > 0 {
		err = s.healthy(ctx)
	}
	if err != nil {
		return err
	}
	return each(subjects, func(subject *subject) error {
		pod := restored[subject]
		if first := givenUp[subject]; first != nil {
			pod = subject.pod(pod.Namespace, pod.Name+"-again", subject.checkpoint)
			if err := errors.Join(s.create(ctx, pod), s.waitReady(ctx, pod)); err != nil {
				return fmt.Errorf("a Ready checkpoint does not restore: %w; at first: %w", err, first)
			}
		}
		cut := s.cutShort(ctx, pod, d)
		for _, container := range subject.counts {
			if cut[container] {
				continue
			}
			if err := s.goesOn(ctx, pod, container, subject.before[container], d.gaps); err != nil {
				return err
			}
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		s.restored++
		s.cut += len(cut)
		if givenUp[subject] != nil {
			s.givenUp++
			s.reasons["restore: "+class(givenUp[subject].Error())]++
		}
		return nil
	})
}

// emptyOf deletes a namespace's objects of one kind and waits until they are gone.
func (s *soak) emptyOf(ctx context.Context, namespace string, kind client.Object) error {
	return eventually(ctx, patience, fmt.Sprintf("every %T of %s is deleted", kind, namespace), func() error {
		if err := s.cluster.DeleteAllOf(ctx, kind, client.InNamespace(namespace)); err != nil {
			return err
		}
		kinds, err := s.cluster.GroupVersionKindFor(kind)
		if err != nil {
			return err
		}
		left := &metav1.PartialObjectMetadataList{}
		left.SetGroupVersionKind(kinds.GroupVersion().WithKind(kinds.Kind + "List"))
		if err := s.cluster.List(ctx, left, client.InNamespace(namespace)); err != nil {
			return err
		}
		if n := len(left.Items); n > 0 {
			return fmt.Errorf("%d are left, %s among them", n, left.Items[0].Name)
		}
		return nil
	})
}

// goesOn judges a restored container: it goes on where its source was, or later.
func (s *soak) goesOn(ctx context.Context, pod *corev1.Pod, container string, was reading, gaps bool) error {
	return eventually(ctx, 20*time.Second, "container "+container+" of the restored Pod goes on", func() error {
		now, err := s.read(ctx, pod, container, gaps)
		switch {
		case err != nil:
			return err
		case now.nonce != was.nonce:
			return &finalError{fmt.Errorf("nonce %s, the source's is %s: it was started anew", now.nonce, was.nonce)}
		case now.first <= was.last:
			return &finalError{fmt.Errorf("it begins with %d, the source had counted to %d before", now.first, was.last)}
		case now.last < now.first+5:
			return fmt.Errorf("it began with %d and is at %d", now.first, now.last)
		}
		return nil
	})
}

// cutShort lists the containers of a restored Pod that containerd ended in their
// start, as it does when whoever asks it to start one is killed in that moment. Of a
// Pod of several containers such a one starts anew; a Pod's only one is restored again.
func (s *soak) cutShort(ctx context.Context, pod *corev1.Pod, d *damage) map[string]bool {
	cut := map[string]bool{}
	if d.count(kubelet)+d.count(containerd) == 0 || s.cluster.Get(ctx, client.ObjectKeyFromObject(pod), pod) != nil {
		return cut
	}
	all := slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses)
	for _, status := range all {
		if last := status.LastTerminationState.Terminated; len(all) > 1 && last != nil && last.Reason == "StartError" {
			cut[status.Name] = true
		}
	}
	return cut
}

// clear deletes what is in the round's namespace, starts the Pods of Stasis afresh
// after the last round, and looks for what is left on the nodes.
func (s *soak) clear(ctx context.Context, namespace string, d *damage, last bool) error {
	if err := s.noneFrozen(ctx, 2*time.Second); err != nil {
		return err
	}
	// One by one: the namespace controller takes its time.
	for _, kind := range []client.Object{&corev1.Pod{}, &checkpointv1alpha1.PodCheckpoint{}} {
		if err := s.emptyOf(ctx, namespace, kind); err != nil {
			return err
		}
	}
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if err := client.IgnoreNotFound(s.cluster.Delete(ctx, object)); err != nil { // goes when it goes, it is empty
		return err
	}
	var pods corev1.PodList
	if err := s.cluster.List(ctx, &pods, client.InNamespace(system)); err != nil {
		return err
	}
	for _, pod := range pods.Items {
		if last {
			if err := client.IgnoreNotFound(s.cluster.Delete(ctx, &pod)); err != nil {
				return err
			}
		}
	}
	if err := s.healthy(ctx); err != nil {
		return err
	}
	if err := s.sweep(ctx, d); err != nil {
		return err
	}
	return eventually(ctx, patience, "nothing is left on the nodes", func() error {
		var pods corev1.PodList
		if err := s.cluster.List(ctx, &pods); err != nil {
			return err
		}
		living := map[string][]string{}
		for _, pod := range pods.Items {
			living[pod.Spec.NodeName] = append(living[pod.Spec.NodeName], string(pod.UID))
		}
		return s.nodes.leftovers(living, last)
	})
}

// sweep takes away what containerd itself leaves when it is killed between making a
// network namespace and writing down that it has (its RunPodSandbox), whichever Pod
// that was for. Such are counted; any other is a leftover.
func (s *soak) sweep(ctx context.Context, d *damage) error {
	for node := range d.killed {
		names, err := s.nodes.deserted(node)
		if err != nil {
			return err
		}
		if len(names) == 0 {
			continue
		}
		pause(ctx, 5*time.Second) // those of Pods that are just going
		still, err := s.nodes.deserted(node)
		if err != nil {
			return err
		}
		for _, name := range still {
			if !slices.Contains(names, name) {
				continue
			}
			if _, err := s.cluster.OnNode(ctx, node, "umount /run/netns/"+name+" && rm /run/netns/"+name); err != nil {
				return err
			}
			s.deserted++
		}
	}
	return nil
}
