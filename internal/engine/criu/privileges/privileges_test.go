package privileges_test

import (
	"archive/zip"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"io/fs"
	"maps"
	"path"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/seccomp"
	"google.golang.org/protobuf/proto"

	"podstasis.dev/stasis/internal/engine/criu/privileges"
	"podstasis.dev/stasis/internal/nodeapi"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// captured are the images of a container that was captured for real, and what its OCI
// spec allows.
func captured(t testing.TB) (fstest.MapFS, *nodeapi.Privileges) {
	t.Helper()
	z, err := zip.OpenReader("../../../contents/testdata/specimen.zip")
	must(t, err)
	defer z.Close()
	var spec struct {
		Process struct {
			User            struct{ UID, GID uint32 }
			Capabilities    nodeapi.Capabilities
			NoNewPrivileges bool
		}
		Linux struct {
			Namespaces []struct{ Type string }
			Seccomp    *struct{}
		}
	}
	images := fstest.MapFS{}
	container := ""
	for _, f := range z.File {
		dir, name := path.Split(f.Name)
		parts := strings.Split(dir, "/")
		if len(parts) < 3 || parts[0] != "containers" || container != "" && parts[1] != container {
			continue
		}
		container = parts[1]
		r, err := f.Open()
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		if name == "config.json" {
			must(t, json.Unmarshal(data, &spec))
		} else if strings.HasSuffix(name, ".img") {
			images[name] = &fstest.MapFile{Data: data}
		}
	}
	p := &nodeapi.Privileges{
		UID: spec.Process.User.UID, GID: spec.Process.User.GID, Capabilities: spec.Process.Capabilities,
		NoNewPrivileges: spec.Process.NoNewPrivileges, Seccomp: spec.Linux.Seccomp != nil,
	}
	for _, ns := range spec.Linux.Namespaces {
		p.Namespaces = append(p.Namespaces, ns.Type)
	}
	return images, p
}

func TestWhatWasCapturedMayBeRestoredInTheSameContainer(t *testing.T) {
	images, allowed := captured(t)
	if len(allowed.Capabilities.Bounding) == 0 || len(allowed.Namespaces) < 4 || len(images) < 10 {
		t.Fatalf("the specimen is odd: %d images, %+v", len(images), allowed)
	}
	must(t, privileges.Check(context.Background(), images, allowed))
}

func image(magic uint32, entries ...proto.Message) *fstest.MapFile {
	data := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, 0x54564319), magic)
	if magic == magicInventory {
		data = data[4:]
	}
	for _, e := range entries {
		b, err := proto.MarshalOptions{AllowPartial: true}.Marshal(e)
		if err != nil {
			panic(err)
		}
		data = append(binary.LittleEndian.AppendUint32(data, uint32(len(b))), b...)
	}
	return &fstest.MapFile{Data: data}
}

const (
	magicTree, magicCore, magicInventory, magicSeccomp = 0x50273030, 0x55053847, 0x58313116, 0x64413049
)

// subject is a small tree of images: process 1 with thread 2, both of user 1000, and
// process 3, which has ended.
type subject struct {
	tree      []*pstree.PstreeEntry
	cores     map[string]*criu_core.CoreEntry
	inventory *inventory.InventoryEntry
	filters   *seccomp.SeccompEntry // nil: there is no image of them
	allowed   *nodeapi.Privileges
}

