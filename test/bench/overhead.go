package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// overhead measures what stasis-runtime costs an ordinary container: runc create with
// it and without, by turns, and how long it takes to step aside for a program that does
// nothing. runc is found in PATH, or named by RUNC.
func overhead(ctx context.Context, _ *bench, dir string) error {
	runc := os.Getenv("RUNC")
	if runc == "" {
		runc = "runc"
	}
	runc, err := exec.LookPath(runc)
	if err != nil {
		return fmt.Errorf("find the OCI runtime to compare with (RUNC=…): %w", err)
	}
	bundle, err := ordinaryBundle(ctx, dir, runc)
	if err != nil {
		return err
	}
	wrapper, err := installRuntime(filepath.Join(dir, "runc"), runc)
	if err != nil {
		return err
	}
	root := filepath.Join(dir, "state")
	create := func(program string) (float64, error) {
		cmd := exec.CommandContext(ctx, program, "--root", root, "create", "--bundle", bundle, "--pid-file", filepath.Join(dir, "pid"), "stasis-bench")
		output, err := os.Create(filepath.Join(dir, "output")) // the container keeps what it is given
		if err != nil {
			return 0, err
		}
		defer output.Close()
		cmd.Stdout, cmd.Stderr = output, output
		begun := time.Now()
		err = cmd.Run()
		took := time.Since(begun)
		if err != nil {
			said, _ := os.ReadFile(output.Name())
			return 0, fmt.Errorf("%s create: %w: %s", program, err, said)
		}
		return took.Seconds() * 1000, command(ctx, dir, runc, "--root", root, "delete", "--force", "stasis-bench")
	}
	without, with, err := byTurns(240, func() (float64, error) { return create(runc) }, func() (float64, error) { return create(wrapper) })
	if err != nil {
		return err
	}
	report("runtime_create_runc_ms", without, "ms")
	report("runtime_create_stasis_ms", with, "ms")
	report("runtime_create_ratio", with/without, "x")

	nothing, err := exec.LookPath("true")
	if err != nil {
		return err
	}
	if wrapper, err = installRuntime(filepath.Join(dir, "nothing"), nothing); err != nil {
		return err
	}
	start := func(program string) (float64, error) {
		begun := time.Now()
		err := exec.CommandContext(ctx, program, "create", "--bundle", bundle, "stasis-bench").Run()
		return time.Since(begun).Seconds() * 1000, err
	}
	without, with, err = byTurns(200, func() (float64, error) { return start(nothing) }, func() (float64, error) { return start(wrapper) })
	if err != nil {
		return err
	}
	report("runtime_create_overhead_ms", with-without, "ms")
	return nil
}

// byTurns returns the medians of what two ways take, after rounds that do not count. Each
// begins every other round: what was done before can show.
func byTurns(rounds int, one, other func() (float64, error)) (a, b float64, err error) {
	var ones, others []float64
	for i := range rounds + rounds/10 {
		x, y := 0.0, 0.0
		for turn := range 2 {
			if (i+turn)%2 == 0 {
				x, err = one()
			} else {
				y, err = other()
			}
			if err != nil {
				return 0, 0, err
			}
		}
		if i >= rounds/10 {
			ones, others = append(ones, x), append(others, y)
		}
	}
	return median(ones), median(others), nil
}

// installRuntime installs stasis-runtime with its configuration, as on a node.
func installRuntime(prefix, runtime string) (program string, err error) {
	program = filepath.Join(prefix, "bin", "stasis-runtime")
	for _, d := range []string{"bin", "etc"} {
		if err := os.MkdirAll(filepath.Join(prefix, d), 0o755); err != nil {
			return "", err
		}
	}
	built, err := os.ReadFile("dist/bin/stasis-runtime")
	if err != nil {
		return "", fmt.Errorf("build it first (make image-files): %w", err)
	}
	if err := os.WriteFile(program, built, 0o755); err != nil {
		return "", err
	}
	config, err := json.Marshal(map[string]string{"runtime": runtime})
	if err != nil {
		return "", err
	}
	return program, os.WriteFile(filepath.Join(prefix, "etc", "runtime.json"), config, 0o644)
}

// ordinaryBundle makes a container of nothing, with an OCI spec of the usual size.
func ordinaryBundle(ctx context.Context, dir, runc string) (bundle string, err error) {
	bundle = filepath.Join(dir, "bundle")
	if err := os.MkdirAll(filepath.Join(bundle, "rootfs", "bin"), 0o755); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(bundle, "rootfs", "bin", "app"), nil, 0o755); err != nil {
		return "", err
	}
	if err := command(ctx, bundle, runc, "spec"); err != nil {
		return "", err
	}
	file := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	var spec map[string]any
	if err := json.Unmarshal(data, &spec); err != nil {
		return "", err
	}
	process := spec["process"].(map[string]any)
	process["terminal"], process["args"] = false, []string{"/bin/app"}
	var env []string
	for i := range 100 { // a Service's variables
		env = append(env, fmt.Sprintf("A_SERVICE_%d_PORT_8080_TCP_ADDR=10.96.0.%d", i, i))
	}
	process["env"] = append(env, "PATH=/bin")
	spec["linux"].(map[string]any)["cgroupsPath"] = "/stasis-bench"
	annotations := map[string]string{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": strings.Repeat("a", 64)}
	for i := range 10 {
		annotations[fmt.Sprintf("checkpoint.podstasis.dev/hook-%d", i)] = strings.Repeat("x", 64)
	}
	spec["annotations"] = annotations
	if data, err = json.Marshal(spec); err != nil {
		return "", err
	}
	return bundle, os.WriteFile(file, data, 0o644)
}
