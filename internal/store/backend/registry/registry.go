// Package registry keeps a store's objects in a repository of an OCI registry: each as a
// blob, with a manifest that is tagged by the object's name.
package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	ociregistry "oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"

	"podstasis.dev/stasis/internal/store/backend"
)

const (
	// ArtifactType is the manifests'.
	ArtifactType = "application/vnd.podstasis.checkpoint.v1"
	// ObjectType is the media type of the blobs.
	ObjectType = "application/vnd.podstasis.checkpoint.object.v1"

	// annotationWritten makes each manifest another, also of the same object put twice:
	// deleting one by its digest deletes no other.
	annotationWritten = "dev.podstasis.checkpoint.written"

	// maxManifest is what registries take.
	maxManifest = 4 << 20
	// maxTags bounds a page of tags. Some registries know only one page.
	maxTags = 256 << 20
	tagPage = 1000
	// atOnce is how many manifests are asked for at a time.
	atOnce = 16
	// maxKnown is how many objects' blobs are remembered for those that refer to them.
	maxKnown = 1 << 16
)

// Options say which repository, and as whom.
type Options struct {
	Repository string // HOST[:PORT]/PATH
	PlainHTTP  bool

	Username, Password string
	RefreshToken       string // instead of a password, for registries that give such

	HTTP *http.Client
}

// Open connects to nothing yet.
func Open(o Options) (backend.Backend, error) {
	ref, err := ociregistry.ParseReference(o.Repository)
	if err != nil {
		return nil, err
	}
	if ref.Reference != "" {
		return nil, fmt.Errorf("%s names a tag or digest: only the repository is wanted", o.Repository)
	}
	repo := &remote.Repository{
		Reference: ref,
		PlainHTTP: o.PlainHTTP,
		Client: &auth.Client{
			Client: o.HTTP,
			Cache:  auth.NewCache(),
			Credential: auth.StaticCredential(ref.Host(), auth.Credential{
				Username: o.Username, Password: o.Password, RefreshToken: o.RefreshToken,
			}),
		},
		TagListPageSize:  tagPage,
		MaxMetadataBytes: maxTags,
	}
	return &registry{repo: repo, known: map[string]ocispec.Descriptor{}}, nil
}

type registry struct {
	repo *remote.Repository

	mu     sync.Mutex
	known  map[string]ocispec.Descriptor // an object's blob, which may be another by now
	config bool                          // the empty configuration is there
}

// Put pushes the blob and then the manifest, which makes the object appear. The manifest
// of an object that is replaced is deleted, where the registry deletes.
func (r *registry) Put(ctx context.Context, name string, data []byte, refs []string) error {
	if err := backend.CheckPut(name, data, refs); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	before, _, err := r.manifest(ctx, name)
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return r.failed(ctx, "look for", name, err)
	}
	blob := ocispec.Descriptor{
		MediaType: ObjectType, Digest: digest.FromBytes(data), Size: int64(len(data)),
		Annotations: map[string]string{ocispec.AnnotationTitle: name},
	}
	if err := r.push(ctx, blob, data); err != nil {
		return r.failed(ctx, fmt.Sprintf("push the %d bytes of", len(data)), name, err)
	}
	// What is remembered of others may be out of date: then once more from the start.
	err = r.pushManifest(ctx, name, blob, refs)
	if refused(err, "MANIFEST_BLOB_UNKNOWN", "BLOB_UNKNOWN", "MANIFEST_INVALID") {
		r.forget()
		err = r.pushManifest(ctx, name, blob, refs)
	}
	if err != nil {
		return r.failed(ctx, "push the manifest of", name, err)
	}
	r.remember(name, blob)
	if before != "" {
		// It is only room that is lost if this fails, until the registry collects what
		// has no tag.
		_ = r.deleteManifest(ctx, before)
	}
	return nil
}

