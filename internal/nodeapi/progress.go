package nodeapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// StageStarting is never reported: a container is about to be let go, or has been
// and nobody was left to say so. The OCI runtime knows which.
const StageStarting ReportStage = "starting"

// LookCommand is the command of stasis-runtime, with --root and a container's ID, that
// finds out whether a container was let go whose start was interrupted. It waits for
// a start that is under way, and keeps what it finds in the container's Progress.
const LookCommand = "stasis-look"

// Progress is how far the restore of a container has come. stasis-runtime keeps it
// in the container's WorkDir, where it outlives the container and needs no agent: a
// report may be lost, this is what the agent goes by.
type Progress struct {
	ContainerID string `json:"containerID"`
	// Root is the OCI runtime's state directory (--root), in the container
	// runtime's mount namespace.
	Root  string      `json:"root"`
	Stage ReportStage `json:"stage"`
}

const progressFile = "progress.json"

// ReadProgress reads what is kept in a WorkDir; nothing is the zero Progress.
func ReadProgress(workDir string) (Progress, error) {
	var p Progress
	data, err := os.ReadFile(filepath.Join(workDir, progressFile))
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	} else if err != nil {
		return p, fmt.Errorf("read how far a restore has come: %w", err)
	}
	if err := json.Unmarshal(data, &p); err != nil {
		return p, fmt.Errorf("read how far a restore has come: %s: %w", filepath.Join(workDir, progressFile), err)
	}
	return p, nil
}

// WriteProgress keeps p in a WorkDir, whole or not at all. It lies on memory, as
// the containers' state does: there is nothing to make durable.
func WriteProgress(workDir string, p Progress) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	name := filepath.Join(workDir, progressFile)
	temporary := fmt.Sprintf("%s.%d", name, os.Getpid())
	if err := errors.Join(os.WriteFile(temporary, data, 0o600), os.Rename(temporary, name)); err != nil {
		os.Remove(temporary)
		return fmt.Errorf("keep how far a restore has come: %w", err)
	}
	return nil
}

// ForgetProgress drops what is kept in a WorkDir, for another try.
func ForgetProgress(workDir string) error {
	if err := os.Remove(filepath.Join(workDir, progressFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
