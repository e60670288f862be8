package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/types"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
)

// Names beneath the agent's state directory.
const (
	checkpointsDir = "checkpoints" // the checkpoint root that status.checkpointLocation is relative to
	recordsDir     = "records"     // outcomes that may not be in the API yet, by UID of the PodCheckpoint
	restoredDir    = "restored"    // which Pods have been restored, by their UID
	storingDir     = "storing"     // what is in a CheckpointStore of checkpoints that are being stored, by UID of the PodCheckpoint
	digestsDir     = "digests"     // of archives that somebody asked for, by UID of the PodCheckpoint

	partialPrefix  = ".partial-"  // of a checkpoint being taken, followed by the object's UID
	removingPrefix = ".removing-" // of data being removed
	importPrefix   = ".import-"   // of an archive that comes in, followed by the object's UID
)

// store is the agent's state directory.
type store struct {
	dir string // absolute
	// leaving is told of data that are out of the way and about to be removed.
	leaving   func(types.UID)
	digesting sync.Mutex // held by whoever writes a file of digests
}

// openStore makes the directories, for root alone.
func openStore(dir string) (*store, error) {
	for _, d := range []string{dir, filepath.Join(dir, checkpointsDir), filepath.Join(dir, recordsDir), filepath.Join(dir, restoredDir), filepath.Join(dir, digestsDir), filepath.Join(dir, hooksDir), filepath.Join(dir, storingDir), filepath.Join(dir, neededDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("make the state directory: %w", err)
		}
		if err := os.Chmod(d, 0o700); err != nil {
			return nil, fmt.Errorf("make the state directory private: %w", err)
		}
	}
	return &store{dir: dir, leaving: func(types.UID) {}}, nil
}

func (s *store) checkpointRoot() string { return filepath.Join(s.dir, checkpointsDir) }

func (s *store) dataPath(name string) string { return filepath.Join(s.checkpointRoot(), name) }

// maxName is the longest file name that Linux file systems take.
const maxName = 255

// dataName is the directory of an object's data, relative to the checkpoint
// root. Namespaces, names and UIDs have no "_", so it can be taken apart again;
// of a name that is too long the end is left out.
func dataName(namespace, name string, uid types.UID) string {
	if room := maxName - len(namespace) - len(uid) - 2; len(name) > room {
		name = name[:max(room, 0)]
	}
	return namespace + "_" + name + "_" + string(uid)
}

// uidOfDataName is the UID in a name that dataName made, and false for any other.
func uidOfDataName(entry string) (types.UID, bool) {
	parts := strings.Split(entry, "_")
	if len(parts) != 3 || parts[0] == "" || parts[2] == "" || strings.HasPrefix(entry, ".") {
		return "", false
	}
	return types.UID(parts[2]), true
}

// validUID keeps a UID that is used as a file name from being a path.
func validUID(uid types.UID) error {
	if uid == "" || len(uid) > 64 || strings.ContainsAny(string(uid), "/_.\x00") {
		return fmt.Errorf("bad UID %q", uid)
	}
	return nil
}

// makePartial makes the empty directory that a checkpoint is written into.
func (s *store) makePartial(uid types.UID) (string, error) {
	if err := validUID(uid); err != nil {
		return "", err
	}
	dir := filepath.Join(s.checkpointRoot(), partialPrefix+string(uid))
	if err := os.RemoveAll(dir); err != nil {
		return "", fmt.Errorf("remove what an earlier attempt left: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("make the checkpoint's directory: %w", err)
	}
	return dir, nil
}

// commit moves a complete partial directory to its final name, durably. Doing it
// again is harmless.
func (s *store) commit(uid types.UID, name string) error {
	partial := filepath.Join(s.checkpointRoot(), partialPrefix+string(uid))
	final := filepath.Join(s.checkpointRoot(), name)
	if err := os.Rename(partial, final); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(final); err != nil {
			return fmt.Errorf("complete the checkpoint's directory: %w", err)
		}
	} else if err != nil {
		return fmt.Errorf("complete the checkpoint's directory: %w", err)
	}
	return checkpoint.SyncDir(s.checkpointRoot())
}

// removePartial removes a checkpoint that did not come about.
func (s *store) removePartial(uid types.UID) error {
	if err := validUID(uid); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(s.checkpointRoot(), partialPrefix+string(uid)))
}

