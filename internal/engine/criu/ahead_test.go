package criu

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/test/cc"
)

//go:embed ahead/ahead.c
var librarySource []byte

//go:embed ahead/testdata/asif.c
var programSource []byte

// compiled builds the library, and the program that does as CRIU does.
var compiled = sync.OnceValues(func() (built [2][]byte, err error) {
	if built[0], err = cc.Compile(librarySource, "-shared", "-fPIC"); err != nil {
		return built, err
	}
	built[1], err = cc.Compile(programSource, "-D_FILE_OFFSET_BITS=64")
	return built, err
})

// asIf is a node whose CRIU can be started ahead, and a window for one container. Its OCI
// runtime starts a program that does words, in which @ is dir.
type asIf struct {
	dir    string
	engine *Engine
	window window
}

func newAsIf(t *testing.T, words ...string) asIf {
	t.Helper()
	dir, err := os.MkdirTemp("", "ahead") // a short name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	built, err := compiled()
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\nLD_PRELOAD=%s/%s exec %s/as-if %s\n", dir, aheadLibrary, dir, strings.ReplaceAll(strings.Join(words, " "), "@", dir))
	for name, text := range map[string]string{
		aheadLibrary: string(built[0]), "as-if": string(built[1]), "runtime": script,
		"freezer.state": "FROZEN\n", "bin/criu": "#!/bin/sh\n", "etc/.criu/default.conf": "ghost-limit 2G\n",
	} {
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(text), 0o700)); err != nil {
			t.Fatal(err)
		}
	}
	return asIfIn(t, dir)
}

func asIfIn(t *testing.T, dir string) asIf {
	t.Helper()
	host, err := hostns.FromPID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { host.Close() })
	a := asIf{dir: dir, engine: New(Config{Host: host.WithPath(dir + "/bin:" + hostns.DefaultPath), RunDir: dir, Log: slog.New(slog.DiscardHandler)})}
	// The mark of its processes is a name that nobody else has.
	a.window = window{sandbox: engine.Sandbox{ID: filepath.Base(dir)}, targets: []target{{
		Container: engine.Container{ID: "c1", Name: "main", PID: os.Getpid(), Runtime: engine.Runtime{Binary: dir + "/runtime"}},
		dir:       dir + "/checkpoint", workDir: dir + "/w",
	}}}
	return a
}

func (a asIf) start(t *testing.T) *waiting {
	t.Helper()
	all, err := a.engine.startAhead(t.Context(), a.window)
	if err != nil || len(all) != 1 {
		t.Fatalf("%d wait: %v", len(all), err)
	}
	t.Cleanup(all[0].leave)
	return all[0]
}

func (a asIf) has(name string) bool {
	_, err := os.Stat(filepath.Join(a.dir, name))
	return err == nil
}

func TestACRIUThatIsStartedAheadWaitsForTheFreezeAndIsNotWaitedForAfterItsWork(t *testing.T) {
	a := newAsIf(t, "alarm", "1000", "freezer", "@/freezer.state", "touch", "@/went-on", "answer", "await", "@/end", "exit", "0")
	w := a.start(t)
	if a.has("went-on") {
		t.Error("it did not wait")
	}
	if err := w.capture(t.Context()); err != nil || !a.has("went-on") {
		t.Errorf("it went on: %v; %v", a.has("went-on"), err)
	}
	select {
	case <-w.ended:
		t.Error("it had ended before it was to")
	default:
	}
	if err := os.WriteFile(a.dir+"/end", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.finish(); err != nil {
		t.Error(err)
	}
}

func TestACRIUThatIsCalledOffBeforeTheFreezeEndsByItself(t *testing.T) {
	a := newAsIf(t, "freezer", "@/freezer.state", "touch", "@/went-on")
	w := a.start(t)
	w.callOff()
	var ended *exec.ExitError
	if err := w.finish(); !errors.As(err, &ended) || ended.ExitCode() != 3 {
		t.Errorf("it ended with %v", err)
	}
	if a.has("went-on") {
		t.Error("it went on")
	}
}

// starterEnv makes this test the process that is killed.
const starterEnv = "STASIS_TEST_STARTER"

func TestACRIUWhoseStarterIsKilledEndsByItself(t *testing.T) {
	if dir := os.Getenv(starterEnv); dir != "" {
		asIfIn(t, dir).start(t)
		fmt.Println("it waits")
		select {}
	}
	a := newAsIf(t, "freezer", "@/freezer.state", "touch", "@/went-on")
	starter := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	starter.Env = append(os.Environ(), starterEnv+"="+a.dir)
	out, err := starter.StdoutPipe()
	if err == nil {
		err = starter.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, len("it waits\n"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "it waits\n" {
		t.Errorf("the starter said %q: %v", line, err)
	}
	if marked, err := capturing(a.window.sandbox.ID); err != nil || len(marked) != 1 {
		t.Errorf("before its starter is killed there are %v, %v", marked, err)
	}
	starter.Process.Signal(syscall.SIGKILL)
	starter.Wait()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		marked, err := capturing(a.window.sandbox.ID)
		if err == nil && len(marked) == 0 {
			break
		}
		if time.Now().After(end) {
			kill(marked)
			t.Fatalf("%v still wait, %v", marked, err)
		}
	}
	if a.has("went-on") {
		t.Error("it went on")
	}
}

func TestACRIUThatDoesNotWaitOrFailsBeforeTheFreezeIsToldFromOneThatWaits(t *testing.T) {
	if all, err := newAsIf(t, "exit", "0").tryStart(t); !errors.Is(err, errNotAhead) || !passing(err) {
		t.Errorf("one that captured: %v, %v", all, err)
	}
	all, err := newAsIf(t, "exit", "7").tryStart(t)
	var ended *exec.ExitError
	if !errors.As(err, &ended) || ended.ExitCode() != 7 || errors.Is(err, errNotAhead) {
		t.Errorf("one that failed: %v, %v", all, err)
	}
	other := newAsIf(t, "exit", "0")
	if err := os.Remove(filepath.Join(other.dir, aheadLibrary)); err != nil {
		t.Fatal(err)
	}
	if all, err := other.tryStart(t); err != nil || len(all) != 0 {
		t.Errorf("one that cannot wait was started: %v, %v", all, err)
	}
}

func (a asIf) tryStart(t *testing.T) ([]*waiting, error) {
	return a.engine.startAhead(t.Context(), a.window)
}

func TestACRIUThatFailsOrLastsAfterTheFreezeEndsTheCapture(t *testing.T) {
	var ended *exec.ExitError
	if err := newAsIf(t, "freezer", "@/freezer.state", "exit", "7").start(t).capture(t.Context()); !errors.As(err, &ended) || ended.ExitCode() != 7 {
		t.Errorf("one that failed: %v", err)
	}
	reason := errors.New("no time left")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(reason)
	if err := newAsIf(t, "freezer", "@/freezer.state", "await", "@/never").start(t).capture(ctx); !errors.Is(err, reason) {
		t.Errorf("one that lasts: %v", err)
	}
	if err := newAsIf(t, "freezer", "@/freezer.state", "exit", "0").start(t).capture(t.Context()); err != nil {
		t.Errorf("one that succeeded and did not say so: %v", err)
	}
}

// run does words with the library, held by a test that tells it at once to go on; or calls
// it off.
func (a asIf) run(t *testing.T, goOn bool, words ...string) (string, error) {
	t.Helper()
	socket := filepath.Join(a.dir, "gate")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if goOn {
			conn.Read(make([]byte, len(aheadHeld)))
			conn.Write([]byte("\n"))
			conn.Read(make([]byte, 1)) // until it has ended
		}
	}()
	cmd := exec.Command(a.dir+"/as-if", words...)
	cmd.Env = append(os.Environ(), "LD_PRELOAD="+filepath.Join(a.dir, aheadLibrary), aheadEnv+"="+socket)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, stderr.Bytes())
	}
	return string(out), err
}

func TestTheTimeThatCRIUGivesItselfDoesNotRunWhileItWaits(t *testing.T) {
	a := newAsIf(t)
	if out, err := a.run(t, true, "alarm", "1000", "freezer", a.dir+"/freezer.state", "alarmed"); err != nil || len(out) < 4 || out < "900\n" && out != "1000\n" {
		t.Errorf("of 1000 s there were left %q, %v", out, err)
	}
	if out, err := a.run(t, false, "alarm", "1000", "freezer", a.dir+"/freezer.state"); err == nil || !strings.EqualFold(out, unix.ECANCELED.Error()+"\n") {
		t.Errorf("called off it said %q, %v", out, err)
	}
}

