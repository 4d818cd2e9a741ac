// logs_test.go: service logs on one node: what a line is, rotation, backlogs,
// following, and the streams by which they are asked for.

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

// labLog is a log in a folder of its own.
func labLog(t *testing.T, limit int64) (*serviceLog, *logText) {
	t.Helper()
	dir := t.TempDir()
	said := &logText{}
	l := newServiceLog(paths{log: dir}, func() string { return "node1" }, startWatcher(t), slog.New(slog.NewTextHandler(said, nil)))
	l.limit = limit
	return l, said
}

// collect is the texts of a stream without follow.
func (l *serviceLog) collect(t *testing.T, backlog int64) (texts []string) {
	t.Helper()
	must(t, l.stream(t.Context(), "svc1", backlog, false, func(data any) error {
		texts = append(texts, textsOf(data.(logFrame).Lines)...)
		return nil
	}))
	return texts
}

// textsOf are the lines without what stands before their text.
func textsOf(lines []string) (texts []string) {
	for _, line := range lines {
		words := strings.SplitN(line, " ", 5)
		texts = append(texts, words[len(words)-1])
	}
	return texts
}

// followed is what a follower has got.
type followed struct {
	mu    sync.Mutex
	lines []string
	live  bool
}

func (f *followed) texts() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return textsOf(f.lines)
}

// startFollow follows svc1; it has begun when startFollow returns.
func startFollow(t *testing.T, l *serviceLog, backlog int64, took func(logFrame)) *followed {
	t.Helper()
	f := &followed{}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- l.stream(ctx, "svc1", backlog, true, func(data any) error {
			f.mu.Lock()
			f.lines = append(f.lines, data.(logFrame).Lines...)
			f.live = data.(logFrame).Live
			f.mu.Unlock()
			if took != nil {
				took(data.(logFrame))
			}
			return nil
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, errStreamEnds) {
			t.Errorf("following ended with %v", err)
		}
	})
	waitFor(t, patience, "live", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.live })
	return f
}

func TestLogEntry(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 22, 20, 31, 34, 123_900_000, time.FixedZone("", 3600))
	const begin = "2026-11-22T19:31:34.123Z "
	tests := []struct {
		name  string
		level slog.Level
		rid   string
		text  string
		want  string
	}{
		{"a line", slog.LevelInfo, "app#1", "started", "info node1 app#1 started\n"},
		{"the instance", slog.LevelError, "", "no start", "error node1 - no start\n"},
		{"several lines", slog.LevelWarn, "app#1", "a\nb\r\n\n c\n", "warn node1 app#1 a\n" + begin + "warn node1 app#1 b\n" + begin + "warn node1 app#1 c\n"},
		{"blank", slog.LevelInfo, "app#1", " \n\t\n", ""},
		{"control characters", slog.LevelDebug, "app#1", "a\tb\x1b[31mc\x00\u202e\u2028d", "debug node1 app#1 a b\ufffd[31mc\ufffd\ufffd d\n"},
		{"invalid UTF-8", slog.LevelInfo, "app#1", "a\xff\xc3", "info node1 app#1 a\ufffd\ufffd\n"},
		{"long", slog.LevelInfo, "app#1", strings.Repeat("é", logLineSize), "info node1 app#1 " + strings.Repeat("é", logLineSize/2) + "…\n"},
		{"levels between", slog.LevelInfo + 1, "app#1", "x", "info node1 app#1 x\n"},
	}
	for _, test := range tests {
		want := test.want
		if want != "" {
			want = begin + want
		}
		if got := string(logEntry(at, test.level, "node1", test.rid, test.text)); got != want {
			t.Errorf("%s: %q, want %q", test.name, got, want)
		}
	}
}

