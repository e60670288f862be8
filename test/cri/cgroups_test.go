package cri_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cgroupsOfPods is what the names of theirs begin with, of this run alone, and podNames
// whose there are.
var cgroupsOfPods = fmt.Sprintf("/k8s.io/%d-", os.Getpid())

var podNames = map[string]bool{}

// bySystemd says that systemd makes the node's cgroups.
var bySystemd bool

// cgroupParent names the one that a Pod's are in. To systemd it is a slice, in others by its
// name.
func cgroupParent(name string) string {
	podNames[name] = true
	if bySystemd {
		return sliceOf(name)
	}
	return cgroupsOfPods + name
}

func sliceOf(name string) string {
	return strings.ReplaceAll(strings.Trim(cgroupsOfPods, "/-")+"-"+name, "/", "_") + ".slice"
}

// sliceDir is the directory of a slice: a-b.slice is in a.slice.
func sliceDir(slice string) (dir string) {
	parts := strings.Split(strings.TrimSuffix(slice, ".slice"), "-")
	for i := range parts {
		dir += "/" + strings.Join(parts[:i+1], "-") + ".slice"
	}
	return dir
}

// cgroupFile reads a file of a container's cgroup: v1 in the hierarchy of a controller, or
// v2 where there is but one.
func (p *pod) cgroupFile(t *testing.T, id, controller, v1, v2 string) string {
	t.Helper()
	names := p.cgroupFiles(t, controller, v1, v2)
	for _, name := range names {
		if !strings.Contains(filepath.Base(filepath.Dir(name)), id) {
			continue
		}
		data, err := os.ReadFile(name)
		must(t, err)
		return strings.TrimSpace(string(data))
	}
	t.Fatalf("container %s has no cgroup of controller %s: there are %q", id, controller, names)
	return ""
}

// cgroupFiles finds such files of all of a Pod's containers.
func (p *pod) cgroupFiles(t *testing.T, controller, v1, v2 string) []string {
	t.Helper()
	root, file := p.node.host.Path("/sys/fs/cgroup"), v2
	if _, err := os.Stat(root + "/cgroup.controllers"); errors.Is(err, fs.ErrNotExist) {
		root, file = root+"/"+controller, v1
	} else {
		must(t, err)
	}
	parent := p.config.Linux.CgroupParent
	if bySystemd {
		parent = sliceDir(parent)
	}
	names, err := filepath.Glob(root + parent + "/*/" + file)
	must(t, err)
	return names
}

// processes lists what runs or stands still in the cgroups of a Pod's containers.
func (p *pod) processes(t *testing.T) (pids []string) {
	t.Helper()
	for _, file := range p.cgroupFiles(t, "freezer", "cgroup.procs", "cgroup.procs") {
		data, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENODEV) { // else it has gone meanwhile
			t.Fatal(err)
		}
		pids = append(pids, strings.Fields(string(data))...)
	}
	return pids
}

func TestARestoredContainerSeesOfCgroupsWhatAnyContainerDoes(t *testing.T) {
	a := container("a", counting)
	dir := checkpointOf(t, a)
	limited := container("a", counting)
	limited.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 123 << 20}
	fresh, restored := theNode.run(t, "", limited), theNode.restore(t, dir, limited)
	for what, script := range map[string]string{
		"where it is":               "cat /proc/1/cgroup",
		"where a new process is":    "cat /proc/self/cgroup",
		"its limit":                 "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes",
		"what is in the hierarchy":  "ls /sys/fs/cgroup /sys/fs/cgroup/memory 2>/dev/null; true",
		"where it is mounted":       `awk '$5 ~ "^/sys/fs/cgroup" { print $4, $5, $6 }' /proc/self/mountinfo`,
		"that it cannot be written": "mkdir /sys/fs/cgroup/new /sys/fs/cgroup/memory/new 2>/dev/null && echo written; true",
	} {
		want, got := fresh.exec(t, "a", script), restored.exec(t, "a", script)
		for _, p := range []*pod{fresh, restored} {
			names := strings.NewReplacer(p.containers["a"], "CONTAINER", strings.TrimSuffix(p.config.Linux.CgroupParent, ".slice"), "POD")
			want, got = names.Replace(want), names.Replace(got)
		}
		if got != want {
			t.Errorf("%s (%s):\n%s\nand in an ordinary container:\n%s", what, script, got, want)
		}
	}
}
