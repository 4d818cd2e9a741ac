// crypto.go: all cryptography of agentd, and nothing else (design.md §4).
//
// Why it is safe, in short. The secret passes scrypt once, so a weak secret
// is costly to guess. Every message has 32 fresh random bytes as salt; HKDF
// makes from them a key and a nonce of the message's own, so no pair of key
// and nonce is ever used twice and no counter must be kept. The labels keep
// requests, replies and beats apart. What travels in clear beside the
// ciphertext (cluster, sender) is additional data: changing it breaks the
// tag. A reply's additional data holds its request's salt and its own place
// in the stream, so it fits one request, and frames cannot be dropped or
// swapped. What GCM cannot see, that a whole request is sent again, the
// replay guard sees.
//
// Beats share a key for as long as their sender keeps its key salt, since to
// derive one for each would be most of their cost. Their nonces are 96 random
// bits, which bears 2^32 beats under one key (NIST SP 800-38D, 8.3): 34 years
// of the defaults in a cluster of three. The key is bound to the sender's name,
// not to the receiver: it is the acknowledgement inside, of a beat and a key
// salt that only the receiver used, that makes a beat count (design.md §8,
// Links), and that keeps replays and beats for others from counting.

package main

import (
	"bytes"
	"compress/flate"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"unicode/utf8"

	"golang.org/x/crypto/scrypt"
)

type (
	masterKey [keySize]byte
	salt      [saltSize]byte
)

// label separates the purposes of messages.
type label string

// envelope is a sealed message as it goes over the wire, decoded.
type envelope struct {
	cluster string
	node    string // who says that he sent it
	salt    salt
	data    []byte // ciphertext and tag
	request *salt  // in a reply: the salt of its request
	token   []byte // of the link; nil: none is shown. Anyone on the way can read and change it
}

// errShape is the only thing that is said of bytes that are no envelope:
// nobody is told, the caller counts.
var errShape = errors.New("not an envelope")

var base64url = base64.RawURLEncoding

// parseEnvelope reads a message up to, but without, its NUL. It decodes data
// in place, so raw must not be used afterwards; nothing else is copied, since
// whoever sent this is not known yet.
func parseEnvelope(raw []byte) (envelope, error) {
	var e envelope
	fields, err := stringFields(raw)
	if err != nil {
		return e, err
	}
	e.cluster, e.node = string(fields.clustername), string(fields.nodename)
	if !utf8.ValidString(e.cluster) || !utf8.ValidString(e.node) {
		return envelope{}, errShape
	}
	if e.cluster == "" || e.node == "" || len(e.cluster) > 255 || len(e.node) > 255 {
		return e, errShape
	}
	if err := decodeSalt(&e.salt, fields.salt); err != nil {
		return e, err
	}
	if fields.request != nil {
		e.request = new(salt)
		if err := decodeSalt(e.request, fields.request); err != nil {
			return e, err
		}
	}
	if token, err := decodeBytes(fields.token, fields.token); err == nil && len(token) == tokenSize {
		e.token = token // any other is none
	}
	if e.data, err = decodeBytes(fields.data, fields.data); err != nil || len(e.data) < tagSize+1 {
		return e, errShape
	}
	return e, nil
}

func decodeSalt(to *salt, text []byte) error {
	if len(bytes.TrimRight(text, "=")) != base64url.EncodedLen(saltSize) {
		return errShape
	}
	_, err := decodeBytes(to[:], text)
	return err
}

// decodeBytes reads base64url with or without padding. The decoder of the
// library would pass over line ends.
func decodeBytes(to, text []byte) ([]byte, error) {
	if bytes.ContainsAny(text, "\r\n") {
		return nil, errShape
	}
	n, err := base64url.Decode(to, bytes.TrimRight(text, "="))
	if err != nil {
		return nil, errShape
	}
	return to[:n], nil
}

// envelopeFields are the members of an envelope's object, as written.
type envelopeFields struct{ clustername, nodename, salt, data, request, token []byte }

func (f *envelopeFields) member(name string) *[]byte {
	switch name {
	case "clustername":
		return &f.clustername
	case "nodename":
		return &f.nodename
	case "salt":
		return &f.salt
	case "data":
		return &f.data
	case "request":
		return &f.request
	case "token":
		return &f.token
	}
	return nil
}

