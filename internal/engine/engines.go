package engine

import (
	"fmt"
	"strings"
)

// Engines are those of a node.
type Engines []Engine

// Capturing is the engine for sandboxes of an OCI runtime; ErrUnsupported if there is none.
func (all Engines) Capturing(r Runtime) (Engine, error) {
	for _, e := range all {
		if e.Captures(r) {
			return e, nil
		}
	}
	kind := r.Type
	if kind == "" {
		kind = r.Binary
	}
	return nil, fmt.Errorf("%w: it runs under the runtime %s, which none of this node's engines captures (%s)", ErrUnsupported, kind, all.names())
}

// Named is the engine that a checkpoint names; ErrIncompatible if there is none.
func (all Engines) Named(name string) (Engine, error) {
	for _, e := range all {
		if e.Name() == name {
			return e, nil
		}
	}
	return nil, fmt.Errorf("%w: it is of the engine %q, this node has %s", ErrIncompatible, name, all.names())
}

func (all Engines) names() string {
	var names []string
	for _, e := range all {
		names = append(names, e.Name())
	}
	return strings.Join(names, ", ")
}
