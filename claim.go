// claim.go: how the right to run a service is won, kept and lost: the voter's
// side and the holder's of claims and leases (lease.go has their words). It is
// a part of the core (monitor.go): pure.
//
// Why two nodes never hold the right at once: a claim needs a majority of
// votes; a voter votes for one claim at a time, and holds to it, over restarts,
// until its stated term has passed since it last received a beat of the holder;
// the holder counts each vote from before it sent the beat that the vote
// acknowledges, and stops when the timeout is over, within the grace. The term
// is longer than both together, however clocks differ in speed.

package main

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// claim is this node's demand to run a service, and what came of it.
type claim struct {
	number uint32
	// until is the end of the right that it began with: what an earlier daemon
	// left, or the time to find a majority in for what was found up.
	until    leaseClock
	found    bool                  // until is set
	votes    map[string]leaseClock // by voter: the end of what it granted
	begun    leaseClock            // of the first vote
	split    bool                  // begun is set
	made     leaseClock
	won      bool // it has had what it needs, at some time
	overdue  bool // the guard may have stopped it before this daemon began
	restored bool // by the journal alone: nothing of it needs to run
}

// promise is a grant while the daemon runs.
type promise struct {
	grant
	free    leaseClock // it is held until then at least
	version uint64     // of the journal that holds it
}

// term is how long a voter holds a grant after a beat: the lease, the time to
// stop, and what clocks may differ in speed.
func (c *core) term() time.Duration { return termOf(c.cluster.timeout, c.cluster.grace) }

func termOf(timeout, grace time.Duration) time.Duration {
	const slower, faster = 100, 105
	return ((timeout + grace) * faster / slower).Truncate(time.Millisecond) + time.Millisecond
}

func (c *core) majority() int { return len(c.cluster.members)/2 + 1 }

// failover tells whether the service may run on several nodes, so that it needs
// a claim.
func (s *monitored) failover() bool { return len(s.spec.nodes) > 1 }

// leases tells whether the instance runs by its claim: also where the file
// names one node by now, but the claim is still to be given back.
func (c *core) leases(s *monitored) bool { return s.failover() || c.claimed[s.spec.name] != nil }

// demand claims a service.
func (c *core) demand(name string) *claim {
	c.claims++
	k := &claim{number: c.claims, made: c.clock, votes: map[string]leaseClock{}}
	c.claimed[name] = k
	delete(c.gone, name)
	c.rouse()
	c.award(name)
	return k
}

// giveBack ends a claim. Its instance was seen down, or never started.
func (c *core) giveBack(name string) {
	if c.claimed[name] == nil {
		return
	}
	c.claims++
	delete(c.claimed, name)
	c.gone[name] = c.claims
	if g := c.grants[name]; g != nil && g.Node == c.node {
		delete(c.grants, name)
		c.touch()
	}
	c.award(name)
	c.rouse()
}

// changesSince lists what changed in the claims after a number; since 0, all.
func (c *core) changesSince(base uint32) *claimChanges {
	changes := &claimChanges{base: base}
	for name, k := range c.claimed {
		if k.number > base {
			changes.entries = append(changes.entries, claimEntry{name, k.number})
		}
	}
	for name, number := range c.gone {
		if base > 0 && number > base {
			changes.entries = append(changes.entries, claimEntry{name, 0})
		}
	}
	slices.SortFunc(changes.entries, func(a, b claimEntry) int { return strings.Compare(a.service, b.service) })
	return changes
}

// prune forgets what was given back once every peer knows.
func (c *core) prune() {
	for name, number := range c.gone {
		if !slices.ContainsFunc(c.ordered(), func(p *peer) bool { return p.granted < number }) {
			delete(c.gone, name)
		}
	}
}

// ---- The voter --------------------------------------------------------------

// touch marks the journal as changed and returns the version that will hold
// the change.
func (c *core) touch() uint64 {
	c.ballot++
	if !c.unkept {
		c.version++
		c.unkept = true
	}
	return c.version
}

// extend moves the moment at which a peer's grants may be freed; never to an
// earlier one. A longer term is kept before it is acknowledged.
func (c *core) extend(p *peer, term time.Duration) {
	p.free = p.free.latest(c.clock.add(term))
	if term <= p.longest {
		return
	}
	p.longest = term
	for _, g := range c.grants {
		if g.Node == p.name && term > g.Term {
			g.Term = term
			g.version = c.touch()
			p.needs = g.version
		}
	}
}

// until is the moment before which a grant is not freed.
func (c *core) until(g *promise) leaseClock {
	if p := c.peers[g.Node]; p != nil {
		return g.free.latest(p.free)
	}
	return g.free
}

