package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

func (s *soak) restoreAll(ctx context.Context, subjects []*subject, strikes []strike, d *damage) error {
	subjects = slices.DeleteFunc(slices.Clone(subjects), func(subject *subject) bool { return subject.checkpoint == "" })
	restored := map[*subject]*corev1.Pod{}
	for _, subject := range subjects {
		restored[subject] = subject.restored("restored-" + subject.name)
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
			pod = subject.restored(pod.Name + "-again")
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
		if subject.memory == "lazy" {
			s.lazily++
		}
		s.cut += len(cut)
		if givenUp[subject] != nil {
			s.givenUp++
			s.reasons["restore: "+class(givenUp[subject].Error())]++
		}
		return nil
	})
}
