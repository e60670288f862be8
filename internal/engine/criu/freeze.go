package criu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A container is frozen and thawed by its cgroup, as its OCI runtime would do it: a
// program that is started for that takes longer than the kernel does, and a Pod stands
// still meanwhile. What is not sure is left to the OCI runtime.

const (
	// stopPatience is how long processes may take to stop; then those that have are let
	// go, for others may wait for them.
	stopPatience = 200 * time.Millisecond
	stopAttempts = 3
	stopPause    = 10 * time.Millisecond
)

// freezerOfContainer finds a container's own freezer cgroup; not ok where its process
// is in another, as where it has made cgroups itself.
func freezerOfContainer(id string, pid int) (f freezer, ok bool) {
	f, err := freezerOf(pid)
	return f, err == nil && id != "" && strings.Contains(filepath.Base(f.path), id)
}

// freezer is the container's, as the journal has it; not ok if that names none.
func (c frozenContainer) freezer() (f freezer, ok bool) {
	return freezer{mount: c.Freezer, unified: c.Unified}, c.Freezer != ""
}

// stop freezes and returns when all processes stand still. On error none does.
func (f freezer) stop(ctx context.Context) error {
	for range stopAttempts {
		if err := f.freeze(); err != nil {
			return errors.Join(err, f.thaw())
		}
		for end := time.Now().Add(stopPatience); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(300 * time.Microsecond) {
			frozen, err := f.frozen()
			if err != nil {
				return errors.Join(err, f.thaw())
			}
			if frozen {
				return nil
			}
		}
		if err := f.thaw(); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		time.Sleep(stopPause)
	}
	return fmt.Errorf("its processes did not stop within %v, %d times", stopPatience, stopAttempts)
}

// letRun thaws, if the container is there.
func (f freezer) letRun() error {
	err := f.thaw()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
