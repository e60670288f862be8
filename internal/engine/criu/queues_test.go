package criu

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"podstasis.dev/stasis/test/cc"
)

//go:embed queues/queues.c
var queuesSource []byte

//go:embed queues/testdata/asif.c
var connectionSource []byte

func TestAConnectionIsCapturedAtOneMomentThoughTheOtherEndGoesOn(t *testing.T) {
	dir := t.TempDir()
	library, err := cc.Compile(queuesSource, "-shared", "-fPIC", "-Wshadow")
	if err != nil {
		t.Fatal(err)
	}
	program, err := cc.Compile(connectionSource, "-rdynamic")
	if err != nil {
		t.Fatal(err)
	}
	asIf := filepath.Join(dir, "as-if")
	if err := errors.Join(os.WriteFile(dir+"/queues.so", library, 0o755), os.WriteFile(asIf, program, 0o755)); err != nil {
		t.Fatal(err)
	}
	look := func(how string, env ...string) error {
		cmd := exec.Command(asIf, how)
		cmd.Env = append(os.Environ(), env...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		t.Logf("%s: %s", how, out)
		return nil
	}
	for _, how := range []string{"receive", "empty", "send", "fin", "within", "reset"} {
		if err := look(how, "LD_PRELOAD="+dir+"/queues.so"); err != nil {
			t.Errorf("%s: %v", how, err)
		}
		// Otherwise nothing has been tried.
		if err := look(how); err == nil && slices.Contains([]string{"receive", "empty", "send", "fin"}, how) {
			t.Errorf("%s: it is of one moment without the library, too", how)
		} else {
			t.Logf("%s, without it: %v", how, err)
		}
	}
}

func TestCRIUsErrorsAboutQueuesThatMoveAreTold(t *testing.T) {
	for reason, want := range map[string]bool{
		"Error (soccr/soccr.c:371): \trecv failed (97, want 96): Invalid argument | Error (criu/sk-tcp.c:147): tcp: libsoccr_save() failed with -5 | Error (criu/cr-dump.c:1545): Dump files (pid: 2044) failed with -1":            true,
		"Error (soccr/soccr.c:371): \trecv failed (0, want 8): Resource temporarily unavailable | Error (criu/sk-tcp.c:147): tcp: libsoccr_save() failed with -6 | Error (criu/cr-dump.c:1545): Dump files (pid: 9) failed with -1": true,
		"Error (soccr/soccr.c:140): Unknown state 12 | Error (criu/sk-tcp.c:147): tcp: libsoccr_save() failed with -2":                                                                                                              false,
		"Error (criu/sk-inet.c:191): inet: Connected TCP socket, consider using --tcp-established option":                                                                                                                           false,
	} {
		if got := queueMoved(reason); got != want {
			t.Errorf("%q: %v", reason, got)
		}
	}
}
