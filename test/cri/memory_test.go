package cri_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/pages/lazy"
)

// Memory that is given to processes while they run, on real runc and CRIU. The agent
// streams slowly (main_test.go), so that most of it is not there when it is asked for.

const weaverMiB = 64

// weaver is a container that fills so much memory and checks it when it is told to.
func weaver(t *testing.T, mib int) (config *runtimeapi.ContainerConfig, tell func(how string)) {
	t.Helper()
	dir := theNode.directory(t)
	on := theNode.host.Path(dir)
	data, err := os.ReadFile(built(t, "weaver"))
	must(t, err)
	must(t, os.WriteFile(on+"/weaver", data, 0o755))
	config = container("a", fmt.Sprintf("exec /w/weaver %d /w", mib), &runtimeapi.Mount{HostPath: dir, ContainerPath: "/w"})
	return config, func(how string) {
		must(t, os.WriteFile(on+"/go.new", []byte(how+"\n"), 0o600))
		must(t, os.Rename(on+"/go.new", on+"/go"))
	}
}

// restoreWith restores with an option for memory and starts the containers.
func (n *node) restoreWith(t *testing.T, memory, dir string, configs ...*runtimeapi.ContainerConfig) *pod {
	t.Helper()
	name := podName()
	p := &pod{node: n, name: name, config: sandboxConfig(name), configs: configs, containers: map[string]string{}}
	answer, err := n.stasis.RestorePod(testContext(t), &runtimeapi.RestorePodRequest{
		CheckpointPath: dir, Config: p.config, RuntimeHandler: handler, ContainerConfigs: configs, Options: map[string]string{"memory": memory},
	})
	must(t, err)
	p.sandbox = answer.PodSandboxId
	p.removeAfter(t)
	for _, c := range answer.RestoredContainers {
		p.containers[c.Name] = c.ContainerId
	}
	p.start(t)
	return p
}

// memory is how far the memory of a container has come.
func (p *pod) memory(t *testing.T, container string) lazy.Status {
	t.Helper()
	s, err := lazy.ReadStatus(p.node.host.Path("/run/stasis/restore/" + p.sandbox + ".work/" + container))
	must(t, err)
	return s
}

// says waits for a line that a container prints.
func (p *pod) says(t *testing.T, container, want string) {
	t.Helper()
	var lines []string
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(p.node.host.Path("/run/stasis/restore/" + p.sandbox + ".work/" + container + "/memory.log"))
			answer, _ := p.node.runtime.ContainerStatus(testContext(t), &runtimeapi.ContainerStatusRequest{ContainerId: p.containers[container]})
			t.Log(answer)
			t.Logf("its last lines: %q\n%+v\n%s", lines[max(0, len(lines)-5):], p.memory(t, container), log)
		}
	})
	eventually(t, container+" says "+want, func() bool {
		lines = p.lines(t, container)
		for _, line := range lines {
			if strings.Contains(line, "BAD") {
				t.Fatalf("it says: %s", line)
			}
			if line == want {
				return true
			}
		}
		return false
	})
}

func weaverCheckpoint(t *testing.T) (dir string, config *runtimeapi.ContainerConfig, tell func(string)) {
	t.Helper()
	config, tell = weaver(t, weaverMiB)
	return checkpointOf(t, config), config, tell
}

func TestProcessesThatRunBeforeTheyHaveTheirMemoryNeverMissIt(t *testing.T) {
	dir, a, tell := weaverCheckpoint(t)
	p := theNode.restoreWith(t, "lazy", dir, a)
	var s lazy.Status
	eventually(t, "it is known how much memory it is", func() bool { s = p.memory(t, "a"); return s.Total > 0 })
	if s.Stage != lazy.StageServing || s.Total < weaverMiB<<20/7*6 || s.Given > s.Total/2 {
		t.Errorf("%+v: it was to run before most of it is there", s)
	}
	tell("weave")
	for _, what := range []string{"write", "madvise", "fork", "mremap", "munmap", "mprotect", "threads"} {
		p.says(t, "a", "done "+what)
	}
	p.says(t, "a", "end good")
	eventually(t, "all is there", func() bool { return p.memory(t, "a").Stage == lazy.StageComplete })
	eventually(t, "those who gave it have ended", func() bool { return len(memoryProcesses(t, p.containers["a"])) == 0 })
	if p.state(t, "a") != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Error("it does not run any more")
	}
}

