package archive

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"podstasis.dev/stasis/internal/checkpoint"
)

// staging is where a container's files are unpacked to, before its name is known.
const staging = containersDir + "/.staging"

// kubeletPart says where a member of a kubelet's archive belongs.
type kubeletPart int

const (
	partUnknown kubeletPart = iota
	partDirectory
	partMetadata // read into memory
	partFile     // kept as it is
	partRootfs
	partIgnored // known, and of no use here
)

// kubeletMember says what a member of a kubelet's archive is, and its name in the
// container's directory. containerd, CRI-O and Podman write these names and no others;
// Podman's begin with "./".
func kubeletMember(h *tar.Header) (name string, part kubeletPart) {
	name = path.Clean(h.Name)
	if h.Typeflag == tar.TypeDir {
		switch name {
		case ".", kubeletImages, "artifacts":
			return name, partDirectory
		}
		return name, partUnknown
	}
	switch name {
	case kubeletConfig, kubeletSpec, kubeletDeleted, kubeletDumpStats:
		return name, partMetadata
	case kubeletDumpLog, kubeletOutput:
		return name, partFile
	case kubeletRootfs:
		return rootfsFile, partRootfs
	case kubeletStatus, "status", "network.status", "bind.mounts", "io.kubernetes.cri-o.LogPath", "devshm-checkpoint.tar":
		return name, partIgnored
	}
	if image, ok := strings.CutPrefix(name, kubeletImages+"/"); ok && plainName(image) {
		return imagesDir + "/" + image, partFile
	}
	if artifact, ok := strings.CutPrefix(name, "artifacts/"); ok && plainName(artifact) {
		return name, partIgnored
	}
	return name, partUnknown
}

// kubelet unpacks the archive of one container. first is its first member.
func (u *unpacker) kubelet(first *tar.Header) (*Unpacked, error) {
	meta := metadata{}
	seen := map[string]bool{}
	for h := first; h != nil; {
		name, part := kubeletMember(h)
		if part == partUnknown {
			return nil, fmt.Errorf("%w: it holds %q", ErrInvalid, h.Name)
		}
		if seen[name] {
			return nil, fmt.Errorf("%w: it holds %q twice", ErrInvalid, h.Name)
		}
		seen[name] = true
		if err := u.kubeletPart(h, name, part, meta); err != nil {
			return nil, err
		}
		var err error
		if h, err = u.next(); err != nil {
			return nil, err
		}
	}
	m, name, err := u.describe(meta, seen)
	if err != nil {
		return nil, err
	}
	if err := u.into.Rename(staging, containersDir+"/"+name); err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	digest, err := checkpoint.Seal(u.ctx, u.into.Name(), m)
	if err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	return &Unpacked{Manifest: m, ManifestDigest: digest}, nil
}

func (u *unpacker) kubeletPart(h *tar.Header, name string, part kubeletPart, meta metadata) error {
	switch part {
	case partMetadata:
		most := int64(maxMetadataBytes)
		if name == kubeletDumpStats {
			most = maxStatsBytes
		}
		data, err := u.small(h, most)
		meta[name] = data
		return err
	case partFile:
		_, err := u.file(staging+"/"+name, u.tar)
		return err
	case partRootfs:
		return u.rootfs(name)
	}
	return nil
}

// rootfs unpacks a root file system's difference, which containerd compresses
// without a word.
func (u *unpacker) rootfs(name string) error {
	content, err := plainTar(u.tar)
	if err == nil {
		_, err = u.file(staging+"/"+name, content)
	}
	if errors.Is(err, gzip.ErrChecksum) || errors.Is(err, gzip.ErrHeader) {
		err = fmt.Errorf("%w: %s: %w", ErrInvalid, kubeletRootfs, err)
	}
	return err
}

// plainTar takes compression off, if there is any.
func plainTar(r io.Reader) (io.Reader, error) {
	b := bufio.NewReader(r)
	if magic, err := b.Peek(2); err != nil || magic[0] != 0x1f || magic[1] != 0x8b {
		return b, nil
	}
	z, err := gzip.NewReader(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrInvalid, kubeletRootfs, err)
	}
	return z, nil
}

