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

// dropImages removes the adapted images of containers that have been restored, or
// could not be: the next try makes others.
func (s *Sessions) dropImages(sandboxID string, containers ...string) error {
	if _, err := s.file(sandboxID); err != nil {
		return err
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
