package registry

import (
	"bytes"
	"io"
	"net/http"
	"testing"

	"podstasis.dev/stasis/internal/store/backend"
)

// What a registry answers may have been written by anybody.

func FuzzManifest(f *testing.F) {
	const name = "packs/a"
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","artifactType":"` + ArtifactType + `","annotations":{"org.opencontainers.image.title":"` + name + `"},` +
		`"layers":[{"mediaType":"` + ObjectType + `","size":3,"digest":"sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}]}`))
	f.Add([]byte(`{"layers":[{"size":-1}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := decodeManifest(name, data)
		if err != nil {
			return
		}
		blob := m.Layers[0]
		if _, _, err := backend.Range(name, blob.Size, 0, -1); err == nil && (blob.Size < 0 || blob.Size > backend.MaxObject) {
			t.Errorf("an object of %d bytes would be read", blob.Size)
		}
		if hex := blob.Digest.Encoded(); len(hex) != 64 || blob.Digest.Algorithm() != "sha256" {
			t.Errorf("the digest %q was let through", blob.Digest)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"errors":[{"code":"BLOB_UNKNOWN","message":"m","detail":{"a":1}}]}`), "7", 404)
	f.Add([]byte(`{"errors":[{}]}`), "Fri, 27 Nov 2026 00:00:00 GMT", 503)
	f.Fuzz(func(t *testing.T, body []byte, wait string, code int) {
		request, err := http.NewRequest("GET", "https://registry.example/v2/", nil)
		if err != nil {
			t.Fatal(err)
		}
		err = answered(&http.Response{StatusCode: code, Body: io.NopCloser(bytes.NewReader(body)), Header: http.Header{"Retry-After": {wait}}, Request: request})
		if err == nil || status(err) != code || len(err.Error()) > 1<<20 {
			t.Errorf("it is %v, of status %d", err, status(err))
		}
		refused(err, "BLOB_UNKNOWN")
	})
}
