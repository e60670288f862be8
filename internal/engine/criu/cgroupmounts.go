package criu

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// With cgroups of version 1 and without a cgroup namespace a container sees its own cgroups by
// bind mounts, one for each hierarchy. runc makes them from the cgroups that it finds itself in:
// at a start these are the container's, at a restore its own. A restored container would see the
// limits of whoever has restored it, or the whole node's cgroups.

// known are the controllers, as runc names them, in whose hierarchies it gives a container a
// cgroup. In others the container is where its parent is.
var known = []string{"cpuset", "devices", "memory", "cpu", "cpuacct", "pids", "blkio", "hugetlb", "net_cls", "net_prio", "perf_event", "freezer", "rdma", "name=systemd"}

// Bind is a path inside a container, and what of the host is there.
type Bind struct{ Destination, Source string }

// CgroupBinds are those of a container that has cgroupsPath in its OCI spec, and a mount of the
// type cgroup at destination. None where the spec leaves the path to the runtime.
func CgroupBinds(cgroupsPath, destination string) ([]Bind, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, mountinfo.FSTypeFilter("cgroup"))
	if err != nil {
		return nil, fmt.Errorf("find the cgroup hierarchies: %w", err)
	}
	return cgroupBinds(mounts, cgroupsPath, destination), nil
}

func cgroupBinds(mounts []*mountinfo.Info, cgroupsPath, destination string) (binds []Bind) {
	path := cgroupsPath
	if slice, rest, bySystemd := strings.Cut(cgroupsPath, ":"); bySystemd {
		prefix, name, ok := strings.Cut(rest, ":")
		if slice == "" || !ok {
			return nil
		}
		path = sliceDir(slice) + "/" + prefix + "-" + name + ".scope"
	}
	if !filepath.IsAbs(path) || strings.ContainsAny(path+destination, "] \t\n\"'#") {
		return nil
	}
	for _, m := range mounts {
		mine := slices.ContainsFunc(strings.Split(m.VFSOptions, ","), func(option string) bool { return slices.Contains(known, option) })
		if m.Root != "/" || !mine {
			continue
		}
		b := Bind{filepath.Join(destination, filepath.Base(m.Mountpoint)), filepath.Join(m.Mountpoint, path)}
		if !slices.ContainsFunc(binds, func(other Bind) bool { return other.Destination == b.Destination }) { // mounted twice
			binds = append(binds, b)
		}
	}
	return binds
}

// sliceDir is the cgroup of a slice of systemd: a-b.slice is in a.slice.
func sliceDir(slice string) (dir string) {
	name := strings.TrimSuffix(slice, ".slice")
	if name == "-" {
		return ""
	}
	for i, c := range name + "-" {
		if c == '-' {
			dir += "/" + name[:i] + ".slice"
		}
	}
	return dir
}
