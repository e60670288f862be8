package bucket

import (
	"testing"

	"gocloud.dev/blob"
	"gocloud.dev/blob/memblob"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
)

func TestABucketInMemoryIsABackend(t *testing.T) {
	backendtest.Run(t, func(*testing.T) backend.Backend { return New(memblob.OpenBucket(nil), "", "a bucket in memory") })
}

func TestAPrefixOfABucketIsABackend(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		b := memblob.OpenBucket(nil)
		others(t, b)
		return New(b, "stores/mine/", "a bucket in memory")
	})
}

// others puts what is not the store's into its bucket.
func others(t *testing.T, b *blob.Bucket) {
	t.Helper()
	for _, key := range []string{"packs/x", "stores/mine.json", "stores/minepacks/x", "stores/mine/Packs/X", "stores/mine/a/b/c"} {
		if err := b.WriteAll(t.Context(), key, []byte("other"), nil); err != nil {
			t.Fatal(err)
		}
	}
}
