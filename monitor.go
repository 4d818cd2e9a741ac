// monitor.go: the decisions. The core is a state machine behind one door,
// step(now, event) → effects: no clock, network, file, lock, goroutine or log,
// and no map order that shows in an effect, so that the same events give the
// same effects, always (layout_test.go). The shell (shell.go) feeds it what
// happens and does what it says.
//
// The state of an instance, as the service monitor shows it:
//
//	        order, or orchestrate        ok
//	idle ──────────▶ starting, stopping, restarting ──▶ idle
//	 ▲                        │ not ok
//	 │         clear          ▼
//	 └──────────── start failed, stop failed     (nothing is done by itself)
//
// Freezing and thawing are the writes of the flag, on the way to another state.

package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"
)

// monitorState is the status of a service monitor or of the node monitor.
type monitorState string

const (
	stateIdle        monitorState = "idle"
	stateReady       monitorState = "ready" // it claims the service, and waits for votes
	stateStarting    monitorState = "starting"
	stateStartFailed monitorState = "start failed"
	stateStopping    monitorState = "stopping"
	stateStopFailed  monitorState = "stop failed"
	stateRestarting  monitorState = "restarting"
	stateFreezing    monitorState = "freezing"
	stateThawing     monitorState = "thawing"
)

func (s monitorState) failed() bool { return s == stateStartFailed || s == stateStopFailed }

// verb is what is done to an instance or to some of its resources.
type verb string

const (
	verbStart   verb = "start"
	verbStop    verb = "stop"
	verbRestart verb = "restart" // stop, then start
)

// doing is the state while a verb is done.
var doing = map[verb]monitorState{verbStart: stateStarting, verbStop: stateStopping, verbRestart: stateRestarting}

// Expects: what an instance or a service shall become. The empty one is unset.
const (
	expectStarted = "started"
	expectStopped = "stopped"
)

// core holds what this node knows and wants. Its maps are by name; what is
// sent out goes in the order of names.
type core struct {
	node     string
	cluster  clusterSpec
	frozen   bool         // the node's flag
	wanted   string       // "frozen", "thawed": what the flag is to become, "" once it is
	state    monitorState // of the node monitor
	ending   bool         // daemon_shutdown: everything is to be stopped
	services map[string]*monitored

	// The cluster (link.go).
	epoch, salt uint64
	seed        uint64
	born        leaseClock
	peers       map[string]*peer
	seqSent     uint64 // beats to a new member begin above: it may be one that comes back
	joined      bool   // all members were seen at once
	silent      string // why no beats are sent; "": they are

	// This node's claims (claim.go).
	claims  uint32 // the number of their content
	claimed map[string]*claim
	gone    map[string]uint32 // given back: the number at which
	guard   bool              // lives
	guarded guardEffect       // what it was told last
	watched leaseClock        // when that was looked at last

	// This node's votes (claim.go).
	grants        map[string]*promise
	version, kept uint64 // of the journal: with the last change, and on disk
	ballot        uint64 // counts changes of what is granted
	unkept        bool   // it changed since it was last written
	writing       bool
	retry         leaseClock    // a write failed; not before
	mute          time.Duration // no votes until muteEnd, if not 0
	muteEnd       leaseClock

	// Of the present step.
	now     time.Time
	clock   leaseClock
	effects []effect
	quiet   bool       // it is about no instance
	stirred bool       // it may matter to all instances
	soonest leaseClock // when time alone will change something; zero: never
	alarm   time.Time  // the wake that was asked for last
}

// monitored is an instance as the core sees it.
type monitored struct {
	spec      *service
	probed    bool // every resource was looked at since the daemon's start
	frozen    bool
	state     monitorState
	changed   time.Time // of state
	why       string    // of a failed state; or why a service that should run does not
	fault     string    // of the last write of its flag
	acting    *order    // what is being done
	cancelled bool
	ended     bool // the present shutdown has tried to stop it
	resources map[string]*monitoredResource
	wants     bool       // to run: its claim is not given back
	vacant    leaseClock // since when nobody runs it who can be seen; zero: somebody does
	again     leaseClock // no new claim before
	away      string     // why it is being stopped, for another node to run it
	intent
}

// intent is what shall outlive the daemon, but not the machine's next boot.
type intent struct {
	Wanted *order `json:"wanted,omitempty"` // ordered, not begun yet, or cut off
	Flag   string `json:"flag,omitempty"`   // "frozen", "thawed": to become so, before wanted

	LocalExpect  string              `json:"local_expect,omitempty"`
	GlobalExpect string              `json:"global_expect,omitempty"`
	Failed       monitorState        `json:"failed,omitempty"`
	FailedWhy    string              `json:"failed_why,omitempty"`
	Restarts     map[string]restarts `json:"restarts,omitempty"` // by rid
}

