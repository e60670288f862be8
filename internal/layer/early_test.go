package layer

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// hammerEnv has this test binary be the process that changes a tree (see hammer).
const hammerEnv = "STASIS_TEST_HAMMER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(hammerEnv); dir != "" {
		hammer(dir)
		return
	}
	os.Exit(m.Run())
}

// ordinaryDir is a directory on a file system of the kind that containers have.
func ordinaryDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if trusted(dir) {
		return dir
	}
	dir, err := os.MkdirTemp(".", ".test-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	if !trusted(dir) {
		t.Fatalf("neither %s nor the package's directory is on ext4, XFS or btrfs: set TMPDIR", t.TempDir())
	}
	dir, err = filepath.Abs(dir)
	must(t, err)
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func begin(t *testing.T, dir string) *Early {
	t.Helper()
	spool, err := os.CreateTemp(t.TempDir(), "spool-")
	must(t, err)
	e, err := Begin(t.Context(), dir, spool)
	must(t, err)
	t.Cleanup(func() { e.Close() })
	return e
}

// now is the archive of a tree that stands still.
func now(t *testing.T, dir string) []byte {
	t.Helper()
	var b bytes.Buffer
	must(t, Write(t.Context(), &b, dir)) // which reads directories, and that gives them another time of access
	b.Reset()
	must(t, Write(t.Context(), &b, dir))
	return b.Bytes()
}

func take(t *testing.T, e *Early) *Tree {
	t.Helper()
	tree, err := e.Take(t.Context())
	must(t, err)
	return tree
}

func written(t *testing.T, tree *Tree) []byte {
	t.Helper()
	var b bytes.Buffer
	must(t, tree.Write(t.Context(), &b))
	return b.Bytes()
}

func write(t *testing.T, dir, name, content string) string {
	t.Helper()
	full := filepath.Join(dir, name)
	must(t, os.MkdirAll(filepath.Dir(full), 0o755))
	must(t, os.WriteFile(full, []byte(content), 0o644))
	return full
}

// settle waits until what is there has settled.
func settle() { time.Sleep(settling + 50*time.Millisecond) }

