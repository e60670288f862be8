package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/criservice"
)

const (
	// defaultMaxDiskShare leaves half of the disk to images, logs and emptyDirs.
	defaultMaxDiskShare = 0.5
	// defaultMinFreeDisk is above both of the kubelet's defaults for eviction:
	// nodefs.available<10% and imagefs.available<15%.
	defaultMinFreeDisk = 0.15
)

// DiskLimits say how much of a disk checkpoints may take (P32).
type DiskLimits struct {
	MaxShare float64 // of the disk, for all checkpoints together
	MinFree  float64 // of the disk, that stays free
}

func (l DiskLimits) check() error {
	if l.MaxShare <= 0 || l.MaxShare > 1 {
		return fmt.Errorf("--max-disk-share=%v: choose a part of the disk above 0 and up to 1", l.MaxShare)
	}
	if l.MinFree < 0 || l.MinFree >= 1 {
		return fmt.Errorf("--min-free-disk=%v: choose a part of the disk from 0 and below 1", l.MinFree)
	}
	return nil
}

// room keeps checkpoints within the limits, also when several are being written.
type room struct {
	limits DiskLimits
	root   string // of the checkpoints

	mu       sync.Mutex
	reserved map[unix.Fsid]int64
}

var _ criservice.Room = (*room)(nil)

func newRoom(limits DiskLimits, root string) *room {
	return &room{limits: limits, root: root, reserved: map[unix.Fsid]int64{}}
}

// Reserve implements criservice.Room.
func (r *room) Reserve(dir string, bytes int64) (release func(), err error) {
	release, err = r.reserve(dir, bytes)
	if errors.Is(err, criservice.ErrNoRoom) {
		err = fmt.Errorf("nothing was frozen: %w", err)
	}
	return release, err
}

// fits says whether there is room, without keeping it.
func (r *room) fits(dir string, bytes int64) error {
	release, err := r.reserve(dir, bytes)
	if err == nil {
		release()
	}
	return err
}

func (r *room) reserve(dir string, bytes int64) (release func(), err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, fmt.Errorf("look how much room there is in %s: %w", dir, err)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return nil, fmt.Errorf("%w: %s is on a read-only file system; if its disk has failed, the kernel's log says so", criservice.ErrNoRoom, dir)
	}
	var used int64
	if strings.HasPrefix(dir+"/", r.root+"/") {
		if used, err = allocated(r.root); err != nil {
			return nil, fmt.Errorf("look how much the checkpoints below %s take: %w", r.root, err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	d := diskState{
		total: int64(st.Blocks) * st.Bsize, free: int64(st.Bavail) * st.Bsize,
		checkpoints: used, reserved: r.reserved[st.Fsid],
	}
	if err := r.limits.admit(d, bytes); err != nil {
		return nil, fmt.Errorf("%w in %s: %w", criservice.ErrNoRoom, dir, err)
	}
	r.reserved[st.Fsid] += bytes
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.reserved[st.Fsid] -= bytes
	}, nil
}

// diskState is a disk in bytes.
type diskState struct {
	total, free int64
	checkpoints int64 // what checkpoints take
	reserved    int64 // for those being written, of which some may be written already
}

// admit says why a checkpoint of a size does not fit.
func (l DiskLimits) admit(d diskState, bytes int64) error {
	others := ""
	if d.reserved > 0 {
		others = fmt.Sprintf(" beside %s for others that are being taken", binaryBytes(d.reserved))
	}
	if keep := int64(l.MinFree * float64(d.total)); d.free-d.reserved-bytes < keep {
		return fmt.Errorf("the checkpoint needs about %s%s, the disk has %s free of %s, and %s of that stay free (--min-free-disk, so that the kubelet evicts nobody); free some, or delete PodCheckpoints",
			binaryBytes(bytes), others, binaryBytes(d.free), binaryBytes(d.total), binaryBytes(keep))
	}
	if most := int64(l.MaxShare * float64(d.total)); d.checkpoints+d.reserved+bytes > most {
		return fmt.Errorf("the checkpoint needs about %s%s, checkpoints take %s of the %s that they may (--max-disk-share); delete PodCheckpoints",
			binaryBytes(bytes), others, binaryBytes(d.checkpoints), binaryBytes(most))
	}
	return nil
}

// allocated is what the files below a directory take of the disk: of several names of
// one file, once. What goes while it looks is not counted.
func allocated(dir string) (int64, error) {
	var total int64
	seen := map[uint64]bool{}
	err := filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(name, &st)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink > 1 {
			if seen[st.Ino] {
				return err
			}
			seen[st.Ino] = true
		}
		total += st.Blocks * 512
		return err
	})
	return total, err
}
