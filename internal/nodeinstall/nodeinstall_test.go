package nodeinstall

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/hostns"
)

var update = flag.Bool("update", false, "rewrite testdata/*.golden")

// node is a fake node: its files are in a directory, and its containerd reads
// them when it is started, merging as containerd does.
type node struct {
	t          *testing.T
	dir        string
	configPath string
	version    string

	pid      int // 0: it does not run
	starts   int
	running  map[string]any // what it was started with
	refuse   bool           // it does not start with a configuration that has our handler
	sandbox  []*runtimeapi.PodSandbox
	dumpFail error
}

func newNode(t *testing.T, version, config string) *node {
	t.Helper()
	n := &node{t: t, dir: t.TempDir(), version: version}
	n.configPath = filepath.Join(n.dir, "etc/containerd/config.toml")
	if config != "" {
		n.write("etc/containerd/config.toml", config)
	}
	n.write("usr/bin/runc", "#!runc")
	n.write("payload/bin/stasis-runtime", "runtime 1")
	n.write("payload/criu/bin/criu", "criu 1")
	n.write("payload/criu/lib/libc.so", "libc 1")
	n.start()
	return n
}

func (n *node) path(name string) string { return filepath.Join(n.dir, name) }

func (n *node) write(name, content string) {
	n.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(n.path(name)), 0o755), os.WriteFile(n.path(name), []byte(content), 0o755)); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) read(name string) string {
	n.t.Helper()
	data, err := os.ReadFile(n.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return "(none)"
	} else if err != nil {
		n.t.Fatal(err)
	}
	return string(data)
}

// merged is what containerd makes of its files: 1.x replaces a plugin's whole
// section by an imported file's, 2.x merges them.
func (n *node) merged() map[string]any {
	out := n.defaults()
	pending := []string{n.configPath}
	for len(pending) > 0 {
		data, err := os.ReadFile(pending[0])
		if err != nil {
			break
		}
		file := map[string]any{}
		if err := toml.Unmarshal(data, &file); err != nil {
			n.t.Fatalf("%s is not TOML: %v\n%s", pending[0], err, data)
		}
		imports, _ := file["imports"].([]any)
		if strings.HasPrefix(n.version, "v1.") {
			plugins, _ := file["plugins"].(map[string]any)
			for name, section := range plugins {
				merged, _ := n.defaults()["plugins"].(map[string]any)
				if named := handlersOf(map[string]any{"plugins": map[string]any{name: section}}); len(named) > 0 {
					clear(handlersIn(merged[name])) // its own are no more
				}
				merge(merged, map[string]any{name: section})
				out["plugins"].(map[string]any)[name] = merged[name]
			}
		} else {
			merge(out, file)
		}
		pending = pending[1:]
		for _, pattern := range imports {
			name := pattern.(string)
			if !filepath.IsAbs(name) {
				name = filepath.Join(filepath.Dir(n.configPath), name)
			}
			matches, _ := filepath.Glob(name)
			pending = append(pending, matches...)
		}
	}
	return out
}

// defaults is what containerd has built in.
func (n *node) defaults() map[string]any {
	plugin, runc := "io.containerd.cri.v1.runtime", map[string]any{"runtime_type": runcShim, "options": map[string]any{}}
	if strings.HasPrefix(n.version, "v1.") {
		plugin, runc["sandbox_mode"] = "io.containerd.grpc.v1.cri", "podsandbox"
	}
	return map[string]any{"plugins": map[string]any{plugin: map[string]any{"containerd": map[string]any{"runtimes": map[string]any{
		"runc": runc}}}}}
}

func merge(to, from map[string]any) {
	for key, value := range from {
		a, okA := to[key].(map[string]any)
		b, okB := value.(map[string]any)
		if okA && okB {
			merge(a, b)
			continue
		}
		to[key] = value
	}
}

func handlersIn(plugin any) map[string]any {
	section, _ := plugin.(map[string]any)
	containerd, _ := section["containerd"].(map[string]any)
	runtimes, _ := containerd["runtimes"].(map[string]any)
	return runtimes
}

