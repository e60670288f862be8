package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/criservice"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
)

// Names beneath the checkpoint root.
const (
	copiesDir     = ".copies"    // of checkpoints of other nodes, by UID of the PodCheckpoint; with each a UID.json
	fetchingIntro = ".fetching-" // of a copy that is not complete, followed by the UID
	// earlyIntro is of a copy that has all but memory that may come later, followed by the
	// UID. Its name stays, for those who are being restored from it, when all has come;
	// the copy then has its own name too.
	earlyIntro = ".early-"
	copySuffix = ".json"
)

const (
	// firstWait is how long a sandbox's creation waits for a fetch: a small checkpoint
	// is there by then, and of a large one its Pod is told how far it is. The kubelet
	// asks again.
	firstWait = 4 * time.Second
	// unwantedAfter is how long after the last question a fetch goes on. It is longer
	// than the kubelet's pauses between two tries.
	unwantedAfter = 5 * time.Minute
	// handedFor is how long a copy that was handed out stays, whatever becomes of its
	// object, unless its restore is heard to have begun or been refused before: as long
	// as a question of stasis-runtime may take.
	handedFor = nodeapi.CallTimeout + time.Minute
	// maxFetches is how many checkpoints are fetched at a time.
	maxFetches = 2
	// copiesEvery is how often copies are looked at that may have to go.
	copiesEvery = 2 * time.Minute
	// abandonedAfter is how long what is left of a fetch waits for somebody to go on.
	abandonedAfter = 30 * time.Minute
	// defaultKeepCopies is how long a copy stays that nobody uses.
	defaultKeepCopies = time.Hour
)

// copies are checkpoints of other nodes that have been brought here to be restored.
// A copy is a cache: its PodCheckpoint's finalizer is the affair of the node that
// holds the data, and does not wait for copies. They go when their object has gone,
// when nobody has used them for a while, and when there is no room for another.
type copies struct {
	store   *store
	room    *room
	live    client.Reader
	origins interface {
		of(pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod) (origin, error)
	}
	// inUse lists the checkpoint directories that restores under way read.
	inUse func() ([]string, error)
	// tell makes an event of a Pod whose checkpoint has been fetched, once.
	tell    func(ctx context.Context, pod podRef, message string) error
	keep    time.Duration
	wait    time.Duration
	policy  pages.Policy // says whose memory may come later
	rate    int64        // of what comes later, in bytes a second; 0: unbounded
	metrics *Metrics
	log     *slog.Logger
	now     func() time.Time

	alive context.Context // fetches end with it
	turn  chan struct{}   // one for each fetch

	mu     sync.Mutex
	under  map[types.UID]*fetching
	handed map[types.UID]time.Time // when copies were given out
	news   map[types.UID]string    // what there is to tell of how they came
}

// fetching is a fetch under way, or over.
type fetching struct {
	mode     pages.Mode // of who asked first
	origin   origin
	hurried  origin // another of the same, for what processes wait for; nil unless mode is lazy
	progress progress
	cancel   context.CancelFunc
	done     chan struct{}
	err      error         // after done
	early    chan struct{} // closed when a Pod can be restored, and memory still comes
	later    *later        // after early
	proceed  func()        // lets another fetch have its turn
	began    time.Time
	asked    time.Time // by whomever, last; guarded by copies.mu
}

// copyRecord says whose copy there is. It is written before the first byte.
type copyRecord struct {
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"`
	UID       types.UID `json:"uid"`
	From      string    `json:"from"` // for people
}

func newCopies(d *daemon, live client.Reader, from *origins) (*copies, error) {
	if err := os.MkdirAll(d.store.copiesRoot(), 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of copies: %w", err)
	}
	return &copies{
		policy: d.lazily.Policy, rate: d.lazily.Bandwidth,
		store: d.store, room: d.room, live: live, origins: from, inUse: func() ([]string, error) { return d.sessions.InUse() },
		keep: d.KeepCopies, wait: firstWait, metrics: d.metrics, log: d.Log, now: time.Now,
		alive: context.Background(), turn: make(chan struct{}, maxFetches),
	}, nil
}

