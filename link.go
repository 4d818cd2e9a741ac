// link.go: who hears whom (design.md §8, Links): the beats that go out, those
// that come in, and the links that they make. It is a part of the core
// (monitor.go): pure.
//
// A beat is worth something only when it shows that its sender hears this
// daemon now: it acknowledges a beat of this start that was sent less than
// `timeout` ago. So an old beat that is played again says nothing, and no
// clocks need to agree.

package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// peer is another member as this node sees it.
type peer struct {
	name  string
	index int // in the list of members

	// Of its last beat that came in order.
	epoch, salt, seq uint64
	list             uint32
	heard            uint64
	term             time.Duration

	sent    []sentBeat // newest last; those that can still be acknowledged in time
	seqSent uint64
	lastAt  leaseClock // when the last beat was sent
	acked   leaseClock // until when the link is good, by what it acknowledged
	known   bool       // acked is set, in its present epoch
	linked  bool       // as of the last round
	fresh   leaseClock // until when it counts as being there because it has just begun anew

	ackSeq uint64 // what is acknowledged to it: not before needs is kept
	needs  uint64

	claims  map[string]uint32 // by service, of content number held
	held    uint32
	voting  []pendingVote
	voted   uint32 // the number that is named to it
	granted uint32 // the number of this node's claims that it named last
	refuses []uint32

	worth   leaseClock    // until when what it grants is worth something
	free    leaseClock    // its grants here are not freed before
	longest time.Duration // of the terms that it stated
	refused []uint32      // what is refused to it, as of
	counted uint64        // that count of c.ballot

	urgent bool // a beat is due to it
	data   peerData
	told   bool // data is set
}

// sentBeat remembers a beat until it cannot make a link any more. until is the
// end of what its acknowledgement is worth: `timeout` after it was sent.
type sentBeat struct {
	seq   uint64
	until leaseClock
}

// pendingVote: the content of that number is voted on when the journal is kept
// up to version.
type pendingVote struct {
	number uint32
	needs  uint64
}

func (e clusterEvent) apply(c *core) *monitored {
	c.cluster = e.spec
	known := c.peers
	for _, p := range known {
		c.seqSent = max(c.seqSent, p.seqSent)
	}
	c.peers = map[string]*peer{}
	for i, name := range e.spec.members {
		if name == c.node {
			continue
		}
		p := known[name]
		if p == nil {
			p = &peer{name: name, seqSent: c.seqSent}
		}
		p.index = i
		c.peers[name] = p
	}
	for _, g := range c.grants {
		if p := known[g.Node]; p != nil {
			g.free = g.free.latest(p.free)
		}
	}
	return nil
}

// members lists the peers in the order of the list.
func (c *core) ordered() []*peer {
	list := make([]*peer, 0, len(c.peers))
	for _, name := range c.cluster.members {
		if p := c.peers[name]; p != nil {
			list = append(list, p)
		}
	}
	return list
}

func (e beatDue) apply(c *core) *monitored {
	for _, p := range c.ordered() {
		c.beat(p, e.heartbeat)
	}
	return c.nobody()
}

func (dataDue) apply(c *core) *monitored {
	c.rouse()
	return c.nobody()
}

func (e peerEvent) apply(c *core) *monitored {
	if p := c.peers[e.node]; p != nil {
		p.data, p.told = e.data, true
	}
	return nil
}

// rouse has a beat sent to each peer at once.
func (c *core) rouse() {
	for _, p := range c.peers {
		p.urgent = true
	}
}

// hurry sends the beats that are due, none within beatPause of the last: what
// changes again and again must not become a flood.
func (c *core) hurry() {
	for _, p := range c.ordered() {
		switch next := p.lastAt.add(beatPause); {
		case !p.urgent:
		case p.seqSent > 0 && !c.clock.reached(next):
			c.wakeBy(next)
		default:
			c.beat(p, "")
		}
	}
}

// beat sends the next beat to a peer. Its time is taken before it leaves, so
// that a lease never counts from later than that.
func (c *core) beat(p *peer, heartbeat string) {
	p.urgent = false
	if c.silent != "" {
		return
	}
	p.seqSent++
	p.lastAt = c.clock
	i := 0
	for i < len(p.sent) && (c.clock.reached(p.sent[i].until) || len(p.sent)-i >= sentKept) {
		i++
	}
	p.sent = append(p.sent[i:], sentBeat{p.seqSent, c.clock.add(c.cluster.timeout)})
	b := beat{
		salt: c.salt, seq: p.seqSent, epoch: c.epoch, list: c.cluster.list, term: c.term(),
		ackSeq: p.ackSeq, ackSalt: saltID(p.salt), claims: c.claims,
	}
	if c.good(p) { // else what is acknowledged may be a beat that did not count, and extended no grant
		b.granted, b.refused = p.voted, c.refused(p)
	}
	for i, name := range c.cluster.members {
		if name == c.node || c.peers[name].linked {
			b.heard |= 1 << i
		}
	}
	if p.granted != c.claims && c.good(p) {
		b.changes = c.changesSince(p.granted)
	}
	c.send(beatEffect{p.name, heartbeat, b})
}

// saltID is the part of a salt by which it is acknowledged.
func saltID(salt uint64) uint32 { return uint32(salt >> 32) }

