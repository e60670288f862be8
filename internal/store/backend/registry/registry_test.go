package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
)

// fake is a registry of one repository, in memory. It has pages of tags, ranges and
// bearer tokens, which Debian's registry in test/store has not, or not so set up.
type fake struct {
	mu        sync.Mutex
	blobs     map[string][]byte
	manifests map[string][]byte // by digest
	tags      map[string]string
	uploads   map[string][]byte

	page     int // tags on one, at most
	noRanges bool
	before   func(http.ResponseWriter, *http.Request) bool // answers, and returns true
	pages    int                                           // of tags that were asked for
}

func newFake(t *testing.T) (*fake, Options) {
	f := &fake{blobs: map[string][]byte{}, manifests: map[string][]byte{}, tags: map[string]string{}, uploads: map[string][]byte{}, page: 100}
	server := httptest.NewServer(f)
	t.Cleanup(server.Close)
	return f, Options{Repository: strings.TrimPrefix(server.URL, "http://") + "/a/b", PlainHTTP: true, Username: "u", Password: "p", HTTP: server.Client()}
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/token" {
		if user, pass, _ := r.BasicAuth(); user != "u" || pass != "p" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprintf(w, `{"token":"for %s"}`, strings.Join(r.URL.Query()["scope"], " "))
		return
	}
	action := map[string]string{http.MethodGet: "pull", http.MethodHead: "pull", http.MethodDelete: "delete"}[r.Method]
	if action == "" || strings.Contains(r.URL.Path, "/uploads/") {
		action = "push"
	}
	if token := r.Header.Get("Authorization"); !strings.HasPrefix(token, "Bearer for repository:a/b:") || !strings.Contains(token, action) {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="here",scope="repository:a/b:%s"`, r.Host, action))
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.before != nil && f.before(w, r) {
		return
	}
	rest, ours := strings.CutPrefix(r.URL.Path, "/v2/a/b/")
	kind, what, _ := strings.Cut(rest, "/")
	switch {
	case !ours:
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN")
	case kind == "tags":
		f.serveTags(w, r)
	case kind == "manifests":
		f.serveManifest(w, r, what, body)
	case kind == "blobs" && strings.HasPrefix(what, "uploads/"):
		f.serveUpload(w, r, strings.TrimPrefix(what, "uploads/"), body)
	case kind == "blobs":
		f.serveBlob(w, r, what)
	}
}

func refuse(w http.ResponseWriter, status int, code string) {
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":"as a test wants"}]}`, code)
}

func (f *fake) serveTags(w http.ResponseWriter, r *http.Request) {
	f.pages++
	if len(f.manifests) == 0 {
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN")
		return
	}
	tags := slices.Sorted(maps.Keys(f.tags))
	if i, found := slices.BinarySearch(tags, r.URL.Query().Get("last")); found {
		tags = tags[i+1:]
	}
	if len(tags) > f.page {
		tags = tags[:f.page]
		w.Header().Set("Link", fmt.Sprintf(`</v2/a/b/tags/list?last=%s>; rel="next"`, tags[f.page-1]))
	}
	fmt.Fprintf(w, `{"name":"a/b","tags":["%s"]}`, strings.Join(tags, `","`))
}

func (f *fake) serveManifest(w http.ResponseWriter, r *http.Request, what string, body []byte) {
	switch r.Method {
	case http.MethodPut:
		sum := digest.FromBytes(body).String()
		f.manifests[sum], f.tags[what] = body, sum
		w.WriteHeader(http.StatusCreated)
	case http.MethodGet:
		data, there := f.manifests[f.tags[what]]
		if !there {
			refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
			return
		}
		w.Write(data)
	case http.MethodDelete:
		if _, there := f.manifests[what]; !there {
			refuse(w, http.StatusNotFound, "MANIFEST_UNKNOWN")
			return
		}
		delete(f.manifests, what)
		maps.DeleteFunc(f.tags, func(_, sum string) bool { return sum == what })
		w.WriteHeader(http.StatusAccepted)
	}
}

func (f *fake) serveUpload(w http.ResponseWriter, r *http.Request, id string, body []byte) {
	if r.Method == http.MethodPost {
		id = strconv.Itoa(len(f.uploads))
	}
	f.uploads[id] = append(f.uploads[id], body...)
	w.Header().Set("Location", "/v2/a/b/blobs/uploads/"+id+"?state=1")
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(0, len(f.uploads[id])-1)))
	switch r.Method {
	case http.MethodGet:
		w.WriteHeader(http.StatusNoContent)
	case http.MethodPut:
		want := r.URL.Query().Get("digest")
		if digest.FromBytes(f.uploads[id]).String() != want || r.URL.Query().Get("state") != "1" {
			refuse(w, http.StatusBadRequest, "DIGEST_INVALID")
			return
		}
		f.blobs[want] = f.uploads[id]
		w.WriteHeader(http.StatusCreated)
	default:
		w.WriteHeader(http.StatusAccepted)
	}
}

func (f *fake) serveBlob(w http.ResponseWriter, r *http.Request, sum string) {
	data, there := f.blobs[sum]
	if !there {
		refuse(w, http.StatusNotFound, "BLOB_UNKNOWN")
		return
	}
	if f.noRanges {
		w.Write(data)
		return
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
}

func open(t *testing.T, o Options) backend.Backend {
	t.Helper()
	b, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func TestARepositoryIsABackend(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		_, o := newFake(t)
		return open(t, o)
	})
}

