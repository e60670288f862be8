package podtemplate

import (
	"cmp"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// maxShown is how many characters of a value a message shows: events and status
// messages are bounded.
const maxShown = 200

// Compare says where a Pod differs from the template that it would be restored
// with; none means that it may be restored (P21). It looks at the spec only, and
// not at what admission, defaulting, placement and restoring put there. Each
// error names the field's path in the Pod, its value and the checkpoint's value.
//
// A missing template is a difference: nothing is restored unchecked.
func Compare(template *corev1.PodTemplateSpec, pod *corev1.Pod) field.ErrorList {
	path := field.NewPath("spec")
	if template == nil {
		return field.ErrorList{field.Forbidden(path, "the checkpoint holds no Pod template to compare with")}
	}
	was, is := template.Spec.DeepCopy(), pod.Spec.DeepCopy()
	normalise(was)
	normalise(is)
	var d comparison
	d.walk(path, reflect.ValueOf(*was), reflect.ValueOf(*is))
	return d.errors
}

// keys says what identifies an element of a list, for lists whose order says
// nothing or whose elements have names. Elements of other lists are identified by
// their position. Containers keep their order too: it is the order of their start.
var keys = map[reflect.Type]listKey{
	reflect.TypeFor[corev1.Container]():        {ordered: true, of: func(v any) string { return v.(corev1.Container).Name }},
	reflect.TypeFor[corev1.Volume]():           {of: func(v any) string { return v.(corev1.Volume).Name }},
	reflect.TypeFor[corev1.VolumeMount]():      {of: func(v any) string { return v.(corev1.VolumeMount).MountPath }},
	reflect.TypeFor[corev1.VolumeDevice]():     {of: func(v any) string { return v.(corev1.VolumeDevice).DevicePath }},
	reflect.TypeFor[corev1.PodResourceClaim](): {of: func(v any) string { return v.(corev1.PodResourceClaim).Name }},
	reflect.TypeFor[corev1.HostAlias]():        {of: func(v any) string { return v.(corev1.HostAlias).IP }},
}

type listKey struct {
	ordered bool
	of      func(any) string
}

// leaves are compared as values, whatever they consist of.
var leaves = map[reflect.Type]bool{
	reflect.TypeFor[resource.Quantity]():  true,
	reflect.TypeFor[intstr.IntOrString](): true,
	reflect.TypeFor[metav1.Time]():        true,
	reflect.TypeFor[metav1.FieldsV1]():    true,
}

type comparison struct {
	errors field.ErrorList
}

// walk compares what the checkpoint has (was) with what the Pod has (is).
func (d *comparison) walk(path *field.Path, was, is reflect.Value) {
	switch t := is.Type(); {
	case leaves[t]:
		d.leaf(path, was, is)
	case t.Kind() == reflect.Pointer:
		if was.IsNil() || is.IsNil() {
			if was.IsNil() != is.IsNil() {
				d.differ(path, was, is)
			}
			return
		}
		d.walk(path, was.Elem(), is.Elem())
	case t.Kind() == reflect.Struct:
		for i := range t.NumField() {
			name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
			child := path
			if name != "" { // else inlined
				child = path.Child(name)
			}
			d.walk(child, was.Field(i), is.Field(i))
		}
	case t.Kind() == reflect.Slice:
		if key, keyed := keys[t.Elem()]; keyed {
			d.keyed(path, key, was, is)
			return
		}
		if was.Len() != is.Len() {
			d.differ(path, was, is)
			return
		}
		for i := range is.Len() {
			d.walk(path.Index(i), was.Index(i), is.Index(i))
		}
	case t.Kind() == reflect.Map:
		d.mapped(path, was, is)
	default:
		d.leaf(path, was, is)
	}
}

func (d *comparison) leaf(path *field.Path, was, is reflect.Value) {
	if !equality.Semantic.DeepEqual(was.Interface(), is.Interface()) {
		d.differ(path, was, is)
	}
}

func (d *comparison) keyed(path *field.Path, key listKey, was, is reflect.Value) {
	index := make(map[string]int, was.Len())
	wasKeys, isKeys := make([]string, was.Len()), make([]string, is.Len())
	for i := range was.Len() {
		wasKeys[i] = key.of(was.Index(i).Interface())
		index[wasKeys[i]] = i
	}
	for i := range is.Len() {
		isKeys[i] = key.of(is.Index(i).Interface())
	}
	wasOrder, isOrder := slices.Clone(wasKeys), slices.Clone(isKeys)
	if !key.ordered {
		slices.Sort(wasOrder)
		slices.Sort(isOrder)
	}
	if !slices.Equal(wasOrder, isOrder) {
		d.differ(path, reflect.ValueOf(wasOrder), reflect.ValueOf(isOrder))
	}
	for i, k := range isKeys {
		if j, both := index[k]; both {
			d.walk(path.Index(i), was.Index(j), is.Index(i))
		}
	}
}

func (d *comparison) mapped(path *field.Path, was, is reflect.Value) {
	all := make(map[string]reflect.Value, is.Len())
	for _, m := range []reflect.Value{was, is} {
		for _, k := range m.MapKeys() {
			all[k.String()] = k
		}
	}
	names := make([]string, 0, len(all))
	for name := range all {
		names = append(names, name)
	}
	slices.SortFunc(names, cmp.Compare[string])
	for _, name := range names {
		w, i := was.MapIndex(all[name]), is.MapIndex(all[name])
		if !w.IsValid() || !i.IsValid() {
			d.differ(path.Key(name), w, i)
			continue
		}
		d.walk(path.Key(name), w, i)
	}
}

func (d *comparison) differ(path *field.Path, was, is reflect.Value) {
	text := show(value(is))
	var shown any = json.RawMessage(text) // printed as it is
	if !json.Valid([]byte(text)) {
		shown = text
	}
	d.errors = append(d.errors, field.Invalid(path, shown, "the checkpoint has "+show(value(was))))
}

// value is what v holds, nil for a missing map entry.
func value(v reflect.Value) any {
	if !v.IsValid() {
		return nil
	}
	return v.Interface()
}

// show renders a value as JSON, cut off where it gets long.
func show(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprintf("%v", v)
	}
	if len(b) > maxShown {
		return strings.ToValidUTF8(string(b[:maxShown]), "") + "…"
	}
	return string(b)
}
