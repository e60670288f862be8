package criu

import (
	"reflect"
	"testing"

	"github.com/moby/sys/mountinfo"
)

func TestARestoredContainerIsShownItsOwnCgroups(t *testing.T) {
	mounts := []*mountinfo.Info{
		{Root: "/", Mountpoint: "/sys/fs/cgroup/cpu,cpuacct", FSType: "cgroup", VFSOptions: "rw,cpu,cpuacct"},
		{Root: "/", Mountpoint: "/sys/fs/cgroup/systemd", FSType: "cgroup", VFSOptions: "rw,xattr,name=systemd"},
		{Root: "/", Mountpoint: "/sys/fs/cgroup/mine", FSType: "cgroup", VFSOptions: "rw,name=mine"}, // which runc knows nothing of
		{Root: "/part", Mountpoint: "/elsewhere/memory", FSType: "cgroup", VFSOptions: "rw,memory"},  // not the whole of it
		{Root: "/", Mountpoint: "/again/systemd", FSType: "cgroup", VFSOptions: "rw,xattr,name=systemd"},
	}
	binds := func(path string) []Bind {
		return []Bind{{"/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct" + path}, {"/sys/fs/cgroup/systemd", "/sys/fs/cgroup/systemd" + path}}
	}
	for path, want := range map[string][]Bind{
		"/kubepods/pod1/abc": binds("/kubepods/pod1/abc"),
		"kubepods-burstable-pod1_2.slice:cri-containerd:abc": binds("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-abc.scope"),
		"-.slice:cri:abc":      binds("/cri-abc.scope"),
		"/k\n/abc":             nil,
		"relative":             nil, // to where runc is, which it knows
		"":                     nil,
		":cri-containerd:abc":  nil,
		"system.slice:nothing": nil,
	} {
		if got := cgroupBinds(mounts, path, "/sys/fs/cgroup"); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %v, want %v", path, got, want)
		}
	}
}
