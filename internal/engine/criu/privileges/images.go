package privileges

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"unicode"

	"google.golang.org/protobuf/encoding/protowire"

	"podstasis.dev/stasis/internal/contents/images"
)

const (
	maxImages  = 256 << 20 // of all images that are read together
	maxImage   = 16 << 20  // of one
	maxThreads = 1 << 17
)

// Magic numbers of images: the first is common, the second the kind's.
const (
	magicCommon    = 0x54564319
	magicTree      = 0x50273030
	magicCore      = 0x55053847
	magicIDs       = 0x54432030
	magicInventory = 0x58313116
	magicSeccomp   = 0x64413049
)

var errImage = errors.New("an image of the checkpoint is not as CRIU writes it")

// reader reads the images of one directory.
type reader struct {
	ctx  context.Context
	dir  fs.FS
	left int64
}

// task is a process: its threads, itself among them.
type task struct {
	pid     uint64
	threads []uint64
}

// core is what an image core-ID.img says of a thread.
type core struct {
	dead    bool
	command string
	seccomp uint64
	filter  uint64 // the last of its seccomp filters, where it has any
	creds   creds
}

type creds struct {
	uid, gid, euid, egid, suid, sgid, fsuid, fsgid       uint32
	inheritable, permitted, effective, bounding, ambient capabilities
	groups                                               []uint32
	profile                                              string
	noNewPrivs                                           bool
}

// entries reads an image.
func (r *reader) entries(name string, magic uint32) (entries [][]byte, err error) {
	if err := context.Cause(r.ctx); err != nil {
		return nil, err
	}
	bad := func(what string) error { return fmt.Errorf("%w: %s %s", errImage, name, what) }
	f, err := r.dir.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", errImage, err)
	} else if err != nil {
		return nil, fmt.Errorf("read the images: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, min(maxImage, r.left)+1))
	if err != nil {
		return nil, fmt.Errorf("read the images: %s: %w", name, err)
	}
	if r.left -= int64(len(data)); len(data) > maxImage || r.left < 0 {
		return nil, bad("is larger than is read")
	}
	head := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, magicCommon), magic)
	if magic == magicInventory {
		head = head[4:] // it tells that the others have both
	}
	data, ok := bytes.CutPrefix(data, head)
	if !ok {
		return nil, bad("is of another kind")
	}
	for len(data) > 0 {
		if len(data) < 4 {
			return nil, bad("ends in the middle")
		}
		size := uint64(binary.LittleEndian.Uint32(data))
		if data = data[4:]; size > uint64(len(data)) {
			return nil, bad("ends in the middle")
		}
		entries = append(entries, data[:size])
		data = data[size:]
	}
	return entries, nil
}

// one reads an image that has one entry.
func (r *reader) one(name string, magic uint32) (fields, error) {
	entries, err := r.entries(name, magic)
	if err != nil {
		return nil, err
	}
	if len(entries) != 1 {
		return nil, fmt.Errorf("%w: %s has %d entries", errImage, name, len(entries))
	}
	m, err := parseFields(entries[0])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return m, nil
}

// tree lists the processes, the root of all first.
func (r *reader) tree() (tasks []task, err error) {
	const name, fieldPID, fieldThreads = "pstree.img", 1, 5
	entries, err := r.entries(name, magicTree)
	if err != nil {
		return nil, err
	}
	threads := 0
	for _, e := range entries {
		m, err := parseFields(e)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		t := task{}
		if t.pid, err = m.number(fieldPID); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if t.threads, err = m.numbers(fieldThreads); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if threads += len(t.threads); threads > maxThreads {
			return nil, fmt.Errorf("%w: more than %d threads", errImage, maxThreads)
		}
		tasks = append(tasks, t)
	}
	if len(tasks) == 0 {
		return nil, fmt.Errorf("%w: %s has no process", errImage, name)
	}
	return tasks, nil
}