func (r *registry) pushManifest(ctx context.Context, name string, blob ocispec.Descriptor, refs []string) error {
	if err := r.pushConfig(ctx); err != nil {
		return err
	}
	layers, err := r.layers(ctx, refs)
	if err != nil {
		return err
	}
	var written [16]byte
	rand.Read(written[:]) // never fails
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned:    specs.Versioned{SchemaVersion: 2},
		MediaType:    ocispec.MediaTypeImageManifest,
		ArtifactType: ArtifactType,
		Config:       ocispec.DescriptorEmptyJSON,
		Layers:       append([]ocispec.Descriptor{blob}, layers...),
		Annotations: map[string]string{
			ocispec.AnnotationTitle: name,
			annotationWritten:       hex.EncodeToString(written[:]),
		},
	})
	if err != nil {
		return err
	}
	if len(manifest) > maxManifest {
		return fmt.Errorf("%w: the manifest of an object with %d references has %d bytes, more than %d", backend.ErrInvalid, len(refs), len(manifest), maxManifest)
	}
	resp, err := r.do(ctx, http.MethodPut, r.url("manifests", tag(name)), manifest, http.Header{"Content-Type": {ocispec.MediaTypeImageManifest}}, http.StatusCreated)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

func (r *registry) pushConfig(ctx context.Context) error {
	r.mu.Lock()
	there := r.config
	r.mu.Unlock()
	if there {
		return nil
	}
	if err := r.push(ctx, ocispec.DescriptorEmptyJSON, ocispec.DescriptorEmptyJSON.Data); err != nil {
		return err
	}
	r.mu.Lock()
	r.config = true
	r.mu.Unlock()
	return nil
}

// layers finds the blobs of objects.
func (r *registry) layers(ctx context.Context, names []string) ([]ocispec.Descriptor, error) {
	layers := make([]ocispec.Descriptor, len(names))
	errs := make([]error, len(names))
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	limit := make(chan struct{}, atOnce)
	var workers sync.WaitGroup
	for i, name := range names {
		r.mu.Lock()
		blob, there := r.known[name]
		r.mu.Unlock()
		if there {
			layers[i] = blob
			continue
		}
		limit <- struct{}{}
		workers.Go(func() {
			defer func() { <-limit }()
			_, manifest, err := r.manifest(ctx, name)
			if err != nil {
				errs[i] = fmt.Errorf("what it refers to: %w", err)
				cancel()
				return
			}
			layers[i] = manifest.Layers[0]
			r.remember(name, manifest.Layers[0])
		})
	}
	workers.Wait()
	for _, err := range errs { // the first that went wrong, not what was cancelled for it
		if err != nil && !errors.Is(err, context.Canceled) {
			return nil, err
		}
	}
	return layers, errors.Join(errs...)
}

func (r *registry) remember(name string, blob ocispec.Descriptor) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.known) >= maxKnown {
		clear(r.known)
	}
	r.known[name] = blob
}

func (r *registry) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.known)
	r.config = false
}

// Read asks for the manifest each time: the object may have been replaced.
func (r *registry) Read(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	if err := backend.CheckRead(name, offset, length); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	_, manifest, err := r.manifest(ctx, name)
	if err != nil {
		return nil, r.failed(ctx, "read", name, err)
	}
	blob := manifest.Layers[0]
	from, n, err := backend.Range(name, blob.Size, offset, length)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return []byte{}, nil
	}
	data, err := r.blob(ctx, blob, from, n)
	if err != nil {
		return nil, r.failed(ctx, "read", name, err)
	}
	return data, nil
}