func TestARegistryWithoutRangesDoes(t *testing.T) {
	f, o := newFake(t)
	f.noRanges = true
	b := open(t, o)
	if err := b.Put(t.Context(), "packs/a", []byte("0123456789"), nil); err != nil {
		t.Fatal(err)
	}
	if data, err := b.Read(t.Context(), "packs/a", -4, 2); err != nil || string(data) != "67" {
		t.Errorf("read %q, %v", data, err)
	}
}

func TestTagsAreAskedForPageByPage(t *testing.T) {
	f, o := newFake(t)
	f.page = 3
	b := open(t, o)
	for i := range 10 {
		if err := b.Put(t.Context(), fmt.Sprintf("packs/%d", i), nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	// Tags of others, in the same repository.
	f.tags["latest"] = f.tags["packs_1"]
	f.tags["V1"], f.tags["packs_1_2"] = "sha256:0", "sha256:0"
	seen := 0
	for o, err := range b.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(o.Name, "packs/") {
			t.Errorf("listed: %s", o.Name)
		}
		seen++
	}
	if seen != 10 || f.pages != 5 {
		t.Errorf("%d objects on %d pages, want 10 on 5", seen, f.pages)
	}
	if _, err := b.Read(t.Context(), "latest", 0, -1); !errors.Is(err, backend.ErrNotFound) {
		t.Errorf("a tag that is not this store's: %v", err)
	}
}

func TestABlobThatIsNotItsDigestIsRefused(t *testing.T) {
	f, o := newFake(t)
	b := open(t, o)
	if err := b.Put(t.Context(), "packs/a", []byte("0123456789"), nil); err != nil {
		t.Fatal(err)
	}
	sum := digest.FromString("0123456789").String()
	f.blobs[sum] = []byte("0123456788")
	if data, err := b.Read(t.Context(), "packs/a", 0, -1); err == nil || errors.Is(err, backend.ErrNotFound) {
		t.Errorf("another byte: read %q, %v", data, err)
	}
	f.blobs[sum] = []byte("012345678")
	if data, err := b.Read(t.Context(), "packs/a", 0, -1); err == nil {
		t.Errorf("a byte less: read %q", data)
	}
	delete(f.blobs, sum)
	if _, err := b.Read(t.Context(), "packs/a", 0, -1); err == nil || errors.Is(err, backend.ErrNotFound) {
		t.Errorf("no blob: %v, want an error that does not say that the object was never there", err)
	}
}

func TestABusyRegistryIsLeftAloneForAsLongAsItSays(t *testing.T) {
	f, o := newFake(t)
	b := open(t, o)
	f.before = func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Retry-After", "17")
		refuse(w, http.StatusTooManyRequests, "TOOMANYREQUESTS")
		return true
	}
	var waits []time.Duration
	b = backend.Retrying(b, backend.Policy{First: time.Millisecond, Waiting: func(_, _ string, _ error, wait time.Duration) {
		waits = append(waits, wait)
		f.mu.Lock()
		f.before = nil
		f.mu.Unlock()
	}, Sleep: func(ctx context.Context, _ time.Duration) error { return ctx.Err() }})
	if err := b.Put(t.Context(), "packs/a", nil, nil); err != nil {
		t.Fatal(err)
	}
	if len(waits) != 1 || waits[0] != 17*time.Second {
		t.Errorf("waits: %v", waits)
	}
}

func TestAnUploadDoesNotGoOnWhereNothingIsEncrypted(t *testing.T) {
	for place, want := range map[string]bool{"/v2/a/b/blobs/uploads/1": true, "https://elsewhere.example/1": true, "http://elsewhere.example/1": false} {
		req := httptest.NewRequest(http.MethodPost, "https://registry.example/v2/a/b/blobs/uploads/", nil)
		resp := &http.Response{Request: req, Header: http.Header{"Location": {place}}}
		if got, err := location(resp); (err == nil) != want {
			t.Errorf("%s: %q, %v", place, got, err)
		}
	}
}

func TestAnUploadThatBreaksOffGoesOnAtTheByteThatIsThere(t *testing.T) {
	f, o := newFake(t)
	b := open(t, o)
	data := backendtest.Noise(1, 3*whole)
	var ranges []string
	f.before = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPatch {
			return false
		}
		ranges = append(ranges, r.Header.Get("Content-Range"))
		if len(ranges) > 2 {
			return false
		}
		f.uploads["0"] = bytes.Clone(data[:len(ranges)*whole])
		w.WriteHeader(http.StatusBadGateway)
		return true
	}
	if err := b.Put(t.Context(), "packs/a", data, nil); err != nil {
		t.Fatal(err)
	}
	want := []string{"", fmt.Sprintf("%d-%d", whole, 3*whole-1), fmt.Sprintf("%d-%d", 2*whole, 3*whole-1)}
	if !slices.Equal(ranges, want) {
		t.Errorf("sent: %q, want %q", ranges, want)
	}
	if got, err := b.Read(t.Context(), "packs/a", 0, -1); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
}
