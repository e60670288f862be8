package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

const (
	// patience is how long anything may take that ought to happen.
	patience = 90 * time.Second
	// often is how often it is asked whether an application answers, and so how
	// exactly a start is timed.
	often = 20 * time.Millisecond
	// colds is how often a cold start is timed. The first one, which also reads the
	// image from disk, does not count when there are others.
	colds = 4
)

// row takes one application through all of its rounds.
func (z *zoo) row(ctx context.Context, a *app, archive string) result {
	r := result{app: a}
	scene := &scene{zoo: z, app: a, result: &r, namespace: "zoo-" + a.name}
	if r.err = scene.play(ctx, archive); r.err != nil && ctx.Err() == nil {
		fmt.Fprintln(z.out, scene.describe(ctx))
	}
	scene.leave(ctx)
	z.say(a, "%s", r.verdict())
	return r
}

// scene is an application's own namespace.
type scene struct {
	*zoo
	*app
	*result
	namespace string
}

func (s *scene) play(ctx context.Context, archive string) error {
	if out, err := s.Devcluster(ctx, "load", archive); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	if err := s.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.namespace}}); err != nil {
		return err
	}
	files := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: "zoo"}, Data: s.files}
	if err := s.Create(ctx, files); err != nil {
		return err
	}
	if err := eventually(ctx, "the default ServiceAccount exists", func() error {
		return s.Get(ctx, client.ObjectKey{Namespace: s.namespace, Name: "default"}, &corev1.ServiceAccount{})
	}); err != nil {
		return err
	}
	source, uninterrupted, err := s.coldStarts(ctx)
	if err != nil {
		return fmt.Errorf("cold start: %w", err)
	}
	if s.Refused != "" {
		return s.refuse(ctx, source)
	}
	for round := 1; round <= s.rounds; round++ {
		if source, err = s.round(ctx, source, round); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
	}
	if !s.Curve {
		return nil
	}
	last, err := s.state(ctx, source)
	if err != nil {
		return err
	}
	return eventually(ctx, "the curve is that of the uninterrupted run", func() error {
		whole, err := s.state(ctx, uninterrupted)
		if err != nil {
			return err
		}
		return deviates(last.curve, whole.curve)
	})
}

// coldStarts times ordinary Pods and leaves the last one, to be checkpointed, and,
// where there is a curve, another one that will not be.
func (s *scene) coldStarts(ctx context.Context) (source, uninterrupted *corev1.Pod, err error) {
	times := 1
	if s.rounds > 1 && s.Refused == "" {
		times = colds
	}
	for i := range times {
		if source != nil {
			if err := s.remove(ctx, source); err != nil {
				return nil, nil, err
			}
		}
		source = s.pod(s.namespace, fmt.Sprintf("cold-%d", i), "")
		took, _, err := s.start(ctx, source)
		if err != nil {
			return nil, nil, err
		}
		if i > 0 || times == 1 {
			s.cold = append(s.cold, took)
		}
		s.say(s.app, "cold start %d ms", took.Milliseconds())
	}
	if s.Curve {
		uninterrupted = s.pod(s.namespace, "uninterrupted", "")
		if _, _, err := s.start(ctx, uninterrupted); err != nil {
			return nil, nil, err
		}
	}
	return source, uninterrupted, nil
}

// start creates a Pod and takes the time until it answers.
func (s *scene) start(ctx context.Context, pod *corev1.Pod) (time.Duration, state, error) {
	begin := time.Now()
	if err := s.Create(ctx, pod); err != nil {
		return 0, state{}, err
	}
	var took time.Duration
	if s.files["answer"] != "" {
		if err := eventually(ctx, "Pod "+pod.Name+" answers", func() error {
			_, err := s.exec(ctx, pod, script("answer"))
			return err
		}); err != nil {
			return 0, state{}, err
		}
		took = time.Since(begin)
	}
	var now state
	err := eventually(ctx, "Pod "+pod.Name+" says how it is", func() (err error) {
		now, err = s.state(ctx, pod)
		return err
	})
	if took == 0 {
		took = time.Since(begin)
	}
	return took, now, err
}

func (s *scene) state(ctx context.Context, pod *corev1.Pod) (state, error) {
	out, err := s.exec(ctx, pod, s.Probe)
	if err != nil {
		return state{}, err
	}
	answer, err := parse(out)
	if err == nil {
		err = s.lacks(answer)
	}
	return answer, err
}

func (s *scene) exec(ctx context.Context, pod *corev1.Pod, command []string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return s.Exec(ctx, pod, s.spec.Containers[0].Name, command...)
}

