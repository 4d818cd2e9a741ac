// daemon_life_test.go: the daemon's start and its end, what it leaves behind,
// what it says to a service manager.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestStopByRequest: each way to ask for the end is answered, and told apart
// from a signal.
func TestStopByRequest(t *testing.T) {
	for name, ask := range map[string]func(d *liveDaemon) replyJSON{
		"daemon_stop, local":     func(d *liveDaemon) replyJSON { return d.local("daemon_stop") },
		"daemon_shutdown, local": func(d *liveDaemon) replyJSON { return d.local("daemon_shutdown") },
		"daemon_stop, TCP": func(d *liveDaemon) replyJSON {
			return d.client("node2", "127.0.0.2").ask(t, "daemon_stop", `"force": true`)
		},
		"daemon_stop, UDP": func(d *liveDaemon) replyJSON {
			w := d.client("node2", "127.0.0.2")
			raw := w.sealed(w.message("daemon_stop", ""))
			answer, err := w.exchangeUDP(raw, patience)
			must(t, err)
			return w.opened(t, raw, answer)
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := startLive(t, nil, nil)
			if r := ask(d); r.Status != 0 {
				t.Fatal(r.Error)
			}
			d.ends()
			if !d.asked || d.err != nil {
				t.Errorf("serve returned %t, %v", d.asked, d.err)
			}
		})
	}
	d := startLive(t, nil, nil)
	d.stopped()
	if d.asked || d.err != nil {
		t.Errorf("ended by its context, serve returned %t, %v", d.asked, d.err)
	}
	if _, err := os.Stat(d.paths.socket()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// openFiles lists this process's descriptors.
func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	var files []string
	for _, entry := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + entry.Name()); err == nil && !strings.HasPrefix(target, "/proc/") {
			files = append(files, entry.Name()+" "+target)
		}
	}
	return files
}

// goroutineIDs lists the goroutines that run, with their stacks.
func goroutineIDs() map[string]string {
	all := map[string]string{}
	for _, stack := range strings.Split(allStacks(), "\n\n") {
		id, _, _ := strings.Cut(stack, " [")
		all[id] = stack
	}
	return all
}

// TestStopLeavesNothing: after the end of a daemon that did all it can, in the
// middle of more, no goroutine and no descriptor is left.
func TestStopLeavesNothing(t *testing.T) {
	warm, err := net.Listen("tcp4", "127.0.0.1:0") // the runtime's own descriptors are there to stay
	must(t, err)
	warm.Close()
	port := fmt.Sprint(freePort(t))
	set, before, h := hold(settings{
		"listener.addr@node2": "127.0.0.1", "listener.port@node2": port,
		"listener.addr@node3": "127.0.0.1", "listener.port@node3": port,
	}, nil)
	p, own := newLab(t, set)
	labKeys()
	goroutines, files := goroutineIDs(), openFiles(t)
	d := serveLive(t, p, own, before)

	w := d.client("node2", "127.0.0.2")
	w.ask(t, "daemon_status", "")
	w.ask(t, "cluster_status", "")
	w.exchangeUDP(w.aged(0), patience)
	w.exchange([]byte("garbage\x00"))
	w.exchangeUDP([]byte("\n"), time.Millisecond)
	d.local("daemon_stop", "thr_id=listener")
	d.local("daemon_start", "thr_id=listener")
	waitFor(t, patience, "the listener answers", w.answers)
	next := freePort(t)
	configure(t, p, settings{"listener.port": fmt.Sprint(next), "cluster.secret": otherSecret, "cluster.previous_secret": liveSecret})
	w.to = netip.AddrPortFrom(w.to.Addr(), uint16(next))
	waitFor(t, patience, "the new port answers", w.answers)

	// In the middle of it all: silent clients, half requests, one in service.
	d.port = next
	h.held.Store(true)
	var open []net.Conn
	for i := range 5 {
		open = append(open, d.silent(t, fmt.Sprintf("127.0.0.%d", 10+i)))
	}
	served, _ := h.serving(t, w)
	idle, err := net.Dial("unix", p.socket())
	must(t, err)
	open = append(open, served, idle)
	var clients sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for range 4 {
		clients.Go(func() {
			for ctx.Err() == nil {
				w.answers()
				w.exchangeUDP(w.aged(0), time.Millisecond)
			}
		})
	}
	clients.Go(func() {
		<-ctx.Done()
		h.letGo()
	})
	time.AfterFunc(50*time.Millisecond, cancel)
	d.stopped()
	cancel()
	clients.Wait()
	for _, conn := range open {
		conn.Close()
	}
	waitForNothingNew(t, goroutines, files)
}

func waitForNothingNew(t *testing.T, goroutines map[string]string, files []string) {
	t.Helper()
	var left []string
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		left = nil
		for id, stack := range goroutineIDs() {
			if _, before := goroutines[id]; !before {
				left = append(left, stack)
			}
		}
		for _, file := range openFiles(t) {
			if !slices.Contains(files, file) {
				left = append(left, "descriptor "+file)
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left behind:\n%s", strings.Join(left, "\n\n"))
		}
	}
}

