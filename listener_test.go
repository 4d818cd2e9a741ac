// listener_test.go: the wire as a stranger, a member and a forger meet it:
// what is refused, how, and on whose account (design.md §4); datagrams; empty
// packets.

package main

import (
	"bytes"
	"compress/flate"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// replaced changes a sealed message where it is written in clear.
func replaced(raw []byte, old, new string) []byte {
	return bytes.Replace(raw, []byte(old), []byte(new), 1)
}

// aged is a ping sealed for a time that is off by d.
func (w wireClient) aged(d time.Duration) []byte {
	return w.sealed(fmt.Sprintf(`{"time": %d, "to": "node1", "action": "ping"}`, time.Now().Add(d).UnixMilli()))
}

func TestSilentRefusals(t *testing.T) {
	d := startLive(t, nil, nil)
	for i, test := range []struct {
		name   string
		raw    func(w wireClient) []byte
		counts string // the nodename on whose account it goes
	}{
		{"no JSON", func(wireClient) []byte { return []byte("GET / HTTP/1.1\r\n\r\n\x00") }, noMember},
		{"an array", func(wireClient) []byte { return []byte("[]\x00") }, noMember},
		{"a number for a string", func(wireClient) []byte { return []byte("{\"clustername\": 1}\x00") }, noMember},
		{"no members", func(wireClient) []byte { return []byte("{}\x00") }, noMember},
		{"no data, member's name", func(w wireClient) []byte {
			return []byte("{\"clustername\": \"default\", \"nodename\": \"node2\", \"salt\": \"" + strings.Repeat("A", 43) + "\"}\x00")
		}, "node2"},
		{"a member twice", func(w wireClient) []byte { return replaced(w.aged(0), `"salt"`, `"nodename": "node2", "salt"`) }, noMember},
		{"salt too short", func(w wireClient) []byte { return replaced(w.aged(0), `"salt": "`, `"salt": "AAAA", "was": "`) }, "node2"},
		{"data is not base64url", func(w wireClient) []byte { return replaced(w.aged(0), `"data": "`, `"data": "+/`) }, "node2"},
		{"another cluster, member's name", func(w wireClient) []byte { w.cluster = "other"; return w.aged(0) }, "node2"},
		{"another cluster, no member", func(w wireClient) []byte { w.cluster, w.node = "other", "node9"; return w.aged(0) }, noMember},
		{"no member", func(w wireClient) []byte { w.node = "node9"; return w.aged(0) }, noMember},
		{"another secret", func(w wireClient) []byte { w.key = labKey(t, otherSecret, "default"); return w.aged(0) }, "node2"},
		{"another secret and an old time", func(w wireClient) []byte { w.key = labKey(t, otherSecret, "default"); return w.aged(-time.Hour) }, "node2"},
		{"garbled", func(w wireClient) []byte {
			raw := w.aged(0)
			raw[len(raw)-20] ^= 1
			return raw
		}, "node2"},
		{"cut", func(w wireClient) []byte { raw := w.aged(0); return append(raw[:len(raw)-12], "\"}\x00"...) }, "node2"},
		{"sealed as a reply", func(w wireClient) []byte {
			raw, _ := seal(w.key, messageContext{label: labelReply, cluster: w.cluster, node: w.node}, []byte(w.message("ping", "")))
			return raw
		}, "node2"},
		{"in another's name", func(w wireClient) []byte { return replaced(w.aged(0), `"node2"`, `"node3"`) }, "node3"},
		{"join under another secret", func(w wireClient) []byte {
			w.cluster, w.key = joinCluster, labKey(t, otherSecret, "default")
			return w.aged(0)
		}, noMember},
		{"larger than 1 MiB", func(w wireClient) []byte { return append(bytes.Repeat([]byte("x"), requestLimit+1), 0) }, noMember},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := d.client("node2", fmt.Sprintf("127.0.1.%d", i+1))
			raw := test.raw(w)
			answer, err := w.exchange(raw)
			if err != io.EOF {
				t.Fatalf("answered %q, %v; want the connection closed without a word", answer, err)
			}
			key := "tcp " + w.from + " " + test.counts
			if test.counts == noMember {
				key = w.from + " " + noMember
			}
			// A reset reaches the client before the count is made.
			waitFor(t, patience, "it counts as "+key, func() bool { return d.counts()[key] == 1 })
			for other, count := range d.counts() {
				if other != key && strings.Contains(other, w.from+" ") {
					t.Errorf("%s counts %d too", other, count)
				}
			}
			if len(raw) > datagramLimit {
				return
			}
			if answer, err := w.exchangeUDP(test.raw(w), 50*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("answered over UDP: %q, %v", answer, err)
			}
			if key = strings.Replace(key, "tcp", "udp", 1); test.counts == noMember {
				waitFor(t, patience, "the datagram counts too", func() bool { return d.counts()[key] == 2 })
			} else {
				waitFor(t, patience, "the datagram counts as "+key, func() bool { return d.counts()[key] == 1 })
			}
		})
	}
}

