package house

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// tested are the documents that say which test shows what.
var tested = []string{"kep-5823.md", "kep-5901.md", "runbook.md", "security.md"}

var (
	testLink = regexp.MustCompile("\\[`(Test\\w+)`\\]\\(\\.\\./([^)]+_test\\.go)\\)")
	testName = regexp.MustCompile(`\bTest[A-Z]\w{8,}`)
	mdLink   = regexp.MustCompile(`\]\(([^):\s]+)\)`)
)

func TestEveryTestThatADocumentNamesExists(t *testing.T) {
	for _, name := range tested {
		text := document(t, name)
		links := testLink.FindAllStringSubmatch(text, -1)
		if len(links) < 10 {
			t.Errorf("docs/%s names %d tests", name, len(links))
		}
		files := map[string]string{}
		for _, l := range links {
			if _, read := files[l[2]]; !read {
				content, err := os.ReadFile("../../" + l[2])
				if err != nil {
					t.Errorf("docs/%s: %v", name, err)
				}
				files[l[2]] = string(content)
			}
			if !strings.Contains(files[l[2]], "\nfunc "+l[1]+"(t *testing.T)") {
				t.Errorf("docs/%s: %s has no test %s", name, l[2], l[1])
			}
		}
		if rest := testName.FindAllString(testLink.ReplaceAllString(text, ""), -1); len(rest) > 0 {
			t.Errorf("docs/%s names tests without their file: %v", name, rest)
		}
	}
}

func TestLinksBetweenDocumentsLeadSomewhere(t *testing.T) {
	documents, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range documents {
		name := filepath.Base(path)
		for _, link := range mdLink.FindAllStringSubmatch(document(t, name), -1) {
			file, part, _ := strings.Cut(link[1], "#")
			if file == "" {
				file = name
			}
			target := filepath.Join("../../docs", file)
			if _, err := os.Stat(target); err != nil {
				t.Errorf("docs/%s links to %s: %v", name, link[1], err)
				continue
			}
			if part != "" && !slices.Contains(anchors(t, target), part) {
				t.Errorf("docs/%s links to %s, and there is no such part", name, link[1])
			}
		}
	}
}

// A row of a table has as many cells as its head; one too many is most often an
// unescaped bar.
func TestTablesOfDocumentsAreWhole(t *testing.T) {
	documents, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range documents {
		columns := 0
		for line := range strings.Lines(document(t, filepath.Base(path))) {
			line = strings.TrimSpace(line)
			if !strings.HasPrefix(line, "|") {
				columns = 0
				continue
			}
			cells := strings.Count(strings.ReplaceAll(line, `\|`, ""), "|")
			if columns == 0 {
				columns = cells
			}
			if cells != columns || !strings.HasSuffix(line, "|") {
				t.Errorf("docs/%s: %d cells, its table has %d: %s", filepath.Base(path), cells-1, columns-1, line)
			}
		}
	}
}

func document(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// anchors are what GitHub makes of a document's headings.
func anchors(t *testing.T, path string) (all []string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if title, heading := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); heading && strings.HasPrefix(line, "#") {
			all = append(all, anchor(title))
		}
	}
	return all
}

func anchor(title string) string {
	keep := regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(strings.ToLower(strings.TrimSpace(title)), "")
	return strings.ReplaceAll(keep, " ", "-")
}
