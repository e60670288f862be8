package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// PodCheckpointRequest is what is posted to pods/checkpoint (KEP-5901): take a
// checkpoint of the Pod of that name, and what has come of it.
//
// A PodCheckpoint is created, and the call waits for its end, for spec.waitSeconds
// at most. It ends sooner when the client goes away; the checkpoint goes on.
// Posted again with the same checkpointName for the same Pod, it waits for the
// PodCheckpoint that is there.
//
// +kubebuilder:object:root=true
// +k8s:openapi-gen=true
type PodCheckpointRequest struct {
	metav1.TypeMeta `json:",inline"`
	// metadata is not stored. name and namespace, if set, are those of the Pod in
	// the request's path.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec says what to capture, and how.
	// +optional
	Spec PodCheckpointRequestSpec `json:"spec,omitempty"`

	// status is what has come of it, filled in by the answer.
	// +optional
	Status PodCheckpointRequestStatus `json:"status,omitempty"`
}

// PodCheckpointRequestSpec says what to capture of a Pod, and how.
//
// +k8s:openapi-gen=true
type PodCheckpointRequestSpec struct {
	// checkpointName is the name of the PodCheckpoint to create. Empty: the Pod's
	// name and a random suffix.
	// +optional
	CheckpointName string `json:"checkpointName,omitempty"`

	// sourcePodUID, if set, is the UID that the Pod must have.
	// +optional
	SourcePodUID *types.UID `json:"sourcePodUID,omitempty"`

	// containers selects containers; empty means all. A checkpoint of some is for
	// forensics and cannot be restored as a Pod.
	// +optional
	// +listType=set
	Containers []string `json:"containers,omitempty"`

	// timeoutSeconds bounds the checkpoint itself. Unset or 0 means 120 seconds.
	// +optional
	TimeoutSeconds *int32 `json:"timeoutSeconds,omitempty"`

	// options are passed to the engine, which refuses those it does not know.
	// +optional
	Options map[string]string `json:"options,omitempty"`

	// storeName names the CheckpointStore that the checkpoint is kept in. Empty: it
	// stays on its node.
	// +optional
	StoreName string `json:"storeName,omitempty"`

	// waitSeconds is how long this call waits for the checkpoint's end: 0 to 50.
	// Unset means 50. Kubernetes ends ordinary calls after 60 seconds.
	// +optional
	WaitSeconds *int32 `json:"waitSeconds,omitempty"`
}

// PodCheckpointRequestStatus is what has come of a request when it is answered.
//
// +k8s:openapi-gen=true
type PodCheckpointRequestStatus struct {
	// checkpointName and checkpointUID are the PodCheckpoint's, to be watched.
	// +optional
	CheckpointName string `json:"checkpointName,omitempty"`
	// +optional
	CheckpointUID types.UID `json:"checkpointUID,omitempty"`

	// nodeName is the node that the checkpoint is taken on.
	// +optional
	NodeName string `json:"nodeName,omitempty"`

	// checkpointLocation says where the data are, once Ready.
	// +optional
	CheckpointLocation *checkpointv1alpha1.CheckpointSource `json:"checkpointLocation,omitempty"`

	// freezeDuration is how long the Pod's processes stood still.
	// +optional
	FreezeDuration *metav1.Duration `json:"freezeDuration,omitempty"`

	// size is how large the checkpoint is.
	// +optional
	Size *checkpointv1alpha1.CheckpointSize `json:"size,omitempty"`

	// store says where in its CheckpointStore the checkpoint is, once Ready.
	// +optional
	Store *checkpointv1alpha1.StoredCheckpoint `json:"store,omitempty"`

	// warnings are the PodCheckpoint's: what will not come back as it was.
	// +optional
	// +listType=atomic
	Warnings []string `json:"warnings,omitempty"`

	// ready is the PodCheckpoint's condition Ready at the moment of the answer.
	// +optional
	Ready *metav1.Condition `json:"ready,omitempty"`

	// preflight is what the checkpoint would meet, for a dry run.
	// +optional
	Preflight *CheckpointPreflight `json:"preflight,omitempty"`
}

