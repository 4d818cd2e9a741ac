// shell.go: the monitor thread. One goroutine owns the core, feeds it what
// happens, and has its effects done by others, for which it never waits: it
// does not touch the disk. It keeps an instance for each service of this node,
// and takes up what folder.go reads.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// monitorThread is the thread; its shell is there while it runs.
type monitorThread struct {
	d       *daemon
	current atomic.Pointer[shell]
	anew    *anewEffect  // why the next core begins, if it is not as any
	lost    atomic.Int64 // of what heartbeats brought: there was no place for it
}

// shell is one run of the thread. All but the first group is owned by its
// goroutine.
type shell struct {
	d      *daemon
	ctx    context.Context
	calls  chan func()
	ended  chan struct{}
	jobs   sync.WaitGroup
	starts chan struct{} // a place for each action
	stops  chan struct{}
	checks chan struct{}

	lines   chan func() // to be logged
	beats   chan event  // of heartbeats
	folder  *folder
	intents *intents

	core      *core
	instances map[string]*localInstance
	files     map[string]*serviceFile
	wake      *time.Timer
	wakeAt    time.Time
	refused   error       // by the step just taken
	anew      *anewEffect // why this shell is to end
	over      bool        // it is to end: the next one may speak
	ran       leaseClock  // when it waited last
	guard     guardian
	attended  bool            // the guard is looked after
	texts     map[string]bool // services whose text the guard has
	unguarded error           // why the guard does not know what the present step holds

	// What the nodes say (publish.go).
	store      *dataStore
	changed    map[string]bool        // services to be published; "": the node
	marks      map[string]serviceMark // as they were published
	stats      nodeStats              // as they were published
	statsRead  time.Time
	unsaid     bool // something does not fit into the store, and that was logged
	due        *time.Timer
	announcing bool // due runs
	announced  time.Time
}

// localInstance is an instance and what the shell does with it.
type localInstance struct {
	*instance
	stop     context.CancelFunc // ends all of it, but not what it started
	recheck  context.CancelFunc // ends the present checks
	settled  chan struct{}      // closed when what an earlier daemon left is settled: now its states count
	endOrder context.CancelCauseFunc
}

// serviceFile is a service's file as it was last read.
type serviceFile struct {
	spec    *service // the last good one; nil if there was none
	fault   error    // of the present text
	sum     string   // SHA-256 of the text in use, in hex
	updated time.Time
}

func (m *monitorThread) thread() *thread {
	return &thread{id: "monitor", run: m.run, report: m.report}
}

func (m *monitorThread) report() (config, stats map[string]any) {
	return map[string]any{}, map[string]any{"lost": m.lost.Load()}
}

// beatDue brings that beats of a heartbeat are due.
func (m *monitorThread) beatDue(heartbeat string) { m.offer(beatDue{heartbeat}) }

// beatReceived brings a beat that opened.
func (m *monitorThread) beatReceived(from string, b beat) { m.offer(beatEvent{from, b}) }

// offer brings an event without waiting. Where there is no place, or no shell,
// it is lost, as a beat may be on its way.
func (m *monitorThread) offer(e event) {
	if s := m.current.Load(); s != nil {
		select {
		case s.beats <- e:
			return
		default:
		}
	}
	m.lost.Add(1)
}

func (m *monitorThread) run(ctx context.Context, changed <-chan struct{}) error {
	files, unwatch, err := m.d.watcher.add(m.d.paths.etc)
	if err != nil {
		return err
	}
	defer unwatch()
	for ctx.Err() == nil {
		if err := m.serve(ctx, changed, files); err != nil {
			return err
		}
	}
	return nil
}

