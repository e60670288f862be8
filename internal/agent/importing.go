package agent

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/criservice"
	"podstasis.dev/stasis/internal/engine/criu"
)

const (
	// importPatience is how long an archive may be waited for without a byte coming.
	importPatience = 24 * time.Hour
	// importLook is how often the object says how much has come.
	importLook = 10 * time.Second
	// maxUnpacking is how many archives are unpacked at one time.
	maxUnpacking = 1
	// swelling bounds what a kubelet's archive, which may hold compressed files, may
	// become: so many times its size, and a little for a small one.
	swelling      = 10
	swellingStart = 64 << 20
)

// importing takes an object on whose checkpoint comes as an archive.
func (r *reconciler) importing(ctx context.Context, pcp *v1alpha1.PodCheckpoint) (ctrl.Result, error) {
	in := pcp.Spec.Import
	if err := r.addFinalizer(ctx, pcp); err != nil {
		return unlessConflict("add the finalizer", err)
	}
	there, since, err := r.uploads.expect(pcp.UID, client.ObjectKeyFromObject(pcp), in.SizeBytes)
	if err != nil {
		return ctrl.Result{}, err
	}
	now := r.now()
	switch {
	case there > in.SizeBytes:
		return ctrl.Result{}, r.endImport(ctx, pcp, fmt.Sprintf("%d bytes of the archive are on node %s, more than the %d that it has", there, r.nodeName, in.SizeBytes))
	case there == in.SizeBytes:
		return r.unpack(ctx, pcp)
	case now.Sub(since) > importPatience:
		return ctrl.Result{}, r.endImport(ctx, pcp, fmt.Sprintf("Nothing of the archive has come for %s; %d of its %d bytes had, and were not kept", importPatience, there, in.SizeBytes))
	}
	if pcp.Status.StartTime == nil {
		if err := r.room.fits(r.store.checkpointRoot(), 2*in.SizeBytes); errors.Is(err, criservice.ErrNoRoom) {
			return ctrl.Result{}, r.endImport(ctx, pcp, sentence(err.Error()))
		} else if err != nil {
			return ctrl.Result{}, err
		}
	}
	message := fmt.Sprintf("Waits for its archive on node %s: %d of %d bytes are there", r.nodeName, there, in.SizeBytes)
	if err := r.tellImport(ctx, pcp, v1alpha1.ReasonPending, message); err != nil {
		return unlessConflict("write the status", err)
	}
	return ctrl.Result{RequeueAfter: importLook}, nil
}

// tellImport writes how far an import has come, if that is new.
func (r *reconciler) tellImport(ctx context.Context, pcp *v1alpha1.PodCheckpoint, reason, message string) error {
	if c := readyCondition(pcp); c != nil && c.Reason == reason && c.Message == message {
		return nil
	}
	before := pcp.DeepCopy()
	now := metav1.NewTime(r.now())
	pcp.Status.NodeName = r.nodeName
	if pcp.Status.StartTime == nil {
		pcp.Status.StartTime = &now
	}
	setReady(&pcp.Status, pcp.Generation, now, reason, message)
	return r.client.Status().Patch(ctx, pcp, changed(before))
}

// endImport ends an import that comes to nothing.
func (r *reconciler) endImport(ctx context.Context, pcp *v1alpha1.PodCheckpoint, message string) error {
	r.uploads.forget(pcp.UID)
	rec := failureRecord(pcp, r.nodeName, metav1.NewTime(r.now()), v1alpha1.ReasonCheckpointFailed, message)
	rec.PodUID = "" // no Pod of this cluster was touched
	if _, err := r.ops.settle(ctx, rec); err != nil {
		return err
	}
	r.log.Info("import ended", "podcheckpoint", pcp.Namespace+"/"+pcp.Name, "message", message)
	return r.store.removeImport(pcp.UID)
}

// unpack hands an archive that is there over to be checked and unpacked.
func (r *reconciler) unpack(ctx context.Context, pcp *v1alpha1.PodCheckpoint) (ctrl.Result, error) {
	fl := r.flights.beginImport(pcp.UID)
	if fl == nil {
		return ctrl.Result{RequeueAfter: busyRetry}, nil
	}
	r.uploads.forget(pcp.UID)
	err := r.tellImport(ctx, pcp, v1alpha1.ReasonCheckpointInProgress,
		fmt.Sprintf("All %d bytes of the archive are on node %s, and are checked and unpacked", pcp.Spec.Import.SizeBytes, r.nodeName))
	if err != nil {
		r.flights.end(fl)
		return unlessConflict("write the status", err)
	}
	if !r.imports.begin(ctx, fl, pcp.DeepCopy()) {
		r.flights.end(fl)
	}
	return ctrl.Result{}, nil
}

// imports unpacks archives, in goroutines that end with the agent. One that is cut
// short is begun anew by the next agent: the archive is still there.
type imports struct {
	ops   *operations
	room  *room
	queue chan importOp
	log   *slog.Logger
}

type importOp struct {
	flight *flight
	object *v1alpha1.PodCheckpoint
}

func (i *imports) begin(ctx context.Context, fl *flight, pcp *v1alpha1.PodCheckpoint) bool {
	select {
	case i.queue <- importOp{fl, pcp}:
		return true
	case <-ctx.Done():
		return false
	}
}