func makeSubject() *subject {
	filter := criu_core.SeccompMode_filter
	thread := func() *criu_core.CoreEntry {
		return &criu_core.CoreEntry{
			Tc: &criu_core.TaskCoreEntry{TaskState: proto.Uint32(1), Comm: proto.String("sh")},
			Ids: &criu_core.TaskKobjIdsEntry{
				PidNsId: proto.Uint32(11), NetNsId: proto.Uint32(12), IpcNsId: proto.Uint32(13),
				UtsNsId: proto.Uint32(14), MntNsId: proto.Uint32(15), UserNsId: proto.Uint32(6),
			},
			ThreadCore: &criu_core.ThreadCoreEntry{
				SeccompMode: &filter,
				Creds: &creds.CredsEntry{
					Uid: proto.Uint32(1000), Gid: proto.Uint32(1000), Euid: proto.Uint32(1000), Egid: proto.Uint32(1000),
					Suid: proto.Uint32(1000), Sgid: proto.Uint32(1000), Fsuid: proto.Uint32(1000), Fsgid: proto.Uint32(1000),
					CapBnd: []uint32{1, 0}, CapPrm: []uint32{0, 0}, CapEff: []uint32{0, 0}, CapInh: []uint32{0, 0},
					NoNewPrivs: proto.Uint32(1), Groups: []uint32{1000},
				},
			},
		}
	}
	return &subject{
		tree: []*pstree.PstreeEntry{
			{Pid: proto.Uint32(1), Ppid: proto.Uint32(0), Threads: []uint32{1, 2}},
			{Pid: proto.Uint32(3), Ppid: proto.Uint32(1), Threads: []uint32{2089745184}}, // as CRIU writes it

		},
		cores: map[string]*criu_core.CoreEntry{"core-1.img": thread(), "core-2.img": thread(),
			"core-3.img": {Tc: &criu_core.TaskCoreEntry{TaskState: proto.Uint32(6)}}},
		inventory: &inventory.InventoryEntry{RootIds: &criu_core.TaskKobjIdsEntry{
			PidNsId: proto.Uint32(1), NetNsId: proto.Uint32(2), IpcNsId: proto.Uint32(3),
			UtsNsId: proto.Uint32(4), MntNsId: proto.Uint32(5), UserNsId: proto.Uint32(6),
		}},
		allowed: &nodeapi.Privileges{
			UID: 1000, GID: 1000, NoNewPrivileges: true, Seccomp: true,
			Capabilities: nodeapi.Capabilities{Bounding: []string{"CAP_CHOWN"}, Permitted: []string{"CAP_CHOWN"}},
			Namespaces:   []string{"pid", "network", "ipc", "uts", "mount", "cgroup"},
		},
	}
}

// shareFilters gives process 1 two seccomp filters with these flags.
func (s *subject) shareFilters(first, second uint32) {
	s.filters = &seccomp.SeccompEntry{SeccompFilters: []*seccomp.SeccompFilter{
		{Filter: []byte{0}, Flags: proto.Uint32(first)},
		{Filter: []byte{0}, Flags: proto.Uint32(second), Prev: proto.Uint32(0)},
	}}
	s.cores["core-1.img"].ThreadCore.SeccompFilter = proto.Uint32(1)
}

func (s *subject) files() fstest.MapFS {
	var tree []proto.Message
	for _, e := range s.tree {
		tree = append(tree, e)
	}
	files := fstest.MapFS{"pstree.img": image(magicTree, tree...), "inventory.img": image(magicInventory, s.inventory)}
	if s.filters != nil {
		files["seccomp.img"] = image(magicSeccomp, s.filters)
	}
	for name, c := range s.cores {
		files[name] = image(magicCore, c)
	}
	return files
}

