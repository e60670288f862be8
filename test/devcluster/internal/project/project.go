// Package project finds the directories that a run works with: the checkout, the
// state of one cluster, and the per-user cache that all clusters share.
package project

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

const module = "module podstasis.dev/stasis\n"

// Root returns the checkout's top directory: the nearest one upward of the working
// directory, or else of the running program, whose go.mod is the project's.
func Root() (string, error) {
	var starts []string
	if wd, err := os.Getwd(); err == nil {
		starts = append(starts, wd)
	}
	if exe, err := os.Executable(); err == nil {
		starts = append(starts, filepath.Dir(exe))
	}
	for _, start := range starts {
		for dir := start; ; dir = filepath.Dir(dir) {
			ok, err := isRoot(dir)
			if err != nil {
				return "", err
			}
			if ok {
				return dir, nil
			}
			if dir == filepath.Dir(dir) {
				break
			}
		}
	}
	return "", errors.New("not inside a checkout of Stasis: change into one (the sources of the cluster's programs are there)")
}

func isRoot(dir string) (bool, error) {
	text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking for the checkout: %w", err)
	}
	return bytes.HasPrefix(text, []byte(module)), nil
}

// Cache returns the per-user directory of built programs: $STASIS_CACHE, or .cache/stasis
// in the home directory. It need not exist.
func Cache() (string, error) {
	if dir := os.Getenv("STASIS_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("no place for built programs: %w; set STASIS_CACHE to a directory", err)
	}
	return filepath.Join(home, ".cache", "stasis"), nil
}
