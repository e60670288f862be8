package podtemplate

import (
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// load reads a Pod as an API server has stored it.
func load(t testing.TB, name string) *corev1.Pod {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var pod corev1.Pod
	if err := yaml.UnmarshalStrict(b, &pod); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return &pod
}

// stored is the template as it comes back from the API server.
func stored(t testing.TB, template *corev1.PodTemplateSpec) *corev1.PodTemplateSpec {
	t.Helper()
	b, err := json.Marshal(template)
	if err != nil {
		t.Fatal(err)
	}
	var back corev1.PodTemplateSpec
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	return &back
}

func TestTheTemplateOfAPodHoldsNothingOfItsNodeOrInstance(t *testing.T) {
	pod := load(t, "source.yaml")
	pod.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": "node-1", "disk": "ssd"}
	pod.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
		RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{
			{MatchFields: []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: "In", Values: []string{"node-1"}}}},
			{MatchExpressions: []corev1.NodeSelectorRequirement{
				{Key: "kubernetes.io/hostname", Operator: "In", Values: []string{"node-1"}},
				{Key: "zone", Operator: "In", Values: []string{"a"}},
			}},
		}},
		PreferredDuringSchedulingIgnoredDuringExecution: []corev1.PreferredSchedulingTerm{
			{Weight: 1, Preference: corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "kubernetes.io/hostname", Operator: "In", Values: []string{"node-1"}}}}},
		},
	}}
	pod.Annotations = map[string]string{
		"team":                                      "a",
		corev1.LastAppliedConfigAnnotation:          "{}",
		checkpointv1alpha1.AnnotationRestoreFrom:    "c",
		checkpointv1alpha1.AnnotationRestoreFromUID: "u",
	}
	pod.OwnerReferences = []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "r"}}
	before := pod.DeepCopy()

	got := FromPod(pod)

	if diff := cmp.Diff(before, pod); diff != "" {
		t.Errorf("the Pod was changed (-before +after):\n%s", diff)
	}
	want := metav1.ObjectMeta{
		Labels:          map[string]string{"app": "counter"},
		Annotations:     map[string]string{"team": "a"},
		OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "r"}},
	}
	if diff := cmp.Diff(want, got.ObjectMeta); diff != "" {
		t.Errorf("metadata (-want +got):\n%s", diff)
	}
	if b, _ := json.Marshal(got); strings.Contains(string(b), "node-1") || strings.Contains(string(b), string(pod.UID)) {
		t.Errorf("the template names its node or its Pod's UID: %s", b)
	}
	wantAffinity := &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
		RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{
			{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "zone", Operator: "In", Values: []string{"a"}}}},
		}},
	}}
	if diff := cmp.Diff(wantAffinity, got.Spec.Affinity); diff != "" {
		t.Errorf("affinity (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]string{"disk": "ssd"}, got.Spec.NodeSelector); diff != "" {
		t.Errorf("node selector (-want +got):\n%s", diff)
	}
}

func TestAffinityThatOnlyNamedNodesLeavesNothingBehind(t *testing.T) {
	pod := load(t, "source.yaml")
	pod.Spec.NodeSelector = map[string]string{"kubernetes.io/hostname": "node-1"}
	pod.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
		RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{
			{MatchFields: []corev1.NodeSelectorRequirement{{Key: "metadata.name", Operator: "In", Values: []string{"node-1"}}}},
		}},
	}}
	if got := FromPod(pod).Spec; got.Affinity != nil || got.NodeSelector != nil {
		t.Errorf("affinity = %v, node selector = %v; want none", got.Affinity, got.NodeSelector)
	}
}

