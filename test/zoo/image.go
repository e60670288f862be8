package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// base is what all images of packages have in common, and share as a layer.
var base = []string{"bash", "coreutils", "base-passwd", "sed", "mawk", "grep", "procps", "usr-is-merged"}

// images makes images of Debian's packages and keeps them.
type images struct {
	root, cache string // the checkout; what is kept
}

func newImages(root string) (images, error) {
	home, err := os.UserHomeDir()
	if err != nil {
		return images{}, err
	}
	cache := filepath.Join(cmp.Or(os.Getenv("STASIS_CACHE"), filepath.Join(home, ".cache/stasis")), "zoo")
	return images{root: root, cache: cache}, os.MkdirAll(filepath.Join(cache, "empty"), 0o755)
}

// build returns the archive of an application's image: two layers of packages,
// and a /tmp. It is named after what decides its content, except for the versions
// that the mirror has.
func (i images) build(ctx context.Context, a *app) (string, error) {
	script, err := os.ReadFile(filepath.Join(i.root, "hack/debian.sh"))
	if err != nil {
		return "", err
	}
	key := func(packages []string) string {
		return fmt.Sprintf("%x", sha256.Sum256([]byte(string(script)+strings.Join(packages, " "))))[:16]
	}
	archive := filepath.Join(i.cache, a.name+"-"+key(append(slices.Clone(base), a.Packages...))+".tar")
	if _, err := os.Stat(archive); err == nil {
		return archive, nil
	}
	lower := "base-" + key(base)
	if err := i.do(ctx, "hack/debian.sh", append([]string{filepath.Join(i.cache, lower)}, base...)...); err != nil {
		return "", err
	}
	dockerfile := "FROM scratch\nCOPY " + lower + "/root /\nCOPY --chmod=1777 empty /tmp\n"
	if len(a.Packages) > 0 {
		upper, err := os.MkdirTemp(i.cache, a.name+".")
		if err != nil {
			return "", err
		}
		defer os.RemoveAll(upper)
		out := filepath.Join(upper, "tree")
		if err := i.do(ctx, "hack/debian.sh", slices.Concat([]string{"-b", filepath.Join(i.cache, lower), out}, base, a.Packages)...); err != nil {
			return "", err
		}
		dockerfile += "COPY " + filepath.Base(upper) + "/tree/root /\n"
	}
	dockerfile += "ENV PATH=/usr/bin:/usr/sbin LANG=C.UTF-8\n"
	file, err := os.CreateTemp("", "Dockerfile.")
	if err != nil {
		return "", err
	}
	defer os.Remove(file.Name())
	if _, err := file.WriteString(dockerfile); err != nil {
		return "", err
	}
	if err := file.Close(); err != nil {
		return "", err
	}
	old, err := filepath.Glob(filepath.Join(i.cache, a.name+"-*.tar"))
	if err != nil {
		return "", err
	}
	if err := i.do(ctx, "dist/bin/images", "-f", file.Name(), "-t", a.image(), "-o", archive, i.cache); err != nil {
		return "", err
	}
	for _, name := range old {
		_ = os.Remove(name) // of other packages, or of an older script
	}
	return archive, nil
}

func (i images) do(ctx context.Context, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(i.root, program), args...)
	cmd.Dir = i.root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", program, err, strings.TrimSpace(string(out)))
	}
	return nil
}
