package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// CheckpointStore is a place outside the nodes where checkpoints are kept, each part
// once, and from where any node can restore them. Stasis' addition to the KEP.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=cps
// +kubebuilder:printcolumn:name="Type",type=string,JSONPath=`.spec.type`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Checkpoints",type=integer,JSONPath=`.status.checkpoints`
// +kubebuilder:printcolumn:name="Logical",type=string,JSONPath=`.status.logical`
// +kubebuilder:printcolumn:name="Stored",type=string,JSONPath=`.status.stored`
// +kubebuilder:printcolumn:name="Capacity",type=string,JSONPath=`.spec.capacity`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 63",message="a CheckpointStore's name has at most 63 characters"
type CheckpointStore struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// spec says where the store is and what may be kept there.
	Spec CheckpointStoreSpec `json:"spec"`

	// status tells what was observed. The controller writes it.
	// +optional
	Status CheckpointStoreStatus `json:"status,omitempty"`
}

// CheckpointStoreList is a list of CheckpointStore objects.
//
// +kubebuilder:object:root=true
type CheckpointStoreList struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []CheckpointStore `json:"items"`
}

// CheckpointStoreSpec says where a store is and what may be kept there. Where it is and
// whether it is encrypted does not change; credentials, keys and bounds do.
//
// +union
// +kubebuilder:validation:XValidation:rule="self.type == 'Directory' ? has(self.directory) : !has(self.directory)",message="directory is set exactly when type is Directory"
// +kubebuilder:validation:XValidation:rule="self.type == 'S3' ? has(self.s3) : !has(self.s3)",message="s3 is set exactly when type is S3"
// +kubebuilder:validation:XValidation:rule="self.type == 'GCS' ? has(self.gcs) : !has(self.gcs)",message="gcs is set exactly when type is GCS"
// +kubebuilder:validation:XValidation:rule="self.type == 'Azure' ? has(self.azure) : !has(self.azure)",message="azure is set exactly when type is Azure"
// +kubebuilder:validation:XValidation:rule="self.type == 'Registry' ? has(self.registry) : !has(self.registry)",message="registry is set exactly when type is Registry"
// +kubebuilder:validation:XValidation:rule="self.type == oldSelf.type && has(self.directory) == has(oldSelf.directory) && (!has(self.directory) || self.directory == oldSelf.directory) && (!has(self.s3) || self.s3 == oldSelf.s3) && (!has(self.gcs) || self.gcs == oldSelf.gcs) && (!has(self.azure) || self.azure == oldSelf.azure) && (!has(self.registry) || self.registry == oldSelf.registry)",message="where a store is does not change; create another CheckpointStore"
// +kubebuilder:validation:XValidation:rule="has(self.encryptionSecretName) == has(oldSelf.encryptionSecretName)",message="whether a store is encrypted does not change; create another CheckpointStore"
type CheckpointStoreSpec struct {
	// type is the kind of store.
	// +unionDiscriminator
	Type CheckpointStoreType `json:"type"`

	// directory that all nodes have mounted at the same path, such as of NFS.
	// +optional
	Directory *DirectoryStore `json:"directory,omitempty"`
	// s3 is a bucket of Amazon S3, or of a server that speaks its protocol.
	// +optional
	S3 *S3Store `json:"s3,omitempty"`
	// gcs is a bucket of Google Cloud Storage.
	// +optional
	GCS *GCSStore `json:"gcs,omitempty"`
	// azure is a container of Azure Blob Storage.
	// +optional
	Azure *AzureStore `json:"azure,omitempty"`
	// registry is a repository of an OCI registry.
	// +optional
	Registry *RegistryStore `json:"registry,omitempty"`

	// credentialsSecretName names a Secret in the namespace that Stasis is installed in,
	// with what the kind of store asks for (docs/stores.md).
	// +optional
	// +kubebuilder:validation:MaxLength=253
	CredentialsSecretName string `json:"credentialsSecretName,omitempty"`

	// encryptionSecretName names a Secret in the namespace that Stasis is installed in.
	// Each of its entries is a key of 32 bytes. The store is encrypted with AES-256-GCM,
	// by the key whose name is the last in the alphabet; the others still open it until it
	// has been rotated.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	EncryptionSecretName *string `json:"encryptionSecretName,omitempty"`

	// caBundle holds certificates (PEM) that the server is verified by, besides the
	// system's.
	// +optional
	// +kubebuilder:validation:MaxLength=1048576
	CABundle []byte `json:"caBundle,omitempty"`

	// insecure allows plain HTTP, with which anyone on the way can read the credentials.
	// +optional
	Insecure bool `json:"insecure,omitempty"`

	// namespaces that may keep checkpoints here; empty means all of them.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MaxLength=63
	Namespaces []string `json:"namespaces,omitempty"`

	// capacity bounds what the store holds. A checkpoint that would begin beyond it is
	// refused.
	// +optional
	Capacity *resource.Quantity `json:"capacity,omitempty"`

	// namespaceCapacity bounds what the checkpoints of one namespace take.
	// +optional
	NamespaceCapacity *resource.Quantity `json:"namespaceCapacity,omitempty"`

	// retention says which checkpoints are deleted; unset means none.
	// +optional
	Retention *CheckpointRetention `json:"retention,omitempty"`
}

