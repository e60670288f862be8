package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/api/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/checkpoint"
)

const callerUser = "system:serviceaccount:stasis-system:stasis-controller"

// served is an agent that serves, over TLS, with fakes of the API server.
type served struct {
	*harness
	server   *server
	url      string
	lease    coordinationv1.Lease
	http     *http.Client
	reviews  atomic.Int32
	reviewed authenticationv1.TokenReviewStatus
	refusal  error // of a review
}

func newServed(t *testing.T) *served {
	t.Helper()
	s := &served{harness: newHarness(t)}
	s.reviewed = authenticationv1.TokenReviewStatus{
		Authenticated: true, User: authenticationv1.UserInfo{Username: callerUser}, Audiences: []string{agentapi.Audience(testNode)},
	}
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	h := &holdings{store: s.store, objects: s.client, readers: newReaders()}
	s.store.leaving = h.readers.turnOut
	announce := &announcer{client: s.client, live: s.client, namespace: "stasis-system", node: testNode, host: "127.0.0.1", holder: "agent-1", now: time.Now, log: log}
	s.server = &server{
		address: "127.0.0.1:0", announce: announce.run, holdings: h, digests: newDigests(s.store, h, log), uploads: s.reconciler.uploads,
		contents: func(ctx context.Context, dir fs.FS, m *checkpoint.Manifest) (*api.CheckpointContents, error) {
			return &api.CheckpointContents{Containers: []api.ContainerContents{{Name: m.Containers[0].Name}}}, nil
		},
		auth: &authenticator{user: callerUser, audience: agentapi.Audience(testNode), reviews: make(chan struct{}, maxReviews), now: time.Now, log: log,
			review: func(context.Context, string, string) (authenticationv1.TokenReviewStatus, error) {
				s.reviews.Add(1)
				return s.reviewed, s.refusal
			}},
		streams: make(chan struct{}, maxStreams), looks: make(chan struct{}, maxLooks), log: log, identity: new(atomic.Pointer[tls.Certificate]),
		peers: &peerDoor{locator: &agentapi.Locator{Reader: s.client, Namespace: "stasis-system", Clock: clock.RealClock{}, Blind: true}, live: s.client, needed: s.store.markNeeded, now: time.Now},
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- s.server.Start(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	s.await("the agent announces itself", func() bool {
		return s.client.Get(ctx, types.NamespacedName{Namespace: "stasis-system", Name: agentapi.LeaseName(testNode)}, &s.lease) == nil
	})
	said, err := agentapi.Read(&s.lease)
	if err != nil {
		t.Fatal(err)
	}
	s.url = "https://" + said.Address
	s.http = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if agentapi.Fingerprint(state.PeerCertificates[0].Raw) != said.Certificate {
				return errors.New("another certificate than it announced")
			}
			return nil
		},
	}}}
	return s
}

func (s *served) await(what string, ok func() bool) {
	s.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			s.Fatalf("waited in vain until %s", what)
		}
	}
}

// hold makes a Ready checkpoint with a memory image of a size.
func (s *served) hold(size int64) *v1alpha1.PodCheckpoint {
	s.Helper()
	name := dataName("ns", "cp", pcpUID)
	dir := s.store.dataPath(name)
	images := filepath.Join(dir, "containers/a/criu")
	if err := os.MkdirAll(images, 0o700); err != nil {
		s.Fatal(err)
	}
	for file, size := range map[string]int64{images + "/pages-1.img": size, filepath.Join(dir, "containers/a/rootfs.tar"): 1024, filepath.Join(dir, "containers/a/config.json"): 10} {
		if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, size)); err != nil {
			s.Fatal(err)
		}
	}
	digest, err := checkpoint.Seal(s.Context(), dir, &checkpoint.Manifest{
		Engine:     checkpoint.Program{Name: "criu", Version: "4.2"},
		Containers: []checkpoint.Container{{Name: "a", Rootfs: "containers/a/rootfs.tar"}},
	})
	if err != nil {
		s.Fatal(err)
	}
	pcp := makePCP(withReason(v1alpha1.ReasonCheckpointCompleted))
	pcp.Status.ManifestDigest = digest
	if err := s.client.Create(s.Context(), pcp); err != nil {
		s.Fatal(err)
	}
	return pcp
}

