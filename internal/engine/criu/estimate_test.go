package criu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/layer"
)

func TestThePaceIsTheMedianOfTheLatestCheckpoints(t *testing.T) {
	var p pace
	if got := p.expect(0); got != defaultBase {
		t.Errorf("an unknown node: %v for nothing", got)
	}
	if got, want := p.expect(512<<20), defaultBase+2*time.Second; got != want {
		t.Errorf("an unknown node: %v for 512 MiB, want %v", got, want)
	}
	for _, took := range []time.Duration{100, 110, 5000} { // one was disturbed
		p.learn(1<<20, took*time.Millisecond)
	}
	if got := p.expect(0); got != 110*time.Millisecond {
		t.Errorf("%v for nothing", got)
	}
	for range 3 {
		p.learn(1<<30, 1110*time.Millisecond)
	}
	if got := p.expect(2 << 30); got != 2110*time.Millisecond {
		t.Errorf("%v for 2 GiB", got)
	}
	for range paceSamples { // the node has become slower
		p.learn(1<<30, 4110*time.Millisecond)
	}
	if got := p.expect(1 << 30); got != 4110*time.Millisecond {
		t.Errorf("%v for 1 GiB", got)
	}
}

func TestWhatWasLongAgoDoesNotCount(t *testing.T) {
	samples := []sample{{time.Now().Add(-2 * paceSampleAge), 7}}
	if got := median(samples, time.Now(), 3); got != 3 {
		t.Errorf("got %v", got)
	}
}

func TestTheSizeOfATreeCountsLinkedFilesOnce(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "b")); err != nil {
		t.Fatal(err)
	}
	if got, err := treeSize(t.Context(), dir); err != nil || got < 1<<20 || got > 1<<20+8<<10 {
		t.Errorf("%d, %v", got, err)
	}
}

func TestHolesOfFilesCountForNothingUntilTheyAreTooLarge(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "sparse")
	if err := os.WriteFile(file, []byte("begin"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, layer.MaxSparse); err != nil {
		t.Fatal(err)
	}
	if got, err := treeSize(t.Context(), dir); err != nil || got > 64<<10 {
		t.Errorf("%d, %v", got, err)
	}
	if err := os.Truncate(file, layer.MaxSparse+1); err != nil {
		t.Fatal(err)
	}
	if _, err := treeSize(t.Context(), dir); !errors.Is(err, engine.ErrUnsupported) || !strings.Contains(err.Error(), file) {
		t.Errorf("one that is too large: %v", err)
	}
}

func TestTheMemoryOfAProcessIsWhatItHasTouched(t *testing.T) {
	debug.FreeOSMemory() // not meanwhile
	before, err := memoryOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	// Not of the heap, which may have had them all along.
	block, err := unix.Mmap(-1, 0, 64<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(block) }()
	for i := 0; i < len(block); i += 4096 {
		block[i] = 1
	}
	after, err := memoryOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if grown := after.private - before.private; grown < 60<<20 || grown > 80<<20 {
		t.Errorf("it grew by %d bytes, touched were %d", grown, len(block))
	}
}

func TestOnlyDescendantsOfInitBelongToAContainer(t *testing.T) {
	// 10 is init; 11 and 12 descend from it; 20 was started from outside, 21 by 20.
	parents := map[int]int{10: 1, 11: 10, 12: 11, 20: 999, 21: 20}
	for pid, want := range map[int]bool{10: true, 11: true, 12: true, 20: false, 21: false} {
		if got := descends(pid, 10, parents); got != want {
			t.Errorf("process %d: %v", pid, got)
		}
	}
	if descends(5, 10, map[int]int{5: 6, 6: 5}) {
		t.Error("a circle leads to init")
	}
}

func TestTheParentIsReadBehindANameThatHoldsAnything(t *testing.T) {
	for stat, want := range map[string]int{
		"7 (sh) S 5 7 7 0":          5,
		"7 (a) R 1 (b) S 6 7 7 0":   6,
		"7 (x y)) S) D 42 7 7 0 -1": 42,
	} {
		if got, err := parseParent([]byte(stat)); err != nil || got != want {
			t.Errorf("%q: %d, %v", stat, got, err)
		}
	}
	if _, err := parseParent([]byte("7 (sh) Z 5 7")); !errors.Is(err, errEnded) {
		t.Errorf("a zombie: %v", err)
	}
	for _, stat := range []string{"", "7", "7 (sh)", "7 (sh) S", "7 (sh) S x"} {
		if _, err := parseParent([]byte(stat)); err == nil {
			t.Errorf("%q was read", stat)
		}
	}
}

func TestAProcessThatHasEndedIsNoError(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if _, err := parentOf(cmd.Process.Pid); !errors.Is(err, errEnded) {
		t.Errorf("its parent: %v", err)
	}
	if m, err := memoryOf(cmd.Process.Pid); err != nil || m != (memory{}) {
		t.Errorf("its memory: %v, %v", m, err)
	}
}

func TestAProcessThatEndsWhileItIsReadIsNoError(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for _, name := range []string{"maps", "stat", "status", "smaps_rollup"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/%s", cmd.Process.Pid, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		files = append(files, f)
	}
	cmd.Process.Kill()
	cmd.Wait()
	for _, f := range files {
		// What is read of such a file is the kernel's affair: nothing, or ESRCH.
		if _, err := io.ReadAll(f); err != nil && !ended(err) {
			t.Errorf("%s: %v", f.Name(), err)
		}
	}
	if _, err := io.ReadAll(files[1]); !ended(err) {
		t.Errorf("%s says %v", files[1].Name(), err)
	}
}

func TestTheDisksErrorIsFoundInCRIUs(t *testing.T) {
	if err := diskError("Error (criu/bfd.c:131): bfd: Error flushing image: No space left on device"); err == nil || err.Error() != "no space left on device" {
		t.Errorf("got %v", err)
	}
	if err := diskError("Error (criu/page-xfer.c:1): write: Input/output error"); err == nil {
		t.Error("got nothing")
	}
	if err := diskError("Error (criu/tty.c:1): no such tty"); err != nil {
		t.Errorf("got %v", err)
	}
}

func FuzzParseParent(f *testing.F) {
	f.Add([]byte("7 (sh) S 5 7 7 0"))
	f.Add([]byte("7 (sh"))
	f.Fuzz(func(t *testing.T, stat []byte) { _, _ = parseParent(stat) })
}

func TestOptionsOtherThanTheCommonOnesAreRefused(t *testing.T) {
	e := New(Config{})
	if err := engine.CheckOptions(e, map[string]string{engine.OptionFreezeBudget: "1s"}); err != nil {
		t.Error(err)
	}
	for _, bad := range []map[string]string{{"speed": "max"}, {engine.OptionFreezeBudget: "1"}, {engine.OptionFreezeBudget: "-1s"}} {
		if err := engine.CheckOptions(e, bad); !errors.Is(err, engine.ErrOption) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
