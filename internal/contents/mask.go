package contents

import "strings"

// harmless says whether the value of an environment variable is shown to everybody
// who may see a checkpoint's contents. All others are masked: a list of names that
// sound like secrets would always lack one.
func harmless(name string) bool {
	switch name {
	case "PATH", "HOME", "HOSTNAME", "LANG", "LANGUAGE", "PWD", "SHELL", "SHLVL", "TERM", "TZ", "USER", "LOGNAME":
		return true
	}
	return strings.HasPrefix(name, "LC_")
}
