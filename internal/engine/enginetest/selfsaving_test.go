package enginetest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/platform/thisnode"
)

// This file is an engine of less than 150 lines: its sandboxes are processes that save their own state
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
func (e selfSaving) Options() []engine.Option { return []engine.Option{engine.FreezeBudgetOption} }
func (e selfSaving) Estimate(context.Context, engine.Sandbox, map[string]string) (engine.Estimate, error) {
	return engine.Estimate{Bytes: 16, Freeze: time.Millisecond}, nil
}
func (e selfSaving) Examine(context.Context, engine.Sandbox) (engine.Examination, error) {
	return engine.Examination{}, nil
}

func (e selfSaving) Checkpoint(ctx context.Context, s engine.Sandbox, dir string, options map[string]string) (m *checkpoint.Manifest, err error) {
	if err := errors.Join(engine.CheckOptions(e, options), ctx.Err()); err != nil {
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
