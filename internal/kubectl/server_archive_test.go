package kubectl

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
)

// servedArchive is an archive that the server gives out.
type servedArchive struct {
	data   []byte
	etag   string
	wanted int // how often the digest was asked for
}

// faults are what goes wrong with transfers.
type faults struct {
	cutAfter  int64 // each answer ends after so many bytes
	hangAfter int64 // nothing comes after this byte of the archive
	refuse    int   // so many requests are answered 503
	served    int64 // how far the archive has been given out
	flip      bool  // the digest is another one
}

// makeArchive makes a real archive of a checkpoint whose one image has so many bytes.
func makeArchive(t *testing.T, name string, bytes int) (data []byte, manifestDigest string) {
	t.Helper()
	dir := t.TempDir()
	image := make([]byte, bytes)
	random := rand.NewChaCha8([32]byte{1})
	_, _ = random.Read(image)
	files := map[string][]byte{
		"containers/main/config.json":      []byte("{}"),
		"containers/main/criu/pages-1.img": image,
	}
	for path, content := range files {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(path)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, path), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	manifest := &checkpoint.Manifest{
		Engine: checkpoint.Program{Name: "criu", Version: "4.2"}, Runtime: checkpoint.Program{Name: "runc", Version: "1.5"},
		Platform: checkpoint.Platform{OS: "linux", Architecture: "amd64", Kernel: "6.1"},
		Sandbox:  checkpoint.Sandbox{ID: "s", Namespace: namespace, Name: "web", UID: "u"},
		CutTime:  time.Unix(1_700_000_000, 0).UTC(),
		Containers: []checkpoint.Container{{Name: "main", ID: "c", Image: "i",
			Process: checkpoint.Process{Args: []string{"/bin/main"}, Cwd: "/"}}},
	}
	digest, err := checkpoint.Seal(t.Context(), dir, manifest)
	if err != nil {
		t.Fatal(err)
	}
	object, err := json.Marshal(map[string]any{"apiVersion": "checkpoint.podstasis.dev/v1alpha1", "kind": "PodCheckpoint",
		"metadata": map[string]any{"name": name, "namespace": namespace}, "spec": map[string]any{"sourcePodName": "web"}})
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	a, err := archive.Open(root.FS(), manifest, object)
	if err != nil {
		t.Fatal(err)
	}
	data = make([]byte, a.Size())
	if _, err := a.ReadAt(data, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return data, digest
}

// addArchive serves the archive of a checkpoint that is there.
func (s *apiServer) addArchive(name string, bytes int) {
	data, digest := makeArchive(s.t, name, bytes)
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := sha256.Sum256(data)
	s.archives[name] = &servedArchive{data: data, etag: fmt.Sprintf(`"%x"`, sum[:8])}
	if object := s.objects[objectKey{"podcheckpoints", namespace, name}]; object != nil {
		_ = unstructured.SetNestedField(object.Object, digest, "status", "manifestDigest")
	}
}

// getArchive answers for a range.
func (s *apiServer) getArchive(w http.ResponseWriter, r *http.Request, name string) {
	if container := r.URL.Query().Get("container"); container != "" {
		name += "/" + container
	}
	s.mu.Lock()
	a := s.archives[name]
	refuse := s.faults.refuse > 0
	if refuse {
		s.faults.refuse--
	}
	s.mu.Unlock()
	if refuse || a == nil {
		fail(w, apierrors.NewServiceUnavailable("the agent of node node-1 is gone: its last sign of life is 5m0s old"))
		return
	}
	w.Header().Set("ETag", a.etag)
	if r.Header.Get("Want-Repr-Digest") != "" {
		s.mu.Lock()
		a.wanted++
		sum := sha256.Sum256(a.data)
		if s.faults.flip {
			sum[0] ^= 1
		}
		if a.wanted > 1 { // the first time it is still being computed
			w.Header().Set("Repr-Digest", "sha-256=:"+base64.StdEncoding.EncodeToString(sum[:])+":")
		}
		s.mu.Unlock()
	}
	http.ServeContent(&faulty{ResponseWriter: w, s: s, r: r}, r, "", time.Time{}, bytes.NewReader(a.data))
}

// faulty is an answer that goes wrong.
type faulty struct {
	http.ResponseWriter
	s       *apiServer
	r       *http.Request
	written int64
}

func (f *faulty) Write(p []byte) (int, error) {
	var first int64
	_, _ = fmt.Sscanf(strings.TrimPrefix(f.r.Header.Get("Range"), "bytes="), "%d-", &first)
	f.s.mu.Lock()
	faults := f.s.faults
	f.s.mu.Unlock()
	room := int64(len(p))
	if faults.cutAfter > 0 {
		room = min(room, faults.cutAfter-f.written)
	}
	if faults.hangAfter > 0 {
		room = min(room, max(faults.hangAfter-first-f.written, 0))
	}
	n, err := f.ResponseWriter.Write(p[:room])
	f.written += int64(n)
	f.s.mu.Lock()
	f.s.faults.served = max(f.s.faults.served, first+f.written)
	f.s.mu.Unlock()
	if err == nil && room < int64(len(p)) {
		_ = http.NewResponseController(f.ResponseWriter).Flush()
		if faults.hangAfter > 0 && first+f.written >= faults.hangAfter {
			<-f.r.Context().Done()
		}
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// upload is an archive that comes in.
type upload struct {
	data  []byte
	calls int
}

// putArchive takes a part of an archive.
func (s *apiServer) putArchive(w http.ResponseWriter, r *http.Request, namespace, name string) {
	s.mu.Lock()
	object := s.objects[objectKey{"podcheckpoints", namespace, name}]
	u := s.uploads[name]
	if u == nil {
		u = &upload{}
		s.uploads[name] = u
	}
	u.calls++
	first, hang := u.calls == 1, s.faults.hangAfter
	s.mu.Unlock()
	if object == nil || first {
		fail(w, apierrors.NewServiceUnavailable("this agent does not expect an archive for that PodCheckpoint, or not yet; try again"))
		return
	}
	var from, to, size int64
	span := r.Header.Get("Content-Range")
	if n, _ := fmt.Sscanf(span, "bytes %d-%d/%d", &from, &to, &size); n == 3 {
		limit := to - from + 1
		if hang > 0 {
			limit = min(limit, max(hang-from, 0))
		}
		part, _ := io.ReadAll(io.LimitReader(r.Body, limit)) // what has come of it counts
		s.mu.Lock()
		if from == int64(len(u.data)) {
			u.data = append(u.data, part...)
			s.faults.served = int64(len(u.data))
		}
		s.mu.Unlock()
		if hang > 0 && to >= hang {
			<-r.Context().Done()
			return
		}
	}
	s.mu.Lock()
	there := len(u.data)
	want, _, _ := unstructured.NestedInt64(object.Object, "spec", "import", "sizeBytes")
	if want == 0 {
		f, _, _ := unstructured.NestedFloat64(object.Object, "spec", "import", "sizeBytes")
		want = int64(f)
	}
	if int64(there) == want {
		s.unpack(object, u.data)
	}
	s.mu.Unlock()
	w.Header().Set("Upload-Offset", fmt.Sprint(there))
	w.WriteHeader(http.StatusNoContent)
}

// unpack ends an import.
func (s *apiServer) unpack(object *unstructured.Unstructured, data []byte) {
	digest, _, _ := unstructured.NestedString(object.Object, "spec", "import", "digest")
	if got := fmt.Sprintf("sha256:%x", sha256.Sum256(data)); got != digest {
		object.Object["status"] = map[string]any{"nodeName": "node-2", "conditions": ready("False", "CheckpointFailed", "what came has digest "+got)}
		return
	}
	status := checkpointSteps("ready")[1]
	status["nodeName"] = "node-2"
	object.Object["status"] = status
}