// memoryProcesses are those that give a container its memory: the keeper first.
func memoryProcesses(t *testing.T, id string) (pids []int) {
	t.Helper()
	for _, command := range []string{"stasis-memory-keeper", "stasis-memory-server"} {
		entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
		must(t, err)
		for _, e := range entries {
			data, err := os.ReadFile(e)
			if err != nil || !strings.Contains(string(data), command) {
				continue
			}
			var pid int
			fmt.Sscanf(e, "/proc/%d/cmdline", &pid)
			environ, _ := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
			if strings.Contains(string(data), id) || command == "stasis-memory-keeper" && strings.HasSuffix(environ, ".work/a") {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// eachPages opens the files of pages of container a of a checkpoint.
func eachPages(t *testing.T, dir string, do func(f *os.File, size int64)) {
	t.Helper()
	names, err := filepath.Glob(theNode.host.Path(dir) + "/containers/a/criu/pages-*.img")
	must(t, err)
	for _, name := range names {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		must(t, err)
		info, err := f.Stat()
		must(t, err)
		do(f, info.Size())
		must(t, f.Close())
	}
}

// flipAt turns the lowest bit of a byte.
func flipAt(t *testing.T, f *os.File, at int64) {
	t.Helper()
	var b [1]byte
	_, err := f.ReadAt(b[:], at)
	must(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], at)
	must(t, err)
}

func TestAContainerWhoseMemoryCannotBeGivenIsKilledAndNeverRunsOnAnythingElse(t *testing.T) {
	for name, c := range map[string]struct {
		lose    func(t *testing.T, dir string, p *pod)
		message string
	}{
		"a bit of it flipped": {func(t *testing.T, dir string, p *pod) {
			eachPages(t, dir, func(f *os.File, size int64) {
				for at := int64(0); at < size; at += checkpoint.BlockSize {
					flipAt(t, f, at)
				}
			})
		}, "are not what was written"},
		"its server killed": {func(t *testing.T, _ string, p *pod) {
			pids := memoryProcesses(t, p.containers["a"])
			if len(pids) != 2 {
				t.Fatalf("processes %v", pids)
			}
			must(t, syscall.Kill(pids[1], syscall.SIGKILL))
		}, "is gone"},
		"its keeper killed": {func(t *testing.T, _ string, p *pod) {
			pids := memoryProcesses(t, p.containers["a"])
			if len(pids) != 2 {
				t.Fatalf("processes %v", pids)
			}
			must(t, syscall.Kill(pids[0], syscall.SIGKILL))
		}, "were killed"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, a, tell := weaverCheckpoint(t)
			p := theNode.restoreWith(t, "lazy", dir, a)
			c.lose(t, dir, p)
			tell("check")
			eventually(t, "it is killed", func() bool { return p.state(t, "a") == runtimeapi.ContainerState_CONTAINER_EXITED })
			eventually(t, "it is known why", func() bool {
				s := p.memory(t, "a")
				return s.Stage == lazy.StageLost && strings.Contains(s.Message, c.message)
			})
			for _, line := range p.lines(t, "a") {
				if strings.Contains(line, "BAD") || strings.Contains(line, "end") {
					t.Errorf("it said %s", line)
				}
			}
			eventually(t, "nobody holds its memory", func() bool { return len(memoryProcesses(t, p.containers["a"])) == 0 })
		})
	}
}

func TestAPodThatIsRemovedBeforeItHasItsMemoryLeavesNothing(t *testing.T) {
	dir, a, _ := weaverCheckpoint(t)
	p := theNode.restoreWith(t, "lazy", dir, a)
	if len(memoryProcesses(t, p.containers["a"])) != 2 {
		t.Error("nobody gives it its memory")
	}
	_, err := theNode.runtime.StopPodSandbox(testContext(t), &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox})
	must(t, err)
	eventually(t, "nobody holds its memory", func() bool { return len(memoryProcesses(t, p.containers["a"])) == 0 })
}

func TestTheAgentsEndDoesNotKeepAContainerFromItsMemory(t *testing.T) {
	dir, a, tell := weaverCheckpoint(t)
	p := theNode.restoreWith(t, "lazy", dir, a)
	must(t, theNode.stopAgent(syscall.SIGKILL))
	tell("check")
	p.says(t, "a", "end good")
	must(t, theNode.startAgent())
}

func TestMemoryThatIsLittleIsThereBeforeTheFirstInstruction(t *testing.T) {
	dir, a, tell := weaverCheckpoint(t)
	p := theNode.restoreWith(t, "auto", dir, a)
	if s := p.memory(t, "a"); s.Stage != "" {
		t.Errorf("%+v", s)
	}
	tell("check")
	p.says(t, "a", "end good")
}

func TestACheckpointWaitsUntilAllMemoryIsThere(t *testing.T) {
	dir, a, tell := weaverCheckpoint(t)
	p := theNode.restoreWith(t, "lazy", dir, a)
	began := time.Now()
	again, _ := p.checkpoint(t)
	if s := p.memory(t, "a"); s.Stage != lazy.StageComplete {
		t.Errorf("%+v", s)
	}
	t.Logf("waited for %v", time.Since(began))
	second := theNode.restoreWith(t, "eager", again, a)
	tell("check")
	second.says(t, "a", "end good")
}

// P23. Of so much memory a check goes on while CRIU brings it; RestorePod says before what
// is wrong.
func TestMuchMemoryThatIsNotWhatWasWrittenIsRefusedUntilItIsWholeAgain(t *testing.T) {
	a, tell := weaver(t, 160)
	dir := checkpointOf(t, a)
	flip := func() {
		t.Helper()
		eachPages(t, dir, func(f *os.File, size int64) {
			if size > 64<<20 {
				flipAt(t, f, size-1)
			}
		})
	}
	flip()
	before := theNode.sandboxes(t)
	name := podName()
	_, err := theNode.stasis.RestorePod(testContext(t), &runtimeapi.RestorePodRequest{
		CheckpointPath: dir, Config: sandboxConfig(name), RuntimeHandler: handler, ContainerConfigs: []*runtimeapi.ContainerConfig{a},
		Options: map[string]string{"memory": "eager"},
	})
	if err == nil || !strings.Contains(err.Error(), "are not what was written") {
		t.Errorf("got %v", err)
	}
	if after := theNode.sandboxes(t); !maps.Equal(before, after) {
		t.Errorf("of sandboxes %v there were, %v are left", before, after)
	}
	flip()
	p := theNode.restoreWith(t, "eager", dir, a)
	tell("check")
	p.says(t, "a", "end good")
}