func TestImagesThatGiveAProcessMoreThanItsContainerMayHaveAreRefusedWithBothValues(t *testing.T) {
	who := func(s *subject) *creds.CredsEntry { return s.cores["core-1.img"].ThreadCore.Creds }
	disabled := criu_core.SeccompMode_disabled
	for name, c := range map[string]struct {
		change func(s *subject)
		says   []string // nothing: it may
	}{
		"as it was":                          {func(*subject) {}, nil},
		"another user":                       {func(s *subject) { who(s).Uid = proto.Uint32(1001) }, nil},
		"less capabilities":                  {func(s *subject) { who(s).CapBnd = []uint32{0, 0} }, nil},
		"less than the container":            {func(s *subject) { s.allowed.Seccomp, s.allowed.NoNewPrivileges = false, false }, nil},
		"root in root's container":           {func(s *subject) { who(s).Uid, s.allowed.UID = proto.Uint32(0), 0 }, nil},
		"uid 0":                              {func(s *subject) { who(s).Uid = proto.Uint32(0) }, []string{"process 1 (sh)", "uid 0", "user 1000"}},
		"effective uid 0":                    {func(s *subject) { who(s).Euid = proto.Uint32(0) }, []string{"process 1", "euid 0", "user 1000"}},
		"saved uid 0":                        {func(s *subject) { who(s).Suid = proto.Uint32(0) }, []string{"suid 0"}},
		"group 0":                            {func(s *subject) { who(s).Groups = []uint32{5, 0} }, []string{"group 0", "1000"}},
		"a bounding capability":              {func(s *subject) { who(s).CapBnd = []uint32{1 | 1<<21, 0} }, []string{"CAP_SYS_ADMIN", "bounding", "CAP_CHOWN"}},
		"one of the second word":             {func(s *subject) { who(s).CapBnd = []uint32{1, 1 << 7} }, []string{"CAP_BPF"}},
		"an unknown one":                     {func(s *subject) { who(s).CapBnd = []uint32{1, 1 << 31} }, []string{"63"}},
		"an effective capability":            {func(s *subject) { who(s).CapEff = []uint32{1 << 12, 0} }, []string{"CAP_NET_ADMIN", "effective"}},
		"a permitted capability":             {func(s *subject) { who(s).CapPrm = []uint32{1 << 12, 0} }, []string{"CAP_NET_ADMIN", "permitted"}},
		"an inheritable capability":          {func(s *subject) { who(s).CapInh = []uint32{1 << 12, 0} }, []string{"CAP_NET_ADMIN", "inheritable"}},
		"an ambient capability":              {func(s *subject) { who(s).CapAmb = []uint32{1 << 12, 0} }, []string{"CAP_NET_ADMIN", "ambient"}},
		"may gain privileges":                {func(s *subject) { who(s).NoNewPrivs = nil }, []string{"no_new_privs is 0", "noNewPrivileges"}},
		"no seccomp":                         {func(s *subject) { s.cores["core-1.img"].ThreadCore.SeccompMode = &disabled }, []string{"seccomp mode 0", "mode 2"}},
		"no seccomp, said by nothing":        {func(s *subject) { s.cores["core-1.img"].ThreadCore.SeccompMode = nil }, []string{"seccomp mode 0"}},
		"a thread without seccomp":           {func(s *subject) { s.cores["core-2.img"].ThreadCore.SeccompMode = &disabled; s.shareFilters(0, 0) }, []string{"thread 2 of process 1", "seccomp mode 0"}},
		"a thread with its process' filters": {func(s *subject) { s.cores["core-2.img"].ThreadCore.SeccompMode = &disabled; s.shareFilters(1, 1) }, nil},
		"a thread with some of them":         {func(s *subject) { s.cores["core-2.img"].ThreadCore.SeccompMode = &disabled; s.shareFilters(0, 1) }, []string{"thread 2 of process 1", "seccomp mode 0"}},
		"a thread with uid 0":                {func(s *subject) { s.cores["core-2.img"].ThreadCore.Creds.Uid = proto.Uint32(0) }, []string{"thread 2 of process 1", "uid 0"}},
		"no AppArmor profile":                {func(s *subject) { s.allowed.AppArmorProfile = "cri-containerd.apparmor.d" }, []string{`profile ""`, "cri-containerd"}},
		"the node's processes":               {func(s *subject) { s.cores["core-1.img"].Ids.PidNsId = proto.Uint32(1) }, []string{"process 1", "pid namespace of the node"}},
		"the node's files":                   {func(s *subject) { s.cores["core-1.img"].Ids.MntNsId = proto.Uint32(5) }, []string{"mount namespace of the node"}},
		"the node's network":                 {func(s *subject) { s.cores["core-1.img"].Ids.NetNsId = proto.Uint32(2) }, []string{"network namespace"}},
		"the node's network as asked": {func(s *subject) {
			s.cores["core-1.img"].Ids.NetNsId = proto.Uint32(2)
			s.allowed.Namespaces = []string{"pid", "ipc", "uts", "mount"}
		}, nil},
		"a user namespace":            {func(s *subject) { s.cores["core-1.img"].Ids.UserNsId = proto.Uint32(7) }, []string{"user namespace of its own"}},
		"a process that nobody knows": {func(s *subject) { s.cores["core-3.img"].Tc.TaskState = proto.Uint32(1) }, []string{"credentials"}},
		"no privileges said":          {func(s *subject) { s.allowed = nil }, []string{"older than the agent"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := makeSubject()
			c.change(s)
			err := privileges.Check(context.Background(), s.files(), s.allowed)
			if c.says == nil {
				must(t, err)
				return
			}
			if err == nil {
				t.Fatal("it was accepted")
			}
			for _, want := range c.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("it says %q, and not %q", err, want)
				}
			}
		})
	}
}

