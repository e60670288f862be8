// Package backendtest tests backends, and lets what uses a backend meet its faults.
package backendtest

import (
	"bytes"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"

	"podstasis.dev/stasis/internal/store/backend"
)

// Memory is a backend that keeps its objects in memory.
func Memory() backend.Backend { return &memory{objects: map[string][]byte{}} }

type memory struct {
	mu      sync.RWMutex
	objects map[string][]byte
}

func (m *memory) Put(ctx context.Context, name string, data []byte, refs []string) error {
	if err := backend.CheckPut(name, data, refs); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, ref := range refs {
		if _, there := m.objects[ref]; !there {
			return fmt.Errorf("what %s refers to: %w: %s", name, backend.ErrNotFound, ref)
		}
	}
	m.objects[name] = bytes.Clone(data)
	return nil
}

func (m *memory) Read(ctx context.Context, name string, offset, length int64) ([]byte, error) {
	if err := backend.CheckRead(name, offset, length); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	data, there := m.objects[name]
	if !there {
		return nil, fmt.Errorf("%w: %s", backend.ErrNotFound, name)
	}
	from, n, err := backend.Range(name, int64(len(data)), offset, length)
	if err != nil {
		return nil, err
	}
	return bytes.Clone(data[from : from+n]), nil
}

func (m *memory) List(ctx context.Context, prefix string) iter.Seq2[backend.Object, error] {
	return func(yield func(backend.Object, error) bool) {
		if err := ctx.Err(); err != nil {
			yield(backend.Object{}, err)
			return
		}
		m.mu.RLock()
		names := slices.Sorted(maps.Keys(m.objects))
		sizes := make([]int64, len(names))
		for i, name := range names {
			sizes[i] = int64(len(m.objects[name]))
		}
		m.mu.RUnlock()
		for i, name := range names {
			if strings.HasPrefix(name, prefix) && !yield(backend.Object{Name: name, Size: sizes[i]}, nil) {
				return
			}
		}
	}
}

func (m *memory) Delete(ctx context.Context, name string) error {
	if err := backend.CheckName(name); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.objects, name)
	return nil
}

func (m *memory) Close() error { return nil }
