// Package kube states how the programs of a cluster are configured and started: command
// lines, configuration files and certificates, as a production cluster has them where
// that can be had on one machine.
package kube

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path"
	"time"

	"podstasis.dev/stasis/test/devcluster/internal/pki"
	"podstasis.dev/stasis/test/devcluster/internal/plan"
	"podstasis.dev/stasis/test/devcluster/internal/supervise"
)

const (
	programDir = "/usr/local/bin"
	configDir  = "/etc/kubernetes"
	pkiDir     = configDir + "/pki"
)

// Authorities sign a cluster's certificates.
type Authorities struct {
	// Cluster signs all but what Front signs: the API server's client certificate for aggregated APIs.
	Cluster, Front *pki.Authority
}

// LoadAuthorities reads the cluster's authorities, or makes them.
func LoadAuthorities(c plan.Cluster, now time.Time) (Authorities, error) {
	cluster, err := pki.Load(c.PKI(), "ca", now)
	if err != nil {
		return Authorities{}, err
	}
	front, err := pki.Load(c.PKI(), "front-proxy-ca", now)
	if err != nil {
		return Authorities{}, err
	}
	return Authorities{cluster, front}, nil
}

// URL is the API server's.
func URL(c plan.Cluster) string { return "https://" + c.APIServer().String() + ":6443" }

// AdminKubeconfig makes a kubeconfig of an administrator.
func AdminKubeconfig(c plan.Cluster, a Authorities, now time.Time) (string, error) {
	pair, err := a.Cluster.Issue(pki.Identity{CommonName: "devcluster-admin", Organization: []string{"system:masters"}, Client: true}, now)
	if err != nil {
		return "", err
	}
	return pki.Kubeconfig(URL(c), a.Cluster.CertPEM, "devcluster-admin", pair), nil
}

// ControlPlaneFiles are the files that the control plane's programs read.
func ControlPlaneFiles(c plan.Cluster, a Authorities, now time.Time) (map[string]string, error) {
	files := map[string]string{
		pkiDir + "/ca.crt":             a.Cluster.CertPEM,
		pkiDir + "/ca.key":             a.Cluster.KeyPEM,
		pkiDir + "/front-proxy-ca.crt": a.Front.CertPEM,
		configDir + "/audit.yaml":      auditPolicy,
	}
	var err error
	if files[pkiDir+"/sa.key"], files[pkiDir+"/sa.pub"], err = pki.ServiceAccountKeys(); err != nil {
		return nil, err
	}
	loopback := netip.MustParseAddr("127.0.0.1")
	for name, want := range map[string]struct {
		authority *pki.Authority
		identity  pki.Identity
	}{
		"apiserver": {a.Cluster, pki.Identity{
			CommonName: "kube-apiserver",
			Hosts:      []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost"},
			Addresses:  []netip.Addr{c.APIServer(), c.KubernetesService(), loopback},
		}},
		"apiserver-kubelet-client": {a.Cluster, pki.Identity{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}, Client: true}},
		"front-proxy-client":       {a.Front, pki.Identity{CommonName: "front-proxy-client", Client: true}},
	} {
		pair, err := want.authority.Issue(want.identity, now)
		if err != nil {
			return nil, err
		}
		files[pkiDir+"/"+name+".crt"], files[pkiDir+"/"+name+".key"] = pair.Cert, pair.Key
	}
	// exec control-plane -- kubectl works.
	if files["/root/.kube/config"], err = AdminKubeconfig(c, a, now); err != nil {
		return nil, err
	}
	for name, user := range map[string]string{"controller-manager": "system:kube-controller-manager", "scheduler": "system:kube-scheduler"} {
		if files[path.Join(pkiDir, name+".conf")], err = kubeconfig(c, a, pki.Identity{CommonName: user, Client: true}, now); err != nil {
			return nil, err
		}
	}
	return files, nil
}

func kubeconfig(c plan.Cluster, a Authorities, id pki.Identity, now time.Time) (string, error) {
	pair, err := a.Cluster.Issue(id, now)
	if err != nil {
		return "", err
	}
	return pki.Kubeconfig(URL(c), a.Cluster.CertPEM, id.CommonName, pair), nil
}

