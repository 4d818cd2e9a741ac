// placement.go: who is the best node for a service (design.md §8): the first of
// its nodes that can run it. It is a part of the core (monitor.go): pure.

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// preference lists the nodes that may claim a service, the best first. A voter
// that does not know the service's file goes by the list of members.
func (c *core) preference(name string) []string {
	s := c.services[name]
	if s == nil {
		return c.cluster.members
	}
	order := slices.Clone(s.spec.nodes)
	for _, node := range c.cluster.members {
		if !slices.Contains(order, node) {
			order = append(order, node)
		}
	}
	return order
}

// preferred tells whether a comes before b.
func (c *core) preferred(name, a, b string) bool {
	order := c.preference(name)
	return slices.Index(order, a) < slices.Index(order, b)
}

// obstacle tells why this node does not claim a service now, or gives its claim
// back; "" if nothing is in the way.
func (c *core) obstacle(s *monitored) string {
	name := s.spec.name
	if why := c.isolated(); why != "" {
		return why
	}
	if why := c.elsewhere(name); why != "" {
		return why
	}
	if !c.guard {
		return noGuard // and who can run it does not wait for this node
	}
	k := c.claimed[name]
	for _, p := range c.ordered() {
		if p.linked && p.claims[name] != 0 && (k == nil || c.preferred(name, p.name, c.node)) {
			return p.name + " has claimed it: it is about to run it, or still has it without its file (see its node.log)"
		}
	}
	switch {
	case k == nil && !c.clock.reached(s.again):
		c.wakeBy(s.again)
		return "no majority agreed on a node for it; tried again soon"
	case k != nil && k.split && c.clock.reached(k.begun.add(c.cluster.timeout)):
		s.again = c.clock.add(time.Duration(c.random() % uint64(c.cluster.timeout)))
		return "no majority agreed on this node within " + c.cluster.timeout.String()
	case k != nil && k.split:
		c.wakeBy(k.begun.add(c.cluster.timeout))
	}
	return ""
}

// isolated tells why this node can claim nothing.
func (c *core) isolated() string {
	n := len(c.cluster.members)
	switch seen := c.seen(); {
	case n > 1 && c.silent != "":
		return "this node does not take part in the cluster: " + c.silent
	case slices.Contains(c.cluster.witnesses, c.node):
		return "this node is a witness: it votes, and runs nothing"
	case n > 1 && !c.cluster.beating:
		return "no heartbeat is configured, so the nodes cannot agree who runs it; to have one on all nodes: nodemgr set --param hb#1.type --value unicast"
	case c.cluster.quorum && seen < c.majority():
		return fmt.Sprintf("no quorum: this node is linked with %d of %d voters, itself included", seen, n)
	case !c.cluster.quorum && !c.complete() && !c.clock.reached(c.born.add(c.cluster.rejoin)):
		c.wakeBy(c.born.add(c.cluster.rejoin))
		return "waits for its peers, " + c.cluster.rejoin.String() + " after the start at most"
	}
	return ""
}

// elsewhere names the node on which a service is up, or may be.
func (c *core) elsewhere(name string) string {
	for _, p := range c.ordered() {
		if at := p.data.instances[name]; at.runs() && c.alive(p) {
			return "it runs on " + p.name
		}
	}
	return ""
}

// runs tells whether something of an instance is up, or may be soon.
func (i instanceBrief) runs() bool {
	return i.avail == statusUp || i.avail == statusWarn || i.state == stateStarting || i.state == stateRestarting || i.state == stateStopping
}

// betterNode names a node that should claim before this one does, as long as it
// may still be about to.
func (c *core) betterNode(s *monitored) string {
	rank := 0
	for _, node := range s.spec.nodes {
		if node == c.node {
			break
		}
		p := c.peers[node]
		if p == nil || !c.eligible(p, s.spec.name) {
			continue
		}
		rank++ // each of them has had its time, should it not be able to
		if late := s.vacant.add(time.Duration(rank) * c.cluster.timeout); !c.clock.reached(late) {
			c.wakeBy(late)
			return node
		}
	}
	return ""
}

// eligible tells whether a peer can be expected to claim a service.
func (c *core) eligible(p *peer, name string) bool {
	at, has := p.data.instances[name]
	switch {
	case !p.linked || slices.Contains(c.cluster.witnesses, p.name):
		return false
	case c.cluster.quorum && c.hears(p) < c.majority():
		return false
	case !p.told:
		return true
	}
	return has && !p.data.frozen && !at.frozen && !at.state.failed()
}

// hears counts the voters that a peer says it is linked with.
func (c *core) hears(p *peer) (n int) {
	for i := range c.cluster.members {
		if p.heard&(1<<i) != 0 {
			n++
		}
	}
	return n
}

// other tells whether another node could take a service over now.
func (c *core) other(s *monitored) bool {
	return slices.ContainsFunc(s.spec.nodes, func(node string) bool {
		p := c.peers[node]
		return p != nil && c.eligible(p, s.spec.name)
	})
}

// waiting says what a claim waits for.
func (c *core) waiting(name string, k *claim) string {
	var missing []string
	for _, p := range c.ordered() {
		switch {
		case p.grants(k):
		case p.linked && p.list != c.cluster.list:
			missing = append(missing, p.name+" (whose cluster.nodes, cluster.witnesses or cluster.quorum differ from this node's)")
		default:
			missing = append(missing, p.name)
		}
	}
	if g := c.grants[name]; g != nil && g.Node != c.node {
		return fmt.Sprintf("waits for a majority of votes: %s had it last, and may still run it for up to %s", g.Node, g.Term)
	}
	if !c.grantedTo(name, c.node, c.epoch, k.number) {
		missing = append(missing, c.node)
	}
	return "waits for votes; there are none yet of " + strings.Join(missing, ", ")
}