// TestSealedRefusals: what opens is answered, and is on nobody's account. Each
// message that is wrong in two ways is refused for the one that is checked
// first.
func TestSealedRefusals(t *testing.T) {
	d := startLive(t, settings{"listener.max_clock_skew": "20s"}, nil)
	once := d.client("node2", "127.0.1.1").sealed(d.client("node2", "127.0.1.1").message("ping", ""))
	join := func(w wireClient, action string) []byte {
		w.cluster, w.key = joinCluster, labKey(t, liveSecret, joinCluster)
		return w.sealed(w.message(action, ""))
	}
	for i, test := range []struct {
		name string
		raw  func(w wireClient) []byte
		says string
	}{
		{"accepted", func(wireClient) []byte { return bytes.Clone(once) }, ""},
		{"received twice", func(wireClient) []byte { return bytes.Clone(once) }, "this message was received before"},
		{"ahead", func(w wireClient) []byte { return w.aged(40 * time.Second) }, "clock: the message is … ahead of this node"},
		{"behind", func(w wireClient) []byte { return w.aged(-40 * time.Second) }, "clock: the message is … behind this node"},
		{"before the start", func(w wireClient) []byte { return w.aged(-15 * time.Second) }, "clock: the message is from before this daemon's start"},
		{"behind and for another", func(w wireClient) []byte { w.receiver = "node3"; return w.aged(-time.Hour) }, "clock:"},
		{"no time", func(w wireClient) []byte { return w.sealed(`{"to": "node1", "action": "ping"}`) }, "the request has no time"},
		{"for another, unknown action", func(w wireClient) []byte { w.receiver = "node3"; return w.sealed(w.message("nonsense", "")) }, `this is node "node1", and the request is for "node3"`},
		{"for nobody", func(w wireClient) []byte { w.receiver = ""; return w.sealed(w.message("ping", "")) }, `this is node "node1"`},
		{"unknown action and option", func(w wireClient) []byte { return w.sealed(w.message("nonsense", `"x": 1`)) }, `unknown action "nonsense"; there are: clear, cluster_status, daemon_`},
		{"unknown option", func(w wireClient) []byte { return w.sealed(w.message("daemon_stop", `"thread": "listener"`)) }, `unknown option "thread" of daemon_stop; there are: force, thr_id`},
		{"option of the wrong type", func(w wireClient) []byte { return w.sealed(w.message("daemon_stop", `"thr_id": 5`)) }, `option "thr_id" of daemon_stop must be a string, not 5`},
		{"join asks for something else", func(w wireClient) []byte { return join(w, "daemon_stop") }, `in the name of cluster "join" there is one action, join`},
		{"no JSON inside", func(w wireClient) []byte { return w.sealed("daemon_status") }, "the request is not of the form"},
		{"nothing inside", func(w wireClient) []byte { return w.sealed("") }, "the request is not of the form"},
		{"inflates to 2 MiB", func(w wireClient) []byte { return w.sealed(strings.Repeat(" ", 2<<20)) }, "the message is larger than 1048576 bytes"},
		{"ping", func(w wireClient) []byte { return w.sealed(w.message("ping", "")) }, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := d.client("node2", fmt.Sprintf("127.0.1.%d", i+1))
			raw := test.raw(w)
			answer, err := w.exchange(raw)
			must(t, err)
			if bytes.Contains(raw, []byte(`"join"`)) {
				w.key = labKey(t, liveSecret, joinCluster)
			}
			r := w.opened(t, raw, answer)
			prefix, part, _ := strings.Cut(test.says, "…")
			if refused := test.says != ""; refused != (r.Status == 1) || !strings.HasPrefix(r.Error, prefix) || !strings.Contains(r.Error, part) {
				t.Errorf("status %d, %q; want %q", r.Status, r.Error, test.says)
			}
		})
	}
	if counts := d.counts(); len(counts) > 0 {
		t.Errorf("counted: %v", counts)
	}
}

