package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
	"podstasis.dev/stasis/internal/pages/lazy"
)

// A checkpoint of another node can be restored before all of it is here: its directory
// then has a name of its own (earlyIntro), by which nobody takes it for whole. When the
// rest has come the same files get the name of a whole copy.

// errNoneEarly says that there is nothing to go on with.
var errNoneEarly = errors.New("no copy can be restored early")

// comeEarly is called when all has come to the directory of a fetch but memory that may
// come later. It brings what CRIU reads of that, lets Pods be restored, and brings the
// rest.
func (c *copies) comeEarly(ctx context.Context, pcp *v1alpha1.PodCheckpoint, f *fetching, one *fetch, l *pages.Lazily) error {
	t, err := c.openLater(ctx, one.dir, f, one, l)
	if err != nil {
		return err
	}
	defer t.close()
	if err := t.bringAll(ctx, giversOf(f.origin), l.Later()); err != nil {
		return err
	}
	if err := t.sync(); err != nil {
		return err
	}
	early := c.store.earlyPath(pcp.UID)
	if err := errors.Join(syncTree(one.dir), os.Rename(one.dir, early), checkpoint.SyncDir(c.store.copiesRoot())); err != nil {
		return fmt.Errorf("let a copy be restored before all of it is here: %w", err)
	}
	return c.bringRest(ctx, pcp, f, t)
}

// goOn goes on with a copy that Pods have been restored from before all of it was here.
func (c *copies) goOn(ctx context.Context, pcp *v1alpha1.PodCheckpoint, f *fetching, one *fetch) error {
	dir := c.store.earlyPath(pcp.UID)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return errNoneEarly
	} else if err != nil {
		return fmt.Errorf("look for the copy of a checkpoint: %w", err)
	}
	l, err := pages.Look(ctx, dir, pcp.Status.ManifestDigest)
	if err == nil {
		err = l.Verify(ctx)
	}
	if errors.Is(err, checkpoint.ErrCorrupt) || errors.Is(err, checkpoint.ErrMissing) {
		return c.replaceEarly(pcp.UID, dir, err)
	} else if err != nil {
		return fmt.Errorf("go on with the copy of a checkpoint: %w", err)
	}
	t, err := c.openLater(ctx, dir, f, one, l)
	if err != nil {
		return err
	}
	defer t.close()
	total := l.Manifest.LogicalBytes()
	left := t.bytesLeft()
	f.progress.update(func(p *progress) { p.have, p.total = max(0, total-left), total })
	release, err := c.makeRoom(left)
	if err != nil {
		return err
	}
	defer release()
	return c.bringRest(ctx, pcp, f, t)
}

// replaceEarly makes room for another fetch where this node's disk has damaged what an
// earlier one brought, unless somebody is being restored from it.
func (c *copies) replaceEarly(uid types.UID, dir string, why error) error {
	used, err := c.inUse()
	if err != nil {
		return fmt.Errorf("find out which checkpoints restores use: %w", err)
	}
	for _, d := range used {
		if d == dir {
			return lostError{fmt.Errorf("what was fetched has been damaged on this node's disk: %w", why)}
		}
	}
	c.log.Warn("what an earlier fetch brought is damaged, and is fetched anew", "uid", uid, "error", why)
	aside, err := os.MkdirTemp(c.store.copiesRoot(), removingPrefix)
	if err == nil {
		err = errors.Join(os.Rename(dir, filepath.Join(aside, string(uid))), os.RemoveAll(aside))
	}
	if err != nil {
		return fmt.Errorf("remove the copy of a checkpoint: %w", err)
	}
	return errNoneEarly
}

func (c *copies) openLater(ctx context.Context, dir string, f *fetching, one *fetch, l *pages.Lazily) (*later, error) {
	t, err := openLater(ctx, dir, l)
	if err != nil {
		return nil, err
	}
	t.progress, t.received, t.now, t.bandwidth = &f.progress, one.received, c.now, lazy.NewBandwidth(c.rate)
	return t, nil
}

// bringRest lets Pods be restored while it brings what is missing, and makes the copy a
// whole one.
func (c *copies) bringRest(ctx context.Context, pcp *v1alpha1.PodCheckpoint, f *fetching, t *later) error {
	from := giversOf(f.origin)
	hurried := from
	if f.hurried != nil {
		hurried = giversOf(f.hurried)
	}
	f.later = t
	close(f.early)
	f.proceed()
	if err := t.fill(ctx, from, hurried); err != nil {
		return err
	}
	if err := t.sync(); err != nil {
		return err
	}
	return c.makeWhole(pcp.UID)
}

