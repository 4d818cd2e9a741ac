package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// world is a node as the core cannot see it: what runs, what is being done,
// what fails. It performs effects, feeds the core what comes of them, and
// checks each step. The invariants:
//
//   - one action at a time for each service;
//   - only starts and restarts are cancelled;
//   - nothing but stops begins while the daemon shuts down;
//   - nothing starts in a failed state, nor, by itself, when frozen;
//   - no resource is restarted more often than it may be;
//   - a step has few effects, wakes lie in the future, and the same events
//     have the same effects.
type world struct {
	t        *testing.T
	random   *rand.Rand
	now      time.Time
	core     *core
	twin     *core // gets the same events
	services map[string]*worldService
	kept     map[string]intent
	frozen   map[string]bool // flags on disk; "" is the node's
	writes   []flagEffect    // of flags, going on
	ending   bool
	friendly bool
	trace    []string
}

type worldService struct {
	name      string
	spec      *service
	running   map[string]status
	since     map[string]time.Time
	restarted map[string]int
	acting    *order
	cancelled bool
	hangs     bool
}

const worldSpecs = 3

// specText is one of the files that a service may have.
func specText(name string, variant int) string {
	texts := map[string][worldSpecs]string{
		"a": {
			"[DEFAULT]\norchestrate = ha\nmonitor_action = freezestop\n[app#1]\nexec = /a\nrestart = 2\nmonitor = yes\n[app#2]\nexec = /a\nrestart_delay = 20s\nrestart = 1\n",
			"[DEFAULT]\norchestrate = ha\nmonitor_action = freezestop\n[app#1]\nexec = /a\nrestart = 2\nmonitor = yes\n[app#3]\nexec = /a\n",
			"[DEFAULT]\nmonitor_action = switch\n[app#1]\nexec = /a\nmonitor = yes\n[app#2]\nexec = /a\ndisable = yes\n",
		},
		"b": {
			"[app#1]\nexec = /a\n[app#2]\nexec = /a\noptional = yes\nrestart = 1\n",
			"[app#1]\nexec = /a\nrestart = 3\nrestart_delay = 10m\n[app#2]\nexec = /a\n",
			"[DEFAULT]\norchestrate = ha\n[app#2]\nexec = /a\n",
		},
		"c": {
			"[DEFAULT]\nnodes = n1 n2\norchestrate = ha\n[app#1]\nexec = /a\nrestart = 1\n",
			"[DEFAULT]\nnodes = n1 n2\norchestrate = start\n[app#1]\nexec = /a\nrestart = 1\n",
			"[DEFAULT]\nnodes = n1 n2\n[app#1]\nexec = /a\n[app#2]\nexec = /a\n",
		},
	}
	return texts[name][variant]
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{
		t: t, random: rand.New(rand.NewPCG(seed, 1)), now: scriptStart,
		services: map[string]*worldService{}, kept: map[string]intent{}, frozen: map[string]bool{},
	}
	for _, name := range []string{"a", "b", "c"} {
		w.services[name] = &worldService{name: name, running: map[string]status{}, since: map[string]time.Time{}, restarted: map[string]int{}}
	}
	w.daemon()
	return w
}

func (w *world) chance(percent int) bool { return !w.friendly && w.random.IntN(100) < percent }

func (w *world) pick() *worldService {
	return w.services[string("abc"[w.random.IntN(3)])]
}

// daemon begins a new daemon: what the last one was doing is cut off.
func (w *world) daemon() {
	w.trace = append(w.trace, "daemon")
	w.core, w.twin = loneCore(w.frozen[""]), loneCore(w.frozen[""])
	w.writes, w.ending = nil, false
	for _, name := range sortedKeys(w.services) {
		s := w.services[name]
		cut := s.acting
		s.acting, s.cancelled = nil, false
		if o := w.kept[name].Wanted; o != nil && o.Rids == nil {
			clear(s.restarted) // a new life of all of it
		}
		w.file(s, w.random.IntN(worldSpecs))
		if cut == nil {
			continue
		}
		for _, rid := range cut.Rids {
			if !cut.ByHand && s.restarted[rid] > 0 {
				s.restarted[rid]--
			}
		}
		if w.chance(20) {
			w.step(failedEvent{name, "hangs"})
			continue
		}
		for _, r := range s.spec.resources {
			if !r.disable && (cut.Rids == nil || slices.Contains(cut.Rids, r.rid)) {
				w.see(s, r.rid, statusDown)
			}
		}
	}
}

