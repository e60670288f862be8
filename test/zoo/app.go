package main

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// app is one application, as its directory describes it.
type app struct {
	// Checks says for readers what state is checked.
	Checks string `json:"checks"`
	// Needs says what has to be done for the application, beyond what any Pod needs.
	Needs string `json:"needs,omitempty"`
	// Packages are Debian's packages that its image is made of; those with a leading
	// minus are left out though others depend on them.
	Packages []string `json:"packages,omitempty"`
	// Quick applications are part of the tests.
	Quick bool `json:"quick,omitempty"`
	// Probe is the command that prints the state; by default the script "probe".
	Probe []string `json:"probe,omitempty"`
	// Same are the keys of the state that must not change, Grows those that are
	// numbers and never fall, and rise while it runs.
	Same  []string `json:"same"`
	Grows []string `json:"grows"`
	// Curve says that the state has lines "curve=N VALUE", which must be those of a
	// Pod that was never checkpointed.
	Curve bool `json:"curve,omitempty"`
	// CRIU says why the application is tried with CRIU alone.
	CRIU string `json:"criu,omitempty"`
	// Refused is what the failed checkpoint says of an application that cannot be
	// checkpointed, before its Pod is frozen.
	Refused string `json:"refused,omitempty"`

	name  string
	size  int     // as which it starts: a service of the bench reads so often as much
	class *string // RuntimeClass of its Pods
	spec  corev1.PodSpec
	files map[string]string // of the ConfigMap, by name
}

// load reads the applications below dir; names selects some.
func load(dir string, names []string, quick bool) ([]*app, error) {
	common, err := os.ReadFile(filepath.Join(dir, "common.sh"))
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var apps []*app
	left := slices.Clone(names)
	for _, entry := range entries {
		if !entry.IsDir() {
			continue
		}
		left = slices.DeleteFunc(left, func(name string) bool { return name == entry.Name() })
		if len(names) > 0 && !slices.Contains(names, entry.Name()) {
			continue
		}
		a, err := loadApp(filepath.Join(dir, entry.Name()), string(common))
		if err != nil {
			return nil, fmt.Errorf("application %s: %w", entry.Name(), err)
		}
		if !quick || a.Quick {
			apps = append(apps, a)
		}
	}
	if len(left) > 0 {
		return nil, fmt.Errorf("there are no applications %s below %s", strings.Join(left, ", "), dir)
	}
	if len(apps) == 0 {
		return nil, errors.New("no application is selected")
	}
	return apps, nil
}

func loadApp(dir, common string) (*app, error) {
	a := &app{name: filepath.Base(dir), files: map[string]string{"common.sh": common}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			return nil, err
		}
		switch entry.Name() {
		case "app.yaml":
			if err := yaml.UnmarshalStrict(content, a); err != nil {
				return nil, fmt.Errorf("app.yaml: %w", err)
			}
		case "pod.yaml":
			if err := yaml.UnmarshalStrict(content, &a.spec); err != nil {
				return nil, fmt.Errorf("pod.yaml: %w", err)
			}
		default:
			a.files[entry.Name()] = string(content)
		}
	}
	switch {
	case a.Checks == "" || len(a.Same)+len(a.Grows) == 0:
		return nil, errors.New("app.yaml: wants checks, and keys in same or grows: nothing would be checked")
	case len(a.spec.Containers) == 0:
		return nil, errors.New("pod.yaml: no containers")
	}
	if len(a.Probe) == 0 {
		if a.files["probe"] == "" {
			return nil, errors.New("no script probe, and app.yaml names no other command")
		}
		a.Probe = script("probe")
	}
	a.complete()
	return a, nil
}

func script(name string) []string { return []string{"/bin/bash", "/zoo/" + name} }

// complete adds to the Pod what all of them have: the files at /zoo, and an end
// that is not waited for.
func (a *app) complete() {
	a.spec.TerminationGracePeriodSeconds = new(int64(1))
	a.spec.Volumes = append(a.spec.Volumes, corev1.Volume{Name: "zoo", VolumeSource: corev1.VolumeSource{
		ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "zoo"}}}})
	for i := range a.spec.Containers {
		c := &a.spec.Containers[i]
		c.Image = cmp.Or(c.Image, a.image())
		c.ImagePullPolicy = corev1.PullNever
		c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "zoo", MountPath: "/zoo"})
	}
}

// image is the name of the image that is made of the application's packages.
func (a *app) image() string { return "localhost/stasis-zoo-" + a.name + ":dev" }

// usesPackages says whether a container runs that image.
func (a *app) usesPackages() bool {
	return slices.ContainsFunc(a.spec.Containers, func(c corev1.Container) bool { return c.Image == a.image() })
}

// pod makes a Pod of the application, to be restored from a checkpoint if one is
// named.
func (a *app) pod(namespace, name, from string) *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: *a.spec.DeepCopy()}
	if a.size > 1 {
		for i := range pod.Spec.Containers {
			env := &pod.Spec.Containers[i].Env
			*env = append(*env, corev1.EnvVar{Name: "SIZE", Value: strconv.Itoa(a.size)})
		}
	}
	pod.Spec.RuntimeClassName = a.class
	if from != "" {
		metav1.SetMetaDataAnnotation(&pod.ObjectMeta, checkpointv1alpha1.AnnotationRestoreFrom, from)
	}
	return pod
}
