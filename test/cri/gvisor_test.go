package cri_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/contents"
)

// gVisor as engine: the same calls, another runtime.

const (
	gvisorHandler  = "runsc"         // as the node had it before Stasis
	gvisorRestores = "stasis-gvisor" // the handler that restores
)

// restoreByEngine restores by whatever handler the checkpoint's engine has.
func (n *node) restoreByEngine(t *testing.T, dir string, configs ...*runtimeapi.ContainerConfig) *pod {
	t.Helper()
	p := n.prepareRestoreBy(t, "", dir, configs...)
	p.start(t)
	return p
}

// handlerOf is the runtime handler that a Pod runs under.
func (p *pod) handlerOf(t *testing.T) string {
	t.Helper()
	answer, err := p.node.runtime.ListPodSandbox(testContext(t), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.sandbox}})
	must(t, err)
	if len(answer.Items) != 1 {
		t.Fatalf("%d sandboxes have the ID %s", len(answer.Items), p.sandbox)
	}
	return answer.Items[0].RuntimeHandler
}

// continues checks that a container's first number, of those that it prints a step apart,
// follows one of the source's last ones. Of those not all may be in its log yet.
func continues(t *testing.T, what string, first int, source []int, step int) {
	t.Helper()
	const late = 100
	if last := source[len(source)-1]; first <= step || first > last+late*step {
		t.Errorf("%s goes on with %d, its source had come to %d", what, first, last)
	}
}

func TestAPodOfGVisorIsCapturedAndGoesOnInANewSandbox(t *testing.T) {
	n := theNode
	configs := func() []*runtimeapi.ContainerConfig {
		shared := n.sharedDirectory(t, "/s")
		return []*runtimeapi.ContainerConfig{
			container("a", `echo before > /s/file; echo layer > /layer; echo shm > /dev/shm/file; `+counting, shared),
			container("b", `exec 3>>/s/log; i=0; while :; do for k in 1 2 3 4 5 6 7 8 9 10; do i=$((i+1)); echo $i >&3; done; echo $i; usleep 10000; done`, shared),
		}
	}
	source := n.run(t, gvisorHandler, configs()...)
	source.numbers(t, "a", 20)
	source.numbers(t, "b", 20)
	dir, m := source.checkpoint(t)
	if m.Engine.Name != "gvisor" || m.Engine.Version == "" || m.Runtime.Name != "runsc" || len(m.Volumes) != 1 || m.FreezeDuration <= 0 {
		t.Errorf("the manifest has engine %v, runtime %v, volumes %v, frozen %v", m.Engine, m.Runtime, m.Volumes, m.FreezeDuration)
	}
	t.Logf("frozen %v, phases %v, %d bytes", m.FreezeDuration, m.Phases, m.LogicalBytes())
	for _, c := range n.contents(t, dir, m, contents.Options{}).Containers {
		if len(c.Processes) != 0 || !slices.ContainsFunc(c.Notes, func(note string) bool { return strings.Contains(note, "the engine gvisor alone can read") }) {
			t.Errorf("what is inside of container %s: %d processes, notes %q", c.Name, len(c.Processes), c.Notes)
		}
	}
	a, b := source.numbers(t, "a", 0), source.numbers(t, "b", 0)
	source.goesOn(t, "a") // the source does
	source.numbers(t, "b", len(b)+10)

	restored := n.restoreByEngine(t, dir, configs()...)
	if got := restored.handlerOf(t); got != gvisorRestores {
		t.Errorf("it runs under the handler %q", got)
	}
	continues(t, "a", restored.numbers(t, "a", 5)[0], a, 1)
	continues(t, "b", restored.numbers(t, "b", 5)[0], b, 10)
	for file, want := range map[string]string{"/s/file": "before", "/layer": "layer", "/dev/shm/file": "shm"} {
		if got := restored.exec(t, "a", "cat "+file); got != want {
			t.Errorf("%s holds %q", file, got)
		}
	}
	// The open file is the new Pod's, and has what the source had written at the cut, no line
	// more: it would come twice.
	log := strings.Fields(restored.exec(t, "b", "cat /s/log"))
	for i, line := range log {
		if line != strconv.Itoa(i+1) {
			t.Fatalf("line %d of the open file is %q", i+1, line)
		}
	}
	if id := restored.exec(t, "a", "cat /etc/stasis/identity.json"); !strings.Contains(id, `"`+restored.name+`"`) || !strings.Contains(id, `"`+source.name+`"`) {
		t.Errorf("it is told to be %s", id)
	}
	stats, err := n.runtime.PodSandboxStats(testContext(t), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: restored.sandbox})
	if err != nil || stats.GetStats() == nil {
		t.Errorf("its use of resources: %v", err)
	}

	// A restored Pod is one as any other: it is captured again, and again restored.
	dir, _ = restored.checkpoint(t)
	a = restored.numbers(t, "a", 0)
	again := n.restoreByEngine(t, dir, configs()...)
	continues(t, "a", again.numbers(t, "a", 5)[0], a, 1)
}

