package kube

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"podstasis.dev/stasis/test/devcluster/internal/pki"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
	"podstasis.dev/stasis/test/devcluster/internal/supervise"
)

// ContainerdSocket is where containerd listens, in a node.
const ContainerdSocket = "/run/containerd/containerd.sock"

// Containerd is the container runtime's component on a node.
func Containerd(c plan.Cluster, node string) supervise.Component {
	return component(c, node, "containerd")
}

// Node returns what runs on node i (from 1) beside the container runtime.
func Node(c plan.Cluster, i int) []supervise.Component {
	name := plan.NodeName(i)
	return []supervise.Component{
		component(c, name, "kubelet",
			"--config="+configDir+"/kubelet.yaml", "--kubeconfig="+pkiDir+"/kubelet.conf",
			"--hostname-override="+name, "--node-ip="+c.NodeAddress(i).String(), "-v=2"),
		component(c, name, "kube-proxy", "--config="+configDir+"/kube-proxy.yaml"),
	}
}

// RuntimeFiles are the files of node i's container runtime. limited says that the machine
// withholds CAP_SYS_RESOURCE.
func RuntimeFiles(c plan.Cluster, i int, limited bool) map[string]string {
	files := map[string]string{
		"/etc/containerd/conf.d/README":         "Files *.toml in this directory are read after ../config.toml.\n",
		"/etc/cni/net.d/10-devcluster.conflist": cniConfig(c, i),
		"/etc/crictl.yaml":                      "runtime-endpoint: unix://" + ContainerdSocket + "\nimage-endpoint: unix://" + ContainerdSocket + "\n",
	}
	if c.GVisor {
		files["/etc/containerd/runsc.toml"] = runscConfig
	}
	files["/etc/containerd/config.toml"] = containerdFile(c, limited)
	return files
}

// containerdFile is containerd's configuration. Where the machine withholds
// CAP_SYS_RESOURCE no container may get a lower oom_score_adj than containerd's.
func containerdFile(c plan.Cluster, limited bool) string {
	const restrict = "  restrict_oom_score_adj = true\n"
	if strings.HasPrefix(c.Versions.Containerd, "v1.") {
		if limited {
			return containerd1Config + restrict
		}
		return containerd1Config
	}
	text, launch := fmt.Sprintf(containerdConfig, c.SystemdCgroup), ""
	if limited {
		text += "\n[plugins.'io.containerd.cri.v1.runtime']\n" + restrict
		launch = "  runtime_path = '/usr/local/bin/shim-launch'\n"
	}
	if c.Crun {
		text += fmt.Sprintf(crunHandler, c.SystemdCgroup)
	}
	if c.CrunFirst {
		text += "\n[plugins.'io.containerd.cri.v1.runtime'.containerd]\n  default_runtime_name = 'crun'\n"
	}
	if c.GVisor {
		text += fmt.Sprintf(gvisorHandler, launch)
	}
	return text
}

const crunHandler = `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun]
  runtime_type = 'io.containerd.runc.v2'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crun.options]
  BinaryName = 'crun'
  SystemdCgroup = %v
`

// gvisorHandler is as gVisor's own documentation has it.
const gvisorHandler = `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runsc]
  runtime_type = 'io.containerd.runsc.v1'
%s
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runsc.options]
  TypeUrl = 'io.containerd.runsc.v1.options'
  ConfigPath = '/etc/containerd/runsc.toml'
`

const runscConfig = `[runsc_config]
  platform = "systrap"
  network = "sandbox"
`

const containerdConfig = `version = 3
imports = ['/etc/containerd/conf.d/*.toml']

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'localhost/pause:1'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = %v
`

// containerd1Config is the same for containerd 1, whose own settings for runc do.
const containerd1Config = `version = 2
imports = ['/etc/containerd/conf.d/*.toml']

[plugins.'io.containerd.grpc.v1.cri']
  sandbox_image = 'localhost/pause:1'
`

func cniConfig(c plan.Cluster, i int) string {
	type object = map[string]any
	return encode(object{
		"cniVersion": "1.0.0", "name": "devcluster",
		"plugins": []object{
			{
				"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipMasq": false,
				"ipam": object{
					"type": "host-local", "ranges": [][]object{{{"subnet": c.PodSubnet(i).String()}}},
					"routes": []object{{"dst": "0.0.0.0/0"}},
				},
			},
		},
	})
}

