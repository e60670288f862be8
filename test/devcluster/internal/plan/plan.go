// Package plan decides the names and addresses of one cluster. All of them follow from
// the state directory and one number, so that clusters with different state directories
// share a machine without meeting.
package plan

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// MaxNodes bounds a cluster: addresses of nodes and their Pod ranges are one octet each.
const MaxNodes = 100

// MaxIndex is the number of clusters that one machine can address at the same time.
const MaxIndex = 64

// ControlPlane is the name, on command lines and in the state directory, of the place
// where etcd and the control plane run.
const ControlPlane = "control-plane"

// Versions are those of the programs that a cluster consists of, as Go modules have them.
type Versions struct {
	Kubernetes string `json:"kubernetes"`
	Containerd string `json:"containerd"`
	Runc       string `json:"runc"`
}

// Kind is what a cluster consists of.
type Kind struct {
	// Kubernetes says whether there is more than a container runtime on the nodes.
	Kubernetes bool `json:"kubernetes"`
	// GVisor says whether the nodes have gVisor beside runc.
	GVisor bool `json:"gvisor,omitempty"`
	// Crun says whether the nodes have crun beside runc, and CrunFirst whether it runs what
	// asks for no runtime handler.
	Crun      bool `json:"crun,omitempty"`
	CrunFirst bool `json:"crunFirst,omitempty"`
	// SystemdCgroup says whether the machine's systemd makes the control groups of Pods and
	// containers.
	SystemdCgroup bool `json:"systemdCgroup,omitempty"`
	// Versions are those of the programs.
	Versions Versions `json:"versions"`
}

// Cluster is what there is to know about a cluster before any of it exists.
type Cluster struct {
	// ID is derived from the state directory: six hex digits.
	ID string `json:"id"`
	// Index selects the address ranges.
	Index int `json:"index"`
	// Nodes is the number of nodes, named node-1 upward.
	Nodes int `json:"nodes"`
	Kind
	// RuntimeGroup says that this cluster's container runtimes may have made the control group
	// /k8s.io, where containers go that nobody placed elsewhere.
	RuntimeGroup bool `json:"runtimeGroup"`
	// Dir is the absolute state directory.
	Dir string `json:"-"`
}

// ID returns the identity of the cluster whose state is in dir, an absolute path.
func ID(dir string) string {
	sum := sha256.Sum256([]byte(filepath.Clean(dir)))
	return hex.EncodeToString(sum[:3])
}

// NodeName returns the name of node i, counted from 1.
func NodeName(i int) string { return "node-" + strconv.Itoa(i) }

// NodeNumber is the inverse of NodeName; ok is false for any other name.
func NodeNumber(name string) (i int, ok bool) {
	digits, found := strings.CutPrefix(name, "node-")
	if !found {
		return 0, false
	}
	i, err := strconv.Atoi(digits)
	return i, err == nil && i >= 1 && i <= MaxNodes && NodeName(i) == name
}

// NodeNames returns the names of all nodes in order.
func (c Cluster) NodeNames() []string {
	names := make([]string, c.Nodes)
	for i := range names {
		names[i] = NodeName(i + 1)
	}
	return names
}

// Places returns the control plane's name, if there is one, and those of all nodes.
func (c Cluster) Places() []string {
	if !c.Kubernetes {
		return c.NodeNames()
	}
	return append([]string{ControlPlane}, c.NodeNames()...)
}

// NodeSubnet holds the addresses of the nodes, the control plane and the machine.
func (c Cluster) NodeSubnet() netip.Prefix { return subnet(10, 89, c.Index, 0) }

// APIServer is the control plane's address.
func (c Cluster) APIServer() netip.Addr { return address(10, 89, c.Index, 1) }

// Machine is the address by which the machine itself takes part in the nodes' network.
func (c Cluster) Machine() netip.Addr { return address(10, 89, c.Index, 254) }

// NodeAddress is the address of node i, counted from 1.
func (c Cluster) NodeAddress(i int) netip.Addr { return address(10, 89, c.Index, 10+i) }

// PodSubnet holds the addresses of the Pods of node i, counted from 1.
func (c Cluster) PodSubnet(i int) netip.Prefix { return subnet(10, 128+c.Index, i, 0) }

// PodRange holds the addresses of all Pods.
func (c Cluster) PodRange() netip.Prefix {
	return netip.PrefixFrom(address(10, 128+c.Index, 0, 0), 16)
}

// Services is the range of Service addresses. Clusters may share it: it means something
// only inside the nodes' network namespaces.
func (c Cluster) Services() netip.Prefix { return netip.MustParsePrefix("10.96.0.0/16") }

