// Package bucket keeps a store's objects in object storage: S3 and what speaks it,
// Google Cloud Storage, Azure Blob Storage.
package bucket

import (
	"bytes"
	"context"
	"crypto/md5"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
	"golang.org/x/oauth2"
	"google.golang.org/api/googleapi"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/web"
)

// part is what is sent with one request: a connection that breaks costs no more than it.
const part = 8 << 20

// replacements is how often an object may be replaced between the question for its size
// and the reading, before that is called an error.
const replacements = 8

// New keeps objects under keys that begin with prefix, which ends with a slash or is
// empty. place is what errors call the bucket.
func New(b *blob.Bucket, prefix, place string) backend.Backend {
	return &bucket{blob: b, prefix: prefix, place: place, md5: true}
}

type bucket struct {
	blob          *blob.Bucket
	prefix, place string
	md5           bool // the service compares it
}

// Put makes the object appear when its last byte is there: so do all these services.
func (b *bucket) Put(ctx context.Context, name string, data []byte, refs []string) error {
	if err := backend.CheckPut(name, data, refs); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	opts := &blob.WriterOptions{ContentType: "application/octet-stream", BufferSize: part, MaxConcurrency: 2}
	if b.md5 {
		sum := md5.Sum(data)
		opts.ContentMD5 = sum[:]
	}
	if err := b.blob.Upload(ctx, b.prefix+name, bytes.NewReader(data), opts); err != nil {
		return b.failed(ctx, "put", name, err)
	}
	return nil
}

func (b *bucket) Read(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	if err := backend.CheckRead(name, offset, length); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if offset >= 0 && length != 0 {
		data, _, err := b.read(ctx, name, offset, length)
		if err == nil {
			return data, nil
		}
		if failed := b.failed(ctx, "read", name, err); backend.Final(failed) || ctx.Err() != nil || offset == 0 && length < 0 {
			return nil, failed
		}
		// Perhaps there is no such range: each service says that in another way.
		attributes, sizeErr := b.blob.Attributes(ctx, b.prefix+name)
		if sizeErr != nil {
			return nil, b.failed(ctx, "read", name, errors.Join(sizeErr, err))
		}
		switch _, n, rangeErr := backend.Range(name, attributes.Size, offset, length); {
		case rangeErr != nil:
			return nil, rangeErr
		case n == 0:
			return []byte{}, nil
		}
		return nil, b.failed(ctx, "read", name, err)
	}
	for range replacements {
		attributes, err := b.blob.Attributes(ctx, b.prefix+name)
		if err != nil {
			return nil, b.failed(ctx, "read the size of", name, err)
		}
		from, n, err := backend.Range(name, attributes.Size, offset, length)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return []byte{}, nil
		}
		data, size, err := b.read(ctx, name, from, n)
		if size > 0 && size != attributes.Size || errors.Is(err, backend.ErrInvalid) {
			continue
		}
		if err != nil {
			return nil, b.failed(ctx, "read", name, err)
		}
		return data, nil
	}
	return nil, fmt.Errorf("read %s in %s: it is replaced all the time", name, b.place)
}

// read also returns the size of the whole object that it read from, if it got so far.
func (b *bucket) read(ctx context.Context, name string, offset, length int64) ([]byte, int64, error) {
	r, err := b.blob.NewRangeReader(ctx, b.prefix+name, offset, length, nil)
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	_, n, err := backend.Range(name, r.Size(), offset, length)
	if err != nil {
		return nil, r.Size(), err
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, r.Size(), err
	}
	// To the end, where what the service said of the object's checksum is compared.
	if more, err := r.Read(make([]byte, 1)); more > 0 || err != nil && !errors.Is(err, io.EOF) {
		return nil, r.Size(), fmt.Errorf("after %d bytes, which is all, there are %d more: %w", n, more, err)
	}
	return data, r.Size(), nil
}

// List leaves out keys that are no names of a store's objects.
func (b *bucket) List(ctx context.Context, prefix string) iter.Seq2[backend.Object, error] {
	return func(yield func(backend.Object, error) bool) {
		if err := ctx.Err(); err != nil {
			yield(backend.Object{}, err)
			return
		}
		for page := b.blob.List(&blob.ListOptions{Prefix: b.prefix + prefix}); ; {
			o, err := page.Next(ctx)
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				yield(backend.Object{}, b.failed(ctx, "list", prefix+"*", err))
				return
			}
			name, ours := strings.CutPrefix(o.Key, b.prefix)
			if !ours || o.IsDir || backend.CheckName(name) != nil {
				continue
			}
			if !yield(backend.Object{Name: name, Size: o.Size}, nil) {
				return
			}
		}
	}
}