func FuzzLogLine(f *testing.F) {
	for _, seed := range []string{"", "x", "2026-11-22T19:31:34.123Z info node1 - x", "2026-11-22T19:31:34Z", "2026-11-22T19:31:34.123+01:00 x", "0000-00-00T00:00:00.000Z", "a\nb\x00\xff"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if at, ok := timeOfLine(text); ok {
			if again, ok := timeOfLine(at.Format(logTime) + " x"); !ok || again.Sub(at).Abs() >= time.Millisecond {
				t.Errorf("%q: %s, then %s", text, at, again)
			}
		}
		now := time.Now()
		for line := range bytes.Lines(logEntry(now, slog.LevelInfo, "node1", "app#1", text)) {
			line, ended := bytes.CutSuffix(line, []byte("\n"))
			at, ok := timeOfLine(string(line))
			switch {
			case !ok || at.UnixMilli() != now.UnixMilli():
				t.Errorf("%q: time %s", line, at)
			case !ended || !utf8.Valid(line) || bytes.ContainsFunc(line, unicode.IsControl):
				t.Errorf("%q is no line", line)
			case len(line) >= logFrameSize:
				t.Errorf("a line of %d bytes", len(line))
			}
		}
	})
}

func TestLogRotation(t *testing.T) {
	t.Parallel()
	const limit = 4096
	l, said := labLog(t, limit)
	path := l.paths.serviceLog("svc1")
	for i := range 300 {
		l.write(slog.LevelInfo, "svc1", "app#1", fmt.Sprint("line ", i))
		for _, name := range []string{path, rotatedLog(path)} {
			if info, err := os.Stat(name); err == nil && info.Size() > limit {
				t.Fatalf("%s has %d bytes", name, info.Size())
			}
		}
	}
	texts := l.collect(t, -1)
	if len(texts) < limit/50 {
		t.Errorf("only %d lines are kept", len(texts))
	}
	for i, text := range texts {
		if want := fmt.Sprint("line ", 300-len(texts)+i); text != want {
			t.Fatalf("line %d is %q, want %q", i, text, want)
		}
	}
	if left, _ := os.ReadDir(l.paths.log); len(left) != 2 {
		t.Errorf("files: %v", left)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if said.text.Len() > 0 {
		t.Errorf("logged: %s", said.text.String())
	}
}

func TestLogBacklog(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name           string
		older, current string
		backlog        int64
		want           string // lines
	}{
		{"none", "", "aa\nbb\n", 0, ""},
		{"a byte", "", "aa\nbb\n", 1, ""},
		{"less than a line", "", "aa\nbb\n", 2, ""},
		{"a line", "", "aa\nbb\n", 3, "bb"},
		{"more than a line", "", "aa\nbb\n", 5, "bb"},
		{"just all", "", "aa\nbb\n", 6, "aa bb"},
		{"more than all", "", "aa\nbb\n", 100, "aa bb"},
		{"all", "", "aa\nbb\n", -1, "aa bb"},
		{"begin of the new file", "oo\n", "aa\nbb\n", 6, "aa bb"},
		{"end of the old file", "oo\n", "aa\nbb\n", 7, "aa bb"},
		{"both files", "nn\noo\n", "aa\n", 6, "oo aa"},
		{"all of both", "nn\noo\n", "aa\n", 9, "nn oo aa"},
		{"all, both", "nn\noo\n", "aa\n", -1, "nn oo aa"},
		{"no new file", "nn\noo\n", "", 3, "oo"},
		{"nothing", "", "", 100, ""},
		{"a part of a line at the end", "", "aa\nb", 100, "aa b"},
		{"within that part", "", "aa\nbbb", 2, ""},
		{"a part of a line between", "nn\no", "aa\n", -1, "nn o aa"},
		{"within the part between", "nn\nooo", "aa\n", 5, "aa"},
	}
	for _, test := range tests {
		l, _ := labLog(t, 1000)
		path := l.paths.serviceLog("svc1")
		for name, text := range map[string]string{path: test.current, rotatedLog(path): test.older} {
			if text != "" {
				must(t, os.WriteFile(name, []byte(text), 0o600))
			}
		}
		if got := strings.Join(l.collect(t, test.backlog), " "); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

// TestLogBacklogInChunks: no frame holds more than its bound, whatever the
// files hold.
func TestLogBacklogInChunks(t *testing.T) {
	t.Parallel()
	l, _ := labLog(t, 1000)
	text := strings.Repeat(strings.Repeat("x", 99)+"\n", 10_000) + strings.Repeat("y", 3*logFrameSize) + "\nz\n"
	must(t, os.WriteFile(l.paths.serviceLog("svc1"), []byte(text), 0o600))
	got := 0
	must(t, l.stream(t.Context(), "svc1", -1, false, func(data any) error {
		size := 0
		for _, line := range data.(logFrame).Lines {
			size += len(line) + 1
		}
		if got += size; size > logFrameSize+1 {
			t.Errorf("a frame of %d bytes", size)
		}
		return nil
	}))
	if got < len(text) || got > len(text)+4 {
		t.Errorf("got %d bytes of %d", got, len(text))
	}
}

// TestLogDiskFull: nothing stops, one error is logged, a torn line harms no
// other.
func TestLogDiskFull(t *testing.T) {
	t.Parallel()
	l, said := labLog(t, 1000)
	path := l.paths.serviceLog("svc1")
	must(t, os.Symlink("/dev/full", path))
	for range 3 {
		l.write(slog.LevelInfo, "svc1", "app#1", "lost")
	}
	if said.count("lines of service logs are lost") != 1 || said.count("no space left") != 1 {
		t.Errorf("logged: %s", said.text.String())
	}
	must(t, os.Remove(path))
	must(t, os.WriteFile(path, []byte("torn"), 0o600))
	l.write(slog.LevelInfo, "svc1", "app#1", "kept")
	if got := l.collect(t, -1); !slices.Equal(got, []string{"torn", "kept"}) {
		t.Errorf("got %q", got)
	}
	if said.count("written again") != 1 {
		t.Errorf("logged: %s", said.text.String())
	}
}

// TestLogFollowThroughRotations: four writers, one of them as another process
// would be, some dozens of rotations, each line once and in order. The writers
// stay within half a file of the reader, so that none may be missing.
func TestLogFollowThroughRotations(t *testing.T) {
	t.Parallel()
	l, _ := labLog(t, 8<<10)
	const writers, each = 4, 500
	room := make(chan struct{}, 60)
	f := startFollow(t, l, 0, func(frame logFrame) {
		for range frame.Lines {
			<-room
		}
	})
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				room <- struct{}{}
				l.write(slog.LevelInfo, "svc1", "app#1", fmt.Sprintf("%d %d", w, i))
			}
		})
	}
	writing.Wait()
	waitFor(t, patience, "all lines", func() bool { return len(f.texts()) >= writers*each })
	next := map[int]int{}
	for _, text := range f.texts() {
		var w, i int
		if _, err := fmt.Sscanf(text, "%d %d", &w, &i); err != nil || i != next[w] {
			t.Fatalf("%q, want %d of writer %d; %v", text, next[w], w, err)
		}
		next[w]++
	}
	if rotated := l.rotations["svc1"]; rotated < 5 {
		t.Errorf("only %d rotations", rotated)
	} else {
		t.Logf("%d rotations", rotated)
	}
}

