package main

import (
	"cmp"
	"container/heap"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestGoldenCluster plays the stories in testdata/cluster_*.txt to whole
// clusters of cores: no chance, each packet takes a millisecond, each start and
// stop 100. After a line `nodes n1 n2 n3`, a service's file under `file svc`
// and `service`, come events, the first word their time:
//
//	1s cut n1 n2, cut n1>n2     the link, or one direction of it
//	1s cut n1                   all links of n1
//	1s heal                     all links
//	1s kill n1                  daemon, guard and what runs: the plug
//	1s dies n1                  the daemon alone
//	1s start n1                 a daemon
//	1s freeze n1                the node's flag, as it is found at a start
//	1s hand n1 web              the service is started by hand there
//	1s down n1 web              its program dies
//	1s guard n1 dead, alive     its guard
//	1s file n1 web gone         the service's file there
//	1s file n1 web n1 n2        its nodes in that file
//	1s members n1 n1 n2         what n1 takes for the members
//	1s order n1 web started     as in the scripts of one node
//	9s                          until then
//
// Below: what each node does, with its time in seconds, and what runs at the
// end of the line's time.
func TestGoldenCluster(t *testing.T) { playGolden(t, "testdata/cluster_*.txt", playCluster) }

// story is a cluster that a script is played to.
type story struct {
	now   time.Duration
	queue storyQueue
	nodes map[string]*storyNode
	names []string
	cut   map[string]bool // n1>n2
	files map[string]string
	out   strings.Builder
}

type storyNode struct {
	name    string
	core    *core // nil: no daemon
	life    int   // of the daemon
	votes   *votes
	epoch   uint64
	frozen  bool
	held    guardEffect
	running map[string]bool
	acting  map[string]*order
	told    map[string]peerData
}

type storyEvent struct {
	at time.Duration
	n  int
	do func()
}

type storyQueue struct {
	events []storyEvent
	n      int
}

func (q *storyQueue) Len() int { return len(q.events) }
func (q *storyQueue) Less(i, j int) bool {
	a, b := q.events[i], q.events[j]
	return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.n, b.n)) < 0
}
func (q *storyQueue) Swap(i, j int) { q.events[i], q.events[j] = q.events[j], q.events[i] }
func (q *storyQueue) Push(x any)    { q.events = append(q.events, x.(storyEvent)) }
func (q *storyQueue) Pop() any {
	last := q.events[len(q.events)-1]
	q.events = q.events[:len(q.events)-1]
	return last
}

func (s *story) after(d time.Duration, do func()) {
	s.queue.n++
	heap.Push(&s.queue, storyEvent{s.now + d, s.queue.n, do})
}

func (s *story) until(at time.Duration) {
	for len(s.queue.events) > 0 && s.queue.events[0].at <= at {
		e := heap.Pop(&s.queue).(storyEvent)
		s.now = e.at
		e.do()
	}
	s.now = at
}

func (s *story) moment() moment {
	return moment{scriptStart.Add(s.now), leaseClock{s.now + time.Hour, s.now + time.Hour}}
}

func (s *story) say(format string, args ...any) {
	fmt.Fprintf(&s.out, "    %7.3f %s\n", s.now.Seconds(), fmt.Sprintf(format, args...))
}

func (s *story) spec() clusterSpec {
	spec := clusterSpec{members: s.names, list: 7, timeout: 3 * time.Second, grace: 3 * time.Second, rejoin: 90 * time.Second, beating: true}
	spec.quorum = len(s.names) >= 3
	spec.longest = termOf(time.Minute, spec.grace)
	return spec
}

