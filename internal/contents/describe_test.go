package contents_test

import (
	"fmt"
	"strings"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
)

// describe makes lines of contents.
func describe(c *api.CheckpointContents) (lines []string) {
	for _, container := range c.Containers {
		for _, p := range container.Processes {
			lines = append(lines, strings.Join(append([]string{container.Name, "process", p.Command}, p.Arguments...), " "))
		}
		for _, f := range container.Changes {
			lines = append(lines, fmt.Sprintf("%s change %s %s", container.Name, f.Change, f.Path))
		}
	}
	return lines
}
