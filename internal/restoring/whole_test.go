package restoring_test

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/restoring"
)

// createBy asks as a program does that restores checkpoints of an engine.
func createBy(s *restoring.Sessions, engine string) nodeapi.Response {
	return s.Handle(context.Background(), nodeapi.Request{CreateSandbox: &nodeapi.CreateSandbox{Sandbox: fromC1, Engine: engine, EngineAnnotations: map[string]string{"a": "b"}}})
}

func TestASandboxThatIsRestoredAsAWholeIsToldItsImagesAndItsContainersTheirFiles(t *testing.T) {
	f := &fakes{source: dataOf(t, "whole")}
	state := t.TempDir()
	s := newSessions(t, f, state)
	r := createBy(s, "whole")
	if r.Error != nil || r.Action != nodeapi.ActionRestore || r.Whole == nil {
		t.Fatalf("%+v", r)
	}
	if r.Whole.ImageDir != state+"-images/s1/.sandbox" || !slices.Equal(f.adaptedWhole, []string{f.source.Dir + " b"}) || !slices.Equal(r.Whole.Containers, []string{"a", "b"}) {
		t.Errorf("%+v", r.Whole)
	}
	a := container(s, "a")
	if a.Error != nil || a.Action != nodeapi.ActionRestore {
		t.Fatalf("%+v", a)
	}
	if c := a.Container; c.ImageDir != "" || c.WorkDir == "" || len(c.Volumes) != 1 || c.Identity.Container != "a" || c.Identity.PodIP != "10.0.0.7" {
		t.Errorf("%+v", c)
	}
	if len(f.adapted) != 0 {
		t.Error("images of a container were adapted that there are not")
	}
	report(t, s, "a", nodeapi.StageCreated)
	if b := container(s, "b"); b.Error != nil || len(b.Container.Volumes) != 0 {
		t.Errorf("%+v: the volume has been filled for a", b)
	}
	if _, err := os.Stat(r.Whole.ImageDir); err != nil {
		t.Error(err)
	}
	report(t, s, "a", nodeapi.StageStarted)
	report(t, s, "b", nodeapi.StageStarted)
	if err := s.Reconcile(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(r.Whole.ImageDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the adapted images of a sandbox that runs: %v", err)
	}
}

func TestASandboxThatIsRestoredAsAWholeRunsBeforeItsMemoryIsInPlaceUnlessItsPodSaysOtherwise(t *testing.T) {
	for mode, background := range map[string]bool{"": true, "auto": true, "lazy": true, "eager": false} {
		t.Run(mode, func(t *testing.T) {
			from := fromC1
			from.Annotations = maps.Clone(from.Annotations)
			from.Annotations[nodeapi.AnnotationPrefix+"restore-memory"] = mode
			s := newSessions(t, &fakes{source: dataOf(t, "whole")}, t.TempDir())
			r := s.Handle(t.Context(), nodeapi.Request{CreateSandbox: &nodeapi.CreateSandbox{Sandbox: from, Engine: "whole"}})
			if r.Error != nil || r.Whole == nil || r.Whole.Background != background {
				t.Errorf("%+v", r)
			}
		})
	}
}

func TestASandboxWhoseImagesCannotBeAdaptedIsRefusedAndForgotten(t *testing.T) {
	f := &fakes{source: dataOf(t, "whole"), unadaptable: errors.New("not these")}
	s := newSessions(t, f, t.TempDir())
	if r := createBy(s, "whole"); r.Error == nil || !strings.Contains(r.Error.Message, "not these") {
		t.Errorf("%+v", r)
	}
	if dirs, err := s.InUse(); err != nil || len(dirs) != 0 {
		t.Errorf("in use are %v, %v", dirs, err)
	}
}

func TestACheckpointOfAnotherEngineThanTheHandlersIsRefused(t *testing.T) {
	for _, tc := range []struct{ of, handler string }{{"whole", ""}, {"criu", "whole"}} {
		f := &fakes{source: dataOf(t, tc.of)}
		r := createBy(newSessions(t, f, t.TempDir()), tc.handler)
		if r.Error == nil || !strings.Contains(r.Error.Message, "the checkpoint is of the engine "+tc.of) {
			t.Errorf("of %q by %q: %+v", tc.of, tc.handler, r)
		}
	}
}

func TestWhatTheKubeletWouldWaitForKeepsASandboxFromBeingRestoredAsAWhole(t *testing.T) {
	f := &fakes{source: dataOf(t, "whole")}
	f.source.HoldUp = []string{"the sidecar probed has a startup probe"}
	r := createBy(newSessions(t, f, t.TempDir()), "whole")
	if r.Error == nil || !strings.Contains(r.Error.Message, "the sidecar probed has a startup probe, which the kubelet waits for") {
		t.Errorf("%+v", r)
	}
	f.source.HoldUp, f.source.CompletedInit = nil, []string{"prepare"}
	s := newSessions(t, f, t.TempDir())
	if r := createBy(s, "whole"); r.Error != nil {
		t.Fatalf("%+v", r)
	}
	if r := container(s, "prepare"); r.Action != nodeapi.ActionCompleted {
		t.Errorf("the init container: %+v", r)
	}
}

func TestTheFailedRestoreOfAWholeSandboxIsTold(t *testing.T) {
	f := &fakes{source: dataOf(t, "whole")}
	s := newSessions(t, f, t.TempDir())
	createBy(s, "whole")
	report(t, s, "", nodeapi.StageFailed)
	if !slices.Contains(f.told, "failed  RestoreFailed why") {
		t.Errorf("told %q", f.told)
	}
}
