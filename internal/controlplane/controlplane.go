// Package controlplane assembles stasis-controller: reconcilers, webhooks, the
// aggregated API and their certificate in one manager.
package controlplane

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/server/options"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/utils/clock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	ctrlconfig "sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/metrics"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/admission"
	"podstasis.dev/stasis/internal/admission/certs"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/apiserver/registration"
	"podstasis.dev/stasis/internal/controller"
	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/stores"
)

// WebhookConfiguration is the name of both webhook configurations (config/admission).
const WebhookConfiguration = "stasis-admission"

// Options are what an administrator chooses.
type Options struct {
	// Namespace is where Stasis is installed.
	Namespace string
	// WebhookHost and WebhookPort are where the webhook server listens.
	WebhookHost string
	WebhookPort int
	// WebhookService is the Service that the webhooks are called by, and
	// WebhookHosts are further names.
	WebhookService string
	WebhookHosts   []string
	// WebhookCertDir holds the certificate where something else keeps it; else it
	// is kept here, in the Secret CertificateName.
	WebhookCertDir  string
	CertificateName string
	// APIServerPort is where the aggregated API listens, on WebhookHost; 0 turns it
	// off. APIServerService is the Service that it is called by. Its certificate is the
	// webhooks'.
	APIServerPort    int
	APIServerService string
	// APIServerInjectFrom is the Certificate of cert-manager that the APIService takes
	// its authorities from.
	APIServerInjectFrom string
	// Stores says how CheckpointStores are kept.
	Stores controller.StoreConfig
	// Audit is where requests to the aggregated API are recorded.
	Audit          *options.AuditOptions
	MetricsAddress string
	HealthAddress  string
	LeaderElection bool
	// Registry is where metrics are registered; nil stands for the one that the
	// metrics server shows.
	Registry prometheus.Registerer
	// Repeatable lets several control planes be made in one process, as tests do.
	Repeatable bool
}

// AddFlags adds the options to a flag set, with their defaults.
func (o *Options) AddFlags(flags *flag.FlagSet) {
	flags.StringVar(&o.Namespace, "namespace", "stasis-system", "namespace that Stasis is installed in")
	flags.IntVar(&o.WebhookPort, "webhook-port", 9443, "port of the webhook server")
	flags.StringVar(&o.WebhookService, "webhook-service", "stasis-webhook", "Service that the webhooks are called by")
	flags.StringVar(&o.WebhookCertDir, "webhook-cert-dir", "", "directory with tls.crt and tls.key that something else keeps, such as cert-manager; empty: make and rotate the certificate here")
	flags.StringVar(&o.CertificateName, "webhook-secret", "stasis-webhook-cert", "Secret for the certificate that is made here")
	flags.IntVar(&o.APIServerPort, "apiserver-port", 9444, "port of the aggregated API; 0 turns it off")
	flags.StringVar(&o.APIServerService, "apiserver-service", "stasis-apiserver", "Service that the aggregated API is called by")
	flags.StringVar(&o.APIServerInjectFrom, "apiserver-inject-ca-from", "", "namespace/name of the Certificate that cert-manager takes the APIService's authorities from")
	o.addAuditFlags(flags)
	flags.DurationVar(&o.Stores.Every, "store-collection-interval", 10*time.Minute, "how often checkpoint stores are looked through for what nothing uses")
	flags.DurationVar(&o.Stores.Grace, "store-collection-grace", time.Hour, "how long what nothing uses stays in a store at least, once it was found")
	flags.DurationVar(&o.Stores.Pause, "store-collection-pause", 50*time.Millisecond, "pause after each object that is removed from a store, which leaves it to others")
	flags.StringVar(&o.MetricsAddress, "metrics-bind-address", ":8080", "address of the metrics server; 0 turns it off")
	flags.StringVar(&o.HealthAddress, "health-probe-bind-address", ":8081", "address of /healthz and /readyz")
	flags.BoolVar(&o.LeaderElection, "leader-elect", true, "let one replica reconcile; all of them answer webhooks")
}

// storePatience is how long the control plane tries a request to a store again. It looks
// at each store every minute: waiting longer would tell later that one is away.
const storePatience = 15 * time.Second

