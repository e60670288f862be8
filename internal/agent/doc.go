// Package agent is the node's daemon, the part that KEP-5823 gives to the
// kubelet. It joins PodCheckpoint objects of its node with sandboxes of the
// container runtime, has them checkpointed over the CRI, owns the directory that
// the checkpoints are in, writes the outcome to the object, and answers, for
// Pods that restore, which checkpoint they may be restored from.
//
// What survives a crash of the agent is on disk: an operation that has no record
// did not happen (its partial directory is removed and its object ends as
// CheckpointFailed), one that has a record did (it is completed and its outcome
// written).
package agent
