package archive

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"podstasis.dev/stasis/internal/checkpoint"
)

// File is an archive on disk, read without being unpacked. Nothing in it has been
// compared with its digests: Unpack does that.
type File struct {
	// Manifest of the checkpoint. Of an archive that a kubelet wrote it is made from
	// what that says, and has no digests.
	Manifest *checkpoint.Manifest
	// ManifestDigest and Object are those of a Pod's archive.
	ManifestDigest string
	Object         []byte
	// FS is the checkpoint's directory, in one layout whoever wrote the archive.
	FS fs.FS
}

// FS is the checkpoint's directory in an archive on disk.
func FS(r io.ReaderAt, size int64) (fs.FS, error) {
	f, err := OpenFile(r, size)
	if err != nil {
		return nil, err
	}
	return f.FS, nil
}

// OpenFile reads the headers of an archive and what they are about.
func OpenFile(r io.ReaderAt, size int64) (*File, error) {
	x, err := index(r, size)
	if err != nil {
		return nil, err
	}
	if isKubelet(x.first) {
		return x.kubelet()
	}
	return x.pod()
}

// indexed are an archive's members.
type indexed struct {
	r       io.ReaderAt
	first   string // name of the first
	headers map[string]*tar.Header
	at      map[string]int64 // where contents begin
	order   []string
}

func index(r io.ReaderAt, size int64) (*indexed, error) {
	section := io.NewSectionReader(r, 0, size)
	t := tar.NewReader(section)
	x := &indexed{r: r, headers: map[string]*tar.Header{}, at: map[string]int64{}}
	for {
		h, err := t.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			return nil, readError(err)
		}
		if err := plainMember(h); err != nil {
			return nil, err
		}
		if _, twice := x.headers[h.Name]; twice {
			return nil, fmt.Errorf("%w: it holds %q twice", ErrInvalid, h.Name)
		}
		if len(x.order) > defaultMaxMembers {
			return nil, fmt.Errorf("%w: more than %d files", ErrTooLarge, defaultMaxMembers)
		}
		// The reader takes whole headers and nothing more, so this is where content begins.
		at, err := section.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		if h.Size > size-at {
			return nil, fmt.Errorf("%w: it is cut off in %q", ErrInvalid, h.Name)
		}
		x.headers[h.Name], x.at[h.Name] = h, at
		x.order = append(x.order, h.Name)
	}
	if len(x.order) == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrInvalid)
	}
	x.first = x.order[0]
	return x, nil
}

func (x *indexed) section(name string) *io.SectionReader {
	return io.NewSectionReader(x.r, x.at[name], x.headers[name].Size)
}

func (x *indexed) small(name string, most int64) ([]byte, error) {
	h, ok := x.headers[name]
	if !ok || h.Typeflag != tar.TypeReg {
		return nil, fmt.Errorf("%w: %s is missing", ErrInvalid, name)
	}
	if h.Size > most {
		return nil, fmt.Errorf("%w: %s has %d bytes, %d are taken", ErrTooLarge, name, h.Size, most)
	}
	return io.ReadAll(x.section(name))
}

