package transfer

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"

	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
)

const (
	maxObjectBytes   = 4 << 20
	maxManifestBytes = 16 << 20
	// maxTrailer is what may come after the last member: tar(1) fills its last record up.
	maxTrailer = 1 << 20
)

// VerifyPod reads the archive of a whole checkpoint and compares every member with
// the manifest, and the manifest with its digest, where that is known.
func VerifyPod(ctx context.Context, r io.Reader, manifestDigest string) error {
	v := &verifier{ctx: ctx, tar: tar.NewReader(r)}
	if _, err := v.small(archive.ObjectName, maxObjectBytes); err != nil {
		return err
	}
	text, err := v.small(checkpoint.ManifestName, maxManifestBytes)
	if err != nil {
		return err
	}
	if got := archive.DigestOf(text); manifestDigest != "" && got != manifestDigest {
		return fmt.Errorf("%w: %s has digest %s, its PodCheckpoint says %s", ErrCorrupt, checkpoint.ManifestName, got, manifestDigest)
	}
	manifest, err := checkpoint.DecodeManifest(text)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	for _, file := range manifest.Files {
		if err := v.file(file); err != nil {
			return err
		}
	}
	if h, err := v.tar.Next(); err == nil {
		return fmt.Errorf("%w: %q is not in its manifest", ErrCorrupt, h.Name)
	} else if err != io.EOF {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if n, err := io.Copy(io.Discard, io.LimitReader(r, maxTrailer+1)); err != nil || n > maxTrailer {
		return fmt.Errorf("%w: something comes after the archive's end", ErrCorrupt)
	}
	return nil
}

type verifier struct {
	ctx context.Context
	tar *tar.Reader
}

// next is the next member, which must be the regular file of that name.
func (v *verifier) next(name string) (*tar.Header, error) {
	if v.ctx.Err() != nil {
		return nil, context.Cause(v.ctx)
	}
	h, err := v.tar.Next()
	if err != nil {
		return nil, fmt.Errorf("%w: where %s belongs: %w", ErrCorrupt, name, err)
	}
	if h.Name != name || h.Typeflag != tar.TypeReg {
		return nil, fmt.Errorf("%w: %q is where %s belongs", ErrCorrupt, h.Name, name)
	}
	return h, nil
}

func (v *verifier) small(name string, most int64) ([]byte, error) {
	h, err := v.next(name)
	if err != nil {
		return nil, err
	}
	if h.Size > most {
		return nil, fmt.Errorf("%w: %s has %d bytes, %d are taken", ErrCorrupt, name, h.Size, most)
	}
	text, err := io.ReadAll(v.tar)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrCorrupt, name, err)
	}
	return text, nil
}

func (v *verifier) file(want checkpoint.File) error {
	h, err := v.next(want.Path)
	if err != nil {
		return err
	}
	if h.Size != want.Size {
		return fmt.Errorf("%w: %s has %d bytes, its manifest says %d", ErrCorrupt, want.Path, h.Size, want.Size)
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, v.tar); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrCorrupt, want.Path, err)
	}
	if got := "sha256:" + hex.EncodeToString(sum.Sum(nil)); got != want.Digest {
		return fmt.Errorf("%w: %s has digest %s, its manifest says %s", ErrCorrupt, want.Path, got, want.Digest)
	}
	return nil
}
