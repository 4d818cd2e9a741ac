// harness_test.go: daemons to try things on, in the test process or as a real
// process, each with folders and a port of its own, and a client that sends
// whatever bytes a test wants from whatever loopback address.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	liveSecret  = "the secret of the tests, of no cluster"
	otherSecret = "another secret of the tests"
	// patience bounds the wait for what has no bound of its own.
	patience = 20 * time.Second
)

// labFolder holds what the tests share; TestMain removes it.
var labFolder string

// fakeNodemgr stands on the path for daemons in the test process: it says when
// it runs, and goes on while a file holds it.
const fakeNodemgr = `#!/bin/sh
[ -n "$FAKE_NODEMGR" ] || exit 0
env >"$FAKE_NODEMGR.env"
echo "start $*" >>"$FAKE_NODEMGR"
while [ -e "$FAKE_NODEMGR.hold" ]; do sleep 0.02; done
echo "end $*" >>"$FAKE_NODEMGR"
`

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "AGENTD", "OSVCETC", "OSVCVAR", "OSVCLOG", "OSVCRUN"} {
		os.Unsetenv(name)
	}
	var err error
	if labFolder, err = os.MkdirTemp("", "agentd-lab"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(labFolder)
	if err := os.WriteFile(filepath.Join(labFolder, "nodemgr"), []byte(fakeNodemgr), 0o700); err != nil {
		panic(err)
	}
	os.Setenv("PATH", labFolder+":"+os.Getenv("PATH"))
	return m.Run()
}

// labKeys holds the derived keys that the tests need, so that scrypt runs
// three times and not once a daemon.
var labKeys = sync.OnceValue(func() *keyStore {
	store := &keyStore{path: filepath.Join(labFolder, "keys"), failed: func(err error) { panic(err) }}
	for _, of := range [][2]string{{liveSecret, "default"}, {otherSecret, "default"}, {liveSecret, joinCluster}} {
		if _, err := store.master(of[0], of[1]); err != nil {
			panic(err)
		}
	}
	return &keyStore{path: store.path}
})

func labKey(tb testing.TB, secret, cluster string) masterKey {
	tb.Helper()
	key, err := labKeys().master(secret, cluster)
	must(tb, err)
	return key
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// waitFor polls condition, and fails the test when it does not hold in time.
func waitFor(tb testing.TB, within time.Duration, what string, condition func() bool) {
	tb.Helper()
	for end := time.Now().Add(within); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("not within %s: %s", within, what)
		}
	}
}

// settings are parameters of node.conf.
type settings map[string]string

// newLab makes the folders of a daemon, short enough for a socket's name, and
// its node.conf: node1 of node1, node2 and node3 on a free port of 127.0.0.1.
func newLab(tb testing.TB, set settings) (p paths, port int) {
	tb.Helper()
	dir, err := os.MkdirTemp("", "agentd")
	must(tb, err)
	tb.Cleanup(func() { os.RemoveAll(dir) })
	p = paths{filepath.Join(dir, "etc"), filepath.Join(dir, "var"), filepath.Join(dir, "log"), filepath.Join(dir, "run")}
	must(tb, p.makeFolders())
	keys, err := os.ReadFile(labKeys().path)
	must(tb, err)
	must(tb, os.WriteFile(p.keys(), keys, 0o600))
	release := filepath.Join(dir, "release")
	must(tb, os.WriteFile(release, []byte("Lab release 4.11\n"), 0o600))
	port = freePort(tb)
	all := settings{
		"node.name": "node1", "cluster.nodes": "node1 node2 node3", "cluster.secret": liveSecret,
		"listener.addr": "127.0.0.1", "listener.port": strconv.Itoa(port), "release.file": release,
	}
	maps.Copy(all, set)
	configure(tb, p, all)
	return p, port
}

// configure sets parameters in node.conf, as nodemgr set does; one without a
// value is removed.
func configure(tb testing.TB, p paths, set settings) {
	tb.Helper()
	must(tb, nodeConfFile(p).edit(func(doc *ini) error {
		for _, name := range slices.Sorted(maps.Keys(set)) {
			section, key, scope, err := splitParameter(name)
			if err == nil && set[name] == "" {
				doc.unset(section, key, scope)
			} else if err == nil {
				err = doc.set(section, key, scope, set[name])
			}
			if err != nil {
				return err
			}
		}
		return nil
	}))
}