// core reads what is known of a thread.
func (r *reader) core(id uint64) (*core, error) {
	const fieldTask, fieldThread, fieldState, fieldCommand, fieldOldSeccomp, fieldCreds, fieldSeccomp, fieldFilter = 3, 5, 1, 6, 11, 10, 11, 12
	const dead, zombie = 2, 6
	name := fmt.Sprintf("core-%d.img", id)
	m, err := r.one(name, magicCore)
	if err != nil {
		return nil, err
	}
	c := &core{}
	err = func() error {
		process, err := m.message(fieldTask)
		if err != nil {
			return err
		}
		state, stateErr := process.number(fieldState)
		old, oldErr := process.number(fieldOldSeccomp)
		command, commandErr := process.text(fieldCommand)
		thread, err := m.message(fieldThread)
		if err := errors.Join(err, stateErr, oldErr, commandErr); err != nil {
			return err
		}
		c.command = printable(command)
		if c.dead = state == dead || state == zombie; c.dead {
			return nil
		}
		if c.seccomp, err = thread.number(fieldSeccomp); err != nil {
			return err
		}
		if c.filter, err = thread.number(fieldFilter); err != nil {
			return err
		}
		if process[fieldOldSeccomp] != nil && old != c.seccomp {
			return fmt.Errorf("%w: it has two seccomp modes", errImage)
		}
		who, err := thread.message(fieldCreds)
		if err != nil {
			return err
		}
		if len(who) == 0 {
			return fmt.Errorf("%w: it has no credentials", errImage)
		}
		return c.creds.read(who)
	}()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

// sharedFilters says whether the seccomp filters of a process are set for all of its
// threads. CRIU writes those that all threads have once, with the process: each then
// has the flag SECCOMP_FILTER_FLAG_TSYNC (seccomp(2)), and the threads are written as
// if they had none.
func (r *reader) sharedFilters(leader *core) (bool, error) {
	const name, fieldFilters, fieldPrevious, fieldFlags, sync = "seccomp.img", 1, 2, 3, 1
	m, err := r.one(name, magicSeccomp)
	if err != nil {
		return false, err
	}
	filters := m[fieldFilters]
	for at, passed := leader.filter, 0; ; passed++ {
		if at >= uint64(len(filters)) || passed == len(filters) {
			return false, fmt.Errorf("%w: the filters of %s lead nowhere", errImage, name)
		}
		filter, err := parseFields(filters[at].bytes)
		if err != nil {
			return false, fmt.Errorf("%s: %w", name, err)
		}
		flags, err := filter.number(fieldFlags)
		if err != nil {
			return false, fmt.Errorf("%s: %w", name, err)
		}
		if flags&sync == 0 {
			return false, nil
		}
		if len(filter[fieldPrevious]) == 0 {
			return true, nil
		}
		if at, err = filter.number(fieldPrevious); err != nil {
			return false, fmt.Errorf("%s: %w", name, err)
		}
	}
}

func (c *creds) read(m fields) error {
	var errs []error
	for field, into := range map[int]*uint32{1: &c.uid, 2: &c.gid, 3: &c.euid, 4: &c.egid, 5: &c.suid, 6: &c.sgid, 7: &c.fsuid, 8: &c.fsgid} {
		v, err := m.number(field)
		*into = uint32(v)
		errs = append(errs, err)
	}
	for field, into := range map[int]*capabilities{9: &c.inheritable, 10: &c.permitted, 11: &c.effective, 12: &c.bounding, 19: &c.ambient} {
		words, err := m.numbers(field)
		if len(words) > 2 {
			err = fmt.Errorf("%w: a set of capabilities of %d words", errImage, len(words))
		} else {
			for i, w := range words {
				*into |= capabilities(uint32(w)) << (32 * i)
			}
		}
		errs = append(errs, err)
	}
	groups, err := m.numbers(14)
	for _, g := range groups {
		c.groups = append(c.groups, uint32(g))
	}
	profile, profileErr := m.text(15)
	noNewPrivs, nnpErr := m.number(18)
	c.profile, c.noNewPrivs = profile, noNewPrivs != 0
	return errors.Join(append(errs, err, profileErr, nnpErr)...)
}

// ids are a task_kobj_ids_entry, by field.
type ids map[int]uint64

func idsOf(m fields) (ids, error) {
	out := ids{}
	for _, ns := range namespaces {
		v, err := m.number(ns.field)
		if err != nil {
			return nil, err
		}
		out[ns.field] = v
	}
	return out, nil
}

// inventory reads which namespaces whoever dumped the tree was in.
func (r *reader) inventory() (ids, error) {
	const name, fieldRootIDs = "inventory.img", 3
	m, err := r.one(name, magicInventory)
	if err != nil {
		return nil, err
	}
	root, err := m.message(fieldRootIDs)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(root) == 0 {
		return nil, fmt.Errorf("%w: %s does not tell the namespaces of the node", errImage, name)
	}
	return idsOf(root)
}

// rootIDs reads the namespaces of the root of the tree, from either place that they
// can be in.
func (r *reader) rootIDs(pid uint64) (all []ids, err error) {
	const fieldIDs = 4
	m, err := r.one(fmt.Sprintf("core-%d.img", pid), magicCore)
	if err != nil {
		return nil, err
	}
	own, err := m.message(fieldIDs)
	if err != nil {
		return nil, err
	}
	places := []fields{own}
	if apart, err := r.one(fmt.Sprintf("ids-%d.img", pid), magicIDs); err == nil {
		places = append(places, apart)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, m := range places {
		if len(m) == 0 {
			continue
		}
		one, err := idsOf(m)
		if err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%w: process %d does not tell its namespaces", errImage, pid)
	}
	return all, nil
}

// fields are those of a protocol buffer, by number, as often as they come.
type fields map[int][]value

type value struct {
	kind   protowire.Type
	number uint64
	bytes  []byte
}

func parseFields(data []byte) (fields, error) {
	m := fields{}
	err := images.Fields(data, func(f images.Field) error {
		m[int(f.Number)] = append(m[int(f.Number)], value{f.Kind, f.Value, f.Bytes})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errImage, err)
	}
	return m, nil
}

// single returns a field that may come once: of two, readers take the first, the last
// or both.
func (m fields) single(field int, kind protowire.Type) (value, error) {
	switch values := m[field]; {
	case len(values) == 0:
		return value{kind: kind}, nil
	case len(values) > 1 || values[0].kind != kind:
		return value{}, fmt.Errorf("%w: field %d comes more than once or is of another type", errImage, field)
	default:
		return values[0], nil
	}
}

func (m fields) number(field int) (uint64, error) {
	v, err := m.single(field, protowire.VarintType)
	return v.number, err
}

func (m fields) text(field int) (string, error) {
	v, err := m.single(field, protowire.BytesType)
	return string(v.bytes), err
}

func (m fields) message(field int) (fields, error) {
	v, err := m.single(field, protowire.BytesType)
	if err != nil {
		return nil, err
	}
	return parseFields(v.bytes)
}

// numbers returns a repeated field, one by one or packed.
func (m fields) numbers(field int) (out []uint64, err error) {
	for _, v := range m[field] {
		switch v.kind {
		case protowire.VarintType:
			out = append(out, v.number)
		case protowire.BytesType:
			for data := v.bytes; len(data) > 0; {
				one, n := protowire.ConsumeVarint(data)
				if n < 0 {
					return nil, fmt.Errorf("%w: %w", errImage, protowire.ParseError(n))
				}
				out = append(out, one)
				data = data[n:]
			}
		default:
			return nil, fmt.Errorf("%w: field %d is of another type", errImage, field)
		}
	}
	return out, nil
}

func printable(s string) string {
	const most = 32
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	return s[:min(len(s), most)]
}
