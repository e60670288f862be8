package restoring

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
)

// record is what is kept of one sandbox, until that is gone.
type record struct {
	Sandbox  nodeapi.Sandbox `json:"sandbox"`
	Since    time.Time       `json:"since"` // when it was admitted
	Ordinary bool            `json:"ordinary,omitempty"`
	Dir      string          `json:"dir,omitempty"`
	// Digest is that of the checkpoint's manifest, and Lazy says that memory is given to
	// processes while they run.
	Digest string `json:"digest,omitempty"`
	Lazy   bool   `json:"lazy,omitempty"`
	// Unchecked says that files of pages have not been checked: nothing of the sandbox's
	// containers is left as long as they have not.
	Unchecked bool `json:"unchecked,omitempty"`
	// Partial says that memory is still being brought to Dir.
	Partial bool `json:"partial,omitempty"`
	// MemoryTold names the containers of which the observer knows what has become of
	// their memory.
	MemoryTold []string `json:"memoryTold,omitempty"`
	// MemoryEnded says that the observer knows that nothing more is brought to Dir for
	// this sandbox.
	MemoryEnded bool `json:"memoryEnded,omitempty"`
	// Containers names those of the checkpoint.
	Containers []string `json:"containers,omitempty"`
	// Whole says that the engine restores the sandbox as a whole.
	Whole bool `json:"whole,omitempty"`
	// Eager says that no process runs before all memory is in place.
	Eager bool `json:"eager,omitempty"`
	// CompletedInit names the init containers that are not run again.
	CompletedInit []string `json:"completedInit,omitempty"`
	// Together names the containers that are let go together.
	Together []string `json:"together,omitempty"`
	// Created and Started name the containers that have come that far.
	Created []string `json:"created,omitempty"`
	Started []string `json:"started,omitempty"`
	// Again counts how often a container was taken for one that was not let go after
	// all: what was found on the node before that is of the past.
	Again int `json:"again,omitempty"`
	// Told says that the observer knows that all have.
	Told bool `json:"told,omitempty"`
	// Seen says that the container runtime has known the sandbox to be up: once it
	// does not any more the sandbox is gone. Gone says that somebody said so.
	Seen bool `json:"seen,omitempty"`
	Gone bool `json:"gone,omitempty"`
}

// whole says whether every container of the checkpoint has been let go.
func (rec record) whole() bool {
	return len(rec.Containers) > 0 && !slices.ContainsFunc(rec.Containers, func(c string) bool { return !slices.Contains(rec.Started, c) })
}

// wholeWith says whether it would be whole if these had been let go too.
func (rec record) wholeWith(unclear map[string]error) bool {
	rec.Started = slices.AppendSeq(slices.Clone(rec.Started), maps.Keys(unclear))
	return rec.whole()
}

func add(names []string, name string) []string {
	if slices.Contains(names, name) {
		return names
	}
	return append(names, name)
}

func (s *Sessions) file(sandboxID string) (string, error) {
	if sandboxID == "" || filepath.Base(sandboxID) != sandboxID {
		return "", fmt.Errorf("bad sandbox ID %q", sandboxID)
	}
	return filepath.Join(s.StateDir, sandboxID+".json"), nil
}

// workDirs holds a directory for each container of a sandbox.
func (s *Sessions) workDirs(sandboxID string) string {
	return filepath.Join(s.StateDir, sandboxID+".work")
}

func (s *Sessions) save(rec record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.write(rec)
}

// update changes the record of a sandbox.
func (s *Sessions) update(sandboxID string, change func(*record)) (record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec, err := s.read(sandboxID)
	if err != nil {
		return rec, err
	}
	change(&rec)
	return rec, s.write(rec)
}

func (s *Sessions) write(rec record) error {
	file, err := s.file(rec.Sandbox.ID)
	if err != nil {
		return err
	}
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := checkpoint.WriteFile(file, data, 0o600); err != nil {
		return fmt.Errorf("keep the record of a restore: %w", err)
	}
	return nil
}

func (s *Sessions) read(sandboxID string) (record, error) {
	file, err := s.file(sandboxID)
	if err != nil {
		return record{}, err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return record{}, fmt.Errorf("read the record of a restore: %w", err)
	}
	var rec record
	if err := json.Unmarshal(data, &rec); err != nil {
		return record{}, fmt.Errorf("read the record of a restore: %s: %w", file, err)
	}
	return rec, nil
}

// forget drops what was kept for a sandbox.
func (s *Sessions) forget(sandboxID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.checks[sandboxID]; c != nil {
		c.end()
		delete(s.checks, sandboxID)
	}
	file, err := s.file(sandboxID)
	if err != nil {
		return err
	}
	if err := errors.Join(removeAll(s.workDirs(sandboxID)), os.RemoveAll(filepath.Join(s.ImagesDir, sandboxID))); err != nil {
		return err
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeAll removes a directory, and not what is mounted beneath it: a killed CRIU may
// have left cgroup hierarchies there.
func removeAll(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("look for what is mounted beneath %s: %w", dir, err)
	}
	slices.Reverse(mounts) // what is mounted upon another comes after it
	for _, m := range mounts {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
		}
	}
	return os.RemoveAll(dir)
}

func (s *Sessions) records() ([]record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	files, err := filepath.Glob(filepath.Join(s.StateDir, "*.json"))
	if err != nil {
		return nil, err
	}
	var records []record
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var rec record
		if err := json.Unmarshal(data, &rec); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		records = append(records, rec)
	}
	return records, nil
}

// earlier lists the records of other sandboxes of the same Pod. There is one at a
// time; another is of one that is gone, or that its runtime was killed over.
func (s *Sessions) earlier(sandbox nodeapi.Sandbox) ([]record, error) {
	if sandbox.UID == "" || sandbox.Annotations[annotationTicket] != "" {
		return nil, nil
	}
	records, err := s.records()
	return slices.DeleteFunc(records, func(rec record) bool {
		return rec.Sandbox.UID != sandbox.UID || rec.Sandbox.ID == sandbox.ID || rec.Sandbox.Annotations[annotationTicket] != ""
	}), err
}

// supersede drops what was kept for earlier sandboxes of the same Pod: it would keep
// the checkpoint's data in use for ever.
func (s *Sessions) supersede(sandbox nodeapi.Sandbox) error {
	records, err := s.earlier(sandbox)
	if err != nil {
		return err
	}
	for _, rec := range records {
		if rec.whole() && !rec.Told {
			continue // Run tells it yet
		}
		if err := s.forget(rec.Sandbox.ID); err != nil {
			return fmt.Errorf("forget sandbox %s, which %s follows: %w", rec.Sandbox.ID, sandbox.ID, err)
		}
	}
	return nil
}

// InUse lists the checkpoint directories that a restore under way reads: their
// data must stay until every container has been let go, and has all its memory.
func (s *Sessions) InUse() ([]string, error) {
	users, err := s.allUsers()
	var dirs []string
	for _, u := range users {
		dirs = append(dirs, u.dir)
	}
	return dirs, err
}

// User is a sandbox that a checkpoint directory stays for.
type User struct {
	Sandbox nodeapi.Sandbox
	// Restored says that every container has been let go, and that memory is still given
	// to some.
	Restored bool

	dir string
}

// Users are those of one directory.
func (s *Sessions) Users(dir string) ([]User, error) {
	users, err := s.allUsers()
	return slices.DeleteFunc(users, func(u User) bool { return u.dir != dir }), err
}

func (s *Sessions) allUsers() ([]User, error) {
	records, err := s.records()
	if err != nil {
		return nil, err
	}
	var users []User
	for _, rec := range records {
		if !rec.Ordinary && (!rec.whole() || s.givesMemory(rec)) {
			users = append(users, User{Sandbox: rec.Sandbox, Restored: rec.whole(), dir: rec.Dir})
		}
	}
	return users, nil
}
