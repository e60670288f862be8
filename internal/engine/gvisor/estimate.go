package gvisor

import (
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
	"time"

	"podstasis.dev/stasis/internal/engine"
)

// Estimate implements engine.Engine. The sandbox's memory is what its cgroup is charged
// for, without the files that the kernel keeps for it; the containers' writable layers are
// part of it or of files that the sandbox saves too.
func (e *Engine) Estimate(ctx context.Context, s engine.Sandbox, _ map[string]string) (engine.Estimate, error) {
	var total int64
	err := e.Host.Do(func() error {
		memory, err := memoryOf(s.Containers[0].PID)
		if err != nil {
			return fmt.Errorf("estimate the memory of sandbox %s: %w", s.ID, err)
		}
		total = memory
		for _, v := range volumesOf(s.Containers) {
			size, err := treeSize(ctx, v.source)
			if err != nil {
				return fmt.Errorf("estimate the size of volume %s: %w", v.name, err)
			}
			total += size
		}
		return nil
	})
	return engine.Estimate{Bytes: total, Freeze: e.pace.expect(total)}, err
}

// memoryOf is what the memory cgroup of a process is charged for, without files that can be
// read again.
func memoryOf(pid int) (int64, error) {
	groups, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return 0, err
	}
	var v1, v2 string
	for line := range strings.Lines(string(groups)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(parts) != 3:
		case slices.Contains(strings.Split(parts[1], ","), "memory"):
			v1 = parts[2]
		case parts[0] == "0":
			v2 = parts[2]
		}
	}
	dir, usage, idle := filepath.Join("/sys/fs/cgroup", v2), "memory.current", "inactive_file"
	if v1 != "" {
		dir, usage, idle = filepath.Join("/sys/fs/cgroup/memory", v1), "memory.usage_in_bytes", "total_inactive_file"
	}
	text, err := os.ReadFile(filepath.Join(dir, usage))
	if err != nil {
		return 0, err
	}
	total, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", filepath.Join(dir, usage), err)
	}
	stat, err := os.ReadFile(filepath.Join(dir, "memory.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(stat)) {
		if value, ok := strings.CutPrefix(line, idle+" "); ok {
			if n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64); err == nil {
				total -= n
			}
		}
	}
	return max(0, total), nil
}

// treeSize is what the files below a directory hold. Files that go while it looks do not
// matter.
func treeSize(ctx context.Context, dir string) (total int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err == nil && d.Type().IsRegular() {
			var info fs.FileInfo
			if info, err = d.Info(); err == nil {
				total += info.Size()
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	return total, err
}

// What is expected of a node that has not taken checkpoints yet.
const (
	defaultBase = 150 * time.Millisecond // of a pause however little there is to save
	defaultRate = 1 << 30                // bytes a second
	largeSave   = 64 << 20               // tells a rate
	keptPaces   = 9
)

// pace is how fast this node saves, by its latest checkpoints: medians.
type pace struct {
	mu    sync.Mutex
	bases []time.Duration
	rates []float64 // bytes a second
}

func (p *pace) expect(bytes int64) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	base, rate := median(p.bases, defaultBase), median(p.rates, defaultRate)
	return (base + time.Duration(float64(bytes)/rate*float64(time.Second))).Round(time.Millisecond)
}

// learn notes a checkpoint that was taken.
func (p *pace) learn(bytes int64, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if bytes < largeSave {
		p.bases = append(p.bases, took)
		p.bases = p.bases[max(0, len(p.bases)-keptPaces):]
		return
	}
	saving := took - min(median(p.bases, defaultBase), took/2)
	p.rates = append(p.rates, float64(bytes)/saving.Seconds())
	p.rates = p.rates[max(0, len(p.rates)-keptPaces):]
}

func median[T time.Duration | float64](values []T, unknown T) T {
	if len(values) == 0 {
		return unknown
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
