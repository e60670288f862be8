package install

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Ordinary Pods that start and stop all the time (P33). What Stasis could do to one
// shows in four ways: a request for it fails, or waits for a webhook's timeout of
// 10 s; the kubelet fails and tries again 10 s later, which it tells by a warning;
// the Pod ends otherwise than its program does; or all of it takes longer than
// before Stasis came. The last is held to loosely, for a machine has its moods; the
// others do not depend on time.
const (
	lanes = 2
	// webhookWait is half of what a webhook that does not answer costs a request.
	webhookWait = 5 * time.Second
)

// passage is what became of one ordinary Pod.
type passage struct {
	name                    string
	created, started, ended time.Duration // the request; until it was ready; from its deletion until it was gone
	wrong                   []string
}

// traffic makes ordinary Pods until it is stopped.
type traffic struct {
	stop chan struct{}
	done sync.WaitGroup

	mu   sync.Mutex
	past []passage
}

// ordinaryPods begins traffic; end stops it.
func ordinaryPods(t *testing.T, of string) *traffic {
	t.Helper()
	tr := &traffic{stop: make(chan struct{})}
	for lane := range lanes {
		tr.done.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-tr.stop:
					return
				default:
				}
				p := pass(t.Context(), fmt.Sprintf("%s-%d-%d", of, lane, i))
				tr.mu.Lock()
				tr.past = append(tr.past, p)
				tr.mu.Unlock()
			}
		})
	}
	return tr
}

// end waits until at least so many Pods have come and gone, and stops.
func (tr *traffic) end(t *testing.T, atLeast int) []passage {
	t.Helper()
	eventually(t, fmt.Sprintf("%d ordinary Pods have come and gone", atLeast), func() error {
		tr.mu.Lock()
		defer tr.mu.Unlock()
		if len(tr.past) < atLeast {
			return fmt.Errorf("%d have", len(tr.past))
		}
		return nil
	})
	close(tr.stop)
	tr.done.Wait()
	return tr.past
}

// pass makes a Pod that ends in order when it is asked to, waits until it is ready,
// deletes it, and waits until it is gone.
func pass(ctx context.Context, name string) passage {
	p := passage{name: name}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := p.through(ctx); err != nil {
		p.wrong = append(p.wrong, err.Error())
	}
	return p
}

func (p *passage) through(ctx context.Context) error {
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: p.name, Labels: map[string]string{"is": "ordinary"}},
		Spec: corev1.PodSpec{
			RestartPolicy:                corev1.RestartPolicyNever,
			AutomountServiceAccountToken: new(false),
			Containers: []corev1.Container{{Name: "main", Image: "localhost/busybox:1",
				Command: []string{"sh", "-c", "trap 'exit 0' TERM; touch /up; sleep 3600 & wait"},
				// Ready is not before it can be asked to end.
				Lifecycle: &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{
					Command: []string{"sh", "-c", "until test -e /up; do sleep 0.05; done"}}}},
			}},
		},
	}
	watching, err := it.Watch(ctx, &corev1.PodList{}, client.InNamespace(namespace), client.MatchingFields{"metadata.name": p.name})
	if err != nil {
		return err
	}
	defer watching.Stop()
	begun := time.Now()
	if err := it.Create(ctx, pod); err != nil {
		return fmt.Errorf("creating it: %w", err)
	}
	p.created = time.Since(begun)
	if _, err := follow(ctx, watching, isReady); err != nil {
		return fmt.Errorf("starting it: %w", err)
	}
	p.started = time.Since(begun)

	begun = time.Now()
	if err := it.Delete(ctx, pod); err != nil {
		return fmt.Errorf("deleting it: %w", err)
	}
	last, err := follow(ctx, watching, func(e watch.Event) bool { return e.Type == watch.Deleted })
	if err != nil {
		return fmt.Errorf("ending it: %w", err)
	}
	p.ended = time.Since(begun)
	if last.Status.Phase != corev1.PodSucceeded {
		p.wrong = append(p.wrong, fmt.Sprintf("it ended as %s: %+v", last.Status.Phase, last.Status.ContainerStatuses))
	}
	return p.warnings(ctx, last)
}

// warnings notes what the kubelet and others complained of.
func (p *passage) warnings(ctx context.Context, pod *corev1.Pod) error {
	var events corev1.EventList
	if err := it.List(ctx, &events, client.InNamespace(namespace), client.MatchingFields{"involvedObject.uid": string(pod.UID)}); err != nil {
		return err
	}
	for _, e := range events.Items {
		if e.Type == corev1.EventTypeWarning {
			p.wrong = append(p.wrong, e.Reason+": "+e.Message)
		}
	}
	return nil
}

// follow waits for an event of a Pod and returns the Pod as it was then.
func follow(ctx context.Context, watching watch.Interface, until func(watch.Event) bool) (*corev1.Pod, error) {
	phase := corev1.PodPhase("unknown")
	for {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("its phase was %s: %w", phase, ctx.Err())
		case event, open := <-watching.ResultChan():
			pod, is := event.Object.(*corev1.Pod)
			if !open || !is {
				return nil, errors.New("the watch ended")
			}
			if phase = pod.Status.Phase; until(event) {
				return pod, nil
			}
		}
	}
}

func isReady(event watch.Event) bool {
	conditions := event.Object.(*corev1.Pod).Status.Conditions
	return slices.ContainsFunc(conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// undisturbed checks that Pods passed as those before did.
func undisturbed(t *testing.T, before, now []passage) {
	t.Helper()
	for _, p := range now {
		for _, wrong := range p.wrong {
			t.Errorf("ordinary Pod %s: %s", p.name, wrong)
		}
		if p.created > webhookWait {
			t.Errorf("ordinary Pod %s: its creation was a request of %s", p.name, p.created)
		}
	}
	for what, of := range map[string]func(passage) time.Duration{
		"start": func(p passage) time.Duration { return p.started },
		"end":   func(p passage) time.Duration { return p.ended },
	} {
		was, is := times(before, of), times(now, of)
		t.Logf("%d ordinary Pods: %s took %s, at most %s; before %s, at most %s", len(now), what, median(is), slices.Max(is), median(was), slices.Max(was))
		if median(is) > 2*slices.Max(was)+time.Second {
			t.Errorf("ordinary Pods %s slowly: half of them took %s and more, before no more than %s", what, median(is), slices.Max(was))
		}
	}
}

func times(passages []passage, of func(passage) time.Duration) []time.Duration {
	var all []time.Duration
	for _, p := range passages {
		all = append(all, of(p))
	}
	return all
}

func median(times []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(times))[len(times)/2].Round(time.Millisecond)
}
