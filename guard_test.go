package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The guards of these tests are real processes: this binary, called as agentd
// is. Whatever the cause, they never reach this machine's sysrq: in its place
// is a file of the test's.
func init() {
	if len(os.Args) < 2 || os.Args[1] != "guard" {
		return
	}
	if len(os.Args) > 2 {
		if err := dispatch(context.Background(), os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	g, err := newGuard(context.Background(), environmentPaths())
	if err == nil {
		g.sysrq = filepath.Join(g.paths.run, "sysrq")
		g.idle = time.Second
		err = g.run(context.Background())
	}
	if err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

// guardLab is the folders of a daemon, whose place the test takes.
type guardLab struct {
	*actor
	set    guardSettings
	handle *guardHandle
	alive  chan bool
	stop   func() // of the handle's run
}

func newGuardLab(tb testing.TB, text string) *guardLab {
	tb.Helper()
	l := &guardLab{actor: newActor(tb, text), alive: make(chan bool, 1000)}
	l.set = guardSettings{Node: "node1", Timeout: time.Second, Grace: 1200 * time.Millisecond, Action: "stop"}
	must(tb, l.keepText())
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("the guard logged:\n%s\n%s", l.file(l.paths.nodeLog()), l.file(l.paths.serviceLog("svc1")))
		}
	})
	return l
}

func (l *guardLab) file(path string) string {
	text, _ := os.ReadFile(path)
	return string(text)
}

// daemon takes the place of one that runs.
func (l *guardLab) daemon() map[string]leaseClock {
	l.tb.Helper()
	var held map[string]leaseClock
	l.handle, held = openGuard(l.paths, slog.New(slog.NewTextHandler(l.tb.Output(), nil)), func(alive bool) { l.alive <- alive })
	only, err := lock(l.paths.lockFile("agentd"))
	must(l.tb, err)
	ctx, cancel := context.WithCancel(context.Background())
	var runs sync.WaitGroup
	runs.Go(func() { l.handle.run(ctx) })
	l.stop = sync.OnceFunc(func() {
		cancel()
		runs.Wait()
		l.handle.close()
		only.unlock()
	})
	l.tb.Cleanup(l.stop)
	return held
}

// holds has svc1 stopped after a while, or nothing.
func (l *guardLab) holds(after time.Duration) (deadline leaseClock) {
	l.tb.Helper()
	deadline = readLeaseClock().add(after)
	must(l.tb, l.handle.keep(guardEffect{held: []string{"svc1"}, deadline: deadline}, l.set))
	return deadline
}

func (l *guardLab) holdsNothing() {
	l.tb.Helper()
	must(l.tb, l.handle.keep(guardEffect{}, l.set))
}

// becomes waits for the guard to be told alive, or not.
func (l *guardLab) becomes(alive bool) {
	l.tb.Helper()
	select {
	case now := <-l.alive:
		if now != alive {
			l.tb.Fatalf("alive is %v", now)
		}
	case <-time.After(patience):
		l.tb.Fatalf("the guard does not become alive=%v", alive)
	}
}

// guard is the one that runs.
func (l *guardLab) guard() process {
	l.tb.Helper()
	w, err := readWords(l.paths.lockFile("guard"), 3)
	must(l.tb, err)
	return process{int(w[0]), w[1]}
}

// leave writes a list as a daemon that died left it, and starts a guard.
func (l *guardLab) leave(list guardList) {
	l.tb.Helper()
	if list.Boot == "" {
		list.Boot = bootID()
	}
	list.Mark, list.Held, list.Settings = 1, []string{"svc1"}, l.set
	data, err := json.Marshal(list)
	must(l.tb, err)
	must(l.tb, replaceFile(l.paths.guardHeld(), data))
	must(l.tb, startGuard(context.Background(), l.paths))
}

// dead is the number of no process.
var dead = process{Pid: 1 << 30, Start: 1}

const oneProgram = "[app#1]\nexec = sleep 1000\n"

func (l *guardLab) program() int {
	l.tb.Helper()
	p := l.programOf("app#1")
	if p == nil {
		l.tb.Fatal("no program runs")
	}
	return p.record.Pid
}

// started starts svc1 as a daemon, which dies then.
func (l *guardLab) started() (pid int) {
	l.tb.Helper()
	if said := l.do(verbStart); said != "<nil>" {
		l.tb.Fatal(said)
	}
	pid = l.program()
	l.die()
	return pid
}

