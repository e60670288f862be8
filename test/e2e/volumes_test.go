package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// X2: with contents, owners, modes, attributes, links and holes, and with what
// processes have open there.
func TestVolumesOfThePodComeBackHoweverTheyAreMounted(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	held := []string{"hard-links", "sparse-file", "fifo", "extended-attributes", "modes-times-and-symlinks", "owner", "deleted-file", "record-lock", "inotify", "shared-file-mapping"}
	held = slices.DeleteFunc(held, func(name string) bool { return slices.Contains(engine.lacks, name) })
	mounts := map[string]corev1.VolumeMount{
		"disk":   {Name: "disk"},
		"memory": {Name: "memory"},
		"part":   {Name: "parts", SubPath: "one/part"},
		"other":  {Name: "parts", SubPath: "other"},
	}
	build := func(name string) *podBuilder {
		b := MakePod(name)
		limit := resource.MustParse("64Mi")
		b.EmptyDir("disk", "", corev1.StorageMediumDefault).EmptyDir("parts", "", corev1.StorageMediumDefault).EmptyDir("memory", "", corev1.StorageMediumMemory)
		for i := range b.pod.Spec.Volumes {
			b.pod.Spec.Volumes[i].EmptyDir.SizeLimit = &limit
		}
		for _, container := range []string{"disk", "memory", "part", "other"} {
			b.Container(container, imageObjects)
			b.last().Args = append([]string{"run", container}, held...)
			mount := mounts[container]
			mount.MountPath = "/work"
			b.last().VolumeMounts = []corev1.VolumeMount{mount}
		}
		return b
	}
	containers := []string{"disk", "memory", "part", "other"}
	s.running(build("source").Obj())
	s.verified("source", containers...)
	checkpoint := s.checkpoint("one", "source")
	source := s.verified("source", containers...)
	s.remove("source")
	s.running(build("restored").RestoreFrom("one").Obj())
	restored := s.verified("restored", containers...)
	for _, container := range containers {
		if was, is := source[container]["nonce"], restored[container]["nonce"]; was != is {
			t.Errorf("container %s was started anew", container)
		}
		for _, name := range held {
			t.Run(container+"/"+name, func(t *testing.T) {
				for which, a := range map[string]answer{"the source, after its thaw": source[container][name], "the restored Pod": restored[container][name]} {
					if a.verdict != "ok" {
						t.Errorf("%s: %q %s", which, a.verdict, a.said)
					}
				}
			})
		}
	}
	// A volume is captured once, whole; four files of 1 GiB are nothing but holes.
	archives := s.onNode(checkpoint.Status.NodeName, "ls "+data(checkpoint)+"/volumes")
	if got, want := strings.Fields(archives), engine.volumes; !strings.Contains(strings.Join(got, " "), want) {
		t.Errorf("the checkpoint has the volumes %q, want %q", got, want)
	}
	if size := checkpoint.Status.Size.LogicalBytes; size > 64<<20 {
		t.Errorf("the checkpoint is of %d bytes", size)
	}
	s.unharmed("restored")
}

// P25: configuration and names.
func TestWhatTheNewPodSuppliesIsItsOwn(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	config := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: "config"}, Data: map[string]string{"key": "as it was"}}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: "secret"}, StringData: map[string]string{"key": "as it was"}}
	for _, err := range []error{s.Create(t.Context(), config), s.Create(t.Context(), secret)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	build := func(name string) *podBuilder {
		b := MakePod(name).Shell("main", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done")
		b.pod.Spec.Volumes = []corev1.Volume{
			{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "config"}}}},
			{Name: "secret", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "secret"}}},
			{Name: "about", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{
				{Path: "name", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}},
			}}}},
		}
		b.last().VolumeMounts = []corev1.VolumeMount{
			{Name: "config", MountPath: "/config"}, {Name: "config", MountPath: "/one-of-config", SubPath: "key"},
			{Name: "secret", MountPath: "/secret"}, {Name: "about", MountPath: "/about"},
		}
		b.pod.Spec.HostAliases = []corev1.HostAlias{{IP: "192.0.2.7", Hostnames: []string{"alias.example"}}}
		b.pod.Spec.Subdomain, b.pod.Spec.SetHostnameAsFQDN = "sub", new(true)
		return b
	}
	s.running(build("source").Obj())
	s.checkpoint("one", "source")
	config.Data["key"], secret.StringData = "as it is now", map[string]string{"key": "as it is now"}
	for _, err := range []error{s.Update(t.Context(), config), s.Update(t.Context(), secret)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	restored := s.running(build("restored").RestoreFrom("one").Obj())
	for command, want := range map[string]string{
		"cat /config/key":          "as it is now",
		"cat /one-of-config":       "as it is now",
		"cat /secret/key":          "as it is now",
		"cat /about/name":          "restored",
		"hostname":                 "restored.sub." + s.namespace + ".svc.",
		"cat /etc/hosts":           "alias.example",
		"grep restored /etc/hosts": restored.Status.PodIP,
	} {
		out, err := s.exec("restored", "main", append([]string{"sh", "-c"}, command)...)
		if err != nil {
			t.Errorf("%s: %v", command, err)
		}
		s.wantText(command, out, want)
	}
	s.unharmed("restored")
}

