package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	checkpointstore "podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend"
)

// storeOrigin is a CheckpointStore. What cannot be had from it is asked of the node that
// holds the checkpoint too: while it is there a store that is away, or damaged, keeps no
// Pod from being restored.
type storeOrigin struct {
	origin // the node that holds the checkpoint
	live   client.Reader
	open   openStores
	in     v1alpha1.StoredCheckpoint
	name   string // of the PodCheckpoint

	failure sync.Mutex
	failed  error // of the store, which is not asked again for what comes before the restore

	reading sync.Mutex
	reader  *checkpointstore.Reader // of parts; nil until it is needed, and after a failure
	end     func() error            // of the reader's store
}

var (
	_ wholeOrigin  = (*storeOrigin)(nil)
	_ secondOrigin = (*storeOrigin)(nil)
	_ giversOrigin = (*storeOrigin)(nil)
)

// fetchRetry is for how long a store is asked again before its node is: the Pod waits.
var fetchRetry = backend.Policy{Total: 10 * time.Second}

// Name implements origin.
func (o *storeOrigin) Name() string {
	if o.trouble() != nil {
		return o.origin.Name()
	}
	return "CheckpointStore " + o.in.Name
}

// instead implements secondOrigin.
func (o *storeOrigin) instead() string {
	if err := o.trouble(); err != nil {
		return fmt.Sprintf("CheckpointStore %s could not give them: %v", o.in.Name, err)
	}
	return ""
}

func (o *storeOrigin) trouble() error {
	o.failure.Lock()
	defer o.failure.Unlock()
	return o.failed
}

func (o *storeOrigin) gaveUp(err error) error {
	o.failure.Lock()
	defer o.failure.Unlock()
	o.failed = err
	return err
}

// use opens the store for as long as that takes.
func (o *storeOrigin) use(ctx context.Context, do func(*checkpointstore.Store, checkpointstore.ID) error) error {
	s, id, closeIt, err := o.opened(ctx)
	if err != nil {
		return err
	}
	defer closeIt()
	return do(s, id)
}

// opened opens the store, which has to be the one that the checkpoint was stored in.
func (o *storeOrigin) opened(ctx context.Context) (_ *checkpointstore.Store, id checkpointstore.ID, closeIt func() error, err error) {
	if id, err = checkpointstore.ParseID(o.in.CheckpointID); err != nil {
		return nil, id, nil, fmt.Errorf("the checkpoint's name in the store: %w", err)
	}
	var of v1alpha1.CheckpointStore
	if err := o.live.Get(ctx, types.NamespacedName{Name: o.in.Name}, &of); apierrors.IsNotFound(err) {
		return nil, id, nil, fmt.Errorf("there is no CheckpointStore %s any more", o.in.Name)
	} else if err != nil {
		return nil, id, nil, fmt.Errorf("read the CheckpointStore: %w", err)
	}
	s, closeIt, err := o.open(ctx, &of, nil)
	if err != nil {
		return nil, id, nil, err
	}
	if s.ID() != o.in.StoreID {
		closeIt()
		return nil, id, nil, fmt.Errorf("it is store %s now, and the checkpoint is in store %s", s.ID(), o.in.StoreID)
	}
	return s, id, closeIt, nil
}

// givers implements giversOrigin.
func (o *storeOrigin) givers() []giver {
	store, node := giver{"CheckpointStore " + o.in.Name, o.readPart}, giversOf(o.origin)
	if o.trouble() != nil { // it has failed for what came before the restore
		return append(node, store)
	}
	return append([]giver{store}, node...)
}

// readPart reads a part of a file from the store, which stays open for the next.
func (o *storeOrigin) readPart(ctx context.Context, file string, p []byte, offset int64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*laterStall, fmt.Errorf("nothing has come for %s", 2*laterStall))
	defer cancel()
	o.reading.Lock()
	defer o.reading.Unlock()
	if o.reader == nil {
		s, id, end, err := o.opened(ctx)
		if err != nil {
			return because(ctx, err)
		}
		if o.reader, err = s.Open(ctx, id); err != nil {
			end()
			return because(ctx, err)
		}
		o.end = end
	}
	if err := o.reader.ReadAt(ctx, file, p, offset); err != nil {
		o.closeReader() // what is away may be another when it is back
		return because(ctx, err)
	}
	return nil
}

// closeReader is called with reading held.
func (o *storeOrigin) closeReader() {
	if o.reader != nil {
		o.end()
	}
	o.reader = nil
}

// Close implements origin.
func (o *storeOrigin) Close() {
	o.reading.Lock()
	o.closeReader()
	o.reading.Unlock()
	o.origin.Close()
}

// bring implements wholeOrigin.
func (o *storeOrigin) bring(ctx context.Context, dir string, which func(name string) bool, done func(int64)) error {
	if err := o.trouble(); err != nil {
		return err
	}
	return o.gaveUp(o.use(ctx, func(s *checkpointstore.Store, id checkpointstore.ID) error {
		return s.GetFiles(ctx, id, dir, which, done)
	}))
}

// Open implements origin. Of the store it reads the manifest only: bring reads the rest.
func (o *storeOrigin) Open(ctx context.Context, file string, offset, length int64) (io.ReadCloser, error) {
	if file == checkpoint.ManifestName && o.trouble() == nil {
		var data []byte
		err := o.use(ctx, func(s *checkpointstore.Store, id checkpointstore.ID) (err error) {
			data, err = s.ReadFile(ctx, id, file, maxManifest)
			return err
		})
		if err != nil {
			err = because(ctx, err)
		}
		if o.gaveUp(err) == nil && offset <= int64(len(data)) {
			data = data[offset:]
			if length >= 0 {
				data = data[:min(length, int64(len(data)))]
			}
			return io.NopCloser(bytes.NewReader(data)), nil
		}
	}
	failed := o.trouble()
	body, err := o.origin.Open(ctx, file, offset, length)
	if err == nil || failed == nil || ctx.Err() != nil {
		return body, err
	}
	reason := v1alpha1.EventCheckpointFetchFailed
	switch {
	case errors.Is(failed, checkpointstore.ErrCorrupt):
		reason = v1alpha1.EventCheckpointDataCorrupt
	case errors.Is(failed, checkpointstore.ErrMissing):
		reason = v1alpha1.EventCheckpointDataMissing
	}
	why := err.Error()
	if no := (*nodeapi.Error)(nil); errors.As(err, &no) {
		why = no.Message
	}
	return nil, deny(reason, "the data of PodCheckpoint %s can be had neither from CheckpointStore %s (%v) nor from %s (%s)", o.name, o.in.Name, failed, o.origin.Name(), why)
}