// auditPolicy records who asked for what, without bodies (which hold secrets), and leaves
// out the reads that make up most of the traffic.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  verbs: [get, list, watch]
- level: None
  resources: [{group: coordination.k8s.io, resources: [leases]}, {group: "", resources: [events]}, {group: events.k8s.io, resources: [events]}]
- level: Metadata
`

// ControlPlane returns the control plane's components in the order of their start.
func ControlPlane(c plan.Cluster) []supervise.Component {
	const etcd = "http://127.0.0.1:2379"
	const peer = "http://127.0.0.1:2380"
	return []supervise.Component{
		component(c, plan.ControlPlane, "etcd",
			"--name=devcluster", "--data-dir=/var/lib/etcd",
			"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd,
			"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=devcluster="+peer,
			// The data is thrown away with the cluster: waiting for the disk is not worth its time.
			"--unsafe-no-fsync", "--log-level=warn"),
		component(c, plan.ControlPlane, "kube-apiserver",
			"--etcd-servers="+etcd,
			"--bind-address=0.0.0.0", "--advertise-address="+c.APIServer().String(), "--secure-port=6443",
			"--tls-cert-file="+pkiDir+"/apiserver.crt", "--tls-private-key-file="+pkiDir+"/apiserver.key",
			"--client-ca-file="+pkiDir+"/ca.crt",
			"--kubelet-client-certificate="+pkiDir+"/apiserver-kubelet-client.crt", "--kubelet-client-key="+pkiDir+"/apiserver-kubelet-client.key",
			"--kubelet-certificate-authority="+pkiDir+"/ca.crt", "--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file="+pkiDir+"/sa.pub", "--service-account-signing-key-file="+pkiDir+"/sa.key",
			"--service-cluster-ip-range="+c.Services().String(),
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			"--proxy-client-cert-file="+pkiDir+"/front-proxy-client.crt", "--proxy-client-key-file="+pkiDir+"/front-proxy-client.key",
			"--requestheader-client-ca-file="+pkiDir+"/front-proxy-ca.crt", "--requestheader-allowed-names=front-proxy-client",
			"--requestheader-username-headers=X-Remote-User", "--requestheader-uid-headers=X-Remote-Uid",
			"--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
			// No kube-proxy runs beside the API server: it calls webhooks and aggregated APIs at their endpoints.
			"--enable-aggregator-routing=true",
			"--audit-policy-file="+configDir+"/audit.yaml", "--audit-log-path=/var/log/kubernetes/audit.log", "--audit-log-maxsize=50", "--audit-log-maxbackup=1",
			"--profiling=false"),
		component(c, plan.ControlPlane, "kube-controller-manager",
			"--kubeconfig="+pkiDir+"/controller-manager.conf",
			"--authentication-kubeconfig="+pkiDir+"/controller-manager.conf", "--authorization-kubeconfig="+pkiDir+"/controller-manager.conf",
			"--bind-address=127.0.0.1", "--leader-elect=false", "--use-service-account-credentials=true",
			"--root-ca-file="+pkiDir+"/ca.crt", "--service-account-private-key-file="+pkiDir+"/sa.key",
			"--cluster-signing-cert-file="+pkiDir+"/ca.crt", "--cluster-signing-key-file="+pkiDir+"/ca.key",
			// It makes some 50 service accounts before the controllers start: 5 seconds at its default rate.
			"--kube-api-qps=200", "--kube-api-burst=400",
			"--allocate-node-cidrs=false", "--profiling=false"),
		component(c, plan.ControlPlane, "kube-scheduler",
			"--kubeconfig="+pkiDir+"/scheduler.conf",
			"--authentication-kubeconfig="+pkiDir+"/scheduler.conf", "--authorization-kubeconfig="+pkiDir+"/scheduler.conf",
			"--bind-address=127.0.0.1", "--leader-elect=false", "--profiling=false"),
	}
}

func component(c plan.Cluster, place, name string, args ...string) supervise.Component {
	return supervise.Component{
		Name: name,
		Args: append([]string{path.Join(programDir, name)}, args...),
		Env:  Environment,
		Log:  c.LogFile(place, name),
	}
}

// Environment is that of every program on a place.
var Environment = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/root", "LANG=C.UTF-8",
}

func encode(object map[string]any) string {
	text, err := json.MarshalIndent(object, "", "  ")
	if err != nil {
		panic(fmt.Sprintf("encoding a constant configuration: %v", err))
	}
	return string(text) + "\n"
}