func (s *served) do(method, path, body string, header ...string) (*http.Response, []byte) {
	s.Helper()
	r, err := http.NewRequestWithContext(s.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer token")
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	answer, err := s.http.Do(r)
	if err != nil {
		s.Fatalf("%s %s: %v", method, path, err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		s.Fatalf("%s %s: %v", method, path, err)
	}
	return answer, data
}

const archivePath = "/v1/checkpoints/" + string(pcpUID) + "/archive"

func TestOnlyWhoShowsTheRightTokenForThisAgentIsLetIn(t *testing.T) {
	for name, c := range map[string]struct {
		header string
		review func(s *served)
		want   int
	}{
		"no token":                {"", func(*served) {}, 401},
		"a password":              {"Basic dDp0", func(*served) {}, 401},
		"another ServiceAccount":  {"Bearer t", func(s *served) { s.reviewed.User.Username = "system:serviceaccount:stasis-system:stasis-agent" }, 401},
		"the same of elsewhere":   {"Bearer t", func(s *served) { s.reviewed.User.Username = "system:serviceaccount:other:stasis-controller" }, 401},
		"for another agent":       {"Bearer t", func(s *served) { s.reviewed.Audiences = []string{agentapi.Audience("node-2")} }, 401},
		"for the API server":      {"Bearer t", func(s *served) { s.reviewed.Audiences = nil }, 401},
		"not authenticated":       {"Bearer t", func(s *served) { s.reviewed.Authenticated = false }, 401},
		"a token too long":        {"Bearer " + strings.Repeat("x", 20_000), func(*served) {}, 401},
		"a review that fails":     {"Bearer t", func(s *served) { s.refusal = errors.New("away") }, 503},
		"the right one":           {"Bearer t", func(*served) {}, 404},
		"the right one, no space": {"Bearert", func(*served) {}, 401},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServed(t)
			c.review(s)
			if answer, said := s.do("GET", archivePath, "", "Authorization", c.header); answer.StatusCode != c.want {
				t.Errorf("the answer is %s: %s", answer.Status, said)
			}
		})
	}
}

func TestATokenIsReviewedAgainAfterAMinute(t *testing.T) {
	s := newServed(t)
	now := time.Now()
	s.server.auth.now = func() time.Time { return now }
	for range 3 {
		s.do("GET", archivePath, "")
	}
	if n := s.reviews.Load(); n != 1 {
		t.Errorf("three calls took %d reviews", n)
	}
	now = now.Add(acceptedFor)
	s.reviewed.Authenticated = false // the token has been taken back
	if answer, _ := s.do("GET", archivePath, ""); answer.StatusCode != 401 {
		t.Errorf("after a minute the answer is %s", answer.Status)
	}
}

