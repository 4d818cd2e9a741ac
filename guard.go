// guard.go: the guard (design.md §8): a process of its own that stops the
// instances at their deadline. A daemon that is well moves the deadline on, or
// stops the instance itself; one that is dead, hung or stopped does not, and
// then nobody else would give way. It reads what the daemon left (deadline.go),
// decides nothing else, and does not wait: its loop is never held up by a
// command, a lock or a log, so that quorum_action comes in time, and the
// watchdog is fed by nothing but this loop.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// readLeaseClock reads the clocks by which the right to run is measured.
func readLeaseClock() leaseClock {
	var raw, boot unix.Timespec
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &raw), unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)); err != nil {
		panic(err) // clocks that each kernel since 2.6.39 has
	}
	return leaseClock{time.Duration(raw.Nano()), time.Duration(boot.Nano())}
}

// ahead is how long it takes until the moment has come by one of the clocks.
func (t leaseClock) ahead(moment leaseClock) time.Duration {
	return min(moment.raw-t.raw, moment.boot-t.boot)
}

// guard is the process. All but the first group is owned by its loop.
type guard struct {
	paths   paths
	sysrq   string        // the kernel's trigger
	idle    time.Duration // how long it stays for nothing
	only    fileLock      // there is one guard; its file says who it is
	self    process
	log     *slog.Logger
	logs    *serviceLog
	lines   chan func() // to be logged: a disk that hangs holds nobody up
	watcher *watcher
	ctx     context.Context
	jobs    sync.WaitGroup
	list    atomic.Pointer[guardList] // the last good one
	results chan guardResult

	limit  *logLimit
	stamp  string // of the list's file
	stops  map[string]*guardStop
	dog    watchdog
	needed leaseClock // when it was last
}

// guardStop is the stop of an instance whose deadline has passed.
type guardStop struct {
	due  leaseClock // for quorum_action
	down bool       // it was seen down
	said bool       // that it was not, in time
	done bool       // quorum_action was
}

type guardResult struct {
	service string
	down    bool // else it is left to the daemon
}

func bindGuard(flags *flag.FlagSet) body {
	detach := flags.Bool("detach", false, "start it in a session of its own and return")
	return func(ctx context.Context, p paths, _ []string) error {
		if *detach {
			return detachGuard()
		}
		g, err := newGuard(ctx, p)
		if err != nil {
			return err
		}
		return g.run(ctx)
	}
}

// detachGuard makes a guard that is not its starter's child.
func detachGuard() error {
	cmd := exec.Command(selfBinary, "guard")
	cmd.Args[0], cmd.Dir = "agentd", "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start the guard: %w", err)
	}
	return cmd.Process.Release()
}

// newGuard takes the guard's place and leaves all that its starter gave it.
func newGuard(ctx context.Context, p paths) (*guard, error) {
	patience, cancel := context.WithTimeout(ctx, dyingPatience)
	defer cancel()
	only, err := awaitLock(patience, p.lockFile("guard"))
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("a guard runs already in %s: %w", p.run, err)
	}
	if err != nil {
		return nil, err
	}
	g := &guard{
		paths: p, sysrq: "/proc/sysrq-trigger", idle: guardIdle, only: only, watcher: newWatcher(nil),
		lines: make(chan func(), linesWaiting), results: make(chan guardResult), stops: map[string]*guardStop{},
		dog: watchdog{fd: -1}, limit: newLogLimit(time.Now), needed: readLeaseClock(),
	}
	g.list.Store(&guardList{})
	g.log = slog.New(slog.NewTextHandler(guardLog{g}, nil)).With("thread", "guard")
	g.logs = newServiceLog(p, func() string { return g.list.Load().Settings.Node }, nil, g.log)
	g.logs.limit = 0 // the daemon rotates
	if g.self, err = thisProcess(); err == nil {
		err = leaveStarter(p)
	}
	return g, err
}

// leaveStarter lets go of what a process inherits. Files that this one opened
// are closed on exec; so what is not was inherited.
func leaveStarter(p paths) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return err
	}
	for _, entry := range open {
		fd, _ := strconv.Atoi(entry.Name())
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); fd > 2 && err == nil && flags&unix.FD_CLOEXEC == 0 {
			unix.Close(fd)
		}
	}
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	if f, err := os.OpenFile(p.nodeLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err == nil {
		debug.SetCrashOutput(f, debug.CrashOptions{}) // keeps a descriptor of its own
		f.Close()
	}
	unix.Setsid() // an error means that it has a session of its own
	unix.Umask(0o022)
	// What is not allowed does without: the guard of a user is a process as others.
	os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	os.WriteFile("/proc/self/comm", []byte("agentd-guard"), 0) // not to be ended with the daemon by its name
	return os.Chdir("/")
}

