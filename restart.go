// restart.go: what is down in an instance that shall be up is restarted, so
// often and no more (design.md §8, Restart). It is a part of the core
// (monitor.go): pure.

package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// restartsForgotten is how long a resource is up until its earlier restarts
// do not count any more.
const restartsForgotten = 5 * time.Minute

// recover restarts what is down in an instance that shall be up: one resource
// at a time, in the file's order, so that one that fails takes no other down.
func (c *core) recover(s *monitored) {
	var next, spent *resource
	waiting := ""
	for _, r := range s.spec.resources {
		m, had := s.resources[r.rid], s.Restarts[r.rid]
		if r.disable || m.status != statusDown || had.GaveUp != "" {
			continue
		}
		if c.isFrozen() || s.frozen {
			c.because(s, fmt.Sprintf("%s is down, and frozen services are not restarted; to have it restarted: %s", r.rid, c.thaw(s)))
			return
		}
		if had.Count >= r.restart {
			s.setRestarts(r.rid, func(n *restarts) {
				n.GaveUp = fmt.Sprintf("restarts used up: %d of %d", had.Count, r.restart)
			})
			c.save(s)
			if r.monitor && !m.added && spent == nil {
				spent = r
			}
			continue
		}
		if due := had.Last.Add(r.restartDelay); had.Count > 0 && due.After(c.now) {
			c.send(wakeEffect{due})
			waiting = fmt.Sprintf("%s is down, and restarted %s after the last time (%d of %d)", r.rid, r.restartDelay, had.Count, r.restart)
		} else {
			next = r
		}
		break // what comes later may need it
	}
	switch {
	case spent != nil && c.monitorAction(s, spent):
	case next != nil && !c.leased(s):
		c.because(s, next.rid+" is down; "+c.lacks(s.spec.name, c.claimed[s.spec.name]))
	case next != nil:
		s.setRestarts(next.rid, func(n *restarts) { n.Count, n.Last = n.Count+1, c.now })
		c.act(s, order{Verb: verbRestart, Rids: []string{next.rid}}, next.rid+" is down: "+s.resources[next.rid].note)
	case waiting != "":
		c.because(s, waiting)
	default:
		c.because(s, s.givenUp())
	}
}

// givenUp names what is left down.
func (s *monitored) givenUp() string {
	var left []string
	for _, r := range s.spec.resources {
		if had := s.Restarts[r.rid]; had.GaveUp != "" && s.resources[r.rid].status == statusDown {
			left = append(left, fmt.Sprintf("%s is down (%s)", r.rid, had.GaveUp))
		}
	}
	if left == nil {
		return ""
	}
	return strings.Join(left, ", ") + "; to try again: svcmgr -s " + s.spec.name + " start --local"
}

// thaw is what lets the instance be restarted by itself.
func (c *core) thaw(s *monitored) string {
	if c.isFrozen() {
		return "nodemgr thaw --local"
	}
	return "svcmgr -s " + s.spec.name + " thaw --local"
}

func (s *monitored) setRestarts(rid string, change func(*restarts)) {
	if s.Restarts == nil {
		s.Restarts = map[string]restarts{}
	}
	n := s.Restarts[rid]
	change(&n)
	s.Restarts[rid] = n
}

// monitorAction is done when a monitored resource has used up its restarts.
// It tells whether anything was done.
func (c *core) monitorAction(s *monitored, r *resource) bool {
	switch s.spec.monitorAction {
	case "freezestop":
		c.send(transitionEffect{s.spec.name, string(s.state), string(s.state), "monitor_action freezestop: " + r.rid + " stays down"})
		s.Flag, s.Wanted = "frozen", &order{Verb: verbStop}
		c.flag(s)
		return true
	case "switch":
		if s.spec.orchestrate == "ha" && s.failover() && c.other(s) { // else nobody would start it there
			s.away = r.rid + " used up its restarts here, so another node shall run it; when that is mended: svcmgr -s " + s.spec.name + " clear"
			s.LocalExpect = ""
			c.act(s, order{Verb: verbStop}, "monitor_action switch: "+r.rid+" stays down")
			return true
		}
		c.send(transitionEffect{s.spec.name, string(s.state), string(s.state), "monitor_action switch: " + r.rid + " stays down, and there is no other node that could take over"})
	}
	return false
}

// forget drops the count of a resource that was up for long. The time of an
// action does not count: it may be up only for as long as its start waits.
func (c *core) forget(s *monitored, rid string, since time.Time) {
	had := s.Restarts[rid]
	if had.Last.After(since) {
		since = had.Last
	}
	acting := s.acting != nil && (s.acting.Rids == nil || slices.Contains(s.acting.Rids, rid))
	if had.Count > 0 && !acting && c.now.Sub(since) >= restartsForgotten {
		delete(s.Restarts, rid)
		c.save(s)
	}
}
