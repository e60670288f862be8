package v1alpha1

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// PodCheckpoint asks for a checkpoint of a running Pod and tells its outcome.
// It outlives its source Pod and any number of Pods can be restored from it (P6).
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:shortName=pcp,categories=all
// +kubebuilder:selectablefield:JSONPath=`.spec.sourcePodName`
// +kubebuilder:selectablefield:JSONPath=`.spec.nodeName`
// +kubebuilder:selectablefield:JSONPath=`.status.nodeName`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Pod",type=string,JSONPath=`.spec.sourcePodName`
// +kubebuilder:printcolumn:name="Node",type=string,JSONPath=`.status.nodeName`
// +kubebuilder:printcolumn:name="Size",type=string,JSONPath=`.status.size.logical`
// +kubebuilder:printcolumn:name="Frozen",type=string,JSONPath=`.status.freezeDuration`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 128",message="a PodCheckpoint's name has at most 128 characters, because the directory of its data is named after it"
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.status) || !has(oldSelf.status.conditions) || !oldSelf.status.conditions.exists(o, o.type == 'Ready' && (o.status == 'True' || o.reason in ['CheckpointFailed', 'SourcePodReplaced'])) || (has(self.status) && has(self.status.conditions) && self.status.conditions.exists(c, c.type == 'Ready' && oldSelf.status.conditions.exists(o, o.type == 'Ready' && o.status == c.status && o.reason == c.reason)))",message="condition Ready is terminal and does not change any more; create another PodCheckpoint"
type PodCheckpoint struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec says which Pod to checkpoint and how. It is immutable (P1).
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="spec is immutable; create another PodCheckpoint"
	Spec PodCheckpointSpec `json:"spec"`

	// status tells what was observed. The agent of spec.nodeName writes it; the
	// controller finalises what no agent owns.
	// +optional
	// +kubebuilder:validation:XValidation:rule="!has(self.conditions) || !self.conditions.exists(c, c.type == 'Ready' && c.status == 'True') || (has(self.nodeName) && size(self.nodeName) > 0 && has(self.sourcePodUID) && size(self.sourcePodUID) > 0 && has(self.checkpointLocation) && has(self.manifestDigest) && has(self.completionTime) && has(self.checkpointedPodTemplate))",message="a checkpoint that is Ready has nodeName, sourcePodUID, checkpointLocation, manifestDigest, completionTime and checkpointedPodTemplate"
	// +kubebuilder:validation:XValidation:rule="!has(oldSelf.conditions) || !oldSelf.conditions.exists(c, c.type == 'Ready' && c.status == 'True') || (self.nodeName == oldSelf.nodeName && self.sourcePodUID == oldSelf.sourcePodUID && self.checkpointLocation == oldSelf.checkpointLocation && self.manifestDigest == oldSelf.manifestDigest && has(self.store) == has(oldSelf.store) && (!has(self.store) || self.store == oldSelf.store))",message="what a Ready checkpoint is restored by does not change any more"
	Status PodCheckpointStatus `json:"status,omitempty"`
}

// PodCheckpointList is a list of PodCheckpoint objects.
//
// +kubebuilder:object:root=true
type PodCheckpointList struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []PodCheckpoint `json:"items"`
}

