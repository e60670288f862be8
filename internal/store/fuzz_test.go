package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// What comes from a store may have been written by anybody.

func FuzzIndex(f *testing.F) {
	b := newPackBuilder(nil, nil)
	b.add(framePages, random(1, 2*pageSize), []int{pageSize, pageSize}, []ID{{1}, {2}})
	b.add(frameZstd, []byte("x"), []int{7, 100_000}, []ID{{3}, {4}})
	f.Add(b.index.encode(), int64(2*pageSize+1))
	f.Add([]byte{0}, int64(0))
	f.Fuzz(func(t *testing.T, data []byte, size int64) {
		p, err := decodeIndex(data, size)
		if err == nil && !bytes.Equal(p.encode(), data) {
			// Numbers have longer spellings, too; what they say has to be the same.
			again, err := decodeIndex(p.encode(), size)
			if err != nil || !slices.Equal(again.ids, p.ids) || !slices.Equal(again.sizes(), p.sizes()) {
				t.Errorf("encoded again it is read as another: %v", err)
			}
		}
		// The same as the end of a pack.
		tail := slices.Concat(data, make([]byte, saltSize), binary.BigEndian.AppendUint32(nil, uint32(len(data))), []byte(packMagic))
		of := Pack{sha256.Sum256(tail), size + int64(len(tail))}
		if p, whole := openIndex(nil, of, tail); (whole == nil) != (err == nil) || whole == nil && p.id != of.ID {
			t.Errorf("alone: %v, in a pack: %v", err, whole)
		}
		_, _ = openIndex(nil, Pack{sha256.Sum256(data), size}, data)
	})
}

func FuzzFiles(f *testing.F) {
	list := appendFile(nil, &file{path: "a/b", mode: 0o600, size: 10 << 20, extents: []extent{{-1, 0, 4096}, {0, 5, 7}, {3, 0, 100}}})
	f.Add(appendFile(list, &file{path: "empty"}), 4)
	f.Fuzz(func(t *testing.T, data []byte, packs int) {
		files, err := decodeFiles(data, packs)
		if err != nil {
			return
		}
		var again []byte
		for i := range files {
			again = appendFile(again, &files[i])
		}
		same, err := decodeFiles(again, packs)
		if err != nil || !cmp.Equal(files, same, cmp.AllowUnexported(file{}, extent{})) {
			t.Errorf("encoded again it is read as another: %v", err)
		}
	})
}

