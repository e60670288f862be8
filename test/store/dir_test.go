package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
	"podstasis.dev/stasis/internal/store/backend/open"
)

func TestAFullFileSystemIsNamedAndNothingOfTheObjectStays(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("tmpfs", mount, "tmpfs", 0, "size=4m,mode=0700"); err != nil {
		t.Fatalf("mount: %v (this test runs as root)", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(mount, "store")
	b := retrying(openStore(t, open.Config{Kind: open.Directory, Path: path}))
	if err := b.Put(t.Context(), "packs/a", backendtest.Noise(1, 1<<20), nil); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		err := b.Put(t.Context(), fmt.Sprintf("packs/large-%d", i), backendtest.Noise(2, 8<<20), nil)
		if !errors.Is(err, backend.ErrFull) || !strings.Contains(err.Error(), path) {
			t.Errorf("put more than there is room for: %v, want ErrFull and where", err)
		}
	}
	// What did not fit is gone, or this had no room.
	if err := b.Put(t.Context(), "packs/b", backendtest.Noise(3, 2<<20), nil); err != nil {
		t.Error(err)
	}
	for o, err := range b.List(t.Context(), "") {
		if err != nil || o.Name != "packs/a" && o.Name != "packs/b" {
			t.Errorf("listed: %v, %v", o, err)
		}
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Join(path, ".parts")); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
