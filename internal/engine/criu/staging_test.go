package criu

import "testing"

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
	if _, ok := s.reserve(1, "/proc"); ok {
		t.Error("what is not memory passes for it")
	}
}
