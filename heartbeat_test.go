package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// beatingNode is a daemon whose monitor does nothing but beat: to each peer
// when beats are due, and it accepts all that come.
type beatingNode struct {
	*liveDaemon
	epoch, salt uint64

	mu    sync.Mutex
	seqs  map[string]uint64
	got   map[string][]beat
	quiet bool // accepts nothing
}

// startBeating runs node i of three, node1 to node3 at 127.0.0.1 to .3, all on
// one port.
func startBeating(tb testing.TB, i, port int, set settings) *beatingNode {
	tb.Helper()
	n := &beatingNode{epoch: uint64(1000 + i), salt: uint64(0xabc0 + i), seqs: map[string]uint64{}, got: map[string][]beat{}}
	all := settings{
		"node.name": fmt.Sprintf("node%d", i), "listener.addr": fmt.Sprintf("127.0.0.%d", i),
		"hb#1.type": "unicast", "hb#1.port": fmt.Sprint(port), "hb#1.interval": "20ms", "hb#1.timeout": "1s",
	}
	for peer := 1; peer <= 3; peer++ {
		all[fmt.Sprintf("hb#1.addr@node%d", peer)] = fmt.Sprintf("127.0.0.%d", peer)
	}
	maps.Copy(all, set)
	end, ended := make(chan struct{}), make(chan struct{})
	n.liveDaemon = startLive(tb, all, func(d *liveDaemon) {
		d.threads = slices.DeleteFunc(d.threads, func(t *thread) bool { return t.id == "monitor" })
		s := &shell{d: d.daemon, beats: make(chan event, beatsWaiting), calls: make(chan func()), core: newCore(birth{node: d.config.Load().node})}
		d.monitor.current.Store(s)
		go func() {
			defer close(ended)
			n.work(d, s, end)
		}()
	})
	tb.Cleanup(func() { close(end); <-ended })
	return n
}

func (n *beatingNode) work(d *liveDaemon, s *shell, end chan struct{}) {
	for {
		select {
		case e := <-s.beats:
			switch e := e.(type) {
			case beatDue:
				for _, peer := range d.config.Load().members() {
					n.beat(d, peer, e.heartbeat)
				}
			case beatEvent:
				n.mu.Lock()
				n.got[e.from] = append(n.got[e.from], e.beat)
				quiet := n.quiet
				n.mu.Unlock()
				if !quiet {
					d.heartbeats.accepted(e.from, e.beat.data)
				}
			}
		case <-end:
			return
		}
	}
}

func (n *beatingNode) beat(d *liveDaemon, peer, heartbeat string) {
	n.mu.Lock()
	n.seqs[peer]++
	b := beat{salt: n.salt, seq: n.seqs[peer], epoch: n.epoch}
	n.mu.Unlock()
	d.heartbeats.send(peer, heartbeat, b)
}

func (n *beatingNode) heard(peer string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.got[peer])
}

// status is a thread as daemon_status shows it.
func (n *beatingNode) status(thread string) (t threadData, there bool) {
	n.tb.Helper()
	n.do(func() {
		for _, known := range n.threads {
			if known.id == thread {
				t, there = known.data(), true
			}
		}
	})
	raw, err := json.Marshal(t)
	must(n.tb, err)
	t = threadData{}
	must(n.tb, json.Unmarshal(raw, &t))
	return t, there
}

// path is one direction of a heartbeat.
func (n *beatingNode) path(thread, peer string) (p pathData) {
	n.tb.Helper()
	t, _ := n.status(thread)
	peers, _ := t.Stats["peers"].(map[string]any)
	raw, err := json.Marshal(peers[peer])
	must(n.tb, err)
	must(n.tb, json.Unmarshal(raw, &p))
	return p
}

func (n *beatingNode) reaches(thread, peer, state string) {
	n.tb.Helper()
	waitFor(n.tb, patience, fmt.Sprintf("%s of %s shows %s as %s", thread, n.config.Load().node, peer, state), func() bool {
		return n.path(thread, peer).State == state
	})
}

func beatingPair(t *testing.T, set settings) (*beatingNode, *beatingNode) {
	t.Helper()
	port := freePort(t)
	return startBeating(t, 1, port, set), startBeating(t, 2, port, set)
}

