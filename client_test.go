// client_test.go: how asking a node ends, what the client makes of a peer that
// is silent, wrong or hostile, and whom it leaves alone.

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fakePeer answers as node2 in whatever way a test wants. Each connection's
// request has been read and opened when answer gets it.
type fakePeer struct {
	t      *testing.T
	key    masterKey
	port   int
	asked  atomic.Int64
	mu     sync.Mutex
	times  []int64 // of the requests
	ports  []int   // that they came from
	answer func(conn *net.TCPConn, request envelope)
}

func startPeer(t *testing.T, answer func(p *fakePeer, conn *net.TCPConn, request envelope)) *fakePeer {
	t.Helper()
	in, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { in.Close() })
	p := &fakePeer{t: t, key: labKey(t, liveSecret, "default"), port: in.Addr().(*net.TCPAddr).Port}
	p.answer = func(conn *net.TCPConn, request envelope) { answer(p, conn, request) }
	go func() {
		for {
			conn, err := in.Accept()
			if err != nil {
				return
			}
			go p.serve(conn.(*net.TCPConn))
		}
	}()
	return p
}

func (p *fakePeer) serve(conn *net.TCPConn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	raw, err := bufio.NewReader(conn).ReadBytes(0)
	if err != nil {
		return
	}
	e, err := parseEnvelope(raw[:len(raw)-1])
	if err != nil {
		p.t.Errorf("the client sent no envelope: %v", err)
		return
	}
	message, err := open(p.key, e, messageContext{label: labelRequest, cluster: e.cluster, node: e.node}, requestLimit)
	if err != nil {
		p.t.Errorf("the client's request does not open: %v", err)
		return
	}
	var written requestJSON
	if err := json.Unmarshal(message, &written); err != nil || written.Time == nil || written.To != "node2" {
		p.t.Errorf("the client's request: %s", message)
		return
	}
	p.mu.Lock()
	p.times = append(p.times, *written.Time)
	p.ports = append(p.ports, conn.RemoteAddr().(*net.TCPAddr).Port)
	p.mu.Unlock()
	p.asked.Add(1)
	p.answer(conn, e)
}

// seen tells the times of the requests so far, and the ports they came from.
func (p *fakePeer) seen() (times []int64, ports []int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.times), slices.Clone(p.ports)
}

// reply sends message sealed as frame 0 of the reply of node to request.
func (p *fakePeer) reply(conn net.Conn, request salt, node, message string) {
	raw, _ := seal(p.key, messageContext{labelReply, "default", node, &request, 0}, []byte(message))
	conn.Write(raw)
}

// asker asks this peer, or whatever the config of set says, as node1.
func asker(t *testing.T, port int, set settings) (caller, *config) {
	t.Helper()
	all := settings{"listener.addr@node2": "127.0.0.1", "listener.port@node2": fmt.Sprint(port)}
	for name, value := range set {
		all[name] = value
	}
	p, _ := newLab(t, all)
	c, err := loadConfig(p)
	must(t, err)
	return caller{network: hostNetwork{}, cluster: "default", node: "node1", key: labKey(t, liveSecret, "default"), now: func() int64 { return time.Now().UnixMilli() }}, c
}

const okPing = `{"time": 1, "status": 0, "data": {"nodename": "node2"}}`

