package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
)

const importPath = "/v1/imports/" + string(pcpUID)

// exportOf makes the archive of a checkpoint of Pod app with container a, and the
// object that it was exported with.
func exportOf(t *testing.T, change ...func(*v1alpha1.PodCheckpoint)) []byte {
	t.Helper()
	return exportOfEngine(t, "criu", change...)
}

func exportOfEngine(t *testing.T, engine string, change ...func(*v1alpha1.PodCheckpoint)) []byte {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(dir+"/containers/a/criu", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/containers/a/criu/pages-1.img", bytes.Repeat([]byte("page"), 20_000), 0o600); err != nil {
		t.Fatal(err)
	}
	m := &checkpoint.Manifest{
		Engine: checkpoint.Program{Name: engine, Version: "4.2\x1b[31m"}, Platform: checkpoint.Platform{OS: "linux", Architecture: "amd64"},
		Containers: []checkpoint.Container{{Name: "a"}}, FreezeDuration: 120 * time.Millisecond,
	}
	digest, err := checkpoint.Seal(t.Context(), dir, m)
	if err != nil {
		t.Fatal(err)
	}
	uid := podUID
	pcp := &v1alpha1.PodCheckpoint{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: "PodCheckpoint"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "far", Name: "away", UID: "other"},
		Spec:       v1alpha1.PodCheckpointSpec{SourcePodName: "app", NodeName: "elsewhere"},
		Status: v1alpha1.PodCheckpointStatus{
			NodeName: "elsewhere", SourcePodUID: &uid, ManifestDigest: digest,
			CheckpointedPodTemplate: &corev1.PodTemplateSpec{Spec: corev1.PodSpec{
				InitContainers: []corev1.Container{{Name: "setup", Image: "img:setup"}},
				Containers:     []corev1.Container{{Name: "a", Image: "img:a"}},
			}},
			CheckpointedContainers:     []v1alpha1.PodCheckpointContainerStatus{{Name: "a", Image: "img:a"}},
			CheckpointedInitContainers: []v1alpha1.PodCheckpointContainerStatus{{Name: "setup", Image: "img:setup"}},
		},
	}
	for _, c := range change {
		c(pcp)
	}
	object, err := exported(pcp)
	if err != nil {
		t.Fatal(err)
	}
	a, err := archive.Open(os.DirFS(dir), m, object)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(a.NewReader())
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// expecting is an agent that serves and has an object that waits for an archive.
func expecting(t *testing.T, data []byte, change ...func(*v1alpha1.PodCheckpoint)) *served {
	t.Helper()
	s := newServed(t)
	sum := sha256.Sum256(data)
	pcp := makePCP(func(pcp *v1alpha1.PodCheckpoint) {
		pcp.Spec.Import = &v1alpha1.CheckpointImport{Digest: "sha256:" + hex.EncodeToString(sum[:]), SizeBytes: int64(len(data))}
	})
	for _, c := range change {
		c(pcp)
	}
	if err := s.client.Create(t.Context(), pcp); err != nil {
		t.Fatal(err)
	}
	s.reconcile(t.Context(), "cp")
	return s
}

