package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"
)

// fullBeat has every record.
func fullBeat() beat {
	return beat{
		seq: 7, epoch: 1600000000123, list: 3, term: 6300 * time.Millisecond, heard: 0b101, ackSeq: 6, ackSalt: 0xa1b2c3d4,
		claims: 9, changes: &claimChanges{5, []claimEntry{{"db", 9}, {"web", 0}}}, granted: 8, refused: []uint32{4, 8},
		data: beatData{
			version: 42, digest: 0x1122334455667788, held: []dataVersion{{"node2", 1600000000456, 17}},
			changes: &dataChanges{40, 42, []dataEntry{{"i/web/avail", []byte(`"up"`)}, {"load", nil}}},
			token:   []byte(" !\"#$%&'()*+,-./"), keys: []keyID{{0x6a, 0x16, 0xf8, 0x09}},
		},
	}
}

// The example of test/beat.json, which another implementation made, opens and
// says what it shall; sealed again, it is the same but for the unknown record.
func TestBeatVector(t *testing.T) {
	t.Parallel()
	var v struct {
		Cluster, Secret, Nodename, Plaintext, Beat, Nonce string
		KeyID                                             string `json:"key_id"`
		Sender                                            string
	}
	must(t, json.Unmarshal([]byte(readText(t, "test/beat.json")), &v))
	unhex := func(s string) []byte {
		b, err := hex.DecodeString(s)
		must(t, err)
		return b
	}
	master := derivedMaster(t, v.Secret, v.Cluster)
	id, sender := master.id(), senderIDOf(v.Cluster, v.Nodename)
	if hex.EncodeToString(id[:]) != v.KeyID || hex.EncodeToString(sender[:]) != v.Sender {
		t.Errorf("key id, sender = %x, %x; want %s, %s", id, sender, v.KeyID, v.Sender)
	}
	raw := unhex(v.Beat)
	header, ok := parseBeatHeader(raw)
	if want := (beatHeader{id, sender, 0x0102030405060708}); !ok || header != want {
		t.Fatalf("header = %+v, %v; want %+v", header, ok, want)
	}
	again := new(beatCiphers).sealWith(master, header, [nonceSize]byte(unhex(v.Nonce)), v.Nodename, unhex(v.Plaintext))
	if !bytes.Equal(again, raw) {
		t.Errorf("sealed again, it is %x\nwant %x", again, raw)
	}
	plain, err := new(beatCiphers).open(master, header, v.Nodename, raw)
	if err != nil || hex.EncodeToString(plain) != v.Plaintext {
		t.Fatalf("open = %x, %v", plain, err)
	}
	b, err := parseBeat(plain)
	if want := fullBeat(); err != nil || !reflect.DeepEqual(b, want) {
		t.Errorf("it says %+v, %v\nwant %+v", b, err, want)
	}
	if got, err := b.plaintext(); err != nil || !bytes.HasPrefix(plain, got) || len(plain)-len(got) != 3+len("unknown") {
		t.Errorf("written again, it is %x, %v", got, err)
	}
	if text := readText(t, "WIRE.md"); !strings.Contains(text, v.Beat[:2*beatClear]) {
		t.Error("WIRE.md shows another example")
	}
}

func TestBeatRoundTrip(t *testing.T) {
	t.Parallel()
	tests := map[string]beat{
		"empty":            {},
		"full":             fullBeat(),
		"largest":          {seq: math.MaxUint64, epoch: math.MaxUint64, list: math.MaxUint32, term: math.MaxUint32 * time.Millisecond, heard: math.MaxUint64, ackSeq: math.MaxUint64, ackSalt: math.MaxUint32, claims: math.MaxUint32, granted: math.MaxUint32},
		"the 64th member":  {heard: 1 << 63},
		"the 8th and 9th":  {heard: 0x180},
		"no claim left":    {changes: &claimChanges{base: 5}},
		"no data left":     {data: beatData{changes: &dataChanges{base: 1, seq: 2}}},
		"a long name":      {changes: &claimChanges{0, []claimEntry{{strings.Repeat("s", 255), 1}}}},
		"claims, no vote":  {changes: &claimChanges{1, []claimEntry{{"a", 2}}}},
		"a vote, no claim": {granted: 5},
	}
	for name, want := range tests {
		plain, err := want.plaintext()
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := parseBeat(plain)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v\nwant %+v", name, got, err, want)
		}
	}
}

