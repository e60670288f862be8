package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages"
)

const (
	// fetchPart is the most that is asked for at once: the other side looks anew then
	// whether it is still needed.
	fetchPart = 256 << 20
	// fetchStall is how long no byte may come before a connection is given up.
	fetchStall = 15 * time.Second
	// fetchPatience is how long a fetch goes on without a byte.
	fetchPatience = 2 * time.Minute
	// fetchTries is how often a file that arrives altered is fetched.
	fetchTries = 3
	// fetchBuffer is what a fetch holds in memory of what it fetches.
	fetchBuffer = 1 << 20
	// maxManifest bounds what is read before a digest has been checked.
	maxManifest = 16 << 20
)

// errShort ends a part that ends before it should.
var errShort = errors.New("the connection ended before all had come")

// fetch brings one checkpoint into a directory, file by file. What is there already
// it keeps: whoever is interrupted, by a broken connection or its own end, goes on
// where it was. No file counts before its digest is that of the manifest, whose
// digest the API server tells.
type fetch struct {
	from     origin
	dir      string // exists
	digest   string // of the manifest
	stall    time.Duration
	patience time.Duration
	received func(bytes int) // is told of each byte that comes, also of those that come again
	progress *progress
	now      func() time.Time
	// early says whether the checkpoint can be restored before all of it is here, or by a
	// pages.ErrNotLazy why not; nil: that is not wanted. Where it can, rest goes on once
	// all has come but the memory that is given later.
	early func(ctx context.Context, m *checkpoint.Manifest) (*pages.Lazily, error)
	rest  func(ctx context.Context, l *pages.Lazily) error

	idleSince time.Time
}

// progress of a fetch, for others to read while it goes on.
type progress struct {
	mu      sync.Mutex
	have    int64 // bytes that are there
	total   int64 // 0 as long as it is not known
	trouble error // what stands in the way now
	broken  int   // connections that broke
}

func (p *progress) update(change func(*progress)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(p)
}

func (p *progress) read() (have, total int64, broken int, trouble error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.have, p.total, p.broken, p.trouble
}

// run fetches all files; the manifest comes last of what it fetches itself. admit is asked once, for how many
// bytes more there must be room.
func (f *fetch) run(ctx context.Context, admit func(bytes int64) (release func(), err error)) error {
	f.idleSince = f.now()
	manifest, text, err := f.manifest(ctx)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(f.dir)
	if err != nil {
		return fmt.Errorf("open the directory of a fetch: %w", err)
	}
	defer root.Close()
	there, err := f.clean(root, manifest)
	if err != nil {
		return fmt.Errorf("look what an earlier fetch brought: %w", err)
	}
	f.progress.update(func(p *progress) { p.have, p.total, p.trouble = there, manifest.LogicalBytes(), nil })
	release, err := admit(manifest.LogicalBytes() - there)
	if err != nil {
		return err
	}
	defer release()
	lazily, err := f.first(ctx, root, manifest, there)
	if err != nil {
		return err
	}
	if lazily == nil {
		if err := f.files(ctx, root, manifest, func(string) bool { return true }); err != nil {
			return err
		}
	}
	if err := checkpoint.WriteFile(filepath.Join(f.dir, checkpoint.ManifestName), text, 0o600); err != nil {
		return fmt.Errorf("write the manifest: %w", err)
	}
	if err := syncDirs(root); err != nil || lazily == nil {
		return err
	}
	return f.rest(ctx, lazily)
}

// first fetches what a checkpoint is restored from if its memory may come later, but for
// the parts of files of pages that CRIU reads; nil where it may not.
func (f *fetch) first(ctx context.Context, root *os.Root, m *checkpoint.Manifest, there int64) (*pages.Lazily, error) {
	if f.early == nil || there == m.LogicalBytes() {
		return nil, nil
	}
	if err := f.files(ctx, root, m, func(name string) bool { return !pages.IsPages(name) }); err != nil {
		return nil, err
	}
	l, err := f.early(ctx, m)
	if errors.Is(err, pages.ErrNotLazy) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("find out which memory can come later: %w", err)
	}
	later := l.Later()
	return l, f.files(ctx, root, m, func(name string) bool {
		_, ok := later[name]
		return pages.IsPages(name) && !ok
	})
}

