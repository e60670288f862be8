package contents_test

import (
	"strings"
	"testing"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents"
)

// before is a small checkpoint to be changed.
func before() *api.CheckpointContents {
	return &api.CheckpointContents{Containers: []api.ContainerContents{{
		Name: "web", Image: "example.org/web:1",
		Processes: []api.Process{
			{PID: 1, Command: "web", State: "running", Threads: 4, AddressSpace: "aa", Arguments: []string{"/bin/web"},
				Memory:   api.ProcessMemory{Virtual: 64 << 20, Captured: 12 << 20, ByKind: map[string]int64{"heap": 8 << 20, "stack": 4 << 20}},
				Mappings: []api.Mapping{{Start: "1000", End: "9000", Kind: "heap", CapturedBytes: 8 << 20}, {Start: "a000", End: "f000", Kind: "stack", CapturedBytes: 4 << 20}},
				Files: []api.OpenFile{{FD: 0, Type: "pipe", Path: "pipe:[11]", Flags: "O_RDONLY"}, {FD: 3, Type: "regular", Path: "/log", Position: 10, Flags: "O_WRONLY"},
					{FD: 4, Type: "regular", Path: "/old"}, {FD: 5, Type: "eventpoll", Path: "watches 1"}, {FD: 6, Type: "timerfd", Path: "runs out in 9s"}},
				Environment: []api.EnvironmentVariable{{Name: "A", Masked: true}, {Name: "B", Value: "1"}}},
			{PID: 7, PPID: 1, Command: "helper", State: "running", AddressSpace: "bb"},
			{PID: 8, PPID: 1, Command: "again", State: "running", AddressSpace: "cc"},
			{PID: 9, PPID: 1, Command: "dies", State: "running", AddressSpace: "dd"},
		},
		Sockets: []api.Socket{{Protocol: "tcp", State: "LISTEN", Local: "0.0.0.0:80"}, {Protocol: "tcp", State: "ESTABLISHED", Local: "1.1.1.1:80", Remote: "2.2.2.2:9"},
			{Protocol: "unix", State: "ESTABLISHED", Local: "socket:[5]", Remote: "socket:[6]"}},
		Mounts:  []api.Mount{{Destination: "/", Type: "overlay"}, {Destination: "/gone", Type: "tmpfs"}},
		Changes: []api.FileChange{{Path: "/kept", Change: "written", Size: 5}, {Path: "/more", Change: "written", Size: 5}, {Path: "/undone", Change: "written", Size: 5}},
	}, {Name: "ended"}}}
}

func text(t *testing.T, a, b *api.CheckpointContents) string {
	t.Helper()
	var w strings.Builder
	must(t, contents.Compare(a, b).Write(&w))
	return w.String()
}

func TestACheckpointDoesNotDifferFromItself(t *testing.T) {
	if d := contents.Compare(before(), before()); !d.Empty() {
		t.Errorf("got %+v", d)
	}
	files, m := specimen(t)
	c := read(t, files, m, contents.Options{})
	if got := text(t, c, c); got != "nothing differs\n" {
		t.Errorf("the specimen: %s", got)
	}
}

func TestNumbersThatTheKernelGivesAreNoDifference(t *testing.T) {
	after := before()
	web := &after.Containers[0]
	web.Processes[0].Files[0].Path = "pipe:[99]"
	web.Sockets[2].Local, web.Sockets[2].Remote = "socket:[77]", "socket:[78]"
	web.Mounts[0].Source = "/another/directory"
	if d := contents.Compare(before(), after); !d.Empty() {
		t.Errorf("got %s", text(t, before(), after))
	}
}

