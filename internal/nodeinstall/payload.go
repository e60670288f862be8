package nodeinstall

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/nodeapi"
)

// HostPrefix is where Stasis' programs are on the host.
const HostPrefix = "/opt/stasis"

// links are made in the prefix' bin directory.
var links = map[string]string{
	"criu":               "../criu/bin/criu",
	"stasis-freeze-hook": "stasis-runtime", // a program knows its parts by its name
	"stasis-guard":       "stasis-restore",
	"stasis-cow":         "stasis-restore",
	nodeapi.RunscName:    "stasis-restore",
}

// criuVersions is where each CRIU that was installed lies, by its digest; criu
// beside it is a link to the current one. A tree of files cannot be replaced at
// one moment, a link can: no CRIU ever starts with half of another's libraries.
const criuVersions = "criu.d"

// installPayload brings the prefix to what the payload holds. What is there
// already is not touched. It says whether anything was changed.
func installPayload(payload, prefix string) (changed bool, err error) {
	for _, dir := range []string{"bin", "etc", criuVersions} {
		if err := os.MkdirAll(filepath.Join(prefix, dir), 0o755); err != nil {
			return false, fmt.Errorf("install below %s: %w", prefix, err)
		}
	}
	entries, err := os.ReadDir(filepath.Join(payload, "bin"))
	if err != nil {
		return false, fmt.Errorf("read what is to be installed: %w", err)
	}
	// stasis-runtime first: with a stasis-restore of an earlier version it works, but not
	// each earlier one with a new stasis-restore.
	slices.SortStableFunc(entries, func(a, b fs.DirEntry) int { return -strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		if _, isLink := links[e.Name()]; isLink || !e.Type().IsRegular() {
			continue
		}
		done, err := installFile(filepath.Join(payload, "bin", e.Name()), filepath.Join(prefix, "bin", e.Name()), 0o755)
		if err != nil {
			return changed, err
		}
		changed = changed || done
	}
	done, err := installCRIU(filepath.Join(payload, "criu"), prefix)
	if err != nil {
		return changed, err
	}
	changed = changed || done
	for name, target := range links {
		done, err := installLink(target, filepath.Join(prefix, "bin", name))
		if err != nil {
			return changed, err
		}
		changed = changed || done
	}
	return changed, nil
}

// installFile copies a program unless the same one is there. One that runs keeps
// the file that it was started from.
func installFile(from, to string, mode os.FileMode) (bool, error) {
	want, err := os.ReadFile(from)
	if err != nil {
		return false, fmt.Errorf("read what is to be installed: %w", err)
	}
	if has, err := os.ReadFile(to); err == nil && bytes.Equal(has, want) {
		if info, err := os.Stat(to); err == nil && info.Mode().Perm() == mode {
			return false, nil
		}
	}
	if err := checkpoint.WriteFile(to, want, mode); err != nil {
		return false, fmt.Errorf("install %s: %w", to, err)
	}
	return true, nil
}

// installLink makes a symbolic link, replacing what has its name at one moment.
func installLink(target, name string) (bool, error) {
	if has, err := os.Readlink(name); err == nil && has == target {
		return false, nil
	}
	tmp := filepath.Join(filepath.Dir(name), ".tmp-link-"+filepath.Base(name))
	if err := errors.Join(ignoreNotExist(os.Remove(tmp)), os.Symlink(target, tmp)); err != nil {
		return false, fmt.Errorf("install %s: %w", name, err)
	}
	if info, err := os.Lstat(name); err == nil && info.IsDir() {
		// From before the trees had versions, or put there by hand.
		if err := os.Rename(name, name+".replaced"); err != nil {
			return false, fmt.Errorf("install %s: %w", name, err)
		}
		defer os.RemoveAll(name + ".replaced")
	}
	if err := os.Rename(tmp, name); err != nil {
		return false, fmt.Errorf("install %s: %w", name, err)
	}
	return true, checkpoint.SyncDir(filepath.Dir(name))
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// installCRIU installs the payload's CRIU under its digest and points the link
// to it. Other versions are removed but the one before, which may be at work.
func installCRIU(from, prefix string) (bool, error) {
	digest, err := digestTree(from)
	if err != nil {
		return false, fmt.Errorf("read the CRIU that is to be installed: %w", err)
	}
	link := filepath.Join(prefix, "criu")
	target := path.Join(criuVersions, digest)
	dir := filepath.Join(prefix, criuVersions, digest)
	current, _ := os.Readlink(link)
	has, err := digestTree(dir)
	if err == nil && has == digest && current == target {
		return false, nil
	}
	if err != nil || has != digest {
		if err := os.RemoveAll(dir); err != nil {
			return false, fmt.Errorf("install CRIU: %w", err)
		}
		tmp := filepath.Join(prefix, criuVersions, ".tmp-"+digest)
		if err := os.RemoveAll(tmp); err != nil {
			return false, fmt.Errorf("install CRIU: %w", err)
		}
		if err := copyTree(from, tmp); err != nil {
			return false, fmt.Errorf("install CRIU: %w", err)
		}
		if err := os.Rename(tmp, dir); err != nil {
			return false, fmt.Errorf("install CRIU: %w", err)
		}
		if err := checkpoint.SyncDir(filepath.Dir(dir)); err != nil {
			return false, fmt.Errorf("install CRIU: %w", err)
		}
	}
	if _, err := installLink(target, link); err != nil {
		return false, err
	}
	entries, err := os.ReadDir(filepath.Join(prefix, criuVersions))
	if err != nil {
		return true, fmt.Errorf("look for old CRIUs: %w", err)
	}
	for _, e := range entries {
		if e.Name() != digest && e.Name() != path.Base(current) {
			if err := os.RemoveAll(filepath.Join(prefix, criuVersions, e.Name())); err != nil {
				return true, fmt.Errorf("remove an old CRIU: %w", err)
			}
		}
	}
	return true, nil
}

// digestTree is a digest of the names, modes and contents of a tree.
func digestTree(dir string) (string, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	sum := sha256.New()
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			fmt.Fprintf(sum, "dir %q\n", name)
		case d.Type() == fs.ModeSymlink:
			target, err := root.Readlink(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(sum, "link %q %q\n", name, target)
		case d.Type().IsRegular():
			f, err := root.Open(name)
			if err != nil {
				return err
			}
			defer f.Close()
			fmt.Fprintf(sum, "file %q %v %d\n", name, info.Mode().Perm()&0o111 != 0, info.Size())
			if _, err := io.Copy(sum, f); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%s is neither a file nor a directory nor a link", name)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil))[:16], nil
}

// copyTree copies files, directories and links, durably.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		target := filepath.Join(to, strings.TrimPrefix(name, from))
		switch {
		case d.IsDir():
			return os.MkdirAll(target, 0o755)
		case d.Type() == fs.ModeSymlink:
			link, err := os.Readlink(name)
			if err != nil {
				return err
			}
			return os.Symlink(link, target)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		mode := os.FileMode(0o644)
		if info.Mode().Perm()&0o111 != 0 {
			mode = 0o755
		}
		return copyFile(name, target, mode)
	})
}

func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Chmod(mode), out.Sync(), out.Close())
}
