package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	clocktesting "k8s.io/utils/clock/testing"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

const host = "stasis-webhook.stasis-system.svc"

var secretName = types.NamespacedName{Namespace: "stasis-system", Name: "cert"}

type fixture struct {
	client client.WithWatch
	clock  *clocktesting.FakeClock
}

func newFixture() *fixture {
	webhook := func(name string) *admissionregistrationv1.MutatingWebhookConfiguration {
		return &admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name},
			Webhooks: []admissionregistrationv1.MutatingWebhook{{Name: "a.x.y"}, {Name: "b.x.y"}}}
	}
	validating := &admissionregistrationv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "stasis"},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{Name: "c.x.y"}}}
	return &fixture{
		client: fake.NewClientBuilder().WithScheme(clientgoscheme.Scheme).WithObjects(webhook("stasis"), webhook("other"), validating).Build(),
		clock:  clocktesting.NewFakeClock(time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC)),
	}
}

func (f *fixture) keeper() *Keeper { return f.keeperWith(f.client) }

func (f *fixture) keeperWith(c client.Client) *Keeper {
	return New(Config{Client: c, Secret: secretName, Hosts: []string{host}, Mutating: []string{"stasis"}, Validating: []string{"stasis"},
		Clock: f.clock, Log: slog.New(slog.DiscardHandler)})
}

// bundle is what the API server trusts.
func (f *fixture) bundle(t *testing.T) []byte {
	t.Helper()
	var m admissionregistrationv1.MutatingWebhookConfiguration
	if err := f.client.Get(t.Context(), client.ObjectKey{Name: "stasis"}, &m); err != nil {
		t.Fatal(err)
	}
	return m.Webhooks[0].ClientConfig.CABundle
}

// call connects to a keeper's server as the API server does.
func (f *fixture) call(t *testing.T, k *Keeper, bundle []byte) error {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	go tls.Server(far, &tls.Config{GetCertificate: k.GetCertificate}).HandshakeContext(context.Background())
	return tls.Client(near, &tls.Config{RootCAs: roots, ServerName: host, Time: f.clock.Now}).HandshakeContext(t.Context())
}

