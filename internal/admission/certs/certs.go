// Package certs makes, keeps and rotates the certificate of the webhook server,
// for clusters without cert-manager.
//
// The certificate lies in a Secret that all replicas share. Each replica reads it
// again and again, and serves it only after the webhook configurations trust its
// authority. They trust the previous one too, so that replicas may lag behind
// each other: no call fails while a certificate is replaced.
//
// Every certificate has an authority of its own, whose key is forgotten as soon
// as the certificate is signed: a stolen Secret lets nobody sign anything else.
package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/retry"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

const (
	// Lifetime of a certificate and of its authority.
	Lifetime = 90 * 24 * time.Hour
	// renewBefore is how long before its end a certificate is replaced.
	renewBefore = 30 * 24 * time.Hour
	// period is how often the Secret and the configurations are looked at.
	period = 15 * time.Second

	keyAuthorities = "ca.crt"
)

// Config says what to serve and who is to trust it.
type Config struct {
	// Client reads and writes past any cache.
	Client client.Client
	// Secret holds the certificate.
	Secret types.NamespacedName
	// Hosts are the names, or addresses, that the server is called by.
	Hosts []string
	// Mutating and Validating name the webhook configurations that call it.
	Mutating, Validating []string
	// Trust, if set, has others trust the authorities before what they signed is
	// served.
	Trust func(ctx context.Context, authorities []byte) error
	Clock clock.WithTicker
	Log   *slog.Logger
}

// Keeper keeps the certificate of one replica.
type Keeper struct {
	Config
	serving atomic.Pointer[tls.Certificate]

	mu        sync.Mutex
	pem       [2][]byte // certificate and key that are served
	onChanges []func()
}

// New returns a Keeper that serves nothing until it is started.
func New(c Config) *Keeper { return &Keeper{Config: c} }

// GetCertificate is for tls.Config: it gives each connection the certificate of
// that moment.
func (k *Keeper) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c := k.serving.Load(); c != nil {
		return c, nil
	}
	return nil, errors.New("the webhook certificate is not there yet")
}

// PEM returns the certificate that is served, and its key; none before there is
// one.
func (k *Keeper) PEM() (certificate, key []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.pem[0], k.pem[1]
}

// OnChange has a function called whenever another certificate is served.
func (k *Keeper) OnChange(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.onChanges = append(k.onChanges, f)
}

// serve serves another certificate from now on.
func (k *Keeper) serve(pair *tls.Certificate, certificate, key []byte) {
	k.serving.Store(pair)
	k.mu.Lock()
	k.pem = [2][]byte{certificate, key}
	tell := slices.Clone(k.onChanges)
	k.mu.Unlock()
	for _, f := range tell {
		f()
	}
}

// Ready is a readiness check: no replica is called before it can answer.
func (k *Keeper) Ready(*http.Request) error {
	_, err := k.GetCertificate(nil)
	return err
}

// NeedLeaderElection says that every replica keeps its certificate.
func (k *Keeper) NeedLeaderElection() bool { return false }

// Start looks after the certificate until the context ends.
func (k *Keeper) Start(ctx context.Context) error {
	ticker := k.Clock.NewTicker(period)
	defer ticker.Stop()
	for {
		if err := k.Sync(ctx); err != nil && ctx.Err() == nil {
			k.Log.ErrorContext(ctx, "webhook certificate not brought up to date; trying again", "every", period, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C():
		}
	}
}

// Sync makes or replaces the certificate where that is due, has it trusted, and
// then serves it.
func (k *Keeper) Sync(ctx context.Context) error {
	secret, err := k.current(ctx)
	if err != nil {
		return err
	}
	pair, err := tls.X509KeyPair(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return fmt.Errorf("use the certificate of Secret %s: %w", k.Secret, err)
	}
	if err := k.trust(ctx, secret.Data[keyAuthorities]); err != nil {
		return err
	}
	if k.Trust != nil {
		if err := k.Trust(ctx, secret.Data[keyAuthorities]); err != nil {
			return err
		}
	}
	if old := k.serving.Load(); old == nil || !bytes.Equal(old.Certificate[0], pair.Certificate[0]) {
		k.serve(&pair, secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey])
		k.Log.InfoContext(ctx, "serving a webhook certificate", "secret", k.Secret.String(), "until", pair.Leaf.NotAfter)
	}
	return nil
}

