package dir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
)

// TestMain is also the program of a writer that is killed.
func TestMain(m *testing.M) {
	if path := os.Getenv("STASIS_TEST_WRITER"); path != "" {
		write(path)
	}
	os.Exit(m.Run())
}

func open(t *testing.T, path string) backend.Backend {
	t.Helper()
	b, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func TestADirectoryIsABackend(t *testing.T) {
	backendtest.Run(t, func(t *testing.T) backend.Backend { return open(t, filepath.Join(t.TempDir(), "store")) })
}

func TestOnlyTheOwnerGetsIn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	b := open(t, path)
	for _, name := range []string{"store.json", "packs/a"} {
		if err := b.Put(t.Context(), name, []byte("secret"), nil); err != nil {
			t.Fatal(err)
		}
	}
	seen := 0
	err := filepath.WalkDir(path, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if entry.IsDir() {
			want = fs.ModeDir | 0o700
		}
		if info.Mode() != want {
			t.Errorf("%s: %v, want %v", file, info.Mode(), want)
		}
		seen++
		return nil
	})
	if err != nil || seen != 5 { // the store, .parts, packs, and two objects
		t.Errorf("%d files and directories, %v", seen, err)
	}
}

func TestNoSymbolicLinkIsFollowed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	b := open(t, path)
	outside := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(outside, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.Put(t.Context(), "packs/a", []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"packs/out": outside, "packs/in": "a", "packs/none": "nowhere", "indexes": "packs", "other": filepath.Dir(outside)} {
		if err := os.Symlink(to, filepath.Join(path, link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"packs/out", "packs/in", "packs/none", "indexes/a", "other/secret", "indexes"} {
		data, err := b.Read(t.Context(), name, 0, -1)
		if err == nil || backend.Final(err) {
			t.Errorf("read %s: %q and the error %v, want one that says what is wrong", name, data, err)
		}
	}
	for _, name := range []string{"indexes/b", "other/b"} {
		if err := b.Put(t.Context(), name, []byte("x"), nil); err == nil {
			t.Errorf("put %s: went through a symbolic link", name)
		}
		if err := b.Delete(t.Context(), name[:len(name)-1]+"a"); err == nil {
			t.Errorf("delete in %s: went through a symbolic link", filepath.Dir(name))
		}
	}
	var all []string
	for o, err := range b.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, o.Name)
	}
	if fmt.Sprint(all) != "[packs/a]" {
		t.Errorf("listed: %v", all)
	}
	if err := b.Put(t.Context(), "packs/out", []byte("mine"), nil); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(outside); err != nil || string(data) != "secret" {
		t.Errorf("what a replaced link led to: %q, %v", data, err)
	}
	if err := os.Symlink(path, path+".link"); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path + ".link"); !errors.Is(err, backend.ErrNoStore) {
		t.Errorf("a store that is a symbolic link: %v", err)
	}
}

func TestWhatKilledWritersLeftIsRemovedAndWhatOthersWriteIsNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	open(t, path)
	old, young := filepath.Join(path, partsDir, "old"), filepath.Join(path, partsDir, "young")
	for _, file := range []string{old, young} {
		if err := os.WriteFile(file, []byte("half an obj"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	before := time.Now().Add(-partAge - time.Minute)
	if err := os.Chtimes(old, before, before); err != nil {
		t.Fatal(err)
	}
	b := open(t, path)
	left := func() string {
		entries, err := os.ReadDir(filepath.Join(path, partsDir))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, entry := range entries {
			names = append(names, entry.Name())
		}
		return strings.Join(names, " ")
	}
	if left() != "young" {
		t.Errorf("left after a start: %q", left())
	}
	if err := os.Chtimes(young, before, before); err != nil {
		t.Fatal(err)
	}
	b.(*directory).swept = before // a process that runs for long
	if err := b.Put(t.Context(), "packs/a", nil, nil); err != nil {
		t.Fatal(err)
	}
	if left() != "" {
		t.Errorf("left after an hour: %q", left())
	}
}

func TestAStoreThatIsTakenAwayIsNotAnEmptyOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	b := open(t, path)
	if err := b.Put(t.Context(), "packs/a", nil, nil); err != nil {
		t.Fatal(err)
	}
	check := func(how string) {
		t.Helper()
		_, readErr := b.Read(t.Context(), "packs/b", 0, -1)
		_, topErr := b.Read(t.Context(), "b", 0, -1)
		var listErr, groupErr error
		for _, listErr = range b.List(t.Context(), "") {
		}
		for _, groupErr = range b.List(t.Context(), "packs/") {
		}
		for call, err := range map[string]error{"read": readErr, "read at the top": topErr, "list": listErr, "list a group": groupErr, "delete": b.Delete(t.Context(), "packs/b"), "put": b.Put(t.Context(), "packs/b", nil, nil)} {
			if !errors.Is(err, backend.ErrNoStore) {
				t.Errorf("%s: %s: %v, want ErrNoStore", how, call, err)
			}
		}
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	check("removed")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	check("another in its place")
	if _, err := Open(filepath.Join(path, "not", "mounted")); !errors.Is(err, backend.ErrNoStore) {
		t.Errorf("a store whose parent is missing: %v", err)
	}
}

// kills is how many writers are killed.
const kills = 25

func TestAWriterThatIsKilledLeavesWholeObjects(t *testing.T) {
	path := filepath.Join(t.TempDir(), "store")
	b := open(t, path)
	for round := range kills {
		writer := exec.Command(os.Args[0], "-test.run=^$")
		writer.Env = append(os.Environ(), "STASIS_TEST_WRITER="+path)
		answers, err := writer.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := writer.Start(); err != nil {
			t.Fatal(err)
		}
		begun := make([]byte, 1)
		if _, err := answers.Read(begun); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Duration(round) * time.Millisecond)
		writer.Process.Kill()
		writer.Wait()
	}
	whole := 0
	for o, err := range b.List(t.Context(), "packs/") {
		if err != nil {
			t.Fatal(err)
		}
		data, err := b.Read(t.Context(), o.Name, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		if want := content(data); !bytes.Equal(data, want) {
			t.Errorf("%s has %d bytes, not those of one writer", o.Name, len(data))
		}
		whole++
	}
	if whole == 0 {
		t.Error("nothing was written before the writers were killed")
	}
}

// write writes objects, over and over, until it is killed.
func write(path string) {
	b, err := Open(path)
	if err != nil {
		panic(err)
	}
	for i := 0; ; i++ {
		data := fmt.Appendf(nil, "%020d", os.Getpid()*1000+i)
		if err := b.Put(context.Background(), "packs/"+strconv.Itoa(i%7), content(data), nil); err != nil {
			panic(err)
		}
		if i == 0 {
			fmt.Println("begun")
		}
	}
}

// content is what a writer writes that began with these 20 bytes.
func content(data []byte) []byte {
	return bytes.Repeat(data[:min(len(data), 20)], 100_000)
}
