package mappings

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Kernel asks the kernel for the mappings of processes and their flags, by a BPF iterator:
// it goes through the list of mappings, and not through their pages.
type Kernel struct{ program *ebpf.Program }

// area is a mapping, and its flags as the kernel has them.
type area struct{ Start, End, Flags uint64 }

const areaSize = int(unsafe.Sizeof(area{}))

// oldest is the oldest Linux that is asked. Iterators over one process are of 6.1, which
// may fall over a process that ends meanwhile; nor does copy-on-write capture work before.
var oldest = [2]int{6, 7}

// Open loads the program. It fails where the kernel is older, does not describe its types
// (/sys/kernel/btf/vmlinux), or does not let BPF read what is its own (lockdown).
func Open() (*Kernel, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, err
	}
	release := unix.ByteSliceToString(name.Release[:])
	var version [2]int
	if n, err := fmt.Sscanf(release, "%d.%d", &version[0], &version[1]); n != 2 || slices.Compare(version[:], oldest[:]) < 0 {
		return nil, errors.Join(fmt.Errorf("list mappings by BPF: Linux %s is older than %d.%d", release, oldest[0], oldest[1]), err)
	}
	program, err := load()
	if err != nil {
		return nil, fmt.Errorf("list mappings by BPF: %w", err)
	}
	return &Kernel{program}, nil
}

// Close unloads it.
func (k *Kernel) Close() error { return k.program.Close() }

func load() (*ebpf.Program, error) {
	types, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, err
	}
	var context, meta, vma *btf.Struct
	if err := errors.Join(types.TypeByName("bpf_iter__task_vma", &context), types.TypeByName("bpf_iter_meta", &meta), types.TypeByName("vm_area_struct", &vma)); err != nil {
		return nil, err
	}
	var missing error
	offset := func(of *btf.Struct, names ...string) int16 {
		for _, name := range names {
			if at, ok := find(of.Members, name); ok && at < 1<<15 {
				return int16(at)
			}
		}
		missing = fmt.Errorf("this kernel's %s has no %s", of.Name, names[0])
		return 0
	}
	// For each mapping of the process it writes an area. Behind the last one it is called
	// once more without a mapping, and writes one of zeros: whoever reads on would be given
	// the mappings once more.
	const flags, end, start = -8, -16, -24
	instructions := asm.Instructions{
		asm.LoadMem(asm.R6, asm.R1, offset(context, "meta"), asm.DWord),
		asm.LoadMem(asm.R7, asm.R1, offset(context, "vma"), asm.DWord),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(asm.RFP, start, asm.R1, asm.DWord),
		asm.StoreMem(asm.RFP, end, asm.R1, asm.DWord),
		asm.StoreMem(asm.RFP, flags, asm.R1, asm.DWord),
		asm.JEq.Imm(asm.R7, 0, "write"),
		asm.LoadMem(asm.R1, asm.R7, offset(vma, "vm_start"), asm.DWord),
		asm.StoreMem(asm.RFP, start, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R7, offset(vma, "vm_end"), asm.DWord),
		asm.StoreMem(asm.RFP, end, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R7, offset(vma, "vm_flags", "__vm_flags"), asm.DWord),
		asm.StoreMem(asm.RFP, flags, asm.R1, asm.DWord),
		asm.LoadMem(asm.R1, asm.R6, offset(meta, "seq"), asm.DWord).WithSymbol("write"),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, start),
		asm.Mov.Imm(asm.R3, int32(areaSize)),
		asm.FnSeqWrite.Call(),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	}
	if missing != nil {
		return nil, missing
	}
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "stasis_mappings", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceIter, AttachTo: "task_vma",
		// bpf_seq_write is for programs under the GPL: these instructions may be used under it.
		License: "Dual MIT/GPL", Instructions: instructions,
	})
}

// find returns the offset in bytes of a member of a struct, or of one of its nameless
// structs and unions.
func find(members []btf.Member, name string) (uint32, bool) {
	for _, m := range members {
		if m.Name == name {
			return m.Offset.Bytes(), true
		}
		if m.Name != "" {
			continue
		}
		var inner []btf.Member
		switch t := btf.UnderlyingType(m.Type).(type) {
		case *btf.Struct:
			inner = t.Members
		case *btf.Union:
			inner = t.Members
		}
		if at, ok := find(inner, name); ok {
			return m.Offset.Bytes() + at, true
		}
	}
	return 0, false
}

// most is how many mappings a process may have: many times what the kernel lets it
// (vm.max_map_count).
const most = 1 << 20

// areas lists the mappings of a process, in the order of their addresses.
func (k *Kernel) areas(pid int) (areas []area, err error) {
	defer func() {
		if err != nil {
			areas, err = nil, fmt.Errorf("list the mappings of process %d by BPF: %w", pid, err)
		}
	}()
	f, err := k.iterate(pid)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	in := bufio.NewReaderSize(f, 64<<10) // the kernel's is of 32 KiB
	for words := make([]byte, areaSize); ; {
		if _, err := io.ReadFull(in, words); err != nil {
			return nil, err
		}
		a := area{binary.NativeEndian.Uint64(words), binary.NativeEndian.Uint64(words[8:]), binary.NativeEndian.Uint64(words[16:])}
		if a == (area{}) {
			return areas, nil
		}
		if n := len(areas); n > 0 && a.Start < areas[n-1].End || a.End <= a.Start || n == most {
			return nil, fmt.Errorf("the kernel says %x-%x behind %d others", a.Start, a.End, n)
		}
		areas = append(areas, a)
	}
}

// bpf(2) and linux/bpf.h have these.
const (
	bpfLinkCreate = 28
	bpfIterCreate = 33
	bpfTraceIter  = 28
)

// iterate returns what the program writes of one process.
func (k *Kernel) iterate(pid int) (*os.File, error) {
	which := struct{ thread, process, descriptor uint32 }{thread: uint32(pid)} // union bpf_iter_link_info
	link, err := bpf(bpfLinkCreate, unsafe.Pointer(&struct {
		program, target, attach, flags uint32
		info                           *struct{ thread, process, descriptor uint32 }
		infoSize, _                    uint32
	}{program: uint32(k.program.FD()), attach: bpfTraceIter, info: &which, infoSize: uint32(unsafe.Sizeof(which))}), 32)
	if err != nil {
		return nil, err
	}
	defer unix.Close(link)
	iterator, err := bpf(bpfIterCreate, unsafe.Pointer(&struct{ link, flags uint32 }{link: uint32(link)}), 8)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(iterator), "mappings"), nil
}

func bpf(command uintptr, attributes unsafe.Pointer, size uintptr) (fd int, err error) {
	r, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attributes), size)
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
}
