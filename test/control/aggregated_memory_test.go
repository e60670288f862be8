package control

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// archiveSize names the environment variable with the size in MiB of the archive that
// the test below fetches; docs/benchmarks.md holds its figures for 2048.
const archiveSize = "STASIS_ARCHIVE_MIB"

// pattern is an archive of any size: each eight bytes tell where they are.
type pattern struct{ size, at int64 }

func (p *pattern) Read(b []byte) (int, error) {
	if p.at >= p.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(b)), p.size-p.at))
	for i := range n {
		at := p.at + int64(i)
		b[i] = byte((at >> 3) >> (at & 7 * 8))
	}
	p.at += int64(n)
	return n, nil
}

func (p *pattern) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		offset += p.at
	case io.SeekEnd:
		offset += p.size
	}
	if offset < 0 {
		return 0, errors.New("before the start")
	}
	p.at = offset
	return offset, nil
}

// This process is the control plane, the agent and the client at once: what all
// three take together bounds what the control plane does.
func TestALargeArchiveGoesThroughInLittleMemory(t *testing.T) {
	size := int64(192 << 20)
	if mib, err := strconv.ParseInt(os.Getenv(archiveSize), 10, 64); err == nil {
		size = mib << 20
	}
	const part = 64 << 20
	ns := namespace(t)
	node, agent := node(t)
	completed(t, ns, "c", node, agent)
	serve(t, node, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-tar")
		http.ServeContent(w, r, "", time.Time{}, &pattern{size: size})
	})
	c, err := rest.HTTPClientFor(shared.admin)
	must(t, err)
	must(t, os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)) // forget the peak
	began := time.Now()
	got := sha256.New()
	for at := int64(0); at < size; at += part {
		url := shared.admin.Host + "/apis/" + subresources.SchemeGroupVersion.String() + "/namespaces/" + ns + "/podcheckpoints/c/archive"
		r, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
		must(t, err)
		r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", at, min(at+part, size)-1))
		answer, err := c.Do(r)
		must(t, err)
		_, err = io.Copy(got, answer.Body)
		answer.Body.Close()
		must(t, err)
	}
	took, peak := time.Since(began), peakMiB(t)
	want := sha256.New()
	_, err = io.Copy(want, &pattern{size: size})
	must(t, err)
	if string(got.Sum(nil)) != string(want.Sum(nil)) {
		t.Error("the parts are not the archive")
	}
	t.Logf("%d MiB in %s, peak of this process %d MiB", size>>20, took.Round(time.Millisecond), peak)
	if peak >= 200 {
		t.Errorf("peak of %d MiB, want less than 200", peak)
	}
}

// peakMiB is the most that was resident of this process.
func peakMiB(t *testing.T) int64 {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	must(t, err)
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	must(t, err)
	return kib >> 10
}