// Beats go both ways; a peer that is not there is stale, and keeps no beat from
// the others; when it comes, it is heard at once.
func TestHeartbeat(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	one, two := startBeating(t, 1, port, nil), startBeating(t, 2, port, nil)
	one.reaches("hb#1.rx", "node2", "beating")
	two.reaches("hb#1.rx", "node1", "beating")
	if p := one.path("hb#1.rx", "node3"); p.State != "stale" || p.Beats != 0 {
		t.Errorf("node3 does not run, and is %+v", p)
	}
	waitFor(t, patience, "the closed port of node3 is told", func() bool { return one.path("hb#1.tx", "node3").Error == "connection refused" })
	three := startBeating(t, 3, port, nil)
	one.reaches("hb#1.rx", "node3", "beating")
	three.reaches("hb#1.rx", "node1", "beating")
	waitFor(t, patience, "nothing is refused any more", func() bool { return one.path("hb#1.tx", "node3").Error == "" })
	two.mu.Lock()
	b := two.got["node1"][0]
	two.mu.Unlock()
	one.heartbeats.mu.Lock()
	token := one.heartbeats.peers["node2"].ours
	one.heartbeats.mu.Unlock()
	if b.salt != one.salt || b.epoch != one.epoch || !bytes.Equal(b.data.token, token[:]) || !slices.Equal(b.data.keys, one.keys.Load().ids) {
		t.Errorf("node2 received %+v", b)
	}

	three.stopped()
	one.reaches("hb#1.rx", "node3", "stale")
	waitFor(t, patience, "it is logged", func() bool { return one.logged.count(`"a peer is not heard any more" thread=hb#1.rx peer=node3`) > 0 })
	one.reaches("hb#1.rx", "node2", "beating")
}

// A thread is stopped and started by name: only its direction ends.
func TestHeartbeatStopped(t *testing.T) {
	t.Parallel()
	one, two := beatingPair(t, nil)
	one.reaches("hb#1.rx", "node2", "beating")
	two.reaches("hb#1.rx", "node1", "beating")
	one.local("daemon_stop", "thr_id=hb#1.rx")
	one.reaches("hb#1.rx", "node2", "stale")
	if state, _ := one.status("hb#1.rx"); state.State != "stopped" {
		t.Errorf("hb#1.rx is %s", state.State)
	}
	if p := two.path("hb#1.rx", "node1"); p.State != "beating" {
		t.Errorf("node2 hears node1: %+v", p)
	}
	one.local("daemon_start", "thr_id=hb#1.rx")
	one.reaches("hb#1.rx", "node2", "beating")

	one.local("daemon_stop", "thr_id=hb#1.tx")
	two.reaches("hb#1.rx", "node1", "stale")
	one.beat(one.liveDaemon, "node2", "") // also what is sent at a change
	before := two.heard("node1")
	if p := one.path("hb#1.rx", "node2"); p.State != "beating" {
		t.Errorf("node1 hears node2: %+v", p)
	}
	one.local("daemon_start", "thr_id=hb#1.tx")
	two.reaches("hb#1.rx", "node1", "beating")
	if two.heard("node1") == before {
		t.Error("nothing came")
	}
}

