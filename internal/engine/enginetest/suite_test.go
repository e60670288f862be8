package enginetest_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/enginetest"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "serve" {
		count, _ := strconv.Atoi(os.Args[3])
		fmt.Fprintln(os.Stderr, serve(os.Args[2], count))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func start(t *testing.T, count string) enginetest.Subject {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	cmd := exec.Command("/proc/self/exe", "serve", socket, count)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	r := engine.Runtime{Type: runtimeType, Root: socket}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := tell(r, ""); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	return enginetest.Subject{
		Sandbox: engine.Sandbox{ID: "s", Namespace: "ns", Name: "pod", UID: "u", Containers: []engine.Container{{ID: "c", Name: "main", PID: cmd.Process.Pid, Runtime: r}}},
		Count: func(t *testing.T) int {
			n, err := tell(r, "")
			if err != nil {
				t.Fatal(err)
			}
			return n
		},
	}
}

func TestAnEngineWhoseProcessesSaveThemselvesPasses(t *testing.T) {
	enginetest.Run(t, enginetest.Config{
		Engine: selfSaving{journal: filepath.Join(t.TempDir(), "paused")},
		Start:  func(t *testing.T) enginetest.Subject { return start(t, "0") },
		Restore: func(t *testing.T, dir string, _ *checkpoint.Manifest) enginetest.Subject {
			state, err := os.ReadFile(filepath.Join(dir, "state"))
			if err != nil {
				t.Fatal(err)
			}
			return start(t, string(state))
		},
		Directory: func(t *testing.T) (string, string) { dir := t.TempDir(); return dir, dir },
	})
}

// What an engine has to do fits on a few pages, imports and all.
func TestAnEngineIsWrittenInLessThan150Lines(t *testing.T) {
	text, err := os.ReadFile("selfsaving_test.go")
	if err != nil {
		t.Fatal(err)
	}
	if lines := bytes.Count(text, []byte("\n")); lines >= 150 {
		t.Errorf("it has %d", lines)
	}
}
