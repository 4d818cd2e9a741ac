// lease.go: what an instance of a failover service may do (design.md §8): it
// starts with a lease, stops without one, and gives its claim back once it was
// seen down. How leases come about is in claim.go. It is a part of the core
// (monitor.go): pure.

package main

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// leaseClock is a reading of the two clocks of this boot that leases are
// measured by. They are never compared with those of another machine.
type leaseClock struct {
	raw  time.Duration // CLOCK_MONOTONIC_RAW
	boot time.Duration // CLOCK_BOOTTIME
}

func (t leaseClock) add(d time.Duration) leaseClock { return leaseClock{t.raw + d, t.boot + d} }

// reached tells whether the moment has come by one of the clocks: so holders
// and guards measure.
func (t leaseClock) reached(moment leaseClock) bool {
	return t.raw >= moment.raw || t.boot >= moment.boot
}

// surely tells whether the moment has come by both: so voters measure.
func (t leaseClock) surely(moment leaseClock) bool {
	return t.raw >= moment.raw && t.boot >= moment.boot
}

// compare orders moments of one boot: both clocks of it go forward together.
func (t leaseClock) compare(other leaseClock) int {
	return cmp.Or(cmp.Compare(t.raw, other.raw), cmp.Compare(t.boot, other.boot))
}

func (t leaseClock) before(other leaseClock) bool { return t.compare(other) < 0 }
func (t leaseClock) after(other leaseClock) bool  { return t.compare(other) > 0 }

// latest is not reached by either clock before both moments are.
func (t leaseClock) latest(other leaseClock) leaseClock {
	return leaseClock{max(t.raw, other.raw), max(t.boot, other.boot)}
}

// moment is the time of a step. wall is for people and for delays that matter
// to this node alone; clock is for leases.
type moment struct {
	wall  time.Time
	clock leaseClock
}

// clusterSpec is what the core knows of the cluster's configuration.
type clusterSpec struct {
	members   []string // in the order of the list
	witnesses []string
	list      uint32 // the version of the list
	quorum    bool
	timeout   time.Duration // the largest hb#N.timeout
	grace     time.Duration // cluster.quorum_grace
	rejoin    time.Duration // node.rejoin_grace_period
	longest   time.Duration // the longest term that any node may have stated
	beating   bool          // there is a heartbeat
}

// birth is what a core begins with.
type birth struct {
	node    string
	epoch   uint64 // stored and synced already
	salt    uint64 // random
	seed    uint64 // random: of waits
	frozen  bool
	now     moment
	cluster clusterSpec
	votes   *votes // nil: there never were any
	// lost: there were votes, and they cannot be read.
	lost bool
	// held are the instances that the guard has to stop, and when, in this boot.
	held map[string]leaseClock
	// silent is why this node must not speak to the cluster; "": it may.
	silent string
}

// votes is the voter's journal.
type votes struct {
	Grants map[string]grant `json:"grants"` // by service
	// Mute is for how long no vote may be given, counted from the start.
	Mute time.Duration `json:"mute,omitempty"`
}

// grant is a voter's promise to one claim.
type grant struct {
	Node  string        `json:"node"`
	Epoch uint64        `json:"epoch"`
	Claim uint32        `json:"claim"`
	Term  time.Duration `json:"term"` // as it was stated
}

// peerData is what the core knows of a peer's data.
type peerData struct {
	frozen    bool
	instances map[string]instanceBrief
}

// instanceBrief is what a node says of its instance.
type instanceBrief struct {
	avail  status
	state  monitorState
	frozen bool
}

type (
	// clusterEvent: the configuration of the cluster is another.
	clusterEvent struct{ spec clusterSpec }
	// beatDue: it is time for the beats of one heartbeat.
	beatDue struct{ heartbeat string }
	// beatEvent: a beat came. It opened, so a member that knows the secret sent
	// it, at some time.
	beatEvent struct {
		from string
		beat beat
	}
	// dataDue: this node's data changed: peers shall hear of it at once.
	dataDue struct{}
	// peerEvent: the data of a peer, as it is known now.
	peerEvent struct {
		node string
		data peerData
	}
	// votesKept: the journal was written up to version, or not.
	votesKept struct {
		version uint64
		err     error
	}
	// guardEvent: the guard lives, or not.
	guardEvent struct{ alive bool }
)

type (
	// beatEffect: send a beat to a peer; heartbeat "" means by all of them.
	// The shell fills in its data.
	beatEffect struct {
		to, heartbeat string
		beat          beat
	}
	// acceptEffect: the beat of this step counts: its link is good, and it is
	// the newest. Its data may be taken.
	acceptEffect struct{ from string }
	// linkEffect is for the log.
	linkEffect struct{ peer, state string }
	// votesEffect: keep the journal, then tell votesKept.
	votesEffect struct {
		version uint64
		votes   votes
	}
	// guardEffect: what the guard has to stop at the deadline; own are the
	// instances that have another one. It is in force before what follows it in
	// the same step is done.
	guardEffect struct {
		held     []string // sorted
		deadline leaseClock
		own      map[string]leaseClock
	}
	// anewEffect: this daemon must begin anew, with an epoch above this one,
	// and give no votes for a term.
	anewEffect struct {
		epoch uint64
		why   string
	}
	// scannedEvent: all service files were read for the first time.
	scannedEvent struct{}
)