// Sections of node.conf that come, go and change: their threads follow, and
// those of others go on.
func TestHeartbeatsFollowConfiguration(t *testing.T) {
	t.Parallel()
	one, two := beatingPair(t, nil)
	two.reaches("hb#1.rx", "node1", "beating")
	born, _ := one.status("hb#1.tx")
	second := fmt.Sprint(freePort(t))
	for _, n := range []*beatingNode{one, two} {
		configure(t, n.paths, settings{
			"hb#2.type": "unicast", "hb#2.port": second, "hb#2.interval": "20ms", "hb#2.timeout": "400ms",
			"hb#2.addr@node1": "127.0.0.1", "hb#2.addr@node2": "127.0.0.2",
		})
	}
	one.reaches("hb#2.rx", "node2", "beating")
	two.reaches("hb#2.rx", "node1", "beating")

	// It moves on both.
	moved := fmt.Sprint(freePort(t))
	for _, n := range []*beatingNode{one, two} {
		configure(t, n.paths, settings{"hb#2.port": moved, "hb#2.interval": "10ms"})
	}
	waitFor(t, patience, "both are on the other port", func() bool {
		for _, n := range []*beatingNode{one, two} {
			if rx, _ := n.status("hb#2.rx"); rx.Config["bound"] != map[string]any{"node1": "127.0.0.1:", "node2": "127.0.0.2:"}[n.config.Load().node].(string)+moved {
				return false
			}
		}
		return true
	})
	was := two.path("hb#2.rx", "node1").Beats
	waitFor(t, patience, "beats come there", func() bool { return two.path("hb#2.rx", "node1").Beats > was+5 })

	configure(t, one.paths, settings{"hb#2.type": ""})
	waitFor(t, patience, "its threads are gone", func() bool {
		_, tx := one.status("hb#2.tx")
		_, rx := one.status("hb#2.rx")
		return !tx && !rx
	})
	two.reaches("hb#2.rx", "node1", "stale")
	if now, _ := one.status("hb#1.tx"); now.Created != born.Created || now.State != "running" {
		t.Errorf("hb#1.tx was started anew: %+v, then %+v", born, now)
	}
	configure(t, one.paths, settings{"hb#2.type": "unicast", "hb#2.addr@node1": "127.0.0.1"})
	two.reaches("hb#2.rx", "node1", "beating")
}

// A heartbeat that moves to where the old socket is in the way, and one that
// cannot move.
func TestHeartbeatMoves(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	one := startBeating(t, 1, port, nil)
	bound := func(addr, fault string) {
		t.Helper()
		waitFor(t, patience, "it is bound to "+addr, func() bool {
			rx, _ := one.status("hb#1.rx")
			err, _ := rx.Config["error"].(string)
			return rx.Config["bound"] == fmt.Sprintf("%s:%d", addr, port) && rx.State == "running" && strings.Contains(err, fault) && (err == "") == (fault == "")
		})
	}
	bound("127.0.0.1", "")
	configure(t, one.paths, settings{"hb#1.addr@node1": "0.0.0.0"})
	bound("0.0.0.0", "")
	configure(t, one.paths, settings{"hb#1.addr@node1": "192.0.2.1"})
	bound("0.0.0.0", "192.0.2.1")
	take := rawBeat(one, beat{salt: 1, seq: 1, epoch: 1})
	conn, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", port))
	must(t, err)
	defer conn.Close()
	conn.Write(take)
	waitFor(t, patience, "it still receives", func() bool { return one.heard("node2") == 1 })
	configure(t, one.paths, settings{"hb#1.addr@node1": "0.0.0.0"})
	bound("0.0.0.0", "")
	if n := one.logged.count("the heartbeat stays where it is"); n != 1 || one.logged.count("uncleanly") > 0 {
		t.Errorf("logged %d times", n)
	}
}

// The secret changes node by node, and no beat is missed: nobody is heard less
// for as long as a timeout.
func TestSecretChangesUnderHeartbeats(t *testing.T) {
	t.Parallel()
	one, two := beatingPair(t, settings{"hb#1.timeout": "5s"})
	one.reaches("hb#1.rx", "node2", "beating")
	two.reaches("hb#1.rx", "node1", "beating")
	sealedBy := func(n *beatingNode, peer string, secret string) func() bool {
		id := labKey(t, secret, "default").id()
		return func() bool {
			key, _ := n.heartbeats.toward(peer, n.keys.Load())
			return key.id() == id
		}
	}
	configure(t, one.paths, settings{"cluster.secret": otherSecret, "cluster.previous_secret": liveSecret})
	waitFor(t, patience, "node1 names both keys", func() bool {
		two.heartbeats.mu.Lock()
		defer two.heartbeats.mu.Unlock()
		return len(two.heartbeats.peers["node1"].keys) == 2
	})
	if !sealedBy(one, "node2", liveSecret)() {
		t.Error("node2 does not have the new secret yet")
	}
	configure(t, two.paths, settings{"cluster.secret": otherSecret, "cluster.previous_secret": liveSecret})
	waitFor(t, patience, "both use the new one", func() bool { return sealedBy(one, "node2", otherSecret)() && sealedBy(two, "node1", otherSecret)() })
	configure(t, one.paths, settings{"cluster.previous_secret": ""})
	waitFor(t, patience, "node1 names one key", func() bool {
		two.heartbeats.mu.Lock()
		defer two.heartbeats.mu.Unlock()
		return len(two.heartbeats.peers["node1"].keys) == 1
	})
	if stale := one.logged.count("not heard any more") + two.logged.count("not heard any more"); stale > 0 {
		t.Errorf("%d times a peer was not heard", stale)
	}
	for _, n := range []*beatingNode{one, two} {
		if rx, _ := n.status("hb#1.rx"); rx.Stats["bad"] != 0.0 {
			t.Errorf("%v beats did not open", rx.Stats["bad"])
		}
	}
}

