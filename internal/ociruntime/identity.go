package ociruntime

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"podstasis.dev/stasis/internal/nodeapi"
)

// writeIdentity tells a restored container who it is now, by a file in its writable
// layer: a mount would be one that its source did not have. It is there before the
// first instruction, also where the container sees its root file system read-only.
// What an earlier restore left is replaced. No path in the container leads out of it.
func writeIdentity(rootfs string, id nodeapi.Identity) error {
	data, err := encodeIdentity(id)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.MkdirAll(path.Dir(nodeapi.IdentityPath), 0o755); err != nil {
		return err
	}
	temporary := nodeapi.IdentityPath + ".new"
	if err := root.RemoveAll(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := root.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Chmod(0o444), f.Close()); err != nil {
		return err
	}
	return root.Rename(temporary, nodeapi.IdentityPath)
}

// encodeIdentity makes JSON of a fixed length. The source's part comes from the
// checkpoint, which may say anything: where that is too long it is left out.
func encodeIdentity(id nodeapi.Identity) ([]byte, error) {
	data, err := json.MarshalIndent(id, "", "  ")
	if err == nil && len(data) >= nodeapi.IdentitySize {
		id.Source = nodeapi.IdentitySource{}
		data, err = json.MarshalIndent(id, "", "  ")
	}
	if err != nil {
		return nil, err
	}
	if len(data) >= nodeapi.IdentitySize {
		return nil, fmt.Errorf("it has %d bytes, at most %d are possible", len(data), nodeapi.IdentitySize-1)
	}
	return append(data, bytes.Repeat([]byte("\n"), nodeapi.IdentitySize-len(data))...), nil
}