// removeData removes everything that belongs to an object: data, partial data
// and record. It is moved out of the way first, so that nobody finds half of it.
func (s *store) removeData(uid types.UID) error {
	if err := validUID(uid); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.checkpointRoot())
	if err != nil {
		return fmt.Errorf("remove checkpoint data: %w", err)
	}
	for _, e := range entries {
		if found, ok := uidOfDataName(e.Name()); !ok || found != uid {
			continue
		}
		aside := filepath.Join(s.checkpointRoot(), removingPrefix+string(uid))
		if err := os.RemoveAll(aside); err != nil {
			return fmt.Errorf("remove checkpoint data: %w", err)
		}
		if err := os.Rename(filepath.Join(s.checkpointRoot(), e.Name()), aside); err != nil {
			return fmt.Errorf("remove checkpoint data: %w", err)
		}
		s.leaving(uid)
		if err := os.RemoveAll(aside); err != nil {
			return fmt.Errorf("remove checkpoint data: %w", err)
		}
	}
	if err := errors.Join(s.removePartial(uid), s.removeImport(uid), s.removeDigests(uid), s.removeRecord(uid), s.notLonger(uid)); err != nil {
		return fmt.Errorf("remove checkpoint data: %w", err)
	}
	return checkpoint.SyncDir(s.checkpointRoot())
}

// locate resolves a path of the API against the checkpoint root. What leads out
// of the root, or to something that is not a directory, is not found.
func (s *store) locate(rel string) (string, error) {
	if !filepath.IsLocal(rel) || filepath.Clean(rel) != rel || strings.HasPrefix(rel, ".") {
		return "", fmt.Errorf("location %q does not name a directory beneath the checkpoint root", rel)
	}
	root, err := os.OpenRoot(s.checkpointRoot())
	if err != nil {
		return "", fmt.Errorf("open the checkpoint root: %w", err)
	}
	defer root.Close()
	info, err := root.Lstat(rel)
	if err != nil {
		return "", err
	}
	if !info.IsDir() {
		return "", fmt.Errorf("location %q is not a directory", rel)
	}
	return filepath.Join(s.checkpointRoot(), rel), nil
}

// record is the outcome of an operation. Writing it is the moment from which the
// operation has happened: it is complete on disk and the API is told until it knows.
type record struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	UID       types.UID `json:"uid"` // of the PodCheckpoint
	// Pod is the source Pod, for events.
	PodName string    `json:"podName"`
	PodUID  types.UID `json:"podUID,omitempty"`
	// Data is the directory relative to the checkpoint root; empty if it failed.
	Data string `json:"data,omitempty"`
	// StoreName is the CheckpointStore that it is to be kept in; empty: it stays here.
	StoreName string `json:"storeName,omitempty"`
	Workload  string `json:"workload,omitempty"` // of the source Pod

	Status v1alpha1.PodCheckpointStatus `json:"status"`
}

func (s *store) recordPath(uid types.UID) string {
	return filepath.Join(s.dir, recordsDir, string(uid)+".json")
}

func (s *store) writeRecord(r *record) error {
	if err := validUID(r.UID); err != nil {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode the outcome's record: %w", err)
	}
	if err := checkpoint.WriteFile(s.recordPath(r.UID), data, 0o600); err != nil {
		return fmt.Errorf("write the outcome's record: %w", err)
	}
	return nil
}

