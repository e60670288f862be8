package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A tree is captured at a moment at which its Pod stands still, and that moment is to be
// short. So most of it is copied before, while the Pod runs, and at that moment only
// looked at: what has the inode, the size and the time of change (ctime, inode(7)) that
// it had is what was copied. The rest is copied then; the archive is written after.
//
// That a file which looks as it did is as it was holds because
//
//   - the kernel sets the time of change of a file that is written, truncated, renamed,
//     linked, or whose mode, owner or attributes are changed, to the time of day, which
//     is of some milliseconds; and Early takes nothing that has changed within the
//     settling time before it began, so whatever changes later gets another time;
//   - a write takes its time when it begins and may go on, and the first store into a
//     page of a shared mapping does so for those that follow; so Early takes no file
//     that any process has open for writing, or mapped shared, after it began. Who opens
//     or maps one later changes its time at the first change;
//   - the clock is compared: were it set back, nothing is taken for what it was;
//   - it is done on file systems only that do all this. That leaves out tmpfs, which does
//     not see stores into mappings.
const settling = time.Second

// maxEntries bounds what is remembered of a tree. A larger one is not copied early, and
// its archive is written while the Pod stands still.
var maxEntries = 100_000

// Early is what was copied of a tree while it may have been changing.
type Early struct {
	dir    string
	spool  *os.File // contents, one after the other
	end    int64
	offset time.Duration // of the time of day from a clock that nobody sets
	large  bool
	buffer []byte

	known    map[string]*entry // by name, without those that were changing
	contents map[inode]kept
}

// kept is a file's content as it was when the file had this size and time of change.
type kept struct {
	ctime syscall.Timespec
	size  int64
	content
}

// errTooMany ends a walk.
var errTooMany = errors.New("too many entries")

// Begin copies what it can of the tree below dir to spool, an empty file that is the
// result's from then on. A tree that cannot be archived at all is an error now.
func Begin(ctx context.Context, dir string, spool *os.File) (*Early, error) {
	e := &Early{dir: dir, spool: spool, known: map[string]*entry{}, contents: map[inode]kept{}}
	began, offset, err := clocks()
	if err != nil {
		return nil, err
	}
	e.offset = offset
	settled := trusted(dir)
	var names []string // of regular files, as they are found
	entries := 0
	err = walk(ctx, dir, func(full, rel string, info fs.FileInfo) error {
		if entries++; entries > maxEntries {
			return errTooMany
		}
		found, err := describe(full, rel, info)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		if !settled || began.Sub(time.Unix(found.ctime.Unix())) < settling {
			return nil
		}
		e.known[rel] = found
		if found.regular() && found.header.Size > 0 && !found.origin {
			names = append(names, rel)
		}
		return nil
	})
	if errors.Is(err, errTooMany) {
		e.large, e.known = true, nil
		return e, nil
	} else if err != nil {
		return nil, fmt.Errorf("look at %s: %w", dir, err)
	}
	if len(names) == 0 {
		return e, nil
	}
	writable, err := writableInodes(ctx)
	if err != nil {
		return nil, err
	}
	for _, rel := range names {
		found := e.known[rel]
		if _, has := e.contents[found.id]; has || writable[found.id.ino] {
			continue
		}
		c, err := e.copy(ctx, found)
		switch {
		case err == nil:
			e.contents[found.id] = kept{found.ctime, found.header.Size, c}
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
			// There is no room for it twice.
			e.contents, e.end = map[inode]kept{}, 0
			return e, spool.Truncate(0)
		}
		// Else it has gone or changed, or will have its error when it matters.
	}
	return e, nil
}

// Close gives the spool back.
func (e *Early) Close() error { return e.spool.Close() }

// copy appends a regular file's content to the spool.
func (e *Early) copy(ctx context.Context, of *entry) (content, error) {
	f, err := openContent(of.full)
	if err != nil {
		return content{}, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return content{}, err
	} else if !sameInode(info, of.id) {
		return content{}, fs.ErrNotExist // another has its name
	}
	extents, err := extentsOf(f, of.header.Size)
	if err != nil {
		return content{}, fmt.Errorf("find the holes of %s: %w", of.full, err)
	}
	c := content{from: e.spool, extents: extents, at: e.end}
	ended := func() error { return context.Cause(ctx) }
	if e.buffer == nil {
		e.buffer = make([]byte, 256<<10)
	}
	err = content{from: f, extents: extents, inPlace: true}.read(func(x extent, r io.Reader) error {
		n, err := io.CopyBuffer(io.NewOffsetWriter(e.spool, e.end), struct{ io.Reader }{untilEnded{r, ended}}, e.buffer)
		if e.end += n; err == nil && n < x.length {
			err = io.ErrUnexpectedEOF
		}
		return err
	})
	if err != nil {
		return content{}, fmt.Errorf("read %s: %w", of.full, err)
	}
	return c, nil
}

