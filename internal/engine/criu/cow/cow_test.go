//go:build amd64

package cow

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	switch os.Getenv("COW_TEST") {
	case "":
		os.Exit(m.Run())
	case "helper":
		runtime.LockOSThread()
		if err := Serve(os.Stdin, os.Stdout, slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	case "watched":
		runtime.LockOSThread()
		watched()
		os.Exit(0)
	default:
		runtime.LockOSThread()
		subject(os.Getenv("COW_TEST"))
	}
}

// specimen is a process that is captured.
type specimen struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines *bufio.Scanner
	ended chan error
}

// begin starts this program as a subject. It has printed its first line when it returns.
func begin(t testing.TB, kind string, attr *syscall.SysProcAttr) *specimen {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "COW_TEST="+kind)
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	s := &specimen{cmd: cmd, in: in, lines: bufio.NewScanner(out), ended: make(chan error, 1)}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return s
}

func (s *specimen) pid() int { return s.cmd.Process.Pid }

func (s *specimen) line(t testing.TB) string {
	t.Helper()
	if !s.lines.Scan() {
		t.Fatalf("subject %d has ended: %v", s.pid(), s.cmd.Wait())
	}
	return s.lines.Text()
}

// end has a subject end, which then says whether anything was wrong.
func (s *specimen) end(t testing.TB) {
	t.Helper()
	s.in.Close()
	var said []string
	for s.lines.Scan() {
		said = append(said, s.lines.Text())
	}
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("subject: %v: %s", err, strings.Join(said, "; "))
	}
}

// imagesOf makes the images that CRIU would of processes without their memory.
func imagesOf(t testing.TB, pids ...int) Container {
	t.Helper()
	dir := t.TempDir()
	c := Container{Name: "main", Images: dir}
	var tree []byte
	for i, pid := range pids {
		inner, err := innerPID(pid)
		must(t, err)
		c.PIDs = append(c.PIDs, pid)
		tree = append(tree, framed(binary.AppendUvarint([]byte{1 << 3}, uint64(inner)))...)
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("mm-%d.img", inner)), image(magicMM, framed(mappingsOf(t, pid))), 0o600))
		must(t, pagemap{id: uint32(i + 1)}.write(filepath.Join(dir, fmt.Sprintf("pagemap-%d.img", inner))))
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("pages-%d.img", i+1)), nil, 0o600))
	}
	must(t, os.WriteFile(filepath.Join(dir, "pstree.img"), image(magicPSTree, tree), 0o600))
	return c
}

func image(magic uint32, body []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, magicCommon), magic), body...)
}

func framed(message []byte) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(message))), message...)
}

// mappingsOf is the message of a process' mappings, from what the kernel says of them.
func mappingsOf(t testing.TB, pid int) (message []byte) {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	must(t, err)
	var start, end uint64
	var access, name string
	for line := range strings.Lines(string(data)) {
		words := strings.Fields(line)
		var a, b uint64
		if n, _ := fmt.Sscanf(words[0], "%x-%x", &a, &b); n == 2 && len(words) >= 5 {
			start, end = a, b
			access, name = words[1], strings.Join(words[5:], " ")
			continue
		}
		if words[0] != "VmFlags:" || access[3] != 'p' {
			continue
		}
		status, flags, prot, advice := uint64(statusRegular), uint64(flagPrivate), uint64(0), uint64(0)
		switch {
		case name == "[vdso]":
			status |= statusVDSO
		case strings.HasPrefix(name, "[vvar"):
			status |= statusVvar
		case name == "[vsyscall]":
			status |= statusVsyscall
		case strings.HasPrefix(name, "/"):
			status |= statusFilePrivate
		default:
			status |= statusAnonPrivate
			flags |= flagAnonymous
		}
		if access[0] == 'r' {
			prot |= protRead
		}
		for _, flag := range words[1:] {
			switch flag {
			case "dc":
				advice |= adviceDontFork
			case "wf":
				advice |= adviceWipeOnFork
			}
		}
		var m []byte
		for _, f := range []struct{ number, value uint64 }{{1, start}, {2, end}, {5, prot}, {6, flags}, {7, status}, {9, advice}} {
			m = binary.AppendUvarint(binary.AppendUvarint(m, f.number<<3), f.value)
		}
		message = append(binary.AppendUvarint(append(message, 14<<3|2), uint64(len(m))), m...)
	}
	return message
}

// captured is the memory that images hold.
type captured struct {
	runs  []run
	pages []byte
}

