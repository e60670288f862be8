package mappings

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// open opens the kernel. Where that does not describe its types it must say so.
func open(t testing.TB) *Kernel {
	t.Helper()
	k, err := Open()
	if _, statErr := os.Stat("/sys/kernel/btf/vmlinux"); errors.Is(statErr, fs.ErrNotExist) && err != nil {
		t.Skipf("as it should on this kernel: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

// real is what the kernel's own smaps has of what Of writes.
func real(t testing.TB, pid int) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	entries, err := parse(data)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, e := range entries {
		out.WriteString(e.line + "\n" + flagsPrefix + e.flags + "\n")
	}
	return out.String()
}

// still is a process with mappings of many kinds that stands still. It is a child: memory of
// this one changes while it is looked at.
func still(t testing.TB, advice ...string) int {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "MAPPINGS_TEST="+strings.Join(advice, ","))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	stop(t, cmd.Process.Pid)
	return cmd.Process.Pid
}

// stop returns when a child stands still.
func stop(t testing.TB, pid int) {
	t.Helper()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var status unix.Siginfo
	if err := unix.Waitid(unix.P_PID, pid, &status, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
}

var advised = map[string]int{
	"dontfork": unix.MADV_DONTFORK, "wipeonfork": unix.MADV_WIPEONFORK, "dontdump": unix.MADV_DONTDUMP,
	"random": unix.MADV_RANDOM, "sequential": unix.MADV_SEQUENTIAL, "huge": unix.MADV_HUGEPAGE, "nohuge": unix.MADV_NOHUGEPAGE,
}

func TestMain(m *testing.M) {
	kinds, subject := os.LookupEnv("MAPPINGS_TEST")
	if !subject {
		os.Exit(m.Run())
	}
	for kind := range strings.SplitSeq(kinds, ",") {
		flags := unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
		switch kind {
		case "shared":
			flags = unix.MAP_SHARED | unix.MAP_ANONYMOUS
		case "down":
			flags |= unix.MAP_GROWSDOWN
		case "locked":
			flags |= unix.MAP_LOCKED
		case "noreserve":
			flags |= unix.MAP_NORESERVE
		}
		mapped, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, flags)
		if err != nil {
			panic(err)
		}
		if advice, ok := advised[kind]; ok {
			if err := unix.Madvise(mapped, advice); err != nil {
				panic(err)
			}
		}
	}
	fmt.Println()
	time.Sleep(time.Hour)
}

var all = append([]string{"shared", "down", "locked", "noreserve", "plain"}, "dontfork", "wipeonfork", "dontdump", "random", "sequential", "huge", "nohuge")

func learned(t testing.TB, k *Kernel) *Names {
	t.Helper()
	n, err := Learn(k)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestWhatIsWrittenIsWhatTheKernelSays(t *testing.T) {
	k := open(t)
	n := learned(t, k)
	pid := still(t, all...)
	want := real(t, pid)
	for _, kind := range []string{"dc", "wf", "dd", "rr", "sr", "hg", "nh", "lo", "gd", "nr", "sh"} {
		if !strings.Contains(want, " "+kind+" ") {
			t.Errorf("no mapping has the flag %s", kind)
		}
	}
	got, err := n.Of(k, pid)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("it writes\n%s, the kernel says\n%s", got, want)
	}
}

// TestProgramsOfManyKindsAreKnown has programs of other makes stand still: what they do
// with their memory is what was thought of.
func TestProgramsOfManyKindsAreKnown(t *testing.T) {
	k := open(t)
	n := learned(t, k)
	for _, program := range [][]string{
		{"sh", "-c", "read x"}, {"python3", "-c", "import threading,time,mmap; threading.Thread(target=time.sleep,args=(60,)).start(); m=mmap.mmap(-1,4096); time.sleep(60)"},
		{"perl", "-e", "sleep 60"}, {"bash", "-c", "read x < <(sleep 60)"}, {"java", "-version"},
	} {
		name, err := exec.LookPath(program[0])
		if err != nil {
			t.Logf("no %s here", program[0])
			continue
		}
		cmd := exec.Command(name, program[1:]...)
		if _, err := cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(150 * time.Millisecond) // it begins; whatever it does then is right
		stop(t, cmd.Process.Pid)
		if got, err := n.Of(k, cmd.Process.Pid); err != nil || string(got) != real(t, cmd.Process.Pid) {
			t.Errorf("%s: %v", program[0], err)
		}
		cmd.Process.Kill()
		cmd.Wait()
	}
}

func TestAProcessWithFlagsThatWereNotLearnedIsNotWritten(t *testing.T) {
	k := open(t)
	n := learned(t, k)
	pid := still(t, "plain")
	areas, err := k.areas(pid)
	if err != nil || len(areas) == 0 {
		t.Fatalf("%v, %v", areas, err)
	}
	delete(n.flags, areas[len(areas)/2].Flags)
	if got, err := n.Of(k, pid); !errors.Is(err, ErrUnknown) {
		t.Errorf("it writes %s, %v", got, err)
	}
}

func TestProcessesWithManyMappingsAndNoneAreTold(t *testing.T) {
	k := open(t)
	many := still(t, slices.Repeat([]string{"plain", "dontfork"}, 3000)...)
	areas, err := k.areas(many)
	if err != nil || len(areas) < 6000 {
		t.Errorf("of more than 6000 mappings it tells of %d: %v", len(areas), err)
	}
	if areas, err := k.areas(2); err != nil || len(areas) > 0 { // a kernel thread
		t.Errorf("a thread of the kernel has %d mappings: %v", len(areas), err)
	}
	if list, err := learned(t, k).Of(k, 2); err != nil || len(list) > 0 {
		t.Errorf("of a thread of the kernel is written %q, %v", list, err)
	}
	if areas, err := k.areas(1 << 22); err == nil && len(areas) > 0 {
		t.Errorf("a process that is not there has %d mappings", len(areas))
	}
}

// BenchmarkList compares what Of takes with what the kernel's own smaps does, for a process
// with 256 MiB.
func BenchmarkList(b *testing.B) {
	memory, err := unix.Mmap(-1, 0, 256<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Munmap(memory)
	b.Run("smaps", func(b *testing.B) {
		for b.Loop() {
			if _, err := os.ReadFile("/proc/self/smaps"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("learn", func(b *testing.B) {
		k := open(b)
		for b.Loop() {
			learned(b, k)
		}
	})
	b.Run("here", func(b *testing.B) {
		k := open(b)
		n := learned(b, k)
		for b.Loop() {
			if _, err := n.Of(k, os.Getpid()); err != nil {
				b.Log(err) // its memory changes
			}
		}
	})
}
