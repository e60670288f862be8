package criu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// What CRIU writes while a Pod stands still goes to memory where there is room for it: a
// disk, even where it only takes what it is to write later, is slower, and may be at its
// limit. It gets to the disk after the thaw. Whether there is room is settled before the
// freeze.

// staging is what captures that are under way take of the memory of the run directory.
type staging struct {
	most int64 // bytes; 0: none; less: a quarter of the node's memory

	mu    sync.Mutex
	taken int64
}

// stagingSlack is what images take beside the memory in them.
const stagingSlack = 32 << 20

// reserve takes room for so many bytes, if there is any.
func (s *staging) reserve(need int64, dir string) (release func(), ok bool) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		return nil, false
	}
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, false
	}
	most := s.most
	if most < 0 {
		most = kilobytes(meminfo, "MemTotal:") / 4
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// Others want memory, too: what a node has available is never taken by half.
	room := min(most, int64(st.Bavail)*st.Bsize/8*7, kilobytes(meminfo, "MemAvailable:")/2) - s.taken
	if need > room {
		return nil, false
	}
	s.taken += need
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.taken -= need
	}, true
}

// stageInMemory gives the targets of a plain capture directories in memory if there is
// room for them. It returns what gives it back. Where the memory of processes is not
// written while they stand still the rest is little, and their images are added to later.
func (e *Engine) stageInMemory(w window) (release func(), err error) {
	for i := range w.targets {
		w.targets[i].staged = ""
	}
	if w.plan.mode == CaptureCOW {
		return func() {}, nil
	}
	pids, err := treesOf(w.sandbox.Containers)
	if err != nil {
		return nil, err
	}
	need := int64(stagingSlack)
	for _, pid := range slices.Concat(pids...) {
		m, err := memoryOf(pid)
		if err != nil {
			return nil, fmt.Errorf("look at the memory of process %d (%s): %w", pid, commandOf(pid), err)
		}
		need += (m.private + m.shared) / 8 * 9
	}
	release, ok := func() {}, false
	err = e.host.Do(func() error {
		give, fits := e.staging.reserve(need, e.runDir)
		if ok = fits; ok {
			release = give
		}
		return nil
	})
	for i := range w.targets {
		if ok {
			w.targets[i].staged = filepath.Join(w.targets[i].workDir, imagesDir)
		}
	}
	return release, err
}

// imageDir is where CRIU writes a target's images.
func (t target) imageDir() string {
	if t.staged != "" {
		return t.staged
	}
	return filepath.Join(t.dir, imagesDir)
}

// unstage brings the images to where they stay, and gives back their memory.
func (e *Engine) unstage(ctx context.Context, w window) error {
	return e.host.Do(func() error {
		for _, t := range w.targets {
			if t.staged == "" {
				continue
			}
			entries, err := os.ReadDir(t.staged)
			if err != nil {
				return fmt.Errorf("bring the images of container %s to the disk: %w", t.Name, err)
			}
			for _, entry := range entries {
				from, to := filepath.Join(t.staged, entry.Name()), filepath.Join(t.dir, imagesDir, entry.Name())
				if err := errors.Join(bring(ctx, from, to), os.Remove(from)); err != nil {
					return fmt.Errorf("bring the images of container %s to the disk: %w", t.Name, err)
				}
			}
		}
		return nil
	})
}

func bring(ctx context.Context, from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	const part = 64 << 20
	for {
		if err := context.Cause(ctx); err != nil {
			return errors.Join(err, out.Close())
		}
		if _, err := io.CopyN(out, in, part); err == io.EOF {
			return out.Close()
		} else if err != nil {
			return errors.Join(err, out.Close())
		}
	}
}
