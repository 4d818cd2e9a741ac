// limits_test.go: what one who is not authenticated can take: places, bytes,
// time. And that those who are keep theirs.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// heldRunner is a runner whose commands wait while it is held, so that a
// node_status is in service for as long as a test wants.
type heldRunner struct {
	held    atomic.Bool
	waiting atomic.Int64
	release chan struct{}
	once    sync.Once
}

// hold makes d's release.command wait from now on. The commands end at the
// test's end at the latest.
func hold(set settings, before func(*liveDaemon)) (settings, func(*liveDaemon), *heldRunner) {
	h := &heldRunner{release: make(chan struct{})}
	set["release.command"] = "/bin/true"
	return set, func(d *liveDaemon) {
		d.tb.Cleanup(h.letGo)
		d.run = func(_ context.Context, _ []string, stdout, _ io.Writer) (int, error) {
			if h.held.Load() {
				h.waiting.Add(1)
				<-h.release
			}
			fmt.Fprintln(stdout, "4.11")
			return 0, nil
		}
		if before != nil {
			before(d)
		}
	}, h
}

func startHeld(t *testing.T, set settings) (*liveDaemon, *heldRunner) {
	t.Helper()
	set, before, h := hold(set, nil)
	d := startLive(t, set, before)
	t.Cleanup(h.letGo) // before the daemon's own end
	d.local("node_status")
	h.held.Store(true)
	return d, h
}

func (h *heldRunner) letGo() { h.once.Do(func() { close(h.release) }) }

// serving sends a node_status and returns when it is in service.
func (h *heldRunner) serving(t *testing.T, w wireClient) (conn *net.TCPConn, raw []byte) {
	t.Helper()
	conn, err := w.dial(patience)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	before := h.waiting.Load()
	raw = w.sealed(w.message("node_status", ""))
	_, err = conn.Write(raw)
	must(t, err)
	waitFor(t, patience, "the request is in service", func() bool { return h.waiting.Load() > before })
	return conn, raw
}

// silent connects, sends a byte that begins a request, and waits for its place.
func (d *liveDaemon) silent(t *testing.T, from string) net.Conn {
	t.Helper()
	conn, err := d.client("node2", from).dial(patience)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	waitFor(t, patience, "the connection has its place", func() bool {
		d.listener.conns.mu.Lock()
		defer d.listener.conns.mu.Unlock()
		last := d.listener.conns.waiting.Back()
		return last != nil && last.Value.(*connection).RemoteAddr().String() == conn.LocalAddr().String()
	})
	return conn
}

// isOpen tells whether the other side has closed conn.
func isOpen(conn net.Conn) bool {
	conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, err := conn.Read(make([]byte, 1))
	return errors.Is(err, os.ErrDeadlineExceeded)
}

func wantClosed(t *testing.T, name string, conn net.Conn) {
	t.Helper()
	waitFor(t, patience, name+" is closed", func() bool { return !isOpen(conn) })
}

func TestSourceHasAQuarter(t *testing.T) {
	d, h := startHeld(t, settings{"listener.max_connections": "16"})
	w := d.client("node2", "127.0.0.2")
	served, raw := h.serving(t, w) // the oldest of all
	a, b, c := d.silent(t, w.from), d.silent(t, w.from), d.silent(t, w.from)
	elsewhere := d.silent(t, "127.0.0.3")
	e := d.silent(t, w.from)
	wantClosed(t, "the oldest that waits", a)
	for i, conn := range []net.Conn{b, c, e, elsewhere} {
		if !isOpen(conn) {
			t.Errorf("connection %d was closed", i)
		}
	}
	if closed := d.status().Listener.Stats["closed_for_room"]; closed != 1 {
		t.Errorf("closed_for_room is %d", closed)
	}
	// Places that are all in service are not taken from those who have them.
	conns, raws := []*net.TCPConn{served}, [][]byte{raw}
	for range 3 {
		conn, raw := h.serving(t, w)
		conns, raws = append(conns, conn), append(raws, raw)
	}
	wantClosed(t, "the next oldest", b)
	wantClosed(t, "the third", c)
	wantClosed(t, "the fourth", e)
	if answer, err := w.exchange(w.aged(0)); err != io.EOF {
		t.Errorf("a fifth beside four in service: %q, %v", answer, err)
	}
	if other := d.client("node2", "127.0.0.4"); !other.answers() {
		t.Error("another source has no place")
	}
	h.letGo()
	for i, conn := range conns {
		answer, err := answerOn(conn)
		must(t, err)
		if r := w.opened(t, raws[i], answer); r.Status != 0 {
			t.Error(r.Error)
		}
	}
	if !isOpen(elsewhere) {
		t.Error("the connection from elsewhere was closed")
	}
	if counts := d.counts(); len(counts) > 0 {
		t.Errorf("to be closed for room was counted: %v", counts)
	}
}