// describe writes what belongs into the container's directory and makes the
// manifest.
func (u *unpacker) describe(meta metadata, seen map[string]bool) (*checkpoint.Manifest, string, error) {
	facts := imageFacts{}
	if seen[kubeletDumpLog] {
		data, err := u.beginning(staging + "/" + dumpLogFile)
		if err != nil {
			return nil, "", err
		}
		facts.readLog(data)
	}
	for name := range seen {
		if image, ok := strings.CutPrefix(name, imagesDir+"/"); ok && strings.HasPrefix(image, "core-") && facts.architecture == "" {
			data, err := u.beginning(staging + "/" + name)
			if err != nil {
				return nil, "", err
			}
			facts.readCore(data)
		}
	}
	m, err := meta.manifest(facts, seen[rootfsFile])
	if err != nil {
		return nil, "", err
	}
	if !seen[imagesDir+"/inventory.img"] {
		return nil, "", fmt.Errorf("%w: %s/inventory.img is missing", ErrInvalid, kubeletImages)
	}
	files := map[string][]byte{specFile: meta[kubeletSpec]}
	if stats, ok := meta[kubeletDumpStats]; ok {
		files[dumpStatsFile] = stats
	}
	for name, data := range files {
		if _, err := u.file(staging+"/"+name, strings.NewReader(string(data))); err != nil {
			return nil, "", err
		}
	}
	if deleted, err := meta.deleted(); err != nil {
		return nil, "", err
	} else if len(deleted) > 0 {
		if err := u.addWhiteouts(deleted, seen[rootfsFile]); err != nil {
			return nil, "", err
		}
		m.Containers[0].Rootfs = containersDir + "/" + m.Containers[0].Name + "/" + rootfsFile
	}
	return m, m.Containers[0].Name, nil
}

// beginning reads the first bytes of a file that was unpacked.
func (u *unpacker) beginning(name string) ([]byte, error) {
	f, err := u.into.Open(name)
	if err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxStatsBytes))
}

// addWhiteouts puts what CRI-O and Podman list beside the difference into it, before
// everything else: what was removed and made anew is there.
func (u *unpacker) addWhiteouts(deleted []string, there bool) error {
	const old = staging + "/rootfs-without.tar"
	rest := io.Reader(strings.NewReader(string(make([]byte, trailerSize))))
	if there {
		if err := u.into.Rename(staging+"/"+rootfsFile, old); err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
		f, err := u.into.Open(old)
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
		defer f.Close()
		rest = f
	}
	whiteouts, err := whiteoutsOf(deleted)
	if err != nil {
		return err
	}
	if _, err := u.file(staging+"/"+rootfsFile, io.MultiReader(strings.NewReader(whiteouts), rest)); err != nil {
		return err
	}
	if err := u.into.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unpack: %w", err)
	}
	return nil
}

// whiteoutsOf are tar entries, without an end, that say that paths are removed.
func whiteoutsOf(deleted []string) (string, error) {
	var b strings.Builder
	w := tar.NewWriter(&b)
	for _, name := range deleted {
		name = strings.TrimPrefix(path.Clean("/"+name), "/")
		dir, base := path.Split(name)
		if base == "" || len(name) > 4096 || strings.ContainsRune(name, 0) || strings.HasPrefix(base, ".wh.") {
			return "", fmt.Errorf("%w: %s names %.80q", ErrInvalid, kubeletDeleted, name)
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: dir + ".wh." + base, Mode: 0o600}); err != nil {
			return "", fmt.Errorf("%w: %s: %w", ErrInvalid, kubeletDeleted, err)
		}
	}
	return b.String(), nil
}

// syncDirs makes the names below a directory durable, if it is there.
func syncDirs(root *os.Root, dir string) error {
	err := fs.WalkDir(root.FS(), dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		f, err := root.Open(name)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