// TestLogTwoProcesses: lines of another process, which does not rotate, stay
// whole.
func TestLogTwoProcesses(t *testing.T) {
	t.Parallel()
	l, _ := labLog(t, 1<<20)
	other := newServiceLog(l.paths, func() string { return "node1" }, nil, l.log)
	other.limit = 0
	const each = 300
	f := startFollow(t, l, 0, nil)
	var writing sync.WaitGroup
	for w, from := range []*serviceLog{l, other} {
		writing.Go(func() {
			for i := range each {
				from.write(slog.LevelInfo, "svc1", "app#1", fmt.Sprintf("%d %d", w, i))
			}
		})
	}
	writing.Wait()
	waitFor(t, patience, "all lines", func() bool { return len(f.texts()) >= 2*each })
	if got := len(l.collect(t, -1)); got != 2*each {
		t.Errorf("%d lines, want %d", got, 2*each)
	}
}

// TestLogFollowSlowly: a reader that is two files late misses nothing; one
// that is later is told so.
func TestLogFollowSlowly(t *testing.T) {
	t.Parallel()
	for rotations, missing := range map[int]bool{1: false, 2: false, 3: true, 5: true} {
		l, _ := labLog(t, 1)
		hold, held := make(chan struct{}), make(chan struct{}, 1)
		f := startFollow(t, l, 0, func(frame logFrame) {
			if slices.Equal(textsOf(frame.Lines), []string{"first"}) {
				held <- struct{}{}
				<-hold
			}
		})
		want := []string{"first"}
		l.write(slog.LevelInfo, "svc1", "", "first")
		<-held
		for i := range rotations {
			l.write(slog.LevelInfo, "svc1", "", fmt.Sprint(i))
			if i >= rotations-2 {
				want = append(want, fmt.Sprint(i))
			}
		}
		if missing {
			want = slices.Insert(want, 1, "lines are missing here: the log was rotated faster than this reader took it")
		}
		close(hold)
		waitFor(t, patience, fmt.Sprintf("%d rotations: %q", rotations, want), func() bool { return slices.Equal(f.texts(), want) })
		l.write(slog.LevelInfo, "svc1", "", "last")
		waitFor(t, patience, "the last line", func() bool { return slices.Equal(f.texts(), append(want, "last")) })
	}
}

