// order.go: what people ask of the monitor: orders to instances and to the
// node, and the frozen flags that some of them need first. It is a part of the
// core (monitor.go).

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

type (
	// serviceOrder is set_service_monitor. Its texts are empty where nothing is
	// asked.
	serviceOrder struct {
		service      string
		localExpect  string
		globalExpect string
		rids         []string
		clear        bool // failed states, and with them the counts
		reset        bool // the counts alone
	}
	// nodeOrder is set_node_monitor.
	nodeOrder struct{ frozen bool }
	// endEvent is daemon_shutdown, or its end without success.
	endEvent struct{ ending bool }
)

// apply takes a person's order. Orders that cannot be taken change nothing.
func (e serviceOrder) apply(c *core) *monitored {
	s := c.services[e.service]
	if s == nil {
		return nil // the shell knows better, and has said so
	}
	if err := e.refused(c, s); err != nil {
		c.send(refuseEffect{err})
		return s
	}
	s.fault = ""
	if e.clear || e.reset {
		gaveUp := s.givenUp() != ""
		s.Restarts = nil
		if e.clear && s.state.failed() {
			c.enter(s, stateIdle, "")
		} else if e.clear {
			s.Failed, s.FailedWhy = "", "" // while its flag is written
		}
		if e.clear && gaveUp && s.down() && s.LocalExpect == expectStarted {
			s.LocalExpect = "" // as if it had never run: orchestrate begins anew
		}
	}
	switch e.localExpect {
	case expectStarted, expectStopped:
		if e.rids == nil {
			s.LocalExpect = e.localExpect
		}
		s.want(e.localExpect, e.rids)
	case "frozen", "thawed":
		s.Flag = e.localExpect
	case "unset":
		s.LocalExpect, s.Wanted = "", nil
	case "restarted":
		if e.rids == nil {
			s.LocalExpect = expectStarted
		}
		s.want("restarted", e.rids)
	}
	c.expectGlobally(s, e.globalExpect)
	c.save(s)
	return s
}

var localVerbs = map[string]verb{expectStarted: verbStart, expectStopped: verbStop, "restarted": verbRestart}

// want is a person's order for this instance. Resources join those that wait
// for the same; refused has seen to the rest.
func (s *monitored) want(expect string, rids []string) {
	if s.Wanted != nil && rids != nil {
		rids = slices.Compact(slices.Sorted(slices.Values(append(rids[:len(rids):len(rids)], s.Wanted.Rids...))))
	}
	s.Wanted = &order{Verb: localVerbs[expect], Rids: rids, ByHand: true}
}

// expectGlobally takes a global expect where this node is the only one.
func (c *core) expectGlobally(s *monitored, expect string) {
	// What is expected of the instance changes when the order is carried out.
	switch expect {
	case "":
		return
	case "started":
		s.Flag, s.Wanted = "thawed", &order{Verb: verbStart, ByHand: true}
	case "stopped", "shutdown":
		s.Flag, s.Wanted = "frozen", &order{Verb: verbStop, ByHand: true}
	case "restarted":
		s.Wanted = &order{Verb: verbRestart, ByHand: true}
	case "frozen", "thawed":
		s.Flag = expect
	case "aborted", "unset":
		s.Flag, s.Wanted, expect = "", nil, ""
	}
	s.GlobalExpect = expect
}

// refused tells why an order cannot be taken, and what to do first.
func (e serviceOrder) refused(c *core, s *monitored) error {
	name := s.spec.name
	starts := e.localExpect == expectStarted || e.localExpect == "restarted" || e.globalExpect == "started" || e.globalExpect == "restarted"
	for _, rid := range e.rids {
		switch r := s.spec.resource(rid); {
		case r == nil:
			var known []string
			for _, r := range s.spec.resources {
				known = append(known, r.rid)
			}
			return fmt.Errorf("%s has no resource %q; it has %s", name, rid, strings.Join(known, ", "))
		case r.disable:
			return fmt.Errorf("%s: %s is disabled; to use it: svcmgr -s %s unset --param %s.disable", name, rid, name, rid)
		}
	}
	switch w := s.Wanted; {
	case e.rids != nil && w != nil && (w.Rids == nil || w.Verb != localVerbs[e.localExpect]):
		return fmt.Errorf("%s has another order to carry out first, to %s; order this one again afterwards, or withdraw that: svcmgr -s %s abort", name, w.Verb, name)
	case starts && s.Failed != "" && !e.clear:
		return fmt.Errorf("%s is in state %q (%s); mend that, then: svcmgr -s %s clear", name, s.Failed, s.FailedWhy, name)
	case starts && c.ending:
		return fmt.Errorf("%s is not started: the daemon shuts down", name)
	case e.globalExpect != "" && e.globalExpect != "aborted" && len(s.spec.nodes) > 1:
		return fmt.Errorf("%s may run on %s, and orders to several nodes are not part of this version; order each by itself, with --local or --node", name, strings.Join(s.spec.nodes, " "))
	}
	return nil
}

