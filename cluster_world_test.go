package main

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// fakeWorld is the truth about a cluster in virtual time: which machine is on,
// what runs there, whose commands go on. Daemons see it by the commands of
// their services alone.
type fakeWorld struct {
	begun    time.Time
	quorum   bool
	services []*fakeService

	mu       sync.Mutex
	machines []*fakeMachine
	trace    []string
	faults   []string // violations
}

// fakeService is one whose commands are start, stop and check.
type fakeService struct {
	name  string
	nodes []string
	rids  []string
}

func (v *fakeService) several() bool { return len(v.nodes) > 1 }

func (v *fakeService) text() string {
	text := "[DEFAULT]\nnodes = " + strings.Join(v.nodes, " ") + "\norchestrate = ha\n"
	for _, rid := range v.rids {
		text += "[" + rid + "]\nstart = start\nstop = stop\ncheck = check\ncheck_interval = 2s\nrestart = 2\ntimeout = 10s\n"
	}
	return text
}

// fakeMachine is one machine. Of a boot are its clock and what runs.
type fakeMachine struct {
	w      *fakeWorld
	node   string
	random *rand.Rand // of boots
	seed   uint64
	grace  time.Duration
	reboot bool // quorum_action
	off    func(why string, back time.Duration)
	end    func() // kills the daemon

	on       bool
	boots    int
	bootedAt time.Time
	offset   time.Duration
	ppm      int64
	paths    paths // of the daemon that runs, or ran last
	lives    bool  // a daemon runs

	running  map[string]bool // by service and rid
	commands map[string]*fakeCommand
	failing  map[string]int // how often a verb of a service still fails
	byHand   map[string]bool
	serial   int
	guard    fakeGuardian
}

type fakeCommand struct {
	id, verb, service, rid string
	killed                 bool
	exit                   int
	done                   chan struct{}
}

// fakeGuardian is the guard of a machine.
type fakeGuardian struct {
	absent   bool // planted
	runs     bool
	turn     *time.Timer
	known    guardList
	stopping map[string]bool
}

func (w *fakeWorld) at() time.Duration { return time.Since(w.begun) }

// log adds to the trace; w.mu is held.
func (w *fakeWorld) log(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf("%14s ", w.at())+fmt.Sprintf(format, args...))
}

func (w *fakeWorld) violated(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	w.faults = append(w.faults, text)
	w.log("VIOLATED: %s", text)
}

// clock is the machine's own.
func (m *fakeMachine) clock() leaseClock {
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	return m.now()
}

func (m *fakeMachine) now() leaseClock {
	d := scale(time.Since(m.bootedAt), m.ppm) + m.offset
	return leaseClock{d, d}
}

// boot turns the machine on.
func (m *fakeMachine) boot() {
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	m.on, m.bootedAt = true, time.Now()
	m.boots++
	m.offset, m.ppm = time.Duration(m.random.Int64N(int64(time.Hour))), m.random.Int64N(400)-200
	m.running, m.commands, m.failing = map[string]bool{}, map[string]*fakeCommand{}, map[string]int{}
	m.byHand = map[string]bool{}
	m.w.log("%s boots", m.node)
}

// crash ends all that runs there; w.mu is held.
func (m *fakeMachine) crash(why string) {
	m.w.log("%s crashes: %s", m.node, why)
	m.on = false
	for _, cmd := range m.commands {
		cmd.killed = true
	}
	for _, v := range m.w.services {
		for _, rid := range v.rids {
			m.set(v.name, rid, false)
		}
	}
	if m.guard.turn != nil {
		m.guard.turn.Stop()
	}
	m.guard = fakeGuardian{}
}

// set changes the truth about a resource, and checks it.
func (m *fakeMachine) set(service, rid string, running bool) {
	w := m.w
	key := service + " " + rid
	if m.running[key] == running {
		return
	}
	m.running[key] = running
	w.log("%s *** %s runs %t", m.node, key, running)
	if !running && !m.runs(service) {
		delete(m.byHand, service)
	}
	if !running || !w.quorum || m.byHand[service] {
		return
	}
	for _, other := range w.machines {
		if other != m && other.runs(service) && !other.byHand[service] && w.service(service).several() {
			w.violated("I1: %s runs on %s and on %s", service, other.node, m.node)
		}
	}
}

func (m *fakeMachine) runs(service string) bool { return m.count(service) > 0 }

func (m *fakeMachine) count(service string) (n int) {
	for _, rid := range m.w.service(service).rids {
		if m.running[service+" "+rid] {
			n++
		}
	}
	return n
}

func (w *fakeWorld) service(name string) *fakeService {
	i := slices.IndexFunc(w.services, func(v *fakeService) bool { return v.name == name })
	return w.services[i]
}

