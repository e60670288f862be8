package kubectl

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/term"

	"podstasis.dev/stasis/internal/kubectl/transfer"
)

// digestPatience is how long the server's digest is waited for when everything has
// arrived: it reads the whole archive for it, once.
const digestPatience = 5 * time.Minute

// mayWrite looks whether the result has a place to go, before anything is sent.
func (o *downloadOptions) mayWrite() error {
	if o.file == "-" {
		if file, ok := o.Out.(*os.File); ok && term.IsTerminal(int(file.Fd())) {
			return usagef("an archive is not for a terminal: -o FILE, or a pipe")
		}
		return nil
	}
	_, err := os.Lstat(o.file)
	switch {
	case err == nil && !o.overwrite:
		return fmt.Errorf("%s is there already: choose another file with -o, or --overwrite", o.file)
	case err == nil || errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return err
}

// download is one download under way.
type download struct {
	options        *downloadOptions
	remote         *remoteArchive
	object         transfer.Object
	progress       *progress
	wholePod       bool
	manifestDigest string
}

func (d *download) policy() transfer.Policy {
	return transferPolicy(d.options.environment, d.progress, d.options.patience, transient)
}

// transferPolicy tells progress how a transfer goes.
func transferPolicy(env *environment, progress *progress, patience time.Duration, transient func(error) bool) transfer.Policy {
	return transfer.Policy{
		Patience:  patience,
		Transient: transient,
		Progress:  progress.bytes,
		Notice: func(err error, wait time.Duration) {
			progress.note("%v: trying again in %s", err, wait)
		},
		Now: env.now,
	}
}

func (d *download) what() string {
	if d.wholePod {
		return "podcheckpoint " + d.remote.name
	}
	return "container " + d.remote.container + " of podcheckpoint " + d.remote.name
}

// toFile downloads to a file, going on with what is there of it.
func (d *download) toFile(ctx context.Context, path string) error {
	of := fmt.Sprintf("%s %s/%s %s", d.remote.calls.base, d.remote.namespace, d.remote.name, d.remote.container)
	d.progress.step("looking for what is there of %s", path)
	file, discarded, err := transfer.OpenPartial(ctx, path, of, d.object, d.progress.bytes)
	if err != nil {
		return err
	}
	if discarded {
		d.progress.note("%s.partial was a part of another archive: beginning anew", path)
	}
	if file.Offset() > 0 {
		d.progress.note("%s of %s are there already", size(file.Offset()), size(d.object.Size))
	}
	digest := d.askDigest(ctx)
	defer digest.cancel()
	d.progress.step("downloading %s", d.what())
	if err := transfer.Download(ctx, d.remote, d.object, file.Offset(), file, d.policy()); err != nil {
		return errors.Join(err, file.Close())
	}
	err = d.verify(ctx, file.Sum(), file.Open(), digest)
	switch {
	case errors.Is(err, transfer.ErrCorrupt):
		return errors.Join(err, file.Discard())
	case err != nil:
		return errors.Join(err, file.Close())
	}
	if err := file.Finish(); err != nil {
		return fmt.Errorf("everything has arrived, but: %w", err)
	}
	d.progress.end()
	fmt.Fprintf(d.options.Out, "%s downloaded: %s (%d bytes), sha256:%s\n", path, size(d.object.Size), d.object.Size, hex.EncodeToString(file.Sum()))
	return nil
}

// stream is standard output, the digest and the comparison of members at a time.
type stream struct {
	io.Writer
}

// Mark implements transfer.Sink: there is nothing to go on with.
func (stream) Mark() error { return nil }

// toStream downloads to standard output. The verdict comes after the last byte.
func (d *download) toStream(ctx context.Context, out io.Writer) error {
	digest := d.askDigest(ctx)
	defer digest.cancel()
	sum := sha256.New()
	pr, pw := io.Pipe()
	members := make(chan error, 1)
	go func() {
		var err error
		if d.wholePod {
			err = transfer.VerifyPod(ctx, pr, d.manifestDigest)
		}
		if err == nil {
			_, err = io.Copy(io.Discard, pr)
		}
		pr.CloseWithError(err)
		members <- err
	}()
	d.progress.step("downloading %s", d.what())
	err := transfer.Download(ctx, d.remote, d.object, 0, stream{io.MultiWriter(out, sum, pw)}, d.policy())
	pw.CloseWithError(err)
	if inMembers := <-members; errors.Is(inMembers, transfer.ErrCorrupt) && err == nil {
		return inMembers
	}
	if err != nil {
		return err
	}
	return d.verify(ctx, sum.Sum(nil), nil, digest)
}

// verify compares what has arrived with the server's digest, and members with the
// manifest; members is nil where that has been done.
func (d *download) verify(ctx context.Context, sum []byte, members io.Reader, digest *askedDigest) error {
	if d.wholePod && members != nil {
		d.progress.step("verifying")
		if err := transfer.VerifyPod(ctx, members, d.manifestDigest); err != nil {
			return err
		}
	}
	d.progress.step("comparing with the digest of its node")
	want, err := digest.wait(ctx, digestPatience)
	switch {
	case err != nil:
		return fmt.Errorf("asking for the archive's digest: %w", err)
	case want == nil && ctx.Err() != nil:
		return ctx.Err()
	case want == nil && d.wholePod && d.manifestDigest != "":
		// Every member agrees with the manifest, and that with the object.
		d.progress.note("the server has not given a digest of the archive within %s", digestPatience)
	case want == nil:
		return fmt.Errorf("%w: the server has not given a digest of the archive within %s", transfer.ErrStalled, digestPatience)
	case !bytes.Equal(want, sum):
		return fmt.Errorf("%w: the archive that has arrived has digest %x, its node says %x", transfer.ErrCorrupt, sum, want)
	}
	return nil
}

// askedDigest is the digest of the archive, asked for while that arrives.
type askedDigest struct {
	cancel context.CancelFunc
	done   chan struct{}
	sum    []byte
	err    error
}

func (d *download) askDigest(ctx context.Context) *askedDigest {
	ctx, cancel := context.WithCancel(ctx)
	a := &askedDigest{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(a.done)
		a.sum, a.err = d.remote.digest(ctx, d.object.ETag)
	}()
	return a
}

func (a *askedDigest) wait(ctx context.Context, limit time.Duration) ([]byte, error) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-a.done:
	case <-timer.C:
		a.cancel()
		<-a.done
	case <-ctx.Done():
		<-a.done
	}
	return a.sum, a.err
}
