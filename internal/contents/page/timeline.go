package page

import (
	"time"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// timeline is the phases of a checkpoint, in three parts: the Pod runs, stands still,
// runs again.
type timeline struct {
	Before, Window, After []phase
	// Grow says how wide each part is, and how wide a phase is in its part.
	BeforeGrow, WindowGrow, AfterGrow float64
	// Frozen is how long the Pod stood still.
	Frozen string
}

type phase struct {
	Name, Duration, Class string
	Grow                  float64
}

func newTimeline(c *api.CheckpointContents) *timeline {
	if len(c.Phases) == 0 {
		return nil
	}
	t := &timeline{}
	if c.FreezeDuration != nil {
		t.Frozen = milliseconds(c.FreezeDuration.Duration)
	}
	sum := time.Duration(0)
	for _, p := range c.Phases {
		sum += max(p.Duration.Duration, 0)
	}
	part, grow := &t.Before, &t.BeforeGrow
	for _, p := range c.Phases {
		class := "phase"
		switch p.Name {
		case "freeze", "capture", "thaw":
			part, grow, class = &t.Window, &t.WindowGrow, "phase "+p.Name
		default:
			if len(t.Window) > 0 {
				part, grow = &t.After, &t.AfterGrow
			}
		}
		share := 1.0
		if sum > 0 {
			share = max(float64(p.Duration.Duration)/float64(sum)*1000, 1)
		}
		*part = append(*part, phase{Name: show(p.Name), Duration: milliseconds(p.Duration.Duration), Class: class, Grow: share})
		*grow += share
	}
	return t
}
