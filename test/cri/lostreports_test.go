package cri_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stasis-runtime tells the agent how far a restore has come. These tests are of
// what becomes of it when the agent does not hear that.

// again creates and starts a container a second time, as the kubelet does it: with
// the sandbox's annotations, which ask for a restore. It logs as NAME-1.
func (p *pod) again(t *testing.T, config *runtimeapi.ContainerConfig) {
	t.Helper()
	name := config.Metadata.Name
	status, err := p.node.runtime.PodSandboxStatus(testContext(t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
	must(t, err)
	p.config.Annotations = status.Status.Annotations
	config.Metadata.Attempt = 1
	config.LogPath = name + "-1.log"
	created, err := p.node.runtime.CreateContainer(testContext(t), &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, Config: config, SandboxConfig: p.config})
	must(t, err)
	p.containers[name] = created.ContainerId
	_, err = p.node.runtime.StartContainer(testContext(t), &runtimeapi.StartContainerRequest{ContainerId: created.ContainerId})
	must(t, err)
}

func (p *pod) stop(t *testing.T, container string) {
	t.Helper()
	_, err := p.node.runtime.StopContainer(testContext(t), &runtimeapi.StopContainerRequest{ContainerId: p.containers[container]})
	must(t, err)
}

// saidRestored counts how often the agents have said that the sandbox is restored.
func (p *pod) saidRestored(t *testing.T) int {
	t.Helper()
	return len(p.logged(t, "msg=restored "))
}

// kept says whether anything is kept of the sandbox's restore.
func (p *pod) kept(t *testing.T) bool {
	t.Helper()
	_, err := os.Stat(p.node.host.Path(filepath.Join("/run/stasis/restore", p.sandbox+".json")))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}

// at has a script run, once, when stasis-runtime calls the real OCI runtime with a
// command: "restore", or "resume", which lets a container go. In it $real is the real
// runtime.
func (n *node) at(t *testing.T, command, script string) {
	t.Helper()
	const config, wrapper, done = "/opt/stasis/etc/runtime.json", "/opt/stasis/bin/test-runc", "/run/stasis-test-called"
	var before []byte
	must(t, n.host.Do(func() (err error) {
		if before, err = os.ReadFile(config); err != nil {
			return err
		}
		var installed struct{ Runtime string }
		if err := json.Unmarshal(before, &installed); err != nil {
			return err
		}
		text := fmt.Sprintf("#!/bin/sh\nreal=%s\ncase \"$*\" in *' %s '*) if [ ! -e %s ]; then : > %s; %s; fi;; esac\nexec $real \"$@\"\n",
			installed.Runtime, command, done, done, script)
		return errors.Join(os.WriteFile(wrapper, []byte(text), 0o755), replaceFile(config, fmt.Appendf(nil, "{\"runtime\":%q}\n", wrapper), 0o644))
	}))
	t.Cleanup(func() {
		must(t, n.host.Do(func() error {
			return errors.Join(replaceFile(config, before, 0o644), os.Remove(wrapper), os.Remove(done))
		}))
	})
}

// replaceFile puts a file in the place of another in one step: whoever reads it meanwhile
// reads the one or the other.
func replaceFile(name string, data []byte, mode os.FileMode) error {
	return errors.Join(os.WriteFile(name+".new", data, mode), os.Rename(name+".new", name))
}

// startWhile starts a restored container, and does something just before it is let go.
func (p *pod) startWhile(t *testing.T, container string, do func()) {
	t.Helper()
	const reached, goOn = "/run/stasis-test-reached", "/run/stasis-test-go-on"
	p.node.at(t, "resume", fmt.Sprintf(": > %s; while [ ! -e %s ]; do sleep 0.02; done; rm %s %s", reached, goOn, reached, goOn))
	started := make(chan error, 1)
	go func() {
		_, err := p.node.runtime.StartContainer(testContext(t), &runtimeapi.StartContainerRequest{ContainerId: p.containers[container]})
		started <- err
	}()
	eventually(t, "the container is about to be let go", func() bool {
		_, err := os.Stat(p.node.host.Path(reached))
		return err == nil
	})
	do()
	began := time.Now()
	must(t, os.WriteFile(p.node.host.Path(goOn), nil, 0o600))
	must(t, <-started)
	// An agent that does not answer is waited for 2 s; without a bound it would be minutes.
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("the start took %v", took)
	}
}

func TestAContainerThatWasStartedWhileTheAgentWasAwayIsNotRestoredAgain(t *testing.T) {
	n := theNode
	for name, away := range map[string]struct{ begin, end func() }{
		"killed": {
			func() { must(t, n.stopAgent(syscall.SIGKILL)) },
			func() { must(t, n.startAgent()) },
		},
		"stopped, and killed before it heard": {
			func() {
				pid, err := n.agentPID()
				must(t, err)
				must(t, syscall.Kill(pid, syscall.SIGSTOP))
			},
			func() {
				must(t, n.stopAgent(syscall.SIGKILL))
				must(t, n.startAgent())
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := container("a", counting)
			p := n.prepareRestore(t, checkpointOf(t, a), a)
			p.startWhile(t, "a", away.begin)
			p.goesOn(t, "a")
			p.stop(t, "a") // nothing of it is left when the agent is back
			if p.saidRestored(t) != 0 {
				t.Error("the agent has heard of it")
			}
			away.end()
			p.again(t, container("a", counting))
			if first := p.numbers(t, "a-1", 3)[0]; first != 1 {
				t.Errorf("started again it went on at %d", first)
			}
			eventually(t, "the agent knows that it is restored", func() bool { return p.saidRestored(t) > 0 })
			must(t, n.stopAgent(syscall.SIGTERM))
			must(t, n.startAgent())
			if times := p.saidRestored(t); times != 1 {
				t.Errorf("it was said %d times that it is restored", times)
			}
		})
	}
}

