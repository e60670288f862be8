package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const threads = 5

// state is what lives in the process: memory, threads, descriptors, a child.
type state struct {
	nonce   string
	started time.Time // monotonic clock included
	tallies [threads]atomic.Int64
	tids    [threads]atomic.Int64

	reading, deleted, appended *os.File
	pipe                       [2]*os.File
	pair                       [2]int // a socket pair
	timer                      int
	quiet                      net.Listener // accepts nobody
	knocking                   net.Conn     // waits at it

	mu       sync.Mutex // the child is asked by one at a time
	toChild  io.Writer
	ofChild  *bufio.Reader
	childPID int
}

// Report is what can be seen of the state. Its fields but Tallies, Child, Timer
// and Uptime must be the same after a restore, and those go on.
type Report struct {
	Nonce      string   `json:"nonce"`
	Tallies    []int64  `json:"tallies"`
	TIDs       []int64  `json:"tids"`
	Child      string   `json:"child"` // "pid nonce asked"
	Position   int64    `json:"position"`
	Next       string   `json:"next"`    // what reading on would bring
	Deleted    string   `json:"deleted"` // content of a file that has no name any more
	Pending    int      `json:"pending"` // bytes in the pipe
	Directory  string   `json:"directory"`
	Umask      int      `json:"umask"`
	OpenFiles  uint64   `json:"openFiles"` // soft limit
	Timer      int64    `json:"timer"`     // seconds until a timer of an hour
	Listening  bool     `json:"listening"` // where a connection was waiting to be accepted
	Uptime     float64  `json:"uptime"`    // seconds on the monotonic clock
	Hostname   string   `json:"hostname"`
	Credential []int    `json:"credential"` // uid, gid, groups
	Caps       []string `json:"caps"`       // of /proc/self/status
}

func newState(ctx context.Context) (*state, error) {
	s := &state{started: time.Now(), nonce: rand.Text()}
	for i := range threads {
		go func() {
			runtime.LockOSThread()
			s.tids[i].Store(int64(unix.Gettid()))
			for {
				s.tallies[i].Add(1)
				time.Sleep(5 * time.Millisecond)
			}
		}()
	}
	if err := os.MkdirAll("/data/work", 0o755); err != nil {
		return nil, err
	}
	if err := os.Chdir("/data/work"); err != nil {
		return nil, err
	}
	unix.Umask(0o027)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 777, Max: 1024}); err != nil {
		return nil, err
	}
	if err := s.openFiles(); err != nil {
		return nil, err
	}
	if err := s.openPipes(); err != nil {
		return nil, err
	}
	if err := s.openBacklog(ctx); err != nil {
		return nil, err
	}
	return s, s.startChild()
}

func (s *state) openFiles() error {
	if err := os.WriteFile("/data/reading", []byte(strings.Repeat("0123456789", 20)), 0o644); err != nil {
		return err
	}
	var err error
	if s.reading, err = os.Open("/data/reading"); err != nil {
		return err
	}
	if _, err = s.reading.Seek(123, io.SeekStart); err != nil {
		return err
	}
	if s.deleted, err = os.Create("/data/deleted"); err != nil {
		return err
	}
	if _, err = s.deleted.WriteString("no name, but here"); err != nil {
		return err
	}
	if err = os.Remove("/data/deleted"); err != nil {
		return err
	}
	s.appended, err = os.OpenFile("/data/appended", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	return err
}

func (s *state) openPipes() error {
	var err error
	if s.pipe[0], s.pipe[1], err = os.Pipe(); err != nil {
		return err
	}
	if _, err = s.pipe[1].WriteString("left in the pipe"); err != nil {
		return err
	}
	if s.pair, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0); err != nil {
		return err
	}
	if _, err = unix.Write(s.pair[0], []byte("left in the socket")); err != nil {
		return err
	}
	if s.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC); err != nil {
		return err
	}
	return unix.TimerfdSettime(s.timer, 0, &unix.ItimerSpec{Value: unix.Timespec{Sec: 3600}}, nil)
}

const quietAddress = "127.0.0.1:8081"

// openBacklog leaves a connection where nobody has accepted it, as a probe's that
// arrives while a container is frozen.
func (s *state) openBacklog(ctx context.Context) error {
	var err error
	if s.quiet, err = listenTCP(ctx, quietAddress); err != nil {
		return err
	}
	s.knocking, err = net.Dial("tcp4", quietAddress)
	return err
}