// CheckpointRetention says which PodCheckpoints in a store are deleted. One goes as soon
// as one of these says so; one that Pods are being restored from is kept until they are.
type CheckpointRetention struct {
	// maxPerPod is how many checkpoints of a Pod of the same name are kept: the latest.
	// +optional
	// +kubebuilder:validation:Minimum=1
	MaxPerPod *int32 `json:"maxPerPod,omitempty"`
	// maxPerWorkload is how many of all Pods of one controller are kept: the latest.
	// +optional
	// +kubebuilder:validation:Minimum=1
	MaxPerWorkload *int32 `json:"maxPerWorkload,omitempty"`
	// maxAge is how long one is kept.
	// +optional
	MaxAge *metav1.Duration `json:"maxAge,omitempty"`
	// maxBytesPerNamespace is how much those of one namespace take, by what the
	// store grew by: the oldest go first, and the latest stays.
	// +optional
	MaxBytesPerNamespace *resource.Quantity `json:"maxBytesPerNamespace,omitempty"`
}

// CheckpointStoreType names a kind of store.
//
// +kubebuilder:validation:Enum=Directory;S3;GCS;Azure;Registry
type CheckpointStoreType string

const (
	CheckpointStoreTypeDirectory CheckpointStoreType = "Directory"
	CheckpointStoreTypeS3        CheckpointStoreType = "S3"
	CheckpointStoreTypeGCS       CheckpointStoreType = "GCS"
	CheckpointStoreTypeAzure     CheckpointStoreType = "Azure"
	CheckpointStoreTypeRegistry  CheckpointStoreType = "Registry"
)

// DirectoryStore is a directory that all nodes share.
type DirectoryStore struct {
	// path on each node, and for the controller: absolute.
	// +kubebuilder:validation:Pattern=`^/[^\x00]*$`
	// +kubebuilder:validation:MaxLength=1024
	Path string `json:"path"`
}

// S3Store is a bucket.
type S3Store struct {
	// bucket is its name.
	// +kubebuilder:validation:MinLength=3
	// +kubebuilder:validation:MaxLength=63
	Bucket string `json:"bucket"`
	// prefix of the keys.
	// +optional
	// +kubebuilder:validation:MaxLength=512
	Prefix string `json:"prefix,omitempty"`
	// region of the bucket.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	Region string `json:"region"`
	// endpoint is the URL of a server that is not Amazon's.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Endpoint string `json:"endpoint,omitempty"`
	// pathStyle has the bucket named in the path and not in the host name.
	// +optional
	PathStyle bool `json:"pathStyle,omitempty"`
}

// GCSStore is a bucket.
type GCSStore struct {
	// bucket is its name.
	// +kubebuilder:validation:MinLength=3
	// +kubebuilder:validation:MaxLength=222
	Bucket string `json:"bucket"`
	// prefix of the keys.
	// +optional
	// +kubebuilder:validation:MaxLength=512
	Prefix string `json:"prefix,omitempty"`
	// endpoint is the URL of a server that is not Google's.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Endpoint string `json:"endpoint,omitempty"`
}

// AzureStore is a container of a storage account.
type AzureStore struct {
	// account is the storage account's name.
	// +kubebuilder:validation:MinLength=3
	// +kubebuilder:validation:MaxLength=24
	Account string `json:"account"`
	// container is its name.
	// +kubebuilder:validation:MinLength=3
	// +kubebuilder:validation:MaxLength=63
	Container string `json:"container"`
	// prefix of the keys.
	// +optional
	// +kubebuilder:validation:MaxLength=512
	Prefix string `json:"prefix,omitempty"`
	// endpoint is the URL of a server that is not Microsoft's.
	// +optional
	// +kubebuilder:validation:MaxLength=1024
	Endpoint string `json:"endpoint,omitempty"`
}

