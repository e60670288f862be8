// Package node makes the places where a cluster's programs run. Each has a network
// namespace and a mount namespace of its own, whose root looks like a freshly installed
// host: the machine's /usr (read-only) and a copy-on-write /etc, and everything else its
// own. Namespaces are kept by mounts in the state directory, so they outlive processes.
package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Spec describes one place.
type Spec struct {
	Name string
	// Dir holds the place's files on the machine's disk.
	Dir string
	// Keep is the directory in which the namespaces are kept, the same for all places.
	Keep string
	// Address is written to the place's /etc/hosts.
	Address string
	// Programs are copied to /usr/local/bin: name → path on the machine. (A file that is only
	// mounted there will not do: runc protects itself by an overlay of its directory, in which
	// such a file is missing.)
	Programs map[string]string
	// Links are symbolic links in /usr/local/bin: name → path in the place.
	Links map[string]string
	// Trees appear, read-only, at the given paths: path in the place → path on the machine.
	Trees map[string]string
	// Empty are files that are there and read as empty.
	Empty []string
	// Shared appear, writable, at the same path as on the machine.
	Shared []string
	// Preload is a library on the machine that every program of the place is started with; empty for none.
	Preload string
	// Files are written into the place's root; absolute names, mode 0644, or 0600 below a directory named pki.
	Files map[string]string
	// Forward says whether packets are forwarded, as a node's kernel has to.
	Forward bool
	// Again says that the place was there before and its disk still is: nothing is written to it.
	Again bool
}

// Root is where the place's root is on the machine's disk: what is not a mount of its own
// can be read there.
func Root(dir string) string { return filepath.Join(dir, "root") }

// MountNamespace and NetworkNamespace are the files that keep a place's namespaces.
func MountNamespace(keep, name string) string   { return filepath.Join(keep, name+".mnt") }
func NetworkNamespace(keep, name string) string { return filepath.Join(keep, name+".net") }

// SetupCommand is the hidden command by which the running program is started again in new
// namespaces; it calls Setup.
const SetupCommand = "internal-setup-place"

// Exists says whether the place's namespaces are there.
func Exists(keep, name string) bool {
	return isNamespace(MountNamespace(keep, name)) && isNamespace(NetworkNamespace(keep, name))
}

func isNamespace(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// Create makes the place and keeps its namespaces. No process is left in it.
func Create(spec Spec) error {
	if err := prepareKeep(spec.Keep); err != nil {
		return err
	}
	for _, dir := range []string{Root(spec.Dir), filepath.Join(spec.Dir, "etc"), filepath.Join(spec.Dir, "etc.work"), filepath.Join(spec.Dir, "local-bin")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("making %s: %w", spec.Name, err)
		}
	}
	description, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("making %s: %w", spec.Name, err)
	}
	// A mount namespace can only be kept (mounted) in one with a lower number. Newer kernels
	// give each CPU a block of numbers, so that only the CPU on which this process's own
	// namespace was made is sure to give a higher one. In the machine's first namespace any does.
	err = createOnce(spec, string(description))
	if !errors.Is(err, errOrder) {
		return err
	}
	runtime.LockOSThread()
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("making %s: %w", spec.Name, err)
	}
	defer func() {
		// A thread that cannot get its CPUs back stays locked, and ends with its goroutine.
		if unix.SchedSetaffinity(0, &all) == nil {
			runtime.UnlockOSThread()
		}
	}()
	for cpu := 0; cpu < len(all)*64 && errors.Is(err, errOrder); cpu++ {
		if !all.IsSet(cpu) {
			continue
		}
		var one unix.CPUSet
		one.Set(cpu)
		if err := unix.SchedSetaffinity(0, &one); err != nil {
			return fmt.Errorf("making %s: %w", spec.Name, err)
		}
		err = createOnce(spec, string(description))
	}
	return err
}

// errOrder says that the new mount namespace got a lower number than this process's.
var errOrder = errors.New("the kernel does not let a mount namespace be kept in a newer one")

func createOnce(spec Spec, description string) error {
	child := exec.Command("/proc/self/exe", SetupCommand, description)
	// It must not go on when this process is killed: devcluster down would race with it. The
	// signal comes when the thread that started it ends.
	child.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	release, err := child.StdinPipe()
	if err != nil {
		return fmt.Errorf("making %s: %w", spec.Name, err)
	}
	ready, err := child.StdoutPipe()
	if err != nil {
		return fmt.Errorf("making %s: %w", spec.Name, err)
	}
	var complaint strings.Builder
	child.Stderr = &complaint
	if err := child.Start(); err != nil {
		return fmt.Errorf("making %s: new namespaces: %w", spec.Name, err)
	}
	finish := func() error {
		release.Close()
		if err := child.Wait(); err != nil {
			return fmt.Errorf("making %s: %s (%w)", spec.Name, strings.TrimSpace(complaint.String()), err)
		}
		return nil
	}
	if line, err := io.ReadAll(io.LimitReader(ready, int64(len(readyLine)))); err != nil || string(line) != readyLine {
		if err := finish(); err != nil {
			return err
		}
		return fmt.Errorf("making %s: its set-up ended without a result", spec.Name)
	}
	err = keep(child.Process.Pid, "mnt", MountNamespace(spec.Keep, spec.Name))
	if err == nil {
		err = keep(child.Process.Pid, "net", NetworkNamespace(spec.Keep, spec.Name))
	} else if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w: %w", errOrder, err)
	}
	return errors.Join(err, finish())
}

