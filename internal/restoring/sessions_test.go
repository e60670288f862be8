package restoring_test

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages/lazy"
	"podstasis.dev/stasis/internal/restoring"
)

// fakes stand for the agent and the engine; the records and the checkpoint data
// are real files.
type fakes struct {
	source     restoring.Source
	refusal    error
	incompat   error
	exceeded   error
	told       []string
	resolvedBy []string
	remembered []string // sandboxes
	unheard    error    // of Succeeded
	restored   map[string]string

	up     map[string]bool // sandboxes
	noCRI  error
	look   func(root, containerID string) error
	looked []string
	now    time.Time

	adapted     []restoring.Adaptation
	adapt       func(dir string) // makes them
	unadaptable error

	adaptedWhole []string

	startFailed  []string // containers
	startUnknown error
}

func (f *fakes) Resolve(_ context.Context, s nodeapi.Sandbox) (restoring.Source, error) {
	f.resolvedBy = append(f.resolvedBy, s.ID)
	return f.source, f.refusal
}
func (f *fakes) CheckRestore(context.Context, *checkpoint.Manifest) error { return f.incompat }

func (f *fakes) Whole(m *checkpoint.Manifest) bool { return m.Engine.Name == "whole" }
func (f *fakes) AdaptWhole(_ context.Context, _ *checkpoint.Manifest, from string, to nodeapi.CreateSandbox, dir string) error {
	f.adaptedWhole = append(f.adaptedWhole, from+" "+to.EngineAnnotations["a"])
	return errors.Join(f.unadaptable, os.MkdirAll(dir, 0o700))
}
func (f *fakes) CheckPrivileges(context.Context, string, *nodeapi.Privileges) error {
	return f.exceeded
}
func (f *fakes) Adapt(_ context.Context, to restoring.Adaptation, dir string) (*nodeapi.ContainerRestore, error) {
	f.adapted = append(f.adapted, to)
	if f.adapt != nil {
		f.adapt(dir)
	}
	return &nodeapi.ContainerRestore{}, f.unadaptable
}

func (f *fakes) Refused(_ context.Context, _ nodeapi.Sandbox, e *nodeapi.Error) {
	f.told = append(f.told, "refused "+e.Reason)
}
func (f *fakes) Began(context.Context, nodeapi.Sandbox) { f.told = append(f.told, "began") }
func (f *fakes) Failed(_ context.Context, _ nodeapi.Sandbox, c string, e *nodeapi.Error) {
	f.told = append(f.told, "failed "+c+" "+e.Reason+" "+e.Message)
}
func (f *fakes) Remember(s nodeapi.Sandbox) error {
	f.remembered = append(f.remembered, s.ID)
	return nil
}
func (f *fakes) Succeeded(_ context.Context, _ nodeapi.Sandbox, containers map[string]string) error {
	f.restored = containers
	if f.unheard == nil {
		f.told = append(f.told, "succeeded")
	}
	return f.unheard
}
func (f *fakes) Memory(_ context.Context, _ nodeapi.Sandbox, container string, s lazy.Status) error {
	f.told = append(f.told, "memory of "+container+" "+string(s.Stage))
	return nil
}
func (f *fakes) MemoryEnded(_ context.Context, _ nodeapi.Sandbox, lost []string) error {
	if f.unheard == nil {
		f.told = append(f.told, "memory ended "+strings.Join(lost, ","))
	}
	return f.unheard
}
func (f *fakes) Kill(_ context.Context, root, containerID string) error {
	f.told = append(f.told, "kill "+root+" "+containerID)
	return nil
}
func (f *fakes) StartFailed(_ context.Context, _, containerID string) (bool, error) {
	return slices.Contains(f.startFailed, containerID), f.startUnknown
}

func (f *fakes) SandboxesUp(context.Context) (map[string]bool, error) {
	if f.up == nil && f.noCRI == nil {
		return map[string]bool{"s1": true}, nil
	}
	return f.up, f.noCRI
}
func (f *fakes) LookAtStart(_ context.Context, root, containerID string) error {
	f.looked = append(f.looked, root+" "+containerID)
	if f.look == nil {
		return errors.New("not to be asked")
	}
	return f.look(root, containerID)
}