// files fetches some of the files.
func (f *fetch) files(ctx context.Context, root *os.Root, m *checkpoint.Manifest, which func(name string) bool) error {
	var wanted []checkpoint.File
	whole := true
	for _, file := range m.Files {
		if !which(file.Path) {
			continue
		}
		wanted = append(wanted, file)
		info, err := root.Lstat(filepath.FromSlash(file.Path))
		whole = whole && err == nil && info.Size() == file.Size
	}
	if from, ok := f.from.(wholeOrigin); ok && !whole {
		if err := f.bring(ctx, from, root, wanted); err != nil {
			return err
		}
	}
	for _, file := range wanted {
		if err := f.file(ctx, root, file); err != nil {
			return err
		}
	}
	return nil
}

// bring has an origin write files, which are checked like others afterwards. What does
// not work is fetched file by file.
func (f *fetch) bring(ctx context.Context, from wholeOrigin, root *os.Root, wanted []checkpoint.File) error {
	names := map[string]bool{}
	for _, file := range wanted {
		names[file.Path] = true
	}
	remove := func() error {
		var failures []error
		for _, file := range wanted {
			name := filepath.FromSlash(file.Path)
			info, err := root.Lstat(name)
			if err == nil {
				err = root.Remove(name)
			}
			switch {
			case err == nil:
				f.progress.update(func(p *progress) { p.have = max(0, p.have-info.Size()) })
			case !errors.Is(err, fs.ErrNotExist):
				failures = append(failures, err)
			}
		}
		return errors.Join(failures...)
	}
	if err := remove(); err != nil {
		return fmt.Errorf("remove what an earlier fetch brought: %w", err)
	}
	var mu sync.Mutex
	var last int64
	before, _, _, _ := f.progress.read()
	err := from.bring(ctx, f.dir, func(name string) bool { return names[name] }, func(done int64) {
		mu.Lock()
		defer mu.Unlock()
		if done > last {
			f.received(int(done - last))
			f.progress.update(func(p *progress) { p.have = before + done })
			last = done
		}
	})
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return errDisk{err}
	case err != nil:
		removed := remove()
		f.progress.update(func(p *progress) { p.have, p.trouble, p.broken = before, err, p.broken+1 })
		return removed
	}
	f.idleSince = f.now()
	return nil
}

// manifest fetches the manifest, which has the digest that it must have.
func (f *fetch) manifest(ctx context.Context) (*checkpoint.Manifest, []byte, error) {
	for tries := 1; ; {
		text, err := f.whole(ctx, checkpoint.ManifestName)
		if err != nil {
			if err := f.again(ctx, err); err != nil {
				return nil, nil, err
			}
			continue
		}
		sum := sha256.Sum256(text)
		if digest := "sha256:" + hex.EncodeToString(sum[:]); digest != f.digest {
			if tries++; tries > fetchTries {
				return nil, nil, deny(v1alpha1.EventCheckpointDataCorrupt, "%s arrives from %s with digest %s, recorded is %s", checkpoint.ManifestName, f.from.Name(), digest, f.digest)
			}
			continue
		}
		m, err := checkpoint.DecodeManifest(text)
		if err != nil {
			return nil, nil, deny(v1alpha1.EventCheckpointDataCorrupt, "%v", err)
		}
		return m, text, nil
	}
}

func (f *fetch) whole(ctx context.Context, name string) ([]byte, error) {
	var text bytes.Buffer
	n, err := f.part(ctx, &text, name, 0, -1, maxManifest+1)
	if err == nil && n > maxManifest {
		err = deny(v1alpha1.EventCheckpointDataCorrupt, "%s has more than %d bytes on %s", name, maxManifest, f.from.Name())
	}
	return text.Bytes(), err
}

// clean removes what does not belong to the checkpoint, and says how many bytes of it
// are there.
func (f *fetch) clean(root *os.Root, m *checkpoint.Manifest) (there int64, err error) {
	sizes := make(map[string]int64, len(m.Files))
	for _, file := range m.Files {
		sizes[file.Path] = file.Size
	}
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if size, listed := sizes[name]; listed && d.Type().IsRegular() && info.Size() <= size {
			there += info.Size()
			if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Blocks*512 < info.Size() {
				there += st.Blocks*512 - info.Size() // it has holes, which are still to come
			}
			return nil
		}
		return root.Remove(filepath.FromSlash(name))
	})
	return there, err
}

