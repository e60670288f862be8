package cri_test

import (
	"context"
	"io"
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
)

// The sentences of CheckpointPod and CheckpointPodRequest in cri-api v0.37's
// api.proto, one test each (C1).

// checkpointRequest is a valid request, to be spoilt.
func (p *pod) checkpointRequest(t *testing.T) *runtimeapi.CheckpointPodRequest {
	return &runtimeapi.CheckpointPodRequest{PodSandboxId: p.sandbox, OutputPath: p.node.directory(t), ContainerIds: p.ids()}
}

// refused makes a call that must fail with a code and a message, leave the output
// directory there and empty, and the source running.
func (p *pod) refused(t *testing.T, in *runtimeapi.CheckpointPodRequest, code codes.Code, message string) {
	t.Helper()
	_, err := p.node.stasis.CheckpointPod(testContext(t), in)
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), message) {
		t.Errorf("got %v, want code %v and a message with %q", err, code, message)
	}
}

func (n *node) entries(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(n.host.Path(dir))
	must(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// goesOn checks that a counting container counts on, without a gap in its counts.
func (p *pod) goesOn(t *testing.T, container string) {
	t.Helper()
	before := len(p.lines(t, container))
	numbers := p.numbers(t, container, before+5)
	for i := 1; i < len(numbers); i++ {
		if numbers[i] != numbers[i-1]+1 {
			t.Fatalf("container %s went from %d to %d", container, numbers[i-1], numbers[i])
		}
	}
}

func TestCheckpointPodRefusesRequestsThatBreakItsContract(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	other := theNode.run(t, "", container("b", counting))
	ended := theNode.run(t, "", container("c", "exit 0"), container("d", counting))
	eventually(t, "container c has ended", func() bool {
		return ended.state(t, "c") == runtimeapi.ContainerState_CONTAINER_EXITED
	})
	for name, c := range map[string]struct {
		spoil   func(*runtimeapi.CheckpointPodRequest)
		code    codes.Code
		message string
	}{
		"no sandbox ID":                   {func(r *runtimeapi.CheckpointPodRequest) { r.PodSandboxId = "" }, codes.InvalidArgument, "pod_sandbox_id"},
		"sandbox that does not exist":     {func(r *runtimeapi.CheckpointPodRequest) { r.PodSandboxId = "nosuch" }, codes.NotFound, "nosuch"},
		"no containers":                   {func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds = nil }, codes.InvalidArgument, "container_ids is empty"},
		"a container twice":               {func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds = append(r.ContainerIds, r.ContainerIds[0]) }, codes.InvalidArgument, "repeated"},
		"a container of another sandbox":  {func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds = other.ids() }, codes.InvalidArgument, "belongs to sandbox"},
		"a container that does not exist": {func(r *runtimeapi.CheckpointPodRequest) { r.ContainerIds = []string{"nosuch"} }, codes.NotFound, "nosuch"},
		"a container that has ended": {func(r *runtimeapi.CheckpointPodRequest) {
			r.PodSandboxId, r.ContainerIds = ended.sandbox, ended.ids()
		}, codes.FailedPrecondition, "container c"},
		"an unknown option":        {func(r *runtimeapi.CheckpointPodRequest) { r.Options = map[string]string{"speed": "max"} }, codes.InvalidArgument, `"speed"`},
		"a relative output path":   {func(r *runtimeapi.CheckpointPodRequest) { r.OutputPath = "some/dir" }, codes.InvalidArgument, "absolute"},
		"an output path with ..":   {func(r *runtimeapi.CheckpointPodRequest) { r.OutputPath += "/../x" }, codes.InvalidArgument, "absolute"},
		"an output path not there": {func(r *runtimeapi.CheckpointPodRequest) { r.OutputPath += "/nosuch" }, codes.InvalidArgument, "does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			in := p.checkpointRequest(t)
			c.spoil(in)
			p.refused(t, in, c.code, c.message)
		})
	}
	p.goesOn(t, "a")
}

func TestCheckpointPodRequiresADeadline(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	_, err := theNode.stasis.CheckpointPod(context.Background(), p.checkpointRequest(t))
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("got %v", err)
	}
}

