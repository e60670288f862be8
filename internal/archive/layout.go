package archive

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"podstasis.dev/stasis/internal/checkpoint"
)

// ObjectName is the first member of a Pod's archive: the PodCheckpoint as JSON.
const ObjectName = "podcheckpoint.json"

// Names in a checkpoint's directory; docs/format.md describes it.
const (
	containersDir = "containers"
	volumesDir    = "volumes"
	imagesDir     = "criu"
	sandboxDir    = "sandbox"
	specFile      = "config.json"
	rootfsFile    = "rootfs.tar"
	dumpLogFile   = "dump.log"
	dumpStatsFile = "stats-dump"
	outputFile    = "container.log"
)

// Names in the archive of one container, as containerd, CRI-O and Podman write it.
const (
	kubeletConfig     = "config.dump"
	kubeletSpec       = "spec.dump"
	kubeletStatus     = "status.dump"
	kubeletImages     = "checkpoint"
	kubeletRootfs     = "rootfs-diff.tar"
	kubeletDeleted    = "deleted.files"
	kubeletDumpLog    = dumpLogFile
	kubeletDumpStats  = dumpStatsFile
	kubeletOutput     = outputFile
	maxObjectBytes    = 4 << 20 // an object is at most 1.5 MiB in etcd
	maxManifestBytes  = 16 << 20
	maxMetadataBytes  = 4 << 20 // config.dump, spec.dump, deleted.files
	maxStatsBytes     = 64 << 10
	maxNameBytes      = 255
	defaultMaxMembers = 1 << 16
)

// checkPath says whether a checkpoint that comes from elsewhere may have a file of
// that name, given its containers.
func checkPath(path string, containers map[string]bool) error {
	parts := strings.Split(path, "/")
	for _, part := range parts {
		if !plainName(part) {
			return fmt.Errorf("%q has parts that no checkpoint has", path)
		}
	}
	switch {
	case path == checkpoint.BlocksName, path == checkpoint.FormerBlocksName:
		return nil
	case len(parts) == 2 && parts[0] == volumesDir && strings.HasSuffix(parts[1], ".tar"):
		return nil
	case len(parts) == 2 && parts[0] == sandboxDir: // of an engine that captures a sandbox as a whole
		return nil
	case len(parts) == 3 && parts[0] == containersDir && containers[parts[1]]:
		switch parts[2] {
		case specFile, rootfsFile, dumpLogFile, dumpStatsFile, outputFile:
			return nil
		}
	case len(parts) == 4 && parts[0] == containersDir && containers[parts[1]] && parts[2] == imagesDir:
		return nil
	}
	return fmt.Errorf("%q is no file of a checkpoint", path)
}

// plainName says whether a name is one that an engine or Stasis gives to files:
// letters, digits and a few signs, and nothing hidden.
func plainName(name string) bool {
	if name == "" || len(name) > maxNameBytes || name[0] == '.' || name[0] == '-' {
		return false
	}
	return strings.IndexFunc(name, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("._-", r)
	}) < 0
}

func checkPaths(m *checkpoint.Manifest) error {
	containers := make(map[string]bool, len(m.Containers))
	for _, c := range m.Containers {
		containers[c.Name] = true
	}
	for _, f := range m.Files {
		if err := checkPath(f.Path, containers); err != nil {
			return err
		}
	}
	return nil
}

// DigestOf is the digest of data, in the form that manifests use.
func DigestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}
