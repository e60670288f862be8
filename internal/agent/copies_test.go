package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
)

// elsewhere is a checkpoint that another node holds.
type elsewhere struct {
	dir    string
	digest string
	bytes  int64
	pcp    *v1alpha1.PodCheckpoint
}

// newElsewhere makes a sealed checkpoint with files of random bytes.
func newElsewhere(t *testing.T, sizes ...int) *elsewhere {
	t.Helper()
	noise := rand.NewChaCha8([32]byte{1})
	files := map[string][]byte{}
	for i, size := range sizes {
		data := make([]byte, size)
		noise.Read(data)
		files[fmt.Sprintf("containers/a/criu/pages-%d.img", i)] = data
	}
	return sealedElsewhere(t, files)
}

// sealedElsewhere makes a checkpoint of files.
func sealedElsewhere(t *testing.T, files map[string][]byte) *elsewhere {
	t.Helper()
	e := &elsewhere{dir: t.TempDir()}
	for name, data := range files {
		file := filepath.Join(e.dir, filepath.FromSlash(name))
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, data, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	m := &checkpoint.Manifest{Engine: checkpoint.Program{Name: "criu", Version: "4.2"}, Containers: []checkpoint.Container{{Name: "a"}}}
	var err error
	if e.digest, err = checkpoint.Seal(t.Context(), e.dir, m); err != nil {
		t.Fatal(err)
	}
	e.bytes = m.LogicalBytes()
	e.pcp = makePCP(withReason(v1alpha1.ReasonCheckpointCompleted))
	e.pcp.Status.NodeName, e.pcp.Status.ManifestDigest = "node-2", e.digest
	return e
}

// fakeOrigin reads what another node holds, and does to it what a test wants.
type fakeOrigin struct {
	dir string

	mu    sync.Mutex
	opens int
	pods  []types.UID
	known types.UID // of a Pod that it has given something to
	// open is asked before each part, spoil given its bytes; nil: nothing happens.
	open  func(ctx context.Context, opens int, file string, offset int64) error
	spoil func(opens int, file string, body []byte) ([]byte, error)
}

func (o *fakeOrigin) of(_ *v1alpha1.PodCheckpoint, pod *corev1.Pod) (origin, error) {
	o.For(pod)
	return o, nil
}

func (o *fakeOrigin) Name() string { return "node node-2" }
func (o *fakeOrigin) Close()       {}

func (o *fakeOrigin) knows(pod types.UID) bool { return pod == o.known }
func (o *fakeOrigin) For(pod *corev1.Pod) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pods = append(o.pods, pod.UID)
}

func (o *fakeOrigin) Open(ctx context.Context, file string, offset, length int64) (io.ReadCloser, error) {
	o.mu.Lock()
	o.opens++
	opens := o.opens
	o.mu.Unlock()
	if o.open != nil {
		if err := o.open(ctx, opens, file, offset); err != nil {
			return nil, err
		}
	}
	data, err := os.ReadFile(filepath.Join(o.dir, file))
	if err != nil {
		return nil, err
	}
	if length >= 0 {
		data = data[offset : offset+length]
	}
	var broken error
	if o.spoil != nil {
		data, broken = o.spoil(opens, file, bytes.Clone(data))
	}
	if broken == nil {
		broken = io.EOF
	}
	return io.NopCloser(io.MultiReader(bytes.NewReader(data), failingReader{broken})), nil
}

type failingReader struct{ err error }

func (f failingReader) Read([]byte) (int, error) { return 0, f.err }

