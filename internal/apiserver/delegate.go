package apiserver

import (
	"context"
	"fmt"
	"time"

	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/authentication/authenticatorfactory"
	"k8s.io/apiserver/pkg/authentication/request/headerrequest"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	"k8s.io/apiserver/pkg/authorization/path"
	"k8s.io/apiserver/pkg/authorization/union"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/apiserver/pkg/server/options"
	"k8s.io/client-go/kubernetes"
)

// The ConfigMap in which the Kubernetes API server says whose word it is when it
// passes a request on.
const (
	authenticationNamespace = "kube-system"
	authenticationConfigMap = "extension-apiserver-authentication"
)

// cacheAnswers is for how long an answer about a token or a right is used again:
// short, for rights are taken away.
const cacheAnswers = 10 * time.Second

// trust is whose word on identities counts: certificates of the cluster's
// authority, and headers of the aggregator.
type trust struct {
	clients dynamiccertificates.CAContentProvider
	headers *options.DynamicRequestHeaderController
}

// whoIsWho reads whom to trust. It goes on reading, once the server runs.
func whoIsWho(client kubernetes.Interface) (*trust, error) {
	clients, err := dynamiccertificates.NewDynamicCAFromConfigMapController("client-ca", authenticationNamespace, authenticationConfigMap, "client-ca-file", client)
	if err != nil {
		return nil, fmt.Errorf("read the authority of users' certificates: %w", err)
	}
	proxies, err := dynamiccertificates.NewDynamicCAFromConfigMapController("request-header-ca", authenticationNamespace, authenticationConfigMap, "requestheader-client-ca-file", client)
	if err != nil {
		return nil, fmt.Errorf("read the authority of the aggregator's certificate: %w", err)
	}
	headers := &options.DynamicRequestHeaderController{
		ConfigMapCAController: proxies,
		RequestHeaderAuthRequestController: headerrequest.NewRequestHeaderAuthRequestController(authenticationConfigMap, authenticationNamespace, client,
			"requestheader-username-headers", "requestheader-uid-headers", "requestheader-group-headers",
			"requestheader-extra-headers-prefix", "requestheader-allowed-names"),
	}
	if err := headers.RunOnce(context.TODO()); err != nil { // which does not use it
		return nil, fmt.Errorf("read ConfigMap %s/%s, as RoleBinding stasis-controller in that namespace lets it: %w", authenticationNamespace, authenticationConfigMap, err)
	}
	return &trust{clients: clients, headers: headers}, nil
}

// apply has every request authenticated and authorised by the Kubernetes API server.
func (t *trust) apply(config *genericapiserver.Config, client kubernetes.Interface) error {
	authentication := authenticatorfactory.DelegatingAuthenticatorConfig{
		Anonymous:                          &apiserver.AnonymousAuthConfig{Enabled: true}, // for health; RBAC says what else
		TokenAccessReviewClient:            client.AuthenticationV1(),
		TokenAccessReviewTimeout:           10 * time.Second,
		WebhookRetryBackoff:                options.DefaultAuthWebhookRetryBackoff(),
		CacheTTL:                           cacheAnswers,
		ClientCertificateCAContentProvider: t.clients,
		RequestHeaderConfig: &authenticatorfactory.RequestHeaderConfig{
			CAContentProvider:   t.headers,
			UsernameHeaders:     headerrequest.StringSliceProviderFunc(t.headers.UsernameHeaders),
			UIDHeaders:          headerrequest.StringSliceProviderFunc(t.headers.UIDHeaders),
			GroupHeaders:        headerrequest.StringSliceProviderFunc(t.headers.GroupHeaders),
			ExtraHeaderPrefixes: headerrequest.StringSliceProviderFunc(t.headers.ExtraHeaderPrefixes),
			AllowedClientNames:  headerrequest.StringSliceProviderFunc(t.headers.AllowedClientNames),
		},
	}
	for _, authority := range []dynamiccertificates.CAContentProvider{t.clients, t.headers} {
		if err := config.Authentication.ApplyClientCert(authority, config.SecureServing); err != nil {
			return fmt.Errorf("trust %s: %w", authority.Name(), err)
		}
	}
	config.Authentication.RequestHeaderConfig = authentication.RequestHeaderConfig
	authenticator, definitions, err := authentication.New()
	if err != nil {
		return fmt.Errorf("set up authentication: %w", err)
	}
	config.Authentication.Authenticator = authenticator
	config.OpenAPIConfig.SecurityDefinitions = definitions

	authorization := authorizerfactory.DelegatingAuthorizerConfig{
		SubjectAccessReviewClient: client.AuthorizationV1(),
		AllowCacheTTL:             cacheAnswers,
		DenyCacheTTL:              cacheAnswers,
		WebhookRetryBackoff:       options.DefaultAuthWebhookRetryBackoff(),
	}
	reviews, err := authorization.New()
	if err != nil {
		return fmt.Errorf("set up authorisation: %w", err)
	}
	config.Authorization.Authorizer, err = healthFirst(reviews)
	return err
}

// healthFirst lets everybody ask for health, as kubelets and load balancers do, and
// asks for all else.
func healthFirst(reviews authorizer.Authorizer) (authorizer.Authorizer, error) {
	health, err := path.NewAuthorizer([]string{"/healthz", "/readyz", "/livez"})
	if err != nil {
		return nil, fmt.Errorf("set up authorisation: %w", err)
	}
	return union.New(union.NamedAuthorizer{AuthorizerName: "health", Authorizer: health}, union.NamedAuthorizer{AuthorizerName: "kubernetes", Authorizer: reviews})
}