// Start implements manager.Runnable.
func (i *imports) Start(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	turn := make(chan struct{}, maxUnpacking)
	for {
		select {
		case <-ctx.Done():
			return nil
		case op := <-i.queue:
			running.Go(func() {
				defer i.ops.flights.end(op.flight)
				select {
				case turn <- struct{}{}:
					defer func() { <-turn }()
					i.run(ctx, op)
				case <-ctx.Done():
				}
			})
		}
	}
}

// run makes a checkpoint of one archive and tells what has come of it.
func (i *imports) run(ctx context.Context, op importOp) {
	pcp := op.object
	log := i.log.With("podcheckpoint", pcp.Namespace+"/"+pcp.Name, "uid", pcp.UID)
	begun := i.ops.now()
	working, cancel := op.flight.context(ctx)
	defer cancel(nil)
	rec, err := i.take(working, pcp)
	if err != nil && working.Err() != nil {
		log.Info("an import was cut short", "cause", context.Cause(working))
		return // the object is being deleted, or the next agent goes on
	}
	if err != nil {
		log.Error("import failed", "error", err)
		rec = failureRecord(pcp, i.ops.nodeName, metav1.NewTime(i.ops.now()), v1alpha1.ReasonCheckpointFailed, sentence("the archive was not imported: "+err.Error()))
		rec.PodUID = ""
		if err := i.ops.store.writeRecord(rec); err != nil {
			log.Error("the outcome could not be put on record", "error", err)
		}
	} else {
		log.Info("archive imported", "took", i.ops.now().Sub(begun), "bytes", pcp.Spec.Import.SizeBytes, "directory", rec.Data)
	}
	if err := i.ops.store.removeImport(pcp.UID); err != nil {
		log.Warn("the imported archive could not be removed", "error", err)
	}
	i.ops.tell(ctx, log, rec)
}

// take checks and unpacks an archive. What it returns is on record.
func (i *imports) take(ctx context.Context, pcp *v1alpha1.PodCheckpoint) (rec *record, err error) {
	f, err := os.Open(filepath.Join(i.ops.store.importPath(pcp.UID), uploadName))
	if err != nil {
		return nil, fmt.Errorf("open the archive: %w", err)
	}
	defer f.Close()
	digest, err := digestOf(ctx, f)
	if err != nil {
		return nil, fmt.Errorf("read the archive: %w", err)
	}
	if want := pcp.Spec.Import.Digest; digest != want {
		return nil, fmt.Errorf("what came has digest %s, spec.import.digest is %s", digest, want)
	}
	seen, err := archive.OpenFile(f, pcp.Spec.Import.SizeBytes)
	if err != nil {
		return nil, err
	}
	limit := pcp.Spec.Import.SizeBytes
	if seen.Object == nil {
		limit = limit*swelling + swellingStart
	}
	release, err := i.room.reserve(i.ops.store.checkpointRoot(), min(limit, seen.Manifest.LogicalBytes()))
	if err != nil {
		return nil, err
	}
	defer release()
	dir, err := i.ops.store.makePartial(pcp.UID)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, i.ops.store.removePartial(pcp.UID))
		}
	}()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("open the checkpoint's directory: %w", err)
	}
	defer root.Close()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, fmt.Errorf("read the archive: %w", err)
	}
	unpacked, err := archive.Unpack(ctx, f, root, archive.Limits{Bytes: limit})
	if err != nil {
		return nil, err
	}
	if e := unpacked.Manifest.Engine.Name; e != criu.Name {
		return nil, fmt.Errorf("%w: it is of the engine %.80q, whose images nobody can look into: what restored processes would be given cannot be compared with what their containers may have; only CRIU's are brought in", archive.ErrInvalid, e)
	}
	if rec, err = i.ops.imported(pcp, unpacked); err != nil {
		return nil, err
	}
	if err := i.ops.acceptable(ctx, rec); err != nil {
		return nil, err
	}
	return rec, i.keep(rec)
}

// acceptable asks the API server whether it takes an outcome that comes from an
// archive, before it has happened: one that it refuses could never be told. Where it
// cannot be asked the outcome is told later.
func (o *operations) acceptable(ctx context.Context, rec *record) error {
	var pcp v1alpha1.PodCheckpoint
	if err := o.live.Get(ctx, types.NamespacedName{Namespace: rec.Namespace, Name: rec.Name}, &pcp); err != nil || pcp.UID != rec.UID {
		return nil
	}
	before := pcp.DeepCopy()
	rec.Status.DeepCopyInto(&pcp.Status)
	err := o.client.Status().Patch(ctx, &pcp, changed(before), client.DryRunAll)
	if apierrors.IsInvalid(err) || apierrors.IsRequestEntityTooLargeError(err) || apierrors.IsBadRequest(err) {
		return fmt.Errorf("%w: what it says does not make a PodCheckpoint: %w", archive.ErrInvalid, err)
	}
	return nil
}

// keep puts an outcome on record: from then on it has happened.
func (i *imports) keep(rec *record) error {
	if err := i.ops.store.writeRecord(rec); err != nil {
		return err
	}
	if err := i.ops.store.commit(rec.UID, rec.Data); err != nil {
		return errors.Join(err, i.ops.store.removeData(rec.UID))
	}
	return nil
}

func digestOf(ctx context.Context, r io.Reader) (string, error) {
	sum := sha256.New()
	buf := make([]byte, 1<<20)
	for {
		if err := context.Cause(ctx); err != nil {
			return "", err
		}
		n, err := r.Read(buf)
		sum.Write(buf[:n])
		if err == io.EOF {
			return "sha256:" + hex.EncodeToString(sum.Sum(nil)), nil
		} else if err != nil {
			return "", err
		}
	}
}