// newTestCopies fetches from an origin.
func newTestCopies(t *testing.T, from *fakeOrigin, objects ...client.Object) (*copies, *harness) {
	t.Helper()
	h := newHarness(t, objects...)
	if err := os.MkdirAll(h.store.copiesRoot(), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &copies{
		store: h.store, room: newRoom(DiskLimits{MaxShare: 1, MinFree: 0}, h.store.checkpointRoot()), live: h.client, origins: from,
		inUse: func() ([]string, error) { return nil, nil }, tell: func(context.Context, podRef, string) error { return nil },
		keep: time.Hour, wait: time.Minute, metrics: NewMetrics(prometheus.NewRegistry()), log: slog.New(slog.DiscardHandler), now: time.Now,
		alive: ctx, turn: make(chan struct{}, maxFetches),
	}
	t.Cleanup(func() { stop(); c.stop() })
	return c, h
}

func whole(t *testing.T, dir string, e *elsewhere) {
	t.Helper()
	if _, err := checkpoint.Verify(t.Context(), dir, e.digest); err != nil {
		t.Errorf("the copy: %v", err)
	}
}

// reasonOf is that of a refusal.
func reasonOf(err error) string {
	var no *nodeapi.Error
	if errors.As(err, &no) {
		return no.Reason
	}
	return ""
}

func TestACheckpointOfAnotherNodeIsFetchedWhole(t *testing.T) {
	e := newElsewhere(t, 3<<20, 0, 17)
	from := &fakeOrigin{dir: e.dir}
	c, h := newTestCopies(t, from)
	var news string
	c.tell = func(_ context.Context, pod podRef, message string) error {
		news = string(pod.uid) + ": " + message
		return nil
	}
	dir, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if err != nil {
		t.Fatal(err)
	}
	whole(t, dir, e)
	if !strings.HasPrefix(dir, h.store.checkpointRoot()+"/") {
		t.Errorf("in %s, where the disk's budget does not count it", dir)
	}
	if want := string(restoredUID) + ": The data of PodCheckpoint cp have come from node node-2: 3Mi in "; !strings.HasPrefix(news, want) {
		t.Errorf("told %q", news)
	}
	opens := from.opens
	again, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if err != nil || again != dir || from.opens != opens {
		t.Errorf("a second restore: %s, %v, %d parts fetched", again, err, from.opens-opens)
	}
	if held, err := h.store.held(); err != nil || len(held) != 0 {
		t.Errorf("a copy passes for data that this node holds: %v, %v", held, err)
	}
}

func TestRestoresOfOneCheckpointFetchItOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pods = 8
		e := newElsewhere(t, 1<<20)
		from := &fakeOrigin{dir: e.dir}
		from.open = func(ctx context.Context, _ int, _ string, _ int64) error {
			for { // until all have asked
				from.mu.Lock()
				asked := len(from.pods)
				from.mu.Unlock()
				if asked >= pods {
					return nil
				}
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(time.Millisecond):
				}
			}
		}
		c, _ := newTestCopies(t, from)
		var all sync.WaitGroup
		for i := range pods {
			all.Go(func() {
				pod := restoringPod(func(p *corev1.Pod) { p.UID = types.UID(fmt.Sprintf("pod-%d", i)) })
				if _, _, err := c.need(t.Context(), e.pcp, pod, pages.ModeEager); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if got := testutil.ToFloat64(c.metrics.fetchedBytes); got > float64(e.bytes)+8<<10 {
			t.Errorf("%v bytes came of %d", got, e.bytes)
		}
	})
}

func TestAFetchGoesOnWhereItsConnectionBroke(t *testing.T) {
	e := newElsewhere(t, 4<<20)
	from := &fakeOrigin{dir: e.dir, spoil: func(opens int, file string, body []byte) ([]byte, error) {
		if file == checkpoint.ManifestName || opens > 6 {
			return body, nil
		}
		return body[:min(len(body), 700_000)], errors.New("connection reset")
	}}
	c, _ := newTestCopies(t, from)
	dir, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if err != nil {
		t.Fatal(err)
	}
	whole(t, dir, e)
	manifest, err := os.Stat(filepath.Join(e.dir, checkpoint.ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := testutil.ToFloat64(c.metrics.fetchedBytes), float64(e.bytes+manifest.Size()); got != want {
		t.Errorf("%v bytes came, there are %v", got, want)
	}
}

func TestAConnectionOnWhichNothingComesIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElsewhere(t, 1<<20)
		from := &fakeOrigin{dir: e.dir, open: func(ctx context.Context, opens int, file string, _ int64) error {
			if opens == 2 {
				<-ctx.Done()
				return ctx.Err()
			}
			return nil
		}}
		f := &fetch{from: from, dir: t.TempDir(), digest: e.digest, stall: 50 * time.Millisecond, patience: time.Minute, received: func(int) {}, progress: &progress{}, now: time.Now}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if err := f.run(ctx, func(int64) (func(), error) { return func() {}, nil }); err != nil {
			t.Fatal(err)
		}
		whole(t, f.dir, e)
		if f.progress.broken != 1 {
			t.Errorf("%d broken connections", f.progress.broken)
		}
	})
}

func TestAFetchThatGetsNowhereEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElsewhere(t, 1<<20)
		from := &fakeOrigin{dir: e.dir, open: func(context.Context, int, string, int64) error { return errors.New("no route to host") }}
		f := &fetch{from: from, dir: t.TempDir(), digest: e.digest, stall: time.Second, patience: 200 * time.Millisecond, received: func(int) {}, progress: &progress{}, now: time.Now}
		err := f.run(t.Context(), func(int64) (func(), error) { return func() {}, nil })
		if err == nil || !strings.Contains(err.Error(), "nothing has come for") || !strings.Contains(err.Error(), "no route to host") {
			t.Errorf("%v", err)
		}
	})
}

func TestAnAgentGoesOnWhereTheOneBeforeItWasKilled(t *testing.T) {
	e := newElsewhere(t, 3<<20, 1<<20)
	c, h := newTestCopies(t, &fakeOrigin{dir: e.dir})
	left := filepath.Join(h.store.fetchingPath(e.pcp.UID), "containers/a/criu")
	part, err := os.ReadFile(filepath.Join(e.dir, "containers/a/criu/pages-0.img"))
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(os.MkdirAll(left, 0o700),
		os.WriteFile(filepath.Join(left, "pages-0.img"), part[:2<<20], 0o600),
		os.WriteFile(filepath.Join(left, "stray"), []byte("x"), 0o600),
		os.Symlink("/etc/passwd", filepath.Join(left, "pages-1.img")))
	if err != nil {
		t.Fatal(err)
	}
	dir, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if err != nil {
		t.Fatal(err)
	}
	whole(t, dir, e)
	if got := testutil.ToFloat64(c.metrics.fetchedBytes); got > 2<<20+8<<10 {
		t.Errorf("%v bytes came, though 2 MiB of 4 were there", got)
	}
}

func TestWhatWasLeftDamagedIsFetchedAnew(t *testing.T) {
	e := newElsewhere(t, 1<<20)
	c, h := newTestCopies(t, &fakeOrigin{dir: e.dir})
	left := filepath.Join(h.store.fetchingPath(e.pcp.UID), "containers/a/criu")
	if err := errors.Join(os.MkdirAll(left, 0o700), os.WriteFile(filepath.Join(left, "pages-0.img"), make([]byte, 600_000), 0o600)); err != nil {
		t.Fatal(err)
	}
	dir, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if err != nil {
		t.Fatal(err)
	}
	whole(t, dir, e)
}

func TestOneFlippedBitOnTheWayIsFetchedAgainAndInTheEndRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		file  string
		times int
		ok    bool
	}{
		"once in a file":          {"containers/a/criu/pages-0.img", 1, true},
		"always in a file":        {"containers/a/criu/pages-0.img", 100, false},
		"once in the manifest":    {checkpoint.ManifestName, 1, true},
		"always in the manifest":  {checkpoint.ManifestName, 100, false},
		"at the end of a restart": {"containers/a/criu/pages-0.img", 2, true},
	} {
		t.Run(name, func(t *testing.T) {
			e := newElsewhere(t, 100_000)
			flipped := 0
			c, h := newTestCopies(t, &fakeOrigin{dir: e.dir, spoil: func(_ int, file string, body []byte) ([]byte, error) {
				if file == tc.file && flipped < tc.times {
					flipped++
					body[len(body)/2] ^= 4
				}
				return body, nil
			}})
			dir, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
			if tc.ok {
				if err != nil {
					t.Fatal(err)
				}
				whole(t, dir, e)
				return
			}
			if reasonOf(err) != v1alpha1.EventCheckpointDataCorrupt || !strings.Contains(err.Error(), filepath.Base(tc.file)) {
				t.Errorf("%s: %v", reasonOf(err), err)
			}
			if _, err := os.Lstat(h.store.copyPath(e.pcp.UID)); err == nil {
				t.Error("a damaged copy is there to be used")
			}
		})
	}
}

func TestAnOriginThatSendsMoreOrLessIsNotBelieved(t *testing.T) {
	e := newElsewhere(t, 100_000, 50_000)
	less := 0
	c, _ := newTestCopies(t, &fakeOrigin{dir: e.dir, spoil: func(opens int, file string, body []byte) ([]byte, error) {
		switch {
		case strings.HasSuffix(file, "pages-0.img"):
			return append(body, make([]byte, 1<<20)...), nil
		case strings.HasSuffix(file, "pages-1.img") && less == 0:
			less++
			return body[:10], nil
		}
		return body, nil
	}})
	dir, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if err != nil {
		t.Fatal(err)
	}
	whole(t, dir, e)
}

