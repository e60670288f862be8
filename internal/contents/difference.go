package contents

import (
	"fmt"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// Difference is what changed from one checkpoint to another.
type Difference struct {
	// ContainersEnded are in the first checkpoint only, ContainersBegun in the second.
	ContainersEnded []string `json:"containersEnded,omitempty"`
	ContainersBegun []string `json:"containersBegun,omitempty"`
	// Containers that are in both and differ.
	Containers []ContainerDifference `json:"containers,omitempty"`
	// Incomplete names the lists that were cut in one of the two, so that what is said
	// of them may lack something.
	Incomplete []string `json:"incomplete,omitempty"`
}

// ContainerDifference is what changed in one container.
type ContainerDifference struct {
	Name           string              `json:"name"`
	Facts          []Fact              `json:"facts,omitempty"`
	Ended          []ProcessName       `json:"ended,omitempty"`
	Begun          []ProcessName       `json:"begun,omitempty"`
	Processes      []ProcessDifference `json:"processes,omitempty"`
	SocketsOpened  []api.Socket        `json:"socketsOpened,omitempty"`
	SocketsClosed  []api.Socket        `json:"socketsClosed,omitempty"`
	MountsAdded    []api.Mount         `json:"mountsAdded,omitempty"`
	MountsRemoved  []api.Mount         `json:"mountsRemoved,omitempty"`
	RootFileSystem []FileDifference    `json:"rootFileSystem,omitempty"`
}

// ProcessName says which process is meant.
type ProcessName struct {
	PID       int64    `json:"pid"`
	Command   string   `json:"command"`
	State     string   `json:"state"`
	Arguments []string `json:"arguments,omitempty"`
	Captured  int64    `json:"captured"`
}

// Fact is one that changed.
type Fact struct {
	Name   string `json:"name"`
	Before string `json:"before"`
	After  string `json:"after"`
}

// ProcessDifference is what changed in a process that is in both checkpoints.
type ProcessDifference struct {
	PID     int64  `json:"pid"`
	Command string `json:"command"`
	Facts   []Fact `json:"facts,omitempty"`
	// Memory is by kind, "all" first; Mappings those that changed most.
	Memory      []Amount   `json:"memory,omitempty"`
	Mappings    []Amount   `json:"mappings,omitempty"`
	FilesOpened []OpenFile `json:"filesOpened,omitempty"`
	FilesClosed []OpenFile `json:"filesClosed,omitempty"`
	// FilesChanged are the same at another position, deleted, or watch something else.
	FilesChanged []FileChanged `json:"filesChanged,omitempty"`
	Environment  []Fact        `json:"environment,omitempty"`
}

// OpenFile is the API's.
type OpenFile = api.OpenFile

// Amount is a number of bytes that changed.
type Amount struct {
	Name   string `json:"name"`
	Before int64  `json:"before"`
	After  int64  `json:"after"`
}

// FileChanged is a descriptor of the same file whose state is another.
type FileChanged struct {
	FD     int64  `json:"fd"`
	File   string `json:"file"`
	Before string `json:"before"`
	After  string `json:"after"`
}

// FileDifference is a file of the root file system.
type FileDifference struct {
	Path string `json:"path"`
	// Change is "written", "removed" or "replaced" for what was as in the image before,
	// "changed" for what was written and has been written again, and "undone" for what
	// is no longer different from the image.
	Change string `json:"change"`
	Before int64  `json:"before,omitempty"` // bytes
	After  int64  `json:"after,omitempty"`
	Mode   string `json:"mode,omitempty"`
}

// Empty says that nothing differs.
func (d *Difference) Empty() bool {
	return len(d.ContainersEnded)+len(d.ContainersBegun)+len(d.Containers) == 0
}

func (d *ContainerDifference) empty() bool {
	return len(d.Facts)+len(d.Ended)+len(d.Begun)+len(d.Processes)+len(d.SocketsOpened)+len(d.SocketsClosed)+
		len(d.MountsAdded)+len(d.MountsRemoved)+len(d.RootFileSystem) == 0
}

func (d *ProcessDifference) empty() bool {
	return len(d.Facts)+len(d.Memory)+len(d.Mappings)+len(d.FilesOpened)+len(d.FilesClosed)+len(d.FilesChanged)+len(d.Environment) == 0
}

// Bytes shows a size: "11.3 MiB".
func Bytes(n int64) string {
	if n < 1<<10 && n > -1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/(1<<10), "KiB"
	for _, next := range []string{"MiB", "GiB", "TiB", "PiB", "EiB"} {
		if value < 999.95 && value > -999.95 {
			break
		}
		value, unit = value/(1<<10), next
	}
	return fmt.Sprintf("%.1f %s", value, unit)
}
