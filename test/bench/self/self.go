// Package self starts this program again, so that what takes part in a measurement has a
// process to itself.
package self

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
)

// Process is this program with other arguments. It works until its standard input ends, and
// then writes what came of it to its standard output, as JSON.
type Process struct {
	cmd *exec.Cmd
	in  io.Closer
	out io.Reader
}

// Start starts this program with arguments.
func Start(ctx context.Context, args ...string) (*Process, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &Process{cmd: exec.CommandContext(ctx, program, args...)}
	p.cmd.Stderr = os.Stderr
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if p.out, err = p.cmd.StdoutPipe(); err != nil {
		return nil, err
	}
	return p, p.cmd.Start()
}

// Stop ends the process and reads what came of it.
func (p *Process) Stop(into any) error {
	err := p.in.Close()
	if err = errors.Join(err, json.NewDecoder(p.out).Decode(into), p.cmd.Wait()); err != nil {
		return fmt.Errorf("%v: %w", p.cmd.Args[1:], err)
	}
	return nil
}
