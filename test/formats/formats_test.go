// Package formats reads checkpoints that earlier versions of Stasis have written.
//
// testdata has a directory for each version of the format, which stays as it was written:
// a checkpoint of two containers as a directory, as an archive, and in a store, without
// and with a key. Whoever changes a format gives it a new number, adds a directory, and
// still reads the ones that are there:
//
//	go test ./test/formats -write
package formats

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents"
	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend/dir"
)

var write = flag.Bool("write", false, "write testdata of this version's formats, where there is none")

// specimen is a real checkpoint.
const specimen = "../../internal/contents/testdata/specimen.zip"

// key is that of the encrypted store.
var key = store.Key{Name: "fixture", Key: bytes.Repeat([]byte{7}, 32)}

// written is what is known of a version's checkpoint.
type written struct {
	ManifestDigest string `json:"manifestDigest"`
	Processes      []int  `json:"processes"` // of each container
	Object         string `json:"object"`
	StoredBytes    int64  `json:"storedBytes"` // that a store grew by
}

// Files of a version's directory.
const (
	description    = "written.json"
	directoryFile  = "checkpoint.zip"
	archiveFile    = "archive.zip" // holds archive.tar
	storeFile      = "store.zip"
	encryptedFile  = "store-encrypted.zip"
	archiveContent = "archive.tar"
)

func TestCheckpointsOfEveryFormatAreReadAsTheyWereWritten(t *testing.T) {
	current := filepath.Join("testdata", strconv.Itoa(checkpoint.FormatVersion))
	if _, err := os.Stat(current); err != nil && *write {
		create(t, current)
	} else if err != nil {
		t.Fatalf("what this version writes is not kept for later ones: run go test ./test/formats -write: %v", err)
	}
	versions, err := os.ReadDir("testdata")
	must(t, err)
	for _, version := range versions {
		t.Run(version.Name(), func(t *testing.T) { read(t, filepath.Join("testdata", version.Name())) })
	}
}

func read(t *testing.T, from string) {
	text, err := os.ReadFile(filepath.Join(from, description))
	must(t, err)
	var want written
	must(t, json.Unmarshal(text, &want))
	whole := func(t *testing.T, directory string) {
		t.Helper()
		m, err := checkpoint.Verify(t.Context(), directory, want.ManifestDigest)
		must(t, err)
		if got := processes(t, directory, m); fmt.Sprint(got) != fmt.Sprint(want.Processes) {
			t.Errorf("its containers have %v processes, and had %v", got, want.Processes)
		}
	}
	t.Run("as a directory", func(t *testing.T) {
		directory := t.TempDir()
		unzip(t, filepath.Join(from, directoryFile), directory)
		whole(t, directory)
	})
	t.Run("as an archive", func(t *testing.T) {
		packed, directory := t.TempDir(), t.TempDir()
		unzip(t, filepath.Join(from, archiveFile), packed)
		f, err := os.Open(filepath.Join(packed, archiveContent))
		must(t, err)
		defer f.Close()
		root, err := os.OpenRoot(directory)
		must(t, err)
		defer root.Close()
		unpacked, err := archive.Unpack(t.Context(), f, root, archive.Limits{})
		must(t, err)
		if unpacked.ManifestDigest != want.ManifestDigest || string(unpacked.Object) != want.Object {
			t.Errorf("it holds %s of %s", unpacked.ManifestDigest, unpacked.Object)
		}
		whole(t, directory)
	})
	for name, file := range map[string]string{"in a store": storeFile, "in an encrypted store": encryptedFile} {
		var keys []store.Key
		if file == encryptedFile {
			keys = []store.Key{key}
		}
		t.Run(name, func(t *testing.T) {
			objects, directory := t.TempDir(), t.TempDir()
			unzip(t, filepath.Join(from, file), objects)
			b, err := dir.Open(objects)
			must(t, err)
			s, err := store.Open(t.Context(), b, keys)
			must(t, err)
			found, err := s.Verify(t.Context(), nil, nil)
			must(t, err)
			if found.Checkpoints != 1 || len(found.Problems) > 0 {
				t.Errorf("verified: %+v", found)
			}
			ids, err := s.IDs(t.Context())
			must(t, err)
			must(t, s.Get(t.Context(), ids[0], directory, nil))
			whole(t, directory)
			// And it is written to: a newer version shares what an older one has stored.
			again, err := s.Put(t.Context(), os.DirFS(directory), store.PutOptions{ManifestDigest: want.ManifestDigest, Alike: []string{"specimen"}})
			must(t, err)
			if again.NewBytes > want.StoredBytes/2 {
				t.Errorf("the same checkpoint takes %d bytes once more, and %d at first", again.NewBytes, want.StoredBytes)
			}
		})
	}
}

