package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

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
