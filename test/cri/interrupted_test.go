package cri_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// restoring lists the processes of a sandbox's restores, which the engine marks.
func (p *pod) restoring(t *testing.T) []int {
	t.Helper()
	return marked(t, "STASIS_RESTORE="+p.sandbox+".")
}

// marked lists the processes whose environment holds a text.
func marked(t *testing.T, mark string) (pids []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	must(t, err)
	for _, e := range entries {
		env, err := os.ReadFile("/proc/" + e.Name() + "/environ")
		if pid, isPID := strconv.Atoi(e.Name()); err == nil && isPID == nil && bytes.Contains(env, []byte(mark)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// mounted lists what is mounted on the node by its mount points.
func (n *node) mounted(t *testing.T) string {
	t.Helper()
	var data []byte
	must(t, n.host.Do(func() (err error) {
		data, err = os.ReadFile("/proc/thread-self/mounts")
		return err
	}))
	var points []string
	for line := range strings.Lines(string(data)) {
		points = append(points, strings.Fields(line)[1])
	}
	return strings.Join(points, "\n")
}

// The container runtime kills stasis-runtime when whoever asked it to make a container
// is gone. The OCI runtime and CRIU have then mounted what they need, and restored
// processes that nobody will freeze.
func TestARestoreThatIsKilledInItsMiddleIsEndedAndDoneAgain(t *testing.T) {
	n := theNode
	a := container("a", counting)
	p := n.prepareRestore(t, checkpointOf(t, a), a)
	const reached = "/run/stasis-test-reached"
	// Stopped, it does not answer CRIU's hook, which waits.
	n.at(t, "restore", "echo $PPID > "+reached+".new; mv "+reached+".new "+reached+"; kill -STOP $PPID")
	t.Cleanup(func() { os.Remove(n.host.Path(reached)) })
	started := make(chan error, 1)
	go func() {
		_, err := n.runtime.StartContainer(testContext(t), &runtimeapi.StartContainerRequest{ContainerId: p.containers["a"]})
		started <- err
	}()
	eventually(t, "CRIU waits for its hook", func() bool {
		for _, pid := range p.restoring(t) {
			name, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
			if strings.HasPrefix(filepath.Base(string(name)), "stasis-freeze-hook") {
				return true
			}
		}
		return false
	})
	stopped, err := os.ReadFile(n.host.Path(reached))
	must(t, err)
	pid, err := strconv.Atoi(strings.TrimSpace(string(stopped)))
	must(t, err)
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	if err := <-started; err == nil {
		t.Fatal("the restore was not interrupted")
	}
	eventually(t, "what is left of the restore ends", func() bool { return len(p.restoring(t)) == 0 })
	if mounted := n.mounted(t); strings.Contains(mounted, "/.criu.") || strings.Contains(mounted, "/criu-root") {
		t.Errorf("something is left mounted:\n%s", mounted)
	}
	if lines := p.lines(t, "a"); len(lines) > 0 {
		t.Errorf("it has run: %q", lines)
	}
	p.again(t, container("a", counting))
	if first := p.numbers(t, "a-1", 3)[0]; first == 1 {
		t.Error("made again it was not restored")
	}
	p.fewProcesses(t, 3) // the sandbox's, the shell, its sleep
}

func TestWhatIsMountedBeneathTheFilesOfARestoreOutlivesThem(t *testing.T) {
	n := theNode
	a := container("a", counting)
	p := n.prepareRestore(t, checkpointOf(t, a), a)
	p.start(t)
	p.goesOn(t, "a")
	dir := filepath.Join("/run/stasis/restore", p.sandbox+".work", "a", ".criu.cgyard.test")
	const precious = "/run/stasis-test-precious"
	must(t, n.host.Do(func() error {
		for _, d := range []string{dir, precious} {
			if err := os.MkdirAll(d, 0o700); err != nil {
				return err
			}
		}
		if err := os.WriteFile(precious+"/file", nil, 0o600); err != nil {
			return err
		}
		return syscall.Mount(precious, dir, "", syscall.MS_BIND, "")
	}))
	t.Cleanup(func() { must(t, n.host.Do(func() error { return os.RemoveAll(precious) })) })
	p.remove(t)
	eventually(t, "the sandbox that is gone is forgotten", func() bool { return !p.kept(t) })
	if _, err := os.Stat(n.host.Path(precious + "/file")); err != nil {
		t.Errorf("what was mounted there: %v", err)
	}
	if mounted := n.mounted(t); strings.Contains(mounted, "/.criu.") {
		t.Errorf("it is still mounted:\n%s", mounted)
	}
}

// CRIU restores a container apart from the host's mounts: it must not stay so.
func TestWhatTheHostMountsInAVolumeLaterShowsInARestoredContainer(t *testing.T) {
	n := theNode
	const shared = "/run/stasis-test-shared"
	must(t, n.host.Do(func() error { return os.MkdirAll(shared+"/later", 0o700) }))
	t.Cleanup(func() { must(t, n.host.Do(func() error { return os.RemoveAll(shared) })) })
	config := func() *runtimeapi.ContainerConfig {
		return container("a", counting, &runtimeapi.Mount{
			HostPath: shared, ContainerPath: "/shared", Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
		})
	}
	p := n.restore(t, checkpointOf(t, config()), config())
	p.goesOn(t, "a")
	must(t, n.host.Do(func() error {
		if err := syscall.Mount("none", shared+"/later", "tmpfs", 0, ""); err != nil {
			return err
		}
		return os.WriteFile(shared+"/later/file", nil, 0o600)
	}))
	t.Cleanup(func() { must(t, n.host.Do(func() error { return syscall.Unmount(shared+"/later", 0) })) })
	if out := p.exec(t, "a", "ls /shared/later"); out != "file" {
		t.Errorf("in the container there is %q", out)
	}
}
