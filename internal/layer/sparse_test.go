package layer_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/layer"
)

// sparse makes a file of a size with data at some offsets.
func sparse(t *testing.T, name string, size int64, data map[int64]string) {
	t.Helper()
	f, err := os.Create(name)
	must(t, err)
	defer f.Close()
	for at, text := range data {
		_, err := f.WriteAt([]byte(text), at)
		must(t, err)
	}
	must(t, f.Truncate(size))
}

func TestFilesWithHolesAreSmallInTheArchiveAndKeepTheirHoles(t *testing.T) {
	const unit = 64 << 20
	from := t.TempDir()
	for name, file := range map[string]struct {
		size int64
		data map[int64]string
	}{
		"nothing-but-a-hole":  {unit, nil},
		"data-at-the-end":     {unit, map[int64]string{unit - 3: "end"}},
		"data-at-the-begin":   {unit, map[int64]string{0: "begin"}},
		"data-here-and-there": {5 * unit, map[int64]string{5: "first", unit + 1: "second", 3*unit - 2: "across a page", 4 * unit: strings.Repeat("x", 100_000)}},
	} {
		sparse(t, filepath.Join(from, name), file.size, file.data)
	}
	must(t, os.Chmod(from+"/data-at-the-end", 0o4751))
	must(t, os.Chown(from+"/data-at-the-begin", 1234, 1<<30))
	must(t, unix.Setxattr(from+"/data-at-the-begin", "user.colour", []byte("blue\x00green"), 0))
	must(t, os.Link(from+"/data-at-the-end", from+"/link"))
	stamp := time.Unix(1_600_000_000, 123456789)
	must(t, os.Chtimes(from+"/data-here-and-there", stamp, stamp))
	write(t, from+"/plain", "behind the others", 0o644)

	var buf bytes.Buffer
	must(t, layer.Write(context.Background(), &buf, from))
	if buf.Len() > 1<<20 {
		t.Errorf("the archive is of %d bytes", buf.Len())
	}
	data := buf.Bytes()
	over := t.TempDir()
	must(t, layer.Apply(context.Background(), bytes.NewReader(data), over))
	sameSparse(t, from, over)
	if st := stat(t, over+"/data-at-the-begin"); st.Uid != 1234 || st.Gid != 1<<30 {
		t.Errorf("it is of %d:%d", st.Uid, st.Gid)
	}
	if st := stat(t, over+"/data-here-and-there"); st.Mtim.Nano() != stamp.UnixNano() {
		t.Errorf("it was modified at %v", st.Mtim)
	}
	value := make([]byte, 64)
	if n, err := unix.Getxattr(over+"/data-at-the-begin", "user.colour", value); err != nil || string(value[:n]) != "blue\x00green" {
		t.Errorf("its attribute is %q, %v", value[:max(n, 0)], err)
	}
	if stat(t, over+"/link").Ino != stat(t, over+"/data-at-the-end").Ino {
		t.Error("its link is another file")
	}

	// The field's own reader agrees.
	archive, others := filepath.Join(t.TempDir(), "layer.tar"), t.TempDir()
	must(t, os.WriteFile(archive, data, 0o600))
	if out, err := exec.Command("tar", "-xpf", archive, "-C", others, "--sparse").CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	sameSparse(t, from, others)
}

