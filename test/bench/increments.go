package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"podstasis.dev/stasis/internal/store"
)

const (
	pageSize   = 4096
	imagePages = 1 << 30 / pageSize
)

// increments stores memory of 1 GiB that does not compress, again and again after some
// of its pages changed, at random places.
func increments(ctx context.Context, _ *bench, dir string) error {
	image := filepath.Join(dir, "checkpoint", "containers", "a", "criu")
	if err := os.MkdirAll(image, 0o700); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(image, "pages-1.img"))
	if err != nil {
		return err
	}
	defer f.Close()
	noise := rand.NewChaCha8([32]byte{1})
	page := make([]byte, pageSize)
	write := func(number int) error {
		noise.Read(page) // never fails
		_, err := f.WriteAt(page, int64(number)*pageSize)
		return err
	}
	for number := range imagePages {
		if err := write(number); err != nil {
			return err
		}
	}
	stored := filepath.Join(dir, "store")
	s, done, err := newStore(ctx, stored)
	if err != nil {
		return err
	}
	defer done()
	put := func() (grown int64, err error) {
		before, err := bytesIn(stored)
		if err != nil {
			return 0, err
		}
		if _, err := s.Put(ctx, os.DirFS(filepath.Join(dir, "checkpoint")), store.PutOptions{Alike: []string{"pod"}}); err != nil {
			return 0, err
		}
		after, err := bytesIn(stored)
		return after - before, err
	}
	grown, err := put()
	if err != nil {
		return err
	}
	report("first_ratio", float64(grown)/(imagePages*pageSize), "stored/logical")
	places := rand.New(rand.NewPCG(1, 0))
	for _, percent := range []int{1, 10, 50} {
		changed := places.Perm(imagePages)[:imagePages*percent/100]
		for _, number := range changed {
			if err := write(number); err != nil {
				return err
			}
		}
		grown, err := put()
		if err != nil {
			return err
		}
		report(fmt.Sprintf("increment_ratio_%dpct", percent), float64(grown)/float64(len(changed)*pageSize), "new/changed")
	}
	return nil
}