// early are the files whose content was copied before.
func early(t *testing.T, e *Early) (names []string) {
	for name, of := range e.known {
		if k, ok := e.contents[of.id]; ok && k.ctime == of.ctime {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func TestWhatHasSettledAndNobodyCanChangeUnseenIsCopiedEarly(t *testing.T) {
	dir := ordinaryDir(t)
	write(t, dir, "d/settled", "1")
	open := write(t, dir, "open", "1")
	mapped := write(t, dir, "mapped", "1")
	from := write(t, dir, "from-below", "1")
	must(t, unix.Setxattr(from, overlayPrefix+"origin", []byte("x"), 0))
	settle()
	f, err := os.OpenFile(open, os.O_WRONLY, 0)
	must(t, err)
	defer f.Close()
	m, err := os.OpenFile(mapped, os.O_RDONLY, 0)
	must(t, err)
	memory, err := unix.Mmap(int(m.Fd()), 0, 1, unix.PROT_READ, unix.MAP_SHARED)
	must(t, err)
	defer unix.Munmap(memory)
	must(t, m.Close())
	write(t, dir, "fresh", "1")

	e := begin(t, dir)
	if got := early(t, e); !slices.Equal(got, []string{"d/settled"}) {
		t.Errorf("copied early: %q", got)
	}
	if want, got := now(t, dir), written(t, take(t, e)); !bytes.Equal(got, want) {
		t.Error("the archive is not that of the tree")
	}
}

func TestWhatChangesAfterTheEarlyCopyIsTakenAsItIsAtTheMoment(t *testing.T) {
	dir := ordinaryDir(t)
	for _, name := range []string{"same", "written", "shorter", "moved", "replaced", "unlinked", "mode", "attribute", "linked", "mapped", "directory/of", "times"} {
		write(t, dir, name, strings.Repeat(name, 1000))
	}
	settle()
	e := begin(t, dir)
	if got := len(early(t, e)); got != 12 {
		t.Fatalf("%d files copied early", got)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	write(t, dir, "written", strings.Repeat("changed", 1000))
	must(t, os.Truncate(in("shorter"), 3))
	must(t, os.Rename(in("moved"), in("elsewhere")))
	must(t, os.Rename(write(t, dir, "other", strings.Repeat("replaceD", 1000)), in("replaced")))
	must(t, os.Remove(in("unlinked")))
	must(t, os.Chmod(in("mode"), 0o600))
	must(t, unix.Setxattr(in("attribute"), "user.x", []byte("y"), 0))
	must(t, os.Link(in("linked"), in("linked-too")))
	f, err := os.OpenFile(in("mapped"), os.O_RDWR, 0)
	must(t, err)
	memory, err := unix.Mmap(int(f.Fd()), 0, 100, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	copy(memory, "stored")
	must(t, unix.Munmap(memory))
	must(t, f.Close())
	must(t, os.Rename(in("directory"), in("folder")))
	must(t, os.Chtimes(in("times"), time.Unix(1, 0), time.Unix(2, 0)))
	write(t, dir, "new", "new")

	want := now(t, dir)
	tree := take(t, e)
	if all := int64(len(want)); tree.Late == 0 || tree.Late > all/2+all/4 {
		t.Errorf("%d bytes of %d were copied late", tree.Late, all)
	}
	for _, name := range []string{"same", "written", "mode"} { // after the moment
		write(t, dir, name, "too late")
	}
	if got := written(t, tree); !bytes.Equal(got, want) {
		t.Error("the archive is not that of the tree as it was")
	}
}

func TestIfTheClockIsSetBackNothingPassesForWhatItWas(t *testing.T) {
	dir := ordinaryDir(t)
	write(t, dir, "f", "1")
	settle()
	e := begin(t, dir)
	end := e.end
	take(t, e)
	if e.end != end {
		t.Fatal("it was copied again although nothing had changed")
	}
	e.offset += time.Minute // it was that much ahead
	take(t, e)
	if e.end == end {
		t.Error("it was not copied again")
	}
}

func TestATreeThatIsTooLargeIsLeftToItsArchive(t *testing.T) {
	defer func(was int) { maxEntries = was }(maxEntries)
	maxEntries = 3
	dir := t.TempDir()
	for _, name := range []string{"1", "2", "3"} { // and the directory itself
		write(t, dir, name, "")
	}
	if tree := take(t, begin(t, dir)); tree != nil {
		t.Errorf("%d entries were remembered", len(tree.items))
	}
}

// What is taken while the processes that change a tree stand still is the tree of that
// moment, byte for byte, though most of it was copied before and all of it is written
// after, while they go on.
func TestATreeThatIsBeingHammeredIsTakenAsItWasAtTheMoment(t *testing.T) {
	rounds := 25
	if s := os.Getenv("STASIS_TEST_EARLY_ROUNDS"); s != "" {
		var err error
		rounds, err = strconv.Atoi(s)
		must(t, err)
	}
	dir := ordinaryDir(t)
	for i := range hammered {
		write(t, dir, hammeredName(i), strconv.Itoa(i))
	}
	self, err := os.Executable()
	must(t, err)
	var processes []*os.Process
	for range 2 {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), hammerEnv+"="+dir)
		cmd.Stderr = os.Stderr
		must(t, cmd.Start())
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		processes = append(processes, cmd.Process)
	}
	settle()
	reused, changed := 0, 0
	for round := range rounds {
		e := begin(t, dir)
		before := len(early(t, e))
		for _, p := range processes {
			stop(t, p)
		}
		want := now(t, dir)
		had := e.end
		tree := take(t, e)
		for _, i := range tree.items {
			if k, ok := e.contents[i.id]; ok && i.regular() && k.ctime == i.ctime {
				reused++
			}
		}
		if e.end > had {
			changed++
		}
		for _, p := range processes {
			must(t, p.Signal(syscall.SIGCONT))
		}
		time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond)
		if got := written(t, tree); !bytes.Equal(got, want) {
			t.Fatalf("round %d: the archive (%d bytes) is not that of the tree as it was (%d bytes); %d files had been copied early", round, len(got), len(want), before)
		}
		must(t, e.Close())
	}
	t.Logf("%d contents of before used, %d of %d rounds with files that had changed", reused, changed, rounds)
	if reused == 0 || changed == 0 {
		t.Error("the test showed nothing")
	}
}

// stop stops a process and returns when it has stopped.
func stop(t *testing.T, p *os.Process) {
	t.Helper()
	must(t, p.Signal(syscall.SIGSTOP))
	for {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid))
		must(t, err)
		if strings.Contains(string(data), "State:\tT") && allStopped(t, p.Pid) {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func allStopped(t *testing.T, pid int) bool {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	must(t, err)
	for _, task := range tasks {
		if data, err := os.ReadFile(task); err == nil && !strings.Contains(string(data), "State:\tT") {
			return false
		}
	}
	return true
}

const hammered = 600

func hammeredName(i int) string { return fmt.Sprintf("%d/%d", i%20, i) }

// hammer changes files of a tree in every way, so often that half of them have settled
// at any time, until it is killed.
func hammer(dir string) {
	var maps [][]byte
	for {
		name := filepath.Join(dir, hammeredName(rand.IntN(hammered)))
		other := filepath.Join(dir, hammeredName(rand.IntN(hammered)))
		value := strings.Repeat(strconv.Itoa(rand.Int()), 1+rand.IntN(2000))
		switch rand.IntN(10) {
		case 0, 1:
			os.WriteFile(name, []byte(value), 0o644)
		case 2:
			os.Truncate(name, int64(rand.IntN(20000)))
		case 3:
			os.Rename(name, other)
		case 4:
			os.Remove(name)
		case 5:
			os.Chmod(name, 0o600|os.FileMode(rand.IntN(8)))
		case 6:
			unix.Setxattr(name, "user.hammer", []byte(value[:10]), 0)
		case 7:
			os.Remove(other)
			os.Link(name, other)
		default: // a store into a mapping, which stays for a while
			f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
			if err != nil {
				continue
			}
			if info, err := f.Stat(); err == nil && info.Size() >= 10 {
				if m, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
					maps = append(maps, m[:10])
				}
			}
			f.Close()
		}
		for _, m := range maps {
			store(m, value)
		}
		if len(maps) > 20 {
			for _, m := range maps[:10] {
				unix.Munmap(m[:cap(m)])
			}
			maps = slices.Delete(maps, 0, 10)
		}
		time.Sleep(4 * time.Millisecond)
	}
}

// store writes into a mapping whose file may have been truncated meanwhile.
func store(m []byte, value string) {
	// process_vm_writev fails where a store would end the process.
	local := []unix.Iovec{{Base: &[]byte(value)[0], Len: 10}}
	remote := []unix.RemoteIovec{{Base: uintptr(unsafe.Pointer(&m[0])), Len: 10}}
	unix.ProcessVMWritev(os.Getpid(), local, remote, 0)
}
