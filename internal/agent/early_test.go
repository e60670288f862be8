package agent

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents/images"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/pages/lazy"
	"podstasis.dev/stasis/internal/pages/pagestest"
)

const (
	memoryFile   = "containers/a/criu/pages-1.img"
	memoryBlocks = 200
	eagerBlock   = 100 // of which CRIU reads a page
)

// memoryElsewhere is a checkpoint with memory that may come later.
func memoryElsewhere(t *testing.T) *elsewhere {
	t.Helper()
	const inBlock = checkpoint.BlockSize / images.PageSize
	const lazily = pagestest.Present | pagestest.Lazy
	pageMap := pagestest.Map(t, 1, pagestest.Run{At: 0x10000000, Pages: eagerBlock * inBlock, Flags: lazily},
		pagestest.Run{At: 0x20000000, Pages: 1, Flags: pagestest.Present}, pagestest.Run{At: 0x30000000, Pages: (memoryBlocks-eagerBlock)*inBlock - 1, Flags: lazily})
	memory := make([]byte, memoryBlocks*checkpoint.BlockSize)
	rand.NewChaCha8([32]byte{2}).Read(memory)
	return sealedElsewhere(t, map[string][]byte{memoryFile: memory, "containers/a/criu/pagemap-1.img": pageMap, "containers/a/criu/core-1.img": []byte("core"), "volumes/v.tar": memory[:100<<10]})
}

// slowMemory lets those blocks through that it is told to, and the one that CRIU reads.
type slowMemory struct {
	mu    sync.Mutex
	let   map[int]bool
	all   bool
	more  chan struct{}
	asked map[int]bool // first blocks of parts
}

func (s *slowMemory) open(ctx context.Context, _ int, file string, offset int64) error {
	if file != memoryFile {
		return nil
	}
	block := int(offset / checkpoint.BlockSize)
	for {
		s.mu.Lock()
		if s.let == nil {
			s.let, s.more, s.asked = map[int]bool{eagerBlock: true}, make(chan struct{}), map[int]bool{}
		}
		s.asked[block] = true
		ok, more := s.all || s.let[block], s.more
		s.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-more:
		}
	}
}

func (s *slowMemory) letThrough(blocks ...int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range blocks {
		s.let[b] = true
	}
	s.all = s.all || len(blocks) == 0
	close(s.more)
	s.more = make(chan struct{})
}

// awaitAsked returns when a part that begins with a block has been asked for.
func (s *slowMemory) awaitAsked(t *testing.T, block int) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		asked := s.asked[block]
		s.mu.Unlock()
		if asked {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nobody asks for block %d", block)
		}
	}
}

func memoryBlock(t *testing.T, dir string, block int) []byte {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, memoryFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, checkpoint.BlockSize)
	if _, err := f.ReadAt(b, int64(block)*checkpoint.BlockSize); err != nil {
		t.Fatal(err)
	}
	return b
}

func patientCopies(t *testing.T, from *fakeOrigin, objects ...client.Object) (*copies, *harness) {
	c, h := newTestCopies(t, from, objects...)
	c.wait = time.Hour // real work is done, however slow this machine is
	return c, h
}

