package contents

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sort"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents/images"
)

// Kinds of mappings, as the API names them.
const (
	kindHeap      = "heap"
	kindStack     = "stack"
	kindAnonymous = "anonymous"
	kindFile      = "file"
	kindShared    = "shared"
	kindVDSO      = "vdso"
	kindOther     = "other"
)

// flagGrowsDown marks a stack among a mapping's flags, flagShared one that others see.
const (
	flagShared    = 1 << 0
	flagGrowsDown = 1 << 8
)

func kindOf(m *images.Mapping) string {
	has := func(bits uint32) bool { return m.Mode&bits != 0 }
	switch {
	case has(images.StatusVDSO | images.StatusVvar):
		return kindVDSO
	case has(images.StatusVsyscall | images.StatusSocket | images.StatusAIO):
		return kindOther
	case has(images.StatusHeap):
		return kindHeap
	case has(images.StatusStack) || has(images.StatusAnonPrivate) && m.Flags&flagGrowsDown != 0:
		return kindStack
	case has(images.StatusMemfd | images.StatusAnonShared | images.StatusSysV):
		return kindShared
	case has(images.StatusFilePrivate | images.StatusFileShared):
		return kindFile
	case has(images.StatusAnonPrivate):
		return kindAnonymous
	}
	return kindOther
}

// memory fills in a process's memory, command line and environment.
func (p *processes) memory(ctx context.Context, at string, t task, _ *images.Task, out *api.Process) error {
	mm, err := p.source.ReadMemory(ctx, t.pid)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it shares another's
	}
	if err := p.failed(ctx, fmt.Sprintf("memory of process %d", t.pid), err); err != nil || mm == nil {
		return err
	}
	out.Executable = p.files.path(mm.Numbers[images.ExeFile])
	out.AddressSpace = addressSpace(mm, out.Executable)

	args := newWindow(mm.Numbers[images.ArgStart], mm.Numbers[images.ArgEnd])
	env := newWindow(mm.Numbers[images.EnvStart], mm.Numbers[images.EnvEnd])
	next, sum := 0, int64(0)
	pagesID, err := p.source.Pagemap(ctx, fmt.Sprint(t.pid), func(run images.Pages) error {
		next = account(mm.Mappings, next, run)
		args.found(run)
		env.found(run)
		if run.Offset >= 0 {
			sum = max(sum, run.Offset+int64(run.End-run.Start))
		} else {
			p.notes.add("process %d has pages in an earlier checkpoint's images, which are not counted", t.pid)
		}
		return nil
	})
	if err := p.failed(ctx, fmt.Sprintf("captured pages of process %d", t.pid), err); err != nil {
		return err
	}
	if size := p.names[fmt.Sprintf("pages-%d.img", pagesID)]; sum > size {
		p.notes.add("process %d: the map names %d bytes of pages, pages-%d.img has %d", t.pid, sum, pagesID, size)
	}
	if err := p.sharedPages(ctx, mm.Mappings); err != nil {
		return err
	}
	p.figures(at, mm.Mappings, out)
	p.commandLine(at, t, mm, pagesID, args, env, out)
	return nil
}

// addressSpace is a digest of what the kernel and the loader chose when the program
// was started.
func addressSpace(mm *images.Memory, executable string) string {
	n := mm.Numbers
	text := fmt.Sprintln(executable, n[images.StartCode], n[images.EndCode], n[images.StartData], n[images.StartStack],
		n[images.StartBrk], n[images.ArgStart], n[images.EnvStart])
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8])
}

// account adds a run of captured pages to the mappings that it lies in, and returns
// the first that a later run can lie in.
func account(mappings []images.Mapping, next int, run images.Pages) int {
	for next < len(mappings) && mappings[next].End <= run.Start {
		next++
	}
	if run.Offset < 0 {
		return next
	}
	for i := next; i < len(mappings) && mappings[i].Start < run.End; i++ {
		mappings[i].Captured += int64(min(mappings[i].End, run.End) - max(mappings[i].Start, run.Start))
	}
	return next
}

