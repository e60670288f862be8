package cow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Tracing is per thread: everything in this file, and what calls it, is done by one
// thread of the helper, which lives as long as the helper does.

// stopPatience bounds how long a thread may take to stop, and to execute a system call.
const stopPatience = 2 * time.Second

// Options of ptrace(2) for the processes, and for the thread that is about to fork. Never
// PTRACE_O_EXITKILL: that is for the children only. Nor are children of their own traced.
const (
	traceOptions = unix.PTRACE_O_TRACESYSGOOD
	forkOptions  = traceOptions | unix.PTRACE_O_TRACECLONE
)

func ptrace(request, tid int, addr, data uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

var (
	// errGone says that a thread has ended.
	errGone = errors.New("it has ended")
	// errBusy says that a thread cannot be stopped now.
	errBusy = errors.New("it does not stop")
)

// thread is one that is traced.
type thread struct {
	tid     int
	stopped bool
	// own are the registers that it goes on with.
	own registers
	// changed says that it has others now.
	changed bool
}

// seize attaches to a thread and asks it to stop. One that has ended is errGone.
func seize(tid int, options uintptr) (*thread, error) {
	if err := ptrace(unix.PTRACE_SEIZE, tid, 0, options); err != nil {
		if errors.Is(err, unix.ESRCH) || ending(tid) {
			return nil, errGone
		}
		return nil, fmt.Errorf("trace thread %d: %w", tid, err)
	}
	t := &thread{tid: tid}
	if err := unix.PtraceInterrupt(tid); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil, errGone
		}
		return nil, fmt.Errorf("stop thread %d: %w", tid, err)
	}
	return t, nil
}

// ending says whether a thread is a zombie, or not there.
func ending(tid int) bool {
	s, err := readStat(tid)
	return err != nil || s.state == 'Z' || s.state == 'X'
}

// event is one stop of a thread.
type event struct {
	signal unix.Signal
	what   int // PTRACE_EVENT_..., or 0
}

const syscallStop = unix.SIGTRAP | 0x80

// wait waits for a thread's next stop.
func wait(tid int) (event, error) {
	end := time.Now().Add(stopPatience)
	zombie := false
	for pause := 20 * time.Microsecond; ; {
		var status unix.WaitStatus
		got, err := unix.Wait4(tid, &status, unix.WALL|unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			return event{}, errGone
		case err != nil:
			return event{}, fmt.Errorf("wait for thread %d: %w", tid, err)
		case got == tid && (status.Exited() || status.Signaled()):
			return event{}, errGone
		case got == tid && status.Stopped():
			return event{status.StopSignal(), int(status >> 16)}, nil
		case zombie:
			// It is kept from being collected by threads beside it, which are traced, too.
			return event{}, errGone
		case time.Now().After(end):
			return event{}, fmt.Errorf("thread %d: %w: it is %s", tid, errBusy, describeState(tid))
		}
		time.Sleep(pause)
		if pause = min(pause*2, time.Millisecond); pause == time.Millisecond {
			zombie = ending(tid) // and is asked for once more
		}
	}
}

// await waits until a thread that was asked to stands still, with the registers that it
// goes on with.
func (t *thread) await() error {
	for {
		e, err := wait(t.tid)
		if err != nil {
			return err
		}
		if e.what == unix.PTRACE_EVENT_STOP {
			if e.signal != unix.SIGTRAP {
				return fmt.Errorf("thread %d was stopped by signal %d", t.tid, e.signal)
			}
			t.stopped = true
			t.own, err = getRegisters(t.tid)
			return gone(err)
		}
		if err := t.handle(e); err != nil {
			return err
		}
	}
}

// gone tells the end of a thread from other errors.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return errGone
	}
	return err
}

// handle has a thread that stopped because of a signal take that, with its own
// registers, and stop again before it executes anything.
func (t *thread) handle(e event) error {
	signal := e.signal
	if e.what != 0 || e.signal == syscallStop {
		signal = 0
	}
	if t.changed {
		if err := setRegisters(t.tid, t.own); err != nil {
			return gone(err)
		}
		t.changed = false
	}
	if err := unix.PtraceInterrupt(t.tid); err != nil {
		return gone(err)
	}
	return gone(unix.PtraceCont(t.tid, int(signal)))
}

// place is where in a process a stub fits: the last bytes of its vDSO, which nobody
// executes or reads.
type place struct{ address uint64 }