func TestAPodIsRestoredBeforeItsMemoryIsHereAndThatComesInTheOrderInWhichItIsNeeded(t *testing.T) {
	e := memoryElsewhere(t)
	slow := &slowMemory{}
	from := &fakeOrigin{dir: e.dir, open: slow.open}
	c, h := patientCopies(t, from)
	said := ""
	c.tell = func(_ context.Context, _ podRef, message string) error {
		said = message
		return nil
	}
	dir, partial, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeLazy)
	if err != nil || !partial {
		t.Fatalf("partial: %v, %v", partial, err)
	}
	if !strings.Contains(said, "Of the data of PodCheckpoint cp, ") || !strings.Contains(said, "of 12.6Mi have come from node node-2") {
		t.Errorf("told %q", said)
	}
	if _, err := c.policy.Verify(t.Context(), dir, e.digest, pages.ModeLazy); err != nil {
		t.Errorf("what CRIU reads: %v", err)
	}
	if _, err := c.policy.Verify(t.Context(), dir, e.digest, pages.ModeEager); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("a part passes for the whole: %v", err)
	}
	if _, err := os.Lstat(h.store.copyPath(e.pcp.UID)); err == nil {
		t.Error("a part has the name of a whole copy")
	}
	block := nodeapi.Block{Sandbox: restoringSandbox(), File: memoryFile, Block: 150, Urgent: true}
	slow.letThrough(150)
	there, trouble, err := c.Block(t.Context(), dir, block)
	if err != nil || !there || !bytes.Equal(memoryBlock(t, dir, 150), memoryBlock(t, e.dir, 150)) {
		t.Fatalf("what a process waits for: %v, %q, %v", there, trouble, err)
	}
	if bytes.Equal(memoryBlock(t, dir, 151), memoryBlock(t, e.dir, 151)) {
		t.Error("what nobody waits for came with it")
	}
	soon, end := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer end()
	if there, _, err := c.Block(soon, dir, nodeapi.Block{File: memoryFile, Block: 30}); there || err != nil {
		t.Errorf("a block that has not come: %v, %v", there, err)
	}
	for _, bad := range []nodeapi.Block{{File: memoryFile, Block: memoryBlocks}, {File: memoryFile, Block: -1}, {File: "volumes/v.tar"}} {
		if _, _, err := c.Block(t.Context(), dir, bad); err == nil {
			t.Errorf("%+v is no block", bad)
		}
	}
	opens := from.opens
	again, partial, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeLazy)
	if err != nil || again != dir || !partial || from.opens > opens+2 {
		t.Errorf("a second restore: %s, %v, %v, %d parts fetched", again, partial, err, from.opens-opens)
	}
	c.inUse = func() ([]string, error) { return []string{dir}, nil }
	slow.letThrough()
	whole1, partial, err := c.need(t.Context(), e.pcp, restoringPod(), pages.ModeEager)
	if err != nil || partial {
		t.Fatalf("who wants it whole: %v, %v", partial, err)
	}
	whole(t, whole1, e)
	whole(t, dir, e)
	if there, _, err := c.Block(t.Context(), dir, block); !there || err != nil {
		t.Errorf("once all is here: %v, %v", there, err)
	}
	// The name that the first Pod knows it by stays as long as that reads it.
	c.now = func() time.Time { return time.Now().Add(handedFor + time.Minute) }
	if err := h.client.Create(t.Context(), e.pcp.DeepCopy()); err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(c.tidy(t.Context()))
	whole(t, dir, e)
	c.inUse = func() ([]string, error) { return nil, nil }
	must(c.tidy(t.Context()))
	if _, err := os.Lstat(dir); err == nil {
		t.Error("the name that nobody uses any more is kept")
	}
	whole(t, whole1, e)
	if used, err := allocated(h.store.copiesRoot()); err != nil || used > e.bytes*3/2 {
		t.Errorf("%d bytes are taken of the disk, %v", used, err)
	}
}

func TestAnAgentThatIsKilledGoesOnWithMemoryWhereItWas(t *testing.T) {
	e := memoryElsewhere(t)
	slow := &slowMemory{}
	from := &fakeOrigin{dir: e.dir, open: slow.open}
	pod := restoringPod()
	c, h := patientCopies(t, from, e.pcp, pod)
	ctx, stop := context.WithCancel(t.Context())
	c.alive = ctx
	dir, partial, err := c.need(t.Context(), e.pcp, pod, pages.ModeLazy)
	if err != nil || !partial {
		t.Fatalf("partial: %v, %v", partial, err)
	}
	slow.awaitAsked(t, 0) // else what is asked for now would come first
	slow.letThrough(0)    // 64 blocks from there on
	if there, _, err := c.Block(t.Context(), dir, nodeapi.Block{File: memoryFile, Block: 63}); !there || err != nil {
		t.Fatalf("%v, %v", there, err)
	}
	stop()
	c.stop()
	if there, trouble, err := c.ended(t.Context(), &fetching{err: context.Canceled}); there || trouble == "" || err != nil {
		t.Errorf("an agent that ends takes its restores with it: %v, %q, %v", there, trouble, err)
	}
	next := &slowMemory{}
	if err := next.open(t.Context(), 0, memoryFile, eagerBlock*checkpoint.BlockSize); err != nil {
		t.Fatal(err)
	}
	next.letThrough()
	from2 := &fakeOrigin{dir: e.dir, open: next.open}
	other, _ := newTestCopies(t, from2)
	other.store, other.room, other.live, other.wait = h.store, c.room, h.client, time.Hour
	for { // as who gives memory does: it names the sandbox, and nothing more
		there, trouble, err := other.Block(t.Context(), dir, nodeapi.Block{Sandbox: restoringSandbox(), File: memoryFile, Block: 199})
		if err != nil {
			t.Fatal(err)
		}
		if there {
			break
		}
		t.Log(trouble)
	}
	got, partial, err := other.need(t.Context(), e.pcp, pod, pages.ModeEager)
	if err != nil || partial {
		t.Fatal(err)
	}
	whole(t, got, e)
	next.mu.Lock()
	defer next.mu.Unlock()
	for _, block := range []int{0, 1, 63} {
		if next.asked[block] {
			t.Errorf("block %d has come twice", block)
		}
	}
}