// start begins a daemon.
func (s *story) start(n *storyNode) {
	n.life++
	n.epoch++
	held := map[string]leaseClock{}
	for _, name := range n.held.held {
		held[name] = n.held.deadline
		if own, ok := n.held.own[name]; ok {
			held[name] = own
		}
	}
	n.core = newCore(birth{
		node: n.name, epoch: n.epoch, salt: n.epoch<<32 + 1, seed: uint64(len(n.name)) + n.epoch, frozen: n.frozen,
		now: s.moment(), cluster: s.spec(), votes: n.votes, held: held,
	})
	n.acting, n.told = map[string]*order{}, map[string]peerData{}
	s.step(n, guardEvent{true})
	for _, name := range sortedKeys(s.files) {
		spec, err := parseService(name, s.files[name], n.name, s.names)
		if err != nil {
			panic(err)
		}
		if !slices.Contains(spec.nodes, n.name) {
			continue
		}
		s.step(n, serviceEvent{name, spec, false, intent{}})
		s.see(n, name)
	}
	s.step(n, scannedEvent{})
	life := n.life
	every := func(d, phase time.Duration, do func()) {
		var again func()
		again = func() {
			if n.core != nil && n.life == life {
				do()
				s.after(d, again)
			}
		}
		s.after(phase, again)
	}
	phase := time.Duration(slices.Index(s.names, n.name)) * 10 * time.Millisecond
	every(500*time.Millisecond, phase, func() { s.step(n, beatDue{"hb#1"}) })
	every(750*time.Millisecond, phase+5*time.Millisecond, func() { s.step(n, tickEvent{}) })
}

// see tells a node's core what runs there.
func (s *story) see(n *storyNode, name string) {
	if n.core == nil || n.core.services[name] == nil {
		return
	}
	state := statusDown
	if n.running[name] {
		state = statusUp
	}
	s.step(n, statusEvent{name, "app#1", state, ""})
}

// step gives an event to a node's core and does its effects.
func (s *story) step(n *storyNode, e event) {
	if n.core == nil {
		return
	}
	life := n.life
	for _, f := range n.core.step(s.moment(), e) {
		switch f := f.(type) {
		case beatEffect:
			s.packet(n, f.to, func(to *storyNode) { s.step(to, beatEvent{n.name, f.beat}) })
		case votesEffect:
			votes := votes{maps.Clone(f.votes.Grants), f.votes.Mute}
			s.after(2*time.Millisecond, func() {
				n.votes = &votes
				if n.life == life {
					s.step(n, votesKept{f.version, nil})
				}
			})
		case guardEffect:
			n.held = f
			s.guard(n)
		case actEffect:
			s.say("%s: %s %s", n.name, f.order.Verb, f.service)
			s.after(100*time.Millisecond, func() {
				if n.life != life {
					return
				}
				n.running[f.service] = f.order.Verb != verbStop
				s.see(n, f.service)
				s.step(n, doneEvent{f.service, f.order.Verb, nil})
			})
		case transitionEffect:
			if f.from != f.to {
				s.say("%s: %s", n.name, effectText(f))
			}
		case linkEffect:
			s.say("%s: link with %s: %s", n.name, f.peer, f.state)
		case wakeEffect:
			s.after(f.at.Sub(scriptStart)-s.now, func() {
				if n.life == life {
					s.step(n, tickEvent{})
				}
			})
		case refuseEffect, anewEffect:
			s.say("%s: %+v", n.name, f)
		}
	}
	s.spread(n)
}

// packet takes a millisecond.
func (s *story) packet(from *storyNode, name string, do func(to *storyNode)) {
	s.after(time.Millisecond, func() {
		if to := s.nodes[name]; to.core != nil && !s.cut[from.name+">"+name] {
			do(to)
		}
	})
}

// spread tells the peers what is new of a node's data.
func (s *story) spread(n *storyNode) {
	data := peerData{n.core.frozen, map[string]instanceBrief{}}
	for name, m := range n.core.services {
		avail, _ := m.status()
		data.instances[name] = instanceBrief{avail, m.state, m.frozen}
	}
	for _, name := range s.names {
		p := n.core.peers[name]
		if old, told := n.told[name]; p == nil || !p.linked || told && old.frozen == data.frozen && maps.Equal(old.instances, data.instances) {
			continue
		}
		n.told[name] = data
		s.packet(n, name, func(to *storyNode) { s.step(to, peerEvent{n.name, data}) })
	}
}

// guard stops what is held when its deadline has passed.
func (s *story) guard(n *storyNode) {
	until := n.held.deadline.raw - time.Hour
	s.after(max(0, until-s.now), func() {
		if n.core != nil || s.moment().clock.before(n.held.deadline) {
			return
		}
		for _, name := range n.held.held {
			if n.running[name] {
				s.say("%s: the guard stops %s", n.name, name)
				s.after(100*time.Millisecond, func() { n.running[name] = false })
			}
		}
	})
}

