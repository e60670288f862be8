package kubectl

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/kubectl/transfer"
)

// remoteArchive is the archive of a PodCheckpoint, or of one of its containers,
// behind the aggregated API.
type remoteArchive struct {
	calls     *subresources
	namespace string
	name      string
	container string
}

func (r *remoteArchive) request(method string, header http.Header) request {
	var query url.Values
	if r.container != "" {
		query = url.Values{subresourcesv1alpha1.QueryContainer: {r.container}}
	}
	return request{method: method, namespace: r.namespace, resource: "podcheckpoints", name: r.name, sub: "archive", query: query, header: header}
}

// stat asks for the first byte: a refusal of a GET comes with its reason, one of a
// HEAD does not. The digest of the whole is nil while the server does not have it.
func (r *remoteArchive) stat(ctx context.Context, digest bool) (object transfer.Object, sum []byte, err error) {
	header := http.Header{"Range": {"bytes=0-0"}}
	if digest {
		header.Set("Want-Repr-Digest", "sha-256=10")
	}
	resp, err := r.calls.send(ctx, r.request(http.MethodGet, header))
	if err != nil {
		return object, nil, err
	}
	defer resp.Body.Close()
	object.ETag = resp.Header.Get("ETag")
	if resp.StatusCode == http.StatusPartialContent {
		_, object.Size, err = contentRange(resp)
	} else {
		object.Size = resp.ContentLength
	}
	if err == nil && (object.ETag == "" || strings.HasPrefix(object.ETag, "W/") || object.Size <= 0) {
		err = errors.New("it has no strong ETag and size")
	}
	if err != nil {
		return object, nil, fmt.Errorf("the server's answer about the archive of podcheckpoint %s cannot be used: %w", r.name, err)
	}
	return object, reprDigest(resp.Header), nil
}

// Range implements transfer.Source.
func (r *remoteArchive) Range(ctx context.Context, etag string, first, last int64) (io.ReadCloser, error) {
	resp, err := r.calls.send(ctx, r.request(http.MethodGet, http.Header{
		"Range": {fmt.Sprintf("bytes=%d-%d", first, last)}, "If-Range": {etag},
	}))
	if err != nil {
		return nil, err
	}
	from := int64(0)
	if resp.StatusCode == http.StatusPartialContent {
		from, _, err = contentRange(resp)
	}
	switch {
	case err != nil:
	case resp.Header.Get("ETag") != etag:
		err = transfer.ErrChanged
	case from != first:
		err = fmt.Errorf("the server answered from byte %d when asked from %d", from, first)
	default:
		return resp.Body, nil
	}
	return nil, errors.Join(err, resp.Body.Close())
}

// contentRange reads "bytes FIRST-LAST/SIZE".
func contentRange(resp *http.Response) (first, size int64, err error) {
	text := resp.Header.Get("Content-Range")
	span, total, _ := strings.Cut(strings.TrimPrefix(text, "bytes "), "/")
	begin, _, _ := strings.Cut(span, "-")
	first, err = strconv.ParseInt(begin, 10, 64)
	if err == nil {
		size, err = strconv.ParseInt(total, 10, 64)
	}
	if err != nil || first < 0 {
		return 0, 0, fmt.Errorf("Content-Range %q: %w", cut(clean(text), 80), errors.Join(err, errors.New("not as it should be")))
	}
	return first, size, nil
}

// reprDigest is the SHA-256 in Repr-Digest (RFC 9530), if it is there.
func reprDigest(header http.Header) []byte {
	for _, item := range strings.Split(strings.Join(header.Values("Repr-Digest"), ","), ",") {
		value, ok := strings.CutPrefix(strings.TrimSpace(item), "sha-256=:")
		if sum, err := base64.StdEncoding.DecodeString(strings.TrimSuffix(value, ":")); ok && err == nil && len(sum) == 32 {
			return sum
		}
	}
	return nil
}

// digestPause is how long to wait before the digest is asked for again: the server
// answers late already when it is still reading.
const digestPause = time.Second

// digest asks for the digest until the server has it. nil: ctx ended first.
func (r *remoteArchive) digest(ctx context.Context, etag string) ([]byte, error) {
	for {
		object, sum, err := r.stat(ctx, true)
		switch {
		case ctx.Err() != nil:
			return nil, nil
		case err != nil && !transient(err):
			return nil, err
		case err == nil && object.ETag != etag:
			return nil, transfer.ErrChanged
		case sum != nil:
			return sum, nil
		}
		if sleep(ctx, digestPause) != nil {
			return nil, nil
		}
	}
}

// remoteImport is where the archive of an import goes.
type remoteImport struct {
	*remoteArchive
	size int64
	// over says whether everything has arrived, or the import has failed: then its
	// node takes nothing any more and does not say why.
	over func(context.Context) (bool, error)
}

// Offset implements transfer.Destination.
func (r *remoteImport) Offset(ctx context.Context) (int64, error) {
	return r.put(ctx, fmt.Sprintf("bytes */%d", r.size), http.NoBody, 0)
}

// Put implements transfer.Destination.
func (r *remoteImport) Put(ctx context.Context, first, length int64, part io.Reader) (int64, error) {
	return r.put(ctx, fmt.Sprintf("bytes %d-%d/%d", first, first+length-1, r.size), part, length)
}

func (r *remoteImport) put(ctx context.Context, span string, body io.Reader, length int64) (int64, error) {
	call := r.request(http.MethodPut, http.Header{"Content-Type": {"application/octet-stream"}, "Content-Range": {span}})
	call.body, call.length = body, length
	resp, err := r.calls.send(ctx, call)
	if err != nil {
		if over, failure := r.over(ctx); failure != nil {
			return 0, failure
		} else if over {
			return r.size, nil
		}
		return 0, err
	}
	defer resp.Body.Close()
	there, err := strconv.ParseInt(resp.Header.Get(agentapi.HeaderUploadOffset), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("the server does not say how much of the archive it has: %s: %w", agentapi.HeaderUploadOffset, err)
	}
	return there, nil
}
