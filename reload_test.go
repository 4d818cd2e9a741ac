// reload_test.go: changes of node.conf while the daemon works.

package main

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// applied is how long a change of node.conf may take to be in force: it is
// looked at once a second.
const applied = 2 * time.Second

// at is the client w of another port.
func (w wireClient) at(port int) wireClient {
	w.to = netip.AddrPortFrom(w.to.Addr(), uint16(port))
	return w
}

// soon tells whether a ping is answered at once; a handshake that is dropped
// is not waited for.
func (w wireClient) soon() bool {
	conn, err := w.dial(250 * time.Millisecond)
	if err != nil {
		return false
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write(w.aged(0)); err != nil {
		return false
	}
	answer, err := answerOn(conn)
	return err == nil && len(answer) > 0
}

// TestPortChangesUnderLoad: no connection that was made loses its answer, and
// the new port answers in time.
func TestPortChangesUnderLoad(t *testing.T) {
	d := startLive(t, nil, nil)
	var port, answered, lost atomic.Int64
	port.Store(int64(d.port))
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for i := range 8 {
		w := d.client("node2", fmt.Sprintf("127.0.0.%d", 10+i))
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := w.at(int(port.Load())).dial(500 * time.Millisecond)
				if err != nil {
					continue // never begun: the port has moved
				}
				conn.SetDeadline(time.Now().Add(patience))
				raw := w.aged(0)
				_, writeErr := conn.Write(raw)
				answer, err := answerOn(conn)
				conn.Close()
				if err != nil || len(answer) == 0 {
					lost.Add(1)
					t.Errorf("a connection that was made has lost its answer: written: %v, read: %v", writeErr, err)
					continue
				}
				answered.Add(1)
			}
		})
	}
	w := d.client("node3", "127.0.0.2")
	ports := []int{d.port}
	for len(ports) < 6 {
		next := freePort(t)
		ports = append(ports, next)
		before := answered.Load()
		begun := time.Now()
		configure(t, d.paths, settings{"listener.port": fmt.Sprint(next)})
		for !w.at(next).soon() && time.Since(begun) < patience {
			time.Sleep(5 * time.Millisecond)
		}
		took := time.Since(begun)
		port.Store(int64(next))
		if took > applied {
			t.Errorf("port %d answers after %s", next, took)
		}
		t.Logf("port %d answers after %s", next, took.Round(time.Millisecond))
		waitFor(t, patience, "the clients follow", func() bool { return answered.Load() > before+100 })
	}
	close(stop)
	clients.Wait()
	t.Logf("%d answered, %d lost", answered.Load(), lost.Load())
	for _, old := range ports[:5] {
		waitFor(t, patience, "the old port is free", func() bool {
			in, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", old))
			if err == nil {
				in.Close()
			}
			return err == nil
		})
	}
	if got := d.threadOf("listener"); got.Restart != 0 || got.Config["bound"] != fmt.Sprintf("127.0.0.1:%d", ports[5]) {
		t.Errorf("listener: %+v", got)
	}
}

// TestRefuseHandshakes: a socket that is let go completes what has begun, and
// begins nothing: a handshake that comes later is neither made nor refused.
func TestRefuseHandshakes(t *testing.T) {
	in, err := hostNetwork{}.listen(netip.MustParseAddrPort("127.0.0.1:0"))
	must(t, err)
	defer in.Close()
	early, err := net.Dial("tcp", in.Addr().String())
	must(t, err)
	defer early.Close()
	if err := refuseHandshakes(in.(*net.TCPListener)); err != nil {
		t.Fatalf("cannot refuse handshakes, so each connection in the backlog is reset: %v", err)
	}
	late, err := net.DialTimeout("tcp", in.Addr().String(), 300*time.Millisecond)
	if err == nil {
		late.Close()
		t.Error("a handshake was completed")
	} else if kindOf(err) != answerTimeout {
		t.Errorf("a handshake was refused: %v", err)
	}
	conn, err := in.Accept()
	must(t, err)
	defer conn.Close()
	for _, ends := range [][2]net.Conn{{early, conn}, {conn, early}} {
		_, err := ends[0].Write([]byte("hello"))
		must(t, err)
		ends[1].SetReadDeadline(time.Now().Add(patience))
		if n, err := ends[1].Read(make([]byte, 10)); n != 5 || err != nil {
			t.Errorf("%d bytes over the connection that had begun: %v", n, err)
		}
	}
}

