package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/layer"
	"podstasis.dev/stasis/internal/platform/thisnode"
	"podstasis.dev/stasis/internal/published"
)

// Layout of a checkpoint directory; docs/format.md describes it.
const (
	imageDir      = "sandbox"
	containersDir = "containers"
	specFile      = "config.json"
)

// Checkpoint implements engine.Engine: pause, save, copy the volumes, resume.
//
// A sandbox saves to the end once it has begun, whoever asked for it: a freeze budget that
// is used up meanwhile ends the checkpoint with ErrFreezeBudget, and the Pod runs again as
// soon as it has saved. That it will be kept is what Estimate is for.
func (e *Engine) Checkpoint(ctx context.Context, s engine.Sandbox, dir string, options map[string]string) (*checkpoint.Manifest, error) {
	if err := engine.CheckOptions(e, options); err != nil {
		return nil, err
	}
	budget, err := engine.FreezeBudget(options)
	if err != nil {
		return nil, err
	}
	r, err := e.runscOf(s.Containers[0].Runtime)
	if err != nil {
		return nil, err
	}
	problems, err := e.problems(ctx, r, s)
	if err != nil {
		return nil, err
	}
	if len(problems) > 0 {
		return nil, fmt.Errorf("%w: %s", engine.ErrUnsupported, strings.Join(problems, "; "))
	}
	began := time.Now()
	m, volumes, err := e.prepare(ctx, r, s, dir)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(strayPatience); ; {
		if err := e.awaitStrays(ctx, r, s.Containers, deadline); err != nil {
			return nil, err
		}
		attempt := *m
		attempt.Phases = []checkpoint.Phase{{Name: "prepare", Duration: time.Since(began)}}
		err := e.capture(ctx, r, s, dir, budget, volumes, &attempt)
		if err == nil {
			return &attempt, nil
		}
		if !errors.Is(err, errStray) || time.Now().After(deadline) {
			return nil, err
		}
	}
}

// prepare does everything that can be done while the Pod runs.
func (e *Engine) prepare(ctx context.Context, r runsc, s engine.Sandbox, dir string) (*checkpoint.Manifest, []volume, error) {
	program, err := e.identify(ctx, r.Binary)
	if err != nil {
		return nil, nil, err
	}
	here, err := thisnode.Platform()
	if err != nil {
		return nil, nil, err
	}
	m := &checkpoint.Manifest{
		Engine: program, Runtime: checkpoint.Program{Name: "runsc", Version: program.Version}, Platform: here,
		Sandbox: checkpoint.Sandbox{ID: s.ID, Namespace: s.Namespace, Name: s.Name, UID: s.UID, IPs: s.IPs},
	}
	var volumes []volume
	err = e.Host.Do(func() error {
		volumes = volumesOf(s.Containers)
		dirs := []string{filepath.Join(dir, imageDir)}
		if len(volumes) > 0 {
			dirs = append(dirs, filepath.Join(dir, volumesDir))
		}
		for _, c := range s.Containers {
			dirs = append(dirs, filepath.Join(dir, containersDir, c.Name))
		}
		for _, d := range dirs {
			if err := os.MkdirAll(d, 0o700); err != nil {
				return err
			}
		}
		for _, c := range s.Containers {
			described, err := describe(c)
			if err != nil {
				return fmt.Errorf("container %s: %w", c.Name, err)
			}
			m.Containers = append(m.Containers, described)
			spec, err := json.Marshal(c.Spec)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, containersDir, c.Name, specFile), spec, 0o600); err != nil {
				return err
			}
		}
		return nil
	})
	for _, v := range volumes {
		m.Volumes = append(m.Volumes, checkpoint.Volume{Name: v.name, Archive: v.archive(), Mounts: v.mounts})
	}
	if err != nil {
		return nil, nil, fmt.Errorf("lay out the checkpoint directory: %w", err)
	}
	return m, volumes, nil
}