func (s *store) copiesRoot() string { return filepath.Join(s.checkpointRoot(), copiesDir) }

func (s *store) copyPath(uid types.UID) string { return filepath.Join(s.copiesRoot(), string(uid)) }

func (s *store) fetchingPath(uid types.UID) string {
	return filepath.Join(s.copiesRoot(), fetchingIntro+string(uid))
}

func (s *store) earlyPath(uid types.UID) string {
	return filepath.Join(s.copiesRoot(), earlyIntro+string(uid))
}

func (s *store) copyRecordPath(uid types.UID) string { return s.copyPath(uid) + copySuffix }

// need returns the directory of a checkpoint of another node, once it is here and
// whole, or, where mode is lazy, as soon as a Pod can be restored from it: then partial
// says so, and the Pod needs the other node until the rest has come. A Pod that does not
// ask for that is spared it: a node that is drained goes when its Pods have gone. Until
// then it is a refusal that says how far it is: the Pod's sandbox is asked for again. pod
// is the Pod that needs it.
func (c *copies) need(ctx context.Context, pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod, mode pages.Mode) (dir string, partial bool, err error) {
	if err := validUID(pcp.UID); err != nil {
		return "", false, err
	}
	f, err := c.begin(pcp, pod, mode)
	if err != nil {
		return "", false, err
	}
	if f != nil {
		early := f.early
		if mode != pages.ModeLazy {
			early = nil
		}
		select {
		case <-f.done:
		case <-early:
			partial = true
		case <-ctx.Done():
			return "", false, context.Cause(ctx)
		case <-time.After(c.wait):
			return "", false, c.waiting(pcp, f)
		}
		select {
		case <-f.done: // it may have ended since
			partial = false
			if f.err != nil {
				return "", false, c.failed(pcp, f)
			}
		default:
		}
	}
	dir = c.store.copyPath(pcp.UID)
	if partial {
		dir = c.store.earlyPath(pcp.UID)
	}
	news, err := c.hand(pcp.UID, dir)
	if partial {
		news = c.soFar(pcp, f)
	}
	if err == nil && news != "" {
		if err := c.tell(ctx, podRef{pod.Namespace, pod.Name, pod.UID}, news); err != nil {
			c.log.Warn("an event of a Pod could not be written", "namespace", pod.Namespace, "pod", pod.Name, "error", err)
		}
	}
	return dir, partial, err
}

// hand gives a copy out, which is then in use, and what there is to tell of how it came.
func (c *copies) hand(uid types.UID, dir string) (news string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	if err := os.Chtimes(dir, now, now); err != nil {
		return "", fmt.Errorf("use the copy of a checkpoint: %w", err)
	}
	if c.handed == nil {
		c.handed = map[types.UID]time.Time{}
	}
	c.handed[uid] = now
	return c.news[uid], nil
}

// settled is told that the restore that a copy was handed out for has begun, and is
// among those in use now, or has been refused.
func (c *copies) settled(uid types.UID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.handed, uid)
}

// begin starts a fetch, or finds the one under way; nil if the copy is there.
func (c *copies) begin(pcp *v1alpha1.PodCheckpoint, pod *corev1.Pod, mode pages.Mode) (*fetching, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.under[pcp.UID]; f != nil {
		f.asked = c.now()
		f.origin.For(pod)
		if f.hurried != nil {
			f.hurried.For(pod)
		}
		return f, nil
	}
	switch _, err := os.Lstat(c.store.copyPath(pcp.UID)); {
	case err == nil:
		return nil, nil
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("look for the copy of a checkpoint: %w", err)
	}
	from, err := c.origins.of(pcp, pod)
	if err != nil {
		return nil, err
	}
	var hurried origin
	if mode == pages.ModeLazy {
		if hurried, err = c.origins.of(pcp, pod); err != nil {
			from.Close()
			return nil, err
		}
	}
	ctx, cancel := context.WithCancel(c.alive)
	f := &fetching{mode: mode, origin: from, hurried: hurried, cancel: cancel, done: make(chan struct{}), early: make(chan struct{}), began: c.now(), asked: c.now()}
	if c.under == nil {
		c.under = map[types.UID]*fetching{}
	}
	c.under[pcp.UID] = f
	pcp = pcp.DeepCopy()
	go func() {
		defer cancel()
		f.err = c.fetch(ctx, pcp, f)
		f.origin.Close()
		if f.hurried != nil {
			f.hurried.Close()
		}
		c.mu.Lock()
		delete(c.under, pcp.UID)
		if f.err == nil {
			c.note(pcp, f)
		}
		c.mu.Unlock()
		close(f.done)
	}()
	return f, nil
}