// TestLetGo: a connection that waits in the queue of a socket that is let go
// is still taken.
func TestLetGo(t *testing.T) {
	d := startLive(t, nil, nil)
	s, err := bind(hostNetwork{}, netip.AddrPortFrom(d.addr().Addr(), uint16(freePort(t))))
	must(t, err)
	defer s.close()
	early, err := net.Dial("tcp", s.addr.String())
	must(t, err)
	defer early.Close()
	s.letGo(patience)
	conn, err := s.tcp.Accept()
	must(t, err)
	conn.Close()
}

// TestPortChangesBack: the old port soon after the new one, as one does who has
// mistyped it.
func TestPortChangesBack(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	next := freePort(t)
	configure(t, d.paths, settings{"listener.port": fmt.Sprint(next)})
	waitFor(t, patience, "the new port answers", w.at(next).soon)
	configure(t, d.paths, settings{"listener.port": fmt.Sprint(d.port)})
	begun := time.Now()
	waitFor(t, patience, "the listener is back", func() bool {
		return d.threadOf("listener").Config["bound"] == fmt.Sprintf("127.0.0.1:%d", d.port)
	})
	if took := time.Since(begun); took > applied {
		t.Errorf("the port that was left a moment ago answers after %s", took)
	}
	if !w.answers() {
		t.Error("no answer on it")
	}
}

// TestOldPortIsLeftDespiteDatagrams: who goes on sending to the old port does
// not keep it open.
func TestOldPortIsLeftDespiteDatagrams(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	next := freePort(t)
	configure(t, d.paths, settings{"listener.port": fmt.Sprint(next)})
	waitFor(t, patience, "the new port answers", w.at(next).soon)
	sender, err := net.Dial("udp", d.addr().String())
	must(t, err)
	defer sender.Close()
	sender.SetReadDeadline(time.Now().Add(patience))
	refused := make(chan error, 1)
	go func() {
		_, err := sender.Read(make([]byte, 1)) // nobody answers this, but its port's end is told
		refused <- err
	}()
	begun := time.Now()
	for {
		sender.Write([]byte("x"))
		select {
		case err := <-refused:
			if kindOf(err) != answerRefused {
				t.Error(err)
			}
			return
		case <-time.After(time.Millisecond):
		}
		if time.Since(begun) > lettingGo+4*time.Second {
			t.Fatalf("the old port still takes datagrams %s after the new one answers", time.Since(begun))
		}
	}
}

// TestServiceOutlivesItsSocket: a request in service is answered although port
// and address change meanwhile, and again.
func TestServiceOutlivesItsSocket(t *testing.T) {
	d, h := startHeld(t, settings{})
	w := d.client("node2", "127.0.0.2")
	conn, raw := h.serving(t, w)
	next := freePort(t)
	configure(t, d.paths, settings{"listener.port": fmt.Sprint(next)})
	waitFor(t, patience, "the new port answers", w.at(next).soon)
	// 0.0.0.0 cannot be bound beside 127.0.0.1: here the old one goes first.
	configure(t, d.paths, settings{"listener.addr": "0.0.0.0"})
	other := w.at(next)
	other.to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.8"), uint16(next))
	waitFor(t, patience, "the new address answers", other.soon)
	if !w.at(next).answers() {
		t.Error("the old address, which is one of the new, does not answer")
	}
	h.letGo()
	answer, err := answerOn(conn)
	must(t, err)
	if r := w.opened(t, raw, answer); r.Status != 0 {
		t.Error(r.Error)
	}
}

