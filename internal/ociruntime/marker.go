package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
)

// MarkerName is the marker's, in the real runtime's state directory of a container. What
// has one stasis-runtime leaves to stasis-restore.
const MarkerName = "stasis.json"

// marker is kept in the real runtime's state directory of a container that
// belongs to a restored Pod.
type marker struct {
	Sandbox   nodeapi.Sandbox `json:"sandbox"`
	Container string          `json:"container,omitempty"` // empty: the sandbox itself
	Started   bool            `json:"started,omitempty"`
	// WorkDir, of a container, is where its nodeapi.Progress is.
	WorkDir string `json:"workDir,omitempty"`

	// Of a sandbox: the containers that are let go together, and the IDs of those
	// that have been asked to start, by name.
	Together []string          `json:"together,omitempty"`
	Arrived  map[string]string `json:"arrived,omitempty"`

	// Runsc is set where the marker is of a sandbox of gVisor, or of a container in one.
	Runsc *runscMarker `json:"runsc,omitempty"`
}

// mark writes the marker of the container or sandbox id.
func (c call) mark(id string, m marker) error {
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := checkpoint.WriteFile(filepath.Join(c.Root, id, MarkerName), data, 0o600); err != nil {
		return fmt.Errorf("mark the restored container: %w", err)
	}
	return nil
}

// marked reads the marker of id; nil when it was created by the real runtime.
func (c call) marked(id string) (*marker, error) {
	data, err := os.ReadFile(filepath.Join(c.Root, id, MarkerName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var m marker
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("read the mark of a restored container: %w", err)
	}
	return &m, nil
}

// waiting says whether the marker is of a restored container that has not been let
// go, as far as it tells.
func (m *marker) waiting() bool { return m != nil && m.Container != "" && !m.Started }

// lock waits until nobody else works on the container or sandbox id, and keeps it
// so until the file is closed, by whoever has it open last.
func (c call) lock(id string) (*os.File, error) {
	dir, err := os.Open(filepath.Join(c.Root, id))
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir.Name(), err), dir.Close())
	}
	return dir, nil
}

// note keeps how far the restore of container id has come.
func (c call) note(id string, m marker, stage nodeapi.ReportStage) error {
	return nodeapi.WriteProgress(m.WorkDir, nodeapi.Progress{ContainerID: id, Root: c.Root, Stage: stage})
}
