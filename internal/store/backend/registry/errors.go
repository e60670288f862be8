package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"

	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/web"
)

// answered makes an error of an answer that was not wanted.
func answered(resp *http.Response) error {
	failed := &errcode.ErrorResponse{Method: resp.Request.Method, URL: resp.Request.URL, StatusCode: resp.StatusCode}
	var body struct {
		Errors errcode.Errors `json:"errors"`
	}
	if json.NewDecoder(io.LimitReader(resp.Body, 64<<10)).Decode(&body) == nil {
		failed.Errors = body.Errors
	}
	if wait := web.RetryAfter(resp.Header); wait > 0 {
		return backend.After(failed, wait)
	}
	return failed
}

func status(err error) int {
	var failed *errcode.ErrorResponse
	if errors.As(err, &failed) {
		return failed.StatusCode
	}
	return 0
}

// refused says whether the registry gave one of these codes for its reason.
func refused(err error, codes ...string) bool {
	var failed *errcode.ErrorResponse
	return errors.As(err, &failed) && slices.ContainsFunc(failed.Errors, func(e errcode.Error) bool { return slices.Contains(codes, e.Code) })
}

// failed says what an error means for a store.
func (r *registry) failed(ctx context.Context, call, name string, err error) error {
	err = web.Classify(ctx, fmt.Errorf("%s %s in %s: %w", call, name, r.repo.Reference, err))
	if ctx.Err() != nil || backend.Final(err) {
		return err
	}
	switch status(err) {
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w: %w", backend.ErrDenied, err)
	case http.StatusInsufficientStorage:
		return fmt.Errorf("%w: %w", backend.ErrFull, err)
	}
	// The client refuses by itself to go on without credentials.
	if errors.Is(err, auth.ErrBasicCredentialNotFound) || strings.Contains(err.Error(), "missing username or password") {
		return fmt.Errorf("%w: %w", backend.ErrDenied, err)
	}
	return err
}
