// Package platform says what a node is, as far as the processes of a checkpoint
// depend on it, and whether those of one node can go on on another.
// docs/cross-node.md has the rules for readers.
package platform

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"podstasis.dev/stasis/internal/checkpoint"
)

// Description is what a node is, or what a checkpoint's processes ran on.
type Description struct {
	OS           string `json:"os"`           // GOOS, such as "linux"
	Architecture string `json:"architecture"` // GOARCH, such as "amd64"
	Kernel       string `json:"kernel"`       // uname -r
	// CPU is never nil in a description that Check passes.
	CPU *checkpoint.CPU `json:"cpu"`
	// Engine captured the processes, or would recreate them.
	Engine checkpoint.Program `json:"engine"`
	// More are other engines that a node has; none in what a checkpoint needs.
	More []checkpoint.Program `json:"moreEngines,omitempty"`
	// FormatVersion is that of the checkpoint, or the one that the node reads.
	FormatVersion int `json:"formatVersion"`
}

// Bounds of a description: it is read from other nodes and from archives.
const (
	maxFeatures = 512
	maxWord     = 128
	maxXSave    = 1 << 20 // bytes
	maxEngines  = 8
	// MaxBytes bounds a description as JSON.
	MaxBytes = 16 << 10
)

// Of is what a checkpoint needs. The second value is false where the checkpoint does
// not say what CPU its processes ran on: it was made before that was recorded.
func Of(m *checkpoint.Manifest) (Description, bool) {
	d := Description{
		OS: m.Platform.OS, Architecture: m.Platform.Architecture, Kernel: m.Platform.Kernel,
		CPU: m.Platform.CPU, Engine: m.Engine, FormatVersion: m.FormatVersion,
	}
	return d, d.Check() == nil
}

// Check says what is wrong with a description that came from elsewhere.
func (d Description) Check() error {
	for what, word := range map[string]string{"os": d.OS, "architecture": d.Architecture, "kernel": d.Kernel, "engine": d.Engine.Name, "engine version": d.Engine.Version} {
		if err := checkWord(word); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
	}
	if len(d.More) > maxEngines {
		return fmt.Errorf("more engines: they are %d, more than %d", len(d.More), maxEngines)
	}
	for _, e := range d.More {
		if err := errors.Join(checkWord(e.Name), checkWord(e.Version)); err != nil {
			return fmt.Errorf("more engines: %w", err)
		}
	}
	if d.CPU == nil {
		return errors.New("cpu: it is not there")
	}
	if len(d.CPU.Features) > maxFeatures {
		return fmt.Errorf("cpu: it has %d features, more than %d", len(d.CPU.Features), maxFeatures)
	}
	for _, f := range d.CPU.Features {
		if err := checkWord(f); err != nil {
			return fmt.Errorf("cpu feature: %w", err)
		}
	}
	if d.CPU.XSaveFeatures < 0 || d.CPU.XSaveBytes < 0 || d.CPU.XSaveBytes > maxXSave || d.FormatVersion < 1 {
		return errors.New("cpu: a size or set is none that there can be, or the format version is")
	}
	return nil
}

func checkWord(s string) error {
	if s == "" || len(s) > maxWord {
		return fmt.Errorf("%.40q has no character or more than %d", s, maxWord)
	}
	for _, r := range s {
		if r <= ' ' || r > '~' {
			return fmt.Errorf("%.40q is not a word", s)
		}
	}
	return nil
}

// Encode writes a description for others to read.
func (d Description) Encode() (string, error) {
	if err := d.Check(); err != nil {
		return "", fmt.Errorf("describe the platform: %w", err)
	}
	data, err := json.Marshal(d)
	if err == nil && len(data) > MaxBytes {
		err = fmt.Errorf("it takes %d bytes, more than %d", len(data), MaxBytes)
	}
	if err != nil {
		return "", fmt.Errorf("describe the platform: %w", err)
	}
	return string(data), nil
}

// Decode reads what Encode wrote, from a node that may say anything.
func Decode(s string) (Description, error) {
	if len(s) > MaxBytes {
		return Description{}, fmt.Errorf("read a platform: it takes %d bytes, more than %d", len(s), MaxBytes)
	}
	var d Description
	if err := json.Unmarshal([]byte(s), &d); err != nil {
		return Description{}, fmt.Errorf("read a platform: %w", err)
	}
	if err := d.Check(); err != nil {
		return Description{}, fmt.Errorf("read a platform: %w", err)
	}
	return d, nil
}

// classDigits is how many hexadecimal digits name a class.
const classDigits = 16

