package criu

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
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/hostns"
)

// frozen is what it takes to undo a freeze: one journal entry, written and
// fsynced before anything is changed, removed when all of it is undone.
type frozen struct {
	SandboxID string `json:"sandboxID"`
	// Freeze is a random name for this freeze: a sandbox is frozen many times.
	Freeze     string            `json:"freeze"`
	Containers []frozenContainer `json:"containers"`
	// Quotas lists what was lifted, parents before children.
	Quotas []liftedQuota `json:"quotas,omitempty"`
}

type frozenContainer struct {
	ID      string         `json:"id"`
	Runtime engine.Runtime `json:"runtime"`
	// Freezer is the directory of the container's freezer cgroup, on the host, and Unified
	// says of which hierarchy; empty if only the OCI runtime knows it.
	Freezer string `json:"freezer,omitempty"`
	Unified bool   `json:"unified,omitempty"`
}

type liftedQuota struct {
	File string `json:"file"` // absolute, on the host
	Old  string `json:"old"`  // what to write back
}

// journal is a directory of entries, one file a sandbox. It lies on memory: what
// it undoes does not outlive the kernel either.
type journal struct {
	host *hostns.Host
	dir  string
}

func (j journal) file(sandboxID string) string { return filepath.Join(j.dir, sandboxID+".json") }

func (j journal) write(entry frozen) error {
	data, err := json.Marshal(entry)
	if err != nil {
		return err
	}
	err = j.host.Do(func() error {
		if err := os.MkdirAll(j.dir, 0o700); err != nil {
			return err
		}
		return checkpoint.WriteFile(j.file(entry.SandboxID), data, 0o600)
	})
	if err != nil {
		return fmt.Errorf("write the journal of frozen Pods: %w", err)
	}
	return nil
}

func (j journal) remove(sandboxID string) error {
	return j.host.Do(func() error {
		err := os.Remove(j.file(sandboxID))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}

// removeTemporary removes entries of which a killed agent wrote a part only: what they
// would have named was never frozen.
func removeTemporary(dir string) error {
	if err := checkpoint.RemoveTemporary(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// lock keeps other processes (the guard, the agent) from thawing meanwhile.
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
		return nil, fmt.Errorf("lock the journal of frozen Pods: %w", err)
	}
	return func() { f.Close() }, nil
}

// read returns a sandbox's entry; nil if there is none.
func (j journal) read(sandboxID string) (*frozen, error) {
	entries, err := j.entries()
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		if entry.SandboxID == sandboxID {
			return &entry, nil
		}
	}
	return nil, nil
}

func (j journal) entries() ([]frozen, error) {
	var entries []frozen
	err := j.host.Do(func() error {
		files, err := os.ReadDir(j.dir)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		for _, f := range files {
			if !strings.HasSuffix(f.Name(), ".json") {
				continue // a temporary file: its rename, and so its freeze, never happened
			}
			data, err := os.ReadFile(filepath.Join(j.dir, f.Name()))
			if errors.Is(err, fs.ErrNotExist) {
				continue // thawed meanwhile
			} else if err != nil {
				return err
			}
			var entry frozen
			if err := json.Unmarshal(data, &entry); err != nil {
				return fmt.Errorf("%s: %w", f.Name(), err)
			}
			entries = append(entries, entry)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the journal of frozen Pods: %w", err)
	}
	return entries, nil
}
