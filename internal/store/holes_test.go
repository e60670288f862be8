package store

import (
	"testing"

	"golang.org/x/sys/unix"
)

func blocksUsed(t *testing.T, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(name, &st))
	return st.Blocks * 512
}
