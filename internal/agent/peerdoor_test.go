package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/checkpoint"
)

// neighbour is the agent of node-2, as it asks the one that serves.
type neighbour struct {
	*served
	certificate tls.Certificate
	peers       *agentapi.Peers
	pcp         *v1alpha1.PodCheckpoint
}

// newNeighbour has announced itself, and a Pod of its node is restored from the
// checkpoint that is served.
func newNeighbour(t *testing.T, change ...func(*corev1.Pod)) *neighbour {
	t.Helper()
	n := &neighbour{served: newServed(t)}
	var err error
	if n.certificate, err = newCertificate(time.Now()); err != nil {
		t.Fatal(err)
	}
	n.announce("node-2", n.certificate, time.Now())
	n.pcp = n.hold(3 << 20)
	pod := restoringPod(func(p *corev1.Pod) { p.Spec.NodeName = "node-2" })
	for _, c := range change {
		c(pod)
	}
	if err := n.client.Create(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	n.peers = &agentapi.Peers{
		Locator: &agentapi.Locator{Reader: n.client, Namespace: "stasis-system", Clock: clock.RealClock{}, Blind: true}, Node: "node-2",
		Certificate: func() *tls.Certificate { return &n.certificate },
	}
	return n
}

func (n *neighbour) announce(node string, certificate tls.Certificate, renewed time.Time) {
	n.Helper()
	lease := &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "stasis-system", Name: agentapi.LeaseName(node)}}
	agentapi.Announcement{Node: node, Address: "127.0.0.1:1", Certificate: agentapi.Fingerprint(certificate.Certificate[0]), Protocol: agentapi.Version,
		Renewed: renewed, Duration: agentapi.LeaseDuration}.Fill(lease)
	if err := n.client.Create(n.Context(), lease); err != nil {
		n.Fatal(err)
	}
}

func (n *neighbour) wanted(file string) agentapi.Wanted {
	return agentapi.Wanted{UID: string(pcpUID), Pod: "again", PodUID: string(restoredUID), File: file, Length: -1}
}

