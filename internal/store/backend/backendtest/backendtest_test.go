package backendtest

import (
	"bytes"
	"context"
	"errors"
	"math/bits"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
)

func TestMemoryIsABackend(t *testing.T) {
	Run(t, func(*testing.T) backend.Backend { return Memory() })
}

func TestABackendWithoutFaultsIsABackend(t *testing.T) {
	Run(t, func(*testing.T) backend.Backend { return NewFaulty(Memory(), 1) })
}

func TestFaultsDoWhatTheyAreCalled(t *testing.T) {
	f := NewFaulty(Memory(), 1)
	data := Noise(1, 1000)
	put(t, f, "packs/a", data)
	put(t, f, "packs/b", data)

	f.Order(Fault{Call: "put", Kind: Fail}, Fault{Call: "delete", Kind: Lost}, Fault{Call: "list", Kind: Cut})
	if err := f.Put(t.Context(), "packs/c", data, nil); !errors.Is(err, ErrFault) {
		t.Errorf("fail: %v", err)
	}
	wantNotFound(t, f, "packs/c")
	if err := f.Delete(t.Context(), "packs/b"); !errors.Is(err, ErrFault) {
		t.Errorf("lost: %v", err)
	}
	wantNotFound(t, f, "packs/b")
	put(t, f.Backend, "packs/b", data)
	seen, failed := 0, false
	for _, err := range f.List(t.Context(), "") {
		if err != nil {
			failed = true
			break
		}
		seen++
	}
	if seen != 1 || !failed {
		t.Errorf("cut: %d of 2 objects, an error: %v", seen, failed)
	}

	f.Order(Fault{Kind: Truncate, Times: 1, Skip: 1, Prefix: "packs/a"}, Fault{Kind: Flip, Prefix: "packs/b"})
	for i, want := range []int{1000, 500, 1000} {
		if got := read(t, f, "packs/a"); len(got) != want {
			t.Errorf("truncate, read number %d: %d bytes", i+1, len(got))
		}
	}
	got, turned := read(t, f, "packs/b"), 0
	for i := range got {
		turned += bits.OnesCount8(got[i] ^ data[i])
	}
	if turned != 1 {
		t.Errorf("flip: %d bits", turned)
	}
	if !bytes.Equal(read(t, f.Backend, "packs/b"), data) {
		t.Error("flip: what is stored changed")
	}

	f.Order(Fault{Kind: Hang})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := f.Read(ctx, "packs/a", 0, -1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: %v", err)
	}

	count := func() (n int) {
		f = NewFaulty(f.Backend, 5, Fault{Call: "read", Chance: 0.3})
		for range 200 {
			f.Read(t.Context(), "packs/a", 0, 1)
		}
		for _, call := range f.Calls() {
			if call.Fault {
				n++
			}
		}
		return n
	}
	if n := count(); n < 30 || n > 90 || n != count() {
		t.Errorf("chance 0.3: %d of 200 calls", n)
	}
}