// CheckpointPreflight is what a checkpoint of a Pod would meet now, looked for on its
// node without freezing it.
//
// +k8s:openapi-gen=true
type CheckpointPreflight struct {
	// unavailable says why the Pod's node was not asked. Nothing else is known then.
	// +optional
	Unavailable string `json:"unavailable,omitempty"`
	// problems are what the checkpoint would be refused for; each is enough.
	// +optional
	// +listType=atomic
	Problems []string `json:"problems,omitempty"`
	// warnings say what would not come back as it was.
	// +optional
	// +listType=atomic
	Warnings []string `json:"warnings,omitempty"`
	// estimatedSize is how large it would be.
	// +optional
	EstimatedSize *checkpointv1alpha1.CheckpointSize `json:"estimatedSize,omitempty"`
	// estimatedFreezeDuration is how long the Pod would stand still, by what this
	// node's checkpoints took lately.
	// +optional
	EstimatedFreezeDuration *metav1.Duration `json:"estimatedFreezeDuration,omitempty"`
	// capture says how its memory would be captured, where the engine has more than one way.
	// +optional
	Capture *checkpointv1alpha1.MemoryCapture `json:"capture,omitempty"`
	// freezeBudget is for how long it may, at most. None: as long as the timeout.
	// +optional
	FreezeBudget *metav1.Duration `json:"freezeBudget,omitempty"`
	// freezeBudgetReason is the probe that the budget is safe under, if one bounds it.
	// +optional
	FreezeBudgetReason string `json:"freezeBudgetReason,omitempty"`
	// hooks are what would be run around the checkpoint.
	// +optional
	// +listType=atomic
	Hooks []string `json:"hooks,omitempty"`
	// engine is what would capture the Pod.
	// +optional
	Engine string `json:"engine,omitempty"`
	// options are those that the engine knows; it refuses others.
	// +optional
	// +listType=atomic
	Options []EngineOption `json:"options,omitempty"`
}

// EngineOption is one that an engine knows, for spec.options.
//
// +k8s:openapi-gen=true
type EngineOption struct {
	// name is the option's.
	Name string `json:"name"`
	// values says what it takes: values separated by "|", or in words.
	Values string `json:"values"`
	// default says what holds without it.
	// +optional
	Default string `json:"default,omitempty"`
	// description says what it is for.
	// +optional
	Description string `json:"description,omitempty"`
}

// CheckpointContents is what podcheckpoints/contents answers: what is inside a
// checkpoint, as its node reads it from the engine's images. Values of environment
// variables are masked. Lists are bounded; truncated says which were cut.
//
// +kubebuilder:object:root=true
// +k8s:openapi-gen=true
type CheckpointContents struct {
	metav1.TypeMeta `json:",inline"`
	// metadata is the PodCheckpoint's name, namespace and UID.
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// source is the Pod that was captured, and where it ran.
	// +optional
	Source ContentsSource `json:"source,omitzero"`
	// engine captured the processes.
	Engine checkpointv1alpha1.EngineStatus `json:"engine"`
	// cutTime is the moment that the state is of.
	// +optional
	CutTime *metav1.MicroTime `json:"cutTime,omitempty"`
	// freezeDuration is how long the source stood still.
	// +optional
	FreezeDuration *metav1.Duration `json:"freezeDuration,omitempty"`
	// capture says how the memory was captured, where the engine has more than one way.
	// +optional
	Capture *checkpointv1alpha1.MemoryCapture `json:"capture,omitempty"`
	// phases says how long each phase took, in order.
	// +optional
	// +listType=atomic
	Phases []checkpointv1alpha1.PhaseTiming `json:"phases,omitempty"`
	// store says where in its CheckpointStore the checkpoint is, and what it shares there.
	// +optional
	Store *checkpointv1alpha1.StoredCheckpoint `json:"store,omitempty"`
	// containers, in the order of the manifest.
	// +listType=map
	// +listMapKey=name
	Containers []ContainerContents `json:"containers"`
	// volumes that were captured with the Pod.
	// +optional
	// +listType=map
	// +listMapKey=name
	Volumes []VolumeContents `json:"volumes,omitempty"`
	// truncated names the lists that were cut, as JSON paths.
	// +optional
	// +listType=atomic
	Truncated []string `json:"truncated,omitempty"`
}