// handlers are the runtime handlers of a configuration.
func handlersOf(config map[string]any) map[string]any {
	found := map[string]any{}
	for _, name := range []string{"io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"} {
		plugins, _ := config["plugins"].(map[string]any)
		for handler, value := range handlersIn(plugins[name]) {
			found[handler] = value
		}
	}
	return found
}

// start starts containerd, if it can start with its configuration.
func (n *node) start() {
	config := n.merged()
	if _, has := handlersOf(config)[HandlerName]; has && n.refuse {
		n.pid = 0
		return
	}
	n.starts++
	n.pid, n.running = 1000+n.starts, config
}

func (n *node) find() (process, host, error) {
	if n.pid == 0 {
		n.start() // as its supervisor does
	}
	if n.pid == 0 {
		return process{}, nil, errors.New("connection refused")
	}
	p := process{pid: n.pid, exe: "/usr/bin/containerd", args: []string{"containerd", "--config", n.configPath}, path: n.path("usr/bin"), start: fmt.Sprint(n.starts)}
	return p, n, nil
}

func (n *node) Do(fn func() error) error { return fn() }

func (n *node) Run(_ context.Context, c hostns.Command) (hostns.Output, error) {
	if n.dumpFail != nil {
		return hostns.Output{}, n.dumpFail
	}
	if !slices.Equal(c.Args, []string{"--config", n.configPath, "config", "dump"}) {
		n.t.Errorf("ran %s %v", c.Name, c.Args)
	}
	config := n.merged()
	config["version"] = 9 // the latest that it knows, whatever the files say
	out, err := toml.Marshal(config)
	return hostns.Output{Stdout: string(out)}, err
}

func (n *node) cri() cri { return n }

func (n *node) signal(p process) error {
	n.pid = 0
	n.start()
	return nil
}

func (n *node) Version(context.Context, *runtimeapi.VersionRequest, ...grpc.CallOption) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: "containerd", RuntimeVersion: n.version}, nil
}

func (n *node) Status(context.Context, *runtimeapi.StatusRequest, ...grpc.CallOption) (*runtimeapi.StatusResponse, error) {
	if n.pid == 0 {
		return nil, errors.New("connection refused")
	}
	runtimes := map[string]handler{}
	for name, value := range handlersOf(n.running) {
		data, err := toml.Marshal(value)
		if err != nil {
			return nil, err
		}
		var h handler
		if err := toml.Unmarshal(data, &h); err != nil {
			return nil, err
		}
		h.Options, _ = value.(map[string]any)["options"].(map[string]any)
		h.Sandboxer = "podsandbox"
		h.SandboxMode, _ = value.(map[string]any)["sandbox_mode"].(string)
		runtimes[name] = h
	}
	info, err := json.Marshal(map[string]any{"containerd": map[string]any{"defaultRuntimeName": "runc", "runtimes": runtimes}})
	return &runtimeapi.StatusResponse{Info: map[string]string{"config": string(info)}}, err
}

func (n *node) ListPodSandbox(context.Context, *runtimeapi.ListPodSandboxRequest, ...grpc.CallOption) (*runtimeapi.ListPodSandboxResponse, error) {
	return &runtimeapi.ListPodSandboxResponse{Items: n.sandbox}, nil
}

func (n *node) installer() *Installer {
	return &Installer{daemon: n, Config: Config{
		Payload: n.path("payload"), Prefix: n.path("opt/stasis"), Socket: "test", Restart: RestartSignal,
		Timeout: time.Second, Log: slog.New(slog.NewTextHandler(n.t.Output(), nil)),
	}}
}

