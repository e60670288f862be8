// Package agentapitest plays an agent, for tests of what calls agents.
package agentapitest

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podstasis.dev/stasis/internal/agentapi"
)

// Namespace is where the Leases are.
const Namespace = "stasis-system"

// Agent serves over TLS, as the real one does.
type Agent struct {
	*httptest.Server
	node string
}

// Start starts an agent of a node, which ends with the test.
func Start(t testing.TB, node string, handler http.Handler) *Agent {
	t.Helper()
	a := &Agent{Server: httptest.NewTLSServer(handler), node: node}
	t.Cleanup(a.Close)
	return a
}

// Announcement is what it says of itself now.
func (a *Agent) Announcement() agentapi.Announcement {
	return agentapi.Announcement{
		Node: a.node, Address: a.Listener.Addr().String(), Certificate: agentapi.Fingerprint(a.Certificate().Raw),
		Protocol: agentapi.Version, Program: "test", Holder: "stasis-agent-" + a.node, Renewed: time.Now(), Duration: agentapi.LeaseDuration,
	}
}

// Lease is the announcement's, with changes.
func (a *Agent) Lease(change ...func(*agentapi.Announcement)) *coordinationv1.Lease {
	said := a.Announcement()
	for _, c := range change {
		c(&said)
	}
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: Namespace, Name: agentapi.LeaseName(a.node)}}
	said.Fill(lease)
	return lease
}
