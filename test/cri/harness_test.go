package cri_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
)

const (
	image   = "localhost/busybox:1"
	handler = "stasis"               // the runtime handler that restores
	scratch = "/var/lib/stasis/test" // on the node, for checkpoints and logs
)

// pod is a sandbox with containers, by name.
type pod struct {
	node       *node
	name       string
	sandbox    string
	config     *runtimeapi.PodSandboxConfig
	configs    []*runtimeapi.ContainerConfig
	containers map[string]string // name to ID
}

func sandboxConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Uid: "uid-" + name, Namespace: "test"},
		Hostname:     name,
		LogDirectory: scratch + "/logs/" + name,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    cgroupParent(name),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}},
		},
	}
}

// container describes one container that runs a shell script.
func container(name, script string, mounts ...*runtimeapi.Mount) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: image},
		Command:  []string{"/bin/sh", "-c", script},
		LogPath:  name + ".log",
		Mounts:   mounts,
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
}

// counting is a script that counts in a shell variable, a hundred times a second
// at most, and prints each value.
const counting = `i=0; while :; do i=$((i+1)); echo $i; usleep 10000; done`

// run starts a Pod of the given containers under a runtime handler.
func (n *node) run(t *testing.T, handler string, configs ...*runtimeapi.ContainerConfig) *pod {
	t.Helper()
	return n.runNamed(t, podName(), handler, configs...)
}

func (n *node) runNamed(t *testing.T, name, handler string, configs ...*runtimeapi.ContainerConfig) *pod {
	t.Helper()
	ctx := testContext(t)
	p := &pod{node: n, name: name, containers: map[string]string{}, configs: configs}
	p.config = sandboxConfig(p.name)
	answer, err := n.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config, RuntimeHandler: handler})
	must(t, err)
	p.sandbox = answer.PodSandboxId
	p.removeAfter(t)
	for _, c := range configs {
		created, err := n.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, Config: c, SandboxConfig: p.config})
		must(t, err)
		p.containers[c.Metadata.Name] = created.ContainerId
	}
	p.start(t)
	return p
}

func (p *pod) start(t *testing.T) {
	t.Helper()
	for _, c := range p.configs {
		_, err := p.node.runtime.StartContainer(testContext(t), &runtimeapi.StartContainerRequest{ContainerId: p.containers[c.Metadata.Name]})
		must(t, err)
	}
}

func (p *pod) removeAfter(t *testing.T) {
	t.Cleanup(func() { p.remove(t) })
}

func (p *pod) remove(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := p.node.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Errorf("stop sandbox: %v", err)
	}
	if _, err := p.node.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Errorf("remove sandbox: %v", err)
	}
	// As the kubelet does it. The next Pod of that name would begin with these lines.
	must(t, os.RemoveAll(p.node.host.Path(p.config.LogDirectory)))
}

func (p *pod) ids() []string {
	var ids []string
	for _, c := range p.configs {
		ids = append(ids, p.containers[c.Metadata.Name])
	}
	return ids
}

// checkpoint captures all of the Pod's containers into a new directory.
func (p *pod) checkpoint(t *testing.T) (dir string, m *checkpoint.Manifest) {
	t.Helper()
	dir = p.node.directory(t)
	_, err := p.node.stasis.CheckpointPod(testContext(t), &runtimeapi.CheckpointPodRequest{
		PodSandboxId: p.sandbox, OutputPath: dir, ContainerIds: p.ids(),
	})
	must(t, err)
	m, err = verify(p.node, dir)
	must(t, err)
	return dir, m
}

func verify(n *node, dir string) (m *checkpoint.Manifest, err error) {
	err = n.host.Do(func() (err error) {
		m, err = checkpoint.Verify(context.Background(), dir, "")
		return err
	})
	return m, err
}

// restore asks for a Pod from a checkpoint and starts its containers.
func (n *node) restore(t *testing.T, dir string, configs ...*runtimeapi.ContainerConfig) *pod {
	t.Helper()
	p := n.prepareRestore(t, dir, configs...)
	p.start(t)
	return p
}

// prepareRestore leaves the containers CREATED.
func (n *node) prepareRestore(t *testing.T, dir string, configs ...*runtimeapi.ContainerConfig) *pod {
	t.Helper()
	return n.prepareRestoreBy(t, handler, dir, configs...)
}