// findPlace looks for it. Only zeros are taken for unused.
func findPlace(pid int) (place, error) {
	start, end, err := vdsoOf(pid)
	if err != nil {
		return place{}, err
	}
	mem, err := os.Open(filepath.Join("/proc", strconv.Itoa(pid), "mem"))
	if err != nil {
		return place{}, err
	}
	defer mem.Close()
	head := make([]byte, 6)
	if err := readVDSO(mem, head, start); err != nil {
		return place{}, err
	}
	if string(head[:4]) != "\x7fELF" || head[4] != 2 { // ELFCLASS64
		return place{}, fmt.Errorf("%w: it is no program of 64 bits", ErrUnfit)
	}
	// A thread that was let go on its way, because the helper was killed, may have a
	// signal to handle before it goes on in its stub: that stays. The next one goes beside it.
	var used uint64
	for at := end - stubSize; at >= end-maxStubs*stubSize; at -= stubSize {
		here := make([]byte, stubSize)
		if err := readVDSO(mem, here, at); err != nil {
			return place{}, err
		}
		if len(bytes.Trim(here, "\x00")) == 0 {
			return place{at}, nil
		}
		if !bytes.HasSuffix(here, stubMark) {
			break
		}
		used = at
	}
	if used == 0 {
		return place{}, fmt.Errorf("%w: its vDSO has no room at its end", ErrUnfit)
	}
	return place{used}, nil
}

// readVDSO reads memory of a process. One that has ended meanwhile, or executes another
// program, has none there any more (errNoVDSO).
func readVDSO(mem io.ReaderAt, into []byte, at uint64) error {
	_, err := mem.ReadAt(into, int64(at))
	if errors.Is(err, io.EOF) || errors.Is(err, unix.EIO) {
		return errNoVDSO
	} else if err != nil {
		return fmt.Errorf("read its vDSO: %w", err)
	}
	return nil
}

const maxStubs = 4

// stubMark is how a stub of ours ends.
var stubMark = []byte("\x00stasis\x01")

func vdsoOf(pid int) (start, end uint64, err error) {
	maps, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "maps"))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(maps)) {
		if !strings.HasSuffix(line, "[vdso]\n") {
			continue
		}
		if _, err := fmt.Sscanf(line, "%x-%x", &start, &end); err != nil || end-start < 4096 {
			return 0, 0, fmt.Errorf("%w: its vDSO is not understood: %q", ErrUnfit, line)
		}
		return start, end, nil
	}
	return 0, 0, errNoVDSO
}

var errNoVDSO = fmt.Errorf("%w: it has no vDSO", ErrUnfit)

// put writes code to the place; short code is followed by zeros.
func (p place) put(tid int, code []byte) error {
	if len(code) > stubSize-len(stubMark) {
		return fmt.Errorf("a stub of %d bytes", len(code))
	}
	whole := make([]byte, stubSize)
	if code != nil {
		copy(whole, code)
		copy(whole[stubSize-len(stubMark):], stubMark)
	}
	if _, err := unix.PtracePokeData(tid, uintptr(p.address), whole); err != nil {
		return fmt.Errorf("write to the vDSO of thread %d: %w", tid, gone(err))
	}
	return nil
}

func (p place) clear(tid int) error { return p.put(tid, nil) }

// attempts bounds how often signals may come in between a thread and a system call.
const attempts = 64

// enter has a stopped thread execute a stub up to the entry of its system call. Signals
// that come before are handled first, as if they had come before the thread was stopped.
func (t *thread) enter(p place, forks bool, nr uint64, args [5]uint64) error {
	for range attempts {
		own, err := fixCriticalSection(t.tid, t.own)
		if err != nil {
			return err
		}
		t.own = own
		if err := p.put(t.tid, stub(t.own, forks)); err != nil {
			return err
		}
		t.changed = true
		if err := setRegisters(t.tid, t.own.calling(p.address, args)); err != nil {
			return gone(err)
		}
		if err := unix.PtraceSyscall(t.tid, 0); err != nil {
			return gone(err)
		}
		e, err := wait(t.tid)
		if err != nil {
			return err
		}
		if e.signal == syscallStop {
			r, err := getRegisters(t.tid)
			if err != nil {
				return gone(err)
			}
			if !r.atEntry(harmless) {
				return fmt.Errorf("thread %d is not where it was led to", t.tid)
			}
			return gone(setRegisters(t.tid, r.instead(nr)))
		}
		if err := t.again(e); err != nil {
			return err
		}
	}
	return fmt.Errorf("thread %d: signals kept coming", t.tid)
}

// again brings a thread back to a stop with its own registers, after e.
func (t *thread) again(e event) error {
	if err := t.handle(e); err != nil {
		return err
	}
	return t.await()
}

