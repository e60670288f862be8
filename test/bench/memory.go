package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"podstasis.dev/stasis/internal/store"
)

// putOnly has this program store 4 GiB and tell its own peak, and nothing else.
const putOnly = "put-only"

// memory measures a process of its own that stores 4 GiB, of which nothing compresses,
// and then another that stores as much with a tenth changed.
func memory(ctx context.Context, _ *bench, dir string) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	for _, m := range []struct{ name, changed string }{{"store_memory_peak_mib", "0"}, {"store_again_memory_peak_mib", "10"}} {
		cmd := exec.CommandContext(ctx, program, putOnly, filepath.Join(dir, "store"), m.changed)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return err
		}
		kib, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
		if err != nil {
			return err
		}
		report(m.name, kib/1024, "MiB")
	}
	return nil
}

func putAndTell(ctx context.Context, dir, percent string) error {
	debug.SetMemoryLimit(store.MemoryLimit) // as the agent does
	changed, err := strconv.Atoi(percent)
	if err != nil {
		return err
	}
	err = withStore(ctx, dir, func(s *store.Store) error {
		_, err := s.Put(ctx, &noise{changed: changed}, store.PutOptions{Alike: []string{"pod"}})
		return err
	})
	if err != nil {
		return err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			fmt.Println(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
			return nil
		}
	}
	return errors.New("/proc/self/status has no VmHWM")
}

const (
	noiseName  = "pages-1.img"
	noisePages = 4 << 30 / pageSize
)

// noise is a file system with one file of captured pages, 4 GiB of noise that is made
// when it is read.
type noise struct{ changed int } // percent of the pages

func (n *noise) Open(name string) (fs.File, error) {
	switch name {
	case ".":
		return &noiseDir{}, nil
	case noiseName:
		return &noiseFile{changed: n.changed}, nil
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

type noiseInfo struct {
	name string
	dir  bool
}

func (i noiseInfo) Name() string       { return i.name }
func (i noiseInfo) Size() int64        { return noisePages * pageSize }
func (i noiseInfo) ModTime() time.Time { return time.Time{} }
func (i noiseInfo) IsDir() bool        { return i.dir }
func (i noiseInfo) Sys() any           { return nil }
func (i noiseInfo) Mode() fs.FileMode {
	if i.dir {
		return fs.ModeDir | 0o700
	}
	return 0o600
}

type noiseDir struct{ listed bool }

func (*noiseDir) Stat() (fs.FileInfo, error) { return noiseInfo{".", true}, nil }
func (*noiseDir) Read([]byte) (int, error)   { return 0, errors.New("it is a directory") }
func (*noiseDir) Close() error               { return nil }

func (d *noiseDir) ReadDir(int) ([]fs.DirEntry, error) {
	if d.listed {
		return nil, io.EOF
	}
	d.listed = true
	return []fs.DirEntry{fs.FileInfoToDirEntry(noiseInfo{noiseName, false})}, nil
}

type noiseFile struct {
	changed, page int
	rest          []byte
	buffer        [pageSize]byte
}

func (*noiseFile) Stat() (fs.FileInfo, error) { return noiseInfo{noiseName, false}, nil }
func (*noiseFile) Close() error               { return nil }

func (f *noiseFile) Read(p []byte) (int, error) {
	if len(f.rest) == 0 {
		if f.page == noisePages {
			return 0, io.EOF
		}
		key := [32]byte{byte(f.page), byte(f.page >> 8), byte(f.page >> 16)}
		if f.page*7919%100 < f.changed {
			key[31] = 1
		}
		rand.NewChaCha8(key).Read(f.buffer[:]) // never fails
		f.rest = f.buffer[:]
		f.page++
	}
	n := copy(p, f.rest)
	f.rest = f.rest[n:]
	return n, nil
}
