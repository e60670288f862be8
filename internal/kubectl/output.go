package kubectl

import (
	"io"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/printers"
)

// output prints objects in the form that -o asks for.
type output struct {
	flags     *genericclioptions.PrintFlags
	operation string // what has been done to the object, for the short form
}

// newOutput adds kubectl's flags for output to a command.
func newOutput(cmd *cobra.Command, operation string) *output {
	o := &output{flags: genericclioptions.NewPrintFlags(operation).WithTypeSetter(newScheme()), operation: operation}
	o.flags.AddFlags(cmd)
	return o
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
	// The suffix belongs to the short form: "type/name created (dry run)".
	o.flags.NamePrintFlags.Operation = o.operation + suffix
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

// printAll writes several objects: their names one by one, anything else as the list.
func (o *output) printAll(out io.Writer, list runtime.Object, objects []runtime.Object, suffix string) error {
	if o.asked() && *o.flags.OutputFormat != "name" {
		return o.print(out, list, suffix)
	}
	for _, object := range objects {
		if err := o.print(out, object, suffix); err != nil {
			return err
		}
	}
	return nil
}
