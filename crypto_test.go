package main

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode/utf8"
)

// vector is an example of test/vectors.json, which another implementation
// made, or of testdata/vectors.json, which this one made and test/client, the
// other implementation, opened.
type vector struct {
	Cluster       string
	Secret        string
	Label         label
	Nodename      string
	Frame         uint64
	PlaintextFlag byte   `json:"plaintext_flag"`
	JSON          string `json:"json"`
	MasterKey     string `json:"master_key"`
	Key           string
	Nonce         string
	AAD           string `json:"aad"`
	Envelope      json.RawMessage
}

func readVectors(t *testing.T) []vector {
	t.Helper()
	var all []vector
	for _, file := range []string{"test/vectors.json", "testdata/vectors.json"} {
		var f struct{ Vectors []vector }
		if err := json.Unmarshal([]byte(readText(t, file)), &f); err != nil || len(f.Vectors) == 0 {
			t.Fatalf("%s: %d vectors, %v", file, len(f.Vectors), err)
		}
		all = append(all, f.Vectors...)
	}
	return all
}

// derivations keeps the keys that several tests need, since each costs 100 ms.
var derivations sync.Map

// derivedMaster derives a key as a command does that finds it nowhere.
func derivedMaster(t *testing.T, secret, cluster string) masterKey {
	t.Helper()
	once, _ := derivations.LoadOrStore(secret+"\x00"+cluster, sync.OnceValues(func() (masterKey, error) {
		store := &keyStore{path: filepath.Join(t.TempDir(), "keys")}
		key, err := store.master(secret, cluster)
		if _, missing := os.Stat(store.path); err == nil && missing == nil {
			err = errors.New("a command wrote the file of keys")
		}
		return key, err
	}))
	key, err := once.(func() (masterKey, error))()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// parsedEnvelope gives parseEnvelope a copy, which it decodes in place.
func parsedEnvelope(t *testing.T, wire []byte) envelope {
	t.Helper()
	e, err := parseEnvelope(bytes.TrimSuffix(bytes.Clone(wire), []byte{0}))
	if err != nil {
		t.Fatalf("parseEnvelope: %v\n%s", err, wire)
	}
	return e
}

func TestVectors(t *testing.T) {
	t.Parallel()
	for i, v := range readVectors(t) {
		t.Run(fmt.Sprintf("%d %s", i, v.Label), func(t *testing.T) {
			t.Parallel()
			e := parsedEnvelope(t, v.Envelope)
			if e.cluster != v.Cluster || e.node != v.Nodename {
				t.Errorf("the envelope is of %q in %q, want %q in %q", e.node, e.cluster, v.Nodename, v.Cluster)
			}
			master := derivedMaster(t, v.Secret, v.Cluster)
			if got := hex.EncodeToString(master[:]); got != v.MasterKey {
				t.Errorf("master key = %s, want %s", got, v.MasterKey)
			}
			key, nonce := messageKey(master, e.salt, v.Label)
			if hex.EncodeToString(key) != v.Key || hex.EncodeToString(nonce) != v.Nonce {
				t.Errorf("key, nonce = %x, %x; want %s, %s", key, nonce, v.Key, v.Nonce)
			}
			c := messageContext{v.Label, e.cluster, e.node, e.request, v.Frame}
			if got := hex.EncodeToString(c.additionalData()); got != v.AAD {
				t.Errorf("additional data = %s, want %s", got, v.AAD)
			}
			sealed := bytes.Clone(e.data)
			message, err := open(master, e, c, requestLimit)
			if err != nil || string(message) != v.JSON {
				t.Fatalf("open = %q, %v; want %q", message, err, v.JSON)
			}
			// Sealed again under the same salt: equal, but for what a deflater
			// may do in more than one way.
			again := parsedEnvelope(t, sealWith(master, e.salt, c, []byte(v.JSON)))
			if again.cluster != e.cluster || again.node != e.node || again.salt != e.salt || (again.request == nil) != (e.request == nil) || e.request != nil && *again.request != *e.request {
				t.Errorf("sealed again, the envelope is %+v, want %+v", again, e)
			}
			if v.PlaintextFlag == storedPlain {
				if !bytes.Equal(again.data, sealed) {
					t.Errorf("sealed again, data = %x, want %x", again.data, sealed)
				}
			} else if message, err := open(master, again, c, requestLimit); err != nil || string(message) != v.JSON {
				t.Errorf("sealed again, open = %q, %v", message, err)
			}
		})
	}
}

// The vectors of test/ are ASCII, small and written plain, so those of
// testdata/ have to be what they are for.
func TestOwnVectorsCoverTheRest(t *testing.T) {
	t.Parallel()
	var deflatedReply, foreignName, large bool
	for _, v := range readVectors(t) {
		deflated := v.PlaintextFlag == storedDeflated
		deflatedReply = deflatedReply || deflated && v.Label == labelReply && v.Frame > 0
		foreignName = foreignName || strings.ContainsFunc(v.Cluster, func(r rune) bool { return r >= utf8.RuneSelf })
		large = large || deflated && v.Label == labelRequest && len(v.JSON) > deflateFrom
	}
	if !deflatedReply || !foreignName || !large {
		t.Errorf("deflated frame of a reply: %v; name beyond ASCII: %v; request over 1 KiB: %v", deflatedReply, foreignName, large)
	}
}

// testKey is a master key that nobody had to derive.
func testKey(fill byte) masterKey { return masterKey(bytes.Repeat([]byte{fill}, keySize)) }

func TestSealWrites(t *testing.T) {
	t.Parallel()
	request := salt{1, 2, 3}
	wire, s := seal(testKey(1), messageContext{label: labelReply, cluster: "default", node: "n1", request: &request}, []byte("{}"))
	if wire[len(wire)-1] != 0 || bytes.IndexByte(wire, 0) != len(wire)-1 {
		t.Errorf("one NUL ends an envelope, and only there: %q", wire)
	}
	var members map[string]string
	if err := json.Unmarshal(wire[:len(wire)-1], &members); err != nil {
		t.Fatalf("an envelope is a JSON object of strings: %v", err)
	}
	if want := base64.RawURLEncoding.EncodeToString(s[:]); members["salt"] != want {
		t.Errorf("salt = %q, want %q, without padding", members["salt"], want)
	}
	if want := base64.RawURLEncoding.EncodeToString(request[:]); members["request"] != want {
		t.Errorf("request = %q, want %q", members["request"], want)
	}
	if strings.ContainsAny(members["data"], "=+/") || len(members) != 5 {
		t.Errorf("members = %v", members)
	}
	// A salt, hence a key and a nonce, serves one message.
	if _, other := seal(testKey(1), messageContext{label: labelRequest, cluster: "default", node: "n1"}, []byte("{}")); other == s {
		t.Error("two messages have one salt")
	}
}

// Over 1 KiB, and only then, a message is deflated.
func TestSealDeflatesFrom(t *testing.T) {
	t.Parallel()
	for size, want := range map[int]byte{0: storedPlain, 1024: storedPlain, 1025: storedDeflated, 100_000: storedDeflated} {
		message := bytes.Repeat([]byte("x"), size)
		plain := pack(message)
		if plain[0] != want {
			t.Errorf("%d bytes are written with flag %d, want %d", size, plain[0], want)
		}
		if got, err := unpack(plain, size); err != nil || !bytes.Equal(got, message) {
			t.Errorf("%d bytes do not come back: %v", size, err)
		}
	}
}

// In whatever a forger changes a message, it does not open: each bit of each
// field, as it is after decoding.
func TestEveryFlippedBitIsRefused(t *testing.T) {
	t.Parallel()
	key, request := testKey(1), salt{9}
	c := messageContext{labelReply, "default", "node1", &request, 3}
	wire, _ := seal(key, c, []byte(`{"time":1600000000000,"status":0,"data":null}`))
	// The receiver takes cluster, node and request from the envelope.
	opens := func(e envelope) bool {
		_, err := open(key, e, messageContext{c.label, e.cluster, e.node, e.request, c.frame}, replyLimit)
		return err == nil
	}
	if !opens(parsedEnvelope(t, wire)) {
		t.Fatal("the message does not open untouched")
	}
	for field, bytesOf := range map[string]func(e *envelope) ([]byte, func([]byte)){
		"clustername": func(e *envelope) ([]byte, func([]byte)) {
			return []byte(e.cluster), func(b []byte) { e.cluster = string(b) }
		},
		"nodename": func(e *envelope) ([]byte, func([]byte)) {
			return []byte(e.node), func(b []byte) { e.node = string(b) }
		},
		"salt":    func(e *envelope) ([]byte, func([]byte)) { return e.salt[:], func([]byte) {} },
		"data":    func(e *envelope) ([]byte, func([]byte)) { return e.data, func([]byte) {} },
		"request": func(e *envelope) ([]byte, func([]byte)) { return e.request[:], func([]byte) {} },
	} {
		e := parsedEnvelope(t, wire)
		size, _ := bytesOf(&e)
		for bit := range 8 * len(size) {
			e := parsedEnvelope(t, wire)
			b, store := bytesOf(&e)
			b[bit/8] ^= 1 << (bit % 8)
			store(b)
			if opens(e) {
				t.Errorf("opens with bit %d of %s flipped", bit, field)
			}
		}
	}
	// As written, a flipped bit may at most spell the same envelope otherwise:
	// base64 leaves bits of its last letter unused.
	original := parsedEnvelope(t, wire)
	for bit := range 8 * (len(wire) - 1) {
		changed := bytes.Clone(wire[:len(wire)-1])
		changed[bit/8] ^= 1 << (bit % 8)
		e, err := parseEnvelope(bytes.Clone(changed))
		if err != nil || e.request == nil {
			continue
		}
		same := e.cluster == original.cluster && e.node == original.node && e.salt == original.salt && *e.request == *original.request && bytes.Equal(e.data, original.data)
		if !same && opens(e) {
			t.Errorf("opens with a bit of the wire flipped: %s", changed)
		}
	}
}

func TestOpenRefusesAnotherContext(t *testing.T) {
	t.Parallel()
	request, other := salt{1}, salt{2}
	right := messageContext{labelReply, "default", "node1", &request, 1}
	wire, _ := seal(testKey(1), right, []byte("{}"))
	tests := []struct {
		name string
		key  masterKey
		c    messageContext
	}{
		{"another secret", testKey(2), right},
		{"another label", testKey(1), messageContext{labelRequest, "default", "node1", &request, 1}},
		{"another cluster", testKey(1), messageContext{labelReply, "default2", "node1", &request, 1}},
		{"another node", testKey(1), messageContext{labelReply, "default", "node2", &request, 1}},
		{"another request", testKey(1), messageContext{labelReply, "default", "node1", &other, 1}},
		{"no request", testKey(1), messageContext{labelReply, "default", "node1", nil, 1}},
		{"an earlier frame", testKey(1), messageContext{labelReply, "default", "node1", &request, 0}},
		{"a later frame", testKey(1), messageContext{labelReply, "default", "node1", &request, 2}},
		{"a byte moved from cluster to node", testKey(1), messageContext{labelReply, "defaul", "tnode1", &request, 1}},
	}
	for _, test := range tests {
		if _, err := open(test.key, parsedEnvelope(t, wire), test.c, replyLimit); !errors.Is(err, errOpen) {
			t.Errorf("%s: error = %v, want %v, which tells a forger nothing", test.name, err, errOpen)
		}
	}
	if _, err := open(testKey(1), parsedEnvelope(t, wire), right, replyLimit); err != nil {
		t.Errorf("the right one: %v", err)
	}
}

// sealPlain seals a plaintext that pack would not write.
func sealPlain(key masterKey, c messageContext, plain []byte) envelope {
	e := envelope{cluster: c.cluster, node: c.node, salt: salt{7}, request: c.request}
	aead, nonce := messageCipher(key, e.salt, c.label)
	e.data = aead.Seal(nil, nonce, plain, c.additionalData())
	return e
}

// deflateBomb is raw deflate of blocks MiB of zeros, a kB each.
func deflateBomb(t *testing.T, blocks int) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	// What the second flush adds continues any run of zeros.
	mib, sizes := make([]byte, 1<<20), []int{0, 0}
	for i := range sizes {
		if _, err := w.Write(mib); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		sizes[i] = out.Len()
	}
	bomb := slices.Clone(out.Bytes()[:sizes[0]])
	block := out.Bytes()[sizes[0]:sizes[1]]
	for range blocks - 1 {
		bomb = append(bomb, block...)
	}
	return append(bomb, 0x01, 0x00, 0x00, 0xff, 0xff) // a last, empty block
}

