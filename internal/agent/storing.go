package agent

import (
	"cmp"
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
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	checkpointstore "podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/stores"
)

const (
	// storeFirstDelay and storeMaxDelay are between two attempts to reach a store: it may
	// be away for a night. Each attempt has retries of its own for what passes soon.
	storeFirstDelay = 2 * time.Second
	storeMaxDelay   = 2 * time.Minute
	// storeTelling is how often watchers are told how far a checkpoint is. That it does not
	// go on they are told as soon as storeLooking later.
	storeTelling = 5 * time.Second
	storeLooking = time.Second
	// maxStoring is how many checkpoints of a node are brought to stores at a time. Those
	// whose store has answered are written one after the other.
	maxStoring = 8
)

// pending says that a checkpoint was captured and is not yet where it is to be kept.
func (rec *record) pending() bool {
	return rec.StoreName != "" && rec.Data != "" && rec.Status.Store == nil
}

// openStores opens a CheckpointStore. waiting is told of each request that failed and is
// tried again; it may be nil.
type openStores func(ctx context.Context, of *v1alpha1.CheckpointStore, waiting func(error)) (s *checkpointstore.Store, closeIt func() error, err error)

// retryOpener opens stores whose requests are tried again by a policy.
func retryOpener(o stores.Opener, retry backend.Policy) openStores {
	return func(ctx context.Context, of *v1alpha1.CheckpointStore, waiting func(error)) (*checkpointstore.Store, func() error, error) {
		o := o
		o.Retry = retry
		if waiting != nil {
			o.Retry.Waiting = func(_, _ string, err error, _ time.Duration) { waiting(err) }
		}
		return o.Open(ctx, of)
	}
}

// storing brings checkpoints that were captured into their stores. The Pod runs on
// long since; only Ready waits for it, for as long as the store is away, until the
// object is deleted.
type storing struct {
	client client.Client
	live   client.Reader
	store  *store
	open   openStores
	// done is told of a checkpoint that is stored; its record says so.
	done  func(ctx context.Context, log *slog.Logger, rec *record)
	first time.Duration // between two attempts, at first
	log   *slog.Logger
	now   func() time.Time

	alive   context.Context // until end
	end     context.CancelFunc
	turns   chan struct{} // to try
	writing chan struct{} // to write, which takes memory
	mu      sync.Mutex
	jobs    map[types.UID]*storeJob
	all     sync.WaitGroup
}

type storeJob struct {
	cancel context.CancelFunc
	ended  chan struct{}
}

func newStoring(s *storing) *storing {
	s.alive, s.end = context.WithCancel(context.Background())
	s.turns, s.writing, s.jobs = make(chan struct{}, maxStoring), make(chan struct{}, 1), map[types.UID]*storeJob{}
	return s
}

// Start implements manager.Runnable: when it returns nothing is being stored. What was
// goes on with the next start, from where it was.
func (s *storing) Start(ctx context.Context) error {
	<-ctx.Done()
	s.mu.Lock()
	s.end()
	s.mu.Unlock()
	s.all.Wait()
	return nil
}

// begin has a checkpoint stored, unless it is being stored already.
func (s *storing) begin(rec *record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.jobs[rec.UID] != nil || s.alive.Err() != nil {
		return
	}
	ctx, cancel := context.WithCancel(s.alive)
	job := &storeJob{cancel, make(chan struct{})}
	s.jobs[rec.UID] = job
	s.all.Go(func() {
		defer func() {
			cancel()
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.jobs, rec.UID)
			close(job.ended)
		}()
		s.run(ctx, rec)
	})
}

// stop ends the storing of a checkpoint, and says whether there is none any more.
func (s *storing) stop(uid types.UID) bool {
	s.mu.Lock()
	job := s.jobs[uid]
	s.mu.Unlock()
	if job == nil {
		return true
	}
	job.cancel()
	select {
	case <-job.ended:
		return true
	case <-time.After(soon):
		return false
	}
}