func (n *node) install() {
	n.t.Helper()
	if err := n.installer().Install(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) removal() Removal {
	return Removal{RunDir: n.path("run/stasis"), StateDir: n.path("var/lib/stasis")}
}

// snapshot is every file below the node's /etc with its content and time.
func (n *node) etc() string {
	n.t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(n.path("etc"), func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(name)
		fmt.Fprintf(&out, "== %s\n%s", strings.TrimPrefix(name, n.dir), data)
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.t.Fatal(err)
	}
	return strings.ReplaceAll(out.String(), n.dir, "")
}

// Configurations as nodes have them.
const (
	configV3 = `# Ours, with care.
version = 3
root = "/data/containerd"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  base_runtime_spec = "/etc/containerd/base.json"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
    SystemdCgroup = true
    BinaryName = "/usr/local/sbin/runc"
    Root = "/run/runc"
`
	configV2 = `version = 2
[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = true`
	configImports = `version = 3
imports = [
  "/etc/elsewhere/*.toml", # of another department
]
`
	configCovered = `imports = ['conf.d/*.toml']
version = 3
`
)

func TestTheHandlerIsWrittenBesideWhatIsThereAndTakenOutExactly(t *testing.T) {
	for _, tc := range []struct {
		name, version, config string
	}{
		{"version 3", "v2.4.2", configV3},
		{"version 2 with containerd 2", "v2.0.5", configV2},
		{"version 2 with containerd 1", "v1.7.28", configV2},
		{"no file with containerd 2", "v2.4.2", ""},
		{"no file with containerd 1", "v1.7.28", ""},
		{"other imports", "v2.1.0", configImports},
		{"imports that cover ours", "v2.4.2", configCovered},
		{"an empty list of imports", "v2.2.0", "version = 3\nimports = []\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t, tc.version, tc.config)
			n.write("usr/local/sbin/runc", "#!runc")
			if strings.Contains(tc.config, "/usr/local/sbin/runc") {
				n.write("etc/containerd/config.toml", strings.ReplaceAll(tc.config, "/usr/local/sbin/runc", n.path("usr/local/sbin/runc")))
				n.start()
			}
			before := n.etc()
			n.install()
			golden(t, tc.name, n.etc())
			handler, ok := handlersOf(n.running)[HandlerName].(map[string]any)
			if !ok {
				t.Fatal("the containerd that runs does not know the handler")
			}
			options := handler["options"].(map[string]any)
			if options["BinaryName"] != runtimeBinary {
				t.Errorf("options %v", options)
			}
			base, _ := handlersOf(n.running)["runc"].(map[string]any)
			baseOptions, _ := base["options"].(map[string]any)
			for key, value := range baseOptions {
				if key != "BinaryName" && options[key] != value {
					t.Errorf("option %s is %v, ordinary Pods have %v", key, options[key], value)
				}
			}
			starts := n.starts
			if err := n.installer().Uninstall(t.Context(), n.removal()); err != nil {
				t.Fatal(err)
			}
			if after := n.etc(); after != before {
				t.Errorf("after uninstall:\n%s\nwant as before:\n%s", after, before)
			}
			if n.starts != starts {
				t.Error("containerd was restarted, under ordinary Pods")
			}
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", strings.ReplaceAll(name, " ", "-")+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs:\n%s", file, got)
	}
}

func TestInstallingAgainTouchesNothing(t *testing.T) {
	n := newNode(t, "v2.4.2", configImports)
	n.install()
	starts := n.starts
	before := map[string]time.Time{}
	walk := func(fn func(name string, info fs.FileInfo)) {
		for _, dir := range []string{"etc", "opt"} {
			err := filepath.WalkDir(n.path(dir), func(name string, d fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				info, err := d.Info()
				fn(name, info)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	walk(func(name string, info fs.FileInfo) { before[name] = info.ModTime() })
	time.Sleep(10 * time.Millisecond)
	n.install()
	if n.starts != starts {
		t.Error("containerd was restarted")
	}
	walk(func(name string, info fs.FileInfo) {
		if !before[name].Equal(info.ModTime()) {
			t.Errorf("%s was touched", name)
		}
	})
}

func TestAnInstallThatDiedBeforeTheRestartIsCompleted(t *testing.T) {
	n := newNode(t, "v2.4.2", configV2[:0]+configImports)
	i := n.installer()
	i.Restart = RestartNone
	if err := i.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, known := handlersOf(n.running)[HandlerName]; known {
		t.Fatal("containerd was restarted")
	}
	n.install()
	if _, known := handlersOf(n.running)[HandlerName]; !known {
		t.Error("the files were right, and containerd was not restarted to read them")
	}
}

func TestAContainerdThatDoesNotComeBackGetsItsConfigurationBack(t *testing.T) {
	n := newNode(t, "v2.4.2", configImports)
	n.refuse = true
	before := n.etc()
	err := n.installer().Install(t.Context())
	if err == nil || !strings.Contains(err.Error(), "containerd has its old configuration back and runs") {
		t.Fatalf("error %v", err)
	}
	if after := n.etc(); after != before {
		t.Errorf("configuration:\n%s\nwant as before:\n%s", after, before)
	}
	if n.pid == 0 {
		t.Error("containerd does not run")
	}
}

func TestAConfigurationThatContainerdDoesNotReadIsNotRun(t *testing.T) {
	n := newNode(t, "v2.4.2", configImports)
	n.dumpFail = errors.New("toml: expected newline")
	before, starts := n.etc(), n.starts
	if err := n.installer().Install(t.Context()); err == nil || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("error %v", err)
	}
	if n.etc() != before || n.starts != starts {
		t.Error("something was changed")
	}
}

func TestAConfigurationThatWouldChangeMoreIsRefused(t *testing.T) {
	was := map[string]any{"imports": []any{"a"}, "plugins": map[string]any{"io.containerd.cri.v1.runtime": map[string]any{
		"containerd": map[string]any{"runtimes": map[string]any{"runc": map[string]any{"runtime_type": "x"}}}}}}
	is := map[string]any{"imports": []any{"b"}, "plugins": map[string]any{"io.containerd.cri.v1.runtime": map[string]any{
		"containerd": map[string]any{"runtimes": map[string]any{"runc": map[string]any{"runtime_type": "y"}, "stasis": map[string]any{}}}}}}
	err := onlyHandlerDiffers(was, is)
	if err == nil || !strings.Contains(err.Error(), "runc.runtime_type (from x to y)") {
		t.Errorf("error %v", err)
	}
}

func TestARunningProgramIsNeverHalfReplaced(t *testing.T) {
	n := newNode(t, "v2.4.2", configImports)
	n.install()
	running, err := os.Open(n.path("opt/stasis/bin/stasis-runtime"))
	if err != nil {
		t.Fatal(err)
	}
	defer running.Close()
	oldCRIU, err := filepath.EvalSymlinks(n.path("opt/stasis/criu"))
	if err != nil {
		t.Fatal(err)
	}
	n.write("payload/bin/stasis-runtime", "runtime 2")
	n.write("payload/criu/lib/libc.so", "libc 2")
	n.install()
	var old bytes.Buffer
	old.ReadFrom(running)
	if old.String() != "runtime 1" {
		t.Errorf("the program that runs became %q", old.String())
	}
	if got := n.read("opt/stasis/bin/stasis-runtime"); got != "runtime 2" {
		t.Errorf("installed is %q", got)
	}
	if data, err := os.ReadFile(filepath.Join(oldCRIU, "lib/libc.so")); err != nil || string(data) != "libc 1" {
		t.Errorf("a CRIU at work lost its library: %q, %v", data, err)
	}
	if got := n.read("opt/stasis/criu/lib/libc.so"); got != "libc 2" {
		t.Errorf("the new CRIU has %q", got)
	}
	// The version before the last is given up.
	n.write("payload/criu/lib/libc.so", "libc 3")
	n.install()
	if _, err := os.Stat(oldCRIU); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an old CRIU is kept: %v", err)
	}
}

func TestACRIUThatWasDamagedIsInstalledAgain(t *testing.T) {
	n := newNode(t, "v2.4.2", configImports)
	n.install()
	n.write("opt/stasis/criu/lib/libc.so", "rotten")
	n.install()
	if got := n.read("opt/stasis/criu/lib/libc.so"); got != "libc 1" {
		t.Errorf("it is %q", got)
	}
}

func TestTheRuntimeOfOrdinaryPodsIsFoundAsContainerdFindsIt(t *testing.T) {
	n := newNode(t, "v2.4.2", configImports)
	n.install()
	if got, want := n.read("opt/stasis/etc/runtime.json"), fmt.Sprintf("{\"runtime\":%q}\n", n.path("usr/bin/runc")); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if err := os.Remove(n.path("usr/bin/runc")); err != nil {
		t.Fatal(err)
	}
	if err := n.installer().Install(t.Context()); err == nil || !strings.Contains(err.Error(), "runc is not in its PATH") {
		t.Errorf("without runc: %v", err)
	}
}

func TestUninstallingWaitsForTheLastRestoredPod(t *testing.T) {
	n := newNode(t, "v2.4.2", configImports)
	n.install()
	n.sandbox = []*runtimeapi.PodSandbox{{RuntimeHandler: "runc"}, {RuntimeHandler: HandlerName, Metadata: &runtimeapi.PodSandboxMetadata{Namespace: "ns", Name: "p"}}}
	err := n.installer().Uninstall(t.Context(), n.removal())
	if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), "ns/p") {
		t.Fatalf("error %v", err)
	}
	if n.read("opt/stasis/bin/stasis-runtime") == "(none)" {
		t.Error("the runtime of a Pod that exists was removed")
	}
	r := n.removal()
	r.Force = true
	if err := n.installer().Uninstall(t.Context(), r); err != nil {
		t.Errorf("by force: %v", err)
	}
}

func TestUninstallingKeepsCheckpointsUnlessToldNotTo(t *testing.T) {
	n := newNode(t, "v2.4.2", configImports)
	n.install()
	n.write("var/lib/stasis/checkpoints/ns_cp_1/manifest.json", "{}")
	if err := n.installer().Uninstall(t.Context(), n.removal()); err != nil {
		t.Fatal(err)
	}
	if n.read("var/lib/stasis/checkpoints/ns_cp_1/manifest.json") != "{}" {
		t.Error("a checkpoint was removed")
	}
	if entries, _ := os.ReadDir(n.path("opt/stasis")); len(entries) != 0 {
		t.Errorf("left in the prefix: %v", entries)
	}
	r := n.removal()
	r.Purge = true
	if err := n.installer().Uninstall(t.Context(), r); err != nil { // again, which harms nothing
		t.Fatal(err)
	}
	if _, err := os.Stat(n.path("var/lib/stasis/checkpoints")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
}

func TestOtherRuntimesAndOldVersionsAreRefused(t *testing.T) {
	for version, want := range map[string]string{"v1.6.30": "too old", "2.x": "is not a version", "v1.7.0-rc.1": ""} {
		err := CheckVersion(&runtimeapi.VersionResponse{RuntimeName: "containerd", RuntimeVersion: version})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", version, err)
		}
	}
	if err := CheckVersion(&runtimeapi.VersionResponse{RuntimeName: "cri-o", RuntimeVersion: "1.35"}); err == nil {
		t.Error("cri-o is accepted")
	}
}

func TestTheServiceOfAProcessIsFoundInItsCgroup(t *testing.T) {
	for cgroup, want := range map[string]string{
		"0::/system.slice/containerd.service\n":                                   "containerd.service",
		"12:freezer:/x.service\n1:name=systemd:/system.slice/k3s.service\n0::/\n": "k3s.service",
		"0::/kubelet.slice/kubelet.service/inner\n":                               "kubelet.service",
		"4:memory:/user.slice\n0::/\n":                                            "",
	} {
		if got := unitOf(cgroup); got != want {
			t.Errorf("%q: %q, want %q", cgroup, got, want)
		}
	}
}

func TestTheConfigurationIsTheOneThatContainerdWasStartedWith(t *testing.T) {
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"containerd"}, defaultConfigPath},
		{[]string{"containerd", "-c", "/a/b.toml"}, "/a/b.toml"},
		{[]string{"containerd", "--log-level", "debug", "--config=/c.toml"}, "/c.toml"},
		{[]string{"containerd", "--config", "relative.toml"}, ""},
		{[]string{"containerd", "--config"}, ""},
	} {
		got, err := process{args: tc.args}.configPath()
		if got != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("%v: %q, %v", tc.args, got, err)
		}
	}
}

