// Package image writes container images: OCI layouts in a tar file, of one uncompressed
// layer, byte for byte the same for the same content.
package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"strings"
)

// File is an entry of an image's root file system. Parent directories need no entry.
type File struct {
	Path string // without a leading slash
	Mode fs.FileMode
	// Data is a regular file's content, Link a symbolic link's target; a directory has Mode.IsDir.
	Data []byte
	Link string
}

// Image is a name, what runs by default, and files.
type Image struct {
	// Name is complete: host/name:tag.
	Name       string
	Entrypoint []string
	Cmd        []string
	User       string
	Files      []File
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// Archive returns the image as an OCI layout in a tar file.
func (im Image) Archive() ([]byte, error) {
	layer, err := im.layer()
	if err != nil {
		return nil, fmt.Errorf("making the image %s: %w", im.Name, err)
	}
	blobs := map[string][]byte{}
	add := func(mediaType string, data []byte) descriptor {
		sum := sha256.Sum256(data)
		name := hex.EncodeToString(sum[:])
		blobs[name] = data
		return descriptor{MediaType: mediaType, Digest: "sha256:" + name, Size: len(data)}
	}
	type object = map[string]any
	here := platform{runtime.GOARCH, "linux"}
	layerRef := add("application/vnd.oci.image.layer.v1.tar", layer)
	config := object{
		"architecture": here.Architecture, "os": here.OS,
		"config": object{"Env": []string{"PATH=/bin:/usr/bin:/sbin:/usr/sbin"}, "Entrypoint": im.Entrypoint, "Cmd": im.Cmd, "User": im.User},
		"rootfs": object{"type": "layers", "diff_ids": []string{layerRef.Digest}},
	}
	encoded, err := json.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("making the image %s: %w", im.Name, err)
	}
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	encoded, err = json.Marshal(object{
		"schemaVersion": 2, "mediaType": manifestType,
		"config": add("application/vnd.oci.image.config.v1+json", encoded), "layers": []descriptor{layerRef},
	})
	if err != nil {
		return nil, fmt.Errorf("making the image %s: %w", im.Name, err)
	}
	manifest := add(manifestType, encoded)
	manifest.Platform = &here
	manifest.Annotations = map[string]string{
		"io.containerd.image.name":          im.Name,
		"org.opencontainers.image.ref.name": im.Name[strings.LastIndexByte(im.Name, ':')+1:],
	}
	index, err := json.Marshal(object{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []descriptor{manifest}})
	if err != nil {
		return nil, fmt.Errorf("making the image %s: %w", im.Name, err)
	}
	files := []File{
		{Path: "oci-layout", Mode: 0o644, Data: []byte(`{"imageLayoutVersion":"1.0.0"}`)},
		{Path: "index.json", Mode: 0o644, Data: index},
	}
	for name, data := range blobs {
		files = append(files, File{Path: "blobs/sha256/" + name, Mode: 0o644, Data: data})
	}
	archive, err := pack(files)
	if err != nil {
		return nil, fmt.Errorf("making the image %s: %w", im.Name, err)
	}
	return archive, nil
}

func (im Image) layer() ([]byte, error) {
	given := map[string]bool{}
	for _, f := range im.Files {
		if !fs.ValidPath(f.Path) || f.Path == "." {
			return nil, fmt.Errorf("%q is no path for a file of an image", f.Path)
		}
		if given[f.Path] {
			return nil, fmt.Errorf("%s is given twice", f.Path)
		}
		given[f.Path] = true
	}
	files := slices.Clone(im.Files)
	for _, f := range im.Files {
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			if !given[dir] {
				given[dir] = true
				files = append(files, File{Path: dir, Mode: fs.ModeDir | 0o755})
			}
		}
	}
	return pack(files)
}

// pack writes the files in the order of their paths, so that parents come first.
func pack(files []File) ([]byte, error) {
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range files {
		header := &tar.Header{Name: f.Path, Mode: int64(f.Mode.Perm()), Format: tar.FormatPAX}
		if f.Mode&fs.ModeSticky != 0 {
			header.Mode |= 0o1000
		}
		switch {
		case f.Mode.IsDir():
			header.Typeflag, header.Name = tar.TypeDir, f.Path+"/"
		case f.Link != "":
			header.Typeflag, header.Linkname, header.Mode = tar.TypeSymlink, f.Link, 0o777
		case f.Mode.IsRegular():
			header.Typeflag, header.Size = tar.TypeReg, int64(len(f.Data))
		default:
			return nil, errors.New(f.Path + " is neither file, directory nor link")
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.Data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// Pause is the image of Pod sandboxes: one program that waits.
func Pause(program []byte) Image {
	return Image{
		Name: "localhost/pause:1", Entrypoint: []string{"/pause"}, User: "65535:65535",
		Files: []File{{Path: "pause", Mode: 0o755, Data: program}},
	}
}

// Busybox is an image of a statically linked busybox, with a link for each of its applets.
func Busybox(program []byte, applets []string) Image {
	im := Image{Name: "localhost/busybox:1", Cmd: []string{"/bin/sh"}, Files: []File{
		{Path: "bin/busybox", Mode: 0o755, Data: program},
		{Path: "etc/passwd", Mode: 0o644, Data: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		{Path: "etc/group", Mode: 0o644, Data: []byte("root:x:0:\nnogroup:x:65534:\n")},
		{Path: "usr/bin/env", Mode: fs.ModeSymlink, Link: "/bin/busybox"},
		{Path: "root", Mode: fs.ModeDir | 0o700},
		{Path: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
	}}
	for _, dir := range []string{"dev", "proc", "sys", "run", "var/log", "home"} {
		im.Files = append(im.Files, File{Path: dir, Mode: fs.ModeDir | 0o755})
	}
	for _, applet := range applets {
		if applet != "busybox" {
			im.Files = append(im.Files, File{Path: "bin/" + applet, Mode: fs.ModeSymlink, Link: "busybox"})
		}
	}
	return im
}
