package ociruntime_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/ociruntime"
)

// The program steps aside with exec, so it is run as a process: this test binary
// under the name stasis-runtime.
func TestMain(m *testing.M) {
	if os.Getenv("STASIS_RUNTIME_UNDER_TEST") == "" {
		os.Exit(m.Run())
	}
	if err := ociruntime.Main(context.Background(), os.Getenv("STASIS_RUNTIME_UNDER_TEST"), os.Args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// agent is a stand-in that gives one answer and keeps what it was asked.
type agent struct {
	mu       sync.Mutex
	answer   nodeapi.Response
	requests []nodeapi.Request
}

func (a *agent) Handle(_ context.Context, r nodeapi.Request) nodeapi.Response {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.requests = append(a.requests, r)
	if r.Report != nil {
		return nodeapi.Response{}
	}
	return a.answer
}

func (a *agent) asked() []nodeapi.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.requests)
}

// bench is an installation with a real runtime that only writes down how it was
// called and whether it was told to fail.
type bench struct {
	*agent
	t                          *testing.T
	dir, bundle, root, log     string
	executable, calls, failing string
}

func newBench(t *testing.T, annotations map[string]string) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{agent: &agent{}, t: t, dir: dir, bundle: dir + "/bundle", root: dir + "/root", log: dir + "/log.json",
		executable: dir + "/bin/stasis-runtime", calls: dir + "/calls", failing: dir + "/fail"}
	for _, d := range []string{"bin", "etc", "bundle/rootfs", "root/c1", "root/s1"} {
		b.must(os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	b.must(os.WriteFile(dir+"/runc", []byte("#!/bin/sh\necho \"$@\" >> "+b.calls+"\n[ ! -e "+b.hook()+" ] || . "+b.hook()+"\n[ ! -e "+b.failing+" ]\n"), 0o755))
	config, _ := json.Marshal(ociruntime.Config{Runtime: dir + "/runc", Socket: dir + "/s"})
	b.must(os.WriteFile(dir+"/etc/runtime.json", config, 0o644))
	spec, _ := json.Marshal(map[string]any{
		"annotations": annotations,
		"process":     map[string]any{"args": []string{"/bin/app"}, "cwd": "/", "unknownField": 1},
		"root":        map[string]any{"path": "rootfs"},
		"mounts":      []any{map[string]any{"destination": "/proc", "type": "proc"}},
	})
	b.must(os.WriteFile(b.bundle+"/config.json", spec, 0o644))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/s"})
	b.must(err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- nodeapi.Serve(ctx, l, b.agent, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() { cancel(); <-done })
	return b
}

// hook is where a test has the real runtime do more than that.
func (b *bench) hook() string { return b.dir + "/hook" }

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// run calls stasis-runtime as containerd's shim does.
func (b *bench) run(args ...string) error {
	b.t.Helper()
	self, err := os.Executable()
	b.must(err)
	cmd := exec.Command(self, append([]string{"--root", b.root, "--log", b.log, "--log-format", "json"}, args...)...)
	cmd.Args[0] = "/opt/stasis/bin/stasis-runtime"
	cmd.Env = append(os.Environ(), "STASIS_RUNTIME_UNDER_TEST="+b.executable)
	// A file: if it is killed, what it has started goes on and would keep a pipe open.
	out, err := os.CreateTemp(b.dir, "out-")
	b.must(err)
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	if said, _ := os.ReadFile(out.Name()); len(said) > 0 {
		b.t.Logf("%s", said)
	}
	return err
}

func (b *bench) create() error {
	return b.run("create", "--bundle", b.bundle, "--pid-file", b.dir+"/pid", "c1")
}

// called lists how the real runtime was called, without the global arguments.
func (b *bench) called() []string {
	data, _ := os.ReadFile(b.calls)
	var calls []string
	for line := range strings.Lines(string(data)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), "--log-format json ")
		calls = append(calls, rest)
	}
	return calls
}

func (b *bench) spec() (spec struct {
	Annotations map[string]string
	Process     struct {
		Args         []string
		UnknownField int
	}
	Mounts []struct {
		Destination, Source string
		Options             []string
	}
}) {
	data, err := os.ReadFile(b.bundle + "/config.json")
	b.must(err)
	b.must(json.Unmarshal(data, &spec))
	return spec
}