// stringFields reads a JSON object whose values are all strings, which is
// what an envelope is. encoding/json would allocate and copy up to 1 MiB for
// a sender who is not known yet, and take longer than dropping a message of
// one who is shut out may take; it still reads the strings that have escapes,
// and it is the oracle of this function's fuzz test. A member that stands
// twice is refused, so that no two readers can understand it differently.
func stringFields(raw []byte) (fields envelopeFields, err error) {
	rest, ok := afterByte(raw, '{')
	for more := true; ok && more; {
		var name, text []byte
		if name, rest, ok = jsonString(rest); !ok {
			break
		}
		if rest, ok = afterByte(rest, ':'); !ok {
			break
		}
		if text, rest, ok = jsonString(rest); !ok {
			break
		}
		if member := fields.member(string(name)); member != nil {
			if *member != nil {
				return fields, errShape
			}
			*member = text
		}
		var next []byte
		if next, more = afterByte(rest, ','); more {
			rest = next
		}
	}
	if ok {
		rest, ok = afterByte(rest, '}')
	}
	if !ok || len(bytes.TrimLeft(rest, jsonBlanks)) != 0 {
		return fields, errShape
	}
	return fields, nil
}

const jsonBlanks = " \t\r\n"

// afterByte skips blanks and the byte c; not ok if another byte stands there.
func afterByte(s []byte, c byte) (rest []byte, ok bool) {
	s = bytes.TrimLeft(s, jsonBlanks)
	if len(s) == 0 || s[0] != c {
		return s, false
	}
	return s[1:], true
}

// jsonString reads the string at the start of s; text is never nil when ok.
func jsonString(s []byte) (text, rest []byte, ok bool) {
	s = bytes.TrimLeft(s, jsonBlanks)
	if len(s) == 0 || s[0] != '"' {
		return nil, s, false
	}
	plain := true
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"' && plain:
			return s[1:i:i], s[i+1:], true
		case c == '"':
			var decoded string
			if json.Unmarshal(s[:i+1], &decoded) != nil {
				return nil, s, false
			}
			return append([]byte{}, decoded...), s[i+1:], true
		case c == '\\':
			plain = false
			i++
		case c < 0x20:
			return nil, s, false
		}
	}
	return nil, s, false
}

// messageContext is what a message's key and additional data are made of,
// beside its salt.
type messageContext struct {
	label   label
	cluster string
	node    string // the sender's
	request *salt  // a reply's request
	frame   uint64 // a reply's place in the stream, from 0
}

func (c messageContext) additionalData() []byte {
	var b bytes.Buffer
	b.WriteString(string(c.label))
	b.WriteByte(0)
	b.WriteString(c.cluster)
	b.WriteByte(0)
	b.WriteString(c.node)
	if c.request != nil {
		b.WriteByte(0)
		b.Write(c.request[:])
		b.Write(binary.BigEndian.AppendUint64(nil, c.frame))
	}
	return b.Bytes()
}

// messageKey derives the key and the nonce of one message.
func messageKey(master masterKey, s salt, l label) (key, nonce []byte) {
	derived := master.expand(s[:], l, keySize+nonceSize)
	return derived[:keySize], derived[keySize:]
}

func messageCipher(master masterKey, s salt, l label) (aead cipher.AEAD, nonce []byte) {
	key, nonce := messageKey(master, s, l)
	return newGCM(key), nonce
}

func newGCM(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // only for a key of another size
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err) // only for a block of another size
	}
	return aead
}

// seal makes the envelope of a message, with its NUL, and tells its salt.
func seal(master masterKey, c messageContext, message []byte) ([]byte, salt) {
	var s salt
	rand.Read(s[:]) // never fails: crypto/rand ends the process instead
	return sealWith(master, s, c, message), s
}

func sealWith(master masterKey, s salt, c messageContext, message []byte) []byte {
	aead, nonce := messageCipher(master, s, c.label)
	plain := pack(message)
	data := aead.Seal(plain[:0], nonce, plain, c.additionalData())

	out := make([]byte, 0, base64url.EncodedLen(len(data))+len(c.cluster)+len(c.node)+200)
	out = append(out, `{"clustername": `...)
	out = append(out, mustJSON(c.cluster)...)
	out = append(out, `, "nodename": `...)
	out = append(out, mustJSON(c.node)...)
	if c.request != nil {
		out = append(out, `, "request": "`...)
		out = base64url.AppendEncode(out, c.request[:])
		out = append(out, '"')
	}
	out = append(out, `, "salt": "`...)
	out = base64url.AppendEncode(out, s[:])
	out = append(out, `", "data": "`...)
	out = base64url.AppendEncode(out, data)
	return append(out, `"}`+"\x00"...)
}

// showToken adds the link's token to a sealed request.
func showToken(sealed, token []byte) []byte {
	out := append(sealed[:len(sealed)-len("}\x00")], `, "token": "`...)
	return append(base64url.AppendEncode(out, token), `"}`+"\x00"...)
}