// TestGuardStopsAtTheDeadline of a daemon that died: not before, and the guard
// leaves nothing to be stopped again, and goes.
func TestGuardStopsAtTheDeadline(t *testing.T) {
	t.Parallel()
	l := newGuardLab(t, oneProgram)
	pid := l.started()
	deadline := readLeaseClock().add(time.Second)
	l.leave(guardList{Deadline: deadline, Daemon: dead})
	waitFor(t, patience, "the program ends", func() bool { return !alive(pid) })
	if late := readLeaseClock().raw - deadline.raw; late < 0 || late > 5*time.Second {
		t.Errorf("stopped %s after the deadline", late)
	}
	waitFor(t, patience, "the list is empty", func() bool { held, err := openGuardState(l.paths); return err == nil && len(held) == 0 })
	guard := l.guard()
	waitFor(t, patience, "the guard ends", func() bool { return !guard.alive() })
	wantText(t, "the service's log", l.file(l.paths.serviceLog("svc1")), "warn node1 - the guard stops it: no daemon extended its right to run until 20", "node1 app#1 stopped in ", "the guard has stopped it")
	wantText(t, "the node's log", l.file(l.paths.nodeLog()), "level=WARN", "thread=guard service=svc1", "the guard ends")
	if _, err := os.Stat(l.journalPath()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the journal of the stop: %v", err)
	}
}

// TestGuardUsesTheTextInForce, and the file where there is none.
func TestGuardUsesTheTextInForce(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(l *guardLab) error{
		"the service's file is broken": func(l *guardLab) error {
			return os.WriteFile(l.paths.servicePath("svc1"), []byte("[app"), 0o600)
		},
		"the text that was kept is gone": func(l *guardLab) error {
			return errors.Join(os.Remove(l.paths.heldText("svc1")), os.WriteFile(l.paths.servicePath("svc1"), []byte(oneProgram), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newGuardLab(t, oneProgram)
			pid := l.started()
			must(t, damage(l))
			l.leave(guardList{Deadline: readLeaseClock(), Daemon: dead})
			waitFor(t, patience, "the program ends", func() bool { return !alive(pid) })
		})
	}
}

// TestGuardOwnDeadline: an instance may have one of its own, and either clock
// is enough.
func TestGuardOwnDeadline(t *testing.T) {
	t.Parallel()
	for name, own := range map[string]func(now, far leaseClock) leaseClock{
		"raw":  func(now, far leaseClock) leaseClock { return leaseClock{now.raw, far.boot} },
		"boot": func(now, far leaseClock) leaseClock { return leaseClock{far.raw, now.boot} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newGuardLab(t, oneProgram)
			pid, now := l.started(), readLeaseClock()
			far := now.add(time.Hour)
			l.leave(guardList{Deadline: far, Own: map[string]leaseClock{"svc1": own(now.add(200*time.Millisecond), far)}, Daemon: dead})
			waitFor(t, patience, "the program ends", func() bool { return !alive(pid) })
		})
	}
}

// TestGuardIsExtended: while a daemon moves the deadline on, nothing happens;
// a list of another boot, and what is in no list, is left alone.
func TestGuardIsExtended(t *testing.T) {
	t.Parallel()
	l := newGuardLab(t, oneProgram)
	pid := l.started()
	l.daemon()
	l.holds(time.Hour)
	l.becomes(true)
	for range 40 {
		l.holds(2 * time.Second)
		time.Sleep(100 * time.Millisecond)
	}
	if !alive(pid) {
		t.Fatal("it was stopped while the deadline moved on")
	}
	l.holdsNothing()
	time.Sleep(2500 * time.Millisecond)
	if !alive(pid) {
		t.Fatal("it was stopped though it is not held")
	}
	l.holds(400 * time.Millisecond)
	l.stop()
	waitFor(t, patience, "the program ends", func() bool { return !alive(pid) })
}

func TestGuardOfAnotherBoot(t *testing.T) {
	t.Parallel()
	l := newGuardLab(t, oneProgram)
	pid := l.started()
	l.leave(guardList{Boot: "another", Deadline: readLeaseClock(), Daemon: dead})
	var guard process
	waitFor(t, patience, "a guard", func() bool {
		w, err := readWords(l.paths.lockFile("guard"), 3)
		guard = process{}
		if err == nil {
			guard = process{int(w[0]), w[1]}
		}
		return err == nil
	})
	waitFor(t, patience, "it ends", func() bool { return !guard.alive() })
	if !alive(pid) {
		t.Error("it was stopped")
	}
	if held, err := openGuardState(l.paths); err != nil || len(held) > 0 {
		t.Errorf("held: %v, %v", held, err)
	}
}

