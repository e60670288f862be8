package gvisor

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// runsc restores a container where its OCI spec is what it was, in all that processes could
// tell, and in gVisor's annotations. One of these, which runsc's shim sets, names the
// cgroup of the Pod: no two Pods have the same. So the specs that runsc has saved, and that
// it compares the new ones with, get the new Pod's.

const (
	// stateFile is the one of runsc's files that begins with what it compares.
	stateFile = "checkpoint.img"
	// stateMagic begins it; the length of the metadata and these follow, then the state.
	stateMagic = "gVisorSF"
	// maxMetadata is what runsc itself takes.
	maxMetadata = 16 << 20
	// specsKey is the metadata's key of all containers' specs.
	specsKey = "container_specs"
	// cgroupAnnotation is the sandbox's annotation that names the Pod's cgroup.
	cgroupAnnotation = "dev.gvisor.spec.cgroup-parent"
)

// Adapt writes to dir, which it makes, what runsc is to restore from, of the checkpoint in
// the directory checkpoint. Only one file is another. annotations are those of gVisor that
// the new sandbox's OCI spec has.
func Adapt(checkpoint string, annotations map[string]string, dir string) error {
	from := filepath.Join(checkpoint, imageDir)
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
		return err
	}
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, f := range files {
		name := f.Name()
		if name == stateFile {
			err = adaptState(filepath.Join(from, name), annotations, filepath.Join(dir, name))
		} else {
			err = linkOrCopy(filepath.Join(from, name), filepath.Join(dir, name))
		}
		if err != nil {
			return fmt.Errorf("adapt %s to the new Pod: %w", name, err)
		}
	}
	return nil
}

func linkOrCopy(from, to string) error {
	err := os.Link(from, to)
	if !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EROFS) {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

func adaptState(from string, annotations map[string]string, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	metadata, err := readMetadata(in)
	if err == nil {
		metadata, err = withAnnotations(metadata, annotations)
	}
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	head := binary.BigEndian.AppendUint64([]byte(stateMagic), uint64(len(metadata)))
	_, err = out.Write(append(head, metadata...))
	if err == nil {
		_, err = io.Copy(out, in)
	}
	return errors.Join(err, out.Close())
}

// readMetadata reads the head of a state file, up to the state.
func readMetadata(r io.Reader) ([]byte, error) {
	head := make([]byte, len(stateMagic)+8)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	if !bytes.HasPrefix(head, []byte(stateMagic)) {
		return nil, errors.New("it is no state of gVisor")
	}
	size := binary.BigEndian.Uint64(head[len(stateMagic):])
	if size > maxMetadata {
		return nil, fmt.Errorf("its metadata have %d bytes, more than %d", size, maxMetadata)
	}
	metadata := make([]byte, size)
	_, err := io.ReadFull(r, metadata)
	return metadata, err
}

// withAnnotations gives the specs in metadata the new sandbox's cgroup. All else stays as
// it is, also what this code does not know.
func withAnnotations(metadata []byte, annotations map[string]string) ([]byte, error) {
	var values map[string]string
	if err := json.Unmarshal(metadata, &values); err != nil {
		return nil, fmt.Errorf("read its metadata: %w", err)
	}
	var specs map[string]map[string]json.RawMessage
	if err := json.Unmarshal([]byte(values[specsKey]), &specs); err != nil {
		return nil, fmt.Errorf("read the containers' specs in its metadata: %w", err)
	}
	for name, spec := range specs {
		var of map[string]string
		if err := json.Unmarshal(orEmpty(spec["annotations"]), &of); err != nil {
			return nil, fmt.Errorf("read the annotations of %q in its metadata: %w", name, err)
		}
		if of["io.kubernetes.cri.container-type"] != "sandbox" {
			continue
		}
		delete(of, cgroupAnnotation)
		if now, ok := annotations[cgroupAnnotation]; ok {
			of[cgroupAnnotation] = now
		}
		text, err := json.Marshal(of)
		if err != nil {
			return nil, err
		}
		spec["annotations"] = text
	}
	text, err := json.Marshal(specs)
	if err != nil {
		return nil, err
	}
	values[specsKey] = string(text)
	return json.Marshal(values)
}

func orEmpty(value json.RawMessage) []byte {
	if len(value) == 0 {
		return []byte("{}")
	}
	return value
}
