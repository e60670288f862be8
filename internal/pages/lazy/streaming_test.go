package lazy

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/checkpoint"
)

func TestMemoryIsNotStreamedBeforeTheContainerIsLetGoIfThatIsSoon(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	s := &server{ctx: ctx}
	asked := 0
	s.await(func() bool { asked++; return asked == 5 })
	if asked != 5 {
		t.Errorf("it was asked %d times whether the container was let go, and went on", asked)
	}
	began := time.Now()
	if s.await(func() bool { return false }); time.Since(began) < startsSoon {
		t.Errorf("it went on after %v", time.Since(began))
	}
	cancel(errors.New("the end"))
	began = time.Now()
	if s.await(func() bool { return false }); time.Since(began) >= startsSoon {
		t.Error("it did not end with its server")
	}
}

// BenchmarkStreaming gives 256 MiB, in memory by page caches, to this process itself. As
// in most processes, blocks of the file do not begin where chunks of addresses do.
func BenchmarkStreaming(b *testing.B) {
	const size, across = 256 << 20, 5 // pages
	dir := b.TempDir()
	name := "containers/app/criu/pages-1.img"
	data := make([]byte, size)
	rand.Read(data[:size/16])
	if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o700); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		b.Fatal(err)
	}
	digest, err := checkpoint.Seal(b.Context(), dir, &checkpoint.Manifest{FormatVersion: checkpoint.FormatVersion, Containers: []checkpoint.Container{{Name: "app"}}})
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(size)
	for b.Loop() {
		b.StopTimer()
		m, err := newFaulting(size)
		if err != nil {
			b.Fatal(err)
		}
		plan := &Plan{Dir: dir, ManifestDigest: digest, Patience: time.Minute, Processes: []Process{
			{PID: 1, File: name, Runs: []Run{{Start: m.address, Pages: size/pageSize - across, Page: across}}},
		}}
		from, err := openLocal(plan)
		if err != nil {
			b.Fatal(err)
		}
		s, err := newServer(b.Context(), plan, from, nil, slog.Default(), func(int) error { return nil })
		if err != nil {
			b.Fatal(err)
		}
		if err := s.add(1, m.fd); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := s.stream(); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		s.close()
		s.work.Wait()
		if err := unix.Munmap(m.memory); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
