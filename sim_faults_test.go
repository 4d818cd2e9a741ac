package main

import (
	"slices"
	"time"
)

// simLink is one direction between two nodes.
type simLink struct {
	cuts  int
	loss  int           // percent
	delay time.Duration // on top of the latency
	twice int           // percent that come twice
}

// simPacket is a beat on its way.
type simPacket struct {
	from, to int
	beat     beat
	briefs   []*simBrief
	sent     time.Duration
	heard    time.Duration // the send of the newest beat of the receiver that the sender had
}

func (b beat) clone() beat {
	b.refused = slices.Clone(b.refused)
	if b.changes != nil {
		b.changes = &claimChanges{b.changes.base, slices.Clone(b.changes.entries)}
	}
	return b
}

func (s *sim) nodeOf(name string) *simNode {
	if i := int(name[1] - '1'); len(name) == 2 && i >= 0 && i < len(s.nodes) {
		return s.nodes[i]
	}
	return nil
}

func (n *simNode) send(f beatEffect) {
	s, to := n.s, n.s.nodeOf(f.to)
	if to == nil || to == n {
		s.fail("%s: a beat to %q", n.name, f.to)
		return
	}
	p := simPacket{n.index, to.index, f.beat.clone(), n.know, s.now, n.heardFrom[to.index]}
	s.check.sent(n, to, f.beat)
	if s.size > 1 && s.faults.replays > 0 && s.chance(5) {
		if len(s.old) < 300 {
			s.old = append(s.old, p)
		} else {
			s.old[s.random.IntN(len(s.old))] = p
		}
	}
	link := &s.links[p.from][p.to]
	if link.cuts > 0 || link.loss > 0 && s.chance(link.loss) {
		return
	}
	s.transmit(p, link)
	if link.twice > 0 && s.chance(link.twice) {
		p.beat = p.beat.clone()
		s.transmit(p, link)
	}
}

func (s *sim) transmit(p simPacket, link *simLink) {
	d := s.latency/2 + s.upTo(s.latency)
	if link.delay > 0 {
		d += s.upTo(link.delay)
	}
	s.after(d, func() { s.deliver(&p) })
}

func (s *sim) deliver(p *simPacket) {
	n := s.nodes[p.to]
	if !n.up || n.suspended || !n.running || n.core == nil || n.paused && len(n.backlog) > 100 {
		return
	}
	n.daemonDo(n.gen, func() {
		if n.core == nil {
			return
		}
		s.mix(8, p.beat.seq<<8|uint64(p.from)<<4|uint64(p.to))
		n.heardFrom[p.from] = max(n.heardFrom[p.from], p.sent)
		n.ackedBy[p.from] = max(n.ackedBy[p.from], p.heard)
		n.taking = p
		n.step(beatEvent{s.nodes[p.from].name, p.beat})
		n.taking = nil
	})
}

// accept takes the data of the beat of this step.
func (n *simNode) accept() {
	p := n.taking
	if p == nil {
		n.s.fail("%s: accepts a beat, and none came", n.name)
		return
	}
	n.s.check.accepted(n, p)
	for i, b := range p.briefs {
		if i == n.index || !b.newer(n.know[i]) {
			continue
		}
		know := slices.Clone(n.know)
		know[i] = b
		n.know = know
		var d time.Duration
		if n.s.chance(10) {
			d = n.s.upTo(100 * time.Millisecond)
		}
		n.later(d, func() { n.step(peerEvent{n.s.nodes[i].name, n.know[i].data}) })
	}
}

// simFaults begins faults, lets them overlap, and heals them all.
type simFaults struct {
	active  map[int]func() // what ends them
	next    int
	healing bool
	healed  time.Duration // when the last phase of faults ended
	replays int
	last    time.Duration // when anything was disturbed
	until   time.Duration // of this phase
}

func (f *simFaults) begin(s *sim) {
	f.active = map[int]func(){}
	f.healing = true
	f.last = 0
	f.healed = 2 * time.Second
	s.after(f.healed+s.check.bound(s), func() { s.calm() })
}

// calm is the time after a phase of faults; then the next one begins.
func (s *sim) calm() {
	if !s.check.live(s) {
		return
	}
	s.after(s.span(20*time.Second, 2*time.Minute), func() {
		if !s.check.still(s) {
			return
		}
		s.log("---- faults")
		f := &s.faults
		f.healing = false
		f.until = s.now + s.span(30*time.Second, 6*time.Minute)
		s.between = s.span(2*time.Second, 30*time.Second)
		if s.chance(40) {
			f.replays++
		}
		s.strike()
		s.at(f.until, s.heal)
	})
}