// file gives a service one of its files.
func (w *world) file(s *worldService, variant int) {
	spec, err := parseService(s.name, specText(s.name, variant), "n1", []string{"n1"})
	if err != nil {
		w.t.Fatal(err)
	}
	s.spec = spec
	for _, r := range spec.resources {
		if s.running[r.rid] == "" {
			s.running[r.rid] = statusDown
		}
	}
	w.step(serviceEvent{s.name, spec, w.frozen[s.name], w.kept[s.name]})
}

// see makes a resource what it is and tells the core.
func (w *world) see(s *worldService, rid string, is status) {
	if s.running[rid] != is || s.since[rid].IsZero() {
		if s.running[rid] == statusUp && w.now.Sub(s.since[rid]) >= restartsForgotten {
			s.restarted[rid] = 0
		}
		s.since[rid] = w.now
	}
	s.running[rid] = is
	w.step(statusEvent{s.name, rid, is, "seen"})
}

func (w *world) step(e event) {
	before := map[string]monitorState{}
	for name, m := range w.core.services {
		before[name] = m.Failed
	}
	text := strings.TrimSuffix(fmt.Sprintf("%s %s", w.now.Sub(scriptStart), strings.TrimPrefix(fmt.Sprintf("%T", e), "main.")), "Event")
	if s, ok := e.(serviceEvent); ok {
		text += " " + s.name
	} else {
		text += fmt.Sprintf(" %+v", e)
	}
	w.trace = append(w.trace, text)
	effects, twins := stepKept(w.core, w.now, e), stepKept(w.twin, w.now, e)
	if len(effects) != len(twins) || len(effects) > 30 {
		w.fail("%d effects, and %d of the same events", len(effects), len(twins))
	}
	for i, f := range effects {
		text := effectText(f)
		w.trace = append(w.trace, "    "+text)
		if again := effectText(twins[i]); again != text {
			w.fail("the same events had another effect: %s", again)
		}
	}
	for _, f := range effects {
		w.perform(f, e, before)
	}
}

// perform checks an effect, and begins what it asks for.
func (w *world) perform(f effect, e event, before map[string]monitorState) {
	switch f := f.(type) {
	case actEffect:
		w.act(f, e, before[f.service])
	case cancelEffect:
		s := w.services[f.service]
		if s.acting == nil || s.acting.Verb == verbStop || s.cancelled {
			w.fail("cancelled: %+v", s.acting)
		}
		s.cancelled = true
	case flagEffect:
		for _, other := range w.writes {
			if other.service == f.service {
				w.fail("two writes of one flag")
			}
		}
		w.writes = append(w.writes, f)
	case saveEffect:
		w.kept[f.service] = f.intent
	case wakeEffect:
		if !f.at.After(w.now) {
			w.fail("a wake in the past")
		}
	}
}

func (w *world) act(f actEffect, e event, failed monitorState) {
	s := w.services[f.service]
	starts := f.order.Verb != verbStop
	frozen := w.frozen[s.name] || w.frozen[""]
	if flag, ok := e.(flagEvent); ok && flag.err == nil { // the disk has it already
		frozen = frozen && w.core.services[s.name].frozen || w.core.frozen
	}
	cleared := false
	if o, ok := e.(serviceOrder); ok {
		cleared = o.clear
	}
	switch {
	case s.acting != nil:
		w.fail("two actions at once")
	case w.ending && starts:
		w.fail("started while the daemon shuts down")
	case starts && failed != "" && !cleared:
		w.fail("started in the state %s", failed)
	case starts && frozen && !f.order.ByHand:
		w.fail("started by itself though frozen")
	}
	if !f.order.ByHand && f.order.Verb == verbRestart {
		for _, rid := range f.order.Rids {
			if s.restarted[rid]++; s.restarted[rid] > s.spec.resource(rid).restart {
				w.fail("%s was restarted %d times of %d", rid, s.restarted[rid], s.spec.resource(rid).restart)
			}
		}
	}
	if f.order.Rids == nil && f.order.Verb == verbStop {
		clear(s.restarted)
	}
	s.acting, s.cancelled, s.hangs = &f.order, false, w.chance(15)
}