func TestAnswerKinds(t *testing.T) {
	for _, test := range []struct {
		name   string
		answer func(p *fakePeer, conn *net.TCPConn, request envelope)
		want   answerKind
		silent bool
	}{
		{"ok", func(p *fakePeer, conn *net.TCPConn, e envelope) { p.reply(conn, e.salt, "node2", okPing) }, answerOK, false},
		{"closed without answer", func(*fakePeer, *net.TCPConn, envelope) {}, answerDenied, true},
		{"reset without answer", func(_ *fakePeer, conn *net.TCPConn, _ envelope) { conn.SetLinger(0) }, answerDenied, true},
		{"refused in words", func(p *fakePeer, conn *net.TCPConn, e envelope) {
			p.reply(conn, e.salt, "node2", `{"time": 1, "status": 1, "error": "this is node \"node3\""}`)
		}, answerDenied, false},
		{"does not know the action", func(p *fakePeer, conn *net.TCPConn, e envelope) {
			p.reply(conn, e.salt, "node2", `{"time": 1, "status": 1, "error": "unknown action \"ping\"; there are: none"}`)
		}, answerUnsupported, false},
		{"never answers", func(p *fakePeer, conn *net.TCPConn, _ envelope) { io.Copy(io.Discard, conn) }, answerTimeout, false},
		{"never ends its answer", func(p *fakePeer, conn *net.TCPConn, _ envelope) {
			conn.Write([]byte("{"))
			io.Copy(io.Discard, conn)
		}, answerTimeout, false},
		{"garbage", func(_ *fakePeer, conn *net.TCPConn, _ envelope) { conn.Write([]byte("SSH-2.0-OpenSSH\r\n\x00")) }, answerBadReply, false},
		{"half an answer", func(_ *fakePeer, conn *net.TCPConn, _ envelope) { conn.Write([]byte(`{"clustername": "def`)) }, answerBadReply, false},
		{"to another request", func(p *fakePeer, conn *net.TCPConn, e envelope) {
			e.salt[0]++
			p.reply(conn, e.salt, "node2", okPing)
		}, answerBadReply, false},
		{"no reply but a request", func(p *fakePeer, conn *net.TCPConn, e envelope) {
			raw, _ := seal(p.key, messageContext{label: labelRequest, cluster: "default", node: "node2"}, []byte(okPing))
			conn.Write(raw)
		}, answerBadReply, false},
		{"the second frame", func(p *fakePeer, conn *net.TCPConn, e envelope) {
			raw, _ := seal(p.key, messageContext{labelReply, "default", "node2", &e.salt, 1}, []byte(okPing))
			conn.Write(raw)
		}, answerBadReply, false},
		{"another cluster's", func(p *fakePeer, conn *net.TCPConn, e envelope) {
			raw, _ := seal(p.key, messageContext{labelReply, "other", "node2", &e.salt, 0}, []byte(okPing))
			conn.Write(raw)
		}, answerBadReply, false},
		{"under another secret", func(p *fakePeer, conn *net.TCPConn, e envelope) {
			raw, _ := seal(labKey(p.t, otherSecret, "default"), messageContext{labelReply, "default", "node2", &e.salt, 0}, []byte(okPing))
			conn.Write(raw)
		}, answerBadReply, false},
		{"no JSON inside", func(p *fakePeer, conn *net.TCPConn, e envelope) { p.reply(conn, e.salt, "node2", "pong") }, answerBadReply, false},
		{"other data than was asked for", func(p *fakePeer, conn *net.TCPConn, e envelope) {
			p.reply(conn, e.salt, "node2", `{"time": 1, "status": 0, "data": [5]}`)
		}, answerBadReply, false},
		{"another node's", func(p *fakePeer, conn *net.TCPConn, e envelope) { p.reply(conn, e.salt, "node3", okPing) }, answerWrongNode, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := startPeer(t, test.answer)
			a, c := asker(t, p.port, nil)
			limit := patience
			if test.want == answerTimeout {
				limit = 300 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			var got struct{ Nodename string }
			begun := time.Now()
			err := a.ask(ctx, c, "node2", "ping", nil, dataOf(&got))
			if kind := kindOf(err); kind != test.want {
				t.Fatalf("%s: %v; want %s", kind, err, test.want)
			}
			var answer *answerError
			if silent := errors.As(err, &answer) && answer.silent; silent != test.silent {
				t.Errorf("silent is %t: %v", silent, err)
			}
			if test.want == answerOK && got.Nodename != "node2" {
				t.Errorf("got %+v", got)
			}
			if took := time.Since(begun); took > limit+5*time.Second {
				t.Errorf("took %s of %s", took, limit)
			}
			if n := p.asked.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

// TestResetInAnAnswer: half an answer and a reset is what half an answer is:
// it must not be taken for a refusal, after which the peer is left alone.
func TestResetInAnAnswer(t *testing.T) {
	p := startPeer(t, func(_ *fakePeer, conn *net.TCPConn, _ envelope) {
		conn.Write([]byte(`{"clustername": "def`))
		time.Sleep(50 * time.Millisecond) // the reset would overtake it
		conn.SetLinger(0)
	})
	a, c := asker(t, p.port, nil)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := a.ask(ctx, c, "node2", "ping", nil, discard); kindOf(err) != answerBadReply {
		t.Errorf("%s: %v; want %s", kindOf(err), err, answerBadReply)
	}
}

func TestNotReached(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	a, c := asker(t, freePort(t), nil)
	if err := a.ask(ctx, c, "node2", "ping", nil, discard); kindOf(err) != answerRefused {
		t.Errorf("nobody listens: %s: %v", kindOf(err), err)
	}
	// A name that no server is asked for, since it cannot be one.
	a, c = asker(t, 1, settings{"cluster.nodes": "node1 no..name"})
	if err := a.ask(ctx, c, "no..name", "ping", nil, discard); kindOf(err) != answerUnresolved {
		t.Errorf("no address: %s: %v", kindOf(err), err)
	}
	// The unscoped listener.addr is this node's own, never a peer's.
	if host, port := peerAddress(c, "no..name"); host != "no..name" || port != c.count("listener.port") {
		t.Errorf("a peer without an address is sought at %s %d", host, port)
	}
	p, _ := newLab(t, nil)
	if err := askLocal(ctx, p, "ping", nil, nil, discard); !errors.Is(err, errNoDaemon) {
		t.Errorf("no local socket: %v", err)
	}
	leftover, err := net.ListenUnix("unix", &net.UnixAddr{Name: p.socket(), Net: "unix"})
	must(t, err)
	leftover.SetUnlinkOnClose(false)
	leftover.Close()
	if err := askLocal(ctx, p, "ping", nil, nil, discard); !errors.Is(err, errNoDaemon) {
		t.Errorf("a leftover of a local socket: %v", err)
	}
}

// TestClockCorrection: a client whose clock is off corrects itself by the
// peer's, once.
func TestClockCorrection(t *testing.T) {
	d := startLive(t, nil, nil)
	a, c := asker(t, d.port, settings{"node.name": "node2", "listener.addr@node1": "127.0.0.1", "listener.port@node1": fmt.Sprint(d.port)})
	a.node = "node2"
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, off := range []time.Duration{-72 * time.Hour, -2 * time.Minute, 2 * time.Minute, 72 * time.Hour} {
		a.now = func() int64 { return time.Now().Add(off).UnixMilli() }
		var got struct{ Nodename string }
		if err := a.ask(ctx, c, "node1", "ping", nil, dataOf(&got)); err != nil || got.Nodename != "node1" {
			t.Errorf("a clock that is off by %s: %+v, %v", off, got, err)
		}
	}
	// A peer that is never content.
	theirs := time.Now().Add(time.Hour).UnixMilli()
	p := startPeer(t, func(p *fakePeer, conn *net.TCPConn, e envelope) {
		p.reply(conn, e.salt, "node2", fmt.Sprintf(`{"time": %d, "status": 1, "error": "clock: wrong again"}`, theirs))
	})
	a, c = asker(t, p.port, nil)
	err := a.ask(ctx, c, "node2", "ping", nil, dataOf(new(any)))
	if kindOf(err) != answerDenied || !strings.Contains(err.Error(), "clock: wrong again") {
		t.Errorf("%v", err)
	}
	if n := p.asked.Load(); n != 2 {
		t.Fatalf("asked %d times, want 2", n)
	}
	times, _ := p.seen()
	if off := times[1] - theirs; off < 0 || off > 10_000 {
		t.Errorf("the second request's time is %d ms off the peer's", off)
	}
	if off := time.Now().UnixMilli() - times[0]; off < 0 || off > 10_000 {
		t.Errorf("the first request's time is %d ms off this node's", off)
	}
}

// TestPrivilegedPort: requests leave from a port that no ordinary user of this
// machine can send from, if the daemon is root's.
func TestPrivilegedPort(t *testing.T) {
	p := startPeer(t, func(*fakePeer, *net.TCPConn, envelope) {})
	d := startLive(t, settings{"listener.addr@node2": "127.0.0.1", "listener.port@node2": fmt.Sprint(p.port), "cluster.nodes": "node1 node2"}, nil)
	d.local("cluster_status")
	_, ports := p.seen()
	if len(ports) != 1 {
		t.Fatalf("node2 was asked %d times", len(ports))
	}
	if port := ports[0]; (port < privilegedPorts) != (os.Geteuid() == 0) {
		t.Errorf("user %d asks from port %d", os.Geteuid(), port)
	}
	a, c := asker(t, p.port, nil)
	for range 5 {
		a.ask(t.Context(), c, "node2", "ping", nil, discard)
	}
	if _, ports = p.seen(); slices.Min(ports) == slices.Max(ports) {
		t.Error("the port is always the same: two at once would be in each other's way")
	}
}

// TestPrivilegedPortsAreNotUsedUp: there are 424 of them, and one whose end
// was closed first is gone for a minute (TIME_WAIT), for each address.
func TestPrivilegedPortsAreNotUsedUp(t *testing.T) {
	d := startLive(t, nil, nil)
	a, c := asker(t, d.port, settings{"node.name": "node2", "listener.addr@node1": "127.0.0.1", "listener.port@node1": fmt.Sprint(d.port)})
	a.node = "node2"
	var asking sync.WaitGroup
	for range 8 {
		asking.Go(func() {
			for range 250 {
				if err := a.ask(t.Context(), c, "node1", "ping", nil, dataOf(new(any))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	asking.Wait()
	table, err := os.ReadFile("/proc/net/tcp")
	must(t, err)
	const timeWait = "06"
	gone, listening := 0, fmt.Sprintf("0100007F:%04X", d.port)
	for line := range strings.Lines(string(table)) {
		// number local remote state …
		if f := strings.Fields(line); len(f) > 3 && f[2] == listening && f[3] == timeWait {
			gone++
		}
	}
	if gone > 0 {
		t.Errorf("%d of 2000 requests left their port unusable for a minute: the client closed first", gone)
	}
}

func TestPeerTrust(t *testing.T) {
	now := time.Now()
	trust := newPeerTrust(func() time.Time { return now })
	silent := fmt.Errorf("cannot ask: %w", &answerError{kind: answerDenied, silent: true, err: io.EOF})
	want := func(what string, pause time.Duration) {
		t.Helper()
		if got := trust.pause("node2"); got != pause {
			t.Errorf("%s: a pause of %s, want %s", what, got, pause)
		}
	}
	want("at first", 0)
	trust.asked("node2", silent)
	want("denied", time.Minute)
	if trust.pause("node3") != 0 {
		t.Error("another peer is left alone too")
	}
	now = now.Add(59 * time.Second)
	want("59 s later", time.Second)
	now = now.Add(time.Second)
	want("60 s later", 0)
	trust.asked("node2", silent)
	want("denied twice", time.Minute)
	now = now.Add(time.Minute)
	trust.asked("node2", context.DeadlineExceeded) // no answer: neither denied nor trusted
	want("timed out", 0)
	trust.asked("node2", silent)
	want("denied the third time", 61*time.Minute)
	now = now.Add(61 * time.Minute)
	want("61 minutes later", 0)
	trust.asked("node2", silent)
	want("and again", 61*time.Minute)
	trust.heard("node3")
	want("another was heard", 61*time.Minute)
	trust.heard("node2")
	want("heard", 0)
	for range 2 {
		trust.asked("node2", silent)
		want("counted anew", time.Minute)
	}
	trust.asked("node2", nil)
	want("answered", 0)
	for range 2 {
		trust.asked("node2", silent)
	}
	trust.asked("node2", &answerError{kind: answerDenied, err: replyError("clock: no")})
	want("refused in words", 0)
	trust.asked("node2", silent)
	want("denied once after it", time.Minute)
	trust.retain(func(node string) bool { return node != "node2" })
	want("no member any more", 0)
}

// TestDeniedPeerIsLeftAlone: the daemon does not ask one again that denied,
// until that one asks.
func TestDeniedPeerIsLeftAlone(t *testing.T) {
	p := startPeer(t, func(*fakePeer, *net.TCPConn, envelope) {})
	d := startLive(t, settings{"listener.addr@node2": "127.0.0.1", "listener.port@node2": fmt.Sprint(p.port), "cluster.nodes": "node1 node2"}, nil)
	answer := func() *nodeAnswer {
		var s clusterStatus
		must(t, askLocal(t.Context(), d.paths, "cluster_status", nil, nil, func(raw []byte, _ replyJSON) error {
			var r struct {
				Data struct{ Nodes map[string]json.RawMessage }
			}
			if err := json.Unmarshal(raw, &r); err != nil {
				return err
			}
			s.Nodes = map[string]*nodeAnswer{"node2": {}}
			var row struct {
				Answer answerKind
				Error  string
			}
			err := json.Unmarshal(r.Data.Nodes["node2"], &row)
			s.Nodes["node2"].Answer, s.Nodes["node2"].Error = row.Answer, row.Error
			return err
		}))
		return s.Nodes["node2"]
	}
	for range 3 {
		if a := answer(); a.Answer != answerDenied {
			t.Fatalf("answer %s: %s", a.Answer, a.Error)
		}
	}
	if n := p.asked.Load(); n != 1 {
		t.Errorf("one that denied was asked %d times within a minute", n)
	}
	// A forged message does not end it, one that opens does.
	w := d.client("node2", "127.0.0.2")
	w.exchange(replaced(w.aged(0), `"data": "`, `"data": "AAAA`))
	answer()
	if n := p.asked.Load(); n != 1 {
		t.Error("asked again after a forged message")
	}
	w.ask(t, "ping", "")
	answer()
	if n := p.asked.Load(); n != 2 {
		t.Errorf("asked %d times, want 2: the peer sent a message that opens", n)
	}
}

// TestExcludedNodes: nodes that are left out and nodes that are asked are
// written into one table.
func TestExcludedNodes(t *testing.T) {
	set := settings{}
	members, excluded := []string{"node1"}, []string{}
	port := fmt.Sprint(freePort(t))
	for i := range 20 {
		asked, left := fmt.Sprintf("asked%d", i), fmt.Sprintf("left%d", i)
		members, excluded = append(members, asked, left), append(excluded, left)
		set["listener.addr@"+asked], set["listener.port@"+asked] = "127.0.0.1", port
	}
	set["cluster.nodes"], set["upgrade.exclude"] = strings.Join(members, " "), strings.Join(excluded, " ")
	d := startLive(t, set, nil)
	for range 5 {
		var s clusterStatus
		r := d.local("cluster_status")
		if r.Status != 0 {
			t.Fatal(r.Error)
		}
		must(t, json.Unmarshal(r.Data, &s))
		if len(s.Nodes) != len(members) || len(s.Excluded) != len(excluded) {
			t.Errorf("%d nodes, %d excluded; want %d and %d", len(s.Nodes), len(s.Excluded), len(members), len(excluded))
		}
	}
}
