package criu

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
)

// CRIU finds the file that an inotify instance watches by its handle, which overlayfs
// does not open (without nfs_export): it would then look into a few directories that
// it knows. So it is told where the watched files of a container's root file system
// are, in a file that it also writes for itself, and reads from its work directory.

// irmapFile and its magic numbers are CRIU's (image "irmap-cache").
const (
	irmapFile   = "irmap-cache"
	magicImage  = 0x55105940
	magicIrmap  = 0x57004059
	mostEntries = 2 << 20 // of a root file system that is searched
)

// watched is a file that is watched, as the kernel tells of it.
type watched struct {
	dev uint64 // as the kernel encodes it
	ino uint64
}

// watchesOf lists what the processes' inotify instances watch on a device.
func watchesOf(pids []int, dev uint64) map[watched]int {
	found := map[watched]int{}
	for _, pid := range pids {
		proc := "/proc/" + strconv.Itoa(pid)
		fds, err := os.ReadDir(proc + "/fd")
		if err != nil {
			continue // it has ended
		}
		for _, fd := range fds {
			if target, err := os.Readlink(proc + "/fd/" + fd.Name()); err != nil || target != "anon_inode:inotify" {
				continue
			}
			data, err := os.ReadFile(proc + "/fdinfo/" + fd.Name())
			if err != nil {
				continue
			}
			for line := range bytes.Lines(data) {
				if w, ok := parseWatch(string(line)); ok && w.dev == dev {
					found[w] = pid
				}
			}
		}
	}
	return found
}

// parseWatch reads a line of an inotify instance's fdinfo, such as
// "inotify wd:1 ino:a20094 sdev:36 mask:300 …" (proc_pid_fdinfo(5)).
func parseWatch(line string) (w watched, ok bool) {
	rest, ok := strings.CutPrefix(line, "inotify ")
	if !ok {
		return w, false
	}
	var errs []error
	seen := 0
	for field := range strings.FieldsSeq(rest) {
		name, value, _ := strings.Cut(field, ":")
		into := map[string]*uint64{"ino": &w.ino, "sdev": &w.dev}[name]
		if into == nil {
			continue
		}
		n, err := strconv.ParseUint(value, 16, 64)
		*into, errs, seen = n, append(errs, err), seen+1
	}
	return w, seen == 2 && errors.Join(errs...) == nil
}

// kernelDev is a device number as the kernel encodes it, and not as stat(2) does.
func kernelDev(dev uint64) uint64 {
	return uint64(unix.Major(dev))<<20 | uint64(unix.Minor(dev))
}

// findWatched finds the names, in a container's root file system, of the files there
// that its processes watch.
func findWatched(ctx context.Context, c engine.Container, pids []int) (map[watched]string, error) {
	root := "/proc/" + strconv.Itoa(c.PID) + "/root/."
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return nil, fmt.Errorf("container %s: look at its root: %w", c.Name, err)
	}
	missing := watchesOf(pids, kernelDev(st.Dev))
	if len(missing) == 0 {
		return nil, nil
	}
	found := map[watched]string{}
	looked := 0
	err := filepath.WalkDir(root, func(full string, d fs.DirEntry, err error) error {
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
		at, ok := info.Sys().(*syscall.Stat_t)
		if !ok || at.Dev != st.Dev {
			if d.IsDir() {
				return fs.SkipDir // mounted over it
			}
			return nil
		}
		w := watched{kernelDev(at.Dev), at.Ino}
		if _, ok := missing[w]; ok {
			delete(missing, w)
			if found[w] = strings.TrimPrefix(full, root[:len(root)-2]); found[w] == "/." || found[w] == "" {
				found[w] = "/." // as CRIU calls it
			}
		}
		if looked++; len(missing) == 0 || looked > mostEntries {
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("container %s: find the files that are watched: %w", c.Name, err)
	}
	for w, pid := range missing {
		return nil, fmt.Errorf("%w: container %s, process %d (%s): it watches a file by inotify (inode %d of the root file system) that has no name there any more, so that CRIU cannot watch it again: end that watch first",
			engine.ErrUnsupported, c.Name, pid, commandOf(pid), w.ino)
	}
	return found, nil
}

// writeWatched tells CRIU, in its work directory, where watched files are.
func writeWatched(dir string, found map[watched]string) error {
	if len(found) == 0 {
		return nil
	}
	data := binary.LittleEndian.AppendUint32(nil, magicImage)
	data = binary.LittleEndian.AppendUint32(data, magicIrmap)
	for w, name := range maps.All(found) {
		// message irmap_cache_entry of CRIU's fsnotify.proto, as protocol buffers are
		// encoded. This package is also stasis-runtime's, which must stay small.
		const number, bytes = 0, 2 // wire types
		entry := binary.AppendUvarint([]byte{1<<3 + number}, w.dev)
		entry = binary.AppendUvarint(append(entry, 2<<3+number), w.ino)
		entry = binary.AppendUvarint(append(entry, 3<<3+bytes), uint64(len(name)))
		entry = append(entry, name...)
		data = binary.LittleEndian.AppendUint32(data, uint32(len(entry)))
		data = append(data, entry...)
	}
	return os.WriteFile(filepath.Join(dir, irmapFile), data, 0o600)
}