// RegistryStore is a repository of an OCI registry.
type RegistryStore struct {
	// repository is HOST[:PORT]/PATH.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	Repository string `json:"repository"`
}

// CheckpointStoreStatus tells what was observed of a store.
type CheckpointStoreStatus struct {
	// storeID is the identity of what was found, or made, there. A store of another
	// identity at the same place is refused.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	StoreID string `json:"storeID,omitempty"`

	// clusterID is what this cluster's checkpoints are labelled with in the store, which
	// others may share: the UID of the namespace kube-system.
	// +optional
	// +kubebuilder:validation:MaxLength=64
	ClusterID string `json:"clusterID,omitempty"`

	// checkpoints is how many the store holds, with those of other clusters.
	// +optional
	Checkpoints int32 `json:"checkpoints,omitempty"`
	// logicalBytes is what they would take without the store.
	// +optional
	LogicalBytes int64 `json:"logicalBytes,omitempty"`
	// logical is the same as a quantity, such as "12Mi".
	// +optional
	Logical string `json:"logical,omitempty"`
	// storedBytes is what they take.
	// +optional
	StoredBytes int64 `json:"storedBytes,omitempty"`
	// stored is the same as a quantity.
	// +optional
	Stored string `json:"stored,omitempty"`

	// namespaces tells the usage of each.
	// +optional
	// +listType=map
	// +listMapKey=name
	// +kubebuilder:validation:MaxItems=1000
	Namespaces []NamespaceUsage `json:"namespaces,omitempty"`

	// lastCollectionTime is when what nothing uses was last looked for.
	// +optional
	LastCollectionTime *metav1.Time `json:"lastCollectionTime,omitempty"`

	// conditions holds "Ready": the store was reached, and is the one of storeID.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=16
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// NamespaceUsage is what the checkpoints of a namespace take.
type NamespaceUsage struct {
	// name of the namespace.
	Name string `json:"name"`
	// checkpoints is how many.
	Checkpoints int32 `json:"checkpoints"`
	// storedBytes is what the store grew by when they were written.
	StoredBytes int64 `json:"storedBytes"`
}

// StoredCheckpoint says where in a store a checkpoint is.
//
// +k8s:openapi-gen=true
type StoredCheckpoint struct {
	// name of the CheckpointStore.
	Name string `json:"name"`
	// storeID is the store's identity.
	// +kubebuilder:validation:MaxLength=64
	StoreID string `json:"storeID"`
	// checkpointID names the checkpoint in it: the digest of its root object.
	// +kubebuilder:validation:Pattern=`^[0-9a-f]{64}$`
	CheckpointID string `json:"checkpointID"`
	// newBytes is what the store grew by.
	NewBytes int64 `json:"newBytes"`
	// previous is what it was compared with when it was stored: the latest checkpoint
	// that the store then had of a Pod of that name, or else of Pods of the same images, in
	// the same namespace. None if there was none.
	// +optional
	Previous *PreviousCheckpoint `json:"previous,omitempty"`
	// memory says what of the captured memory the store had when it was stored.
	// +optional
	Memory *StoredShare `json:"memory,omitempty"`
	// files say it of everything else: changed files, volumes, the engine's other images.
	// +optional
	Files *StoredShare `json:"files,omitempty"`
}

// PreviousCheckpoint names a checkpoint in a store.
//
// +k8s:openapi-gen=true
type PreviousCheckpoint struct {
	// checkpointID names it in the store.
	// +kubebuilder:validation:Pattern=`^[0-9a-f]{64}$`
	CheckpointID string `json:"checkpointID"`
	// name of its PodCheckpoint. Empty if it is of another cluster, or was deleted
	// meanwhile.
	// +kubebuilder:validation:MaxLength=253
	// +optional
	Name string `json:"name,omitempty"`
	// podName is the Pod's that was captured.
	// +kubebuilder:validation:MaxLength=253
	// +optional
	PodName string `json:"podName,omitempty"`
}

// StoredShare says, in bytes before compression, what of some files a store had when
// their checkpoint was stored. What is left was written, once if it comes several times.
//
// +k8s:openapi-gen=true
type StoredShare struct {
	// bytes are all.
	Bytes int64 `json:"bytes"`
	// zeroBytes are zeros, which take nothing.
	ZeroBytes int64 `json:"zeroBytes"`
	// presentBytes were in the store, and were not written again.
	PresentBytes int64 `json:"presentBytes"`
	// previousBytes are those of presentBytes that the previous checkpoint consists of,
	// too: kept once for both.
	PreviousBytes int64 `json:"previousBytes"`
}
