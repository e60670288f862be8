package store

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
	"podstasis.dev/stasis/internal/store/backend/open"
)

// The processes that kills_test.go kills: the test's own program, started again.
const victimVariable = "STASIS_STORE_VICTIM"

func TestMain(m *testing.M) {
	if text := os.Getenv(victimVariable); text != "" {
		os.Exit(beVictim(text))
	}
	os.Exit(m.Run())
}

// victim says what a process does until it is killed.
type victim struct {
	Role  string // writer, collector, reader
	Store open.Config
	Keys  []store.Key
	// Ahead is how far its clock is ahead of the machine's.
	Ahead time.Duration
	Seed  uint64
	// Dir is its own, and what is in it stays for the next of that role.
	Dir string
	// Delete are deleted by a collector at first. A reader is not to miss these.
	Delete []store.ID
}

// beVictim tells on its standard output what it did, a line for each deed, after it. It
// ends only when something is wrong.
func beVictim(text string) int {
	var v victim
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		fmt.Println("failed", err)
		return 1
	}
	fmt.Println("ready")
	s, done, err := v.open(context.Background())
	if err == nil {
		defer done()
		r := rand.New(rand.NewPCG(v.Seed, 1))
		for err == nil {
			switch v.Role {
			case "writer":
				err = v.write(s, r)
			case "collector":
				err = v.collect(s, r)
			case "reader":
				err = v.read(s, r)
			}
		}
	}
	fmt.Println("failed", err)
	return 1
}

func (v *victim) open(ctx context.Context) (*store.Store, func() error, error) {
	b, err := open.Open(ctx, v.Store)
	if err != nil {
		return nil, nil, err
	}
	s, err := store.Open(ctx, retrying(b), v.Keys, store.WithClock(func() time.Time { return time.Now().Add(v.Ahead) }))
	if err != nil {
		return nil, nil, errors.Join(err, b.Close())
	}
	return s, b.Close, nil
}

// pending is what a writer has to finish, also in its next life.
type pending struct {
	Seed uint64 // of what is written
}

// write stores one checkpoint: what an earlier life began, or another.
func (v *victim) write(s *store.Store, r *rand.Rand) error {
	note := filepath.Join(v.Dir, "pending.json")
	var p pending
	data, err := os.ReadFile(note)
	again := err == nil
	if again {
		if err := json.Unmarshal(data, &p); err != nil {
			return fmt.Errorf("%s: %w", note, err)
		}
	} else {
		p.Seed = r.Uint64() >> 1
		if data, err = json.Marshal(p); err != nil {
			return err
		}
		if err := errors.Join(os.WriteFile(note+".new", data, 0o600), os.RemoveAll(v.journal()), os.Rename(note+".new", note)); err != nil {
			return err
		}
	}
	dir, alike := content(p.Seed)
	c, err := s.Put(context.Background(), dir, store.PutOptions{Alike: alike, Journal: journal(v.journal()), Labels: map[string]string{"seed": fmt.Sprint(p.Seed)}})
	if err != nil {
		return fmt.Errorf("write a checkpoint: %w", err)
	}
	fmt.Println("complete", c.ID, p.Seed, again)
	return os.Remove(note)
}

func (v *victim) journal() string { return filepath.Join(v.Dir, "journal") }

// journal is a store.Journal in a file, a line for each entry. A last line that a kill cut
// off is no entry.
type journal string

type journalLine struct {
	Pack *store.Pack `json:"pack,omitempty"`
	Root *store.ID   `json:"root,omitempty"`
}

var journals sync.Mutex

func (j journal) Read() (packs []store.Pack, root *store.ID, err error) {
	data, err := os.ReadFile(string(j))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	for line := range bytes.Lines(data) {
		var l journalLine
		if json.Unmarshal(line, &l) != nil {
			break
		}
		if l.Pack != nil {
			packs = append(packs, *l.Pack)
		}
		if l.Root != nil {
			root = l.Root
		}
	}
	return packs, root, err
}

