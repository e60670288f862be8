package conformance

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	endpoint  = flag.String("endpoint", "", "socket of the server that implements CheckpointPod and RestorePod")
	others    = flag.String("runtime-endpoint", "", "socket of the container runtime, where that is another")
	image     = flag.String("image", "busybox:1", "image with a shell and a sleep that takes fractions of a second")
	pull      = flag.Bool("pull", true, "pull the image where it is not there")
	handler   = flag.String("handler", "", "runtime handler that runs Pods")
	restoring = flag.String("restore-handler", "", "runtime handler that restores them")
	parent    = flag.String("cgroup-parent", "", "where Pods have their cgroups, with a % for a Pod's name; by default the runtime chooses")
	directory = flag.String("directory", "/var/lib/cri-conformance", "directory, which the runtime finds at the same path, for checkpoints and logs")
)

// TestMain refuses to run against nothing. Stasis' own service is tested by test/cri.
func TestMain(m *testing.M) {
	flag.Parse()
	if *endpoint == "" {
		fmt.Fprintln(os.Stderr, "say what is to be tested: go test ./test/cri/conformance -endpoint /run/containerd/containerd.sock (docs/conformance.md)")
		os.Exit(2)
	}
	os.Exit(m.Run())
}

func connect(t *testing.T, to string) *grpc.ClientConn {
	t.Helper()
	if !strings.Contains(to, "://") {
		to = "unix://" + to
	}
	conn, err := grpc.NewClient(to, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestTheServerAtTheEndpointConforms(t *testing.T) {
	conn := connect(t, *endpoint)
	c := Config{Server: runtimeapi.NewRuntimeServiceClient(conn), Image: *image, Handler: *handler, RestoreHandler: *restoring, CgroupParent: *parent, Directory: *directory}
	if *others != "" {
		conn = connect(t, *others)
	}
	c.Runtime = runtimeapi.NewRuntimeServiceClient(conn)
	if *pull {
		c.Images = runtimeapi.NewImageServiceClient(conn)
	}
	Run(t, c)
}
