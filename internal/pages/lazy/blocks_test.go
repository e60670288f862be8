package lazy

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
)

const pagesFile = "containers/a/criu/pages-1.img"

// partial makes a checkpoint of 16 blocks that is being brought: of its file of pages there
// are zeros only. bring puts a block in place.
func partial(t *testing.T) (plan *Plan, contents []byte, bring func(block int)) {
	t.Helper()
	dir := t.TempDir()
	name := filepath.Join(dir, filepath.FromSlash(pagesFile))
	contents = make([]byte, 16*blockSize)
	rand.NewChaCha8([32]byte{1}).Read(contents)
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, contents, 0o600)); err != nil {
		t.Fatal(err)
	}
	digest, err := checkpoint.Seal(t.Context(), dir, &checkpoint.Manifest{Engine: checkpoint.Program{Name: "criu", Version: "4.2"}, Containers: []checkpoint.Container{{Name: "a"}}})
	if err == nil {
		err = errors.Join(os.Truncate(name, 0), os.Truncate(name, int64(len(contents))))
	}
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	plan = &Plan{Dir: dir, ManifestDigest: digest, Partial: true, Patience: time.Minute, Processes: []Process{{PID: 1, File: pagesFile, Runs: []Run{{0x10000, 16 * blockPages, 0}}}}}
	return plan, contents, func(block int) {
		if _, err := f.WriteAt(contents[block*blockSize:][:blockSize], int64(block)*blockSize); err != nil {
			t.Error(err)
		}
	}
}

func blocksOfPlan(t *testing.T, p *Plan, ask Ask) *blocks {
	t.Helper()
	from, err := openLocal(p)
	if err != nil {
		t.Fatal(err)
	}
	b, err := newBlocks(t.Context(), p, from, ask)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestABlockThatIsNotThereIsAskedForAndOneThatIsIsNot(t *testing.T) {
	plan, contents, bring := partial(t)
	asked := 0
	b := blocksOfPlan(t, plan, func(_ context.Context, file string, block int, urgent bool) (Answer, error) {
		asked++
		if file != pagesFile || block != 5 || !urgent {
			t.Errorf("asked for block %d of %s, urgent: %v", block, file, urgent)
		}
		if asked < 3 { // first nobody is there, then it takes a while
			return Answer{Trouble: "slow"}, []error{errors.New("nobody"), nil}[asked-1]
		}
		bring(block)
		return Answer{There: true}, nil
	})
	bring(7)
	for _, block := range []int{7, 5, 5} {
		data, release, err := b.get(t.Context(), blockID{0, block}, true)
		if err != nil || !bytes.Equal(data, contents[block*blockSize:][:blockSize]) {
			t.Fatalf("block %d: %v", block, err)
		}
		release()
	}
	if asked != 3 {
		t.Errorf("asked %d times", asked)
	}
}

func TestABlockThatCannotBeHadIsNeverGivenAndItIsSaidWhy(t *testing.T) {
	for name, c := range map[string]struct {
		answer Answer
		err    error
		words  []string
	}{
		"its source is lost":       {answer: Answer{Lost: "node-2 is gone"}, words: []string{"node-2 is gone"}},
		"it is said to be there":   {answer: Answer{There: true}, words: []string{"are not what was written"}},
		"nobody is there":          {err: errors.New("no agent"), words: []string{"nobody has brought it for 1m0s", "no agent"}},
		"it does not come in time": {answer: Answer{Trouble: "the link is down"}, words: []string{"too late", "the link is down"}},
	} {
		t.Run(name, func(t *testing.T) {
			plan, _, _ := partial(t)
			synctest.Test(t, func(t *testing.T) {
				b := blocksOfPlan(t, plan, func(ctx context.Context, _ string, _ int, _ bool) (Answer, error) {
					time.Sleep(time.Second)
					return c.answer, c.err
				})
				ctx, cancel := context.WithTimeoutCause(t.Context(), 2*time.Minute, errors.New("too late"))
				defer cancel()
				data, _, err := b.get(ctx, blockID{0, 3}, true)
				if err == nil || data != nil {
					t.Fatalf("given: %v", err)
				}
				for _, want := range c.words {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("%v; it does not say %q", err, want)
					}
				}
			})
		})
	}
}

func TestABlockThatIsStreamedIsHurriedWhenAProcessWaitsForIt(t *testing.T) {
	plan, contents, bring := partial(t)
	hurried := make(chan struct{})
	var calm atomic.Int32
	asked := make(chan struct{}, 1)
	b := blocksOfPlan(t, plan, func(ctx context.Context, _ string, block int, urgent bool) (Answer, error) {
		if urgent {
			bring(block)
			close(hurried)
			return Answer{There: true}, nil
		}
		calm.Add(1)
		asked <- struct{}{}
		select {
		case <-hurried:
			return Answer{There: true}, nil
		case <-ctx.Done():
			return Answer{}, ctx.Err()
		}
	})
	streamed := make(chan error, 1)
	go func() {
		_, release, err := b.get(t.Context(), blockID{0, 9}, false)
		if err == nil {
			release()
		}
		streamed <- err
	}()
	<-asked
	data, release, err := b.get(t.Context(), blockID{0, 9}, true)
	if err != nil || !bytes.Equal(data, contents[9*blockSize:][:blockSize]) {
		t.Fatal(err)
	}
	release()
	if err := <-streamed; err != nil || calm.Load() != 1 {
		t.Errorf("who streams it: %v, asked %d times", err, calm.Load())
	}
}

func TestACheckpointThatIsWholeIsAskedOfNobody(t *testing.T) {
	plan, _, _ := partial(t)
	plan.Partial = false
	b := blocksOfPlan(t, plan, func(context.Context, string, int, bool) (Answer, error) {
		t.Error("asked")
		return Answer{There: true}, nil
	})
	if _, _, err := b.get(t.Context(), blockID{0, 0}, true); !errors.Is(err, checkpoint.ErrCorrupt) {
		t.Errorf("zeros are given: %v", err)
	}
}

// A process waits on its own userfaultfd: this one is the test's.
func TestAProcessWaitsForWhatIsStillBeingBrought(t *testing.T) {
	if err := Supported(); err != nil {
		t.Fatal(err)
	}
	plan, contents, bring := partial(t)
	m, err := newFaulting(len(contents))
	if err != nil {
		t.Fatal(err)
	}
	plan.Processes[0].Runs = []Run{{m.address, 16 * blockPages, 0}}
	release := make(chan struct{})
	s, err := newServer(t.Context(), plan, mustLocal(t, plan), func(ctx context.Context, _ string, block int, urgent bool) (Answer, error) {
		select {
		case <-release:
		case <-ctx.Done():
			return Answer{}, ctx.Err()
		}
		bring(block)
		return Answer{There: true}, nil
	}, slog.New(slog.DiscardHandler), func(int) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := s.add(1, m.fd); err != nil {
		t.Fatal(err)
	}
	read := make(chan byte, 1)
	go func() { read <- m.read(3*blockSize + 77) }()
	select {
	case b := <-read:
		t.Fatalf("it has read %d before it was there", b)
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	if b := <-read; b != contents[3*blockSize+77] {
		t.Errorf("it has read %d, and %d was written", b, contents[3*blockSize+77])
	}
	if err := s.stream(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(m.all(), contents) {
		t.Error("its memory is another")
	}
	s.close()
}

func mustLocal(t *testing.T, p *Plan) *local {
	t.Helper()
	l, err := openLocal(p)
	if err != nil {
		t.Fatal(err)
	}
	return l
}
