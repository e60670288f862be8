package nodeinstall

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// The CRI plugin's name by version of the configuration file.
const (
	pluginV3 = `plugins."io.containerd.cri.v1.runtime"`
	pluginV2 = `plugins."io.containerd.grpc.v1.cri"`
)

const (
	note       = "added by stasis-agent install, taken out by stasis-agent uninstall"
	createdBy  = "# Created by stasis-agent install, removed by stasis-agent uninstall.\n"
	beginBlock = "\n# BEGIN stasis: " + note + "\n"
	endBlock   = "# END stasis\n"
)

// configFiles are the two files that decide about our handler. nil is a file
// that does not exist.
type configFiles struct {
	main   []byte
	dropIn []byte
}

func (c configFiles) equal(other configFiles) bool {
	same := func(a, b []byte) bool { return (a == nil) == (b == nil) && bytes.Equal(a, b) }
	return same(c.main, other.main) && same(c.dropIn, other.dropIn)
}

// dropInPath is where our drop-in lies, beside a main configuration file.
func dropInPath(mainPath string) string {
	return filepath.Join(filepath.Dir(mainPath), "conf.d", "stasis.toml")
}

// importPattern is what the main file imports: a pattern, because containerd
// does not start when a file that is named outright is missing.
func importPattern(mainPath string) string {
	return filepath.Join(filepath.Dir(mainPath), "conf.d", "stasis*.toml")
}

// withHandlers returns the files as they have to be for containerd to know our
// handlers. major is containerd's major version, running are the handlers that it runs
// with. All other bytes of the main file stay as they are, and withoutHandlers takes out
// exactly what was put in.
func withHandlers(now configFiles, mainPath string, major int, running, ours handlers) (configFiles, error) {
	clean := withoutHandlers(now, mainPath)
	head, err := readHead(clean.main)
	if err != nil {
		return configFiles{}, fmt.Errorf("read %s: %w", mainPath, err)
	}
	if major < 2 {
		return withBlock(clean, mainPath, head, running, ours)
	}
	version, plugin := 3, pluginV3
	if head.Version == 2 {
		// containerd 2.0 and 2.1 migrate all files together, from the lowest name
		// they know: a drop-in of a later version would hide the main file's CRI
		// settings from that.
		version, plugin = 2, pluginV2
	}
	tables, err := ours.tables(plugin + ".containerd.runtimes")
	if err != nil {
		return configFiles{}, err
	}
	want := configFiles{
		main:   clean.main,
		dropIn: fmt.Appendf(nil, "# Written by stasis-agent install, removed by stasis-agent uninstall.\nversion = %d\n\n%s", version, tables),
	}
	if !head.imports(mainPath) {
		want.main = addImport(clean.main, mainPath, head)
	}
	return want, nil
}

// withBlock is for containerd 1.x, where a plugin's section in an imported file
// replaces the whole section of the main file: our tables go into the main file. Where
// that names no handler containerd runs with its own, and would not any more: they are
// named then.
func withBlock(clean configFiles, mainPath string, head configHead, running, ours handlers) (configFiles, error) {
	if head.Version != 2 && clean.main != nil {
		return configFiles{}, fmt.Errorf("%s is of version %d: migrate it first (containerd config migrate)", mainPath, max(head.Version, 1))
	}
	named, err := namedHandlers(clean.main)
	if err != nil {
		return configFiles{}, fmt.Errorf("read %s: %w", mainPath, err)
	}
	all := maps.Clone(ours)
	for name, h := range running {
		if !named && !slices.Contains(ourNames, name) {
			all[name] = h
		}
	}
	tables, err := all.tables(pluginV2 + ".containerd.runtimes")
	if err != nil {
		return configFiles{}, err
	}
	main := clean.main
	if main == nil {
		main = []byte(createdBy + "version = 2\n")
	}
	return configFiles{main: concat(main, []byte(beginBlock), tables, []byte(endBlock))}, nil
}