func (j journal) add(l journalLine) error {
	journals.Lock()
	defer journals.Unlock()
	data, err := json.Marshal(l)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(string(j), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	return errors.Join(err, f.Close())
}

func (j journal) AddPack(p store.Pack) error { return j.add(journalLine{Pack: &p}) }
func (j journal) SetRoot(id store.ID) error  { return j.add(journalLine{Root: &id}) }

func (v *victim) collect(s *store.Store, r *rand.Rand) error {
	for _, id := range v.Delete {
		if err := s.Delete(context.Background(), id); err != nil {
			return fmt.Errorf("delete a checkpoint: %w", err)
		}
		fmt.Println("deleted", id)
	}
	v.Delete = nil
	c, err := s.Collect(context.Background(), store.CollectOptions{Pause: time.Duration(r.IntN(3)) * time.Millisecond})
	if err != nil {
		return fmt.Errorf("collect: %w", err)
	}
	fmt.Println("collected", c.Condemned, c.Removed)
	return nil
}

// read fetches one of the checkpoints that are there, and compares it.
func (v *victim) read(s *store.Store, r *rand.Rand) error {
	ctx := context.Background()
	all, err := s.List(ctx)
	if err != nil {
		return fmt.Errorf("list checkpoints: %w", err)
	}
	if len(all) == 0 {
		time.Sleep(time.Millisecond)
		return nil
	}
	c := all[r.IntN(len(all))]
	if err := fetch(ctx, s, c.ID, c.Labels["seed"], filepath.Join(v.Dir, "fetched")); err != nil && !slices.Contains(v.Delete, c.ID) {
		return fmt.Errorf("fetch checkpoint %s: %w", c.ID, err)
	}
	fmt.Println("fetched", c.ID)
	return nil
}

// fetch gets a checkpoint's files, and compares each with what was written.
func fetch(ctx context.Context, s *store.Store, id store.ID, seed, into string) error {
	if err := errors.Join(os.RemoveAll(into), os.Mkdir(into, 0o700)); err != nil {
		return err
	}
	if err := s.Get(ctx, id, into, nil); err != nil {
		return err
	}
	var number uint64
	if _, err := fmt.Sscan(seed, &number); err != nil {
		return fmt.Errorf("its label seed is %q: %w", seed, err)
	}
	want, _ := content(number)
	for name, f := range want {
		got, err := os.ReadFile(filepath.Join(into, name))
		if err != nil {
			return err
		}
		if sha256.Sum256(got) != sha256.Sum256(f.Data) {
			return fmt.Errorf("%s is another file than was written, of %d bytes instead of %d", name, len(got), len(f.Data))
		}
	}
	found := 0
	err := filepath.WalkDir(into, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			found++
		}
		return err
	})
	if err == nil && found != len(want) {
		err = fmt.Errorf("%d files came, and %d were written", found, len(want))
	}
	return err
}

// content is a checkpoint that follows from a number: one of three applications, whose
// checkpoints have most in common, and one in twenty of two packs.
func content(seed uint64) (fstest.MapFS, []string) {
	app := seed % 3
	r := rand.New(rand.NewPCG(seed, 2))
	size := 512 << 10
	if seed/3%20 == 0 {
		size = 20 << 20
	}
	memory := bytes.Clone(backendtest.Noise(app+1, size))
	for range 8 {
		page := r.IntN(size / 4096)
		copy(memory[page*4096:], backendtest.Noise(r.Uint64(), 4096))
	}
	var text bytes.Buffer
	for line := range 4000 {
		fmt.Fprintf(&text, "line %d of application %d\n", line, app)
		if r.IntN(800) == 0 {
			fmt.Fprintf(&text, "and what only checkpoint %d has\n", seed)
		}
	}
	dir := fstest.MapFS{
		"containers/a/criu/pages-1.img": {Data: memory, Mode: 0o600},
		"containers/a/rootfs.tar":       {Data: text.Bytes(), Mode: 0o600},
		"containers/a/empty":            {Mode: 0o600},
	}
	digests := map[string]string{}
	for name, f := range dir {
		digests[name] = fmt.Sprintf("%x", sha256.Sum256(f.Data))
	}
	manifest, err := json.Marshal(digests)
	if err != nil {
		panic(err) // of a map of strings
	}
	dir["manifest.json"] = &fstest.MapFile{Data: manifest, Mode: 0o600}
	return dir, []string{fmt.Sprint("application ", app), "all"}
}
