package apiserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/apiserver/pkg/server/options"
	"k8s.io/apiserver/pkg/util/compatibility"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	utilflowcontrol "k8s.io/apiserver/pkg/util/flowcontrol"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	clientrest "k8s.io/client-go/rest"
	"k8s.io/utils/clock"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/apiserver/openapi"
)

// Config is what the aggregated API needs.
type Config struct {
	// Client has the rights of stasis-controller.
	Client *clientrest.Config
	// Host and Port are where it listens.
	Host string
	Port int
	// Certificate that it serves with.
	Certificate dynamiccertificates.CertKeyContentProvider
	// Objects reads and writes past any cache.
	Objects objects
	Agents  interface {
		agents
		preflighter
	}
	Locator locator
	// Stores verifies and collects stores.
	Stores storeRunner
	Audit  *options.AuditOptions
	Clock  clock.Clock
	Log    *slog.Logger
}

// Server is the aggregated API in one replica.
type Server struct {
	Config
	serving atomic.Bool
}

// New returns a Server that is not started.
func New(c Config) *Server { return &Server{Config: c} }

// NeedLeaderElection says that every replica answers.
func (s *Server) NeedLeaderElection() bool { return false }

// Ready is a readiness check.
func (s *Server) Ready(*http.Request) error {
	if !s.serving.Load() {
		return errors.New("the aggregated API is not served yet")
	}
	return nil
}

var errNoCertificate = errors.New("its certificate is not there yet")

// again is how long to wait before the server is put together again.
const again = 2 * time.Second

// Start serves until the context ends. What it needs of the Kubernetes API server
// may come later than it: it tries again.
func (s *Server) Start(ctx context.Context) error {
	for {
		server, err := s.assemble()
		if err == nil {
			s.Log.InfoContext(ctx, "serving the aggregated API", "group", subresources.GroupName, "port", s.Port)
			s.serving.Store(true)
			defer s.serving.Store(false)
			if err := server.PrepareRun().RunWithContext(ctx); err != nil {
				return fmt.Errorf("serve the aggregated API: %w", err)
			}
			return nil
		}
		level := slog.LevelError
		if errors.Is(err, errNoCertificate) {
			level = slog.LevelInfo // its keeper makes it meanwhile
		}
		s.Log.Log(ctx, level, "the aggregated API cannot be served; trying again", "after", again.String(), "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-s.Clock.After(again):
		}
	}
}

// knownTypes are the group's, the kinds that its subresources are of, and what every
// group speaks of.
func knownTypes() (*runtime.Scheme, serializer.CodecFactory) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{subresources.AddToScheme, corev1.AddToScheme, checkpointv1alpha1.AddToScheme} {
		utilruntime.Must(add(scheme)) // fails only for types that contradict each other
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	return scheme, serializer.NewCodecFactory(scheme)
}

func (s *Server) assemble() (*genericapiserver.GenericAPIServer, error) {
	if certificate, _ := s.Certificate.CurrentCertKeyContent(); len(certificate) == 0 {
		return nil, errNoCertificate
	}
	scheme, codecs := knownTypes()
	config := genericapiserver.NewConfig(codecs)
	config.EffectiveVersion = compatibility.DefaultBuildEffectiveVersion()
	config.FeatureGate = utilfeature.DefaultFeatureGate
	config.ExternalAddress = net.JoinHostPort(s.Host, fmt.Sprint(s.Port))
	config.EnableProfiling = false
	config.EnableIndex = false

	namer := openapinamer.NewDefinitionNamer(scheme)
	config.OpenAPIConfig = genericapiserver.DefaultOpenAPIConfig(openapi.Definitions, namer)
	config.OpenAPIConfig.Info.Title = "Stasis"
	config.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(openapi.Definitions, namer)
	config.OpenAPIV3Config.Info.Title = "Stasis"

	client, err := kubernetes.NewForConfig(s.Client)
	if err != nil {
		return nil, fmt.Errorf("make a client: %w", err)
	}
	// Before the port is taken: it may fail for a while.
	trusted, err := whoIsWho(client)
	if err != nil {
		return nil, err
	}
	if err := s.listen(config); err != nil {
		return nil, err
	}
	server, err := s.build(config, client, trusted, scheme, codecs)
	if err != nil {
		config.SecureServing.Listener.Close()
		return nil, err
	}
	return server, nil
}

func (s *Server) build(config *genericapiserver.Config, client kubernetes.Interface, trusted *trust, scheme *runtime.Scheme, codecs serializer.CodecFactory) (*genericapiserver.GenericAPIServer, error) {
	if err := trusted.apply(config, client); err != nil {
		return nil, err
	}
	if s.Audit != nil {
		if err := s.Audit.ApplyTo(config); err != nil {
			return nil, fmt.Errorf("set up the audit log: %w", err)
		}
	}
	shared := informers.NewSharedInformerFactory(client, 10*time.Minute)
	config.FlowControl = utilflowcontrol.New(shared, client.FlowcontrolV1(), config.MaxRequestsInFlight+config.MaxMutatingRequestsInFlight)
	create := &creation{codecs: codecs, nodes: s.Agents, authorizer: config.Authorization.Authorizer,
		taker: &taker{objects: s.Objects, agents: s.Locator, clock: s.Clock}}
	config.BuildHandlerChainFunc = func(handler http.Handler, c *genericapiserver.Config) http.Handler {
		return genericapiserver.DefaultBuildHandlerChain(create.before(handler), c)
	}
	server, err := config.Complete(shared).New("stasis", genericapiserver.NewEmptyDelegate())
	if err != nil {
		return nil, fmt.Errorf("assemble the aggregated API: %w", err)
	}
	verifications := storeVerifications{objects: s.Objects, runner: s.Stores}
	group := genericapiserver.NewDefaultAPIGroupInfo(subresources.GroupName, scheme, runtime.NewParameterCodec(scheme), codecs)
	group.PrioritizedVersions = []schema.GroupVersion{subresources.SchemeGroupVersion}
	group.VersionedResourcesStorageMap[subresources.SchemeGroupVersion.Version] = map[string]rest.Storage{
		"pods":                            pods(),
		subresources.ResourceCheckpoint:   checkpoints{},
		"podcheckpoints":                  podCheckpointsParent(),
		subresources.ResourceArchive:      newArchive(s.Objects, s.Agents),
		subresources.ResourceContents:     newContents(s.Objects, s.Agents),
		resourceRequests:                  requests{},
		"checkpointstores":                checkpointStoresParent(),
		subresources.ResourceStoreVerify:  &verifications,
		subresources.ResourceStoreCollect: &storeCollections{objects: s.Objects, runner: s.Stores},
		subresources.ResourceVerify:       &checkpointVerifications{verifications},
	}
	if err := server.InstallAPIGroup(&group); err != nil {
		return nil, fmt.Errorf("install the API group %s: %w", subresources.GroupName, err)
	}
	return server, nil
}

// listen takes the port, with a certificate for others and one for the server
// itself.
func (s *Server) listen(config *genericapiserver.Config) error {
	serving := options.NewSecureServingOptions().WithLoopback()
	serving.BindAddress = net.ParseIP(s.Host)
	if s.Host == "" {
		serving.BindAddress = net.IPv6unspecified
	}
	serving.BindPort = s.Port
	serving.MinTLSVersion = "VersionTLS13"
	serving.HTTP2MaxStreamsPerConnection = 1000 // the aggregator sends everybody's requests over one
	serving.ServerCert.GeneratedCert = s.Certificate
	if err := serving.ApplyToConfig(config); err != nil {
		return fmt.Errorf("listen on port %d: %w", s.Port, err)
	}
	return nil
}
