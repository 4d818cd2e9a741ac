// shell.go: the monitor thread. One goroutine owns the core, feeds it what
// happens, and has its effects done by others, for which it never waits. It
// keeps an instance for each service of this node, and takes up service files
// as they change.

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

	lines chan func() // to be logged
	beats chan event  // of heartbeats

	core      *core
	instances map[string]*localInstance
	files     map[string]*serviceFile
	wake      *time.Timer
	wakeAt    time.Time
	refused   error // by the step just taken
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
	stamp   string
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
	folder, unwatch, err := m.d.watcher.add(m.d.paths.etc)
	if err != nil {
		return err
	}
	defer unwatch()
	for ctx.Err() == nil {
		if err := m.serve(ctx, changed, folder); err != nil {
			return err
		}
	}
	return nil
}

// serve runs until ctx ends, or this node has another name.
func (m *monitorThread) serve(ctx context.Context, changed, folder <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	s := &shell{
		d: m.d, ctx: ctx, core: newCore(birth{node: m.d.config.Load().node}),
		calls: make(chan func()), ended: make(chan struct{}),
		starts: make(chan struct{}, actionsAtOnce), stops: make(chan struct{}, actionsAtOnce), checks: make(chan struct{}, checksAtOnce),
		lines: make(chan func(), linesWaiting), beats: make(chan event, beatsWaiting), instances: map[string]*localInstance{}, files: map[string]*serviceFile{}, wake: time.NewTimer(time.Hour),
	}
	s.core.frozen = isFrozen(m.d.paths, "")
	var logging sync.WaitGroup
	logging.Go(func() {
		for line := range s.lines {
			line()
		}
	})
	defer logging.Wait()
	defer close(s.lines)
	defer s.jobs.Wait()
	defer cancel()
	defer close(s.ended)
	if err := s.scan(); err != nil {
		return err
	}
	m.current.Store(s)
	defer m.current.Store(nil)
	calm := time.After(calmDelay)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	rescan := time.NewTicker(rescanPause)
	defer rescan.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case call := <-s.calls:
			call()
		case e := <-s.beats:
			s.step(e)
		case <-s.wake.C:
			s.wakeAt = time.Time{}
			s.step(tickEvent{})
		case <-tick.C:
			s.step(tickEvent{})
		case <-calm:
			s.jobs.Go(debug.FreeOSMemory) // what starting took stays in the idle daemon's account otherwise
		case <-folder:
			s.report(s.scan())
		case <-rescan.C:
			s.report(s.scan())
		case <-changed:
			if m.d.config.Load().node != s.core.node {
				return nil
			}
			s.again()
		}
	}
}

func (s *shell) report(err error) {
	if err != nil {
		s.d.log.Error("the services' files are not read", "err", err)
	}
}

// do runs f on the shell's goroutine and waits for it.
func (m *monitorThread) do(ctx context.Context, f func(*shell)) error {
	s := m.current.Load()
	if s == nil {
		return errors.New("the monitor is stopped; start it: nodemgr daemon start --thread-id monitor")
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
	keep := map[string]intent{}
	for _, f := range s.core.step(moment{wall: time.Now()}, e) {
		switch f := f.(type) {
		case actEffect:
			s.act(f)
		case cancelEffect:
			s.instances[f.service].endOrder(errCancelled)
		case flagEffect:
			s.jobs.Go(func() { s.post(nil, flagEvent{f.service, f.frozen, setFrozen(s.d.paths, f.service, f.frozen)}) })
		case transitionEffect:
			s.logTransition(f)
		case saveEffect:
			keep[f.service] = f.intent
		case wakeEffect:
			if s.wakeAt.IsZero() || f.at.Before(s.wakeAt) {
				s.wakeAt = f.at
				s.wake.Reset(time.Until(f.at))
			}
		case refuseEffect:
			s.refused = f.err
		}
	}
	for name, i := range keep {
		if in := s.instances[name]; in != nil {
			if err := in.keepIntent(i); err != nil {
				s.d.log.Error("a restart of the daemon will not know what is wanted of a service", "service", name, "err", err)
			}
		}
	}
}

func (s *shell) act(f actEffect) {
	in := s.instances[f.service]
	ctx, cancel := context.WithCancelCause(in.ctx)
	in.endOrder = cancel
	s.jobs.Go(func() {
		defer cancel(nil)
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

// again takes up all service files: what the members' names mean may have
// changed.
func (s *shell) again() {
	for _, file := range s.files {
		file.stamp = ""
	}
	s.report(s.scan())
}

// scan takes up the service files that are new, changed or gone.
func (s *shell) scan() error {
	names, err := listServices(s.d.paths)
	if err != nil {
		return err
	}
	for _, name := range names {
		s.read(name)
	}
	for name := range s.files {
		if !slices.Contains(names, name) {
			delete(s.files, name)
			s.drop(name, "its file is gone")
		}
	}
	return nil
}

// read takes up one file if it changed. A text with faults changes nothing.
func (s *shell) read(name string) {
	path := s.d.paths.servicePath(name)
	stamp := fileStamp(path)
	file := s.files[name]
	if file != nil && file.stamp == stamp {
		return
	}
	if file == nil {
		file = &serviceFile{}
		s.files[name] = file
	}
	file.stamp = stamp
	c := s.d.config.Load()
	text, info, err := readRegular(path, iniSizeLimit)
	var spec *service
	if err == nil {
		spec, err = parseService(name, string(text), c.node, c.members())
	}
	if m := s.core.services[name]; err == nil && m != nil {
		if err = m.leavesBehind(spec); err != nil {
			file.stamp = "" // looked at again: it may be stopped by then
		}
	}
	if was := file.fault; err != nil {
		if file.fault = err; was == nil || was.Error() != err.Error() {
			s.d.log.Error("a service's file is not used", "service", name, "err", err)
		}
		return
	}
	file.fault = nil
	file.spec, file.sum, file.updated = spec, checksum(text), info.ModTime()
	if !slices.Contains(spec.nodes, c.node) {
		s.drop(name, "this node is not among its nodes")
		return
	}
	s.adopt(spec)
}

// leavesBehind refuses a version without a resource that is up: it would run on
// unseen, maybe beside the one that has its place.
func (m *monitored) leavesBehind(spec *service) error {
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

// adopt makes spec the one that is in force on this node.
func (s *shell) adopt(spec *service) {
	in := s.instances[spec.name]
	var found intent
	fresh := in == nil
	if fresh {
		in = s.newInstance(spec)
		s.instances[spec.name] = in
		var err error
		if found, err = in.readIntent(); err != nil {
			s.d.log.Warn("a service begins anew", "service", spec.name, "err", err)
		}
	} else {
		in.mu.Lock()
		in.service = spec
		in.mu.Unlock()
		in.recheck()
	}
	s.step(serviceEvent{spec.name, spec, isFrozen(s.d.paths, spec.name), found})
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
		log: func(level slog.Level, rid, text string) { s.d.logs.write(level, name, rid, text) },
		seen: func(rid string, state status, note string) {
			select {
			case <-in.settled:
				s.post(in, statusEvent{name, rid, state, note})
			default:
			}
		},
	}
	in.run = in.execute
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

// known finds a service, looking at the folder again should it be unknown: it
// may have been created just now.
func (s *shell) known(name string) (*monitored, error) {
	if s.core.services[name] == nil {
		s.report(s.scan())
	}
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