func TestContainersOfGVisorThatShareAVolumeAreCapturedAtOneMoment(t *testing.T) {
	n := theNode
	shared := n.sharedDirectory(t, "/s")
	source := n.run(t, gvisorHandler, container("a", turnA, shared), container("b", turnB, shared))
	source.numbers(t, "b", 50)
	dir, _ := source.checkpoint(t)
	shared = n.sharedDirectory(t, "/s")
	restored := n.restoreByEngine(t, dir, container("a", turnA, shared), container("b", turnB, shared))
	a, b := restored.numbers(t, "a", 50), restored.numbers(t, "b", 50)
	if d := a[0] - b[0]; d < -3 || d > 3 { // each may have moved on before it or the other has said so
		t.Errorf("a goes on with %d, b with %d", a[0], b[0])
	}
}

func TestAConnectionWithinAPodOfGVisorGoesOn(t *testing.T) {
	n := theNode
	configs := []*runtimeapi.ContainerConfig{
		container("server", `sleep 100000 | nc -l -p 9000`),
		container("client", `i=0; while :; do i=$((i+1)); echo $i; usleep 10000; done | { until nc 127.0.0.1 9000; do usleep 50000; done; }`),
	}
	source := n.run(t, gvisorHandler, configs...)
	source.numbers(t, "server", 20)
	dir, _ := source.checkpoint(t)
	said := source.numbers(t, "server", 0)
	restored := n.restoreByEngine(t, dir, configs...)
	numbers := restored.numbers(t, "server", 50)
	continues(t, "what is said over the connection", numbers[0], said, 1)
	for i, number := range numbers {
		if number != numbers[0]+i {
			t.Fatalf("after %d comes %d", numbers[i-1], number)
		}
	}
	source.goesOn(t, "server")
}

func TestAContainerOfARestoredPodOfGVisorIsStartedAnew(t *testing.T) {
	n := theNode
	configs := []*runtimeapi.ContainerConfig{container("a", counting), container("b", counting)}
	source := n.run(t, gvisorHandler, configs...)
	source.numbers(t, "a", 20)
	dir, _ := source.checkpoint(t)
	restored := n.restoreByEngine(t, dir, configs...)
	restored.numbers(t, "a", 5)
	ctx := testContext(t)
	_, err := n.runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: restored.containers["a"]})
	must(t, err)
	config := container("a", counting)
	config.Metadata.Attempt, config.LogPath = 1, "a-1.log"
	created, err := n.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: restored.sandbox, Config: config, SandboxConfig: restored.config})
	must(t, err)
	_, err = n.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: created.ContainerId})
	must(t, err)
	if first := restored.numbers(t, "a-1", 5)[0]; first != 1 {
		t.Errorf("it begins with %d", first)
	}
	restored.goesOn(t, "b")
}

func TestWhatGVisorCannotSaveIsRefusedWhileThePodRuns(t *testing.T) {
	n := theNode
	p := n.run(t, gvisorHandler, container("a", counting), container("b", counting))
	tty := container("tty", counting)
	tty.Tty = true
	terminal := n.run(t, gvisorHandler, tty)
	for name, c := range map[string]struct {
		of      *pod
		spoil   func(*runtimeapi.CheckpointPodRequest)
		code    codes.Code
		message string
	}{
		"an unknown option": {p, func(r *runtimeapi.CheckpointPodRequest) { r.Options = map[string]string{"speed": "max"} }, codes.InvalidArgument, `the engine gvisor does not know "speed"; it knows freezeBudget`},
		"no freeze budget":  {p, func(r *runtimeapi.CheckpointPodRequest) { r.Options = map[string]string{"freezeBudget": "1ms"} }, codes.FailedPrecondition, "nothing was frozen"},
		"one of two":        {p, func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds = r.ContainerIds[:1] }, codes.FailedPrecondition, "select all containers"},
		"a terminal":        {terminal, func(*runtimeapi.CheckpointPodRequest) {}, codes.FailedPrecondition, "container tty has a terminal"},
	} {
		t.Run(name, func(t *testing.T) {
			in := c.of.checkpointRequest(t)
			c.spoil(in)
			c.of.refused(t, in, c.code, c.message)
		})
	}
	p.goesOn(t, "a")
	p.goesOn(t, "b")
}

