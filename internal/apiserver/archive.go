package apiserver

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// agents is what agents are asked for.
type agents interface {
	Archive(ctx context.Context, method, node, uid, container string, header http.Header) (*http.Response, error)
	Contents(ctx context.Context, node, uid string) (*http.Response, error)
	Import(ctx context.Context, node, uid string, header http.Header, part io.Reader, size int64) (*http.Response, error)
}

const (
	// maxStreams is how many archives go through at one time; each takes a buffer
	// and what HTTP has in flight.
	maxStreams = 64
	// buffer is what is held of an archive on its way.
	buffer = 64 << 10
	// maxReply bounds what an agent says of a part that it got.
	maxReply = 64 << 10
)

// archive brings archives out, by ranges (A2), and in, by parts.
type archive struct {
	parentless
	objects client.Reader
	agents  agents
	streams chan struct{} // one each that goes on
	buffers *sync.Pool
}

func newArchive(objects client.Reader, agents agents) *archive {
	return &archive{objects: objects, agents: agents, streams: make(chan struct{}, maxStreams),
		buffers: &sync.Pool{New: func() any { b := make([]byte, buffer); return &b }}}
}

var (
	_ rest.Storage         = &archive{}
	_ rest.Connecter       = &archive{}
	_ rest.StorageMetadata = &archive{}
)

// New is for the installer, which wants a kind of this group.
func (a *archive) New() runtime.Object { return &subresources.CheckpointContents{} }

// ConnectMethods are GET and HEAD, which take the verb get, and PUT, which takes
// the verb update.
func (a *archive) ConnectMethods() []string {
	return []string{http.MethodGet, http.MethodHead, http.MethodPut}
}

func (a *archive) NewConnectOptions() (runtime.Object, bool, string) { return nil, false, "" }

// ProducesMIMETypes and ProducesObject are for OpenAPI.
func (a *archive) ProducesMIMETypes(string) []string { return []string{"application/x-tar"} }
func (a *archive) ProducesObject(string) any         { return "" }

func (a *archive) Connect(ctx context.Context, name string, _ runtime.Object, responder rest.Responder) (http.Handler, error) {
	namespace := request.NamespaceValue(ctx)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case a.streams <- struct{}{}:
			defer func() { <-a.streams }()
		default:
			responder.Error(apierrors.NewTooManyRequests(fmt.Sprintf("%d archives are on their way already", maxStreams), 1))
			return
		}
		var err error
		if r.Method == http.MethodPut {
			err = a.bringIn(w, r, namespace, name)
		} else {
			err = a.bringOut(w, r, namespace, name)
		}
		if err != nil && r.Context().Err() == nil {
			responder.Error(err)
		}
	}), nil
}

// outFields are the fields of an agent's answer that reach the client. No others:
// a node says nothing else to a user.
var outFields = []string{"Accept-Ranges", "Content-Length", "Content-Range", "Content-Type", "Etag", "Last-Modified", "Repr-Digest"}

// bringOut passes the archive on, or the range that is asked for. An error means
// that nothing has been written.
func (a *archive) bringOut(w http.ResponseWriter, r *http.Request, namespace, name string) error {
	c, err := readyOne(r.Context(), a.objects, namespace, name)
	if err != nil {
		return err
	}
	answer, err := a.agents.Archive(r.Context(), r.Method, c.Status.NodeName, string(c.UID), r.URL.Query().Get(subresources.QueryContainer), r.Header)
	if err != nil {
		return answerOf(err, podCheckpoints, name)
	}
	defer answer.Body.Close()
	for _, field := range outFields {
		if value := answer.Header.Get(field); value != "" {
			w.Header().Set(field, value)
		}
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(answer.StatusCode)
	if r.Method == http.MethodHead {
		return nil
	}
	b := a.buffers.Get().(*[]byte)
	defer a.buffers.Put(b)
	// Not a ReaderFrom: the buffer is the bound.
	if _, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{answer.Body}, *b); err != nil {
		// The client sees a body that is too short, and goes on from there.
		panic(http.ErrAbortHandler)
	}
	return nil
}

// bringIn passes a part of an archive on to the node that the checkpoint is to lie
// on, or asks how much is there.
func (a *archive) bringIn(w http.ResponseWriter, r *http.Request, namespace, name string) error {
	c, err := one(r.Context(), a.objects, namespace, name)
	if err != nil {
		return err
	}
	switch {
	case c.Spec.Import == nil:
		return apierrors.NewConflict(podCheckpoints, name, fmt.Errorf("it was taken of a Pod; only one that has spec.import takes an archive"))
	case c.IsTerminal():
		return apierrors.NewConflict(podCheckpoints, name, fmt.Errorf("it has ended (%s) and takes nothing more", c.ReadyCondition().Reason))
	case c.Spec.NodeName == "":
		return apierrors.NewConflict(podCheckpoints, name, fmt.Errorf("it has no node"))
	case r.ContentLength < 0:
		return &apierrors.StatusError{ErrStatus: statusOf(http.StatusLengthRequired, "a part of an archive says how long it is (Content-Length)")}
	case r.ContentLength > agentapi.MaxPart:
		return apierrors.NewRequestEntityTooLargeError(fmt.Sprintf("a part of an archive has at most %d bytes", agentapi.MaxPart))
	}
	answer, err := a.agents.Import(r.Context(), c.Spec.NodeName, string(c.UID), r.Header, http.MaxBytesReader(w, r.Body, agentapi.MaxPart), r.ContentLength)
	if err != nil {
		keepOffset(w, err)
		return answerOf(err, podCheckpoints, name)
	}
	defer answer.Body.Close()
	for _, field := range []string{agentapi.HeaderUploadOffset, "Content-Type"} {
		if value := answer.Header.Get(field); value != "" {
			w.Header().Set(field, value)
		}
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(answer.StatusCode)
	if _, err := io.Copy(w, io.LimitReader(answer.Body, maxReply)); err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

// readyOne reads a PodCheckpoint that is complete.
func readyOne(ctx context.Context, objects client.Reader, namespace, name string) (*checkpointv1alpha1.PodCheckpoint, error) {
	c, err := one(ctx, objects, namespace, name)
	if err != nil {
		return nil, err
	}
	if !c.IsReady() || c.Status.NodeName == "" {
		return nil, notReady(c)
	}
	return c, nil
}

func one(ctx context.Context, objects client.Reader, namespace, name string) (*checkpointv1alpha1.PodCheckpoint, error) {
	var c checkpointv1alpha1.PodCheckpoint
	if err := objects.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &c); err != nil {
		return nil, passed(err, "read PodCheckpoint %s/%s", namespace, name)
	}
	return &c, nil
}