// cutOff is a real daemon in the middle of an action on svc1.
func (l *guardLab) cutOff(t *testing.T, expect string) *realDaemon {
	t.Helper()
	p, port := newLab(t, nil)
	text := "[DEFAULT]\nnodes = node1\n" + l.spec().doc.String()
	must(t, os.WriteFile(p.servicePath("svc1"), []byte(text), 0o600))
	l.paths = p
	must(t, l.keepText())
	d := runReal(t, p, port)
	order := func(expect string) {
		encoded, err := encodeOptions("set_service_monitor", []string{"svcname=svc1", "local_expect=" + expect})
		must(t, err)
		waitFor(t, patience, "the order is taken", func() bool {
			return askLocal(t.Context(), p, "set_service_monitor", encoded, nil, discard) == nil
		})
	}
	order("started")
	if expect == "stopped" {
		waitFor(t, patience, "it runs", func() bool { return l.read("started") != "" })
		time.Sleep(100 * time.Millisecond) // until the start is over; a stop would cancel it
		order("stopped")
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logged:\n%s", l.file(p.serviceLog("svc1")))
		}
		for _, pid := range processesWith("OSVCRUN=" + p.run) {
			unix.Kill(pid, unix.SIGKILL)
		}
	})
	return d
}

// TestGuardKillsAStart that a dead daemon left running.
func TestGuardKillsAStart(t *testing.T) {
	l := newGuardLab(t, "[app#1]\nstart = @/start\nstop = @/stop\ncheck = @/check\n")
	l.script("start", "setsid sleep 1000 & echo $! >@/child; echo $$ >@/pid; sleep 1000")
	l.script("stop", "echo stop >>@/stopped")
	l.script("check", "exit 1")
	d := l.cutOff(t, "started")
	pid, child := l.pid("pid"), l.pid("child")
	daemon := process{Pid: d.cmd.Process.Pid}
	must(t, d.cmd.Process.Kill())
	<-d.exited
	deadline := readLeaseClock().add(300 * time.Millisecond)
	l.leave(guardList{Deadline: deadline, Daemon: daemon})
	waitFor(t, patience, "the start ends", func() bool { return !alive(pid) && !alive(child) })
	if readLeaseClock().raw < deadline.raw {
		t.Error("before the deadline")
	}
	waitFor(t, patience, "it is stopped", func() bool { return l.read("stopped") == "stop" })
}

// TestGuardKillsAStartOfALivingDaemon, which does the rest itself and lives on.
func TestGuardKillsAStartOfALivingDaemon(t *testing.T) {
	l := newGuardLab(t, "[app#1]\nstart = @/start\nstop = @/stop\ncheck = false\n")
	l.script("start", "echo $$ >@/pid; sleep 1000")
	l.script("stop", "echo stop >>@/stopped")
	d := l.cutOff(t, "started")
	l.set.Grace = 10 * time.Second
	daemon := process{Pid: d.cmd.Process.Pid}
	var err error
	daemon.Start, err = processStart(daemon.Pid)
	must(t, err)
	pid := l.pid("pid")
	begun := time.Now()
	l.leave(guardList{Deadline: readLeaseClock(), Daemon: daemon})
	waitFor(t, patience, "the start ends", func() bool { return !alive(pid) })
	if took := time.Since(begun); took > l.set.Grace/2 {
		t.Errorf("after %s", took)
	}
	waitFor(t, patience, "it is stopped by both", func() bool { return len(strings.Fields(l.read("stopped"))) == 2 })
	if !daemon.alive() {
		t.Error("the daemon was killed")
	}
}

// TestGuardKillsAHungDaemon that holds the instance: at half of the grace, not
// before. One that lives and stops it itself is left alone.
func TestGuardKillsAHungDaemon(t *testing.T) {
	l := newGuardLab(t, "[app#1]\nstart = @/start\nstop = @/stop\ncheck = @/check\n")
	l.script("start", "echo $$ >@/started; echo $$ >@/up")
	l.script("stop", "echo $$ >>@/stops; [ -e @/fast ] || sleep 1000; rm @/up")
	l.script("check", "[ -e @/up ]")
	d := l.cutOff(t, "stopped")
	pid := l.pid("stops")
	must(t, d.cmd.Process.Signal(unix.SIGSTOP))
	must(t, os.WriteFile(filepath.Join(l.dir, "fast"), nil, 0o600))
	daemon := process{Pid: d.cmd.Process.Pid}
	var err error
	daemon.Start, err = processStart(daemon.Pid)
	must(t, err)
	deadline := readLeaseClock().add(300 * time.Millisecond)
	l.leave(guardList{Deadline: deadline, Daemon: daemon})
	select {
	case <-d.exited:
	case <-time.After(patience):
		t.Fatal("the daemon is not killed")
	}
	if after := readLeaseClock().raw - deadline.raw; after < l.set.Grace/2 || after > l.set.Grace/2+5*time.Second {
		t.Errorf("killed %s after the deadline", after)
	}
	waitFor(t, patience, "it is stopped", func() bool { return l.read("up") == "" })
	if alive(pid) {
		t.Error("the daemon's stop goes on")
	}
	wantText(t, "the log", l.file(l.paths.serviceLog("svc1")), fmt.Sprintf("the daemon, process %d, holds it and does not stop it; it is killed", daemon.Pid))
}

