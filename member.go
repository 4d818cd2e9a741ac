// member.go: what the monitor thread does as a member of a cluster: how its
// core begins, the beats, the journal of votes and the guard (shell.go has the
// rest). All of it but the writing is done on the shell's goroutine.

package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// guardian is the guard as the shell reaches it (deadline.go).
type guardian interface {
	// keep tells it what it has to stop, and when, should this daemon not do it.
	// That is in force when keep returns.
	keep(e guardEffect, s guardSettings) error
	// run keeps one alive until ctx ends.
	run(ctx context.Context)
	close()
}

// birth is what the core of this run of the thread begins with. Without an
// epoch on disk the node must not speak to the cluster; it looks after the
// services that are its own all the same.
func (m *monitorThread) birth(held map[string]leaseClock) birth {
	p := m.d.paths
	b := birth{
		node: m.d.config.Load().node, salt: m.d.random(), seed: m.d.random(), frozen: isFrozen(p, ""), held: held,
		now: moment{time.Now(), m.d.leaseClock()}, cluster: m.d.config.Load().cluster(),
	}
	var err error
	if b.votes, err = readVotes(p); err != nil {
		m.d.log.Error("this node gives no votes for a while: it may have given some that it does not know of", "for", b.cluster.longest, "err", err)
		b.lost = true
	}
	above := uint64(0)
	if m.anew != nil {
		m.d.log.Error("this daemon begins anew", "why", m.anew.why)
		above = m.anew.epoch
		if b.votes != nil {
			b.votes.Mute = max(b.votes.Mute, termOf(b.cluster.timeout, b.cluster.grace))
			err = writeVotes(p, *b.votes)
		}
	}
	if err == nil || b.lost {
		b.epoch, err = nextEpoch(p, time.Now(), above)
	}
	if err != nil {
		m.d.log.Error("this node does not take part in the cluster until its disk can be written", "err", err)
		b.silent = err.Error()
	} else {
		m.anew = nil
	}
	return b
}

// awaitDisk ends a shell that is silent once the next one need not be.
func (s *shell) awaitDisk() {
	for again := time.Tick(diskPause); ; {
		select {
		case <-s.ctx.Done():
			return
		case <-again:
		}
		if _, err := nextEpoch(s.d.paths, time.Now(), 0); err != nil {
			continue
		}
		select {
		case s.calls <- func() { s.over = true }:
		case <-s.ctx.Done():
		}
		return
	}
}

// pause is the time between two rounds of the core.
func (s *shell) pause() time.Duration {
	return min(time.Second, s.core.cluster.timeout/4)
}

// overslept tells whether this goroutine did not run for so long that what it
// knows is too old to act on: the process was paused, or starved.
func (s *shell) overslept() bool {
	limit := max(2*s.pause(), s.core.cluster.timeout/2)
	return len(s.core.cluster.members) > 1 && s.d.leaseClock().reached(s.ran.add(limit))
}

// memberEffect does the effects that are about the cluster; false: it is
// another.
func (s *shell) memberEffect(e event, f effect) bool {
	switch f := f.(type) {
	case beatEffect:
		s.store.fill(f.to, &f.beat.data)
		s.d.heartbeats.send(f.to, f.heartbeat, f.beat)
	case acceptEffect:
		s.d.heartbeats.accepted(f.from, e.(beatEvent).beat.data)
	case votesEffect:
		s.jobs.Go(func() {
			err := writeVotes(s.d.paths, f.votes)
			if err != nil && s.d.outsiders.allow() {
				s.d.log.Error("this node gives no new votes", "err", err)
			}
			s.post(nil, votesKept{f.version, err})
		})
	case guardEffect:
		if err := s.tellGuard(f); err != nil {
			s.say(func() { s.d.log.Error("the guard does not know what is held", "err", err) })
			s.unguarded = err
		}
	case linkEffect:
		s.say(func() { s.d.log.Info("link", "peer", f.peer, "state", f.state) })
	case anewEffect:
		s.anew = &f
	default:
		return false
	}
	return true
}

// attend has a guard run, from when there is something to guard.
func (s *shell) attend() {
	if s.attended {
		return
	}
	s.attended = true
	if err := s.tellGuard(s.core.guarded); err != nil {
		s.d.log.Error("the guard does not know what is held", "err", err)
	}
	s.jobs.Go(func() { s.guard.run(s.ctx) })
}

// tellGuard has the guard know the text of what it may have to stop before it
// is told to.
func (s *shell) tellGuard(e guardEffect) error {
	for _, name := range e.held {
		if in := s.instances[name]; in != nil && !s.texts[name] {
			if err := in.keepText(); err != nil {
				return err
			}
			s.texts[name] = true
		}
	}
	c := s.d.config.Load()
	return s.guard.keep(e, guardSettings{
		Node: c.node, Timeout: s.core.cluster.timeout, Grace: s.core.cluster.grace,
		Action: c.text("cluster.quorum_action"), Watchdog: c.text("node.watchdog"),
	})
}

// mayStop refuses the daemon's end where services that others would have to
// take over depend on it.
func (m *monitorThread) mayStop(ctx context.Context) error {
	var held []string
	err := m.do(ctx, func(s *shell) { held = s.core.guarded.held })
	if errors.Is(err, errMonitorStopped) || err == nil && len(held) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("without its daemon this node has to stop %s within %s, and another node starts it; if that is wanted: --force; to have it stopped first: nodemgr daemon shutdown",
		held, m.d.config.Load().cluster().timeout)
}
