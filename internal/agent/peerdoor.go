package agent

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/checkpoint"
)

const (
	// letInFor is how long a peer that was let in for a Pod is not looked at again:
	// it asks for one part of a file after the other.
	letInFor = 15 * time.Second
	// maxLetIn bounds what is remembered.
	maxLetIn = 256
)

// peerDoor lets agents of other nodes in, each for the checkpoints that it needs now:
// of which a Pod is restored that is bound to its node. Admission has seen to it that
// whoever created the Pod may restore them.
type peerDoor struct {
	locator interface {
		Locate(ctx context.Context, node string, needs int) (agentapi.Announcement, error)
	}
	live client.Reader
	// needed takes note of a Pod that may need the checkpoint after it runs.
	needed func(checkpoint types.UID, pod types.NamespacedName, podUID types.UID) error
	now    func() time.Time

	mu    sync.Mutex
	known map[visit]time.Time
}

// visit is what a peer is let in for.
type visit struct {
	node, certificate string
	checkpoint        types.UID
	pod               string
	podUID            types.UID
}

// identify says who calls, and for what. That it is the agent of the node that it
// names has been checked.
func (d *peerDoor) identify(r *http.Request) (visit, error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return visit{}, decline(http.StatusUnauthorized, "show the certificate that your stasis-agent announces")
	}
	query := r.URL.Query()
	v := visit{
		node: query.Get(agentapi.QueryNode), certificate: agentapi.Fingerprint(r.TLS.PeerCertificates[0].Raw),
		checkpoint: types.UID(r.PathValue("uid")), pod: query.Get(agentapi.QueryPod), podUID: types.UID(query.Get(agentapi.QueryPodUID)),
	}
	if v.node == "" || v.pod == "" || v.podUID == "" {
		return visit{}, decline(http.StatusBadRequest, "say which node and which Pod the checkpoint is for")
	}
	if d.remembers(v) {
		return v, nil
	}
	return v, d.isAgentOf(r.Context(), v)
}

// letIn says whether the node needs the checkpoint.
func (d *peerDoor) letIn(ctx context.Context, v visit, pcp *v1alpha1.PodCheckpoint) error {
	if d.remembers(v) {
		return nil
	}
	if err := d.needs(ctx, v, pcp); err != nil {
		return err
	}
	d.remember(v)
	return nil
}

func (d *peerDoor) isAgentOf(ctx context.Context, v visit) error {
	agent, err := d.locator.Locate(ctx, v.node, agentapi.VersionPeers)
	var unreachable *agentapi.Unreachable
	if errors.As(err, &unreachable) {
		return decline(http.StatusUnauthorized, "who calls is not known: %v", err)
	} else if err != nil {
		return &declined{http.StatusServiceUnavailable, fmt.Sprintf("this agent could not find out who calls: %v", err), time.Second}
	}
	if subtle.ConstantTimeCompare([]byte(agent.Certificate), []byte(v.certificate)) != 1 {
		return decline(http.StatusUnauthorized, "the certificate shown is not the one that the stasis-agent of node %q announced", v.node)
	}
	return nil
}

func (d *peerDoor) needs(ctx context.Context, v visit, pcp *v1alpha1.PodCheckpoint) error {
	var pod corev1.Pod
	err := d.live.Get(ctx, types.NamespacedName{Namespace: pcp.Namespace, Name: v.pod}, &pod)
	if err != nil && !apierrors.IsNotFound(err) {
		return &declined{http.StatusServiceUnavailable, fmt.Sprintf("this agent could not find out what the checkpoint is for: %v", err), time.Second}
	}
	over := pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
	if err != nil || pod.UID != v.podUID || over || pod.Spec.NodeName != v.node || notFromAPI(&pod) != "" ||
		pod.Annotations[v1alpha1.AnnotationRestoreFrom] != pcp.Name || pod.Annotations[v1alpha1.AnnotationRestoreFromUID] != string(pcp.UID) {
		return decline(http.StatusForbidden, "node %q has no Pod %s of UID %s that is restored from PodCheckpoint %s", v.node, v.pod, v.podUID, pcp.Name)
	}
	if !pcp.DeletionTimestamp.IsZero() && !v1alpha1.AwaitsMemory(&pod) {
		return notReady(pcp)
	}
	if runsEarly(&pod) {
		return d.needed(pcp.UID, types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}, pod.UID)
	}
	return nil
}

func (d *peerDoor) remembers(v visit) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	until, known := d.known[v]
	return known && d.now().Before(until)
}

func (d *peerDoor) remember(v visit) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known == nil || len(d.known) >= maxLetIn {
		d.known = map[visit]time.Time{}
	}
	d.known[v] = d.now().Add(letInFor)
}

// file answers with a part of a checkpoint's file.
func (s *server) file(w http.ResponseWriter, r *http.Request) error {
	caller, err := s.peers.identify(r)
	if err != nil {
		return err
	}
	ctx, held, err := s.holdings.openNeeded(r.Context(), caller.checkpoint)
	if err != nil {
		return err
	}
	defer held.close()
	if err := s.peers.letIn(ctx, caller, held.object); err != nil {
		return err
	}
	name := r.PathValue("path")
	if name != checkpoint.ManifestName && !slices.ContainsFunc(held.manifest.Files, func(f checkpoint.File) bool { return f.Path == name }) {
		return decline(http.StatusNotFound, "PodCheckpoint %s has no file %.200q", held.object.Name, name)
	}
	info, err := held.root.Lstat(filepath.FromSlash(name))
	if err == nil && !info.Mode().IsRegular() {
		err = fs.ErrNotExist
	}
	if errors.Is(err, fs.ErrNotExist) {
		return decline(http.StatusGone, "the data of PodCheckpoint %s are not whole on this node: no %s", held.object.Name, name)
	} else if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	f, err := held.root.Open(filepath.FromSlash(name))
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Cache-Control", "no-store")
	paced := &paced{ResponseWriter: w, control: http.NewResponseController(w)}
	stop := context.AfterFunc(ctx, func() { paced.control.SetWriteDeadline(time.Unix(1, 0)) }) // it may hang in a write
	defer stop()
	// What has been sent is as long as it is to be, or the connection breaks: the
	// length comes first.
	http.ServeContent(paced, r, "", time.Time{}, f)
	return nil
}