func (s *storing) run(ctx context.Context, rec *record) {
	log := s.log.With("podcheckpoint", rec.Namespace+"/"+rec.Name, "uid", rec.UID, "store", rec.StoreName)
	begun := s.now()
	for delay := s.first; ; delay = min(2*delay, storeMaxDelay) {
		over, err := take(ctx, s.turns) // given back after each attempt: a store may be away for long
		if err != nil {
			return
		}
		err = s.put(ctx, rec)
		over()
		switch {
		case err == nil:
			log.Info("checkpoint stored", "took", s.now().Sub(begun), "newBytes", rec.Status.Store.NewBytes)
			s.done(ctx, log, rec)
			return
		case ctx.Err() != nil:
			return
		case errors.Is(err, errDeleted):
			s.done(ctx, log, rec) // which removes what belongs to no object
			return
		}
		log.Warn("the checkpoint could not be stored, trying again", "error", err, "in", delay)
		s.say(ctx, rec, fmt.Sprintf("Captured, and not stored in CheckpointStore %s yet; it is tried again in %s: %v", rec.StoreName, delay, err))
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
	}
}

// take waits for one of so many turns. over gives it back.
func take(ctx context.Context, turns chan struct{}) (over func(), err error) {
	select {
	case turns <- struct{}{}:
		return func() { <-turns }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// put stores a checkpoint, and puts on record that it is.
func (s *storing) put(ctx context.Context, rec *record) error {
	var pcp v1alpha1.PodCheckpoint
	err := s.live.Get(ctx, types.NamespacedName{Namespace: rec.Namespace, Name: rec.Name}, &pcp)
	if apierrors.IsNotFound(err) || err == nil && (pcp.UID != rec.UID || !pcp.DeletionTimestamp.IsZero()) {
		return errDeleted
	} else if err != nil {
		return fmt.Errorf("read the PodCheckpoint: %w", err)
	}
	var of v1alpha1.CheckpointStore
	if err := s.live.Get(ctx, types.NamespacedName{Name: rec.StoreName}, &of); apierrors.IsNotFound(err) {
		return fmt.Errorf("there is no CheckpointStore %s", rec.StoreName)
	} else if err != nil {
		return fmt.Errorf("read the CheckpointStore: %w", err)
	}
	if of.Status.ClusterID == "" {
		return fmt.Errorf("stasis-controller has not opened CheckpointStore %s yet", rec.StoreName)
	}
	dir := s.store.dataPath(rec.Data)
	m, _, err := checkpoint.ReadManifest(dir)
	if err != nil {
		return fmt.Errorf("read the checkpoint: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open the checkpoint: %w", err)
	}
	defer root.Close()
	var far howFar
	stop := s.follow(ctx, rec, m.LogicalBytes(), &far)
	defer stop()
	into, closeIt, err := s.open(ctx, &of, far.waits)
	if err != nil {
		return err
	}
	defer closeIt()
	stored, err := into.Put(ctx, root.FS(), checkpointstore.PutOptions{
		Labels: storeLabels(rec, &of), ManifestDigest: rec.Status.ManifestDigest, Alike: alike(rec, m),
		Journal: &storeJournal{store: s.store, uid: rec.UID}, Progress: far.comes,
		Turn: func(ctx context.Context) (func(), error) { return take(ctx, s.writing) },
	})
	stop()
	if err != nil {
		return fmt.Errorf("store the checkpoint: %w", err)
	}
	in := &v1alpha1.StoredCheckpoint{Name: rec.StoreName, StoreID: into.ID(), CheckpointID: stored.ID.String(), NewBytes: stored.NewBytes}
	if err := sayShares(ctx, in, into, stored); err != nil {
		return err
	}
	// Only what is written counts: an attempt that could not write it is made again.
	with := *rec
	with.Status = *rec.Status.DeepCopy()
	with.Status.Store = in
	now := metav1.NewTime(s.now())
	with.Status.CompletionTime = &now
	if c := readyCondition(&v1alpha1.PodCheckpoint{Status: with.Status}); c != nil {
		setReady(&with.Status, c.ObservedGeneration, now, c.Reason, fmt.Sprintf("%s, stored in %s with %s", c.Message, rec.StoreName, binaryBytes(stored.NewBytes)))
	}
	if err := s.store.writeRecord(&with); err != nil {
		return err
	}
	*rec = with
	return nil
}

// sayShares says what a checkpoint that is stored has in common with others.
func sayShares(ctx context.Context, in *v1alpha1.StoredCheckpoint, into *checkpointstore.Store, stored checkpointstore.Checkpoint) error {
	s := stored.Shares
	if s == nil {
		return nil
	}
	share := func(of checkpointstore.Share) *v1alpha1.StoredShare {
		return &v1alpha1.StoredShare{Bytes: of.Bytes, ZeroBytes: of.Zeros, PresentBytes: of.Present, PreviousBytes: of.Previous}
	}
	in.Memory, in.Files = share(s.Memory), share(s.Files)
	if s.Previous == (checkpointstore.ID{}) {
		return nil
	}
	in.Previous = &v1alpha1.PreviousCheckpoint{CheckpointID: s.Previous.String()}
	before, err := into.Describe(ctx, s.Previous)
	if errors.Is(err, checkpointstore.ErrMissing) || errors.Is(err, checkpointstore.ErrCorrupt) {
		return nil // deleted meanwhile, or what verification finds
	} else if err != nil {
		return fmt.Errorf("read the previous checkpoint: %w", err)
	}
	// Other clusters may have a namespace and a Pod of these names.
	if before.Labels[v1alpha1.StoreLabelCluster] == stored.Labels[v1alpha1.StoreLabelCluster] && before.Labels[v1alpha1.StoreLabelNamespace] == stored.Labels[v1alpha1.StoreLabelNamespace] {
		in.Previous.Name = nameIn(before.Labels[v1alpha1.StoreLabelName])
		in.Previous.PodName = nameIn(before.Labels[v1alpha1.StoreLabelPod])
	}
	return nil
}

// nameIn is a name that came from a store, or nothing if the API would not take it.
func nameIn(label string) string {
	if len(validation.IsDNS1123Subdomain(label)) > 0 {
		return ""
	}
	return label
}

// storeLabels are a checkpoint's in its store. The controller knows by them whose it is.
func storeLabels(rec *record, of *v1alpha1.CheckpointStore) map[string]string {
	labels := map[string]string{
		v1alpha1.StoreLabelCluster: of.Status.ClusterID, v1alpha1.StoreLabelNamespace: rec.Namespace,
		v1alpha1.StoreLabelName: rec.Name, v1alpha1.StoreLabelUID: string(rec.UID),
		v1alpha1.StoreLabelPod: rec.PodName, v1alpha1.StoreLabelPodUID: string(rec.PodUID), v1alpha1.StoreLabelNode: rec.Status.NodeName,
	}
	if rec.Workload != "" {
		labels[v1alpha1.StoreLabelWorkload] = rec.Workload
	}
	return labels
}

// workloadOf is KIND/NAME of a Pod's controller; empty if it has none.
func workloadOf(pod *corev1.Pod) string {
	if owner := metav1.GetControllerOf(pod); owner != nil {
		return owner.Kind + "/" + owner.Name
	}
	return ""
}

// alike says which other checkpoints have much in common with one: of the same Pod, and
// of the same images, in the same namespace.
func alike(rec *record, m *checkpoint.Manifest) []string {
	var images []string
	for _, c := range m.Containers {
		images = append(images, c.Name+"="+cmp.Or(c.ImageID, c.Image))
	}
	slices.Sort(images)
	return []string{
		"pod\x00" + rec.Namespace + "\x00" + rec.PodName,
		"images\x00" + rec.Namespace + "\x00" + strings.Join(images, "\x00"),
	}
}

// howFar is how much of a checkpoint has been worked through, and what stands in the way.
type howFar struct {
	mu   sync.Mutex
	done int64
	wait error
}

func (f *howFar) comes(done int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.done, f.wait = max(f.done, done), nil
}

func (f *howFar) waits(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wait = err
}

func (f *howFar) read() (done int64, wait error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.done, f.wait
}

// follow tells watchers how far a checkpoint is, until the returned function is called.
func (s *storing) follow(ctx context.Context, rec *record, total int64, far *howFar) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	group.Go(func() {
		var said time.Time
		waited := false
		for last := ""; ; {
			select {
			case <-time.After(storeLooking): // what is over by then is told by its outcome
			case <-ctx.Done():
				return
			}
			done, wait := far.read()
			percent := 100 * done / max(total, 1)
			message := fmt.Sprintf("Captured, and being stored in CheckpointStore %s: %d %% of %s", rec.StoreName, percent, binaryBytes(total))
			if wait != nil {
				message = fmt.Sprintf("Captured, and not stored in CheckpointStore %s yet (%d %% of %s); it is tried again: %v", rec.StoreName, percent, binaryBytes(total), wait)
			}
			if message != last && (s.now().Sub(said) >= storeTelling || waited != (wait != nil)) {
				s.say(ctx, rec, message)
				last, said, waited = message, s.now(), wait != nil
			}
		}
	})
	return func() { cancel(); group.Wait() }
}

// say writes how far it is into the object's condition: for watchers only.
func (s *storing) say(ctx context.Context, rec *record, message string) {
	ctx, cancel := context.WithTimeout(ctx, stagePatience)
	defer cancel()
	var pcp v1alpha1.PodCheckpoint
	err := s.live.Get(ctx, types.NamespacedName{Namespace: rec.Namespace, Name: rec.Name}, &pcp)
	if err == nil && pcp.UID == rec.UID && !terminal(&pcp) {
		before := pcp.DeepCopy()
		setReady(&pcp.Status, pcp.Generation, metav1.NewTime(s.now()), v1alpha1.ReasonCheckpointInProgress, message)
		err = s.client.Status().Patch(ctx, &pcp, changed(before))
	}
	if err != nil && ctx.Err() == nil {
		s.log.Debug("how far a checkpoint is was not told", "podcheckpoint", rec.Namespace+"/"+rec.Name, "error", err)
	}
}

// storeJournal remembers on this node what of a checkpoint is in its store.
type storeJournal struct {
	store *store
	uid   types.UID
	mu    sync.Mutex
}

type storeJournalFile struct {
	Packs []storeJournalPack `json:"packs"`
	Root  string             `json:"root,omitempty"`
}

type storeJournalPack struct {
	ID   string `json:"id"`
	Size int64  `json:"size"`
}

func (s *store) storingPath(uid types.UID) string {
	return filepath.Join(s.dir, storingDir, string(uid)+".json")
}

func (s *store) removeStoring(uid types.UID) error {
	if err := os.Remove(s.storingPath(uid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the journal of what is stored: %w", err)
	}
	return nil
}

// read reads the journal. One that nobody can read any more is as none: what it named is
// written again, and collected where no checkpoint uses it.
func (j *storeJournal) read() (storeJournalFile, error) {
	var f storeJournalFile
	data, err := os.ReadFile(j.store.storingPath(j.uid))
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	} else if err != nil {
		return f, err
	}
	if json.Unmarshal(data, &f) == nil {
		if _, _, err := f.decode(); err == nil {
			return f, nil
		}
	}
	return storeJournalFile{}, nil
}

// Read implements store.Journal.
func (j *storeJournal) Read() (packs []checkpointstore.Pack, root *checkpointstore.ID, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	f, err := j.read()
	if err != nil {
		return nil, nil, err
	}
	return f.decode()
}

func (f *storeJournalFile) decode() (packs []checkpointstore.Pack, root *checkpointstore.ID, err error) {
	for _, p := range f.Packs {
		id, err := checkpointstore.ParseID(p.ID)
		if err != nil {
			return nil, nil, err
		}
		packs = append(packs, checkpointstore.Pack{ID: id, Size: p.Size})
	}
	if f.Root != "" {
		id, err := checkpointstore.ParseID(f.Root)
		if err != nil {
			return nil, nil, err
		}
		root = &id
	}
	return packs, root, nil
}

func (j *storeJournal) change(change func(*storeJournalFile)) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	f, err := j.read()
	if err != nil {
		return err
	}
	change(&f)
	data, err := json.Marshal(f)
	if err != nil {
		return err
	}
	return checkpoint.WriteFile(j.store.storingPath(j.uid), data, 0o600)
}

// AddPack implements store.Journal.
func (j *storeJournal) AddPack(p checkpointstore.Pack) error {
	return j.change(func(f *storeJournalFile) { f.Packs = append(f.Packs, storeJournalPack{p.ID.String(), p.Size}) })
}

// SetRoot implements store.Journal.
func (j *storeJournal) SetRoot(id checkpointstore.ID) error {
	return j.change(func(f *storeJournalFile) { f.Root = id.String() })
}
