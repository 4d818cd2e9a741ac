package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"
)

// plant is a bug, put into the core from outside: into what it is born with,
// what comes in, what goes out, or into its state between two steps. A nil
// plant changes nothing.
type plant struct {
	name  string
	from  uint64 // the seed to begin with: one by which a rare one is found early
	born  func(n *simNode, b *birth)
	event func(n *simNode, e event) event
	after func(n *simNode, e event, effects *[]effect)
}

func (p *plant) is(name string) bool { return p != nil && p.name == name }

func (p *plant) birth(n *simNode, b *birth) {
	if p != nil && p.born != nil {
		p.born(n, b)
	}
}

func (p *plant) in(n *simNode, e event) event {
	if p != nil && p.event != nil {
		return p.event(n, e)
	}
	return e
}

func (p *plant) out(n *simNode, e event, effects *[]effect) {
	if p != nil && p.after != nil {
		p.after(n, e, effects)
	}
}

// stepping is the clock of the step that comes.
func (n *simNode) stepping() leaseClock { return n.moment().clock }

// frees changes the moment at which a peer's grants are freed.
func (n *simNode) frees(peer string, at leaseClock) {
	n.core.peers[peer].free = at
	for _, g := range n.core.grants {
		if g.Node == peer {
			g.free = at
		}
	}
}

