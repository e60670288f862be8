package contents

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v8/crit/images/memfd"
	remap "github.com/checkpoint-restore/go-criu/v8/crit/images/remap-file-path"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents/images"
)

// deletedSuffix follows the path of a file that had been deleted while it was open.
const deletedSuffix = " (deleted)"

// file is what was open, with all that is said of it.
type file struct {
	kind     string
	path     string
	position int64
	flags    uint32
	socket   int // its number among the sockets, plus 1
	memfd    uint32
}

// fileTable is a container's files, whoever has them open.
type fileTable struct {
	*processes
	files   map[uint32]*file
	deleted map[uint32]bool
	memfds  map[uint32]*memfd.MemfdInodeEntry
	sock    []*socket
	inodes  map[uint32]*socket // Unix sockets
}

func newFileTable(p *processes) *fileTable {
	return &fileTable{processes: p, files: map[uint32]*file{}, deleted: map[uint32]bool{},
		memfds: map[uint32]*memfd.MemfdInodeEntry{}, inodes: map[uint32]*socket{}}
}

func (t *fileTable) read(ctx context.Context) error {
	for _, step := range []struct {
		image string
		read  func(context.Context, string) error
	}{
		{"remap-fpath.img", t.readRemaps},
		{"memfd.img", t.readMemfds},
		{"files.img", t.readFiles},
	} {
		err := step.read(ctx, step.image)
		if errors.Is(err, fs.ErrNotExist) && step.image != "files.img" {
			continue // there are none
		}
		if err := t.failed(ctx, "open files", err); err != nil {
			return err
		}
	}
	return nil
}

// readRemaps reads which files had been deleted while they were open.
func (t *fileTable) readRemaps(ctx context.Context, image string) error {
	return images.Messages(ctx, t.source, image, images.Remaps, func(e *remap.RemapFilePathEntry) error {
		if e.GetRemapType() != remap.RemapType_PROCFS && t.hold(32) {
			t.deleted[e.GetOrigId()] = true
		}
		return nil
	})
}

func (t *fileTable) readMemfds(ctx context.Context, image string) error {
	return images.Messages(ctx, t.source, image, images.MemfdInodes, func(e *memfd.MemfdInodeEntry) error {
		if t.hold(256 + len(e.GetName())) {
			t.memfds[uint32(e.GetInodeId())] = e
		}
		return nil
	})
}

// maxFileEntry bounds what is decoded of one file. Only lists of what is watched are
// larger, and their items take many times what they take in the image.
const maxFileEntry = 64 << 10

func (t *fileTable) readFiles(ctx context.Context, image string) error {
	return t.source.Entries(ctx, image, images.Files, func(entry []byte) error {
		if !t.hold(256) {
			return nil
		}
		var e fdinfo.FileEntry
		if len(entry) > maxFileEntry {
			if err := largeFile(entry, &e); err != nil {
				return err
			}
		} else if err := images.Decode(entry, &e); err != nil {
			return err
		}
		f := t.describe(&e)
		if len(entry) > maxFileEntry {
			f.path = "watches many"
		}
		if t.deleted[e.GetId()] {
			f.path += deletedSuffix
		}
		if !t.hold(len(f.path)) {
			return nil
		}
		t.files[e.GetId()] = f
		return nil
	})
}

// largeFile takes the type and the number of a file, and nothing else.
func largeFile(entry []byte, e *fdinfo.FileEntry) error {
	return images.Fields(entry, func(f images.Field) error {
		switch f.Number {
		case 1:
			e.Type = fdinfo.FdTypes(int32(f.Value)).Enum()
		case 2:
			id := uint32(f.Value)
			e.Id = &id
		}
		return nil
	})
}

// path is that of a file, by its number.
func (t *fileTable) path(id uint64) string {
	if f := t.files[uint32(id)]; f != nil {
		return f.path
	}
	return ""
}

// memfdShmID is the shared memory behind a mapped memfd.
func (t *fileTable) memfdShmID(file uint64) uint64 {
	if f := t.files[uint32(file)]; f != nil {
		return uint64(t.memfds[f.memfd].GetShmid())
	}
	return 0
}

// openFiles lists a process's descriptors.
func (p *processes) openFiles(ctx context.Context, at string, t task, core *images.Task, out *api.Process) error {
	name := fmt.Sprintf("fdinfo-%d.img", core.FilesID)
	n := 0
	err := images.Messages(ctx, p.source, name, images.FDInfo, func(e *fdinfo.FdinfoEntry) error {
		f := p.files.files[e.GetId()]
		if f == nil {
			f = &file{kind: kindName(e.GetType())}
		} else if f.socket > 0 {
			p.files.sock[f.socket-1].holds(int64(t.pid))
		}
		if !p.fits(at+".files", n, p.limits.Files, len(f.path)+len(f.kind)) {
			return nil
		}
		n++
		out.Files = append(out.Files, api.OpenFile{
			FD: int64(e.GetFd()), Type: f.kind, Path: f.path, Position: f.position,
			Flags: flagNames(f, e.GetFlags()),
		})
		return nil
	})
	slices.SortStableFunc(out.Files, func(a, b api.OpenFile) int { return int(a.FD - b.FD) })
	return p.failed(ctx, fmt.Sprintf("open files of process %d", t.pid), err)
}