func TestGuardLeavesTheStopToTheDaemon(t *testing.T) {
	t.Parallel()
	l := newGuardLab(t, "[app#1]\nstart = true\nstop = @/stop\ncheck = false\n")
	l.script("stop", "echo $$ >>@/stops; sleep 0.3")
	l.set.Grace = time.Minute // at half of it, the guard would kill this very process
	l.daemon()
	l.holdsNothing()
	l.becomes(true)
	l.holds(300 * time.Millisecond)
	time.Sleep(300 * time.Millisecond)
	if said := l.do(verbStop); said != "<nil>" {
		t.Fatal(said)
	}
	l.holdsNothing()
	waitFor(t, patience, "the guard leaves it", func() bool {
		return strings.Contains(l.file(l.paths.serviceLog("svc1")), errLeft.Error()) || l.read("stops") != "" && strings.Contains(l.read("stops"), "\n")
	})
	if stops := strings.Fields(l.read("stops")); len(stops) > 2 {
		t.Errorf("%d stops", len(stops))
	}
	if !l.guard().alive() {
		t.Error("the guard is gone")
	}
}

// TestQuorumAction: at five sixths of the grace, though the stop hangs.
func TestQuorumAction(t *testing.T) {
	t.Parallel()
	for action, want := range map[string]string{"reboot": "b", "crash": "c", "stop": ""} {
		t.Run(action, func(t *testing.T) {
			t.Parallel()
			l := newGuardLab(t, "[app#1]\nstart = true\nstop = @/stop\ncheck = true\n")
			l.script("stop", "echo $$ >@/stopping; trap '' TERM; sleep 1000")
			sysrq := filepath.Join(l.paths.run, "sysrq")
			must(t, os.WriteFile(sysrq, nil, 0o600))
			l.set.Action = action
			deadline := readLeaseClock().add(300 * time.Millisecond)
			l.leave(guardList{Deadline: deadline, Daemon: dead})
			l.pid("stopping")
			said := func() bool {
				return strings.Contains(l.file(l.paths.serviceLog("svc1")), "it is not down in time, and others may start it now; quorum_action: "+action)
			}
			for !said() && l.file(sysrq) == "" {
				if readLeaseClock().raw > deadline.raw+patience {
					t.Fatal("nothing is done")
				}
				time.Sleep(time.Millisecond)
			}
			if after := readLeaseClock().raw - deadline.raw; after < l.set.Grace/6*5 || after > l.set.Grace+5*time.Second {
				t.Errorf("after %s", after)
			}
			waitFor(t, patience, "it is said", said)
			if got := l.file(sysrq); got != want {
				t.Errorf("sysrq %q, want %q", got, want)
			}
		})
	}
}

// TestNoQuorumAction where the stop works in time, where a guard comes late to
// what is down, and where a failing stop is tried again.
func TestNoQuorumAction(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		stop, check string
		ago         time.Duration
		stops       int
	}{
		"in time":    {"echo x >>@/stops; rm -f @/up; sleep 0.5", "[ -e @/up ]", 0, 1},
		"come late":  {"echo x >>@/stops", "exit 1", time.Hour, 1},
		"again":      {"echo x >>@/stops; [ $(wc -l <@/stops) -gt 2 ] || exit 1; rm -f @/up", "[ -e @/up ]", 0, 3},
		"down fails": {"echo x >>@/stops; exit 1", "exit 1", 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newGuardLab(t, "[app#1]\nstart = true\nstop = @/stop\ncheck = @/check\n")
			l.set.Grace = 12 * time.Second
			l.script("stop", test.stop)
			l.script("check", test.check)
			must(t, os.WriteFile(filepath.Join(l.dir, "up"), nil, 0o600))
			sysrq := filepath.Join(l.paths.run, "sysrq")
			must(t, os.WriteFile(sysrq, nil, 0o600))
			l.set.Action = "reboot"
			l.leave(guardList{Deadline: readLeaseClock().add(-test.ago), Daemon: dead})
			waitFor(t, patience, "it is stopped", func() bool {
				return strings.Contains(l.file(l.paths.serviceLog("svc1")), "the guard has stopped it")
			})
			time.Sleep(time.Second)
			if got := l.file(sysrq); got != "" {
				t.Errorf("sysrq %q", got)
			}
			if got := len(strings.Fields(l.read("stops"))); got != test.stops {
				t.Errorf("%d stops, want %d", got, test.stops)
			}
		})
	}
}

