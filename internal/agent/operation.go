package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/criservice"
	"podstasis.dev/stasis/internal/engine"
	"podstasis.dev/stasis/internal/platform"
	"podstasis.dev/stasis/internal/podtemplate"
)

const (
	// finishPatience is how long a stopping agent lets a checkpoint go on: most are
	// done by then, and ending one half-way is a risk for its Pod.
	finishPatience = 40 * time.Second
	// serverPatience is how long an ended call's server is waited for: it thaws
	// the Pod and removes what it wrote.
	serverPatience = 30 * time.Second
	// farewell is how long a stopping agent tries to write an outcome; the record
	// stays for its successor.
	farewell = 5 * time.Second
)

// podCheckpointer is the one call of the CRI that an operation makes.
type podCheckpointer interface {
	CheckpointPod(ctx context.Context, in *runtimeapi.CheckpointPodRequest, opts ...grpc.CallOption) (*runtimeapi.CheckpointPodResponse, error)
}

// operation is one checkpoint to take.
type operation struct {
	flight       *flight
	object       *v1alpha1.PodCheckpoint // as it was taken up
	source       *source
	sandboxID    string
	containerIDs []string
}

// operations takes checkpoints, each in a goroutine of its own.
type operations struct {
	nodeName string
	client   client.Client
	live     client.Reader
	cri      podCheckpointer
	// wait waits until the CRI server is done with a directory, and returns what
	// it answered.
	wait     func(ctx context.Context, path string) (answer error, err error)
	store    *store
	flights  *flights
	marker   *marker
	recorder events.EventRecorder
	metrics  *Metrics
	hooks    *hookRunner
	storing  *storing
	log      *slog.Logger
	now      func() time.Time
	// look says what is in containers, nil: nothing.
	look   func(ctx context.Context, sandboxID string, containerIDs []string) (engine.Examination, error)
	stages *stages // what the engine says about how far it is; nil: nothing

	queue chan operation
}

// begin hands an operation over; false if the agent is stopping.
func (o *operations) begin(ctx context.Context, op operation) bool {
	select {
	case o.queue <- op:
		return true
	case <-ctx.Done():
		return false
	}
}

// errStopped ends the operations of an agent that cannot wait for them any longer.
var errStopped = errors.New("the agent is being stopped")

// Start runs operations until ctx ends, and returns when the last one has: its
// Pod runs on and its outcome is on disk.
func (o *operations) Start(ctx context.Context) error {
	working, give := context.WithCancelCause(context.WithoutCancel(ctx))
	defer give(nil)
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(finishPatience):
			give(errStopped)
		case <-working.Done():
		}
	})
	defer stop()
	var running sync.WaitGroup
	defer running.Wait()
	o.resumeLeft(working)
	for {
		select {
		case <-ctx.Done():
			return nil
		case op := <-o.queue:
			running.Go(func() { o.run(ctx, working, op) })
		}
	}
}

// run takes one checkpoint, until working ends, and tells its outcome, until ctx does.
func (o *operations) run(ctx, working context.Context, op operation) {
	defer o.flights.end(op.flight)
	log := o.log.With("podcheckpoint", op.object.Namespace+"/"+op.object.Name, "uid", op.object.UID,
		"pod", op.source.pod.Name, "podUID", op.source.pod.UID)
	o.event(op.source.pod, op.object, corev1.EventTypeNormal, v1alpha1.EventCheckpointingPod, "Checkpointing the Pod for PodCheckpoint %s", op.object.Name)
	o.event(op.object, op.source.pod, corev1.EventTypeNormal, v1alpha1.EventCheckpointStarted, "Checkpointing containers %s of Pod %s on node %s",
		strings.Join(op.source.containers, ", "), op.source.pod.Name, o.nodeName)
	log.Info("checkpoint started", "sandbox", op.sandboxID, "containers", op.source.containers)

	pod := podRef{op.source.pod.Namespace, op.source.pod.Name, op.source.pod.UID}
	o.marker.set(ctx, pod, v1alpha1.PodConditionCheckpointing, corev1.ConditionTrue, v1alpha1.EventCheckpointingPod, "PodCheckpoint "+op.object.Name)
	begun := o.now()
	var resuming sync.WaitGroup
	defer resuming.Wait()
	rec, manifest, err := o.take(working, op, &resuming)
	took := o.now().Sub(begun)
	_ = o.marker.clear(ctx, pod, v1alpha1.PodConditionCheckpointing) // conclude makes sure, or the object's deletion
	if errors.Is(err, errDeleted) {
		log.Info("checkpoint abandoned, its object is being deleted")
		o.metrics.checkpointFailed(took)
		return
	}
	if err != nil {
		log.Error("checkpoint failed", "error", err, "took", took)
		o.metrics.checkpointFailed(took)
		reason := v1alpha1.ReasonCheckpointFailed
		if no := (*refusal)(nil); errors.As(err, &no) {
			reason = no.reason
		}
		rec = failureRecord(op.object, o.nodeName, metav1.NewTime(o.now()), reason, sentence(err.Error()))
		rec.PodUID = op.source.pod.UID
		if err := o.store.writeRecord(rec); err != nil {
			log.Error("the outcome could not be put on record", "error", err)
		}
	} else {
		log.Info("checkpoint taken", "took", took, "frozen", manifest.FreezeDuration, "capture", mode(manifest.Capture), "bytes", manifest.LogicalBytes(), "directory", rec.Data)
		o.metrics.checkpointSucceeded(took, manifest)
	}
	o.tell(ctx, log, rec)
}

