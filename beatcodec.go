// beatcodec.go: the form of beats on the wire (WIRE.md, Beats), big-endian. It
// seals nothing: what it reads was opened before, so a member wrote it, maybe
// one of another version. What it does not know, it skips; what is malformed
// it refuses as a whole.

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"time"
)

// beatHeader is what stands in clear before a beat, but for the nonce.
type beatHeader struct {
	key    keyID
	sender senderID
	salt   uint64
}

// parseBeatHeader reads the clear part of raw, if raw can be a beat.
func parseBeatHeader(raw []byte) (h beatHeader, ok bool) {
	if len(raw) < beatLeast || len(raw) > beatLimit || raw[0] != beatVersion {
		return h, false
	}
	rest := raw[1:]
	rest = rest[copy(h.key[:], rest):]
	rest = rest[copy(h.sender[:], rest):]
	h.salt = binary.BigEndian.Uint64(rest)
	return h, true
}

func (h beatHeader) append(out []byte) []byte {
	out = append(append(append(out, beatVersion), h.key[:]...), h.sender[:]...)
	return binary.BigEndian.AppendUint64(out, h.salt)
}

// senderID names a member in the clear part of its beats.
type senderID [senderIDSize]byte

func senderIDOf(cluster, node string) senderID {
	sum := sha256.Sum256([]byte(cluster + "\x00" + node))
	return senderID(sum[:])
}

// errBeat is said of plaintext that is no beat.
var errBeat = errors.New("the beat is malformed")

// plaintext is what is sealed of b. What does not fit a datagram is left out:
// changes of data first, which peers fetch instead; then claims and the vote,
// all of it, since a vote that leaves out a refusal grants what was refused.
func (b beat) plaintext() ([]byte, error) {
	if err := b.check(); err != nil {
		return nil, err
	}
	const room = beatLimit - beatClear - tagSize
	plain := b.append(nil)
	if len(plain) > room {
		b.data.changes = nil
		plain = b.append(nil)
	}
	if len(plain) > room {
		b.changes, b.refused, b.granted = nil, nil, 0
		plain = b.append(nil)
	}
	if len(plain) > room {
		return nil, fmt.Errorf("cannot send a beat of %d bytes: a datagram takes %d", len(plain), room)
	}
	return plain, nil
}

// check finds what has no form on the wire.
func (b *beat) check() error {
	if ms := b.term.Milliseconds(); ms < 0 || ms > math.MaxUint32 || b.term%time.Millisecond != 0 {
		return fmt.Errorf("cannot state a term of %s: it has whole ms, up to 49 days", b.term)
	}
	if n := len(b.data.token); n != 0 && n != tokenSize {
		return fmt.Errorf("cannot send a token of %d bytes", n)
	}
	var names []string
	if b.changes != nil {
		for _, e := range b.changes.entries {
			names = append(names, e.service)
		}
	}
	for _, held := range b.data.held {
		names = append(names, held.node)
	}
	for _, name := range names {
		if name == "" || len(name) > math.MaxUint8 {
			return fmt.Errorf("cannot send the name %q in a beat", name)
		}
	}
	return nil
}

// append writes b. Lengths that are too large for their fields come out wrong,
// in what is too large to be sent.
func (b *beat) append(out []byte) []byte {
	out = append64(out, b.seq, b.data.version, b.data.digest)
	out = append32(out, b.list, b.claims)
	out = append64(out, b.ackSeq)
	out = append32(out, b.ackSalt, b.granted, uint32(b.term.Milliseconds()))
	heard := (bits.Len64(b.heard) + 7) / 8
	out = append(out, byte(heard)) // the flags: the others are 0
	for i := range heard {
		out = append(out, byte(b.heard>>(8*i)))
	}
	out = appendRecord(out, recordEpoch, append64(nil, b.epoch))
	if b.changes != nil {
		value := append32(nil, b.changes.base)
		for _, e := range b.changes.entries {
			value = append32(appendName(value, e.service), e.number)
		}
		out = appendRecord(out, recordClaims, value)
	}
	if len(b.refused) > 0 {
		out = appendRecord(out, recordRefused, append32(nil, b.refused...))
	}
	return b.data.append(out)
}

