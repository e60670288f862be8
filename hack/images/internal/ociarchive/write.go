// Package ociarchive writes one image as a tar in the OCI image layout, under a
// name that containerd and Docker import it by.
package ociarchive

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// WriteFile writes image to file, complete or not at all, and returns the
// digest of its manifest.
func WriteFile(file, name, arch string, image v1.Image) (digest string, err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return "", err
	}
	temporary, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			_ = temporary.Close()
			_ = os.Remove(temporary.Name())
		}
	}()
	if digest, err = Write(temporary, name, arch, image); err != nil {
		return "", err
	}
	if err = temporary.Chmod(0o644); err != nil {
		return "", err
	}
	if err = temporary.Close(); err != nil {
		return "", err
	}
	return digest, os.Rename(temporary.Name(), file)
}

// Write writes image to w and returns the digest of its manifest.
func Write(w io.Writer, name, arch string, image v1.Image) (string, error) {
	slash, colon := strings.LastIndex(name, "/"), strings.LastIndex(name, ":")
	if slash < 0 || colon < slash+2 || colon == len(name)-1 {
		return "", fmt.Errorf("image name %q: want HOST/NAME:TAG", name)
	}
	manifest, err := image.RawManifest()
	if err != nil {
		return "", err
	}
	config, err := image.RawConfigFile()
	if err != nil {
		return "", err
	}
	layers, err := image.Layers()
	if err != nil {
		return "", err
	}
	digest, err := image.Digest()
	if err != nil {
		return "", err
	}
	index, err := json.Marshal(v1.IndexManifest{
		SchemaVersion: 2,
		MediaType:     types.OCIImageIndex,
		Manifests: []v1.Descriptor{{
			MediaType: types.OCIManifestSchema1,
			Digest:    digest,
			Size:      int64(len(manifest)),
			Platform:  &v1.Platform{OS: "linux", Architecture: arch},
			Annotations: map[string]string{
				"io.containerd.image.name":          name, // the name that containerd imports it by
				"org.opencontainers.image.ref.name": name[colon+1:],
			},
		}},
	})
	if err != nil {
		return "", err
	}

	archive := tar.NewWriter(w)
	add := func(at string, size int64, content io.Reader) error {
		header := &tar.Header{Typeflag: tar.TypeReg, Name: at, Size: size, Mode: 0o644, Format: tar.FormatPAX}
		if err := archive.WriteHeader(header); err != nil {
			return fmt.Errorf("writing %s: %w", at, err)
		}
		if _, err := io.Copy(archive, content); err != nil {
			return fmt.Errorf("writing %s: %w", at, err)
		}
		return nil
	}
	addBytes := func(at string, content []byte) error { return add(at, int64(len(content)), bytes.NewReader(content)) }
	blob := func(hash v1.Hash) string { return "blobs/" + hash.Algorithm + "/" + hash.Hex }

	configName, err := image.ConfigName()
	if err != nil {
		return "", err
	}
	for _, step := range []struct {
		at      string
		content []byte
	}{
		{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{"index.json", index},
		{blob(digest), manifest},
		{blob(configName), config},
	} {
		if err := addBytes(step.at, step.content); err != nil {
			return "", err
		}
	}
	written := map[v1.Hash]bool{}
	for _, layer := range layers {
		hash, err := layer.Digest()
		if err != nil {
			return "", err
		}
		if written[hash] {
			continue
		}
		written[hash] = true
		size, err := layer.Size()
		if err != nil {
			return "", err
		}
		content, err := layer.Compressed() // as it is stored; ours are not compressed
		if err != nil {
			return "", err
		}
		err = add(blob(hash), size, content)
		_ = content.Close()
		if err != nil {
			return "", err
		}
	}
	return digest.String(), archive.Close()
}