// TestAddressThatCannotBeBound: the listener stays where it is, says so, and
// goes on answering; when the address can be had, it moves.
func TestAddressThatCannotBeBound(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	configure(t, d.paths, settings{"listener.addr": "192.0.2.1"}) // nobody's
	said := func() string { text, _ := d.threadOf("listener").Config["error"].(string); return text }
	waitFor(t, patience, "the fault is told", func() bool {
		return strings.Contains(said(), fmt.Sprintf("cannot listen on 192.0.2.1:%d over TCP: ", d.port))
	})
	if got := d.threadOf("listener"); got.State != "running" || got.Config["bound"] != d.addr().String() || !w.answers() {
		t.Errorf("listener: %+v", got)
	}
	configure(t, d.paths, settings{"listener.addr": "127.0.0.1"})
	waitFor(t, patience, "the fault is gone", func() bool { return said() == "" })
	if !w.answers() {
		t.Error("no answer after it")
	}

	taken, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", freePort(t)))
	must(t, err)
	defer taken.Close()
	next := taken.Addr().(*net.TCPAddr).Port
	configure(t, d.paths, settings{"listener.port": fmt.Sprint(next)})
	waitFor(t, patience, "the fault is told", func() bool { return strings.Contains(said(), fmt.Sprintf("127.0.0.1:%d over TCP", next)) })
	if !w.answers() {
		t.Error("no answer on the old port")
	}
	taken.Close()
	waitFor(t, patience, "the port is taken as soon as it is free", w.at(next).soon)
	if said() != "" {
		t.Errorf("error: %s", said())
	}
}

// TestTriesToBindCostNoService: as long as 0.0.0.0 cannot be had, since
// another program has the port on another address, the listener serves where
// it is.
func TestTriesToBindCostNoService(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	taken, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.7:%d", d.port))
	must(t, err)
	defer taken.Close()
	configure(t, d.paths, settings{"listener.addr": "0.0.0.0"})
	waitFor(t, patience, "the fault is told", func() bool { return d.threadOf("listener").Config["error"] != nil })
	worst, failed, last := time.Duration(0), 0, error(nil)
	for begun := time.Now(); time.Since(begun) < bindAgain+2*time.Second; {
		asked := time.Now()
		if _, err := w.exchange(w.aged(0)); err != nil {
			failed, last = failed+1, err
		}
		worst = max(worst, time.Since(asked))
		time.Sleep(time.Millisecond)
	}
	if failed > 0 {
		t.Errorf("%d requests were not answered while the listener tried to bind another address: %v", failed, last)
	}
	if worst > time.Second {
		t.Errorf("an answer took %s while the listener tried to bind another address", worst)
	}
}

// TestBrokenConfigIsNotUsed: the last good one stays, and the fault is shown.
func TestBrokenConfigIsNotUsed(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	good, err := os.ReadFile(d.paths.nodeConf())
	must(t, err)
	next := freePort(t)
	text := strings.Replace(string(good), fmt.Sprintf("port = %d", d.port), fmt.Sprintf("port = %d", next), 1)
	line := strings.Count(text, "\n") + 2
	for fault, want := range map[string]string{
		"[upgrade]\nstall_after = soon\n":   fmt.Sprintf(`node.conf:%d: upgrade.stall_after: "soon"`, line),
		"[upgrade]\nfinalize one by one\n":  fmt.Sprintf("node.conf:%d: ", line),
		"[upgrade\n":                        fmt.Sprintf("node.conf:%d: ", line-1),
		"[cluster]\nquorum@node1 = true\n":  fmt.Sprintf("node.conf:%d: cluster.quorum@node1: ", line),
		"[cluster]\nwitnesses = stranger\n": fmt.Sprintf(`node.conf:%d: cluster.witnesses: "stranger"`, line),
	} {
		must(t, os.WriteFile(d.paths.nodeConf(), []byte(text+fault), 0o600))
		begun := time.Now()
		waitFor(t, patience, want, func() bool { return strings.Contains(d.status().Daemon.ConfigError, want) })
		if took := time.Since(begun); took > applied+time.Second {
			t.Errorf("%s was shown after %s", want, took)
		}
		if w.at(next).soon() {
			t.Fatal("a file that does not parse is in force")
		}
		w.ask(t, "ping", "")
	}
	noSecret := strings.Replace(text, "secret = ", "env = ", 1)
	must(t, os.WriteFile(d.paths.nodeConf(), []byte(noSecret), 0o600))
	waitFor(t, patience, "that the secret is missing is told", func() bool { return strings.Contains(d.status().Daemon.ConfigError, "node.conf") })
	must(t, os.Remove(d.paths.nodeConf()))
	waitFor(t, patience, "that there is no file is told", func() bool {
		return strings.Contains(d.status().Daemon.ConfigError, "no such file")
	})
	w.ask(t, "ping", "")
	must(t, os.WriteFile(d.paths.nodeConf(), []byte(text), 0o600))
	waitFor(t, patience, "the file is in force", w.at(next).soon)
	if fault := d.status().Daemon.ConfigError; fault != "" {
		t.Errorf("config_error is still %q", fault)
	}
	if d.logged.count(liveSecret) > 0 {
		t.Error("the secret is in the log")
	}
}