func FuzzAddingAndTakingOutTheImportLeavesTheFileAsItWas(f *testing.F) {
	for _, seed := range []string{configV3, configV2, configImports, configCovered, "imports=[]", "\"imports\" = ['x']", "a = 1 # imports = [", "", "\n", "[t]\nimports = ['y']\n"} {
		f.Add(seed)
	}
	h := handlers{HandlerName: derive(handler{RuntimeType: runcShim, Options: map[string]any{"SystemdCgroup": true}}), GVisorHandlerName: deriveGVisor(handler{RuntimeType: runscShim})}
	f.Fuzz(func(t *testing.T, config string) {
		const path = "/etc/containerd/config.toml"
		before := configFiles{main: []byte(config)}
		if !withoutHandlers(before, path).equal(before) {
			t.Skip("it holds our marks already")
		}
		for _, major := range []int{1, 2} {
			after, err := withHandlers(before, path, major, nil, h)
			if err != nil {
				continue
			}
			if head, err := readHead(after.main); err != nil {
				t.Fatalf("no longer TOML: %v\n%s", err, after.main)
			} else if major == 2 && !head.imports(path) {
				t.Fatalf("the drop-in is not imported:\n%s", after.main)
			}
			if again, err := withHandlers(after, path, major, nil, h); err != nil || !again.equal(after) {
				t.Fatalf("done again it changes: %v\n%s", err, again.main)
			}
			if back := withoutHandlers(after, path); !back.equal(before) {
				t.Fatalf("taken out it leaves:\n%q\nwant\n%q", back.main, config)
			}
		}
	})
}

