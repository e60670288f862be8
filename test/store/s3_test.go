package store

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
	"podstasis.dev/stasis/internal/store/backend/open"
	"podstasis.dev/stasis/test/store/servers"
)

func TestABucketOfAnS3ServerIsABackend(t *testing.T) {
	// Nothing of these may be used.
	t.Setenv("AWS_ACCESS_KEY_ID", "other")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "other")
	t.Setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:1")
	_, config := servers.S3(t, here)
	var stores atomic.Int64
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		config.Prefix = fmt.Sprintf("stores/%d", stores.Add(1)) // one bucket, and none sees the others' objects
		return openStore(t, config)
	})
}

func TestAnS3ServerThatRefusesSaysSoAtOnce(t *testing.T) {
	_, good := servers.S3(t, here)
	for name, change := range map[string]func(*open.Config){
		"another secret": func(c *open.Config) { c.Credentials[open.KeySecretAccessKey] = []byte("another secret") },
		"another user":   func(c *open.Config) { c.Credentials[open.KeyAccessKeyID] = []byte("nobody") },
		"another CA":     func(c *open.Config) { c.CA = servers.NewIdentity(t, here).CA },
	} {
		config := good
		config.Credentials = map[string][]byte{open.KeyAccessKeyID: []byte("stasis"), open.KeySecretAccessKey: []byte("a secret of sixteen")}
		change(&config)
		b := retrying(openStore(t, config))
		begun := time.Now()
		for call, err := range everyCall(t.Context(), b) {
			if !errors.Is(err, backend.ErrDenied) {
				t.Errorf("%s: %s: %v, want ErrDenied", name, call, err)
			}
			if err != nil && strings.Contains(err.Error(), "a secret of sixteen") {
				t.Errorf("%s: %s: the secret is in the error: %v", name, call, err)
			}
		}
		if spent := time.Since(begun); spent > 25*time.Second { // a try again takes 30 s for each call
			t.Errorf("%s: %s for what does not change", name, spent)
		}
		b.Close()
	}
	config := good
	config.Bucket = "mistyped"
	b := retrying(openStore(t, config))
	defer b.Close()
	for call, err := range everyCall(t.Context(), b) {
		if !errors.Is(err, backend.ErrNoStore) {
			t.Errorf("a bucket that is not there: %s: %v, want ErrNoStore", call, err)
		}
	}
}

func TestAnS3ServerThatIsDownIsWorthAnotherTry(t *testing.T) {
	s, config := servers.S3(t, here)
	b := openStore(t, config)
	defer b.Close()
	if err := b.Put(t.Context(), "packs/a", []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	if _, err := b.Read(t.Context(), "packs/a", 0, -1); err == nil || backend.Final(err) {
		t.Errorf("read from a server that is down: %v, want an error that is worth another try", err)
	}
	s.Start(t)
	if data, err := b.Read(t.Context(), "packs/a", 0, -1); err != nil || string(data) != "x" {
		t.Errorf("read %q from a server that is there again, %v", data, err)
	}
}

func TestAPutOverAConnectionThatBreaksGoesOn(t *testing.T) {
	s, config := servers.S3(t, here)
	line := servers.NewLine(t, here, s.Address)
	config.Endpoint = "https://" + line.Addr().String()
	b := openStore(t, config)
	defer b.Close()
	data := backendtest.Noise(1, 32<<20)
	line.CutAfter(10 << 20)
	if err := b.Put(t.Context(), "packs/a", data, nil); err != nil { // no Retrying: only the part is sent again
		t.Fatal(err)
	}
	if line.Cuts() != 1 {
		t.Fatal("the connection did not break")
	}
	if got, err := b.Read(t.Context(), "packs/a", 0, -1); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
}