// mustJSON marshals what always marshals: strings, and lists of them.
func mustJSON(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// errOpen is the only thing that is said of a message that does not open: why
// is nothing that a forger should learn.
var errOpen = errors.New("does not open with this secret")

// open decrypts e in place and returns the message, of at most limit bytes.
// The cluster and the node of c are those that e names.
func open(master masterKey, e envelope, c messageContext, limit int) ([]byte, error) {
	aead, nonce := messageCipher(master, e.salt, c.label)
	plain, err := aead.Open(e.data[:0], nonce, e.data, c.additionalData())
	if err != nil {
		return nil, errOpen
	}
	return unpack(plain, limit)
}

// openAny tries the keys in turn, since an old secret stays valid while a new
// one spreads, and tells which one opened the message.
func openAny(keys []masterKey, e envelope, c messageContext, limit int) ([]byte, masterKey, error) {
	for i, key := range keys {
		attempt := e
		if i < len(keys)-1 {
			attempt.data = bytes.Clone(e.data) // a failed Open clears its output
		}
		message, err := open(key, attempt, c, limit)
		if !errors.Is(err, errOpen) {
			return message, key, err
		}
	}
	return nil, masterKey{}, errOpen
}

// Both are costly to make (a deflater takes 600 kB) and made to be reused.
var (
	deflaters = sync.Pool{New: func() any {
		w, err := flate.NewWriter(nil, flate.BestSpeed)
		if err != nil {
			panic(err) // only for a level that does not exist
		}
		return w
	}}
	inflaters = sync.Pool{New: func() any { return flate.NewReader(nil) }}
)

// pack makes the plaintext of a message, with room for the tag.
func pack(message []byte) []byte {
	if len(message) > deflateFrom {
		var out bytes.Buffer
		out.WriteByte(storedDeflated)
		w := deflaters.Get().(*flate.Writer)
		defer deflaters.Put(w)
		w.Reset(&out)
		_, err := w.Write(message)
		if err = errors.Join(err, w.Close()); err != nil {
			panic(err) // a bytes.Buffer takes everything
		}
		return out.Bytes()
	}
	plain := make([]byte, 0, 1+len(message)+tagSize)
	return append(append(plain, storedPlain), message...)
}

// unpack is the opposite of pack. Its errors are of a message that opened:
// they may be told to its sender.
func unpack(plain []byte, limit int) ([]byte, error) {
	if len(plain) == 0 {
		return nil, errors.New("the message is empty")
	}
	stored, message := plain[0], plain[1:]
	switch stored {
	case storedPlain:
	case storedDeflated:
		r := inflaters.Get().(io.ReadCloser)
		defer inflaters.Put(r)
		if err := r.(flate.Resetter).Reset(bytes.NewReader(message), nil); err != nil {
			return nil, fmt.Errorf("cannot inflate the message: %w", err)
		}
		inflated, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
		if err != nil {
			return nil, fmt.Errorf("cannot inflate the message: %w", err)
		}
		message = inflated
	default:
		return nil, fmt.Errorf("the message begins with byte %d; 0 (JSON) and 1 (raw deflate of JSON) are known", stored)
	}
	if len(message) > limit {
		return nil, fmt.Errorf("the message is larger than %d bytes", limit)
	}
	return message, nil
}

// keyStore derives master keys, one at a time, and keeps them in a file, so
// that commands need not derive them anew.
type keyStore struct {
	path   string
	failed func(error) // hears of a file that cannot be written; nil in commands, which do not write it
	mu     sync.Mutex
}

// master returns the key for secret in cluster: from the file, or derived,
// which takes some 100 ms and 32 MiB for a moment.
func (s *keyStore) master(secret, cluster string) (masterKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := sha256.Sum256([]byte(cluster + "\x00" + secret))
	id := hex.EncodeToString(sum[:])
	known, err := s.read()
	if err == nil {
		for _, line := range known {
			if hexKey, found := strings.CutPrefix(line, id+" "); found {
				var key masterKey
				if n, err := hex.Decode(key[:], []byte(hexKey)); err == nil && n == keySize {
					return key, nil
				}
			}
		}
	}
	derived, err := deriveMaster(secret, cluster)
	if err != nil || s.failed == nil {
		return derived, err
	}
	known = append(known, id+" "+hex.EncodeToString(derived[:]))
	known = known[max(0, len(known)-keysKept):]
	if err := writeFile(s.path, []byte(strings.Join(known, "\n")+"\n"), 0o600); err != nil {
		s.failed(err)
	}
	return derived, nil
}

// read returns the lines of the file. One that is damaged is one that is
// missing: what it held is derived again.
func (s *keyStore) read() ([]string, error) {
	data, _, err := readRegular(s.path, 64<<10)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var lines []string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		if len(line) == 2*sha256.Size+1+2*keySize {
			lines = append(lines, line)
		}
	}
	return lines, nil
}

