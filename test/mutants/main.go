// Command mutants takes one feature out of Stasis at a time and shows that the
// test named for it fails. A test that passes without its feature proves nothing.
//
// The checkout is not touched: Go sources are replaced by the compiler's -overlay,
// and manifests in a copy of config/. A mutant counts as killed when the test that
// is named for it ran and failed; one that does not compile, whose text is not
// found, or whose test does not run is an error.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// mutant is one feature taken out.
type mutant struct {
	name string // what is missing
	file string
	old  string // must occur exactly once in the file
	new  string
	kind kind
	pkg  string // of the test
	test string // that must fail
}

// kind says what a mutant's test is run against.
type kind int

const (
	unit    kind = iota // nothing: go test with the overlay
	node                // a node without Kubernetes, with programs built from the mutated source
	control             // a real API server
	cluster             // a whole cluster, installed from images of the mutated source
)

func main() {
	only := flag.String("run", "", "only mutants whose name matches this regular expression")
	flag.Parse()
	pattern, err := regexp.Compile(*only)
	if err == nil {
		err = run(pattern)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(pattern *regexp.Regexp) error {
	root, err := os.Getwd()
	if err != nil {
		return err
	}
	killed, total := 0, 0
	for _, m := range slices.Concat(mutants, aggregated, gvisor, crossNode, stores) {
		if !pattern.MatchString(m.name) {
			continue
		}
		total++
		begun := time.Now()
		dead, err := m.try(root)
		switch {
		case err != nil:
			fmt.Printf("ERROR    %-60s %v\n", m.name, err)
		case dead:
			killed++
			fmt.Printf("killed   %-60s by %s in %.0f s\n", m.name, m.test, time.Since(begun).Seconds())
		default:
			fmt.Printf("SURVIVED %-60s %s passed without it\n", m.name, m.test)
		}
	}
	fmt.Printf("mutants: %d of %d killed\n", killed, total)
	if killed != total {
		return fmt.Errorf("%d of %d mutants were not killed", total-killed, total)
	}
	return nil
}

// try says whether the mutant's test fails.
func (m mutant) try(root string) (dead bool, err error) {
	dir, err := os.MkdirTemp(filepath.Join(root, "dist"), ".mutant-") // the dot keeps "./..." out of it
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	source, err := m.mutated(root)
	if err != nil {
		return false, err
	}
	var env []string
	var overlay []string
	if strings.HasPrefix(m.file, "config/") {
		if err := os.CopyFS(dir+"/config", os.DirFS(root+"/config")); err != nil {
			return false, err
		}
		if err := os.WriteFile(filepath.Join(dir, m.file), source, 0o644); err != nil {
			return false, err
		}
		env = append(env, "STASIS_CONFIG="+dir+"/config")
	} else {
		file, err := writeOverlay(dir, filepath.Join(root, m.file), source)
		if err != nil {
			return false, err
		}
		overlay = []string{"-overlay", file}
	}
	if m.kind == node || m.kind == cluster {
		if err := buildDist(root, dir, overlay); err != nil {
			return false, err
		}
		if m.kind == cluster {
			if err := buildImages(root, dir); err != nil {
				return false, err
			}
		}
		env = append(env, "STASIS_DIST="+dir)
		overlay = nil // the test itself is as it is
	}
	args := append([]string{"test", "-count=1", "-timeout=5m", "-run", "^" + m.test + "$"}, overlay...)
	cmd := exec.Command("go", append(args, "./"+m.pkg)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), env...)
	out, testErr := cmd.CombinedOutput()
	failed := bytes.Contains(out, []byte("--- FAIL: "+m.test+" "))
	if !failed && testErr != nil || bytes.Contains(out, []byte("no tests to run")) {
		return false, fmt.Errorf("%s did not run:\n%s", m.test, tail(out, 30))
	}
	return failed, nil
}

func (m mutant) mutated(root string) ([]byte, error) {
	source, err := os.ReadFile(filepath.Join(root, m.file))
	if err != nil {
		return nil, err
	}
	if n := bytes.Count(source, []byte(m.old)); n != 1 {
		return nil, fmt.Errorf("the text to take out occurs %d times in %s, not once", n, m.file)
	}
	return bytes.Replace(source, []byte(m.old), []byte(m.new), 1), nil
}

func writeOverlay(dir, file string, source []byte) (string, error) {
	replacement := filepath.Join(dir, "mutated.go")
	if err := os.WriteFile(replacement, source, 0o644); err != nil {
		return "", err
	}
	data, err := json.Marshal(map[string]map[string]string{"Replace": {file: replacement}})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, data, 0o644)
}

// buildImages makes the images that test/e2e installs, of what buildDist made.
func buildImages(root, dir string) error {
	context := filepath.Join(dir, "context")
	for from, to := range map[string]string{root + "/images": "images", root + "/dist/criu": "dist/criu", dir + "/bin": "dist/bin"} {
		if err := os.CopyFS(filepath.Join(context, to), os.DirFS(from)); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "images"), 0o755); err != nil {
		return err
	}
	for _, name := range []string{"agent", "controller"} {
		cmd := exec.Command(root+"/dist/bin/images", "-f", root+"/images/Dockerfile."+name, "-t", "localhost/stasis-"+name+":dev",
			"-o", filepath.Join(dir, "images", "stasis-"+name+".tar"), context)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building the image of the %s: %w\n%s", name, err, tail(out, 10))
		}
	}
	for _, name := range []string{"stasis-demo.tar", "stasis-e2e.tar", "stasis-objects.tar"} { // what is tested stays as it is
		if err := os.Symlink(root+"/dist/images/"+name, filepath.Join(dir, "images", name)); err != nil {
			return err
		}
	}
	return nil
}

// buildDist makes what test/cri installs and the images hold, from the mutated
// source.
func buildDist(root, dir string, overlay []string) error {
	for _, name := range []string{"stasis-agent", "stasis-restore", "stasis-controller"} {
		args := append([]string{"build", "-trimpath", "-o", dir + "/bin/" + name}, overlay...)
		cmd := exec.Command("go", append(args, "./cmd/"+name)...)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("it does not compile: %w\n%s", err, tail(out, 10))
		}
	}
	// Of what is in C the mutants are of kind unit.
	return errors.Join(os.Link(root+"/dist/bin/stasis-runtime", dir+"/bin/stasis-runtime"), os.Symlink(root+"/dist/criu", dir+"/criu"))
}

func tail(out []byte, lines int) string {
	all := strings.Split(strings.TrimSpace(string(out)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
