package criu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine/criu/cow"
	"podstasis.dev/stasis/internal/hostns"
)

// noPagesEnv makes the launcher of CRIU load a library that hides the memory of processes
// from it (nopages/nopages.c).
const noPagesEnv = "STASIS_NO_PAGES"

// cowDir is where the records of children are, below the run directory.
const cowDir = "cow"

// errCOW says that memory could not be captured copy-on-write. What was captured with it
// is worth nothing; the Pod runs.
var errCOW = errors.New("its memory could not be captured copy-on-write")

// helper is the agent's end of a helper (package cow), for one capture.
type helper struct {
	in       *os.File
	process  *hostns.Process
	messages chan cow.Message
	once     sync.Once
	// request is what it is asked for, as a line.
	request []byte
	// ran is when all processes ran again.
	ran time.Time
}

const (
	// helperPatience bounds how long a helper may take to come up, and to end when it is
	// left.
	helperPatience = 5 * time.Second
)

// startHelper starts one, which waits to be asked.
func (e *Engine) startHelper(ctx context.Context) (*helper, error) {
	h, err := e.startHelperProcess()
	if err != nil {
		return nil, fmt.Errorf("%w: start the helper: %w", errCOW, err)
	}
	ctx, cancel := context.WithTimeout(ctx, helperPatience)
	defer cancel()
	if m, err := h.hear(ctx); err != nil || m.Says != cow.Ready {
		h.leave()
		return nil, fmt.Errorf("%w: the helper did not come up: it said %q: %w", errCOW, m.Says, err)
	}
	return h, nil
}

func (e *Engine) startHelperProcess() (*helper, error) {
	inRead, inWrite, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer inRead.Close()
	outRead, outWrite, err := os.Pipe()
	if err != nil {
		inWrite.Close()
		return nil, err
	}
	process, err := e.host.Start(hostns.Command{Name: e.cowHelper, Outside: true}, inRead, outWrite)
	outWrite.Close()
	if err != nil {
		return nil, errors.Join(err, inWrite.Close(), outRead.Close())
	}
	h := &helper{in: inWrite, process: process, messages: make(chan cow.Message, 4)}
	go func() {
		defer close(h.messages)
		defer outRead.Close()
		for lines := json.NewDecoder(io.LimitReader(outRead, 1<<20)); ; {
			var m cow.Message
			if lines.Decode(&m) != nil {
				return
			}
			h.messages <- m
		}
	}()
	return h, nil
}

// hear waits for what the helper says next.
func (h *helper) hear(ctx context.Context) (cow.Message, error) {
	select {
	case m, ok := <-h.messages:
		if !ok {
			return m, fmt.Errorf("%w: the helper has ended", errCOW)
		}
		if err := m.Err(); m.Kind == cow.KindDisk {
			return m, err // it would happen again
		} else if err != nil {
			return m, fmt.Errorf("%w: %w", errCOW, err)
		}
		return m, nil
	case <-ctx.Done():
		return cow.Message{}, context.Cause(ctx)
	}
}

// prepareFork settles what the helper will be asked for.
func (e *Engine) prepareFork(w window) error {
	r := cow.Request{Sandbox: w.sandbox.ID, Limits: w.plan.limits, Record: filepath.Join(e.runDir, cowDir, w.sandbox.ID+".json")}
	err := e.host.Do(func() error {
		if err := os.MkdirAll(filepath.Dir(r.Record), 0o700); err != nil {
			return err
		}
		for _, t := range w.targets {
			f, err := freezerOf(t.PID)
			if err != nil {
				return err
			}
			c := cow.Container{Name: t.Name, Images: filepath.Join(t.dir, imagesDir)}
			c.Freezer, c.Thaw = f.letGo()
			r.Containers = append(r.Containers, c)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("%w: %w", errCOW, err)
	}
	line, err := json.Marshal(r)
	w.helper.request = append(line, '\n')
	return err
}

// fork lets all containers of a frozen sandbox go and has their processes fork. When it
// returns without error they run.
func (e *Engine) fork(ctx context.Context, w window) error {
	if _, err := w.helper.in.Write(w.helper.request); err != nil {
		return fmt.Errorf("%w: ask the helper: %w", errCOW, err)
	}
	m, err := w.helper.hear(ctx)
	if err == nil && m.Says != cow.Running {
		err = fmt.Errorf("%w: the helper said %q", errCOW, m.Says)
	}
	w.helper.ran = time.Now()
	return err
}

// letGo is the file of a container's cgroup that lets it go, and what is written to it.
func (f freezer) letGo() (file, state string) {
	name, state := "freezer.state", "THAWED"
	if f.unified {
		name, state = "cgroup.freeze", "0"
	}
	return filepath.Join(f.mount, f.path, name), state
}

// finish waits until all memory has been read. It returns how many bytes that were.
func (h *helper) finish(ctx context.Context, dir string) (int64, error) {
	m, err := h.hear(ctx)
	if m.Kind == cow.KindDisk {
		err = fmt.Errorf("write %s: %w", dir, err)
	}
	if err == nil && m.Says != cow.Done {
		err = fmt.Errorf("%w: the helper said %q", errCOW, m.Says)
	}
	return m.Bytes, err
}

// leave tells a helper that it is not needed any more, and waits until it has let go of
// everything. One that does not is killed: the kernel lets go then.
func (h *helper) leave() {
	h.once.Do(func() {
		h.in.Close()
		select {
		case <-h.process.Done():
		case <-time.After(helperPatience):
			unix.Kill(h.process.PID, unix.SIGKILL)
			<-h.process.Done()
		}
		for range h.messages { // so that whoever reads them ends
		}
	})
}

// cleanCOW collects what helpers left that were killed.
func (e *Engine) cleanCOW() error {
	return e.host.Do(func() error { return cow.Clean(filepath.Join(e.runDir, cowDir)) })
}