// Not parallel, since it counts the bytes that the process allocates.
func TestDeflateBombTakesLittleMemory(t *testing.T) {
	small := deflateBomb(t, 3)
	if n, err := io.Copy(io.Discard, flate.NewReader(bytes.NewReader(small))); err != nil || n != 3<<20 {
		t.Fatalf("a bomb of %d bytes inflates to %d bytes, %v; want 3 MiB", len(small), n, err)
	}
	bomb := deflateBomb(t, 100)
	c := messageContext{label: labelRequest, cluster: "default", node: "n1"}
	e := sealPlain(testKey(1), c, append([]byte{storedDeflated}, bomb...))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := open(testKey(1), e, c, requestLimit)
	runtime.ReadMemStats(&after)
	if err == nil || errors.Is(err, errOpen) || !strings.Contains(err.Error(), fmt.Sprint(requestLimit)) {
		t.Errorf("error = %v; it opened, so its sender is told the limit", err)
	}
	if took := after.TotalAlloc - before.TotalAlloc; took > 10*requestLimit {
		t.Errorf("%d bytes were allocated for a limit of %d", took, requestLimit)
	}
}

func TestUnpackLimits(t *testing.T) {
	t.Parallel()
	deflated := pack(bytes.Repeat([]byte("y"), 2000))
	plain := append([]byte{storedPlain}, bytes.Repeat([]byte("y"), 2000)...)
	for name, stored := range map[string][]byte{"plain": plain, "deflated": deflated} {
		if message, err := unpack(stored, 2000); err != nil || len(message) != 2000 {
			t.Errorf("%s: the limit itself is refused: %v", name, err)
		}
		if _, err := unpack(stored, 1999); err == nil || !strings.Contains(err.Error(), "1999") {
			t.Errorf("%s: one byte beyond the limit: %v", name, err)
		}
	}
	for name, stored := range map[string][]byte{
		"nothing":            {},
		"unknown flag":       {2, '{', '}'},
		"not deflate":        {storedDeflated, 0xff, 0xff, 0xff},
		"deflate cut short":  deflated[:len(deflated)-3],
		"deflate of nothing": {storedDeflated},
	} {
		if message, err := unpack(stored, 2000); err == nil || errors.Is(err, errOpen) {
			t.Errorf("%s: unpack = %q, %v; want an error that the sender may hear", name, message, err)
		}
	}
}

