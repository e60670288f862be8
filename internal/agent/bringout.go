package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
)

// contentsReader tells what is inside a checkpoint.
type contentsReader func(ctx context.Context, dir fs.FS, m *checkpoint.Manifest) (*api.CheckpointContents, error)

const (
	// lookPatience is less than the caller's.
	lookPatience = 20 * time.Second
	// maxLooks is how many checkpoints are looked into at one time.
	maxLooks = 2
)

// archive answers with a checkpoint's archive, or a range of it.
func (s *server) archive(w http.ResponseWriter, r *http.Request) error {
	ctx, held, err := s.holdings.open(r.Context(), types.UID(r.PathValue("uid")))
	if err != nil {
		return err
	}
	defer held.close()
	a, err := archiveOf(held, r.URL.Query().Get(agentapi.QueryContainer))
	if err != nil {
		return err
	}
	header := w.Header()
	header.Set("ETag", a.ETag())
	header.Set("Content-Type", "application/x-tar")
	header.Set("Cache-Control", "no-store")
	if wantsDigest(r.Header) {
		if digest := s.digests.within(ctx, held.object.UID, r.URL.Query().Get(agentapi.QueryContainer), a.ETag()); digest != "" {
			header.Set("Repr-Digest", digest)
		}
	}
	content := &failing{Reader: a.NewReader()}
	defer content.Close()
	paced := &paced{ResponseWriter: w, control: http.NewResponseController(w)}
	stop := context.AfterFunc(ctx, func() {
		content.Close()
		paced.control.SetWriteDeadline(time.Unix(1, 0)) // it may hang in a write
	})
	defer stop()
	http.ServeContent(paced, r, "", a.Modified(), content)
	if content.err != nil {
		s.log.Warn("an archive was given up on its way out", "podcheckpoint", held.object.Namespace+"/"+held.object.Name,
			"error", content.err, "cause", context.Cause(ctx))
		// What has been sent is not the whole: the client must not take it for that.
		panic(http.ErrAbortHandler)
	}
	return nil
}

func archiveOf(held *holding, container string) (*archive.Archive, error) {
	if container != "" {
		a, err := archive.OpenContainer(held.files(), held.manifest, container)
		if errors.Is(err, archive.ErrNoContainer) {
			return nil, decline(http.StatusNotFound, "PodCheckpoint %s: %v", held.object.Name, err)
		}
		return a, err
	}
	object, err := exported(held.object)
	if err != nil {
		return nil, err
	}
	return archive.Open(held.files(), held.manifest, object)
}

// failing remembers the error that ended a read.
type failing struct {
	*archive.Reader
	err error
}

func (f *failing) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}

// paced gives a client time for each piece. It has no ReadFrom: what is copied
// through it takes one small buffer.
type paced struct {
	http.ResponseWriter
	control *http.ResponseController
}

func (p *paced) Write(b []byte) (int, error) {
	// An error means a connection that cannot have deadlines: a test's.
	_ = p.control.SetWriteDeadline(time.Now().Add(stallPatience))
	return p.ResponseWriter.Write(b)
}

func (p *paced) Unwrap() http.ResponseWriter { return p.ResponseWriter }

// look answers with what is inside a checkpoint.
func (s *server) look(w http.ResponseWriter, r *http.Request) error {
	ctx, held, err := s.holdings.open(r.Context(), types.UID(r.PathValue("uid")))
	if err != nil {
		return err
	}
	defer held.close()
	ctx, cancel := context.WithTimeoutCause(ctx, lookPatience, fmt.Errorf("the checkpoint could not be read within %s", lookPatience))
	defer cancel()
	inside, err := s.contents(ctx, held.files(), held.manifest)
	if err != nil {
		return fmt.Errorf("look into PodCheckpoint %s: %w", held.object.Name, err)
	}
	inside.ObjectMeta = metav1.ObjectMeta{Namespace: held.object.Namespace, Name: held.object.Name, UID: held.object.UID}
	data, err := json.Marshal(inside)
	if err != nil {
		return fmt.Errorf("encode the contents of PodCheckpoint %s: %w", held.object.Name, err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Write(data)
	return nil
}