// capture is the freeze window.
func (e *Engine) capture(ctx context.Context, r runsc, s engine.Sandbox, dir string, budget time.Duration, volumes []volume, m *checkpoint.Manifest) (err error) {
	p, err := e.pauses.Begin(s.ID, r.Runsc)
	if err != nil {
		return err
	}
	began := time.Now()
	last := began
	phase := func(name string) {
		now := time.Now()
		m.Phases = append(m.Phases, checkpoint.Phase{Name: name, Duration: now.Sub(last)})
		last = now
	}
	defer func() {
		err = errors.Join(err, e.pauses.LetGo(context.WithoutCancel(ctx), p))
		phase("thaw")
		m.FreezeDuration = last.Sub(began)
		e.tell(s, engine.Stage{Name: engine.StageStoring, Frozen: m.FreezeDuration})
		if err == nil && budget > 0 && m.FreezeDuration > budget {
			err = fmt.Errorf("%w: the Pod stood still for %s while the sandbox saved, its budget is %s", engine.ErrFreezeBudget, m.FreezeDuration.Round(time.Millisecond), budget)
		}
		if err == nil {
			e.learn(dir, m.FreezeDuration)
		}
	}()

	e.tell(s, engine.Stage{Name: engine.StageFreezing})
	// What runsc has begun it is left to end, with the context or without: until then the
	// sandbox could not be resumed anyway.
	whole := context.WithoutCancel(ctx)
	if _, err := e.pauses.Run(whole, p, "pause", s.ID); err != nil {
		return fmt.Errorf("pause the sandbox: %w", err)
	}
	m.CutTime = time.Now().UTC()
	phase("freeze")
	e.tell(s, engine.Stage{Name: engine.StageCapturing})
	if err := context.Cause(ctx); err != nil {
		return err
	}
	found, err := e.strays(ctx, r, s.Containers)
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fmt.Errorf("%w: %s; checkpoint the Pod when fewer commands are run in it", errStray, strings.Join(found[:min(maxTold, len(found))], "; "))
	}
	phase("look")
	if _, err := e.pauses.Run(whole, p, "checkpoint", "--leave-running", "--compression=none", "--image-path", filepath.Join(dir, imageDir), s.ID); err != nil {
		return fmt.Errorf("save the sandbox: %w", err)
	}
	for _, v := range volumes {
		if err := e.archive(ctx, v.source, filepath.Join(dir, filepath.FromSlash(v.archive()))); err != nil {
			return fmt.Errorf("capture volume %s: %w", v.name, err)
		}
	}
	phase("capture")
	return context.Cause(ctx)
}

func (e *Engine) tell(s engine.Sandbox, stage engine.Stage) {
	if e.Stage != nil {
		e.Stage(s.ID, stage)
	}
}

// archive writes a directory of the host as a tar into a file of the host.
func (e *Engine) archive(ctx context.Context, from, to string) error {
	return e.Host.Do(func() error {
		f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		return errors.Join(layer.Write(ctx, f, from), f.Close())
	})
}

// learn notes how long a checkpoint took that lies in dir.
func (e *Engine) learn(dir string, took time.Duration) {
	var size int64
	err := e.Host.Do(func() (err error) {
		size, err = treeSize(context.Background(), dir)
		return err
	})
	if err == nil {
		e.pace.learn(size, took)
	}
}

// describe says what is recorded of a container. Its writable layer is in the sandbox. It
// looks at files of the host.
func describe(c engine.Container) (checkpoint.Container, error) {
	d := checkpoint.Container{Name: c.Name, ID: c.ID, Image: c.Image, ImageID: c.ImageID}
	if !c.Created.IsZero() {
		d.Created = &c.Created
	}
	if p := c.Spec.Process; p != nil {
		d.Process = checkpoint.Process{Args: p.Args, Cwd: p.Cwd, UID: p.User.UID, GID: p.User.GID, Terminal: p.Terminal}
	}
	for _, m := range c.Spec.Mounts {
		if m.Type != "bind" {
			continue
		}
		directories, err := published.Directories(m.Source)
		if err != nil {
			return d, fmt.Errorf("volume at %s: %w", m.Destination, err)
		}
		for _, directory := range directories {
			d.Published = append(d.Published, checkpoint.Published{Destination: m.Destination, Directory: directory})
		}
	}
	return d, nil
}
