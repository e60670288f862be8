// Command shim-launch starts gVisor's shim on a machine that withholds CAP_SYS_RESOURCE.
//
// containerd runs it in place of containerd-shim-runsc-v1. That program's "start" gives the
// shim a lower oom_score_adj than its parent's, and fails where it may not: here it is
// started without. Whatever else it is asked for is the real program's.
package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
)

const shim = "/usr/local/bin/containerd-shim-runsc-v1"

func main() {
	args := os.Args[1:]
	var err error
	if slices.Contains(args, "start") {
		err = start(args)
	} else {
		err = syscall.Exec(shim, append([]string{shim}, args...), os.Environ())
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "shim-launch: %v\n", err)
		os.Exit(1)
	}
}

// start does what "start" of containerd's shims is to do: it leaves a process behind that
// serves on a socket, and says where.
func start(args []string) error {
	values, serve := map[string]string{}, []string{}
	for i := 0; i+1 < len(args) && args[i] != "start"; i++ {
		serve = append(serve, args[i])
		if args[i] == "-debug" {
			continue
		}
		values[args[i]] = args[i+1]
		serve = append(serve, args[i+1])
		i++
	}
	dir := filepath.Join(filepath.Dir(values["-address"]), "s")
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	name := sha256.Sum256([]byte(values["-namespace"] + "/" + values["-id"]))
	socket := filepath.Join(dir, fmt.Sprintf("%x", name[:16])) // addresses of sockets are short
	os.Remove(socket)                                          // of one that was killed
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	listener.SetUnlinkOnClose(false)
	file, err := listener.File()
	if err != nil {
		return err
	}
	cmd := exec.Command(shim, serve...)
	cmd.Env = append(os.Environ(), "GOMAXPROCS=2")
	cmd.ExtraFiles = []*os.File{file}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	address := "unix://" + socket
	for name, text := range map[string]string{"shim.pid": strconv.Itoa(cmd.Process.Pid), "address": address} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			cmd.Process.Kill()
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"version": 2, "address": address, "protocol": "ttrpc"})
}
