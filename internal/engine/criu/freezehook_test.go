package criu

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestOnlySocketsOfRestoresThatWereKilledAreRemoved(t *testing.T) {
	// A short path: that of a test's own directory may be too long for a socket.
	runDir, err := os.MkdirTemp("", "hooks")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(runDir)
	var hooks [2]*hookListener
	for i := range hooks {
		if hooks[i], err = listenForHook(runDir, func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	listening, killed := hooks[0], hooks[1]
	defer listening.close()
	// What the death of the process does.
	if err := killed.dir.Close(); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		what  string
		after time.Duration
		left  bool
	}{
		{"just made", 0, true},
		{"a while later", time.Minute, false},
	} {
		// Whatever is being restored on this machine meanwhile.
		if err := removeUnlockedHooks(runDir, time.Now().Add(step.after)); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Dir(listening.path)); err != nil {
			t.Errorf("%s: that of a restore under way: %v", step.what, err)
		}
		if _, err := os.Stat(filepath.Dir(killed.path)); (err == nil) != step.left {
			t.Errorf("%s: that of a killed one: %v", step.what, err)
		}
	}
}

func TestAHookOfAnEarlierVersionKeepsCRIUAndHasTheRestoreGivenUp(t *testing.T) {
	runDir, err := os.MkdirTemp("", "hooks") // a short path
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(runDir)
	givenUp := make(chan struct{})
	h, err := listenForHook(runDir, func() error { close(givenUp); return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	returned := make(chan struct{})
	go func() {
		KeepFromResuming(func(string) string { return h.path })
		close(returned)
	}()
	select {
	case <-givenUp:
	case <-time.After(10 * time.Second):
		t.Error("the restore goes on")
	}
	select {
	case <-returned:
		t.Error("it has returned: CRIU lets the processes go")
	case <-time.After(100 * time.Millisecond):
	}
}

func TestMountPointsOfCRIUsThatWereKilledAreRemovedWhenTheyAreOld(t *testing.T) {
	dir := t.TempDir()
	old, other := filepath.Join(dir, ".criu.mntns.a"), filepath.Join(dir, "other")
	for _, name := range []string{old, other} {
		if err := os.Mkdir(name, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		after time.Duration
		left  bool
	}{{time.Minute, true}, {2 * time.Hour, false}} {
		if err := removeMountPoints(dir, time.Now().Add(step.after)); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(old); (err == nil) != step.left {
			t.Errorf("after %s: %v", step.after, err)
		}
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("another directory: %v", err)
	}
}