// voteOn brings the grants of a peer in line with its claims.
func (c *core) voteOn(p *peer) {
	for name, g := range c.grants {
		if g.Node != p.name {
			continue
		}
		switch number := p.claims[name]; {
		case number == 0:
			delete(c.grants, name)
			c.touch()
			c.award(name)
		case g.Claim != number || g.Epoch != p.epoch:
			g.Claim, g.Epoch = number, p.epoch
			g.version = c.touch()
		}
	}
	for name := range p.claims {
		c.award(name)
	}
	p.voting = append(p.voting, pendingVote{p.held, c.version})
	if len(p.voting) > votesPending {
		p.voting = slices.Delete(p.voting, len(p.voting)-2, len(p.voting)-1)
	}
	p.count(c.kept)
	c.ballot++
	p.urgent = true
}

// count names the contents whose grants are kept.
func (p *peer) count(kept uint64) {
	for len(p.voting) > 0 && p.voting[0].needs <= kept {
		p.voted = p.voting[0].number
		p.voting = p.voting[1:]
	}
}

// award grants a service that nobody has to the most preferred of those who
// claim it and are there.
func (c *core) award(name string) {
	if c.muted() || c.grants[name] != nil {
		return
	}
	for _, node := range c.preference(name) {
		g := grant{Node: node, Term: c.term()}
		if p := c.peers[node]; p == nil {
			if k := c.claimed[name]; node == c.node && k != nil {
				g.Epoch, g.Claim = c.epoch, k.number
			}
		} else if c.good(p) {
			g.Epoch, g.Claim, g.Term = p.epoch, p.claims[name], p.term
		}
		if g.Claim == 0 {
			continue
		}
		free := c.clock.add(g.Term)
		if p := c.peers[node]; p != nil {
			free = p.free // the right that this gives begins with a beat that was received already
			p.urgent, p.longest = true, min(p.longest, g.Term)
		}
		c.grants[name] = &promise{g, free, c.touch()}
		return
	}
}

// release frees the grants whose terms have passed.
func (c *core) release() {
	var freed []string
	for name, g := range c.grants {
		p := c.peers[g.Node]
		switch {
		case g.Node == c.node || p != nil && c.good(p):
		case c.clock.surely(c.until(g)):
			freed = append(freed, name)
		default:
			c.wakeBy(c.until(g))
		}
	}
	for _, name := range freed {
		delete(c.grants, name)
		c.touch()
		c.stirred = true
		c.award(name)
	}
}

// muted tells whether this voter has to be silent: it may have forgotten.
func (c *core) muted() bool { return c.mute > 0 }

// speak ends the silence once every promise that was forgotten has ended.
func (c *core) speak() {
	switch {
	case c.mute == 0:
	case !c.clock.surely(c.muteEnd):
		c.wakeBy(c.muteEnd)
	default:
		c.mute, c.stirred = 0, true
		c.touch()
		for name := range c.claimed {
			c.award(name)
		}
		for _, p := range c.peers {
			for name := range p.claims {
				c.award(name)
			}
		}
	}
}

// refused lists which of the claims that a peer is told about are not granted.
func (c *core) refused(p *peer) []uint32 {
	if p.counted == c.ballot {
		return p.refused
	}
	var numbers []uint32
	for name, number := range p.claims {
		if number <= p.voted && !c.grantedTo(name, p.name, p.epoch, number) {
			numbers = append(numbers, number)
		}
	}
	slices.Sort(numbers)
	p.refused, p.counted = numbers, c.ballot
	return numbers
}

func (c *core) grantedTo(name, node string, epoch uint64, number uint32) bool {
	g := c.grants[name]
	return !c.muted() && g != nil && g.grant.Node == node && g.Epoch == epoch && g.Claim == number && g.version <= c.kept
}

func (e votesKept) apply(c *core) *monitored {
	c.writing = false
	if e.err != nil {
		c.touch() // a later version holds all that this one did
		c.retry = c.clock.add(journalPause)
		return c.nobody()
	}
	c.kept = e.version
	c.ballot++
	for _, p := range c.peers {
		p.count(c.kept)
		p.acknowledge(c.kept)
	}
	for _, g := range c.grants {
		if p := c.peers[g.Node]; p != nil && g.version == e.version {
			p.urgent = true
		}
	}
	return nil
}

// journal has the votes kept, if they changed and no write goes on.
func (c *core) journal() {
	switch {
	case !c.unkept || c.writing:
		return
	case !c.clock.reached(c.retry):
		c.wakeBy(c.retry)
		return
	}
	c.unkept, c.writing = false, true
	v := votes{Grants: map[string]grant{}, Mute: c.mute}
	for name, g := range c.grants {
		v.Grants[name] = g.grant
	}
	c.send(votesEffect{c.version, v})
}

// ---- The holder -------------------------------------------------------------