// guardLog appends to the node's log.
type guardLog struct{ g *guard }

func (l guardLog) Write(line []byte) (int, error) {
	text := slices.Clone(line)
	l.g.say(func() {
		if f, err := os.OpenFile(l.g.paths.nodeLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err == nil {
			f.Write(text)
			f.Close()
		}
	})
	return len(line), nil
}

// rare logs what may come again with each turn of the loop.
func (g *guard) rare(text string, err error) {
	if g.limit.allow() {
		g.log.Error(text, "err", err)
	}
}

func (g *guard) say(line func()) {
	select {
	case g.lines <- line:
	default: // the disk hangs, or is too slow
	}
}

// run guards until nothing is left to be guarded.
func (g *guard) run(ctx context.Context) error {
	defer g.only.unlock()
	ctx, cancel := context.WithCancel(ctx)
	g.ctx = ctx
	var helpers, logging sync.WaitGroup
	logging.Go(func() {
		for line := range g.lines {
			line()
		}
	})
	defer logging.Wait()
	defer close(g.lines)
	defer helpers.Wait()
	defer g.jobs.Wait()
	defer cancel()
	helpers.Go(func() { g.watcher.run(ctx) }) // without it, the loop looks all the same, a little later
	changed, _, err := g.watcher.add(g.paths.run)
	if err != nil {
		return err
	}
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGTERM)
	// Caught and not ignored: what the guard starts would ignore them too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGHUP)
	g.log.Info("the guard begins", "pid", g.self.Pid)
	for {
		now := readLeaseClock()
		if err := writeWords(g.only.f, uint64(g.self.Pid), g.self.Start, uint64(now.raw)); err != nil {
			g.rare("the guard cannot show that it lives", err) // the daemon starts nothing then
		}
		g.read()
		g.stopOverdue(now)
		g.enforce(now)
		g.feed(now)
		if g.over(now) {
			return g.end("it is not needed")
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(g.pause(now)):
		case <-changed:
		case r := <-g.results:
			if s := g.stops[r.service]; r.down {
				s.down = true
			} else {
				delete(g.stops, r.service)
			}
		case <-asked:
			if !g.holds() {
				return g.end("SIGTERM")
			}
			g.log.Warn("the guard does not end, since instances are held: stop the services, or start the daemon")
		}
	}
}

// read takes up what the daemon left since. What does not read, or is gone,
// changes nothing.
func (g *guard) read() {
	before := *g.list.Load()
	stamp := fileStamp(g.paths.guardHeld())
	now, err := before.refreshed(g.paths), error(nil)
	if stamp != g.stamp {
		if now, err = readGuardList(g.paths, before); err != nil {
			now = before
			if !errors.Is(err, os.ErrNotExist) || len(before.Held) > 0 {
				g.rare("the guard goes on with what it knows", err)
			}
		}
		g.stamp = stamp
	}
	g.list.Store(&now)
}

// overdue tells whether an instance is held and its deadline has passed, as
// the files say at this very moment.
func (g *guard) overdue(service string) bool {
	l := g.list.Load().refreshed(g.paths)
	return slices.Contains(l.Held, service) && readLeaseClock().reached(l.until(service))
}

// stopOverdue begins the stop of what is overdue, and forgets earlier stops of
// what is not any more.
func (g *guard) stopOverdue(now leaseClock) {
	l := g.list.Load()
	for name, s := range g.stops {
		if s.down && !(slices.Contains(l.Held, name) && now.reached(l.until(name))) {
			delete(g.stops, name)
		}
	}
	for _, name := range l.Held {
		deadline, grace := l.until(name), l.Settings.Grace
		if g.stops[name] != nil || !now.reached(deadline) {
			continue
		}
		// A guard that comes late, since it was killed with the daemon or the
		// machine was suspended, still gives what is down the time to be seen so.
		s := &guardStop{due: deadline.add(grace / 6 * 5)}
		if now.ahead(s.due) < grace/6 {
			s.due = now.add(grace / 6)
		}
		g.stops[name] = s
		until := time.Now().Add(now.ahead(deadline)).UTC().Format(logTime)
		g.tell(slog.LevelWarn, name, "the guard stops it: no daemon extended its right to run until "+until)
		g.jobs.Go(func() {
			r := guardResult{name, g.stop(name, deadline)}
			select {
			case g.results <- r:
			case <-g.ctx.Done():
			}
		})
	}
}

