package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/file"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"

	"podstasis.dev/stasis/internal/store/backend"
	"podstasis.dev/stasis/internal/store/backend/backendtest"
	"podstasis.dev/stasis/internal/store/backend/open"
	"podstasis.dev/stasis/internal/store/backend/registry"
	"podstasis.dev/stasis/internal/store/backend/web"
	"podstasis.dev/stasis/test/store/servers"
)

func TestARepositoryOfARegistryIsABackend(t *testing.T) {
	s, config, _ := servers.Registry(t, here, true)
	var stores atomic.Int64
	// This registry returns all tags at once; it is not asked for more than that.
	backendtest.Suite{Many: 200, Open: func(t *testing.T) backend.Backend {
		config.Repository = fmt.Sprintf("%s/store/%d", s.Address, stores.Add(1))
		return retrying(openStore(t, config))
	}}.Run(t)
}

func TestARegistryThatRefusesSaysSoAtOnce(t *testing.T) {
	_, good, _ := servers.Registry(t, here, true)
	for name, change := range map[string]func(*open.Config){
		"another password": func(c *open.Config) {
			c.Credentials = map[string][]byte{open.KeyUsername: []byte("stasis"), open.KeyPassword: []byte("other")}
		},
		"no login":   func(c *open.Config) { c.Credentials = nil },
		"another CA": func(c *open.Config) { c.CA = servers.NewIdentity(t, here).CA },
	} {
		config := good
		change(&config)
		b := retrying(openStore(t, config))
		begun := time.Now()
		for call, err := range everyCall(t.Context(), b) {
			if !errors.Is(err, backend.ErrDenied) {
				t.Errorf("%s: %s: %v, want ErrDenied", name, call, err)
			}
		}
		if spent := time.Since(begun); spent > 25*time.Second { // a try again takes 30 s for each call
			t.Errorf("%s: %s for what does not change", name, spent)
		}
		b.Close()
	}
}

func TestARegistryWithoutDeletesIsNamed(t *testing.T) {
	_, config, _ := servers.Registry(t, here, false)
	b := retrying(openStore(t, config))
	defer b.Close()
	for range 2 { // replacing works all the same
		if err := b.Put(t.Context(), "store.json", []byte("{}"), nil); err != nil {
			t.Fatal(err)
		}
	}
	err := b.Delete(t.Context(), "store.json")
	if !errors.Is(err, backend.ErrDenied) || !bytes.Contains([]byte(err.Error()), []byte("storage.delete.enabled")) {
		t.Errorf("delete: %v, want ErrDenied and what to do", err)
	}
	if data, err := b.Read(t.Context(), "store.json", 0, -1); err != nil || string(data) != "{}" {
		t.Errorf("read %q, %v", data, err)
	}
}

// pull does what `oras pull REPOSITORY:TAG` does.
func pull(t *testing.T, ca []byte, repository, tag, into string) error {
	t.Helper()
	repo, err := remote.NewRepository(repository)
	if err != nil {
		t.Fatal(err)
	}
	client, err := web.Client(ca)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	repo.Client = &auth.Client{Client: client, Credential: auth.StaticCredential(repo.Reference.Host(), auth.Credential{Username: servers.Username, Password: servers.Password})}
	files, err := file.New(into)
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	root, err := oras.Copy(t.Context(), repo, tag, files, tag, oras.DefaultCopyOptions)
	if err == nil && root.ArtifactType != "" && root.ArtifactType != registry.ArtifactType {
		t.Errorf("the artifact is of the type %s", root.ArtifactType)
	}
	return err
}

func TestAnOrdinaryClientPullsAnObjectWithWhatItRefersTo(t *testing.T) {
	s, config, file := servers.Registry(t, here, true)
	b := retrying(openStore(t, config))
	defer b.Close()
	objects := map[string][]byte{
		"packs/a": backendtest.Noise(1, 6<<20), "packs/b": backendtest.Noise(2, 1000), "packs/c": backendtest.Noise(3, 1000), "checkpoints/mine": []byte(`{"packs":["a","b"]}`),
	}
	for _, name := range []string{"packs/a", "packs/b", "packs/c"} {
		if err := b.Put(t.Context(), name, objects[name], nil); err != nil {
			t.Fatal(err)
		}
	}
	// Another process, which remembers nothing of what the first wrote.
	other := retrying(openStore(t, config))
	defer other.Close()
	if err := other.Put(t.Context(), "checkpoints/mine", objects["checkpoints/mine"], []string{"packs/a", "packs/b"}); err != nil {
		t.Fatal(err)
	}
	check := func(when string) {
		t.Helper()
		into := t.TempDir()
		if err := pull(t, s.CA, config.Repository, "checkpoints_mine", into); err != nil {
			t.Fatalf("%s: pull: %v", when, err)
		}
		for _, name := range []string{"packs/a", "packs/b", "checkpoints/mine"} {
			if data, err := os.ReadFile(filepath.Join(into, name)); err != nil || !bytes.Equal(data, objects[name]) {
				t.Errorf("%s: %s was pulled with %d bytes of %d, %v", when, name, len(data), len(objects[name]), err)
			}
		}
		if _, err := os.Stat(filepath.Join(into, "packs/c")); err == nil {
			t.Errorf("%s: what it does not refer to came along", when)
		}
	}
	check("at first")

	// The registry's own collector keeps what the object refers to, also if its tag is
	// gone, and removes what nothing refers to.
	for _, name := range []string{"packs/a", "packs/c"} {
		if err := b.Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	s.Stop()
	before := size(t, s.Data)
	if out, err := exec.Command(s.Program, "garbage-collect", "--delete-untagged", file).CombinedOutput(); err != nil {
		t.Fatalf("garbage-collect: %v\n%s", err, out)
	}
	if after := size(t, s.Data); after >= before || after < 6<<20 {
		t.Errorf("the registry's collector left %d bytes of %d", after, before)
	}
	s.Start(t)
	check("after the registry's garbage collection")
	// What a client of before remembers is gone: it finds out by itself.
	if err := b.Put(t.Context(), "packs/c", objects["packs/c"], nil); err != nil {
		t.Error(err)
	}
	if data, err := other.Read(t.Context(), "packs/c", 0, -1); err != nil || !bytes.Equal(data, objects["packs/c"]) {
		t.Errorf("read %d bytes, %v", len(data), err)
	}
}

func size(t *testing.T, root string) (n int64) {
	t.Helper()
	err := filepath.Walk(root, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			n += info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Debian's registry (2.8) does not go on with an upload that broke off in the middle of a
// request, as others do: then it is begun anew.
func TestAnUploadThatBreaksOffCostsOnlyItself(t *testing.T) {
	s, config, _ := servers.Registry(t, here, true)
	line := servers.NewLine(t, here, s.Address)
	config.Repository = line.Addr().String() + "/team/checkpoints"
	b := retrying(openStore(t, config))
	defer b.Close()
	if err := b.Put(t.Context(), "packs/first", []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	data := backendtest.Noise(1, 24<<20)
	line.CutAfter(10 << 20)
	if err := b.Put(t.Context(), "packs/a", data, nil); err != nil {
		t.Fatalf("put over a connection that breaks: %v", err)
	}
	if line.Cuts() != 1 {
		t.Fatal("the connection did not break")
	}
	for name, want := range map[string][]byte{"packs/a": data, "packs/first": []byte("x")} {
		if got, err := b.Read(t.Context(), name, 0, -1); err != nil || !bytes.Equal(got, want) {
			t.Errorf("read %d bytes of %s, %v", len(got), name, err)
		}
	}
}
