package images

import (
	"context"
	"fmt"
	"io/fs"

	"errors"

	"github.com/checkpoint-restore/go-criu/v8/crit/images/creds"
)

// States of a task, as compel/include/uapi/task-state.h numbers them.
const (
	StateAlive   = 1
	StateDead    = 2
	StateStopped = 3
	StateZombie  = 6
)

// Seccomp modes.
const (
	SeccompDisabled = 0
	SeccompStrict   = 1
	SeccompFilter   = 2
)

// Task is what is known of a process or a thread besides its memory.
type Task struct {
	State   uint64
	Command string
	Creds   *creds.CredsEntry // nil if there are none
	Seccomp uint64
	// FilesID and MountNS name other images.
	FilesID, MountNS uint64
}

// ReadTask reads core-ID.img, and ids-ID.img where it is. id is a process' or a thread's.
func (s *Source) ReadTask(ctx context.Context, id uint32) (*Task, error) {
	t := &Task{}
	err := s.Entries(ctx, fmt.Sprintf("core-%d.img", id), Core, t.core)
	if err != nil {
		return nil, err
	}
	err = s.Entries(ctx, fmt.Sprintf("ids-%d.img", id), IDs, t.ids)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return t, err
	}
	return t, nil
}

// core is message core_entry of core.proto.
func (t *Task) core(b []byte) error {
	return Fields(b, func(f Field) error {
		switch f.Number {
		case 3:
			return Fields(f.Bytes, t.task)
		case 4:
			return t.ids(f.Bytes)
		case 5:
			return Fields(f.Bytes, t.thread)
		}
		return nil
	})
}

func (t *Task) task(f Field) error {
	switch f.Number {
	case 1:
		t.State = f.Value
	case 6:
		t.Command = string(f.Bytes)
	case 11:
		t.Seccomp = f.Value
	}
	return nil
}

func (t *Task) thread(f Field) error {
	switch f.Number {
	case 10:
		t.Creds = &creds.CredsEntry{}
		return Decode(f.Bytes, t.Creds)
	case 11:
		t.Seccomp = f.Value
	case 13:
		if t.Command == "" {
			t.Command = string(f.Bytes)
		}
	}
	return nil
}

func (t *Task) ids(b []byte) error {
	return Fields(b, func(f Field) error {
		switch f.Number {
		case 2:
			t.FilesID = f.Value
		case 9:
			t.MountNS = f.Value
		}
		return nil
	})
}
