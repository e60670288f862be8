package kubectl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// subresources calls the aggregated API (KEP-5901): checkpoints asked for by a
// call, archives and what is in them.
type subresources struct {
	http *http.Client
	base *url.URL
}

// errNotServed says that the cluster has no such API.
var errNotServed = errors.New("this cluster does not serve " + subresourcesv1alpha1.SchemeGroupVersion.String() +
	": install Stasis first (kubectl apply -k config/install)")

const (
	maxStatusBytes   = 1 << 20
	maxAnswerBytes   = 1 << 20
	maxContentsBytes = 64 << 20
)

// request is one call.
type request struct {
	method    string
	namespace string // empty: of the cluster
	resource  string // "pods", "podcheckpoints" or "checkpointstores"
	name      string
	sub       string // the subresource
	query     url.Values
	header    http.Header
	body      io.Reader
	length    int64
}

// send makes a call. An answer that is not 2xx is an error: a *StatusError where
// the server gave a Status, errNotServed where there is no such API.
func (s *subresources) send(ctx context.Context, r request) (*http.Response, error) {
	at := *s.base
	within := ""
	if r.namespace != "" {
		within = path.Join("namespaces", r.namespace)
	}
	at.Path = path.Join("/", s.base.Path, "apis", subresourcesv1alpha1.GroupName, subresourcesv1alpha1.SchemeGroupVersion.Version,
		within, r.resource, r.name, r.sub)
	at.RawQuery = r.query.Encode()
	req, err := http.NewRequestWithContext(ctx, r.method, at.String(), r.body)
	if err != nil {
		return nil, err
	}
	if r.header != nil {
		req.Header = r.header.Clone()
	}
	if r.body != nil && r.length > 0 {
		req.ContentLength = r.length
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, answerError(resp, r)
}

// answerError is the error that an answer stands for.
func answerError(resp *http.Response, r request) error {
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxStatusBytes))
	if err != nil {
		return fmt.Errorf("reading the server's answer %s: %w", resp.Status, err)
	}
	var status metav1.Status
	if json.Unmarshal(text, &status) == nil && status.Kind == "Status" {
		return &apierrors.StatusError{ErrStatus: status}
	}
	if resp.StatusCode == http.StatusNotFound && r.method != http.MethodHead {
		return errNotServed
	}
	retryAfter := 0
	return apierrors.NewGenericServerResponse(resp.StatusCode, strings.ToLower(r.method),
		schema.GroupResource{Group: subresourcesv1alpha1.GroupName, Resource: r.resource + "/" + r.sub},
		r.name, clean(strings.TrimSpace(string(text))), retryAfter, true)
}

// checkpoint asks for a checkpoint of a Pod and waits as long as the request says.
func (s *subresources) checkpoint(ctx context.Context, namespace, pod string, asked *subresourcesv1alpha1.PodCheckpointRequest, try bool) (*subresourcesv1alpha1.PodCheckpointRequest, error) {
	answer := asked.DeepCopy()
	if err := s.post(ctx, namespace, "pods", pod, "checkpoint", try, answer); err != nil {
		return nil, err
	}
	return answer, nil
}

// contents asks what is inside a checkpoint.
func (s *subresources) contents(ctx context.Context, namespace, name string) (*subresourcesv1alpha1.CheckpointContents, error) {
	resp, err := s.send(ctx, request{method: http.MethodGet, namespace: namespace, resource: "podcheckpoints", name: name, sub: "contents",
		header: http.Header{"Accept": {"application/json"}}})
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	contents := &subresourcesv1alpha1.CheckpointContents{}
	if err := decode(resp.Body, maxContentsBytes, contents); err != nil {
		return nil, fmt.Errorf("reading what is inside podcheckpoint %s: %w", name, err)
	}
	return contents, nil
}

// post sends an object to a subresource and reads the answer into it.
func (s *subresources) post(ctx context.Context, namespace, resource, name, sub string, try bool, object any) error {
	body, err := json.Marshal(object)
	if err != nil {
		return err
	}
	query := url.Values{"fieldManager": {string(fieldOwner)}}
	if try {
		query.Set("dryRun", metav1.DryRunAll)
	}
	resp, err := s.send(ctx, request{method: http.MethodPost, namespace: namespace, resource: resource, name: name, sub: sub,
		query: query, header: http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json"}},
		body: bytes.NewReader(body), length: int64(len(body))})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := decode(resp.Body, maxAnswerBytes, object); err != nil {
		return fmt.Errorf("reading the answer to %s/%s of %s: %w", resource, sub, name, err)
	}
	return nil
}

// decode reads one JSON object of bounded size.
func decode(from io.Reader, most int64, into any) error {
	text, err := io.ReadAll(io.LimitReader(from, most+1))
	if err != nil {
		return err
	}
	if int64(len(text)) > most {
		return fmt.Errorf("the answer has more than %s", size(most))
	}
	return json.Unmarshal(text, into)
}
