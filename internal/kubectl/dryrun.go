package kubectl

import (
	"github.com/spf13/pflag"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// fieldOwner is who these commands are among those that manage an object's fields.
const fieldOwner = client.FieldOwner("kubectl-stasis")

// dryRun is the value of --dry-run.
type dryRun string

const (
	dryRunNone   dryRun = "none"
	dryRunClient dryRun = "client"
	dryRunServer dryRun = "server"
)

// dryRunFlag adds --dry-run, which alone means the client's, as in kubectl.
func dryRunFlag(flags *pflag.FlagSet) *dryRun {
	value := dryRunNone
	flags.Var(&value, "dry-run", `"none", "server" (send it, but have nothing stored) or "client" (send nothing).`)
	return &value
}

// String, Set and Type make it a flag's value.
func (d *dryRun) String() string { return string(*d) }
func (d *dryRun) Type() string   { return "string" }

func (d *dryRun) Set(value string) error {
	switch v := dryRun(value); v {
	case dryRunNone, dryRunClient, dryRunServer:
		*d = v
		return nil
	}
	return usagef(`must be "none", "server" or "client"`)
}

// suffix is what kubectl appends to "created".
func (d dryRun) suffix() string {
	switch d {
	case dryRunClient:
		return " (dry run)"
	case dryRunServer:
		return " (server dry run)"
	}
	return ""
}

func (d dryRun) createOptions() []client.CreateOption {
	options := []client.CreateOption{fieldOwner}
	if d == dryRunServer {
		options = append(options, client.DryRunAll)
	}
	return options
}
