package main

import (
	"context"
	"os"
	"path/filepath"

	"podstasis.dev/stasis/internal/store"
)

// speed stores and loads the replicas' memory as one checkpoint, next to what ordinary
// tools do with the same bytes: three times each, by turns, after a first round that is
// not counted. A ratio of 2 is twice as fast as the tool.
func speed(ctx context.Context, b *bench, dir string) error {
	if _, err := b.dump(ctx); err != nil {
		return err
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := command(ctx, dir, "tar", "-cf", "in.tar", "-C", b.dumpsDir, "."); err != nil {
		return err
	}
	size, err := bytesIn(b.dumpsDir)
	if err != nil {
		return err
	}
	report("speed_input_mib", float64(size)/(1<<20), "MiB")
	var id store.ID
	tasks := []struct {
		name   string
		result string // is removed before
		run    func() error
	}{
		{"put", "store", func() error {
			return withStore(ctx, in("store"), func(s *store.Store) error {
				c, err := s.Put(ctx, os.DirFS(b.dumpsDir), store.PutOptions{})
				id = c.ID
				return err
			})
		}},
		{"zstd", "in.tar.zst", func() error { return command(ctx, dir, "zstd", "-q", "-1", "-T2", "in.tar", "-o", "in.tar.zst") }},
		{"tar_zstd", "tar.zst", func() error {
			return command(ctx, dir, "sh", "-c", `tar -cf - -C "$0" . | zstd -q -1 -T2 -o tar.zst`, b.dumpsDir)
		}},
		{"cp", "copied", func() error { return command(ctx, dir, "cp", "-r", b.dumpsDir, "copied") }},
		{"load", "loaded", func() error {
			if err := os.Mkdir(in("loaded"), 0o700); err != nil {
				return err
			}
			return withStore(ctx, in("store"), func(s *store.Store) error { return s.Get(ctx, id, in("loaded"), nil) })
		}},
		{"untar_zstd", "untarred", func() error {
			return command(ctx, dir, "sh", "-c", `mkdir untarred && zstd -q -dc in.tar.zst | tar -xf - -C untarred`)
		}},
	}
	times, cpus := map[string][]float64{}, map[string][]float64{}
	for round := range 4 {
		for _, t := range tasks {
			if err := os.RemoveAll(in(t.result)); err != nil {
				return err
			}
			spent, cpu, err := timed(t.run)
			if err != nil {
				return err
			}
			if round > 0 {
				times[t.name], cpus[t.name] = append(times[t.name], spent), append(cpus[t.name], cpu)
			}
			if t.name == "cp" || t.name == "untar_zstd" {
				if err := os.RemoveAll(in(t.result)); err != nil {
					return err
				}
			}
		}
		if err := command(ctx, dir, "diff", "-r", b.dumpsDir, "loaded"); err != nil {
			return err
		}
	}
	took := func(name string) float64 { return median(times[name]) }
	report("put_mib_s", float64(size)/(1<<20)/took("put"), "MiB/s")
	report("zstd_mib_s", float64(size)/(1<<20)/took("zstd"), "MiB/s")
	report("put_vs_zstd", took("zstd")/took("put"), "x")
	report("put_vs_zstd_cpu", median(cpus["zstd"])/median(cpus["put"]), "x") // on a busy machine the better measure
	report("put_vs_tar_zstd", took("tar_zstd")/took("put"), "x")
	report("put_vs_cp", took("cp")/took("put"), "x")
	report("load_mib_s", float64(size)/(1<<20)/took("load"), "MiB/s")
	report("load_vs_cp", took("cp")/took("load"), "x")
	report("load_vs_tar_zstd", took("untar_zstd")/took("load"), "x")
	stored, err := bytesIn(in("store"))
	if err != nil {
		return err
	}
	packed, err := os.Stat(in("in.tar.zst"))
	if err != nil {
		return err
	}
	report("stored_vs_zstd", float64(stored)/float64(packed.Size()), "stored/stored")
	return nil
}

func withStore(ctx context.Context, dir string, do func(*store.Store) error) error {
	s, done, err := newStore(ctx, dir)
	if err != nil {
		return err
	}
	if err := do(s); err != nil {
		return err
	}
	return done()
}