// While a new secret spreads, the previous one opens too, and the key that
// opened is told, since the reply is sealed with it.
func TestOpenAny(t *testing.T) {
	t.Parallel()
	c := messageContext{label: labelRequest, cluster: "default", node: "n1"}
	keys := []masterKey{testKey(1), testKey(2), testKey(3)}
	for i, key := range keys {
		wire, _ := seal(key, c, []byte(`{"action":"ping"}`))
		message, used, err := openAny(keys, parsedEnvelope(t, wire), c, requestLimit)
		if err != nil || string(message) != `{"action":"ping"}` || used != key {
			t.Errorf("sealed with key %d: %q, %v, and key %d", i+1, message, err, used[0])
		}
	}
	wire, _ := seal(testKey(4), c, []byte("{}"))
	if _, _, err := openAny(keys, parsedEnvelope(t, wire), c, requestLimit); !errors.Is(err, errOpen) {
		t.Errorf("a foreign key: %v", err)
	}
	if _, _, err := openAny(nil, parsedEnvelope(t, wire), c, requestLimit); !errors.Is(err, errOpen) {
		t.Errorf("no key at all: %v", err)
	}
	// What opens and is faulty is answered: it must not count as not opened.
	if _, used, err := openAny(keys, sealPlain(testKey(1), c, []byte{9}), c, requestLimit); err == nil || errors.Is(err, errOpen) || used != testKey(1) {
		t.Errorf("faulty, with the first key: %v", err)
	}
}