func TestCheckpointPodRefusesADirectoryThatIsNotEmptyAndTouchesNothingInIt(t *testing.T) {
	p := theNode.run(t, "", container("a", counting))
	in := p.checkpointRequest(t)
	must(t, os.WriteFile(theNode.host.Path(in.OutputPath+"/mine"), []byte("x"), 0o600))
	p.refused(t, in, codes.InvalidArgument, "not empty")
	if got := theNode.entries(t, in.OutputPath); !slices.Equal(got, []string{"mine"}) {
		t.Errorf("the directory holds %v", got)
	}
}

func TestCheckpointPodThatOutlastsItsDeadlineThawsThePodAndLeavesAnEmptyDirectory(t *testing.T) {
	// 100 MB of shell variable keep CRIU busy past any of the deadlines, which fall
	// into every part of its work.
	p := theNode.run(t, "", container("a", counting), container("big", `x=$(head -c 50000000 /dev/zero | tr '\0' a); echo 1; while :; do usleep 1000; done`))
	p.numbers(t, "big", 1)
	for limit := 30 * time.Millisecond; limit < 240*time.Millisecond; limit += 10 * time.Millisecond {
		in := p.checkpointRequest(t)
		var err error
		// The caller's time is up a moment before the call before this one is over.
		eventually(t, "the call before is over", func() bool {
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			_, err = theNode.stasis.CheckpointPod(ctx, in)
			return status.Code(err) != codes.Aborted
		})
		if err == nil {
			continue
		}
		if status.Code(err) != codes.DeadlineExceeded {
			t.Fatalf("limit %v: got %v", limit, err)
		}
		eventually(t, "the directory is empty", func() bool { return len(theNode.entries(t, in.OutputPath)) == 0 })
		p.goesOn(t, "a")
		if s := p.state(t, "big"); s != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Fatalf("limit %v: container big is %v", limit, s)
		}
	}
	// The Pod is as good as before.
	p.checkpointWhenFree(t)
}

// checkpointWhenFree captures the Pod when a call before, whose caller's time was up, is over.
func (p *pod) checkpointWhenFree(t *testing.T) {
	t.Helper()
	in := p.checkpointRequest(t)
	eventually(t, "the call before is over", func() bool {
		_, err := p.node.stasis.CheckpointPod(testContext(t), in)
		if status.Code(err) == codes.Aborted {
			return false
		}
		must(t, err)
		return true
	})
	_, err := verify(p.node, in.OutputPath)
	must(t, err)
}

func TestCheckpointPodCapturesExactlyTheSelectedContainers(t *testing.T) {
	p := theNode.run(t, "", container("a", counting), container("b", counting))
	in := p.checkpointRequest(t)
	in.ContainerIds = []string{p.containers["b"]}
	_, err := theNode.stasis.CheckpointPod(testContext(t), in)
	must(t, err)
	m, err := verify(theNode, in.OutputPath)
	must(t, err)
	if len(m.Containers) != 1 || m.Containers[0].Name != "b" {
		t.Errorf("it holds %+v", m.Containers)
	}
	p.goesOn(t, "a")
	p.goesOn(t, "b")
}

// Two containers take turns over a file: a writes an odd number when it has read
// the even one below it, b the other way round. At one moment their variables
// differ by one at most; captured at two moments they would not.
const (
	turnA = `i=0; echo 0 > /s/n; while :; do read n < /s/n; if [ "$n" = $i ]; then i=$((i+2)); echo $((i-1)) > /s/t; mv /s/t /s/n; echo $i; fi; done`
	turnB = `i=1; while :; do read n < /s/n; if [ "$n" = $i ]; then echo $((i+1)) > /s/u; mv /s/u /s/n; i=$((i+2)); echo $i; fi; done`
)

// sharedDirectory is what the kubelet would mount for an emptyDir.
func (n *node) sharedDirectory(t *testing.T, at string) *runtimeapi.Mount {
	dir := filepath.Join(n.directory(t), "kubernetes.io~empty-dir", "shared")
	must(t, os.MkdirAll(n.host.Path(dir), 0o777))
	return &runtimeapi.Mount{HostPath: dir, ContainerPath: at}
}

