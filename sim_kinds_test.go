package main

import "time"

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
		n := s.holder()
		if n == nil {
			return nil
		}
		return s.cut(func(i, j int) bool { return i == n.index || j == n.index })
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
		n.forget()
		return nothing
	}},
	{"bridge that forgets", between(func(s *sim) func() {
		// The holder keeps only just a majority; then one of that forgets.
		holder := s.holder()
		if holder == nil || s.size < 3 {
			return nil
		}
		side := make([]bool, s.size)
		side[holder.index] = true
		n := holder
		for range s.majority() - 1 {
			for side[n.index] {
				n = s.anyNode()
			}
			side[n.index] = true
		}
		mend := s.cut(func(i, j int) bool { return i == holder.index && !side[j] || j == holder.index && !side[i] })
		on := true
		s.after(2*s.term(), func() {
			if on && n.disk.votes != nil {
				n.restart()
				n.forget()
			}
		})
		s.after(4*s.term(), func() {
			if on {
				on = false
				mend()
			}
		})
		return func() {
			if s.faults.healing && on {
				on = false
				mend()
			}
		}
	})},
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