// testEnvelope is one that parses.
func testEnvelope() string {
	return fmt.Sprintf(`{"clustername":"c","nodename":"n","salt":"%s","data":"%s"}`, strings.Repeat("A", 43), strings.Repeat("A", 23))
}

func TestEnvelopeShape(t *testing.T) {
	t.Parallel()
	good := testEnvelope()
	replaced := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("%q is not in the envelope", old)
		}
		return strings.Replace(good, old, new, 1)
	}
	salt43, data23 := `"salt":"`+strings.Repeat("A", 43)+`"`, `"data":"`+strings.Repeat("A", 23)+`"`
	tests := []struct {
		name, text string
		ok         bool
	}{
		{"good", good, true},
		{"blanks wherever JSON has them", " {\n\"clustername\" : \"c\",\r\n\t\"nodename\":\"n\" , " + salt43 + "," + data23 + " } \n", true},
		{"padded salt", replaced(salt43, `"salt":"`+strings.Repeat("A", 43)+`="`), true},
		{"padded data", replaced(data23, `"data":"`+strings.Repeat("A", 23)+`="`), true},
		{"escaped letters", replaced(`"clustername":"c"`, `"cluster\u006eame":"\u0063"`), true},
		{"unknown member", replaced(`"nodename"`, `"version":"2","nodename"`), true},
		{"token", replaced(`"nodename"`, `"token":"AAAA","nodename"`), true},
		{"request", replaced(`"nodename"`, `"request":"`+strings.Repeat("A", 43)+`","nodename"`), true},
		{"names of 255 bytes", replaced(`"nodename":"n"`, `"nodename":"`+strings.Repeat("n", 255)+`"`), true},
		{"names of 256 bytes", replaced(`"nodename":"n"`, `"nodename":"`+strings.Repeat("n", 256)+`"`), false},
		{"no clustername", replaced(`"clustername":"c",`, ``), false},
		{"empty nodename", replaced(`"nodename":"n"`, `"nodename":""`), false},
		{"no salt", replaced(salt43+",", ``), false},
		{"no data", replaced(","+data23, ``), false},
		{"member twice", replaced(`"nodename"`, `"nodename":"m","nodename"`), false},
		{"member twice, once escaped", replaced(`"nodename"`, `"\u006eodename":"n","nodename"`), false},
		{"salt of 31 bytes", replaced(salt43, `"salt":"`+strings.Repeat("A", 42)+`"`), false},
		{"salt of 33 bytes", replaced(salt43, `"salt":"`+strings.Repeat("A", 44)+`"`), false},
		{"salt in standard base64", replaced(salt43, `"salt":"`+strings.Repeat("A", 42)+`/"`), false},
		{"request of 31 bytes", replaced(`"nodename"`, `"request":"`+strings.Repeat("A", 42)+`","nodename"`), false},
		{"empty request", replaced(`"nodename"`, `"request":"","nodename"`), false},
		{"data of a tag alone", replaced(data23, `"data":"`+strings.Repeat("A", 22)+`"`), false},
		{"data that is no base64", replaced(data23, `"data":"`+strings.Repeat("!", 40)+`"`), false},
		{"data cut in a letter", replaced(data23, `"data":"`+strings.Repeat("A", 25)+`"`), false},
		{"number", replaced(`"nodename":"n"`, `"nodename":1`), false},
		{"null", replaced(`"nodename":"n"`, `"nodename":null`), false},
		{"object in it", replaced(`"nodename"`, `"x":{},"nodename"`), false},
		{"comma at the end", replaced(`}`, `,}`), false},
		{"something behind", good + "x", false},
		{"cut", good[:len(good)-1], false},
		{"control character in a string", replaced(`"nodename":"n"`, "\"nodename\":\"n\x01\""), false},
		{"unknown escape", replaced(`"nodename":"n"`, `"nodename":"\q"`), false},
		{"array", "[" + good + "]", false},
		{"nothing", "", false},
		{"empty object", "{}", false},
	}
	for _, test := range tests {
		e, err := parseEnvelope([]byte(test.text))
		if (err == nil) != test.ok {
			t.Errorf("%s: error = %v; want ok %v", test.name, err, test.ok)
		}
		if err != nil && err != errShape {
			t.Errorf("%s: the error %q tells an outsider more than %q", test.name, err, errShape)
		}
		if test.ok && (e.cluster != "c" || len(e.data) != tagSize+1) {
			t.Errorf("%s: %+v", test.name, e)
		}
	}
	// Unlike the rest of the object, names are kept apart by their letters.
	if _, err := parseEnvelope([]byte(replaced(`"nodename"`, `"Nodename"`))); err == nil {
		t.Error("Nodename is taken for nodename")
	}
}

