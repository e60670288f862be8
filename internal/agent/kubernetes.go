package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/events"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	kubesource "sigs.k8s.io/controller-runtime/pkg/source"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/apiserver/registration"
	"podstasis.dev/stasis/internal/restoring"
	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/stores"
)

const (
	// componentName is who events are from.
	componentName = "stasis-agent"
	// stopLimit bounds the end of the operations of a stopping agent: to finish, to
	// be thawed by the CRI service if they do not, to write the outcome. The
	// DaemonSet's terminationGracePeriodSeconds is longer.
	stopLimit = finishPatience + serverPatience + 2*farewell
	// sweepInterval is how often data without an object are looked for. Deleting an
	// object removes its data at once: this is for finalizers taken off by force.
	sweepInterval = 10 * time.Minute
	sweepRetry    = 10 * time.Second
)

// kubernetes is the part of the agent that talks to the API server.
type kubernetes struct {
	manager    manager.Manager
	recorder   events.EventRecorder
	marker     *marker
	resolver   *resolver
	reconciler *reconciler
	log        *slog.Logger
	hooks      *restoreHooks
	locator    *agentapi.Locator               // of other agents
	identity   atomic.Pointer[tls.Certificate] // that this one announces
	isSynced   atomic.Bool
}

func newScheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, eventsv1.AddToScheme,
		coordinationv1.AddToScheme, authenticationv1.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	return scheme, nil
}

// kubeConfig says how to reach the API server. Its errors are not cured by waiting.
func (d *daemon) kubeConfig() (*rest.Config, error) {
	if d.NodeName == "" {
		return nil, errors.New("the node's name is not known: set --node-name")
	}
	config, err := ctrl.GetConfig()
	if err != nil {
		return nil, fmt.Errorf("find the API server (in a Pod, by $KUBECONFIG or ~/.kube/config; --no-kubernetes does without): %w", err)
	}
	config.UserAgent = componentName
	return config, nil
}

