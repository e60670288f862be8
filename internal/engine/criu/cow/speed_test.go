//go:build amd64

package cow

import (
	"encoding/binary"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkCapture captures a process of a thread that sums up pages of 1 GiB at random and
// writes to each, or to one of twenty. "undisturbed" is what it gets done from the thaw until
// its memory has been read, as a part of what it got done before; MB/s, how fast that is.
func BenchmarkCapture(b *testing.B) {
	b.Run("that writes to all", func(b *testing.B) { captureOf(b, "worker") })
	b.Run("that writes to 1 of 20", func(b *testing.B) { captureOf(b, "reader") })
}

func captureOf(b *testing.B, subject string) {
	s := begin(b, subject, nil)
	at := numbers(b, s.line(b))
	var ratio float64
	b.SetBytes(workerPages * pageSize)
	rounds := 0
	for b.Loop() {
		b.StopTimer()
		c := imagesOf(b, s.pid())
		time.Sleep(time.Second) // it has written everywhere
		before := worked(b, s.pid(), at[0])
		time.Sleep(time.Second)
		thawed := worked(b, s.pid(), at[0])
		pace := float64(thawed-before) / time.Second.Seconds()
		var since time.Time
		b.StartTimer()
		must(b, captureThen(b, func() error {
			thawed, since = worked(b, s.pid(), at[0]), time.Now()
			return nil
		}, c))
		ratio += float64(worked(b, s.pid(), at[0])-thawed) / time.Since(since).Seconds() / pace
		rounds++
	}
	b.ReportMetric(ratio/float64(rounds), "undisturbed")
	s.end(b)
}

// worked is how many pages a worker has worked on.
func worked(t testing.TB, pid int, address uint64) uint64 {
	t.Helper()
	var b [8]byte
	local := []unix.Iovec{{Base: &b[0], Len: 8}}
	_, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: uintptr(address), Len: 8}}, 0)
	must(t, err)
	return binary.LittleEndian.Uint64(b[:])
}