// RFC 4648 §3.3: what is not of the alphabet is refused. Go's decoder passes
// over line ends, so 43 characters are not always 32 bytes.
func TestEnvelopeRefusesLineEndsInBase64(t *testing.T) {
	t.Parallel()
	good := testEnvelope()
	for name, text := range map[string]string{
		"salt of 31 bytes and a line end": strings.Replace(good, strings.Repeat("A", 43), strings.Repeat("A", 42)+`\n`, 1),
		"data with a line end":            strings.Replace(good, `"data":"`, `"data":"\r`, 1),
		"request with line ends":          strings.Replace(good, `{`, `{"request":"`+strings.Repeat("A", 20)+`\n\n`+strings.Repeat("A", 21)+`",`, 1),
	} {
		if e, err := parseEnvelope([]byte(text)); err == nil {
			t.Errorf("%s is accepted: salt %x, data %x", name, e.salt, e.data)
		}
	}
}

// JSON is UTF-8. Each reader makes something else of other bytes, and what is
// additional data must be the same for all.
func TestEnvelopeRefusesWhatIsNotUTF8(t *testing.T) {
	t.Parallel()
	text := strings.Replace(testEnvelope(), `"clustername":"c"`, "\"clustername\":\"c\xff\"", 1)
	if e, err := parseEnvelope([]byte(text)); err == nil {
		t.Errorf("accepted as %q; encoding/json reads %q", e.cluster, "c\ufffd")
	}
}

