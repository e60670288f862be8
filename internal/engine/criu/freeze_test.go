package criu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// A freezer of the unified hierarchy whose processes do as a test says.
func fakeFreezer(t *testing.T, frozen bool) freezer {
	t.Helper()
	f := freezer{mount: t.TempDir(), unified: true}
	events := "populated 1\nfrozen 0\n"
	if frozen {
		events = "populated 1\nfrozen 1\n"
	}
	if err := errors.Join(os.WriteFile(filepath.Join(f.mount, "cgroup.freeze"), []byte("0"), 0o600), os.WriteFile(filepath.Join(f.mount, "cgroup.events"), []byte(events), 0o600)); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f freezer) wanted(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(f.mount, "cgroup.freeze"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestAContainerThatDoesNotStopIsLetGoAndSaidSo(t *testing.T) {
	f := fakeFreezer(t, false)
	if err := f.stop(t.Context()); err == nil || f.wanted(t) != "0" {
		t.Errorf("got %v, and the freezer is told %q", err, f.wanted(t))
	}
	ended := errors.New("no time left")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(ended)
	if err := f.stop(ctx); !errors.Is(err, ended) || f.wanted(t) != "0" {
		t.Errorf("got %v, and the freezer is told %q", err, f.wanted(t))
	}
	stops := fakeFreezer(t, true)
	if err := stops.stop(t.Context()); err != nil || stops.wanted(t) != "1" {
		t.Errorf("got %v, and the freezer is told %q", err, stops.wanted(t))
	}
	if err := stops.letRun(); err != nil || stops.wanted(t) != "0" {
		t.Errorf("got %v, and the freezer is told %q", err, stops.wanted(t))
	}
	if err := (freezer{mount: t.TempDir() + "/gone", unified: true}).letRun(); err != nil {
		t.Errorf("a container that is gone: %v", err)
	}
}

func TestOnlyAContainersOwnFreezerIsUsed(t *testing.T) {
	if _, ok := freezerOfContainer("no-such-container", os.Getpid()); ok {
		t.Error("this test's own freezer passes for a container's")
	}
	if _, ok := (frozenContainer{ID: "a"}).freezer(); ok {
		t.Error("a journal that names none has one")
	}
}