// New assembles the manager. It needs the CRD to be installed before it starts.
func New(ctx context.Context, config *rest.Config, o Options, log *slog.Logger) (ctrl.Manager, error) {
	if o.Registry == nil {
		o.Registry = metrics.Registry
	}
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("assemble the scheme: %w", err)
	}
	if err := checkpointv1alpha1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("assemble the scheme: %w", err)
	}
	direct, err := client.NewWithWatch(config, client.Options{Scheme: scheme})
	if err != nil {
		return nil, fmt.Errorf("make a client: %w", err)
	}
	registrar := &registration.Registrar{Client: direct, Namespace: o.Namespace, Service: o.APIServerService, InjectFrom: o.APIServerInjectFrom, Clock: clock.RealClock{}, Log: log}
	keeper, tlsOptions := certificate(direct, registrar, o, log)
	server := webhook.NewServer(webhook.Options{Host: o.WebhookHost, Port: o.WebhookPort, CertDir: o.WebhookCertDir, TLSOpts: tlsOptions})
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:                        scheme,
		Logger:                        logr.FromSlogHandler(log.Handler()),
		WebhookServer:                 server,
		Metrics:                       metricsserver.Options{BindAddress: o.MetricsAddress},
		HealthProbeBindAddress:        o.HealthAddress,
		LeaderElection:                o.LeaderElection,
		LeaderElectionID:              "stasis-controller",
		LeaderElectionNamespace:       o.Namespace,
		LeaderElectionReleaseOnCancel: true,
		Controller:                    ctrlconfig.Controller{SkipNameValidation: &o.Repeatable},
		Cache: cache.Options{
			DefaultTransform: cache.TransformStripManagedFields(),
			ByObject: map[client.Object]cache.ByObject{
				// A Pod that a gate holds back is on no node: that leaves out all
				// Pods that run.
				&corev1.Pod{}: {Field: fields.OneTermEqualSelector("spec.nodeName", "")},
			},
		},
	})
	if err != nil {
		return nil, fmt.Errorf("make the manager: %w", err)
	}
	// Asking the manager for the server is what makes it run it.
	admission.Register(mgr.GetWebhookServer(), admission.Config{
		Reader: mgr.GetAPIReader(), Reviews: mgr.GetClient(), Scheme: scheme, Log: log,
		Agents:    &agentapi.Locator{Reader: mgr.GetAPIReader(), Namespace: o.Namespace, Clock: clock.RealClock{}},
		Namespace: o.Namespace, Clock: clock.RealClock{},
	})
	o.Stores.Open = stores.Opener{Reader: mgr.GetAPIReader(), Namespace: o.Namespace, Retry: backend.Policy{Total: storePatience}}
	measured, err := controller.NewMetrics(o.Registry)
	if err != nil {
		return nil, err
	}
	if err := controller.Add(ctx, mgr, controller.Config{Namespace: o.Namespace, Clock: clock.RealClock{}, Metrics: measured, Stores: o.Stores, Log: log}); err != nil {
		return nil, err
	}
	ready := server.StartedChecker()
	if o.APIServerPort != 0 {
		api, err := newAggregated(config, direct, keeper, registrar, o, log)
		if err != nil {
			return nil, err
		}
		if err := addAll(mgr, api.server, api); err != nil {
			return nil, fmt.Errorf("add the aggregated API: %w", err)
		}
		ready = both(api.server.Ready, ready)
	}
	if keeper != nil {
		if err := mgr.Add(keeper); err != nil {
			return nil, fmt.Errorf("add the keeper of the webhook certificate: %w", err)
		}
		ready = both(keeper.Ready, ready)
	}
	if err := mgr.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return nil, fmt.Errorf("add the health check: %w", err)
	}
	if err := mgr.AddReadyzCheck("webhooks", ready); err != nil {
		return nil, fmt.Errorf("add the readiness check: %w", err)
	}
	return mgr, nil
}

// addAll adds runnables to a manager.
func addAll(mgr ctrl.Manager, all ...manager.Runnable) error {
	for _, r := range all {
		if err := mgr.Add(r); err != nil {
			return err
		}
	}
	return nil
}

// certificate says where the certificate of webhooks and aggregated API comes from:
// files that somebody else keeps, read again when they change, or a keeper of our
// own.
func certificate(direct client.Client, registrar *registration.Registrar, o Options, log *slog.Logger) (*certs.Keeper, []func(*tls.Config)) {
	modern := func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 }
	if o.WebhookCertDir != "" {
		return nil, []func(*tls.Config){modern}
	}
	c := certs.Config{
		Client:     direct,
		Secret:     types.NamespacedName{Namespace: o.Namespace, Name: o.CertificateName},
		Hosts:      append([]string{o.WebhookService + "." + o.Namespace + ".svc"}, o.WebhookHosts...),
		Mutating:   []string{WebhookConfiguration},
		Validating: []string{WebhookConfiguration},
		Clock:      clock.RealClock{},
		Log:        log,
	}
	if o.APIServerPort != 0 {
		c.Hosts = append(c.Hosts, o.APIServerService+"."+o.Namespace+".svc")
		c.Trust = registrar.Keep
	}
	keeper := certs.New(c)
	return keeper, []func(*tls.Config){modern, func(c *tls.Config) { c.GetCertificate = keeper.GetCertificate }}
}

// both passes if both checks pass.
func both(first, second healthz.Checker) healthz.Checker {
	return func(r *http.Request) error {
		if err := first(r); err != nil {
			return err
		}
		return second(r)
	}
}
