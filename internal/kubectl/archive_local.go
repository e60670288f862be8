package kubectl

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/kubectl/transfer"
)

// localArchive is an archive on the user's disk.
type localArchive struct {
	*archive.File
	file   *os.File
	size   int64
	digest string
}

// Close closes the file.
func (a *localArchive) Close() error { return a.file.Close() }

// lookInto opens an archive and reads what it is of.
func lookInto(path string) (*localArchive, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	var inside *archive.File
	if err == nil {
		if inside, err = archive.OpenFile(file, info.Size()); err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &localArchive{File: inside, file: file, size: info.Size()}, nil
}

// openArchive reads the whole archive: its digest, and whether it is undamaged.
func openArchive(ctx context.Context, path string, progress *progress) (*localArchive, error) {
	a, err := lookInto(path)
	if err != nil {
		return nil, err
	}
	sum := sha256.New()
	read := int64(0)
	whole := io.TeeReader(&told{io.NewSectionReader(a.file, 0, a.size), func(n int) error {
		read += int64(n)
		progress.bytes(read, a.size)
		return ctx.Err()
	}}, sum)
	if a.wholePod() {
		err = transfer.VerifyPod(ctx, whole, "")
	}
	if err == nil {
		_, err = io.Copy(io.Discard, whole)
	}
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case errors.Is(err, transfer.ErrCorrupt):
		err = &exitError{ExitCorrupt, fmt.Errorf("%s is damaged: %w", path, err)}
	}
	if err != nil {
		return nil, errors.Join(err, a.Close())
	}
	a.digest = "sha256:" + hex.EncodeToString(sum.Sum(nil))
	return a, nil
}

// wholePod says that Stasis wrote the archive, of a whole checkpoint; a kubelet's is
// of one container.
func (a *localArchive) wholePod() bool { return a.Object != nil }

// told tells of every read.
type told struct {
	io.Reader
	tell func(n int) error
}

func (t *told) Read(p []byte) (int, error) {
	n, err := t.Reader.Read(p)
	if stop := t.tell(n); stop != nil && err == nil {
		err = stop
	}
	return n, err
}

// object is the PodCheckpoint that the archive is to become.
func (o *importOptions) object(a *localArchive) (*checkpointv1alpha1.PodCheckpoint, error) {
	checkpoint := &checkpointv1alpha1.PodCheckpoint{}
	checkpoint.SetGroupVersionKind(checkpointv1alpha1.GroupVersion.WithKind("PodCheckpoint"))
	checkpoint.Namespace, checkpoint.Name = o.namespace, o.name
	checkpoint.Spec.NodeName = o.node
	checkpoint.Spec.Import = &checkpointv1alpha1.CheckpointImport{Digest: a.digest, SizeBytes: a.size}
	checkpoint.Spec.SourcePodName = o.pod
	name := ""
	if a.wholePod() {
		var before checkpointv1alpha1.PodCheckpoint
		if err := json.Unmarshal(a.Object, &before); err != nil {
			return nil, fmt.Errorf("%s: its PodCheckpoint cannot be read: %w", o.file, err)
		}
		name = before.Name
		checkpoint.Spec.Containers = before.Spec.Containers
		checkpoint.Spec.SourcePodName = or(o.pod, before.Spec.SourcePodName)
	} else {
		container := a.Manifest.Containers[0].Name
		checkpoint.Spec.Containers = []string{container}
		checkpoint.Spec.SourcePodName = or(o.pod, a.Manifest.Sandbox.Name)
		name = importName(checkpoint.Spec.SourcePodName, container, a.digest)
	}
	checkpoint.Name = or(o.name, name)
	if wrong := validation.IsDNS1123Subdomain(checkpoint.Spec.SourcePodName); len(wrong) > 0 {
		return nil, fmt.Errorf("%s does not say which Pod it is of (%q): --pod names it", o.file, cut(clean(checkpoint.Spec.SourcePodName), 80))
	}
	if wrong := validation.IsDNS1123Subdomain(checkpoint.Name); len(wrong) > 0 || len(checkpoint.Name) > maxCheckpointName {
		return nil, fmt.Errorf("%q, from %s, is not a name of a PodCheckpoint: --name gives it one", cut(clean(checkpoint.Name), 80), o.file)
	}
	return checkpoint, nil
}

// importName is the same each time, so that an import can be gone on with.
func importName(pod, container, digest string) string {
	tail := "-" + container + "-" + strings.TrimPrefix(digest, "sha256:")[:8]
	if most := max(maxCheckpointName-len(tail), 1); len(pod) > most {
		pod = strings.TrimRight(pod[:most], "-.")
	}
	return pod + tail
}
