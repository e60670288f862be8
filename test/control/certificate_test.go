package control

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"podstasis.dev/stasis/internal/controlplane"
)

func TestTheCertificateOfCertManagerIsServedAndReadAgainWhenItChanges(t *testing.T) {
	must(t, once())
	ports, err := freePorts(1)
	must(t, err)
	dir := t.TempDir()
	writeCertificate(t, dir, 1)
	ctx, stop := context.WithCancel(t.Context())
	manager, err := controlplane.New(ctx, shared.admin, controlplane.Options{
		Namespace: systemNamespace, WebhookHost: "127.0.0.1", WebhookPort: ports[0], WebhookCertDir: dir,
		MetricsAddress: "0", HealthAddress: "0", Repeatable: true, Registry: prometheus.NewRegistry(), LeaderElection: true, // another replica leads
	}, slog.New(slog.DiscardHandler))
	must(t, err)
	done := make(chan error, 1)
	go func() { done <- manager.Start(ctx) }()
	defer func() {
		stop()
		must(t, <-done)
	}()
	served := func(serial int64) error {
		conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0]), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			return err
		}
		defer conn.Close()
		if got := conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(); got != serial {
			return fmt.Errorf("certificate %d is served, want %d", got, serial)
		}
		return nil
	}
	must(t, eventually(ctx, func() error { return served(1) }))
	writeCertificate(t, dir, 2)
	must(t, eventually(ctx, func() error { return served(2) }))
}

func writeCertificate(t *testing.T, dir string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	for name, block := range map[string]*pem.Block{"tls.crt": {Type: "CERTIFICATE", Bytes: der}, "tls.key": {Type: "PRIVATE KEY", Bytes: keyDER}} {
		// As the kubelet replaces files of a Secret: all at once, by a rename.
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path+".new", pem.EncodeToMemory(block), 0o600))
		must(t, os.Rename(path+".new", path))
	}
}

func TestTheVariantForCertManagerRenders(t *testing.T) {
	bin, err := programs(t.TempDir())
	must(t, err)
	render := func(dir string) string {
		out, err := exec.CommandContext(t.Context(), bin["kubectl"], "kustomize", "../../config/"+dir).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	const policy = "kind: ValidatingAdmissionPolicy\n"
	out, policies := render("with-cert-manager"), strings.Count(render("install"), policy)
	if policies < 10 {
		t.Errorf("config/install has %d policies", policies)
	}
	for text, times := range map[string]int{
		"--webhook-cert-dir=/etc/stasis/webhook":                       1,
		"secretName: stasis-webhook-tls":                               2, // volume and Certificate
		"cert-manager.io/inject-ca-from: stasis-system/stasis-webhook": 3, // both webhook configurations and the APIService
		"--apiserver-inject-ca-from=stasis-system/stasis-webhook":      1,
		"- stasis-apiserver.stasis-system.svc\n":                       1,
		"- stasis-webhook.stasis-system.svc\n":                         1,
		"kind: DaemonSet":                                              1,
		policy:                                                         policies, // as without
	} {
		if got := strings.Count(out, text); got != times {
			t.Errorf("%q occurs %d times, want %d", text, got, times)
		}
	}
}
