package page_test

import (
	"bytes"
	"encoding/json"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/contents/page"
)

// specimen is what was read of a real checkpoint.
func specimen(t *testing.T) *api.CheckpointContents {
	t.Helper()
	data, err := os.ReadFile("../testdata/specimen.json")
	must(t, err)
	var c api.CheckpointContents
	must(t, json.Unmarshal(data, &c))
	c.Store = &checkpointv1alpha1.StoredCheckpoint{
		Name: "shared", NewBytes: 3 << 20, Previous: &checkpointv1alpha1.PreviousCheckpoint{Name: "the-one-before"},
		Memory: &checkpointv1alpha1.StoredShare{Bytes: 8 << 20, PresentBytes: 6 << 20, PreviousBytes: 4 << 20}, Files: &checkpointv1alpha1.StoredShare{},
	}
	return &c
}

func written(t *testing.T, c *api.CheckpointContents) []byte {
	t.Helper()
	var b bytes.Buffer
	must(t, page.Write(&b, c, page.Options{Made: time.Unix(1e9, 0)}))
	return b.Bytes()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestThePageShowsWhatIsInside(t *testing.T) {
	c := specimen(t)
	data := written(t, c)
	saysNothing(t, data)
	m := browse(t, data)
	for _, want := range []string{"How it was taken", "Phases", "Facts", "In the store", "web", "log", "Processes", "Memory", "Sockets", "Changes of the root file system", "Inside each process", "Mounts"} {
		if !slices.Contains(m.Sections, want) {
			t.Errorf("there is no section %q: %v", want, m.Sections)
		}
	}
	rows := map[string]int{"stored": 2}
	for _, want := range []string{"the-one-before", "6.0 MiB (75%)", "4.0 MiB (50%)", "shared, which grew by 3.0 MiB"} {
		if !bytes.Contains(data, []byte(want)) {
			t.Errorf("the page does not say %q", want)
		}
	}
	for _, container := range c.Containers {
		rows["processes"] += len(container.Processes)
		rows["sockets"] += len(container.Sockets)
		rows["changes"] += len(container.Changes)
		for _, p := range container.Processes {
			rows["files"] += len(p.Files)
		}
	}
	for table, n := range rows {
		if m.Rows[table] != n {
			t.Errorf("table %s has %d rows, want %d", table, m.Rows[table], n)
		}
	}
	if m.Dark || m.Overflow > 0 || len(m.Unnamed) > 0 || len(m.LowContrast) > 0 || m.Links > 0 {
		t.Errorf("dark %v, %v pixels too wide, without a name: %v, hard to read: %v, links that lead out: %d", m.Dark, m.Overflow, m.Unnamed, m.LowContrast, m.Links)
	}
	barsAddUp(t, m)
}

// barsAddUp checks that bars are as wide as their parts, and that none of those vanishes.
func barsAddUp(t *testing.T, m measured) {
	t.Helper()
	kinds, maps := 0, 0
	widest := 0.0
	for _, b := range m.Bars {
		if b.Min < 1 || b.Sum > b.Width+0.5 || b.Sum < b.Width*0.9 {
			t.Errorf("bar %q of %.1f pixels: its parts add up to %.1f, the smallest has %.1f", b.Class, b.Width, b.Sum, b.Min)
		}
		switch b.Class {
		case "bar kinds":
			kinds++
			widest = max(widest, b.Width)
			if b.Colours < 3 {
				t.Errorf("a bar of %d colours", b.Colours)
			}
		case "bar map":
			maps++
		}
	}
	if kinds != 6 || maps != 6 || widest < 300 {
		t.Errorf("%d bars by kind, %d maps, the widest has %.0f pixels", kinds, maps, widest)
	}
}

func TestThePageIsReadableInTheDarkAndOnASmallScreen(t *testing.T) {
	data := written(t, specimen(t))
	if m := browse(t, data, "--blink-settings=preferredColorScheme=0"); !m.Dark || len(m.LowContrast) > 0 {
		t.Errorf("dark %v, hard to read: %v", m.Dark, m.LowContrast)
	}
	if m := browse(t, data, "--window-size=500,900"); m.Overflow > 0 {
		t.Errorf("%v pixels too wide", m.Overflow)
	}
}

// hostile makes every string of a value one that would be markup, a script, an address.
func hostile(v reflect.Value) {
	const text = `"'><script>window.owned=1</script><img src=x onerror=window.owned=1></style><b onclick=x> javascript:x {{.}} &lt;`
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() && v.Type() != reflect.TypeFor[metav1.Time]() && v.Type() != reflect.TypeFor[metav1.MicroTime]() {
				hostile(v.Field(i))
			}
		}
	case reflect.Slice:
		for i := range v.Len() {
			hostile(v.Index(i))
		}
	case reflect.Pointer:
		if !v.IsNil() {
			hostile(v.Elem())
		}
	case reflect.Map:
		for _, k := range v.MapKeys() {
			value := v.MapIndex(k)
			v.SetMapIndex(k, reflect.Value{})
			v.SetMapIndex(reflect.ValueOf(text).Convert(k.Type()), value)
		}
	}
}

func TestHostileNamesStayText(t *testing.T) {
	c := specimen(t)
	c.Truncated, c.Containers[0].Notes = []string{""}, []string{""}
	phases := c.Phases
	hostile(reflect.ValueOf(c).Elem())
	c.Phases = append(phases, c.Phases...)
	data := written(t, c)
	saysNothing(t, data)
	m := browse(t, data)
	if m.Scripts != 0 || m.Images != 0 || m.Handlers != 0 || m.Links != 0 || m.Owned {
		t.Errorf("%d scripts, %d images, %d handlers, %d links that lead out; a script ran: %v", m.Scripts, m.Images, m.Handlers, m.Links, m.Owned)
	}
	if !strings.Contains(m.Title, "<script>") || m.Rows["processes"] != len(c.Containers[0].Processes)+len(c.Containers[1].Processes) {
		t.Errorf("title %q, %d processes", m.Title, m.Rows["processes"])
	}
}

func TestCharactersThatDoNotShowAreSpeltOut(t *testing.T) {
	c := specimen(t)
	c.Containers[0].Processes[0].Command = "a\u202etxt.exe\x07"
	if got := string(written(t, c)); !strings.Contains(got, `a\u202etxt.exe\x07`) || strings.ContainsRune(got, '\u202e') {
		t.Error("a turned name is shown as it is")
	}
}

func TestThePageNeedsNothingElse(t *testing.T) {
	data := written(t, specimen(t))
	for _, outside := range []string{"http://", "https://", "@import", "url(", "<script", "src="} {
		if bytes.Contains(data, []byte(outside)) {
			t.Errorf("the page has %q", outside)
		}
	}
	if !regexp.MustCompile(`Content-Security-Policy" content="default-src 'none'`).Match(data) {
		t.Error("the page does not forbid itself to load anything")
	}
}

func TestAPageOfNothingIsAPage(t *testing.T) {
	c := &api.CheckpointContents{Containers: []api.ContainerContents{{Name: "web", Processes: []api.Process{{PID: 1, State: "zombie"}}}}}
	c.Phases = []checkpointv1alpha1.PhaseTiming{{Name: "freeze"}}
	if m := browse(t, written(t, c)); m.Rows["processes"] != 1 || m.Overflow > 0 {
		t.Errorf("got %+v", m)
	}
}
