package build

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func builder(t *testing.T) Builder {
	return Builder{Root: "../../../..", Cache: t.TempDir(), Say: t.Logf}
}

func TestWhatIsBuiltOnceIsNotBuiltAgainUntilItsSourcesChange(t *testing.T) {
	b := builder(t)
	source := filepath.Join(t.TempDir(), "source")
	made := 0
	build := func() string {
		t.Helper()
		dir, err := b.once(t.Context(), "thing", "a thing", "", keyOf{files: []string{source}}, func(dir string) error {
			made++
			return os.WriteFile(filepath.Join(dir, "result"), nil, 0o644)
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, "result")); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(source, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("one")
	first := build()
	if again := build(); again != first || made != 1 {
		t.Errorf("built %d times, in %s and %s", made, first, again)
	}
	write("two")
	if build() == first || made != 2 {
		t.Error("not built again after a change")
	}
}

func TestOfSeveralBuildersOneBuildsAndTheOthersWait(t *testing.T) {
	b := builder(t)
	var made atomic.Int32
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if _, err := b.once(t.Context(), "thing", "a thing", "", keyOf{}, func(string) error {
				made.Add(1)
				time.Sleep(50 * time.Millisecond)
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if made.Load() != 1 {
		t.Errorf("built %d times", made.Load())
	}
}

func TestAFailedBuildLeavesNothing(t *testing.T) {
	b := builder(t)
	failed := errors.New("failed")
	if _, err := b.once(t.Context(), "thing", "a thing", "", keyOf{}, func(string) error { return failed }); !errors.Is(err, failed) {
		t.Errorf("error %v", err)
	}
	left, err := filepath.Glob(filepath.Join(b.Cache, "devcluster", "thing.tmp-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	made := false
	if _, err := b.once(t.Context(), "thing", "a thing", "", keyOf{}, func(string) error { made = true; return nil }); err != nil || !made {
		t.Errorf("after a failed build: %v, built %v", err, made)
	}
}

func TestWaitingForAnotherBuildEndsWithTheContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := lock(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

func TestVersionsAreThoseOfTheModules(t *testing.T) {
	b := builder(t)
	for module, want := range map[string]map[string]string{
		"kube":       {"k8s.io/kubernetes": Pinned.Kubernetes},
		"containerd": {"github.com/containerd/containerd/v2": Pinned.Containerd, "github.com/opencontainers/runc": Pinned.Runc},
		"gvisor":     {"gvisor.dev/gvisor": GVisor},
	} {
		text, err := os.ReadFile(b.source(module, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		for path, version := range want {
			if !regexp.MustCompile(`(?m)^\s*(require )?` + regexp.QuoteMeta(path+" "+version) + `( // indirect)?$`).Match(text) {
				t.Errorf("%s of %s is not at %s", path, module, version)
			}
		}
	}
}

func TestWhatWasBuiltElsewhereIsReadAsItWasTold(t *testing.T) {
	want := Binaries{Kube: "/a/kube", Runtime: "/b", CRIU: "/c/criu", Images: []string{"/d/pause.tar"}}
	text, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "built.json")
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(file); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("read as %+v, %v", got, err)
	}
	if _, err := Read(file + ".not"); err == nil {
		t.Error("a file that is not there is read")
	}
}