// create writes the current version's directory.
func create(t *testing.T, to string) {
	must(t, os.MkdirAll(to, 0o755))
	directory := t.TempDir()
	unzip(t, specimen, directory)
	m, _, err := checkpoint.ReadManifest(directory)
	must(t, err)
	made := written{Object: `{"apiVersion":"checkpoint.podstasis.dev/v1alpha1","kind":"PodCheckpoint","metadata":{"name":"specimen","namespace":"default"}}`}
	must(t, os.Remove(filepath.Join(directory, checkpoint.ManifestName)))
	made.ManifestDigest, err = checkpoint.Seal(t.Context(), directory, m)
	must(t, err)
	made.Processes = processes(t, directory, m)
	compress(t, filepath.Join(to, directoryFile), directory)

	root, err := os.OpenRoot(directory)
	must(t, err)
	defer root.Close()
	a, err := archive.Open(root.FS(), m, []byte(made.Object))
	must(t, err)
	packed := t.TempDir()
	f, err := os.Create(filepath.Join(packed, archiveContent))
	must(t, err)
	_, err = io.Copy(f, io.NewSectionReader(a, 0, a.Size()))
	must(t, err)
	must(t, f.Close())
	compress(t, filepath.Join(to, archiveFile), packed)

	for file, keys := range map[string][]store.Key{storeFile: nil, encryptedFile: {key}} {
		var with *store.Key
		if len(keys) > 0 {
			with = &keys[0]
		}
		objects := t.TempDir()
		b, err := dir.Open(objects)
		must(t, err)
		must(t, store.Create(t.Context(), b, with))
		s, err := store.Open(t.Context(), b, keys)
		must(t, err)
		stored, err := s.Put(t.Context(), root.FS(), store.PutOptions{ManifestDigest: made.ManifestDigest, Alike: []string{"specimen"}})
		must(t, err)
		made.StoredBytes = stored.NewBytes
		compress(t, filepath.Join(to, file), objects)
	}
	text, err := json.MarshalIndent(made, "", "  ")
	must(t, err)
	must(t, os.WriteFile(filepath.Join(to, description), append(text, '\n'), 0o644))
}

// processes counts those of each container.
func processes(t *testing.T, directory string, m *checkpoint.Manifest) (counts []int) {
	t.Helper()
	c, err := contents.Read(t.Context(), os.DirFS(directory), m, contents.Options{})
	must(t, err)
	for i := range c.Containers {
		counts = append(counts, len(c.Containers[i].Processes))
	}
	return counts
}

func unzip(t *testing.T, file, into string) {
	t.Helper()
	z, err := zip.OpenReader(file)
	must(t, err)
	defer z.Close()
	must(t, os.CopyFS(into, z))
}

func compress(t *testing.T, file, directory string) {
	t.Helper()
	f, err := os.Create(file)
	must(t, err)
	z := zip.NewWriter(f)
	must(t, fs.WalkDir(os.DirFS(directory), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(filepath.Join(directory, name))
		if err != nil {
			return err
		}
		w, err := z.Create(name)
		if err == nil {
			_, err = w.Write(data)
		}
		return err
	}))
	must(t, z.Close())
	must(t, f.Close())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
