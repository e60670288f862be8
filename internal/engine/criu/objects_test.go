package criu

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
)

// What a process may hold is tested with real containers by test/e2e; here is what
// those cannot hold, and what must not be refused.
func TestWhatCRIUCannotCaptureIsFoundAmongAProcessDescriptors(t *testing.T) {
	open := func(name string, flags int) func(t *testing.T) int {
		return func(t *testing.T) int {
			fd, err := unix.Open(name, flags, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			return fd
		}
	}
	dir := t.TempDir()
	ofPod := filepath.Join(mkdir(t, dir+"/..2026_11_26_20_01_02.123456789"), "key")
	device := dir + "/device"
	if err := errors.Join(os.WriteFile(ofPod, nil, 0o600), unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 11)))); err != nil { // kmsg
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		open func(t *testing.T) int
		says string // nothing: it may stay open
	}{
		"a plain file":          {open(dir, unix.O_RDONLY), ""},
		"null":                  {open("/dev/null", unix.O_RDONLY), ""},
		"a file of a ConfigMap": {open(ofPod, unix.O_RDONLY), ""},
		"a file that a ConfigMap had": {func(t *testing.T) int {
			name := filepath.Join(filepath.Dir(ofPod), "other")
			fd := open(name, unix.O_CREAT|unix.O_RDWR)(t)
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
			return fd
		}, "ConfigMap"},
		"a device":        {open(device, unix.O_RDONLY), "character device 1:11"},
		"a plain eventfd": {func(*testing.T) int { fd, _ := unix.Eventfd(3, 0); return fd }, ""},
		"a semaphore":     {func(*testing.T) int { fd, _ := unix.Eventfd(3, unix.EFD_SEMAPHORE); return fd }, "EFD_SEMAPHORE"},
		"an epoll":        {func(*testing.T) int { fd, _ := unix.EpollCreate1(0); return fd }, ""},
		"a deleted file of another name": {func(t *testing.T) int {
			fd := open(dir+"/first", unix.O_CREAT|unix.O_RDWR)(t)
			if err := errors.Join(os.Link(dir+"/first", dir+"/second"), os.Remove(dir+"/first")); err != nil {
				t.Fatal(err)
			}
			return fd
		}, "hard link"},
		"a deleted file that is too large": {func(t *testing.T) int {
			fd := open(dir+"/large", unix.O_CREAT|unix.O_RDWR)(t)
			if err := errors.Join(unix.Ftruncate(fd, ghostLimit+1), os.Remove(dir+"/large")); err != nil {
				t.Fatal(err)
			}
			return fd
		}, "deleted and of 2147483649 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			fd := c.open(t)
			defer unix.Close(fd)
			problem := problemOfFD("/proc/self", strconv.Itoa(fd))
			if c.says == "" && problem != "" || !strings.Contains(problem, c.says) {
				t.Errorf("%q, want %q", problem, c.says)
			}
		})
	}
}

// inodeOf is a socket's, as the kernel tells of it.
func inodeOf(t *testing.T, s interface{ File() (*os.File, error) }) uint32 {
	t.Helper()
	f, err := s.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return uint32(st.Ino)
}

func TestUnixSocketsOfOneContainerAreNoProblemAndThoseOfTwoAre(t *testing.T) {
	address := &net.UnixAddr{Net: "unix", Name: filepath.Join(t.TempDir(), "socket")}
	listener, err := net.ListenUnix("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.DialUnix("unix", nil, address)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	judge := func(what, says string, holders map[uint32]holder, without ...uint32) {
		t.Helper()
		sockets, err := dumpUnixSockets()
		if err != nil {
			t.Fatal(err)
		}
		for _, inode := range without {
			delete(sockets, inode)
		}
		err = problemOfUnixSockets(sockets, holders)
		if says == "" && err != nil || says != "" && (!errors.Is(err, engine.ErrUnsupported) || !strings.Contains(err.Error(), says)) {
			t.Errorf("%s: %v, want %q", what, err, says)
		}
	}
	a, b := holder{"a", os.Getpid()}, holder{"b", os.Getpid()}
	l, c := inodeOf(t, listener), inodeOf(t, client)
	judge("not accepted", "", map[uint32]holder{l: a, c: a})
	judge("not accepted, of two containers", "container b", map[uint32]holder{l: a, c: b})
	if _, err := client.Write([]byte("too early")); err != nil {
		t.Fatal(err)
	}
	judge("data not accepted", "has not been accepted", map[uint32]holder{l: a, c: a})
	server, err := listener.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	s := inodeOf(t, server)
	judge("accepted", "", map[uint32]holder{l: a, c: a, s: a})
	judge("of two containers", "by a Unix socket to container", map[uint32]holder{l: a, c: b, s: a})
	judge("with an end on its way through another socket", "", map[uint32]holder{l: a, c: a})
	judge("with an end outside", "outside of the Pod", map[uint32]holder{l: a, c: a}, s)
}

func TestWhatTheKernelSaysOfSocketsIsReadWithinItsBounds(t *testing.T) {
	for _, data := range [][]byte{
		{255, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		{3, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		{16, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		append([]byte{36, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 200, 0, 2, 0),
	} {
		if _, err := readUnixSockets(data, map[uint32]unixSocket{}); !errors.Is(err, errNetlink) {
			t.Errorf("%v: %v", data, err)
		}
	}
}

func TestWatchedFilesAreFoundInTheRootFileSystem(t *testing.T) {
	for line, want := range map[string]watched{
		"inotify wd:1 ino:a20094 sdev:36 mask:300 ignored_mask:0 fhandle-bytes:20 fhandle-type:f8 f_handle:00": {0x36, 0xa20094},
		"inotify wd:1 ino:a20094":          {},
		"inotify wd:1 ino:x sdev:36":       {},
		"flags:\t02000":                    {},
		"inotify wd:2 ino:1 sdev:ffffffff": {0xffffffff, 1},
	} {
		got, ok := parseWatch(line)
		if ok != (want != watched{}) || ok && got != want {
			t.Errorf("%q: %+v, %v", line, got, ok)
		}
	}
	fd, err := unix.InotifyInit1(0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	dir := t.TempDir()
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE); err != nil {
		t.Fatal(err)
	}
	var root, st unix.Stat_t
	if err := errors.Join(unix.Stat("/", &root), unix.Stat(dir, &st)); err != nil {
		t.Fatal(err)
	}
	watches := watchesOf([]int{os.Getpid()}, kernelDev(st.Dev))
	if pid := watches[watched{kernelDev(st.Dev), st.Ino}]; pid != os.Getpid() {
		t.Errorf("the watch is not found among %v", watches)
	}
}

func TestPOSIXMessageQueuesThatNobodyHasOpenAreFound(t *testing.T) {
	dir := t.TempDir()
	// A directory of that name is none.
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if problem := problemOfQueues(dir); problem != "" {
		t.Errorf("a plain directory: %q", problem)
	}
	if err := unix.Mount("mqueue", dir, "mqueue", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	name := filepath.Join(dir, "stasis-test-"+strconv.Itoa(os.Getpid()))
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	problem := problemOfQueues(dir)
	if err := errors.Join(f.Close(), os.Remove(name)); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(problem, "POSIX message queue") {
		t.Errorf("with a queue: %q", problem)
	}
	if problem := problemOfQueues(dir); strings.Contains(problem, filepath.Base(name)) {
		t.Errorf("without it: %q", problem)
	}
}