// freePort finds one below those that the kernel gives to clients, so that no
// connection takes it meanwhile.
func freePort(tb testing.TB) int {
	tb.Helper()
	for range 1000 {
		port := 12000 + rand.IntN(20000)
		tcp, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
		if err != nil {
			continue
		}
		udp, err := net.ListenPacket("udp4", fmt.Sprintf("0.0.0.0:%d", port))
		tcp.Close()
		if err == nil {
			udp.Close()
			return port
		}
	}
	tb.Fatal("no free port")
	return 0
}

// logText is what a daemon logs.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logText) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), s)
}

// liveDaemon is a daemon in the test process.
type liveDaemon struct {
	*daemon
	tb       testing.TB
	listener *listener
	port     int
	logged   *logText
	stopped  func() // ends it and waits
	done     chan struct{}
	asked    bool // what serve returned
	err      error
}

// startLive runs a daemon. before, unless nil, may change its parts.
func startLive(tb testing.TB, set settings, before func(*liveDaemon)) *liveDaemon {
	tb.Helper()
	p, port := newLab(tb, set)
	return serveLive(tb, p, port, before)
}

func serveLive(tb testing.TB, p paths, port int, before func(*liveDaemon)) *liveDaemon {
	tb.Helper()
	logged := &logText{}
	inner, err := newDaemon(p, slog.New(slog.NewTextHandler(logged, nil)))
	must(tb, err)
	d := &liveDaemon{daemon: inner, tb: tb, port: port, logged: logged, done: make(chan struct{})}
	d.listener = newListener(inner)
	d.threads[0] = d.listener.thread()
	if before != nil {
		before(d)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(d.done)
		d.asked, d.err = inner.serve(ctx)
	}()
	d.stopped = func() {
		tb.Helper()
		cancel()
		d.ends()
	}
	tb.Cleanup(func() {
		d.stopped()
		if tb.Failed() {
			tb.Logf("the daemon on port %d logged:\n%s", port, d.logged.text.String())
		}
	})
	waitFor(tb, patience, "the daemon answers", func() bool {
		select {
		case <-d.done:
			tb.Fatalf("the daemon ended: %v", d.err)
		default:
		}
		d.listener.mu.Lock()
		bound := d.listener.bound.IsValid()
		d.listener.mu.Unlock()
		return bound && inner.monitor.current.Load() != nil && askLocal(context.Background(), p, "ping", nil, nil, discard) == nil
	})
	return d
}

// ends waits for the daemon's end.
func (d *liveDaemon) ends() {
	d.tb.Helper()
	select {
	case <-d.done:
	case <-time.After(patience):
		d.tb.Fatalf("the daemon does not end:\n%s", allStacks())
	}
}

func allStacks() string {
	stacks := make([]byte, 4<<20)
	return string(stacks[:runtime.Stack(stacks, true)])
}

func (d *liveDaemon) addr() netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(d.port))
}

// liveStatus is what the tests look at of daemon_status.
type liveStatus struct {
	Listener struct {
		threadData
		Stats map[string]int64 `json:"stats"`
	}
	Daemon daemonData
}

func statusOf(tb testing.TB, p paths) (s liveStatus) {
	tb.Helper()
	must(tb, askLocal(context.Background(), p, "daemon_status", nil, nil, dataOf(&s)))
	return s
}

func (d *liveDaemon) status() liveStatus { d.tb.Helper(); return statusOf(d.tb, d.paths) }

// local asks the daemon over its socket; options are key=value words.
func (d *liveDaemon) local(action string, options ...string) (r replyJSON) {
	d.tb.Helper()
	encoded, err := encodeOptions(action, options)
	must(d.tb, err)
	must(d.tb, askLocal(context.Background(), d.paths, action, encoded, nil, func(_ []byte, got replyJSON) error {
		r = got
		return nil
	}))
	return r
}

