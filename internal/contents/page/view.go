package page

import (
	"fmt"
	"html/template"
	"strings"
	"time"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/contents"
)

// view is what the template shows, ready to be printed.
type view struct {
	Style      template.CSS
	Title      string
	Subtitle   string
	Facts      []pair
	Tiles      []pair
	Timeline   *timeline
	Containers []containerView
	Volumes    []pair
	Stored     *storedView
	Truncated  []string
	Made       string
}

type pair struct{ Name, Value string }

// storedView is what the checkpoint shares in its store.
type storedView struct {
	Name, Grown string
	Heading     []string
	Rows        [][]string
}

// show makes text of what may be hostile.
func show(s string) string { return contents.Printable(s) }

func newView(c *api.CheckpointContents, o Options) *view {
	v := &view{Title: show(c.Name), Timeline: newTimeline(c)}
	pod := show(strings.Trim(c.Source.PodNamespace+"/"+c.Source.PodName, "/"))
	if v.Title == "" {
		v.Title = pod
	}
	v.Subtitle = "Checkpoint of Pod " + pod
	v.Facts = facts(c)
	sum := total{}
	for i := range c.Containers {
		v.Containers = append(v.Containers, newContainer(i, &c.Containers[i]))
		sum.add(&c.Containers[i])
	}
	v.Tiles = sum.tiles(c)
	for _, volume := range c.Volumes {
		v.Volumes = append(v.Volumes, pair{show(volume.Name), fmt.Sprintf("%s, %s", count(volume.Files, "entry", "entries"), contents.Bytes(volume.Bytes))})
	}
	if rows := contents.StoredTable(c.Store); rows != nil {
		v.Stored = &storedView{show(c.Store.Name), contents.Bytes(c.Store.NewBytes), rows[0], rows[1:]}
	}
	for _, path := range c.Truncated {
		v.Truncated = append(v.Truncated, show(path))
	}
	if !o.Made.IsZero() {
		v.Made = o.Made.UTC().Format("2 January 2006, 15:04 UTC")
	}
	return v
}

func facts(c *api.CheckpointContents) []pair {
	all := []pair{
		{"Pod UID", show(c.Source.PodUID)},
		{"Pod addresses", show(strings.Join(c.Source.PodIPs, ", "))},
		{"Engine", show(strings.TrimSpace(c.Engine.Name + " " + c.Engine.Version))},
		{"Runtime", show(c.Source.Runtime)},
		{"Node", show(c.Source.Platform)},
	}
	if c.CutTime != nil {
		all = append([]pair{{"State of", c.CutTime.UTC().Format("2 January 2006, 15:04:05.000 UTC")}}, all...)
	}
	if c.Store != nil {
		all = append(all, pair{"Store", fmt.Sprintf("%s, which grew by %s", show(c.Store.Name), contents.Bytes(c.Store.NewBytes))})
	}
	var there []pair
	for _, p := range all {
		if p.Value != "" {
			there = append(there, p)
		}
	}
	return there
}

// total counts over all containers.
type total struct{ processes, threads, images, sockets, changed int64 }

func (t *total) add(c *api.ContainerContents) {
	t.images += c.ImageBytes
	t.processes += int64(len(c.Processes))
	t.sockets += int64(len(c.Sockets))
	t.changed += int64(len(c.Changes))
	for i := range c.Processes {
		t.threads += c.Processes[i].Threads
	}
}

func (t *total) tiles(c *api.CheckpointContents) []pair {
	tiles := []pair{
		{plural(len(c.Containers), "container"), fmt.Sprint(len(c.Containers))},
		{plural(int(t.processes), "process"), fmt.Sprint(t.processes)},
		{plural(int(t.threads), "thread"), fmt.Sprint(t.threads)},
		{"captured", contents.Bytes(t.images)},
		{plural(int(t.sockets), "socket"), fmt.Sprint(t.sockets)},
		{plural(int(t.changed), "changed file"), fmt.Sprint(t.changed)},
	}
	if c.FreezeDuration != nil {
		tiles = append(tiles, pair{"frozen", milliseconds(c.FreezeDuration.Duration)})
	}
	return tiles
}

func plural(n int, what string) string {
	switch {
	case n == 1:
		return what
	case strings.HasSuffix(what, "s"):
		return what + "es"
	}
	return what + "s"
}

func count(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// milliseconds shows a duration.
func milliseconds(d time.Duration) string {
	switch {
	case d >= time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d >= 100*time.Millisecond:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f ms", float64(d)/1e6)
}
