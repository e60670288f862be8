package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// nodes looks at the cluster's nodes from the machine that they are namespaces of.
type nodes struct {
	id     string            // of the devcluster, in the names of its cgroups
	anchor map[string]string // by node: /proc/PID of a program there that nobody kills
	logs   string            // directory of the components' logs
}

const freezerRoot = "/sys/fs/cgroup/freezer"

func (s *soak) findNodes(ctx context.Context, state string) (*nodes, error) {
	data, err := os.ReadFile(filepath.Join(state, "cluster.json"))
	if err != nil {
		return nil, err
	}
	var description struct{ ID string }
	if err := json.Unmarshal(data, &description); err != nil {
		return nil, fmt.Errorf("read cluster.json: %w", err)
	}
	out, err := s.cluster.Devcluster(ctx, "status", "-o", "json")
	if err != nil {
		return nil, err
	}
	var places []struct {
		Place      string
		Components []struct {
			Name string
			PID  int
		}
	}
	if err := json.Unmarshal([]byte(out), &places); err != nil {
		return nil, fmt.Errorf("read devcluster's status: %w", err)
	}
	n := &nodes{id: description.ID, anchor: map[string]string{}, logs: filepath.Join(state, "log")}
	for _, place := range places {
		for _, component := range place.Components {
			if component.Name == "kube-proxy" {
				n.anchor[place.Place] = "/proc/" + strconv.Itoa(component.PID)
			}
		}
	}
	if len(n.anchor) == 0 {
		return nil, errors.New("no node has a kube-proxy")
	}
	if _, err := os.Stat(n.kubepods(n.names()[0])); err != nil {
		return nil, fmt.Errorf("soak reads freezers of cgroup version 1: %w", err)
	}
	return n, nil
}

func (n *nodes) names() []string { return slices.Sorted(maps.Keys(n.anchor)) }

func (n *nodes) kubepods(node string) string {
	return filepath.Join(freezerRoot, "stasis-devcluster-"+n.id, node, "kubepods")
}

// file is a node's file as the machine reaches it.
func (n *nodes) file(node, path string) string { return filepath.Join(n.anchor[node], "root", path) }

// cgroup is a container's, or a sandbox's.
type cgroup struct{ node, uid, id, path string }

func (c cgroup) String() string {
	return fmt.Sprintf("%s of Pod %s on %s", c.id[:min(12, len(c.id))], c.uid, c.node)
}

// cgroups lists those of all containers, and the Pods' own with an empty id.
func (n *nodes) cgroups() ([]cgroup, error) {
	var all []cgroup
	for _, node := range n.names() {
		for _, class := range []string{"", "burstable", "besteffort"} {
			pods, err := filepath.Glob(filepath.Join(n.kubepods(node), class, "pod*"))
			if err != nil {
				return nil, err
			}
			for _, pod := range pods {
				uid := strings.TrimPrefix(filepath.Base(pod), "pod")
				all = append(all, cgroup{node, uid, "", pod})
				entries, err := os.ReadDir(pod)
				if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
					return nil, err
				}
				for _, entry := range entries {
					if entry.IsDir() {
						all = append(all, cgroup{node, uid, entry.Name(), filepath.Join(pod, entry.Name())})
					}
				}
			}
		}
	}
	return all, nil
}

// watcher keeps, for every container that stands still, since when it has.
type watcher struct {
	nodes *nodes
	mu    sync.Mutex
	since map[cgroup]time.Time
}

func (w *watcher) run(ctx context.Context) {
	for ctx.Err() == nil {
		w.look()
		time.Sleep(20 * time.Millisecond)
	}
}

// look is done by one at a time, lest an older look overwrites a newer.
func (w *watcher) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	all, err := w.nodes.cgroups()
	if err != nil {
		return // a Pod went in that moment
	}
	now := time.Now()
	still := map[cgroup]bool{}
	for _, c := range all {
		state, err := os.ReadFile(filepath.Join(c.path, "freezer.state"))
		still[c] = err == nil && string(bytes.TrimSpace(state)) != "THAWED"
	}
	for c, frozen := range still {
		if _, was := w.since[c]; frozen && !was {
			w.since[c] = now
		}
	}
	maps.DeleteFunc(w.since, func(c cgroup, _ time.Time) bool { return !still[c] })
}

// frozen copies what stands still now, and since when.
func (w *watcher) frozen() map[cgroup]time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.since)
}

// process is one of a node.
type process struct {
	pid  int
	node string // by its cgroup or its root directory
	host bool   // its root directory is the node's, it is in no container
	args []string
	env  []byte
}

func (p process) program() string { return filepath.Base(p.args[0]) }

const shim = "containerd-shim-runc-v2"

// sandbox is the one that a shim was started for.
func (p process) sandbox() string {
	if i := slices.Index(p.args, "-id"); p.program() == shim && i > 0 && i+1 < len(p.args) {
		return p.args[i+1]
	}
	return ""
}