// Two that know nothing of each other's keys, as after a start, and have only
// one in common, find together.
func TestKeysFoundWithoutAccepting(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	one := startBeating(t, 1, port, settings{"cluster.secret": liveSecret, "cluster.previous_secret": "one that only node1 has, of no cluster"})
	two := startBeating(t, 2, port, settings{"cluster.secret": otherSecret, "cluster.previous_secret": liveSecret})
	for _, n := range []*beatingNode{one, two} {
		n.mu.Lock()
		n.quiet = true // a link that is not good: beats open, none is accepted
		n.mu.Unlock()
	}
	one.reaches("hb#1.rx", "node2", "beating")
	two.reaches("hb#1.rx", "node1", "beating")
}

// rawBeat seals a beat of node2 for the table of n.
func rawBeat(n *beatingNode, b beat) []byte {
	n.tb.Helper()
	plain, err := b.plaintext()
	must(n.tb, err)
	key := labKey(n.tb, liveSecret, "default")
	return new(beatCiphers).seal(key, beatHeader{key.id(), senderIDOf("default", "node2"), b.salt}, "node2", plain)
}

// What does not open, is not of a member, or was sent before, changes nothing
// but counters, however much of it comes; the next good beat counts.
func TestBadBeats(t *testing.T) {
	t.Parallel()
	one := startBeating(t, 1, freePort(t), nil)
	rx := func() *heartbeat { return one.heartbeats.list[0] }()
	src := netip.MustParseAddrPort("127.0.0.2:999")
	take := func(raw []byte) { rx.take(bytes.Clone(raw), src) }
	waitFor(t, patience, "the keys are there", func() bool { return one.heartbeats.present() != nil })
	arrived := func(want int, what string) {
		t.Helper()
		waitFor(t, patience, what, func() bool { return one.heard("node2") == want })
	}

	good := rawBeat(one, beat{salt: 7, seq: 5, epoch: 100})
	take(good)
	arrived(1, "a good beat")
	other := labKey(t, otherSecret, "default")
	plain, err := beat{salt: 7, seq: 6, epoch: 100}.plaintext()
	must(t, err)
	key := labKey(t, liveSecret, "default")
	bad := map[string][]byte{
		"nothing":            nil,
		"garbage":            bytes.Repeat([]byte{beatVersion}, 200),
		"short":              good[:beatLeast-1],
		"too large":          append(bytes.Clone(good), make([]byte, beatLimit)...),
		"another version":    append([]byte{beatVersion + 1}, good[1:]...),
		"a request":          []byte(`{"clustername": "default", "nodename": "node2", "salt": "` + strings.Repeat("A", 43) + `", "data": "` + strings.Repeat("A", 100) + `"}`),
		"another secret":     new(beatCiphers).seal(other, beatHeader{other.id(), senderIDOf("default", "node2"), 7}, "node2", plain),
		"a key's name":       new(beatCiphers).seal(other, beatHeader{key.id(), senderIDOf("default", "node2"), 7}, "node2", plain),
		"no member":          new(beatCiphers).seal(key, beatHeader{key.id(), senderIDOf("default", "node9"), 7}, "node9", plain),
		"of this node":       new(beatCiphers).seal(key, beatHeader{key.id(), senderIDOf("default", "node1"), 7}, "node1", plain),
		"another cluster":    new(beatCiphers).seal(key, beatHeader{key.id(), senderIDOf("other", "node2"), 7}, "node2", plain),
		"under another name": new(beatCiphers).seal(key, beatHeader{key.id(), senderIDOf("default", "node3"), 7}, "node2", plain),
		"malformed":          new(beatCiphers).seal(key, beatHeader{key.id(), senderIDOf("default", "node2"), 7}, "node2", plain[:len(plain)-1]),
	}
	for i := range good {
		turned := bytes.Clone(good)
		turned[i] ^= 1
		bad[fmt.Sprintf("byte %d turned", i)] = turned
	}
	for _, raw := range bad {
		take(raw)
	}
	for i := range 1000 { // each under a salt of its own
		turned := bytes.Clone(good)
		turned[beatClear-nonceSize-1], turned[beatClear-nonceSize-2] = byte(i), byte(i>>8)|0x80
		take(turned)
	}
	one.heartbeats.ciphers.mu.Lock()
	opened, _ := parseBeatHeader(good)
	for h := range one.heartbeats.ciphers.known {
		if h != opened && h.salt != one.salt { // of those that this node sends
			t.Errorf("a cipher is kept under which no beat opened: %x", h)
		}
	}
	one.heartbeats.ciphers.mu.Unlock()
	one.heartbeats.mu.Lock()
	if rx.bad != len(bad)+1000 {
		t.Errorf("%d bad beats are counted, of %d", rx.bad, len(bad)+1000)
	}
	one.heartbeats.mu.Unlock()
	if lines := one.logged.count("a beat is not used"); lines > 10 {
		t.Errorf("%d lines are logged", lines)
	}
	if entries := one.blacklist.list(); len(entries) > 0 {
		t.Errorf("shut out: %+v", entries)
	}

	closed := func() bool {
		_, stats := rx.reportRx()
		return stats["peers"].(map[string]pathData)["node2"].Closed
	}
	if !closed() {
		t.Error("it is not said that what comes under node2's name does not open")
	}

	// Replays, and what was overtaken.
	take(good)
	take(rawBeat(one, beat{salt: 7, seq: 4, epoch: 100}))
	take(rawBeat(one, beat{salt: 6, seq: 900, epoch: 99}))
	take(rawBeat(one, beat{salt: 7, seq: 6, epoch: 100}))
	arrived(2, "the next good beat")
	take(rawBeat(one, beat{salt: 8, seq: 1, epoch: 101}))
	arrived(3, "the peer's next start")
	take(rawBeat(one, beat{salt: 7, seq: 7, epoch: 100}))
	one.heartbeats.mu.Lock()
	old := rx.paths["node2"].old
	one.heartbeats.mu.Unlock()
	if old != 4 || one.heard("node2") != 3 {
		t.Errorf("%d old beats are counted, want 4; %d came to the monitor", old, one.heard("node2"))
	}
	one.reaches("hb#1.rx", "node2", "stale")
	waitFor(t, patience, "what did not open once is not held against a silent peer", func() bool { return !closed() })
	take(rawBeat(one, beat{salt: 9, seq: 1, epoch: 50}))
	arrived(4, "a start with an epoch that was lost")
}

