//go:build devcluster

// These tests make real clusters. They need root and what hack/deps.sh installs.
package cluster_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/test/devcluster/internal/cluster"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
)

// program is the devcluster under test.
var program string

// TestMain runs the tests in a mount and a network namespace of their own: there nothing
// changes but what the clusters under test do, so that before and after can be compared
// line by line. Mounts are shared within it as on a machine with systemd.
func TestMain(m *testing.M) {
	const inside = "DEVCLUSTER_TEST_INSIDE"
	if os.Getenv(inside) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET}
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "tests in namespaces of their own:", err)
			os.Exit(1)
		}
		return
	}
	if err := isolate(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	dir, err := os.MkdirTemp("", "devcluster-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	program = filepath.Join(dir, "devcluster")
	build := exec.Command("go", "build", "-trimpath", "-o", program, "podstasis.dev/stasis/test/devcluster")
	build.Stdout, build.Stderr = os.Stdout, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "building devcluster:", err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

func isolate() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	// Mounts of other work on this machine go when it removes their directories.
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	slices.Reverse(lines)
	for _, line := range lines {
		point := strings.Fields(line)[4]
		if strings.HasPrefix(point, "/tmp/") || strings.HasPrefix(point, "/run/") || strings.Contains(point, "/.devcluster") {
			_ = unix.Unmount(point, unix.MNT_DETACH) // what stays disturbs at worst
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("sharing mounts: %w", err)
	}
	if output, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("switching on the loopback interface: %w: %s", err, output)
	}
	return nil
}

// world is everything on the machine that a cluster might leave a trace in.
type world map[string][]string

func look(t *testing.T, state string) world {
	t.Helper()
	w := world{
		"network namespaces": list(t, "/run/netns"),
		"interfaces":         output(t, "ip", "-o", "link"),
		"addresses":          output(t, "ip", "-o", "addr"),
		"routes":             output(t, "ip", "route", "show", "table", "all"),
		"neighbours":         output(t, "ip", "neigh"),
		"packet filter":      output(t, "nft", "list", "ruleset"),
		"root directory":     list(t, "/"),
		"kernel settings":    settings(t),
	}
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		w["mounts"] = append(w["mounts"], strings.Join(fields[3:5], " "))
	}
	id := plan.ID(state)
	// Control groups and processes have no namespace here: what is not the cluster's is left out.
	for _, pattern := range []string{"/sys/fs/cgroup/*%s*", "/sys/fs/cgroup/*/*%s*", "/sys/fs/cgroup/*/k8s.io/*%s*"} {
		groups, err := filepath.Glob(fmt.Sprintf(pattern, id))
		if err != nil {
			t.Fatal(err)
		}
		w["control groups"] = append(w["control groups"], groups...)
	}
	for _, e := range entries(t, "/proc") {
		command, err := os.ReadFile(filepath.Join("/proc", e, "cmdline"))
		if err == nil && (bytes.Contains(command, []byte(state)) || bytes.Contains(command, []byte(id))) {
			w["processes"] = append(w["processes"], strings.ReplaceAll(string(command), "\x00", " "))
		}
	}
	return w
}

// unsteady are settings that show the state of the machine and not a choice.
var unsteady = regexp.MustCompile(`^/proc/sys/(fs/(dentry-state|file-nr|inode-nr|inode-state|aio-nr|epoll|quota)|kernel/(random|ns_last_pid|pty|keys|usermodehelper|sched_domain|spl)|net/netfilter/nf_conntrack_count)`)

