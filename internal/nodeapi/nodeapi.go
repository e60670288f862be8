// Package nodeapi is what stasis-restore (which the OCI runtime that the container
// runtime starts, stasis-runtime, becomes where a Pod restores) and stasis-agent say to
// each other: one JSON request and one JSON answer per connection, over a Unix socket that
// only root may use.
//
// It imports the standard library only: stasis-restore is started several times for each
// container that is restored and must cost milliseconds.
package nodeapi

import (
	"net/netip"
	"time"
)

// SocketPath is where the agent listens, as the container runtime's mount
// namespace sees it.
const SocketPath = "/run/stasis/agent.sock"

// RunscName is the name under which stasis-restore stands in for gVisor's runsc.
const RunscName = "stasis-runsc"

// AnnotationPrefix is the prefix of the Pod annotations that the restoring
// runtime handler passes to the OCI runtime.
const AnnotationPrefix = "checkpoint.podstasis.dev/"

// Sandbox names the Pod sandbox that a request is about, as the container
// runtime wrote it into the OCI spec.
type Sandbox struct {
	ID        string `json:"id"`        // the runtime's sandbox ID
	Namespace string `json:"namespace"` // the Pod's namespace
	Name      string `json:"name"`      // the Pod's name
	UID       string `json:"uid"`       // the Pod's UID
	// Annotations holds the Pod's annotations under AnnotationPrefix.
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Request is one question of stasis-runtime. Exactly one member is set.
type Request struct {
	CreateSandbox   *CreateSandbox   `json:"createSandbox,omitempty"`
	CreateContainer *CreateContainer `json:"createContainer,omitempty"`
	Checked         *Checked         `json:"checked,omitempty"`
	Report          *Report          `json:"report,omitempty"`
	Block           *Block           `json:"block,omitempty"`
}

// CreateSandbox asks, at the OCI create of a sandbox, whether the Pod may be
// restored. The answer's Action is ActionRestore or ActionOrdinary.
type CreateSandbox struct {
	Sandbox Sandbox `json:"sandbox"`
	// Engine is what the asking program can restore checkpoints of; empty means CRIU.
	Engine string `json:"engine,omitempty"`
	// EngineAnnotations are those of the sandbox's OCI spec that are its engine's.
	EngineAnnotations map[string]string `json:"engineAnnotations,omitempty"`
}

// CreateContainer asks, at the OCI create of a container, what to make of it.
type CreateContainer struct {
	Sandbox     Sandbox `json:"sandbox"`
	ContainerID string  `json:"containerID"`
	Container   string  `json:"container"` // the container's name in the Pod
	// Privileges are what the container's configuration gives to its processes. Without
	// them nothing is restored.
	Privileges *Privileges `json:"privileges,omitempty"`
	// Addresses of the sandbox's network, without those that every host has.
	Addresses []netip.Addr `json:"addresses,omitempty"`
	// AsksChecked says that the asking program knows ContainerRestore.Unchecked.
	AsksChecked bool `json:"asksChecked,omitempty"`
}

// Checked asks, when a container has been restored and stands still, whether all that it was
// restored from is what was written. The answer comes when that is known; an Error says
// that it is not, and that nothing of the container may be left.
type Checked struct {
	Sandbox   Sandbox `json:"sandbox"`
	Container string  `json:"container"`
}

// Privileges are the part of an OCI spec that restored processes must not exceed.
type Privileges struct {
	UID             uint32       `json:"uid"`
	GID             uint32       `json:"gid"`
	Groups          []uint32     `json:"groups,omitempty"`
	Capabilities    Capabilities `json:"capabilities"`
	NoNewPrivileges bool         `json:"noNewPrivileges"`
	Seccomp         bool         `json:"seccomp"` // there is a filter
	AppArmorProfile string       `json:"appArmorProfile,omitempty"`
	// Namespaces that are not those of the node, by the OCI spec's names.
	Namespaces []string `json:"namespaces,omitempty"`
}

// Capabilities are sets of names, such as CAP_CHOWN.
type Capabilities struct {
	Bounding  []string `json:"bounding,omitempty"`
	Permitted []string `json:"permitted,omitempty"`
}

// Report tells how the restore of one container went on. It may be lost with the
// agent that it is for: what has to be known lies in a Progress.
type Report struct {
	Sandbox   Sandbox     `json:"sandbox"`
	Container string      `json:"container,omitempty"`
	Stage     ReportStage `json:"stage"`
	// Message says why, for StageFailed.
	Message string `json:"message,omitempty"`
	// Milliseconds that the stage took.
	Milliseconds int64 `json:"milliseconds,omitempty"`
}

// Block asks for a part of a checkpoint that is still being brought to the node, while a
// Pod is restored from it: memory that is given to its processes. The answer comes when
// it is there, or after BlockWait.
type Block struct {
	Sandbox Sandbox `json:"sandbox"`
	// File is named as in the checkpoint, Block is its number in the list of digests.
	File  string `json:"file"`
	Block int    `json:"block"`
	// Urgent says that a process waits for it.
	Urgent bool `json:"urgent,omitempty"`
}

// BlockWait is how long the answer to a Block may take.
const BlockWait = 5 * time.Second

// ReportStage is how far a restore has come.
type ReportStage string

// The stages of a restore.
const (
	StageCreated ReportStage = "created" // the container exists and has not run an instruction
	StageStarted ReportStage = "started" // the container has been let go
	StageFailed  ReportStage = "failed"  // the container could not be restored
	StageDeleted ReportStage = "deleted" // the sandbox is gone: what was kept for it can go
	StageMemory  ReportStage = "memory"  // the memory that a container is given has come further, or was lost
)

// Action is what stasis-runtime is to do.
type Action string

// The actions. The zero value is none of them: stasis-runtime refuses it.
const (
	ActionOrdinary  Action = "ordinary"  // do what the OCI runtime would do
	ActionRestore   Action = "restore"   // restore it from the checkpoint
	ActionCompleted Action = "completed" // an init container that had completed: a process that exits 0
)

// Response is the agent's answer. When Error is set nothing may be started.
type Response struct {
	Error  *Error `json:"error,omitempty"`
	Action Action `json:"action,omitempty"`

	// Together names the containers of a sandbox that are let go together, at the
	// start of the last of them: none may change what another, still to be restored,
	// shares with it. Containers that it does not name go at their own start. For
	// ActionRestore of a sandbox.
	Together []string `json:"together,omitempty"`

	// Whole says how to restore the sandbox, for ActionRestore of one that its engine
	// restores as a whole.
	Whole *SandboxRestore `json:"whole,omitempty"`

	// Container says how to restore, for ActionRestore of a container.
	Container *ContainerRestore `json:"container,omitempty"`

	// Block says whether the block is there, for Block. An Error says that it cannot be
	// had.
	Block *BlockState `json:"block,omitempty"`
}

// BlockState is how far a block has come.
type BlockState struct {
	There bool `json:"there,omitempty"`
	// Trouble says what stands in its way for now, if anything does.
	Trouble string `json:"trouble,omitempty"`
}

// SandboxRestore says what a sandbox is restored from as a whole.
type SandboxRestore struct {
	// ImageDir holds the engine's images: an absolute path in the container runtime's
	// mount namespace.
	ImageDir string `json:"imageDir"`
	// Containers names those that are in it. None runs before all have been started.
	Containers []string `json:"containers"`
	// Background says that they may run before all their memory is in place.
	Background bool `json:"background,omitempty"`
}

// ContainerRestore says where a container's captured state is. Paths are
// absolute, in the container runtime's mount namespace.
type ContainerRestore struct {
	// ImageDir holds the engine's images; empty where the sandbox is restored as a whole.
	ImageDir string `json:"imageDir,omitempty"`
	// WorkDir is where the engine may write logs, and stasis-runtime keeps its
	// Progress.
	WorkDir string `json:"workDir"`
	// RootfsArchive is a tar of the captured writable layer; empty if there is none.
	RootfsArchive string `json:"rootfsArchive,omitempty"`
	// Volumes are to be filled before the container continues: those that no other
	// container has been restored with.
	Volumes []VolumeRestore `json:"volumes,omitempty"`
	// HoldDuring and HoldAfter are the TCP connections on which nothing may be said
	// while the container is being restored, and once it has been: the container of
	// their other end does not exist yet, and the kernel would end them for that.
	HoldDuring []Connection `json:"holdDuring,omitempty"`
	HoldAfter  []Connection `json:"holdAfter,omitempty"`
	// SysVIPC says what to make of the sandbox's System V IPC objects.
	SysVIPC SysVIPC `json:"sysvIPC,omitempty"`
	// LastPID is the highest process ID in the checkpoint of the Pod: where its containers
	// share a PID namespace, nobody else may take those up to it. 0 where that has been
	// seen to: once a container has been restored.
	LastPID int `json:"lastPID,omitempty"`
	// Lazy says that the processes are given their memory while they run. Which, is in
	// WorkDir.
	Lazy bool `json:"lazy,omitempty"`
	// Unchecked says that its memory is still being checked: as long as the agent has not
	// answered Checked, it is not there.
	Unchecked bool `json:"unchecked,omitempty"`
	// Published are names that volumes which the kubelet writes had in the source.
	Published []Published `json:"published,omitempty"`
	// FreezeHook is the program that the engine calls to keep the container frozen.
	FreezeHook string `json:"freezeHook"`
	// Identity is written to IdentityPath.
	Identity Identity `json:"identity"`
	// Path is the PATH under which the OCI runtime finds its engine.
	Path string `json:"path"`
}

// Connection is a TCP connection within the sandbox, by its two ends.
type Connection struct {
	A netip.AddrPort `json:"a"`
	B netip.AddrPort `json:"b"`
}

// SysVIPC is what becomes of the System V IPC objects (sysvipc(7)) that all containers
// of a sandbox share. The zero value is none of them.
type SysVIPC string

const (
	// SysVIPCCreate: no container has been restored yet. What a try that failed has left
	// is removed, the engine creates all.
	SysVIPCCreate SysVIPC = "create"
	// SysVIPCJoin: they are there, and the engine is to find them.
	SysVIPCJoin SysVIPC = "join"
	// SysVIPCKeep: they are there, and the engine has nothing to do with them.
	SysVIPCKeep SysVIPC = "keep"
)

// VolumeRestore is one volume to fill.
type VolumeRestore struct {
	Archive     string `json:"archive"`     // tar of the captured contents
	Destination string `json:"destination"` // where the asking container mounts it
}

// Published is a directory of files that the kubelet had written for the source.
// The same files of the restored Pod are to be found by its name.
type Published struct {
	Destination string `json:"destination"` // where the container mounts the volume
	Directory   string `json:"directory"`   // a name within it
}

// Error is a refusal. Reason is one of the event reasons of the API group, such
// as CheckpointNotReady; Message is for people.
type Error struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Reason + ": " + e.Message }
