package kubectl

import (
	"fmt"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log"
)

// environment is what the commands of a program share: where they read and write,
// and the cluster that they speak with.
type environment struct {
	genericiooptions.IOStreams
	now   func() time.Time
	flags *genericclioptions.ConfigFlags

	// Filled in by connect.
	client    client.WithWatch
	namespace string
	calls     *subresources
}

func newEnvironment(streams genericiooptions.IOStreams) *environment {
	return &environment{IOStreams: streams, now: time.Now, flags: genericclioptions.NewConfigFlags(true)}
}

// connect makes the clients from kubectl's flags. It sends nothing.
func (e *environment) connect() error {
	if e.client != nil {
		return nil
	}
	namespace, _, err := e.flags.ToRawKubeConfigLoader().Namespace()
	if err != nil {
		return fmt.Errorf("reading the namespace from the kubeconfig: %w", err)
	}
	config, err := e.flags.ToRESTConfig()
	if err != nil {
		return fmt.Errorf("reading the kubeconfig: %w", err)
	}
	return e.use(config, namespace)
}

// use makes the clients for one server.
func (e *environment) use(config *rest.Config, namespace string) error {
	config.WarningHandler = nil // the server's warnings go to standard error
	if config.UserAgent == "" {
		config.UserAgent = "kubectl-stasis"
	}
	config.ContentType = "application/json" // readable with -v=8 and in a proxy
	// These are a person's few calls: client-side throttling only slows them.
	config.QPS = -1
	log.SetLogger(logr.Discard()) // else controller-runtime complains, with a stack, when a wait gets long
	http, err := rest.HTTPClientFor(config)
	if err != nil {
		return fmt.Errorf("making a client for %s: %w", config.Host, err)
	}
	c, err := client.NewWithWatch(config, client.Options{HTTPClient: http, Scheme: newScheme(), Mapper: newMapper()})
	if err != nil {
		return fmt.Errorf("making a client for %s: %w", config.Host, err)
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return fmt.Errorf("reading the address %q of the server: %w", config.Host, err)
	}
	e.client, e.namespace, e.calls = c, namespace, &subresources{http: http, base: base}
	return nil
}
