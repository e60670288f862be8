package agent

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/archive"
	"podstasis.dev/stasis/internal/checkpoint"
)

// What an agent finds on its own disk may be of a disk that broke, or of another version.
func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"namespace":"ns","name":"cp","uid":"u","podName":"app","data":"ns_cp_u","storeName":"s","status":{"nodeName":"n","conditions":[{"type":"Ready","status":"True"}]}}`))
	f.Add([]byte(`{"packs":[{"id":"0000000000000000000000000000000000000000000000000000000000000001","size":7}],"root":"0000000000000000000000000000000000000000000000000000000000000002"}`))
	f.Add([]byte(`{"etag":"sha-256=:AA==:"}`))
	f.Add([]byte(`{"namespace":"ns","name":"cp","uid":"u","from":"node"}`))
	s, err := openStore(filepath.Join(f.TempDir(), "stasis"))
	if err != nil {
		f.Fatal(err)
	}
	const uid = "u"
	if err := os.MkdirAll(s.copiesRoot(), 0o700); err != nil {
		f.Fatal(err)
	}
	hooks, err := s.dueHooksPath(v1alpha1.AnnotationPostRestore, uid)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, file := range []string{s.recordPath(uid), s.storingPath(uid), s.digestsPath(uid), s.copyRecordPath(uid), hooks} {
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if r, err := s.readRecord(uid); err == nil && r.UID != uid {
			t.Errorf("the record of %q is taken for that of %q", r.UID, uid)
		}
		packs, root, err := (&storeJournal{store: s, uid: uid}).Read()
		if err != nil && (packs != nil || root != nil) {
			t.Errorf("packs %v and root %v, and %v", packs, root, err)
		}
		_, _ = s.readDigests(uid)
		_, _ = s.dueHooks(v1alpha1.AnnotationPostRestore)
		if copied, err := s.readCopyRecord(uid); err != nil || copied != nil && copied.UID != uid {
			t.Errorf("whose copy it is: %+v, %v", copied, err)
		}
	})
}

func FuzzPart(f *testing.F) {
	f.Add("bytes 0-9/10")
	f.Add("bytes */10")
	f.Add("bytes 9223372036854775806-9223372036854775807/9223372036854775807")
	f.Fuzz(func(t *testing.T, field string) {
		p, err := parsePart(field)
		if err != nil {
			var d *declined
			if !errors.As(err, &d) || d.code != http.StatusBadRequest {
				t.Errorf("refused as %v", err)
			}
			return
		}
		if question := p.first == -1 && p.last == -1; p.size < 0 || !question && (p.first < 0 || p.last < p.first || p.last >= p.size) {
			t.Errorf("%q is %+v", field, p)
		}
	})
}

// FuzzSourceObject reads the PodCheckpoint that comes in an archive.
func FuzzSourceObject(f *testing.F) {
	f.Add([]byte(`{"apiVersion":"checkpoint.podstasis.dev/v1alpha1","kind":"PodCheckpoint","spec":{"sourcePodName":"app"},"status":{"manifestDigest":"sha256:1","sourcePodUID":"u","checkpointedPodTemplate":{"spec":{"containers":[{"name":"a"}]}}}}`))
	f.Fuzz(func(t *testing.T, object []byte) {
		pcp := makePCP()
		m := &checkpoint.Manifest{Containers: []checkpoint.Container{{Name: "a"}}}
		from, err := sourceObject(pcp, &archive.Unpacked{Object: object, Manifest: m, ManifestDigest: "sha256:1"})
		if err == nil && (from.Status.ManifestDigest != "sha256:1" || from.Spec.SourcePodName != "app" || from.Status.SourcePodUID == nil || from.Status.CheckpointedPodTemplate == nil) {
			t.Errorf("%+v was let through", from)
		}
	})
}