func (s *sim) strike() {
	f := &s.faults
	if f.healing {
		return
	}
	f.last = s.now
	kinds := simFaultKinds
	kind := kinds[s.random.IntN(len(kinds))]
	d := s.about([]time.Duration{s.timeout / 2, s.timeout, 2 * s.term(), 30 * time.Second}[s.random.IntN(4)])
	end := kind.begin(s)
	if end != nil {
		s.log("-- %s for %s", kind.name, d)
		id := f.next
		f.next++
		f.active[id] = end
		s.after(d, func() {
			if end := f.active[id]; end != nil {
				delete(f.active, id)
				f.last = s.now
				s.log("-- %s ends", kind.name)
				end()
			}
		})
	}
	s.after(s.about(s.between), s.strike)
}

// heal ends all faults; then the cluster must do what it is for.
func (s *sim) heal() {
	f := &s.faults
	f.healing = true
	for id := range f.next {
		if end := f.active[id]; end != nil {
			delete(f.active, id)
			end()
		}
	}
	f.replays, s.old = 0, nil
	f.last, f.healed = s.now, s.now
	s.log("---- healed")
	for _, n := range s.nodes {
		n.boot()
		if n.up && !n.running {
			n.machine(s.upTo(100*time.Millisecond), n.daemonStart)
		}
	}
	for i := range 4 {
		s.after(time.Duration(i)*(10*time.Second+s.grace)+s.upTo(time.Second), s.tidy)
	}
	s.after(s.check.bound(s), s.calm)
}

// tidy is a person who thaws and clears what the faults left.
func (s *sim) tidy() {
	for _, n := range s.nodes {
		if !n.running || n.core == nil || n.paused {
			continue
		}
		if n.core.isFrozen() {
			n.step(nodeOrder{false})
		}
		for _, c := range n.copies {
			if n.core == nil {
				break
			}
			m := n.core.services[c.service.name]
			if m == nil {
				continue
			}
			if m.frozen || m.Flag != "" {
				n.step(serviceOrder{service: c.service.name, localExpect: "thawed"})
			}
			if n.core != nil && m.LocalExpect == expectStopped {
				n.step(serviceOrder{service: c.service.name, localExpect: "unset"})
			}
			if n.core != nil && (m.state.failed() || m.Failed != "" || m.givenUp() != "") {
				n.step(serviceOrder{service: c.service.name, clear: true})
			}
		}
	}
}

type simFaultKind struct {
	name  string
	begin func(s *sim) (end func())
}

func (s *sim) anyNode() *simNode { return s.nodes[s.random.IntN(s.size)] }

// pair draws two nodes.
func (s *sim) pair() (a, b int) {
	a = s.random.IntN(s.size)
	return a, (a + 1 + s.random.IntN(s.size-1)) % s.size
}

// cut cuts the directions that it is told to.
func (s *sim) cut(which func(from, to int) bool) (mend func()) {
	var cut []*simLink
	for i := range s.links {
		for j := range s.links[i] {
			if i != j && which(i, j) {
				s.links[i][j].cuts++
				cut = append(cut, &s.links[i][j])
			}
		}
	}
	return func() {
		for _, l := range cut {
			l.cuts--
		}
	}
}

// worsen changes some links for a while.
func (s *sim) worsen(change func(l *simLink)) (mend func()) {
	a, b := s.pair()
	all, node := s.chance(30), s.chance(50)
	type saved struct {
		l   *simLink
		was simLink
	}
	var was []saved
	for i := range s.links {
		for j := range s.links[i] {
			if i != j && (all || node && i == a || i == a && j == b || node && j == a) {
				l := &s.links[i][j]
				was = append(was, saved{l, *l})
				change(l)
			}
		}
	}
	return func() {
		for _, w := range was {
			w.l.loss, w.l.delay, w.l.twice = 0, 0, 0
		}
	}
}

func (s *sim) halves() []bool {
	side := make([]bool, s.size)
	for i := range side {
		side[i] = s.chance(50)
	}
	side[s.random.IntN(s.size)] = true
	side[s.random.IntN(s.size)] = false
	return side
}

func between(f func(s *sim) func()) func(s *sim) func() {
	return func(s *sim) func() {
		if s.size < 2 {
			return nil
		}
		return f(s)
	}
}

