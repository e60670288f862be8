package cow

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
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

// rounds is how often what has random in it is done: more where it is asked for.
func rounds(few int) int { return few }
