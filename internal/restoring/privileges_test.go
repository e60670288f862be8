package restoring_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestAContainerWhoseImagesGiveItMoreThanItMayHaveIsRefused(t *testing.T) {
	f := &fakes{source: data(t)}
	s := newSessions(t, f, t.TempDir())
	create(s, fromC1)
	f.exceeded = errors.New("process 1 (sh) has uid 0, the container's configuration has user 1000")
	a := container(s, "a")
	if a.Error == nil || a.Action != "" || a.Container != nil || !strings.Contains(a.Error.Message, "uid 0") {
		t.Fatalf("the answer is %+v", a)
	}
	if !slices.ContainsFunc(f.told, func(what string) bool { return strings.Contains(what, "uid 0") }) {
		t.Errorf("told was %q", f.told)
	}
	f.exceeded = nil
	if a := container(s, "a"); a.Error != nil || len(a.Container.Volumes) != 1 {
		t.Errorf("with other images: %+v", a)
	}
}
