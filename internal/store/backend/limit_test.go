package backend_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
)

func TestALimitedBackendIsABackend(t *testing.T) {
	backendtest.Run(t, func(*testing.T) backend.Backend { return backend.Limited(backendtest.Memory(), 1<<40) })
}

func TestBytesPassNoFasterThanTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := backend.Limited(backendtest.Memory(), 1000)
		begun := time.Now()
		for range 5 {
			if err := b.Put(t.Context(), "packs/a", make([]byte, 2000), nil); err != nil {
				t.Fatal(err)
			}
		}
		if spent := time.Since(begun); spent != 8*time.Second {
			t.Errorf("five times 2000 bytes, the last at full speed, at 1000 a second: %s, want 8 s", spent)
		}
		if _, err := b.Read(t.Context(), "packs/a", 0, 500); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Read(t.Context(), "packs/a", -500, -1); err != nil {
			t.Fatal(err)
		}
		if spent := time.Since(begun); spent != 10500*time.Millisecond {
			t.Errorf("and 500 bytes read twice: %s, want 10.5 s", spent)
		}
		time.Sleep(time.Hour) // what was not used is not saved up
		begun = time.Now()
		for range 3 {
			if _, err := b.Read(t.Context(), "packs/a", 0, 1000); err != nil {
				t.Fatal(err)
			}
		}
		if spent := time.Since(begun); spent != 2*time.Second {
			t.Errorf("three times 1000 bytes after a rest: %s, want 2 s", spent)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := b.Read(ctx, "packs/a", 0, 1000); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a context that ends while it waits: %v", err)
		}
	})
}