// newKubernetes connects to the API server. Of all objects only this node's
// PodCheckpoints are cached; Pods are read when they are needed.
func newKubernetes(d *daemon, config *rest.Config) (*kubernetes, error) {
	scheme, err := newScheme()
	if err != nil {
		return nil, err
	}
	grace := stopLimit
	m, err := ctrl.NewManager(config, ctrl.Options{
		Scheme: scheme,
		Cache: cache.Options{ByObject: map[client.Object]cache.ByObject{
			&v1alpha1.PodCheckpoint{}: {Field: fields.OneTermEqualSelector(fieldNodeName, d.NodeName)},
		}},
		Metrics:                 metricsserver.Options{BindAddress: "0"},
		HealthProbeBindAddress:  "0",
		GracefulShutdownTimeout: &grace,
	})
	if err != nil {
		return nil, fmt.Errorf("connect to the API server: %w", err)
	}
	k := &kubernetes{manager: m, recorder: m.GetEventRecorder(componentName), log: d.Log}
	k.marker = &marker{client: m.GetClient(), log: d.Log, now: time.Now}
	k.locator = &agentapi.Locator{Reader: m.GetAPIReader(), Namespace: d.API.Namespace, Clock: clock.RealClock{}, Blind: true}
	peers := &agentapi.Peers{Locator: k.locator, Node: d.NodeName, Certificate: k.identity.Load}
	opener := stores.Opener{Reader: m.GetAPIReader(), Namespace: d.API.Namespace}
	fetched, err := newCopies(d, m.GetAPIReader(), &origins{peers: peers, live: m.GetAPIReader(), open: retryOpener(opener, fetchRetry)})
	if err != nil {
		return nil, err
	}
	fetched.tell = func(ctx context.Context, pod podRef, message string) error {
		return k.marker.note(ctx, pod, "fetched", v1alpha1.EventCheckpointFetched, message)
	}
	k.resolver = &resolver{nodeName: d.NodeName, live: m.GetAPIReader(), store: d.store, copies: fetched, marker: k.marker, platform: d.platform}
	runner := newHookRunner(d.runtime, d.RuntimeEndpoint)
	k.hooks = &restoreHooks{store: d.store, runner: runner, live: m.GetAPIReader(), recorder: k.recorder, log: d.Log, queue: make(chan *dueHooks, maxRestoreHooks)}
	guard := newFlights(d.MaxConcurrent)
	ops := &operations{
		nodeName: d.NodeName, client: m.GetClient(), live: m.GetAPIReader(), wait: d.calls.Wait,
		store: d.store, flights: guard, marker: k.marker, recorder: k.recorder, metrics: d.metrics, log: d.Log, now: time.Now, hooks: runner, look: d.cri.Look,
		queue: make(chan operation), stages: &d.stages,
	}
	ops.storing = newStoring(&storing{
		client: m.GetClient(), live: m.GetAPIReader(), store: d.store, open: retryOpener(opener, backend.Policy{}), done: ops.tell, first: storeFirstDelay, log: d.Log, now: time.Now,
	})
	k.reconciler = &reconciler{
		nodeName: d.NodeName, client: m.GetClient(), live: m.GetAPIReader(), runtime: d.runtime, store: d.store,
		flights: guard, ops: ops, metrics: d.metrics, log: d.Log, now: time.Now,
		users: func(dir string) ([]restoring.User, error) { return d.sessions.Users(dir) }, room: d.room,
	}
	arrived := make(chan event.TypedGenericEvent[*v1alpha1.PodCheckpoint], 64)
	k.reconciler.uploads = newUploads(d.store, d.room, arrived)
	k.reconciler.imports = &imports{ops: ops, room: d.room, queue: make(chan importOp), log: d.Log}
	unique := true // an earlier attempt may have taken the name
	err = ctrl.NewControllerManagedBy(m).For(&v1alpha1.PodCheckpoint{}).
		WatchesRawSource(kubesource.Channel(arrived, &handler.TypedEnqueueRequestForObject[*v1alpha1.PodCheckpoint]{})).
		WithOptions(controller.Options{MaxConcurrentReconciles: 4, SkipNameValidation: &unique}).Complete(k.reconciler)
	if err != nil {
		return nil, fmt.Errorf("set the controller up: %w", err)
	}
	// Agents are there when nobody serves the aggregated API any more.
	unserved := &registration.Guard{Client: m.GetClient(), Clock: clock.RealClock{}, Log: d.Log}
	for _, r := range append(k.serving(d), ops, ops.storing, fetched, k.reconciler.imports, k.hooks, manager.RunnableFunc(k.sweep), unserved) {
		if err := m.Add(r); err != nil {
			return nil, fmt.Errorf("set the agent up: %w", err)
		}
	}
	return k, nil
}

// start works until ctx ends and every operation has. criPath is the agent's own
// CRI socket.
func (k *kubernetes) start(ctx context.Context, criPath string) error {
	conn, err := dial(criPath)
	if err != nil {
		return err
	}
	defer conn.Close()
	k.reconciler.ops.cri = runtimeapi.NewRuntimeServiceClient(conn)
	return k.manager.Start(ctx)
}

func (k *kubernetes) synced() bool { return k.isSynced.Load() }

// sweep removes, at start and now and then, what belongs to nothing.
func (k *kubernetes) sweep(ctx context.Context) error {
	if !k.manager.GetCache().WaitForCacheSync(ctx) {
		return nil
	}
	k.isSynced.Store(true)
	for {
		wait := sweepInterval
		if err := k.reconciler.removeOrphans(ctx); err != nil {
			k.log.Warn("looking for data that belong to no PodCheckpoint failed", "error", err)
			wait = sweepRetry
		}
		if err := k.reconciler.forgetPods(ctx); err != nil {
			k.log.Warn("looking for restored Pods that are gone failed", "error", err)
			wait = sweepRetry
		}
		if err := k.reconciler.forgetNeeds(ctx); err != nil {
			k.log.Warn("looking for Pods that need no checkpoint of this node any more failed", "error", err)
			wait = sweepRetry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}
