package main

import (
	"errors"
	"slices"
	"time"
)

// act carries out an order.
func (n *simNode) act(f actEffect) {
	c := n.copyOf(f.service)
	if n.s.tracing() {
		n.log("    act %s %s", f.service, orderText(f.order))
	}
	n.s.mix(7, uint64(n.index)<<8|uint64(len(f.order.Verb))<<4|uint64(c.service.index))
	if c.cmd != nil {
		n.s.fail("%s: two actions on %s at once: %v and %v", n.name, f.service, c.cmd.order, f.order)
		return
	}
	c.cmd = &simCommand{order: f.order, gen: n.gen, began: make([]bool, len(c.running))}
	cmd := c.cmd
	if f.order.Verb != verbStop {
		n.s.check.began(n, c)
	}
	if !c.settling {
		n.carryOut(c, cmd)
	}
}

func (n *simNode) carryOut(c *simCopy, cmd *simCommand) {
	if cmd.order.Verb == verbStart {
		n.later(0, func() { n.startNext(c, cmd, 0) })
		return
	}
	n.later(0, func() {
		n.stopNext(c, cmd, len(c.running)-1, nil, func(err error) {
			switch {
			case err != nil || cmd.order.Verb == verbStop:
				n.done(c, cmd, verbStop, err)
			case cmd.killed:
				n.done(c, cmd, verbStart, errors.New("cancelled"))
			default:
				n.startNext(c, cmd, 0)
			}
		})
	})
}

func (c *simCopy) selected(cmd *simCommand, i int) bool {
	return cmd.order.Rids == nil || slices.Contains(cmd.order.Rids, c.service.rids[i])
}

func (n *simNode) done(c *simCopy, cmd *simCommand, part verb, err error) {
	if c.cmd == cmd {
		c.cmd = nil
		n.step(doneEvent{c.service.name, part, err})
	}
}

func (n *simNode) see(c *simCopy, i int) {
	is := statusDown
	if c.running[i] {
		is = statusUp
	}
	n.step(statusEvent{c.service.name, c.service.rids[i], is, "seen"})
}

func (n *simNode) startNext(c *simCopy, cmd *simCommand, i int) {
	if c.cmd != cmd {
		return
	}
	if cmd.killed {
		n.rollBack(c, cmd)
		return
	}
	for i < len(c.running) && (c.running[i] || !c.selected(cmd, i)) {
		i++
	}
	if i == len(c.running) {
		n.done(c, cmd, verbStart, nil)
		return
	}
	s := n.s
	d := s.span(time.Millisecond, c.service.starts/time.Duration(len(c.running)))
	fails, lies := c.failing[startFails] > 0 && s.chance(80), c.failing[startLies] > 0 && s.chance(80)
	if c.failing[startHangs] > 0 && s.chance(80) {
		d, fails = 30*time.Second, true
	}
	cmd.began[i] = true
	cmd.token++
	token := cmd.token
	if !fails || s.chance(50) {
		n.set(c, i, true)
	}
	n.later(d, func() {
		switch {
		case c.cmd != cmd || token != cmd.token:
		case cmd.killed || fails:
			n.rollBack(c, cmd)
		default:
			if lies {
				n.machine(s.upTo(5*time.Second), func() { n.die(c, i) })
			}
			n.see(c, i)
			n.startNext(c, cmd, i+1)
		}
	})
}

// die ends a program by itself.
func (n *simNode) die(c *simCopy, i int) {
	if c.running[i] {
		n.set(c, i, false)
		n.notice(c, i)
	}
}

// notice: a daemon may see at once that a program ended, or at the next check.
func (n *simNode) notice(c *simCopy, i int) {
	if n.s.chance(60) {
		n.later(n.s.upTo(20*time.Millisecond), func() {
			if c.cmd == nil {
				n.see(c, i)
			}
		})
	}
}

// killCommand ends a start that runs; what it began is stopped.
func (n *simNode) killCommand(c *simCopy) {
	cmd := c.cmd
	if cmd == nil || cmd.killed || cmd.order.Verb == verbStop {
		return
	}
	cmd.killed = true
	cmd.token++
	n.later(n.s.upTo(5*time.Millisecond), func() {
		if c.cmd == cmd && slices.Contains(cmd.began, true) {
			n.rollBack(c, cmd)
		} else if c.cmd == cmd && cmd.order.Verb == verbStart {
			n.done(c, cmd, verbStart, errors.New("killed"))
		}
	})
}

func (n *simNode) rollBack(c *simCopy, cmd *simCommand) {
	cmd.token++
	began := cmd.began
	cmd.began = make([]bool, len(began))
	n.stopNext(c, cmd, len(c.running)-1, began, func(err error) {
		if err != nil {
			n.done(c, cmd, verbStop, err)
			return
		}
		n.done(c, cmd, verbStart, errors.New("it does not start"))
	})
}

// stopNext stops resources from i downwards: those in only, or selected.
func (n *simNode) stopNext(c *simCopy, cmd *simCommand, i int, only []bool, then func(error)) {
	if c.cmd != cmd {
		return
	}
	if i < 0 {
		then(nil)
		return
	}
	if only != nil && !only[i] || only == nil && !c.selected(cmd, i) {
		n.stopNext(c, cmd, i-1, only, then)
		return
	}
	if !c.running[i] {
		n.see(c, i)
		n.stopNext(c, cmd, i-1, only, then)
		return
	}
	d, works := n.stopTime(c)
	n.later(d, func() {
		if c.cmd != cmd {
			return
		}
		if !works && c.running[i] {
			n.see(c, i)
			then(errors.New("it does not stop"))
			return
		}
		n.set(c, i, false)
		n.see(c, i)
		n.stopNext(c, cmd, i-1, only, then)
	})
}

// settle ends what an earlier daemon left half done; orders wait for it, and
// only then does it look what runs.
func (n *simNode) settle(c *simCopy, left *simCommand) {
	if left == nil || left.order.Verb == verbStop {
		n.later(n.s.span(time.Millisecond, 200*time.Millisecond), func() { n.settled(c) })
		return
	}
	n.later(n.s.upTo(20*time.Millisecond), func() { n.stopQuietly(c, left, len(c.running)-1) })
}

func (n *simNode) stopQuietly(c *simCopy, left *simCommand, i int) {
	for i >= 0 && (!c.running[i] || !c.selected(left, i)) {
		i--
	}
	if i < 0 {
		n.settled(c)
		return
	}
	d, works := n.stopTime(c)
	n.later(d, func() {
		if !works {
			n.step(failedEvent{c.service.name, "it does not stop"})
			n.settled(c)
			return
		}
		n.set(c, i, false)
		n.stopQuietly(c, left, i-1)
	})
}

func (n *simNode) settled(c *simCopy) {
	c.settling = false
	if c.cmd != nil {
		n.carryOut(c, c.cmd)
	}
	n.watch(c)
}

// watch looks at the resources, again and again.
func (n *simNode) watch(c *simCopy) {
	if c.cmd == nil {
		for i := range c.running {
			n.see(c, i)
		}
	}
	n.later(n.s.recheck*95/100+n.s.upTo(n.s.recheck/10), func() { n.watch(c) })
}