// TestGuardIsReplaced when it dies, hangs, or is stopped; what it held is held.
func TestGuardIsReplaced(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		signal unix.Signal
		within time.Duration
	}{
		"killed": {unix.SIGKILL, guardHangs},
		"paused": {unix.SIGSTOP, guardHangs + 10*time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newGuardLab(t, oneProgram)
			pid := l.started()
			l.daemon()
			l.holds(time.Hour)
			l.becomes(true)
			first := l.guard()
			must(t, unix.Kill(first.Pid, test.signal))
			begun := time.Now()
			l.becomes(false)
			if took := time.Since(begun); took > 4*time.Second {
				t.Errorf("noticed after %s", took)
			}
			l.becomes(true)
			if took := time.Since(begun); took > test.within {
				t.Errorf("replaced after %s", took)
			}
			if second := l.guard(); second == first || first.alive() || !second.alive() {
				t.Errorf("guards: %v, then %v", first, second)
			}
			if !alive(pid) {
				t.Error("stopped meanwhile")
			}
			l.holds(300 * time.Millisecond)
			waitFor(t, patience, "the program ends", func() bool { return !alive(pid) })
		})
	}
}

// TestGuardOutlivesTheDaemon and is found again by the next, which is told what
// is held, and takes the place of the process to be killed.
func TestGuardOutlivesTheDaemon(t *testing.T) {
	t.Parallel()
	l := newGuardLab(t, oneProgram)
	l.daemon()
	deadline := l.holds(time.Hour)
	l.becomes(true)
	guard := l.guard()
	l.stop()
	l.becomes(false)
	list, err := readGuardList(l.paths, guardList{})
	must(t, err)
	list.Daemon = dead
	data, _ := json.Marshal(list)
	must(t, os.WriteFile(l.paths.guardHeld(), data, 0o600))
	later := deadline.add(time.Second)
	f, err := os.OpenFile(l.paths.guardDeadline(), os.O_RDWR, 0)
	must(t, err)
	must(t, writeWords(f, list.Mark, uint64(later.raw), uint64(later.boot)))
	f.Close()

	held := l.daemon()
	if want := map[string]leaseClock{"svc1": later}; !maps.Equal(held, want) {
		t.Errorf("held: %v, want %v", held, want)
	}
	l.becomes(true)
	if now := l.guard(); now != guard {
		t.Errorf("another guard: %v, before %v", now, guard)
	}
	list, err = readGuardList(l.paths, guardList{})
	must(t, err)
	if list.Daemon.Pid != os.Getpid() || list.until("svc1") != later {
		t.Errorf("taken over: %+v", list)
	}
}

// TestGuardSignals, and what it has of its starter: nothing.
func TestGuardSignals(t *testing.T) {
	t.Parallel()
	l := newGuardLab(t, oneProgram)
	l.set.Watchdog = filepath.Join(l.dir, "watchdog")
	must(t, os.WriteFile(l.set.Watchdog, nil, 0o600))
	list := guardList{Boot: bootID(), Mark: 1, Settings: l.set, Held: []string{"svc1"}, Deadline: readLeaseClock().add(time.Hour)}
	data, _ := json.Marshal(list)
	must(t, replaceFile(l.paths.guardHeld(), data))
	inherited, err := os.Open(os.DevNull)
	must(t, err)
	defer inherited.Close()
	cmd := exec.Command("/proc/self/exe", "guard")
	cmd.Env = append(os.Environ(), "OSVCETC="+l.paths.etc, "OSVCVAR="+l.paths.lib, "OSVCLOG="+l.paths.log, "OSVCRUN="+l.paths.run)
	cmd.ExtraFiles = []*os.File{inherited}
	out, err := cmd.StdoutPipe()
	must(t, err)
	cmd.Stderr = cmd.Stdout
	must(t, cmd.Start())
	ended := make(chan error, 1)
	if text, err := io.ReadAll(out); err != nil || len(text) > 0 { // ends only when nobody holds it
		t.Errorf("printed: %q, %v", text, err)
	}
	go func() { ended <- cmd.Wait() }()
	waitFor(t, patience, "it feeds the watchdog", func() bool { return l.file(l.set.Watchdog) != "" })
	pid := cmd.Process.Pid
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	must(t, err)
	for _, fd := range fds {
		if to, _ := os.Readlink(fd); to == os.DevNull && filepath.Base(fd) > "2" || strings.HasPrefix(to, "pipe:") {
			t.Errorf("it holds %s: %s", filepath.Base(fd), to)
		}
	}
	if sid, err := unix.Getsid(pid); err != nil || sid != pid {
		t.Errorf("its session is %d, %v", sid, err)
	}
	if exec.Command("sh", "-c", "echo -1000 >/proc/self/oom_score_adj").Run() == nil {
		wantText(t, "oom_score_adj", l.file(fmt.Sprintf("/proc/%d/oom_score_adj", pid)), "-1000")
	}
	if _, err := newGuardError(l); err == nil || !strings.Contains(err.Error(), "a guard runs already") {
		t.Errorf("a second one: %v", err)
	}
	for _, signal := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM} {
		must(t, unix.Kill(pid, signal))
	}
	waitFor(t, patience, "it says that it stays", func() bool {
		return strings.Contains(l.file(l.paths.nodeLog()), "the guard does not end, since instances are held")
	})
	select {
	case <-ended:
		t.Fatal("it ended")
	case <-time.After(200 * time.Millisecond):
	}
	list.Held, list.Mark = nil, 2
	data, _ = json.Marshal(list)
	must(t, replaceFile(l.paths.guardHeld(), data))
	time.Sleep(300 * time.Millisecond)
	must(t, unix.Kill(pid, unix.SIGTERM))
	select {
	case err := <-ended:
		must(t, err)
	case <-time.After(patience):
		t.Fatal("it does not end")
	}
	if fed := l.file(l.set.Watchdog); !strings.HasSuffix(fed, "V") || strings.Trim(fed[:len(fed)-1], "\x00") != "" {
		t.Errorf("the watchdog got %q", fed)
	}
}

