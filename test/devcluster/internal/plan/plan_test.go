package plan

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
)

func TestNamesFitWhereTheKernelPutsThem(t *testing.T) {
	c := Cluster{ID: ID("/some/where"), Nodes: MaxNodes}
	if len(c.Link()) > 15 {
		t.Errorf("interface name %q is longer than the kernel's 15 bytes", c.Link())
	}
	for _, name := range append(c.NodeNames(), ControlPlane) {
		if len(c.Socket(name)) > 107 {
			t.Errorf("socket name %q is too long", c.Socket(name))
		}
	}
}

func TestAddressesOfDifferentClustersAndNodesNeverOverlap(t *testing.T) {
	var ranges []netip.Prefix
	for index := range MaxIndex {
		c := Cluster{Index: index, Nodes: MaxNodes}
		ranges = append(ranges, c.NodeSubnet(), c.PodRange())
		seen := map[netip.Addr]bool{c.APIServer(): true, c.Machine(): true}
		for i := 1; i <= MaxNodes; i++ {
			if a := c.NodeAddress(i); seen[a] || !c.NodeSubnet().Contains(a) {
				t.Fatalf("cluster %d: address %s of node %d is taken or outside %s", index, a, i, c.NodeSubnet())
			}
			seen[c.NodeAddress(i)] = true
			if p := c.PodSubnet(i); !c.PodRange().Overlaps(p) || p.Addr() == c.PodSubnet(i-1).Addr() {
				t.Fatalf("cluster %d: Pods of node %d in %s", index, i, p)
			}
		}
	}
	for i, a := range ranges {
		if a.Overlaps((Cluster{}).Services()) {
			t.Errorf("%s overlaps the Services", a)
		}
		for _, b := range ranges[i+1:] {
			if a.Overlaps(b) {
				t.Errorf("%s overlaps %s", a, b)
			}
		}
	}
}

func TestOnlyNamesOfNodesHaveANumber(t *testing.T) {
	for _, name := range []string{"node-0", "node-01", "node-101", "node--1", "node-", "node-1x", "control-plane", ""} {
		if i, ok := NodeNumber(name); ok {
			t.Errorf("%q is taken for node %d", name, i)
		}
	}
	if i, ok := NodeNumber(NodeName(7)); !ok || i != 7 {
		t.Errorf("node 7 is taken for %d, %v", i, ok)
	}
}

func TestASavedClusterIsLoadedAsItWas(t *testing.T) {
	dir := t.TempDir()
	want := Cluster{ID: ID(dir), Index: 3, Nodes: 2, Kind: Kind{Kubernetes: true}, RuntimeGroup: true, Dir: dir}
	if err := want.Save(); err != nil {
		t.Fatal(err)
	}
	got, err := Load(dir)
	if err != nil || got != want {
		t.Errorf("loaded %+v, %v; want %+v", got, err, want)
	}
}

func TestADamagedDescriptionIsRefusedWithAdvice(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(dir); !errors.Is(err, ErrNone) {
		t.Errorf("no description: %v", err)
	}
	for _, text := range []string{"", "{", `{"id":"000000","nodes":1}`, `{"id":"` + ID(dir) + `","nodes":0}`, `{"id":"` + ID(dir) + `","nodes":1,"index":64}`} {
		if err := os.WriteFile(File(dir), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		_, err := Load(dir)
		if err == nil || errors.Is(err, ErrNone) || !strings.Contains(err.Error(), "devcluster down") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestSlicesAreNamedAsAKubeletNamesThem(t *testing.T) {
	c := Cluster{ID: "abcdef"}
	if got, want := c.NodeSlice("node-2"), "/stasis_devcluster_abcdef.slice/stasis_devcluster_abcdef-node_2.slice"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
