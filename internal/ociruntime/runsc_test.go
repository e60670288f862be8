package ociruntime_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/ociruntime"
)

// runscBench is a bench where the program stands in for runsc.
type runscBench struct {
	*bench
	background bool
}

func newRunscBench(t *testing.T, kind string) *runscBench {
	t.Helper()
	b := &runscBench{bench: newBench(t, map[string]string{
		"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": "s1", "io.kubernetes.cri.container-name": "app",
		"io.kubernetes.cri.sandbox-namespace": "ns", "io.kubernetes.cri.sandbox-name": "pod", "io.kubernetes.cri.sandbox-uid": "u",
		"checkpoint.podstasis.dev/restore-from": "c", "dev.gvisor.spec.cgroup-parent": "/pods/pod-u",
	})}
	config, _ := json.Marshal(ociruntime.Config{Runtime: b.dir + "/runc", Socket: b.dir + "/s"})
	b.must(os.WriteFile(b.dir+"/etc/runsc.json", config, 0o644))
	return b
}

// as changes what the bundle is of.
func (b *runscBench) as(kind string) {
	b.t.Helper()
	data, err := os.ReadFile(b.bundle + "/config.json")
	b.must(err)
	for _, other := range []string{"sandbox", "container"} {
		data = []byte(strings.ReplaceAll(string(data), `container-type":"`+other+`"`, `container-type":"`+kind+`"`))
	}
	b.must(os.WriteFile(b.bundle+"/config.json", data, 0o644))
}

func (b *runscBench) run(args ...string) error {
	b.t.Helper()
	_, err := b.prints(args...)
	return err
}

func (b *runscBench) prints(args ...string) (string, error) {
	b.t.Helper()
	self, err := os.Executable()
	b.must(err)
	cmd := exec.Command(self, append([]string{"--root=" + b.root, "--log=" + b.log, "--log-format", "json"}, args...)...)
	cmd.Args[0] = "/opt/stasis/bin/stasis-runsc"
	cmd.Env = append(os.Environ(), "STASIS_RUNTIME_UNDER_TEST="+b.executable)
	out, err := cmd.CombinedOutput()
	if len(out) > 0 {
		b.t.Logf("%s", out)
	}
	return string(out), err
}

// create creates a sandbox, whose process is another that this test has started, or a
// container in it.
func (b *runscBench) create(kind, id string) error {
	b.t.Helper()
	b.as(kind)
	return b.run("create", "--bundle", b.bundle, "--pid-file", b.dir+"/pid", id)
}

func (b *runscBench) process() *exec.Cmd {
	b.t.Helper()
	p := exec.Command("sleep", "600")
	b.must(p.Start())
	b.t.Cleanup(func() { p.Process.Kill(); p.Wait() })
	b.must(os.WriteFile(b.dir+"/pid", []byte(strconv.Itoa(p.Process.Pid)), 0o644))
	return p
}

// killed checks that a process has been.
func (b *runscBench) killed(p *exec.Cmd) {
	b.t.Helper()
	alive := time.AfterFunc(10*time.Second, func() { p.Process.Signal(syscall.SIGTERM) })
	defer alive.Stop()
	if err := p.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		b.t.Errorf("the sandbox's process was not killed: %v", err)
	}
}

func (b *runscBench) answers(a nodeapi.Response) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.answer = a
}

// sandbox makes a sandbox that is restored from two containers' images, up to its start.
func (b *runscBench) sandbox() *exec.Cmd {
	b.t.Helper()
	p := b.process()
	b.answers(nodeapi.Response{Action: nodeapi.ActionRestore, Whole: &nodeapi.SandboxRestore{ImageDir: "/images", Containers: []string{"app", "other"}, Background: b.background}})
	b.must(b.create("sandbox", "s1"))
	return p
}

func (b *runscBench) container(id string) {
	b.t.Helper()
	work := b.dir + "/work-" + id
	b.must(os.MkdirAll(work, 0o755))
	b.answers(nodeapi.Response{Action: nodeapi.ActionRestore, Container: &nodeapi.ContainerRestore{WorkDir: work, Identity: nodeapi.Identity{PodName: "pod"}}})
	b.must(b.create("container", id))
}

func (b *runscBench) stages() (stages []nodeapi.ReportStage) {
	for _, r := range b.asked() {
		if r.Report != nil {
			stages = append(stages, r.Report.Stage)
		}
	}
	return stages
}

func TestASandboxOfGVisorRunsBeforeItsMemoryIsInPlaceWhereItMay(t *testing.T) {
	b := newRunscBench(t, "sandbox")
	b.background = true
	b.sandbox()
	b.must(b.run("start", "s1"))
	if got := b.calledAs(); len(got) != 2 || got[1] != "restore --detach --background --image-path /images s1" {
		t.Errorf("called %q", got)
	}
}