func (r *registry) blob(ctx context.Context, blob ocispec.Descriptor, from, n int64) ([]byte, error) {
	header := http.Header{}
	if n < blob.Size {
		header.Set("Range", fmt.Sprintf("bytes=%d-%d", from, from+n-1))
	}
	resp, err := r.do(ctx, http.MethodGet, r.url("blobs", blob.Digest.String()), nil, header, http.StatusOK, http.StatusPartialContent)
	if refused(err, "BLOB_UNKNOWN") || status(err) == http.StatusNotFound {
		// Not ErrNotFound, which would say that the object is not there.
		return nil, fmt.Errorf("the registry has the manifest, but not the blob %s (any more)", blob.Digest)
	}
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusPartialContent:
		want := fmt.Sprintf("bytes %d-%d/", from, from+n-1)
		if got := resp.Header.Get("Content-Range"); !strings.HasPrefix(got, want) {
			return nil, fmt.Errorf("the registry returned the range %q, want %s", got, want)
		}
	case from > 0: // all of it: this registry knows no ranges
		if _, err := io.CopyN(io.Discard, resp.Body, from); err != nil {
			return nil, err
		}
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(resp.Body, data); err != nil {
		return nil, err
	}
	if n == blob.Size && blob.Digest != digest.FromBytes(data) {
		return nil, fmt.Errorf("the registry returned other bytes than the blob %s has", blob.Digest)
	}
	return data, nil
}

// manifest returns the manifest of an object and its digest. It has a layer.
func (r *registry) manifest(ctx context.Context, name string) (digest.Digest, *ocispec.Manifest, error) {
	resp, err := r.do(ctx, http.MethodGet, r.url("manifests", tag(name)), nil, http.Header{"Accept": {ocispec.MediaTypeImageManifest}}, http.StatusOK)
	if status(err) == http.StatusNotFound {
		return "", nil, fmt.Errorf("%w: %s", backend.ErrNotFound, name)
	}
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxManifest+1))
	if err != nil {
		return "", nil, err
	}
	if len(data) > maxManifest {
		return "", nil, fmt.Errorf("its manifest has more than %d bytes", maxManifest)
	}
	manifest, err := decodeManifest(name, data)
	if err != nil {
		return "", nil, err
	}
	return digest.FromBytes(data), manifest, nil
}

// decodeManifest makes sure that a manifest is of an object of that name.
func decodeManifest(name string, data []byte) (*ocispec.Manifest, error) {
	var manifest ocispec.Manifest
	if err := json.Unmarshal(data, &manifest); err != nil {
		return nil, fmt.Errorf("its manifest: %w", err)
	}
	switch {
	case manifest.ArtifactType != ArtifactType || manifest.Annotations[ocispec.AnnotationTitle] != name:
		return nil, fmt.Errorf("%w: the tag %s is of the type %q and the title %q: not this store's", backend.ErrNotFound, tag(name), manifest.ArtifactType, manifest.Annotations[ocispec.AnnotationTitle])
	case len(manifest.Layers) == 0 || manifest.Layers[0].MediaType != ObjectType || manifest.Layers[0].Size < 0:
		return nil, fmt.Errorf("the manifest %s has no object", tag(name))
	}
	if err := manifest.Layers[0].Digest.Validate(); err != nil || manifest.Layers[0].Digest.Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("the manifest %s has the digest %q", tag(name), manifest.Layers[0].Digest)
	}
	return &manifest, nil
}

// List asks for the manifest of each tag, which knows the size.
func (r *registry) List(ctx context.Context, prefix string) iter.Seq2[backend.Object, error] {
	return func(yield func(backend.Object, error) bool) {
		if err := ctx.Err(); err != nil {
			yield(backend.Object{}, err)
			return
		}
		goOn := true
		err := r.repo.Tags(ctx, "", func(tags []string) error {
			var names []string
			for _, t := range tags {
				// A tag without an underscore is a name without a slash.
				if name := strings.Replace(t, "_", "/", 1); backend.CheckName(name) == nil && strings.HasPrefix(name, prefix) {
					names = append(names, name)
				}
			}
			for len(names) > 0 {
				some := names[:min(len(names), 4*atOnce)]
				names = names[len(some):]
				objects, err := r.sizes(ctx, some)
				if err != nil {
					return err
				}
				for _, o := range objects {
					if goOn = yield(o, nil); !goOn {
						return errEnough
					}
				}
			}
			return nil
		})
		if status(err) == http.StatusNotFound {
			err = nil // a repository is there from the first push on
		}
		if err != nil && goOn {
			yield(backend.Object{}, r.failed(ctx, "list", prefix+"*", err))
		}
	}
}