// Beats that a full monitor does not take are lost, and nothing waits for it.
func TestBeatsLost(t *testing.T) {
	t.Parallel()
	m := &monitorThread{}
	m.beatDue("hb#1") // no shell
	m.current.Store(&shell{beats: make(chan event, 2)})
	for range 5 {
		m.beatReceived("n2", beat{})
	}
	if got := m.lost.Load(); got != 4 {
		t.Errorf("lost = %d, want 4", got)
	}
}

// stuckNetwork looks up names forever, and has sockets that fail.
type stuckNetwork struct {
	network
	fails error
}

func (n stuckNetwork) dialPacket(ctx context.Context, from netip.Addr, host string, port int) (packetSender, error) {
	if host == "node3" {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if n.fails != nil {
		return failingSender{n.fails}, nil
	}
	return n.network.dialPacket(ctx, from, host, port)
}

type failingSender struct{ err error }

func (s failingSender) Write([]byte) (int, error) { return 0, s.err }
func (failingSender) Close() error                { return nil }

// A name that does not resolve, or not soon, keeps no beat from others, and the
// thread from ending.
func TestSlowNames(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	two := startBeating(t, 2, port, nil)
	p, listen := newLab(t, settings{
		"node.name": "node1", "hb#1.type": "unicast", "hb#1.port": fmt.Sprint(port), "hb#1.addr@node1": "127.0.0.1",
		"hb#1.addr@node2": "127.0.0.2", "hb#1.interval": "20ms", "hb#1.timeout": "400ms",
	})
	one := serveLive(t, p, listen, func(d *liveDaemon) { d.network = stuckNetwork{network: hostNetwork{}} })
	go func() {
		for seq := uint64(1); ; seq++ {
			select {
			case <-one.done:
				return
			case <-time.After(10 * time.Millisecond):
			}
			for _, peer := range []string{"node2", "node3"} {
				one.heartbeats.send(peer, "", beat{salt: 1, seq: seq, epoch: 1})
			}
		}
	}()
	two.reaches("hb#1.rx", "node1", "beating")
	begun := time.Now()
	one.local("daemon_stop", "thr_id=hb#1.tx")
	if took := time.Since(begun); took > dialTimeout/2 {
		t.Errorf("stopping hb#1.tx took %s", took)
	}
}

// Errors of sending are counted and logged once; the socket is made anew.
func TestSendingFails(t *testing.T) {
	t.Parallel()
	p, port := newLab(t, settings{"hb#1.type": "unicast", "hb#1.addr@node1": "127.0.0.1", "hb#1.port": fmt.Sprint(freePort(t)), "hb#1.interval": "20ms", "hb#1.timeout": "100ms"})
	d := serveLive(t, p, port, func(d *liveDaemon) {
		d.network = stuckNetwork{hostNetwork{}, &net.OpError{Op: "write", Err: unix.ENETUNREACH}}
	})
	send := func() pathData {
		d.heartbeats.send("node2", "", beat{salt: 1, seq: 1, epoch: 1})
		_, stats := d.heartbeats.list[0].reportTx()
		return stats["peers"].(map[string]pathData)["node2"]
	}
	waitFor(t, patience, "sockets are made", func() bool { return send().Errors > 3 })
	if got := send(); got.State != "stale" || got.Beats != 0 || got.Error != "network is unreachable" {
		t.Errorf("node2 is %+v", got)
	}
	waitFor(t, patience, "it is logged", func() bool { return d.logged.count("beats are not sent") == 1 })
	d.heartbeats.mu.Lock()
	if path := d.heartbeats.list[0].paths["node2"]; !path.redial && !path.dialling {
		t.Error("the socket stays")
	}
	d.heartbeats.mu.Unlock()

	d.heartbeats.send("node2", "", beat{salt: 1, term: 100 * 24 * time.Hour})
	d.heartbeats.send("node2", "", beat{salt: 1, term: 100 * 24 * time.Hour})
	waitFor(t, patience, "what has no form is logged", func() bool { return d.logged.count("cannot state a term of 2400h") == 1 })
}

func TestHeartbeatConfiguration(t *testing.T) {
	t.Parallel()
	var many []string
	for i := range membersLimit + 1 {
		many = append(many, fmt.Sprintf("n%d", i+1))
	}
	const beats = "[hb#1]\ntype = unicast\n"
	for text, want := range map[string]string{
		beats + "[cluster]\nnodes = " + strings.Join(many, " "):                                "node.conf:4: cluster.nodes: 65 nodes; a cluster with heartbeats has 64 at most",
		beats + "[cluster]\nnodes = " + strings.Join(many[:membersLimit], " "):                 "",
		"[cluster]\nnodes = " + strings.Join(many, " "):                                        "",
		"[hb#1]\ntype = unicast\ninterval = 9ms\n":                                             "node.conf:3: hb#1.interval: 9ms is below 10ms, the shortest",
		"[hb#1]\ntype = unicast\ntimeout = 900ms\n":                                            "node.conf:3: hb#1.timeout: 900ms is less than three intervals of 500ms: one lost beat would be a lost node",
		"[hb#1]\ntype = unicast\n[hb#2]\ntype = unicast\n":                                     "node.conf: hb#2.port: hb#1 receives on 0.0.0.0:10000 already; give each heartbeat a port of its own",
		"[hb#1]\ntype = unicast\n[hb#2]\ntype = unicast\nport = 10001\n":                       "",
		"[hb#1]\ntype = unicast\n[hb#2]\ntype = unicast\naddr = 192.0.2.1\n":                   "node.conf: hb#2.port: hb#1 receives on 0.0.0.0:10000 already; give each heartbeat a port of its own",
		"[hb#1]\ntype = unicast\naddr = 192.0.2.1\n[hb#2]\ntype = unicast\n":                   "node.conf: hb#2.port: hb#1 receives on 192.0.2.1:10000 already; give each heartbeat a port of its own",
		"[hb#1]\ntype = unicast\naddr = 192.0.2.1\n[hb#2]\ntype = unicast\naddr = 192.0.2.2\n": "",
		"[hb#1]\ntype = unicast\nport = 1214\n":                                                "node.conf:3: hb#1.port: the listener receives on 0.0.0.0:1214 already; give each heartbeat a port of its own",
		"[hb#1]\ntype@n2 = unicast\ninterval = 1ms\n[hb#2]\ntype = unicast\n":                  "",
		"[hb#1]\ntype = unicast\ninterval@n1 = 50ms\ntimeout@n1 = 300ms\nport = 9":             "",
	} {
		doc, err := parseINI("node.conf", text)
		must(t, err)
		c, err := newConfig(doc, "n1")
		if got := fmt.Sprint(err); want != "" && got != want || want == "" && err != nil {
			t.Errorf("%q:\ngot  %s\nwant %s", text, got, want)
		}
		if err == nil && strings.Contains(text, "type@n2") && !slices.Equal(c.heartbeats(), []string{"hb#2"}) {
			t.Errorf("%q: heartbeats = %q", text, c.heartbeats())
		}
	}
}

// Who is shut out is looked at when he shows the link's token, over TCP, so
// often a second; nobody else is.
func TestLinkToken(t *testing.T) {
	t.Parallel()
	one, two := beatingPair(t, nil)
	ring := two.keys.Load()
	var token []byte
	waitFor(t, patience, "node2 has node1's token", func() bool {
		_, token = two.heartbeats.toward("node1", ring)
		return token != nil
	})
	must(t, two.shutOutBy(one))
	ask := func(token []byte) error {
		c, err := parseConfig("node.conf", two.config.Load().doc.String()+fmt.Sprintf("[listener]\naddr@node1 = 127.0.0.1\nport@node1 = %d\n", one.port))
		must(t, err)
		a := caller{network: plainNetwork{}, cluster: "default", node: "node2", key: ring.keys[0], token: token, now: func() int64 { return time.Now().UnixMilli() }}
		return a.ask(t.Context(), c, "node1", "ping", nil, discard)
	}
	var answer *answerError
	if err := ask(nil); !errors.As(err, &answer) || !answer.silent {
		t.Fatalf("without a token, who is shut out is answered: %v", err)
	}
	if err := ask(bytes.Repeat([]byte{1}, tokenSize)); !errors.As(err, &answer) || !answer.silent {
		t.Errorf("with a wrong token: %v", err)
	}
	must(t, ask(token))

	now := time.Now().Add(time.Second)
	one.heartbeats.mu.Lock()
	one.heartbeats.peers["node2"].shown.now = func() time.Time { return now }
	one.heartbeats.mu.Unlock()
	admitted := func() (n int) {
		for range 3 * tokenRate {
			if one.heartbeats.admits("node2", token) {
				n++
			}
		}
		return n
	}
	if n := admitted(); n != tokenRate {
		t.Errorf("%d of a second are admitted, want %d", n, tokenRate)
	}
	now = now.Add(time.Second)
	if n := admitted(); n != tokenRate {
		t.Errorf("%d of the next second are admitted, want %d", n, tokenRate)
	}
	now = now.Add(time.Second)
	if one.heartbeats.admits("node3", token) || one.heartbeats.admits("node9", token) || one.heartbeats.admits("node2", nil) {
		t.Error("the token of node2 is node2's")
	}
}

// shutOutBy sends invalid messages from this node's address until other shuts
// it out there.
func (n *beatingNode) shutOutBy(other *beatingNode) error {
	for range strikes {
		conn, err := net.Dial("tcp", other.addr().String())
		if err != nil {
			return err
		}
		conn.Write([]byte(`{"clustername": "default", "nodename": "node2", "salt": "` + strings.Repeat("A", 43) + `", "data": "` + strings.Repeat("A", 100) + "\"}\x00"))
		conn.SetReadDeadline(time.Now().Add(patience))
		conn.Read(make([]byte, 1))
		conn.Close()
	}
	return nil
}

// A quarter of the places is for sources that beats come from.
func TestPlacesForLinkedMembers(t *testing.T) {
	t.Parallel()
	all := newConnections()
	stranger := func(i int) *connection {
		near, _ := net.Pipe()
		c := newConnection(near, all)
		c.source = netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 32)
		return c
	}
	var held []*connection
	for i := range 12 {
		c := stranger(i)
		if !all.admit(c, 16, 4) {
			t.Fatalf("stranger %d of 12 is refused", i)
		}
		c.known() // none is closed to make room
		held = append(held, c)
	}
	if all.admit(stranger(99), 16, 4) {
		t.Error("a stranger has a place of the last quarter")
	}
	for i := range 4 {
		c := stranger(100 + i)
		c.linked = true
		if !all.admit(c, 16, 4) {
			t.Errorf("linked member %d is refused", i)
		}
	}
	all.remove(held[0])
	if !all.admit(stranger(98), 16, 4) {
		t.Error("a place is free, and a stranger is refused")
	}
}

