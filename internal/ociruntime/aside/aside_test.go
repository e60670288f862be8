package aside

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The program becomes another one, so it is run as a process: this test binary, under
// the name stasis-runtime in an installation of its own.
func TestMain(m *testing.M) {
	if os.Getenv("STASIS_RUNTIME_UNDER_TEST") == "" {
		os.Exit(m.Run())
	}
	if err := Main(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// installed is an installation whose real runtime and whose stasis-restore only tell
// who they are and what their arguments were.
type installed struct{ dir, program string }

func install(t *testing.T) installed {
	t.Helper()
	i := installed{dir: t.TempDir()}
	i.program = i.dir + "/bin/stasis-runtime"
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"bin", "etc", "bundle", "root/ours", "root/ordinary", "run"} {
		if err := os.MkdirAll(filepath.Join(i.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(self, i.program); err != nil {
		data, err := os.ReadFile(self) // another file system
		if err != nil {
			t.Fatal(err)
		}
		i.write(t, "bin/stasis-runtime", string(data))
	}
	i.write(t, "bin/"+Full, "#!/bin/sh\necho full $@\n")
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
	cmd.Env = append(append(os.Environ(), "STASIS_RUNTIME_UNDER_TEST=1"), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestWhatIsOrdinaryGoesToTheRealRuntimeAsItIsAndAllElseDoesNot(t *testing.T) {
	i := install(t)
	i.write(t, "bundle/config.json", `{"ociVersion": "1.2.0", "annotations": {"io.kubernetes.cri.container-type": "container", "checkpoint.podstasis.dev/hooks": "x"}}`)
	root := "--root " + i.dir + "/root "
	for _, c := range []struct{ line, who string }{
		{root + "create --bundle " + i.dir + "/bundle x", "runc"},
		{root + "start ordinary", "runc"},
		{root + "start ours", "full"},
		{root + "kill ordinary 9", "runc"},
		{root + "kill ours 9", "full"},
		{root + "delete ordinary", "runc"},
		{root + "delete --force ours", "full"},
		{root + "state ours", "runc"},
		{root + "exec --process p ours", "runc"},
		{root + "stasis-look ordinary", "full"},
		{"--version", "runc"},
	} {
		if got, want := i.run(t, "stasis-runtime", nil, strings.Fields(c.line)...), c.who+" "+c.line; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	// A restore that was interrupted, of whichever container.
	if err := os.Mkdir(i.dir+"/run/"+RestorePrefix+"1", 0o700); err != nil {
		t.Fatal(err)
	}
	if got := i.run(t, "stasis-runtime", nil, strings.Fields(root+"delete ordinary")...); !strings.HasPrefix(got, "full ") {
		t.Errorf("a delete while a restore may be under way went to %q", got)
	}
}

func TestABundleThatConcernsStasisIsLeftToTheOtherProgram(t *testing.T) {
	i := install(t)
	for _, c := range []struct{ spec, who string }{
		{`{"annotations": {"a": "checkpoint.podstasis.dev/restore-from"}}`, "runc"},
		{`{"annotations": null, "process": {"annotations": {"org.criu.config": "/x"}}}`, "runc"},
		{`{}`, "runc"},
		{`{"annotations": {"checkpoint.podstasis.dev/restore-from": "c"}}`, "full"},
		{`{"annotations": {"checkpoint.podstasis.dev/restore-ticket": "c"}}`, "full"},
		{`{"annotations": {"a": "b", "org.criu.config": "/x"}}`, "full"},
		{`{"annotations": {}, "Annotations": {"org.criu.config": "/x"}}`, "full"},
		{`{"annotations": {}, "annotationſ": {"org.criu.config": "/x"}}`, "full"},
		{`{"annotations": {}, "annotations": {"org.criu.config": "/x"}}`, "full"},
		{`{"annotations": {"org.cri\u0075.config": "/x"}}`, "full"},
		{`{"annotation\u0073": {"org.criu.config": "/x"}}`, "full"},
		{`{"annotations": {"a": "}", "b": ["]"], "org.criu.config": "/x"}}`, "full"},
		{`{"annotations": {"a": "\"}}", "org.criu.config": "/x"}}`, "full"},
		{`{"annotations": []}`, "full"},
		{`{"annotations": {"a": "b"}`, "full"},
		{``, "full"},
	} {
		i.write(t, "bundle/config.json", c.spec)
		if got := i.run(t, "stasis-runtime", nil, "create", "--bundle", i.dir+"/bundle", "x"); !strings.HasPrefix(got, c.who+" ") {
			t.Errorf("%s: got %q, want %s", c.spec, got, c.who)
		}
	}
}

func TestWithoutAConfigurationThatIsUnderstoodTheOtherProgramDecides(t *testing.T) {
	i := install(t)
	for _, config := range []string{`{"runtime": ""}`, `{"runtime": "r", "more": 1}`, `{"runtime": "/nowhere/runc"}`, `[]`} {
		i.write(t, "etc/runtime.json", config)
		if got := i.run(t, "stasis-runtime", nil, "--version"); got != "full --version" {
			t.Errorf("%s: %q", config, got)
		}
	}
	if err := os.Remove(i.dir + "/etc/runtime.json"); err != nil {
		t.Fatal(err)
	}
	if got := i.run(t, "stasis-runtime", []string{"PATH=.:/nowhere:" + i.dir + ":/bin:/usr/bin"}, "--version"); got != "runc --version" {
		t.Errorf("without a configuration: %q", got)
	}
}

func TestUnderItsOtherNamesItIsTheFreezeHookAndWhatHasCompleted(t *testing.T) {
	i := install(t)
	for _, c := range []struct {
		name, stage, want string
	}{
		{"/dev/" + Completed, "", ""},
		{"/x/" + FreezeHook, "post-restore", ""},
		{"/x/" + FreezeHook, "", ""},
		{"/x/" + FreezeHook, "pre-resume", "full"},
	} {
		if got := i.run(t, c.name, []string{"CRTOOLS_SCRIPT_ACTION=" + c.stage}); got != c.want {
			t.Errorf("as %s at %q: %q, want %q", c.name, c.stage, got, c.want)
		}
	}
}

// What members finds is what a reader of JSON finds, of whatever that takes.
func FuzzMembers(f *testing.F) {
	for _, seed := range []string{`{}`, `{"a":1}`, ` { "a" : {"b":["}",1]} , "c":"\"" } `, `{"a":tru e}`, `{"a\u0062":1}`, `{"a":1,}`, `{"a":-1e5,"b":null,"a":[]}`, `{"a":}`, `{"":[{}]}x`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		found := map[string]string{}
		ok := members(data, func(name string, value []byte) bool {
			found[name] = string(value)
			return true
		})
		var want map[string]json.RawMessage
		if json.Unmarshal(data, &want) != nil || want == nil || !ok {
			return // refused by the one or the other
		}
		if !slices.Equal(slices.Sorted(maps.Keys(found)), slices.Sorted(maps.Keys(want))) {
			t.Fatalf("%q: found %q, there are %q", data, found, want)
		}
		for name, value := range want {
			if found[name] != string(value) {
				t.Fatalf("%q: %q is %q, found %q", data, name, value, found[name])
			}
		}
	})
}
