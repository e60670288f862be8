package criu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/hostns"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages/lazy"
)

// Commands of the program that restores, by which it gives a container its memory while
// that runs (package lazy).
const (
	MemoryKeeper = "stasis-memory-keeper"
	MemoryServer = "stasis-memory-server"
)

// MemoryLog is the name of their log in a container's work directory.
const MemoryLog = "memory.log"

// killPatience bounds how long a container that was killed may take to end.
const killPatience = time.Minute

// MemoryOf is what a keeper is told, as one line of JSON on its standard input. That
// stays open as long as CRIU may still come.
type MemoryOf struct {
	WorkDir     string          `json:"workDir"`
	ContainerID string          `json:"containerID"`
	Container   string          `json:"container"`
	Sandbox     nodeapi.Sandbox `json:"sandbox"`
	Socket      string          `json:"socket"` // of the agent
	// TerminationLog is where the container runtime looks for why a container ended;
	// may be empty.
	TerminationLog string `json:"terminationLog,omitempty"`
}

// startMemory starts a keeper and returns when CRIU can be started. release is called
// when CRIU has come, or will not.
func startMemory(of MemoryOf) (release func(), err error) {
	host, err := hostns.FromPID(os.Getpid())
	if err != nil {
		return nil, err
	}
	defer host.Close()
	log, err := os.OpenFile(filepath.Join(of.WorkDir, MemoryLog), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	theirIn, ourIn, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirIn.Close()
	ourOut, theirOut, err := os.Pipe()
	if err != nil {
		ourIn.Close()
		return nil, err
	}
	defer ourOut.Close()
	executable, err := os.Executable()
	if err == nil {
		_, err = host.Start(hostns.Command{Name: executable, Args: []string{MemoryKeeper}, Outside: true, Stderr: log}, theirIn, theirOut)
	}
	theirOut.Close()
	if err == nil {
		err = json.NewEncoder(ourIn).Encode(of)
	}
	if err == nil {
		var line string
		ourOut.SetReadDeadline(time.Now().Add(hookTimeout))
		if line, err = bufio.NewReader(ourOut).ReadString('\n'); line != lazy.Ready {
			err = fmt.Errorf("it did not come up (%w): %s", err, tail(log.Name()))
		}
	}
	if err != nil {
		ourIn.Close()
		return nil, fmt.Errorf("start the process that gives the container its memory: %w", err)
	}
	return func() { ourIn.Close() }, nil
}

// tail is the last line of a log.
func tail(file string) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return "it left no log"
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return lines[len(lines)-1]
}

// KeepMemory is the keeper's side. changed is told of each stage that the memory comes to.
func KeepMemory(in io.Reader, ready io.WriteCloser, executable string, changed func(MemoryOf, lazy.Status), log *slog.Logger) error {
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP, unix.SIGINT)
	endureMemoryPressure()
	r := bufio.NewReader(in)
	line, err := r.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("read which container's memory it is: %w", err)
	}
	var of MemoryOf
	if err := json.Unmarshal(line, &of); err != nil {
		return fmt.Errorf("read which container's memory it is: %w", err)
	}
	unwanted := make(chan struct{})
	go func() {
		io.Copy(io.Discard, r)
		close(unwanted)
	}()
	named := of.Sandbox
	named.Annotations = nil // they may be too long for a command line
	sandbox, err := json.Marshal(named)
	if err != nil {
		return err
	}
	k := &lazy.Keeper{
		WorkDir: of.WorkDir, ContainerID: of.ContainerID, Unwanted: unwanted,
		Server: []string{executable, MemoryServer, of.WorkDir, of.ContainerID, of.Socket, string(sandbox)},
		Find:   findContainer(of.ContainerID), Log: log,
		Changed: func(s lazy.Status) { changed(of, s) },
	}
	return k.Run(ready)
}