// capture is the sandbox whose capture the process belongs to.
func (p process) capture() string {
	for variable := range bytes.SplitSeq(p.env, []byte{0}) {
		if sandbox, ok := bytes.CutPrefix(variable, []byte("STASIS_CAPTURE=")); ok {
			return string(sandbox)
		}
	}
	return ""
}

// inode identifies a file.
func inode(path string) ([2]uint64, error) {
	var stat unix.Stat_t
	err := unix.Stat(path, &stat)
	return [2]uint64{uint64(stat.Dev), stat.Ino}, err
}

func (n *nodes) processes() ([]process, error) {
	// CRIU and what starts it are in mount namespaces of their own.
	roots := map[[2]uint64]string{} // by device and inode: the node
	for node, anchor := range n.anchor {
		root, err := inode(anchor + "/root/")
		if err != nil {
			return nil, fmt.Errorf("kube-proxy of %s: %w", node, err)
		}
		roots[root] = node
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var all []process
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		proc := "/proc/" + entry.Name()
		root, err := inode(proc + "/root/")
		if err != nil {
			continue // it has ended
		}
		p := process{pid: pid}
		if p.node, p.host = roots[root], roots[root] != ""; !p.host {
			groups, _ := os.ReadFile(proc + "/cgroup") // of one that has ended it is empty
			for node := range n.anchor {
				if bytes.Contains(groups, []byte("/stasis-devcluster-"+n.id+"/"+node+"/kubepods/")) {
					p.node = node
				}
			}
		}
		command, err := os.ReadFile(proc + "/cmdline")
		if err != nil || p.node == "" || len(command) == 0 {
			continue
		}
		p.args = strings.Split(strings.TrimRight(string(command), "\x00"), "\x00")
		if p.host {
			p.env, _ = os.ReadFile(proc + "/environ") // of one that has ended it is empty
		}
		all = append(all, p)
	}
	return all, nil
}

// deserted lists the network namespaces of a node that no process is in.
func (n *nodes) deserted(node string) ([]string, error) {
	lived, err := n.processes()
	if err != nil {
		return nil, err
	}
	inhabited := map[string]bool{}
	for _, p := range lived {
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", p.pid)); err == nil {
			inhabited[ns] = true
		}
	}
	entries, err := os.ReadDir(n.file(node, "/run/netns"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		var stat unix.Stat_t
		if err := unix.Stat(n.file(node, "/run/netns/"+entry.Name()), &stat); err != nil {
			return nil, fmt.Errorf("network namespace %s: %w", entry.Name(), err)
		}
		if !inhabited[fmt.Sprintf("net:[%d]", stat.Ino)] {
			names = append(names, entry.Name())
		}
	}
	return names, nil
}

// unreachable is what containerd says when it starts and finds the bundle of a shim
// without a word of how to reach it. It takes the bundle away and forgets that shim,
// whose process stays (core/runtime/v2: binary.Start, loadShims).
var unreachable = regexp.MustCompile(`failed to read bootstrap\.json when restoring bundle \\"([0-9a-f]{64})\\": unable to migrate shim: failed to get socket address`)

// unrecorded lists, from a containerd's log, the sandboxes between whose shim's start
// and the record of it that containerd was killed. Nothing was ever asked of
// such a shim: it was never told to make a container, and no OCI runtime was called.
func unrecorded(log []byte) map[string]bool {
	ids := map[string]bool{}
	for _, match := range unreachable.FindAllSubmatch(log, -1) {
		ids[string(match[1])] = true
	}
	return ids
}

// What containerd says of containers that it makes, and of one that it gave up because
// the kubelet that had asked for it was killed.
var (
	created = regexp.MustCompile(`CreateContainer within sandbox \\"([0-9a-f]{64})\\" .*returns container id \\"([0-9a-f]{64})\\"`)
	givenUp = regexp.MustCompile(`StartContainer for \\"([0-9a-f]{64})\\" failed" error=".*failed to create shim task: context canceled"`)
)

// abandoned lists, from a containerd's log, the sandboxes in which it gave a container
// up while the shim was making it. The shim is not told: it goes on, and if the container
// came about between containerd's two attempts to delete it, it counts it for ever and
// does not end when its sandbox does (cmd/containerd-shim-runc-v2/task: Create, Shutdown).
// That can befall any Pod; a restore takes longer than an ordinary start.
func abandoned(log []byte) map[string]bool {
	sandbox := map[string]string{}
	for _, match := range created.FindAllSubmatch(log, -1) {
		sandbox[string(match[2])] = string(match[1])
	}
	ids := map[string]bool{}
	for _, match := range givenUp.FindAllSubmatch(log, -1) {
		if id := sandbox[string(match[1])]; id != "" {
			ids[id] = true
		}
	}
	return ids
}

