package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/layer"
)

func roundTrip(t *testing.T, from, over string) {
	t.Helper()
	var buf bytes.Buffer
	if err := layer.Write(context.Background(), &buf, from); err != nil {
		t.Fatal(err)
	}
	if err := layer.Apply(context.Background(), &buf, over); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, name, content string, mode os.FileMode) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(name), 0o755))
	must(t, os.WriteFile(name, []byte(content), mode))
	must(t, os.Chmod(name, mode))
}

func stat(t *testing.T, name string) *syscall.Stat_t {
	t.Helper()
	info, err := os.Lstat(name)
	must(t, err)
	return info.Sys().(*syscall.Stat_t)
}

func TestATreeComesBackWithModesOwnersTimesLinksAndAttributes(t *testing.T) {
	from, over := t.TempDir(), t.TempDir()
	write(t, from+"/dir/plain", "hello", 0o640)
	must(t, os.Chown(from+"/dir/plain", 1234, 4321))
	write(t, from+"/dir/suid", "x", 0o755)
	must(t, os.Chown(from+"/dir/suid", 7, 7))
	must(t, os.Chmod(from+"/dir/suid", 0o755|os.ModeSetuid))
	must(t, os.Link(from+"/dir/plain", from+"/hard"))
	must(t, os.Symlink("/etc/passwd", from+"/sym"))
	must(t, unix.Mkfifo(from+"/fifo", 0o600))
	must(t, os.Chmod(from+"/fifo", 0o622))
	must(t, unix.Setxattr(from+"/dir/plain", "user.colour", []byte("blue\x00green"), 0))
	must(t, os.Chmod(from+"/dir", 0o1770|os.ModeSticky))
	stamp := time.Unix(1_600_000_000, 123456789)
	must(t, os.Chtimes(from+"/dir/plain", stamp, stamp))
	must(t, os.Chtimes(from+"/dir", stamp, stamp))

	roundTrip(t, from, over)

	if b, _ := os.ReadFile(over + "/dir/plain"); string(b) != "hello" {
		t.Errorf("content is %q", b)
	}
	st := stat(t, over+"/dir/plain")
	if st.Uid != 1234 || st.Gid != 4321 || st.Mode&0o7777 != 0o640 || st.Mtim.Nano() != stamp.UnixNano() {
		t.Errorf("owner, mode or time differ: %+v", st)
	}
	if hard := stat(t, over+"/hard"); hard.Ino != st.Ino || st.Nlink != 2 {
		t.Errorf("hard link was not kept: inodes %d and %d, %d links", hard.Ino, st.Ino, st.Nlink)
	}
	if m := stat(t, over+"/dir/suid").Mode & 0o7777; m != 0o4755 {
		t.Errorf("set-user-ID file has mode %o", m)
	}
	if l, _ := os.Readlink(over + "/sym"); l != "/etc/passwd" {
		t.Errorf("symbolic link leads to %q", l)
	}
	if m := stat(t, over+"/fifo").Mode; m&unix.S_IFMT != unix.S_IFIFO || m&0o777 != 0o622 {
		t.Errorf("fifo has mode %o", m)
	}
	value := make([]byte, 64)
	n, err := unix.Getxattr(over+"/dir/plain", "user.colour", value)
	if err != nil || string(value[:n]) != "blue\x00green" {
		t.Errorf("extended attribute is %q, %v", value[:n], err)
	}
	if d := stat(t, over+"/dir"); d.Mode&0o7777 != 0o1770 || d.Mtim.Nano() != stamp.UnixNano() {
		t.Errorf("directory has mode %o, time %v", d.Mode, d.Mtim)
	}
}

