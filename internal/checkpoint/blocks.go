package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/zeebo/blake3"
)

// BlocksName is the name of a checkpoint's list of block digests, in its directory.
// With it a part of a large file can be checked without the rest: by whoever reads only
// that part, or reads several at a time. They are BLAKE3's, which takes half as long as
// SHA-256 on processors that have instructions for that: a restore waits for them.
const BlocksName = "digests.blake3"

// FormerBlocksName is the name of such a list of SHA-256 digests, which earlier versions
// wrote. It is a file like any other.
const FormerBlocksName = "digests.sha256"

// BlockSize is how large the blocks are, in bytes, that files are cut into for that list.
const BlockSize = 64 << 10

// sumSize is how large a digest is, in bytes.
const sumSize = 32

// maxBlocksBytes bounds the list: of 2 TiB of files.
const maxBlocksBytes = 1 << 30

// ErrNoBlocks says that a checkpoint has no list of block digests. Older ones have none,
// and those that have no file larger than a block.
var ErrNoBlocks = errors.New("the checkpoint has no list of block digests")

// Blocks are the digests of the blocks of a checkpoint's files. The list holds nothing
// else: which digest is of what follows from the manifest.
type Blocks struct {
	of map[string]FileBlocks
}

// FileBlocks are those of one file.
type FileBlocks struct {
	Path string
	Size int64
	sums []byte
}

// Check checks the whole contents of a file.
func (f File) Check(data []byte) error {
	if int64(len(data)) != f.Size || digestOf(data) != f.Digest {
		return fmt.Errorf("%w: %s is not what was written", ErrCorrupt, f.Path)
	}
	return nil
}

// listed says whether a file's blocks are in the list.
func (f File) listed() bool { return f.Size > BlockSize && f.Path != BlocksName }

func blocksOf(size int64) int64 { return (size + BlockSize - 1) / BlockSize }

// ReadBlocks reads the list of a checkpoint, of whose manifest the caller knows that it
// is the right one.
func ReadBlocks(dir string, m *Manifest) (*Blocks, error) {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: no directory %s", ErrMissing, filepath.Base(dir))
	} else if err != nil {
		return nil, fmt.Errorf("open checkpoint: %w", err)
	}
	defer root.Close()
	return readBlocks(root, m)
}

func readBlocks(root *os.Root, m *Manifest) (*Blocks, error) {
	var list *File
	expected := int64(0)
	for i, f := range m.Files {
		if f.Path == BlocksName {
			list = &m.Files[i]
		} else if f.listed() {
			expected += blocksOf(f.Size) * sumSize
		}
		if expected > maxBlocksBytes {
			return nil, fmt.Errorf("%w: its files are too large for one", ErrNoBlocks)
		}
	}
	if list == nil {
		return nil, ErrNoBlocks
	}
	if list.Size != expected {
		return nil, fmt.Errorf("%w: %s is of %d bytes, and files of these sizes have digests of %d", ErrCorrupt, BlocksName, list.Size, expected)
	}
	f, err := openRegular(root, BlocksName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: no %s", ErrMissing, BlocksName)
	} else if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != expected {
		return nil, fmt.Errorf("%w: %s has another size than the %d bytes written", ErrCorrupt, BlocksName, expected)
	}
	sums := make([]byte, expected)
	if _, err := io.ReadFull(f, sums); err != nil {
		return nil, fmt.Errorf("read %s: %w", BlocksName, err)
	}
	return DecodeBlocks(m, sums)
}

// DecodeBlocks makes the list of its bytes, which have to be those that the manifest says.
func DecodeBlocks(m *Manifest, sums []byte) (*Blocks, error) {
	b := &Blocks{of: map[string]FileBlocks{}}
	rest := sums
	for _, f := range m.Files {
		if f.Path == BlocksName && digestOf(sums) != f.Digest {
			return nil, fmt.Errorf("%w: %s has digest %s, written was %s", ErrCorrupt, BlocksName, digestOf(sums), f.Digest)
		}
		if !f.listed() {
			continue
		}
		n := blocksOf(f.Size)
		if n > int64(len(rest))/sumSize {
			return nil, fmt.Errorf("%w: %s ends before %s", ErrCorrupt, BlocksName, f.Path)
		}
		b.of[f.Path] = FileBlocks{f.Path, f.Size, rest[: n*sumSize : n*sumSize]}
		rest = rest[n*sumSize:]
	}
	if len(rest) > 0 {
		return nil, fmt.Errorf("%w: %s goes on behind its end", ErrCorrupt, BlocksName)
	}
	return b, nil
}

// Of returns a file's blocks. Files of one block have none: their own digest is enough.
func (b *Blocks) Of(path string) (FileBlocks, bool) {
	f, ok := b.of[path]
	return f, ok
}

// Count is how many blocks the file has. All are of BlockSize but the last.
func (f FileBlocks) Count() int { return len(f.sums) / sumSize }

// Range is where a block lies in the file.
func (f FileBlocks) Range(block int) (offset int64, size int) {
	offset = int64(block) * BlockSize
	return offset, int(min(BlockSize, f.Size-offset))
}

// Check checks the bytes of a block.
func (f FileBlocks) Check(block int, data []byte) error {
	if block < 0 || block >= f.Count() {
		return fmt.Errorf("%w: %s has no block %d", ErrCorrupt, f.Path, block)
	}
	offset, size := f.Range(block)
	sum := blake3.Sum256(data)
	if len(data) != size || !bytes.Equal(sum[:], f.sums[block*sumSize:][:sumSize]) {
		return fmt.Errorf("%w: %s, %d bytes from %d on, are not what was written", ErrCorrupt, f.Path, size, offset)
	}
	return nil
}

// blockHasher digests blocks beside whoever digests the whole: the two take two
// processors for as long as one takes without it.
type blockHasher struct {
	chunks chan []byte
	done   chan struct{}
	sums   []byte
}

func newBlockHasher() *blockHasher {
	h := &blockHasher{chunks: make(chan []byte), done: make(chan struct{})}
	go func() {
		for chunk := range h.chunks {
			for ; len(chunk) > 0; chunk = chunk[min(len(chunk), BlockSize):] {
				sum := blake3.Sum256(chunk[:min(len(chunk), BlockSize)])
				h.sums = append(h.sums, sum[:]...)
			}
			h.done <- struct{}{}
		}
	}()
	return h
}

// close ends it. What it has been given must have been waited for.
func (h *blockHasher) close() { close(h.chunks) }

// writeBlocks writes the list of a checkpoint that is being sealed. sums are the digests
// of the blocks of the files in m, in their order.
func writeBlocks(dir string, m *Manifest, sums map[string][]byte) error {
	var list []byte
	for _, f := range m.Files {
		if f.listed() {
			list = append(list, sums[f.Path]...)
		}
	}
	if len(list) == 0 || len(list) > maxBlocksBytes {
		return nil
	}
	if err := WriteFile(filepath.Join(dir, BlocksName), list, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", BlocksName, err)
	}
	at := 0
	for at < len(m.Files) && strings.Compare(m.Files[at].Path, BlocksName) < 0 {
		at++
	}
	m.Files = append(m.Files[:at], append([]File{{Path: BlocksName, Size: int64(len(list)), Digest: digestOf(list)}}, m.Files[at:]...)...)
	return nil
}
