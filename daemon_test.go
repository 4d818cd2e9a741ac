// daemon_test.go: the supervisor: threads, their restarts, how they are stopped
// and started.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestRestartDelay(t *testing.T) {
	for n, want := range map[int]time.Duration{
		1: 100 * time.Millisecond, 2: 200 * time.Millisecond, 3: 400 * time.Millisecond,
		9: 25600 * time.Millisecond, 10: 30 * time.Second, 21: 30 * time.Second, 22: 30 * time.Second, 1000: 30 * time.Second,
	} {
		if got := restartDelay(n); got != want {
			t.Errorf("before restart %d: %s, want %s", n, got, want)
		}
	}
}

// scripted is a thread that does what it is told.
type scripted struct {
	orders chan func() error // what a run does; without an order it works
	begun  chan time.Time
	ended  chan time.Time
}

func (s *scripted) thread() *thread {
	return &thread{
		id:     "scripted",
		report: func() (config, stats map[string]any) { return map[string]any{}, map[string]any{} },
		run: func(ctx context.Context, _ <-chan struct{}) error {
			s.begun <- time.Now()
			defer func() { s.ended <- time.Now() }()
			select {
			case order := <-s.orders:
				return order()
			case <-ctx.Done():
				return nil
			}
		},
	}
}

func startScripted(t *testing.T) (*liveDaemon, *scripted) {
	t.Helper()
	s := &scripted{make(chan func() error), make(chan time.Time, 100), make(chan time.Time, 100)}
	d := startLive(t, nil, func(d *liveDaemon) { d.threads = append(d.threads, s.thread()) })
	s.next(t, s.begun)
	return d, s
}

func (s *scripted) next(t *testing.T, of chan time.Time) time.Time {
	t.Helper()
	select {
	case at := <-of:
		return at
	case <-time.After(patience):
		t.Fatalf("nothing happens:\n%s", allStacks())
		return time.Time{}
	}
}

// threadOf is a thread as daemon_status shows it.
func (d *liveDaemon) threadOf(id string) (got threadData) {
	d.tb.Helper()
	var all map[string]json.RawMessage
	must(d.tb, askLocal(context.Background(), d.paths, "daemon_status", nil, nil, dataOf(&all)))
	must(d.tb, json.Unmarshal(all[id], &got))
	return got
}

// TestThreadRestarts: a thread that ends uncleanly, however, is started again,
// later each time.
func TestThreadRestarts(t *testing.T) {
	d, s := startScripted(t)
	created := d.threadOf("scripted").Created
	for i, order := range []struct {
		do   func() error
		says string
	}{
		{func() error { return errors.New("no luck") }, "no luck"},
		{func() error { panic("out of order") }, "panic: out of order"},
		{func() error { return nil }, "ended without being asked to"},
		{func() error { return fmt.Errorf("%d", []int{}[len(s.orders)]) }, "panic: runtime error: index out of range [0] with length 0"},
	} {
		s.orders <- order.do
		failed := s.next(t, s.ended)
		waitFor(t, patience, "its state is told", func() bool { return d.threadOf("scripted").Restart == i+1 })
		// Running again or not yet, the last error is told, in one line.
		if got := d.threadOf("scripted"); got.Error != order.says {
			t.Errorf("failure %d: error %q, want %q", i+1, got.Error, order.says)
		} else if got.State != "stopped" && time.Since(failed) < restartDelay(i+1) {
			t.Errorf("between two runs it is %q", got.State)
		}
		delay := s.next(t, s.begun).Sub(failed)
		if want := restartDelay(i + 1); delay < want || delay > want+10*time.Second {
			t.Errorf("restart %d came after %s, want %s", i+1, delay, want)
		}
	}
	if got := d.threadOf("scripted"); got.State != "running" || got.Created <= created {
		t.Errorf("after the restarts: %+v", got)
	}
	if d.logged.count("thread ended uncleanly") != 4 || d.logged.count("daemon_test.go") < 2 {
		t.Error("the log does not tell each failure, with a panic's stack")
	}
	// One that worked for long begins anew.
	d.do(func() { d.threads[len(d.threads)-1].created = time.Now().Add(-2 * settled) })
	s.orders <- func() error { return errors.New("after all") }
	s.next(t, s.ended)
	s.next(t, s.begun)
	if d.logged.count("delay=100ms") != 2 {
		t.Error("after a minute of work the delay was not the first one")
	}
	if n := d.threadOf("scripted").Restart; n != 1 {
		t.Errorf("after a minute of work: %d failures in a row", n)
	}
	if other := d.threadOf("listener"); other.State != "running" || other.Restart != 0 {
		t.Errorf("the other thread: %+v", other)
	}
}

// TestStopWhileWaitingForRestart: a person's stop holds.
func TestStopWhileWaitingForRestart(t *testing.T) {
	d, s := startScripted(t)
	for range 3 { // the next restart is 400 ms away
		s.orders <- func() error { return errors.New("no luck") }
		s.next(t, s.ended)
		if d.threadOf("scripted").Restart < 3 {
			s.next(t, s.begun)
		}
	}
	if r := d.local("daemon_stop", "thr_id=scripted"); r.Status != 0 {
		t.Fatal(r.Error)
	}
	if got := d.threadOf("scripted"); got.State != "stopped" || got.Error != "" || got.Restart != 0 {
		t.Errorf("after daemon_stop: %+v", got)
	}
	select {
	case <-s.begun:
		t.Error("a thread that was stopped was started again")
	case <-time.After(800 * time.Millisecond):
	}
	d.local("daemon_start", "thr_id=scripted")
	s.next(t, s.begun)
	if got := d.threadOf("scripted"); got.State != "running" {
		t.Errorf("after daemon_start: %+v", got)
	}
	// daemon_start does not wait for the delay.
	s.orders <- func() error { return errors.New("no luck") }
	s.next(t, s.ended)
	d.local("daemon_start", "thr_id=scripted")
	s.next(t, s.begun)
	d.local("daemon_stop", "thr_id=scripted")
	s.next(t, s.ended)
}

