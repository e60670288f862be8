package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// origin is where the data of a checkpoint come from that are not on this node.
type origin interface {
	// Name is for messages: "node node-1".
	Name() string
	// Open reads a part of a file of the checkpoint: of its manifest, or of one that
	// this lists. A negative length means to the end. An error that is a *nodeapi.Error
	// does not go away by trying again; others may, and so may those of reads. It may
	// be called again after any of them.
	Open(ctx context.Context, file string, offset, length int64) (io.ReadCloser, error)
	// For says for which Pod the data are needed from now on.
	For(pod *corev1.Pod)
	Close()
}

// wholeOrigin gives many files of a checkpoint at once, faster than one by one.
type wholeOrigin interface {
	origin
	// bring writes those that which says yes to below a directory in which they are not.
	// Where it fails, Open may still give them.
	bring(ctx context.Context, dir string, which func(name string) bool, done func(int64)) error
}

// secondOrigin has another place to ask where the first fails.
type secondOrigin interface {
	// instead says why the first was left; empty as long as it was not.
	instead() string
}

// knowingOrigin takes note of the Pods that it gives something to.
type knowingOrigin interface {
	// knows says whether a Pod is one of them.
	knows(pod types.UID) bool
}

// origins chooses where a checkpoint is fetched from: the store that it is in, or else
// the agent of the node that holds it.
type origins struct {
	peers *agentapi.Peers
	live  client.Reader
	open  openStores
}

func (o *origins) of(pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod) (origin, error) {
	if pcp.Status.NodeName == "" {
		return nil, deny(v1alpha1.EventCheckpointDataMissing, "PodCheckpoint %s does not tell which node holds its data", pcp.Name)
	}
	peer := &peerOrigin{peers: o.peers, node: pcp.Status.NodeName, uid: string(pcp.UID), name: pcp.Name, pod: pod}
	if pcp.Status.Store != nil {
		return &storeOrigin{origin: peer, live: o.live, open: o.open, in: *pcp.Status.Store, name: pcp.Name}, nil
	}
	return peer, nil
}

// peerOrigin is another node.
type peerOrigin struct {
	peers     *agentapi.Peers
	node      string
	uid, name string // of the PodCheckpoint

	mu     sync.Mutex
	pod    *corev1.Pod
	peer   *agentapi.Peer     // nil until it is called, and after a failure
	gaveTo map[types.UID]bool // Pods
}

// knows implements knowingOrigin.
func (o *peerOrigin) knows(pod types.UID) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.gaveTo[pod]
}

func (o *peerOrigin) gave(pod types.UID) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.gaveTo == nil {
		o.gaveTo = map[types.UID]bool{}
	}
	o.gaveTo[pod] = true
}

func (o *peerOrigin) Name() string { return "node " + o.node }

func (o *peerOrigin) For(pod *corev1.Pod) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pod = pod
}

func (o *peerOrigin) Close() { o.hangUp() }

func (o *peerOrigin) Open(ctx context.Context, file string, offset, length int64) (io.ReadCloser, error) {
	peer, pod, err := o.connected(ctx)
	if err != nil {
		return nil, err
	}
	body, err := peer.File(ctx, agentapi.Wanted{UID: o.uid, Pod: pod.Name, PodUID: string(pod.UID), File: file, Offset: offset, Length: length})
	if err == nil {
		o.gave(pod.UID)
		return body, nil
	}
	o.hangUp()
	var no *agentapi.Refusal
	if errors.As(err, &no) {
		return nil, o.refused(no, file)
	}
	return nil, err
}

// refused makes an answer of the other agent what it means here.
func (o *peerOrigin) refused(no *agentapi.Refusal, file string) error {
	switch no.Status {
	case http.StatusNotFound, http.StatusGone:
		return deny(v1alpha1.EventCheckpointDataMissing, "the data of PodCheckpoint %s cannot be had from node %s: %s", o.name, o.node, no.Message)
	case http.StatusConflict:
		return deny(v1alpha1.EventCheckpointNotReady, "the data of PodCheckpoint %s cannot be had from node %s: %s", o.name, o.node, no.Message)
	case http.StatusForbidden:
		return deny(v1alpha1.EventCheckpointFetchFailed, "the stasis-agent of node %s does not send PodCheckpoint %s: %s", o.node, o.name, no.Message)
	case http.StatusRequestedRangeNotSatisfiable:
		return deny(v1alpha1.EventCheckpointDataCorrupt, "%s of PodCheckpoint %s is shorter on node %s than it was written", file, o.name, o.node)
	}
	// Among them is that a certificate is not known: the Lease of an agent that has
	// just started is a moment behind.
	return no
}

func (o *peerOrigin) connected(ctx context.Context) (*agentapi.Peer, *corev1.Pod, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.peer == nil {
		peer, err := o.peers.Find(ctx, o.node)
		if err != nil {
			return nil, nil, fmt.Errorf("reach node %s: %w", o.node, err)
		}
		o.peer = peer
	}
	return o.peer, o.pod, nil
}

// hangUp makes the next call look the other agent up again: it may be another.
func (o *peerOrigin) hangUp() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.peer != nil {
		o.peer.Close()
	}
	o.peer = nil
}