func TestTheTemplateHoldsAllocatedResources(t *testing.T) {
	list := func(cpu string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu)}
	}
	condition := func(is corev1.PodConditionType) []corev1.PodCondition {
		return []corev1.PodCondition{{Type: is, Status: corev1.ConditionTrue}}
	}
	tests := map[string]struct {
		conditions        []corev1.PodCondition
		allocated, limits corev1.ResourceList
		wantRequest       string
		wantLimit         string
	}{
		"as desired when nothing differs":                       {allocated: list("200m"), limits: list("400m"), wantRequest: "200m", wantLimit: "400m"},
		"as desired when the kubelet reports nothing":           {wantRequest: "200m", wantLimit: "400m"},
		"limits rounded by the kernel are not taken for resize": {allocated: list("200m"), limits: list("401m"), wantRequest: "200m", wantLimit: "400m"},
		"a pending resize leaves what was allocated":            {conditions: condition(corev1.PodResizePending), allocated: list("100m"), limits: list("300m"), wantRequest: "100m", wantLimit: "300m"},
		"a resize of limits only, still pending":                {conditions: condition(corev1.PodResizePending), allocated: list("200m"), limits: list("300m"), wantRequest: "200m", wantLimit: "300m"},
		"a resize that the kubelet has not seen yet":            {allocated: list("100m"), limits: list("300m"), wantRequest: "100m", wantLimit: "300m"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			pod := &corev1.Pod{
				Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Resources: corev1.ResourceRequirements{Requests: list("200m"), Limits: list("400m")}}}},
				Status: corev1.PodStatus{
					Conditions:        tc.conditions,
					ContainerStatuses: []corev1.ContainerStatus{{Name: "a", AllocatedResources: tc.allocated, Resources: &corev1.ResourceRequirements{Limits: tc.limits}}},
				},
			}
			got := FromPod(pod).Spec.Containers[0].Resources
			if r := got.Requests.Cpu().String(); r != tc.wantRequest {
				t.Errorf("request = %s, want %s", r, tc.wantRequest)
			}
			if l := got.Limits.Cpu().String(); l != tc.wantLimit {
				t.Errorf("limit = %s, want %s", l, tc.wantLimit)
			}
		})
	}
}

func TestAPodLevelRequestIsRecordedWithoutOverhead(t *testing.T) {
	list := func(cpu string) corev1.ResourceList {
		return corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu)}
	}
	pod := &corev1.Pod{
		Spec: corev1.PodSpec{Overhead: list("50m"), Resources: &corev1.ResourceRequirements{Requests: list("500m"), Limits: list("1")}},
		Status: corev1.PodStatus{
			Conditions:         []corev1.PodCondition{{Type: corev1.PodResizePending, Status: corev1.ConditionTrue}},
			AllocatedResources: list("350m"),
			Resources:          &corev1.ResourceRequirements{Limits: list("800m")},
		},
	}
	got := FromPod(pod).Spec.Resources
	if got.Requests.Cpu().String() != "300m" || got.Limits.Cpu().String() != "800m" {
		t.Errorf("request %s, limit %s; want 300m, 800m", got.Requests.Cpu(), got.Limits.Cpu())
	}
}

func TestAPodEqualsItsOwnTemplate(t *testing.T) {
	pod := load(t, "source.yaml")
	if errs := Compare(stored(t, FromPod(pod)), pod); len(errs) > 0 {
		t.Error(errs.ToAggregate())
	}
}

func TestTheSourcesManifestAppliedAgainRestores(t *testing.T) {
	// again.yaml is what an API server made of the manifest behind source.yaml,
	// later: other token volume letters, other defaults of the cluster, placed by
	// admission for a restore.
	if errs := Compare(stored(t, FromPod(load(t, "source.yaml"))), load(t, "again.yaml")); len(errs) > 0 {
		t.Error(errs.ToAggregate())
	}
}

