package checkpoint_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"podstasis.dev/stasis/internal/checkpoint"
)

// large makes a checkpoint whose pages are of five blocks, the last of them short.
func large(t *testing.T) (dir string, m *checkpoint.Manifest, pages []byte) {
	t.Helper()
	dir = t.TempDir()
	for i := range 4*checkpoint.BlockSize + 4096 {
		pages = append(pages, byte(i>>12), byte(i))
	}
	pages = pages[:4*checkpoint.BlockSize+4096]
	write(t, dir+"/containers/a/criu/pages-1.img", string(pages))
	write(t, dir+"/containers/a/rootfs.tar", strings.Repeat("x", checkpoint.BlockSize))
	write(t, dir+"/volumes/v.tar", strings.Repeat("y", checkpoint.BlockSize+1))
	m = &checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "a"}}}
	if _, err := checkpoint.Seal(context.Background(), dir, m); err != nil {
		t.Fatal(err)
	}
	return dir, m, pages
}

func TestABlockIsCheckedWithoutTheRestOfItsFile(t *testing.T) {
	dir, m, pages := large(t)
	if _, err := checkpoint.Verify(context.Background(), dir, ""); err != nil {
		t.Fatal(err)
	}
	blocks, err := checkpoint.ReadBlocks(dir, m)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := blocks.Of("containers/a/rootfs.tar"); ok {
		t.Error("a file of one block has a list")
	}
	if v, ok := blocks.Of("volumes/v.tar"); !ok || v.Count() != 2 || v.Check(1, []byte("y")) != nil {
		t.Errorf("a file of a block and a byte: %v", v)
	}
	f, ok := blocks.Of("containers/a/criu/pages-1.img")
	if !ok || f.Count() != 5 {
		t.Fatalf("got %d blocks", f.Count())
	}
	for i := range f.Count() {
		offset, size := f.Range(i)
		data := bytes.Clone(pages[offset:][:size])
		if err := f.Check(i, data); err != nil {
			t.Error(err)
		}
		data[size-1] ^= 1
		if err := f.Check(i, data); !errors.Is(err, checkpoint.ErrCorrupt) || !strings.Contains(err.Error(), "pages-1.img") {
			t.Errorf("block %d with a bit flipped: %v", i, err)
		}
	}
	if f.Check(4, pages[4*checkpoint.BlockSize:][:4095]) == nil || f.Check(5, nil) == nil || f.Check(-1, nil) == nil || f.Check(1, pages[:checkpoint.BlockSize]) == nil {
		t.Error("what is no block, or another one, passes")
	}
}

func TestASecondSealWritesTheSameList(t *testing.T) {
	dir, m, _ := large(t)
	if err := os.Remove(dir + "/" + checkpoint.ManifestName); err != nil {
		t.Fatal(err)
	}
	again := &checkpoint.Manifest{Containers: m.Containers}
	if _, err := checkpoint.Seal(context.Background(), dir, again); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(again.Files, m.Files) || m.Files[2].Path != checkpoint.BlocksName {
		t.Errorf("got %v after %v", again.Files, m.Files)
	}
}

func TestAListThatIsNotTheManifestsIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(dir string, m *checkpoint.Manifest) error
		want   error
	}{
		"altered": {func(dir string, m *checkpoint.Manifest) error {
			data, err := os.ReadFile(dir + "/" + checkpoint.BlocksName)
			data[7] ^= 1
			return errors.Join(err, os.WriteFile(dir+"/"+checkpoint.BlocksName, data, 0o600))
		}, checkpoint.ErrCorrupt},
		"shorter": {func(dir string, m *checkpoint.Manifest) error { return os.Truncate(dir+"/"+checkpoint.BlocksName, 32) }, checkpoint.ErrCorrupt},
		"huge": {func(dir string, m *checkpoint.Manifest) error {
			return os.Truncate(dir+"/"+checkpoint.BlocksName, 1<<40)
		}, checkpoint.ErrCorrupt},
		"gone": {func(dir string, m *checkpoint.Manifest) error { return os.Remove(dir + "/" + checkpoint.BlocksName) }, checkpoint.ErrMissing},
		"of a size that its files do not have": {func(dir string, m *checkpoint.Manifest) error {
			m.Files[2].Size++
			return nil
		}, checkpoint.ErrCorrupt},
		"of files larger than can be": {func(dir string, m *checkpoint.Manifest) error {
			m.Files[0].Size = 1 << 50
			return nil
		}, checkpoint.ErrNoBlocks},
		"not listed": {func(dir string, m *checkpoint.Manifest) error {
			m.Files = slices.Delete(m.Files, 2, 3)
			return nil
		}, checkpoint.ErrNoBlocks},
	} {
		t.Run(name, func(t *testing.T) {
			dir, m, _ := large(t)
			if err := c.change(dir, m); err != nil {
				t.Fatal(err)
			}
			if _, err := checkpoint.ReadBlocks(dir, m); !errors.Is(err, c.want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestACheckpointWithoutLargeFilesHasNoList(t *testing.T) {
	dir, _ := sealed(t)
	m, _, err := checkpoint.ReadManifest(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := checkpoint.ReadBlocks(dir, m); !errors.Is(err, checkpoint.ErrNoBlocks) {
		t.Errorf("got %v", err)
	}
}