// newGuardError runs a guard that cannot run, in this process.
func newGuardError(l *guardLab) (*guard, error) { return newGuard(context.Background(), l.paths) }

// TestGuardFeedsTheWatchdog through a FIFO: from when it has a reader, up to
// the deadline, and again once the instance is down.
func TestGuardFeedsTheWatchdog(t *testing.T) {
	t.Parallel()
	l := newGuardLab(t, "[app#1]\nstart = true\nstop = @/stop\ncheck = @/check\n")
	l.script("stop", "[ -e @/go ] || exit 1; touch @/down")
	l.script("check", "[ ! -e @/down ]")
	l.set.Watchdog = filepath.Join(l.dir, "watchdog")
	must(t, unix.Mkfifo(l.set.Watchdog, 0o600))
	l.daemon()
	l.holdsNothing()
	l.becomes(true)
	waitFor(t, patience, "it says that nobody reads", func() bool {
		return strings.Contains(l.file(l.paths.nodeLog()), "cannot open node.watchdog")
	})
	fifo, err := os.OpenFile(l.set.Watchdog, os.O_RDWR, 0)
	must(t, err)
	defer fifo.Close()
	fed := func(within time.Duration) (n int) {
		fifo.SetReadDeadline(time.Now().Add(within))
		for buffer := make([]byte, 1); ; {
			read, err := fifo.Read(buffer)
			if err != nil {
				return n
			}
			n += read
		}
	}
	fed(time.Second)
	if n := fed(2 * time.Second); n < 5 { // the timeout is 1 s
		t.Errorf("fed %d times in 2 s while nothing is held", n)
	}
	l.holds(time.Hour)
	if n := fed(2 * time.Second); n < 5 {
		t.Errorf("fed %d times in 2 s before the deadline", n)
	}
	l.holds(0)
	fed(300 * time.Millisecond)
	if n := fed(2 * time.Second); n > 0 {
		t.Errorf("fed %d times behind the deadline", n)
	}
	must(t, os.WriteFile(filepath.Join(l.dir, "go"), nil, 0o600))
	waitFor(t, patience, "it is stopped", func() bool {
		return l.file(filepath.Join(l.dir, "down")) == "" && fileExists(filepath.Join(l.dir, "down"))
	})
	if fed(2*time.Second) == 0 {
		t.Error("not fed though it is down")
	}
	fifo.Close() // a reader that goes must not end the guard
	time.Sleep(time.Second)
	if !l.guard().alive() {
		t.Error("the guard is gone")
	}
}

func fileExists(path string) bool { _, err := os.Stat(path); return err == nil }