// Class names the descriptions that are equal to the rules: what one of them can
// run, or run on, so can the others. It is fit for the name of a label.
func (d Description) Class() string {
	features := slices.Clone(d.CPU.Features)
	slices.Sort(features)
	h := sha256.New()
	kernel := shortVersion(d.Kernel)
	if ownKernel[d.Engine.Name] {
		kernel = "own"
	}
	fmt.Fprintf(h, "%s %s\n%s %s %s\n%d\n%d %d\n", d.OS, d.Architecture, kernel, d.Engine.Name, shortVersion(d.Engine.Version),
		d.FormatVersion, d.CPU.XSaveFeatures, d.CPU.XSaveBytes)
	for _, f := range slices.Compact(features) {
		fmt.Fprintln(h, f)
	}
	return hex.EncodeToString(h.Sum(nil))[:classDigits]
}

// Obstacles says why what ran on one platform cannot go on on another, each as a
// phrase whose subject is the other node: "lacks the CPU feature avx512f". None if
// it can.
func Obstacles(from, on Description) []string {
	if from.OS != on.OS || from.Architecture != on.Architecture {
		// Nothing else can be compared.
		return []string{fmt.Sprintf("is %s/%s and the checkpoint is of %s/%s", on.OS, on.Architecture, from.OS, from.Architecture)}
	}
	var why []string
	if missing := lacking(from.CPU.Features, on.CPU.Features); len(missing) > 0 {
		why = append(why, "lacks the CPU "+plural(len(missing), "feature", "features")+" "+some(missing))
	}
	// A process's vector registers lie in an area that the kernel of the other node
	// must take back as it is.
	if extra := from.CPU.XSaveFeatures &^ on.CPU.XSaveFeatures; extra != 0 {
		why = append(why, fmt.Sprintf("lacks the xsave components %#x", extra))
	} else if from.CPU.XSaveBytes > on.CPU.XSaveBytes {
		why = append(why, fmt.Sprintf("has room for %d bytes of CPU registers (xsave) and %d are needed", on.CPU.XSaveBytes, from.CPU.XSaveBytes))
	}
	own := ownKernel[from.Engine.Name]
	if !own && older(on.Kernel, from.Kernel) {
		why = append(why, fmt.Sprintf("runs kernel %s, older than %s", on.Kernel, from.Kernel))
	}
	engine, has := on.engine(from.Engine.Name)
	switch {
	case !has:
		why = append(why, fmt.Sprintf("restores with %s and the checkpoint is of %s", on.engines(), from.Engine.Name))
	case own && engine.Version != from.Engine.Version:
		why = append(why, fmt.Sprintf("has %s %s and the checkpoint is of %s: %s restores what the same version has saved", engine.Name, engine.Version, from.Engine.Version, engine.Name))
	case older(engine.Version, from.Engine.Version):
		why = append(why, fmt.Sprintf("has %s %s, older than %s", engine.Name, engine.Version, from.Engine.Version))
	}
	if from.FormatVersion != on.FormatVersion {
		why = append(why, fmt.Sprintf("reads checkpoints of format %d and this is of format %d", on.FormatVersion, from.FormatVersion))
	}
	return why
}

// ownKernel are engines whose processes run on a kernel that is part of the engine: the
// node's is nothing that they see, and what the engine saves is as it is inside.
var ownKernel = map[string]bool{"gvisor": true}

// engine is the node's of a name.
func (d Description) engine(name string) (checkpoint.Program, bool) {
	for _, e := range append([]checkpoint.Program{d.Engine}, d.More...) {
		if e.Name == name {
			return e, true
		}
	}
	return checkpoint.Program{}, false
}

func (d Description) engines() string {
	names := d.Engine.Name
	for _, e := range d.More {
		names += " and " + e.Name
	}
	return names
}

// lacking lists what is in the first and not in the second, sorted.
func lacking(want, have []string) (missing []string) {
	has := make(map[string]bool, len(have))
	for _, f := range have {
		has[f] = true
	}
	for _, f := range want {
		if !has[f] {
			missing = append(missing, f)
		}
	}
	slices.Sort(missing)
	return slices.Compact(missing)
}

// some names the first few of many.
func some(names []string) string {
	const most = 8
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}

// older says whether a version comes before another. Of versions that are none, only
// equal ones are not older.
func older(version, than string) bool {
	v, err := ParseVersion(version)
	t, errThan := ParseVersion(than)
	if err != nil || errThan != nil {
		return version != than
	}
	return v.Older(t)
}

// shortVersion is the part of a version that counts.
func shortVersion(version string) string {
	if v, err := ParseVersion(version); err == nil {
		return v.String()
	}
	return version
}
