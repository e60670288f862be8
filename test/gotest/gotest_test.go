package gotest

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
)

func TestEveryTestIsToldOnceWithWhatItAndItsPartsPrinted(t *testing.T) {
	var got, outside []string
	read(strings.NewReader(`{"Action":"output","Output":"cluster is ready\n"}
{"Action":"run","Test":"TestA"}
{"Action":"output","Test":"TestA","Output":"one\n"}
{"Action":"output","Test":"TestB","Output":"other\n"}
{"Action":"output","Test":"TestA/part","Output":"two\n"}
{"Action":"fail","Test":"TestA/part"}
{"Action":"fail","Test":"TestA"}
not JSON
{"Action":"pass","Test":"TestB"}
{"Action":"skip","Test":"TestC"}
{"Action":"fail"}
{"Action":"output","Output":"FAIL"}`), func(test Test) { got = append(got, fmt.Sprintf("%+v", test)) }, func(line string) { outside = append(outside, line) })
	if want := []string{"{Name:TestA Action:fail Output:[one\n two\n]}", "{Name:TestB Action:pass Output:[other\n]}", "{Name:TestC Action:skip Output:[]}"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
	if want := []string{"cluster is ready", "not JSON", "FAIL"}; !reflect.DeepEqual(outside, want) {
		t.Errorf("outside of tests: %q", outside)
	}
}
