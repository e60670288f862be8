// Package checkpoint is the vocabulary that the layers share: what a checkpoint
// on disk consists of and how its parts are checked. It imports the standard
// library only.
package checkpoint

import "time"

// FormatVersion is the version of the directory format that this code writes.
// docs/format.md describes it.
const FormatVersion = 1

// ManifestName is the name of the manifest in a checkpoint's directory. It is
// written last: a directory without it is not a checkpoint.
const ManifestName = "manifest.json"

// Manifest describes a checkpoint and holds the digest of every other file.
type Manifest struct {
	FormatVersion int `json:"formatVersion"`
	// Engine captured the processes; Runtime is the OCI runtime that it drove.
	Engine  Program `json:"engine"`
	Runtime Program `json:"runtime"`
	// Platform is where the processes ran.
	Platform Platform `json:"platform"`
	Sandbox  Sandbox  `json:"sandbox"`
	// CutTime is when the last container had been frozen: the moment that the
	// captured state is of.
	CutTime    time.Time   `json:"cutTime"`
	Containers []Container `json:"containers"`
	Volumes    []Volume    `json:"volumes,omitempty"`
	// FreezeDuration runs from before the first container is frozen until after
	// the last one is thawed.
	FreezeDuration time.Duration `json:"freezeDurationNanoseconds"`
	// EarlierFreezes are those of attempts that came to nothing.
	EarlierFreezes []EarlierFreeze `json:"earlierFreezes,omitempty"`
	Phases         []Phase         `json:"phases"`
	// Capture says how memory was captured; unknown in older checkpoints.
	Capture *Capture `json:"capture,omitempty"`
	// Files lists every file of the directory but the manifest, sorted by path.
	Files []File `json:"files"`
}

// EarlierFreeze is one for an attempt that came to nothing, after which the Pod ran on.
type EarlierFreeze struct {
	Duration time.Duration `json:"durationNanoseconds"`
	Reason   string        `json:"reason"` // why nothing came of it
}

// Capture is how the memory of the processes was captured.
type Capture struct {
	Mode   string `json:"mode"`             // the engine's word: CRIU's are plain and cow
	Reason string `json:"reason,omitempty"` // why not the mode that the engine prefers
}

// Program is a program and the version that it gave of itself.
type Program struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Platform is an operating system, architecture and kernel.
type Platform struct {
	OS           string `json:"os"`           // GOOS, such as "linux"
	Architecture string `json:"architecture"` // GOARCH, such as "amd64"
	Kernel       string `json:"kernel"`       // uname -r
	// CPU is what the processes may have relied on; unknown in older checkpoints.
	CPU *CPU `json:"cpu,omitempty"`
	// Cgroups is the version of the control groups that containers have, "v1" or "v2";
	// unknown in older checkpoints.
	Cgroups string `json:"cgroups,omitempty"`
}

// CPU is what a CPU can do, as far as processes see it.
type CPU struct {
	// Features are instruction sets, by the kernel's names in /proc/cpuinfo, sorted.
	Features []string `json:"features"`
	// XSaveFeatures are the components of a thread's registers, as bits of XCR0, and
	// XSaveBytes the room that they take; 0 where the architecture has no such thing.
	XSaveFeatures int64 `json:"xsaveFeatures,omitempty"`
	XSaveBytes    int   `json:"xsaveBytes,omitempty"`
}

// Sandbox is the Pod sandbox that was captured.
type Sandbox struct {
	ID        string   `json:"id"`
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	UID       string   `json:"uid"`
	IPs       []string `json:"ips,omitempty"`
}

// Container is one captured container. Its files are below containers/NAME.
type Container struct {
	Name  string `json:"name"`
	ID    string `json:"id"`
	Image string `json:"image"` // as the CRI names it
	// ImageID is the digest-bearing reference of the image that ran.
	ImageID string `json:"imageID,omitempty"`
	// Created is when the container was made; unknown in older checkpoints.
	Created *time.Time `json:"created,omitempty"`
	// Rootfs is the tar of the writable layer, relative to the directory; empty
	// if the container could not write to its root.
	Rootfs string `json:"rootfs,omitempty"`
	// Process describes what ran, to be compared at restore.
	Process Process `json:"process"`
	// Published are the volumes that the kubelet had written for the container.
	Published []Published `json:"published,omitempty"`
}

// Published is a volume that the kubelet writes: of a ConfigMap, a Secret, the
// downward API, or several of them. Its contents are not captured, the restored Pod
// has its own. Their files lie in a directory whose name is new for each Pod, and a
// process that has one open knows it by that.
type Published struct {
	Destination string `json:"destination"` // where the container mounts it
	Directory   string `json:"directory"`   // the name, such as ..2026_11_26_22_21_54.4244946247
}

// Process is the part of a container's OCI spec that a restore cannot change.
type Process struct {
	Args []string `json:"args,omitempty"`
	Cwd  string   `json:"cwd,omitempty"`
	UID  uint32   `json:"uid"`
	GID  uint32   `json:"gid"`
	// Terminal says that the process had a terminal.
	Terminal bool `json:"terminal,omitempty"`
}

// Volume is a volume whose contents belong to the Pod, captured with it.
type Volume struct {
	Name    string        `json:"name"`
	Archive string        `json:"archive"` // tar, relative to the directory
	Mounts  []VolumeMount `json:"mounts"`
}

// VolumeMount is where a container mounts a volume.
type VolumeMount struct {
	Container   string `json:"container"`
	Destination string `json:"destination"`
}

// Phase is how long one part of the operation took.
type Phase struct {
	Name     string        `json:"name"`
	Duration time.Duration `json:"durationNanoseconds"`
}

// File is one file of the directory.
type File struct {
	Path   string `json:"path"` // slash-separated, relative to the directory
	Size   int64  `json:"size"` // bytes
	Digest string `json:"digest"`
}

// LogicalBytes is the size of all files of the checkpoint.
func (m *Manifest) LogicalBytes() int64 {
	var sum int64
	for _, f := range m.Files {
		sum += f.Size
	}
	return sum
}
