package pki

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestAnAuthorityOutlivesTheProcessAndItsCertificatesVerify(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	first, err := Load(dir, "ca", now)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := first.Issue(Identity{CommonName: "server", Hosts: []string{"localhost"}, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}, now)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Load(dir, "ca", now)
	if err != nil {
		t.Fatal(err)
	}
	if again.CertPEM != first.CertPEM {
		t.Fatal("a second authority was made")
	}
	loaded, err := tls.X509KeyPair([]byte(pair.Cert), []byte(pair.Key))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(loaded.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(again.CertPEM))
	for _, name := range []string{"localhost", "10.0.0.1"} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, DNSName: name, CurrentTime: now}); err != nil {
			t.Errorf("as %s: %v", name, err)
		}
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
		t.Error("a server's certificate is good for a client")
	}
	info, err := os.Stat(filepath.Join(dir, "ca.key"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key's file: %v, %v", info.Mode(), err)
	}
}

func TestAKeyWithoutCertificateIsAnInterruptedStart(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ca.key"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(dir, "ca", time.Now()); err != nil {
		t.Error(err)
	}
}

func TestAKubeconfigHoldsItsCertificates(t *testing.T) {
	var config struct {
		Users []struct {
			User struct {
				Cert []byte `json:"client-certificate-data"`
				Key  []byte `json:"client-key-data"`
			}
		}
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
	}
	if err := json.Unmarshal([]byte(Kubeconfig("https://10.0.0.1:6443", "authority", "me", Pair{"cert", "key"})), &config); err != nil {
		t.Fatal(err)
	}
	if string(config.Users[0].User.Cert) != "cert" || string(config.Users[0].User.Key) != "key" || string(config.Clusters[0].Cluster.CA) != "authority" {
		t.Errorf("%+v", config)
	}
}