func TestSecondDaemon(t *testing.T) {
	p, _ := newLab(t, nil)
	var ends sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	defer ends.Wait()
	defer cancel()
	ends.Go(func() {
		if _, err := runDaemon(ctx, p, slog.New(slog.NewTextHandler(io.Discard, nil))); err != nil {
			t.Errorf("the first: %v", err)
		}
	})
	answers := func() bool { return askLocal(t.Context(), p, "ping", nil, nil, discard) == nil }
	waitFor(t, patience, "the first answers", answers)
	first := statusOf(t, p)
	limited, done := context.WithTimeout(ctx, patience)
	defer done()
	for range 3 {
		_, err := runDaemon(limited, p, slog.New(slog.NewTextHandler(io.Discard, nil)))
		if !errors.Is(err, errRunning) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) || !strings.Contains(err.Error(), p.run) {
			t.Errorf("the second: %v", err)
		}
	}
	if now := statusOf(t, p); now.Daemon.DaemonID != first.Daemon.DaemonID {
		t.Error("the second took the first one's place")
	}
	if pid, err := os.ReadFile(p.pidFile()); err != nil || strings.TrimSpace(string(pid)) != fmt.Sprint(os.Getpid()) {
		t.Errorf("pid file: %q, %v", pid, err)
	}
	cancel()
	ends.Wait()
	if _, err := os.Stat(p.pidFile()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the pid file is still there: %v", err)
	}
	again := serveLive(t, p, 0, nil) // the folders are free
	again.stopped()
}

// TestStartWithBrokenConfig: what was good before is in force, and the fault
// is shown until it is mended.
func TestStartWithBrokenConfig(t *testing.T) {
	p, port := newLab(t, nil)
	serveLive(t, p, port, nil).stopped()
	good, err := os.ReadFile(p.nodeConf())
	must(t, err)
	before, after, _ := strings.Cut(string(good), fmt.Sprintf("port = %d", port))
	must(t, os.WriteFile(p.nodeConf(), []byte(before+"port = many"+after), 0o600))
	d := serveLive(t, p, port, nil)
	want := fmt.Sprintf(`node.conf:%d: listener.port: "many" is not a number`, strings.Count(before, "\n")+1)
	if fault := d.status().Daemon.ConfigError; !strings.Contains(fault, want) {
		t.Errorf("config_error is %q, want %q", fault, want)
	}
	if d.logged.count("node.conf is not used; the last good one is in force") == 0 {
		t.Error("not logged")
	}
	d.client("node2", "127.0.0.2").ask(t, "ping", "")
	must(t, os.WriteFile(p.nodeConf(), good, 0o600))
	waitFor(t, patience, "the fault is mended", func() bool { return d.status().Daemon.ConfigError == "" })
	d.client("node2", "127.0.0.2").ask(t, "ping", "")
	d.stopped()

	must(t, os.WriteFile(p.nodeConf(), []byte("[listener\n"), 0o600))
	must(t, os.Remove(p.goodConf()))
	if _, err := newDaemon(p, slog.New(slog.NewTextHandler(io.Discard, nil))); err == nil || !strings.Contains(err.Error(), "node.conf:1:") {
		t.Errorf("a broken node.conf and none before it: %v", err)
	}
}