// take has the Pod checkpointed and puts the outcome on record. When it returns
// an error nothing is left on disk; the Pod runs on in any case, and its hooks for
// that are run beside what follows.
func (o *operations) take(ctx context.Context, op operation, resuming *sync.WaitGroup) (*record, *checkpoint.Manifest, error) {
	timeout := timeoutOf(op.object)
	ctx, cancel := op.flight.context(ctx)
	defer cancel(nil)
	ctx, stop := context.WithTimeoutCause(ctx, timeout, timeoutError(timeout))
	defer stop()

	if err := o.lookAgain(ctx, op); err != nil {
		return nil, nil, err
	}
	resume, err := o.quiesce(ctx, op)
	defer resuming.Go(resume)
	if err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errDeleted) {
			err = cause
		}
		return nil, nil, err
	}
	dir, err := o.store.makePartial(op.object.UID)
	if err != nil {
		return nil, nil, err
	}
	rec, manifest, err := o.takeInto(ctx, op, dir)
	if err != nil {
		if removeErr := o.store.removePartial(op.object.UID); removeErr != nil {
			err = errors.Join(err, fmt.Errorf("remove the partial checkpoint: %w", removeErr))
		}
		if cause := context.Cause(ctx); errors.Is(cause, errDeleted) {
			return nil, nil, cause
		}
		return nil, nil, err
	}
	return rec, manifest, nil
}

// lookAgain repeats the preconditions now that the Pod carries the condition at
// which admission keeps resizes and ephemeral containers off (P15): what had come
// before is seen here. It is no obstacle that the API server is away.
func (o *operations) lookAgain(ctx context.Context, op operation) error {
	var pod *corev1.Pod
	var found corev1.Pod
	switch err := o.live.Get(ctx, client.ObjectKeyFromObject(op.source.pod), &found); {
	case err == nil:
		pod = &found
	case !apierrors.IsNotFound(err):
		o.log.Warn("the Pod could not be looked at again before its checkpoint", "pod", op.source.pod.Name, "error", err)
		return nil
	}
	pinned := op.object.DeepCopy()
	pinned.Spec.SourcePodUID = &op.source.pod.UID
	if _, no := checkPod(pinned, pod, o.nodeName); no != nil {
		return no
	}
	return nil
}

func timeoutError(timeout time.Duration) error {
	return fmt.Errorf("timeout: the checkpoint was not done within %s", timeout)
}

func (o *operations) takeInto(ctx context.Context, op operation, dir string) (*record, *checkpoint.Manifest, error) {
	limit := tightest(op.source.pod)
	warnings := o.warn(ctx, op)
	if o.stages != nil {
		teller := &stageTeller{client: o.client, log: o.log, now: o.now}
		defer teller.follow(ctx, o.stages, op.sandboxID, op.object, op.source.containers)()
	}
	// Kubelets restore such a Pod by stasis-runtime, whatever the container runtime
	// implements: what is written has to be of its format.
	_, err := o.cri.CheckpointPod(criservice.InOwnFormat(ctx), &runtimeapi.CheckpointPodRequest{
		PodSandboxId: op.sandboxID,
		OutputPath:   dir,
		ContainerIds: op.containerIDs,
		Options:      withFreezeBudget(op.object.Spec.Options, limit),
	})
	if err != nil {
		o.metrics.runtimeErrors.WithLabelValues("checkpoint_pod").Inc()
		return nil, nil, o.explain(ctx, op, limit, dir, err)
	}
	if err := syncTree(dir); err != nil {
		return nil, nil, fmt.Errorf("make the checkpoint durable: %w", err)
	}
	manifest, digest, err := checkpoint.ReadManifest(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("read what the runtime wrote: %w", err)
	}
	if err := sameContainers(manifest, op.source.containers); err != nil {
		return nil, nil, err
	}
	rec := o.success(op, manifest, digest)
	rec.Status.Warnings = warnings
	// From here on it has happened.
	if err := o.store.writeRecord(rec); err != nil {
		return nil, nil, err
	}
	if err := o.store.commit(op.object.UID, rec.Data); err != nil {
		return nil, nil, errors.Join(err, o.store.removeData(op.object.UID))
	}
	return rec, manifest, nil
}