func newSessions(t *testing.T, f *fakes, state string) *restoring.Sessions {
	t.Helper()
	s, err := restoring.New(restoring.Config{
		StateDir: state, ImagesDir: state + "-images", FreezeHook: "/hook", Path: "/bin", NodeName: "n", Resolver: f, Observer: f, Compatibility: f, Node: f,
		Now: func() time.Time { return f.now }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// data is a checkpoint of containers a and b that share a volume.
func data(t *testing.T) restoring.Source { return dataOf(t, "criu") }

func dataOf(t *testing.T, engine string) restoring.Source {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"containers/a/rootfs.tar", "containers/b/rootfs.tar", "volumes/v.tar"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	digest, err := checkpoint.Seal(context.Background(), dir, &checkpoint.Manifest{
		Engine:     checkpoint.Program{Name: engine, Version: "1"},
		Sandbox:    checkpoint.Sandbox{Name: "source"},
		Containers: []checkpoint.Container{{Name: "a", Rootfs: "containers/a/rootfs.tar"}, {Name: "b", Rootfs: "containers/b/rootfs.tar"}},
		Volumes:    []checkpoint.Volume{{Name: "v", Archive: "volumes/v.tar", Mounts: []checkpoint.VolumeMount{{Container: "a", Destination: "/va"}, {Container: "b", Destination: "/vb"}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return restoring.Source{Dir: dir, ManifestDigest: digest}
}

func sandbox(annotations ...string) nodeapi.Sandbox {
	s := nodeapi.Sandbox{ID: "s1", Namespace: "ns", Name: "pod", UID: "u", Annotations: map[string]string{}}
	for i := 0; i < len(annotations); i += 2 {
		s.Annotations["checkpoint.podstasis.dev/"+annotations[i]] = annotations[i+1]
	}
	return s
}

var fromC1 = sandbox("restore-from", "c1", "restore-from-uid", "c1-uid")

func create(s *restoring.Sessions, sandbox nodeapi.Sandbox) nodeapi.Response {
	return s.Handle(context.Background(), nodeapi.Request{CreateSandbox: &nodeapi.CreateSandbox{Sandbox: sandbox}})
}

func container(s *restoring.Sessions, name string) nodeapi.Response {
	return s.Handle(context.Background(), nodeapi.Request{CreateContainer: &nodeapi.CreateContainer{
		Sandbox: fromC1, Container: name, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")},
	}})
}

func report(t *testing.T, s *restoring.Sessions, name string, stage nodeapi.ReportStage) {
	t.Helper()
	r := s.Handle(context.Background(), nodeapi.Request{Report: &nodeapi.Report{Sandbox: fromC1, Container: name, Stage: stage, Message: "why"}})
	if r.Error != nil {
		t.Fatal(r.Error)
	}
	if err := s.Reconcile(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func TestARestoreGoesFromSandboxOverContainersToItsEnd(t *testing.T) {
	f := &fakes{source: data(t)}
	state := t.TempDir()
	s := newSessions(t, f, state)
	if r := create(s, fromC1); r.Action != nodeapi.ActionRestore {
		t.Fatalf("sandbox: %+v", r)
	}
	a := container(s, "a")
	if a.Action != nodeapi.ActionRestore || a.Container.ImageDir != state+"-images/s1/a" ||
		a.Container.RootfsArchive != f.source.Dir+"/containers/a/rootfs.tar" {
		t.Fatalf("container a: %+v %+v", a, a.Container)
	}
	if id := a.Container.Identity; id.PodName != "pod" || id.PodNamespace != "ns" || id.PodUID != "u" || id.PodIP != "10.0.0.7" || len(id.PodIPs) != 2 ||
		id.NodeName != "n" || id.Container != "a" || id.CheckpointName != "c1" || id.CheckpointUID != "c1-uid" || id.RestoredAt != f.now.UTC() || id.Source.PodName != "source" {
		t.Errorf("container a is told that it is %+v", id)
	}
	if want := []nodeapi.VolumeRestore{{Archive: f.source.Dir + "/volumes/v.tar", Destination: "/va"}}; !slices.Equal(a.Container.Volumes, want) {
		t.Errorf("container a fills %+v", a.Container.Volumes)
	}
	report(t, s, "a", nodeapi.StageCreated)
	report(t, s, "a", nodeapi.StageStarted)

	// The agent is another process from here on.
	s = newSessions(t, f, state)
	b := container(s, "b")
	if b.Action != nodeapi.ActionRestore || len(b.Container.Volumes) != 0 {
		t.Errorf("container b, whose volume a has filled: %+v %+v", b, b.Container)
	}
	if dirs, err := s.InUse(); err != nil || !slices.Equal(dirs, []string{f.source.Dir}) {
		t.Errorf("in use are %v, %v", dirs, err)
	}
	report(t, s, "b", nodeapi.StageCreated)
	if r := container(s, "debug"); r.Error == nil || r.Error.Reason != "PodSpecMismatch" {
		t.Errorf("a container that the checkpoint does not hold: %+v", r)
	}
	if slices.Contains(f.told, "succeeded") {
		t.Error("it succeeded before container b was started")
	}
	report(t, s, "b", nodeapi.StageStarted)
	if !slices.Equal(f.told, []string{"began", "succeeded"}) {
		t.Errorf("the observer was told %v", f.told)
	}
	if dirs, err := s.InUse(); err != nil || len(dirs) != 0 {
		t.Errorf("in use are %v, %v", dirs, err)
	}
	if r := container(s, "a"); r.Action != nodeapi.ActionOrdinary {
		t.Errorf("a later start of container a: %+v", r)
	}
	if err := os.RemoveAll(f.source.Dir); err != nil { // nothing needs the checkpoint any more
		t.Fatal(err)
	}
	if r := container(s, "debug"); r.Action != nodeapi.ActionOrdinary {
		t.Errorf("a container that the restored Pod is given: %+v", r)
	}
	report(t, s, "", nodeapi.StageDeleted)
	if left, _ := os.ReadDir(state); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestAVolumeThatAFailedContainerWasToFillIsFilledByTheNext(t *testing.T) {
	s := newSessions(t, &fakes{source: data(t)}, t.TempDir())
	create(s, fromC1)
	container(s, "a")
	report(t, s, "a", nodeapi.StageFailed)
	if b := container(s, "b"); len(b.Container.Volumes) != 1 {
		t.Errorf("container b fills %+v", b.Container.Volumes)
	}
	report(t, s, "b", nodeapi.StageCreated)
	if a := container(s, "a"); a.Error != nil || len(a.Container.Volumes) != 0 {
		t.Errorf("container a, tried again, fills what b has filled: %+v", a)
	}
}

// A container runtime that is killed while it makes a sandbox never says that there
// is none; the kubelet makes another.
func TestASandboxThatAnotherOfItsPodFollowsKeepsNothingInUse(t *testing.T) {
	f := &fakes{source: data(t)}
	state := t.TempDir()
	s := newSessions(t, f, state)
	create(s, fromC1)
	again := sandbox("restore-from", "c1")
	again.ID = "s2"
	if r := create(s, again); r.Action != nodeapi.ActionRestore {
		t.Fatalf("the second sandbox: %+v", r)
	}
	if left, _ := os.ReadDir(state); len(left) != 1 || left[0].Name() != "s2.json" {
		t.Errorf("kept: %v", left)
	}
}

func TestRestoresOfOneNameAreDoneOneAfterTheOther(t *testing.T) {
	successor := sandbox("restore-from", "c1")
	successor.ID, successor.UID = "s2", "u2"
	again := sandbox("restore-from", "c1") // the kubelet's next try for the same Pod
	again.ID = "s3"
	for _, end := range []struct {
		how string
		end func(*testing.T, *restoring.Sessions)
	}{
		{"it was restored", func(t *testing.T, s *restoring.Sessions) {
			for _, c := range []string{"a", "b"} {
				report(t, s, c, nodeapi.StageStarted)
			}
		}},
		{"its sandbox was removed", func(t *testing.T, s *restoring.Sessions) { report(t, s, "", nodeapi.StageDeleted) }},
	} {
		t.Run(end.how, func(t *testing.T) {
			f := &fakes{source: data(t)}
			s := newSessions(t, f, t.TempDir())
			create(s, fromC1)
			r := create(s, successor)
			if r.Error == nil || r.Error.Reason != "RestoreInProgress" || !strings.Contains(r.Error.Message, "another Pod ns/pod, of UID u,") {
				t.Fatalf("the successor while the first restores: %+v", r)
			}
			if !slices.Equal(f.told, []string{"began", "refused RestoreInProgress"}) {
				t.Errorf("the observer was told %v", f.told)
			}
			end.end(t, s)
			if r := create(s, successor); r.Action != nodeapi.ActionRestore {
				t.Errorf("the successor after it: %+v", r)
			}
		})
	}
	t.Run("another name, another try and a refusal hold nobody up", func(t *testing.T) {
		f := &fakes{source: data(t)}
		s := newSessions(t, f, t.TempDir())
		create(s, fromC1)
		if r := create(s, again); r.Action != nodeapi.ActionRestore {
			t.Errorf("another try: %+v", r)
		}
		other := successor
		other.Name = "other"
		f.refusal = errors.New("no")
		create(s, other)
		f.refusal = nil
		other.ID, other.UID = "s4", "u4"
		if r := create(s, other); r.Action != nodeapi.ActionRestore {
			t.Errorf("another Pod: %+v", r)
		}
	})
}

func TestAContainerWhoseRestoreFailedIsRestoredAgainAndItsVolumeFilledAgain(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	container(s, "a")
	report(t, s, "a", nodeapi.StageFailed)
	if r := container(s, "a"); r.Action != nodeapi.ActionRestore || len(r.Container.Volumes) != 1 {
		t.Errorf("the second try: %+v", r)
	}
	if !slices.Contains(f.told, "failed a RestoreFailed why") {
		t.Errorf("the observer was told %v", f.told)
	}
}

func TestNothingIsStartedOnAnythingButAGoodAnswer(t *testing.T) {
	good := data(t)
	for name, c := range map[string]struct {
		f       fakes
		sandbox nodeapi.Sandbox
		spoil   func(dir string)
		reason  string
	}{
		"the resolver's refusal":       {fakes{refusal: &nodeapi.Error{Reason: "CheckpointNotReady", Message: "m"}}, fromC1, nil, "CheckpointNotReady"},
		"the resolver's failure":       {fakes{refusal: errors.New("no API server")}, fromC1, nil, "RestoreFailed"},
		"data that are gone":           {fakes{source: restoring.Source{Dir: "/no/such", ManifestDigest: "x"}}, fromC1, nil, "CheckpointDataMissing"},
		"data of another digest":       {fakes{source: restoring.Source{Dir: good.Dir, ManifestDigest: "sha256:other"}}, fromC1, nil, "CheckpointDataCorrupt"},
		"an engine that cannot":        {fakes{source: good, incompat: errors.New("older")}, fromC1, nil, "RestoreFailed"},
		"no wish to be restored":       {fakes{source: good}, sandbox(), nil, "RestoreFailed"},
		"a ticket that was not issued": {fakes{source: good}, sandbox("restore-ticket", "guess", "restore-from", "c1"), nil, "RestoreFailed"},
		"an ID that leads out":         {fakes{source: good}, nodeapi.Sandbox{ID: "../x", Annotations: fromC1.Annotations}, nil, "RestoreFailed"},
		"an empty ID":                  {fakes{source: good}, nodeapi.Sandbox{Annotations: fromC1.Annotations}, nil, "RestoreFailed"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSessions(t, &c.f, t.TempDir())
			r := create(s, c.sandbox)
			if r.Error == nil || r.Error.Reason != c.reason || r.Action != "" {
				t.Errorf("got %+v", r)
			}
			if r := container(s, "a"); r.Error == nil || r.Action != "" {
				t.Errorf("a container all the same: %+v", r)
			}
		})
	}
}

func TestATicketWorksOnceAndForItsDirectory(t *testing.T) {
	f := &fakes{refusal: errors.New("not to be asked")}
	s := newSessions(t, f, t.TempDir())
	dir := data(t).Dir
	ticket := s.Issue(dir, "")
	if r := create(s, sandbox("restore-ticket", ticket)); r.Action != nodeapi.ActionRestore {
		t.Fatalf("first use: %+v", r)
	}
	if r := container(s, "a"); !strings.HasPrefix(r.Container.RootfsArchive, dir) || f.adapted[0].ImageDirs["a"] != dir+"/containers/a/criu" {
		t.Errorf("it restores from %s and %v", r.Container.RootfsArchive, f.adapted)
	}
	if r := create(s, sandbox("restore-ticket", ticket)); r.Error == nil {
		t.Errorf("second use: %+v", r)
	}
	revoked := s.Issue(dir, "")
	s.Revoke(revoked)
	if r := create(s, sandbox("restore-ticket", revoked)); r.Error == nil {
		t.Errorf("revoked: %+v", r)
	}
	if len(f.resolvedBy) != 0 {
		t.Error("the resolver was asked about a ticket")
	}
}

func TestALaterSandboxOfARestoredPodAndCompletedInitContainersAreNotRestored(t *testing.T) {
	f := &fakes{source: restoring.Source{Ordinary: true}}
	s := newSessions(t, f, t.TempDir())
	if r := create(s, fromC1); r.Action != nodeapi.ActionOrdinary {
		t.Errorf("sandbox: %+v", r)
	}
	if r := container(s, "a"); r.Action != nodeapi.ActionOrdinary {
		t.Errorf("container: %+v", r)
	}
	f.source = data(t)
	f.source.CompletedInit = []string{"setup"}
	create(s, fromC1)
	if r := container(s, "setup"); r.Action != nodeapi.ActionCompleted {
		t.Errorf("completed init container: %+v", r)
	}
	if r := container(s, "unknown"); r.Error == nil || r.Error.Reason != "PodSpecMismatch" {
		t.Errorf("a container that is not in the checkpoint: %+v", r)
	}
}