func TestRemovedFilesGoAndReplacedDirectoriesLoseTheirOldContents(t *testing.T) {
	from, over := t.TempDir(), t.TempDir()
	write(t, over+"/gone/file", "old", 0o644)
	write(t, over+"/opaque/old", "old", 0o644)
	write(t, over+"/kept/old", "old", 0o644)
	write(t, over+"/nowdir", "was a file", 0o644)
	must(t, unix.Mknod(from+"/gone", unix.S_IFCHR, 0))
	write(t, from+"/opaque/new", "new", 0o644)
	must(t, unix.Setxattr(from+"/opaque", "trusted.overlay.opaque", []byte("y"), 0))
	write(t, from+"/kept/new", "new", 0o644)
	write(t, from+"/nowdir/file", "new", 0o644)

	roundTrip(t, from, over)

	for name, want := range map[string]bool{
		"gone": false, "opaque/old": false, "opaque/new": true, "kept/old": true, "kept/new": true, "nowdir/file": true,
	} {
		if _, err := os.Lstat(filepath.Join(over, name)); (err == nil) != want {
			t.Errorf("%s: there is %v, want %v", name, err == nil, want)
		}
	}
}

func TestOverlayLayersThatCannotBeCopiedAreRefused(t *testing.T) {
	from := t.TempDir()
	write(t, from+"/f", "", 0o644)
	must(t, unix.Setxattr(from+"/f", "trusted.overlay.metacopy", []byte(""), 0))
	err := layer.Write(context.Background(), &bytes.Buffer{}, from)
	if err == nil || !strings.Contains(err.Error(), "metacopy") {
		t.Fatalf("got %v", err)
	}
}

func TestHostileArchivesDoNotReachOutOfTheTree(t *testing.T) {
	for name, entries := range map[string][]tar.Header{
		"parent directory":        {{Typeflag: tar.TypeReg, Name: "../evil", Mode: 0o644}},
		"absolute name":           {{Typeflag: tar.TypeReg, Name: "/evil", Mode: 0o644}},
		"hard link outside":       {{Typeflag: tar.TypeLink, Name: "l", Linkname: "../outside"}},
		"through a symbolic link": {{Typeflag: tar.TypeSymlink, Name: "d", Linkname: "../"}, {Typeflag: tar.TypeReg, Name: "d/evil", Mode: 0o644}},
		"whiteout outside":        {{Typeflag: tar.TypeChar, Name: "../outside"}},
		"unknown type":            {{Typeflag: 'Z', Name: "z"}},
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			write(t, top+"/outside", "untouched", 0o644)
			must(t, os.Mkdir(top+"/tree", 0o755))
			var buf bytes.Buffer
			w := tar.NewWriter(&buf)
			for _, h := range entries {
				must(t, w.WriteHeader(&h))
			}
			must(t, w.Close())
			if err := layer.Apply(context.Background(), &buf, top+"/tree"); err == nil {
				t.Error("it was accepted")
			}
			if _, err := os.Lstat(top + "/evil"); err == nil {
				t.Error("a file was made outside of the tree")
			}
			if b, _ := os.ReadFile(top + "/outside"); string(b) != "untouched" || stat(t, top+"/outside").Nlink != 1 {
				t.Error("a file outside of the tree was changed")
			}
		})
	}
}

func FuzzApply(f *testing.F) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755})
	w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "d/f", Mode: 0o644})
	w.Close()
	f.Add(buf.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		top := t.TempDir()
		os.Mkdir(top+"/tree", 0o755)
		layer.Apply(context.Background(), bytes.NewReader(data), top+"/tree")
		entries, err := os.ReadDir(top)
		if err != nil || len(entries) != 1 {
			t.Fatalf("something was made beside the tree: %v %v", entries, err)
		}
	})
}

func TestWritingStopsInTheMiddleOfALargeFileWhenItsContextEnds(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/large", strings.Repeat("x", 4<<20), 0o600)
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	var taken int
	slow := writerFunc(func(p []byte) (int, error) {
		if taken += len(p); taken > 1<<20 {
			cancel(why)
		}
		return len(p), nil
	})
	if err := layer.Write(ctx, slow, dir); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	if taken > 3<<20 {
		t.Errorf("it wrote %d bytes all the same", taken)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