// counts are the blacklist's, by "transport address nodename", with a * behind
// where the port is privileged.
func (d *liveDaemon) counts() map[string]int {
	counts := map[string]int{}
	for _, e := range d.blacklist.list() {
		name := strings.TrimSpace(fmt.Sprintf("%s %s %s", e.sender.transport, e.sender.addr, cmp.Or(e.sender.node, noMember)))
		if e.sender.privileged {
			name += "*"
		}
		counts[name] = e.count
	}
	return counts
}

// wireClient sends in a node's name from a loopback address.
type wireClient struct {
	to         netip.AddrPort
	receiver   string // its nodename
	from       string // this side's address
	privileged bool   // from a port below 1024, if this user may
	cluster    string
	node       string
	key        masterKey
}

func (d *liveDaemon) client(node, from string) wireClient {
	d.tb.Helper()
	return wireClient{to: d.addr(), receiver: "node1", from: from, cluster: "default", node: node, key: labKey(d.tb, liveSecret, "default")}
}

// message is the JSON of a request with the present time.
func (w wireClient) message(action, options string) string {
	return fmt.Sprintf(`{"time": %d, "to": %q, "action": %q, "options": {%s}}`, time.Now().UnixMilli(), w.receiver, action, options)
}

func (w wireClient) sealed(message string) []byte {
	raw, _ := seal(w.key, messageContext{label: labelRequest, cluster: w.cluster, node: w.node}, []byte(message))
	return raw
}

// dial connects from the client's address.
func (w wireClient) dial(timeout time.Duration) (*net.TCPConn, error) {
	local := &net.TCPAddr{IP: net.ParseIP(w.from)}
	end := time.Now().Add(timeout)
	for try := 0; ; try++ {
		if w.privileged {
			local.Port = 600 + rand.IntN(424)
		}
		conn, err := (&net.Dialer{LocalAddr: local, Deadline: end, Control: choosePortLate}).Dial("tcp", w.to.String())
		switch {
		case err == nil:
			return conn.(*net.TCPConn), conn.SetDeadline(end)
		case w.privileged && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)):
			w.privileged, local.Port = false, 0
		case try > 2000 || !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL):
			return nil, err
		}
	}
}

// choosePortLate has a client's port chosen when it connects, so that it only
// has to be free towards this one server: thousands of others' are not.
func choosePortLate(_, _ string, raw syscall.RawConn) error {
	return raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	})
}

// exchange sends raw over TCP and returns the answer without its NUL; io.EOF
// when the connection was closed without one.
func (w wireClient) exchange(raw []byte) ([]byte, error) {
	conn, err := w.dial(patience)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if _, err := conn.Write(raw); err != nil && !isReset(err) {
		return nil, err
	}
	answer, err := answerOn(conn)
	conn.Read(make([]byte, 1)) // who closes second has its port back at once
	return answer, err
}

func answerOn(conn net.Conn) ([]byte, error) {
	answer, err := bufio.NewReader(conn).ReadBytes(0)
	if err == nil {
		return answer[:len(answer)-1], nil
	}
	if len(answer) == 0 && isReset(err) {
		return nil, io.EOF
	}
	return answer, fmt.Errorf("after %d bytes: %w", len(answer), err)
}

// exchangeUDP sends raw as a datagram and returns the first answer, waiting up
// to wait.
func (w wireClient) exchangeUDP(raw []byte, wait time.Duration) ([]byte, error) {
	conn, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(w.from)}}).Dial("udp", w.to.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if _, err := conn.Write(raw); err != nil {
		return nil, err
	}
	conn.SetReadDeadline(time.Now().Add(wait))
	answer := make([]byte, 1<<16)
	n, err := conn.Read(answer)
	return bytes.TrimRight(answer[:n], "\x00"), err
}

