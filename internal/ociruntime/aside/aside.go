// Package aside lets stasis-runtime become the real OCI runtime with the least work
// where nothing of Stasis is asked for: for ordinary Pods, each time. It does no more
// than look; what it is not sure about is left to stasis-restore, the other program,
// which knows everything.
//
// A Go program pays for each package that it is linked with before it begins. So this
// one imports next to nothing, and neither reads JSON into values nor opens files by
// way of the os package, which would set up its poller.
package aside

import (
	"os"
	"strings"
	"syscall"
)

const (
	// Full is the name of the program that knows everything, beside this one.
	Full = "stasis-restore"
	// FreezeHook and Completed are names under which this program is CRIU's action
	// script and the process of an init container that had completed.
	FreezeHook = "stasis-freeze-hook"
	Completed  = "stasis-completed"
	// MarkerName is what there is in the real runtime's state directory of a container
	// that belongs to a restored Pod.
	MarkerName = "stasis.json"
	// RestorePrefix begins the names of what is in the run directory from before a
	// container's restore begins until it has ended in good order.
	RestorePrefix = "freeze-"

	// defaultRunDir is where the socket of an agent is that no configuration names.
	defaultRunDir = "/run/stasis"
	// maxFile bounds what is read; what is longer is left to the other program.
	maxFile = 16 << 20
)

// Main becomes the real runtime, or the program that knows everything; or it does what
// its name says, and returns. It returns an error when neither can be had.
func Main(args []string) error {
	var argv0 string
	if len(args) > 0 {
		argv0 = args[0]
	}
	switch base(argv0) {
	case Completed:
		return nil
	case FreezeHook:
		// CRIU calls it at every stage.
		if os.Getenv("CRTOOLS_SCRIPT_ACTION") != "pre-resume" {
			return nil
		}
	default:
		argv0 = ""
	}
	executable, err := os.Executable()
	if err != nil {
		return err
	}
	dir := executable[:max(0, strings.LastIndexByte(executable, '/'))]
	env := os.Environ()
	if argv0 == "" {
		// Of an error in this the other program has more to say.
		_ = passBy(dir[:max(0, strings.LastIndexByte(dir, '/'))]+"/etc/runtime.json", args[min(1, len(args)):], env)
		argv0 = dir + "/" + Full
	}
	full := dir + "/" + Full
	err = syscall.Exec(full, append([]string{argv0}, args[min(1, len(args)):]...), env)
	return &os.PathError{Op: "run", Path: full, Err: err}
}

// passBy becomes the real runtime if that is all that is wanted. It returns when it is
// not, or not for sure.
func passBy(configFile string, args, env []string) error {
	config, err := readConfig(configFile)
	if err != nil {
		return err
	}
	in := Parse(args)
	var ordinary bool
	switch in.Command {
	case "create":
		ordinary = ordinaryBundle(in.Bundle)
	case "start", "kill":
		ordinary = !exists(in.Root + "/" + in.ID + "/" + MarkerName)
	case "delete":
		ordinary = !exists(in.Root+"/"+in.ID+"/"+MarkerName) && !restoring(config.runDir)
	case "stasis-look": // nodeapi.LookCommand
	default:
		ordinary = true
	}
	if !ordinary {
		return nil
	}
	return execute(config.runtime, args, env)
}

type config struct{ runtime, runDir string }

func readConfig(file string) (config, error) {
	c := config{runtime: "runc", runDir: defaultRunDir}
	data, err := read(file)
	if err == syscall.ENOENT {
		return c, nil
	} else if err != nil {
		return c, err
	}
	ok := members(data, func(name string, value []byte) bool {
		switch name {
		case "runtime":
			c.runtime = plain(value)
			return c.runtime != ""
		case "socket":
			socket := plain(value)
			c.runDir = socket[:max(0, strings.LastIndexByte(socket, '/'))]
			return c.runDir != ""
		}
		return false
	})
	if !ok {
		return c, syscall.EINVAL
	}
	return c, nil
}

// ordinaryBundle says whether a bundle's OCI spec has, for sure, no annotation that
// concerns Stasis. What it is not sure about is not ordinary.
func ordinaryBundle(dir string) bool {
	name := "config.json"
	if dir != "" {
		name = dir + "/" + name
	}
	data, err := read(name)
	if err != nil {
		return false
	}
	return members(data, func(name string, value []byte) bool {
		// Go's reader of JSON, which runc is, takes a name in any case.
		if !strings.EqualFold(name, "annotations") || string(value) == "null" {
			return true
		}
		return members(value, func(name string, _ []byte) bool { return !concerns(name) })
	})
}

// concerns says whether an annotation is one that Stasis acts upon: it asks for a
// restore, or would reach the engine past Stasis.
func concerns(annotation string) bool {
	return strings.HasPrefix(annotation, "org.criu.") ||
		strings.HasPrefix(annotation, "checkpoint.podstasis.dev/restore-from") ||
		strings.HasPrefix(annotation, "checkpoint.podstasis.dev/restore-ticket")
}

// restoring says whether a restore may be under way on this node, or may have been
// interrupted.
func restoring(runDir string) bool {
	entries, err := os.ReadDir(runDir)
	if os.IsNotExist(err) {
		return false
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), RestorePrefix) {
			return true
		}
	}
	return err != nil
}

// execute becomes a program, found in PATH when its name has no slash.
func execute(program string, args, env []string) (err error) {
	if strings.IndexByte(program, '/') >= 0 {
		return syscall.Exec(program, append([]string{program}, args...), env)
	}
	err = syscall.ENOENT
	for path := os.Getenv("PATH"); path != ""; {
		var dir string
		dir, path, _ = strings.Cut(path, ":")
		if !strings.HasPrefix(dir, "/") {
			continue
		}
		full := dir + "/" + program
		err = syscall.Exec(full, append([]string{full}, args...), env)
	}
	return err
}

// exists says whether there is, or may be, a file of that name.
func exists(name string) bool {
	var st syscall.Stat_t
	return syscall.Lstat(name, &st) != syscall.ENOENT
}

// read reads a whole file of ordinary size.
func read(name string) ([]byte, error) {
	fd, err := syscall.Open(name, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(fd)
	data := make([]byte, 64<<10)
	for n := 0; ; {
		got, err := syscall.Read(fd, data[n:])
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return nil, err
		case got == 0:
			return data[:n], nil
		default:
			if n += got; n == len(data) {
				if n > maxFile {
					return nil, syscall.EFBIG
				}
				data = append(data, make([]byte, n)...)
			}
		}
	}
}

func base(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }
