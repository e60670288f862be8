package lazy

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Stage is how far a container's memory has come.
type Stage string

const (
	StageServing  Stage = "serving"  // its processes are given pages
	StageComplete Stage = "complete" // all is there
	StageLost     Stage = "lost"     // it could not be given, and the container was killed
)

// Status is what the keeper says of a container's memory, in its work directory.
type Status struct {
	ContainerID string `json:"containerID"`
	Stage       Stage  `json:"stage"`
	// Given and Total are bytes.
	Given int64 `json:"given"`
	Total int64 `json:"total"`
	// Since is when CRIU had made all mappings; Until when all was there, or was lost.
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	// Message says why it was lost.
	Message string `json:"message,omitempty"`
}

const (
	statusFile = "memory.json"
	lockFile   = "memory.lock"
	// PlanFile is the plan's name in the work directory.
	PlanFile = "memory.plan"
)

// ReadStatus reads what is kept in a work directory; nothing is the zero Status. One that
// says StageServing and whose keeper is gone is returned as lost: keeper and server were
// killed together.
func ReadStatus(workDir string) (Status, error) {
	lock, err := os.Open(filepath.Join(workDir, lockFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Status{}, nil
	} else if err != nil {
		return Status{}, fmt.Errorf("read how far a container's memory has come: %w", err)
	}
	defer lock.Close()
	alone := unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
	// Read after the lock was looked at: who ends writes first.
	data, err := os.ReadFile(filepath.Join(workDir, statusFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Status{}, nil
	} else if err != nil {
		return Status{}, fmt.Errorf("read how far a container's memory has come: %w", err)
	}
	var s Status
	if err := json.Unmarshal(data, &s); err != nil {
		return s, fmt.Errorf("read how far a container's memory has come: %s: %w", filepath.Join(workDir, statusFile), err)
	}
	if s.Stage == StageServing && alone {
		s.Stage, s.Message = StageLost, "the processes that gave it were killed"
	}
	return s, nil
}

func (s Status) write(workDir string) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	name := filepath.Join(workDir, statusFile)
	temporary := fmt.Sprintf("%s.%d", name, os.Getpid())
	if err := errors.Join(os.WriteFile(temporary, data, 0o600), os.Rename(temporary, name)); err != nil {
		os.Remove(temporary)
		return fmt.Errorf("keep how far a container's memory has come: %w", err)
	}
	return nil
}

// Forget drops what is kept in a work directory, for another try.
func Forget(workDir string) error {
	for _, name := range []string{statusFile, PlanFile} {
		if err := os.Remove(filepath.Join(workDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