func playCluster(text string) (string, error) {
	s := &story{nodes: map[string]*storyNode{}, cut: map[string]bool{}, files: map[string]string{}}
	var kept strings.Builder
	file := ""
	for i, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if strings.HasPrefix(line, " ") {
			continue // what came of it when it was last played
		}
		s.out.WriteString(line + "\n")
		words := append(strings.Fields(line), "", "", "", "")
		switch {
		case line == "", line[0] == '#':
		case words[0] == "==":
			kept.WriteString(s.out.String())
			s = &story{nodes: map[string]*storyNode{}, cut: map[string]bool{}, files: map[string]string{}}
		case words[0] == "nodes":
			s.names = strings.Fields(line)[1:]
			for _, name := range s.names {
				s.nodes[name] = &storyNode{name: name, epoch: 1, votes: &votes{}, running: map[string]bool{}}
			}
		case words[0] == "file":
			file = words[1]
		case line[0] == '|':
			s.files[file] += strings.TrimPrefix(strings.TrimPrefix(line, "|"), " ") + "\n"
		default:
			if err := s.play(words); err != nil {
				return "", fmt.Errorf("%d: %q: %w", i+1, line, err)
			}
		}
	}
	return kept.String() + s.out.String(), nil
}

func (s *story) play(words []string) error {
	at, err := time.ParseDuration(words[0])
	if err != nil {
		return err
	}
	s.until(at)
	n, name := s.nodes[words[2]], words[3]
	switch words[1] {
	case "":
		for _, name := range s.names {
			if running := slices.Sorted(maps.Keys(s.nodes[name].running)); slices.ContainsFunc(running, func(svc string) bool { return s.nodes[name].running[svc] }) {
				s.say("%s runs on %s", running, name)
			}
		}
		return nil
	case "all":
		for _, name := range s.names {
			s.start(s.nodes[name])
		}
		return nil
	case "heal":
		clear(s.cut)
		return nil
	case "cut":
		from, to, oneWay := strings.Cut(words[2], ">")
		switch {
		case oneWay:
			s.cut[from+">"+to] = true
		case name != "":
			s.cut[words[2]+">"+name], s.cut[name+">"+words[2]] = true, true
		default:
			for _, other := range s.names {
				s.cut[words[2]+">"+other], s.cut[other+">"+words[2]] = true, true
			}
		}
		return nil
	}
	if n == nil {
		return errors.New("no such node or event")
	}
	switch words[1] {
	case "start":
		s.start(n)
	case "kill":
		n.core, n.running, n.held = nil, map[string]bool{}, guardEffect{}
		n.life++
	case "dies":
		n.core = nil
		n.life++
		s.guard(n)
	case "freeze":
		n.frozen = true
	case "hand", "down":
		n.running[name] = words[1] == "hand"
		s.see(n, name)
	case "guard":
		s.step(n, guardEvent{name == "alive"})
	case "file":
		return s.change(n, name, strings.TrimSpace(strings.Join(words[4:], " ")))
	case "members":
		spec := s.spec()
		spec.members = strings.Fields(strings.Join(words[3:], " "))
		s.step(n, clusterEvent{spec})
	case "order":
		o, err := scriptOrder(name, strings.Fields(strings.Join(words[4:], " ")))
		if err != nil {
			return err
		}
		s.step(n, o)
	default:
		return errors.New("no such event")
	}
	return nil
}

// change has a node's core hear of another file of a service.
func (s *story) change(n *storyNode, name, nodes string) error {
	if nodes == "gone" {
		s.step(n, serviceEvent{name: name})
		return nil
	}
	var lines []string
	for _, line := range strings.SplitAfter(s.files[name], "\n") {
		if strings.HasPrefix(line, "nodes") {
			line = "nodes = " + nodes + "\n"
		}
		lines = append(lines, line)
	}
	spec, err := parseService(name, strings.Join(lines, ""), n.name, s.names)
	if err != nil {
		return err
	}
	s.step(n, serviceEvent{name, spec, false, intent{}})
	s.see(n, name)
	return nil
}