// step runs one of the application's scripts, where it has it.
func (s *scene) step(ctx context.Context, pod *corev1.Pod, name string) error {
	if s.files[name] == "" {
		return nil
	}
	out, err := s.exec(ctx, pod, script(name))
	if err != nil {
		return fmt.Errorf("script %s: %w: %s", name, err, strings.TrimSpace(out))
	}
	return nil
}

// round checkpoints a Pod, restores it as another, and returns that one. In odd
// rounds the source is kept and must go on as well; in even ones it is gone
// before its copy comes.
func (s *scene) round(ctx context.Context, source *corev1.Pod, round int) (*corev1.Pod, error) {
	if err := s.step(ctx, source, "before"); err != nil {
		return nil, err
	}
	before, err := s.state(ctx, source)
	if err != nil {
		return nil, err
	}
	checkpoint, err := s.take(ctx, source, fmt.Sprintf("round-%d", round))
	if err != nil {
		return nil, err
	}
	keep := round%2 == 1
	if !keep {
		if err := s.remove(ctx, source); err != nil {
			return nil, err
		}
	}
	restored := s.pod(s.namespace, fmt.Sprintf("restored-%d", round), checkpoint.Name)
	took, after, err := s.start(ctx, restored)
	if err != nil {
		return nil, fmt.Errorf("restored: %w", err)
	}
	s.restore = append(s.restore, took)
	s.say(s.app, "round %d: checkpoint %d ms, frozen %d ms, restore %d ms", round,
		s.checkpoint[len(s.checkpoint)-1].Milliseconds(), checkpoint.Status.FreezeDuration.Milliseconds(), took.Milliseconds())
	if err := s.goesOn(ctx, restored, before, after); err != nil {
		return nil, fmt.Errorf("restored: %w", err)
	}
	if keep {
		now, err := s.state(ctx, source)
		if err == nil {
			err = s.goesOn(ctx, source, before, now)
		}
		if err == nil {
			err = s.unharmed(ctx, source)
		}
		if err != nil {
			return nil, fmt.Errorf("the source, which ran on: %w", err)
		}
	}
	if err := s.step(ctx, restored, "after"); err != nil {
		return nil, fmt.Errorf("restored: %w", err)
	}
	if err := s.unharmed(ctx, restored); err != nil {
		return nil, err
	}
	if keep {
		if err := s.remove(ctx, source); err != nil {
			return nil, err
		}
	}
	return restored, s.Delete(ctx, checkpoint)
}

// goesOn judges a first state after a checkpoint, and that it changes from then.
func (s *scene) goesOn(ctx context.Context, pod *corev1.Pod, before, after state) error {
	if err := s.follows(after, before); err != nil {
		return err
	}
	return eventually(ctx, "it goes on", func() error {
		later, err := s.state(ctx, pod)
		if err != nil {
			return err
		}
		if err := s.follows(later, after); err != nil {
			return &wrongError{err.Error()}
		}
		return s.stalled(later, after)
	})
}

// ended asks for a checkpoint and waits for its end.
func (s *scene) ended(ctx context.Context, source *corev1.Pod, name string) (*checkpointv1alpha1.PodCheckpoint, metav1.Condition, error) {
	checkpoint := &checkpointv1alpha1.PodCheckpoint{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name},
		Spec:       checkpointv1alpha1.PodCheckpointSpec{SourcePodName: source.Name},
	}
	if err := s.Create(ctx, checkpoint); err != nil {
		return nil, metav1.Condition{}, err
	}
	var ready metav1.Condition
	err := eventually(ctx, "checkpoint "+name+" ends", func() error {
		if err := s.Get(ctx, client.ObjectKeyFromObject(checkpoint), checkpoint); err != nil {
			return err
		}
		found := meta.FindStatusCondition(checkpoint.Status.Conditions, checkpointv1alpha1.PodCheckpointReady)
		if found == nil {
			return errors.New("it has no condition Ready")
		}
		if ready = *found; ready.Status != metav1.ConditionTrue && ready.Reason != checkpointv1alpha1.ReasonCheckpointFailed {
			return fmt.Errorf("%s: %s", ready.Reason, ready.Message)
		}
		return nil
	})
	return checkpoint, ready, err
}

func (s *scene) take(ctx context.Context, source *corev1.Pod, name string) (*checkpointv1alpha1.PodCheckpoint, error) {
	begin := time.Now()
	checkpoint, ready, err := s.ended(ctx, source, name)
	took := time.Since(begin)
	switch {
	case err != nil:
		return nil, err
	case ready.Status != metav1.ConditionTrue:
		return nil, fmt.Errorf("checkpoint: %s: %s", ready.Reason, ready.Message)
	case checkpoint.Status.FreezeDuration == nil || checkpoint.Status.Size == nil:
		return nil, errors.New("the checkpoint is Ready without freezeDuration or size")
	}
	s.checkpoint = append(s.checkpoint, took)
	s.frozen = append(s.frozen, checkpoint.Status.FreezeDuration.Duration)
	s.bytes = append(s.bytes, checkpoint.Status.Size.LogicalBytes)
	return checkpoint, nil
}

