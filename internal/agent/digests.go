package agent

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"podstasis.dev/stasis/internal/checkpoint"
)

const (
	// digestPatience is how long a request waits for a digest; it goes on being
	// computed, and who asks again finds it.
	digestPatience = 20 * time.Second
	// digestRate bounds what computing one takes of the disk, in bytes a second.
	digestRate = 256 << 20
	// maxDigests is how many are kept of one checkpoint: of it and its containers, and
	// of an object that was changed since.
	maxDigests = 32
)

// wantsDigest reads Want-Repr-Digest (RFC 9530).
func wantsDigest(h http.Header) bool {
	for _, field := range h.Values("Want-Repr-Digest") {
		for item := range strings.SplitSeq(field, ",") {
			algorithm, weight, _ := strings.Cut(strings.TrimSpace(item), "=")
			if algorithm == "sha-256" && weight != "0" {
				return true
			}
		}
	}
	return false
}

// digests of whole archives, computed once each, one at a time, in the background.
type digests struct {
	store    *store
	holdings *holdings
	alive    context.Context // until end: a digest outlives who asked for it
	end      context.CancelFunc
	patience time.Duration
	rate     int64
	log      *slog.Logger

	turn chan struct{} // one is computed at a time
	mu   sync.Mutex
	jobs map[string]*digestJob // by entity tag
}

func newDigests(s *store, h *holdings, log *slog.Logger) *digests {
	alive, end := context.WithCancel(context.Background())
	return &digests{
		store: s, holdings: h, alive: alive, end: end, patience: digestPatience, rate: digestRate, log: log,
		turn: make(chan struct{}, 1), jobs: map[string]*digestJob{},
	}
}

type digestJob struct {
	done   chan struct{}
	digest string
}

// within returns the field Repr-Digest of an archive; empty if it is not known in
// time.
func (d *digests) within(ctx context.Context, uid types.UID, container, etag string) string {
	known, err := d.store.readDigests(uid)
	if err != nil {
		d.log.Warn("kept digests could not be read", "uid", uid, "error", err)
	}
	if digest := known[etag]; digest != "" {
		return digest
	}
	job := d.job(uid, container, etag)
	select {
	case <-job.done:
		return job.digest
	case <-ctx.Done():
	case <-time.After(d.patience):
	}
	return ""
}

func (d *digests) job(uid types.UID, container, etag string) *digestJob {
	d.mu.Lock()
	defer d.mu.Unlock()
	if job := d.jobs[etag]; job != nil {
		return job
	}
	job := &digestJob{done: make(chan struct{})}
	d.jobs[etag] = job
	go func() {
		digest, err := d.compute(uid, container, etag)
		if err != nil && d.alive.Err() == nil {
			d.log.Warn("an archive's digest could not be computed", "uid", uid, "error", err)
		}
		job.digest = digest
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.jobs, etag)
		close(job.done)
	}()
	return job
}

func (d *digests) compute(uid types.UID, container, etag string) (string, error) {
	ctx, held, err := d.holdings.open(d.alive, uid)
	if err != nil {
		return "", err
	}
	defer held.close()
	select {
	case d.turn <- struct{}{}:
		defer func() { <-d.turn }()
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	a, err := archiveOf(held, container)
	if err != nil {
		return "", err
	}
	if a.ETag() != etag {
		return "", errors.New("its object has changed meanwhile")
	}
	r := a.NewReader()
	defer r.Close()
	sum := sha256.New()
	if err := copyAtRate(ctx, sum, r, d.rate); err != nil {
		return "", err
	}
	digest := "sha-256=:" + base64.StdEncoding.EncodeToString(sum.Sum(nil)) + ":"
	return digest, d.store.keepDigest(uid, etag, digest)
}

// copyAtRate copies at most so many bytes a second.
func copyAtRate(ctx context.Context, w io.Writer, r io.Reader, rate int64) error {
	buf := make([]byte, 1<<20)
	began := time.Now()
	for done := int64(0); ; {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		n, err := r.Read(buf)
		w.Write(buf[:n]) // a hash takes everything
		done += int64(n)
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		ahead := time.Duration(float64(done)/float64(rate)*float64(time.Second)) - time.Since(began)
		if ahead > time.Millisecond {
			select {
			case <-ctx.Done():
			case <-time.After(ahead):
			}
		}
	}
}

func (s *store) digestsPath(uid types.UID) string {
	return filepath.Join(s.dir, digestsDir, string(uid)+".json")
}

// readDigests returns what is kept of a checkpoint's archives, by entity tag.
func (s *store) readDigests(uid types.UID) (map[string]string, error) {
	if err := validUID(uid); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(s.digestsPath(uid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var known map[string]string
	if err := json.Unmarshal(data, &known); err != nil {
		return nil, fmt.Errorf("read %s: %w", s.digestsPath(uid), err)
	}
	return known, nil
}

func (s *store) removeDigests(uid types.UID) error {
	s.digesting.Lock()
	defer s.digesting.Unlock()
	if err := os.Remove(s.digestsPath(uid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the kept digests: %w", err)
	}
	return nil
}

// removeStaleDigests removes those of data that are gone.
func (s *store) removeStaleDigests() error {
	held, err := s.held()
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(filepath.Join(s.dir, digestsDir))
	if err != nil {
		return fmt.Errorf("look for leftovers: %w", err)
	}
	for _, e := range entries {
		uid := types.UID(strings.TrimSuffix(e.Name(), ".json"))
		if held[uid] != "" || validUID(uid) != nil {
			continue
		}
		if err := s.removeDigests(uid); err != nil {
			return err
		}
	}
	return nil
}

func (s *store) keepDigest(uid types.UID, etag, digest string) error {
	s.digesting.Lock()
	defer s.digesting.Unlock()
	if held, err := s.held(); err != nil || held[uid] == "" {
		return err // it is gone, and its digests with it
	}
	known, err := s.readDigests(uid)
	if err != nil || known == nil || len(known) >= maxDigests {
		known = map[string]string{}
	}
	known[etag] = digest
	data, err := json.Marshal(known)
	if err != nil {
		return err
	}
	return checkpoint.WriteFile(s.digestsPath(uid), data, 0o600)
}
