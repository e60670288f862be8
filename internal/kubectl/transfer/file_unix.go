//go:build unix

package transfer

import (
	"errors"
	"os"
	"syscall"
)

// noFollow keeps others from placing a link where the data are to go.
const noFollow = syscall.O_NOFOLLOW

// lock keeps two downloads from writing one file. It ends with the process.
func lock(f *os.File) error {
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
}

// syncDir makes names in a directory durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	err = d.Sync()
	if errors.Is(err, syscall.EINVAL) { // some file systems cannot
		err = nil
	}
	return errors.Join(err, d.Close())
}
