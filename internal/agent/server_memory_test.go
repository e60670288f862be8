package agent

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
)

// holdLarge makes a checkpoint with a memory image that takes no room, and whose
// digest nobody has computed: what is served follows from sizes.
func (s *served) holdLarge(size int64) {
	s.Helper()
	pcp := s.hold(0)
	dir := s.store.dataPath(dataName("ns", "cp", pcpUID))
	m, _, err := checkpoint.ReadManifest(dir)
	if err != nil {
		s.Fatal(err)
	}
	for i := range m.Files {
		if strings.HasSuffix(m.Files[i].Path, "pages-1.img") {
			m.Files[i].Size = size
			err = os.Truncate(filepath.Join(dir, m.Files[i].Path), size)
		}
	}
	manifest, encodeErr := json.Marshal(m)
	if err := errors.Join(err, encodeErr, os.WriteFile(dir+"/"+checkpoint.ManifestName, manifest, 0o600)); err != nil {
		s.Fatal(err)
	}
	pcp.Status.ManifestDigest = archive.DigestOf(manifest)
	if err := s.client.Status().Update(s.Context(), pcp); err != nil {
		s.Fatal(err)
	}
}

func TestManyGibibytesAreServedInLittleMemory(t *testing.T) {
	size := int64(512 << 20)
	if more, err := strconv.ParseInt(os.Getenv("STASIS_TEST_ARCHIVE_BYTES"), 10, 64); err == nil {
		size = more
	}
	s := newServed(t)
	s.holdLarge(size)
	request, err := http.NewRequestWithContext(t.Context(), "GET", s.url+archivePath, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer token")
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	answer, err := s.http.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	n, err := io.Copy(io.Discard, answer.Body)
	if err != nil || n < size {
		t.Fatalf("%d bytes, %v", n, err)
	}
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapSys) - int64(before.HeapSys); grown > 32<<20 {
		t.Errorf("for %d MiB the heap has grown by %d MiB", n>>20, grown>>20)
	}
}
