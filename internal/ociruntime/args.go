package ociruntime

import "strings"

// invocation is an OCI runtime's command line, as far as Stasis reads it. What
// it does not know it leaves as it is: the real runtime judges that.
type invocation struct {
	Global  []string // arguments before the command
	Root    string   // --root
	Log     string   // --log
	Others  []string // what is before the command besides --root, --log and --log-format
	Command string   // "create", "start", …; empty if there is none
	Bundle  string   // --bundle of create
	PIDFile string   // --pid-file of create
	Console string   // --console-socket of create
	ID      string   // the last argument
}

// Options that take a value, before the command and after it (runc(8), crun(1)).
var (
	globalValues  = map[string]bool{"root": true, "log": true, "log-format": true, "criu": true, "rootless": true, "cgroup-manager": true}
	commandValues = map[string]bool{"bundle": true, "b": true, "pid-file": true, "console-socket": true, "preserve-fds": true, "process": true, "p": true, "user-log": true}
)

// parse reads a command line.
func parse(args []string) invocation {
	var in invocation
	in.Root = "/run/runc"
	i := eachOption(args, globalValues, func(name, value string) {
		switch name {
		case "root":
			in.Root = value
		case "log":
			in.Log = value
		case "log-format":
		default:
			in.Others = append(in.Others, "--"+name)
			if value != "" {
				in.Others = append(in.Others, value)
			}
		}
	})
	in.Global = args[:i]
	if i == len(args) {
		return in
	}
	in.Command = args[i]
	rest := args[i+1:]
	for len(rest) > 0 {
		n := eachOption(rest, commandValues, func(name, value string) {
			switch name {
			case "bundle", "b":
				in.Bundle = value
			case "pid-file":
				in.PIDFile = value
			case "console-socket":
				in.Console = value
			}
		})
		if n == len(rest) {
			break
		}
		// The container's ID is the first argument that is no option; kill has a
		// signal after it, exec a command.
		if in.ID == "" {
			in.ID = rest[n]
		}
		rest = rest[n+1:]
	}
	return in
}

// eachOption reads options up to the first argument that is none, and returns
// that argument's index.
func eachOption(args []string, takesValue map[string]bool, found func(name, value string)) int {
	i := 0
	for i < len(args) {
		arg := args[i]
		if !strings.HasPrefix(arg, "-") || arg == "-" {
			return i
		}
		i++
		if arg == "--" {
			return i
		}
		name, value, given := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if !given && takesValue[name] && i < len(args) {
			value = args[i]
			i++
		}
		found(name, value)
	}
	return i
}