// TestShutOut: five invalid messages in a row shut out their sender as it is
// told apart from others, and nobody else.
func TestShutOut(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.3.1")
	invalid := func() []byte { return replaced(w.aged(0), `"data": "`, `"data": "AAAA`) }
	others := map[string]wireClient{"another address": w, "another name": w, "a privileged port": w}
	edit := func(name string, change func(w *wireClient)) { o := others[name]; change(&o); others[name] = o }
	edit("another address", func(o *wireClient) { o.from = "127.0.3.2" })
	edit("another name", func(o *wireClient) { o.node = "node3" })
	if edit("a privileged port", func(o *wireClient) { o.privileged = true }); os.Geteuid() != 0 {
		delete(others, "a privileged port") // this user is the very one that it keeps apart
	}
	send := func(times int) {
		t.Helper()
		for range times {
			if answer, err := w.exchange(invalid()); err != io.EOF {
				t.Fatalf("an invalid message is answered: %q, %v", answer, err)
			}
		}
	}
	send(strikes - 1)
	if !w.answers() {
		t.Fatal("shut out after four invalid messages")
	}
	send(strikes - 1)
	if !w.answers() {
		t.Fatal("a valid message did not clear the count")
	}
	send(strikes)
	dropped := d.status().Listener.Stats["dropped"]
	for range 3 {
		if w.answers() {
			t.Fatal("answered after five invalid messages in a row")
		}
	}
	send(1) // neither this nor a valid one counts on
	if now := d.status().Listener.Stats["dropped"]; now != dropped+4 {
		t.Errorf("%d messages dropped, want 4", now-dropped)
	}
	if counts := d.counts(); !maps.Equal(counts, map[string]int{"tcp 127.0.3.1 node2": strikes}) {
		t.Errorf("counts: %v", counts)
	}
	if times := d.logged.count("sender shut out"); times != 1 {
		t.Errorf("being shut out was logged %d times", times)
	}
	for name, o := range others {
		if !o.answers() {
			t.Errorf("shut out too: %s", name)
		}
	}
	if _, err := w.exchangeUDP(w.aged(0), patience); err != nil {
		t.Errorf("shut out over UDP too: %v", err)
	}
	// Nonsense from that address, without a member's name.
	for range strikes + 1 {
		if _, err := others["another name"].exchange([]byte("nonsense\x00")); err != io.EOF {
			t.Fatal(err)
		}
	}
	if !others["another name"].answers() {
		t.Error("what names no member shut out a member")
	}
	join := w
	join.cluster, join.key = joinCluster, labKey(t, liveSecret, joinCluster)
	if join.answers() {
		t.Error("a join is looked at from an address that is shut out")
	}
	checkBlacklistStatus(t, d)
	if r := d.local("daemon_blacklist_clear"); r.Status != 0 {
		t.Fatal(r.Error)
	}
	if !w.answers() {
		t.Error("still shut out after daemon_blacklist_clear")
	}
	if answer, err := join.exchange(join.aged(0)); err != nil || len(answer) == 0 {
		t.Errorf("joins are still shut out after daemon_blacklist_clear: %v", err)
	}
}

