package node

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// tunables are kernel settings that a kubelet makes machine-wide when it starts. On a place
// they are plain files that hold those values already: the kubelet finds what it wants, and
// the machine keeps what it has.
var tunables = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// Setup turns the namespaces of this process, which must be new ones, into the place that
// description (a Spec in JSON) describes, says so on ready, and waits until release ends.
func Setup(description string, release io.Reader, ready io.Writer) error {
	var spec Spec
	if err := json.Unmarshal([]byte(description), &spec); err != nil {
		return fmt.Errorf("reading the description: %w", err)
	}
	// Nothing mounted from here on may reach the machine.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making all mounts private: %w", err)
	}
	root := Root(spec.Dir)
	for _, step := range []func(Spec, string) error{mountRoot, mountSystem, writeFiles, mountKernel, mountPrograms, mountShared, switchRoot, setKernel} {
		if err := step(spec, root); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(ready, readyLine); err != nil {
		return fmt.Errorf("reporting: %w", err)
	}
	_, err := io.Copy(io.Discard, release)
	return err
}

func mountRoot(spec Spec, root string) error {
	if err := bind(root, root, 0); err != nil {
		return err
	}
	for dir, mode := range map[string]fs.FileMode{
		"dev": 0o755, "etc": 0o755, "home": 0o755, "mnt": 0o755, "opt/cni": 0o755, "proc": 0o555, "root": 0o700, "run": 0o755,
		"srv": 0o755, "sys": 0o555, "usr": 0o755, "var/cache": 0o755, "var/lib": 0o755, "var/log": 0o755,
		"tmp": 0o777 | fs.ModeSticky, "var/tmp": 0o777 | fs.ModeSticky,
	} {
		path := filepath.Join(root, dir)
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(path, mode); err != nil {
			return err
		}
	}
	for link, target := range map[string]string{"var/run": "/run", "var/lock": "/run/lock", "opt/cni/bin": "/usr/lib/cni"} {
		if err := symlink(target, filepath.Join(root, link)); err != nil {
			return err
		}
	}
	return nil
}

// mountSystem takes over the machine's installed programs and configuration.
func mountSystem(spec Spec, root string) error {
	if err := bind("/usr", filepath.Join(root, "usr"), unix.MS_RDONLY); err != nil {
		return err
	}
	for _, name := range []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32"} {
		info, err := os.Lstat("/" + name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		inside := filepath.Join(root, name)
		if info.Mode()&fs.ModeSymlink != 0 {
			target, err := os.Readlink("/" + name)
			if err != nil {
				return err
			}
			if err := symlink(target, inside); err != nil {
				return err
			}
			continue
		}
		if err := os.MkdirAll(inside, 0o755); err != nil {
			return err
		}
		if err := bind("/"+name, inside, unix.MS_RDONLY); err != nil {
			return err
		}
	}
	layers := fmt.Sprintf("lowerdir=/etc,upperdir=%s,workdir=%s", overlayPath(filepath.Join(spec.Dir, "etc")), overlayPath(filepath.Join(spec.Dir, "etc.work")))
	if err := unix.Mount("overlay", filepath.Join(root, "etc"), "overlay", 0, layers); err != nil {
		return fmt.Errorf("mounting /etc as an overlay over the machine's: %w; is the state directory on a disk file system (ext4, xfs), and overlay in /proc/filesystems?", err)
	}
	return nil
}