func (w *world) fail(format string, args ...any) {
	w.t.Helper()
	lines := slices.DeleteFunc(slices.Clone(w.trace), func(line string) bool { return strings.HasSuffix(line, " tick {}") })
	w.t.Fatalf("%s\n%s", fmt.Sprintf(format, args...), strings.Join(lines[max(0, len(lines)-120):], "\n"))
}

// finish ends an action, or the write of a flag.
func (w *world) finish() {
	for i, f := range w.writes {
		if w.friendly || w.random.IntN(2) == 0 {
			w.writes = slices.Delete(w.writes, i, i+1)
			var err error
			if w.chance(15) {
				err = errors.New("disk full")
			} else {
				w.frozen[f.service] = f.frozen
			}
			w.step(flagEvent{f.service, f.frozen, err})
			return
		}
	}
	s := w.pick()
	if s.acting == nil || s.hangs && !s.cancelled && !w.friendly && !w.chance(10) {
		return
	}
	part, err := w.done(s, *s.acting)
	s.acting = nil
	w.step(doneEvent{s.name, part, err})
}

// done is what instance.perform would do.
func (w *world) done(s *worldService, o order) (verb, error) {
	var selected []*resource
	for _, r := range s.spec.resources {
		if !r.disable && (o.Rids == nil || slices.Contains(o.Rids, r.rid)) {
			selected = append(selected, r)
		}
	}
	if s.cancelled && o.Verb == verbRestart && w.chance(50) {
		return verbStop, errors.New("cancelled")
	}
	if o.Verb != verbStart {
		if err := w.stop(s, selected); err != nil {
			return verbStop, err
		}
	}
	if o.Verb == verbStop {
		return verbStop, nil
	}
	var began []*resource
	for _, r := range selected {
		if s.running[r.rid] == statusUp {
			continue
		}
		began = append(began, r)
		switch {
		case s.cancelled || !r.optional && w.chance(25):
			if err := w.stop(s, began); err != nil {
				return verbStop, err
			}
			return verbStart, errors.New(r.rid + " does not start")
		case r.optional && w.chance(25):
			w.see(s, r.rid, statusDown)
		default:
			w.see(s, r.rid, statusUp)
		}
	}
	return verbStart, nil
}

func (w *world) stop(s *worldService, resources []*resource) (err error) {
	for _, r := range slices.Backward(resources) {
		if w.chance(10) {
			err = errors.New(r.rid + " does not stop")
			w.see(s, r.rid, statusWarn)
		} else {
			w.see(s, r.rid, statusDown)
		}
	}
	return err
}

// check is what the checks see: each resource as it is.
func (w *world) check() {
	for _, name := range sortedKeys(w.services) {
		s := w.services[name]
		for _, r := range s.spec.resources {
			if w.friendly && s.running[r.rid] != statusUp {
				s.running[r.rid] = statusDown
			}
			if !r.disable && s.acting == nil {
				w.see(s, r.rid, s.running[r.rid])
			}
		}
	}
}

// chaos is one random event.
func (w *world) chaos() {
	s := w.pick()
	switch n := w.random.IntN(100); {
	case n < 40:
		w.finish()
	case n < 60:
		r := s.spec.resources[w.random.IntN(len(s.spec.resources))]
		if !r.disable && (s.acting == nil || w.core.services[s.name].probed) {
			w.see(s, r.rid, []status{statusUp, statusDown, statusDown, statusDown, statusWarn, statusUndef}[w.random.IntN(6)])
		}
	case n < 75:
		w.now = w.now.Add(time.Duration(w.random.IntN(60)) * time.Second)
		w.step(tickEvent{})
	case n < 77:
		w.now = w.now.Add(restartsForgotten)
		w.check()
	case n < 90:
		w.order(s)
	case n < 93:
		w.step(nodeOrder{w.random.IntN(2) == 0})
	case n < 95:
		w.ending = !w.ending
		w.step(endEvent{w.ending})
	case n < 98:
		w.file(s, w.random.IntN(worldSpecs))
		clear(s.restarted) // a restart may be allowed again, or for the first time
	default:
		w.daemon()
	}
}