// TestGuardStateOnFullDisk: the deadline moves on, what cannot be told is
// refused, and no instance gets more time than both lists give it.
func TestGuardStateOnFullDisk(t *testing.T) {
	l := newGuardLab(t, oneProgram)
	if err := unix.Mount("tmpfs", l.paths.run, "tmpfs", 0, "size=256k"); err != nil {
		t.Skip("cannot mount: ", err)
	}
	t.Cleanup(func() { unix.Unmount(l.paths.run, unix.MNT_DETACH) })
	must(t, l.keepText())
	for _, name := range []string{"svc2", "svc3"} {
		must(t, replaceFile(l.paths.heldText(name), []byte(oneProgram)))
	}
	h, _ := openGuard(l.paths, slog.New(slog.DiscardHandler), nil)
	defer h.close()
	at := func(s time.Duration) leaseClock { return leaseClock{s * time.Second, s * time.Second} }
	two := []string{"svc1", "svc2"}
	must(t, h.keep(guardEffect{two, at(10), nil}, l.set))
	if err := os.WriteFile(filepath.Join(l.paths.run, "fill"), make([]byte, 1<<20), 0o600); err == nil {
		t.Fatal("the disk is not full")
	}
	want := func(what string, want map[string]leaseClock) {
		t.Helper()
		if held, err := openGuardState(l.paths); err != nil || !maps.Equal(held, want) {
			t.Errorf("%s: %v, %v; want %v", what, held, err, want)
		}
	}
	must(t, h.keep(guardEffect{two, at(20), nil}, l.set))
	want("extended", map[string]leaseClock{"svc1": at(20), "svc2": at(20)})
	refused := func(e guardEffect) {
		t.Helper()
		if err := h.keep(e, l.set); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("keep %v: %v", e, err)
		}
		if _, sound := h.look(); sound {
			t.Error("it is said to be sound")
		}
	}
	refused(guardEffect{[]string{"svc1", "svc2", "svc3"}, at(30), nil})
	want("one more", map[string]leaseClock{"svc1": at(30), "svc2": at(30)})
	refused(guardEffect{two, at(50), map[string]leaseClock{"svc2": at(40)}})
	want("one with its own", map[string]leaseClock{"svc1": at(40), "svc2": at(40)})
	refused(guardEffect{[]string{"svc1"}, at(60), nil})
	want("one less", map[string]leaseClock{"svc1": at(60), "svc2": at(60)})
	must(t, os.Remove(filepath.Join(l.paths.run, "fill")))
	must(t, h.keep(guardEffect{[]string{"svc1"}, at(70), nil}, l.set))
	want("room again", map[string]leaseClock{"svc1": at(70)})
	if _, sound := h.look(); !sound {
		t.Error("it is not said to be sound")
	}
	if err := h.keep(guardEffect{[]string{"svc1", "svc4"}, at(80), nil}, l.set); err == nil || !strings.Contains(err.Error(), "svc4") {
		t.Errorf("a service without its text: %v", err)
	}
	must(t, h.keep(guardEffect{[]string{"svc1"}, at(90), nil}, l.set)) // what was refused is given back: the list is as it was
	want("given back", map[string]leaseClock{"svc1": at(90)})
	if _, sound := h.look(); !sound {
		t.Error("after what was refused is given back, it is not said to be sound")
	}
}

// TestGuardDeadlineBelongsToItsList: a daemon that died between two writes gave
// no instance the time of another list.
func TestGuardDeadlineBelongsToItsList(t *testing.T) {
	t.Parallel()
	l := newGuardLab(t, oneProgram)
	h, _ := openGuard(l.paths, slog.New(slog.DiscardHandler), nil)
	defer h.close()
	first, second, third := leaseClock{1, 1}, leaseClock{2, 2}, leaseClock{3, 3}
	must(t, h.keep(guardEffect{held: []string{"svc1"}, deadline: second}, l.set))
	list := h.list
	list.Mark, list.Deadline = 12, first
	data, err := json.Marshal(list)
	must(t, err)
	must(t, replaceFile(l.paths.guardHeld(), data))
	if held, err := openGuardState(l.paths); err != nil || held["svc1"] != first {
		t.Errorf("held: %v, %v; want the list's own deadline", held, err)
	}
	must(t, writeWords(h.file, 12, 3, 3))
	if held, err := openGuardState(l.paths); err != nil || held["svc1"] != third {
		t.Errorf("held: %v, %v; want the list's record", held, err)
	}
}

// TestGuardDamagedState: what does not read changes nothing, for the guard and
// for the next daemon; what is gone is written again.
func TestGuardDamagedState(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(p paths) error{
		"the list is garbage":  func(p paths) error { return replaceFile(p.guardHeld(), []byte(`{"boot": 7`)) },
		"the list is no file":  func(p paths) error { return errors.Join(os.Remove(p.guardHeld()), unix.Mkfifo(p.guardHeld(), 0o600)) },
		"the list is gone":     func(p paths) error { return os.Remove(p.guardHeld()) },
		"the deadline is gone": func(p paths) error { return os.Remove(p.guardDeadline()) },
		"the deadline is garbage": func(p paths) error {
			return os.WriteFile(p.guardDeadline(), []byte(strings.Repeat("x", 28)), 0o600)
		},
		"both are gone": func(p paths) error { return errors.Join(os.Remove(p.guardHeld()), os.Remove(p.guardDeadline())) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newGuardLab(t, oneProgram)
			pid := l.started()
			l.daemon()
			l.holds(time.Hour)
			l.becomes(true)
			l.holds(5 * time.Second)
			time.Sleep(1100 * time.Millisecond) // until the guard has read it
			l.stop()
			must(t, damage(l.paths))
			time.Sleep(600 * time.Millisecond)
			if !alive(pid) {
				t.Fatal("stopped before its deadline")
			}
			waitFor(t, patience, "the program ends", func() bool { return !alive(pid) })
		})
	}
	for name, gone := range map[string]func(p paths) string{"list": paths.guardHeld, "deadline": paths.guardDeadline} {
		t.Run("the "+name+" is written again", func(t *testing.T) {
			t.Parallel()
			l := newGuardLab(t, oneProgram)
			l.daemon()
			l.holds(time.Hour)
			l.becomes(true)
			must(t, os.Remove(gone(l.paths)))
			l.becomes(false)
			l.holds(2 * time.Hour)
			deadline := l.holds(3 * time.Hour)
			l.becomes(true)
			if held, err := openGuardState(l.paths); err != nil || held["svc1"] != deadline {
				t.Errorf("held: %v, %v", held, err)
			}
		})
	}
}

