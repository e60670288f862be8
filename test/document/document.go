// Package document writes what was measured into the project's documents, between two lines
// of them.
package document

import (
	"fmt"
	"os"
	"strings"
)

const end = "<!-- end of what is written -->\n"

// mark is the line that comes before what a command writes.
func mark(command string) string {
	return "<!-- from here to the end mark: written by " + command + " -->\n"
}

// Update replaces what a command has written into a document before.
func Update(file, command, with string) error {
	before, _, after, err := parts(file, command)
	if err != nil {
		return err
	}
	return os.WriteFile(file, []byte(before+mark(command)+with+end+after), 0o644)
}

// Written is what a command has written into a document.
func Written(file, command string) (string, error) {
	_, written, _, err := parts(file, command)
	return written, err
}

func parts(file, command string) (before, written, after string, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", "", "", err
	}
	before, rest, begins := strings.Cut(string(text), mark(command))
	written, after, ends := strings.Cut(rest, end)
	if !begins || !ends {
		return "", "", "", fmt.Errorf("%s lacks the lines between which tables are written: %q and %q", file, mark(command), end)
	}
	return before, written, after, nil
}
