package cow

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// ErrMemory says that the copies of what processes write to would take more memory than
// there is.
var ErrMemory = errors.New("memory runs out")

// Limit is one of the memory that processes may have.
type Limit struct {
	// Usage is the file that says how much is used, and Stat the one that says how much
	// of that are files' pages which the kernel gives up at need.
	Usage string `json:"usage"`
	Stat  string `json:"stat"`
	Bytes int64  `json:"bytes"`
	// Reserve is how much has to stay free.
	Reserve int64 `json:"reserve"`
}

// Free is how much may still be used.
func (l Limit) Free() (int64, error) {
	used, err := readNumber(l.Usage)
	if err != nil {
		return 0, err
	}
	free := l.Bytes - used
	if free >= 2*l.Reserve {
		return free, nil
	}
	data, err := os.ReadFile(l.Stat)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name == "inactive_file" && !strings.Contains(string(data), "total_inactive_file") || name == "total_inactive_file" {
			files, err := strconv.ParseInt(value, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%s: %w", l.Stat, err)
			}
			free += files
		}
	}
	return free, nil
}

// hurryReserves is how many times what has to stay free is free when reading does not give
// way to others any more: sooner done, it costs them less than to be given up.
const hurryReserves = 2

// exceeded says whether children have to go for others to have memory: when less is free
// than so many times what has to be.
func exceeded(limits []Limit, reserves int64) error {
	for _, l := range limits {
		free, err := l.Free()
		if err != nil {
			continue // the cgroup has gone, and its processes with it
		}
		if free < reserves*l.Reserve {
			return fmt.Errorf("%w: the processes wrote so much while their memory was being read that %d MiB of their limit of %d MiB were left",
				ErrMemory, max(0, free)>>20, l.Bytes>>20)
		}
	}
	free, err := Available()
	if err == nil && free < reserves*NodeReserve {
		return fmt.Errorf("%w: %d MiB were left on the node while the memory of processes was being read", ErrMemory, free>>20)
	}
	return nil
}

// NodeReserve is how much memory of the node is left alone.
const NodeReserve = 256 << 20

// Available is how much memory of the node can be had.
func Available() (int64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return n << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo does not say what memory is available")
}

func readNumber(file string) (int64, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
}
