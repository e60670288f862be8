package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

const (
	imageBusybox = "localhost/busybox:1"
	imageDemo    = "localhost/stasis-demo:dev"
)

// shape is a kind of Pod. Every container of it that counts logs lines with
// "count=N" and "nonce=X", each count one more than the one before, and
// "DISAGREE" when it finds its state to be wrong.
type shape struct {
	name   string
	counts []string // containers that count
	spec   func() corev1.PodSpec
}

// counting is a shell that counts, having done setup; each is done in each step.
func counting(setup, each string) []string {
	return []string{"sh", "-c", `nonce=$(cat /proc/sys/kernel/random/uuid); ` + setup + `i=0; while :; do ` + each +
		`i=$((i+1)); echo "count=$i nonce=$nonce"; usleep 50000; done`}
}

func container(name, image string, command ...string) corev1.Container {
	return corev1.Container{Name: name, Image: image, ImagePullPolicy: corev1.PullIfNotPresent, Command: command}
}

func shell(name, setup, each string) corev1.Container {
	return container(name, imageBusybox, counting(setup, each)...)
}

func mounting(path string, c corev1.Container) corev1.Container {
	c.VolumeMounts = []corev1.VolumeMount{{Name: "shared", MountPath: path}}
	return c
}

var emptyDir = []corev1.Volume{{Name: "shared", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}

var shapes = []shape{
	{"counters", []string{"a", "b"}, func() corev1.PodSpec {
		return corev1.PodSpec{
			Containers: []corev1.Container{
				mounting("/shared", container("a", imageDemo, "counter-a")),
				mounting("/shared", container("b", imageDemo, "counter-b")),
			},
			Volumes: emptyDir,
		}
	}},
	{"files", []string{"main"}, func() corev1.PodSpec { // what it wrote last must be what it reads
		return corev1.PodSpec{
			Containers: []corev1.Container{mounting("/data", shell("main", `echo 0 > /data/last; echo 0 > /last; `,
				`read was < /data/last; read too < /last; [ "$was $too" = "$i $i" ] || { echo "DISAGREE at $i: $was $too"; exit 1; }; `+
					`echo $((i+1)) > /data/last; echo $((i+1)) > /last; `))},
			Volumes: emptyDir,
		}
	}},
	{"memory", []string{"main"}, func() corev1.PodSpec { // some 100 MB in a shell's variable
		return corev1.PodSpec{Containers: []corev1.Container{shell("main", `x=$(head -c 50000000 /dev/zero | tr '\0' a); `,
			`[ $((i%200)) != 0 ] || [ ${#x} = 50000000 ] || { echo "DISAGREE at $i: ${#x} bytes"; exit 1; }; `)}}
	}},
	{"family", []string{"sidecar", "main"}, func() corev1.PodSpec {
		sidecar := shell("sidecar", "", "")
		sidecar.RestartPolicy = new(corev1.ContainerRestartPolicyAlways)
		return corev1.PodSpec{
			InitContainers: []corev1.Container{container("setup", imageBusybox, "true"), sidecar},
			Containers:     []corev1.Container{shell("main", "", "")},
		}
	}},
	{"busy", []string{"main"}, func() corev1.PodSpec { // always throttled
		busy := shell("main", "", `j=0; while [ $j -lt 3000 ]; do j=$((j+1)); done; `)
		busy.Resources.Limits = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("64Mi")}
		return corev1.PodSpec{Containers: []corev1.Container{busy}}
	}},
}

// pod makes a Pod of the shape, to be restored from a checkpoint if one is named.
func (s shape) pod(namespace, name, from string) *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: s.spec()}
	pod.Spec.TerminationGracePeriodSeconds = new(int64(1))
	if from != "" {
		metav1.SetMetaDataAnnotation(&pod.ObjectMeta, checkpointv1alpha1.AnnotationRestoreFrom, from)
	}
	return pod
}

// reading is what a container's log tells.
type reading struct {
	first, last uint64
	nonce       string
}

// read judges the log of a container that counts. One whose containerd was killed
// may lack lines and parts of lines, which containerd had taken and not written;
// never may it go back, change its nonce, or disagree.
func read(log string, gaps bool) (reading, error) {
	var r reading
	log = log[:strings.LastIndexByte(log, '\n')+1] // the last line may still be in the making
	for line := range strings.Lines(log) {
		if strings.Contains(line, "DISAGREE") {
			return r, errors.New(strings.TrimSpace(line))
		}
		fields := map[string]string{}
		for field := range strings.FieldsSeq(line) {
			if key, value, ok := strings.Cut(field, "="); ok {
				fields[key] = value
			}
		}
		var count uint64
		if _, err := fmt.Sscan(fields["count"], &count); err != nil || fields["nonce"] == "" {
			if gaps {
				continue
			}
			return r, fmt.Errorf("line %q is none of a count, has %v", line, slices.Sorted(maps.Keys(fields)))
		}
		switch nonce := fields["nonce"]; {
		case r.nonce == "":
			r.first, r.nonce = count, nonce
		case nonce != r.nonce:
			return r, fmt.Errorf("nonce %s after %s: started anew", nonce, r.nonce)
		case count <= r.last, count != r.last+1 && !gaps:
			return r, fmt.Errorf("count %d after %d", count, r.last)
		}
		r.last = count
	}
	if r.nonce == "" {
		return r, errors.New("nothing counted yet")
	}
	return r, nil
}
