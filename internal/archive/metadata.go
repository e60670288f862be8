package archive

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"podstasis.dev/stasis/internal/checkpoint"
)

// unknown stands for what an archive does not say.
const unknown = "unknown"

// metadata is what a kubelet's archive says of its container, by member.
type metadata map[string][]byte

// containerSpec is the part of spec.dump that is used.
type containerSpec struct {
	Process *struct {
		Args     []string `json:"args"`
		Cwd      string   `json:"cwd"`
		Terminal bool     `json:"terminal"`
		User     struct {
			UID uint32 `json:"uid"`
			GID uint32 `json:"gid"`
		} `json:"user"`
	} `json:"process"`
	Annotations map[string]string `json:"annotations"`
}

// annotation returns the first of some annotations that is there: containerd's and
// CRI-O's.
func (s *containerSpec) annotation(names ...string) string {
	for _, name := range names {
		if v := s.Annotations[name]; v != "" {
			return v
		}
	}
	return ""
}

// manifest describes the container as a checkpoint of that one.
func (d metadata) manifest(facts imageFacts, rootfs bool) (*checkpoint.Manifest, error) {
	var config containerConfig
	var spec containerSpec
	for name, into := range map[string]any{kubeletConfig: &config, kubeletSpec: &spec} {
		data, ok := d[name]
		if !ok {
			return nil, fmt.Errorf("%w: %s is missing", ErrInvalid, name)
		}
		if err := json.Unmarshal(data, into); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrInvalid, name, err)
		}
	}
	name := spec.annotation("io.kubernetes.cri.container-name", "io.kubernetes.container.name")
	if name == "" {
		name = config.Name
	}
	if !plainName(name) || len(name) > 63 {
		return nil, fmt.Errorf("%w: %.80q is no name of a container", ErrInvalid, name)
	}
	c := checkpoint.Container{Name: name, ID: config.ID, Image: config.RootfsImageName, ImageID: config.RootfsImageRef}
	if !config.CreatedTime.IsZero() {
		c.Created = &config.CreatedTime
	}
	if p := spec.Process; p != nil {
		c.Process = checkpoint.Process{Args: p.Args, Cwd: p.Cwd, UID: p.User.UID, GID: p.User.GID, Terminal: p.Terminal}
	}
	if rootfs {
		c.Rootfs = containersDir + "/" + name + "/" + rootfsFile
	}
	return &checkpoint.Manifest{
		FormatVersion: checkpoint.FormatVersion,
		Engine:        checkpoint.Program{Name: "criu", Version: facts.or(facts.version)},
		Runtime:       checkpoint.Program{Name: facts.or(config.OCIRuntime), Version: unknown},
		Platform:      checkpoint.Platform{OS: "linux", Architecture: facts.or(facts.architecture), Kernel: facts.or(facts.kernel)},
		Sandbox: checkpoint.Sandbox{
			ID:        spec.annotation("io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"),
			Namespace: spec.annotation("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"),
			Name:      spec.annotation("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"),
			UID:       spec.annotation("io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"),
		},
		CutTime:        config.CheckpointedAt,
		Containers:     []checkpoint.Container{c},
		FreezeDuration: frozenTime(d[kubeletDumpStats]),
	}, nil
}

// deleted are the paths that CRI-O and Podman list as removed.
func (d metadata) deleted() ([]string, error) {
	data, ok := d[kubeletDeleted]
	if !ok {
		return nil, nil
	}
	var names []string
	if err := json.Unmarshal(data, &names); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrInvalid, kubeletDeleted, err)
	}
	return names, nil
}

// imageFacts are what CRIU's files say of their making.
type imageFacts struct{ version, kernel, architecture string }

func (imageFacts) or(s string) string {
	if s == "" {
		return unknown
	}
	return s
}

var (
	logVersion = regexp.MustCompile(`(?m)Version: ([0-9]+(?:\.[0-9]+){1,3}) `)
	logKernel  = regexp.MustCompile(`(?m)Running on \S+ Linux ([A-Za-z0-9.+_-]{1,128}) `)
)

// readLog finds, at the beginning of CRIU's log, its version and the kernel.
func (f *imageFacts) readLog(data []byte) {
	if m := logVersion.FindSubmatch(data); m != nil {
		f.version = string(m[1])
	}
	if m := logKernel.FindSubmatch(data); m != nil {
		f.kernel = string(m[1])
	}
}

// imageHeader is the two magic numbers that an image begins with, and the length of
// its first entry.
const imageHeader = 12

// firstEntry returns the first entry of an image, as far as it is there.
func firstEntry(data []byte) []byte {
	if len(data) < imageHeader {
		return nil
	}
	size := binary.LittleEndian.Uint32(data[imageHeader-4:])
	data = data[imageHeader:]
	return data[:min(uint64(size), uint64(len(data)))]
}

// readCore finds the architecture in a core image (core_entry.mtype).
func (f *imageFacts) readCore(data []byte) {
	const fieldType = 1
	names := map[uint64]string{1: "amd64", 2: "arm", 3: "arm64", 4: "ppc64le", 5: "s390x", 6: "mips64", 7: "loong64", 8: "riscv64"}
	v, _ := varint(firstEntry(data), fieldType)
	f.architecture = names[v]
}

// frozenTime reads from CRIU's statistics how long the processes stood still
// (stats_entry.dump.frozen_time, in microseconds).
func frozenTime(data []byte) time.Duration {
	const fieldDump, fieldFrozen = 1, 2
	dump, _ := message(firstEntry(data), fieldDump)
	v, _ := varint(dump, fieldFrozen)
	const most = uint64(24 * time.Hour / time.Microsecond)
	if v > most {
		return 0
	}
	return time.Duration(v) * time.Microsecond
}

func varint(data []byte, field protowire.Number) (v uint64, found bool) {
	each(data, func(n protowire.Number, value uint64, _ []byte) {
		if n == field && !found {
			v, found = value, true
		}
	})
	return v, found
}

func message(data []byte, field protowire.Number) (m []byte, found bool) {
	each(data, func(n protowire.Number, _ uint64, bytes []byte) {
		if n == field && bytes != nil && !found {
			m, found = bytes, true
		}
	})
	return m, found
}

// each goes through the fields of a protocol buffer, until its end or nonsense.
func each(data []byte, see func(n protowire.Number, v uint64, bytes []byte)) {
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return
		}
		data = data[n:]
		switch kind {
		case protowire.VarintType:
			v, n := protowire.ConsumeVarint(data)
			if n < 0 {
				return
			}
			see(number, v, nil)
			data = data[n:]
		case protowire.BytesType:
			b, n := protowire.ConsumeBytes(data)
			if n < 0 {
				return
			}
			see(number, 0, bytes.Clone(b))
			data = data[n:]
		default:
			n := protowire.ConsumeFieldValue(number, kind, data)
			if n < 0 {
				return
			}
			data = data[n:]
		}
	}
}

// isKubelet says whether a first member's name is of a kubelet's archive.
func isKubelet(name string) bool { return strings.TrimPrefix(name, "./") != ObjectName }