// TestSecretChanges: the previous one opens as long as it is configured; the
// old one alone is refused, and the change clears the blacklist.
func TestSecretChanges(t *testing.T) {
	d := startLive(t, nil, nil)
	old := d.client("node2", "127.0.0.2")
	next := old
	next.key = labKey(t, otherSecret, "default")
	for range strikes + 1 {
		if next.answers() {
			t.Fatal("a secret that is not configured opens")
		}
	}
	begun := time.Now()
	configure(t, d.paths, settings{"cluster.secret": otherSecret, "cluster.previous_secret": liveSecret})
	waitFor(t, patience, "the blacklist is cleared", func() bool { return len(d.counts()) == 0 })
	if took := time.Since(begun); took > applied+time.Second {
		t.Errorf("taken up after %s", took)
	}
	for range 3 {
		next.ask(t, "ping", "") // asks for a reply under its own key
		old.ask(t, "ping", "")
	}
	configure(t, d.paths, settings{"cluster.previous_secret": ""})
	waitFor(t, patience, "the old secret is refused", func() bool { return !old.answers() })
	if counts := d.counts(); counts["tcp 127.0.0.2 node2"] != 1 {
		t.Errorf("counts: %v", counts)
	}
	next.ask(t, "ping", "")
}

// TestMembershipClearsItsOwn: a node that comes or goes is forgiven; others
// are not.
func TestMembershipClearsItsOwn(t *testing.T) {
	d := startLive(t, nil, nil)
	two, three := d.client("node2", "127.0.0.2"), d.client("node3", "127.0.0.3")
	for range strikes {
		two.exchange(replaced(two.aged(0), `"data": "`, `"data": "AAAA`))
		three.exchange(replaced(three.aged(0), `"data": "`, `"data": "AAAA`))
	}
	want := func(what string, counts ...string) {
		t.Helper()
		waitFor(t, patience, what, func() bool {
			got := d.counts()
			for _, name := range counts {
				if got[name] != strikes {
					return false
				}
			}
			return len(got) == len(counts)
		})
	}
	want("both are shut out", "tcp 127.0.0.2 node2", "tcp 127.0.0.3 node3")
	begun := time.Now()
	configure(t, d.paths, settings{"cluster.nodes": "node1 node3"})
	want("node2 is forgotten", "tcp 127.0.0.3 node3")
	if took := time.Since(begun); took > applied+time.Second {
		t.Errorf("taken up after %s", took)
	}
	if two.answers() || three.answers() {
		t.Error("one that is no member, or one that is shut out, is answered")
	}
	if counts := d.counts(); counts["127.0.0.2 -"] != 1 || counts["tcp 127.0.0.3 node3"] != strikes {
		t.Errorf("counts: %v", counts)
	}
	configure(t, d.paths, settings{"cluster.nodes": "node1 node2 node3"})
	waitFor(t, patience, "node2 is back", two.answers)
	if three.answers() {
		t.Error("the change of another node has cleared node3")
	}
}