// restarts of one resource.
type restarts struct {
	Count  int       `json:"count"`
	Last   time.Time `json:"last,omitzero"`     // when it began, then when it ended
	GaveUp string    `json:"gave_up,omitempty"` // why it is left down
}

type monitoredResource struct {
	status status
	note   string    // why it is not up
	since  time.Time // of status
	added  bool      // to an instance that was there, and not seen up since
}

// order is something to do. Without rids it is for the whole instance.
type order struct {
	Verb   verb     `json:"verb"`
	Rids   []string `json:"rids,omitempty"`
	ByHand bool     `json:"by_hand,omitempty"`
	// Within is how long the programs may take to end, all together, before they
	// are killed, where that is shorter than their own time.
	Within time.Duration `json:"within,omitempty"`
}

// event is what happened; apply takes it in, and returns the instance that it
// is about, nil for all.
type event interface {
	apply(c *core) *monitored
}

// effect is what the shell shall do.
type effect interface{}

type (
	// actEffect: do the order; doneEvent tells how it ended.
	actEffect struct {
		service string
		order   order
	}
	// cancelEffect: end what is being done.
	cancelEffect struct{ service string }
	// flagEffect: write the frozen flag of a service, or of the node where
	// service is empty; flagEvent tells how it ended.
	flagEffect struct {
		service string
		frozen  bool
	}
	// transitionEffect is for the log, and for who waits.
	transitionEffect struct {
		service  string
		from, to string
		why      string
	}
	// saveEffect: keep the intent.
	saveEffect struct {
		service string
		intent  intent
	}
	// wakeEffect: a tick is wanted at that time.
	wakeEffect struct{ at time.Time }
	// refuseEffect answers an order that cannot be taken.
	refuseEffect struct{ err error }
)

type (
	// serviceEvent: a service is there, or its file changed, or is gone (spec
	// nil). found is what an earlier daemon left.
	serviceEvent struct {
		name   string
		spec   *service
		frozen bool
		found  intent
	}
	// statusEvent: a resource was seen in a state.
	statusEvent struct {
		service, rid string
		status       status
		note         string
	}
	// doneEvent: an order was done, or failed with err at its part to stop or
	// to start.
	doneEvent struct {
		service string
		part    verb
		err     error
	}
	// flagEvent: a frozen flag was written, or not.
	flagEvent struct {
		service string // empty: the node's
		frozen  bool
		err     error
	}
	// failedEvent: what a crash cut off does not stop.
	failedEvent struct{ service, why string }
	// tickEvent: time passed.
	tickEvent struct{}
)

// step is the only way in.
func (c *core) step(now moment, e event) []effect {
	c.now, c.clock, c.effects = now.wall, now.clock, nil
	c.quiet, c.stirred, c.soonest = false, false, leaseClock{}
	s := e.apply(c)
	c.round()
	c.speak()
	if !c.quiet || c.stirred {
		c.release()
	}
	switch {
	case s != nil && !c.stirred:
		c.decide(s)
	case !c.quiet || c.stirred:
		c.prune()
		for _, name := range slices.Sorted(maps.Keys(c.services)) {
			c.decide(c.services[name])
		}
	}
	c.journal()
	c.watch()
	c.hurry()
	c.wake()
	return c.effects
}

// nobody is what events return that are about no instance.
func (c *core) nobody() *monitored {
	c.quiet = true
	return nil
}

func (c *core) send(e effect) { c.effects = append(c.effects, e) }

func (e serviceEvent) apply(c *core) *monitored {
	s := c.services[e.name]
	if e.spec == nil {
		if s != nil && s.probed && s.down() && s.acting == nil {
			c.giveBack(e.name) // nobody will look at it any more
		}
		delete(c.services, e.name)
		return nil
	}
	if s == nil {
		s = &monitored{state: stateIdle, changed: c.now, frozen: e.frozen, intent: e.found}
		s.Restarts = maps.Clone(e.found.Restarts) // the event is not the core's to change
		if e.found.Failed != "" {
			s.state, s.why = e.found.Failed, e.found.FailedWhy
		}
		c.services[e.name] = s
	}
	before, known := s.spec, s.resources
	s.spec, s.resources = e.spec, map[string]*monitoredResource{}
	for _, r := range e.spec.resources {
		m := known[r.rid]
		if m == nil || !r.disable && before.resource(r.rid).disable { // what was known of it is old
			m = &monitoredResource{status: statusUndef, added: before != nil}
			s.probed = s.probed && r.disable
		}
		s.resources[r.rid] = m
	}
	c.leave(s, known)
	s.look()
	return s
}