func (w *world) order(s *worldService) {
	word := func(words []string) string { return words[w.random.IntN(len(words))] }
	o := serviceOrder{service: s.name}
	switch n := w.random.IntN(10); {
	case n < 2:
		o.clear = true
	case n < 3:
		o.reset = true
	case n < 6:
		o.globalExpect = word(serviceGlobals)
	case n < 8:
		o.localExpect = word(serviceLocals)
	default:
		o.localExpect = word([]string{"started", "stopped", "restarted"})
		o.rids = []string{s.spec.resources[0].rid}
	}
	if o.localExpect != "frozen" && o.localExpect != "thawed" && o.globalExpect != "frozen" && o.globalExpect != "thawed" {
		clear(s.restarted)
	}
	w.step(o)
}

// settle lets everything succeed until nothing changes any more.
func (w *world) settle() {
	w.friendly = true
	w.check()
	quiet := 0
	for i := range 5000 {
		if w.now = w.now.Add(time.Second); i%10 == 0 {
			w.check() // also of what was added during an action
		}
		mark := len(w.trace)
		w.finish()
		w.finish()
		w.step(tickEvent{})
		idle := len(w.writes) == 0
		for _, s := range w.services {
			idle = idle && s.acting == nil
		}
		for _, line := range w.trace[mark:] {
			text := strings.TrimSpace(line)
			idle = idle && (text == line || strings.HasPrefix(text, "keep ") || strings.HasPrefix(text, "wake ") || strings.HasPrefix(text, "guard "))
		}
		if quiet++; !idle {
			quiet = 0
		}
		if quiet == 700 { // longer than any restart_delay
			w.check()
			for _, m := range w.core.services {
				if g := m.GlobalExpect; g != "" && g != "started" && g != "restarted" || m.Flag != "" || m.Wanted != nil {
					w.fail("it settled, and this is left: %s", stateText(m))
				}
			}
			w.friendly = false
			return
		}
	}
	w.fail("it does not settle")
}

// TestRandomEvents lets everything happen at any time, then nothing more, and
// looks what becomes of it.
func TestRandomEvents(t *testing.T) {
	t.Parallel()
	seeds, steps := uint64(150), 400
	if testing.Short() {
		seeds = 20
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := newWorld(t, seed)
			for range steps {
				w.chaos()
			}
			if w.ending {
				w.ending = false
				w.step(endEvent{false})
			}
			w.settle()
			for i, name := range sortedKeys(w.services) {
				w.lastOrder(w.services[name], i%2 == int(seed)%2)
			}
		})
	}
}

// lastOrder starts or stops a service, when all is friendly, and expects that
// it happens and lasts.
func (w *world) lastOrder(s *worldService, up bool) {
	w.t.Helper()
	if w.frozen[""] {
		w.step(nodeOrder{false})
	}
	clear(s.restarted)
	w.step(serviceOrder{service: s.name, globalExpect: "aborted"})
	w.step(serviceOrder{service: s.name, localExpect: "thawed"})
	w.step(serviceOrder{service: s.name, clear: true})
	want, o := statusDown, serviceOrder{service: s.name, localExpect: expectStopped}
	if up {
		want, o.localExpect = statusUp, expectStarted
	}
	w.settle()
	w.step(o)
	w.settle()
	m := w.core.services[s.name]
	for _, r := range s.spec.resources {
		if !r.disable && s.running[r.rid] != want {
			w.fail("%s of %s is %s, ordered was %s: %s", r.rid, s.name, s.running[r.rid], o.localExpect, stateText(m))
		}
	}
	if m.state != stateIdle || m.GlobalExpect != "" || m.Wanted != nil || m.LocalExpect != o.localExpect || up && m.why != "" {
		w.fail("%s", stateText(m))
	}
}