// takeVotes counts what a peer's beat grants, and tells whether anything is
// other than before. A vote is worth something until `timeout` after the beat
// was sent that it acknowledges.
func (c *core) takeVotes(p *peer, b beat) (stirred bool) {
	if b.ackSalt != saltID(c.salt) || b.list != c.cluster.list {
		return false
	}
	if stirred = p.granted != b.granted || !slices.Equal(p.refuses, b.refused); stirred {
		c.settleVotes(p)
		p.granted, p.refuses = b.granted, b.refused
	}
	if i, found := p.find(b.ackSeq); found {
		p.worth = p.sent[i].until
	}
	if !stirred {
		return false
	}
	for _, k := range c.claimed {
		if p.grants(k) && !k.split {
			k.begun, k.split = c.clock, true
		}
	}
	return true
}

// settleVotes writes down what the peer has granted so far, before it grants
// something else.
func (c *core) settleVotes(p *peer) {
	for _, k := range c.claimed {
		if p.grants(k) && k.votes[p.name].before(p.worth) {
			k.votes[p.name] = p.worth
		}
	}
}

// grants tells whether the peer's last beat grants a claim.
func (p *peer) grants(k *claim) bool {
	_, refused := slices.BinarySearch(p.refuses, k.number)
	return k.number <= p.granted && !refused
}

// leaseEnd is the moment until which a majority has granted a claim.
func (c *core) leaseEnd(name string, k *claim) (end leaseClock, ok bool) {
	var ends [maxMembers]leaseClock
	n := 0
	for _, node := range c.cluster.members {
		until, voted := k.votes[node]
		if p := c.peers[node]; p != nil && p.grants(k) && until.before(p.worth) {
			until, voted = p.worth, true
		}
		if node == c.node && c.grantedTo(name, node, c.epoch, k.number) {
			until, voted = c.clock.add(c.cluster.timeout), true
		}
		if voted && n < len(ends) {
			ends[n] = until
			n++
		}
	}
	if n < c.majority() {
		return leaseClock{}, false
	}
	slices.SortFunc(ends[:n], func(a, b leaseClock) int { return b.compare(a) })
	return ends[c.majority()-1], true
}

// agreed tells, with quorum off, whether every peer of the view has granted a
// claim.
func (c *core) agreed(name string, k *claim) bool {
	return c.grantedTo(name, c.node, c.epoch, k.number) && !slices.ContainsFunc(c.ordered(), func(p *peer) bool {
		return p.linked && !p.grants(k)
	})
}

// win tells whether a claim gives the right to run now, by votes alone.
func (c *core) win(name string, k *claim) bool {
	if !c.cluster.quorum {
		k.won = k.won || c.agreed(name, k)
		return k.won
	}
	end, ok := c.leaseEnd(name, k)
	won := ok && !c.clock.reached(end)
	k.won = k.won || won
	return won
}

// right tells whether the instance may be up: by votes, or for a while because
// an earlier daemon had the right, or because it was found up.
func (c *core) right(name string, k *claim) bool {
	return c.win(name, k) || k.found && !c.clock.reached(k.until)
}

// deadline is when the guard has to stop the instance.
func (c *core) deadline(name string, k *claim) leaseClock {
	end, ok := c.leaseEnd(name, k)
	if !c.cluster.quorum {
		end, ok = c.clock.add(c.cluster.timeout), k.won
	}
	if k.found && (!ok || k.until.after(end)) {
		return k.until
	}
	return end
}

// hopeless tells whether a claim can get no majority as things are, because
// others were granted the service.
func (c *core) hopeless(name string, k *claim) bool {
	against := 0
	for _, p := range c.ordered() {
		_, refused := slices.BinarySearch(p.refuses, k.number)
		if p.linked && k.number <= p.granted && refused {
			against++
		}
	}
	if g := c.grants[name]; g != nil && g.Node != c.node {
		against++
	}
	if !c.cluster.quorum {
		return against > 0
	}
	return against > len(c.cluster.members)-c.majority()
}

// watch tells the guard what is held and until when, where that changed.
func (c *core) watch() {
	near := len(c.guarded.own) > 0 || c.clock.reached(c.guarded.deadline.add(-c.cluster.timeout/2))
	if c.quiet && !c.stirred && !near && !c.clock.reached(c.watched.add(c.cluster.timeout/8)) {
		return // what is known there is good for long
	}
	c.watched = c.clock
	e := guardEffect{own: map[string]leaseClock{}}
	common := false
	for name, k := range c.claimed {
		if !k.won && (!k.found || k.restored) {
			continue // nothing of it runs, or not as far as is known yet
		}
		e.held = append(e.held, name)
		end := c.deadline(name, k)
		switch {
		case c.clock.reached(end):
			e.own[name] = end
		case !common || end.before(e.deadline):
			e.deadline, common = end, true
		}
	}
	slices.Sort(e.held)
	if e.deadline == c.guarded.deadline && slices.Equal(e.held, c.guarded.held) && maps.Equal(e.own, c.guarded.own) {
		return
	}
	if common {
		c.wakeBy(e.deadline)
	}
	c.guarded = e
	c.send(e)
}