func (b *bucket) Delete(ctx context.Context, name string) error {
	if err := backend.CheckName(name); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := b.blob.Delete(ctx, b.prefix+name); err != nil {
		if err := b.failed(ctx, "delete", name, err); !errors.Is(err, backend.ErrNotFound) {
			return err
		}
	}
	return nil
}

func (b *bucket) Close() error { return b.blob.Close() }

// failed says what an error of a service means for a store.
func (b *bucket) failed(ctx context.Context, call, name string, err error) error {
	answered := answer(err)
	err = web.Classify(ctx, fmt.Errorf("%s %s in %s: %w", call, name, b.place, err))
	if ctx.Err() != nil || backend.Final(err) {
		return err
	}
	switch {
	// Before what the library makes of it, which takes GCS' 403 for an object that is missing.
	case answered.denied || gcerrors.Code(err) == gcerrors.PermissionDenied:
		return fmt.Errorf("%w: %w", backend.ErrDenied, err)
	case answered.code == "NoSuchBucket" || bloberror.HasCode(err, bloberror.ContainerNotFound):
		return fmt.Errorf("%w: there is no such bucket: %w", backend.ErrNoStore, err)
	case answered.status == http.StatusMovedPermanently:
		return fmt.Errorf("%w: the bucket is in another region than configured: %w", backend.ErrNoStore, err)
	case gcerrors.Code(err) == gcerrors.NotFound:
		// The bucket may be what is missing, and who asks for an object only is not
		// told. It must not look like a store that has lost its objects.
		if answered.code != "NoSuchKey" && !bloberror.HasCode(err, bloberror.BlobNotFound) {
			there, accessErr := b.blob.IsAccessible(ctx)
			if accessErr != nil {
				return b.failed(ctx, "list", "*", accessErr)
			}
			if !there {
				return fmt.Errorf("%w: there is no such bucket: %w", backend.ErrNoStore, err)
			}
		}
		return fmt.Errorf("%w: %w", backend.ErrNotFound, err)
	case answered.full:
		return fmt.Errorf("%w: %w", backend.ErrFull, err)
	case answered.header != nil:
		if wait := web.RetryAfter(answered.header); wait > 0 {
			return backend.After(err, wait)
		}
	}
	return err
}

// answered is what a service's answer says in any of their ways.
type answered struct {
	status       int
	code         string
	header       http.Header
	denied, full bool
}

func answer(err error) (a answered) {
	var s3API smithy.APIError
	if errors.As(err, &s3API) {
		a.code = s3API.ErrorCode()
	}
	var s3HTTP *smithyhttp.ResponseError
	if errors.As(err, &s3HTTP) && s3HTTP.Response != nil {
		a.status, a.header = s3HTTP.HTTPStatusCode(), s3HTTP.Response.Header
	}
	var google *googleapi.Error
	if errors.As(err, &google) {
		a.status, a.header = google.Code, google.Header
	}
	var azure *azcore.ResponseError
	if errors.As(err, &azure) {
		a.status, a.code = azure.StatusCode, azure.ErrorCode
		if azure.RawResponse != nil {
			a.header = azure.RawResponse.Header
		}
	}
	a.denied = a.status == http.StatusUnauthorized || a.status == http.StatusForbidden
	switch a.code {
	case "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId", "XAdminUserNotFound": // 400 or 404 in some
		a.denied = true
	case "QuotaExceeded", "QuotaExceededException", "XMinioStorageFull", "AccountStorageLimitExceeded":
		a.denied, a.full = false, true
	}
	if a.status == http.StatusInsufficientStorage {
		a.full = true
	}
	// A token is asked for with what is in the Secret; 400 says invalid_grant.
	var token *oauth2.RetrieveError
	if errors.As(err, &token) && token.Response != nil && token.Response.StatusCode >= 400 && token.Response.StatusCode < 500 && token.Response.StatusCode != http.StatusTooManyRequests {
		a.denied = true
	}
	return a
}
