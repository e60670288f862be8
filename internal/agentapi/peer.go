package agentapi

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// answerFile is how long a peer may take until its answer begins: it asks the API
// server who calls and what for.
const answerFile = 15 * time.Second

// Peers calls the agents of other nodes, as the agent of a node.
type Peers struct {
	Locator locator
	// Node is the caller's.
	Node string
	// Certificate is the one that the caller announces; nil as long as there is none.
	Certificate func() *tls.Certificate
}

// Peer is the agent of another node. It keeps its connection, and is good as long as
// calls succeed.
type Peer struct {
	node, caller string
	agent        Announcement
	transport    *http.Transport
}

// errNotAnnounced says that nobody could know the caller.
var errNotAnnounced = errors.New("this agent has not announced itself yet")

// Find looks the agent of a node up. It does not call it.
func (p *Peers) Find(ctx context.Context, node string) (*Peer, error) {
	own := p.Certificate()
	if own == nil {
		return nil, &Unreachable{Node: node, Reason: NoAnswer, Message: fmt.Sprintf("the stasis-agent of node %q cannot be asked", node), Err: errNotAnnounced}
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	agent, err := p.Locator.Locate(ctx, node, VersionPeers)
	if err != nil {
		return nil, err
	}
	t := transport(agent, func() {}, *own)
	t.DisableKeepAlives = false
	t.MaxConnsPerHost = 1
	t.ResponseHeaderTimeout = answerFile
	return &Peer{node: node, caller: p.Node, agent: agent, transport: t}, nil
}

// Close ends the connection.
func (p *Peer) Close() { p.transport.CloseIdleConnections() }

// Wanted says which file of which checkpoint is asked for, and for which Pod.
type Wanted struct {
	UID         string // of the PodCheckpoint
	Pod, PodUID string
	File        string // slash-separated, as the manifest lists it
	Offset      int64
	Length      int64 // from Offset; negative: to its end
}

// File asks for a part of a file. The caller closes it. An error is a *Refusal or an
// *Unreachable. The body may break off: that is an error of its reads.
func (p *Peer) File(ctx context.Context, w Wanted) (io.ReadCloser, error) {
	path := strings.Replace(fill(FilePath, w.UID), "{path...}", (&url.URL{Path: w.File}).EscapedPath(), 1)
	query := url.Values{QueryNode: {p.caller}, QueryPod: {w.Pod}, QueryPodUID: {w.PodUID}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+p.agent.Address+path+"?"+query.Encode(), nil)
	if err != nil {
		return nil, fmt.Errorf("ask the agent of node %q: %w", p.node, err)
	}
	want := http.StatusOK
	if w.Length >= 0 {
		request.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", w.Offset, w.Offset+w.Length-1))
		want = http.StatusPartialContent
	}
	answer, err := p.transport.RoundTrip(request)
	if err != nil {
		return nil, &Unreachable{Node: p.node, Reason: NoAnswer,
			Message: fmt.Sprintf("the stasis-agent of node %q does not answer at %s: see whether the network lets the nodes' stasis-agents reach each other", p.node, p.agent.Address), Err: err}
	}
	if answer.StatusCode == want {
		return answer.Body, nil
	}
	defer answer.Body.Close()
	said, _ := io.ReadAll(io.LimitReader(answer.Body, maxMessage))
	message := strings.TrimSpace(strings.ToValidUTF8(string(said), "?"))
	if message == "" || answer.StatusCode < 400 {
		message = answer.Status
	}
	return nil, &Refusal{Node: p.node, Status: answer.StatusCode, Message: message, Header: answer.Header}
}
