// local_test.go: the local socket: what it takes for a request, what it says
// to garbage, who may use it.

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// localConn talks to a local socket by hand.
type localConn struct {
	*net.UnixConn
	t  *testing.T
	in *bufio.Reader
}

func (d *liveDaemon) localConn(t *testing.T) localConn {
	t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: d.paths.socket(), Net: "unix"})
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	return localConn{conn, t, bufio.NewReader(conn)}
}

func (c localConn) send(text string) {
	c.t.Helper()
	_, err := c.Write([]byte(text))
	must(c.t, err)
}

// reply reads a line, which must be one whole reply.
func (c localConn) reply() (r replyJSON) {
	c.t.Helper()
	line, err := c.in.ReadBytes('\n')
	must(c.t, err)
	if err := json.Unmarshal(line, &r); err != nil {
		c.t.Fatalf("a reply is no line of JSON: %q", line)
	}
	return r
}

func (c localConn) wantEnd() {
	c.t.Helper()
	if rest, err := io.ReadAll(c.in); len(rest) > 0 || err != nil && !isReset(err) {
		c.t.Errorf("after the last reply: %q, %v; want the end", rest, err)
	}
}

func TestLocalSocketIsPrivate(t *testing.T) {
	d := startLive(t, nil, nil)
	info, err := os.Stat(d.paths.socket())
	must(t, err)
	if info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %s", info.Mode())
	}
	r := d.local("ping")
	if r.Status != 0 || !strings.Contains(string(r.Data), `"node1"`) {
		t.Errorf("ping: %+v", r)
	}
	if os.Geteuid() != 0 {
		return // who is not root cannot become another user to ask as
	}
	// Even one who gets as far as the socket is asked who he is.
	for _, dir := range []string{filepath.Dir(d.paths.run), d.paths.run} {
		must(t, os.Chmod(dir, 0o755))
	}
	must(t, os.Chmod(d.paths.socket(), 0o666))
	c := d.localConnAs(t, 65534)
	if r := c.reply(); r.Status != 1 || !strings.HasPrefix(r.Error, "user 65534 may not ask this daemon") {
		t.Errorf("another user's request: %+v", r)
	}
	c.wantEnd()
}

// localConnAs connects as another user: the kernel keeps users by thread, and
// this one ends with its goroutine.
func (d *liveDaemon) localConnAs(t *testing.T, uid uintptr) (c localConn) {
	t.Helper()
	var conn *net.UnixConn
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
			err = errno
			return
		}
		conn, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: d.paths.socket(), Net: "unix"})
	}()
	<-done
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	must(t, conn.SetDeadline(time.Now().Add(patience)))
	return localConn{conn, t, bufio.NewReader(conn)}
}

func TestLocalRequestForms(t *testing.T) {
	d := startLive(t, nil, nil)
	const ping = `{"action": "ping"}`
	for name, text := range map[string]string{
		"a newline each":    ping + "\n" + ping + "\n" + ping + "\n",
		"a NUL each":        ping + "\x00" + ping + "\x00" + ping + "\x00",
		"both":              ping + "\x00\n" + ping + "\n\x00" + ping + "\r\n\x00",
		"blanks before":     "\n\x00\t " + ping + "\n\n\n\x00\x00" + ping + "\n" + ping + "\n",
		"over many lines":   strings.ReplaceAll(ping, " ", "\n") + "\n" + ping + "\n" + ping + "\n",
		"all that it takes": `{"action": "ping", "options": {}, "time": 1, "to": "node9"}` + "\n" + ping + "\n" + ping + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := d.localConn(t)
			c.send(text)
			for range 3 {
				if r := c.reply(); r.Status != 0 || !strings.Contains(string(r.Data), agentVersion) {
					t.Errorf("%+v", r)
				}
			}
			must(t, c.CloseWrite())
			c.wantEnd()
		})
	}
	t.Run("a connection for all", func(t *testing.T) {
		c := d.localConn(t)
		for range 500 {
			c.send(ping + "\n")
			if r := c.reply(); r.Status != 0 {
				t.Fatal(r.Error)
			}
		}
	})
	t.Run("not ended yet", func(t *testing.T) {
		c := d.localConn(t)
		c.send(ping) // the object is whole: what ends it may still come
		if r := c.reply(); r.Status != 0 {
			t.Error(r.Error)
		}
	})
	t.Run("in pieces", func(t *testing.T) {
		c := d.localConn(t)
		for _, piece := range strings.SplitAfter(ping+"\n", "") {
			c.send(piece)
		}
		if r := c.reply(); r.Status != 0 {
			t.Error(r.Error)
		}
	})
}