// TestGuardEndsWithItsFolder: nobody can reach it any more. Where the daemon
// made the folder again, another guard takes its place and what it holds.
func TestGuardEndsWithItsFolder(t *testing.T) {
	t.Parallel()
	t.Run("nothing is held", func(t *testing.T) {
		t.Parallel()
		l := newGuardLab(t, oneProgram)
		l.daemon()
		l.holdsNothing()
		l.becomes(true)
		guard := l.guard()
		l.stop()
		must(t, os.Rename(l.paths.run, l.paths.run+".old"))
		waitFor(t, patience, "it ends", func() bool { return !guard.alive() })
		if fileExists(l.paths.run) {
			t.Error("it made the folder again")
		}
	})
	t.Run("the daemon goes on", func(t *testing.T) {
		t.Parallel()
		l := newGuardLab(t, oneProgram)
		pid := l.started()
		l.daemon()
		l.holds(time.Hour)
		l.becomes(true)
		first := l.guard()
		programs := l.paths.instanceRun("svc1")
		must(t, os.Rename(l.paths.run, l.paths.run+".old"))
		must(t, os.MkdirAll(filepath.Dir(programs), 0o700))
		must(t, os.Rename(strings.Replace(programs, "/run/", "/run.old/", 1), programs))
		l.becomes(false)
		l.holds(time.Hour)
		l.becomes(true)
		if second := l.guard(); second == first || first.alive() {
			t.Errorf("guards: %v, then %v", first, second)
		}
		if !alive(pid) {
			t.Error("it was stopped")
		}
	})
}

// TestGuardRests between its signs of life, whatever it looks at meanwhile.
func TestGuardRests(t *testing.T) {
	t.Parallel()
	for name, held := range map[string]bool{"idle": false, "held": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newGuardLab(t, oneProgram)
			l.daemon()
			l.holdsNothing()
			l.becomes(true)
			if held {
				l.holds(time.Hour)
			}
			time.Sleep(100 * time.Millisecond)
			signs := map[uint64]bool{}
			for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
				if held {
					l.holds(time.Hour)
				}
				w, err := readWords(l.paths.lockFile("guard"), 3)
				must(t, err)
				signs[w[2]] = true
			}
			if n := len(signs); n < 2 || n > 12 {
				t.Errorf("%d signs of life in 2 s, one each %s", n, l.set.interval())
			}
		})
	}
}

// TestWordsAreWhole: a reader never sees a part of a write.
func TestWordsAreWhole(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "words")
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	must(t, writeWords(f, 0, 0, 0))
	end := time.Now().Add(500 * time.Millisecond)
	var writer sync.WaitGroup
	writer.Go(func() {
		for n := uint64(1); time.Now().Before(end); n++ {
			writeWords(f, n, n, n)
		}
	})
	for time.Now().Before(end) {
		w, err := readWords(path, 3)
		if err != nil || w[0] != w[1] || w[1] != w[2] {
			t.Fatalf("read %v, %v", w, err)
		}
	}
	writer.Wait()
}

func FuzzGuardState(f *testing.F) {
	f.Add([]byte(`{"boot":"b","mark":1,"held":["svc1"],"own":{"svc1":[1,2]},"deadline":[3,4],"settings":{"grace":5}}`), []byte{})
	f.Add([]byte(`{"held":["../x"],"deadline":[]}`), make([]byte, 28))
	f.Fuzz(func(t *testing.T, list, record []byte) {
		dir := t.TempDir()
		p := paths{dir, dir, dir, dir}
		list = []byte(strings.ReplaceAll(string(list), `"b"`, fmt.Sprintf("%q", bootID())))
		must(t, os.WriteFile(p.guardHeld(), list, 0o600))
		must(t, os.WriteFile(p.guardDeadline(), record, 0o600))
		l, err := readGuardList(p, guardList{})
		if err != nil && (l.Held != nil || l.Mark != 0) {
			t.Errorf("%v, and yet %+v", err, l)
		}
		if slices.ContainsFunc(l.Held, func(name string) bool { return checkServiceName(name) != nil }) || len(l.Held) > 0 && l.Settings.Grace <= 0 {
			t.Errorf("taken: %+v", l)
		}
	})
}