// wireTap stands for all sockets: it keeps what is sent, and fails the first
// time, as after an earlier beat to a closed port.
type wireTap struct {
	network
	sent chan []byte
	once sync.Once
}

func (w *wireTap) dialPacket(context.Context, netip.Addr, string, int) (packetSender, error) {
	return w, nil
}

func (w *wireTap) Write(b []byte) (n int, err error) {
	w.once.Do(func() { err = unix.ECONNREFUSED })
	if err == nil {
		w.sent <- bytes.Clone(b)
	}
	return len(b), err
}

func (*wireTap) Close() error { return nil }

// An error of an earlier beat loses none; and who is not known yet gets the
// previous key, which it has for sure.
func TestFirstBeat(t *testing.T) {
	t.Parallel()
	tap := &wireTap{network: hostNetwork{}, sent: make(chan []byte, 1)}
	p, port := newLab(t, settings{
		"cluster.nodes": "node1 node2", "cluster.secret": otherSecret, "cluster.previous_secret": liveSecret,
		"hb#1.type": "unicast", "hb#1.addr@node1": "127.0.0.1", "hb#1.port": fmt.Sprint(freePort(t)), "hb#1.interval": "1h", "hb#1.timeout": "3h",
	})
	d := serveLive(t, p, port, func(d *liveDaemon) {
		d.network = tap
		d.threads = slices.DeleteFunc(d.threads, func(t *thread) bool { return t.id == "monitor" }) // it would beat
		d.monitor.current.Store(&shell{beats: make(chan event, beatsWaiting)})
	})
	h := d.heartbeats.list[0]
	waitFor(t, patience, "there is a socket", func() bool {
		d.heartbeats.mu.Lock()
		defer d.heartbeats.mu.Unlock()
		return h.paths["node2"].conn != nil
	})
	d.heartbeats.send("node2", "hb#2", beat{salt: 1, seq: 1, epoch: 1}) // not this one
	d.heartbeats.send("node2", "hb#1", beat{salt: 5, seq: 2, epoch: 1})
	header, _ := parseBeatHeader(<-tap.sent)
	if want := (beatHeader{labKey(t, liveSecret, "default").id(), senderIDOf("default", "node1"), 5}); header != want {
		t.Errorf("header = %+v, want %+v", header, want)
	}
	_, stats := h.reportTx()
	if got := stats["peers"].(map[string]pathData)["node2"]; got.Beats != 1 || got.Errors != 1 || got.Error != "connection refused" {
		t.Errorf("node2 is %+v", got)
	}
}