// explain waits until the server is done with the directory, and makes one
// message of why the call ended and what the server had to say to it.
func (o *operations) explain(ctx context.Context, op operation, limit *probeLimit, dir string, err error) error {
	patience, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), serverPatience, errors.New("the CRI service does not come to an end"))
	defer cancel()
	answer, waitErr := o.wait(patience, dir)
	said := status.Convert(err)
	if answer != nil {
		said = status.Convert(answer)
	}
	cause := context.Cause(ctx)
	if cause == nil && status.Code(err) == codes.DeadlineExceeded {
		cause = timeoutError(timeoutOf(op.object)) // the server's clock was ahead of ours
	}
	switch {
	case cause == nil && limit != nil && criservice.HasReason(said.Err(), criservice.ReasonFreezeBudget):
		cause = fmt.Errorf("%s; that budget is what is safe under %s", said.Message(), limit)
	case cause == nil:
		cause = errors.New(said.Message())
	case errors.Is(cause, errStopped):
		cause = fmt.Errorf("the checkpoint was interrupted: the agent on node %s was stopped while it was being taken; nothing of it was kept, create another PodCheckpoint", o.nodeName)
	case answer != nil && !errors.Is(cause, errDeleted):
		cause = fmt.Errorf("%w (the runtime: %s)", cause, said.Message())
	}
	return errors.Join(cause, waitErr)
}

func sameContainers(m *checkpoint.Manifest, want []string) error {
	var has []string
	for _, c := range m.Containers {
		has = append(has, c.Name)
	}
	slices.Sort(has)
	want = slices.Sorted(slices.Values(want))
	if !slices.Equal(has, want) {
		return fmt.Errorf("the runtime captured containers %s, asked for were %s", strings.Join(has, ", "), strings.Join(want, ", "))
	}
	return nil
}

// tell writes an outcome to its object until it is there or the agent stops; the
// record keeps it for the next start.
func (o *operations) tell(ctx context.Context, log *slog.Logger, rec *record) {
	const first, most = 100 * time.Millisecond, 15 * time.Second
	for delay := first; ; delay = min(2*delay, most) {
		_, err := o.conclude(ctx, rec)
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			log.Warn("the outcome could not be written, trying again", "error", err, "in", delay)
			select {
			case <-time.After(delay):
				continue
			case <-ctx.Done():
			}
		}
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell)
		defer cancel()
		if _, err := o.conclude(last, rec); err != nil {
			log.Warn("the outcome could not be written before the agent stopped; its next start does it", "error", err)
		}
		return
	}
}

// conclude settles an operation that had marked its Pod. The mark goes first: once
// the object has ended nobody looks for it any more.
func (o *operations) conclude(ctx context.Context, rec *record) (bool, error) {
	if rec.PodUID != "" {
		if err := o.marker.clear(ctx, podRef{rec.Namespace, rec.PodName, rec.PodUID}, v1alpha1.PodConditionCheckpointing); err != nil {
			return false, err
		}
	}
	return o.settle(ctx, rec)
}

// settle writes an outcome to its object, once. It says whether this call ended
// the object: one that has ended otherwise, or is gone, is left as it is and data
// that it does not name are removed.
func (o *operations) settle(ctx context.Context, rec *record) (bool, error) {
	var pcp v1alpha1.PodCheckpoint
	err := o.live.Get(ctx, types.NamespacedName{Namespace: rec.Namespace, Name: rec.Name}, &pcp)
	switch {
	case apierrors.IsNotFound(err), err == nil && pcp.UID != rec.UID:
		return false, o.store.removeData(rec.UID)
	case err != nil:
		return false, fmt.Errorf("read the PodCheckpoint: %w", err)
	case !pcp.DeletionTimestamp.IsZero():
		return false, nil // the finalizer's removal takes record and data along
	case terminal(&pcp):
		if rec.Data != "" && (!ready(&pcp) || pcp.Status.ManifestDigest != rec.Status.ManifestDigest) {
			return false, o.store.removeData(rec.UID)
		}
		return false, o.store.removeRecord(rec.UID)
	}
	if rec.pending() {
		o.storing.begin(rec) // which comes back here
		return false, nil
	}
	before := pcp.DeepCopy()
	conditions := pcp.Status.Conditions
	rec.Status.DeepCopyInto(&pcp.Status)
	for _, c := range conditions {
		if c.Type != v1alpha1.PodCheckpointReady {
			pcp.Status.Conditions = append(pcp.Status.Conditions, c)
		}
	}
	if err := o.client.Status().Patch(ctx, &pcp, changed(before)); err != nil {
		return false, fmt.Errorf("write the outcome to the PodCheckpoint: %w", err)
	}
	o.announce(rec, &pcp)
	return true, o.store.removeRecord(rec.UID)
}

