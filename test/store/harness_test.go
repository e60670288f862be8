// Package store tests where checkpoints are kept against the real thing: an S3 server
// and an OCI registry, each a process of its own.
package store

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/open"
	"podstasis.dev/stasis/internal/store/backend/web"
)

// identity is a server's certificate, which is its own CA.
type identity struct {
	cert, key string // files
	ca        []byte
}

func newIdentity(t *testing.T) identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "store"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	id := identity{cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem")}
	id.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	for file, data := range map[string][]byte{id.cert: id.ca, id.key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return id
}

// binary is a program that the Makefile put there.
func binary(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("../../bin/" + name)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("%v: run: make bin/%s", err, name)
	}
	return path
}

// server is a process that listens on an address of its own.
type server struct {
	address string
	cmd     *exec.Cmd
	log     bytes.Buffer
	ended   chan struct{}
}

// serve starts a server and waits until it answers. It ends with the test.
func serve(t *testing.T, id identity, command func(address string) *exec.Cmd) *server {
	t.Helper()
	s := &server{address: freeAddress(t)}
	s.start(t, id, command(s.address))
	t.Cleanup(func() {
		s.stop()
		if t.Failed() {
			t.Logf("the server's last words:\n%s", s.log.Bytes()[max(0, s.log.Len()-4000):])
		}
	})
	return s
}

func (s *server) start(t *testing.T, id identity, cmd *exec.Cmd) {
	t.Helper()
	s.cmd, s.ended = cmd, make(chan struct{})
	cmd.Stdout, cmd.Stderr = &s.log, &s.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(s.ended)
	}()
	client, err := web.Client(id.ca)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		resp, err := client.Get("https://" + s.address + "/v2/")
		if err == nil {
			resp.Body.Close()
			return
		}
		select {
		case <-s.ended:
			t.Fatalf("%s ended:\n%s", cmd.Path, s.log.String())
		default:
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("%s does not answer: %v", cmd.Path, err)
		}
	}
}

func (s *server) stop() {
	s.cmd.Process.Kill()
	<-s.ended
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func openStore(t *testing.T, c open.Config) backend.Backend {
	t.Helper()
	b, err := open.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// retrying is how stores are used: what a server does while it is busy is tried again.
func retrying(b backend.Backend) backend.Backend {
	return backend.Retrying(b, backend.Policy{First: 20 * time.Millisecond, Total: 30 * time.Second})
}

// everyCall returns what each call of a backend fails with.
func everyCall(ctx context.Context, b backend.Backend) map[string]error {
	var listErr error
	for _, listErr = range b.List(ctx, "") {
	}
	_, readErr := b.Read(ctx, "packs/a", 0, -1)
	_, tailErr := b.Read(ctx, "packs/a", -5, -1)
	return map[string]error{
		"put": b.Put(ctx, "packs/a", []byte("x"), nil), "read": readErr, "read the tail": tailErr, "list": listErr, "delete": b.Delete(ctx, "packs/a"),
	}
}

// cutter lets a connection's bytes through, until so many have come from the client;
// then it breaks off that connection, once.
type cutter struct {
	net.Listener
	to    string
	after atomic.Int64
	cuts  atomic.Int64
}

func cut(t *testing.T, to string) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{Listener: l, to: to}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go c.pass(client)
		}
	}()
	return c
}

func (c *cutter) pass(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", c.to)
	if err != nil {
		return
	}
	defer server.Close()
	go func() {
		defer client.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := server.Read(buf)
			if n > 0 {
				if _, err := client.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 32<<10)
	for passed := int64(0); ; {
		n, err := client.Read(buf)
		if n > 0 {
			passed += int64(n)
			if after := c.after.Load(); after > 0 && passed > after && c.after.CompareAndSwap(after, 0) {
				c.cuts.Add(1)
				return
			}
			if _, err := server.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
