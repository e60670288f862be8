package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend/open"
	"podstasis.dev/stasis/test/store/servers"
)

// Rounds of writers, collectors and readers, each a process that is killed at a random
// moment (SIGKILL). What holds after each: a checkpoint that a writer reported complete
// and nobody deleted comes back exactly, what is there is whole, and once the leases of
// the dead have run out three collections leave nothing that no checkpoint uses.
//
//	make soak-store ROUNDS=500 SEED=7
func TestWhoeverIsKilledNoCheckpointIsLostAndNothingStaysForGood(t *testing.T) {
	rounds, seed := 40, uint64(1)
	if text := os.Getenv("STASIS_STORE_ROUNDS"); text != "" {
		var err, bad error
		rounds, err = strconv.Atoi(text)
		seed, bad = strconv.ParseUint(os.Getenv("STASIS_STORE_SEED"), 10, 64)
		if err := errors.Join(err, bad); err != nil {
			t.Fatalf("STASIS_STORE_ROUNDS and STASIS_STORE_SEED: %v", err)
		}
	}
	t.Run("directory", func(t *testing.T) {
		h := newHouse(t, seed, open.Config{Kind: open.Directory, Path: filepath.Join(t.TempDir(), "store")})
		h.run(t, rounds)
		// How much happens in a round depends on what else the machine does.
		for more := 0; h.lacks(rounds) != "" && more < 4*rounds; more += 8 {
			h.run(t, 8)
		}
		if lack := h.lacks(rounds); lack != "" {
			t.Error(lack)
		}
	})
	t.Run("s3", func(t *testing.T) {
		_, config := servers.S3(t, here)
		h := newHouse(t, seed, config)
		h.run(t, max(4, rounds/10))
	})
}

// house is a store and what is known of it.
type house struct {
	config open.Config
	keys   []store.Key
	r      *rand.Rand
	ahead  time.Duration
	dir    string
	// complete are the checkpoints that a writer reported, by what they were made of.
	complete map[store.ID]string
	doomed   []store.ID // those that somebody deletes, or began to
	counts   map[string]int
	rounds   int
}

func newHouse(t *testing.T, seed uint64, config open.Config) *house {
	t.Helper()
	h := &house{config: config, r: rand.New(rand.NewPCG(seed, 0)), dir: t.TempDir(), complete: map[store.ID]string{}, counts: map[string]int{}}
	var key *store.Key
	if seed%2 == 0 { // every other one is encrypted
		key = &store.Key{Name: "k", Key: bytes.Repeat([]byte{7}, 32)}
		h.keys = []store.Key{*key}
	}
	b := openStore(t, config)
	defer b.Close()
	if err := store.Create(t.Context(), b, key); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h *house) run(t *testing.T, rounds int) {
	begun := time.Now()
	for range rounds {
		h.rounds++
		h.round(t, h.rounds)
		h.judge(t)
		if t.Failed() {
			t.Fatalf("round %d: %v", h.rounds, h.counts)
		}
	}
	t.Logf("%d rounds more in %v: %v", rounds, time.Since(begun).Round(time.Second), h.counts)
}

// lacks says what has to happen in so many rounds and did not yet; empty: nothing. Without
// it what is looked for could not have happened.
func (h *house) lacks(rounds int) string {
	if rounds < 40 {
		return ""
	}
	for what, least := range map[string]int{
		"complete": rounds / 4, "complete again": rounds / 10, "deleted": rounds / 8, "fetched": rounds / 4, "removed": rounds / 8,
		"leases of the dead": rounds / 4, "marks of the dead": 1, "files of the dead": rounds / 10,
	} {
		if h.counts[what] < least {
			return fmt.Sprintf("in %d rounds there were only %d of: %s; all were %v", h.rounds, h.counts[what], what, h.counts)
		}
	}
	return ""
}