// listing is what tar makes of an archive, in order of names.
func listing(t *testing.T, archive string) string {
	t.Helper()
	cmd := exec.Command("tar", "--list", "--gzip", "--verbose", "--numeric-owner", "--full-time")
	cmd.Stdin = strings.NewReader(archive)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tar does not read it: %v", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func TestSmallFileSystemsAreArchivedWithoutTarAsTarDoesIt(t *testing.T) {
	a := newAsIf(t)
	tree := filepath.Join(a.dir, "tree")
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(tree+"/pts/empty", 0o755), os.Mkdir(tree+"/mqueue", 0o1777), os.Chmod(tree+"/mqueue", os.ModeSticky|0o777),
		os.Symlink("/proc/self/fd", tree+"/fd"), os.WriteFile(tree+"/termination-log", nil, 0o666),
		os.WriteFile(tree+"/pts/lock", bytes.Repeat([]byte("content "), 9000), 0o640), os.Chown(tree+"/pts/lock", 1000, 2000),
		os.WriteFile(tree+"/"+strings.Repeat("n", 90), []byte("x"), 0o600),
		unix.Mknod(tree+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))), unix.Mknod(tree+"/pipe", unix.S_IFIFO|0o600, 0))
	// For who has not been held tar does it.
	archives := func() (ours, tars string) {
		t.Helper()
		ours, err := a.run(t, true, "freezer", a.dir+"/freezer.state", "tar", tree)
		must(err)
		tars, err = a.run(t, true, "tar", tree)
		must(err)
		if got, want := listing(t, ours), listing(t, tars); got != want {
			t.Errorf("it is\n%s\nand of tar\n%s", got, want)
		}
		return ours, tars
	}
	// One of ours is not compressed.
	if ours, tars := archives(); len(ours) < 72000 || len(tars) > 10000 {
		t.Errorf("it has %d bytes, tar's %d", len(ours), len(tars))
	} else {
		into := filepath.Join(a.dir, "into")
		must(os.Mkdir(into, 0o700))
		cmd := exec.Command("tar", "--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory", into)
		cmd.Stdin = strings.NewReader(ours)
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("tar extracts it: %v: %s", err, out)
		}
		if out, err := exec.Command("diff", "-r", tree+"/pts", into+"/pts").CombinedOutput(); err != nil {
			t.Errorf("it differs: %v: %s", err, out)
		}
	}
	for name, add := range map[string]func(name string) error{
		"a file of two names": func(name string) error {
			return errors.Join(os.WriteFile(name, nil, 0o600), os.Link(name, name+"-too"))
		},
		"a long name": func(name string) error { return os.WriteFile(name+strings.Repeat("n", 100), nil, 0o600) },
		"a long link": func(name string) error { return os.Symlink(strings.Repeat("n", 100), name) },
		"much":        func(name string) error { return os.WriteFile(name, bytes.Repeat([]byte("much"), 1<<17), 0o600) },
		"a time before 1970": func(name string) error {
			return errors.Join(os.WriteFile(name, nil, 0o600), os.Chtimes(name, time.Unix(-5, 0), time.Unix(-5, 0)))
		},
	} {
		dir := filepath.Join(tree, "more")
		must(os.Mkdir(dir, 0o700), add(filepath.Join(dir, "x")))
		if ours, _ := archives(); len(ours) > 10000 {
			t.Errorf("with %s it was not tar's: %d bytes", name, len(ours))
		}
		must(os.RemoveAll(dir))
	}
}

func TestCRIUReadsTheListOfMappingsThatIsWrittenForIt(t *testing.T) {
	a := newAsIf(t)
	self, other := strconv.Itoa(os.Getpid()), strconv.Itoa(os.Getppid())
	const list = "400000-401000 r-xp 00000000 00:00 0\nVmFlags: rd ex\n"
	if err := os.WriteFile(filepath.Join(a.dir, listPrefix+self), []byte(list), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := a.run(t, true, "freezer", a.dir+"/freezer.state", "mappings", self); err != nil || out != list {
		t.Errorf("it reads %q, %v", out, err)
	}
	for what, words := range map[string][]string{
		"of another process": {"freezer", a.dir + "/freezer.state", "mappings", other},
		"who was not held":   {"mappings", self},
	} {
		if out, err := a.run(t, true, words...); err != nil || !strings.Contains(out, "\nPss:") {
			t.Errorf("%s reads %.100q, %v", what, out, err)
		}
	}
}

func TestListsOfMappingsAreWrittenWhereCRIUReadsThem(t *testing.T) {
	a := newAsIf(t, "freezer", "@/freezer.state")
	a.start(t)
	a.engine.log = slog.New(slog.NewTextHandler(t.Output(), nil))
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		child.Process.Kill()
		child.Wait()
	})
	pid := child.Process.Pid
	for comm := ""; comm != "sleep\n"; { // it executes its program
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil {
			t.Fatal(err)
		}
		comm = string(data)
	}
	if !a.engine.listsMappings(t.Context()) {
		if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err == nil {
			t.Fatal("lists cannot be written on this kernel, which tells of its types")
		}
		return
	}
	t.Cleanup(func() { a.engine.lister.kernel.Close() })
	a.engine.listMappings(t.Context(), a.window, []int{pid})
	list, err := os.ReadFile(filepath.Join(a.engine.workDir, a.window.sandbox.ID, listPrefix+strconv.Itoa(pid)))
	if err != nil || !strings.Contains(string(list), "[stack]\nVmFlags: rd wr ") || strings.Contains(string(list), "Pss:") {
		t.Errorf("the list is %q, %v", list, err)
	}
}

