package nodeinstall

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// process is what /proc tells of the container runtime's daemon.
type process struct {
	pid   int
	exe   string   // in its own mount namespace
	args  []string // with the name
	path  string   // its PATH
	start string   // its start time, which tells two processes of one PID apart
	unit  string   // the systemd service that it is in; empty if it is in none
}

// defaultPath is the PATH of a daemon that has none in its environment.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// readProcess reads /proc/PID.
func readProcess(proc string, pid int) (process, error) {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	p := process{pid: pid, path: defaultPath}
	exe, err := os.Readlink(filepath.Join(dir, "exe"))
	if err != nil {
		return p, fmt.Errorf("read about process %d: %w", pid, err)
	}
	p.exe = strings.TrimSuffix(exe, " (deleted)") // an upgrade replaced it: the new one has its name
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return p, fmt.Errorf("read about process %d: %w", pid, err)
	}
	p.args = strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
	environ, err := os.ReadFile(filepath.Join(dir, "environ"))
	if err != nil {
		return p, fmt.Errorf("read about process %d: %w", pid, err)
	}
	for _, e := range strings.Split(string(environ), "\x00") {
		if path, ok := strings.CutPrefix(e, "PATH="); ok && path != "" {
			p.path = path
		}
	}
	if p.start, err = startTime(proc, pid); err != nil {
		return p, err
	}
	if cgroup, err := os.ReadFile(filepath.Join(dir, "cgroup")); err == nil {
		p.unit = unitOf(string(cgroup))
	}
	return p, nil
}

// startTime is field 22 of /proc/PID/stat (proc_pid_stat(5)).
func startTime(proc string, pid int) (string, error) {
	stat, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "stat"))
	if err != nil {
		return "", fmt.Errorf("read about process %d: %w", pid, err)
	}
	_, after, ok := bytes.Cut(stat, []byte(") ")) // the name before may hold spaces
	fields := strings.Fields(string(after))
	if !ok || len(fields) < 20 {
		return "", fmt.Errorf("read about process %d: its stat has %d fields", pid, len(fields))
	}
	return fields[19], nil
}

// unitOf finds the systemd service in /proc/PID/cgroup: the last component that
// is one, in the hierarchy that systemd keeps.
func unitOf(cgroup string) string {
	for line := range strings.Lines(cgroup) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 || parts[0] != "0" && parts[1] != "name=systemd" {
			continue
		}
		components := strings.Split(parts[2], "/")
		for i := len(components) - 1; i >= 0; i-- {
			if strings.HasSuffix(components[i], ".service") {
				return components[i]
			}
		}
	}
	return ""
}

// defaultConfigPath is the main configuration file of a containerd that was not
// told another.
const defaultConfigPath = "/etc/containerd/config.toml"

// configPath is the main configuration file that containerd was started with.
func (p process) configPath() (string, error) {
	if len(p.args) == 0 {
		return defaultConfigPath, nil
	}
	for i, arg := range p.args[1:] {
		name, value, has := strings.Cut(arg, "=")
		switch name {
		case "-c", "--c", "-config", "--config":
		default:
			continue
		}
		if !has {
			if i+2 >= len(p.args) {
				return "", errors.New("containerd's command line ends with " + arg)
			}
			value = p.args[i+2]
		}
		if !filepath.IsAbs(value) {
			return "", fmt.Errorf("containerd was started with the configuration %q, which is not an absolute path; name it with --containerd-config", value)
		}
		return filepath.Clean(value), nil
	}
	return defaultConfigPath, nil
}

// findProgram looks a program up as the daemon would.
func (p process) findProgram(name string) (string, error) {
	if filepath.IsAbs(name) {
		if !isProgram(name) {
			return "", fmt.Errorf("containerd's OCI runtime %s is not there, or cannot be executed", name)
		}
		return name, nil
	}
	for _, dir := range filepath.SplitList(p.path) {
		if full := filepath.Join(dir, name); filepath.IsAbs(full) && isProgram(full) {
			return full, nil
		}
	}
	return "", fmt.Errorf("containerd's OCI runtime %s is not in its PATH (%s)", name, p.path)
}

func isProgram(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