// readRecord returns nil where there is none.
func (s *store) readRecord(uid types.UID) (*record, error) {
	if err := validUID(uid); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(s.recordPath(uid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("read the outcome's record: %w", err)
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("read the outcome's record %s: %w", s.recordPath(uid), err)
	}
	if r.UID != uid {
		return nil, fmt.Errorf("the record %s is of %s", s.recordPath(uid), r.UID)
	}
	return &r, nil
}

func (s *store) removeRecord(uid types.UID) error {
	if err := s.removeStoring(uid); err != nil {
		return err
	}
	if err := os.Remove(s.recordPath(uid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the outcome's record: %w", err)
	}
	return nil
}

// held lists the UIDs of the objects that anything is kept for, with the name
// of their data directory (empty if there is none).
func (s *store) held() (map[types.UID]string, error) {
	found := map[types.UID]string{}
	records, err := os.ReadDir(filepath.Join(s.dir, recordsDir))
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	for _, e := range records {
		if uid, ok := strings.CutSuffix(e.Name(), ".json"); ok && validUID(types.UID(uid)) == nil {
			found[types.UID(uid)] = ""
		}
	}
	entries, err := os.ReadDir(s.checkpointRoot())
	if err != nil {
		return nil, fmt.Errorf("list checkpoints: %w", err)
	}
	for _, e := range entries {
		if uid, ok := uidOfUnfinished(e.Name()); ok {
			if _, known := found[uid]; !known {
				found[uid] = ""
			}
		} else if uid, ok := uidOfDataName(e.Name()); ok && validUID(uid) == nil {
			found[uid] = e.Name()
		}
	}
	return found, nil
}

// uidOfUnfinished is the UID in the name of a checkpoint being taken or imported.
func uidOfUnfinished(name string) (types.UID, bool) {
	for _, prefix := range []string{partialPrefix, importPrefix} {
		if uid, ok := strings.CutPrefix(name, prefix); ok && validUID(types.UID(uid)) == nil {
			return types.UID(uid), true
		}
	}
	return "", false
}

// removeLeftovers removes, at start, what no operation can be working on: data
// half removed, temporary files, and partial checkpoints without a record (P17).
func (s *store) removeLeftovers() ([]string, error) {
	var removed []string
	for _, dir := range []string{s.checkpointRoot(), filepath.Join(s.dir, recordsDir), filepath.Join(s.dir, restoredDir), filepath.Join(s.dir, digestsDir), filepath.Join(s.dir, hooksDir), filepath.Join(s.dir, storingDir), filepath.Join(s.dir, neededDir)} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return removed, fmt.Errorf("look for leftovers: %w", err)
		}
		for _, e := range entries {
			if !s.leftover(e.Name()) {
				continue
			}
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return removed, fmt.Errorf("remove leftovers: %w", err)
			}
			removed = append(removed, e.Name())
		}
	}
	return removed, s.removeStaleDigests()
}

func (s *store) leftover(name string) bool {
	if uid, ok := strings.CutPrefix(name, partialPrefix); ok {
		r, err := s.readRecord(types.UID(uid))
		return err == nil && (r == nil || r.Data == "")
	}
	return strings.HasPrefix(name, removingPrefix) || strings.HasPrefix(name, ".tmp-")
}

// markRestored remembers that a Pod has been restored: a later sandbox of the
// same Pod starts ordinarily.
func (s *store) markRestored(pod types.NamespacedName, uid types.UID) error {
	if err := validUID(uid); err != nil {
		return err
	}
	if err := checkpoint.WriteFile(filepath.Join(s.dir, restoredDir, string(uid)), []byte(pod.String()+"\n"), 0o600); err != nil {
		return fmt.Errorf("remember that the Pod has been restored: %w", err)
	}
	return nil
}

func (s *store) wasRestored(uid types.UID) (bool, error) {
	if err := validUID(uid); err != nil {
		return false, err
	}
	_, err := os.Lstat(filepath.Join(s.dir, restoredDir, string(uid)))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// restoredPods lists the Pods that are remembered, by UID.
func (s *store) restoredPods() (map[types.UID]types.NamespacedName, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, restoredDir))
	if err != nil {
		return nil, fmt.Errorf("list restored Pods: %w", err)
	}
	pods := map[types.UID]types.NamespacedName{}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(s.dir, restoredDir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("list restored Pods: %w", err)
		}
		namespace, name, ok := strings.Cut(strings.TrimSpace(string(data)), "/")
		if ok && validUID(types.UID(e.Name())) == nil {
			pods[types.UID(e.Name())] = types.NamespacedName{Namespace: namespace, Name: name}
		}
	}
	return pods, nil
}

func (s *store) forgetRestored(uid types.UID) error {
	if err := s.removeDueHooks(v1alpha1.AnnotationPostRestore, uid); err != nil {
		return err
	}
	return os.Remove(filepath.Join(s.dir, restoredDir, string(uid)))
}

// syncTree makes a directory's files durable. The CRI does not promise that the
// runtime did; where it did this costs little.
func syncTree(dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.IsDir() && !d.Type().IsRegular() {
			return fmt.Errorf("%s is neither a file nor a directory", name)
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
}
