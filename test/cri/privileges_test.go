package cri_test

import (
	"context"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v8/crit/images/criu-core"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"podstasis.dev/stasis/internal/checkpoint"
)

// hardened is a container as the restricted Pod security standard wants it.
func hardened(name, script string) *runtimeapi.ContainerConfig {
	c := container(name, script)
	c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
	c.Linux.SecurityContext.RunAsGroup = &runtimeapi.Int64Value{Value: 1000}
	c.Linux.SecurityContext.NoNewPrivs = true
	c.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{DropCapabilities: []string{"ALL"}}
	c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	return c
}

// alter changes the core image of process 1, and makes the checkpoint one that is
// whole: whoever makes an archive makes its digests.
func (n *node) alter(t *testing.T, dir string, change func(*criu_core.CoreEntry, *creds.CredsEntry)) {
	t.Helper()
	file := n.host.Path(dir + "/containers/a/criu/core-1.img")
	data, err := os.ReadFile(file)
	must(t, err)
	var core criu_core.CoreEntry
	must(t, proto.Unmarshal(data[12:], &core))
	change(&core, core.ThreadCore.Creds)
	entry, err := proto.Marshal(&core)
	must(t, err)
	must(t, os.WriteFile(file, append(binary.LittleEndian.AppendUint32(data[:8:8], uint32(len(entry))), entry...), 0o600))
	must(t, n.host.Do(func() error {
		m, _, err := checkpoint.ReadManifest(dir)
		if err != nil {
			return err
		}
		_, err = reseal(dir, m)
		return err
	}))
}

func reseal(dir string, m *checkpoint.Manifest) (string, error) {
	if err := os.Remove(dir + "/" + checkpoint.ManifestName); err != nil {
		return "", err
	}
	return checkpoint.Seal(context.Background(), dir, m)
}

func TestAContainerWithoutPrivilegesComesBackWithoutThem(t *testing.T) {
	c := hardened("a", counting)
	r := theNode.restore(t, checkpointOf(t, c), c)
	before := len(r.numbers(t, "a", 1))
	r.numbers(t, "a", before+5)
	status := r.exec(t, "a", `grep -E 'Uid|CapBnd|CapEff|NoNewPrivs|Seccomp:' /proc/1/status`)
	for _, want := range []string{"Uid:\t1000\t1000\t1000\t1000", "CapBnd:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(status, want) {
			t.Errorf("it has not %q:\n%s", want, status)
		}
	}
}

func TestImagesThatGiveAProcessMoreThanItsContainerMayHaveAreNotRestored(t *testing.T) {
	n := theNode
	disabled := criu_core.SeccompMode_disabled
	for name, c := range map[string]struct {
		change func(*criu_core.CoreEntry, *creds.CredsEntry)
		says   []string
	}{
		"more capabilities": {func(_ *criu_core.CoreEntry, who *creds.CredsEntry) {
			who.CapBnd, who.CapPrm, who.CapEff = []uint32{1 << 21, 0}, []uint32{1 << 21, 0}, []uint32{1 << 21, 0}
		}, []string{"CAP_SYS_ADMIN", "allows none"}},
		"root":           {func(_ *criu_core.CoreEntry, who *creds.CredsEntry) { who.Uid = proto.Uint32(0) }, []string{"uid 0", "user 1000"}},
		"no seccomp":     {func(core *criu_core.CoreEntry, _ *creds.CredsEntry) { core.ThreadCore.SeccompMode = &disabled }, []string{"seccomp mode 0", "mode 2"}},
		"new privileges": {func(_ *criu_core.CoreEntry, who *creds.CredsEntry) { who.NoNewPrivs = nil }, []string{"no_new_privs is 0", "noNewPrivileges"}},
	} {
		t.Run(name, func(t *testing.T) {
			config := hardened("a", counting)
			dir := checkpointOf(t, config)
			n.alter(t, dir, c.change)
			// containerd calls the OCI runtime when the container is to start.
			p := n.prepareRestore(t, dir, config)
			_, err := n.runtime.StartContainer(testContext(t), &runtimeapi.StartContainerRequest{ContainerId: p.containers["a"]})
			if err == nil {
				t.Fatal("it was restored")
			}
			for _, want := range append(c.says, "process 1 (sh)") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("it says %v, and not %q", err, want)
				}
			}
			if lines := p.lines(t, "a"); len(lines) != 0 {
				t.Errorf("it ran: %q", lines)
			}
		})
	}
}
