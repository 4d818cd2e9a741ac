package main

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// simNode is a machine: its clocks, its disk, its memory, what runs on it.
type simNode struct {
	s     *sim
	index int
	name  string

	up        bool
	boots     int // timers of an earlier boot are void
	suspended bool
	asleep    []func()
	holds     int // faults that keep the machine off

	// The clocks of this boot, and the wall clock.
	bootedAt, slept, sleptAt time.Duration
	rawAt, bootAt            time.Duration
	rawRate, bootRate        int64 // ppm
	wall                     time.Duration

	disk   simDisk
	run    simRun // of this boot
	copies []*simCopy
	guard  simGuard
	simDaemon

	// What a beat can have told, in true time: for the checker.
	heardFrom []time.Duration // the send of the newest beat that came from that node
	ackedBy   []time.Duration // the send of the newest own beat that that node had, when it sent what came here
}

// simDisk is what outlives the machine's crash, synced.
type simDisk struct {
	epoch     uint64
	votes     *votes
	lost      bool          // votes cannot be read
	forgot    time.Duration // when that was so last
	frozen    map[string]bool
	slow, bad int // faults
}

// simRun is OSVCRUN: it outlives the daemon.
type simRun struct {
	held     []string
	deadline leaseClock
	own      map[string]leaseClock
	intents  map[string]intent
}

// simCopy is the truth about an instance.
type simCopy struct {
	service *simService
	running []bool
	up      bool // any resource
	since   time.Duration
	downAt  time.Duration
	cmd     *simCommand // of the daemon, or what a dead daemon left

	byHand    bool
	exempt    time.Duration // until then it does not count
	stopping  bool          // by the guard
	failing   [5]int        // faults of the scripts
	settling  bool          // what an earlier daemon left is not ended yet
	stuck     bool          // a stop did not work
	unguarded bool
}

// The ways in which scripts misbehave.
const (
	startFails = iota
	startHangs
	startLies
	stopFails
	stopHangs
)

type simGuard struct {
	alive, paused bool
	token         int
	starting      bool
	told          bool // what the core knows
}

func newSimNode(s *sim, index int) *simNode {
	n := &simNode{s: s, index: index, name: fmt.Sprintf("n%d", index+1), heardFrom: make([]time.Duration, s.size), ackedBy: make([]time.Duration, s.size)}
	for i := range s.size {
		n.heardFrom[i], n.ackedBy[i] = -time.Hour, -time.Hour
	}
	n.disk.frozen, n.disk.forgot = map[string]bool{}, -time.Hour
	n.wall = s.upTo(time.Hour)
	return n
}

func (n *simNode) log(format string, args ...any) {
	if n.s.tracing() {
		n.s.log(n.name+" "+format, args...)
	}
}

// machine runs f after d of this boot; a suspended machine does it when it wakes.
func (n *simNode) machine(d time.Duration, f func()) {
	boot := n.boots
	n.s.after(d, func() { n.machineDo(boot, f) })
}

func (n *simNode) machineDo(boot int, f func()) {
	switch {
	case boot != n.boots || !n.up:
	case n.suspended:
		n.asleep = append(n.asleep, func() { n.machineDo(boot, f) })
	default:
		f()
	}
}

func scale(d time.Duration, ppm int64) time.Duration {
	return d + time.Duration(int64(d)/1_000_000*ppm)
}

func (n *simNode) clock() leaseClock {
	on := n.s.now - n.bootedAt
	slept := n.slept
	if n.suspended {
		slept += n.s.now - n.sleptAt
	}
	return leaseClock{n.rawAt + scale(on-slept, n.rawRate), n.bootAt + scale(on, n.bootRate)}
}

func (n *simNode) moment() moment {
	return moment{scriptStart.Add(n.wall + n.s.now), n.clock()}
}

// until is how long it takes until one of the clocks reaches the moment.
func (n *simNode) until(at leaseClock) time.Duration {
	now := n.clock()
	d := min(at.raw-now.raw, at.boot-now.boot)
	if d <= 0 {
		return 0
	}
	return d*700/1000 + 10*time.Microsecond // early, and looked at again
}

// boot turns the machine on.
func (n *simNode) boot() {
	if n.up || n.holds > 0 {
		return
	}
	s := n.s
	n.up, n.suspended, n.asleep = true, false, nil
	n.boots++
	n.bootedAt, n.slept = s.now, 0
	n.rawAt, n.bootAt = s.upTo(time.Hour), s.upTo(time.Hour)
	rate := func() int64 { return s.random.Int64N(2*s.drift+1) - s.drift }
	n.rawRate, n.bootRate = rate(), rate()
	if s.wild && s.chance(50) {
		// Each rule for clocks stands one that is wrong.
		*[]*int64{&n.rawRate, &n.bootRate}[s.random.IntN(2)] = s.random.Int64N(500_000) - 300_000
	}
	n.run = simRun{intents: map[string]intent{}}
	n.guard = simGuard{token: n.guard.token}
	n.log("boots")
	s.mix(1, uint64(n.index))
	n.machine(s.upTo(time.Second), n.daemonStart)
}

// crash turns it off at once.
func (n *simNode) crash(why string) {
	if !n.up {
		return
	}
	n.log("crashes: %s", why)
	n.s.mix(2, uint64(n.index))
	n.kill("the machine crashed")
	n.up, n.suspended, n.asleep = false, false, nil
	n.guard.alive = false
	for _, c := range n.copies {
		c.cmd, c.stopping = nil, false
		for i := range c.running {
			n.set(c, i, false)
		}
	}
}

func (n *simNode) suspend() {
	if n.up && !n.suspended {
		n.log("is suspended")
		n.suspended, n.sleptAt = true, n.s.now
	}
}