func TestContainersThatShareAPIDNamespaceComeBackInOne(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	build := func(name string) *podBuilder {
		b := MakePod(name)
		for _, container := range []string{"a", "b"} {
			b.Shell(container, "echo $$$$ > /shared/"+container+"; i=0; while :; do i=$((i+1)); echo $i > /shared/count-"+container+"; sleep 0.1; done")
		}
		b.EmptyDir("shared", "/shared", corev1.StorageMediumDefault)
		b.pod.Spec.ShareProcessNamespace = new(true)
		return b
	}
	look := func(pod string) (out string) {
		t.Helper()
		s.eventually("both containers count", func() (err error) {
			out, err = s.exec(pod, "a", "sh", "-ec", `for c in a b; do p=$(cat /shared/$c); tr '\0' ' ' < /proc/$p/cmdline | grep -q "count-$c"; echo $c $p; done; test -s /shared/count-a -a -s /shared/count-b`)
			return err
		})
		return out
	}
	s.running(build("source").Obj())
	was := look("source")
	s.checkpoint("one", "source")
	s.remove("source")
	s.running(build("restored").RestoreFrom("one").Obj())
	if is := look("restored"); is != was {
		t.Errorf("the processes were %q and are %q", was, is)
	}
	for _, container := range []string{"a", "b"} {
		first := s.logsOf("restored", container)
		s.eventually("container "+container+" counts on", func() error {
			if now := s.logsOf("restored", container); now <= first {
				return fmt.Errorf("it is at %d", now)
			}
			return nil
		})
	}
	s.unharmed("restored")
}

// logsOf reads what a container has counted to.
func (s *scene) logsOf(pod, container string) (count int) {
	s.Helper()
	out, err := s.exec(pod, container, "cat", "/shared/count-"+container)
	if err != nil {
		s.Fatal(err)
	}
	_, _ = fmt.Sscan(out, &count)
	return count
}

// Two Pods with one memory must not write to one volume that is not made for it.
func TestARestoreWaitsForTheEndOfAWriterOfItsVolumes(t *testing.T) {
	t.Parallel()
	for _, way := range []struct {
		name   string
		volume func(s *scene) corev1.VolumeSource
		says   string
	}{
		{"a directory of the node", func(s *scene) corev1.VolumeSource {
			return corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/var/tmp/" + s.namespace, Type: new(corev1.HostPathDirectoryOrCreate)}}
		}, "of the node (hostPath)"},
		{"a claim for one node", func(s *scene) corev1.VolumeSource {
			capacity := corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Mi")}
			volume := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: s.namespace}, Spec: corev1.PersistentVolumeSpec{
				Capacity: capacity, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
				PersistentVolumeSource: corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/var/tmp/" + s.namespace, Type: new(corev1.HostPathDirectoryOrCreate)}},
			}}
			claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: "data"}, Spec: corev1.PersistentVolumeClaimSpec{
				StorageClassName: new(""), VolumeName: s.namespace, AccessModes: volume.Spec.AccessModes, Resources: corev1.VolumeResourceRequirements{Requests: capacity},
			}}
			for _, err := range []error{s.Create(s.Context(), volume), s.Create(s.Context(), claim)} {
				if err != nil {
					s.Fatal(err)
				}
			}
			s.Cleanup(func() {
				if err := s.Delete(context.Background(), volume); err != nil {
					s.Error(err)
				}
			})
			return corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}
		}, "PersistentVolumeClaim data of access modes [ReadWriteOnce]"},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t)
			volume := way.volume(s)
			build := func(name string) *podBuilder {
				b := MakePod(name).Shell("main", "i=0; while :; do i=$((i+1)); echo $i >> /kept/counted; sleep 0.2; done")
				b.pod.Spec.Volumes = []corev1.Volume{{Name: "kept", VolumeSource: volume}}
				b.last().VolumeMounts = []corev1.VolumeMount{{Name: "kept", MountPath: "/kept"}}
				return b
			}
			source := s.running(build("source").Obj())
			s.Cleanup(func() { _, _ = s.OnNode(context.Background(), source.Spec.NodeName, "rm -rf /var/tmp/"+s.namespace) })
			s.checkpoint("one", "source")
			pod := s.create(build("restored").RestoreFrom("one").Obj())
			s.waitEvent(pod, checkpointv1alpha1.EventSourcePodRunning, way.says, "still runs", "source (UID "+string(source.UID)+")")
			s.staysPending("restored")
			s.unharmed("source")
			s.remove("source")
			s.nudge("restored")
			s.waitReady("restored")
			s.unharmed("restored")
			// What lies there is as it is now, and not as it was: the source wrote on after
			// the cut, and the restored Pod counts on from the cut.
			s.eventually("the restored Pod counts what the source has counted", func() error {
				out, err := s.exec("restored", "main", "cat", "/kept/counted")
				if err != nil {
					return err
				}
				lines := strings.Fields(out)
				repeated := map[string]int{}
				for _, line := range lines {
					repeated[line]++
				}
				if repeated["1"] != 1 {
					t.Errorf("it was counted from 1 on %d times", repeated["1"])
				}
				if len(lines) == len(repeated) {
					return fmt.Errorf("no number is there twice: what the source wrote after the cut is gone, or the restored Pod does not write: %v", lines)
				}
				return nil
			})
		})
	}
}