func checkBlacklistStatus(t *testing.T, d *liveDaemon) {
	t.Helper()
	var r struct {
		Status  int
		Data    map[string]int
		Sources []blacklistSource
	}
	must(t, askLocal(t.Context(), d.paths, "daemon_blacklist_status", nil, nil, func(raw []byte, _ replyJSON) error {
		return json.Unmarshal(raw, &r)
	}))
	if !maps.Equal(r.Data, map[string]int{"node2": strikes, noMember: strikes}) {
		t.Errorf("daemon_blacklist_status: %v", r.Data)
	}
	for _, s := range r.Sources {
		if !s.ShutOut || s.Privileged || s.Address != "127.0.3.1" || s.Count != strikes || time.Since(s.Last) > time.Minute {
			t.Errorf("source: %+v", s)
		}
	}
	if len(r.Sources) != 2 {
		t.Errorf("%d sources, want 2", len(r.Sources))
	}
}

// TestRequestForms: blanks and NULs before a request, pieces, and what comes
// behind its NUL do not matter.
func TestRequestForms(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	for name, form := range map[string]func(raw []byte) [][]byte{
		"as it is":           func(raw []byte) [][]byte { return [][]byte{raw} },
		"behind NULs":        func(raw []byte) [][]byte { return [][]byte{append([]byte("\x00\x00 \n\r\n\t\x00"), raw...)} },
		"NULs by themselves": func(raw []byte) [][]byte { return [][]byte{{0}, []byte("\n"), {0, 0}, raw} },
		"5,000 blanks":       func(raw []byte) [][]byte { return [][]byte{append(bytes.Repeat([]byte(" "), 5000), raw...)} },
		"in two pieces":      func(raw []byte) [][]byte { return [][]byte{raw[:100], raw[100:]} },
		"its NUL by itself":  func(raw []byte) [][]byte { return [][]byte{raw[:len(raw)-1], {0}} },
		"more behind it":     func(raw []byte) [][]byte { return [][]byte{append(raw, "and more\x00{}\x00"...)} },
		"blank and a piece":  func(raw []byte) [][]byte { return [][]byte{append([]byte(" "), raw[:1]...), raw[1:]} },
		"blanks inside":      func(raw []byte) [][]byte { return [][]byte{replaced(raw, `": "`, "\" \n:\t \"")} },
		"with padding":       func(raw []byte) [][]byte { return [][]byte{replaced(raw, `", "data`, `=", "data`)} },
		"unknown members": func(raw []byte) [][]byte {
			return [][]byte{replaced(raw, `{`, `{"token": "AAAA", "später": "\u0000", `)}
		},
		"escapes in a member":  func(raw []byte) [][]byte { return [][]byte{replaced(raw, `"default"`, `"\u0064efault"`)} },
		"half of 1 MiB":        func([]byte) [][]byte { return [][]byte{w.sealed(w.message("ping", `"x": "`+noise(500_000)+`"`))} },
		"half of 1 MiB, blank": func(raw []byte) [][]byte { return [][]byte{bytes.Repeat([]byte("\n"), 1<<19), raw} },
	} {
		t.Run(name, func(t *testing.T) {
			raw := w.sealed(w.message("ping", ""))
			pieces := form(raw)
			if name == "half of 1 MiB" {
				raw = pieces[0]
			}
			conn, err := w.dial(patience)
			must(t, err)
			defer conn.Close()
			must(t, conn.SetNoDelay(true))
			for _, piece := range pieces {
				_, err := conn.Write(piece)
				must(t, err)
				if len(pieces) > 1 {
					time.Sleep(2 * time.Millisecond) // so that they come by themselves
				}
			}
			answer, err := answerOn(conn)
			must(t, err)
			if r := w.opened(t, raw, answer); r.Status != 0 && name != "half of 1 MiB" {
				t.Error(r.Error)
			}
			if n, err := conn.Read(make([]byte, 1)); n > 0 || err != io.EOF {
				t.Errorf("after the answer: %d bytes, %v; want the end", n, err)
			}
		})
	}
	if counts := d.counts(); len(counts) > 0 {
		t.Errorf("counted: %v", counts)
	}
}