func TestAMountIsSeenWithoutWhatIsMountedInItAndNoDirectoryIsMadeForThat(t *testing.T) {
	a := newAsIf(t)
	outer := filepath.Join(a.dir, "outer")
	inner := filepath.Join(outer, "inner")
	for _, dir := range []string{outer, inner} {
		err := os.Mkdir(dir, 0o700)
		if err == nil {
			err = unix.Mount("test", dir, "tmpfs", 0, "")
		}
		if err == nil {
			t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
			err = os.WriteFile(filepath.Join(dir, "file-of-"+filepath.Base(dir)), nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for mount, want := range map[string]string{outer: "file-of-outer\ninner\n", inner: "file-of-inner\n"} {
		out, err := a.run(t, true, "freezer", a.dir+"/freezer.state", "alone", mount)
		lines := strings.SplitAfter(out, "\n")
		slices.Sort(lines)
		if got := strings.Join(lines, ""); err != nil || got != want {
			t.Errorf("in %s there is %q, %v", mount, got, err)
		}
	}
	if out, err := a.run(t, true, "alone", inner); err != nil || !strings.Contains(out, "a directory was made") {
		t.Errorf("who was not held said %q, %v", out, err)
	}
}

func TestTheKernelIsAskedForTrackedConnectionsOnlyWhereThereAreSome(t *testing.T) {
	a := newAsIf(t)
	asked := func() string {
		out, err := a.run(t, true, "freezer", a.dir+"/freezer.state", "connections")
		if err != nil {
			t.Error(err)
		}
		return out
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // it ends in a network namespace of its own
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			if got := asked(); got != "none\n" {
				t.Errorf("of a namespace without connections: %q", got)
			}
			// The kernel tracks them where a rule looks at their state.
			for _, command := range []string{
				"ip link set lo up", "nft add table inet t", "nft add chain inet t c { type filter hook output priority 0; }", "nft add rule inet t c ct state new accept",
			} {
				words := strings.Fields(command)
				if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
					return fmt.Errorf("%s: %w: %s", command, err, out)
				}
			}
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			defer listener.Close()
			conn, err := net.Dial("tcp", listener.Addr().String())
			if err != nil {
				return err
			}
			defer conn.Close()
			if got := asked(); got != "the kernel was asked\n" {
				t.Errorf("of a namespace with a connection: %q", got)
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestCgroupHierarchiesAreFoundByWhatTheyControl(t *testing.T) {
	mounts := []*mountinfo.Info{
		{FSType: "cgroup", Root: "/docker", Mountpoint: "/part", VFSOptions: "rw,cpu,cpuacct"},
		{FSType: "cgroup", Root: "/", Mountpoint: "/cpu", VFSOptions: "rw,cpu,cpuacct"},
		{FSType: "cgroup", Root: "/", Mountpoint: "/cpuset", VFSOptions: "rw,cpuset"},
		{FSType: "cgroup", Root: "/", Mountpoint: "/systemd", VFSOptions: "rw,xattr,name=systemd"},
		{FSType: "cgroup2", Root: "/", Mountpoint: "/unified", VFSOptions: "rw,nsdelegate"},
	}
	for controllers, want := range map[string]string{"cpu,cpuacct": "/cpu", "cpuset": "/cpuset", "name=systemd": "/systemd", "": "/unified", "memory": ""} {
		if got := hierarchyMount(mounts, controllers); got != want {
			t.Errorf("%q is at %q, not %q", controllers, got, want)
		}
	}
	if got := hierarchyMount(mounts[:1], "cpu,cpuacct"); got != "" {
		t.Errorf("a part of a hierarchy, at %q, passes for all of it", got)
	}
	yard := t.TempDir()
	if complete, err := linkHierarchies(yard, os.Getpid()); err != nil || !complete {
		t.Fatalf("this machine's: %v, %v", complete, err)
	}
	links, err := os.ReadDir(yard)
	if err != nil || len(links) == 0 {
		t.Fatalf("%d links, %v", len(links), err)
	}
	for _, link := range links {
		if _, err := os.Stat(filepath.Join(yard, link.Name(), "cgroup.procs")); err != nil {
			t.Error(err)
		}
	}
}
