package kube

import (
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"podstasis.dev/stasis/test/devcluster/internal/plan"
)

func testCluster(t *testing.T) (plan.Cluster, Authorities) {
	t.Helper()
	dir := t.TempDir()
	c := plan.Cluster{ID: plan.ID(dir), Index: 5, Nodes: 2, Kind: plan.Kind{Kubernetes: true}, Dir: dir}
	a, err := LoadAuthorities(c, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return c, a
}

// TestEveryFileThatACommandLineNamesIsThere finds paths below /etc/kubernetes in flags.
func TestEveryFileThatACommandLineNamesIsThere(t *testing.T) {
	c, a := testCluster(t)
	files, err := ControlPlaneFiles(c, a, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	nodeFiles, err := NodeFiles(c, 1, a, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for place, components := range map[string]struct {
		files map[string]string
		args  [][]string
	}{
		"control plane": {files, nil},
		"node":          {nodeFiles, nil},
	} {
		list := ControlPlane(c)
		if place == "node" {
			list = Node(c, 1)
		}
		for _, component := range list {
			for _, arg := range component.Args[1:] {
				_, value, _ := strings.Cut(arg, "=")
				if strings.HasPrefix(value, configDir+"/") && components.files[value] == "" {
					t.Errorf("%s: %s names a file that is not there", component.Name, arg)
				}
			}
		}
	}
}

func TestAKubeletIsItsNodeAndServesAtItsAddress(t *testing.T) {
	c, a := testCluster(t)
	files, err := NodeFiles(c, 2, a, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode([]byte(files[pkiDir+"/kubelet.crt"]))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if err := cert.VerifyHostname(c.NodeAddress(2).String()); err != nil {
		t.Error(err)
	}
	var user struct {
		Users []struct {
			User struct {
				Cert []byte `json:"client-certificate-data"`
			}
		}
	}
	if err := json.Unmarshal([]byte(files[pkiDir+"/kubelet.conf"]), &user); err != nil {
		t.Fatal(err)
	}
	block, _ = pem.Decode(user.Users[0].User.Cert)
	if cert, err = x509.ParseCertificate(block.Bytes); err != nil {
		t.Fatal(err)
	}
	// The node authorizer and NodeRestriction know a kubelet by these.
	if cert.Subject.CommonName != "system:node:node-2" || len(cert.Subject.Organization) != 1 || cert.Subject.Organization[0] != "system:nodes" {
		t.Errorf("subject %s", cert.Subject)
	}
}

func TestOnlyALimitedMachineChangesTheRuntimeConfiguration(t *testing.T) {
	c, _ := testCluster(t)
	const setting = "restrict_oom_score_adj = true"
	if config := RuntimeFiles(c, 1, false)["/etc/containerd/config.toml"]; strings.Contains(config, setting) {
		t.Error("set without need")
	}
	if config := RuntimeFiles(c, 1, true)["/etc/containerd/config.toml"]; !strings.Contains(config, setting) {
		t.Error("not set where it is needed")
	}
}

func TestNodesHaveGVisorWhereItIsAskedFor(t *testing.T) {
	c, _ := testCluster(t)
	const handler = "runtime_type = 'io.containerd.runsc.v1'"
	if files := RuntimeFiles(c, 1, false); strings.Contains(files["/etc/containerd/config.toml"], handler) || files["/etc/containerd/runsc.toml"] != "" {
		t.Error("they have it without")
	}
	c.GVisor = true
	for _, limited := range []bool{false, true} {
		files := RuntimeFiles(c, 1, limited)
		config := files["/etc/containerd/config.toml"]
		if !strings.Contains(config, handler) || files["/etc/containerd/runsc.toml"] == "" {
			t.Errorf("they have none:\n%s", config)
		}
		if launched := strings.Contains(config, "shim-launch"); launched != limited {
			t.Errorf("on a limited machine (%v) its shim is launched: %v", limited, launched)
		}
	}
}

func TestSystemdMakesTheControlGroupsWhereItIsAskedTo(t *testing.T) {
	c, a := testCluster(t)
	for _, asked := range []bool{false, true} {
		c.SystemdCgroup, c.Crun = asked, true
		driver := map[bool]string{false: "cgroupfs", true: "systemd"}[asked]
		files, err := NodeFiles(c, 1, a, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		var kubelet struct{ CgroupDriver string }
		if err := json.Unmarshal([]byte(files[configDir+"/kubelet.yaml"]), &kubelet); err != nil || kubelet.CgroupDriver != driver {
			t.Errorf("the kubelet's driver is %q, want %q (%v)", kubelet.CgroupDriver, driver, err)
		}
		// The runtime's handlers and the kubelet must agree.
		config := RuntimeFiles(c, 1, false)["/etc/containerd/config.toml"]
		if got := strings.Count(config, fmt.Sprintf("SystemdCgroup = %v\n", asked)); got != 2 {
			t.Errorf("with %s %d of 2 handlers agree:\n%s", driver, got, config)
		}
	}
}

func TestKnownFailuresGetAdvice(t *testing.T) {
	if advice := Explain("listen tcp 10.0.0.1:6443: bind: address already in use"); !strings.Contains(advice, "port") {
		t.Error(advice)
	}
	if advice := Explain("something new"); !strings.Contains(advice, "devcluster logs") {
		t.Error(advice)
	}
}
