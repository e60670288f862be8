package engine

import "time"

// Stage is how far a checkpoint is, for those who watch.
type Stage struct {
	Name string
	// Frozen is how long the Pod stood still, once it runs again.
	Frozen time.Duration
}

// Names of stages, in order. An attempt that is repeated begins with the first.
const (
	StageFreezing  = "freezing"
	StageCapturing = "capturing"
	StageStoring   = "storing"
)
