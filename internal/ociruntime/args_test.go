package ociruntime

import (
	"reflect"
	"strings"
	"testing"
)

func TestCommandLinesOfShimsAreUnderstood(t *testing.T) {
	for line, want := range map[string]invocation{
		"--root /r --log /l --log-format json create --bundle /b --pid-file /p --console-socket /c id": {
			root: "/r", log: "/l", command: "create", bundle: "/b", pidFile: "/p", console: "/c", id: "id"},
		"--root=/r --systemd-cgroup --debug create --bundle=/b --no-pivot id": {
			root: "/r", others: []string{"--systemd-cgroup", "--debug"}, command: "create", bundle: "/b", id: "id"},
		"create -b /b id":               {root: "/run/runc", command: "create", bundle: "/b", id: "id"},
		"kill --all id 9":               {root: "/run/runc", command: "kill", id: "id"},
		"delete --force id":             {root: "/run/runc", command: "delete", id: "id"},
		"exec --process /p --detach id": {root: "/run/runc", command: "exec", id: "id"},
		"--version":                     {root: "/run/runc", others: []string{"--version"}},
		"--root":                        {root: ""},
		"":                              {root: "/run/runc"},
	} {
		got := parse(strings.Fields(line))
		got.global = nil
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%q: got %+v, want %+v", line, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("--root /r create --bundle /b id")
	f.Fuzz(func(t *testing.T, line string) { parse(strings.Fields(line)) })
}
