package main

import (
	"slices"
	"time"
)

// simCheck looks at the truth: whose programs run where, what is on the disks,
// what can have been heard. It never asks a daemon.
type simCheck struct {
	every   time.Duration
	settled []time.Duration // when each copy came up or went down, at the last look
	accepts [][]accepted    // by node, from
	emitted []*votes        // what each voter has promised
	ballots []uint64        // the count of c.ballot as of then
	heard   []uint64
	starts  int
}

// accepted is the newest beat that counted.
type accepted struct{ at, sent time.Duration }

func (k *simCheck) begin(s *sim) {
	k.every = min(s.timeout, s.grace) / 4
	k.accepts = make([][]accepted, s.size)
	for i := range k.accepts {
		k.accepts[i] = make([]accepted, s.size)
	}
	k.emitted, k.ballots, k.heard = make([]*votes, s.size), make([]uint64, s.size), make([]uint64, s.size)
	s.after(k.every, func() { k.audit(s) })
}

func (k *simCheck) audit(s *sim) {
	for _, n := range s.nodes {
		for _, c := range n.copies {
			if c.up && c.service.several {
				k.mayRun(n, c)
			}
		}
	}
	for _, v := range s.services {
		k.once(s, v)
	}
	k.bounded(s)
	s.after(k.every, func() { k.audit(s) })
}

// handBound is how long an instance that was started by hand may go on: it is
// seen, claimed, refused or not granted, and stopped.
func (s *sim) handBound() time.Duration {
	return s.recheck*11/10 + 2*s.timeout + 2*s.grace + 3*time.Second
}

// counts tells whether a copy is one that must not run beside another: a copy
// that nobody can stop, or that was started behind agentd's back, does not
// until its time is over.
func (k *simCheck) counts(n *simNode, c *simCopy) bool {
	s := n.s
	if !c.up || n.suspended {
		return false
	}
	if c.byHand && (!n.running || n.paused || n.core == nil) {
		c.exempt = s.now + s.handBound()
	}
	if s.now < c.exempt || c.unguarded || c.stuck && !s.reboots {
		return false
	}
	c.byHand = false
	return true
}

func (k *simCheck) byHand(n *simNode, c *simCopy) {
	c.byHand, c.exempt = true, n.s.now+n.s.handBound()
}

func (k *simCheck) woke(n *simNode) {
	for _, c := range n.copies {
		c.exempt = max(c.exempt, n.s.now+n.s.grace+time.Second)
	}
}

// unguarded: while neither daemon nor guard runs, nobody can stop a copy. A
// daemon whose disk does not take its epoch has not begun.
func (k *simCheck) unguarded(n *simNode) {
	if (!n.running || n.paused || n.core == nil) && !n.guard.works() {
		for _, c := range n.copies {
			c.unguarded = c.up
		}
	}
}

func (k *simCheck) guarded(n *simNode) {
	for _, c := range n.copies {
		if c.unguarded || c.byHand {
			c.unguarded = false
			c.exempt = max(c.exempt, n.s.now+n.s.handBound())
		}
	}
}

// once is I1.
func (k *simCheck) once(s *sim, v *simService) {
	if !v.several || !s.quorum && s.now-s.faults.last < k.bound(s) || !s.quorum && !s.faults.healing {
		return
	}
	var first *simNode
	for _, i := range v.nodes {
		n := s.nodes[i]
		if !k.counts(n, n.copies[v.index]) {
			continue
		}
		if first != nil {
			s.fail("I1: %s runs on %s since %s and on %s since %s", v.name, first.name, first.copies[v.index].since, n.name, n.copies[v.index].since)
			return
		}
		first = n
	}
}

func (k *simCheck) cameUp(n *simNode, c *simCopy) { k.once(n.s, c.service) }

// slowest is how long d can last by a clock of this cluster.
func (s *sim) slowest(d time.Duration) time.Duration { return scale(d, s.drift+s.drift/20) }

// acked is the latest moment whose beat a majority can have acknowledged.
func (n *simNode) acked() time.Duration {
	times := slices.Clone(n.ackedBy)
	times[n.index] = n.s.now
	slices.Sort(times)
	return times[n.s.size-n.s.majority()]
}

// mayRun is the second half of I2: who has not been heard by a majority for
// long does not run anything.
func (k *simCheck) mayRun(n *simNode, c *simCopy) {
	s := n.s
	if !s.quorum || !k.counts(n, c) {
		return
	}
	if acked := n.acked(); s.now > max(acked, c.since)+s.slowest(s.timeout+s.grace)+20*time.Millisecond {
		s.fail("I2: %s runs on %s, which a majority answered last at %s", c.service.name, n.name, acked)
	}
}

// granting is the first half of I2.
func (k *simCheck) granting(n *simNode, c *simCopy) {
	s := n.s
	grants := 0
	for _, voter := range s.nodes {
		if forgot := s.now < voter.disk.forgot+s.slowest(s.timeout); forgot || voter.disk.votes != nil && voter.disk.votes.Grants[c.service.name].Node == n.name {
			grants++
		}
	}
	if grants < s.majority() {
		s.fail("I2: %s starts %s, and %d of %d voters have granted it", n.name, c.service.name, grants, s.size)
	}
	if acked := n.acked(); s.now > acked+s.slowest(s.timeout)+time.Millisecond {
		s.fail("I2: %s starts %s, and a majority answered it last at %s", n.name, c.service.name, acked)
	}
}

