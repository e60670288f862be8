package main

import (
	"context"
	"os"

	"podstasis.dev/stasis/test/bench/freeze"
	"podstasis.dev/stasis/test/e2e/cluster"
)

// freezes measures checkpoints and restores of running programs next to others' ways.
func freezes(ctx context.Context, b *bench, dir string) error {
	root, err := cluster.Root()
	if err != nil {
		return err
	}
	got, err := freeze.Run(ctx, freeze.Options{Root: root, Dir: dir, CRIU: b.criu, Rounds: b.rounds, Shapes: b.shapes, Out: os.Stderr})
	if err != nil {
		return err
	}
	for _, f := range got.Figures() {
		report(f.Name, f.Value, f.Unit)
	}
	if b.update == "" {
		return nil
	}
	return got.Update(b.update)
}
