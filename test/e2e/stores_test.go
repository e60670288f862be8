package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/demo/counters"
	"podstasis.dev/stasis/internal/store/backend/open"
	"podstasis.dev/stasis/test/e2e/cluster"
	"podstasis.dev/stasis/test/store/servers"
)

// mounted is where nodes have what they share: see config.
const mounted = "/mnt/stasis"

// machine is the address that this machine has in the nodes' network, as long as the
// cluster is there.
func (s *scene) machine() string {
	s.Helper()
	config, err := s.Kubectl(s.Context(), "config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}")
	if err != nil {
		s.Fatal(err)
	}
	server, err := url.Parse(config)
	if err != nil {
		s.Fatal(err)
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		s.Fatal(err)
	}
	for _, a := range addresses {
		if n, ok := a.(*net.IPNet); ok && n.Contains(net.ParseIP(server.Hostname())) {
			return n.IP.String()
		}
	}
	s.Fatalf("this machine has no address in the network of %s", server.Host)
	return ""
}

// shareDirectory has all nodes mount a directory of this machine, which is returned.
func (s *scene) shareDirectory() string {
	s.Helper()
	root, err := cluster.Root()
	if err != nil {
		s.Fatal(err)
	}
	dir, err := os.MkdirTemp(filepath.Join(root, "dist"), "checkpoints-") // nodes see the checkout
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		for _, node := range []string{nodeOne, nodeTwo} {
			// Agent and controller look into the stores that they have seen a moment ago, and
			// let go of them when they have noticed that these are gone.
			s.eventually("nobody uses "+mounted+" of "+node, func() error {
				_, err := s.OnNode(context.Background(), node, "! mountpoint -q "+mounted+" || umount "+mounted)
				return err
			})
		}
		if err := os.RemoveAll(dir); err != nil {
			s.Error(err)
		}
	})
	for _, node := range []string{nodeOne, nodeTwo} {
		s.mountShared(node, dir)
	}
	return dir
}

func (s *scene) mountShared(node, dir string) {
	s.Helper()
	s.onNode(node, "mkdir -p "+mounted+" && mount --bind "+dir+" "+mounted)
}

// checkpointStore makes a CheckpointStore with its Secrets, whose name is the scene's own.
func (s *scene) checkpointStore(name string, encrypted bool, c open.Config) string {
	s.Helper()
	name = s.namespace + "-" + name
	object := &checkpointv1alpha1.CheckpointStore{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: checkpointv1alpha1.CheckpointStoreSpec{
		Type: checkpointv1alpha1.CheckpointStoreType(c.Kind), CABundle: c.CA,
	}}
	switch c.Kind {
	case open.Directory:
		object.Spec.Directory = &checkpointv1alpha1.DirectoryStore{Path: c.Path}
	case open.S3:
		object.Spec.S3 = &checkpointv1alpha1.S3Store{Bucket: c.Bucket, Prefix: c.Prefix, Region: c.Region, Endpoint: c.Endpoint, PathStyle: c.PathStyle}
	case open.Registry:
		object.Spec.Registry = &checkpointv1alpha1.RegistryStore{Repository: c.Repository}
	}
	secret := func(kind string, data map[string][]byte) string {
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "stasis-system", Name: name + "-" + kind}, Data: data}
		s.createForScene(secret)
		return secret.Name
	}
	if len(c.Credentials) > 0 {
		object.Spec.CredentialsSecretName = secret("login", c.Credentials)
	}
	if encrypted {
		key := secret("key", map[string][]byte{"2026-11": []byte(strings.Repeat("k", 32))})
		object.Spec.EncryptionSecretName = &key
	}
	s.createForScene(object)
	s.eventually("CheckpointStore "+name+" is Ready", func() error {
		if err := s.Get(s.Context(), client.ObjectKeyFromObject(object), object); err != nil {
			return err
		}
		if !meta.IsStatusConditionTrue(object.Status.Conditions, checkpointv1alpha1.CheckpointStoreReady) {
			return fmt.Errorf("%+v", object.Status.Conditions)
		}
		return nil
	})
	return name
}