// began: an order that starts something begins.
func (k *simCheck) began(n *simNode, c *simCopy) {
	k.starts++
	if n.s.quorum && c.service.several {
		k.granting(n, c)
	}
	if c.service.several && !n.guard.told {
		n.s.fail("%s starts %s without a guard", n.name, c.service.name)
	}
}

// sent notes what a node says that it hears.
func (k *simCheck) sent(n, to *simNode, b beat) { k.heard[n.index] = b.heard }

func (k *simCheck) accepted(n *simNode, p *simPacket) {
	if p.sent < k.accepts[n.index][p.from].sent {
		n.s.fail("I8: %s takes an old beat for a new one", n.name)
	}
	k.accepts[n.index][p.from] = accepted{n.s.now, p.sent}
}

// granted is I6: a voter keeps a grant until its term is over, unless the
// holder gave it back, and then nothing runs there. It is judged when the voter
// changes its mind, which may be long before the disk takes it; and of what is
// not on the disk yet, nobody knows.
func (k *simCheck) granted(n *simNode) {
	s := n.s
	was := k.emitted[n.index]
	if was != nil && n.core.ballot == k.ballots[n.index] {
		return
	}
	now, promised := &votes{Grants: map[string]grant{}}, &votes{Grants: map[string]grant{}}
	for name, g := range n.core.grants {
		now.Grants[name] = g.grant
		if g.version <= n.core.kept || was != nil && was.Grants[name].Node == g.Node {
			promised.Grants[name] = g.grant
		}
	}
	k.emitted[n.index], k.ballots[n.index] = promised, n.core.ballot
	if was == nil || !s.quorum {
		return
	}
	for _, v := range s.services {
		g, ok := was.Grants[v.name]
		if !ok || now.Grants[v.name].Node == g.Node {
			continue
		}
		holder := s.nodeOf(g.Node)
		c := holder.copies[v.index]
		last := k.accepts[n.index][holder.index]
		if early := s.now < last.at+scale(s.term(), -s.drift-s.drift/20)-time.Millisecond; early && k.counts(holder, c) && c.since < last.sent {
			s.fail("I6: %s moves its grant of %s from %s, where it runs since %s; the last beat came at %s, sent at %s", n.name, v.name, holder.name, c.since, last.at, last.sent)
		}
	}
}

// bound is how long it takes at most, once all is healed, until everything is
// as it should be.
func (k *simCheck) bound(s *sim) time.Duration {
	return 2*s.longest + 3*s.term() + s.rejoin + 4*s.timeout + 2*s.recheck + 100*time.Second + 5*s.grace
}

// live is I3 and I4: everything is healed for long enough.
func (k *simCheck) live(s *sim) bool {
	for _, n := range s.nodes {
		switch {
		case !n.up || n.core == nil:
			s.fail("I4: %s does not run", n.name)
		case s.size > 1 && k.heard[n.index] != 1<<s.size-1:
			s.fail("I4: %s hears %b", n.name, k.heard[n.index])
		}
		for j, other := range s.nodes {
			if j != n.index && n.know != nil && n.know[j] != other.mine {
				s.fail("I4: %s does not know how %s is", n.name, other.name)
			}
		}
	}
	for _, v := range s.services {
		var on []string
		for _, i := range v.nodes {
			if s.nodes[i].copies[v.index].up {
				on = append(on, s.nodes[i].name)
			}
		}
		if len(on) != 1 {
			s.fail("I3: %s runs on %v, of %v%s", v.name, on, v.nodes, k.reasons(s, v))
		}
	}
	k.settled = k.settled[:0]
	for _, n := range s.nodes {
		for _, c := range n.copies {
			k.settled = append(k.settled, max(c.since, c.downAt))
		}
	}
	return s.fault == ""
}

func (k *simCheck) reasons(s *sim, v *simService) (text string) {
	for _, i := range v.nodes {
		if n := s.nodes[i]; n.core != nil && n.core.services[v.name] != nil {
			text += "\n" + n.name + ": " + stateText(n.core.services[v.name])
		}
	}
	return text
}

// still: where nothing is disturbed, nothing moves.
func (k *simCheck) still(s *sim) bool {
	i := 0
	for _, n := range s.nodes {
		for _, c := range n.copies {
			if k.settled[i] != max(c.since, c.downAt) {
				s.fail("%s moved on %s, and nothing happened", c.service.name, n.name)
			}
			i++
		}
	}
	return s.fault == ""
}

// bounded is I7: what a core holds does not grow.
func (k *simCheck) bounded(s *sim) {
	n := s.nodes[s.random.IntN(s.size)]
	if n.core == nil {
		return
	}
	c := n.core
	sizes := []int{len(c.claimed), len(c.gone), len(c.grants)}
	for _, p := range c.peers {
		sizes = append(sizes, len(p.claims), len(p.sent)-sentKept, len(p.voting)-votesPending, len(p.refuses))
	}
	if most := slices.Max(sizes); most > len(s.services) {
		s.fail("I7: %s holds tables of %v entries", n.name, sizes)
	}
}