// deriveMaster is scrypt (RFC 7914) with the parameters of design.md §4.
func deriveMaster(secret, cluster string) (masterKey, error) {
	derived, err := scrypt.Key([]byte(secret), []byte("agentd/1 "+cluster), 1<<15, 8, 1, keySize)
	debug.FreeOSMemory() // scrypt's 32 MiB would stay in the idle daemon's account
	if err != nil {
		return masterKey{}, fmt.Errorf("cannot derive the key of the secret: %w", err)
	}
	return masterKey(derived), nil
}

// keyring holds the keys of one state of the configuration: cluster.secret's
// first, then previous_secret's. Derivation runs in the background; who needs
// a key waits on ready.
type keyring struct {
	cluster string
	secrets []string
	ready   chan struct{} // closed when keys and err are set
	keys    []masterKey
	ids     []keyID // of keys
	err     error
	join    func() (masterKey, error) // derived on first use
}

// newKeyring returns at once; the caller runs derive.
func newKeyring(store *keyStore, cluster string, secrets []string) *keyring {
	return &keyring{
		cluster: cluster, secrets: secrets, ready: make(chan struct{}),
		// Only under cluster.secret: a joiner must know the present one.
		join: sync.OnceValues(func() (masterKey, error) { return store.master(secrets[0], joinCluster) }),
	}
}

func (r *keyring) derive(store *keyStore) {
	defer close(r.ready)
	for _, secret := range r.secrets {
		key, err := store.master(secret, r.cluster)
		if err != nil {
			r.err = err
			return
		}
		r.keys = append(r.keys, key)
		r.ids = append(r.ids, key.id())
	}
}

// keyID names a master key without telling it.
type keyID = [keyIDSize]byte

func (k masterKey) id() keyID { return keyID(k.expand(nil, labelKeyID, keyIDSize)) }

func (k masterKey) expand(salt []byte, info label, size int) []byte {
	derived, err := hkdf.Key(sha256.New, k[:], salt, string(info), size)
	if err != nil {
		panic(err) // only for a length that HKDF cannot give
	}
	return derived
}

// beatCiphers keeps the ciphers that are in use, so that a beat, also one that
// does not open, costs no derivation. Only who knows the secret can add to it,
// or replays old beats, which push out others: these are derived again.
type beatCiphers struct {
	mu    sync.Mutex
	known map[beatHeader]cipher.AEAD
	order []beatHeader // the oldest first
}

func (c *beatCiphers) find(h beatHeader) cipher.AEAD {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known[h]
}

func (c *beatCiphers) keep(h beatHeader, aead cipher.AEAD) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known == nil {
		c.known = map[beatHeader]cipher.AEAD{}
	}
	if c.known[h] != nil {
		return
	}
	if len(c.order) >= beatCiphersKept {
		delete(c.known, c.order[0])
		c.order = c.order[1:]
	}
	c.known[h] = aead
	c.order = append(c.order, h)
}

// beatCipher derives the cipher of the beats of node under a key salt.
func beatCipher(master masterKey, salt uint64, node string) cipher.AEAD {
	return newGCM(master.expand(binary.BigEndian.AppendUint64(nil, salt), labelBeat+"\x00"+label(node), keySize))
}

// seal makes a beat of this node, whose header h is.
func (c *beatCiphers) seal(master masterKey, h beatHeader, node string, plain []byte) []byte {
	var nonce [nonceSize]byte
	rand.Read(nonce[:]) // never fails: crypto/rand ends the process instead
	return c.sealWith(master, h, nonce, node, plain)
}

func (c *beatCiphers) sealWith(master masterKey, h beatHeader, nonce [nonceSize]byte, node string, plain []byte) []byte {
	aead := c.find(h)
	if aead == nil {
		aead = beatCipher(master, h.salt, node)
		c.keep(h, aead)
	}
	out := h.append(make([]byte, 0, beatClear+len(plain)+tagSize))
	out = append(out, nonce[:]...)
	return aead.Seal(out, nonce[:], plain, out)
}

// open decrypts a beat in place: raw, whose header h is, of the member node.
func (c *beatCiphers) open(master masterKey, h beatHeader, node string, raw []byte) ([]byte, error) {
	aead := c.find(h)
	fresh := aead == nil
	if fresh {
		aead = beatCipher(master, h.salt, node)
	}
	clear, sealed := raw[:beatClear], raw[beatClear:]
	plain, err := aead.Open(sealed[:0], clear[beatClear-nonceSize:], sealed, clear)
	if err != nil {
		return nil, errOpen
	}
	if fresh {
		c.keep(h, aead)
	}
	return plain, nil
}
