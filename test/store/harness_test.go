// Package store tests where checkpoints are kept against the real thing: an S3 server
// and an OCI registry, each a process of its own.
package store

import (
	"context"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/open"
)

// here is where servers listen.
const here = "127.0.0.1"

func openStore(t *testing.T, c open.Config) backend.Backend {
	t.Helper()
	b, err := open.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// retrying is how stores are used: what a server does while it is busy is tried again.
func retrying(b backend.Backend) backend.Backend {
	return backend.Retrying(b, backend.Policy{First: 20 * time.Millisecond, Total: 30 * time.Second})
}

// everyCall returns what each call of a backend fails with.
func everyCall(ctx context.Context, b backend.Backend) map[string]error {
	var listErr error
	for _, listErr = range b.List(ctx, "") {
	}
	_, readErr := b.Read(ctx, "packs/a", 0, -1)
	_, tailErr := b.Read(ctx, "packs/a", -5, -1)
	return map[string]error{
		"put": b.Put(ctx, "packs/a", []byte("x"), nil), "read": readErr, "read the tail": tailErr, "list": listErr, "delete": b.Delete(ctx, "packs/a"),
	}
}