// leave forgets the resources that are not looked after any more, and says
// which of them were up; those that leave the file are down (leavesBehind).
func (c *core) leave(s *monitored, known map[string]*monitoredResource) {
	for _, rid := range slices.Sorted(maps.Keys(known)) {
		r := s.spec.resource(rid)
		if r != nil && !r.disable {
			continue
		}
		if delete(s.Restarts, rid); known[rid].status == statusUp {
			c.send(transitionEffect{s.spec.name, string(s.state), string(s.state), rid + " is disabled; it is up, and goes on by itself"})
			known[rid].status = statusUndef
		}
	}
}

// look sets probed once every resource is known.
func (s *monitored) look() {
	s.probed = s.probed || !slices.ContainsFunc(s.spec.resources, func(r *resource) bool {
		return !r.disable && s.resources[r.rid].since.IsZero()
	})
}

func (e statusEvent) apply(c *core) *monitored {
	s := c.services[e.service]
	if s == nil || s.resources[e.rid] == nil {
		return s
	}
	r := s.resources[e.rid]
	if r.status == statusUp && e.status != statusUp {
		c.forget(s, e.rid, r.since)
	}
	if r.status != e.status || r.since.IsZero() {
		r.since = c.now
	}
	if e.status == statusUp && r.status != statusUp && s.Restarts[e.rid].GaveUp != "" {
		s.setRestarts(e.rid, func(n *restarts) { n.GaveUp = "" })
		c.save(s)
	}
	r.status, r.note, r.added = e.status, e.note, r.added && e.status != statusUp
	s.look()
	return s
}

func (e failedEvent) apply(c *core) *monitored {
	if s := c.services[e.service]; s != nil {
		c.fail(s, stateStopFailed, e.why)
		return s
	}
	return nil
}

func (tickEvent) apply(*core) *monitored { return nil }

// enter changes the state and says so.
func (c *core) enter(s *monitored, state monitorState, why string) {
	if s.state != state || why != "" {
		c.send(transitionEffect{s.spec.name, string(s.state), string(state), why})
	}
	if s.state != state {
		s.changed = c.now
	}
	s.state, s.why = state, why
	switch {
	case state.failed():
		s.Failed, s.FailedWhy = state, why
	case state != stateFreezing && state != stateThawing: // these come back to it
		s.Failed, s.FailedWhy = "", ""
	}
	c.save(s)
}

// fail enters a failed state. A start that was to follow would be refused now.
func (c *core) fail(s *monitored, state monitorState, why string) {
	if s.Wanted != nil && s.Wanted.Verb != verbStop {
		why += "; the " + string(s.Wanted.Verb) + " that was to follow is not done"
		s.Wanted, s.LocalExpect = nil, ""
	}
	c.enter(s, state, why)
}

func (c *core) save(s *monitored) {
	kept := s.intent
	kept.Restarts = maps.Clone(s.Restarts)
	switch o := s.acting; {
	case o == nil:
	case !o.ByHand && o.Rids != nil: // a restart that is cut off does not count
		for _, rid := range o.Rids {
			if n := kept.Restarts[rid]; n.Count > 1 {
				n.Count--
				kept.Restarts[rid] = n
			} else {
				delete(kept.Restarts, rid)
			}
		}
	case s.Wanted == nil && (o.ByHand || o.Verb == verbStop):
		kept.Wanted = o // a daemon that is cut off here leaves it to the next one
	}
	c.send(saveEffect{s.spec.name, kept})
}

func (e doneEvent) apply(c *core) *monitored {
	s := c.services[e.service]
	if s == nil || s.acting == nil {
		return s
	}
	did := *s.acting
	s.acting = nil
	for _, rid := range did.Rids {
		if s.Restarts[rid].Count > 0 {
			s.setRestarts(rid, func(n *restarts) { n.Last = c.now }) // the delay, and the time up, begin now
		}
	}
	switch {
	case s.cancelled:
		if did.Rids == nil && s.LocalExpect == expectStarted {
			s.LocalExpect = "" // it was rolled back
		}
		c.enter(s, stateIdle, "")
	case e.err == nil && s.away != "":
		c.enter(s, stateStartFailed, s.away)
	case e.err == nil:
		if did.Rids == nil && did.Verb != verbStop {
			s.LocalExpect = expectStarted
		}
		c.enter(s, stateIdle, "")
	case !did.ByHand && did.Rids != nil: // one of the restarts that a resource has
		c.enter(s, stateIdle, e.err.Error())
	case e.part == verbStop:
		c.fail(s, stateStopFailed, e.err.Error())
	default:
		if did.Rids == nil {
			s.LocalExpect = "" // it was rolled back
		}
		c.fail(s, stateStartFailed, e.err.Error())
	}
	s.cancelled, s.away = false, ""
	return s
}

