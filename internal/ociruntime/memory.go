package ociruntime

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"podstasis.dev/stasis/internal/engine/criu"
	"podstasis.dev/stasis/internal/nodeapi"
	"podstasis.dev/stasis/internal/pages/lazy"
)

// memory says whose memory is given while it runs, or nil where none is.
func (c call) memory(b *bundle, from nodeapi.ContainerRestore) *criu.MemoryOf {
	if !from.Lazy {
		return nil
	}
	name := b.annotations[annotationContainer]
	sandbox, _ := b.sandbox() // it was read before
	return &criu.MemoryOf{
		WorkDir: from.WorkDir, ContainerID: c.ID, Container: name, Sandbox: sandbox, Socket: c.Socket, TerminationLog: b.terminationLog(name),
	}
}

// terminationLog is the file that the kubelet has made for a container to say why it
// ended: wherever it is mounted, its source is POD/containers/NAME/RANDOM.
func (b *bundle) terminationLog(container string) string {
	var mounts []mount
	if err := b.field("mounts", &mounts); err != nil {
		return ""
	}
	for _, m := range mounts {
		dir := filepath.Dir(m.Source)
		if m.Type == "bind" && filepath.Base(dir) == container && filepath.Base(filepath.Dir(dir)) == "containers" {
			return m.Source
		}
	}
	return ""
}

// keepMemory is the process that keeps a container's memory.
func keepMemory(ctx context.Context, executable string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	err := criu.KeepMemory(os.Stdin, os.Stdout, executable, func(of criu.MemoryOf, s lazy.Status) {
		if s.Stage == lazy.StageLost && of.TerminationLog != "" {
			if err := sayWhy(of.TerminationLog, "Killed by Stasis: its memory could not be restored: "+s.Message); err != nil {
				log.Warn("why the container was killed is not in its termination log", "error", err)
			}
		}
		report := nodeapi.Report{Sandbox: of.Sandbox, Container: of.Container, Stage: nodeapi.StageMemory}
		c := call{Config: Config{Socket: of.Socket}}
		c.report(ctx, report)
	}, log)
	if err != nil {
		log.Error("it ends", "error", err)
	}
	return err
}

// maxTerminationLog is what the kubelet reads of it.
const maxTerminationLog = 4096

// sayWhy writes a termination log that nobody has written to. It is a file that the
// container can write: no link is followed.
func sayWhy(file, message string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() > 0 {
		return fmt.Errorf("%s is no empty file", file)
	}
	_, err = f.WriteString(message[:min(len(message), maxTerminationLog)])
	return err
}
