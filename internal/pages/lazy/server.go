package lazy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// server gives the processes of one container their pages.
type server struct {
	plan   *Plan
	blocks *blocks
	log    *slog.Logger
	// hold makes sure that a userfaultfd stays open when this process is gone. It is
	// asked before anybody runs who could miss a page that is behind it.
	hold func(fd int) error

	ctx    context.Context
	cancel context.CancelCauseFunc
	work   sync.WaitGroup
	turns  *Bandwidth
	order  *order

	ready map[uint32]func() *missing // by PID; of much memory it takes as long as CRIU's start

	mu     sync.Mutex
	spaces []*space

	given atomic.Int64 // pages
	total atomic.Int64
}

func newServer(ctx context.Context, p *Plan, from source, ask Ask, log *slog.Logger, hold func(fd int) error) (*server, error) {
	b, err := newBlocks(ctx, p, from, ask)
	if err != nil {
		return nil, err
	}
	s := &server{plan: p, blocks: b, log: log, hold: hold, turns: NewBandwidth(p.Bandwidth), order: readOrder(p), ready: map[uint32]func() *missing{}}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	for _, process := range p.Processes {
		set := sync.OnceValue(func() *missing { return newMissing(process.Runs) })
		s.ready[process.PID] = set
		go set() // CRIU need not wait for it: it is started meanwhile
	}
	return s, nil
}

// space is an address space.
type space struct {
	s    *server
	pid  uint32
	file int // of its pages, in the plan
	uffd uffd

	// mu is held over every look at missing together with what is done because of it, by
	// as many as give pages: a page is given only while it belongs there. It is held alone
	// to take note of what the kernel says, before the process that said it goes on. A page
	// that two give is there for the second; it is taken out of missing when it is there.
	mu      sync.RWMutex
	missing *missing
	gone    bool // the process has ended, or runs another program
}

// add takes over a process's userfaultfd.
func (s *server) add(pid uint32, fd int) error {
	file := -1
	for i, process := range s.plan.Processes {
		if process.PID == pid {
			file = i
		}
	}
	set := newMissing(nil)
	if ready := s.ready[pid]; ready != nil { // or it has nothing that is given lazily
		set = ready()
	}
	delete(s.ready, pid)
	s.serve(&space{s: s, pid: pid, file: file, missing: set}, fd)
	return nil
}

func (s *server) serve(sp *space, fd int) {
	unix.SetNonblock(fd, true) // for Go to wait for it with all else
	sp.uffd = uffd{os.NewFile(uintptr(fd), "userfaultfd")}
	s.total.Add(int64(sp.missing.left()))
	s.mu.Lock()
	s.spaces = append(s.spaces, sp)
	s.mu.Unlock()
	s.work.Go(func() {
		if err := sp.listen(); err != nil && s.ctx.Err() == nil {
			s.cancel(fmt.Errorf("process %d: %w", sp.pid, err))
		}
	})
}

// listen takes note of what the kernel says, until the file is closed.
func (sp *space) listen() error {
	conn, err := sp.uffd.file.SyscallConn()
	if err != nil {
		return err
	}
	var buf [messageBytes]byte
	for {
		var m message
		var faulty error
		err := conn.Read(func(fd uintptr) bool {
			sp.mu.Lock()
			defer sp.mu.Unlock()
			n, err := unix.Read(int(fd), buf[:])
			switch {
			case err == unix.EAGAIN:
				return false
			case err == unix.EINTR:
				return true
			case err != nil:
				faulty = fmt.Errorf("read what the kernel says of its memory: %w", err)
			case n != messageBytes:
				faulty = fmt.Errorf("the kernel says %d bytes of its memory", n)
			default:
				m = decodeMessage(&buf)
				faulty = sp.note(m)
			}
			return true
		})
		if errors.Is(err, os.ErrClosed) {
			return nil
		} else if err = errors.Join(err, faulty); err != nil {
			return err
		}
		if m.event == eventFault {
			address := m.b &^ (pageSize - 1)
			sp.s.work.Go(func() { sp.answer(address) })
		}
	}
}

