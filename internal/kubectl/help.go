package kubectl

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/cli-runtime/pkg/genericclioptions"
)

const exitCodesHelp = `Exit codes:
  0    done (with --wait=false: asked for)
  1    failed or refused
  2    wrong command line, nothing was sent
  3    still in progress when the wait ended
  130  interrupted while waiting; what was asked for goes on`

// program makes cmd the root of a plugin: its help has kubectl's form, and it has a
// subcommand that writes completion scripts.
func program(cmd *cobra.Command, env *environment) *cobra.Command {
	plugin := cmd.Name()
	cmd.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl " + strings.TrimPrefix(plugin, "kubectl-")}
	cmd.DisableAutoGenTag = true
	cmd.CompletionOptions.DisableDefaultCmd = true
	cmd.SetHelpCommand(&cobra.Command{Use: "_help", Hidden: true}) // "help" is a Pod's name like any other
	cmd.PersistentFlags().SortFlags = false
	env.flags.AddFlags(cmd.PersistentFlags())
	cmd.SetOut(env.Out)
	cmd.SetErr(env.ErrOut)
	cmd.SetHelpFunc(func(cmd *cobra.Command, _ []string) { writeHelp(env.Out, cmd) })
	cmd.SetUsageFunc(func(cmd *cobra.Command) error { writeHelp(env.ErrOut, cmd); return nil })
	return cmd
}

// writeHelp writes a command's help in the order that kubectl has: what it does,
// examples, subcommands, flags, usage. kubectl's own flags are only mentioned.
func writeHelp(out io.Writer, cmd *cobra.Command) {
	fmt.Fprintf(out, "%s\n", strings.TrimSpace(or(cmd.Long, cmd.Short)))
	if cmd.Example != "" {
		fmt.Fprintf(out, "\nExamples:\n%s\n", strings.Trim(cmd.Example, "\n"))
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprint(out, "\nAvailable Commands:\n")
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() {
				fmt.Fprintf(out, "  %-*s %s\n", cmd.NamePadding(), sub.Name(), sub.Short)
			}
		}
	}
	if own := ownFlags(cmd); own.HasAvailableFlags() {
		fmt.Fprintf(out, "\nOptions:\n%s\n", strings.TrimRight(own.FlagUsagesWrapped(110), "\n"))
	}
	_, arguments, _ := strings.Cut(cmd.Use, " ")
	fmt.Fprintf(out, "\nUsage:\n  %s\n", strings.TrimSpace(cmd.CommandPath()+" "+arguments))
	fmt.Fprint(out, "\nkubectl's own flags work too (-n, --context, --kubeconfig, …): \"kubectl options\" lists them.\n")
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(out, "Use \"%s COMMAND --help\" for more about a command.\n", cmd.CommandPath())
	}
}

// ownFlags are a command's flags without those that every kubectl command has.
func ownFlags(cmd *cobra.Command) *pflag.FlagSet {
	general := pflag.NewFlagSet("", pflag.ContinueOnError)
	genericclioptions.NewConfigFlags(true).AddFlags(general)
	own := pflag.NewFlagSet(cmd.Name(), pflag.ContinueOnError)
	own.SortFlags = false
	var rare []*pflag.Flag
	cmd.Flags().VisitAll(func(flag *pflag.Flag) {
		inherited := general.Lookup(flag.Name)
		switch {
		case flag.Name == "help" || inherited != nil && inherited.Usage == flag.Usage:
		case refinesOutput(flag.Name):
			rare = append(rare, flag)
		default:
			own.AddFlag(flag)
		}
	})
	for _, flag := range rare {
		own.AddFlag(flag)
	}
	return own
}

// refinesOutput says of a flag that it belongs to some forms of --output: it is
// shown after that.
func refinesOutput(name string) bool {
	return name == "show-managed-fields" || name == "template" || name == "allow-missing-template-keys"
}

// exactly says how many arguments a command takes, and what they are.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != n {
			return usagef("%s must be named, got %d arguments", what, len(args))
		}
		return nil
	}
}

func atLeastOne(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usagef("at least one %s must be named", what)
		}
		return nil
	}
}

func none(_ *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("this command takes no arguments, got %q", args)
	}
	return nil
}
