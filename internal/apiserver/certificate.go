package apiserver

import (
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
)

// keeper keeps a certificate and says when it is another.
type keeper interface {
	PEM() (certificate, key []byte)
	OnChange(func())
}

// Kept serves the certificate that a keeper keeps.
func Kept(k keeper) dynamiccertificates.CertKeyContentProvider { return kept{k} }

type kept struct{ keeper }

func (kept) Name() string { return "kept" }

func (k kept) CurrentCertKeyContent() (certificate, key []byte) { return k.PEM() }

func (k kept) AddListener(listener dynamiccertificates.Listener) { k.OnChange(listener.Enqueue) }

// Files serves the certificate that lies in two files, and reads them again when
// they change.
func Files(certificate, key string) (dynamiccertificates.CertKeyContentProvider, error) {
	return dynamiccertificates.NewDynamicServingContentFromFiles("files", certificate, key)
}