func TestRestoredPodsAreNotCrunsWhereSomethingElseIsThere(t *testing.T) {
	of := func(binary string) handler {
		return handler{RuntimeType: runcShim, Options: map[string]any{"BinaryName": binary}}
	}
	runc, crun, kata := handler{RuntimeType: runcShim}, of("/usr/bin/crun"), handler{RuntimeType: "io.containerd.kata.v2"}
	for _, tc := range []struct {
		handlers map[string]handler
		want     string
	}{
		{map[string]handler{"fast": runc, "runc": runc, "other": crun}, "fast"},
		{map[string]handler{"fast": crun, "runc": runc}, "runc"},
		{map[string]handler{"fast": crun, "own-runc": of("/opt/runc"), "kata": kata, HandlerName: of(runtimeBinary)}, "own-runc"},
	} {
		if _, name, err := (effective{defaultName: "fast", handlers: tc.handlers}).base(); err != nil || name != tc.want {
			t.Errorf("of %v: %q, %v; want %s", tc.handlers, name, err, tc.want)
		}
	}
	if _, _, err := (effective{defaultName: "fast", handlers: map[string]handler{"fast": crun}}).base(); err == nil || !strings.Contains(err.Error(), `"fast"), which cannot restore`) {
		t.Errorf("with crun alone: %v", err)
	}
}

func TestStasisRuntimeIsReplacedBeforeWhatItHandsOverTo(t *testing.T) {
	payload, prefix := t.TempDir(), t.TempDir()
	for _, name := range []string{"stasis-restore", "stasis-runtime"} {
		if err := errors.Join(os.MkdirAll(payload+"/bin", 0o755), os.WriteFile(payload+"/bin/"+name, []byte("new"), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	// The installation ends in between.
	if err := os.MkdirAll(prefix+"/bin/stasis-restore/in-the-way", 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := installPayload(payload, prefix); err == nil {
		t.Fatal("stasis-restore was installed over a directory")
	}
	if got, err := os.ReadFile(prefix + "/bin/stasis-runtime"); err != nil || string(got) != "new" {
		t.Errorf("stasis-runtime is %q, %v", got, err)
	}
}
