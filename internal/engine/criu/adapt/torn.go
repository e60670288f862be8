package adapt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	tcp_stream "github.com/checkpoint-restore/go-criu/v8/crit/images/tcp-stream"

	"podstasis.dev/stasis/internal/contents/images"
	"podstasis.dev/stasis/internal/engine/criu"
)

// CheckConnections compares the two ends of every connection within a Pod that has
// just been captured (criu.ErrTorn). Processes stood still, but the kernel did not: what was in a
// send queue may have been delivered after the one end had been captured and before
// the other was. Restored so, bytes would be missing, and the connection would hang.
//
// imageDirs are the directories of images, by container.
func CheckConnections(ctx context.Context, imageDirs map[string]string) error {
	p := Pod{ImageDirs: imageDirs}
	c, err := p.connections(ctx)
	if err != nil {
		return err
	}
	for _, s := range c.sockets {
		peer, inside := c.peer(s)
		if !s.connected() || !inside {
			continue
		}
		from, err := p.stream(ctx, s)
		if err != nil {
			return err
		}
		to, err := p.stream(ctx, peer)
		if err != nil {
			return err
		}
		if from == nil || to == nil {
			continue
		}
		// Sequence numbers wrap: what has been received lies between what has been
		// acknowledged and what has been sent.
		end := endOf(s.state)
		unacknowledged := from.GetOutqSeq() - from.GetOutqLen() - end
		if ahead := to.GetInqSeq() - unacknowledged; ahead > from.GetOutqLen()-from.GetUnsqLen()+end {
			return fmt.Errorf("%w: %s (container %s) → %s (container %s)", criu.ErrTorn, s.src, s.container, s.dst, peer.container)
		}
	}
	return nil
}

// endOf is 1 where the end of a stream has been sent and not acknowledged: it takes a
// sequence number, and CRIU does not count it into the length of the send queue.
func endOf(state uint32) uint32 {
	switch state {
	case stateFinWait1, stateLastAck, stateClosing:
		return 1
	}
	return 0
}

// stream reads what CRIU kept of a connection; nil if that is nothing, as of one that
// is being opened.
func (p Pod) stream(ctx context.Context, s socket) (*tcp_stream.TcpStreamEntry, error) {
	src, root, err := source(p.ImageDirs[s.container])
	if err != nil {
		return nil, err
	}
	defer root.Close()
	name := fmt.Sprintf("tcp-stream-%x.img", s.ino)
	var found *tcp_stream.TcpStreamEntry
	err = src.First(ctx, name, images.TCPStream, func(entry []byte) error {
		found = new(tcp_stream.TcpStreamEntry)
		return images.Decode(entry, found)
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return found, err
}