func (d *beatData) append(out []byte) []byte {
	var value []byte
	for _, held := range d.held {
		value = append64(appendName(value, held.node), held.epoch, held.seq)
	}
	if len(value) > 0 {
		out = appendRecord(out, recordHeld, value)
	}
	if d.changes != nil {
		value := append64(nil, d.changes.base, d.changes.seq)
		for _, e := range d.changes.entries {
			value = binary.BigEndian.AppendUint16(value, uint16(len(e.key)))
			value = append(value, e.key...)
			value = binary.BigEndian.AppendUint16(value, uint16(len(e.value)))
			value = append(value, e.value...)
		}
		out = appendRecord(out, recordChanges, value)
	}
	if len(d.token) > 0 {
		out = appendRecord(out, recordToken, d.token)
	}
	if len(d.keys) > 0 {
		var value []byte
		for _, id := range d.keys {
			value = append(value, id[:]...)
		}
		out = appendRecord(out, recordKeys, value)
	}
	return out
}

func append64(out []byte, numbers ...uint64) []byte {
	for _, n := range numbers {
		out = binary.BigEndian.AppendUint64(out, n)
	}
	return out
}

func append32(out []byte, numbers ...uint32) []byte {
	for _, n := range numbers {
		out = binary.BigEndian.AppendUint32(out, n)
	}
	return out
}

func appendName(out []byte, name string) []byte { return append(append(out, byte(len(name))), name...) }

func appendRecord(out []byte, kind byte, value []byte) []byte {
	out = binary.BigEndian.AppendUint16(append(out, kind), uint16(len(value)))
	return append(out, value...)
}

// beatReader reads what plaintext wrote. After the first read beyond the end,
// all it gives is zero, and bad is set.
type beatReader struct {
	rest []byte
	bad  bool
}

func (r *beatReader) take(n int) []byte {
	if n > len(r.rest) {
		r.rest, r.bad = nil, true
		return nil
	}
	taken := r.rest[:n]
	r.rest = r.rest[n:]
	return taken
}

func (r *beatReader) number(size int) (n uint64) {
	for _, b := range r.take(size) {
		n = n<<8 | uint64(b)
	}
	return n
}

func (r *beatReader) u64() uint64 { return r.number(8) }
func (r *beatReader) u32() uint32 { return uint32(r.number(4)) }
func (r *beatReader) more() bool  { return !r.bad && len(r.rest) > 0 }

func (r *beatReader) name() string {
	name := r.take(int(r.number(1)))
	r.bad = r.bad || len(name) == 0
	return string(name)
}

// parseBeat reads what was sealed of a beat. Nothing in the result is part of
// plain.
func parseBeat(plain []byte) (beat, error) {
	r := beatReader{rest: plain}
	b := beat{seq: r.u64(), data: beatData{version: r.u64(), digest: r.u64()}, list: r.u32(), claims: r.u32()}
	b.ackSeq, b.ackSalt, b.granted = r.u64(), r.u32(), r.u32()
	b.term = time.Duration(r.u32()) * time.Millisecond
	heard := int(r.number(1) & 0x0f)
	if heard > 8 {
		return beat{}, errBeat
	}
	for i, bits := range r.take(heard) {
		b.heard |= uint64(bits) << (8 * i)
	}
	var seen [256]bool
	for r.more() {
		kind := byte(r.number(1))
		value := beatReader{rest: r.take(int(r.number(2)))}
		if known := b.parseRecord(kind, &value); known && (seen[kind] || value.bad || len(value.rest) > 0) {
			return beat{}, errBeat
		}
		seen[kind] = true
	}
	if r.bad || !seen[recordEpoch] {
		return beat{}, errBeat
	}
	return b, nil
}

// parseRecord reads the value of a record of a known kind.
func (b *beat) parseRecord(kind byte, r *beatReader) (known bool) {
	switch kind {
	case recordEpoch:
		b.epoch = r.u64()
	case recordClaims:
		b.changes = &claimChanges{base: r.u32()}
		for r.more() {
			b.changes.entries = append(b.changes.entries, claimEntry{r.name(), r.u32()})
		}
	case recordRefused:
		for r.more() {
			b.refused = append(b.refused, r.u32())
		}
	case recordHeld:
		for r.more() {
			b.data.held = append(b.data.held, dataVersion{r.name(), r.u64(), r.u64()})
		}
	case recordChanges:
		b.data.changes = &dataChanges{base: r.u64(), seq: r.u64()}
		for r.more() {
			e := dataEntry{key: string(r.take(int(r.number(2))))}
			if n := int(r.number(2)); n > 0 {
				e.value = bytes.Clone(r.take(n))
			}
			b.data.changes.entries = append(b.data.changes.entries, e)
		}
	case recordToken:
		b.data.token = bytes.Clone(r.take(tokenSize))
	case recordKeys:
		for r.more() {
			var id keyID
			copy(id[:], r.take(keyIDSize))
			b.data.keys = append(b.data.keys, id)
		}
	default:
		return false
	}
	return true
}
