package kubectl

import (
	"context"
	"errors"
	"fmt"
)

// Exit codes of all commands.
const (
	ExitOK          = 0   // done, or created where --wait=false
	ExitFailed      = 1   // the operation failed or was refused
	ExitUsage       = 2   // the command line is wrong; nothing was sent
	ExitInProgress  = 3   // the wait is over and the operation still goes on
	ExitCorrupt     = 4   // data are not what was written: verification failed
	ExitInterrupted = 130 // interrupted; what was asked for goes on, or can be taken up again
)

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