// simFaultKinds: what can happen. Those that are likelier stand there twice.
var simFaultKinds = []simFaultKind{
	{"loss", between(func(s *sim) func() {
		p := 1 + s.random.IntN(80)
		return s.worsen(func(l *simLink) { l.loss = p })
	})},
	{"delay", between(func(s *sim) func() {
		d := s.about(s.timeout / 2)
		return s.worsen(func(l *simLink) { l.delay = d })
	})},
	{"duplicates", between(func(s *sim) func() {
		return s.worsen(func(l *simLink) { l.twice, l.delay = 50, s.interval*2 })
	})},
	{"replays", between(func(s *sim) func() {
		s.faults.replays++
		for range 20 {
			s.after(s.upTo(s.timeout), func() {
				if len(s.old) > 0 {
					p := s.old[s.random.IntN(len(s.old))]
					p.beat = p.beat.clone()
					s.deliver(&p)
				}
			})
		}
		return func() { s.faults.replays = max(s.faults.replays-1, 0) }
	})},
	{"cut", between(func(s *sim) func() {
		a, b := s.pair()
		return s.cut(func(i, j int) bool { return i == a && j == b || i == b && j == a })
	})},
	{"one-way cut", between(func(s *sim) func() {
		a, b := s.pair()
		return s.cut(func(i, j int) bool { return i == a && j == b })
	})},
	{"isolated node", between(func(s *sim) func() {
		a := s.random.IntN(s.size)
		return s.cut(func(i, j int) bool { return i == a || j == a })
	})},
	{"isolated holder", between(func(s *sim) func() {
		for _, n := range s.nodes {
			for _, c := range n.copies {
				if c.up && c.service.several {
					return s.cut(func(i, j int) bool { return i == n.index || j == n.index })
				}
			}
		}
		return nil
	})},
	{"deaf node", between(func(s *sim) func() {
		a := s.random.IntN(s.size)
		return s.cut(func(i, j int) bool { return j == a })
	})},
	{"mute node", between(func(s *sim) func() {
		a := s.random.IntN(s.size)
		return s.cut(func(i, j int) bool { return i == a })
	})},
	{"halves", between(func(s *sim) func() {
		side := s.halves()
		return s.cut(func(i, j int) bool { return side[i] != side[j] })
	})},
	{"one-way halves", between(func(s *sim) func() {
		side := s.halves()
		return s.cut(func(i, j int) bool { return side[i] && !side[j] })
	})},
	{"bridge", between(func(s *sim) func() {
		side, bridge := s.halves(), s.random.IntN(s.size)
		return s.cut(func(i, j int) bool { return side[i] != side[j] && i != bridge && j != bridge })
	})},
	{"ring", between(func(s *sim) func() { // each hears half of the others
		shift := s.random.IntN(2)
		return s.cut(func(i, j int) bool { return (j-i+s.size)%s.size > s.size/2+shift })
	})},
	{"ring, one way", between(func(s *sim) func() {
		return s.cut(func(i, j int) bool { return (j-i+s.size)%s.size == 1 })
	})},
	{"all cut", between(func(s *sim) func() { return s.cut(func(i, j int) bool { return true }) })},

	{"crash", func(s *sim) func() { return s.anyNode().outage() }},
	{"crash", func(s *sim) func() { return s.anyNode().outage() }},
	{"crash of several", func(s *sim) func() {
		var ends []func()
		for _, n := range s.nodes {
			if s.chance(60) {
				ends = append(ends, n.outage())
			}
		}
		return together(ends)
	}},
	{"suspended machine", func(s *sim) func() {
		n := s.anyNode()
		n.suspend()
		return n.wake
	}},
	{"daemon restarted", func(s *sim) func() {
		n := s.anyNode()
		n.restart()
		return nothing
	}},
	{"daemon restarted", func(s *sim) func() {
		n := s.anyNode()
		n.restart()
		return nothing
	}},
	{"daemon restarted again and again", func(s *sim) func() {
		n, on := s.anyNode(), true
		var again func()
		again = func() {
			if on {
				n.restart()
				s.after(s.about(s.interval*2), again)
			}
		}
		again()
		return func() { on = false }
	}},
	{"all daemons restarted", func(s *sim) func() {
		guards := s.chance(30)
		for _, n := range s.nodes {
			if guards {
				n.s.after(0, n.guardKill)
			}
			n.restart()
		}
		return nothing
	}},
	{"daemon down", func(s *sim) func() { return s.anyNode().daemonDown() }},
	{"daemon down", func(s *sim) func() { return s.anyNode().daemonDown() }},
	{"daemon and guard down", func(s *sim) func() {
		n := s.anyNode()
		end := n.daemonDown()
		n.guardKill()
		return end
	}},
	{"daemon paused", func(s *sim) func() {
		n := s.anyNode()
		n.pause()
		return n.resume
	}},
	{"daemon paused, then killed", func(s *sim) func() {
		n := s.anyNode()
		n.pause()
		return n.restart
	}},
	{"daemon and guard paused", func(s *sim) func() {
		n := s.anyNode()
		n.guardPause()
		n.pause()
		return func() { n.guardResume(); n.resume() }
	}},
	{"guard killed", func(s *sim) func() {
		s.anyNode().guardKill()
		return nothing
	}},
	{"guard paused", func(s *sim) func() {
		n := s.anyNode()
		n.guardPause()
		return n.guardResume
	}},

	{"disk slow", func(s *sim) func() {
		n := s.anyNode()
		n.disk.slow++
		return func() { n.disk.slow-- }
	}},
	{"disk fails", func(s *sim) func() {
		n := s.anyNode()
		n.disk.bad++
		return func() { n.disk.bad-- }
	}},
	{"journal lost", func(s *sim) func() {
		n := s.anyNode()
		if !s.chance(50) || n.disk.votes == nil {
			return nil
		}
		if s.chance(50) {
			n.crash("its disk is broken")
			n.machineBack(s.about(10 * time.Second))
		} else {
			n.restart()
		}
		n.disk.votes, n.disk.lost = nil, true
		return nothing
	}},
	{"wall clock stepped", func(s *sim) func() {
		n := s.anyNode()
		if n.running { // a running daemon does not see it (the monotonic clock)
			n.kill("to see another wall clock")
			n.machine(100*time.Millisecond, n.daemonStart)
		}
		n.wall = s.upTo(2 * time.Hour)
		return nothing
	}},

	{"scripts", func(s *sim) func() {
		n := s.anyNode()
		c := n.copies[s.random.IntN(len(n.copies))]
		mode := s.random.IntN(3)
		if s.stuck {
			mode = s.random.IntN(5)
		}
		c.failing[mode]++
		return func() { c.failing[mode]-- }
	}},
	{"program dies", func(s *sim) func() {
		for _, n := range s.nodes {
			for _, c := range n.copies {
				if c.up && s.chance(50) {
					n.die(c, s.random.IntN(len(c.running)))
				}
			}
		}
		return nothing
	}},
	{"started by hand", func(s *sim) func() {
		v := s.services[s.random.IntN(len(s.services))]
		n := s.nodes[v.nodes[s.random.IntN(len(v.nodes))]]
		c := n.copies[v.index]
		if !n.up || n.suspended || c.up {
			return nil
		}
		n.log("%s is started by hand", v.name)
		s.check.byHand(n, c)
		for i := range c.running {
			n.set(c, i, true)
		}
		return nothing
	}},
	{"frozen node", func(s *sim) func() {
		n := s.anyNode()
		if n.core == nil || n.paused {
			return nil
		}
		n.later(0, func() { n.step(nodeOrder{true}) })
		return func() { n.later(0, func() { n.step(nodeOrder{false}) }) }
	}},
	{"frozen service", func(s *sim) func() {
		n := s.anyNode()
		v := s.services[s.random.IntN(len(s.services))]
		return n.order(serviceOrder{service: v.name, localExpect: "frozen"}, serviceOrder{service: v.name, localExpect: "thawed"})
	}},
	{"started by order", func(s *sim) func() {
		v := s.services[s.random.IntN(len(s.services))]
		return s.nodes[v.nodes[s.random.IntN(len(v.nodes))]].order(serviceOrder{service: v.name, localExpect: "started"}, serviceOrder{service: v.name, localExpect: "unset"})
	}},
	{"stopped by order", func(s *sim) func() {
		v := s.services[s.random.IntN(len(s.services))]
		return s.nodes[v.nodes[s.random.IntN(len(v.nodes))]].order(serviceOrder{service: v.name, localExpect: "stopped"}, serviceOrder{service: v.name, localExpect: "unset"})
	}},
}

func nothing() {}

func together(ends []func()) func() {
	return func() {
		for _, end := range ends {
			end()
		}
	}
}

func (n *simNode) order(do, undo event) func() {
	if n.core == nil || n.paused {
		return nil
	}
	n.later(0, func() { n.step(do) })
	return func() { n.later(0, func() { n.step(undo) }) }
}

func (n *simNode) outage() func() {
	n.holds++
	n.crash("power")
	return func() {
		n.holds--
		n.boot()
	}
}

func (n *simNode) restart() {
	n.kill("killed")
	n.machine(n.s.span(100*time.Millisecond, 200*time.Millisecond), n.daemonStart)
}

func (n *simNode) daemonDown() func() {
	n.down++
	n.kill("killed, and kept down")
	return func() {
		n.down--
		n.machine(n.s.span(time.Millisecond, 200*time.Millisecond), n.daemonStart)
	}
}