// createForScene creates what is in no namespace, or in Stasis', and goes with the test.
func (s *scene) createForScene(object client.Object) {
	s.Helper()
	if err := s.Create(s.Context(), object); err != nil {
		s.Fatalf("creating %T %s: %v", object, object.GetName(), err)
	}
	s.Cleanup(func() {
		if err := client.IgnoreNotFound(s.Delete(context.Background(), object)); err != nil {
			s.Error(err)
		}
	})
}

func inStore(name string) func(*checkpointv1alpha1.PodCheckpoint) {
	return func(c *checkpointv1alpha1.PodCheckpoint) { c.Spec.StoreName = name }
}

// stored waits until a checkpoint is Ready, and checks that it is in its store then.
func (s *scene) stored(name, store string) *checkpointv1alpha1.PodCheckpoint {
	s.Helper()
	c, ready := s.terminal(name)
	if ready.Status != metav1.ConditionTrue {
		s.Fatalf("podcheckpoint %s: %s: %s", name, ready.Reason, ready.Message)
	}
	if in := c.Status.Store; in == nil || in.Name != store || in.StoreID == "" || in.CheckpointID == "" {
		s.Fatalf("podcheckpoint %s is Ready, and in the store %+v", name, in)
	}
	return c
}

// createStubbornly creates an object after replicas of the controller went or came: until the
// API server knows that, it calls the webhooks of one that is dead too.
func (s *scene) createStubbornly(object client.Object) {
	s.Helper()
	object.SetNamespace(s.namespace)
	s.within(2*time.Minute, "creating "+object.GetName(), func() error { return s.Create(s.Context(), object) })
}

// killNode is a loss of power.
func (s *scene) killNode(node string) {
	s.Helper()
	s.Cleanup(func() { s.startNode(context.Background(), node) }) // also for the tests that follow
	if out, err := s.Devcluster(s.Context(), "kill", node); err != nil {
		s.Fatalf("%v\n%s", err, out)
	}
}

// startNode has a node back as it was. It does nothing to one that is there.
func (s *scene) startNode(ctx context.Context, node string) {
	s.Helper()
	if out, err := s.Devcluster(ctx, "start", node); err != nil {
		s.Errorf("%v\n%s", err, out)
	}
	for _, args := range [][]string{
		{"wait", "--for=condition=Ready", "node/" + node, "--timeout=120s"},
		{"-n", "stasis-system", "rollout", "status", "daemonset", "--timeout=120s"},
		{"-n", "stasis-system", "rollout", "status", "deployment", "--timeout=120s"},
	} {
		if _, err := s.Kubectl(ctx, args...); err != nil {
			s.Error(err)
		}
	}
}

// startedAnew waits until what ran of Stasis on a node that lost its power is said to run
// again: it is said to run from before the loss for a while.
func (s *scene) startedAnew(node string, since time.Time) {
	s.Helper()
	s.within(2*time.Minute, "Stasis runs again on "+node, func() error {
		var pods corev1.PodList
		if err := s.List(s.Context(), &pods, client.InNamespace("stasis-system")); err != nil {
			return err
		}
		for _, pod := range pods.Items {
			if pod.Spec.NodeName != node || pod.DeletionTimestamp != nil {
				continue
			}
			for _, status := range pod.Status.ContainerStatuses {
				if running := status.State.Running; running == nil || !status.Ready || running.StartedAt.Time.Before(since.Truncate(time.Second)) {
					return fmt.Errorf("pod %s: %+v", pod.Name, status)
				}
			}
		}
		return nil
	})
}