// leave returns what the system call returned; the thread then has its own registers.
// If a signal came in between, ok is false and the thread is as before enter.
func (t *thread) leave() (result int64, child int, ok bool, err error) {
	for {
		e, err := wait(t.tid)
		if err != nil {
			return 0, child, false, err
		}
		switch {
		case e.what == unix.PTRACE_EVENT_CLONE:
			pid, err := unix.PtraceGetEventMsg(t.tid)
			if err != nil {
				return 0, child, false, gone(err)
			}
			child = int(pid)
			if err := unix.PtraceSyscall(t.tid, 0); err != nil {
				return 0, child, false, gone(err)
			}
			continue
		case e.signal != syscallStop:
			return 0, child, false, fmt.Errorf("thread %d stopped in a system call: signal %d, event %d", t.tid, e.signal, e.what)
		}
		r, err := getRegisters(t.tid)
		if err != nil {
			return 0, child, false, gone(err)
		}
		if restart := r.result(); restart <= -512 && restart >= -516 {
			return restart, child, false, t.again(event{})
		}
		if err := setRegisters(t.tid, t.own); err != nil {
			return 0, child, false, gone(err)
		}
		t.changed = false
		return r.result(), child, true, nil
	}
}

// call has a stopped thread execute one system call.
func (t *thread) call(p place, nr uint64, args [5]uint64) (int64, error) {
	for range attempts {
		if err := t.enter(p, false, nr, args); err != nil {
			return 0, err
		}
		if err := unix.PtraceSyscall(t.tid, 0); err != nil {
			return 0, gone(err)
		}
		result, _, ok, err := t.leave()
		if err != nil || ok {
			return result, err
		}
	}
	return 0, fmt.Errorf("thread %d: signals kept coming", t.tid)
}

// release lets a thread go on with its own registers. A system call that was
// interrupted for us is taken up again by the kernel, which looks at them when it does.
func (t *thread) release() error {
	if !t.stopped {
		return nil
	}
	if t.changed {
		if err := setRegisters(t.tid, t.own); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("give thread %d its registers: %w", t.tid, err)
		}
	}
	t.stopped = false
	if err := unix.PtraceDetach(t.tid); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("let thread %d go: %w", t.tid, err)
	}
	return nil
}

// stat is a part of /proc/PID/stat (proc_pid_stat(5)).
type stat struct {
	command    string
	state      byte
	parent     int
	start      uint64 // ticks since boot
	exitSignal int
}

func readStat(pid int) (stat, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, err
	}
	return parseStat(string(data))
}

func parseStat(text string) (s stat, err error) {
	open, end := strings.IndexByte(text, '('), strings.LastIndexByte(text, ')')
	if open < 0 || end < open {
		return s, fmt.Errorf("%q is no process status", text)
	}
	s.command = text[open+1 : end]
	fields := strings.Fields(text[end+1:])
	if len(fields) < 36 || len(fields[0]) != 1 {
		return s, fmt.Errorf("%q is no process status", text)
	}
	s.state = fields[0][0]
	var errs [3]error
	s.parent, errs[0] = strconv.Atoi(fields[1])
	s.start, errs[1] = strconv.ParseUint(fields[19], 10, 64)
	s.exitSignal, errs[2] = strconv.Atoi(fields[35])
	if err := errors.Join(errs[:]...); err != nil {
		return s, fmt.Errorf("%q is no process status: %w", text, err)
	}
	return s, nil
}

func describeState(tid int) string {
	s, err := readStat(tid)
	if err != nil {
		return "gone"
	}
	return fmt.Sprintf("%s, state %c", s.command, s.state)
}

// threadsOf lists the threads of a process, the first one first.
func threadsOf(pid int) ([]int, error) {
	entries, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "task"))
	if err != nil {
		return nil, err
	}
	tids := []int{pid}
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil && tid != pid {
			tids = append(tids, tid)
		}
	}
	return tids, nil
}

// statusOf reads a line of /proc/PID/status.
func statusOf(pid int, name string) (string, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value), nil
		}
	}
	return "", fmt.Errorf("process %d has no %s", pid, name)
}

// innerPID is a process' ID in the innermost of its PID namespaces.
func innerPID(pid int) (int, error) {
	text, err := statusOf(pid, "NSpid")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(text)
	if len(fields) == 0 {
		return 0, fmt.Errorf("process %d has no ID", pid)
	}
	return strconv.Atoi(fields[len(fields)-1])
}

// readAt reads numbers of a stopped thread's memory.
func readAt(tid int, address uint64, words int) ([]uint64, error) {
	raw := make([]byte, 8*words)
	if _, err := unix.PtracePeekData(tid, uintptr(address), raw); err != nil {
		return nil, gone(err)
	}
	numbers := make([]uint64, words)
	for i := range numbers {
		numbers[i] = binary.NativeEndian.Uint64(raw[8*i:])
	}
	return numbers, nil
}