// makeWhole gives the files of a copy that was restored from early the name of a whole
// one. Who reads them goes on.
func (c *copies) makeWhole(uid types.UID) error {
	early := c.store.earlyPath(uid)
	aside, err := os.MkdirTemp(c.store.copiesRoot(), removingPrefix)
	if err != nil {
		return fmt.Errorf("make a copy whole: %w", err)
	}
	defer os.RemoveAll(aside)
	to := filepath.Join(aside, string(uid))
	err = filepath.WalkDir(early, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		target := filepath.Join(to, strings.TrimPrefix(name, early))
		if d.IsDir() {
			return os.Mkdir(target, 0o700)
		}
		return os.Link(name, target)
	})
	if err == nil {
		err = errors.Join(syncTree(to), os.Rename(to, c.store.copyPath(uid)), checkpoint.SyncDir(c.store.copiesRoot()))
	}
	if err != nil {
		return fmt.Errorf("make a copy whole: %w", err)
	}
	return nil
}

// soFar is told of a Pod that is restored before all is here.
func (c *copies) soFar(pcp *v1alpha1.PodCheckpoint, f *fetching) string {
	have, total, _, _ := f.progress.read()
	return fmt.Sprintf("Of the data of PodCheckpoint %s, %s of %s have come from %s in %s, enough for the Pod to run; memory comes while it does",
		pcp.Name, binaryBytes(have), binaryBytes(total), f.origin.Name(), c.now().Sub(f.began).Round(100*time.Millisecond))
}

// Block implements restoring.Blocks: it returns when a block is in an early copy, or ctx
// ends.
func (c *copies) Block(ctx context.Context, dir string, block nodeapi.Block) (there bool, trouble string, err error) {
	name, ok := strings.CutPrefix(filepath.Base(dir), earlyIntro)
	uid := types.UID(name)
	if !ok || filepath.Dir(dir) != c.store.copiesRoot() || validUID(uid) != nil {
		return false, "", deny(v1alpha1.EventCheckpointDataMissing, "%s is no copy that memory is still brought to", dir)
	}
	f, trouble, err := c.underWay(ctx, uid, block.Sandbox)
	if err != nil || trouble != "" {
		if err == nil {
			pause(ctx)
		}
		return false, trouble, err
	} else if f == nil {
		return true, "", nil // all is here; whether it is right, who reads it sees
	}
	select {
	case <-f.early:
	case <-f.done:
		return c.ended(ctx, f)
	case <-ctx.Done():
		return false, "its fetch is being gone on with", nil
	}
	there, trouble, err = f.later.wait(ctx, f.done, blockOf{block.File, block.Block}, block.Urgent)
	if there || err != nil {
		return there, trouble, err
	}
	select {
	case <-f.done:
		return c.ended(ctx, f)
	default:
		return false, trouble, nil
	}
}

// pause keeps who asks again from doing so at once.
func pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(time.Second):
	}
}

// ended is what a fetch that is over has come to, for who waits for a block.
func (c *copies) ended(ctx context.Context, f *fetching) (there bool, trouble string, err error) {
	switch {
	case f.err == nil:
		return true, "", nil
	case errors.Is(f.err, context.Canceled): // by this agent's end: the next goes on
		pause(ctx)
		return false, "the fetch was interrupted", nil
	}
	return false, "", fmt.Errorf("the rest of the checkpoint could not be fetched: %w", f.err)
}

// underWay is the fetch of an early copy, which is begun if there is none; nil if the copy
// is whole. trouble says why it cannot be begun now.
func (c *copies) underWay(ctx context.Context, uid types.UID, sandbox nodeapi.Sandbox) (f *fetching, trouble string, err error) {
	c.mu.Lock()
	if f = c.under[uid]; f != nil {
		f.asked = c.now()
	}
	c.mu.Unlock()
	if f != nil {
		return f, "", nil
	}
	if _, err := os.Lstat(c.store.copyPath(uid)); err == nil {
		return nil, "", nil
	}
	record, err := c.store.readCopyRecord(uid)
	if err != nil {
		return nil, "", err
	} else if record == nil {
		return nil, "", deny(v1alpha1.EventCheckpointDataMissing, "of which PodCheckpoint this is a copy is not known any more")
	}
	var pcp v1alpha1.PodCheckpoint
	err = c.live.Get(ctx, types.NamespacedName{Namespace: record.Namespace, Name: record.Name}, &pcp)
	if apierrors.IsNotFound(err) || err == nil && pcp.UID != uid {
		return nil, "", deny(v1alpha1.EventCheckpointDataMissing, "PodCheckpoint %s was deleted before all its memory was here", record.Name)
	} else if err != nil {
		return nil, fmt.Sprintf("PodCheckpoint %s cannot be read: %v", record.Name, err), nil
	}
	var pod corev1.Pod
	err = c.live.Get(ctx, types.NamespacedName{Namespace: sandbox.Namespace, Name: sandbox.Name}, &pod)
	if apierrors.IsNotFound(err) || err == nil && string(pod.UID) != sandbox.UID {
		return nil, "", deny(v1alpha1.EventCheckpointFetchFailed, "the API server has no Pod %s/%s of UID %s any more", sandbox.Namespace, sandbox.Name, sandbox.UID)
	} else if err != nil {
		return nil, fmt.Sprintf("Pod %s cannot be read: %v", sandbox.Name, err), nil
	}
	f, err = c.begin(&pcp, &pod, pages.ModeLazy)
	return f, "", err
}
