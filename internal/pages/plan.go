package pages

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/pages/lazy"
)

// Mode says how a restore brings memory.
type Mode string

const (
	// ModeAuto gives it while processes run where that is worth it; it is the zero value.
	ModeAuto Mode = ""
	// ModeLazy does so in any case, or refuses.
	ModeLazy Mode = "lazy"
	// ModeEager has all in place before the first instruction.
	ModeEager Mode = "eager"
)

// ParseMode reads a mode as users write it.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case ModeAuto, ModeLazy, ModeEager:
		return m, nil
	case "auto":
		return ModeAuto, nil
	}
	return "", fmt.Errorf("%q is none of auto, lazy and eager", s)
}

// Policy decides which checkpoints' memory is given while their processes run.
type Policy struct {
	// Unsupported says why this node cannot; nil if it can.
	Unsupported error
	// Threshold is how much memory, in bytes, makes it worth it.
	Threshold int64
}

// ErrNotLazy says why the memory of a checkpoint cannot be given lazily.
var ErrNotLazy = errors.New("memory cannot be given while processes run")

// errByEngine says that it is not given from here: the engine brings it, of files that
// have been checked.
var errByEngine = fmt.Errorf("%w: the engine brings it", ErrNotLazy)

// Verified is a checkpoint all of which is as it was written, but for memory that is
// checked later.
type Verified struct {
	Manifest *checkpoint.Manifest
	// Lazily is not nil where memory is to be given to processes while they run: it is
	// checked when it is given.
	Lazily *Lazily
	// Beside says that there are files of pages that VerifyBeside has to check: beside
	// CRIU, which brings them, and before anything of the Pod runs.
	Beside bool
}

// besideSize is how large a file of pages is, in bytes, that makes it worth it not to wait
// for its check: a tenth of a second, or less.
const besideSize = 64 << 20

func beside(f checkpoint.File) bool { return f.Size >= besideSize && IsPages(f.Path) }

// Verify checks a checkpoint before it is restored, as checkpoint.Verify does, but for
// memory that can be checked later.
func (p Policy) Verify(ctx context.Context, dir, manifestDigest string, mode Mode) (*Verified, error) {
	if mode != ModeEager {
		l, err := p.look(ctx, dir, manifestDigest, mode)
		switch {
		case err == nil:
			return &Verified{Manifest: l.Manifest, Lazily: l}, l.Verify(ctx)
		case !errors.Is(err, ErrNotLazy) || mode == ModeLazy && !errors.Is(err, errByEngine):
			return nil, err
		}
	}
	m, err := checkpoint.VerifyBut(ctx, dir, manifestDigest, beside)
	if err != nil {
		return nil, err
	}
	return &Verified{Manifest: m, Beside: slices.ContainsFunc(m.Files, beside)}, nil
}

// VerifyBeside checks the files of pages that Policy.Verify has left. spare is as
// checkpoint.VerifyFiles has it.
func VerifyBeside(ctx context.Context, dir, manifestDigest string, spare func(ctx context.Context)) error {
	m, _, err := checkpoint.ReadManifestOf(dir, manifestDigest)
	if err != nil {
		return err
	}
	blocks, err := checkpoint.ReadBlocks(dir, m)
	if err != nil && !errors.Is(err, checkpoint.ErrNoBlocks) {
		return err
	}
	return checkpoint.VerifyFiles(ctx, dir, m, blocks, beside, spare)
}

func (p Policy) look(ctx context.Context, dir, manifestDigest string, mode Mode) (*Lazily, error) {
	if p.Unsupported != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotLazy, p.Unsupported)
	}
	l, err := Look(ctx, dir, manifestDigest)
	if err == nil {
		err = p.worth(l, mode)
	}
	return l, err
}

func (p Policy) worth(l *Lazily, mode Mode) error {
	if mode == ModeAuto && l.Bytes < p.Threshold {
		return fmt.Errorf("%w: %d bytes are less than what makes it worth it", ErrNotLazy, l.Bytes)
	}
	return nil
}

// Early says whether a checkpoint that is being brought to this node can be restored
// before its memory is here, or, by an ErrNotLazy, why not. Its page maps and the list of
// its block digests are in the directory, and what they are to be, its manifest m says.
// It is for Pods that ask for it (ModeLazy), at any size.
func (p Policy) Early(ctx context.Context, dir string, m *checkpoint.Manifest, manifestDigest string) (*Lazily, error) {
	if p.Unsupported != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotLazy, p.Unsupported)
	}
	l, err := look(ctx, dir, m, manifestDigest)
	if err == nil && len(l.later) == 0 {
		err = fmt.Errorf("%w: its memory is in files of one block", ErrNotLazy)
	}
	return l, err
}

// Lazily is a checkpoint whose memory can be given to its processes while they run.
type Lazily struct {
	Manifest *checkpoint.Manifest
	// ManifestDigest is that of the manifest.
	ManifestDigest string
	// Bytes of memory that can be given so, of all containers.
	Bytes int64

	dir        string
	blocks     *checkpoint.Blocks
	containers map[string]*Container
	later      map[string]*Memory // by the file that has pages which are checked later
}

// Look reads what there is of memory in a checkpoint, whose manifest and page maps it
// checks, and nothing else.
func Look(ctx context.Context, dir, manifestDigest string) (*Lazily, error) {
	m, digest, err := checkpoint.ReadManifestOf(dir, manifestDigest)
	if err != nil {
		return nil, err
	}
	return look(ctx, dir, m, digest)
}

