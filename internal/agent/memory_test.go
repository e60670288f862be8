package agent

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/restoring"
)

// anyEngine restores everything.
type anyEngine struct{ restoring.Compatibility }

func (anyEngine) CheckRestore(context.Context, *checkpoint.Manifest) error { return nil }
func (anyEngine) Whole(*checkpoint.Manifest) bool                          { return false }
func (anyEngine) CheckPrivileges(context.Context, string, *nodeapi.Privileges) error {
	return nil
}
func (anyEngine) Adapt(_ context.Context, _ restoring.Adaptation, dir string) (*nodeapi.ContainerRestore, error) {
	return &nodeapi.ContainerRestore{}, os.MkdirAll(dir, 0o700)
}

const (
	atHome    = "its own"
	copied    = "a whole copy"
	notHere   = "on another node"
	lessThan  = 13 // MiB: memoryElsewhere has 12.5
	enoughFor = 12
)

// X5: by size where all is here, from elsewhere where it is asked for.
func TestWhetherMemoryComesLaterIsDecidedBySizeWhereAllIsHereAndByTheAnnotation(t *testing.T) {
	for name, tc := range map[string]struct {
		where      string
		from       int // --lazy-restore-from
		annotation string
		lazy       bool
	}{
		"its own, much":                           {atHome, enoughFor, "", true},
		"its own, much, auto":                     {atHome, enoughFor, "auto", true},
		"its own, much, not wanted":               {atHome, enoughFor, "eager", false},
		"its own, little":                         {atHome, lessThan, "", false},
		"its own, little, asked for":              {atHome, lessThan, "lazy", true},
		"its own, never by size":                  {atHome, 0, "", false},
		"its own, never by size, asked for":       {atHome, 0, "lazy", true},
		"a whole copy, much":                      {copied, enoughFor, "", true},
		"a whole copy, much, not wanted":          {copied, enoughFor, "eager", false},
		"a whole copy, little":                    {copied, lessThan, "", false},
		"a whole copy, little, asked for":         {copied, lessThan, "lazy", true},
		"on another node, much, not wanted":       {notHere, enoughFor, "eager", false},
		"on another node, little":                 {notHere, lessThan, "", false},
		"on another node, little, asked for":      {notHere, lessThan, "lazy", true},
		"on another node, never by size, but yes": {notHere, 0, "lazy", true},
		// All comes first; then it is here, and much.
		"on another node, much":       {notHere, enoughFor, "", true},
		"on another node, much, auto": {notHere, enoughFor, "auto", true},
	} {
		t.Run(name, func(t *testing.T) {
			e := memoryElsewhere(t)
			pcp := readyCheckpoint()
			pcp.Status.NodeName, pcp.Status.ManifestDigest, pcp.Status.Requires = "node-2", e.digest, needsOf("avx")
			if tc.where == atHome {
				pcp.Status.NodeName = testNode
			}
			sandbox := restoringSandbox()
			pod := restoringPod(func(p *corev1.Pod) {
				if tc.annotation != "" {
					p.Annotations[v1alpha1.AnnotationRestoreMemory] = tc.annotation
					sandbox.Annotations[v1alpha1.AnnotationRestoreMemory] = tc.annotation
				}
			})
			slow := &slowMemory{}
			c, h := patientCopies(t, &fakeOrigin{dir: e.dir, open: slow.open}, pod, pcp)
			if err := slow.open(t.Context(), 0, memoryFile, eagerBlock*checkpoint.BlockSize); err != nil { // makes it
				t.Fatal(err)
			}
			early := make(chan bool, 1) // whether a Pod could be restored when all that was missing was memory
			awaits := tc.where == notHere && tc.annotation != "lazy"
			switch {
			case tc.where == atHome:
				if err := os.CopyFS(filepath.Join(h.dir, dataOfCP), os.DirFS(e.dir)); err != nil {
					t.Fatal(err)
				}
			case tc.where == copied:
				slow.letThrough()
				if _, _, err := c.need(t.Context(), pcp, pod, pages.ModeEager); err != nil {
					t.Fatal(err)
				}
			case awaits:
				go func() {
					slow.awaitAsked(t, 0)
					_, err := os.Lstat(h.store.earlyPath(pcpUID))
					early <- err == nil
					slow.letThrough()
				}()
			}
			metrics := NewMetrics(prometheus.NewRegistry())
			o := &observer{store: h.store, metrics: metrics, log: slog.New(slog.DiscardHandler), now: time.Now}
			o.connect(h.recorder, h.ops.marker, nil, c)
			s, err := restoring.New(restoring.Config{
				StateDir: t.TempDir(), ImagesDir: t.TempDir(), Memory: restoring.Memory{Policy: Options{LazyThreshold: tc.from}.lazyPolicy()},
				Resolver: &resolver{nodeName: testNode, live: h.client, store: h.store, copies: c, marker: h.ops.marker, platform: thisPlatform()},
				Observer: o, Compatibility: anyEngine{}, Now: time.Now, Log: slog.New(slog.DiscardHandler),
			})
			if err != nil {
				t.Fatal(err)
			}
			if r := s.Handle(t.Context(), nodeapi.Request{CreateSandbox: &nodeapi.CreateSandbox{Sandbox: sandbox}}); r.Error != nil {
				t.Fatal(r.Error)
			}
			r := s.Handle(t.Context(), nodeapi.Request{CreateContainer: &nodeapi.CreateContainer{Sandbox: sandbox, Container: "a"}})
			if r.Error != nil || r.Container.Lazy != tc.lazy {
				t.Errorf("lazy: %v, want %v (%v)", r.Container != nil && r.Container.Lazy, tc.lazy, r.Error)
			}
			if awaits && <-early {
				t.Error("who did not ask for it depends on another node")
			}
			if needs := v1alpha1.AwaitsMemory(h.podNamed("again")); needs != (tc.where == notHere && tc.annotation == "lazy") {
				t.Errorf("it awaits memory of another node: %v", needs)
			}
		})
	}
	if flag := NewCommand(io.Discard).Flags().Lookup("lazy-restore-from"); flag.DefValue != "256" {
		t.Errorf("by default it is %s MiB", flag.DefValue)
	}
}