func TestADifferenceIsToldAsText(t *testing.T) {
	after := before()
	after.Containers[1].Name = "begun"
	after.Truncated = []string{"containers[0].sockets"}
	web := &after.Containers[0]
	web.Image = "example.org/web:2"
	p := &web.Processes[0]
	p.Threads, p.Memory.Captured, p.Memory.ByKind["heap"], p.Mappings[0].CapturedBytes = 5, 13<<20, 9<<20, 9<<20
	p.Files[1].Position = 30
	p.Files[2] = api.OpenFile{FD: 4, Type: "regular", Path: "/new\x1b[31m"}
	p.Files[3].Path, p.Files[4].Path = "watches 2", "runs out in 7s"
	p.Environment = []api.EnvironmentVariable{{Name: "A", Masked: true}, {Name: "B", Value: "2"}, {Name: "C", Value: ""}}
	web.Processes[1] = api.Process{PID: 17, PPID: 1, Command: "newcomer", State: "running", Arguments: []string{"newcomer", "-v"}}
	web.Processes[2].AddressSpace = "ee" // its program was started anew
	web.Processes[3] = api.Process{PID: 9, PPID: 1, Command: "dies", State: "zombie"}
	web.Sockets[1] = api.Socket{Protocol: "udp", State: "UNCONNECTED", Local: "0.0.0.0:53"}
	web.Mounts[1] = api.Mount{Destination: "/come", Type: "tmpfs"}
	web.Changes = []api.FileChange{{Path: "/kept", Change: "written", Size: 5}, {Path: "/more", Change: "written", Size: 6}, {Path: "/deleted", Change: "removed"}, {Path: "/anew", Change: "written", Size: 1}}
	want := `- container ended
+ container begun
container web
  image: example.org/web:1 → example.org/web:2
  processes
    - 7 helper, running, 0 B
    - 8 again, running, 0 B
    + 17 newcomer -v, running, 0 B
    + 8 again, running, 0 B
    ~ 1 web
        threads: 4 → 5
        memory: 12.0 MiB → 13.0 MiB (+1.0 MiB)
          heap: 8.0 MiB → 9.0 MiB (+1.0 MiB)
        mappings
          1000 heap: 8.0 MiB → 9.0 MiB (+1.0 MiB)
        open files
          - 4 regular /old
          + 4 regular /new\x1b[31m
          ~ 3 /log: position 10 → position 30
          ~ 5 eventpoll: watches 1 → watches 2
        environment
          ~ B=1 → 2
          + C=(empty)
    ~ 9 dies
        state: running → zombie
  sockets
    - tcp ESTABLISHED 1.1.1.1:80 → 2.2.2.2:9
    + udp UNCONNECTED 0.0.0.0:53
  mounts
    - /gone tmpfs
    + /come tmpfs
  root file system, against the image
    + /anew, 1 B
    - /deleted
    ~ /more: 5 B → 6 B
    ~ /undone: no longer differs from the image
cut in one of the two, so something may be missing: containers[0].sockets
`
	if got := text(t, before(), after); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestMappingsThatMayOnlyBeTooSmallForTheListAreNotSaidToBeGone(t *testing.T) {
	after := before()
	p := &after.Containers[0].Processes[0]
	p.Mappings, p.Memory.Captured = p.Mappings[:1], 12<<20+4096 // so not all are listed
	if got := text(t, before(), after); strings.Contains(got, "a000 stack") {
		t.Errorf("got\n%s", got)
	}
}

func TestSizesAreShownWithTheirUnit(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", -4096: "-4.0 KiB", 1 << 20: "1.0 MiB", 1023 << 10: "1.0 MiB",
		5 << 30: "5.0 GiB", 1<<63 - 1: "8.0 EiB"} {
		if got := contents.Bytes(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}

func TestWhatDoesNotShowIsSpeltOut(t *testing.T) {
	for s, want := range map[string]string{
		"plain ünï 漢字": "plain ünï 漢字", "a\x1b[2Jb": `a\x1b[2Jb`, "a\nb\tc\x7f": `a\x0ab\x09c\x7f`,
		"a\u202eb": `a\u202eb`, "\xff": `\xff`, "\ufffd": "\ufffd",
	} {
		if got := contents.Printable(s); got != want {
			t.Errorf("%q is shown as %s, want %s", s, got, want)
		}
	}
}
