package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/apimachinery/pkg/types"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/hooks"
)

// hooksDir holds, beneath the agent's state directory, the hooks that are to be run
// whatever becomes of this agent.
const hooksDir = "hooks"

// dueHooks are hooks of a Pod that are yet to be run, or have been. They are on
// record before what makes them due happens, and until they have been run: an agent
// that takes over runs them. So each is run once, and again only where an agent ended
// between its run and the note of it.
type dueHooks struct {
	// Annotation that they are from: post-checkpoint, or post-restore.
	Annotation string `json:"annotation"`
	// Of is the PodCheckpoint's name.
	Of        string    `json:"of"`
	Namespace string    `json:"namespace"`
	PodName   string    `json:"podName"`
	PodUID    types.UID `json:"podUID"`
	SandboxID string    `json:"sandboxID"`
	// Containers are the IDs of those that hooks are run in, by name: one that was
	// started anew since is another.
	Containers map[string]string `json:"containers"`
	Hooks      []hooks.Hook      `json:"hooks"`
	// Done says that they have been run. It stays on record for a Pod that was
	// restored, which is told of more than once.
	Done bool `json:"done,omitempty"`
}

func (s *store) dueHooksPath(annotation string, pod types.UID) (string, error) {
	if err := validUID(pod); err != nil {
		return "", err
	}
	return filepath.Join(s.dir, hooksDir, strings.TrimPrefix(annotation, v1alpha1.GroupName+"/")+"-"+string(pod)+".json"), nil
}

func (s *store) writeDueHooks(d *dueHooks) error {
	name, err := s.dueHooksPath(d.Annotation, d.PodUID)
	if err != nil {
		return err
	}
	data, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("put hooks on record: %w", err)
	}
	if err := checkpoint.WriteFile(name, data, 0o600); err != nil {
		return fmt.Errorf("put hooks on record: %w", err)
	}
	return nil
}

// readDueHooks returns nil where there are none.
func (s *store) readDueHooks(annotation string, pod types.UID) (*dueHooks, error) {
	name, err := s.dueHooksPath(annotation, pod)
	if err != nil {
		return nil, err
	}
	return readDueHooks(name)
}

func readDueHooks(name string) (*dueHooks, error) {
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("read the record of hooks: %w", err)
	}
	var d dueHooks
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, fmt.Errorf("read the record of hooks %s: %w", name, err)
	}
	return &d, nil
}

func (s *store) removeDueHooks(annotation string, pod types.UID) error {
	name, err := s.dueHooksPath(annotation, pod)
	if err != nil {
		return err
	}
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the record of hooks: %w", err)
	}
	return nil
}

// dueHooks lists the records of an annotation's hooks that have not been run. One
// that cannot be read is an error beside the others.
func (s *store) dueHooks(annotation string) (due []*dueHooks, err error) {
	files, err := filepath.Glob(filepath.Join(s.dir, hooksDir, strings.TrimPrefix(annotation, v1alpha1.GroupName+"/")+"-*.json"))
	if err != nil {
		return nil, err
	}
	for _, name := range files {
		d, readErr := readDueHooks(name)
		err = errors.Join(err, readErr)
		if d != nil && !d.Done {
			due = append(due, d)
		}
	}
	return due, err
}