// file brings a file up to what the manifest says of it.
func (f *fetch) file(ctx context.Context, root *os.Root, want checkpoint.File) error {
	name := filepath.FromSlash(want.Path)
	if err := root.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return fmt.Errorf("make the directory of %s: %w", want.Path, err)
	}
	out, err := root.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("open %s: %w", want.Path, err)
	}
	err = f.fill(ctx, out, want)
	if err == nil {
		err = out.Sync()
	}
	return errors.Join(err, out.Close())
}

// fill goes on where the file ends.
func (f *fetch) fill(ctx context.Context, out *os.File, want checkpoint.File) error {
	sum := sha256.New()
	have, err := io.CopyBuffer(sum, struct{ io.Reader }{out}, make([]byte, fetchBuffer))
	if err != nil {
		return fmt.Errorf("read %s: %w", want.Path, err)
	}
	for tries := 1; ; {
		for have < want.Size {
			n, err := f.part(ctx, &checked{out, sum}, want.Path, have, min(want.Size-have, fetchPart), want.Size-have)
			have += n
			if err == nil {
				continue
			}
			if err := f.again(ctx, err); err != nil {
				return err
			}
		}
		digest := "sha256:" + hex.EncodeToString(sum.Sum(nil))
		if digest == want.Digest {
			return nil
		}
		if tries++; tries > fetchTries {
			return deny(v1alpha1.EventCheckpointDataCorrupt, "%s arrives from %s with digest %s, written was %s: the data there, or on this node's disk, are damaged", want.Path, f.from.Name(), digest, want.Digest)
		}
		if err := out.Truncate(0); err != nil {
			return fmt.Errorf("fetch %s anew: %w", want.Path, err)
		}
		if _, err := out.Seek(0, io.SeekStart); err != nil {
			return fmt.Errorf("fetch %s anew: %w", want.Path, err)
		}
		f.progress.update(func(p *progress) { p.have -= have })
		sum.Reset()
		have = 0
	}
}

// checked writes to a file what it adds to a digest.
type checked struct {
	file *os.File
	sum  hash.Hash
}

// errDisk is an error of this node's disk, which fetching again does not mend.
type errDisk struct{ error }

func (e errDisk) Unwrap() error { return e.error }

func (c *checked) Write(b []byte) (int, error) {
	n, err := c.file.Write(b)
	c.sum.Write(b[:n])
	if err != nil {
		err = errDisk{fmt.Errorf("write what is fetched: %w", err)}
	}
	return n, err
}

// part copies a part of a file and says how much came, at most so many bytes. A
// connection on which nothing comes is given up.
func (f *fetch) part(ctx context.Context, to io.Writer, name string, offset, length, most int64) (copied int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := time.AfterFunc(f.stall, func() { cancel(fmt.Errorf("no byte has come for %s", f.stall)) })
	defer stalled.Stop()
	body, err := f.from.Open(ctx, name, offset, length)
	if err != nil {
		return 0, because(ctx, err)
	}
	defer body.Close()
	buffer := make([]byte, min(fetchBuffer, most+1))
	for copied < most {
		n, err := body.Read(buffer[:min(int64(len(buffer)), most-copied)])
		if n > 0 {
			stalled.Reset(f.stall)
			f.idleSince = f.now()
			f.received(n)
			written, err := to.Write(buffer[:n])
			copied += int64(written)
			if name != checkpoint.ManifestName {
				f.progress.update(func(p *progress) { p.have, p.trouble = p.have+int64(written), nil })
			}
			if err != nil {
				return copied, err
			}
		}
		if err == io.EOF {
			break
		} else if err != nil {
			return copied, because(ctx, fmt.Errorf("receive %s: %w", name, err))
		}
	}
	if length >= 0 && copied < length {
		return copied, errShort
	}
	return copied, nil
}

// because gives an error the cause that ended its context.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// again waits after an error, and returns it where trying again does not help.
func (f *fetch) again(ctx context.Context, err error) error {
	var final *nodeapi.Error
	var disk errDisk
	if errors.As(err, &final) || errors.As(err, &disk) {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	idle := f.now().Sub(f.idleSince)
	if idle > f.patience {
		return fmt.Errorf("nothing has come for %s: %w", idle.Round(time.Second), err)
	}
	f.progress.update(func(p *progress) { p.trouble, p.broken = err, p.broken+1 })
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(min(max(idle/4, 100*time.Millisecond), 5*time.Second)):
		return nil
	}
}

// syncDirs makes the names below a directory durable.
func syncDirs(root *os.Root) error {
	return fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		f, err := root.Open(filepath.FromSlash(name))
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
}
