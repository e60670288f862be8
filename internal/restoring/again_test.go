package restoring_test

import (
	"context"
	"errors"
	"os"
	"slices"
	"testing"

	"podstasis.dev/stasis/internal/nodeapi"
)

func TestAContainerWhoseStartFailedAfterItWasLetGoIsRestoredAgain(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	first := container(s, "a")
	comesTo(t, first, nodeapi.StageStarted)
	f.startUnknown = errors.New("no container runtime")
	if r := container(s, "a"); r.Error == nil {
		t.Errorf("while nobody knows whether it was started: %+v", r)
	}
	f.startUnknown = nil
	if r := container(s, "a"); r.Action != nodeapi.ActionOrdinary {
		t.Errorf("it was started, and is to be %q", r.Action)
	}
	f.startFailed = []string{"a-1"}
	r := container(s, "a")
	if r.Action != nodeapi.ActionRestore || len(r.Container.Volumes) != len(first.Container.Volumes) {
		t.Errorf("its start failed: %+v, at first %+v", r, first)
	}
	if inUse(t, s) != 1 {
		t.Error("its data are not in use")
	}
	f.startFailed = nil
	comesTo(t, r, nodeapi.StageStarted)
	comesTo(t, container(s, "b"), nodeapi.StageStarted)
	reconcile(t, s)
	if !slices.Contains(f.told, "succeeded") {
		t.Errorf("the observer was told %v", f.told)
	}
}

func TestAContainerWhoseStartFailedBesideOthersStartsAnew(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	comesTo(t, container(s, "a"), nodeapi.StageStarted)
	comesTo(t, container(s, "b"), nodeapi.StageCreated)
	f.startFailed = []string{"a-1"}
	if r := container(s, "a"); r.Action != nodeapi.ActionOrdinary {
		t.Errorf("b is restored already, and a is to be %q", r.Action)
	}
}

func TestAContainerWhoseStartFailedStartsAnewWhereTheDataAreGone(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	comesTo(t, container(s, "a"), nodeapi.StageStarted)
	f.startFailed = []string{"a-1"}
	source, err := f.Resolve(context.Background(), fromC1)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(source.Dir); err != nil {
		t.Fatal(err)
	}
	if r := container(s, "a"); r.Action != nodeapi.ActionOrdinary {
		t.Errorf("without its data it is to be %+v", r)
	}
}

// The container's record is brought in step with the node at any moment, also in this.
func TestAContainerThatIsRestoredAgainIsNotTakenForTheOneBefore(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	b := container(s, "b")
	comesTo(t, b, nodeapi.StageStarting)
	f.startFailed = []string{"b-1"}
	// b is found to have been let go, by a look that lasts until it is made again.
	var again nodeapi.Response
	f.look = func(string, string) error {
		f.look = nil
		comesTo(t, b, nodeapi.StageStarted)
		again = container(s, "b")
		comesTo(t, b, nodeapi.StageStarted) // what the look says was found before
		return nil
	}
	reconcile(t, s)
	if again.Action != nodeapi.ActionRestore {
		t.Fatalf("its start failed: %+v", again)
	}
	comesTo(t, again, nodeapi.StageCreated)
	f.startFailed = nil
	if r := container(s, "b"); r.Action != nodeapi.ActionRestore {
		t.Errorf("it waits to be let go, and is to be %q", r.Action)
	}
}