// KubernetesService is the address of the Service default/kubernetes.
func (c Cluster) KubernetesService() netip.Addr { return netip.MustParseAddr("10.96.0.1") }

// DNSService is the address that Pods ask for names. Nothing answers there (kube-proxy refuses it at once).
func (c Cluster) DNSService() netip.Addr { return netip.MustParseAddr("10.96.0.10") }

// Link is the name of the machine's interface in the nodes' network: the only one that the machine gets.
func (c Cluster) Link() string { return "stasis-" + c.ID }

// Cgroup is the path, below every hierarchy's root, of the group that holds all of the cluster's processes.
func (c Cluster) Cgroup() string { return "/stasis-devcluster-" + c.ID }

// NodeCgroup is the group of one place.
func (c Cluster) NodeCgroup(name string) string { return c.Cgroup() + "/" + name }

// SystemCgroup is the group of a place's own programs, beside those of its Pods.
func (c Cluster) SystemCgroup(name string) string { return c.NodeCgroup(name) + "/system" }

// Slice is the group of the systemd slice that holds all of the cluster's Pods, where systemd
// makes their groups; its name is what a kubelet makes of Cgroup.
func (c Cluster) Slice() string { return "/" + strings.ReplaceAll(c.Cgroup()[1:], "-", "_") + ".slice" }

// NodeSlice is the one of a node's Pods, likewise of NodeCgroup.
func (c Cluster) NodeSlice(name string) string {
	parent := c.Slice()
	return parent + strings.TrimSuffix(parent, ".slice") + "-" + strings.ReplaceAll(name, "-", "_") + ".slice"
}

// RuntimeCgroup is where containerd puts containers that nobody placed elsewhere.
const RuntimeCgroup = "/k8s.io"

// Socket is the name of the abstract socket on which a place's supervisor listens.
func (c Cluster) Socket(name string) string { return "@stasis-devcluster-" + c.ID + "-" + name }

// PIDs is the directory in which a place's supervisor records its processes.
func (c Cluster) PIDs(name string) string { return filepath.Join(c.PlaceDir(name), "pids") }

// Kubeconfig is the path of the administrator's kubeconfig.
func (c Cluster) Kubeconfig() string { return filepath.Join(c.Dir, "kubeconfig") }

// PKI is the directory of keys and certificates.
func (c Cluster) PKI() string { return filepath.Join(c.Dir, "pki") }

// LogFile is where a component's output goes.
func (c Cluster) LogFile(place, component string) string {
	return filepath.Join(c.Dir, "log", place+"-"+component+".log")
}

// PlaceDir holds what belongs to one node or to the control plane.
func (c Cluster) PlaceDir(name string) string { return filepath.Join(c.Dir, "nodes", name) }

// NamespaceDir is where namespaces are kept while no process need be in them.
func (c Cluster) NamespaceDir() string { return filepath.Join(c.Dir, "ns") }

// File is where the cluster is recorded.
func File(dir string) string { return filepath.Join(dir, "cluster.json") }

// ErrNone says that the state directory holds no cluster.
var ErrNone = errors.New("no cluster here")

// Load reads what Save wrote.
func Load(dir string) (Cluster, error) {
	text, err := os.ReadFile(File(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return Cluster{}, fmt.Errorf("%w (%s): run devcluster up first", ErrNone, dir)
	}
	if err != nil {
		return Cluster{}, fmt.Errorf("reading the cluster's description: %w", err)
	}
	var c Cluster
	if err := json.Unmarshal(text, &c); err != nil {
		return Cluster{}, fmt.Errorf("reading the cluster's description %s: %w; run devcluster down", File(dir), err)
	}
	c.Dir = dir
	if c.ID != ID(dir) {
		return Cluster{}, fmt.Errorf("the cluster described in %s was made under another path: move the directory back and run devcluster down", File(dir))
	}
	if c.Index < 0 || c.Index >= MaxIndex || c.Nodes < 1 || c.Nodes > MaxNodes {
		return Cluster{}, fmt.Errorf("the cluster's description %s is damaged (index %d, nodes %d): run devcluster down", File(dir), c.Index, c.Nodes)
	}
	return c, nil
}

// Save records the cluster in its state directory.
func (c Cluster) Save() error {
	text, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the cluster's description: %w", err)
	}
	temp := File(c.Dir) + ".tmp"
	if err := os.WriteFile(temp, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("writing the cluster's description: %w", err)
	}
	if err := os.Rename(temp, File(c.Dir)); err != nil {
		return fmt.Errorf("writing the cluster's description: %w", err)
	}
	return nil
}

func address(a, b, c, d int) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(a), byte(b), byte(c), byte(d)})
}

func subnet(a, b, c, d int) netip.Prefix { return netip.PrefixFrom(address(a, b, c, d), 24) }