// note follows what a process does to its memory. The kernel lets it go on when it has
// been read.
func (sp *space) note(m message) error {
	switch m.event {
	case eventFault:
		return nil
	case eventRemap:
		sp.missing.move(m.a, m.b, m.c)
	case eventRemove, eventUnmap:
		sp.missing.drop(m.a, m.b)
	case eventFork:
		fd := int(m.a)
		if err := sp.s.hold(fd); err != nil {
			return err
		}
		sp.s.serve(&space{s: sp.s, pid: sp.pid, file: sp.file, missing: sp.missing.clone()}, fd)
	default:
		return fmt.Errorf("the kernel says %x of its memory, which nobody knows", m.event)
	}
	return nil
}

// errGone says that a process has ended, or runs another program.
var errGone = errors.New("the process has ended")

// answer gives a page that a process waits for.
func (sp *space) answer(address uint64) {
	ctx, cancel := context.WithTimeoutCause(sp.s.ctx, sp.s.plan.Patience, fmt.Errorf("it has not come for %s", sp.s.plan.Patience))
	defer cancel()
	err := sp.give(ctx, address, true)
	if err != nil && !errors.Is(err, errGone) && sp.s.ctx.Err() == nil {
		sp.s.cancel(fmt.Errorf("the page at %x of process %d: %w", address, sp.pid, err))
	}
}

// give gives what belongs to an address, and what is missing of the same block. wanted
// says that somebody waits for it.
func (sp *space) give(ctx context.Context, address uint64, wanted bool) error {
	for try := 0; ; try++ {
		sp.mu.RLock()
		page, ok := sp.missing.at(address)
		if sp.gone {
			sp.mu.RUnlock()
			return errGone
		}
		var errno unix.Errno
		if !ok && wanted {
			errno = sp.fillZero(address)
		}
		sp.mu.RUnlock()
		if !ok {
			if again, err := sp.again(ctx, errno, try); !again {
				return err
			}
			continue
		}
		id := blockID{sp.file, int(page / blockPages)}
		if wanted {
			sp.s.order.note(id)
		}
		data, release, err := sp.s.blocks.get(ctx, id, wanted)
		if err != nil {
			return err
		}
		errno = sp.fill(address, id, data, wanted)
		release()
		if again, err := sp.again(ctx, errno, try); !again {
			return err
		}
	}
}

// again says whether something is to be tried again that the kernel did not do, and
// what is wrong otherwise.
func (sp *space) again(ctx context.Context, errno unix.Errno, try int) (bool, error) {
	switch errno {
	case 0:
		return false, nil
	case unix.ESRCH:
		sp.leave()
		return false, errGone
	case unix.EAGAIN: // there is something to read first
	case unix.ENOENT, unix.ENOMEM:
		// Memory that was unmapped meanwhile, or where the container has no room: told
		// in a moment.
		if try > 200 {
			return false, fmt.Errorf("the kernel does not take it: %w", errno)
		}
	default:
		return false, fmt.Errorf("the kernel does not take it: %w", errno)
	}
	select {
	case <-ctx.Done():
		return false, context.Cause(ctx)
	case <-time.After(min(time.Duration(try+1)*20*time.Microsecond, 10*time.Millisecond)):
		return true, nil
	}
}

// leave forgets a process that is gone.
func (sp *space) leave() {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	if !sp.gone {
		sp.gone = true
		sp.s.total.Add(-int64(sp.missing.left()))
		sp.missing = newMissing(nil)
	}
}

// set is what is missing.
func (sp *space) set() *missing {
	sp.mu.RLock()
	defer sp.mu.RUnlock()
	return sp.missing
}