// tell writes to the logs of the service and of the node.
func (g *guard) tell(level slog.Level, service, text string) {
	g.log.Log(g.ctx, level, text, "service", service)
	g.say(func() { g.logs.write(level, service, "", text) })
}

// enforce does quorum_action where a stop is late, whether or not it hangs.
func (g *guard) enforce(now leaseClock) {
	for name, s := range g.stops {
		if s.down || s.done || !now.reached(s.due) || !g.overdue(name) {
			continue
		}
		action := g.list.Load().Settings.Action
		key := map[string]string{"reboot": "b", "crash": "c"}[action]
		if s.done = key == ""; !s.done {
			// The kernel takes it from root whatever kernel.sysrq says.
			f, err := os.OpenFile(g.sysrq, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteString(key)
				err = errors.Join(err, f.Close())
			}
			if s.done = err == nil; !s.done && !s.said {
				g.log.Error("quorum_action cannot be done and is tried again", "err", err)
			}
		}
		if !s.said {
			s.said = true
			g.tell(slog.LevelError, name, "it is not down in time, and others may start it now; quorum_action: "+action)
		}
	}
}

// pause is how long the loop may sleep. Go's timers stand still while the
// machine is suspended; then it is late by the time between two signs of life
// at most, all of it after the machine's return.
func (g *guard) pause(now leaseClock) time.Duration {
	l := g.list.Load()
	pause := l.Settings.interval()
	sooner := func(moment leaseClock) {
		if !now.reached(moment) { // else it is being done
			pause = min(pause, now.ahead(moment))
		}
	}
	for _, name := range l.Held {
		sooner(l.until(name))
	}
	for _, s := range g.stops {
		sooner(s.due)
	}
	if g.dog.fd >= 0 {
		sooner(g.dog.fed.add(g.dog.every))
	}
	return pause
}

// holds tells whether anything is held, and not seen down since its deadline.
func (g *guard) holds() bool {
	for _, s := range g.stops {
		if !s.down {
			return true
		}
	}
	return slices.ContainsFunc(g.list.Load().Held, func(name string) bool { return g.stops[name] == nil })
}

// over tells whether the guard may end: there is another one in its place, its
// folder having been made anew; or nothing is held, and it cannot be reached
// any more, or no daemon has run for a while.
func (g *guard) over(now leaseClock) bool {
	ours, err := g.only.f.Stat()
	there, statErr := os.Stat(g.paths.lockFile("guard"))
	found := errors.Join(err, statErr) == nil
	if found && !os.SameFile(ours, there) {
		return true
	}
	if g.holds() {
		g.needed = now
		return false
	}
	if !found {
		return true
	}
	// Opened only to be read: what is closed after writing wakes the loop.
	lock, err := os.Open(g.paths.lockFile("agentd"))
	if err == nil {
		defer lock.Close()
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		g.needed = now // a daemon runs
		return false
	}
	if l := *g.list.Load(); len(l.Held) > 0 { // they are down: a later guard, or daemon, shall know
		l.Held, l.Own = nil, nil
		if data, err := json.Marshal(l); err == nil && replaceFile(g.paths.guardHeld(), data) == nil {
			g.list.Store(&l)
		}
	}
	return now.boot-g.needed.boot >= g.idle
}

// end lets go of the watchdog, unless another guard has to feed it.
func (g *guard) end(why string) error {
	if !g.holds() {
		g.dog.close()
	}
	g.log.Info("the guard ends", "why", why)
	return nil
}

// ---- The stop of an instance ------------------------------------------------

// errLeft: the daemon saw it down, or has extended its right to run.
var errLeft = errors.New("it is left to the daemon")