// runner runs the commands of an instance of one daemon, as instance.execute
// does: the command goes on when the daemon crashes.
func (m *fakeMachine) runner(l *clusterLife, in *instance) commandRunner {
	return func(ctx context.Context, r *resource, c resourceCommand) (commandResult, error) {
		if ctx.Err() != nil {
			return commandResult{}, context.Cause(ctx)
		}
		m.w.mu.Lock()
		m.serial++
		id := fmt.Sprintf("%s.%d", m.node, m.serial)
		m.w.mu.Unlock()
		if !c.quiet {
			if err := in.noteCommand(id); err != nil && in.doing() != verbStop {
				return commandResult{}, err
			}
		}
		cmd := m.begin(l, id, c.argv[0], in.name(), r.rid)
		if cmd == nil {
			return commandResult{}, errors.New("crashed")
		}
		ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, fmt.Errorf("did not end within %s and was killed", c.timeout))
		defer cancel()
		select {
		case <-cmd.done:
		case <-ctx.Done():
			if !l.crashed.Load() {
				m.kill(id)
			}
			return commandResult{}, fmt.Errorf("%s %w", c.argv[0], context.Cause(ctx))
		}
		if cmd.killed {
			return commandResult{}, fmt.Errorf("%s was ended by a signal", c.argv[0])
		}
		return commandResult{exit: cmd.exit}, nil
	}
}

// begin starts a command, unless its daemon is no more.
func (m *fakeMachine) begin(l *clusterLife, id, verb, service, rid string) *fakeCommand {
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	if !m.on || l != nil && l.crashed.Load() {
		return nil
	}
	cmd := &fakeCommand{id: id, verb: verb, service: service, rid: rid, done: make(chan struct{})}
	m.commands[id] = cmd
	random := m.draws(verb, service, rid)
	takes := time.Duration(1+random.Int64N(5)) * time.Millisecond
	if verb != "check" {
		takes = time.Duration(5+random.Int64N(m.grace.Milliseconds()/8)) * time.Millisecond
	}
	fails := m.failing[verb+" "+service] > 0
	if fails {
		m.failing[verb+" "+service]--
	}
	takes += time.Duration(random.Int64N(int64(time.Millisecond)))
	m.after(takes/2, func() {
		if verb == "start" && !cmd.killed {
			m.set(service, rid, true)
		}
	})
	m.after(takes, func() {
		switch {
		case cmd.killed:
			return
		case verb == "stop" && !fails:
			m.set(service, rid, false)
		case verb == "check" && !m.running[service+" "+rid]:
			cmd.exit = 1
		}
		if fails {
			cmd.exit = 9
		}
		delete(m.commands, id)
		close(cmd.done)
	})
	return cmd
}

// draws is a source for one command: what else runs does not change what comes
// of it.
func (m *fakeMachine) draws(of ...string) *rand.Rand {
	sum := fnv.New64a()
	fmt.Fprint(sum, m.seed, m.node, of)
	return newSource(sum.Sum64(), uint64(m.w.at()))
}

// after runs f under the lock, in this boot.
func (m *fakeMachine) after(d time.Duration, f func()) {
	boot := m.boots
	time.AfterFunc(d, func() {
		m.w.mu.Lock()
		defer m.w.mu.Unlock()
		if m.on && boot == m.boots {
			f()
		}
	})
}

func (m *fakeMachine) kill(id string) {
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	m.killLocked(id)
}

func (m *fakeMachine) killLocked(id string) {
	if cmd := m.commands[id]; cmd != nil {
		cmd.killed = true
		delete(m.commands, id)
		close(cmd.done)
	}
}

// ---- The guard ---------------------------------------------------------------

// fakeGuardHandle writes what the real one writes; the guard that reads it is
// the machine's.
type fakeGuardHandle struct {
	*guardHandle
	m *fakeMachine
	l *clusterLife
}

func (m *fakeMachine) openGuard(l *clusterLife, p paths, d *daemon) func(func(bool)) (guardian, map[string]leaseClock) {
	return func(report func(bool)) (guardian, map[string]leaseClock) {
		h, held := openGuard(p, d.log, report)
		return &fakeGuardHandle{h, m, l}, held
	}
}

func (h *fakeGuardHandle) keep(e guardEffect, s guardSettings) error {
	before := h.list.Mark
	err := h.guardHandle.keep(e, s)
	if h.list.Mark != before && !h.l.crashed.Load() {
		h.m.w.mu.Lock()
		defer h.m.w.mu.Unlock()
		h.m.guardTurn(time.Microsecond)
	}
	return err
}