// newCore begins with what an earlier daemon left. Its first beat claims all
// that the guard or the journal say it held, and only then does it look what
// runs: a voter frees what a beat does not claim any more.
func newCore(b birth) *core {
	c := &core{
		node: b.node, frozen: b.frozen, state: stateIdle, services: map[string]*monitored{},
		epoch: b.epoch, salt: b.salt, seed: b.seed, now: b.now.wall, clock: b.now.clock, born: b.now.clock, silent: b.silent,
		claimed: map[string]*claim{}, gone: map[string]uint32{}, grants: map[string]*promise{},
	}
	clusterEvent{b.cluster}.apply(c)
	held := map[string]bool{}
	for name := range b.held {
		held[name] = true
	}
	if b.votes != nil {
		c.mute = b.votes.Mute
		for name, g := range b.votes.Grants {
			c.grants[name] = &promise{g, c.clock.add(g.Term), 0}
			held[name] = held[name] || g.Node == c.node
		}
	} else if b.lost {
		c.mute = b.cluster.longest
		c.touch()
	}
	c.muteEnd = c.clock.add(c.mute)
	for _, name := range slices.Sorted(maps.Keys(held)) {
		k := c.demand(name)
		k.until, k.found = b.held[name]
		if !k.found { // no daemon of this boot ran it
			k.until, k.found, k.restored = c.clock.add(c.cluster.timeout), true, true
		}
		if g := c.grants[name]; g != nil && g.Node == c.node {
			g.Epoch, g.Claim, g.version = c.epoch, k.number, c.touch()
		}
		k.overdue = c.clock.reached(k.until)
	}
	return c
}

// apply gives back what the journal alone spoke of and no file speaks of.
func (scannedEvent) apply(c *core) *monitored {
	for _, name := range slices.Sorted(maps.Keys(c.claimed)) {
		if c.claimed[name].restored && c.services[name] == nil {
			c.giveBack(name)
		}
	}
	return nil
}

func (e guardEvent) apply(c *core) *monitored {
	c.guard = e.alive
	return nil
}

// foundUp claims an instance that was found up: it was started by hand, or late.
// It has `timeout` to find a majority in.
func (c *core) foundUp(s *monitored) {
	k := c.claimed[s.spec.name]
	if k != nil && k.restored && s.anyUp() {
		k.restored = false // now the guard has to know of it
	}
	if !c.leases(s) || s.down() || k != nil && (k.won || k.found) || k == nil && !s.anyUp() {
		return
	}
	if k == nil {
		k = c.demand(s.spec.name)
	}
	k.until, k.found = c.clock.add(c.cluster.timeout), true
	c.wakeBy(k.until)
}

// guardStopped begins anew with an instance that the guard stopped: its program
// did not crash, so that no restart is used up.
func (c *core) guardStopped(s *monitored) {
	k := c.claimed[s.spec.name]
	if k == nil || !k.overdue {
		return
	}
	if k.overdue = false; s.LocalExpect == expectStarted && !s.allUp() {
		s.LocalExpect = ""
		c.save(s)
	}
}

func (s *monitored) allUp() bool {
	avail, _ := s.status()
	return avail == statusUp
}

// anyUp tells whether a resource is surely up.
func (s *monitored) anyUp() bool {
	return slices.ContainsFunc(s.spec.resources, func(r *resource) bool {
		return !r.disable && s.resources[r.rid].status == statusUp
	})
}

// mustStop tells whether the instance has to be stopped, or may run, and has no
// right to. Nothing comes before this: no frozen flag, no failed state, and not
// whether it was looked at yet.
func (c *core) mustStop(s *monitored) bool {
	k := c.claimed[s.spec.name]
	if k == nil || !k.won && !k.found || s.down() && s.acting == nil {
		return false
	}
	if c.yields(s, k) || !k.won && !k.restored && s.probed && c.hopeless(s.spec.name, k) {
		k.won, k.found, k.until = false, true, c.clock // its right ends here
	}
	return !c.right(s.spec.name, k)
}

// yields tells whether two copies see each other and this one is the less
// preferred. With quorum on, leases decide that.
func (c *core) yields(s *monitored, k *claim) bool {
	name := s.spec.name
	return !c.cluster.quorum && slices.ContainsFunc(c.ordered(), func(p *peer) bool {
		return p.linked && p.claims[name] != 0 && p.data.instances[name].runs() && c.preferred(name, p.name, c.node)
	})
}

