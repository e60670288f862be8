package main

import (
	"maps"
	"slices"
	"testing"
)

// What a containerd 2.4.2 says of shims when it starts. Only of the first it was killed
// before it had written down how to reach it.
const said = `time="2026-11-26T22:01:23.756094482Z" level=info msg="connecting to shim a6a1acbcd2e05d44424abadbc6844c758b9d41b548ef6d1f80a5bac3d9b8e2db" address="unix:///run/containerd/s/48c98614ab181990be116faaecf52f2b5a70c743636bd7cbc7e7b6ce2a050c18" namespace=k8s.io protocol=ttrpc version=3
time="2026-11-26T22:01:23.776311979Z" level=error msg="failed to load shim /run/containerd/io.containerd.runtime.v2.task/k8s.io/8757dd4590e1312fcc3556f3eb1d6a4db36999e28e7b5705438fc3879a349690" error="unable to load shim \"8757dd4590e1312fcc3556f3eb1d6a4db36999e28e7b5705438fc3879a349690\": failed to read bootstrap.json when restoring bundle \"8757dd4590e1312fcc3556f3eb1d6a4db36999e28e7b5705438fc3879a349690\": unable to migrate shim: failed to get socket address for bundle /run/containerd/io.containerd.runtime.v2.task/k8s.io/8757dd4590e1312fcc3556f3eb1d6a4db36999e28e7b5705438fc3879a349690: open /run/containerd/io.containerd.runtime.v2.task/k8s.io/8757dd4590e1312fcc3556f3eb1d6a4db36999e28e7b5705438fc3879a349690/address: no such file or directory" namespace=k8s.io
time="2026-11-26T22:01:23.776311979Z" level=error msg="failed to load shim /run/containerd/io.containerd.runtime.v2.task/k8s.io/ce661f82782db73635ae80027588e644c331f34e7608d34e5c29760f2120926b" error="unable to load shim \"ce661f82782db73635ae80027588e644c331f34e7608d34e5c29760f2120926b\": context deadline exceeded" namespace=k8s.io
time="2026-11-26T22:01:23.790275952Z" level=info msg="cleaning leaked shim process" id=dae26d1cbc46a185c9d8758b330e687965420513f775e7f9af818d40ea016398 namespace=k8s.io
time="2026-11-26T22:09:26.763436510Z" level=warning msg="failed to query shim pids, keeping shim registered" error="container not created: not found" id=ae6d07bb68eef61328ec628177e6dc383da4cabd9e2b9a37e1292e9b5d47943a namespace=k8s.io
`

func TestOnlyAShimThatContainerdHasNoRecordOfIsTakenForForgotten(t *testing.T) {
	got := slices.Collect(maps.Keys(unrecorded([]byte(said))))
	if want := []string{"8757dd4590e1312fcc3556f3eb1d6a4db36999e28e7b5705438fc3879a349690"}; !slices.Equal(got, want) {
		t.Errorf("unrecorded are %v, want %v", got, want)
	}
}

// What it says when the kubelet is killed while it starts a container of one sandbox, and
// when a start in another fails by itself.
const saidOfContainers = `time="2026-11-27T00:30:42.197690315Z" level=info msg="CreateContainer within sandbox \"fa401f0ab450ed88058f39bbdcfa7b7cb2fad1af64316a0e64eb45184ed63ee9\" for name:\"main\" returns container id \"32f8c22aa728601a90e63df11d6b44d8e5c32995d0ebade3f05bf6a86a8096c9\""
time="2026-11-27T00:30:42.535330345Z" level=info msg="CreateContainer within sandbox \"4b50296788f864b432dcc02117387948390399f0d117488052aa52a628195717\" for name:\"main\" returns container id \"2dd6a9f8b973670a275559186939d693c6bf6251049de1d979fc5ec0d82edd5a\""
time="2026-11-27T00:30:42.721085018Z" level=error msg="StartContainer for \"2dd6a9f8b973670a275559186939d693c6bf6251049de1d979fc5ec0d82edd5a\" failed" error="rpc error: code = Unknown desc = failed to create containerd task: failed to create shim task: the restore failed"
time="2026-11-27T00:30:42.826012777Z" level=error msg="StartContainer for \"32f8c22aa728601a90e63df11d6b44d8e5c32995d0ebade3f05bf6a86a8096c9\" failed" error="rpc error: code = Unknown desc = failed to create containerd task: failed to create shim task: context canceled"
`

func TestOnlyASandboxWhoseContainerWasGivenUpMayLeaveItsShim(t *testing.T) {
	got := slices.Collect(maps.Keys(abandoned([]byte(saidOfContainers))))
	if want := []string{"fa401f0ab450ed88058f39bbdcfa7b7cb2fad1af64316a0e64eb45184ed63ee9"}; !slices.Equal(got, want) {
		t.Errorf("abandoned are %v, want %v", got, want)
	}
}

func TestWhatAShellSaysOfAChildThatCRIUTookWithItIsNoCount(t *testing.T) {
	const log = "count=1 nonce=a\nTrace/breakpoint trap\ncount=2 nonce=a\n"
	if _, err := read(log, false); err == nil {
		t.Error("a source that nobody has killed a CRIU of may lose processes")
	}
	rest, lost := withoutTraps(log)
	if r, err := read(rest, false); err != nil || !lost || r.last != 2 {
		t.Errorf("without it the log is read as %+v, %v", r, err)
	}
	if _, lost := withoutTraps(rest); lost {
		t.Error("a log without it is taken for one with it")
	}
}

func TestTheSandboxOfAShimIsReadFromItsCommandLine(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"/usr/local/bin/containerd-shim-runc-v2", "-namespace", "k8s.io", "-id", "8757", "-address", "/run/containerd/containerd.sock"}, "8757"},
		{[]string{"/usr/local/bin/containerd-shim-runc-v2", "-id"}, ""},
		{[]string{"/usr/local/bin/containerd", "-id", "8757"}, ""},
	} {
		if got := (process{args: c.args}).sandbox(); got != c.want {
			t.Errorf("the sandbox of %q is %q, want %q", c.args, got, c.want)
		}
	}
}
