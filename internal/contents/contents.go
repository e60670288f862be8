// Package contents tells what is inside a checkpoint: processes, memory, open
// files, sockets, mounts, changed files, as a person would ask for them. It reads
// the engine's images and the tar files of a checkpoint's directory, and of the
// captured memory only the pages with command lines and environments.
//
// The directory may come from anywhere: what is read, kept and given out is bounded
// by Limits, and what cannot be understood is said in notes and left out.
package contents

import (
	"context"
	"io/fs"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
)

// Options of Read. The zero value is what a server uses.
type Options struct {
	// ShowValues gives out the values of all environment variables.
	ShowValues bool
	// Limits that are zero are the defaults.
	Limits Limits
}

// Limits bound what Read reads, keeps and gives out.
type Limits struct{}

// Read tells what is inside the checkpoint in dir, whose manifest is m. An error says
// that nothing could be read at all; what is missing from the answer is in its notes.
func Read(ctx context.Context, dir fs.FS, m *checkpoint.Manifest, o Options) (*api.CheckpointContents, error) {
	c := &api.CheckpointContents{Containers: []api.ContainerContents{}}
	c.SetGroupVersionKind(api.SchemeGroupVersion.WithKind("CheckpointContents"))
	return c, context.Cause(ctx)
}