func (x *indexed) pod() (*File, error) {
	object, err := x.small(ObjectName, maxObjectBytes)
	if err != nil {
		return nil, err
	}
	data, err := x.small(checkpoint.ManifestName, maxManifestBytes)
	if err != nil {
		return nil, err
	}
	m, err := checkpoint.DecodeManifest(data)
	if err == nil {
		err = checkPaths(m)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	dir := newTree(m.CutTime)
	dir.addBytes(checkpoint.ManifestName, data)
	for _, f := range m.Files {
		h, ok := x.headers[f.Path]
		if !ok || h.Typeflag != tar.TypeReg || h.Size != f.Size {
			return nil, fmt.Errorf("%w: %s is missing or of another size", ErrInvalid, f.Path)
		}
		dir.add(f.Path, f.Size, func() (io.Reader, error) { return x.section(f.Path), nil })
	}
	if len(x.order) != len(m.Files)+2 {
		return nil, fmt.Errorf("%w: it holds files that are not in its manifest", ErrInvalid)
	}
	return &File{Manifest: m, ManifestDigest: DigestOf(data), Object: object, FS: dir}, nil
}

func (x *indexed) kubelet() (*File, error) {
	meta, facts := metadata{}, imageFacts{}
	files := map[string]string{} // by name in the container's directory
	seen := map[string]bool{}
	for _, member := range x.order {
		name, part := kubeletMember(x.headers[member])
		if part == partUnknown || seen[name] {
			return nil, fmt.Errorf("%w: it holds %q, or that twice", ErrInvalid, member)
		}
		seen[name] = true
		switch part {
		case partMetadata:
			data, err := x.small(member, maxMetadataBytes)
			if err != nil {
				return nil, err
			}
			meta[name] = data
		case partFile, partRootfs:
			files[name] = member
			start := make([]byte, min(maxStatsBytes, x.headers[member].Size))
			if name == dumpLogFile || strings.HasPrefix(name, imagesDir+"/core-") {
				if _, err := io.ReadFull(x.section(member), start); err != nil {
					return nil, readError(err)
				}
			}
			if name == dumpLogFile {
				facts.readLog(start)
			} else if strings.HasPrefix(name, imagesDir+"/core-") {
				facts.readCore(start)
			}
		}
	}
	_, rootfs := files[rootfsFile]
	m, err := meta.manifest(facts, rootfs)
	if err != nil {
		return nil, err
	}
	if _, ok := files[imagesDir+"/inventory.img"]; !ok {
		return nil, fmt.Errorf("%w: %s/inventory.img is missing", ErrInvalid, kubeletImages)
	}
	dir := newTree(m.CutTime)
	base := containersDir + "/" + m.Containers[0].Name + "/"
	for name, member := range files {
		if name == rootfsFile {
			continue
		}
		dir.add(base+name, x.headers[member].Size, func() (io.Reader, error) { return x.section(member), nil })
	}
	dir.addBytes(base+specFile, meta[kubeletSpec])
	if stats, ok := meta[kubeletDumpStats]; ok {
		dir.addBytes(base+dumpStatsFile, stats)
	}
	if err := x.addRootfs(dir, m, meta, files[rootfsFile]); err != nil {
		return nil, err
	}
	m.Files = dir.list()
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, err
	}
	dir.addBytes(checkpoint.ManifestName, data)
	return &File{Manifest: m, FS: dir}, nil
}

// addRootfs makes one difference of the one in the archive, if any, and the list of
// removed files beside it.
func (x *indexed) addRootfs(dir *tree, m *checkpoint.Manifest, meta metadata, member string) error {
	deleted, err := meta.deleted()
	if err != nil {
		return err
	}
	whiteouts, err := whiteoutsOf(deleted)
	if err != nil {
		return err
	}
	if member == "" && whiteouts == "" {
		return nil
	}
	open := func() (io.Reader, error) {
		if member == "" {
			return strings.NewReader(whiteouts + string(make([]byte, trailerSize))), nil
		}
		content, err := plainTar(x.section(member))
		if err != nil {
			return nil, err
		}
		return io.MultiReader(strings.NewReader(whiteouts), content), nil
	}
	r, err := open()
	if err != nil {
		return err
	}
	size, err := io.Copy(io.Discard, io.LimitReader(r, maxRootfsBytes+1))
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrInvalid, kubeletRootfs, err)
	}
	if size > maxRootfsBytes {
		return fmt.Errorf("%w: %s holds more than %d bytes", ErrTooLarge, kubeletRootfs, int64(maxRootfsBytes))
	}
	m.Containers[0].Rootfs = containersDir + "/" + m.Containers[0].Name + "/" + rootfsFile
	dir.add(m.Containers[0].Rootfs, size, open)
	return nil
}

// maxRootfsBytes bounds what is taken out of a compressed difference only to know
// its size.
const maxRootfsBytes = 64 << 30
