package agentapi

import (
	"context"
	"fmt"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// tokenLifetime is the shortest that the API server makes.
	tokenLifetime = 10 * time.Minute
	// tokenRest is how long a token must be good for to be shown again: longer than
	// any call.
	tokenRest = 2 * time.Minute
	// maxTokens bounds what is remembered: as many as nodes are asked at one time.
	maxTokens = 1000
)

// TokenIssuer has tokens of a ServiceAccount made, an audience each, and remembers
// them for a while.
type TokenIssuer struct {
	Client         client.SubResourceClientConstructor
	ServiceAccount client.ObjectKey
	Clock          clock.PassiveClock

	mu   sync.Mutex
	kept map[string]keptToken
}

type keptToken struct {
	token string
	until time.Time
}

// Token returns a token for an audience.
func (t *TokenIssuer) Token(ctx context.Context, audience string) (string, error) {
	if token := t.remembered(audience); token != "" {
		return token, nil
	}
	lifetime := int64(tokenLifetime / time.Second)
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}, ExpirationSeconds: &lifetime}}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: t.ServiceAccount.Namespace, Name: t.ServiceAccount.Name}}
	if err := t.Client.SubResource("token").Create(ctx, account, request); err != nil {
		return "", fmt.Errorf("request a token of ServiceAccount %s for %q: %w", t.ServiceAccount, audience, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.kept) >= maxTokens || t.kept == nil {
		t.kept = make(map[string]keptToken)
	}
	t.kept[audience] = keptToken{request.Status.Token, request.Status.ExpirationTimestamp.Time}
	return request.Status.Token, nil
}

func (t *TokenIssuer) remembered(audience string) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if kept, ok := t.kept[audience]; ok && t.Clock.Now().Add(tokenRest).Before(kept.until) {
		return kept.token
	}
	return ""
}