// noise is text that does not deflate well.
func noise(n int) string {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	text := make([]byte, n)
	for i := range text {
		text[i] = letters[rand.IntN(len(letters))]
	}
	return string(text)
}

func TestDatagrams(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	for name, form := range map[string]func(raw []byte) []byte{
		"with its NUL": func(raw []byte) []byte { return raw },
		"without":      func(raw []byte) []byte { return raw[:len(raw)-1] },
		"with a line":  func(raw []byte) []byte { return append(append([]byte("\n"), raw...), '\n') },
	} {
		raw := w.sealed(w.message("ping", ""))
		answer, err := w.exchangeUDP(form(bytes.Clone(raw)), patience)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if r := w.opened(t, raw, answer); r.Status != 0 {
			t.Errorf("%s: %s", name, r.Error)
		}
	}
	raw := w.sealed(w.message("daemon_status", ""))
	answer, err := w.exchangeUDP(raw, patience)
	must(t, err)
	if r := w.opened(t, raw, answer); r.Status != 0 || !bytes.Contains(r.Data, []byte(`"listener"`)) {
		t.Errorf("daemon_status over UDP: %s %s", r.Error, r.Data)
	}
}

// TestReplySizes: a reply over 1 KiB is deflated, a shorter one is not, and
// one that fits no datagram says what to do.
func TestReplySizes(t *testing.T) {
	names := []string{"node1", "node2"}
	for range 2000 {
		names = append(names, "n"+strings.NewReplacer("-", "a", "_", "b").Replace(noise(60)))
	}
	d := startLive(t, settings{"cluster.nodes": strings.Join(names, " ")}, nil)
	w := d.client("node2", "127.0.0.2")
	raw := w.sealed(w.message("daemon_status", ""))
	answer, err := w.exchange(raw)
	must(t, err)
	if stored, message := plaintextOf(t, w, raw, answer); stored != storedDeflated || len(answer) <= datagramLimit {
		t.Fatalf("a reply of %d bytes is stored as %d in %d", len(message), stored, len(answer))
	}
	if r := w.opened(t, raw, answer); r.Status != 0 || len(r.Data) < 120_000 {
		t.Errorf("over TCP: %q, %d bytes", r.Error, len(r.Data))
	}
	raw = w.sealed(w.message("daemon_status", ""))
	answer, err = w.exchangeUDP(raw, patience)
	must(t, err)
	if r := w.opened(t, raw, answer); r.Status != 1 || !strings.Contains(r.Error, "does not fit a datagram; use TCP") {
		t.Errorf("over UDP: status %d, %q", r.Status, r.Error)
	}
	raw = w.sealed(w.message("ping", ""))
	answer, err = w.exchange(raw)
	must(t, err)
	if stored, message := plaintextOf(t, w, raw, answer); stored != storedPlain || !json.Valid(message) {
		t.Errorf("a short reply is stored as %d: %q", stored, message)
	}
}

// plaintextOf opens a reply by hand and returns its first byte and the rest,
// inflated.
func plaintextOf(t *testing.T, w wireClient, raw, answer []byte) (stored byte, message []byte) {
	t.Helper()
	request, err := parseEnvelope(bytes.Trim(bytes.Clone(raw), requestBlanks))
	must(t, err)
	e, err := parseEnvelope(bytes.Clone(answer))
	must(t, err)
	aead, nonce := messageCipher(w.key, e.salt, labelReply)
	plain, err := aead.Open(nil, nonce, e.data, messageContext{labelReply, "default", "node1", &request.salt, 0}.additionalData())
	must(t, err)
	if plain[0] == storedPlain {
		return plain[0], plain[1:]
	}
	message, err = io.ReadAll(flate.NewReader(bytes.NewReader(plain[1:])))
	must(t, err)
	return plain[0], message
}