func TestImagesThatCanBeUnderstoodInTwoWaysAreRefused(t *testing.T) {
	entry := func(m proto.Message) []byte {
		b, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
		must(t, err)
		return b
	}
	raw := func(magic uint32, entries ...[]byte) *fstest.MapFile {
		f := image(magic)
		for _, e := range entries {
			f.Data = append(binary.LittleEndian.AppendUint32(f.Data, uint32(len(e))), e...)
		}
		return f
	}
	s := makeSubject()
	good := entry(s.cores["core-1.img"])
	s.cores["core-1.img"].ThreadCore.Creds.Uid = proto.Uint32(0)
	evil := entry(s.cores["core-1.img"])
	files := makeSubject().files()
	for name, f := range map[string]*fstest.MapFile{
		"two entries":            raw(magicCore, evil, good),
		"two of one field":       raw(magicCore, append(append([]byte{}, evil...), good...)),
		"and the other way":      raw(magicCore, append(append([]byte{}, good...), evil...)),
		"another kind":           raw(magicTree, good),
		"an entry that is cut":   {Data: raw(magicCore, good).Data[:40]},
		"nothing":                {},
		"no entry":               raw(magicCore),
		"nonsense":               raw(magicCore, []byte{0xff, 0xff, 0xff}),
		"a length beyond itself": {Data: append(raw(magicCore).Data, 0xff, 0xff, 0xff, 0xff)},
	} {
		with := maps.Clone(files)
		with["core-1.img"] = f
		if err := privileges.Check(context.Background(), with, s.allowed); err == nil {
			t.Errorf("%s: it was accepted", name)
		}
	}
	for _, missing := range []string{"core-1.img", "core-2.img", "pstree.img", "inventory.img"} {
		without := maps.Clone(files)
		delete(without, missing)
		if err := privileges.Check(context.Background(), without, s.allowed); err == nil || !strings.Contains(err.Error(), missing) {
			t.Errorf("without %s: %v", missing, err)
		}
	}
}

func FuzzCheck(f *testing.F) {
	s := makeSubject()
	files := s.files()
	f.Add(files["core-1.img"].Data, files["pstree.img"].Data, files["inventory.img"].Data)
	f.Fuzz(func(t *testing.T, core, tree, inventory []byte) {
		var dir fs.FS = fstest.MapFS{"core-1.img": {Data: core}, "core-2.img": files["core-2.img"], "core-3.img": files["core-3.img"],
			"pstree.img": {Data: tree}, "inventory.img": {Data: inventory}}
		privileges.Check(context.Background(), dir, s.allowed) // comes back, with or without an error
	})
}

func TestSeccompFiltersThatLeadNowhereAreRefused(t *testing.T) {
	disabled := criu_core.SeccompMode_disabled
	for name, change := range map[string]func(*subject){
		"to itself":     func(s *subject) { s.filters.SeccompFilters[1].Prev = proto.Uint32(1) },
		"past the last": func(s *subject) { s.filters.SeccompFilters[1].Prev = proto.Uint32(2) },
		"none at all":   func(s *subject) { s.filters.SeccompFilters = nil },
		"no image":      func(s *subject) { s.filters = nil },
	} {
		t.Run(name, func(t *testing.T) {
			s := makeSubject()
			s.cores["core-2.img"].ThreadCore.SeccompMode = &disabled
			s.shareFilters(1, 1)
			change(s)
			if err := privileges.Check(t.Context(), s.files(), s.allowed); err == nil {
				t.Error("they were taken")
			}
		})
	}
}