// NodeFiles are the files that the kubelet and kube-proxy of node i read.
func NodeFiles(c plan.Cluster, i int, a Authorities, now time.Time) (map[string]string, error) {
	type object = map[string]any
	name, address := plan.NodeName(i), c.NodeAddress(i)
	user := pki.Identity{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}, Client: true}
	kubelet, err := kubeconfig(c, a, user, now)
	if err != nil {
		return nil, err
	}
	proxy, err := kubeconfig(c, a, pki.Identity{CommonName: "system:kube-proxy", Client: true}, now)
	if err != nil {
		return nil, err
	}
	serving, err := a.Cluster.Issue(pki.Identity{
		CommonName: "system:node:" + name, Organization: []string{"system:nodes"},
		Hosts: []string{name}, Addresses: []netip.Addr{address, netip.MustParseAddr("127.0.0.1")},
	}, now)
	if err != nil {
		return nil, err
	}
	return map[string]string{
		pkiDir + "/ca.crt":          a.Cluster.CertPEM,
		pkiDir + "/kubelet.crt":     serving.Cert,
		pkiDir + "/kubelet.key":     serving.Key,
		pkiDir + "/kubelet.conf":    kubelet,
		pkiDir + "/kube-proxy.conf": proxy,
		configDir + "/kubelet.yaml": encode(object{
			"apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
			"address": address.String(), "port": 10250, "healthzBindAddress": "127.0.0.1",
			"containerRuntimeEndpoint": "unix://" + ContainerdSocket,
			"authentication":           object{"anonymous": object{"enabled": false}, "webhook": object{"enabled": true}, "x509": object{"clientCAFile": pkiDir + "/ca.crt"}},
			"authorization":            object{"mode": "Webhook"},
			"tlsCertFile":              pkiDir + "/kubelet.crt", "tlsPrivateKeyFile": pkiDir + "/kubelet.key",
			"cgroupDriver": cgroupDriver(c), "cgroupRoot": c.NodeCgroup(name), "enforceNodeAllocatable": []string{"pods"},
			"failCgroupV1": false, "failSwapOn": false,
			// kube-proxy uses nftables, and the iptables programs need not be there.
			"makeIPTablesUtilChains": false,
			"resolvConf":             "", "clusterDNS": []string{c.DNSService().String()}, "clusterDomain": "cluster.local",
			"staticPodPath": configDir + "/manifests",
			// The nodes share the machine's disk and memory: pressure there is not theirs to answer.
			"evictionHard":                object{"memory.available": "50Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%"},
			"imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
			"nodeStatusUpdateFrequency": "4s",
			// What is killed here is killed on purpose, and wanted back at once.
			"crashLoopBackOff": object{"maxContainerRestartPeriod": "2s"},
			"featureGates":     kubeletGates(c.Versions.Kubernetes),
		}),
		configDir + "/manifests/.keep": "",
		configDir + "/kube-proxy.yaml": encode(object{
			"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
			"clientConnection": object{"kubeconfig": pkiDir + "/kube-proxy.conf"},
			"hostnameOverride": name, "mode": "nftables", "clusterCIDR": c.PodRange().String(), "detectLocalMode": "ClusterCIDR",
			"bindAddress": address.String(), "healthzBindAddress": "127.0.0.1:10256", "metricsBindAddress": "127.0.0.1:10249",
			// Zero leaves the kernel's connection tracking as it is: part of its settings are the machine's.
			"conntrack": object{"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
		}),
	}, nil
}

// kubeletGates are what a kubelet needs for its configuration that it does not have by itself.
func kubeletGates(kubernetes string) map[string]bool {
	gates := map[string]bool{}
	if strings.HasPrefix(kubernetes, "v1.34.") { // on by itself since 1.35
		gates["KubeletCrashLoopBackOffMax"] = true
	}
	return gates
}

func cgroupDriver(c plan.Cluster) string {
	if c.SystemdCgroup {
		return "systemd"
	}
	return "cgroupfs"
}

// Explain adds to a component's last log lines what their cause usually is, if it is a known one.
func Explain(lines string) string {
	for _, known := range []struct{ sign, advice string }{
		{"address already in use", "another program holds the port: devcluster status shows whether this cluster runs already"},
		{"no space left on device", "the disk is full: free some space"},
		{"nft: executable file not found", "nftables is missing: run hack/deps.sh"},
		{"too many open files", "raise the limits: sysctl fs.inotify.max_user_instances=512 fs.inotify.max_user_watches=524288"},
		{"failed to find plugin", "CNI plugins are missing: run hack/deps.sh"},
	} {
		if strings.Contains(lines, known.sign) {
			return known.advice
		}
	}
	return fmt.Sprintf("see the whole log with %q; start over with %q", "devcluster logs", "devcluster down && devcluster up")
}
