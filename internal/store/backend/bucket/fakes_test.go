package bucket

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"encoding/xml"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
)

// objects is what both of these services keep, below the bucket "checkpoints". They
// answer as the providers' documentation says; no provider's server can be had in a test.
type objects struct {
	mu      sync.Mutex
	blobs   map[string][]byte
	uploads map[string][]byte // unfinished ones, or blocks
	missing bool              // the bucket
	status  int               // of all answers, if set
	header  http.Header       // then
}

// page returns up to 100 keys, and the mark of the next page.
func (o *objects) page(prefix, mark string) (keys []string, next string) {
	all := slices.Sorted(maps.Keys(o.blobs))
	for _, key := range all {
		if strings.HasPrefix(key, prefix) && key > mark {
			if len(keys) == 100 {
				return keys, keys[99]
			}
			keys = append(keys, key)
		}
	}
	return keys, ""
}

// googleService answers as Google Cloud Storage does.
type googleService struct{ objects }

func newGoogle(t *testing.T) (*googleService, GCS) {
	g := &googleService{objects{blobs: map[string][]byte{}, uploads: map[string][]byte{}}}
	server := httptest.NewServer(g)
	t.Cleanup(server.Close)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	account, err := json.Marshal(map[string]string{
		"type": "service_account", "client_email": "stasis@example", "token_uri": server.URL + "/token",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
	})
	if err != nil {
		t.Fatal(err)
	}
	return g, GCS{Bucket: "checkpoints", Prefix: "mine/", Endpoint: server.URL + "/storage/v1/", Key: account, HTTP: server.Client()}
}

func (g *googleService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.status != 0:
		maps.Copy(w.Header(), g.header)
		w.WriteHeader(g.status)
		return
	case r.URL.Path == "/token":
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"access_token":"t","token_type":"Bearer","expires_in":3600}`)
		return
	case r.Header.Get("Authorization") != "Bearer t":
		w.WriteHeader(http.StatusUnauthorized)
		return
	case g.missing:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"error":{"code":404,"message":"The specified bucket does not exist."}}`)
		return
	}
	query := r.URL.Query()
	switch {
	case strings.HasPrefix(r.URL.Path, "/upload/storage/v1/b/checkpoints/o"):
		g.upload(w, r, query, body)
	case r.URL.Path == "/storage/v1/b/checkpoints/o":
		keys, next := g.page(query.Get("prefix"), query.Get("pageToken"))
		items := make([]map[string]string, len(keys))
		for i, key := range keys {
			items[i] = g.item(key)
		}
		json.NewEncoder(w).Encode(map[string]any{"items": items, "nextPageToken": next})
	case strings.HasPrefix(r.URL.Path, "/storage/v1/b/checkpoints/o/"):
		key := strings.TrimPrefix(r.URL.Path, "/storage/v1/b/checkpoints/o/")
		_, there := g.blobs[key]
		switch {
		case !there:
			w.WriteHeader(http.StatusNotFound)
		case r.Method == http.MethodDelete:
			delete(g.blobs, key)
			w.WriteHeader(http.StatusNoContent)
		default:
			json.NewEncoder(w).Encode(g.item(key))
		}
	default: // the older API, which objects are read by
		data, there := g.blobs[strings.TrimPrefix(r.URL.Path, "/checkpoints/")]
		if !there {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("X-Goog-Hash", "crc32c="+checksum(data))
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}
}

func (g *googleService) item(key string) map[string]string {
	return map[string]string{"bucket": "checkpoints", "name": key, "size": strconv.Itoa(len(g.blobs[key])), "crc32c": checksum(g.blobs[key]), "generation": "1", "updated": "2026-01-01T00:00:00Z"}
}

func checksum(data []byte) string {
	return base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))))
}

func (g *googleService) upload(w http.ResponseWriter, r *http.Request, query url.Values, body []byte) {
	var key string
	switch {
	case query.Has("upload_id"): // a part
		key = query.Get("upload_id")
		g.uploads[key] = append(g.uploads[key], body...)
		if strings.HasSuffix(r.Header.Get("Content-Range"), "/*") {
			w.Header().Set("Range", fmt.Sprintf("bytes=0-%d", len(g.uploads[key])-1))
			w.Header().Set("X-Http-Status-Code-Override", "308") // the client asks for it so
			return
		}
		g.blobs[key] = g.uploads[key]
		delete(g.uploads, key)
	case query.Get("uploadType") == "resumable":
		var object struct{ Name string }
		if err := json.Unmarshal(body, &object); err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		g.uploads[object.Name] = nil
		w.Header().Set("Location", "http://"+r.Host+r.URL.Path+"?upload_id="+url.QueryEscape(object.Name))
		return
	default:
		var object struct{ Name, MD5Hash string }
		_, params, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
		parts := multipart.NewReader(bytes.NewReader(body), params["boundary"])
		about, err := parts.NextPart()
		if err == nil {
			err = json.NewDecoder(about).Decode(&object)
		}
		if err == nil {
			about, err = parts.NextPart()
		}
		if err != nil || object.MD5Hash == "" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		data, err := io.ReadAll(about)
		if err != nil {
			return
		}
		key = object.Name
		g.blobs[key] = data
	}
	json.NewEncoder(w).Encode(g.item(key))
}

// azureService answers as Azure Blob Storage does.
type azureService struct{ objects }

