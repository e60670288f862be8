package kubectl

import (
	"strings"

	utilrand "k8s.io/apimachinery/pkg/util/rand"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// What a Pod and a PodCheckpoint are called on the command line; the first is how
// messages call them.
func podTypes() []string { return []string{"pod", "pods", "po"} }

func checkpointTypes() []string {
	return []string{"podcheckpoint", "podcheckpoints", "pcp",
		"podcheckpoint." + checkpointv1alpha1.GroupName, "podcheckpoints." + checkpointv1alpha1.GroupName}
}

// resourceName takes NAME, or TYPE/NAME where TYPE is one of types.
func resourceName(arg string, types []string) (string, error) {
	kind, name, found := strings.Cut(arg, "/")
	if !found {
		kind, name = types[0], arg
	}
	if name == "" || strings.Contains(name, "/") {
		return "", usagef("%q is not a name of a %s", arg, types[0])
	}
	for _, known := range types {
		if strings.EqualFold(kind, known) {
			return name, nil
		}
	}
	return "", usagef("%q is a %s: this command takes the name of a %s", arg, kind, types[0])
}

// checkpointNames takes one name or several.
func checkpointNames(args []string) ([]string, error) {
	names := make([]string, 0, len(args))
	for _, arg := range args {
		name, err := resourceName(arg, checkpointTypes())
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// maxCheckpointName is how long a PodCheckpoint's name may be.
const maxCheckpointName = 128

// newName makes a name as the API server makes one of generateName: chosen here, so
// that a call whose answer is lost can be repeated.
func newName(base string) string {
	const random = 5
	if most := maxCheckpointName - random - 1; len(base) > most {
		base = strings.TrimRight(base[:most], "-.")
	}
	return base + "-" + utilrand.String(random)
}