// fetch brings a checkpoint here.
func (c *copies) fetch(ctx context.Context, pcp *v1alpha1.PodCheckpoint, f *fetching) error {
	log := c.log.With("podcheckpoint", pcp.Namespace+"/"+pcp.Name, "uid", pcp.UID, "from", f.origin.Name())
	defer c.untilUnwanted(f)()
	f.proceed = func() {}
	if _, err := os.Lstat(c.store.earlyPath(pcp.UID)); err != nil { // else somebody runs already, and waits
		select {
		case c.turn <- struct{}{}:
			f.proceed = sync.OnceFunc(func() { <-c.turn })
			defer f.proceed()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	var came int64
	log.Info("a checkpoint is being fetched")
	err := c.fetchInto(ctx, pcp, f, &came)
	took := c.now().Sub(f.began)
	have, total, broken, _ := f.progress.read()
	log = log.With("took", took, "bytes", total, "received", came, "brokenConnections", broken)
	if err != nil {
		log.Warn("a checkpoint could not be fetched", "error", err, "have", have)
		c.metrics.fetchDuration.WithLabelValues(resultFailure).Observe(took.Seconds())
		return err
	}
	if second, _ := f.origin.(secondOrigin); second != nil && second.instead() != "" {
		log.Warn("a checkpoint was not fetched from where it should have been", "instead", f.origin.Name(), "because", second.instead())
	}
	log.Info("a checkpoint has been fetched")
	c.metrics.fetchDuration.WithLabelValues(resultSuccess).Observe(took.Seconds())
	return nil
}

func (c *copies) fetchInto(ctx context.Context, pcp *v1alpha1.PodCheckpoint, f *fetching, came *int64) error {
	record, err := json.Marshal(copyRecord{Namespace: pcp.Namespace, Name: pcp.Name, UID: pcp.UID, From: f.origin.Name()})
	if err != nil {
		return fmt.Errorf("encode whose copy it is: %w", err)
	}
	if err := checkpoint.WriteFile(c.store.copyRecordPath(pcp.UID), record, 0o600); err != nil {
		return fmt.Errorf("write whose copy it is: %w", err)
	}
	one := &fetch{
		from: f.origin, dir: c.store.fetchingPath(pcp.UID), digest: pcp.Status.ManifestDigest, stall: fetchStall, patience: fetchPatience, progress: &f.progress, now: c.now,
		received: func(n int) {
			atomic.AddInt64(came, int64(n))
			c.metrics.fetchedBytes.Add(float64(n))
		},
	}
	err = c.goOn(ctx, pcp, f, one)
	if errors.Is(err, errNoneEarly) {
		err = c.fetchAnew(ctx, pcp, f, one)
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, criservice.ErrNoRoom) {
		// It would be in the way of whatever else needs the disk.
		err = errors.Join(err, os.RemoveAll(one.dir), c.forgetRecord(pcp.UID))
	}
	return err
}

func (c *copies) fetchAnew(ctx context.Context, pcp *v1alpha1.PodCheckpoint, f *fetching, one *fetch) error {
	dir := one.dir
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the directory of a fetch: %w", err)
	}
	lazily := false
	if f.mode == pages.ModeLazy {
		one.early = func(ctx context.Context, m *checkpoint.Manifest) (*pages.Lazily, error) {
			return c.policy.Early(ctx, dir, m, pcp.Status.ManifestDigest)
		}
		one.rest = func(ctx context.Context, l *pages.Lazily) error {
			lazily = true
			return c.comeEarly(ctx, pcp, f, one, l)
		}
	}
	err := one.run(ctx, func(bytes int64) (func(), error) { return c.makeRoom(bytes) })
	if err != nil || lazily {
		return err
	}
	if err := os.Rename(dir, c.store.copyPath(pcp.UID)); err != nil {
		return err
	}
	return checkpoint.SyncDir(c.store.copiesRoot())
}

// note keeps what there is to tell of a fetch that is over.
func (c *copies) note(pcp *v1alpha1.PodCheckpoint, f *fetching) {
	if c.news == nil {
		c.news = map[types.UID]string{}
	}
	_, total, broken, _ := f.progress.read()
	c.news[pcp.UID] = fmt.Sprintf("The data of PodCheckpoint %s have come from %s: %s in %s", pcp.Name, f.origin.Name(), binaryBytes(total), c.now().Sub(f.began).Round(100*time.Millisecond))
	if second, _ := f.origin.(secondOrigin); second != nil && second.instead() != "" {
		c.news[pcp.UID] += "; " + second.instead()
	} else if broken > 0 {
		c.news[pcp.UID] += fmt.Sprintf(", over a connection that broke %d times", broken)
	}
}

// untilUnwanted ends a fetch that nobody has asked for in a while; the function that
// it returns ends the watch.
func (c *copies) untilUnwanted(f *fetching) func() {
	over := make(chan struct{})
	go func() {
		tick := time.NewTicker(unwantedAfter / 10)
		defer tick.Stop()
		for {
			select {
			case <-over:
				return
			case <-tick.C:
			}
			c.mu.Lock()
			unwanted := c.now().Sub(f.asked) > unwantedAfter
			c.mu.Unlock()
			if unwanted {
				f.cancel()
			}
		}
	}()
	return func() { close(over) }
}

// makeRoom keeps room for so many bytes, in place of copies that nobody uses if need be.
func (c *copies) makeRoom(bytes int64) (release func(), err error) {
	for {
		release, err = c.room.reserve(c.store.copiesRoot(), bytes)
		if !errors.Is(err, criservice.ErrNoRoom) {
			return release, err
		}
		gone, evictErr := c.evictOldest()
		if evictErr != nil || !gone {
			return nil, errors.Join(err, evictErr)
		}
	}
}

// evictOldest removes the copy that has not been used for longest; false if there is
// none that nobody uses.
func (c *copies) evictOldest() (bool, error) {
	all, err := c.list()
	if err != nil {
		return false, err
	}
	all = slices.DeleteFunc(all, func(a aCopy) bool { return a.partial })
	slices.SortFunc(all, func(a, b aCopy) int { return a.used.Compare(b.used) })
	for _, a := range all {
		if gone, err := c.remove(a, "another needs its room"); gone || err != nil {
			return gone, err
		}
	}
	return false, nil
}

// waiting says how far a fetch is.
func (c *copies) waiting(pcp *v1alpha1.PodCheckpoint, f *fetching) error {
	have, total, _, trouble := f.progress.read()
	how := "it waits for other fetches"
	if total > 0 {
		how = fmt.Sprintf("%d %% of %s", have*100/max(total, 1), binaryBytes(total))
	} else if len(c.turn) < cap(c.turn) {
		how = "it begins"
	}
	if trouble != nil {
		return deny(v1alpha1.EventCheckpointFetchFailed, "the data of PodCheckpoint %s are being fetched from %s, %s are here, and now it does not go on: %v; it is tried again", pcp.Name, f.origin.Name(), how, trouble)
	}
	return deny(v1alpha1.EventCheckpointFetching, "the data of PodCheckpoint %s are being fetched from %s: %s", pcp.Name, f.origin.Name(), how)
}

// failed says why a fetch came to nothing. The next question begins another, which
// goes on from what is there.
func (c *copies) failed(pcp *v1alpha1.PodCheckpoint, f *fetching) error {
	var no *nodeapi.Error
	if errors.As(f.err, &no) {
		return no
	}
	return deny(v1alpha1.EventCheckpointFetchFailed, "the data of PodCheckpoint %s could not be fetched from %s: %v; it is tried again", pcp.Name, f.origin.Name(), f.err)
}

// aCopy is one copy on disk, or what there is of it.
type aCopy struct {
	uid     types.UID
	dir     string
	partial bool // it has not the name of a whole one
	used    time.Time
}

// list finds all copies.
func (c *copies) list() ([]aCopy, error) {
	entries, err := os.ReadDir(c.store.copiesRoot())
	if err != nil {
		return nil, fmt.Errorf("list copies of checkpoints: %w", err)
	}
	var all []aCopy
	for _, e := range entries {
		name, partial := strings.CutPrefix(e.Name(), fetchingIntro)
		if !partial {
			name, partial = strings.CutPrefix(e.Name(), earlyIntro)
		}
		uid := types.UID(name)
		if validUID(uid) != nil || !e.IsDir() {
			continue
		}
		dir := filepath.Join(c.store.copiesRoot(), e.Name())
		used, err := lastTouched(dir, partial)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("list copies of checkpoints: %w", err)
		}
		all = append(all, aCopy{uid, dir, partial, used})
	}
	return all, nil
}

