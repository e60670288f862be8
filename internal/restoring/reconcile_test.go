package restoring_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/restoring"
)

// These tests are of what becomes of restores whose reports are lost: nothing is
// reported, the containers' progress is where stasis-runtime keeps it.

// comesTo keeps a container's progress as stasis-runtime does.
func comesTo(t *testing.T, r nodeapi.Response, stage nodeapi.ReportStage) {
	t.Helper()
	if r.Container == nil {
		t.Fatalf("nothing to restore: %+v", r)
	}
	name := filepath.Base(r.Container.WorkDir)
	if err := nodeapi.WriteProgress(r.Container.WorkDir, nodeapi.Progress{ContainerID: name + "-1", Root: "/root", Stage: stage}); err != nil {
		t.Fatal(err)
	}
}

func reconcile(t *testing.T, s *restoring.Sessions) {
	t.Helper()
	if err := s.Reconcile(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func inUse(t *testing.T, s *restoring.Sessions) int {
	t.Helper()
	dirs, err := s.InUse()
	if err != nil {
		t.Fatal(err)
	}
	return len(dirs)
}

func TestWhatAKilledAgentHadHalfWrittenGoes(t *testing.T) {
	state := t.TempDir()
	for _, name := range []string{".tmp-1", "other"} {
		if err := os.WriteFile(filepath.Join(state, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	newSessions(t, &fakes{source: data(t)}, state)
	if left, err := os.ReadDir(state); err != nil || len(left) != 1 || left[0].Name() != "other" {
		t.Errorf("left are %v, %v", left, err)
	}
}

func TestARestoreWhoseReportsAreLostIsFoundCompleteAndToldOnce(t *testing.T) {
	f := &fakes{source: data(t)}
	state := t.TempDir()
	s := newSessions(t, f, state)
	create(s, fromC1)
	a, b := container(s, "a"), container(s, "b")
	comesTo(t, a, nodeapi.StageStarted)
	comesTo(t, b, nodeapi.StageCreated)
	reconcile(t, s)
	if slices.Contains(f.told, "succeeded") || inUse(t, s) != 1 {
		t.Errorf("before container b was let go: told %v, %d in use", f.told, inUse(t, s))
	}
	comesTo(t, b, nodeapi.StageStarted)

	s = newSessions(t, f, state) // another agent
	f.unheard = errors.New("no API server")
	if err := s.Reconcile(context.Background()); !errors.Is(err, f.unheard) {
		t.Errorf("it is not said that nobody heard: %v", err)
	}
	if !slices.Contains(f.remembered, "s1") || inUse(t, s) != 0 {
		t.Errorf("without the API server: remembered %v, %d in use", f.remembered, inUse(t, s))
	}
	f.unheard = nil
	reconcile(t, s)
	reconcile(t, s)
	reconcile(t, newSessions(t, f, state))
	if !slices.Equal(f.told, []string{"began", "succeeded"}) {
		t.Errorf("the observer was told %v", f.told)
	}
}

func TestAContainerWhoseStartNobodyHeardOfStartsAnewAndIsNotRestoredAgain(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	comesTo(t, container(s, "a"), nodeapi.StageStarted)
	if r := container(s, "a"); r.Action != nodeapi.ActionOrdinary {
		t.Errorf("it is answered %+v", r)
	}
}

func TestAContainerWhoseStartWasInterruptedIsRestoredAgainOnlyIfItHasNotRun(t *testing.T) {
	for name, c := range map[string]struct {
		found nodeapi.ReportStage
		want  nodeapi.Action
	}{
		"it stood still": {nodeapi.StageCreated, nodeapi.ActionRestore},
		"it ran":         {nodeapi.StageStarted, nodeapi.ActionOrdinary},
		"nobody knows":   {nodeapi.StageStarting, ""},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fakes{source: data(t)}
			s := newSessions(t, f, t.TempDir())
			create(s, fromC1)
			a := container(s, "a")
			comesTo(t, a, nodeapi.StageStarting)
			f.look = func(string, string) error {
				comesTo(t, a, c.found)
				return nil
			}
			r := container(s, "a")
			if r.Action != c.want || (r.Error != nil) != (c.want == "") {
				t.Errorf("it is answered %+v", r)
			}
			if !slices.Equal(f.looked, []string{"/root a-1"}) {
				t.Errorf("looked at %v", f.looked)
			}
			if failed := slices.ContainsFunc(f.told, func(s string) bool { return strings.HasPrefix(s, "failed a RestoreFailed nobody knows") }); failed != (c.want == "") {
				t.Errorf("the observer was told %v", f.told)
			}
		})
	}
}

// Container a is there, with the volume's files open, though nobody has heard.
func TestAVolumeIsFilledByOneContainerAloneThoughItsReportIsLost(t *testing.T) {
	f := &fakes{source: data(t)}
	state := t.TempDir()
	s := newSessions(t, f, state)
	create(s, fromC1)
	a := container(s, "a")
	if len(a.Container.Volumes) != 1 {
		t.Fatalf("container a fills %+v", a.Container.Volumes)
	}
	// As long as it is not there it has nothing open: stasis-runtime makes one after the other.
	if b := container(s, "b"); len(b.Container.Volumes) != 1 {
		t.Errorf("after container a came to nothing container b fills %+v", b.Container.Volumes)
	}
	comesTo(t, a, nodeapi.StageCreated)
	s = newSessions(t, f, state) // the agent was killed, and with it the report of container a
	if b := container(s, "b"); len(b.Container.Volumes) != 0 {
		t.Errorf("container b fills what a has open: %+v", b.Container.Volumes)
	}
	if a := container(s, "a"); len(a.Container.Volumes) != 0 {
		t.Errorf("container a, tried again, fills %+v", a.Container.Volumes)
	}
}

func TestASandboxThatIsGoneKeepsNothingInUseThoughNobodySaysSo(t *testing.T) {
	begin := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	set := func(f *fakes, after time.Duration, err error, up ...string) {
		f.now, f.noCRI, f.up = begin.Add(after), err, map[string]bool{}
		for _, id := range up {
			f.up[id] = true
		}
		if err != nil {
			f.up = nil
		}
	}
	for name, c := range map[string]struct {
		meanwhile func(f *fakes, reconcile func())
		container bool // asked for before
		gone      bool
	}{
		"it was up and is not any more": {func(f *fakes, reconcile func()) {
			set(f, time.Second, nil, "s1")
			reconcile()
			set(f, 2*time.Second, nil, "other")
			reconcile()
		}, false, true},
		"it had a container, and is not up any more": {func(f *fakes, reconcile func()) {
			set(f, time.Second, nil)
			reconcile()
		}, true, true},
		"it is up": {func(f *fakes, reconcile func()) {
			set(f, time.Hour, nil, "s1")
			reconcile()
		}, false, false},
		"it is being made": {func(f *fakes, reconcile func()) {
			set(f, time.Minute, nil)
			reconcile()
		}, false, false},
		"it was never made": {func(f *fakes, reconcile func()) {
			set(f, time.Hour, nil)
			reconcile()
		}, false, true},
		"the container runtime does not answer": {func(f *fakes, reconcile func()) {
			set(f, time.Second, nil, "s1")
			reconcile()
			set(f, time.Hour, errors.New("containerd is being restarted"))
			reconcile()
		}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := &fakes{source: data(t), now: begin}
			state := t.TempDir()
			s := newSessions(t, f, state)
			create(s, fromC1)
			if c.container {
				container(s, "a")
			}
			c.meanwhile(f, func() {
				if err := s.Reconcile(context.Background()); !errors.Is(err, f.noCRI) {
					t.Error(err)
				}
			})
			left, err := os.ReadDir(state)
			if err != nil || (len(left) == 0) != c.gone || (inUse(t, s) == 0) != c.gone {
				t.Errorf("left %v, %d in use (%v)", left, inUse(t, s), err)
			}
			successor := sandbox("restore-from", "c1")
			successor.ID, successor.UID = "s2", "u2"
			if r := create(s, successor); (r.Error == nil) != c.gone {
				t.Errorf("the next Pod of that name: %+v", r)
			}
		})
	}
}

// The sandbox may end, and its Pod have another, before the agent has heard of any
// of it.
func TestAPodThatWasRestoredInASandboxThatIsGoneIsRememberedBeforeItsNextOneIsDecidedOn(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	for _, name := range []string{"a", "b"} {
		comesTo(t, container(s, name), nodeapi.StageStarted)
	}
	again := sandbox("restore-from", "c1")
	again.ID = "s2"
	f.refusal = errors.New("asked")
	create(s, again)
	if !slices.Equal(f.remembered, []string{"s1"}) {
		t.Errorf("remembered %v", f.remembered)
	}
	f.refusal, f.source = nil, restoring.Source{Ordinary: true}
	if r := create(s, again); r.Action != nodeapi.ActionOrdinary {
		t.Errorf("the next sandbox: %+v", r)
	}
	f.up = map[string]bool{"s2": true}
	reconcile(t, s)
	if !slices.Contains(f.told, "succeeded") {
		t.Errorf("the observer was told %v", f.told)
	}
}

func TestADeletedSandboxIsForgottenWhenItsSuccessIsTold(t *testing.T) {
	f := &fakes{source: data(t), unheard: errors.New("no API server")}
	state := t.TempDir()
	s := newSessions(t, f, state)
	create(s, fromC1)
	for _, name := range []string{"a", "b"} {
		comesTo(t, container(s, name), nodeapi.StageStarted)
	}
	r := s.Handle(context.Background(), nodeapi.Request{Report: &nodeapi.Report{Sandbox: fromC1, Stage: nodeapi.StageDeleted}})
	if r.Error != nil {
		t.Fatal(r.Error)
	}
	if err := s.Reconcile(context.Background()); err == nil {
		t.Error("it was told to nobody")
	}
	f.unheard = nil
	reconcile(t, s)
	if left, _ := os.ReadDir(state); len(left) != 0 || !slices.Equal(f.told, []string{"began", "succeeded"}) {
		t.Errorf("left %v, told %v", left, f.told)
	}
}

func TestATurnOutlivesTheAgentUntilTheRestoreIsFoundToBeOver(t *testing.T) {
	successor := sandbox("restore-from", "c1")
	successor.ID, successor.UID = "s2", "u2"
	for how, over := range map[string]func(*testing.T, *fakes, []nodeapi.Response){
		"complete": func(t *testing.T, _ *fakes, containers []nodeapi.Response) {
			for _, c := range containers {
				comesTo(t, c, nodeapi.StageStarted)
			}
		},
		"gone": func(_ *testing.T, f *fakes, _ []nodeapi.Response) { f.up = map[string]bool{} },
	} {
		t.Run(how, func(t *testing.T) {
			f := &fakes{source: data(t)}
			state := t.TempDir()
			s := newSessions(t, f, state)
			create(s, fromC1)
			containers := []nodeapi.Response{container(s, "a"), container(s, "b")}
			s = newSessions(t, f, state)
			if r := create(s, successor); r.Error == nil || r.Error.Reason != "RestoreInProgress" {
				t.Fatalf("the successor while the first restores: %+v", r)
			}
			over(t, f, containers)
			reconcile(t, s)
			if r := create(s, successor); r.Action != nodeapi.ActionRestore {
				t.Errorf("the successor after it: %+v", r)
			}
		})
	}
}