// PodCheckpointSpec says which Pod to checkpoint and how.
//
// +kubebuilder:validation:XValidation:rule="!has(self.import) || (!has(self.sourcePodUID) && !has(self.options))",message="a checkpoint that is imported has no sourcePodUID and no options: nothing is captured"
type PodCheckpointSpec struct {
	// sourcePodName names the running Pod to checkpoint, in this object's namespace (P2).
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`
	SourcePodName string `json:"sourcePodName"`

	// sourcePodUID, if set, pins one instance of the Pod: when the live Pod has
	// another UID the checkpoint ends with reason SourcePodReplaced and that Pod is
	// not touched.
	// +optional
	// +kubebuilder:validation:XValidation:rule="size(self) >= 1 && size(self) <= 128",message="sourcePodUID is 1 to 128 characters; leave it out to take the Pod of that name, whichever it is"
	SourcePodUID *types.UID `json:"sourcePodUID,omitempty"`

	// timeoutSeconds bounds the whole operation. Unset or 0 means 120 seconds.
	// +optional
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=3600
	TimeoutSeconds *int32 `json:"timeoutSeconds,omitempty"`

	// nodeName is the node that runs the source Pod. Admission sets it from the
	// Pod, whatever was written here; agents watch only their own (P5). Stasis'
	// addition to the KEP.
	// +optional
	// +kubebuilder:validation:MaxLength=253
	NodeName string `json:"nodeName,omitempty"`

	// containers selects the containers to checkpoint; empty means all of them.
	// A checkpoint of some is for forensics and cannot be restored as a Pod.
	// Stasis' addition to the KEP (KEP-5901).
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=64
	// +kubebuilder:validation:items:MaxLength=63
	Containers []string `json:"containers,omitempty"`

	// options are passed to the engine, which refuses those it does not know. All
	// engines know freezeBudget: for how long the Pod may stand still, as a duration
	// such as 500ms. It counts where it is less than what the Pod's liveness and
	// startup probes bear. CRIU knows capture: plain or cow, how memory is captured.
	// They must not hold secrets. Stasis' addition to the KEP.
	// +optional
	// +kubebuilder:validation:MaxProperties=32
	Options map[string]string `json:"options,omitempty"`

	// storeName names the CheckpointStore that the checkpoint is kept in, once it has
	// been captured; it is Ready when it is there. Unset, it stays on its node. Stasis'
	// addition to the KEP.
	// +optional
	// +kubebuilder:validation:MaxLength=63
	StoreName string `json:"storeName,omitempty"`

	// import, if set, makes this a checkpoint that is brought in instead of taken:
	// its archive is uploaded to podcheckpoints/archive of the aggregated API, to the
	// node in nodeName, or to one that admission chooses. sourcePodName is that of the
	// archive. Whoever creates it needs the verb import on podcheckpoints. Stasis'
	// addition to the KEP.
	// +optional
	Import *CheckpointImport `json:"import,omitempty"`
}

// CheckpointImport says which archive a checkpoint is made of.
type CheckpointImport struct {
	// digest of the whole archive: "sha256:" and 64 hexadecimal digits. What arrives
	// is not unpacked before it has been compared with it.
	// +kubebuilder:validation:Pattern=`^sha256:[0-9a-f]{64}$`
	Digest string `json:"digest"`
	// sizeBytes is how long the archive is.
	// +kubebuilder:validation:Minimum=1024
	// +kubebuilder:validation:Maximum=17592186044416
	SizeBytes int64 `json:"sizeBytes"`
}

// PodCheckpointStatus tells what was observed of the operation.
type PodCheckpointStatus struct {
	// nodeName is the node where the source Pod ran when it was checkpointed and
	// where the data are.
	// +optional
	NodeName string `json:"nodeName,omitempty"`

	// sourcePodUID is the UID of the Pod that was, or is being, checkpointed.
	// +optional
	SourcePodUID *types.UID `json:"sourcePodUID,omitempty"`

	// checkpointLocation says where the data are, once Ready.
	// +optional
	CheckpointLocation *CheckpointSource `json:"checkpointLocation,omitempty"`

	// manifestDigest is the digest of the checkpoint's manifest ("sha256:" and 64
	// hexadecimal digits), which holds the digests of everything else. A restore
	// checks it before it reads anything. Stasis' addition to the KEP.
	// +optional
	// +kubebuilder:validation:Pattern=`^sha256:[0-9a-f]{64}$`
	ManifestDigest string `json:"manifestDigest,omitempty"`

	// startTime is when the agent took the object up. Stasis' addition to the KEP.
	// +optional
	StartTime *metav1.Time `json:"startTime,omitempty"`

	// completionTime is when the checkpoint became Ready.
	// +optional
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`

	// checkpointedPodTemplate is metadata and spec of the source Pod as allocated,
	// without what is local to its node or its cluster. Restored Pods are compared
	// with it (P4, P21).
	// +optional
	// +kubebuilder:pruning:PreserveUnknownFields
	// +kubebuilder:validation:Schemaless
	// +kubebuilder:validation:Type=object
	CheckpointedPodTemplate *corev1.PodTemplateSpec `json:"checkpointedPodTemplate,omitempty"`

	// checkpointedContainers lists the regular containers that were captured.
	// +optional
	// +listType=map
	// +listMapKey=name
	CheckpointedContainers []PodCheckpointContainerStatus `json:"checkpointedContainers,omitempty"`

	// checkpointedInitContainers lists the init containers that had completed and
	// the sidecars that were captured running.
	// +optional
	// +listType=map
	// +listMapKey=name
	CheckpointedInitContainers []PodCheckpointContainerStatus `json:"checkpointedInitContainers,omitempty"`

	// engine is what captured the processes. Stasis' addition to the KEP.
	// +optional
	Engine *EngineStatus `json:"engine,omitempty"`

	// platform is the source node's operating system and architecture, such as
	// "linux/amd64". Stasis' addition to the KEP.
	// +optional
	Platform string `json:"platform,omitempty"`

	// requires is what a node must be to restore the checkpoint. Without it only the
	// node that holds the data can. Stasis' addition to the KEP.
	// +optional
	Requires *PlatformRequirements `json:"requires,omitempty"`

	// size is how large the checkpoint is. Stasis' addition to the KEP.
	// +optional
	Size *CheckpointSize `json:"size,omitempty"`

	// store says where in spec.storeName the checkpoint is, once Ready. Stasis' addition
	// to the KEP.
	// +optional
	Store *StoredCheckpoint `json:"store,omitempty"`

	// freezeDuration is how long the Pod's processes stood still. Stasis'
	// addition to the KEP.
	// +optional
	FreezeDuration *metav1.Duration `json:"freezeDuration,omitempty"`

	// earlierFreezes are those of attempts that came to nothing, because something went on
	// in the Pod that cannot be captured at that moment. Stasis' addition to the KEP.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	EarlierFreezes []EarlierFreeze `json:"earlierFreezes,omitempty"`

	// capture says how the memory of the processes was captured, where the engine has
	// more than one way. Stasis' addition to the KEP.
	// +optional
	Capture *MemoryCapture `json:"capture,omitempty"`

	// phases says how long each phase of the operation took, in order. Stasis'
	// addition to the KEP.
	// +optional
	// +listType=map
	// +listMapKey=name
	Phases []PhaseTiming `json:"phases,omitempty"`

	// warnings say what in the Pod will not come back as it was, or hardly, as it was
	// seen before the checkpoint. Stasis' addition to the KEP.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MaxLength=1024
	Warnings []string `json:"warnings,omitempty"`

	// conditions holds "Ready", the only truth on progress (P3).
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// PodCheckpointContainerStatus names a container of the checkpoint.
type PodCheckpointContainerStatus struct {
	// name of the container.
	Name string `json:"name"`
	// image that it ran.
	Image string `json:"image"`
}

// EngineStatus names what captured the processes.
//
// +k8s:openapi-gen=true
type EngineStatus struct {
	// name of the engine, such as "criu".
	Name string `json:"name"`
	// version that the engine gave of itself.
	Version string `json:"version"`
}

// PlatformRequirements is what the processes of a checkpoint ran on. A node can
// restore it that is of the same architecture, whose CPU has these features, and
// whose kernel and engine are not older.
type PlatformRequirements struct {
	// os and architecture as Go names them, such as "linux" and "amd64".
	// +kubebuilder:validation:MaxLength=128
	OS string `json:"os"`
	// +kubebuilder:validation:MaxLength=128
	Architecture string `json:"architecture"`
	// kernel is the release of the kernel, such as "6.1.0-35-amd64".
	// +kubebuilder:validation:MaxLength=128
	Kernel string `json:"kernel"`
	// cpuFeatures are instruction sets, by the kernel's names in /proc/cpuinfo.
	// +listType=atomic
	// +kubebuilder:validation:MaxItems=512
	// +kubebuilder:validation:items:MaxLength=128
	CPUFeatures []string `json:"cpuFeatures"`
	// xsaveFeatures are the components of a thread's registers, as bits of XCR0.
	// +optional
	XSaveFeatures int64 `json:"xsaveFeatures,omitempty"`
	// xsaveBytes is the room that they take.
	// +optional
	XSaveBytes int32 `json:"xsaveBytes,omitempty"`
	// engine captured the processes.
	Engine EngineStatus `json:"engine"`
	// formatVersion is that of the checkpoint's data.
	// +kubebuilder:validation:Minimum=1
	FormatVersion int32 `json:"formatVersion"`
}

// CheckpointSize is how large a checkpoint is.
//
// +k8s:openapi-gen=true
type CheckpointSize struct {
	// logical is the size of the captured state, as a quantity of bytes with a
	// binary suffix, such as "12Mi".
	Logical string `json:"logical"`
	// logicalBytes is the same in bytes.
	LogicalBytes int64 `json:"logicalBytes"`
}

// EarlierFreeze is one for an attempt that came to nothing, after which the Pod ran on.
//
// +k8s:openapi-gen=true
type EarlierFreeze struct {
	// duration is how long the Pod's processes stood still.
	Duration metav1.Duration `json:"duration"`
	// reason says why nothing came of it.
	// +kubebuilder:validation:MaxLength=1024
	Reason string `json:"reason"`
}

// MemoryCapture is how the memory of processes is captured.
//
// +k8s:openapi-gen=true
type MemoryCapture struct {
	// mode is the engine's word. CRIU's are "cow", read while the Pod runs from children
	// that its processes were made to fork, and "plain", written while it stands still.
	// +kubebuilder:validation:MaxLength=253
	Mode string `json:"mode"`
	// reason says why it is not the mode that the engine prefers.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Reason string `json:"reason,omitempty"`
}

// PhaseTiming is how long one phase took.
//
// +k8s:openapi-gen=true
type PhaseTiming struct {
	// name of the phase, such as "freeze".
	Name string `json:"name"`
	// duration of the phase.
	Duration metav1.Duration `json:"duration"`
}

// CheckpointSource says where a checkpoint's data are. The member that type
// names is set.
//
// +k8s:openapi-gen=true
// +union
// +kubebuilder:validation:XValidation:rule="self.type == 'NodeLocal' ? has(self.nodeLocal) : !has(self.nodeLocal)",message="nodeLocal is set exactly when type is NodeLocal"
type CheckpointSource struct {
	// type is the kind of place.
	// +unionDiscriminator
	Type CheckpointSourceType `json:"type"`

	// nodeLocal is set when the data are on the node that took the checkpoint.
	// +optional
	NodeLocal *NodeLocalCheckpointSource `json:"nodeLocal,omitempty"`
}

// CheckpointSourceType names a kind of place for checkpoint data.
//
// +kubebuilder:validation:Enum=NodeLocal
type CheckpointSourceType string

// CheckpointSourceTypeNodeLocal is the disk of the node in status.nodeName.
const CheckpointSourceTypeNodeLocal CheckpointSourceType = "NodeLocal"

// NodeLocalCheckpointSource locates data on the node that took the checkpoint.
//
// +k8s:openapi-gen=true
type NodeLocalCheckpointSource struct {
	// path is relative to the agent's checkpoint root, never an absolute host path
	// (P4); one that leads out of the root is refused.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	// +kubebuilder:validation:XValidation:rule="!self.startsWith('/') && !self.split('/').exists(p, p == '..')",message="path is relative to the checkpoint root"
	Path string `json:"path"`
}