func TestBeatHasNoForm(t *testing.T) {
	t.Parallel()
	for want, b := range map[string]beat{
		"cannot state a term of 1193h2m47.296s": {term: (math.MaxUint32 + 1) * time.Millisecond},
		"cannot state a term of 1.5ms":          {term: 1500 * time.Microsecond},
		"cannot state a term of -1ms":           {term: -time.Millisecond},
		`cannot send the name ""`:               {changes: &claimChanges{0, []claimEntry{{"", 1}}}},
		`cannot send the name "xxx`:             {data: beatData{held: []dataVersion{{strings.Repeat("x", 256), 1, 1}}}},
		"cannot send a token of 3 bytes":        {data: beatData{token: []byte("abc")}},
	} {
		if _, err := b.plaintext(); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %s…", err, want)
		}
	}
}

// What does not fit: the changes of data go first, then claims and the whole
// vote. A vote without all its refusals would grant what was refused.
func TestBeatTooLarge(t *testing.T) {
	t.Parallel()
	claims := &claimChanges{1, nil}
	for i := range 1000 {
		claims.entries = append(claims.entries, claimEntry{fmt.Sprintf("service-%04d", i), uint32(i)})
	}
	data := &dataChanges{1, 2, []dataEntry{{"k", bytes.Repeat([]byte("1"), 40<<10)}}}
	huge := &dataChanges{1, 2, []dataEntry{{"k", bytes.Repeat([]byte("1"), 80<<10)}}}
	refused := make([]uint32, 9000)
	many := make([]uint32, 13000)
	tests := []struct {
		name                string
		b                   beat
		claims, vote, datas bool // what is still there
	}{
		{"all fits", beat{changes: claims, granted: 5, refused: refused[:10]}, true, true, false},
		{"data", beat{changes: claims, granted: 5, refused: refused[:10], data: beatData{changes: data}}, true, true, false},
		{"data alone fit", beat{granted: 5, data: beatData{changes: data}}, false, true, true},
		{"data beyond a record", beat{granted: 5, data: beatData{changes: huge}}, false, true, false},
		{"refusals", beat{granted: 5, refused: many}, false, false, false},
		{"refusals and claims", beat{changes: claims, granted: 5, refused: refused, data: beatData{changes: data}}, false, false, false},
	}
	for _, test := range tests {
		test.b.seq, test.b.epoch, test.b.data.token = 9, 10, make([]byte, tokenSize)
		plain, err := test.b.plaintext()
		if err != nil || beatClear+len(plain)+tagSize > beatLimit {
			t.Errorf("%s: %d bytes, %v", test.name, len(plain), err)
			continue
		}
		got, err := parseBeat(plain)
		if err != nil || got.seq != 9 || got.data.token == nil {
			t.Errorf("%s: %+v, %v", test.name, got, err)
		}
		if (got.changes != nil) != test.claims || (got.granted == 5) != test.vote || (got.data.changes != nil) != test.datas {
			t.Errorf("%s: changes %v, granted %d, data %v", test.name, got.changes != nil, got.granted, got.data.changes != nil)
		}
		if got.granted > 0 && len(got.refused) != len(test.b.refused) {
			t.Errorf("%s: granted without %d refusals", test.name, len(test.b.refused)-len(got.refused))
		}
	}
	var held []dataVersion
	for range 1000 {
		held = append(held, dataVersion{strings.Repeat("n", 60), 1, 1})
	}
	b := beat{data: beatData{held: held}}
	if _, err := b.plaintext(); err == nil || !strings.Contains(err.Error(), "a datagram takes 49103") {
		t.Errorf("what cannot be cut is %v", err)
	}
}

