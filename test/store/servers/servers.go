// Package servers runs, for tests, real servers that checkpoints can be kept in: processes
// with TLS and logins, which end with the test.
package servers

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"podstasis.dev/stasis/internal/store/backend/open"
	"podstasis.dev/stasis/internal/store/backend/web"
)

// Identity is a server's certificate, which is its own CA.
type Identity struct {
	cert, key string // files
	CA        []byte
}

// NewIdentity makes the certificate of an IP address.
func NewIdentity(t testing.TB, host string) Identity {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "store"}, IPAddresses: []net.IP{net.ParseIP(host)},
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
	id := Identity{cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem")}
	id.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	for file, data := range map[string][]byte{id.cert: id.CA, id.key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return id
}

// binary is a program that the Makefile put there.
func binary(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs("../../bin/" + name) // of the tests that use this package
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("%v: run: make bin/%s", err, name)
	}
	return path
}

// Server is a process that listens on an address of its own.
type Server struct {
	Address string // HOST:PORT
	Program string
	CA      []byte
	Data    string // the directory where it keeps what it is given

	args, env []string
	cmd       *exec.Cmd
	log       bytes.Buffer
	ended     chan struct{}
}

// serve starts a server and waits until it answers. It ends with the test.
func serve(t testing.TB, s *Server) *Server {
	t.Helper()
	s.Start(t)
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			t.Logf("the server's last words:\n%s", s.log.Bytes()[max(0, s.log.Len()-4000):])
		}
	})
	return s
}

// Start starts a server that was stopped, and waits until it answers.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	s.cmd, s.ended = exec.Command(s.Program, s.args...), make(chan struct{})
	s.cmd.Env = append(os.Environ(), s.env...)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cmd, ended := s.cmd, s.ended
	go func() {
		cmd.Wait()
		close(ended)
	}()
	client, err := web.Client(s.CA)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		resp, err := client.Get("https://" + s.Address + "/v2/")
		if err == nil {
			resp.Body.Close()
			return
		}
		select {
		case <-s.ended:
			t.Fatalf("%s ended:\n%s", s.Program, s.log.String())
		default:
		}
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("%s does not answer: %v", s.Program, err)
		}
	}
}

// Stop ends the process, if it runs.
func (s *Server) Stop() {
	s.cmd.Process.Kill()
	<-s.ended
}

// freeAddress is one that nobody listens at. It is not of the ports that the kernel gives to
// whoever connects: one of those may be taken when the server comes, or comes back.
func freeAddress(t testing.TB, host string) string {
	t.Helper()
	var err error
	for range 100 {
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(20000+mathrand.IntN(10000)))); err == nil {
			defer l.Close()
			return l.Addr().String()
		}
	}
	t.Fatalf("no free port of 20000 to 29999: %v", err)
	return ""
}

// Bucket is the one that the S3 server has.
const Bucket = "checkpoints"

// S3 starts an S3 server that has one bucket, at an IP address of this machine.
func S3(t testing.TB, host string) (*Server, open.Config) {
	t.Helper()
	id, root, address := NewIdentity(t, host), t.TempDir(), freeAddress(t, host)
	if err := os.Mkdir(filepath.Join(root, Bucket), 0o700); err != nil {
		t.Fatal(err)
	}
	s := serve(t, &Server{
		Address: address, Program: binary(t, "versitygw"), CA: id.CA, Data: root,
		args: []string{"--port", address, "--cert", id.cert, "--key", id.key, "--keep-alive", "--quiet", "posix", root},
		env:  []string{"ROOT_ACCESS_KEY=stasis", "ROOT_SECRET_KEY=a secret of sixteen"},
	})
	return s, open.Config{
		Kind: open.S3, Bucket: Bucket, Region: "us-east-1", Endpoint: "https://" + s.Address, PathStyle: true, CA: id.CA,
		Credentials: map[string][]byte{open.KeyAccessKeyID: []byte("stasis\n"), open.KeySecretAccessKey: []byte("a secret of sixteen")},
	}
}

// Username and Password are the login of the registry.
const (
	Username = "stasis"
	Password = "pass:word"
)

// Registry starts Debian's docker-registry, at an IP address of this machine. file is its
// configuration.
func Registry(t testing.TB, host string, deletes bool) (s *Server, c open.Config, file string) {
	t.Helper()
	id, dir, address := NewIdentity(t, host), t.TempDir(), freeAddress(t, host)
	hash, err := bcrypt.GenerateFromPassword([]byte(Password), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	users, file, data := filepath.Join(dir, "htpasswd"), filepath.Join(dir, "config.yml"), filepath.Join(dir, "data")
	if err := os.WriteFile(users, append([]byte(Username+":"), hash...), 0o600); err != nil {
		t.Fatal(err)
	}
	err = os.WriteFile(file, fmt.Appendf(nil, `version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage:
  filesystem: {rootdirectory: %s}
  delete: {enabled: %v}
http:
  addr: %s
  tls: {certificate: %s, key: %s}
auth:
  htpasswd: {realm: checkpoints, path: %s}
`, data, deletes, address, id.cert, id.key, users), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	s = serve(t, &Server{Address: address, Program: binary(t, "docker-registry"), CA: id.CA, Data: data, args: []string{"serve", file}})
	return s, open.Config{
		Kind: open.Registry, Repository: s.Address + "/team/checkpoints", CA: id.CA,
		Credentials: map[string][]byte{open.KeyUsername: []byte(Username), open.KeyPassword: []byte(Password)},
	}, file
}
