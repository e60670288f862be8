package cri_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
)

// built makes a program of a directory beside this one and says where it is.
func built(t *testing.T, dir string) string {
	t.Helper()
	if given := os.Getenv("STASIS_CRI_PROGRAMS"); given != "" { // where none can be made
		return filepath.Join(given, dir)
	}
	program := filepath.Join(t.TempDir(), dir)
	build := exec.Command("./program.sh", dir, program)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v: %s", build, err, out)
	}
	return program
}

// running describes a container that runs a program of a directory beside this one.
func (n *node) running(t *testing.T, name, program string, args ...string) *runtimeapi.ContainerConfig {
	t.Helper()
	onNode := filepath.Join(n.directory(t), program)
	data, err := os.ReadFile(built(t, program))
	must(t, err)
	must(t, n.host.Do(func() error { return os.WriteFile(onNode, data, 0o755) }))
	c := container(name, "", &runtimeapi.Mount{HostPath: onNode, ContainerPath: "/bin/" + program, Readonly: true})
	c.Command = append([]string{"/bin/" + program}, args...)
	return c
}

// hammer describes a container that runs test/cri/hammer.
func (n *node) hammer(t *testing.T, name string, mebibytes int) *runtimeapi.ContainerConfig {
	t.Helper()
	return n.running(t, name, "hammer", strconv.Itoa(mebibytes))
}

// rounds waits until a hammer has done some more rounds, and nothing is wrong with it.
func (p *pod) rounds(t *testing.T, container string, more int) {
	t.Helper()
	last, first := 0, -1
	eventually(t, fmt.Sprintf("container %s does %d rounds", container, more), func() bool {
		for _, line := range p.lines(t, container) {
			if strings.HasPrefix(line, "BROKEN") {
				t.Fatalf("container %s: %s", container, line)
			}
			fmt.Sscanf(line, "round %d", &last)
		}
		if first < 0 {
			first = last
		}
		return last >= first+more
	})
}

// checkpointWith captures the Pod with options of the engine.
func (p *pod) checkpointWith(t *testing.T, options map[string]string) (dir string, m *checkpoint.Manifest) {
	t.Helper()
	in := p.checkpointRequest(t)
	in.Options = options
	_, err := p.node.stasis.CheckpointPod(testContext(t), in)
	must(t, err)
	m, err = verify(p.node, in.OutputPath)
	must(t, err)
	return in.OutputPath, m
}

func TestMemoryThatIsReadWhileThePodRunsIsThatOfTheFreeze(t *testing.T) {
	p := theNode.run(t, "", theNode.hammer(t, "a", 64), theNode.hammer(t, "b", 32))
	p.rounds(t, "a", 3)
	p.rounds(t, "b", 3)
	dir, m := p.checkpointWith(t, map[string]string{"capture": "cow"})
	if m.Capture == nil || m.Capture.Mode != "cow" {
		t.Fatalf("it was captured %+v", m.Capture)
	}
	t.Logf("frozen %v, %+v", m.FreezeDuration, m.Phases)
	p.rounds(t, "a", 3)
	restored := theNode.restore(t, dir, p.configs...)
	for _, container := range []string{"a", "b"} {
		restored.rounds(t, container, 5)
		p.rounds(t, container, 5)
	}
}