// apply takes a beat in. Those that are old, or of an earlier start of the
// peer, say nothing.
func (e beatEvent) apply(c *core) *monitored {
	p, b := c.peers[e.from], e.beat
	if p == nil || b.epoch < p.epoch || b.epoch == p.epoch && (b.salt != p.salt || b.seq <= p.seq) {
		return c.nobody()
	}
	if b.epoch > p.epoch {
		c.settleVotes(p)
		p.begin(b)
		p.fresh = c.clock.add(c.cluster.timeout)
	}
	mine := b.ackSalt == saltID(c.salt)
	if !mine && c.good(p) {
		return c.nobody() // it was sent to another node, or to an earlier start of this one
	}
	p.seq = b.seq
	for _, v := range b.data.held {
		if v.node == c.node && v.epoch > c.epoch {
			c.send(anewEffect{v.epoch, fmt.Sprintf("%s knows a later start of this node: this one was restored from a copy, or runs twice", p.name)})
			return c.nobody()
		}
	}
	if mine && b.ackSeq > p.seqSent {
		c.send(anewEffect{c.epoch, fmt.Sprintf("%s has received a beat that this daemon never sent: it was restored from a copy, or runs twice", p.name)})
		return c.nobody()
	}
	if mine {
		c.acknowledged(p, b.ackSeq)
	}
	if !c.good(p) {
		if p.acknowledge(c.kept); c.clock.reached(p.lastAt.add(unlinkedPause)) || p.seqSent == 0 {
			p.urgent = true // so that it hears that it is heard
		}
		return c.nobody()
	}
	return c.accept(p, b)
}

// begin takes up a new start of the peer: nothing is known of its claims, and
// it has acknowledged nothing.
func (p *peer) begin(b beat) {
	p.epoch, p.salt, p.seq = b.epoch, b.salt, 0
	p.known, p.ackSeq = false, 0
	p.claims, p.held, p.voted, p.voting = nil, 0, 0, nil
	p.granted, p.refuses = 0, nil
}

// find returns the place of a beat that was sent.
func (p *peer) find(seq uint64) (int, bool) {
	return slices.BinarySearchFunc(p.sent, seq, func(s sentBeat, seq uint64) int { return cmp.Compare(s.seq, seq) })
}

// acknowledged takes up which beat the peer has received.
func (c *core) acknowledged(p *peer, seq uint64) {
	if i, found := p.find(seq); found && (!p.known || p.sent[i].until.after(p.acked)) {
		p.acked, p.known = p.sent[i].until, true
	}
}

// good tells whether the peer's beats count now.
func (c *core) good(p *peer) bool { return p.known && !c.clock.reached(p.acked) }

// acknowledge lets the peer hear that its last beat was received, unless it
// said what must be kept first.
func (p *peer) acknowledge(kept uint64) {
	if p.needs <= kept {
		p.ackSeq = p.seq
	}
}

// accept takes in what a beat says that counts.
func (c *core) accept(p *peer, b beat) *monitored {
	c.send(acceptEffect{p.name})
	if b.list != c.cluster.list {
		b.heard = 0 // its bits are of other members
	}
	stirred := p.heard != b.heard || p.list != b.list || !p.linked
	p.list, p.heard, p.term = b.list, b.heard, b.term
	stirred = c.learn(p, b) || stirred
	c.extend(p, b.term)
	stirred = c.takeVotes(p, b) || stirred
	p.acknowledge(c.kept)
	if !stirred {
		return c.nobody()
	}
	return nil
}

// learn takes in the claims of a peer, and tells whether they changed. What
// builds on a content that is not held is left; the peer goes on saying it.
func (c *core) learn(p *peer, b beat) bool {
	first := p.claims == nil
	switch changes := b.changes; {
	case changes == nil && (b.claims != 0 || !first):
		return false
	case changes == nil || changes.base == 0:
		p.claims = map[string]uint32{}
	case first || changes.base > p.held:
		return false
	}
	if b.changes != nil {
		for _, e := range b.changes.entries {
			if e.number == 0 {
				delete(p.claims, e.service)
			} else {
				p.claims[e.service] = e.number
			}
		}
	}
	again := p.held == b.claims && !first
	p.held = b.claims
	if !again {
		c.voteOn(p)
	}
	return !again
}

// round looks at the links, and at what time has made of them.
func (c *core) round() {
	defer c.complete()
	for _, p := range c.ordered() {
		good := c.good(p)
		if good {
			c.wakeBy(p.acked)
		}
		if good == p.linked {
			continue
		}
		p.linked = good
		c.stirred = true
		c.rouse()
		state := "good"
		switch {
		case good:
		case !p.known:
			state = "it begins anew"
		default:
			state = "lost: nothing of it that answers this node for " + c.cluster.timeout.String()
		}
		c.send(linkEffect{p.name, state})
	}
}

// alive tells whether the peer is linked with this node, or with one of those
// that are, or has just begun anew.
func (c *core) alive(p *peer) bool {
	return p.linked || !c.clock.reached(p.fresh) || slices.ContainsFunc(c.ordered(), func(other *peer) bool {
		return other.linked && other.heard&(1<<p.index) != 0
	})
}

// linkState is how a peer is shown.
func (c *core) linkState(node string) linkState {
	p := c.peers[node]
	switch {
	case node == c.node || p != nil && p.linked:
		return linkLinked
	case p != nil && c.alive(p):
		return linkUnreachable
	}
	return linkDead
}

// complete tells whether all members were seen at once since the start.
func (c *core) complete() bool {
	c.joined = c.joined || c.seen() == len(c.cluster.members)
	return c.joined
}

// seen counts the voters that this node is linked with, itself included.
func (c *core) seen() int {
	n := 1
	for _, p := range c.peers {
		if p.linked {
			n++
		}
	}
	return n
}
