package published

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// volume makes a volume as the kubelet does.
func volume(t *testing.T, plugin, directory string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), plugin, "v")
	if err := os.MkdirAll(filepath.Join(dir, directory), 0o755); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{"..data": directory, "script": "..data/script"} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, directory, "script"), []byte(directory), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

const (
	before = "..2026_11_26_22_21_54.4244946247"
	now    = "..2026_11_26_23_01_02.17"
	later  = "..2026_11_27_01_01_01.3"
)

func TestFilesAreFoundByTheNameThatTheSourceKnewThemBy(t *testing.T) {
	source := volume(t, "kubernetes.io~configmap", before)
	directory, err := Directory(source)
	if err != nil || directory != before {
		t.Fatalf("the source's directory is %q, %v", directory, err)
	}
	restored := volume(t, "kubernetes.io~configmap", now)
	for range 2 { // a restore that failed is tried again
		if err := Link(restored, directory); err != nil {
			t.Fatal(err)
		}
	}
	if content, err := os.ReadFile(filepath.Join(restored, before, "script")); err != nil || string(content) != now {
		t.Errorf("found %q, %v", content, err)
	}
	// The kubelet writes the files anew.
	if err := os.Rename(filepath.Join(restored, now), filepath.Join(restored, later)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(later, filepath.Join(restored, "..data_tmp")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(restored, "..data_tmp"), filepath.Join(restored, "..data")); err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(filepath.Join(restored, before, "script")); err != nil || string(content) != now {
		t.Errorf("after an update found %q, %v", content, err)
	}
}

// An engine that opens a directory again does not follow a link in its place.
func TestFilesAreFoundInADirectoryOfTheNameThatTheSourceKnew(t *testing.T) {
	restored := volume(t, "kubernetes.io~configmap", now)
	if err := os.MkdirAll(filepath.Join(restored, now, "deep"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(restored, now, "deep", "file"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(restored, before+".stasis"), 0o700); err != nil { // of one that was killed
		t.Fatal(err)
	}
	for range 2 {
		if err := Copy(restored, before); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"script", "deep/file"} {
		source, err := os.Stat(filepath.Join(restored, now, path))
		if err != nil {
			t.Fatal(err)
		}
		if here, err := os.Lstat(filepath.Join(restored, before, path)); err != nil || !os.SameFile(source, here) {
			t.Errorf("%s: %v, %v", path, here, err)
		}
	}
	for _, dir := range []string{"", "deep"} {
		if info, err := os.Lstat(filepath.Join(restored, before, dir)); err != nil || !info.IsDir() {
			t.Errorf("%q: %v, %v", dir, info, err)
		}
	}
	if entries, err := os.ReadDir(restored); err != nil || len(entries) != 4 {
		t.Errorf("the volume has %v, %v", entries, err)
	}
	if all, err := Directories(restored); err != nil || !slices.Equal(all, []string{now, before}) {
		t.Errorf("a checkpoint of it notes %q, %v", all, err)
	}
	if err := Copy(restored, now); err != nil { // the same moment: it is the kubelet's own
		t.Error(err)
	}
	if err := Copy(volume(t, "kubernetes.io~empty-dir", before), now); err == nil {
		t.Error("a directory was made in an emptyDir")
	}
}

func TestOtherVolumesAreLeftAlone(t *testing.T) {
	empty := volume(t, "kubernetes.io~empty-dir", before)
	if directory, err := Directory(empty); err != nil || directory != "" {
		t.Errorf("an emptyDir has the directory %q, %v", directory, err)
	}
	if err := Link(empty, now); err == nil {
		t.Error("a link was made in an emptyDir")
	}
	if directory, err := Directory(filepath.Join(t.TempDir(), "kubernetes.io~secret/v")); err != nil || directory != "" {
		t.Errorf("a volume with nothing in it has the directory %q, %v", directory, err)
	}
}

func TestANameThatIsNotTheKubeletsIsRefused(t *testing.T) {
	restored := volume(t, "kubernetes.io~secret", now)
	for _, name := range []string{"", "..", "..data", "script", "/etc", "../x", before + "/x", "x" + before, before + "\n"} {
		if err := Link(restored, name); err == nil {
			t.Errorf("%q was taken", name)
		}
	}
	if _, err := Directory(volume(t, "kubernetes.io~secret", "elsewhere")); err == nil {
		t.Error("a link that leads elsewhere was believed")
	}
}
