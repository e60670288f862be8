// images builds a container image without Docker: it reads a Dockerfile that only
// copies files, and writes an archive in the OCI image layout, which "ctr images
// import", "docker load" and devcluster's "load" take. The same input gives the
// same bytes.
//
//	images -f Dockerfile -t NAME:TAG -o FILE.tar [CONTEXT]
package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"

	"podstasis.dev/stasis/hack/images/internal/dockerfile"
	"podstasis.dev/stasis/hack/images/internal/ociarchive"
)

func main() {
	file := flag.String("f", "Dockerfile", "Dockerfile to build")
	name := flag.String("t", "", "name of the image, with its tag")
	out := flag.String("o", "", "archive to write")
	arch := flag.String("arch", runtime.GOARCH, "architecture that the image is for")
	flag.Parse()
	dir := "."
	if flag.NArg() == 1 {
		dir = flag.Arg(0)
	}
	if *name == "" || *out == "" || flag.NArg() > 1 {
		fmt.Fprintln(os.Stderr, "usage: images -f Dockerfile -t NAME:TAG -o FILE.tar [CONTEXT]")
		os.Exit(2)
	}
	digest, err := build(*file, dir, *name, *arch, *out)
	if err != nil {
		fmt.Fprintf(os.Stderr, "images: building %s from %s: %v\n", *name, *file, err)
		os.Exit(1)
	}
	fmt.Printf("%s  %s  %s\n", *out, *name, digest)
}

func build(file, dir, name, arch, out string) (string, error) {
	instructions, err := dockerfile.ParseFile(file)
	if err != nil {
		return "", err
	}
	image, err := dockerfile.Build(instructions, dir, arch)
	if err != nil {
		return "", err
	}
	return ociarchive.WriteFile(out, name, arch, image)
}