func TestMemoryThatCannotBeHadFromOnePlaceComesFromAnother(t *testing.T) {
	e := memoryElsewhere(t)
	b, open := e.storeIt(t)
	for name, test := range map[string]struct {
		node, store bool // breaks once a Pod has been restored
		lost        string
	}{
		"the store breaks": {store: true},
		"the node breaks":  {node: true},
		"both break":       {node: true, store: true, lost: "can be had from nowhere"},
	} {
		t.Run(name, func(t *testing.T) {
			broken := make(chan struct{})
			from := &fakeOrigin{dir: e.dir, open: func(ctx context.Context, opens int, file string, offset int64) error {
				select {
				case <-broken:
					if test.node {
						return deny(v1alpha1.EventCheckpointDataMissing, "the node is empty")
					}
				default:
				}
				return nil
			}}
			pod := restoringPod()
			c, h := patientCopies(t, from, storeObject(), e.pcp, pod)
			c.rate = 1 // nothing comes that nobody waits for
			c.origins = &inStore{node: from, h: h, open: open}
			dir, partial, err := c.need(t.Context(), e.pcp, pod, pages.ModeLazy)
			if err != nil || !partial {
				t.Fatalf("partial: %v, %v", partial, err)
			}
			close(broken)
			if test.store {
				damagePacks(t, b)
				defer damagePacks(t, b) // back
			}
			var trouble string
			there := false
			for !there && err == nil {
				there, trouble, err = c.Block(t.Context(), dir, nodeapi.Block{Sandbox: restoringSandbox(), File: memoryFile, Block: 170, Urgent: true})
			}
			right := bytes.Equal(memoryBlock(t, dir, 170), memoryBlock(t, e.dir, 170))
			switch {
			case test.lost == "" && (err != nil || !right):
				t.Errorf("%q, %v; right: %v", trouble, err, right)
			case test.lost != "" && (err == nil || right || !strings.Contains(err.Error(), test.lost) || !strings.Contains(err.Error(), "the node is empty") || !strings.Contains(err.Error(), "CheckpointStore s: ")):
				t.Errorf("%v; right: %v", err, right)
			}
		})
	}
}

func TestABlockThatArrivesAlteredIsNeverPutInItsPlace(t *testing.T) {
	e := memoryElsewhere(t)
	away := errors.New("nobody answers")
	for name, test := range map[string]struct {
		spoil bool
		err   error
		words string
		after time.Duration
	}{
		"altered": {spoil: true, words: "are not what was written", after: 2 * laterRetry},
		"away":    {err: away, words: "nobody answers", after: laterPatience},
	} {
		t.Run(name, func(t *testing.T) {
			copied := t.TempDir()
			if err := os.CopyFS(copied, os.DirFS(e.dir)); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(filepath.Join(copied, memoryFile), 0); err != nil {
				t.Fatal(err)
			}
			l, err := pages.Look(t.Context(), copied, e.digest)
			if err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				late, err := openLater(t.Context(), copied, l)
				if err != nil {
					t.Fatal(err)
				}
				defer late.close()
				began := time.Now()
				err = late.fill(t.Context(), []giver{{"there", func(_ context.Context, file string, p []byte, offset int64) error {
					data, err := os.ReadFile(filepath.Join(e.dir, file))
					copy(p, data[offset:])
					if at := 128*checkpoint.BlockSize - 1 - offset; test.spoil && at >= 0 && at < int64(len(p)) {
						p[at] ^= 1
					}
					return errors.Join(test.err, err)
				}}}, nil)
				var lost lostError
				if !errors.As(err, &lost) || !strings.Contains(err.Error(), test.words) || !strings.Contains(err.Error(), "there: ") {
					t.Errorf("got %v", err)
				}
				if took := time.Since(began); took < test.after || took > test.after+laterStall {
					t.Errorf("given up after %s", took)
				}
			})
			zero := make([]byte, checkpoint.BlockSize)
			if test.spoil != bytes.Equal(memoryBlock(t, copied, 126), memoryBlock(t, e.dir, 126)) || !bytes.Equal(memoryBlock(t, copied, 127), zero) {
				t.Error("what was not written is in its place, or what was is not")
			}
		})
	}
}

func TestWhatComesLaterIsBoundedByTheBandwidthAndWhatAProcessWaitsForIsNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := lazy.NewBandwidth(1 << 20)
		began := time.Now()
		for range 8 {
			if err := b.Wait(t.Context()); err != nil {
				t.Fatal(err)
			}
			b.Spend(4 << 20)
		}
		if took := time.Since(began); took != 28*time.Second {
			t.Errorf("32 MiB in %s at 1 MiB a second", took)
		}
	})
}