func TestAllContainersAreCapturedAtOneMoment(t *testing.T) {
	n := theNode
	shared := n.sharedDirectory(t, "/s")
	source := n.run(t, "", container("a", turnA, shared), container("b", turnB, shared))
	for round := range 3 {
		source.numbers(t, "b", 50*(round+1))
		dir, _ := source.checkpoint(t)
		shared := n.sharedDirectory(t, "/s")
		restored := n.restore(t, dir, container("a", turnA, shared), container("b", turnB, shared))
		// They only go on if what a has in memory, what b has and what is in the
		// file are of the same moment: each waits for exactly the other's number.
		a, b := restored.numbers(t, "a", 50), restored.numbers(t, "b", 50)
		if d := a[0] - b[0]; d < -3 || d > 3 {
			t.Errorf("a went on at %d, b at %d", a[0], b[0])
		}
		restored.remove(t)
	}
}

// caught begins checkpoints until one is met at a moment that is looked for, in its freeze
// window as a rule: on a fast machine one may be over before anybody looks. What becomes of
// that one is sent.
func (p *pod) caught(t *testing.T, moment func() bool) <-chan error {
	t.Helper()
	for range 50 {
		in, ctx, stasis, ended := p.checkpointRequest(t), testContext(t), p.node.stasis, make(chan error, 1)
		go func() {
			_, err := stasis.CheckpointPod(ctx, in)
			ended <- err
		}()
		for over := false; !over; {
			if moment() {
				return ended
			}
			select {
			case err := <-ended:
				must(t, err)
				over = true
			case <-time.After(time.Millisecond):
			}
		}
	}
	t.Fatal("no checkpoint was met at that moment")
	return nil
}

// capturing lists the processes of a sandbox's captures, which the engine marks.
func (p *pod) capturing(t *testing.T) []int {
	t.Helper()
	return marked(t, "STASIS_CAPTURE="+p.sandbox)
}

func TestAPodWhoseAgentIsKilledInTheFreezeWindowRunsOn(t *testing.T) {
	n := theNode
	p := n.run(t, "", container("a", counting), container("big", `x=$(head -c 50000000 /dev/zero | tr '\0' a); echo 1; while :; do usleep 1000; done`))
	p.numbers(t, "big", 1)
	interrupted := 0
	for after := 40 * time.Millisecond; after < 220*time.Millisecond; after += 20 * time.Millisecond {
		in := p.checkpointRequest(t)
		done := make(chan error, 1)
		go func() {
			_, err := n.stasis.CheckpointPod(testContext(t), in)
			done <- err
		}()
		time.Sleep(after)
		must(t, n.stopAgent(syscall.SIGKILL))
		switch err := <-done; {
		case status.Code(err) == codes.Unavailable:
			interrupted++
		case err != nil: // else it was over, as on a fast machine
			t.Errorf("the call ended with %v", err)
		}
		// No other agent is there yet: its guard lets the Pod go, within 2 s.
		thawed := time.Now()
		for n.frozen(t, p) {
			if time.Since(thawed) > 2*time.Second {
				t.Fatalf("killed after %v: the Pod is still frozen 2 s later", after)
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Logf("killed after %v: thawed %v later", after, time.Since(thawed).Round(time.Millisecond))
		p.goesOn(t, "a")
		if s := p.state(t, "big"); s != runtimeapi.ContainerState_CONTAINER_RUNNING {
			t.Fatalf("killed after %v: container big is %v", after, s)
		}
		must(t, n.startAgent())
		if left := n.entries(t, in.OutputPath); len(left) > 0 {
			t.Logf("left for the directory's owner to remove: %v", left)
		}
	}
	if interrupted == 0 {
		t.Error("no call was interrupted: the test showed nothing")
	}
	p.checkpoint(t)
}

func TestAPodThatNobodyThawedIsThawedByTheNextAgent(t *testing.T) {
	n := theNode
	p := n.run(t, "", container("a", counting), container("big", `x=$(head -c 50000000 /dev/zero | tr '\0' a); echo 1; while :; do usleep 1000; done`))
	p.numbers(t, "big", 1)
	for try := 1; ; try++ {
		guard := n.guardPID(t)
		p.caught(t, func() bool { return n.frozen(t, p) && len(p.capturing(t)) > 0 })
		must(t, syscall.Kill(guard, syscall.SIGSTOP))
		must(t, n.stopAgent(syscall.SIGKILL))
		must(t, syscall.Kill(guard, syscall.SIGKILL))
		eventually(t, "CRIU is done, and leaves the freezer as it was", func() bool { return len(p.capturing(t)) == 0 })
		if n.frozen(t, p) {
			break
		}
		if try == 10 {
			t.Fatal("the Pod runs: there was nothing to thaw")
		}
		must(t, n.startAgent()) // the one before had thawed it in the same moment
	}
	must(t, n.startAgent())
	p.goesOn(t, "a")
	p.checkpoint(t)
}

// A container's log is a pipe that containerd's shim reads; both go with the Pod.
func TestAGuardThatCannotLogThawsAllTheSame(t *testing.T) {
	n := theNode
	must(t, n.stopAgent(syscall.SIGTERM))
	read, write, err := os.Pipe()
	must(t, err)
	go io.Copy(io.Discard, read)
	must(t, n.startAgentWithLog(write))
	write.Close()
	p := n.run(t, "", container("a", counting), container("big", `x=$(head -c 50000000 /dev/zero | tr '\0' a); echo 1; while :; do usleep 1000; done`))
	p.numbers(t, "big", 1)
	agent, err := n.agentPID()
	must(t, err)
	p.caught(t, func() bool { return n.frozen(t, p) })
	read.Close()
	if err := syscall.Kill(agent, syscall.SIGKILL); err != nil && err != syscall.ESRCH { // it may have logged, and died of it
		t.Fatal(err)
	}
	n.agent.Wait()
	p.goesOn(t, "a")
	must(t, n.startAgent())
}

func TestAnAgentThatLosesItsGuardEnds(t *testing.T) {
	n := theNode
	must(t, syscall.Kill(n.guardPID(t), syscall.SIGKILL))
	ended := make(chan error, 1)
	go func() { ended <- n.agent.Wait() }()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("it ended as if all was well")
		}
	case <-time.After(patience):
		t.Fatal("it goes on without")
	}
	must(t, n.startAgent())
}