func keep(t *testing.T, k *Keeper) {
	t.Helper()
	if err := k.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestTheFirstReplicaMakesACertificateThatTheAPIServerTrusts(t *testing.T) {
	f := newFixture()
	k := f.keeper()
	if k.Ready(nil) == nil {
		t.Error("ready before there is a certificate")
	}
	keep(t, k)
	if err := k.Ready(nil); err != nil {
		t.Error(err)
	}
	if err := f.call(t, k, f.bundle(t)); err != nil {
		t.Error(err)
	}
	var m admissionregistrationv1.MutatingWebhookConfiguration
	var v admissionregistrationv1.ValidatingWebhookConfiguration
	for _, o := range []client.Object{&m, &v} {
		if err := f.client.Get(t.Context(), client.ObjectKey{Name: "stasis"}, o); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(m.Webhooks[1].ClientConfig.CABundle, f.bundle(t)) || !bytes.Equal(v.Webhooks[0].ClientConfig.CABundle, f.bundle(t)) {
		t.Error("not every webhook of ours trusts the certificate")
	}
	var other admissionregistrationv1.MutatingWebhookConfiguration
	if err := f.client.Get(t.Context(), client.ObjectKey{Name: "other"}, &other); err != nil {
		t.Fatal(err)
	}
	if other.Webhooks[0].ClientConfig.CABundle != nil {
		t.Error("another's webhook was changed")
	}
}

func TestACertificateThatIsGoodIsKept(t *testing.T) {
	f := newFixture()
	k := f.keeper()
	keep(t, k)
	before, bundle := k.serving.Load(), f.bundle(t)
	f.clock.Step(Lifetime - renewBefore - time.Minute)
	keep(t, k)
	if k.serving.Load() != before || !bytes.Equal(f.bundle(t), bundle) {
		t.Error("it was replaced")
	}
}

func TestACertificateIsReplacedInTimeAndNoReplicaFailsMeanwhile(t *testing.T) {
	f := newFixture()
	first, second := f.keeper(), f.keeper()
	keep(t, first)
	keep(t, second)
	f.clock.Step(Lifetime - renewBefore)
	keep(t, first)
	// The second has not looked yet and serves the old certificate.
	if bytes.Equal(first.serving.Load().Certificate[0], second.serving.Load().Certificate[0]) {
		t.Fatal("the certificate was not replaced")
	}
	for name, k := range map[string]*Keeper{"the replica that replaced it": first, "the one that lags": second} {
		if err := f.call(t, k, f.bundle(t)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	keep(t, second)
	if !bytes.Equal(first.serving.Load().Certificate[0], second.serving.Load().Certificate[0]) {
		t.Error("the replicas serve different certificates")
	}
	// It goes on for years, and the authorities do not pile up.
	for range 12 {
		f.clock.Step(Lifetime - renewBefore)
		keep(t, second)
		keep(t, first)
		if err := f.call(t, first, f.bundle(t)); err != nil {
			t.Fatal(err)
		}
	}
	if n := bytes.Count(f.bundle(t), []byte("BEGIN CERTIFICATE")); n > 2 {
		t.Errorf("%d authorities are trusted", n)
	}
}

func TestReplicasThatStartTogetherServeTheSameCertificate(t *testing.T) {
	f := newFixture()
	second := f.keeper()
	// The second creates the Secret between the first's look and its own write.
	raced := false
	first := f.keeperWith(interceptor.NewClient(f.client, interceptor.Funcs{
		Create: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			if !raced {
				raced = true
				keep(t, second)
			}
			return c.Create(ctx, o, opts...)
		},
	}))
	keep(t, first)
	if !raced || !bytes.Equal(first.serving.Load().Certificate[0], second.serving.Load().Certificate[0]) {
		t.Error("they serve different certificates")
	}
}

func TestANewCertificateIsNotServedBeforeItIsTrusted(t *testing.T) {
	f := newFixture()
	k := f.keeper()
	keep(t, k)
	before, bundle := k.serving.Load(), f.bundle(t)
	f.clock.Step(Lifetime - renewBefore)
	k.Client = interceptor.NewClient(f.client, interceptor.Funcs{
		Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
			if _, webhook := o.(*admissionregistrationv1.ValidatingWebhookConfiguration); webhook {
				return errors.New("out of order")
			}
			return c.Update(ctx, o, opts...)
		},
	})
	if err := k.Sync(t.Context()); err == nil {
		t.Fatal("the failure was swallowed")
	}
	if k.serving.Load() != before {
		t.Error("a certificate is served that not every webhook trusts")
	}
	if err := f.call(t, k, bundle); err != nil {
		t.Error(err)
	}
	k.Client = f.client
	keep(t, k)
	if k.serving.Load() == before {
		t.Error("it does not recover")
	}
}

func TestASecretThatIsNoGoodIsReplaced(t *testing.T) {
	spoil := map[string]func(*corev1.Secret){
		"no certificate":        func(s *corev1.Secret) { s.Data = nil },
		"a damaged certificate": func(s *corev1.Secret) { s.Data["tls.crt"] = []byte("x") },
		"another key":           func(s *corev1.Secret) { o, _ := issue([]string{host}, time.Now()); s.Data["tls.key"] = o.key },
		"another authority":     func(s *corev1.Secret) { o, _ := issue([]string{host}, time.Now()); s.Data["ca.crt"] = o.authority },
		"a certificate of others": func(s *corev1.Secret) {
			o, _ := issue([]string{"x"}, time.Now())
			s.Data["tls.crt"], s.Data["tls.key"], s.Data["ca.crt"] = o.certificate, o.key, o.authority
		},
		"nothing at all": nil,
	}
	for name, change := range spoil {
		t.Run(name, func(t *testing.T) {
			f := newFixture()
			k := f.keeper()
			keep(t, k)
			var secret corev1.Secret
			if err := f.client.Get(t.Context(), secretName, &secret); err != nil {
				t.Fatal(err)
			}
			var err error
			if change == nil {
				err = f.client.Delete(t.Context(), &secret)
			} else {
				change(&secret)
				err = f.client.Update(t.Context(), &secret)
			}
			if err != nil {
				t.Fatal(err)
			}
			keep(t, k)
			if err := f.call(t, k, f.bundle(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestABundleThatSomebodyRemovedIsPutBack(t *testing.T) {
	f := newFixture()
	k := f.keeper()
	keep(t, k)
	var m admissionregistrationv1.MutatingWebhookConfiguration
	if err := f.client.Get(t.Context(), client.ObjectKey{Name: "stasis"}, &m); err != nil {
		t.Fatal(err)
	}
	m.Webhooks[0].ClientConfig.CABundle = nil
	if err := f.client.Update(t.Context(), &m); err != nil {
		t.Fatal(err)
	}
	keep(t, k)
	if err := f.call(t, k, f.bundle(t)); err != nil {
		t.Error(err)
	}
}

func TestTheAuthoritysKeyIsKeptNowhere(t *testing.T) {
	f := newFixture()
	keep(t, f.keeper())
	var secret corev1.Secret
	if err := f.client.Get(t.Context(), secretName, &secret); err != nil {
		t.Fatal(err)
	}
	if len(secret.Data) != 3 {
		t.Errorf("the Secret holds more than a certificate, its key and authorities: %d entries", len(secret.Data))
	}
	if _, err := tls.X509KeyPair(secret.Data["ca.crt"], secret.Data["tls.key"]); err == nil {
		t.Error("the stored key is the authority's")
	}
}

func TestAKeeperGoesOnAfterAFailureAndEndsWithItsContext(t *testing.T) {
	f := newFixture()
	failing := true
	k := f.keeperWith(interceptor.NewClient(f.client, interceptor.Funcs{
		Get: func(ctx context.Context, c client.WithWatch, key client.ObjectKey, o client.Object, opts ...client.GetOption) error {
			if failing {
				failing = false
				return errors.New("not now")
			}
			return c.Get(ctx, key, o, opts...)
		},
	}))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- k.Start(ctx) }()
	for k.Ready(nil) != nil {
		if f.clock.HasWaiters() {
			f.clock.Step(period)
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestWhoElseServesTheCertificateIsToldOfAnother(t *testing.T) {
	f := newFixture()
	k := f.keeper()
	trusted, fail := 0, false
	k.Trust = func(context.Context, []byte) error {
		trusted++
		if fail {
			return errors.New("not now")
		}
		return nil
	}
	told := 0
	k.OnChange(func() { told++ })
	if certificate, key := k.PEM(); certificate != nil || key != nil {
		t.Error("there is one before it is made")
	}
	keep(t, k)
	first, key := k.PEM()
	if _, err := tls.X509KeyPair(first, key); err != nil || told != 1 || trusted != 1 {
		t.Errorf("%v, told %d times, trusted %d times", err, told, trusted)
	}
	keep(t, k)
	f.clock.Step(Lifetime - renewBefore)
	fail = true
	if err := k.Sync(t.Context()); err == nil {
		t.Error("the failure was swallowed")
	}
	if now, _ := k.PEM(); !bytes.Equal(now, first) || told != 1 {
		t.Errorf("another is served before others trust it; told %d times", told)
	}
	fail = false
	keep(t, k)
	if now, _ := k.PEM(); bytes.Equal(now, first) || told != 2 {
		t.Errorf("the old one is served; told %d times", told)
	}
}
