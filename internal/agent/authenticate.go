package agent

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// acceptedFor is how long a token that was reviewed is taken without asking again.
	acceptedFor = time.Minute
	// rejectedFor is how long one that was refused is not reviewed again.
	rejectedFor = 10 * time.Second
	// reviewPatience is less than the caller's.
	reviewPatience = 3 * time.Second
	maxTokenBytes  = 16 << 10
	maxReviewed    = 256 // tokens that are remembered
	maxReviews     = 4   // under way
)

// authenticator lets in who shows a token of one ServiceAccount, made for this
// agent alone. What cannot be found out is refused.
type authenticator struct {
	user     string // system:serviceaccount:NAMESPACE:NAME
	audience string
	review   func(ctx context.Context, token string, audience string) (authenticationv1.TokenReviewStatus, error)
	reviews  chan struct{}
	now      func() time.Time
	log      *slog.Logger

	mu    sync.Mutex
	known map[[sha256.Size]byte]reviewed
}

type reviewed struct {
	accepted bool
	until    time.Time
}

// reviewBy asks the API server.
func reviewBy(c client.Client) func(context.Context, string, string) (authenticationv1.TokenReviewStatus, error) {
	return func(ctx context.Context, token, audience string) (authenticationv1.TokenReviewStatus, error) {
		review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
		err := c.Create(ctx, review)
		return review.Status, err
	}
}

// only passes the requests on that are let in.
func (a *authenticator) only(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !ok || token == "" || len(token) > maxTokenBytes {
			answerError(w, decline(http.StatusUnauthorized, "show a token of %s for the audience %s", a.user, a.audience))
			return
		}
		if err := a.check(r.Context(), token); err != nil {
			answerError(w, err)
			return
		}
		r.Header.Del("Authorization")
		next.ServeHTTP(w, r)
	})
}

func (a *authenticator) check(ctx context.Context, token string) error {
	key := sha256.Sum256([]byte(token))
	found, ok := a.remembered(key)
	if !ok {
		accepted, err := a.ask(ctx, token)
		if err != nil {
			a.log.Warn("a caller could not be authenticated", "error", err)
			return decline(http.StatusServiceUnavailable, "this agent could not have the caller's token reviewed: %v", err)
		}
		found.accepted = accepted
		a.remember(key, accepted)
	}
	if !found.accepted {
		return decline(http.StatusUnauthorized, "the token shown is not one of %s for the audience %s", a.user, a.audience)
	}
	return nil
}

func (a *authenticator) ask(ctx context.Context, token string) (accepted bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, reviewPatience)
	defer cancel()
	select {
	case a.reviews <- struct{}{}:
		defer func() { <-a.reviews }()
	case <-ctx.Done():
		return false, fmt.Errorf("wait for other reviews: %w", ctx.Err())
	}
	status, err := a.review(ctx, token, a.audience)
	if err != nil {
		return false, err
	}
	return status.Authenticated && status.Error == "" && status.User.Username == a.user && slices.Contains(status.Audiences, a.audience), nil
}

func (a *authenticator) remembered(key [sha256.Size]byte) (reviewed, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r, ok := a.known[key]
	if !ok || !a.now().Before(r.until) {
		return reviewed{}, false
	}
	return r, true
}

func (a *authenticator) remember(key [sha256.Size]byte, accepted bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.known == nil || len(a.known) >= maxReviewed {
		a.known = map[[sha256.Size]byte]reviewed{}
	}
	r := reviewed{accepted: accepted, until: a.now().Add(rejectedFor)}
	if accepted {
		r.until = a.now().Add(acceptedFor)
	}
	a.known[key] = r
}
