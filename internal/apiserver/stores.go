package apiserver

import (
	"context"
	"errors"
	"fmt"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	subresources "podstasis.dev/stasis/api/subresources/v1alpha1"
	checkpointv1alpha1 "podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/store"
	"podstasis.dev/stasis/internal/stores"
)

// storeWait is how long a call waits for a verification or a collection. The generic
// handlers end a creation after 34 s.
const storeWait = 20 * time.Second

// storeRunner verifies and collects stores.
type storeRunner interface {
	Verify(ctx context.Context, object *checkpointv1alpha1.CheckpointStore, id *store.ID) (subresources.StoreVerificationStatus, error)
	Collect(ctx context.Context, object *checkpointv1alpha1.CheckpointStore, dryRun bool) (subresources.StoreCollectionStatus, error)
}

func checkpointStoresParent() *parent {
	return &parent{object: &checkpointv1alpha1.CheckpointStore{}, gvk: checkpointv1alpha1.GroupVersion.WithKind("CheckpointStore"), singular: "checkpointstore", cluster: true}
}

// storeVerifications answers checkpointstores/verify.
type storeVerifications struct {
	parentless
	objects client.Reader
	runner  storeRunner
}

var _ rest.NamedCreater = &storeVerifications{}

func (*storeVerifications) New() runtime.Object { return &subresources.StoreVerification{} }

func (v *storeVerifications) Create(ctx context.Context, name string, posted runtime.Object, _ rest.ValidateObjectFunc, options *metav1.CreateOptions) (runtime.Object, error) {
	if len(options.DryRun) > 0 {
		return nil, apierrors.NewBadRequest("a verification changes nothing: there is no dry run of it")
	}
	object, err := checkpointStore(ctx, v.objects, name)
	if err != nil {
		return nil, err
	}
	return verify(ctx, v.runner, object, nil, posted)
}

// checkpointVerifications answers podcheckpoints/verify.
type checkpointVerifications struct{ storeVerifications }

var _ rest.NamedCreater = &checkpointVerifications{}

func (v *checkpointVerifications) Create(ctx context.Context, name string, posted runtime.Object, _ rest.ValidateObjectFunc, options *metav1.CreateOptions) (runtime.Object, error) {
	if len(options.DryRun) > 0 {
		return nil, apierrors.NewBadRequest("a verification changes nothing: there is no dry run of it")
	}
	c, err := one(ctx, v.objects, request.NamespaceValue(ctx), name)
	if err != nil {
		return nil, err
	}
	if !c.IsReady() {
		return nil, notReady(c)
	}
	in := c.Status.Store
	if in == nil {
		return nil, apierrors.NewConflict(podCheckpoints, name, errors.New("it is in no CheckpointStore; what is on a node is compared with its digests at each restore"))
	}
	id, err := store.ParseID(in.CheckpointID)
	if err != nil {
		return nil, apierrors.NewInternalError(fmt.Errorf("status.store.checkpointID: %w", err))
	}
	object, err := checkpointStore(ctx, v.objects, in.Name)
	if err != nil {
		return nil, err
	}
	if object.Status.StoreID != in.StoreID {
		return nil, gone(fmt.Sprintf("CheckpointStore %q is of store %s now, and PodCheckpoint %q was in store %s", in.Name, object.Status.StoreID, name, in.StoreID))
	}
	return verify(ctx, v.runner, object, &id, posted)
}

func verify(ctx context.Context, runner storeRunner, object *checkpointv1alpha1.CheckpointStore, id *store.ID, posted runtime.Object) (runtime.Object, error) {
	waiting, cancel := context.WithTimeoutCause(ctx, storeWait, stores.ErrWaited)
	defer cancel()
	status, err := runner.Verify(waiting, object, id)
	if err != nil {
		return nil, storeError(err, object.Name)
	}
	answer := posted.(*subresources.StoreVerification).DeepCopy()
	answer.Status = status
	return answer, nil
}

// storeCollections answers checkpointstores/collect.
type storeCollections struct {
	parentless
	objects client.Reader
	runner  storeRunner
}

var _ rest.NamedCreater = &storeCollections{}

func (*storeCollections) New() runtime.Object { return &subresources.StoreCollection{} }

func (c *storeCollections) Create(ctx context.Context, name string, posted runtime.Object, _ rest.ValidateObjectFunc, options *metav1.CreateOptions) (runtime.Object, error) {
	object, err := checkpointStore(ctx, c.objects, name)
	if err != nil {
		return nil, err
	}
	waiting, cancel := context.WithTimeoutCause(ctx, storeWait, stores.ErrWaited)
	defer cancel()
	status, err := c.runner.Collect(waiting, object, len(options.DryRun) > 0)
	if err != nil {
		return nil, storeError(err, name)
	}
	answer := posted.(*subresources.StoreCollection).DeepCopy()
	answer.Status = status
	return answer, nil
}

func checkpointStore(ctx context.Context, objects client.Reader, name string) (*checkpointv1alpha1.CheckpointStore, error) {
	var s checkpointv1alpha1.CheckpointStore
	if err := objects.Get(ctx, client.ObjectKey{Name: name}, &s); err != nil {
		return nil, passed(err, "read CheckpointStore %s", name)
	}
	return &s, nil
}

// storeError turns an error with a store into the answer.
func storeError(err error, name string) error {
	switch {
	case err == context.Canceled, err == context.DeadlineExceeded: // whoever asked is gone
		return err
	case errors.Is(err, stores.ErrBusy):
		return apierrors.NewTooManyRequests(fmt.Sprintf("CheckpointStore %q: %v; ask again when one has ended", name, err), 10)
	}
	return reasoned(apierrors.NewServiceUnavailable(err.Error()), stores.Reason(err))
}
