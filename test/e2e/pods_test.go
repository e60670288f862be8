package e2e

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

const (
	imageBusybox = "localhost/busybox:1"
	imageDemo    = "localhost/stasis-demo:dev"
	imageSubject = "localhost/stasis-e2e:dev"
)

// podBuilder makes a Pod step by step.
type podBuilder struct{ pod corev1.Pod }

// MakePod begins a Pod without containers, for the engine that is tried.
func MakePod(name string) *podBuilder {
	grace := int64(3)
	b := &podBuilder{corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       corev1.PodSpec{TerminationGracePeriodSeconds: &grace},
	}}
	if engine.sources != "" {
		b.RuntimeClass(engine.sources)
	}
	return b
}

// Obj is the Pod as built; each call gives another copy.
func (b *podBuilder) Obj() *corev1.Pod { return b.pod.DeepCopy() }

func (b *podBuilder) Container(name, image string, command ...string) *podBuilder {
	b.pod.Spec.Containers = append(b.pod.Spec.Containers, corev1.Container{Name: name, Image: image, Command: command, ImagePullPolicy: corev1.PullIfNotPresent})
	return b
}

func (b *podBuilder) InitContainer(name, image string, command ...string) *podBuilder {
	b.pod.Spec.InitContainers = append(b.pod.Spec.InitContainers, corev1.Container{Name: name, Image: image, Command: command, ImagePullPolicy: corev1.PullIfNotPresent})
	return b
}

// Shell adds a busybox container that runs a script.
func (b *podBuilder) Shell(name, script string) *podBuilder {
	return b.Container(name, imageBusybox, "sh", "-c", script)
}

// Subject adds a container of the program in test/e2e/subject.
func (b *podBuilder) Subject() *podBuilder { return b.Container("subject", imageSubject, "subject") }

// last is the container that was added last.
func (b *podBuilder) last() *corev1.Container {
	return &b.pod.Spec.Containers[len(b.pod.Spec.Containers)-1]
}

// EmptyDir mounts an emptyDir in all containers.
func (b *podBuilder) EmptyDir(name, path string, medium corev1.StorageMedium) *podBuilder {
	b.pod.Spec.Volumes = append(b.pod.Spec.Volumes, corev1.Volume{
		Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: medium}},
	})
	for i := range b.pod.Spec.Containers {
		container := &b.pod.Spec.Containers[i]
		container.VolumeMounts = append(container.VolumeMounts, corev1.VolumeMount{Name: name, MountPath: path})
	}
	return b
}

func (b *podBuilder) Annotation(name, value string) *podBuilder {
	metav1.SetMetaDataAnnotation(&b.pod.ObjectMeta, name, value)
	return b
}

func (b *podBuilder) RestoreFrom(checkpoint string) *podBuilder {
	return b.Annotation(checkpointv1alpha1.AnnotationRestoreFrom, checkpoint)
}

func (b *podBuilder) RuntimeClass(name string) *podBuilder {
	b.pod.Spec.RuntimeClassName = &name
	return b
}

func (b *podBuilder) Node(name string) *podBuilder {
	b.pod.Spec.NodeName = name
	return b
}

// NowhereToRun keeps the scheduler from finding a node.
func (b *podBuilder) NowhereToRun() *podBuilder {
	b.pod.Spec.NodeSelector = map[string]string{"no-such": "label"}
	return b
}

func (b *podBuilder) Grace(seconds int64) *podBuilder {
	b.pod.Spec.TerminationGracePeriodSeconds = &seconds
	return b
}

func (b *podBuilder) Restart(policy corev1.RestartPolicy) *podBuilder {
	b.pod.Spec.RestartPolicy = policy
	return b
}

func (b *podBuilder) Named(name string) *podBuilder {
	b.pod.Name = name
	return b
}

// everySecond is a probe that fails at once.
func everySecond(handler corev1.ProbeHandler) *corev1.Probe {
	return &corev1.Probe{ProbeHandler: handler, PeriodSeconds: 1, FailureThreshold: 1, TimeoutSeconds: 5}
}

// Probes gives the last container an httpGet liveness, a tcpSocket readiness and
// an exec startup probe.
func (b *podBuilder) Probes() *podBuilder {
	port := intstr.FromInt32(8080)
	b.last().LivenessProbe = everySecond(corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: port}})
	b.last().ReadinessProbe = everySecond(corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: port}})
	b.last().StartupProbe = everySecond(corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"subject", "get", "/healthz"}}})
	b.last().StartupProbe.FailureThreshold = 30
	return b
}

// Counters is the demo's Pod.
func Counters(name string) *podBuilder {
	return MakePod(name).
		Container("a", imageDemo, "counter-a").
		Container("b", imageDemo, "counter-b").
		EmptyDir("shared", "/shared", corev1.StorageMediumDefault)
}
