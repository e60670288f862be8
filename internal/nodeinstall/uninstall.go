package nodeinstall

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ErrInUse says that uninstalling would break what still runs.
var ErrInUse = errors.New("this node still uses Stasis")

// Removal says how far to uninstall.
type Removal struct {
	// Force uninstalls also while Pods of the handler exist. They run on; stopping
	// them may then need them to be ended by hand.
	Force bool
	// RunDir and StateDir are the agent's directories, as this process reaches
	// them.
	RunDir, StateDir string
	// Purge removes StateDir with the checkpoints in it.
	Purge bool
}

// Uninstall takes back what Install did, in the order that lets it be done again
// when it is interrupted: first the handler, so that nothing new uses it, then
// the programs. It refuses (ErrInUse) while Pods of the handler exist (P33).
func (i *Installer) Uninstall(ctx context.Context, r Removal) error {
	if err := agentRuns(filepath.Join(r.RunDir, "agent.sock")); err != nil {
		return err
	}
	p, h, err := i.daemon.find()
	if err != nil {
		return err
	}
	if err := i.unused(ctx); err != nil {
		if !r.Force || !errors.Is(err, ErrInUse) {
			return err
		}
		i.Log.Warn("uninstalling although the handler is in use", "reason", err)
	}
	// containerd may go on knowing the handler until it is started again for another
	// reason: no Pod uses it, and a restart fails what is asked of containerd at that
	// moment for ordinary Pods.
	_, _, _, err = i.rewrite(ctx, p, h, func(files configFiles, mainPath string) (configFiles, error) {
		return withoutHandlers(files, mainPath), nil
	})
	if err != nil {
		return err
	}
	for _, dir := range []string{i.Prefix, r.RunDir} {
		if err := empty(dir); err != nil {
			return err
		}
	}
	kept, err := checkpointsIn(r.StateDir)
	if err != nil {
		return err
	}
	if kept == 0 || r.Purge {
		if err := empty(r.StateDir); err != nil {
			return err
		}
	}
	// The directories themselves: mount points here, ordinary ones there.
	if err := h.Do(func() error {
		for _, dir := range []string{HostPrefix, r.RunDir, r.StateDir} {
			os.Remove(dir) // one that still has something in it stays
		}
		return nil
	}); err != nil {
		return err
	}
	if kept > 0 && !r.Purge {
		i.Log.Warn("checkpoints were left on this node, --purge removes them", "directory", r.StateDir, "checkpoints", kept)
	}
	i.Log.Info("uninstalled", "prefix", HostPrefix)
	return nil
}

// checkpointsIn counts the checkpoints in the agent's state directory.
func checkpointsIn(dir string) (int, error) {
	entries, err := os.ReadDir(filepath.Join(dir, "checkpoints"))
	if err := ignoreNotExist(err); err != nil {
		return 0, fmt.Errorf("look for checkpoints: %w", err)
	}
	n := 0
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			n++
		}
	}
	return n, nil
}

// agentRuns fails while an agent answers: it would go on using what is removed.
func agentRuns(socket string) error {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return nil
	}
	conn.Close()
	return fmt.Errorf("%w: its agent runs; delete the agent's DaemonSet first", ErrInUse)
}

// unused fails while a sandbox of our handlers exists, ready or not: containerd
// needs the runtime to remove it.
func (i *Installer) unused(ctx context.Context) error {
	list, err := i.daemon.cri().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return fmt.Errorf("look for Pods of the handlers %s: %w", strings.Join(ourNames, " and "), err)
	}
	var names []string
	for _, s := range list.GetItems() {
		if slices.Contains(ourNames, s.RuntimeHandler) {
			names = append(names, s.GetMetadata().GetNamespace()+"/"+s.GetMetadata().GetName())
		}
	}
	if len(names) == 0 {
		return nil
	}
	const most = 5
	more := ""
	if len(names) > most {
		more = fmt.Sprintf(" and %d more", len(names)-most)
		names = names[:most]
	}
	return fmt.Errorf("%w: Pods that were restored exist (%s%s); delete them first", ErrInUse, strings.Join(names, ", "), more)
}

// empty removes what is in a directory; the directory may be a mount point.
func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return ignoreNotExist(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove what was installed: %w", err)
		}
	}
	return nil
}