func (n *simNode) wake() {
	if !n.up || !n.suspended {
		return
	}
	n.slept += n.s.now - n.sleptAt
	n.suspended = false
	n.log("wakes")
	todo := n.asleep
	n.asleep = nil
	for _, f := range todo {
		f()
	}
	n.resumed()
	n.guardWatch()
	n.s.check.woke(n)
}

// set changes the truth about a resource.
func (n *simNode) set(c *simCopy, i int, running bool) {
	if c.running[i] == running {
		return
	}
	c.running[i] = running
	up := slices.Contains(c.running, true)
	n.s.mix(3, uint64(n.index)<<8|uint64(c.service.index)<<4|uint64(i)<<1|flagBit(running))
	if up == c.up {
		return
	}
	c.up = up
	if up {
		n.log("*** %s is up", c.service.name)
		c.since = n.s.now
		n.s.check.cameUp(n, c)
	} else {
		n.log("*** %s is down", c.service.name)
		c.downAt = n.s.now
		c.byHand, c.stuck = false, false
	}
}

func flagBit(b bool) uint64 {
	if b {
		return 1
	}
	return 0
}

// The guard.

func (g *simGuard) works() bool { return g.alive && !g.paused }

// guardRevive is what the daemon does about a dead guard.
func (n *simNode) guardRevive() {
	if n.guard.alive || n.guard.starting {
		return
	}
	n.guard.starting = true
	n.later(n.s.span(5*time.Millisecond, 300*time.Millisecond), func() {
		n.guard.alive, n.guard.paused, n.guard.starting = true, false, false
		n.log("has a guard")
		n.s.check.guarded(n)
		n.guardWatch()
		n.guardSays(true)
	})
}

// guardSays tells the core; from then on it counts.
func (n *simNode) guardSays(alive bool) {
	n.guard.told = alive
	n.step(guardEvent{alive})
}

func (n *simNode) guardKill() {
	if n.guard.alive {
		n.log("its guard is killed")
		n.guard.alive = false
		n.guard.starting = false
		n.s.check.unguarded(n)
		n.later(n.s.upTo(50*time.Millisecond), func() {
			if !n.guard.alive {
				n.guardSays(false)
				n.guardRevive()
			}
		})
	}
}

func (n *simNode) guardPause() {
	if n.guard.alive && !n.guard.paused {
		n.log("its guard is paused")
		n.guard.paused = true
		n.s.check.unguarded(n)
		n.later(n.s.timeout/2, func() {
			if n.guard.paused {
				n.guardSays(false)
			}
		})
	}
}

func (n *simNode) guardResume() {
	if n.guard.alive && n.guard.paused {
		n.log("its guard goes on")
		n.guard.paused = false
		n.s.check.guarded(n)
		n.guardWatch()
		n.later(0, func() { n.guardSays(true) })
	}
}

func (n *simNode) deadline(service string) leaseClock {
	if at, ok := n.run.own[service]; ok {
		return at
	}
	return n.run.deadline
}

// guardWatch does what the guard does: it waits for the deadlines, and acts.
func (n *simNode) guardWatch() {
	n.guard.token++
	if !n.guard.works() || n.suspended || !n.up || n.s.plant.is("no guard") {
		return
	}
	now := n.clock()
	next := time.Hour
	for _, name := range n.run.held {
		at := n.deadline(name)
		if !now.reached(at) {
			next = min(next, n.until(at))
			continue
		}
		next = min(next, 500*time.Millisecond)
		c := n.copyOf(name)
		if c == nil {
			continue
		}
		if last := at.add(n.s.grace * 5 / 6); n.s.reboots && c.up {
			if now.reached(last) {
				n.crash("quorum_action")
				n.machineBack(n.s.span(5*time.Second, time.Minute))
				return
			}
			next = min(next, n.until(last))
		}
		n.guardStop(c)
	}
	if next < time.Hour {
		token := n.guard.token
		n.machine(next, func() {
			if token == n.guard.token {
				n.guardWatch()
			}
		})
	}
}

func (n *simNode) machineBack(d time.Duration) { n.s.after(d, n.boot) }

func (n *simNode) copyOf(name string) *simCopy {
	for _, c := range n.copies {
		if c.service.name == name {
			return c
		}
	}
	return nil
}

// guardStop kills the start that runs, and stops what is up.
func (n *simNode) guardStop(c *simCopy) {
	if c.cmd != nil && c.cmd.order.Verb != verbStop {
		n.killCommand(c)
	}
	if c.stopping || !c.up {
		return
	}
	n.log("the guard stops %s", c.service.name)
	c.stopping = true
	n.guardStopNext(c, len(c.running)-1)
}

func (n *simNode) guardStopNext(c *simCopy, i int) {
	for i >= 0 && !c.running[i] {
		i--
	}
	if i < 0 {
		c.stopping = false
		return
	}
	d, works := n.stopTime(c)
	n.machine(d, func() {
		if !n.guard.works() {
			c.stopping = false
			return
		}
		if works {
			n.set(c, i, false)
			n.notice(c, i)
		}
		n.guardStopNext(c, i-1)
	})
}

// stopTime draws what comes of a stop script.
func (n *simNode) stopTime(c *simCopy) (d time.Duration, works bool) {
	s := n.s
	d = s.span(time.Millisecond, s.grace*35/100/time.Duration(len(c.running)))
	switch {
	case c.failing[stopHangs] > 0:
		c.stuck = true
		return 20 * time.Second, false
	case c.failing[stopFails] > 0:
		c.stuck = true
		return d, false
	}
	return d, true
}

// clone copies a journal.
func (v *votes) clone() *votes {
	if v == nil {
		return nil
	}
	return &votes{maps.Clone(v.Grants), v.Mute}
}
