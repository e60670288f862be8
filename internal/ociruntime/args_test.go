package ociruntime

import (
	"reflect"
	"strings"
	"testing"
)

func TestCommandLinesOfShimsAreUnderstood(t *testing.T) {
	for line, want := range map[string]invocation{
		"--root /r --log /l --log-format json create --bundle /b --pid-file /p --console-socket /c id": {
			Root: "/r", Log: "/l", Command: "create", Bundle: "/b", PIDFile: "/p", Console: "/c", ID: "id"},
		"--root=/r --systemd-cgroup --debug create --bundle=/b --no-pivot id": {
			Root: "/r", Others: []string{"--systemd-cgroup", "--debug"}, Command: "create", Bundle: "/b", ID: "id"},
		"create -b /b id":               {Root: "/run/runc", Command: "create", Bundle: "/b", ID: "id"},
		"kill --all id 9":               {Root: "/run/runc", Command: "kill", ID: "id"},
		"delete --force id":             {Root: "/run/runc", Command: "delete", ID: "id"},
		"exec --process /p --detach id": {Root: "/run/runc", Command: "exec", ID: "id"},
		"--version":                     {Root: "/run/runc", Others: []string{"--version"}},
		"--root":                        {Root: ""},
		"":                              {Root: "/run/runc"},
	} {
		got := parse(strings.Fields(line))
		got.Global = nil
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %+v, want %+v", line, got, want)
		}
	}
}

func FuzzCommandLines(f *testing.F) {
	f.Add("--root /r create --bundle /b id")
	f.Fuzz(func(t *testing.T, line string) { parse(strings.Fields(line)) })
}