// send puts bytes from first on, and returns the answer's status and offset.
func (s *served) send(data []byte, first, last, size int) (int, string) {
	s.Helper()
	answer, _ := s.do("PUT", importPath, string(data), "Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, size))
	return answer.StatusCode, answer.Header.Get(agentapi.HeaderUploadOffset)
}

// finish reconciles until the import has ended.
func (s *served) finish() {
	s.Helper()
	ctx, stop := context.WithCancel(s.Context())
	done := make(chan error)
	go func() { done <- s.reconciler.imports.Start(ctx) }()
	s.reconcile(ctx, "cp")
	s.await("the import has ended", func() bool { return !s.busy() })
	stop()
	<-done
}

func TestAnImportedArchiveBecomesACheckpoint(t *testing.T) {
	data := exportOf(t)
	s := expecting(t, data)
	pcp := s.expectReady("cp", v1alpha1.ReasonPending, fmt.Sprintf("0 of %d bytes", len(data)))
	if len(pcp.Finalizers) != 1 || pcp.Status.NodeName != testNode {
		t.Errorf("finalizers %v, node %q", pcp.Finalizers, pcp.Status.NodeName)
	}
	half := len(data) / 2
	if code, offset := s.send(data[:half], 0, half-1, len(data)); code != 204 || offset != fmt.Sprint(half) {
		t.Errorf("the first part: %d, offset %s", code, offset)
	}
	s.reconcile(t.Context(), "cp")
	s.expectReady("cp", v1alpha1.ReasonPending, fmt.Sprintf("%d of %d bytes", half, len(data)))
	if code, offset := s.send(data[half:], half, len(data)-1, len(data)); code != 204 || offset != fmt.Sprint(len(data)) {
		t.Errorf("the second part: %d, offset %s", code, offset)
	}
	if e := <-s.arrived; e.Object.Name != "cp" {
		t.Errorf("what brings the object back names %q", e.Object.Name)
	}
	s.finish()
	pcp = s.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "Imported a of Pod app")
	name := dataName("ns", "cp", pcpUID)
	if pcp.Status.CheckpointLocation.NodeLocal.Path != name || *pcp.Status.SourcePodUID != podUID || pcp.Status.Engine.Version != "4.2?[31m" ||
		pcp.Status.CheckpointedPodTemplate.Spec.Containers[0].Name != "a" || pcp.Status.FreezeDuration.Duration != 120*time.Millisecond {
		t.Errorf("the status is %+v", pcp.Status)
	}
	if _, err := checkpoint.Verify(t.Context(), s.store.dataPath(name), pcp.Status.ManifestDigest); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(s.store.checkpointRoot() + "/.*"); len(left) != 0 {
		t.Errorf("of the upload there is left %v", left)
	}
	if code, _ := s.send(nil, 0, 0, len(data)); code != 503 {
		t.Errorf("a part for what is done: %d", code)
	}
	s.reconcile(t.Context(), "cp")
	if answer, again := s.do("GET", archivePath, ""); answer.StatusCode != 200 || len(again) == 0 {
		t.Errorf("exported again: %s", answer.Status)
	}
}

func TestAnUploadGoesOnWhereItBroke(t *testing.T) {
	data := exportOf(t)
	s := expecting(t, data)
	size := len(data)
	ask := func() string {
		answer, _ := s.do("PUT", importPath, "", "Content-Range", fmt.Sprintf("bytes */%d", size))
		if answer.StatusCode != 204 {
			t.Errorf("asked how much is there: %s", answer.Status)
		}
		return answer.Header.Get(agentapi.HeaderUploadOffset)
	}
	if code, offset := s.send(data[:1000], 0, 1999, size); code != 400 || offset != "1000" || ask() != "1000" {
		t.Errorf("a part that ends early: %d, offset %s, then %s", code, offset, ask())
	}
	if code, offset := s.send(data[:500], 0, 499, size); code != 409 || offset != "1000" {
		t.Errorf("a part that is there: %d, offset %s", code, offset)
	}
	if code, offset := s.send(data[2000:2500], 2000, 2499, size); code != 409 || offset != "1000" {
		t.Errorf("a part too far on: %d, offset %s", code, offset)
	}
	s.start() // the agent starts anew
	s.server.uploads = s.reconciler.uploads
	s.server.holdings.store = s.store
	if code, _ := s.send(data[1000:1500], 1000, 1499, size); code != 503 {
		t.Errorf("before the new agent has seen the object: %d", code)
	}
	s.reconcile(t.Context(), "cp")
	if code, offset := s.send(data[1000:], 1000, size-1, size); code != 204 || offset != fmt.Sprint(size) {
		t.Errorf("the rest: %d, offset %s", code, offset)
	}
	s.finish()
	s.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "Imported")
}

func TestPartsThatAreNotAsTheyShouldBeAreRefused(t *testing.T) {
	data := exportOf(t)
	s := expecting(t, data)
	for header, want := range map[string]int{
		"":                             400,
		"bytes 0-9":                    400,
		"bytes 5-1/100":                400,
		"bytes 0-99/99":                400,
		"octets 0-9/10":                400,
		"bytes -9/10":                  400,
		"bytes 0-9/10":                 400, // not the size of the archive
		"bytes */10":                   400,
		"bytes 0-99999999/99999999999": 400,
	} {
		if answer, _ := s.do("PUT", importPath, "0123456789", "Content-Range", header); answer.StatusCode != want {
			t.Errorf("%q: %s, want %d", header, answer.Status, want)
		}
	}
	s.reconciler.uploads.of(pcpUID).size = 1 << 40
	if answer, _ := s.do("PUT", importPath, "", "Content-Range", fmt.Sprintf("bytes 0-%d/%d", int64(agentapi.MaxPart), int64(1)<<40)); answer.StatusCode != 413 {
		t.Errorf("a part too large: %s", answer.Status)
	}
	if answer, _ := s.do("PUT", "/v1/imports/nosuch", "", "Content-Range", "bytes */10"); answer.StatusCode != 503 {
		t.Errorf("for an object that is not there: %s", answer.Status)
	}
	s.reconciler.room.limits = DiskLimits{MaxShare: 1e-12}
	if answer, said := s.do("PUT", importPath, "0123456789", "Content-Range", fmt.Sprintf("bytes 0-9/%d", int64(1)<<40)); answer.StatusCode != 507 || !strings.Contains(string(said), "--max-disk-share") {
		t.Errorf("without room: %s: %s", answer.Status, said)
	}
}