func TestAnArchiveIsServedByRangesWithItsTag(t *testing.T) {
	s := newServed(t)
	s.hold(100_000)
	head, _ := s.do("HEAD", archivePath, "")
	answer, whole := s.do("GET", archivePath, "")
	tag := answer.Header.Get("ETag")
	if answer.StatusCode != 200 || head.StatusCode != 200 || head.ContentLength != int64(len(whole)) || tag == "" || head.Header.Get("ETag") != tag {
		t.Fatalf("GET %s of %d bytes, tag %s; HEAD %s of %d, tag %s", answer.Status, len(whole), tag, head.Status, head.ContentLength, head.Header.Get("ETag"))
	}
	if answer.Header.Get("Accept-Ranges") != "bytes" || answer.Header.Get("Content-Type") != "application/x-tar" {
		t.Errorf("the header is %v", answer.Header)
	}
	part, data := s.do("GET", archivePath, "", "Range", "bytes=5000-6999", "If-Range", tag)
	if part.StatusCode != 206 || !bytes.Equal(data, whole[5000:7000]) {
		t.Errorf("a range: %s, %d bytes", part.Status, len(data))
	}
	if other, data := s.do("GET", archivePath, "", "Range", "bytes=5000-6999", "If-Range", `"other"`); other.StatusCode != 200 || len(data) != len(whole) {
		t.Errorf("a range of what is not there any more: %s, %d bytes", other.Status, len(data))
	}
	if beyond, _ := s.do("GET", archivePath, "", "Range", fmt.Sprintf("bytes=%d-", len(whole))); beyond.StatusCode != 416 {
		t.Errorf("a range beyond the end: %s", beyond.Status)
	}
	if one, data := s.do("GET", archivePath+"?container=a", ""); one.StatusCode != 200 || !bytes.HasPrefix(data, []byte("config.dump\x00")) || one.Header.Get("ETag") == tag {
		t.Errorf("one container's: %s, it begins with %q", one.Status, data[:min(20, len(data))])
	}
	if none, said := s.do("GET", archivePath+"?container=z", ""); none.StatusCode != 404 || !strings.Contains(string(said), `"z"`) || none.Header.Get("ETag") != "" {
		t.Errorf("a container that is not there: %s: %s", none.Status, said)
	}
}

func TestCheckpointsThatCannotBeBroughtOutAreRefusedWithTheReason(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(s *served, pcp *v1alpha1.PodCheckpoint)
		code  int
		says  string
	}{
		"altered": {func(s *served, pcp *v1alpha1.PodCheckpoint) {
			os.WriteFile(s.store.dataPath(dataName("ns", "cp", pcpUID))+"/manifest.json", []byte("{}"), 0o600)
		}, 409, "altered"},
		"manifest gone": {func(s *served, pcp *v1alpha1.PodCheckpoint) {
			os.Remove(s.store.dataPath(dataName("ns", "cp", pcpUID)) + "/manifest.json")
		}, 410, "not on this node"},
		"object gone": {func(s *served, pcp *v1alpha1.PodCheckpoint) {
			pcp.Finalizers = nil
			s.client.Update(s.Context(), pcp)
			s.client.Delete(s.Context(), pcp)
		}, 404, "does not exist"},
		"not Ready": {func(s *served, pcp *v1alpha1.PodCheckpoint) {
			pcp.Status.Conditions[0].Status = metav1.ConditionFalse
			s.client.Status().Update(s.Context(), pcp)
		}, 409, "not Ready"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newServed(t)
			c.spoil(s, s.hold(100))
			if answer, said := s.do("GET", archivePath, ""); answer.StatusCode != c.code || !strings.Contains(string(said), c.says) {
				t.Errorf("the answer is %s: %s", answer.Status, said)
			}
		})
	}
	s := newServed(t)
	for _, uid := range []string{"..%2f..", "nosuch", "a_b"} {
		if answer, _ := s.do("GET", "/v1/checkpoints/"+uid+"/archive", ""); answer.StatusCode != 404 {
			t.Errorf("of %s: %s", uid, answer.Status)
		}
	}
}