// stop stops an instance, and tries again until it is down; false when it is
// left to the daemon.
func (g *guard) stop(name string, deadline leaseClock) (down bool) {
	var in *guardedInstance
	daemon := g.list.Load().Daemon
	for pause := checkPause; ; pause = min(2*pause, guardAgain) {
		held, err := g.take(name, deadline, daemon)
		if err != nil {
			g.tell(slog.LevelInfo, name, err.Error())
			return false
		}
		if in == nil {
			in, err = g.instance(name)
		}
		if err == nil {
			err = g.stopHeld(in)
		}
		held.unlock()
		if err == nil {
			g.tell(slog.LevelInfo, name, "the guard has stopped it")
			return true
		}
		g.tell(slog.LevelError, name, "the guard has not stopped it: "+err.Error())
		select {
		case <-g.ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}

// take takes the instance's lock. A start that goes on is killed. A daemon that
// lives has the first twelfth of the grace to begin with the stop itself, and
// up to the half to end it, the latter from its own start where that is later;
// then it is taken for hung, and killed. A daemon that was started since is not:
// it takes up the same deadline.
func (g *guard) take(name string, deadline leaseClock, daemon process) (fileLock, error) {
	grace, killed := g.list.Load().Settings.Grace, ""
	for again := time.Tick(lockPause / 5); ; {
		if !g.overdue(name) {
			return fileLock{}, errLeft
		}
		e, err := readEntry(filepath.Join(g.paths.instanceRun(name), "action"))
		if err == nil && e.Boot == bootID() && e.Verb == verbStart && e.Command != "" && e.Command != killed {
			killMarked(e.Command)
			killed = e.Command
		}
		now, lives := readLeaseClock(), daemon.alive()
		late := now.reached(deadline.add(grace/2)) && now.boot >= daemon.born()+grace/2
		if !lives || now.reached(deadline.add(grace/12)) {
			held, err := tryLock(filepath.Join(g.paths.instanceRun(name), "lock"))
			busy := errors.Is(err, unix.EWOULDBLOCK)
			switch {
			case err == nil && !g.overdue(name): // since then
				held.unlock()
				return held, errLeft
			case err == nil || late && !busy: // no lock can be had, and nobody has it
				return held, nil
			case late && lives:
				g.tell(slog.LevelError, name, fmt.Sprintf("the daemon, process %d, holds it and does not stop it; it is killed", daemon.Pid))
				daemon.kill()
			}
		}
		select {
		case <-g.ctx.Done():
			return fileLock{}, context.Cause(g.ctx)
		case <-again:
		}
	}
}

// guardedInstance notes what was seen of its resources last.
type guardedInstance struct {
	*instance
	noting sync.Mutex
	states map[string]status
}

// stopHeld stops the instance under its lock. It is down, too, where a command
// failed and the check says that it is down.
func (g *guard) stopHeld(in *guardedInstance) error {
	if e, err := readEntry(in.journalPath()); err == nil && e.Boot == bootID() && e.Command != "" {
		killMarked(e.Command) // who ran it is no more
	}
	in.takeUpAgain(g.ctx)
	s := in.spec()
	if err := in.stop(g.ctx, s, nil); err != nil && (g.ctx.Err() != nil || !in.isDown(s)) {
		return err
	}
	if err := in.forget(); err != nil {
		in.log(slog.LevelWarn, "", err.Error())
	}
	return nil
}

func (in *guardedInstance) isDown(s *service) bool {
	in.noting.Lock()
	defer in.noting.Unlock()
	return !slices.ContainsFunc(in.selected(s, nil), func(r *resource) bool { return in.states[r.rid] != statusDown })
}

// instance makes one of the text that was in force, or, without it, of the
// service's file.
func (g *guard) instance(name string) (*guardedInstance, error) {
	node := g.list.Load().Settings.Node
	var faults error
	for _, path := range []string{g.paths.heldText(name), g.paths.servicePath(name)} {
		var spec *service
		text, _, err := readRegular(path, iniSizeLimit)
		if err == nil {
			spec, err = parseService(name, string(text), node, []string{node})
		}
		if err != nil {
			faults = errors.Join(faults, err)
			continue
		}
		in := &guardedInstance{states: map[string]status{}}
		in.instance = &instance{
			kill: killMarked, random: randomNumber, within: g.list.Load().Settings.Grace / 4,
			paths: g.paths, node: node, watcher: g.watcher, jobs: &g.jobs, ctx: g.ctx, service: spec, acting: make(chan struct{}, 1),
			programs: map[string]*program{}, ends: map[string]string{}, outputs: map[string]*output{}, up: map[string]bool{},
			log: func(level slog.Level, rid, text string) {
				g.say(func() { g.logs.write(level, name, rid, text) })
			},
			seen: func(rid string, state status, _ string) {
				in.noting.Lock()
				defer in.noting.Unlock()
				in.states[rid] = state
			},
		}
		in.run = in.execute
		return in, nil
	}
	return nil, faults
}