func settings(t *testing.T) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir("/proc/sys", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || unsteady.MatchString(path) {
			return nil
		}
		text, err := os.ReadFile(path)
		if err == nil {
			all = append(all, path+" "+strings.TrimSpace(string(text)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	found, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range found {
		names = append(names, e.Name())
	}
	return names
}

func list(t *testing.T, dir string) []string { return entries(t, dir) }

func output(t *testing.T, name string, args ...string) []string {
	t.Helper()
	text, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, text)
	}
	// Counters and timers are no difference.
	text = regexp.MustCompile(` (expires|used|lft) \S+| valid_lft.*`).ReplaceAll(text, nil)
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

// same fails the test unless both worlds are equal.
func same(t *testing.T, before, after world) {
	t.Helper()
	for what := range after {
		b, a := slices.Clone(before[what]), slices.Clone(after[what])
		for _, line := range a {
			if !slices.Contains(b, line) {
				t.Errorf("%s: new: %s", what, line)
			}
		}
		for _, line := range b {
			if !slices.Contains(a, line) {
				t.Errorf("%s: gone: %s", what, line)
			}
		}
	}
}

// command is devcluster on the state directory.
func command(state string, args ...string) *exec.Cmd {
	return exec.Command(program, append([]string{"--state", state}, args...)...)
}

func do(t *testing.T, state string, args ...string) string {
	t.Helper()
	text, err := command(state, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("devcluster %s: %v\n%s", strings.Join(args, " "), err, text)
	}
	return string(text)
}

// fresh returns a state directory whose cluster is taken down when the test ends.
func fresh(t *testing.T) string {
	t.Helper()
	state := filepath.Join(t.TempDir(), "state")
	t.Cleanup(func() {
		if text, err := command(state, "down").CombinedOutput(); err != nil {
			t.Errorf("devcluster down: %v\n%s", err, text)
		}
	})
	return state
}

func status(t *testing.T, state string) []cluster.PlaceStatus {
	t.Helper()
	var places []cluster.PlaceStatus
	if err := json.Unmarshal([]byte(do(t, state, "status", "-o", "json")), &places); err != nil {
		t.Fatal(err)
	}
	return places
}

func pid(t *testing.T, state, place, component string) int {
	t.Helper()
	for _, p := range status(t, state) {
		for _, c := range p.Components {
			if p.Place == place && c.Name == component {
				return c.PID
			}
		}
	}
	t.Fatalf("no %s on %s", component, place)
	return 0
}

// supervisors returns the processes that supervise the cluster.
func supervisors(t *testing.T, state string) []int {
	t.Helper()
	var pids []int
	for _, e := range entries(t, "/proc") {
		text, err := os.ReadFile(filepath.Join("/proc", e, "cmdline"))
		if err == nil && bytes.Contains(text, []byte(cluster.SuperviseCommand)) && bytes.Contains(text, []byte(state)) {
			var pid int
			fmt.Sscan(e, &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}

// container starts a container that nobody but containerd knows of and returns its name,
// by which look recognises its traces.
func container(t *testing.T, state, node string) string {
	t.Helper()
	name := "test-" + plan.ID(state)
	do(t, state, "exec", node, "--", "ctr", "-n", "k8s.io", "run", "--detach", "localhost/busybox:1", name, "sh", "-c", "sleep 1000000; echo "+name)
	return name
}

func TestDownLeavesTheMachineAsItWasBeforeUp(t *testing.T) {
	state := fresh(t)
	before := look(t, state)
	do(t, state, "up", "--no-kubernetes", "--nodes", "2")
	container(t, state, "node-1")
	do(t, state, "down")
	same(t, before, look(t, state))
	if left := entries(t, state); !slices.Equal(left, []string{"log"}) {
		t.Errorf("left in the state directory: %v, want the logs only", left)
	}
}

func TestDownLeavesTheMachineAsItWasBeforeKubernetes(t *testing.T) {
	state := fresh(t)
	before := look(t, state)
	do(t, state, "up", "--nodes", "2")
	kubectl := func(args ...string) {
		t.Helper()
		args = append([]string{"exec", "control-plane", "--", "kubectl"}, args...)
		do(t, state, args...)
	}
	kubectl("create", "deployment", "web", "--image=localhost/busybox:1", "--replicas=4", "--", "sleep", "1000000")
	kubectl("expose", "deployment", "web", "--port=80")
	kubectl("rollout", "status", "deployment/web", "--timeout=60s")
	do(t, state, "down")
	same(t, before, look(t, state))
}

func TestDownCleansUpAfterSupervisorsWereKilled(t *testing.T) {
	state := fresh(t)
	before := look(t, state)
	do(t, state, "up", "--no-kubernetes")
	name := container(t, state, "node-1")
	// A frozen container does not die of SIGKILL before it is thawed.
	do(t, state, "exec", "node-1", "--", "ctr", "-n", "k8s.io", "task", "pause", name)
	found := supervisors(t, state)
	if len(found) != 1 {
		t.Fatalf("%d supervisors, want 1", len(found))
	}
	for _, pid := range found {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	do(t, state, "down")
	same(t, before, look(t, state))
}

func TestDownEndsProcessesThatLeftTheirControlGroup(t *testing.T) {
	state := fresh(t)
	before := look(t, state)
	do(t, state, "up", "--no-kubernetes")
	// A daemon that a node's agent leaves behind: an orphan in the topmost groups.
	do(t, state, "exec", "node-1", "--", "sh", "-c",
		"for g in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs; do echo $$ > $g; done 2>/dev/null; setsid sh -c 'sleep 1000000; echo "+plan.ID(state)+"' >/dev/null 2>&1 </dev/null &")
	for _, pid := range supervisors(t, state) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if daemons := look(t, state)["processes"]; !slices.ContainsFunc(daemons, func(c string) bool { return strings.Contains(c, "sleep 1000000") }) {
		t.Fatalf("the daemon does not run: %q", daemons)
	}
	do(t, state, "down")
	same(t, before, look(t, state))
}

func TestDownCleansUpAfterUpWasKilledHalfWay(t *testing.T) {
	state := fresh(t)
	before := look(t, state)
	for _, after := range []time.Duration{100, 200, 300, 400, 600, 800} {
		up := command(state, "up", "--no-kubernetes", "--nodes", "2")
		if err := up.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after * time.Millisecond)
		_ = up.Process.Kill() // it may be done
		_ = up.Wait()
		do(t, state, "down")
		same(t, before, look(t, state))
	}
}

func TestUpRepairsWhatAKilledSupervisorLeft(t *testing.T) {
	state := fresh(t)
	do(t, state, "up", "--no-kubernetes")
	container(t, state, "node-1")
	old := pid(t, state, "node-1", "containerd")
	for _, pid := range supervisors(t, state) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	do(t, state, "up", "--no-kubernetes", "--nodes", "2")
	if now := pid(t, state, "node-1", "containerd"); now == old {
		t.Errorf("containerd is still the process %d that nobody supervised", now)
	}
	if _, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", old)); err == nil { // a zombie has none
		t.Errorf("the old containerd %d still runs", old)
	}
	if text := do(t, state, "exec", "node-1", "--", "ctr", "-n", "k8s.io", "task", "ls"); !strings.Contains(text, "RUNNING") {
		t.Errorf("the container did not live on:\n%s", text)
	}
	if pid(t, state, "node-2", "containerd") == 0 {
		t.Error("the second node was not added")
	}
}

func TestAKilledContainerRuntimeIsStartedAgainAndContainersLiveOn(t *testing.T) {
	state := fresh(t)
	do(t, state, "up", "--no-kubernetes")
	container(t, state, "node-1")
	old := pid(t, state, "node-1", "containerd")
	do(t, state, "kill", "node-1", "containerd")
	deadline := time.Now().Add(time.Minute)
	for pid(t, state, "node-1", "containerd") == 0 {
		if time.Now().After(deadline) {
			t.Fatal("containerd was not started again")
		}
		time.Sleep(20 * time.Millisecond)
	}
	if now := pid(t, state, "node-1", "containerd"); now == old {
		t.Fatal("containerd was not killed")
	}
	for {
		text, err := command(state, "exec", "node-1", "--", "ctr", "-n", "k8s.io", "task", "ls").CombinedOutput()
		if err == nil && strings.Contains(string(text), "RUNNING") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the container did not live on: %v\n%s", err, text)
		}
		time.Sleep(50 * time.Millisecond)
	}

	do(t, state, "kill", "--down", "node-1", "containerd")
	time.Sleep(time.Second)
	if now := pid(t, state, "node-1", "containerd"); now != 0 {
		t.Errorf("containerd runs (%d) though it was to stay down", now)
	}
	do(t, state, "start", "node-1", "containerd")
	if pid(t, state, "node-1", "containerd") == 0 {
		t.Error("containerd was not started")
	}
}

func TestClustersOfDifferentStateDirectoriesDoNotMeet(t *testing.T) {
	one, other := fresh(t), fresh(t)
	before := look(t, one)
	do(t, one, "up", "--no-kubernetes")
	do(t, other, "up", "--no-kubernetes")
	if a, b := status(t, one)[0].Address, status(t, other)[0].Address; a == b {
		t.Errorf("both have a node at %s", a)
	}
	do(t, one, "down")
	if pid(t, other, "node-1", "containerd") == 0 {
		t.Error("the end of one cluster ended the other")
	}
	do(t, other, "down")
	same(t, before, look(t, one))
}

func TestANodeLooksLikeAHostOfItsOwn(t *testing.T) {
	state := fresh(t)
	do(t, state, "up", "--no-kubernetes", "--nodes", "2")
	for _, dir := range []string{"/opt/stasis", "/run/stasis", "/var/lib/stasis", "/var/lib/kubelet", "/etc/containerd/conf.d", "/var/log/pods"} {
		do(t, state, "exec", "node-1", "--", "sh", "-c", "mkdir -p "+dir+" && echo here > "+dir+"/only-on-node-1")
		file := filepath.Join(dir, "only-on-node-1")
		if _, err := command(state, "exec", "node-2", "--", "cat", file).Output(); err == nil {
			t.Errorf("%s of node-1 is on node-2 too", file)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s of node-1 is on the machine", file)
		}
	}
	if host := strings.TrimSpace(do(t, state, "exec", "node-2", "--", "cat", "/etc/hostname")); host != "node-2" {
		t.Errorf("the host name of node-2 is %q", host)
	}
	do(t, state, "exec", "node-1", "--", "/opt/devcluster/criu/bin/criu", "check")
}

func TestANodeThatLosesPowerKeepsItsDiskAndNothingElse(t *testing.T) {
	state := fresh(t)
	before := look(t, state)
	do(t, state, "up", "--no-kubernetes", "--nodes", "2")
	container(t, state, "node-1")
	do(t, state, "exec", "node-1", "--", "sh", "-c", "echo kept > /var/lib/kept; echo kept > /etc/kept; : > /run/gone; mount -t tmpfs none /mnt; : > /mnt/gone")
	do(t, state, "kill", "node-1")
	if left := supervisors(t, state); len(left) != 1 {
		t.Errorf("%d supervisors are left of two nodes, of which one lost its power", len(left))
	}
	for _, process := range look(t, state)["processes"] {
		if strings.Contains(process, "sleep 1000000") {
			t.Errorf("left of the node: %s", process)
		}
	}
	for _, p := range status(t, state) {
		if (p.Error != "") != (p.Place == "node-1") {
			t.Errorf("%s: %q", p.Place, p.Error)
		}
	}
	if text, err := command(state, "exec", "node-1", "--", "true").CombinedOutput(); err == nil {
		t.Errorf("a command runs on it: %s", text)
	}
	do(t, state, "start", "node-1")
	if text := do(t, state, "exec", "node-1", "--", "sh", "-c", "cat /var/lib/kept /etc/kept; ls /run/gone /mnt/gone 2>/dev/null || true"); text != "kept\nkept\n" {
		t.Errorf("the node came back with %q", text)
	}
	if pid(t, state, "node-1", "containerd") == 0 || pid(t, state, "node-2", "containerd") == 0 {
		t.Error("a container runtime does not run")
	}
	do(t, state, "down")
	same(t, before, look(t, state))
}