// fillZero answers a process that waits for what is not missing: it is there meanwhile,
// or was never written. The caller holds mu.
func (sp *space) fillZero(address uint64) unix.Errno {
	if sp.missing.empty(address) { // so that it does not ask for each
		if begin := address &^ (chunkSize - 1); sp.uffd.zero(begin, chunkSize) == 0 {
			return 0
		}
	}
	errno := sp.uffd.zero(address, pageSize)
	if errno == unix.EEXIST {
		sp.uffd.wake(address)
		return 0
	}
	return errno
}

// fill puts those pages of a block in place that are missing around an address.
func (sp *space) fill(address uint64, id blockID, data []byte, wanted bool) unix.Errno {
	sp.mu.RLock()
	defer sp.mu.RUnlock()
	if sp.gone {
		return unix.ESRCH
	}
	first := uint32(id.block * blockPages)
	count := len(data) / pageSize
	page, ok := sp.missing.at(address)
	if !ok || page < first || int(page-first) >= count {
		if wanted {
			return unix.EAGAIN // it has been moved, or given by another: look anew
		}
		return 0
	}
	n := 1       // what waits comes first, alone: the rest may lie in other mappings
	if !wanted { // from its first page on, which may lie in a chunk that another gives
		for page > first {
			if before, ok := sp.missing.at(address - pageSize); !ok || before != page-1 {
				break
			}
			address, page = address-pageSize, page-1
		}
		n = max(1, sp.missing.run(address, count-int(page-first)))
	}
	if errno := sp.put(address, data[(page-first)*pageSize:][:n*pageSize]); errno != 0 {
		return errno
	}
	// The others belong to addresses around it, with gaps where no page was captured,
	// unless they were moved. Nobody waits for these: what does not work has its turn.
	for at := address + uint64(n)*pageSize; at < address+fillAround; {
		p, ok := sp.missing.at(at)
		if !ok {
			at += pageSize
			continue
		}
		if p < first || int(p-first) >= count {
			break
		}
		n := sp.missing.run(at, count-int(p-first))
		if sp.put(at, data[(p-first)*pageSize:][:n*pageSize]) != 0 {
			return 0
		}
		at += uint64(n) * pageSize
	}
	for at := address - pageSize; at < address && at > address-fillAround; at -= pageSize {
		p, ok := sp.missing.at(at)
		if !ok {
			continue
		}
		if p < first || int(p-first) >= count || sp.put(at, data[(p-first)*pageSize:][:pageSize]) != 0 {
			break
		}
	}
	return 0
}

// fillAround is how far from an address other pages of its block are looked for.
const fillAround = 4 * chunkSize

// put puts pages in place. The caller holds mu, if not alone.
func (sp *space) put(address uint64, data []byte) unix.Errno {
	for len(data) > 0 {
		n, errno := sp.uffd.copy(address, data)
		if errno == unix.EEXIST && n == 0 { // it is there: who waits did not know yet
			sp.uffd.wake(address)
			n, errno = pageSize, 0
		}
		if n > 0 {
			sp.s.given.Add(int64(sp.missing.drop(address, address+uint64(n))))
			sp.s.turns.Spend(n)
			address, data = address+uint64(n), data[n:]
			continue
		}
		if errno == unix.ENOENT && len(data) > pageSize { // it ends in another mapping
			data = data[:pageSize]
			continue
		}
		if errno == 0 {
			errno = unix.EAGAIN
		}
		return errno
	}
	return 0
}

// startsSoon bounds how long memory is not streamed because a container has not been let go.
const startsSoon = time.Second

// await waits for a container that is about to be let go: what comes before that wants the
// processors, and what is streamed is not missed yet.
func (s *server) await(started func() bool) {
	look := time.NewTicker(2 * time.Millisecond)
	defer look.Stop()
	late := time.NewTimer(startsSoon)
	defer late.Stop()
	for !started() {
		select {
		case <-look.C:
		case <-late.C:
			return
		case <-s.ctx.Done():
			return
		}
	}
}

