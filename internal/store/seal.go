package store

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"sync"
)

// keySize is of every key, in bytes: AES-256, and HMAC-SHA-256 with as much.
const keySize = 32

const saltSize = 32

// keys are what a store's data key is expanded to (HKDF, RFC 5869). Of a store that is
// not encrypted they are nil.
type keys struct {
	data  []byte // the data key
	macs  sync.Pool
	store string // the store's identity, which binds what is sealed to it
}

func newKeys(data []byte, store string) *keys {
	k := &keys{data: data, store: store}
	mac := k.expand(nil, "block ids")
	k.macs.New = func() any { return hmac.New(sha256.New, mac) }
	return k
}

func (k *keys) expand(salt []byte, use string) []byte {
	key, err := hkdf.Key(sha256.New, k.data, salt, "stasis store v1 "+use+" "+k.store, keySize)
	if err != nil {
		panic(err) // only for lengths that are not there
	}
	return key
}

// id names a block: its digest, keyed where the store is encrypted, so that nobody
// without the key can tell whether a known block is in it.
func (k *keys) id(block []byte) ID {
	if k == nil {
		return sha256.Sum256(block)
	}
	mac := k.macs.Get().(hash.Hash)
	mac.Reset()
	mac.Write(block)
	var id ID
	mac.Sum(id[:0])
	k.macs.Put(mac)
	return id
}

// sealer encrypts the parts of one object, each with a number of its own as nonce and a
// key that comes of the object's salt: no nonce is used twice under a key.
type sealer struct{ aead cipher.AEAD }

func (k *keys) sealer(salt []byte, use string) *sealer {
	if k == nil {
		return nil
	}
	return &sealer{gcm(k.expand(salt, use))}
}

func gcm(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // only for lengths that are not there
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

func nonce(part uint64) []byte {
	var n [12]byte
	binary.BigEndian.PutUint64(n[4:], part)
	return n[:]
}

// seal appends a part to out. A nil sealer encrypts nothing.
func (s *sealer) seal(out []byte, part uint64, data []byte) []byte {
	if s == nil {
		return append(out, data...)
	}
	return s.aead.Seal(out, nonce(part), data, nil)
}

func (s *sealer) open(part uint64, data []byte) ([]byte, error) {
	if s == nil {
		return data, nil
	}
	return s.aead.Open(nil, nonce(part), data, nil)
}

// Small objects, such as roots and leases, are sealed whole: a head, a salt and the data
// with their tag, or the data's digest in the place of both.
var (
	headPlain  = []byte("STASOBJ1")
	headSealed = []byte("STASENC1")
)

func randomSalt() []byte {
	salt := make([]byte, saltSize)
	rand.Read(salt) // never fails
	return salt
}

// sealObject makes an object of data; its name's prefix is what it is for.
func (k *keys) sealObject(prefix string, data []byte) []byte {
	if k == nil {
		sum := sha256.Sum256(append([]byte(prefix), data...))
		return append(append(append([]byte{}, headPlain...), sum[:]...), data...)
	}
	salt := randomSalt()
	out := append(append([]byte{}, headSealed...), salt...)
	return k.sealer(salt, prefix).seal(out, 0, data)
}

func (k *keys) openObject(prefix, name string, object []byte) ([]byte, error) {
	head, size := headPlain, len(headPlain)+saltSize
	if k != nil {
		head = headSealed
	}
	if len(object) < size || !bytes.Equal(object[:len(head)], head) {
		return nil, corrupt(name, "it does not begin as such an object does")
	}
	salt, data := object[len(head):size], object[size:]
	if k == nil {
		if sum := sha256.Sum256(append([]byte(prefix), data...)); !bytes.Equal(sum[:], salt) {
			return nil, corrupt(name, "its digest is another")
		}
		return data, nil
	}
	data, err := k.sealer(salt, prefix).open(0, data)
	if err != nil {
		return nil, corrupt(name, "it was not sealed with this store's key, or was changed")
	}
	return data, nil
}
