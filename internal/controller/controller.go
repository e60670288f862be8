// Package controller holds the reconcilers of the control plane. They look after
// objects only: taking a checkpoint and restoring it is the agents' work.
package controller

import (
	"context"
	"fmt"
	"log/slog"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
)

// Config is what the reconcilers need beside the manager.
type Config struct {
	// Namespace is where the agents run.
	Namespace string
	Clock     clock.PassiveClock
	Metrics   *Metrics
	Stores    StoreConfig
	Log       *slog.Logger
}

// recorder is the part of an event recorder that is used here.
type recorder interface {
	Eventf(regarding, related runtime.Object, eventtype, reason, action, note string, args ...any)
}

// Add adds the reconcilers to a manager.
func Add(ctx context.Context, mgr ctrl.Manager, c Config) error {
	events := mgr.GetEventRecorder("stasis-controller")
	l := &lifecycle{client: mgr.GetClient(), live: mgr.GetAPIReader(), namespace: c.Namespace, clock: c.Clock, events: events, log: c.Log}
	if err := l.setUp(ctx, mgr, c.Metrics); err != nil {
		return fmt.Errorf("set up the lifecycle of PodCheckpoints: %w", err)
	}
	keeper := &storekeeper{client: mgr.GetClient(), live: mgr.GetAPIReader(), config: c.Stores, clock: c.Clock, events: events, metrics: c.Metrics, log: c.Log}
	if err := keeper.setUp(mgr); err != nil {
		return fmt.Errorf("set up the keeping of CheckpointStores: %w", err)
	}
	release := &storeRelease{client: mgr.GetClient(), live: mgr.GetAPIReader(), open: c.Stores.Open, events: events, log: c.Log}
	if err := release.setUp(mgr); err != nil {
		return fmt.Errorf("set up the deletion of PodCheckpoints from stores: %w", err)
	}
	g := &gate{client: mgr.GetClient(), live: mgr.GetAPIReader(), namespace: c.Namespace, clock: c.Clock, events: events, log: c.Log}
	if err := g.setUp(ctx, mgr); err != nil {
		return fmt.Errorf("set up the gate of restoring Pods: %w", err)
	}
	n := &nodeLabels{client: mgr.GetClient(), live: mgr.GetAPIReader(), namespace: c.Namespace, clock: c.Clock, log: c.Log}
	if err := mgr.Add(n); err != nil {
		return fmt.Errorf("set up the labels of nodes: %w", err)
	}
	return nil
}

// get reads an object; nil if there is none of that name.
func get[T any, P interface {
	*T
	client.Object
}](ctx context.Context, reader client.Reader, key types.NamespacedName) (P, error) {
	object := P(new(T))
	err := reader.Get(ctx, key, object)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %T %s: %w", object, key, err)
	}
	return object, nil
}

// specChanges lets through what changes more than a status.
var specChanges = predicate.GenerationChangedPredicate{}

func withPredicates(p ...predicate.Predicate) builder.Predicates { return builder.WithPredicates(p...) }
