package agent

import (
	"fmt"
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"

	"podstasis.dev/stasis/internal/engine"
)

// A frozen container answers no probe, and the kubelet restarts it when a liveness
// probe has failed failureThreshold times in a row (P14). How long a container that
// was well can stand still before that: a probe that begins with the freeze fails
// after timeoutSeconds; the next one begins periodSeconds after it did, or when it
// has ended; and so on to the last of them, which fails if the freeze outlasts it:
//
//	(failureThreshold - 1) * max(periodSeconds, timeoutSeconds) + timeoutSeconds
//
// A startup probe that has not succeeded yet may have failed all but once before,
// so one timeout is all there is. Readiness probes restart nothing.

const (
	// What the answer to the last probe needs after the thaw: this, or a tenth.
	probeMargin     = 300 * time.Millisecond
	probeMarginPart = 10
)

// probeLimit is a probe and how long its container can stand still under it.
type probeLimit struct {
	container, kind string
	timeout, period time.Duration
	threshold       int32
	trips           time.Duration // a freeze of this length can
}

func (l *probeLimit) String() string {
	return fmt.Sprintf("the %s probe of container %s (every %s, timeout %s, failureThreshold %d), which a freeze of %s can make the kubelet restart",
		l.kind, l.container, l.period, l.timeout, l.threshold, l.trips)
}

// budget is how long the Pod may stand still.
func (l *probeLimit) budget() time.Duration {
	return max(l.trips-max(probeMargin, l.trips/probeMarginPart), time.Millisecond)
}

// tightest finds the probe that bounds the freeze; nil if none does. It looks at
// all running containers: one that is not captured may ask one that is.
func tightest(pod *corev1.Pod) *probeLimit {
	var found *probeLimit
	consider := func(c *corev1.Container) {
		status := statusOf(pod, c.Name)
		if status == nil || status.State.Running == nil {
			return
		}
		kind, probe := "liveness", c.LivenessProbe
		starting := c.StartupProbe != nil && (status.Started == nil || !*status.Started)
		if starting {
			kind, probe = "startup", c.StartupProbe // liveness is not looked at before it has succeeded
		}
		if probe == nil {
			return
		}
		// As the API server defaults them, should it not have.
		l := &probeLimit{
			container: c.Name, kind: kind, threshold: orElse(probe.FailureThreshold, 3),
			timeout: time.Duration(orElse(probe.TimeoutSeconds, 1)) * time.Second,
			period:  time.Duration(orElse(probe.PeriodSeconds, 10)) * time.Second,
		}
		l.trips = time.Duration(l.threshold-1)*max(l.period, l.timeout) + l.timeout
		if starting {
			l.trips = l.timeout
		}
		if found == nil || l.trips < found.trips {
			found = l
		}
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; restartable(c) {
			consider(c)
		}
	}
	for i := range pod.Spec.Containers {
		consider(&pod.Spec.Containers[i])
	}
	return found
}

func orElse(value, unset int32) int32 {
	if value <= 0 {
		return unset
	}
	return value
}

// withFreezeBudget adds a probe's budget to the engine's options. A budget that
// the user gave counts where it is the smaller one; one that cannot be read is the
// engine's to refuse.
func withFreezeBudget(options map[string]string, limit *probeLimit) map[string]string {
	if limit == nil {
		return options
	}
	own, err := engine.FreezeBudget(options)
	if err != nil || own > 0 && own <= limit.budget() {
		return options
	}
	all := maps.Clone(options)
	if all == nil {
		all = map[string]string{}
	}
	all[engine.OptionFreezeBudget] = limit.budget().String()
	return all
}
