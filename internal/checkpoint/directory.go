package checkpoint

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

var (
	// ErrMissing says that the data, or a part of them, are not there.
	ErrMissing = errors.New("checkpoint data are missing")
	// ErrCorrupt says that the data are not what was written.
	ErrCorrupt = errors.New("checkpoint data are corrupt")
)

const (
	// maxManifestBytes bounds what is read before a digest has been checked.
	maxManifestBytes = 16 << 20
	digestPrefix     = "sha256:"
)

// Seal completes a checkpoint: it digests and fsyncs every file below dir, lists
// them in the manifest and writes that last. It returns the manifest's digest.
// A directory that Seal did not return from is not a checkpoint.
func Seal(ctx context.Context, dir string, m *Manifest) (string, error) {
	m.FormatVersion = FormatVersion
	m.Files = nil
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", fmt.Errorf("seal checkpoint: %w", err)
	}
	defer root.Close()
	files, err := syncDirectories(root)
	if err != nil {
		return "", fmt.Errorf("seal checkpoint in %s: %w", dir, err)
	}
	sums, err := sealFiles(ctx, root, m, files)
	if err != nil {
		return "", fmt.Errorf("seal checkpoint in %s: %w", dir, err)
	}
	slices.SortFunc(m.Files, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	if err := writeBlocks(dir, m, sums); err != nil {
		return "", fmt.Errorf("seal checkpoint in %s: %w", dir, err)
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return "", fmt.Errorf("encode manifest: %w", err)
	}
	data = append(data, '\n')
	if err := WriteFile(filepath.Join(dir, ManifestName), data, 0o600); err != nil {
		return "", fmt.Errorf("write manifest: %w", err)
	}
	return digestOf(data), nil
}

// syncDirectories makes the names in root durable and lists the files that are sealed.
func syncDirectories(root *os.Root) (files []string, err error) {
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return syncPath(root, name)
		case name != BlocksName: // which is of an earlier seal: it is written anew
			files = append(files, name)
		}
		return nil
	})
	return files, err
}

// smallSealers is how many small files are written to the disk at a time: CRIU makes one for each
// connection, and the disk writes many in the time that it takes for one.
const smallSealers = 32

// sealFiles lists files in m, unsorted, and returns the digests of their blocks. The small ones
// are sealed beside each other, and beside the large ones, one after the other.
func sealFiles(ctx context.Context, root *os.Root, m *Manifest, files []string) (sums map[string][]byte, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var large []string
	small := make(chan string, len(files))
	for _, name := range files {
		if info, err := root.Lstat(name); err == nil && info.Size() <= BlockSize {
			small <- name
		} else { // or it cannot be read, which is said where it is
			large = append(large, name)
		}
	}
	close(small)
	sealed := make(chan File)
	var sealers sync.WaitGroup
	for range smallSealers {
		sealers.Go(func() {
			for name := range small {
				f, err := sealFile(ctx, root, name, nil)
				if err != nil {
					cancel(err)
					continue
				}
				sealed <- f
			}
		})
	}
	sums = map[string][]byte{}
	sealers.Go(func() {
		hasher := newBlockHasher()
		defer hasher.close()
		for _, name := range large {
			f, err := sealFile(ctx, root, name, hasher)
			if err != nil {
				cancel(err)
				return
			}
			if f.listed() {
				sums[f.Path] = hasher.sums
			}
			sealed <- f
		}
	})
	go func() {
		sealers.Wait()
		close(sealed)
	}()
	for f := range sealed {
		m.Files = append(m.Files, f)
	}
	return sums, context.Cause(ctx)
}

// sealFile leaves the digests of the file's blocks in blocks, which may be nil.
func sealFile(ctx context.Context, root *os.Root, name string, blocks *blockHasher) (File, error) {
	f, err := openRegular(root, name)
	if err != nil {
		return File{}, err
	}
	defer f.Close()
	synced := make(chan error, 1)
	go func() { synced <- f.Sync() }() // the disk writes while the processors digest
	digest, size, err := digestReader(ctx, f, blocks)
	if err != nil { // nobody waits for the disk
		return File{}, fmt.Errorf("read %s: %w", name, err)
	}
	if err := <-synced; err != nil {
		return File{}, fmt.Errorf("sync %s: %w", name, err)
	}
	return File{Path: name, Size: size, Digest: digest}, nil
}

// WriteFile writes a file so that after a crash it is there whole or not at all:
// temporary file, fsync, rename, fsync of the directory.
func WriteFile(name string, data []byte, mode os.FileMode) error {
	tmp, err := os.CreateTemp(filepath.Dir(name), temporary+"*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if _, err := tmp.Write(data); err != nil {
		tmp.Close()
		return err
	}
	if err := errors.Join(tmp.Chmod(mode), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), name); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(name))
}

