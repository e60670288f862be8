package agent

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/event"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/criservice"
)

// uploadName is the archive in an import's directory, as far as it has come.
const uploadName = "archive"

// uploads are the archives that come in. What has come of one is a file, whose
// length says how much: an agent that starts anew goes on with it.
type uploads struct {
	store *store
	room  *room
	// arrived is told when the last byte of one is there; where it is not listened to,
	// the reconciler looks by itself a little later.
	arrived chan<- event.TypedGenericEvent[*v1alpha1.PodCheckpoint]

	mu       sync.Mutex
	expected map[types.UID]*upload
}

func newUploads(s *store, r *room, arrived chan<- event.TypedGenericEvent[*v1alpha1.PodCheckpoint]) *uploads {
	return &uploads{store: s, room: r, arrived: arrived, expected: map[types.UID]*upload{}}
}

// upload is one archive that is expected.
type upload struct {
	key  types.NamespacedName
	size int64
	file string

	writing sync.Mutex // held by whoever writes a part
}

// expect lets parts of an archive in, and says how much of it is there and since
// when nothing has come.
func (u *uploads) expect(uid types.UID, key types.NamespacedName, size int64) (there int64, since time.Time, err error) {
	dir, err := u.store.makeImport(uid)
	if err != nil {
		return 0, time.Time{}, err
	}
	u.mu.Lock()
	if u.expected[uid] == nil {
		u.expected[uid] = &upload{key: key, size: size, file: filepath.Join(dir, uploadName)}
	}
	one := u.expected[uid]
	u.mu.Unlock()
	info, err := os.Lstat(one.file)
	if errors.Is(err, fs.ErrNotExist) {
		info, err = os.Lstat(dir)
		if err != nil {
			return 0, time.Time{}, fmt.Errorf("look how much of the archive is there: %w", err)
		}
		return 0, info.ModTime(), nil
	} else if err != nil {
		return 0, time.Time{}, fmt.Errorf("look how much of the archive is there: %w", err)
	}
	return info.Size(), info.ModTime(), nil
}

// forget lets no more parts in.
func (u *uploads) forget(uid types.UID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.expected, uid)
}

func (u *uploads) of(uid types.UID) *upload {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.expected[uid]
}

// part is a piece of an archive, from first to last, as Content-Range says it.
// A question has no piece: first is -1.
type part struct{ first, last, size int64 }

// parsePart reads "bytes FIRST-LAST/SIZE" or "bytes */SIZE".
func parsePart(field string) (part, error) {
	bad := decline(http.StatusBadRequest, "Content-Range is %.100q: say \"bytes FIRST-LAST/SIZE\", or \"bytes */SIZE\" to ask how much is there", field)
	rest, ok := strings.CutPrefix(field, "bytes ")
	piece, total, found := strings.Cut(rest, "/")
	size, err := strconv.ParseInt(total, 10, 64)
	if !ok || !found || err != nil || size < 0 {
		return part{}, bad
	}
	if piece == "*" {
		return part{first: -1, last: -1, size: size}, nil
	}
	from, to, found := strings.Cut(piece, "-")
	first, err := strconv.ParseInt(from, 10, 64)
	last, lastErr := strconv.ParseInt(to, 10, 64)
	if !found || err != nil || lastErr != nil || first < 0 || last < first || last >= size {
		return part{}, bad
	}
	return part{first, last, size}, nil
}

// bringIn takes a part of an archive, or says how much of it is there.
func (s *server) bringIn(w http.ResponseWriter, r *http.Request) error {
	uid := types.UID(r.PathValue("uid"))
	p, err := parsePart(r.Header.Get("Content-Range"))
	if err != nil {
		return err
	}
	one := s.uploads.of(uid)
	if one == nil {
		return &declined{http.StatusServiceUnavailable, "this agent does not expect an archive for that PodCheckpoint, or not yet; try again", time.Second}
	}
	if p.size != one.size {
		return decline(http.StatusBadRequest, "Content-Range says that the archive has %d bytes, spec.import.sizeBytes of PodCheckpoint %s says %d", p.size, one.key.Name, one.size)
	}
	if length := p.last - p.first + 1; length > agentapi.MaxPart {
		return decline(http.StatusRequestEntityTooLarge, "a part has at most %d bytes, this has %d", int64(agentapi.MaxPart), length)
	}
	there, err := s.uploads.take(one, p, &pacedBody{r.Body, http.NewResponseController(w)})
	w.Header().Set(agentapi.HeaderUploadOffset, strconv.FormatInt(there, 10))
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// pacedBody gives a client time for each piece.
type pacedBody struct {
	io.Reader
	control *http.ResponseController
}

func (p *pacedBody) Read(b []byte) (int, error) {
	_ = p.control.SetReadDeadline(time.Now().Add(stallPatience))
	return p.Reader.Read(b)
}

// take appends a part, which must be the next one, and returns how much is there.
// Of a part that breaks off, what came is kept.
func (u *uploads) take(one *upload, p part, body io.Reader) (there int64, err error) {
	if !one.writing.TryLock() {
		return sizeOf(one.file), decline(http.StatusConflict, "another part of this archive is being written")
	}
	defer one.writing.Unlock()
	there = sizeOf(one.file)
	if p.first < 0 {
		return there, nil
	}
	if p.first != there {
		return there, decline(http.StatusConflict, "the part begins at %d, and %d bytes are there: go on from there", p.first, there)
	}
	length := p.last - p.first + 1
	release, err := u.room.reserve(filepath.Dir(one.file), length)
	if errors.Is(err, criservice.ErrNoRoom) {
		return there, decline(http.StatusInsufficientStorage, "%v", err)
	} else if err != nil {
		return there, err
	}
	defer release()
	f, err := os.OpenFile(one.file, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return there, fmt.Errorf("write the archive: %w", err)
	}
	n, err := io.Copy(struct{ io.Writer }{f}, io.LimitReader(body, length))
	there += n
	if syncErr := errors.Join(f.Sync(), f.Close()); syncErr != nil {
		return there, fmt.Errorf("write the archive: %w", syncErr)
	}
	if err != nil {
		return there, fmt.Errorf("take a part of the archive: %w", err)
	}
	if n < length {
		return there, decline(http.StatusBadRequest, "the part ends after %d of the %d bytes that Content-Range says", n, length)
	}
	if there == one.size {
		pcp := &v1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Namespace: one.key.Namespace, Name: one.key.Name}}
		select {
		case u.arrived <- event.TypedGenericEvent[*v1alpha1.PodCheckpoint]{Object: pcp}:
		default:
		}
	}
	return there, nil
}

func sizeOf(file string) int64 {
	info, err := os.Lstat(file)
	if err != nil {
		return 0
	}
	return info.Size()
}

// makeImport makes the directory that an archive comes into, if it is not there.
func (s *store) makeImport(uid types.UID) (string, error) {
	if err := validUID(uid); err != nil {
		return "", err
	}
	dir := s.importPath(uid)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", fmt.Errorf("make the directory of an import: %w", err)
	}
	return dir, nil
}

func (s *store) importPath(uid types.UID) string {
	return filepath.Join(s.checkpointRoot(), importPrefix+string(uid))
}

// removeImport removes what has come of an archive.
func (s *store) removeImport(uid types.UID) error {
	if err := validUID(uid); err != nil {
		return err
	}
	return os.RemoveAll(s.importPath(uid))
}