// sameSparse compares the files of two directories, and how much room they take.
func sameSparse(t *testing.T, from, over string) {
	t.Helper()
	entries, err := os.ReadDir(from)
	must(t, err)
	for _, e := range entries {
		was, is := stat(t, filepath.Join(from, e.Name())), stat(t, filepath.Join(over, e.Name()))
		if was.Size != is.Size || was.Mode != is.Mode {
			t.Errorf("%s: size %d, mode %o; was %d, %o", e.Name(), is.Size, is.Mode, was.Size, was.Mode)
		}
		if is.Blocks > was.Blocks+64 {
			t.Errorf("%s takes up %d blocks, it took %d", e.Name(), is.Blocks, was.Blocks)
		}
		if out, err := exec.Command("cmp", filepath.Join(from, e.Name()), filepath.Join(over, e.Name())).CombinedOutput(); err != nil {
			t.Errorf("%s differs: %s", e.Name(), out)
		}
	}
	for at, want := range map[int64]string{5: "first", 64<<20 + 1: "second", 3*64<<20 - 2: "across a page"} {
		f, err := os.Open(filepath.Join(over, "data-here-and-there"))
		must(t, err)
		got := make([]byte, len(want))
		_, err = f.ReadAt(got, at)
		must(t, errors.Join(err, f.Close()))
		if string(got) != want {
			t.Errorf("at %d it holds %q, want %q", at, got, want)
		}
	}
}

func TestAHostileFileWithHolesCannotClaimMoreThanIsAllowed(t *testing.T) {
	dir := t.TempDir()
	sparse(t, dir+"/claim", layer.MaxSparse+1, nil)
	if err := layer.Write(context.Background(), &bytes.Buffer{}, dir); !errors.Is(err, layer.ErrTooSparse) {
		t.Errorf("it was written: %v", err)
	}
	// The same in an archive: one that is allowed, with a larger size put into it.
	must(t, os.Truncate(dir+"/claim", layer.MaxSparse))
	var buf bytes.Buffer
	must(t, layer.Write(context.Background(), &buf, dir))
	size, more := fmt.Sprint(int64(layer.MaxSparse)), fmt.Sprint(int64(layer.MaxSparse)*9)
	if len(size) != len(more) {
		t.Fatalf("%s and %s are of another length", size, more)
	}
	hostile := bytes.ReplaceAll(buf.Bytes(), []byte("realsize="+size), []byte("realsize="+more))
	hostile = bytes.ReplaceAll(hostile, []byte("\n"+size+"\n"), []byte("\n"+more+"\n"))
	if err := layer.Apply(context.Background(), bytes.NewReader(hostile), t.TempDir()); !errors.Is(err, layer.ErrTooSparse) {
		t.Errorf("it was laid: %v", err)
	}
}

func TestLayingAFileOfManyHolesStopsWhenItsContextEnds(t *testing.T) {
	dir := t.TempDir()
	sparse(t, dir+"/claim", layer.MaxSparse, map[int64]string{layer.MaxSparse - 1: "x"})
	var buf bytes.Buffer
	must(t, layer.Write(context.Background(), &buf, dir))
	why := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, why)
	defer cancel()
	if err := layer.Apply(ctx, &buf, t.TempDir()); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

func TestMapsOfHolesThatLieAreRefused(t *testing.T) {
	entry := func(size int64, content string, records map[string]string) []byte {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "f", Mode: 0o644, Size: size, Format: tar.FormatPAX, PAXRecords: records}))
		_, err := w.Write([]byte(content))
		must(t, err)
		must(t, w.Close())
		return buf.Bytes()
	}
	// tar.Writer does not write such records: those of another name become them.
	records := map[string]string{"XXX.sparse.major": "1", "XXX.sparse.minor": "0", "XXX.sparse.name": "f", "XXX.sparse.realsize": "100000"}
	for name, where := range map[string]string{
		"past the end":      "1\n99999\n10\n",
		"one on the other":  "2\n0\n10\n5\n10\n",
		"more than it says": "9\n0\n10\n",
		"negative":          "1\n-5\n10\n",
		"no number":         "many\n",
	} {
		t.Run(name, func(t *testing.T) {
			content := where + strings.Repeat("\x00", 512-len(where)) + strings.Repeat("d", 20)
			data := bytes.ReplaceAll(entry(int64(len(content)), content, records), []byte("XXX.sparse"), []byte("GNU.sparse"))
			if err := layer.Apply(context.Background(), bytes.NewReader(data), t.TempDir()); err == nil {
				t.Error("it was laid")
			}
		})
	}
}
