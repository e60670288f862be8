package nodeapi

import "time"

// IdentityPath is the file of a restored container that holds its Identity, from the
// root of its file system. A container that was started has none.
const IdentityPath = "etc/stasis/identity.json"

// IdentitySize is how long the file is, always: it ends with line breaks. An engine
// does not open again a file that has another length than it had, and a restored Pod
// that has it open can be checkpointed, too.
const IdentitySize = 4096

// Identity is who a restored container is now, for the application in it: all that
// it remembers of itself is its source's. It is part of what users see: names are
// added, and none changes.
type Identity struct {
	PodName      string `json:"podName"`
	PodNamespace string `json:"podNamespace"`
	PodUID       string `json:"podUID"`
	// PodIPs are empty for a Pod in its node's network.
	PodIP     string   `json:"podIP,omitempty"`
	PodIPs    []string `json:"podIPs,omitempty"`
	NodeName  string   `json:"nodeName,omitempty"`
	Container string   `json:"container"`
	// Checkpoint is the PodCheckpoint; it has no name where RestorePod of the CRI was
	// called.
	CheckpointName string `json:"checkpointName,omitempty"`
	CheckpointUID  string `json:"checkpointUID,omitempty"`
	// CutTime is the moment that the state is of; RestoredAt is when the container was
	// made, before it ran.
	CutTime    time.Time `json:"cutTime,omitzero"`
	RestoredAt time.Time `json:"restoredAt"`
	// Source is the Pod that was captured.
	Source IdentitySource `json:"source,omitzero"`
}

// IdentitySource is who the container was.
type IdentitySource struct {
	PodName      string   `json:"podName,omitempty"`
	PodNamespace string   `json:"podNamespace,omitempty"`
	PodUID       string   `json:"podUID,omitempty"`
	PodIPs       []string `json:"podIPs,omitempty"`
}