// decide looks at one instance and begins what is to be done next.
func (c *core) decide(s *monitored) {
	s.wants = false
	if c.mustStop(s) {
		c.surrender(s)
	} else if c.next(s) {
		c.reached(s)
	}
	c.settleClaim(s)
}

// next is what nothing but a lost right comes before. It tells whether the
// instance could be looked at.
func (c *core) next(s *monitored) bool {
	if s.acting != nil {
		// Who wants it stopped does not wait for a start that hangs.
		if s.Wanted != nil && s.Wanted.Verb == verbStop && s.Wanted.Rids == nil || c.ending {
			c.cancel(s)
		}
		return false
	}
	if !s.probed || s.state == stateFreezing || s.state == stateThawing {
		return false
	}
	avail, _ := s.status()
	if s.Flag != "" && s.Flag != flagState(s.frozen, false) {
		c.flag(s)
		return false
	}
	s.Flag = ""
	c.foundUp(s)
	c.guardStopped(s)
	switch {
	case c.ending:
		if s.down() || s.ended && s.state == stateStopFailed {
			return false
		}
		s.LocalExpect, s.ended = "", true
		c.act(s, order{Verb: verbStop}, "the daemon shuts down")
	case s.Wanted != nil && s.Wanted.Verb != verbStop && !c.mayStart(s, true):
	case s.Wanted != nil:
		o := *s.Wanted
		s.Wanted = nil
		c.begin(s, o, avail)
	case s.state.failed():
	case s.LocalExpect == expectStarted:
		c.recover(s)
	case avail == statusUp:
		s.LocalExpect = expectStarted // found up, so it shall be up
		c.because(s, "")
		c.save(s)
	case s.LocalExpect == expectStopped:
		c.because(s, "stopped by local_expect; to start it: svcmgr -s "+s.spec.name+" start --local")
	default:
		c.orchestrate(s)
	}
	return true
}

// cancel ends what is being done, unless that is a stop.
func (c *core) cancel(s *monitored) {
	if s.acting.Verb != verbStop && !s.cancelled {
		s.cancelled = true
		c.send(cancelEffect{s.spec.name})
	}
}

// act begins an order. What it begins, the guard can end before it is begun.
func (c *core) act(s *monitored, o order, why string) {
	s.acting, s.cancelled = &o, false
	c.enter(s, doing[o.Verb], why)
	c.watch()
	c.send(actEffect{s.spec.name, o})
}

// because keeps why a service that should run does not.
func (c *core) because(s *monitored, why string) {
	if !s.state.failed() {
		s.why = cmp.Or(why, s.fault)
	}
}

// orchestrate starts by itself what may run here and is down.
func (c *core) orchestrate(s *monitored) {
	name := s.spec.name
	switch {
	case s.spec.orchestrate == "no":
		c.because(s, "")
	case s.spec.orchestrate == "start" && s.spec.nodes[0] != c.node:
		c.because(s, "orchestrate = start: it starts by itself on "+s.spec.nodes[0]+" only")
	case c.isFrozen():
		c.because(s, "this node is frozen; to start services by itself again: nodemgr thaw --local")
	case s.frozen:
		c.because(s, "frozen; to let it start by itself: svcmgr -s "+name+" thaw --local")
	case s.unclear() != "":
		c.because(s, "not started by itself: "+s.unclear())
	case !c.mayStart(s, false):
	default:
		c.act(s, order{Verb: verbStart}, "")
	}
}

// unclear names a resource of which it is not known whether it runs.
func (s *monitored) unclear() string {
	for _, r := range s.spec.resources {
		if m := s.resources[r.rid]; !r.disable && (m.status == statusWarn || m.status == statusUndef) {
			return fmt.Sprintf("%s is %s (%s)", r.rid, m.status, m.note)
		}
	}
	return ""
}

// status adds up the resources. A resource that was left down makes a warning
// of what would look like an instance that nobody started.
func (s *monitored) status() (avail, overall status) {
	avail, overall = instanceStatus(s.spec.resources, func(rid string) status { return s.resources[rid].status })
	if s.LocalExpect == expectStarted && avail == statusDown && s.givenUp() != "" {
		avail, overall = statusWarn, statusWarn
	}
	return avail, overall
}

// down tells whether nothing of the instance can be running.
func (s *monitored) down() bool {
	return !slices.ContainsFunc(s.spec.resources, func(r *resource) bool {
		return !r.disable && s.resources[r.rid].status != statusDown && s.resources[r.rid].status != statusNA
	})
}
