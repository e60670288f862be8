package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Directories whose content is reported: the writable layer and the volumes, as
// far as they are mounted.
var reported = []string{"/data", "/image", "/scratch", "/memory"}

// makeFiles changes the file system in every way that a writable layer can hold.
// /image comes with the image.
func makeFiles() error {
	steps := []struct {
		what string
		do   func() error
	}{
		{"a new file", func() error { return write("/data/new", "new", 0o640) }},
		{"a file of another owner", func() error {
			return errors.Join(write("/data/owned", "owned", 0o600), os.Chown("/data/owned", 1234, 4321))
		}},
		{"a set-user-ID bit", func() error {
			return errors.Join(write("/data/suid", "x", 0o755), os.Chmod("/data/suid", 0o755|fs.ModeSetuid))
		}},
		{"hard links", func() error {
			return errors.Join(write("/data/one", "linked", 0o644), os.Link("/data/one", "/data/other"))
		}},
		{"a symbolic link", func() error { return os.Symlink("../nowhere", "/data/symlink") }},
		{"a pipe with a name", func() error { return unix.Mkfifo("/data/fifo", 0o622) }},
		{"an extended attribute", func() error {
			return errors.Join(write("/data/attributed", "x", 0o644), unix.Setxattr("/data/attributed", "user.note", []byte("kept\x00too"), 0))
		}},
		{"an empty directory", func() error { return os.Mkdir("/data/empty", 0o750) }},
		{"a time in the past", func() error {
			past := unix.NsecToTimeval(1_000_000_000 * 1e9)
			return errors.Join(write("/data/old", "old", 0o644), unix.Utimes("/data/old", []unix.Timeval{past, past}))
		}},
		{"a file with a hole", func() error {
			return errors.Join(write("/data/hole", "", 0o644), os.Truncate("/data/hole", 1<<20))
		}},
		{"a deleted file of the image", func() error { return os.Remove("/image/removed") }},
		{"a changed file of the image", func() error { return write("/image/changed", "changed", 0o644) }},
		{"a changed mode of the image", func() error { return os.Chmod("/image/mode", 0o600) }},
		{"a directory of the image made anew", func() error {
			return errors.Join(os.RemoveAll("/image/directory"), os.Mkdir("/image/directory", 0o755), write("/image/directory/new", "new", 0o644))
		}},
	}
	// A container that starts again in the same Pod has a fresh layer, but the Pod's volumes.
	if err := os.MkdirAll("/data", 0o755); err != nil {
		return err
	}
	for _, step := range steps {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	for _, volume := range []string{"/scratch", "/memory"} {
		if _, err := os.Stat(volume); err == nil {
			if err := errors.Join(os.MkdirAll(volume+"/deep", 0o700), write(volume+"/deep/file", "of "+volume, 0o604)); err != nil {
				return err
			}
		}
	}
	return nil
}

func write(name, content string, mode fs.FileMode) error {
	return errors.Join(os.WriteFile(name, []byte(content), mode), os.Chmod(name, mode))
}

// reportFiles describes each file by one line.
func reportFiles() (map[string]string, error) {
	report := map[string]string{}
	names := map[inode]string{} // for hard links
	for _, root := range reported {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				if os.IsNotExist(err) && path == root {
					return nil
				}
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			line, err := describe(path, info, names)
			report[path] = line
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return report, nil
}

// inode is a file, whatever its names.
type inode struct{ device, number uint64 }

func describe(path string, info fs.FileInfo, names map[inode]string) (string, error) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "", fmt.Errorf("no stat of %s", path)
	}
	parts := []string{info.Mode().String(), fmt.Sprintf("%d:%d", stat.Uid, stat.Gid)}
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(path)
		if err != nil {
			return "", err
		}
		parts = append(parts, "-> "+target)
	case info.Mode().IsRegular():
		parts = append(parts, fmt.Sprintf("%d bytes, modified %d", info.Size(), info.ModTime().Unix()))
		if info.Size() <= 256 {
			content, err := os.ReadFile(path)
			if err != nil {
				return "", err
			}
			parts = append(parts, fmt.Sprintf("%q", content))
		}
		if first, again := names[inode{stat.Dev, stat.Ino}]; again {
			parts = append(parts, "same as "+first)
		} else {
			names[inode{stat.Dev, stat.Ino}] = path
		}
	}
	if info.Mode()&fs.ModeSymlink == 0 {
		list := make([]byte, 1024)
		n, err := unix.Listxattr(path, list)
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return "", err
		}
		for name := range strings.SplitSeq(string(list[:max(n, 0)]), "\x00") {
			if !strings.HasPrefix(name, "user.") {
				continue
			}
			value := make([]byte, 256)
			n, err := unix.Getxattr(path, name, value)
			if err != nil {
				return "", err
			}
			parts = append(parts, name+"="+hexOf(value[:n]))
		}
	}
	return strings.Join(parts, " "), nil
}
