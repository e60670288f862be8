package restoring

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// images is where the adapted images of a container are, of a sandbox whose ID has
// been looked at.
func (s *Sessions) images(sandboxID, container string) string {
	return filepath.Join(s.ImagesDir, sandboxID, container)
}

// makeImages keeps what is there of a sandbox's images until made is called. A container
// may be restored again while it is still being found that it had been before, and one
// while another one's are dropped.
func (s *Sessions) makeImages(sandboxID string) (made func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.making[sandboxID]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.making[sandboxID]--; s.making[sandboxID] == 0 {
			delete(s.making, sandboxID)
		}
	}
}

// dropImages removes the adapted images of containers that have been restored, or
// could not be: the next try makes others.
func (s *Sessions) dropImages(sandboxID string, containers ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropNow(sandboxID, containers)
}

// dropRestored removes those of the containers that are restored, as the record has it.
func (s *Sessions) dropRestored(sandboxID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, err := s.read(sandboxID)
	if err != nil {
		return ifKept(err)
	}
	if rec.Whole && rec.whole() {
		return s.dropNow(sandboxID, append(slices.Clone(rec.Created), wholeImages))
	}
	return s.dropNow(sandboxID, rec.Created)
}

// dropNow does so; mu is held. While images of the sandbox are being made nothing goes:
// what is to go then is found at a later look, or goes with the sandbox.
func (s *Sessions) dropNow(sandboxID string, containers []string) error {
	if _, err := s.file(sandboxID); err != nil {
		return err
	}
	if s.making[sandboxID] > 0 {
		return nil
	}
	var errs []error
	for _, c := range containers {
		if c == "" || filepath.Base(c) != c {
			return fmt.Errorf("bad container name %q", c)
		}
		errs = append(errs, os.RemoveAll(s.images(sandboxID, c)))
	}
	// The sandbox's directory goes with the last of them.
	if err := os.Remove(filepath.Join(s.ImagesDir, sandboxID)); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove the images that a container was restored from: %w", err)
	}
	return nil
}

// dropForgottenImages removes those of sandboxes that there is no record of: records
// end with the node's memory, images do not.
func (s *Sessions) dropForgottenImages(records []record) error {
	entries, err := os.ReadDir(s.ImagesDir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !slices.ContainsFunc(records, func(rec record) bool { return rec.Sandbox.ID == e.Name() }) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.ImagesDir, e.Name())))
		}
	}
	return err
}