// opened opens the answer to the request raw and checks all that a client
// should.
func (w wireClient) opened(tb testing.TB, raw, answer []byte) replyJSON {
	tb.Helper()
	request, err := parseEnvelope(bytes.Trim(bytes.Clone(raw), requestBlanks))
	must(tb, err)
	a := caller{cluster: request.cluster, node: w.node, key: w.key}
	r, message, err := a.openReply(answer, w.receiver, &request.salt, 0)
	if err != nil {
		tb.Fatalf("the answer %.200q: %v", answer, err)
	}
	if apart := time.Since(time.UnixMilli(r.Time)).Abs(); apart > time.Minute {
		tb.Errorf("the reply's time is %s off", apart)
	}
	if !json.Valid(message) {
		tb.Errorf("the reply is not JSON: %q", message)
	}
	return r
}

// ask sends a well-formed request over TCP and opens the answer.
func (w wireClient) ask(tb testing.TB, action, options string) replyJSON {
	tb.Helper()
	raw := w.sealed(w.message(action, options))
	answer, err := w.exchange(raw)
	if err != nil {
		tb.Fatalf("%s from %s as %s: %v", action, w.from, w.node, err)
	}
	return w.opened(tb, raw, answer)
}

// answers tells whether a ping is answered, quietly.
func (w wireClient) answers() bool {
	answer, err := w.exchange(w.sealed(w.message("ping", "")))
	return err == nil && len(answer) > 0
}

// realBinary builds agentd once, as it is installed: nodemgr beside it.
var realBinary = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(labFolder, "bin")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	binary := filepath.Join(dir, "agentd")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot build agentd: %w\n%s", err, out)
	}
	wrapper, err := os.ReadFile("bin/nodemgr")
	if err != nil {
		return "", err
	}
	return binary, os.WriteFile(filepath.Join(dir, "nodemgr"), wrapper, 0o700)
})

// realDaemon is a process.
type realDaemon struct {
	tb     testing.TB
	paths  paths
	port   int
	cmd    *exec.Cmd
	logged string        // file
	exited chan struct{} // closed when it has
}

// startReal runs the built binary and waits until its listener answers.
func startReal(tb testing.TB, set settings, environment ...string) *realDaemon {
	tb.Helper()
	p, port := newLab(tb, set)
	return runReal(tb, p, port, environment...)
}

func runReal(tb testing.TB, p paths, port int, environment ...string) *realDaemon {
	tb.Helper()
	d := &realDaemon{tb: tb, paths: p, port: port, cmd: realCommand(tb, p, "run"), logged: p.nodeLog(), exited: make(chan struct{})}
	log, err := os.Create(d.logged)
	must(tb, err)
	defer log.Close()
	d.cmd.Stderr = log
	d.cmd.Env = append(d.cmd.Env, environment...)
	must(tb, d.cmd.Start())
	go func() {
		defer close(d.exited)
		d.cmd.Wait()
	}()
	tb.Cleanup(func() {
		d.cmd.Process.Kill()
		<-d.exited
		if tb.Failed() {
			text, _ := os.ReadFile(d.logged)
			tb.Logf("agentd logged:\n%s", text)
		}
	})
	w := d.client(tb, "node3", "127.0.0.9")
	waitFor(tb, patience, "the process answers", func() bool {
		select {
		case <-d.exited:
			tb.Fatal("agentd ended at once")
		default:
		}
		return w.answers()
	})
	return d
}

// realCommand is the binary with the folders of p.
func realCommand(tb testing.TB, p paths, args ...string) *exec.Cmd {
	tb.Helper()
	binary, err := realBinary()
	must(tb, err)
	cmd := exec.Command(binary, args...)
	cmd.Env = append(os.Environ(), "OSVCETC="+p.etc, "OSVCVAR="+p.lib, "OSVCLOG="+p.log, "OSVCRUN="+p.run)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func (d *realDaemon) client(tb testing.TB, node, from string) wireClient {
	tb.Helper()
	return wireClient{
		to: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(d.port)), receiver: "node1",
		from: from, cluster: "default", node: node, key: labKey(tb, liveSecret, "default"),
	}
}

// exits waits for the process to end and returns its exit status.
func (d *realDaemon) exits() int {
	d.tb.Helper()
	select {
	case <-d.exited:
	case <-time.After(patience):
		d.tb.Fatal("the process does not end")
	}
	return d.cmd.ProcessState.ExitCode()
}