const readyLine = "ready\n"

// prepareKeep makes the directory of kept namespaces a private mount: a mount namespace
// cannot be kept in a mount that other namespaces get copies of.
func prepareKeep(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the directory of namespaces: %w", err)
	}
	mounts, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m == dir {
			return nil
		}
	}
	if err := unix.Mount("stasis-devcluster", dir, "tmpfs", 0, "mode=0700,size=64k"); err != nil {
		return fmt.Errorf("mounting the directory of namespaces %s: %w", dir, err)
	}
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making the mount of %s private: %w", dir, err)
	}
	return nil
}

func keep(pid int, kind, path string) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("keeping a namespace: %w", err)
	}
	file.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/%d/ns/%s", pid, kind), path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("keeping a namespace at %s: %w", path, err)
	}
	return nil
}

// Enter moves the calling goroutine's thread, locked to it from here on and for good, into
// the place. What it starts or execs runs there. The working directory becomes /.
func Enter(keep, name string) error {
	mnt, err := os.Open(MountNamespace(keep, name))
	if err != nil {
		return fmt.Errorf("entering %s: %w", name, err)
	}
	defer mnt.Close()
	net, err := os.Open(NetworkNamespace(keep, name))
	if err != nil {
		return fmt.Errorf("entering %s: %w", name, err)
	}
	defer net.Close()
	runtime.LockOSThread()
	// A thread can only change its root when it shares it with no other.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("entering %s: %w", name, err)
	}
	if err := unix.Setns(int(net.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering the network namespace of %s: %w", name, err)
	}
	if err := unix.Setns(int(mnt.Fd()), unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("entering the mount namespace of %s: %w", name, err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("entering %s: %w", name, err)
	}
	return nil
}

// Drop lets go of a place's namespaces: they are gone when no process is in them any more,
// with all that was mounted there. What is on the machine's disk stays.
func Drop(keep, name string) error {
	for _, file := range []string{MountNamespace(keep, name), NetworkNamespace(keep, name)} {
		for isNamespace(file) {
			if err := unix.Unmount(file, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("letting go of %s: %w", file, err)
			}
		}
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("letting go of a namespace: %w", err)
		}
	}
	return nil
}

// Processes returns the processes that are in a kept namespace of any place.
func Processes(keep string) ([]int, error) { return processes(filepath.Join(keep, "*.*")) }

// ProcessesOf returns the processes that are in a kept namespace of one place.
func ProcessesOf(keep, name string) ([]int, error) { return processes(filepath.Join(keep, name+".*")) }

func processes(pattern string) ([]int, error) {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return nil, fmt.Errorf("listing namespaces: %w", err)
	}
	kept := map[uint64]bool{}
	for _, file := range files {
		var st unix.Stat_t
		if isNamespace(file) && unix.Stat(file, &st) == nil {
			kept[st.Ino] = true // numbers of namespaces are unique on a machine
		}
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	var found []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		for _, kind := range []string{"mnt", "net"} {
			var st unix.Stat_t
			if unix.Stat(fmt.Sprintf("/proc/%d/ns/%s", pid, kind), &st) == nil && kept[st.Ino] {
				found = append(found, pid)
				break
			}
		}
	}
	return found, nil
}

// Remove unmounts everything below the state directory on the machine. The namespaces are
// gone when no process is in them any more.
func Remove(stateDir string) error {
	for range 100 { // mounts may lie on top of each other
		mounts, err := mountsBelow(stateDir)
		if err != nil {
			return err
		}
		if len(mounts) == 0 {
			return nil
		}
		for i := len(mounts) - 1; i >= 0; i-- {
			if err := unix.Unmount(mounts[i], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("unmounting %s: %w", mounts[i], err)
			}
		}
	}
	return fmt.Errorf("there are still mounts below %s: see /proc/self/mountinfo", stateDir)
}

// mountsBelow lists the mount points at and below dir in the order of the mount table.
func mountsBelow(dir string) ([]string, error) {
	points, err := mountPoints()
	if err != nil {
		return nil, err
	}
	var below []string
	for _, p := range points {
		if p == dir || strings.HasPrefix(p, dir+"/") {
			below = append(below, p)
		}
	}
	return below, nil
}

func mountPoints() ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("reading the mount table: %w", err)
	}
	return parseMountPoints(string(text)), nil
}

var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func parseMountPoints(mountinfo string) []string {
	var points []string
	for line := range strings.Lines(mountinfo) {
		if fields := strings.Fields(line); len(fields) > 4 {
			points = append(points, unescape.Replace(fields[4]))
		}
	}
	return points
}

// Mounted says whether anything is mounted at or below dir on the machine.
func Mounted(dir string) (bool, error) {
	mounts, err := mountsBelow(dir)
	return len(mounts) > 0, err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