// TestLogFollowOthersHands: a log that does not exist yet, that somebody
// removes, moves or empties.
func TestLogFollowOthersHands(t *testing.T) {
	t.Parallel()
	l, _ := labLog(t, 1<<20)
	path := l.paths.serviceLog("svc1")
	f := startFollow(t, l, -1, nil)
	var want []string
	for _, change := range []struct {
		name string
		do   func() error
	}{
		{"nothing", func() error { return nil }},
		{"removed", func() error { return os.Remove(path) }},
		{"moved, and more is written than after the next change", func() error { return os.Rename(path, path+".old") }},
		{"emptied", func() error { return os.Truncate(path, 0) }},
	} {
		must(t, change.do())
		want = append(want, change.name)
		l.write(slog.LevelInfo, "svc1", "", change.name)
		waitFor(t, patience, change.name, func() bool { return slices.Equal(f.texts(), want) })
	}
}

// TestLogFollowDelay measures; the bound is for a machine that does much else.
func TestLogFollowDelay(t *testing.T) {
	l, _ := labLog(t, 1<<20)
	seen := make(chan time.Time, 1)
	startFollow(t, l, 0, func(frame logFrame) {
		if len(frame.Lines) > 0 {
			seen <- time.Now()
		}
	})
	var delays []time.Duration
	for range 50 {
		begun := time.Now()
		l.write(slog.LevelInfo, "svc1", "app#1", "x")
		delays = append(delays, (<-seen).Sub(begun))
	}
	slices.Sort(delays)
	t.Logf("a line is followed after %s, the slowest of 50 after %s", delays[25], delays[49])
	if delays[25] > 5*time.Second {
		t.Errorf("a line is followed only after %s", delays[25])
	}
}

// ---- Streams ----------------------------------------------------------------

const labService = "[DEFAULT]\nnodes = node1 node2 node3\n[app#1]\nexec = /bin/true\n"

// startLogging is a daemon with a service and a few lines in its log.
func startLogging(t *testing.T) *liveDaemon {
	t.Helper()
	d := startLive(t, nil, nil)
	must(t, os.WriteFile(d.paths.servicePath("svc1"), []byte(labService), 0o600))
	d.logs.write(slog.LevelInfo, "svc1", "app#1", "one\ntwo")
	return d
}

func frameOf(t *testing.T, r replyJSON) (frame logFrame) {
	t.Helper()
	if r.Status != 0 {
		t.Fatalf("a frame says %q", r.Error)
	}
	must(t, json.Unmarshal(r.Data, &frame))
	return frame
}

// wantStream reads a followed log through read: the backlog, then one more
// line.
func wantStream(t *testing.T, d *liveDaemon, read func() replyJSON) {
	t.Helper()
	backlog := read()
	if f := frameOf(t, backlog); !backlog.More || f.Live || !slices.Equal(textsOf(f.Lines), []string{"one", "two"}) {
		t.Fatalf("backlog: %+v", backlog)
	}
	if r := read(); !r.More || string(r.Data) != `{"lines":[],"live":true}` {
		t.Fatalf("end of the backlog: %s", r.Data)
	}
	d.logs.write(slog.LevelInfo, "svc1", "app#1", "three")
	for {
		r := read()
		f := frameOf(t, r)
		if !r.More || !f.Live {
			t.Fatalf("live: %+v", r)
		}
		if len(f.Lines) > 0 {
			if !slices.Equal(textsOf(f.Lines), []string{"three"}) {
				t.Fatalf("live: %q", f.Lines)
			}
			return
		}
	}
}