func TestACheckpointOfGVisorIsRestoredByItsHandlerAlone(t *testing.T) {
	n := theNode
	a := container("a", counting)
	source := n.run(t, gvisorHandler, a)
	source.numbers(t, "a", 5)
	dir, _ := source.checkpoint(t)
	before := n.sandboxes(t)
	_, err := n.stasis.RestorePod(testContext(t), &runtimeapi.RestorePodRequest{
		CheckpointPath: dir, Config: sandboxConfig(podName()), RuntimeHandler: handler, ContainerConfigs: []*runtimeapi.ContainerConfig{a},
	})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), `"stasis-gvisor" can`) {
		t.Errorf("got %v", err)
	}
	image := n.host.Path(filepath.Join(dir, "sandbox/checkpoint.img"))
	flipBit(t, image)
	_, err = n.stasis.RestorePod(testContext(t), &runtimeapi.RestorePodRequest{
		CheckpointPath: dir, Config: sandboxConfig(podName()), ContainerConfigs: []*runtimeapi.ContainerConfig{a},
	})
	if status.Code(err) != codes.DataLoss || !strings.Contains(err.Error(), "checkpoint.img") {
		t.Errorf("of an altered image: %v", err)
	}
	if after := n.sandboxes(t); len(after) != len(before) {
		t.Errorf("there are %d sandboxes, before there were %d", len(after), len(before))
	}
}

func TestARestoreThatGVisorRefusesLeavesAPodThatIsStoppedAtOnce(t *testing.T) {
	n := theNode
	source := n.run(t, gvisorHandler, container("a", counting))
	source.numbers(t, "a", 5)
	dir, _ := source.checkpoint(t)
	// The mount is nothing that the checkpoint's container had.
	other := container("a", counting, n.sharedDirectory(t, "/more"))
	p := n.prepareRestoreBy(t, "", dir, other)
	_, err := n.runtime.StartContainer(testContext(t), &runtimeapi.StartContainerRequest{ContainerId: p.containers["a"]})
	if err == nil {
		t.Fatal("it was started")
	}
	if !strings.Contains(err.Error(), `"Mounts" does not match`) {
		t.Errorf("why is not said: %v", err)
	}
	began := time.Now()
	// containerd may not know yet that the sandbox is gone: the kubelet asks again, too.
	eventually(t, "it is stopped", func() bool {
		_, err := n.runtime.StopPodSandbox(testContext(t), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
		if err != nil {
			t.Log(err)
		}
		return err == nil
	})
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("to stop it took %v", took)
	}
}

func TestAPodOfGVisorWhoseCheckpointIsInterruptedByTheAgentsDeathGoesOn(t *testing.T) {
	n := theNode
	p := n.run(t, gvisorHandler, container("a", counting), container("big", `dd if=/dev/zero of=/dev/shm/f bs=1M count=48 2>/dev/null; echo 1; while :; do sleep 1; done`))
	p.numbers(t, "big", 1)
	paused := n.host.Path("/run/stasis/paused")
	p.caught(t, func() bool { return slices.ContainsFunc(names(paused), isEntry) }) // it is being paused
	must(t, n.stopAgent(syscall.SIGKILL))
	p.goesOn(t, "a")
	eventually(t, "the guard has closed the journal's entry", func() bool { return !slices.ContainsFunc(names(paused), isEntry) })
	must(t, n.startAgent())
	dir, _ := p.checkpoint(t)
	if _, err := verify(n, dir); err != nil {
		t.Error(err)
	}
}

func isEntry(name string) bool { return strings.HasSuffix(name, ".json") }

func names(dir string) (all []string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestADeadlineEndsACheckpointOfGVisorAndThePodGoesOn(t *testing.T) {
	n := theNode
	p := n.run(t, gvisorHandler, container("a", counting))
	p.numbers(t, "a", 5)
	for limit := 20 * time.Millisecond; limit <= 100*time.Millisecond; limit += 20 * time.Millisecond {
		in := p.checkpointRequest(t)
		var err error
		eventually(t, "the call before is over", func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			_, err = n.stasis.CheckpointPod(ctx, in)
			return status.Code(err) != codes.Aborted
		})
		if err == nil {
			break // as fast as that
		}
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("a deadline of %v: %v", limit, err)
		}
		p.goesOn(t, "a")
		eventually(t, "its directory is empty, or it was done in the same moment", func() bool {
			if len(n.entries(t, in.OutputPath)) == 0 {
				return true
			}
			_, err := verify(n, in.OutputPath)
			return err == nil
		})
	}
	p.checkpointWhenFree(t)
}