// namedHandlers says whether a main file of version 2 names runtime handlers.
func namedHandlers(main []byte) (bool, error) {
	var file struct {
		Plugins map[string]struct {
			Containerd struct {
				Runtimes map[string]any `toml:"runtimes"`
			} `toml:"containerd"`
		} `toml:"plugins"`
	}
	err := toml.Unmarshal(main, &file)
	return len(file.Plugins["io.containerd.grpc.v1.cri"].Containerd.Runtimes) > 0, err
}

// withoutHandlers returns the files without what withHandlers puts there.
func withoutHandlers(now configFiles, mainPath string) configFiles {
	main := now.main
	if i := bytes.Index(main, []byte(beginBlock)); i >= 0 {
		if j := bytes.Index(main[i:], []byte(endBlock)); j >= 0 {
			main = concat(main[:i], main[i+j+len(endBlock):])
		}
	}
	main = cutOnce(main, importLine(mainPath))
	if head, err := readHead(main); err == nil && head.open >= 0 {
		if rest, ok := bytes.CutPrefix(main[head.open:], []byte(importEntry(mainPath))); ok {
			main = concat(main[:head.open], rest)
		}
	}
	if created := [][]byte{[]byte(createdBy + "version = 2\n"), []byte(createdBy + "version = 3\n")}; slices.ContainsFunc(created, func(c []byte) bool { return bytes.Equal(c, main) }) {
		main = nil
	}
	return configFiles{main: main}
}

// concat joins parts. Its result is never nil, which would say that there is no file.
func concat(parts ...[]byte) []byte { return bytes.Join(parts, []byte{}) }

func cutOnce(b []byte, part string) []byte {
	i := bytes.Index(b, []byte(part))
	if i < 0 {
		return b
	}
	return concat(b[:i], b[i+len(part):])
}

func importLine(mainPath string) string {
	return fmt.Sprintf("imports = [%q] # %s\n", importPattern(mainPath), note)
}

func importEntry(mainPath string) string {
	return fmt.Sprintf("%q, ", importPattern(mainPath))
}

func addImport(main []byte, mainPath string, head configHead) []byte {
	switch {
	case main == nil:
		return []byte(createdBy + importLine(mainPath) + "version = 3\n")
	case head.open >= 0:
		return concat(main[:head.open], []byte(importEntry(mainPath)), main[head.open:])
	}
	// The first line comes before any table's header, so this key is the file's own.
	return concat([]byte(importLine(mainPath)), main)
}

// configHead is what the top level of a main configuration file says.
type configHead struct {
	Version int      `toml:"version"`
	Imports []string `toml:"imports"`

	// open is the offset of the first byte inside the brackets of imports; -1 if
	// the file has no imports.
	open int
}

func readHead(main []byte) (configHead, error) {
	head := configHead{open: -1}
	if err := toml.Unmarshal(main, &head); err != nil {
		return head, err
	}
	var p unstable.Parser
	p.Reset(main)
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind == unstable.Table || e.Kind == unstable.ArrayTable {
			break
		}
		if e.Kind != unstable.KeyValue {
			continue
		}
		key := e.Key()
		key.Next()
		if string(key.Node().Data) != "imports" || !key.IsLast() || e.Value().Kind != unstable.Array {
			continue
		}
		at := int(key.Node().Raw.Offset)
		bracket := bytes.IndexByte(main[at:], '[') // neither the key nor "=" has one
		if bracket < 0 {
			return head, errors.New("no list after imports")
		}
		head.open = at + bracket + 1
	}
	return head, p.Error()
}

// imports says whether the file imports our drop-in already.
func (h configHead) imports(mainPath string) bool {
	return slices.ContainsFunc(h.Imports, func(pattern string) bool {
		if !filepath.IsAbs(pattern) {
			pattern = filepath.Join(filepath.Dir(mainPath), pattern)
		}
		matches, err := filepath.Match(filepath.Clean(pattern), dropInPath(mainPath))
		return err == nil && matches
	})
}
