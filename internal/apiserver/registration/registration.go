// Package registration looks after the APIService: the entry by which the Kubernetes
// API server sends the group to the aggregated API.
//
// An entry that leads nowhere hurts others: the namespace controller deletes no
// namespace as long as it cannot tell which resources a group has. So whoever
// serves the group makes the entry, and the agents, who outlive stasis-controller,
// take one away that has led nowhere for a while.
package registration

import (
	"context"
	"encoding/base64"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/util/retry"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// Name of the APIService.
const Name = "v1alpha1." + subresources.GroupName

// Priorities: what is looked for by a name that several groups have is not found
// here first. "kubectl get pods" means those of Kubernetes.
const (
	groupPriority   = 100
	versionPriority = 100
)

// restored is how often an entry that was taken away is made again, at most: one
// that leads nowhere would come back at once.
const restored = 10 * time.Minute

var kind = schema.GroupVersionKind{Group: "apiregistration.k8s.io", Version: "v1", Kind: "APIService"}

// Registrar keeps the entry of a group that is served.
type Registrar struct {
	// Client reads and writes past any cache.
	Client client.Client
	// Namespace and Service are where the group is served.
	Namespace, Service string
	// InjectFrom names the Certificate that cert-manager takes the authorities from;
	// empty where they are given to Keep.
	InjectFrom string
	Clock      clock.PassiveClock
	Log        *slog.Logger

	mu   sync.Mutex
	made time.Time
}

// Keep has the entry be there and trust the authorities; nil leaves to others what
// it trusts.
func (r *Registrar) Keep(ctx context.Context, authorities []byte) error {
	return retry.RetryOnConflict(retry.DefaultRetry, func() error { return r.keep(ctx, authorities) })
}

func (r *Registrar) keep(ctx context.Context, authorities []byte) error {
	bundle := base64.StdEncoding.EncodeToString(authorities)
	entry := empty()
	err := r.Client.Get(ctx, client.ObjectKey{Name: Name}, entry)
	if apierrors.IsNotFound(err) {
		return r.create(ctx, bundle)
	}
	if err != nil {
		return fmt.Errorf("read APIService %s: %w", Name, err)
	}
	if now, _, _ := unstructured.NestedString(entry.Object, "spec", "caBundle"); authorities == nil || now == bundle {
		return nil
	}
	if err := unstructured.SetNestedField(entry.Object, bundle, "spec", "caBundle"); err != nil {
		return fmt.Errorf("change APIService %s: %w", Name, err)
	}
	if err := r.Client.Update(ctx, entry); err != nil {
		return fmt.Errorf("have APIService %s trust the certificate: %w", Name, err)
	}
	return nil
}

// Withdraw takes the entry away if Stasis is being removed with its namespace: that
// of Stasis could not be deleted either.
func (r *Registrar) Withdraw(ctx context.Context) error {
	if going, err := r.going(ctx); err != nil || !going {
		return err
	}
	if err := r.Client.Delete(ctx, withName(empty())); client.IgnoreNotFound(err) != nil {
		return fmt.Errorf("delete APIService %s: %w", Name, err)
	}
	return nil
}

// going says whether the namespace of Stasis is being deleted.
func (r *Registrar) going(ctx context.Context) (bool, error) {
	var namespace corev1.Namespace
	err := r.Client.Get(ctx, client.ObjectKey{Name: r.Namespace}, &namespace)
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read namespace %q: %w", r.Namespace, err)
	}
	return namespace.DeletionTimestamp != nil, nil
}

// create makes the entry, but not while Stasis is being removed.
func (r *Registrar) create(ctx context.Context, bundle string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := r.Clock.Now(); !r.made.IsZero() && now.Sub(r.made) < restored {
		return nil
	}
	if going, err := r.going(ctx); err != nil || going {
		return err
	}
	err := r.Client.Create(ctx, r.entry(bundle))
	if apierrors.IsAlreadyExists(err) {
		return apierrors.NewConflict(schema.GroupResource{Group: kind.Group, Resource: "apiservices"}, Name, err) // look at it again
	}
	if err != nil {
		return fmt.Errorf("create APIService %s: %w", Name, err)
	}
	r.made = r.Clock.Now()
	r.Log.InfoContext(ctx, "aggregated API registered", "apiService", Name)
	return nil
}

