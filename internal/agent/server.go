package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"sigs.k8s.io/controller-runtime/pkg/manager"

	api "podstasis.dev/stasis/api/subresources/v1alpha1"
	"podstasis.dev/stasis/internal/agentapi"
	"podstasis.dev/stasis/internal/checkpoint"
	"podstasis.dev/stasis/internal/contents"
)

const (
	// headerPatience bounds what a client sends before it is known.
	headerPatience = 10 * time.Second
	// stallPatience is how long a client may take nothing, or send nothing, before its
	// connection ends. However slow it is otherwise, it holds a buffer and one open file.
	stallPatience = 2 * time.Minute
	// listenRetry is how soon the server is tried again: nothing else depends on it.
	listenRetry = 10 * time.Second
	// maxStreams is how many archives go out or come in at one time.
	maxStreams = 32
)

// server answers the API server of Stasis: checkpoints go out, their contents are
// told, archives come in. Other agents fetch checkpoints from it.
type server struct {
	address  string // to listen on
	auth     *authenticator
	holdings *holdings
	digests  *digests
	contents contentsReader
	uploads  *uploads
	pods     *podPreflight
	peers    *peerDoor
	announce func(ctx context.Context, port int, certificate string) error
	streams  chan struct{}
	looks    chan struct{} // one for each look into a checkpoint
	identity *atomic.Pointer[tls.Certificate]
	log      *slog.Logger
}

// APIOptions say where the agent is called by the API server of Stasis.
type APIOptions struct {
	Listen    string // address; empty: nowhere
	Host      string // the IP address that others reach
	Namespace string // that Stasis is installed in
	Holder    string // the agent's Pod
}

// callerAccount is the ServiceAccount of the API server of Stasis (config/rbac).
const callerAccount = "stasis-controller"

// serving is what serves archives, if anybody can find it.
func (k *kubernetes) serving(d *daemon) []manager.Runnable {
	if d.API.Listen == "" || d.API.Host == "" || d.API.Namespace == "" {
		d.Log.Warn("this agent serves no archives: its address or namespace is not known", "listen", d.API.Listen, "advertise", d.API.Host, "namespace", d.API.Namespace)
		return nil
	}
	m := k.manager
	a := &announcer{
		client: m.GetClient(), live: m.GetAPIReader(), namespace: d.API.Namespace, node: d.NodeName,
		host: d.API.Host, holder: d.API.Holder, platform: &d.platform, now: time.Now, log: d.Log,
	}
	s := &server{
		address: d.API.Listen, announce: a.run, uploads: k.reconciler.uploads,
		auth: &authenticator{
			user: "system:serviceaccount:" + d.API.Namespace + ":" + callerAccount, audience: agentapi.Audience(d.NodeName),
			review: reviewBy(m.GetClient()), reviews: make(chan struct{}, maxReviews), now: time.Now, log: d.Log,
		},
		holdings: &holdings{store: d.store, objects: m.GetClient(), readers: newReaders()},
		contents: func(ctx context.Context, dir fs.FS, m *checkpoint.Manifest) (*api.CheckpointContents, error) {
			return contents.Read(ctx, dir, m, contents.Options{})
		},
		pods: &podPreflight{
			nodeName: d.NodeName, live: m.GetAPIReader(), runtime: d.runtime, examiner: d.cri, root: d.store.checkpointRoot(), apiServer: kubernetesService(),
		},
		peers:    &peerDoor{locator: k.locator, live: m.GetAPIReader(), needed: d.store.markNeeded, now: time.Now},
		identity: &k.identity,
		streams:  make(chan struct{}, maxStreams), looks: make(chan struct{}, maxLooks), log: d.Log,
	}
	d.store.leaving = s.holdings.readers.turnOut
	s.digests = newDigests(d.store, s.holdings, d.Log)
	return []manager.Runnable{s}
}

// Start serves until ctx ends. It implements manager.Runnable.
func (s *server) Start(ctx context.Context) error {
	defer s.digests.end()
	for {
		if err := s.serve(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("archives cannot be served, trying again", "address", s.address, "error", err, "in", listenRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(listenRetry):
		}
	}
}

func (s *server) serve(ctx context.Context) error {
	certificate, err := newCertificate(time.Now())
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", s.address)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerPatience,
		IdleTimeout:       stallPatience,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug), // of clients' handshakes
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { h.Close() })
	defer stop()
	s.identity.Store(&certificate)
	port := listener.Addr().(*net.TCPAddr).Port
	go func() {
		if err := s.announce(ctx, port, agentapi.Fingerprint(certificate.Certificate[0])); err != nil && ctx.Err() == nil {
			s.log.Error("the agent cannot be announced", "error", err)
		}
	}()
	s.log.Info("archives are served", "address", listener.Addr().String())
	err = h.Serve(tls.NewListener(listener, &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{certificate},
		// Other agents show theirs; which one counts is said in their Leases (peerDoor).
		ClientAuth: tls.RequestClientCert,
	}))
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+agentapi.ArchivePath, s.limited(s.streams, s.archive)) // and HEAD
	mux.HandleFunc("GET "+agentapi.ContentsPath, s.limited(s.looks, s.look))
	mux.HandleFunc("POST "+agentapi.PreflightPath, s.limited(s.looks, s.preflight))
	mux.HandleFunc("PUT "+agentapi.ImportPath, s.limited(s.streams, s.bringIn))
	all := http.NewServeMux()
	all.Handle("/", s.auth.only(mux))
	all.HandleFunc("GET "+agentapi.FilePath, s.limited(s.streams, s.file)) // by peerDoor
	return all
}

// declined is an answer that is none of what was asked for.
type declined struct {
	code    int
	message string
	after   time.Duration // when to ask again, if that may help
}

func (r *declined) Error() string { return r.message }

func decline(code int, format string, args ...any) error {
	return &declined{code: code, message: fmt.Sprintf(format, args...)}
}

// limited lets a number of calls in at a time, and writes their errors.
func (s *server) limited(room chan struct{}, handle func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		select {
		case room <- struct{}{}:
			defer func() { <-room }()
		default:
			answerError(w, &declined{http.StatusServiceUnavailable, "this agent has as many such calls as it takes; try again", time.Second})
			return
		}
		err := handle(w, r)
		if err == nil || r.Context().Err() != nil {
			return
		}
		var no *declined
		if !errors.As(err, &no) {
			s.log.Error("a call failed", "method", r.Method, "path", r.URL.Path, "error", err)
		}
		answerError(w, err)
	}
}

func answerError(w http.ResponseWriter, err error) {
	no := &declined{code: http.StatusInternalServerError, message: err.Error()}
	errors.As(err, &no)
	for _, name := range []string{"Etag", "Last-Modified", "Repr-Digest", "Content-Length"} {
		w.Header().Del(name)
	}
	if no.after > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int(no.after/time.Second)))
	}
	http.Error(w, cut(no.message, maxMessageBytes), no.code)
}

// newCertificate makes a certificate that nobody knows before it is announced. Who
// calls takes that very one: names and dates in it say nothing.
func newCertificate(now time.Time) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a key: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a serial number: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: componentName},
		NotBefore:    now.Add(-24 * time.Hour), NotAfter: now.AddDate(10, 0, 0),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make a certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
