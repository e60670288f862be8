package engine

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Option is one that users set in spec.options of a PodCheckpoint.
type Option struct {
	Name string
	// Values are all that it takes; none: those that Form describes and Check takes.
	Values []string
	Form   string
	Check  func(value string) error // nil: any
	// Default says what holds without it, and Help what it is for: half a line each.
	Default, Help string
}

// check says what is wrong with a value.
func (o Option) check(value string) error {
	if len(o.Values) > 0 && !slices.Contains(o.Values, value) {
		return fmt.Errorf("%w: %s=%q: choose %s, or leave it out", ErrOption, o.Name, value, strings.Join(o.Values, " or "))
	}
	if o.Check == nil {
		return nil
	}
	return o.Check(value)
}

// CheckOptions refuses options that an engine does not know, and values that they do not
// take (ErrOption).
func CheckOptions(e Engine, options map[string]string) error {
	known := e.Options()
	for name, value := range options {
		i := slices.IndexFunc(known, func(o Option) bool { return o.Name == name })
		if i < 0 {
			var names []string
			for _, o := range known {
				names = append(names, o.Name)
			}
			slices.Sort(names)
			return fmt.Errorf("%w: the engine %s does not know %q; it knows %s", ErrOption, e.Name(), name, strings.Join(names, ", "))
		}
		if err := known[i].check(value); err != nil {
			return err
		}
	}
	return nil
}

// OptionFreezeBudget is an option of every engine: for how long the Pod may stand
// still, as a duration (time.ParseDuration). Nothing is frozen when more is
// expected, and the processes run again when it is used up, however much time the
// call has left. Without the option the call's deadline is the only bound.
const OptionFreezeBudget = "freezeBudget"

// FreezeBudgetOption is OptionFreezeBudget for an engine's Options.
var FreezeBudgetOption = Option{
	Name: OptionFreezeBudget, Form: "a duration such as 800ms",
	Check: func(value string) error {
		_, err := FreezeBudget(map[string]string{OptionFreezeBudget: value})
		return err
	},
	Default: "what the Pod's probes bear, else the timeout",
	Help:    "for how long the Pod may stand still",
}

// FreezeBudget reads OptionFreezeBudget; 0 is none.
func FreezeBudget(options map[string]string) (time.Duration, error) {
	value, ok := options[OptionFreezeBudget]
	if !ok {
		return 0, nil
	}
	budget, err := time.ParseDuration(value)
	if err != nil || budget <= 0 {
		return 0, fmt.Errorf("%w: %s=%q is not a positive duration such as 800ms", ErrOption, OptionFreezeBudget, value)
	}
	return budget, nil
}
