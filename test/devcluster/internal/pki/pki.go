// Package pki makes a cluster's keys and certificates.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// lifetime is that of every certificate. Clusters are made to be thrown away.
const lifetime = 5 * 365 * 24 * time.Hour

// Authority signs certificates.
type Authority struct {
	// CertPEM is the authority's own certificate, KeyPEM its key.
	CertPEM, KeyPEM string
	cert            *x509.Certificate
	key             crypto.Signer
}

// Identity is what a certificate states.
type Identity struct {
	CommonName   string
	Organization []string
	// Hosts are the names and addresses of a server; Client says that it may be shown by a client.
	Hosts     []string
	Addresses []netip.Addr
	Client    bool
}

// Pair is a certificate with its key, in PEM.
type Pair struct{ Cert, Key string }

// Load returns the authority kept under the name in dir, and makes it if there is none.
func Load(dir, name string, now time.Time) (*Authority, error) {
	certFile, keyFile := filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	certPEM, err := os.ReadFile(certFile)
	if errors.Is(err, fs.ErrNotExist) {
		return create(dir, name, now)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the certificate authority: %w", err)
	}
	keyPEM, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate authority: %w", err)
	}
	a, err := parse(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate authority %s: %w", certFile, err)
	}
	return a, nil
}

func parse(certPEM, keyPEM []byte) (*Authority, error) {
	certBlock, _ := pem.Decode(certPEM)
	keyBlock, _ := pem.Decode(keyPEM)
	if certBlock == nil || keyBlock == nil {
		return nil, errors.New("not in PEM form")
	}
	cert, err := x509.ParseCertificate(certBlock.Bytes)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParseECPrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, err
	}
	return &Authority{string(certPEM), string(keyPEM), cert, key}, nil
}

func create(dir, name string, now time.Time) (*Authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the authority %s: %w", name, err)
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "devcluster-" + name}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
	}
	certPEM, err := sign(template, template, key.Public(), key, now)
	if err != nil {
		return nil, fmt.Errorf("making the authority %s: %w", name, err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, fmt.Errorf("making the authority %s: %w", name, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("keeping the authority %s: %w", name, err)
	}
	// The key first: Load takes the certificate as the sign that both are there.
	for _, f := range []struct{ name, text string }{{name + ".key", keyPEM}, {name + ".crt", certPEM}} {
		if err := os.WriteFile(filepath.Join(dir, f.name), []byte(f.text), 0o600); err != nil {
			return nil, fmt.Errorf("keeping the authority %s: %w", name, err)
		}
	}
	return parse([]byte(certPEM), []byte(keyPEM))
}

// Issue makes a key and a certificate for the identity.
func (a *Authority) Issue(id Identity, now time.Time) (Pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Pair{}, fmt.Errorf("making the certificate of %s: %w", id.CommonName, err)
	}
	template := &x509.Certificate{
		Subject:  pkix.Name{CommonName: id.CommonName, Organization: id.Organization},
		KeyUsage: x509.KeyUsageDigitalSignature, DNSNames: id.Hosts,
	}
	for _, address := range id.Addresses {
		template.IPAddresses = append(template.IPAddresses, net.IP(address.AsSlice()))
	}
	if len(id.Hosts)+len(id.Addresses) > 0 {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if id.Client {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	cert, err := sign(template, a.cert, key.Public(), a.key, now)
	if err != nil {
		return Pair{}, fmt.Errorf("making the certificate of %s: %w", id.CommonName, err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return Pair{}, fmt.Errorf("making the certificate of %s: %w", id.CommonName, err)
	}
	return Pair{cert, keyPEM}, nil
}

func sign(template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer, now time.Time) (string, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return "", err
	}
	template.SerialNumber = serial
	template.NotBefore, template.NotAfter = now.Add(-time.Hour), now.Add(lifetime)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), nil
}

func encodeKey(key *ecdsa.PrivateKey) (string, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})), nil
}

// ServiceAccountKeys makes the key pair by which service account tokens are signed and checked.
func ServiceAccountKeys() (private, public string, err error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return "", "", fmt.Errorf("making the key of service account tokens: %w", err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", "", fmt.Errorf("making the key of service account tokens: %w", err)
	}
	private = string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	public = string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
	return private, public, nil
}

// Kubeconfig returns a kubeconfig (in JSON, which is YAML too) by which the owner of the
// pair talks to the API server at url.
func Kubeconfig(url, authority, user string, pair Pair) string {
	type object = map[string]any
	config := object{
		"apiVersion": "v1", "kind": "Config", "current-context": "devcluster",
		"clusters": []object{{"name": "devcluster", "cluster": object{"server": url, "certificate-authority-data": []byte(authority)}}},
		"users":    []object{{"name": user, "user": object{"client-certificate-data": []byte(pair.Cert), "client-key-data": []byte(pair.Key)}}},
		"contexts": []object{{"name": "devcluster", "context": object{"cluster": "devcluster", "user": user}}},
	}
	text, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		panic(err) // strings, maps and slices cannot fail to encode
	}
	return string(text) + "\n"
}