// announce makes the events of an outcome that is in the API.
func (o *operations) announce(rec *record, pcp *v1alpha1.PodCheckpoint) {
	kind, reason := corev1.EventTypeWarning, v1alpha1.EventCheckpointFailed
	message := readyCondition(pcp).Message
	if rec.Data != "" {
		kind, reason = corev1.EventTypeNormal, v1alpha1.EventCheckpointSucceeded
	}
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: rec.Namespace, Name: rec.PodName, UID: rec.PodUID}}
	if rec.PodUID == "" {
		o.event(pcp, nil, kind, reason, "%s", message)
		return
	}
	o.event(pcp, pod, kind, reason, "%s", message)
	o.event(pod, pcp, kind, reason, "PodCheckpoint %s: %s", pcp.Name, message)
}

// maxEventBytes is the API server's limit of an event's note.
const maxEventBytes = 1024

func (o *operations) event(about, related client.Object, kind, reason, format string, args ...any) {
	note := cut(fmt.Sprintf(format, args...), maxEventBytes)
	if related == nil {
		o.recorder.Eventf(about, nil, kind, reason, actionCheckpoint, "%s", note)
		return
	}
	o.recorder.Eventf(about, related, kind, reason, actionCheckpoint, "%s", note)
}

const (
	actionCheckpoint = "Checkpoint"
	actionRestore    = "Restore"
	actionDelete     = "Delete"
)

func timeoutOf(pcp *v1alpha1.PodCheckpoint) time.Duration {
	if s := pcp.Spec.TimeoutSeconds; s != nil && *s > 0 {
		return time.Duration(*s) * time.Second
	}
	return defaultTimeout
}

// success is the record of a checkpoint that was taken.
func (o *operations) success(op operation, m *checkpoint.Manifest, digest string) *record {
	now := metav1.NewTime(o.now())
	data := dataName(op.object.Namespace, op.object.Name, op.object.UID)
	regular, init := capturedContainers(op.source)
	s := v1alpha1.PodCheckpointStatus{
		NodeName:     o.nodeName,
		SourcePodUID: &op.source.pod.UID,
		CheckpointLocation: &v1alpha1.CheckpointSource{
			Type:      v1alpha1.CheckpointSourceTypeNodeLocal,
			NodeLocal: &v1alpha1.NodeLocalCheckpointSource{Path: data},
		},
		ManifestDigest:             digest,
		StartTime:                  op.object.Status.StartTime,
		CompletionTime:             &now,
		CheckpointedPodTemplate:    podtemplate.FromPod(op.source.pod),
		CheckpointedContainers:     regular,
		CheckpointedInitContainers: init,
		Engine:                     &v1alpha1.EngineStatus{Name: m.Engine.Name, Version: m.Engine.Version},
		Platform:                   m.Platform.OS + "/" + m.Platform.Architecture,
		Requires:                   requirements(m),
		Size:                       &v1alpha1.CheckpointSize{Logical: binaryBytes(m.LogicalBytes()), LogicalBytes: m.LogicalBytes()},
		FreezeDuration:             &metav1.Duration{Duration: m.FreezeDuration.Round(time.Microsecond)},
		EarlierFreezes:             earlierFreezes(m.EarlierFreezes),
		Capture:                    capture(m.Capture),
	}
	for _, p := range m.Phases {
		s.Phases = append(s.Phases, v1alpha1.PhaseTiming{Name: p.Name, Duration: metav1.Duration{Duration: p.Duration.Round(time.Microsecond)}})
	}
	setReady(&s, op.object.Generation, now, v1alpha1.ReasonCheckpointCompleted, fmt.Sprintf(
		"Checkpointed %s of Pod %s on node %s: %s, frozen for %s%s", strings.Join(op.source.containers, ", "),
		op.source.pod.Name, o.nodeName, s.Size.Logical, m.FreezeDuration.Round(time.Millisecond), before(m.EarlierFreezes)))
	return &record{
		Namespace: op.object.Namespace, Name: op.object.Name, UID: op.object.UID,
		PodName: op.source.pod.Name, PodUID: op.source.pod.UID, Data: data, StoreName: op.object.Spec.StoreName, Workload: workloadOf(op.source.pod), Status: s,
	}
}