// forgotten lists the shims of a node that a containerd left without a record, or with a
// container that it had given up, and that nothing runs under.
func (n *nodes) forgotten(node string) ([]process, error) {
	log, err := os.ReadFile(filepath.Join(n.logs, node+"-containerd.log"))
	if err != nil {
		return nil, err
	}
	all, err := n.processes()
	if err != nil {
		return nil, err
	}
	ids := unrecorded(log)
	maps.Copy(ids, abandoned(log))
	var shims []process
	for _, p := range all {
		if p.node != node || !p.host || !ids[p.sandbox()] {
			continue
		}
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.pid))
		if err != nil {
			return nil, err
		}
		children := len(tasks) == 0 // it has ended, or cannot be looked at
		for _, task := range tasks {
			list, err := os.ReadFile(task) // a thread that has ended has no children
			gone := errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
			children = children || err != nil && !gone || len(bytes.TrimSpace(list)) > 0
		}
		if !children {
			shims = append(shims, p)
		}
	}
	return shims, nil
}

// residents are the programs that belong on a node and in no container.
var residents = []string{"containerd", shim, "kubelet", "kube-proxy", "stasis-guard"}

// leftovers says what is on the nodes beyond the living Pods, given by node and
// UID. There are none of the round's own. What agents remember of Pods that they
// have restored, and sockets of restores that were killed, go only when one starts.
func (n *nodes) leftovers(pods map[string][]string, agentsAreNew bool) error {
	groups, err := n.cgroups()
	if err != nil {
		return err
	}
	processes, err := n.processes()
	if err != nil {
		return err
	}
	var errs []error
	found := func(node, format string, args ...any) {
		errs = append(errs, fmt.Errorf(node+": "+format, args...))
	}
	containers := map[string]bool{}
	for _, c := range groups {
		containers[c.id] = true
		if !slices.Contains(pods[c.node], c.uid) {
			found(c.node, "cgroup %s of a Pod that is gone", c.path)
		} else if members, err := os.ReadFile(filepath.Join(c.path, "cgroup.procs")); err == nil && c.id != "" && len(members) == 0 {
			found(c.node, "cgroup %s without processes", c.path)
		}
	}
	count := map[string]int{}
	strays := map[string][]string{} // by node: shims without a cgroup
	for _, p := range processes {
		if !p.host {
			continue
		}
		count[p.node+" "+p.program()]++
		if id := p.sandbox(); id != "" && !containers[id] {
			strays[p.node] = append(strays[p.node], fmt.Sprintf("%d of sandbox %s", p.pid, id))
		}
		if p.capture() != "" || !slices.Contains(residents, p.program()) && !slices.Contains(p.args, "internal-supervise") {
			found(p.node, "process %d: %s", p.pid, strings.Join(p.args, " "))
		}
	}
	for _, node := range n.names() {
		if got := count[node+" "+shim]; got != len(pods[node]) || len(strays[node]) > 0 {
			found(node, "%d shims for %d Pods; without a cgroup: %v", got, len(pods[node]), strays[node])
		}
		if got := count[node+" stasis-guard"]; got != 1 {
			found(node, "%d guards", got)
		}
		for _, dir := range []string{"/var/lib/stasis/checkpoints", "/var/lib/stasis/checkpoints/.copies", "/var/lib/stasis/storing", "/var/lib/stasis/records", "/var/lib/stasis/restored", "/run/stasis", "/run/stasis/frozen", "/run/stasis/cow", "/run/stasis/restore", "/run/stasis/work"} {
			entries, err := os.ReadDir(n.file(node, dir))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				found(node, "%w", err)
			}
			for _, entry := range entries {
				if !agentsAreNew && (filepath.Base(dir) == "restored" || strings.HasPrefix(entry.Name(), "freeze-")) {
					continue
				}
				if !slices.Contains([]string{".copies", "agent.sock", "cri.sock", "frozen", "cow", "restore", "work", "lock"}, entry.Name()) {
					found(node, "file %s/%s", dir, entry.Name())
				}
			}
		}
		namespaces, err := n.deserted(node)
		if err != nil {
			found(node, "%w", err)
		}
		for _, name := range namespaces {
			found(node, "network namespace %s without processes", name)
		}
		mounts, err := os.ReadFile(n.anchor[node] + "/mounts")
		if err != nil {
			found(node, "%w", err)
		}
		for line := range strings.Lines(string(mounts)) {
			fields := strings.Fields(line)
			if len(fields) < 2 {
				continue
			}
			if strings.Contains(fields[1], "/.criu.") || strings.Contains(fields[1], "/criu-root") || strings.HasPrefix(fields[1], "/run/stasis/") || strings.HasPrefix(fields[1], "/var/lib/stasis/") {
				found(node, "mount %s", fields[1])
			}
			path := strings.Split(fields[1], "/")
			if i := slices.Index(path, "pods"); i > 0 && path[i-1] == "kubelet" && len(path) > i+1 && !slices.Contains(pods[node], path[i+1]) {
				found(node, "mount %s", fields[1])
			}
			for _, dir := range []string{"k8s.io", "sandboxes"} {
				if i := slices.Index(path, dir); i > 0 && len(path) > i+1 && !containers[path[i+1]] {
					found(node, "mount %s", fields[1])
				}
			}
		}
	}
	return errors.Join(errs...)
}
