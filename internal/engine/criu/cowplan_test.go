package criu

import (
	"errors"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine/criu/cow"
)

func TestAProcessWithAFilterOfItsOwnIsNotMadeToFork(t *testing.T) {
	if err := ownFilter(unix.Getpid(), 0); err != nil {
		t.Errorf("without a filter: %v", err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends, and its filter with it
		allow := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}
		program := unix.SockFprog{Len: 1, Filter: &allow}
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			t.Error(err)
			return
		}
		if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program))); errno != 0 {
			t.Error(errno)
			return
		}
		if err := ownFilter(unix.Gettid(), 0); !errors.Is(err, cow.ErrUnfit) {
			t.Errorf("with one: %v", err)
		}
		if err := ownFilter(unix.Gettid(), 1); err != nil {
			t.Errorf("with the container's alone: %v", err)
		}
	}()
	<-done
}
