package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// StoreVerification is posted to checkpointstores/verify, or to podcheckpoints/verify:
// all that a store holds, or one checkpoint in it, is read and compared with its digests.
// The answer comes when that is done, or else after some 20 seconds with what has been
// read so far: posted again, it waits on for the same verification.
//
// +kubebuilder:object:root=true
// +k8s:openapi-gen=true
type StoreVerification struct {
	metav1.TypeMeta `json:",inline"`
	// metadata is not stored.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// status is what was found, filled in by the answer.
	// +optional
	Status StoreVerificationStatus `json:"status,omitempty"`
}

// StoreVerificationStatus is what a verification has found.
//
// +k8s:openapi-gen=true
type StoreVerificationStatus struct {
	// storeName names the CheckpointStore, and storeID the store itself.
	// +optional
	StoreName string `json:"storeName,omitempty"`
	// +optional
	StoreID string `json:"storeID,omitempty"`
	// startTime is when the verification began.
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// completionTime is when it ended. Unset: it goes on.
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// checkpoints is how many were looked at.
	Checkpoints int32 `json:"checkpoints"`
	// verifiedBytes were read and found right.
	VerifiedBytes int64 `json:"verifiedBytes"`
	// problems name what is corrupt or missing, at most 100 of them.
	// +optional
	// +listType=atomic
	Problems []StoreProblem `json:"problems,omitempty"`
	// problemCount is how many there are.
	// +optional
	ProblemCount int32 `json:"problemCount,omitempty"`
}

// StoreProblem is a fault of a checkpoint in a store. It cannot be restored.
//
// +k8s:openapi-gen=true
type StoreProblem struct {
	// checkpointID names the checkpoint in the store.
	CheckpointID string `json:"checkpointID"`
	// podCheckpoint is NAMESPACE/NAME of what it was of, if that can still be read.
	// +optional
	PodCheckpoint string `json:"podCheckpoint,omitempty"`
	// message says which object is not as it was written, and how.
	Message string `json:"message"`
}

// StoreCollection is posted to checkpointstores/collect: what no checkpoint uses is looked
// for and, unless the request is a dry run, marked; what was marked before, long enough
// ago, is removed. It is answered as a StoreVerification is.
//
// +kubebuilder:object:root=true
// +k8s:openapi-gen=true
type StoreCollection struct {
	metav1.TypeMeta `json:",inline"`
	// metadata is not stored.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// status is what was found and done, filled in by the answer.
	// +optional
	Status StoreCollectionStatus `json:"status,omitempty"`
}

// StoreCollectionStatus is what a collection has found and done.
//
// +k8s:openapi-gen=true
type StoreCollectionStatus struct {
	// storeName names the CheckpointStore, and storeID the store itself.
	// +optional
	StoreName string `json:"storeName,omitempty"`
	// +optional
	StoreID string `json:"storeID,omitempty"`
	// startTime is when the collection began.
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`
	// completionTime is when it ended. Unset: it goes on.
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	// dryRun says that nothing was changed.
	// +optional
	DryRun bool `json:"dryRun,omitempty"`
	// checkpoints is how many the store holds.
	Checkpoints int32 `json:"checkpoints"`
	// writers is how many agents are writing to it.
	Writers int32 `json:"writers"`
	// bytes is what it held.
	Bytes int64 `json:"bytes"`
	// unusedBytes are used by no checkpoint and stay for now: for as long as the grace
	// lasts, and until those who were writing when they were found have ended.
	UnusedBytes int64 `json:"unusedBytes"`
	// removedBytes were removed; by a dry run, would have been.
	RemovedBytes int64 `json:"removedBytes"`
}