// overlayPath escapes what separates options and layers in overlay's mount data.
func overlayPath(path string) string {
	return strings.NewReplacer(`\`, `\\`, ",", `\,`, ":", `\:`).Replace(path)
}

func writeFiles(spec Spec, root string) error {
	if spec.Again {
		return nil
	}
	etc := filepath.Join(root, "etc")
	// What the machine has for a container runtime or a cluster of its own is not the place's.
	for _, name := range []string{"cni", "containerd", "kubernetes", "resolv.conf", "hostname", "hosts", "machine-id", "ld.so.preload", "mtab"} {
		if err := os.RemoveAll(filepath.Join(etc, name)); err != nil {
			return fmt.Errorf("clearing the place's /etc: %w", err)
		}
	}
	if err := symlink("/proc/self/mounts", filepath.Join(etc, "mtab")); err != nil {
		return err
	}
	id := sha256.Sum256([]byte(spec.Dir))
	files := map[string]string{
		"/etc/hostname":    spec.Name + "\n",
		"/etc/hosts":       "127.0.0.1 localhost\n::1 localhost\n" + spec.Address + " " + spec.Name + "\n",
		"/etc/machine-id":  hex.EncodeToString(id[:16]) + "\n",
		"/etc/resolv.conf": "# No name server is reachable from here.\n",
	}
	for name, text := range spec.Files {
		files[name] = text
	}
	if spec.Preload != "" {
		library := filepath.Join("/opt/devcluster", filepath.Base(spec.Preload))
		if err := copyFile(spec.Preload, filepath.Join(root, library)); err != nil {
			return err
		}
		files["/etc/ld.so.preload"] = library + "\n"
	}
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if slices.Contains(strings.Split(name, "/"), "pki") {
			mode = 0o600
		}
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			return err
		}
	}
	return nil
}

func mountKernel(spec Spec, root string) error {
	inside := func(name string) string { return filepath.Join(root, name) }
	if err := mount("proc", inside("proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	// Files will be mounted over parts of it below. The kernel lets a container with a user
	// namespace mount proc only where one that nothing is mounted over is to be seen.
	if err := os.MkdirAll(inside("opt/devcluster/proc"), 0o555); err != nil {
		return err
	}
	if err := mount("proc", inside("opt/devcluster/proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	// A new one, since it shows the network interfaces of who mounts it.
	if err := mount("sysfs", inside("sys"), "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	points, err := mountPoints()
	if err != nil {
		return err
	}
	for _, point := range []string{"/sys/fs/cgroup", "/sys/fs/bpf", "/sys/kernel/security", "/sys/kernel/debug", "/sys/kernel/tracing"} {
		if slices.Contains(points, point) && exists(inside(point)) {
			if err := bind(point, inside(point), unix.MS_REC); err != nil {
				return err
			}
		}
	}
	if err := bind("/dev", inside("dev"), unix.MS_REC); err != nil {
		return err
	}
	if err := mount("tmpfs", inside("dev/shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
		return err
	}
	if err := mount("tmpfs", inside("run"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return err
	}
	if err := os.Mkdir(inside("run/lock"), 0o755); err != nil {
		return err
	}
	if err := os.Chmod(inside("run/lock"), 0o777|fs.ModeSticky); err != nil {
		return err
	}
	values := inside("run/devcluster/tunables")
	if err := os.MkdirAll(values, 0o755); err != nil {
		return err
	}
	for name, value := range tunables {
		setting := filepath.Join(inside("proc/sys"), name)
		if !exists(setting) {
			continue
		}
		file := filepath.Join(values, strings.ReplaceAll(name, "/", "."))
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		if err := bind(file, setting, 0); err != nil {
			return err
		}
	}
	empty := filepath.Join(values, "empty")
	if err := os.WriteFile(empty, nil, 0o444); err != nil {
		return err
	}
	for _, file := range spec.Empty {
		if exists(inside(file)) {
			if err := bind(empty, inside(file), unix.MS_RDONLY); err != nil {
				return err
			}
		}
	}
	return nil
}

func mountPrograms(spec Spec, root string) error {
	dir := filepath.Join(spec.Dir, "local-bin")
	if err := bind(dir, filepath.Join(root, "usr/local/bin"), 0); err != nil {
		return err
	}
	for name, path := range spec.Programs {
		if err := copyFile(path, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	for name, path := range spec.Links {
		if err := symlink(path, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

func mountShared(spec Spec, root string) error {
	for inside, tree := range spec.Trees {
		target := filepath.Join(root, inside)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := bind(tree, target, unix.MS_RDONLY); err != nil {
			return err
		}
	}
	for _, dir := range spec.Shared {
		target := filepath.Join(root, dir)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := bind(dir, target, 0); err != nil {
			return err
		}
	}
	return nil
}

func switchRoot(_ Spec, root string) error {
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("changing into the root: %w", err)
	}
	// The old root is stacked below the new one at the same place, then taken away from under it.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("switching to the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmounting the machine's root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("changing into the root: %w", err)
	}
	// As on a host with systemd: mounts made here reach containers that ask for it, and back.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("making all mounts shared: %w", err)
	}
	return nil
}

// setKernel makes settings of the new network namespace.
func setKernel(spec Spec, _ string) error {
	if !spec.Forward {
		return nil
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644); err != nil {
		return fmt.Errorf("letting packets be forwarded: %w", err)
	}
	return nil
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", kind, target, err)
	}
	return nil
}

// bind mounts source at target; MS_REC takes along what is mounted below, MS_RDONLY forbids writing.
func bind(source, target string, flags uintptr) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND|flags&unix.MS_REC, ""); err != nil {
		return fmt.Errorf("mounting %s at %s: %w", source, target, err)
	}
	if flags&unix.MS_RDONLY == 0 {
		return nil
	}
	// A remount must name the flags that are to stay.
	var st unix.Statfs_t
	if err := unix.Statfs(target, &st); err != nil {
		return fmt.Errorf("looking at the mount %s: %w", target, err)
	}
	stay := uintptr(st.Flags) & (unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME)
	if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|stay, ""); err != nil {
		return fmt.Errorf("making the mount %s read-only: %w", target, err)
	}
	return nil
}

func symlink(target, path string) error {
	if err := os.Symlink(target, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

func copyFile(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	target, err := os.OpenFile(to, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(target, source)
	return errors.Join(err, target.Close())
}
