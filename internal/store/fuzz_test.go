package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"testing"

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