func TestASandboxOfGVisorIsRestoredWhereItWouldBeStarted(t *testing.T) {
	b := newRunscBench(t, "sandbox")
	b.sandbox()
	in := b.asked()[0].CreateSandbox
	if in.Engine != "gvisor" || in.EngineAnnotations["dev.gvisor.spec.cgroup-parent"] != "/pods/pod-u" || len(in.EngineAnnotations) != 1 {
		t.Errorf("asked %+v", in)
	}
	b.must(b.run("start", "s1"))
	if got := b.calledAs(); !slices.Equal(got, []string{"create --bundle " + b.bundle + " --pid-file " + b.dir + "/pid s1", "restore --detach --image-path /images s1"}) {
		t.Errorf("called %q", got)
	}
}

// calledAs is called, of arguments that are written with an equals sign too.
func (b *runscBench) calledAs() (calls []string) {
	data, _ := os.ReadFile(b.calls)
	for line := range strings.Lines(string(data)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), "--log-format json ")
		calls = append(calls, rest)
	}
	return calls
}

func TestASandboxOfGVisorIsAskedForItsUseOfResourcesWhenAllOfItRuns(t *testing.T) {
	b := newRunscBench(t, "sandbox")
	b.sandbox()
	b.must(b.run("start", "s1"))
	for _, c := range []struct{ id, name string }{{"c1", "app"}, {"c2", "other"}} {
		if err := b.run("events", "--stats", "s1"); err == nil {
			t.Fatalf("it was asked before %s was started", c.name)
		}
		b.named(c.name)
		b.container(c.id)
		b.must(b.run("start", c.id))
	}
	b.must(b.run("events", "--stats", "s1"))
	b.must(b.run("events", "--stats", "c1"))
	want := []nodeapi.ReportStage{nodeapi.StageCreated, nodeapi.StageStarted, nodeapi.StageCreated, nodeapi.StageStarted}
	if got := b.stages(); !slices.Equal(got, want) {
		t.Errorf("reported %q", got)
	}
	if p, err := nodeapi.ReadProgress(b.dir + "/work-c2"); err != nil || p.Stage != nodeapi.StageStarted || p.Root != b.root+"/stasis" {
		t.Errorf("its progress is %+v, %v", p, err)
	}
}

// named changes the name of the bundle's container.
func (b *runscBench) named(name string) {
	b.t.Helper()
	data, err := os.ReadFile(b.bundle + "/config.json")
	b.must(err)
	for _, other := range []string{"app", "other"} {
		data = []byte(strings.ReplaceAll(string(data), `container-name":"`+other+`"`, `container-name":"`+name+`"`))
	}
	b.must(os.WriteFile(b.bundle+"/config.json", data, 0o644))
}

// P26: the kubelet runs them before the others, when nothing can run in the sandbox.
func TestAnInitContainerThatHadCompletedEndsWithoutTheSandbox(t *testing.T) {
	b := newRunscBench(t, "sandbox")
	p := b.sandbox()
	b.must(b.run("start", "s1"))
	called := len(b.calledAs())
	b.answers(nodeapi.Response{Action: nodeapi.ActionCompleted})
	b.must(b.create("container", "i1"))
	if pid, err := os.ReadFile(b.dir + "/pid"); err != nil || string(pid) != strconv.Itoa(p.Process.Pid) {
		t.Errorf("its process is %q, %v", pid, err)
	}
	if _, err := b.prints("wait", "i1"); err == nil {
		t.Error("it has ended before it was started")
	}
	var state struct {
		ID, Status string
		Pid        int
	}
	for _, want := range []string{"created", "stopped"} {
		out, err := b.prints("state", "i1")
		b.must(err)
		if err := json.Unmarshal([]byte(out), &state); err != nil || state.Status != want || state.ID != "i1" || state.Pid != p.Process.Pid {
			t.Errorf("%s: %v, want it %s", out, err, want)
		}
		b.must(b.run("start", "i1"))
	}
	out, err := b.prints("wait", "i1")
	var ended struct{ ExitStatus *int }
	if err != nil || json.Unmarshal([]byte(out), &ended) != nil || ended.ExitStatus == nil || *ended.ExitStatus != 0 {
		t.Errorf("wait: %s, %v", out, err)
	}
	b.must(b.run("kill", "i1", "9"))
	b.must(b.run("delete", "i1"))
	if _, err := os.Stat(b.root + "/stasis/i1"); !os.IsNotExist(err) {
		t.Errorf("its mark: %v", err)
	}
	if now := b.calledAs(); len(now) != called || p.Process.Signal(syscall.Signal(0)) != nil {
		t.Errorf("runsc was called for it: %q", now[called:])
	}
	if err := b.run("events", "--stats", "s1"); err == nil {
		t.Error("the sandbox passes for one that runs")
	}
}