// round starts everybody and waits until all have been killed.
func (h *house) round(t *testing.T, round int) {
	t.Helper()
	// Between rounds the leases of the dead run out, or not.
	h.ahead += []time.Duration{0, 20 * time.Minute, 80 * time.Minute}[h.r.IntN(3)]
	for id := range h.complete {
		if len(h.complete)-len(h.doomed) <= 4 {
			break
		}
		if !slices.Contains(h.doomed, id) {
			h.doomed = append(h.doomed, id)
		}
	}
	roles := []string{"writer", "collector", "reader", "writer", "collector"}[:3+h.r.IntN(3)]
	alone := round%8 == 0 // of a reader alone everything that it leaves would show
	if alone {
		roles = []string{"reader"}
	}
	before := h.listing(t)
	var mu sync.Mutex
	var wait sync.WaitGroup
	for number, role := range roles {
		v := victim{Role: role, Store: h.config, Keys: h.keys, Ahead: h.ahead, Seed: h.r.Uint64(), Dir: filepath.Join(h.dir, fmt.Sprint(role, number)), Delete: h.doomed}
		// Many at the very beginning, where a process does more kinds of things, and some so
		// late that what is large is complete.
		after := time.Duration(h.r.Int64N(int64([]time.Duration{60, 60, 300, 300, 300, 1500}[h.r.IntN(6)] * time.Millisecond)))
		if err := os.MkdirAll(v.Dir, 0o700); err != nil {
			t.Fatal(err)
		}
		wait.Go(func() {
			told, err := v.liveAndDie(after)
			mu.Lock()
			defer mu.Unlock()
			h.counts["killed: "+role]++
			if err != nil {
				t.Errorf("round %d: %s: %v", round, role, err)
			}
			for _, line := range told {
				h.note(t, line)
			}
		})
	}
	wait.Wait()
	if after := h.listing(t); alone && after != before {
		t.Errorf("round %d: a reader that was killed changed the store from\n%s\nto\n%s", round, before, after)
	}
}

// note takes down what a process told.
func (h *house) note(t *testing.T, line string) {
	words := strings.Fields(line)
	h.counts[words[0]]++
	switch words[0] {
	case "complete":
		id, err := store.ParseID(words[1])
		if err != nil {
			t.Error(err)
		}
		h.complete[id] = words[2]
		if words[3] == "true" {
			h.counts["complete again"]++
		}
	case "collected":
		removed, err := strconv.Atoi(words[2])
		if err != nil {
			t.Error(err)
		}
		h.counts["removed"] += removed
	case "failed":
		t.Error(line)
	}
}

// liveAndDie starts a process, kills it after a while, and returns what it told.
func (v *victim) liveAndDie(after time.Duration) ([]string, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), victimVariable+"="+string(text))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	ready := make(chan struct{})
	out := &output{ready: ready}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-ready:
		select {
		case <-time.After(after):
		case err := <-ended:
			return out.lines(), fmt.Errorf("it ended by itself: %w\n%s", err, out.data.String())
		}
	case err := <-ended:
		return nil, fmt.Errorf("it ended by itself: %w\n%s", err, out.data.String())
	case <-time.After(time.Minute):
		err = errors.New("it was not ready within a minute")
	}
	if killed := cmd.Process.Kill(); killed != nil && !errors.Is(killed, os.ErrProcessDone) {
		return nil, killed
	}
	<-ended
	if cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		return out.lines(), fmt.Errorf("it ended by itself: %v\n%s", cmd.ProcessState, out.data.String())
	}
	return out.lines(), err
}

// output keeps what a process tells, and says when it told anything.
type output struct {
	ready chan struct{}
	data  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	if o.data.Len() == 0 {
		close(o.ready)
	}
	return o.data.Write(p)
}

func (o *output) lines() []string {
	var all []string
	for line := range strings.Lines(o.data.String()) {
		if whole, ok := strings.CutSuffix(line, "\n"); ok && whole != "" { // a kill may cut the last one off
			all = append(all, whole)
		}
	}
	return all
}

// judge looks at the store when all are dead.
func (h *house) judge(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	now := victim{Store: h.config, Keys: h.keys, Ahead: h.ahead}
	s, done, err := now.open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	h.doomed = slices.DeleteFunc(h.doomed, func(id store.ID) bool {
		_, err := s.Describe(ctx, id)
		if errors.Is(err, store.ErrMissing) {
			delete(h.complete, id)
		}
		return errors.Is(err, store.ErrMissing)
	})
	h.expectAll(t, s, "after the kills")

	// On a copy, so that the next round finds all that the dead left.
	later := now
	later.Ahead += 3 * time.Hour
	if h.config.Kind == open.Directory {
		later.Store.Path = filepath.Join(h.dir, "copy")
		h.copyStore(t, later.Store.Path)
		defer os.RemoveAll(later.Store.Path)
	} else {
		h.ahead = later.Ahead
	}
	s, closeLater, err := later.open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer closeLater()
	for range 3 {
		if _, err := s.Collect(ctx, store.CollectOptions{}); err != nil {
			t.Fatalf("collect when all are dead: %v", err)
		}
	}
	if h.config.Kind == open.Directory {
		h.expectAll(t, s, "after the collections")
	} else {
		h.expectThere(t, s, "after the collections")
	}
	h.expectNothingElse(t, s, later.Store)
}