// run has a guard run, from now on, with or without a daemon.
func (h *fakeGuardHandle) run(ctx context.Context) {
	m := h.m
	select {
	case <-ctx.Done():
		return
	case <-time.After(20 * time.Millisecond): // a process that starts
	}
	m.w.mu.Lock()
	if m.on && !m.guard.runs && !h.l.crashed.Load() {
		m.guard.runs, m.guard.stopping = true, map[string]bool{}
		m.guardTurn(time.Microsecond)
	}
	m.w.mu.Unlock()
	h.tell(true)
	<-ctx.Done()
}

// guardTurn has the guard look after d; w.mu is held.
func (m *fakeMachine) guardTurn(d time.Duration) {
	if !m.guard.runs || m.guard.absent {
		return
	}
	if m.guard.turn != nil {
		m.guard.turn.Stop()
	}
	boot := m.boots
	m.guard.turn = time.AfterFunc(d, func() {
		m.w.mu.Lock()
		defer m.w.mu.Unlock()
		if m.on && boot == m.boots {
			m.guardLook()
		}
	})
}

func (m *fakeMachine) guardLook() {
	if m.guard.absent {
		return
	}
	if l, err := readGuardList(m.paths, m.guard.known); err == nil {
		m.guard.known = l
	}
	l, now := m.guard.known, m.now()
	next := l.Settings.interval()
	for _, name := range l.Held {
		at := l.until(name)
		if !now.reached(at) {
			next = min(next, now.ahead(at)+time.Microsecond)
			continue
		}
		m.guardStop(name, at)
	}
	m.guardTurn(next)
}

// overdue reads the files once more.
func (m *fakeMachine) overdue(service string) bool {
	l := m.guard.known.refreshed(m.paths)
	return slices.Contains(l.Held, service) && m.now().reached(l.until(service))
}

// guardStop does what guard.take and guard.stop do: the daemon has the first
// twelfth of the grace to begin, up to the half to end, and five sixths later
// comes quorum_action.
func (m *fakeMachine) guardStop(service string, deadline leaseClock) {
	if m.guard.stopping[service] || !m.runs(service) && !m.starting(service) {
		return
	}
	m.guard.stopping[service] = true
	m.w.log("%s the guard is to stop %s", m.node, service)
	var try func()
	again := func() { m.after(10*time.Millisecond, try) }
	try = func() {
		now := m.now()
		grace := m.guard.known.Settings.Grace
		switch {
		case !m.overdue(service) || !m.runs(service) && !m.starting(service):
			delete(m.guard.stopping, service)
			return
		case m.reboot && now.reached(deadline.add(grace/6*5)):
			go m.off("quorum_action", 5*time.Second)
			return
		}
		for id, cmd := range m.commands {
			if cmd.service == service && cmd.verb == "start" {
				m.killLocked(id)
			}
		}
		if m.lives && !now.reached(deadline.add(grace/12)) {
			again()
			return
		}
		held, err := tryLock(filepath.Join(m.paths.instanceRun(service), "lock"))
		if err != nil && !now.reached(deadline.add(grace/2)) {
			again()
			return
		}
		if err != nil {
			if m.lives {
				m.w.log("%s the guard kills the daemon, which does not stop %s", m.node, service)
				go m.end()
			}
			again()
			return
		}
		m.w.log("%s the guard stops %s", m.node, service)
		for id, cmd := range m.commands {
			if cmd.service == service {
				m.killLocked(id)
			}
		}
		m.guardStopNext(service, held, try)
	}
	try()
}

func (m *fakeMachine) starting(service string) bool {
	for _, cmd := range m.commands {
		if cmd.service == service && cmd.verb == "start" {
			return true
		}
	}
	return false
}

func (m *fakeMachine) guardStopNext(service string, held fileLock, over func()) {
	for _, rid := range slices.Backward(m.w.service(service).rids) {
		if !m.running[service+" "+rid] {
			continue
		}
		m.after(time.Duration(5+m.draws("guard", service, rid).Int64N(m.grace.Milliseconds()/8))*time.Millisecond, func() {
			m.set(service, rid, false)
			m.guardStopNext(service, held, over)
		})
		return
	}
	held.unlock()
	over()
}

// ---- The disk ------------------------------------------------------------------

// blockDisk puts a file in the place of a folder: nothing can be read or
// written there. unblock puts the folder back, wherever it is by then.
func blockDisk(folder string) (ok bool) {
	if os.Rename(folder, folder+".away") != nil {
		return false
	}
	return os.WriteFile(folder, nil, 0o600) == nil
}

func unblockDisk(folder string) error {
	if info, err := os.Stat(folder); err == nil && !info.IsDir() {
		return errors.Join(os.Remove(folder), os.Rename(folder+".away", folder))
	}
	return nil
}