// sharedMemory is what was captured of an object that several processes may map.
type sharedMemory struct {
	runs   []images.Pages
	before []int64 // bytes captured before each run
}

// within is how many bytes lie in a range.
func (s *sharedMemory) within(start, end uint64) int64 {
	return s.below(end) - s.below(start)
}

func (s *sharedMemory) below(at uint64) int64 {
	i := sort.Search(len(s.runs), func(i int) bool { return s.runs[i].Start >= at }) - 1
	if i < 0 {
		return 0
	}
	return s.before[i] + int64(min(s.runs[i].End, at)-s.runs[i].Start)
}

// sharedPages counts the captured pages of mappings whose memory is kept apart. It
// counts in every process that maps it.
func (p *processes) sharedPages(ctx context.Context, mappings []images.Mapping) error {
	for i := range mappings {
		m := &mappings[i]
		id := m.ShmID
		switch {
		case m.Mode&images.StatusMemfd != 0:
			id = p.files.memfdShmID(m.ShmID)
		case m.Mode&images.StatusAnonShared == 0:
			continue
		}
		object, known := p.shared[id]
		if !known {
			var err error
			if object, err = p.readShared(ctx, id); err != nil {
				return err
			}
			p.shared[id] = object
		}
		if size := m.End - m.Start; m.Offset+size > m.Offset {
			m.Captured += object.within(m.Offset, m.Offset+size)
		}
	}
	return nil
}

func (p *processes) readShared(ctx context.Context, id uint64) (*sharedMemory, error) {
	s, sum, full := &sharedMemory{}, int64(0), !p.hold(256)
	name := fmt.Sprintf("shmem-%d", id)
	if _, there := p.names["pagemap-"+name+".img"]; !there || full {
		return s, nil // nothing of it was captured
	}
	_, err := p.source.Pagemap(ctx, name, func(run images.Pages) error {
		if run.Offset < 0 || full {
			return nil
		}
		if last := len(s.runs) - 1; last >= 0 && s.runs[last].End == run.Start {
			s.runs[last].End = run.End
		} else if full = !p.hold(32); !full {
			s.runs, s.before = append(s.runs, run), append(s.before, sum)
		}
		sum += int64(run.End - run.Start)
		return nil
	})
	return s, p.failed(ctx, "shared memory", err)
}

// figures sums mappings up and gives out the biggest.
func (p *processes) figures(at string, mappings []images.Mapping, out *api.Process) {
	out.Memory.ByKind = map[string]int64{}
	biggest := make([]int, 0, len(mappings))
	for i := range mappings {
		m := &mappings[i]
		out.Memory.Virtual += int64(m.End - m.Start)
		out.Memory.Captured += m.Captured
		if m.Captured > 0 {
			out.Memory.ByKind[kindOf(m)] += m.Captured
		}
		biggest = append(biggest, i)
	}
	slices.SortStableFunc(biggest, func(a, b int) int {
		x, y := &mappings[a], &mappings[b]
		return cmp.Or(cmp.Compare(y.Captured, x.Captured), cmp.Compare(y.End-y.Start, x.End-x.Start))
	})
	// The API says "the biggest": that others are left out is no news.
	for _, i := range biggest[:min(len(biggest), p.limits.Mappings)] {
		m := &mappings[i]
		shown := api.Mapping{
			Start: fmt.Sprintf("%x", m.Start), End: fmt.Sprintf("%x", m.End),
			Protection: protection(m), Kind: kindOf(m), CapturedBytes: m.Captured,
		}
		if m.Mode&(images.StatusFilePrivate|images.StatusFileShared|images.StatusMemfd) != 0 {
			shown.Path = p.files.path(m.ShmID)
		}
		if !p.fits(at+".mappings", 0, 1, len(shown.Path)+40) {
			return
		}
		out.Mappings = append(out.Mappings, shown)
	}
}

func protection(m *images.Mapping) string {
	b := []byte("---p")
	for i, c := range "rwx" {
		if m.Prot&(1<<i) != 0 {
			b[i] = byte(c)
		}
	}
	if m.Flags&flagShared != 0 {
		b[3] = 's'
	}
	return string(b)
}