// refuse wants the checkpoint to fail before the Pod is frozen, for the reason
// given, and the Pod to go on.
func (s *scene) refuse(ctx context.Context, source *corev1.Pod) error {
	before, err := s.state(ctx, source)
	if err != nil {
		return err
	}
	checkpoint, ready, err := s.ended(ctx, source, "refused")
	switch {
	case err != nil:
		return err
	case ready.Status == metav1.ConditionTrue:
		return errors.New("it was checkpointed")
	case !strings.Contains(ready.Message, s.Refused):
		return fmt.Errorf("the checkpoint fails without a word of %q: %s", s.Refused, ready.Message)
	case checkpoint.Status.FreezeDuration != nil:
		return fmt.Errorf("it was frozen for %s before it was refused", checkpoint.Status.FreezeDuration.Duration)
	}
	s.refusal = ready.Message
	after, err := s.state(ctx, source)
	if err != nil {
		return err
	}
	return errors.Join(s.goesOn(ctx, source, before, after), s.unharmed(ctx, source))
}

// unharmed checks that no container was ever started anew.
func (s *scene) unharmed(ctx context.Context, pod *corev1.Pod) error {
	return eventually(ctx, "the containers of Pod "+pod.Name+" are well", func() error {
		if err := s.Get(ctx, client.ObjectKeyFromObject(pod), pod); err != nil {
			return err
		}
		if len(pod.Status.ContainerStatuses) != len(pod.Spec.Containers) {
			return errors.New("not all of them have a status")
		}
		for _, status := range pod.Status.ContainerStatuses {
			if status.RestartCount != 0 || status.State.Terminated != nil {
				return &wrongError{fmt.Sprintf("container %s was restarted %d times: %+v", status.Name, status.RestartCount, status.LastTerminationState.Terminated)}
			}
			if status.State.Running == nil {
				return fmt.Errorf("container %s does not run yet", status.Name)
			}
		}
		return nil
	})
}

func (s *scene) remove(ctx context.Context, pod *corev1.Pod) error {
	if err := s.Delete(ctx, pod); err != nil {
		return err
	}
	return eventually(ctx, "Pod "+pod.Name+" is gone", func() error {
		err := s.Get(ctx, client.ObjectKeyFromObject(pod), &corev1.Pod{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return errors.Join(err, errors.New("it is still there"))
	})
}

// leave takes the namespace away; what is next in the zoo has the node for itself.
func (s *scene) leave(ctx context.Context) {
	ctx = context.WithoutCancel(ctx)
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: s.namespace}}
	err := s.Delete(ctx, namespace)
	if err == nil {
		err = eventually(ctx, "namespace "+s.namespace+" is gone", func() error {
			if err := s.Get(ctx, client.ObjectKeyFromObject(namespace), namespace); !apierrors.IsNotFound(err) {
				return errors.Join(err, errors.New("it is still there"))
			}
			return nil
		})
	}
	if err = client.IgnoreNotFound(err); err != nil && s.err == nil {
		s.err = err
	}
}

// describe is what a person would look at first.
func (s *scene) describe(ctx context.Context) string {
	var b strings.Builder
	for _, args := range [][]string{
		{"get", "pods,podcheckpoints", "-o", "wide"},
		{"get", "events", "--sort-by=.lastTimestamp", "-o", "custom-columns=AT:.lastTimestamp,ON:.involvedObject.name,REASON:.reason,MESSAGE:.message"},
	} {
		out, err := s.Kubectl(ctx, append(args, "-n", s.namespace)...)
		fmt.Fprintf(&b, "$ kubectl %s\n%s", strings.Join(args, " "), out)
		if err != nil {
			fmt.Fprintln(&b, err)
		}
	}
	var pods corev1.PodList
	if err := s.List(ctx, &pods, client.InNamespace(s.namespace)); err != nil {
		fmt.Fprintln(&b, err)
	}
	for _, pod := range pods.Items {
		for _, container := range pod.Spec.Containers {
			out, err := s.Kubectl(ctx, "-n", s.namespace, "logs", pod.Name, "-c", container.Name, "--tail=15")
			fmt.Fprintf(&b, "$ kubectl logs %s -c %s\n%s", pod.Name, container.Name, out)
			if err != nil {
				fmt.Fprintln(&b, err)
			}
		}
	}
	return b.String()
}

// eventually repeats check until it finds nothing to say, or what waiting does
// not help.
func eventually(ctx context.Context, what string, check func() error) error {
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return nil
		}
		var wrong *wrongError
		if errors.As(err, &wrong) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s, not within %s: %w", what, patience, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(often):
		}
	}
}