func TestADifferenceIsReportedWithItsPathAndBothValues(t *testing.T) {
	yes := true
	tests := map[string]struct {
		change func(*corev1.PodSpec)
		want   []string // one error each
	}{
		"another image": {
			func(s *corev1.PodSpec) { s.Containers[1].Image = "localhost/busybox:2" },
			[]string{`spec.containers[1].image: Invalid value: "localhost/busybox:2": the checkpoint has "localhost/busybox:1"`},
		},
		"another argument": {
			func(s *corev1.PodSpec) { s.Containers[0].Command[2] = "sleep 1" },
			[]string{`spec.containers[0].command[2]: Invalid value: "sleep 1": the checkpoint has "`},
		},
		"more rights": {
			func(s *corev1.PodSpec) {
				s.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: &yes}
			},
			[]string{`spec.containers[0].securityContext: Invalid value: {"privileged":true}: the checkpoint has null`},
		},
		"another service account": {
			func(s *corev1.PodSpec) { s.ServiceAccountName = "root" },
			[]string{`spec.serviceAccountName: Invalid value: "root": the checkpoint has "default"`},
		},
		"the host's network": {
			func(s *corev1.PodSpec) { s.HostNetwork = true },
			[]string{`spec.hostNetwork: Invalid value: true: the checkpoint has false`},
		},
		"a container more": {
			func(s *corev1.PodSpec) { s.Containers = append(s.Containers, corev1.Container{Name: "spy"}) },
			[]string{`spec.containers: Invalid value: ["a","b","spy"]: the checkpoint has ["a","b"]`},
		},
		"containers in another order": {
			func(s *corev1.PodSpec) { s.Containers[0], s.Containers[1] = s.Containers[1], s.Containers[0] },
			[]string{`spec.containers: Invalid value: ["b","a"]: the checkpoint has ["a","b"]`},
		},
		"another limit": {
			func(s *corev1.PodSpec) {
				s.Containers[0].Resources.Limits[corev1.ResourceMemory] = resource.MustParse("65Mi")
			},
			[]string{`spec.containers[0].resources.limits[memory]: Invalid value: "65Mi": the checkpoint has "64Mi"`},
		},
		"a limit less": {
			func(s *corev1.PodSpec) { delete(s.Containers[0].Resources.Limits, corev1.ResourceMemory) },
			[]string{`spec.containers[0].resources.limits[memory]: Invalid value: null: the checkpoint has "64Mi"`},
		},
		"another environment": {
			func(s *corev1.PodSpec) { s.Containers[0].Env = []corev1.EnvVar{{Name: "STEP", Value: "2"}} },
			[]string{`spec.containers[0].env[0].value: Invalid value: "2": the checkpoint has "1"`},
		},
		"a volume from elsewhere": {
			func(s *corev1.PodSpec) {
				s.Volumes[0].VolumeSource = corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}
			},
			[]string{
				`spec.volumes[0].hostPath: Invalid value: {"path":"/"}: the checkpoint has null`,
				`spec.volumes[0].emptyDir: Invalid value: null: the checkpoint has {}`,
			},
		},
		"a volume mounted elsewhere": {
			func(s *corev1.PodSpec) { s.Containers[0].VolumeMounts[0].MountPath = "/etc" },
			[]string{`spec.containers[0].volumeMounts: Invalid value: ["/etc","/var/run/secrets/kubernetes.io/serviceaccount"]: the checkpoint has ["/data","/var/run/secrets/kubernetes.io/serviceaccount"]`},
		},
		"no token where there was one": {
			func(s *corev1.PodSpec) {
				s.Volumes = s.Volumes[:1]
				s.Containers[0].VolumeMounts = s.Containers[0].VolumeMounts[:1]
				s.Containers[1].VolumeMounts = nil
			},
			[]string{
				`spec.volumes: Invalid value: ["data"]: the checkpoint has ["data","kube-api-access-1"]`,
				`spec.containers[0].volumeMounts: Invalid value: ["/data"]: the checkpoint has ["/data","/var/run/secrets/kubernetes.io/serviceaccount"]`,
				`spec.containers[1].volumeMounts: Invalid value: []: the checkpoint has ["/var/run/secrets/kubernetes.io/serviceaccount"]`,
			},
		},
		"a volume that only calls itself a token": {
			func(s *corev1.PodSpec) {
				s.Volumes[1].VolumeSource = corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}
			},
			[]string{
				`spec.volumes: Invalid value: ["data","kube-api-access-x7k2p"]: the checkpoint has ["data","kube-api-access-1"]`,
				`spec.containers[0].volumeMounts[1].name: Invalid value: "kube-api-access-x7k2p": the checkpoint has "kube-api-access-1"`,
				`spec.containers[1].volumeMounts[0].name: Invalid value: "kube-api-access-x7k2p": the checkpoint has "kube-api-access-1"`,
			},
		},
		"another selector": {
			func(s *corev1.PodSpec) { s.NodeSelector = map[string]string{"disk": "ssd"} },
			[]string{`spec.nodeSelector[disk]: Invalid value: "ssd": the checkpoint has null`},
		},
		"a toleration of a taint that is not Kubernetes' own": {
			func(s *corev1.PodSpec) {
				s.Tolerations = append(s.Tolerations, corev1.Toleration{Key: "gpu", Operator: "Exists"})
			},
			[]string{`spec.tolerations: Invalid value: [{"key":"gpu","operator":"Exists"}]: the checkpoint has []`},
		},
		"a long value is cut off": {
			func(s *corev1.PodSpec) { s.Containers[0].Image = strings.Repeat("x", 1000) },
			[]string{`spec.containers[0].image: Invalid value: "\"` + strings.Repeat("x", 199) + `…": the checkpoint has "localhost/busybox:1"`},
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			template := stored(t, FromPod(load(t, "source.yaml")))
			pod := load(t, "source.yaml")
			tc.change(&pod.Spec)
			var got []string
			for _, e := range Compare(template, pod) {
				got = append(got, e.Error())
			}
			if len(got) != len(tc.want) {
				t.Fatalf("got %d errors, want %d:\n%s", len(got), len(tc.want), strings.Join(got, "\n"))
			}
			for i, want := range tc.want {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("got  %s\nwant %s", got[i], want)
				}
			}
		})
	}
}