func TestMalformedBeats(t *testing.T) {
	t.Parallel()
	b := fullBeat()
	good := b.append(nil)
	fixed := good[:beatFixed+1]
	epoch := appendRecord(nil, recordEpoch, make([]byte, 8))
	with := func(records ...[]byte) []byte { return append(bytes.Clone(fixed), bytes.Join(records, nil)...) }
	record := func(kind byte, value ...byte) []byte { return appendRecord(nil, kind, value) }
	nine := with(epoch)
	nine[beatFixed-1] = 9
	tests := map[string][]byte{
		"nothing":                    nil,
		"no epoch":                   fixed,
		"epoch of 7 bytes":           with(record(recordEpoch, make([]byte, 7)...)),
		"epoch of 9 bytes":           with(record(recordEpoch, make([]byte, 9)...)),
		"epoch twice":                with(epoch, epoch),
		"nine bytes heard":           nine,
		"a record's head is cut":     with(epoch, []byte{200, 0}),
		"an unknown record is cut":   with(epoch, []byte{200, 0, 2, 1}),
		"claims without a base":      with(epoch, record(recordClaims, 0, 0, 1)),
		"a claim without a name":     with(epoch, record(recordClaims, 0, 0, 0, 1, 0, 0, 0, 0, 1)),
		"a claim is cut":             with(epoch, record(recordClaims, 0, 0, 0, 1, 1, 'a', 0, 0, 0)),
		"a name beyond its record":   with(epoch, record(recordClaims, 0, 0, 0, 1, 200, 'a', 0, 0, 0)),
		"a refusal is cut":           with(epoch, record(recordRefused, 0, 0, 0)),
		"a version is cut":           with(epoch, record(recordHeld, 1, 'n', 0)),
		"changes without a sequence": with(epoch, record(recordChanges, make([]byte, 15)...)),
		"a value is cut":             with(epoch, record(recordChanges, append(make([]byte, 16), 0, 1, 'k', 0, 3, '1')...)),
		"a token of 15 bytes":        with(epoch, record(recordToken, make([]byte, 15)...)),
		"a token of 17 bytes":        with(epoch, record(recordToken, make([]byte, 17)...)),
		"a key id is cut":            with(epoch, record(recordKeys, 1, 2, 3)),
	}
	for name, plain := range tests {
		if got, err := parseBeat(plain); err == nil {
			t.Errorf("%s: read as %+v", name, got)
		}
	}
	for n := range good {
		b, err := parseBeat(good[:n])
		if err == nil && n < beatFixed+1+len(epoch) {
			t.Errorf("cut after %d bytes, it is read as %+v", n, b)
		}
	}
	if _, err := parseBeat(with(record(99), epoch, record(99, 1, 2))); err != nil {
		t.Errorf("unknown records, also twice, are skipped: %v", err)
	}
	flags := with(epoch)
	flags[beatFixed-1] |= 0xf0
	if got, err := parseBeat(flags); err != nil || got.heard != b.heard {
		t.Errorf("unknown flags are ignored: %+v, %v", got, err)
	}
}

// Nothing in a beat that was read is part of the buffer that it was read from.
func TestBeatOwnsItsData(t *testing.T) {
	t.Parallel()
	want := fullBeat()
	plain := want.append(nil)
	got, err := parseBeat(plain)
	must(t, err)
	clear(plain)
	if !reflect.DeepEqual(got, want) {
		t.Errorf("it is now %+v", got)
	}
}

