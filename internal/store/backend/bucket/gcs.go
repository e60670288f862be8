package bucket

import (
	"context"
	"fmt"
	"net/http"

	"cloud.google.com/go/storage"
	"gocloud.dev/blob/gcsblob"
	"gocloud.dev/gcp"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/google"
	"google.golang.org/api/option"

	"podstasis.dev/stasis/internal/store/backend"
)

// GCS is a bucket in Google Cloud Storage. Nothing is taken from the environment.
type GCS struct {
	Bucket, Prefix string
	Endpoint       string // the URL of a server that is not Google's, up to /storage/v1/
	Key            []byte // a service account's, JSON
	HTTP           *http.Client
}

// Open connects to nothing yet.
func (c GCS) Open(ctx context.Context) (backend.Backend, error) {
	account, err := google.JWTConfigFromJSON(c.Key, storage.ScopeReadWrite)
	if err != nil {
		return nil, fmt.Errorf("the service account's key: %w", err)
	}
	// Tokens are asked for again as long as the backend lives.
	tokens := account.TokenSource(context.WithValue(context.WithoutCancel(ctx), oauth2.HTTPClient, c.HTTP))
	client, err := gcp.NewHTTPClient(c.HTTP.Transport, tokens)
	if err != nil {
		return nil, fmt.Errorf("GCS: %w", err)
	}
	opts := &gcsblob.Options{}
	if c.Endpoint != "" {
		opts.ClientOptions = append(opts.ClientOptions, option.WithEndpoint(c.Endpoint))
	}
	b, err := gcsblob.OpenBucket(ctx, client, c.Bucket, opts)
	if err != nil {
		return nil, fmt.Errorf("GCS: %w", err)
	}
	var driver *storage.Client
	if b.As(&driver) {
		driver.SetRetry(storage.WithMaxAttempts(3)) // of a request; else without end
	}
	return New(b, c.Prefix, "bucket "+c.Bucket), nil
}