// temporary begins the names of files that WriteFile has not written to their end.
const temporary = ".tmp-"

// RemoveTemporary removes from a directory what a WriteFile left there whose process was
// killed. Nobody may be writing there.
func RemoveTemporary(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), temporary) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// SyncDir makes the names in a directory durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func syncPath(root *os.Root, name string) error {
	d, err := root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// ReadManifest reads a checkpoint's manifest and returns its digest with it. It
// says nothing about the other files: Verify does.
func ReadManifest(dir string) (*Manifest, string, error) {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", fmt.Errorf("%w: no directory %s", ErrMissing, filepath.Base(dir))
	} else if err != nil {
		return nil, "", fmt.Errorf("open checkpoint: %w", err)
	}
	defer root.Close()
	return readManifest(root)
}

func readManifest(root *os.Root) (*Manifest, string, error) {
	f, err := openRegular(root, ManifestName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", fmt.Errorf("%w: no %s", ErrMissing, ManifestName)
	} else if err != nil {
		return nil, "", err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxManifestBytes+1))
	if err != nil {
		return nil, "", fmt.Errorf("read %s: %w", ManifestName, err)
	}
	if len(data) > maxManifestBytes {
		return nil, "", fmt.Errorf("%w: %s is larger than %d bytes", ErrCorrupt, ManifestName, maxManifestBytes)
	}
	m, err := DecodeManifest(data)
	// The digest is given even of bytes that do not decode: a caller that knows
	// what it must be then says "altered", which is the better message.
	return m, digestOf(data), err
}

// ReadManifestOf is ReadManifest of a manifest that has to have a digest, or any if that is
// empty.
func ReadManifestOf(dir, want string) (m *Manifest, digest string, err error) {
	m, digest, err = ReadManifest(dir)
	return m, digest, cmp.Or(altered(digest, want), err)
}

// altered is an error if a manifest that could be read has another digest than is wanted.
func altered(digest, want string) error {
	if digest != "" && want != "" && digest != want {
		return fmt.Errorf("%w: %s has digest %s, recorded was %s", ErrCorrupt, ManifestName, digest, want)
	}
	return nil
}

// DecodeManifest parses and validates a manifest's bytes. They may come from
// anywhere: every name in them is checked before it is used as a path.
func DecodeManifest(data []byte) (*Manifest, error) {
	var m Manifest
	d := json.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(&m); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrCorrupt, ManifestName, err)
	}
	if m.FormatVersion != FormatVersion {
		return nil, fmt.Errorf("%s has format version %d, this Stasis reads version %d", ManifestName, m.FormatVersion, FormatVersion)
	}
	if err := m.validate(); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrCorrupt, ManifestName, err)
	}
	return &m, nil
}

func (m *Manifest) validate() error {
	if len(m.Containers) == 0 {
		return errors.New("it lists no container")
	}
	files := make(map[string]bool, len(m.Files))
	for _, f := range m.Files {
		if !cleanPath(f.Path) || f.Path == ManifestName || files[f.Path] {
			return fmt.Errorf("bad or repeated file name %q", f.Path)
		}
		if f.Size < 0 || !validDigest(f.Digest) {
			return fmt.Errorf("bad size or digest of %q", f.Path)
		}
		files[f.Path] = true
	}
	names := map[string]bool{}
	for _, c := range m.Containers {
		if c.Name == "" || strings.ContainsAny(c.Name, "/\\\x00") || c.Name == "." || c.Name == ".." || names[c.Name] {
			return fmt.Errorf("bad or repeated container name %q", c.Name)
		}
		names[c.Name] = true
		if c.Rootfs != "" && !files[c.Rootfs] {
			return fmt.Errorf("container %s: its root archive %q is not among the files", c.Name, c.Rootfs)
		}
	}
	for _, v := range m.Volumes {
		if !files[v.Archive] {
			return fmt.Errorf("volume %s: its archive %q is not among the files", v.Name, v.Archive)
		}
		for _, mount := range v.Mounts {
			if !names[mount.Container] {
				return fmt.Errorf("volume %s: mounted by %q, which is not a container of the checkpoint", v.Name, mount.Container)
			}
		}
	}
	return nil
}

// cleanPath says whether a slash-separated relative path stays beneath its root
// and has one spelling only.
func cleanPath(p string) bool {
	return p != "." && fs.ValidPath(p) && path.Clean(p) == p && !strings.ContainsRune(p, 0)
}

func validDigest(d string) bool {
	hexa, ok := strings.CutPrefix(d, digestPrefix)
	if !ok || len(hexa) != 2*sha256.Size || strings.ToLower(hexa) != hexa {
		return false
	}
	_, err := hex.DecodeString(hexa)
	return err == nil
}

