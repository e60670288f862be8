package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"podstasis.dev/stasis/internal/store/backend"
)

const (
	// whole is up to how many bytes are sent with the request that ends an upload: half
	// as many round trips.
	whole = 4 << 20
	// resumes is how often an upload is gone on with where it broke off, in one Put.
	resumes = 4
)

// push uploads a blob that is not there yet. An upload that breaks off is gone on with
// at the byte that the registry has come to, where it says so.
func (r *registry) push(ctx context.Context, blob ocispec.Descriptor, data []byte) error {
	resp, err := r.do(ctx, http.MethodHead, r.url("blobs", blob.Digest.String()), nil, nil, http.StatusOK)
	if err == nil {
		return resp.Body.Close()
	}
	if status(err) != http.StatusNotFound {
		return err
	}
	resp, err = r.do(ctx, http.MethodPost, r.url("blobs", "uploads/"), nil, nil, http.StatusAccepted)
	if err != nil {
		return err
	}
	resp.Body.Close()
	place, err := location(resp)
	if err != nil {
		return err
	}
	rest := data
	if len(data) > whole {
		if place, err = r.send(ctx, place, data); err != nil {
			r.abandon(ctx, place)
			return err
		}
		rest = nil
	}
	end, err := url.Parse(place)
	if err != nil {
		return err
	}
	query := end.Query() // what is there belongs to the registry
	query.Set("digest", blob.Digest.String())
	end.RawQuery = query.Encode()
	resp, err = r.do(ctx, http.MethodPut, end.String(), rest, http.Header{"Content-Type": {"application/octet-stream"}}, http.StatusCreated)
	if err != nil {
		r.abandon(ctx, place)
		return err
	}
	return resp.Body.Close()
}

// send sends all the bytes, in one request unless that breaks off. It returns where the
// upload goes on.
func (r *registry) send(ctx context.Context, place string, data []byte) (string, error) {
	sent := 0
	for try := 0; ; try++ {
		header := http.Header{"Content-Type": {"application/octet-stream"}}
		if try > 0 {
			header.Set("Content-Range", fmt.Sprintf("%d-%d", sent, len(data)-1))
		}
		resp, err := r.do(ctx, http.MethodPatch, place, data[sent:], header, http.StatusAccepted, http.StatusNoContent)
		if err == nil {
			resp.Body.Close()
			next, err := location(resp)
			if err != nil {
				return place, err
			}
			return next, nil
		}
		if try == resumes || ctx.Err() != nil || backend.Final(r.failed(ctx, "", "", err)) {
			return place, err
		}
		next, have, whereErr := r.where(ctx, place)
		if whereErr != nil {
			return place, errors.Join(err, whereErr)
		}
		if have > len(data) {
			return place, fmt.Errorf("the registry has %d bytes of an upload of %d: %w", have, len(data), err)
		}
		place, sent = next, have
		if sent == len(data) {
			return place, nil
		}
	}
}

// where asks how far an upload has come.
func (r *registry) where(ctx context.Context, place string) (next string, have int, err error) {
	resp, err := r.do(ctx, http.MethodGet, place, nil, nil, http.StatusNoContent, http.StatusAccepted)
	if err != nil {
		return "", 0, err
	}
	resp.Body.Close()
	if next, err = location(resp); err != nil {
		return "", 0, err
	}
	// "0-499" after 500 bytes; "0-0" after none or one, which are then sent again.
	first, last, found := strings.Cut(strings.TrimPrefix(resp.Header.Get("Range"), "bytes="), "-")
	have, err = strconv.Atoi(last)
	if !found || first != "0" || err != nil || have < -1 {
		return "", 0, fmt.Errorf("the registry has the range %q of an upload", resp.Header.Get("Range"))
	}
	if have > 0 {
		have++
	}
	return next, max(have, 0), nil
}

// abandon tells the registry that nobody goes on with an upload. It finds out by itself
// if it is not told.
func (r *registry) abandon(ctx context.Context, place string) {
	if ctx.Err() != nil {
		return
	}
	if resp, err := r.do(ctx, http.MethodDelete, place, nil, nil, http.StatusNoContent, http.StatusAccepted, http.StatusOK); err == nil {
		resp.Body.Close()
	}
}

// location is where an upload goes on: at the registry that was asked, or where it
// sends its clients.
func location(resp *http.Response) (string, error) {
	place, err := resp.Location()
	if err != nil {
		return "", fmt.Errorf("the registry does not say where the upload goes on: %w", err)
	}
	if place.Scheme != "https" && place.Scheme != resp.Request.URL.Scheme {
		return "", fmt.Errorf("the registry wants an upload to go on without TLS, at %s://%s", place.Scheme, place.Host)
	}
	return place.String(), nil
}