// stream gives all that is missing, and returns when nothing is. It is called when CRIU
// has made all mappings.
func (s *server) stream() error {
	streamers := max(2, runtime.NumCPU())
	for {
		s.mu.Lock()
		spaces := s.spaces
		s.mu.Unlock()
		s.streamFirst(spaces, streamers)
		left := 0
		for _, sp := range spaces {
			if err := sp.stream(streamers); err != nil {
				return err
			}
			left += sp.set().left()
		}
		s.mu.Lock()
		more := len(s.spaces) > len(spaces)
		s.mu.Unlock()
		if left == 0 && !more {
			return nil
		}
	}
}

// stepBack lets whoever wants the processor have it before the calling goroutine's
// thread, which ends with it: a container is let go, and runs, while its memory is
// streamed.
func stepBack() {
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, 10) // of the thread alone
}

// streamFirst gives the blocks that the processes of an earlier restore asked for. What
// does not work is left to who comes later.
func (s *server) streamFirst(spaces []*space, streamers int) {
	hot := s.order.take()
	if len(hot) == 0 {
		return
	}
	want := map[blockID][]target{}
	for _, id := range hot {
		want[id] = nil
	}
	for _, sp := range spaces {
		sp.set().all(func(address uint64, page uint32) {
			id := blockID{sp.file, int(page / blockPages)}
			if t, ok := want[id]; ok && (len(t) == 0 || t[len(t)-1].sp != sp) {
				want[id] = append(t, target{sp, address})
			}
		})
	}
	var next atomic.Int64
	var work sync.WaitGroup
	for range streamers {
		work.Go(func() {
			stepBack()
			for {
				i := int(next.Add(1)) - 1
				if i >= len(hot) || s.ctx.Err() != nil {
					return
				}
				for _, t := range want[hot[i]] {
					s.turns.Wait(s.ctx)
					t.sp.give(s.ctx, t.address, false)
				}
			}
		})
	}
	work.Wait()
}

type target struct {
	sp      *space
	address uint64
}

// stretch is how many chunks after each other one streamer takes. Chunks lie across the
// blocks of a file, which a page more or less moves: two streamers side by side would wait
// for each other's blocks all the time.
const stretch = 32

// stream goes through the chunks of a space once.
func (sp *space) stream(streamers int) error {
	keys := sp.set().take() // what is moved from now on has its turn after that
	var next atomic.Int64
	var work sync.WaitGroup
	errs := make([]error, streamers)
	for i := range streamers {
		work.Go(func() {
			stepBack()
			for errs[i] == nil {
				at := int(next.Add(stretch)) - stretch
				if at >= len(keys) {
					return
				}
				errs[i] = sp.streamChunks(keys[at:min(at+stretch, len(keys))])
			}
		})
	}
	work.Wait()
	if err := errors.Join(errs...); err != nil && !errors.Is(err, errGone) {
		return fmt.Errorf("process %d: %w", sp.pid, err)
	}
	return nil
}

func (sp *space) streamChunks(keys []uint64) error {
	for _, key := range keys {
		if err := sp.streamChunk(key); err != nil {
			return err
		}
	}
	return nil
}

// streamChunk gives what is missing of a chunk.
func (sp *space) streamChunk(key uint64) error {
	for {
		address, ok := sp.set().firstOf(key)
		if !ok {
			return nil
		}
		if err := sp.s.turns.Wait(sp.s.ctx); err != nil {
			return err
		}
		if err := sp.give(sp.s.ctx, address, false); err != nil {
			return fmt.Errorf("the page at %x: %w", address, err)
		}
	}
}

// close lets go of all spaces. What is not there from now on is zero.
func (s *server) close() {
	s.cancel(errors.New("all is given"))
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sp := range s.spaces {
		sp.uffd.file.Close()
	}
}