func look(ctx context.Context, dir string, m *checkpoint.Manifest, digest string) (_ *Lazily, err error) {
	if m.Engine.Name != "" && m.Engine.Name != "criu" {
		return nil, errByEngine
	}
	l := &Lazily{Manifest: m, ManifestDigest: digest, dir: dir, containers: map[string]*Container{}, later: map[string]*Memory{}}
	if l.blocks, err = checkpoint.ReadBlocks(dir, m); errors.Is(err, checkpoint.ErrNoBlocks) {
		return nil, fmt.Errorf("%w: %w", ErrNotLazy, err)
	} else if err != nil {
		return nil, err
	}
	if err := checkpoint.VerifyFiles(ctx, dir, m, l.blocks, isPagemap, nil); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open checkpoint: %w", err)
	}
	defer root.Close()
	for _, c := range m.Containers {
		read, err := ReadContainer(ctx, root.FS(), c.Name)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", checkpoint.ErrCorrupt, err)
		}
		l.containers[c.Name] = read
		for i := range read.Memory {
			mem := &read.Memory[i]
			if mem.PID == 0 || mem.LazyBytes() == 0 {
				continue // CRIU reads it
			}
			l.Bytes += mem.LazyBytes()
			if _, ok := l.blocks.Of(path.Join(read.Dir, mem.File)); ok {
				l.later[path.Join(read.Dir, mem.File)] = mem
			}
		}
	}
	if l.Bytes == 0 {
		return nil, fmt.Errorf("%w: it holds none that could", ErrNotLazy)
	}
	return l, nil
}

// Verify checks all that CRIU reads.
func (l *Lazily) Verify(ctx context.Context) error {
	if err := checkpoint.VerifyFiles(ctx, l.dir, l.Manifest, l.blocks, func(f checkpoint.File) bool { return l.later[f.Path] == nil && !isPagemap(f) }, nil); err != nil {
		return err
	}
	root, err := os.OpenRoot(l.dir)
	if err != nil {
		return fmt.Errorf("open checkpoint: %w", err)
	}
	defer root.Close()
	for file, mem := range l.later {
		if err := verifyEager(ctx, root, l.blocks, file, mem); err != nil {
			return err
		}
	}
	return checkpoint.VerifyNothingElse(l.dir, l.Manifest)
}

// Later names the files of pages that CRIU does not read all of, each with the blocks that
// it does read.
func (l *Lazily) Later() map[string][]int {
	later := map[string][]int{}
	for file, mem := range l.later {
		later[file] = mem.eagerBlocks(l.Blocks(file).Count())
	}
	return later
}

// Blocks are the digests of a file's blocks.
func (l *Lazily) Blocks(file string) checkpoint.FileBlocks {
	sums, _ := l.blocks.Of(file)
	return sums
}

// IsPages says whether a file of a checkpoint, by its path, holds pages.
func IsPages(file string) bool {
	ok, _ := path.Match("containers/*/criu/pages-*.img", file)
	return ok
}

func isPagemap(f checkpoint.File) bool {
	ok, _ := path.Match("containers/*/criu/pagemap-*.img", f.Path)
	return ok
}

// verifyEager checks the blocks of a file of pages of which CRIU reads some itself.
func verifyEager(ctx context.Context, root *os.Root, list *checkpoint.Blocks, file string, mem *Memory) error {
	sums, _ := list.Of(file)
	f, err := root.Open(filepath.FromSlash(file))
	if err != nil {
		return fmt.Errorf("%w: %w", checkpoint.ErrMissing, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return err
	} else if info.Size() != sums.Size {
		return fmt.Errorf("%w: %s has another size than the %d bytes written", checkpoint.ErrCorrupt, file, sums.Size)
	}
	buf := make([]byte, checkpoint.BlockSize)
	for _, block := range mem.eagerBlocks(sums.Count()) {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if block >= sums.Count() {
			return fmt.Errorf("%w: %s ends before its pages do", checkpoint.ErrCorrupt, file)
		}
		offset, size := sums.Range(block)
		if _, err := f.ReadAt(buf[:size], offset); err != nil {
			return fmt.Errorf("read %s: %w", file, err)
		}
		if err := sums.Check(block, buf[:size]); err != nil {
			return err
		}
	}
	return nil
}

// eagerBlocks are the blocks of its file that hold pages which CRIU reads itself, in order.
// The last one is none of the file's, which has so many, where the file is too short.
func (m *Memory) eagerBlocks(count int) (blocks []int) {
	next := 0
	for _, r := range m.Runs {
		if r.Lazy || r.End == r.Start {
			continue
		}
		first, last := int(r.Offset/checkpoint.BlockSize), int((r.Offset+int64(r.End-r.Start)-1)/checkpoint.BlockSize)
		for block := max(first, next); block <= last; block++ {
			if blocks = append(blocks, block); block >= count {
				return blocks
			}
		}
		next = max(next, last+1)
	}
	return blocks
}

// Plan says which memory the processes of a container are given.
func (l *Lazily) Plan(container string) (*lazy.Plan, error) {
	c := l.containers[container]
	if c == nil {
		return nil, fmt.Errorf("the checkpoint holds no container %q", container)
	}
	p := &lazy.Plan{Dir: l.dir, ManifestDigest: l.ManifestDigest}
	for i := range c.Memory {
		m := &c.Memory[i]
		if m.PID == 0 {
			continue
		}
		process := lazy.Process{PID: m.PID, File: path.Join(c.Dir, m.File)}
		for _, r := range m.Runs {
			if r.Lazy {
				process.Runs = append(process.Runs, lazy.Run{Start: r.Start, Pages: (r.End - r.Start) / pageSize, Page: uint64(r.Offset) / pageSize})
			}
		}
		if len(process.Runs) > 0 {
			p.Processes = append(p.Processes, process)
		}
	}
	return p, nil
}
