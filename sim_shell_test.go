package main

import (
	"errors"
	"maps"
	"math"
	"slices"
	"time"
)

// simDaemon is a daemon: the core, and a shell as small as it can be.
type simDaemon struct {
	running bool // the process is there
	gen     int  // of the process: what an earlier one waited for is void
	paused  bool
	backlog []func()
	down    int // faults that keep it down
	core    *core

	writing, pending *votesEffect

	mine *simBrief
	know []*simBrief // by node; never changed in place

	wakes  time.Time
	waking int

	notes map[string]string // of a planted bug

	taking *simPacket // the beat of the present step
	anew   *anewEffect
}

// simBrief is a version of a node's data.
type simBrief struct {
	epoch, version uint64
	data           peerData
}

func (b *simBrief) newer(than *simBrief) bool {
	return b != nil && (than == nil || b.epoch > than.epoch || b.epoch == than.epoch && b.version > than.version)
}

// simCommand is an order that a daemon carries out.
type simCommand struct {
	order  order
	gen    int
	token  int
	killed bool
	began  []bool
}

func (n *simNode) later(d time.Duration, f func()) {
	gen := n.gen
	n.s.after(d, func() { n.daemonDo(gen, f) })
}

func (n *simNode) daemonDo(gen int, f func()) {
	switch {
	case gen != n.gen || !n.running:
	case n.suspended || n.paused:
		n.backlog = append(n.backlog, func() { n.daemonDo(gen, f) })
	default:
		f()
	}
}

// daemonStart begins a daemon, with an epoch on the disk before anything else.
func (n *simNode) daemonStart() {
	if !n.up || n.running || n.down > 0 {
		return
	}
	n.gen++
	n.running, n.paused, n.backlog = true, false, nil
	n.log("a daemon starts")
	n.newEpoch(0, 0)
}

func (n *simNode) newEpoch(above uint64, mute time.Duration) {
	epoch := max(n.disk.epoch+1, above+1, uint64((n.wall+n.s.now).Milliseconds())+1_000_000)
	n.later(n.writeTime(), func() {
		if n.disk.bad > 0 && n.s.chance(70) {
			n.later(time.Second, func() { n.newEpoch(above, mute) })
			return
		}
		n.disk.epoch = epoch
		n.born(mute)
	})
}

func (n *simNode) writeTime() time.Duration {
	if n.disk.slow > 0 {
		return n.s.upTo(2 * n.s.timeout)
	}
	return n.s.span(100*time.Microsecond, 10*time.Millisecond)
}

func (n *simNode) born(mute time.Duration) {
	s := n.s
	b := birth{
		node: n.name, epoch: n.disk.epoch, salt: s.random.Uint64(), seed: s.random.Uint64(), frozen: n.disk.frozen[""], now: n.moment(),
		cluster: clusterSpec{
			members: s.members(), list: 1, quorum: s.quorum, timeout: s.timeout, grace: s.grace, rejoin: s.rejoin, longest: s.longest, beating: s.size > 1,
		},
		votes: n.disk.votes.clone(), lost: n.disk.lost, held: map[string]leaseClock{},
	}
	for i := s.size - s.witnesses; i < s.size; i++ {
		b.cluster.witnesses = append(b.cluster.witnesses, s.nodes[i].name)
	}
	if mute > 0 {
		if b.votes == nil {
			b.votes = &votes{}
		}
		b.votes.Mute = max(b.votes.Mute, mute)
	}
	for _, name := range n.run.held {
		b.held[name] = n.deadline(name)
	}
	s.plant.birth(n, &b)
	if s.tracing() {
		n.log("is born: epoch %d, votes %+v, lost %v, held %v", b.epoch, b.votes, b.lost, b.held)
	}
	n.mine, n.know = nil, make([]*simBrief, s.size)
	n.writing, n.pending, n.wakes = nil, nil, time.Time{}
	n.s.check.emitted[n.index], n.s.check.ballots[n.index] = b.votes.clone(), math.MaxUint64
	n.notes = map[string]string{}
	n.core = newCore(b)
	n.s.check.guarded(n)
	n.guard.told = false
	if n.guard.alive && !n.guard.paused {
		n.guardSays(true)
	} else if !n.guard.alive {
		n.guardRevive()
	}
	for _, c := range n.copies {
		if spec := c.service.specs[n.index]; spec != nil {
			left := c.cmd
			c.cmd, c.settling = nil, true
			n.step(serviceEvent{c.service.name, spec, n.disk.frozen[c.service.name], n.found(c)})
			n.settle(c, left)
		}
	}
	n.step(scannedEvent{})
	if n.core == nil {
		return
	}
	n.beats(s.upTo(s.interval))
	n.ticks()
}

