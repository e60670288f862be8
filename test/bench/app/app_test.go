package app

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestGapsAreReadLineByLine(t *testing.T) {
	gaps, err := parseGaps("5000000 1000000000 1005000000\n7000000 2000000000 9000000000\n6000000 99")
	if err != nil {
		t.Fatal(err)
	}
	want := []Gap{
		{5 * time.Millisecond, time.Unix(1, 0), time.Unix(1, 5000000)},
		{7 * time.Millisecond, time.Unix(2, 0), time.Unix(9, 0)},
	}
	if len(gaps) != len(want) || gaps[0] != want[0] || gaps[1] != want[1] {
		t.Errorf("got %v, want %v: the line that is being written is none yet", gaps, want)
	}
	if _, err := parseGaps("5000000 1000000000\n"); err == nil {
		t.Error("a line with two numbers was taken")
	}
}

func TestResidentMemoryIsThisProcessesOwn(t *testing.T) {
	debug.FreeOSMemory() // not meanwhile
	before, err := Process{os.Getpid()}.Resident()
	if err != nil {
		t.Fatal(err)
	}
	touched, err := unix.Mmap(-1, 0, 64<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(touched)
	for i := 0; i < len(touched); i += 4096 {
		touched[i] = 1
	}
	after, err := Process{os.Getpid()}.Resident()
	if err != nil {
		t.Fatal(err)
	}
	if grown := after - before; grown < 60<<20 || grown > 80<<20 {
		t.Errorf("64 MiB that were touched show as %d bytes", grown)
	}
}

func TestACgroupIsADirectoryWithThisProcess(t *testing.T) {
	dir, err := Process{os.Getpid()}.Cgroup()
	if err != nil {
		t.Fatal(err)
	}
	procs, err := os.ReadFile(dir + "/cgroup.procs")
	if err != nil {
		t.Fatal(err)
	}
	if own := "\n" + strconv.Itoa(os.Getpid()) + "\n"; !strings.Contains("\n"+string(procs), own) {
		t.Errorf("%s does not list this process", dir)
	}
}
