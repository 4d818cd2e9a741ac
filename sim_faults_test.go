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

// holder is a node on which a failover service runs.
func (s *sim) holder() *simNode {
	var all []*simNode
	for _, n := range s.nodes {
		for _, c := range n.copies {
			if c.up && c.service.several {
				all = append(all, n)
				break
			}
		}
	}
	if all == nil {
		return nil
	}
	return all[s.random.IntN(len(all))]
}

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

// forget makes the journal unreadable.
func (n *simNode) forget() { n.disk.votes, n.disk.lost, n.disk.forgot = nil, true, n.s.now }

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
