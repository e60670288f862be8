package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

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
