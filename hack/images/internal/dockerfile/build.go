package dockerfile

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// epoch is the time of everything in an image: what is built when shows nowhere.
var epoch = time.Unix(0, 0).UTC()

// Build makes the image that instructions describe, of files below dir. Each COPY
// is a layer, uncompressed: what is imported on the machine that built it is
// never sent anywhere, and another compressor gives another digest.
func Build(instructions []Instruction, dir, arch string) (v1.Image, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()

	image := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	image = mutate.ConfigMediaType(image, types.OCIConfigJSON)
	var config v1.Config
	var layers []mutate.Addendum
	for _, instruction := range instructions {
		if instruction.Name == "COPY" {
			content, err := copyLayer(root.FS(), instruction)
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", instruction.Line, err)
			}
			layers = append(layers, mutate.Addendum{
				Layer:   static.NewLayer(content, types.OCIUncompressedLayer),
				History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "COPY " + strings.Join(instruction.Args, " ")},
			})
			continue
		}
		if err := configure(&config, instruction); err != nil {
			return nil, fmt.Errorf("line %d: %w", instruction.Line, err)
		}
	}
	if image, err = mutate.Append(image, layers...); err != nil {
		return nil, err
	}
	whole, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	whole = whole.DeepCopy()
	whole.Architecture, whole.OS, whole.Created, whole.Config = arch, "linux", v1.Time{Time: epoch}, config
	return mutate.ConfigFile(image, whole)
}

func configure(config *v1.Config, instruction Instruction) error {
	args := instruction.Args
	switch instruction.Name {
	case "ENTRYPOINT":
		config.Entrypoint = args
	case "CMD":
		config.Cmd = args
	case "ENV", "LABEL":
		for _, arg := range args {
			key, value, found := strings.Cut(arg, "=")
			switch {
			case !found:
				return fmt.Errorf("%s %s: want KEY=VALUE", instruction.Name, arg)
			case instruction.Name == "ENV":
				config.Env = append(config.Env, arg)
			default:
				if config.Labels == nil {
					config.Labels = map[string]string{}
				}
				config.Labels[key] = value
			}
		}
	case "VOLUME":
		if config.Volumes == nil {
			config.Volumes = map[string]struct{}{}
		}
		for _, arg := range args {
			config.Volumes[arg] = struct{}{}
		}
	case "USER", "WORKDIR":
		if len(args) != 1 {
			return fmt.Errorf("%s takes one argument", instruction.Name)
		}
		if instruction.Name == "USER" {
			config.User = args[0]
		} else {
			config.WorkingDir = args[0]
		}
	default:
		return fmt.Errorf("%s is not known here", instruction.Name)
	}
	return nil
}

// copyLayer is the tar of what one COPY brings: a file to a name, or to a
// directory where the destination ends in a slash, and a directory's contents to
// a directory, as Docker does it.
func copyLayer(context fs.FS, instruction Instruction) ([]byte, error) {
	if len(instruction.Args) < 2 {
		return nil, fmt.Errorf("COPY takes a source and a destination")
	}
	sources, destination := instruction.Args[:len(instruction.Args)-1], instruction.Args[len(instruction.Args)-1]
	if !strings.HasPrefix(destination, "/") {
		return nil, fmt.Errorf("COPY to %s: the destination must be absolute", destination)
	}
	if len(sources) > 1 && !strings.HasSuffix(destination, "/") {
		return nil, fmt.Errorf("COPY of several to %s: the destination must end in a slash", destination)
	}
	layer := layer{mode: instruction.Mode, entries: map[string]entry{}}
	for _, source := range sources {
		source = path.Clean(filepath.ToSlash(source))
		info, err := fs.Stat(context, source)
		if err != nil {
			return nil, fmt.Errorf("COPY %s: %w (is it built?)", source, err)
		}
		target := destination
		if !info.IsDir() && strings.HasSuffix(destination, "/") {
			target = destination + path.Base(source)
		}
		if err := layer.add(context, source, strings.Trim(path.Clean(target), "/")); err != nil {
			return nil, err
		}
	}
	return layer.tar()
}

// layer collects the entries of a tar, by their path.
type layer struct {
	mode    *int64
	entries map[string]entry
}

type entry struct {
	header  tar.Header
	content []byte
}

func (l *layer) add(context fs.FS, source, target string) error {
	l.parents(target)
	return fs.WalkDir(context, source, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative := strings.TrimPrefix(strings.TrimPrefix(name, source), "/")
		at := path.Join(target, relative)
		if at == "" || at == "." {
			return nil // the root itself
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		header := tar.Header{Name: at, ModTime: epoch, Format: tar.FormatPAX}
		var content []byte
		switch {
		case info.Mode().IsDir():
			header.Typeflag, header.Name = tar.TypeDir, at+"/"
			header.Mode = l.bits(0o755)
		case info.Mode()&fs.ModeSymlink != 0:
			header.Typeflag, header.Mode = tar.TypeSymlink, 0o777
			if header.Linkname, err = fs.ReadLink(context, name); err != nil {
				return err
			}
		case info.Mode().IsRegular():
			header.Typeflag = tar.TypeReg
			// Only the owner's executable bit counts: the rest is the builder's umask.
			header.Mode = l.bits(0o644)
			if info.Mode()&0o100 != 0 {
				header.Mode = l.bits(0o755)
			}
			if content, err = fs.ReadFile(context, name); err != nil {
				return err
			}
			header.Size = int64(len(content))
		default:
			return fmt.Errorf("%s is a %s: only files, directories and links can be copied", name, info.Mode().Type())
		}
		l.entries[at] = entry{header, content}
		return nil
	})
}

func (l *layer) bits(otherwise int64) int64 {
	if l.mode != nil {
		return *l.mode
	}
	return otherwise
}

// parents adds the directories that lead to target.
func (l *layer) parents(target string) {
	for dir := path.Dir(target); dir != "." && dir != "/"; dir = path.Dir(dir) {
		if _, known := l.entries[dir]; !known {
			l.entries[dir] = entry{header: tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: epoch, Format: tar.FormatPAX}}
		}
	}
}

func (l *layer) tar() ([]byte, error) {
	paths := make([]string, 0, len(l.entries))
	for at := range l.entries {
		paths = append(paths, at)
	}
	slices.Sort(paths)
	var buffer bytes.Buffer
	w := tar.NewWriter(&buffer)
	for _, at := range paths {
		entry := l.entries[at]
		if err := w.WriteHeader(&entry.header); err != nil {
			return nil, fmt.Errorf("adding %s: %w", at, err)
		}
		if _, err := io.Copy(w, bytes.NewReader(entry.content)); err != nil {
			return nil, fmt.Errorf("adding %s: %w", at, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buffer.Bytes(), nil
}
