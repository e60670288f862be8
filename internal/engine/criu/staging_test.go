package criu

import (
	"os"
	"testing"
)

func TestImagesAreStagedWithinTheirBoundOnly(t *testing.T) {
	const memory = "/dev/shm"
	s := &staging{most: 3 << 20}
	release, ok := s.reserve(2<<20, memory)
	if !ok {
		t.Fatal("what fits was refused")
	}
	if _, ok := s.reserve(2<<20, memory); ok {
		t.Error("two captures took more than the bound together")
	}
	release()
	if release, ok = s.reserve(3<<20, memory); !ok {
		t.Error("what was given back is not to be had again")
	} else {
		release()
	}
	if _, ok := (&staging{}).reserve(1, memory); ok {
		t.Error("without a bound nothing is staged")
	}
	if _, ok := (&staging{most: 1 << 60}).reserve(1<<50, memory); ok {
		t.Error("more was taken than the machine has")
	}
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	quarter := kilobytes(meminfo, "MemTotal:") / 4
	if _, ok := (&staging{most: -1 << 20}).reserve(4096, memory); !ok {
		t.Error("of its own accord it takes nothing")
	}
	if _, ok := (&staging{most: -1 << 20, taken: quarter}).reserve(4096, memory); ok {
		t.Error("of its own accord it takes more than a quarter of the node's memory")
	}
	if _, ok := s.reserve(1, "/proc"); ok {
		t.Error("what is not memory passes for it")
	}
}
