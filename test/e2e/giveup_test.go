package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
)

// tries is how often a restore has to fail before it is given up.
const tries = 5

// P23: a Job gets a terminal signal, and what only waits goes on waiting. The
// agents give up sooner here than they do by default: see config.
func TestARestoreThatKeepsFailingEndsItsPodAJobCountsItAndOneThatWaitsGoesOn(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.givesUpSoon()
	build := func(name string) *podBuilder {
		return MakePod(name).Restart(corev1.RestartPolicyNever).Shell("main", idle)
	}
	s.running(build("source").Obj())
	damaged, away, deleted := s.checkpoint("damaged", "source"), s.checkpoint("away", "source"), s.checkpoint("deleted", "source")
	node := damaged.Status.NodeName
	s.onNode(node, fmt.Sprintf(flip("$(find %s -name '"+engine.data+"' -size +0 | head -n1)"), data(damaged)))
	for _, checkpoint := range []*checkpointv1alpha1.PodCheckpoint{away, deleted} {
		s.onNode(node, fmt.Sprintf("mv %[1]s %[1]s.away", data(checkpoint)))
	}

	missing := s.create(build("missing").RestoreFrom("away").Obj())
	unready := s.create(build("unready").RestoreFrom("deleted").Obj())
	s.waitEvent(missing, checkpointv1alpha1.EventCheckpointDataMissing)
	s.waitEvent(unready, checkpointv1alpha1.EventCheckpointDataMissing)
	if err := s.Delete(t.Context(), deleted); err != nil {
		t.Fatal(err)
	}
	job := s.restoringJob("job", build("").RestoreFrom("damaged").Obj())
	failing := s.podOf(job)
	s.waitEvent(failing, checkpointv1alpha1.EventCheckpointDataCorrupt)

	bare := s.create(build("bare").RestoreFrom("damaged").Obj())
	s.eventually("both are given up", func() error {
		var going []string
		for _, name := range []string{failing.Name, bare.Name} {
			if s.pod(name).Status.Phase != corev1.PodFailed {
				going = append(going, name)
			}
		}
		if len(going) == 0 {
			return nil
		}
		s.nudge(append(going, "missing", "unready")...)
		time.Sleep(time.Second)
		return fmt.Errorf("not yet: %v", going)
	})
	since := time.Now()
	// The status' own reason and message stay until the kubelet writes how the Pod
	// ended; the event stays.
	s.waitEvent(failing, checkpointv1alpha1.EventRestoreGivenUp, "Given up after ", " tries in ", "pages")
	s.eventually("the Job has failed", func() error {
		if err := s.Get(t.Context(), s.key("job"), job); err != nil {
			return err
		}
		for _, condition := range job.Status.Conditions {
			if condition.Type == batchv1.JobFailed && condition.Status == corev1.ConditionTrue && job.Status.Failed == 1 {
				return nil
			}
		}
		return fmt.Errorf("%d failed Pods, conditions %v", job.Status.Failed, job.Status.Conditions)
	})

	// The others were tried as often and for as long.
	s.waitEvent(unready, checkpointv1alpha1.EventCheckpointNotReady, "does not exist")
	for _, waiting := range []*corev1.Pod{missing, unready} {
		s.eventually("pod "+waiting.Name+" was tried often enough", func() error {
			s.nudge(waiting.Name)
			return s.refusedOften(waiting)
		})
		s.staysPending(waiting.Name)
	}
	s.onNode(node, fmt.Sprintf("mv %[1]s.away %[1]s; rm -r %[2]s.away", data(away), data(deleted)))
	s.nudge("missing")
	s.waitReady("missing")

	// A kubelet puts back what others write of a status within 10 s, unless it has
	// taken the end for its own.
	time.Sleep(time.Until(since.Add(12 * time.Second)))
	if pod := s.pod("bare"); pod.Status.Phase != corev1.PodFailed {
		t.Errorf("the Pod that was given up is %v", errPhase(pod))
	}
}

// givesUpSoon skips the test where agents are as they come.
func (s *scene) givesUpSoon() {
	s.Helper()
	args, err := s.Kubectl(s.Context(), "-n", "stasis-system", "get", "daemonset", "stasis-agent", "-o", "jsonpath={.spec.template.spec.containers[0].args}")
	if err != nil {
		s.Fatal(err)
	}
	if !strings.Contains(args, "--restore-give-up-after=") {
		s.Skip("the agents of this cluster give up after ten minutes: kubectl apply -k test/e2e/config")
	}
}

// nudge has the kubelet look at Pods at once, and not after its pause.
func (s *scene) nudge(pods ...string) {
	s.Helper()
	for _, name := range pods {
		patch := fmt.Sprintf(`{"metadata":{"annotations":{"nudged":%q}}}`, time.Now().Format(time.RFC3339Nano))
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name}}
		if err := s.Patch(s.Context(), pod, client.RawPatch("application/merge-patch+json", []byte(patch))); err != nil {
			s.Fatalf("annotating pod %s: %v", name, err)
		}
	}
}

// refusedOften reads in the log of a Pod's agent whether its restore was refused
// as often as it takes to give it up.
func (s *scene) refusedOften(pod *corev1.Pod) error {
	log, err := s.Kubectl(s.Context(), "-n", "stasis-system", "logs", "-l", "app.kubernetes.io/component=agent", "-c", "agent", "--tail=-1")
	if err != nil {
		return err
	}
	refused := 0
	for line := range strings.Lines(log) {
		if strings.Contains(line, "restore refused") && strings.Contains(line, string(pod.UID)) {
			refused++
		}
	}
	if refused < tries {
		return fmt.Errorf("its restore was refused %d times", refused)
	}
	return nil
}

// restoringJob makes a Job of one try, whose controller may restore.
func (s *scene) restoringJob(name string, pod *corev1.Pod) *batchv1.Job {
	s.Helper()
	may := &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: "job-controller-restores"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "stasis-restorer"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: "kube-system", Name: "job-controller"}},
	}
	job := &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.namespace, Name: name},
		Spec: batchv1.JobSpec{
			BackoffLimit: new(int32(0)),
			Template:     corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Annotations: pod.Annotations}, Spec: pod.Spec},
		},
	}
	for _, object := range []client.Object{may, job} {
		if err := s.Create(s.Context(), object); err != nil {
			s.Fatal(err)
		}
	}
	return job
}

func (s *scene) podOf(job *batchv1.Job) *corev1.Pod {
	s.Helper()
	var pods corev1.PodList
	s.eventually("job "+job.Name+" has its Pod", func() error {
		if err := s.List(s.Context(), &pods, client.InNamespace(s.namespace), client.MatchingLabels{batchv1.JobNameLabel: job.Name}); err != nil {
			return err
		}
		if len(pods.Items) != 1 {
			return errors.New("it has " + fmt.Sprint(len(pods.Items)))
		}
		return nil
	})
	return &pods.Items[0]
}