// lastTouched is when a copy was used, or when the last byte of a part of one came.
func lastTouched(dir string, deep bool) (last time.Time, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.ModTime().After(last) {
			last = info.ModTime()
		}
		if !deep {
			return fs.SkipAll
		}
		return nil
	})
	return last, err
}

// remove removes a copy that nobody uses.
func (c *copies) remove(a aCopy, why string) (bool, error) {
	aside, err := c.takeAside(a)
	if aside == "" || err != nil {
		return false, err
	}
	if err := os.RemoveAll(aside); err != nil {
		return false, fmt.Errorf("remove the copy of a checkpoint: %w", err)
	}
	c.log.Info("a copy of another node's checkpoint removed", "uid", a.uid, "because", why)
	return true, nil
}

// takeAside moves a copy that nobody uses out of the way, so that nobody finds half of
// it; empty if somebody does. To remove it takes long, and nobody waits for that.
func (c *copies) takeAside(a aCopy) (aside string, err error) {
	used, err := c.inUse()
	if err != nil {
		return "", fmt.Errorf("find out which checkpoints restores use: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	handed, known := c.handed[a.uid]
	if c.under[a.uid] != nil || slices.Contains(used, a.dir) || known && c.now().Sub(handed) < handedFor {
		return "", nil
	}
	if !a.partial {
		delete(c.handed, a.uid)
		delete(c.news, a.uid)
	}
	aside, err = os.MkdirTemp(c.store.copiesRoot(), removingPrefix)
	if err == nil {
		err = os.Rename(a.dir, filepath.Join(aside, string(a.uid)))
	}
	if err != nil {
		return "", fmt.Errorf("remove the copy of a checkpoint: %w", err)
	}
	if err := c.forgetRecord(a.uid); err != nil {
		return "", fmt.Errorf("remove the copy of a checkpoint: %w", err)
	}
	return aside, nil
}

// forgetRecord removes the record of a copy of which nothing is left, under any name.
func (c *copies) forgetRecord(uid types.UID) error {
	for _, dir := range []string{c.store.copyPath(uid), c.store.fetchingPath(uid), c.store.earlyPath(uid)} {
		if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := os.Remove(c.store.copyRecordPath(uid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// Start looks after copies until ctx ends. It implements manager.Runnable.
func (c *copies) Start(ctx context.Context) error {
	for {
		if err := c.tidy(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn("looking for copies of checkpoints that are not needed any more failed", "error", err)
		}
		select {
		case <-ctx.Done():
			c.stop()
			return nil
		case <-time.After(copiesEvery):
		}
	}
}

// stop ends all fetches and waits for them. What they brought stays for the next agent.
func (c *copies) stop() {
	c.mu.Lock()
	var under []*fetching
	for _, f := range c.under {
		under = append(under, f)
	}
	c.mu.Unlock()
	for _, f := range under {
		f.cancel()
		<-f.done
	}
}

// tidy removes what is not needed: one question to the API server for each copy.
func (c *copies) tidy(ctx context.Context) error {
	all, err := c.list()
	if err != nil {
		return err
	}
	failures := []error{c.removeStrays(all), c.removeHalves()}
	whole := map[types.UID]bool{}
	for _, a := range all {
		whole[a.uid] = whole[a.uid] || !a.partial
	}
	for _, a := range all {
		why := ""
		gone, err := c.objectGone(ctx, a.uid)
		unused := c.now().Sub(a.used)
		switch {
		case err != nil:
			failures = append(failures, err)
			continue
		case gone:
			why = "its PodCheckpoint is gone"
		case a.partial && whole[a.uid]:
			why = "all of it is here"
		case a.partial && unused > abandonedAfter:
			why = "nobody goes on fetching it"
		case !a.partial && unused > c.keep:
			why = "it has not been used for " + unused.Round(time.Second).String()
		default:
			continue
		}
		if _, err := c.remove(a, why); err != nil {
			failures = append(failures, err)
		}
	}
	return errors.Join(failures...)
}

// removeHalves removes what an agent that was killed had half removed or half written.
func (c *copies) removeHalves() error {
	entries, err := os.ReadDir(c.store.copiesRoot())
	if err != nil {
		return fmt.Errorf("look for leftovers of copies: %w", err)
	}
	var failures []error
	for _, e := range entries {
		// A record that is being written now is younger.
		old := false
		if info, err := e.Info(); err == nil {
			old = c.now().Sub(info.ModTime()) > time.Minute
		}
		if old && (strings.HasPrefix(e.Name(), removingPrefix) || strings.HasPrefix(e.Name(), ".tmp-")) {
			failures = append(failures, os.RemoveAll(filepath.Join(c.store.copiesRoot(), e.Name())))
		}
	}
	return errors.Join(failures...)
}

// readCopyRecord returns nil where it is not known whose a copy is.
func (s *store) readCopyRecord(uid types.UID) (*copyRecord, error) {
	text, err := os.ReadFile(s.copyRecordPath(uid))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("read whose copy it is: %w", err)
	}
	var record copyRecord
	if err := json.Unmarshal(text, &record); err != nil || record.UID != uid {
		return nil, nil
	}
	return &record, nil
}

// objectGone says whether the PodCheckpoint of a copy does not exist any more. One
// that is being deleted is not restored from any more either.
func (c *copies) objectGone(ctx context.Context, uid types.UID) (bool, error) {
	record, err := c.store.readCopyRecord(uid)
	if err != nil {
		return false, err
	} else if record == nil {
		return true, nil // whose it is is not known: it can be fetched again
	}
	var pcp v1alpha1.PodCheckpoint
	err = c.live.Get(ctx, types.NamespacedName{Namespace: record.Namespace, Name: record.Name}, &pcp)
	if apierrors.IsNotFound(err) {
		return true, nil
	} else if err != nil {
		return false, fmt.Errorf("read the PodCheckpoint of a copy: %w", err)
	}
	return pcp.UID != uid || pcp.DeletionTimestamp != nil, nil
}

// removeStrays removes records of copies that are not there.
func (c *copies) removeStrays(all []aCopy) error {
	there := map[string]bool{}
	for _, a := range all {
		there[string(a.uid)+copySuffix] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for uid := range c.under {
		there[string(uid)+copySuffix] = true
	}
	entries, err := os.ReadDir(c.store.copiesRoot())
	if err != nil {
		return fmt.Errorf("look for leftovers of copies: %w", err)
	}
	var failures []error
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), copySuffix) && !there[e.Name()] {
			failures = append(failures, os.Remove(filepath.Join(c.store.copiesRoot(), e.Name())))
		}
	}
	return errors.Join(failures...)
}