func sameInode(info fs.FileInfo, id inode) bool {
	st := info.Sys().(*syscall.Stat_t)
	return uint64(st.Dev) == id.dev && st.Ino == id.ino
}

// Tree is a tree as it was at a moment.
type Tree struct {
	// Late is how many bytes had to be copied at that moment.
	Late int64

	early *Early
	items []item
}

type item struct {
	*entry
	content
}

// Take takes the tree as it is; nobody may be changing it. The result is good as long as
// e is not closed. It is nil for a tree that is too large: that one is to be archived
// (Write) while it stands still.
func (e *Early) Take(ctx context.Context) (*Tree, error) {
	if e.large {
		return nil, nil
	}
	_, offset, err := clocks()
	if err != nil {
		return nil, err
	}
	known, contents := e.known, e.contents
	if offset < e.offset-settling/2 {
		known, contents = nil, map[inode]kept{}
	}
	t, had := &Tree{early: e}, e.end
	taken := map[inode]content{}
	err = filepath.WalkDir(e.dir, func(full string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
		info, err := os.Lstat(full)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(e.dir, full)
		if err != nil {
			return err
		}
		rel = filepath.ToSlash(rel)
		st := info.Sys().(*syscall.Stat_t)
		found := known[rel]
		if found == nil || found.id != (inode{uint64(st.Dev), st.Ino}) || found.ctime != st.Ctim {
			if found, err = describe(full, rel, info); err != nil {
				return err
			}
		}
		if found.header != nil {
			own := *found.header // writing changes it
			own.AccessTime = time.Unix(st.Atim.Unix())
			copied := *found
			copied.header = &own
			found = &copied
		}
		i := item{entry: found}
		if found.regular() {
			var again bool
			if i.content, again = taken[found.id]; !again {
				if k, ok := contents[found.id]; ok && k.ctime == found.ctime && k.size == found.header.Size {
					i.content = k.content
				} else if i.content, err = e.copy(ctx, found); err != nil {
					return err
				}
				if found.links > 1 {
					taken[found.id] = i.content
				}
			}
		}
		t.items = append(t.items, i)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("capture %s: %w", e.dir, err)
	}
	t.Late = e.end - had
	return t, nil
}

// Write writes the tree's archive, as the function Write does, and gives up what it has
// written of the spool: it can be called once.
func (t *Tree) Write(ctx context.Context, w io.Writer) error {
	out := newWriter(ctx, w)
	for _, i := range t.items {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := out.write(i.entry, i.content); err != nil {
			return fmt.Errorf("archive %s: %w", t.early.dir, err)
		}
		i.giveUp()
	}
	if err := out.tar.Close(); err != nil {
		return fmt.Errorf("archive %s: %w", t.early.dir, err)
	}
	return nil
}

// giveUp frees the room of a large content, as far as the file system can.
func (i item) giveUp() {
	const worthwhile = 1 << 20
	var size int64
	for _, x := range i.extents {
		size += x.length
	}
	if spool, ok := i.from.(*os.File); ok && size >= worthwhile && i.links == 1 {
		unix.Fallocate(int(spool.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, i.at, size)
	}
}

// walk goes through a tree that may be changing.
func walk(ctx context.Context, dir string, fn func(full, rel string, info fs.FileInfo) error) error {
	return filepath.WalkDir(dir, func(full string, d fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		var info fs.FileInfo
		if err == nil {
			info, err = os.Lstat(full)
		}
		if errors.Is(err, fs.ErrNotExist) && full != dir {
			return nil
		} else if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, full)
		if err != nil {
			return err
		}
		return fn(full, filepath.ToSlash(rel), info)
	})
}

// trusted says whether a directory is on a file system whose times of change can be
// relied upon.
func trusted(dir string) bool {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return false
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC:
		return true
	}
	return false
}

// clocks returns the time of day as files get it, and what it is ahead of a clock that
// nobody sets.
func clocks() (now time.Time, offset time.Duration, err error) {
	var day, boot unix.Timespec
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &day), unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &boot)); err != nil {
		return now, 0, fmt.Errorf("read the clock: %w", err)
	}
	return time.Unix(day.Unix()), time.Duration(day.Nano() - boot.Nano()), nil
}
