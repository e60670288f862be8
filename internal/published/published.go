// Package published knows how the kubelet lays out the volumes that it writes:
// those of ConfigMaps, Secrets, the downward API, and of several of them (projected).
// The files are in a directory named after the moment, to which the link ..data
// leads; the names that users see lead through that link. A process that has a file
// open, such as a shell its script, has the one in the directory. The restored Pod's
// directory has another name.
package published

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
)

// current is the link to the directory that is current.
const current = "..data"

var (
	plugins = []string{"kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"}
	names   = regexp.MustCompile(`^\.\.[0-9]{4}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{2}\.[0-9]{1,20}$`)
)

// Directory is the name of the directory that is current in a volume; empty for one
// that the kubelet does not write. The kubelet keeps volumes in
// DIR/pods/UID/volumes/PLUGIN/NAME.
func Directory(volume string) (string, error) {
	if !slices.Contains(plugins, filepath.Base(filepath.Dir(volume))) {
		return "", nil
	}
	directory, err := os.Readlink(filepath.Join(volume, current))
	switch {
	case errors.Is(err, fs.ErrNotExist): // nothing is in it
		return "", nil
	case err != nil:
		return "", fmt.Errorf("which files are current: %w", err)
	case !names.MatchString(directory):
		return "", fmt.Errorf("%s leads to %q, which is no directory of the kubelet's", current, directory)
	}
	return directory, nil
}

// Directories are all names by which processes may know the files of a volume: Directory's,
// and those that Copy has made of it for a Pod that was itself restored.
func Directories(volume string) ([]string, error) {
	current, err := Directory(volume)
	if err != nil || current == "" {
		return nil, err
	}
	all := []string{current}
	entries, err := os.ReadDir(volume)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.IsDir() && e.Name() != current && names.MatchString(e.Name()) {
			all = append(all, e.Name())
		}
	}
	return all, nil
}

// Link makes the files of a volume to be found by the name of another's directory
// as well. The link goes through the kubelet's own, so that it holds when the
// kubelet writes the files anew; the kubelet leaves alone what it does not know.
func Link(volume, directory string) error {
	root, err := open(volume, directory)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Symlink(current, directory); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make the source's files known by their name: %w", err)
	}
	return nil
}

// Copy makes the files of a volume to be found in a directory of another's name as well,
// for an engine that opens again what was a directory as one, and follows no link there.
// They are the same files until the kubelet writes them anew: what has one open then goes
// on with it, as in the source.
func Copy(volume, directory string) error {
	root, err := open(volume, directory)
	if err != nil {
		return err
	}
	defer root.Close()
	if _, err := root.Lstat(directory); err == nil {
		return nil // made for another container, or the kubelet's own
	}
	from, err := root.Readlink(current)
	switch {
	case err != nil:
		return fmt.Errorf("which files are current: %w", err)
	case !names.MatchString(from):
		return fmt.Errorf("%s leads to %q, which is no directory of the kubelet's", current, from)
	}
	half := directory + ".stasis"
	if err := root.RemoveAll(half); err != nil {
		return err
	}
	err = fs.WalkDir(root.FS(), from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		to := half + path[len(from):]
		switch {
		case d.IsDir():
			info, err := d.Info()
			if err != nil {
				return err
			}
			return errors.Join(root.Mkdir(to, 0o700), root.Chmod(to, info.Mode().Perm()))
		case d.Type().IsRegular():
			return root.Link(path, to)
		}
		return nil // the kubelet writes nothing else there
	})
	if err == nil {
		err = root.Rename(half, directory)
	}
	if err != nil {
		return fmt.Errorf("make the source's files known by their name: %w", err)
	}
	return nil
}

// open opens a volume of the kubelet's in which directory may be made.
func open(volume, directory string) (*os.Root, error) {
	if !names.MatchString(directory) {
		return nil, fmt.Errorf("%q is no directory of the kubelet's", directory)
	}
	if !slices.Contains(plugins, filepath.Base(filepath.Dir(volume))) {
		return nil, fmt.Errorf("the kubelet had written its files, and does not write those of %s", volume)
	}
	return os.OpenRoot(volume)
}