func readCaptured(t testing.TB, dir string, pid int) captured {
	t.Helper()
	inner, err := innerPID(pid)
	must(t, err)
	p, err := readPagemap(dir, inner)
	must(t, err)
	return readPages(t, dir, p)
}

func readPages(t testing.TB, dir string, p pagemap) captured {
	t.Helper()
	pages, err := os.ReadFile(filepath.Join(dir, fmt.Sprintf("pages-%d.img", p.id)))
	must(t, err)
	return captured{p.runs, pages}
}

// at is a part of the memory; nil where nothing was captured.
func (c captured) at(address uint64, size int) []byte {
	offset := uint64(0)
	for _, r := range c.runs {
		if address >= r.start && address+uint64(size) <= r.end() {
			return c.pages[offset+address-r.start:][:size]
		}
		offset += r.pages * pageSize
	}
	return nil
}

func (c captured) word(address uint64) uint64 {
	if b := c.at(address, 8); b != nil {
		return binary.NativeEndian.Uint64(b)
	}
	return 0
}

// helper starts the helper as a process of its own.
type helperProcess struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
}

func startHelper(t testing.TB) *helperProcess {
	t.Helper()
	h := &helperProcess{cmd: exec.Command("/proc/self/exe")}
	h.cmd.Env = append(os.Environ(), "COW_TEST=helper")
	var log bytes.Buffer
	h.cmd.Stderr = &log
	in, err := h.cmd.StdinPipe()
	must(t, err)
	out, err := h.cmd.StdoutPipe()
	must(t, err)
	must(t, h.cmd.Start())
	t.Cleanup(func() {
		in.Close()
		h.cmd.Wait()
		if log.Len() > 0 {
			t.Logf("helper: %s", log.Bytes())
		}
	})
	h.in, h.out = in, json.NewDecoder(out)
	h.expect(t, Ready)
	return h
}

func (h *helperProcess) hear(t testing.TB) Message {
	t.Helper()
	var m Message
	must(t, h.out.Decode(&m))
	return m
}

func (h *helperProcess) expect(t testing.TB, says string) Message {
	t.Helper()
	m := h.hear(t)
	if m.Says != says {
		t.Fatalf("the helper says %+v, not %s", m, says)
	}
	return m
}

func (h *helperProcess) ask(t testing.TB, r Request) {
	t.Helper()
	must(t, json.NewEncoder(h.in).Encode(r))
}

// captureAll captures containers, on a thread of its own.
func captureAll(t testing.TB, containers ...Container) error {
	t.Helper()
	return captureThen(t, func() error { return nil }, containers...)
}

// captureThen is told when all run on.
func captureThen(t testing.TB, running func() error, containers ...Container) error {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		c := capture{request: Request{Sandbox: "s", Containers: containers}, log: slog.New(slog.DiscardHandler)}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := c.run(ctx, running)
		done <- err
	}()
	return <-done
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func numbers(t testing.TB, line string) (all []uint64) {
	t.Helper()
	for _, word := range strings.Fields(line) {
		n, err := strconv.ParseUint(word, 0, 64)
		must(t, err)
		all = append(all, n)
	}
	return all
}

// noChildren says that a process has no child without an exit signal.
func noChildren(t testing.TB, pid int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	must(t, err)
	for _, e := range entries {
		child, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, err := readStat(child); err == nil && s.parent == pid && s.exitSignal == 0 {
			t.Errorf("process %d still has child %d, state %c", pid, child, s.state)
		}
	}
}

func writeText(file, text string) error { return os.WriteFile(file, []byte(text), 0o600) }

func TestAProcessThatEndsWhileItIsLookedAtIsNoFault(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	pid := cmd.Process.Pid
	start, _, err := vdsoOf(pid)
	for i := 0; err != nil && i < 1000; i++ { // it is being executed
		time.Sleep(time.Millisecond)
		start, _, err = vdsoOf(pid)
	}
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if err := readVDSO(mem, make([]byte, 6), start); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(cmd.Process.Kill(), awaitZombie(pid)); err != nil {
		t.Fatal(err)
	}
	if err := readVDSO(mem, make([]byte, 6), start); !errors.Is(err, errNoVDSO) {
		t.Errorf("its memory: %v", err)
	}
	if kept, err := Examine(pid); kept != 0 || err != nil {
		t.Errorf("examined: %d, %v", kept, err)
	}
}

func awaitZombie(pid int) error {
	for i := 0; i < 5000; i++ {
		s, err := readStat(pid)
		if err != nil || s.state == 'Z' {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return fmt.Errorf("process %d does not end", pid)
}
