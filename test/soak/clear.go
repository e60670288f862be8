package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

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
// network namespace, or starting a shim, and writing down that it has (its
// RunPodSandbox), whichever Pod that was for; and a shim whose container it gave up
// because the kubelet was killed. Such are counted; any other is a leftover.
func (s *soak) sweep(ctx context.Context, d *damage) error {
	for _, node := range s.nodes.names() {
		if err := s.sweepShims(ctx, node); err != nil {
			return err
		}
	}
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

// sweepShims ends a node's shims that containerd has forgotten, once it has forgotten
// their sandboxes too: a shim that it knows how to reach it ends itself, with the sandbox.
func (s *soak) sweepShims(ctx context.Context, node string) error {
	shims, err := s.nodes.forgotten(node)
	if err != nil || len(shims) == 0 {
		return err
	}
	if err := eventually(ctx, patience, "containerd of "+node+" forgets the sandboxes of its lost shims", func() error {
		known, err := s.cluster.OnNode(ctx, node, "ctr -n k8s.io containers ls; ctr -n k8s.io tasks ls; ctr -n k8s.io sandboxes ls; ls /run/containerd/io.containerd.runtime.v2.task/k8s.io")
		if err != nil {
			return err
		}
		for _, lost := range shims {
			if strings.Contains(known, lost.sandbox()) {
				return fmt.Errorf("it knows %s", lost.sandbox())
			}
		}
		return nil
	}); err != nil {
		return err
	}
	shims, err = s.nodes.forgotten(node) // under which nothing has begun to run
	for _, lost := range shims {
		if err := unix.Kill(lost.pid, unix.SIGTERM); err != nil {
			return fmt.Errorf("end shim %d of sandbox %s: %w", lost.pid, lost.sandbox(), err)
		}
		s.lost++
	}
	return err
}
