package cgroup

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

const hybrid = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:5 - cgroup cgroup rw,cpu
34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
90 31 0:38 /below /elsewhere rw,relatime - cgroup2 cgroup2 rw
`

const unified = `31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate
`

func TestHierarchiesAreReadFromTheMountTable(t *testing.T) {
	for name, c := range map[string]struct {
		table    string
		v1       bool
		count    int
		tracking string
	}{
		"version 1 beside version 2": {hybrid, true, 5, "/sys/fs/cgroup/pids"},
		"version 2 alone":            {unified, false, 1, "/sys/fs/cgroup"},
	} {
		h := parse([]byte(c.table))
		if h.V1() != c.v1 {
			t.Errorf("%s: version 1: %v", name, h.V1())
		}
		if got := len(h.controlled()); got != c.count {
			t.Errorf("%s: %d hierarchies get groups, want %d", name, got, c.count)
		}
		if m, err := h.tracking(); err != nil || m.dir != c.tracking {
			t.Errorf("%s: processes are found in %q, %v; want %q", name, m.dir, err, c.tracking)
		}
	}
}

func TestWithoutTheRightHierarchyTheErrorSaysWhatToMount(t *testing.T) {
	h := parse([]byte("34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n"))
	if _, err := h.tracking(); err == nil || !strings.Contains(err.Error(), "mount") {
		t.Errorf("error %v", err)
	}
}

func TestDescendantsAreFoundWhereverTheyAre(t *testing.T) {
	shell := exec.Command("sh", "-c", "sleep 1000 & wait")
	if err := shell.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, pid := range withDescendants([]int{shell.Process.Pid}) {
			if p, err := os.FindProcess(pid); err == nil {
				_ = p.Kill()
			}
		}
		_ = shell.Wait()
	}()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if found := withDescendants([]int{shell.Process.Pid}); len(found) == 2 && found[0] == shell.Process.Pid {
			return
		}
	}
	t.Error("the shell's child was not found")
}