func TestASandboxIsAnsweredSoonWithHowFarItsFetchIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElsewhere(t, 4<<20)
		goOn := make(chan struct{})
		c, _ := newTestCopies(t, &fakeOrigin{dir: e.dir, spoil: func(opens int, file string, body []byte) ([]byte, error) {
			if file == checkpoint.ManifestName || opens > 2 {
				return body, nil
			}
			return body[:2<<20], errors.New("connection reset")
		}, open: func(ctx context.Context, opens int, _ string, _ int64) error {
			if opens < 3 {
				return nil
			}
			select {
			case <-goOn:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}})
		c.wait = 300 * time.Millisecond
		began := time.Now()
		_, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("answered after %s", took)
		}
		if reasonOf(err) != v1alpha1.EventCheckpointFetchFailed || !strings.Contains(err.Error(), " % of 4Mi are here, and now it does not go on: receive containers/a/criu/pages-0.img: connection reset") {
			t.Errorf("%s: %v", reasonOf(err), err)
		}
		close(goOn)
		c.wait = time.Minute
		if _, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager); err != nil {
			t.Error(err)
		}
	})
}

func TestAFetchUnderWayIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newElsewhere(t, 1<<20)
		c, _ := newTestCopies(t, &fakeOrigin{dir: e.dir, open: func(ctx context.Context, opens int, _ string, _ int64) error {
			if opens == 1 {
				return nil
			}
			<-ctx.Done()
			return ctx.Err()
		}})
		c.wait = 200 * time.Millisecond
		_, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
		if reasonOf(err) != v1alpha1.EventCheckpointFetching || !strings.Contains(err.Error(), "are being fetched from node node-2: 0 % of 1Mi") {
			t.Errorf("%s: %v", reasonOf(err), err)
		}
	})
}

func TestAnAnswerThatDoesNotChangeEndsAFetchAtOnce(t *testing.T) {
	e := newElsewhere(t, 1<<20)
	c, _ := newTestCopies(t, &fakeOrigin{dir: e.dir, open: func(context.Context, int, string, int64) error {
		return deny(v1alpha1.EventCheckpointDataMissing, "they are not there any more")
	}})
	_, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if reasonOf(err) != v1alpha1.EventCheckpointDataMissing {
		t.Errorf("%s: %v", reasonOf(err), err)
	}
}