// plainMembers reads an object of strings with encoding/json. twice: a member
// that an envelope has stands there more than once.
func plainMembers(raw []byte) (members map[string]string, twice, ok bool) {
	if !json.Valid(raw) {
		return nil, false, false
	}
	in := json.NewDecoder(bytes.NewReader(raw))
	if token, err := in.Token(); err != nil || token != json.Delim('{') {
		return nil, false, false
	}
	members = map[string]string{}
	for in.More() {
		name, err := in.Token()
		if err != nil {
			return nil, false, false
		}
		text, err := in.Token()
		value, isString := text.(string)
		if err != nil || !isString {
			return nil, false, false
		}
		_, had := members[name.(string)]
		twice = twice || had && slices.Contains(envelopeMembers, name.(string))
		members[name.(string)] = value
	}
	return members, twice, true
}

var envelopeMembers = []string{"clustername", "nodename", "salt", "data", "request", "token"}

// decodedBase64 reads base64url with or without its padding, and nothing else.
func decodedBase64(text string) ([]byte, bool) {
	if strings.ContainsAny(text, "\r\n") {
		return nil, false
	}
	encoding := base64.RawURLEncoding
	if strings.HasSuffix(text, "=") {
		encoding = base64.URLEncoding
	}
	b, err := encoding.DecodeString(text)
	return b, err == nil
}