// serve runs until ctx ends, or this node has another name. files tells that
// something changed in the folder of service files.
func (m *monitorThread) serve(ctx context.Context, changed, files <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	s := &shell{
		d: m.d, ctx: ctx,
		calls: make(chan func()), ended: make(chan struct{}),
		starts: make(chan struct{}, actionsAtOnce), stops: make(chan struct{}, actionsAtOnce), checks: make(chan struct{}, checksAtOnce),
		lines: make(chan func(), linesWaiting), beats: make(chan event, beatsWaiting), instances: map[string]*localInstance{}, files: map[string]*serviceFile{}, texts: map[string]bool{}, wake: time.NewTimer(time.Hour),
		changed: map[string]bool{"": true}, marks: map[string]serviceMark{}, due: time.NewTimer(time.Hour),
	}
	s.folder, s.intents = newFolder(s), newIntents(m.d.paths, m.d.log)
	var writing sync.WaitGroup
	writing.Go(func() {
		for line := range s.lines {
			line()
		}
	})
	writing.Go(s.intents.run)
	defer writing.Wait()
	defer close(s.lines)
	defer close(s.intents.wake)
	var held map[string]leaseClock
	s.guard, held = m.d.openGuard(func(alive bool) { s.post(nil, guardEvent{alive}) })
	defer s.guard.close()
	defer s.jobs.Wait()
	defer cancel()
	defer close(s.ended)
	m.current.Store(s) // who asks already waits for the loop
	defer m.current.Store(nil)
	born := m.birth(held)
	s.core = newCore(born)
	s.store = newDataStore(s.core.node, born.epoch)
	s.store.linked = func(node string) bool { return s.core.linkState(node) == linkLinked }
	s.store.members(m.d.config.Load().members())
	s.jobs.Go(func() { s.folder.run(files) })
	calm := time.After(calmDelay)
	tick := time.NewTicker(s.pause())
	defer tick.Stop()
	if len(held) > 0 || m.d.config.Load().text("node.watchdog") != "" {
		s.attend()
	}
	if born.silent != "" {
		s.jobs.Go(s.awaitDisk)
	}
	for s.anew == nil && !s.over {
		s.ran = s.d.leaseClock()
		var todo func()
		select {
		case <-ctx.Done():
			return nil
		case todo = <-s.calls:
		case e := <-s.beats:
			todo = func() { s.step(e) }
		case <-s.wake.C:
			todo = func() { s.wakeAt = time.Time{}; s.step(tickEvent{}) }
		case <-s.due.C:
			todo = func() { s.announcing = false; s.announce() }
		case <-tick.C:
			todo = func() { s.step(tickEvent{}) }
		case <-calm:
			todo = func() { s.jobs.Go(debug.FreeOSMemory) } // what starting took stays in the idle daemon's account otherwise
		case <-changed:
			c := m.d.config.Load()
			if c.node != s.core.node {
				return nil
			}
			todo = func() { s.configured(c); tick.Reset(s.pause()) }
		}
		late := s.overslept()
		todo()
		if late {
			slept := s.d.leaseClock().raw - s.ran.raw
			s.say(func() { s.d.log.Warn("this daemon did not run for so long that it begins anew", "since", slept) })
			return nil
		}
	}
	if s.anew != nil {
		m.anew = s.anew
	}
	return nil
}

// configured takes up a changed node.conf.
func (s *shell) configured(c *config) {
	s.step(clusterEvent{c.cluster()})
	s.store.members(c.members())
	s.changed[""] = true
	s.publish()
	if s.attended {
		if err := s.tellGuard(s.core.guarded); err != nil {
			s.d.log.Error("the guard does not know of the new configuration", "err", err)
		}
	}
	select {
	case s.folder.anew <- struct{}{}:
	default: // it has its token
	}
}