func FuzzRoot(f *testing.F) {
	f.Add([]byte(`{"format":1,"created":"2026-11-27T00:00:00Z","labels":{"a":"b"},"packs":"` + string(bytes.Repeat([]byte("A"), 43)) + `=","packSizes":[100],"packUsed":[2],"map":[[0,1,2]],"mapBytes":10}`))
	f.Add([]byte(`{"format":1,"shares":{"previous":"` + ID{1}.String() + `","memory":{"bytes":9,"zeros":1,"present":8,"previous":8},"files":{}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRoot(data)
		if err != nil {
			return
		}
		packs := r.packs()
		for _, e := range r.mapFile().extents {
			if e.pack < 0 || e.pack >= len(packs) || e.count <= 0 {
				t.Errorf("the extent %+v was let through", e)
			}
		}
		if s := r.Shares.describe(); s != nil && (s.Memory.Bytes-s.Memory.Zeros-s.Memory.Present < 0 || s.Files.Present < s.Files.Previous || s.Files.Zeros < 0) {
			t.Errorf("the shares %+v were let through", *s)
		}
	})
}

func FuzzFrame(f *testing.F) {
	c, err := newCodec()
	if err != nil {
		f.Fatal(err)
	}
	_, encoded := c.encode(prose(1, frameSize), nil)
	f.Add(encoded, frameSize)
	f.Fuzz(func(t *testing.T, data []byte, size int) {
		raw, err := c.decode(data, nil, min(max(size, 0), maxFrame))
		if err == nil && len(raw) > maxFrame {
			t.Errorf("%d bytes came of a frame", len(raw))
		}
	})
}

func FuzzObject(f *testing.F) {
	f.Add((*keys)(nil).sealObject(prefixLeases, []byte(`{"shown":"2026-11-27T00:00:00Z"}`)))
	f.Add(newKeys(testKey.Key, "store").sealObject(prefixLeases, []byte(`{}`)))
	f.Add(plainJSON(head{Format: 1, ID: "x"}))
	f.Add(plainJSON(wrapped{Name: "x", Salt: make([]byte, saltSize)}))
	sealed := newKeys(testKey.Key, "store")
	f.Fuzz(func(t *testing.T, data []byte) {
		if got, err := (*keys)(nil).openObject(prefixLeases, "x", data); err == nil && !bytes.Equal((*keys)(nil).sealObject(prefixLeases, got), data) {
			t.Error("what was opened is sealed otherwise")
		}
		_, _ = sealed.openObject(prefixLeases, "x", data)
		var h head
		if readPlainJSON("x", data, &h) == nil && !bytes.Equal(plainJSON(h), data) {
			t.Error("the head has two spellings")
		}
		var w wrapped
		_ = readPlainJSON("x", data, &w)
	})
}

// FuzzNotes: leases, marks and hints, whatever they say.
func FuzzNotes(f *testing.F) {
	f.Add([]byte(`{"shown":"2026-11-27T00:00:00Z"}`))
	f.Add([]byte(`{"at":"2026-11-27T00:00:00Z","noted":true,"writers":["writers/a"]}`))
	f.Add([]byte(`{"checkpoints":["` + strings.Repeat(ID{1}.String()+`","`, 20) + `x"]}`))
	f.Add([]byte(`{"noted":true}`))
	pack := ID{5}
	s := bare(f)
	s.at(time.Date(2026, 11, 27, 0, 0, 0, 0, time.UTC))
	f.Fuzz(func(t *testing.T, data []byte) {
		m := newMemory()
		s.backend = m
		m.objects[prefixPacks+pack.String()] = []byte("of no checkpoint")
		for name, prefix := range map[string]string{prefixLeases + "a": prefixLeases, prefixCondemned + pack.String(): prefixCondemned, s.hintName("pod"): prefixHints} {
			m.objects[name] = s.keys.sealObject(prefix, data)
		}
		ids, err := s.alike(t.Context(), []string{"pod"})
		if err != nil || len(ids) > maxHints {
			t.Errorf("%d checkpoints are alike, %v", len(ids), err)
		}
		_, err = s.Collect(t.Context(), CollectOptions{})
		var mark condemnation
		_, there := m.objects[prefixPacks+pack.String()]
		if !there && (json.Unmarshal(data, &mark) != nil || !mark.Noted || mark.At.IsZero()) {
			t.Errorf("a pack was removed for a mark that says nothing: %v", err)
		}
	})
}

// FuzzPrevious: what a writer takes the checkpoint before to consist of.
func FuzzPrevious(f *testing.F) {
	f.Add(appendFile(nil, &file{path: "a", size: 5, extents: []extent{{0, 0, 1}}}), 1)
	f.Add(appendFile(nil, &file{path: "a", size: 1 << 30, extents: []extent{{-1, 0, 1 << 30}, {0, maxPackBlocks, 1 << 30}}}), 1)
	s := bare(f)
	f.Fuzz(func(t *testing.T, list []byte, packs int) {
		if len(list) == 0 || len(list) > frameSize {
			return
		}
		m := newMemory()
		s.backend = m
		b := newPackBuilder(nil, nil)
		b.add(0, list, []int{len(list)}, []ID{s.keys.id(list)})
		object := b.finish()
		of := Pack{b.index.id, int64(len(object))}
		m.objects[of.name()] = object
		r := &root{Map: [][3]int{{0, 0, 1}}, MapBytes: int64(len(list))}
		for range min(max(packs, 1), 4) {
			r.Packs, r.PackSizes = append(r.Packs, of.ID[:]...), append(r.PackSizes, of.Size)
		}
		consists, err := s.consists(t.Context(), r)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Error(err)
			}
			return
		}
		for id, blocks := range consists {
			if id != of.ID || len(blocks)*64 > maxPackBlocks+64 {
				t.Errorf("of pack %s %d blocks are used", id, len(blocks)*64)
			}
		}
	})
}

// bare is a store without anything, to be given one backend after the other.
func bare(f *testing.F) *Store {
	m := newMemory()
	if err := Create(f.Context(), m, nil); err != nil {
		f.Fatal(err)
	}
	s, err := Open(f.Context(), m, nil)
	if err != nil {
		f.Fatal(err)
	}
	return s
}