// current returns the Secret with a certificate that is good for a while. Of
// several replicas that find one to be due, one writes and the others take what
// it wrote.
func (k *Keeper) current(ctx context.Context) (*corev1.Secret, error) {
	for {
		var secret corev1.Secret
		err := k.Client.Get(ctx, k.Secret, &secret)
		missing := apierrors.IsNotFound(err)
		if err != nil && !missing {
			return nil, fmt.Errorf("read Secret %s: %w", k.Secret, err)
		}
		why := k.due(&secret)
		if why == "" {
			return &secret, nil
		}
		k.Log.InfoContext(ctx, "making a webhook certificate", "secret", k.Secret.String(), "why", why)
		issued, err := issue(k.Hosts, k.Clock.Now())
		if err != nil {
			return nil, fmt.Errorf("make a webhook certificate: %w", err)
		}
		secret.Data = map[string][]byte{
			corev1.TLSCertKey:       issued.certificate,
			corev1.TLSPrivateKeyKey: issued.key,
			keyAuthorities:          slices.Concat(issued.authority, k.stillValid(secret.Data[keyAuthorities])),
		}
		if missing {
			secret.ObjectMeta = metav1.ObjectMeta{Namespace: k.Secret.Namespace, Name: k.Secret.Name,
				Labels: map[string]string{"app.kubernetes.io/name": "stasis", "app.kubernetes.io/component": "controller"}}
			secret.Type = corev1.SecretTypeTLS
			err = k.Client.Create(ctx, &secret)
		} else {
			err = k.Client.Update(ctx, &secret)
		}
		switch {
		case err == nil:
			return &secret, nil
		case apierrors.IsAlreadyExists(err) || apierrors.IsConflict(err) || apierrors.IsNotFound(err):
			// Another replica was faster: read again.
		default:
			return nil, fmt.Errorf("write Secret %s: %w", k.Secret, err)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}

// due says why a certificate has to be made; empty if the Secret's is good.
func (k *Keeper) due(secret *corev1.Secret) string {
	if len(secret.Data[corev1.TLSCertKey]) == 0 {
		return "there is none"
	}
	pair, err := tls.X509KeyPair(secret.Data[corev1.TLSCertKey], secret.Data[corev1.TLSPrivateKeyKey])
	if err != nil {
		return "it cannot be read: " + err.Error()
	}
	now := k.Clock.Now()
	if !now.Before(pair.Leaf.NotAfter.Add(-renewBefore)) {
		return "it ends at " + pair.Leaf.NotAfter.Format(time.RFC3339)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(secret.Data[keyAuthorities])
	for _, host := range k.Hosts {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: host, Roots: roots, CurrentTime: now}); err != nil {
			return "it is not good for " + host + ": " + err.Error()
		}
	}
	return ""
}

// stillValid returns the newest of the authorities in bundle, if its time has not
// run out: the one that replicas may be serving a certificate of.
func (k *Keeper) stillValid(bundle []byte) []byte {
	block, _ := pem.Decode(bundle)
	if block == nil {
		return nil
	}
	authority, err := x509.ParseCertificate(block.Bytes)
	if err != nil || k.Clock.Now().After(authority.NotAfter) {
		return nil
	}
	return pem.EncodeToMemory(block)
}

// trust writes the authorities into the webhook configurations.
func (k *Keeper) trust(ctx context.Context, authorities []byte) error {
	for _, name := range k.Mutating {
		var c admissionregistrationv1.MutatingWebhookConfiguration
		err := k.inject(ctx, &c, name, authorities, func() (configs []*admissionregistrationv1.WebhookClientConfig) {
			for i := range c.Webhooks {
				configs = append(configs, &c.Webhooks[i].ClientConfig)
			}
			return configs
		})
		if err != nil {
			return err
		}
	}
	for _, name := range k.Validating {
		var c admissionregistrationv1.ValidatingWebhookConfiguration
		err := k.inject(ctx, &c, name, authorities, func() (configs []*admissionregistrationv1.WebhookClientConfig) {
			for i := range c.Webhooks {
				configs = append(configs, &c.Webhooks[i].ClientConfig)
			}
			return configs
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (k *Keeper) inject(ctx context.Context, object client.Object, name string, authorities []byte, configs func() []*admissionregistrationv1.WebhookClientConfig) error {
	// Replicas that start together write together.
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		if err := k.Client.Get(ctx, client.ObjectKey{Name: name}, object); err != nil {
			return fmt.Errorf("read webhook configuration %s: %w", name, err)
		}
		changed := false
		for _, c := range configs() {
			if !bytes.Equal(c.CABundle, authorities) {
				c.CABundle = authorities
				changed = true
			}
		}
		if !changed {
			return nil
		}
		if err := k.Client.Update(ctx, object); err != nil {
			return fmt.Errorf("have webhook configuration %s trust the certificate: %w", name, err)
		}
		return nil
	})
}
