package criu

import (
	"testing"

	"podstasis.dev/stasis/internal/checkpoint"
)

func TestARuntimeThatTellsCRIUOfConnectionsNobodyAcceptedIsToldToLeaveThemOut(t *testing.T) {
	for version, want := range map[checkpoint.Program]bool{
		{Name: "runc", Version: "1.5.2"}:      true,
		{Name: "runc", Version: "1.3.0-rc.1"}: true,
		{Name: "runc", Version: "2.0.0"}:      true,
		{Name: "runc", Version: "1.2.6"}:      false, // has no such flag
		{Name: "runc", Version: "unknown"}:    true,
		{Name: "crun", Version: "1.21"}:       false,
		{Name: "crun", Version: "unknown"}:    false,
	} {
		if got := tellsOfInFlight(version); got != want {
			t.Errorf("%s %s: %t", version.Name, version.Version, got)
		}
	}
}