// ask fetches a file whole.
func (n *neighbour) ask(w agentapi.Wanted) ([]byte, error) {
	peer, err := n.peers.Find(n.Context(), testNode)
	if err != nil {
		return nil, err
	}
	defer peer.Close()
	body, err := peer.File(n.Context(), w)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

func TestANodeThatRestoresACheckpointFetchesItsFiles(t *testing.T) {
	n := newNeighbour(t)
	dir := n.store.dataPath(dataName("ns", "cp", pcpUID))
	for _, file := range []string{checkpoint.ManifestName, "containers/a/config.json"} {
		want, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := n.ask(n.wanted(file)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", file, len(got), err)
		}
	}
	part := n.wanted("containers/a/config.json")
	part.Offset, part.Length = 3, 4
	if got, err := n.ask(part); err != nil || len(got) != 4 {
		t.Errorf("a part: %q, %v", got, err)
	}
}

func TestACheckpointOfAnotherNodeComesOverTLS(t *testing.T) {
	n := newNeighbour(t)
	dir := t.TempDir()
	from := &peerOrigin{peers: n.peers, node: testNode, uid: string(pcpUID), name: "cp", pod: restoringPod()}
	if from.knows(restoredUID) {
		t.Error("it has given nothing yet")
	}
	f := &fetch{from: from, dir: dir, digest: n.pcp.Status.ManifestDigest,
		stall: 10 * time.Second, patience: 10 * time.Second, received: func(int) {}, progress: &progress{}, now: time.Now}
	if err := f.run(t.Context(), func(int64) (func(), error) { return func() {}, nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := checkpoint.Verify(t.Context(), dir, n.pcp.Status.ManifestDigest); err != nil {
		t.Error(err)
	}
	if !from.knows(restoredUID) || from.knows("another") {
		t.Error("whom it gave something to is not known")
	}
}

func TestWhoeverDoesNotNeedACheckpointGetsNoneOfIt(t *testing.T) {
	other, err := newCertificate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		pod    func(*corev1.Pod)
		change func(*neighbour, *agentapi.Wanted)
		status int
	}{
		"another certificate than it announced": {nil, func(n *neighbour, _ *agentapi.Wanted) { n.certificate = other }, http.StatusUnauthorized},
		"another node's name": {nil, func(n *neighbour, _ *agentapi.Wanted) {
			n.announce("node-3", other, time.Now())
			n.peers.Node = "node-3"
		}, http.StatusUnauthorized},
		"a node that has no agent": {nil, func(n *neighbour, _ *agentapi.Wanted) { n.peers.Node = "node-9" }, http.StatusUnauthorized},
		"an agent that is not heard of": {nil, func(n *neighbour, _ *agentapi.Wanted) {
			n.announce("node-3", other, time.Now().Add(-time.Hour))
			n.peers.Node, n.certificate = "node-3", other
		}, http.StatusUnauthorized},
		"no node's name":                    {nil, func(n *neighbour, _ *agentapi.Wanted) { n.peers.Node = "" }, http.StatusBadRequest},
		"a Pod of another node":             {func(p *corev1.Pod) { p.Spec.NodeName = "node-3" }, nil, http.StatusForbidden},
		"a Pod that is not scheduled":       {func(p *corev1.Pod) { p.Spec.NodeName = "" }, nil, http.StatusForbidden},
		"a Pod of another checkpoint":       {func(p *corev1.Pod) { p.Annotations[v1alpha1.AnnotationRestoreFromUID] = "other" }, nil, http.StatusForbidden},
		"a Pod that does not restore":       {func(p *corev1.Pod) { p.Annotations = nil }, nil, http.StatusForbidden},
		"a Pod that is over":                {func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, nil, http.StatusForbidden},
		"a static Pod":                      {func(p *corev1.Pod) { p.Annotations[corev1.MirrorPodAnnotationKey] = "x" }, nil, http.StatusForbidden},
		"a Pod that does not exist":         {nil, func(_ *neighbour, w *agentapi.Wanted) { w.Pod = "other" }, http.StatusForbidden},
		"another instance of a Pod":         {nil, func(_ *neighbour, w *agentapi.Wanted) { w.PodUID = "other" }, http.StatusForbidden},
		"a checkpoint that this node lacks": {nil, func(_ *neighbour, w *agentapi.Wanted) { w.UID = "22222222-2222-3333-4444-555555555555" }, http.StatusNotFound},
		"a file that the manifest lacks":    {nil, func(_ *neighbour, w *agentapi.Wanted) { w.File = "containers/a/other" }, http.StatusNotFound},
		"a file outside":                    {nil, func(_ *neighbour, w *agentapi.Wanted) { w.File = "../../records/x.json" }, http.StatusTemporaryRedirect},
		"a part beyond the file's end":      {nil, func(_ *neighbour, w *agentapi.Wanted) { w.Offset, w.Length = 1000, 1000 }, http.StatusRequestedRangeNotSatisfiable},
	} {
		t.Run(name, func(t *testing.T) {
			var change []func(*corev1.Pod)
			if tc.pod != nil {
				change = append(change, tc.pod)
			}
			n := newNeighbour(t, change...)
			w := n.wanted("containers/a/config.json")
			if tc.change != nil {
				tc.change(n, &w)
			}
			got, err := n.ask(w)
			var refusal *agentapi.Refusal
			if !errors.As(err, &refusal) || refusal.Status != tc.status {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
}

func TestWithoutACertificateNoFileIsToBeHad(t *testing.T) {
	n := newNeighbour(t)
	path := fmt.Sprintf("/v1/peers/checkpoints/%s/files/%s?node=node-2&pod=again&podUID=%s", pcpUID, checkpoint.ManifestName, restoredUID)
	if answer, _ := n.do("GET", path, ""); answer.StatusCode != http.StatusUnauthorized {
		t.Errorf("with the token of stasis-controller: %s", answer.Status)
	}
}

func TestTheAgentIsFoundByTheCertificateThatItAnnounced(t *testing.T) {
	n := newNeighbour(t)
	var lease coordinationv1.Lease
	name := metav1.ObjectMeta{Namespace: "stasis-system", Name: agentapi.LeaseName(testNode)}
	if err := n.client.Get(t.Context(), client.ObjectKey{Namespace: name.Namespace, Name: name.Name}, &lease); err != nil {
		t.Fatal(err)
	}
	lease.Annotations[agentapi.AnnotationCertificate] = agentapi.Fingerprint([]byte("another"))
	if err := n.client.Update(t.Context(), &lease); err != nil {
		t.Fatal(err)
	}
	var unreachable *agentapi.Unreachable
	if _, err := n.ask(n.wanted(checkpoint.ManifestName)); !errors.As(err, &unreachable) {
		t.Errorf("%v", err)
	}
}

func TestAFetchEndsWithItsCheckpoint(t *testing.T) {
	n := newNeighbour(t)
	peer, err := n.peers.Find(t.Context(), testNode)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if err := n.client.Delete(t.Context(), n.pcp); err != nil {
		t.Fatal(err)
	}
	_, err = peer.File(context.Background(), n.wanted(checkpoint.ManifestName))
	var refusal *agentapi.Refusal
	if !errors.As(err, &refusal) || refusal.Status != http.StatusConflict {
		t.Errorf("%v", err)
	}
}

func TestWhatAPeerAnswersEndsAFetchOrIsAskedForAgain(t *testing.T) {
	o := &peerOrigin{node: "node-1", uid: "u", name: "cp"}
	for status, want := range map[int]string{
		http.StatusForbidden:                    v1alpha1.EventCheckpointFetchFailed,
		http.StatusNotFound:                     v1alpha1.EventCheckpointDataMissing,
		http.StatusGone:                         v1alpha1.EventCheckpointDataMissing,
		http.StatusConflict:                     v1alpha1.EventCheckpointNotReady,
		http.StatusRequestedRangeNotSatisfiable: v1alpha1.EventCheckpointDataCorrupt,
		// A Lease that is a moment behind, an agent that is busy: asked again.
		http.StatusUnauthorized:        "",
		http.StatusServiceUnavailable:  "",
		http.StatusInternalServerError: "",
	} {
		if got := reasonOf(o.refused(&agentapi.Refusal{Node: "node-1", Status: status, Message: "m"}, "f")); got != want {
			t.Errorf("%d: %q, want %q", status, got, want)
		}
	}
}