func TestWithoutRoomNothingIsFetchedAndNothingIsLeft(t *testing.T) {
	e := newElsewhere(t, 1<<20)
	c, h := newTestCopies(t, &fakeOrigin{dir: e.dir})
	c.room = newRoom(DiskLimits{MaxShare: 1e-12, MinFree: 0}, h.store.checkpointRoot())
	_, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if reasonOf(err) != v1alpha1.EventCheckpointFetchFailed || !strings.Contains(err.Error(), "--max-disk-share") {
		t.Errorf("%s: %v", reasonOf(err), err)
	}
	if entries, err := os.ReadDir(h.store.copiesRoot()); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestACopyThatNobodyUsesMakesRoomForAnother(t *testing.T) {
	first, second := newElsewhere(t, 3<<20), newElsewhere(t, 3<<20)
	second.pcp.UID = "22222222-2222-3333-4444-555555555555"
	from := &fakeOrigin{dir: first.dir}
	c, h := newTestCopies(t, from)
	if _, _, err := c.need(t.Context(), first.pcp, restoringPod(), pages.ModeEager); err != nil {
		t.Fatal(err)
	}
	from.dir = second.dir
	c.room = newRoom(DiskLimits{MaxShare: shareFor(t, h.store.checkpointRoot(), 5<<20), MinFree: 0}, h.store.checkpointRoot())
	if _, _, err := c.need(t.Context(), second.pcp, restoringPod(), pages.ModeEager); reasonOf(err) != v1alpha1.EventCheckpointFetchFailed {
		t.Errorf("in place of a copy that was just handed out: %v", err)
	}
	c.now = func() time.Time { return time.Now().Add(2 * handedFor) }
	dir, _, err := c.need(t.Context(), second.pcp, restoringPod(), pages.ModeEager)
	if err != nil {
		t.Fatal(err)
	}
	whole(t, dir, second)
	if _, err := os.Lstat(h.store.copyPath(first.pcp.UID)); err == nil {
		t.Error("both are there")
	}
}

func TestCopiesGoWithTheirObjectAndWhenNobodyUsesThem(t *testing.T) {
	for name, tc := range map[string]struct {
		object func(*v1alpha1.PodCheckpoint) *v1alpha1.PodCheckpoint // in the API; nil: none
		after  time.Duration
		used   bool
		stays  bool
	}{
		"as long as it is used now and then": {same, 30 * time.Minute, false, true},
		"not when it is not":                 {same, 2 * time.Hour, false, false},
		"while a restore reads it":           {same, 2 * time.Hour, true, true},
		"not without its object":             {none, 30 * time.Minute, false, false},
		"not with another of its name":       {func(p *v1alpha1.PodCheckpoint) *v1alpha1.PodCheckpoint { p.UID = "other"; return p }, 30 * time.Minute, false, false},
		"not while that is being deleted": {func(p *v1alpha1.PodCheckpoint) *v1alpha1.PodCheckpoint {
			p.DeletionTimestamp, p.Finalizers = &metav1.Time{Time: time.Now()}, []string{"x/y"}
			return p
		}, 30 * time.Minute, false, false},
		"a moment after it was given out it stays, whatever comes": {none, time.Second, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			e := newElsewhere(t, 1000)
			var objects []client.Object
			if o := tc.object(e.pcp.DeepCopy()); o != nil {
				objects = append(objects, o)
			}
			c, h := newTestCopies(t, &fakeOrigin{dir: e.dir}, objects...)
			dir, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
			if err != nil {
				t.Fatal(err)
			}
			if tc.used {
				c.inUse = func() ([]string, error) { return []string{dir}, nil }
			}
			c.now = func() time.Time { return time.Now().Add(tc.after) }
			if err := c.tidy(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Lstat(dir); (err == nil) != tc.stays {
				t.Errorf("after %s: %v", tc.after, err)
			}
			if entries, _ := os.ReadDir(h.store.copiesRoot()); !tc.stays && len(entries) > 0 {
				t.Errorf("left: %v", entries)
			}
		})
	}
}

func same(p *v1alpha1.PodCheckpoint) *v1alpha1.PodCheckpoint { return p }
func none(*v1alpha1.PodCheckpoint) *v1alpha1.PodCheckpoint   { return nil }

func TestWhatIsLeftOfAFetchGoesWhenNobodyGoesOn(t *testing.T) {
	e := newElsewhere(t, 1000)
	c, h := newTestCopies(t, &fakeOrigin{dir: e.dir, open: func(_ context.Context, opens int, _ string, _ int64) error {
		if opens > 1 {
			return deny(v1alpha1.EventCheckpointFetchFailed, "no")
		}
		return nil
	}}, e.pcp.DeepCopy())
	if _, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager); err == nil {
		t.Fatal("fetched")
	}
	if err := c.tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(h.store.fetchingPath(e.pcp.UID)); err != nil {
		t.Errorf("gone at once: %v", err)
	}
	c.now = func() time.Time { return time.Now().Add(2 * abandonedAfter) }
	if err := c.tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(h.store.copiesRoot()); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// shareFor is the part of the disk that so many bytes are.
func shareFor(t *testing.T, dir string, bytes int64) float64 {
	t.Helper()
	total, err := diskBytes(dir)
	if err != nil {
		t.Fatal(err)
	}
	return float64(bytes) / float64(total)
}

func diskBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	return int64(st.Blocks) * st.Bsize, err
}

func TestWhatAKilledAgentHadHalfRemovedGoes(t *testing.T) {
	c, h := newTestCopies(t, &fakeOrigin{})
	root := h.store.copiesRoot()
	err := errors.Join(os.MkdirAll(filepath.Join(root, removingPrefix+"1", string(pcpUID)), 0o700),
		os.WriteFile(filepath.Join(root, ".tmp-1"), nil, 0o600), os.WriteFile(filepath.Join(root, string(pcpUID)+copySuffix), []byte("{}"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	c.now = func() time.Time { return time.Now().Add(time.Hour) }
	if err := c.tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(root); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

func TestACopyWhoseRestoreHasBegunIsKeptByThatAlone(t *testing.T) {
	e := newElsewhere(t, 1000)
	c, _ := newTestCopies(t, &fakeOrigin{dir: e.dir})
	dir, _, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if err != nil {
		t.Fatal(err)
	}
	o := &observer{metrics: NewMetrics(prometheus.NewRegistry()), log: slog.New(slog.DiscardHandler), now: time.Now, copies: c}
	o.Began(t.Context(), restoringSandbox())
	c.inUse = func() ([]string, error) { return []string{dir}, nil }
	if err := c.tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dir); err != nil {
		t.Errorf("gone while it is restored from: %v", err)
	}
	c.inUse = func() ([]string, error) { return nil, nil }
	if err := c.tidy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dir); err == nil {
		t.Error("still there, without object and without restore")
	}
}