// found is the intent that an earlier daemon kept; times that are ahead of the
// wall clock, which was stepped since, are now (instance.go).
func (n *simNode) found(c *simCopy) intent {
	kept := n.run.intents[c.service.name]
	kept.Restarts = maps.Clone(kept.Restarts)
	for rid, r := range kept.Restarts {
		if now := n.moment().wall; r.Last.After(now) {
			r.Last = now
			kept.Restarts[rid] = r
		}
	}
	return kept
}

func (n *simNode) beats(d time.Duration) {
	n.later(d, func() {
		n.step(beatDue{"hb#1"})
		n.beats(n.s.interval*97/100 + n.s.upTo(n.s.interval*6/100))
	})
}

func (n *simNode) ticks() {
	n.later(min(time.Second, n.s.timeout/4), func() {
		n.step(tickEvent{})
		n.ticks()
	})
}

// kill ends the daemon: what it was writing may be on the disk or not.
func (n *simNode) kill(why string) {
	if !n.running {
		return
	}
	n.log("the daemon ends: %s", why)
	if n.writing != nil && n.s.chance(50) {
		n.keep(n.writing.votes)
	}
	n.running, n.paused, n.backlog, n.core, n.writing, n.pending, n.anew = false, false, nil, nil, nil, nil, nil
	n.guard.starting = false
	n.gen++
	n.s.check.unguarded(n)
}

// resumed lets a daemon that was paused do what has come meanwhile.
func (n *simNode) resumed() {
	if n.paused || n.suspended || !n.running {
		return
	}
	todo := n.backlog
	n.backlog = nil
	for _, f := range todo {
		f()
	}
}

func (n *simNode) pause() {
	if n.running && !n.paused {
		n.log("the daemon is paused")
		n.paused = true
		n.s.check.unguarded(n)
	}
}

func (n *simNode) resume() {
	if n.running && n.paused {
		n.log("the daemon goes on")
		n.paused = false
		n.s.check.guarded(n)
		n.resumed()
	}
}

// keep writes the journal.
func (n *simNode) keep(v votes) {
	n.disk.votes, n.disk.lost = v.clone(), false
}

func (n *simNode) writeVotes() {
	if n.writing != nil || n.pending == nil {
		return
	}
	n.writing, n.pending = n.pending, nil
	before := n.writing.votes.clone()
	n.later(n.writeTime(), func() {
		f := n.writing
		n.writing = nil
		if !maps.Equal(before.Grants, f.votes.Grants) {
			n.s.fail("%s: the votes of an effect changed afterwards", n.name)
		}
		var err error
		if n.disk.bad > 0 && n.s.chance(70) {
			err = errors.New("disk full")
		}
		if err == nil || n.s.chance(50) {
			n.keep(f.votes)
		}
		n.step(votesKept{f.version, err})
		n.writeVotes()
	})
}

// step takes an event to the core, and does what comes of it.
func (n *simNode) step(e event) {
	if n.core == nil || n.s.fault != "" {
		return
	}
	if e = n.s.plant.in(n, e); e == nil {
		return
	}
	if n.s.tracing() {
		n.logEvent(e)
	}
	effects := n.core.step(n.moment(), e)
	n.s.check.granted(n)
	n.s.plant.out(n, e, &effects)
	if len(effects) > 60+20*n.s.size {
		n.s.fail("%s: %d effects of a step", n.name, len(effects))
	}
	gen := n.gen
	for _, f := range effects {
		if n.perform(f); n.gen != gen {
			return // the machine went down
		}
		if n.anew != nil {
			n.beginAnew()
			return
		}
	}
	n.brief()
}