func (d *liveDaemon) wantNoStream(t *testing.T) {
	t.Helper()
	waitFor(t, patience, "no stream is left", func() bool {
		d.logs.write(slog.LevelInfo, "svc1", "app#1", "is anybody there")
		_, wakes := d.watcher.count()
		return d.streams.Load() == 0 && wakes <= 1 // the monitor looks at the services' folder
	})
}

// sealedStream asks for svc1's log over TCP and returns what reads a frame.
func (d *liveDaemon) sealedStream(t *testing.T, options string) (*net.TCPConn, func() replyJSON) {
	t.Helper()
	w := d.client("node2", "127.0.0.1")
	raw := w.sealed(w.message("service_logs", options))
	conn, err := w.dial(patience)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	_, err = conn.Write(raw)
	must(t, err)
	request, err := parseEnvelope(bytes.Trim(raw, requestBlanks))
	must(t, err)
	a, in, number := caller{cluster: w.cluster, node: w.node, key: w.key}, bufio.NewReader(conn), uint64(0)
	return conn, func() replyJSON {
		t.Helper()
		raw, err := readEnvelope(in)
		must(t, err)
		r, _, err := a.openReply(raw, w.receiver, &request.salt, number)
		must(t, err)
		number++
		return r
	}
}

func TestLogStreamSealed(t *testing.T) {
	t.Parallel()
	d := startLogging(t)
	_, read := d.sealedStream(t, `"svcname": "svc1"`)
	if r := read(); !r.More || !slices.Equal(textsOf(frameOf(t, r).Lines), []string{"one", "two"}) {
		t.Fatalf("%+v", r)
	}
	if r := read(); r.More || r.Status != 0 || string(r.Data) != "null" {
		t.Fatalf("the last frame: %+v", r)
	}
	conn, read := d.sealedStream(t, `"svcname": "svc1", "follow": true`)
	wantStream(t, d, read)
	waitFor(t, patience, "one stream is left", func() bool { return d.streams.Load() == 1 })
	must(t, conn.Close())
	d.wantNoStream(t)
}

// TestLogStreamHalfClosed: nc closes its side when its input ends, and reads
// on.
func TestLogStreamHalfClosed(t *testing.T) {
	t.Parallel()
	d := startLogging(t)
	conn, read := d.sealedStream(t, `"svcname": "svc1", "follow": true, "backlog": "10k"`)
	must(t, conn.CloseWrite())
	wantStream(t, d, read)
	local := d.localConn(t)
	local.send(`{"action": "service_logs", "options": {"svcname": "svc1", "follow": true, "backlog": 0}}`)
	must(t, local.CloseWrite())
	if r := local.reply(); !frameOf(t, r).Live {
		t.Errorf("%+v", r)
	}
	d.logs.write(slog.LevelInfo, "svc1", "app#1", "four")
	if f := frameOf(t, local.reply()); !slices.Equal(textsOf(f.Lines), []string{"four"}) {
		t.Errorf("%+v", f)
	}
	conn.Close()
	local.Close()
	d.wantNoStream(t)
}

func TestLogStreamLocal(t *testing.T) {
	t.Parallel()
	d := startLogging(t)
	conn := d.localConn(t)
	conn.send(`{"action": "service_logs", "options": {"svcname": "svc1"}}` + "\n" + `{"action": "ping"}` + "\n")
	if r := conn.reply(); !r.More || len(frameOf(t, r).Lines) != 2 {
		t.Errorf("%+v", r)
	}
	if r := conn.reply(); r.More || r.Status != 0 {
		t.Errorf("%+v", r)
	}
	if r := conn.reply(); !strings.Contains(string(r.Data), "node1") {
		t.Errorf("what was asked next: %+v", r)
	}
	conn.send(`{"action": "service_logs", "options": {"svcname": "svc1", "follow": true}}`)
	wantStream(t, d, conn.reply)
	go d.stopped()
	for {
		r := conn.reply()
		if r.More {
			continue
		}
		if r.Error != errStreamEnds.Error() {
			t.Errorf("the daemon's end: %+v", r)
		}
		break
	}
	conn.wantEnd()
}