// serviceManager is the receiving end of sd_notify(3).
func serviceManager(t *testing.T) (messages chan string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "agentd")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "notify")
	in, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	t.Cleanup(func() { in.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	messages = make(chan string, 10_000)
	go func() {
		buffer := make([]byte, 1024)
		for {
			n, err := in.Read(buffer)
			if err != nil {
				return
			}
			messages <- string(buffer[:n])
		}
	}()
	return messages
}

func TestNotify(t *testing.T) {
	messages := serviceManager(t)
	next := func() string {
		t.Helper()
		select {
		case m := <-messages:
			return m
		case <-time.After(patience):
			t.Fatal("the service manager hears nothing")
			return ""
		}
	}
	t.Setenv("WATCHDOG_USEC", "400000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	record := filepath.Join(t.TempDir(), "nodemgr")
	t.Setenv("FAKE_NODEMGR", record)
	begun := time.Now()
	d := startLive(t, nil, nil)
	if m := next(); m != "READY=1" {
		t.Fatalf("the first message is %q", m)
	}
	for range 5 {
		if m := next(); m != "WATCHDOG=1" {
			t.Fatalf("%q instead of a sign of life", m)
		}
	}
	if took := time.Since(begun); took < time.Second || took > 5*time.Second {
		t.Errorf("five signs of life, one each 200 ms, took %s", took)
	}
	// A supervisor that hangs gives none.
	hung := make(chan struct{})
	d.do(func() {
		for len(messages) > 0 {
			<-messages
		}
		go func() {
			defer close(hung)
			time.Sleep(900 * time.Millisecond)
		}()
		<-hung
		if n := len(messages); n > 2 { // those may have been on their way
			t.Errorf("%d signs of life of a supervisor that hangs", n)
		}
	})
	// What the daemon runs does not speak in its name.
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		if value, there := os.LookupEnv(name); there {
			t.Errorf("%s=%s is still in the environment", name, value)
		}
	}
	d.client("node2", "127.0.0.2").exchangeUDP([]byte("\n"), time.Millisecond)
	waitFor(t, patience, "nodemgr has run", func() bool {
		text, _ := os.ReadFile(record)
		return strings.Contains(string(text), "end ")
	})
	inherited, err := os.ReadFile(record + ".env")
	must(t, err)
	if !strings.Contains(string(inherited), "FAKE_NODEMGR=") || strings.Contains(string(inherited), "NOTIFY_SOCKET") || strings.Contains(string(inherited), "WATCHDOG") {
		t.Errorf("a child's environment:\n%s", inherited)
	}
	d.stopped()
	last := ""
	for len(messages) > 0 || last != "STOPPING=1" {
		last = next()
	}
}

func TestNotifierOfEnvironment(t *testing.T) {
	pid := fmt.Sprint(os.Getpid())
	for _, test := range []struct {
		usec, pid string
		want      time.Duration
	}{
		{"3000000", pid, 1500 * time.Millisecond}, {"3000000", "", 1500 * time.Millisecond},
		{"3000000", "1", 0}, {"", pid, 0}, {"0", pid, 0}, {"-5", pid, 0}, {"soon", pid, 0},
	} {
		t.Setenv("WATCHDOG_USEC", test.usec)
		t.Setenv("WATCHDOG_PID", test.pid)
		if n := environmentNotifier(); n.watchdog != test.want || n.send("READY=1") != nil {
			t.Errorf("WATCHDOG_USEC=%q for process %q: every %s, want %s", test.usec, test.pid, n.watchdog, test.want)
		}
	}
}

// TestExitStatuses of the real process: by signal, by request, a second one.
func TestExitStatuses(t *testing.T) {
	d := startReal(t, nil)
	if out, err := realCommand(t, d.paths, "run").CombinedOutput(); err == nil || !strings.Contains(string(out), "agentd runs already in "+d.paths.run) {
		t.Errorf("a second one: %v, %s", err, out)
	}
	must(t, d.cmd.Process.Signal(syscall.SIGTERM))
	if status := d.exits(); status != exitDone {
		t.Errorf("SIGTERM: exit status %d", status)
	}
	d = startReal(t, nil)
	if r := d.client(t, "node2", "127.0.0.2").ask(t, "daemon_stop", ""); r.Status != 0 {
		t.Error(r.Error)
	}
	if status := d.exits(); status != exitStopped {
		t.Errorf("daemon_stop: exit status %d, want %d", status, exitStopped)
	}
}

// TestStopDespiteIdleReader: a client that does not take its replies must not
// turn a stop by request into a failure, after which a service manager would
// start the daemon again.
func TestStopDespiteIdleReader(t *testing.T) {
	for name, idle := range map[string]func(d *realDaemon) net.Conn{
		"on the local socket": func(d *realDaemon) net.Conn {
			conn, err := net.Dial("unix", d.paths.socket())
			must(t, err)
			for {
				conn.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
				if _, err := conn.Write([]byte(strings.Repeat("{\"action\": \"get_service_config\", \"options\": {\"svcname\": \"big\"}}\n", 100))); err != nil {
					return conn // neither side reads any more
				}
			}
		},
		"over TCP": func(d *realDaemon) net.Conn {
			w := d.client(t, "node2", "127.0.0.2")
			dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
				return raw.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
			}}
			conn, err := dialer.Dial("tcp", w.to.String())
			must(t, err)
			_, err = conn.Write(w.sealed(w.message("get_service_config", `"svcname": "big"`)))
			must(t, err)
			waitFor(t, patience, "the reply begins", func() bool {
				n, err := unix.IoctlGetInt(connFD(t, conn), unix.SIOCINQ)
				return err == nil && n > 0
			})
			return conn
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := startReal(t, nil)
			text := "[app#1]\nexec = /bin/true\n"
			for range 12000 {
				text += "# " + noise(60) + "\n"
			}
			must(t, os.WriteFile(d.paths.servicePath("big"), []byte(text), 0o600))
			conn := idle(d)
			defer conn.Close()
			begun := time.Now()
			must(t, askLocal(t.Context(), d.paths, "daemon_stop", nil, nil, discard))
			if status := d.exits(); status != exitStopped {
				t.Errorf("exit status %d after %s, want %d", status, time.Since(begun), exitStopped)
			}
		})
	}
}

func connFD(t *testing.T, conn net.Conn) (number int) {
	t.Helper()
	raw, err := conn.(syscall.Conn).SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) { number = int(fd) }))
	return number
}
