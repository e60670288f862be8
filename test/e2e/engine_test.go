package e2e

import (
	"cmp"
	"context"
	"fmt"
	"os"

	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// underTest is an engine, and what its Pods are.
type underTest struct {
	name     string
	sources  string // RuntimeClass of Pods that are to be checkpointed; empty: the node's default
	restores string // RuntimeClass of Pods that it restores
	data     string // pattern of names of the files in which it has most of what it captures
	other    string // name of one more of its files
	// Its wrapper's file of settings on a node, and the command of the OCI runtime with which
	// a restored container is let go.
	settings, letsGo string
	// slow are options with which a checkpoint takes long.
	slow map[string]string
	// spoils is a shell command after which a file that a process has open is not one with
	// which it is restored.
	spoils string
	// volumes are the archives of volumes that a checkpoint of the test's has, and seccomp is
	// how a process says that the runtime's default profile is in force.
	volumes, seccomp string
	// loopbackAlone says that connections within the Pod end that are between its own address.
	loopbackAlone bool
	// lacks are kinds of files that its processes cannot have at all.
	lacks []string
}

var engines = map[string]underTest{
	"criu": {
		restores: checkpointv1alpha1.RuntimeClassStasis, data: "pages-*.img", other: "core-1.img",
		settings: "runtime.json", letsGo: "resume", slow: map[string]string{"capture": "plain"}, spoils: "echo two >>",
		volumes: "dev-shm.tar emptydir-disk.tar emptydir-memory.tar emptydir-parts.tar", seccomp: "2",
	},
	"gvisor": {
		sources: classOfGVisor, restores: checkpointv1alpha1.RuntimeClassGVisor, data: "pages.img", other: "checkpoint.img",
		settings: "runsc.json", letsGo: "start", spoils: "rm",
		volumes: "emptydir-disk.tar emptydir-memory.tar emptydir-parts.tar", seccomp: "0",
		lacks: []string{"sparse-file", "deleted-file"}, loopbackAlone: true,
	},
}

// engine is the one that the tests' Pods are for: STASIS_E2E_ENGINE. Which tests can be run
// with another than CRIU package portable says.
var engine = engines["criu"]

// chooseEngine reads STASIS_E2E_ENGINE.
func chooseEngine() error {
	name := cmp.Or(os.Getenv("STASIS_E2E_ENGINE"), "criu")
	chosen, known := engines[name]
	if !known {
		return fmt.Errorf("STASIS_E2E_ENGINE=%q is none of criu and gvisor", name)
	}
	engine, engine.name = chosen, name
	return nil
}

// classOfGVisor is what a cluster calls its Pods of gVisor before it has Stasis.
const classOfGVisor = "gvisor"

// makeClasses makes the RuntimeClasses that a cluster has before it has Stasis.
func makeClasses(ctx context.Context) error {
	class := &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: classOfGVisor}, Handler: "runsc"}
	if err := shared.Create(ctx, class); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return nil
}
