package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
)

// holdings opens the checkpoints of this node for whoever reads them.
type holdings struct {
	store   *store
	objects client.Reader // this node's PodCheckpoints
	readers *readers
}

// holding is a checkpoint that somebody reads.
type holding struct {
	object   *v1alpha1.PodCheckpoint
	manifest *checkpoint.Manifest
	root     *os.Root
	end      func()
}

func (h *holding) files() fs.FS { return h.root.FS() }

func (h *holding) close() {
	h.end()
	h.root.Close()
}

// open finds a complete checkpoint by its object's UID. The context that it returns
// ends when the checkpoint is removed: its deletion waits for nobody who reads.
func (h *holdings) open(ctx context.Context, uid types.UID) (context.Context, *holding, error) {
	ctx, held, err := h.openNeeded(ctx, uid)
	if err == nil && !held.object.DeletionTimestamp.IsZero() {
		held.close()
		return nil, nil, notReady(held.object)
	}
	return ctx, held, err
}

// openNeeded also opens one whose deletion waits for those who need it.
func (h *holdings) openNeeded(ctx context.Context, uid types.UID) (context.Context, *holding, error) {
	if err := validUID(uid); err != nil {
		return nil, nil, decline(http.StatusNotFound, "%v", err)
	}
	ctx, end := h.readers.begin(ctx, uid)
	held, err := h.find(ctx, uid)
	if err != nil {
		end()
		return nil, nil, err
	}
	held.end = end
	return ctx, held, nil
}

func notReady(pcp *v1alpha1.PodCheckpoint) error {
	return decline(http.StatusConflict, "PodCheckpoint %s is not Ready, or being deleted", pcp.Name)
}

func (h *holdings) find(ctx context.Context, uid types.UID) (*holding, error) {
	held, err := h.store.held()
	if err != nil {
		return nil, err
	}
	data := held[uid]
	if data == "" {
		return nil, decline(http.StatusNotFound, "this node holds no data of the PodCheckpoint with UID %s", uid)
	}
	parts := strings.Split(data, "_")
	var pcp v1alpha1.PodCheckpoint
	err = h.objects.Get(ctx, types.NamespacedName{Namespace: parts[0], Name: parts[1]}, &pcp)
	if apierrors.IsNotFound(err) || err == nil && pcp.UID != uid {
		return nil, decline(http.StatusNotFound, "the PodCheckpoint with UID %s does not exist any more", uid)
	} else if err != nil {
		return nil, fmt.Errorf("read the PodCheckpoint: %w", err)
	}
	if !ready(&pcp) {
		return nil, notReady(&pcp)
	}
	dir := h.store.dataPath(data)
	m, digest, err := checkpoint.ReadManifest(dir)
	if digest != "" && digest != pcp.Status.ManifestDigest {
		return nil, decline(http.StatusConflict, "the data of PodCheckpoint %s have been altered: %s has digest %s, recorded is %s", pcp.Name, checkpoint.ManifestName, digest, pcp.Status.ManifestDigest)
	}
	if errors.Is(err, checkpoint.ErrMissing) {
		return nil, decline(http.StatusGone, "the data of PodCheckpoint %s are not on this node any more: %v", pcp.Name, err)
	} else if err != nil {
		return nil, fmt.Errorf("read the checkpoint: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open the checkpoint: %w", err)
	}
	return &holding{object: &pcp, manifest: m, root: root}, nil
}

// exported is a PodCheckpoint as an archive holds it: without what the API server
// keeps for itself, so that it stays the same as long as its users do not change it.
func exported(pcp *v1alpha1.PodCheckpoint) ([]byte, error) {
	out := pcp.DeepCopy()
	out.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind("PodCheckpoint"))
	out.ManagedFields, out.ResourceVersion, out.Finalizers, out.OwnerReferences = nil, "", nil, nil
	data, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode the PodCheckpoint: %w", err)
	}
	return append(data, '\n'), nil
}

// errRemoved ends those who read a checkpoint that is removed.
var errRemoved = errors.New("the checkpoint is being removed")

// readers are those who read checkpoints.
type readers struct {
	mu sync.Mutex
	of map[types.UID]map[*reading]struct{}
}

type reading struct{ cancel context.CancelCauseFunc }

func newReaders() *readers { return &readers{of: map[types.UID]map[*reading]struct{}{}} }

func (r *readers) begin(ctx context.Context, uid types.UID) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	one := &reading{cancel}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.of[uid] == nil {
		r.of[uid] = map[*reading]struct{}{}
	}
	r.of[uid][one] = struct{}{}
	return ctx, func() {
		cancel(nil)
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.of[uid], one)
		if len(r.of[uid]) == 0 {
			delete(r.of, uid)
		}
	}
}

// turnOut ends all that read a checkpoint, and waits for none.
func (r *readers) turnOut(uid types.UID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for one := range r.of[uid] {
		one.cancel(errRemoved)
	}
}