func TestArchivesThatCannotBeImportedEndTheirObjectWithTheReason(t *testing.T) {
	for name, c := range map[string]struct {
		data   func(t *testing.T) []byte
		object func(*v1alpha1.PodCheckpoint)
		says   string
	}{
		"another digest": {func(t *testing.T) []byte { return exportOf(t) },
			func(pcp *v1alpha1.PodCheckpoint) { pcp.Spec.Import.Digest = "sha256:" + strings.Repeat("0", 64) }, "spec.import.digest"},
		"no archive": {func(t *testing.T) []byte { return bytes.Repeat([]byte("x"), 4096) }, nil, "not a checkpoint archive"},
		"an engine whose images cannot be looked into": {func(t *testing.T) []byte { return exportOfEngine(t, "gvisor") }, nil, "only CRIU's are brought in"},
		"another Pod": {func(t *testing.T) []byte { return exportOf(t) },
			func(pcp *v1alpha1.PodCheckpoint) { pcp.Spec.SourcePodName = "other" }, `sourcePodName`},
		"a selection of the Pod for all": {func(t *testing.T) []byte {
			return exportOf(t, func(pcp *v1alpha1.PodCheckpoint) { pcp.Spec.Containers = []string{"a"} })
		}, nil, `spec.containers ["a"]`},
		"an object of another manifest": {func(t *testing.T) []byte {
			return exportOf(t, func(pcp *v1alpha1.PodCheckpoint) { pcp.Status.ManifestDigest = "sha256:0" })
		}, nil, "tells of a manifest"},
		"an object that was not Ready": {func(t *testing.T) []byte {
			return exportOf(t, func(pcp *v1alpha1.PodCheckpoint) { pcp.Status.CheckpointedPodTemplate = nil })
		}, nil, "Ready"},
		"a container that is not there": {func(t *testing.T) []byte {
			return exportOf(t, func(pcp *v1alpha1.PodCheckpoint) {
				pcp.Status.CheckpointedContainers = append(pcp.Status.CheckpointedContainers, v1alpha1.PodCheckpointContainerStatus{Name: "ghost"})
			})
		}, nil, "ghost"},
		"a container that it does not tell of": {func(t *testing.T) []byte {
			return exportOf(t, func(pcp *v1alpha1.PodCheckpoint) { pcp.Status.CheckpointedContainers = nil })
		}, nil, `container "a"`},
	} {
		t.Run(name, func(t *testing.T) {
			data := c.data(t)
			s := expecting(t, data, func(pcp *v1alpha1.PodCheckpoint) {
				if c.object != nil {
					c.object(pcp)
				}
			})
			s.send(data, 0, len(data)-1, len(data))
			s.finish()
			s.expectReady("cp", v1alpha1.ReasonCheckpointFailed, c.says)
			if held, _ := s.store.held(); len(held) != 0 {
				t.Errorf("something is kept: %v", held)
			}
		})
	}
}

func TestAnImportThatTheAPIServerWouldNotTakeFailsBeforeItHasHappened(t *testing.T) {
	data := exportOf(t)
	s := expecting(t, data)
	s.intercept.SubResourcePatch = func(ctx context.Context, c client.Client, sub string, obj client.Object, patch client.Patch, opts ...client.SubResourcePatchOption) error {
		if pcp, ok := obj.(*v1alpha1.PodCheckpoint); ok && ready(pcp) {
			return apierrors.NewRequestEntityTooLargeError("1.5 MiB are too much")
		}
		return c.SubResource(sub).Patch(ctx, obj, patch, opts...)
	}
	s.send(data, 0, len(data)-1, len(data))
	s.finish()
	s.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "too much")
}

func TestAnImportIsEndedWhenThereIsNoRoomOrNobodyGoesOn(t *testing.T) {
	data := exportOf(t)
	s := newServed(t)
	pcp := makePCP(func(pcp *v1alpha1.PodCheckpoint) {
		pcp.Spec.Import = &v1alpha1.CheckpointImport{Digest: "sha256:" + strings.Repeat("0", 64), SizeBytes: 1 << 50}
	})
	if err := s.client.Create(t.Context(), pcp); err != nil {
		t.Fatal(err)
	}
	s.reconcile(t.Context(), "cp")
	s.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "--min-free-disk")

	s = expecting(t, data)
	s.send(data[:10], 0, 9, len(data))
	s.reconcile(t.Context(), "cp")
	s.expectReady("cp", v1alpha1.ReasonPending, "10 of")
	s.reconciler.now = func() time.Time { return time.Now().Add(importPatience + time.Minute) }
	s.reconcile(t.Context(), "cp")
	s.expectReady("cp", v1alpha1.ReasonCheckpointFailed, "24h")
	if left, _ := filepath.Glob(s.store.checkpointRoot() + "/.*"); len(left) != 0 {
		t.Errorf("of the upload there is left %v", left)
	}
}