// ContentsSource is the Pod that was captured, as its sandbox was called, and where
// it ran.
//
// +k8s:openapi-gen=true
type ContentsSource struct {
	// +optional
	PodNamespace string `json:"podNamespace,omitempty"`
	// +optional
	PodName string `json:"podName,omitempty"`
	// +optional
	PodUID string `json:"podUID,omitempty"`
	// podIPs that it had.
	// +optional
	// +listType=atomic
	PodIPs []string `json:"podIPs,omitempty"`
	// platform and kernel of its node: "linux/amd64 6.1.0".
	// +optional
	Platform string `json:"platform,omitempty"`
	// runtime that the engine drove: "runc 1.5.2".
	// +optional
	Runtime string `json:"runtime,omitempty"`
}

// ContainerContents is what is inside the checkpoint of one container.
//
// +k8s:openapi-gen=true
type ContainerContents struct {
	// name of the container.
	Name string `json:"name"`
	// image that it ran.
	// +optional
	Image string `json:"image,omitempty"`
	// imageBytes is the size of the engine's images, memory among them.
	ImageBytes int64 `json:"imageBytes"`
	// processes, parents before their children.
	// +optional
	// +listType=atomic
	Processes []Process `json:"processes,omitempty"`
	// sockets of the container's processes, each once.
	// +optional
	// +listType=atomic
	Sockets []Socket `json:"sockets,omitempty"`
	// mounts of the container.
	// +optional
	// +listType=atomic
	Mounts []Mount `json:"mounts,omitempty"`
	// changes of the root file system against its image.
	// +optional
	// +listType=atomic
	Changes []FileChange `json:"changes,omitempty"`
	// changedBytes is the size of all changed files.
	// +optional
	ChangedBytes int64 `json:"changedBytes,omitempty"`
	// notes say what could not be read, and which images were skipped.
	// +optional
	// +listType=atomic
	Notes []string `json:"notes,omitempty"`
}

// Process is one process of a container, with numbers as the container sees them.
//
// +k8s:openapi-gen=true
type Process struct {
	PID  int64 `json:"pid"`
	PPID int64 `json:"ppid"`
	// command is the name of its main thread (comm).
	Command string `json:"command"`
	// arguments are its command line.
	// +optional
	// +listType=atomic
	Arguments []string `json:"arguments,omitempty"`
	// state is "running", "stopped" or "zombie".
	State string `json:"state"`
	// threads is how many it has, the main one included.
	Threads int64 `json:"threads"`
	// threadNames are the names of the threads (comm), the main one's first.
	// +optional
	// +listType=atomic
	ThreadNames []string `json:"threadNames,omitempty"`
	UID         int64    `json:"uid"`
	GID         int64    `json:"gid"`
	// credentials say more of what it may do.
	// +optional
	Credentials *Credentials `json:"credentials,omitempty"`
	// addressSpace tells one run of a program from another: a digest of where its
	// code, stack, arguments and heap begin. Processes that were forked share it.
	// +optional
	AddressSpace string `json:"addressSpace,omitempty"`
	// executable is the path of the program.
	// +optional
	Executable string `json:"executable,omitempty"`
	// workingDirectory is a path within the container.
	// +optional
	WorkingDirectory string `json:"workingDirectory,omitempty"`
	// memory in bytes.
	Memory ProcessMemory `json:"memory"`
	// mappings are the biggest ones, by captured bytes.
	// +optional
	// +listType=atomic
	Mappings []Mapping `json:"mappings,omitempty"`
	// files that it has open.
	// +optional
	// +listType=atomic
	Files []OpenFile `json:"files,omitempty"`
	// environment of the process, values masked unless they were asked for.
	// +optional
	// +listType=atomic
	Environment []EnvironmentVariable `json:"environment,omitempty"`
}

// Credentials of a process's main thread.
//
// +k8s:openapi-gen=true
type Credentials struct {
	EffectiveUID int64 `json:"effectiveUID"`
	EffectiveGID int64 `json:"effectiveGID"`
	// groups are the supplementary ones.
	// +optional
	// +listType=atomic
	Groups []int64 `json:"groups,omitempty"`
	// capabilities that are effective: "CAP_NET_BIND_SERVICE".
	// +optional
	// +listType=atomic
	Capabilities []string `json:"capabilities,omitempty"`
	// noNewPrivileges says that no program that it starts gets more.
	// +optional
	NoNewPrivileges bool `json:"noNewPrivileges,omitempty"`
	// seccomp is "disabled", "strict" or "filter".
	// +optional
	Seccomp string `json:"seccomp,omitempty"`
}