// panickyNetwork is the machine's, but that Accept panics when it is told to.
type panickyNetwork struct {
	hostNetwork
	panics *atomic.Int64
}

type panickyListener struct {
	net.Listener
	panics *atomic.Int64
}

func (n panickyNetwork) listen(addr netip.AddrPort) (net.Listener, error) {
	in, err := n.hostNetwork.listen(addr)
	return panickyListener{in, n.panics}, err
}

func (l panickyListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil && l.panics.Add(-1) >= 0 {
		conn.Close()
		panic("planted")
	}
	return conn, err
}

func TestListenerThatPanicsComesBack(t *testing.T) {
	var panics atomic.Int64
	d := startLive(t, nil, func(d *liveDaemon) { d.network = panickyNetwork{panics: &panics} })
	w := d.client("node2", "127.0.0.2")
	w.ask(t, "ping", "")
	waiting := d.silent(t, "127.0.0.3")
	panics.Store(1)
	w.answers()
	waitFor(t, patience, "the listener answers again", w.answers)
	got := d.threadOf("listener")
	if got.State != "running" || got.Error != "panic: planted" || got.Restart != 1 {
		t.Errorf("listener: %+v", got)
	}
	wantClosed(t, "a connection from before", waiting)
	if _, err := w.exchangeUDP(w.aged(0), patience); err != nil {
		t.Errorf("UDP after it: %v", err)
	}
	if d.logged.count("panic: planted") != 1 {
		t.Error("the panic is not in the log, once")
	}
}

// TestListenerWaitsForItsPort: a port that is taken is not the end.
func TestListenerWaitsForItsPort(t *testing.T) {
	d := startLive(t, nil, nil)
	d.local("daemon_stop", "thr_id=listener")
	taken, err := net.Listen("tcp4", d.addr().String())
	must(t, err)
	d.local("daemon_start", "thr_id=listener")
	waitFor(t, patience, "it is tried again", func() bool { return d.threadOf("listener").Restart >= 2 })
	if got := d.threadOf("listener"); !strings.Contains(got.Error, fmt.Sprintf("cannot listen on 127.0.0.1:%d over TCP: ", d.port)) || got.Config["bound"] != nil {
		t.Errorf("listener: %+v", got)
	}
	taken.Close()
	waitFor(t, patience, "the listener answers", d.client("node2", "127.0.0.2").answers)
}

// TestListenerStopsItself: what is asked through the listener is answered by
// it, even when it is its own end.
func TestListenerStopsItself(t *testing.T) {
	d := startLive(t, nil, nil)
	w := d.client("node2", "127.0.0.2")
	for range 5 {
		if r := w.ask(t, "daemon_stop", `"thr_id": "listener"`); r.Status != 0 {
			t.Fatal(r.Error)
		}
		waitFor(t, patience, "the listener has stopped", func() bool { return d.threadOf("listener").State == "stopped" })
		d.local("daemon_start", "thr_id=listener")
		waitFor(t, patience, "the listener answers", w.answers)

		raw := w.sealed(w.message("daemon_stop", `"thr_id": "listener"`))
		answer, err := w.exchangeUDP(raw, patience)
		must(t, err)
		if r := w.opened(t, raw, answer); r.Status != 0 {
			t.Fatal(r.Error)
		}
		waitFor(t, patience, "the listener has stopped", func() bool { return d.threadOf("listener").State == "stopped" })
		d.local("daemon_start", "thr_id=listener")
		waitFor(t, patience, "the listener answers", w.answers)
	}
	if counts := d.counts(); len(counts) > 0 {
		t.Errorf("counted: %v", counts)
	}
}

// TestStopIsNotTheSendersFault: a request that the listener's end cut short is
// not held against its sender.
func TestStopIsNotTheSendersFault(t *testing.T) {
	d := startLive(t, nil, nil)
	for range 20 {
		var conns []net.Conn
		for i := range 100 {
			w := d.client("node2", fmt.Sprintf("127.0.6.%d", 1+i))
			conn, err := w.dial(patience)
			must(t, err)
			defer conn.Close()
			_, err = conn.Write(w.aged(0)[:50])
			must(t, err)
			conns = append(conns, conn)
		}
		waitFor(t, patience, "half of each request has come", func() bool {
			d.listener.conns.mu.Lock()
			defer d.listener.conns.mu.Unlock()
			return d.listener.conns.bytes == len(conns)*firstBuffer
		})
		d.local("daemon_stop", "thr_id=listener")
		waitFor(t, patience, "what waits is closed", func() bool { return d.listener.conns.len() == 0 })
		d.local("daemon_start", "thr_id=listener")
		waitFor(t, patience, "the listener answers", d.client("node2", "127.0.0.2").answers)
	}
	if counts := d.counts(); len(counts) > 0 {
		t.Errorf("%d senders were counted as invalid because the listener was stopped, up to %d times", len(counts), slices.Max(slices.Collect(maps.Values(counts))))
	}
}
