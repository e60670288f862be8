package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/layer"
)

// Estimate implements engine.Engine.
func (e *Engine) Estimate(ctx context.Context, s engine.Sandbox, options map[string]string) (engine.Estimate, error) {
	pids, err := treesOf(s.Containers)
	if err != nil {
		return engine.Estimate{}, err
	}
	var memory, shared, files, onMemory int64
	for _, pid := range slices.Concat(pids...) {
		m, err := memoryOf(pid)
		if err != nil {
			return engine.Estimate{}, fmt.Errorf("estimate the memory of process %d (%s): %w", pid, commandOf(pid), err)
		}
		memory += m.private
		shared += m.shared
	}
	var trees []string
	for _, c := range s.Containers {
		upper, err := overlayUpper(c.PID)
		if err != nil {
			return engine.Estimate{}, fmt.Errorf("container %s: %w", c.Name, err)
		}
		trees = append(trees, upper)
	}
	err = e.host.Do(func() error {
		volumes, err := volumesOf(s.Containers)
		if err != nil {
			return err
		}
		for _, v := range volumes {
			trees = append(trees, v.source)
		}
		for _, dir := range trees {
			size, err := treeSize(ctx, dir)
			if err != nil {
				return err
			}
			files += size
			var st unix.Statfs_t
			if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.TMPFS_MAGIC {
				onMemory += size
			}
		}
		return nil
	})
	if err != nil {
		return engine.Estimate{}, fmt.Errorf("estimate the size of writable layers and volumes: %w", err)
	}
	// Files of a tmpfs that processes have mapped are archived, not captured with
	// the memory.
	shared = max(0, shared-onMemory)
	how, err := e.planCapture(s, options)
	if err != nil {
		return engine.Estimate{}, err
	}
	// Files are copied before the freeze, and in it only what changed meanwhile: the
	// latest checkpoints tell how long that takes.
	estimate := engine.Estimate{Bytes: memory + shared + files, Capture: how.told()}
	if how.mode == CaptureCOW {
		forks := time.Duration(forking(memory))
		estimate.Freeze = e.cowPace.expect(shared) + forks.Round(time.Millisecond)
	} else {
		estimate.Freeze = e.pace.expect(memory + shared)
	}
	return estimate, nil
}

// memory is what CRIU writes of a process: pages that are its own, and its part
// of those that it shares with others.
type memory struct{ private, shared int64 }

func memoryOf(pid int) (memory, error) {
	proc := "/proc/" + strconv.Itoa(pid)
	status, err := os.ReadFile(proc + "/status")
	if err != nil {
		return memory{}, unlessEnded(err)
	}
	// After a fork both processes have a page, and CRIU writes it twice: that is
	// why this counts processes and not what the cgroup is charged for.
	m := memory{private: kilobytes(status, "RssAnon:") + kilobytes(status, "VmSwap:")}
	if kilobytes(status, "RssShmem:") == 0 {
		return m, nil
	}
	rollup, err := os.ReadFile(proc + "/smaps_rollup")
	if err != nil {
		return memory{}, unlessEnded(err)
	}
	m.shared = kilobytes(rollup, "Pss_Shmem:")
	return m, nil
}

// kilobytes reads one line of /proc/PID/status or the like, in bytes; 0 if it has
// no such line.
func kilobytes(text []byte, name string) int64 {
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(name)); ok {
			value, _, _ := strings.Cut(strings.TrimSpace(string(rest)), " ")
			n, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return 0
			}
			return n << 10
		}
	}
	return 0
}

// treeSize is what the files below a directory hold. Files that go while it looks
// do not matter.
func treeSize(ctx context.Context, dir string) (int64, error) {
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	var total int64
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		total += 1 << 10 // a header
		st, ok := info.Sys().(*syscall.Stat_t)
		if !info.Mode().IsRegular() || ok && st.Nlink > 1 && seen[inode{uint64(st.Dev), st.Ino}] {
			return nil
		}
		if ok && st.Nlink > 1 {
			seen[inode{uint64(st.Dev), st.Ino}] = true
		}
		size := info.Size()
		if ok && st.Blocks*512 < size { // a hole costs nothing
			if size > layer.MaxSparse {
				return fmt.Errorf("%w: %s: %w cannot be captured, and it claims %d bytes; shorten it", engine.ErrUnsupported, name, layer.ErrTooSparse, size)
			}
			size = st.Blocks * 512
		}
		total += size
		return nil
	})
	return total, err
}

// What is expected of a node that has not taken checkpoints yet.
const (
	defaultBase = 300 * time.Millisecond // of a freeze however little there is to capture
	defaultRate = 256 << 20              // bytes a second
)

const (
	smallCapture  = 16 << 20 // takes as long as an empty one
	largeCapture  = 64 << 20 // tells a rate
	paceSamples   = 9
	paceSampleAge = time.Hour
)

// pace is how fast this node captures, by its latest checkpoints: the medians of
// how long small ones took and of how many bytes a second large ones did. What is
// old does not count: a node that was slow once is not slow for good.
type pace struct {
	mu    sync.Mutex
	small []sample // value: nanoseconds
	large []sample // value: bytes a second
}

type sample struct {
	at    time.Time
	value float64
}

// expect estimates how long a Pod stands still of which bytes are captured.
func (p *pace) expect(bytes int64) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	base := median(p.small, now, float64(defaultBase))
	rate := median(p.large, now, defaultRate)
	return time.Duration(base + float64(bytes)/rate*float64(time.Second)).Round(time.Millisecond)
}

// learn notes a checkpoint that was taken.
func (p *pace) learn(bytes int64, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	switch {
	case bytes <= smallCapture:
		p.small = add(p.small, sample{now, float64(took)})
	case bytes >= largeCapture:
		base := min(median(p.small, now, float64(defaultBase)), float64(took)/2)
		p.large = add(p.large, sample{now, float64(bytes) / (float64(took) - base) * float64(time.Second)})
	}
}

func add(samples []sample, s sample) []sample {
	samples = append(samples, s)
	return samples[max(0, len(samples)-paceSamples):]
}

func median(samples []sample, now time.Time, unknown float64) float64 {
	var values []float64
	for _, s := range samples {
		if now.Sub(s.at) < paceSampleAge {
			values = append(values, s.value)
		}
	}
	if len(values) == 0 {
		return unknown
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// learn notes how long a window took, for what it wrote: files that were copied before
// do not count.
func (e *Engine) learn(w window, frozen time.Duration) {
	var size int64
	for _, t := range w.trees {
		size += t.late
	}
	err := e.host.Do(func() error {
		for _, t := range w.targets {
			images, err := treeSize(context.Background(), filepath.Join(t.dir, imagesDir))
			if err != nil {
				return err
			}
			size += images
		}
		return nil
	})
	switch {
	case err != nil:
	case w.plan.mode == CaptureCOW:
		e.cowPace.learn(max(0, size-w.plan.memory), max(0, frozen-time.Duration(forking(w.plan.memory))))
	default:
		e.pace.learn(size, frozen)
	}
}
