package lazy

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

func somePlan() *Plan {
	return &Plan{Dir: "/d", ManifestDigest: "sha256:1", Patience: time.Minute, Processes: []Process{
		{PID: 1, File: "containers/a/criu/pages-1.img", Runs: []Run{{0x1000, 2, 0}, {0x5000, 1, 7}}}, {PID: 7, File: "containers/a/criu/pages-2.img"},
	}}
}

func TestAPlanIsReadAsItWasWritten(t *testing.T) {
	file := filepath.Join(t.TempDir(), "plan")
	if err := somePlan().Write(file); err != nil {
		t.Fatal(err)
	}
	got, err := ReadPlan(file)
	if err != nil || !reflect.DeepEqual(got, somePlan()) || got.Bytes() != 3*pageSize {
		t.Errorf("%+v, %v", got, err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for n := range data {
		if _, err := decodePlan(bytes.NewReader(data[:n])); err == nil {
			t.Fatalf("%d of %d bytes are taken for a plan", n, len(data))
		}
	}
	if _, err := decodePlan(bytes.NewReader(append(data, 0))); err == nil {
		t.Error("a byte more is taken for a plan")
	}
}

func FuzzPlan(f *testing.F) {
	var b bytes.Buffer
	if err := somePlan().encode(&b); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := decodePlan(bytes.NewReader(data))
		if err != nil {
			return
		}
		for _, process := range p.Processes {
			last := uint64(0)
			for _, r := range process.Runs {
				if r.Start < last || r.Start%pageSize != 0 || r.Page+r.Pages > maxPage {
					t.Errorf("%+v", r)
				}
				last = r.Start + r.Pages*pageSize
			}
		}
	})
}

func TestTheOrderOfAnEarlierRestoreIsKeptAndBounded(t *testing.T) {
	p := &Plan{Order: filepath.Join(t.TempDir(), "orders", "x"), Processes: []Process{{}}}
	o := readOrder(p)
	if len(o.take()) != 0 {
		t.Error("there was none")
	}
	for i := range 2 * maxOrder {
		o.note(blockID{0, i / 2})
	}
	o.note(blockID{5, 1}) // of a file that the next plan does not have
	if err := o.write(nil); err != nil {
		t.Fatal(err)
	}
	again := readOrder(p)
	last := again.take()
	if len(last) != maxOrder || last[0] != (blockID{0, 0}) || last[1] != (blockID{0, 1}) {
		t.Errorf("%d: %v", len(last), last[:2])
	}
	again.note(blockID{0, 99999})
	if err := again.write([]blockID{{0, 3}, {5, 1}}); err != nil {
		t.Fatal(err)
	}
	if last := readOrder(p).take(); len(last) != 2 || last[0] != (blockID{0, 3}) || last[1] != (blockID{0, 99999}) {
		t.Errorf("%v", last)
	}
	if err := os.Truncate(p.Order, 13); err != nil {
		t.Fatal(err)
	}
	if last := readOrder(p).take(); len(last) != 1 {
		t.Errorf("half a number is taken for one: %v", last)
	}
}