// prepareRestoreBy restores by a runtime handler; empty is the one of the engine.
func (n *node) prepareRestoreBy(t *testing.T, handler, dir string, configs ...*runtimeapi.ContainerConfig) *pod {
	t.Helper()
	name := podName()
	p := &pod{node: n, name: name, config: sandboxConfig(name), configs: configs, containers: map[string]string{}}
	answer, err := n.stasis.RestorePod(testContext(t), &runtimeapi.RestorePodRequest{
		CheckpointPath: dir, Config: p.config, RuntimeHandler: handler, ContainerConfigs: configs,
	})
	must(t, err)
	p.sandbox = answer.PodSandboxId
	p.removeAfter(t)
	for _, c := range answer.RestoredContainers {
		p.containers[c.Name] = c.ContainerId
	}
	return p
}

// directory makes an empty directory on the node.
func (n *node) directory(t *testing.T) string {
	t.Helper()
	var dir string
	must(t, n.host.Do(func() (err error) {
		if err := os.MkdirAll(scratch, 0o700); err != nil {
			return err
		}
		dir, err = os.MkdirTemp(scratch, "checkpoint-")
		return err
	}))
	t.Cleanup(func() { n.host.Do(func() error { return os.RemoveAll(dir) }) })
	return dir
}

// lines reads what a container has printed, without the log's own columns. The last line
// of a log that is being written may be there in part: it is none yet.
func (p *pod) lines(t *testing.T, container string) []string {
	t.Helper()
	data, err := os.ReadFile(p.node.host.Path(filepath.Join(p.config.LogDirectory, container+".log")))
	if os.IsNotExist(err) {
		return nil
	}
	must(t, err)
	var lines []string
	for line := range strings.Lines(string(data)) {
		if !strings.HasSuffix(line, "\n") {
			break
		}
		if parts := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4); len(parts) == 4 {
			lines = append(lines, parts[3])
		}
	}
	return lines
}

// numbers waits until a container has printed at least n numbers.
func (p *pod) numbers(t *testing.T, container string, n int) []int {
	t.Helper()
	var lines []string
	eventually(t, fmt.Sprintf("container %s prints %d numbers", container, n), func() bool {
		lines = p.lines(t, container)
		return len(lines) >= n
	})
	var numbers []int
	for _, line := range lines {
		v, err := strconv.Atoi(line)
		if err != nil {
			t.Fatalf("container %s printed %q", container, line)
		}
		numbers = append(numbers, v)
	}
	return numbers
}

// exec runs a shell command in a container.
func (p *pod) exec(t *testing.T, container, script string) string {
	t.Helper()
	answer, err := p.node.runtime.ExecSync(testContext(t), &runtimeapi.ExecSyncRequest{
		ContainerId: p.containers[container], Cmd: []string{"/bin/sh", "-c", script}, Timeout: 20,
	})
	must(t, err)
	if answer.ExitCode != 0 {
		t.Fatalf("%s: exit code %d: %s", script, answer.ExitCode, answer.Stderr)
	}
	return strings.TrimSpace(string(answer.Stdout))
}

// logged is what the agent has logged of the Pod that contains a text.
func (p *pod) logged(t *testing.T, text string) (lines []string) {
	t.Helper()
	log, err := os.ReadFile(p.node.agentLog)
	must(t, err)
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, p.sandbox) && strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return lines
}

func (p *pod) state(t *testing.T, container string) runtimeapi.ContainerState {
	t.Helper()
	answer, err := p.node.runtime.ContainerStatus(testContext(t), &runtimeapi.ContainerStatusRequest{ContainerId: p.containers[container]})
	must(t, err)
	return answer.Status.State
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	t.Cleanup(cancel)
	return ctx
}

var podCount int

// podName gives every Pod of a run a name of its own.
func podName() string {
	podCount++
	return fmt.Sprintf("pod-%d", podCount)
}

// patience bounds a wait: it is long, for a machine may be busy, and is only used up when
// something is wrong. STASIS_CRI_PATIENCE says how many times longer than usual it is, as
// where the machine is an emulated one.
var patience = func() time.Duration {
	if times, err := strconv.Atoi(os.Getenv("STASIS_CRI_PATIENCE")); err == nil && times > 0 {
		return time.Duration(times) * time.Minute
	}
	return time.Minute
}()

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v in vain until %s", patience, what)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
