package criu

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Reports of CRIU that are kept with a checkpoint, for whoever looks into it later.
const (
	dumpStats = "stats-dump"
	dumpLog   = "dump.log"
	// maxReport bounds what is kept of one; of a log the beginning, which says what
	// wrote it and where.
	maxReport = 4 << 20
)

// keepReports copies what CRIU reported of a capture beside its images, now that
// the Pod runs.
func (e *Engine) keepReports(targets []target) error {
	err := e.host.Do(func() error {
		for _, t := range targets {
			for _, name := range []string{dumpStats, dumpLog} {
				if err := copyStart(filepath.Join(t.workDir, name), filepath.Join(t.dir, name), maxReport); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("keep CRIU's reports: %w", err)
	}
	return nil
}

// copyStart copies the first n bytes of a file, if it is there.
func copyStart(from, to string, n int64) error {
	in, err := os.Open(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, io.LimitReader(in, n))
	return errors.Join(err, out.Close())
}
