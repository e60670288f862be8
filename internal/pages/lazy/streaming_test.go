package lazy

import (
	"crypto/rand"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/checkpoint"
)

const ioctlRegister = 0xc020aa00

// BenchmarkStreaming gives 256 MiB, in memory by page caches, to this process itself.
func BenchmarkStreaming(b *testing.B) {
	const size = 256 << 20
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
	for b.Loop() {
		b.StopTimer()
		at, err := unix.MmapPtr(-1, 0, nil, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			b.Fatal(err)
		}
		if err := unix.Madvise(unsafe.Slice((*byte)(at), size), unix.MADV_NOHUGEPAGE); err != nil {
			b.Fatal(err)
		}
		fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
		if errno != 0 {
			b.Fatal(errno)
		}
		api := uffdioAPI{api: uffdAPI}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlAPI, uintptr(unsafe.Pointer(&api))); errno != 0 {
			b.Fatal(errno)
		}
		register := struct{ start, size, mode, ioctls uint64 }{uint64(uintptr(at)), size, 1, 0}
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlRegister, uintptr(unsafe.Pointer(&register))); errno != 0 {
			b.Fatal(errno)
		}
		plan := &Plan{Dir: dir, ManifestDigest: digest, Patience: time.Minute, Processes: []Process{
			{PID: 1, File: name, Runs: []Run{{Start: uint64(uintptr(at)), Pages: size / pageSize}}},
		}}
		from, err := openLocal(plan)
		if err != nil {
			b.Fatal(err)
		}
		s, err := newServer(b.Context(), plan, from, slog.Default(), func(int) error { return nil })
		if err != nil {
			b.Fatal(err)
		}
		if err := s.add(1, int(fd)); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := s.stream(); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		s.close()
		s.work.Wait()
		if err := unix.MunmapPtr(at, size); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.SetBytes(size)
}
