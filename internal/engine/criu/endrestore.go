package criu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A restoring process may be killed at any moment: the container runtime does so when
// whoever asked it is gone. The OCI runtime and CRIU live on then, and nobody is there
// any more to freeze what they restore. So CRIU's hook does not let go of it
// (FreezeHookName), and whoever works on that container or sandbox next ends them.

// restoreEnv marks every process of a restore with SANDBOX.CONTAINER, by their IDs.
const restoreEnv = "STASIS_RESTORE"

// endPatience bounds how long processes that were killed may take to end.
const endPatience = 5 * time.Second

// EndRestores ends what is left of restores of a container, or of a sandbox's
// containers, whose restoring process is gone or gives up. Nothing that they have
// restored runs, neither before nor meanwhile. There may be some only if there is something
// of a restore in runDir (RestorePrefix): then all processes of the node are looked at.
func EndRestores(runDir, id string) error {
	entries, err := os.ReadDir(runDir)
	if err == nil && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), RestorePrefix) }) || errors.Is(err, fs.ErrNotExist) {
		return nil
	} // and any other error says nothing: all are looked at
	for end := time.Now().Add(endPatience); ; time.Sleep(5 * time.Millisecond) {
		marked, err := markedBy(restoreEnv)
		if err != nil {
			return fmt.Errorf("look for what is left of a restore: %w", err)
		}
		left := 0
		for pid, mark := range marked {
			sandbox, container, _ := strings.Cut(mark, ".")
			if id == "" || id != sandbox && id != container {
				continue
			}
			left++
			// What is in the container's cgroup first, CRIU among it: CRIU's end lets go
			// of what it holds.
			if err := endContainer(pid, container); err != nil {
				return fmt.Errorf("end an interrupted restore: %w", err)
			}
			if err := kill([]int{pid}); err != nil {
				return fmt.Errorf("end an interrupted restore: %w", err)
			}
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d processes of an interrupted restore of %s do not end", left, id)
		}
	}
}

// endContainer kills all that is in the container's cgroup if pid is in it. It stands
// still until all of it has been killed, so nothing of it runs.
func endContainer(pid int, container string) error {
	f, err := freezerOf(pid)
	if err != nil || !strings.Contains(filepath.Base(f.path), container) {
		return nil // it has ended, or is outside: the OCI runtime, or a CRIU whose hook has been answered
	}
	err = f.freeze()
	if err == nil {
		err = f.killAll()
	}
	err = errors.Join(err, f.thaw())
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil // the cgroup has gone
	}
	return err
}

// killAll kills what is in the cgroup and those below.
func (f freezer) killAll() error {
	pids, err := f.processes()
	return errors.Join(err, kill(pids))
}

// processes are those in the cgroup and those below.
func (f freezer) processes() (pids []int, err error) {
	err = filepath.WalkDir(filepath.Join(f.mount, f.path), func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.Name() != "cgroup.procs" {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for field := range strings.FieldsSeq(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return err
			}
			pids = append(pids, pid)
		}
		return nil
	})
	return pids, err
}

// removeMountPoints removes the directories upon which CRIUs that were killed had
// mounted the root file systems of containers. No restore takes an hour.
func removeMountPoints(dir string, now time.Time) error {
	points, err := filepath.Glob(filepath.Join(dir, ".criu.mntns.*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, point := range points {
		info, err := os.Lstat(point)
		if err != nil || !info.IsDir() || now.Sub(info.ModTime()) < time.Hour {
			continue
		}
		errs = append(errs, unix.Rmdir(point)) // and nothing in it
	}
	return errors.Join(errs...)
}