func sandboxOf(kind string, more ...string) map[string]string {
	a := map[string]string{
		"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "s1", "io.kubernetes.cri.container-name": "web",
		"io.kubernetes.cri.sandbox-namespace": "ns", "io.kubernetes.cri.sandbox-name": "pod", "io.kubernetes.cri.sandbox-uid": "u1",
	}
	for i := 0; i < len(more); i += 2 {
		a[more[i]] = more[i+1]
	}
	return a
}

const restoreFrom = "checkpoint.podstasis.dev/restore-from"

func TestAPodThatDoesNotRestoreIsHandedOnWithoutAskingAnybody(t *testing.T) {
	b := newBench(t, sandboxOf("container"))
	before, err := os.ReadFile(b.bundle + "/config.json")
	b.must(err)
	b.must(b.create())
	b.must(b.run("start", "c1"))
	b.must(b.run("state", "c1"))
	b.must(b.run("kill", "--all", "c1", "9"))
	b.must(b.run("delete", "--force", "c1"))
	want := []string{"create --bundle " + b.bundle + " --pid-file " + b.dir + "/pid c1", "start c1", "state c1", "kill --all c1 9", "delete --force c1"}
	if got := b.called(); !slices.Equal(got, want) {
		t.Errorf("the real runtime was called as %q", got)
	}
	if len(b.asked()) != 0 {
		t.Errorf("the agent was asked %+v", b.asked())
	}
	if after, _ := os.ReadFile(b.bundle + "/config.json"); string(after) != string(before) {
		t.Error("its OCI spec was changed")
	}
}

func TestAnnotationsThatReachTheEngineAreDroppedFromEveryPod(t *testing.T) {
	b := newBench(t, sandboxOf("container", "org.criu.config", "/evil", "keep", "me"))
	b.must(b.create())
	if a := b.spec().Annotations; a["org.criu.config"] != "" || a["keep"] != "me" {
		t.Errorf("annotations are %v", a)
	}
}

func TestARefusedSandboxIsNotCreatedAndTheReasonReachesTheRuntimesLog(t *testing.T) {
	b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
	b.answer = nodeapi.Response{Error: &nodeapi.Error{Reason: "CheckpointNotReady", Message: "it is Pending"}}
	if b.create() == nil {
		t.Error("no error")
	}
	if len(b.called()) != 0 {
		t.Errorf("the real runtime was called: %q", b.called())
	}
	log, _ := os.ReadFile(b.log)
	var line struct{ Level, Msg string }
	if err := json.Unmarshal(log, &line); err != nil || line.Level != "error" || !strings.Contains(line.Msg, "CheckpointNotReady: it is Pending") {
		t.Errorf("the log holds %s", log)
	}
}

func TestAnAgentThatIsAwayOrAnswersNonsenseStartsNothing(t *testing.T) {
	for name, c := range map[string]struct {
		kind   string
		answer nodeapi.Response
		away   bool
	}{
		"sandbox, no answer":              {kind: "sandbox", away: true},
		"container, no answer":            {kind: "container", away: true},
		"sandbox, empty answer":           {kind: "sandbox"},
		"container, empty answer":         {kind: "container"},
		"container, restore without what": {kind: "container", answer: nodeapi.Response{Action: nodeapi.ActionRestore}},
		"neither sandbox nor container":   {kind: "podsandbox", answer: nodeapi.Response{Action: nodeapi.ActionOrdinary}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, sandboxOf(c.kind, restoreFrom, "c"))
			b.answer = c.answer
			if c.away {
				b.must(os.Remove(b.dir + "/s"))
			}
			if b.create() == nil {
				t.Error("no error")
			}
			if len(b.called()) != 0 {
				t.Errorf("the real runtime was called: %q", b.called())
			}
		})
	}
}

func TestAnAdmittedSandboxIsCreatedAsAnyOtherAndItsEndIsReported(t *testing.T) {
	b := newBench(t, sandboxOf("sandbox", restoreFrom, "c", "other", "x"))
	b.answer = nodeapi.Response{Action: nodeapi.ActionRestore}
	b.must(b.create())
	asked := b.asked()[0].CreateSandbox.Sandbox
	if asked.ID != "s1" || asked.Namespace != "ns" || asked.Name != "pod" || asked.UID != "u1" || len(asked.Annotations) != 1 || asked.Annotations[restoreFrom] != "c" {
		t.Errorf("asked about %+v", asked)
	}
	b.must(b.run("start", "c1"))
	b.must(b.run("delete", "c1"))
	if got := b.called(); len(got) != 3 || got[1] != "start c1" || got[2] != "delete c1" {
		t.Errorf("the real runtime was called as %q", got)
	}
	if last := b.asked()[1].Report; last == nil || last.Stage != nodeapi.StageDeleted || last.Sandbox.ID != "s1" {
		t.Errorf("reported %+v", last)
	}
}