func (h *house) expectThere(t *testing.T, s *store.Store, when string) {
	t.Helper()
	for id := range h.complete {
		if _, err := s.Describe(t.Context(), id); err != nil && !slices.Contains(h.doomed, id) {
			t.Errorf("%s: a checkpoint that was complete is lost: %v", when, err)
		}
	}
	v, err := s.Verify(t.Context(), nil, nil)
	if err != nil {
		t.Fatalf("%s: verify: %v", when, err)
	}
	for _, p := range v.Problems {
		t.Errorf("%s: checkpoint %s: %v", when, p.Checkpoint, p.Err)
	}
}

// expectAll also reads every file.
func (h *house) expectAll(t *testing.T, s *store.Store, when string) {
	t.Helper()
	h.expectThere(t, s, when)
	for id, seed := range h.complete {
		if err := fetch(t.Context(), s, id, seed, filepath.Join(h.dir, "fetched")); err != nil && !slices.Contains(h.doomed, id) {
			t.Errorf("%s: fetch checkpoint %s: %v", when, id, err)
		}
	}
}

// expectNothingElse accounts for every object, and in a directory for every file.
func (h *house) expectNothingElse(t *testing.T, s *store.Store, config open.Config) {
	t.Helper()
	b := openStore(t, config)
	defer b.Close()
	all, err := s.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{"store.json": true}
	for _, c := range all {
		used["checkpoints/"+c.ID.String()] = true
		packs, err := s.Packs(t.Context(), c.ID)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range packs {
			used["packs/"+p.ID.String()] = true
		}
	}
	there := map[string]bool{}
	for object, err := range b.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		kind, id, _ := strings.Cut(object.Name, "/")
		marked := kind == "condemned" && used["packs/"+id] // it had been found without use, and is used after all
		if !used[object.Name] && kind != "keys" && kind != "hints" && !marked {
			t.Errorf("%s is left, of %d bytes, and no checkpoint uses it", object.Name, object.Size)
		}
		there[object.Name] = true
	}
	for name := range used {
		if !there[name] {
			t.Errorf("%s is missing", name)
		}
	}
	if config.Kind != open.Directory {
		return
	}
	parts, err := os.ReadDir(filepath.Join(config.Path, ".parts"))
	if err != nil || len(parts) != 0 {
		t.Errorf("unfinished files are left: %v, %v", parts, err)
	}
}

// copyStore copies the directory of a store: files by hard links, since no writer ever
// changes one, and unfinished ones as if they were two hours old.
func (h *house) copyStore(t *testing.T, to string) {
	t.Helper()
	from, old := h.config.Path, time.Now().Add(-2*time.Hour)
	err := filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		copied := filepath.Join(to, relative)
		switch kind, _, _ := strings.Cut(relative, "/"); {
		case d.IsDir():
			return os.Mkdir(copied, 0o700)
		case kind == ".parts":
			h.counts["files of the dead"]++
			return errors.Join(os.WriteFile(copied, nil, 0o600), os.Chtimes(copied, old, old))
		case kind == "writers":
			h.counts["leases of the dead"]++
		case kind == "condemned":
			h.counts["marks of the dead"]++
		}
		return os.Link(name, copied)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// listing names all objects. Unfinished files are not listed: opening a store in a
// directory makes an empty one for a moment.
func (h *house) listing(t *testing.T) string {
	t.Helper()
	b := openStore(t, h.config)
	defer b.Close()
	var all []string
	for object, err := range b.List(context.Background(), "") {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, fmt.Sprintf("%s %d", object.Name, object.Size))
	}
	return strings.Join(slices.Sorted(slices.Values(all)), "\n")
}