func TestConnectionLimit(t *testing.T) {
	d, h := startHeld(t, settings{"listener.max_connections": "8"})
	served, raw := h.serving(t, d.client("node2", "127.0.0.2"))
	var waiting []net.Conn
	for i := range 7 {
		waiting = append(waiting, d.silent(t, fmt.Sprintf("127.0.1.%d", 1+i)))
	}
	for i := range 5 {
		waiting = append(waiting, d.silent(t, fmt.Sprintf("127.0.2.%d", 1+i)))
		wantClosed(t, fmt.Sprintf("the oldest, number %d,", i), waiting[i])
	}
	for i, conn := range waiting[5:] {
		if !isOpen(conn) {
			t.Errorf("a newer connection, number %d, was closed", 5+i)
		}
	}
	if n := d.listener.conns.len(); n != 8 {
		t.Errorf("%d connections, want the limit", n)
	}
	if !d.client("node3", "127.0.0.3").answers() {
		t.Error("a well-behaved client has no place")
	}
	h.letGo()
	answer, err := answerOn(served)
	must(t, err)
	d.client("node2", "127.0.0.2").opened(t, raw, answer)
}

// TestUsersDoNotDisplaceRoot: connections of an ordinary user of a machine take
// no place from those of its root, as on the blacklist. Else they could have
// this node's questions look denied, after which the peer is left alone.
func TestUsersDoNotDisplaceRoot(t *testing.T) {
	d := startLive(t, settings{"listener.max_connections": "16"}, nil)
	w := d.client("node2", "127.0.0.2")
	if w.privileged = true; os.Geteuid() != 0 {
		return // there is no root here to displace
	}
	conn, err := w.dial(patience)
	must(t, err)
	defer conn.Close()
	raw := w.aged(0)
	_, err = conn.Write(raw[:100])
	must(t, err)
	waitFor(t, patience, "root's connection has its place", func() bool { return d.listener.conns.len() == 1 })
	for range 8 {
		d.silent(t, w.from)
	}
	var roots []net.Conn
	for range 3 {
		another, err := w.dial(patience)
		must(t, err)
		defer another.Close()
		roots = append(roots, another)
	}
	waitFor(t, patience, "root has all places", func() bool {
		d.listener.conns.mu.Lock()
		defer d.listener.conns.mu.Unlock()
		for element := d.listener.conns.waiting.Front(); element != nil; element = element.Next() {
			if element.Value.(*connection).RemoteAddr().(*net.TCPAddr).Port >= privilegedPorts {
				return false
			}
		}
		return d.listener.conns.waiting.Len() == 4
	})
	user := w
	user.privileged = false
	late, err := user.dial(patience)
	must(t, err)
	defer late.Close()
	wantClosed(t, "a user's connection, for which there is no place,", late)
	for _, another := range roots {
		if !isOpen(another) {
			t.Error("root's connection made room for a user's")
		}
	}
	conn.Write(raw[100:])
	if answer, err := answerOn(conn); err != nil {
		t.Errorf("root's request beside the silent connections of a user: %q, %v", answer, err)
	}
}

func TestSourcePrefix(t *testing.T) {
	for _, test := range []struct{ addr, want string }{
		{"127.0.0.5", "127.0.0.5/32"},
		{"::ffff:127.0.0.5", "127.0.0.5/32"},
		{"2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"},
		{"fe80::1%eth0", "fe80::/64"},
	} {
		if got := sourcePrefix(netip.MustParseAddr(test.addr)).String(); got != test.want {
			t.Errorf("%s counts as %s, want %s", test.addr, got, test.want)
		}
	}
}

// TestUnknownBytes: 100 requests of 1 MB that never end take 8 MiB together,
// and leave room for one that does.
func TestUnknownBytes(t *testing.T) {
	d := startLive(t, nil, nil)
	taken := func() int {
		d.listener.conns.mu.Lock()
		defer d.listener.conns.mu.Unlock()
		return d.listener.conns.bytes
	}
	ctx, cancel := context.WithCancel(t.Context())
	var sampling, sending sync.WaitGroup
	highest := 0
	sampling.Go(func() {
		for ctx.Err() == nil {
			highest = max(highest, taken())
		}
	})
	piece := []byte(strings.Repeat("x", 1_000_000))
	for i := range 100 {
		conn, err := d.client("node2", fmt.Sprintf("127.0.4.%d", 1+i%3)).dial(patience)
		must(t, err)
		defer conn.Close()
		sending.Go(func() { conn.Write(piece) }) // fails where it is closed
	}
	sending.Wait()
	w := d.client("node2", "127.0.4.1")
	for range 20 {
		if !w.answers() {
			t.Error("no room for a small request")
		}
	}
	cancel()
	sampling.Wait()
	if highest > unknownBytes || unknownBytes > 8<<20 {
		t.Errorf("%d bytes of unauthenticated requests at once", highest)
	}
	if highest < unknownBytes/2 {
		t.Errorf("only %d bytes at once: this test does not reach the limit", highest)
	}
	if d.listener.conns.closed.Load() == 0 {
		t.Error("nothing was closed for room")
	}
	if counts := d.counts(); len(counts) > 0 {
		t.Errorf("to be closed for room was counted: %v", counts)
	}
	d.local("daemon_stop", "thr_id=listener")
	waitFor(t, patience, "all bytes are given back", func() bool { return taken() == 0 && d.listener.conns.len() == 0 })
}