func FuzzEnvelope(f *testing.F) {
	good := testEnvelope()
	f.Add([]byte(good))
	f.Add([]byte(strings.Replace(good, `"c"`, `"\u0063\ud83d\ude00"`, 1)))
	f.Add([]byte(strings.Replace(good, `"c"`, "\"c\xff\"", 1)))
	f.Add([]byte(strings.Replace(good, `"data":"`, `"data":"\n`, 1)))
	f.Add([]byte(strings.Replace(good, strings.Repeat("A", 43), strings.Repeat("A", 42)+`\n`, 1)))
	f.Add([]byte(strings.Replace(good, `{`, ` { "request" : "`+strings.Repeat("_", 43)+`=" , "token":"\"\\",`, 1)))
	f.Add([]byte(strings.Replace(good, `{`, `{"salt":"x","x":"y","x":"z",`, 1)))
	wire, _ := seal(testKey(1), messageContext{label: labelRequest, cluster: "Zürich <&>", node: "n1"}, []byte("{}"))
	f.Add(wire[:len(wire)-1])
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := parseEnvelope(bytes.Clone(raw))
		members, twice, ok := plainMembers(raw)
		if err == nil {
			checkEnvelopeIs(t, e, members, twice, ok)
			open(testKey(1), e, messageContext{labelReply, e.cluster, e.node, e.request, 0}, requestLimit)
			return
		}
		if !ok || twice || !utf8.Valid(raw) {
			return
		}
		for name := range members {
			if !slices.Contains(envelopeMembers, name) {
				return
			}
		}
		salt, saltOK := decodedBase64(members["salt"])
		data, dataOK := decodedBase64(members["data"])
		request, requestOK := decodedBase64(members["request"])
		_, isReply := members["request"]
		fits := func(name string) bool { return 0 < len(name) && len(name) <= 255 }
		if fits(members["clustername"]) && fits(members["nodename"]) && saltOK && len(salt) == saltSize &&
			dataOK && len(data) > tagSize && (!isReply || requestOK && len(request) == saltSize) {
			t.Fatalf("refused, though it is an envelope: %s", raw)
		}
	})
}

// checkEnvelopeIs: what parseEnvelope accepted, encoding/json reads the same.
func checkEnvelopeIs(t *testing.T, e envelope, members map[string]string, twice, ok bool) {
	t.Helper()
	if !ok || twice {
		t.Fatalf("accepted, though it is no object of strings, or a member stands twice (%v)", twice)
	}
	if e.cluster != members["clustername"] || e.node != members["nodename"] {
		t.Errorf("%q in %q; encoding/json reads %q in %q", e.node, e.cluster, members["nodename"], members["clustername"])
	}
	fields := map[string][]byte{"salt": e.salt[:], "data": e.data}
	if _, isReply := members["request"]; isReply != (e.request != nil) {
		t.Errorf("request = %v; encoding/json reads %q", e.request, members["request"])
	} else if isReply {
		fields["request"] = e.request[:]
	}
	for name, got := range fields {
		if want, ok := decodedBase64(strings.TrimRight(members[name], "=")); !ok || !bytes.Equal(got, want) {
			t.Errorf("%s = %x; it is written %q", name, got, members[name])
		}
	}
}