func TestTheSameQuantityWrittenOtherwiseIsNoDifference(t *testing.T) {
	template := stored(t, FromPod(load(t, "source.yaml")))
	pod := load(t, "source.yaml")
	pod.Spec.Containers[0].Resources.Limits[corev1.ResourceMemory] = resource.MustParse("67108864")
	if errs := Compare(template, pod); len(errs) > 0 {
		t.Error(errs.ToAggregate())
	}
}

func TestNothingIsRestoredWithoutATemplate(t *testing.T) {
	if errs := Compare(nil, load(t, "source.yaml")); len(errs) == 0 {
		t.Error("a missing template was taken for an equal one")
	}
}

// TestEveryFieldOfAPodSpecIsComparedUnlessListedHere sets one field of a spec at
// a time: a field that a new API version adds is compared from the start.
func TestEveryFieldOfAPodSpecIsComparedUnlessListedHere(t *testing.T) {
	ignored := map[string]bool{
		"NodeName": true, "RuntimeClassName": true, "Overhead": true, "SchedulingGates": true,
		"Priority": true, "PriorityClassName": true, "PreemptionPolicy": true, "ImagePullSecrets": true,
		"EphemeralContainers": true, "DeprecatedServiceAccount": true,
	}
	spec := reflect.TypeFor[corev1.PodSpec]()
	for i := range spec.NumField() {
		name := spec.Field(i).Name
		t.Run(name, func(t *testing.T) {
			noLinks := false
			template := &corev1.PodTemplateSpec{Spec: corev1.PodSpec{ServiceAccountName: "s", EnableServiceLinks: &noLinks}}
			pod := &corev1.Pod{Spec: *template.Spec.DeepCopy()}
			fill(reflect.ValueOf(&pod.Spec).Elem().Field(i), 0)
			found := len(Compare(template, pod)) > 0
			if found == ignored[name] {
				t.Errorf("difference found: %v, ignored by intent: %v", found, ignored[name])
			}
			if errs := Compare(&corev1.PodTemplateSpec{Spec: pod.Spec}, pod); len(errs) > 0 {
				t.Errorf("a spec differs from itself: %v", errs.ToAggregate())
			}
		})
	}
}

// fill gives v a value that is not its zero value, as deep as there are types.
func fill(v reflect.Value, depth int) {
	if depth > 12 {
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem(), depth+1)
	case reflect.Struct:
		if leaves[v.Type()] {
			if v.Type() == reflect.TypeFor[resource.Quantity]() {
				v.Set(reflect.ValueOf(resource.MustParse("3")))
			}
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i), depth+1)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), depth+1)
	case reflect.Map:
		k, e := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(k, depth+1)
		fill(e, depth+1)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(k, e)
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int32, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint8:
		v.SetUint(7)
	}
}