// Verify checks that a checkpoint is whole: the manifest has the given digest,
// and the directory holds exactly the files that it lists, with their sizes and
// digests. It returns the manifest. An empty manifestDigest skips the first
// check, for callers that vouch for the manifest themselves.
func Verify(ctx context.Context, dir, manifestDigest string) (*Manifest, error) {
	return VerifyBut(ctx, dir, manifestDigest, func(File) bool { return false })
}

// VerifyBut is Verify without the contents of those files that later says yes to: they are
// there and have their sizes. VerifyFiles checks the rest of them.
func VerifyBut(ctx context.Context, dir, manifestDigest string, later func(File) bool) (*Manifest, error) {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: no directory %s", ErrMissing, filepath.Base(dir))
	} else if err != nil {
		return nil, fmt.Errorf("open checkpoint: %w", err)
	}
	defer root.Close()
	m, digest, err := readManifest(root)
	if err := cmp.Or(altered(digest, manifestDigest), err); err != nil {
		return nil, err
	}
	blocks, err := readBlocks(root, m)
	if err != nil && !errors.Is(err, ErrNoBlocks) {
		return nil, err
	}
	var now []File
	for _, f := range m.Files {
		if !later(f) {
			now = append(now, f)
			continue
		}
		there, err := openWhole(root, f)
		if err != nil {
			return nil, err
		}
		there.Close()
	}
	if err := verifyFiles(ctx, root, now, blocks, nil); err != nil {
		return nil, err
	}
	return m, verifyNothingElse(root, m)
}

// VerifyFiles checks those files of a checkpoint that which says yes to. blocks, of the same
// checkpoint, may be nil. spare, which may be too, is called again and again on one of
// several processors: that waits there as long as somebody else needs it, or until ctx ends.
func VerifyFiles(ctx context.Context, dir string, m *Manifest, blocks *Blocks, which func(File) bool, spare func(ctx context.Context)) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open checkpoint: %w", err)
	}
	defer root.Close()
	return verifyFiles(ctx, root, slices.DeleteFunc(slices.Clone(m.Files), func(f File) bool { return !which(f) }), blocks, spare)
}

// VerifyNothingElse checks that a checkpoint's directory holds no other files than its
// manifest lists.
func VerifyNothingElse(dir string, m *Manifest) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open checkpoint: %w", err)
	}
	defer root.Close()
	return verifyNothingElse(root, m)
}

func verifyFile(ctx context.Context, root *os.Root, want File) error {
	f, err := openRegular(root, filepath.FromSlash(want.Path))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: no %s", ErrMissing, want.Path)
	} else if err != nil {
		return err
	}
	defer f.Close()
	digest, size, err := digestReader(ctx, io.LimitReader(f, want.Size+1), nil)
	if err != nil {
		return fmt.Errorf("read %s: %w", want.Path, err)
	}
	if size != want.Size {
		return fmt.Errorf("%w: %s has another size than the %d bytes written", ErrCorrupt, want.Path, want.Size)
	}
	if digest != want.Digest {
		return fmt.Errorf("%w: %s has digest %s, written was %s", ErrCorrupt, want.Path, digest, want.Digest)
	}
	return nil
}

func verifyNothingElse(root *os.Root, m *Manifest) error {
	listed := make(map[string]bool, len(m.Files)+1)
	listed[ManifestName] = true
	for _, f := range m.Files {
		listed[f.Path] = true
	}
	err := fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if !listed[name] {
			return fmt.Errorf("%w: %s is not of this checkpoint", ErrCorrupt, name)
		}
		return nil
	})
	return err
}

// openRegular opens a regular file beneath root. A symbolic link, device or fifo
// under that name is refused without being opened for real.
func openRegular(root *os.Root, name string) (*os.File, error) {
	info, err := root.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is not a regular file", ErrCorrupt, name)
	}
	return root.Open(name)
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return digestPrefix + hex.EncodeToString(sum[:])
}

// buffers are what files are read into: most files of a checkpoint are smaller.
var buffers = sync.Pool{New: func() any { return new([1 << 20]byte) }}

// digestReader reads r to its end, and gives up when ctx ends. blocks, which may be nil,
// digests its blocks.
func digestReader(ctx context.Context, r io.Reader, blocks *blockHasher) (string, int64, error) {
	h := sha256.New()
	buffer := buffers.Get().(*[1 << 20]byte)
	defer buffers.Put(buffer)
	buf := buffer[:]
	var size int64
	if blocks != nil {
		blocks.sums = nil
	}
	for {
		if err := context.Cause(ctx); err != nil {
			return "", 0, err
		}
		n, err := io.ReadFull(r, buf)
		if blocks != nil && n > 0 {
			blocks.chunks <- buf[:n]
		}
		h.Write(buf[:n])
		if blocks != nil && n > 0 {
			<-blocks.done
		}
		size += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return digestPrefix + hex.EncodeToString(h.Sum(nil)), size, nil
		} else if err != nil {
			return "", 0, err
		}
	}
}