const testSecret, testCluster = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", "default"

// keyLine is how a keyStore's file holds a key: under a hash of what it is of.
func keyLine(secret, cluster string, key masterKey) string {
	return fmt.Sprintf("%x %x\n", sha256.Sum256([]byte(cluster+"\x00"+secret)), key)
}

func testKeyStore(t *testing.T, text string) *keyStore {
	t.Helper()
	store := &keyStore{path: filepath.Join(t.TempDir(), "keys"), failed: func(err error) { t.Errorf("failed: %v", err) }}
	if text != "" {
		writeText(t, store.path, text)
	}
	return store
}

// A key planted in the file shows that the file is what is read, by the daemon
// and by commands, which have no failed.
func TestKeyStoreReadsItsFile(t *testing.T) {
	t.Parallel()
	store := testKeyStore(t, keyLine(testSecret, "another", testKey(1))+keyLine(testSecret, testCluster, testKey(2))+keyLine("another", testCluster, testKey(3)))
	for name, reader := range map[string]*keyStore{"daemon": store, "command": {path: store.path}} {
		if got, err := reader.master(testSecret, testCluster); err != nil || got != testKey(2) {
			t.Errorf("%s: master = %x, %v; want what the file says", name, got, err)
		}
	}
}

// What is missing, or damaged, is derived and kept, and the file keeps a few
// keys only.
func TestKeyStoreKeepsKeys(t *testing.T) {
	t.Parallel()
	want := derivedMaster(t, testSecret, testCluster)
	line := keyLine(testSecret, testCluster, want)
	kept := []string{}
	for i := range keysKept {
		kept = append(kept, keyLine(testSecret, fmt.Sprint(i), testKey(byte(i))))
	}
	store := testKeyStore(t, "\x00\xff\n\n"+line[:len(line)-3]+"\n"+line[:len(line)-2]+"x\n"+strings.Join(kept, ""))
	if err := os.Chmod(store.path, 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := store.master(testSecret, testCluster); err != nil || got != want {
		t.Errorf("master = %x, %v; want %x", got, err, want)
	}
	if got, want := readText(t, store.path), strings.Join(kept[1:], "")+line; got != want {
		t.Errorf("the file holds\n%swant the %d newest\n%s", got, keysKept, want)
	}
	checkMode(t, store.path, 0o600)
}

// A file that cannot be read nor written costs time, not the key.
func TestKeyStoreWithoutAFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "keys")
	writeText(t, filepath.Join(path, "a folder is in its place"), "")
	heard := 0
	store := &keyStore{path: path, failed: func(error) { heard++ }}
	if got, err := store.master(testSecret, testCluster); err != nil || got != derivedMaster(t, testSecret, testCluster) || heard != 1 {
		t.Errorf("master = %x, %v; failed heard %d errors, want 1", got, err, heard)
	}
}

// cluster.secret's key comes first, since messages are sealed with the first;
// join opens under cluster.secret alone.
func TestKeyring(t *testing.T) {
	t.Parallel()
	store := testKeyStore(t, keyLine("new", testCluster, testKey(1))+keyLine("old", testCluster, testKey(2))+keyLine("new", joinCluster, testKey(3))+keyLine("old", joinCluster, testKey(4)))
	ring := newKeyring(store, testCluster, []string{"new", "old"})
	select {
	case <-ring.ready:
		t.Fatal("ready before anything was derived")
	default:
	}
	ring.derive(store)
	<-ring.ready
	if want := []masterKey{testKey(1), testKey(2)}; ring.err != nil || !slices.Equal(ring.keys, want) {
		t.Errorf("keys = %x, %v; want %x", ring.keys, ring.err, want)
	}
	if key, err := ring.join(); err != nil || key != testKey(3) {
		t.Errorf("the key of join = %x, %v", key, err)
	}
}