func TestASandboxOfGVisorWhoseRestoreFailsIsEnded(t *testing.T) {
	b := newRunscBench(t, "sandbox")
	p := b.sandbox()
	b.must(os.WriteFile(b.failing, nil, 0o644))
	if err := b.run("start", "s1"); err == nil {
		t.Error("no error")
	}
	b.killed(p)
	if got := b.stages(); !slices.Equal(got, []nodeapi.ReportStage{nodeapi.StageFailed}) {
		t.Errorf("reported %q", got)
	}
}

func TestASandboxOfGVisorWhoseContainerFailsIsEndedToo(t *testing.T) {
	b := newRunscBench(t, "sandbox")
	p := b.sandbox()
	b.must(b.run("start", "s1"))
	b.container("c1")
	b.must(os.WriteFile(b.failing, nil, 0o644))
	if err := b.run("start", "c1"); err == nil {
		t.Error("no error")
	}
	b.killed(p)
	if progress, err := nodeapi.ReadProgress(b.dir + "/work-c1"); err != nil || progress.Stage != nodeapi.StageCreated {
		t.Errorf("its progress is %+v, %v", progress, err)
	}
}

func TestARefusedSandboxOfGVisorIsNotMade(t *testing.T) {
	b := newRunscBench(t, "sandbox")
	b.answers(nodeapi.Response{Error: &nodeapi.Error{Reason: "CheckpointNotReady", Message: "not yet"}})
	if err := b.create("sandbox", "s1"); err == nil {
		t.Error("no error")
	}
	if got := b.calledAs(); len(got) != 0 {
		t.Errorf("called %q", got)
	}
	if log, _ := os.ReadFile(b.log); !strings.Contains(string(log), "CheckpointNotReady: not yet") {
		t.Errorf("the log says %s", log)
	}
}

func TestAnInterruptedStartInASandboxOfGVisorIsFoundOut(t *testing.T) {
	for _, tc := range []struct {
		says string
		want nodeapi.ReportStage
	}{{"running", nodeapi.StageStarted}, {"created", nodeapi.StageCreated}} {
		b := newRunscBench(t, "sandbox")
		b.sandbox()
		b.must(b.run("start", "s1"))
		b.container("c1")
		b.must(nodeapi.WriteProgress(b.dir+"/work-c1", nodeapi.Progress{ContainerID: "c1", Root: b.root + "/stasis", Stage: nodeapi.StageStarting}))
		b.must(os.WriteFile(b.hook(), []byte("echo '{\"status\":\""+tc.says+"\"}'\n"), 0o644))
		// As the agent asks: by the root that the progress names.
		self, err := os.Executable()
		b.must(err)
		cmd := exec.Command(self, "--root", b.root+"/stasis", nodeapi.LookCommand, "c1")
		cmd.Args[0] = "/opt/stasis/bin/stasis-runtime"
		cmd.Env = append(os.Environ(), "STASIS_RUNTIME_UNDER_TEST="+b.executable)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if p, err := nodeapi.ReadProgress(b.dir + "/work-c1"); err != nil || p.Stage != tc.want {
			t.Errorf("runsc says %s, the progress is %+v, %v", tc.says, p, err)
		}
		data, _ := os.ReadFile(b.calls)
		if !strings.Contains(string(data), "--root "+b.root+" state c1") {
			t.Errorf("runsc was called:\n%s", data)
		}
	}
}

func TestTheEndOfASandboxOfGVisorIsReported(t *testing.T) {
	b := newRunscBench(t, "sandbox")
	b.sandbox()
	b.must(b.run("delete", "--force", "s1"))
	if got := b.stages(); !slices.Equal(got, []nodeapi.ReportStage{nodeapi.StageDeleted}) {
		t.Errorf("reported %q", got)
	}
	if _, err := os.Stat(b.root + "/stasis/s1"); !os.IsNotExist(err) {
		t.Errorf("its mark: %v", err)
	}
}

func TestAPodOfGVisorThatIsNotRestoredIsRunscsOwn(t *testing.T) {
	b := newRunscBench(t, "sandbox")
	data, err := os.ReadFile(b.bundle + "/config.json")
	b.must(err)
	b.must(os.WriteFile(b.bundle+"/config.json", []byte(strings.ReplaceAll(string(data), "restore-from", "other")), 0o644))
	b.must(b.run("create", "--bundle", b.bundle, "s1"))
	b.must(b.run("start", "s1"))
	b.must(b.run("events", "--stats", "s1"))
	b.must(b.run("kill", "s1", "9"))
	b.must(b.run("delete", "s1"))
	if got := b.calledAs(); len(got) != 5 || len(b.asked()) != 0 {
		t.Errorf("called %q, asked %v", got, b.asked())
	}
	if entries, _ := os.ReadDir(b.root + "/stasis"); len(entries) != 0 {
		t.Errorf("marks: %v", entries)
	}
}