func TestASandboxThatIsRemovedWhileTheAgentIsAwayIsForgotten(t *testing.T) {
	n := theNode
	a, b := container("a", counting), container("b", counting)
	dir := checkpointOf(t, a, b)
	var pods []*pod
	for range 2 { // half of each is restored
		p := n.prepareRestore(t, dir, a, b)
		p.configs = p.configs[:1]
		p.start(t)
		pods = append(pods, p)
	}
	must(t, n.stopAgent(syscall.SIGKILL))
	gone, there := pods[0], pods[1]
	gone.remove(t)
	if !gone.kept(t) {
		t.Fatal("nothing is kept: there is nothing to forget")
	}
	must(t, n.startAgent())
	eventually(t, "the sandbox that is gone is forgotten", func() bool { return !gone.kept(t) })
	if !there.kept(t) {
		t.Error("one that is there is forgotten too")
	}
	there.configs = []*runtimeapi.ContainerConfig{b}
	there.start(t)
	there.goesOn(t, "b")
	eventually(t, "the agent knows that it is restored", func() bool { return there.saidRestored(t) == 1 })
}

// A start that is interrupted is one that failed: containerd ends the container and
// the kubelet makes it again.
func TestAContainerWhoseStartIsInterruptedIsRestoredAgainUnlessItRanBesideAnother(t *testing.T) {
	const before, after = `kill -9 $PPID; exit 1`, `$real "$@"; kill -9 $PPID; exit 0`
	for name, c := range map[string]struct {
		script                string
		ran, beside, restored bool
	}{
		"before it ran":                 {before, false, false, true},
		"before it ran, beside another": {before, false, true, true},
		"when it ran":                   {after, true, false, true},
		"when it ran, beside another":   {after, true, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := container("a", counting), container("b", counting)
			configs := []*runtimeapi.ContainerConfig{a}
			if c.beside {
				configs = append(configs, b)
			}
			p := theNode.prepareRestore(t, checkpointOf(t, configs...), configs...)
			if c.beside {
				p.configs = configs[1:]
				p.start(t)
				p.goesOn(t, "b")
			}
			theNode.at(t, "resume", c.script)
			_, err := theNode.runtime.StartContainer(testContext(t), &runtimeapi.StartContainerRequest{ContainerId: p.containers["a"]})
			if err == nil {
				t.Fatal("the start was not interrupted")
			}
			t.Log(err)
			if len(p.lines(t, "a")) > 0 && !c.ran {
				t.Error("it has run")
			}
			p.again(t, container("a", counting))
			if first := p.numbers(t, "a-1", 3)[0]; (first > 1) != c.restored {
				t.Errorf("made again it goes on at %d", first)
			}
			eventually(t, "the agent knows that it is restored", func() bool { return p.saidRestored(t) == 1 })
		})
	}
}

// fewProcesses waits until there are no more than so many: one that was killed takes a
// moment to end, and one that was forgotten stays.
func (p *pod) fewProcesses(t *testing.T, most int) {
	t.Helper()
	eventually(t, fmt.Sprintf("of the processes in the Pod's containers no more than %d are left", most), func() bool {
		return len(p.processes(t)) <= most
	})
}

// What a killed stasis-runtime had restored is in nobody's books.
func TestAContainerWhoseRestoreIsInterruptedLeavesNothingBehind(t *testing.T) {
	for name, then := range map[string]func(*testing.T, *pod){
		"it is made again": func(t *testing.T, p *pod) {
			p.again(t, container("a", counting))
			if first := p.numbers(t, "a-1", 3)[0]; first == 1 {
				t.Error("made again it was not restored")
			}
			p.fewProcesses(t, 3) // the sandbox's, the shell, its sleep
		},
		"its sandbox ends": func(*testing.T, *pod) {},
	} {
		t.Run(name, func(t *testing.T) {
			a := container("a", counting)
			p := theNode.prepareRestore(t, checkpointOf(t, a), a)
			theNode.at(t, "restore", `$real "$@"; kill -9 $PPID; exit 0`)
			_, err := theNode.runtime.StartContainer(testContext(t), &runtimeapi.StartContainerRequest{ContainerId: p.containers["a"]})
			if err == nil {
				t.Fatal("the restore was not interrupted")
			}
			t.Log(err, p.processes(t))
			then(t, p)
			p.remove(t)
			p.fewProcesses(t, 0)
		})
	}
}
