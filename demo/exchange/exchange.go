// Package exchange is what the demo's two programs say to each other.
//
// Program a asks "M count token chain" and program b answers "R count token
// answer chain", both over UDP on the Pod's loopback. a begins an exchange only
// when the one before is answered, so their counts never differ by more than one.
// token and answer are drawn from the kernel for each exchange, and chain is a
// digest of all of them: two programs that are not of the same moment do not agree
// on it, even when their counts happen to fit. A lost datagram is sent again as it
// was.
//
// a also writes count, token and chain to a ledger, a file of fixed records that
// goes round, before it asks; b reads on in that file and must find the same.
package exchange

import (
	"encoding/binary"
	"fmt"
)

// Query is a datagram that asks either program for its status line.
const Query = "?"

// Disagree is the datagram by which one program tells the other that they are
// not of the same moment. Both exit, and both start anew.
const Disagree = "D"

// LedgerRecords is how many records the ledger holds before it goes round.
const LedgerRecords = 4096

// RecordSize is the size of a record of the ledger in bytes.
const RecordSize = 24

// Extend is the chain after an exchange of count with these tokens.
func Extend(chain, count, token, answer uint64) uint64 {
	for _, x := range [...]uint64{count, token, answer} {
		chain = (chain ^ x) * 0x9e3779b97f4a7c15
		chain ^= chain >> 29
	}
	return chain
}

// Message is what a sends.
type Message struct{ Count, Token, Chain uint64 }

func (m Message) String() string { return fmt.Sprintf("M %d %016x %016x", m.Count, m.Token, m.Chain) }

// Record is the message as the ledger holds it, in little-endian order.
func (m Message) Record() []byte {
	record := make([]byte, 0, RecordSize)
	for _, x := range [...]uint64{m.Count, m.Token, m.Chain} {
		record = binary.LittleEndian.AppendUint64(record, x)
	}
	return record
}

// Offset is where the record of count is in the ledger.
func Offset(count uint64) int64 { return int64((count - 1) % LedgerRecords * RecordSize) }

// Reply is what b sends. Chain is the chain after the exchange.
type Reply struct{ Count, Token, Answer, Chain uint64 }

// ParseReply reads a reply.
func ParseReply(text string) (Reply, error) {
	var r Reply
	if _, err := fmt.Sscanf(text, "R %d %x %x %x", &r.Count, &r.Token, &r.Answer, &r.Chain); err != nil {
		return Reply{}, fmt.Errorf("%q is not a reply: %w", text, err)
	}
	return r, nil
}
