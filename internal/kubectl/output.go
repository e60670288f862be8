package kubectl

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/printers"
)

// output prints objects in the form that -o asks for.
type output struct {
	flags *genericclioptions.PrintFlags
}

func newOutput() *output {
	return &output{flags: genericclioptions.NewPrintFlags("created").WithTypeSetter(newScheme())}
}

// asked says whether the user asked for a form; if not, people read the output.
func (o *output) asked() bool {
	return *o.flags.OutputFormat != "" || o.flags.OutputFlagSpecified() || *o.flags.TemplatePrinterFlags.TemplateArgument != ""
}

// validate refuses a form that does not exist before anything is sent.
func (o *output) validate() error {
	if _, err := o.printer(""); err != nil {
		return &exitError{ExitUsage, err}
	}
	return nil
}

func (o *output) printer(suffix string) (printers.ResourcePrinter, error) {
	// The template belongs to the short form: "type/name created (dry run)".
	o.flags.NamePrintFlags.Operation = "created" + suffix
	return o.flags.ToPrinter()
}

// print writes object: the short form, with suffix, unless the user asked for another.
func (o *output) print(out io.Writer, object runtime.Object, suffix string) error {
	printer, err := o.printer(suffix)
	if err != nil {
		return err
	}
	return printer.PrintObj(object, out)
}

// facts prints lines of aligned "name: value", leaving out those without a value.
func facts(out io.Writer, pairs ...string) {
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(out, "  %-11s %s\n", pairs[i]+":", pairs[i+1])
		}
	}
}

// short rounds a duration to what a person reads: milliseconds below ten seconds.
func short(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%dms", d.Round(time.Millisecond).Milliseconds())
	}
	return fmt.Sprintf("%.1fs", d.Seconds())
}

// size gives bytes in a binary unit with one decimal, such as "12.3 MiB".
func size(bytes int64) string {
	if bytes < 1024 {
		return fmt.Sprintf("%d B", bytes)
	}
	value, units := float64(bytes)/1024, "KMGTPE"
	for value >= 1024 && len(units) > 1 {
		value, units = value/1024, units[1:]
	}
	return fmt.Sprintf("%.1f %ciB", value, units[0])
}

// commandLine is what heads both commands' help.
func commandLine(cmd *cobra.Command) {
	cmd.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl " + strings.TrimPrefix(cmd.Name(), "kubectl-")}
	cmd.DisableFlagsInUseLine = true
	cmd.DisableAutoGenTag = true
}
