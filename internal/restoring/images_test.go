package restoring_test

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"podstasis.dev/stasis/internal/nodeapi"
)

// imagesIn lists whose adapted images are there.
func imagesIn(t *testing.T, state string) []string {
	t.Helper()
	found, err := filepath.Glob(state + "-images/*/*")
	if err != nil {
		t.Fatal(err)
	}
	for i := range found {
		found[i] = strings.TrimPrefix(found[i], state+"-images/")
	}
	return found
}

// makeImages stands in for the engine that writes them.
func makeImages(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
}

func TestImagesAreAdaptedToWhatIsThereAndToThePodsAddresses(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	address := netip.MustParseAddr("10.0.0.9")
	for _, name := range []string{"a", "b"} {
		r := s.Handle(context.Background(), nodeapi.Request{CreateContainer: &nodeapi.CreateContainer{
			Sandbox: fromC1, Container: name, ContainerID: name, Addresses: []netip.Addr{address}, Privileges: &nodeapi.Privileges{},
		}})
		if r.Error != nil {
			t.Fatal(r.Error)
		}
		report(t, s, name, nodeapi.StageCreated)
	}
	if a := f.adapted[0]; a.Container != "a" || len(a.Created) != 0 || len(a.ImageDirs) != 2 || !slices.Equal(a.Is, []netip.Addr{address}) {
		t.Errorf("the first was adapted to %+v", a)
	}
	if b := f.adapted[1]; b.Container != "b" || !slices.Equal(b.Created, []string{"a"}) {
		t.Errorf("the second was adapted to %+v", b)
	}
}

func TestAdaptedImagesGoWhenTheirContainerHasComeToSomething(t *testing.T) {
	f := &fakes{source: data(t)}
	state := t.TempDir()
	s := newSessions(t, f, state)
	create(s, fromC1)
	for _, name := range []string{"a", "b"} {
		makeImages(t, container(s, name).Container.ImageDir)
	}
	report(t, s, "a", nodeapi.StageFailed)
	if left := imagesIn(t, state); !slices.Equal(left, []string{"s1/b"}) {
		t.Errorf("when a had failed there was %q", left)
	}
	report(t, s, "b", nodeapi.StageCreated)
	if left := imagesIn(t, state); len(left) != 0 {
		t.Errorf("when b was there, there was %q", left)
	}

	// Whose report was lost goes with its sandbox, or is found to be nobody's.
	makeImages(t, container(s, "a").Container.ImageDir)
	makeImages(t, state+"-images/of-before/x")
	s = newSessions(t, f, state)
	if left := imagesIn(t, state); !slices.Equal(left, []string{"s1/a"}) {
		t.Errorf("after a start there was %q", left)
	}
	f.up = map[string]bool{}
	if err := s.Reconcile(context.Background()); err != nil {
		t.Fatal(err)
	}
	if left := imagesIn(t, state); len(left) != 0 {
		t.Errorf("without the sandbox there was %q", left)
	}
}

// Reports come, and records are brought in step with the node, while others are made.
func TestImagesOfASandboxStayWhileOthersOfItAreBeingMade(t *testing.T) {
	f := &fakes{source: data(t)}
	state := t.TempDir()
	s := newSessions(t, f, state)
	create(s, fromC1)
	makeImages(t, container(s, "a").Container.ImageDir)
	report(t, s, "a", nodeapi.StageCreated)
	var parent error
	f.adapt = func(dir string) {
		makeImages(t, filepath.Dir(dir))
		reconcile(t, s)
		report(t, s, "a", nodeapi.StageStarted)
		_, parent = os.Stat(filepath.Dir(dir))
		makeImages(t, dir)
		reconcile(t, s)
	}
	container(s, "b")
	if left := imagesIn(t, state); parent != nil || !slices.Equal(left, []string{"s1/b"}) {
		t.Errorf("when those of b are made there is %q, %v", left, parent)
	}
	report(t, s, "b", nodeapi.StageCreated)
	if left := imagesIn(t, state); len(left) != 0 {
		t.Errorf("when b was there, there was %q", left)
	}
}

func TestImagesThatCannotBeAdaptedAreNotRestored(t *testing.T) {
	f := &fakes{source: data(t), unadaptable: errors.New("not a CRIU image")}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	r := container(s, "a")
	if r.Error == nil || r.Action != "" || !strings.Contains(r.Error.Message, "not a CRIU image") {
		t.Errorf("the answer is %+v", r)
	}
	if !slices.ContainsFunc(f.told, func(what string) bool { return strings.Contains(what, "not a CRIU image") }) {
		t.Errorf("told was %q", f.told)
	}
}