func newMicrosoft(t *testing.T) (*azureService, Azure) {
	m := &azureService{objects{blobs: map[string][]byte{}, uploads: map[string][]byte{}}}
	server := httptest.NewServer(m)
	t.Cleanup(server.Close)
	return m, Azure{Container: "checkpoints", Prefix: "mine/", Account: "account", Endpoint: server.URL, AccountKey: base64.StdEncoding.EncodeToString([]byte("key")), HTTP: server.Client()}
}

func (m *azureService) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	refuse := func(status int, code string) {
		w.Header().Set("x-ms-error-code", code)
		w.WriteHeader(status)
	}
	query := r.URL.Query()
	key := strings.TrimPrefix(r.URL.Path, "/checkpoints/")
	data, there := m.blobs[key]
	switch {
	case m.status != 0:
		maps.Copy(w.Header(), m.header)
		w.WriteHeader(m.status)
	case !strings.HasPrefix(r.Header.Get("Authorization"), "SharedKey account:"):
		refuse(http.StatusForbidden, "AuthenticationFailed")
	case m.missing && r.Method == http.MethodHead:
		w.WriteHeader(http.StatusNotFound) // says no more
	case m.missing:
		refuse(http.StatusNotFound, "ContainerNotFound")
	case query.Get("comp") == "list":
		keys, next := m.page(query.Get("prefix"), query.Get("marker"))
		fmt.Fprint(w, `<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>`)
		for _, key := range keys {
			fmt.Fprintf(w, `<Blob><Name>%s</Name><Properties><Last-Modified>Thu, 01 Jan 2026 00:00:00 GMT</Last-Modified><Etag>1</Etag><Content-Length>%d</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob>`, key, len(m.blobs[key]))
		}
		fmt.Fprintf(w, `</Blobs><NextMarker>%s</NextMarker></EnumerationResults>`, next)
	case r.Method == http.MethodPut && query.Get("comp") == "block":
		m.uploads[key+query.Get("blockid")] = body
		w.WriteHeader(http.StatusCreated)
	case r.Method == http.MethodPut:
		if query.Get("comp") == "blocklist" {
			var list struct{ Latest []string }
			if err := xml.Unmarshal(body, &list); err != nil {
				refuse(http.StatusBadRequest, "InvalidBlockList")
				return
			}
			body = nil
			for _, block := range list.Latest {
				body = append(body, m.uploads[key+block]...)
			}
		}
		m.blobs[key] = body
		w.WriteHeader(http.StatusCreated)
	case !there && r.Method == http.MethodHead:
		w.WriteHeader(http.StatusNotFound)
	case !there:
		refuse(http.StatusNotFound, "BlobNotFound")
	case r.Method == http.MethodDelete:
		delete(m.blobs, key)
		w.WriteHeader(http.StatusAccepted)
	default:
		if bytes := r.Header.Get("x-ms-range"); bytes != "" {
			r.Header.Set("Range", bytes)
		}
		w.Header().Set("Etag", `"1"`)
		w.Header().Set("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
		w.Header().Set("x-ms-creation-time", "Thu, 01 Jan 2026 00:00:00 GMT")
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}
}

func opened(t *testing.T, open func(context.Context) (backend.Backend, error)) backend.Backend {
	t.Helper()
	b, err := open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestABucketOfGCSIsABackend(t *testing.T) {
	backendtest.Suite{Many: 250, Open: func(t *testing.T) backend.Backend { // three pages
		_, config := newGoogle(t)
		return opened(t, config.Open)
	}}.Run(t)
}

func TestAContainerOfAzureIsABackend(t *testing.T) {
	backendtest.Suite{Many: 250, Open: func(t *testing.T) backend.Backend { // three pages
		_, config := newMicrosoft(t)
		return opened(t, config.Open)
	}}.Run(t)
}

func TestWhatServicesAnswerHasItsMeaning(t *testing.T) {
	g, gcs := newGoogle(t)
	m, azure := newMicrosoft(t)
	for name, service := range map[string]struct {
		*objects
		backend.Backend
	}{"GCS": {&g.objects, opened(t, gcs.Open)}, "Azure": {&m.objects, opened(t, azure.Open)}} {
		defer service.Close()
		if err := service.Put(t.Context(), "packs/a", []byte("x"), nil); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		each := func(what string, want error) {
			t.Helper()
			var listErr error
			for _, listErr = range service.List(t.Context(), "") {
			}
			_, readErr := service.Read(t.Context(), "packs/b", 0, -1)
			_, tailErr := service.Read(t.Context(), "packs/b", -1, 1)
			for call, err := range map[string]error{"put": service.Put(t.Context(), "packs/b", nil, nil), "read": readErr, "read the tail": tailErr, "list": listErr, "delete": service.Delete(t.Context(), "packs/b")} {
				if !errors.Is(err, want) {
					t.Errorf("%s: %s: %s: %v, want %v", name, what, call, err, want)
				}
			}
		}
		service.missing = true
		each("the bucket is missing", backend.ErrNoStore)
		service.missing = false
		service.status = http.StatusForbidden
		each("forbidden", backend.ErrDenied)
		service.status = http.StatusInsufficientStorage
		if err := service.Put(t.Context(), "packs/b", []byte("x"), nil); !errors.Is(err, backend.ErrFull) {
			t.Errorf("%s: full: %v", name, err)
		}
	}
}