// TestBytesAreTakenFromWhoHasThem: when the bytes run out, those go who took
// them, and not a client with a small request that was there before.
func TestBytesAreTakenFromWhoHasThem(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	conn, err := w.dial(patience)
	must(t, err)
	defer conn.Close()
	raw := w.aged(0)
	_, err = conn.Write(raw[:100])
	must(t, err)
	waitFor(t, patience, "the half has come", func() bool { return d.listener.conns.len() == 1 })
	begun := time.Now()
	piece := []byte(strings.Repeat("x", 1_000_000))
	var sending sync.WaitGroup
	for range 20 {
		greedy, err := d.client("node2", "127.0.4.1").dial(patience)
		must(t, err)
		defer greedy.Close()
		sending.Go(func() { greedy.Write(piece) })
	}
	sending.Wait()
	conn.Write(raw[100:])
	if answer, err := answerOn(conn); err != nil {
		t.Errorf("a request of %d bytes, complete after %s, beside 20 of 1 MB from elsewhere: %q, %v", len(raw), time.Since(begun), answer, err)
	}
}

// TestDeadline: a request has 5 s to be complete, from the connection on, no
// matter how often a byte comes.
func TestDeadline(t *testing.T) {
	d := startLive(t, nil, nil)
	begun := time.Now()
	var clients sync.WaitGroup
	run := func(from string, f func(w wireClient, conn *net.TCPConn)) {
		w := d.client("node2", from)
		conn, err := w.dial(patience)
		must(t, err)
		clients.Go(func() {
			defer conn.Close()
			f(w, conn)
		})
	}
	closedInTime := func(name string, err error) {
		if took := time.Since(begun); took < 4900*time.Millisecond || took > 9*time.Second {
			t.Errorf("%s: closed after %s", name, took)
		}
		if !isReset(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	run("127.0.5.1", func(w wireClient, conn *net.TCPConn) { // drips
		for _, b := range w.aged(0) {
			conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				closedInTime("dripping", err)
				return
			}
			conn.Write([]byte{b})
		}
		t.Error("a request that drips for 10 s was taken")
	})
	run("127.0.5.2", func(_ wireClient, conn *net.TCPConn) { // silent
		_, err := conn.Read(make([]byte, 1))
		closedInTime("silence", err)
	})
	run("127.0.5.3", func(_ wireClient, conn *net.TCPConn) { // blanks
		for range 200 {
			conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				closedInTime("blanks", err)
				return
			}
			conn.Write([]byte("\n"))
		}
		t.Error("blanks for 10 s were taken")
	})
	run("127.0.5.4", func(w wireClient, conn *net.TCPConn) { // slow, but in time
		raw := w.aged(0)
		for rest := raw; len(rest) > 0; rest = rest[min(40, len(rest)):] {
			conn.Write(rest[:min(40, len(rest))])
			time.Sleep(100 * time.Millisecond)
		}
		if answer, err := answerOn(conn); err != nil || len(answer) == 0 {
			t.Errorf("a request that took a second: %v", err)
		}
	})
	clients.Wait()
	counts := d.counts()
	if len(counts) != 1 || counts["127.0.5.1 -"] != 1 {
		t.Errorf("counts: %v; want only the incomplete request's", counts)
	}
	if asked := d.queue.asked.Load(); asked > 0 {
		t.Errorf("silence triggered %d times", asked)
	}
}

// TestFinish: a client that does not close after its reply is closed a second
// later, and its port is free at once for it closes second.
func TestFinish(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	conn, err := w.dial(patience)
	must(t, err)
	defer conn.Close()
	begun := time.Now()
	_, err = conn.Write(w.aged(0))
	must(t, err)
	if _, err := answerOn(conn); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the reply: %v; want the end of the stream", err)
	}
	waitFor(t, patience, "the connection is given up", func() bool { return d.listener.conns.len() == 0 })
	if took := time.Since(begun); took < finishDelay || took > finishDelay+5*time.Second {
		t.Errorf("after %s", took)
	}
}