func TestASandboxThatTheRealRuntimeCannotCreateIsForgotten(t *testing.T) {
	b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
	b.answer = nodeapi.Response{Action: nodeapi.ActionRestore}
	b.must(os.WriteFile(b.failing, nil, 0o644))
	if b.create() == nil {
		t.Error("no error")
	}
	if asked := b.asked(); len(asked) != 2 || asked[1].Report == nil || asked[1].Report.Stage != nodeapi.StageDeleted {
		t.Errorf("the agent heard %+v", asked)
	}
}

func TestACompletedInitContainerRunsAProgramThatExitsAtOnce(t *testing.T) {
	b := newBench(t, sandboxOf("container", restoreFrom, "c"))
	b.answer = nodeapi.Response{Action: nodeapi.ActionCompleted}
	b.must(b.create())
	spec := b.spec()
	if !slices.Equal(spec.Process.Args, []string{"/dev/stasis-completed"}) || spec.Process.UnknownField != 1 {
		t.Errorf("its process is %+v", spec.Process)
	}
	if m := spec.Mounts[len(spec.Mounts)-1]; m.Destination != "/dev/stasis-completed" || m.Source != b.executable || !slices.Contains(m.Options, "ro") {
		t.Errorf("its last mount is %+v", m)
	}
	self, err := os.Executable()
	b.must(err)
	cmd := exec.Command(self)
	cmd.Args[0] = "/dev/stasis-completed"
	cmd.Env = []string{"STASIS_RUNTIME_UNDER_TEST=x"}
	b.must(cmd.Run())
}

func TestARestoreThatFailsIsReportedWithItsReasonAndNothingIsCreated(t *testing.T) {
	b := newBench(t, sandboxOf("container", restoreFrom, "c"))
	b.answer = nodeapi.Response{Action: nodeapi.ActionRestore, Container: &nodeapi.ContainerRestore{
		RootfsArchive: b.dir + "/no-such.tar", ImageDir: b.dir, WorkDir: b.dir, FreezeHook: "/hook", Path: "/bin",
	}}
	if b.create() == nil {
		t.Error("no error")
	}
	report := b.asked()[1].Report
	if report == nil || report.Stage != nodeapi.StageFailed || report.Container != "web" || !strings.Contains(report.Message, "no-such.tar") {
		t.Errorf("reported %+v", report)
	}
	if len(b.called()) != 0 {
		t.Errorf("the real runtime was called: %q", b.called())
	}
}

func TestAConfigurationThatNamesNoRuntimeIsAnError(t *testing.T) {
	b := newBench(t, sandboxOf("container"))
	b.must(os.WriteFile(b.dir+"/etc/runtime.json", []byte(`{"runtime":""}`), 0o644))
	if b.create() == nil {
		t.Error("no error")
	}
}

// restored stands for containers that were restored and wait for their start.
func (b *bench) restored(containers map[string]string) {
	b.t.Helper()
	for id, name := range containers {
		b.must(os.MkdirAll(filepath.Join(b.root, id), 0o755))
		b.must(os.MkdirAll(b.work(name), 0o755))
		b.must(os.WriteFile(filepath.Join(b.root, id, "stasis.json"), []byte(`{"sandbox":{"id":"s1"},"container":"`+name+`","workDir":"`+b.work(name)+`"}`), 0o600))
		b.must(nodeapi.WriteProgress(b.work(name), nodeapi.Progress{ContainerID: id, Root: b.root, Stage: nodeapi.StageCreated}))
	}
}

func (b *bench) work(container string) string { return filepath.Join(b.dir, "work", container) }

// started lists the containers that the agent heard to be let go.
func (b *bench) started() []string {
	var names []string
	for _, r := range b.asked() {
		if r.Report != nil && r.Report.Stage == nodeapi.StageStarted {
			names = append(names, r.Report.Container)
		}
	}
	return names
}

