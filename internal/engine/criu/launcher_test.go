package criu

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"podstasis.dev/stasis/test/cc"
)

//go:embed launcher/launcher.c
var launcherSource []byte

func TestCRIUIsStartedWithWhatIsBesideItWhereverThatIs(t *testing.T) {
	built, err := cc.Compile(launcherSource, "-Wshadow", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", `-DLINKER="linker"`)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	prefix := dir + "/bin/2" // a name in which bin is, too
	for _, d := range []string{prefix + "/bin", prefix + "/lib"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const linker = `#!/bin/sh
echo "$*" | sed "s:` + "$PREFIX" + `:@:g"
echo "$HOME $CRIU_LIBS_DIR" | sed "s:` + "$PREFIX" + `:@:g"
grep -q '^SigIgn:.*1......$' /proc/self/status && echo ignored
`
	if err := os.WriteFile(prefix+"/lib/linker", []byte(linker), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(prefix+"/bin/criu", built, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("bin/2/bin/criu", dir+"/criu"); err != nil {
		t.Fatal(err)
	}
	const ordinary = "--inhibit-cache --library-path @/lib --argv0 criu @/libexec/criu swrk 3\n@/etc @/lib/plugins\nignored\n"
	for _, c := range []struct{ env, want string }{
		{"", ordinary},
		{"STASIS_AHEAD= STASIS_CRIU_HOME=", ordinary},
		{"HOME=/root CRIU_LIBS_DIR=/usr/lib/criu STASIS_CRIU_HOME=/run/home", strings.Replace(ordinary, "@/etc", "/run/home", 1)},
		{"STASIS_REFILL=1", strings.Replace(ordinary, "--argv0", "--preload @/lib/stasis-refill.so --argv0", 1)},
		{"STASIS_REFILL=1 STASIS_JOIN_SHM=1 STASIS_NO_PAGES=1 STASIS_QUEUES=1 STASIS_AHEAD=/socket", strings.Replace(ordinary, "--argv0",
			"--preload @/lib/stasis-joinshm.so:@/lib/stasis-nopages.so:@/lib/stasis-ahead.so:@/lib/stasis-queues.so:@/lib/stasis-refill.so --argv0", 1)},
	} {
		cmd := exec.Command(dir+"/criu", "swrk", "3")
		cmd.Env = append([]string{"PREFIX=" + prefix, "PATH=/usr/bin:/bin"}, strings.Fields(c.env)...)
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != c.want {
			t.Errorf("with %q: %v:\n%s\nwant\n%s", c.env, err, out, c.want)
		}
	}
	if err := os.Remove(prefix + "/lib/linker"); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(dir+"/criu", "--version").CombinedOutput(); err == nil || !strings.Contains(string(out), "run "+prefix+"/lib/linker: No such file") {
		t.Errorf("without what belongs to it: %v: %s", err, out)
	}
}