func (n *simNode) beginAnew() {
	f := *n.anew
	n.log("begins anew: %s", f.why)
	n.s.mix(5, f.epoch)
	n.kill("anew")
	n.s.check.guarded(n)
	n.gen++
	n.running = true
	n.newEpoch(f.epoch, n.s.term())
}

// brief tells the peers what changed.
func (n *simNode) brief() {
	same := n.mine != nil && n.mine.data.frozen == n.core.isFrozen()
	if same {
		for _, c := range n.copies {
			m := n.core.services[c.service.name]
			if m == nil {
				continue
			}
			avail, _ := m.status()
			if was, ok := n.mine.data.instances[c.service.name]; !ok || was != (instanceBrief{avail, m.state, m.frozen}) {
				same = false
			}
		}
	}
	if same {
		return
	}
	b := &simBrief{epoch: n.disk.epoch, version: 1, data: peerData{frozen: n.core.isFrozen(), instances: map[string]instanceBrief{}}}
	if n.mine != nil {
		b.version = n.mine.version + 1
	}
	for name, m := range n.core.services {
		avail, _ := m.status()
		b.data.instances[name] = instanceBrief{avail, m.state, m.frozen}
	}
	n.mine = b
	know := slices.Clone(n.know)
	know[n.index] = b
	n.know = know
	n.step(dataDue{})
}

func (n *simNode) perform(f effect) {
	switch f := f.(type) {
	case beatEffect:
		n.send(f)
	case acceptEffect:
		n.accept()
	case votesEffect:
		n.pending = &f
		n.later(0, n.writeVotes)
	case guardEffect:
		n.s.mix(6, uint64(f.deadline.raw)^uint64(len(f.held)))
		if n.s.tracing() {
			n.log("    guard: held %v until %v, own %v", f.held, f.deadline, f.own)
		}
		n.run.held, n.run.deadline, n.run.own = slices.Clone(f.held), f.deadline, maps.Clone(f.own)
		n.guardWatch()
	case anewEffect:
		n.anew = &f
	case actEffect:
		n.act(f)
	case cancelEffect:
		n.log("    cancel %s", f.service)
		n.killCommand(n.copyOf(f.service))
	case flagEffect:
		n.later(n.writeTime(), func() {
			var err error
			if n.disk.bad > 0 && n.s.chance(50) {
				err = errors.New("disk full")
			} else {
				n.disk.frozen[f.service] = f.frozen
			}
			n.step(flagEvent{f.service, f.frozen, err})
		})
	case saveEffect:
		n.run.intents[f.service] = f.intent
	case transitionEffect, linkEffect:
		if n.s.tracing() {
			n.log("    %s", effectText(f))
		}
	case wakeEffect:
		n.wakeAt(f.at)
	case refuseEffect:
		n.log("    refused: %v", f.err)
	default:
		n.s.fail("%s: an effect that nobody knows: %T", n.name, f)
	}
}

// wakeAt is the shell's one timer.
func (n *simNode) wakeAt(at time.Time) {
	if !n.wakes.IsZero() && !at.Before(n.wakes) {
		return
	}
	n.wakes = at
	n.waking++
	waking := n.waking
	n.later(max(at.Sub(n.moment().wall), 0)+time.Microsecond, func() {
		if waking == n.waking {
			n.wakes = time.Time{}
			n.step(tickEvent{})
		}
	})
}

func (n *simNode) logEvent(e event) {
	switch e := e.(type) {
	case tickEvent, beatDue, dataDue:
	case beatEvent:
		b := e.beat
		n.log("  beat of %s: epoch %d seq %d ack %d heard %b claims %d %+v granted %d refused %v", e.from, b.epoch, b.seq, b.ackSeq, b.heard, b.claims, b.changes, b.granted, b.refused)
	case serviceEvent:
		n.log("  service %s frozen %v found %+v", e.name, e.frozen, e.found)
	default:
		n.log("  %T %+v", e, e)
	}
}