var errEnough = errors.New("the caller has seen enough")

// sizes leaves out what is not there.
func (r *registry) sizes(ctx context.Context, names []string) ([]backend.Object, error) {
	found := make([]int64, len(names))
	errs := make([]error, len(names))
	limit := make(chan struct{}, atOnce)
	var workers sync.WaitGroup
	for i, name := range names {
		limit <- struct{}{}
		workers.Go(func() {
			defer func() { <-limit }()
			found[i] = -1
			_, manifest, err := r.manifest(ctx, name)
			switch {
			case err == nil:
				found[i] = manifest.Layers[0].Size
			case !errors.Is(err, backend.ErrNotFound):
				errs[i] = fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	workers.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	var objects []backend.Object
	for i, name := range names {
		if found[i] >= 0 {
			objects = append(objects, backend.Object{Name: name, Size: found[i]})
		}
	}
	return objects, nil
}

// Delete deletes the manifest. The blob goes when the registry collects what no manifest
// refers to.
func (r *registry) Delete(ctx context.Context, name string) error {
	if err := backend.CheckName(name); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	manifest, _, err := r.manifest(ctx, name)
	if err == nil {
		err = r.deleteManifest(ctx, manifest)
	}
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return r.failed(ctx, "delete", name, err)
	}
	return nil
}

func (r *registry) deleteManifest(ctx context.Context, manifest digest.Digest) error {
	resp, err := r.do(ctx, http.MethodDelete, r.url("manifests", manifest.String()), nil, nil, http.StatusAccepted, http.StatusOK, http.StatusNoContent)
	switch {
	case status(err) == http.StatusNotFound:
		return backend.ErrNotFound
	case status(err) == http.StatusMethodNotAllowed || refused(err, "UNSUPPORTED"):
		return fmt.Errorf("%w: this registry deletes nothing (deletes are switched off in its configuration; docker-registry: storage.delete.enabled): %w", backend.ErrDenied, err)
	case err != nil:
		return err
	}
	return resp.Body.Close()
}

func (r *registry) Close() error {
	r.repo.Client.(*auth.Client).Client.CloseIdleConnections()
	return nil
}

// do sends a request that is the repository's. An answer of another status than these is
// an error.
func (r *registry) do(ctx context.Context, method, place string, body []byte, header http.Header, wanted ...int) (*http.Response, error) {
	actions := []string{auth.ActionPull}
	switch method {
	case http.MethodDelete:
		actions = append(actions, auth.ActionDelete)
	case http.MethodPut, http.MethodPost, http.MethodPatch:
		actions = append(actions, auth.ActionPush)
	}
	ctx = auth.AppendRepositoryScope(ctx, r.repo.Reference, actions...)
	req, err := http.NewRequestWithContext(ctx, method, place, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	for key, values := range header {
		req.Header[key] = values
	}
	resp, err := r.repo.Client.Do(req)
	if err != nil {
		return nil, err
	}
	for _, status := range wanted {
		if resp.StatusCode == status {
			return resp, nil
		}
	}
	defer resp.Body.Close()
	return nil, answered(resp)
}

func (r *registry) url(kind, what string) string {
	scheme := "https"
	if r.repo.PlainHTTP {
		scheme = "http"
	}
	u := url.URL{Scheme: scheme, Host: r.repo.Reference.Host(), Path: "/v2/" + r.repo.Reference.Repository + "/" + kind + "/" + what}
	return u.String()
}

func tag(name string) string { return strings.Replace(name, "/", "_", 1) }