func TestLogStreamRefused(t *testing.T) {
	t.Parallel()
	d := startLogging(t)
	for options, want := range map[string]string{
		"":                            "name the service in svcname",
		"svcname=svc2":                `there is no service "svc2"`,
		"svcname=svc2 follow=true":    `svc1`,
		"svcname=../x":                "not a service's name",
		"svcname=node":                "cannot be called",
		"svcname=svc1 backlog=-1":     "",
		"svcname=svc1 backlog=1k":     "",
		"svcname=svc1 follow=no-more": "!",
		"svcname=svc1 backlog=1x":     "!",
	} {
		encoded, err := encodeOptions("service_logs", strings.Fields(options))
		if want == "!" {
			if err == nil {
				t.Errorf("%s: encoded", options)
			}
			continue
		}
		must(t, err)
		err = askLocal(t.Context(), d.paths, "service_logs", encoded, nil, discard)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", options, err, want)
		}
	}
	for _, backlog := range []string{`1.5`, `"x"`, `true`, `1e99`, `"9223372036854775807k"`} {
		c := d.localConn(t)
		c.send(`{"action": "service_logs", "options": {"svcname": "svc1", "backlog": ` + backlog + `}}`)
		if r := c.reply(); !strings.Contains(r.Error, "must be an integer, or a size") {
			t.Errorf("backlog %s: %+v", backlog, r)
		}
	}
	w := d.client("node2", "127.0.0.1")
	raw := w.sealed(w.message("service_logs", `"svcname": "svc1"`))
	answer, err := w.exchangeUDP(raw, patience)
	must(t, err)
	if r := w.opened(t, raw, answer); r.Status != 1 || !strings.Contains(r.Error, "use TCP") {
		t.Errorf("over UDP: %+v", r)
	}
	d.streams.Store(streamLimit)
	if r := d.local("service_logs", "svcname=svc1"); !strings.Contains(r.Error, "streams are served already") {
		t.Errorf("the 65th: %+v", r)
	}
	waitFor(t, patience, "the 65th is not counted any more", func() bool { return d.streams.CompareAndSwap(streamLimit, 0) })
	// The log of what was deleted is still there to be read.
	must(t, os.Remove(d.paths.servicePath("svc1")))
	must(t, askLocal(t.Context(), d.paths, "service_logs", map[string]json.RawMessage{"svcname": []byte(`"svc1"`)}, nil, discard))
}

// TestLogStreamUnread: who does not read is dropped.
func TestLogStreamUnread(t *testing.T) {
	t.Parallel()
	d := startLogging(t)
	text := strings.Repeat(strings.Repeat("x", 99)+"\n", 40_000)
	must(t, os.WriteFile(d.paths.serviceLog("svc1"), []byte(text), 0o600))
	conn := d.localConn(t)
	conn.send(`{"action": "service_logs", "options": {"svcname": "svc1", "backlog": -1, "follow": true}}`)
	waitFor(t, patience, "the stream begins", func() bool { return d.streams.Load() == 1 })
	waitFor(t, patience, "the stream ends", func() bool { return d.streams.Load() == 0 })
	if all, err := io.ReadAll(conn.in); len(all) >= len(text) {
		t.Errorf("read %d bytes, %v", len(all), err)
	}
}

// ---- svcmgr logs ------------------------------------------------------------

