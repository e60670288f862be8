package mappings

import (
	"os"

	"golang.org/x/sys/unix"
)

// advices are what programs say of their memory that the kernel keeps as flags, alone or
// several (madvise(2)).
var advices = [][]int{
	nil, {unix.MADV_DONTFORK}, {unix.MADV_WIPEONFORK}, {unix.MADV_DONTDUMP}, {unix.MADV_RANDOM}, {unix.MADV_SEQUENTIAL},
	{unix.MADV_HUGEPAGE}, {unix.MADV_NOHUGEPAGE}, {unix.MADV_MERGEABLE},
	{unix.MADV_DONTFORK, unix.MADV_DONTDUMP}, {unix.MADV_WIPEONFORK, unix.MADV_DONTDUMP},
	{unix.MADV_HUGEPAGE, unix.MADV_DONTDUMP}, {unix.MADV_NOHUGEPAGE, unix.MADV_DONTDUMP},
	{unix.MADV_HUGEPAGE, unix.MADV_DONTFORK}, {unix.MADV_NOHUGEPAGE, unix.MADV_DONTFORK},
}

// mappedSize is how large each is, in bytes.
const mappedSize = 1 << 12

// makeMany makes mappings of all kinds that programs mostly have, and returns what takes them
// away. Whatever this kernel does not have is left out.
func makeMany() (unmake func()) {
	var made [][]byte
	descriptors := []int{-1}
	if fd, err := unix.MemfdCreate("stasis-mappings", unix.MFD_CLOEXEC); err == nil && unix.Ftruncate(fd, mappedSize) == nil {
		defer unix.Close(fd)
		descriptors = append(descriptors, fd)
	}
	if program, err := os.Open("/proc/self/exe"); err == nil { // may not be written to
		defer program.Close()
		descriptors = append(descriptors, int(program.Fd()))
	}
	const all = unix.PROT_READ | unix.PROT_WRITE | unix.PROT_EXEC
	for _, fd := range descriptors {
		for _, kind := range []int{
			unix.MAP_PRIVATE, unix.MAP_SHARED, unix.MAP_PRIVATE | unix.MAP_NORESERVE, unix.MAP_SHARED | unix.MAP_NORESERVE,
			unix.MAP_PRIVATE | unix.MAP_GROWSDOWN, unix.MAP_PRIVATE | unix.MAP_LOCKED, unix.MAP_SHARED | unix.MAP_LOCKED,
			unix.MAP_DROPPABLE, // what getrandom(3) keeps in the process
		} {
			if fd < 0 {
				kind |= unix.MAP_ANONYMOUS
			}
			// A mapping keeps something of how it could once be accessed.
			for access := range (all + 1) * (all + 1) {
				before, after := access/(all+1), access%(all+1)
				for _, advice := range advices {
					if advice != nil && (before&unix.PROT_WRITE == 0 || (before|after)&unix.PROT_EXEC != 0) {
						continue // text and constants, which hardly anybody advises on
					}
					if m, err := makeOne(fd, kind, before, after, advice); err == nil {
						made = append(made, m)
					}
				}
			}
		}
	}
	return func() {
		for _, m := range made {
			_ = unix.Munmap(m)
		}
	}
}

// makeOne maps a page with one access, gives it another and advises on it.
func makeOne(fd, kind, before, after int, advice []int) ([]byte, error) {
	m, err := unix.Mmap(fd, 0, mappedSize, before, kind)
	if err != nil {
		return nil, err
	}
	if after != before {
		_ = unix.Mprotect(m, after) // it stays as it was, which is a kind, too
	}
	for _, a := range advice {
		_ = unix.Madvise(m, a) // likewise
	}
	return m, nil
}