func plantedBugs() []*plant {
	return []*plant{
		{name: "lease counted from receipt", event: func(n *simNode, e event) event {
			if b, ok := e.(beatEvent); ok {
				p := n.core.peers[b.from]
				for i := range p.sent {
					if p.sent[i].seq == b.beat.ackSeq && b.beat.ackSalt == saltID(n.core.salt) {
						p.sent[i].until = n.stepping().add(n.s.timeout)
					}
				}
			}
			return e
		}},
		{name: "grants forgotten on restart", born: func(n *simNode, b *birth) { b.votes = nil }},
		{name: "I see a majority taken for quorum", event: func(n *simNode, e event) event {
			for _, k := range n.core.claimed {
				for _, p := range n.core.peers {
					if p.linked {
						k.votes[p.name] = n.stepping().add(n.s.timeout)
					}
				}
			}
			return e
		}},
		{name: "no guard"},
		{name: "claim given back before it was seen down", after: func(n *simNode, e event, effects *[]effect) {
			for _, f := range *effects {
				if act, ok := f.(actEffect); ok && act.order.Verb == verbStop {
					n.core.giveBack(act.service)
				}
			}
		}},
		{name: "grants of an old claim counted", event: func(n *simNode, e event) event {
			if b, ok := e.(beatEvent); ok && b.beat.granted > 0 {
				b.beat.granted = 1 << 31
				return b
			}
			return e
		}},
		{name: "frozen holders that do not stop", from: 70, after: func(n *simNode, e event, effects *[]effect) {
			frozen := func(name string) bool {
				m := n.core.services[name]
				return m != nil && m.failover() && (m.frozen || n.core.frozen)
			}
			for i, f := range *effects {
				switch f := f.(type) {
				case guardEffect:
					f.held = slices.DeleteFunc(slices.Clone(f.held), frozen)
					(*effects)[i] = f
				case actEffect:
					if f.order.Verb == verbStop && !f.order.ByHand && frozen(f.service) {
						(*effects)[i] = transitionEffect{}
						n.later(0, func() { n.step(doneEvent{f.service, verbStop, errors.New("frozen")}) })
					}
				}
			}
		}},
		{name: "a term forgotten by a restarted voter", born: func(n *simNode, b *birth) {
			if b.votes != nil {
				for name, g := range b.votes.Grants {
					g.Term = time.Millisecond
					b.votes.Grants[name] = g
				}
			}
		}},
		{name: "an empty first beat after a restart", born: func(n *simNode, b *birth) {
			clear(b.held)
			if b.votes != nil {
				maps.DeleteFunc(b.votes.Grants, func(_ string, g grant) bool { return g.Node == n.name })
			}
		}},
		{name: "a freeing moment moved earlier", after: func(n *simNode, e event, effects *[]effect) {
			if b, ok := e.(beatEvent); ok { // as if the grace did not count
				n.frees(b.from, n.stepping().add(n.s.timeout))
			}
		}},
		{name: "a lost link frees", event: func(n *simNode, e event) event {
			for _, p := range n.core.ordered() {
				if !n.core.good(p) {
					n.frees(p.name, n.stepping())
				}
			}
			return e
		}},
		{name: "refused claims sent only when they change", after: func(n *simNode, e event, effects *[]effect) {
			for i, f := range *effects {
				if f, ok := f.(beatEffect); ok {
					said := fmt.Sprint(f.beat.refused)
					if n.notes[f.to] == said {
						f.beat.refused = nil
					}
					n.notes[f.to] = said
					(*effects)[i] = f
				}
			}
		}},
		{name: "the journal is not synced before the vote", after: func(n *simNode, e event, effects *[]effect) {
			for _, f := range *effects {
				if f, ok := f.(votesEffect); ok {
					n.later(0, func() {
						if n.core != nil && n.core.kept < f.version {
							n.step(votesKept{f.version, nil})
						}
					})
				}
			}
		}},
		{name: "a voter measures with the larger clock", event: func(n *simNode, e event) event {
			for _, p := range n.core.ordered() {
				if n.stepping().reached(p.free) {
					n.frees(p.name, n.stepping())
				}
			}
			return e
		}},
		{name: "a holder measures with the smaller clock", event: func(n *simNode, e event) event {
			// Where one clock has not come there, neither has.
			now := n.stepping()
			later := func(at leaseClock) leaseClock {
				if at.raw > now.raw || at.boot > now.boot {
					return at.latest(now.add(time.Millisecond))
				}
				return at
			}
			for _, k := range n.core.claimed {
				for name, at := range k.votes {
					k.votes[name] = later(at)
				}
			}
			for _, p := range n.core.peers {
				p.worth = later(p.worth)
			}
			return e
		}},
		{name: "replayed beats accepted", event: func(n *simNode, e event) event {
			if b, ok := e.(beatEvent); ok {
				p := n.core.peers[b.from]
				if b.beat.epoch < p.epoch {
					p.epoch = 0
				} else if b.beat.seq <= p.seq && b.beat.epoch == p.epoch {
					p.seq = b.beat.seq - 1
				}
				b.beat.ackSalt, b.beat.ackSeq = saltID(n.core.salt), p.seqSent
				return b
			}
			return e
		}},
		{name: "a vote over a link that is not good", from: 2000, after: func(n *simNode, e event, effects *[]effect) {
			for i, f := range *effects {
				if f, ok := f.(beatEffect); ok && !n.core.good(n.core.peers[f.to]) {
					p := n.core.peers[f.to]
					f.beat.granted, f.beat.refused = p.voted, n.core.refused(p)
					(*effects)[i] = f
				}
			}
		}},
		{name: "a lost journal counts as none", from: 200, born: func(n *simNode, b *birth) { b.lost = false }},
		{name: "what is found up goes on", after: func(n *simNode, e event, effects *[]effect) {
			for _, k := range n.core.claimed {
				if k.found {
					k.until = n.stepping().add(time.Hour)
				}
			}
		}},
		{name: "of two copies none yields", event: func(n *simNode, e event) event {
			if !n.s.quorum {
				for _, p := range n.core.peers {
					p.data.instances = nil
				}
			}
			return e
		}},
		{name: "a dead guard is not noticed", from: 120, event: func(n *simNode, e event) event {
			if g, ok := e.(guardEvent); ok && !g.alive {
				return nil
			}
			return e
		}},
		{name: "deaths added up over time", after: func(n *simNode, e event, effects *[]effect) {
			// Who does not hear the holder now is counted, for good, as one who
			// would not vote for it.
			c := n.core
			for name, k := range c.claimed {
				dead := 0
				holder := ""
				if g := c.grants[name]; g != nil {
					holder = g.Node
				}
				if holder == "" || holder == n.name {
					continue
				}
				h := c.peers[holder]
				for _, p := range c.ordered() {
					key := name + holder + p.name
					if p.linked && p.heard&(1<<h.index) == 0 {
						n.notes[key] = "dead"
					}
					if n.notes[key] != "" {
						dead++
					}
				}
				if !h.linked {
					n.notes[name+holder] = "dead"
				}
				if n.notes[name+holder] != "" {
					dead++
				}
				if dead >= c.majority() {
					for _, m := range c.cluster.members {
						k.votes[m] = n.stepping().add(n.s.timeout)
					}
				}
			}
		}},
	}
}

// plantedSeeds is how many seeds a bug may take to be found.
const plantedSeeds = 300

// TestSimFindsPlantedBugs: a checker that cannot fail is worth nothing.
func TestSimFindsPlantedBugs(t *testing.T) {
	for _, p := range plantedBugs() {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			for i := range uint64(plantedSeeds) {
				seed := max(p.from, 1) + i
				s := simulate(seed, 0.3, p)
				if s.fault == "" {
					continue
				}
				if without := simulate(seed, 0.3, nil); without.fault != "" {
					t.Errorf("seed %d has a violation without the bug: %s", seed, without.fault)
				}
				t.Logf("seed %d: %s", seed, s.fault)
				return
			}
			t.Errorf("not found with %d seeds", plantedSeeds)
		})
	}
}