func TestMergeLogs(t *testing.T) {
	t.Parallel()
	line := func(second int, text string) string {
		return time.Date(2026, 1, 1, 0, 0, second, 0, time.UTC).Format(logTime) + " " + text
	}
	tests := []struct {
		name string
		logs [][]string
		want string // the texts
	}{
		{"none", nil, ""},
		{"empty", [][]string{nil, {}}, ""},
		{"three", [][]string{{line(1, "a1"), line(4, "a4")}, {line(2, "b2"), line(5, "b5")}, {line(3, "c3")}}, "a1 b2 c3 a4 b5"},
		{"equal times", [][]string{{line(1, "a"), line(1, "a'")}, {line(1, "b")}, {line(0, "c0"), line(1, "c")}}, "c0 a a' b c"},
		{"without a time", [][]string{{line(1, "a"), "torn", line(3, "a3")}, {line(2, "b")}}, "a torn b a3"},
		{"without a time at the begin", [][]string{{line(1, "a")}, {"torn", line(2, "b")}}, "torn a b"},
		{"a clock that was set back", [][]string{{line(5, "a5"), line(1, "a1")}, {line(3, "b3"), line(6, "b6")}}, "b3 a5 a1 b6"},
	}
	for _, test := range tests {
		var texts []string
		for _, line := range mergeLogs(test.logs) {
			texts = append(texts, line[strings.LastIndexByte(line, ' ')+1:])
		}
		if got := strings.Join(texts, " "); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

func TestLogSeen(t *testing.T) {
	t.Parallel()
	begun := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	line := func(second int) string {
		return begun.Add(time.Duration(second)*time.Second).Format(logTime) + fmt.Sprint(" ", second)
	}
	tests := []struct {
		name  string
		seen  logSeen
		lines []string
		want  int // of them are new
	}{
		{"the first time", logSeen{}, []string{line(1), line(2)}, 2},
		{"some", logSeen{line(2), begun}, []string{line(1), line(2), line(3)}, 1},
		{"all", logSeen{line(2), begun}, []string{line(1), line(2)}, 0},
		{"the last is rotated away", logSeen{line(2), begun}, []string{line(3), line(4)}, 2},
		{"none was there", logSeen{"", begun.Add(2500 * time.Millisecond)}, []string{line(1), line(2), line(3)}, 1},
		{"a clock that was set back", logSeen{line(9), begun}, []string{line(9), line(3)}, 1},
	}
	for _, test := range tests {
		if got := test.seen.missed(test.lines); !slices.Equal(got, test.lines[len(test.lines)-test.want:]) {
			t.Errorf("%s: %q", test.name, got)
		}
	}
}

// TestServiceLogs: svcmgr logs in a cluster of three, of which one is down at
// first, and one goes and comes back.
func TestServiceLogs(t *testing.T) {
	t.Parallel()
	names := []string{"node1", "node2", "node3"}
	ports, folders, addresses := map[string]int{}, map[string]paths{}, settings{}
	for _, name := range names {
		folders[name], ports[name] = newLab(t, nil)
		addresses["listener.addr@"+name], addresses["listener.port@"+name] = "127.0.0.1", fmt.Sprint(ports[name])
	}
	daemons := map[string]*liveDaemon{}
	start := func(name string) { daemons[name] = serveLive(t, folders[name], ports[name], nil) }
	for _, name := range names {
		set := maps.Clone(addresses)
		set["node.name"] = name
		configure(t, folders[name], set)
		must(t, os.WriteFile(folders[name].servicePath("svc1"), []byte(labService), 0o600))
		if name != "node3" {
			start(name)
		}
	}
	write := func(name, text string) { daemons[name].logs.write(slog.LevelInfo, "svc1", "", text) }
	write("node1", "a1")
	time.Sleep(2 * time.Millisecond) // so that the times differ
	write("node2", "b2")
	time.Sleep(2 * time.Millisecond)
	write("node1", "a3")

	view := func(follow bool) (*logView, *logText, *logText) {
		out, said := &logText{}, &logText{}
		return &logView{paths: folders["node1"], self: "node1", nodes: names, service: "svc1", backlog: logBacklog, follow: follow, out: out, said: said}, out, said
	}
	v, out, said := view(false)
	must(t, v.show(t.Context()))
	if got := strings.Join(textsOf(strings.Split(strings.TrimSpace(out.text.String()), "\n")), " "); got != "a1 b2 a3" {
		t.Errorf("merged: %s", got)
	}
	if said.count("node3 is not shown: cannot ask node3 at 127.0.0.1:") != 1 || said.count("\n") != 1 {
		t.Errorf("said: %s", said.text.String())
	}

	v, out, said = view(true)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- v.show(ctx) }()
	waitText := func(l *logText, text string) {
		t.Helper()
		waitFor(t, patience, text, func() bool { return l.count(text) == 1 })
	}
	waitText(out, "- a3\n")
	write("node2", "b4")
	waitText(out, "- b4\n")
	start("node3")
	waitText(said, "node3 is shown again")
	write("node3", "c5")
	waitText(out, "- c5\n")
	daemons["node2"].stopped()
	waitText(said, "node2 is not shown")
	l := newServiceLog(folders["node2"], func() string { return "node2" }, nil, slog.New(slog.DiscardHandler))
	l.write(slog.LevelInfo, "svc1", "", "b6, missed") // as the guard does
	start("node2")
	waitText(said, "node2 is shown again")
	write("node2", "b7")
	waitText(out, "- b7\n")
	waitText(out, "- b6, missed\n")
	daemons["node1"].stopped()
	waitText(said, "node1 is not shown")
	write("node3", "c8")
	waitText(out, "- c8\n")
	cancel()
	must(t, <-ended)
	for _, text := range []string{"a1", "b2", "a3", "b4", "c5", "b6, missed", "b7", "c8"} {
		if out.count("- "+text+"\n") != 1 {
			t.Errorf("%q is there %d times", text, out.count("- "+text+"\n"))
		}
	}
	daemons["node2"].stopped()
	daemons["node3"].stopped()
	v, _, said = view(false)
	var exit exitError
	if err := v.show(t.Context()); !errors.As(err, &exit) || exit.status != exitFailed {
		t.Errorf("no node answers: %v", err)
	}
	if said.count("\n") != 3 || said.count("node1 is not shown: "+errNoDaemon.Error()) != 1 {
		t.Errorf("said: %s", said.text.String())
	}
}

// TestServiceLogsCommands goes through real processes.
func TestServiceLogsCommands(t *testing.T) {
	t.Parallel()
	d := startReal(t, nil)
	must(t, os.WriteFile(d.paths.servicePath("svc1"), []byte("[DEFAULT]\nnodes = node1\n[app#1]\nexec = /bin/true\n"), 0o600))
	l := newServiceLog(d.paths, func() string { return "node1" }, nil, slog.New(slog.DiscardHandler))
	l.write(slog.LevelWarn, "svc1", "app#1", "hello")
	out, err := realCommand(t, d.paths, "svcmgr", "-s", "svc1", "logs").Output()
	if err != nil || !strings.HasSuffix(string(out), " warn node1 app#1 hello\n") {
		t.Errorf("%q, %v", out, err)
	}
	out, err = realCommand(t, d.paths, "svcmgr", "-s", "svc2", "logs").CombinedOutput()
	if err == nil || !strings.Contains(string(out), `there is no service "svc2"`) {
		t.Errorf("%q, %v", out, err)
	}
	call := realCommand(t, d.paths, "call", "service_logs", "svcname=svc1", "follow=true")
	lines, err := call.StdoutPipe()
	must(t, err)
	must(t, call.Start())
	defer call.Wait()
	defer call.Process.Kill()
	in := bufio.NewReader(lines)
	for i := range 3 {
		if i == 2 {
			l.write(slog.LevelWarn, "svc1", "app#1", "again")
		}
		line, err := in.ReadBytes('\n')
		if err != nil || !json.Valid(line) || bytes.Contains(line, []byte("again")) != (i == 2) {
			t.Fatalf("frame %d: %q, %v", i, line, err)
		}
	}
	// As nc would: what agentd seal wrote goes out, what came goes to agentd open.
	seal := realCommand(t, d.paths, "seal")
	seal.Stdin = strings.NewReader(`{"action": "service_logs", "options": {"svcname": "svc1"}}`)
	sealed, err := seal.Output()
	must(t, err)
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", d.port))
	must(t, err)
	defer conn.Close()
	_, err = conn.Write(sealed)
	must(t, err)
	open := realCommand(t, d.paths, "open")
	open.Stdin = conn
	out, err = open.Output()
	if err != nil || strings.Count(string(out), "\n") != 2 || !strings.Contains(string(out), "again") {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := os.Stat(filepath.Join(d.paths.log, "svc2.log")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the log of a service that is not: %v", err)
	}
}
