package node

import (
	"slices"
	"testing"
)

func TestMountPointsAreReadWithTheirEscapes(t *testing.T) {
	table := "22 27 0:21 / /proc rw,relatime - proc proc rw\n" +
		`23 27 0:4 mnt:[1] /a\040b/with\134slash\011tab rw shared:1 - nsfs nsfs rw` + "\n"
	if got, want := parseMountPoints(table), []string{"/proc", "/a b/with\\slash\ttab"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestPathsInOverlayOptionsAreEscaped(t *testing.T) {
	if got, want := overlayPath(`/a:b,c\d`), `/a\:b\,c\\d`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