// guardPID is the guard of the agent that runs.
func (n *node) guardPID(t *testing.T) int {
	t.Helper()
	agent, err := n.agentPID()
	must(t, err)
	children, err := os.ReadDir("/proc")
	must(t, err)
	for _, d := range children {
		stat, err := os.ReadFile("/proc/" + d.Name() + "/stat")
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		cmdline, _ := os.ReadFile("/proc/" + d.Name() + "/cmdline")
		if fields[1] == strconv.Itoa(agent) && strings.Contains(string(cmdline), "stasis-guard") {
			pid, err := strconv.Atoi(d.Name())
			must(t, err)
			return pid
		}
	}
	t.Fatal("the agent has no guard")
	return 0
}

// frozen says whether any container of a Pod stands still.
func (n *node) frozen(t *testing.T, p *pod) bool {
	t.Helper()
	for _, id := range p.containers {
		if state := p.cgroupFile(t, id, "freezer", "freezer.state", "cgroup.freeze"); state != "THAWED" && state != "0" {
			return true
		}
	}
	return false
}

// quota reads a container's CPU limit in microseconds each 100 ms; -1 is none.
func (p *pod) quota(t *testing.T, container string) int {
	t.Helper()
	text, _, _ := strings.Cut(p.cgroupFile(t, p.containers[container], "cpu", "cpu.cfs_quota_us", "cpu.max"), " ")
	if text == "max" {
		return -1
	}
	v, err := strconv.Atoi(text)
	must(t, err)
	return v
}

func TestABusyContainerUnderACPULimitFreezesAndHasItsLimitBackAfter(t *testing.T) {
	// Five processes that want all of 1% of a core: each is being held back nearly
	// always.
	busy := container("busy", `spin() { while :; do :; done; }; spin & spin & spin & spin & spin`)
	busy.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100_000, CpuQuota: 1_000}
	p := theNode.run(t, "", busy, container("a", counting))
	time.Sleep(time.Second) // so that all of them spin
	for range 3 {
		p.checkpoint(t)
		if q := p.quota(t, "busy"); q != 1_000 {
			t.Fatalf("its limit is %d after a checkpoint", q)
		}
	}
}
