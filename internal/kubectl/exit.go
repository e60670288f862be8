package kubectl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericiooptions"
)

// Exit codes of both commands.
const (
	ExitOK          = 0   // done, or created where --wait=false
	ExitFailed      = 1   // the operation failed or was refused
	ExitUsage       = 2   // the command line is wrong; nothing was sent
	ExitInProgress  = 3   // the wait is over and the operation still goes on
	ExitInterrupted = 130 // interrupted while waiting; the operation goes on
)

const exitCodesHelp = `Exit codes:
  0    done (with --wait=false: created)
  1    failed or refused
  2    wrong command line, nothing was sent
  3    still in progress when the wait ended
  130  interrupted while waiting; what was asked for goes on`

// exitError is an error that ends the command with a code of its own.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &exitError{ExitUsage, fmt.Errorf(format, args...)}
}

func inProgressf(format string, args ...any) error {
	return &exitError{ExitInProgress, fmt.Errorf(format, args...)}
}

// ExitCode is the code that a command which returned err ends with.
func ExitCode(err error) int {
	var exit *exitError
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &exit):
		return exit.code
	case errors.Is(err, context.Canceled):
		return ExitInterrupted
	}
	return ExitFailed
}

// Main runs one of the commands as a program and returns its exit code.
//
// kubectl completes a plugin's arguments by calling kubectl_complete-NAME; a link
// of that name to the plugin is enough, since Main goes by the program's name.
func Main(command func(genericiooptions.IOStreams) *cobra.Command) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	cmd := command(genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr})
	args := os.Args[1:]
	if strings.HasPrefix(filepath.Base(os.Args[0]), "kubectl_complete-") {
		args = append([]string{cobra.ShellCompRequestCmd}, args...)
	}
	cmd.SetArgs(args)
	return run(ctx, cmd, os.Stderr)
}

// run executes cmd and reports its error, once, on errOut.
func run(ctx context.Context, cmd *cobra.Command, errOut io.Writer) int {
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{ExitUsage, err} })
	err := cmd.ExecuteContext(ctx)
	if err != nil {
		fmt.Fprintf(errOut, "error: %v\n", err)
	}
	code := ExitCode(err)
	if code == ExitUsage {
		fmt.Fprintf(errOut, "See '%s --help' for usage.\n", cmd.CommandPath())
	}
	return code
}
