package criu

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"podstasis.dev/stasis/internal/layer"
)

// tree is a directory of the host that is captured with the Pod: a container's writable
// layer or a volume. Most of it is copied before the Pod is frozen, its archive is written
// after the thaw (layer.Early).
type tree struct {
	what     string // for messages
	dir      string
	archive  string // on the host
	early    *layer.Early
	captured *layer.Tree // nil when the archive has been written
	late     int64       // bytes that were copied while the Pod stood still
}

// beginTrees copies what it can while the Pod runs.
func (e *Engine) beginTrees(ctx context.Context, w window) ([]*tree, error) {
	var trees []*tree
	for _, t := range w.targets {
		trees = append(trees, &tree{what: "the writable layer of container " + t.Name, dir: t.upperDir, archive: filepath.Join(t.dir, rootfsArchive)})
	}
	for _, v := range w.volumes {
		trees = append(trees, &tree{what: "volume " + v.name, dir: v.source, archive: filepath.Join(w.dir, filepath.FromSlash(v.archive()))})
	}
	err := e.host.Do(func() error {
		for _, t := range trees {
			if err := t.begin(ctx, w.dir); err != nil {
				return wrap(err, "capture "+t.what)
			}
		}
		return nil
	})
	if err != nil {
		closeTrees(trees)
		return nil, err
	}
	return trees, nil
}

// begin copies to a file in dir that has no name, so that nothing is left of it.
func (t *tree) begin(ctx context.Context, dir string) error {
	spool, err := os.CreateTemp(dir, ".early-")
	if err != nil {
		return err
	}
	err = os.Remove(spool.Name())
	if err == nil {
		t.early, err = layer.Begin(ctx, t.dir, spool)
	}
	if err != nil {
		return errors.Join(err, spool.Close())
	}
	return nil
}

func closeTrees(trees []*tree) {
	for _, t := range trees {
		if t.early != nil {
			t.early.Close()
		}
	}
}

// takeTree captures a tree while the Pod is frozen.
func (e *Engine) takeTree(ctx context.Context, t *tree) error {
	err := e.host.Do(func() (err error) {
		if t.captured, err = t.early.Take(ctx); err != nil {
			return err
		}
		if t.captured != nil {
			t.late = t.captured.Late
			return nil
		}
		if err := t.write(func(f *os.File) error { return layer.Write(ctx, f, t.dir) }); err != nil {
			return err
		}
		info, err := os.Stat(t.archive)
		if err == nil {
			t.late = info.Size()
		}
		return err
	})
	return wrap(err, "capture "+t.what)
}

// writeTrees writes the archives of what was captured.
func (e *Engine) writeTrees(ctx context.Context, w window) error {
	return e.host.Do(func() error {
		for _, t := range w.trees {
			if t.captured == nil {
				continue
			}
			if err := t.write(func(f *os.File) error { return t.captured.Write(ctx, f) }); err != nil {
				return wrap(err, "capture "+t.what)
			}
			t.captured = nil
		}
		return nil
	})
}

func (t *tree) write(fill func(*os.File) error) error {
	f, err := os.OpenFile(t.archive, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(fill(f), f.Close())
}
