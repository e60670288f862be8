package criu

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// A process that its CPU limit holds back (throttled) does not reach the point
// where the v1 freezer stops it, and CRIU's parasite, which runs inside the
// container's cgroup, would be held back while the Pod stands still. So the
// limits of the container and of the Pod around it are lifted for the window.

// cgroupOf returns the path of a process' cgroup for a controller ("cpu",
// "freezer"), and whether the hierarchy is the unified one (cgroups(7)).
func cgroupOf(pid int, controller string) (path string, unified bool, err error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	return parseCgroup(f, controller)
}

func parseCgroup(r io.Reader, controller string) (path string, unified bool, err error) {
	s := bufio.NewScanner(r)
	for s.Scan() {
		parts := strings.SplitN(s.Text(), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for c := range strings.SplitSeq(parts[1], ",") {
			if c == controller {
				return parts[2], false, nil
			}
		}
		if parts[0] == "0" && parts[1] == "" {
			path = parts[2]
		}
	}
	if err := s.Err(); err != nil {
		return "", false, err
	}
	if path == "" {
		return "", false, fmt.Errorf("the process is in no cgroup of controller %s", controller)
	}
	return path, true, nil
}

// cgroupMount returns where the calling thread's mount namespace has a
// controller's hierarchy, or the unified one.
func cgroupMount(controller string, unified bool) (string, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, func(m *mountinfo.Info) (skip, stop bool) {
		switch {
		case unified:
			skip = m.FSType != "cgroup2"
		case m.FSType != "cgroup":
			skip = true
		default:
			skip = true
			for option := range strings.SplitSeq(m.VFSOptions, ",") {
				if option == controller {
					skip = false
				}
			}
		}
		return skip, !skip
	})
	if err != nil {
		return "", err
	}
	if len(mounts) == 0 {
		return "", fmt.Errorf("the cgroup hierarchy of controller %s is not mounted", controller)
	}
	return mounts[0].Mountpoint, nil
}

// quotasOf lists the CPU quotas that bound a process: its cgroup's and its
// parent's (the Pod's), parents first, without those that are unlimited. It runs
// in the host's mount namespace.
func quotasOf(pid int) ([]liftedQuota, error) {
	path, unified, err := cgroupOf(pid, "cpu")
	if err != nil {
		return nil, fmt.Errorf("find the CPU cgroup of process %d: %w", pid, err)
	}
	mount, err := cgroupMount("cpu", unified)
	if err != nil {
		return nil, err
	}
	name := "cpu.cfs_quota_us"
	if unified {
		name = "cpu.max"
	}
	var quotas []liftedQuota
	for _, dir := range []string{filepath.Dir(path), path} {
		file := filepath.Join(mount, dir, name)
		old, err := os.ReadFile(file)
		if os.IsNotExist(err) {
			continue // the root of the hierarchy has no quota
		} else if err != nil {
			return nil, err
		}
		value := strings.TrimSpace(string(old))
		if value == "-1" || strings.HasPrefix(value, "max") {
			continue
		}
		quotas = append(quotas, liftedQuota{File: file, Old: value})
	}
	return quotas, nil
}

// lift takes the limit off.
func (q liftedQuota) lift() error {
	unlimited := "-1"
	if filepath.Base(q.File) == "cpu.max" {
		unlimited = "max"
	}
	return os.WriteFile(q.File, []byte(unlimited), 0)
}

// putBack writes the old limit. A cgroup that is gone needs none.
func (q liftedQuota) putBack() error {
	err := os.WriteFile(q.File, []byte(q.Old), 0)
	if os.IsNotExist(err) {
		return nil
	}
	return err
}
