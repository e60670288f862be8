package restoring_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents/images"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages/lazy"
	"podstasis.dev/stasis/internal/pages/pagestest"
	"podstasis.dev/stasis/internal/restoring"
)

// partial is a checkpoint of containers a and b, of which memory is still to come.
func partial(t *testing.T) restoring.Source {
	t.Helper()
	dir := t.TempDir()
	const count = 40 // pages: more than a block
	for _, name := range []string{"a", "b"} {
		criu := filepath.Join(dir, "containers", name, "criu")
		if err := errors.Join(os.MkdirAll(criu, 0o700),
			os.WriteFile(filepath.Join(criu, "pages-1.img"), bytes.Repeat([]byte{1}, count*images.PageSize), 0o600),
			os.WriteFile(filepath.Join(criu, "pagemap-1.img"), pagestest.Map(t, 1, pagestest.Run{At: 0x10000, Pages: count, Flags: pagestest.Present | pagestest.Lazy}), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	digest, err := checkpoint.Seal(context.Background(), dir, &checkpoint.Manifest{
		Engine: checkpoint.Program{Name: "criu", Version: "1"}, Containers: []checkpoint.Container{{Name: "a"}, {Name: "b"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return restoring.Source{Dir: dir, ManifestDigest: digest, Partial: true}
}

// given keeps how far a container's memory has come, as who gives it does. It is given as
// long as somebody holds the lock.
func given(t *testing.T, r nodeapi.Response, stage lazy.Stage) (stop func()) {
	t.Helper()
	dir := r.Container.WorkDir
	text, err := json.Marshal(lazy.Status{ContainerID: filepath.Base(dir) + "-1", Stage: stage, Message: "gone"})
	if err != nil {
		t.Fatal(err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "memory.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err := errors.Join(err, os.WriteFile(filepath.Join(dir, "memory.json"), text, 0o600)); err != nil {
		t.Fatal(err)
	}
	if stage == lazy.StageServing {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() { lock.Close() }
}

// P29, X5.
func TestThatNoMemoryIsToComeAnyMoreIsToldWhenItIsSoForAllContainersAndOnce(t *testing.T) {
	for name, c := range map[string]struct {
		b    lazy.Stage
		want string
	}{
		"all is there":     {lazy.StageComplete, "memory ended "},
		"some was lost":    {lazy.StageLost, "memory ended b"},
		"b was given none": {"", "memory ended "},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fakes{source: partial(t)}
			state := t.TempDir()
			s := newSessions(t, f, state)
			if r := create(s, fromC1); r.Error != nil {
				t.Fatal(r.Error)
			}
			a, b := container(s, "a"), container(s, "b")
			ended := func() bool {
				return slices.ContainsFunc(f.told, func(told string) bool { return strings.HasPrefix(told, "memory ended") })
			}
			stopA := given(t, a, lazy.StageServing)
			comesTo(t, a, nodeapi.StageStarted)
			if c.b != "" {
				given(t, b, c.b)()
			}
			reconcile(t, s)
			if ended() {
				t.Fatalf("b has not been let go, told %v", f.told)
			}
			comesTo(t, b, nodeapi.StageStarted)
			reconcile(t, s)
			if users, err := s.Users(f.source.Dir); err != nil || len(users) != 1 || !users[0].Restored || users[0].Sandbox.ID != "s1" || ended() {
				t.Fatalf("a is given its memory, %+v need it (%v), told %v", users, err, f.told)
			}
			stopA()
			given(t, a, lazy.StageComplete)()
			f.unheard = errors.New("the API server is away")
			if err := s.Reconcile(t.Context()); !errors.Is(err, f.unheard) {
				t.Errorf("nobody heard of it: %v", err)
			}
			f.unheard = nil
			s = newSessions(t, f, state) // the next agent
			reconcile(t, s)
			reconcile(t, s)
			if n := len(slices.DeleteFunc(f.told, func(told string) bool { return told != c.want })); n != 1 || inUse(t, s) != 0 {
				t.Errorf("told %d times, %d in use", n, inUse(t, s))
			}
		})
	}
}

func TestADirectoryIsNeededByTheSandboxesThatAreRestoredFromIt(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	if users, err := s.Users(f.source.Dir); err != nil || len(users) != 1 || users[0].Restored || users[0].Sandbox.Name != "pod" {
		t.Errorf("%+v, %v", users, err)
	}
	if users, err := s.Users(t.TempDir()); err != nil || len(users) > 0 {
		t.Errorf("another directory: %+v, %v", users, err)
	}
}