func TestLocalRefusals(t *testing.T) {
	d := startLive(t, nil, nil)
	for name, test := range map[string]struct{ text, says string }{
		"unknown action":     {`{"action": "nonsense"}`, `unknown action "nonsense"; there are: `},
		"no action":          {`{}`, `unknown action ""`},
		"unknown option":     {`{"action": "ping", "options": {"x": 1}}`, `unknown option "x": ping takes none`},
		"option's type":      {`{"action": "daemon_stop", "options": {"thr_id": ["listener"]}}`, `option "thr_id" of daemon_stop must be a string`},
		"unknown thread":     {`{"action": "daemon_stop", "options": {"thr_id": "hb#1.rx"}}`, `unknown thread "hb#1.rx"; there are: listener`},
		"no thread":          {`{"action": "daemon_start"}`, "the daemon runs"},
		"a list":             {`["ping"]`, "the request is not of the form"},
		"a string":           {`"ping"`, "the request is not of the form"},
		"an action's number": {`{"action": 5}`, "the request is not of the form"},
	} {
		t.Run(name, func(t *testing.T) {
			c := d.localConn(t)
			c.send(test.text + "\n" + `{"action": "ping"}` + "\n")
			if r := c.reply(); r.Status != 1 || !strings.HasPrefix(r.Error, test.says) || r.Time == 0 {
				t.Errorf("%+v; want %q", r, test.says)
			}
			if r := c.reply(); r.Status != 0 {
				t.Errorf("the next request: %s", r.Error)
			}
		})
	}
	for name, text := range map[string]string{
		"garbage":         "GET / HTTP/1.1\r\n\r\n",
		"half a request":  `{"action": "pi`,
		"a NUL in a text": "{\"action\": \"pi\x00ng\"}\n",
		"random bytes":    "\x01\x02\xff\xfe{{{\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := d.localConn(t)
			c.send(text)
			must(t, c.CloseWrite())
			if r := c.reply(); r.Status != 1 || !strings.HasPrefix(r.Error, "cannot read the request, a line") {
				t.Errorf("%+v", r)
			}
			c.wantEnd()
		})
	}
	if counts := d.counts(); len(counts) > 0 {
		t.Errorf("the local socket is on the blacklist: %v", counts)
	}
}

// TestLocalRequestLimit: 1 MiB each, however many there are.
func TestLocalRequestLimit(t *testing.T) {
	d := startLive(t, nil, nil)
	sized := func(n int) string {
		return `{"action": "ping", "options": {"` + strings.Repeat("x", n) + `": 1}}` + "\n"
	}
	c := d.localConn(t)
	for range 4 {
		c.send(sized(900_000))
		if r := c.reply(); !strings.HasPrefix(r.Error, "unknown option") {
			t.Fatalf("a request of 900 kB: %.100s", r.Error)
		}
	}
	c = d.localConn(t)
	c.Write([]byte(sized(3 << 20))) // fails when the other side closes
	if r := c.reply(); r.Status != 1 || !strings.Contains(r.Error, fmt.Sprintf("at most %d bytes", requestLimit)) {
		t.Errorf("a request of 3 MiB: %.200s", r.Error)
	}
	c.wantEnd()
	c = d.localConn(t)
	c.Write([]byte(strings.Repeat("\n", 3<<20)))
	c.wantEnd()
}

// TestLocalManyAtOnce: connections beyond the limit are closed, and places are
// given back.
func TestLocalManyAtOnce(t *testing.T) {
	d := startLive(t, nil, nil)
	var conns []localConn
	for range localLimit {
		c := d.localConn(t)
		c.send(`{"action": "ping"}` + "\n")
		c.reply()
		conns = append(conns, c)
	}
	beyond := d.localConn(t)
	beyond.wantEnd()
	var asking sync.WaitGroup
	for _, c := range conns {
		asking.Go(func() { fmt.Fprintln(c, `{"action": "daemon_status"}`) })
	}
	asking.Wait()
	for _, c := range conns {
		if r := c.reply(); r.Status != 0 {
			t.Fatal(r.Error)
		}
		c.Close()
	}
	waitFor(t, patience, "a place is free again", func() bool {
		c := d.localConn(t)
		fmt.Fprintln(c, `{"action": "ping"}`)
		_, err := c.in.ReadBytes('\n')
		return err == nil
	})
}

// TestLocalWithoutListener: the socket is the supervisor's.
func TestLocalWithoutListener(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	for range 3 {
		if r := d.local("daemon_stop", "thr_id=listener"); r.Status != 0 {
			t.Fatal(r.Error)
		}
		if state := d.status().Listener.State; state != "stopped" {
			t.Fatalf("after daemon_stop the listener is %q", state)
		}
		if w.answers() {
			t.Fatal("a stopped listener answers")
		}
		if r := d.local("daemon_start", "thr_id=listener"); r.Status != 0 {
			t.Fatal(r.Error)
		}
		if state := d.status().Listener.State; state != "running" {
			t.Fatalf("after daemon_start the listener is %q", state)
		}
		waitFor(t, patience, "the listener answers again", w.answers)
	}
	created := d.status().Listener.Created
	d.local("daemon_start", "thr_id=listener") // one that runs goes on
	if again := d.status().Listener.Created; again != created {
		t.Error("daemon_start started a running thread anew")
	}
}