// TestEmptyPackets: which packets are empty, and that silence is not one.
func TestEmptyPackets(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	want := int64(0)
	expect := func(what string, n int64) {
		t.Helper()
		want += n
		waitFor(t, patience, what, func() bool { return d.queue.asked.Load() >= want })
		if got := d.queue.asked.Load(); got != want {
			t.Fatalf("%s: %d triggers, want %d", what, got, want)
		}
	}
	for _, content := range []string{"", "\x00", "\n", " \t\r\n\x00\x00", strings.Repeat("\x00", 3000)} {
		conn, err := w.dial(patience)
		must(t, err)
		conn.Write([]byte(content))
		must(t, conn.CloseWrite())
		if _, err := answerOn(conn); err != io.EOF {
			t.Errorf("%q is answered: %v", content, err)
		}
		conn.Close()
		expect(fmt.Sprintf("a stream of %d bytes %.10q triggers", len(content), content), 1)
		if content == "" {
			continue // nc sends no empty datagrams, but others can
		}
		w.exchangeUDP([]byte(content), time.Millisecond)
		expect(fmt.Sprintf("a datagram of %d bytes %.10q triggers", len(content), content), 1)
	}
	w.exchangeUDP(nil, time.Millisecond)
	expect("a datagram of no bytes triggers", 1)

	// What is no empty packet: a reset, a connection that goes on, the listener's end.
	reset, err := w.dial(patience)
	must(t, err)
	must(t, reset.SetLinger(0))
	reset.Close()
	for _, content := range []string{"", "\n"} {
		conn, err := w.dial(patience)
		must(t, err)
		defer conn.Close()
		conn.Write([]byte(content))
	}
	w.ask(t, "ping", "")
	waitFor(t, patience, "two connections wait", func() bool { return d.listener.conns.len() == 2 })
	if r := d.local("daemon_stop", "thr_id=listener"); r.Status != 0 {
		t.Fatal(r.Error)
	}
	expect("silence and resets trigger", 0)
	if counts := d.counts(); len(counts) > 0 {
		t.Errorf("counted: %v", counts)
	}
}

// TestDequeueRuns: one run at a time, one more pending, the rest dropped; one
// start a second.
func TestDequeueRuns(t *testing.T) {
	record := t.TempDir() + "/nodemgr"
	t.Setenv("FAKE_NODEMGR", record)
	must(t, os.WriteFile(record+".hold", nil, 0o600))
	d := startLive(t, nil, nil)
	lines := func() string { text, _ := os.ReadFile(record); return string(text) }
	empty := func(times int) {
		conn, err := net.Dial("udp", d.addr().String())
		must(t, err)
		defer conn.Close()
		for range times {
			before := d.queue.asked.Load()
			conn.Write([]byte("\n"))
			waitFor(t, patience, "the packet is seen", func() bool { return d.queue.asked.Load() > before })
		}
	}
	empty(1)
	waitFor(t, patience, "nodemgr runs", func() bool { return lines() == "start dequeue actions\n" })
	begun := time.Now()
	empty(50)
	if dropped := d.queue.dropped.Load(); dropped != 49 {
		t.Errorf("%d of 50 were dropped while one ran, want 49", dropped)
	}
	waitFor(t, patience, "a second has passed since the start", func() bool { return time.Since(begun) > dequeueInterval+200*time.Millisecond })
	if got := lines(); got != "start dequeue actions\n" {
		t.Fatalf("a second run began beside the first: %q", got)
	}
	must(t, os.Remove(record+".hold"))
	both := strings.Repeat("start dequeue actions\nend dequeue actions\n", 2)
	waitFor(t, patience, "the pending run follows", func() bool { return lines() == both })

	// Runs that are short begin a second apart.
	base := d.queue.runs.Load()
	begun = time.Now()
	for d.queue.runs.Load() < base+3 {
		empty(1)
		if time.Since(begun) > patience {
			t.Fatal("the runs stopped")
		}
	}
	if took := time.Since(begun); took < 2*dequeueInterval-200*time.Millisecond {
		t.Errorf("three runs began within %s", took)
	}
	if got := d.status().Listener.Stats["dequeue_runs"]; got < base+3 {
		t.Errorf("dequeue_runs is %d, want %d", got, base+3)
	}
}