// ServeMemory is the server's side: what a keeper has put on its command line.
func ServeMemory(workDir, containerID, socket, sandbox string, log *slog.Logger) error {
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP, unix.SIGINT, unix.SIGTERM)
	endureMemoryPressure()
	var of nodeapi.Sandbox
	if err := json.Unmarshal([]byte(sandbox), &of); err != nil {
		return fmt.Errorf("read whose memory it is: %w", err)
	}
	started := func() bool {
		p, err := nodeapi.ReadProgress(workDir)
		return err != nil || p.ContainerID == containerID && (p.Stage == nodeapi.StageStarting || p.Stage == nodeapi.StageStarted)
	}
	return lazy.Serve(workDir, findContainer(containerID), started, askAgent(socket, of), log)
}

// askAgent asks the agent for what it is still bringing.
func askAgent(socket string, sandbox nodeapi.Sandbox) lazy.Ask {
	return func(ctx context.Context, file string, block int, urgent bool) (lazy.Answer, error) {
		// An agent that is stopped, and not gone, does not answer either.
		ctx, cancel := context.WithTimeout(ctx, 2*nodeapi.BlockWait)
		defer cancel()
		answer, err := nodeapi.Call(ctx, socket, nodeapi.Request{Block: &nodeapi.Block{Sandbox: sandbox, File: file, Block: block, Urgent: urgent}})
		switch {
		case err != nil:
			return lazy.Answer{}, err
		case answer.Error != nil:
			return lazy.Answer{Lost: answer.Error.Message}, nil
		case answer.Block == nil:
			return lazy.Answer{Lost: "the agent does not know what is asked of it: stasis-runtime and stasis-agent are of different versions"}, nil
		}
		return lazy.Answer{There: answer.Block.There, Trouble: answer.Block.Trouble}, nil
	}
}

// endureMemoryPressure asks the kernel to take others first when there is no memory. It
// may be forbidden.
func endureMemoryPressure() {
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0)
}

// findContainer finds the container that a CRIU restores, which the OCI runtime has put
// into that container's cgroup.
func findContainer(id string) func(criu int) (lazy.Container, error) {
	return func(criu int) (lazy.Container, error) {
		f, err := freezerOf(criu)
		if err != nil {
			return nil, err
		}
		if !strings.Contains(filepath.Base(f.path), id) {
			return nil, fmt.Errorf("process %d is in cgroup %s, and not in that of container %s", criu, f.path, id)
		}
		return container{f}, nil
	}
}

// awaitMemory waits until containers that were restored a while ago have all their memory:
// CRIU would take for zero what is not there yet.
func (e *Engine) awaitMemory(ctx context.Context, s engine.Sandbox) error {
	for _, c := range s.Containers {
		workDir := filepath.Join(e.runDir, "restore", s.ID+".work", c.Name)
		for {
			var status lazy.Status
			err := e.host.Do(func() (err error) {
				status, err = lazy.ReadStatus(workDir)
				return err
			})
			if err != nil {
				return fmt.Errorf("container %s: %w", c.Name, err)
			}
			if status.ContainerID != c.ID || status.Stage == lazy.StageComplete || status.Stage == "" {
				break
			}
			if status.Stage == lazy.StageLost {
				return fmt.Errorf("container %s is being ended: its memory could not be restored: %s", c.Name, status.Message)
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("container %s, which was restored, is still being given its memory, %d of %d MiB are there: %w", c.Name, status.Given>>20, status.Total>>20, context.Cause(ctx))
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

// container is all that is in a container's cgroup.
type container struct{ freezer freezer }

// Kill implements lazy.Container. Whoever holds the processes' memory goes on holding it
// meanwhile, so they do not run on what is missing.
func (c container) Kill() error {
	for end := time.Now().Add(killPatience); ; time.Sleep(5 * time.Millisecond) {
		left, err := c.freezer.processes()
		if err == nil && len(left) == 0 {
			return nil
		}
		if err == nil {
			// One that stands still does not end before it is let go.
			err = errors.Join(c.freezer.freeze(), c.freezer.killAll(), c.freezer.thaw())
		}
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ESRCH):
			if _, statErr := os.Stat(filepath.Join(c.freezer.mount, c.freezer.path)); errors.Is(statErr, fs.ErrNotExist) {
				return nil
			}
		}
		if time.Now().After(end) {
			return fmt.Errorf("%d processes of the container do not end: %w", len(left), err)
		}
	}
}