// entry is the APIService as config/apiservice has it.
func (r *Registrar) entry(bundle string) *unstructured.Unstructured {
	entry := withName(empty())
	entry.SetLabels(map[string]string{"app.kubernetes.io/name": "stasis", "app.kubernetes.io/component": "controller", "app.kubernetes.io/part-of": "stasis"})
	if r.InjectFrom != "" {
		entry.SetAnnotations(map[string]string{"cert-manager.io/inject-ca-from": r.InjectFrom})
	}
	spec := map[string]any{
		"group": subresources.GroupName, "version": subresources.SchemeGroupVersion.Version,
		"groupPriorityMinimum": int64(groupPriority), "versionPriority": int64(versionPriority),
		"service": map[string]any{"namespace": r.Namespace, "name": r.Service, "port": int64(443)},
	}
	if bundle != "" {
		spec["caBundle"] = bundle
	}
	entry.Object["spec"] = spec
	return entry
}

func withName(u *unstructured.Unstructured) *unstructured.Unstructured {
	u.SetName(Name)
	return u
}

func empty() *unstructured.Unstructured {
	u := &unstructured.Unstructured{}
	u.SetGroupVersionKind(kind)
	return u
}

// The guard takes away an entry that has led nowhere for this long.
const (
	patience = time.Minute
	period   = time.Minute
)

// Guard takes the entry away when nobody has served the group for a while. One
// runs in every agent: agents are there when stasis-controller is not.
type Guard struct {
	Client client.Client
	Clock  clock.WithTicker
	Log    *slog.Logger
}

// NeedLeaderElection says that every agent looks.
func (g *Guard) NeedLeaderElection() bool { return false }

// Start looks until the context ends.
func (g *Guard) Start(ctx context.Context) error {
	ticker := g.Clock.NewTicker(period)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
		if err := g.Look(ctx); err != nil && ctx.Err() == nil {
			g.Log.ErrorContext(ctx, "whether the aggregated API is served could not be seen", "error", err)
		}
	}
}

// Look takes the entry away if that is due.
func (g *Guard) Look(ctx context.Context) error {
	entry := empty()
	err := g.Client.Get(ctx, client.ObjectKey{Name: Name}, entry)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read APIService %s: %w", Name, err)
	}
	since, why := unavailable(entry)
	if since.IsZero() || g.Clock.Since(since) < patience {
		return nil
	}
	uid, version := entry.GetUID(), entry.GetResourceVersion()
	err = g.Client.Delete(ctx, entry, client.Preconditions{UID: &uid, ResourceVersion: &version})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // another agent was faster, or it is served again
	}
	if err != nil {
		return fmt.Errorf("delete APIService %s: %w", Name, err)
	}
	g.Log.WarnContext(ctx, "aggregated API taken out of the API server: nobody serves it, and namespaces could not be deleted; stasis-controller registers it again when it runs",
		"apiService", Name, "since", since, "why", why)
	return nil
}

// unavailable says since when an entry leads nowhere, and why; the zero time if it
// does not, or if nobody knows.
func unavailable(entry *unstructured.Unstructured) (time.Time, string) {
	conditions, _, _ := unstructured.NestedSlice(entry.Object, "status", "conditions")
	for _, c := range conditions {
		condition, _ := c.(map[string]any)
		if condition["type"] != "Available" || condition["status"] != string(metav1.ConditionFalse) {
			continue
		}
		text, _ := condition["lastTransitionTime"].(string)
		since, err := time.Parse(time.RFC3339, text)
		if err != nil {
			return time.Time{}, ""
		}
		message, _ := condition["message"].(string)
		return since, message
	}
	return time.Time{}, ""
}
