package kubectl

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	subresourcesv1alpha1 "podstasis.dev/stasis/api/subresources/v1alpha1"
)

var update = flag.Bool("update", false, "write what commands print into the scripts' golden files")

func TestMain(m *testing.M) {
	plugin := func() { os.Exit(Main(NewCheckpointCommand)) }
	testscript.Main(m, map[string]func(){
		"kubectl-checkpoint":          plugin,
		"kubectl_complete-checkpoint": plugin,
		"kubectl-restore":             func() { os.Exit(Main(NewRestoreCommand)) },
		"kubectl_complete-restore":    func() { os.Exit(Main(NewRestoreCommand)) },
	})
}

// The scripts in testdata/script run the programs against an API server of their
// own, in the namespace team-a.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			server := newAPIServer(t)
			env.Defer(server.CloseClientConnections)
			env.Defer(func() { go server.Close() }) // a connection that hangs must not hold the script
			env.Values["server"] = server
			kubeconfig := filepath.Join(env.WorkDir, "kubeconfig")
			env.Setenv("KUBECONFIG", kubeconfig)
			env.Setenv("HOME", env.WorkDir)
			return os.WriteFile(kubeconfig, fmt.Appendf(nil, `{"apiVersion":"v1","kind":"Config","current-context":"c",
				"clusters":[{"name":"s","cluster":{"server":%q}}],"contexts":[{"name":"c","context":{"cluster":"s","namespace":"team-a","user":"u"}}],
				"users":[{"name":"u","user":{}}]}`, server.URL), 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":    exits,
			"objects":  objects,
			"forbid":   forbid,
			"set":      set,
			"archive":  serveArchive,
			"contents": serveContents,
			"meets":    meets,
			"served":   waitServed,
			"called":   called,
			"count":    count,
			"mode":     mode,
			"flip":     flip,
		},
	})
}

func serverOf(ts *testscript.TestScript) *apiServer { return ts.Value("server").(*apiServer) }

// exits CODE PROGRAM ARG...: run it; it must end with this code.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("%s ended with %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

// objects FILE: the server has these.
func objects(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(serverOf(ts).load(ts.ReadFile(args[0])))
}

// forbid VERB RESOURCE.
func forbid(ts *testscript.TestScript, _ bool, args []string) {
	s := serverOf(ts)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forbidden[args[0]+" "+args[1]] = true
}

// set WHAT VALUE: how the server and its node behave.
func set(ts *testscript.TestScript, _ bool, args []string) {
	s := serverOf(ts)
	s.mu.Lock()
	defer s.mu.Unlock()
	number, _ := strconv.ParseInt(args[1], 10, 64)
	switch args[0] {
	case "agent":
		s.agent = args[1]
	case "served":
		s.served = args[1] == "true"
	case "cut":
		s.faults.cutAfter = number
	case "hang":
		s.faults.hangAfter, s.faults.served = number, 0
	case "refuse":
		s.faults.refuse = int(number)
	case "flip":
		s.faults.flip = args[1] == "true"
	default:
		ts.Fatalf("nothing to set: %s", args[0])
	}
}

// archive NAME BYTES FILE: the server gives out an archive, and it is written to a file too.
func serveArchive(ts *testscript.TestScript, _ bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	s := serverOf(ts)
	s.addArchive(args[0], n)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), s.archives[args[0]].data, 0o600))
}

// contents NAME FILE: what the node says is inside a checkpoint.
func serveContents(ts *testscript.TestScript, _ bool, args []string) {
	s := serverOf(ts)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.contents[args[0]] = []byte(ts.ReadFile(args[1]))
}

// meets POD FILE: what the node says a checkpoint of it would meet.
func meets(ts *testscript.TestScript, _ bool, args []string) {
	var found subresourcesv1alpha1.CheckpointPreflight
	ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[1])), &found))
	s := serverOf(ts)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.preflights[args[0]] = &found
}

// served BYTES [FILE]: wait until so much has been given out, or taken, and is in a file.
func waitServed(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.ParseInt(args[0], 10, 64)
	ts.Check(err)
	s := serverOf(ts)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		s.mu.Lock()
		got := s.faults.served
		s.mu.Unlock()
		if got >= want {
			break
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%d bytes were served, want %d", got, want)
		}
	}
	if len(args) == 1 {
		return
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if info, err := os.Stat(ts.MkAbs(args[1])); err == nil && info.Size() >= want {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("%d bytes were served, and not all of them are in %s", want, args[1])
		}
	}
}

// called METHOD PATH [N]: the server was asked so, N times.
func called(ts *testscript.TestScript, neg bool, args []string) {
	s := serverOf(ts)
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, call := range s.calls {
		if call == args[0]+" "+args[1] {
			n++
		}
	}
	if want := len(args) > 2; want && fmt.Sprint(n) != args[2] || !want && (n > 0) == neg {
		ts.Fatalf("%s %s was called %d times; all calls:\n%s", args[0], args[1], n, strings.Join(s.calls, "\n"))
	}
}

// count RESOURCE N: the server has so many of them.
func count(ts *testscript.TestScript, _ bool, args []string) {
	s := serverOf(ts)
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for key := range s.objects {
		if key.resource == args[0] {
			n++
		}
	}
	if fmt.Sprint(n) != args[1] {
		ts.Fatalf("%d %s are there, want %s", n, args[0], args[1])
	}
}

// mode FILE PERMISSIONS.
func mode(ts *testscript.TestScript, _ bool, args []string) {
	info, err := os.Stat(ts.MkAbs(args[0]))
	ts.Check(err)
	if got := fmt.Sprintf("%o", info.Mode().Perm()); got != args[1] {
		ts.Fatalf("%s has mode %s, want %s", args[0], got, args[1])
	}
}

// flip FILE OFFSET: damage one bit.
func flip(ts *testscript.TestScript, _ bool, args []string) {
	at, err := strconv.Atoi(args[1])
	ts.Check(err)
	path := ts.MkAbs(args[0])
	data, err := os.ReadFile(path)
	ts.Check(err)
	data[at] ^= 1
	ts.Check(os.WriteFile(path, data, 0o600))
}
