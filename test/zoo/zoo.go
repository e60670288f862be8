package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"podstasis.dev/stasis/test/document"
	"podstasis.dev/stasis/test/e2e/cluster"
)

// zoo is one run.
type zoo struct {
	rounds, size      int
	engine            string
	kubeconfig, table string
	update            string
	onlyArchives      bool
	out               io.Writer

	*cluster.Cluster
}

func (z *zoo) run(ctx context.Context, names []string, quick bool) (err error) {
	root, err := cluster.Root()
	if err != nil {
		return err
	}
	apps, err := load(filepath.Join(root, "test/zoo/apps"), names, quick)
	if err != nil {
		return err
	}
	for _, a := range apps {
		a.size = z.size
	}
	var flags []string
	switch z.engine {
	case "criu":
	case "gvisor":
		flags = []string{"--gvisor"}
		apps = ofGVisor(apps)
	default:
		return fmt.Errorf("-engine %q is none of criu and gvisor", z.engine)
	}
	archives, err := z.archives(ctx, root, apps)
	if err != nil {
		return err
	}
	if z.onlyArchives {
		for _, a := range apps {
			fmt.Fprintln(z.out, archives[a])
		}
		return nil
	}
	cluster.Images = []string{"stasis-agent", "stasis-controller"}
	if z.kubeconfig != "" {
		z.Cluster, err = cluster.Attach(root, filepath.Dir(z.kubeconfig))
	} else {
		z.Cluster, err = cluster.Up(ctx, root, filepath.Join(root, ".devcluster-zoo"), 1, flags...)
		defer func() { err = errors.Join(err, z.Down(context.WithoutCancel(ctx))) }()
		if err == nil {
			err = z.Install(ctx)
		}
	}
	if err != nil {
		return err
	}
	if z.engine == "gvisor" {
		class := &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: classOfGVisor}, Handler: "runsc"}
		if err := z.Create(ctx, class); err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	var results []result
	wrong := 0
	for _, a := range apps {
		r := z.row(ctx, a, archives[a])
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if r.err != nil {
			wrong++
		}
		results = append(results, r)
	}
	text := markdown(results)
	fmt.Fprint(z.out, "\n", text)
	if z.table != "" {
		if err := os.WriteFile(z.table, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if z.update != "" {
		if err := document.Update(z.update, updateCommand, briefly(results, time.Now())); err != nil {
			return err
		}
	}
	if wrong > 0 {
		return fmt.Errorf("%d of %d applications did not come back as they must", wrong, len(apps))
	}
	return nil
}

// classOfGVisor is what a cluster calls its Pods of gVisor before it has Stasis.
const classOfGVisor = "gvisor"

const updateCommand = "make zoo ENGINE=gvisor UPDATE=docs/applications.md"

// ofGVisor are the applications that are not for CRIU alone, as Pods of gVisor.
func ofGVisor(apps []*app) (all []*app) {
	for _, a := range apps {
		if a.CRIU == "" {
			a.class = new(classOfGVisor)
			all = append(all, a)
		}
	}
	return all
}

// archives builds the images that the applications need.
func (z *zoo) archives(ctx context.Context, root string, apps []*app) (map[*app]string, error) {
	images, err := newImages(root)
	if err != nil {
		return nil, err
	}
	archives := map[*app]string{}
	for _, a := range apps {
		archives[a] = filepath.Join(root, "dist/images/stasis-zoo.tar")
		if !a.usesPackages() {
			continue
		}
		begin := time.Now()
		if archives[a], err = images.build(ctx, a); err != nil {
			return nil, fmt.Errorf("the image of %s: %w", a.name, err)
		}
		if took := time.Since(begin); took > time.Second {
			fmt.Fprintf(os.Stderr, "zoo: %-12s image built in %s\n", a.name, took.Round(100*time.Millisecond))
		}
	}
	return archives, nil
}

func (z *zoo) say(a *app, format string, args ...any) {
	fmt.Fprintf(z.out, "zoo: %-12s %s\n", a.name, fmt.Sprintf(format, args...))
}