// listenTCP listens on plain TCP: Go listens on multipath TCP otherwise, which
// CRIU cannot capture.
func listenTCP(ctx context.Context, address string) (net.Listener, error) {
	var listen net.ListenConfig
	listen.SetMultipathTCP(false)
	return listen.Listen(ctx, "tcp", address)
}

func (s *state) startChild() error {
	cmd := exec.Command("/proc/self/exe", "child")
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.toChild, s.ofChild, s.childPID = in, bufio.NewReader(out), cmd.Process.Pid
	go func() {
		// Its end is the subject's: a restored parent must know its child.
		fmt.Println("subject: child ended:", cmd.Wait())
		os.Exit(3)
	}()
	return nil
}

// child answers each line with its pid, its nonce and how often it was asked.
func child() error {
	nonce, asked := rand.Text(), 0
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		asked++
		if _, err := fmt.Println(os.Getpid(), nonce, asked); err != nil {
			return err
		}
	}
	return nil
}

func (s *state) report() (*Report, error) {
	r := &Report{Nonce: s.nonce, Uptime: time.Since(s.started).Seconds()}
	for i := range threads {
		r.Tallies = append(r.Tallies, s.tallies[i].Load())
		r.TIDs = append(r.TIDs, s.tids[i].Load())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := io.WriteString(s.toChild, "?\n"); err != nil {
		return nil, fmt.Errorf("asking the child: %w", err)
	}
	answer, err := s.ofChild.ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("hearing the child: %w", err)
	}
	r.Child = strings.TrimSpace(answer)
	if r.Position, err = s.reading.Seek(0, io.SeekCurrent); err != nil {
		return nil, err
	}
	next := make([]byte, 5)
	if _, err := s.reading.ReadAt(next, r.Position); err != nil {
		return nil, err
	}
	r.Next = string(next)
	content := make([]byte, 64)
	n, err := s.deleted.ReadAt(content, 0)
	if err != nil && err != io.EOF {
		return nil, err
	}
	r.Deleted = string(content[:n])
	if r.Pending, err = unix.IoctlGetInt(int(s.pipe[0].Fd()), unix.TIOCINQ); err != nil {
		return nil, err
	}
	if r.Directory, err = os.Getwd(); err != nil {
		return nil, err
	}
	r.Umask = syscall.Umask(0o027)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, err
	}
	r.OpenFiles = limit.Cur
	var left unix.ItimerSpec
	if err := unix.TimerfdGettime(s.timer, &left); err != nil {
		return nil, err
	}
	r.Timer = left.Value.Sec
	if again, err := net.DialTimeout("tcp4", quietAddress, time.Second); err == nil {
		r.Listening = true
		_ = again.Close()
	}
	if r.Hostname, err = os.Hostname(); err != nil {
		return nil, err
	}
	groups, err := os.Getgroups()
	if err != nil {
		return nil, err
	}
	r.Credential = append([]int{os.Getuid(), os.Getgid()}, groups...)
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "Cap") || strings.HasPrefix(line, "NoNewPrivs") || strings.HasPrefix(line, "Seccomp:") {
			r.Caps = append(r.Caps, strings.Join(strings.Fields(line), " "))
		}
	}
	return r, nil
}

// Drained is what was left where nobody had read it.
type Drained struct {
	Pipe   string `json:"pipe"`
	Socket string `json:"socket"`
	// Appended is the file after one more line through the descriptor that was
	// opened for appending.
	Appended string `json:"appended"`
}

// drain reads what lies in pipe and socket, and writes on in the open file.
func (s *state) drain() (*Drained, error) {
	buffer := make([]byte, 64)
	n, err := s.pipe[0].Read(buffer)
	if err != nil {
		return nil, err
	}
	d := &Drained{Pipe: string(buffer[:n])}
	if n, err = unix.Read(s.pair[1], buffer); err != nil {
		return nil, err
	}
	d.Socket = string(buffer[:n])
	if _, err = s.appended.WriteString("one more\n"); err != nil {
		return nil, err
	}
	content, err := os.ReadFile(filepath.Clean(s.appended.Name()))
	d.Appended = string(content)
	return d, err
}

func hexOf(b []byte) string { return hex.EncodeToString(b) }
