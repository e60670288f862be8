package platform

import "testing"

func TestMajorAndMinorAreReadOfVersionsAsProgramsWriteThem(t *testing.T) {
	for text, want := range map[string]string{
		"4.2.1": "4.2", "3.17": "3.17", "v2.4.1": "2.4", "1.3.0-rc.1": "1.3", "6.12-amd64": "6.12", "6.1-rc3": "6.1", "6.12+deb13": "6.12", "10.0~rc": "10.0",
	} {
		if v, err := ParseVersion(text); err != nil || v.String() != want {
			t.Errorf("%q: %v, %v, want %s", text, v, err, want)
		}
	}
	for _, text := range []string{"", "4", "v", "4.", ".2", "4.x", "-1.2", "4.-2", "unknown", "release-20260901.0", "99999999999.0"} {
		if v, err := ParseVersion(text); err == nil {
			t.Errorf("%q: %v", text, v)
		}
	}
}

func TestVersionsAreComparedByNumbers(t *testing.T) {
	for _, c := range []struct {
		a, b  Version
		older bool
	}{
		{Version{3, 17}, Version{4, 1}, true},
		{Version{4, 0}, Version{4, 1}, true},
		{Version{4, 1}, Version{4, 1}, false},
		{Version{4, 2}, Version{4, 10}, true},
		{Version{10, 0}, Version{4, 1}, false},
	} {
		if got := c.a.Older(c.b); got != c.older {
			t.Errorf("%v before %v: %t", c.a, c.b, got)
		}
	}
}
