package restoring_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/restoring"
)

// much is a checkpoint of containers a and b of which a has so many MiB of memory that it
// is checked beside its restore. alter turns a bit of it, and back.
func much(t *testing.T, engine string, mib int64) (source restoring.Source, alter func()) {
	t.Helper()
	dir := t.TempDir()
	file := dir + "/containers/a/criu/pages-1.img"
	err := errors.Join(os.MkdirAll(dir+"/containers/a/criu", 0o700), os.WriteFile(file, nil, 0o600), os.Truncate(file, mib<<20),
		os.MkdirAll(dir+"/containers/b/criu", 0o700), os.WriteFile(dir+"/containers/b/criu/core-1.img", []byte("b"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	digest, err := checkpoint.Seal(context.Background(), dir, &checkpoint.Manifest{
		Engine: checkpoint.Program{Name: engine, Version: "1"}, Containers: []checkpoint.Container{{Name: "a"}, {Name: "b"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return restoring.Source{Dir: dir, ManifestDigest: digest}, func() {
		t.Helper()
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		var b [1]byte
		_, err = f.ReadAt(b[:], 64<<20)
		b[0] ^= 1
		if _, writeErr := f.WriteAt(b[:], 64<<20); errors.Join(err, writeErr) != nil {
			t.Fatal(err, writeErr)
		}
	}
}

// asking is a container's create by who asks whether its memory has been checked.
func asking(s *restoring.Sessions, name string, asks bool) nodeapi.Response {
	return s.Handle(context.Background(), nodeapi.Request{CreateContainer: &nodeapi.CreateContainer{Sandbox: fromC1, Container: name, AsksChecked: asks}})
}

func checked(s *restoring.Sessions, name string) *nodeapi.Error {
	return s.Handle(context.Background(), nodeapi.Request{Checked: &nodeapi.Checked{Sandbox: fromC1, Container: name}}).Error
}

// P23.
func TestMemoryThatIsCheckedBesideItsRestoreLeavesNothingWhereItIsNotWhatWasWritten(t *testing.T) {
	var alter func()
	f := &fakes{}
	f.source, alter = much(t, "criu", 65)
	alter()
	state := t.TempDir()
	s := newSessions(t, f, state)
	if r := create(s, fromC1); r.Error != nil {
		t.Fatalf("the sandbox: %v", r.Error)
	}
	// Whoever cannot wait is told before. The one after that, and an agent that follows, look anew.
	if r := asking(s, "b", false); r.Error == nil || r.Error.Reason != "CheckpointDataCorrupt" {
		t.Errorf("b, which was not altered, is in one Pod with a: %+v", r)
	}
	for range 2 {
		if e := checked(s, "a"); e == nil || e.Reason != "CheckpointDataCorrupt" || !strings.Contains(e.Message, "pages-1.img") {
			t.Errorf("a: %v", e)
		}
		s = newSessions(t, f, state)
	}
	if len(f.told) != 4 || f.told[0] != "began" || !strings.HasPrefix(f.told[1], "failed b CheckpointDataCorrupt ") || !strings.HasPrefix(f.told[3], "failed a CheckpointDataCorrupt ") {
		t.Errorf("the observer was told %q", f.told)
	}
	alter()
	if r := asking(s, "a", false); r.Error != nil || r.Container == nil || r.Container.Unchecked {
		t.Errorf("as it was: %+v", r)
	}
	if e := checked(s, "a"); e != nil {
		t.Errorf("as it was: %v", e)
	}
	if err := os.RemoveAll(f.source.Dir + "/containers/a"); err != nil { // it is looked at once
		t.Fatal(err)
	}
	if e := checked(newSessions(t, f, state), "b"); e != nil {
		t.Errorf("it has been checked: %v", e)
	}
}

func TestARestoreDoesNotWaitForItsMemoryToBeChecked(t *testing.T) {
	f := &fakes{}
	f.source, _ = much(t, "criu", 256)
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	r := asking(s, "a", true)
	if r.Error != nil || r.Container == nil || r.Action != nodeapi.ActionRestore {
		t.Fatalf("a: %+v", r)
	}
	if !r.Container.Unchecked { // that takes a twentieth of a second
		t.Error("a was told of when its memory had been checked")
	}
	if e := checked(s, "a"); e != nil {
		t.Errorf("a: %v", e)
	}
	if r := asking(s, "b", true); r.Error != nil || r.Container.Unchecked {
		t.Errorf("b, after it: %+v", r)
	}
}

func TestASandboxThatGoesTakesItsCheckAlong(t *testing.T) {
	f := &fakes{}
	f.source, _ = much(t, "criu", 65)
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	report(t, s, "", nodeapi.StageDeleted)
	if e := checked(s, "a"); e == nil || e.Reason != "CheckpointDataMissing" {
		t.Errorf("got %v", e)
	}
}

func TestASandboxThatIsRestoredAsAWholeIsCheckedBeforeItBegins(t *testing.T) {
	var alter func()
	f := &fakes{}
	f.source, alter = much(t, "whole", 65)
	alter()
	s := newSessions(t, f, t.TempDir())
	r := s.Handle(context.Background(), nodeapi.Request{CreateSandbox: &nodeapi.CreateSandbox{Sandbox: fromC1, Engine: "whole"}})
	if r.Error == nil || r.Error.Reason != "CheckpointDataCorrupt" {
		t.Errorf("got %+v", r)
	}
}