func TestContainersThatGoTogetherAreLetGoAtTheStartOfTheLastOfThem(t *testing.T) {
	b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
	b.must(os.MkdirAll(b.root+"/s1", 0o755))
	b.answer = nodeapi.Response{Action: nodeapi.ActionRestore, Together: []string{"web", "log"}}
	b.must(b.run("create", "--bundle", b.bundle, "s1"))
	b.restored(map[string]string{"c1": "web", "c2": "log", "c3": "hooked"})

	b.must(b.run("start", "c1"))
	if calls := b.called()[1:]; len(calls) != 0 || len(b.started()) != 0 {
		t.Errorf("the first was let go before the second was there: %q, started %q", calls, b.started())
	}
	b.must(b.run("start", "c3"))
	if calls := b.called()[1:]; !slices.Equal(calls, []string{"resume c3"}) {
		t.Errorf("one that goes by itself: %q", calls)
	}
	b.must(b.run("start", "c2"))
	if calls := b.called()[2:]; !slices.Equal(calls, []string{"resume c1", "resume c2"}) {
		t.Errorf("at the last one's start: %q", calls)
	}
	if got := b.started(); !slices.Equal(got, []string{"hooked", "web", "log"}) {
		t.Errorf("the agent heard of %q", got)
	}
	// Each once: a later start of the same container is the real runtime's.
	b.must(b.run("start", "c1"))
	if calls := b.called()[4:]; !slices.Equal(calls, []string{"start c1"}) {
		t.Errorf("after that: %q", calls)
	}
}

func TestAContainerThatIsGoneDoesNotHoldUpTheOthers(t *testing.T) {
	b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
	b.must(os.MkdirAll(b.root+"/s1", 0o755))
	b.answer = nodeapi.Response{Action: nodeapi.ActionRestore, Together: []string{"web", "log"}}
	b.must(b.run("create", "--bundle", b.bundle, "s1"))
	b.restored(map[string]string{"c1": "web", "c2": "log"})
	b.must(b.run("start", "c1"))
	b.must(os.RemoveAll(b.root + "/c1")) // killed and deleted meanwhile
	b.must(b.run("start", "c2"))
	if calls := b.called()[1:]; !slices.Equal(calls, []string{"resume c2"}) {
		t.Errorf("the real runtime was called as %q", calls)
	}
	// Restored once more under another ID, it goes at its start.
	b.restored(map[string]string{"c4": "web"})
	b.must(b.run("start", "c4"))
	if calls := b.called()[2:]; !slices.Equal(calls, []string{"resume c4"}) {
		t.Errorf("the real runtime was called as %q", calls)
	}
}

func TestAnEarlierAttemptThatWasGivenUpIsEndedBeforeTheNext(t *testing.T) {
	b := newBench(t, sandboxOf("container", restoreFrom, "c"))
	b.restored(map[string]string{"c7": "web", "c8": "log"})
	b.answer = nodeapi.Response{Action: nodeapi.ActionRestore, Container: &nodeapi.ContainerRestore{
		RootfsArchive: b.dir + "/no-such.tar", ImageDir: b.dir, WorkDir: b.dir, FreezeHook: "/hook", Path: "/bin",
	}}
	if b.create() == nil {
		t.Error("no error")
	}
	if calls := b.called(); !slices.Equal(calls, []string{"delete --force c7"}) {
		t.Errorf("the real runtime was called as %q", calls)
	}
}

func TestContainersThatWereGivenUpEndWithTheirSandbox(t *testing.T) {
	b := newBench(t, sandboxOf("sandbox", restoreFrom, "c"))
	b.answer = nodeapi.Response{Action: nodeapi.ActionRestore}
	b.must(b.run("create", "--bundle", b.bundle, "s1"))
	b.restored(map[string]string{"c7": "web"})
	b.must(os.MkdirAll(b.root+"/other", 0o755))
	b.must(os.WriteFile(b.root+"/other/stasis.json", []byte(`{"sandbox":{"id":"s2"},"container":"web"}`), 0o600))
	b.must(b.run("delete", "s1"))
	if calls := b.called()[1:]; !slices.Equal(calls, []string{"delete --force c7", "delete s1"}) {
		t.Errorf("the real runtime was called as %q", calls)
	}
}
