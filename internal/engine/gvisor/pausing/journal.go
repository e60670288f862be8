package pausing

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/hostns"
)

// journal is a directory of entries, one file a sandbox. It lies on memory: what it undoes
// does not outlive the kernel either.
type journal struct {
	host *hostns.Host
	dir  string
}

func (j journal) file(sandboxID string) string { return filepath.Join(j.dir, sandboxID+".json") }

func (j journal) write(p Paused) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	err = j.host.Do(func() error {
		if err := os.MkdirAll(j.dir, 0o700); err != nil {
			return err
		}
		return checkpoint.WriteFile(j.file(p.SandboxID), data, 0o600)
	})
	if err != nil {
		return fmt.Errorf("write the journal of paused sandboxes: %w", err)
	}
	return nil
}

func (j journal) remove(sandboxID string) error {
	return j.host.Do(func() error {
		if err := os.Remove(j.file(sandboxID)); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}

// lock keeps other processes (the guard, the agent) from resuming meanwhile.
func (j journal) lock() (unlock func(), err error) {
	var f *os.File
	err = j.host.Do(func() (err error) {
		if err := os.MkdirAll(j.dir, 0o700); err != nil {
			return err
		}
		f, err = os.OpenFile(filepath.Join(j.dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
		return err
	})
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return nil, fmt.Errorf("lock the journal of paused sandboxes: %w", err)
	}
	return func() { f.Close() }, nil
}

// removeTemporary removes entries of which a killed agent wrote a part only: what they
// would have named was never paused.
func (j journal) removeTemporary() error {
	return j.host.Do(func() error {
		if err := checkpoint.RemoveTemporary(j.dir); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	})
}

func (j journal) entries() (all []Paused, err error) {
	err = j.host.Do(func() error {
		files, err := os.ReadDir(j.dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		for _, f := range files {
			if !strings.HasSuffix(f.Name(), ".json") {
				continue
			}
			data, err := os.ReadFile(filepath.Join(j.dir, f.Name()))
			if errors.Is(err, fs.ErrNotExist) {
				continue // resumed meanwhile
			} else if err != nil {
				return err
			}
			var p Paused
			if err := json.Unmarshal(data, &p); err != nil {
				return fmt.Errorf("%s: %w", f.Name(), err)
			}
			all = append(all, p)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the journal of paused sandboxes: %w", err)
	}
	return all, nil
}
