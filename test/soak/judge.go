package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

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
				log, err := s.cluster.Log(ctx, pod, container)
				if err != nil {
					return err
				}
				if known {
					var lost bool
					if log, lost = withoutTraps(log); lost {
						d.mu.Lock()
						d.trapped[string(pod.UID)] = true
						d.mu.Unlock()
					}
				}
				now, err := read(log, gaps)
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

// withoutTraps drops what a shell says of a child that died because the CRIU whose code
// it was executing was killed: such a kill may cost a process, and no more.
func withoutTraps(log string) (rest string, lost bool) {
	for line := range strings.Lines(log) {
		if strings.HasPrefix(line, "Trace/breakpoint trap") {
			lost = true
		} else {
			rest += line
		}
	}
	return rest, lost
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
