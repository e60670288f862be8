package bucket

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"gocloud.dev/blob/azureblob"

	"podstasis.dev/stasis/internal/store/backend"
)

// Azure is a container in Azure Blob Storage. Nothing is taken from the environment.
type Azure struct {
	Container, Prefix string
	Account           string
	Endpoint          string // https://ACCOUNT.blob.core.windows.net unless told

	AccountKey string // base64; or else
	SASToken   string // as the portal shows it

	HTTP *http.Client
}

// Open connects to nothing yet.
func (c Azure) Open(ctx context.Context) (backend.Backend, error) {
	endpoint := c.Endpoint
	if endpoint == "" {
		endpoint = "https://" + c.Account + ".blob.core.windows.net"
	}
	place, err := url.JoinPath(endpoint, c.Container)
	if err != nil {
		return nil, fmt.Errorf("Azure: the endpoint: %w", err)
	}
	opts := &container.ClientOptions{ClientOptions: azcore.ClientOptions{Transport: c.HTTP, Retry: policy.RetryOptions{MaxRetries: 2}}}
	var client *container.Client
	if c.SASToken != "" {
		client, err = container.NewClientWithNoCredential(place+"?"+strings.TrimPrefix(c.SASToken, "?"), opts)
	} else {
		var key *container.SharedKeyCredential
		if key, err = container.NewSharedKeyCredential(c.Account, c.AccountKey); err == nil {
			client, err = container.NewClientWithSharedKeyCredential(place, key, opts)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("Azure: %w", err)
	}
	b, err := azureblob.OpenBucket(ctx, client, nil)
	if err != nil {
		return nil, fmt.Errorf("Azure: %w", err)
	}
	return New(b, c.Prefix, "container "+c.Container), nil
}