func TestAnImportThatIsCutShortIsBegunAnewByTheNextAgent(t *testing.T) {
	data := exportOf(t)
	s := expecting(t, data)
	s.send(data, 0, len(data)-1, len(data))
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	s.reconciler.imports.queue = make(chan importOp, 1)
	s.reconcile(ctx, "cp") // taken up, and then the agent dies
	s.expectReady("cp", v1alpha1.ReasonCheckpointInProgress, "unpacked")
	go func() { done <- nil }()
	stop()
	<-done
	if err := os.MkdirAll(s.store.checkpointRoot()+"/"+partialPrefix+string(pcpUID)+"/half", 0o700); err != nil {
		t.Fatal(err)
	}
	s.start()
	s.server.uploads = s.reconciler.uploads
	s.finish()
	s.expectReady("cp", v1alpha1.ReasonCheckpointCompleted, "Imported")
}

func TestImportsKeepNoCheckpointWaiting(t *testing.T) {
	f := newFlights(1)
	if f.beginImport("i1") == nil || f.beginImport("i2") == nil || f.beginImport("i1") != nil {
		t.Error("imports are not guarded by their objects alone")
	}
	taking := f.begin("c1", "p1")
	if taking == nil {
		t.Fatal("a checkpoint waits for imports")
	}
	if f.begin("c2", "p2") != nil {
		t.Error("there is no limit any more")
	}
	f.end(f.of("i1"))
	f.end(taking)
	if f.begin("c2", "p2") == nil || f.begin("c3", "p3") != nil {
		t.Error("what ended is counted wrong")
	}
}

func TestWhatHasComeOfAnArchiveGoesWithItsObject(t *testing.T) {
	data := exportOf(t)
	s := expecting(t, data)
	s.send(data[:10], 0, 9, len(data))
	if err := s.client.Delete(t.Context(), s.get("cp")); err != nil {
		t.Fatal(err)
	}
	s.reconcile(t.Context(), "cp")
	var pcp v1alpha1.PodCheckpoint
	if err := s.client.Get(t.Context(), types.NamespacedName{Namespace: "ns", Name: "cp"}, &pcp); !apierrors.IsNotFound(err) {
		t.Errorf("the object is there: %v", err)
	}
	if held, _ := s.store.held(); len(held) != 0 {
		t.Errorf("something is kept: %v", held)
	}
	if code, _ := s.send(data[10:20], 10, 19, len(data)); code != 503 {
		t.Errorf("a part after: %d", code)
	}
	if _, err := s.store.makeImport("aaaa"); err != nil {
		t.Fatal(err)
	}
	if err := s.reconciler.removeOrphans(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(s.store.importPath("aaaa")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an upload of no object is left: %v", err)
	}
}

func TestAKubeletsArchiveIsImportedAsACheckpointOfItsContainer(t *testing.T) {
	o := &operations{nodeName: testNode, now: time.Now}
	m := &checkpoint.Manifest{
		Sandbox:    checkpoint.Sandbox{Name: "app", UID: "u1"},
		Containers: []checkpoint.Container{{Name: "web", Image: "nginx"}},
	}
	pcp := makePCP(func(pcp *v1alpha1.PodCheckpoint) { pcp.Spec.Containers = []string{"web"} })
	rec, err := o.imported(pcp, &archive.Unpacked{Manifest: m, ManifestDigest: "sha256:1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := complete(&v1alpha1.PodCheckpoint{Status: rec.Status}); err != nil {
		t.Error(err)
	}
	if *rec.Status.SourcePodUID != "u1" || rec.Status.CheckpointedContainers[0].Name != "web" || rec.PodUID != "" {
		data, _ := json.Marshal(rec)
		t.Errorf("the record is %s", data)
	}
	for _, containers := range [][]string{nil, {"other"}, {"web", "other"}} {
		pcp.Spec.Containers = containers
		if _, err := o.imported(pcp, &archive.Unpacked{Manifest: m}); err == nil || !strings.Contains(err.Error(), "[web]") {
			t.Errorf("with spec.containers %q: %v", containers, err)
		}
	}
}
