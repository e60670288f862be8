package agentapi

import (
	"bytes"
	"context"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// How long a call may take until its answer begins. A client waits for no node that
// is cut off (A3): to find the agent and to connect takes patience at most. A
// digest and the contents of a checkpoint are computed when they are asked for.
const (
	patience        = 4500 * time.Millisecond
	answerDigest    = 25 * time.Second
	answerContents  = 25 * time.Second
	answerPreflight = 25 * time.Second
	answerImport    = 50 * time.Second // it comes after the part has been sent
)

// maxMessage bounds what is kept of an agent's refusal.
const maxMessage = 1 << 10

// locator finds the agent of a node.
type locator interface {
	Locate(ctx context.Context, node string, needs int) (Announcement, error)
}

// tokens makes what is shown to an agent.
type tokens interface {
	Token(ctx context.Context, audience string) (string, error)
}

// Client calls agents. Every call has a connection of its own: it holds for one
// announcement, and a checkpoint is fetched rarely and long.
type Client struct {
	Locator locator
	Tokens  tokens
}

// Refusal is an agent's answer that it does not do what it was asked for.
type Refusal struct {
	Node    string
	Status  int // of HTTP
	Message string
	Header  http.Header
}

func (r *Refusal) Error() string {
	return fmt.Sprintf("the stasis-agent of node %q answers: %s", r.Node, r.Message)
}

// Archive asks for a checkpoint's archive, or for one container's. Of the header
// given, what is for the agent is passed on. The caller closes the answer's body;
// its status is 200, 206, 304, 412 or 416.
func (c *Client) Archive(ctx context.Context, method, node, uid, container string, header http.Header) (*http.Response, error) {
	path := fill(ArchivePath, uid)
	if container != "" {
		path += "?" + url.Values{QueryContainer: {container}}.Encode()
	}
	limit := patience
	if header.Get("Want-Repr-Digest") != "" {
		limit = answerDigest
	}
	return c.call(ctx, call{method: method, node: node, path: path, limit: limit,
		header: only(header, "Range", "If-Range", "If-Match", "If-None-Match", "Want-Repr-Digest")})
}

// Contents asks what is inside a checkpoint. The caller closes the answer's body.
func (c *Client) Contents(ctx context.Context, node, uid string) (*http.Response, error) {
	return c.call(ctx, call{method: http.MethodGet, node: node, path: fill(ContentsPath, uid), limit: answerContents})
}

// Preflight asks what a checkpoint would meet. The caller closes the answer's body.
func (c *Client) Preflight(ctx context.Context, node string, podCheckpoint []byte) (*http.Response, error) {
	return c.call(ctx, call{method: http.MethodPost, node: node, path: PreflightPath, limit: answerPreflight,
		header: http.Header{"Content-Type": {"application/json"}}, body: bytes.NewReader(podCheckpoint), size: int64(len(podCheckpoint))})
}

// Import sends a part of an archive, or asks how much is there. The caller closes
// the answer's body.
func (c *Client) Import(ctx context.Context, node, uid string, header http.Header, part io.Reader, size int64) (*http.Response, error) {
	return c.call(ctx, call{method: http.MethodPut, node: node, path: fill(ImportPath, uid), limit: answerImport,
		header: only(header, "Content-Range", "Content-Type", "Repr-Digest"), body: part, size: size})
}

// call is a request to an agent.
type call struct {
	method, node, path string
	header             http.Header
	body               io.Reader
	size               int64
	limit              time.Duration // until the answer begins
}

func (c *Client) call(ctx context.Context, r call) (*http.Response, error) {
	// The context lives as long as the answer is read; the limit only until it begins.
	ctx, cancel := context.WithCancelCause(ctx)
	answer, err := c.begin(ctx, cancel, r)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	answer.Body = &body{ReadCloser: answer.Body, done: func() { cancel(nil) }}
	switch answer.StatusCode {
	case http.StatusOK, http.StatusPartialContent, http.StatusNotModified, http.StatusAccepted, http.StatusNoContent,
		http.StatusPreconditionFailed, http.StatusRequestedRangeNotSatisfiable:
		return answer, nil
	}
	defer answer.Body.Close()
	said, _ := io.ReadAll(io.LimitReader(answer.Body, maxMessage))
	message := strings.TrimSpace(strings.ToValidUTF8(string(said), "?"))
	if message == "" {
		message = http.StatusText(answer.StatusCode)
	}
	return nil, &Refusal{Node: r.node, Status: answer.StatusCode, Message: message, Header: answer.Header}
}

// errSlow ends a call whose answer does not begin in time.
var errSlow = errors.New("no answer in time")

func (c *Client) begin(ctx context.Context, cancel context.CancelCauseFunc, r call) (*http.Response, error) {
	connecting := time.AfterFunc(patience, func() { cancel(errSlow) })
	defer connecting.Stop()
	agent, err := c.Locator.Locate(ctx, r.node, VersionCalls)
	if err != nil {
		return nil, late(ctx, r.node, err)
	}
	token, err := c.Tokens.Token(ctx, Audience(r.node))
	if err != nil {
		return nil, late(ctx, r.node, fmt.Errorf("get a token for the agent of node %q: %w", r.node, err))
	}
	request, err := http.NewRequestWithContext(ctx, r.method, "https://"+agent.Address+r.path, r.body)
	if err != nil {
		return nil, fmt.Errorf("ask the agent of node %q: %w", r.node, err)
	}
	request.Header = r.header.Clone()
	if request.Header == nil {
		request.Header = http.Header{}
	}
	request.Header.Set("Authorization", "Bearer "+token)
	if r.body != nil {
		request.ContentLength = r.size
	}
	answering := time.AfterFunc(r.limit, func() { cancel(errSlow) })
	defer answering.Stop()
	answer, err := transport(agent, func() { connecting.Stop() }).RoundTrip(request)
	if err != nil {
		return nil, late(ctx, r.node, &Unreachable{Node: r.node, Reason: NoAnswer,
			Message: fmt.Sprintf("the stasis-agent of node %q does not answer at %s, though it was heard of lately: see whether the network lets the API layer of Stasis reach that node's Pods", r.node, agent.Address), Err: err})
	}
	return answer, nil
}

// late tells an error that our own limit made from others.
func late(ctx context.Context, node string, err error) error {
	if !errors.Is(context.Cause(ctx), errSlow) {
		return err
	}
	var unreachable *Unreachable
	if errors.As(err, &unreachable) {
		unreachable.Err = errSlow
		return unreachable
	}
	return &Unreachable{Node: node, Reason: NoAnswer, Message: fmt.Sprintf("the stasis-agent of node %q could not be asked", node), Err: errSlow}
}

// transport connects to one agent and takes only the certificate that it
// announced. connected is called once that is done.
func transport(agent Announcement, connected func(), own ...tls.Certificate) *http.Transport {
	dialer := net.Dialer{Timeout: 3 * time.Second}
	config := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: own,
		// Not the chain and the name count but the one certificate, below.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			got := Fingerprint(state.PeerCertificates[0].Raw)
			if subtle.ConstantTimeCompare([]byte(got), []byte(agent.Certificate)) != 1 {
				return fmt.Errorf("it shows the certificate %s and announced %s", got, agent.Certificate)
			}
			return nil
		},
	}
	return &http.Transport{
		DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			secured := tls.Client(conn, config)
			if err := secured.HandshakeContext(ctx); err != nil {
				conn.Close()
				return nil, err
			}
			connected()
			return secured, nil
		},
		DisableKeepAlives:      true,
		DisableCompression:     true, // ranges are of the archive as it is
		MaxResponseHeaderBytes: 64 << 10,
		ReadBufferSize:         32 << 10,
		WriteBufferSize:        32 << 10,
	}
}

// body ends its call when it is closed.
type body struct {
	io.ReadCloser
	done func()
}

func (b *body) Close() error {
	defer b.done()
	return b.ReadCloser.Close()
}

func fill(path, uid string) string {
	return strings.Replace(path, "{uid}", url.PathEscape(uid), 1)
}

// only picks fields of a header.
func only(header http.Header, names ...string) http.Header {
	picked := http.Header{}
	for _, name := range names {
		if values := header.Values(name); len(values) > 0 {
			picked[http.CanonicalHeaderKey(name)] = values
		}
	}
	return picked
}