// do runs f on the shell's goroutine and waits for it.
func (m *monitorThread) do(ctx context.Context, f func(*shell)) error {
	s := m.current.Load()
	if s == nil {
		return errMonitorStopped
	}
	done := make(chan struct{})
	select {
	case s.calls <- func() { defer close(done); f(s) }:
		<-done
		return nil
	case <-s.ended:
		return errStopping
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// post brings an event from another goroutine; of an instance, unless in is
// nil, which may be gone by then, and another one be there under its name.
func (s *shell) post(in *localInstance, e event) {
	select {
	case s.calls <- func() {
		if in == nil || in.ctx.Err() == nil {
			s.step(e)
		}
	}:
	case <-s.ctx.Done():
	}
}

// step takes one event to the core and has its effects done.
func (s *shell) step(e event) {
	s.unguarded = nil
	effects := s.core.step(moment{time.Now(), s.d.leaseClock()}, e)
	for _, f := range effects {
		if f, ok := f.(saveEffect); ok && s.instances[f.service] != nil {
			s.intents.keep(f.service, f.intent) // first: what it announces waits for it
		}
	}
	for _, f := range effects {
		if s.memberEffect(e, f) {
			continue
		}
		switch f := f.(type) {
		case actEffect:
			s.begin(f)
		case cancelEffect:
			s.instances[f.service].endOrder(errCancelled)
		case flagEffect:
			s.jobs.Go(func() { s.post(nil, flagEvent{f.service, f.frozen, setFrozen(s.d.paths, f.service, f.frozen)}) })
		case transitionEffect:
			s.logTransition(f)
		case wakeEffect:
			if s.wakeAt.IsZero() || f.at.Before(s.wakeAt) {
				s.wakeAt = f.at
				s.wake.Reset(time.Until(f.at))
			}
		case refuseEffect:
			s.refused = f.err
		}
	}
	s.touched(e, effects)
	s.publish()
	if slices.ContainsFunc(effects, func(f effect) bool { _, ok := f.(acceptEffect); return ok }) {
		s.takeData(e.(beatEvent)) // not before: it is a step of its own
	}
}

// begin does an order, unless it starts what the guard could not stop.
func (s *shell) begin(f actEffect) {
	if err := s.unguarded; err != nil && f.order.Verb != verbStop && slices.Contains(s.core.guarded.held, f.service) {
		in := s.instances[f.service]
		s.jobs.Go(func() { s.post(in, doneEvent{f.service, verbStart, err}) })
		return
	}
	s.act(f)
}

func (s *shell) act(f actEffect) {
	in := s.instances[f.service]
	ctx, cancel := context.WithCancelCause(in.ctx)
	in.endOrder = cancel
	kept, logged := s.intents.kept(f.service), make(chan struct{})
	s.say(func() { close(logged) })
	s.jobs.Go(func() {
		defer cancel(nil)
		<-kept
		select { // so that the log tells of the transition first, but it is not waited for on a disk that hangs
		case <-logged:
		case <-time.After(logOrder):
		}
		part := verbStart
		err := in.perform(ctx, f.order)
		if stop := (stopError{}); f.order.Verb == verbStop || errors.As(err, &stop) {
			part = verbStop
		}
		s.post(in, doneEvent{f.service, part, err})
	})
}

func (s *shell) logTransition(f transitionEffect) {
	text := f.to
	if f.from != f.to {
		text = f.from + " -> " + f.to
	}
	if f.why != "" {
		text += ": " + f.why
	}
	level := slog.LevelInfo
	if monitorState(f.to).failed() {
		level = slog.LevelError
	}
	s.say(func() {
		if f.service != "" {
			s.d.logs.write(level, f.service, "", text)
		}
		s.d.log.Log(s.ctx, level, "monitor", "service", f.service, "from", f.from, "to", f.to, "why", f.why)
	})
}

// say has something logged, in order, by another goroutine: a disk that hangs
// must not keep the core from its decisions. What does not fit is not logged.
func (s *shell) say(line func()) {
	select {
	case s.lines <- line:
	default:
	}
}

// order takes a person's order, and returns why it was refused.
func (s *shell) order(e event) error {
	s.refused = nil
	s.step(e)
	return s.refused
}

// takeUp takes up a file that changed; a text with faults changes nothing. It
// tells whether the file is to be looked at again.
func (s *shell) takeUp(found foundFile) (again bool) {
	name, spec, err := found.name, found.spec, found.fault
	s.changed[name] = true
	defer s.publish()
	file := s.files[name]
	if file == nil {
		file = &serviceFile{}
		s.files[name] = file
	}
	if m := s.core.services[name]; err == nil && m != nil {
		err = m.leavesBehind(spec, s.core.node)
		again = err != nil // it may be stopped by then
	}
	if was := file.fault; err != nil {
		if file.fault = err; was == nil || was.Error() != err.Error() {
			s.say(func() { s.d.log.Error("a service's file is not used", "service", name, "err", err) })
		}
		return again
	}
	file.fault = nil
	file.spec, file.sum, file.updated = spec, found.sum, found.updated
	if !slices.Contains(spec.nodes, s.core.node) {
		s.drop(name, "this node is not among its nodes")
		return false
	}
	s.adopt(found)
	return false
}

// gone forgets a service whose file is.
func (s *shell) gone(name string) {
	delete(s.files, name)
	s.drop(name, "its file is gone")
	s.changed[name] = true
	s.publish()
}

// leavesBehind refuses a version without a resource that is up: it would run on
// unseen, maybe beside the one that has its place.
// The same goes for one that takes this node off the list of a failover
// service: unseen, it would keep its claim, and no node could ever start it.
func (m *monitored) leavesBehind(spec *service, node string) error {
	if m.failover() && (m.anyUp() || m.acting != nil) && !slices.Contains(spec.nodes, node) {
		return fmt.Errorf("%s runs on %s, which is not among the nodes of this version; put it back, or first: svcmgr -s %s stop --local", spec.name, node, spec.name)
	}
	for _, r := range m.spec.resources {
		if now := spec.resource(r.rid); now != nil && (now.exec == nil) == (r.exec == nil) {
			continue
		}
		if state := m.resources[r.rid].status; !r.disable && (state == statusUp || state == statusWarn) {
			name := spec.name
			return fmt.Errorf("%s is %s, and not the same or not there in this version; put it back, or first: svcmgr -s %s stop --local --rid %s", r.rid, state, name, r.rid)
		}
	}
	return nil
}

// adopt makes what was found the version that is in force on this node.
func (s *shell) adopt(found foundFile) {
	spec := found.spec
	in := s.instances[spec.name]
	fresh := in == nil
	if fresh {
		in = s.newInstance(spec)
		s.instances[spec.name] = in
		for _, r := range spec.resources {
			in.up[r.rid] = found.intent.LocalExpect == expectStarted
		}
		if found.lost != nil {
			s.say(func() { s.d.log.Warn("a service begins anew", "service", spec.name, "err", found.lost) })
		}
	} else {
		in.mu.Lock()
		in.service = spec
		in.mu.Unlock()
		in.recheck()
	}
	if delete(s.texts, spec.name); len(spec.nodes) > 1 {
		s.attend()
	}
	s.step(serviceEvent{spec.name, spec, found.frozen, found.intent})
	ctx, recheck := context.WithCancel(in.ctx)
	in.recheck = recheck
	s.jobs.Go(func() {
		if fresh {
			if err := in.begin(); err != nil && in.ctx.Err() == nil {
				s.post(in, failedEvent{spec.name, "what an earlier daemon began does not stop: " + err.Error()})
			}
			close(in.settled)
		}
		select {
		case <-in.settled:
			if !fresh {
				in.takeUpAgain(ctx)
			}
			in.watchAll(ctx)
		case <-ctx.Done():
		}
	})
}

func (s *shell) newInstance(spec *service) *localInstance {
	ctx, stop := context.WithCancel(s.ctx)
	name := spec.name
	in := &localInstance{stop: stop, settled: make(chan struct{})}
	in.instance = &instance{
		paths: s.d.paths, node: s.core.node, watcher: s.d.watcher, jobs: &s.jobs, ctx: ctx, service: spec,
		starts: s.starts, stops: s.stops, checks: s.checks, acting: make(chan struct{}, 1),
		programs: map[string]*program{}, ends: map[string]string{}, outputs: map[string]*output{}, up: map[string]bool{},
		random: s.d.random, kill: s.d.kill,
		log: func(level slog.Level, rid, text string) { s.d.logs.write(level, name, rid, text) },
		seen: func(rid string, state status, note string) {
			select {
			case <-in.settled:
				s.post(in, statusEvent{name, rid, state, note})
			default:
			}
		},
	}
	in.run = s.d.command(in.instance)
	return in
}

// drop forgets an instance. What runs of it goes on, and is taken up again
// should the service come back.
func (s *shell) drop(name, why string) {
	in := s.instances[name]
	if in == nil {
		return
	}
	in.stop()
	delete(s.instances, name)
	if m := s.core.services[name]; m != nil && !m.down() {
		s.say(func() {
			s.d.log.Warn("a service is not looked after any more, and goes on", "service", name, "why", why)
			s.d.logs.write(slog.LevelWarn, name, "", why+"; what runs goes on by itself")
		})
	}
	s.step(serviceEvent{name: name})
}

// known finds a service, or says why there is none.
func (s *shell) known(name string) (*monitored, error) {
	m, file := s.core.services[name], s.files[name]
	switch {
	case m != nil:
		return m, nil
	case file == nil:
		var names []string
		for known := range s.files {
			names = append(names, known)
		}
		return nil, fmt.Errorf("there is no service %q%s (svcmgr ls lists those there are)", shortened(name), nearest(name, names))
	case file.spec == nil:
		return nil, fmt.Errorf("the file of %s is not used: %w", name, file.fault)
	}
	return nil, fmt.Errorf("%s does not run on this node; its nodes are %s", name, strings.Join(file.spec.nodes, " "))
}

// end stops all instances for the daemon's shutdown and waits; the error names
// those that do not stop.
func (m *monitorThread) end(ctx context.Context) (err error) {
	if err := m.scan(ctx); err != nil { // so that none is overlooked
		return err
	}
	if err := m.do(ctx, func(s *shell) { s.step(endEvent{true}) }); err != nil {
		return err
	}
	defer func() {
		if err != nil { // also of one that waits no longer: the daemon stays, and looks after its services
			_ = m.do(context.WithoutCancel(ctx), func(s *shell) { s.step(endEvent{false}) })
		}
	}()
	for {
		var left, stuck []string
		err := m.do(ctx, func(s *shell) {
			for name, service := range s.core.services {
				switch {
				case service.acting != nil || !service.probed || service.state == stateFreezing || service.state == stateThawing:
					left = append(left, name)
				case !service.down():
					stuck = append(stuck, name+" ("+service.why+")")
				}
			}
		})
		switch {
		case err != nil:
			return err
		case len(left) > 0:
		case len(stuck) > 0:
			slices.Sort(stuck)
			return fmt.Errorf("not stopped: %s; the daemon stays up", strings.Join(stuck, ", "))
		default:
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(endPause):
		}
	}
}