// surrender stops an instance that has lost its right.
func (c *core) surrender(s *monitored) {
	why := "no right to run any more: a majority of votes did not come within " + c.cluster.timeout.String()
	if !c.cluster.quorum {
		why = "no right to run: it runs on a preferred node, or not all nodes agree"
	}
	if s.Wanted != nil && s.Wanted.Verb != verbStop {
		s.Wanted = nil
	}
	s.LocalExpect = ""
	again := s.changed.Add(stopPause)
	switch {
	case s.acting != nil:
		c.cancel(s)
	case s.state == stateStopFailed && again.After(c.now):
		c.send(wakeEffect{again})
	default:
		// A program that does not care about its SIGTERM must not outlive the grace.
		c.act(s, order{Verb: verbStop, Within: c.cluster.grace / 2}, why)
	}
}

// mayStart tells whether the instance may be started now. It claims the service
// where nothing is in the way, and says what is, or what it waits for.
func (c *core) mayStart(s *monitored, byHand bool) bool {
	name := s.spec.name
	k := c.claimed[name]
	if c.leased(s) {
		s.wants = true
		return true
	}
	why := c.obstacle(s)
	if byHand {
		why = c.handObstacle(s)
	}
	if why == "" && k == nil && !byHand {
		if s.vacant == (leaseClock{}) {
			s.vacant = c.clock
		}
		if better := c.betterNode(s); better != "" {
			why = better + " should run it, and is asked first"
		}
	} else if why != "" {
		s.vacant = leaseClock{}
	}
	switch {
	case why != "" && byHand:
		s.Wanted = nil
		if s.LocalExpect == expectStarted && s.down() {
			s.LocalExpect = "" // else it would count as a program that died, and keep its claim
		}
		c.enter(s, stateIdle, "not started: "+why)
		return false
	case c.elsewhere(name) != "":
		c.because(s, "") // as it should be
		return false
	case why != "":
		c.because(s, "not started by itself: "+why)
		return false
	case k == nil:
		k = c.demand(name)
	}
	s.wants = true
	if s.state != stateReady {
		c.enter(s, stateReady, "")
	}
	if c.leased(s) {
		return true
	}
	c.because(s, c.lacks(name, k))
	return false
}

// leased tells whether something of the instance may be started.
func (c *core) leased(s *monitored) bool {
	k := c.claimed[s.spec.name]
	return !c.leases(s) || k != nil && c.win(s.spec.name, k) && c.guard
}

// lacks says what a claim has not got.
func (c *core) lacks(name string, k *claim) string {
	switch {
	case k == nil:
		return "this node has not claimed it"
	case !c.win(name, k):
		return c.waiting(name, k)
	}
	return noGuard
}

const noGuard = "the guard does not run, which would stop it if the daemon cannot; node.log says why"

// handObstacle tells why a person's order to start cannot be carried out.
func (c *core) handObstacle(s *monitored) string {
	name := s.spec.name
	k := c.claimed[name]
	if why := cmp.Or(c.isolated(), c.elsewhere(name)); why != "" {
		return why
	}
	late := leaseClock{}
	if k != nil {
		late = k.made.add(c.term()) // a node that died may have had it until then
	}
	switch {
	case k == nil || c.leased(s):
	case c.clock.reached(late):
		return c.lacks(name, k)
	default:
		c.wakeBy(late)
	}
	return ""
}

// settleClaim gives a claim back when the instance was seen down, nothing is
// done to it, and it is not to run.
func (c *core) settleClaim(s *monitored) {
	name := s.spec.name
	k := c.claimed[name]
	if !c.leases(s) || s.acting != nil || !s.probed || !s.down() || s.wants {
		return
	}
	if s.LocalExpect == expectStarted {
		if k != nil && c.right(name, k) {
			return // its program died: that frees nothing
		}
		s.LocalExpect = "" // as if it had never run: it may run elsewhere now
		c.save(s)
	}
	if s.Wanted != nil && s.Wanted.Verb != verbStop {
		return
	}
	c.giveBack(name)
	if s.state == stateReady {
		c.enter(s, stateIdle, s.why)
	}
}

// wakeBy asks for a step once the moment has come.
func (c *core) wakeBy(moment leaseClock) {
	if c.soonest == (leaseClock{}) || moment.before(c.soonest) {
		c.soonest = moment
	}
}

// wake asks for the step that wakeBy wants, unless one comes before.
func (c *core) wake() {
	if c.soonest == (leaseClock{}) {
		return
	}
	// A moment that must have come by both clocks may not have by the other: no
	// step after the other until then.
	at := c.now.Add(max(wakePause, c.soonest.raw-c.clock.raw))
	if c.alarm.After(c.now) && !at.Before(c.alarm) {
		return
	}
	c.alarm = at
	c.send(wakeEffect{at})
}

// random is splitmix64: the core's own, so that the same events have the same
// effects.
func (c *core) random() uint64 {
	c.seed += 0x9e3779b97f4a7c15
	z := c.seed
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}
