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

// completePrefix begins the names of programs that kubectl calls to complete a
// plugin's arguments: kubectl_complete-NAME.
const completePrefix = "kubectl_complete-"

// Main runs one of the commands as a program and returns its exit code.
//
// kubectl completes a plugin's arguments by calling kubectl_complete-NAME; a link
// of that name to the plugin is enough, since Main goes by the program's name.
func Main(command func(genericiooptions.IOStreams) *cobra.Command) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	cmd := command(genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr})
	args := os.Args[1:]
	if strings.HasPrefix(filepath.Base(os.Args[0]), completePrefix) {
		args = append([]string{cobra.ShellCompRequestCmd}, args...)
	}
	cmd.SetArgs(args)
	return run(ctx, cmd, os.Stderr)
}

// run executes cmd and reports its error, once, on errOut.
func run(ctx context.Context, cmd *cobra.Command, errOut io.Writer) int {
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{ExitUsage, err} })
	called, err := cmd.ExecuteContextC(ctx)
	if err != nil && !errors.Is(err, errSilent) {
		fmt.Fprintf(errOut, "error: %v\n", err)
	}
	code := ExitCode(err)
	if code == ExitUsage {
		fmt.Fprintf(errOut, "See '%s --help' for usage.\n", called.CommandPath())
	}
	return code
}

// errSilent ends a command with its exit code and no message: the output has said it.
var errSilent = errors.New("")

func silently(code int) error { return &exitError{code, errSilent} }
