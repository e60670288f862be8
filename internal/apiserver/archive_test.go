package apiserver

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/endpoints/request"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
)

// told is an agent that answers as it is told.
type told struct {
	answer func() (*http.Response, error)
	sent   int64
}

func (a *told) Archive(context.Context, string, string, string, string, http.Header) (*http.Response, error) {
	return a.answer()
}
func (a *told) Contents(context.Context, string, string) (*http.Response, error) { return a.answer() }
func (a *told) Import(_ context.Context, _, _ string, _ http.Header, part io.Reader, _ int64) (*http.Response, error) {
	n, err := io.Copy(io.Discard, part)
	a.sent += n
	if err != nil {
		return nil, err
	}
	return a.answer()
}

func readyCheckpoint() *checkpointv1alpha1.PodCheckpoint {
	return &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "c", UID: "u"},
		Status: checkpointv1alpha1.PodCheckpointStatus{NodeName: "node-1", Conditions: []metav1.Condition{{Type: "Ready", Status: "True", Reason: "CheckpointCompleted"}}}}
}

// refusing keeps the error that a client would be answered with.
type refusing struct{ err error }

func (r *refusing) Object(int, runtime.Object) {}
func (r *refusing) Error(err error)            { r.err = err }

func handle(t *testing.T, a *archive, w http.ResponseWriter, r *http.Request) error {
	t.Helper()
	refused := &refusing{}
	handler, err := a.Connect(request.WithNamespace(r.Context(), "n"), "c", nil, refused)
	if err != nil {
		t.Fatal(err)
	}
	handler.ServeHTTP(w, r)
	return refused.err
}

func archiveOf(t *testing.T, agent agents, c *checkpointv1alpha1.PodCheckpoint) *archive {
	t.Helper()
	k, _ := takerOf(t, interceptor.Funcs{}, c)
	return newArchive(k.objects, agent)
}

func TestAnArchiveThatBreaksOffIsSeenToBeShort(t *testing.T) {
	agent := &told{answer: func() (*http.Response, error) {
		return &http.Response{StatusCode: 200, Header: http.Header{"Content-Length": {"1000000"}},
			Body: io.NopCloser(io.MultiReader(strings.NewReader(strings.Repeat("x", 500000)), broken{}))}, nil
	}}
	a := archiveOf(t, agent, readyCheckpoint())
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _ = handle(t, a, w, r) }))
	defer server.Close()
	answer, err := http.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if b, err := io.ReadAll(answer.Body); err == nil {
		t.Errorf("taken for whole: %d bytes", len(b))
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("cut off") }

func TestSoManyArchivesGoOnAtOneTimeAndNoMore(t *testing.T) {
	a := archiveOf(t, &told{}, readyCheckpoint())
	for range maxStreams {
		a.streams <- struct{}{}
	}
	if err := handle(t, a, httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil)); !apierrors.IsTooManyRequests(err) {
		t.Errorf("%v", err)
	}
}

func TestOnlyACompleteCheckpointHasAnArchive(t *testing.T) {
	c := readyCheckpoint()
	c.Status.Conditions[0] = metav1.Condition{Type: "Ready", Status: "False", Reason: "CheckpointFailed", Message: "no room"}
	err := handle(t, archiveOf(t, &told{}, c), httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
	if !apierrors.IsConflict(err) || !strings.Contains(err.Error(), "CheckpointFailed: no room") {
		t.Errorf("%v", err)
	}
}

func TestAPartIsBoundedAndItsOffsetIsTold(t *testing.T) {
	c := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: "n", Name: "c", UID: "u"},
		Spec: checkpointv1alpha1.PodCheckpointSpec{NodeName: "node-1", Import: &checkpointv1alpha1.CheckpointImport{SizeBytes: 1 << 40}}}
	agent := &told{answer: func() (*http.Response, error) {
		return nil, &agentapi.Refusal{Node: "node-1", Status: http.StatusConflict, Message: "another part is due", Header: http.Header{agentapi.HeaderUploadOffset: {"7"}}}
	}}
	a := archiveOf(t, agent, c)
	put := func(length int64) (*httptest.ResponseRecorder, error) {
		r := httptest.NewRequest("PUT", "/", strings.NewReader("x"))
		r.ContentLength = length
		w := httptest.NewRecorder()
		return w, handle(t, a, w, r)
	}
	if w, err := put(1); !apierrors.IsConflict(err) || w.Header().Get(agentapi.HeaderUploadOffset) != "7" {
		t.Errorf("%v, %v", err, w.Header())
	}
	if _, err := put(agentapi.MaxPart + 1); !apierrors.IsRequestEntityTooLargeError(err) {
		t.Errorf("too large: %v", err)
	}
	if _, err := put(-1); err == nil || agent.sent != 1 {
		t.Errorf("of unknown length: %v, %d bytes reached the agent", err, agent.sent)
	}
}

func TestContentsWithoutEndAreNotReadWhole(t *testing.T) {
	k, _ := takerOf(t, interceptor.Funcs{}, readyCheckpoint())
	agent := &told{answer: func() (*http.Response, error) {
		endless := io.MultiReader(strings.NewReader(`{"containers":[{"name":"`), &endless{})
		return &http.Response{StatusCode: 200, Body: io.NopCloser(endless)}, nil
	}}
	_, err := newContents(k.objects, agent).Get(request.WithNamespace(t.Context(), "n"), "c", nil)
	if err == nil || !strings.Contains(err.Error(), "more than 8388608 bytes") {
		t.Errorf("%v", err)
	}
}

func TestWhereACheckpointIsStoredTheAPISaysAndNotItsNode(t *testing.T) {
	c := readyCheckpoint()
	c.Status.Store = &checkpointv1alpha1.StoredCheckpoint{Name: "s", Memory: &checkpointv1alpha1.StoredShare{Bytes: 7}}
	k, _ := takerOf(t, interceptor.Funcs{}, c)
	agent := &told{answer: func() (*http.Response, error) {
		return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(`{"store":{"name":"forged"}}`))}, nil
	}}
	found, err := newContents(k.objects, agent).Get(request.WithNamespace(t.Context(), "n"), "c", nil)
	if err != nil {
		t.Fatal(err)
	}
	if in := found.(*subresources.CheckpointContents).Store; in == nil || in.Name != "s" || in.Memory == nil || in.Memory.Bytes != 7 {
		t.Errorf("it is stored in %+v", in)
	}
}

type endless struct{}

func (*endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 'x'
	}
	return len(b), nil
}

func TestAnAgentsTroubleWithUsIsNotTheUsers(t *testing.T) {
	for status, want := range map[int]func(error) bool{
		http.StatusUnauthorized: apierrors.IsInternalError, http.StatusForbidden: apierrors.IsInternalError,
		http.StatusNotFound: apierrors.IsNotFound, http.StatusGone: apierrors.IsGone, http.StatusServiceUnavailable: apierrors.IsServiceUnavailable,
		http.StatusInternalServerError: apierrors.IsInternalError, http.StatusTeapot: apierrors.IsInternalError,
	} {
		if err := answerOf(&agentapi.Refusal{Node: "node-1", Status: status, Message: "m"}, podCheckpoints, "c"); !want(err) {
			t.Errorf("%d: %v", status, err)
		}
	}
}
