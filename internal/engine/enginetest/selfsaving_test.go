package enginetest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/engine/enginetest"
	"podstasis.dev/stasis/internal/platform/thisnode"
)

// An engine of less than 150 lines: its sandboxes are processes that save their own state
// when they are asked to. It shows what an engine has to do, and that the suite is none of
// any engine's.

const runtimeType = "test.selfsaving.v1"

// serve is such a process: this test binary with a socket and where to begin.
func serve(socket string, count int) error {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	var mu sync.Mutex // held while it is paused
	go func() {
		for ; ; time.Sleep(time.Millisecond) {
			mu.Lock()
			count++
			mu.Unlock()
		}
	}()
	for paused := false; ; {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		command, _ := bufio.NewReader(c).ReadString('\n')
		if !paused {
			mu.Lock()
		}
		switch strings.TrimSpace(command) {
		case "pause":
			paused = true
		case "resume":
			paused = false
		}
		fmt.Fprintln(c, count)
		c.Close()
		if !paused {
			mu.Unlock()
		}
	}
}

// tell asks a process to do something, and returns its count.
func tell(r engine.Runtime, command string) (int, error) {
	c, err := net.DialTimeout("unix", r.Root, 5*time.Second)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	fmt.Fprintln(c, command)
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(line))
}

type selfSaving struct{ journal string }

func (e selfSaving) Name() string                   { return "selfsaving" }
func (e selfSaving) Captures(r engine.Runtime) bool { return r.Type == runtimeType }
func (e selfSaving) Identify(context.Context) (checkpoint.Program, error) {
	return checkpoint.Program{Name: e.Name(), Version: "1.0"}, nil
}
func (e selfSaving) CheckOptions(options map[string]string) error {
	for name := range options {
		if name != engine.OptionFreezeBudget {
			return fmt.Errorf("%w: %q", engine.ErrOption, name)
		}
	}
	_, err := engine.FreezeBudget(options)
	return err
}
func (e selfSaving) Estimate(context.Context, engine.Sandbox, map[string]string) (engine.Estimate, error) {
	return engine.Estimate{Bytes: 16, Freeze: time.Millisecond}, nil
}
func (e selfSaving) Examine(context.Context, engine.Sandbox) (engine.Examination, error) {
	return engine.Examination{}, nil
}

func (e selfSaving) Checkpoint(ctx context.Context, s engine.Sandbox, dir string, options map[string]string) (m *checkpoint.Manifest, err error) {
	if err := errors.Join(e.CheckOptions(options), ctx.Err()); err != nil {
		return nil, err
	}
	budget, _ := engine.FreezeBudget(options)
	here, err := thisnode.Platform()
	if err != nil {
		return nil, err
	}
	c := s.Containers[0]
	m = &checkpoint.Manifest{Engine: checkpoint.Program{Name: e.Name(), Version: "1.0"}, Platform: here,
		Sandbox:    checkpoint.Sandbox{ID: s.ID, Namespace: s.Namespace, Name: s.Name, UID: s.UID},
		Containers: []checkpoint.Container{{Name: c.Name, ID: c.ID}}}
	if err := checkpoint.WriteFile(e.journal, []byte(c.Runtime.Root), 0o600); err != nil {
		return nil, err
	}
	began := time.Now()
	count, err := tell(c.Runtime, "pause")
	m.CutTime = time.Now().UTC()
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "state"), []byte(strconv.Itoa(count)), 0o600)
	}
	err = errors.Join(err, e.ThawLeftovers(ctx))
	if m.FreezeDuration = time.Since(began); err == nil && budget > 0 && m.FreezeDuration > budget {
		err = engine.ErrFreezeBudget
	}
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (e selfSaving) CheckRestore(_ context.Context, m *checkpoint.Manifest) error {
	here, err := thisnode.Platform()
	if err == nil && (m.Engine.Name != e.Name() || m.Engine.Version != "1.0" || m.Platform.Architecture != here.Architecture) {
		err = fmt.Errorf("%w: it is of %+v on %s", engine.ErrIncompatible, m.Engine, m.Platform.Architecture)
	}
	return err
}

func (e selfSaving) ThawLeftovers(context.Context) error {
	socket, err := os.ReadFile(e.journal)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err == nil {
		_, err = tell(engine.Runtime{Root: string(socket)}, "resume")
	}
	return errors.Join(err, os.Remove(e.journal))
}

// What follows is no part of the engine.

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
