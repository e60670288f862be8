package agentapi_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/agentapi/agentapitest"
)

// audiences plays the API server: a token says whom it is for.
type audiences struct{}

func (audiences) Token(_ context.Context, audience string) (string, error) {
	return "for " + audience, nil
}

func clientOf(t *testing.T, objects ...client.Object) *agentapi.Client {
	t.Helper()
	reader := fake.NewClientBuilder().WithScheme(clientgoscheme.Scheme).WithObjects(objects...).Build()
	return &agentapi.Client{Tokens: audiences{},
		Locator: &agentapi.Locator{Reader: reader, Namespace: agentapitest.Namespace, Clock: clock.RealClock{}}}
}

func theNode() *corev1.Node { return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}} }

func TestAnArchiveComesFromTheAgentOfItsNode(t *testing.T) {
	agent := agentapitest.Start(t, "node-1", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/checkpoints/u-1/archive" || r.URL.Query().Get("container") != "a b" {
			t.Errorf("asked for %s", r.URL)
		}
		if got := r.Header.Get("Authorization"); got != "Bearer for stasis-agent/node-1" {
			t.Errorf("Authorization: %q", got)
		}
		if r.Header.Get("Range") != "bytes=2-3" || r.Header.Get("X-Remote-User") != "" {
			t.Errorf("header %v", r.Header)
		}
		w.WriteHeader(http.StatusPartialContent)
		io.WriteString(w, "cd")
	}))
	answer, err := clientOf(t, agent.Lease()).Archive(t.Context(), "GET", "node-1", "u-1", "a b", http.Header{"Range": {"bytes=2-3"}, "X-Remote-User": {"ann"}})
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if b, _ := io.ReadAll(answer.Body); string(b) != "cd" || answer.StatusCode != http.StatusPartialContent {
		t.Errorf("%d %q", answer.StatusCode, b)
	}
}

func TestTheTokenIsShownOnlyToWhoeverHasTheAnnouncedCertificate(t *testing.T) {
	asked := false
	impostor := agentapitest.Start(t, "node-1", http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	lease := impostor.Lease(func(a *agentapi.Announcement) { a.Certificate = agentapi.Fingerprint([]byte("another")) })
	_, err := clientOf(t, lease, theNode()).Contents(t.Context(), "node-1", "u")
	var unreachable *agentapi.Unreachable
	if !errors.As(err, &unreachable) || unreachable.Reason != agentapi.NoAnswer || !strings.Contains(err.Error(), "shows the certificate") {
		t.Errorf("%v", err)
	}
	if asked {
		t.Error("asked, with the token")
	}
}

func TestWhoeverCannotAnswerIsNamedAtOnce(t *testing.T) {
	agent := agentapitest.Start(t, "node-1", http.NotFoundHandler())
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() }) // after those below, which run side by side
	slow := agentapitest.Start(t, "node-1", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	for name, tc := range map[string]struct {
		objects []client.Object
		reason  agentapi.Reason
		message string
	}{
		"no agent":            {[]client.Object{theNode()}, agentapi.NoAgent, `no stasis-agent runs on node "node-1"`},
		"no node":             {nil, agentapi.NodeGone, `node "node-1" no longer exists`},
		"a node that went":    {[]client.Object{agent.Lease(stale)}, agentapi.NodeGone, `node "node-1" no longer exists`},
		"an agent that went":  {[]client.Object{theNode(), agent.Lease(stale)}, agentapi.GoneAway, "was last heard of 1m"},
		"an old agent":        {[]client.Object{theNode(), agent.Lease(func(a *agentapi.Announcement) { a.Protocol = 0 })}, agentapi.TooOld, "speaks version 0, and version 1 is needed; upgrade"},
		"nobody listens":      {[]client.Object{theNode(), agent.Lease(func(a *agentapi.Announcement) { a.Address = "127.0.0.1:1" })}, agentapi.NoAnswer, "does not answer at 127.0.0.1:1"},
		"a partition":         {[]client.Object{theNode(), agent.Lease(func(a *agentapi.Announcement) { a.Address = silent.Addr().String() })}, agentapi.NoAnswer, "does not answer at"},
		"an agent that hangs": {[]client.Object{theNode(), slow.Lease()}, agentapi.NoAnswer, "does not answer at"},
		"a bad announcement":  {[]client.Object{theNode(), agent.Lease(func(a *agentapi.Announcement) { a.Address = "somewhere:80" })}, agentapi.NoAnswer, "has not announced itself properly"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var err error
			took := time.Hour
			for range 5 { // the machine may be busy with something else
				began := time.Now()
				_, err = clientOf(t, tc.objects...).Archive(t.Context(), "GET", "node-1", "u", "", nil)
				if took = min(took, time.Since(began)); took < 5*time.Second {
					break
				}
			}
			if took > 5*time.Second {
				t.Errorf("said after %s at best", took)
			}
			var unreachable *agentapi.Unreachable
			if !errors.As(err, &unreachable) || unreachable.Reason != tc.reason || !strings.Contains(err.Error(), tc.message) {
				t.Errorf("%v", err)
			}
		})
	}
}

func stale(a *agentapi.Announcement) {
	a.Renewed = a.Renewed.Add(-agentapi.LeaseDuration - time.Second)
}

func TestARefusalIsPassedOnAndBounded(t *testing.T) {
	agent := agentapitest.Start(t, "node-1", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "not here"+strings.Repeat("!", 1<<20), http.StatusNotFound)
	}))
	_, err := clientOf(t, agent.Lease()).Contents(t.Context(), "node-1", "u")
	var refusal *agentapi.Refusal
	if !errors.As(err, &refusal) || refusal.Status != http.StatusNotFound || !strings.HasPrefix(refusal.Message, "not here") || len(refusal.Message) > 2<<10 {
		t.Errorf("%.200v", err)
	}
}

func TestAnAnswerIsReadForLongerThanItsBeginMayTake(t *testing.T) {
	agent := agentapitest.Start(t, "node-1", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		select {
		case <-time.After(5 * time.Second):
			io.WriteString(w, "late")
		case <-r.Context().Done():
		}
	}))
	answer, err := clientOf(t, agent.Lease()).Archive(t.Context(), "GET", "node-1", "u", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if b, err := io.ReadAll(answer.Body); string(b) != "late" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

func TestACallEndsAtTheAgentWhenItsCallerIsGone(t *testing.T) {
	ended := make(chan struct{})
	agent := agentapitest.Start(t, "node-1", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		close(ended)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	answer, err := clientOf(t, agent.Lease()).Archive(ctx, "GET", "node-1", "u", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	cancel()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the agent goes on")
	}
}