// maxEarlierFreezes bounds what is told of freezes that came to nothing; the CRD states
// the same.
const maxEarlierFreezes = 16

func earlierFreezes(freezes []checkpoint.EarlierFreeze) (told []v1alpha1.EarlierFreeze) {
	for _, f := range freezes[:min(len(freezes), maxEarlierFreezes)] {
		told = append(told, v1alpha1.EarlierFreeze{
			Duration: metav1.Duration{Duration: f.Duration.Round(time.Microsecond)}, Reason: printable(f.Reason, maxReason),
		})
	}
	return told
}

// before says that a Pod was frozen before, too.
func before(freezes []checkpoint.EarlierFreeze) string {
	if len(freezes) == 0 {
		return ""
	}
	var sum time.Duration
	for _, f := range freezes {
		sum += f.Duration
	}
	return fmt.Sprintf(", and before that for %s in %s that came to nothing", sum.Round(time.Millisecond), counted(len(freezes), "attempt"))
}

// capture tells how memory is captured; nil if the engine does not say.
func capture(c *checkpoint.Capture) *v1alpha1.MemoryCapture {
	if c == nil {
		return nil
	}
	return &v1alpha1.MemoryCapture{Mode: word(c.Mode), Reason: printable(c.Reason, maxReason)}
}

// requirements is what a checkpoint needs of a node; nil if it does not say.
func requirements(m *checkpoint.Manifest) *v1alpha1.PlatformRequirements {
	d, told := platform.Of(m)
	if !told {
		return nil
	}
	return &v1alpha1.PlatformRequirements{
		OS: d.OS, Architecture: d.Architecture, Kernel: d.Kernel,
		CPUFeatures: d.CPU.Features, XSaveFeatures: d.CPU.XSaveFeatures, XSaveBytes: int32(d.CPU.XSaveBytes),
		Engine: v1alpha1.EngineStatus{Name: d.Engine.Name, Version: d.Engine.Version}, FormatVersion: int32(d.FormatVersion),
	}
}

// failureRecord is the record of an object that ends without a checkpoint.
func failureRecord(pcp *v1alpha1.PodCheckpoint, nodeName string, now metav1.Time, reason, message string) *record {
	s := v1alpha1.PodCheckpointStatus{NodeName: nodeName, StartTime: pcp.Status.StartTime, SourcePodUID: pcp.Status.SourcePodUID}
	setReady(&s, pcp.Generation, now, reason, message)
	rec := &record{Namespace: pcp.Namespace, Name: pcp.Name, UID: pcp.UID, PodName: pcp.Spec.SourcePodName, Status: s}
	if pcp.Status.SourcePodUID != nil {
		rec.PodUID = *pcp.Status.SourcePodUID
	}
	return rec
}

// failed is the same outcome, failed after all.
func (rec *record) failed(now metav1.Time, message string) *record {
	s := v1alpha1.PodCheckpointStatus{NodeName: rec.Status.NodeName, StartTime: rec.Status.StartTime, SourcePodUID: rec.Status.SourcePodUID}
	generation := int64(0)
	if c := readyCondition(&v1alpha1.PodCheckpoint{Status: rec.Status}); c != nil {
		generation = c.ObservedGeneration
	}
	setReady(&s, generation, now, v1alpha1.ReasonCheckpointFailed, message)
	other := *rec
	other.Data, other.Status = "", s
	return &other
}

// binaryBytes writes a size with three significant digits, as a quantity.
func binaryBytes(n int64) string {
	units := []string{"", "Ki", "Mi", "Gi", "Ti", "Pi"}
	value, unit := float64(n), 0
	for value >= 1024 && unit < len(units)-1 {
		value /= 1024
		unit++
	}
	digits := 0
	if unit > 0 && value < 10 {
		digits = 2
	} else if unit > 0 && value < 100 {
		digits = 1
	}
	number := fmt.Sprintf("%.*f", digits, value)
	if strings.Contains(number, ".") {
		number = strings.TrimRight(strings.TrimRight(number, "0"), ".")
	}
	return number + units[unit]
}

// sentence makes an error a message: one line that begins with a capital letter.
func sentence(s string) string {
	if s == "" {
		return "The checkpoint failed and nothing said why"
	}
	return strings.ToUpper(s[:1]) + strings.ReplaceAll(s[1:], "\n", "; ") // joined errors come in lines
}