// ProcessMemory sums up a process's memory, in bytes.
//
// +k8s:openapi-gen=true
type ProcessMemory struct {
	// virtual is the size of all mappings.
	Virtual int64 `json:"virtual"`
	// captured is what the checkpoint holds of it.
	Captured int64 `json:"captured"`
	// byKind splits captured by kind of mapping.
	// +optional
	ByKind map[string]int64 `json:"byKind,omitempty"`
}

// Mapping is a range of a process's address space.
//
// +k8s:openapi-gen=true
type Mapping struct {
	// start and end are addresses, in hexadecimal, end exclusive.
	Start string `json:"start"`
	End   string `json:"end"`
	// protection is as in /proc/PID/maps: "rw-p".
	Protection string `json:"protection"`
	// kind is "heap", "stack", "anonymous", "file", "shared", "vdso" or "other".
	Kind string `json:"kind"`
	// path is the file's, where one is mapped.
	// +optional
	Path string `json:"path,omitempty"`
	// capturedBytes is what the checkpoint holds of it.
	CapturedBytes int64 `json:"capturedBytes"`
}

// OpenFile is a file descriptor.
//
// +k8s:openapi-gen=true
type OpenFile struct {
	FD int64 `json:"fd"`
	// type is "regular", "directory", "pipe", "fifo", "socket", "eventpoll",
	// "eventfd", "timerfd", "signalfd", "inotify", "tty", "memfd", "character device"
	// or what the engine calls it.
	Type string `json:"type"`
	// path, or a description such as "tcp 0.0.0.0:80 listen".
	// +optional
	Path string `json:"path,omitempty"`
	// position in a regular file.
	// +optional
	Position int64 `json:"position,omitempty"`
	// flags are those of open(2) that matter: "O_RDWR|O_APPEND".
	// +optional
	Flags string `json:"flags,omitempty"`
}

// Socket of a container.
//
// +k8s:openapi-gen=true
type Socket struct {
	// family and type: "tcp", "tcp6", "udp", "udp6", "unix", "netlink", "packet".
	Protocol string `json:"protocol"`
	// state is "LISTEN", "ESTABLISHED" and so on.
	// +optional
	State string `json:"state,omitempty"`
	// local and remote are "address:port", or the name of a Unix socket.
	// +optional
	Local string `json:"local,omitempty"`
	// +optional
	Remote string `json:"remote,omitempty"`
	// pids of the processes that hold it.
	// +optional
	// +listType=atomic
	PIDs []int64 `json:"pids,omitempty"`
}

// Mount of a container.
//
// +k8s:openapi-gen=true
type Mount struct {
	Destination string `json:"destination"`
	Type        string `json:"type"`
	// +optional
	Source string `json:"source,omitempty"`
	// +optional
	// +listType=atomic
	Options []string `json:"options,omitempty"`
}

// FileChange is a difference of a root file system against its image.
//
// +k8s:openapi-gen=true
type FileChange struct {
	// path from the root of the file system.
	Path string `json:"path"`
	// change is "written", "removed" or "replaced" (a directory whose old contents
	// no longer show).
	Change string `json:"change"`
	// size in bytes of a regular file.
	// +optional
	Size int64 `json:"size,omitempty"`
	// mode as ls(1) shows it: "-rw-r--r--".
	// +optional
	Mode string `json:"mode,omitempty"`
	// modificationTime of what was written.
	// +optional
	ModificationTime *metav1.Time `json:"modificationTime,omitempty"`
	// digest of a regular file's content, where it was computed: of small files only.
	// +optional
	Digest string `json:"digest,omitempty"`
}

// EnvironmentVariable of a process.
//
// +k8s:openapi-gen=true
type EnvironmentVariable struct {
	Name string `json:"name"`
	// value is empty where it is masked.
	// +optional
	Value string `json:"value,omitempty"`
	// masked says that the value is left out, whatever it is.
	// +optional
	Masked bool `json:"masked,omitempty"`
}

// VolumeContents is what was captured of a volume.
//
// +k8s:openapi-gen=true
type VolumeContents struct {
	Name string `json:"name"`
	// bytes of its archive.
	Bytes int64 `json:"bytes"`
	// files is how many entries it has.
	Files int64 `json:"files"`
}
