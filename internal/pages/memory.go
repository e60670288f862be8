// Package pages finds where a captured page is: from a process and an address, through
// CRIU's page maps, to a place in a file of the checkpoint, and back. A page's place in
// a file changes when a page appears before it; its address does not.
package pages

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"podstasis.dev/stasis/internal/contents/images"
)

const pageSize = images.PageSize

// maxRuns bounds the runs of one process.
const maxRuns = 1 << 22

// ErrInvalid says that images contradict each other.
var ErrInvalid = errors.New("the images of a container's memory contradict each other")

// Run is a run of pages of one process.
type Run struct {
	Start, End uint64 // addresses
	// Offset of the first page in the file of pages; the others follow it.
	Offset int64
	// Lazy says that the page may be given when a process asks for it.
	Lazy bool
}

// Memory is what was captured of the memory of one process, or of one object that
// processes share.
type Memory struct {
	// PID is the process, as the images number it; 0 for shared memory.
	PID uint32
	// Name is what the page map is called: PID, or shmem-ID.
	Name string
	// File is the file that holds its pages, in the directory of images.
	File string
	// Runs are in order of addresses, and of offsets.
	Runs []Run
}

// Read reads the page maps of a directory of images, in the order of their names.
func Read(ctx context.Context, dir fs.FS, limit int64) ([]Memory, error) {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return nil, fmt.Errorf("read the directory of images: %w", err)
	}
	source := images.New(dir, limit)
	var all []Memory
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), "pagemap-")
		if name, ok = cutSuffix(name, ".img", ok); !ok {
			continue
		}
		m := Memory{Name: name}
		if pid, err := strconv.ParseUint(name, 10, 31); err == nil {
			m.PID = uint32(pid)
		}
		id, err := source.Pagemap(ctx, name, func(p images.Pages) error {
			if p.Offset < 0 {
				return fmt.Errorf("%w: pages at %x are in an earlier image", ErrInvalid, p.Start)
			}
			if len(m.Runs) == maxRuns {
				return fmt.Errorf("%s: %w", e.Name(), images.ErrTooMuch)
			}
			if p.Start%pageSize != 0 {
				return fmt.Errorf("%w: a page at %x", ErrInvalid, p.Start)
			}
			m.Runs = append(m.Runs, Run{p.Start, p.End, p.Offset, p.Lazy})
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("read where pages are: %w", err)
		}
		m.File = fmt.Sprintf("pages-%d.img", id)
		if i := slices.IndexFunc(all, func(other Memory) bool { return other.File == m.File && len(other.Runs) > 0 && len(m.Runs) > 0 }); i >= 0 {
			return nil, fmt.Errorf("%w: %s holds the pages of both %s and %s", ErrInvalid, m.File, all[i].Name, m.Name)
		}
		all = append(all, m)
	}
	return all, nil
}

func cutSuffix(s, suffix string, ok bool) (string, bool) {
	if !ok {
		return s, false
	}
	return strings.CutSuffix(s, suffix)
}

// Offset says where in File the page of an address is.
func (m *Memory) Offset(address uint64) (offset int64, ok bool) {
	i, found := slices.BinarySearchFunc(m.Runs, address, func(r Run, address uint64) int {
		switch {
		case r.End <= address:
			return -1
		case r.Start > address:
			return 1
		}
		return 0
	})
	if !found {
		return 0, false
	}
	return m.Runs[i].Offset + int64(address&^(pageSize-1)-m.Runs[i].Start), true
}

// Address says of which address the page at an offset of File is.
func (m *Memory) Address(offset int64) (address uint64, ok bool) {
	i, found := slices.BinarySearchFunc(m.Runs, offset, func(r Run, offset int64) int {
		switch {
		case r.Offset+int64(r.End-r.Start) <= offset:
			return -1
		case r.Offset > offset:
			return 1
		}
		return 0
	})
	if !found {
		return 0, false
	}
	return m.Runs[i].Start + uint64(offset-m.Runs[i].Offset)&^(pageSize-1), true
}

// LazyBytes is how much of it may be given when a process asks for it.
func (m *Memory) LazyBytes() int64 {
	var sum int64
	for _, r := range m.Runs {
		if r.Lazy {
			sum += int64(r.End - r.Start)
		}
	}
	return sum
}

// Container is the memory of the processes of one container of a checkpoint.
type Container struct {
	Name string
	// Dir of images, in the checkpoint.
	Dir    string
	Memory []Memory
}

// ReadContainer reads the page maps of a container of the checkpoint in dir.
func ReadContainer(ctx context.Context, dir fs.FS, name string) (*Container, error) {
	c := &Container{Name: name, Dir: path.Join("containers", name, "criu")}
	sub, err := fs.Sub(dir, c.Dir)
	if err == nil {
		c.Memory, err = Read(ctx, sub, maxImages)
	}
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", name, err)
	}
	return c, nil
}

// maxImages bounds what is read of the page maps of one container.
const maxImages = 256 << 20

// Find says where the page of an address of a process is: the file, by its path in the
// checkpoint, and the offset. No page was captured where ok is false: it was zero, or is
// of a file that is mapped.
func (c *Container) Find(pid uint32, address uint64) (file string, offset int64, ok bool) {
	for i := range c.Memory {
		m := &c.Memory[i]
		if m.PID != pid || pid == 0 {
			continue
		}
		offset, ok := m.Offset(address)
		return path.Join(c.Dir, m.File), offset, ok
	}
	return "", 0, false
}

// Of says of which process and address the page at an offset of a file is.
func (c *Container) Of(file string, offset int64) (pid uint32, address uint64, ok bool) {
	for i := range c.Memory {
		m := &c.Memory[i]
		if path.Join(c.Dir, m.File) != file {
			continue
		}
		if address, ok := m.Address(offset); ok {
			return m.PID, address, true
		}
	}
	return 0, 0, false
}
