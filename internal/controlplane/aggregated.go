package controlplane

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/apiserver/pkg/server/options"
	"k8s.io/client-go/rest"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/internal/admission/certs"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/apiserver"
	"podstasis.dev/stasis/internal/apiserver/registration"
	"podstasis.dev/stasis/internal/stores"
)

// serviceAccount is the one that stasis-controller runs as (config/rbac).
const serviceAccount = "stasis-controller"

// look is how often the APIService is looked at where its authorities are
// somebody else's affair.
const look = 15 * time.Second

// addAuditFlags adds the flags of the aggregated API's audit log, by the names that
// every API server of Kubernetes has for them.
func (o *Options) addAuditFlags(flags *flag.FlagSet) {
	o.Audit = options.NewAuditOptions()
	set := pflag.NewFlagSet("", pflag.ContinueOnError)
	o.Audit.AddFlags(set)
	set.VisitAll(func(f *pflag.Flag) { flags.Var(f.Value, f.Name, f.Usage) })
}

// aggregated is the aggregated API with what keeps its entry.
type aggregated struct {
	server    *apiserver.Server
	registrar *registration.Registrar
	kept      bool // a keeper of certificates keeps the entry
}

// newAggregated puts the aggregated API together. direct reads and writes past any
// cache.
func newAggregated(config *rest.Config, direct client.WithWatch, keeper *certs.Keeper, registrar *registration.Registrar, o Options, log *slog.Logger) (*aggregated, error) {
	var certificate dynamiccertificates.CertKeyContentProvider
	if keeper != nil {
		certificate = apiserver.Kept(keeper)
	} else {
		var err error
		certificate, err = apiserver.Files(filepath.Join(o.WebhookCertDir, corev1.TLSCertKey), filepath.Join(o.WebhookCertDir, corev1.TLSPrivateKeyKey))
		if err != nil {
			return nil, fmt.Errorf("read the certificate of the aggregated API: %w", err)
		}
	}
	locator := &agentapi.Locator{Reader: direct, Namespace: o.Namespace, Clock: clock.RealClock{}}
	server := apiserver.New(apiserver.Config{
		Client:      config,
		Host:        o.WebhookHost,
		Port:        o.APIServerPort,
		Certificate: certificate,
		Objects:     direct,
		Locator:     locator,
		Agents: &agentapi.Client{Locator: locator, Tokens: &agentapi.TokenIssuer{
			Client: direct, Clock: clock.RealClock{}, ServiceAccount: types.NamespacedName{Namespace: o.Namespace, Name: serviceAccount}}},
		Stores: &stores.Runner{Open: o.Stores.Open, Grace: o.Stores.Grace, Pause: o.Stores.Pause, Clock: clock.RealClock{}, Log: log},
		Audit:  o.Audit,
		Clock:  clock.RealClock{},
		Log:    log,
	})
	return &aggregated{server: server, registrar: registrar, kept: keeper != nil}, nil
}

// NeedLeaderElection says that every replica looks after the entry.
func (a *aggregated) NeedLeaderElection() bool { return false }

// leave is how long a control plane that ends takes at most to clear up after it.
const leave = 5 * time.Second

// Start keeps the entry where no keeper of certificates does, and takes it away
// when Stasis is removed with its namespace.
func (a *aggregated) Start(ctx context.Context) error {
	a.keep(ctx)
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), leave)
	defer cancel()
	if err := a.registrar.Withdraw(ending); err != nil {
		a.registrar.Log.ErrorContext(ending, "aggregated API not taken out of the API server", "error", err)
	}
	return nil
}

func (a *aggregated) keep(ctx context.Context) {
	if a.kept {
		<-ctx.Done()
		return
	}
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	for {
		if a.server.Ready(nil) == nil {
			if err := a.registrar.Keep(ctx, nil); err != nil && ctx.Err() == nil {
				a.registrar.Log.ErrorContext(ctx, "aggregated API not registered; trying again", "every", look, "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