// begin does a person's order, unless there is nothing to do.
func (c *core) begin(s *monitored, o order, avail status) {
	if o.Verb == verbStop && o.Rids != nil {
		for _, rid := range o.Rids {
			s.setRestarts(rid, func(r *restarts) { r.GaveUp = "stopped by hand" })
		}
	} else {
		// A start by hand begins a new life: old restarts do not count.
		for _, r := range s.spec.resources {
			if o.Rids == nil || slices.Contains(o.Rids, r.rid) {
				delete(s.Restarts, r.rid)
			}
		}
	}
	if o.Verb == verbStop && o.Rids == nil && s.LocalExpect == expectStarted {
		s.LocalExpect = "" // not before, since a flag that is not written takes the order back
	}
	_, overall := s.status()
	switch {
	case o.Verb == verbStart && o.Rids == nil && avail == statusUp && overall == statusUp, o.Verb == verbStop && o.Rids == nil && s.down() && !s.state.failed():
		c.because(s, "")
		c.save(s)
	default:
		c.act(s, o, "")
	}
}

// reached ends a global expect that has come true, or never will: in a failed
// state nothing is done by itself.
func (c *core) reached(s *monitored) {
	if s.GlobalExpect == "" || s.acting != nil || s.Wanted != nil || s.Flag != "" {
		return
	}
	avail, _ := s.status()
	if up := s.GlobalExpect == "started" || s.GlobalExpect == "restarted"; !up || avail == statusUp || avail == statusNA || s.state.failed() {
		s.GlobalExpect = ""
		c.save(s)
	}
}

// flag begins the write of the frozen flag.
func (c *core) flag(s *monitored) {
	c.enter(s, monitorState(flagState(s.Flag == "frozen", true)), "")
	c.send(flagEffect{s.spec.name, s.Flag == "frozen"})
}

func (e flagEvent) apply(c *core) *monitored {
	if e.service == "" {
		c.state = stateIdle
		why := ""
		if e.err == nil {
			c.frozen = e.frozen
		} else {
			c.wanted, why = "", e.err.Error()
		}
		c.send(transitionEffect{"", flagState(e.frozen, true), string(stateIdle), why})
		c.flagNode()
		return nil
	}
	s := c.services[e.service]
	if s == nil {
		return nil
	}
	why := s.FailedWhy
	s.fault = ""
	if e.err != nil {
		s.fault = e.err.Error()
		if s.Wanted != nil && (!s.Wanted.ByHand || s.GlobalExpect != "frozen" && s.GlobalExpect != "thawed" && s.GlobalExpect != "") {
			s.Wanted = nil // it was to follow, and relied on the flag
		}
		s.Flag, s.GlobalExpect = "", ""
		if s.Failed != "" { // that reason is the one to keep
			c.send(transitionEffect{s.spec.name, string(s.state), string(s.state), e.err.Error()})
		} else {
			why = e.err.Error()
		}
	} else if s.frozen = e.frozen; s.Flag == flagState(e.frozen, false) {
		s.Flag = ""
	}
	c.enter(s, cmp.Or(s.Failed, stateIdle), why)
	return s
}

// flagState names the flag, or the way to it.
func flagState(frozen, changing bool) string {
	switch {
	case frozen && changing:
		return string(stateFreezing)
	case changing:
		return string(stateThawing)
	case frozen:
		return "frozen"
	}
	return "thawed"
}

func (e nodeOrder) apply(c *core) *monitored {
	c.wanted = flagState(e.frozen, false)
	c.flagNode()
	return nil
}

// isFrozen tells whether the node is, or shall be, which counts at once.
func (c *core) isFrozen() bool { return c.frozen || c.wanted == "frozen" }

// flagNode begins the write of the node's flag, unless one goes on: the order
// that came last is carried out after it.
func (c *core) flagNode() {
	switch frozen := c.wanted == "frozen"; {
	case c.state != stateIdle:
	case c.wanted == "" || frozen == c.frozen:
		c.wanted = ""
	default:
		c.state = monitorState(flagState(frozen, true))
		c.send(transitionEffect{"", string(stateIdle), string(c.state), ""})
		c.send(flagEffect{"", frozen})
	}
}

func (e endEvent) apply(c *core) *monitored {
	c.ending = e.ending
	for _, s := range c.services {
		s.ended = false
	}
	return nil
}