func TestBeatCiphersAreBounded(t *testing.T) {
	t.Parallel()
	key, sender, receiver := testKey(1), new(beatCiphers), new(beatCiphers)
	plain, err := beat{}.plaintext()
	must(t, err)
	for i := range 3 * beatCiphersKept {
		h := beatHeader{key.id(), senderID{1}, uint64(i)}
		raw := sender.seal(key, h, "n1", plain)
		if _, err := receiver.open(key, h, "n1", raw); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []*beatCiphers{sender, receiver} {
		if len(c.known) != beatCiphersKept || len(c.order) != beatCiphersKept {
			t.Errorf("%d ciphers, %d in order; %d may be kept", len(c.known), len(c.order), beatCiphersKept)
		}
	}
	// What was pushed out is derived again.
	h := beatHeader{key.id(), senderID{1}, 0}
	if _, err := receiver.open(key, h, "n1", sender.seal(key, h, "n1", plain)); err != nil {
		t.Error(err)
	}
}

func FuzzBeat(f *testing.F) {
	b := fullBeat()
	full := b.append(nil)
	f.Add(full)
	f.Add(new(beat).append(nil))
	f.Add(append(bytes.Clone(full), 200, 0, 1, 0))
	key := testKey(1)
	h := beatHeader{key.id(), senderIDOf("default", "n1"), 1}
	f.Add(new(beatCiphers).seal(key, h, "n1", full))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if header, ok := parseBeatHeader(raw); ok {
			if _, err := new(beatCiphers).open(key, header, "n1", bytes.Clone(raw)); err == nil && header != h {
				t.Errorf("opened under the header %+v", header)
			}
		}
		b, err := parseBeat(raw)
		if err != nil {
			return
		}
		plain, err := b.plaintext()
		if err != nil {
			return // too large, or a name of 0 bytes in what came
		}
		again, err := parseBeat(plain)
		if err != nil {
			t.Fatalf("%+v is written as what is not read: %v", b, err)
		}
		if len(plain) <= len(raw) && len(raw) < beatLimit-beatClear-tagSize && !reflect.DeepEqual(b, again) {
			t.Errorf("%+v comes back as %+v", b, again)
		}
		if again.granted > 0 && len(again.refused) != len(b.refused) {
			t.Errorf("refusals got lost: %+v, %+v", b, again)
		}
	})
}

// What beats cost: bad ones under a known salt much less than a microsecond,
// under an unknown one a derivation more.
func BenchmarkBeat(b *testing.B) {
	t := &beatTable{ring: &keyring{keys: []masterKey{testKey(1)}}, members: map[senderID]string{}}
	t.ring.ids = []keyID{t.ring.keys[0].id()}
	for i := range 7 {
		name := fmt.Sprintf("node%d", i+1)
		t.members[senderIDOf("default", name)] = name
	}
	a := &heartbeats{}
	idle := beat{seq: 1, epoch: 1600000000123, term: 6300 * time.Millisecond, heard: 7, ackSeq: 5, ackSalt: 5, data: beatData{token: make([]byte, tokenSize), keys: t.ring.ids}}
	h := beatHeader{t.ring.ids[0], senderIDOf("default", "node1"), 1}
	plain, err := idle.plaintext()
	must(b, err)
	raw := a.ciphers.seal(t.ring.keys[0], h, "node1", plain)
	b.Run("seal", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			plain, _ := idle.plaintext()
			a.ciphers.seal(t.ring.keys[0], h, "node1", plain)
		}
		b.ReportMetric(float64(len(raw)), "bytes")
	})
	open := func(change func(raw []byte)) func(b *testing.B) {
		return func(b *testing.B) {
			b.ReportAllocs()
			work, bad := make([]byte, len(raw)), bytes.Clone(raw)
			change(bad)
			for b.Loop() {
				copy(work, bad)
				if _, _, err := a.open(t, work); (err == nil) != bytes.Equal(bad, raw) {
					b.Fatal(err)
				}
			}
		}
	}
	b.Run("open", open(func([]byte) {}))
	b.Run("bad", open(func(raw []byte) { raw[len(raw)-1] ^= 1 }))
	b.Run("bad-salt", open(func(raw []byte) { raw[beatClear-nonceSize-1] ^= 1 }))
	b.Run("bad-sender", open(func(raw []byte) { raw[1+keyIDSize] ^= 1 }))
}

// Three nodes send 1.5 kB a second each at most, IP and UDP included, whatever
// services there are (design.md §12). A beat is so large with two keys, while a
// secret changes.
func TestIdleTraffic(t *testing.T) {
	t.Parallel()
	idle := beat{seq: 1, epoch: 1, heard: 7, data: beatData{token: make([]byte, tokenSize), keys: make([]keyID, 2)}}
	plain, err := idle.plaintext()
	must(t, err)
	const headers, peers, aSecond = 20 + 8, 2, 2
	if sent := (beatClear + len(plain) + tagSize + headers) * peers * aSecond; sent > 700 {
		t.Errorf("%d bytes a second", sent)
	}
}