func TestTheDigestOfAnArchiveIsComputedOnceAndKept(t *testing.T) {
	s := newServed(t)
	s.hold(3 << 20)
	if answer, _ := s.do("HEAD", archivePath, ""); answer.Header.Get("Repr-Digest") != "" {
		t.Error("a digest was given to one who did not want it")
	}
	answer, whole := s.do("GET", archivePath, "", "Want-Repr-Digest", "sha-512=3, sha-256=10")
	sum := sha256.Sum256(whole)
	want := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
	if got := answer.Header.Get("Repr-Digest"); got != want {
		t.Errorf("the digest is %s, want %s", got, want)
	}
	s.server.digests.rate = 1 // a byte a second: it must not be computed again
	if answer, _ := s.do("HEAD", archivePath, "", "Want-Repr-Digest", "sha-256=1"); answer.Header.Get("Repr-Digest") != want {
		t.Errorf("asked again, the digest is %s", answer.Header.Get("Repr-Digest"))
	}
	s.server.digests.patience = 50 * time.Millisecond
	if answer, _ := s.do("HEAD", archivePath+"?container=a", "", "Want-Repr-Digest", "sha-256=1"); answer.StatusCode != 200 || answer.Header.Get("Repr-Digest") != "" {
		t.Errorf("a digest that takes long: %s %s", answer.Status, answer.Header.Get("Repr-Digest"))
	}
	if err := s.store.removeData(pcpUID); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.store.digestsPath("gone"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.store.removeLeftovers(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(filepath.Join(s.store.dir, digestsDir)); len(left) != 0 {
		t.Errorf("the checkpoint is removed, and of its digests there is %v", left)
	}
}

func TestTheRemovalOfACheckpointWaitsForNobodyWhoReadsIt(t *testing.T) {
	s := newServed(t)
	s.hold(256 << 20) // more than all buffers on the way
	conn, err := tls.Dial("tcp", strings.TrimPrefix(s.url, "https://"), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.NetConn().(*net.TCPConn).SetReadBuffer(16 << 10)
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: agent\r\nAuthorization: Bearer token\r\n\r\n", archivePath)
	if _, err := io.CopyN(io.Discard, conn, 200_000); err != nil { // and then it reads no more
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	began := time.Now()
	if err := s.store.removeData(pcpUID); err != nil {
		t.Fatal(err)
	}
	// Who reads no more would hold it up for as long as a connection may be idle.
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("the removal took %s", took)
	}
	s.await("the reader's call has ended", func() bool { return len(s.server.streams) == 0 })
	conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, _ := io.Copy(io.Discard, conn); n > 200<<20 {
		t.Errorf("the reader got %d bytes more of what is removed", n)
	}
}

func TestTheContentsOfACheckpointAreTold(t *testing.T) {
	s := newServed(t)
	s.hold(100)
	answer, data := s.do("GET", "/v1/checkpoints/"+string(pcpUID)+"/contents", "")
	var c api.CheckpointContents
	if err := json.Unmarshal(data, &c); err != nil || answer.StatusCode != 200 || c.Name != "cp" || c.UID != pcpUID || len(c.Containers) != 1 {
		t.Errorf("%s: %s, %v", answer.Status, data, err)
	}
}

func TestAnAgentAnnouncesItselfAnewWithEachStart(t *testing.T) {
	s := newServed(t)
	said, err := agentapi.Read(&s.lease)
	if err != nil {
		t.Fatal(err)
	}
	if said.Node != testNode || said.Protocol != agentapi.Version || said.Holder != "agent-1" || !said.Alive(time.Now()) {
		t.Errorf("it says %+v", said)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	again := *s.server
	again.digests = newDigests(s.store, s.server.holdings, s.server.log)
	go func() { done <- again.Start(ctx) }()
	defer func() { stop(); <-done }()
	s.await("the other start is announced", func() bool {
		var lease coordinationv1.Lease
		err := s.client.Get(t.Context(), types.NamespacedName{Namespace: "stasis-system", Name: agentapi.LeaseName(testNode)}, &lease)
		now, readErr := agentapi.Read(&lease)
		return err == nil && readErr == nil && now.Address != said.Address && now.Certificate != said.Certificate
	})
}

func TestMoreCallsThanThereIsRoomForAreToldToTryAgain(t *testing.T) {
	s := newServed(t)
	s.hold(100)
	s.server.streams <- struct{}{}
	for len(s.server.streams) < cap(s.server.streams) {
		s.server.streams <- struct{}{}
	}
	if answer, _ := s.do("GET", archivePath, ""); answer.StatusCode != 503 || answer.Header.Get("Retry-After") == "" {
		t.Errorf("the answer is %s, %v", answer.Status, answer.Header)
	}
	for len(s.server.streams) > 0 {
		<-s.server.streams
	}
}