// files lists files by their names below a directory, with their sizes.
func files(t *testing.T, dir, pattern string) map[string]int64 {
	t.Helper()
	all := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && d.IsDir() {
			return nil
		} else if err != nil {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && strings.Contains(path, pattern) {
			all[path] = info.Size()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// whole is a Pod with memory, files of its own and emptyDirs.
func whole(name string) *podBuilder {
	return Counters(name).Subject().EmptyDir("data", "/data", corev1.StorageMediumDefault)
}

// bulk is a Pod that holds so many MiB which nothing makes smaller.
func bulk(name string, mib int) *podBuilder {
	return MakePod(name).
		Shell("main", fmt.Sprintf("dd if=/dev/urandom of=/data/bulk bs=1M count=%d 2>/dev/null; md5sum /data/bulk > /data/sum; i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.1; done", mib)).
		EmptyDir("data", "/data", corev1.StorageMediumDefault)
}

func (s *scene) filled(pod string) {
	s.Helper()
	s.eventually("the Pod is filled", func() error {
		_, err := s.exec(pod, "main", "test", "-e", "/tmp/count")
		return err
	})
}

func (s *scene) sumIsRight(pod string) {
	s.Helper()
	if out, err := s.exec(pod, "main", "md5sum", "-c", "/data/sum"); err != nil {
		s.Errorf("%s: %v", out, err)
	}
	s.unharmed(pod)
}

// X1, P16: what is in a store outlives the node that it was taken on, in each kind of
// store that is to be had here.
func TestACheckpointInAStoreOutlivesItsNode(t *testing.T) {
	s := newScene(t)
	here := s.machine()
	dir := s.shareDirectory()
	_, s3 := servers.S3(t, here)
	_, registry, _ := servers.Registry(t, here, true)
	kinds := map[string]string{
		"directory": s.checkpointStore("directory", true, open.Config{Kind: open.Directory, Path: mounted + "/store"}),
		"s3":        s.checkpointStore("s3", true, s3),
		"registry":  s.checkpointStore("registry", false, registry),
	}
	damaged := s.checkpointStore("damaged", false, open.Config{Kind: open.Directory, Path: mounted + "/damaged"})
	for kind := range kinds {
		s.create(whole(kind).On(nodeOne).Obj())
	}
	s.create(bulk("fragile", 8).On(nodeOne).Obj())
	for kind := range kinds {
		s.waitReady(kind)
		s.countsOn(kind, 20)
	}
	s.filled("fragile")
	s.ask4Checkpoint("fragile", "fragile", inStore(damaged))
	for kind, store := range kinds {
		s.ask4Checkpoint("first-"+kind, kind, inStore(store))
	}
	for kind, store := range kinds {
		s.stored("first-"+kind, store)
		s.ask4Checkpoint("second-"+kind, kind, inStore(store))
	}
	second, before := map[string]*checkpointv1alpha1.PodCheckpoint{}, map[string]report{}
	source := map[string]map[string][]counters.Line{}
	cheap := func(c *checkpointv1alpha1.PodCheckpoint) {
		t.Helper()
		if grew, size := c.Status.Store.NewBytes, c.Status.Size.LogicalBytes; grew > size/5 {
			t.Errorf("podcheckpoint %s of %d bytes took %d of the store", c.Name, size, grew)
		} else {
			t.Logf("podcheckpoint %s of %d bytes took %d of the store, frozen %s", c.Name, size, grew, c.Status.FreezeDuration.Duration)
		}
	}
	for kind, store := range kinds {
		second[kind] = s.stored("second-"+kind, store)
		cheap(second[kind])
		var r report
		s.ask(kind, "/state", &r)
		before[kind] = r
		s.countsOn(kind, 10)
		source[kind] = map[string][]counters.Line{"a": s.counted(kind, "a"), "b": s.counted(kind, "b")}
	}
	fragile := s.stored("fragile", damaged)

	s.killNode(nodeOne)
	killed := time.Now()
	pack := slices.MaxFunc(slices.Collect(keys(files(t, dir+"/damaged", "/packs/"))), func(a, b string) int {
		return int(size(t, a) - size(t, b))
	})
	flipBit(t, pack)
	refused := bulk("refused", 8).RestoreFrom("fragile").On(nodeTwo).Obj()
	s.createStubbornly(refused)
	restored := map[string]*corev1.Pod{}
	for kind := range kinds {
		restored[kind] = whole(kind + "-2").RestoreFrom("second-" + kind).On(nodeTwo).Obj()
		s.createStubbornly(restored[kind])
	}
	for kind, store := range kinds {
		name := kind + "-2"
		s.waitReady(name)
		t.Logf("%s: restored %s after its node was lost", name, time.Since(killed).Round(time.Second))
		s.waitEvent(restored[kind], checkpointv1alpha1.EventCheckpointFetched, "have come from CheckpointStore "+store)
		s.countsOn(name, 20)
		s.unharmed(name)
		for _, program := range []string{"a", "b"} {
			if _, _, err := counters.Continues(source[kind][program], s.counted(name, program), s.window(second[kind])); err != nil {
				t.Errorf("pod %s, program %s: %v", name, program, err)
			}
		}
		var after report
		s.ask(name, "/state", &after)
		if after.Nonce != before[kind].Nonce || after.Deleted != before[kind].Deleted || after.Position != before[kind].Position || after.Next != before[kind].Next {
			t.Errorf("pod %s went from %+v to %+v", name, before[kind], after)
		}
	}
	s.waitEvent(refused, checkpointv1alpha1.EventCheckpointDataCorrupt, filepath.Base(pack))
	if states := containerStates(s.pod("refused")); slices.ContainsFunc(states, func(state string) bool { return strings.HasSuffix(state, " running") }) {
		t.Errorf("of the Pod that was refused run %v", states)
	}
	if slices.ContainsFunc(s.events(refused.UID), func(e corev1.Event) bool { return e.Reason == "Started" }) {
		t.Error("something of the Pod that was refused was started")
	}
	s.remove("refused")
	// What ran on is checkpointed on the other node, and is much of what the store has.
	for kind, store := range kinds {
		third := &checkpointv1alpha1.PodCheckpoint{ObjectMeta: metav1.ObjectMeta{Name: "third-" + kind}}
		third.Spec.SourcePodName, third.Spec.StoreName = kind+"-2", store
		s.createStubbornly(third)
	}
	for kind, store := range kinds {
		cheap(s.stored("third-"+kind, store))
	}

	begun := time.Now()
	s.startNode(t.Context(), nodeOne)
	s.startedAnew(nodeOne, begun)
	s.mountShared(nodeOne, dir)
	// Now there is another that has the data.
	again := bulk("again", 8).RestoreFrom("fragile").On(nodeTwo).Obj()
	s.createStubbornly(again)
	s.waitReady("again")
	s.waitEvent(again, checkpointv1alpha1.EventCheckpointFetched, "have come from node "+nodeOne, filepath.Base(pack))
	s.sumIsRight("again")

	// The node takes down what ran there, and keeps nothing of it.
	for kind := range kinds {
		s.remove(kind)
		s.remove(kind + "-2")
	}
	s.remove("fragile")
	s.remove("again")
	if err := s.DeleteAllOf(t.Context(), &checkpointv1alpha1.PodCheckpoint{}, client.InNamespace(s.namespace)); err != nil {
		t.Fatal(err)
	}
	s.eventually("no PodCheckpoint is left", func() error {
		var left checkpointv1alpha1.PodCheckpointList
		if err := s.List(t.Context(), &left, client.InNamespace(s.namespace)); err != nil {
			return err
		}
		if n := len(left.Items); n > 0 {
			return fmt.Errorf("%d are, among them %s with the finalizers %v", n, left.Items[0].Name, left.Items[0].Finalizers)
		}
		return nil
	})
	if roots := files(t, dir, "/checkpoints/"); len(roots) > 0 {
		t.Errorf("the PodCheckpoints are gone, and in the directories are left %v", roots)
	}
	s.eventually("nothing of them is left on the node", func() error {
		_, err := s.OnNode(t.Context(), nodeOne, "test ! -e "+data(fragile)+" -a ! -e "+data(second["s3"]))
		return err
	})
}

func keys(of map[string]int64) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for name := range of {
			if !yield(name) {
				return
			}
		}
	}
}

func size(t *testing.T, file string) int64 {
	t.Helper()
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// flipBit changes one bit in the middle of a file.
func flipBit(t *testing.T, file string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// P7, P13: nobody waits for a store but Ready; and what is in it is not sent again.
func TestAStoreThatIsAwayAndAnAgentThatIsKilledDelayNothingButReady(t *testing.T) {
	s := newScene(t)
	here := s.machine()
	server, config := servers.S3(t, here)
	line := servers.NewLine(t, here, server.Address)
	config.Endpoint = "https://" + line.Addr().String()
	store := s.checkpointStore("s3", false, config)
	s.create(Counters("counters").On(nodeOne).Obj())
	s.create(bulk("bulk", 64).On(nodeOne).Obj())
	s.waitReady("counters")
	s.countsOn("counters", 20)
	s.filled("bulk")
	at := s.checkpoint("at-home", "counters")

	server.Stop()
	asked := time.Now()
	s.ask4Checkpoint("away", "counters", inStore(store))
	var waiting checkpointv1alpha1.PodCheckpoint
	s.eventually("the object says what it waits for", func() error {
		if err := s.Get(t.Context(), s.key("away"), &waiting); err != nil {
			return err
		}
		if ready := waiting.ReadyCondition(); ready == nil || ready.Reason != checkpointv1alpha1.ReasonCheckpointInProgress ||
			!strings.Contains(ready.Message, "Captured, and not stored in CheckpointStore "+store) {
			return fmt.Errorf("%+v", ready)
		}
		return nil
	})
	t.Logf("it says so after %s", time.Since(asked).Round(100*time.Millisecond))
	s.countsOn("counters", 20)
	s.unharmed("counters")
	server.Start(t)
	away := s.stored("away", store)
	if frozen, usual := away.Status.FreezeDuration.Duration, at.Status.FreezeDuration.Duration; frozen == 0 || frozen > 3*usual+time.Second {
		t.Errorf("the Pod was frozen for %s, and without a store for %s", frozen, usual)
	}
	t.Logf("frozen %s, and %s without a store", away.Status.FreezeDuration.Duration, at.Status.FreezeDuration.Duration)

	// The agent dies when a half is there.
	packs := func() map[string]int64 { return files(t, server.Data, "/packs/") }
	earlier := packs()
	line.HoldAfter(40 << 20)
	sent := line.Sent()
	s.ask4Checkpoint("bulk", "bulk", inStore(store))
	s.eventually("a part has been sent", func() error {
		if !line.Held() {
			return fmt.Errorf("%d bytes have been", line.Sent()-sent)
		}
		return nil
	})
	var c checkpointv1alpha1.PodCheckpoint
	s.eventually("it says that it is being stored", func() error {
		if err := s.Get(t.Context(), s.key("bulk"), &c); err != nil {
			return err
		}
		if ready := c.ReadyCondition(); ready == nil || ready.Status == metav1.ConditionTrue || !strings.Contains(ready.Message, "being stored in CheckpointStore "+store) {
			return fmt.Errorf("%+v", ready)
		}
		return nil
	})
	finished := s.journal(&c)
	s.killAgent(nodeOne)
	first := line.Sent() - sent
	line.Release()
	bulk := s.stored("bulk", store)
	all := packs()
	var mine int64
	for name, size := range all {
		if _, before := earlier[name]; !before {
			mine += size
		}
	}
	second := line.Sent() - sent - first
	t.Logf("%d bytes in %d packs: %d were sent, %d of which were finished, then the agent was killed and sent %d", mine, len(all)-len(earlier), first, finished, second)
	if finished == 0 || second > mine-finished+2<<20 {
		t.Errorf("of %d bytes %d were in the store, and %d were sent after that", mine, finished, second)
	}
	if grew := bulk.Status.Store.NewBytes; grew < mine || grew > mine+1<<20 {
		t.Errorf("the store grew by %d, and the object says by %d", mine, grew)
	}
	s.remove("bulk")
	s.running(bulkRestored("bulk").Obj())
	s.sumIsRight("bulk-2")
}

func bulkRestored(from string) *podBuilder { return bulk("bulk-2", 64).RestoreFrom(from).On(nodeTwo) }

// journal is how many bytes of a checkpoint its agent knows to be in the store.
func (s *scene) journal(c *checkpointv1alpha1.PodCheckpoint) (bytes int64) {
	s.Helper()
	text := s.onNode(c.Status.NodeName, "cat $(find /var/lib/stasis -path '*/storing/"+string(c.UID)+".json')")
	var j struct{ Packs []struct{ Size int64 } }
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		s.Fatalf("%s: %v", text, err)
	}
	for _, p := range j.Packs {
		bytes += p.Size
	}
	return bytes
}

// killAgent kills a node's agent, which is started again.
func (s *scene) killAgent(node string) {
	s.Helper()
	id := strings.TrimPrefix(s.agentOn(node).Status.ContainerStatuses[0].ContainerID, "containerd://")
	s.onNode(node, "kill -9 $(ctr -n k8s.io tasks ls | awk '$1==\""+id+"\" {print $2}')")
}
