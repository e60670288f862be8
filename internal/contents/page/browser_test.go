package page_test

import (
	"bytes"
	"context"
	"encoding/json"
	"html"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// measured is what probe.js finds in a page as the browser laid it out.
type measured struct {
	Title                            string
	Scripts, Images, Handlers, Links int
	Owned                            bool
	Sections                         []string
	Rows                             map[string]int // of tables, by class
	Bars                             []bar
	Overflow                         float64 // pixels that the page is wider than the window
	Unnamed                          []string
	LowContrast                      []string
	Dark                             bool
}

// bar is a bar of segments, in pixels.
type bar struct {
	Class           string
	Width, Sum, Min float64
	Colours         int
}

// saysNothing opens a page as it was written: the console must stay empty.
func saysNothing(t *testing.T, page []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "page.html")
	must(t, os.WriteFile(file, page, 0o600))
	if _, console := chromium(t, file); len(console) > 0 {
		t.Errorf("the browser says:\n%s", strings.Join(console, "\n"))
	}
}

// browse measures a page in a headless Chromium, by a script that is put in and that the
// page itself forbids.
func browse(t *testing.T, page []byte, flags ...string) measured {
	t.Helper()
	script, err := os.ReadFile("testdata/probe.js")
	must(t, err)
	open := bytes.Replace(page, []byte(`<meta http-equiv="Content-Security-Policy" content="default-src 'none';`), []byte(`<meta name="was-policy" content="`), 1)
	if bytes.Equal(open, page) {
		t.Error("the page forbids nothing")
	}
	open = bytes.Replace(open, []byte("</body>"), []byte("<script>"+string(script)+"</script></body>"), 1)
	probed := filepath.Join(t.TempDir(), "probed.html")
	must(t, os.WriteFile(probed, open, 0o600))
	dom, console := chromium(t, probed, flags...)
	_, text, _ := strings.Cut(dom, `<pre id="measured">`)
	text, _, ok := strings.Cut(text, "</pre>")
	var m measured
	if !ok || json.Unmarshal([]byte(html.UnescapeString(text)), &m) != nil {
		t.Fatalf("nothing was measured: %s\n%s", text, strings.Join(console, "\n"))
	}
	return m
}

// chromium returns the document as the browser has it, and what was said on its console.
func chromium(t *testing.T, file string, flags ...string) (dom string, console []string) {
	t.Helper()
	if testing.Short() {
		t.Skip("a browser takes seconds")
	}
	program, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal("there is no chromium here: run hack/deps.sh, or the tests with -short")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	args := append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
		"--user-data-dir=" + t.TempDir(), "--enable-logging=stderr", "--window-size=1240,2000", "--dump-dom"}, flags...)
	cmd := exec.CommandContext(ctx, program, append(args, "file://"+file)...)
	cmd.WaitDelay = 10 * time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, stderr.Bytes())
	}
	for line := range strings.Lines(stderr.String()) {
		if strings.Contains(line, "CONSOLE") {
			console = append(console, strings.TrimSpace(line))
		}
	}
	return stdout.String(), console
}
