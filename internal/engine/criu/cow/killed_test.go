//go:build amd64

package cow

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// clean collects what helpers left, on a thread of its own.
func clean(t *testing.T, dir string) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- Clean(dir)
	}()
	must(t, <-done)
}

func TestAHelperThatIsKilledAtAnyMomentHarmsNobodyAndItsChildrenAreCollected(t *testing.T) {
	for _, kind := range []string{"sleeper", "hammer"} {
		t.Run(kind, func(t *testing.T) {
			s := begin(t, kind, nil)
			s.line(t)
			random := rand.New(rand.NewPCG(1, 2))
			for range rounds(30) {
				dir := t.TempDir()
				h := startHelper(t)
				h.ask(t, Request{Sandbox: "s", Containers: []Container{imagesOf(t, s.pid())}, Record: filepath.Join(dir, "s.json")})
				time.Sleep(time.Duration(random.Int64N(int64(12 * time.Millisecond))))
				must(t, h.cmd.Process.Kill())
				h.cmd.Wait()
				clean(t, dir)
				noChildren(t, s.pid())
				if left, err := os.ReadDir(dir); err != nil || len(left) > 0 && filepath.Ext(left[0].Name()) == ".json" {
					t.Errorf("its record stayed: %v, %v", left, err)
				}
			}
			must(t, captureAll(t, imagesOf(t, s.pid())))
			s.end(t)
		})
	}
}

// rounds is how often what has random in it is done: as often as COW_ROUNDS says.
func rounds(few int) int {
	if n, err := strconv.Atoi(os.Getenv("COW_ROUNDS")); err == nil {
		return n
	}
	return few
}

func seed(t *testing.T) uint64 {
	n, err := strconv.ParseUint(os.Getenv("COW_SEED"), 10, 64)
	if err != nil {
		n = uint64(time.Now().UnixNano())
	}
	t.Logf("COW_SEED=%d", n)
	return n
}

// Processes of several kinds are captured together, again and again, by helpers that are
// killed, or left, or not. It is what "make soak-cow" does many times. None has a filter of
// system calls of its own: the engine does not have such processes captured.
func TestProcessesOutliveRoundsOfCapturesAndWhatIsCapturedIsOfOneMoment(t *testing.T) {
	random := rand.New(rand.NewPCG(seed(t), 0))
	sleeper, hammer := begin(t, "sleeper", nil), begin(t, "hammer", nil)
	sleeper.line(t)
	at := numbers(t, hammer.line(t))
	done := 0
	for round := range rounds(20) {
		family := begin(t, "family", nil)
		child := numbers(t, family.line(t))
		dir := t.TempDir()
		record := filepath.Join(dir, "s.json")
		c := imagesOf(t, sleeper.pid(), hammer.pid(), family.pid(), int(child[0]))
		h := startHelper(t)
		h.ask(t, Request{Sandbox: "s", Containers: []Container{c}, Record: record})
		what := random.IntN(4)
		time.Sleep(time.Duration(random.Int64N(int64(30 * time.Millisecond))))
		switch what {
		case 0:
			must(t, h.cmd.Process.Kill())
		case 1:
			h.in.Close()
		case 2:
			must(t, unix.Kill(int(child[0]), unix.SIGKILL))
		}
		var last Message
		for {
			var m Message
			if h.out.Decode(&m) != nil {
				break
			}
			last = m
		}
		h.cmd.Wait()
		clean(t, dir)
		if _, err := os.Stat(record); err == nil {
			t.Errorf("round %d: the record stayed", round)
		}
		for _, s := range []*specimen{sleeper, hammer, family} {
			noChildren(t, s.pid())
		}
		switch {
		case last.Says == Done:
			done++
			oneMoment(t, readCaptured(t, c.Images, hammer.pid()), at[0], at[1])
			p, err := readPagemap(c.Images, int(child[0]))
			must(t, err)
			oneMoment(t, readPages(t, c.Images, p), child[1], child[2])
		case what == 3:
			t.Errorf("round %d: nobody came in between, and it ended with %+v", round, last)
		}
		family.end(t)
		for name, s := range map[string]*specimen{"sleeper": sleeper, "hammer": hammer} {
			if ending(s.pid()) {
				t.Errorf("round %d, of kind %d: the %s has ended: %v", round, what, name, s.cmd.Wait())
			}
		}
		if t.Failed() {
			t.Fatalf("in round %d, of kind %d", round, what)
		}
	}
	t.Logf("%d captures were complete", done)
	for _, s := range []*specimen{sleeper, hammer} {
		s.end(t)
	}
}
