package ociruntime

import (
	"bufio"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/test/cc"
)

//go:embed aside/stasis-runtime.c
var asideSource []byte

// aside is stasis-runtime, built so that it ends with an error at any access that is not
// its own.
var aside = sync.OnceValues(func() ([]byte, error) {
	return cc.Compile(asideSource, "-DPATIENCE_SECONDS=1", "-Wshadow", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
})

// installed is an installation whose real runtime and whose stasis-restore only tell
// who they are and what their arguments were.
type installed struct{ dir, program string }

func installAside(t *testing.T) installed {
	t.Helper()
	i := installed{dir: t.TempDir()}
	i.program = i.dir + "/bin/stasis-runtime"
	for _, dir := range []string{"bin", "etc", "bundle", "root/ours", "root/ordinary", "run"} {
		if err := os.MkdirAll(filepath.Join(i.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	built, err := aside()
	if err != nil {
		t.Fatal(err)
	}
	i.write(t, "bin/stasis-runtime", string(built))
	i.write(t, "bin/stasis-restore", "#!/bin/sh\necho full $@\n")
	i.write(t, "runc", "#!/bin/sh\necho runc $@\n")
	i.write(t, "etc/runtime.json", fmt.Sprintf(`{"runtime": %q, "socket": %q}`, i.dir+"/runc", i.dir+"/run/agent.sock"))
	i.write(t, "root/ours/"+MarkerName, "{}")
	return i
}

func (i installed) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(i.dir, name), []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

// run returns what came of a command line: who answered, and with which arguments.
func (i installed) run(t *testing.T, name string, env []string, args ...string) string {
	t.Helper()
	cmd := exec.Command(i.program, args...)
	cmd.Args[0] = name
	cmd.Dir = i.dir + "/bundle"
	cmd.Env = append(append(os.Environ(), "ASAN_OPTIONS=detect_leaks=0"), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// goesTo says who answered.
func (i installed) goesTo(t *testing.T, args ...string) string {
	t.Helper()
	who, _, _ := strings.Cut(i.run(t, "stasis-runtime", nil, args...), " ")
	return who
}

func TestWhatIsOrdinaryGoesToTheRealRuntimeAsItIsAndAllElseDoesNot(t *testing.T) {
	i := installAside(t)
	i.write(t, "bundle/config.json", `{"ociVersion": "1.2.0", "annotations": {"io.kubernetes.cri.container-type": "container", "checkpoint.podstasis.dev/hooks": "x"}}`)
	root := "--root " + i.dir + "/root "
	for _, c := range []struct{ line, who string }{
		{root + "create --bundle " + i.dir + "/bundle x", "runc"},
		{root + "create x", "runc"},
		{root + "start ordinary", "runc"},
		{root + "start ours", "full"},
		{root + "kill ordinary 9", "runc"},
		{root + "kill ours 9", "full"},
		{root + "delete ordinary", "runc"},
		{root + "delete --force ours", "full"},
		{root + "state ours", "runc"},
		{root + "exec --process p ours", "runc"},
		{root + nodeapi.LookCommand + " ordinary", "full"},
		{"--version", "runc"},
		{"", "runc"},
	} {
		if got, want := i.run(t, "stasis-runtime", nil, strings.Fields(c.line)...), strings.TrimSpace(c.who+" "+c.line); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	// A restore that was interrupted, of whichever container.
	if err := os.Mkdir(i.dir+"/run/"+criu.RestorePrefix+"1", 0o700); err != nil {
		t.Fatal(err)
	}
	if got := i.goesTo(t, strings.Fields(root+"delete ordinary")...); got != "full" {
		t.Errorf("a delete while a restore may be under way went to %q", got)
	}
}

// A container that is looked for in the wrong place passes for ordinary.
func TestTheContainerAndItsBundleAreFoundHoweverTheCommandLineNamesThem(t *testing.T) {
	i := installAside(t)
	i.write(t, "bundle/config.json", `{"annotations": {"org.criu.config": "/x"}}`)
	root, bundle := i.dir+"/root", i.dir+"/bundle"
	for _, line := range []string{
		"--root " + root + " --log /l --log-format json start ours",
		"--root=" + root + " --log=/l start ours",
		"-root " + root + " start ours",
		"--systemd-cgroup --debug --rootless auto --cgroup-manager systemd --criu /c --root " + root + " start ours",
		"--root /elsewhere --root " + root + " start ours",
		"--log --root --root " + root + " start ours", // the log's name is --root
		"--root " + root + " kill --all ours 9",
		"--root " + root + " kill -a ours 9",
		"--root " + root + " delete --force -- ours",
		"--root " + root + " -- delete ours",
		"--root " + root + " start --user-log l ours",
		"create --bundle " + bundle + " --pid-file /p --console-socket /c id",
		"create --pid-file /p --bundle=" + bundle + " id",
		"create -b " + bundle + " id",
		"create id --no-pivot -b " + bundle,
		"create --bundle= id",
		"create --bundle . id",
		"create id",
	} {
		if got := i.goesTo(t, strings.Fields(line)...); got != "full" {
			t.Errorf("%s went to %q", line, got)
		}
	}
	// Which options have a value stasis-restore knows as well.
	for option := range globalValues {
		if got := i.goesTo(t, "--"+option, "value", "--root", root, "start", "ours"); got != "full" {
			t.Errorf("the value of --%s passes for the command: it went to %q", option, got)
		}
	}
	for option := range commandValues {
		if got := i.goesTo(t, "--root", root, "start", "--"+option, "value", "ours"); got != "full" {
			t.Errorf("the value of --%s passes for the ID: it went to %q", option, got)
		}
	}
}

func TestABundleThatConcernsStasisIsLeftToTheOtherProgram(t *testing.T) {
	i := installAside(t)
	for _, c := range []struct{ spec, who string }{
		{`{}`, "runc"},
		{`{"annotations": {"a": "org.criu", "checkpoint.podstasis.dev/hook-1": "restore-from"}}`, "runc"},
		// As encoding/json writes a command of a shell.
		{`{"process": {"args": ["sh", "-c", "a \u0026\u0026 b \u003c\"c\\d\" \u003e e\n\tf\r\b\f\u2028\u2029"]}}`, "runc"},
		{`{"process": {"args": ["C:\\u0075"]}}`, "runc"},
		{`{"annotations": {"checkpoint.podstasis.dev/restore-from": "c"}}`, "full"},
		{`{"annotations": {"checkpoint.podstasis.dev/restore-ticket": "c"}}`, "full"},
		{`{"annotations": {"a": "b", "org.criu.config": "/x"}}`, "full"},
		{`{"annotations": {}, "Annotations": {"org.criu.config": "/x"}}`, "full"},
		{`{"annotations": {"org.cri\u0075.config": "/x"}}`, "full"},
		{`{"annotations": {"org.cri\\\u0075.config": "/x"}}`, "full"},
		{`{"annotations": {"checkpoint.podstasis.dev\/restore-from": "c"}}`, "full"},
		{`{"annotation\u0073": {}}`, "full"},
		{`{"annotations": {"a": "\`, "full"},
		{`{"annotations": {"a": "\u`, "full"},
		{"{\"a\": \"\x00\", \"annotations\": {\"org.criu.config\": \"/x\"}}", "full"},
		{"{\"a\": \"\x00\", \"annotations\": {\"org.cri\\u0075.config\": \"/x\"}}", "full"},
		{`{"a": "` + strings.Repeat("x", 1<<20) + `"}`, "runc"},
		{`{"a": "` + strings.Repeat("x", 4<<20) + `"}`, "full"}, // longer than is read
	} {
		i.write(t, "bundle/config.json", c.spec)
		if got := i.goesTo(t, "create", "--bundle", i.dir+"/bundle", "x"); got != c.who {
			t.Errorf("%.100s: got %q, want %s", c.spec, got, c.who)
		}
	}
	if got := i.goesTo(t, "create", "--bundle", i.dir+"/nowhere", "x"); got != "full" {
		t.Errorf("a bundle that cannot be read went to %q", got)
	}
}

// However JSON may spell an annotation's name, it is seen.
func TestNoSpellingOfAnAnnotationHidesIt(t *testing.T) {
	i := installAside(t)
	random := rand.New(rand.NewPCG(1, 2))
	names := []string{"org.criu.config", "checkpoint.podstasis.dev/restore-from", "checkpoint.podstasis.dev/restore-ticket"}
	for range 300 {
		name := names[random.IntN(len(names))]
		var spelled strings.Builder
		often := random.IntN(20) + 1 // an escape in so many characters
		for _, c := range name {
			switch {
			case random.IntN(often) > 0:
				spelled.WriteRune(c)
			case c == '/' && random.IntN(2) == 0:
				spelled.WriteString(`\/`)
			case random.IntN(2) == 0:
				fmt.Fprintf(&spelled, `\u%04x`, c)
			default:
				fmt.Fprintf(&spelled, `\u%04X`, c)
			}
		}
		spec := fmt.Sprintf(`{"process": {"args": ["\\", "\u003c\""]}, "annotations": {"a": "\\\"}", "%s": "x"}}`, &spelled)
		var read struct{ Annotations map[string]string }
		if err := json.Unmarshal([]byte(spec), &read); err != nil || read.Annotations[name] != "x" {
			t.Fatalf("the test spelled no JSON: %s (%v)", spec, err)
		}
		i.write(t, "bundle/config.json", spec)
		if got := i.goesTo(t, "create", "x"); got != "full" {
			t.Fatalf("%s: went to %q", spec, got)
		}
	}
}

func TestNothingThatIsWrittenInItsFilesMakesItFail(t *testing.T) {
	i := installAside(t)
	random := rand.New(rand.NewPCG(3, 4))
	parts := []string{`{`, `}`, `"`, `\`, `\u`, `\u0`, `\u003c`, `:`, `,`, ` `, "\x00", "\xff", `"runtime"`, `"socket"`, `"/`, `"annotations"`, `"org.criu`, "x"}
	hostile := func() string {
		var text strings.Builder
		for range random.IntN(30) {
			text.WriteString(parts[random.IntN(len(parts))])
		}
		return text.String()
	}
	for range 150 {
		spec := hostile()
		i.write(t, "bundle/config.json", spec)
		if got := i.goesTo(t, "create", "x"); got != "runc" && got != "full" {
			t.Errorf("with the spec %q: %q", spec, got)
		}
	}
	for range 150 {
		config := hostile()
		i.write(t, "etc/runtime.json", config)
		if got := i.goesTo(t, "state", "x"); got != "full" {
			t.Errorf("with the configuration %q: %q", config, got)
		}
	}
	// Names that are longer than any file's.
	long := strings.Repeat("x", 5000)
	for _, args := range [][]string{{"create", "--bundle", long, "x"}, {"--root", long, "start", "x"}, {"delete", long}} {
		if got := i.goesTo(t, args...); got != "full" {
			t.Errorf("%.20q went to %q", args, got)
		}
	}
}

func TestWithoutAConfigurationThatIsUnderstoodTheOtherProgramDecides(t *testing.T) {
	i := installAside(t)
	runc := fmt.Sprintf("%q", i.dir+"/runc")
	for _, c := range []struct{ config, who string }{
		{" {\n\t\"socket\" : \"/s/agent.sock\" , \"runtime\" : " + runc + " } \n", "runc"},
		{`{"runtime": ` + runc + `, "runtime": "/nowhere/runc"}`, "full"},
		{`{"runtime": ` + runc + `, "more": "1"}`, "full"},
		{`{"runtime": ` + runc + `, "more": 1}`, "full"},
		{`{"runtime": ` + runc + `, "socket": "agent.sock"}`, "full"},
		{`{"runtime": ` + runc + `,}`, "full"},
		{`{"runtime": ` + runc + `}}`, "full"},
		{`{"runtime": ` + runc, "full"},
		{`{"runtime": "`, "full"},
		{`{"runtime": ""}`, "full"},
		{`{"runtime": "\/bin\/true"}`, "full"},
		{`{"runtime": "/nowhere/runc"}`, "full"},
		{`{"runtime": ` + runc + "}\x00", "full"},
		{`{"runtime": ` + runc + "}" + strings.Repeat(" ", 64<<10), "full"}, // longer than is read
		{`[]`, "full"},
		{``, "full"},
	} {
		i.write(t, "etc/runtime.json", c.config)
		if got, want := i.run(t, "stasis-runtime", nil, "--version"), c.who+" --version"; got != want {
			t.Errorf("%.100s: got %q, want %q", c.config, got, want)
		}
	}
	if err := os.Remove(i.dir + "/etc/runtime.json"); err != nil {
		t.Fatal(err)
	}
	if got := i.run(t, "stasis-runtime", []string{"PATH=.:/nowhere:" + i.dir + ":/bin:/usr/bin"}, "--version"); got != "runc --version" {
		t.Errorf("without a configuration: %q", got)
	}
	// What is in the directory that it is called from is not what the node has.
	i.write(t, "bundle/runc", "#!/bin/sh\necho another $@\n")
	if got := i.run(t, "stasis-runtime", []string{"PATH=.::bundle"}, "--version"); got != "full --version" {
		t.Errorf("with no runtime in an absolute directory of PATH: %q", got)
	}
}

// hook runs it as CRIU's action script, and returns what it wrote and whether it returned.
func (i installed) hook(t *testing.T, stage, socket string) (out string, returned bool) {
	t.Helper()
	cmd := exec.Command(i.program)
	cmd.Args = []string{"/x/" + criu.FreezeHookName}
	cmd.Env = []string{"CRTOOLS_SCRIPT_ACTION=" + stage, "CRTOOLS_INIT_PID=4711", criu.HookSocketEnv + "=" + socket}
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// It writes one line before it stays for ever.
	line, _ := bufio.NewReader(pipe).ReadString('\n')
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("at %q: %v: %s", stage, err, line)
		}
		return line, true
	case <-time.After(200 * time.Millisecond):
		cmd.Process.Kill()
		<-done
		return line, false
	}
}

func TestAsCRIUsActionScriptItReturnsOnlyWhenTheContainerIsFrozen(t *testing.T) {
	i := installAside(t)
	dir, err := os.MkdirTemp("", "hook") // a short name
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := dir + "/socket"
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	// The restoring process: it answers what is on the channel.
	answers, heard := make(chan string), make(chan string, 1)
	go func() {
		for answer := range answers {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			said, _ := bufio.NewReader(conn).ReadString('\n')
			heard <- said
			conn.Write([]byte(answer))
			conn.Close()
		}
	}()
	defer close(answers)
	for _, c := range []struct {
		answer, says string
		returns      bool
	}{
		{"frozen\n", "", true},
		{"it does not freeze\n", "could not freeze the container: it does not freeze", false},
		{"frozen\nand more", "could not freeze", false},
		{"frozen", "could not freeze", false},
		{"", "could not freeze", false},
		{strings.Repeat("x", 8192), "could not freeze", false},
	} {
		answers <- c.answer
		out, returned := i.hook(t, "pre-resume", socket)
		if said := <-heard; said != "4711\n" {
			t.Errorf("it said %q", said)
		}
		if returned != c.returns || !strings.Contains(out, c.says) || c.says == "" && out != "" {
			t.Errorf("answered %.20q, it returned: %v; it wrote %q", c.answer, returned, out)
		}
	}
	// When it gives up, whoever would answer later learns that nobody hears it.
	silent := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			defer conn.Close()
			if _, err = io.Copy(io.Discard, conn); err == nil {
				_, err = conn.Write([]byte("frozen\n"))
			}
		}
		silent <- err
	}()
	if out, returned := i.hook(t, "pre-resume", socket); returned || !strings.Contains(out, "wait for the restoring process") {
		t.Errorf("nobody answers: it returned: %v; it wrote %q", returned, out)
	}
	if err := <-silent; !errors.Is(err, syscall.EPIPE) {
		t.Errorf("an answer that nobody hears: %v", err)
	}
	for what, place := range map[string]string{"nobody listens": dir + "/nobody", "no socket": "", "a long name": dir + strings.Repeat("/long", 30)} {
		if out, returned := i.hook(t, "pre-resume", place); returned || out == "" {
			t.Errorf("%s: it returned: %v; it wrote %q", what, returned, out)
		}
	}
	for _, stage := range []string{"", "post-restore", "pre-resume-not"} {
		if out, returned := i.hook(t, stage, socket); !returned || out != "" {
			t.Errorf("at %q it returned: %v; it wrote %q", stage, returned, out)
		}
	}
}

func TestWhatIsNotInstalledIsSaid(t *testing.T) {
	i := installAside(t)
	i.write(t, "etc/runtime.json", `{"runtime": "/nowhere/runc"}`)
	if err := os.Remove(i.dir + "/bin/stasis-restore"); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(i.program, "state", "x").CombinedOutput()
	if want := "stasis-runtime: run " + i.dir + "/bin/stasis-restore: No such file or directory: run stasis-agent install on this node\n"; err == nil || string(out) != want {
		t.Errorf("got %q (%v), want %q", out, err, want)
	}
}
