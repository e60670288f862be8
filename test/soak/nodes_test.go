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
