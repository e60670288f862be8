package main

import (
	"strings"
	"testing"
)

var counter = &app{Same: []string{"nonce"}, Grows: []string{"count"}, Curve: true}

func parsed(t *testing.T, text string) state {
	t.Helper()
	s, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := counter.lacks(s); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAStateThatFollowsFromAnotherIsTakenAndOthersAreNot(t *testing.T) {
	before := parsed(t, "nonce=x\ncount=10\ncurve=1 a\ncurve=2 b\n")
	for _, c := range []struct{ what, text, want string }{
		{"it went on", "nonce=x\ncount=11\ncurve=1 a\ncurve=2 b\ncurve=3 c\n", ""},
		{"it stands", "nonce=x\ncount=10\ncurve=1 a\ncurve=2 b\n", ""},
		{"it began anew", "nonce=y\ncount=11\ncurve=1 a\ncurve=2 b\n", "nonce was x and is y"},
		{"it went back", "nonce=x\ncount=9\ncurve=1 a\ncurve=2 b\n", "count went back from 10 to 9"},
		{"it lost a point", "nonce=x\ncount=11\ncurve=1 a\n", "point 2"},
		{"it changed a point", "nonce=x\ncount=11\ncurve=1 z\ncurve=2 b\n", "point 1"},
	} {
		err := counter.follows(parsed(t, c.text), before)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.what, err, c.want)
		}
	}
	if counter.stalled(before, before) == nil {
		t.Error("a count that stands is taken for one that rises")
	}
	if err := counter.stalled(parsed(t, "nonce=x\ncount=11\ncurve=1 a\n"), before); err != nil {
		t.Error(err)
	}
}

func TestAStateThatSaysNothingIsNone(t *testing.T) {
	for _, text := range []string{"", "nonce=x\n", "nonce=x\ncount=\ncurve=1 a\n", "nonce=x\ncount=many\ncurve=1 a\n", "nonce=x\ncount=1\n"} {
		s, err := parse(text)
		if err == nil {
			err = counter.lacks(s)
		}
		if err == nil {
			t.Errorf("%q was taken for a state", text)
		}
	}
	for _, text := range []string{"wrong=the connection is gone\n", "a line\n"} {
		if _, err := parse(text); err == nil {
			t.Errorf("%q was taken for a state", text)
		}
	}
}

func TestACurveIsComparedWithAllOfAnUninterruptedOne(t *testing.T) {
	whole := map[string]string{"1": "a", "2": "b", "3": "c"}
	if err := deviates(map[string]string{"1": "a", "2": "b"}, whole); err != nil {
		t.Error(err)
	}
	for _, curve := range []map[string]string{{"1": "a", "2": "z"}, {"1": "a", "4": "d"}, {"1": "a", "2": "b", "3": "c", "4": "d"}} {
		if deviates(curve, whole) == nil {
			t.Errorf("%v was taken for a part of %v", curve, whole)
		}
	}
}

func TestAllApplicationsCanBeReadAndSixAreQuick(t *testing.T) {
	all, err := load("apps", nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 10 {
		t.Errorf("there are %d applications", len(all))
	}
	quick, err := load("apps", nil, true)
	if err != nil || len(quick) < 6 {
		t.Errorf("%d are quick, %v", len(quick), err)
	}
	if _, err := load("apps", []string{"redis", "nosuch"}, false); err == nil || !strings.Contains(err.Error(), "nosuch") {
		t.Errorf("an application that is not there: %v", err)
	}
}
