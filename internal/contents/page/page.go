// Package page writes what is inside a checkpoint as one self-contained HTML page.
//
// The page has no script at all and forbids itself to load anything. What it shows may
// come from anywhere: html/template escapes all of it, and characters that do not show
// are spelt out.
package page

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"time"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
)

//go:embed page.html
var pageHTML string

//go:embed page.css
var pageCSS string

// Options of Write.
type Options struct {
	// Made is when the page is made, for its last line; zero leaves it out.
	Made time.Time
}

// Write writes the page: it needs no script, no network and no other file.
func Write(w io.Writer, c *api.CheckpointContents, o Options) error {
	t, err := template.New("page").Parse(pageHTML)
	if err != nil {
		return fmt.Errorf("page: %w", err)
	}
	v := newView(c, o)
	v.Style = template.CSS(pageCSS) // ours, not the checkpoint's
	if err := t.Execute(w, v); err != nil {
		return fmt.Errorf("write page: %w", err)
	}
	return nil
}
